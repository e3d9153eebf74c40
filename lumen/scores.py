"""Scores out of the lines that questions left: a value, its spread, and what is had for nothing.

Every metric is a ratio of two sums over questions, so its baselines are too: what uniform guessing,
the most frequent answer and the control would have put on top. Nothing is read or printed here, and
the order of the lines does not matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000  # of the bootstrap; its interval is then good to about a tenth of its width
BLOCK = 1 << 20  # questions drawn at a time: 16 MB
SEED = 0
INTERVAL = (0.025, 0.975)
TIE = 1e-6  # relative: logprobs in fp32 that are nearer cannot be told apart
MOST_NATS = 700.0  # e to a little more is no float: such a perplexity is said as e**700
LN2 = math.log(2)

NO_INTERVAL = "one question: no interval"
LEAK = "LEAK? the control is {} chance"


@dataclass(frozen=True)
class Score:
    """One metric of one task (DESIGN 12). None: there is no such thing; NaN: it was computed."""

    task: str
    metric: str
    value: float
    n: int  # questions
    stderr: float | None  # by bootstrap over questions; None of a single one
    low: float | None  # of the 95 % interval
    high: float | None
    chance: float | None  # what a model has that finds all tokens, or all choices, equally likely
    majority: float | None  # what the most frequent answer has on these questions
    control: float | None  # the same metric with the questions' contexts swapped
    control_stderr: float | None
    n_control: int  # questions that have a control
    seconds: float
    headline: bool
    better: str  # higher | lower
    verdict: str = ""  # what speaks against believing it; "": nothing seen

    def row(self) -> dict:
        """For JSON, which has no NaN: null, and `nan` names the fields."""
        row = dataclasses.asdict(self)
        bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        return row | dict.fromkeys(bad) | {"nan": bad}


def from_row(row: dict) -> Score:
    """The Score of which `row` was made."""
    names = [field.name for field in dataclasses.fields(Score)]
    return Score(**{k: row[k] for k in names} | dict.fromkeys(row["nan"], math.nan))


def has_nan(scores: list[Score]) -> bool:
    """Whether a score is no number: the model's outputs, or the lines, are not."""
    return any(not math.isfinite(score.value) for score in scores)


class Metric(NamedTuple):
    """What each question adds to a metric; arrays (n,), in the order of i."""

    name: str
    unit: str  # share: 0 to 1; bits; ppl: e to the ratio
    top: np.ndarray
    bottom: np.ndarray  # 0: this question does not count
    chance: np.ndarray | None = None  # what would stand on top
    majority: np.ndarray | None = None
    control: np.ndarray | None = None  # NaN where the control has none; see `controlled`
    controlled: np.ndarray | None = None  # whether the question has a control

    @property
    def better(self) -> str:
        return "higher" if self.unit == "share" else "lower"

    def of(self, top, bottom):
        """The metric of sums."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.divide(top, bottom)
        return np.exp(np.minimum(ratio, MOST_NATS)) if self.unit == "ppl" else ratio

    def value(self, top: np.ndarray | None) -> float | None:
        """Of all questions, with `top` on top."""
        if top is None:
            return None
        counts = self.bottom > 0
        return float(self.of(top[counts].sum(), self.bottom.sum()))


def scores_of(
    kind: str, name: str, metric: str, lines: list[dict], n_vocab: int, seconds: float
) -> list[Score]:
    """The scores of task `name`, headline first; none where there are no lines.

    metric: the headline's name; seconds: what the task took.
    """
    raise NotImplementedError


def metrics_of(kind: str, lines: list[dict], n_vocab: int = 0) -> list[Metric]:
    """The metrics of lines of a kind: choice, text or reply."""
    raise NotImplementedError
