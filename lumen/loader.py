"""Rows to batches: a row number becomes a window of one of the sources.

The only state is the cursor, the number of rows read so far by all ranks together. What row r
holds depends on nothing else: not on the world size, the micro-batch, the accumulation, or where
the run was resumed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from bisect import bisect_right
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lumen.errors import UserError
from lumen.windows import Batch, Source, Sums, dummy_batch, fill_row

BLOCK = 1024  # rows: a mixture gives every source a whole number of rows in each block
MICRO_BATCHES_AHEAD = 4


def feistel(index: np.ndarray, n: int, *key) -> np.ndarray:
    """Where the permutation of [0, n) that `key` stands for sends each `index`: int64 (N,) ->
    int64 (N,). Six Feistel rounds on pairs (left, right) permute the smallest a x b rectangle that
    n fits in; what falls outside n goes through again until it is inside (Black and Rogaway 2002).
    Not numpy's: it may change between versions."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x = np.array(index, np.uint64)
    todo = np.arange(len(index))
    while len(todo):
        left, right = np.divmod(x[todo], np.uint64(b))
        for k in range(6):
            # right is hashed by splitmix64's finaliser
            h = right + np.uint64((seed + k * 0x9E3779B97F4A7C15) % 2**64)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = (h ^ (h >> np.uint64(31))) >> np.uint64(1)
            size = np.uint64(b if k % 2 else a)  # of the side that left is on
            left, right = right, (left + h) % size
        x[todo] = left * np.uint64(b) + right  # six swaps: left is below a again
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def mix(seed: int, row: int) -> int:
    """A seed for the micro-step that starts at `row`: no random state ever needs saving."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits: torch takes no more


class Loader:
    """Batches as a pure function of (seed, segments, cursor). `segments` is [[first_row, {name:
    weight}], ...]: from first_row on, each block of 1024 rows holds 1024 * share rows of each
    source (largest remainder), shuffled. Each epoch of a source is a permutation of its windows,
    and it goes on where it was when weights change. E002, E113."""

    def __init__(
        self, sources: dict[str, Source], seed: int, segments: list, vocab_size: int | None = None
    ):
        self.sources = sources
        self.seed = seed
        # A segment that is over may name a source that is gone: its rows stay counted, or those of
        # the others would be, and windows of theirs would never be read.
        over = [name for _, weights in segments[:-1] for name in weights]
        self.names = sorted({*sources, *over})
        if vocab_size:
            for source in sources.values():
                source.check_vocab(vocab_size)
        # 1024 rows are shuffled at a time: a row costs little
        self._plan = functools.lru_cache(maxsize=16)(self._plan)
        self.starts = [start for start, _ in segments]
        if self.starts[:1] != [0] or self.starts != sorted(self.starts):
            text = "the phases of the data begin at row 0 and ascend"
            raise UserError("E002", f"{text}; these begin at {self.starts}")
        # [segment][source]: rows in each block; rows read when the segment begins
        self.quotas = [self._quota(weights) for _, weights in segments]
        self.taken = [[0] * len(self.names)]
        for s, start in enumerate(self.starts[1:]):
            self.taken.append(self._count(s, start))
        self._ahead = deque()
        self._pool = ThreadPoolExecutor(1)  # its thread starts with its first work
        self.sums: Sums | None = None  # of one rank

    def _quota(self, weights: dict[str, float]) -> list[int]:
        w = [float(weights.get(name, 0)) for name in self.names]
        if set(weights) - set(self.names) or not all(0 <= x < math.inf for x in w) or sum(w) == 0:
            text = f"weights {weights} do not fit the sources {self.names}: none below 0, not all 0"
            raise UserError("E002", text)
        share = [x / sum(w) * BLOCK for x in w]
        quota = [math.floor(x) for x in share]
        by_remainder = sorted(range(len(w)), key=lambda k: quota[k] - share[k])
        for k in by_remainder[: BLOCK - sum(quota)]:
            quota[k] += 1
        for name, rows, x in zip(self.names, quota, w):
            empty = name in self.sources and not self.sources[name].windows
            if x and (empty or not rows):  # else it would be left out in silence
                text = f"source {name!r} has no rows to give, or less than 1/{BLOCK} of the weights"
                raise UserError("E002", text)
        return quota

    def _count(self, s: int, row: int) -> list[int]:
        """Rows of each source before `row`, a row of segment s or the first after it."""
        block, rest = divmod(row - self.starts[s], BLOCK)
        part = np.bincount(self._plan(s, block)[0][:rest], minlength=len(self.names)).tolist()
        return [t + block * q + p for t, q, p in zip(self.taken[s], self.quotas[s], part)]

    def _plan(self, s: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, window and epoch of each row of a block of segment s: int (1024,) each."""
        order = np.repeat(np.arange(len(self.names)), self.quotas[s])
        order = order[feistel(np.arange(BLOCK), BLOCK, self.seed, "block", self.starts[s], block)]
        window, epoch = np.zeros((2, BLOCK), np.int64)
        for k, (name, quota) in enumerate(zip(self.names, self.quotas[s])):
            if name not in self.sources:
                continue
            rows = np.flatnonzero(order == k)
            n = self.sources[name].windows
            # how many rows of this source come before
            at = self.taken[s][k] + block * quota + np.arange(quota)
            epoch[rows] = at // max(n, 1)
            for e in np.unique(epoch[rows]).tolist():
                now = epoch[rows] == e
                window[rows[now]] = feistel(at[now] - e * n, n, self.seed, "epoch", name, e)
        return order, window, epoch

    def locate(self, row: int) -> tuple[str, int, int]:
        """(source, window, epoch) of a row."""
        s = bisect_right(self.starts, row) - 1
        block, i = divmod(row - self.starts[s], BLOCK)
        order, window, epoch = self._plan(s, block)
        return self.names[order[i]], int(window[i]), int(epoch[i])

    def rows(self, cursor: int) -> dict[str, int]:
        """How many of the first `cursor` rows are of each source."""
        rows = self._count(bisect_right(self.starts, cursor) - 1, cursor)
        return {name: n for name, n in zip(self.names, rows) if name in self.sources}

    def epochs(self, cursor: int) -> dict[str, float]:
        """How often each source has been read through after `cursor` rows."""
        rows = self.rows(cursor)
        return {name: n / max(self.sources[name].windows, 1) for name, n in rows.items()}

    def batch(self, first_row: int, count: int) -> Batch:
        """Rows [first_row, first_row + count). Any thread may call it."""
        sources = self.sources.values()
        batch = dummy_batch(first_row, count, next(iter(sources)).seq_len, sources)
        for r in range(count):
            name, i, _ = self.locate(first_row + r)
            fill_row(batch, r, self.sources[name], i)
        return batch

    def start(self, cursor: int, index: int, count: int, micro: int, accum: int) -> None:
        """Read from `cursor` on as reader `index` of `count`, dropping what was read ahead: this is
        seek too. Micro-step a of step s reads rows
        cursor + s*count*micro*accum + (a*count + index)*micro + [0, micro)."""
        self.close()
        # s*accum + a just counts micro-steps: accum has no influence
        self._rows = itertools.count(cursor + index * micro, count * micro)
        self._micro = micro
        self._pool = ThreadPoolExecutor(1, "loader")

    def next(self) -> Batch:
        """The next micro-batch. What went wrong in the thread is raised here, and again until
        start(): no row is passed over. E111 also once a sum is found wrong."""
        if self.sums and self.sums.error:
            raise self.sums.error
        for row in itertools.islice(self._rows, MICRO_BATCHES_AHEAD - len(self._ahead)):
            self._ahead.append(self._pool.submit(self.batch, row, self._micro))
        batch = self._ahead[0].result()
        self._ahead.popleft()
        return batch

    def close(self) -> None:
        """End the thread and drop what it read ahead. start() may follow."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)


def val_rows(
    sources: dict[str, Source], weights: dict[str, float], count: int
) -> list[tuple[str, int]]:
    """The fixed validation set as (source, window): `count` rows, or all there are. Row i of a
    source stands in line at i / weight (Adams' method), so they are shared out by weight and every
    source with a weight has at least one."""
    line = []
    for name in sorted(sources):
        if weights.get(name, 0) > 0:
            for i in range(min(max(count, 1), sources[name].windows)):
                line.append((i / weights[name], name, i))
    firsts = sum(i == 0 for _, _, i in line)  # one of every source
    return [(name, i) for _, name, i in sorted(line)[: max(count, firsts)]]
