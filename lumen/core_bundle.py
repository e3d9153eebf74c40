"""CORE: the 22 tasks of DCLM (Li et al. 2024, arXiv 2406.11794), from the bundle on disk."""

from __future__ import annotations

from pathlib import Path

from lumen.questions import Choices, Options


def read_core(core_dir: Path, options: Options) -> list[Choices]:
    """The bundle's tasks; about["baseline"] is what chance has, 0 to 1."""
    raise NotImplementedError


def core_score(scores: dict[str, tuple[float, float]]) -> float:
    """The mean of centred accuracies, of {task: (accuracy, baseline)}."""
    raise NotImplementedError
