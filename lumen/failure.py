"""When a run fails: what it leaves for whoever looks, and for the start that comes after it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lumen.decisions import Decision
from lumen.errors import UserError
from lumen.resolve import memory_at_hand, write_hint
from lumen.sums import StepNumbers

# of another rank, that outlive a later word of ours: they say more than that it was lost
MORE_IS_KNOWN = ("input_error", "restart")


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed: NCCL has a type for that, gloo only words."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return gloo or isinstance(error, dist.DistError)


def explain(trainer, error: Exception) -> Exception:
    """Closes the report, writes status.json and, for lack of memory, oom_hint.json; -> the error
    that the user shall see: E200 or E201 for memory, E601 for a lost rank, else `error` itself."""
    trainer.report.close()
    if isinstance(error, UserError):
        state = "diverged" if error.exit_code == 3 else "input_error"
        trainer.write_status(state, error.exit_code, str(error))
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return out_of_memory(trainer, error)
    if trainer.parallel.world > 1 and lost_peer(error):
        return peer_is_lost(trainer, error)
    trainer.write_status("stopped", 1, f"{type(error).__name__}: {error}")
    return error


def raise_explained(trainer, error: Exception) -> None:
    """What explain() makes of it, raised."""
    shown = explain(trainer, error)
    if shown is error:
        raise error
    raise shown from error


def out_of_memory(trainer, error: Exception) -> UserError:
    """Not in a micro-step, which would be repeated smaller: in a collective, the optimizer, an
    evaluation. A restart takes half as many rows at once."""
    first_line = (str(error).splitlines() or ["?"])[0]
    text = f"step {trainer.step}"
    if trainer.run.micro_batch == 1:
        text += f", one row a micro-step: {first_line}"
        trainer.write_status("input_error", 2, text, anyone=True)
        advice = "activation_checkpointing: block, or a smaller model"
        return UserError("E200", f"{text}; try {advice}")
    smaller = trainer.run.micro_batch // 2
    hint = {"micro_batch": smaller, "written": trainer.written.get("batch_size")}
    hint |= {"step": trainer.step, "device": memory_at_hand(trainer.machine)}
    write_hint(trainer.out, trainer.parallel.rank, hint)
    text += f": {first_line}; a restart goes on with {smaller} rows a micro-step (oom_hint.json)"
    trainer.write_status("restart", 75, text, anyone=True)
    return UserError("E201", text)


def peer_is_lost(trainer, error: Exception) -> UserError:
    """The word of the rank that was lost, if it could say why, stays in status.json."""
    text = f"step {trainer.step}: "
    if "imed out" in str(error):
        text += "another rank hangs or cannot be reached: "
    text += str(error).splitlines()[0]
    there = trainer.report.read_status()
    if there.get("attempt") != trainer.report.attempt or there.get("state") not in MORE_IS_KNOWN:
        trainer.write_status("restart", 75, text)
    return UserError("E601", text)


def begin_again_smaller(trainer, step: int, cursor: int) -> None:
    """A rank ran out of memory in the micro-batches of `step`, which was dropped everywhere: begin
    it again, the same rows in smaller ones. E200 where they cannot be smaller."""
    t = trainer
    t.step, t.cursor = step, cursor
    rows = t.run.rows_per_step // t.parallel.rows()[1]
    size = t.run.micro_batch
    smaller = [m for m in range(1, size // 2 + 1) if rows % m == 0]
    what = f"a rank ran out of memory with {size} rows a micro-step"
    if not smaller:
        t.save()
        advice = "activation_checkpointing: block, a shorter max_seq_len, or a smaller model"
        text = f"{what} at step {step}, and there are none smaller; try {advice}"
        raise UserError("E200", text)
    t.orchestrator.halted.zero_()  # from here on steps count again
    t.set_micro_batch(smaller[-1])
    t.found.hint = f"a rank ran out of memory at step {step} with {size}"
    decision = Decision("oom", "adjust_batch_size", f"{what}: same rows again", 1, always=True)
    decision.more = {"args": {"new_size": smaller[-1]}, "before": size}
    t.orchestrator.decide(decision, StepNumbers(step, cursor, t.orchestrator.iteration))
