"""Reading: every format and compression gives the same rows, in whatever blocks, from wherever it
goes on; what is damaged is said, and what lies before it is kept."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import socket
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumen import columns, inputs, readers, rows, sources, streams
from lumen.errors import UserError
from lumen.inputs import Input, Reading
from lumen.sources import find_inputs, read_spec, settle_shapes

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=400)
TEXTS = [
    "one",
    'a "quoted"\nline,\twith\u2028much\x85in it',
    "",
    "é\U0001f600 " * 9,
    "\r\n",
    "b" * 80,
]

NOISE = [f"row {i} {random.Random(i).randbytes(8).hex()}" for i in range(40)]  # packs badly

# ---------------------------------------------------------------- the formats


def jsonl(texts) -> bytes:
    """A byte order mark, blank lines, Windows line ends, no line end at the end."""
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    ends = ["\n", "\r\n", "\n\n", "\n \r\n"]
    body = "".join(line + ends[i % 4] for i, line in enumerate(lines))
    return b"\xef\xbb\xbf" + body.removesuffix("\n").encode()


def as_json(texts) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False).encode()


def one_after_the_other(texts) -> bytes:
    return "\n\n".join(json.dumps({"text": text}, indent=1) for text in texts).encode()


def as_csv(texts, delimiter=",") -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    for i, text in enumerate(texts):
        writer.writerow([i, text])
        if i % 3 == 1:
            out.write("\r\n")
    return b"\xef\xbb\xbf" + out.getvalue().encode()


def as_tsv(texts) -> bytes:
    return as_csv(texts, "\t")


def as_parquet(texts) -> bytes:
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    out = pyarrow.BufferOutputStream()
    options = {"write_page_checksum": True, "write_statistics": False, "compression": "none"}
    parquet.write_table(table, out, row_group_size=3, **options)
    return out.getvalue().to_pybytes()


def as_arrow(texts, new=pyarrow.ipc.new_file) -> bytes:
    table = pyarrow.table({"text": pyarrow.array(texts, "string")})
    out = pyarrow.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return out.getvalue().to_pybytes()


def as_arrow_stream(texts) -> bytes:
    return as_arrow(texts, pyarrow.ipc.new_stream)


def zst(data: bytes) -> bytes:
    """Two frames, and one that decoders pass over."""
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    half = len(data) // 2
    return pack(data[:half]) + b"\x50\x2a\x4d\x18\4\0\0\0skip" + pack(data[half:])


def gz(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


LINES = {
    "a.jsonl": jsonl,
    "spread.jsonl": one_after_the_other,
    "a.json": as_json,
    "b.json": one_after_the_other,
    "a.csv": as_csv,
    "a.tsv": as_tsv,
}
TABLES = {"a.parquet": as_parquet, "a.arrow": as_arrow, "stream.arrow": as_arrow_stream}
FILES = {name: (make, make) for name, make in (LINES | TABLES).items()}
for _name, _make in LINES.items():
    FILES[f"{_name}.gz"] = (_make, lambda texts, make=_make: gz(make(texts)))
    FILES[f"{_name}.zst"] = (_make, lambda texts, make=_make: zst(make(texts)))


def read(path, offset=0, line=1, block=1 << 20, **more) -> list[sources.Row]:
    """All rows but the counts of blank lines, which end where blocks end."""
    (found,) = find_inputs(str(path), 0, "train")
    found = found._replace(**{"shape": "text", **more})
    reading = Reading(3, found, offset, line, block)
    made = []
    for item in sources.read_items(reading):
        assert item.index == 3 and pickle.loads(pickle.dumps(item)) == item
        made += sources.item_rows(item)
    return [row for row in made if row.code != "blank"]


def codes(made) -> list:
    return [row.code for row in made if row.code]


def texts_of(made) -> list[str]:
    return [row.value for row in made if row.code is None]


def write(folder: Path, name: str, texts) -> Path:
    path = folder / name
    path.write_bytes(FILES[name][1](texts))
    return path


# ---------------------------------------------------------------- the same rows


def check_blocks(folder: Path, texts, block: int) -> None:
    for name in FILES:
        path = write(folder, name, texts)
        whole = read(path)
        assert [row.value for row in whole] == texts, name
        assert read(path, block=block) == whole, name
        plain = folder / name.removesuffix(".gz").removesuffix(".zst")
        assert read(plain) == whole, name


LETTERS = st.text(st.sampled_from('ab \n\r",\t;\u2028\x85é\U0001f600\\{}['), max_size=12)


@QUICK
@given(texts=st.lists(LETTERS, min_size=1, max_size=9), block=st.integers(1, 90))
def test_any_blocks_any_format_any_compression(tmp_path_factory, texts, block):
    """Texts with quotes, line ends of all kinds and half surrogates of meaning: what is read is
    what was written, row for row, in blocks of a byte or of ninety, plain, .gz or .zst."""
    check_blocks(tmp_path_factory.mktemp("f"), texts, block)


@pytest.mark.nightly
@LONG
@given(texts=st.lists(LETTERS, min_size=1, max_size=30), block=st.integers(1, 400))
def test_any_blocks_any_format_any_compression_at_length(tmp_path_factory, texts, block):
    check_blocks(tmp_path_factory.mktemp("f"), texts, block)


@pytest.mark.parametrize("name", FILES)
def test_going_on_from_any_row_or_item(name, tmp_path):
    """A killed preparation goes on from the place of an item, or of a row in it: it gets the rest,
    the same places and lines."""
    path = write(tmp_path, name, TEXTS * 3)
    whole = read(path)
    assert [row.value for row in whole] == TEXTS * 3
    for n, row in enumerate(whole):
        assert read(path, row.offset, row.line, block=50) == whole[n:]
    (found,) = find_inputs(str(path), 0, "train")
    items = list(sources.read_items(Reading(3, found, block=100)))
    assert len(items) > 3
    for item in items:
        rest = read(path, item.offset, item.line)
        assert rest == [row for row in whole if row.offset >= item.offset]


def test_lines_are_an_editors(tmp_path):
    """In a .csv with a header over two lines, blank lines, and line ends in quotes, bad rows are
    named by the line at which they begin."""
    data = '\ufeff"the\nid",text\n1,"a\nb"\n\n\n2,c,d\n3,"e\u2028\x85"\n\n4,caf'.encode()
    path = tmp_path / "a.csv"
    path.write_bytes(data + b'\xe9\n5,"x"y\n6,last\n7,"open\nto the end\n')
    want = [(3, None), (7, "E101"), (8, None), (10, "E103"), (11, "E101"), (12, None), (13, "E101")]
    for block in (1, 20, 1 << 20):
        made = read(path, block=block)
        assert [(row.line, row.code) for row in made] == want
        for row in made:
            begin = path.read_bytes()[row.offset :]
            assert begin[:1].isdigit() and begin[0] - 48 == made.index(row) + 1
    assert made[1].value.reason == "3 cells, but the header has 2"
    assert "has no end" in made[-1].value.reason and made[-1].value.whole_file


def test_blank_lines_are_counted_in_every_block(tmp_path):
    for name, head in (("a.jsonl", ""), ("a.csv", "text\n")):
        row = '{"text": "x"}' if name == "a.jsonl" else "x"
        (tmp_path / name).write_text(head + f"{row}\n\n\n{row}\n\n")
        for block in (1, 9, 1000):
            reading = Reading(0, find_inputs(str(tmp_path / name), 0, "train")[0], block=block)
            made = [row for item in sources.read_items(reading) for row in sources.item_rows(item)]
            assert sum(row.value for row in made if row.code == "blank") == 3
            assert len([row for row in made if row.code is None]) == 2


def test_other_delimiters_and_names_in_quotes(tmp_path):
    """A .csv of a German spreadsheet, one with bars, a .csv.gz with one column."""
    for name, data in (("a.csv", 'nr;"text"\n1;"a;b"\n'), ("b.csv", "text|nr\na;b|2\n")):
        (tmp_path / name).write_text(data)
        assert texts_of(read(tmp_path / name)) == ["a;b"]
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\na b\n"))
    assert texts_of(read(tmp_path / "c.csv.gz")) == ["a b"]


def test_a_json_in_parts(tmp_path, monkeypatch):
    """Whatever of a .json is held: letters, numbers and what is wrong are at their places."""
    data = b'\xef\xbb\xbf[{"text": "\xc3\xa9"},\n 12345,\n\n {"text": "\\u00e9"}'
    for tail, code in (
        (b",\n\n\n\xff]", "E103"),
        (b',\n\n\n{"text" ]', "E101"),
        (b"\n]\n\nx", "E101"),
    ):
        (tmp_path / "a.json").write_bytes(data + tail)
        made = []
        for part in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(readers, "PART", part)
            made.append(read(tmp_path / "a.json"))
        assert all(one == made[0] for one in made)
        places = [(row.offset, row.line, row.code) for row in made[0]]
        assert places[:3] == [(0, 1, None), (1, 2, "E101"), (2, 4, None)]
        assert places[3:] == [(3, 7, code)] and texts_of(made[0]) == ["\xe9", "\xe9"]
        if code == "E103":
            at = (data + tail).index(b"\xff")
            assert made[0][3].value.reason == f"no UTF-8 at byte {at}"


def test_a_text_may_be_packed(tmp_path):
    for name, data in (("a.txt.gz", gz(b"\xef\xbb\xbfbook")), ("b.md.zst", zst(b"book"))):
        (tmp_path / name).write_bytes(data)
        assert texts_of(read(tmp_path / name)) == ["book"]


# ---------------------------------------------------------------- damaged


def test_a_packed_file_is_cut_anywhere(tmp_path):
    """Whatever is missing at its end: the rows before are kept, then one E121 for the whole file,
    at the place where the rows end."""
    texts = NOISE
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst"):
        whole = write(tmp_path, name, texts).read_bytes()
        for cut in {*range(0, len(whole), 37), len(whole) - 1}:
            (tmp_path / name).write_bytes(whole[:cut])
            made = read(tmp_path / name)
            assert [row.value for row in made[:-1]] == texts[: len(made) - 1]
            assert made[-1].code == "E121" and made[-1].value.whole_file, (name, cut)
            assert read(tmp_path / name, block=100) == made
            if len(made) > 1:
                assert read(tmp_path / name, made[-2].offset, made[-2].line) == made[-2:]
        assert len(made) > 1, "the last cut lies behind rows"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a book " * 99)[:-9])
    assert codes(read(tmp_path / "a.txt.gz")) == ["E121"]
    (tmp_path / "b.jsonl.gz").write_bytes(jsonl(texts))
    assert codes(read(tmp_path / "b.jsonl.gz")) == ["E121"]
    (tmp_path / "c.jsonl.gz").write_bytes(gz(jsonl(texts)) + b"more")
    assert codes(read(tmp_path / "c.jsonl.gz")) == ["E121"]


def test_one_bit_of_a_packed_file_is_another(tmp_path):
    """A flipped bit is found by the sums of gzip and zstd, or it lies where it changes nothing."""
    texts = NOISE
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        whole = write(tmp_path, name, texts).read_bytes()
        for at in range(0, len(whole), 23):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            (tmp_path / name).write_bytes(damaged)
            made = read(tmp_path / name)
            same = [row.value for row in made] == texts
            assert same or made[-1].code == "E121", (name, at)


def test_tables_are_cut_or_changed(tmp_path):
    """No footer, half a footer, a page that its sum does not fit, offsets that point elsewhere."""
    texts = NOISE
    for name in TABLES:
        whole = write(tmp_path, name, texts).read_bytes()
        for cut in {0, 1, 6, 300, len(whole) // 2, len(whole) - 9}:
            (tmp_path / name).write_bytes(whole[:cut])
            made = read(tmp_path / name)
            kept = texts_of(made)
            complete = kept == texts  # the mark at the end of a stream may be missing
            assert codes(made) == ["E121"] or complete, (name, cut)
            assert kept == texts[: len(kept)] and (kept or cut < 600 or name != "stream.arrow")
    whole = as_parquet(texts)
    damaged = bytearray(whole)
    damaged[whole.index(texts[20].encode()[:9])] ^= 1
    (tmp_path / "a.parquet").write_bytes(damaged)
    made = read(tmp_path / "a.parquet")
    assert codes(made) == ["E121"] and texts_of(made) == texts[:18]
    assert (made[-1].offset, made[-1].line) == (18, 19)
    for name in ("a.arrow", "stream.arrow"):
        whole = TABLES[name](["abcd" * 4] * 4)
        damaged = bytearray(whole)
        at = whole.index((16).to_bytes(4, "little") + (32).to_bytes(4, "little"))
        damaged[at : at + 4] = (1 << 30).to_bytes(4, "little")
        (tmp_path / name).write_bytes(damaged)
        assert codes(read(tmp_path / name)) == ["E121"]


def test_bad_utf8_in_a_table_is_one_row(tmp_path):
    column = pyarrow.array([b"good", b"caf\xe9", b"also"]).view(pyarrow.string())
    table = pyarrow.table({"text": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        made = read(tmp_path / name)
        assert [(row.line, row.code) for row in made] == [(1, None), (2, "E103"), (3, None)]
        assert "0xe9 at 3" in made[1].value.reason


def test_bombs(tmp_path):
    """80 MB of blank lines in 80 kB, 256 MB in 25 kB, a column of one long text: reading ends
    at the limit."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((b" " * 999 + b"\n") * 80_000))
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [packer.compress((b" " * 999 + b"\n") * 16_000) for _ in range(16)]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(parts) + packer.flush())
    (tmp_path / "c.txt.zst").write_bytes((tmp_path / "b.jsonl.zst").read_bytes())
    table = pyarrow.table({"text": ["a long text " * 90_000] * 70})
    parquet.write_table(table, tmp_path / "d.parquet", compression="zstd", use_dictionary=False)
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.txt.zst", "d.parquet"):
        assert os.path.getsize(tmp_path / name) < 200_000
        made = read(tmp_path / name)
        assert codes(made) == ["E122"] and len(made) == 1, name


