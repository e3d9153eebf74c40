"""Shards to batches: a folder of .npy token shards becomes windows of T+1 tokens, a row number
becomes a window.

The only state is the cursor, the number of rows read so far by all ranks together. What row r
holds depends on nothing else: not on the world size, the micro-batch, the accumulation, or where
the run was resumed.
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
from lumen.files import read_json, sha256
from lumen.sources import ENDINGS

BLOCK = 1024  # rows: a mixture gives every source a whole number of rows in each block
MICRO_BATCHES_AHEAD = 4
RETRY_WAITS_SECONDS = (0.3, 1.0)  # before the second and the third try to read a shard
# and before two more where the disk itself fails (EIO, ESTALE, ...): network disks come back
DISK_RETRY_WAITS_SECONDS = (3.0, 5.0)
FOLDERS_LOOKED_INTO = 1000  # for text where tokens were expected
DAMAGED = (
    "its bytes are not those that were prepared (another sha256 than in manifest.json): "
    "copy it anew"
)


# Thousands of shards would meet the limit of open files; whoever uses one last closes it. Size and
# mtime are part of the key: a file that changed is opened anew.
@functools.lru_cache(maxsize=64)
def opened(path: str, size: int, mtime: int):
    return open(path, "rb", buffering=0)


class Shard:
    """One .npy file of token ids, 1-D, held against `tokens` and `dtype` where they are known.
    E111: missing, damaged, changed; E112: no shard of ours, or another dtype."""

    def __init__(self, path: str, tokens: int | None = None, dtype: np.dtype | None = None):
        self.path = path
        shape = self.read_header()
        if dtype is None:
            ours = self.dtype in (np.dtype("<u2"), np.dtype("<u4"))
            dtype = self.dtype if ours else np.dtype("<u2")
        self.tokens = math.prod(shape) if tokens is None else tokens
        size = self.offset + self.tokens * dtype.itemsize
        found_size = self.stamp[0]
        if shape == (self.tokens,) and self.dtype == dtype and found_size == size:
            return
        found = f"found an array of shape {shape} and dtype {self.dtype!r} in {found_size} bytes"
        text = f"{path}: expected {self.tokens} tokens of {dtype} in {size} bytes, {found}"
        if len(shape) == 1 and self.dtype == dtype:
            raise UserError("E111", text)
        fix = f"np.save(NEW, np.load({path!r}).ravel().astype(np.uint16 or np.uint32)); no pickles"
        raise UserError("E112", f"{text}. To convert: {fix}")

    def read_header(self) -> tuple:
        """Sets dtype, offset (bytes, of the first token) and stamp (size, mtime in ns); returns the
        shape."""
        head = b""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                head = os.pread(file.fileno(), 6, 0)
                major, _ = np.lib.format.read_magic(file)
                parse = getattr(np.lib.format, f"read_array_header_{major}_0")
                shape, _, self.dtype = parse(file)
                self.offset = file.tell()
                self.stamp = (stat.st_size, stat.st_mtime_ns)
                return shape
        except OSError as error:
            raise UserError("E111", f"shard {self.path} cannot be read: {error.strerror}") from None
        except (ValueError, AttributeError):
            if b"\x93NUMPY".startswith(head):
                text = f"shard {self.path}: no complete header in {stat.st_size} bytes"
                raise UserError("E111", text) from None
        convert = f"np.save('train_0.npy', np.fromfile({self.path!r}, np.uint16)) converts"
        look = f"raw tokens; {convert} (llm.c: offset=1024)"
        if head[:2] == b"PK" or head[:1] == b"\x80":
            look = (
                "a pickle, .npz or torch file, which are never loaded; save the array with np.save"
            )
        raise UserError("E112", f"{self.path} has no .npy header, it looks like {look}")

    def read(self, first: int, n: int) -> np.ndarray:
        """Tokens [first, first + n). E111 if the file changed under the run and is not soon back
        as it was, or if the disk goes on failing.

        Not memory-mapped: whoever reads a mapping past the end of a file that was just truncated is
        killed (SIGBUS)."""
        waits = (0, *RETRY_WAITS_SECONDS, *DISK_RETRY_WAITS_SECONDS)
        disk_error = (
            None  # what the disk said, if it failed; None if it is another file that is there
        )
        for tries, wait in enumerate(waits):
            if tries > len(RETRY_WAITS_SECONDS) and disk_error is None:
                break
            try:
                if wait:
                    # somebody may be copying it back: the same size and header are the same file
                    time.sleep(wait)
                    self.stamp = Shard(self.path, self.tokens, self.dtype).stamp
                data, size = self.read_once(first, n)
                if data is not None:
                    return data
                found, disk_error = f"now it has {size}", None
            except (OSError, UserError) as error:
                found = f"now: {getattr(error, 'text', error)}"
                disk_error = disk_error_in(error)
                opened.cache_clear()  # a stale handle of a network disk
        if disk_error:
            seconds = sum(waits)
            text = f"shard {self.path} cannot be read, tried again for {seconds:g} s: {disk_error}"
            raise UserError("E111", text)
        had = f"it had {self.stamp[0]} bytes, {found}"
        raise UserError("E111", f"shard {self.path} changed under the run: {had}")

    def read_once(self, first: int, n: int) -> tuple[np.ndarray | None, int]:
        """(tokens, bytes of the file); None for a file that is not the one of `stamp`. OSError."""
        stat = os.stat(self.path)
        if (stat.st_size, stat.st_mtime_ns) == self.stamp:
            width = self.dtype.itemsize
            file = opened(self.path, *self.stamp)  # held, so that no other thread closes it
            data = os.pread(file.fileno(), n * width, self.offset + first * width)
            if len(data) == n * width:
                return np.frombuffer(data, self.dtype), stat.st_size
        return None, stat.st_size


def disk_error_in(error: OSError | UserError) -> OSError | None:
    """The disk's own error, which may be why Shard() raised; that a file is not there is none."""
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        return cause
    return None


