"""The sparse parts: expert layer with three back ends, router, Mixture of Depths, expert slots and their surgery.

`python model_moe.py --selftest` checks and times the expert layer's back ends on this machine.
This file imports nothing of ours, so it can be copied out together with model.py; errors are plain ValueError.

The expert layer is one operator: out[t] = sum over k of p[t, k] * w2[e] @ (silu(gate) * up) with e = ids[t, k] < E and
(gate, up) = w13[e] @ x[t]. Everything has a static shape (T * K rows, sorted by expert), nothing is dropped, and only
the back end "slices" waits for the device, so a CUDA graph and torch.compile(fullgraph=True) can hold it. Kept for
backward: x, p, the sort, and z = the rows' gate and up before the activation; the experts' outputs y are never kept,
since the gates' gradient <dout, w2 @ a> = <w2^T @ dout, a> does not need them (SonicMoE, arXiv 2512.14080). No atomics:
the same inputs give the same bits. No GPU has run it yet: the self-test is the proof on yours.

Names: T tokens (rows and positions flattened), d = C = d_model, I an expert's hidden width, E experts, K experts per
token, R = T * K sorted rows.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own emulator, on CPU: for tests, far too slow to train
triton, BROKEN = None, ""  # BROKEN: why the one that is installed cannot be imported
if INTERPRET or torch.version.cuda or torch.version.hip:  # a CPU build has no use for it and saves the import
    try:
        import triton
        import triton.language as tl
    except Exception as error:  # a third party's package can fail in any way
        triton, BROKEN = None, f"{type(error).__name__}: {error}"
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # public since torch 2.10
aten = torch.ops.aten


# ---------------------------------------------------------------- the sort


def sort_by_expert(ids, n_experts: int):
    """ids (T, K) int64; n_experts or more means no expert -> order (R,), inv (R,) int64, offs (E,) int32.

    order lists the slots t * K + k by expert, ties in order of t, slots without expert (the tail) last; inv is its
    inverse; expert e owns the sorted rows offs[e - 1] to offs[e]. No host sync.
    """
    keys = ids.reshape(-1).clamp(max=n_experts)
    if n_experts < 2**15:
        keys = keys.to(torch.int16)  # a radix sort of 2 bytes instead of 8
    keys, order = keys.sort(stable=True)
    bounds = torch.arange(1, n_experts + 1, device=ids.device, dtype=keys.dtype)
    offs = torch.searchsorted(keys, bounds, out_int32=True)
    inv = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
    return order, inv, offs


# ---------------------------------------------------------------- the plain formula


def reference_experts(x, p, ids, w13, w2):
    """What every back end must equal: a loop, index_add and autograd. Shapes as in run_experts."""
    out = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    for e in range(w2.shape[0]):
        t, k = torch.where(ids == e)
        gate, up = F.linear(x[t], w13[e].to(x.dtype)).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w2[e].to(x.dtype))
        out = out.index_add(0, t, y.to(p.dtype) * p[t, k].unsqueeze(1))
    return out.to(x.dtype)


# ---------------------------------------------------------------- Triton kernels
# One program computes one tile of one expert. The host does not know how many rows an expert has, so it launches the
# upper bound of cdiv(R, BM) + E row tiles; each program counts the tiles of all experts from offs (E numbers, in
# registers), finds its own expert and first row, and leaves if it is one too many. Rows are int64: R * d passes 2^31.

if triton is not None:

    def tuned(*sizes):
        """Autotune over tiles (BM, BN, BK, warps, stages), once per weight shape and magnitude of rows per expert."""
        sizes = [(16, 16, 16, 4, 1)] if INTERPRET else sizes
        configs = [triton.Config(dict(BM=m, BN=n, BK=k), num_warps=w, num_stages=s) for m, n, k, w, s in sizes]
        return triton.autotune(configs, key=["N", "K", "E", "bucket"])

    @tuned((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (128, 128, 32, 4, 4))
    @triton.jit
    def gmm_kernel(x, w, y, tok, offs, R, N, K, bucket, we, wn, wk, E: tl.constexpr, EP: tl.constexpr,
                   GATHER: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip  # noqa: E501
        """y[r] = w[e] @ x[tok[r]] (or x[r]): x (., K), w (E, N, K) by strides, y (R, N)."""
        pid, n_tiles = tl.program_id(0), tl.cdiv(N, BN)
        tile, e = pid // n_tiles, tl.arange(0, EP)
        begin = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
        end = tl.load(offs + e, mask=e < E, other=0)
        tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
        last = tl.cumsum(tiles, 0)  # tiles up to and including expert e
        mine = tl.sum((last <= tile).to(tl.int32), 0)
        if mine >= E:
            return
        own = e == mine
        first = tl.sum(tl.where(own, begin + (tile - last + tiles) * BM, 0), 0)
        stop = tl.sum(tl.where(own, end, 0), 0)
        r, n = first + tl.arange(0, BM), (pid % n_tiles) * BN + tl.arange(0, BN)
        rows, cols = r < stop, n < N
        source = tl.load(tok + r, mask=rows, other=0).to(tl.int64) if GATHER else r.to(tl.int64)
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(x + source[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
            at = w + mine.to(tl.int64) * we + n[None, :] * wn + k[:, None] * wk
            b = tl.load(at, mask=cols[None, :] & (k < K)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PREC)
        at = y + r.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=rows[:, None] & cols[None, :])

    @tuned((64, 128, 128, 8, 3), (64, 64, 128, 4, 4), (32, 128, 128, 4, 4), (64, 128, 256, 8, 3))
    @triton.jit
    def dw_kernel(dy, x, dw, dy_tok, x_tok, offs, N, K, bucket, E: tl.constexpr, DY_GATHER: tl.constexpr,
                  X_GATHER: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip  # noqa: E501
        """dw[e] = sum over e's rows r of dy[r] x[r]^T, (N, K); an expert without rows gets zeros."""
        pid, e = tl.program_id(0), tl.program_id(1)
        n = (pid // tl.cdiv(K, BK)) * BN + tl.arange(0, BN)
        k = (pid % tl.cdiv(K, BK)) * BK + tl.arange(0, BK)
        begin, end = tl.where(e > 0, tl.load(offs + tl.maximum(e - 1, 0)), 0), tl.load(offs + e)
        acc = tl.zeros((BN, BK), tl.float32)
        for r0 in range(begin, end, BM):
            r = r0 + tl.arange(0, BM)
            rows = r < end
            ry = tl.load(dy_tok + r, mask=rows, other=0).to(tl.int64) if DY_GATHER else r.to(tl.int64)
            rx = tl.load(x_tok + r, mask=rows, other=0).to(tl.int64) if X_GATHER else r.to(tl.int64)
            a = tl.load(dy + ry[:, None] * N + n[None, :], mask=rows[:, None] & (n < N)[None, :], other=0.0)
            b = tl.load(x + rx[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PREC)
        at = dw + e.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
        tl.store(at, acc.to(dw.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])

    @triton.jit
    def swiglu_kernel(z, s, a, end, I, BI: tl.constexpr):
        """a[r] = s[r] * silu(gate) * up, one row a program, rows of the tail left alone."""
        r = tl.program_id(0).to(tl.int64)
        if r >= tl.load(end):
            return
        c = tl.program_id(1) * BI + tl.arange(0, BI)
        gate = tl.load(z + r * 2 * I + c, mask=c < I, other=0.0).to(tl.float32)
        up = tl.load(z + r * 2 * I + I + c, mask=c < I, other=0.0).to(tl.float32)
        tl.store(a + r * I + c, (gate * tl.sigmoid(gate) * up * tl.load(s + r)).to(a.dtype.element_ty), mask=c < I)

    @triton.jit
    def swiglu_grad_kernel(z, s, da, dz, ds, end, I, BI: tl.constexpr):
        """dz and ds from da, which becomes s * a, what dW2 needs. One row a program; ds of the tail is 0."""
        r = tl.program_id(0).to(tl.int64)
        if r >= tl.load(end):
            tl.store(ds + r, 0.0)
            return
        scale, total = tl.load(s + r), tl.zeros((BI,), tl.float32)
        for c0 in range(0, I, BI):
            c = c0 + tl.arange(0, BI)
            gate = tl.load(z + r * 2 * I + c, mask=c < I, other=0.0).to(tl.float32)
            up = tl.load(z + r * 2 * I + I + c, mask=c < I, other=0.0).to(tl.float32)
            grad = tl.load(da + r * I + c, mask=c < I, other=0.0).to(tl.float32)
            sig = tl.sigmoid(gate)
            act = gate * sig
            total += grad * act * up
            tl.store(da + r * I + c, (scale * act * up).to(da.dtype.element_ty), mask=c < I)
            dgate = scale * grad * up * (sig + act * (1 - sig))
            tl.store(dz + r * 2 * I + c, dgate.to(dz.dtype.element_ty), mask=c < I)
            tl.store(dz + r * 2 * I + I + c, (scale * grad * act).to(dz.dtype.element_ty), mask=c < I)
        tl.store(ds + r, tl.sum(total, 0))

    @triton.jit
    def combine_kernel(y, inv, out, end, K, d, BD: tl.constexpr):
        """out[t] = sum over k of y[inv[t, k]], the tail left out."""
        t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
        acc, stop = tl.zeros((BD,), tl.float32), tl.load(end)
        for k in range(K):
            r = tl.load(inv + t * K + k)
            acc += tl.load(y + r * d + c, mask=c < tl.where(r < stop, d, 0), other=0.0).to(tl.float32)
        tl.store(out + t * d + c, acc.to(out.dtype.element_ty), mask=c < d)


# ---------------------------------------------------------------- grouped_mm and triton: five steps on sorted rows


def gmm(back_end, x, w, offs, tok=None):
    """x (., k) gathered by tok (R,) if given, w (E, n, k) in any strides -> (R, n); the tail's rows are garbage."""
    if back_end == "grouped_mm":
        return grouped_mm(x if tok is None else x[tok], w.transpose(1, 2), offs=offs)
    R, (E, N, K) = (x if tok is None else tok).shape[0], w.shape
    y = x.new_empty(R, N)
    prec = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def grid(meta):
        return ((triton.cdiv(R, meta["BM"]) + E) * triton.cdiv(N, meta["BN"]),)

    args = (x, w, y, offs if tok is None else tok, offs, R, N, K, min(R // E, 512).bit_length(), *w.stride())
    gmm_kernel[grid](*args, E=E, EP=triton.next_power_of_2(E), GATHER=tok is not None, PREC=prec)
    return y


def gmm_dw(back_end, dy, x, offs, dtype, dy_tok=None, x_tok=None):
    """dy (., n) and x (., k), each gathered if its index (R,) is given -> (E, n, k) in dtype."""
    if back_end == "grouped_mm":
        dy, x = (dy if dy_tok is None else dy[dy_tok]), (x if x_tok is None else x[x_tok])
        return grouped_mm(dy.t(), x, offs=offs).to(dtype)
    E, N, K, R = offs.numel(), dy.shape[1], x.shape[1], (dy if dy_tok is None else dy_tok).shape[0]
    dw = torch.empty(E, N, K, dtype=dtype, device=x.device)
    prec = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def grid(meta):
        return (triton.cdiv(N, meta["BN"]) * triton.cdiv(K, meta["BK"]), E)

    tables = (offs if dy_tok is None else dy_tok, offs if x_tok is None else x_tok, offs)
    gather = dict(DY_GATHER=dy_tok is not None, X_GATHER=x_tok is not None)
    dw_kernel[grid](dy, x, dw, *tables, N, K, min(R // E, 512).bit_length(), E=E, **gather, PREC=prec)
    return dw


def swiglu(back_end, z, s, offs):
    """z (R, 2I), s (R, 1) -> s * silu(gate) * up (R, I)."""
    R, I = z.shape[0], z.shape[1] // 2
    if back_end == "grouped_mm":
        return F.silu(z[:, :I]).mul_(z[:, I:]).mul_(s)
    a, block = z.new_empty(R, I), min(triton.next_power_of_2(I), 1024)
    swiglu_kernel[(R, triton.cdiv(I, block))](z, s, a, offs[-1:], I, BI=block)
    return a


def swiglu_grad(z, s, da, a, dz):
    """z (n, 2I), s (n, 1), da = w2^T dout (n, I) -> ds (n,) = <da, a>; a becomes s * a, dz is filled, da is used up."""
    gate, up = z.chunk(2, 1)
    dgate, dup = dz.chunk(2, 1)
    aten.silu.out(gate, out=a)
    torch.mul(da, a, out=dup)  # for now without s, and so
    ds = (dup * up).sum(1, dtype=s.dtype)
    dup.mul_(s)
    aten.silu_backward.grad_input(da.mul_(up).mul_(s), gate, grad_input=dgate)
    a.mul_(up).mul_(s)
    return ds


def combine(back_end, y, inv, offs, T):
    """y (R, d) -> out[t] = sum over k of y[inv[t * K + k]] (T, d), the tail left out whatever its rows hold."""
    (R, d), end = y.shape, offs[-1:]
    if back_end == "grouped_mm":  # an embedding bag is the fused gather and sum
        y.masked_fill_((torch.arange(R, device=y.device) >= end).unsqueeze(1), 0)
        return F.embedding_bag(inv.view(T, -1), y, mode="sum")
    out, block = y.new_empty(T, d), min(triton.next_power_of_2(d), 1024)
    combine_kernel[(T, triton.cdiv(d, block))](y, inv, out, end, R // T, d, BD=block)
    return out


def forward_rows(x, p, w13, w2, order, inv, offs, back_end):
    """-> out (T, d), z (R, 2I). The gates are applied to the I-wide rows, so that combine is a plain sum."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    z = gmm(back_end, x, w13.to(x.dtype), offs, tok)
    y = gmm(back_end, swiglu(back_end, z, s, offs), w2.to(x.dtype), offs)
    return combine(back_end, y, inv, offs, len(x)), z


def backward_rows(dout, x, p, w13, w2, order, inv, offs, z, back_end):
    """-> dx, dp, dw13, dw2."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    da, dz = gmm(back_end, dout, w2.to(x.dtype).transpose(1, 2), offs, tok), torch.empty_like(z)
    if back_end == "grouped_mm":
        a = torch.empty_like(da)
        ds = swiglu_grad(z, s, da, a, dz)
        ds.masked_fill_(torch.arange(len(ds), device=ds.device) >= offs[-1:], 0)
    else:
        ds, a, R = p.new_empty(p.numel()), da, p.numel()
        I = w2.shape[2]
        swiglu_grad_kernel[(R,)](z, s, da, dz, ds, offs[-1:], I, BI=min(triton.next_power_of_2(I), 1024))
    dw2 = gmm_dw(back_end, dout, a, offs, w2.dtype, dy_tok=tok)
    dw13 = gmm_dw(back_end, dz, x, offs, w13.dtype, x_tok=tok)
    dx = combine(back_end, gmm(back_end, dz, w13.to(x.dtype).transpose(1, 2), offs), inv, offs, len(x))
    return dx, ds[inv.view(p.shape)], dw13, dw2


# ---------------------------------------------------------------- slices: expert after expert
# On CPU fresh memory costs more than arithmetic on it (page faults, 0.2 ms per MB), so a few experts' rows live in
# buffers that the next ones use again and that mostly stay in the cache; no (R, d) tensor ever exists.


GROUP = 2048  # rows at a time; at E 64 1 and 1024 took 10 to 19% longer (1 thread, 2 noisy runs), 4096 the same


def groups(x, p, z, order, ends, widths):
    """Yield for some experts at a time: tokens, gates and z of their rows, [(expert, its rows)], a buffer per width."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    begin, parts, sizes = 0, [[]], [0]
    for e, end in enumerate(ends):  # on CUDA one at a time: a token twice in one index_add would need atomics
        if end == begin:  # in decoding most
            continue
        if sizes[-1] and (sizes[-1] + end - begin > GROUP or x.is_cuda):
            parts, sizes = [*parts, []], [*sizes, 0]
        parts[-1].append((e, slice(sizes[-1], sizes[-1] + end - begin)))
        sizes[-1] += end - begin
        begin = end
    buffers = [x.new_empty(max(sizes), width) for width in widths]
    split = (t[:begin].split(sizes) for t in (tok, s, z))
    for experts, size, *rows in zip(parts, sizes, *split):
        yield *rows, experts, *[b[:size] for b in buffers]


def forward_slices(x, p, w13, w2, order, offs):
    I, out = w2.shape[2], torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    z = x.new_empty(p.numel(), 2 * I)
    for tok, s, zs, experts, rows, a in groups(x, p, z, order, offs.tolist(), (x.shape[1], I)):
        torch.index_select(x, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(rows[own], w13[e].to(x.dtype).t(), out=zs[own])
        gate, up = zs.chunk(2, 1)
        aten.silu.out(gate, out=a).mul_(up).mul_(s)
        for e, own in experts:
            torch.mm(a[own], w2[e].to(x.dtype).t(), out=rows[own])
        out.index_add_(0, tok, rows.to(out.dtype))
    return out.to(x.dtype), z


def backward_slices(dout, x, p, w13, w2, order, inv, offs, z):
    I, dx, ends = w2.shape[2], torch.zeros(x.shape, dtype=p.dtype, device=x.device), offs.tolist()
    new = torch.empty_like if len({0, *ends}) > len(ends) else torch.zeros_like  # zeros for experts without rows
    ds, dw13, dw2, same = p.new_zeros(p.numel()), new(w13), new(w2), w13.dtype == x.dtype
    begin = 0
    for tok, s, zs, experts, rows, da, a, dz in groups(x, p, z, order, ends, (x.shape[1], I, I, 2 * I)):
        torch.index_select(dout, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(rows[own], w2[e].to(x.dtype), out=da[own])
        ds[begin : begin + len(tok)] = swiglu_grad(zs, s, da, a, dz)
        begin += len(tok)
        for e, own in experts:
            torch.mm(rows[own].t(), a[own], out=dw2[e]) if same else dw2[e].copy_(rows[own].t() @ a[own])
        torch.index_select(x, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(dz[own].t(), rows[own], out=dw13[e]) if same else dw13[e].copy_(dz[own].t() @ rows[own])
        for e, own in experts:
            torch.mm(dz[own], w13[e].to(x.dtype), out=rows[own])
        dx.index_add_(0, tok, rows.to(dx.dtype))
    return dx.to(x.dtype), ds[inv.view(p.shape)], dw13, dw2


# ---------------------------------------------------------------- the operator


def register():
    """lumen::experts and lumen::experts_backward, opaque to torch.compile, which sees only their shapes."""
    sort = "Tensor x, Tensor p, Tensor w13, Tensor w2, Tensor order, Tensor inv, Tensor offs"

    @torch.library.custom_op("lumen::experts", mutates_args=(), schema=f"({sort}, str back_end) -> (Tensor, Tensor)")
    def experts(x, p, w13, w2, order, inv, offs, back_end):
        if back_end == "slices":
            return forward_slices(x, p, w13, w2, order, offs)
        return forward_rows(x, p, w13, w2, order, inv, offs, back_end)

    @experts.register_fake
    def _(x, p, w13, w2, order, inv, offs, back_end):
        return x.new_empty(x.shape), x.new_empty(p.numel(), w13.shape[1])

    @torch.library.custom_op(
        "lumen::experts_backward",
        mutates_args=(),
        schema=f"(Tensor dout, {sort}, Tensor z, str back_end) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    def experts_backward(dout, x, p, w13, w2, order, inv, offs, z, back_end):
        if back_end == "slices":
            return backward_slices(dout, x, p, w13, w2, order, inv, offs, z)
        return backward_rows(dout, x, p, w13, w2, order, inv, offs, z, back_end)

    @experts_backward.register_fake
    def _(dout, x, p, w13, w2, order, inv, offs, z, back_end):
        return tuple(t.new_empty(t.shape) for t in (x, p, w13, w2))

    def setup_context(ctx, inputs, output):
        *tensors, ctx.back_end = inputs
        ctx.set_materialize_grads(False)  # no zeros for z's gradient, which nobody asks for
        ctx.save_for_backward(*tensors, output[1])

    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 8
        grads = torch.ops.lumen.experts_backward(dout.contiguous(), *ctx.saved_tensors, ctx.back_end)
        return *grads, None, None, None, None

    experts.register_autograd(backward, setup_context=setup_context)


if not hasattr(torch.ops.lumen, "experts"):  # this file can be imported twice, as __main__ and as model_moe
    register()


def run_experts(x, p, ids, w13, w2, back_end: str):
    """x (T, d); gates p (T, K) in fp32 (fp64 with x in fp64); ids (T, K), E or more means none -> out (T, d).

    w13 (E, 2I, d), gate rows then up, and w2 (E, d, I) are fp32 master weights: cast to x.dtype inside, so no copy is
    kept, and given fp32 gradients, zero for an expert without tokens. The ids of a token differ from each other.
    """
    order, inv, offs = sort_by_expert(ids, w2.shape[0])
    return torch.ops.lumen.experts(x.contiguous(), p.contiguous(), w13, w2, order, inv, offs, back_end)[0]


# ---------------------------------------------------------------- routing


class RouterLogits(torch.autograd.Function):
    """x W^T in fp32 whatever x's dtype, keeping x itself for backward and not its fp32 copy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (grad @ weight).to(x.dtype), grad.t() @ x.float()


SUMS = ("balance", "z", "tokens", "dropped", "entropy", "confidence")  # of a MoE layer's statistics, before the counts


class Router(nn.Module):
    """Chooses K experts for each token and weighs them; x (B, T, C) -> gates (BT, K) fp32, ids (BT, K), statistics.

    softmax: gates are the probabilities of the chosen (renormalised with norm_topk: Mixtral, Qwen3). sigmoid: the bias
    takes part in choosing only, gates are the unbiased scores (DeepSeek-V3, Wang et al. 2024). Ids from S = slots on
    compute nothing: null experts, then what was dropped for capacity. All of it is fp32.

    The balance loss takes an expert's load from the row itself (DeepSeek-V3, eq. 17 to 20). So no split of a batch over
    micro-steps or ranks changes it, and it answers at once. Loads of the whole batch are known one step late only, and
    Adam makes so much of that one step that it cost up to 0.2 nats (EXPERIMENTS.md). Rows of one topic are balanced
    too, which a load of the whole batch would not ask for (Qiu et al. 2025): what that costs was not measured.

    Buffers, in checkpoints: bias (S + nulls,), load (S + nulls,): the share of each in the previous optimizer step;
    with slots also alive (S,), sibling (S,): the twin of a split expert, itself without one, retired (S,): the step at
    which it was pruned, or -1.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.slots = cfg, cfg.n_experts_max or cfg.n_experts
        self.n = self.slots + cfg.n_null_experts
        self.weight = nn.Parameter(torch.empty(self.n, cfg.d_model))
        # what may be changed on the way, each a plain number
        self.temperature, self.capacity_factor = cfg.routing_temperature, cfg.capacity_factor
        self.expert_dropout, self.bias_rate, self.aux_weight = (
            cfg.expert_dropout,
            cfg.bias_update_rate,
            cfg.aux_loss_weight,
        )
        for name, value in self.first_buffers().items():
            self.register_buffer(name, value)
        self.muted = None  # (n,) bool for one step of training with expert_dropout: see draw_dropout

    def first_buffers(self) -> dict[str, torch.Tensor]:
        live = torch.arange(self.n) < self.cfg.n_experts
        live[self.slots :] = True
        out = {"bias": torch.zeros(self.n), "load": live / live.sum()}
        if self.cfg.n_experts_max:
            out |= {"alive": live[: self.slots].clone(), "sibling": torch.arange(self.slots)}
            out |= {"retired": torch.full((self.slots,), -1)}
        return out

    def forward(self, x):
        cfg, K = self.cfg, self.cfg.n_experts_per_token
        B = len(x) if x.dim() == 3 else 1
        x = x.reshape(-1, x.shape[-1])
        if self.training and cfg.router_jitter:
            x = x * torch.empty_like(x).uniform_(1 - cfg.router_jitter, 1 + cfg.router_jitter)
        logits = RouterLogits.apply(x, self.weight)  # (T, n)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        live = self.n
        if cfg.n_experts_max:
            dead = F.pad(~self.alive, (0, cfg.n_null_experts))
            live, logits = self.n - dead.sum(), logits.masked_fill(dead, -math.inf)
        if cfg.router == "softmax":
            score = share = logits.softmax(-1)
        else:
            score = logits.sigmoid()
            share = score + 1e-7  # so that scores pushed to zero cannot cheat the balance (Megatron issue 1545)
            share = share / share.sum(-1, keepdim=True)
        with torch.no_grad():
            ids = self.select(score.detach() + self.bias).topk(K, -1).indices
            chosen = ids.view(B, -1)  # (B, T K)
            counts = logits.new_zeros(B, self.n).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=logits.dtype))
        p = score.gather(1, ids)  # (T, K)
        if cfg.norm_topk:
            p = p / (p.sum(-1, keepdim=True) + 1e-20)
        if cfg.route_scale != 1.0:
            p = p * cfg.route_scale
        # sums over tokens; balance is 1.0 a token when loads are equal: Switch (Fedus et al. 2021), row by row
        load = counts / chosen.shape[1]  # (B, n), sums to 1
        balance = live * (share.view(B, -1, self.n) * load[:, None]).sum()
        z = (logits if cfg.router_z_loss_weight else logits.detach()).logsumexp(-1).square().sum()
        loss = self.aux_weight * balance + cfg.router_z_loss_weight * z
        with torch.no_grad():
            counts = counts.sum(0)
            dropped = logits.new_zeros(())
            if self.capacity_factor and self.training:
                ids, dropped = self.drop(ids, live)
            entropy = -torch.special.xlogy(share, share).sum()
            sums = torch.stack([balance, z, logits.new_full((), len(x)), dropped, entropy, share.amax(-1).sum()])
        return p, ids, loss, torch.cat([sums, counts])

    def select(self, choice):
        """Scores to choose by, (T, n), with what cannot be chosen at -inf."""
        if self.training and self.muted is not None:
            choice = choice.masked_fill(self.muted, -math.inf)
        if self.cfg.n_experts_max:
            own = torch.arange(self.slots, device=choice.device)
            mine = choice[:, : self.slots].masked_fill(~self.alive, -math.inf)
            twin = mine[:, self.sibling]
            # of two twins only the better one, else both would take the same tokens and push out a third; it competes
            # with the others by the mean of both, which right after a split is the parent's score
            worse = (mine < twin) | ((mine == twin) & (own > self.sibling))
            mean = torch.where(twin == -math.inf, mine, (mine + twin) / 2)
            mine = torch.where(self.sibling == own, mine, mean.masked_fill(worse, -math.inf))
            choice = torch.cat([mine, choice[:, self.slots :]], 1)
        return choice

    def drop(self, ids, live):
        """Send what exceeds an expert's capacity to nobody, first come first served; (ids, how many)."""
        sid, order = ids.flatten().sort(stable=True)
        first = torch.searchsorted(sid, torch.arange(self.n, device=ids.device))  # (n,)
        place = torch.arange(ids.numel(), device=ids.device) - first[sid]
        fair = torch.full((), self.capacity_factor * ids.numel(), device=ids.device)
        limit = torch.ceil(fair / live)
        over = torch.empty_like(place, dtype=torch.bool).scatter_(0, order, (place >= limit) & (sid < self.slots))
        return ids.masked_fill(over.view_as(ids), self.n), over.sum().float()


class Experts(nn.Module):
    """S SwiGLU networks of hidden width I as two 3-D weights: gate and up in one, gate first; see run_experts, which
    `run` stands for where other processes hold experts too."""

    def __init__(self, slots: int, d_model: int, width: int, run=None):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(slots, 2 * width, d_model))
        self.w2 = nn.Parameter(torch.empty(slots, d_model, width))
        self.run = run or run_experts

    def forward(self, x, p, ids, back_end: str):
        return self.run(x, p, ids, self.w13, self.w2, back_end)


class MoE(nn.Module):
    """A FFN of experts; x (..., C) -> (y (..., C), stats). `shared` is a module that every token visits, or None.

    stats: loss (with gradient: balance and z, weighted), moe: the sums of SUMS and the tokens per expert.
    """

    def __init__(self, cfg, shared: nn.Module | None = None):
        super().__init__()
        self.router = Router(cfg)
        self.experts = Experts(self.router.slots, cfg.d_model, cfg.d_expert)
        self.shared = shared
        self.back_end = "slices"

    def forward(self, x):
        p, ids, loss, sums = self.router(x)
        y = self.experts(x.reshape(-1, x.shape[-1]), p, ids, self.back_end).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, {"loss": loss, "moe": sums}


def draw_dropout(layers: list[MoE], seed: int) -> None:
    """Mute experts for one step: each layer draws its own, at least K stay."""
    device, n = layers[0].router.bias.device, layers[0].router.slots
    draws = torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(layers))])
    draws = draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)
    for moe, draw in zip(layers, draws):
        router, cfg = moe.router, moe.router.cfg
        can = torch.ones_like(draw, dtype=torch.bool)
        if cfg.n_experts_max:  # of two twins only one can be chosen, so only the first counts
            first = router.sibling >= torch.arange(router.slots, device=draw.device)
            can = router.alive & (first | ~router.alive[router.sibling])
        keep = draw.masked_fill(~can, math.inf).topk(cfg.n_experts_per_token, largest=False).indices
        if router.muted is None:
            router.muted = torch.zeros_like(router.bias, dtype=torch.bool)
        router.muted[: router.slots] = (draw >= 1 - router.expert_dropout).scatter(0, keep, False)


@torch.no_grad()
def update_balance(layers: list[MoE], counts: list[torch.Tensor], bad: torch.Tensor) -> None:
    """After an optimizer step, from the tokens per expert (n,) over all its micro-steps and ranks, layer by layer:
    the load shares (what surgery goes by), and the selection bias: b += rate * sign(mean - count), centred.
    Nothing changes where `bad`, a 0-d bool: that step was dropped. No host sync.
    """
    for moe, count in zip(layers, counts):
        router, cfg = moe.router, moe.router.cfg
        count = count.float()
        live = torch.ones_like(router.bias)
        if cfg.n_experts_max:
            live[: router.slots] = router.alive.float()
        load = count / count.sum().clamp(min=1)
        if router.muted is not None:  # they had no chance: what they had before
            load = torch.where(router.muted, router.load, load * (router.load * ~router.muted).sum())
        router.load.copy_(torch.where(bad, router.load, load))
        if router.bias_rate:
            mean = count.sum() / live.sum()
            bias = router.bias + router.bias_rate * torch.sign(mean - count) * live
            bias = bias - (bias * live).sum() / live.sum() * live  # without it the sum drifts (torchtitan issue 1506)
            router.bias.copy_(torch.where(bad, router.bias, bias))


# ---------------------------------------------------------------- Mixture of Depths


class MoD(nn.Module):
    """Lets a share of a row's tokens through a block and carries the rest past it (Raposo et al. 2024).

    forward(x, change, rope, ...) -> (the change to x, zero where a token was passed by; stats). `change(x, rope, pos)`
    computes the block's change for the chosen tokens only: in order, with their own positions, causal among
    themselves. learned: of each row the highest scores, and the change is multiplied by 2 sigmoid(score), so that the
    router learns; static: evenly spaced positions; random: drawn in training, hashed from the position otherwise.

    Which tokens score highest depends on later ones, so text is not made by that rule but by the causal one: a linear
    predictor on the same normalised, detached input, trained beside by cross-entropy (BCE_WEIGHT), which cannot touch
    the language-model loss. stats: loss, mod: the sums of MOD_SUMS and how often each position was kept (T,); when not
    training: kept and agree, (B, T) bool.
    """

    BCE_WEIGHT = 0.01
    alone = True  # what is inside holds no collective: a batch of which no token is kept may leave it out

    def __init__(self, cfg, layer: int):
        super().__init__()
        self.routing, self.layer, self.full = cfg.mod_routing, layer, cfg.max_seq_len
        self.eps, self.target = cfg.norm_eps, cfg.capacity(layer)
        self.set_capacity(self.target)
        if self.routing == "learned":
            self.router = nn.Linear(cfg.d_model, 1, bias=False)
            self.predictor = nn.Linear(cfg.d_model, 1)

    def set_capacity(self, capacity: float) -> None:
        """Tokens of a full row that are let through from now on, a plain int: another number is another graph."""
        self.capacity, self.tokens = capacity, max(1, math.ceil(capacity * self.full - 1e-9))

    def forward(self, x, change, rope=None, pos=None, cache=None, causal=False):
        B, T, C = x.shape
        score = logit = None
        if self.routing == "learned":
            h = F.rms_norm(x.float(), (C,), eps=self.eps)
            score = self.router(h)[..., 0]  # (B, T)
            logit = score.detach() + self.predictor(h.detach())[..., 0]  # above 0: chosen by the causal rule
        if causal and not self.training:
            return self.causal_forward(x, change, rope, pos, cache, score, logit)
        if self.routing == "learned":
            n = math.ceil(self.tokens * T / self.full)
            idx = highest(score, n).sort(dim=1).values  # (B, n), in order
        elif self.routing == "random" and self.training:
            n = math.ceil(self.tokens * T / self.full)
            idx = torch.rand(B, T, device=x.device).topk(n, dim=1).indices.sort(dim=1).values
        elif self.routing == "static":
            n = (T - 1) * self.tokens // self.full + 1
            idx = (torch.arange(n, device=x.device) * self.full + self.tokens - 1) // self.tokens
            idx = idx.expand(B, n)
        else:
            return self.causal_forward(x, change, rope, pos, cache, score, logit)
        rows = (idx + torch.arange(0, B * T, T, device=x.device)[:, None]).flatten()
        y, stats = change(take_rows(x.flatten(0, 1), rows).view(B, n, C), self.rope_of(rope, idx), None)
        if self.routing == "learned":
            y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
        y = put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C)
        with torch.no_grad():
            kept = x.new_zeros(B, T, dtype=torch.float32).scatter_(1, idx, 1.0)
        agree, loss = kept, None
        if self.routing == "learned":
            loss = self.BCE_WEIGHT * F.binary_cross_entropy_with_logits(logit, kept, reduction="sum")
            agree = ((logit > 0) == (kept > 0)).float()
        bce = kept.new_zeros(()) if loss is None else loss.detach() / self.BCE_WEIGHT
        own = {"mod": torch.cat([torch.stack([bce, agree.sum(), kept.new_full((), B * T)]), kept.sum(0)])}
        if not self.training:
            own |= {"kept": kept > 0, "agree": agree > 0}
        if loss is not None:
            own["loss"] = loss + stats.get("loss", 0.0)
        return y, stats | own

    def causal_forward(self, x, change, rope, pos, cache, score, logit):
        """Each token decided by itself and its position. Rows keep different numbers, so here the host looks."""
        B, T, C = x.shape
        at = torch.arange(T, device=x.device).expand(B, T) if pos is None or pos.dim() == 1 else pos  # (B, T)
        if self.routing == "learned":
            keep = logit > 0
        elif self.routing == "static":
            keep = at * self.tokens // self.full != (at - 1) * self.tokens // self.full
        else:
            keep = hashed(at, self.layer) < self.capacity
        if cache is not None:
            keep = keep & (at < cache.length)  # padding
        stats = {"kept": keep, "agree": torch.ones_like(keep)}
        if self.routing == "learned":
            n = math.ceil(self.tokens * T / self.full)
            best = torch.zeros_like(keep).scatter(1, highest(score, n), True)
            stats["agree"] = keep == best
        n = int(keep.sum(1).max())
        if n == 0 and self.alone:
            return torch.zeros_like(x), stats
        n = max(1, n)
        # the chosen first, in order; behind them, in rows that keep fewer, tokens whose result is thrown away
        idx = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :n]  # (B, n)
        real = keep.gather(1, idx)
        pos = at.gather(1, idx)
        if cache is not None:
            pos = pos.masked_fill(~real, cache.length)  # the spare slot, which nobody reads
        rows = (idx + torch.arange(0, B * T, T, device=x.device)[:, None]).flatten()
        y, inner = change(x.flatten(0, 1)[rows].view(B, n, C), self.rope_of(rope, idx), pos)
        if score is not None:
            y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
        y = torch.where(real[..., None], y, 0.0)  # not times zero: without a key to look at, attention gives NaN
        return put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C), inner | stats

    @staticmethod
    def rope_of(rope, idx):
        """cos and sin (T or B, T, 1, D/2) of the chosen positions: (B, n, 1, D/2)."""
        if rope is None:
            return None
        B, n = idx.shape
        return tuple(t[idx] if t.dim() == 3 else t[torch.arange(B, device=idx.device)[:, None], idx] for t in rope)


