"""batch_size: auto on CUDA: how many rows really fit, tried out."""

from __future__ import annotations

import math

import torch

from lumen import machine as machines
from lumen.errors import UserError
from lumen.machine import free_memory
from lumen.parallel import trained


def largest_batch(
    model, parallel, rows: int, target_memory: float, sides: int = 1
) -> tuple[int, str]:
    """(micro-batch, what was found): the most rows, of those that divide a step's `rows` on this
    rank, whose forward and backward pass stays within target_memory; by bisection. sides: rows of
    the model that a row is, 2 of pairs.

    All ranks take the least of what each has found. Weights, moments and seeds stay as they are, no
    gradient is left. E200 where one row does not fit. Never run on a GPU yet: the search and what
    it leaves behind are tested.
    """
    room = target_memory * machines.total_memory(parallel.device)
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    peaks: dict[int, float] = {}  # rows: bytes
    low, high = 0, len(sizes)  # the first `low` sizes fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        n = sizes[middle]
        peaks[n] = peak_of(model, n * sides, parallel.device, accumulates=n < rows)
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


def peak_of(model, rows: int, device, accumulates: bool) -> float:
    """Bytes at the peak of one micro-step; inf: it ran out of memory.

    `accumulates`: as the gradients of the micro-steps before it lie there too.
    """
    peak = math.inf
    try:
        if accumulates:
            for p in trained(model):
                p.grad = torch.zeros_like(p)
        peak = peak_bytes(model, rows, device)
    except torch.OutOfMemoryError:
        pass
    finally:
        model.zero_grad(set_to_none=True)
    free_memory(device)  # out here no traceback holds on to tensors any more
    return peak


def peak_bytes(model, rows: int, device) -> int:
    """Bytes that a forward and backward pass of so many rows reserves at most; eager, which needs
    no less.

    Gradients are added to those that are there, and stay.
    """
    T, V = model.cfg.max_seq_len, model.cfg.vocab_size
    # unlike tokens: they go to many experts
    ids = (torch.arange(rows * T, device=device) * 7919 % V).view(rows, T)
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.compiler.set_stance("force_eager"):
        model(ids, targets=ids)[0].backward()
    return torch.cuda.max_memory_reserved(device)