class Sums:
    """Holds the bytes of prepared shards against the sha256 in their manifest.json, once, beside
    training.

    One rank does it for all, in a thread that takes a quarter of one core at most: a disk or a copy
    that has lost bytes leaves a shard of the right size, and its tokens would be trained on. `log`
    (out_dir/verified.jsonl) gets a line for each good shard: one that has the same path, size and
    time when the run is resumed is not read again. `error` is what a bad one is called, and
    Loader.next() raises it. Copies on other hosts: prepare_data.py --verify."""

    CORE_SHARE = 0.25

    def __init__(self, sources: list[Source], log: str):
        self.log = log
        self.error: UserError | None = None
        self.ended = False
        self.wanted: dict[str, tuple[Shard, str]] = {}
        for source in sources:
            for shard, want in zip(source.shards, source.sums):
                if want:
                    self.wanted[shard.path] = (shard, want)
        self.thread = threading.Thread(target=self.verify, name="sums", daemon=True)
        self.thread.start()

    def verify(self) -> None:
        known = set()
        with contextlib.suppress(OSError, ValueError), open(self.log, encoding="utf-8") as file:
            known = {line.strip() for line in file}
        for path, (shard, want) in self.wanted.items():
            row = {"sha256": want, "stamp": list(shard.stamp), "shard": os.path.abspath(path)}
            line = json.dumps(row)
            if line in known:
                continue
            try:
                found = sha256(path, self.CORE_SHARE, lambda: self.ended)
                replaced = os.stat(path).st_mtime_ns != shard.stamp[1]
            except OSError:  # Shard.read says what is to be said
                continue
            if self.ended:
                return
            if found == want:
                with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            elif not replaced:
                self.error = UserError("E111", f"shard {path}: {DAMAGED}")
                return

    def end(self) -> None:
        self.ended = True
        self.thread.join(1)


