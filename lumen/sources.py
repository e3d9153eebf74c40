"""Where text comes from: a source (file, folder, stdlib, synthetic:N) is a list of inputs, an
input is read as items, an item is split into rows.

    find_inputs("texts/")  ->  Input(kind "jsonl", path, size, ...), ...
    read_items(Reading)    ->  Item(kind "jsonl", offset, line, bytes), ...   READERS: one a kind
    item_rows(item)        ->  Row(offset, line, None, text), or Row(offset, line, "E101", Reject)

The parent process makes items, cheaply; a worker makes rows of them. Both are pure functions of
the text. A new format is a function in READERS and its ending in ENDINGS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from lumen import inputs as flow
from lumen.clean import clean
from lumen.errors import UserError
from lumen.files import sha256
from lumen.inputs import ENDINGS, Input, Item, Reading, Reject, Row, kind_of, stored_input
from lumen.synthetic import synthetic_document

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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


# the public names of reading, whichever file holds them
__all__ = ["ENDINGS", "Input", "Item", "Reading", "Reject", "Row", "SourceSpec", "detect"]
__all__ += ["document_key", "file_sha256", "find_inputs", "is_prepared", "item_rows", "kind_of"]
__all__ += ["label", "read_items", "read_specs", "settle_shapes", "stored_input", "what_changed"]

# ---------------------------------------------------------------- what a user asks for


class SourceSpec(NamedTuple):
    """One source as a user describes it: a word, or a mapping of a YAML file."""

    paths: tuple[str, ...]  # files, folders, globs, stdlib, packages, synthetic:N, hf:NAME
    name: str = ""  # default: label(spec)
    weight: float = 1.0
    field: str = ""  # the column or field of the text, or of the messages; "": detected
    shape: str = ""  # "text" | "chat" | "pairs"; "": detected. `kind` in YAML


def read_specs(given, file: str = "") -> list[SourceSpec]:
    """Sources as YAML has them: a word, a list of words and mappings, or {name: word or mapping}
    with path | paths, name, weight, field, kind. E002 names the file and the key."""
    raise NotImplementedError


def settle_shapes(inputs: list[Input]) -> tuple[list[Input], str, list[str]]:
    """The inputs of all sources with `field` and `shape` filled in; the one shape of all of them;
    a line to print for each source. To be called once, when a preparation begins: the inputs in
    its progress.json have both.

    E120: sources of different shapes; E102: a table without a column of text."""
    raise NotImplementedError


def detect(inputs: list[Input]) -> tuple[str, str, str]:
    """(shape, field, line to print) of one source, from its first rows."""
    raise NotImplementedError


def what_changed(was: Input, now: Input) -> bool:
    """Whether an input has other contents than it had; they are read only where size or time
    differ."""
    raise NotImplementedError


# ---------------------------------------------------------------- sources to inputs


def is_builtin(spec: str) -> bool:
    return bool(re.fullmatch(r"stdlib|synthetic(:\d{1,9})?", spec)) and not os.path.exists(spec)


def label(spec: str) -> str:
    """A source's name in the fingerprinted part of the manifest: the last part of its path."""
    return spec if is_builtin(spec) else os.path.basename(os.path.abspath(spec))


def is_prepared(folder: str) -> bool:
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
    """The inputs of one source, in a fixed order; what lies there and is none goes into `unread`:
    {why: [how many, the first]}. The folder `out` is none, nor is any other prepared data.

    UserError E108: not there, nothing readable in it, a folder that may not be entered."""
    if is_builtin(spec):
        if spec == "stdlib":
            return stdlib_inputs(source, split)
        documents = int(spec.partition(":")[2] or 2000)
        size = 600 * documents  # about
        return [Input(source, split, "synthetic", spec, spec, size, documents=documents)]
    if not os.path.exists(spec):
        raise UserError("E108", f"source {spec}: there is no such file or folder")
    endings = " ".join(ENDINGS)
    if not os.path.isdir(spec):
        kind = kind_of(spec)
        if not kind:
            text = f"source {spec}: only {endings} can be read; unpack or convert it first"
            raise UserError("E108", text)
        return [Input(source, split, kind, label(spec), spec).measured()]
    inputs = []
    for path in in_fixed_order(walk(spec, out, {} if unread is None else unread)):
        name = f"{label(spec)}/{relative(path, spec)}"
        inputs.append(Input(source, split, kind_of(path), name, path).measured())
    if not inputs:
        prepared = is_prepared(spec)
        why = "it is data that was prepared already" if prepared else f"no {endings} files in it"
        raise UserError("E108", f"source {spec}: {why}")
    return inputs


