"""The part `fp8` of tools/gpu.py: does a card's matmul in fp8 give the emulated numbers, do runs
with it learn as in bf16, and how many tokens a second."""

from __future__ import annotations

import math

import torch

from lumen import fp8
from lumen.machine import FP8, compiled_graphs
from tools import timing
from tools.gpu_parts import (
    GPT2,
    LARGE,
    SMALL,
    Here,
    build,
    check_bytes,
    furthest,
    losses,
    run_small,
)

WORDS = ("fp8_e4m3", "fp8_e4m3_rowwise")
ROWS = 1000  # tokens of the layer that is tried: no multiple of 16
DEPTHS = {"mod_capacity": 0.4, "mod_every": 2}
WIDE = LARGE | {"n_layers": 4, "max_seq_len": 2048}  # so that three models fit at once


def fp8_part(here: Here) -> None:
    attempt = here.rows.attempt
    if here.cuda and torch.cuda.get_device_capability() < (8, 9):
        here.rows.note("fp8", "this card has none")
        return
    for word in WORDS:
        tried = (matmul_error, here, word)
        attempt(f"{word}: matmuls", *tried, unit="relative error off emulated", most=0.01)
        attempt(f"{word}: NaN, Inf and zeros come through", not_finite, here, word)
    ways = [(word, compiled) for word in WORDS for compiled in (False, True)]
    for word, compiled in here.pick(ways, ways[:3]):  # to compile takes a CPU long
        how = "compiled" if compiled else "eager"
        tried = (model_error, here, word, compiled)
        attempt(f"{word}, {how}: gradients", *tried, unit="off emulated", most=0.2)
    for word in WORDS:
        attempt(f"{word}: losses", run_apart, here, word, unit="nats off bf16", most=0.1)
    only = ("stopped and resumed",)
    check_bytes(here, "fp8", only=only, precision=runnable(here, WORDS[0]))
    sizes = {"124M, 16 rows": (GPT2, 16), "4 layers 2,048 wide, 8 rows of 2,048": (WIDE, 8)}
    for name in here.pick(list(sizes), list(sizes)[:1]):
        speeds(here, name, *sizes[name])


def runnable(here: Here, word: str) -> str:
    """A trainer takes the real one only on a card."""
    return word if here.cuda else f"{word}_emulated"


def matmul_error(here: Here, word: str) -> dict:
    """The largest relative error of y, dx and dW of 124M's w13."""
    n_in, n_out = here.pick((768, 4096), (32, 48))
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, n_in), (n_out, n_in), (ROWS, n_out))
    drawn = [torch.randn(shape, generator=generator).to(here.device) for shape in shapes]
    found = []
    for one in (runnable(here, word), f"{word}_emulated"):
        x, weight, grad = drawn[0].bfloat16(), drawn[1], drawn[2].bfloat16()
        layer = converted(weight.clone(), one)
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found.append({"y": y.detach(), "dx": x.grad, "dW": layer.weight.grad})
    got, want = found
    errors = {name: relative(got[name], want[name]) for name in want}
    return {"value": max(errors.values())} | errors


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def converted(weight: torch.Tensor, word: str) -> fp8.Fp8Linear:
    """A layer of this weight."""
    layer = fp8.Fp8Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    layer.rowwise, layer.emulated = FP8[word]
    return layer


def not_finite(here: Here, word: str) -> bool:
    """What the guard must see; and a row of zeros, which has no scale of its own."""
    weight = torch.eye(32, 32, device=here.device)
    layer = converted(weight, runnable(here, word))
    x = torch.ones(32, 32, device=here.device, dtype=torch.bfloat16)
    x[3] = 0
    zeros = layer(x)[3].eq(0).all().item()
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[5, 5] = bad
        if layer(spoilt).isfinite().all():
            return False
    return zeros


def model_error(here: Here, word: str, compiled: bool) -> dict:
    """The relative error of all gradients of a small model with depths. Compiled code rounds less
    often to bf16, which moves them by 0.08 on a CPU: a last digit there is a sixteenth in fp8."""
    torch.compiler.reset()
    found, before = [], compiled_graphs()
    for one in (f"{word}_emulated", runnable(here, word)):
        run = build(here, SMALL | DEPTHS | {"max_seq_len": 64}, 2, compiled and not found)
        model = run.model
        model.init_weights(0)
        model.compute_dtype = torch.bfloat16
        fp8.convert(model, one)
        total, _ = model(run.x, targets=run.y)
        total.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return {"value": relative(found[1], found[0]), "graphs": compiled_graphs() - before}


def run_apart(here: Here, word: str) -> dict:
    """The largest distance of two small runs' losses, step by step."""
    found = []
    for one in ("mixed_bf16", runnable(here, word)):
        keys = {"precision": one, "log_interval": 1, "save_interval": 0}
        found.append(losses(run_small(here, f"{word}-{one}", **keys)))
    return {"value": furthest(*found), "last": found[1][-1]}


def speeds(here: Here, name: str, keys: dict, rows: int) -> None:
    """tokens/s of compiled steps that take turns: bf16's, then each of fp8 and its ratio to it."""
    runs, seconds = {}, {}

    def measure() -> float:
        for word in ("mixed_bf16", *WORDS):
            runs[word] = build(here, keys, rows, compiled=True)
            fp8.convert(runs[word].model, word if word == "mixed_bf16" else runnable(here, word))
        seconds.update(timing.interleaved(runs, here.pick(8, 1), here.device, here.pick(3, 1)))
        return runs["mixed_bf16"].tokens / min(seconds["mixed_bf16"])

    def of(word: str) -> dict:
        least = min(seconds[word])
        row = {"value": runs[word].tokens / least, "ratio": min(seconds["mixed_bf16"]) / least}
        return row | {"loss": runs[word]().item()}

    here.rows.attempt(f"{name}: mixed_bf16", measure, unit="tokens/s")
    for word in WORDS:
        here.rows.attempt(f"{name}: {word}", of, word, unit="tokens/s")
