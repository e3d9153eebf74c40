"""What flows from a source to a document: Input, Reading, Item, Row, Reject; the endings that are
read, and how much one row may be.

    Input       one file, or one generated source; kept in the manifest's provenance
    Reading     an input, where to begin in it, and how
    Item        what the parent process makes of it, cheaply, and sends to a worker
    Row         what the worker makes of an item: a text, a JSON object, a reject

Items and rows are pure functions of the text: no block size, no number of workers, no kill changes
them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

# of a name without .gz or .zst -> a key of readers.READERS
ENDINGS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_KINDS = ("text", "jsonl", "json", "csv")  # the others compress by themselves
# Bytes: a text file of more than two pieces is read in pieces, cut at line ends; the last is
# longer.
PIECE = 8 << 20
# Bytes, unpacked, that are held at once: a line of a .jsonl, a record of a .csv, a value of a
# .json. More is E101, or E122 where it comes out of a compressed file. A document has no limit.
LONGEST = 64 << 20
# A compressed file may unpack to LONGEST, and beyond that to so many times its size: text makes 3
# to 20, and 1,032 is the most that deflate can do.
RATIO = 250
SHAPES = ("text", "chat", "pairs")
# folders of the running Python's library that are no text of its own: tests, tables, other people's
STDLIB_PASSED_OVER = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class Input(NamedTuple):
    """One file, or one generated source. The manifest's provenance holds these as lists, in this
    order."""

    source: int  # index into the sources, val_sources counted on
    split: str  # "val", "train", or "hash": decided document by document
    kind: str  # a key of READERS; or tokenizer: not read, but watched for changes
    name: str  # without what differs from machine to machine
    path: str  # as the user wrote it
    size: int = 0  # bytes
    mtime: int = 0  # ns
    sha256: str = ""
    key: str = ""  # of a text file of several pieces, see document_key
    documents: int = 0  # of a synthetic source
    field: str = ""  # the column or field of the text, or of the messages; "": found row by row
    shape: str = "text"  # one of SHAPES; "any": rows as they are, for sources.detect
    revision: str = ""  # of hf: what its files or its commit were

    @property
    def long(self) -> bool:
        """Whether it is one document that is read in pieces; of a packed file only a guess can be
        made."""
        most = PIECE // 4 if codec_of(self.path) else 2 * PIECE
        return self.kind == "text" and self.size > most

    def measured(self) -> Input:
        """With size and time as they are; as it was where there is no file: reading it will
        tell."""
        if not os.path.isfile(self.path):
            return self
        stat = os.stat(self.path)
        return self._replace(size=stat.st_size, mtime=stat.st_mtime_ns)


def is_packed(given: Input) -> bool:
    """Whether it holds more bytes of rows than its size says."""
    return given.kind in ("parquet", "hf") or bool(codec_of(given.path))


def stored_input(values: list) -> Input:
    """An Input from a manifest. Before `documents` had a place of its own, `mtime` held that
    number."""
    stored = Input(*values)
    if stored.kind == "synthetic" and not stored.documents:
        stored = stored._replace(documents=stored.mtime, mtime=0)
    return stored


class Reading(NamedTuple):
    """What a reader gets: an input, where to begin, and how."""

    index: int
    given: Input
    offset: int = 0  # of an Item or a Row that this input gave before
    line: int = 1
    block: int = 1 << 20  # bytes of an item, about; without influence on rows
    seed: int = 0  # of synthetic text


class Item(NamedTuple):
    """What is sent to a worker."""

    index: int  # of its input
    # text: a file; piece, last: of a long one; jsonl: whole lines; long, long packed: the beginning
    # of a line that is too long; csv: the header line and whole records; table: rows as Arrow's IPC
    # stream; row: a JSON value; else an error code: the rest of the file is rejected
    kind: str
    # of its first byte, unpacked; for row and table their number. A resumed run starts from there
    offset: int
    line: int  # physical line there, from 1; for table the number of the row, from 1
    data: bytes  # for a code the reason
    field: str = ""  # as in Input
    shape: str = "text"


class Reject(NamedTuple):
    reason: str
    excerpt: str = ""
    whole_file: bool = False  # the rest of it is lost, however many rows it had


class Row(NamedTuple):
    offset: int  # bytes into the unpacked file; of a row of a .json or a table its number
    line: int
    # None: good; "blank": lines without anything, before this place; else an error
    code: str | None
    value: str | dict | int | Reject  # the text, or the object of chat and pairs; how many; why


class Unreadable(Exception):
    """Why the rest of an input cannot be read; becomes an Item with the code."""

    def __init__(self, code: str, reason: str, offset: int | None = None, line: int = 1):
        super().__init__(code, reason)
        self.code, self.reason = code, reason
        # None: where the reading began
        self.place = None if offset is None else (offset, line)


def codec_of(path: str) -> str:
    return CODECS.get(os.path.splitext(path)[1].lower(), "")


def kind_of(path: str) -> str:
    """A key of READERS by the ending, or "": text.jsonl.gz is jsonl."""
    name, ending = os.path.splitext(path)
    if ending.lower() not in CODECS:
        return ENDINGS.get(ending.lower(), "")
    kind = ENDINGS.get(os.path.splitext(name)[1].lower(), "")
    return kind if kind in COMPRESSED_KINDS else ""
