"""Inputs to items: one table of readers, each Reading -> items from its offset on.

Parents do this, so it is cheap: files are cut, not parsed, wherever a cut can be found without.
A new format is a function in READERS and its ending in inputs.ENDINGS.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

from lumen import inputs
from lumen.clean import clean
from lumen.columns import read_arrow, read_hf, read_parquet
from lumen.docstrings import docstring_rows
from lumen.inputs import LONGEST, Input, Item, Reading, Unreadable
from lumen.rows import TEXT_FIELDS, behind_lines, csv_delimiter, csv_records
from lumen.streams import PART, Stream, magic_of
from lumen.synthetic import synthetic_document

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEAD = 1 << 20  # bytes that are looked at before a file is read


def read_items(reading: Reading) -> Iterator[Item]:
    """The input's items from (offset, line) on, which are those of an item or row that it gave
    before. What cannot be read is an item too, with its code; what lies before it is kept.

    UserError E003: a package is missing."""
    given = reading.given
    given = given._replace(shape=given.shape or "text")
    reading = reading._replace(given=given)
    try:
        for item in READERS[given.kind](reading):
            yield item._replace(field=given.field, shape=given.shape)
    except Unreadable as error:
        code, reason = error.code, error.reason
        place = error.place or (reading.offset, reading.line)
    except OSError as error:
        code, reason = "E108", str(error.strerror or error)
        place = (reading.offset, reading.line)
    else:
        return
    yield Item(reading.index, code, *place, reason.encode())


def opened(given: Input) -> Stream:
    """The unpacked bytes of a file. OSError; Unreadable: it is no text of the kind that its ending
    says."""
    if not os.path.isfile(given.path):
        raise OSError("not a regular file")
    stream = Stream(given.path)
    head = stream.peek(6)
    reason = ""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        code, reason = "E103", "this is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
    elif magic_of(head):
        code, reason = "E108", f"this is a compressed file ({magic_of(head)}); unpack it first"
        if magic_of(head) in ("gzip", "zstd"):
            reason += ", or end its name on .gz or .zst"
    if reason:
        stream.file.close()
        raise Unreadable(code, reason, 0, 1)
    return stream


def text_begin(head: bytes) -> int:
    """A byte order mark is no text."""
    return len(BYTE_ORDER_MARK) if head[:3] == BYTE_ORDER_MARK else 0


# ---------------------------------------------------------------- a document a file


def read_text(reading: Reading) -> Iterator[Item]:
    with opened(reading.given) as stream:
        begin = text_begin(stream.peek(3))
        stream.skip(begin)
        if reading.given.long:
            yield from read_long_text(reading, stream, begin)
        else:
            yield Item(reading.index, "text", begin, reading.line, stream.all())


def read_long_text(reading: Reading, stream: Stream, begin: int) -> Iterator[Item]:
    """The pieces of a file that has a key; why it has none for another."""
    index, given = reading.index, reading.given
    offset = max(reading.offset, begin)
    stream.skip(offset - begin)
    for at, line, data, last in text_pieces(stream, offset, reading.line):
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


def text_pieces(stream: Stream, offset: int, line: int):
    """(offset, line, data, whether it is the last) of the pieces of a text, from `offset` on, where
    the stream is. Unreadable: damaged, or packed and without a place to cut."""
    length = inputs.PIECE  # the cut lies before; the last piece is longer
    held = b""
    while True:
        enough = max(length, 2 * inputs.PIECE)
        data = held + stream.read(enough + 1 - len(held))
        if len(data) <= enough:
            break
        cut = data.rfind(b"\n", 0, length) + 1 or data.rfind(b" ", 0, length) + 1
        if cut:
            yield offset, line, data[:cut], False
            offset += cut
            line += data.count(b"\n", 0, cut)
            length = inputs.PIECE
        elif stream.codec and length > LONGEST:
            reason = f"{LONGEST >> 20} MiB without a line end or a space"
            raise Unreadable("E122", reason, offset, line)
        else:
            length *= 2
        held = data[cut:]
    stream.check(offset, line)
    yield offset, line, data, True


def document_key(given: Input) -> str:
    """The key of a long text file, in hex: blake2b-16 of its cleaned, stripped text, without
    holding it in memory. The cuts are behind line ends and blanks, so the cleaned pieces are the
    cleaned text. Empty: no UTF-8, no text, or it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    held = ""  # blanks at the end of what was read: they count where more text comes
    begun = False
    with suppress(OSError, UnicodeDecodeError, Unreadable), opened(given) as stream:
        begin = text_begin(stream.peek(3))
        stream.skip(begin)
        for *_, data, last in text_pieces(stream, begin, 1):
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


# ---------------------------------------------------------------- blocks of whole rows


