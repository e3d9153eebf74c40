"""CORE: the 22 tasks of DCLM (Li et al. 2024, arXiv 2406.11794), as nanochat's core_eval.py asks
them, from the bundle that it reads (eval_bundle.zip, unpacked):

    core.yaml           icl_tasks: label, icl_task_type, dataset_uri, num_fewshot, ...
    eval_meta_data.csv  what chance has in each task, in percent
    eval_data/          a .jsonl a task: {query, choices, gold}, {context_options, continuation,
                        gold} or {context, continuation}
"""

from __future__ import annotations

import contextlib
import csv
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from lumen.branches import common
from lumen.errors import UserError
from lumen.evaluation_files import Record, records, sum_of
from lumen.questions import Asked, Choices, Options, Question
from lumen.scorer import line_of
from lumen.scores import Score, Spread, verdict

TASKS = 22
SHUFFLE = 1337  # nanochat's; a question's examples depend on its place in that order
FILES = ("core.yaml", "eval_meta_data.csv", "eval_data")

# ---------------------------------------------------------------- the bundle


def read_core(core_dir: Path, options: Options) -> list[Choices]:
    """The bundle's tasks; about["baseline"] is what chance has there, 0 to 1.

    E127: a file is missing (all that are missing are named), a row cannot be asked."""
    folder = core_dir
    if (core_dir / "eval_bundle").is_dir():
        folder = core_dir / "eval_bundle"
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        text = f"{folder} lacks {', '.join(missing)} of CORE's bundle; unpack nanochat's"
        raise UserError("E127", f"{text} eval_bundle.zip, and name the folder that it makes")
    tasks = task_list(folder / "core.yaml")
    paths = {task["label"]: folder / "eval_data" / task["dataset_uri"] for task in tasks}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError("E127", f"{folder} is not complete, it lacks {', '.join(missing)}")
    baselines = read_baselines(folder / "eval_meta_data.csv", list(paths))
    return [
        read_task(task, paths[task["label"]], baselines[task["label"]], options) for task in tasks
    ]


def task_list(path: Path) -> list[dict]:
    """E127: it is no list of tasks, or one lacks something."""
    try:
        tasks = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        for task in tasks:
            task["shots"] = int(task["num_fewshot"][0])
            task["form"] = FORMS[task["icl_task_type"]]
            task["label"], task["dataset_uri"] = str(task["label"]), str(task["dataset_uri"])
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise UserError("E127", f"{path}: no list of CORE's tasks: {error!r}") from None
    return tasks


def read_baselines(path: Path, names: list[str]) -> dict[str, float]:
    """E127: a task has none there."""
    found = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(TypeError, ValueError):
                found[row.get("Eval Task")] = float(row.get("Random baseline")) / 100
    missing = [name for name in names if not 0 <= found.get(name, -1) < 1]
    if missing:
        text = f'{path}: "Random baseline", 0 to 100, is missing of {", ".join(missing)}'
        raise UserError("E127", text)
    return found


def core_result(done: dict[str, dict]) -> dict[str, dict]:
    """{"core": what results.json says of it}, of the tasks there that have a baseline; {} where
    there are none.

    CORE is the mean of centred accuracies, (accuracy - baseline) / (1 - baseline): 0 is chance.
    Tasks have questions of their own, so their errors are independent."""
    tasks = [task for task in done.values() if "baseline" in (task.get("about") or {})]
    if not tasks:
        return {}
    scores = [task["scores"][0] for task in tasks]
    baselines = [task["about"]["baseline"] for task in tasks]
    value = core_score([score.value for score in scores], baselines)
    majority = core_score([score.majority for score in scores], baselines)
    control = core_score([score.control for score in scores], baselines)
    stderr = spread([score.stderr for score in scores], baselines)
    blind = spread([score.control_stderr for score in scores], baselines)
    n, n_control = (sum(values) for values in zip(*((s.n, s.n_control) for s in scores)))
    ends, of_control = interval(value, stderr), interval(control, blind)
    spent = sum(score.seconds for score in scores)
    about = [n, stderr, *ends, 0.0, majority, control, blind, n_control, spent, True, "higher"]
    found = Score("core", "centred_acc", value, *about)
    words = [] if len(tasks) == TASKS else [f"{len(tasks)} tasks; CORE is the mean of {TASKS}"]
    if stderr is not None:
        words.append(verdict(found, Spread(control, n_control, blind, *of_control)))
    found = replace(found, verdict="; ".join(filter(None, words)))
    return {"core": {"kind": "core", "metric": found.metric, "about": {}, "scores": [found]}}


