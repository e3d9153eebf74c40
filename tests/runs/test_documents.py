"""Runs on rows of several documents with masks: any cut of a step gives the same gradient, and a
step that no target is left of changes nothing."""

import math

import numpy as np
import pytest
import torch
import yaml
from conftest import read_lines
from rig import KINDS, at_iteration, fake_fp16

from lumen import machine
from lumen.errors import UserError
from train import Trainer


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> str:
    """Bare shards with documents of 1 to 60 tokens and a mask: rows differ in how much counts."""
    folder, rng = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    for i in range(2):
        tokens = (np.cumsum(rng.integers(0, 3, 7000)) % 97).astype(np.uint16)
        starts = np.cumsum(rng.integers(1, 61, 400))
        starts = np.concatenate([[0], starts[starts < 7000], [7000]])
        mask = rng.random(7000) < np.repeat(rng.random(70), 100)
        for name, array in (("", tokens), (".docs", starts.astype("<u8")), (".mask", mask)):
            array = array.astype(np.uint8) if name == ".mask" else array
            np.save(folder / f"part_{i}{name}.npy", array)
    return str(folder)


def metrics(trainer, key) -> list:
    return [r[key] for r in read_lines(trainer.out / "metrics.jsonl") if key in r]


def documents_alone(trainer) -> float:
    """The mean loss of the first step's rows, each document in a forward pass of its own."""
    batch, ce, count = trainer.loader.batch(0, 4), 0.0, 0
    for x, y, docs in zip(batch.x, batch.y, batch.docs):
        for number in range(docs.max() + 1):
            own = docs == number
            of = (torch.from_numpy(t[own])[None] for t in (x, y))
            _, sums = trainer.model.train()(*of)
            ce, count = ce + sums["ce"].item(), count + sums["count"].item()
    return ce / count


@pytest.mark.parametrize(
    "kind", ("dense", pytest.param("moe", marks=pytest.mark.nightly), "hybrid")
)
def test_any_cut_of_a_step_gives_the_same_gradient(tiny, documents, kind):
    found = {}
    for micro, how in ((1, "none"), (2, "selective"), (4, "block")):
        keys = tiny(f"{kind}{micro}", KINDS[kind] | {"dropout": 0.0}, max_steps=4)
        keys |= {"data_dir": documents, "document_mask": True, "activation_checkpointing": how}
        keys |= {"batch_size": micro, "gradient_accumulation_steps": 4 // micro}
        trainer = Trainer(keys)
        alone = documents_alone(trainer)
        assert trainer.fit() == 0
        assert metrics(trainer, "loss")[0] == pytest.approx(alone, rel=1e-5)
        found[micro] = [metrics(trainer, key) for key in ("loss", "grad_norm", "val_loss")]
        assert yaml.safe_load((trainer.out / "config.yaml").read_text())["document_mask"] is True
    counts = trainer.tokens
    assert 0 < counts < 4 * 4 * 32 * 0.8
    for other in (2, 4):
        for mine, base in zip(found[other], found[1]):
            assert mine == pytest.approx(base, rel=2e-5)
    assert all(map(math.isfinite, found[1][0]))


def test_a_run_goes_on_and_masks_are_told(tiny, documents):
    """Resumed to the bit; document_mask: null is false of text, and masks count all the same."""
    keys = tiny("whole", max_steps=8) | {"data_dir": documents, "document_mask": True}
    whole = Trainer(keys)
    whole.fit()
    constant = {"out_dir": str(whole.out) + "-cut", "lr_schedule": "constant"}
    first = Trainer(keys | constant | {"max_steps": 4})
    first.fit()
    second = Trainer(keys | constant)
    second.fit()
    plain = Trainer(tiny("plain", max_steps=1) | {"data_dir": documents})
    assert plain.cfg.document_mask is False and plain.loader.next().docs is None
    assert (plain.loader.next().y < 0).any()
    plain.fit()
    again = Trainer(keys | {"out_dir": str(whole.out) + "-again"})
    again.fit()
    assert metrics(again, "loss") == metrics(whole, "loss")
    assert second.step == 8 and len(set(metrics(second, "loss"))) == 8


@pytest.mark.parametrize("precision", ("fp32", "mixed_fp16"))
def test_a_step_without_a_target_changes_nothing(tiny, precision, monkeypatch):
    """No loss, no NaN in a weight, no step of AdamW, no halved loss scale, no rollback; and the
    decision says why."""
    if precision == "mixed_fp16":
        monkeypatch.setattr(machine, "detect", fake_fp16(machine.detect))
    trainer = Trainer(tiny(precision, KINDS["moe"], max_steps=6, precision=precision))
    following, seen = trainer.loader.next, {}

    def rows():
        batch = following()
        if trainer.step == 3:
            batch = batch._replace(y=np.full_like(batch.y, -1))
        return batch

    def look(name):
        def act(t):
            scale = t.loss_scale.value.item() if t.loss_scale else None
            seen[name] = {n: p.clone() for n, p in t.weights.items()}, scale

        return act

    trainer.loader.next = rows
    at_iteration(trainer, {4: look("before"), 5: look("after"), 6: look("later")})
    assert trainer.fit() == 0
    (before, scale), (after, same), (later, _) = seen["before"], seen["after"], seen["later"]
    assert all(torch.equal(after[name], before[name]) for name in before) and same == scale
    assert not all(torch.equal(later[name], before[name]) for name in before)
    drops = [r for r in read_lines(trainer.out / "decisions.jsonl") if r["trigger"] == "nonfinite"]
    assert len(drops) == 1 and drops[0]["action"] == "drop"
    assert drops[0]["reason"] == "no loss; the masks of its rows leave no target that counts"
    assert all(torch.isfinite(p).all() for p in trainer.weights.values())
    assert trainer.orchestrator.dropped == 1 and trainer.step == 6


def test_a_run_whose_masks_leave_nothing_is_stopped(tiny, documents, tmp_path):
    """It would go through all of its steps and learn nothing."""
    for file in ("part_0.npy", "part_1.npy"):
        tokens = np.load(f"{documents}/{file}")
        np.save(tmp_path / file, tokens)
        np.save(tmp_path / f"{file[:-4]}.mask.npy", np.zeros(len(tokens), np.uint8))
    keys = tiny(max_steps=100, val_fraction=0) | {"data_dir": str(tmp_path)}
    trainer = Trainer(keys)
    with pytest.raises(UserError, match="leave no target that counts") as caught:
        trainer.fit()
    assert caught.value.code == "E301"
    rows = read_lines(trainer.out / "decisions.jsonl")
    assert {row["action"] for row in rows} == {"drop"}, "no snapshot would have more targets"
