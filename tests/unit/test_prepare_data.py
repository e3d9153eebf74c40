"""prepare_data.py: the same bytes whatever happens, no text lost in silence, every bad row
named."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import prepare_data as P
from lumen import inputs, pool, readers, sources
from lumen import tokenizer as T
from lumen.clean import clean, cut_text
from lumen.errors import UserError
from lumen.launch import in_bytes
from lumen.synthetic import synthetic_document

HERE = str(ROOT)


def contents(folder):
    """Hash of every file; of the manifest without provenance."""
    hashes = {}
    for name in sorted(os.listdir(folder)):
        data = (folder / name).read_bytes()
        if name == "manifest.json":
            manifest = json.loads(data)
            manifest.pop("provenance")
            data = json.dumps(manifest, sort_keys=True).encode()
        hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


def documents(folder, split="train"):
    """The texts of a split, read back: from the shards by docs.npy, each without its end-of-text
    id."""
    made, parts, begins, at = T.load(str(folder)), [np.zeros(0, int)], [], 0
    manifest = json.loads((folder / "manifest.json").read_text())
    continues = False
    for shard in manifest["splits"][split]["shards"]:
        ids = np.load(folder / shard["file"], mmap_mode="r", allow_pickle=False)
        docs = np.load(folder / shard["docs_file"], allow_pickle=False)
        assert docs.dtype == np.uint64 and docs[-1] == len(ids) == shard["tokens"]
        assert ids.dtype == np.dtype(manifest["dtype"]) and len(docs) == shard["docs"] + 1
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
        assert (shard["min_id"], shard["max_id"]) == (ids.min(), ids.max())
        ends = (
            np.flatnonzero(ids == made.eot_id) + 1
        ).tolist()  # a scan for the id, as others do it
        assert docs.tolist() == sorted({*([] if continues else [0]), *ends, len(ids)})
        continues = ids[-1] != made.eot_id
        begins += (docs[:-1].astype(int) + at).tolist()
        parts, at = [*parts, ids], at + len(ids)
    assert not continues and len(begins) == manifest["splits"][split]["docs"]
    ids = np.concatenate(parts)
    assert (ids == made.eot_id).sum() == len(begins)
    return [made.decode(ids[a : b - 1]) for a, b in zip(begins, [*begins[1:], at])]


def run(*args, **more):
    return subprocess.Popen(
        [sys.executable, os.path.join(HERE, "prepare_data.py"), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
    )  # fmt: skip


def write_rows(path, rows):
    path.write_bytes(
        b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        + b"\n"
    )
    return str(path)


def good(n):
    return [{"text": f"document number {i} of {n}"} for i in range(n)]


def rejected(out):
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


@pytest.fixture
def mixed(tmp_path):
    """A folder with all kinds of files, bad rows, duplicates and a long document."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    texts = [synthetic_document(7, n) for n in range(700)]
    rows = [{"text": text, "n": 1} for text in texts[:400]] + [
        {"text": texts[3]},
        {"text": texts[600]},
    ]
    rows[10:10] = [b"", b"   ", b"not json"]
    write_rows(folder / "a.jsonl", rows)
    (folder / "b.json").write_text(
        json.dumps([{"text": text} for text in texts[400:450]], indent=2)
    )
    (folder / "c.txt").write_text("".join(texts[450:600]))
    for n in range(600, 700):
        (folder / "sub" / f"{n}.md").write_text(texts[n])
    (folder / "sub" / "empty.py").write_text("")
    return folder


# --- the same bytes -------------------------------------------------------------------------------
# --------------------


def test_workers_and_batches_do_not_matter(mixed, tmp_path):
    options = {"tokenizer": "bpe:500", "shard_tokens": 9000, "max_doc_chars": 5000}
    ways = [(1, 1 << 20), (1, 500), (2, 30_000), (3, 7_000)]
    outs = [tmp_path / f"out{i}" for i in range(len(ways))]
    for out, (workers, size) in zip(outs, ways):
        manifest = P.prepare(
            [str(mixed)], str(out), workers=workers, batch_bytes=size, quiet=True, **options
        )
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2]) == contents(outs[3])
    counts = manifest["counts"]
    assert counts["dropped"] == {"E101": 1, "E104": 1, "E107": 2} and counts["blank_lines"] == 2
    assert counts["kept"] == 551 and counts["rows"] == 555 and counts["cut"] == 1
    assert len(manifest["splits"]["train"]["shards"]) > 5
    text = "".join(documents(outs[0]) + documents(outs[0], "val"))
    assert all(synthetic_document(7, n) in text for n in range(700) if not 450 <= n < 600)
    sizes = [sum(len(t.encode()) for t in documents(outs[0], split)) for split in ("train", "val")]
    assert sizes == [manifest["splits"][split]["bytes_text"] for split in ("train", "val")]
    assert not [name for name in os.listdir(outs[0]) if P.JOURNAL_FILES.fullmatch(name)]


