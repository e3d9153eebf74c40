"""Which attention is the fastest here, of those that are right: found by trying them at the shape
that the run has.

Each is held against softmax in fp32 and timed, forward and backward; on a CPU at a part of the
shape, in turns. CUDA by reading, and tested on a CPU with stand-ins: no GPU has run it.
"""

from __future__ import annotations

import collections
import functools
import time
import warnings
from typing import NamedTuple

import torch

import kernels_attention as kernels
from lumen.tryout import TOLERANCE, as_in_the_run, best_time, fwd_bwd
from model import Transformer

MOST_TOKENS = 2**15  # of a trial: enough to fill a GPU, a small part of a layer's memory
MOST_SCORES = 2**26  # of the formula at a time: 256 MiB each of about five tensors
# on a CPU: of forward and backward once, about 0.1 s of one core; and of all turns
TRIAL_FLOPS = 3e9
TRIAL_SECONDS = 0.6
MARGIN = 0.95  # of sdpa's time: noise shall not decide
BRIEF = 20.0  # seconds at the machine's peak: a shorter run does not win back what trying takes


class Shape(NamedTuple):
    """What the attention layers of a run compute on."""

    rows: int
    lengths: dict[int, int]  # positions of a row: in how many layers
    heads: int
    kv_heads: int
    head_dim: int
    varies: bool = False  # MoD's evaluation: no two batches have the same lengths
    documents: bool = False  # rows hold several that do not see each other


def shape_of(model: Transformer, rows: int, documents: bool = False) -> Shape:
    """Of a micro-batch of so many rows; a MoD layer has as many positions as it lets through."""
    cfg = model.cfg
    lengths: collections.Counter = collections.Counter()
    varies = False
    for block in model.blocks:
        short = block.mod is not None and not block.ffn_only
        lengths[block.mod.tokens if short else cfg.max_seq_len] += 1
        varies |= short
    heads = (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim)
    return Shape(rows, dict(lengths), *heads, varies, documents)


def pick_attention(  # noqa: PLR0913 - the last three have their usual values
    choice: str,
    shape: Shape,
    device,
    dtype=torch.float32,
    deterministic: bool = False,
    brief: bool = False,
) -> tuple[str, str]:
    """The attention backend and why: sdpa (torch decides) or one of kernels.ATTENTION or ON_CPU;
    where documents do not see each other, of kernels.WITHIN.

    auto takes the fastest on CUDA; on a CPU too, unless the run is `brief`. What is asked for is
    tried too: sdpa takes its place where it raises or is wrong, and the reason says so. ValueError
    on an unknown choice.
    """
    everywhere = kernels.ATTENTION + kernels.ON_CPU
    known = ("auto", "sdpa", *dict.fromkeys(everywhere + kernels.WITHIN))
    if choice not in known:
        raise ValueError(f"attention: {choice!r} is not one of {', '.join(known)}")
    auto, kind = choice == "auto", torch.device(device).type
    able = kernels.WITHIN if shape.documents else everywhere
    if kind == "cpu":
        shape = part_of(shape)
    if auto and kind == "cpu" and not shape.documents and not brief:
        return fastest_on_cpu(shape, device, dtype, deterministic)
    if choice == "sdpa" or (auto and kind != "cuda"):
        return "sdpa", f"torch picks its fastest kernel for this device{how_within(shape, device)}"
    if not auto and choice not in able:
        asked = "document_mask: true" if shape.documents else "document_mask: false"
        others = ", ".join(able)
        return "sdpa", f"{choice} does not go with {asked} (that has {others})"
    names = list(kernels.WITHIN if shape.documents else kernels.ATTENTION) if auto else [choice]
    refused = {}
    if auto and shape.varies:  # by reading: its cache of plans has the length in its key
        names.remove("cudnn")
        refused["cudnn"] = "it plans anew for each length, and MoD's evaluation has many"
    seconds = compare(names, shape, device, dtype, deterministic, refused)
    if not auto and choice in seconds:
        return choice, "as asked; agrees with fp32 math"
    if not auto:
        return "sdpa", f"{choice} does not work here ({refused[choice]})"
    return min(seconds, key=seconds.get, default="sdpa"), reasons(seconds, refused, shape)


