"""Text to token shards: python prepare_data.py SOURCE... --out data/NAME --tokenizer bpe:8192

SOURCE is a file or folder of .txt .md .py (a file is a document), .jsonl (rows {"text": ...}) and .json (a list of such
rows, or rows one after the other), or `stdlib` (the running Python's own library, 11 MB, no download), or `synthetic:N`
(N generated documents, the same on every machine). What lies in a folder and is not read is said, a line for each kind.

out/ gets train_00000.npy ... val_00000.npy ... (1-D; every document ends with the end-of-text id and has no other,
however it was cut for the tokenizer or the workers), *.docs.npy (uint64), tokenizer.json, token_bytes.npy, report.json,
rejected.jsonl, and at last manifest.json: where it is, the folder is complete. The bytes of all this depend on the text
and the settings only, not on the number of processes, the size of batches, or how often the preparation was killed and
started again. Only the manifest's block `provenance` (when, where, how fast, which files) is outside that promise and
its fingerprint. `--verify FOLDER` holds finished shards against the sums in its manifest.

*.docs.npy of a shard holds, in order, every place where a document begins, and at last the shard's length. So it is
what a scan for the end-of-text id finds, {0} | {places after one} | {length}, but for a document over the border of two
shards: then 0 is not in that of the second shard (its first entry is where the next document begins), and the length of
the first is there although no document ends. All lengths less one, added up, are the number of documents.

How: the parent cuts the inputs into batches of rows; `work` parses, cleans, hashes and encodes a batch, in a pool of
processes or in this one; the parent takes the results in order, drops duplicates, decides the split, fills shards.
The split is one draw a document. Whenever a shard is closed at the start of a row, or of a piece of a long text file,
progress.json (replaced atomically) records where that was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sysconfig
import threading
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from lumen.errors import ERRORS, UserError, expand
from lumen.launch import Words, command, speak
from lumen.files import sha256
from lumen.loader import DAMAGED
from lumen.tokenizer import NAMED, Tokenizer, load, mend_surrogates, train_bpe

OPTIONS = {  # of prepare() and of the command line: (default, meaning); a default of None depends on the text
    "val_fraction": (
        None,
        "share of documents held out, by hash; default 0.05 below 100 MB of text, else 0.005",
    ),
    "seed": (1337, "of the split and of synthetic text"),
    "shard_tokens": (100_000_000, "a shard is closed before it would be longer"),
    "max_doc_chars": (200_000, "longer documents are given to the tokenizer in parts"),
    "workers": (None, "processes; default min(cores, 8), but 1 below 32 MB of text"),
    "batch_bytes": (1 << 20, "what a worker gets at a time"),
    "max_bad": (0.01, "fail at the end when a larger share of the rows is bad"),
    "strict": (False, "stop at the first bad row"),
    "quiet": (False, "no lines and no progress bar"),
}
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".json": "json"}
PIECE = (
    8 << 20
)  # bytes: a text file of more than two pieces is read in pieces, cut at line ends; the last is longer
RULES = (
    2  # in provenance: 2 since a document has one end of text; before, each of its parts had one
)
TRAIN_BYTES = 200_000_000  # a BPE vocabulary is trained on this much, taken from all files alike, and then on the first
TRAIN_CHARS = 10_000  # ... so many characters of a document; where there is less text, on all of it
LISTED_DUPLICATES = 1000  # in rejected.jsonl; all are counted
NOT_STDLIB = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
JOURNAL = re.compile(r"progress\.json|seen\.bin|pending_\d+\.npz|.*\.tmp")
OURS = re.compile(
    rf"{JOURNAL.pattern}|(train|val)_\d{{5}}(\.docs)?\.npy|token_bytes\.npy|(report|tokenizer)\.json"
)

# ----------------------------------------------------------------------------------------------------------------------
# Sources: what there is to read


class Input(NamedTuple):
    """One file, or one generated source."""

    source: int  # index into the sources, val_sources counted on
    split: str  # "val", "train", or "hash": decided document by document
    kind: str  # text, jsonl, json, topics, synthetic; tokenizer: not read, but watched for changes
    name: str  # without what differs from machine to machine
    path: str  # as the user wrote it
    size: int = 0  # bytes
    mtime: int = 0  # ns
    sha256: str = ""
    key: str = ""  # of a text file of several pieces, see document_key

    @property
    def long(self) -> bool:
        return self.kind == "text" and self.size > 2 * PIECE

    def looked_at(self) -> Input:
        """With size and time as they are; nothing for what is no file: reading it will tell."""
        if self.kind == "synthetic" or not os.path.isfile(self.path):
            return self
        stat = os.stat(self.path)
        return self._replace(size=stat.st_size, mtime=stat.st_mtime_ns)


def builtin(spec: str) -> bool:
    return bool(re.fullmatch(r"stdlib|synthetic(:\d{1,9})?", spec)) and not os.path.exists(spec)


def label(spec: str) -> str:
    """A source's name in the fingerprinted part of the manifest: the last part of its path."""
    return spec if builtin(spec) else os.path.basename(os.path.abspath(spec))


def ours(folder: str) -> bool:
    """Whether a folder holds prepared data, finished or not."""
    for name in ("manifest.json", "progress.json"):
        with suppress(OSError, ValueError), open(os.path.join(folder, name), "rb") as file:
            head = file.read(1 << 20)
            if b'"npy-tokens"' in head or b'"shard_tokens"' in head:
                return True
    return False


def find_inputs(
    spec: str, source: int, split: str, out: str = "", unread: dict | None = None
) -> list[Input]:
    """The inputs of one source, in a fixed order; what lies there and is none goes into unread: {why: [how
    many, the first]}. The
    folder `out` is none, nor is any other of ours. E108: not there, nothing readable in it, a folder that is shut."""
    stdlib = builtin(spec) and spec == "stdlib"
    if builtin(spec) and not stdlib:
        documents = int(spec.partition(":")[2] or 2000)
        return [
            Input(source, split, "synthetic", spec, spec, 600 * documents, documents)
        ]  # mtime is their number
    root, files = sysconfig.get_path("stdlib") if stdlib else spec, [spec]
    if not os.path.exists(root):
        raise UserError("E108", f"source {spec}: there is no such file or folder")
    if os.path.isdir(root):
        files = list(
            walk(
                root, out, {} if stdlib or unread is None else unread, NOT_STDLIB if stdlib else ()
            )
        )
    elif os.path.splitext(spec)[1].lower() not in KINDS:
        raise UserError(
            "E108", f"source {spec}: only {' '.join(KINDS)} can be read; unpack or convert it first"
        )
    inputs = []
    for path in sorted(files, key=lambda path: path.replace(os.sep, "/")):
        name = (
            label(spec)
            if path == spec
            else f"{label(spec)}/{os.path.relpath(path, root)}".replace(os.sep, "/")
        )
        given = Input(
            source, split, KINDS[os.path.splitext(path)[1].lower()], name, path
        ).looked_at()
        if stdlib and name.endswith("pydoc_data/topics.py"):
            given = given._replace(kind="topics")  # a table of English prose
        if not stdlib or path.endswith(".py") and given.size and "_sysconfigdata" not in name:
            inputs.append(given)
    if not inputs:
        what = (
            "it is data that was prepared already"
            if ours(root)
            else f"no {' '.join(KINDS)} files in it"
        )
        raise UserError("E108", f"source {spec}: {what}")
    return inputs


