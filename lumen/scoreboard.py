"""What people see of scores: results.json, report.md, a picture, a table on the console.

results: {name, model, checkpoint: {path, step, sha256}, tokenizer: {name, sha256}, precision,
device, command, tasks: {NAME: {kind, metric, about, options, scores: [Score], contamination,
samples: [{prompt, reply}]}}}; whatever else there is goes into results.json as it is.
"""

from __future__ import annotations

from pathlib import Path

from lumen.launch import print_now
from lumen.scores import Score


def write(out, results: dict, say=print_now) -> None:
    """results.json, report.md and, where matplotlib is there, picture.png in folder `out`, each
    whole or not at all. OSError."""
    raise NotImplementedError


def surroundings() -> dict:
    """What a result depends on beside model and data: commit, versions, the machine, the date."""
    raise NotImplementedError


def table(scores: list[Score]) -> list[str]:
    """The headlines for the console, at most 100 columns."""
    raise NotImplementedError


def detailed(name: str, lines: list[dict], prompts: dict[int, str]) -> str:
    """All replies of a task of kind reply as markdown, for --detailed_output."""
    raise NotImplementedError


def compare(paths: list, say=print_now, out: Path | None = None) -> int:
    """Two or three folders of results (or their results.json) question by question, against the
    first. Returns how many regressions were seen. E128 where they cannot be compared."""
    raise NotImplementedError