def interval(value: float | None, stderr: float | None) -> tuple[float | None, float | None]:
    """95 %."""
    if value is None or stderr is None:
        return None, None
    return value - 1.96 * stderr, value + 1.96 * stderr


def core_score(accuracies: list[float | None], baselines: list[float]) -> float | None:
    """The mean of centred accuracies; None where one is not known."""
    if None in accuracies:
        return None
    centred = [(acc - base) / (1 - base) for acc, base in zip(accuracies, baselines)]
    return sum(centred) / len(centred)


def spread(stderrs: list[float | None], baselines: list[float]) -> float | None:
    """The standard error of that mean."""
    if None in stderrs:
        return None
    return math.hypot(*(err / (1 - base) for err, base in zip(stderrs, baselines))) / len(stderrs)


# ---------------------------------------------------------------- the three kinds of tasks


def read_choice(row: Record) -> dict:
    """`head` is what the control swaps: the passage, or the question before choices that are listed
    in it, or all of it."""
    query, choices = row.text("query"), row.texts("choices")
    cut = len(query)
    listed = re.search(r"^\s*A[.)]+\s", query, re.M)
    if listed and all(len(choice.strip()) == 1 for choice in choices):
        cut = listed.start()
    elif "Passage:" in query and "\nQuestion:" in query:
        cut = query.index("\nQuestion:")
    gold = row.index("gold", [str(i) for i in range(len(choices))])
    return {"head": query[:cut], "tail": query[cut:], "choices": choices, "answer": gold}


def choice_pairs(record: dict, delimiter: str) -> list[tuple[str, str]]:
    query = record["head"] + record["tail"]
    return [(query, delimiter + choice) for choice in record["choices"]]


def read_schema(row: Record) -> dict:
    options = row.texts("context_options")
    gold = row.index("gold", [str(i) for i in range(len(options))])
    return {"options": options, "continuation": row.text("continuation"), "answer": gold}


def schema_pairs(record: dict, delimiter: str) -> list[tuple[str, str]]:
    return [(option, delimiter + record["continuation"]) for option in record["options"]]


def read_cloze(row: Record) -> dict:
    continuation = row.text("continuation")
    if not continuation.strip():
        raise row.bad("continuation", "nothing is asked")
    return {"context": row.text("context"), "continuation": continuation, "answer": 0}


def cloze_pairs(record: dict, delimiter: str) -> list[tuple[str, str]]:
    before = record["context"].strip() + delimiter
    bare = before.rstrip()
    return [(bare, before[len(bare) :] + record["continuation"])]


# ---------------------------------------------------------------- which ids are scored


def behind_common(wholes: list[list[int]]) -> list[int]:
    """Choices: what lies behind the ids that all begin with alike."""
    n = min(common(wholes[0], whole) for whole in wholes)
    n = min(n, min(len(whole) for whole in wholes) - 1)
    return [n] * len(wholes)


def common_end(wholes: list[list[int]]) -> list[int]:
    """Schemas: the ids that all end with alike."""
    backwards = [whole[::-1] for whole in wholes]
    n = min(common(backwards[0], whole) for whole in backwards)
    n = max(1, min(n, min(len(whole) for whole in wholes) - 1))
    return [len(whole) - n for whole in wholes]


