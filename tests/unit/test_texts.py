"""Texts as they come: long, broken, unreadable, prepared twice, prepared by an older Lumen."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from rig import bytes_data

import prepare_data
from lumen import inputs, tokenizer, windows
from lumen.bpe import LONGEST_TOKEN
from lumen.errors import ERRORS, UserError


def read_back(folder, split="train") -> list[str]:
    """The documents of a split, found by the end-of-text id alone."""
    made = tokenizer.load(str(folder))
    files = sorted(Path(folder).glob(f"{split}_*[0-9].npy"))
    text = made.decode(np.concatenate([np.load(f) for f in files])) if files else ""
    assert text.endswith("<|endoftext|>") or not text
    return text.split("<|endoftext|>")[:-1]


BOOK = "".join(f"Line {i} of a book that is longer than all the notes.\n" for i in range(900))


def test_a_book_of_many_pieces_is_one_document(tmp_path, monkeypatch):
    """A text file too long to be read at once, between notes: it lies in one split, whole and with
    one end, whatever the seed, the shards and the number of workers."""
    monkeypatch.setattr(inputs, "PIECE", 7_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "book.txt").write_text(BOOK)
    (tmp_path / "in" / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"note {i}"}) + "\n" for i in range(30))
    )
    (tmp_path / "in" / "same.txt").write_text(BOOK + "\n\n")  # duplicates are told by document too
    (tmp_path / "in" / "z.jsonl").write_text(json.dumps({"text": BOOK}))
    sides = set()
    for seed in (1, 2, 3):
        out = tmp_path / f"out{seed}"
        manifest = bytes_data(
            out, tmp_path / "in", seed=seed, val_fraction=0.3, shard_tokens=7000, max_doc_chars=900
        )
        train, val = read_back(out), read_back(out, "val")
        assert (BOOK in train) + (BOOK in val) == 1 and len(train) + len(val) == 31 == manifest[
            "counts"
        ]["kept"]
        assert manifest["counts"]["dropped"] == {"E107": 2} and manifest["counts"]["cut"] == 1
        assert [manifest["splits"][s]["docs"] for s in ("train", "val")] == [len(train), len(val)]
        assert json.loads((out / "report.json").read_text())["counts"]["parts"] > 80
        sides.add(BOOK in val)
    assert sides == {True, False}


def test_a_long_book_among_pieces_is_killed_at_every_journal(tmp_path, monkeypatch):
    """The preparation of long files ends at each of its journals: what goes on from there gives the
    same bytes."""
    monkeypatch.setattr(inputs, "PIECE", 5_000)
    (tmp_path / "in").mkdir()
    for i, text in enumerate(
        (BOOK[:25_000], "a note", BOOK[:25_000], BOOK[25_000:].replace("\n", "\r\n"))
    ):
        (tmp_path / "in" / f"{i}.txt").write_text(text, newline="")
    options = {"shard_tokens": 3_000, "max_doc_chars": 1_000, "val_fraction": 0.4}
    whole = bytes_data(tmp_path / "whole", tmp_path / "in", **options)
    journal, stops = prepare_data.Output.journal, 0

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Output, "journal", stop)
    while True:
        try:
            again = bytes_data(tmp_path / "again", tmp_path / "in", **options)
            break
        except KeyboardInterrupt:
            stops += 1
    assert (
        stops > 5 and again["counts"]["cleaned"] == 1 and again["counts"]["dropped"] == {"E107": 1}
    )
    for file in sorted((tmp_path / "whole").glob("*.*")):
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert again["fingerprint"] == whole["fingerprint"]


def test_one_long_file_alone_gives_its_end_to_validation(tmp_path, monkeypatch):
    """All the text is one long file: a share of it, its end, is held out, and the rest has one end
    of text."""
    monkeypatch.setattr(inputs, "PIECE", 12_000)
    (tmp_path / "book.txt").write_text(BOOK)
    for fraction in (0.05, 0.4):  # it is drawn for training, or for validation
        out = tmp_path / f"{fraction}"
        manifest = bytes_data(out, tmp_path / "book.txt", val_fraction=fraction, shard_tokens=5000)
        (head,), (tail,) = read_back(out), read_back(out, "val")
        assert head + tail == BOOK and tail.startswith("Line")
        assert fraction / 2 < len(tail) / len(BOOK) < 2 * fraction
        assert manifest["counts"]["tail_held_out"] == 1


def test_one_bad_byte_in_a_long_file(tmp_path, monkeypatch):
    """A long file that is no UTF-8 somewhere in its middle: none of it is taken, and the line is
    named."""
    monkeypatch.setattr(inputs, "PIECE", 9_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(
        BOOK[:30_000].encode() + b"\xe9" + BOOK[30_000:].encode()
    )
    (tmp_path / "in" / "b.txt").write_text("a good one")
    with pytest.raises(UserError, match="E109.*whole files lost.*a.txt") as caught:
        bytes_data(tmp_path / "out", tmp_path / "in")
    assert (
        f"a.txt:{1 + BOOK.count(chr(10), 0, 30_000)}:" in caught.value.text
        and "--max_bad" in caught.value.text
    )


def test_a_share_far_from_what_was_asked_for_is_said(tmp_path, capsys):
    """Half of the text is drawn for validation where five percent were asked for: a line says
    so."""
    rows = [{"text": f"short {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows + [{"text": "long " * 2000}])
    )
    said = set()
    for seed in range(6):
        manifest = bytes_data(
            tmp_path / f"{seed}", tmp_path / "a.jsonl", seed=seed, val_fraction=0.2, quiet=False
        )
        tokens = [manifest["splits"][s]["tokens"] for s in ("train", "val")]
        far = not 0.1 <= tokens[1] / sum(tokens) <= 0.4
        assert ("were asked for" in capsys.readouterr().out) == far
        said.add(far)
    assert True in said


def old_rules(folder) -> None:
    """Makes of a prepared folder one as the Lumen before this one left it."""
    for name in ("manifest.json", "progress.json"):
        if (path := Path(folder, name)).exists():
            whole = json.loads(path.read_text())
            whole["provenance"].pop("rules", None)
            whole["provenance"].pop("not_read", None)
            whole["provenance"]["inputs"] = [row[:8] for row in whole["provenance"]["inputs"]]
            whole.get("state", {}).pop("open", None)
            path.write_text(json.dumps(whole))


def test_data_prepared_by_an_older_lumen(tmp_path, capsys, monkeypatch):
    """The sources of finished data are prepared again after an upgrade: they are reused, and where
    documents were cut a note says what is in them. What was begun is begun anew."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(BOOK)
    (tmp_path / "in" / "b.txt").write_text("short")
    made = bytes_data(tmp_path / "out", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)
    old_rules(tmp_path / "out")
    (tmp_path / "in" / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    again = bytes_data(
        tmp_path / "out", tmp_path / "in", max_doc_chars=900, shard_tokens=9000, quiet=False
    )
    said = capsys.readouterr().out
    assert (
        again["fingerprint"] == made["fingerprint"]
        and "end-of-text at every cut" in said
        and "--verify" in said
    )

    journal = prepare_data.Output.journal
    for path in (tmp_path / "in").glob("[0-9]*"):
        path.unlink()
    (tmp_path / "in" / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 900}) + "\n" for i in range(30))
    )

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.Output, "journal", stop)
        bytes_data(tmp_path / "half", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)
    old_rules(tmp_path / "half")
    half = bytes_data(
        tmp_path / "half", tmp_path / "in", max_doc_chars=900, shard_tokens=9000, quiet=False
    )
    assert "begun anew" in capsys.readouterr().out
    assert (
        half["fingerprint"]
        == bytes_data(tmp_path / "new", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)[
            "fingerprint"
        ]
    )


