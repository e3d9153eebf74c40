"""How long a step takes on this machine, tried: what `--dry_run` says of time where it can.

A micro-batch goes forward and backward, and the optimizer makes a step, with the run's own shapes,
precision, attention and experts. Ids are random and nothing is written. Eager, as compiling takes
longer than a dry run may.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from lumen.config import Config
from lumen.feed import synchronize
from lumen.machine import Machine
from lumen.resolve import Run
from lumen.setup import prepare_model
from lumen.tryout import as_in_the_run
from model import Transformer
from tools.bench_step import Step, batch, fill_quickly, four_documents

LEAST, MOST = 2, 20  # steps that are timed
ENOUGH = 1.0  # seconds, after which no more than LEAST are


class Trial(NamedTuple):
    """Seconds of a step's two parts."""

    micro_step: float  # forward and backward of a micro-batch
    update: float  # clipping and the optimizer


def try_step(cfg: Config, run: Run, machine: Machine, documents: bool) -> tuple[Trial, int]:
    """(the median, of how many steps) of a pre-training run in one process. documents: attention is
    masked by them."""
    cfg, eager = replace(cfg, learning_rate=0.0), replace(run, compile_model=False)
    with as_in_the_run(run.deterministic):
        with torch.device(machine.device):
            model = Transformer(cfg.model)
        fill_quickly(model)
        prepare_model(model, cfg, eager, machine.compute_dtype)
        step = Step(cfg, model, machine, run.micro_batch, run.deterministic)
        if documents:
            step.docs = four_documents(step.x)
        timed(step, 0)  # warms up
        times = []
        while len(times) < LEAST or (len(times) < MOST and sum(map(sum, times)) < ENOUGH):
            times.append(timed(step, 1 + len(times)))
    return Trial(*map(statistics.median, zip(*times))), len(times)


def timed(step: Step, seed: int) -> Trial:
    """One step on ids of its own: experts get another number of tokens each time, and oneDNN, which
    makes a kernel for each, takes twice as long as on a batch that it knows (measured)."""
    device = step.machine.device
    step.x, step.y = batch(step.model.cfg, len(step.x), device, seed)
    synchronize(device)
    began = time.perf_counter()
    sums = step.micro_step()
    synchronize(device)
    between = time.perf_counter()
    step.update(sums)
    synchronize(device)
    return Trial(between - began, time.perf_counter() - between)
