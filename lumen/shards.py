"""The shards of a dataset while they are filled: train_00000.npy, its *.docs.npy, and for
conversations its *.mask.npy. What goes into which is decided in lumen/output.py."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager

import numpy as np

from lumen import packing
from lumen.errors import UserError
from lumen.files import replacing, sha256

# ---------------------------------------------------------------- files


def to_utf8(text: str) -> bytes:
    """A file name that is no UTF-8 becomes a JSON escape, and comes back from it."""
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def new_file(path: str):
    """A binary file that appears whole or not at all. E119: disk full, no permission."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise UserError("E119", f"{path}: {error.strerror or error}") from None


def append_at(path: str, length: int, data: bytes) -> None:
    """Goes on after a file's first `length` bytes, whatever a killed run left behind them. E119;
    E111: it has fewer."""
    try:
        with open(path, "ab") as file:
            if file.tell() < length:  # truncate would fill it up with zeros
                text = f"{path}: {file.tell():,} bytes, {length:,} were written"
                raise UserError("E111", text)
            file.truncate(length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError("E119", f"{path}: {error.strerror or error}") from None


class Growing:
    """A file of lines. `size` is what a journal has to remember: a killed run may have written
    more, and a resumed one writes over that."""

    HELD = 16 << 20  # bytes

    def __init__(self, path: str):
        self.path = path
        self.size = 0  # bytes on the disk
        self.lines: list[bytes] = []
        self.held = 0

    def add(self, row: dict) -> None:
        line = to_utf8(json.dumps(row, ensure_ascii=False) + "\n")
        self.lines.append(line)
        self.held += len(line)
        if self.held >= self.HELD:
            self.flush()

    def flush(self) -> None:
        """E119."""
        data = b"".join(self.lines)
        append_at(self.path, self.size, data)
        self.size += len(data)
        self.lines, self.held = [], 0


def write_dataset_json(path: str, value) -> None:
    """files.write_json for people: letters as they are, a line end at the end, E119. The bytes are
    part of the promise."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write(to_utf8(text))


def write_keys(path: str, keys) -> None:
    """(n, 16) uint8, sorted."""
    with new_file(path) as file:
        np.save(file, np.frombuffer(b"".join(sorted(keys)), np.uint8).reshape(-1, 16))


def json_sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- shards


class Shards:
    """The shards of one split: those that are closed, and the one that is being filled.

    Conversations (`rows` is a manifest's block of that name) are held until their shard closes and
    then packed into rows; a pair of preferences is two documents, unpacked.
    """

    def __init__(
        self, out: str, split: str, target: int, rows: dict | None = None, pad_id: int = 0
    ):
        self.out = out
        self.split = split
        self.target = target  # tokens
        self.rows = rows
        self.pad_id = pad_id
        self.closed: list[dict] = []  # as in the manifest
        self.bytes_text = 0
        self.begin()

    def begin(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []  # of conversations: as long as the arrays
        self.starts: list[int] = []  # of documents
        self.size = 0  # tokens

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.closed) + self.size

    def full(self, length: int) -> bool:
        return self.size > 0 and self.size + length > self.target

    def add(self, ids: np.ndarray, begins: bool, mask: np.ndarray | None = None) -> None:
        """One part of a document; it lies in one shard unless it is longer than a shard."""
        if begins:
            self.starts.append(self.size)
        if mask is not None:
            self.masks.append(mask)
            self.arrays.append(ids)
            self.size += len(ids)
            return
        for start in range(0, len(ids), self.target):
            if start:
                self.close()
            self.arrays.append(ids[start : start + self.target])
            self.size += len(self.arrays[-1])

    def close(self) -> None:
        if not self.size:
            return
        ids = np.concatenate(self.arrays)
        starts = np.array(self.starts, dtype="<u8")
        mask = np.concatenate(self.masks) if self.masks else None
        if self.rows and self.rows["kind"] == "chat":
            ids, mask, starts = self.packed(ids, mask, starts)
        docs = np.append(starts, np.uint64(len(ids)))
        name = f"{self.split}_{len(self.closed):05d}"
        shard = {
            "file": f"{name}.npy",
            "tokens": len(ids),
            "docs": len(starts),
            "min_id": int(ids.min()),
            "max_id": int(ids.max()),
        }
        shard["sha256"], shard["bytes"] = self.write(f"{name}.npy", ids)
        shard["docs_file"] = f"{name}.docs.npy"
        shard["docs_sha256"], _ = self.write(f"{name}.docs.npy", docs)
        if mask is not None:
            shard["mask_file"] = f"{name}.mask.npy"
            shard["mask_sha256"], _ = self.write(f"{name}.mask.npy", mask)
            shard["targets"] = int(mask.sum())
            shard["padding"] = len(ids) - self.size
        self.closed.append(shard)
        self.begin()

    def packed(self, ids, mask, starts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of whole rows: conversations by best fit, then padding."""
        length = self.rows["length"]
        lengths = np.diff(starts, append=np.uint64(len(ids))).astype(int).tolist()
        cuts = starts[1:].astype(int)
        conversations = list(zip(np.split(ids, cuts), np.split(mask, cuts)))
        rows = packing.pack(lengths, length)
        return packing.layout_rows(conversations, rows, length, self.pad_id, ids.dtype)

    def write(self, name: str, array: np.ndarray) -> tuple[str, int]:
        """(sha256, bytes) of a new file."""
        path = os.path.join(self.out, name)
        with new_file(path) as file:
            np.save(file, array)
        return sha256(path), os.path.getsize(path)

    # ---- what is in no shard yet, for the journal

    def pending(self) -> dict[str, np.ndarray]:
        """Arrays by name: ids, and for conversations mask."""
        arrays = {self.split: np.concatenate(self.arrays) if self.arrays else np.zeros(0)}
        if self.masks:
            arrays[f"{self.split}_mask"] = np.concatenate(self.masks)
        return arrays

    def restore(self, state: list, pending) -> None:
        """From [closed, bytes_text, starts] and what `pending` gave."""
        self.closed, self.bytes_text, self.starts = state
        ids = pending[self.split]
        self.size = len(ids)
        self.arrays = [ids] if self.size else []
        if f"{self.split}_mask" in pending:
            self.masks = [pending[f"{self.split}_mask"]]