def test_a_run_of_a_million_letters(tmp_path):
    """Genomes, ruled lines, base64 of zeros, and a blank file of a million spaces: a vocabulary is
    trained on them and written; no token is longer than 128 bytes; what comes back is the text."""
    for text in (
        "Some words. " * 80 + "N" * 200_000,
        "=" * 200_000 + "x",
        "ab" * 99_000,
        "x" + " " * 10**6 + "y",
    ):
        made = tokenizer.train_bpe([text], 600)
        assert max(map(len, made.ranks)) <= LONGEST_TOKEN == 128
        assert (
            made.decode(made.encode(text)) == text
            and made.token_bytes().max() <= 128
            and len(made.sha256) == 64
        )


def test_a_foreign_vocabulary_with_a_token_of_70000_letters(tmp_path):
    """A tokenizer.json of somebody who trained without such a limit: it is read, written and
    measured."""
    ranks = {bytes([i]): i for i in range(256)} | {b"N" * 2**k: 255 + k for k in range(1, 17)}
    made = tokenizer.Tokenizer(
        "x", ranks, {name: 300 + i for i, name in enumerate(tokenizer.SPECIALS)}
    )
    made.save(tmp_path / "tokenizer.json")
    again = tokenizer.load(str(tmp_path))
    assert again.ranks == made.ranks and again.token_bytes().max() == 2**16
    assert again.encode("N" * 2**16).tolist() == [255 + 16]


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    """One folder of the source is shut: that is an error, not half of the text."""
    for name in ("open", "shut"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.txt").write_text(name)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="E108.*shut cannot be entered: Permission denied"):
        bytes_data(tmp_path / "out", tmp_path / "in")


def test_what_is_not_read_is_said(tmp_path, capsys):
    """A source with everything in it that is no text for us: each kind is counted and named in one
    line."""
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "y.txt").write_text("elsewhere")
    os.symlink(tmp_path / "else", folder / "link")
    os.mkfifo(folder / "pipe")
    (folder / "good.txt").write_text("good text " * 300)
    (folder / "._good.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    for name in ("a.pdf", "b.pdf", "LICENSE"):
        (folder / name).write_text("x")
    bytes_data(folder / "data", folder)  # a data set of ours, in the source of the next
    capsys.readouterr()
    bytes_data(tmp_path / "out", folder, quiet=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not read:")]
    for line in ("1 hidden folders, as .git", "1 links to folders, as link", "1 folders of prepared data, as data",
                 "1 AppleDouble files, as ._good.txt", "1 pipes, sockets and dead links, as pipe",
                 "3 files of other endings: .pdf 2, none 1"):  # fmt: skip
        assert f"not read: {line}" in said
    assert (
        len(said) == 6
        and json.loads((tmp_path / "out" / "report.json").read_text())["not_read"]["ending .pdf"]
    )
    assert [*read_back(tmp_path / "out"), *read_back(tmp_path / "out", "val")] != ["hidden"]


def test_data_are_prepared_into_a_folder_inside_their_source(tmp_path, monkeypatch):
    """--out texts/prepared: the same command finds it again, and goes on after it was killed
    there."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 20)
    journal = prepare_data.Output.journal

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.Output, "journal", stop)
        bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900)
    (tmp_path / "prepared.error.json").write_text(
        "{}"
    )  # what train.py leaves where ranks must hear of an error
    made = bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900)
    assert (
        bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900) == made
        and made["counts"]["rows"] == 40
    )


def test_names_that_are_no_utf8(tmp_path):
    """A file name in latin-1, good or with bad text in it: the second start finds the data, also of
    an older Lumen."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"caf\xe8.txt", b"b.txt"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_text(
            f"a good text {len(name)} {name[3]}"
        )
    Path(os.fsdecode(bytes(folder) + b"/bad\xe9.txt")).write_bytes(b"\xff")
    made = bytes_data(tmp_path / "out", folder, max_bad=1)
    assert bytes_data(tmp_path / "out", folder, max_bad=1) == made
    path = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["file"]
    assert os.path.exists(path) and "bad" in path
    old_rules(tmp_path / "out")
    whole = (tmp_path / "out" / "manifest.json").read_text()
    for escape in ("\\udce9", "\\udce8"):
        whole = whole.replace(escape, "?")
    (tmp_path / "out" / "manifest.json").write_text(whole)
    assert bytes_data(tmp_path / "out", folder, max_bad=1)["fingerprint"] == made["fingerprint"]


def test_two_runs_prepare_one_folder(tmp_path, capsys):
    """The second of a sweep comes while the first prepares: it waits, says so, and takes what is
    made. Nothing tells anybody to delete a folder."""
    (tmp_path / "a.txt").write_text("text " * 900)
    made, out = [], tmp_path / "out"
    with prepare_data.holding(str(out)):
        second = threading.Thread(
            target=lambda: made.append(bytes_data(out, tmp_path / "a.txt", quiet=False)),
            daemon=True,
        )
        second.start()
        said, until = "", time.time() + 20
        while "waiting for it" not in said and time.time() < until:
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert "waiting for it" in said and not made
    second.join(
        20
    )  # the first had nothing to leave there: its empty folder is gone, and made again
    assert made and (out / "manifest.json").exists()
    assert not [text for pair in ERRORS.values() for text in pair if "delete" in text]


def test_ctrl_c_while_workers_prepare(tmp_path):
    """Ctrl-C on the terminal reaches all processes: no traceback of any, and the same command goes
    on."""
    words = [sys.executable, "prepare_data.py", "synthetic:30000", "--out", str(tmp_path / "out")]
    words += ["--tokenizer", "bytes", "--workers", "2", "--shard_tokens", "100000"]
    process = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "out" / "progress.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)  # the workers are importing now
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_sums_are_not_read_again_on_resume(tmp_path, monkeypatch):
    """A run is resumed: shards that were verified and were not touched since are not read again;
    one that was is."""
    bytes_data(tmp_path / "data", "synthetic:60", shard_tokens=5000)
    read, real = [], windows.sha256
    monkeypatch.setattr(
        windows, "sha256", lambda path, *more: read.append(path) or real(path, *more)
    )
    for touched, wanted in ((False, None), (False, 0), (True, 1)):
        source = windows.Source(str(tmp_path / "data"), "train", 16)
        if touched:
            os.utime(source.shards[0].path, (1, 1))
            source = windows.Source(str(tmp_path / "data"), "train", 16)
        read.clear()
        sums = windows.Sums([source], str(tmp_path / "verified.jsonl"))
        sums.thread.join(20)
        assert sums.error is None and len(read) == (
            len(source.shards) if wanted is None else wanted
        )


def test_text_is_given_where_tokens_belong(tmp_path):
    """--data_dir my_texts, or a .jsonl: the message says what to type; nobody is told to write into
    it."""
    (tmp_path / "my_texts" / "sub").mkdir(parents=True)
    (tmp_path / "my_texts" / "sub" / "a.md").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name, stem in (("my_texts", "my_texts"), ("rows.jsonl", "rows")):
        with pytest.raises(UserError, match="E110.*is text, not tokens") as caught:
            windows.Source(str(tmp_path / name), "train", 8)
        assert f"python prepare_data.py {tmp_path / name} --out data/{stem}" in caught.value.text
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="E110.*--out data/NAME"):
        windows.Source(str(tmp_path / "pictures"), "train", 8)


def test_objects_over_several_lines(tmp_path):
    """Three records, each over several lines, in a .jsonl or one after the other in a .json: they
    are read."""
    records = "\n".join(json.dumps({"text": f"record {i}"}, indent=2) for i in range(3))
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(records)
        assert (
            bytes_data(tmp_path / f"out {name}", tmp_path / name, val_fraction=0)["counts"]["kept"]
            == 3
        )
    (tmp_path / "b.jsonl").write_text(records + "\n{")  # the cause is named once, not at each line
    with pytest.raises(UserError, match="E109.*1 of 4 rows"):
        bytes_data(tmp_path / "out b", tmp_path / "b.jsonl", val_fraction=0)


def test_one_byte_of_text(tmp_path, capsys):
    """A text of one letter is no data to train on: it is not called ready, and numbers in its
    manifest are numbers."""
    (tmp_path / "a.txt").write_text("a")
    made = bytes_data(tmp_path / "out", tmp_path / "a.txt", quiet=False)
    assert "is ready" not in capsys.readouterr().out and read_back(tmp_path / "out") == ["a"]
    assert type(made["counts"]["cut"]) is int and type(made["counts"]["cleaned"]) is int
