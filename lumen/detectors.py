"""What is noise and what is not: plain numbers in, plain numbers out, no torch. The orchestrator asks, and acts.

`NormLimit` says how large a gradient norm may be, `Divergence` whether the loss has left its course. Both keep only
what was accepted, so that a fault never becomes the measure of the next one. `above_chance` needs no past
at all: a run that exploded in its first steps has none to be measured by.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass
class StepNumbers:
    """What the host knows of one step, once its numbers have arrived. Sums are over all ranks."""

    step: int
    cursor: int  # the first row of the step's batch
    iteration: int  # passes through the loop; never comes back, as a step does after a rollback
    lr: float = 0.0
    loss: float = math.nan  # cross-entropy, mean over the step's targets, nats
    z_loss: float = 0.0  # unweighted, mean over the step's targets
    grad_norm: float = math.nan  # of the true gradient, before clipping
    tokens: int = 0  # targets that were trained on: 0 where the step was dropped
    bad: bool = False  # the step was dropped
    exploded: bool = False  # its gradient norm was above what was to be expected
    loss_finite: bool = True
    oom: bool = False  # a rank ran out of memory: the step is void, and none of the numbers holds
    stop: bool = False  # a rank was asked to stop
    save: bool = False  # a rank was asked for a checkpoint
    control: bool = False  # control.jsonl has new lines
    desynced: bool = False  # the ranks' weights differ
    sums: dict | None = None  # of the sparse layers, by name, where they were fetched
    experts: dict | None = None  # experts.expert_statistics of these
    depth: dict | None = None  # experts.mod_statistics of these


def centre(values: list[float]) -> tuple[float, float]:
    """Median, and median absolute deviation scaled to the standard deviation of a normal distribution. Plain Python:
    sorting a hundred floats takes less time than numpy's median needs to begin."""
    middle = statistics.median(values)
    return middle, 1.4826 * statistics.median([abs(x - middle) for x in values])


def above_chance(loss: float, n_vocab: int) -> bool:
    """Whether a cross-entropy (without z-loss and the like) lies above ln(n_vocab), what guessing evenly
    costs, by more than noise: 0.1 nats and 2 %, as in Divergence.floor. NaN does."""
    chance = math.log(n_vocab)
    return not loss <= chance + max(0.1, 0.02 * chance)


class NormLimit:
    """How large a gradient norm may be: log G <= median + max(12 robust deviations, ln 4) over 128 accepted steps.

    The logarithm makes norms nearly normal: 12 deviations is never noise. Starts at 32 accepted steps; ends two turns
    before the one it is asked about, so that no answer waits for the device.
    """

    WINDOW, START, SIGMAS, FACTOR = 128, 32, 12.0, 4.0

    def __init__(self):
        self.seen: deque = deque(maxlen=self.WINDOW + 2)  # (turn, log G)

    def add(self, turn: int, norm: float) -> None:
        if norm > 0 and math.isfinite(norm):
            self.seen.append((turn, math.log(norm)))

    def limit(self, turn: int) -> float | None:
        """The largest log G that passes at `turn`; None: too little seen."""
        logs = [x for t, x in self.seen if t <= turn - 2][-self.WINDOW :]
        if len(logs) < self.START:
            return None
        middle, spread = centre(logs)
        return middle + max(self.SIGMAS * spread, math.log(self.FACTOR))

    def confidence(self, turn: int, norm: float) -> float:
        """That this norm is no noise: Sellke's bound on the normal tail, prior 1 in 1000, and never above 0.99."""
        logs = [x for t, x in self.seen if t <= turn - 2][-self.WINDOW :]
        middle, spread = centre(logs)
        z = (math.log(norm) - middle) / max(spread, math.log(self.FACTOR) / self.SIGMAS)
        return p_confidence(0.5 * math.erfc(z / math.sqrt(2)))


def p_confidence(p: float, prior: float = 1e-3) -> float:
    """Confidence from a p-value: the upper bound -1 / (e p ln p) on its Bayes factor (Sellke et al. 2001)."""
    p = max(p, 1e-300)
    if p >= 1 / math.e:
        return prior
    odds = -1 / (math.e * p * math.log(p)) * prior
    return min(0.99, odds / (odds + 1 - prior))


