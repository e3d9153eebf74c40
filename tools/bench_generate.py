"""How fast tokens are read and written: `generate` of tools/bench.py.

The same weights, prompts, dtype and threads in turns in one process: our model as it was trained
(plain), as open_model makes it ready (lumen/onednn.py), the engine over it, and transformers'
generate with its static cache. Prefill is the time to the first token of each row, decode the
tokens after it; the choice of the most likely token belongs to both. Beside them what the memory
gives, since decoding reads every weight for each token. llama.cpp runs in a process of its own, one
per round, when LLAMA_PYTHON names a Python that has it and --gguf a file of the same model.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import export
from lumen import hf, onednn
from lumen.engine import Engine, Row, run
from lumen.errors import UserError, expand
from lumen.hf_check import import_transformers
from lumen.sampling import Choice
from lumen.stream import Stream
from model import ModelConfig, Transformer
from tools import timing

SHAPES = {
    "30m": {
        "vocab_size": 8192,
        "d_model": 512,
        "n_layers": 8,
        "n_heads": 8,
        "n_kv_heads": 4,
        "d_ff": 1408,
        "max_seq_len": 2048,
    },
    "smollm2": {  # SmolLM2-135M's
        "vocab_size": 49152,
        "d_model": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "d_ff": 1536,
        "max_seq_len": 8192,
        "qk_norm": False,
        "rope_theta": 100000.0,
        "norm_eps": 1e-5,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_SPEED = Path(__file__).with_name("llama_speed.py")
GREEDY = Choice(temperature=0)


class Took(NamedTuple):
    """Seconds of one run."""

    prefill: float  # until each row has its first token
    decode: float  # for one more token of each row


# ---------------------------------------------------------------- who is asked


def weights_of(given: str) -> tuple[ModelConfig, dict]:
    """Of one of SHAPES with random numbers, or of a Hugging Face folder: its fp32 state_dict."""
    if given not in SHAPES:
        cfg, state, _, _ = export.read_hf(Path(expand(given)))
        if cfg.n_experts:
            raise UserError("E002", f"--shape: {given} is a MoE; dense models are compared here")
        return cfg, state
    model = Transformer(ModelConfig(**SHAPES[given]))
    model.init_weights(0)
    return model.cfg, model.state_dict()


def ours(cfg: ModelConfig, state: dict, dtype: torch.dtype) -> Transformer:
    """As open_model has it, but in the plain layout."""
    model = Transformer(cfg)
    model.load_state_dict(state)
    model.to(dtype).eval().requires_grad_(False)
    model.compute_dtype = dtype
    return model


def theirs(cfg: ModelConfig, state: dict, dtype: torch.dtype):
    """transformers' model of the same shape and weights."""
    transformers = import_transformers()
    config = hf.hf_config(cfg, "float32", {"pad_token_id": 0})
    kind = transformers.AutoConfig.for_model(**config)
    made = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa")
    weights = {}
    for part in hf.layout(cfg):
        weights[part.theirs] = state[part.ours].narrow(0, part.first[0], part.shape[0])
    missing, unknown = made.load_state_dict(weights, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:  # which tied ones share
        raise RuntimeError(f"transformers' model lacks {missing} and does not know {unknown}")
    made.tie_weights()
    return made.to(dtype).eval()


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    return [[(31 * i + 7 * row + 3) % vocab for i in range(length)] for row in range(rows)]


def bare(model: Transformer, given: list[list[int]], new: int) -> Callable[[], Took]:
    """Transformer.generate."""

    @torch.inference_mode()
    def once() -> Took:
        began = time.perf_counter()
        steps = model.generate(given, new, [0] * len(given), temperature=0)
        next(steps)
        middle = time.perf_counter()
        for _ in steps:
            pass
        return Took(middle - began, (time.perf_counter() - middle) / (new - 1))

    return once


def engine(model: Transformer, given: list[list[int]], new: int) -> Callable[[], Took]:
    """lumen.engine, each prompt read for itself, all of them in one chunk."""
    length = len(given[0])
    made = Engine(model, len(given), length + new, chunk=length * len(given), reuse=False)

    def once() -> Took:
        made.clear()
        rows = [Row(Stream(None, list(ids), (), (), new, new), GREEDY) for ids in given]
        began = time.perf_counter()
        middle = began
        for count, _ in enumerate(run(made, rows), 1):
            if count == len(given):
                middle = time.perf_counter()
        return Took(middle - began, (time.perf_counter() - middle) / (new - 1))

    return once


def static(model, given: list[list[int]], new: int) -> Callable[[], Took]:
    """transformers' generate with its static cache, not compiled."""
    transformers = import_transformers()
    ids = torch.tensor(given)
    marks: list[float] = []

    class Clock(transformers.StoppingCriteria):
        """Asked after each token; never stops."""

        def __call__(self, ids, scores, **more):
            marks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    how = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "cache_implementation": "static",
        "disable_compile": True,
        "stopping_criteria": [Clock()],
    }

    def once() -> Took:
        marks.clear()
        began = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            model.generate(ids, **how)
        return Took(marks[0] - began, (marks[-1] - marks[0]) / (new - 1))

    return once