def reasons(seconds: dict[str, float], refused: dict, shape: Shape) -> str:
    """What was found, as one line: times of one layer, and why the others are not taken."""
    layers = sum(shape.lengths.values())
    times = [f"{name} {1e3 * s / layers:.2f} ms" for name, s in seconds.items()]
    found = [", ".join(times) or "torch decides, since nothing else works"]
    found += [f"no {name}: {why}" for name, why in refused.items()]
    return "; ".join(found)


def fastest_on_cpu(shape: Shape, device, dtype, deterministic: bool) -> tuple[str, str]:
    """sdpa, or one of kernels.ON_CPU that is right and faster by MARGIN; shape as of part_of."""
    refused = {}
    seconds = compare(["sdpa", *kernels.ON_CPU], shape, device, dtype, deterministic, refused)
    best = min(seconds, key=seconds.get, default="sdpa")
    if "sdpa" in seconds and seconds[best] > MARGIN * seconds["sdpa"]:
        best = "sdpa"
    rows = "row" if shape.rows == 1 else "rows"
    return best, f"{reasons(seconds, refused, shape)}, for {shape.rows} {rows}"


def part_of(shape: Shape) -> Shape:
    """So much of it that forward and backward of all lengths take TRIAL_FLOPS: fewer rows, then
    fewer heads, in the end shorter rows."""

    def flops(T: int, shape: Shape) -> float:
        return 7 * T**2 * shape.heads * shape.head_dim  # of a row: seven matmuls, half of it unseen

    def rows(shape: Shape) -> int:
        return int(TRIAL_FLOPS / sum(flops(T, shape) for T in shape.lengths))

    while shape.kv_heads > 1 and not rows(shape):
        siblings = shape.heads // shape.kv_heads
        fewer = shape.kv_heads // 2
        shape = shape._replace(heads=fewer * siblings, kv_heads=fewer)
    while not rows(shape):
        lengths = collections.Counter()
        for T, layers in shape.lengths.items():
            lengths[max(1, T // 2)] += layers
        shape = shape._replace(lengths=dict(lengths))
    return shape._replace(rows=max(1, min(shape.rows, rows(shape))))


def how_within(shape: Shape, device) -> str:
    """What sdpa does about documents that do not see each other."""
    if not shape.documents:
        return ""
    if torch.device(device).type == "cpu":
        return ", document by document"
    return ", on whole rows with a mask"


def compare(names, shape: Shape, device, dtype, deterministic, refused: dict) -> dict[str, float]:
    """{backend: seconds of all layers, forward and backward} of those that are right at every
    length, on a CPU 0 where there is nothing to compare; why the others are not goes to
    `refused`."""
    seconds = dict.fromkeys(names, 0.0)
    on_cpu = torch.device(device).type == "cpu"
    for T, layers in shape.lengths.items():
        inputs, dout = sample(shape, T, device, dtype)
        docs = None
        if shape.documents:
            docs = some_documents(len(dout), T, dout.device)
        want = softmax_attention(*inputs, dout, None if docs is None else docs.of[0])
        with as_in_the_run(deterministic), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            steps = {}
            for name in list(seconds):
                said.clear()
                try:
                    steps[name] = checked(name, inputs, dout, want, docs)
                    if not on_cpu:
                        seconds[name] += layers * best_time(steps[name], dout.device)
                except Exception as error:  # a kernel can fail in any way, and must stop no run
                    refused[name] = reason(error, [str(warning.message) for warning in said])
                    del seconds[name]
            if on_cpu and len(names) > 1:
                limit = TRIAL_SECONDS / len(shape.lengths)
                for name, taken in in_turns({name: steps[name] for name in seconds}, limit).items():
                    seconds[name] += layers * taken
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def sample(shape: Shape, T: int, device, dtype):
    """Random [q, k, v] in the strides that model.Attention gives them, and the output's gradient.

    All rows are alike, so that one row's formula is every row's.
    """
    H, G, D = shape.heads, shape.kv_heads, shape.head_dim
    rows = max(1, min(shape.rows, MOST_TOKENS // T))
    generator = torch.Generator(device).manual_seed(0)
    row = torch.randn(1, T, H + 2 * G + H, D, generator=generator, device=device).to(dtype)
    parts = row.expand(rows, -1, -1, -1).split((H + 2 * G, H), 2)
    qkv, dout = (t.contiguous() for t in parts)
    q, k, v = qkv.split((H, G, G), 2)
    q, k = q.contiguous(), k.contiguous()  # as RoPE makes them; v stays a part of qkv
    return [t.detach().requires_grad_() for t in (q, k, v)], dout


def some_documents(rows: int, T: int, device) -> kernels.Documents:
    """The same in each row: one of a single position, and others, each twice as long as the one
    before; some places for more stay empty, as in most batches."""
    at = torch.arange(T, device=device)
    of = (at + 1).float().log2().long()  # 0, 1 1, 2 2 2 2, ...
    most = 2 * T.bit_length()
    return kernels.documents(kernels.Documents(of.expand(rows, T), most), "varlen", torch.float32)


def softmax_attention(q, k, v, dout, of=None) -> list:
    """[y, dq, dk, dv] of the first row, each (T, H or G, D), in fp32 (fp64 stays fp64); the scores
    of some queries at a time. of (T,): the document of each position, if they do not see others."""
    q, k, v, dout = (t[0].detach().transpose(0, 1) for t in (q, k, v, dout))  # (H or G, T, D)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, dout = (t.to(wide).requires_grad_() for t in (q, k, v, dout))
    H, T, D = q.shape
    ys, dqs, dk, dv = [], [], torch.zeros_like(k), torch.zeros_like(v)
    at = torch.arange(T, device=q.device)
    step = max(1, MOST_SCORES // (H * T))
    for own, part, dy in zip(at.split(step), q.split(step, 1), dout.split(step, 1)):
        keys, values = (t.repeat_interleave(H // t.shape[0], 0) for t in (k, v))
        scores = part @ keys.transpose(1, 2) * D**-0.5
        hidden = at > own[:, None]
        if of is not None:
            hidden = hidden | (of != of[own][:, None])
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        ys.append(y.detach())
        dq, more_dk, more_dv = torch.autograd.grad(y, (part, k, v), dy)
        dqs.append(dq)
        dk += more_dk
        dv += more_dv
    return [t.transpose(0, 1) for t in (torch.cat(ys, 1), torch.cat(dqs, 1), dk, dv)]


def checked(name: str, inputs, dout, want, docs=None):
    """-> a function: forward and backward. ArithmeticError where output or gradients are wrong."""
    attend = functools.partial(kernels.attention, backend=name, docs=docs, alone=True)
    step = functools.partial(fwd_bwd, attend, inputs, dout)
    error = max_error(step(), want)
    if not error <= TOLERANCE[dout.dtype]:  # so written that a NaN fails too
        raise ArithmeticError(f"differs from fp32 math by {error:.1e}")
    return step


def in_turns(steps: dict, limit: float) -> dict[str, float]:
    """Seconds of the shortest call of each, in so many in all: in turns, for other programs come
    and go on a CPU."""
    begin, best = time.perf_counter(), dict.fromkeys(steps, float("inf"))
    for _ in range(5):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - begin > limit:
            break
    return best


def max_error(got, want) -> float:
    """The largest error of a position, relative to what is there; where that is next to nothing
    (the first token has no dq), to a tenth of what there is on average."""
    errors = []
    for g, w in zip(got, want):
        error = (g.to(w.dtype) - w).flatten(2).norm(dim=2)  # (B, T)
        size = w.flatten(1).norm(dim=1)
        mean = size.square().mean().sqrt().clamp(min=1e-2)
        errors.append((error / (size + 0.1 * mean)).max())
    return torch.stack(errors).max().item()


def reason(error: Exception, warned: list[str]) -> str:
    """In one line. torch warns of why a kernel refuses, and that the others are switched off."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    own = [t for t in warned if "runtime disabled" not in t and "not used because" not in t]
    text = own[-1].partition(" (Triggered")[0] if own else str(error)
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0][:120]}"
