"""Documents that hold text of an evaluation."""

from __future__ import annotations


class Contaminated:
    """The n-grams of evaluation files (.txt: one text; .jsonl: every string in the rows)."""

    def __init__(self, files: list[str], ngram: int = 13):
        """E002 another ending, E101 no JSON, E103 no UTF-8, E108 cannot be read."""

    def hits(self, text: str) -> str:
        """The first n-gram of the text that is in the files, or ""."""
        raise NotImplementedError

    def explain(self) -> list[str]:
        """How many texts and n-grams there are, and how many texts are too short."""
        raise NotImplementedError
