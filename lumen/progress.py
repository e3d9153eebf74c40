"""What the evaluations of a run have found so far, and what follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np

from lumen import checkpoint
from lumen.forecast import paired_rise


@dataclass
class Progress:
    """Goes back with the weights in a rollback, and into every checkpoint."""

    measured_on: str | None = None  # the validation set that all of this is of, see data.val_sum
    val_loss: float | None = None  # of the last evaluation
    evaluated_at: int | None = None  # its step
    best_val_loss: float | None = None
    best_step: int | None = None
    best_parts: list[float] = field(default_factory=list)  # losses of the best one's batches
    evaluations_since_best: int = 0
    stopped_early: bool = False
    # for forecast.justified_stop
    gains: list[float] = field(default_factory=list)  # what successive looks ahead promised
    rises: list[float] = field(default_factory=list)  # how sure evaluations were of a rise

    def numbers(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def take(self, numbers: dict, same_data: bool) -> str | None:
        """Those of a checkpoint or snapshot. What was measured on another validation set cannot be
        compared, and begins anew: then the best of that one is returned, as text.

        `same_data`: for old checkpoints, which do not say what they measured on.
        """
        measured_on = self.measured_on
        for f in dataclasses.fields(self):
            setattr(self, f.name, numbers.get(f.name, getattr(self, f.name)))
        self.measured_on = measured_on
        there = numbers.get("measured_on")
        if there == measured_on or (there is None and same_data):
            return None
        best = None
        if self.best_val_loss is not None:
            best = f"best {self.best_val_loss:.4f} at step {self.best_step}"
        evaluated_at = self.evaluated_at
        for f in dataclasses.fields(self):
            fresh = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            setattr(self, f.name, fresh)
        self.measured_on, self.evaluated_at = measured_on, evaluated_at
        return best

    def compare(self, step: int, loss: float, batch_losses: list[float]) -> bool:
        """Take an evaluation in; returns whether it is the best so far."""
        self.val_loss = loss
        better = self.best_val_loss is None or loss < self.best_val_loss
        if better and math.isfinite(loss):
            self.best_val_loss = loss
            self.best_step = step
            self.evaluations_since_best = 0
            self.best_parts = batch_losses
            self.rises = []
            return True
        self.evaluations_since_best += 1
        if len(batch_losses) == len(self.best_parts):  # the same batches as at the best
            before, now = np.array(self.best_parts), np.array(batch_losses)
            self.rises = [*self.rises[-1:], paired_rise(before, now)]
        return False

    def out_of_patience(self, patience: int) -> str:
        """Why the run ends now, where it does. `patience`: evaluations; 0: without a limit."""
        if not patience or self.evaluations_since_best < patience:
            return ""
        return f"early stop: {self.evaluations_since_best} evaluations without a new best"

    def find_best(self, out, parallel) -> None:
        """If the best step is gone (set aside, damaged, deleted) the best of those still in `out`
        takes its place. Rank 0 looks, all ranks know."""
        if parallel.rank == 0 and self.best_step is not None:
            steps = checkpoint.list_steps(out)
            if self.best_step not in steps:
                found = checkpoint.best_of(out, steps, self.measured_on)
                self.best_val_loss, self.best_step = found
        best = (self.best_val_loss, self.best_step)
        self.best_val_loss, self.best_step = parallel.broadcast(best)
