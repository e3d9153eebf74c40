"""Whether a run is well, and if not why: a line on the console and in metrics.jsonl."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch

from lumen import machine as machines
from lumen.stopwatch import Stopwatch


@dataclass
class Checkup:
    """What Health looks at, besides the time. The first four are no matter of speed."""

    off_course: bool  # an alarm, or one building up
    guessing: tuple[str, str] | None  # see Guessing.verdict
    above_start: float  # nats
    unsaved: bool
    rows: list[dict]  # of each rank: what grew since the last checkup, see counters()
    rank: int
    evaluated: bool  # since the last checkup
    unbalanced: list[int]  # layers


def counters(iteration: int, watch: Stopwatch, compiled: bool, cuda: bool) -> dict:
    """What grows on this rank. By the device's clock where there is one: launching takes alike on
    all ranks, whatever their GPUs do."""
    found = {"iterations": iteration, "seconds": time.perf_counter()}
    found |= watch.spent | watch.on_device
    found["graphs"] = machines.compiled_graphs() if compiled else 0
    found["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0) if cuda else 0
    return found


class Health:
    """Every check_interval steps: healthy, warning or critical, the causes, advice on the first."""

    WAIT = 0.2  # of the time, for data
    SLOW_RANK = 1.2  # times as long as the others compute
    SLOWER = 1.25  # times slower than at first
    SLOW_CHECKS = 3  # in a row
    FIRST_PACES = 5  # checks that say what is usual

    def __init__(self):
        self.status: str | None = None  # None: nobody has looked yet
        self.causes: list[str] = []
        self.before: dict | None = None  # counters at the last checkup
        self.paces: list[float] = []  # steps a second at the first checkups
        self.slow = 0  # checkups in a row

    def grown(self, now: dict) -> dict:
        """What the counters have grown by since the last call."""
        before = self.before or now
        self.before = now
        return {name: value - before[name] for name, value in now.items()}

    def examine(self, checkup: Checkup) -> str | None:
        """Returns the line to be said, where something has changed."""
        found = self.loss_findings(checkup) + self.speed_findings(checkup)
        if checkup.unbalanced:
            what = f"experts of layers {checkup.unbalanced} stay unbalanced"
            found.append((1, what, "raise bias_update_rate or aux_loss_weight"))
        found.sort(key=lambda finding: -finding[0])
        status = ("healthy", "warning", "critical")[found[0][0] if found else 0]
        causes = [what for _, what, _ in found]
        # the numbers in it may change without a word
        same = [c.split(" ")[:3] for c in causes] == [c.split(" ")[:3] for c in self.causes]
        changed = status != (self.status or "healthy") or not same
        self.status, self.causes = status, causes
        if not changed:
            return None
        return f"{status}: {'; '.join(causes)}; advice: {found[0][2]}" if found else status

    def loss_findings(self, checkup: Checkup) -> list[tuple[int, str, str]]:
        """[(2 critical or 1 warning, what, advice)]"""
        found = []
        if checkup.off_course:
            what = "the loss or gradients have left their course"
            found.append((2, what, "see decisions.jsonl"))
        if checkup.guessing:
            found.append((2, *checkup.guessing))
        if checkup.above_start > 0.1:
            what = f"the loss is {checkup.above_start:.2f} nats above where this run began"
            advice = "lower learning_rate, lengthen warmup_steps, or look at the data"
            found.append((2, what, advice))
        if checkup.unsaved:
            found.append((2, "the last checkpoint could not be written", "free disk space"))
        return found

    def speed_findings(self, checkup: Checkup) -> list[tuple[int, str, str]]:
        rows, mine, found = checkup.rows, checkup.rows[checkup.rank], []
        steps = mine["iterations"]
        work = max(1e-9, mine["seconds"] - mine["checkpoint"])
        if not steps:
            return found
        wait = max(row["data"] for row in rows) / work
        if wait > self.WAIT:
            what = f"{100 * wait:.0f} % of the time is waiting for data"
            found.append((1, what, "use a faster disk, or copy the data"))
        for rank, row in enumerate(rows):
            others = [other["compute"] for i, other in enumerate(rows) if i != rank]
            usual = statistics.median(others) if others else math.inf
            if row["compute"] > self.SLOW_RANK * usual and row["compute"] > 0.02 * work:
                ratio = row["compute"] / max(1e-9, usual)
                what = f"rank {rank} computes {ratio:.1f} times as long as the others"
                found.append((1, what, "look at its machine"))
        if any(row["retries"] for row in rows):
            what = "the allocator ran out of memory and tried again"
            found.append((1, what, "lower batch_size (adjust_batch_size)"))
        # at first everything is compiled, and an evaluation has a graph of its own
        if any(row["graphs"] for row in rows) and self.paces and not checkup.evaluated:
            what = f"{mine['graphs']} graphs were compiled anew"
            found.append((1, what, "keep shapes and capacities constant"))
        pace = steps / work
        if len(self.paces) < self.FIRST_PACES:
            self.paces.append(pace)
        usual = statistics.median(self.paces)
        self.slow = self.slow + 1 if pace < usual / self.SLOWER else 0
        if self.slow >= self.SLOW_CHECKS:
            what = f"{pace:.3g} steps/s, at first it was {usual:.3g}"
            found.append((1, what, "is something else on this machine?"))
        return found
