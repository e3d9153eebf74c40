"""Runs over several sources: phases with lengths and rates of their own, weights that change on
resume, buckets; exact at every border. And what a resume says of data that are not as they were."""

import collections
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import fingerprint, read_lines
from rig import finish, stop_at

import prepare_data
from lumen import difficulty, lines
from lumen.errors import UserError
from lumen.schedule import lr_at
from train import Trainer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Folders of one tokenizer: base, chat, and with another seed: seed; and one of another: other.

    Their documents say 0 1 2 ... in words of one source and of the other.
    """
    home = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(3)
    for name, words in (("base", "the sun rose over a hill"), ("chat", "who is it said he")):
        words, texts = words.split(), []
        for _ in range(120):
            texts.append(" ".join(rng.choice(words, rng.integers(8, 40))))
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (home / f"{name}.jsonl").write_text(rows)
    make = functools.partial(prepare_data.prepare, workers=1)
    make([str(home / "base.jsonl")], str(home / "base"), tokenizer="bpe:270", val_fraction=0.1)
    mine = str(home / "base" / "tokenizer.json")
    make([str(home / "chat.jsonl")], str(home / "chat"), tokenizer=mine, val_fraction=0.1)
    make([str(home / "base.jsonl")], str(home / "seed"), tokenizer=mine, val_fraction=0.1, seed=9)
    make([str(home / "base.jsonl")], str(home / "other"), tokenizer="bytes", val_fraction=0.1)
    return home


def keys_of(tiny, prepared, name="run", **changes) -> dict:
    keys = {"data_dir": ..., "max_steps": ..., "eval_interval": 4} | changes
    return tiny(name, model={"vocab_size": 0, "max_seq_len": 16, "n_layers": 1}, **keys)


def same(a: Trainer, b: Trainer, step: int) -> None:
    assert fingerprint(a.out, step) == fingerprint(b.out, step)


def resumed_at(keys: dict, *steps: int) -> Trainer:
    """Stopped while each of these steps is read, and gone on with to the end."""
    for step in steps:
        stop_at(Trainer(keys), step).fit()
    return finish(keys)


def test_a_sequence_of_phases_is_exact_on_resume_at_and_around_the_border(tiny, prepared):
    modes = {
        "training_mode": "hybrid_sequential",
        "base_paths": [str(prepared / "base")],
        "finetuning_paths": [str(prepared / "chat")],
        "base_epochs": 0.15,
        "finetuning_epochs": 0.15,
    }
    probe = Trainer(keys_of(tiny, prepared, "probe", **modes))
    data = probe.cfg.data
    border, end = probe.run.phases[1]["step"], probe.run.max_steps
    probe.close()
    held = probe.data.sources["base"].windows, probe.data.sources["finetuning"].windows
    assert (border, end - border) == tuple(int(0.15 * n) // 4 for n in held)
    # the same, by hand, with a warm-up before the second
    data["phases"][1] |= {"lr_scale": 0.5, "warmup_steps": 3}
    whole = finish(keys_of(tiny, prepared, "whole", data=data))
    keys = keys_of(tiny, prepared, "parts", data=data)
    parts = resumed_at(keys, border - 1, border)  # at the border, and a step beyond it
    same(parts, whole, end)
    rows = {row["step"]: row for row in read_lines(whole.out / "metrics.jsonl") if "lr" in row}
    rates = [rows[step + 1]["lr"] for step in range(end)]
    assert rates == [lr_at(whole.cfg, whole.run, step) for step in range(end)]
    assert rates[border] == pytest.approx(3e-3 * 0.5 / 3)  # a third of the second phase's peak
    assert max(rates[border:]) == pytest.approx(3e-3 * 0.5)
    # tokens of each source, and the loss of both on held-out text in both phases
    assert rows[border]["tokens/base"] == border * 4 * 16 and rows[border]["tokens/finetuning"] == 0
    assert rows[end]["tokens/finetuning"] == (end - border) * 4 * 16
    assert rows[end]["epoch/base"] == border * 4 / held[0]
    seen = [row for row in read_lines(whole.out / "metrics.jsonl") if "val_loss" in row]
    assert all({"val_loss/base", "val_loss/finetuning"} <= set(row) for row in seen)
    assert all(row["val_loss"] == row["val_loss/finetuning"] for row in seen)  # what it ends with
    said = "\n".join(lines.start_lines(whole.tell.facts()))
    assert f"mixture    finetuning from step {border}: finetuning 100.0 % (0." in said
    assert "learning rate x 0.5; the schedule begins anew with 3 warm-up steps" in said
    last = [row for row in read_lines(whole.out / "metrics.jsonl") if "epoch/base" in row][-1]
    assert last["epoch/base"] == pytest.approx(border * 4 / held[0]), "none of it after the border"
    assert "(ppl " in (whole.out / "train.log").read_text()


def test_weights_that_change_on_resume_repeat_and_skip_nothing(tiny, prepared):
    """What was read is what a wrapper of the loader has seen, not what the loader says."""
    seen = []

    def spied(keys, until):
        trainer = Trainer(keys)
        batch, spent = trainer.loader.batch, trainer.loader.next

        def following():
            found = spent()
            rows = range(found[0], found[0] + trainer.run.micro_batch)
            seen.extend(trainer.loader.locate(row) for row in rows)
            return found

        trainer.loader.batch, trainer.loader.next = batch, following
        if until:
            stop_at(trainer, until)
        assert trainer.fit() == 0
        return trainer

    def mixed(base, chat, **more):
        sources = {"base": {"dir": str(prepared / "base"), "weight": base}}
        sources["chat"] = {"dir": str(prepared / "chat"), "weight": chat}
        return keys_of(tiny, prepared, data={"sources": sources}, max_steps=60, **more)

    spied(mixed(0.7, 0.3), 20)
    spied(mixed(0.1, 0.9), 41)
    last = spied(mixed(1, 1), None)
    assert [start for start, _ in last.run.segments] == [0, 84, 168]
    assert len(seen) == 60 * 4
    for name, source in last.data.sources.items():
        places = [(epoch, window) for of, window, epoch in seen if of == name]
        n = source.windows
        assert [epoch for epoch, _ in places] == [i // n for i in range(len(places))]
        for i in range(0, len(places), n):
            assert len(set(places[i : i + n])) == len(places[i : i + n])
    told = last.loader.rows(last.cursor)
    assert told == collections.Counter(name for name, _, _ in seen)


def test_a_curriculum_by_the_loss_of_a_model(tiny, prepared, capsys):
    """From hard numbers to a run over buckets of them, exact on resume across its stages."""
    judge = finish(keys_of(tiny, prepared, "judge", data_dir=str(prepared / "base"), max_steps=8))
    words = [str(judge.out), str(prepared / "base"), "--max_seq_len", "16", "--device", "cpu"]
    sources = {"t": {"dir": str(prepared / "base"), "buckets": 3, "difficulty": "loss"}}
    data = {"sources": sources, "curriculum": 0.8}
    keys = keys_of(tiny, prepared, "whole", data=data, max_steps=24)
    with pytest.raises(UserError, match="E110.*python -m lumen.difficulty RUN"):
        Trainer(keys)
    assert difficulty.main(words) == 0
    assert "windows of 16 tokens, step 8 of" in capsys.readouterr().out
    with pytest.raises(UserError, match="E113.*another tokenizer"):
        difficulty.main([str(judge.out), str(prepared / "other")])
    whole = finish(keys)
    assert [phase["step"] for phase in whole.run.phases] == [0, 8, 16]
    same(resumed_at(keys | {"out_dir": f"{whole.out}.parts"}, 7, 12), whole, 24)
    # the number of a window is its mean loss, as the model that judged it says
    from sample import load

    model = load(judge.out, device="cpu")[0]
    easy, _, hard = (whole.data.sources[f"t.{k}"] for k in (1, 2, 3))
    means = []
    for bucket in (easy, hard):
        x, y = (np.stack(part) for part in zip(*[(w[:-1], w[1:]) for w in windows_of(bucket)]))
        means.append(mean_loss(model, x, y))
    assert means[0] < means[1] - 0.05
    last = read_lines(whole.out / "metrics.jsonl")[-1]
    assert {"epoch/t.1", "tokens/t.3"} <= set(read_lines(whole.out / "metrics.jsonl")[-2])
    assert "val_loss" in last and not any(key.startswith("val_loss/") for key in last)  # one source
    # another order of difficulty is other data
    sources["t"]["difficulty"] = "length"
    with pytest.raises(UserError, match="E118.*t.1 has changed: which windows are how"):
        Trainer(keys | {"max_steps": 30, "data": data})


def windows_of(bucket) -> list:
    return [bucket.window(i) for i in range(bucket.windows)]


def mean_loss(model, x, y) -> float:
    import torch

    with torch.no_grad():
        _, sums = model(torch.from_numpy(x), targets=torch.from_numpy(y))
    return float(sums["ce"] / sums["count"])


def test_a_resume_says_what_of_the_data_has_changed_and_how_to_go_on(tiny, prepared, tmp_path):
    folder = tmp_path / "data"

    def lay(name, change=None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared / name, folder)
        if change:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest |= change | {"fingerprint": f"{name}{change}"}
            (folder / "manifest.json").write_text(json.dumps(manifest))

    lay("base", {"template": "chatml"})
    keys = keys_of(tiny, prepared, data_dir=str(folder), max_steps=2)
    finish(keys)
    keys["max_steps"] = 3
    for name, change, said in (
        ("base", {"template": "instruct"}, "data has changed: the chat template ("),
        ("seed", {"template": "chatml"}, "settings of prepare_data.py, the training shards, the v"),
    ):
        lay(name, change)
        with pytest.raises(UserError, match="E118") as error:
            Trainer(keys)
        assert said in error.value.text and "--allow_data_change true" in error.value.text
    lay("other")
    with pytest.raises(UserError, match="E113.*another tokenizer"):
        Trainer(keys)
    lay("seed")
    again = finish(keys | {"allow_data_change": True})
    assert again.step == 3
