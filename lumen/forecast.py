"""Where a run stands, where its training loss will end, and whether that justifies an early end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# tokens a parameter between which the optimum is flat: at most 8 % more compute for the same loss
BAND = (10, 40)
MIN_GAIN = 0.005  # nats that are not worth waiting for
POINTS = 64  # at which the rest of a run is evaluated
P95 = 1.645  # standard deviations on each side of a 90 % interval


def posterior(past: np.ndarray, y: np.ndarray, prior: np.ndarray, noise: float):
    """Linear models past[g] (n, k) of y (n), averaged by their evidence.

    prior: means and sds of the k coefficients. Returns (moments, rms of the best one's residuals);
    moments(x): mean and sd of the coefficients' product with x (g, k).
    """
    mu, precision = prior[0], prior[1] ** -2.0
    H = past.transpose(0, 2, 1) @ past / noise**2 + np.diag(precision)
    b = np.linalg.solve(H, ((y @ past) / noise**2 + mu * precision)[..., None])[..., 0]
    rss = np.square(y - (past @ b[..., None])[..., 0]).sum(1)
    misfit = rss / noise**2 + (np.square(b - mu) * precision).sum(1)
    score = -(misfit + np.linalg.slogdet(H)[1]) / 2
    p = np.exp(score - score.max())
    p /= p.sum()

    def moments(x: np.ndarray) -> tuple[float, float]:
        m = (x * b).sum(1)
        v = (x * np.linalg.solve(H, x[..., None])[..., 0]).sum(1)
        return float(p @ m), math.sqrt(p @ (v + np.square(m - p @ m)))

    return moments, math.sqrt(rss[score.argmax()] / max(1, len(y) - 3))


class Terms(NamedTuple):
    """The law's terms (1, S^-a, M) for every node (a, q) of the grid."""

    past: np.ndarray  # (grid, windows kept, 3)
    last: np.ndarray  # (grid, 3) at the end of the planned run
    end: np.ndarray  # (grid, 3) mean over the last 5 % of its tokens
    sooner: np.ndarray  # (grid,) S^-a there without the stable tokens that are still to come


class Forecast:
    """`add` at every step (or log step), `status` at times.

    L = L0 + A S^-a + C M: S is the integral of (lr/peak)^q over tokens, M the mean of lr/peak over
    about the last 3 % of the run. At q 1 it is the law of Tissue et al. 2024 (2408.11029), whose S2
    is 1 - M. Bayesian: evidence weighs a grid of a and q, Gaussian priors on L0, A, C (before a
    decay the data do not hold C), on the last 60 % of at most 256 windows of equal length.

    Back-test on our own CPU runs (42 k to 1.1 M parameters, 300 to 3200 steps, four schedules, an
    add a step): at 25, 50, 75 % of the run the 90 % interval held the truth in 17, 18, 18 of the 18
    runs that set priors and widths and in 13, 13, 10 of 13 others. With an add in 50 steps it is
    too narrow.
    """

    MAX_WINDOWS = 256
    MIN_WINDOWS = 6
    LEFT_OUT = 0.4  # share of the windows, the first ones, that the fit does not see
    FLAT = 0.05  # nats per e-fold of compute
    A_GRID = np.array([[0.05], [0.1], [0.2], [0.3], [0.4], [0.5]])
    Q_GRID = (0.0, 0.5, 1.0)
    LAG = 0.03  # of the run: how far back M looks
    ANNEAL = (0.22, 0.12)  # prior of C in nats, mean and sd: what our own small runs gave
    # half an interval, in the fit's sd and in the predicted drop; set by the back-test
    WIDTH_SD = 0.75
    WIDTH_DROP = 0.15

    def __init__(self):
        self.windows: list[list[float]] = []  # last token; means of FLOPs, loss, lr
        self.part = [0.0] * 5  # the window being filled: adds, last token, three sums
        self.per = 1  # adds in a window

    def add(self, tokens: float, flops: float, loss: float, lr: float) -> None:
        """Tokens and FLOPs since the start, loss (nats) and rate of this step. What is not finite
        is left out, and so is a dropped step, which adds no tokens."""
        last = max(self.part[1], self.windows[-1][0] if self.windows else 0.0)
        if not all(map(math.isfinite, (tokens, flops, loss, lr))) or tokens == last:
            return
        if tokens < last:  # the run was rolled back
            self.windows = [w for w in self.windows if w[0] < tokens]
            self.part = [0.0] * 5
        sums = [a + b for a, b in zip(self.part[2:], (flops, loss, lr))]
        self.part = [self.part[0] + 1, float(tokens), *sums]
        if self.part[0] >= self.per:
            self.windows.append([self.part[1], *(x / self.part[0] for x in sums)])
            self.part = [0.0] * 5
        if len(self.windows) >= self.MAX_WINDOWS:  # neighbours become one
            pairs = zip(self.windows[::2], self.windows[1::2])
            self.windows = [[b[0], *((x + y) / 2 for x, y in zip(a[1:], b[1:]))] for a, b in pairs]
            self.per *= 2

    def state_dict(self) -> dict:
        windows = [list(w) for w in self.windows]
        return {"windows": windows, "part": list(self.part), "per": self.per}

    def load_state_dict(self, state: dict) -> None:
        self.windows = [list(w) for w in state["windows"]]
        self.part = list(state["part"])
        self.per = state["per"]

    def status(
        self, planned_tokens: float, lr_of: Callable[[float], float], unique_tokens: float = 0
    ) -> dict | None:
        """Where the run stands; `lr_of(share of planned tokens)` is its schedule. None: too few
        points to say. While the rate still rises share, phase and recommendation are all.

        share: of the tokens. phase, recommendation: see them. slope: -dL/dlnC over the last 20 % of
        compute, nats per e-fold. now: the fitted loss. final: mean training loss of the last 5 % of
        tokens. gained: share of the drop from the end of warm-up to `final`. anneal_gain: what
        lowering the rate adds to it; stable_gain: what the tokens still to come at the peak rate
        add (None: they are under 5 % of the run). *_low, *_high: 90 % intervals.
        """
        planned = planned_tokens
        if len(self.windows) < self.MIN_WINDOWS or not 0 < planned < math.inf:
            return None
        # 1. the schedule: the rates of the windows, and of POINTS points ahead
        tokens, flops, loss, lr = np.array(self.windows).T
        left = max(planned - tokens[-1], 1e-6 * planned)
        ahead = tokens[-1] + left * (np.arange(POINTS) + 0.5) / POINTS
        to_come = np.array([lr_of(min(1.0, x / planned)) for x in ahead], dtype=float)
        peak = max(lr.max(), to_come.max())
        if not 0 < peak < math.inf:
            return None
        found = {"share": min(1.0, max(tokens[-1], self.part[1]) / planned)}
        if to_come.max() > 1.01 * lr.max():
            return found | {"phase": "warm-up", "recommendation": "continue: the rate still rises"}
        top = int(np.argmax(lr > 0.98 * lr.max()))  # the window in which the warm-up ended
        first = max(top, int(self.LEFT_OUT * len(loss)))
        if len(loss) - first < self.MIN_WINDOWS - 2:
            return None
        # 2. the law's terms, then the fit
        stable = float((to_come > 0.98 * peak).mean()) * left  # tokens to come before the decay
        rate = np.concatenate([lr, to_come]) / peak
        in_end = np.flatnonzero(ahead >= min(0.95 * planned, ahead[-1]))
        terms = self.terms(tokens, rate, first, planned, stable, in_end)
        moments, noise = self.fit(terms.past, loss[first:])
        # 3. what it says of the end
        adds = max(1.0, 0.05 * planned * self.per * len(loss) / tokens[-1])  # that `final` averages
        spread = noise * math.sqrt(self.per / adds)
        found |= self.intervals(moments, terms, spread)
        now = moments(terms.last)[0]
        start = float(loss[top])
        gained = (start - now) / max(1e-9, start - found["final"])
        found |= {"now": now, "gained": min(1.0, max(0.0, gained))}
        # 4. the slope of now, which knows no law
        found |= self.slope(flops, loss, noise)
        if not math.isfinite(sum(found.values())):
            return None
        if stable < 0.05 * planned:
            found |= dict.fromkeys(("stable_gain", "stable_gain_low", "stable_gain_high"))
        # 5. in words
        found["phase"] = self.phase(found["slope_high"], lr[-1] < 0.5 * peak)
        constant = lr[top:].min() > 0.98 * peak
        epoch = found["share"] * planned / unique_tokens if unique_tokens else 0.0
        found["recommendation"] = recommendation(found["phase"], epoch, constant)
        return found

    def terms(self, tokens, rate, first: int, planned: float, stable: float, in_end) -> Terms:
        """rate: lr/peak of all windows and points; first: the first window kept; stable: tokens
        still to come at the peak rate; in_end: which of the points are in the last 5 %."""
        n = len(tokens)
        left = max(planned - tokens[-1], 1e-6 * planned)
        step = np.concatenate([np.diff(tokens, prepend=0.0), np.full(POINTS, left / POINTS)])
        keep = np.exp(-step[first:] / (self.LAG * planned))
        M, mean = [], rate[first]
        for x, k in zip(rate[first:].tolist(), keep.tolist()):
            mean = k * mean + (1 - k) * x
            M.append(mean)
        X, early = [], []
        for q in self.Q_GRID:
            S = np.cumsum(rate**q * step)
            done = S[n - 1]
            S = (S - rate**q * step / 2)[first:]  # a window's loss stands at its middle
            power = (S / done) ** -self.A_GRID
            X.append(np.stack([np.ones_like(power), power, np.tile(M, (len(power), 1))], 2))
            early.append((np.maximum(S - stable, done) / done) ** -self.A_GRID)
        X, early = np.concatenate(X), np.concatenate(early)
        in_end = n - first + in_end
        past = X[:, : n - first]
        return Terms(past, past[:, -1], X[:, in_end].mean(1), early[:, in_end].mean(1))

    def fit(self, past: np.ndarray, y: np.ndarray):
        """(moments, see posterior; the noise of a window: from its neighbours, or what the fit
        leaves if that is more)"""
        level = max(float(y[-max(1, len(y) // 6) :].mean()), 1e-3)
        means = [0.4 * level, 0.6 * level, self.ANNEAL[0]]
        prior = np.array([means, [0.2 * level, level, self.ANNEAL[1]]])
        jumps = np.diff(y)
        spread = 1.05 * float(np.median(np.abs(jumps - np.median(jumps))))  # MAD x 1.4826 / sqrt 2
        noise = max(spread, 1e-4 * level)
        noise = max(noise, posterior(past, y, prior, noise)[1])
        return posterior(past, y, prior, noise)[0], noise

    def intervals(self, moments, terms: Terms, spread: float) -> dict:
        """final, stable_gain and anneal_gain with their 90 % intervals. spread: of `final`, besides
        the fit's."""
        sooner, lower = np.zeros_like(terms.end), np.zeros_like(terms.end)
        sooner[:, 1] = terms.sooner - terms.end[:, 1]  # without those tokens
        lower[:, 2] = terms.last[:, 2] - terms.end[:, 2]
        found = {}
        for name, x, moved, more in (
            ("final", terms.end, terms.last - terms.end, spread),
            ("stable_gain", sooner, sooner, 0.0),
            ("anneal_gain", lower, lower, 0.0),
        ):
            mean, sd = moments(x)
            drop = moments(moved)[0]
            half = P95 * math.hypot(self.WIDTH_SD * sd, self.WIDTH_DROP * drop, more)
            found |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
        return found

    def slope(self, flops: np.ndarray, loss: np.ndarray, noise: float) -> dict:
        """-dL/dlnC by least squares over the last 20 % of compute."""
        recent = max(4, int((flops > 0.8 * flops[-1]).sum()))
        x = np.log(np.maximum(flops[-recent:], 1e-9))
        x -= x.mean()
        xx = float(x @ x) + 1e-12
        slope = -float(x @ loss[-recent:]) / xx
        half = P95 * noise / math.sqrt(xx)
        return {"slope": slope, "slope_low": slope - half, "slope_high": slope + half}

    def phase(self, slope_high: float, annealing: bool) -> str:
        """By the slope's upper bound; annealing: the rate is below half its peak."""
        if annealing:
            return "annealing"
        if slope_high < -self.FLAT:
            return "rising"
        if slope_high < MIN_GAIN / math.log(2):  # twice the compute gives less than MIN_GAIN
            return "converged?"
        return "flattening" if slope_high < self.FLAT else "learning"


def recommendation(phase: str, epoch: float, constant: bool) -> str:
    """`constant`: the rate has not been lowered yet."""
    if phase == "rising":
        return "the loss rises: look at grad_norm, lower the rate"
    if epoch > 4:
        text = f"data repeats (epoch {epoch:.1f}): the training loss flatters"
        return f"{text}, judge by the validation loss"
    if constant and phase in ("converged?", "flattening"):
        return "flat under a constant rate: start the decay"
    return "continue"


def look_ahead(forecast: Forecast, planned: float, unique: float, lr_of) -> tuple[dict | None, str]:
    """(what Forecast.status finds, the line to be said of it). It is arithmetic on whatever the
    losses were: where it fails that is said, for to know more is not worth a run."""
    try:
        found = forecast.status(planned, lr_of, unique)
    except Exception as error:
        return None, f"none: {type(error).__name__}: {error}"
    if found is None:
        return None, ""
    text = f"{100 * found['share']:.0f} % of the tokens, {found['phase']}"
    if "final" in found:
        interval = f"{found['final_low']:.3f} to {found['final_high']:.3f}"
        text += f"; training loss at the end {found['final']:.3f} (90 %: {interval})"
    return found, f"{text}; {found['recommendation']}"


def advise(trainer) -> None:
    """Say where a run stands and where it will end; tell the orchestrator if there is a reason to
    cut it short. Its laws are of training from scratch."""
    if trainer.fine_tunes:
        return
    advice = reason_to_end(trainer)
    if any(phase["step"] > trainer.step for phase in trainer.run.phases):
        advice = None  # other data are to come
    if trainer.cfg.enable_early_stopping:  # unlike machines may have computed unlike last digits
        advice = trainer.parallel.broadcast(advice)
    if advice:
        trainer.orchestrator.end_early(advice)


def reason_to_end(trainer) -> str | None:
    """See justified_stop; what was found goes into the next row of metrics.jsonl."""
    t, progress = trainer, trainer.progress
    planned = t.targets_per_step * t.run.max_steps
    windows = sum(source.windows for source in t.data.sources.values())
    unique = windows * t.cfg.model.max_seq_len

    def lr_of(share: float) -> float:
        return t.scheduled_lr(round(share * t.run.max_steps))

    found, line = look_ahead(t.forecast, planned, unique, lr_of)
    if line:
        t.say(f"forecast   {line}")
    if found is None:
        return None
    t.tell.forecast = {f"forecast/{name}": value for name, value in found.items()}
    if "final" in found:
        progress.gains = [*progress.gains[-2:], found["stable_gain_high"]]
    rise = (progress.val_loss or 0.0) - (progress.best_val_loss or 0.0)
    epochs = found["share"] * planned / max(1, unique)
    gain = found.get("anneal_gain", 0.0)
    history = (progress.gains, progress.rises)
    return justified_stop(t.cfg.lr_schedule, *history, epochs, rise, gain)


def paired_rise(best: np.ndarray, now: np.ndarray) -> float:
    """One-sided p-value that the mean validation loss has risen, from the losses of the same rows
    (nats) at both times.

    Paired t on the differences, made normal by Wallace 1959: z = sqrt(f ln(1 + t^2/f))
    (8f + 1)/(8f + 3), f = rows - 1. Rows should be independent (one a document, or far apart).
    Fewer than 8 usable ones: 1.0, no evidence.
    """
    d = np.asarray(now, dtype=float) - np.asarray(best, dtype=float)
    d = d[np.isfinite(d)]
    f = len(d) - 1
    sd = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    if f < 7 or sd == 0:
        return 1.0
    t = float(d.mean()) / sd * math.sqrt(f + 1)
    z = math.copysign(math.sqrt(f * math.log1p(t * t / f)) * (8 * f + 1) / (8 * f + 3), t)
    return math.erfc(z / math.sqrt(2)) / 2


def justified_stop(
    schedule: str,
    stable_gains: Sequence[float | None] = (),
    rise_ps: Sequence[float] = (),
    epochs: float = 0.0,
    rise: float = 0.0,
    anneal_gain: float = 0.0,
    min_gain: float = MIN_GAIN,
) -> str | None:
    """The two reasons to cut a run short, as a line of advice that begins with "start the decay" or
    "stop"; or None. Never a flat training loss.

    wsd: `stable_gains`, the stable_gain_high (a 95 % bound) of successive checks, newest last, are
    under min_gain nats three times. Repeated data: `rise_ps`, paired_rise of successive evaluations
    against the best, are under 1e-3 twice, and the `rise` (nats) is more than the `anneal_gain`
    that lowering the rate still promises.
    """
    gains, ps = list(stable_gains)[-3:], list(rise_ps)[-2:]
    if epochs > 1 and len(ps) == 2 and max(ps) < 1e-3 and rise > max(0.0, anneal_gain):
        text = "stop: the validation loss rises on repeated data"
        return f"{text} (+{rise:.3f} nats, p {ps[0]:.1g} and {ps[1]:.1g})"
    if schedule == "wsd" and len(gains) == 3 and all(g is not None and g < min_gain for g in gains):
        text = f"start the decay: the stable tokens left add under {max(gains):.4f} nats"
        return f"{text} (3 checks in a row)"
    return None
