"""What this machine is, and the arithmetic before a run: parameters, FLOPs, memory, time. `python plan.py env`.

Takes a ModelConfig and plain numbers, never the run's configuration; `python train.py CONFIG --dry_run` prints it all.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from errors import UserError, Words, command, environment
from model import ModelConfig, Transformer, head_rows, pick_attention
from model_moe import back_ends

TRIED = ("2.11", "2.13", "2.14")  # torch, oldest first: on which the tests were run (2.11, 2.14: most)
DTYPES = {"fp32": torch.float32, "mixed_bf16": torch.bfloat16, "mixed_fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """A GPU in a machine of its kind, as the makers' data sheets have them; speeds are one way and of one GPU."""

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


# bytes/s one way: 16 lanes of PCIe 4; a GPU's share of 10 Gbit/s a machine, assumed where a maker names no network
PCIE, ETHERNET = 32e9, 1.25e9 / 8
NO_BF16 = ("v100", "t4")
# SXM parts where there are several: PCIe ones are slower. 16-bit FLOPs, memory and bandwidth of b200 (its DGX), h200,
# h100, a100-80gb, l40s and rtx4090 agree with the tables of the book Machine Learning Engineering (Bekman); v100, l4,
# t4, NVLink (2 to 5) and InfiniBand (HDR, NDR) with other public ones; a10g's and 3090's matrices are from memory
HARDWARE = {
    "b200": Hardware(2250e12, 75e12, 180e9, 8.0e12, 900e9, 50e9, 8, "NVIDIA DGX B200 and HGX B200 data sheets"),
    "h200": Hardware(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8, "NVIDIA H200 SXM and DGX H200 data sheets"),
    "h100": Hardware(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8, "NVIDIA H100 SXM and DGX H100 data sheets"),
    "a100-80gb": Hardware(312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, 8, "NVIDIA A100 80GB and DGX A100 data sheets"),
    "a100-40gb": Hardware(312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9, 8, "NVIDIA A100 40GB and DGX A100 data sheets"),
    "l40s": Hardware(362e12, 91.6e12, 48e9, 864e9, PCIE, ETHERNET, 8, "NVIDIA L40S data sheet; network assumed"),
    "rtx4090": Hardware(165e12, 82.6e12, 24e9, 1008e9, PCIE, ETHERNET, 8, "NVIDIA Ada paper; machine, network assumed"),
    "3090": Hardware(71e12, 35.6e12, 24e9, 936e9, PCIE, ETHERNET, 8, "NVIDIA GA102 paper; machine, network assumed"),
    "a10g": Hardware(70e12, 31.2e12, 24e9, 600e9, PCIE, ETHERNET, 8, "AWS G5 page; network assumed"),
    "v100": Hardware(125e12, 15.7e12, 32e9, 900e9, 150e9, 6.25e9, 8, "NVIDIA V100 SXM2 and DGX-1 data sheets"),
    "l4": Hardware(121e12, 30.3e12, 24e9, 300e9, PCIE, ETHERNET, 8, "NVIDIA L4 data sheet; network assumed"),
    "t4": Hardware(65e12, 8.1e12, 16e9, 320e9, PCIE / 2, 2 * ETHERNET, 4, "NVIDIA T4 data sheet; network assumed"),
}


MAKERS = re.compile(r"nvidia|tesla|geforce|gpu|sxm\d*|hbm3e?|rtx|")  # words of a name that tell no two rows apart


def name_words(name: str) -> set[str]:
    """What a card's name says beyond its maker: NVIDIA A100-SXM4-80GB -> a100, 80gb; rtx4090 -> 4090."""
    return {w for w in re.split(r"[^a-z0-9]+", name.lower().replace("rtx", "rtx ")) if not MAKERS.fullmatch(w)}


def known(name: str) -> Hardware | None:
    """The table's row for a GPU by the name that torch gives it, every word of which must be the row's: an H100 PCIe, a
    slice of one (MIG), a GH200, a 3090 Ti, an RTX 4090 Laptop are other cards, whose speed is not known here."""
    for key, h in HARDWARE.items():
        if name_words(key) <= name_words(name) <= name_words(key) | {gigabytes(h)}:
            return h
    return None


def gigabytes(h: Hardware) -> str:
    return f"{h.memory / 1e9:.0f}gb"


def hardware_key(name: str) -> str:
    """The table's key for a card as somebody types it (rtx3090, tesla-v100); cpu and measured are themselves.
    UserError E002 names those that it may be: more than one (a100), or some that are spelt alike."""
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
    raise UserError("E002", f"{text}; for another card give the nearest with --peak_flops and --memory_gb")


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


def release(version: str) -> tuple[int, ...]:
    """Of "2.14.1+cu130": (2, 14)."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def untried(version: str) -> list[str]:
    """What a user should know of a torch newer than any that was tried: a line, or none. It is not forbidden."""
    if release(version) <= release(TRIED[-1]):
        return []
    return [f"torch {version} is newer than {TRIED[-1]}, the newest on which Lumen's tests were run"]


def cpu_flags() -> list[str]:
    """The flags of this CPU that decide the speed of matrices."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            words = next((set(line.split()) for line in f if line.startswith("flags")), set())
    except OSError:
        words = set()
    return [w for w in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if w in words]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (mkldnn's own answer is wrong: without, bf16 is slower)."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private; knows what other systems' flags do not say
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags())) or bool(asked and asked())


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def machine(device: str = "auto", precision: str = "auto", compile_model: bool | str = "auto", local_rank: int = 0):
    """Resolve device, precision and compilation to what works here. UserError E003 when what was asked does not."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in ("cuda", "mps", "cpu") if has[k]) if device == "auto" else device.split(":")[0]
    if not re.fullmatch(r"auto|(cuda|mps|cpu)(:\d{1,4})?", device):
        raise UserError("E002", f"device: {device!r} is not auto, cuda, mps or cpu")
    if not has[kind]:
        raise UserError("E003", f"device: {device} is not there; this torch ({torch.__version__}) sees {_seen(has)}")
    notes = untried(torch.__version__)
    if kind == "cuda":
        index = int(device.split(":")[1]) if ":" in device else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                "E003", f"device cuda:{index} is not there; this machine has {torch.cuda.device_count()} GPUs"
            )
        dev, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
    else:
        dev, name, capability = torch.device(kind), platform.processor() or platform.machine(), (0, 0)

    if precision in ("bf16", "fp16"):
        notes.append(f"precision: {precision} means mixed_{precision}: master weights and moments stay fp32")
        precision = f"mixed_{precision}"
    if precision == "auto":
        if kind == "cuda":
            precision = "mixed_bf16" if capability >= (8, 0) else "mixed_fp16" if capability >= (7, 0) else "fp32"
            notes.append(f"precision: {precision} for compute capability {capability[0]}.{capability[1]}")
        elif kind == "mps":
            precision = "mixed_bf16" if _mps_bf16() else "fp32"
            notes.append(f"precision: {precision} on MPS (Lumen has never been run there)")
        else:
            precision = "mixed_bf16" if cpu_has_bf16() else "fp32"
            why = "has" if cpu_has_bf16() else "has no"
            notes.append(f"precision: {precision}: this CPU {why} bf16 matrix units")
    if precision not in DTYPES:
        raise UserError("E002", f"precision: {precision!r} is not auto, fp32, mixed_bf16 or mixed_fp16")
    if kind == "cuda" and precision == "mixed_bf16" and capability < (8, 0):
        raise UserError("E003", f"precision: {name} has no bf16; take mixed_fp16 or fp32")
    if kind == "cpu" and precision == "mixed_fp16":
        raise UserError("E003", "precision: mixed_fp16 is for GPUs; on a CPU take fp32 or mixed_bf16")
    if kind == "cpu" and precision == "mixed_bf16" and not cpu_has_bf16():
        notes.append("precision: this CPU emulates bf16 and is several times slower with it than with fp32")

    if compile_model not in (True, False, "auto"):
        raise UserError("E002", f"compile_model: {compile_model!r} is not auto, true or false")
    if compile_model is True and kind == "cpu" and not find_compiler():
        raise UserError("E003", "compile_model: true needs a C++ compiler (apt-get install g++); or set it to false")
    choice = compile_model if compile_model != "auto" else {"cuda": True, "mps": False}.get(kind)
    if choice is None and not find_compiler():
        choice = False
        notes.append("compile: off, there is no C++ compiler")
    return Machine(dev, name, precision, choice, notes)


def _seen(has: dict) -> str:
    return "only " + ", ".join(k for k, v in has.items() if v)


def _mps_bf16() -> bool:
    try:
        torch.ones(8, 8, device="mps", dtype=torch.bfloat16) @ torch.ones(8, 8, device="mps", dtype=torch.bfloat16)
        return True
    except (RuntimeError, TypeError):
        return False


def matrix_peak(device, dtype=torch.float32, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product, measured for about `seconds` s; MFU is counted against it without a table."""
    n = 8192 if torch.device(device).type == "cuda" else 1024 if dtype == torch.float32 or cpu_has_bf16() else 256
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
    there = known(m.name)
    return there.flops if there and m.precision != "fp32" else 0.0


