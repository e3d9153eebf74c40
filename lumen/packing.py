"""Conversations to rows of one length: what is too long is dealt with by rule, the rest is packed
best-fit; none is split, none goes over the border of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONG = ("truncate", "turns", "drop")


def fit(ids, mask, limit: int, long="truncate") -> tuple[tuple | None, str]:
    """((ids, mask) of at most `limit` tokens, or None: leave it out; what was done, to be counted).

    Too long: "truncate" keeps the beginning, "turns" what ends with the last reply that fits whole,
    "drop" nothing. What was done: "", "truncated", "turns_dropped", "too_long", or "unsupervised"
    where no supervised token would be left."""
    if long not in LONG:
        raise ValueError(f"long is {long!r}, none of {', '.join(LONG)}")
    done = ""
    if len(ids) > limit:
        keep, done = limit, "truncated"
        if long == "turns":
            keep, done = last_reply(mask, limit), "turns_dropped"
        if long == "drop" or keep == 0:
            return None, "too_long"
        ids, mask = ids[:keep], mask[:keep]
    if not np.any(mask):
        return None, "unsupervised"
    return (ids, mask), done


def last_reply(mask, limit: int) -> int:
    """Where the last run of 1 that is whole within the limit ends; 0: there is none."""
    ends = np.flatnonzero((mask[:limit] == 1) & (mask[1 : limit + 1] == 0))
    return int(ends[-1]) + 1 if len(ends) else 0


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` places: the indices of `lengths` in each. Best-fit decreasing (Johnson
    1973; at most 11/9 of the fewest rows possible, and 6/9): the longest first, each into the row
    where the least is left. The same rows for the same lengths."""
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= room:
        text = f"lengths of {lengths.min()} to {lengths.max()} do not go into rows of {room}"
        raise ValueError(text)
    rows = []
    open_rows = [[] for _ in range(room + 1)]  # by what is left: row numbers
    some = 0  # bit n: open_rows[n] is not empty
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        above = some >> length
        if above:
            left = length + (above & -above).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                some ^= 1 << left
        else:
            left = room
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        left -= length
        if left:
            open_rows[left].append(row)
            some |= 1 << left
    for row in rows:
        row.sort()
    return sorted(rows)  # in the order of their first conversations


def layout_rows(
    conversations: Sequence[tuple], rows: list[list[int]], length: int, pad_id: int, dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens (R * length,), mask uint8 of that shape, starts uint64: where conversations begin).

    conversations: (ids, mask) each; rows of `pack`. The rest of a row is pad_id with mask 0, and
    belongs to the row's last conversation."""
    tokens = np.full(len(rows) * length, pad_id, dtype)
    masks = np.zeros(len(rows) * length, np.uint8)
    starts = []
    for r, row in enumerate(rows):
        at = r * length
        for i in row:
            ids, mask = conversations[i]
            starts.append(at)
            tokens[at : at + len(ids)] = ids
            masks[at : at + len(ids)] = mask
            at += len(ids)
        assert at <= (r + 1) * length, f"row {r} holds {at - r * length} of {length} places"
    return tokens, masks, np.array(starts, np.uint64)
