"""The loop over the questions of a task, and the lines that it has so far on disk:
OUT/answers/TASK.jsonl, of each rank its own until all questions are asked. An evaluation that was
stopped goes on behind them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from lumen.errors import UserError, raise_if
from lumen.evaluation import never
from lumen.files import replacing
from lumen.questions import Asked, Task
from lumen.scorer import Packed

ROUND = 8  # questions that each rank asks before the ranks hear of one another


def ask(
    task: Task, asked: Asked, parallel, kept: Answers | None = None, stop=never, bar=None
) -> list[dict] | None:
    """A line for each question of a task, in order and the same on all ranks: each asks its part.

    kept: lines from before are not asked again, and new ones are written down one by one. stop() as
    in evaluate_loss, now and then: then None. bar(n): n more are done. A UserError on one rank is
    raised on all.
    """
    lines = {}
    for others in parallel.gather(kept.read() if kept else {}):  # each rank may have its own disk
        lines |= others
    todo = [i for i in range(len(task)) if task.number(i) not in lines]
    # where forward holds collectives all ranks ask the same
    first, ranks = parallel.rows() if parallel.collective_free else (0, 1)
    writes = kept and (parallel.collective_free or parallel.rank == 0)
    found = {}
    for begin in range(0, len(todo), ranks * ROUND):
        error = fault = None
        mine = todo[begin + first : begin + ranks * ROUND : ranks]
        try:
            for line in lines_of(task, mine, asked):
                found[line["i"]] = line
                if writes:
                    kept.append(line)
        except UserError as caught:
            error = caught
        except torch.OutOfMemoryError:
            text = f"{task.name}: a question does not fit into the device's memory"
            error = UserError("E200", f"{text}: --precision mixed_bf16, fewer --shots, no --pack")
        except Exception as caught:  # ours, or memory: the other ranks must not wait for this one
            fault = caught
        stopped, failed = parallel.all_reduce_max([stop(), int(bool(error or fault))])
        if failed:
            parallel.run_or_raise_on_all(raise_if, error)
            texts = parallel.gather(fault and f"{type(fault).__name__}: {fault}")
            raise RuntimeError(next(text for text in texts if text)) from fault
        if stopped:
            return None
        if bar:
            bar(min(ranks * ROUND, len(todo) - begin))
    for others in parallel.gather(found):
        lines |= others
    return [lines[task.number(i)] for i in range(len(task))]


def lines_of(task: Task, some: list[int], asked: Asked) -> Iterator[dict]:
    """Of these questions; one by one, so that each is written down at once."""
    if task.kind == "reply" and asked.slots > 1:
        task.write_ahead(some, asked)
    if task.kind == "choice" and isinstance(asked.scorer, Packed):
        yield from asked.scorer.lines(task, some, asked)
    else:
        for i in some:
            yield task.line(i, asked)


def key_of(facts: dict) -> str:
    """Stands for all that an answer depends on, but the question."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_sum() -> str:
    """Of all that asks and computes: what other code has answered is not gone on with."""
    top = Path(__file__).resolve().parent
    files = sorted([*top.glob("*.py"), *top.parent.glob("model*.py"), *top.parent.glob("kern*.py")])
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return key_of({"sums": sums, "torch": torch.__version__})


def as_text(line: dict) -> bytes:
    """In ASCII: a reply may hold U+2028, which ends a line too, or half a surrogate pair."""
    return json.dumps(line).encode() + b"\n"


class Answers:
    """Of one task. `key`: what the answers depend on; others are of another model or other options,
    and no part of this evaluation."""

    def __init__(self, folder: Path, task: str, key: str, rank: int = 0):
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        if name != task:  # two such names may look alike
            name += "-" + hashlib.sha256(task.encode()).hexdigest()[:8]
        self.whole = folder / f"{name}.jsonl"
        self.part = folder / f"{name}.rank{rank}.part"
        self.parts = f"{name}.rank*.part"
        self.key = key
        self.file = None

    def read(self) -> dict[int, dict]:
        """The lines that are there, by their `i`."""
        found = {}
        for path in (self.whole, *sorted(self.whole.parent.glob(self.parts))):
            found |= self.lines_of(path)
        return found

    def lines_of(self, path: Path) -> dict[int, dict]:
        lines = {}
        # what is no answer was cut short by what ended the evaluation: it is asked again
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            first, *rest = path.read_text(encoding="utf-8").splitlines()
            if json.loads(first)["key"] == self.key:
                for text in rest:
                    line = json.loads(text)
                    lines[line["i"]] = line
        return lines

    def append(self, line: dict) -> None:
        """E119."""
        try:
            if self.file is None:
                # of this rank, before it was stopped; what it has is not risked
                self.replace(self.part, self.lines_of(self.part).values())
                self.file = self.part.open("ab")
            self.file.write(as_text(line))
            self.file.flush()
        except OSError as error:
            raise UserError("E119", f"{self.part}: {error.strerror}") from error

    def replace(self, path: Path, lines) -> None:
        """OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.writelines(map(as_text, ({"key": self.key}, *lines)))

    def finish(self, lines: list[dict]) -> None:
        """All of them, in order, in one file; by one rank, when the others have closed theirs.
        Those of before that a smaller --limit has not asked for stay, for a larger one."""
        kept = self.read() | {line["i"]: line for line in lines}
        try:
            self.replace(self.whole, (kept[i] for i in sorted(kept)))
            for path in self.whole.parent.glob(self.parts):
                path.unlink()
        except OSError as error:
            raise UserError("E119", f"{self.whole}: {error.strerror}") from error

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None
