"""Contamination: which questions of an evaluation stand in the text that a run was trained on."""

from __future__ import annotations


def overlap(tasks, state: dict, tokenizer, say, most_tokens: int | None = None) -> dict:
    """{name of a task: {share, n, n_hit, hits, examples}}; hits: the numbers of the questions."""
    return {}
