"""Items to rows: what a worker makes of what the parent has cut.

A row is a text, or the JSON object of a conversation or a pair. It is looked at alone: what is
wrong with it is a Reject with its line, never the end of its file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator

from lumen.conversations import LISTS, row_kind
from lumen.inputs import LONGEST, Item, Reject, Row
from lumen.streams import needs

# ---------------------------------------------------------------- what is in a row

# Where no field is given, the first of these that holds text is the text.
TEXT_FIELDS = ("text", "content", "raw_content", "document", "article", "story", "body", "code")
PAIR_FIELDS = ("chosen", "rejected")  # with a prompt or without
# where a table may keep messages as JSON text
MESSAGE_FIELDS = (*LISTS, *PAIR_FIELDS, "prompt", "history")


def is_pair(row: dict) -> bool:
    return row_kind(present(row)) == "pairs"


def is_chat(row: dict) -> bool:
    """Whether there is a conversation in it; chosen and rejected may stand beside."""
    row = {key: value for key, value in present(row).items() if key not in PAIR_FIELDS}
    return row_kind(row) == "chat"


def present(row: dict) -> dict:
    """A null is no field: tables have all columns in all rows."""
    return {key: value for key, value in row.items() if value is not None}


def text_field(row: dict) -> str:
    """The name of the field that holds the text, or ""."""
    for key in TEXT_FIELDS:
        if isinstance(row.get(key), str):
            return key
    return ""


def row_shape(row: dict) -> str | None:
    """ "text", "chat", "pairs", or None: nothing that is known. A text beside a conversation is
    mostly the same, rendered by somebody."""
    kind = row_kind(present(row))
    if kind in ("chat", "pairs"):
        return kind
    return "text" if text_field(row) else None


def value_of(row, field: str, shape: str) -> tuple[str | None, str | dict]:
    """(None, the text or object of a row) or (code, reason)."""
    if not isinstance(row, dict):
        return "E101", f"a {type(row).__name__}, not an object"
    if shape == "any":
        return None, row
    if shape == "text":
        return text_of(row, field)
    if field:
        return messages_of(row, field)
    if shape == "pairs" and is_pair(row) or shape == "chat" and is_chat(row):
        return None, row
    return what_else(row, shape) or ("E102", f"no {shape} in it; {fields_of(row)}")


def text_of(row: dict, field: str) -> tuple[str | None, str]:
    name = field or text_field(row) or "text"
    value = row.get(name)
    if isinstance(value, str):
        return None, value
    if name in row:
        return "E102", f'"{name}" is a {type(value).__name__}, not a string'
    return what_else(row, "text") or ("E102", f'no "{name}" field; {fields_of(row)}')


def messages_of(row: dict, field: str) -> tuple[str | None, str | dict]:
    value = unpacked(row.get(field))
    if isinstance(value, list):
        return None, {"messages": value}
    if field in row:
        return "E102", f'"{field}" is a {type(value).__name__}, not a list of messages'
    return what_else(row, "chat") or ("E102", f'no "{field}" field; {fields_of(row)}')


def what_else(row: dict, shape: str) -> tuple[str, str] | None:
    found = row_shape(row)
    if found in (None, shape):
        return None
    return "E120", f"a row of {found} where {shape} is read; {fields_of(row)}"


def fields_of(row: dict) -> str:
    return f"the fields are {', '.join(map(str, row))[:200] or 'none'}"


def unpacked(value):
    """A list of messages that a table keeps as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(found, list) and all(isinstance(one, dict) for one in found):
            return found
    return value


def of_table(row: dict) -> dict:
    """The object that a row of a table stands for: a table has a null where a key is missing, and
    may hold messages as JSON text."""
    kept = {}
    for key, value in without_nulls(row).items():
        kept[key] = unpacked(value) if key in MESSAGE_FIELDS else value
    return kept


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


# ---------------------------------------------------------------- items to rows


def item_rows(item: Item) -> Iterator[Row]:
    """What a worker makes of an item."""
    make = ROWS.get(item.kind)
    if make:
        yield from make(item)
    else:
        yield Row(item.offset, item.line, item.kind, Reject(item.data.decode(), whole_file=True))


def text_rows(item: Item) -> Iterator[Row]:
    text, bad = decoded(item.data, item.offset, item.line)
    yield bad or Row(item.offset, item.line, None, text)


def json_rows(item: Item) -> Iterator[Row]:
    yield json_row(item, item.data, item.offset, item.line)


def long_rows(item: Item) -> Iterator[Row]:
    code = "E101" if item.kind == "long" else "E122"
    reason = f"a line of more than {LONGEST >> 20} MiB"
    yield Row(item.offset, item.line, code, Reject(reason, excerpt(item.data)))


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
            yield json_row(item, raw, offset, line)
        else:
            blank += 1
        offset += len(raw) + 1
        line += 1
    if blank:
        yield Row(offset - 1, line - 1, "blank", blank)


def decoded(raw: bytes, offset: int, line: int) -> tuple[str, Row | None]:
    """(text, None), or ("", why not)."""
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        at = error.start
    reason = f"byte {raw[at]:#04x} at {offset + at} is not UTF-8"
    line += raw.count(b"\n", 0, at)
    return "", Row(offset, line, "E103", Reject(reason, excerpt(raw[max(0, at - 40) :])))


