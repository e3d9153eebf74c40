"""From a public benchmark's files to a task: its questions, and the examples before them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lumen import evaluation_files as files
from lumen.errors import UserError
from lumen.evaluation_files import TRAIN, VALIDATION, Place, Record
from lumen.questions import Choices, Options, Question


@dataclass(frozen=True)
class Form:
    """How a benchmark is read and asked."""

    read: Callable[[Record], dict]  # UserError E127
    ask: Callable[[dict], Question]  # without examples
    swap: tuple[str, ...]  # see questions.Choices
    splits: tuple[tuple[str, ...], ...]  # what is asked: the first that is there
    examples: tuple[tuple[str, ...], ...] = (TRAIN, VALIDATION)  # where these are from, likewise
    metric: str = "acc"
    wanted: tuple[str, ...] = ()  # see evaluation_files.Place
    unwanted: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # of a .csv that has no line of names
    complete: Callable[[list[Record]], list[Record]] | None = None  # with what lies elsewhere
    describe: Callable[[dict], str] | None = None  # what introduces the examples
    first: bool = False  # the first examples, not drawn ones

    def place(self, root: Path) -> Place:
        return Place(root, self.wanted, self.unwanted)

    def records(self, paths: list[Path]) -> list[dict]:
        rows = files.records(paths, self.columns)
        if self.complete:
            rows = self.complete(rows)
        return [self.read(row) for row in rows]


def read_form(name: str, form: Form, path: Path, options: Options) -> list[Choices]:
    """The one task of a benchmark whose split is one table."""
    tables = files.asked_files(form.place(path), form.splits)
    return [task_of(name, form, [files.only(tables)], options.shots or 0, options)]


def task_of(name: str, form: Form, tables: list, n: int, options: Options) -> Choices:
    """The questions of all tables, lists of files, as one task; before each n examples from the
    split beside it, else out of the same files."""
    paths, beside = [], []
    for shards in tables:
        paths += shards
        if n:
            beside += files.beside(shards[0], form.place(Path()), form.examples)
    records = form.records(paths)
    pool = form.records(beside) if beside else records
    for number, record in enumerate(records):
        record["number"] = number
    shots = Shots(form, n, options.seed, by_subject(pool))
    about = {"path": ", ".join(map(str, paths[:4])), "sha256": files.sum_of(paths)}
    about |= {"shots": n, "said": "asked as lm-eval 0.4.13 does"}
    if n:
        about["examples"] = str((beside or paths)[0])
        about["examples_sha256"] = files.sum_of(beside or paths)
        shots.check(by_subject(records), about["examples"])
    return Choices(name, options, about, records, shots.ask, form.swap, form.metric)


def by_subject(records: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(record.get("subject", ""), []).append(record)
    return found


@dataclass
class Shots:
    """The examples before a question, with what introduces them. lm-eval's, but for one thing:
    there a draw depends on all draws before it, here on the seed and the question's number."""

    form: Form
    n: int
    seed: int
    pool: dict[str, list[dict]]  # subject, "" where there are none -> records

    def ask(self, record: dict) -> Question:
        header = self.form.describe(record) if self.form.describe else ""
        for example in self.examples(record):
            question = self.form.ask(example)
            header += "".join(question.pairs[question.answer]) + "\n\n"
        return replace(self.form.ask(record), header=header)

    def examples(self, record: dict) -> list[dict]:
        """Never the question itself, whose number it has where it is in the pool."""
        if not self.n:
            return []
        pool = self.pool[record.get("subject", "")]
        most = min(self.n + 1, len(pool))
        places = list(range(most))
        if not self.form.first:
            places = random.Random(self.seed + record["number"]).sample(range(len(pool)), most)
        found = [pool[i] for i in places]
        return [one for one in found if one.get("number") != record["number"]][: self.n]

    def check(self, subjects: dict, where: str) -> None:
        """E127: fewer examples than are wanted, the question itself not counted."""
        for subject in subjects:
            pool = self.pool.get(subject, [])
            others = len(pool)
            if any("number" in record for record in pool):
                others -= 1
            if others < self.n:
                about = f" about {subject}" if subject else ""
                text = f"{where}: {self.n} examples{about} are wanted before each question, there"
                raise UserError("E127", f"{text} are {others}; take fewer with --shots")
