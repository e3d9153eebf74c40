"""What this machine is: its devices, their speed and memory. `python -m lumen.machine` prints it.

In this order: what `auto` becomes here; speed; memory; the report; private parts of torch, each
behind a named function. What the makers say of their cards is in lumen/cards.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

import kernels
import kernels_attention
from lumen import optional
from lumen.cards import data_sheet
from lumen.errors import UserError
from lumen.feed import synchronize
from lumen.launch import Words, command, environment

# torch, oldest first: on which the tests were run (2.11, 2.14: most)
TRIED = ("2.11", "2.13", "2.14")
DTYPES = {"fp32": torch.float32, "mixed_bf16": torch.bfloat16, "mixed_fp16": torch.float16}
# training with matmuls in fp8 and all else in bf16, see lumen/fp8.py: (rowwise, emulated)
FP8 = {
    "fp8_e4m3": (False, False),
    "fp8_e4m3_rowwise": (True, False),
    "fp8_e4m3_emulated": (False, True),
    "fp8_e4m3_rowwise_emulated": (True, True),
}
DTYPES |= dict.fromkeys(FP8, torch.bfloat16)

# ---------------------------------------------------------------- what `auto` becomes here


@dataclass
class Machine:
    """What `auto` became. `compile` is None where the length of the run has to decide (CPU)."""

    device: torch.device
    name: str
    precision: str  # fp32 | mixed_bf16 | mixed_fp16 | one of FP8
    compile: bool | None
    notes: list[str] = field(default_factory=list)  # why, a line each

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def version_numbers(version: str) -> tuple[int, ...]:
    """Of "2.14.1+cu130": (2, 14)."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def untried(version: str) -> list[str]:
    """What a user should know of a torch newer than any that was tried: a line, or none. It is not
    forbidden."""
    if version_numbers(version) <= version_numbers(TRIED[-1]):
        return []
    text = f"torch {version} is newer than {TRIED[-1]}, the newest on which Lumen's tests were run"
    return [text]


def cpu_flags() -> list[str]:
    """The flags of this CPU that decide the speed of matrices."""
    words = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("flags"):
                words = set(line.split())
                break
    return [w for w in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if w in words]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (mkldnn's own answer is wrong: without,
    bf16 is slower)."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags())) or cpu_says_bf16()


def find_compiler() -> str | None:
    """That of C++, which torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def no_cuda_compilation() -> str | None:
    """Why torch.compile cannot work on a GPU: Triton makes its kernels, and a C compiler what
    starts them. Images for running torch ("runtime") have none."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    names = [os.environ.get("CC") or "gcc", "clang"]
    return None if any(shutil.which(name) for name in names) else "there is no C compiler"


def detect(
    device: str = "auto",
    precision: str = "auto",
    compile_model: bool | str = "auto",
    local_rank: int = 0,
) -> Machine:
    """Resolve device, precision and compilation to what works here. UserError E003 when what was
    asked does not."""
    place, name, capability = find_device(device, local_rank)
    notes = untried(torch.__version__)
    precision = find_precision(precision, place.type, name, capability, notes)
    compiled = find_compilation(compile_model, place.type, notes)
    if place.type == "cuda" and precision in FP8 and not compiled:
        notes.append(f"precision: {precision} without torch.compile is slower than mixed_bf16")
    return Machine(place, name, precision, compiled, notes)