MOD_SUMS = ("bce", "agree", "tokens")  # of a MoD layer's statistics, before the counts per position


def highest(score: torch.Tensor, n: int) -> torch.Tensor:
    """Where the n highest scores of each row are, (B, n), of equal ones the earlier. In the first layer equal tokens
    score equally but for rounding, which depends on the batch: so scores count as equal in steps of 2^-12."""
    return (score.detach() * 4096).round().sort(dim=1, descending=True, stable=True).indices[:, :n]


def hashed(pos: torch.Tensor, layer: int) -> torch.Tensor:
    """A number in [0, 1) for each position, the same in every run (an integer hash)."""
    h = (pos * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B) % (1 << 32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D % (1 << 32)
    return ((h ^ (h >> 12)) % (1 << 32)).double() / (1 << 32)


class TakeRows(torch.autograd.Function):
    """x[rows] for rows that are all different: backward is a copy into zeros, where index_select would add."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, grad.shape[1]).index_copy_(0, rows, grad), None


class PutRows(torch.autograd.Function):
    """(n, C) with y at `rows`, all different, and zeros elsewhere. torch's index_copy would keep y for backward."""

    @staticmethod
    def forward(ctx, y, rows, n):
        ctx.save_for_backward(rows)
        return y.new_zeros(n, y.shape[1]).index_copy(0, rows, y)  # in place, torch 2.11 compiles to a gradient of zero

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None


take_rows, put_rows = TakeRows.apply, PutRows.apply


# ---------------------------------------------------------------- statistics


def expert_numbers(layers: dict[int, MoE], sums: torch.Tensor) -> torch.Tensor:
    """What expert_statistics needs, in one tensor on the device: sums (layers, len(SUMS) + n) of a step over all its
    micro-steps and ranks, then each layer's bias and which columns are alive; (layers, len(SUMS) + 3 n)."""
    rows = []
    for row, moe in zip(sums, layers.values()):
        r = moe.router
        alive = torch.ones_like(r.bias)
        if r.cfg.n_experts_max:
            alive[: r.slots] = r.alive.float()
        if r.muted is not None:
            alive = alive * ~r.muted
        rows.append(torch.cat([row, r.bias.to(row.dtype), alive.to(row.dtype)]))
    return torch.stack(rows)


def expert_statistics(layers: list[int], numbers: torch.Tensor, null: int = 0) -> dict:
    """Plain numbers from expert_numbers: {"layers": {layer: {...}}, and the same keys over all layers}.

    per_expert_utilization: share of the choices (None for an empty slot, and for one muted by expert_dropout);
    routing_entropy: of these shares, nats, at most max_entropy; load_balance_loss: unweighted, 1.0 when balanced;
    tokens: how many were routed; tokens_dropped: choices beyond the capacity; max_violation: largest load / mean load
    - 1; dead: experts below a tenth of their fair share; bias_range; confidence: mean of the largest probability;
    token_entropy: mean entropy of a token's probabilities, nats; router_z: mean of logsumexp(logits)^2.
    """
    out, n = {}, (numbers.shape[1] - len(SUMS)) // 3
    for layer, row in zip(layers, numbers.double().tolist()):
        sums, counts = dict(zip(SUMS, row)), row[len(SUMS) : len(SUMS) + n]
        bias, alive = row[len(SUMS) + n : len(SUMS) + 2 * n], row[len(SUMS) + 2 * n :]
        total, tokens = max(1.0, sum(counts)), max(1.0, sums["tokens"])
        share = [c / total if a else None for c, a in zip(counts, alive)]
        real, biases = [s for s in share if s is not None], [b for b, a in zip(bias, alive) if a]
        out[layer] = {
            "per_expert_utilization": share[: n - null],
            "routing_entropy": -sum(s * math.log(s) for s in real if s > 0),
            "max_entropy": math.log(len(real)),
            "load_balance_loss": sums["balance"] / tokens,
            "tokens": int(sums["tokens"]),
            "tokens_dropped": int(sums["dropped"]),
            "max_violation": max(real) * len(real) - 1,
            "dead": sum(s is not None and s < 0.1 / len(real) for s in share[: n - null]),
            "bias_range": [min(biases), max(biases)],
            "confidence": sums["confidence"] / tokens,
            "token_entropy": sums["entropy"] / tokens,
            "router_z": sums["z"] / tokens,
            "null_share": sum(s for s in share[n - null :] if s is not None) if null else 0.0,
        }
    mean = {}
    for key, value in next(iter(out.values())).items():
        values = [s[key] for s in out.values()]
        if key == "per_expert_utilization":  # slot by slot over the layers in which it is alive
            slots = [[v for v in slot if v is not None] for slot in zip(*values)]
            mean[key] = [sum(v) / len(v) if v else None for v in slots]
        elif key == "bias_range":
            mean[key] = [min(v[0] for v in values), max(v[1] for v in values)]
        elif isinstance(value, int):
            mean[key] = sum(values)
        else:
            mean[key] = max(values) if key == "max_violation" else sum(values) / len(values)
    return mean | {"layers": out}


def mod_statistics(layers: dict[int, MoD], sums: torch.Tensor, n_layers: int, saved: float) -> dict:
    """Plain numbers from the sums (layers, len(MOD_SUMS) + T) of a step; `saved` is the share of FLOPs saved.

    average_depth counts layers, average_depth_fraction is its share of n_layers; per_layer_usage: share of tokens each
    MoD layer computed; position_usage: how often each position was kept, mean over these layers.
    """
    rows, usage, agree, position = sums.double().tolist(), {}, [], None
    for (layer, _), row in zip(layers.items(), rows):
        named, kept = dict(zip(MOD_SUMS, row)), row[len(MOD_SUMS) :]
        tokens = max(1.0, named["tokens"])
        usage[layer] = sum(kept) / tokens
        agree.append(named["agree"] / tokens)
        part = [k * len(kept) / tokens / len(rows) for k in kept]
        position = part if position is None else [a + b for a, b in zip(position, part)]
    processed = sum(sum(row[len(MOD_SUMS) :]) for row in rows)
    depth = n_layers - sum(1 - u for u in usage.values())
    return {
        "capacity_factor": sum(mod.capacity for mod in layers.values()) / len(layers),
        "tokens_processed": int(processed),
        "tokens_skipped": int(sum(row[2] for row in rows) - processed),
        "average_depth": depth,
        "average_depth_fraction": depth / n_layers,
        "per_layer_usage": usage,
        "compute_savings": saved,
        "predictor_agreement": sum(agree) / len(agree),
        "predictor_loss": sum(row[0] for row in rows) / max(1.0, sum(row[2] for row in rows)),
        "position_usage": position,
    }


# ---------------------------------------------------------------- slots and surgery

WINDOW = 200  # steps for which a pruned expert can be restored; its slot is not given to another before
DEAD = 0.1  # an expert with less than this part of its fair share carries no load
APART = 0.98  # below this cosine of their weights twins have parted


class Rows:
    """How surgery reaches row e, one expert's, of a parameter `p` or of a tensor of its optimizer's state; here all of
    them are on this process. See train_fsdp.Sharded for the other case: there every method is called on all ranks."""

    def local(self, p: torch.Tensor) -> torch.Tensor:
        """What the optimizer knows the parameter as."""
        return p

    def row(self, p, t: torch.Tensor, e: int) -> torch.Tensor:
        """A copy of row e of t, which is local(p) or of its shape."""
        return t[e].clone()

    def set_row(self, p, t: torch.Tensor, e: int, value) -> None:
        t[e] = value


def slots_of(moe: MoE) -> tuple[list[bool], list[int], list[int], list[float]]:
    """alive, sibling, retired, load as plain lists. ValueError when this model has no slots."""
    r = moe.router
    if not r.cfg.n_experts_max:
        text = "these experts are fixed; a run with slots has for example"
        raise ValueError(f"{text} model.n_experts_max: {r.cfg.n_experts + 1} (init_from takes the weights over)")
    return r.alive.tolist(), r.sibling.tolist(), r.retired.tolist(), r.load.tolist()


def splittable(moe: MoE, step: int) -> list[int]:
    """Experts that can be split: alive, without a twin or one that could come back (see restore_expert)."""
    alive, sibling, retired, _ = slots_of(moe)
    gone = [not a and (retired[e] < 0 or step - retired[e] >= WINDOW) for e, a in enumerate(alive)]
    return [e for e, a in enumerate(alive) if a and (sibling[e] == e or gone[sibling[e]])]


def add_expert(moe: MoE, optimizer, step: int, parent: int | None = None, seed: int = 0, rows=None) -> tuple[int, int]:
    """Split an expert, by default the one with the most load, into a free slot; returns (parent, slot).

    Both halves get the weights of the parent, router rows w + n and w - n with n at right angles to w and 2 % of its
    length, and exclude each other from being chosen until they have parted: so the layer's output hardly moves, and
    they share the parent's tokens. Of the optimizer's state the child gets the second moments,
    its first ones are zero. `rows`: see Rows. ValueError without a free slot.
    """
    alive, sibling, retired, load = slots_of(moe)
    free = [e for e, a in enumerate(alive) if not a and (retired[e] < 0 or step - retired[e] >= WINDOW)]
    if not free:
        soon = [retired[e] + WINDOW for e, a in enumerate(alive) if not a]
        text = f"no free slot of {len(alive)}" + (f"; the next is free at step {min(soon)}" if soon else "")
        raise ValueError(f"{text}; a run with more has model.n_experts_max: {len(alive) + 1}")
    single = splittable(moe, step)
    if parent is None:
        if not single:
            raise ValueError("every expert has a twin that it has not parted from; train on before the next split")
        parent = max(single, key=lambda e: load[e])
    elif not (0 <= parent < len(alive) and alive[parent]):
        raise ValueError(f"expert {parent} is not alive; alive: {[e for e, a in enumerate(alive) if a]}")
    elif parent not in single:
        raise ValueError(
            f"expert {parent} has not parted from its twin {sibling[parent]} yet; train on or split another"
        )
    _split(moe, optimizer, parent, free[0], seed, rows or Rows())
    return parent, free[0]


def moments(optimizer, p) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's tensors that have a row per expert as p has, p as the optimizer knows it."""
    return [(n, t) for n, t in optimizer.state.get(p, {}).items() if torch.is_tensor(t) and t.shape == p.shape]


@torch.no_grad()
def _split(moe: MoE, optimizer, parent: int, slot: int, seed: int, rows: Rows) -> None:
    r = moe.router
    for p in (r.weight, moe.experts.w13, moe.experts.w2):
        mine = rows.local(p)
        rows.set_row(p, mine, slot, rows.row(p, mine, parent))
        for name, t in moments(optimizer, mine):
            value = rows.row(p, t, parent)  # of the momentum nothing: it belongs to where the parent was going
            rows.set_row(p, t, slot, value if name.endswith("_sq") else 0.0)
    for e in (parent, slot):  # what was pruned cannot come back as a twin
        r.sibling[r.sibling[e]] = r.sibling[e].clone()
    mine = rows.local(r.weight)
    w = rows.row(r.weight, mine, parent)
    n = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(w)
    n -= (n @ w) / (w @ w).clamp(min=1e-30) * w
    n *= 0.02 * w.norm() / n.norm()
    rows.set_row(r.weight, mine, parent, w + n)
    rows.set_row(r.weight, mine, slot, w - n)
    r.bias[slot] = r.bias[parent]
    r.load[parent] /= 2
    r.load[slot] = r.load[parent]
    r.alive[slot], r.retired[slot] = True, -1
    r.sibling[slot], r.sibling[parent] = parent, slot


@torch.no_grad()
def prune_expert(moe: MoE, step: int, expert: int, force: bool = False, optimizer=None, rows=None) -> None:
    """Take an expert out of the choice. Its weights stay for WINDOW steps (weight decay goes on, its momentum ends with
    `optimizer`), so restore_expert can bring it back. ValueError when it is not alive, is needed for K choices, or
    carries load and `force` is false."""
    alive, sibling, _, load = slots_of(moe)
    r, K = moe.router, moe.router.cfg.n_experts_per_token
    if not (0 <= expert < len(alive) and alive[expert]):
        raise ValueError(f"expert {expert} is not alive; alive: {[e for e, a in enumerate(alive) if a]}")
    left = [e for e, a in enumerate(alive) if a and e != expert]
    if len(left) - sum(sibling[e] != e and sibling[e] in left for e in left) // 2 < K:
        raise ValueError(f"expert {expert} is needed: every token chooses {K}, and {len(left)} would be left")
    share = load[expert] * (sum(alive) + r.cfg.n_null_experts)
    if share >= DEAD and not force:
        raise ValueError(f"expert {expert} carries {share:.2f} of a fair share; below {DEAD} it counts as dead (force)")
    r.alive[expert], r.retired[expert] = False, step
    rows = rows or Rows()
    for p in (r.weight, moe.experts.w13, moe.experts.w2) if optimizer else ():
        for name, t in moments(optimizer, rows.local(p)):
            if not name.endswith("_sq"):
                rows.set_row(p, t, expert, 0.0)
    r.load[expert] = 0  # and if it had all of it, nobody has any until the next step counts
    r.load /= r.load.sum().clamp(min=1e-9)


@torch.no_grad()
def restore_expert(moe: MoE, step: int, expert: int) -> None:
    """Undo prune_expert. ValueError when its window has closed."""
    alive, _, retired, _ = slots_of(moe)
    if not 0 <= expert < len(alive) or alive[expert] or retired[expert] < 0 or step - retired[expert] >= WINDOW:
        raise ValueError(f"expert {expert} was not pruned in the last {WINDOW} steps")
    moe.router.alive[expert], moe.router.retired[expert] = True, -1


def recycle_expert(moe, optimizer, step: int, expert: int | None = None, seed: int = 0, rows=None, parents=None):
    """Prune a dead expert (default: the one with the least load) and split the hottest (of `parents`) into its slot; no
    tensor changes its shape. Cannot be undone. `expert` may be a free slot too. Returns (parent, slot). ValueError when
    no expert is dead or none can be split."""
    alive, _, retired, load = slots_of(moe)
    if expert is None:
        expert = min((e for e, a in enumerate(alive) if a), key=lambda e: load[e])
    single = [e for e in splittable(moe, step) if e != expert and (parents is None or e in parents)]
    if not single:
        raise ValueError("no expert without a twin is left to split; train on before")
    if not 0 <= expert < len(alive):
        raise ValueError(f"there is no slot {expert}, only 0 to {len(alive) - 1}")
    if alive[expert]:
        prune_expert(moe, step, expert)
    elif retired[expert] >= 0 and step - retired[expert] < WINDOW:
        raise ValueError(f"slot {expert} can still be restored, until step {retired[expert] + WINDOW}")
    _split(moe, optimizer, max(single, key=lambda e: load[e]), expert, seed, rows or Rows())
    return moe.router.sibling[expert].item(), expert


@torch.no_grad()
def release_twins(moe: MoE, agree=lambda pairs: pairs, rows=None) -> list[tuple[int, int]]:
    """End the exclusion between twins whose weights have parted; returns those pairs. agree: what one rank found ->
    what all do, for sums on unlike machines differ."""
    alive, sibling, _, _ = slots_of(moe)
    twins = [(a, b) for a, b in enumerate(sibling) if a < b and alive[a] and alive[b]]
    parted, rows = [], rows or Rows()
    for pair in twins:
        a, b = pair
        dots = torch.zeros(3, device=moe.router.bias.device)
        for p in (moe.experts.w13, moe.experts.w2):
            one, other = (rows.row(p, rows.local(p), e) for e in pair)
            dots += torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()])
        if dots[0] < APART * (dots[1] * dots[2]).sqrt():
            parted.append((a, b))
    parted = agree(parted) if twins else []
    for a, b in parted:
        moe.router.sibling[a], moe.router.sibling[b] = a, b
    return parted


