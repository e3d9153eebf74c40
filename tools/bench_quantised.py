"""How fast a model decodes in few bits on this CPU, against itself in fp32 and bf16.

    python -m tools.bench_quantised MODEL [--rows 1,4] [--steps 12] [--rounds 5] [--threads 1]
    python -m tools.bench_quantised --d_model 2048 --layers 6 --vocab 32000

A token's forward pass over a cache of 64, the models in turns, each pass timed by itself: the best
of all is least disturbed by other programs. A random model decodes as fast as a trained one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from lumen import few_rows, machine
from lumen.errors import a_path
from lumen.launch import Words, command
from lumen.models import make_ready, read_model
from lumen.quantize import quantised_layers, quantize
from model import KVCache, ModelConfig, Transformer
from tools import timing

CONTEXT = 64  # tokens in the cache
WAYS = {  # name: (precision, kind, without unpacking)
    "fp32": ("fp32", None, False),
    "bf16": ("bf16", None, False),
    "int8, unpacked": ("bf16", "int8", False),
    "int8": ("bf16", "int8", True),
    "int4, unpacked": ("bf16", "int4", False),
    "int4": ("bf16", "int4", True),
}


def parse(argv: list[str]) -> argparse.Namespace:
    p = Words(prog="python -m tools.bench_quantised", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", type=a_path, help="what open_model opens")
    for name, default in (("d_model", 2048), ("layers", 6), ("vocab", 32000)):
        text = f"of a random model (default {default})"
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    p.add_argument("--rows", default="1", help="batch sizes (default 1)")
    p.add_argument("--steps", type=int, default=12, help="tokens a turn (default 12)")
    p.add_argument("--rounds", type=int, default=5, help="turns (default 5)")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args(argv)


def build(o) -> Transformer:
    if o.model:
        return read_model(o.model).model
    sizes = {"d_model": o.d_model, "n_layers": o.layers, "n_heads": o.d_model // 128}
    cfg = ModelConfig(vocab_size=o.vocab, n_kv_heads=max(1, o.d_model // 512), **sizes)
    model = Transformer(cfg)
    model.init_weights(0)
    return model


def prepared(model: Transformer, precision: str, kind: str | None, kernels: bool) -> Transformer:
    model = copy.deepcopy(model)
    if kind:
        quantize(model, kind)
    make_ready(model, machine.detect("cpu", precision, False), exact=not kernels)
    return model


def held(model: Transformer) -> int:
    """Bytes that are read for a token: all of a dense model's but the embedding's rows."""
    tensors = [p for name, p in model.named_parameters() if name != "embed.weight"]
    if model.cfg.tie_embeddings:
        tensors.append(model.embed.weight)
    for layer in quantised_layers(model).values():
        tensors += list(layer.buffers())
    return sum(t.numel() * t.itemsize for t in tensors)


class Decoding:
    """A model in the middle of a text."""

    def __init__(self, model: Transformer, rows: int, steps: int):
        self.model, self.steps, self.rows = model, steps, rows
        self.times: list[float] = []

    @torch.inference_mode()
    def turn(self) -> None:
        """`steps` tokens, each timed, after one that is not."""
        cfg, model = self.model.cfg, self.model
        length = CONTEXT + self.steps + 1
        cache = KVCache(cfg, self.rows, length, dtype=model.compute_dtype)
        model(torch.zeros(self.rows, CONTEXT, dtype=torch.long), cache=cache)
        idx = torch.zeros(self.rows, 1, dtype=torch.long)
        for step in range(self.steps + 1):
            began = time.perf_counter()
            idx = model(idx, cache=cache).argmax(-1, keepdim=True)
            if step:
                self.times.append(time.perf_counter() - began)


def main(argv: list[str]) -> None:
    o = parse(argv)
    torch.set_num_threads(o.threads)
    model = build(o)
    made = {name: prepared(model, *how) for name, how in WAYS.items()}
    print(timing.machine_line())
    for kind, (_, why) in few_rows.CHOSEN.items():
        print(f"{kind}: a matrix of 1,072 x 1,024 by the kernel: {why}")
    cfg, total = model.cfg, model.n_params()["total"]
    what = o.model or "random"
    print(f"{what}: {total:,} parameters, {cfg.n_layers} layers, d_model {cfg.d_model}")
    for rows in map(int, o.rows.split(",")):
        running = {name: Decoding(one, rows, o.steps) for name, one in made.items()}
        for _ in range(o.rounds):
            for one in running.values():
                one.turn()
        tell(rows, running)


def tell(rows: int, running: dict[str, Decoding]) -> None:
    best = {name: min(one.times) for name, one in running.items()}
    own = min(best["fp32"], best["bf16"])
    print(f"batch {rows} | MiB a token | ms a step, best | median | tokens/s | as fast as ours")
    for name, one in running.items():
        middle = statistics.median(one.times)
        cells = [name, f"{held(one.model) / 2**20:,.0f}", f"{best[name] * 1e3:.2f}"]
        cells += [f"{middle * 1e3:.2f}", f"{rows / best[name]:,.1f}", f"{own / best[name]:.2f}"]
        print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    command(main)
