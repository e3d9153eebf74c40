"""Attention's fast paths: by torch's kernels, by the package flash-attn, and on a CPU by blocks of
queries; also within documents that do not see each other. lumen/attention.py chooses among them by
trying them.

Optional: model.py computes attention by torch's own choice where this file is not. It imports
nothing of ours; errors are plain ValueError.

Names: B rows, T positions, H heads of queries, G of keys and values, D numbers a head.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten

# ---------------------------------------------------------------- documents
# Rows that hold several documents, none of which sees another. Shapes depend on `most` alone, which
# the host knows: no size is read off the device.


class Documents(NamedTuple):
    """Which document each position of B rows is of. `of` and `most` are enough to ask with;
    `documents` fills in the rest."""

    of: torch.Tensor  # (B, T) int64, numbered within the row: 0 first, ascending
    most: int  # above every number
    # (B, T) bool: what MoD fills its rows up with counts for nothing; None: all is real
    real: torch.Tensor | None = None
    starts: torch.Tensor | None = None  # (B, most), T for those that a row does not have
    bias: torch.Tensor | None = None  # (B, 1, T, T), added to scores, where no kernel knows better

    def places(self) -> torch.Tensor:
        """Where in its document each position is: (B, T), 0 first."""
        at = torch.arange(self.of.shape[1], device=self.of.device)
        return at - self.starts.gather(1, self.of)

    def best(self, order: torch.Tensor, tokens: int, full: int) -> torch.Tensor:
        """The best ceil(length * tokens / full) of each document: (B, T) bool; order (B, T) lists
        the positions of a row, the best first."""
        # sorted by document too, so that places() says the rank in it
        order = order.gather(1, self.of.gather(1, order).sort(dim=1, stable=True).indices)
        rank = torch.empty_like(order).scatter_(1, order, self.places())
        ends = F.pad(self.starts[:, 1:], (0, 1), value=self.of.shape[1])
        quota = ((ends - self.starts) * tokens + full - 1) // full  # (B, most)
        return rank < quota.gather(1, self.of)

    def most_of_best(self, tokens: int, full: int) -> int:
        """No row has more of them: each document rounds up by less than one."""
        T = self.of.shape[1]
        return min(T, -(-T * tokens // full) + self.most - 1)

    def chosen(self, idx, real, backend: str, dtype) -> Documents:
        """Of the positions idx (B, n), which ascend where real (B, n) and fill up behind that."""
        of = self.of.gather(1, idx).masked_fill(~real, self.most)
        return documents(Documents(of, self.most + 1, real), backend, dtype)

    def choices(self, ids, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens choose, ids (B T, K) below n -> how often each is chosen, (n,); and its share
        of the choices in a token's document, (B, T, n)."""
        rows = torch.arange(len(self.of), device=ids.device)[:, None]
        own = (rows * self.most + self.of).flatten()  # a number for each document of all rows
        count = self.of.new_ones(self.of.shape) if self.real is None else self.real
        count = count.reshape(-1, 1).float().expand_as(ids)
        counts = count.new_zeros(len(rows) * self.most * n)
        counts.scatter_add_(0, (own[:, None] * n + ids).flatten(), count.flatten())
        counts = counts.view(-1, n)
        load = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return counts.sum(0), load[own].view(*self.of.shape, n)

    def bounds(self) -> torch.Tensor:
        """Where documents begin in all rows laid end to end, and the end: (B * most + 1,) int32;
        those that a row does not have are empty."""
        B, T = self.of.shape
        rows = torch.arange(0, B * T, T, device=self.of.device)[:, None]
        return F.pad((self.starts + rows).flatten(), (0, 1), value=B * T).int()