def total_memory(device) -> int:
    """Bytes this process may use: the GPU's, or the machine's cut by the cgroup's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return min([whole, *(limit for limit, _ in cgroups())])


def own_memory(device) -> float:
    """Bytes that are this process's: a GPU's, or its share of what the processes of this machine have."""
    ranks = environment("LOCAL_WORLD_SIZE", 1) if torch.device(device).type == "cpu" else 1
    return total_memory(device) / ranks


def available_memory(top: Path = Path("/")) -> int:
    """Bytes of RAM that nobody uses, in this process's cgroups too. Where the system does not say (no Linux): half of
    all. `top`: where /proc and /sys lie."""
    free = total_memory("cpu") // 2
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (top / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return max(0, min([free, *(limit - used for limit, used in cgroups(top))]))


def cgroups(top: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each memory cgroup around this process that has a limit, of version 2 and 1. Pages of
    files count as free: the kernel drops them for whoever asks, and a run that has read its data has many."""
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
        for folder in (inside, *inside.parents) if number == "0" or "memory" in kinds.split(",") else ():
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # not there, or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                with contextlib.suppress(OSError):
                    rows = map(str.split, (folder / "memory.stat").read_text().splitlines())
                    used -= sum(int(n) for name, n in rows if name in files)
                found.append((limit, used))
    return found


def kept_bytes(cfg: ModelConfig, rows: int, precision: str, recompute="none", arrive: float = 0.0, cuda=True) -> dict:
    """Bytes beside the weights of a step on `rows` rows of T tokens: activations, and what comes and goes.

    activations: what backward needs under recompute none | selective (all but products) | block (everything), and of
    the largest block all; kept, again, attention: the same layer by layer. head: while the loss is made, chunks of
    logits and both gradients. rows, travel: in and to the experts while a layer of them is in backward. `arrive`: with
    expert parallelism so many times the fair share of rows come to this rank; 0: its own stay here. `cuda`: see
    model.head_rows.
    """
    b = 4 if precision == "fp32" else 2
    C, q, kv, F = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim, cfg.d_ff
    K, width, slots = cfg.n_experts_per_token, cfg.d_expert, cfg.n_experts_max or cfg.n_experts
    N, norm = rows * cfg.max_seq_len, C * (4 + 2 * b)  # the norm's fp32 input; normalized; times weight
    qk = (q + kv) * (b + (4 if b == 2 else 0)) if cfg.qk_norm else 0
    attn = norm * (cfg.norm_order == "pre") + qk + b * ((q + 2 * kv) + (q + kv) + q)  # qkv; rotated; output
    dropout = C if cfg.dropout else 0
    # probabilities in fp32 (sigmoid: and normalised; with a z-loss the logits too); gates, choices and their order;
    # the experts keep their pre-activation alone; a shared one is a SwiGLU
    n, share = slots + cfg.n_null_experts, arrive or 1.0
    scores = n * 4 * (1 + (cfg.router == "sigmoid") + (cfg.router_z_loss_weight > 0))
    experts = scores + K * (3 * 4 + 3 * 8) + b * K * 2 * width * share + b * 4 * cfg.n_shared_experts * width
    experts += K * (b * C + 3 * 8) * arrive  # rows that came, their order
    # selective keeps what products, attention and topk gave
    products_attn = b * ((q + 2 * kv) + q + C) + 4 * cfg.n_heads
    products = {False: b * (2 * F + C), True: 4 * n + 12 * K + b * (C * max(1, K * arrive) + K * 2 * width * share)}
    products[True] += b * (2 * cfg.n_shared_experts * width + C) * (cfg.n_shared_experts > 0)
    layers, kept, attention = [], [], []  # all of it; what recomputation keeps; attention's share of all
    for i in range(cfg.n_layers):
        moe, c, first = cfg.is_moe(i), cfg.capacity(i), attn + dropout
        c = 1.0 if cfg.mod_anneal_steps else c  # annealed: it begins whole
        second = norm + (experts if moe else b * 4 * F) + dropout  # gate and up; silu; product
        outer = 1 if c < 1 and cfg.mod_ffn_only else c
        if c < 1:  # MoD
            learned = cfg.mod_routing == "learned"  # its fp32 input and that normalized, of every token; ungated change
            second = c * (second + b * C * learned) + 8 * C * learned
            first *= outer
        layers.append(round(N * (first + second)))
        attention.append(round(N * first))
        kept.append(round(N * (b * C + (recompute == "selective") * (outer * products_attn + c * products[moe]))))
    again = layers  # what is there while a block is in backward, beside what all blocks keep
    if recompute == "none":
        kept, again = layers, [0] * cfg.n_layers
    elif recompute == "selective":  # what was kept is not made again
        again = [a - k + N * b * C for a, k in zip(layers, kept)]
    table = cfg.vocab_size * C
    head = min(head_rows(cfg.vocab_size, cuda), N) * cfg.vocab_size * 4 + table * 4 + N * C * b
    if b == 2:  # the logits as computed; a chunk's gradient of the table (its copy to fp32 on a CPU is not counted)
        head += min(head_rows(cfg.vocab_size, cuda), N) * cfg.vocab_size * b + table * b
    moe = any(map(cfg.is_moe, range(cfg.n_layers)))
    return {
        "activations": N * norm + sum(kept) + max(again),
        "kept": kept,
        "again": again,
        "attention": attention,
        "head": head,
        "rows": round(N * K * b * (4 * width + C) * share) * moe,
        "travel": round(N * K * b * C * share) * (arrive > 0),
    }


def memory(cfg: ModelConfig, n_params: int, rows: int, precision: str, recompute="none", cuda=True) -> dict[str, int]:
    """Estimated bytes of a training step on one device: the parts and their total.

    states: weights, gradients and both moments in fp32, 16 per parameter (expert slots not in use included), and 2 more
    for the 16-bit copies of weights that backward needs (experts make theirs anew, a layer at a time). activations:
    what `rows` rows of T tokens keep for backward. work: a chunk of logits, or the backward pass of a layer of experts.
    """
    b, kept = 4 if precision == "fp32" else 2, kept_bytes(cfg, rows, precision, recompute, cuda=cuda)
    layer = (cfg.n_experts_max or cfg.n_experts) * 3 * cfg.d_model * cfg.d_expert  # numbers in the experts of a layer
    moe = sum(map(cfg.is_moe, range(cfg.n_layers)))
    work = layer * (4 + (b if b == 2 else 0)) + kept["rows"]  # gradients and 16-bit copies; rows
    parts = {
        "states": n_params * 16 + (2 * (n_params - moe * layer) if b == 2 else 0),
        "activations": kept["activations"],
        "work": max(kept["head"], work if moe else 0),
    }
    return parts | {"total": sum(parts.values())}


def on_meta(cfg: ModelConfig) -> Transformer:
    """The model without memory: for counting."""
    with torch.device("meta"):
        return Transformer(cfg)


def commit() -> str:
    """Of this checkout; with a + where its files differ."""
    try:
        words = ("describe", "--always", "--exclude=*", "--dirty=+")
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip() or "?"
    except OSError:
        return "?"


def describe(n: float, unit: str = "") -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {letter}{unit}" if unit else f"{n / size:.3g}{letter}"
    return f"{n:.3g} {unit}".strip()


# ---------------------------------------------------------------- many processes, simulated

MFU = {"dense": 0.38, "moe": 0.2}  # of the peak: torchtitan on H100, Llama 8B 33 to 39 %, DeepSeek-V3 16B 20.5 %
IMBALANCE = 1.25  # rows of the busiest rank with expert parallelism, times the fair share
DISK = 2e9  # bytes/s that a machine writes of a checkpoint
SIZES = (24, 40, 80, 141, 192)  # GB of GPUs on the market
RECOMPUTE = ("none", "selective", "block")