def test_synthetic_is_the_same_everywhere(tmp_path):
    assert hashlib.sha256(
        "".join(synthetic_document(1337, n) for n in range(50)).encode()
    ).hexdigest() == ("d4129fc8282b7aa824c309649a68fc3fc5bf43a0d35c1b332c4c51b1acb2de97")
    manifest = P.prepare(["synthetic:30"], str(tmp_path / "out"), "bytes", quiet=True)
    assert manifest["counts"]["kept"] == 30
    assert sorted(documents(tmp_path / "out") + documents(tmp_path / "out", "val")) == sorted(
        synthetic_document(1337, n) for n in range(30)
    )


COMMAND = (
    "synthetic:1200",
    "--tokenizer",
    "bpe:400",
    "--shard_tokens",
    "9000",
    "--val_fraction",
    "0.2",
    "--batch-bytes=9000",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(*COMMAND, "--out", out).wait() == 0
    return contents(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again(workers, undisturbed, tmp_path):
    """kill -9 at whatever comes after some progress, several times; the end is that of a run that
    was left alone."""
    out, journals, kills, rng = tmp_path / "out", 0, 0, random.Random(workers)
    while True:
        process = run(*COMMAND, "--out", out, "--workers", workers)
        wanted, ends = journals + rng.randint(1, 7), time.time() + 60
        while process.poll() is None and time.time() < ends and kills < 4:
            try:
                journals = (
                    json.loads((out / "progress.json").read_text())
                    .get("state", {})
                    .get("journals", 0)
                )
            except (FileNotFoundError, ValueError):
                pass
            if journals >= wanted or (
                kills == 0 and (out / "progress.json").exists()
            ):  # the first: before any shard
                time.sleep(rng.random() * 0.01)
                process.kill()
                kills += 1
                break
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    assert kills == 4 and "going on where it was" in process.stdout.read()
    assert contents(out) == undisturbed


def test_stopped_at_every_write(mixed, tmp_path, monkeypatch):
    """The process ends just before or just after a file appears; every time the next one goes on
    from there."""
    options = {
        "tokenizer": "bytes",
        "shard_tokens": 12_000,
        "val_fraction": 0.3,
        "max_doc_chars": 3000,
        "quiet": True,
    }
    rows = [
        row
        for n in range(150)
        for row in ({"text": f"row {n} " * 50}, b"", b"bad", {"text": f"row {n // 2} " * 50})
    ]
    write_rows(mixed / "d.jsonl", rows)

    def share(text):
        key = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        return hashlib.blake2b(key, digest_size=8, salt=(1337).to_bytes(8, "little")).digest()[::-1]

    falling = sorted((f"falling {n} " * 100 for n in range(99)), key=share, reverse=True)
    write_rows(
        mixed / "0.jsonl", [{"text": text} for text in falling]
    )  # each takes the place of the one in reserve
    P.prepare([str(mixed)], str(tmp_path / "whole"), max_bad=1, **options)
    assert len(rejected(tmp_path / "whole")) > 200
    real, left = os.replace, 0

    def replace(source, target):
        nonlocal left
        left -= 1
        if left == 0 and not after_it:
            raise KeyboardInterrupt
        real(source, target)
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    for after_it in (False, True):
        out, stops = tmp_path / f"out{after_it}", 0
        while True:
            left = 1 + stops * 7 % 23
            try:
                P.prepare([str(mixed)], str(out), max_bad=1, batch_bytes=3000, **options)
                break
            except KeyboardInterrupt:
                stops += 1
                assert stops < 400
        assert stops > 10
        assert contents(out) == contents(tmp_path / "whole")


def test_disk_full_then_started_again(undisturbed, tmp_path):
    out = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    process = run(*COMMAND, "--out", out, preexec_fn=limit)
    text = process.communicate()[0]
    assert process.returncode == 2 and "E119" in text and "Traceback" not in text
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (18_500, 18_500))  # noqa: E731
    process = run(
        *COMMAND, "--out", out, preexec_fn=limit
    )  # now the tokenizer fits and the first shards
    text = process.communicate()[0]
    assert process.returncode == 2 and "E119" in text and "Traceback" not in text
    assert not [name for name in os.listdir(out) if name == "manifest.json"]
    process = run(*COMMAND, "--out", out)
    assert process.wait() == 0 and contents(out) == undisturbed


def test_a_dead_worker_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    options = {"tokenizer": "bytes", "shard_tokens": 5000, "quiet": True, "batch_bytes": 4000}
    P.prepare(["synthetic:60"], str(tmp_path / "whole"), **options)
    seen = []

    class Pool(pool.ProcessPoolExecutor):
        def submit(self, *args):
            seen.append(1)
            if len(seen) == 6:
                next(iter(self._processes.values())).kill()
            return super().submit(*args)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match="E003"):
        P.prepare(["synthetic:60"], str(tmp_path / "out"), workers=2, **options)
    P.prepare(["synthetic:60"], str(tmp_path / "out"), workers=1, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- the same folder again
# --------------------------------------------------------------------------------------------


def test_finished_folder(mixed, tmp_path, capsys):
    out = str(tmp_path / "out")
    first = P.prepare([str(mixed)], out, "bytes", quiet=True)
    before = contents(tmp_path / "out")
    os.utime(mixed / "c.txt")  # another time, the same text
    assert P.prepare([str(mixed)], out, "bytes") == first
    assert "already there" in capsys.readouterr().out
    for wrong, options in [
        ("tokenizer", {"tokenizer": "bpe:300"}),
        ("seed", {"seed": 1}),
        ("sources", {"more": 1}),
    ]:
        specs = [str(mixed)] + ["synthetic"] * options.pop("more", 0)
        with pytest.raises(UserError, match=f"E117.*{wrong}"):
            P.prepare(specs, out, **{"tokenizer": "bytes", **options})
    (mixed / "c.txt").write_text("other text, other size")
    with pytest.raises(UserError, match="E117.*c.txt has changed"):
        P.prepare([str(mixed)], out, "bytes")
    (mixed / "c.txt").unlink()
    with pytest.raises(UserError, match="E117.*c.txt is gone"):
        P.prepare([str(mixed)], out, "bytes")
    os.rename(mixed, tmp_path / "away")  # all text is gone: the tokens do without
    assert P.prepare([str(mixed)], out, "bytes") == first and contents(tmp_path / "out") == before
    with open(tmp_path / "out" / "train_00000.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="E111.*train_00000"):
        P.prepare([str(mixed)], out, "bytes")


def test_a_folder_whose_manifest_has_the_documents_in_mtime(tmp_path, monkeypatch):
    """Until 2026 an input's mtime held the number of synthetic documents: such data are taken as
    they are, and go on where they were."""
    options = {"tokenizer": "bytes", "shard_tokens": 5000, "quiet": True}
    whole = P.prepare(["synthetic:60"], str(tmp_path / "whole"), **options)
    real = P.Output.journal

    def stop(self):
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(P.Output, "journal", stop)
        P.prepare(["synthetic:60"], str(tmp_path / "half"), **options)
    for path in (tmp_path / "whole" / "manifest.json", tmp_path / "half" / "progress.json"):
        rows = json.loads(path.read_text())
        (given,) = rows["provenance"]["inputs"]
        assert given[6:10] == [0, "", "", 60]
        rows["provenance"]["inputs"] = [[*given[:6], 60, "", ""]]
        path.write_text(json.dumps(rows))
    again = P.prepare(["synthetic:60"], str(tmp_path / "whole"), **options)
    half = P.prepare(["synthetic:60"], str(tmp_path / "half"), **options)
    assert whole["fingerprint"] == again["fingerprint"] == half["fingerprint"]


def test_a_new_format_is_a_reader_and_an_ending(tmp_path, monkeypatch):
    def read_upper(reading):
        with readers.opened(reading.given) as stream:
            yield sources.Item(reading.index, "text", 0, 1, stream.all().upper())

    monkeypatch.setitem(inputs.ENDINGS, ".up", "upper")
    monkeypatch.setitem(readers.READERS, "upper", read_upper)
    (tmp_path / "a.up").write_text("a document")
    P.prepare([str(tmp_path / "a.up")], str(tmp_path / "out"), "bytes", val_fraction=0, quiet=True)
    assert documents(tmp_path / "out") == ["A DOCUMENT"]


def test_unfinished_folder_of_another_command(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    monkeypatch.setattr(P.Output, "journal", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        P.prepare(["synthetic:60"], out, "bytes", shard_tokens=5000, quiet=True)
    with pytest.raises(UserError, match="E117.*shard_tokens 5000, not 6000"):
        P.prepare(["synthetic:60"], out, "bytes", shard_tokens=6000, quiet=True)
    with pytest.raises(UserError, match="E117.*sources"):
        P.prepare(["synthetic:61"], out, "bytes", shard_tokens=5000, quiet=True)


def test_foreign_folders(tmp_path):
    for name in ("notes.txt", "train_00000.npy"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"E117.*{name}"):
            P.prepare(["synthetic:10"], str(folder), "bytes", quiet=True)
        assert (folder / name).read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="E119"):
        P.prepare(["synthetic:10"], str(tmp_path / "file"), "bytes", quiet=True)
    made = P.prepare(["synthetic:10"], str(tmp_path / "done"), "bytes", quiet=True)
    with P.holding(str(tmp_path / "done")):  # two runs that start at once on finished data
        assert P.prepare(["synthetic:10"], str(tmp_path / "done"), "bytes", quiet=True) == made


# --- shards and splits
# ------------------------------------------------------------------------------------------------


def test_shards_close_between_documents(tmp_path):
    out = tmp_path / "out"
    text = "x" * 2500
    path = write_rows(
        tmp_path / "a.jsonl", [{"text": "a" * 600 + str(i)} for i in range(9)] + [{"text": text}]
    )
    manifest = P.prepare([path], str(out), "bytes", shard_tokens=1000, val_fraction=0, quiet=True)
    shards = manifest["splits"]["train"]["shards"]
    assert [shard["tokens"] for shard in shards] == [602] * 9 + [
        1000,
        1000,
        501,
    ]  # only what is longer than a shard
    assert [shard["docs"] for shard in shards] == [1] * 10 + [0, 0] and documents(out)[-1] == text
    assert manifest["splits"]["val"] == {"tokens": 0, "docs": 0, "bytes_text": 0, "shards": []}
    whole = np.concatenate([np.load(out / shard["file"]) for shard in shards])
    assert T.load(str(out)).decode(whole).count("<|endoftext|>") == 10


def test_large_vocabularies_take_uint32(tmp_path, monkeypatch):
    from test_tokenizer import small_tiktoken_file

    data, path, _ = small_tiktoken_file(monkeypatch, tmp_path)
    path.write_bytes(data)
    manifest = P.prepare(["synthetic:20"], str(tmp_path / "out"), "cl100k_base", quiet=True)
    assert manifest["dtype"] == "uint32" and manifest["tokenizer"]["eot_id"] == 100257
    assert manifest["splits"]["train"]["shards"][0]["max_id"] == 100257
    assert len(documents(tmp_path / "out")) == manifest["splits"]["train"]["docs"]
    lengths = np.load(tmp_path / "out" / "token_bytes.npy", allow_pickle=False)
    assert lengths.shape == (100277,) and lengths[100257] == 0


def test_split_is_independent_of_order(tmp_path):
    rows = good(300)
    for fraction in (0.05, 0.001):  # by hash; and when the hash gives none, the smallest
        sides = []
        for i in range(2):
            random.Random(i).shuffle(rows)
            path, out = write_rows(tmp_path / f"{i}.jsonl", rows), tmp_path / f"out{i}{fraction}"
            P.prepare([path], str(out), "bytes", val_fraction=fraction, quiet=True)
            sides.append((set(documents(out)), set(documents(out, "val"))))
        assert sides[0] == sides[1]
        train, val = sides[0]
        assert (
            not train & val
            and len(train | val) == 300
            and (5 < len(val) < 30 if fraction > 0.01 else len(val) == 1)
        )


def test_parts_of_a_document_stay_together(tmp_path):
    rows = [
        {"text": "\n\n".join(f"doc {i} paragraph {j} " + "x" * (j % 50) for j in range(60))}
        for i in range(60)
    ]
    path, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out"
    manifest = P.prepare([path], str(out), "bytes", val_fraction=0.2, max_doc_chars=700, quiet=True)
    assert manifest["counts"]["cut"] == 60
    train, val = documents(out), documents(out, "val")
    assert sorted(train + val) == sorted(row["text"] for row in rows) and len(val) > 3
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["kept"] == 60 and report["counts"]["parts"] > 120
    assert sum(report["splits"][split]["documents"] for split in ("train", "val")) == 60


def test_cutting():
    text = "aaa bbb\nccc ddd\n\neee " * 40 + "z" * 300
    for limit in (1, 7, 50, 100):
        parts = cut_text(text, limit)
        assert "".join(parts) == text and max(map(len, parts)) <= limit
    assert all(part.endswith("\n\n") for part in cut_text("line one\n\n" * 50, 35)[:-1])


def test_one_document_gives_its_tail(tmp_path):
    """A corpus that is one file: the end of it is held out, neither everything nor nothing."""
    path, out = tmp_path / "novel.txt", tmp_path / "out"
    path.write_text("\n".join(f"This is line {i} of the novel." for i in range(3000)))
    manifest = P.prepare([str(path)], str(out), "bytes", max_doc_chars=10_000, quiet=True)
    train, val = documents(out), documents(out, "val")
    assert "".join(train + val) == path.read_text() and len(train) == len(val) == 1
    share = manifest["splits"]["val"]["tokens"] / manifest["splits"]["train"]["tokens"]
    assert 0.04 < share < 0.12 and val[0].startswith("This is line")
    assert manifest["counts"]["tail_held_out"] == 1


def test_val_files(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", good(20) + [{"text": "in both"}])
    val = write_rows(tmp_path / "val.jsonl", [{"text": "in both"}, {"text": "held out"}])
    manifest = P.prepare([train], str(tmp_path / "out"), "bytes", [val], quiet=True)
    assert documents(tmp_path / "out", "val") == ["in both", "held out"]
    assert documents(tmp_path / "out") == [row["text"] for row in good(20)]
    assert [source["name"] for source in manifest["sources"]] == ["train.jsonl", "val.jsonl"]
    with pytest.raises(UserError, match="E002"):
        P.prepare([train], str(tmp_path / "x"), "bytes", [val], val_fraction=0.1)


def test_long_files_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 5000)
    path, out = tmp_path / "long.txt", tmp_path / "out"
    path.write_text(
        "".join(f"é line {i}\n" for i in range(2000)) + "no spaces".replace(" ", "") * 2000
    )
    manifest = P.prepare([str(path)], str(out), "bytes", val_fraction=0, quiet=True)
    assert documents(out) == [path.read_text()] and manifest["counts"]["rows"] == 1
    options = {"val_fraction": 0, "shard_tokens": 3000, "quiet": True}
    P.prepare([str(path)], str(tmp_path / "small"), "bytes", **options)
    assert documents(tmp_path / "small") == [path.read_text()]


# --- cleaning -------------------------------------------------------------------------------------
# --------------------


def test_cleaning():
    assert clean("a\r\nb\rc\td\x00\x0b\x0c\x1f\n") == "a\nb\nc\td\n"
    assert clean("e\u0301 \u212b x\u2028y\x85z") == "é Å x\u2028y\x85z"
    assert clean("\ufb01 ²") == "\ufb01 ²"  # NFC, not NFKC
    assert clean("a\ud800 \ud83d\ude00") == "a\ufffd 😀"


def test_control_tokens_in_text_stay_text(tmp_path):
    text = "<|endoftext|> <|im_start|>system\nobey<|im_end|>"
    path = write_rows(tmp_path / "a.jsonl", [{"text": text}, *good(5)])
    eot = P.prepare([path], str(tmp_path / "out"), "bpe:300", val_fraction=0, quiet=True)[
        "tokenizer"
    ]["eot_id"]
    ids = np.load(tmp_path / "out" / "train_00000.npy")
    assert (ids >= eot).sum() == 6 and text in documents(
        tmp_path / "out"
    )  # one end of text for each document


def test_duplicates(tmp_path):
    rows = good(50) + [{"text": "  document number 7 of 50\n"}, {"text": "Document number 7 of 50"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    manifest = P.prepare([path], str(tmp_path / "out"), "bytes", quiet=True)
    assert manifest["counts"]["dropped"] == {"E107": 1} and manifest["counts"]["kept"] == 51
    assert rejected(tmp_path / "out")[0]["line"] == 51


# --- bad rows -------------------------------------------------------------------------------------
# --------------------

BAD_ROWS = [
    (b"{not json", "E101", "column 2"),
    (b"{'text': 'python'}", "E101", "single quotes"),
    (b'["a list"]', "E101", "named .json"),
    (b"[", "E101", "named .json"),
    (b'{"text": "a"} trailing', "E101", "Extra data"),
    (b'{"text": "raw \x01 control"}', "E101", "control character"),
    (b"[" * 100_000, "E101", "recursion"),
    (b'"just text"', "E101", "a str, not an object"),
    (b'{"txt": "a", "id": 3}', "E102", "txt, id"),
    (b'{"text": 3}', "E102", "is a int"),
    (b'{"text": null}', "E102", "NoneType"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}', "E120", "chat where text is read"),
    (b'{"chosen": "a", "rejected": "b"}', "E120", "pairs where text is read"),
    (b'{"text": "caf\xe9"}', "E103", "0xe9"),
    (b'{"text": " \\n"}', "E104", "empty"),
    (b'{"text": "\\u0000"}', "E104", "empty"),
]


def test_a_bad_file_is_shown_on_one_line(tmp_path, capsys):
    """A text file is one row: its excerpt is a line of the message, not the file's own lines."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 one\nsecond\r\n\tthird\n" * 3)
    (tmp_path / "good.txt").write_text("good")
    P.prepare([str(tmp_path)], str(tmp_path / "out"), "bytes", max_bad=1, val_fraction=0)
    (row,) = rejected(tmp_path / "out")
    assert row["excerpt"].startswith("caf\ufffd one second third caf\ufffd")
    said = capsys.readouterr()
    assert "\nsecond" not in said.out + said.err


def test_every_bad_row_is_named_with_its_line(tmp_path, capsys):
    """Line numbers are an editor's: blank lines count, U+2028 and form feeds are no line ends, a
    BOM is nothing."""
    head = [
        b"\xef\xbb\xbf" + json.dumps({"text": "first"}).encode(),
        b"",
        b"\r",
        b'{"text": "a\xe2\x80\xa8b\xc2\x85c"}',
    ]
    rows = [*head, b'{"text": "windows"}\r', *(row for bad, *_ in BAD_ROWS for row in (bad, b""))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    P.prepare([path], str(tmp_path / "out"), "bytes", max_bad=1, val_fraction=0, batch_bytes=300)
    assert documents(tmp_path / "out") == ["first", "a\u2028b\x85c", "windows"]
    found, data = rejected(tmp_path / "out"), (tmp_path / "a.jsonl").read_bytes()
    assert len(found) == len(BAD_ROWS)
    for i, (row, (raw, code, reason)) in enumerate(zip(found, BAD_ROWS)):
        assert (row["file"], row["line"], row["code"]) == (path, 6 + 2 * i, code)
        assert reason in row["reason"] and len(row["excerpt"]) <= 200
        assert data[row["byte_offset"] :].startswith(raw)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejected"]["E101"]["rows"] == 8 and len(report["rejected"]["E101"]["first"]) == 5
    assert report["counts"]["blank_lines"] == 2 + len(BAD_ROWS)
    out = capsys.readouterr().out
    assert f"{path}:6: " in out and "E102" in out
    with pytest.raises(UserError) as caught:
        P.prepare([path], str(tmp_path / "strict"), "bytes", strict=True, quiet=True)
    assert caught.value.code == "E101" and f"{path}:6:" in caught.value.text
    assert not (tmp_path / "strict" / "manifest.json").exists()


@pytest.mark.parametrize("bad, code", [(1, 0), (3, 2)])
def test_more_than_one_percent_bad(bad, code, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", good(198) + [b"bad"] * bad)
    process = run(path, "--out", tmp_path / "out", "--tokenizer", "bytes")
    text = process.communicate()[0]
    assert process.returncode == code and (tmp_path / "out" / "manifest.json").exists() == (
        code == 0
    )
    assert (
        f"{path}:199:" in text
        and len(rejected(tmp_path / "out")) == bad
        and "Traceback" not in text
    )
    if code:
        assert "E109" in text and "3 of 201 rows" in text
        write_rows(tmp_path / "a.jsonl", good(198))  # mended: the same command into the same folder
        assert run(path, "--out", tmp_path / "out", "--tokenizer", "bytes").wait() == 0


def test_nothing_left(tmp_path):
    for name, data in (
        ("a.txt", b""),
        ("b.jsonl", b"\n\n"),
        ("c.json", b"[]"),
        ("d.txt", b" \n"),
        ("e.json", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="E109"):
            P.prepare([str(tmp_path / name)], str(tmp_path / f"out {name}"), "bpe:300", quiet=True)


def test_too_many_bad_rows_name_the_first_the_shapes_and_where_all_of_them_are(tmp_path):
    file, out = tmp_path / "a.jsonl", str(tmp_path / "out")
    file.write_text('{"txt": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError) as error:
        P.prepare([str(file)], out, "bytes", quiet=True)
    first, shapes, where = error.value.text.split("\n")
    assert first.endswith(
        "first: " + f'{file}:1: no "text" field; the fields are txt: {{"txt": "a"}}'
    )
    assert '{"question", "answer"}' in shapes and where == f"  all of them: {out}/rejected.jsonl"
    assert len(rejected(tmp_path / "out")) == 2
    with pytest.raises(UserError) as error:
        P.main([str(file), "--validate_only", "--tokenizer", "bytes", "--quiet"])
    assert error.value.text.split("\n") == [first, shapes]  # what was made is removed


def test_what_is_said_of_little_text_with_duplicates_is_short_and_calm(tmp_path, capsys):
    text = "a text that comes more than once " * 20
    write_rows(tmp_path / "a.jsonl", [{"text": text}] * 4 + good(3))
    out = tmp_path / "out"
    P.prepare([str(tmp_path / "a.jsonl")], str(out), "bytes")
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("1 inputs, ") and said[1].endswith(" kB")
    assert said[2] == "left out: 3 exact duplicates; rejected.jsonl has them"
    assert [row["code"] for row in rejected(out)] == ["E107"] * 3
    (pace,) = [line for line in said if "bytes per token" in line]
    assert len(pace) <= 100 and " by 1 process: " in pace and "E107" not in "".join(said)


@pytest.mark.parametrize(
    "n, said",
    [(0, "0 bytes"), (999, "999 bytes"), (3777, "3.8 kB"), (10_123_456_789, "10,123.5 MB")],
)
def test_a_size_has_a_unit_in_which_it_is_not_nothing(n, said):
    assert in_bytes(n) == said


def test_a_bad_row_that_is_cut_in_a_message_ends_with_dots(tmp_path):
    for n, end in ((20, '"}'), (200, "a...")):
        file = write_rows(tmp_path / f"{n}.jsonl", [{"txt": "a" * n}])
        with pytest.raises(UserError) as error:
            P.prepare([file], str(tmp_path / f"out{n}"), "bytes", quiet=True)
        assert error.value.text.split("\n")[0].endswith(end)


def test_json_files(tmp_path):
    path = tmp_path / "a.json"

    def items():
        (given,) = sources.find_inputs(str(path), 0, "train")
        return list(sources.read_items(sources.Reading(0, given)))

    def rows(text):
        path.write_text(text)
        return [(line, code) for item in items() for _, line, code, _ in sources.item_rows(item)]

    assert rows('{"text": "one"}') == [(1, None)]
    assert rows('\ufeff\n[\n{"text": "a"},\n\n{"text":\n"b"}, {"no": 1}\n]\n') == [
        (3, None),
        (5, None),
        (6, "E102"),
    ]
    assert rows('[{"text": "a"},\n 3,\n nonsense]') == [(1, None), (2, "E101"), (3, "E101")]
    assert rows('{"text": "a"}\n{"text":\n"b"}\n') == [(1, None), (2, None)]  # one after the other
    assert rows('{"text": "a"}\n3') == [(1, None), (2, "E101")]
    assert rows('[{"text": "a"}\n{"text": "b"}]') == [(1, None), (2, "E101")]
    assert (
        rows('[{"text": "a"}') == [(1, None), (1, "E101")]
        and rows("[]") == []
        and rows("") == [(1, "E101")]
    )
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    assert [item[1:4] for item in items()] == [("row", 0, 1), ("E103", 1, 2)]


def test_files_that_cannot_be_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_rows(folder / "good.jsonl", good(2000))
    (folder / "utf16.txt").write_text("hello", encoding="utf-16")
    (folder / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    (folder / "zipped.md").write_bytes(b"\x1f\x8b\x08\x00rest")
    os.symlink("nowhere", folder / "dangling.py")
    os.mkfifo(folder / "fifo.txt")
    (folder / "other.bin").write_bytes(b"not looked at")
    P.prepare([str(folder)], str(tmp_path / "out"), "bytes", quiet=True)
    found = {
        os.path.basename(row["file"]): (row["code"], row["line"])
        for row in rejected(tmp_path / "out")
    }
    assert found == {"utf16.txt": ("E103", 1), "latin.txt": ("E103", 3), "zipped.md": ("E108", 1),
                     "dangling.py": ("E108", 1), "fifo.txt": ("E108", 1)}  # fmt: skip
    (folder / "all.jsonl").write_text('{"text": "a whole file of rows"}\n', encoding="utf-16")
    with pytest.raises(
        UserError, match="E109.*all.jsonl"
    ):  # one row in 2,000, but who knows how many were lost
        P.prepare([str(folder)], str(tmp_path / "out2"), "bytes", quiet=True)
    for source, reason in (("none", "no such file"), ("in/other.bin", "only"), ("out", "no .txt")):
        if source == "out":
            (tmp_path / "out").rename(tmp_path / "old")
            (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match=f"E108.*{reason}"):
            P.prepare([str(tmp_path / source)], str(tmp_path / "out3"), "bytes", quiet=True)
    assert not (tmp_path / "out3").exists()


# --- sources, tokenizers, options
# -------------------------------------------------------------------------------------


def test_stdlib(tmp_path, capsys):
    out = tmp_path / "out"
    P.main(["stdlib", f"--out={out}", "--tokenizer", "bpe:8192"])
    manifest, said = json.loads((out / "manifest.json").read_text()), capsys.readouterr().out
    assert manifest["tokenizer"]["n_vocab"] == 8192 and manifest["dtype"] == "uint16"
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    assert (
        7e6 < train["bytes_text"] + val["bytes_text"] < 16e6
        and 3 < train["bytes_text"] / train["tokens"] < 5
    )
    assert 0.01 < val["tokens"] / train["tokens"] < 0.15 and not manifest["counts"][
        "dropped"
    ].keys() - {"E107"}
    names = [given[3] for given in manifest["provenance"]["inputs"]]
    assert "stdlib/json/decoder.py" in names
    assert not [
        name
        for name in names
        if {"test", "tests", "encodings", "site-packages"} & set(name.split("/"))
    ]
    assert "trained in" in said and "MB/s" in said and "bytes per token" in said
    P.main(["stdlib", f"--out={out}", "--tokenizer", "bpe:8192"])
    assert "already there" in capsys.readouterr().out


def test_a_tokenizer_from_a_file(tmp_path):
    made = T.train_bpe([synthetic_document(0, n) for n in range(30)], 400)
    made.save(tmp_path / "own.json")
    options = {"tokenizer": str(tmp_path / "own.json"), "quiet": True}
    manifest = P.prepare(["synthetic:20"], str(tmp_path / "out"), **options)
    assert manifest["tokenizer"]["sha256"] == made.sha256
    assert T.load(str(tmp_path / "out")).to_json() == made.to_json()
    T.train_bpe(["other"], 270).save(tmp_path / "own.json")
    with pytest.raises(UserError, match="E117.*own.json has changed"):
        P.prepare(["synthetic:20"], str(tmp_path / "out"), **options)


def test_the_tokenizer_is_trained_on_train_sources_and_bounded(tmp_path, monkeypatch):
    (tmp_path / "val.txt").write_text("zyx " * 1000)
    P.prepare(
        ["synthetic:20"], str(tmp_path / "out"), "bpe:300", [str(tmp_path / "val.txt")], quiet=True
    )
    assert b"zyx" not in T.load(str(tmp_path / "out")).ranks
    for n in range(100):
        (tmp_path / f"{n}.txt").write_text(synthetic_document(0, n))
    inputs = sources.find_inputs(str(tmp_path), 0, "hash")
    size = sum(given.size for given in inputs)

    def trained_on():
        return sum(len(text) for text in P.training_texts({"seed": 0}, inputs, size))

    total = trained_on()
    monkeypatch.setattr(P, "TRAIN_BYTES", total // 10)
    assert total // 20 < trained_on() < total // 5


def test_missing_tiktoken_file_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "requests.get", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(UserError, match="E115"):
        P.prepare(["synthetic:20"], str(tmp_path / "out"), "gpt2", quiet=True)
    assert not (tmp_path / "out").exists()


def test_fingerprint(tmp_path):
    """Equal for equal text and settings wherever the files lie; different when anything differs."""
    prints = []
    for i, options in enumerate(
        [{}, {}, {"seed": 2}, {"shard_tokens": 500}, {"tokenizer": "bpe:270"}]
    ):
        folder = tmp_path / str(i) / "text"
        folder.mkdir(parents=True)
        write_rows(folder / "a.jsonl", good(50))
        manifest = P.prepare(
            [str(folder)],
            str(tmp_path / f"out{i}"),
            **{"tokenizer": "bytes", "quiet": True, **options},
        )
        prints.append(manifest["fingerprint"])
    assert prints[0] == prints[1] and len(set(prints)) == 4
    assert str(tmp_path) not in json.dumps(
        {key: manifest[key] for key in manifest if key != "provenance"}
    )


@pytest.mark.parametrize("options", [
    {"val_fraction": 0.9}, {"shard_tokens": 0}, {"workers": -1}, {"no_such": 1}, {"tokenizer": "bpe:x"},
    {"tokenizer": "bpe:100"},
])  # fmt: skip
def test_bad_options(options, tmp_path):
    with pytest.raises(UserError, match="E002"):
        P.prepare(["synthetic:20"], str(tmp_path / "out"), quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    arguments = ["synthetic:50", "--out", str(tmp_path / "out"), "--tokenizer=bytes"]
    P.main([*arguments, "--val-fraction", "0.1", "--shard_tokens=9000", "--quiet"])
    assert capsys.readouterr() == ("", "")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (
        settings["val_fraction"] == 0.1
        and settings["shard_tokens"] == 9000
        and settings["seed"] == 1337
    )
    with pytest.raises(UserError, match="E002.*--nonsense"):
        P.main([*arguments, "--nonsense"])


# ---------------------------------------------------------------- what is said of mistakes


def test_a_source_that_is_not_there_names_the_nearest_file_beside_it(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"text": "a"}\n')
    near = f"did you mean {tmp_path / 'chats.jsonl'}\\?"
    with pytest.raises(UserError, match=f"E108: .*no such file or folder; {near}"):
        P.main([str(tmp_path / "chats.josnl"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError) as caught:
        P.main([str(tmp_path / "other.txt"), "--out", str(tmp_path / "out")])
    assert "did you mean" not in caught.value.text


def test_texts_that_are_not_utf8_are_files_and_each_is_said_once(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"some text {i}")
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="E109: 1 of 4 files is bad; .*first: .*bad.txt:1: ") as e:
        P.main([str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert "of the files may be bad" in e.value.text
    assert "bad.txt" not in capsys.readouterr().out


def test_a_row_that_breaks_off_is_told_in_english(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b\n')
    with pytest.raises(UserError, match="1 of 2 rows is bad.* Unterminated string starting at col"):
        P.main([str(file), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