def bare_shards(path: str) -> list[str]:
    """The shards in a folder without a manifest, sorted; `path` may be one file too. E110: none."""
    if os.path.exists(os.path.join(path, "progress.json")):
        again = "start its prepare_data.py command again, it will go on"
        raise UserError("E110", f"{path} is not finished: {again}")
    files = [path]
    if not os.path.isfile(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
    no_shards = (".docs.npy", ".mask.npy", "token_bytes.npy")
    shards = [file for file in files if file.endswith(".npy") and not file.endswith(no_shards)]
    if not shards:
        shards = [file for file in files if file.endswith(".bin")]  # Shard says what they are
    if shards:
        return shards
    if holds_text(path):
        name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
        make = f"python prepare_data.py {path} --out data/{name} --tokenizer bpe:8192"
        raise UserError("E110", f"{path} is text, not tokens: {make}, then data_dir: data/{name}")
    out = "data/NAME" if files else path
    make = f"Make it: python prepare_data.py SOURCE --out {out} --tokenizer bpe:8192"
    raise UserError("E110", f"no manifest.json and no .npy shards in {path}. {make}")


def holds_text(path: str) -> bool:
    """Whether it is a text file, or a folder that has one in it."""
    endings = tuple(ENDINGS)
    if os.path.isfile(path):
        return path.lower().endswith(endings)
    for _, _, names in itertools.islice(os.walk(path), FOLDERS_LOOKED_INTO):
        if any(name.lower().endswith(endings) for name in names):
            return True
    return False


class Source:
    """One split ('train' or 'val') of the dataset in folder `path` as windows of seq_len + 1
    tokens at stride seq_len over all its shards, whatever their sizes. Only the last partial
    window is unused; nothing is padded. In a folder without manifest.json the val_* files are the
    val split; where there are none, the last `val_fraction` of the windows is. Raises E110, E111,
    E112, and E114 for a training split without one window."""

    def __init__(self, path: str, split: str, seq_len: int, val_fraction: float = 0.0):
        self.path = path
        self.split = split
        self.seq_len = seq_len
        self.vocab_size: int | None = None  # see check_vocab
        # of a manifest
        self.manifest: dict | None = None
        self.fingerprint = ""
        self.dtype: np.dtype | None = None
        self.max_id: int | None = None
        self.sums: list[str | None] = []
        self.shards: list[Shard] = []
        file = os.path.join(path, "manifest.json")
        self.bare = not os.path.exists(file)
        held_out = False
        if self.bare:
            held_out = self.open_bare()
        else:
            try:
                files, lengths = self.read_manifest(file)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                text = f"{file} is damaged: {type(error).__name__} {error}"
                raise UserError("E111", text) from None
            self.shards = [Shard(f, tokens, self.dtype) for f, tokens in zip(files, lengths)]
        if self.bare:  # val_fraction moves the end of train, and so the whole order
            facts = []
            for shard in self.shards:
                name = os.path.basename(shard.path)
                facts.append([name, shard.stamp[0], shard.dtype.str, shard.offset])
            facts = json.dumps([facts, held_out and val_fraction])
            self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        # where each shard starts in the virtual array of all, and its end
        self.starts = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]
        # this split is tokens [first, end) of the array
        self.first = 0
        end = self.starts[-1]
        if held_out:
            self.first, end = self.split_windows(end, val_fraction)
        self.tokens = end - self.first
        self.windows = max(self.tokens - 1, 0) // seq_len
        self.unused = self.tokens - self.windows * seq_len
        if self.windows:
            self.unused -= 1  # the last target is no input
        if split == "train" and not self.windows:
            need = f"a row of max_seq_len {seq_len} needs {seq_len + 1}"
            raise UserError("E114", f"{path}: {self.tokens} tokens, {need}")

    def open_bare(self) -> bool:
        """Shards of a folder without manifest.json. True where both splits are parts of the same
        shards."""
        files = bare_shards(self.path)
        val = [file for file in files if os.path.basename(file).startswith("val_")]
        if val:
            files = val if self.split == "val" else sorted(set(files) - set(val))
        for file in files:
            self.shards.append(Shard(file, None, self.dtype))
            self.dtype = self.shards[0].dtype  # a dataset has one
        return not val

    def read_manifest(self, file: str) -> tuple[list[str], list[int]]:
        """Paths and tokens of the split's shards. E111."""
        self.manifest = read_json(file, "E111")
        self.fingerprint = self.manifest["fingerprint"]
        self.dtype = np.dtype(self.manifest["dtype"])
        shards = self.manifest["splits"].get(self.split, {}).get("shards", [])
        self.max_id = max((shard["max_id"] for shard in shards), default=None)
        self.sums = [shard.get("sha256") for shard in shards]
        files = [os.path.join(self.path, shard["file"]) for shard in shards]
        return files, [shard["tokens"] for shard in shards]

    def split_windows(self, end: int, val_fraction: float) -> tuple[int, int]:
        """[first, end) of this split in an array of `end` tokens whose last windows are held
        out."""
        windows = max(end - 1, 0) // self.seq_len
        n_val = 0
        if val_fraction and windows:
            n_val = min(windows - 1, max(1, round(windows * val_fraction)))
        # train's last target and val's first input: no target is in both
        border = (windows - n_val) * self.seq_len
        if self.split == "val":
            return border, end
        return 0, border + 1 if n_val else end

    def window(self, i: int) -> np.ndarray:
        """Window i: int64 (T+1,); [:-1] is the input, [1:] the target. E111 if a shard changed or
        holds an id that it cannot, E113 as check_vocab."""
        assert 0 <= i < self.windows, (i, self.windows)
        at = self.first + i * self.seq_len
        end = at + self.seq_len + 1
        first_shard = bisect_right(self.starts, at) - 1
        k = first_shard
        parts = []
        while at < end:
            stop = min(end, self.starts[k + 1])  # a shard may hold no token at all
            parts.append(self.shards[k].read(at - self.starts[k], stop - at))
            at = stop
            k += 1
        window = np.concatenate(parts, dtype=np.int64)
        largest = int(window.max())
        if self.max_id is None and self.vocab_size:
            self.check_vocab(self.vocab_size, largest)
        elif self.max_id is not None and largest > self.max_id:  # an embedding has no row for it
            names = " or ".join(shard.path for shard in self.shards[first_shard:k])
            text = f"token id {largest}, in manifest.json {self.max_id} is the largest"
            raise UserError("E111", f"shard {names} is damaged: it holds {text}; copy it anew")
        return window

    def check_vocab(self, vocab_size: int, largest: int | None = None) -> None:
        """E113 if an id is vocab_size or more: now, by the manifest; without one from now on, in
        each window read."""
        self.vocab_size = vocab_size
        if largest is None:
            largest = self.max_id
        if largest is not None and largest >= vocab_size:
            text = f"{self.path} holds token id {largest}, the model's vocab_size is {vocab_size}"
            raise UserError("E113", f"{text}: the tokenizer of the data and the model do not match")


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


