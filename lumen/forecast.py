"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

BAND = (
    10,
    40,
)  # tokens a parameter between which the optimum is flat: at most 8 % more compute for the same loss
MIN_GAIN = 0.005  # nats that are not worth waiting for


def posterior(past: np.ndarray, y: np.ndarray, prior: np.ndarray, noise: float):
    """Linear models past[g] (n, k) of y (n), averaged by their evidence -> (moments, rms of the best one's residuals).

    `prior`: means and sds of the k coefficients. moments(x): mean and sd of the coefficients' product with x (g, k).
    """
    mu, precision = prior[0], prior[1] ** -2.0
    H = past.transpose(0, 2, 1) @ past / noise**2 + np.diag(precision)
    b = np.linalg.solve(H, ((y @ past) / noise**2 + mu * precision)[..., None])[..., 0]
    rss = np.square(y - (past @ b[..., None])[..., 0]).sum(1)
    score = -(rss / noise**2 + (np.square(b - mu) * precision).sum(1) + np.linalg.slogdet(H)[1]) / 2
    p = np.exp(score - score.max())
    p /= p.sum()

    def moments(x: np.ndarray) -> tuple[float, float]:
        m, v = (x * b).sum(1), (x * np.linalg.solve(H, x[..., None])[..., 0]).sum(1)
        return float(p @ m), math.sqrt(p @ (v + np.square(m - p @ m)))

    return moments, math.sqrt(rss[score.argmax()] / max(1, len(y) - 3))


