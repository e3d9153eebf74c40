"""TODO."""

from __future__ import annotations

import functools
import importlib
import os
import time

import torch
import torch.nn.functional as F

INTERPRET = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's own emulator, on CPU: for tests, far too slow to train
triton, BROKEN = None, ""  # BROKEN: why the one that is installed cannot be imported
if (
    INTERPRET or torch.version.cuda or torch.version.hip
):  # a CPU build has no use for it and saves the import
    try:
        import triton
        import triton.language as tl
    except Exception as error:  # a third party's package can fail in any way
        triton, BROKEN = None, f"{type(error).__name__}: {error}"

grouped_mm = getattr(F, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)  # public since torch 2.10
aten = torch.ops.aten


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


# ---------------------------------------------------------------- Triton kernels
# One program computes one tile of one expert. The host does not know how many rows an expert has, so it launches the
# upper bound of cdiv(R, BM) + E row tiles; each program counts the tiles of all experts from offs (E numbers, in
# registers), finds its own expert and first row, and leaves if it is one too many. Rows are int64: R * d passes 2^31.

if triton is not None:

    def tuned(*sizes):
        """Autotune over tiles (BM, BN, BK, warps, stages), once per weight shape and magnitude of rows per expert."""
        sizes = [(16, 16, 16, 4, 1)] if INTERPRET else sizes
        configs = [
            triton.Config(dict(BM=m, BN=n, BK=k), num_warps=w, num_stages=s)
            for m, n, k, w, s in sizes
        ]
        return triton.autotune(configs, key=["N", "K", "E", "bucket"])

    @tuned(
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 128, 32, 4, 4),
    )
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
            a = tl.load(
                x + source[:, None] * K + k[None, :],
                mask=rows[:, None] & (k < K)[None, :],
                other=0.0,
            )
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
            ry = (
                tl.load(dy_tok + r, mask=rows, other=0).to(tl.int64)
                if DY_GATHER
                else r.to(tl.int64)
            )
            rx = tl.load(x_tok + r, mask=rows, other=0).to(tl.int64) if X_GATHER else r.to(tl.int64)
            a = tl.load(
                dy + ry[:, None] * N + n[None, :], mask=rows[:, None] & (n < N)[None, :], other=0.0
            )
            b = tl.load(
                x + rx[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0
            )
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
        tl.store(
            a + r * I + c,
            (gate * tl.sigmoid(gate) * up * tl.load(s + r)).to(a.dtype.element_ty),
            mask=c < I,
        )

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
            tl.store(
                dz + r * 2 * I + I + c, (scale * grad * act).to(dz.dtype.element_ty), mask=c < I
            )
        tl.store(ds + r, tl.sum(total, 0))

    @triton.jit
    def combine_kernel(y, inv, out, end, K, d, BD: tl.constexpr):
        """out[t] = sum over k of y[inv[t, k]], the tail left out."""
        t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
        acc, stop = tl.zeros((BD,), tl.float32), tl.load(end)
        for k in range(K):
            r = tl.load(inv + t * K + k)
            acc += tl.load(y + r * d + c, mask=c < tl.where(r < stop, d, 0), other=0.0).to(
                tl.float32
            )
        tl.store(out + t * d + c, acc.to(out.dtype.element_ty), mask=c < d)


def gmm(backend, x, w, offs, tok=None):
    """x (., k) gathered by tok (R,) if given, w (E, n, k) in any strides -> (R, n); the tail's rows are garbage."""
    if backend == "grouped_mm":
        return grouped_mm(x if tok is None else x[tok], w.transpose(1, 2), offs=offs)
    R, (E, N, K) = (x if tok is None else tok).shape[0], w.shape
    y = x.new_empty(R, N)
    prec = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def grid(meta):
        return ((triton.cdiv(R, meta["BM"]) + E) * triton.cdiv(N, meta["BN"]),)

    args = (
        x,
        w,
        y,
        offs if tok is None else tok,
        offs,
        R,
        N,
        K,
        min(R // E, 512).bit_length(),
        *w.stride(),
    )
    gmm_kernel[grid](*args, E=E, EP=triton.next_power_of_2(E), GATHER=tok is not None, PREC=prec)
    return y


def gmm_dw(backend, dy, x, offs, dtype, dy_tok=None, x_tok=None):
    """dy (., n) and x (., k), each gathered if its index (R,) is given -> (E, n, k) in dtype."""
    if backend == "grouped_mm":
        dy, x = (dy if dy_tok is None else dy[dy_tok]), (x if x_tok is None else x[x_tok])
        return grouped_mm(dy.t(), x, offs=offs).to(dtype)
    E, N, K, R = offs.numel(), dy.shape[1], x.shape[1], (dy if dy_tok is None else dy_tok).shape[0]
    dw = torch.empty(E, N, K, dtype=dtype, device=x.device)
    prec = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def grid(meta):
        return (triton.cdiv(N, meta["BN"]) * triton.cdiv(K, meta["BK"]), E)

    tables = (offs if dy_tok is None else dy_tok, offs if x_tok is None else x_tok, offs)
    gather = dict(DY_GATHER=dy_tok is not None, X_GATHER=x_tok is not None)
    dw_kernel[grid](
        dy, x, dw, *tables, N, K, min(R // E, 512).bit_length(), E=E, **gather, PREC=prec
    )
    return dw


def swiglu(backend, z, s, offs):
    """z (R, 2I), s (R, 1) -> s * silu(gate) * up (R, I)."""
    R, I = z.shape[0], z.shape[1] // 2
    if backend == "grouped_mm":
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


def combine(backend, y, inv, offs, T):
    """y (R, d) -> out[t] = sum over k of y[inv[t * K + k]] (T, d), the tail left out whatever its rows hold."""
    (R, d), end = y.shape, offs[-1:]
    if backend == "grouped_mm":  # an embedding bag is the fused gather and sum
        y.masked_fill_((torch.arange(R, device=y.device) >= end).unsqueeze(1), 0)
        return F.embedding_bag(inv.view(T, -1), y, mode="sum")
    out, block = y.new_empty(T, d), min(triton.next_power_of_2(d), 1024)
    combine_kernel[(T, triton.cdiv(d, block))](y, inv, out, end, R // T, d, BD=block)
    return out


def forward_rows(x, p, w13, w2, order, inv, offs, backend):
    """-> out (T, d), z (R, 2I). The gates are applied to the I-wide rows, so that combine is a plain sum."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    z = gmm(backend, x, w13.to(x.dtype), offs, tok)
    y = gmm(backend, swiglu(backend, z, s, offs), w2.to(x.dtype), offs)
    return combine(backend, y, inv, offs, len(x)), z


def backward_rows(dout, x, p, w13, w2, order, inv, offs, z, backend):
    """-> dx, dp, dw13, dw2."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    da, dz = gmm(backend, dout, w2.to(x.dtype).transpose(1, 2), offs, tok), torch.empty_like(z)
    if backend == "grouped_mm":
        a = torch.empty_like(da)
        ds = swiglu_grad(z, s, da, a, dz)
        ds.masked_fill_(torch.arange(len(ds), device=ds.device) >= offs[-1:], 0)
    else:
        ds, a, R = p.new_empty(p.numel()), da, p.numel()
        I = w2.shape[2]
        swiglu_grad_kernel[(R,)](
            z, s, da, dz, ds, offs[-1:], I, BI=min(triton.next_power_of_2(I), 1024)
        )
    dw2 = gmm_dw(backend, dout, a, offs, w2.dtype, dy_tok=tok)
    dw13 = gmm_dw(backend, dz, x, offs, w13.dtype, x_tok=tok)
    dx = combine(
        backend, gmm(backend, dz, w13.to(x.dtype).transpose(1, 2), offs), inv, offs, len(x)
    )
    return dx, ds[inv.view(p.shape)], dw13, dw2


GROUP = 2048  # rows at a time; at E 64 1 and 1024 took 10 to 19% longer (1 thread, 2 noisy runs), 4096 the same


def groups(x, p, z, order, ends, widths):
    """Yield for some experts at a time: tokens, gates and z of their rows, [(expert, its rows)], a buffer per width."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    begin, parts, sizes = 0, [[]], [0]
    for e, end in enumerate(
        ends
    ):  # on CUDA one at a time: a token twice in one index_add would need atomics
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
    new = (
        torch.empty_like if len({0, *ends}) > len(ends) else torch.zeros_like
    )  # zeros for experts without rows
    ds, dw13, dw2, same = p.new_zeros(p.numel()), new(w13), new(w2), w13.dtype == x.dtype
    begin = 0
    for tok, s, zs, experts, rows, da, a, dz in groups(
        x, p, z, order, ends, (x.shape[1], I, I, 2 * I)
    ):
        torch.index_select(dout, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(rows[own], w2[e].to(x.dtype), out=da[own])
        ds[begin : begin + len(tok)] = swiglu_grad(zs, s, da, a, dz)
        begin += len(tok)
        for e, own in experts:
            torch.mm(rows[own].t(), a[own], out=dw2[e]) if same else dw2[e].copy_(
                rows[own].t() @ a[own]
            )
        torch.index_select(x, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(dz[own].t(), rows[own], out=dw13[e]) if same else dw13[e].copy_(
                dz[own].t() @ rows[own]
            )
        for e, own in experts:
            torch.mm(dz[own], w13[e].to(x.dtype), out=rows[own])
        dx.index_add_(0, tok, rows.to(dx.dtype))
    return dx.to(x.dtype), ds[inv.view(p.shape)], dw13, dw2


def register():
    """lumen::experts and lumen::experts_backward, opaque to torch.compile, which sees only their shapes."""
    sort = "Tensor x, Tensor p, Tensor w13, Tensor w2, Tensor order, Tensor inv, Tensor offs"

    @torch.library.custom_op(
        "lumen::experts", mutates_args=(), schema=f"({sort}, str backend) -> (Tensor, Tensor)"
    )
    def experts(x, p, w13, w2, order, inv, offs, backend):
        if backend == "slices":
            return forward_slices(x, p, w13, w2, order, offs)
        return forward_rows(x, p, w13, w2, order, inv, offs, backend)

    @experts.register_fake
    def _(x, p, w13, w2, order, inv, offs, backend):
        return x.new_empty(x.shape), x.new_empty(p.numel(), w13.shape[1])

    @torch.library.custom_op(
        "lumen::experts_backward",
        mutates_args=(),
        schema=f"(Tensor dout, {sort}, Tensor z, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    def experts_backward(dout, x, p, w13, w2, order, inv, offs, z, backend):
        if backend == "slices":
            return backward_slices(dout, x, p, w13, w2, order, inv, offs, z)
        return backward_rows(dout, x, p, w13, w2, order, inv, offs, z, backend)

    @experts_backward.register_fake
    def _(dout, x, p, w13, w2, order, inv, offs, z, backend):
        return tuple(t.new_empty(t.shape) for t in (x, p, w13, w2))

    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.set_materialize_grads(False)  # no zeros for z's gradient, which nobody asks for
        ctx.save_for_backward(*tensors, output[1])

    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 8
        grads = torch.ops.lumen.experts_backward(dout.contiguous(), *ctx.saved_tensors, ctx.backend)
        return *grads, None, None, None, None

    experts.register_autograd(backward, setup_context=setup_context)


def run_experts(x, p, ids, w13, w2, backend: str):
    """x (T, d); gates p (T, K) in fp32 (fp64 with x in fp64); ids (T, K), E or more means none -> out (T, d).

    w13 (E, 2I, d), gate rows then up, and w2 (E, d, I) are fp32 master weights: cast to x.dtype inside, so no copy is
    kept, and given fp32 gradients, zero for an expert without tokens. The ids of a token differ from each other.
    """
    order, inv, offs = sort_by_expert(ids, w2.shape[0])
    return torch.ops.lumen.experts(
        x.contiguous(), p.contiguous(), w13, w2, order, inv, offs, backend
    )[0]


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
        return y.new_zeros(n, y.shape[1]).index_copy(
            0, rows, y
        )  # in place, torch 2.11 compiles to a gradient of zero

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None


take_rows, put_rows = TakeRows.apply, PutRows.apply


def versioned(name: str) -> str:
    """A backend's name; Triton's with its version where one is installed, imported or not."""
    if name != "triton":
        return name
    try:
        return f"triton {triton.__version__ if triton else importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "triton"


def backends(device, dtype, d: int, I: int) -> dict[str, str | None]:
    """Back end -> None if it can work here, else the reason why not."""
    device, step, found = (
        torch.device(device),
        4 if dtype == torch.float32 else 8,
        versioned("triton"),
    )
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
    """The backend for a few tokens at a time, from the one for training. On CUDA slices would wait for the device in
    each layer, and triton would tune its kernels anew: grouped_mm where it can work. By reading: no GPU has run it."""
    if torch.device(device).type != "cuda":
        return trained
    return "grouped_mm" if backends(device, dtype, d, I)["grouped_mm"] is None else "slices"


def sample(device, dtype, T, d, I, E, K, ids=None, seed=0):
    """Random inputs of run_experts plus the output's gradient: (x, p, ids, w13, w2), dout."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape, std=1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32):
        return torch.randn(*shape, generator=g, device=device, dtype=dtype) * std

    if ids is None:
        ids = torch.rand(T, E, generator=g, device=device).topk(K, -1)[1]
    x, dout = randn(T, d).to(dtype), randn(T, d).to(dtype)
    inputs = (
        x,
        randn(T, K).softmax(-1),
        ids,
        randn(E, 2 * I, d, std=d**-0.5),
        randn(E, d, I, std=I**-0.5),
    )
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


def selftest(
    device, dtype, T, d, I, E, K, timed=True, ids=None, names=None
) -> dict[str, tuple[float, float]]:
    """Back end -> (largest error of out and the four gradients, relative to each one's maximum, in fp32; seconds)."""
    from model_moe import reference_experts

    inputs, dout = sample(device, dtype, T, d, I, E, K, ids)
    wide = [
        t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_()
        for t in inputs[:2]
    ]
    want = fwd_bwd(reference_experts, [*wide, *inputs[2:]], dout.to(wide[0].dtype))
    results = {}
    for name in names or [
        name for name, reason in backends(device, dtype, d, I).items() if reason is None
    ]:
        try:
            got = fwd_bwd(lambda *a, name=name: run_experts(*a, name), inputs, dout)
            errors = [
                (g.to(w.dtype) - w).abs().max() / w.abs().max().clamp(min=1e-30)
                for g, w in zip(got, want)
            ]
            error = torch.stack([e.double() for e in errors]).max().item()
            error = error if error == error else float("inf")
            seconds = float("inf")
            if timed:
                seconds = best_time(
                    lambda: fwd_bwd(lambda *a: run_experts(*a, name), inputs, dout),  # noqa: B023
                    device,
                )
            results[name] = error, seconds
        except Exception as e:  # a compiler that fails, no memory: the others can still serve
            print(
                f"experts: {versioned(name)} failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            )
            results[name] = float("inf"), float("inf")
    return results


SHAPES = []
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def pick_backend(
    choice: str, device, dtype, d: int, I: int, E: int, K: int, T: int
) -> tuple[str, str]:
    """-> (backend, why): choice itself if it can work here, for auto the fastest one that passes the self-test.

    Raises ValueError with reason and remedy for a choice that cannot work. On CPU auto tries a small layer, at most
    about a second; on CUDA the first call also compiles and tunes Triton's kernels.
    """
    known = backends(device, dtype, d, I)
    if choice != "auto":
        if choice not in known:
            raise ValueError(f"experts: backend {choice!r} is not one of auto, {', '.join(known)}")
        if known[choice]:
            raise ValueError(
                f"experts: backend {choice} cannot work here: {known[choice]}; or let auto choose"
            )
        return choice, "as asked"
    candidates = [
        name
        for name, reason in known.items()
        if reason is None and not (INTERPRET and name == "triton")
    ]
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
    tried = ", ".join(
        f"{versioned(k)} {v[1] * 1e3:.1f} ms error {v[0]:.0e}" for k, v in results.items()
    )
    return best, "; ".join([tried, *left_out])


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
    """Print how right and how fast each backend is on this machine; 0 if all are right."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes = SHAPES or (
        [(32768, 1536, 512, 128, 10)] if cuda else [(4096, 384, 512, 8, 2), (4096, 384, 64, 64, 8)]
    )
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {dtype}")
    for name, reason in backends(device, dtype, 384, 512).items():
        print(f"{name:12}{'can work' if reason is None else 'cannot: ' + reason}")
    good = True
    for name, shape, ids in edge_cases():
        results = selftest(
            device, dtype, *shape, timed=False, ids=None if ids is None else ids.to(device)
        )
        good &= all(error < TOLERANCE[dtype] for error, _ in results.values())
        print(f"{name:26}" + "".join(f"  {k} {error:.0e}" for k, (error, _) in results.items()))
    for T, d, I, E, K in shapes:
        (x, _, _, w13, w2), dout = sample(device, dtype, T, d, K * I, 1, 1)

        def dense(x, w13, w2):
            gate, up = F.linear(x, w13[0].to(x.dtype)).chunk(2, -1)
            return F.linear(F.silu(gate) * up, w2[0].to(x.dtype))

        base = best_time(lambda: fwd_bwd(dense, [x, w13, w2], dout), device)  # noqa: B023
        print(
            f"T {T} d {d} I {I} E {E} K {K}: dense SwiGLU of width {K * I} {base * 1e3:.1f} ms forward and backward"
        )
        if INTERPRET:
            continue
        for name, (error, seconds) in selftest(device, dtype, T, d, I, E, K).items():
            good &= error < TOLERANCE[dtype]
            print(
                f"  {name:12}{seconds * 1e3:8.1f} ms  {seconds / base:.2f} x dense  error {error:.0e}"
            )
    print("passed" if good else "FAILED")
    return 0 if good else 1


def attend(q, k, v, backend: str = "sdpa") -> torch.Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, G, D), G dividing H; returns (B, T, H, D)."""
    if backend == "flash":
        from flash_attn import (
            flash_attn_func,  # optional package, CUDA only; pick_attention has tried it
        )

        return flash_attn_func(q, k, v, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend == "flex":
        y = _flex(q, k, v)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )
    return y.transpose(1, 2)


def _causal(b, h, q, kv):
    return q >= kv


@functools.cache
def _flex_kernel(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return (
        torch.compile(flex_attention) if compiled else flex_attention
    )  # uncompiled it holds all T x T scores


def _flex(q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(_causal, None, None, q.shape[2], k.shape[2], device=q.device)
    return _flex_kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])


def pick_attention(
    choice: str, cfg, device, dtype=torch.float32, train: bool = True
) -> tuple[str, str]:
    """The attention backend that works here and why: (sdpa | flash | flex, reason). ValueError on an unknown choice.

    flash and flex are tried on a small problem against sdpa, with backward when training; what raises or disagrees
    falls back to sdpa, and the reason says so.
    """
    if choice not in ("auto", "sdpa", "flash", "flex"):
        raise ValueError(f"attention: {choice!r} is not auto, sdpa, flash or flex")
    if choice in ("auto", "sdpa"):
        return "sdpa", "torch picks its fastest kernel for this device"
    gen = torch.Generator().manual_seed(0)
    heads = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
    qkv = [
        torch.randn(1, 128, h, cfg.head_dim, generator=gen).to(device, dtype).requires_grad_(train)
        for h in heads
    ]

    def run(backend):
        with torch.set_grad_enabled(train):
            y = attend(*qkv, backend)
            return [y, *(torch.autograd.grad(y.float().square().sum(), qkv) if train else ())]

    try:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        errors = [
            (a - b).float().norm() / b.float().norm() for a, b in zip(run(choice), run("sdpa"))
        ]
        if not all(e <= tolerance for e in errors):  # so written that a NaN fails too
            raise RuntimeError(f"differs from sdpa by {max(errors):.1e}")
    except (
        Exception
    ) as error:  # a third party's kernel can fail in any way: it must never stop a run
        first = str(error).strip().split("\n")[0][:120]
        return "sdpa", f"{choice} does not work here ({type(error).__name__}: {first})"
    return choice, "as asked; agrees with sdpa"


if __name__ == "__main__":
    from lumen.launch import Words, command

    words = Words(prog="kernels.py", description=__doc__)
    words.add_argument("--selftest", action="store_true", required=True, help=main.__doc__)
    command(lambda argv: words.parse_args(argv) and main())
