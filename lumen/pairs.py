"""Preference pairs to rows. Prepared, document 2p is the chosen conversation of pair p, 2p + 1 the
rejected one; here whole pairs are packed, so that a row is two of the model's.

    chosen     | a chosen      | c chosen  | rest |
    rejected   | a rejected | c rejected | rest   |

Both hold the same pairs in the same order. The rest is a document of its own: what a pair's
log-probability is depends on nothing beside it.
"""

from __future__ import annotations

import numpy as np

from lumen.errors import UserError
from lumen.packing import pack
from lumen.windows import Source, anew, documents_of


class PairSource(Source):
    """One split of a dataset of pairs, packed when it is opened: best-fit on the longer side, the
    same rows for the same data and seq_len. As Source, but a row has two sides.

    pairs: how many there are; most: in one row; reference: float32 (pairs, 2), log-probabilities by
    which pairs are measured, set by whoever has them (lumen/reference.py), None: 0.0.
    Raises as Source, and E126: no pairs, one that is longer than a row, sides that are the same or
    have nothing to learn. E124: text or conversations. E002: document_mask: false.
    """

    sides = 2

    def __init__(
        self,
        path: str,
        split: str,
        seq_len: int,
        val_fraction: float = 0.0,
        document_mask: bool | None = None,
    ):
        if document_mask is False:
            text = "document_mask: false: pairs in one row must not see one another; drop the key"
            raise UserError("E002", text)
        self.reference: np.ndarray | None = None
        super().__init__(path, split, seq_len, val_fraction, True)

    # ------------------------------------------------------------ opening

    def open_bare(self, document_mask: bool) -> bool:
        self.check_kind()
        return False

    def check_kind(self) -> None:
        if self.kind == "pairs":
            return
        holds = "bare shards" if self.bare else {"chat": "conversations"}.get(self.kind, "text")
        text = f"{self.path} holds {holds}, preferences need pairs: rows of prompt, chosen and"
        text += " rejected, prepared by prepare_data.py"
        raise UserError("E124", f"{text}; method: sft trains on conversations")

    def lay_rows(self) -> None:
        """The pairs of each row: `order` from row_starts[i] to row_starts[i + 1]."""
        self.bounds = np.concatenate([np.zeros(0, np.int64), *self.document_starts()])
        self.stride, self.unused = 0, 0
        self.pairs, odd = divmod(max(0, len(self.bounds) - 1), 2)
        if odd:
            text = f"{odd + 2 * self.pairs} documents are no pairs of chosen and rejected"
            raise UserError("E111", f"{self.path}/manifest.json: {text}")
        self.order = self.row_starts = np.zeros(0, np.int64)
        self.windows = self.most = 0
        if not self.pairs:
            if self.split == "train":
                text = f"{self.path}: no pair is in its training split"
                raise UserError("E126", f"{text}; {self.anew()}")
            return
        lengths = np.diff(self.bounds).reshape(-1, 2)
        self.check_pairs(lengths)
        rows = pack(lengths.max(1), self.seq_len + 1)
        self.order = np.concatenate([np.array(row, np.int64) for row in rows])
        self.row_starts = np.cumsum([0, *map(len, rows)])
        self.windows, self.most = len(rows), max(map(len, rows))

    def document_starts(self):
        """Where documents begin over all shards, and the end of the last. E111: damaged."""
        if not self.shards:
            return
        for file, shard, at in zip(self.docs, self.shards, self.starts):
            yield documents_of(file, shard.tokens)[:-1] + at
        yield np.array(self.starts[-1:], np.int64)

    def check_pairs(self, lengths: np.ndarray) -> None:
        """E126 for the first pair that nothing can be learned from; lengths (pairs, 2)."""
        too_long = lengths.max(1) > self.seq_len + 1
        if too_long.any():
            most = int(lengths.max()) - 1
            text = f"{self.path}: {too_long.sum():,} of {self.pairs:,} pairs have a side of more"
            text += f" than max_seq_len {self.seq_len} positions, the longest {most}: set it to"
            raise UserError("E126", f"{text} {most}, or {self.anew()}")
        targets = np.concatenate(list(self.targets())).reshape(-1, 2)
        wrong = np.flatnonzero(targets.min(1) == 0)
        self.refuse(wrong, "a side without a token to learn")
        # that sides are the same is seen by their lengths, mostly
        alike = np.flatnonzero(lengths[:, 0] == lengths[:, 1])
        wrong = [p for p in alike.tolist() if np.array_equal(*(ids for ids, _ in self.pair(p)))]
        self.refuse(wrong, "chosen and rejected are the same")

    def anew(self) -> str:
        return f"prepare the pairs anew: {anew(self.path, self.manifest, self.seq_len)}"

    def targets(self):
        """How many supervised tokens each document of a shard has, shard by shard. The first token
        of a document is nobody's target."""
        for docs, mask, shard in zip(self.docs, self.masks, self.shards):
            starts = documents_of(docs, shard.tokens)
            before = np.cumsum(mask.read(0, shard.tokens) > 0)
            before = np.concatenate([[0], before])
            yield before[starts[1:]] - before[np.minimum(starts[:-1] + 1, starts[1:])]

    def refuse(self, numbers, why: str) -> None:
        """E126 with the first of these pairs."""
        if len(numbers):
            text = (
                f"{self.path}: {len(numbers):,} of {self.pairs:,} pairs of its {self.split} split"
            )
            raise UserError("E126", f"{text}, number {numbers[0]} first: {why}; {self.anew()}")

    # ------------------------------------------------------------ reading

    def numbers(self, i: int) -> np.ndarray:
        """The pairs of row i, int64 (n,), in their order."""
        assert 0 <= i < self.windows, (i, self.windows)
        return self.order[self.row_starts[i] : self.row_starts[i + 1]]

    def pair(self, p: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int64 (n,), mask uint8 (n,)) of the chosen and of the rejected one. E111, E113."""
        at, border, end = self.bounds[2 * p : 2 * p + 3].tolist()
        spans = self.spans_of(at, end)
        ids = [self.shards[k].read(first, n) for k, first, n in spans]
        ids = np.concatenate(ids, dtype=np.int64)
        self.check_ids(ids, spans)
        mask = np.concatenate([self.masks[k].read(first, n) for k, first, n in spans])
        cut = [border - at]
        return list(zip(np.split(ids, cut), np.split(mask, cut)))

    def row(self, i: int):
        """Row i: inputs and targets int64 (2, T), -1 where a target does not count; documents int32
        (2, T), a pair's number in the row; reference float32 (most, 2), NaN behind the pairs."""
        T = self.seq_len
        numbers = self.numbers(i)
        ids = np.zeros((2, T + 1), np.int64)
        counts = np.zeros((2, T + 1), bool)
        docs = np.full((2, T + 1), len(numbers), np.int32)
        ends = [0, 0]
        for n, p in enumerate(numbers.tolist()):
            for side, (tokens, mask) in enumerate(self.pair(p)):
                at = slice(ends[side], ends[side] + len(tokens))
                ids[side, at], docs[side, at] = tokens, n
                counts[side, at] = mask > 0
                counts[side, at.start] = False  # no document says how the next one begins
                ends[side] = at.stop
        y = np.where(counts, ids, -1)
        reference = np.full((self.most, 2), np.nan, np.float32)
        reference[: len(numbers)] = 0.0 if self.reference is None else self.reference[numbers]
        return ids[:, :-1], y[:, 1:], docs[:, :-1], reference

    def window(self, i: int):
        raise TypeError("a row of pairs is no window of tokens")
