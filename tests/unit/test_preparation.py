"""prepare_data.py at full width: conversations and pairs, rules, near-duplicates, several sources,
and what is said of all that."""

import hashlib
import json
import os
import random

import numpy as np
import pytest
from conftest import ROOT, write_yaml

import prepare_data as P
from lumen import chat, datacard, inputs, passes, pool, shards
from lumen import tokenizer as T
from lumen.cli import read_config
from lumen.config import INSIDE
from lumen.conversations import to_messages, to_pair
from lumen.errors import UserError
from lumen.recipe import OPTIONS, SWITCHES
from lumen.shards import Shards
from lumen.synthetic import synthetic_document

QUIET = {"quiet": True, "val_fraction": 0.1}


def digests(folder):
    """sha256 of every file but the manifest; of that the fingerprint."""
    found = {}
    for name in sorted(os.listdir(folder)):
        data = (folder / name).read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
    found["manifest.json"] = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    return found


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(n):
    """A conversation whose length and number of turns depend on n."""
    rng = random.Random(n)
    turns = []
    for turn in range(1 + rng.randrange(3)):
        question = f"question {n}.{turn}: " + "why " * rng.randrange(12)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": f"answer {n}.{turn} " * (1 + n % 7)})
    return {"messages": turns}


def pair(n):
    return {"prompt": f"what is {n}?", "chosen": f"{n} it is", "rejected": f"it is not {n}"}


