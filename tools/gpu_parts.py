"""The parts of tools/gpu.py: what is asked of a GPU, each a function of `Here`.

NAME_part is the part NAME. In this order: where they run; kernels; training steps; the
trainer; no wait for the GPU; compilation; a shard on one rank; whole models, generation, tests.
Every size has a toy beside it, at which tests/runs/test_gpu_tool.py runs all of them on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import kernels
import sample
import train_fsdp
from lumen import checkpoint, plan, tryout
from lumen import machine as machines
from lumen.cli import find_yaml, load_yaml
from lumen.feed import synchronize
from lumen.machine import DTYPES, compiled_graphs, free_memory, git_commit
from lumen.snapshots import Snapshot, Snapshots
from model import ModelConfig, Transformer, role
from model_moe import plain_experts
from tools import bench, bench_step, selftest, timing
from tools.bench_step import HALF, TOY, attention_fwd_bwd, few_tiles, poisoned, tuners
from train import Trainer

# ---------------------------------------------------------------- where


class Here:
    """The device, the rows' file, a folder for runs; the list at its true or its toy size.

    A context: in toy form torch.compile only traces, and all that a part has set is taken back.
    """

    def __init__(self, rows, toy: bool):
        self.rows, self.toy = rows, toy
        self.machine = machines.detect("cpu", "fp32") if toy else machines.detect("cuda")
        self.device = self.machine.device
        self.cuda = self.device.type == "cuda"
        self.stack = contextlib.ExitStack()
        if self.cuda:
            rows.after = self.check_alive

    def __enter__(self):
        self.top = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        before = torch.are_deterministic_algorithms_enabled()
        self.stack.callback(torch.use_deterministic_algorithms, before)
        self.stack.callback(few_tiles, False)
        if self.toy:
            traced = torch.compiler.set_stance("default", force_backend="aot_eager")
            self.stack.enter_context(traced)
        return self

    def __exit__(self, *error):
        self.stack.close()

    def pick(self, real, toy):
        return toy if self.toy else real

    def usable(self, dtype, d: int, I: int, slices=True) -> list[str]:
        """Backends of the expert layer that can work here, Triton's last: it compiles."""
        found = kernels.backends(self.device, dtype, d, I)
        names = [name for name, why in found.items() if why is None]
        return [name for name in reversed(names) if slices or name != "slices"]

    def check_alive(self) -> None:
        """Raises where no further call into CUDA can work; gives back what failed things held."""
        torch.cuda.synchronize()
        free_memory(self.device)

    def about(self) -> dict:
        """For the header of a part's rows."""
        card = self.machine.name if self.cuda else "a CPU"
        triton = kernels.versioned("triton").removeprefix("triton ")
        words = {"card": card, "torch": torch.__version__, "triton": triton}
        return words | {"commit": git_commit(), "toy": self.toy}


# ---------------------------------------------------------------- kernels: right?


def kernels_part(here: Here) -> None:
    """The loss, attention and every expert backend against plain fp32 formulas."""
    precisions = here.pick(["mixed_bf16", "mixed_fp16", "fp32"], ["fp32"])
    for precision in precisions:
        check_head(here, precision)
        check_attention(here, precision)
    few_tiles()
    for precision in precisions:
        for backend in here.usable(DTYPES[precision], 512, 384):
            check_experts(here, precision, backend)


