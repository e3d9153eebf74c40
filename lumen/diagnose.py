"""Which module broke: the micro-batches of a step that was not finite again, without effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from lumen.errors import UserError
from lumen.loader import mix
from lumen.machine import free_memory
from lumen.windows import dummy_batch

# (x, y, docs, ..., None) of a micro-batch, with its seed set; or with why its rows cannot be read
Batches = Iterable[tuple]


def diagnose(model, parallel, loss, sizes: tuple[int, ...], batches: Callable[[int], Batches]):
    """The first module whose output is not finite, else the parameter nearest to the loss whose
    gradient is not, on this rank. None: all is finite now.

    loss: Trainer.loss. It is eager, so it may need more memory than the step did: `batches(rows)`
    is tried with each of `sizes`. To know more is not worth a run, so errors are told, not raised;
    except where forward and backward hold collectives: there all ranks raise or none.
    """
    why = ""
    for rows in sizes:
        out_of_memory = False
        try:
            return repeat(model, parallel, loss, batches(rows))
        except Exception as error:
            if not parallel.collective_free:
                raise
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            why = "no memory" if out_of_memory else f"{type(error).__name__}: {error}"
        finally:
            model.zero_grad(set_to_none=True)
        free_memory(parallel.device)  # out here, where no traceback holds on to tensors any more
        if not out_of_memory:
            break
    return f"not repeated on rank {parallel.rank}: {why}"


def repeat(model, parallel, loss, batches: Batches) -> str | None:
    """One pass over the micro-batches; gradients are left."""
    found: list[str] = []

    def look(name: str):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(first).all():
                found.append(f"{name or 'the loss'} is not finite on rank {parallel.rank}")

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules()]
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            for *batch, unreadable in batches:
                if unreadable and parallel.collective_free:
                    return unreadable
                if unreadable:
                    found.append(unreadable)
                with parallel.microstep(model, True):
                    loss(*batch)[0].backward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not parallel.finite(p.grad):
            return f"the gradient of {name} is not finite on rank {parallel.rank}"
    return None


def diagnose_step(trainer, cursor: int) -> str | None:
    """Why the step whose first row is `cursor` was not finite, as far as this rank can see."""
    par = trainer.parallel
    # where forward and backward hold collectives a second try would have to be agreed upon
    sizes = (trainer.run.micro_batch, 1) if par.collective_free else (1,)
    again = functools.partial(micro_batches_again, trainer, cursor)
    return diagnose(trainer.model, par, trainer.loss, sizes, again)


def micro_batches_again(trainer, cursor: int, rows: int) -> Batches:
    """Those of a step, so many rows at once."""
    index, count = trainer.parallel.rows()
    size = trainer.run.micro_batch
    for part in range(trainer.run.accumulation * size // rows):
        micro, inside = divmod(part * rows, size)
        row = cursor + (micro * count + index) * size + inside
        unreadable = None
        try:
            batch = trainer.loader.batch(row, rows)
        except UserError as error:
            unreadable = error.text
            shape = (size, trainer.cfg.model.max_seq_len)
            batch = dummy_batch(row, *shape, trainer.data.sources.values())
        torch.manual_seed(mix(trainer.cfg.seed, row))
        yield *trainer.parallel.feed.batch(*batch[1:]), unreadable
