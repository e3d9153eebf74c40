"""Conversations to rows of one length: best-fit decreasing, none split, none across rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONG = ("truncate", "turns", "drop")


def fit(ids, mask, limit: int, long="truncate") -> tuple[tuple | None, str]:
    """((ids, mask) of at most `limit` tokens or None, what was done): "", truncated, turns_dropped,
    too_long, unsupervised. Never without a supervised token."""
    raise NotImplementedError


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths`, grouped in rows of at most `room` in all."""
    raise NotImplementedError


def fill(lengths: Sequence[int], rows: list[list[int]], room: int) -> float:
    """The share of the rows' places that is no padding."""
    raise NotImplementedError


def layout_rows(
    conversations: Sequence[tuple], rows: list[list[int]], length: int, pad_id: int, dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens (R * length,), mask uint8 alike, starts uint64: where a conversation begins)."""
    raise NotImplementedError