# ---------------------------------------------------------------- what there is to reach


def bandwidth(size: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes/s at which this process reads memory that no cache holds: the best of some sums."""
    numbers = torch.ones(size // 4)
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


def bytes_per_token(cfg: ModelConfig, n: int, dtype: torch.dtype, length: int) -> int:
    """That one row's next token reads: every weight once (tied: the embedding is the head), and
    keys and values of `length` tokens."""
    if not cfg.tie_embeddings:
        n -= cfg.vocab_size * cfg.d_model  # of the embedding one row
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * length
    return (n + cache) * dtype.itemsize


def llama(file: str, threads: int, prompt: int, new: int) -> Callable[[], Took]:
    """llama.cpp on a GGUF file, batch 1; the process loads it anew each time."""
    words = [os.environ["LLAMA_PYTHON"], str(LLAMA_SPEED), file, "--threads", str(threads)]
    words += ["--prompt_tokens", str(prompt), "--new_tokens", str(new)]

    def once() -> Took:
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip() or "-").splitlines()[-1]
            raise UserError("E003", f"LLAMA_PYTHON {words[0]}: {last}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return Took(prompt / found["prefill"], 1 / found["decode"])

    return once


# ---------------------------------------------------------------- the command


def options(words: list[str]):
    """E002 for what there is not."""
    o = timing.options(
        words,
        shape="30m",
        precisions="fp32,bf16",
        batches="1,8,32",
        prompt=128,
        new=64,
        rounds=7,
        threads=1,
        gguf="",
        only="",
    )
    if o.shape not in SHAPES and not os.path.isfile(os.path.join(expand(o.shape), "config.json")):
        text = f"{o.shape} is none of {', '.join(SHAPES)}, and no Hugging Face folder"
        raise UserError("E002", f"--shape: {text}")
    o.precisions, o.only = o.precisions.split(","), o.only.split(",") if o.only else list(WAYS)
    for name, given, known in (("precisions", o.precisions, DTYPES), ("only", o.only, WAYS)):
        if unknown := [word for word in given if word not in known]:
            text = f"no {', '.join(unknown)}; there are {', '.join(known)}"
            raise UserError("E002", f"--{name}: {text}")
    if not all(word.isdigit() and int(word) for word in o.batches.split(",")):
        raise UserError("E002", f"--batches: {o.batches} is no list of rows, as 1,8,32")
    o.batches = [int(word) for word in o.batches.split(",")]
    if min(o.prompt, o.new - 1, o.rounds, o.threads) < 1:
        raise UserError("E002", "--prompt, --rounds and --threads are at least 1, --new 2")
    if o.gguf and "LLAMA_PYTHON" not in os.environ:
        raise UserError("E002", "--gguf: LLAMA_PYTHON=... names a Python with llama-cpp-python")
    return o


WAYS = ("plain", "ready", "engine", "transformers")


def generating(words: list[str]) -> int:
    """Of each precision and batch: tokens/s of all in turns, and their ratios."""
    o = options(words)
    torch.set_num_threads(o.threads)
    cfg, state = weights_of(o.shape)
    print(timing.machine_line())
    reads = bandwidth()
    print(f"memory is read at {reads / 1e9:.1f} GB/s by {o.threads} threads")
    print(f"{o.shape}: prompts of {o.prompt} tokens, {o.new} new ones, {o.rounds} rounds")
    for precision in o.precisions:
        dtype = DTYPES[precision]
        made = models(cfg, state, dtype, o.only)
        alone: dict[str, list[Took]] = {}  # of batch 1, to compare others with
        for rows in o.batches:
            given = prompts(rows, o.prompt, cfg.vocab_size)
            ways = {name: way(made, name, given, o.new) for name in o.only}
            if rows == 1 and o.gguf:
                ways["llama.cpp"] = llama(expand(o.gguf), o.threads, o.prompt, o.new)
            times = in_turns(ways, o.rounds)
            tell(f"{precision}, batch {rows}", times, rows, o.prompt)
            if rows == 1:
                alone = times
                n = sum(t.numel() for t in state.values())
                size = bytes_per_token(cfg, n, dtype, o.prompt + o.new // 2)
                tell_bytes(times, size, reads)
            elif alone:
                tell_growth(times, alone, rows)
    return 0


def models(cfg: ModelConfig, state: dict, dtype: torch.dtype, only: list[str]) -> dict:
    """By way; the engine's is the one that is ready."""
    made = {}
    if "plain" in only:
        made["plain"] = ours(cfg, state, dtype)
    if "ready" in only or "engine" in only:
        made["ready"] = made["engine"] = ours(cfg, state, dtype)
        onednn.reorder(made["ready"])
    if "transformers" in only:
        made["transformers"] = theirs(cfg, state, dtype)
    return made


def way(made: dict, name: str, given: list[list[int]], new: int) -> Callable[[], Took]:
    make = {"engine": engine, "transformers": static}.get(name, bare)
    return make(made[name], given, new)


def in_turns(ways: dict, rounds: int) -> dict[str, list[Took]]:
    """The first round warms up."""
    times = {name: [] for name in ways}
    for i in range(1 + rounds):
        for name, once in ways.items():
            took = once()
            if i:
                times[name].append(took)
    return times


def tell(title: str, times: dict, rows: int, prompt: int) -> None:
    print(title)
    for name, took in times.items():
        prefill = [rows * prompt / one.prefill for one in took]
        decode = [rows / one.decode for one in took]
        text = f"prefill {timing.spread(prefill)}, decode {timing.spread(decode)}"
        print(f"  {name:<13} tokens/s: {text}")
    first = "ready" if "ready" in times else next(iter(times))
    for name, took in times.items():
        if name != first:
            # times as long as ours: above 1 we are faster
            parts = []
            for phase in Took._fields:
                theirs_, own = ([getattr(one, phase) for one in t] for t in (took, times[first]))
                parts.append(f"{phase} {timing.ratio(theirs_, own)}")
            print(f"  {name} takes, of {first}'s time: {'; '.join(parts)}", flush=True)


def tell_bytes(times: dict, size: int, reads: float) -> None:
    """How much of the memory's speed decoding reaches (gpt-fast's MBU)."""
    print(f"  a token reads {size / 1e6:.1f} MB")
    for name, took in times.items():
        if name != "llama.cpp":  # its file has bytes of its own
            share = [size / one.decode / reads for one in took]
            percent = 100 * statistics.median(share)
            print(f"  {name:<13} reads at {percent:.0f} % of the memory's speed")


def tell_growth(times: dict, alone: dict, rows: int) -> None:
    for name, took in times.items():
        if name in alone:
            grown = [rows * a.decode / b.decode for a, b in zip(alone[name], took)]
            print(f"  {name:<13} decode, times the tokens/s of batch 1: {timing.spread(grown)}")
