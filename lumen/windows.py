"""Shards to windows: a folder of .npy token shards becomes rows of T inputs and T targets, with the
masks and the documents that lie beside the shards.

A target that does not count is -1: where the mask says so, or, with a document mask, where it
begins another document than its input. Which row comes when is lumen/loader.py's.
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
import shlex
import threading
import time
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from lumen.errors import UserError
from lumen.files import read_json, sha256
from lumen.inputs import kind_of

RETRY_WAITS_SECONDS = (0.3, 1.0)  # before the second and the third try to read a shard
# and before two more where the disk itself fails (EIO, ESTALE, ...): network disks come back
DISK_RETRY_WAITS_SECONDS = (3.0, 5.0)
FOLDERS_LOOKED_INTO = 1000  # for text where tokens were expected
DAMAGED = (
    "its bytes are not those that were prepared (another sha256 than in manifest.json): "
    "copy it anew"
)


class Batch(NamedTuple):
    """Rows of T positions, as the model takes them."""

    row: int  # number of the first
    x: np.ndarray  # inputs, int64 (rows, T)
    y: np.ndarray  # targets, the same one token further; below 0: none
    # the document of each position, int32 (rows, T), numbered within its row from 0; None: no mask
    docs: np.ndarray | None = None
    # of pairs (x, y, docs are (2 rows, T) then): the reference's log-probabilities of each row's
    # pairs, float32 (rows, most, 2); NaN: no pair at this place
    reference: np.ndarray | None = None


def dummy_batch(row: int, rows: int, T: int, sources=()) -> Batch:
    """One without a valid target, to be filled with rows of these sources; also for a rank that
    cannot read its own."""
    sides = max((source.sides for source in sources), default=1)
    shape = (rows * sides, T)
    docs = reference = None
    if any(source.document_mask for source in sources):
        docs = np.zeros(shape, np.int32)  # a row of a source without one is one document
    if sides == 2:
        most = max(source.most for source in sources)
        reference = np.full((rows, most, 2), np.nan, np.float32)
    return Batch(row, np.zeros(shape, np.int64), np.full(shape, -1, np.int64), docs, reference)


def fill_row(batch: Batch, r: int, source: Source, number: int) -> None:
    """Row `number` of a source becomes data row r of a batch. Errors as of Source.row."""
    x, y, docs, *reference = source.row(number)
    at = slice(r * source.sides, (r + 1) * source.sides)
    batch.x[at], batch.y[at] = x, y
    if docs is not None:
        batch.docs[at] = docs
    for pairs in reference:
        batch.reference[r, : len(pairs)] = pairs


# Thousands of shards would meet the limit of open files; whoever uses one last closes it. Size and
# mtime are part of the key: a file that changed is opened anew.
@functools.lru_cache(maxsize=64)
def opened(path: str, size: int, mtime: int):
    return open(path, "rb", buffering=0)


class Shard:
    """One .npy file of token ids, 1-D, held against `tokens` and `dtype` where they are known.
    E111: missing, damaged, changed; E112: no shard of ours, or another dtype. `unit` is what it
    holds; `tokens` counts those."""

    def __init__(
        self,
        path: str,
        tokens: int | None = None,
        dtype: np.dtype | None = None,
        unit: str = "tokens",
    ):
        self.path = path
        self.unit = unit
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
        text = f"{path}: expected {self.tokens} {unit} of {dtype} in {size} bytes, {found}"
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
                    self.stamp = Shard(self.path, self.tokens, self.dtype, self.unit).stamp
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


def beside(shard: Shard, path: str, unit: str, n: int | None = None) -> Shard:
    """The file of a shard's mask (uint8) or of its documents (uint64). E111: it cannot be used."""
    dtype = np.dtype("u1") if unit == "mask" else np.dtype("<u8")
    try:
        return Shard(path, n, dtype, unit)
    except UserError as error:
        why = error.text.partition(". To convert")[0].partition("; np.save")[0]
        raise UserError("E111", f"{why}; it belongs to {shard.path}") from None