def find_device(device: str, local_rank: int) -> tuple[torch.device, str, tuple[int, int]]:
    """-> the device, its name, and on CUDA its compute capability, else (0, 0)."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not re.fullmatch(r"auto|(cuda|mps|cpu)(:\d{1,4})?", device):
        raise UserError("E002", f"device: {device!r} is not auto, cuda, mps or cpu")
    kind = device.split(":")[0]
    if device == "auto":
        kind = next(kind for kind, there in has.items() if there)
    if not has[kind]:
        sees = ", ".join(kind for kind, there in has.items() if there)
        text = f"device: {device} is not there; this torch ({torch.__version__}) sees only {sees}"
        raise UserError("E003", text)
    if kind != "cuda":
        return torch.device(kind), platform.processor() or platform.machine(), (0, 0)
    index = int(device.split(":")[1]) if ":" in device else local_rank
    if index >= torch.cuda.device_count():
        text = (
            f"device cuda:{index} is not there; this machine has {torch.cuda.device_count()} GPUs"
        )
        raise UserError("E003", text)
    capability = torch.cuda.get_device_capability(index)
    return torch.device("cuda", index), torch.cuda.get_device_name(index), capability


def find_precision(
    precision: str, kind: str, name: str, capability: tuple[int, int], notes: list[str]
) -> str:
    """A word of DTYPES; why goes to `notes`."""
    if precision in ("bf16", "fp16"):
        text = f"precision: {precision} means mixed_{precision}"
        notes.append(f"{text}: master weights and moments stay fp32")
        precision = f"mixed_{precision}"
    if precision == "auto":
        precision, why = auto_precision(kind, capability)
        notes.append(f"precision: {precision}{why}")
    if precision not in DTYPES:
        text = f"precision: {precision!r} is not auto, {', '.join(DTYPES)}"
        raise UserError("E002", text)
    if precision in FP8:
        check_fp8(precision, kind, name, capability, notes)
    in_bf16 = DTYPES[precision] == torch.bfloat16
    if kind == "cuda" and in_bf16 and capability < (8, 0):
        raise UserError("E003", f"precision: {name} has no bf16; take mixed_fp16 or fp32")
    if kind == "cpu" and precision == "mixed_fp16":
        text = "precision: mixed_fp16 is for GPUs; on a CPU take fp32 or mixed_bf16"
        raise UserError("E003", text)
    if kind == "cpu" and in_bf16 and not cpu_has_bf16():
        text = (
            "precision: this CPU emulates bf16 and is several times slower with it than with fp32"
        )
        notes.append(text)
    return precision


def check_fp8(
    precision: str, kind: str, name: str, capability: tuple[int, int], notes: list[str]
) -> None:
    """E003 where there are no matrix units for fp8, or this torch cannot reach them."""
    if FP8[precision][1]:
        text = f"precision: {precision} emulates fp8 with fp32 matmuls: it shows what training"
        notes.append(f"{text} would do, and is slower than mixed_bf16")
        return
    why = ""
    if kind != "cuda":
        why = f"here it would run on {kind}"
    elif torch.version.hip:
        why = f"{name} is AMD's, whose fp8 is of another kind"
    elif capability < (8, 9):
        why = f"{name} has {capability[0]}.{capability[1]}"
    elif not hasattr(torch, "_scaled_mm"):
        why = f"torch {torch.__version__} has no torch._scaled_mm; take one of {', '.join(TRIED)}"
    if why:
        text = f"precision: {precision} needs an NVIDIA GPU of compute capability 8.9 or more (Ada,"
        text += f" Hopper, Blackwell); {why}. Take mixed_bf16; {precision}_emulated tries the"
        raise UserError("E003", f"{text} numbers on any device, slowly")


def auto_precision(kind: str, capability: tuple[int, int]) -> tuple[str, str]:
    """(precision, why)."""
    if kind == "cuda":
        why = f" for compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return "mixed_bf16", why
        return ("mixed_fp16" if capability >= (7, 0) else "fp32"), why
    if kind == "mps":
        precision = "mixed_bf16" if mps_has_bf16() else "fp32"
        return precision, " on MPS (Lumen has never been run there)"
    if cpu_has_bf16():
        return "mixed_bf16", ": this CPU has bf16 matrix units"
    return "fp32", ": this CPU has no bf16 matrix units"


def mps_has_bf16() -> bool:
    try:
        ones = torch.ones(8, 8, device="mps", dtype=torch.bfloat16)
        ones @ ones  # noqa: B018 - whether it raises
        return True
    except (RuntimeError, TypeError):
        return False


def find_compilation(compile_model: bool | str, kind: str, notes: list[str]) -> bool | None:
    """Whether to compile; None: the length of the run decides."""
    if compile_model not in (True, False, "auto"):
        raise UserError("E002", f"compile_model: {compile_model!r} is not auto, true or false")
    if compile_model is True and kind == "cpu" and not find_compiler():
        text = "compile_model: true needs a C++ compiler (apt-get install g++); or set it to false"
        raise UserError("E003", text)
    if compile_model != "auto":
        return compile_model
    if kind == "cpu" and find_compiler():
        return None
    if kind == "cpu":
        notes.append("compile: off, there is no C++ compiler")
    if kind != "cuda":
        return False
    why = no_cuda_compilation()
    if why:
        notes.append(f"compile: off, {why}; with it a GPU trains much faster")
    return why is None


# ---------------------------------------------------------------- speed


def matrix_peak(device, dtype=torch.float32, seconds: float = 0.2) -> float:
    """FLOP/s of a square matmul, the best of about `seconds` s; without a data sheet MFU is counted
    against it."""
    # The smaller one fits between two turns of a busy machine's other processes, which are some
    # milliseconds long: with load 8 a width of 1024 came out at a seventh of its speed.
    sizes = (512, 1024)
    if torch.device(device).type == "cuda":
        sizes = (8192,)
    elif dtype != torch.float32 and not cpu_has_bf16():
        sizes = (256,)  # emulated: a larger one would take minutes
    return max(matmul_speed(n, device, dtype, seconds / len(sizes)) for n in sizes)


def matmul_speed(n: int, device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s at the best of n x n by n x n."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
        if time.perf_counter() > until:
            return best


def peak_flops(m: Machine) -> float:
    """FLOP/s against which MFU is counted: the data sheet's on a known GPU, else measured here."""
    return sheet_flops(m) or matrix_peak(m.device, m.compute_dtype)


