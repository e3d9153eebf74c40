"""Two or three models that were asked the same: what differs, question by question.

A difference has its own interval: questions are drawn with replacement, and both models are asked
the drawn ones. That of two scores by themselves is wider, for a hard question is hard for both.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lumen import checkpoint, nearby
from lumen.answers import Answers
from lumen.errors import UserError
from lumen.files import read_json, read_lines, replacing
from lumen.launch import print_now
from lumen.scoreboard import aligned, markdown_table, number
from lumen.scores import INTERVAL, SEED, TIE, Metric, in_order, metrics_of, resampled

# Questions on which two models must differ before one is called better: with fewer, a sign test
# does not reach 5 % even if all speak for one of them (2 / 2**6 = 0.03).
FEWEST = 6
KINDS = ("choice", "text", "reply")
WIDER = "they are not paired: the interval is wider"
EVALUATED = Path("out/eval")  # where evaluate.py writes to by itself
PER_TOKEN = ("loss", "token_ppl", "token_acc")  # of one tokenizer only
NOTES = """\
- A difference is that model's score less A's; its 95 % interval comes from drawing questions with
  replacement, the same for both models.
- **regression**, **better**: the interval lies on one side of 0. Of forty comparisons of equal
  models about two would look so.
- wins, losses, ties: questions on which that model was better than A, worse, alike."""


class Side(NamedTuple):
    """The results of a model."""

    letter: str
    folder: Path
    results: dict  # results.json
    of: str = ""  # the run that was named, where its results were found


class Difference(NamedTuple):
    """How much more of a metric the second of two models has."""

    value: float
    low: float  # of the 95 % interval
    high: float
    wins: int  # questions on which the second is better
    losses: int
    ties: int


class Row(NamedTuple):
    """A metric of a task, of two models."""

    task: str
    metric: str
    letter: str
    scores: tuple[float, float]
    found: Difference
    n: int
    verdict: str


def compare(paths: list, say=print_now, out=None) -> int:
    """Two or three against the first: runs that were evaluated, folders of results, or their
    results.json. A table for each, and compare.md in folder `out`. Returns how many regressions
    were seen.

    E128 where they cannot be compared, E119 where compare.md cannot be written.
    """
    if len(paths) not in (2, 3):
        raise UserError("E128", f"compare takes two or three results, not {len(paths)}")
    first, *others = sides = [load(path, letter, say) for path, letter in zip(paths, "ABC")]
    for side in sides:
        say(legend(side))
    tables = [against(first, other, say) for other in others]
    for rows in filter(None, tables):
        for line in aligned(cells(rows)):
            say(line)
    regressions = sum(row.verdict == "regression" for rows in tables for row in rows)
    say(f"regressions {regressions}")
    if out is not None:
        try:
            write(Path(out), sides, tables)
        except OSError as error:
            raise UserError("E119", f"{out}: {error.strerror}") from error
    return regressions


def load(path, letter: str, say=print_now) -> Side:
    """The results in a folder, in a results.json, or the newest of a model's folder. E128."""
    file, of = Path(path), ""
    if not file.exists():
        raise UserError("E128", f"{path} is not there{nearby.hint(path)}")
    if file.is_dir() and not (file / "results.json").exists():
        file, of = newest(file, say), str(path)
    elif file.is_dir():
        file = file / "results.json"
    results = read_json(file, "E128")
    if not isinstance(results.get("tasks"), dict):
        raise UserError("E128", f"{file} is no results.json of evaluate.py: it has no tasks")
    return Side(letter, file.parent, results, of)


def newest(model: Path, say) -> Path:
    """results.json of the latest step of a run, or of a model's folder, that was evaluated into
    out/eval. E128."""
    home, found = model.resolve(), []
    for file in sorted(EVALUATED.glob("*/results.json")):
        asked = read_json(file).get("checkpoint") or {}
        place = Path(asked.get("path") or "").resolve()
        if home in (place, place.parent) and unchanged(place, asked.get("sha256")):
            found.append((asked.get("step") or 0, file.stat().st_mtime, file))
    command = f"python evaluate.py {shlex.quote(str(model))}"
    if not found:
        text = f"{model} was not evaluated: no results.json in it, none of it in {EVALUATED}"
        raise UserError("E128", f"{text}; first: {command}")
    step, _, file = max(found)
    last = max(checkpoint.list_steps(model), default=step)
    if last > step:
        say(f"note       step {last} of {model} was not evaluated, step {step} was; {command}")
    return file


def unchanged(place: Path, sum_then: str) -> bool:
    """Whether a step still holds what was evaluated: another run may have begun in its out_dir."""
    manifest = read_json(place / "manifest.json") if checkpoint.STEP.fullmatch(place.name) else {}
    return not manifest or checkpoint.manifest_sha256(manifest) == sum_then