def arrays(folder, split="train"):
    """(ids, mask, places of documents with the end) of a split of one shard."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (shard,) = manifest["splits"][split]["shards"]
    names = (shard["file"], shard["mask_file"], shard["docs_file"])
    return [np.load(folder / name, allow_pickle=False) for name in names]


# ---------------------------------------------------------------- conversations


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return write_jsonl(folder / "chats.jsonl", [conversation(n) for n in range(300)])


def test_every_conversation_is_there_whole_and_once(chats, tmp_path):
    """Packed rows hold exactly what the renderer makes of each conversation, none across a row."""
    out, length = tmp_path / "out", 501
    options = {"seq_len": length - 1, "val_fraction": 0.0, "quiet": True}
    manifest = P.prepare([chats], str(out), "bpe:400", **options)
    assert manifest["kind"] == "chat" and manifest["rows"] == {"length": length}
    ids, mask, places = arrays(out)
    tokenizer = T.load(str(out))
    wanted = {}
    for n in range(300):
        rendered = chat.render(to_messages(conversation(n)), "chatml", tokenizer)
        wanted[rendered[0].tobytes()] = rendered[1].tolist()
    assert len(ids) % length == 0 and set(range(0, len(ids), length)) <= set(places.tolist())
    found = 0
    for begin, end in zip(places[:-1].astype(int), places[1:].astype(int)):
        assert begin // length == (end - 1) // length
        # padding belongs to the last document of a row: find the conversation before it
        body = np.flatnonzero(ids[begin:end] != tokenizer.pad_id)[-1] + 1
        key = ids[begin : begin + body].astype(np.uint32).tobytes()
        assert mask[begin : begin + body].tolist() == wanted.pop(key)
        assert not mask[begin + body : end].any()
        found += 1
    assert found == manifest["splits"]["train"]["docs"] == 300 and not wanted
    targets = manifest["splits"]["train"]["shards"][0]["targets"]
    assert targets == mask.sum() > 0


def test_conversations_have_the_same_bytes_anywhere(chats, tmp_path, monkeypatch):
    """However many workers, whatever the batches, and after a kill between two shards."""
    options = QUIET | {"seq_len": 100, "shard_tokens": 3000, "max_bad": 0.5}
    P.prepare([chats], str(tmp_path / "one"), "bpe:400", **options)
    P.prepare([chats], str(tmp_path / "two"), "bpe:400", workers=2, batch_bytes=999, **options)
    journal, stops = P.Output.journal, []

    def stop(self):
        journal(self)
        stops.append(0)
        if len(stops) in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(P.Output, "journal", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            P.prepare([chats], str(tmp_path / "cut"), "bpe:400", **options)
    P.prepare([chats], str(tmp_path / "cut"), "bpe:400", **options)
    assert len(stops) > 5
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "two") == digests(tmp_path / "cut")


def test_rows_without_a_target_are_dropped_and_named(tmp_path):
    """Too long, no reply, unknown roles: each with its line; the rest is there."""
    long = {"messages": [{"role": "user", "content": "x" * 500}]}
    long["messages"].append({"role": "assistant", "content": "y"})
    alone = {"messages": [{"role": "user", "content": "hello"}]}
    strange = {"messages": [{"role": "wizard", "content": "hello"}]}
    rows = [conversation(n) for n in range(40)]
    path = write_jsonl(tmp_path / "chats.jsonl", [*rows, long, alone, strange])
    out = tmp_path / "out"
    options = QUIET | {"seq_len": 200, "max_bad": 0.1}
    manifest = P.prepare([path], str(out), "bytes", too_long="truncate", **options)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    found = {line["line"]: line["code"] for line in lines}
    assert found[41] == "E106" and found[42] == "E105" and found[43] == "E105"
    assert manifest["counts"]["kept"] == len(rows) - sum(line < 41 for line in found)


def test_pairs_lie_one_after_the_other(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(50)])
    out = tmp_path / "out"
    manifest = P.prepare([path], str(out), "bpe:400", seq_len=64, val_fraction=0.0, quiet=True)
    assert manifest["kind"] == "pairs" and manifest["splits"]["train"]["docs"] == 100
    assert manifest["counts"]["kept"] == 50 and manifest["counts"]["cut"] == 0
    assert manifest["loss_on"] == "last_turn"
    ids, mask, places = arrays(out)
    tokenizer = T.load(str(out))
    parts = list(zip(places[:-1].astype(int), places[1:].astype(int)))
    for n in range(50):
        for (begin, end), messages in zip(parts[2 * n : 2 * n + 2], to_pair(pair(n))):
            want, targets = chat.render(messages, "chatml", tokenizer)
            assert ids[begin:end].tolist() == want.tolist()
            assert mask[begin:end].tolist() == targets.tolist()


def test_one_conversation_is_trained_on_and_not_cut(tmp_path):
    row = conversation(1)
    row["messages"][1]["content"] = "y " * 4000
    path = write_jsonl(tmp_path / "c.jsonl", [row])
    manifest = P.prepare([path], str(tmp_path / "out"), "bytes", seq_len=9000, **QUIET)
    assert [split["docs"] for split in manifest["splits"].values()] == [1, 0]


def test_sources_of_several_kinds_are_refused(chats, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "words"}])
    with pytest.raises(UserError, match="E120"):
        P.prepare([chats, text], str(tmp_path / "out"), "bytes", quiet=True)


def test_another_template_is_another_dataset(chats, tmp_path):
    """The fingerprint covers the template's text, what is a target and the rows' length; a folder
    that was made otherwise is not gone on with."""
    ways = [{}, {"template": "chat"}, {"loss_on": "all"}, {"seq_len": 90}]
    prints = set()
    for i, way in enumerate(ways):
        options = QUIET | {"seq_len": 100} | way
        prints.add(P.prepare([chats], str(tmp_path / str(i)), "bpe:400", **options)["fingerprint"])
    assert len(prints) == len(ways)
    with pytest.raises(UserError, match="E117.*template"):
        P.prepare([chats], str(tmp_path / "0"), "bpe:400", **QUIET, seq_len=100, template="chat")


def test_a_template_of_your_own_in_yaml(tmp_path):
    """As docs/conversations.md has it: prepare_data.py's data.yaml, and `prepare` of a run."""
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "RED"}]
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": talk}] * 2)
    own = {"user": "Q: {content}\n", "assistant": "A: {content}{end}\n"}
    tree = {"template": own, "seq_len": 90, "tokenizer": "bytes", "out": str(tmp_path / "out")}
    tree |= {"sources": {"chats": {"path": path}}, "quiet": True, "val_fraction": 0}
    file = tmp_path / "data.yaml"
    file.write_text(json.dumps(tree))
    P.main([str(file)])
    manifest = json.loads((tmp_path / "out/chats/manifest.json").read_text())
    assert manifest["template"]["formats"] == own
    prepare = {"sources": [path], "template": own, "minhash": {"bands": 8, "rows": 10}}
    cfg, *_ = read_config([str(write_yaml(tmp_path / "run.yaml", {"prepare": prepare}))])
    assert cfg.prepare["template"] == own and cfg.prepare["minhash"] == {"bands": 8, "rows": 10}
    prepare["template"] = {"user": 5}
    with pytest.raises(UserError, match="E002.*template"):
        P.prepare([path], str(tmp_path / "no"), "bytes", template=prepare["template"], **QUIET)


