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
TIE = 1e-6  # relative: what is nearer cannot be told apart in fp32
MOST_NATS = 700.0  # e to a little more is no float: such a perplexity is said as e**700
LN2 = math.log(2)
# of replies: right where the label is found in it, so that one label for all has its share
EXACT = ("exact_match", "strict_match", "flexible_extract")


@dataclass(frozen=True)
class Score:
    """One metric of one task. None: there is no such thing; NaN: it was computed."""

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
    verdict: str = ""  # what speaks against it; "": better than its baselines, no leak seen

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
    """Whether the model left something that is no number."""
    values = [x for score in scores for x in (score.value, score.control) if x is not None]
    return not all(math.isfinite(x) for x in values)


class Metric(NamedTuple):
    """What each question adds to both sums of a metric; arrays (n,), in the order of i."""

    name: str
    unit: str  # share: 0 to 1; bits; nats; ppl: e to the ratio
    top: np.ndarray
    bottom: np.ndarray
    chance: np.ndarray | None = None  # what would stand on top
    majority: np.ndarray | None = None
    control: np.ndarray | None = None
    has_control: np.ndarray | None = None  # bool: where a question has none it is 0 in `control`

    @property
    def better(self) -> str:
        return "higher" if self.unit == "share" else "lower"

    @property
    def n(self) -> int:
        """Questions that add something."""
        return int(((self.bottom > 0) | (self.top != 0)).sum())

    def of(self, top, bottom):
        """The metric of two sums."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.divide(top, bottom)
        return np.exp(np.minimum(ratio, MOST_NATS)) if self.unit == "ppl" else ratio

    def value(self, top: np.ndarray | None) -> float | None:
        """The metric with `top` on top."""
        return None if top is None else float(self.of(top.sum(), self.bottom.sum()))

    def blinded(self) -> Metric | None:
        """The same of the controls alone; None: there are none."""
        if self.has_control is None or not self.has_control.any():
            return None
        bottom = np.where(self.has_control, self.bottom, 0)
        return Metric(self.name, self.unit, self.control, bottom)


def scores_of(
    kind: str, name: str, metric: str, lines: list[dict], n_vocab: int, seconds: float
) -> list[Score]:
    """The scores of task `name`, headline first; none where there are no lines.

    metric: the headline's name; seconds: what the task took.
    """
    found = [m for m in metrics_of(kind, in_order(lines), n_vocab) if m.bottom.any()]
    found.sort(key=lambda m: m.name != metric)
    blind = [m.blinded() for m in found]
    drawn = iter(resampled([*found, *(m for m in blind if m)]))
    spreads = [spread(m, next(drawn)) for m in found]
    of_blind = [spread(m, next(drawn)) if m else Spread() for m in blind]
    scores = []
    for m, mine, control in zip(found, spreads, of_blind):
        score = Score(
            task=name,
            metric=m.name,
            value=mine.value,
            n=mine.n,
            stderr=mine.stderr,
            low=mine.low,
            high=mine.high,
            chance=m.value(m.chance),
            majority=m.value(m.majority),
            control=control.value,
            control_stderr=control.stderr,
            n_control=control.n,
            seconds=seconds,
            headline=not scores,
            better=m.better,
        )
        scores.append(dataclasses.replace(score, verdict=verdict(score, control)))
    return scores


def in_order(lines: list[dict]) -> list[dict]:
    """By i, each question once: of two lines the later."""
    lines = {line["i"]: line for line in lines}
    return [lines[i] for i in sorted(lines)]


# ---------------------------------------------------------------- metrics of lines


def metrics_of(kind: str, lines: list[dict], n_vocab: int = 0) -> list[Metric]:
    """The metrics of lines (lumen/questions.py) of a kind: choice, text or reply.

    n_vocab: for chance; 0 where it is not asked for.
    """
    if not lines:
        return []
    if kind == "reply":
        return reply_metrics(lines)
    make = {"choice": choice_metrics, "text": text_metrics}[kind]
    return make(lines, math.log(n_vocab) if n_vocab else None)


def floats(values) -> np.ndarray:
    """(n,); null, which is how a NaN comes out of a file, is NaN."""
    return np.array([math.nan if x is None else x for x in values], dtype=np.float64)


def choice_metrics(lines: list[dict], uniform: float | None) -> list[Metric]:
    """acc by sum, per byte, per token; bits per byte of the right answer (OLMo's bpb: a mean over
    questions); of cloze its perplexity, answer by answer. uniform: nats a token of chance."""
    one, has_control = np.ones(len(lines)), controlled(lines)
    choices = np.array([len(line["logprobs"]) for line in lines])
    cloze = (choices == 1).all()
    guess = np.where(choices == 1, 0.0, 1 / choices)
    most = most_frequent(lines, cloze)
    metrics = []
    for name, sizes in (("acc", ""), ("acc_bytes", "bytes"), ("acc_tokens", "tokens")):
        if cloze and sizes:
            break
        top, control = (hits(lines, sizes, blind) for blind in (False, True))
        metrics.append(Metric(name, "share", top, one, guess, most, control, has_control))
    nats, control = (answer_nats(lines, blind) for blind in (False, True))
    tokens = floats(line["tokens"][line["answer"]] for line in lines)
    bits = 1 / LN2 / np.maximum(1, floats(line["bytes"][line["answer"]] for line in lines))
    chance = None if uniform is None else tokens * uniform
    if cloze:
        metrics.append(Metric("ppl", "ppl", nats, one, chance, None, control, has_control))
    chance = None if uniform is None else chance * bits
    blind = control * bits, has_control
    metrics.append(Metric("answer_bpb", "bits", nats * bits, one, chance, None, *blind))
    return metrics


def controlled(lines: list[dict]) -> np.ndarray:
    """(n,) bool: which have a control."""
    return np.array([bool(line.get("control")) for line in lines], dtype=bool)


def found_in(line: dict, blind: bool) -> dict:
    """The line, or its control; {} where it has none."""
    return (line.get("control") or {}) if blind else line


def hits(lines: list[dict], sizes: str, blind: bool) -> np.ndarray:
    """(n,): 1 where the right choice has the highest logprob, by sum or by `sizes` (bytes,
    tokens); 1 / k where k choices share the highest, so that a model which finds all alike has
    chance; of a choice of one, whether it is greedy."""
    found = []
    for line in lines:
        asked = found_in(line, blind)
        if not asked:
            found.append(0.0)
            continue
        logprobs = floats(asked["logprobs"])
        if sizes:
            logprobs = logprobs / np.maximum(1, line[sizes])
        if np.isnan(logprobs).any():
            found.append(math.nan)
        elif len(logprobs) == 1:
            found.append(float(asked["greedy"][0]))
        else:
            best = logprobs.max()
            tied = logprobs >= best - TIE * abs(best)
            found.append(tied[line["answer"]] / tied.sum())
    return np.array(found, dtype=np.float64)


def answer_nats(lines: list[dict], blind: bool) -> np.ndarray:
    """(n,): nats of the right choice; 0 where there is no control."""
    asked = [(found_in(line, blind), line["answer"]) for line in lines]
    return floats(-number(found["logprobs"][answer]) if found else 0.0 for found, answer in asked)


def number(x: float | None) -> float:
    return math.nan if x is None else x


def most_frequent(lines: list[dict], cloze: bool = False) -> np.ndarray | None:
    """(n,): 1 where the most frequent label is right. None where labels are only the numbers of
    choices and there is one choice."""
    labels = [str(line["label"]) for line in lines]
    if cloze and set(labels) == {"0"}:
        return None
    most, _ = Counter(labels).most_common(1)[0]
    return np.array([label == most for label in labels], dtype=np.float64)


def text_metrics(lines: list[dict], uniform: float | None) -> list[Metric]:
    """Bits per byte; loss in nats per token; perplexity per token, per word, per byte; how many
    tokens were greedy. What the lines do not say (bytes of bare shards) is left out."""
    names = ("nats", "tokens", "right", "bytes", "words", "majority")
    nats, tokens, right, n_bytes, words, unigram = (
        floats(line.get(name) for line in lines) for name in names
    )
    controls = [line.get("control") or {"nats": 0.0, "tokens": 1} for line in lines]
    blind = floats(found["nats"] for found in controls)
    blind = blind * tokens / np.maximum(1, floats(found["tokens"] for found in controls))
    chance = None if uniform is None else tokens * uniform
    if np.isnan(unigram).all():
        unigram = None
    baselines = chance, unigram, blind, controlled(lines)
    metrics = []
    for name, unit, bottom in (
        ("bits_per_byte", "bits", n_bytes * LN2),
        ("loss", "nats", tokens),
        ("token_ppl", "ppl", tokens),
        ("word_ppl", "ppl", words),
        ("byte_ppl", "ppl", n_bytes),
    ):
        if not np.isnan(bottom).any():
            metrics.append(Metric(name, unit, nats, bottom, *baselines))
    if not np.isnan(right).all():
        chance = None if uniform is None else tokens * math.exp(-uniform)
        metrics.append(Metric("token_acc", "share", right, tokens, chance))
    return metrics


def reply_metrics(lines: list[dict]) -> list[Metric]:
    """The mean of each entry of `found`, over the questions that have it."""
    names = dict.fromkeys(name for line in lines for name in line["found"])
    controls = [(line.get("control") or {}).get("found", {}) for line in lines]
    labelled = all(line.get("label") for line in lines)
    metrics = []
    for name in names:
        there = np.array([name in line["found"] for line in lines], dtype=np.float64)
        top = floats(line["found"].get(name, 0.0) for line in lines)
        blind = floats(found.get(name, 0.0) for found in controls)
        has_control = np.array([name in found for found in controls], dtype=bool)
        most = most_frequent(lines) if labelled and name in EXACT else None
        metrics.append(Metric(name, "share", top, there, None, most, blind, has_control))
    return metrics


# ---------------------------------------------------------------- spread


def resampled(metrics: list[Metric], seed: int = SEED) -> list[np.ndarray]:
    """Each metric in RESAMPLES drawings of as many questions, with replacement (Efron's bootstrap);
    in a drawing all metrics see the same questions, and both sums of a metric. (RESAMPLES,) each.
    """
    if not metrics:
        return []
    both = np.stack([column for m in metrics for column in (m.top, m.bottom)], 1)
    n, rng = len(both), np.random.default_rng(seed)
    at_a_time = max(1, BLOCK // n)
    sums = []
    for first in range(0, RESAMPLES, at_a_time):
        rows = min(at_a_time, RESAMPLES - first)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(times @ both)
    sums = np.concatenate(sums)
    return [m.of(sums[:, 2 * k], sums[:, 2 * k + 1]) for k, m in enumerate(metrics)]


class Spread(NamedTuple):
    """A metric's value and how sure it is; None where one question cannot tell."""

    value: float | None = None
    n: int = 0
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


def spread(m: Metric, draws: np.ndarray) -> Spread:
    """draws: (RESAMPLES,), of `resampled`."""
    value = m.value(m.top)
    if not math.isfinite(value):
        return Spread(value, m.n, math.nan, math.nan, math.nan)
    if m.unit == "share" and value in (0, 1):
        # All alike: no drawing differs. The exact interval of 0 or n out of n instead (Clopper and
        # Pearson 1934), else three questions would seem to prove something.
        reach = 1 - INTERVAL[0] ** (1 / m.n)
        low, high = (0.0, reach) if value == 0 else (1 - reach, 1.0)
        return Spread(value, m.n, 0.0, low, high)
    if m.n < 2:
        return Spread(value, m.n)
    draws = draws[~np.isnan(draws)]  # a drawing without any question that counts
    low, high = np.quantile(draws, INTERVAL)
    size = max(1.0, np.abs(draws).max())  # the square of a poor model's perplexity is no float
    stderr = float((draws / size).std(ddof=1) * size)
    return Spread(value, m.n, stderr, float(low), float(high))


def verdict(score: Score, control: Spread | None = None) -> str:
    """What a reader must know before believing a score; "" where it is better than its baselines
    and its control is not."""
    if has_nan([score]):
        return "NaN"
    if score.low is None:
        return "one question: no interval"
    words = []
    answer = "the majority answer" if score.better == "higher" else "token frequencies"
    baselines = {"chance": score.chance, answer: score.majority}
    baselines = {name: base for name, base in baselines.items() if base is not None}
    if not baselines:
        words.append("no baseline known")
    for name, base in baselines.items():
        side = beside(score.better, score.low, score.high, base)
        if side < 1:
            words.append(f"{'worse' if side < 0 else 'no better'} than {name}")
            break
    # Only where the best blind answer is known. Of bits it is not: an answer is likelier than
    # chance without its question too.
    if score.majority is not None and control and control.low is not None:
        sides = [beside(score.better, control.low, control.high, x) for x in baselines.values()]
        if min(sides) > 0:
            side = "above" if score.better == "higher" else "below"
            words.append(f"LEAK? the control is {side} {next(iter(baselines))}")
    return "; ".join(words)


def beside(better: str, low: float, high: float, base: float) -> int:
    """1: the interval is better than base, -1: worse, 0: it reaches it."""
    near = TIE * abs(base)
    above = int(low > base + near) - int(high < base - near)
    return above if better == "higher" else -above