def legend(side: Side) -> str:
    text = f"{side.letter} = {side.folder}"
    return f"{text}, the newest results of {side.of}" if side.of else text


def against(a: Side, b: Side, say) -> list[Row]:
    """What both were asked. E128 where that is nothing."""
    names = [name for name in a.results["tasks"] if name in b.results["tasks"]]
    if not names:
        each = [f"{s.folder}: {', '.join(s.results['tasks']) or 'none'}" for s in (a, b)]
        raise UserError("E128", f"no task in common; {'; '.join(each)}")
    rows, wrong = [], []
    for name in names:
        if a.results["tasks"][name].get("kind") not in KINDS:  # lm-eval keeps its answers to itself
            say(f"note       {name}: its answers are not kept, so it is not compared")
            continue
        try:
            rows.append(row_of(name, a, b, say))
        except UserError as error:  # val of two runs may be other rows; the rest can be compared
            wrong.append(error)
    refusal = wrong.pop() if wrong and not rows else None
    for error in wrong:
        say(f"note       not compared: {error.text}")
    if refusal:
        raise refusal
    return rows


def row_of(name: str, a: Side, b: Side, say) -> Row:
    """The headline of a task. E128 where they were not asked the same."""
    one, other = (side.results["tasks"][name] for side in (a, b))
    for key in ("kind", "metric"):
        if one.get(key) != other.get(key):
            text = f"{name}: its {key} is {one.get(key)} in {a.folder}"
            text += f" and {other.get(key)} in {b.folder}"
            raise UserError("E128", f"{text}: evaluate both on the same file")
    sums = [(task.get("about") or {}).get("sha256") for task in (one, other)]
    if sums[0] != sums[1]:
        raise UserError("E128", other_text(name, a, b))
    for key, value in (one.get("options") or {}).items():
        theirs = (other.get("options") or {}).get(key)
        if theirs != value and key != "limit":  # which questions were asked is looked at below
            say(f"note       {name}: {key} {value} in {a.letter}, {theirs} in {b.letter}")
    lines = [read(side, name) for side in (a, b)]
    metric = comparable(name, one, a, b)
    paired = same_questions(name, one["kind"], lines)
    if paired:
        lines = in_common(name, lines, (a, b), say)
    else:
        say(f"note       {name}: its texts are cut at other places, so {WIDER}")
    x, y = (
        pick(name, metrics_of(one["kind"], part), metric, side) for part, side in zip(lines, (a, b))
    )
    found = difference(x, y, paired)
    n = len(lines[0])
    scores = x.value(x.top), y.value(y.top)
    words = verdict(found, x.better, paired, n)
    if x.name == "heuristic" and words in ("better", "regression"):  # neither follows from it
        words = f"{'higher' if found.value > 0 else 'lower'}, of a heuristic"
    return Row(name, x.name, b.letter, scores, found, n, words)


def other_text(name: str, a: Side, b: Side) -> str:
    """What to do where the two were asked a task of one name on different files."""
    if name != "val" and not name.startswith("val-"):  # val:DIR
        text = f"{name}: {a.letter} and {b.letter} were asked on different files of that name"
        return f"{text}; evaluate both on the same one"
    text = f"{name}: {a.letter} and {b.letter} were scored on different held-out texts.\n"
    text += "           For both on the same one: python evaluate.py MODEL --tasks "
    # rows are of max_seq_len tokens
    lengths = [(side.results.get("model") or {}).get("max_seq_len") for side in (a, b)]
    if not same_tokenizer(a, b) or lengths[0] != lengths[1]:
        why = "(val:DIR is for models of one tokenizer and one max_seq_len)"
        return f"{text}FILE.txt\n           {why}"
    path = (a.results["tasks"][name].get("about") or {}).get("path") or ""
    return f"{text}val:{path if path and ', ' not in path else 'DIR'}"


def same_tokenizer(a: Side, b: Side) -> bool:
    sums = [(side.results.get("tokenizer") or {}).get("sha256") for side in (a, b)]
    return sums[0] == sums[1]


def comparable(name: str, task: dict, a: Side, b: Side) -> str:
    """The task's headline, or bits per byte where tokenizers differ and it is per token."""
    per_token = task["kind"] == "text" and task["metric"] in PER_TOKEN
    if per_token and not same_tokenizer(a, b):
        return "bits_per_byte"
    return task["metric"]


def pick(name: str, metrics: list[Metric], metric: str, side: Side) -> Metric:
    for found in metrics:
        if found.name == metric:
            return found
    text = f"{name}: the answers of {side.folder} give no {metric}"
    raise UserError("E128", f"{text}; losses per token of two tokenizers cannot be compared")