def expert_cases(here: Here, few: bool = False) -> list[tuple]:
    """(name, (T, d, I, E, K), ids or None): the edge cases, and a real size; `few` of them."""
    shape = here.pick((4096, 1024, 512, 64, 8), (96, 32, 16, 8, 2))
    T, _, _, E, K = shape
    busy = torch.rand(T, E, generator=torch.Generator().manual_seed(2))
    busy[:, [0, E // 4, E // 2, E - 1]] = -1  # as spare slots are
    real = (f"{T} x {shape[1]}, 4 of {E} experts empty", shape, busy.topk(K, -1)[1])
    edges = selftest.edge_cases()
    if few:  # every number of experts is compiled anew
        edges = [case for case in edges if case[2] is not None][:1]
    return [*edges, real]


def expert_error(here: Here, dtype, shape: tuple, ids, backend: str) -> float:
    """The largest error of the output and the four gradients, relative to each one's maximum."""
    ids = None if ids is None else ids.to(here.device)
    inputs, dout = tryout.sample(here.device, dtype, *shape, ids)
    exact = [inputs[0].detach().float().requires_grad_(), *inputs[1:]]
    want = tryout.fwd_bwd(plain_experts, exact, dout.float())
    layer = functools.partial(kernels.run_experts, backend=backend)
    with poisoned(here.device):
        got = tryout.fwd_bwd(layer, inputs, dout)
    return tryout.relative_error(got, want)


def check_experts(here: Here, precision: str, backend: str) -> None:
    dtype = DTYPES[precision]
    limit, errors = {"unit": "of the maximum", "most": tryout.TOLERANCE[dtype]}, []
    for case, shape, ids in expert_cases(here, few=precision != here.machine.precision):
        tried = (expert_error, here, dtype, shape, ids, backend)
        name = f"{backend}, {precision}: {case}"
        row = here.rows.attempt(name, *tried, **limit, detail=True)
        errors.append(math.inf if row["value"] is None else float(row["value"]))
    name = f"{backend}, {precision}: worst of {len(errors)} cases"
    here.rows.attempt(name, max, errors, **limit)


def check_head(here: Here, precision: str) -> None:
    """The loss as training has it against F.cross_entropy of all logits in fp32."""
    size = {"vocab_size": 50304, "d_model": 768, "n_heads": 12, "d_ff": 256, "max_seq_len": 1025}
    one = {"n_layers": 1, "tie_embeddings": False}
    cfg, dtype = ModelConfig(**here.pick(size, TOY) | one), DTYPES[precision]
    most = {"loss": 1e-5 if dtype == torch.float32 else 2e-3, "gradients": tryout.TOLERANCE[dtype]}
    most["loss in evaluation"] = most["loss"]
    for way in loss_ways(here, precision, cfg.vocab_size):
        for what, limit in most.items():
            tried = (head_error, here, cfg, dtype, way, what)
            name = f"head, {precision}, {way}: {what}"
            here.rows.attempt(name, *tried, unit="relative", most=limit)


def loss_ways(here: Here, precision: str, V: int) -> list[str]:
    """plain, and fused where Triton can work; that a run here would take it is a row."""
    picked, why = tryout.pick_loss(here.device, DTYPES[precision], V)
    if here.cuda:
        found = {"value": picked == "fused", "why": why}
        here.rows.attempt(f"head, {precision}: the fused loss works", dict, found)
    return ["plain", "fused"] if picked == "fused" else ["plain"]


def head_error(here: Here, cfg: ModelConfig, dtype, way: str, what: str) -> float:
    """Of `what`; the weights are rounded as the head rounds them, so that only its own arithmetic
    differs."""
    with torch.device(here.device):
        model = Transformer(cfg)
    bench_step.fill_quickly(model)
    model.compute_dtype, model.z_loss, model.fused_loss = dtype, 1e-4, way == "fused"
    x, y = bench_step.batch(cfg, 4, here.device)
    y[:, ::7] = -1
    streams = []
    model.norm.register_forward_hook(lambda module, inputs, output: streams.append(output))
    evaluates = what == "loss in evaluation"
    model.train(not evaluates)
    with poisoned(here.device), torch.set_grad_enabled(not evaluates):
        total, _ = model(x, targets=y)
        if not evaluates:
            got = torch.autograd.grad(total, [streams[0], model.head.weight])
    rows = streams[0].detach().flatten(0, 1).float().requires_grad_()
    weight = model.head.weight.detach().to(dtype).float().requires_grad_()
    logits, targets = F.linear(rows, weight), y.flatten()
    lse = logits.logsumexp(-1)[targets >= 0]
    exact = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    exact = exact + model.z_loss * lse.square().sum()
    if what != "gradients":
        return ((total.detach() - exact.detach()).abs() / exact.detach()).item()
    want = torch.autograd.grad(exact, [rows, weight])
    return tryout.relative_error([got[0].flatten(0, 1), got[1]], want)


# ---------------------------------------------------------------- attention


def each_attention(here: Here, label: str, dtype, shape: tuple):
    """Yield (a row's name, the backend, its inputs) of all that torch has here."""
    inputs = bench_step.attention_inputs(here.device, dtype, shape)
    for name, way in bench_step.attention_backends(dtype).items():
        row = f"{label}, {name}"
        try:
            attention_fwd_bwd(way, *inputs)
        except RuntimeError as error:  # any other comes again, in the row's own attempt
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                here.rows.note(row, "torch has no such kernel here")
                continue
        yield row, way, inputs


def check_attention(here: Here, precision: str) -> None:
    dtype, shape = DTYPES[precision], here.pick((2, 512, 8, 2, 64), (2, 16, 4, 2, 8))
    limit = {"unit": "of the maximum", "most": tryout.TOLERANCE[dtype], "detail": True}
    for name, *tried in each_attention(here, f"attention, {precision}", dtype, shape):
        here.rows.attempt(name, attention_error, here, *tried, **limit)


def attention_error(here: Here, way, inputs: list) -> float:
    exact = functools.partial(bench_step.attend, backend=SDPBackend.MATH)
    want = attention_fwd_bwd(exact, *[t.detach().float().requires_grad_() for t in inputs])
    with poisoned(here.device):
        return tryout.relative_error(attention_fwd_bwd(way, *inputs), want)


def attention_part(here: Here) -> None:
    """Forward and backward of each attention at the shapes of 124M and 1.3B, and grouped."""
    shapes = {"124M": (16, 1024, 12, 12, 64), "1.3B": (4, 2048, 16, 16, 128)}
    shapes["grouped 4"] = (4, 2048, 16, 4, 128)
    for label, shape in here.pick(shapes, {"toy": (2, 16, 4, 2, 8)}).items():
        B, T, H, _, D = shape
        # half of the scores count: q k^T and its product with v, and backward 2.5 times as much
        flops = 3.5 * 2 * B * H * T * T * D
        for name, way, inputs in each_attention(here, label, here.machine.compute_dtype, shape):
            run = functools.partial(attention_fwd_bwd, way, *inputs)
            here.rows.attempt(name, layer_time, here, run, flops, unit="ms")
        here.rows.attempt(f"{label}, auto", bench_step.auto_attention, here.machine, shape)


def layer_time(here: Here, run, flops: float) -> dict:
    best = min(timing.interleaved({"": run}, here.pick(10, 2), here.device, 2)[""])
    return {"value": 1e3 * best, "TFLOP/s": flops / best / 1e12}


# ---------------------------------------------------------------- experts: fast?


def experts_part(here: Here) -> None:
    """Each tile of Triton's kernels by itself; then the layer against a dense one of equal active
    width, with weights in fp32 as the trainer has them."""
    check_tiles(here)
    for shape in bench_step.KERNELS[here.pick("cuda", "toy")]:
        T, d, I, E, K = shape
        label = f"{T} tokens, {E} experts of {I} x {d}, top-{K}"
        here.rows.attempt(label, time_layer, here, label, shape, unit="s")


def time_layer(here: Here, label: str, shape: tuple) -> float:
    """Seconds that all of it took; a row for every backend."""
    began, rounds = time.perf_counter(), here.pick(6, 2)
    layers = bench_step.measure_expert_layer(here.machine, shape, torch.float32, rounds)
    dense = layers["dense"]
    for name, layer in layers.items():
        both = min(layer.both)
        row = {"value": 1e3 * both, "against dense": both / min(dense.both)}
        row["forward ms"] = 1e3 * min(layer.forward)
        row["TFLOP/s"] = 3 * layer.flops / both / 1e12
        row["keeps MiB"] = layer.kept / 2**20
        here.rows.attempt(f"{label}: {name}", dict, row, unit="ms")
    missing = set(here.usable(here.machine.compute_dtype, *shape[1:3])) - layers.keys()
    if missing:
        raise RuntimeError(f"{', '.join(missing)} did not work, see log.txt")
    return time.perf_counter() - began


def check_tiles(here: Here) -> None:
    """The autotuner may take any of them on some card."""
    _, shape, ids = expert_cases(here)[-1]
    dtype = here.machine.compute_dtype
    if "triton" not in here.usable(dtype, *shape[1:3]):
        here.rows.note("tiles of Triton's kernels", "Triton cannot work here")
        return
    limit = {"unit": "of the maximum", "most": tryout.TOLERANCE[dtype], "detail": True}
    for number, tuner in enumerate(tuners()):
        few_tiles()
        for tile in tuner.every_tile:
            tuner.configs = [tile]
            tuner.cache.clear()
            name = f"{tuner.base_fn.__name__}, tile {number}.{tile}"
            here.rows.attempt(name, tile_error, here, dtype, shape, ids, **limit)
    few_tiles(False)


def tile_error(here: Here, dtype, shape: tuple, ids):
    """A tile for which this card has no room is no fault: the autotuner leaves it out too."""
    try:
        return expert_error(here, dtype, shape, ids, "triton")
    except kernels.triton.runtime.errors.OutOfResources as error:
        return {"value": None, "note": f"does not fit here: {str(error)[:80]}"}


# ---------------------------------------------------------------- training steps

SMALL = {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96}
SMALL["max_seq_len"] = 64
LARGE = {"vocab_size": 50304, "d_model": 2048, "n_layers": 24, "n_heads": 16, "d_ff": 5632}
LARGE["max_seq_len"] = 2048
FEW_EXPERTS = {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 32}


def preset(name: str) -> dict:
    """The model's keys of a preset."""
    return load_yaml(find_yaml(name))[0]["model"]


GPT2, MOE, HYBRID = (preset(name) for name in ("gpt2_124m", "moe_124m", "hybrid_124m"))


def build(here: Here, keys: dict, rows: int, compiled: bool, **more) -> bench_step.Ours:
    """A training step, on memory that nobody holds; more: recompute, backend, deterministic."""
    timing.forget_graphs()
    if here.cuda:
        torch.cuda.reset_peak_memory_stats()
    model = ModelConfig(**here.pick(keys, SMALL | sparse_keys(keys)))
    backend = more.get("backend", "auto")
    run = bench_step.Ours(model, here.machine, here.pick(rows, 2), compiled, backend)
    run.model.recompute = more.get("recompute", "none")
    run.deterministic = more.get("deterministic", run.deterministic)
    return run


def sparse_keys(keys: dict) -> dict:
    """What makes a toy as sparse as the model of `keys`."""
    found = FEW_EXPERTS if keys.get("n_experts") else {}
    return found | {name: value for name, value in keys.items() if name.startswith("mod_")}


def step_row(here: Here, keys: dict, rows: int, compiled=True, **more) -> dict:
    """tokens/s of a step; its time, MFU, memory at the peak and by the plan."""
    run = build(here, keys, rows, compiled, **more)
    times = timing.interleaved({"": run}, here.pick(8, 1), here.device, here.pick(3, 1))[""]
    n = run.model.n_params()
    speed = run.tokens / min(times)
    m, cfg = run.machine, run.model.cfg
    row = {"value": speed, "ms": 1e3 * min(times), "median ms": 1e3 * statistics.median(times)}
    if here.cuda:
        row["MFU %"] = timing.percent_of_peak(speed * run.model.flops_per_token(), m)
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    size = (run.cfg.batch_size, m.precision, run.model.recompute, here.cuda)
    row["plan GiB"] = plan.memory(cfg, n["total"], *size)["total"] / 2**30
    row |= {"loss": run().item(), "parameters": n["total"], "how": run.name}
    assert math.isfinite(row["loss"]), f"the loss is {row['loss']}"
    return row


def try_step(here: Here, name: str, *args, **more) -> None:
    here.rows.attempt(name, functools.partial(step_row, **more), here, *args, unit="tokens/s")


def step_part(here: Here) -> None:
    """124M, 16 rows of 1,024 tokens."""
    try_step(here, "124M, 16 rows, compiled", GPT2, 16)
    try_step(here, "124M, 16 rows, eager", GPT2, 16, compiled=False)
    for way in loss_ways(here, here.machine.precision, 50304):
        here.rows.attempt(f"124M, head and {way} loss alone", time_head, here, way, unit="ms")
    here.rows.attempt("124M, a snapshot's copy", time_snapshot, here, unit="ms")
    try_step(here, "124M, 16 rows, deterministic", GPT2, 16, deterministic=True)
    here.rows.attempt("124M through train.py, compiled", trainer_speed, here, unit="tokens/s")


def big_part(here: Here) -> None:
    """1.3B, 2,048 tokens a row."""
    try_step(here, "1.3B, 4 rows, compiled", LARGE, 4)
    try_step(here, "1.3B, 8 rows, compiled, block", LARGE, 8, recompute="block")


def time_head(here: Here, way: str) -> dict:
    """model.loss and its gradients, of a step's rows."""
    cfg, rows = ModelConfig(**here.pick(GPT2 | {"n_layers": 1}, SMALL)), here.pick(16, 2)
    with torch.device(here.device):
        model = Transformer(cfg)
    bench_step.fill_quickly(model)
    model.fused_loss = way == "fused"
    _, y = bench_step.batch(cfg, rows, here.device)
    x = torch.randn(*y.shape, cfg.d_model, device=here.device).to(here.machine.compute_dtype)
    leaves = [x.requires_grad_(), model.head_weight()]

    def run():
        torch.autograd.grad(model.loss(x, y, [])[0], leaves)

    if here.cuda:
        torch.cuda.reset_peak_memory_stats()
    row = layer_time(here, run, 6 * y.numel() * cfg.d_model * cfg.vocab_size)
    if here.cuda:
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def time_snapshot(here: Here) -> dict:
    """Until the copy to the host is queued (what a step loses) and until it is there."""
    run = build(here, GPT2, 16, compiled=False)
    run()
    tensors = {}
    for i, state in enumerate([run.model.state_dict(), *run.optimizer.state.values()]):
        for key, value in state.items():
            if torch.is_tensor(value):
                tensors[f"{i}.{key}"] = value
    snapshots, row = Snapshots(lambda: tensors), {}
    for which in ("first", "again"):  # the first allocates pinned memory
        synchronize(here.device)
        began = time.perf_counter()
        snapshots.take(Snapshot(0, 0, 0))
        row["value" if which == "again" else "first ms"] = 1e3 * (time.perf_counter() - began)
        synchronize(here.device)
        row["done after ms"] = 1e3 * (time.perf_counter() - began)
    return row | {"GiB": sum(t.nbytes for t in tensors.values()) / 2**30}


# ---------------------------------------------------------------- the trainer


def shards(here: Here) -> str:
    """The folder of a shard that is easy to learn: each id is the last one plus 0, 1 or 2."""
    folder = here.top / "shards"
    if not folder.exists():
        folder.mkdir()
        steps = np.random.default_rng(0).integers(0, 3, here.pick(3_000_000, 60_000))
        np.save(folder / "a.npy", (np.cumsum(steps) % 97).astype(np.uint16))
    return str(folder)


def run_keys(here: Here, name: str, model: dict, keys: dict) -> dict:
    """Of a small run: 24 steps (toy: 6) of two micro-steps, deterministic, not compiled."""
    shape = {"vocab_size": 128, "d_model": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
    shape |= {"d_ff": 512, "max_seq_len": 256}
    if here.toy:
        shape |= {"d_model": 32, "d_ff": 48, "n_layers": 2, "max_seq_len": 32}
    steps = here.pick(24, 6)
    made = {
        "data_dir": shards(here),
        "out_dir": str(here.top / name),
        "device": here.device.type,
        "precision": here.machine.precision,
        "max_steps": steps,
        "batch_size": here.pick(8, 2),
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "save_interval": steps // 2,
        "log_interval": steps // 3,
        "eval_tokens": here.pick(8192, 512),
        "val_fraction": 0.02,
        "compile_model": False,
        "deterministic": True,
        "orchestrator": {"snapshot_interval": steps // 4, "check_interval": steps // 2},
    }
    return made | {"model": shape | model} | keys


def train(here: Here, config, act=None, parallel=None, make=Trainer) -> Trainer:
    """A run to its end; act(trainer, step) at the top of each iteration."""
    trainer = make(config, parallel) if parallel else make(config)
    try:
        for step in trainer.iterations():
            if act is not None:
                act(trainer, step)
        code = trainer.end()
    except BaseException:
        trainer.close()
        raise
    assert code == 0, f"exit code {code}"
    return trainer


def run_small(here: Here, name: str, model=None, act=None, **keys) -> Trainer:
    return train(here, run_keys(here, name, model or {}, keys), act)


def last_bytes(out: Path) -> str:
    """A sum over all tensors of the last checkpoint."""
    folder = checkpoint.step_dir(out, checkpoint.list_steps(out)[-1])
    files = json.loads((folder / "manifest.json").read_text())["files"]
    sums = {name: file["sha256"] for name, file in files.items() if name != "state.json"}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def check_bytes(here: Here, label: str, model=None, only=None, **keys) -> None:
    """A run again, one that was stopped and resumed, one without orchestrator: the same bytes.
    only: names of these."""

    @functools.cache
    def whole() -> str:
        return last_bytes(run_small(here, f"{label}-whole", model, **keys).out)

    def resumed() -> bool:
        def stop(trainer, step):
            if step == here.pick(9, 2):
                trainer.signals.stop = 1

        first = run_small(here, f"{label}-parts", model, stop, **keys)
        second = run_small(here, f"{label}-parts", model, **keys)
        stops = f"stopped at {first.step}, resumed at {second.started_at}, ended at {second.step}"
        assert 0 < first.step == second.started_at < second.step, stops
        return last_bytes(second.out) == whole()

    def repeated() -> bool:
        return last_bytes(run_small(here, f"{label}-again", model, **keys).out) == whole()

    def unwatched() -> bool:
        off = {"orchestrator": {"mode": "off"}}
        return last_bytes(run_small(here, f"{label}-off", model, **keys | off).out) == whole()

    tries = {"run again": repeated, "stopped and resumed": resumed, "orchestrator off": unwatched}
    for what in only or tries:
        here.rows.attempt(f"{label}: the same bytes, {what}", tries[what])


def trainer_part(here: Here) -> None:
    """train.py itself, end to end."""
    attempt = here.rows.attempt
    check_bytes(here, "dense")  # first: what makes cuBLAS deterministic is set before any matmul
    most = here.pick(1.5, 4.8)
    attempt("quickstart learns", quickstart, here, unit="nats", most=most)
    attempt("a NaN gradient is dropped", drop_nan, here)
    attempt("out of memory: smaller micro-steps", out_of_memory, here, unit="rows")
    if here.cuda:
        attempt("fp16 with its loss scale", fp16, here, unit="nats", most=2.5)
    else:
        here.rows.note("fp16 with its loss scale", "fp16 is for GPUs")
    attempt("batch_size auto", probe, here, unit="rows")
    attempt("a sample of the run", sample_run, here)
    moe = here.pick({"n_experts": 8, "d_expert": 128, "n_experts_max": 9}, FEW_EXPERTS)
    for backend in here.usable(here.machine.compute_dtype, 256, 128, slices=False):
        check_bytes(here, f"MoE, {backend}", moe, expert_backend=backend)


def quickstart(here: Here) -> dict:
    """The preset with every auto, on a shard made here: its validation loss."""
    words = ["quickstart", "--prepare", "null", "--data_dir", shards(here), "--model.vocab_size"]
    words += ["128", "--out_dir", str(here.top / "quickstart"), "--sample_prompt", "null"]
    words += ["--max_steps", here.pick("200", "6"), "--eval_tokens", here.pick("65536", "512")]
    if here.toy:
        words += ["--device", "cpu", "--model.d_model", "32", "--model.n_layers", "2"]
        words += ["--model.max_seq_len", "32", "--precision", "fp32", "--val_fraction", "0.02"]
    t = train(here, words)
    row = {"value": t.progress.best_val_loss, "dropped": t.orchestrator.dropped, "steps": t.step}
    chosen = ("precision", "compile_model", "attention", "loss", "deterministic")
    return row | {name: getattr(t.run, name) for name in chosen}


def drop_nan(here: Here) -> dict:
    """One step's gradient is NaN: that step alone is dropped, and the weights stay finite."""
    hooks = []

    def hurt(trainer, step):
        if step == 3:
            p = trainer.model.norm.weight
            hooks.append(p.register_hook(lambda grad: grad * math.nan))
        elif step == 4:
            hooks.pop().remove()

    t = run_small(here, "nan", act=hurt)
    dropped, finite = t.orchestrator.dropped, all(p.isfinite().all() for p in t.model.parameters())
    return {"value": dropped == 1 and finite, "dropped": dropped, "finite": finite}


def out_of_memory(here: Here) -> dict:
    """Memory for fewer rows than were asked for: the step is begun again, and none is lost."""
    model, rows = here.pick({"max_seq_len": 2048}, {}), here.pick(64, 8)
    keys = {"batch_size": rows, "gradient_accumulation_steps": 1, "deterministic": False}
    keys |= {"max_steps": 6}
    hook = None
    if here.cuda:
        shape = ModelConfig(**run_keys(here, "oom", model, keys)["model"])
        n = plan.count_parameters(plan.on_meta(shape))
        room = plan.memory(shape, n, rows // 3, here.machine.precision)["total"]
        free_memory(here.device)
        share = (room + torch.cuda.memory_reserved()) / machines.total_memory(here.device)
        torch.cuda.set_per_process_memory_fraction(share)
    else:
        hook = short_of_memory
    try:
        t = run_small(here, "oom", model, hook, **keys)
    finally:
        if here.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    whole = keys["max_steps"] * rows * t.cfg.model.max_seq_len
    if t.run.micro_batch == rows or t.tokens != whole:
        raise RuntimeError(f"{t.run.micro_batch} rows a micro-step, {t.tokens} of {whole} tokens")
    return {"value": t.run.micro_batch, "asked for": rows, "tokens": t.tokens}


def short_of_memory(trainer, step: int) -> None:
    """On a CPU: as if more than two rows did not fit."""

    def refuse(module, inputs):
        if module.training and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    if step == 0 and trainer.orchestrator.iteration == 1:
        trainer.model.blocks[0].register_forward_pre_hook(refuse)


def fp16(here: Here) -> dict:
    """Its scale begins too high, so that the first steps are dropped until it fits."""
    t = run_small(here, "fp16", precision="mixed_fp16", deterministic=False)
    scale = t.loss_scale.value.item()
    return {"value": t.latest.loss, "dropped": t.orchestrator.dropped, "scale": scale}


def probe(here: Here) -> dict:
    """What batch_size: auto finds to fit, and how near memory it is."""
    wide = {"max_seq_len": 1024, "d_model": 1024, "n_heads": 16, "n_layers": 8}
    model, rows = here.pick(wide, {"max_seq_len": 32}), here.pick(512, 16)
    keys = {"batch_size": "auto", "gradient_accumulation_steps": 1, "max_steps": 3}
    keys |= {"batch_tokens": model["max_seq_len"] * rows, "deterministic": False}
    t = run_small(here, "auto", model, **keys)
    row = {"value": t.run.micro_batch, "rows a step": rows}
    if here.cuda:
        row["most reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def sample_run(here: Here) -> str:
    """sample.py on a run of the trainer: greedy ids."""
    run_small(here, "talk")
    model, _, _ = sample.load(here.top / "talk", device=here.device.type)
    return sample.sample(model, None, [[1, 2, 3]], 8, temperature=0)[0]


def losses(trainer) -> list[float]:
    """Of each step that was logged."""
    lines = (trainer.out / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def trainer_speed(here: Here) -> dict:
    """Tokens/s that train.py itself logs on gpt2_124m, where nothing was compiled meanwhile."""
    keys = run_keys(here, "speed", here.pick(GPT2, {}), {"log_interval": here.pick(4, 1)})
    keys |= {"max_steps": here.pick(24, 6), "batch_size": here.pick(16, 2), "val_fraction": 0.0}
    keys |= {"save_interval": 0, "compile_model": True, "deterministic": "auto"}
    keys |= {"gradient_accumulation_steps": 1, "orchestrator": {}}
    trainer, rows = bench.logged_steps(keys)
    clean = bench.clean_rows(rows)
    assert clean, "something was compiled before every line"
    row = {"value": max(row["tokens_per_second"] for row in clean)}
    row["data wait %"] = 100 * clean[-1]["data_wait"]
    return row | {"loss": clean[-1]["loss"], "lines": len(clean), "steps": trainer.step}


# ---------------------------------------------------------------- no wait for the GPU

KINDS = {
    "dense": {},
    "MoE": {"n_experts": 8, "d_expert": 64, "router": "sigmoid", "n_shared_experts": 1},
    "MoE, slots, null": {"n_experts": 6, "d_expert": 64, "n_experts_max": 8, "n_null_experts": 2},
    "MoD": HALF,
    "hybrid": {"n_experts": 8, "d_expert": 64, **HALF, "mod_ffn_only": True},
}


def sync_part(here: Here) -> None:
    """Whole iterations of the trainer, snapshots and log lines among them, while it is an error to
    wait for the GPU. `slices` asks how long each slice is: it must wait."""
    few_tiles()
    kinds = here.pick(KINDS, {"dense": {}, "hybrid": KINDS["hybrid"]})
    for kind, model in kinds.items():
        usable = here.usable(here.machine.compute_dtype, 256, 64, slices=False)
        backends = usable if "n_experts" in model else [""]
        for backend in backends:
            keys = {"expert_backend": backend} if backend else {}
            label = ", ".join(filter(None, [kind, backend]))
            try_window(here, label, model, keys)
    try_window(here, "dense, compiled", {}, {"compile_model": True})


def try_window(here: Here, label: str, model: dict, keys: dict) -> None:
    """Where it waits, a second run says all the places."""
    row = here.rows.attempt(f"{label}: no wait", window, here, label, model, keys, "error")
    if not row["ok"] and here.cuda:
        tried = (window, here, f"{label}-places", model, keys, "warn")
        here.rows.attempt(f"{label}: where it waits", *tried)


def window(here: Here, name: str, model: dict, keys: dict, mode: str):
    """Ten iterations (toy: two) behind the warm-up under set_sync_debug_mode(mode)."""
    steps, first = here.pick((30, 12), (5, 2))
    keys = {"deterministic": False, "max_steps": steps, "save_interval": 0} | keys
    keys |= {"log_interval": here.pick(4, 1), "val_fraction": 0.0}
    keys["orchestrator"] = {"snapshot_interval": here.pick(4, 1), "check_interval": 100}

    def set_mode(what: str) -> None:
        if here.cuda:
            torch.cuda.set_sync_debug_mode(what)

    def act(trainer, step):
        if step == first:
            synchronize(here.device)
            set_mode(mode)
        elif step == steps - 3:
            set_mode("default")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            run_small(here, name, model, act, **keys)
        finally:
            set_mode("default")
    waits = [w for w in heard if "synchroniz" in str(w.message)]
    places = dict.fromkeys(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    return {"value": not waits, "places": "; ".join(places) or "none"}


# ---------------------------------------------------------------- compilation


def compile_part(here: Here) -> None:
    """Losses and gradients of compiled and of recomputing models against plain eager ones; the
    trainer compiled, and resumed."""
    few_tiles()
    ways = {"dense": [(False, "block"), (False, "selective")]}
    ways["dense"] += [(True, "none"), (True, "block"), (True, "selective")]
    ways["hybrid"] = [(False, "selective"), (True, "selective")]
    toys = {"dense": [(False, "block"), (True, "selective")], "hybrid": [(False, "selective")]}
    for kind, tries in here.pick(ways, toys).items():
        for compiled, recompute in tries:
            how = "compiled" if compiled else "eager"
            tried = (gradient_error, here, kind, compiled, recompute)
            name = f"{kind}, {how}, {recompute}: gradients"
            here.rows.attempt(name, *tried, unit="relative error", most=1e-3)
    name = "trainer, compiled against eager: losses"
    here.rows.attempt(name, compiled_losses, here, unit="nats apart", most=0.05)
    check_bytes(here, "dense, compiled", only=("stopped and resumed",), compile_model=True)


def gradients(here: Here, kind: str, compiled: bool, recompute: str) -> dict:
    """name -> gradient, and the loss, of the second step of a small fp32 model."""
    cfg = ModelConfig(**SMALL | {"vocab_size": 128} | KINDS[kind])
    with torch.device(here.device):
        model = Transformer(cfg)
    model.init_weights(0)
    model.recompute = recompute
    for moe in model.sparse_layers("moe").values():
        moe.backend = here.usable(torch.float32, cfg.d_model, cfg.d_expert)[-1]
    if compiled:
        for block in model.blocks:
            block.compile()
    x, y = bench_step.batch(cfg, 2, here.device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        total, _ = model(x, targets=y)
        total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"the loss": total.detach().reshape(1)}


def gradient_error(here: Here, kind: str, compiled: bool, recompute: str) -> dict:
    """The largest relative error of the loss and all gradients."""
    torch.compiler.reset()
    before = compiled_graphs()
    want = gradients(here, kind, False, "none")
    got = gradients(here, kind, compiled, recompute)
    graphs = compiled_graphs() - before
    errors = {}
    for name, exact in want.items():
        errors[name] = ((got[name] - exact).norm() / exact.norm().clamp(min=1e-12)).item()
    worst = max(errors, key=errors.get)
    return {"value": errors[worst], "worst": worst, "graphs": graphs}


def compiled_losses(here: Here) -> dict:
    """The largest distance of two runs' losses, step by step."""
    found, before = [], compiled_graphs()
    for compiled in (False, True):
        keys = {"compile_model": compiled, "log_interval": 1, "save_interval": 0}
        found.append(losses(run_small(here, f"losses-{compiled}", **keys)))
    return {"value": furthest(*found), "graphs": compiled_graphs() - before}


def furthest(a: list[float], b: list[float]) -> float:
    if len(a) != len(b) or not a:
        raise RuntimeError(f"{len(a)} and {len(b)} losses")
    return max(abs(x - y) for x, y in zip(a, b))


# ---------------------------------------------------------------- a shard on one rank


def fsdp_part(here: Here) -> None:
    """train_fsdp.py's Sharded with one rank and a real process group against the replicated run."""
    kinds = {"dense": {}, "MoE": here.pick(KINDS["MoE"], FEW_EXPERTS)}
    for kind, model in kinds.items():
        ways = [(3, "fp32"), (3, "mixed_bf16"), (1, "fp32")]
        for stage, precision in here.pick(ways, ways[:1]):
            tried = (shard_distance, here, kind, model, stage, precision)
            name = f"{kind}, zero_stage {stage}, {precision}: loss against the replicated run"
            most = 1e-4 if precision == "fp32" else 0.02
            here.rows.attempt(name, *tried, unit="nats apart", most=most)


def shard_distance(here: Here, kind: str, model: dict, stage: int, precision: str) -> dict:
    keys = {"log_interval": 1, "save_interval": 0, "zero_stage": stage, "precision": precision}
    name = f"{kind}-{stage}-{precision}"
    whole = train(here, run_keys(here, f"replicated-{name}", model, keys))
    with process_group(here):
        config = run_keys(here, f"sharded-{name}", model, keys)
        # make_parallel would take the replicated model for one process
        parallel = functools.partial(train_fsdp.Sharded, layout=plan.Layout(1, stage))
        cut = train(here, config, parallel=parallel)
    return {"value": furthest(losses(whole), losses(cut)), "steps": cut.step}


@contextlib.contextmanager
def process_group(here: Here):
    """Of this process alone: NCCL for the GPU, gloo for objects and flags, as train.py has it."""
    backend = "cpu:gloo,cuda:nccl" if here.cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- whole models, generation, tests


def models_part(here: Here) -> None:
    """moe_124m by each backend, gpt2_124m with MoD, hybrid_124m: 16 rows, compiled (toy: not)."""
    try_it = functools.partial(try_step, here, compiled=not here.toy)
    for backend in here.usable(here.machine.compute_dtype, 768, 256, slices=False):
        try_it(f"moe_124m, {backend}", MOE, 16, backend=backend)
    try_it("gpt2_124m", GPT2, 16)
    try_it("gpt2_124m, MoD block, half of every 2nd layer", GPT2 | HALF, 16)
    ffn = GPT2 | HALF | {"mod_ffn_only": True}
    try_it("gpt2_124m, MoD FFN, half of every 2nd layer", ffn, 16)
    fast = here.usable(here.machine.compute_dtype, 768, 256)[-1]
    try_it(f"hybrid_124m, {fast}", HYBRID, 16, backend=fast)


def generation_part(here: Here) -> None:
    """Greedy tokens with the cache: right in fp32, then how fast at 124M."""
    here.rows.attempt("cached ids are those of recomputing", same_ids, here)
    for name, keys in {"gpt2_124m": GPT2, "moe_124m": MOE}.items():
        for batch in (1, 32):
            tried = (generation_speed, here, keys, batch)
            here.rows.attempt(f"{name}, batch {batch}", *tried, unit="tokens/s")


def model_to_decode(here: Here, keys: dict, dtype) -> Transformer:
    """As sample.load makes it: weights in the compute dtype, routers in fp32."""
    with torch.device(here.device):
        model = Transformer(ModelConfig(**here.pick(keys, SMALL | sparse_keys(keys))))
    bench_step.fill_quickly(model)
    for name, p in model.named_parameters():
        if role(name) != "router":
            p.data = p.data.to(dtype)
    model.compute_dtype = dtype
    return model.eval().requires_grad_(False)


def same_ids(here: Here) -> bool:
    model = model_to_decode(here, SMALL | {"max_seq_len": 256}, torch.float32)
    total = here.pick(128, 16)
    return bench.decode_cached(model, total) == bench.decode_recomputing(model, total)


def generation_speed(here: Here, keys: dict, batch: int) -> dict:
    model = model_to_decode(here, keys, here.machine.compute_dtype)
    new, best = here.pick(128, 8), {}
    for _ in range(2):  # the first warms up
        best = {}
        sample.sample(model, None, [[1, 2, 3]] * batch, new, temperature=0, stats=best)
    seconds = best["decode_seconds"]
    row = {"value": best["decode_tokens"] / seconds, "ms a step": 1e3 * seconds / (new - 1)}
    return row | {"prefill ms": 1e3 * best["prefill_seconds"]}


def tests_part(here: Here) -> None:
    """pytest -m gpu."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rf"]
    root = Path(__file__).resolve().parent.parent
    files = sorted(root.glob("tests/*/test_*.py"))
    words += [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]

    def run() -> dict:
        done = subprocess.run(words, cwd=root, env=os.environ, capture_output=True, text=True)
        print(done.stdout[-20000:], done.stderr[-2000:])
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            raise RuntimeError(f"{(failed or lines or ['?'])[-1]} ({len(failed)} failed)")
        return {"value": lines[-1].strip("= ")}

    here.rows.attempt("pytest -m gpu", run)
