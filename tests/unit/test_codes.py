"""Every code of data (E101 to E124): a bad input, and what is said of it, word by word.

What is said stands in codes.txt. After a change of words, and to see what it is now:
WRITE_CODES=1 python -m pytest tests/unit/test_codes.py
"""

import contextlib
import gzip
import io
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import prepare_data as P
from lumen.config import build_config
from lumen.data import open_data
from lumen.errors import ERRORS, UserError
from lumen.windows import Source, anew

GOLDEN = Path(__file__).with_name("codes.txt")
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def lines(*rows) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def row_file(name: str, data: bytes, **options):
    """A file with a bad row behind a good one."""

    def make(folder: Path):
        (folder / name).write_bytes(data)
        return P.prepare([str(folder / name)], str(folder / "out"), "bytes", quiet=True, **options)

    return make


def parquet(folder: Path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), folder / "a.parquet")
    P.prepare([str(folder / "a.parquet")], str(folder / "out"), "bytes", quiet=True)


def damaged_shard(folder: Path):
    out = prepared(folder)
    (out / "train_00000.npy").write_bytes((out / "train_00000.npy").read_bytes()[:-1])
    P.prepare(["synthetic:20"], str(out), "bytes", quiet=True)


def prepared(folder: Path) -> Path:
    P.prepare(["synthetic:20"], str(folder / "out"), "bytes", quiet=True)
    return folder / "out"


def chats(folder: Path, seq_len=16) -> Path:
    rows = [json.dumps(CHAT).replace("yes", "yes " * n) + "\n" for n in range(1, 40)]
    (folder / "c.jsonl").write_text("".join(rows))
    P.prepare([str(folder / "c.jsonl")], str(folder / "out"), "bytes", quiet=True, seq_len=seq_len)
    return folder / "out"


PAIR = {"prompt": "a?", "chosen": "good", "rejected": "bad"}


def pairs(folder: Path) -> Path:
    (folder / "p.jsonl").write_text(
        "".join(json.dumps(PAIR | {"prompt": str(n)}) + "\n" for n in range(30))
    )
    P.prepare([str(folder / "p.jsonl")], str(folder / "out"), "bytes", quiet=True, seq_len=64)
    return folder / "out"


def config(folder: Path, method="sft", **more):
    tree = {"data_dir": str(folder), "out_dir": str(folder / "run"), "method": method}
    tree["model"] = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16, **more}
    return build_config(tree, lambda key: key, [])


def save(folder: Path, array) -> str:
    np.save(folder / "train_0.npy", array)
    return str(folder)


def too_long(folder: Path):
    """No error: it is listed."""
    (folder / "c.jsonl").write_bytes(
        lines(CHAT, b"\n", {**CHAT, "id": 1}).replace(b"hi", b"hi" * 99, 1)
    )
    P.prepare([str(folder / "c.jsonl")], str(folder / "out"), "bytes", quiet=True, seq_len=64)
    line = json.loads((folder / "out" / "rejected.jsonl").read_text())
    raise UserError(line["code"], f"{line['file']}:{line['line']}: {line['reason']}")


def two_kinds(folder: Path):
    (folder / "c.jsonl").write_bytes(lines(CHAT))
    (folder / "t.jsonl").write_bytes(lines({"text": "words"}))
    P.prepare(
        [str(folder / "c.jsonl"), str(folder / "t.jsonl")], str(folder / "out"), "bytes", quiet=True
    )


def foreign(folder: Path):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    P.prepare(["synthetic:20"], str(folder / "out"), "bytes", quiet=True)


def no_tokenizer(folder: Path):
    (folder / "t.json").write_text('{"model": {"type": "Nonsense"}}')
    P.prepare(["synthetic:20"], str(folder / "out"), str(folder / "t.json"), quiet=True)