def read(side: Side, name: str) -> list[dict]:
    """The answers to a task, in order. E128."""
    file = Answers(side.folder / "answers", name, "").whole
    try:
        lines = in_order([line for line in read_lines(file) if "key" not in line])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError("E128", f"{file} holds no answers: {error!r}") from error
    if not lines:
        text = f"{name}: there is no {file}, or nothing in it"
        raise UserError("E128", f"{text}; a comparison needs each question's answer")
    return lines


def in_common(name: str, lines: list[list[dict]], sides: tuple[Side, Side], say) -> list:
    """Of each the lines whose question both have. E128 where that is none."""
    numbers = [{line["i"] for line in part} for part in lines]
    both = numbers[0] & numbers[1]
    if not both:
        text = f"{name}: no question in common in {sides[0].folder} and {sides[1].folder}"
        raise UserError("E128", f"{text}: evaluate with the same --limit and seed")
    if numbers[0] != numbers[1]:
        counts = f"{len(numbers[0])} questions in {sides[0].letter}"
        counts += f", {len(numbers[1])} in {sides[1].letter}"
        say(f"note       {name}: {counts}; compared are the {len(both)} of both")
    return [[line for line in part if line["i"] in both] for part in lines]


def same_questions(name: str, kind: str, lines: list[list[dict]]) -> bool:
    """Whether line i of both is of the same question: of texts it need not be, where tokenizers
    cut them. E128 where questions differ."""
    others = {line["i"]: line for line in lines[1]}
    for line in lines[0]:
        other = others.get(line["i"], line)
        if kind == "text":
            size = "tokens" if line.get("bytes") is None else "bytes"
            if line[size] != other.get(size):
                return False
            continue
        for key in ("label", "answer"):
            if line.get(key) != other.get(key):
                text = f"{name}: question {line['i']}: its {key} is {line.get(key)!r}"
                raise UserError("E128", f"{text} in one and {other.get(key)!r} in the other")
    return True


def verdict(found: Difference, better: str, paired: bool, n: int) -> str:
    if not math.isfinite(found.value):
        return "NaN"
    if found.low <= 0 <= found.high:
        return "no difference seen"
    if (found.wins + found.losses if paired else n) < FEWEST:
        return "too few to tell"
    up = found.low > 0
    return "better" if up == (better == "higher") else "regression"


def difference(a: Metric, b: Metric, paired: bool = True) -> Difference:
    """b - a, whose questions are the same, one by one; not `paired`: each has its own, and there
    are no wins."""
    value = b.value(b.top) - a.value(a.top)
    if paired:
        first, second = resampled([a, b])
    else:
        (first,), (second,) = resampled([a]), resampled([b], SEED + 1)
    draws = second - first
    low = high = math.nan
    if math.isfinite(value):
        low, high = (float(end) for end in np.quantile(draws[~np.isnan(draws)], INTERVAL))
    if not paired:
        return Difference(value, low, high, 0, 0, 0)
    each = [m.top / np.where(m.bottom > 0, m.bottom, 1) for m in (a, b)]
    more = each[1] - each[0]
    more[np.abs(more) <= TIE * np.maximum(*np.abs(each))] = 0
    sign = 1 if a.better == "higher" else -1
    wins, losses = int((sign * more > 0).sum()), int((sign * more < 0).sum())
    return Difference(value, low, high, wins, losses, len(more) - wins - losses)


# ---------------------------------------------------------------- words


def cells(rows: list[Row]) -> list[list[str]]:
    """For the console: of the same two models."""
    other = rows[0].letter
    words = {"better": f"{other} is better", "regression": f"{other} is worse: regression"}
    lines = [["task metric", "A", other, f"{other} - A", "95 % interval", "verdict"]]
    for row in rows:
        ends = f"{number(row.found.low, '+')} to {number(row.found.high, '+')}"
        line = [f"{row.task} {row.metric}", *map(number, row.scores)]
        verdict = words.get(row.verdict, row.verdict)
        lines.append([*line, number(row.found.value, "+"), ends, verdict])
    return lines


def write(out: Path, sides: list[Side], tables: list[list[Row]]) -> None:
    """compare.md. OSError."""
    lines = ["# Comparison", "", *(f"- {legend(side)}" for side in sides), ""]
    for rows in filter(None, tables):
        other = rows[0].letter
        head = ["task", "metric", "A", other, f"{other} - A", "95 % interval"]
        table = [[*head, "wins / losses / ties", "n", "verdict"]]
        for row in rows:
            found = row.found
            ends = f"{number(found.low, '+')} to {number(found.high, '+')}"
            counts = f"{found.wins} / {found.losses} / {found.ties}"
            line = [row.task, row.metric, *map(number, row.scores)]
            line += [number(found.value, "+"), ends, counts, str(row.n), row.verdict]
            table.append(line)
        lines += [*markdown_table(table), ""]
    lines += [NOTES, ""]
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "compare.md") as file:
        file.write("\n".join(lines).encode())
