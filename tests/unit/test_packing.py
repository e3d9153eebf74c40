"""lumen/packing.py: every conversation whole, once, in rows of one length; none without a target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen.packing import LONG, fit, layout_rows, pack

FEW = settings(max_examples=100, deadline=None, database=None, derandomize=True)
LENGTHS = st.integers(1, 40).flatmap(
    lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=40))
)


@FEW
@given(LENGTHS)
def test_every_conversation_is_in_one_row_and_fits(case):
    room, lengths = case
    rows = pack(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(row for row in rows) and max(sums, default=0) <= room
    # best-fit: no two rows could have been one, and so all but one are more than half full
    smallest = sorted(sums)[:2]
    assert len(rows) < 2 or sum(smallest) > room
    assert rows == pack(np.array(lengths), room) == sorted(rows)


def test_best_fit_takes_the_row_with_least_room_left():
    # 6 and 5 open rows; 4 goes to 6, where it leaves nothing, and 3 to 5
    assert pack([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="1 to 11"):
        pack([1, 11], 10)
    with pytest.raises(ValueError, match="0 to 1"):
        pack([1, 0], 10)


def test_rows_are_full():
    """Lengths as conversations have them (log-normal): less than one place in a hundred is lost."""
    draws = np.random.default_rng(0).lognormal(5.5, 0.8, 20_000)
    lengths = np.minimum(draws.astype(int) + 1, 1025)
    assert lengths.sum() / (1025 * len(pack(lengths, 1025))) > 0.99


@FEW
@given(LENGTHS)
def test_layout_is_the_conversations_and_padding(case):
    room, lengths = case
    both = []
    for i, length in enumerate(lengths):
        both.append((np.full(length, i, np.uint32), np.full(length, 1 + i % 2, np.uint8)))
    tokens, mask, starts = layout_rows(both, pack(lengths, room), room, 999, np.uint16)
    assert tokens.dtype == np.uint16 and mask.dtype == np.uint8 and starts.dtype == np.uint64
    assert len(tokens) == len(mask) and len(tokens) % room == 0
    seen = []
    ends = {*starts.tolist(), *range(0, len(tokens) + 1, room)}
    for start in starts.tolist():
        i = int(tokens[start])
        seen.append(i)
        end = start + lengths[i]
        assert start // room == (end - 1) // room
        assert (tokens[start:end] == i).all() and (mask[start:end] == 1 + i % 2).all()
        # what follows is another conversation, another row, or padding without a target
        rest = range(end, min(e for e in ends if e >= end))
        assert all(tokens[place] == 999 and mask[place] == 0 for place in rest)
    assert sorted(seen) == list(range(len(lengths)))
    assert set(range(0, len(tokens), room)) <= set(starts.tolist())


MASK = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], np.uint8)
IDS = np.arange(10, dtype=np.uint32)


@pytest.mark.parametrize(
    "long, limit, length, done",
    [
        ("truncate", 10, 10, ""),
        ("drop", 10, 10, ""),
        ("turns", 10, 10, ""),
        ("truncate", 9, 9, "truncated"),
        ("truncate", 7, 7, "truncated"),
        ("truncate", 2, None, "unsupervised"),
        ("drop", 9, None, "too_long"),
        ("turns", 9, 9, "turns_dropped"),
        ("turns", 8, 4, "turns_dropped"),
        ("turns", 4, 4, "turns_dropped"),
        ("turns", 3, None, "too_long"),
    ],
)
def test_what_is_too_long(long, limit, length, done):
    kept, what = fit(IDS, MASK, limit, long)
    assert what == done and (kept is None) == (length is None)
    if kept:
        assert kept[0].tolist() == IDS[:length].tolist()
        assert kept[1].tolist() == MASK[:length].tolist()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'turn', none of truncate, turns, drop"):
        fit(IDS, MASK, 10, "turn")


@FEW
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 30), st.sampled_from(LONG)
)
def test_no_row_is_left_without_a_target(mask, limit, long):
    mask = np.array(mask, np.uint8)
    kept, done = fit(np.arange(len(mask)), mask, limit, long)
    if kept is None:
        assert done in ("unsupervised", "too_long")
        return
    ids, kept_mask = kept
    assert kept_mask.any() and len(ids) == len(kept_mask) <= limit
    assert (done == "") == (len(ids) == len(mask))
    if done == "turns_dropped":  # whole replies only
        assert kept_mask[-1] == 1 and mask[len(ids)] == 0