class Divergence:
    """Whether the loss has left its course: a conformal e-CUSUM with an effect floor.

    Residual r = loss - where the last 64 accepted losses lead (the medians of their halves, and the slope between them
    where it falls). The rank of r - sigma among up to 256 accepted residuals is a p-value, 0.5 / sqrt(p) a bet against
    "this run is healthy" that no healthy run can win on average; E multiplies the bets and restarts at 1. confidence =
    E prior / (E prior + 1 - prior), prior 1e-5 a step. While E > 64 nothing is accepted (128 turns of that without an
    alarm: a new level that does not matter, and all begins anew), nor is a single r above the floor: 6 deviations, 0.1
    nats, 2 % of the loss. An alarm also needs the median of the last 7 residuals above it. So one outlier is no alarm,
    and a healthy run's luck is too small to be one.
    """

    TREND, WINDOW, START, PRIOR, FREEZE, PATIENCE = 64, 256, 32, 1e-5, 64.0, 128

    def __init__(self):
        self.losses: deque = deque(maxlen=self.TREND)  # accepted
        self.residuals: deque = deque(maxlen=self.WINDOW)  # (turn, residual), accepted
        self.last: deque = deque(maxlen=self.PATIENCE)  # (turn, residual), accepted or not
        self.E, self.began, self.frozen, self.residual, self.sigma = 1.0, 0, 0, 0.0, None
        self.levels: deque = deque(
            maxlen=32
        )  # [turn, median of 32 accepted losses], one in 8 turns
        self.slow = None  # where a slow rise began
        self.first: list = []  # the first 8 losses

    def add(self, turn: int, loss: float) -> None:
        if len(self.first) < 8:
            self.first.append(loss)
        if len(self.losses) < self.TREND // 2:
            self.losses.append(loss)
            return
        self.residual = loss - self.expected()
        if len(self.residuals) < self.START:
            self.losses.append(loss)
            self.residuals.append((turn, self.residual))
            return
        self.last.append((turn, self.residual))
        if self.sigma is None or turn % 16 == 0:
            self.sigma = self.scale()
        low = (
            self.residual - self.sigma
        )  # the allowance of a CUSUM: less than that is curvature, not a fault
        n = sum(r >= low for _, r in self.residuals)
        if self.E <= 1.0:
            self.began = turn
        self.E = min(1e12, max(1.0, self.E) * 0.5 / math.sqrt((1 + n) / (len(self.residuals) + 1)))
        self.frozen = self.frozen + 1 if self.E > self.FREEZE else 0
        if not self.frozen and turn % 8 == 0:
            self.crept(turn)
        high = self.residual > 0.1 and self.residual > self.floor()
        if not self.frozen and not high and not self.too_low():
            self.losses.append(loss)
            self.residuals.append((turn, self.residual))

    def lost(self) -> tuple[int, float] | None:
        """Before there is a course to leave: all that was learned is lost, the loss is above the first ones. For how
        many losses, and the level at which half of it is back; None: no. A rule, no bet: of medians of 8 losses the
        lowest lies 0.3 nats and 3 deviations of the noise below the first, the last 0.1 and 3 above (such medians
        differ by 0.6 deviations)."""
        if len(self.residuals) >= self.START or not self.above_start() > 0.1:
            return None
        start, values = statistics.median(self.first), list(self.losses)
        noise = centre([b - a for a, b in zip(values, values[1:])])[1] / math.sqrt(2)
        low, at = min((statistics.median(values[i : i + 8]), i) for i in range(len(values) - 7))
        if low > start - max(0.3, 3 * noise) or self.above_start() < 3 * noise:
            return None
        half = (start + low) / 2
        since = next((i for i, x in enumerate(reversed(values)) if x < half), len(values) - at - 8)
        return since, half

    def above_start(self) -> float:
        """Nats by which the last 8 accepted losses lie above the first 8: nothing was learned, or all of it is lost."""
        if len(self.losses) < 16 or len(self.first) < 8:
            return 0.0
        return self.level() - statistics.median(self.first)

    def level(self) -> float | None:
        """Median of the last 8 accepted losses."""
        return statistics.median(list(self.losses)[-8:]) if self.losses else None

    def crept(self, turn: int) -> None:
        """A rise so slow that the trend goes with it: the median of 32 losses above the lowest of the last 256 turns by
        the floor. The baseline goes back to where it began. A rule, no bet: it counts as a confidence of 0.91."""
        self.levels.append([turn, statistics.median(list(self.losses)[-32:])])
        lowest, low = min(self.levels, key=lambda x: x[1])
        if self.levels[-1][1] > low + self.floor():
            self.losses = deque([low] * self.TREND, maxlen=self.TREND)
            self.E, self.frozen, self.slow = 1e6, 1, max(0, lowest - 32)
            self.levels.clear()

    def expected(self) -> float:
        """Where the accepted losses lead. A rise is not extrapolated: it is what is looked for."""
        values, half = list(self.losses), len(self.losses) // 2
        late, early = statistics.median(values[-half:]), statistics.median(values[:half])
        return late + min(0.0, late - early) * (half + 1) / (2 * half)

    def too_low(self) -> bool:
        """A loss far below its course: data without content (or a leak of the targets), no sign of health."""
        return self.residual < -0.1 and self.residual < -12 * self.scale()

    def spread(self) -> float:
        return (
            centre([r for _, r in self.residuals])[1]
            if len(self.residuals) >= self.START
            else math.inf
        )

    def scale(self) -> float:
        """The noise of now: that of what was accepted, or of the last 64 turns if larger, up to three times. A young
        run's noise grows with what it has learned; from differences, so that a rise of the loss does not count."""
        accepted, last = self.spread(), [r for _, r in self.last][-64:]
        if len(last) < 16:
            return accepted
        recent = centre([b - a for a, b in zip(last, last[1:])])[1] / math.sqrt(2)
        return min(3 * accepted, max(accepted, recent))

    def floor(self) -> float:
        """Nats by which the loss must have risen to matter."""
        level = statistics.median(self.losses) if self.losses else 0.0
        return max(6 * self.scale(), 0.1, 0.02 * abs(level))

    @property
    def confidence(self) -> float:
        odds = self.E * self.PRIOR
        return odds / (odds + 1 - self.PRIOR)

    @property
    def suspicious(self) -> bool:
        """Something may be building up: nothing saved now is called clean."""
        return self.E > self.FREEZE and self.excess(3) > self.floor() / 2

    def alarm(self, threshold: float) -> bool:
        return (
            self.confidence >= threshold and len(self.last) >= 7 and self.excess(7) > self.floor()
        )

    def onset(self) -> int:
        """The turn at which it began: where E did, but no earlier than ten turns before the last rise out of what does
        not matter (E may have been carried upwards by a trifle before). A slow rise: after its lowest level."""
        if self.slow is not None:
            return self.slow
        small = [t for t, r in self.last if r < self.floor() / 2]
        return max(self.began, (small[-1] if small else self.began) - 10)

    def excess(self, n: int) -> float:
        """Median of the last n residuals."""
        return statistics.median(r for _, r in list(self.last)[-n:]) if len(self.last) >= n else 0.0

    def correlation(self, before: float = math.inf) -> float:
        """Lag-1 autocorrelation of the loss's noise before a turn: far from 0 the ranks are no fair bets. From
        differences, which do not know a trend: theirs is -(1 - rho) / 2."""
        d = np.diff([r for t, r in self.residuals if t < before])
        d = d - d.mean() if len(d) else d
        return (
            1 + 2 * float((d[1:] * d[:-1]).sum() / max((d * d).sum(), 1e-30)) if len(d) > 8 else 0.0
        )

    def restart(self, before: int | None = None) -> None:
        """No suspicion any more; with `before`, also forget what was accepted from that turn on."""
        self.E, self.residual, self.frozen, self.slow = 1.0, 0.0, 0, None
        self.last.clear()
        self.levels.clear()
        if before is not None and len(self.residuals) < self.START:
            self.losses.clear()
        if before is not None:
            keep = [(t, r) for t, r in self.residuals if t < before]
            for _ in range(min(len(self.residuals) - len(keep), len(self.losses))):
                self.losses.pop()
            self.residuals = deque(keep, maxlen=self.WINDOW)

    def forget(self) -> None:
        """A planned change of the data, or a level that the loss has settled at: another course begins."""
        self.__init__()

    def state(self) -> dict:
        names = "first losses residuals last levels E began frozen residual sigma slow".split()
        return {k: list(v) if isinstance(v := getattr(self, k), deque) else v for k in names}

    def load(self, s: dict) -> None:
        self.first = list(s.get("first", ()))
        self.losses.extend(s["losses"])
        self.levels.extend(s["levels"])
        self.residuals.extend(map(tuple, s["residuals"]))
        self.last.extend(map(tuple, s["last"]))
        for name in ("E", "began", "frozen", "residual", "sigma", "slow"):
            setattr(self, name, s.get(name))
