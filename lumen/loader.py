"""Shards to batches: a folder of .npy token shards becomes windows of T+1 tokens, a row number becomes a window.

The only state is the cursor, the number of rows read so far by all ranks together. What row r holds depends on nothing
else: not on the world size, the micro-batch, the accumulation, or where the run was resumed.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lumen.errors import UserError
from lumen.files import sha256

BLOCK = 1024  # rows: a mixture gives every source a whole number of rows in each block
DEPTH = 4  # micro-batches read ahead
WAITS = (0.3, 1.0)  # seconds before the second and the third try to read a shard
TEXT = (".txt", ".md", ".py", ".jsonl", ".json")  # what prepare_data.py reads
PATIENCE = (
    3.0,
    5.0,
)  # and before two more where the disk itself fails (EIO, ESTALE, ...): network disks come back


@functools.lru_cache(
    maxsize=64
)  # thousands of shards would meet the limit of open files; the last user closes
def opened(path: str, size: int, mtime: int):  # a file that changed is opened anew
    return open(path, "rb", buffering=0)


class Shard:
    """One .npy file of token ids, held against `tokens` and `dtype` where they are known.
    Raises E111 (missing, damaged, changed) and E112 (no shard of ours, or another dtype)."""

    def __init__(self, path: str, tokens: int | None = None, dtype: np.dtype | None = None):
        self.path, head = path, b""
        try:
            with open(path, "rb") as f:
                stat, head = os.fstat(f.fileno()), os.pread(f.fileno(), 6, 0)
                parse = getattr(
                    np.lib.format, f"read_array_header_{np.lib.format.read_magic(f)[0]}_0"
                )
                (shape, _, self.dtype), self.offset, self.stamp = (
                    parse(f),
                    f.tell(),
                    (stat.st_size, stat.st_mtime_ns),
                )
        except OSError as error:
            raise UserError("E111", f"shard {path} cannot be read: {error.strerror}") from None
        except (ValueError, AttributeError):
            if b"\x93NUMPY".startswith(head):
                raise UserError(
                    "E111", f"shard {path}: no complete header in {stat.st_size} bytes"
                ) from None
            look = f"raw tokens; np.save('train_0.npy', np.fromfile({path!r}, np.uint16)) converts (llm.c: offset=1024)"
            if head[:2] == b"PK" or head[:1] == b"\x80":
                look = "a pickle, .npz or torch file, which are never loaded; save the array with np.save"
            raise UserError("E112", f"{path} has no .npy header, it looks like {look}") from None
        self.tokens = math.prod(shape) if tokens is None else tokens
        dtype = dtype or (
            self.dtype if self.dtype in (np.dtype("<u2"), np.dtype("<u4")) else np.dtype("<u2")
        )
        size = self.offset + self.tokens * dtype.itemsize
        if (shape, self.dtype, stat.st_size) != ((self.tokens,), dtype, size):
            text = (
                f"found an array of shape {shape} and dtype {self.dtype!r} in {stat.st_size} bytes"
            )
            text = f"{path}: expected {self.tokens} tokens of {dtype} in {size} bytes, {text}"
            fix = f". To convert: np.save(NEW, np.load({path!r}).ravel().astype(np.uint16 or np.uint32)); no pickles"
            raise UserError(
                *(
                    ("E111", text)
                    if len(shape) == 1 and self.dtype == dtype
                    else ("E112", text + fix)
                )
            )

    def read(self, first: int, n: int) -> np.ndarray:
        """Tokens [first, first + n). E111 if the file changed under the run and is not soon back as it was, or if the
        disk goes on failing.
        Not memory-mapped: whoever reads a mapping past the end of a file that was just truncated is killed (SIGBUS)."""
        n, at = n * self.dtype.itemsize, self.offset + first * self.dtype.itemsize
        disk = None  # what it said, if it was the disk that failed and not the file that is another one
        for wait in (0, *WAITS, *PATIENCE):
            if wait in PATIENCE and not disk:
                break
            try:
                if wait:  # somebody may be copying it back: the same size and header are taken as the same file
                    time.sleep(wait)
                    self.stamp = Shard(self.path, self.tokens, self.dtype).stamp
                stat = os.stat(self.path)
                found, disk = f"now it has {stat.st_size}", None
                if (stat.st_size, stat.st_mtime_ns) == self.stamp:
                    file = opened(self.path, *self.stamp)  # held, so that no other thread closes it
                    if len(data := os.pread(file.fileno(), n, at)) == n:
                        return np.frombuffer(data, self.dtype)
            except (OSError, UserError) as error:
                found = f"now: {getattr(error, 'text', error)}"
                cause = (
                    error if isinstance(error, OSError) else error.__context__
                )  # Shard's may come from the disk's
                disk = (
                    cause
                    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
                    else None
                )
                opened.cache_clear()  # a stale handle of a network disk
        if disk:
            tried = f"tried again for {sum(WAITS + PATIENCE):g} s"
            raise UserError("E111", f"shard {self.path} cannot be read, {tried}: {disk}")
        raise UserError(
            "E111",
            f"shard {self.path} changed under the run: it had {self.stamp[0]} bytes, {found}",
        )


class Sums:
    """Holds the bytes of prepared shards against the sha256 in their manifest.json, once, beside training.

    One rank does it for all, in a thread that takes a quarter of one core at most: a disk or a copy that has lost
    bytes leaves a shard of the right size, and its tokens would be trained on. `note` (out_dir/verified.jsonl) gets a
    line for each good shard: one that has the same path, size and time when the run is resumed is not read again. A
    bad one is said by `error`, which Loader.next() raises. Copies on other hosts: prepare_data.py --verify."""

    SHARE = 0.25  # of one core

    def __init__(self, sources: list[Source], note: str):
        self.note, self.error, self.ended = note, None, False
        self.todo = {
            s.path: (s, want)
            for source in sources
            for s, want in zip(source.shards, source.sums)
            if want
        }
        self.thread = threading.Thread(target=self.look, name="sums", daemon=True)
        self.thread.start()

    def look(self) -> None:
        known = set()
        with contextlib.suppress(OSError, ValueError), open(self.note, encoding="utf-8") as file:
            known = {line.strip() for line in file}
        for path, (shard, want) in self.todo.items():
            row = json.dumps(
                {"sha256": want, "stamp": list(shard.stamp), "shard": os.path.abspath(path)}
            )
            if row in known:
                continue
            try:
                found = sha256(path, self.SHARE, lambda: self.ended)
                replaced = os.stat(path).st_mtime_ns != shard.stamp[1]
            except OSError:  # read() says what is to be said
                continue
            if self.ended or self.error:
                return
            if found == want:
                with contextlib.suppress(OSError), open(self.note, "a", encoding="utf-8") as file:
                    file.write(row + "\n")
            elif not replaced:
                self.error = UserError("E111", f"shard {path}: {DAMAGED}")

    def end(self) -> None:
        self.ended = True
        self.thread.join(1)


DAMAGED = "its bytes are not those that were prepared (another sha256 than in manifest.json): copy it anew"


def bare_shards(path: str) -> list[str]:
    """The shards in a folder without a manifest, sorted; `path` may be one file too. Raises E110 if there are none."""
    files = (
        [path] if os.path.isfile(path) else sorted(glob.glob(os.path.join(glob.escape(path), "*")))
    )
    if os.path.exists(os.path.join(path, "progress.json")):
        raise UserError(
            "E110",
            f"{path} is not finished: start its prepare_data.py command again, it will go on",
        )
    shards = [
        f
        for f in files
        if f.endswith(".npy") and not f.endswith((".docs.npy", ".mask.npy", "token_bytes.npy"))
    ]
    shards = shards or [f for f in files if f.endswith(".bin")]  # Shard says what they are
    if not shards and holds_text(path):
        name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
        make = f"python prepare_data.py {path} --out data/{name} --tokenizer bpe:8192"
        raise UserError("E110", f"{path} is text, not tokens: {make}, then data_dir: data/{name}")
    if not shards:
        make = f"Make it: python prepare_data.py SOURCE --out {'data/NAME' if files else path} --tokenizer bpe:8192"
        raise UserError("E110", f"no manifest.json and no .npy shards in {path}. {make}")
    return shards


def holds_text(path: str) -> bool:
    """Whether it is a text file, or a folder that has one in it (it looks into 1,000 folders at most)."""
    if os.path.isfile(path):
        return path.lower().endswith(TEXT)
    return any(
        name.lower().endswith(TEXT)
        for _, _, names in itertools.islice(os.walk(path), 1000)
        for name in names
    )


class Source:
    """One split ('train' or 'val') of the dataset in folder `path` as windows of seq_len + 1 tokens at stride seq_len
    over all its shards, whatever their sizes. Only the last partial window is unused; nothing is padded.
    In a folder without manifest.json the val_* files are the val split; where there are none, the last `val_fraction`
    of the windows is. Raises E110, E111, E112, and E114 for a training split without one window."""

    def __init__(self, path: str, split: str, seq_len: int, val_fraction: float = 0.0):
        self.path, self.split, self.seq_len = path, split, seq_len
        self.manifest = self.max_id = self.vocab_size = self.dtype = None
        file, held_out, self.sums = os.path.join(path, "manifest.json"), False, []
        self.bare = not os.path.exists(file)
        if self.bare:
            files = bare_shards(path)
            val = [f for f in files if os.path.basename(f).startswith("val_")]
            held_out = not val  # then both splits are parts of the same shards
            files = files if held_out else val if split == "val" else sorted(set(files) - set(val))
            lengths = [None] * len(files)
        else:
            try:
                with open(file, encoding="utf-8") as f:
                    self.manifest = json.load(f)
                self.fingerprint, self.dtype = (
                    self.manifest["fingerprint"],
                    np.dtype(self.manifest["dtype"]),
                )
                shards = self.manifest["splits"].get(split, {}).get("shards", [])
                files, lengths = (
                    [os.path.join(path, s["file"]) for s in shards],
                    [s["tokens"] for s in shards],
                )
                self.max_id = max((s["max_id"] for s in shards), default=None)
                self.sums = [s.get("sha256") for s in shards]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    "E111", f"{file} is damaged: {type(error).__name__} {error}"
                ) from None
        self.shards = []
        for f, tokens in zip(files, lengths):
            self.shards.append(Shard(f, tokens, self.dtype))
            self.dtype = self.shards[0].dtype  # a dataset has one
        if self.bare:  # val_fraction moves the end of train, and so the whole order
            facts = [
                [os.path.basename(s.path), s.stamp[0], s.dtype.str, s.offset] for s in self.shards
            ]
            self.fingerprint = hashlib.sha256(
                json.dumps([facts, held_out and val_fraction]).encode()
            ).hexdigest()
        self.starts = [
            0,
            *itertools.accumulate(s.tokens for s in self.shards),
        ]  # of each in the virtual array; its end
        self.first, end = 0, self.starts[-1]  # this split is tokens [first, end) of the array
        if held_out:
            n = max(end - 1, 0) // seq_len
            n_val = min(n - 1, max(1, round(n * val_fraction))) if val_fraction and n else 0
            border = (
                n - n_val
            ) * seq_len  # train's last target and val's first input: no target is in both
            self.first, end = (border, end) if split == "val" else (0, border + 1 if n_val else end)
        self.tokens = end - self.first
        self.windows = max(self.tokens - 1, 0) // seq_len
        self.unused = self.tokens - self.windows * seq_len - (self.windows > 0)
        if split == "train" and not self.windows:
            raise UserError(
                "E114",
                f"{path}: {self.tokens} tokens, a row of max_seq_len {seq_len} needs {seq_len + 1}",
            )

    def window(self, i: int) -> np.ndarray:
        """Window i: int64 (T+1,); [:-1] is the input, [1:] the target. E111 if a shard changed or holds an id that it
        cannot, E113 as check_vocab."""
        assert 0 <= i < self.windows, (i, self.windows)
        at, parts = self.first + i * self.seq_len, []
        end, k = at + self.seq_len + 1, bisect_right(self.starts, at) - 1
        while at < end:
            stop = min(end, self.starts[k + 1])
            parts.append(
                self.shards[k].read(at - self.starts[k], stop - at)
            )  # a shard may hold no token at all
            at, k = stop, k + 1
        window = np.concatenate(parts, dtype=np.int64)
        largest = int(window.max())
        if self.max_id is None and self.vocab_size:
            self.check_vocab(self.vocab_size, largest)
        elif self.max_id is not None and largest > self.max_id:  # an embedding has no row for it
            first = bisect_right(self.starts, self.first + i * self.seq_len) - 1
            names = " or ".join(shard.path for shard in self.shards[first:k])
            text = f"token id {largest}, in manifest.json {self.max_id} is the largest"
            raise UserError("E111", f"shard {names} is damaged: it holds {text}; copy it anew")
        return window

    def check_vocab(self, vocab_size: int, largest: int | None = None) -> None:
        """E113 if an id is vocab_size or more: now, by the manifest; without one from now on, in each window read."""
        self.vocab_size, largest = vocab_size, self.max_id if largest is None else largest
        if largest is not None and largest >= vocab_size:
            text = f"{self.path} holds token id {largest}, the model's vocab_size is {vocab_size}"
            raise UserError("E113", f"{text}: the tokenizer of the data and the model do not match")


def feistel(index: np.ndarray, n: int, *key) -> np.ndarray:
    """Where the permutation of [0, n) that `key` stands for sends each `index`: int64 (N,) -> int64 (N,).
    Six Feistel rounds on pairs (left, right) permute the smallest a x b rectangle that n fits in; what falls outside n
    goes through again until it is inside (Black and Rogaway 2002). Not numpy's: it may change between versions."""
    seed = int.from_bytes(
        hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little"
    )
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x, todo = np.array(index, np.uint64), np.arange(len(index))
    while len(todo):
        left, right = np.divmod(x[todo], np.uint64(b))
        for k in range(6):
            h = right + np.uint64(
                (seed + k * 0x9E3779B97F4A7C15) % 2**64
            )  # hashed by splitmix64's finaliser
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = (
                right,
                (left + ((h ^ (h >> np.uint64(31))) >> np.uint64(1)))
                % np.uint64(b if k % 2 else a),
            )
        x[todo] = left * np.uint64(b) + right  # six swaps: left is below a again
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