def test_show_prints_what_is_supervised(chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    words = [chats, "--out", str(tmp_path / "out"), "--tokenizer", "bpe:400", "--show", "2"]
    P.main([*words, "--seq_len", "120"])
    said = capsys.readouterr().out
    assert said.count("-" * 60) == 2 and "answer" in said and "<|im_start|>" in said


# ---------------------------------------------------------------- rules and near-duplicates


def prose(n):
    rng = random.Random(n)
    words = [f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}{rng.choice('lmnrst')}"]
    for _ in range(60):
        words.append(words[-1][1:] + rng.choice("aeioulmnrst"))
    return f"The story of {n}. " + " ".join(words) + "."


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files; some texts of the second are nearly those of the first."""
    folder = tmp_path_factory.mktemp("texts")
    first = [{"text": prose(n)} for n in range(60)]
    second = [{"text": prose(n) + " The end."} for n in range(20)]
    second += [{"text": synthetic_document(1, n)} for n in range(60)]
    write_jsonl(folder / "a.jsonl", first)
    write_jsonl(folder / "b.jsonl", second)
    return folder


def kept_texts(folder):
    tokenizer = T.load(str(folder))
    found = []
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            ids = np.load(folder / shard["file"], allow_pickle=False)
            places = np.load(folder / shard["docs_file"], allow_pickle=False).astype(int)
            found += [tokenizer.decode(ids[a : b - 1]) for a, b in zip(places, places[1:])]
    return sorted(found)


def test_near_duplicates_are_the_same_whatever_happens(texts, tmp_path, monkeypatch):
    """Any number of workers, any order of the files, a kill in the middle of the search."""
    a, b = str(texts / "a.jsonl"), str(texts / "b.jsonl")
    options = QUIET | {"minhash": True}
    manifest = P.prepare([a, b], str(tmp_path / "one"), "bytes", **options)
    assert manifest["counts"]["dropped"]["rule:near_duplicate"] == 20
    one = kept_texts(tmp_path / "one")
    P.prepare([b, a], str(tmp_path / "turned"), "bytes", workers=2, batch_bytes=500, **options)
    assert kept_texts(tmp_path / "turned") == one
    monkeypatch.setattr(passes, "JOURNAL_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        add, added = passes.Near.add, []

        def stop(self, key, bands):
            added.append(key)
            if len(added) > 70:
                raise KeyboardInterrupt
            add(self, key, bands)

        patch.setattr(passes.Near, "add", stop)
        P.prepare([a, b], str(tmp_path / "cut"), "bytes", batch_bytes=2000, **options)
    again = []
    signed = passes.Near.add
    monkeypatch.setattr(passes.Near, "add", lambda *given: (again.append(1), signed(*given)))
    P.prepare([a, b], str(tmp_path / "cut"), "bytes", batch_bytes=2000, **options)
    assert digests(tmp_path / "cut") == digests(tmp_path / "one")
    assert len(again) < 140  # it went on where it was
    assert not [name for name in os.listdir(tmp_path / "cut") if "near" in name]


def test_rules_say_what_they_drop(texts, tmp_path, capsys):
    """A dropped text is no mistake: it is counted under its rule, and rejected.jsonl names it."""
    (texts / "code.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 9}) + "\n")
    out = tmp_path / "out"
    manifest = P.prepare([str(texts)], str(out), "bytes", max_chars=400, max_bad=0.0, **QUIET)
    names = [name for name in manifest["counts"]["dropped"] if name.startswith("rule:")]
    assert len(names) == 1 and manifest["counts"]["dropped"][names[0]] > 20
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["code"] for line in lines} >= set(names)
    assert all(len(text) <= 400 for text in kept_texts(out))
    os.remove(texts / "code.jsonl")


def test_dry_run_makes_nothing(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    P.main([str(texts), "--dry_run", "--preset", "web", "--out", "out"])
    said = capsys.readouterr().out
    assert "\n140 rows looked at" in said and "words_50_to_100000" in said
    assert os.listdir(tmp_path) == []


def test_evaluation_texts_are_left_out(texts, tmp_path):
    asked = " ".join(prose(3).split()[5:30])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": asked, "n": 1}) + "\n")
    options = QUIET | {"decontaminate": str(tmp_path / "eval.jsonl")}
    manifest = P.prepare([str(texts / "a.jsonl")], str(tmp_path / "out"), "bytes", **options)
    assert manifest["counts"]["dropped"] == {"rule:free_of_evaluation_text": 1}
    assert prose(3) not in kept_texts(tmp_path / "out")
    os.remove(tmp_path / "eval.jsonl")  # finished data do without it
    assert P.prepare([str(texts / "a.jsonl")], str(tmp_path / "out"), "bytes", **options)
    with pytest.raises(UserError, match="E108.*eval.jsonl: there is no such file"):
        P.prepare([str(texts / "a.jsonl")], str(tmp_path / "new"), "bytes", **options)


# ---------------------------------------------------------------- several sources


def test_several_sources(texts, tmp_path, capsys):
    """Each is a dataset of its own, with one tokenizer; no text is in two of them; the block for a
    run is beside them; the same again is nothing to do."""
    file = tmp_path / "data.yaml"
    write_jsonl(tmp_path / "c.jsonl", [{"text": prose(n)} for n in range(50, 80)])
    file.write_text(
        f"out: {tmp_path}/out\ntokenizer: bpe:400\nminhash: true\nsources:\n"
        f"  a: {{path: '{texts}/a.jsonl', weight: 3}}\n"
        f"  b: {{path: '{texts}/b.jsonl', max_chars: 900}}\n"
        f"  c: {{path: {tmp_path}/c.jsonl}}\n"
    )
    P.main([str(file), "--quiet"])
    folders = [tmp_path / "out" / name for name in "abc"]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert len({manifest["tokenizer"]["sha256"] for manifest in manifests}) == 1
    assert manifests[0]["settings"].get("rules") is None
    assert manifests[1]["settings"]["rules"] == {"max_chars": 900}
    kept = [kept_texts(folder) for folder in folders]
    assert len(kept[2]) == 20 and not set(kept[0]) & set(kept[2])
    near = [m["counts"]["dropped"].get("rule:near_duplicate", 0) for m in manifests]
    assert sum(near) == 20  # across the sources
    block = (tmp_path / "out" / "mixture.yaml").read_text()
    assert "weight: 3.0" in block and "dir: a" in block
    before = [digests(folder) for folder in folders]
    P.main([str(file), "--quiet"])
    assert before == [digests(folder) for folder in folders]


@pytest.mark.parametrize("text, said", [
    ("sources: [a]", "needs sources"),
    ("sources: {a: {weight: 2}}", "sources.a: one of path and paths is needed"),
    ("sources: {a: {path: x, weight: -1}}", "sources.a.weight: -1"),
    ("sources: {a: {path: x, wieght: 1}}", "sources.a: unknown key wieght"),
    ("sources: {../a: {path: x}}", "sources.../a: a name is"),
    ("sources: {a: x}\nsurces: 1", "unknown key surces"),
    ("a: [", "is no YAML"),
    ("language: no\nsources: {a: x}", "sources.a: language: False is not a word"),
    ("seed: 1e6\nsources: {a: x}", "sources.a: seed: '1e6' is not a whole number"),
    ("strict: 1\nsources: {a: x}", "sources.a: strict: 1 is not true or false"),
    ("seed: 99999999999999999999\nsources: {a: x}", "is not from -9223372036854775808"),
    ("sources: {a: {path: x, val: 5}}", "sources.a: val: 5 is no path"),
    ("sources: {a: {path: x, rules: wrods}}", "sources.a: clean.rules: no 'wrods'"),
    ("export_clean: c.jsonl\nsources: {a: x, b: y}", "a and b would both write to c.jsonl"),
    ("sources: {a: {path: x, minhash: {ngram: 3}}, b: {path: x, minhash: true}}", "minhash: that"),
])  # fmt: skip
def test_a_wrong_yaml_of_sources(text, said, tmp_path):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match="E002") as caught:
        P.main([str(tmp_path / "data.yaml")])
    assert said in str(caught.value) and "data.yaml" in str(caught.value)


def test_what_is_typed_beats_the_file(texts, tmp_path):
    """Also what a source says; a field at the top is that of every source."""
    path = write_jsonl(
        tmp_path / "f.jsonl", [{"text": f"n {n}", "title": "t" * n} for n in range(1, 30)]
    )
    file = tmp_path / "data.yaml"
    file.write_text(
        f"out: {tmp_path}/out\nfield: title\nsources: {{a: {{path: {path}, max_chars: 9}}}}"
    )
    made = P.prepare_mixture(str(file), {"max_chars": 4, "tokenizer": "bytes", "quiet": True})
    assert made["a"]["settings"]["rules"] == {"max_chars": 4}
    assert set(kept_texts(tmp_path / "out" / "a")) <= {"t" * n for n in range(1, 5)}


def test_a_finished_mixture_does_without_its_texts(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": prose(n)}] * 3) for n in range(2)]
    file = tmp_path / "data.yaml"
    file.write_text(f"out: {tmp_path}/out\nminhash: true\ntokenizer: bpe:300\nsources:\n")
    with file.open("a") as opened:
        opened.writelines(f"  s{n}: {{path: {path}}}\n" for n, path in enumerate(paths))
    typed = {"quiet": True, "val_fraction": 0.0}
    made = P.prepare_mixture(str(file), typed)
    for path in paths:
        os.remove(path)
    assert P.prepare_mixture(str(file), typed) == made
    os.remove(tmp_path / "out" / "s0" / "manifest.json")
    with pytest.raises(UserError, match="E108"):
        P.prepare_mixture(str(file), typed)


def test_a_mixture_takes_no_vocabulary_that_another_command_left(tmp_path, monkeypatch):
    """Killed after the tokenizer, before the first source, and then asked for another one."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(20)])
    file = tmp_path / "data.yaml"
    file.write_text(f"out: {tmp_path}/out\nsources: {{a: {path}}}\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(P, "begin", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        P.prepare_mixture(str(file), {"tokenizer": "bpe:300", "quiet": True})
    made = P.prepare_mixture(str(file), {"tokenizer": "bpe:290", "quiet": True})
    assert made["a"]["tokenizer"]["n_vocab"] == 290


class Stop(BaseException):
    pass


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_mixture_stopped_at_any_write(times, chats, texts, tmp_path, monkeypatch):
    """Text, conversations and pairs, with near-duplicates among them and exports: the process ends
    before or after a file is replaced, removed or synced, again and again; the bytes are those of
    an undisturbed one."""
    rows = [json.loads(line) for line in open(chats, encoding="utf-8")][:50]
    for row in rows[:9]:
        again = json.loads(json.dumps(row))
        again["messages"][-1]["content"] += " indeed"
        rows.append(again)
    write_jsonl(tmp_path / "c.jsonl", rows + rows[20:25])
    write_jsonl(tmp_path / "p.jsonl", [pair(n) for n in range(50)])
    paths = {"a": texts / "a.jsonl", "b": texts / "b.jsonl"}
    paths |= {name: tmp_path / f"{name}.jsonl" for name in "cp"}
    options = {"tokenizer": "bpe:300", "shard_tokens": 1500, "seq_len": 120, "batch_bytes": 900}
    options |= {"minhash": True, "max_bad": 0.9, "val_fraction": 0.1, "pii": "mask"}

    def make(out):
        sources = {}
        for name, path in paths.items():
            sources[name] = {"path": str(path), "export_clean": f"{tmp_path}/{out}_{name}.out"}
        tree = options | {"quiet": True, "out": f"{tmp_path}/{out}", "sources": sources}
        (tmp_path / "d.yaml").write_text(json.dumps(tree))
        P.prepare_mixture(str(tmp_path / "d.yaml"), {})
        found = [digests(tmp_path / out / name) for name in paths]
        return found + [(tmp_path / f"{out}_{name}.out").read_bytes() for name in paths]

    monkeypatch.setattr(passes, "JOURNAL_SECONDS", 0)
    writes, left = 0, -1

    def stopping(real):
        def call(*given):
            nonlocal writes, left
            for step in (lambda: real(*given), lambda: None):
                writes, left = writes + 1, left - 1
                if left == 0:
                    raise Stop
                step()

        return call

    for name in ("replace", "remove", "fsync"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    whole = make("whole")
    dropped = [json.loads((tmp_path / f"whole/{n}/report.json").read_text()) for n in paths]
    assert [d["duplicates"]["near"] > 0 for d in dropped] == [True, True, True, False]
    rng, most = random.Random(times), writes // 3
    for trial in range(times):
        stops = 0
        while True:
            left = rng.randrange(99, most)
            try:
                made = make(f"cut{trial}")
                break
            except Stop:
                stops += 1
        left = -1
        assert stops > 2 and made == whole


# ---------------------------------------------------------------- what is said of it


def test_export_clean_is_what_was_kept(texts, tmp_path):
    out, clean = tmp_path / "out", tmp_path / "clean.jsonl"
    P.prepare([str(texts)], str(out), "bytes", export_clean=str(clean), minhash=True, **QUIET)
    exported = sorted(json.loads(line)["text"] for line in clean.read_text().splitlines())
    assert exported == kept_texts(out)
    again = P.prepare([str(clean)], str(tmp_path / "again"), "bytes", **QUIET)
    assert again["counts"]["cleaned"] == 0 and kept_texts(tmp_path / "again") == kept_texts(out)


def test_export_clean_spares_its_sources(tmp_path, monkeypatch):
    """Nor does it make half a file: of data that are finished, or were begun without it."""
    rows = [{"text": prose(n)} for n in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="E002.*is a source"):
        P.prepare([path], str(tmp_path / "no"), "bytes", export_clean=path, **QUIET)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 60
    journal = P.Output.journal

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    options = QUIET | {"shard_tokens": 3000}
    out, clean = str(tmp_path / "out"), str(tmp_path / "clean.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(P.Output, "journal", stop)
        P.prepare([path], out, "bytes", **options)
    with pytest.raises(UserError, match="E002.*lacks what was kept"):
        P.prepare([path], out, "bytes", export_clean=clean, **options)
    P.prepare([path], out, "bytes", **options)
    with pytest.raises(UserError, match="E002.*is finished"):
        P.prepare([path], out, "bytes", export_clean=clean, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(P.Output, "journal", stop)
        P.prepare([path], f"{out}2", "bytes", export_clean=clean, **options)
    os.remove(clean)
    with pytest.raises(UserError, match="E002.*lacks what was kept"):
        P.prepare([path], f"{out}2", "bytes", export_clean=clean, **options)


def test_another_field_is_another_dataset(tmp_path):
    rows = [{"text": prose(n), "title": f"title {n}"} for n in range(9)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    P.prepare([path], str(tmp_path / "out"), "bytes", field="title", **QUIET)
    for field in ("text", ""):
        with pytest.raises(UserError, match="E117.*fields"):
            P.prepare([path], str(tmp_path / "out"), "bytes", field=field, **QUIET)


def test_the_report_counts_what_is_in_the_shards(chats, tmp_path):
    """Of several shards: targets, padding, the lengths of documents, padding counted to them."""
    out = tmp_path / "out"
    manifest = P.prepare([chats], str(out), "bpe:400", seq_len=500, shard_tokens=4000, **QUIET)
    report = json.loads((out / "report.json").read_text())["splits"]["train"]
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 3
    masks = [np.load(out / shard["mask_file"], allow_pickle=False) for shard in shards]
    assert report["targets"] == sum(int(mask.sum()) for mask in masks)
    places = [np.load(out / shard["docs_file"], allow_pickle=False) for shard in shards]
    lengths = np.concatenate([np.diff(place.astype(int)) for place in places])
    assert report["documents"] == len(lengths)
    assert report["tokens_per_document"]["max"] == lengths.max()
    tokenizer, whole = T.load(str(out)), 0
    for split in manifest["splits"].values():
        whole += split["tokens"] - sum(shard["padding"] for shard in split["shards"])
    wanted = [chat.render(to_messages(conversation(n)), "chatml", tokenizer) for n in range(300)]
    assert whole == sum(len(ids) for ids, _ in wanted)


def test_rules_of_conversations(chats, tmp_path):
    """They see all of a conversation; addresses are masked in what is trained on; evaluation texts
    are found in it."""
    rows = [conversation(n) for n in range(40)]
    asked = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    for content in ("write to someone@mail.org soon", asked, "x" * 3000):
        rows.append({"messages": [{"role": "user", "content": content}, rows[0]["messages"][1]]})
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "eval.txt").write_text(asked)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    options = QUIET | {"pii": "mask", "max_chars": 2500, "seq_len": 4000}
    options |= {"decontaminate": str(tmp_path / "eval.jsonl"), "export_clean": str(tmp_path / "x")}
    manifest = P.prepare([path], str(tmp_path / "out"), "bytes", **options)
    names = {"rule:characters_2500_or_less": 1, "rule:free_of_evaluation_text": 1}
    assert manifest["counts"]["dropped"] == names and manifest["counts"]["cleaned"] == 1
    kept = (tmp_path / "x").read_text()
    assert "write to" in kept and "someone@" not in kept
    assert json.loads((tmp_path / "out" / "report.json").read_text())["masked"] == 1


def test_long_files_are_one_document_of_which_no_rule_decides(tmp_path, monkeypatch, capsys):
    """And that is said. Two that are equal are one; changed by cleaning is counted once."""
    monkeypatch.setattr(inputs, "PIECE", 5000)
    line, plain = "line {} someone@mail.org\n", "line {} of another piece\n"
    text = "".join((plain if 300 < n < 700 else line).format(n) for n in range(900))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    words = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    options = {"val_fraction": 0.0, "max_chars": 100, "pii": "mask"}
    manifest = P.prepare(words, str(tmp_path / "out"), "bytes", **options)
    counts = manifest["counts"]
    assert counts["dropped"] == {"E107": 1} and counts["kept"] == counts["cleaned"] == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["masked"] == 501
    assert "no rule" in capsys.readouterr().out and "someone" not in kept_texts(tmp_path / "out")[0]
    bad = tmp_path / "bad.txt"
    bad.write_bytes(text.encode() + b"\xff")
    with pytest.raises(UserError, match="E109.*whole files lost: .*bad.txt"):
        P.prepare([*words, str(bad)], str(tmp_path / "more"), "bytes", **options, max_bad=0.9)
    capsys.readouterr()
    P.main([*words, "--dry_run", "--max_chars", "100"])
    said = capsys.readouterr().out
    assert "\n2 rows looked at" in said and "not readable: none" in said
    source = {"out": f"{tmp_path}/m", "tokenizer": "bpe:300", "sources": {"a": words[0]}}
    (tmp_path / "d.yaml").write_text(json.dumps(source))
    made = P.prepare_mixture(str(tmp_path / "d.yaml"), {"quiet": True, "val_fraction": 0.0})
    assert made["a"]["tokenizer"]["n_vocab"] == 300  # the long file was looked at


def test_what_is_not_kept_stands_for_nothing(tmp_path):
    """Of two conversations that are nearly alike one is too long for a row: the other is kept,
    whichever has the smaller key."""
    rows = []
    for n in range(12):
        said = prose(n)
        for more in ("", " " + "and so it ends" * 3):
            turns = [{"role": "user", "content": f"tell me {n}"}]
            turns.append({"role": "assistant", "content": said + more})
            rows.append({"messages": turns})
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    longest = max(len(prose(n)) for n in range(12))
    options = {"too_long": "drop", "seq_len": longest + 30, "minhash": True}
    manifest = P.prepare([path], str(tmp_path / "out"), "bytes", **options | QUIET)
    tokenizer = T.load("bytes")
    kept = set()
    for n, row in enumerate(rows):
        if len(chat.render(to_messages(row), "chatml", tokenizer)[0]) <= longest + 31:
            kept.add(n // 2)
    assert manifest["counts"]["dropped"]["E106"] > 3
    assert manifest["counts"]["kept"] == len(kept) == 12


def test_options_that_do_nothing_are_named(texts, chats, tmp_path, capsys):
    P.prepare([str(texts / "a.jsonl")], str(tmp_path / "t"), "bytes", template="chat", seq_len=9)
    assert "--template does nothing" in capsys.readouterr().out
    P.prepare([chats], str(tmp_path / "c"), "bytes", max_doc_chars=99, max_bad=1.0)
    assert "conversations: --max_doc_chars does nothing" in capsys.readouterr().out


def cannot_begin(why):
    raise UserError("E003", why)


def test_a_worker_that_cannot_begin_says_why():
    """What an initializer of a pool raises is lost; this is not."""
    with pytest.raises(UserError, match="E003.*no such package"):
        list(pool.in_order([1, 2], 2, cannot_begin, ("no such package",)))


def test_a_file_that_lost_what_was_written_is_not_filled_with_zeros(tmp_path):
    shards.append_at(str(tmp_path / "f"), 0, b"1234")
    shards.append_at(str(tmp_path / "f"), 2, b"5")
    assert (tmp_path / "f").read_bytes() == b"125"
    with pytest.raises(UserError, match="E111.*3 bytes, 4 were"):
        shards.append_at(str(tmp_path / "f"), 4, b"6")


def test_lines_that_wait_for_the_disk_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.Growing, "HELD", 50)
    growing = shards.Growing(str(tmp_path / "f"))
    for n in range(9):
        growing.add({"number": n})
    assert growing.held < 50 and growing.size == os.path.getsize(growing.path) > 50


@pytest.mark.parametrize("make", [conversation, pair])
def test_exported_rows_are_read_back(make, tmp_path):
    """The same shards come from them; a reply of control characters only is none; what was cut is
    in the report."""
    rows = [make(n) for n in range(40)]
    empty = json.loads(json.dumps(rows[0]).replace("question", "another").replace("what", "how"))
    if make is pair:
        empty["chosen"] = "\x01\x02"
    else:
        empty["messages"][-1]["content"] = "\x01\x02"
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, empty])
    out, clean = tmp_path / "out", tmp_path / "clean.jsonl"
    options = QUIET | {"seq_len": 50, "max_bad": 0.1, "template": "raw", "loss_on": "all"}
    first = P.prepare([path], str(out), "bytes", export_clean=str(clean), **options)
    assert first["counts"]["dropped"] == {"E104": 1}
    again = P.prepare([str(clean)], str(tmp_path / "again"), "bytes", **options)
    assert again["splits"] == first["splits"]
    done = json.loads((out / "report.json").read_text())["done_to_rows"]
    assert (done.get("truncated", 0) > 5) == (make is conversation)


def test_validate_only_leaves_nothing(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    P.main([str(texts), "--validate_only", "--tokenizer", "bytes", "--quiet"])
    said = capsys.readouterr().out
    assert "# Data card" in said and "| documents | 1" in said and os.listdir(tmp_path) == []
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="E109"):
        P.main([str(tmp_path / "bad.jsonl"), "--validate_only", "--tokenizer", "bytes", "--quiet"])


def test_overlap_is_looked_for_in_the_shards(chats, texts, tmp_path):
    """Nothing that is in both, and, once a shard of val holds a document of train, that one."""
    options = QUIET | {"seq_len": 400}
    for name, source in (("chat", chats), ("text", str(texts))):
        out = tmp_path / name
        P.prepare([source], str(out), "bpe:400", **options)
        assert json.loads((out / "report.json").read_text())["train_val_overlap"] == 0
        manifest = json.loads((out / "manifest.json").read_text())
        splits = {}
        for split in ("train", "val"):
            splits[split] = Shards(str(out), split, 0, manifest["settings"].get("rows"))
            splits[split].closed = manifest["splits"][split]["shards"]
            splits[split].pad_id = manifest["tokenizer"]["pad_id"]
        assert datacard.overlap(str(out), splits) == 0
        splits["val"].closed = splits["train"].closed
        documents = manifest["splits"]["train"]["docs"]
        assert datacard.overlap(str(out), splits) == documents


def test_presets_of_the_card_are_those_of_the_docs():
    table = (ROOT / "docs" / "presets.md").read_text()
    for name, parameters in datacard.PRESETS.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        assert row.split("|")[3].strip().replace(",", "") == str(parameters)


def test_the_prepare_key_of_a_run_has_the_options():
    """Types too; a run has no use for those that are about the command."""
    known = {"sources": [str], "val_sources": [str], "tokenizer": str, "out": str}
    for name, kind in INSIDE["prepare"].items():
        if name not in known:
            default = OPTIONS[name][0]
            own = type(default) if isinstance(default, (str, bool)) else P.kind_of(name)
            kind = kind[0] if isinstance(kind, tuple) else kind  # else a mapping
            assert kind in (own, [str], bool if name in SWITCHES else own), name
    left = set(OPTIONS) - set(INSIDE["prepare"])
    assert left == {
        "seed", "shard_tokens", "max_doc_chars", "workers", "batch_bytes", "strict", "quiet",
        "export_clean",
    }  # fmt: skip


@pytest.mark.parametrize("which", ["file", "docs_file", "mask_file"])
def test_one_changed_bit_is_found(which, chats, tmp_path):
    manifest = P.prepare([chats], str(tmp_path / "out"), "bpe:400", seq_len=100, **QUIET)
    P.verify(str(tmp_path / "out"))
    path = tmp_path / "out" / manifest["splits"]["train"]["shards"][0][which]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"E111.*{path.name}"):
        P.verify(str(tmp_path / "out"))
