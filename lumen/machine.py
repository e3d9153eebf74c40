"""TODO."""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from kernels import backends, pick_attention
from lumen.errors import UserError
from lumen.launch import Words, command, environment

TRIED = (
    "2.11",
    "2.13",
    "2.14",
)  # torch, oldest first: on which the tests were run (2.11, 2.14: most)
DTYPES = {"fp32": torch.float32, "mixed_bf16": torch.bfloat16, "mixed_fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """A GPU in a machine of its kind, as the makers' data sheets have them; speeds are one way and
    of one GPU."""

    flops: float  # FLOP/s of dense 16-bit matrix products, no sparsity
    fp32: float  # FLOP/s in fp32, which Lumen does not round to TF32
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its machine
    network: float  # bytes/s to other machines
    per_node: int  # GPUs in a machine
    source: str

    def peak(self, precision: str) -> float:
        return self.fp32 if precision == "fp32" else self.flops


# bytes/s one way: 16 lanes of PCIe 4; a GPU's share of 10 Gbit/s a machine, assumed where a maker
# names no network
PCIE, ETHERNET = 32e9, 1.25e9 / 8
NO_BF16 = ("v100", "t4")
# SXM parts where there are several: PCIe ones are slower. 16-bit FLOPs, memory and bandwidth of
# b200 (its DGX), h200, h100, a100-80gb, l40s and rtx4090 agree with the tables of the book Machine
# Learning Engineering (Bekman); v100, l4, t4, NVLink (2 to 5) and InfiniBand (HDR, NDR) with other
# public ones; a10g's and 3090's matrices are from memory
HARDWARE = {
    "b200": Hardware(
        2250e12, 75e12, 180e9, 8.0e12, 900e9, 50e9, 8, "NVIDIA DGX B200 and HGX B200 data sheets"
    ),
    "h200": Hardware(
        989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8, "NVIDIA H200 SXM and DGX H200 data sheets"
    ),
    "h100": Hardware(
        989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8, "NVIDIA H100 SXM and DGX H100 data sheets"
    ),
    "a100-80gb": Hardware(
        312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, 8, "NVIDIA A100 80GB and DGX A100 data sheets"
    ),
    "a100-40gb": Hardware(
        312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9, 8, "NVIDIA A100 40GB and DGX A100 data sheets"
    ),
    "l40s": Hardware(
        362e12, 91.6e12, 48e9, 864e9, PCIE, ETHERNET, 8, "NVIDIA L40S data sheet; network assumed"
    ),
    "rtx4090": Hardware(
        165e12,
        82.6e12,
        24e9,
        1008e9,
        PCIE,
        ETHERNET,
        8,
        "NVIDIA Ada paper; machine, network assumed",
    ),
    "3090": Hardware(
        71e12,
        35.6e12,
        24e9,
        936e9,
        PCIE,
        ETHERNET,
        8,
        "NVIDIA GA102 paper; machine, network assumed",
    ),
    "a10g": Hardware(
        70e12, 31.2e12, 24e9, 600e9, PCIE, ETHERNET, 8, "AWS G5 page; network assumed"
    ),
    "v100": Hardware(
        125e12, 15.7e12, 32e9, 900e9, 150e9, 6.25e9, 8, "NVIDIA V100 SXM2 and DGX-1 data sheets"
    ),
    "l4": Hardware(
        121e12, 30.3e12, 24e9, 300e9, PCIE, ETHERNET, 8, "NVIDIA L4 data sheet; network assumed"
    ),
    "t4": Hardware(
        65e12,
        8.1e12,
        16e9,
        320e9,
        PCIE / 2,
        2 * ETHERNET,
        4,
        "NVIDIA T4 data sheet; network assumed",
    ),
}
MAKERS = re.compile(
    r"nvidia|tesla|geforce|gpu|sxm\d*|hbm3e?|rtx|"
)  # words of a name that tell no two rows apart


def name_words(name: str) -> set[str]:
    """What a card's name says beyond its maker: NVIDIA A100-SXM4-80GB -> a100, 80gb; rtx4090 -> 4090."""
    return {
        w
        for w in re.split(r"[^a-z0-9]+", name.lower().replace("rtx", "rtx "))
        if not MAKERS.fullmatch(w)
    }


def data_sheet(name: str) -> Hardware | None:
    """The table's row for a GPU by the name that torch gives it, every word of which must be the
    row's: an H100 PCIe, a slice of one (MIG), a GH200, a 3090 Ti, an RTX 4090 Laptop are other
    cards, whose speed is not known here."""
    for key, h in HARDWARE.items():
        if name_words(key) <= name_words(name) <= name_words(key) | {gigabytes(h)}:
            return h
    return None


def gigabytes(h: Hardware) -> str:
    return f"{h.memory / 1e9:.0f}gb"


def hardware_key(name: str) -> str:
    """The table's key for a card as somebody types it (rtx3090, tesla-v100); cpu and measured are
    themselves. UserError E002 names those that it may be: more than one (a100), or some that are
    spelt alike."""
    key = name.lower().replace("_", "-")
    if key in ("measured", "cpu", *HARDWARE):
        return key
    words = name_words(key)
    found = [k for k, h in HARDWARE.items() if words and words <= name_words(k) | {gigabytes(h)}]
    if len(found) == 1:
        return found[0]
    hint = f"it may be {' or '.join(found)}; " if found else ""
    if not found and (near := difflib.get_close_matches(key, HARDWARE, 1, 0.8)):
        hint = f"did you mean {near[0]}? "
    text = f"hardware: {name!r} is not known; {hint}known: {', '.join(HARDWARE)}, cpu, measured"
    raise UserError(
        "E002", f"{text}; for another card give the nearest with --peak_flops and --memory_gb"
    )


@dataclass
class Machine:
    """What `auto` resolved to here. `compile` is None where the length of the run has to decide (CPU)."""

    device: torch.device
    name: str
    precision: str  # fp32 | mixed_bf16 | mixed_fp16
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
    return [
        f"torch {version} is newer than {TRIED[-1]}, the newest on which Lumen's tests were run"
    ]


def cpu_flags() -> list[str]:
    """The flags of this CPU that decide the speed of matrices."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            words = next((set(line.split()) for line in f if line.startswith("flags")), set())
    except OSError:
        words = set()
    return [w for w in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if w in words]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (mkldnn's own answer is wrong: without,
    bf16 is slower)."""
    asked = getattr(
        torch.cpu, "_is_avx512_bf16_supported", None
    )  # private; knows what other systems' flags do not say
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags())) or bool(asked and asked())


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def detect(
    device: str = "auto",
    precision: str = "auto",
    compile_model: bool | str = "auto",
    local_rank: int = 0,
):
    """Resolve device, precision and compilation to what works here. UserError E003 when what was
    asked does not."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = (
        next(k for k in ("cuda", "mps", "cpu") if has[k])
        if device == "auto"
        else device.split(":")[0]
    )
    if not re.fullmatch(r"auto|(cuda|mps|cpu)(:\d{1,4})?", device):
        raise UserError("E002", f"device: {device!r} is not auto, cuda, mps or cpu")
    if not has[kind]:
        raise UserError(
            "E003",
            f"device: {device} is not there; this torch ({torch.__version__}) sees {_seen(has)}",
        )
    notes = untried(torch.__version__)
    if kind == "cuda":
        index = int(device.split(":")[1]) if ":" in device else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                "E003",
                f"device cuda:{index} is not there; this machine has {torch.cuda.device_count()} GPUs",
            )
        dev, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
    else:
        dev, name, capability = (
            torch.device(kind),
            platform.processor() or platform.machine(),
            (0, 0),
        )

    if precision in ("bf16", "fp16"):
        notes.append(
            f"precision: {precision} means mixed_{precision}: master weights and moments stay fp32"
        )
        precision = f"mixed_{precision}"
    if precision == "auto":
        if kind == "cuda":
            precision = (
                "mixed_bf16"
                if capability >= (8, 0)
                else "mixed_fp16"
                if capability >= (7, 0)
                else "fp32"
            )
            notes.append(
                f"precision: {precision} for compute capability {capability[0]}.{capability[1]}"
            )
        elif kind == "mps":
            precision = "mixed_bf16" if _mps_bf16() else "fp32"
            notes.append(f"precision: {precision} on MPS (Lumen has never been run there)")
        else:
            precision = "mixed_bf16" if cpu_has_bf16() else "fp32"
            why = "has" if cpu_has_bf16() else "has no"
            notes.append(f"precision: {precision}: this CPU {why} bf16 matrix units")
    if precision not in DTYPES:
        raise UserError(
            "E002", f"precision: {precision!r} is not auto, fp32, mixed_bf16 or mixed_fp16"
        )
    if kind == "cuda" and precision == "mixed_bf16" and capability < (8, 0):
        raise UserError("E003", f"precision: {name} has no bf16; take mixed_fp16 or fp32")
    if kind == "cpu" and precision == "mixed_fp16":
        raise UserError(
            "E003", "precision: mixed_fp16 is for GPUs; on a CPU take fp32 or mixed_bf16"
        )
    if kind == "cpu" and precision == "mixed_bf16" and not cpu_has_bf16():
        notes.append(
            "precision: this CPU emulates bf16 and is several times slower with it than with fp32"
        )

    if compile_model not in (True, False, "auto"):
        raise UserError("E002", f"compile_model: {compile_model!r} is not auto, true or false")
    if compile_model is True and kind == "cpu" and not find_compiler():
        raise UserError(
            "E003",
            "compile_model: true needs a C++ compiler (apt-get install g++); or set it to false",
        )
    choice = compile_model if compile_model != "auto" else {"cuda": True, "mps": False}.get(kind)
    if choice is None and not find_compiler():
        choice = False
        notes.append("compile: off, there is no C++ compiler")
    return Machine(dev, name, precision, choice, notes)


def _seen(has: dict) -> str:
    return "only " + ", ".join(k for k, v in has.items() if v)


def _mps_bf16() -> bool:
    try:
        torch.ones(8, 8, device="mps", dtype=torch.bfloat16) @ torch.ones(
            8, 8, device="mps", dtype=torch.bfloat16
        )
        return True
    except (RuntimeError, TypeError):
        return False


def matrix_peak(device, dtype=torch.float32, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product, measured for about `seconds` s; MFU is counted against it
    without a table."""
    n = (
        8192
        if torch.device(device).type == "cuda"
        else 1024
        if dtype == torch.float32 or cpu_has_bf16()
        else 256
    )
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    best, until = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        a @ b
        sync()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
        if time.perf_counter() > until:
            return best