def stdlib_inputs(source: int, split: str) -> list[Input]:
    """The running Python's own library: its .py files, and a table of English prose in one of
    them."""
    root = sysconfig.get_path("stdlib")
    inputs = []
    for path in in_fixed_order(walk(root, "", {}, STDLIB_PASSED_OVER)):
        name = f"stdlib/{relative(path, root)}"
        kind = "topics" if name.endswith("pydoc_data/topics.py") else kind_of(path)
        given = Input(source, split, kind, name, path).measured()
        if path.endswith(".py") and given.size and "_sysconfigdata" not in name:
            inputs.append(given)
    return inputs


def in_fixed_order(paths) -> list[str]:
    return sorted(paths, key=lambda path: path.replace(os.sep, "/"))


def relative(path: str, root: str) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def walk(root: str, out: str, unread: dict, passed_over=()) -> Iterator[str]:
    """The paths of the text files in a folder; why others are not read, and which, goes into
    `unread`."""

    def refuse(error: OSError):
        text = f"source {root}: {error.filename} cannot be entered: {error.strerror}"
        raise UserError("E108", text)

    def note(why: str, path: str) -> None:
        unread.setdefault(why, [0, os.path.relpath(path, root)])[0] += 1

    out = os.path.realpath(out) if out else ""
    for folder, folders, names in os.walk(root, onerror=refuse):
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name in passed_over:
                continue
            why = why_not_entered(path, out)
            if why:
                note(why, path)
            else:
                kept.append(name)
        folders[:] = kept  # os.walk goes on with these
        if folder == root and is_prepared(root):
            continue
        for name in sorted(names):
            path = os.path.join(folder, name)
            why = why_not_read(path, out)
            if why is None:
                yield path
            elif why:
                note(why, path)


def why_not_entered(folder: str, out: str) -> str:
    if os.path.basename(folder).startswith("."):
        return "hidden folders"
    if os.path.realpath(folder) == out or is_prepared(folder):
        return "folders of prepared data"
    return "links to folders" if os.path.islink(folder) else ""


def why_not_read(path: str, out: str) -> str | None:
    """None for a text file; "" for what is ours and not worth a word."""
    name = os.path.basename(path)
    if name.startswith("._"):  # what a Mac stores beside a file on a foreign disk
        return "AppleDouble files"
    # of a training run with a prepare: key
    if name.endswith(".error.json") and os.path.realpath(path) == f"{out}.error.json":
        return ""
    if kind_of(path):
        return None
    if os.path.isfile(path):
        return f"ending {os.path.splitext(name)[1].lower() or 'none'}"
    return "pipes, sockets and dead links"


def file_sha256(path: str) -> str:
    """Empty for what is no file or cannot be read: reading it will tell."""
    if os.path.isfile(path):  # opening a pipe would wait for ever
        with suppress(OSError):
            return sha256(path)
    return ""


def document_key(given: Input) -> str:
    """The key of a long text file, in hex: blake2b-16 of its cleaned, stripped text, without
    holding it in memory. The cuts are behind line ends and blanks, so the cleaned pieces are the
    cleaned text. Empty: no UTF-8, or no text."""
    digest = hashlib.blake2b(digest_size=16)
    held = ""  # blanks at the end of what was read: they count where more text comes
    begun = False
    with suppress(OSError, UnicodeDecodeError), open(given.path, "rb") as file:
        begin = text_begin(file.read(3))
        for *_, data, last in text_pieces(file, begin, 1, given.size):
            text = held + clean(data.decode())
            if not begun:
                text = text.lstrip()
            stripped = text.rstrip()
            held = text[len(stripped) :]
            begun = begun or bool(stripped)
            digest.update(stripped.encode())
            if last:
                return digest.hexdigest() if begun else ""
    return ""


# ---------------------------------------------------------------- inputs to items