def walk(root: str, out: str, unread: dict, passed_over):
    """The paths of the text files in a folder; why others are not read, and which, goes into `unread`."""

    def shut(error: OSError):
        raise UserError(
            "E108", f"source {root}: {error.filename} cannot be entered: {error.strerror}"
        )

    def leave(why: str, path: str) -> None:
        unread.setdefault(why, [0, os.path.relpath(path, root)])[0] += 1

    out = os.path.realpath(out) if out else None
    failure = f"{out}.error.json"  # of a training run with a prepare: key
    for folder, folders, names in os.walk(root, onerror=shut):
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name in passed_over:
                pass
            elif name.startswith("."):
                leave("hidden folders", path)
            elif os.path.realpath(path) == out or ours(path):
                leave("folders of prepared data", path)
            elif os.path.islink(path):
                leave("links to folders", path)
            else:
                kept.append(name)
        folders[:] = kept
        if folder == root and ours(root):
            names = []
        for name in sorted(names):
            path, ending = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if name.startswith("._"):  # what a Mac stores beside a file on a foreign disk
                leave("AppleDouble files", path)
            elif name.endswith(".error.json") and os.path.realpath(path) == failure:
                pass  # ours
            elif ending in KINDS:
                yield path
            elif os.path.isfile(path):
                leave(f"ending {ending or 'none'}", path)
            else:
                leave("pipes, sockets and dead links", path)


def file_sha256(path: str) -> str:
    """Empty for what is no file or cannot be read: reading it will tell."""
    digest = hashlib.sha256()
    if os.path.isfile(path):  # opening a pipe would wait for ever
        with suppress(OSError), open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    return ""


def document_key(given: Input) -> str:
    """The key of a long text file: that of its cleaned, stripped text, see Document, without holding it in memory. The
    cuts are behind line ends and blanks, so the cleaned pieces are the cleaned text. Empty: no UTF-8, or no text."""
    digest, held, begun = hashlib.blake2b(digest_size=16), "", False
    with suppress(OSError, UnicodeDecodeError), open(given.path, "rb") as file:
        for *_, data, last in text_pieces(
            file, 3 * (file.read(3) == b"\xef\xbb\xbf"), 1, given.size
        ):
            text = held + clean(data.decode())
            text = text if begun else text.lstrip()
            whole = text.rstrip()
            begun, held = (
                begun or bool(whole),
                text[len(whole) :],
            )  # blanks count where more text comes
            digest.update(whole.encode())
            if last:
                return digest.hexdigest() if begun else ""
    return ""


def synthetic_document(seed: int, n: int) -> str:
    """Document n: sums, sorted lists, things to recall and small stories. Integers only, so equal everywhere."""
    state = int.from_bytes(
        hashlib.blake2b(f"{seed}:{n}".encode(), digest_size=8).digest(), "little"
    )

    def pick(below: int) -> int:  # splitmix64 (Steele, Lea and Flood 2014)
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) % below

    def one(words: str) -> str:
        return words.split()[pick(words.count(" ") + 1)]

    names = (
        "Ada Ben Cleo Dan Eva Finn Gwen Hugo Iris Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tess Uma"
    )
    things = "apple book candle drum egg feather glove hat jar key lamp map nut orange pen ring shell spoon stone"
    places = "garden kitchen forest market river school attic harbour station tower bakery library"
    colours, paragraphs = "red blue green yellow black white brown silver", []
    for _ in range(3 + pick(5)):
        a, b, kind, who, other, thing, colour = (
            pick(900),
            pick(30),
            pick(4),
            *map(one, (names, names, things, colours)),
        )
        if kind == 0:
            text = f"{a} + {b} = {a + b}. {a + b} - {a} = {b}. {a} * {b} = {a * b}."
        elif kind == 1:
            numbers = [pick(100) for _ in range(4 + pick(6))]
            text = f"Sort: {' '.join(map(str, numbers))}\nSorted: {' '.join(map(str, sorted(numbers)))}"
        elif kind == 2:
            owners = {
                one(names): f"the {one(colours)} {one(things)}" for _ in range(2 + pick(4))
            } | {who: f"a {thing}"}
            facts = ". ".join(f"{owner} has {it}" for owner, it in sorted(owners.items()))
            text = f"{facts}.\nQuestion: What does {who} have?\nAnswer: {owners[who]}."
        else:
            text = (
                f"{who} went to the {one(places)} to look for a {thing}. There {who} met {other}. "
            )
            text += f'"I have only a {colour} {thing}," said {other}. {who} took the {colour} {thing} home.'
        paragraphs.append(text)
    return "\n\n".join(paragraphs) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Reading: inputs to items (what is sent to a worker), items to rows


class Item(NamedTuple):
    index: int  # of its input
    kind: str  # text: a file; piece, last: of a long one; jsonl: whole lines; row: a JSON value; a code: file rejected
    offset: int  # of its first byte; for rows their number. A resumed run starts from there
    line: int  # physical line there, from 1
    data: bytes  # for a code the reason


def read_items(index: int, given: Input, offset: int, line: int, block: int, seed: int):
    """The input's items from (offset, line) on. A .jsonl is cut into blocks, elsewhere `block` has no influence."""
    if given.kind in ("synthetic", "topics"):
        if given.kind == "synthetic":
            texts = (synthetic_document(seed, n) for n in range(offset, given.mtime))
        else:
            from pydoc_data.topics import topics

            texts = [topics[key] for key in sorted(topics)][offset:]
        yield from (
            Item(index, "row", n, n + 1, json.dumps({"text": t}).encode())
            for n, t in enumerate(texts, offset)
        )
        return
    try:
        if not os.path.isfile(given.path):
            raise OSError("not a regular file")
        with open(given.path, "rb") as file:
            head = file.read(4)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                yield Item(
                    index, "E103", 0, 1, b"this is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
                )
            elif head[:2] == b"\x1f\x8b" or head in (b"PK\3\4", b"\x28\xb5\x2f\xfd"):
                yield Item(index, "E108", 0, 1, b"this is a compressed file; unpack it first")
            elif (
                given.kind == "json" or given.kind == "jsonl" and spread(head + file.read(1 << 20))
            ):
                file.seek(0)
                yield from json_items(index, file.read(), offset)
            elif given.long:
                offset, known = offset or 3 * (head[:3] == b"\xef\xbb\xbf"), given.key
                for at, row, data, last in text_pieces(file, offset, line, given.size):
                    if known:
                        yield Item(index, "last" if last else "piece", at, row, data)
                    else:  # why it has no key
                        data.decode()
                if not known:
                    yield Item(index, "E104", 0, 1, b"the file is empty")
            elif given.kind == "text":
                file.seek(
                    offset := 3 * (head[:3] == b"\xef\xbb\xbf")
                )  # a byte order mark is no text
                yield Item(index, "text", offset, line, file.read())
            else:
                offset, size = offset or 3 * (head[:3] == b"\xef\xbb\xbf"), block
                while True:
                    file.seek(offset)
                    data = file.read(size)
                    cut = data.rfind(b"\n") + 1
                    if len(data) < size:
                        if data or offset <= 3:
                            yield Item(index, "jsonl", offset, line, data)
                        return
                    if cut:
                        yield Item(index, "jsonl", offset, line, data[:cut])
                        offset, line, size = offset + cut, line + data.count(b"\n", 0, cut), block
                    else:
                        size *= 2  # a long line
    except UnicodeDecodeError as error:
        place, line = at + error.start, row + data.count(b"\n", 0, error.start)
        reason = (
            f"byte {data[error.start]:#04x} at {place} is not UTF-8; nothing of the file is read"
        )
        yield Item(index, "E103", place, line, reason.encode())
    except OSError as error:
        yield Item(index, "E108", offset, line, str(error.strerror or error).encode())


