"""Conversations about the running Python's own library, from its docstrings: no download."""

from __future__ import annotations

from collections.abc import Iterator


def docstring_rows(kind="chat", split="train") -> Iterator[dict]:
    """kind "chat": {messages}; "choice": {question, choices, answer}; "pairs": {prompt, chosen,
    rejected}. split "train" or "val": by module."""
    raise NotImplementedError
