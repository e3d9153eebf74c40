"""The measured numbers of README and docs. Every command prints the machine that it ran on.

How times are taken: tools/timing.py. What is timed step by step: tools/bench_step.py.

speed CONFIG [--max_steps N] [--key value]
    40 steps of a configuration, or N, without evaluation or saving: tokens/s, MFU, data wait.
decode [RUN]
    Cached decoding against recomputing the whole sequence for each token, same model, same ids.
kernels [--rounds N]
    The expert layer's backends against a dense SwiGLU of equal active width, and bytes kept.
step [--rounds N] [--no-peer] [--limit S]
    One training step of whole models: our MoE, our dense model of equal active size, and
    transformers' Qwen3Moe and Qwen3 in their fastest variant. --limit: seconds to compile one.
threads [--rounds N] [--steps N] [--threads N] [--busy N] [--only "A;B"]
    The quickstart's step by how the threads of a CPU wait for one another, alone and beside busy
    processes.
learn [--steps N] [--seeds N] [--threads N] [--only A,B] [--out DIR]
    Dense, MoE, MoD and hybrid at equal active parameters and tokens, from configs/quickstart.yaml.
    A run that --out holds already is not repeated.
learn --against transformers [--sizes A,B] [--kinds A,B] [--seeds N] [--steps N] [--data DIR]
    The same rows, order, optimizer, schedule and clip, each from its own initial weights: the gap
    between the validation curves. --sizes: source, 4x128, 4x256, 6x384, 12x768 (layers x width).
layouts [--ranks N] [--rounds N] [--steps N] [--only A,B]
    What each key of train_fsdp.py costs and spares on the processes of this machine, and one
    process beside them: tokens/s, communication, bytes, memory.
data [--rounds N]
    Preparing text and conversations: MB/s of CPU time, stage by stage.
documents [--rounds N] [--rows N]
    A training step with document_mask against the same without, by the length of documents.
finetune [--rounds N] [--turns N] [--no_peer] [--peer PYTHON] [--litgpt PYTHON]
    Steps of fine-tuning in turns with pre-training's, of LoRA with those of all weights; then
    launches beside trl's SFTTrainer and litgpt, where these Pythons have them.
learn_chat --base RUN [--seeds N] [--only "A;B"] [--steps N] [--factors F,F] [--out DIR]
    Held-out replies, multiple choice and preferences after SFT, LoRA, DPO and SimPO.
evaluate [MODEL] [--only A,B] [--n N] [--rounds N] [--precision P]
    Questions a second of our scorer against lm-eval's hf model of the exported folder.
generate [--shape 30m|smollm2|FOLDER] [--precisions P,P] [--batches B,B] [--threads N] [--gguf FILE]
    Tokens/s of prompts read and of tokens written: our model, the engine, transformers' static
    cache; with LLAMA_PYTHON=... and a GGUF file llama.cpp. Also --prompt, --new, --rounds, --only.
faults [--only ROWS] [--kinds K] [--modes M] [--out FILE] [--table] [--quick] [--healthy N]
    The faults of tools/faults.py on two small models: what the orchestrator makes of each, against
    mode off and another trainer's rules.

What a GPU is asked: tools/gpu.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import lumen.waiting  # noqa: F401 - before torch
import torch

from lumen import checkpoint, plan
from lumen import machine as machines
from lumen.cards import data_sheet
from lumen.errors import UserError, nearest
from lumen.launch import Words, command
from lumen.machine import compiled_so_far, human_number
from model import KVCache, ModelConfig, Transformer
from tools import (
    bench_chat,
    bench_data,
    bench_evaluate,
    bench_finetune,
    bench_generate,
    bench_learn,
    bench_step,
    bench_threads,
    faults,
    simulate,
    timing,
)
from train import Trainer

# ---------------------------------------------------------------- what is measured

# a model of which the layouts of train_fsdp.py hold parts; 4 rows a process and micro-step
SPREAD = {
    "device": "cpu",
    "precision": "fp32",
    "compile_model": False,
    "batch_size": 4,
    "save_interval": 0,
    "seed": 1,
    "eval_tokens": 1,
    "log_interval": 1000,
    "orchestrator": {"mode": "off"},
    "expert_backend": "slices",
    "model": {
        "vocab_size": 4096,
        "d_model": 384,
        "n_layers": 6,
        "n_heads": 6,
        "d_ff": 1024,
        "max_seq_len": 256,
        "n_experts": 8,
        "n_experts_per_token": 2,
        "d_expert": 256,
        "n_dense_layers": 1,
    },
}
SHARDED = {"zero_stage": 3}
LAYOUTS = {
    "replicated (train.py)": {"zero_stage": 0},
    "zero_stage 3": SHARDED,
    "zero_stage 2": {"zero_stage": 2},
    "zero_stage 1": {"zero_stage": 1},
    "expert_parallel 2": {**SHARDED, "expert_parallel": 2},
    "hsdp_shard_size 2": {**SHARDED, "hsdp_shard_size": 2},
    "activation_checkpointing selective": {**SHARDED, "activation_checkpointing": "selective"},
    "activation_checkpointing full": {**SHARDED, "activation_checkpointing": "full"},
    "reduce_dtype bf16": {**SHARDED, "reduce_dtype": "bf16"},
    "mixed_bf16": {**SHARDED, "precision": "mixed_bf16"},
}
ONE_PROCESS = "one process"  # a launch beside them

# ---------------------------------------------------------------- the trainer's speed


def steps_of(trainer):
    """trainer.iterations() without the evaluation and the save that follow the last step."""
    for step in trainer.iterations():
        yield step
        if step == trainer.run.max_steps:
            break
    trainer.finish_pending_step()


def speed(words: list[str]) -> int:
    """Train some steps of a configuration into a temporary folder, in about ten parts: the first
    two are warm-up, and those in which something was compiled are left out."""
    parser = Words(prog="tools.bench speed", add_help=False)
    parser.add_argument("--max_steps", "--max-steps", type=int, default=40)
    o, words = parser.parse_known_args(words)
    if o.max_steps < 3:
        text = f"--max_steps {o.max_steps} is too few: the first two are warm-up; from 3 on"
        raise UserError("E002", f"speed: {text}")
    fixed = {
        "save_interval": 0,
        "val_fraction": 0,
        "log_interval": max(1, o.max_steps // 10),
        "sample_prompt": "null",
        "resume": "none",
        "overwrite": "true",
    }
    if given := sorted(typed_keys(words) & {"out_dir", "eval_interval", "eval_tokens", *fixed}):
        text = f"it trains without evaluation or saving, so it takes no {', '.join(given)}"
        raise UserError("E002", f"speed: {text}")
    with tempfile.TemporaryDirectory() as folder:
        fixed |= {"max_steps": o.max_steps, "out_dir": folder}
        words = [*words, *(f"--{key}={value}" for key, value in fixed.items())]
        print_speed(*logged_steps(words))
    return 0


def logged_steps(config) -> tuple[Trainer, list[dict]]:
    """A run without the evaluation and the save at its end; and its log lines, each with
    `compiled`, a number that has grown where something was compiled before it."""
    rows, trainer = [], Trainer(config)

    def record(row: dict) -> None:
        rows.append(row | {"compiled": compiled_so_far()})

    trainer.report.record = record
    try:
        for _ in steps_of(trainer):
            pass
    finally:
        trainer.close()
    return trainer, [row for row in rows if "loss" in row]


def clean_rows(rows: list[dict]) -> list[dict]:
    """Those before which nothing was compiled; the first two are warm-up."""
    pairs = zip(rows[1:], rows[2:])
    return [row for last, row in pairs if row["compiled"] == last["compiled"]]


def typed_keys(words: list[str]) -> set[str]:
    """Of --key value and --key=value."""
    keys = set()
    for word in words:
        if word.startswith("--"):
            keys.add(word.lstrip("-").partition("=")[0].replace("-", "_"))
    return keys


def print_speed(trainer, rows: list[dict]) -> None:
    """tokens/s, MFU and data wait of those rows before which nothing was compiled."""
    clean = clean_rows(rows)
    print(timing.machine_line(trainer.machine))
    if dirty := len(rows[2:]) - len(clean):
        print(f"left out: {dirty} of {len(rows[2:])} parts, in which something was compiled")
    if not clean:
        print("tokens/s  - (something was compiled in all of them; more --max_steps)")
        return
    # FLOPs of a token as the model is now: MoD's capacity may have been annealed
    flops = trainer.model.flops_per_token() / trainer.parallel.world
    speeds = [row["tokens_per_second"] for row in clean]
    rates = [speed * flops for speed in speeds]
    kind = "of the measured matrix peak"
    if data_sheet(trainer.machine.name) and trainer.machine.precision != "fp32":
        kind = "of the data sheet's peak"
    print(f"tokens/s  {timing.spread(speeds)}")
    print(f"mfu       {timing.mfu(rates, trainer.machine, trainer.found.peak)} {kind}")
    print(f"data wait {timing.spread([row['data_wait'] for row in clean])} of the step")


# ---------------------------------------------------------------- decoding


def decode(words: list[str]) -> int:
    """512 greedy tokens with the cache, and without; a random 8.9 M model unless a run is given."""
    model = decoded_model(words)
    total = min(512, model.cfg.max_seq_len)
    ways = {"recompute": decode_recomputing, "cached": decode_cached}
    times = {name: [] for name in ways}
    ids = {}
    for _ in range(3):
        for name, run in ways.items():
            began = time.perf_counter()
            ids[name] = run(model, total)
            times[name].append(time.perf_counter() - began)
    print(timing.machine_line())
    n, same = model.n_params()["total"], ids["recompute"] == ids["cached"]
    print(f"model {n:,} parameters, {total} tokens; same ids: {same}")
    print(f"recompute s {timing.spread(times['recompute'])}")
    best = (total - 1) / min(times["cached"])
    print(f"cached    s {timing.spread(times['cached'])}, {best:.0f} tokens/s at best")
    ratios = [a / b for a, b in zip(times["recompute"], times["cached"])]
    print(f"ratio       {timing.spread(ratios)} over the whole generation")
    at_end = [last_token_seconds(model, ids["cached"], total) for _ in range(5)]
    slow, fast = (1e3 * min(seconds) for seconds in zip(*at_end))
    print(f"at the end  {slow:.1f} ms recomputed, {fast:.2f} ms cached")
    print(f"ratio       {timing.spread([a / b for a, b in at_end])} at {total} tokens")
    return 0


def decoded_model(words: list[str]) -> Transformer:
    """Of the run that is named, or a random one."""
    if words:
        saved = checkpoint.find(words[0])
        model = Transformer(saved.model_config())
        model.load_state_dict(saved.model_state())
        return model.eval()
    shape = {"d_model": 256, "n_layers": 8, "n_heads": 4, "d_ff": 704, "max_seq_len": 1024}
    model = Transformer(ModelConfig(vocab_size=8192, **shape))
    model.init_weights(0)
    return model.eval()


@torch.inference_mode()
def decode_recomputing(model: Transformer, total: int) -> list[int]:
    """The whole sequence anew for each token."""
    ids = torch.tensor([[1]], device=model.embed.weight.device)
    for _ in range(total - 1):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, 1:].tolist()


@torch.inference_mode()
def decode_cached(model: Transformer, total: int) -> list[int]:
    return [row[0] for row in model.generate([[1]], total - 1, [0], temperature=0)]


@torch.inference_mode()
def last_token_seconds(model: Transformer, ids: list[int], total: int) -> tuple[float, float]:
    """Of the last of `total` tokens, recomputed and cached: best of 5 each."""
    row = torch.tensor([ids])
    cache = KVCache(model.cfg, 1, total + 5)
    model(row, cache=cache)
    recomputed, cached = math.inf, math.inf
    for _ in range(5):
        began = time.perf_counter()
        model(row)
        recomputed = min(recomputed, time.perf_counter() - began)
        began = time.perf_counter()
        model(row[:, -1:], cache=cache)
        cached = min(cached, time.perf_counter() - began)
    return recomputed, cached


# ---------------------------------------------------------------- faults


def fault_table(words: list[str]) -> int:
    """The runs that --out does not hold yet, then the table. --quick: six rows, dense, act; exit
    code 1 where one is not as expected. --healthy N: until the file holds N steps without a
    fault."""
    known = {"only": "", "modes": "", "kinds": "", "out": "out/faults.json"}
    o = timing.options(words, **known, table=False, quick=False, healthy=0)
    results = faults.run(o)
    lines, wrong = faults.fault_table(results.data["runs"])
    lines += faults.healthy_table(results.data["healthy"])
    print("\n".join([timing.machine_line(), *lines]))
    return 1 if o.quick and wrong else 0


# ---------------------------------------------------------------- what a layout costs


def layouts(words: list[str]) -> int:
    """Each layout is a launch of its own, in turns, a thread a process; one more launch of each for
    its memory."""
    o = timing.options(words, ranks=2, rounds=3, steps=12, only="", inside="")
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
    print(timing.machine_line())
    print("\n".join(layout_table(runs, o.ranks, o.rounds)))
    return 0


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
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc_per_node={ranks}", "-m", "tools.bench", "layouts", "--inside", str(job)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
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
    text = f"{n:,} parameters, 4 rows of {shape.max_seq_len} tokens a process,"
    text += f" 2 micro-steps a step; {ranks} processes of one thread on {os.cpu_count()} cores,"
    text += f" gloo; {rounds} rounds. MB above the imports on rank 0; communicating: the share of a"
    text += " step, waiting for others in it"
    base = next((name for name in runs if name != ONE_PROCESS), "-")
    titles = ["layout", "tokens/s", f"time a step against {base}", "communicating"]
    titles += ["MB gathered, reduced, sent (plan)", "MB while building", "MB at the peak (plan)"]
    lines = [text, *timing.markdown(titles)]
    for name, (memory, *timed) in runs.items():
        rate = statistics.median(row["tokens"] / row["seconds"] for row in timed)
        against = "-"
        if name != ONE_PROCESS:
            pair = ([row["seconds"] for row in rows] for rows in (timed, runs[base][1:]))
            against = timing.ratio(*pair)
        share = statistics.median(row["share"] for row in timed)
        sent = ", ".join(f"{x / 1e6:.0f} ({y / 1e6:.0f})" for x, y in memory["bytes"])
        cells = [name, human_number(rate), against, f"{100 * share:.0f} %", sent]
        cells += [f"{memory['build'] / 1e6:.0f}"]
        cells += [f"{memory['peak'] / 1e6:.0f} ({memory['plan'] / 1e6:.0f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- inside of a layout's launch


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


class MeasuredBuild:
    """train_fsdp.make_parallel, whose build() is watched: `bytes` at the most beyond the start."""

    def __init__(self):
        self.bytes = 0

    def __call__(self, cfg):
        import train_fsdp

        parallel = train_fsdp.make_parallel(cfg)
        self.real = parallel.build
        parallel.build = self.build
        return parallel

    def build(self, *args, **options):
        start = high_water(reset=True)
        model = self.real(*args, **options)
        self.bytes = high_water() - start
        return model


def layout_run(job: dict) -> int:
    """Inside torchrun: rank 0's numbers of one run, as JSON."""
    collectives, build = Collectives(), MeasuredBuild()
    marks = []  # at the top of each iteration: time, seconds in collectives, bytes
    with contextlib.redirect_stdout(None):
        trainer = Trainer(job["config"], build)
        held = list(trainer.parallel.weights(trainer.model).values())
        for state in trainer.optimizer.state.values():
            held += [x for x in state.values() if torch.is_tensor(x) and x.dim()]
        before = high_water(reset=True) - sum(x.nbytes for x in held)
        for _ in steps_of(trainer):
            marks.append((time.perf_counter(), collectives.seconds, dict(collectives.sent)))
    row = {"build": build.bytes, "peak": high_water() - before} | marks_row(marks[2:], trainer)
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


# ---------------------------------------------------------------- the command

COMMANDS = {
    "speed": speed,
    "decode": decode,
    "kernels": bench_step.time_kernels,
    "step": bench_step.time_steps,
    "threads": bench_threads.time_threads,
    "learn": bench_learn.learn,
    "layouts": layouts,
    "data": bench_data.preparing,
    "documents": bench_data.documents,
    "finetune": bench_finetune.finetuning,
    "learn_chat": bench_chat.learn_chat,
    "evaluate": bench_evaluate.evaluating,
    "generate": bench_generate.generating,
    "faults": fault_table,
}


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