def text_pieces(file, offset: int, line: int, size: int):
    """(offset, line, data, whether it is the last) of the pieces of a text file of `size` bytes, from `offset` on."""
    while size - offset > 2 * PIECE:
        length, cut = PIECE, 0
        while not cut:
            file.seek(offset)
            data = file.read(length)
            cut = data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
            if len(data) < length:  # no place to cut, or the file has shrunk
                break
            length *= 2
        if not cut or len(data) == size - offset:
            break
        yield offset, line, data[:cut], False
        offset, line = offset + cut, line + data.count(b"\n", 0, cut)
    file.seek(offset)
    yield offset, line, file.read(), True


def spread(head: bytes) -> bool:
    """Whether a .jsonl begins with an object over several lines: then it is read as a .json is."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    with suppress(ValueError, RecursionError):
        return text[:1] == "{" and "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    return False


def json_items(index: int, data: bytes, skip: int):
    """The rows of a .json: a list of objects, or objects one after the other. What is wrong between ends the file."""
    space, reader, n, line, at = re.compile(r"[ \t\r\n]*"), json.JSONDecoder(), 0, 1, 0
    try:
        text = data.decode("utf-8-sig")
        start = space.match(text).end()
        many = text[start : start + 1] == "["
        end = space.match(text, start + many).end()
        while not (many and n == 0 and text[end : end + 1] == "]"):
            line, at = line + text.count("\n", at, end), end
            row, end = reader.raw_decode(text, at)
            if n >= skip:
                yield Item(index, "row", n, line, text[at:end].encode())
            n, end = n + 1, space.match(text, end).end()
            if many:
                if text[end : end + 1] != ",":
                    break
                end = space.match(text, end + 1).end()
            elif text[end : end + 1] != "{":
                break
        if text[end:].strip() != "]" * many:
            raise ValueError(
                "no ] after the last row" if many else "no { where the next row would begin"
            )
    except (ValueError, RecursionError) as error:
        code, reason = "E101", f"{getattr(error, 'msg', error)}; nothing from here on is read"
        if isinstance(error, UnicodeDecodeError):
            code, reason, line = (
                "E103",
                f"no UTF-8 at byte {error.start}",
                1 + data.count(b"\n", 0, error.start),
            )
        yield Item(index, code, n, line, reason.encode())


def item_rows(item: Item):
    """(offset, line, code, value) of each row. code None: value is its text; "blank": a number of blank lines that come
    before; otherwise (reason, excerpt, the whole file is lost)."""
    index, kind, offset, line, data = item
    if kind not in ("text", "piece", "last", "jsonl", "row"):
        yield offset, line, kind, (data.decode(), "", True)
        return
    blank = 0
    lines = (
        data.split(b"\n") if kind == "jsonl" else [data]
    )  # str.splitlines would also split at U+2028 and the like
    for raw in lines if lines[-1] or kind != "jsonl" else lines[:-1]:
        if kind == "jsonl" and not raw.strip():
            blank += 1
        else:
            if blank:
                yield offset, line, "blank", blank
                blank = 0
            try:
                text = raw.decode("utf-8")
                code, value = text_of(text) if kind in ("jsonl", "row") else (None, text)
                yield offset, line, code, (value, excerpt(raw), False) if code else value
            except UnicodeDecodeError as error:
                at, reason = (
                    error.start,
                    f"byte {raw[error.start]:#04x} at {offset + error.start} is not UTF-8",
                )
                yield (
                    offset,
                    line + raw.count(b"\n", 0, at),
                    "E103",
                    (reason, excerpt(raw[max(0, at - 40) :]), False),
                )
        offset, line = offset + len(raw) + 1, line + 1
    if blank:
        yield offset - 1, line - 1, "blank", blank


def excerpt(raw: bytes) -> str:
    return raw[:800].decode("utf-8", "replace").strip()[:200]


def text_of(line: str):
    """(None, text) of a row, or (code, reason)."""
    hint = (
        "; a file that is one JSON list should be named .json"
        if line.lstrip().startswith("[")
        else ""
    )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if re.match(r"\s*[\[{]\s*'", line):
            hint = "; single quotes: this is Python's notation, not JSON"
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return "E101", f"{getattr(error, 'msg', error)}{at}{hint}"
    if not isinstance(row, dict):
        return "E101", f"a {type(row).__name__}, not an object{hint}"
    if isinstance(row.get("text"), str):
        return None, row["text"]
    if chat := [key for key in ("messages", "conversation", "conversations") if key in row]:
        return "E102", f'"{chat[0]}": chat data is not supported yet; rows need a "text" field'
    if "text" in row:
        return "E102", f'"text" is a {type(row["text"]).__name__}, not a string'
    return "E102", f'no "text" field; the fields are {", ".join(row)[:200] or "none"}'


# ----------------------------------------------------------------------------------------------------------------------
# Cleaning and encoding: what a worker does

CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n")


def clean(text: str) -> str:
    """CR LF and lone CR to LF, other C0 controls but tab dropped, NFC, surrogates without a partner to U+FFFD."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = mend_surrogates(text).encode()
    kept = data.translate(None, CONTROL)  # ten times as fast as a regular expression over the text
    if len(kept) < len(data) or not text.isascii():
        text = unicodedata.normalize("NFC", kept.decode())
    return text


def cut_place(text: str, low: int, high: int) -> int:
    """Where to cut between low and high: after the last blank line, else line, else word, else at high."""
    ends = ((text.rfind(mark, low, high), len(mark)) for mark in ("\n\n", "\n", " "))
    return next((at + length for at, length in ends if at >= 0), high)


