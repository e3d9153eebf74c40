"""Which quantised layers do without unpacking their matrices, for a few rows: found by trying it.

torch's kernels on a CPU (lumen/fewbits.py) are private to it, differ by CPU, and do not check the
sizes they are given. So they are compared with the plain formula and timed, once a process.
"""

from __future__ import annotations

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from lumen import fewbits
from lumen.quantize import Packed, pack

# from so many rows on unpacking is faster (2,048 x 2,048 on AVX-512, one thread: 2 ms each)
FEW_ROWS = 16
TOLERANCE = 1e-2  # of a kernel's results, relative to the largest: they are rounded to bf16


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
    """Of other sizes the kernels read beyond the end, and torch does not check it."""
    if layer.kind not in ("int8", "int4"):
        return False
    if any(buffer.device.type != "cpu" for buffer in layer.buffers()):
        return False
    shapes = (
        [(layer.out_features, layer.in_features)]
        if hasattr(layer, "in_features")
        else [(2 * layer.width, layer.d_model), (layer.d_model, layer.width)]
    )
    return all(n % 16 == 0 and k % 32 == 0 for n, k in shapes)


def lay_out(layer: nn.Module) -> None:
    """int4 in blocks; the old order goes, buffer by buffer."""
    for name in [name for name, _ in layer.named_buffers() if name.endswith("q")]:
        scale = name.removesuffix("q") + "scale"
        q, made = fewbits.to_blocks(getattr(layer, name), getattr(layer, scale))
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
    g = torch.Generator().manual_seed(0)
    # a whole number of blocks, and a rest
    weight = torch.randn(1024 + 48, 1024, generator=g)
    plain = pack(weight, kind)
    made = plain
    if kind == "int4":
        made = Packed("blocks", plain.shape, *fewbits.to_blocks(plain.q, plain.scale))
        if not torch.equal(made.to(torch.float32), plain.to(torch.float32)):
            return False, "torch packs int4 in an unknown order"
    errors = []
    for rows in (1, 3, FEW_ROWS):
        x = torch.randn(rows, 1024, generator=g).bfloat16()
        want = x.float() @ plain.to(torch.float32).t()
        off = (fewbits.multiply(x, made).float() - want).abs().max() / want.abs().max()
        errors.append(off.item())
    if not max(errors) <= TOLERANCE:  # so written that a NaN fails too
        return False, f"torch's kernel differs from the plain formula by {max(errors):.1e}"
    x = torch.randn(1, 1024, generator=g).bfloat16()
    kernel = best_time(lambda: fewbits.multiply(x, made))
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
