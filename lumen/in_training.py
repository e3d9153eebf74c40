"""What a run asks its model on the way: `evaluate: {every: N, tasks: [...]}` in a training YAML.

Nothing here touches what is trained: a run has the same bits without it. The tasks are evaluate.py's
(lumen/tasks.py), their numbers go where the run's other numbers go, under eval/TASK/. Each question
is asked by itself, so that a number depends on the weights only, and on no number of processes.
"""

from __future__ import annotations

import time

import torch

from lumen import chat
from lumen import tokenizer as tokenizers
from lumen.errors import UserError
from lumen.files import read_lines
from lumen.questions import Asked, Options, Task
from lumen.replies import uncompiled
from lumen.scorer import Scorer


def make_tasks(cfg) -> list[Task]:
    """The tasks of an EvaluateConfig; no control, which would double what they cost. E127."""
    raise NotImplementedError


class InTraining:
    """Of a Trainer, whose `iterations` calls `look` before each step."""

    def __init__(self, trainer):
        """Before anything is prepared or allocated. E127, E002."""
        self.trainer = trainer
        self.every = trainer.cfg.evaluate.every
        self.tasks = make_tasks(trainer.cfg.evaluate) if self.every else []
        self.tokenizer = self.template = None
        self.asked_at: int | None = None  # the step before which all were asked

    def open(self) -> None:
        """The data are there, and with them what questions are written in. E501, E600."""

    def look(self, due) -> None:
        """Asks, where it is time; a signal leaves it, and then the run is saved and ends."""
