"""Run Python that a model wrote, within limits. This is NOT a security boundary."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    passed: bool
    why: str  # what went wrong; "": nothing


def run_python(code: str, tests: str = "", seconds: float = 5, memory: int = 512 << 20) -> Verdict:
    """Whether `tests` pass after `code`, in a process of its own."""
    raise NotImplementedError
