"""batch_size: auto on CUDA: how many rows really fit, tried out."""

from __future__ import annotations

import math

import numpy as np
import torch

from lumen import machine as machines
from lumen.errors import UserError
from lumen.machine import free_memory
from lumen.parallel import trained
from lumen.windows import dummy_batch


def largest_batch(trainer, rows: int) -> tuple[int, str]:
    """(micro-batch, what was found): the most rows of data, of those that divide a step's `rows` on
    this rank, whose forward and backward pass stays within target_memory; by bisection.

    All ranks take the least of what each has found. Weights, moments and seeds stay as they are, no
    gradient is left. E200 where one row does not fit. Never run on a GPU yet: the search and what
    it leaves behind are tested.
    """
    parallel = trainer.parallel
    room = trainer.cfg.target_memory * machines.total_memory(parallel.device)
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    peaks: dict[int, float] = {}  # rows: bytes
    low, high = 0, len(sizes)  # the first `low` sizes fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        n = sizes[middle]
        peaks[n] = peak_of(trainer, n, accumulates=n < rows)
        if peaks[n] <= room:
            low = middle + 1
        else:
            high = middle
    mine = sizes[low - 1] if low else 0
    best = -parallel.all_reduce_max([-mine])[0]  # the least of all ranks
    if not best:
        text = f"one row does not fit into {room / 2**30:.2f} GiB"
        fix = "try activation_checkpointing: block, or train_fsdp.py on more GPUs"
        raise UserError("E200", f"batch_size: auto: a probe found that {text}; {fix}")
    need = peaks.get(best, 0)  # 0: another rank had the last word
    return best, f"{need / 2**30:.2f} of {room / 2**30:.2f} GiB"


def peak_of(trainer, rows: int, accumulates: bool) -> float:
    """Bytes at the peak of one micro-step; inf: it ran out of memory.

    `accumulates`: as the gradients of the micro-steps before it lie there too.
    """
    peak = math.inf
    try:
        if accumulates:
            for p in trained(trainer.model):
                p.grad = torch.zeros_like(p)
        peak = peak_bytes(trainer, rows)
    except torch.OutOfMemoryError:
        pass
    finally:
        trainer.model.zero_grad(set_to_none=True)
    free_memory(trainer.parallel.device)  # out here no traceback holds on to tensors any more
    return peak


def peak_bytes(trainer, rows: int) -> int:
    """Bytes that a forward and backward pass of so many rows of data reserves at most, with the
    run's own loss (a pair's row is two of the model); eager, which needs no less.

    Gradients are added to those that are there, and stay.
    """
    t, device = trainer, trainer.parallel.device
    cfg = t.model.cfg
    batch = dummy_batch(0, rows, cfg.max_seq_len, t.data.sources.values())
    # unlike tokens: they go to many experts; all are targets
    ids = (np.arange(batch.x.size) * 7919 % cfg.vocab_size).reshape(batch.x.shape)
    if batch.reference is not None:
        batch.reference[:, 0] = 0.0  # one pair a row
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.compiler.set_stance("force_eager"):
        t.loss(*t.parallel.feed.batch(ids, ids, *batch[3:]))[0].backward()
    return torch.cuda.max_memory_reserved(device)
