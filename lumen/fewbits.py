"""int4, and how a few rows are multiplied by int8 and int4 matrices without unpacking them.

int4 of a matrix (n, k): w ~ scale (q - 8), q from 0 to 15, a scale for each group of inputs of a
row: symmetric, to the nearest. A group has 128 inputs, or 64, or 32, whichever divides k; k that 32
does not divide is filled up with zeros. As stored, in memory and in a folder:

    q      uint8 (n, k / 2): byte j of a row holds inputs 2 j (low four bits) and 2 j + 1 (high)
    scale  (n, k / group), fp32 that bf16 can hold; it may be negative

torch's kernel for int4 on a CPU wants both in another order ("blocks"), which depends on the CPU:
q uint8 (n, k / 2) in blocks of 64 outputs (AVX-512) or 32, in a block byte (k, j) holds output j
and, high, j + half a block; what no block takes has pairs of outputs in a byte. scale is bf16
(k / group, n, 2), with a zero point, here 0. lumen/few_rows.py makes it when a model is opened.

Decoding reads every weight for each token, so it takes as long as there are bytes to read; making
the matrix anew would cost several times that. With more rows the arithmetic counts, and torch's
kernels are slower than unpacking and an ordinary matmul.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lumen import machine

GROUPS = (128, 64, 32)  # inputs that share a scale
SHRINK = 10  # scales that are tried for a group

# ---------------------------------------------------------------- int4


def group_of(k: int) -> int:
    return next((g for g in GROUPS if k % g == 0), GROUPS[-1])


def row_bytes(k: int) -> int:
    """Of a row of k numbers, its scales in fp32 included."""
    group = group_of(k)
    groups = -(-k // group)
    return groups * (group // 2 + 4)


def grouped(weight: torch.Tensor) -> torch.Tensor:
    """(n, k) -> (n, groups, numbers of a group), filled up with zeros."""
    n, k = weight.shape
    group = group_of(k)
    return F.pad(weight, (0, -k % group)).view(n, -1, group)


def round_to(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q (n, groups, group) as floats, 0 to 15, of numbers with the scales (n, groups)."""
    scale = scale.unsqueeze(-1)
    # a group of zeros has scale 0
    return (groups / torch.where(scale == 0, 1.0, scale)).round_().add_(8).clamp_(0, 15)


def best_scales(groups: torch.Tensor) -> torch.Tensor:
    """(n, groups): of some scales that of the smallest squared error.

    The largest number of a group lies at -8 of its scale, whichever sign it has, so that all 16
    levels are used; smaller scales cut it off, and make the others finer.
    """
    where = groups.abs().argmax(-1, keepdim=True)
    full = groups.gather(-1, where).squeeze(-1) / -8
    best, least = None, None
    for step in range(SHRINK):
        scale = (full * (1 - 0.035 * step)).bfloat16().float()
        made = round_to(groups, scale).sub_(8).mul_(scale.unsqueeze(-1))
        error = made.sub_(groups).square_().sum(-1)
        if best is None:
            best, least = scale, error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) as stored, of a weight (n, k) in fp32."""
    groups = grouped(weight)
    scale = best_scales(groups)
    return join(round_to(groups, scale).flatten(1).to(torch.uint8)), scale


def join(q: torch.Tensor) -> torch.Tensor:
    """Numbers 0 to 15, uint8 (n, k), two a byte."""
    return q[:, 0::2] | q[:, 1::2] << 4


def split(q: torch.Tensor) -> torch.Tensor:
    """uint8 (..., k), each 0 to 15, of two a byte."""
    return torch.stack([q & 15, q >> 4], -1).flatten(-2)


def scaled(q: torch.Tensor, scale: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """scale (q - 8) in `dtype`, rounded once; q (..., n, k and what fills it up), 0 to 15."""
    # fp16 alone cannot hold the scales
    exact = torch.float32 if dtype == torch.float16 else dtype
    groups = q.to(exact).sub_(8).unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.to(exact).unsqueeze(-1)).flatten(-2)[..., :k].to(dtype)


def unpack(q: torch.Tensor, scale: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    return scaled(split(q), scale, k, dtype)


# ---------------------------------------------------------------- blocks


def to_blocks(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale of one matrix, or of experts' (E, ...), as the kernel wants them."""
    if q.dim() == 3:
        each = [to_blocks(*one) for one in zip(q, scale)]
        return tuple(torch.stack(parts) for parts in zip(*each))
    made = scale.t().bfloat16()
    return machine.int4_blocks(split(q)), torch.stack([made, torch.zeros_like(made)], -1)


def unpack_blocks(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, k) of one matrix in blocks."""
    n, k = q.shape[0], 2 * q.shape[1]
    block = machine.int4_block()
    whole = n // block * block
    body = q[:whole].view(-1, k, block // 2)  # (blocks, k, bytes)
    rows = torch.cat([body & 15, body >> 4], -1).transpose(1, 2).reshape(whole, k)
    if whole < n:
        rest = q[whole:].view(k, -1)
        rows = torch.cat([rows, split(rest).t()])
    return scaled(rows, scale[..., 0].t(), k, dtype)


# ---------------------------------------------------------------- a few rows


def few(x: torch.Tensor, most: int) -> bool:
    """Whether x (..., k) has so few rows, and no gradient is asked for."""
    return x.numel() <= most * x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def multiply(x: torch.Tensor, weight) -> torch.Tensor:
    """x W^T in x's dtype; x (..., k), and what comes out, are rounded to bf16. weight: Packed, int8
    or in blocks."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if weight.kind == "int8":
        y = machine.int8_matmul(rows, weight.q, weight.scale.to(torch.bfloat16))
    else:
        y = machine.int4_matmul(rows, weight.q, weight.scale)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def experts(x, p, ids, w13, w2) -> torch.Tensor:
    """model_moe.plain_experts, of those experts that some token has chosen."""
    out = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    for e in ids.unique().tolist():
        if e >= w2.shape[0]:  # null experts
            continue
        t, k = torch.where(ids == e)
        gate, up = multiply(x[t], w13[e]).chunk(2, -1)
        y = multiply(F.silu(gate) * up, w2[e])
        out.index_add_(0, t, y.to(p.dtype) * p[t, k].unsqueeze(1))
    return out.to(x.dtype)