class Borders:
    """A Scorer with nanochat's borders, and <|endoftext|> in front. A mean over other tokens would
    decide otherwise: lm-eval's border leaves what two choices begin with in both means."""

    def __init__(self, scorer, border):
        self.scorer, self.border = scorer, border

    def question(self, question: Question) -> dict:
        scorer = self.scorer
        start = [scorer.tokenizer.eot_id]
        texts = [question.header + context + text for context, text in question.pairs]
        wholes = [start + scorer.encode(text) for text in texts]
        if self.border:
            before = self.border(wholes)
        else:
            bare = question.header + question.pairs[0][0]
            before = [min(1 + len(scorer.encode(bare)), len(wholes[0]) - 1)]
        line = line_of(scorer.ids(list(zip(wholes, before))))
        scored = [whole[n:] for whole, n in zip(wholes, before)]
        return line | {"bytes": [len(scorer.tokenizer.decode_bytes(ids)) for ids in scored]}


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Form:
    read: Callable[[Record], dict]
    pairs: Callable[[dict, str], list[tuple[str, str]]]
    border: Callable | None  # None: behind the context
    swap: tuple[str, ...]
    metric: str


FORMS = {
    "multiple_choice": Form(read_choice, choice_pairs, behind_common, ("head",), "acc_tokens"),
    "schema": Form(read_schema, schema_pairs, common_end, ("continuation",), "acc_tokens"),
    "language_modeling": Form(read_cloze, cloze_pairs, None, ("context",), "acc"),
}


@dataclass
class Core(Choices):
    """A task of CORE: the likeliest by the mean over tokens; a cloze must be greedy."""

    border: Callable | None = None

    def line(self, i: int, asked: Asked) -> dict:
        return super().line(i, replace(asked, scorer=Borders(asked.scorer, self.border)))


@dataclass
class Asker:
    """A record to a question with nanochat's examples."""

    form: Form
    delimiter: str
    shots: int
    seed: int
    order: list[dict]  # the records, shuffled
    labels: list[str]  # the choices, where all questions have the same

    def ask(self, record: dict) -> Question:
        pairs = tuple(self.form.pairs(record, self.delimiter))
        header = "".join(self.example(other) + "\n\n" for other in self.examples(record))
        label = record.get("continuation", "")
        if "choices" in record or "options" in record:
            label = self.labels[record["answer"]] if self.labels else ""
        return Question(pairs, record["answer"], label, header)

    def example(self, record: dict) -> str:
        return "".join(self.form.pairs(record, self.delimiter)[record["answer"]])

    def examples(self, record: dict) -> list[dict]:
        """Drawn by its place in the shuffled file out of all others."""
        place = record["place"]
        others = range(len(self.order) - 1)
        drawn = random.Random(self.seed + place).sample(others, self.shots)
        return [self.order[i + (i >= place)] for i in drawn]


def read_task(task: dict, path: Path, baseline: float, options: Options) -> Core:
    form = task["form"]
    found = [form.read(row) for row in records([path])]
    shots = task["shots"] if options.shots is None else options.shots
    if shots > len(found) - 1:
        raise UserError("E127", f"{path}: {shots} examples are wanted of {len(found) - 1} others")
    order = list(found)
    random.Random(SHUFFLE).shuffle(order)
    for place, record in enumerate(order):
        record["place"] = place
    kinds = {tuple(record.get("choices", ())) for record in found}
    labels = list(kinds.pop()) if len(kinds) == 1 else []
    delimiter = task.get("continuation_delimiter", " ")
    asker = Asker(form, delimiter, shots, options.seed, order, labels)
    about = {"path": str(path), "sha256": sum_of([path]), "shots": shots, "baseline": baseline}
    about |= {"said": "asked as nanochat's core_eval.py does"}
    name = f"core_{task['label']}"
    more = {"swap": form.swap, "metric": form.metric, "border": form.border}
    return Core(name, options, about, found, asker.ask, **more)
