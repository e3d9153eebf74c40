"""Shards to batches: a folder of .npy token shards becomes windows of T+1 tokens, a row number becomes a window.

The only state is the cursor, the number of rows read so far by all ranks together. What row r holds depends on nothing
else: not on the world size, the micro-batch, the accumulation, or where the run was resumed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from bisect import bisect_right
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count, islice

import numpy as np

from errors import UserError

BLOCK = 1024  # rows: a mixture gives every source a whole number of rows in each block
DEPTH = 4  # micro-batches read ahead
WAITS = (0.3, 1.0)  # seconds before each retry of a shard that changed or cannot be read
MAKE = "Make it: python prepare_data.py SOURCE --out {} --tokenizer bpe:8192"


class Shard:
    """One .npy file: `tokens` ids of `dtype`. Raises E111 (missing, damaged, changed), E112 (something else)."""

    def __init__(self, path: str):
        self.path = path
        try:
            with open(path, "rb") as f:
                stat = os.fstat(f.fileno())
                version = np.lib.format.read_magic(f)
                parse = np.lib.format.read_array_header_2_0 if version[0] > 1 else np.lib.format.read_array_header_1_0
                (shape, _, self.dtype), offset = parse(f), f.tell()
                f.seek(0)
                self.header = f.read(offset)
        except OSError as error:
            raise UserError("E111", f"shard {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise foreign(path) from None
        if len(shape) != 1 or self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            what = "a pickle of Python objects" if self.dtype.hasobject else f"a {len(shape)}-D array of {self.dtype!r}"
            fix = f"x = np.load({path!r}).ravel(); np.save({path!r}, x.astype(np.uint16 if x.max() < 65536 else np.uint32))"
            raise UserError("E112", f"{path} is {what}. If it is an array of token ids: {fix}")
        (self.tokens,), self.size, self.mtime = shape, stat.st_size, stat.st_mtime_ns
        expected = offset + self.tokens * self.dtype.itemsize
        if self.size != expected:
            text = f"by its header ({self.tokens} {self.dtype} tokens) expected {expected} bytes, found {self.size}"
            raise UserError("E111", f"shard {path} is damaged: {text}")

    def read(self, first: int, n: int) -> np.ndarray:
        """Tokens [first, first + n). Not a memory map: reading one past the end of a file that was truncated under the
        run kills the process (SIGBUS), and no check beforehand rules that out. Opened for each read, so that thousands
        of shards need no descriptors and a replaced file is seen. E111 if it changed and is not soon back as it was."""
        itemsize = self.dtype.itemsize
        for wait in (0, *WAITS):
            time.sleep(wait)
            try:
                with open(self.path, "rb", buffering=0) as f:
                    stat = os.fstat(f.fileno())
                    if wait and stat.st_size == self.size and f.read(len(self.header)) == self.header:
                        self.mtime = stat.st_mtime_ns  # somebody copied it back: taken as the same file
                    if (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime):
                        data = os.pread(f.fileno(), n * itemsize, len(self.header) + first * itemsize)
                        if len(data) == n * itemsize:
                            return np.frombuffer(data, self.dtype)
                found = f"now it has {stat.st_size}"
            except OSError as error:
                found = f"now: {error.strerror}"
        raise UserError("E111", f"shard {self.path} changed under the run: it had {self.size} bytes at start, {found}")


def foreign(path: str) -> UserError:
    """What a file that np.save did not write looks like, and how it becomes a shard."""
    with open(path, "rb") as f:
        head = f.read(4)
    if not head or head == b"\x93NUM":
        return UserError("E111", f"shard {path} is damaged: {os.path.getsize(path)} bytes, no complete .npy header")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return UserError("E112", f"{path} looks like a pickle, .npz or torch file, which are not loaded: use np.save")
    how = f"np.save('train_00000.npy', np.fromfile({path!r}, np.uint16)), with offset=1024 if llm.c wrote it"
    return UserError(
        "E112", f"{path} looks like raw tokens without a header (nanoGPT, llm.c, dolma). Convert it: {how}"
    )


def bare_shards(path: str) -> list[str]:
    """Names of the shards in a folder without a manifest, sorted. Raises E110, E112 for a folder that has none."""
    try:
        names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
    except NotADirectoryError:
        raise (
            foreign(path) if path.endswith(".bin") else UserError("E110", f"{path}: name the folder it is in")
        ) from None
    except OSError as error:
        raise UserError("E110", f"dataset {path}: {error.strerror}. {MAKE.format(path)}") from None
    if "progress.json" in names:
        text = f"the preparation of {path} is not finished. Start its prepare_data.py command again: it goes on"
        raise UserError("E110", f"{text} where it was")
    shards = [n for n in names if n.endswith(".npy") and not n.endswith((".docs.npy", ".mask.npy", "token_bytes.npy"))]
    if not shards and (raw := [n for n in names if n.endswith(".bin")]):
        raise foreign(os.path.join(path, raw[0]))
    if not shards:
        raise UserError("E110", f"{path} holds neither manifest.json nor .npy shards. {MAKE.format(path)}")
    return shards


class Source:
    """One split ('train' or 'val') of the dataset in folder `path` as windows of seq_len + 1 tokens at stride seq_len
    over all its shards, whatever their sizes. Only the last partial window is unused; nothing is padded.
    In a folder without manifest.json the val_* files are the val split; where there are none, the last `val_fraction`
    of the windows is. Raises E110, E111, E112, and E114 for a training split without one window."""

    def __init__(self, path: str, split: str, seq_len: int, val_fraction: float = 0.0):
        self.path, self.split, self.seq_len = path, split, seq_len
        self.manifest = self.max_id = self.vocab_size = self.dtype = None
        file, held_out = os.path.join(path, "manifest.json"), False
        self.bare = not os.path.exists(file)
        if self.bare:
            every = bare_shards(path)
            held_out = not any(n.startswith("val_") for n in every)  # here both splits are parts of the same shards
            names = [n for n in every if held_out or n.startswith("val_") == (split == "val")]
        else:
            try:
                with open(file, encoding="utf-8") as f:
                    self.manifest = json.load(f)
                self.fingerprint, self.dtype = self.manifest["fingerprint"], np.dtype(self.manifest["dtype"])
                entries = self.manifest["splits"].get(split, {}).get("shards", [])
                names, lengths = [e["file"] for e in entries], [e["tokens"] for e in entries]
                self.max_id = max((e["max_id"] for e in entries), default=None)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError("E111", f"{file} is damaged: {type(error).__name__} {error}") from None
        self.shards = [Shard(os.path.join(path, name)) for name in names]
        if self.bare:
            lengths, self.dtype = [s.tokens for s in self.shards], self.shards[0].dtype if self.shards else None
            facts = [[n, s.size, s.dtype.str, s.header.hex()] for n, s in zip(names, self.shards)]
            facts.append(val_fraction if held_out else None)  # it moves the end of train, and so the whole order
            self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        for shard, tokens in zip(self.shards, lengths):
            if (shard.tokens, shard.dtype) != (tokens, self.dtype):
                text = f"expected {tokens} {self.dtype} tokens (by {self.shards[0].path if self.bare else file})"
                text = f"shard {shard.path} does not belong here: {text}, found {shard.tokens} {shard.dtype}"
                raise UserError("E111" if shard.dtype == self.dtype else "E112", text)
        self.starts = [0, *accumulate(lengths)]  # of each shard in the virtual array, and the end of all
        self.first, self.tokens = 0, self.starts[-1]  # this split is tokens [first, first + tokens) of the array
        if held_out:
            n = max(self.tokens - 1, 0) // seq_len
            n_val = max(0, min(n - 1, max(1, round(n * val_fraction)))) if val_fraction else 0
            border = (n - n_val) * seq_len  # train's last target and val's first input: no target is in both
            if split == "val":
                self.first, self.tokens = border, self.tokens - border if n_val else 0
            elif n_val:
                self.tokens = border + 1
        self.windows = max(self.tokens - 1, 0) // seq_len
        self.unused = self.tokens - self.windows * seq_len - (self.windows > 0)
        if split == "train" and not self.windows:
            text = (
                f"{path} has {self.tokens} tokens to train on, one row needs {seq_len + 1} (max_seq_len {seq_len} + 1)"
            )
            raise UserError("E114", text)

    def window(self, i: int) -> np.ndarray:
        """Window i: int64 (T+1,); [:-1] is the input, [1:] the target. E111 if a shard changed, E113 as check_vocab."""
        if not 0 <= i < self.windows:
            raise IndexError(f"window {i} of {self.windows}")
        at, parts = self.first + i * self.seq_len, []
        end, k = at + self.seq_len + 1, bisect_right(self.starts, at) - 1
        while at < end:
            stop = min(end, self.starts[k + 1])
            if at < stop:  # a shard may hold no token at all
                parts.append(self.shards[k].read(at - self.starts[k], stop - at))
            at, k = stop, k + 1
        window = np.concatenate(parts, dtype=np.int64)
        if self.max_id is None and self.vocab_size:
            self.check_vocab(self.vocab_size, int(window.max()))
        return window

    def check_vocab(self, vocab_size: int, largest: int | None = None) -> None:
        """E113 if an id is vocab_size or more: now, by the manifest; without one from now on, in each window read."""
        self.vocab_size, largest = vocab_size, self.max_id if largest is None else largest
        if largest is not None and largest >= vocab_size:
            text = (
                f"dataset {self.path} ({self.split}) holds token id {largest}, the model's vocab_size is {vocab_size}"
            )
            raise UserError("E113", f"{text}: the tokenizer of the data and the model do not match")


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (uint64): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def feistel(index: np.ndarray, n: int, *key) -> np.ndarray:
    """Where the permutation of [0, n) that `key` stands for sends each `index`: int64 (N,) -> int64 (N,).
    Six Feistel rounds permute the next power of 4; what falls outside [0, n) goes through again until it is inside
    (cycle walking; Black and Rogaway 2002). Not numpy's: its generators may change between versions."""
    seed = int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = mix(np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(seed))
    x = np.array(index, np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> shift, x[todo] & mask
        for k in keys:
            left, right = right, left ^ (mix(right + k) & mask)
        x[todo] = left << shift | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


class Loader:
    """Batches as a pure function of (seed, segments, cursor). `segments` is [[first_row, {name: weight}], ...]: from
    first_row on, each block of 1024 rows holds 1024 * share rows of each source (largest remainder), shuffled. Each
    epoch of a source is a permutation of its windows, and it goes on where it was when weights change. E002, E113."""

    def __init__(self, sources: dict[str, Source], seed: int, segments: list, vocab_size: int | None = None):
        self.sources, self.seed, self.names = sources, seed, sorted(sources)
        for source in sources.values() if vocab_size else ():
            source.check_vocab(vocab_size)
        self.starts = [start for start, _ in segments]
        if self.starts[:1] != [0] or self.starts != sorted(self.starts):
            raise UserError("E002", f"the phases of the data begin at row 0 and ascend; these begin at {self.starts}")
        self.quotas = [self._quota(weights) for _, weights in segments]  # [segment][source]: rows in each block
        self.taken = [[0] * len(self.names)]  # [segment][source]: rows read when the segment begins
        for s, start in enumerate(self.starts[1:]):
            self.taken.append(self._count(s, start))
        self._plan = functools.lru_cache(maxsize=16)(self._plan)  # 1024 rows are shuffled at a time: a row costs little
        self._ahead, self._pool = deque(), None

    def _quota(self, weights: dict[str, float]) -> list[int]:
        w = [float(weights.get(name, 0)) for name in self.names]
        if set(weights) - set(self.names) or not all(0 <= x < math.inf for x in w) or sum(w) == 0:
            raise UserError("E002", f"weights {weights} do not fit the sources {self.names}: none below 0, not all 0")
        share = [x / sum(w) * BLOCK for x in w]
        quota = [math.floor(x) for x in share]
        for k in sorted(range(len(w)), key=lambda k: quota[k] - share[k])[: BLOCK - sum(quota)]:
            quota[k] += 1
        for name, rows, x in zip(self.names, quota, w):
            if x and not (rows and self.sources[name].windows):  # else it would be left out without a word
                raise UserError("E002", f"source {name!r} has no rows to give, or less than 1/{BLOCK} of the weights")
        return quota

    def _order(self, s: int, block: int) -> np.ndarray:
        """Which source each row of a block of segment s is from: int (1024,)."""
        order = np.repeat(np.arange(len(self.names)), self.quotas[s])
        return order[feistel(np.arange(BLOCK), BLOCK, self.seed, "block", self.starts[s], block)]

    def _count(self, s: int, row: int) -> list[int]:
        """Rows of each source before `row`, a row of segment s or the first after it."""
        block, rest = divmod(row - self.starts[s], BLOCK)
        part = np.bincount(self._order(s, block)[:rest], minlength=len(self.names)).tolist()
        return [t + block * q + p for t, q, p in zip(self.taken[s], self.quotas[s], part)]

    def _plan(self, s: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, window and epoch of each row of a block of segment s: int (1024,) each."""
        order = self._order(s, block)
        window, epoch = np.empty((2, BLOCK), np.int64)
        for k, name in enumerate(self.names):
            mine, quota, n = np.flatnonzero(order == k), self.quotas[s][k], self.sources[name].windows
            epoch[mine], at = np.divmod(self.taken[s][k] + block * quota + np.arange(quota), max(n, 1))
            for e in np.unique(epoch[mine]).tolist():
                now = epoch[mine] == e
                window[mine[now]] = feistel(at[now], n, self.seed, "epoch", name, e)
        return order, window, epoch

    def locate(self, row: int) -> tuple[str, int, int]:
        """(source, window, epoch) of a row."""
        s = bisect_right(self.starts, row) - 1
        block, i = divmod(row - self.starts[s], BLOCK)
        order, window, epoch = self._plan(s, block)
        return self.names[order[i]], int(window[i]), int(epoch[i])

    def epochs(self, cursor: int) -> dict[str, float]:
        """How often each source has been read through after `cursor` rows."""
        rows = self._count(bisect_right(self.starts, cursor) - 1, cursor)
        return {name: n / max(self.sources[name].windows, 1) for name, n in zip(self.names, rows)}

    def batch(self, first_row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows [first_row, first_row + count): int64 (count, T) each. Any thread may call it."""
        where = [self.locate(row) for row in range(first_row, first_row + count)]
        rows = np.stack([self.sources[name].window(i) for name, i, _ in where])  # (count, T+1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def start(self, cursor: int, index: int, readers: int, micro: int, accum: int, steps: int | None = None) -> None:
        """Read ahead from `cursor` on as reader `index` of `readers`, dropping what was read ahead: this is seek too.
        Micro-step a of step s reads rows cursor + s*readers*micro*accum + (a*readers + index)*micro + [0, micro)."""
        self.close()
        # s*accum + a just counts micro-steps, so the formula is an arithmetic progression
        rows = count(cursor + index * micro, readers * micro)
        self._rows, self._micro = islice(rows, None if steps is None else steps * accum), micro
        self._pool = ThreadPoolExecutor(1, "loader")
        self._request()

    def _request(self) -> None:
        for row in islice(self._rows, DEPTH - len(self._ahead)):
            self._ahead.append((row, self._pool.submit(self.batch, row, self._micro)))

    def next(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(first row, inputs, targets) of the next micro-batch. What went wrong in the thread is raised here, and again
        until start(): no row is passed over. IndexError after `steps` steps."""
        row, batch = self._ahead[0]
        x, y = batch.result()
        self._ahead.popleft()
        self._request()
        return row, x, y

    def close(self) -> None:
        """End the thread and drop what it read ahead. start() may follow."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()


def val_rows(sources: dict[str, Source], weights: dict[str, float], count: int) -> list[tuple[str, int]]:
    """The fixed validation set as (source, window): `count` rows, or all there are, shared out by weight, each source's
    first windows in order. Every source with weight and windows has at least one."""
    left = [name for name in sorted(sources) if weights.get(name, 0) > 0 and sources[name].windows]
    taken = dict.fromkeys(left, 0)
    for _ in range(max(count, len(left))):
        if left:  # Adams' method: the next row goes to the source with the most weight per row, a first row before all
            name = max(left, key=lambda k: weights[k] / taken[k] if taken[k] else math.inf)
            taken[name] += 1
            if taken[name] == sources[name].windows:
                left.remove(name)
    return [(name, i) for name, n in taken.items() for i in range(n)]
