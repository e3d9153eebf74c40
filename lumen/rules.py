"""What a document must be like to be kept: rules, each named by what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

DEFAULTS = {
    "preset": "none",  # none | web
    "rules": [],  # names to add to the preset's; -name takes one out
    "language": None,  # codes to keep, as ["en", "de"]
    "language_threshold": 0.8,
    "ftfy": None,  # None: as the preset says
    "pii": None,  # None | mask
    "min_chars": None,
    "max_chars": None,
    "quality_threshold": None,  # 0 to 1
}


class Rule(NamedTuple):
    name: str
    keeps: str  # one sentence: what it keeps
    check: Callable  # (Measures) -> "" or the measured value and the limit


class Verdict(NamedTuple):
    text: str  # mended and masked
    dropped: str  # name of the rule, or ""
    why: str  # the measured value and the limit
    language: str  # code; "und": undecided; "": not asked for
    score: float  # quality, 0 to 1; -1: not asked for
    masked: int  # addresses masked


class Rules:
    """The rules of a dataset. Picklable."""

    def __init__(self, settings: dict):
        """settings: DEFAULTS' keys, any of them. E002 for other keys, names and values, E003 where
        a package is missing. self.settings has all keys."""

    def look(self, text: str) -> Verdict:
        """text: cleaned already."""
        raise NotImplementedError

    def look_all(self, text: str) -> dict[str, str]:
        """Every rule that would drop the text if it stood alone, and why."""
        raise NotImplementedError

    def explain(self) -> list[str]:
        """The active rules, with what each keeps; empty: there are none."""
        raise NotImplementedError


class Examples:
    """What each rule would drop: documents, bytes and three examples. Picklable; merging is the
    same in any order."""

    def add(self, where: str, text: str, failed: dict[str, str]) -> None:
        """One document; failed: of Rules.look_all."""
        raise NotImplementedError

    def merge(self, other: Examples) -> None:
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The table."""
        raise NotImplementedError

    def to_json(self) -> dict:
        """For report.json."""
        raise NotImplementedError