# ---------------------------------------------------------------- which back end: refuse, check, time


def versioned(name: str) -> str:
    """A back end's name; Triton's with its version where one is installed, imported or not."""
    if name != "triton":
        return name
    try:
        return f"triton {triton.__version__ if triton else importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "triton"


def back_ends(device, dtype, d: int, I: int) -> dict[str, str | None]:
    """Back end -> None if it can work here, else the reason why not."""
    device, step, found = torch.device(device), 4 if dtype == torch.float32 else 8, versioned("triton")
    no_gmm = no_triton = None
    if grouped_mm is None:
        no_gmm = f"torch {torch.__version__} has no grouped_mm; install torch 2.10 or newer"
    elif dtype == torch.float64:
        no_gmm = "grouped_mm does not know float64; use slices"
    elif d % step or I % step:
        no_gmm = f"grouped_mm needs d_model {d} and the experts' width {I} to be multiples of {step} in {dtype}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        no_gmm = "grouped_mm needs a GPU of compute capability 8.0 or newer; use triton or slices"
    if found == "triton":
        no_triton = "triton is not installed (pip install triton)"
    elif BROKEN:
        no_triton = f"{found} cannot be imported ({BROKEN})"
    elif triton is None:
        no_triton = f"{found} is there, but torch {torch.__version__} is a CPU build"
    elif dtype == torch.float64:
        no_triton = f"the kernels for {found} do not know float64; use slices"
    elif INTERPRET and dtype == torch.bfloat16:
        no_triton = f"the interpreter of {found} multiplies the bits of bfloat16 as integers"
    elif device.type != "cuda" and not INTERPRET:
        no_triton = f"{found} needs a GPU (TRITON_INTERPRET=1 emulates one, for tests)"
    return {"triton": no_triton, "grouped_mm": no_gmm, "slices": None}