def sheet_flops(m: Machine) -> float:
    """FLOP/s of the data sheet; 0 where this card has no row in the table, or computes in fp32."""
    row = data_sheet(m.name)
    return row.flops if row and m.precision != "fp32" else 0.0


# ---------------------------------------------------------------- memory


def total_memory(device) -> int:
    """Bytes this process may use: the GPU's, or the machine's cut by the cgroup's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = 0
    if hasattr(os, "sysconf"):
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(limit for limit, _ in cgroups())])


def own_memory(device) -> float:
    """Bytes that are this process's: a GPU's, or its share of this machine's."""
    ranks = environment("LOCAL_WORLD_SIZE", 1) if torch.device(device).type == "cpu" else 1
    return total_memory(device) / ranks


def available_memory(top: Path = Path("/")) -> int:
    """Bytes of RAM that nobody uses, in this process's cgroups too.

    `top`: where /proc and /sys lie. Where the system does not say (no Linux): half of all.
    """
    free = total_memory("cpu") // 2
    with contextlib.suppress(OSError, ValueError):
        for line in (top / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) << 10
    return max(0, min([free, *(limit - used for limit, used in cgroups(top))]))


def cgroups(top: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each memory cgroup around this process that has a limit, of version
    2 and 1."""
    rows = []
    lines = []
    with contextlib.suppress(OSError):
        lines = (top / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:  # 0::/system.slice/job, or 4:memory:/docker/a1b2
        number, kinds, path = line.split(":", 2)
        second = number == "0"
        if not second and "memory" not in kinds.split(","):
            continue
        root = top / "sys/fs/cgroup" if second else top / "sys/fs/cgroup/memory"
        inside = root / path.strip("/")  # a container sees only its end: the root, then, is its own
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # not there, or no limit: "max"
                rows.append(cgroup_limit(folder, second))
    return rows


def cgroup_limit(folder: Path, second: bool) -> tuple[int, int]:
    """(limit, used) of one memory cgroup, of version 2 (`second`) or 1. OSError, ValueError without
    a limit.

    Pages of files count as free: the kernel drops them for whoever asks, and a run that has read
    its data has many.
    """
    names, files = ("memory.max", "memory.current"), ("inactive_file", "active_file")
    if not second:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        files = ("total_inactive_file", "total_active_file")
    limit, used = (int((folder / name).read_text()) for name in names)
    with contextlib.suppress(OSError):
        for row in (folder / "memory.stat").read_text().splitlines():
            name, n = row.split()
            if name in files:
                used -= int(n)
    return limit, used


def resident_bytes() -> int | None:
    """Of this process; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; 0 where torch's private counter is
    gone (it was there from 2.11 to 2.15)."""
    counters = getattr(torch._dynamo.utils, "counters", {})
    return counters.get("stats", {}).get("unique_graphs", 0)


def free_memory(device) -> None:
    """Give back what dead tensors hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- the report


def human_number(n: float, unit: str = "") -> str:
    """1234567 -> 1.23M; with a unit: 1.23 MFLOP."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {letter}{unit}" if unit else f"{n / size:.3g}{letter}"
    return f"{n:.3g} {unit}".strip()


YEAR = 365.25 * 86400  # seconds


def human_time(seconds: float) -> str:
    """A length of time in the unit that one thinks of it in: 45 s, 3.2 hours, 40,000 years."""
    for unit, size in (("years", YEAR), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            n = float(f"{seconds / size:.3g}")
            return f"{n:,.0f} {unit}" if n >= 100 else f"{n:g} {unit}"
    return f"{seconds:.3g} s"


def git_commit() -> str:
    """Of this checkout; with a + where its files differ."""
    words = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "?"
    except OSError:
        return "?"


def env() -> int:
    """Print what this machine offers to a run. Exit code 2 when training cannot work here."""
    m = detect()
    cuda = m.device.type == "cuda"
    threads = f"{torch.get_num_threads()} threads"
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"torch        {torch.__version__}, {threads}")
    gpus = f", {torch.cuda.device_count()} GPUs" if cuda else ""
    flags = " ".join(cpu_flags()) or "none known"
    print(f"device       {m.device.type}: {m.name}{gpus}; CPU flags: {flags}")
    for note in m.notes:
        print(f"             {note}")
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        speed = human_number(matrix_peak(m.device, dtype), "FLOP/s")
        print(f"matrices     {label} {speed} measured")
    print(f"compiler     {find_compiler() or 'none: compile_model stays off on the CPU'}")
    gpu = f", GPU {total_memory(m.device) / 2**30:.1f} GiB" if cuda else ""
    print(f"memory       {total_memory('cpu') / 2**30:.1f} GiB{gpu}")
    print(f"disk         {shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    print_backends(m)
    problems = find_problems()
    for problem in problems:
        print(f"PROBLEM      {problem}")
    if not problems:
        print("ready        training works here")
    return 2 if problems else 0


def print_backends(m: Machine) -> None:
    """Which attention, experts and optional packages work here."""
    from lumen.attention import Shape, pick_attention

    shape = Shape(rows=1, lengths={128: 1}, heads=2, kv_heads=2, head_dim=64)
    others = (*kernels_attention.ON_CPU, "flash")
    if m.device.type == "cuda":
        others = kernels_attention.ATTENTION
    for choice in ("sdpa", *others):
        name, why = pick_attention(choice, shape, m.device, m.compute_dtype)
        print(f"attention    {choice}: {'works' if name == choice else why}")
    for name, why in kernels.backends(m.device, m.compute_dtype, 128, 128).items():
        print(f"experts      {name}: {why or 'can work'}")
    for line in optional.lines():
        print(line)


def find_problems() -> list[str]:
    """Why training cannot work here."""
    problems, install = [], "(pip install -r requirements.txt)"
    if sys.version_info < (3, 10):  # noqa: UP036 - this is where a user of an old Python learns it
        problems.append(f"Python {platform.python_version()}: 3.10 or newer is needed")
    if version_numbers(torch.__version__) < version_numbers(TRIED[0]):
        text = f"torch {torch.__version__}: {TRIED[0]} or newer is needed"
        problems.append(f"{text} {install}")
    if shutil.disk_usage(".").free < 1 << 30:
        problems.append("less than 1 GiB of disk is free: checkpoints need it")
    for module in ("numpy", "yaml", "tiktoken", "safetensors", "tqdm"):
        if importlib.util.find_spec(module) is None:
            problems.append(f"{module} is not installed {install}")
    return problems


def main(argv: list[str]) -> int:
    Words(prog="python -m lumen.machine", description=env.__doc__).parse_args(argv)
    return env()


# ---------------------------------------------------------------- private parts of torch
# Each behind a named function, with the versions on which it was seen to work. A new torch then
# breaks this file only.


def compiled_so_far() -> int:
    """A number that grows with all that torch compiles in this process, forward, backward, and
    again. 2.11 to 2.14."""
    return sum(sum(group.values()) for group in torch._dynamo.utils.counters.values())


def cpu_says_bf16() -> bool:
    """Whether torch sees a CPU with bf16 matrix units; knows what other systems' flags do not say.
    2.11 to 2.14."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked and asked())


def scaled_matmul(a, b, scale_a, scale_b, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """(scale_a a) (scale_b b) in `dtype`, (m, k) (k, n) -> (m, n), by the matrix units for fp8.

    a is row-major and b column-major, sizes are multiples of 16. Scales, fp32: 0-d, or (m, 1) and
    (1, n). fast: sums of fewer bits (Hopper). 2.13 on a CPU, which has its own code for it.
    """
    post = None
    if scale_a.dim() == 2 and not fast:
        # the kernel that takes a scale per row is very slow with exact sums (torchao found), so
        # that of one scale does it, and the rest comes after
        post = scale_a, scale_b
        scale_a = scale_b = torch.ones((), device=a.device)
    how = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": dtype, "use_fast_accum": fast}
    y = torch._scaled_mm(a, b, **how)
    return y if post is None else (y * post[0] * post[1]).to(dtype)


def local_region(p) -> tuple[tuple, tuple]:
    """(shape, offset) of this rank's part of a sharded parameter (a DTensor) in the whole. 2.11 to
    2.14."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)


def init_fake_group(world: int) -> None:
    """A default process group of ranks that are not there; this one is rank 0. 2.11 to 2.14."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def fake_tensors():
    """A context in which tensors have shapes and no content. 2.11 to 2.14."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def peak_of_fake_step(model, optimizer, ids) -> int:
    """Bytes at the peak of a forward and backward pass under FSDP2 on fake tensors, ids (B, T).
    2.11 to 2.14."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((ids,))
    with tracker:
        model(ids, targets=ids)[0].backward()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def int8_matmul(x, q, scale):
    """x (m, k) times int8 (n, k)^T with scale (n,), x and scale bf16, on a CPU. It reads beyond the
    end where 32 does not divide k. Seen in 2.13."""
    return torch._weight_int8pack_mm(x, q, scale)


def int4_matmul(x, q, scale):
    """x (m, k) bf16 times int4 in blocks, as int4_blocks makes them; scale (k / group, n, 2), bf16.
    Seen in 2.13."""
    group = x.shape[1] // scale.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, group, scale)


def int4_blocks(q):
    """Numbers 0 to 15, uint8 (n, k), as int4_matmul reads them: uint8 (n, k / 2). 16 must divide n,
    2 k. Seen in 2.13."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)


@functools.cache
def int4_block() -> int:
    """Outputs in one of int4_matmul's blocks on this CPU: 64 or 32; lumen/fewbits.py tests whether
    it is so."""
    numbers = torch.zeros(64, 2, dtype=torch.uint8)
    numbers[32, 0] = 15  # in a block of 64 it shares its byte with output 0
    return 64 if int4_blocks(numbers).flatten()[0] == 0xF0 else 32


def set_collective_timeout(seconds: int) -> None:
    """How long a collective of any group of processes waits from now on.

    The list of groups is private to torch (the same in 2.11 to 2.14). Where it is gone, only the
    group of all processes changes: meshes keep the longest wait.
    """
    c10d = torch.distributed.distributed_c10d
    public = getattr(torch.distributed, "set_timeout", None)  # since torch 2.14
    set_timeout = public or c10d._set_pg_timeout
    world = getattr(c10d, "_world", None)
    groups = [None] if world is None else list(world.pg_map)
    for group in groups:
        set_timeout(timedelta(seconds=seconds), group)


if __name__ == "__main__":
    command(main)