def documents(given, backend: str, dtype: torch.dtype) -> Documents:
    """Documents for attention by `backend` in `dtype`. A tensor (B, T) instead does too: then the
    host looks for the largest number, on CUDA each position may be a document."""
    if torch.is_tensor(given):
        most = given.shape[1] if given.is_cuda else int(given.max()) + 1
        given = Documents(given.long(), most)
    of, bias = given.of.contiguous(), None
    first = torch.arange(given.most, device=of.device).expand(len(of), -1).contiguous()
    starts = torch.searchsorted(of, first)
    if backend == "sdpa" and of.device.type != "cpu":
        bias = bias_of(of, dtype)
    return Documents(of, given.most, given.real, starts, bias)


def bias_of(of: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 for what a position may look at, -inf elsewhere: of (B, T) -> (B, 1, T, T)."""
    same = (of[:, None, :, None] == of[:, None, None]).tril()
    return torch.zeros(same.shape, dtype=dtype, device=of.device).masked_fill_(~same, -torch.inf)


WITHIN = (
    "varlen",
    "flash",
)  # backends that know documents; torch's own, and the package flash-attn


def attend_within(q, k, v, backend: str, docs: Documents) -> torch.Tensor:
    """Causal attention within documents; shapes as of attention(). sdpa: on a CPU document by
    document, elsewhere whole rows with a bias; or a kernel of WITHIN. No GPU has run any of it."""
    if backend == "sdpa" and docs.bias is None:
        flat = (t.flatten(0, 1) for t in (q, k, v))  # (B T, H or G, D)
        return torch.ops.lumen.attend(*flat, docs.bounds())[0].view(q.shape)
    if backend == "sdpa":
        siblings = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=docs.bias, enable_gqa=siblings)
        return y.transpose(1, 2)
    T, ends = q.shape[1], docs.bounds()
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func  # an optional package, CUDA only

        same_bits = torch.are_deterministic_algorithms_enabled()
        options = {"causal": True, "deterministic": same_bits}
        return flash_attn_varlen_func(*flat, ends, ends, T, T, **options).view(q.shape)
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11's has no word for shared key heads
    flat[1:] = (t.repeat_interleave(q.shape[2] // k.shape[2], 1) for t in flat[1:])
    return varlen_attn(*flat, ends, ends, T, T, window_size=(-1, 0)).view(q.shape)


SHORT = 256  # tokens; on a Xeon with AMX what bf16 spares below is less than it costs to begin


def widened(tensors: list) -> list:
    """In fp32 where a document is short: tensors (1, H, length, D)."""
    if tensors[0].shape[2] >= SHORT:
        return tensors
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def parts(bounds, *tensors):
    """Of tensors (B T, H, D) each document's (1, H, length, D), on the host's word."""
    ends = bounds.tolist()
    for a, b in zip(ends, ends[1:]):
        if b > a:
            yield [t[a:b].transpose(0, 1)[None] for t in tensors]


def register_attend():
    """lumen::attend and lumen::attend_backward: a CPU's attention within documents, by its flash
    kernel on one after the other, which is less work than the whole rows are. Opaque to
    torch.compile, for the host reads the bounds."""
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = "Tensor q, Tensor k, Tensor v, Tensor bounds"
    two, three = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)"
    grad_schema = f"(Tensor dout, {given}, Tensor out, Tensor lse) -> {three}"

    @torch.library.custom_op("lumen::attend", mutates_args=(), schema=f"({given}) -> {two}")
    def attend(q, k, v, bounds):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(*q.shape[:2], 1, dtype=wide)  # logsumexp of the scores
        for *qkv, y, l in parts(bounds, q, k, v, out, lse):
            found = forward(*widened(qkv), 0.0, True)
            y.copy_(found[0])
            l.copy_(found[1][..., None])
        return out, lse

    @attend.register_fake
    def _(q, k, v, bounds):
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=wide)

    @torch.library.custom_op("lumen::attend_backward", mutates_args=(), schema=grad_schema)
    def attend_backward(dout, q, k, v, bounds, out, lse):
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        for dy, *qkv, y, l, dq, dk, dv in parts(bounds, dout, q, k, v, out, lse, *grads):
            dy, *qkv, y = widened([dy, *qkv, y])
            found = backward(dy, *qkv, y, l[..., 0].contiguous(), 0.0, True)
            for grad, value in zip((dq, dk, dv), found):
                grad.copy_(value)
        return tuple(grads)

    @attend_backward.register_fake
    def _(dout, q, k, v, bounds, out, lse):
        return tuple(t.new_empty(t.shape) for t in (q, k, v))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dout, _):
        return *torch.ops.lumen.attend_backward(dout, *ctx.saved_tensors), None

    attend.register_autograd(gradients, setup_context=setup_context)


if not hasattr(torch.ops.lumen, "attend"):
    register_attend()

# ---------------------------------------------------------------- blocks of queries, on a CPU
# A few heads at a time, and of them a block of queries over the keys up to its end: two batched
# matmuls around one pass over the scores, all in buffers that stay in the cache. Most of torch's
# time goes to its softmax, so what a softmax does to each score is left to the matmuls: two more
# columns of q and of k, -x in two parts beside 1 and 1, subtract x from a score before it is
# rounded. x is the logsumexp in backward, and in forward a row's largest score where scores may be
# large; in the same way dP - delta comes out of one matmul.

ROWS = 192  # at least half as many of queries (of the heads that share keys) make a block
SCORES = 2**20  # at a time; in bf16 2 MiB, about the cache that a core or two have to themselves
# exponents (of 2) that forward takes as they are: beyond, bf16 would round them too coarsely, and
# fp32 would overflow. Of fp16 none: its exp2 ends at 16.
PLAIN = {torch.bfloat16: 16.0, torch.float32: 64.0, torch.float64: 64.0}


def by_heads(x, G: int, columns: int = 0):
    """x (B, T, H, D) -> (B G, T n, D + columns), a copy: the n = H / G heads that share keys side
    by side; the further columns are 1."""
    B, T, H, D = x.shape
    out = x.new_empty(B, G, T, H // G, D + columns)
    out[..., :D].copy_(x.unflatten(2, (G, -1)).transpose(1, 2))
    out[..., D:] = 1
    return out.view(B * G, -1, D + columns)


def put_back(x, out):
    """The way back: x (B G, T n, D) into out (B, T, H, D)."""
    B, T, _, D = out.shape
    G = len(x) // B
    out.unflatten(2, (G, -1)).copy_(x.view(B, G, T, -1, D).transpose(1, 2))


def put_beside(x, value):
    """The last two columns of x become value, in fp32 or wider, in two parts: twice the digits."""
    first = value.to(x.dtype)
    x[..., -2] = first
    x[..., -1] = value - first


def portions(q, k):
    """Yield rows, query heads, key heads, as slices of q and k: as many at a time as SCORES has
    room for."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    n = H // G
    heads = max(1, SCORES // (block_rows(T, n) * n * T))
    rows, heads = max(1, heads // G), min(G, heads)
    for b in range(0, B, rows):
        for g in range(0, G, heads):
            end = min(g + heads, G)
            yield slice(b, b + rows), slice(g * n, end * n), slice(g, end)


def block_rows(T: int, n: int) -> int:
    """Positions of a block: a power of 2, n times of which ROWS has room for."""
    return min(T, 1 << (max(1, ROWS // n).bit_length() - 1))


def blocks(q, T: int, buffers: int):
    """Yield of q (N, T n, .), block by block: begin, end, its rows in q as a slice, 0 where its own
    part of the scores is seen and -inf elsewhere, and buffers of the scores' shape."""
    N, n = len(q), q.shape[1] // T
    rows = block_rows(T, n)
    memory = q.new_empty(buffers, N * rows * n * T)
    hidden = q.new_full((rows, rows), -torch.inf).triu_(1).repeat_interleave(n, 0)
    for a in range(0, T, rows):
        b = min(a + rows, T)
        shape = (N, (b - a) * n, b)
        found = [m[: math.prod(shape)].view(shape) for m in memory]
        yield a, b, slice(a * n, b * n), hidden[: (b - a) * n, : b - a], *found


def product(x, y, alpha: float, out):
    """alpha x @ y, in batches, written to out."""
    return torch.baddbmm(out, x, y, beta=0, alpha=alpha, out=out)


def forward_heads(q, k, v, apart: bool):
    """q (B, T, H, D), k and v (B, T, G, D), a few rows and heads -> y (B G, T n, D) and in fp32 or
    wider the logsumexp of the scores, in powers of 2 (B G, T n). apart: no row has a say in how
    another one is rounded."""
    T, G, D = q.shape[1], k.shape[2], q.shape[3]
    alpha = D**-0.5 * math.log2(math.e)
    wide = torch.promote_types(q.dtype, torch.float32)
    plain = not apart
    if plain:
        largest = [t.norm(dim=-1, dtype=wide).max() for t in (q, k)]
        # no score is above the product of the norms; so written that a NaN is not plain
        plain = bool(alpha * largest[0] * largest[1] <= PLAIN.get(q.dtype, 0.0))
    more = 0 if plain else 2
    q, k, v = by_heads(q, G, more), by_heads(k, G, more), by_heads(v, G)
    y = q.new_empty(*q.shape[:2], D)
    total = q.new_empty(q.shape[:2], dtype=wide)
    top = torch.zeros_like(total)
    for a, b, own, hidden, scores in blocks(q, T, 1):
        rows, keys = q[:, own], k[:, :b].transpose(1, 2)
        if not plain:
            product(rows[..., :D], keys[:, :D], alpha, scores)[..., a:].add_(hidden)
            top[:, own] = scores.to(wide).amax(-1)
            put_beside(rows, top[:, own] / -alpha)
        product(rows, keys, alpha, scores)[..., a:].add_(hidden)
        scores.exp2_()
        total[:, own] = scores.sum(-1, dtype=wide)
        torch.bmm(scores, v[:, :b], out=y[:, own])
        y[:, own] *= total[:, own, None].reciprocal()
    # a row's first position sees itself alone: without rounding, so that its dq is 0
    y.view(len(y), T, -1, D)[:, 0] = v[:, :1]
    return y, total.log2_().add_(top)


def backward_heads(dout, q, k, v, out, lse):
    """-> dq, dk, dv (B G, T n, D), of as much as forward_heads has. With P = exp2(scores - lse) and
    delta = <dout, out>: dv = P^T dout, dP = dout v^T, dS = P (dP - delta), dq = dS k, dk = dS^T q
    (FlashAttention, arXiv 2205.14135)."""
    T, G, D = q.shape[1], k.shape[2], q.shape[3]
    scale = D**-0.5
    alpha = scale * math.log2(math.e)
    delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)  # (B, T, H, 1)
    q, k, v, dout = (by_heads(t, G, 2) for t in (q, k, v, dout))
    put_beside(q, lse / -alpha)
    put_beside(dout, by_heads(delta, G)[..., 0].neg_())
    dq = q.new_empty(*q.shape[:2], D)
    dk, dv = (lse.new_zeros(*k.shape[:2], D) for _ in range(2))  # sums over blocks
    memory = q.new_empty(k.shape[0] * T * D)
    for a, b, own, hidden, P, dS in blocks(q, T, 2):
        rows, keys, drows = q[:, own], k[:, :b], dout[:, own]
        part = memory[: len(rows) * b * D].view(-1, b, D)
        product(rows, keys.transpose(1, 2), alpha, P)[..., a:].add_(hidden)
        P.exp2_()
        dv[:, :b] += torch.bmm(P.transpose(1, 2), drows[..., :D], out=part)
        torch.bmm(drows, v[:, :b].transpose(1, 2), out=dS).mul_(P)
        product(dS, keys[..., :D], scale, dq[:, own])
        dk[:, :b] += product(dS.transpose(1, 2), rows[..., :D], scale, part)
    return dq, dk, dv


def register_blocks():
    """lumen::scaled_dot_product_blocks and its backward, opaque to torch.compile. Its name says to
    selective recomputation that it is attention."""
    name = "lumen::scaled_dot_product_blocks"
    given = "Tensor q, Tensor k, Tensor v"
    front = f"({given}, bool apart=False) -> (Tensor, Tensor)"
    back = f"(Tensor dout, {given}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)"

    def empty(q, k):
        wide = torch.promote_types(q.dtype, torch.float32)
        B, T, H, _ = q.shape
        G = k.shape[2]
        return q.new_empty(q.shape), q.new_empty(B, G, T * (H // G), dtype=wide)

    @torch.library.custom_op(name, mutates_args=(), schema=front)
    def attend(q, k, v, apart=False):
        out, lse = empty(q, k)
        for r, h, g in portions(q, k):
            y, found = forward_heads(q[r, :, h], k[r, :, g], v[r, :, g], apart)
            put_back(y, out[r, :, h])
            lse[r, g] = found.view(lse[r, g].shape)
        return out, lse

    @attend.register_fake
    def _(q, k, v, apart=False):
        return empty(q, k)

    @torch.library.custom_op(f"{name}_backward", mutates_args=(), schema=back)
    def attend_backward(dout, q, k, v, out, lse):
        grads = [t.new_empty(t.shape) for t in (q, k, v)]
        for r, h, g in portions(q, k):
            given = (dout[r, :, h], q[r, :, h], k[r, :, g], v[r, :, g], out[r, :, h])
            found = backward_heads(*given, lse[r, g].flatten(0, 1))
            for some, grad, heads in zip(found, grads, (h, g, g)):
                put_back(some, grad[r, :, heads])
        return tuple(grads)

    @attend_backward.register_fake
    def _(dout, q, k, v, out, lse):
        return tuple(t.new_empty(t.shape) for t in (q, k, v))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dout, _):
        grads = torch.ops.lumen.scaled_dot_product_blocks_backward(dout, *ctx.saved_tensors)
        return *grads, None

    attend.register_autograd(gradients, setup_context=setup_context)


if not hasattr(torch.ops.lumen, "scaled_dot_product_blocks"):
    register_blocks()

# ---------------------------------------------------------------- attention
# lumen/attention.py chooses among these by trying them; "sdpa", torch decides, is in model.py too.

TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash_sdpa": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ATTENTION = (*TORCH_KERNELS, "flash")  # on CUDA; the last one: the package flash-attn
ON_CPU = ("blocks",)


def attention(q, k, v, backend: str, docs: Documents | None = None, alone=False) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, G, D), G dividing H; (B, T, H, D).

    With docs it stays within a document: see attend_within. Where one of torch's kernels refuses
    (MoD's evaluation may keep a single token, which cuDNN does not take) math serves; RuntimeError
    instead if `alone`. ValueError for blocks elsewhere than on a CPU.
    """
    if docs is not None:
        return attend_within(q, k, v, backend, docs)
    if backend == "flash":
        from flash_attn import flash_attn_func  # an optional package, CUDA only

        same_bits = torch.are_deterministic_algorithms_enabled()
        return flash_attn_func(q, k, v, causal=True, deterministic=same_bits)
    if backend == "blocks":
        if q.device.type != "cpu":
            raise ValueError("blocks is for CPUs")
        # a question's score in evaluation must not depend on its neighbours
        apart = not torch.is_grad_enabled()
        return torch.ops.lumen.scaled_dot_product_blocks(q, k, v, apart)[0]
    # in this order: by torch's own, math comes before cuDNN on most cards
    which = contextlib.nullcontext()
    if backend != "sdpa":
        allowed = [TORCH_KERNELS[backend]]
        if not alone:
            allowed.append(SDPBackend.MATH)
        which = sdpa_kernel(allowed, set_priority=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    siblings = q.shape[1] // k.shape[1]  # query heads that share a key head
    if siblings > 1 and backend == "efficient":  # torch 2.11's cannot share
        k, v = (t.repeat_interleave(siblings, 1) for t in (k, v))
    with which:
        options = {"is_causal": True, "enable_gqa": k.shape[1] != q.shape[1]}
        y = F.scaled_dot_product_attention(q, k, v, **options)
    return y.transpose(1, 2)