def limit_rows(monkeypatch, longest: int) -> None:
    for module in (inputs, readers, rows, streams, columns):
        if hasattr(module, "LONGEST"):
            monkeypatch.setattr(module, "LONGEST", longest)
    monkeypatch.setattr(readers, "PART", 1000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_row_longer_than_all_may_be(name, tmp_path, monkeypatch):
    """Of a plain file it is E101, of a packed one E122, for every size of blocks. A line is passed
    over; a record or a value, whose end nobody knows, ends the file."""
    limit_rows(monkeypatch, 5000)
    good = ["x" * 4900, "y", "z" * 4000]
    for packed, code in (("", "E101"), (".gz", "E122")):
        path = tmp_path / (name + packed)
        path.write_bytes(FILES[path.name][1]([*good, "w" * 9000, "v"]))
        made = [read(path, block=block) for block in (1, 700, 5000, 1 << 20)]
        assert all(one == made[0] for one in made)
        bad = made[0][3]
        assert bad.code == (code if name != "a.json" else "E101") and bad.value.reason
        if name == "a.jsonl":
            assert texts_of(made[0]) == [*good, "v"] and not bad.value.whole_file
            plain = jsonl([*good, "w" * 9000, "v"])
            assert plain[made[0][4].offset :] == b'{"text": "v"}' and made[0][4].line == 7
            assert read(path, bad.offset, bad.line, 9) == made[0][3:]
            path.write_bytes(FILES[path.name][1]([*good, "w" * 9000]))
            assert codes(read(path)) == [code]
        else:
            assert texts_of(made[0]) == good and bad.value.whole_file


def test_a_long_packed_text_is_read_in_pieces(tmp_path, monkeypatch):
    """A book in .gz and .zst is the document that it is in plain: the same pieces at the same
    places, the same key; damaged it is E121 and has no piece."""
    monkeypatch.setattr(inputs, "PIECE", 1000)
    book = "".join(f"{i} {random.Random(i).randbytes(20).hex()}\n" for i in range(300)).encode()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + book)
    (tmp_path / "a.txt.gz").write_bytes(gz(b"\xef\xbb\xbf" + book))
    (tmp_path / "a.txt.zst").write_bytes(zst(b"\xef\xbb\xbf" + book))
    made = []
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        (found,) = find_inputs(str(tmp_path / name), 0, "train")
        assert found.long
        key = sources.document_key(found)
        made.append((key, read(tmp_path / name, key=key)))
        rest = read(tmp_path / name, made[0][1][5].offset, made[0][1][5].line, key=key)
        assert rest == made[0][1][5:]
    assert made[0] == made[1] == made[2] and len(made[0][1]) > 10
    assert "".join(texts_of(made[0][1])).encode() == book
    (tmp_path / "a.txt.gz").write_bytes(gz(book)[:-20])
    (found,) = find_inputs(str(tmp_path / "a.txt.gz"), 0, "train")
    assert sources.document_key(found) == "" and codes(read(tmp_path / "a.txt.gz")) == ["E121"]
    assert texts_of(read(tmp_path / "a.txt.gz")) == []
    limit_rows(monkeypatch, 5000)
    (tmp_path / "b.txt.gz").write_bytes(
        gzip.compress(random.Random(0).randbytes(9000).hex().encode())
    )
    assert codes(read(tmp_path / "b.txt.gz")) == ["E122"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl.zst", TEXTS)
    write(tmp_path, "a.parquet", TEXTS)
    for package, spec in (
        ("zstandard", "a.jsonl.zst"),
        ("pyarrow", "a.parquet"),
        ("datasets", "hf:"),
    ):
        spec = f"hf:{tmp_path}" if spec == "hf:" else str(tmp_path / spec)
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            patch.setitem(sys.modules, package, None)
            for name in list(sys.modules):
                if name.partition(".")[0] == package:
                    patch.setitem(sys.modules, name, None)
            settle_shapes(find_inputs(spec, 0, "train"))
        assert caught.value.code == "E003" and f"pip install {package}" in caught.value.text


# ---------------------------------------------------------------- what rows a source has

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def settle(*specs):
    found = []
    for n, spec in enumerate(specs):
        found += find_inputs(spec if isinstance(spec, tuple) else str(spec), n, "train")
    return settle_shapes(found)


def write_jsonl(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_shapes_and_fields_are_found(tmp_path):
    """Each way in which rows come, and the line that says so."""
    cases = {
        "text": ({"id": 1, "text": "a"}, "text", "text", 'text in "text"'),
        "content": ({"content": "a"}, "text", "content", 'text in "content"'),
        "messages": (CHAT, "chat", "", "conversations"),
        "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "chat", "", "conversations"),
        "pairs": (PAIR, "pairs", "", "pairs of replies (chosen, rejected)"),
        "rendered": ({"text": "a"} | CHAT, "chat", "", "conversations"),
        "nulls": ({"text": "a", "messages": None}, "text", "text", 'text in "text"'),
    }
    for name, (row, shape, field, said) in cases.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", row, row)
        (found,), one, lines = settle(path)
        assert (found.shape, found.field, one) == (shape, field, shape)
        assert lines == [f"{name}.jsonl: {said}"]
        (value,) = {json.dumps(r.value) for r in read(path, shape=shape, field=field)}
        assert value == json.dumps(row[field] if shape == "text" else row)


def test_a_field_is_given(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", {"text": "no", "words": "yes", "turns": CHAT["messages"]}
    )
    for field, shape, value in (("words", "text", "yes"), ("turns", "chat", CHAT)):
        spec = read_spec({"path": str(path), "field": field}, "here")
        (found,), one, _ = settle(spec)
        assert (found.field, one) == (field, shape)
        assert [r.value for r in read(path, field=field, shape=shape)] == [value]
    (row,) = read(path, field="title")
    assert row.code == "E102" and 'no "title" field; the fields are text, words' in row.value.reason


def test_tables_give_the_rows_of_a_jsonl(tmp_path):
    """Conversations in a table have nulls where a .jsonl has no key, or are JSON text: the rows are
    the same. Columns that no JSON can hold are not read."""
    more = {"messages": [{"role": "user", "content": "x", "name": "n"}], "system": "s"}
    write_jsonl(tmp_path / "a.jsonl", CHAT, more)
    table = pyarrow.Table.from_pylist([CHAT | {"system": None}, more])
    table = table.append_column("when", pyarrow.array([1, 2], pyarrow.timestamp("s")))
    parquet.write_table(table, tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(CHAT["messages"])]])
    wanted = [row.value for row in read(tmp_path / "a.jsonl", shape="chat")]
    assert (
        [row.value for row in read(tmp_path / "a.parquet", shape="chat")] == wanted == [CHAT, more]
    )
    assert [row.value for row in read(tmp_path / "a.csv", shape="chat")] == [CHAT]
    assert settle(tmp_path / "a.parquet")[1] == settle(tmp_path / "a.csv")[1] == "chat"