@dataclass(frozen=True)
class Layout:
    """How a model lies on `world` processes; names and meanings of the keys of train_fsdp.py, as plain numbers."""

    world: int = 1
    zero_stage: int = 0
    hsdp_shard_size: int = 0
    expert_parallel: int = 1
    reduce_bytes: int = 4
    cuda: bool = True  # GPUs: their loss holds more logits at a time than a CPU's

    def check(self, slots: int) -> Layout:
        """UserError E002 for a mesh that does not divide the world, or experts that do not divide."""
        world, size, ep = self.world, self.hsdp_shard_size, self.expert_parallel
        if size and world % size:
            raise UserError("E002", f"hsdp_shard_size: {size} does not divide the {world} ranks")
        if size == 1 and self.zero_stage:
            raise UserError("E002", "hsdp_shard_size: 1 leaves nothing to share: that is zero_stage: 0")
        if world % ep:
            raise UserError("E002", f"expert_parallel: {ep} does not divide the {world} ranks")
        if ep > 1 and (not slots or slots % ep):
            raise UserError("E002", f"expert_parallel: {ep} does not divide the {slots} experts of a layer")
        if ep > 1 and 0 < size < world:
            raise UserError("E002", "expert_parallel and hsdp_shard_size do not go together (never built): drop one")
        return self

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the dense weights."""
        return (self.hsdp_shard_size or self.world) if self.zero_stage else 1

    def __str__(self):
        dense = f"{self.world // self.shard} x {self.shard} (replicate, shard)"
        ep = self.expert_parallel
        return dense + (f"; experts {self.world // ep} x {ep} (shard, experts)" if ep > 1 else "")


@functools.lru_cache(maxsize=8)
def shapes(model: Transformer) -> tuple[tuple, list[tuple]]:
    """(name, shape) of the root's parameters; the same of each block's."""

    def of(named):
        return tuple((name, tuple(p.shape)) for name, p in named)

    blocks = [of(block.named_parameters()) for block in model.blocks]
    return of(x for x in model.named_parameters() if not x[0].startswith("blocks.")), blocks


def count(model: Transformer) -> int:
    """Parameters in all."""
    root, blocks = shapes(model)
    return sum(math.prod(shape) for block in (root, *blocks) for _, shape in block)


@functools.lru_cache(maxsize=8)
def training_flops(model: Transformer) -> int:
    return model.flops_per_token()


def cut(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension along which a parameter is cut into `ranks` parts: its first; of experts' (E, a, b) the first that
    divides evenly, so that a thousand ranks can share sixty-four experts."""
    return next((i for i, n in enumerate(shape) if n % ranks == 0), 0) if len(shape) == 3 else 0


