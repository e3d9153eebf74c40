"""The measured numbers of README and docs. Every command prints the machine that it ran on.

Times are ratios of interleaved rounds in one run; a time made while something compiles is left out.

speed CONFIG [--max_steps N] [--key value]
    40 steps of a configuration, or N, without evaluation or saving: tokens/s, MFU, data wait.
decode [RUN]
    Cached decoding against recomputing the whole sequence for each token, same model, same ids.
kernels [--rounds N]
    The expert layer's backends against a dense SwiGLU of equal active width, and bytes kept.
step [--rounds N] [--no-peer] [--limit S]
    One training step of whole models: our MoE, our dense model of equal active size, and
    transformers' Qwen3Moe and Qwen3 in their fastest variant. --limit: seconds to compile one.
learn [--steps N] [--seeds N] [--threads N] [--only A,B] [--out DIR]
    Dense, MoE, MoD and hybrid at equal active parameters and tokens, from configs/quickstart.yaml.
    A run that --out holds already is not repeated.
layouts [--ranks N] [--rounds N] [--steps N] [--only A,B]
    What each key of train_fsdp.py costs and spares on the processes of this machine, and one
    process beside them: tokens/s, communication, bytes, memory.
faults [--only ROWS] [--kinds K] [--modes M] [--out FILE] [--table] [--quick] [--healthy N]
    The faults of tools/faults.py on two small models: what the orchestrator makes of each, against
    mode off and another trainer's rules.
gpu [PART ...]
    All that a GPU has to say in under ten minutes: tests, selftest, kernels, sync, slice, models,
    speed. `--device cpu` runs its logic at toy sizes. Its CUDA paths were never run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels as expert_kernels
import model_moe
from lumen import checkpoint, files, plan
from lumen import machine as machines
from lumen.cli import find_yaml, load_yaml
from lumen.config import Config
from lumen.errors import UserError, a_path, nearest
from lumen.launch import Words, command
from lumen.machine import compiled_so_far, free_memory, git_commit
from lumen.optim import build_optimizer, step_optimizer
from model import KVCache, ModelConfig, Transformer, role
from tools import faults, simulate
from train import Parallel, Trainer

# ---------------------------------------------------------------- what is measured

KERNELS = {  # tokens, d_model, an expert's width, experts, experts per token
    "toy": [(64, 32, 16, 4, 2)],
    "cpu": [(4096, 384, 512, 8, 2), (4096, 384, 64, 64, 8)],
    "cuda": [(32768, 1536, 512, 128, 10), (32768, 2048, 768, 128, 8)],
}
STEP = {
    "vocab_size": 8192,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "max_seq_len": 512,
}
GRAINS = {  # name: the MoE, and d_ff of the dense model with the same active width
    "8 experts of 512, top-2": ({"n_experts": 8, "n_experts_per_token": 2, "d_expert": 512}, 1024),
    "64 experts of 64, top-8": ({"n_experts": 64, "n_experts_per_token": 8, "d_expert": 64}, 512),
}
PAIRS = (
    ("our MoE", "our dense"),
    ("peer MoE", "peer dense"),
    ("peer MoE", "our MoE"),
    ("peer dense", "our dense"),
)
MOE = {"n_experts": 8, "n_experts_per_token": 2, "d_expert": 176}  # 2 x 176 is quickstart's d_ff
HALF = {"mod_capacity": 0.5, "mod_every": 2}
LEARN = {  # what each changes of quickstart's model
    "dense": {},
    "moe": MOE,
    "mod-ffn": {**HALF, "mod_ffn_only": True},
    "mod-block": HALF,
    "hybrid": {**MOE, **HALF, "mod_ffn_only": True},
}
TOY = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_seq_len": 32}
SMALL = {
    "vocab_size": 1024,
    "d_model": 256,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 512,
    "max_seq_len": 256,
}
SYNC = {  # no step of these may wait for the GPU
    "dense": {},
    "softmax": {"n_experts": 8, "d_expert": 64},
    "sigmoid, shared": {"n_experts": 8, "d_expert": 64, "router": "sigmoid", "n_shared_experts": 1},
    "slots, null": {"n_experts": 6, "d_expert": 64, "n_experts_max": 8, "n_null_experts": 2},
    "capacity": {"n_experts": 8, "d_expert": 64, "capacity_factor": 1.25},
    "MoD block": HALF,
    "MoE + MoD": {"n_experts": 8, "d_expert": 64, **HALF, "mod_ffn_only": True},
}
# four layers of the preset b1: 128 experts of 512, top-10, one shared
B1 = {
    "vocab_size": 50304,
    "d_model": 1536,
    "n_layers": 4,
    "n_heads": 12,
    "n_kv_heads": 4,
    "head_dim": 128,
}
B1 |= {
    "d_ff": 5632,
    "max_seq_len": 2048,
    "n_experts": 128,
    "n_experts_per_token": 10,
    "d_expert": 512,
}
B1 |= {"n_shared_experts": 1, "router": "sigmoid", "tie_embeddings": False}
WIDE = {
    "vocab_size": 50304,
    "d_model": 1024,
    "n_layers": 8,
    "n_heads": 16,
    "n_kv_heads": 4,
    "d_ff": 2816,
}
MODELS = {  # equal active width; step times on a GPU
    "dense": {},
    "MoE 64 x 352, top-8": {"n_experts": 64, "n_experts_per_token": 8, "d_expert": 352},
    "MoD FFN, half of every 2nd layer": {**HALF, "mod_ffn_only": True},
    "MoD block, half of every 2nd layer": HALF,
}
# a model of which the layouts of train_fsdp.py hold parts; 4 rows a process and micro-step
SPREAD = {
    "device": "cpu",
    "precision": "fp32",
    "compile_model": False,
    "batch_size": 4,
    "save_interval": 0,
    "seed": 1,
}
SPREAD |= {
    "eval_tokens": 1,
    "log_interval": 1000,
    "orchestrator": {"mode": "off"},
    "expert_backend": "slices",
}
SPREAD["model"] = {
    "vocab_size": 4096,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "d_ff": 1024,
    "max_seq_len": 256,
}
SPREAD["model"] |= {"n_experts": 8, "n_experts_per_token": 2, "d_expert": 256, "n_dense_layers": 1}
LAYOUTS = {
    "whole copies (train.py)": {"zero_stage": 0},
    "zero_stage 3": {"zero_stage": 3},
    "zero_stage 2": {"zero_stage": 2},
    "zero_stage 1": {"zero_stage": 1},
    "expert_parallel 2": {"zero_stage": 3, "expert_parallel": 2},
    "hsdp_shard_size 2": {"zero_stage": 3, "hsdp_shard_size": 2},
    "activation_checkpointing selective": {
        "zero_stage": 3,
        "activation_checkpointing": "selective",
    },
    "activation_checkpointing full": {"zero_stage": 3, "activation_checkpointing": "full"},
    "reduce_dtype bf16": {"zero_stage": 3, "reduce_dtype": "bf16"},
    "mixed_bf16": {"zero_stage": 3, "precision": "mixed_bf16"},
}
# parts of the gpu command: seconds that each may take, and all together
PARTS = {
    "tests": 90,
    "selftest": 90,
    "kernels": 100,
    "sync": 60,
    "slice": 110,
    "models": 120,
    "speed": 150,
}
GPU_SECONDS = 570

# ---------------------------------------------------------------- common parts


def options(words: list[str], **known) -> argparse.Namespace:
    """`--name value` of the default's type; False: a flag; None: the words without `--`, a list."""
    parser = Words(prog="tools.bench", add_help=False)
    for name, default in known.items():
        if default is None:
            parser.add_argument(name, nargs="*", type=a_path, default=[])
        elif default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    found = parser.parse_intermixed_args(words)
    if getattr(found, "size", "") not in ("", *KERNELS):
        raise UserError(
            "E002",
            f"command line: tools.bench: --size: {found.size!r} is not one of {', '.join(KERNELS)}",
        )
    return found