def dummy_batch(rows: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), (rows, T) each, without a valid target: for a rank that cannot read its rows."""
    shape = (rows, T)
    return np.zeros(shape, np.int64), np.full(shape, -1, np.int64)


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

    def batch(self, first_row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows [first_row, first_row + count): int64 (count, T) each. Any
        thread may call it."""
        x, y = np.empty((2, count, next(iter(self.sources.values())).seq_len), np.int64)
        for r in range(count):
            name, i, _ = self.locate(first_row + r)
            window = self.sources[name].window(i)
            x[r], y[r] = window[:-1], window[1:]
        return x, y

    def start(self, cursor: int, index: int, count: int, micro: int, accum: int) -> None:
        """Read from `cursor` on as reader `index` of `count`, dropping what was read ahead: this is
        seek too. Micro-step a of step s reads rows
        cursor + s*count*micro*accum + (a*count + index)*micro + [0, micro)."""
        self.close()
        # s*accum + a just counts micro-steps: accum has no influence
        self._rows = itertools.count(cursor + index * micro, count * micro)
        self._micro = micro
        self._pool = ThreadPoolExecutor(1, "loader")

    def next(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(first row, inputs, targets) of the next micro-batch; int64 (micro, T) each. What went
        wrong in the thread is raised here, and again until start(): no row is passed over. E111
        also once a sum is found wrong."""
        if self.sums and self.sums.error:
            raise self.sums.error
        for row in itertools.islice(self._rows, MICRO_BATCHES_AHEAD - len(self._ahead)):
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
