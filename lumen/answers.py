"""The lines that an evaluation has so far, on disk: OUT/answers/TASK.jsonl, of each rank its own
until all questions are asked. One that was stopped goes on behind them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lumen.errors import UserError
from lumen.files import replacing


def key_of(facts: dict) -> str:
    """Stands for all that an answer depends on, but the question."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Answers:
    """Of one task. `key`: what the answers depend on; others are of another model or other options,
    and no part of this evaluation."""

    def __init__(self, folder: Path, task: str, key: str, rank: int = 0):
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
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
        try:
            first, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
            if json.loads(first).get("key") != self.key:
                return {}
        except (OSError, ValueError, AttributeError):
            return {}
        lines = {}
        for text in rest:
            try:
                line = json.loads(text)
            except ValueError:  # cut short by what ended the evaluation: it is asked again
                break
            lines[line["i"]] = line
        return lines

    def append(self, line: dict) -> None:
        """E119."""
        try:
            if self.file is None:
                kept = self.lines_of(self.part)  # of this rank, before it was stopped
                self.part.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.part.open("w", encoding="utf-8")
                self.write({"key": self.key})
                for earlier in kept.values():
                    self.write(earlier)
            self.write(line)
            self.file.flush()
        except OSError as error:
            raise UserError("E119", f"{self.part}: {error.strerror}") from error

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, lines: list[dict]) -> None:
        """All of them, in order, in one file; by one rank, when the others have closed theirs."""
        texts = [json.dumps(line, ensure_ascii=False) for line in ({"key": self.key}, *lines)]
        try:
            self.whole.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.whole) as file:
                file.write("".join(f"{text}\n" for text in texts).encode())
            for path in self.whole.parent.glob(self.parts):
                path.unlink()
        except OSError as error:
            raise UserError("E119", f"{self.whole}: {error.strerror}") from error

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None