def json_row(item: Item, raw: bytes, offset: int, line: int) -> Row:
    text, bad = decoded(raw, offset, line)
    if bad:
        return bad
    hint = ""
    if text.lstrip().startswith("["):
        hint = "; a file that is one JSON list should be named .json"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if re.match(r"\s*[\[{]\s*'", text):
            hint = "; single quotes: this is Python's notation, not JSON"
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        said = getattr(error, "msg", str(error)).removesuffix(" at")  # "starting at"
        reason = f"{said}{at}{hint}"
        return Row(offset, line, "E101", Reject(reason, excerpt(raw)))
    code, value = value_of(row, item.field, item.shape)
    if code == "E101":
        value += hint
    return Row(offset, line, code, Reject(value, excerpt(raw)) if code else value)


def excerpt(raw: bytes) -> str:
    """The beginning of a row, on one line: a whole file may be a row, and messages are lines."""
    return " ".join(raw[:800].decode("utf-8", "replace").split())[:200]


# ---------------------------------------------------------------- .csv


def csv_delimiter(data: bytes) -> str:
    """What stands between the cells: a comma where the first line has one, else a tab, a semicolon
    or a bar."""
    header = data.partition(b"\n")[0]
    for mark in (",", "\t", ";", "|"):
        if mark.encode() in header:
            return mark
    return ","


def csv_records(
    data: bytes, delimiter: str, encoding: str = "utf-8"
) -> Iterator[tuple[int, int, list[str], str]]:
    """(first line, line behind it, both from 0; cells; "" or what is wrong) of every record. A
    record ends at a line end outside of quotes (RFC 4180). Bytes that are not UTF-8 become lone
    surrogates."""
    csv.field_size_limit(2 * LONGEST)  # of the module; by itself 128 KiB
    lines = io.TextIOWrapper(io.BytesIO(data), encoding, "surrogateescape", newline="\n")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, reader.line_num, [], str(error)
            continue
        yield first, reader.line_num, cells, ""


def behind_lines(data: bytes, at: int, count: int) -> int:
    """The place behind so many lines from `at` on."""
    for _ in range(count):
        at = data.find(b"\n", at) + 1 or len(data)
    return at


def csv_rows(item: Item) -> Iterator[Row]:
    """The item begins with the header, which is no row of it."""
    data = item.data
    whole = is_utf8(data)
    records = csv_records(data, csv_delimiter(data))
    _, behind, names, _ = next(records)
    begin = end = behind_lines(data, 0, behind)
    row = Row(item.offset, item.line, None, "")
    blank = 0
    for first, after, cells, wrong in records:
        row = Row(item.offset + end - begin, item.line + first - behind, None, "")
        start, end = end, behind_lines(data, end, after - first)
        if not cells and not wrong:
            blank += 1
            continue
        if blank:
            yield row._replace(code="blank", value=blank)
            blank = 0
        raw = data[start:end]
        bad = None if whole else decoded(raw, row.offset, row.line)[1]
        yield bad or csv_row(item, row._replace(code=wrong or None), dict_of(names, cells), raw)
    if blank:
        yield row._replace(code="blank", value=blank)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def dict_of(names: list[str], cells: list[str]) -> dict | str:
    if len(names) != len(cells):
        return f"{len(cells)} cells, but the header has {len(names)}"
    return dict(zip(names, cells))


def csv_row(item: Item, row: Row, cells: dict | str, raw: bytes) -> Row:
    """`row` is its place, with what csv says is wrong as its code."""
    if row.code == "unexpected end of data":
        reason = "a quote that is opened here has no end; nothing from here on is read"
        return row._replace(code="E101", value=Reject(reason, excerpt(raw), whole_file=True))
    wrong = row.code or (cells if isinstance(cells, str) else "")
    if wrong:
        return row._replace(code="E101", value=Reject(wrong, excerpt(raw)))
    if item.shape != "text":
        cells = of_table(cells)
    code, value = value_of(cells, item.field, item.shape)
    return row._replace(code=code, value=Reject(value, excerpt(raw)) if code else value)


# ---------------------------------------------------------------- .parquet, .arrow, hf:


def table_rows(item: Item) -> Iterator[Row]:
    pyarrow = needs("pyarrow", "a table")
    n = item.offset
    with pyarrow.ipc.open_stream(item.data) as batches:
        for batch in batches:
            for row, bad in batch_rows(batch):
                code, value = bad or table_value(item, row)
                yield Row(n, n + 1, code, Reject(value) if code else value)
                n += 1


def table_value(item: Item, row: dict) -> tuple[str | None, str | dict]:
    if item.shape != "text":
        row = of_table(row)
    return value_of(row, item.field, item.shape)


def batch_rows(batch) -> Iterator[tuple[dict, tuple[str, str] | None]]:
    """(row, None), or ({}, why not), of a record batch."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    if rows is not None:
        for row in rows:
            yield row, None
        return
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0], None
        except UnicodeDecodeError as error:
            at = f"byte {error.object[error.start]:#04x} at {error.start} of a value"
            yield {}, ("E103", f"{at} is not UTF-8")


# A kind of item -> item -> its rows.
ROWS: dict[str, Callable] = {
    "text": text_rows,
    "piece": text_rows,
    "last": text_rows,
    "long": long_rows,
    "long packed": long_rows,
    "row": json_rows,
    "jsonl": jsonl_rows,
    "csv": csv_rows,
    "table": table_rows,
}
