"""lumen/held_out.py: the rows of a run, asked one by one, have the loss that the run wrote down."""

import json
import shutil

import numpy as np
import pytest
from conftest import read_lines
from rig import KINDS, bytes_data, finish

from lumen import tokenizer as tokenizers
from lumen.held_out import val_task
from lumen.models import open_model
from lumen.overlap import overlap
from lumen.questions import Asked, Options
from lumen.scorer import Scorer
from lumen.scores import scores_of

BYTES = tokenizers.load("bytes")


def marked_shards(folder) -> str:
    """Bare shards with documents of 1 to 60 tokens and a mask."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokens = (np.cumsum(rng.integers(0, 3, 4000)) % 97).astype(np.uint16)
    starts = np.cumsum(rng.integers(1, 61, 400))
    starts = np.concatenate([[0], starts[starts < 4000], [4000]])
    mask = rng.random(4000) < np.repeat(rng.random(40), 100)
    np.save(folder / "part_0.npy", tokens)
    np.save(folder / "part_0.docs.npy", starts.astype("<u8"))
    np.save(folder / "part_0.mask.npy", mask.astype(np.uint8))
    return str(folder)


def prepared_text(folder) -> str:
    """Documents that a tokenizer is known of, and a val split."""
    texts = [{"text": f"document {i} has {i * i} words\nand  {i % 7} ends"} for i in range(300)]
    source = folder.parent / "texts.jsonl"
    source.write_text("\n".join(map(json.dumps, texts)))
    bytes_data(folder, source, val_fraction=0.1)
    return str(folder)


def ask_val(out, say=print):
    opened = open_model(out, precision="fp32", device="cpu")
    made = val_task(opened, Options(), say)
    asked = Asked(opened.model, BYTES, None, 260, Scorer(opened.model, BYTES))
    return made, opened, [made.line(i, asked) for i in range(len(made))]


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_val_is_the_loss_that_the_run_wrote_down(tiny, tmp_path, kind):
    if kind == "dense":
        keys = tiny(model={"vocab_size": 260}, max_steps=3, data_dir=prepared_text(tmp_path / "d"))
    else:
        data = {"data_dir": marked_shards(tmp_path / "d"), "document_mask": True}
        keys = tiny(model=KINDS[kind], max_steps=3, val_fraction=0.2, **data)
    run = finish(keys | {"precision": "fp32", "eval_tokens": 700})
    row = read_lines(run.out / "metrics.jsonl")[-1]
    made, opened, lines = ask_val(run.out)
    found = {s.metric: s for s in scores_of("text", "val", made.metric, lines, 260, 1.0)}
    assert len(lines) > 10 and row["step"] == opened.step
    assert found["loss"].value == pytest.approx(row["val_loss"], rel=1e-6)
    assert found["token_acc"].value == row["val_accuracy"]
    assert found["loss"].control > found["loss"].majority, "other rows tell nothing of these"
    if kind == "dense":
        assert found["bits_per_byte"].value == pytest.approx(row["val_bpb"], rel=1e-6)
        assert len(list(made.texts())) == len(lines)
        hits = overlap([made], opened.state, opened.tokenizer, print)["val"]
        assert hits["tokens"] == hits["of"] > 1000
    assert "not the rows" not in made.about["said"]
    opened.state["config"]["eval_tokens"] = 100
    said = []
    assert "not the rows" in val_task(opened, Options(), said.append).about["said"] and said
    shutil.rmtree(tmp_path / "d")
    assert val_task(opened, Options(), said.append) is None
    assert "left out: the run's data are not here" in said[-1]
    assert val_task(type(opened)(**vars(opened) | {"state": {}}), Options(), said.append) is None