def peak_flops(m: Machine) -> float:
    """FLOP/s against which MFU is counted: the data sheet's on a known GPU, else measured here."""
    return sheet_flops(m) or matrix_peak(m.device, m.compute_dtype)


def sheet_flops(m: Machine) -> float:
    """FLOP/s of the data sheet; 0 where this card has no row in the table, or computes in fp32."""
    there = data_sheet(m.name)
    return there.flops if there and m.precision != "fp32" else 0.0


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


def total_memory(device) -> int:
    """Bytes this process may use: the GPU's, or the machine's cut by the cgroup's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return min([whole, *(limit for limit, _ in cgroups())])


def own_memory(device) -> float:
    """Bytes that are this process's: a GPU's, or its share of what the processes of this machine have."""
    ranks = environment("LOCAL_WORLD_SIZE", 1) if torch.device(device).type == "cpu" else 1
    return total_memory(device) / ranks


def available_memory(top: Path = Path("/")) -> int:
    """Bytes of RAM that nobody uses, in this process's cgroups too. Where the system does not say
    (no Linux): half of all. `top`: where /proc and /sys lie."""
    free = total_memory("cpu") // 2
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (top / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return max(0, min([free, *(limit - used for limit, used in cgroups(top))]))


def cgroups(top: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each memory cgroup around this process that has a limit, of version
    2 and 1. Pages of files count as free: the kernel drops them for whoever asks, and a run that
    has read its data has many."""
    found = []
    try:
        lines = (top / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:  # 0::/system.slice/job, or 4:memory:/docker/a1b2
        number, kinds, path = line.split(":", 2)
        root, names = top / "sys/fs/cgroup", ("memory.max", "memory.current")
        files = {"inactive_file", "active_file"}
        if number != "0":
            root, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            files = {f"total_{name}" for name in files}
        inside = root / path.strip("/")  # a container sees only its end: the root, then, is its own
        for folder in (
            (inside, *inside.parents) if number == "0" or "memory" in kinds.split(",") else ()
        ):
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # not there, or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                with contextlib.suppress(OSError):
                    rows = map(str.split, (folder / "memory.stat").read_text().splitlines())
                    used -= sum(int(n) for name, n in rows if name in files)
                found.append((limit, used))
    return found


def git_commit() -> str:
    """Of this checkout; with a + where its files differ."""
    try:
        words = ("describe", "--always", "--exclude=*", "--dirty=+")
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip() or "?"
    except OSError:
        return "?"


def hardware(name: str, m: Machine, given: dict) -> Hardware:
    """The table's row, or this machine measured (`measured`; `cpu`: its CPU), with what `given`
    overrides.

    given: peak_flops, memory_gb, link_gb_s, network_gb_s, gpus_per_node. UserError E002: see
    hardware_key.
    """
    key = hardware_key(name)
    if key in ("measured", "cpu"):
        device = m.device if key == "measured" else torch.device("cpu")
        block = torch.empty(1 << 26, dtype=torch.uint8, device=device)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            block.clone()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        speed = matrix_peak(device, m.compute_dtype if key == "measured" else torch.float32)
        local = torch.cuda.device_count() if device.type == "cuda" else 1
        source = "matrices and memory measured here; network assumed"
        share = (
            max(local, given.get("gpus_per_node", 1)) if device.type == "cpu" else 1
        )  # processes share a CPU
        sizes = (x / share for x in (speed, speed, total_memory(device), 2 * len(block) / best))
        base = Hardware(
            *sizes, PCIE, 8 * ETHERNET / max(local, given.get("gpus_per_node", 1)), local, source
        )
    else:
        base = HARDWARE[key]
    units = {"peak_flops": ("flops", 1), "memory_gb": ("memory", 1e9), "link_gb_s": ("link", 1e9)}
    units |= {"network_gb_s": ("network", 1e9), "gpus_per_node": ("per_node", 1)}
    changed = {units[k][0]: v * units[k][1] for k, v in given.items() if k in units}
    return replace(
        base, **changed, source=base.source + f"; given: {', '.join(changed)}" * bool(changed)
    )


def env() -> int:
    """Print what this machine offers to a training run. Exit code 2 when training cannot work here."""
    problems = []
    if sys.version_info < (3, 10):  # noqa: UP036 - this is where a user of an old Python learns it
        problems.append(f"Python {platform.python_version()}: 3.10 or newer is needed")
    if version_numbers(torch.__version__) < version_numbers(TRIED[0]):
        problems.append(
            f"torch {torch.__version__}: {TRIED[0]} or newer is needed (pip install -r requirements.txt)"
        )
    m = detect()
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    gpus = f", {torch.cuda.device_count()} GPUs" if m.device.type == "cuda" else ""
    print(
        f"device       {m.device.type}: {m.name}{gpus}; CPU flags: {' '.join(cpu_flags()) or 'none known'}"
    )
    print("".join(f"             {note}\n" for note in m.notes), end="")
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"matrices     {label} {human_number(matrix_peak(m.device, dtype), 'FLOP/s')} measured")
    print(f"compiler     {find_compiler() or 'none: compile_model stays off on the CPU'}")
    print(f"memory       {total_memory('cpu') / 2**30:.1f} GiB", end="")
    print(f", GPU {total_memory(m.device) / 2**30:.1f} GiB" if m.device.type == "cuda" else "")
    free = shutil.disk_usage(".").free
    print(f"disk         {free / 2**30:.1f} GiB free here")
    if free < 1 << 30:
        problems.append("less than 1 GiB of disk is free: checkpoints need it")
    from model import ModelConfig

    cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=1, n_heads=2)
    for choice in ("sdpa", "flash", "flex"):
        name, why = pick_attention(choice, cfg, m.device, m.compute_dtype)
        print(f"attention    {choice}: {'works' if name == choice else why}")
    for name, why in backends(m.device, m.compute_dtype, cfg.d_model, cfg.d_model).items():
        print(f"experts      {name}: {why or 'can work'}")
    for package, use in (
        ("wandb", "wandb_project"),
        ("tensorboard", "tensorboard: true"),
        ("transformers", "--check"),
    ):
        there = importlib.util.find_spec(package) is not None
        print(
            f"optional     {package}: {'there' if there else f'not there (pip install {package}), for {use}'}"
        )
    for module in ("numpy", "yaml", "tiktoken", "safetensors", "tqdm"):
        if importlib.util.find_spec(module) is None:
            problems.append(f"{module} is not installed (pip install -r requirements.txt)")
    print("\n".join(f"PROBLEM      {p}" for p in problems) or "ready        training works here")
    return 2 if problems else 0


def resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="utf-8") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def to_host(numbers: torch.Tensor) -> tuple:
    """A copy on its way to the host, and the event that says it has arrived (None: it has)."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def event_now():
    """A CUDA event that is over when all that was queued before it is."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_bytes(model, rows: int, device) -> int:
    """Bytes that a forward and backward pass of so many rows reserves at most; eager, which needs
    no less. Gradients are added to those that are there, and stay."""
    T, V = model.cfg.max_seq_len, model.cfg.vocab_size
    ids = (torch.arange(rows * T, device=device) * 7919 % V).view(
        rows, T
    )  # unlike ones: they go to many experts
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.compiler.set_stance("force_eager"):
        model(ids, targets=ids)[0].backward()
    return torch.cuda.max_memory_reserved(device)


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


def local_region(p) -> tuple[tuple, tuple]:
    """(shape, offset) of this rank's part of a sharded parameter (a DTensor) in the whole. 2.11 to
    2.14."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)


def init_fake_group(world: int) -> None:
    """A default process group of so many ranks that are not there; this one is rank 0. 2.11 to 2.14."""
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


# ---------------------------------------------------------------- memory


def free_memory(device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def human_number(n: float, unit: str = "") -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {letter}{unit}" if unit else f"{n / size:.3g}{letter}"
    return f"{n:.3g} {unit}".strip()


def main(argv: list[str]) -> int:
    Words(prog="python -m lumen.machine", description=env.__doc__).parse_args(argv)
    return env()


if __name__ == "__main__":
    command(main)