def for_generation(trained: str, device, dtype, d: int, I: int) -> str:
    """The back end for a few tokens at a time, from the one for training. On CUDA slices would wait for the device in
    each layer, and triton would tune its kernels anew: grouped_mm where it can work. By reading: no GPU has run it."""
    if torch.device(device).type != "cuda":
        return trained
    return "grouped_mm" if back_ends(device, dtype, d, I)["grouped_mm"] is None else "slices"


def sample(device, dtype, T, d, I, E, K, ids=None, seed=0):
    """Random inputs of run_experts plus the output's gradient: (x, p, ids, w13, w2), dout."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape, std=1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32):
        return torch.randn(*shape, generator=g, device=device, dtype=dtype) * std

    if ids is None:
        ids = torch.rand(T, E, generator=g, device=device).topk(K, -1)[1]
    x, dout = randn(T, d).to(dtype), randn(T, d).to(dtype)
    inputs = x, randn(T, K).softmax(-1), ids, randn(E, 2 * I, d, std=d**-0.5), randn(E, d, I, std=I**-0.5)
    return [t.requires_grad_(t.is_floating_point()) for t in inputs], dout


def fwd_bwd(f, inputs, dout):
    """f(*inputs) and its gradients to x, p, w13, w2."""
    out = f(*inputs)
    return out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout)


def best_time(f, device, times=5, limit=0.3):
    """Seconds of f(), the best of a few after one to warm up; no more after limit seconds, but always one."""
    cuda = torch.device(device).type == "cuda"
    f()
    if cuda:  # else the first time would be that of the warm-up too, and where f() is slow there is no other
        torch.cuda.synchronize(device)
    best, start = float("inf"), time.perf_counter()
    for _ in range(times):
        begin = time.perf_counter()
        f()
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - start > limit:
            break
    return best


def selftest(device, dtype, T, d, I, E, K, timed=True, ids=None, names=None) -> dict[str, tuple[float, float]]:
    """Back end -> (largest error of out and the four gradients, relative to each one's maximum, in fp32; seconds)."""
    inputs, dout = sample(device, dtype, T, d, I, E, K, ids)
    wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_() for t in inputs[:2]]
    want = fwd_bwd(reference_experts, [*wide, *inputs[2:]], dout.to(wide[0].dtype))
    results = {}
    for name in names or [name for name, reason in back_ends(device, dtype, d, I).items() if reason is None]:
        try:
            got = fwd_bwd(lambda *a, name=name: run_experts(*a, name), inputs, dout)
            errors = [(g.to(w.dtype) - w).abs().max() / w.abs().max().clamp(min=1e-30) for g, w in zip(got, want)]
            error = torch.stack([e.double() for e in errors]).max().item()
            error = error if error == error else float("inf")
            seconds = float("inf")
            if timed:
                seconds = best_time(lambda: fwd_bwd(lambda *a: run_experts(*a, name), inputs, dout), device)  # noqa: B023
            results[name] = error, seconds
        except Exception as e:  # a compiler that fails, no memory: the others can still serve
            print(f"experts: {versioned(name)} failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
            results[name] = float("inf"), float("inf")
    return results


SHAPES = []
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def pick_back_end(choice: str, device, dtype, d: int, I: int, E: int, K: int, T: int) -> tuple[str, str]:
    """-> (back end, why): choice itself if it can work here, for auto the fastest one that passes the self-test.

    Raises ValueError with reason and remedy for a choice that cannot work. On CPU auto tries a small layer, at most
    about a second; on CUDA the first call also compiles and tunes Triton's kernels.
    """
    known = back_ends(device, dtype, d, I)
    if choice != "auto":
        if choice not in known:
            raise ValueError(f"experts: back end {choice!r} is not one of auto, {', '.join(known)}")
        if known[choice]:
            raise ValueError(f"experts: back end {choice} cannot work here: {known[choice]}; or let auto choose")
        return choice, "as asked"
    candidates = [name for name, reason in known.items() if reason is None and not (INTERPRET and name == "triton")]
    left_out = [f"no {name}: {reason}" for name, reason in known.items() if reason]
    if len(candidates) == 1:
        return candidates[0], "; ".join(["the only one that can work here", *left_out])
    if torch.device(device).type == "cpu":  # fewer experts with as many rows each, at most 3 GFLOP
        few = max(K, min(E, 8))
        T = max(1, min(T, 2048, int(3e9 / (18 * d * I * K))) * few // E)
        E = few
    results = selftest(device, dtype, min(T, 8192), d, I, E, K, names=candidates)
    passed = {k: seconds for k, (error, seconds) in results.items() if error < TOLERANCE[dtype]}
    best = min(passed, key=passed.get, default="slices")
    tried = ", ".join(f"{versioned(k)} {v[1] * 1e3:.1f} ms error {v[0]:.0e}" for k, v in results.items())
    return best, "; ".join([tried, *left_out])


# ---------------------------------------------------------------- python model_moe.py --selftest


def edge_cases():
    """Name, (T, d, I, E, K), ids or None: what expert layers elsewhere got wrong."""
    g = torch.Generator().manual_seed(1)
    dead = torch.rand(40, 6, generator=g).index_fill(1, torch.tensor([3]), -1).topk(2, -1)[1]
    tail = torch.rand(33, 5, generator=g).topk(2, -1)[1]  # ids 4: no expert
    return [
        ("an expert without tokens", (40, 32, 24, 6, 2), dead),
        ("all tokens to one expert", (40, 32, 24, 4, 1), torch.full((40, 1), 2)),
        ("one expert", (17, 16, 16, 1, 1), None),
        ("every expert", (17, 16, 16, 4, 4), None),
        ("one token", (1, 16, 16, 4, 2), None),
        ("sizes off the tile", (37, 40, 56, 5, 3), None),
        ("slots without expert", (33, 32, 24, 4, 2), tail),
        ("no slot with an expert", (9, 16, 16, 3, 2), torch.full((9, 2), 3)),
    ]


def main(argv=None) -> int:
    """Print how right and how fast each back end is on this machine; 0 if all are right."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes = SHAPES or ([(32768, 1536, 512, 128, 10)] if cuda else [(4096, 384, 512, 8, 2), (4096, 384, 64, 64, 8)])
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {dtype}")
    for name, reason in back_ends(device, dtype, 384, 512).items():
        print(f"{name:12}{'can work' if reason is None else 'cannot: ' + reason}")
    good = True
    for name, shape, ids in edge_cases():
        results = selftest(device, dtype, *shape, timed=False, ids=None if ids is None else ids.to(device))
        good &= all(error < TOLERANCE[dtype] for error, _ in results.values())
        print(f"{name:26}" + "".join(f"  {k} {error:.0e}" for k, (error, _) in results.items()))
    for T, d, I, E, K in shapes:
        (x, _, _, w13, w2), dout = sample(device, dtype, T, d, K * I, 1, 1)

        def dense(x, w13, w2):
            gate, up = F.linear(x, w13[0].to(x.dtype)).chunk(2, -1)
            return F.linear(F.silu(gate) * up, w2[0].to(x.dtype))

        base = best_time(lambda: fwd_bwd(dense, [x, w13, w2], dout), device)  # noqa: B023
        print(f"T {T} d {d} I {I} E {E} K {K}: dense SwiGLU of width {K * I} {base * 1e3:.1f} ms forward and backward")
        if INTERPRET:
            continue
        for name, (error, seconds) in selftest(device, dtype, T, d, I, E, K).items():
            good &= error < TOLERANCE[dtype]
            print(f"  {name:12}{seconds * 1e3:8.1f} ms  {seconds / base:.2f} x dense  error {error:.0e}")
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    from errors import Words, command  # only here: this file can be copied out

    words = Words(prog="model_moe.py", description=__doc__)
    words.add_argument("--selftest", action="store_true", required=True, help=main.__doc__)
    command(lambda argv: words.parse_args(argv) and main())
