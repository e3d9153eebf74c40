"""Tasks by name or file: what is built in, and which room reads what else there is.

`docstrings`, `val`, `smoke`, `samples`; a file of one's own; NAME:PATH, or NAME with --data DIR, of
the public ones. Multiple choice of one's own is a JSON object a line: {question, choices, answer},
answer an index, a letter or the choice itself; {context, continuation} is a cloze.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from pathlib import Path

from lumen import benchmarks, core_bundle, held_out, replying, smoke, texts
from lumen import evaluation_files as files
from lumen.docstrings import docstring_rows
from lumen.errors import UserError, expand, nearest
from lumen.files import sha256
from lumen.inputs import kind_of
from lumen.questions import Choices, Options, Question, Task
from lumen.values import short

LETTERS = string.ascii_uppercase
# name: of a path, options
READERS = benchmarks.READERS | replying.READERS | {"core": core_bundle.read_core}
NO_NAMES = {*files.SPLIT_WORDS, "raw"}  # what may stand beside a benchmark's name in a file's
HELD_OUT = "val:DIR (held-out text of a prepared folder)"
BUILT_IN = ("docstrings", "val", "smoke", "samples")


def find_tasks(
    specs: list[str], data: Path | None, options: Options, opened=None, say=print
) -> list[Task]:
    """The tasks that these words name, each once. opened: the lumen.models.Opened that will be
    asked; None: nothing of a run is known. E127: unknown, or its file is not there or wrong."""
    found: dict[str, Task] = {}
    for spec in specs:
        if spec.partition(":")[0] == "val":
            tasks = val(spec, opened, options, say)
        else:
            tasks = tasks_of(spec, data, options)
        for task in tasks:
            if task.name in found:
                text = f"two tasks are called {task.name}, and {spec} is one of them"
                raise UserError("E127", f"{text}; give each once, or rename a file")
            if not len(task):
                raise UserError("E127", f"{spec} has no question")
            found[task.name] = task
    return list(found.values())


def val(spec: str, opened, options: Options, say) -> list[Task]:
    """The rows that the model's own run holds out, or a prepared folder, val:DIR; none, and that is
    said, if they are gone."""
    if opened is None:
        raise UserError("E127", f"{spec}: a run that trains says its val_loss anyhow; leave it out")
    folder = spec.partition(":")[2]
    place = there(folder, spec) if folder else None
    found = held_out.val_task(opened, options, say, place)
    return [found] if found else []


def tasks_of(spec: str, data: Path | None, options: Options) -> list[Task]:
    """Of one word."""
    if spec == "docstrings":
        return [docstrings(options)]
    if spec in ("smoke", "samples"):
        return [smoke.task(spec, options)]
    name, has_path, path = spec.partition(":")
    if has_path and name in READERS:
        return READERS[name](there(path, spec), options)
    if spec in READERS and data is not None:
        return READERS[spec](in_folder(spec, data), options)
    if spec in READERS:
        raise UserError("E127", f"{spec}: where are its files? {spec}:PATH, or --data DIR")
    if Path(expand(spec)).exists():
        return own_file(Path(expand(spec)), options)
    known = [*BUILT_IN, *READERS]
    hint = nearest(name, known)
    there_are = f"there are {', '.join(known)}, {HELD_OUT}, and your own files"
    text = f"did you mean {hint}?" if hint else there_are
    raise UserError("E127", f"no task is called {spec}, and no file: {text}")


def there(path: str, spec: str) -> Path:
    found = Path(expand(path))
    if not found.exists():
        raise UserError("E127", f"{spec}: {found} does not exist")
    return found


def in_folder(name: str, data: Path) -> Path:
    """A file or folder of this name in --data DIR; by - or _, in any case, or else with a split or
    a version beside it, as it is published: hellaswag_val.jsonl, winogrande_1.1. E127."""
    if not data.is_dir():
        raise UserError("E127", f"--data {data} is no folder")
    entries = sorted(data.iterdir(), key=lambda entry: (not entry.is_dir(), entry.name))
    for entry in entries:
        if plain(entry.name.partition(".")[0]) == plain(name):
            return entry
    named = [entry for entry in entries if published(entry) == plain(name)]
    named = [entry for entry in named if "train" not in files.words(entry.name)]
    if len(named) == 1:
        return named[0]
    if named:
        each = " or ".join(f"{name}:{entry}" for entry in named)
        raise UserError("E127", f"--data {data} has several of {name}; which? --tasks {each}")
    names = ", ".join(entry.name for entry in entries[:8]) or "nothing"
    raise UserError("E127", f"--data {data} has no {name}, a folder or a file; it holds {names}")


def plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")


def published(entry: Path) -> str:
    """A file's or folder's name as `plain`, without its split and its version."""
    name = re.sub(r"[-_]v?\d+(\.\d+)+", "", entry.name).partition(".")[0]
    words = [word for word in re.split("[-_]", name) if word.lower() not in NO_NAMES]
    return plain("".join(words))


# ---------------------------------------------------------------- files of one's own


def own_file(path: Path, options: Options) -> list[Task]:
    """By what its first row holds."""
    if (path / "manifest.json").exists():
        raise UserError("E127", f"{path} is a prepared folder; its held-out text is val:{path}")
    if path.is_dir() or kind_of(str(path)) in ("", "text"):
        return texts.read_texts(path, options)
    rows = [record.row | {"line": record.line} for record in files.records([path])]
    first = rows[0]
    if "choices" in first:
        return [multiple_choice(path.stem, rows, options, path)]
    if "continuation" in first:
        return [cloze(path, rows, options)]
    if "prompt" in first:
        kind = "functions" if "entry_point" in first else "exact"
        return READERS[kind](path, options)
    return texts.read_texts(path, options)


def docstrings(options: Options) -> Choices:
    """Four docstrings or names of Python's library, of modules that no conversation in the source
    `docstrings` is about. E110."""
    rows = list(docstring_rows("choice", "val"))
    task = multiple_choice("docstrings", rows, options, None)
    text = json.dumps(rows, sort_keys=True).encode()
    task.about["sha256"] = hashlib.sha256(text).hexdigest()
    return task


def multiple_choice(name: str, rows: list[dict], options: Options, path: Path | None) -> Choices:
    """{question, choices, answer, examples?}; the choice with the highest log-probability a byte
    counts. By letter: the choices stand in the question, and their letters are compared."""
    for row in rows:
        check_choices(row, path)
    shots = options.shots or 0
    if shots >= len(rows):
        raise UserError("E127", f"--shots {shots}: {path or name} has {len(rows)} rows in all")
    # the same examples before all questions, so that they are computed once; not asked themselves
    drawn = frozenset(random.Random(options.seed).sample(range(len(rows)), shots))
    shown = [rows[number] for number in sorted(drawn)]

    def ask(row: dict) -> Question:
        examples = [*shown, *(row.get("examples") or ())]
        header = "".join(with_answer(example, options.by_letter) + "\n\n" for example in examples)
        context = written(row, options.by_letter)
        answer = answer_of(row)
        if options.by_letter:
            letters = LETTERS[: len(row["choices"])]
            pairs = [(context, f" {letter}") for letter in letters]
            return Question(tuple(pairs), answer, letters[answer], header)
        pairs = [(context, f" {choice}") for choice in row["choices"]]
        return Question(tuple(pairs), answer, LETTERS[answer], header)

    about = {"shots": shots}
    if path:
        about |= {"path": str(path), "sha256": sha256(path)}
    metric = "acc" if options.by_letter else "acc_bytes"
    name = f"{name}-by_letter" if options.by_letter else name
    return Choices(name, options, about, rows, ask, ("question",), metric, drawn)


def written(row: dict, by_letter: bool) -> str:
    text = f"Question: {row['question']}\n"
    if by_letter:
        listed = zip(LETTERS, row["choices"])
        text += "".join(f"{letter}. {choice}\n" for letter, choice in listed)
    return f"{text}Answer:"


def with_answer(row: dict, by_letter: bool) -> str:
    answer = answer_of(row)
    said = LETTERS[answer] if by_letter else row["choices"][answer]
    return f"{written(row, by_letter)} {said}"


def answer_of(row: dict) -> int:
    """The index of the right choice."""
    answer, choices = row["answer"], row["choices"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    if answer in choices:
        return choices.index(answer)
    return list(LETTERS).index(answer)  # of a text index() would find parts, "" and "AB" too


def check_choices(row: dict, path: Path | None) -> None:
    """E127 for a row that is no question."""
    place = f"{path}, line {row['line']}" if path else "a row"
    choices = row.get("choices")
    if not isinstance(row.get("question"), str):
        raise UserError("E127", f"{place}: question: {short(row.get('question'))} is no text")
    texts_only = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts_only or not 2 <= len(choices) <= len(LETTERS):
        text = f"choices: {short(choices)} are no 2 to {len(LETTERS)} texts"
        raise UserError("E127", f"{place}: {text}")
    try:
        right = 0 <= answer_of(row | {"answer": row["answer"]}) < len(choices)
    except (KeyError, ValueError, TypeError):
        right = False
    if not right:
        text = f"answer: {short(row.get('answer'))} is no index from 0, letter or choice"
        raise UserError("E127", f"{place}: {text}; there are {len(choices)} choices")
    examples = row.get("examples") or ()
    if not isinstance(examples, (list, tuple)):
        raise UserError("E127", f"{place}: examples: {short(examples)} is no list of rows")
    for example in examples:
        if not isinstance(example, dict):
            raise UserError("E127", f"{place}: examples: {short(example)} is no row like this one")
        check_choices({"line": row.get("line", 0), **example, "examples": ()}, path)


def cloze(path: Path, rows: list[dict], options: Options) -> Choices:
    """{context, continuation}: right where the continuation is what the model would write."""
    for row in rows:
        for field in ("context", "continuation"):
            if not isinstance(row.get(field), str) or not row[field]:
                text = f"{field}: {short(row.get(field))} is no text"
                raise UserError("E127", f"{path}, line {row['line']}: {text}")

    def ask(row: dict) -> Question:
        return Question(((row["context"], row["continuation"]),), 0, row["continuation"].strip())

    about = {"path": str(path), "sha256": sha256(path), "shots": 0}
    return Choices(path.stem, options, about, rows, ask, ("context",), "acc")