class Forecast:
    """Where a run stands and where its training loss will end: `add` at every step (or log step), `status` at times.

    L = L0 + A S^-a + C M: S is the integral of (lr/peak)^q over tokens, M the mean of lr/peak over about the last 3 %
    of the run. At q 1 it is the law of Tissue et al. 2024 (2408.11029), whose S2 is 1 - M. Bayesian: evidence weighs
    a grid of a and q, Gaussian priors on L0, A, C (before a decay the data do not hold C), on the last 60 % of at most
    256 windows of equal length. Back-test on our own CPU runs (42 k to 1.1 M parameters, 300 to 3200 steps, four
    schedules, an add a step): at 25, 50, 75 % of the run the 90 % interval held the truth in 17, 18, 18 of the 18 runs
    that set priors and WIDTH and in 13, 13, 10 of 13 others. With an add in 50 steps it is too narrow.
    """

    LIMIT, LEAST, CUT = (
        256,
        6,
        0.4,
    )  # windows, at most and at least; share of them left out of the fit
    FLAT = 0.05  # nats per e-fold of compute
    A_GRID, Q_GRID, LAG = (
        np.array([[0.05], [0.1], [0.2], [0.3], [0.4], [0.5]]),
        (0.0, 0.5, 1.0),
        0.03,
    )
    ANNEAL = (0.22, 0.12)  # prior of C in nats, mean and sd: what our own small runs gave
    WIDTH = (
        0.75,
        0.15,
    )  # the interval's factors of the fit's sd and of the predicted drop, set by the back-test

    def __init__(self):
        self.windows: list[list[float]] = []  # last token; means of FLOPs, loss, lr
        self.part = [0.0] * 5  # the window being filled: adds, last token, three sums
        self.per = 1  # adds in a window

    def add(self, tokens: float, flops: float, loss: float, lr: float) -> None:
        """Tokens and FLOPs since the start, loss (nats) and rate of this step. What is not finite is left out."""
        last = max(self.part[1], self.windows[-1][0] if self.windows else 0.0)
        if (
            not all(map(math.isfinite, (tokens, flops, loss, lr))) or tokens == last
        ):  # a dropped step adds no tokens
            return
        if tokens < last:  # the run was rolled back
            self.windows, self.part = [w for w in self.windows if w[0] < tokens], [0.0] * 5
        sums = [a + b for a, b in zip(self.part[2:], (flops, loss, lr))]
        self.part = [self.part[0] + 1, float(tokens), *sums]
        if self.part[0] >= self.per:
            self.windows.append([self.part[1], *(x / self.part[0] for x in sums)])
            self.part = [0.0] * 5
        if len(self.windows) >= self.LIMIT:  # neighbours become one
            pairs = zip(self.windows[::2], self.windows[1::2])
            self.windows = [[b[0], *((x + y) / 2 for x, y in zip(a[1:], b[1:]))] for a, b in pairs]
            self.per *= 2

    def state_dict(self) -> dict:
        return {
            "windows": [list(w) for w in self.windows],
            "part": list(self.part),
            "per": self.per,
        }

    def load_state_dict(self, state: dict) -> None:
        self.windows, self.part, self.per = (
            [list(w) for w in state["windows"]],
            list(state["part"]),
            state["per"],
        )

    def status(
        self, planned_tokens: float, lr_of: Callable[[float], float], unique_tokens: float = 0
    ) -> dict | None:
        """Where the run stands; `lr_of(share of planned tokens)` is its schedule. None: too few points to say.

        share: of the tokens. phase: warm-up while the rate still rises (then it, share and recommendation are all);
        annealing below half the peak rate; else by the slope's upper bound: rising below -FLAT, converged? when twice
        the compute gives under MIN_GAIN, flattening below FLAT, learning. slope: -dL/dlnC over the last 20 % of
        compute, nats per e-fold. now: the fitted loss. final: mean training loss of the last 5 % of tokens. gained:
        share of the drop from the end of warm-up to `final`. anneal_gain: what lowering the rate adds to it;
        stable_gain: what the tokens still to come at the peak rate add (None: they are under 5 % of the run). *_low,
        *_high: 90 % intervals.
        """
        if len(self.windows) < self.LEAST or not 0 < planned_tokens < math.inf:
            return None
        last, flops, loss, lr = np.array(self.windows).T
        n, left = len(loss), max(planned_tokens - last[-1], 1e-6 * planned_tokens)
        ahead = last[-1] + left * (np.arange(64) + 0.5) / 64
        to_come = np.array([lr_of(min(1.0, x / planned_tokens)) for x in ahead], dtype=float)
        peak = max(lr.max(), to_come.max())
        if not 0 < peak < math.inf:
            return None
        found = {"share": min(1.0, max(last[-1], self.part[1]) / planned_tokens)}
        if to_come.max() > 1.01 * lr.max():
            return found | {"phase": "warm-up", "recommendation": "continue: the rate still rises"}
        top = int(np.argmax(lr > 0.98 * lr.max()))
        first = max(top, int(self.CUT * n))
        if n - first < self.LEAST - 2:
            return None

        # the law's terms at the windows kept and at 64 points ahead, for every node of the grid
        rate = np.concatenate([lr, to_come]) / peak
        step = np.concatenate([np.diff(last, prepend=0.0), np.full(64, left / 64)])
        stable = float((to_come > 0.98 * peak).mean()) * left  # tokens to come before the decay
        M, mean = [], rate[first]
        for x, keep in zip(
            rate[first:].tolist(), np.exp(-step[first:] / (self.LAG * planned_tokens)).tolist()
        ):
            M.append(mean := keep * mean + (1 - keep) * x)
        X, early = [], []
        for q in self.Q_GRID:
            S = np.cumsum(rate**q * step)
            S, done = (
                (S - rate**q * step / 2)[first:],
                S[n - 1],
            )  # a window's loss stands at its middle
            power = (S / done) ** -self.A_GRID
            X.append(np.stack([np.ones_like(power), power, np.tile(M, (len(power), 1))], 2))
            early.append((np.maximum(S - stable, done) / done) ** -self.A_GRID)
        X, early = np.concatenate(X), np.concatenate(early)  # (grid, windows and points, terms)
        y, in_end = (
            loss[first:],
            n - first + np.flatnonzero(ahead >= min(0.95 * planned_tokens, ahead[-1])),
        )
        past, end = X[:, : len(y)], X[:, in_end].mean(1)

        # the fit; the noise of a window: from its neighbours, or what the fit leaves
        level = max(float(y[-max(1, len(y) // 6) :].mean()), 1e-3)
        prior = np.array(
            [[0.4 * level, 0.6 * level, self.ANNEAL[0]], [0.2 * level, level, self.ANNEAL[1]]]
        )
        jumps = np.diff(y)
        noise = max(
            1.05 * float(np.median(np.abs(jumps - np.median(jumps)))), 1e-4 * level
        )  # MAD x 1.4826 / sqrt 2
        noise = max(noise, posterior(past, y, prior, noise)[1])
        moments, _ = posterior(past, y, prior, noise)

        def interval(name, x, moved, more=0.0):
            mean, sd = moments(x)
            half = 1.645 * math.hypot(self.WIDTH[0] * sd, self.WIDTH[1] * moments(moved)[0], more)
            found.update({name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half})

        adds = max(
            1.0, 0.05 * planned_tokens * self.per * n / last[-1]
        )  # so many does `final` average
        interval("final", end, past[:, -1] - end, noise * math.sqrt(self.per / adds))
        sooner, lower = np.zeros_like(end), np.zeros_like(end)
        sooner[:, 1] = early[:, in_end].mean(1) - end[:, 1]  # without those tokens
        lower[:, 2] = past[:, -1, 2] - end[:, 2]
        interval("stable_gain", sooner, sooner)
        interval("anneal_gain", lower, lower)
        now, start = moments(past[:, -1])[0], float(loss[top])
        found |= {
            "now": now,
            "gained": min(1.0, max(0.0, (start - now) / max(1e-9, start - found["final"]))),
        }
        recent = max(4, int((flops > 0.8 * flops[-1]).sum()))
        x = np.log(np.maximum(flops[-recent:], 1e-9))
        x -= x.mean()
        xx = float(x @ x) + 1e-12
        slope, half = -float(x @ loss[-recent:]) / xx, 1.645 * noise / math.sqrt(xx)
        found |= {"slope": slope, "slope_low": slope - half, "slope_high": slope + half}
        if not math.isfinite(sum(found.values())):
            return None
        if stable < 0.05 * planned_tokens:
            found |= dict.fromkeys(("stable_gain", "stable_gain_low", "stable_gain_high"))
        bounds = {
            "rising": -self.FLAT,
            "converged?": MIN_GAIN / math.log(2),
            "flattening": self.FLAT,
        }
        phase = next((name for name, bound in bounds.items() if slope + half < bound), "learning")
        phase = "annealing" if lr[-1] < 0.5 * peak else phase
        epoch = found["share"] * planned_tokens / unique_tokens if unique_tokens else 0.0
        advice = "continue"
        if phase == "rising":
            advice = "the loss rises: look at grad_norm, lower the rate"
        elif epoch > 4:
            advice = f"data repeats (epoch {epoch:.1f}): the training loss flatters, judge by the validation loss"
        elif phase in ("converged?", "flattening") and lr[top:].min() > 0.98 * peak:
            advice = "flat under a constant rate: start the decay"
        return found | {"phase": phase, "recommendation": advice}


def paired_rise(best: np.ndarray, now: np.ndarray) -> float:
    """One-sided p-value that the mean validation loss has risen, from the losses of the same rows (nats) at both times.

    Paired t on the differences, made normal by Wallace 1959: z = sqrt(f ln(1 + t^2/f)) (8f + 1)/(8f + 3), f = rows - 1.
    Rows should be independent (one a document, or far apart). Fewer than 8 usable ones: 1.0, no evidence.
    """
    d = np.asarray(now, dtype=float) - np.asarray(best, dtype=float)
    d = d[np.isfinite(d)]
    f, sd = len(d) - 1, float(d.std(ddof=1)) if len(d) > 1 else 0.0
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
    """The two reasons to cut a run short, as a line of advice that begins with "start the decay" or "stop"; or None.

    wsd: `stable_gains`, the stable_gain_high (a 95 % bound) of successive checks, newest last, are under min_gain nats
    three times. Repeated data: `rise_ps`, paired_rise of successive evaluations against the best, are under 1e-3 twice
    and the `rise` (nats) is more than the `anneal_gain` that lowering the rate still promises. Never a flat train loss.
    """
    gains, ps = list(stable_gains)[-3:], list(rise_ps)[-2:]
    if epochs > 1 and len(ps) == 2 and max(ps) < 1e-3 and rise > max(0.0, anneal_gain):
        return f"stop: the validation loss rises on repeated data (+{rise:.3f} nats, p {ps[0]:.1g} and {ps[1]:.1g})"
    if schedule == "wsd" and len(gains) == 3 and all(g is not None and g < min_gain for g in gains):
        return f"start the decay: the stable tokens left add under {max(gains):.4f} nats (3 checks in a row)"
    return None
