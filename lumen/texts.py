"""Kind text: how well a model predicts text, of files and of a run's held-out split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lumen.questions import Asked, Options, Task


@dataclass
class TextTask(Task):
    """Whole texts. A question is a document."""

    documents: list[str] = field(default_factory=list)
    stride: int | None = None  # None: disjoint windows, as lm-eval's loglikelihood_rolling
    kind = "text"
    metric = "bits_per_byte"

    def __len__(self) -> int:
        raise NotImplementedError

    def line(self, i: int, asked: Asked) -> dict:
        raise NotImplementedError


class ValTask(Task):
    """The rows of a run's held-out split, in the blocks in which its trainer evaluates them."""

    kind = "text"
    metric = "loss"


def read_texts(path: Path, options: Options) -> list[Task]:
    """A text file (.txt, .md, .jsonl with text) as a task."""
    raise NotImplementedError


def val_task(opened, options: Options, say) -> ValTask | None:
    """Of lumen.models.Opened; None, and said, where the data are not there."""
    raise NotImplementedError