def cut_text(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that together are the text."""
    parts, start = [], 0
    while len(text) - start > limit:
        end = cut_place(text, start + limit // 2, start + limit)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class Document(NamedTuple):
    """A document, or a piece of a long file."""

    key: bytes  # blake2b-16 of the cleaned, stripped text: equal documents have equal keys; empty: a piece
    share: float  # in [0, 1), from key and seed: below val_fraction means val
    ids: np.ndarray  # of all parts; with the last of them the end-of-text id
    ends: list  # of the parts, in ids
    size: int  # bytes of text
    cleaned: bool  # cleaning changed it
    last: bool = True  # the document ends here


def share_of(key: bytes, seed: int) -> float:
    salt = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, salt=salt).digest(), "little") / 2**64


def encode_parts(
    text: str, tokenizer: Tokenizer, limit: int, dtype, last=True
) -> tuple[np.ndarray, list]:
    """The ids of all parts of a text, and where each part ends."""
    arrays = [tokenizer.encode(part) for part in cut_text(text, limit)]
    if last:
        arrays[-1] = np.append(arrays[-1], np.uint32(tokenizer.eot_id))
    return np.concatenate(arrays).astype(dtype), list(itertools.accumulate(map(len, arrays)))


def work(batch: list[Item]):
    """[(index, offset, line, code, value)] of the batch's rows (a Document where code is None), and CPU seconds."""
    tokenizer, settings, dtype = _worker
    started, results = time.process_time(), []
    for item in batch:
        whole, last = item.kind not in ("piece", "last"), item.kind != "piece"
        for offset, line, code, value in item_rows(item):
            if code is None:
                text, key, share = clean(value), b"", 0.0
                if whole and (stripped := text.strip()):
                    key = hashlib.blake2b(stripped.encode(), digest_size=16).digest()
                    share = share_of(key, settings["seed"])
                if key or not whole:
                    ids, ends = encode_parts(
                        text, tokenizer, settings["max_doc_chars"], dtype, last
                    )
                    size = len(text) if text.isascii() else len(text.encode())
                    value = Document(
                        key, share, ids, ends, size, text is not value and text != value, last
                    )
                else:
                    code, value = (
                        "E104",
                        (
                            "the file is empty" if item.kind == "text" else '"text" is empty',
                            "",
                            False,
                        ),
                    )
            results.append((item.index, offset, line, code, value))
    return results, time.process_time() - started


def start_worker(*given) -> None:
    """given: (tokenizer, settings, dtype). A process of a pool ends with its parent, even if that is killed with -9."""
    global _worker
    _worker = given
    if parent := multiprocessing.parent_process():
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C goes to all of a terminal: the parent answers
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(batches, workers: int, given: tuple):
    """(batch, work(batch)) in the order of the batches; at most 4 a worker are under way. E003: a process died."""
    if workers == 1:
        start_worker(*given)
        yield from ((batch, work(batch)) for batch in batches)
        return
    waiting = deque()
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), start_worker, given
    ) as pool:
        try:
            for batch in batches:
                with deaf():  # a process that begins here inherits it, and is not interrupted while it imports
                    waiting.append((batch, pool.submit(work, batch)))
                if len(waiting) >= 4 * workers:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool:
            text = "a worker process died, out of memory perhaps: the same command with fewer --workers goes on"
            raise UserError("E003", text) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is under way ends, the rest does not begin
            raise


@contextmanager
def deaf():
    """Ctrl-C waits until this is over, where the system can do that."""
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)
    before = mask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "SIG_BLOCK") else None
    try:
        yield
    finally:
        if before is not None:
            mask(signal.SIG_SETMASK, before)


# ----------------------------------------------------------------------------------------------------------------------
# Writing: shards, and the journal