@pytest.mark.parametrize("kind", ["binary", "large_string", "dictionary", "string_view"])
def test_text_columns_of_other_types(kind, tmp_path):
    column = pyarrow.array([text.encode() for text in TEXTS] if kind == "binary" else TEXTS)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "binary":
        column = column.cast(kind)
    table = pyarrow.table({"text": column})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert texts_of(read(tmp_path / "a.arrow")) == TEXTS


def test_one_file_of_mixed_rows(tmp_path):
    """Numbers, texts, conversations and pairs under one another: those of another kind are rejected
    with their lines."""
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, CHAT, {"text": "b"}, PAIR, {"x": 1}, 7)
    (found,), shape, _ = settle(path)
    made = read(path, shape=shape, field=found.field)
    assert [row.code for row in made] == [None, "E120", None, "E120", "E102", "E101"]
    assert [row.line for row in made] == [1, 2, 3, 4, 5, 6]
    made = read(path, shape="chat")
    assert [row.code for row in made] == ["E120", None, "E120", "E120", "E102", "E101"]
    write_jsonl(tmp_path / "b.jsonl", CHAT | PAIR)  # whoever asks for one of both gets it
    for shape in ("chat", "pairs"):
        assert codes(read(tmp_path / "b.jsonl", shape=shape)) == []
    assert settle(tmp_path / "b.jsonl")[1] == "pairs"
    table = pyarrow.table({"text": ["a", None, "c"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    made = read(tmp_path / "a.parquet")
    assert [(row.line, row.code) for row in made] == [(1, None), (2, "E102"), (3, None)]


def test_sources_of_different_kinds(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", {"text": "a"})
    chat = write_jsonl(tmp_path / "chat.jsonl", CHAT)
    with pytest.raises(UserError, match=r"E120.*text.jsonl holds text.*chat.jsonl holds chat"):
        settle(text, chat)
    with pytest.raises(UserError, match="E120.*chat.jsonl holds chat.*text.jsonl holds text"):
        settle(tmp_path)
    with pytest.raises(UserError, match="E120"):
        settle("synthetic:3", chat)
    text.unlink()
    (tmp_path / "README.md").write_text("about these conversations")
    (found,), shape, _ = settle(tmp_path)
    assert shape == "chat" and found.name.endswith("chat.jsonl")
    assert settle("synthetic:3", "stdlib")[1] == "text"


def test_a_table_without_text(tmp_path):
    """The columns that are there are named, at the start and where a later file lacks the
    column."""
    parquet.write_table(pyarrow.table({"id": [1], "words": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("id,words\n1,a\n")
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(UserError, match=f"E102.*{name}.*id, words"):
            settle(tmp_path / name)
        (row,) = read(tmp_path / name)
        assert row.code == "E102" and row.value.whole_file and "words" in row.value.reason
        spec = read_spec({"path": str(tmp_path / name), "field": "words"}, "here")
        (found,), *_ = settle(spec)
        assert texts_of(read(tmp_path / name, field=found.field)) == ["a"]
    (tmp_path / "c.csv").write_bytes(b"")
    (tmp_path / "d.csv").write_bytes(b"text\r1\r2\r")
    assert [codes(read(tmp_path / name)) for name in ("c.csv", "d.csv")] == [["E101"], ["E101"]]


# ---------------------------------------------------------------- where text comes from


def test_specs_of_a_yaml():
    mapping = {"paths": ["a", "b"], "weight": 3, "field": "x", "kind": "chat"}
    spec = read_spec(mapping, "here", "web")
    assert spec == sources.SourceSpec(("a", "b"), "web", 3.0, "x", "chat")
    assert read_spec("d", "here", "c") == sources.SourceSpec(("d",), "c", 1.0, "", "")
    spec = read_spec({"path": "a", "field": "automatic", "kind": "auto"}, "here")
    assert (spec.field, spec.shape) == ("automatic", "")
    assert read_spec("stdlib", "here") == sources.SourceSpec(("stdlib",), "stdlib")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "sources.a: 3 is no path"),
        ({}, "sources.a: one of path and paths"),
        ({"path": "x", "paths": ["y"]}, "one of path and paths"),
        ({"paths": "x"}, "sources.a.paths: 'x' is not a list"),
        ({"path": ["x"]}, "sources.a.path: .* is not a word"),
        ({"path": "x", "wieght": 1}, "sources.a.wieght: there is no such key"),
        ({"path": "x", "weight": 0}, "sources.a.weight: 0 is not a number above 0"),
        ({"path": "x", "weight": True}, "sources.a.weight: True"),
        ({"path": "x", "kind": "dpo"}, "sources.a.kind: dpo is not auto, text"),
        ({"path": "x", "kind": "pairs", "field": "y"}, "sources.a.field: pairs"),
        ({"path": "$NOT_SET_HERE/x"}, "sources.a: .*NOT_SET_HERE is not set"),
    ],
)
def test_specs_that_cannot_be(given, said):
    with pytest.raises(UserError, match=f"E002.*data.yaml: .*{said}"):
        read_spec(given, "data.yaml: sources.a", "a")


def test_inputs_have_one_order(tmp_path, monkeypatch):
    """Whatever the file system gives first; two paths of one source may end alike."""
    for name in ("b/2.txt", "a/10.txt", "a/9.jsonl.gz", "b.txt", "B.md", "a.b/c.csv"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    names = [one.name for one in find_inputs(str(tmp_path / "in"), 0, "train")]
    assert names == sorted(names) and len(names) == 6
    real = os.walk

    def walk(*given, **more):
        for folder, folders, found in real(*given, **more):
            folders.reverse()
            yield folder, folders, found[::-1]

    monkeypatch.setattr(os, "walk", walk)
    assert [one.name for one in find_inputs(str(tmp_path / "in"), 0, "train")] == names
    spec = read_spec(
        {"paths": [str(tmp_path / "in/a"), str(tmp_path / "in/b/../a")], "name": "x"}, "here"
    )
    names = [one.name for one in find_inputs(spec, 0, "train")]
    assert len(names) == len(set(names)) == 4 and names[0] == "x/0/a/10.txt"
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    spec = read_spec(
        {"paths": [str(tmp_path / "chat.jsonl"), "docstrings"], "name": "talk"}, "here"
    )
    _, shape, lines = settle(spec)
    assert shape == "chat" and lines == ["talk: conversations"]


def test_globs(tmp_path, monkeypatch):
    """A quoted pattern: files of it only, neither hidden ones nor prepared data; its name does not
    depend on where it lies."""
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/y/c.txt", "x/.d.jsonl", "out/e.jsonl", "x/y/f.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"text": "x"}\n')
    (tmp_path / "data/out/manifest.json").write_text('{"format": "npy-tokens"}')
    (tmp_path / "data/x/link").symlink_to(tmp_path / "data/x/y")
    spec = str(tmp_path / "data/**/*.jsonl")
    names = [one.name for one in find_inputs(spec, 0, "train")]
    assert names == ["data/x/a.jsonl", "data/x/link/b.jsonl"]
    assert sources.label(spec) == "data/**/*.jsonl"
    unread = {}
    find_inputs(str(tmp_path / "data/x/y/*"), 0, "train", unread=unread)
    assert unread == {"ending .png": [1, "f.png"]}
    monkeypatch.chdir(tmp_path)
    assert [one.path for one in find_inputs("data/x/[ab].jsonl", 0, "val")] == ["data/x/a.jsonl"]
    with pytest.raises(UserError, match=r"E108.*\*.xyz"):
        find_inputs("data/*.xyz", 0, "train")
    (tmp_path / "really[1].txt").write_text("a name with brackets")
    assert find_inputs("really[1].txt", 0, "train")[0].kind == "text"


def test_packages(tmp_path, monkeypatch):
    """Code and prose of what is installed; no tests, nothing that a package carries of others, no
    tables of numbers."""
    files = (
        "p/a.py",
        "p/b.rst",
        "p/c.json",
        "p/tests/d.py",
        "p/_vendor/q/e.py",
        "p-1.dist-info/f.txt",
    )
    for name in (*files, "p/empty.py", "p/table.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "p/empty.py" else "code = 1\n")
    (tmp_path / "p/table.py").write_text("T = [" + "123, 456, " * 9000 + "]")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    found = find_inputs("packages", 0, "train")
    assert [one.name for one in found] == ["packages/p/a.py", "packages/p/b.rst"]
    assert settle_shapes(found)[1] == "text"


def test_inputs_are_stored_and_compared(tmp_path):
    """An Input goes through JSON; an older one has fewer places; time alone is no change."""
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    (found,), *_ = settle(path)
    found = found._replace(sha256=sources.file_sha256(str(path)))
    assert sources.stored_input(json.loads(json.dumps(found))) == found
    old = sources.stored_input(list(found[:10]))
    assert (old.field, old.shape, old.revision) == ("", "text", "")
    os.utime(path, (1, 1))
    assert not sources.what_changed(found, found.measured())
    path.write_text('{"text": "b"}\n')
    os.utime(path, (1, 1))
    assert sources.what_changed(found, found.measured())
    here = Input(0, "train", "hf", "hf:x", "hf:x", revision="1")
    assert sources.what_changed(here, here._replace(revision="2"))
    assert not sources.what_changed(here, here._replace(revision=""))


# ---------------------------------------------------------------- hf:


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of .parquet files, one of .arrow files, one of save_to_disk with two splits."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hf")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    texts = [f"text {i}" for i in range(700)]
    table = pyarrow.table({"text": texts, "n": list(range(700))})
    for name in ("parquet", "arrow"):
        (folder / name).mkdir()
    for part in range(2):
        half = table.slice(350 * part, 350)
        parquet.write_table(half, folder / f"parquet/train-{part}.parquet", row_group_size=99)
        with pyarrow.OSFile(str(folder / f"arrow/train-{part}.arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, half.schema) as writer:
                writer.write_table(half, max_chunksize=77)
    both = datasets.DatasetDict()
    both["train"] = datasets.Dataset(table)
    both["test"] = datasets.Dataset(pyarrow.table({"text": ["held out"]}))
    both.save_to_disk(folder / "saved")
    both["train"].save_to_disk(folder / "one")
    return folder, texts


@pytest.mark.parametrize("name", ["parquet", "arrow", "saved", "one"])
def test_hf_folders(name, saved):
    """What load_dataset or save_to_disk knows as a folder, read by row number, and gone on with."""
    folder, texts = saved
    spec = f"hf:{folder / name}"
    (found,), shape, lines = settle(spec)
    assert (found.kind, found.name, found.field, shape) == ("hf", f"hf:{name}", "text", "text")
    assert found.revision and found.size > 3000 and lines == [f'hf:{name}: text in "text"']
    made = read(spec, block=2000)
    assert texts_of(made) == texts
    assert [row.line for row in made] == list(range(1, 701))
    for n in (0, 1, 255, 256, 351, 699):
        assert read(spec, made[n].offset, made[n].line, 500) == made[n:]
    if name in ("saved", "one"):  # the same files as any others
        plain = [one for one in find_inputs(str(folder / name), 0, "train") if "train" in one.name]
        assert name == "one" or {one.kind for one in plain} == {"arrow"}
    if name == "saved":
        assert texts_of(read(f"{spec}:test")) == ["held out"]


def test_hf_that_cannot_be(saved, monkeypatch):
    folder, _ = saved
    with pytest.raises(UserError, match="E002.*nothing"):
        settle(f"hf:{folder / 'saved'}::nothing")
    with pytest.raises(UserError, match="E002.*nothing"):
        settle(f"hf:{folder / 'parquet'}::nothing")
    with pytest.raises(UserError, match="E002.*it is written hf:NAME"):
        find_inputs("hf:a:b:c:d", 0, "train")
    with pytest.raises(UserError, match="E108.*no such folder"):
        find_inputs("hf:/not/here", 0, "train")

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(UserError, match="E108.*huggingface.co cannot be reached"):
        find_inputs("hf:owner/name", 0, "train")


def test_the_hub_is_lost_on_the_way(monkeypatch):
    """Half of the rows are no whole: the same command goes on, nothing is taken for an end."""

    class Lost:
        def iter(self, batch_size):
            yield pyarrow.table({"text": ["a", "b"]})
            raise RuntimeError("503 of the Hub")

    monkeypatch.setattr(columns, "open_hf", lambda given: Lost())
    here = Input(0, "train", "hf", "hf:x/y", "hf:x/y")
    with pytest.raises(UserError, match="E003.*row 2: 503 of the Hub"):
        list(sources.read_items(Reading(0, here)))


def test_kinds_by_name():
    kinds = {"a.JSONL.GZ": "jsonl", "a.parquet.gz": "", "a.gz": "", "a.txt.zst": "text", "a": ""}
    assert {name: sources.kind_of(name) for name in kinds} == kinds


def test_hf_names():
    assert columns.split_name("hf:a/b") == ("a/b", "", "train")
    assert columns.split_name("hf:a/b:test") == ("a/b", "", "test")
    assert columns.split_name("hf:a/b:train[:10%]") != ("a/b", "train", "10%]")
    assert columns.split_name("hf:a/b:sample-10BT") == ("a/b", "sample-10BT", "train")
    assert columns.split_name("hf:a/b:en:validation") == ("a/b", "en", "validation")
    assert columns.split_name("hf:a/b::odd") == ("a/b", "", "odd")


def test_a_changed_folder_has_another_revision(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    before = columns.folder_state(str(tmp_path))
    os.utime(tmp_path / "a.parquet", (1, 1))
    assert columns.folder_state(str(tmp_path)) == before
    parquet.write_table(pyarrow.table({"text": ["a", "c"]}), tmp_path / "a.parquet")
    assert columns.folder_state(str(tmp_path)) != before