class Unit(NamedTuple):
    """Parameters that are gathered together: FSDP2 cuts each into `ranks` parts."""

    shapes: tuple  # of its parameters
    ranks: int
    stride: int  # between neighbours of the group
    size: int  # bytes of a number while gathered

    def local(self, rank: int = 0) -> int:
        """Numbers that the rank-th of the group holds; the first holds most (torch.chunk)."""
        total = 0
        for shape in self.shapes:
            n = shape[cut(shape, self.ranks)]
            part = -(-n // self.ranks)
            total += max(0, min(part, n - rank * part)) * (math.prod(shape) // n)
        return total

    def padded(self) -> int:
        """Numbers while gathered: every part as large as the first."""
        return self.local() * self.ranks

    def gathered(self) -> int:
        """Bytes while gathered."""
        return self.padded() * self.size


@functools.lru_cache(maxsize=4096)
def units(model: Transformer, layout: Layout, precision: str) -> tuple[Unit, list[tuple[Unit, ...]]]:
    """What train_fsdp.parallelize makes: the root unit, and the units of each block."""
    b, ep, made = 4 if precision == "fp32" else 2, layout.expert_parallel, {}
    root, blocks = shapes(model)
    for block in set(blocks):
        parts = {"block": [], "router": [], "experts": []}
        for name, shape in block:
            apart = "experts" if ".experts." in name and ep > 1 else "block"
            apart = "router" if b < 4 and (".router." in name or ".predictor." in name) else apart
            parts[apart].append((shape[0] // ep, *shape[1:]) if apart == "experts" else shape)
        own = [Unit(tuple(parts["block"]), layout.shard, 1, b), Unit(tuple(parts["router"]), layout.shard, 1, 4)]
        own.append(Unit(tuple(parts["experts"]), layout.world // ep, ep, b))
        made[block] = tuple(u for u in own if u.shapes)
    return Unit(tuple(shape for _, shape in root), layout.shard, 1, 4), [made[block] for block in blocks]


def rank_memory(
    model, layout: Layout, rows: int, steps: int, precision: str, recompute="none", imbalance=1.0, seen=False
):
    """Estimated bytes at the peak of the rank that holds most, with `rows` rows in each of `steps` micro-steps.

    weights, moments, gradients: fp32, the rank's part. gathered: units in use and the one under way, in the compute
    dtype (root and routers fp32). reducing: gradients on their way to their owners. activations, work: see kept_bytes.
    The peak is the largest of: the loss, the backward pass of each block and of the root, the optimizer. Not in it:
    what the driver, the communication library and the allocator's gaps take. `seen`: only what train_fsdp.fake_run
    can see: no moments, not what the experts' operator allocates inside, logits in the smaller chunks of a CPU.
    """
    cfg, b, zero3 = model.cfg, 4 if precision == "fp32" else 2, layout.zero_stage == 3
    if layout.shard == 1:  # replicated: train.py
        n = count(model)
        parts = memory(cfg, n, rows, precision, recompute, layout.cuda)
        held = {"weights": 4 * n, "moments": 8 * n, "gradients": 4 * n, "gathered": parts["states"] - 16 * n}
        held |= {"reducing": 4 * min(n, 1 << 22) * (layout.world > 1)}
        held |= {"activations": parts["activations"], "work": parts["work"]}
        return held | {"total": sum(held.values()), "peak": "backward"}
    root, blocks = units(model, layout, precision)
    arrive = imbalance if layout.expert_parallel > 1 else 0.0
    kept = kept_bytes(cfg, rows, precision, recompute, arrive, layout.cuda and not seen)
    table, stream = 4 * cfg.vocab_size * cfg.d_model, rows * cfg.max_seq_len * cfg.d_model * b
    sizes = {block: [sum(f(u) for u in block) for f in (Unit.local, Unit.padded, Unit.gathered)] for block in blocks}
    own, padded, gathered = zip(*(sizes[block] for block in blocks))
    mine = 4 * (root.local() + sum(own))
    everything = 0 if zero3 else sum(gathered)
    waiting = layout.reduce_bytes * (root.padded() + sum(padded)) * (layout.zero_stage == 1 and steps > 1)

    def phase(name, gathered, reducing, activations, work, gradients=mine):
        gradients = mine if steps > 1 else gradients
        return {"gradients": gradients, "gathered": gathered + everything, "reducing": reducing + waiting} | {
            "activations": activations,
            "work": work,
            "peak": name,
        }

    lead = rows * cfg.max_seq_len * cfg.d_model * (4 + 2 * b)  # what the last norm keeps
    phases = [phase("loss", root.gathered(), 0, lead + sum(kept["kept"]), kept["head"] + table // 2 * (b < 4), 0)]
    gone, there, flying = (
        0,
        sum(kept["kept"]),
        0,
    )  # bytes of gradients that are home, of activations, of those under way
    for i in reversed(range(cfg.n_layers)):
        # the next unit is on its way, or the last one's buffer is still there
        more = max((u.gathered() for u in (*blocks[i][1:], *(blocks[i - 1] if i else ()))), default=0)
        held = root.gathered() + (gathered[i] + more) * zero3
        work = 2 * stream + (kept["travel"] + kept["rows"] * (not seen)) * cfg.is_moe(i)
        acts = there + kept["again"][i]
        there -= kept["kept"][i]
        name, most = f"backward of block {i}", max(u.gathered() for u in blocks[i])
        phases.append(phase(name, held, table + most + flying, acts, work, gone))  # the head's gradient waits, too
        for u in reversed(blocks[i]):  # experts of their own come first, then what is left
            rest = there + kept["attention"][i] * (u is not blocks[i][0])
            flying = layout.reduce_bytes * u.padded()
            held -= u.gathered() * zero3
            phases.append(phase(name, held, table + u.gathered() + flying, rest, 2 * stream, gone))
            gone += 4 * u.local()
    ends = (4 + layout.reduce_bytes) * root.padded() + table * cfg.tie_embeddings
    phases += [phase("backward of the root", 0, ends, 0, stream), phase("optimizer", 0, 0, 0, 0)]
    most = max(phases, key=lambda p: sum(v for k, v in p.items() if k != "peak"))
    held = {"weights": mine, "moments": 0 if seen else 2 * mine} | most
    return held | {"total": sum(v for k, v in held.items() if k != "peak")}


def travel(hw: Hardware, n_bytes: float, ranks: int, stride: int = 1, each: bool = False) -> float:
    """Seconds in which each of `ranks` gets n_bytes from all of them: rings over every link and network card.

    In a ring a machine lets each byte in once and spreads it inside; `each`: every rank gets other bytes (all-to-all).
    """
    near = min(ranks, max(1, hw.per_node // stride))  # of the group in one machine
    inside = n_bytes * (near - 1) / (ranks if each else near) / hw.link
    outside = n_bytes * (1 - near / ranks) / (1 if each else near) / hw.network
    return max(inside, outside)


def traffic(model, layout: Layout, rows: int, steps: int, precision: str, recompute="none", imbalance=1.0) -> dict:
    """What a rank receives in an optimizer step: name -> [(bytes, ranks of the group, stride)]."""
    cfg, b, world = model.cfg, 4 if precision == "fp32" else 2, layout.world
    root, blocks = units(model, layout, precision)
    out = {"all-gather": [], "reduce-scatter": [], "all-reduce": [], "all-to-all": []}
    if layout.shard == 1:
        return out | {"all-reduce": [(2 * 4 * count(model), world, 1)]}
    sends = steps if layout.zero_stage > 1 else 1
    each = [(root, 1, 1)]  # a unit, how many are alike, how often it is gathered in a micro-step
    for block, k in Counter(
        blocks
    ).items():  # for forward and backward; units inside a block also when it is made again
        each += [(u, k, 2 + (u is not block[0] and recompute != "none")) for u in block]
    for unit, alike, times in each:
        times = times * steps if layout.zero_stage == 3 else 1
        out["all-gather"] += [(alike * times * unit.padded() * unit.size, unit.ranks, unit.stride)]
        out["reduce-scatter"] += [(alike * sends * unit.padded() * layout.reduce_bytes, unit.ranks, unit.stride)]
        if layout.shard < world:  # between the copies, once a step
            message = 2 * alike * unit.local() * layout.reduce_bytes
            out["all-reduce"] += [(message, world // layout.shard, layout.shard)]
    if layout.expert_parallel > 1:  # there and back, in forward, in backward, and when forward is made again
        moe, trips = sum(map(cfg.is_moe, range(cfg.n_layers))), 4 + 2 * (recompute != "none")
        pairs = rows * cfg.max_seq_len * cfg.n_experts_per_token * imbalance
        out["all-to-all"] += [(moe * trips * steps * pairs * cfg.d_model * b, layout.expert_parallel, 1)]
    return out


def simulate(
    model: Transformer,
    layout: Layout,
    rows: int,
    rows_per_step: int,
    precision: str,
    recompute: str,
    hw: Hardware,
    mfu: float,
    imbalance: float = IMBALANCE,
) -> dict:
    """Memory, traffic and seconds of a step, all of it arithmetic: nothing here was measured.

    seconds: compute (FLOPs at `mfu` of the peak, blocks that are made again among them, the busiest rank's experts;
    activations that are made again are written and read once more); what is gathered and reduced in every micro-step is
    hidden behind it where it is shorter, what is once a step behind the backward pass of one micro-step; train.py's
    reduction, all-to-all and the optimizer (32 bytes a parameter) are not hidden.
    """
    cfg, steps = model.cfg, rows_per_step // (rows * layout.world)
    args = (rows, steps, precision, recompute, imbalance)
    found = {"layout": layout, "rows": rows, "steps": steps, "recompute": recompute}
    found |= {"memory": rank_memory(model, layout, *args), "traffic": traffic(model, layout, *args)}
    flops = training_flops(model)
    again = (flops - 6 * cfg.vocab_size * cfg.d_model) / 3 if recompute == "block" else 0
    if layout.expert_parallel > 1:
        experts = 18 * cfg.d_model * cfg.d_expert * model.experts_used() * sum(map(cfg.is_moe, range(cfg.n_layers)))
        again += (imbalance - 1) * experts * (4 / 3 if recompute == "block" else 1)
    seconds = {"compute": (flops + again) * rows * cfg.max_seq_len * steps / (hw.peak(precision) * mfu)}
    remade = sum(sum(kept_bytes(cfg, rows, precision, k)["kept"]) * sign for k, sign in (("none", 2), (recompute, -2)))
    seconds["compute"] += max(0, remade) * steps / hw.bandwidth
    for name, messages in found["traffic"].items():
        seconds[name] = sum(travel(hw, n, ranks, stride, name == "all-to-all") for n, ranks, stride in messages)
    seconds["optimizer"] = 8 * found["memory"]["weights"] / hw.bandwidth
    each = {3: ("all-gather", "reduce-scatter"), 2: ("reduce-scatter",)}.get(layout.zero_stage, ())
    each = sum(seconds[k] for k in each)
    once = seconds["all-gather"] + seconds["reduce-scatter"] + seconds["all-reduce"] - each
    room = seconds["compute"] * 2 / 3 / steps if layout.shard > 1 else 0.0
    exposed = max(0.0, each - seconds["compute"]) + max(0.0, once - room)
    seconds["step"] = seconds["compute"] + exposed + seconds["all-to-all"] + seconds["optimizer"]
    return found | {"seconds": seconds}


def candidates(world: int, stage: int, slots: int, rows_per_step: int, reduce_bytes: int = 4, cuda: bool = True):
    """(layout, micro-batch, recompute) of every configuration that train_fsdp.py would take."""

    def divisors(n):
        return [k for k in range(1, n + 1) if n % k == 0]

    shapes = [(0, 1)]  # hsdp_shard_size, expert_parallel
    if stage:
        shapes += [(size, 1) for size in divisors(world)[1:-1]]
        shapes += [(0, ep) for ep in divisors(math.gcd(world, slots))[1:]]
    layouts = [Layout(world, stage, size, ep, reduce_bytes, cuda) for size, ep in shapes]
    for layout in layouts:
        for rows in divisors(rows_per_step // world) if rows_per_step % world == 0 else ():
            for recompute in RECOMPUTE:
                yield layout, rows, recompute


def cheapest(model, world: int, stage: int, rows_per_step: int, precision: str, hw: Hardware, room: float, **assumed):
    """The candidate that fits into `room` bytes with the shortest step, or None. Of equal ones that which sends least:
    the assumed mfu is the same for every micro-batch."""
    slots = (model.cfg.n_experts_max or model.cfg.n_experts) if model.cfg.n_experts else 0
    best, kind = None, (assumed.pop("reduce_bytes", 4), assumed.pop("cuda", True))
    for layout, rows, recompute in candidates(world, stage, slots, rows_per_step, *kind):
        found = simulate(model, layout, rows, rows_per_step, precision, recompute, hw, **assumed)
        sent = sum(found["seconds"][k] for k in found["traffic"])
        key = (found["seconds"]["step"], sent, found["memory"]["total"])
        if found["memory"]["total"] <= room and (best is None or key < best[0]):
            best = key, found
    return best and best[1]


def hardware(name: str, m: Machine, given: dict) -> Hardware:
    """The table's row, or this machine measured (`measured`; `cpu`: its CPU), with what `given` overrides.

    given: peak_flops, memory_gb, link_gb_s, network_gb_s, gpus_per_node. UserError E002: see hardware_key.
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
        share = max(local, given.get("gpus_per_node", 1)) if device.type == "cpu" else 1  # processes share a CPU
        sizes = (x / share for x in (speed, speed, total_memory(device), 2 * len(block) / best))
        base = Hardware(*sizes, PCIE, 8 * ETHERNET / max(local, given.get("gpus_per_node", 1)), local, source)
    else:
        base = HARDWARE[key]
    units = {"peak_flops": ("flops", 1), "memory_gb": ("memory", 1e9), "link_gb_s": ("link", 1e9)}
    units |= {"network_gb_s": ("network", 1e9), "gpus_per_node": ("per_node", 1)}
    changed = {units[k][0]: v * units[k][1] for k, v in given.items() if k in units}
    return replace(base, **changed, source=base.source + f"; given: {', '.join(changed)}" * bool(changed))


def table_lines(head: str, rows: list[list]) -> list[str]:
    """Columns under `head`'s words, numbers to the right."""
    cells = [head.split("|"), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:])) for row in cells]


def parameter_lines(model: Transformer, layout: Layout, precision: str) -> list[str]:
    """Where the parameters are: in all, active for a token, and on the rank that holds most."""
    cfg, ranks = model.cfg, layout.shard
    kinds = {"embeddings": 0, "attention": 0, "dense FFN": 0, "shared experts": 0, "experts": 0, "routers, norms": 0}
    most, active = dict(kinds), dict(kinds)
    for block in (shapes(model)[0], *shapes(model)[1]):
        for name, shape in block:
            n = math.prod(shape)
            kind = "embeddings" if name.startswith(("embed", "head")) else "routers, norms"
            kind = "attention" if ".wqkv." in f".{name}" or ".wo." in f".{name}" else kind
            if ".w13" in name or ".w2" in name:
                kind = "experts" if ".experts." in name else "shared experts" if ".shared." in name else "dense FFN"
            kinds[kind] += n
            used = model.experts_used() / max(1, cfg.n_experts_max or cfg.n_experts) if kind == "experts" else 1
            active[kind] += n * used
            apart, ep = kind == "experts", layout.expert_parallel
            here = Unit(((shape[0] // ep, *shape[1:]),), layout.world // ep, ep, 4) if apart and ep > 1 else None
            most[kind] += (here or Unit((shape,), ranks, 1, 4)).local()
    rows = [[k, f"{n:,}", f"{round(active[k]):,}", f"{most[k]:,}"] for k, n in kinds.items() if n]
    rows.append(["all", *(f"{round(sum(x.values())):,}" for x in (kinds, active, most))])
    return table_lines("parameters|total|active|on the fullest rank", rows)


def name_of(found: dict) -> str:
    """A configuration as the command line has it."""
    at, text = found["layout"], ""
    text += f"--expert_parallel={at.expert_parallel} " if at.expert_parallel > 1 else ""
    text += f"--hsdp_shard_size={at.hsdp_shard_size} " if at.shard < at.world and at.zero_stage else ""
    return f"{text}--batch_size={found['rows']} --activation_checkpointing={found['recompute']}"


def dry_run_lines(
    model: Transformer,
    layout: Layout,
    rows: int,
    rows_per_step: int,
    max_steps: int,
    precision: str,
    recompute: str,
    name: str,
    hw: Hardware,
    mfu: float | None = None,
    imbalance: float = IMBALANCE,
    disk_gb_s: float = DISK / 1e9,
    share: float = 0.92,
) -> tuple[list[str], dict]:
    """The simulation of a run, a line each: parameters, mesh, memory, checkpoint, traffic, time, the cheapest way; and
    what simulate found of that, or of the run as it is where nothing fits."""
    cfg, world, GB = model.cfg, layout.world, 1e9
    slots = (cfg.n_experts_max or cfg.n_experts) if cfg.n_experts else 0
    layout.check(slots)
    mfu = mfu or MFU["moe" if cfg.n_experts else "dense"]
    assumed = {"mfu": mfu, "imbalance": imbalance}
    here = {k: simulate(model, layout, rows, rows_per_step, precision, k, hw, **assumed) for k in RECOMPUTE}
    now, tokens = here[recompute], rows_per_step * cfg.max_seq_len
    lines = [
        f"SIMULATION of {world:,} x {name}: arithmetic on data sheets and assumptions, nothing below was measured",
        *parameter_lines(model, layout, precision),
        f"mesh       {layout}, zero_stage {layout.zero_stage}; {precision}",
    ]
    names = ("weights", "gradients", "moments", "gathered", "reducing", "activations", "work", "total")
    body = [
        [k, *(f"{s['memory'][n] / 2**30:.2f}" for n in names)]
        + [" ".join(f"{g}" if s["memory"]["total"] <= share * g * GB else "-" for g in SIZES)]
        for k, s in here.items()
    ]
    lines.append(f"memory     GiB on the fullest rank by activation_checkpointing (here: {recompute}), {rows} rows of"
                 f" {cfg.max_seq_len} tokens; fits {share:.0%} of so many GB")  # fmt: skip
    lines += table_lines(f"keep|{'|'.join(names)}|fits GB", body)
    size, nodes = 12 * count(model), -(-layout.shard // hw.per_node)
    lines.append(f"checkpoint {describe(size, 'B')}: {size / nodes / disk_gb_s / GB:.0f} s from {nodes} machines at"
                 f" {disk_gb_s:g} GB/s each (assumed)")  # fmt: skip
    s = now["seconds"]
    for kind, messages in now["traffic"].items():
        if n := sum(m[0] * (m[1] > 1) for m in messages):
            lines.append(f"traffic    {kind} {n / GB:,.1f} GB a step and rank: {s[kind]:.3g} s")
    peak = describe(hw.peak(precision), "FLOP/s")
    lines.append(f"time       {s['step']:.3g} s a step of {tokens:,} tokens ({now['steps']} micro-steps): compute"
                 f" {s['compute']:.3g} s at {mfu:.0%} of {peak}, optimizer {s['optimizer']:.2g} s;"
                 f" {describe(tokens / s['step'])} tokens/s")  # fmt: skip
    took, busy = s["step"] * max_steps, "GPU-hours"
    units = world / 3600
    if not layout.cuda:
        units, busy = units * torch.get_num_threads() / hw.per_node, "core-hours"
    never = ": not on this machine" if took > YEAR and name in ("cpu", "measured") else ""
    lines.append(f"length     {max_steps:,} steps, {describe(tokens * max_steps)} tokens: {span(took)},"
                 f" {describe(took * units)} {busy}{never}")  # fmt: skip
    lines += [
        f"assumed    link {hw.link / GB:g} GB/s, network {hw.network / GB:g} GB/s a GPU, {hw.per_node} in a machine:"
        f" {hw.source}",
        f"assumed    mfu {mfu:g} (torchtitan on H100: dense 8B 0.33 to 0.39, MoE 16B 0.205; Lumen's own is not known);"
        f" gathers and reductions hide behind the compute of their micro-step, all-to-all and optimizer do not;"
        + f" the busiest rank gets {imbalance:g} x the fair share of rows"
        * (layout.expert_parallel > 1),
    ]
    best = cheapest(model, world, layout.zero_stage, rows_per_step, precision, hw, share * hw.memory,
                    reduce_bytes=layout.reduce_bytes, cuda=layout.cuda, **assumed)  # fmt: skip
    if best:
        b = best["seconds"]["step"]
        lines.append(f"cheapest   {name_of(best)}: {best['memory']['total'] / 2**30:.1f} GiB, {b:.3g} s a step,"
                     f" {describe(b * max_steps * units)} {busy}")  # fmt: skip
    else:
        lines.append(f"cheapest   none: no configuration fits {world} x {hw.memory / GB:.0f} GB")
    least, asked = smallest_machines(model, layout.zero_stage, rows_per_step, precision, share)
    text = f"{', '.join(least)} hold it"
    if not layout.zero_stage and not asked:
        parts, _ = smallest_machines(model, 3, rows_per_step, precision, share)
        text += f" in whole copies; train_fsdp.py needs {' or '.join(parts)}"
    lines.append(f"smallest   {text} (powers of two that divide the batch, to 4,096)")
    return lines, best or now


YEAR = 365.25 * 86400


def span(seconds: float) -> str:
    """A length of time in the unit that one thinks of it in: 45 s, 3.2 hours, 40,000 years."""
    for unit, size in (("years", YEAR), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            n = float(f"{seconds / size:.3g}")
            return f"{n:,.0f} {unit}" if n >= 100 else f"{n:g} {unit}"
    return f"{seconds:.3g} s"


def smallest_machines(model, stage: int, rows_per_step: int, precision: str, share: float) -> tuple[list[str], bool]:
    """The fewest GPUs of 80 and of 141 GB that hold it, as text; whether both sizes do."""
    found = {gb: smallest(model, stage, rows_per_step, precision, share * gb * 1e9) for gb in (80, 141)}
    return [f"{n or 'none'} x {gb} GB" for gb, n in found.items()], all(found.values())


def smallest(model, stage: int, rows_per_step: int, precision: str, room: float) -> int | None:
    """The least power of two of GPUs, up to 4096, on which some configuration fits into `room` bytes each."""
    slots = (model.cfg.n_experts_max or model.cfg.n_experts) if model.cfg.n_experts else 0
    for world in (1 << k for k in range(13)):
        if rows_per_step % world:
            return None
        for layout, rows, recompute in candidates(world, stage if world > 1 else 0, slots, rows_per_step):
            if rows == 1 and recompute == "block":  # what needs least
                steps = rows_per_step // world
                if rank_memory(model, layout, rows, steps, precision, recompute, IMBALANCE)["total"] <= room:
                    return world
    return None


# ---------------------------------------------------------------- what does not fit

SURE = 1.1  # a run is refused only this far above the memory: measured, the estimate was at most 6.4 % too high


def misfit(
    model: Transformer, layout: Layout, rows: int, rows_per_step: int, how: tuple, have: float, share: float = 0.92
) -> tuple[str, bool]:
    """Why a run cannot fit into `have` bytes a process, and what could, or ""; and whether that is beyond doubt.

    Beyond doubt are states (weights, gradients, moments: exact) above the memory, and an estimate SURE times it.
    how: (precision, recompute). What is named instead leaves room: it takes `share` of the memory.
    """
    per_rank, recompute, there = rows_per_step // layout.world, how[1], f"{have / 2**30:.1f} GiB"

    def need(rows, recompute):
        return rank_memory(model, layout, rows, per_rank // rows, how[0], recompute, IMBALANCE)

    now = need(rows, recompute)
    states, total = 4 * now["weights"], now["total"]
    if max(states, total) <= have:
        return "", False
    would = []
    for mode in RECOMPUTE[RECOMPUTE.index(recompute) :]:
        sizes = [r for r in range(1, rows + 1) if per_rank % r == 0 and need(r, mode)["total"] <= share * have]
        words = [] if mode == recompute else [f"activation_checkpointing: {mode}"]
        if sizes and max(sizes) < rows:
            words.append(f"batch_size: {max(sizes)}")
        if sizes and words:
            would.append(" with ".join(words))
    text = f"about {total / 2**30:.1f} GiB a process, and there are {there}"
    if would:
        return f"{text}; {' or '.join(would)} would fit", total > SURE * have
    if states > have:
        text = f"weights, gradients and moments alone are {states / 2**30:.1f} GiB a process, and there are {there}:"
        text = f"{text} no batch_size helps"
    else:
        least = need(1, "block")["total"] / 2**30
        text = f"{text}, and one row with activation_checkpointing: block still needs about {least:.1f}"
    return f"{text}. {who_holds(model, layout, share)}", states > have or total > SURE * have


def who_holds(model: Transformer, layout: Layout, share: float) -> str:
    """The smallest GPU for whole copies and the fewest for parts, whatever the batch; in mixed_bf16, of one row."""
    need = rank_memory(model, Layout(), 1, 2, "mixed_bf16", "block")["total"]
    whole = next((f"a GPU of {gb} GB" for gb in SIZES if need <= share * gb * 1e9), "more than any GPU has")
    parts, _ = smallest_machines(model, layout.zero_stage or 3, 1 << 13, "mixed_bf16", share)
    return f"Whole copies need about {need / 2**30:.1f} GiB: {whole}; train_fsdp.py needs {' or '.join(parts)}"


def depths(cfg: ModelConfig) -> tuple[int, int]:
    """Two numbers of layers between which a model grows by a whole period of its pattern; from three periods on, as the
    block before and the block behind the one in backward hold memory too."""
    period = math.lcm(cfg.moe_every, cfg.mod_every if cfg.mod_capacity != 1 else 1)
    if (
        cfg.moe_layers
        or cfg.mod_layers
        or isinstance(cfg.mod_capacity, list)
        or cfg.mod_end_layer
        or cfg.mod_start_layer
    ):
        raise ValueError("layers are listed one by one: no straight line leads from few to all")
    first = cfg.n_dense_layers + 3 * period
    if first + period > cfg.n_layers:
        raise ValueError(f"{cfg.n_layers} layers are too few")
    return first, first + period


def shallow(cfg: ModelConfig, n_layers: int) -> ModelConfig:
    return replace(cfg, n_layers=n_layers)


def compared_lines(seen: dict[int, dict], model: Transformer, layout, rows, precision, recompute) -> list[str]:
    """What a fake run saw at two depths (layers -> its peak) beside rank_memory, and both extended to the model."""
    name = name_of({"layout": layout, "rows": rows, "recompute": recompute})

    def planned(n):
        there = model if n == whole else on_meta(shallow(model.cfg, n))
        return rank_memory(there, layout, rows, 1, precision, recompute, 1.0, True)["total"]

    (a, b), whole, GiB = sorted(seen), model.cfg.n_layers, 2**30
    saw = {n: seen[n]["Total"] for n in (a, b)}
    far = saw[b] + (saw[b] - saw[a]) / (b - a) * (whole - b)
    text = "; ".join(f"{n} layers {saw[n] / GiB:.2f}, plan {planned(n) / GiB:.2f}" for n in (a, b))
    off = planned(whole) / far - 1
    return [
        f"checked    {name}, on fake tensors; GiB at the peak, balanced, without moments and inside of experts: {text}",
        f"checked    {whole} layers by a straight line {far / GiB:.2f}, plan {planned(whole) / GiB:.2f}: {off:+.1%}",
    ]


# ---------------------------------------------------------------- how long to train

# L(N, D) = E + A/N^a + B/D^b: Besiroglu et al. 2024 (2404.10102), the refit of "Chinchilla" (Hoffmann et al. 2022).
# E, 1.8172 nats of another text and tokenizer, is not needed: only ratios of compute and tokens carry over.
LAW_A, LAW_B, LAW_a, LAW_b = 482.01, 2085.43, 0.3478, 0.3658
FITTED = {"parameters": (57e6, 16e9), "tokens": (0.25e9, 318e9), "FLOPs": (1.4e18, 1.3e22)}  # where the law was fitted
REPEAT = 15.388  # epochs over which the worth of a repeat falls by 1/e: Muennighoff et al. 2023 (2305.16264)
BAND = (10, 40)  # tokens a parameter between which the optimum is flat: at most 8 % more compute for the same loss
MIN_GAIN = 0.005  # nats that are not worth waiting for


def optimum(flops: float) -> tuple[float, float]:
    """(parameters, tokens) of the lowest loss at `flops` = 6ND: N = G (C/6)^(b/(a+b)), G = (aA/bB)^(1/(a+b))."""
    n = (LAW_a * LAW_A / (LAW_b * LAW_B)) ** (1 / (LAW_a + LAW_b)) * (flops / 6) ** (LAW_b / (LAW_a + LAW_b))
    return n, flops / 6 / n


def effective_tokens(unique: float, tokens: float) -> float:
    """What `tokens` on `unique` ones are worth in fresh ones: U + U R (1 - e^-(epochs - 1)/R) (Muennighoff)."""
    return tokens if tokens <= unique else unique * (1 + REPEAT * (1 - math.exp(-(tokens / unique - 1) / REPEAT)))


def extra_compute(n_params: float, tokens: float, fresh: float | None = None) -> float:
    """Compute 6ND beyond the least that reaches the same loss, as a share: 0.08 is 8 % more. `fresh`: D's worth.

    On the optimal path A/N^a + B/D^b falls as C^-g, g = ab/(a+b), which inverts in closed form.
    """
    above = LAW_A * n_params**-LAW_a + LAW_B * (fresh or tokens) ** -LAW_b
    n, d = optimum(6.0)
    least = ((LAW_A * n**-LAW_a + LAW_B * d**-LAW_b) / above) ** (1 / LAW_a + 1 / LAW_b)
    return n_params * tokens / least - 1


def chinchilla(
    n_params_active: int,
    unique_tokens: int,
    planned_tokens: int,
    flops_per_token: float,
    multiplier: float = 20.0,
    moe: bool = False,
) -> dict:
    """Whether a run's length fits its model and data, in counts and ratios; the target: multiplier x active tokens."""
    n, unique, tokens = n_params_active, max(1, unique_tokens), max(1, planned_tokens)
    fresh, ratio, epochs = effective_tokens(unique, tokens), tokens / n, tokens / unique
    here = {"parameters": n, "tokens": tokens, "FLOPs": 6.0 * n * tokens}
    plan = {"n_params_active": n, "flops_per_token": flops_per_token, "unique_tokens": unique, "planned_tokens": tokens}
    plan |= {"multiplier": multiplier, "moe": moe, "target_tokens": multiplier * n, "tokens_per_param": ratio}
    plan |= {"epochs": epochs, "effective_tokens": fresh, "coverage": fresh / (multiplier * n)}
    plan |= {"last_epoch_value": math.exp(-max(0.0, epochs - 1) / REPEAT)}
    plan |= {"band": "below" if ratio < BAND[0] else "above" if ratio > BAND[1] else "inside"}
    plan |= {"extra_compute": extra_compute(n, tokens, fresh)}
    plan |= {"extrapolated": [k for k, (low, high) in FITTED.items() if not low <= here[k] <= high]}
    # parameters that the data fit: in 4 epochs, nearly as good as fresh; in 22, all that is worth repeating, and lean
    fits = (effective_tokens(unique, 4 * unique) / multiplier, effective_tokens(unique, 22 * unique) / BAND[0])
    plan |= {"fitting_params": fits, "data_limited": unique < multiplier * n / 8}
    return plan


def plan_lines(plan: dict) -> list[str]:
    """The start-up lines on a chinchilla() plan, advice last."""
    p, d = plan, describe
    per_token, repeats = d(p["flops_per_token"], "FLOP"), f" (repeats count as {d(p['effective_tokens'])} tokens)"
    compute = f"needs {1 + p['extra_compute']:.3g} times the compute that the best size and length would need"
    if p["extra_compute"] < 0.05:
        compute = "no other size and length would need much less compute"
    far = f"; extrapolated: {', '.join(p['extrapolated'])} outside the law's data" if p["extrapolated"] else ""
    lines = [
        f"plan       {d(p['n_params_active'])} active parameters, {per_token} a token; {d(p['planned_tokens'])} tokens"
        f" planned, {d(p['unique_tokens'])} unique: {p['epochs']:.2f} epochs",
        f"plan       target {d(p['target_tokens'])} tokens, {p['multiplier']:g} a parameter: coverage"
        f" {100 * p['coverage']:.3g} %{repeats if p['epochs'] > 1 else ''}",
        f"plan       {p['tokens_per_param']:.3g} tokens a parameter, {p['band']} the flat band {BAND[0]} to {BAND[1]}:"
        f" {compute} for this loss{far}",
    ]
    if p["moe"]:
        lines += ["plan       that law is of dense models, on active parameters a lower bound: MoE usually wants more"]
    if p["epochs"] > 4:
        lines += [f"advice     beyond 4 epochs repeats fade: a token of the last counts {p['last_epoch_value']:.2f}"]
    if p["data_limited"]:
        low, high = map(d, p["fitting_params"])
        lines += [f"advice     data-limited: these tokens fit {low} (4 epochs) to {high} parameters; or add data"]
    return lines


def auto_steps(
    n_params_active: int,
    unique_tokens: int,
    tokens_per_step: int,
    multiplier: float = 20.0,
    min_epochs: float = 0.0,
    max_epochs: float = 50.0,
) -> tuple[int, str]:
    """auto_epoch_scaling: steps for `multiplier` tokens an active parameter, in epochs never rounded up; and why."""
    target = multiplier * n_params_active
    wanted = target / max(1, unique_tokens)
    epochs = min(max(wanted, min_epochs), max_epochs)
    steps = max(1, round(epochs * unique_tokens / tokens_per_step))
    why = f"{multiplier:g} x {describe(n_params_active)} = {describe(target)} tokens are {describe(wanted)} epochs"
    if epochs != wanted:
        why += f", clamped to {'max' if epochs < wanted else 'min'}_epochs {epochs:g}"
    if epochs > 4:
        why += f", worth {effective_tokens(1, epochs):.3g} fresh ones"
    return steps, f"length     {steps:,} steps by auto_epoch_scaling: {why}"


# ---------------------------------------------------------------- during the run


def posterior(past: np.ndarray, y: np.ndarray, prior: np.ndarray, noise: float):
    """Linear models past[g] (n, k) of y (n), averaged by their evidence -> (moments, rms of the best one's residuals).

    `prior`: means and sds of the k coefficients. moments(x): mean and sd of the coefficients' product with x (g, k).
    """
    mu, precision = prior[0], prior[1] ** -2.0
    H = past.transpose(0, 2, 1) @ past / noise**2 + np.diag(precision)
    b = np.linalg.solve(H, ((y @ past) / noise**2 + mu * precision)[..., None])[..., 0]
    rss = np.square(y - (past @ b[..., None])[..., 0]).sum(1)
    score = -(rss / noise**2 + (np.square(b - mu) * precision).sum(1) + np.linalg.slogdet(H)[1]) / 2
    p = np.exp(score - score.max())
    p /= p.sum()

    def moments(x: np.ndarray) -> tuple[float, float]:
        m, v = (x * b).sum(1), (x * np.linalg.solve(H, x[..., None])[..., 0]).sum(1)
        return float(p @ m), math.sqrt(p @ (v + np.square(m - p @ m)))

    return moments, math.sqrt(rss[score.argmax()] / max(1, len(y) - 3))


class Forecast:
    """Where a run stands and where its training loss will end: `add` at every step (or log step), `status` at times.

    L = L0 + A S^-a + C M: S is the integral of (lr/peak)^q over tokens, M the mean of lr/peak over about the last 3 %
    of the run. At q 1 it is the law of Tissue et al. 2024 (2408.11029), whose S2 is 1 - M. Bayesian: evidence weighs
    a grid of a and q, Gaussian priors on L0, A, C (before a decay the data do not hold C), on the last 60 % of at most
    256 windows of equal length. Back-test on our own CPU runs (42 k to 1.1 M parameters, 300 to 3200 steps, four
    schedules, an add a step): at 25, 50, 75 % of the run the 90 % interval held the truth in 17, 18, 18 of the 18 runs
    that set priors and WIDTH and in 13, 13, 10 of 13 others. With an add in 50 steps it is too narrow.
    """

    LIMIT, LEAST, CUT = 256, 6, 0.4  # windows, at most and at least; share of them left out of the fit
    FLAT = 0.05  # nats per e-fold of compute
    A_GRID, Q_GRID, LAG = np.array([[0.05], [0.1], [0.2], [0.3], [0.4], [0.5]]), (0.0, 0.5, 1.0), 0.03
    ANNEAL = (0.22, 0.12)  # prior of C in nats, mean and sd: what our own small runs gave
    WIDTH = (0.75, 0.15)  # the interval's factors of the fit's sd and of the predicted drop, set by the back-test

    def __init__(self):
        self.windows: list[list[float]] = []  # last token; means of FLOPs, loss, lr
        self.part = [0.0] * 5  # the window being filled: adds, last token, three sums
        self.per = 1  # adds in a window

    def add(self, tokens: float, flops: float, loss: float, lr: float) -> None:
        """Tokens and FLOPs since the start, loss (nats) and rate of this step. What is not finite is left out."""
        last = max(self.part[1], self.windows[-1][0] if self.windows else 0.0)
        if not all(map(math.isfinite, (tokens, flops, loss, lr))) or tokens == last:  # a dropped step adds no tokens
            return
        if tokens < last:  # the run was rolled back
            self.windows, self.part = [w for w in self.windows if w[0] < tokens], [0.0] * 5
        sums = [a + b for a, b in zip(self.part[2:], (flops, loss, lr))]
        self.part = [self.part[0] + 1, float(tokens), *sums]
        if self.part[0] >= self.per:
            self.windows.append([self.part[1], *(x / self.part[0] for x in sums)])
            self.part = [0.0] * 5
        if len(self.windows) >= self.LIMIT:  # neighbours become one
            pairs = zip(self.windows[::2], self.windows[1::2])
            self.windows = [[b[0], *((x + y) / 2 for x, y in zip(a[1:], b[1:]))] for a, b in pairs]
            self.per *= 2

    def state_dict(self) -> dict:
        return {"windows": [list(w) for w in self.windows], "part": list(self.part), "per": self.per}

    def load_state_dict(self, state: dict) -> None:
        self.windows, self.part, self.per = [list(w) for w in state["windows"]], list(state["part"]), state["per"]

    def status(self, planned_tokens: float, lr_of: Callable[[float], float], unique_tokens: float = 0) -> dict | None:
        """Where the run stands; `lr_of(share of planned tokens)` is its schedule. None: too few points to say.

        share: of the tokens. phase: warm-up while the rate still rises (then it, share and recommendation are all);
        annealing below half the peak rate; else by the slope's upper bound: rising below -FLAT, converged? when twice
        the compute gives under MIN_GAIN, flattening below FLAT, learning. slope: -dL/dlnC over the last 20 % of
        compute, nats per e-fold. now: the fitted loss. final: mean training loss of the last 5 % of tokens. gained:
        share of the drop from the end of warm-up to `final`. anneal_gain: what lowering the rate adds to it;
        stable_gain: what the tokens still to come at the peak rate add (None: they are under 5 % of the run). *_low,
        *_high: 90 % intervals.
        """
        if len(self.windows) < self.LEAST or not 0 < planned_tokens < math.inf:
            return None
        last, flops, loss, lr = np.array(self.windows).T
        n, left = len(loss), max(planned_tokens - last[-1], 1e-6 * planned_tokens)
        ahead = last[-1] + left * (np.arange(64) + 0.5) / 64
        to_come = np.array([lr_of(min(1.0, x / planned_tokens)) for x in ahead], dtype=float)
        peak = max(lr.max(), to_come.max())
        if not 0 < peak < math.inf:
            return None
        found = {"share": min(1.0, max(last[-1], self.part[1]) / planned_tokens)}
        if to_come.max() > 1.01 * lr.max():
            return found | {"phase": "warm-up", "recommendation": "continue: the rate still rises"}
        top = int(np.argmax(lr > 0.98 * lr.max()))
        first = max(top, int(self.CUT * n))
        if n - first < self.LEAST - 2:
            return None

        # the law's terms at the windows kept and at 64 points ahead, for every node of the grid
        rate = np.concatenate([lr, to_come]) / peak
        step = np.concatenate([np.diff(last, prepend=0.0), np.full(64, left / 64)])
        stable = float((to_come > 0.98 * peak).mean()) * left  # tokens to come before the decay
        M, mean = [], rate[first]
        for x, keep in zip(rate[first:].tolist(), np.exp(-step[first:] / (self.LAG * planned_tokens)).tolist()):
            M.append(mean := keep * mean + (1 - keep) * x)
        X, early = [], []
        for q in self.Q_GRID:
            S = np.cumsum(rate**q * step)
            S, done = (S - rate**q * step / 2)[first:], S[n - 1]  # a window's loss stands at its middle
            power = (S / done) ** -self.A_GRID
            X.append(np.stack([np.ones_like(power), power, np.tile(M, (len(power), 1))], 2))
            early.append((np.maximum(S - stable, done) / done) ** -self.A_GRID)
        X, early = np.concatenate(X), np.concatenate(early)  # (grid, windows and points, terms)
        y, in_end = loss[first:], n - first + np.flatnonzero(ahead >= min(0.95 * planned_tokens, ahead[-1]))
        past, end = X[:, : len(y)], X[:, in_end].mean(1)

        # the fit; the noise of a window: from its neighbours, or what the fit leaves
        level = max(float(y[-max(1, len(y) // 6) :].mean()), 1e-3)
        prior = np.array([[0.4 * level, 0.6 * level, self.ANNEAL[0]], [0.2 * level, level, self.ANNEAL[1]]])
        jumps = np.diff(y)
        noise = max(1.05 * float(np.median(np.abs(jumps - np.median(jumps)))), 1e-4 * level)  # MAD x 1.4826 / sqrt 2
        noise = max(noise, posterior(past, y, prior, noise)[1])
        moments, _ = posterior(past, y, prior, noise)

        def interval(name, x, moved, more=0.0):
            mean, sd = moments(x)
            half = 1.645 * math.hypot(self.WIDTH[0] * sd, self.WIDTH[1] * moments(moved)[0], more)
            found.update({name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half})

        adds = max(1.0, 0.05 * planned_tokens * self.per * n / last[-1])  # so many does `final` average
        interval("final", end, past[:, -1] - end, noise * math.sqrt(self.per / adds))
        sooner, lower = np.zeros_like(end), np.zeros_like(end)
        sooner[:, 1] = early[:, in_end].mean(1) - end[:, 1]  # without those tokens
        lower[:, 2] = past[:, -1, 2] - end[:, 2]
        interval("stable_gain", sooner, sooner)
        interval("anneal_gain", lower, lower)
        now, start = moments(past[:, -1])[0], float(loss[top])
        found |= {"now": now, "gained": min(1.0, max(0.0, (start - now) / max(1e-9, start - found["final"])))}
        recent = max(4, int((flops > 0.8 * flops[-1]).sum()))
        x = np.log(np.maximum(flops[-recent:], 1e-9))
        x -= x.mean()
        xx = float(x @ x) + 1e-12
        slope, half = -float(x @ loss[-recent:]) / xx, 1.645 * noise / math.sqrt(xx)
        found |= {"slope": slope, "slope_low": slope - half, "slope_high": slope + half}
        if not math.isfinite(sum(found.values())):
            return None
        if stable < 0.05 * planned_tokens:
            found |= dict.fromkeys(("stable_gain", "stable_gain_low", "stable_gain_high"))
        bounds = {"rising": -self.FLAT, "converged?": MIN_GAIN / math.log(2), "flattening": self.FLAT}
        phase = next((name for name, bound in bounds.items() if slope + half < bound), "learning")
        phase = "annealing" if lr[-1] < 0.5 * peak else phase
        epoch = found["share"] * planned_tokens / unique_tokens if unique_tokens else 0.0
        advice = "continue"
        if phase == "rising":
            advice = "the loss rises: look at grad_norm, lower the rate"
        elif epoch > 4:
            advice = f"data repeats (epoch {epoch:.1f}): the training loss flatters, judge by the validation loss"
        elif phase in ("converged?", "flattening") and lr[top:].min() > 0.98 * peak:
            advice = "flat under a constant rate: start the decay"
        return found | {"phase": phase, "recommendation": advice}


def paired_rise(best: np.ndarray, now: np.ndarray) -> float:
    """One-sided p-value that the mean validation loss has risen, from the losses of the same rows (nats) at both times.

    Paired t on the differences, made normal by Wallace 1959: z = sqrt(f ln(1 + t^2/f)) (8f + 1)/(8f + 3), f = rows - 1.
    Rows should be independent (one a document, or far apart). Fewer than 8 usable ones: 1.0, no evidence.
    """
    d = np.asarray(now, dtype=float) - np.asarray(best, dtype=float)
    d = d[np.isfinite(d)]
    f, sd = len(d) - 1, float(d.std(ddof=1)) if len(d) > 1 else 0.0
    if f < 7 or sd == 0:
        return 1.0
    t = float(d.mean()) / sd * math.sqrt(f + 1)
    z = math.copysign(math.sqrt(f * math.log1p(t * t / f)) * (8 * f + 1) / (8 * f + 3), t)
    return math.erfc(z / math.sqrt(2)) / 2


def justified_stop(
    schedule: str,
    stable_gains: Sequence[float | None] = (),
    rise_ps: Sequence[float] = (),
    epochs: float = 0.0,
    rise: float = 0.0,
    anneal_gain: float = 0.0,
    min_gain: float = MIN_GAIN,
) -> str | None:
    """The two reasons to cut a run short, as a line of advice that begins with "start the decay" or "stop"; or None.

    wsd: `stable_gains`, the stable_gain_high (a 95 % bound) of successive checks, newest last, are under min_gain nats
    three times. Repeated data: `rise_ps`, paired_rise of successive evaluations against the best, are under 1e-3 twice
    and the `rise` (nats) is more than the `anneal_gain` that lowering the rate still promises. Never a flat train loss.
    """
    gains, ps = list(stable_gains)[-3:], list(rise_ps)[-2:]
    if epochs > 1 and len(ps) == 2 and max(ps) < 1e-3 and rise > max(0.0, anneal_gain):
        return f"stop: the validation loss rises on repeated data (+{rise:.3f} nats, p {ps[0]:.1g} and {ps[1]:.1g})"
    if schedule == "wsd" and len(gains) == 3 and all(g is not None and g < min_gain for g in gains):
        return f"start the decay: the stable tokens left add under {max(gains):.4f} nats (3 checks in a row)"
    return None


# ---------------------------------------------------------------- python plan.py env


def env() -> int:
    """Print what this machine offers to a training run. Exit code 2 when training cannot work here."""
    problems = []
    if sys.version_info < (3, 10):  # noqa: UP036 - this is where a user of an old Python learns it
        problems.append(f"Python {platform.python_version()}: 3.10 or newer is needed")
    if release(torch.__version__) < release(TRIED[0]):
        problems.append(f"torch {torch.__version__}: {TRIED[0]} or newer is needed (pip install -r requirements.txt)")
    m = machine()
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    gpus = f", {torch.cuda.device_count()} GPUs" if m.device.type == "cuda" else ""
    print(f"device       {m.device.type}: {m.name}{gpus}; CPU flags: {' '.join(cpu_flags()) or 'none known'}")
    print("".join(f"             {note}\n" for note in m.notes), end="")
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"matrices     {label} {describe(matrix_peak(m.device, dtype), 'FLOP/s')} measured")
    print(f"compiler     {find_compiler() or 'none: compile_model stays off on the CPU'}")
    print(f"memory       {total_memory('cpu') / 2**30:.1f} GiB", end="")
    print(f", GPU {total_memory(m.device) / 2**30:.1f} GiB" if m.device.type == "cuda" else "")
    free = shutil.disk_usage(".").free
    print(f"disk         {free / 2**30:.1f} GiB free here")
    if free < 1 << 30:
        problems.append("less than 1 GiB of disk is free: checkpoints need it")
    cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=1, n_heads=2)
    for choice in ("sdpa", "flash", "flex"):
        name, why = pick_attention(choice, cfg, m.device, m.compute_dtype)
        print(f"attention    {choice}: {'works' if name == choice else why}")
    for name, why in back_ends(m.device, m.compute_dtype, cfg.d_model, cfg.d_model).items():
        print(f"experts      {name}: {why or 'can work'}")
    for package, use in (("wandb", "wandb_project"), ("tensorboard", "tensorboard: true"), ("transformers", "--check")):
        there = importlib.util.find_spec(package) is not None
        print(f"optional     {package}: {'there' if there else f'not there (pip install {package}), for {use}'}")
    for module in ("numpy", "yaml", "tiktoken", "safetensors", "tqdm"):
        if importlib.util.find_spec(module) is None:
            problems.append(f"{module} is not installed (pip install -r requirements.txt)")
    print("\n".join(f"PROBLEM      {p}" for p in problems) or "ready        training works here")
    return 2 if problems else 0


def main(argv: list[str]) -> int:
    parser = Words(prog="plan.py", description=__doc__)
    parser.add_argument("what", choices=("env",), help="what this machine offers to a training run")
    parser.parse_args(argv)
    return env()


if __name__ == "__main__":
    command(main)