def read_items(reading: Reading) -> Iterator[Item]:
    """The input's items from (offset, line) on. What cannot be read is an item too, with its
    code."""
    if reading.given.kind in GENERATED:
        for n, text in enumerate(GENERATED[reading.given.kind](reading), reading.offset):
            yield Item(reading.index, "row", n, n + 1, json.dumps({"text": text}).encode())
        return
    offset, line = reading.offset, reading.line
    try:
        if not os.path.isfile(reading.given.path):
            raise OSError("not a regular file")
        with open(reading.given.path, "rb") as file:
            refused = refuse_format(reading.index, file.read(4))
            if refused:
                yield refused
                return
            file.seek(0)
            for item in READERS[reading.given.kind](reading, file):
                yield item
                offset = item.offset + len(item.data)
                line = item.line + item.data.count(b"\n")
    except OSError as error:
        yield Item(reading.index, "E108", offset, line, str(error.strerror or error).encode())


def refuse_format(index: int, head: bytes) -> Item | None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Item(index, "E103", 0, 1, b"this is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if head[:2] == b"\x1f\x8b" or head in (b"PK\3\4", b"\x28\xb5\x2f\xfd"):
        return Item(index, "E108", 0, 1, b"this is a compressed file; unpack it first")
    return None


def text_begin(head: bytes) -> int:
    """A byte order mark is no text."""
    return len(BYTE_ORDER_MARK) if head[:3] == BYTE_ORDER_MARK else 0


def read_text(reading: Reading, file) -> Iterator[Item]:
    begin = text_begin(file.read(3))
    if reading.given.long:
        yield from read_long_text(reading, file, begin)
    else:
        file.seek(begin)
        yield Item(reading.index, "text", begin, reading.line, file.read())


def read_long_text(reading: Reading, file, begin: int) -> Iterator[Item]:
    """The pieces of a file that has a key; why it has none for another."""
    index, given = reading.index, reading.given
    for at, line, data, last in text_pieces(
        file, reading.offset or begin, reading.line, given.size
    ):
        if given.key:
            yield Item(index, "last" if last else "piece", at, line, data)
            continue
        try:
            data.decode()
        except UnicodeDecodeError as error:
            place = at + error.start
            line += data.count(b"\n", 0, error.start)
            byte = f"byte {data[error.start]:#04x} at {place}"
            reason = f"{byte} is not UTF-8; nothing of the file is read"
            yield Item(index, "E103", place, line, reason.encode())
            return
    if not given.key:
        yield Item(index, "E104", 0, 1, b"the file is empty")


def text_pieces(file, offset: int, line: int, size: int):
    """(offset, line, data, whether it is the last) of the pieces of a text file of `size` bytes,
    from `offset` on."""
    while size - offset > 2 * flow.PIECE:
        length = flow.PIECE
        cut = 0
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
        offset += cut
        line += data.count(b"\n", 0, cut)
    file.seek(offset)
    yield offset, line, file.read(), True


def read_jsonl(reading: Reading, file) -> Iterator[Item]:
    """Blocks of whole lines. One that begins with an object over several lines is read as a
    .json."""
    head = file.read((1 << 20) + 4)
    if begins_spread(head):
        file.seek(0)
        yield from read_json_rows(reading, file)
        return
    begin = text_begin(head)
    offset, line = reading.offset or begin, reading.line
    size = reading.block
    while True:
        file.seek(offset)
        data = file.read(size)
        cut = data.rfind(b"\n") + 1
        if len(data) < size:
            if data or offset <= begin:  # an empty file is an item, too
                yield Item(reading.index, "jsonl", offset, line, data)
            return
        if not cut:  # a line longer than the block
            size *= 2
            continue
        yield Item(reading.index, "jsonl", offset, line, data[:cut])
        offset += cut
        line += data.count(b"\n", 0, cut)
        size = reading.block


def begins_spread(head: bytes) -> bool:
    """Whether a .jsonl begins with an object over several lines."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    with suppress(ValueError, RecursionError):
        return text[:1] == "{" and "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    return False


def read_json_rows(reading: Reading, file) -> Iterator[Item]:
    return json_items(reading.index, file.read(), reading.offset)


def json_items(index: int, data: bytes, skip: int) -> Iterator[Item]:
    """The rows of a .json, a list of objects or objects one after the other, without the first
    `skip`. What is wrong between two rows ends the file."""
    skip_space = re.compile(r"[ \t\r\n]*").match
    decode = json.JSONDecoder().raw_decode
    n = 0  # rows so far
    line = 1  # of the row that begins at `begin`
    begin = 0
    try:
        text = data.decode("utf-8-sig")
        end = skip_space(text).end()
        is_list = text[end : end + 1] == "["
        if is_list:
            end = skip_space(text, end + 1).end()
        more = not (is_list and text[end : end + 1] == "]")
        while more:
            line += text.count("\n", begin, end)
            begin = end
            _, end = decode(text, begin)
            if n >= skip:
                yield Item(index, "row", n, line, text[begin:end].encode())
            n += 1
            end = skip_space(text, end).end()
            more = text[end : end + 1] == ("," if is_list else "{")
            if more and is_list:
                end = skip_space(text, end + 1).end()
        if is_list and text[end:].strip() != "]":
            raise ValueError("no ] after the last row")
        if not is_list and text[end:].strip():
            raise ValueError("no { where the next row would begin")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        yield Item(index, "E103", n, line, f"no UTF-8 at byte {error.start}".encode())
    except (ValueError, RecursionError) as error:
        reason = f"{getattr(error, 'msg', error)}; nothing from here on is read"
        yield Item(index, "E101", n, line, reason.encode())


def synthetic_texts(reading: Reading) -> Iterator[str]:
    for n in range(reading.offset, reading.given.documents):
        yield synthetic_document(reading.seed, n)


def topics_texts(reading: Reading) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)][reading.offset :]


# A kind of file -> (Reading, open file) -> its items from Reading.offset on.
READERS: dict[str, Callable] = {"text": read_text, "jsonl": read_jsonl, "json": read_json_rows}
# A kind without a file of its own -> Reading -> texts, one a row.
GENERATED: dict[str, Callable] = {"synthetic": synthetic_texts, "topics": topics_texts}


# ---------------------------------------------------------------- items to rows


def item_rows(item: Item) -> Iterator[Row]:
    """What a worker makes of an item."""
    if item.kind in ("text", "piece", "last", "row"):
        yield parse_row(item.data, item.offset, item.line, item.kind == "row")
    elif item.kind == "jsonl":
        yield from jsonl_rows(item)
    else:
        yield Row(item.offset, item.line, item.kind, Reject(item.data.decode(), whole_file=True))


def jsonl_rows(item: Item) -> Iterator[Row]:
    blank = 0
    offset, line = item.offset, item.line
    lines = item.data.split(b"\n")  # str.splitlines would also split at U+2028 and the like
    if not lines[-1]:
        lines.pop()
    for raw in lines:
        if raw.strip():
            if blank:
                yield Row(offset, line, "blank", blank)
                blank = 0
            yield parse_row(raw, offset, line, True)
        else:
            blank += 1
        offset += len(raw) + 1
        line += 1
    if blank:
        yield Row(offset - 1, line - 1, "blank", blank)


def parse_row(raw: bytes, offset: int, line: int, is_json: bool) -> Row:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        reason = f"byte {raw[at]:#04x} at {offset + at} is not UTF-8"
        line += raw.count(b"\n", 0, at)
        return Row(offset, line, "E103", Reject(reason, excerpt(raw[max(0, at - 40) :])))
    if not is_json:
        return Row(offset, line, None, text)
    code, value = text_of(text)
    return Row(offset, line, code, Reject(value, excerpt(raw)) if code else value)


def excerpt(raw: bytes) -> str:
    return raw[:800].decode("utf-8", "replace").strip()[:200]


def text_of(line: str) -> tuple[str | None, str]:
    """(None, text) of a row {"text": ...}, or (code, reason)."""
    hint = ""
    if line.lstrip().startswith("["):
        hint = "; a file that is one JSON list should be named .json"
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
    for key in ("messages", "conversation", "conversations"):
        if key in row:
            text = f'"{key}": chat data is not supported yet; rows need a "text" field'
            return "E102", text
    if "text" in row:
        return "E102", f'"text" is a {type(row["text"]).__name__}, not a string'
    return "E102", f'no "text" field; the fields are {", ".join(row)[:200] or "none"}'