def read_jsonl(reading: Reading) -> Iterator[Item]:
    """Blocks of whole lines. One that begins with an object over several lines is read as a
    .json."""
    with opened(reading.given) as stream:
        head = stream.peek(HEAD)
        begin = text_begin(head)
        stream.skip(begin)
        if begins_spread(head):
            yield from json_items(reading, stream, begin)
            return
        offset = max(reading.offset, begin)
        stream.skip(offset - begin)
        for at, line, data in blocks(stream, (offset, reading.line), reading.block, line_end):
            kind = "jsonl"
            if len(data) > LONGEST and not line_end(data):
                kind = "long packed" if stream.codec else "long"
                data = data[:800]
            yield Item(reading.index, kind, at, line, data)


def line_end(data: bytes) -> int:
    """Where the last whole line ends; 0: there is none."""
    return data.rfind(b"\n") + 1


def blocks(stream: Stream, place: tuple[int, int], size: int, cut: Callable):
    """(offset, line, data) from `place` on, about `size` bytes each, cut where `cut` says. Of a row
    of more than LONGEST bytes the first LONGEST + 1; the next block begins behind its line.
    Unreadable: damaged."""
    offset, line = place
    held = b""
    size = min(size, LONGEST + 1)
    want = size
    while True:
        data = held + stream.read(max(0, want - len(held)))
        ended = len(data) < want
        if ended and not stream.failed:
            if data or place == (offset, line):  # an empty file is an item, too
                yield offset, line, data
            return
        end = cut(data)
        if end:
            yield offset, line, data[:end]
            held = data[end:]
            want = size
        elif want > LONGEST and not ended:  # whatever the size of the blocks
            yield offset, line, data
            length, held = rest_of_line(stream)
            end = want + length
            data = b"\n"
            want = size
        else:
            held = data
            want = min(2 * want, LONGEST + 1)
        offset += end
        line += data.count(b"\n", 0, end)
        if ended:
            stream.check(offset, line)


def rest_of_line(stream: Stream) -> tuple[int, bytes]:
    """(bytes that are passed over, what was read behind them)."""
    length = 0
    while data := stream.read(PART):
        end = data.find(b"\n") + 1
        if end:
            return length + end, data[end:]
        length += len(data)
    return length, b""