GOOD = b'{"text": "good words"}\n'
CASES = {
    "E101": row_file("a.jsonl", GOOD + b"{'text': 1}\n", strict=True),
    "E102": row_file("a.jsonl", GOOD + b'{"words": "x"}\n', strict=True),
    "E102 table": parquet,
    "E103": row_file("a.jsonl", GOOD + b'{"text": "\xff"}\n', strict=True),
    "E104": row_file("a.jsonl", GOOD + b'{"text": " "}\n', strict=True),
    "E105": row_file("a.jsonl", lines(CHAT, b"\n", {"messages": [{"role": "wizard", "content": "x"}]}), strict=True),
    "E106": too_long,
    "E108": lambda folder: P.prepare([str(folder / "none")], str(folder / "out"), "bytes"),
    "E109": row_file("a.jsonl", GOOD + b"nothing\n"),
    "E110": lambda folder: Source(str(folder), "train", 8),
    "E111": damaged_shard,
    "E112": lambda folder: Source(save(folder, np.zeros((2, 2), np.int64)), "train", 1),
    "E113": lambda folder: open_data(config(prepared(folder), vocab_size=17)),
    "E114": lambda folder: Source(save(folder, np.zeros(4, np.uint16)), "train", 8),
    "E115": lambda folder: P.prepare(["synthetic:9"], str(folder / "out"), str(folder / "t.json")),
    "E116": no_tokenizer,
    "E117": foreign,
    "E119": lambda folder: P.prepare(["synthetic:9"], "/proc/none", "bytes", quiet=True),
    "E120": two_kinds,
    "E121": row_file("a.jsonl.gz", gzip.compress(GOOD * 999)[:-20], strict=True),
    "E122": row_file("a.jsonl.gz", gzip.compress(b" " * (80 << 20)), strict=True),
    "E123": lambda folder: Source(str(chats(folder, seq_len=40)), "train", 16),
    "E124": lambda folder: open_data(config(pairs(folder))),
    "E124 text": lambda folder: open_data(config(prepared(folder), method="dpo")),
    "E126": lambda folder: open_data(config(pairs(folder), method="dpo")),
    "E126 row": row_file("p.jsonl", lines(PAIR, b"\n", {**PAIR, "rejected": "good "}), strict=True),
}  # fmt: skip


def said(case: str, folder: Path) -> str:
    """What is said, on one line, without what differs from machine to machine."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            CASES[case](folder)
        except UserError as error:
            text = f"{error.code}: {error.text}"
        else:
            text = "nothing is said"
    text = text.replace(str(folder), "DIR").replace(str(ROOT), "ROOT").replace("\n", " / ")
    return re.sub(r" +", " ", text)


def golden() -> dict[str, str]:
    found = {}
    if not GOLDEN.exists():
        return found
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        case, _, text = line.partition(" | ")
        found[case] = text
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_a_bad_input(case, tmp_path):
    text = said(case, tmp_path)
    if os.environ.get("WRITE_CODES"):
        known = golden() | {case: text}
        GOLDEN.write_text("".join(f"{name} | {known[name]}\n" for name in CASES if name in known))
    assert text.startswith(case.split()[0]) and text == golden()[case]


def test_every_code_of_data_has_a_case():
    """Duplicates (E107) are no error; E118 is said by a run: tests/runs/test_mixture.py."""
    codes = {code for code in ERRORS if "E101" <= code <= "E126"} - {"E125"}
    assert codes == {case.split()[0] for case in CASES} | {"E107", "E118"}


def test_the_command_that_a_message_names_makes_data_that_fit(tmp_path, capsys):
    folder = chats(tmp_path, seq_len=40)
    with pytest.raises(UserError) as error:
        Source(str(folder), "train", 60)
    named = error.value.text.partition("data anew: ")[2].partition(" (and the other")[0]
    words = shlex.split(named)
    assert words[:2] == ["python", "prepare_data.py"] and P.main(words[2:]) in (0, None)
    assert Source(f"{folder}-anew", "train", 60).windows
    inputs = [(0, "hash", "text", "a b.txt", "/x/a b.txt"), (1, "hash", "text", "c/d/e", "~/c/d/e")]
    inputs += [
        (2, "hash", "text", "stdlib/os.py", "/lib/os.py"),
        (-1, "val", "tokenizer", "t", "t"),
    ]
    settings = {"sources": ["a b.txt", "c", "stdlib"]}
    manifest = {"settings": settings, "provenance": {"inputs": inputs}}
    named = anew("data/x/", manifest, 16, "run/tokenizer.json").partition(" (")[0]
    there = "--out data/x-anew --tokenizer run/tokenizer.json"
    assert (
        named == f"python prepare_data.py '/x/a b.txt' '~/c' stdlib {there}"
    )  # windows of text fit any length
