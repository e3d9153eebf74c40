"""What this machine is, and the arithmetic before a run: parameters, FLOPs, memory, time. `python plan.py env`.

Takes a ModelConfig and plain numbers, never the run's configuration; `python train.py CONFIG --dry_run` prints it all.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field

import torch

from errors import UserError, command
from model import ModelConfig, Transformer, pick_attention

DTYPES = {"fp32": torch.float32, "mixed_bf16": torch.bfloat16, "mixed_fp16": torch.float16}
# dense 16-bit matrix peaks in FLOP/s, from the makers' data sheets (SXM parts; PCIe ones are slower)
GPU_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
GPU_PEAKS |= {"4090": 165e12, "3090": 71e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12}


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
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags())) or torch.cpu._is_avx512_bf16_supported()


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def machine(device: str = "auto", precision: str = "auto", compile_model: bool | str = "auto", local_rank: int = 0):
    """Resolve device, precision and compilation to what works here. UserError E003 when what was asked does not."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in ("cuda", "mps", "cpu") if has[k]) if device == "auto" else device.split(":")[0]
    if kind not in has:
        raise UserError("E002", f"device: {device!r} is not auto, cuda, mps or cpu")
    if not has[kind]:
        raise UserError("E003", f"device: {device} is not there; this torch ({torch.__version__}) sees {_seen(has)}")
    notes = []
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
    table = next((peak for key, peak in GPU_PEAKS.items() if key in m.name), None)
    if table and m.precision != "fp32":
        return table
    return matrix_peak(m.device, m.compute_dtype)


def total_memory(device) -> int:
    """Bytes this process may use: the GPU's, or the machine's cut by the cgroup's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read().strip()
            limit = min(limit, int(text)) if text.isdigit() else limit
        except OSError:
            pass
    return limit


def memory(cfg: ModelConfig, n_params: int, rows: int, precision: str, recompute: bool = False) -> dict[str, int]:
    """Estimated bytes of a training step on one device: the parts and their total.

    states: weights, gradients and both moments in fp32, 16 per parameter (expert slots not in use included), and 2 more
    for the 16-bit copies of weights that backward needs (experts make theirs anew, a layer at a time). activations:
    what `rows` rows of T tokens keep for backward. work: a chunk of logits, or the backward pass of a layer of experts.
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
    scores = (slots + cfg.n_null_experts) * 4 * (1 + (cfg.router == "sigmoid") + (cfg.router_z_loss_weight > 0))
    experts = scores + K * (3 * 4 + 3 * 8) + b * K * 2 * width + b * 4 * cfg.n_shared_experts * width
    layers = []  # bytes a token
    for i in range(cfg.n_layers):
        c, first = 1.0 if cfg.mod_anneal_steps else cfg.capacity(i), attn + dropout  # annealed: it begins whole
        second = norm + (experts if cfg.is_moe(i) else b * 4 * F) + dropout  # gate and up; silu; product
        if c < 1:  # MoD
            learned = cfg.mod_routing == "learned"  # its fp32 input and that normalized, of every token; ungated change
            second = c * (second + b * C * learned) + 8 * C * learned
            first *= 1 if cfg.mod_ffn_only else c
        layers.append(round(N * (first + second)))
    kept = N * norm + (cfg.n_layers * N * C * b + max(layers) if recompute else sum(layers))
    chunk = (1 << 27 if precision != "fp32" else 1 << 22) * 4
    head = 2 * min(chunk, N * cfg.vocab_size * 4) + cfg.vocab_size * C * 4 + N * C * b
    layer, moe = slots * 3 * C * width, sum(map(cfg.is_moe, range(cfg.n_layers)))  # numbers in the experts of a layer
    work = layer * (4 + (b if b == 2 else 0)) + N * K * b * (4 * width + C)  # gradients and 16-bit copies; rows
    parts = {
        "states": n_params * 16 + (2 * (n_params - moe * layer) if b == 2 else 0),
        "activations": kept,
        "work": max(head, work if moe else 0),
    }
    return parts | {"total": sum(parts.values())}


def on_meta(cfg: ModelConfig) -> Transformer:
    """The model without memory: for counting."""
    with torch.device("meta"):
        return Transformer(cfg)


def describe(n: float, unit: str = "") -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {letter}{unit}" if unit else f"{n / size:.3g}{letter}"
    return f"{n:.3g} {unit}".strip()


def env() -> int:
    """Print what this machine offers to a training run. Exit code 2 when training cannot work here."""
    problems = []
    if sys.version_info < (3, 10):  # noqa: UP036 - this is where a user of an old Python learns it
        problems.append(f"Python {platform.python_version()}: 3.10 or newer is needed")
    version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if not (2, 11) <= version < (2, 14):
        problems.append(f"torch {torch.__version__}: 2.11 to 2.13 is needed (pip install -r requirements.txt)")
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
    for package, use in (("wandb", "wandb_project"), ("tensorboard", "tensorboard: true"), ("transformers", "--check")):
        there = importlib.util.find_spec(package) is not None
        print(f"optional     {package}: {'there' if there else f'not there (pip install {package}), for {use}'}")
    for module in ("numpy", "yaml", "tiktoken", "safetensors", "tqdm"):
        if importlib.util.find_spec(module) is None:
            problems.append(f"{module} is not installed (pip install -r requirements.txt)")
    print("\n".join(f"PROBLEM      {p}" for p in problems) or "ready        training works here")
    return 2 if problems else 0


def main(argv: list[str]) -> int:
    if argv != ["env"]:
        print("usage: python plan.py env\n" + __doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    return env()


if __name__ == "__main__":
    command(main)
