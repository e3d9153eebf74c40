"""Where a run stands: into a checkpoint or a snapshot, and back.

Weights and moments are tensors (`Trainer.tensors`). Here are the numbers that belong to them, and
what must happen to the rest of the run when they become others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from lumen import checkpoint
from lumen.resolve import resolved
from lumen.saver import copy_in


class State:
    """Of a Trainer, which it reads and writes."""

    def __init__(self, trainer):
        self.trainer = trainer

    # ---- out

    def numbers(self) -> dict:
        """What goes back with the weights in a rollback, besides the step."""
        return {"tokens": self.trainer.tokens} | self.trainer.progress.numbers()

    def document(self) -> dict:
        """state.json: every number that a resumed run needs, and what it ran with."""
        t = self.trainer
        config = resolved(t.cfg, t.run)
        config["model"] |= t.control.model_keys()  # what samplers must know of the knobs
        return self.numbers() | {
            "step": t.step,
            "cursor": t.cursor,
            "attempt": t.report.attempt,
            "config": config,
            "run": dataclasses.asdict(t.run),
            "written": t.written,
            "model_written": t.model_written,
            "fingerprints": t.data.fingerprints,
            "data_facts": t.data.facts(),
            "versions": t.versions,
            "scaler": t.loss_scale.state() if t.loss_scale else None,
            "orchestrator": t.orchestrator.state(),
            "clean": t.orchestrator.clean,
            "forecast": t.forecast.state_dict(),
            "tokenizer": t.data.tokenizer_sum or t.start.tokenizer,
            "template": t.data.template,
            "wandb_id": t.report.wandb_id,
            **t.beside,
        }

    # ---- and back

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Tensors and loss scale of a checkpoint, in place. E305 where it has others."""
        t = self.trainer
        copy_in(saved, t.tensors(), t.parallel)
        if t.loss_scale is not None and saved.state["scaler"]:
            t.loss_scale.load(saved.state["scaler"])

    def take(self, numbers: dict) -> None:
        """Those of a checkpoint or snapshot."""
        t = self.trainer
        t.tokens = numbers.get("tokens", t.tokens)
        same_data = numbers.get("fingerprints") == t.data.fingerprints
        lost = t.progress.take(numbers, same_data)
        if lost:
            t.say(f"note       val_loss begins anew: {lost} was of another validation set")

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Weights, moments and every number of the run, in place."""
        t = self.trainer
        self.restore(saved)
        t.step, t.cursor = saved.state["step"], saved.state["cursor"]
        self.take(saved.state)
        if Path(saved.path).resolve().parent == t.out.resolve():  # another run keeps its curves
            t.report.wandb_id = saved.state.get("wandb_id")

    def load_history(self, saved: checkpoint.Checkpoint) -> None:
        """What a checkpoint knows of its run's past: curves and detectors go on."""
        t, state = self.trainer, saved.state
        t.progress.find_best(t.out, t.parallel)
        same_data = state["fingerprints"] == t.data.fingerprints
        if same_data and "forecast" in state:
            t.forecast.load_state_dict(state["forecast"])
        if "orchestrator" in state:
            of_another_run = t.start.origin is not None
            t.orchestrator.load(state["orchestrator"], not same_data, of_another_run)

    def rewind(self, numbers: dict) -> None:
        """Back to the step of `numbers`, whose tensors are there already. The cursor stays beyond
        what was read; the checkpoints after that step are set aside."""
        t = self.trainer
        t.saver.finish()
        t.pending = None
        t.step = numbers["step"]
        self.take(numbers)
        t.start.set_damaged_aside()
        if t.main:
            with contextlib.suppress(OSError):
                checkpoint.set_aside(t.out, t.step)
        t.progress.find_best(t.out, t.parallel)
        t.set_micro_batch(t.run.micro_batch)  # the loader reads on from the cursor
        t.watch.restart(t.step)
        t.report.progress(t.step)