def machine_line(m: machines.Machine | None = None) -> str:
    """Hardware, flags, measured peak, versions, commit, date: printed with every number."""
    m = m or machines.detect()
    peak = machines.human_number(machines.matrix_peak(m.device, m.compute_dtype, 1.0), "FLOP/s")
    flags = " ".join(machines.cpu_flags())
    text = f"{m.device.type} {m.name} ({flags}), {torch.get_num_threads()} threads,"
    text += f" {m.precision} matrices {peak}, torch {torch.__version__}"
    return f"{text}, commit {git_commit()}, {time.strftime('%Y-%m-%d')}"


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"median {statistics.median(values):.4g} (n {len(values)}, {low:.4g} to {high:.4g})"


def seconds_of(run, wait) -> float:
    """Of one run(); one in which something was compiled does not count and is done again."""
    for _ in range(8):
        wait()
        before, began = compiled_so_far(), time.perf_counter()
        run()
        wait()
        seconds = time.perf_counter() - began
        if compiled_so_far() == before:
            return seconds
    raise RuntimeError("something was compiled in each of 8 runs: there is no time to tell")


def interleaved(runs: dict, rounds: int, device, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run in each round; the runs take turns, so that a busy machine is slow for
    all of them."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    times = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        for name, run in runs.items():
            seconds = seconds_of(run, wait)
            if i >= warm_up:
                times[name].append(seconds)
    return times


def mfu(rates: list[float], m: machines.Machine, peak: float) -> str:
    """FLOP/s as shares of `peak`. Above 100 % it was measured while the machine was busy: it is
    measured again, in this process, its dtype and its threads; where that does not help there is
    no MFU, and the reason."""
    if max(rates) > peak:
        peak = max(peak, machines.matrix_peak(m.device, m.compute_dtype, 1.0))
    if max(rates) > peak:
        peak = machines.human_number(peak, "FLOP/s")
        rate = machines.human_number(max(rates), "FLOP/s")
        return f"- ({rate} is above the peak, {peak}: was the machine busy?)"
    return (
        spread([rate / peak for rate in rates])
        if len(rates) > 1
        else f"{100 * rates[0] / peak:.1f} %"
    )


def ratio(a: list[float], b: list[float]) -> str:
    """How many times as long a takes as b: in each round, and best against best."""
    return f"{spread([x / y for x, y in zip(a, b)])}, best against best {min(a) / min(b):.3f}"


def said(error: BaseException) -> str:
    """An error of somebody's code on one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def forget_graphs() -> None:
    """Give back what compiled graphs and dead models hold."""
    torch.compiler.reset()
    free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def time_limit(seconds: float):
    """TimeoutError after so many seconds (in the main thread, where signals are)."""

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ours:
    """One optimizer step of our model on random ids, a call, from the trainer's own parts.

    The learning rate is 0: the same work, and the routing of the first step, in all rounds.
    """

    def __init__(self, model: ModelConfig, machine, rows: int, compiled=False, backend="auto"):
        cfg = Config(model=model, batch_size=rows, device=str(machine.device), learning_rate=0.0)
        self.cfg, self.machine, self.parallel = cfg, machine, Parallel(cfg)
        with torch.device(machine.device):
            self.model = Transformer(model)
        fill_quickly(self.model)
        self.model.compute_dtype = machine.compute_dtype
        self.moe = list(self.model.sparse_layers("moe").values())
        self.name = "compiled" if compiled else "eager"
        self.tokens = rows * model.max_seq_len
        if self.moe:
            shape = (model.d_model, model.d_expert, model.n_experts, model.n_experts_per_token)
            place = (machine.device, machine.compute_dtype)
            picked, _ = expert_kernels.pick_backend(backend, *place, *shape, self.tokens)
            for moe in self.moe:
                moe.backend = picked
            self.name = f"{picked}, {self.name}"
        if compiled:
            torch.compiler.config.recompile_limit = 64
            for block in self.model.blocks:
                block.compile()
        self.optimizer = build_optimizer(cfg, dict(self.model.named_parameters()))
        self.x, self.y = batch(model, rows, machine.device)
        self.model.train()

    def __call__(self) -> torch.Tensor:
        """Returns the mean loss, on the device."""
        on_cpu = self.machine.device.type == "cpu"
        torch.use_deterministic_algorithms(on_cpu)  # what `deterministic: auto` means
        torch.utils.deterministic.fill_uninitialized_memory = False
        model, parallel = self.model, self.parallel
        total, sums = model(self.x, targets=self.y)
        (total / self.tokens).backward()
        stats = torch.stack([sums["ce"], sums["z"], sums["count"]]).double()
        ce, _, count = parallel.reduce(model, stats)
        factor = (self.tokens / count).float()
        norm = parallel.grad_norm(model) * factor
        bad = ~(torch.isfinite(ce) & torch.isfinite(norm))
        clip = (self.cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        step_optimizer(self.optimizer, list(model.parameters()), clip * factor, bad)
        if self.moe:
            model_moe.update_balance(self.moe, sums["moe.counts"], bad)
        return ce / count


@torch.no_grad()
def fill_quickly(model: Transformer) -> None:
    """Initial weights drawn on the device: init_weights draws on the CPU, which takes long for a
    billion numbers."""
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(1.0)
        elif "predictor" in name:
            p.zero_()
        else:
            p.normal_(0, model.cfg.init_std)


class Peer:
    """The same step of transformers' Qwen3Moe or Qwen3: fused AdamW, fp32 masters, clipping, no
    router losses.

    precision: fp32; autocast (bf16 by torch.autocast); masters (a bf16 model beside fp32 weights in
    the optimizer).
    """

    def __init__(
        self,
        model: ModelConfig,
        machine,
        rows: int,
        compiled=False,
        experts="eager",
        precision="fp32",
    ):
        import transformers

        kind = "Qwen3Moe" if model.n_experts else "Qwen3"
        config = getattr(transformers, f"{kind}Config")(**peer_keys(model))
        with torch.device(machine.device):
            self.model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
        if model.n_experts:
            self.model.set_experts_implementation(experts)
        self.masters = list(self.model.parameters())
        if precision == "masters":
            self.masters = [p.detach().clone() for p in self.masters]
            self.model.bfloat16()
        self.params = list(self.model.parameters())
        self.precision, self.device = precision, machine.device
        if compiled:
            self.model.compile()
        words = [experts] if model.n_experts else []
        self.name = ", ".join([*words, precision, "compiled" if compiled else "eager"])
        betas = (0.9, 0.95)
        self.optimizer = torch.optim.AdamW(self.masters, 0.0, betas, weight_decay=0.1, fused=True)
        self.x, self.y = batch(model, rows, machine.device)
        self.tokens = rows * model.max_seq_len

    def __call__(self) -> torch.Tensor:
        torch.use_deterministic_algorithms(False)
        autocast = self.precision == "autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            loss = self.model(input_ids=self.x, labels=self.y, shift_labels=self.y).loss
        loss.backward()
        if self.precision == "masters":
            for master, p in zip(self.masters, self.params):
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.precision == "masters":
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)
        return loss.detach()


def peer_keys(model: ModelConfig) -> dict:
    """Our shape in transformers' words."""
    keys = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.d_ff,
        "use_cache": False,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.n_experts:
        keys["num_experts"] = model.n_experts
        keys["moe_intermediate_size"] = model.d_expert
        keys["num_experts_per_tok"] = model.n_experts_per_token
        keys["norm_topk_prob"] = model.norm_topk
        keys["output_router_logits"] = False
    return keys


def batch(model: ModelConfig, rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(
        model.vocab_size, (rows, model.max_seq_len + 1), generator=torch.Generator().manual_seed(0)
    )
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def fastest(name: str, variants: list, limit: float, device):
    """Build each variant (a function) and time two of its steps; returns the fastest, still built,
    or None."""
    best, best_time = None, math.inf
    for label, make, compiled in variants:
        if compiled and (not limit or not machines.find_compiler()):
            continue
        made = None
        try:
            with time_limit(limit if compiled else 600):
                made = make()
                loss = made().item()  # compiles, warms up
                seconds = min(interleaved({"": made}, 2, device, warm_up=0)[""])
            print(f"  {name}, {label}: {1e3 * seconds:.0f} ms, loss {loss:.4f}", flush=True)
            if seconds < best_time:
                best, best_time = made, seconds
        except (
            Exception
        ) as error:  # a variant of somebody's code that does not work here is said, not fatal
            print(f"  {name}, {label}: left out: {said(error)}", flush=True)
        made = None
        gc.collect()
    return best


# ---------------------------------------------------------------- the trainer's speed, and decoding


def speed(words: list[str]) -> int:
    """Train some steps of a configuration into a temporary folder, in about ten parts: the first
    two are warm-up, and those in which something was compiled are left out."""
    parser = Words(prog="tools.bench speed", add_help=False)
    parser.add_argument("--max_steps", "--max-steps", type=int, default=40)
    o, words = parser.parse_known_args(words)
    if o.max_steps < 3:
        raise UserError(
            "E002",
            f"speed: --max_steps {o.max_steps} is too few: the first two are warm-up; from 3 on",
        )
    fixed = {
        "save_interval": 0,
        "val_fraction": 0,
        "log_interval": max(1, o.max_steps // 10),
        "sample_prompt": "null",
    }
    fixed |= {"resume": "none", "overwrite": "true"}
    typed = {
        word.lstrip("-").partition("=")[0].replace("-", "_")
        for word in words
        if word.startswith("--")
    }
    if given := sorted(typed & {"out_dir", "eval_interval", "eval_tokens", *fixed}):
        raise UserError(
            "E002",
            f"speed: it trains without evaluation or saving, so it takes no {', '.join(given)}",
        )
    with tempfile.TemporaryDirectory() as folder:
        fixed |= {"max_steps": o.max_steps, "out_dir": folder}
        trainer = Trainer([*words, *(f"--{key}={value}" for key, value in fixed.items())])
        trainer.save = lambda *args, **kw: True
        rows = []
        trainer.record = lambda row: rows.append(row | {"compiled": compiled_so_far()})
        trainer.fit()
    rows = [r for r in rows if "loss" in r]
    clean = [r for last, r in zip(rows[1:], rows[2:]) if r["compiled"] == last["compiled"]]
    print(machine_line(trainer.machine))
    if dirty := len(rows[2:]) - len(clean):
        print(f"left out: {dirty} of {len(rows[2:])} parts, in which something was compiled")
    if not clean:
        print("tokens/s  - (something was compiled in all of them; more --max_steps)")
        return 0
    flops = (
        trainer.model.flops_per_token() / trainer.parallel.world
    )  # now: MoD's capacity may have been annealed
    rates = [r["tokens_per_second"] * flops for r in clean]
    sheet = machines.data_sheet(trainer.machine.name) and trainer.machine.precision != "fp32"
    print("tokens/s  " + spread([r["tokens_per_second"] for r in clean]))
    kind = "of the data sheet's peak" if sheet else "of the measured matrix peak"
    print(f"mfu       {mfu(rates, trainer.machine, trainer.peak)} {kind}")
    print("data wait " + spread([r["data_wait"] for r in clean]) + " of the step")
    return 0


def decode(words: list[str]) -> int:
    """512 greedy tokens with the cache, and without; a random 8.9 M model unless a run is given."""
    if words:
        saved = checkpoint.find(words[0])
        model = Transformer(saved.model_config())
        model.load_state_dict(saved.model_state())
    else:
        model = Transformer(
            ModelConfig(
                vocab_size=8192, d_model=256, n_layers=8, n_heads=4, d_ff=704, max_seq_len=1024
            )
        )
        model.init_weights(0)
    model.eval()
    total = min(512, model.cfg.max_seq_len)

    @torch.inference_mode()
    def recompute() -> list[int]:
        ids = torch.tensor([[1]])
        for _ in range(total - 1):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[0, 1:].tolist()

    def cached() -> list[int]:
        with torch.inference_mode():
            return [row[0] for row in model.generate([[1]], total - 1, [0], temperature=0)]

    @torch.inference_mode()
    def last_token() -> tuple[float, float]:
        """Seconds of the last of `total` tokens, recomputed and cached: best of 5 each."""
        row, cache, best = (
            torch.tensor([ids[cached]]),
            KVCache(model.cfg, 1, total + 5),
            [math.inf, math.inf],
        )
        model(row, cache=cache)
        for _ in range(5):
            for k, run in enumerate((lambda: model(row), lambda: model(row[:, -1:], cache=cache))):
                began = time.perf_counter()
                run()
                best[k] = min(best[k], time.perf_counter() - began)
        return tuple(best)

    times = {recompute: [], cached: []}
    ids = {}
    for _ in range(3):
        for run in times:
            began = time.perf_counter()
            ids[run] = run()
            times[run].append(time.perf_counter() - began)
    print(machine_line())
    n, same = model.n_params()["total"], ids[recompute] == ids[cached]
    print(f"model {n:,} parameters, {total} tokens; same ids: {same}")
    print("recompute s " + spread(times[recompute]))
    print(
        "cached    s "
        + spread(times[cached])
        + f", {(total - 1) / min(times[cached]):.0f} tokens/s at best"
    )
    print(
        "ratio       "
        + spread([a / b for a, b in zip(times[recompute], times[cached])])
        + " over the whole generation"
    )
    at_end = [last_token() for _ in range(5)]
    slow, fast = (min(t) * 1e3 for t in zip(*at_end))
    print(f"at the end  {slow:.1f} ms recomputed, {fast:.2f} ms cached")
    print("ratio       " + spread([a / b for a, b in at_end]) + f" at {total} tokens")
    return 0


# ---------------------------------------------------------------- expert layer


def kept_bytes(run, leave_out: list[torch.Tensor]) -> int:
    """Bytes that the graph of run() keeps for backward, each storage once, without those of
    `leave_out`."""
    seen, out = {t.untyped_storage().data_ptr() for t in leave_out}, []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            out.append(storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    del y
    return sum(out)


def kernels(words: list[str]) -> int:
    """Forward, and forward + backward, of one expert layer with given routing; weights as the
    trainer has them, in fp32 and cast by the layer, and where that differs once more in the
    compute dtype, as others measure."""
    o = options(words, rounds=10, device="auto", size="")
    m = machines.detect(o.device)
    print(machine_line(m))
    for shape in KERNELS[o.size or ("cuda" if m.device.type == "cuda" else "cpu")]:
        for weights in dict.fromkeys((torch.float32, m.compute_dtype)):
            print(
                "T {}, d {}, I {}, E {}, K {}".format(*shape)
                + f", x {m.compute_dtype}, weights {weights}",
                flush=True,
            )
            try:
                kernel_shape(m, shape, weights, o.rounds)
            except Exception as error:  # the next shape may work
                print(f"  left out: {said(error)}")
            forget_graphs()
    return 0


def kernel_shape(m: machines.Machine, shape: tuple, weights: torch.dtype, rounds: int) -> None:
    """One shape: first whether the backends agree, then what each costs beside a dense SwiGLU."""
    (T, C, I, _, K), dtype = shape, m.compute_dtype
    (x, p, ids, w13, w2), dout = expert_kernels.sample(m.device, dtype, *shape)
    w13, w2 = (w.detach().to(weights).requires_grad_() for w in (w13, w2))
    dense13 = torch.randn((2 * K * I, C), device=m.device, dtype=weights) * C**-0.5
    dense2 = torch.randn((C, K * I), device=m.device, dtype=weights) * (K * I) ** -0.5
    dense13, dense2 = dense13.requires_grad_(), dense2.requires_grad_()

    def dense():
        gate, up = F.linear(x, dense13.to(dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, dense2.to(dtype))

    layers, inputs = {"dense": dense}, {"dense": [x, dense13, dense2]}
    for name, why in reversed(expert_kernels.backends(m.device, dtype, C, I).items()):
        if why:
            print(f"  {name}: left out: ValueError: {why}")
            continue
        layers[name] = functools.partial(expert_kernels.run_experts, x, p, ids, w13, w2, name)
        inputs[name] = [x, p, w13, w2]
    for name in disagreeing(layers, inputs, dout):
        del layers[name]

    def with_backward(name):
        return torch.autograd.grad(layers[name](), inputs[name], dout)

    both = {name: functools.partial(with_backward, name) for name in layers}
    forward = interleaved(layers, rounds, m.device, 2)
    both = interleaved(both, rounds, m.device, 2)
    flops, formula = 6 * T * C * K * I, dout.element_size() * (T * C + 2 * T * K * I)
    for name in layers:
        a, b = min(forward[name]), min(both[name])
        kept = kept_bytes(layers[name], [w13, w2, dense13, dense2])
        text = f"forward {machines.human_number(flops / a, 'FLOP/s')}, {1e3 * a:.2f} ms; with"
        text += f" backward {machines.human_number(3 * flops / b, 'FLOP/s')}, {1e3 * b:.2f} ms"
        print(f"  {name:<10} {text}; keeps {kept / 2**20:.1f} MiB")
        if name != "dense":
            print(f"    time against dense: forward {ratio(forward[name], forward['dense'])}")
            text = f"    with backward {ratio(both[name], both['dense'])}"
            print(f"{text}; kept is {kept / formula:.3f} of 2Td + 4TKI")


def disagreeing(layers: dict, inputs: dict, dout) -> list[str]:
    """Says how far outputs and gradients of the backends are from the first's; returns those that
    fail."""
    failed, first = [], None
    for name, layer in layers.items():
        if name == "dense":
            continue
        try:
            y = layer()
            values = [y.detach(), *torch.autograd.grad(y, inputs[name], dout)]
        except Exception as error:  # somebody's kernel that does not work here
            print(f"  {name}: left out: {said(error)}")
            failed.append(name)
            continue
        first = first or (name, values)
        errors = []
        for a, b in zip(values, first[1]):
            errors.append(((a.float() - b.float()).norm() / b.float().norm()).item())
        text = f"  {name}: differs from {first[0]} by {max(errors):.1e}"
        print(f"{text} (output and all gradients)", flush=True)
    return failed


# ---------------------------------------------------------------- whole models


def step(words: list[str]) -> int:
    """Our MoE and dense model and, in its fastest variant, transformers' of the same shapes: one
    training step."""
    import torch._inductor.config as inductor

    o = options(words, rounds=7, no_peer=False, limit=120.0, device="auto", size="")
    # a compilation that is given up must not go on beside the measurement
    inductor.compile_threads = 1
    m = machines.detect(o.device)
    print(machine_line(m))
    peer = not o.no_peer and peer_is_there()
    shape, rows = (TOY, 2) if o.size == "toy" else (STEP, 8)
    model = f"{shape['n_layers']} x {shape['d_model']}"
    for grain, (moe, d_ff) in GRAINS.items():
        print(f"{grain}; {model}, {rows} rows x {shape['max_seq_len']} tokens")
        built = {}
        for kind, keys in (("MoE", moe), ("dense", {})):
            cfg = ModelConfig(**shape | keys | {"d_ff": d_ff})
            tries = []
            for compiled in (False, True):
                label = "compiled" if compiled else "eager"
                tries.append((label, functools.partial(Ours, cfg, m, rows, compiled), compiled))
            built[f"our {kind}"] = fastest(f"our {kind}", tries, o.limit, m.device)
            if peer:
                tries = peer_variants(cfg, m, rows)
                built[f"peer {kind}"] = fastest(f"peer {kind}", tries, o.limit, m.device)
        built = {name: made for name, made in built.items() if made is not None}
        times = interleaved(built, o.rounds, m.device)
        for name, made in built.items():
            print(f"  {name:<10} {step_text(made, times[name])}")
        for a, b in PAIRS:
            if a in times and b in times:
                print(f"  {a} / {b}: time {ratio(times[a], times[b])}")
        built = made = None
        forget_graphs()
    return 0


def step_text(made, times: list[float]) -> str:
    n, best = sum(p.numel() for p in made.model.parameters()), min(times)
    speed = machines.human_number(made.tokens / best)
    text = f"{1e3 * best:.0f} ms, {speed} tokens/s at best; s {spread(times)}"
    return f"{text}; {n:,} parameters; {made.name}"


def peer_is_there() -> bool:
    try:
        import transformers
    except ImportError:
        print("no peer: transformers is not installed")
        return False
    print(f"peer: transformers {transformers.__version__}")
    return True


def peer_variants(cfg: ModelConfig, m: machines.Machine, rows: int) -> list:
    """(label, function, compiled?) of every way to run transformers' model that fits here."""
    names, variants = [""], []
    if cfg.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    precisions = ["fp32"]
    if m.device.type == "cuda" or machines.cpu_has_bf16():
        precisions += ["autocast", "masters"]
    # batched_mm copies the weights of its expert for every choice of every token, and keeps them
    # for backward
    choices = rows * cfg.max_seq_len * cfg.n_experts_per_token * cfg.n_layers
    copies = 4 * choices * 3 * cfg.d_model * cfg.d_expert
    for name in names:
        if name == "batched_mm" and copies > machines.total_memory(m.device) / 2:
            text = f"it would keep {copies / 2**30:.0f} GiB of copied weights"
            print(f"  peer MoE, {name}: left out: {text}")
            continue
        for precision in precisions:
            for compiled in (False, True):
                words = [name, precision, "compiled" if compiled else "eager"]
                make = functools.partial(Peer, cfg, m, rows, compiled, name, precision)
                variants.append((", ".join(filter(None, words)), make, compiled))
    return variants


# ---------------------------------------------------------------- learning


def learn(words: list[str]) -> int:
    """One file per run in --out (two processes may share it, --only says who does what); then the
    table, with the time of a step measured for all variants in turns."""
    o = options(words, steps=0, seeds=3, threads=1, rounds=9, only="", out="out/learn")
    out, only = Path(o.out), o.only.split(",") if o.only else list(LEARN)
    if unknown := [name for name in only if name not in LEARN]:
        raise UserError("E002", f"--only: no {', '.join(unknown)}; there are: {', '.join(LEARN)}")
    torch.set_num_threads(o.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("E108", f"--out {out}: {error.strerror}") from error
    line = machine_line()
    for seed in range(o.seeds):
        for name in only:
            tree = load_yaml(find_yaml("quickstart"))[0]
            tree |= {
                "seed": 1337 + seed,
                "max_steps": o.steps or tree["max_steps"],
                "save_interval": 0,
            }
            tree |= {
                "sample_prompt": None,
                "compile_model": False,
                "resume": "none",
                "expert_backend": "slices",
            }
            tree["model"] |= LEARN[name]
            path, keys = out / f"{name}-{1337 + seed}.json", json.loads(json.dumps(tree))
            with contextlib.suppress(OSError, ValueError):
                if json.loads(path.read_text())["keys"] == keys:
                    continue
            row = train_once(tree, path.with_suffix(".log")) | {
                "variant": name,
                "seed": 1337 + seed,
                "keys": keys,
            }
            files.write_json(path, row | {"threads": o.threads, "machine": line})
            print(f"{time.strftime('%T')} {path}: val_loss {row['val_loss']:.4f}", flush=True)
    rows = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    if set(LEARN) <= {r["variant"] for r in rows}:
        built, m = {}, machines.detect("cpu", tree.get("precision", "auto"))
        for name, changes in LEARN.items():
            model = ModelConfig(
                **{"vocab_size": 2048} | load_yaml(find_yaml("quickstart"))[0]["model"] | changes
            )
            built[name] = Ours(model, m, tree["batch_size"], backend="slices")
        times = interleaved(built, o.rounds, "cpu")
        print(
            "\n".join(
                f"step of {name}, time against dense: {ratio(t, times['dense'])}"
                for name, t in times.items()
            )
        )
        for r in (r for r in rows if r["variant"] in times):
            r["tokens_per_second"] = built["dense"].tokens / min(times[r["variant"]])
    print(line)
    print("\n".join(learn_table(rows)))
    return 0


def train_once(tree: dict, log: Path) -> dict:
    """Train the configuration into a temporary folder; the numbers of its end."""
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(log, "w", encoding="utf-8") as f:
        with contextlib.redirect_stdout(f):
            trainer = Trainer(tree | {"out_dir": folder})
            trainer.record = rows.append
            trainer.fit()
        if trainer.step < trainer.run.max_steps:  # a signal: what it asked to stop is all of it
            raise KeyboardInterrupt
    last = next(row for row in reversed(rows) if "val_loss" in row)
    names = ("val_loss", "val_bpb", "val_loss_as_trained", "mod_gap", "mod_agreement", "mod_depth")
    n, speeds = trainer.model.n_params(), [row.get("tokens_per_second") for row in rows]
    named = trainer.model.named_parameters()
    return {name: last.get(name) for name in names} | {
        "total": n["total"],
        "active": n["active"],
        "flops_per_token": trainer.flops_per_token,
        "router": sum(p.numel() for name, p in named if role(name) == "router"),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "tokens_per_second": statistics.median(filter(None, speeds)),
        "seconds": time.perf_counter() - began,
    }


def learn_table(rows: list[dict]) -> list[str]:
    """A markdown table, a line per variant; runs of another length than most are left out."""
    if not rows:
        return ["no runs"]
    steps = statistics.mode(row["steps"] for row in rows)
    same = [row for row in rows if row["steps"] == steps]
    text = f"{steps} steps, {same[0]['tokens']:,} tokens each. Val loss: mean (lowest to highest)"
    text += " over seeds, for MoD by the causal rule; gap: what the rule of training, which looks"
    titles = [
        "variant",
        "n",
        "val loss",
        "bits per byte",
        "gap",
        "total",
        "active",
        "of it routers",
    ]
    titles += ["FLOP a token", "tokens/s"]
    lines = [f"{text} ahead, would gain.", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in dict.fromkeys([*LEARN, *(row["variant"] for row in rows)]):
        mine = [row for row in same if row["variant"] == name]
        if mine:
            lines.append(learn_row(name, mine))
    others = [row for row in rows if row["steps"] != steps]
    if others:
        names = [f"{row['variant']} {row['seed']} ({row['steps']} steps)" for row in others]
        lines.append(f"left out: {', '.join(names)}")
    return lines


def learn_row(name: str, mine: list[dict]) -> str:
    def mean(key, form):
        if mine[0][key] is None:
            return "-"
        return format(statistics.mean(row[key] for row in mine), form)

    first, loss = mine[0], [row["val_loss"] for row in mine]
    speed = statistics.median(row["tokens_per_second"] for row in mine)
    cells = [name, len(mine), f"{mean('val_loss', '.4f')} ({min(loss):.4f} to {max(loss):.4f})"]
    cells += [mean("val_bpb", ".4f"), mean("mod_gap", "+.4f")]
    cells += [f"{first[key]:,}" for key in ("total", "active", "router")]
    cells += [machines.human_number(first["flops_per_token"]), machines.human_number(speed)]
    return f"| {' | '.join(map(str, cells))} |"


# ---------------------------------------------------------------- a GPU in ten minutes


def gpu(words: list[str]) -> int:
    """Each part is a process of its own with a time limit: a fault in a kernel ends a CUDA context,
    not the command."""
    o = options(words, parts=None, device="cuda", inside=False)
    if unknown := [p for p in o.parts if p not in PARTS]:
        raise UserError("E002", f"gpu: no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    m = machines.detect(o.device)  # E003 without such a device
    toy = m.device.type == "cpu"
    if o.inside:
        return {"sync": sync_check, "slice": slice_step, "models": model_steps}[o.parts[0]](m, toy)
    print(machine_line(m), flush=True)
    here = [sys.executable, "-m", "tools.bench"]
    run = {
        name: [*here, "gpu", name, "--device", o.device, "--inside"]
        for name in ("sync", "slice", "models")
    }
    run["tests"] = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--durations=5",
    ]
    run["selftest"] = [sys.executable, "kernels.py", "--selftest"]
    run["kernels"] = [*here, "kernels", "--device", o.device, *(("--size", "toy") if toy else ())]
    run["speed"] = [*here, "speed", *(("quickstart", "--device", "cpu") if toy else ("gpt2_124m",))]
    until, failed = time.perf_counter() + GPU_SECONDS, []
    for name in o.parts or PARTS:
        began = time.perf_counter()
        left = min(PARTS[name], until - began)
        print(f"\n== {name}", flush=True)
        try:
            where = {
                "cwd": Path(__file__).resolve().parent.parent,
                "env": os.environ | {"TRITON_INTERPRET": "0"},
            }
            code = subprocess.run(run[name], timeout=max(1, left), **where).returncode
            text = {0: "done", 5: "no tests" if name == "tests" else "failed (5)"}.get(
                code, f"FAILED ({code})"
            )
        except subprocess.TimeoutExpired:
            text = f"FAILED (not done after {left:.0f} s)"
        failed += [name] * text.startswith("FAILED")
        print(f"== {name}: {text}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def sync_check(m: machines.Machine, toy: bool) -> int:
    """Steps under set_sync_debug_mode("error"), which makes every wait for the GPU an error."""
    failed, cuda = 0, m.device.type == "cuda"
    for name, keys in SYNC.items():
        cfg, tries = ModelConfig(**(TOY if toy else SMALL) | keys), [("auto", False)]
        if (
            cfg.n_experts
        ):  # slices ask how long each slice is: they must wait, and are left out on a GPU
            there = expert_kernels.backends(m.device, m.compute_dtype, cfg.d_model, cfg.d_expert)
            tries = [
                (b, False)
                for b, why in there.items()
                if why is None and not (cuda and b == "slices")
            ]
        if name in ("softmax", "MoE + MoD"):  # compiling takes long
            tries += [(b, True) for b, _ in tries] if cuda else []
        for backend, compiled in tries:
            try:
                run = Ours(cfg, m, 2, compiled, backend)
                for _ in range(3):
                    run()
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                run()
                print(f"  {name}: {run.name}: no sync", flush=True)
            except Exception as error:
                failed = 1
                print(
                    f"  {name}: {backend}{', compiled' * compiled}: FAILED: {said(error)}",
                    flush=True,
                )
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
    return failed


def fitting(cfg: ModelConfig, m: machines.Machine, rows: list[int]) -> Ours:
    """The model with the first of these batches that fits, after three steps; compiled on a GPU."""
    for n in rows:
        try:
            run = Ours(cfg, m, n, m.device.type == "cuda")
            for _ in range(3):
                run()
            return run
        except torch.OutOfMemoryError as error:
            print(f"  {n} rows: {said(error)}", flush=True)
        run = None
        gc.collect()
        torch.cuda.empty_cache()
    raise UserError("E200", f"not even {rows[-1]} rows fit")


def tell(run: Ours, times: list[float], peak: float) -> str:
    """Step time, speed, and MFU by the data sheet's and by the measured matrix peak."""
    m, best, n = run.machine, min(times), run.model.n_params()
    speed = run.tokens / best
    rate = speed * run.model.flops_per_token()
    by_sheet, by_peak = mfu([rate], m, machines.peak_flops(m)), mfu([rate], m, peak)
    text = f"{1e3 * best:.1f} ms for {run.tokens:,} tokens ({spread([1e3 * t for t in times])}),"
    text += f" {machines.human_number(speed)} tokens/s, MFU {by_sheet} (of the measured peak"
    return f"{text} {by_peak}); {n['total']:,} parameters, {n['active']:,} active; {run.name}"


def slice_step(m: machines.Machine, toy: bool) -> int:
    """Four layers of b1: step time, MFU, memory."""
    cfg = ModelConfig(
        **TOY | {"n_experts": 8, "n_shared_experts": 1, "router": "sigmoid"} if toy else B1
    )
    peak = machines.matrix_peak(m.device, m.compute_dtype, 1.0)
    run = fitting(cfg, m, [2] if toy else [16, 8, 4, 2, 1])
    if m.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = interleaved({"": run}, 3 if toy else 15, m.device)[""]
    print("  " + tell(run, times, peak))
    if m.device.type == "cuda":
        print(f"  memory at the peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return 0


def model_steps(m: machines.Machine, toy: bool) -> int:
    """Dense, MoE and MoD of equal active width, interleaved."""
    runs, peak = {}, machines.matrix_peak(m.device, m.compute_dtype, 1.0)
    for name, keys in MODELS.items():
        try:
            runs[name] = fitting(
                ModelConfig(**TOY | keys | {"d_expert": 8} if toy else WIDE | keys),
                m,
                [2 if toy else 16],
            )
        except Exception as error:
            print(f"  {name}: {said(error)}", flush=True)
    times = interleaved(runs, 3 if toy else 10, m.device)
    for name, run in runs.items():
        print(f"  {name}: {tell(run, times[name], peak)}")
        if name != "dense" and "dense" in times:
            print(f"    time against dense {ratio(times[name], times['dense'])}")
    return 0 if len(runs) == len(MODELS) else 1


# ---------------------------------------------------------------- faults


def fault_table(words: list[str]) -> int:
    """The runs that --out does not hold yet, then the table. --quick: six rows, dense, act; exit
    code 1 where one is not as expected. --healthy N: until the file holds N steps without a
    fault."""
    known = {"only": "", "modes": "", "kinds": "", "out": "out/faults.json"}
    o = options(words, **known, table=False, quick=False, healthy=0)
    results = faults.run(o)
    lines, wrong = faults.fault_table(results.data["runs"])
    print("\n".join([machine_line(), *lines, *faults.healthy_table(results.data["healthy"])]))
    return 1 if o.quick and wrong else 0


# ---------------------------------------------------------------- what a layout costs


def layouts(words: list[str]) -> int:
    """Each layout is a launch of its own, in turns, a thread a process; one more launch of each for
    its memory."""
    o = options(words, ranks=2, rounds=3, steps=12, only="", inside="")
    if o.inside:
        return layout_run(json.loads(Path(o.inside).read_text()))
    chosen = chosen_layouts(o.only, o.ranks)
    runs = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as top:
        faults.corpus(Path(top, "data"))
        for n in range(o.rounds + 1):  # the first looks at memory, and is not timed
            for name, changes in chosen.items():
                ranks = 1 if name == ONE_PROCESS else o.ranks
                steps = o.steps if n else 4
                row = launch_layout(top, name, changes, ranks, steps, memory=n == 0)
                runs[name].append(row)
                print(f"{time.strftime('%T')} {name}: {row['seconds']:.2f} s a step", flush=True)
    print(machine_line())
    print("\n".join(layout_table(runs, o.ranks, o.rounds)))
    return 0


ONE_PROCESS = "one process"


def chosen_layouts(only: str, ranks: int) -> dict[str, dict]:
    """name: keys, of what this machine can do, or of what --only names. E002."""
    every = {ONE_PROCESS: {}} | LAYOUTS
    names = only.split(",") if only else list(every)
    if unknown := [name for name in names if name not in every]:
        text = f"layouts: no {', '.join(unknown)}; there are: {', '.join(every)}"
        raise UserError("E002", text)
    if only:
        return {name: every[name] for name in names}
    left_out = set()
    if ranks < 4:
        left_out.add("hsdp_shard_size")
    if not machines.cpu_has_bf16():
        left_out.add("precision")
        text = "mixed_bf16 is left out: this CPU has no units for it; --only mixed_bf16 measures it"
        print(f"{text} all the same")
    return {name: keys for name, keys in every.items() if not left_out & keys.keys()}


def launch_layout(top: str, name: str, changes: dict, ranks: int, steps: int, memory: bool) -> dict:
    """Rank 0's numbers of one run, see layout_run; `memory`: with an allocator that gives
    everything back."""
    job, out = Path(top, "job.json"), Path(top, "out.json")
    config = SPREAD | {"data_dir": f"{top}/data", "out_dir": f"{top}/run", "max_steps": steps}
    config |= {"zero_stage": 0, "batch_tokens": 2 * ranks * 4 * SPREAD["model"]["max_seq_len"]}
    job.write_text(json.dumps({"config": config | changes, "out": str(out)}))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if memory:
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "tools.bench", "layouts", "--inside", str(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if not out.exists():
        raise UserError("E001", f"layouts: {name}: {done.stderr[-2000:]}")
    row = json.loads(out.read_text())
    out.unlink()
    return row


def layout_table(runs: dict[str, list], ranks: int, rounds: int) -> list[str]:
    """Lines of Markdown. runs: of each layout the run that looked at memory, then those that are
    timed."""
    shape = ModelConfig(**SPREAD["model"])
    n = plan.count_parameters(plan.on_meta(shape))
    text = (
        f"{n:,} parameters, 4 rows of {shape.max_seq_len} tokens a process, 2 micro-steps a step;"
    )
    text += f" {ranks} processes of one thread on {os.cpu_count()} cores, gloo; {rounds} rounds."
    text += " MB above the imports on rank 0; communicating: the share of a step, waiting for"
    lines = [f"{text} others in it"]
    base = next((name for name in runs if name != ONE_PROCESS), "-")
    titles = ["layout", "tokens/s", f"time a step against {base}", "communicating"]
    titles += ["MB gathered, reduced, sent (plan)", "MB while building", "MB at the peak (plan)"]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, (memory, *timed) in runs.items():
        rate = statistics.median(row["tokens"] / row["seconds"] for row in timed)
        against = "-"
        if name != ONE_PROCESS:
            pair = ([row["seconds"] for row in rows] for rows in (timed, runs[base][1:]))
            against = ratio(*pair)
        share = statistics.median(row["share"] for row in timed)
        sent = ", ".join(f"{x / 1e6:.0f} ({y / 1e6:.0f})" for x, y in memory["bytes"])
        cells = [name, machines.human_number(rate), against, f"{100 * share:.0f} %", sent]
        cells += [f"{memory['build'] / 1e6:.0f}"]
        cells += [f"{memory['peak'] / 1e6:.0f} ({memory['plan'] / 1e6:.0f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def high_water(reset: bool = False) -> int:
    """Bytes that this process has held at most since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


class Collectives:
    """Times and counts torch.distributed's collectives where they are called: what waits for others
    counts as communication. Names differ from version to version of torch."""

    KINDS = {
        "all_gather_into_tensor": "gather",
        "all_gather_single": "gather",
        "reduce_scatter_tensor": "reduce",
        "reduce_scatter_single": "reduce",
        "all_reduce": "reduce",
        "all_to_all_single": "all",
    }

    def __init__(self):
        import torch.distributed as dist

        self.seconds, self.sent = 0.0, {"gather": 0, "reduce": 0, "all": 0}
        self.inside = False  # one may call another
        for name in self.KINDS:
            if hasattr(dist, name):
                setattr(dist, name, functools.partial(self.call, name, getattr(dist, name)))

    def call(self, name: str, real, *args, **kwargs):
        if self.inside:
            return real(*args, **kwargs)
        self.inside, began = True, time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            self.inside = False
            self.seconds += time.perf_counter() - began
            tensors = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
            there_and_back = 2 if name == "all_reduce" else 1
            self.sent[self.KINDS[name]] += max(x.nbytes for x in tensors) * there_and_back


def layout_run(job: dict) -> int:
    """Inside torchrun: rank 0's numbers of one run, as JSON."""
    import train_fsdp

    collectives, build = Collectives(), []

    def measured(cfg):
        parallel = train_fsdp.make_parallel(cfg)
        real = parallel.build

        def measured_build(*args):
            start = high_water(reset=True)
            model = real(*args)
            build.append(high_water() - start)
            return model

        parallel.build = measured_build
        return parallel

    marks = []  # at the top of each iteration: time, seconds in collectives, bytes
    with contextlib.redirect_stdout(None):
        trainer = Trainer(job["config"], measured)
        trainer.save = lambda *args, **kwargs: True
        held = list(trainer.parallel.weights(trainer.model).values())
        for state in trainer.optimizer.state.values():
            held += [x for x in state.values() if torch.is_tensor(x) and x.dim()]
        before = high_water(reset=True) - sum(x.nbytes for x in held)
        for _ in trainer.iterations():
            marks.append((time.perf_counter(), collectives.seconds, dict(collectives.sent)))
        trainer.end()
    row = {"build": build[0], "peak": high_water() - before} | marks_row(marks[2:], trainer)
    if trainer.parallel.rank == 0:
        Path(job["out"]).write_text(json.dumps(row))
    sys.stdout.flush()
    os._exit(0)


def marks_row(marks: list, trainer) -> dict:
    """Seconds and tokens a step, share of communication, bytes of each kind beside the plan's."""
    cfg, run = trainer.cfg, trainer.run
    (began, spent, sent), (ended, spent_then, sent_then) = marks[0], marks[-1]
    steps, seconds = len(marks) - 1, ended - began
    layout = replace(trainer.parallel.layout, cuda=True)
    shape = (run.micro_batch, run.accumulation, run.precision, cfg.activation_checkpointing)
    planned = simulate.traffic(trainer.counted, layout, *shape)
    kinds = {
        "gather": ("all-gather",),
        "reduce": ("reduce-scatter", "all-reduce"),
        "all": ("all-to-all",),
    }
    both = []
    for kind, names in kinds.items():
        messages = [message for name in names for message in planned[name]]
        expected = sum(size for size, ranks, _ in messages if ranks > 1)
        both.append(((sent_then[kind] - sent[kind]) / steps, expected))
    return {
        "seconds": seconds / steps,
        "tokens": run.rows_per_step * cfg.model.max_seq_len,
        "share": (spent_then - spent) / seconds,
        "bytes": both,
        "plan": plan.rank_memory(trainer.counted, layout, *shape)["total"],
    }


COMMANDS = {
    "speed": speed,
    "decode": decode,
    "kernels": kernels,
    "step": step,
    "learn": learn,
    "gpu": gpu,
}
COMMANDS |= {"layouts": layouts, "faults": fault_table}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    near = nearest(argv[0], COMMANDS) if argv else None
    what = f"{argv[0]!r} is not one of" if argv else "what is to be measured? One of"
    hint = f"did you mean {near}?" if near else "--help explains them"
    raise UserError("E002", f"command line: tools.bench: {what} {', '.join(COMMANDS)}; {hint}")


if __name__ == "__main__":
    command(main)
