"""int4, and how a few rows are multiplied by int8 and int4 matrices without unpacking them.

int4 of a matrix (n, k): w ~ scale (q - 8), q from 0 to 15, a scale for each group of inputs of a
row: symmetric, to the nearest. A group has 128 inputs, or 64, or 32, whichever divides k; k that 32
does not divide is filled up with zeros. As stored, in memory and in a folder:

    q      uint8 (n, k / 2): byte j of a row holds inputs 2 j (low four bits) and 2 j + 1 (high)
    scale  (n, k / group), fp32 that bf16 can hold; it may be negative

torch's kernel for int4 on a CPU wants both in another order ("blocks"), which depends on the CPU:
q uint8 (n, k / 2) in blocks of 64 outputs (AVX-512) or 32, in a block byte (k, j) holds output j
and, high, j + half a block; what no block takes has pairs of outputs in a byte. scale is bf16
(k / group, n, 2), with a zero point, here 0. `speed_up` makes it when a model is opened.

Decoding reads every weight for each token, so it takes as long as there are bytes to read; making
the matrix anew would cost several times that. With more rows the arithmetic counts, and torch's
kernels are slower than unpacking and an ordinary matmul.
"""

from __future__ import annotations

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from lumen import machine

GROUPS = (128, 64, 32)  # inputs that share a scale
SHRINK = 10  # scales that are tried for a group
# from so many rows on unpacking is faster (2,048 x 2,048 on AVX-512, one thread: 2 ms each)
FEW_ROWS = 16
TOLERANCE = 1e-2  # of a kernel's results, relative to the largest: they are rounded to bf16

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


# ---------------------------------------------------------------- which layers


def speed_up(layers: list[nn.Module]) -> str:
    """Let those quantised layers on a CPU that torch's kernels can multiply do without unpacking,
    where that is right and faster here; returns a line that says what was chosen and why."""
    able = [layer for layer in layers if fits(layer)]
    if not able:
        return ""
    works, why = tried(able[0].kind)
    if not works:
        return f"{able[0].kind}: unpacked for each matmul: {why}"
    for layer in able:
        layer.few_rows = FEW_ROWS
        if layer.kind == "int4":
            lay_out(layer)
    left = len(layers) - len(able)
    others = f"; {left} layers of other sizes are unpacked" if left else ""
    return f"{able[0].kind}: up to {FEW_ROWS} rows by torch's kernel: {why}{others}"


def fits(layer: nn.Module) -> bool:
    """The kernels read beyond the end of other sizes, and torch does not check it."""
    sizes = {name: tuple(buffer.shape) for name, buffer in layer.named_buffers()}
    on_cpu = all(buffer.device.type == "cpu" for buffer in layer.buffers())
    if layer.kind not in ("int8", "int4") or not on_cpu:
        return False
    two = 2 if layer.kind == "int4" else 1
    found = [shape[-2:] for name, shape in sizes.items() if name.endswith("q")]
    inputs = [layer.in_features] if hasattr(layer, "in_features") else [layer.d_model, layer.width]
    whole = all(k % 32 == 0 for k in inputs)
    return whole and all(n % 16 == 0 and two * k % 32 == 0 for n, k in found)


def lay_out(layer: nn.Module) -> None:
    """int4 in blocks; the old order goes, buffer by buffer."""
    for name in [name for name, _ in layer.named_buffers() if name.endswith("q")]:
        scale = name.removesuffix("q") + "scale"
        q, made = to_blocks(getattr(layer, name), getattr(layer, scale))
        setattr(layer, name, q)
        setattr(layer, scale, made)
    layer.kind = "blocks"


CHOSEN: dict[str, tuple[bool, str]] = {}  # kind -> (whether the kernel is taken, why)


def tried(kind: str) -> tuple[bool, str]:
    """Whether the kernel is right and faster than unpacking here, tried once a process."""
    if kind not in CHOSEN:
        try:
            CHOSEN[kind] = try_kernel(kind)
        except Exception as error:  # another torch may have no such operator
            first = str(error).partition("\n")[0][:100]
            CHOSEN[kind] = False, f"torch's kernel does not work here ({first})"
    return CHOSEN[kind]


@torch.no_grad()
def try_kernel(kind: str) -> tuple[bool, str]:
    from lumen.quantize import Packed, pack  # upward: the formula

    g = torch.Generator().manual_seed(0)
    # a whole number of blocks, and a rest
    weight = torch.randn(1024 + 48, 1024, generator=g)
    plain = pack(weight, kind)
    made = plain
    if kind == "int4":
        made = Packed("blocks", plain.shape, *to_blocks(plain.q, plain.scale))
        if not torch.equal(made.to(torch.float32), plain.to(torch.float32)):
            return False, "torch packs int4 in an unknown order"
    errors = []
    for rows in (1, 3, FEW_ROWS):
        x = torch.randn(rows, 1024, generator=g).bfloat16()
        want = x.float() @ plain.to(torch.float32).t()
        off = (multiply(x, made).float() - want).abs().max() / want.abs().max()
        errors.append(off.item())
    if not max(errors) <= TOLERANCE:  # so written that a NaN fails too
        return False, f"torch's kernel differs from the plain formula by {max(errors):.1e}"
    x = torch.randn(1, 1024, generator=g).bfloat16()
    kernel = best_time(lambda: multiply(x, made))
    unpacked = best_time(lambda: F.linear(x, plain.to(x.dtype)))
    text = f"{kernel * 1e3:.2f} ms, unpacked {unpacked * 1e3:.2f}, error {max(errors):.0e}"
    return kernel < unpacked, text


def best_time(f) -> float:
    """Seconds of f(): the best of seven, since other programs only make it slower."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        f()
        times.append(time.perf_counter() - began)
    return min(times[1:])
