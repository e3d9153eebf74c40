"""What a run's seconds are spent on: laps of the host's clock, marks in the queue of a GPU."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from lumen.feed import event_now

PARTS = ("data", "compute", "communication", "update", "evaluation", "checkpoint", "other")


class Interval(NamedTuple):
    """From one log line to another, evaluations and saves left out."""

    steps: int
    seconds: float
    spent: dict[str, float]  # seconds for each of PARTS; with evaluations and saves

    def speed(self) -> float:
        """Steps a second."""
        return max(1, self.steps) / self.seconds

    def shares(self) -> dict[str, float]:
        """What part of all seconds went to each of PARTS."""
        total = max(1e-9, sum(self.spent.values()))
        return {name: seconds / total for name, seconds in self.spent.items()}


class Stopwatch:
    """Splits the time of a run into PARTS, and times the steps since the last log line.

    On a CPU the host's clock tells all. A GPU lags behind the host: its work shows up where it is
    waited for, and while the host waits for data it may still compute. So with `runs_ahead` a wait
    for data counts as compute until `measure` knows how long the GPU itself had nothing to do.
    """

    def __init__(self, step: int = 0, runs_ahead: bool = False):
        self.runs_ahead = runs_ahead
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.on_device: dict[str, float] = {}  # seconds by the GPU's clock, which ranks compare
        self.last = Interval(0, math.inf, {})  # that of the last log line; before it: speed 0
        self._marks = []
        self._lap_began = time.perf_counter()
        self.restart(step)

    def start(self, step: int) -> None:
        """The loop begins: what came before it is nobody's lap."""
        self._lap_began = time.perf_counter()
        self.restart(step)

    # ---- laps of the host

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`, one of PARTS."""
        now = time.perf_counter()
        if self.runs_ahead and name == "data":
            name = "compute"
        self.spent[name] += now - self._lap_began
        self._lap_began = now

    # ---- marks in the GPU's queue

    def mark(self, name: str) -> None:
        """On CUDA: what was queued since the last mark is `name`.

        Nothing is queued during a wait for data, so between the marks around it lies the time for
        which the GPU was idle. Tested with an emulated queue only.
        """
        if self.runs_ahead:
            self._marks.append((name, event_now()))

    def take_marks(self) -> list:
        """The marks since the last call, to be given to `measure` once the GPU has passed them."""
        marks, self._marks = self._marks, []
        return marks

    def measure(self, marks: list) -> None:
        """Add the seconds between the marks of an iteration whose work is done."""
        for (_, before), (name, after) in zip(marks, marks[1:]):
            seconds = before.elapsed_time(after) / 1000  # it says milliseconds
            self.on_device[name] = self.on_device.get(name, 0.0) + seconds
            if name == "data":
                self.spent["data"] += seconds
                self.spent["compute"] -= seconds

    # ---- from log line to log line

    def restart(self, step: int, last: Interval | None = None) -> None:
        """A new interval begins at `step`; `last`: the one that was just logged."""
        self._began = time.perf_counter()
        self._began_at = step
        self._spent_before = dict(self.spent)
        if last is not None:
            self.last = last

    def leave_out(self, seconds: float) -> None:
        """What just took so long was no training, and slows no speed down."""
        self._began += seconds

    def interval(self, step: int) -> Interval:
        """From the last restart to now, where `step` steps are done."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        spent = {name: total - self._spent_before[name] for name, total in self.spent.items()}
        return Interval(step - self._began_at, seconds, spent)
