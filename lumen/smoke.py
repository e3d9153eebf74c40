"""Smoke prompts in eight categories, judged by a heuristic whose parts are told; samples."""

from __future__ import annotations

from lumen.questions import Options, Task


def task(name: str, options: Options) -> Task:
    """The task `smoke` or `samples`; options.prompts: a file of one's own prompts. E127."""
    raise NotImplementedError