class Loader:
    """Batches as a pure function of (seed, segments, cursor). `segments` is [[first_row, {name: weight}], ...]: from
    first_row on, each block of 1024 rows holds 1024 * share rows of each source (largest remainder), shuffled. Each
    epoch of a source is a permutation of its windows, and it goes on where it was when weights change. E002, E113."""

    def __init__(
        self, sources: dict[str, Source], seed: int, segments: list, vocab_size: int | None = None
    ):
        self.sources, self.seed, self.names = sources, seed, sorted(sources)
        for source in sources.values() if vocab_size else ():
            source.check_vocab(vocab_size)
        self._plan = functools.lru_cache(maxsize=16)(
            self._plan
        )  # 1024 rows are shuffled at a time: a row costs little
        self.starts = [start for start, _ in segments]
        if self.starts[:1] != [0] or self.starts != sorted(self.starts):
            raise UserError(
                "E002",
                f"the phases of the data begin at row 0 and ascend; these begin at {self.starts}",
            )
        self.quotas = [
            self._quota(weights) for _, weights in segments
        ]  # [segment][source]: rows in each block
        self.taken = [[0] * len(self.names)]  # [segment][source]: rows read when the segment begins
        for s, start in enumerate(self.starts[1:]):
            self.taken.append(self._count(s, start))
        self._ahead, self._pool = (
            deque(),
            ThreadPoolExecutor(1),
        )  # its thread starts with its first work
        self.sums: Sums | None = None  # of one rank

    def _quota(self, weights: dict[str, float]) -> list[int]:
        w = [float(weights.get(name, 0)) for name in self.names]
        if set(weights) - set(self.names) or not all(0 <= x < math.inf for x in w) or sum(w) == 0:
            raise UserError(
                "E002",
                f"weights {weights} do not fit the sources {self.names}: none below 0, not all 0",
            )
        share = [x / sum(w) * BLOCK for x in w]
        quota = [math.floor(x) for x in share]
        for k in sorted(range(len(w)), key=lambda k: quota[k] - share[k])[: BLOCK - sum(quota)]:
            quota[k] += 1
        for name, rows, x in zip(self.names, quota, w):
            if x and not (
                rows and self.sources[name].windows
            ):  # else it would be left out without a word
                raise UserError(
                    "E002",
                    f"source {name!r} has no rows to give, or less than 1/{BLOCK} of the weights",
                )
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
        window, epoch = np.empty((2, BLOCK), np.int64)
        for k, (name, quota) in enumerate(zip(self.names, self.quotas[s])):
            rows, n = np.flatnonzero(order == k), self.sources[name].windows
            at = (
                self.taken[s][k] + block * quota + np.arange(quota)
            )  # how many rows of this source come before
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

    def epochs(self, cursor: int) -> dict[str, float]:
        """How often each source has been read through after `cursor` rows."""
        rows = self._count(bisect_right(self.starts, cursor) - 1, cursor)
        return {name: n / max(self.sources[name].windows, 1) for name, n in zip(self.names, rows)}

    def batch(self, first_row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows [first_row, first_row + count): int64 (count, T) each. Any thread may call it."""
        x, y = np.empty((2, count, self.sources[self.names[0]].seq_len), np.int64)
        for r in range(count):
            name, i, _ = self.locate(first_row + r)
            window = self.sources[name].window(i)
            x[r], y[r] = window[:-1], window[1:]
        return x, y

    def start(
        self, cursor: int, index: int, count: int, micro: int, accum: int, steps: int | None = None
    ) -> None:
        """Read from `cursor` on as reader `index` of `count`, dropping what was read ahead: this is seek too.
        Micro-step a of step s reads rows cursor + s*count*micro*accum + (a*count + index)*micro + [0, micro)."""
        self.close()
        rows = itertools.count(
            cursor + index * micro, count * micro
        )  # s*accum + a just counts micro-steps
        self._rows, self._micro = (
            itertools.islice(rows, None if steps is None else steps * accum),
            micro,
        )
        self._pool = ThreadPoolExecutor(1, "loader")

    def next(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(first row, inputs, targets) of the next micro-batch. What went wrong in the thread is raised here, and again
        until start(): no row is passed over. IndexError after `steps` steps. E111 also once a sum is found wrong."""
        if self.sums and self.sums.error:
            raise self.sums.error
        for row in itertools.islice(self._rows, DEPTH - len(self._ahead)):
            self._ahead.append((row, self._pool.submit(self.batch, row, self._micro)))
        row, batch = self._ahead[0]
        x, y = batch.result()
        self._ahead.popleft()
        return row, x, y

    def close(self) -> None:
        """End the thread and drop what it read ahead. start() may follow."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)


def val_rows(
    sources: dict[str, Source], weights: dict[str, float], count: int
) -> list[tuple[str, int]]:
    """The fixed validation set as (source, window): `count` rows, or all there are. Row i of a source stands in line at
    i / weight (Adams' method), so they are shared out by weight and every source with a weight has at least one."""
    names = [name for name in sorted(sources) if weights.get(name, 0) > 0]
    line = [
        (i / weights[name], name, i)
        for name in names
        for i in range(min(max(count, 1), sources[name].windows))
    ]
    return [(name, i) for _, name, i in sorted(line)[: max(count, sum(i == 0 for _, _, i in line))]]