def begins_spread(head: bytes) -> bool:
    """Whether a .jsonl begins with an object over several lines."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    with suppress(ValueError, RecursionError):
        return text[:1] == "{" and "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    return False


def read_csv(reading: Reading) -> Iterator[Item]:
    """Blocks of whole records, each with the header before it."""
    with opened(reading.given) as stream:
        begin = text_begin(stream.peek(3))
        stream.skip(begin)
        header, delimiter = csv_header(reading.given, stream)
        stream.skip(len(header))
        first = begin + len(header)
        place = (first, 1 + header.count(b"\n"))
        if reading.offset > first:
            place = (reading.offset, reading.line)
        stream.skip(place[0] - first)

        def record_end(data: bytes) -> int:
            return csv_end(data, delimiter)

        for at, line, data in blocks(stream, place, reading.block, record_end):
            if len(data) > LONGEST and not record_end(data):
                code = "E122" if stream.codec else "E101"
                reason = f"a record of more than {LONGEST >> 20} MiB: a quote that has no end?"
                raise Unreadable(code, f"{reason} Nothing from here on is read", at, line)
            yield Item(reading.index, "csv", at, line, header + data)


def csv_header(given: Input, stream: Stream) -> tuple[bytes, str]:
    """(the first record, its delimiter). Unreadable E101: there is none; E102: no column that can
    be the text."""
    head = stream.peek(HEAD)
    delimiter = csv_delimiter(head)
    _, end, names, wrong = next(csv_records(head, delimiter), (0, 0, [], "the file is empty"))
    if not names or wrong:
        stream.check(0, 1)
        raise Unreadable("E101", f"no header in the first line: {wrong or 'it is blank'}", 0, 1)
    wanted = [given.field] if given.field else TEXT_FIELDS
    if given.shape == "text" and not set(names) & set(wanted):
        raise Unreadable("E102", no_column(given.field, names), 0, 1)
    return head[: behind_lines(head, 0, end)], delimiter


def no_column(field: str, names) -> str:
    wanted = f"{field}" if field else "of text"
    return f"no column {wanted}; the columns are {', '.join(map(str, names))[:300]}"


def csv_end(data: bytes, delimiter: str) -> int:
    """Where the last whole record ends; 0: there is none. Latin-1 finds the same commas, quotes and
    line ends as UTF-8, and takes half a letter."""
    end = line_end(data)
    if b'"' not in data:
        return end
    lines = 0
    for _, behind, _, wrong in csv_records(data[:end], delimiter, "latin-1"):
        if wrong != "unexpected end of data":
            lines = behind
    return behind_lines(data, 0, lines)


# ---------------------------------------------------------------- .json


def read_json(reading: Reading) -> Iterator[Item]:
    with opened(reading.given) as stream:
        begin = text_begin(stream.peek(3))
        stream.skip(begin)
        yield from json_items(reading, stream, begin)


class JsonText:
    """The text of a .json, of which little more than one value is held."""

    def __init__(self, stream: Stream, begin: int):
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text = ""
        self.at = 0  # in the text
        self.line = 1  # there
        self.lines = 1  # at the end of what was read
        self.read = begin  # bytes of the file
        self.bad: Unreadable | None = None  # why there is no more

    def fill(self) -> bool:
        """Takes more of the file; False at its end."""
        if self.bad:
            return False
        data = self.stream.read(max(PART, len(self.text) - self.at))
        try:
            more = self.decode(data, final=len(data) == 0)
        except UnicodeDecodeError as error:
            line = self.lines + error.object.count(b"\n", 0, error.start)
            ahead = len(error.object) - len(data)  # half a letter of the part before
            reason = f"no UTF-8 at byte {self.read - ahead + error.start}"
            self.bad = Unreadable("E103", reason, 0, line)
            more = error.object[: error.start].decode()
        self.read += len(data)
        self.lines += data.count(b"\n")
        self.text = self.text[self.at :] + more
        self.at = 0
        return bool(more)

    def move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next(self) -> str:
        """The next letter that is no space, or "" at the end of the file."""
        while True:
            self.move(SPACE(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def value(self) -> str:
        """The text of the JSON value that begins here. ValueError, RecursionError: there is
        none."""
        while True:
            try:
                end = DECODE(self.text, self.at)[1]
            except ValueError:
                if len(self.text) - self.at > LONGEST:
                    raise ValueError(f"no JSON value of at most {LONGEST >> 20} MiB") from None
                if not self.fill():
                    raise
                continue
            if end < len(self.text) or not self.fill():
                break
        begin = self.at
        self.move(end)
        return self.text[begin:end]


SPACE = re.compile(r"[ \t\r\n]*").match
DECODE = json.JSONDecoder().raw_decode


def json_items(reading: Reading, stream: Stream, begin: int) -> Iterator[Item]:
    """The rows of a .json, a list of objects or objects one after the other, from byte `begin` on,
    where the stream is, without the first `reading.offset`. What is wrong between two rows ends the
    file."""
    text = JsonText(stream, begin)
    n = 0  # rows so far
    line = 1
    try:
        is_list = text.next() == "["
        if is_list:
            text.move(text.at + 1)
        more = not (is_list and text.next() == "]")
        while more:
            text.next()
            line = text.line
            value = text.value()
            if n >= reading.offset:
                yield Item(reading.index, "row", n, line, value.encode())
            n += 1
            more = text.next() == ("," if is_list else "{")
            if more and is_list:
                text.move(text.at + 1)
        line = text.line
        if is_list:
            if text.next() != "]":
                raise ValueError("no ] after the last row")
            text.move(text.at + 1)
        if text.next():
            line = text.line
            raise ValueError("no ] or { where the next row would begin")
    except (ValueError, RecursionError) as error:
        reason = f"{getattr(error, 'msg', error)}; nothing from here on is read"
        stream.check(n, line)
        if text.bad:
            raise Unreadable("E103", text.bad.reason, n, text.bad.place[1]) from None
        raise Unreadable("E101", reason, n, line) from None
    stream.check(n, line)
    if text.bad:
        raise Unreadable("E103", text.bad.reason, n, text.bad.place[1])


# ---------------------------------------------------------------- text without a file


def texts_to_items(reading: Reading, texts) -> Iterator[Item]:
    for n, text in enumerate(texts, reading.offset):
        yield Item(reading.index, "row", n, n + 1, json.dumps({"text": text}).encode())


def read_synthetic(reading: Reading) -> Iterator[Item]:
    numbers = range(reading.offset, reading.given.documents)
    return texts_to_items(reading, (synthetic_document(reading.seed, n) for n in numbers))


def read_topics(reading: Reading) -> Iterator[Item]:
    """The prose of Python's reference, which its library keeps in one table."""
    from pydoc_data.topics import topics

    texts = [topics[key] for key in sorted(topics)]
    return texts_to_items(reading, texts[reading.offset :])


def read_docstrings(reading: Reading) -> Iterator[Item]:
    """Path: docstrings or docstrings:pairs; the split is the last part of the name."""
    kind = reading.given.path.partition(":")[2] or "chat"
    split = reading.given.name.rpartition("/")[2]
    rows = docstring_rows(kind, split)
    for n, row in enumerate(itertools.islice(rows, reading.offset, None), reading.offset):
        yield Item(reading.index, "row", n, n + 1, json.dumps(row).encode())


# A kind of input -> Reading -> its items from Reading.offset on.
READERS: dict[str, Callable] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hf": read_hf,
    "synthetic": read_synthetic,
    "topics": read_topics,
    "docstrings": read_docstrings,
}
