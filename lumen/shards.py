"""Encoded documents to the files of a dataset: shards, rejected.jsonl, and the journal from which a
killed preparation goes on.

    rows, in their order  ->  Output.take: bad? a duplicate? which split?
                              ->  Shards.add  ->  train_00000.npy
                              ->  rejected.jsonl, counts
    a shard closes between two documents  ->  Output.journal
                              ->  seen.bin, pending_N.npz, and at last progress.json

What a killed run wrote after its last journal is written over, with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from lumen.clean import cut_place, cut_text
from lumen.errors import UserError
from lumen.files import replacing, sha256
from lumen.sources import Input, Reject, Row
from lumen.tokenizer import Tokenizer

DOCUMENTS_LISTED = 5  # of each code, in report.json and on the console
DUPLICATES_LISTED = 1000  # in rejected.jsonl; all are counted
SMALL_RESERVE_TOKENS = 4000  # below, the document in reserve is not cut for validation

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
    """Goes on after a file's first `length` bytes, whatever a killed run left behind them. E119."""
    try:
        with open(path, "ab") as file:
            file.truncate(length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError("E119", f"{path}: {error.strerror or error}") from None


def write_dataset_json(path: str, value) -> None:
    """files.write_json for people: letters as they are, a line end at the end, E119. The bytes are
    part of the promise."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write(to_utf8(text))


# ---------------------------------------------------------------- documents


class Document(NamedTuple):
    """A document, or a piece of a long file."""

    # blake2b-16 of the cleaned, stripped text: equal documents have equal keys; empty: a piece
    key: bytes
    share: float  # in [0, 1), from key and seed: below val_fraction means val
    ids: np.ndarray  # (n,), of all parts; with the last of them the end-of-text id
    ends: list  # of the parts, in ids
    size: int  # bytes of text
    cleaned: bool  # cleaning changed it
    last: bool = True  # the document ends here


def share_of(key: bytes, seed: int) -> float:
    salt = seed.to_bytes(8, "little", signed=True)
    draw = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
    return int.from_bytes(draw, "little") / 2**64


def encode_parts(
    text: str, tokenizer: Tokenizer, limit: int, dtype, last=True
) -> tuple[np.ndarray, list]:
    """The ids of all parts of a text, (n,), and where each part ends."""
    arrays = [tokenizer.encode(part) for part in cut_text(text, limit)]
    if last:
        arrays[-1] = np.append(arrays[-1], np.uint32(tokenizer.eot_id))
    ends = list(itertools.accumulate(len(array) for array in arrays))
    return np.concatenate(arrays).astype(dtype), ends


# ---------------------------------------------------------------- shards, and the journal


class Shards:
    """The shards of one split: those that are closed, and the one that is being filled."""

    def __init__(self, out: str, split: str, target: int):
        self.out = out
        self.split = split
        self.target = target  # tokens
        self.closed: list[dict] = []  # as in the manifest
        self.bytes_text = 0
        self.begin()

    def begin(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.starts: list[int] = []  # of documents
        self.size = 0  # tokens

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.closed) + self.size

    def full(self, length: int) -> bool:
        return self.size > 0 and self.size + length > self.target

    def add(self, ids: np.ndarray, begins: bool) -> None:
        """One part of a document; it lies in one shard unless it is longer than a shard."""
        if begins:
            self.starts.append(self.size)
        for start in range(0, len(ids), self.target):
            if start:
                self.close()
            self.arrays.append(ids[start : start + self.target])
            self.size += len(self.arrays[-1])

    def close(self) -> None:
        if not self.size:
            return
        name = f"{self.split}_{len(self.closed):05d}"
        path = os.path.join(self.out, f"{name}.npy")
        ids = np.concatenate(self.arrays)
        with new_file(path) as file:
            np.save(file, ids)
        with new_file(os.path.join(self.out, f"{name}.docs.npy")) as file:
            np.save(file, np.array([*self.starts, self.size], dtype="<u8"))
        shard = {
            "file": f"{name}.npy",
            "docs_file": f"{name}.docs.npy",
            "tokens": self.size,
            "docs": len(self.starts),
            "min_id": int(ids.min()),
            "max_id": int(ids.max()),
            "bytes": os.path.getsize(path),
            "sha256": sha256(path),
        }
        self.closed.append(shard)
        self.begin()


class Output:
    """All that the parent decides, in the order of the rows, and the journal from which a killed
    run goes on."""

    def __init__(
        self, out: str, header: dict, inputs: list[Input], strict: bool, tokenizer: Tokenizer
    ):
        self.out = out
        self.header = header  # of progress.json: settings, provenance
        self.settings = header["settings"]
        self.inputs = inputs
        self.strict = strict
        self.tokenizer = tokenizer
        target = self.settings["shard_tokens"]
        self.splits = {split: Shards(out, split, target) for split in ("train", "val")}
        # input, offset and line of the row at hand; None: after the last
        self.position = (0, 0, 1)
        # of the long file that is being written: its split, or "dropped"; whether it was cleaned
        self.open = []
        # the document with the smallest share so far: it waits until the end (see settle)
        self.reserve: Document | None = None
        self.tail = self.find_tail()
        self.seen: set[bytes] = set()  # keys of all documents
        self.new_keys: list[bytes] = []  # of those, what is not in seen.bin
        self.rejects: list[str] = []  # lines that are not yet in rejected.jsonl
        self.rejected_bytes = 0
        self.journals = 0
        self.counts = Counter()  # by kind or code
        self.rows = Counter()  # by source
        self.kept = Counter()  # documents by source
        self.examples: dict[str, list[str]] = {}  # by code
        self.lost: list[str] = []  # paths of whole files

    def find_tail(self) -> int | None:
        """Long files do not wait in reserve. Where there is nothing else, and all are drawn for one
        side, this one gives its tail to val: that with the draw nearest to the other side."""
        fraction, seed = self.settings["val_fraction"], self.settings["seed"]
        drawn = []
        for given in self.inputs:
            if given.split == "hash" and (given.key or not given.long):
                drawn.append(given)
        if not fraction or not drawn or not all(given.long for given in drawn):
            return None
        shares = [share_of(bytes.fromhex(given.key), seed) for given in drawn]
        if min(shares) >= fraction:
            nearest = min(shares)
        elif max(shares) < fraction:
            nearest = max(shares)
        else:
            return None
        return self.inputs.index(drawn[shares.index(nearest)])

    # ---- rows

    def take(self, index: int, row: Row) -> None:
        """One row. Nothing is counted before it is written, so that a journal made meanwhile lacks
        the whole row."""
        given = self.inputs[index]
        self.position = (index, row.offset, row.line)
        if row.code == "blank":
            self.counts["blank_lines"] += row.value
            return
        if row.code is None and not row.value.key:
            self.take_piece(index, row.line, row.value)
            return
        if row.code is None and row.value.key in self.seen:
            row = row._replace(code="E107", value=Reject("the same text as an earlier document"))
        if row.code:
            self.reject(given, row)
        else:
            self.take_document(given, row.value)
        self.counts["rows"] += 1
        self.rows[str(given.source)] += 1

    def take_document(self, given: Input, document: Document) -> None:
        if given.split != "hash":
            self.write(document, given.split)
        elif self.reserve is None or document.share < self.reserve.share:
            if self.reserve:
                self.write(self.reserve, self.drawn(self.reserve.share))
            self.reserve = document
        else:
            self.write(document, self.drawn(document.share))
        self.remember(document.key)
        parts = len(document.ends)
        cleaned = int(document.cleaned)
        self.counts.update(kept=1, cleaned=cleaned, cut=int(parts > 1), parts=parts)
        self.kept[str(given.source)] += 1

    def take_piece(self, index: int, line: int, piece: Document) -> None:
        """A piece of a long file. The file is one row: one draw, one look for its like, one end."""
        given = self.inputs[index]
        key = bytes.fromhex(given.key)
        source = str(given.source)
        first = not self.open
        if first:
            split = self.split_of_long_file(index, key)
            cleaned = False
        else:
            split, cleaned = self.open
        if split != "dropped":
            self.write_piece(index, piece, split, first)
            if first:
                self.remember(key)
                self.kept[source] += 1
            newly_cleaned = int(piece.cleaned and not cleaned)
            parts = len(piece.ends)
            self.counts.update(kept=int(first), cleaned=newly_cleaned, cut=int(first), parts=parts)
        elif first:
            reject = Reject("the same text as an earlier document")
            self.reject(given, Row(0, line, "E107", reject))
        self.counts["rows"] += int(first)
        self.rows[source] += int(first)
        self.open = [] if piece.last else [split, cleaned or piece.cleaned]

    def split_of_long_file(self, index: int, key: bytes) -> str:
        if key in self.seen:
            return "dropped"
        if self.inputs[index].split != "hash":
            return self.inputs[index].split
        if index == self.tail:
            return "train"
        return self.drawn(share_of(key, self.settings["seed"]))

    def write_piece(self, index: int, piece: Document, split: str, first: bool) -> None:
        if piece.last and index == self.tail:
            total = sum(given.size for given in self.inputs if given.split == "hash")
            share = self.settings["val_fraction"] * total / max(piece.size, 1)
            self.hold_out(piece, share, begins=False)
        else:
            self.write(piece, split, first)

    def drawn(self, share: float) -> str:
        return "val" if share < self.settings["val_fraction"] else "train"

    def remember(self, key: bytes) -> None:
        self.seen.add(key)
        self.new_keys.append(key)

    def reject(self, given: Input, row: Row) -> None:
        code, reject = row.code, row.value
        said = f"{given.path}:{row.line}: {reject.reason}"
        if reject.excerpt:
            said += f": {reject.excerpt[:100]}"
        # an empty __init__.py is no mistake
        harmless = code == "E107" or (code == "E104" and given.kind == "text")
        if self.strict and not harmless:
            raise UserError(code, said)
        self.counts.update({code: 1, "bad": int(not harmless)})
        examples = self.examples.setdefault(code, [])
        if len(examples) < DOCUMENTS_LISTED:
            examples.append(said)
        if code != "E107" or self.counts[code] <= DUPLICATES_LISTED:
            entry = {
                "file": given.path,
                "line": row.line,
                "byte_offset": row.offset,
                "code": code,
                "reason": reject.reason,
                "excerpt": reject.excerpt,
            }
            self.rejects.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if reject.whole_file and (given.kind != "text" or given.long):
            self.lost.append(given.path)

    # ---- shards

    def write(self, document: Document, split: str, begins=True, journal=True) -> None:
        shards = self.splits[split]
        start = 0
        for end in document.ends:
            if shards.full(end - start):
                shards.close()
                if start == 0 and self.position and journal:
                    self.journal()
            shards.add(document.ids[start:end], begins and start == 0)
            start = end
        shards.bytes_text += document.size

    def hold_out(self, document: Document, share: float, begins=True) -> None:
        """Gives about `share` of a document to val, its end, and the rest to train: two documents
        from now on."""
        text = self.tokenizer.decode(document.ids[:-1])
        tail = min(len(text), max(1, round(share * len(text))))
        cut = cut_place(text, max(0, len(text) - 2 * tail), len(text) - tail)
        if begins and not cut:  # a letter or two: nothing would be left to train on
            self.write(document, "train")
            return
        self.write(self.part_of(document, text[:cut]), "train", begins)
        self.write(self.part_of(document, text[cut:]), "val", True, journal=False)
        self.counts["tail_held_out"] = 1

    def part_of(self, document: Document, text: str) -> Document:
        limit = self.settings["max_doc_chars"]
        ids, ends = encode_parts(text, self.tokenizer, limit, document.ids.dtype)
        return document._replace(ids=ids, ends=ends, size=len(text.encode()))

    def settle(self) -> None:
        """Writes the reserve and the last shards. When no document but the reserve can be val, it
        is; a large one (in a corpus of few documents, or of one) gives only its tail, about as much
        as val_fraction asks for."""
        self.position = None
        train, val = self.splits["train"], self.splits["val"]
        if self.reserve:
            length = len(self.reserve.ids)
            share = self.settings["val_fraction"] * (train.tokens + length) / length
            small = share > 1 / 3 or length < SMALL_RESERVE_TOKENS
            if val.tokens or (train.tokens and small):
                self.write(self.reserve, "val")
            else:
                self.hold_out(self.reserve, share)
        train.close()
        val.close()
        self.write_rejects()

    # ---- the journal

    def write_rejects(self) -> None:
        data = to_utf8("".join(self.rejects))
        append_at(os.path.join(self.out, "rejected.jsonl"), self.rejected_bytes, data)
        self.rejects = []
        self.rejected_bytes += len(data)

    def pending_file(self, n: int) -> str:
        return os.path.join(self.out, f"pending_{n}.npz")

    def journal(self) -> None:
        """Keys, rejects, what is in no shard yet, and then, atomically, the progress.json that
        refers to them."""
        self.write_rejects()
        known = 16 * (len(self.seen) - len(self.new_keys))
        append_at(os.path.join(self.out, "seen.bin"), known, b"".join(self.new_keys))
        self.new_keys = []
        self.journals += 1
        state = {
            "position": self.position,
            "open": self.open,
            "seen": len(self.seen),
            "rejected_bytes": self.rejected_bytes,
            "journals": self.journals,
            "counts": self.counts,
            "rows": self.rows,
            "kept": self.kept,
            "examples": self.examples,
            "lost": self.lost,
            "splits": {},
            "reserve": None,
        }
        arrays = {}
        for split, shards in self.splits.items():
            arrays[split] = np.concatenate(shards.arrays) if shards.arrays else np.zeros(0)
            state["splits"][split] = [shards.closed, shards.bytes_text, shards.starts]
        if self.reserve:
            key, share, ids, ends, size, *_ = self.reserve
            arrays["reserve"] = ids
            state["reserve"] = [key.hex(), share, ends, size]
        with new_file(self.pending_file(self.journals)) as file:
            np.savez(file, **arrays)
        progress = self.header | {"state": state}
        write_dataset_json(os.path.join(self.out, "progress.json"), progress)
        with suppress(OSError):
            os.remove(self.pending_file(self.journals - 1))

    def resume(self, state: dict) -> None:
        self.position = tuple(state["position"])
        self.open = state["open"]
        self.rejected_bytes = state["rejected_bytes"]
        self.journals = state["journals"]
        self.counts = Counter(state["counts"])
        self.rows = Counter(state["rows"])
        self.kept = Counter(state["kept"])
        self.examples = state["examples"]
        self.lost = state["lost"]
        with open(os.path.join(self.out, "seen.bin"), "rb") as file:
            self.seen = {file.read(16) for _ in range(state["seen"])}
        with np.load(self.pending_file(self.journals), allow_pickle=False) as pending:
            for split, shards in self.splits.items():
                shards.closed, shards.bytes_text, shards.starts = state["splits"][split]
                shards.size = len(pending[split])
                shards.arrays = [pending[split]] if shards.size else []
            if state["reserve"]:
                key, share, ends, size = state["reserve"]
                key = bytes.fromhex(key)
                self.reserve = Document(key, share, pending["reserve"], ends, size, False)