@functools.lru_cache(maxsize=64)  # a few MB each; of more shards the page cache serves
def documents_of(file: Shard, tokens: int) -> np.ndarray:
    """Where the documents of a shard of so many tokens begin, ascending, and at last its length.
    E111: damaged."""
    starts = file.read(0, file.tokens).astype(np.int64)
    if not len(starts) or starts[-1] != tokens or (np.diff(starts, prepend=0) < 0).any():
        text = f"{file.path} is damaged: it should ascend to {tokens}, the tokens of its shard"
        raise UserError("E111", text)
    return starts


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
            for shard, want in source.files:
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
    if os.path.isfile(path):
        return bool(kind_of(path))
    for _, _, names in itertools.islice(os.walk(path), FOLDERS_LOOKED_INTO):
        if any(kind_of(name) for name in names):
            return True
    return False


def anew(path: str, manifest: dict | None, seq_len: int | None, tokenizer=None) -> str:
    """The command that prepares the same sources beside `path`, for rows of seq_len and by another
    tokenizer; None: as they are there."""
    words = ["python", "prepare_data.py", *sources_of(manifest or {})]
    words += ["--out", f"{str(path).rstrip('/')}-anew"]
    words += ["--tokenizer", str(tokenizer or os.path.join(path, "tokenizer.json"))]
    if manifest and manifest.get("kind", "text") != "text":
        words += ["--seq_len", str(seq_len or manifest.get("rows", {}).get("length", 513) - 1)]
    return f"{shlex.join(words)} (and the other options it was made with)"


def sources_of(manifest: dict) -> list[str]:
    """As they were typed, as far as a manifest can say: it has their names, and their files."""
    names = manifest.get("settings", {}).get("sources") or ["SOURCE"]
    found = dict(enumerate(names))
    for number, _, _, name, path, *_ in manifest.get("provenance", {}).get("inputs", []):
        if number in found and name.startswith(found[number]):
            typed = path.removesuffix(name[len(found[number]) :])
            if os.path.basename(typed) == found[number]:  # else a name like stdlib
                found[number] = typed
    return list(found.values())


