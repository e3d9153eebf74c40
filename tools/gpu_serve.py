"""The part `serve` of tools/gpu.py: does the engine write on a card what `generate` does, whoever
is beside it, with recorded graphs and without; and how many tokens a second."""

from __future__ import annotations

import random

import torch

from lumen.engine import Engine, Row, run
from lumen.feed import synchronize
from lumen.sampling import Choice, Sampling
from lumen.stream import Stream
from tools.gpu_evaluate import KINDS
from tools.gpu_parts import GPT2, MOE, SMALL, Here, model_to_decode


def serve_part(here: Here) -> None:
    for kind, keys in KINDS.items():
        model = model_to_decode(here, SMALL | {"max_seq_len": 256} | keys, torch.float32)
        for graphs in (False, True):
            name = f"{kind}: the same text in any company{', graphs' if graphs else ''}"
            here.rows.attempt(name, same_text, model, graphs)
    for name, keys in {"gpt2_124m": GPT2, "moe_124m": MOE}.items():
        for batch in (1, 8, 32):
            for graphs in (False, True):
                what = f"{name}, engine, {batch} rows{', graphs' if graphs else ''}"
                here.rows.attempt(what, speed, here, keys, batch, graphs, unit="tokens/s")


def row(ids: list[int], n: int, seed: int, context: int, **choice) -> Row:
    return Row(Stream(None, ids, (), (), n, context - len(ids)), Choice(**choice), seed)


def engine_of(model, slots: int, graphs: bool) -> Engine:
    engine = Engine(model, slots)
    if not graphs:
        engine.graphs = None
    return engine


def same_text(model, graphs: bool) -> bool:
    R, V, context = random.Random(0), model.cfg.vocab_size, model.cfg.max_seq_len
    engine, asked = engine_of(model, 3, graphs), []
    for seed in range(8):
        ids = [R.randrange(V) for _ in range(R.randrange(1, context // 3))]
        asked.append((ids, R.randrange(1, context // 3), seed))
    how = {"temperature": 0.8, "top_k": 20}
    rows = [row(*one, context, **how) for one in asked]
    got: dict[Row, list] = {one: [] for one in rows}
    for news in run(engine, rows):
        got[news.row].append(news.token)
    for one, (ids, n, seed) in zip(rows, asked):
        with torch.inference_mode():
            choose = Sampling([ids], V, **how)
            alone = [token for (token,) in model.generate([ids], n, [seed], choose=choose)]
        if got[one] != alone:
            return False
    return True


def speed(here: Here, keys: dict, batch: int, graphs: bool) -> dict:
    """Greedy, in the compute dtype, behind prompts of three tokens."""
    model = model_to_decode(here, keys, here.machine.compute_dtype)
    engine, new = engine_of(model, batch, graphs), here.pick(128, 8)
    for _ in range(2):  # the first warms up, and records
        engine.reset_counts()
        context, how = model.cfg.max_seq_len, {"temperature": 0}
        rows = [row([1, 2, 3 + i], new, i, context, **how) for i in range(batch)]
        for _ in run(engine, rows):
            pass
        synchronize(here.device)
    seconds = engine.seconds["decode"]
    tokens = engine.tokens["decode"]
    return {"value": tokens / seconds, "ms a step": 1e3 * seconds / (new - 1)}
