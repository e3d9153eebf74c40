"""What is noise and what is not: plain numbers in, plain numbers out.

`NormLimit` says how large a gradient norm may be, `LossCourse` whether the loss has left its
course. Both keep only what was accepted, so that a fault never becomes the measure of the next one.
The detectors ask them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import numpy as np


def centre(values: list[float]) -> tuple[float, float]:
    """(median, median absolute deviation x 1.4826: a normal distribution's standard deviation)

    Plain Python: sorting a hundred floats takes less time than numpy's median needs to begin.
    """
    middle = statistics.median(values)
    return middle, 1.4826 * statistics.median([abs(x - middle) for x in values])


def above_chance(loss: float, n_vocab: int) -> bool:
    """Whether a cross-entropy lies above ln(n_vocab), what guessing costs, by more than noise.

    Noise: 0.1 nats and 2 %, as in LossCourse.floor. NaN lies above. It needs no past: a run that
    exploded in its first steps has none to be measured by.
    """
    chance = math.log(n_vocab)
    return not loss <= chance + max(0.1, 0.02 * chance)


def p_confidence(p: float, prior: float = 1e-3) -> float:
    """Confidence from a p-value: a Bayes factor at most -1 / (e p ln p), Sellke et al. 2001"""
    p = max(p, 1e-300)
    if p >= 1 / math.e:
        return prior
    odds = -1 / (math.e * p * math.log(p)) * prior
    return min(0.99, odds / (odds + 1 - prior))


class NormLimit:
    """How large a gradient norm G may be: log G <= median + max(12 robust deviations, ln 4).

    Over the last 128 accepted steps, from 32 on. The logarithm makes norms nearly normal, so 12
    deviations are never noise. It ends two iterations before the one that is asked about: their
    numbers are on the host, so no answer waits for the device.
    """

    WINDOW = 128  # steps
    START = 32  # steps
    SIGMAS = 12.0
    FACTOR = 4.0

    def __init__(self):
        self.seen: deque = deque(maxlen=self.WINDOW + 2)  # (iteration, log G)

    def add(self, iteration: int, norm: float) -> None:
        if norm > 0 and math.isfinite(norm):
            self.seen.append((iteration, math.log(norm)))

    def known(self, iteration: int) -> list[float]:
        return [x for at, x in self.seen if at <= iteration - 2][-self.WINDOW :]

    def limit(self, iteration: int) -> float | None:
        """The largest log G that passes in this iteration; None: too little was seen."""
        logs = self.known(iteration)
        if len(logs) < self.START:
            return None
        middle, spread = centre(logs)
        return middle + max(self.SIGMAS * spread, math.log(self.FACTOR))

    def confidence(self, iteration: int, norm: float) -> float:
        """That this norm is no noise: from the tail of a normal distribution, never above 0.99."""
        middle, spread = centre(self.known(iteration))
        z = (math.log(norm) - middle) / max(spread, math.log(self.FACTOR) / self.SIGMAS)
        return p_confidence(0.5 * math.erfc(z / math.sqrt(2)))

    def forget(self, since: int) -> None:
        """What was seen from iteration `since` on."""
        kept = [(at, x) for at, x in self.seen if at < since]
        self.seen = deque(kept, maxlen=self.seen.maxlen)


class LossCourse:
    """Whether the loss has left its course: a conformal e-CUSUM with an effect floor.

    1. Residual r = loss - where the last TREND accepted losses lead: the medians of their halves,
       and the slope between them where it falls. A rise is not extrapolated: it is looked for.
    2. p-value: the rank of r - sigma among up to WINDOW accepted residuals. The allowance sigma is
       a CUSUM's: less than that is curvature, not a fault.
    3. E-value: 0.5 / sqrt(p) is a bet against "this run is healthy" that no healthy run can win on
       average. E multiplies the bets and restarts at 1. Confidence: E P / (E P + 1 - P), P = PRIOR.
    4. Alarm: the confidence is at the threshold, and the median of the last 7 residuals lies above
       the floor: 6 deviations, 0.1 nats and 2 % of the loss. So one outlier is no alarm, and a
       healthy run's luck is too small to be one.

    While E > FREEZE nothing is accepted, nor is a single residual above the floor.
    """

    TREND = 64  # losses
    WINDOW = 256  # residuals
    START = 32  # residuals before any is judged
    PRIOR = 1e-5  # of a fault, a step
    FREEZE = 64.0  # of E
    MAX_FROZEN = 128  # iterations frozen without an alarm: a new level that does not matter
    LEARNED = 0.3  # nats below the first losses that count as something learned
    MATTERS = 0.1  # nats

    def __init__(self):
        self.losses: deque = deque(maxlen=self.TREND)  # accepted
        self.residuals: deque = deque(maxlen=self.WINDOW)  # (iteration, residual), accepted
        self.last: deque = deque(maxlen=self.MAX_FROZEN)  # (iteration, residual), accepted or not
        self.levels: deque = deque(maxlen=32)  # (iteration, median of 32 losses), one in 8
        self.first: list = []  # the first 8 losses
        self.E = 1.0
        self.began = 0  # the iteration in which E last was 1
        self.frozen = 0  # iterations in which nothing could be accepted
        self.residual = 0.0
        self.sigma = None
        self.slow = None  # the iteration in which a slow rise began

    def add(self, iteration: int, loss: float) -> None:
        if len(self.first) < 8:
            self.first.append(loss)
        if len(self.losses) < self.TREND // 2:
            self.losses.append(loss)
            return
        self.residual = loss - self.expected()
        if len(self.residuals) < self.START:
            self.losses.append(loss)
            self.residuals.append((iteration, self.residual))
            return
        self.last.append((iteration, self.residual))
        if self.sigma is None or iteration % 16 == 0:
            self.sigma = self.scale()
        self.bet(iteration)
        self.frozen = self.frozen + 1 if self.E > self.FREEZE else 0
        if not self.frozen and iteration % 8 == 0:
            self.find_slow_rise(iteration)
        high = self.residual > self.MATTERS and self.residual > self.floor()
        if not self.frozen and not high and not self.too_low():
            self.losses.append(loss)
            self.residuals.append((iteration, self.residual))

    def bet(self, iteration: int) -> None:
        """Steps 2 and 3 of the class's docstring."""
        low = self.residual - self.sigma
        n = sum(r >= low for _, r in self.residuals)
        p = (1 + n) / (len(self.residuals) + 1)
        if self.E <= 1.0:
            self.began = iteration
        self.E = min(1e12, max(1.0, self.E) * 0.5 / math.sqrt(p))

    def expected(self) -> float:
        """Where the accepted losses lead."""
        values = list(self.losses)
        half = len(values) // 2
        late = statistics.median(values[-half:])
        early = statistics.median(values[:half])
        return late + min(0.0, late - early) * (half + 1) / (2 * half)

    def find_slow_rise(self, iteration: int) -> None:
        """A rise so slow that the trend goes with it: the median of 32 losses lies above the lowest
        of the last 256 iterations by the floor. The baseline goes back to that lowest level."""
        self.levels.append((iteration, statistics.median(list(self.losses)[-32:])))
        lowest, low = min(self.levels, key=lambda x: x[1])
        if self.levels[-1][1] > low + self.floor():
            self.losses = deque([low] * self.TREND, maxlen=self.TREND)
            self.E = 1e6  # no bet: it counts as a confidence of RULE
            self.frozen = 1
            self.slow = max(0, lowest - 32)
            self.levels.clear()

    def all_lost(self) -> tuple[int, float] | None:
        """Before there is a course to leave: the loss is above the first ones, so all that was
        learned is lost. (For how many losses, the level at which half of it is back); None: no.

        A rule, no bet. With medians m of 8 losses and noise s: min m < m_first - max(LEARNED, 3 s),
        and m_last > m_first + max(MATTERS, 3 s). Such medians differ by 0.6 s.
        """
        if len(self.residuals) >= self.START or not self.above_start() > self.MATTERS:
            return None
        start = statistics.median(self.first)
        values = list(self.losses)
        noise = centre([b - a for a, b in zip(values, values[1:])])[1] / math.sqrt(2)
        low, at = min((statistics.median(values[i : i + 8]), i) for i in range(len(values) - 7))
        if low > start - max(self.LEARNED, 3 * noise) or self.above_start() < 3 * noise:
            return None
        half = (start + low) / 2
        since = next((i for i, x in enumerate(reversed(values)) if x < half), len(values) - at - 8)
        return since, half

    def above_start(self) -> float:
        """Nats by which the last 8 accepted losses lie above the first 8."""
        if len(self.losses) < 16 or len(self.first) < 8:
            return 0.0
        return self.level() - statistics.median(self.first)

    def level(self) -> float | None:
        """Median of the last 8 accepted losses."""
        return statistics.median(list(self.losses)[-8:]) if self.losses else None

    def too_low(self) -> bool:
        """Far below its course: data without content, or a leak of the targets; no good sign."""
        return self.residual < -self.MATTERS and self.residual < -12 * self.scale()

    def scale(self) -> float:
        """The noise of now: of what was accepted, or of the last 64 residuals if larger, up to
        three times. A young run's noise grows with what it has learned. From differences, so that
        a rise of the loss does not count."""
        if len(self.residuals) < self.START:
            accepted = math.inf
        else:
            accepted = centre([r for _, r in self.residuals])[1]
        last = [r for _, r in self.last][-64:]
        if len(last) < 16:
            return accepted
        now = centre([b - a for a, b in zip(last, last[1:])])[1] / math.sqrt(2)
        return min(3 * accepted, max(accepted, now))

    def floor(self) -> float:
        """Nats by which the loss must have risen to matter."""
        level = statistics.median(self.losses) if self.losses else 0.0
        return max(6 * self.scale(), self.MATTERS, 0.02 * abs(level))

    @property
    def confidence(self) -> float:
        odds = self.E * self.PRIOR
        return odds / (odds + 1 - self.PRIOR)

    @property
    def suspicious(self) -> bool:
        """Something may be building up: nothing saved now is called clean."""
        return self.E > self.FREEZE and self.excess(3) > self.floor() / 2

    def alarm(self, threshold: float) -> bool:
        """Step 4 of the class's docstring."""
        if self.confidence < threshold or len(self.last) < 7:
            return False
        return self.excess(7) > self.floor()

    def onset(self) -> int:
        """The iteration in which it began.

        Where E did, but no earlier than ten iterations before the last rise out of what does not
        matter: a trifle may have carried E upwards before. A slow rise: after its lowest level.
        """
        if self.slow is not None:
            return self.slow
        small = [at for at, r in self.last if r < self.floor() / 2]
        return max(self.began, (small[-1] if small else self.began) - 10)

    def excess(self, n: int) -> float:
        """Median of the last n residuals."""
        if len(self.last) < n:
            return 0.0
        return statistics.median(r for _, r in list(self.last)[-n:])

    def correlation(self, before: float = math.inf) -> float:
        """Lag-1 autocorrelation rho of the loss's noise before an iteration: far from 0 the ranks
        are no fair bets. From differences, which know no trend: theirs is -(1 - rho) / 2."""
        d = np.diff([r for at, r in self.residuals if at < before])
        if len(d) <= 8:
            return 0.0
        d = d - d.mean()
        return 1 + 2 * float((d[1:] * d[:-1]).sum() / max((d * d).sum(), 1e-30))

    def restart(self, before: int | None = None) -> None:
        """No suspicion any more. What was accepted from iteration `before` on is forgotten."""
        self.E = 1.0
        self.residual = 0.0
        self.frozen = 0
        self.slow = None
        self.last.clear()
        self.levels.clear()
        if before is None:
            return
        if len(self.residuals) < self.START:
            self.losses.clear()
        kept = [(at, r) for at, r in self.residuals if at < before]
        for _ in range(min(len(self.residuals) - len(kept), len(self.losses))):
            self.losses.pop()
        self.residuals = deque(kept, maxlen=self.WINDOW)

    def forget(self) -> None:
        """Another course begins: other data, or a level that the loss has settled at."""
        self.__init__()

    def state(self) -> dict:
        return {k: list(v) if isinstance(v, deque) else v for k, v in vars(self).items()}

    def load(self, state: dict) -> None:
        for name, now in vars(self).items():
            value = state.get(name, now)
            if isinstance(now, deque):
                pairs = [tuple(v) if isinstance(v, list) else v for v in value]
                value = deque(pairs, maxlen=now.maxlen)
            setattr(self, name, value)