class Source:
    """One split ('train' or 'val') of the dataset in folder `path` as rows of seq_len + 1 tokens.

    Of text they are windows at stride seq_len over all its shards, whatever their sizes: only the
    last partial window is unused, and nothing is padded. Conversations were packed into rows when
    they were prepared. In a folder without manifest.json the val_* files are the val split; where
    there are none, the last `val_fraction` of the windows is; NAME.mask.npy and NAME.docs.npy
    beside NAME.npy are its mask and documents. document_mask: None is true of conversations.

    Raises E110, E111, E112, E114 for a training split without one window, E123 and E124 for rows
    of another length or kind, E002 for a document mask where nobody knows the documents.
    """

    sides = 1  # rows of the model that a row is; lumen.pairs.PairSource has 2

    def __init__(
        self,
        path: str,
        split: str,
        seq_len: int,
        val_fraction: float = 0.0,
        document_mask: bool | None = False,
    ):
        self.path = path
        self.split = split
        self.seq_len = seq_len
        self.vocab_size: int | None = None  # see check_vocab
        # of a manifest
        self.manifest: dict | None = None
        self.fingerprint = ""
        self.dtype: np.dtype | None = None
        self.max_id: int | None = None
        self.kind = "text"
        self.shards: list[Shard] = []
        self.masks: list[Shard] = []  # one a shard, or none at all
        self.docs: list[Shard] = []  # the same, where there is a document mask
        self.files: list[tuple[Shard, str | None]] = []  # all of them, with sha256 where known
        file = os.path.join(path, "manifest.json")
        self.bare = not os.path.exists(file)
        if self.bare:
            held_out = self.open_bare(bool(document_mask))
        else:
            held_out = False
            try:
                entries = self.read_manifest(file)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                text = f"{file} is damaged: {type(error).__name__} {error}"
                raise UserError("E111", text) from None
            if document_mask is None:
                document_mask = self.kind == "chat"
            self.open_prepared(entries, document_mask)
        self.document_mask = bool(document_mask)
        if self.bare:  # val_fraction moves the end of train, and so the whole order
            facts = []
            for shard in (*self.shards, *self.masks, *self.docs):
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
        self.lay_rows()
        if split == "train" and not self.windows:
            need = f"a row of max_seq_len {seq_len} needs {seq_len + 1}"
            raise UserError("E114", f"{path}: {self.tokens} tokens, {need}")

    def lay_rows(self) -> None:
        """What is which row."""
        seq_len = self.seq_len
        # from one row to the next
        self.stride = seq_len + 1 if self.kind == "chat" else seq_len
        self.windows = max(0, (self.tokens - (seq_len + 1)) // self.stride + 1)
        self.unused = self.tokens - self.windows * self.stride
        if self.windows and self.kind != "chat":
            self.unused -= 1  # the last target is no input

    def open_bare(self, document_mask: bool) -> bool:
        """Shards of a folder without manifest.json. True where both splits are parts of the same
        shards."""
        files = bare_shards(self.path)
        val = [file for file in files if os.path.basename(file).startswith("val_")]
        if val:
            files = val if self.split == "val" else sorted(set(files) - set(val))
        masked = any(os.path.exists(f"{file[:-4]}.mask.npy") for file in files)
        for file in files:
            shard = Shard(file, None, self.dtype)
            self.shards.append(shard)
            self.dtype = self.shards[0].dtype  # a dataset has one
            if masked:
                self.masks.append(beside(shard, f"{file[:-4]}.mask.npy", "mask", shard.tokens))
            if not document_mask:
                continue
            docs = f"{file[:-4]}.docs.npy"
            if not os.path.exists(docs):
                text = f"{file} has no {os.path.basename(docs)} beside it (uint64: where each"
                text += " document begins, then the shard's length), so nobody knows its documents"
                raise UserError("E002", f"document_mask: true: {text}; write them, or set false")
            self.docs.append(beside(shard, docs, "documents"))
        self.files = [(shard, None) for shard in self.shards]
        return not val

    def read_manifest(self, file: str) -> list[dict]:
        """The entries of the split's shards. E111, and E123 and E124 by its kind."""
        self.manifest = read_json(file, "E111")
        self.fingerprint = self.manifest["fingerprint"]
        self.dtype = np.dtype(self.manifest["dtype"])
        self.kind = self.manifest.get("kind", "text")
        self.check_kind()
        shards = self.manifest["splits"].get(self.split, {}).get("shards", [])
        self.max_id = max((shard["max_id"] for shard in shards), default=None)
        if self.kind == "chat":
            self.check_rows(self.manifest["rows"]["length"], shards)
        return shards

    def check_kind(self) -> None:
        """E124."""
        if self.kind == "pairs":
            text = f"{self.path} holds preference pairs, which are no rows to train on like text"
            raise UserError("E124", f"{text}: python finetune.py with method: dpo, or another")

    def check_rows(self, length: int, shards: list[dict]) -> None:
        if length != self.seq_len + 1:
            text = f"{self.path} was packed for rows of {length - 1} positions"
            text += f", model.max_seq_len is {self.seq_len}: set it to {length - 1}, or prepare the"
            command = anew(self.path, self.manifest, self.seq_len)
            raise UserError("E123", f"{text} data anew: {command}")
        for shard in shards:
            if shard["tokens"] % length:
                text = f"{shard['file']} has {shard['tokens']} tokens, no whole rows of {length}"
                raise ValueError(text)

    def open_prepared(self, entries: list[dict], document_mask: bool) -> None:
        """The files that a manifest names. E111."""
        for entry in entries:
            shard = Shard(os.path.join(self.path, entry["file"]), entry["tokens"], self.dtype)
            self.shards.append(shard)
            self.files.append((shard, entry.get("sha256")))
            others = []
            if self.kind != "text" or "mask_file" in entry:
                others.append(("mask", shard.tokens, self.masks))
            if document_mask:
                others.append(("docs", None, self.docs))
            for name, n, files in others:
                if f"{name}_file" not in entry:
                    text = f"names no {name}_file of {entry['file']}"
                    raise UserError("E111", f"{self.path}/manifest.json {text}")
                path = os.path.join(self.path, entry[f"{name}_file"])
                unit = "mask" if name == "mask" else "documents"
                files.append(beside(shard, path, unit, n))
                self.files.append((files[-1], entry.get(f"{name}_sha256")))
        if self.masks and len(self.masks) != len(self.shards):
            text = "names a mask_file of some shards and not of all"
            raise UserError("E111", f"{self.path}/manifest.json {text}")

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

    def spans(self, i: int) -> list[tuple[int, int, int]]:
        """(shard, its first token, how many) of the parts of window i."""
        assert 0 <= i < self.windows, (i, self.windows)
        at = self.first + i * self.stride
        return self.spans_of(at, at + self.seq_len + 1)

    def spans_of(self, at: int, end: int) -> list[tuple[int, int, int]]:
        """The same of tokens [at, end) of the array of all shards."""
        k = bisect_right(self.starts, at) - 1
        parts = []
        while at < end:
            stop = min(end, self.starts[k + 1])  # a shard may hold no token at all
            parts.append((k, at - self.starts[k], stop - at))
            at = stop
            k += 1
        return parts

    def window(self, i: int) -> np.ndarray:
        """The tokens of window i: int64 (T+1,). E111 if a shard changed or holds an id that it
        cannot, E113 as check_vocab."""
        spans = self.spans(i)
        parts = [self.shards[k].read(first, n) for k, first, n in spans]
        window = np.concatenate(parts, dtype=np.int64)
        self.check_ids(window, spans)
        return window

    def check_ids(self, ids: np.ndarray, spans: list[tuple[int, int, int]]) -> None:
        """Of these spans; an embedding has no row for a larger one. Errors as of window."""
        largest = int(ids.max())
        if self.max_id is None and self.vocab_size:
            self.check_vocab(self.vocab_size, largest)
        elif self.max_id is not None and largest > self.max_id:
            names = " or ".join(self.shards[k].path for k, _, _ in spans)
            text = f"token id {largest}, in manifest.json {self.max_id} is the largest"
            raise UserError("E111", f"shard {names} is damaged: it holds {text}; copy it anew")

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Row i: inputs and targets, int64 (T,) each, -1 where a target does not count; and with a
        document mask each input's document, int32 (T,), numbered from 0. Errors as of window."""
        window = self.window(i)
        x, y, docs = window[:-1], window[1:], None
        spans = self.spans(i)
        if self.masks:
            counts = np.concatenate([self.masks[k].read(first, n) for k, first, n in spans])
            y = np.where(counts[1:] > 0, y, -1)
        if self.document_mask:
            begins = self.begins(spans)
            docs = np.cumsum(begins[:-1], dtype=np.int32)
            y = np.where(begins[1:], -1, y)  # a document does not say how the next one begins
        return x, y, docs

    def begins(self, spans: list[tuple[int, int, int]]) -> np.ndarray:
        """Where a document begins that is not the window's first: bool (T+1,). What a window cuts
        off of a document is a document of its own."""
        begins = np.zeros(self.seq_len + 1, bool)
        at = 0
        for k, first, n in spans:
            starts = documents_of(self.docs[k], self.shards[k].tokens)
            low, high = np.searchsorted(starts, (first, first + n))
            begins[at - first + starts[low:high]] = True
            at += n
        begins[0] = False
        return begins

    def check_vocab(self, vocab_size: int, largest: int | None = None) -> None:
        """E113 if an id is vocab_size or more: now, by the manifest; without one from now on, in
        each window read."""
        self.vocab_size = vocab_size
        if largest is None:
            largest = self.max_id
        if largest is not None and largest >= vocab_size:
            text = f"{self.path} holds token id {largest}, the model's vocab_size is {vocab_size}"
            raise UserError("E113", f"{text}: the tokenizer of the data and the model do not match")