@contextmanager
def writing(path: str, length: int | None = None):
    """A binary file that appears whole or not at all; with length, one that is continued after its first `length`
    bytes, whatever a killed run left behind them. E119: disk full, no permission."""
    target = path + ".tmp" if length is None else path
    try:
        with open(target, "wb" if length is None else "ab") as file:
            if length is not None:
                file.truncate(length)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if length is None:
            os.replace(target, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(path + ".tmp")
        raise UserError("E119", f"{path}: {error.strerror or error}") from None


NAMES = (
    "utf-8",
    "backslashreplace",
)  # a file name that is no UTF-8 becomes a JSON escape, and comes back from it


def write_json(path: str, value) -> None:
    with writing(path) as file:
        file.write(
            (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(*NAMES)
        )


class Shards:
    """The shards of one split: those that are closed, and the one that is being filled."""

    def __init__(self, out: str, split: str, target: int):
        self.out, self.split, self.target = out, split, target
        self.closed, self.arrays, self.starts, self.size, self.bytes_text = [], [], [], 0, 0

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
        path, ids, starts = (
            os.path.join(self.out, name),
            np.concatenate(self.arrays),
            [*self.starts, self.size],
        )
        with writing(path + ".npy") as file:
            np.save(file, ids)
        with writing(path + ".docs.npy") as file:
            np.save(file, np.array(starts, dtype="<u8"))
        shard = {
            "file": name + ".npy",
            "docs_file": name + ".docs.npy",
            "tokens": self.size,
            "docs": len(self.starts),
        }
        shard |= {"min_id": int(ids.min()), "max_id": int(ids.max())}
        shard |= {"bytes": os.path.getsize(path + ".npy"), "sha256": file_sha256(path + ".npy")}
        self.closed.append(shard)
        self.arrays, self.starts, self.size = [], [], 0


class Output:
    """All that the parent decides, in the order of the rows, and the journal from which a killed run goes on."""

    STATE = (
        "position",
        "rejected_bytes",
        "journals",
        "counts",
        "rows",
        "kept",
        "examples",
        "lost",
        "open",
    )

    def __init__(
        self, out: str, header: dict, inputs: list[Input], strict: bool, tokenizer: Tokenizer
    ):
        self.out, self.header, self.inputs, self.strict, self.tokenizer = (
            out,
            header,
            inputs,
            strict,
            tokenizer,
        )
        self.settings = header["settings"]
        self.splits = {
            split: Shards(out, split, self.settings["shard_tokens"]) for split in ("train", "val")
        }
        self.position = (0, 0, 1)  # input, offset and line of the row at hand; None: after the last
        self.open = []  # of the long file that is being written: its split, or "dropped"; whether it was cleaned
        self.reserve = (
            None  # the document with the smallest share so far: it waits until the end (see settle)
        )
        # Long files do not wait. Where there is nothing else and all are drawn for one side, one gives its tail to val.
        fraction, seed = self.settings["val_fraction"], self.settings["seed"]
        drawn = [
            given for given in inputs if given.split == "hash" and (given.key or not given.long)
        ]
        shares = [share_of(bytes.fromhex(given.key), seed) for given in drawn if given.long]
        self.tail = None
        if (
            fraction
            and shares
            and len(shares) == len(drawn)
            and len({share < fraction for share in shares}) == 1
        ):
            self.tail = inputs.index(
                drawn[shares.index(min(shares) if min(shares) >= fraction else max(shares))]
            )
        self.seen, self.new_keys, self.rejects, self.rejected_bytes, self.journals = (
            set(),
            [],
            [],
            0,
            0,
        )
        self.counts, self.rows, self.kept = (
            Counter(),
            Counter(),
            Counter(),
        )  # by kind or code; by source
        self.examples, self.lost = {}, []

    def take(self, index: int, offset: int, line: int, code: str | None, value) -> None:
        """One row. Nothing is counted before it is written, so that a journal made meanwhile lacks the whole row."""
        self.position, given = (index, offset, line), self.inputs[index]
        if code == "blank":
            self.counts["blank_lines"] += value
            return
        if code is None and not value.key:
            self.take_piece(index, line, value)
            return
        if code is None and value.key in self.seen:
            code, value = "E107", ("the same text as an earlier document", "", False)
        if code:
            self.reject(given, offset, line, code, *value)
        else:
            first = self.reserve is None or value.share < self.reserve.share
            if given.split == "hash" and first:
                if self.reserve:
                    self.write(self.reserve)
                self.reserve = value
            else:
                self.write(value, None if given.split == "hash" else given.split)
            self.seen.add(value.key)
            self.new_keys.append(value.key)
            parts = len(value.ends)
            self.counts.update(kept=1, cleaned=int(value.cleaned), cut=int(parts > 1), parts=parts)
            self.kept[str(given.source)] += 1
        self.counts["rows"] += 1
        self.rows[str(given.source)] += 1

    def take_piece(self, index: int, line: int, piece: Document) -> None:
        """A piece of a long file. The file is one row: one draw, one look for its like, one end."""
        given, first = self.inputs[index], not self.open
        key, source = bytes.fromhex(given.key), str(given.source)
        split, cleaned = self.open or ("", False)
        if first:
            val = (
                share_of(key, self.settings["seed"]) < self.settings["val_fraction"]
                and index != self.tail
            )
            split = given.split if given.split != "hash" else "val" if val else "train"
            split = "dropped" if key in self.seen else split
        if split == "dropped":
            if first:
                self.reject(
                    given, 0, line, "E107", "the same text as an earlier document", "", False
                )
        elif piece.last and index == self.tail:
            total = sum(given.size for given in self.inputs if given.split == "hash")
            self.hold_out(
                piece, self.settings["val_fraction"] * total / max(piece.size, 1), begins=False
            )
        else:
            self.write(piece, split, first)
        if split != "dropped":
            if first:
                self.seen.add(key)
                self.new_keys.append(key)
                self.kept[source] += 1
            newly = int(piece.cleaned and not cleaned)
            self.counts.update(
                kept=int(first), cleaned=newly, cut=int(first), parts=len(piece.ends)
            )
        self.counts["rows"] += int(first)
        self.rows[source] += int(first)
        self.open = [] if piece.last else [split, cleaned or piece.cleaned]

    def reject(
        self, given: Input, offset: int, line: int, code: str, reason: str, text: str, lost: bool
    ) -> None:
        said = f"{given.path}:{line}: {reason}" + (f": {text[:100]}" if text else "")
        harmless = (
            code == "E107" or code == "E104" and given.kind == "text"
        )  # an empty __init__.py is no mistake
        if self.strict and not harmless:
            raise UserError(code, said)
        self.counts.update({code: 1, "bad": not harmless})
        if len(self.examples.setdefault(code, [])) < 5:
            self.examples[code].append(said)
        if code != "E107" or self.counts[code] <= LISTED_DUPLICATES:
            row = {
                "file": given.path,
                "line": line,
                "byte_offset": offset,
                "code": code,
                "reason": reason,
            }
            self.rejects.append(json.dumps(row | {"excerpt": text}, ensure_ascii=False) + "\n")
        if lost and (given.kind != "text" or given.long):
            self.lost.append(given.path)

    def write(
        self, document: Document, split: str | None = None, begins=True, journal=True
    ) -> None:
        shards = self.splits[
            split or ("val" if document.share < self.settings["val_fraction"] else "train")
        ]
        for start, end in zip([0, *document.ends], document.ends):
            if shards.full(end - start):
                shards.close()
                if start == 0 and self.position and journal:
                    self.journal()
            shards.add(document.ids[start:end], begins and start == 0)
        shards.bytes_text += document.size

    def hold_out(self, document: Document, share: float, begins=True) -> None:
        """Gives about `share` of a document to val, its end, and the rest to train: two documents from now on."""
        text = self.tokenizer.decode(document.ids[:-1])
        tail = min(len(text), max(1, round(share * len(text))))
        cut = cut_place(text, max(0, len(text) - 2 * tail), len(text) - tail)
        if begins and not cut:  # a letter or two: nothing would be left to train on
            self.write(document, "train")
            return
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            ids, ends = encode_parts(
                part, self.tokenizer, self.settings["max_doc_chars"], document.ids.dtype
            )
            half = document._replace(ids=ids, ends=ends, size=len(part.encode()))
            self.write(half, split, begins or split == "val", journal=split == "train")
        self.counts["tail_held_out"] = 1

    def settle(self) -> None:
        """Writes the reserve and the last shards. When no document but the reserve can be val, it is; a large one (in
        a corpus of few documents, or of one) gives only its tail, about as much as val_fraction asks for."""
        self.position, reserve, train, val = (
            None,
            self.reserve,
            self.splits["train"],
            self.splits["val"],
        )
        if reserve:
            share = (
                self.settings["val_fraction"] * (train.tokens + len(reserve.ids)) / len(reserve.ids)
            )
            if val.tokens or train.tokens and (share > 1 / 3 or len(reserve.ids) < 4000):
                self.write(reserve, "val")
            else:
                self.hold_out(reserve, share)
        train.close()
        val.close()
        self.write_rejects()

    def write_rejects(self) -> None:
        data = "".join(self.rejects).encode(*NAMES)
        with writing(os.path.join(self.out, "rejected.jsonl"), self.rejected_bytes) as file:
            file.write(data)
        self.rejects, self.rejected_bytes = [], self.rejected_bytes + len(data)

    def journal(self) -> None:
        """Keys, rejects, what is in no shard yet, and then, atomically, the progress.json that refers to them."""
        self.write_rejects()
        with writing(
            os.path.join(self.out, "seen.bin"), 16 * (len(self.seen) - len(self.new_keys))
        ) as file:
            file.write(b"".join(self.new_keys))
        self.new_keys, self.journals, reserve = [], self.journals + 1, self.reserve
        arrays = {"reserve": reserve.ids} if reserve else {}
        state = {name: getattr(self, name) for name in self.STATE} | {
            "seen": len(self.seen),
            "splits": {},
        }
        for split, shards in self.splits.items():
            arrays[split] = np.concatenate(shards.arrays) if shards.arrays else np.zeros(0)
            state["splits"][split] = [shards.closed, shards.bytes_text, shards.starts]
        state["reserve"] = reserve and [
            reserve.key.hex(),
            reserve.share,
            reserve.ends,
            reserve.size,
        ]
        with writing(os.path.join(self.out, f"pending_{self.journals}.npz")) as file:
            np.savez(file, **arrays)
        write_json(os.path.join(self.out, "progress.json"), self.header | {"state": state})
        with suppress(OSError):
            os.remove(os.path.join(self.out, f"pending_{self.journals - 1}.npz"))

    def resume(self, state: dict) -> None:
        for name in self.STATE:
            setattr(self, name, type(getattr(self, name))(state[name]))
        with open(os.path.join(self.out, "seen.bin"), "rb") as file:
            self.seen = {file.read(16) for _ in range(state["seen"])}
        with np.load(
            os.path.join(self.out, f"pending_{self.journals}.npz"), allow_pickle=False
        ) as pending:
            for split, shards in self.splits.items():
                shards.closed, shards.bytes_text, shards.starts = state["splits"][split]
                shards.size = len(pending[split])
                shards.arrays = [pending[split]] if shards.size else []
            if state["reserve"]:
                key, share, ends, size = state["reserve"]
                self.reserve = Document(
                    bytes.fromhex(key), share, pending["reserve"], ends, size, False
                )


# ----------------------------------------------------------------------------------------------------------------------
# The whole


def training_texts(inputs: list[Input], seed: int):
    """What a vocabulary is trained on: all train text, or TRAIN_BYTES of it taken from all files alike."""
    inputs = [given for given in inputs if given.split != "val"]
    total, credit = sum(given.size for given in inputs), 0.0
    for given in inputs:
        credit += given.size * TRAIN_BYTES / total if total > TRAIN_BYTES else float("inf")
        for item in read_items(0, given, 0, 1, 1 << 20, seed) if credit > 0 else ():
            for *_, code, text in item_rows(item):
                if code is None:
                    credit -= len(text[:TRAIN_CHARS])
                    yield clean(text)
            if credit <= 0:
                break


def read_batches(inputs: list[Input], position, size: int, seed: int):
    """Lists of items of about `size` bytes in all, from the position on."""
    batch, weight = [], 0
    for index in range(position[0], len(inputs)):
        _, offset, line = position if index == position[0] else (0, 0, 1)
        for item in read_items(index, inputs[index], offset, line, size, seed):
            batch.append(item)
            weight += len(item.data) + 200
            if weight >= size:
                yield batch
                batch, weight = [], 0
    if batch:
        yield batch


def read_json(path: str) -> dict | None:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError("E117", f"{path} cannot be read: {error}") from None


def remove(out: str, pattern: re.Pattern) -> None:
    for name in filter(pattern.fullmatch, os.listdir(out)):
        os.remove(os.path.join(out, name))


def changed_input(stored: list, inputs: list[Input], rules: int) -> str | None:
    """The first input that is not what it was; size and time are looked at first, contents where those differ."""
    before = [Input(*given) for given in stored]
    if (
        rules < 2
    ):  # then names that are no UTF-8 were kept with a ?, and AppleDouble files were tried
        before = [given for given in before if not os.path.basename(given.path).startswith("._")]
        inputs = [
            given._replace(name=given.name.encode("utf-8", "replace").decode()) for given in inputs
        ]
    old, new = ({(given.source, given.name): given for given in many} for many in (before, inputs))
    for key in [*old, *new]:
        if key not in old or key not in new:
            return f"{(old.get(key) or new[key]).path} is {'new' if key in new else 'gone'}"
        a, b = old[key], new[key]
        if (a.size, a.mtime) != (b.size, b.mtime) and (
            a.kind == "synthetic" or a.sha256 != file_sha256(b.path)
        ):
            return f"{b.path} has changed"
    return None


def look_into(
    out: str, settings: dict, inputs: list[Input] | None
) -> tuple[dict | None, dict | None]:
    """(manifest, None) of a finished folder, (None, progress) of an unfinished one, (None, None) of an empty one. E117:
    it was made, or begun, by another command or from other text, or holds other things; E111: a shard is damaged."""
    manifest, progress = (
        read_json(os.path.join(out, name)) for name in ("manifest.json", "progress.json")
    )
    if old := manifest or progress:
        for key, value in settings.items():
            if value is not None and value != old["settings"].get(key):
                raise UserError(
                    "E117", f"{out} was made with {key} {old['settings'].get(key)}, not {value}"
                )
        was = old["provenance"]
        if inputs is not None and (
            change := changed_input(was["inputs"], inputs, was.get("rules", 1))
        ):
            raise UserError("E117", f"{out} was made from other text: {change}")
    elif others := [n for n in os.listdir(out) if n != "rejected.jsonl" and not n.endswith(".tmp")]:
        raise UserError(
            "E117",
            f"{out} holds files that are no dataset of ours: {', '.join(sorted(others)[:3])}",
        )
    if not manifest:
        return None, progress
    for shard in manifest["splits"]["train"]["shards"] + manifest["splits"]["val"]["shards"]:
        path = os.path.join(out, shard["file"])
        if not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]:
            raise UserError(
                "E111", f"{path} is not there, or has another size than manifest.json says"
            )
    for name in ("tokenizer.json", "token_bytes.npy"):
        if not os.path.exists(os.path.join(out, name)):
            raise UserError("E111", f"{os.path.join(out, name)} is not there")
    remove(out, JOURNAL)  # killed after the manifest
    return manifest, None


@contextmanager
def holding(out: str, say=print):
    """Makes the folder; where there are locks, waits until no other process writes to it; removes it if it stays
    empty."""
    handle, told = None, 0.0
    while handle is None:
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise UserError("E119", f"{out}: {error.strerror}") from None
        try:
            import fcntl

            handle = os.open(out, os.O_RDONLY)
            finished = os.path.exists(
                os.path.join(out, "manifest.json")
            )  # then it is only read, by any number
            fcntl.flock(handle, (fcntl.LOCK_SH if finished else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == os.stat(out).st_ino:
                break
        except BlockingIOError:
            if time.monotonic() - told > 60 or not told:
                told = time.monotonic()
                say(f"another process is writing to {out}: waiting for it")
            time.sleep(0.3)
        except FileNotFoundError:  # the other one had nothing to leave there
            pass
        except (ImportError, OSError):  # Windows; a file system without locks
            break
        if handle is not None:
            os.close(handle)
            handle = None
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(out)
        if handle is not None:
            os.close(handle)


def prepare(
    sources: list[str],
    out: str,
    tokenizer="bpe:8192",
    val_sources: list[str] | None = None,
    **options,
) -> dict:
    """Makes the dataset `out`, goes on with one that was interrupted, or finds it finished; returns its manifest.
    Options: OPTIONS, with its defaults.

    E002 options; E003 a worker died; E101 to E104 and E108 with strict; E109 too many bad rows; E111 a finished shard
    is damaged; E115, E116 tokenizer; E117 out holds something else; E119 disk full (the same command goes on later)."""
    if unknown := set(options) - set(OPTIONS):
        raise UserError(
            "E002",
            f"prepare has no option {', '.join(sorted(unknown))}; it has {', '.join(OPTIONS)}",
        )
    options = {name: options.get(name, default) for name, (default, _) in OPTIONS.items()}
    sources, val_sources = (
        [s] if isinstance(s, str) else list(s or []) for s in (sources, val_sources)
    )
    sources, val_sources = ([expand(s) for s in specs] for specs in (sources, val_sources))
    out, tokenizer = expand(out), expand(tokenizer)
    val_fraction = options["val_fraction"]
    if val_sources and val_fraction is not None:
        raise UserError(
            "E002", "val and val_fraction exclude each other: with val all sources are for training"
        )
    sizes = [options[name] for name in ("shard_tokens", "max_doc_chars", "batch_bytes")] + [
        options["workers"]
    ]
    sizes = [1 if size is None else size for size in sizes]
    if (
        not 0 <= (val_fraction or 0) <= 0.5
        or not 0 <= options["max_bad"] <= 1
        or min(sizes) < 1
        or sizes[-1] > 1024
    ):
        text = "val_fraction is 0 to 0.5, max_bad 0 to 1; shard_tokens, max_doc_chars, batch_bytes at least 1"
        raise UserError("E002", f"{text}, workers 1 to 1024")
    if not out or not tokenizer:
        raise UserError("E002", f"{'tokenizer' if out else 'out'} is empty")
    own = tokenizer.startswith("bpe:")
    if own and not re.fullmatch(r"bpe:\d{3,7}", tokenizer):
        raise UserError(
            "E002",
            f"tokenizer {tokenizer}: bpe:8192 means a vocabulary of 8,192 ids, specials included",
        )
    from_file = not own and tokenizer != "bytes" and tokenizer not in NAMED
    settings = {
        "version": 1,
        "sources": list(map(label, sources)),
        "val_sources": list(map(label, val_sources)),
    }
    settings |= {
        key: options[key] for key in ("val_fraction", "seed", "shard_tokens", "max_doc_chars")
    }
    settings |= {"tokenizer": label(tokenizer) if from_file else tokenizer}
    if val_sources:
        settings["val_fraction"] = 0.0

    def say(text: str) -> None:
        if not options["quiet"]:
            speak(text.encode(*NAMES).decode())

    with holding(out, say):
        unread = {}
        try:  # val first: of a text that is in both, the one in train is dropped
            specs = [(spec, len(sources) + i, "val") for i, spec in enumerate(val_sources)]
            split = "hash" if settings["val_fraction"] != 0 else "train"
            specs += [(spec, i, split) for i, spec in enumerate(sources)]
            inputs = [given for spec in specs for given in find_inputs(*spec, out, unread)]
            if from_file:
                inputs.append(
                    Input(-1, "val", "tokenizer", label(tokenizer), tokenizer).looked_at()
                )
        except UserError:
            if not os.path.exists(os.path.join(out, "manifest.json")):
                raise
            inputs = None  # the text is gone since; the tokens do without
        manifest, progress = look_into(out, settings, inputs)
        if manifest:
            tokens, cut = manifest["splits"]["train"]["tokens"], manifest["counts"]["cut"]
            say(f"{out} is already there: {tokens:,} train tokens")
            say(
                f"its files have the right sizes; python prepare_data.py --verify {out} looks at every byte"
            )
            if cut and manifest["provenance"].get("rules", 1) < RULES:
                say(
                    f"note: an older Lumen made it: its {cut:,} longest documents hold an end-of-text at every cut"
                )
            return manifest
        for line in unread_lines(unread):
            say(line)
        if progress and progress["provenance"].get("rules", 1) < RULES:
            say(
                f"note: an older Lumen began {out}, with an end-of-text at every cut in a document: it is begun anew"
            )
            remove(out, OURS)
            progress = None
        made = None if own else load(tokenizer)
        try:
            if not progress:
                inputs = [given._replace(sha256=file_sha256(given.path)) for given in inputs]
                inputs = [
                    given._replace(key=document_key(given) if given.long else "")
                    for given in inputs
                ]
                if settings["val_fraction"] is None:
                    settings["val_fraction"] = (
                        0.05 if sum(given.size for given in inputs) < 100_000_000 else 0.005
                    )
                facts = {"inputs": inputs, "rules": RULES, "not_read": unread}
                progress = {"settings": settings, "provenance": facts}
                write_json(os.path.join(out, "progress.json"), progress)
            return fill(out, progress, made, options, say)
        except UserError as error:
            if error.code not in (
                "E119",
                "E003",
            ):  # after those the same command goes on; after others it starts anew
                remove(out, OURS)
            raise


def unread_lines(unread: dict) -> list[str]:
    """What lies in the sources and is not read, a line for each reason."""
    endings = {why[7:]: n for why, (n, _) in unread.items() if why.startswith("ending ")}
    lines = [
        f"not read: {n:,} {why}, as {name}"
        for why, (n, name) in unread.items()
        if why[7:] not in endings
    ]
    if endings:
        most = sorted(endings, key=lambda ending: (-endings[ending], ending))
        these = ", ".join(f"{ending} {endings[ending]:,}" for ending in most[:6]) + ", ..." * (
            len(most) > 6
        )
        lines.append(f"not read: {sum(endings.values()):,} files of other endings: {these}")
    return lines


def fill(out: str, progress: dict, tokenizer: Tokenizer | None, options: dict, say) -> dict:
    """The work itself, from where progress says to the manifest."""
    settings, clock = progress["settings"], time.monotonic()
    every = [Input(*given) for given in progress["provenance"]["inputs"]]
    inputs = [given for given in every if given.kind != "tokenizer"]
    total, path = sum(given.size for given in inputs), os.path.join(out, "tokenizer.json")
    say(
        f"{len(inputs):,} inputs, {total / 1e6:,.1f} MB{', going on where it was' if 'state' in progress else ''}"
    )
    if os.path.exists(path):
        tokenizer = load(path)
    else:
        if not tokenizer:
            n_vocab = int(settings["tokenizer"].partition(":")[2])
            much = sum(given.size for given in inputs if given.split != "val") > TRAIN_BYTES
            texts = training_texts(inputs, settings["seed"])
            tokenizer = train_bpe(
                texts, n_vocab, settings["tokenizer"], TRAIN_CHARS if much else None
            )
            less = (
                ""
                if tokenizer.n_vocab == n_vocab
                else f"; the text has pairs for {tokenizer.n_vocab:,} ids only"
            )
            say(f"tokenizer {tokenizer.name}: trained in {time.monotonic() - clock:.1f} s{less}")
        with writing(path) as file:
            file.write(tokenizer.to_json().encode())
    dtype = "<u2" if tokenizer.n_vocab <= 65536 else "<u4"

    output = Output(out, progress, inputs, options["strict"], tokenizer)
    if "state" in progress:
        output.resume(progress["state"])
    workers = options["workers"] or (1 if total < 32 << 20 else min(os.cpu_count() or 1, 8))
    batches = read_batches(inputs, output.position, options["batch_bytes"], settings["seed"])
    clock, cpu, done = time.monotonic(), time.process_time(), 0
    with tqdm(
        total=total, unit="B", unit_scale=True, disable=True if options["quiet"] else None
    ) as bar:
        for batch, (rows, seconds) in in_order(batches, workers, (tokenizer, settings, dtype)):
            for row in rows:
                output.take(*row)
            size = sum(len(item.data) for item in batch)
            bar.update(size)
            done, cpu = done + size, cpu - seconds * (workers > 1)
    output.settle()
    wall, cpu = max(time.monotonic() - clock, 1e-6), max(time.process_time() - cpu, 1e-6)

    counts, (train, val) = output.counts, output.splits.values()
    for code, lines in sorted(output.examples.items()):
        say(
            f"{code} {ERRORS[code][0]}: {counts[code]:,}" + "".join(f"\n  {line}" for line in lines)
        )
    bad, rows = counts["bad"], counts["rows"]
    if (
        bad > options["max_bad"] * rows
        or not train.tokens
        or output.lost
        and options["max_bad"] < 1
    ):
        first = next(
            (lines[0] for code, lines in sorted(output.examples.items()) if code != "E107"),
            "no text at all",
        )
        lost = f"; whole files lost: {', '.join(output.lost[:3])}" if output.lost else ""
        text = (
            f"{bad:,} of {rows:,} rows are bad{lost}; {train.tokens:,} train tokens; first: {first}"
        )
        if train.tokens:
            share = 1 if lost else math.ceil(100 * bad / rows) / 100
            text += f"\n  --max_bad {share:g} does without them (now {options['max_bad']:g} of the rows may be bad)"
        raise UserError("E109", text)
    tokens, text = train.tokens + val.tokens, train.bytes_text + val.bytes_text
    parts = f" in {counts['parts']:,} parts" if counts["parts"] > counts["kept"] else ""
    share, asked = (
        val.tokens / tokens,
        settings["val_fraction"] if any(g.split == "hash" for g in inputs) else 0,
    )
    say(
        f"{counts['kept']:,} documents{parts}; tokens: train {train.tokens:,}, val {val.tokens:,} ({share:.2%})"
    )
    if asked and not asked / 2 <= share <= asked * 2:
        say(f"note: {share:.1%} are validation, {asked:.1%} were asked for; documents are drawn whole, and they are "
            "few or of very unequal length; another --seed draws anew, --val FILE names what to hold out")  # fmt: skip
    say(f"{text / tokens:.2f} bytes per token; {done / 1e6:.1f} MB in {wall:.1f} s with {workers} process(es): "
        f"{done / 1e6 / cpu:.1f} MB/s of CPU time, {done / 1e6 / wall:.1f} MB/s of wall time")  # fmt: skip
    with writing(os.path.join(out, "token_bytes.npy")) as file:
        np.save(file, tokenizer.token_bytes())
    write_json(os.path.join(out, "report.json"), report(output))
    manifest = fingerprinted(output, tokenizer, np.dtype(dtype).name)
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tiktoken": tiktoken.__version__,
    }
    manifest["provenance"] = progress["provenance"] | {
        "versions": versions,
        "unicode": unicodedata.unidata_version,
    }
    manifest["provenance"] |= {
        "folder": os.path.abspath(out),
        "host": platform.node(),
        "seconds": round(wall, 2),
    }
    manifest["provenance"] |= {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu_seconds": round(cpu, 2),
    }
    write_json(os.path.join(out, "manifest.json"), manifest)
    remove(out, JOURNAL)
    if train.tokens > 1024:
        say(f"{out} is ready")
    else:
        say(f"{out} is written, but it is small: its {train.tokens:,} train tokens make no row of max_seq_len "
            f"{train.tokens:,} or more")  # fmt: skip
    return read_json(os.path.join(out, "manifest.json"))


def report(output: Output) -> dict:
    """report.json: documents, tokens and lengths of both splits, counts, the first rejects of each kind."""
    splits, counts = {}, dict(output.counts)
    for split, shards in output.splits.items():
        at, begins = 0, []
        for shard in shards.closed:
            begins += [
                np.load(os.path.join(output.out, shard["docs_file"]), allow_pickle=False)[
                    :-1
                ].astype(int)
                + at
            ]
            at += shard["tokens"]
        lengths = np.diff(
            np.concatenate([*begins, [at]])
        )  # of documents, over the borders of shards
        made = {"documents": len(lengths), "tokens": shards.tokens, "bytes_text": shards.bytes_text}
        if len(lengths):
            made["bytes_per_token"] = round(shards.bytes_text / shards.tokens, 4)
            values = lengths.mean(), lengths.std(), *np.percentile(lengths, (0, 50, 95, 100))
            names = ("mean", "std", "min", "median", "p95", "max")
            made["tokens_per_document"] = {
                name: round(float(value), 1) for name, value in zip(names, values)
            }
        splits[split] = made
    rejected = {
        c: {"rows": counts[c], "meaning": ERRORS[c][0], "first": lines}
        for c, lines in output.examples.items()
    }
    made = {
        "splits": splits,
        "rejected": rejected,
        "counts": counts,
        "sources": output.settings["sources"],
    }
    return made | {"not_read": output.header["provenance"]["not_read"]}


def fingerprinted(output: Output, tokenizer: Tokenizer, dtype: str) -> dict:
    """The manifest without provenance."""

    def sha256(value) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    keys = (
        "name",
        "sha256",
        "n_vocab",
        "eot_id",
        "pad_id",
        "im_start_id",
        "im_end_id",
        "specials",
        "pattern",
    )
    manifest = {
        "format": "npy-tokens",
        "version": 1,
        "dtype": dtype,
        "doc_layout": "append_eot",
        "splits": {},
    }
    manifest["tokenizer"] = {"file": "tokenizer.json"} | {
        key: getattr(tokenizer, key) for key in keys
    }
    for split, shards in output.splits.items():
        made = {"tokens": shards.tokens, "docs": sum(shard["docs"] for shard in shards.closed)}
        manifest["splits"][split] = made | {
            "bytes_text": shards.bytes_text,
            "shards": shards.closed,
        }
    manifest["sources"] = []
    for i, name in enumerate(output.settings["sources"] + output.settings["val_sources"]):
        files = [given for given in output.inputs if given.source == i]
        entry = {"name": name, "files": len(files), "bytes": sum(given.size for given in files)}
        entry |= {
            "rows": output.rows[str(i)],
            "docs": output.kept[str(i)],
            "kinds": sorted({g.kind for g in files}),
        }
        manifest["sources"].append(
            entry | {"sha256": sha256([[given.name, given.sha256] for given in files])}
        )
    manifest |= {"settings": output.settings, "settings_sha256": sha256(output.settings)}
    counts = {
        key: output.counts[key]
        for key in ("rows", "kept", "blank_lines", "cleaned", "cut", "tail_held_out")
    }
    manifest["counts"] = counts | {
        "dropped": {code: output.counts[code] for code in sorted(output.examples)}
    }
    return manifest | {"fingerprint": sha256(manifest)}


def verify(folder: str) -> None:
    """Holds every byte of the shards in a finished folder against its manifest. E110: it is none, E111: names them."""
    manifest = read_json(os.path.join(folder, "manifest.json"))
    if not manifest or not isinstance(manifest.get("splits"), dict):
        raise UserError("E110", f"{folder} has no manifest.json of prepared data")
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    sums = [(shard["file"], shard["sha256"]) for shard in shards] + [
        ("tokenizer.json", manifest["tokenizer"]["sha256"])
    ]
    bad = []
    for name, want in sums:
        path = os.path.join(folder, name)
        try:
            problem = "" if sha256(path) == want else DAMAGED
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            bad.append(path)
            print(f"{path}: {problem}", flush=True)
    size = sum(shard["bytes"] for shard in shards)
    print(
        f"{folder}: {len(sums) - len(bad):,} of {len(sums):,} files, {size / 1e6:,.1f} MB, are as they were prepared"
    )
    if bad:
        raise UserError("E111", f"{', '.join(bad[:3])}{', ...' * (len(bad) > 3)}: {DAMAGED}")


def main(argv: list[str]) -> None:
    """The command line; an option's name may be written with - or _."""
    if argv[:1] == ["--verify"] and len(argv) == 2:
        return verify(expand(argv[1]))
    parser = Words(
        prog="prepare_data.py",
        description=__doc__.partition("\n")[0],
        epilog="python prepare_data.py --verify FOLDER holds finished data against the sums in its manifest.json",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder, stdlib, synthetic:N (documents)"
    )
    parser.add_argument("--out", required=True, help="folder of the dataset")
    names = "bpe:N (trained, N ids in all), bytes, a tokenizer.json, " + ", ".join(NAMED)
    parser.add_argument("--tokenizer", default="bpe:8192", help=names)
    parser.add_argument(
        "--val",
        nargs="+",
        dest="val_sources",
        metavar="FILE",
        help="validation text, instead of a share",
    )
    for name, (default, meaning) in OPTIONS.items():
        kind = {"type": float if name in ("val_fraction", "max_bad") else int}
        parser.add_argument(
            f"--{name}",
            default=default,
            help=meaning,
            **({"action": "store_true"} if default is False else kind),
        )
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    command(main, lasting=True)
