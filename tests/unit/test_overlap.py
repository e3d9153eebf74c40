"""lumen/overlap.py: what stands in the training shards is found, wherever borders lie; what does not
is not."""

import numpy as np
import pytest

from lumen import overlap as overlaps
from lumen import tokenizer as tokenizers
from lumen.overlap import NGRAM, overlap
from lumen.questions import Options
from lumen.texts import TextTask

BYTES = tokenizers.load("bytes")
PLANTED = "Which of these planted questions is in the data?"
CLEAN = "Nobody has ever written down this one, has he?"


class Questions(TextTask):
    kind = "choice"


def questions(*asked, name="q", kind=Questions) -> TextTask:
    return kind(name, Options(), {}, list(asked))


def run(folder, parts, dtype=np.uint16, **config) -> dict:
    """The state of a run on bare shards."""
    folder.mkdir(exist_ok=True)
    for k, ids in enumerate(parts):
        np.save(folder / f"part_{k}.npy", np.asarray(ids, dtype))
    config = {"data_dir": str(folder), "val_fraction": 0.0, "model": {"max_seq_len": 8}} | config
    return {"config": config}


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n)


def look(tasks, state, said=None, **more) -> dict:
    say = (lambda text: None) if said is None else said.append
    return overlap(tasks, state, BYTES, say, **more)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("cut", [None, 495, 510, 525])  # of shards, in the question or beside it
def test_a_planted_question_is_found_and_no_other(tmp_path, monkeypatch, dtype, cut):
    monkeypatch.setattr(overlaps, "READ", 256)  # a part ends at place 512, in the question
    monkeypatch.setattr(overlaps, "BLOCK", 64)
    planted = BYTES.encode(f"\n{PLANTED}\n")
    ids = np.concatenate([noise(490), planted, [BYTES.eot_id], noise(300, 1)])
    parts = [ids] if cut is None else [ids[:cut], ids[cut:]]
    found = look([questions(CLEAN, PLANTED, CLEAN[3:])], run(tmp_path, parts, dtype))["q"]
    assert (found["n"], found["n_hit"], found["hits"]) == (3, 1, [1])
    assert found["share"] == pytest.approx(1 / 3) and found["tokens"] == found["of"] == len(ids)
    ((number, text),) = found["examples"]
    assert number == 1 and text in PLANTED and len(text) == NGRAM


def test_each_place_of_a_block_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(overlaps, "READ", 64)
    monkeypatch.setattr(overlaps, "BLOCK", 32)
    core = "thirteen char"
    state = run(tmp_path, [noise(200)])
    for at in range(0, 187, 3):
        ids = noise(200)
        ids[at : at + NGRAM] = BYTES.encode(core)
        np.save(tmp_path / "part_0.npy", ids.astype(np.uint16))
        assert look([questions(f"?{core}!")], state)["q"]["hits"] == [0], at


def test_thirteen_in_a_row_and_not_twelve(tmp_path):
    ids = BYTES.encode(PLANTED)
    for n, hits in ((NGRAM, [0]), (NGRAM - 1, [])):
        parts = [np.concatenate([noise(99), ids[5 : 5 + n], noise(99, 1)])]
        assert look([questions(PLANTED)], run(tmp_path, parts))["q"]["hits"] == hits


def test_a_short_question_must_be_there_as_a_whole(tmp_path):
    parts = [np.concatenate([noise(50), BYTES.encode("Xs it 10 or 2X"), noise(50, 1)])]
    asked = questions("is it 10 or 2?", "s it 10 or", "is it 10 or 3?", "is it", "it 10 or")
    found = look([asked], run(tmp_path, parts))["q"]
    assert found["hits"] == [0, 1, 4], "its first and last token may be others, and no more"
    assert found["n"] == 4 and found["short"] == 1


def test_hits_are_read_and_not_only_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(overlaps, "MIX", np.uint64(1))  # the hash is the sum of the ids
    ids = BYTES.encode(PLANTED)[1:-1]
    for planted, hits in ((ids, [0]), (ids[::-1], [])):
        parts = [np.concatenate([noise(50), planted, noise(50, 1)])]
        assert look([questions(PLANTED)], run(tmp_path, parts))["q"]["hits"] == hits


def test_a_page_counts_where_half_of_it_is_there(tmp_path):
    page = "".join(chr(97 + i * i % 23) + chr(65 + i * i * i % 26) for i in range(100))
    for share, hits in ((0.4, []), (0.7, [0])):
        ids = BYTES.encode(page)[: int(len(page) * share)]
        state = run(tmp_path, [np.concatenate([ids, noise(99)])])
        found = look([questions(page, kind=TextTask)], state)["q"]
        assert found["hits"] == hits and found["ngrams"] == pytest.approx(share, abs=0.1)


def test_what_is_held_out_is_not_looked_at_and_a_part_is_said(tmp_path, monkeypatch):
    planted = BYTES.encode(PLANTED)
    state = run(tmp_path, [np.concatenate([noise(900), planted])], val_fraction=0.1)
    assert look([questions(PLANTED)], state)["q"]["hits"] == []
    state["config"]["val_fraction"] = 0.0
    monkeypatch.setattr(overlaps, "READ", 100)
    said = []
    found = look([questions(PLANTED)], state, said, most_tokens=500)["q"]
    assert found["tokens"] <= 500 < found["of"] and "500 of 948 training tokens" in found["said"]
    assert "--overlap_tokens" in said[0]


def test_data_that_are_not_looked_at_are_named(tmp_path):
    state = run(tmp_path / "a", [noise(99)]) | {"base": {"path": str(tmp_path / "gone")}}
    found = look([questions(PLANTED)], state)["q"]
    assert "gone was trained on is not known" in found["said"] and found["n_hit"] == 0
    state = {"config": {"data_dir": str(tmp_path / "b"), "model": {"max_seq_len": 8}}}
    said = []
    assert look([questions(PLANTED)], state, said) == {} and "b is not here" in said[0]
    assert look([questions(PLANTED)], {}) == {}


def test_data_that_cannot_be_read_cost_no_score(tmp_path):
    state = run(tmp_path, [BYTES.encode(PLANTED), noise(99)])
    (tmp_path / "part_1.npy").unlink()
    (tmp_path / "part_1.npy").symlink_to(tmp_path / "gone")
    said = []
    assert look([questions(PLANTED)], state, said) == {} and "not looked at" in said[0]
    source = overlaps.open_source(str(run_folder(tmp_path / "b")), state["config"])
    (tmp_path / "b/part_1.npy").unlink()  # while it is read
    damaged = []
    found = list(overlaps.blocks([source, source], 1.0, damaged))
    assert found == [] and len(damaged) == 2 and "part_1.npy" in damaged[0]
    assert look([questions(PLANTED)], run(tmp_path / "c", [noise(99)]), most_tokens=0) == {}


def run_folder(folder):
    run(folder, [noise(50), noise(50)])
    return folder
