"""python -m tools.ptx: what Triton's compiler makes of our kernels, for GPUs that are not here.

Every kernel of kernels_triton.py is compiled for every card, dtype and tile that the autotuner may
use there, exactly as a launch would: CASES runs the launchers on meta tensors, and what they pass,
alignments included, goes to Triton's own launch path behind a stand-in for the driver. It needs the
package triton (its wheel holds ptxas) and no GPU. What it shows are registers, spills, shared
memory and instructions; how fast they run only a GPU can say.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import Autotuner, JITFunction

import kernels
import kernels_triton
from lumen.errors import UserError
from lumen.launch import Words, command

kernels.kernels_triton = kernels_triton  # a CPU build of torch had no use for it

KIB = 1024
# compute capability -> shared memory that a block can opt in to (CUDA C Programming Guide, table of
# technical specifications), and how many multiprocessors a usual card has
CARDS = {
    80: (163 * KIB, 108),
    86: (99 * KIB, 84),
    89: (99 * KIB, 142),
    90: (227 * KIB, 132),
    100: (227 * KIB, 148),
    120: (99 * KIB, 170),
}
# name -> dtype and torch's precision of products in fp32
DTYPES = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),  # tensor cores know no fp32
}

# ---------------------------------------------------------------- launches to compile
# A new kernel needs a case that launches it, here; a new argument of a kernel needs nothing.


def expert_layer(dtype):
    """One expert layer, forward and backward, as kernels.py runs it on CUDA."""
    T, d, I, E, K = 8192, 1024, 512, 64, 8
    x, dout = meta(T, d, dtype=dtype), meta(T, d, dtype=dtype)
    p, w13, w2 = meta(T, K), meta(E, 2 * I, d), meta(E, d, I)
    order, inv = meta(T * K, dtype=torch.int64), meta(T * K, dtype=torch.int64)
    layer = (x, p, w13, w2, order, inv, meta(E, dtype=torch.int32))
    z = kernels.forward_rows(*layer, "triton")[1]
    kernels.backward_rows(dout, *layer, z, "triton")


def loss(dtype, V: int):
    """A chunk of logits, in training and in evaluation."""
    for need_grad in (True, False):
        targets = meta(1024, dtype=torch.int64)
        kernels_triton.cross_entropy(meta(1024, V, dtype=dtype), targets, 0.0, need_grad)


CASES = {
    "expert layer": expert_layer,
    "loss": lambda dtype: loss(dtype, 50304),
    "loss of an odd vocabulary": lambda dtype: loss(dtype, 50257),
}


def meta(*shape, dtype=torch.float32):
    """A tensor without memory, aligned as a fresh one of CUDA's would be."""
    return torch.empty(*shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------- a stand-in for a card


class StandIn:
    """What Triton asks of its driver before a kernel is launched."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def card(arch: int):
    """Inside, torch and Triton see a card of this compute capability (90 for 9.0)."""
    shared, processors = CARDS[arch]
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(name=f"sm_{arch}", major=major, minor=minor, warp_size=32)
    properties.shared_memory_per_block_optin = shared
    properties.multi_processor_count = processors
    triton.runtime.driver.set_active(StandIn(arch))
    for kernel in all_kernels().values():
        while isinstance(kernel, Autotuner):
            kernel = kernel.fn
        kernel.device_caches.clear()  # what it has compiled
    with (
        tempfile.TemporaryDirectory() as cache,
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (major, minor)),
    ):
        triton.knobs.cache.dir = cache
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield


# ---------------------------------------------------------------- kernels and launches


def all_kernels() -> dict:
    """name -> every JITFunction of kernels_triton.py, with its autotuner where it has one."""
    kinds = Autotuner | JITFunction
    found = {
        name: value for name, value in vars(kernels_triton).items() if isinstance(value, kinds)
    }
    return found


def launches(dtype: str) -> list[tuple]:
    """(case, name, arguments, keywords) of every launch of CASES, inside of card()."""
    found, made = [], []
    element, precision = DTYPES[dtype]
    torch.set_float32_matmul_precision(precision)
    with contextlib.ExitStack() as stack:
        for name, kernel in all_kernels().items():

            def record(*args, name=name, grid=None, warmup=False, **keywords):
                made.append((name, args, keywords))

            stack.enter_context(mock.patch.object(kernel, "run", record))
        for case, launch in CASES.items():
            launch(element)
            found += [(case, *one) for one in made]
            made.clear()
    return found


def without_case() -> list[str]:
    """Kernels that no case launches, and that no launched kernel calls."""
    with card(90):
        reached = {name for _, name, _, _ in launches("bf16")}
    found = all_kernels()
    waiting = list(reached)
    while waiting:
        called = set(python_function(found[waiting.pop()]).__code__.co_names) & set(found)
        waiting += called - reached
        reached |= called
    return sorted(set(found) - reached)


def python_function(kernel):
    while not hasattr(kernel, "__code__"):
        kernel = kernel.fn
    return kernel


def tiles_of(kernel, args, keywords) -> dict:
    """tile -> whether the autotuner would try it for this launch, in its order; false: it would for
    other numbers of rows an expert."""
    if not isinstance(kernel, Autotuner):
        return {triton.Config({}): True}
    named = dict(zip(kernel.arg_names, args))
    found = dict.fromkeys(kernel.early_config_prune(kernel.configs, named, **keywords), True)
    for rows in (kernels_triton.FEW, kernels_triton.SOME, kernels_triton.MANY):
        named["bucket"] = rows
        for tile in kernel.early_config_prune(kernel.configs, named, **keywords):
            found.setdefault(tile, False)
    return found


# ---------------------------------------------------------------- compiling

PATTERNS = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]\.",
    "tma": r"cp\.async\.bulk",
}


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for: ptxas."""
    return sum(os.times()[:4])


def predicted(kernel, args, keywords, tile) -> int | None:
    """Bytes of shared memory by the rule that chooses tiles; None where it chooses none."""
    if not isinstance(kernel, Autotuner):
        return None
    x = dict(zip(kernel.arg_names, args))["x"]
    properties = torch.cuda.get_device_properties(x.device)
    dots = kernels_triton.dots_on(properties, x.dtype, keywords["PREC"])
    depth = kernel.early_config_prune.args[0]
    return kernels_triton.shared_bytes(tile, depth, x.dtype.itemsize, dots)


def measure(kernel, args, keywords, tile) -> tuple[object, dict]:
    """The kernel compiled for a launch with a tile, and what was measured of it; inside of card().
    An empty row where another launch has compiled that one."""
    inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
    options = tile.all_kwargs() if inner is not kernel else {}
    log, begin = io.StringIO(), cpu_seconds()
    with contextlib.redirect_stdout(log):
        done = inner.run(*args, grid=(1,), warmup=True, **keywords, **options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not registers:
        return done, {}
    row = {"seconds": cpu_seconds() - begin, "shared": done.metadata.shared}
    row["predicted"] = predicted(kernel, args, keywords, tile)
    row["registers"] = max(map(int, registers))
    row["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    ptx = done.asm["ptx"]
    return done, row | {name: len(re.findall(pattern, ptx)) for name, pattern in PATTERNS.items()}


def rows(arch: int, dtype: str, names=None, most: int | None = None):
    """Yields a row for each variant: a launch's own specialisation with one tile.

    names: kernels, None for all; most: tiles of each launch, None for all.
    """
    seen = collections.Counter()
    known = set()
    with card(arch):
        for case, name, args, keywords in launches(dtype):
            if names and name not in names:
                continue
            kernel = all_kernels()[name]
            seen[name] += 1
            for tile, tried in list(tiles_of(kernel, args, keywords).items())[:most]:
                done, row = measure(kernel, args, keywords, tile)
                if not row and id(done) not in known:
                    raise RuntimeError(f"ptxas said nothing about {name}")
                if not row:
                    continue
                known.add(id(done))
                head = {"case": case, "kernel": name, "launch": seen[name], "arch": arch}
                head |= {"dtype": dtype, "tile": dict(tile.kwargs), "constants": keywords}
                head |= {"warps": done.metadata.num_warps, "stages": done.metadata.num_stages}
                yield head | row | {"tried": tried}


# ---------------------------------------------------------------- the command


def text_of(row: dict) -> str:
    tile = " ".join(f"{name}{size}" for name, size in row["tile"].items())
    parts = [f"{row['kernel']:20} {row['launch']:2} sm_{row['arch']:<3} {row['dtype']:4}"]
    parts += [f"{tile:18} w{row['warps']} s{row['stages']}"]
    parts += [f"{row['registers']:3} registers, {row['spills']:4} B spilled"]
    parts += [f"{row['shared']:7,} B shared"]
    found = [f"{name} {row[name]}" for name in PATTERNS if row[name]]
    return "  ".join([*parts, f"{row['seconds']:.2f} s", *found])


def main(argv: list[str]) -> int:
    words = Words(prog="tools.ptx", description=__doc__.partition("\n")[0])
    words.add_argument(
        "--arch", type=int, choices=list(CARDS), nargs="*", default=[80, 90, 100, 120]
    )
    words.add_argument("--dtype", choices=list(DTYPES), nargs="*", default=list(DTYPES))
    words.add_argument("--kernel", nargs="*", help="names of kernels; all of them otherwise")
    words.add_argument("--tiles", type=int, help="only so many of each launch's tiles")
    words.add_argument("--json", action="store_true", help="a line of JSON for each variant")
    given = words.parse_args(argv)
    if kernels_triton.INTERPRET:
        raise UserError("E003", "TRITON_INTERPRET is 1: nothing is compiled under it, unset it")
    text = json.dumps if given.json else text_of
    for arch in given.arch:
        for dtype in given.dtype:
            for row in rows(arch, dtype, given.kernel, given.tiles):
                print(text(row), flush=True)
    missing = without_case()
    if missing:
        raise UserError("E003", f"no case in tools/ptx.py launches {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    command(main)
