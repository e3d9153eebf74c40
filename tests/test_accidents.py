"""Accidents of real life: what people and machines do to a run, one test each. Nothing may be lost, nobody misled.

Each test is an accident that happened to somebody (a report about another trainer, a try of our own), told in its
docstring: what was done, and what must be there afterwards.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fingerprint, losses, read_lines, run_python, write_yaml
from safetensors.torch import load_file, save_file

import bench
import checkpoint
import train
from config import build_config, read_config
from errors import UserError
from export import main as export_main
from prepare_data import main as prepare_main
from prepare_data import prepare
from train import Parallel, Trainer, main

# ---------------------------------------------------------------- a run has one owner; restarts; consoles, disks


# ---------------------------------------------------------------- what belongs to the data; moved and resumed runs

TEXTS = {  # three languages; the third speaks as the first does
    "a": "".join(f"the cat {i % 7} sat on the mat {i % 5} and slept\n\n" for i in range(900)),
    "b": "".join(f"zwei {i % 9} kleine jecke {i % 4} fuhren quer durch xyz\n\n" for i in range(900)),
}
TEXTS["more"] = TEXTS["a"].replace("cat", "dog") * 2


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Folders of data: `a` and `b` with a tokenizer each of equally many ids, `more` with a's, `bytes` with bytes."""
    top = tmp_path_factory.mktemp("spoken")
    for name, text in TEXTS.items():
        (top / f"{name}.txt").write_text(text)
    for name, source, tokenizer in (
        ("a", "a", "bpe:270"),
        ("b", "b", "bpe:270"),
        ("more", "more", str(top / "a")),
        ("bytes", "a", "bytes"),
    ):
        options = {"val_fraction": 0.2, "max_doc_chars": 500, "workers": 1, "quiet": True}
        prepare([str(top / f"{source}.txt")], str(top / name), tokenizer, **options)
    return top


def speak(tiny, data, name="run", **changes) -> dict:
    """Keys of a run on prepared data."""
    keys = tiny(name, {"vocab_size": 0}, val_fraction=..., save_interval=2, max_steps=4)
    return keys | {"data_dir": str(data)} | changes


def trained(keys) -> Trainer:
    trainer = Trainer(keys)
    assert trainer.fit() == 0
    return trainer


def sum_of(data) -> str:
    return json.loads((data / "manifest.json").read_text())["tokenizer"]["sha256"]


def damage(folder, name: str, value: float) -> None:
    """Put `value` into a tensor of a checkpoint, with all sums right again: so a run that diverged leaves it."""
    file = Path(folder) / "rank_00000.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    manifest["files"][file.name] = {"sha256": checkpoint.sha256(file), "size": file.stat().st_size}
    checkpoint.write_json(Path(folder) / "manifest.json", manifest | {"sha256": checkpoint.digest(manifest)})


def test_weights_of_another_tokenizer(tiny, spoken, tmp_path, capsys):
    """init_from a run whose tokenizer is not that of the data, of as many ids: trained from noise, without a word."""
    first = trained(speak(tiny, spoken / "a", "first"))
    fresh = speak(tiny, spoken / "b", "second", init_from=str(first.out))
    for init_from in (first.out, checkpoint.step_dir(first.out, 2)):
        with pytest.raises(UserError, match="E113.*--tokenizer") as error:
            Trainer(fresh | {"init_from": str(init_from)})
        assert all(sum_of(spoken / name) in error.value.text for name in "ab")
    assert not Path(fresh["out_dir"]).exists(), "who is refused changes nothing"
    meant = Trainer(fresh | {"allow_tokenizer_change": True})
    assert any("another tokenizer" in line for line in meant.changes)
    meant.close()
    good = Trainer(speak(tiny, spoken / "more", "third", init_from=str(first.out)))
    assert not good.changes
    good.close()
    with pytest.raises(UserError, match="E113.*--tokenizer"):  # not: ten keys of the model differ
        Trainer(fresh | {"data_dir": str(spoken / "bytes")})
    with pytest.raises(UserError, match="E305.*vocab_size: 270 there, 260 here.*--tokenizer"):
        Trainer(fresh | {"data_dir": str(spoken / "bytes"), "allow_tokenizer_change": True})


def test_weights_and_tokenizer_of_a_hugging_face_folder(tiny, spoken, tmp_path):
    """The same from a Hugging Face folder, whose tokenizer.json another program wrote anew: its content counts."""
    from export import from_hf, to_hf

    first = trained(speak(tiny, spoken / "a", "first", model=tiny()["model"] | {"vocab_size": 0, "dropout": 0.0}))
    to_hf(first.out, folder := tmp_path / "hf", say=print)
    whole = json.loads((folder / "tokenizer.json").read_text())
    del whole["model"]["name"]
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=2))
    from_hf(folder, tmp_path / "imported")
    for source in (folder, tmp_path / "imported"):
        Trainer(speak(tiny, spoken / "a", f"good {source.name}", init_from=str(source))).close()
        with pytest.raises(UserError, match=f"E113.*{sum_of(spoken / 'b')}"):
            Trainer(speak(tiny, spoken / "b", "bad", init_from=str(source)))
    (folder / "tokenizer.json").unlink()
    silent = Trainer(speak(tiny, spoken / "b", "silent", init_from=str(folder)))
    assert sum("cannot say" in line for line in silent.changes) == 1, "nothing to compare: one note"
    silent.close()


def test_a_run_goes_on_with_another_tokenizer(tiny, spoken, capsys):
    """allow_data_change onto data of another tokenizer: out_dir kept the first one's tokenizer.json, and all its text
    was nonsense. Refused; where it is meant, each step is read with its own."""
    import sample

    keys = speak(tiny, spoken / "a", save_total_limit=0)
    out = trained(keys).out
    other = keys | {"data_dir": str(spoken / "b"), "max_steps": 6, "allow_data_change": True}
    with pytest.raises(UserError, match=f"E113.*{sum_of(spoken / 'a')}.*{sum_of(spoken / 'b')}"):
        Trainer(other)
    assert (out / "tokenizer.json").read_bytes() == (spoken / "a/tokenizer.json").read_bytes()
    trained(other | {"allow_tokenizer_change": True})
    for name in ("tokenizer.json", "token_bytes.npy"):
        assert (out / name).read_bytes() == (spoken / "b" / name).read_bytes()
    for step, name in ((4, "a"), (6, "b")):
        assert sample.load(out, step=step)[1].sha256 == sum_of(spoken / name)


def test_numbers_of_another_validation_set_are_not_compared(tiny, spoken, capsys):
    """A run went on with other data: the best of the old validation text stayed the best for ever, --best gave the old
    model and patience counted against it. All of that begins anew, and is kept where the set is the same."""
    keys = speak(tiny, spoken / "a", early_stopping_patience=5)
    first = trained(keys)
    assert first.best_step == 4

    def again(**changes):
        trainer = Trainer(keys | {"allow_data_change": True, "max_steps": 6} | changes)
        found = trainer.best_val_loss, trainer.best_step, (trainer.out / "best.json").exists()
        trainer.close()
        return found

    assert again() == (first.best_val_loss, 4, True), "the same set"
    capsys.readouterr()
    for change in ({"data_dir": str(spoken / "more")}, {"eval_tokens": 512}):
        shutil.copytree(first.out, copy := Path(f"{first.out}-{len(change)}-{[*change][0]}"))
        assert again(**change, out_dir=str(copy)) == (None, None, False), change
        assert capsys.readouterr().out.count("begins anew") == 1
    last = trained(keys | {"allow_data_change": True, "max_steps": 6, "data_dir": str(spoken / "more")})
    assert last.best_step == 6 and checkpoint.best_step(last.out) == 6 and not last.evaluations_since_best


def test_more_text_for_training_leaves_the_validation_set_as_it_is(tiny, shards, tmp_path):
    """Shards were added, the val_ shard is the same: its best is still the best."""
    shutil.copytree(shards, folder := tmp_path / "data")
    (folder / "part_2.npy").rename(folder / "val_0.npy")
    best = trained(tiny(data_dir=str(folder), max_steps=4)).best_val_loss
    np.save(folder / "part_9.npy", np.arange(3000, dtype=np.uint16) % 97)
    again = Trainer(tiny(data_dir=str(folder), max_steps=5, allow_data_change=True))
    assert again.best_val_loss == best
    again.close()


def test_weights_that_are_nan(tiny, tmp_path):
    """A run that diverged was taken as init_from: three steps, then "lower learning_rate". Its export was "a bug"."""
    from export import from_hf, to_hf

    first = trained(tiny("first", {"dropout": 0.0}, max_steps=4))
    to_hf(first.out, tmp_path / "hf")
    step, name = checkpoint.step_dir(first.out, 4), "blocks.1.attn.wo.weight"
    damage(step, f"model.{name}", 1e6)
    with pytest.raises(UserError, match=f"E400.*float16 cannot hold.*{name}"):
        to_hf(first.out, tmp_path / "x", dtype="float16")
    for value, word in ((math.nan, "NaN"), (-math.inf, "inf")):
        damage(step, f"model.{name}", value)
        with pytest.raises(UserError, match=f"E303.*{name} holds {word}"):
            Trainer(tiny("second", init_from=str(step)))
        with pytest.raises(UserError, match=f"E303.*{name} holds {word}"):
            to_hf(first.out, tmp_path / "x", check=True)
    damage(step, f"model.{name}", 0.0)
    damage(step, f"optim.{name}.exp_avg_sq", math.inf)
    with pytest.raises(UserError, match="E303.*exp_avg_sq holds inf"):
        Trainer(tiny("first", {"dropout": 0.0}, max_steps=6))
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="E401.*norm.weight holds NaN"):
        from_hf(tmp_path / "hf", tmp_path / "imported")
    with pytest.raises(UserError, match="E303.*norm.weight holds NaN"):
        Trainer(tiny("third", {"dropout": 0.0}, init_from=str(tmp_path / "hf")))


def test_resume_from_an_older_step(tiny, tmp_path):
    """`--resume out/x/step_00000004` of 12: to the same bytes as never stopped, in its own folder and in another."""
    whole = trained(tiny("whole")).out
    shutil.copytree(whole, own := tmp_path / "own")
    (own / "control.jsonl").write_text('{"action": "stop"}\n')  # written to a course that is left now
    older = {"resume": str(own / "step_00000004")}
    again = Trainer(tiny("own", **older))
    assert again.step == 4 and checkpoint.list_steps(own) == [4]
    assert again.fit() == 0 and fingerprint(own, 12) == fingerprint(whole, 12) | {
        "orchestrator": json.loads((own / "step_00000012/state.json").read_text())["orchestrator"]
    }
    assert (own / "step_00000012.rolled_back/manifest.json").exists(), "set aside, not deleted"
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    other = trained(tiny("other", resume=str(whole / "step_00000004"))).out
    assert fingerprint(other, 12) == fingerprint(whole, 12)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}, "the original is untouched"


def test_resume_from_a_path_is_started_again(tiny, tmp_path, monkeypatch, capsys):
    """The same command again, or a requeue of it: what was done since is gone on with, also where PATH was pruned
    since; and a death before the first save begins at PATH again."""
    whole = trained(tiny("whole")).out
    for name, path in (("whole", whole / "step_00000004"), ("other", whole / "step_00000004")):
        keys = tiny(name, resume=str(path))
        Trainer(keys).close()  # and dies
        trainer = Trainer(keys)
        assert trainer.step == 4
        trainer.stop_signal = 1
        trainer.fit()
        step = max(checkpoint.list_steps(trainer.out))
        assert step > 4
        if name == "other":
            shutil.rmtree(path)
        again = Trainer(keys)
        assert again.step == step
        again.close()
    with pytest.raises(UserError, match="E300.*is of another: give a new out_dir"):
        Trainer(tiny("other", resume=str(tmp_path / "whole")))
    monkeypatch.setattr("train.prepare_first", None)  # nothing is prepared
    capsys.readouterr()
    for changes in ({"resume": "/no/such/step_00000004"}, {"resume": str(tmp_path)}, {"init_from": str(tmp_path)}):
        with pytest.raises(UserError, match="E304: (resume|init_from): "):
            Trainer(tiny("new", **changes))
    assert not capsys.readouterr().out, "before the start block"


def test_a_run_that_was_moved(tiny, tmp_path, capsys):
    """`mv out/x out/y`, `cp -r out/x out/z`, then `train.py out/y/config.yaml`: a new run began at the old place."""
    old = trained(tiny("old", max_steps=4)).out
    shutil.copytree(old, copy := tmp_path / "copy")
    old.rename(moved := tmp_path / "moved")
    capsys.readouterr()
    for folder in (moved, copy):
        trainer = Trainer([str(folder / "config.yaml"), "--max_steps", "5"])
        assert (trainer.out, trainer.step) == (folder, 4)
        assert "it says" in capsys.readouterr().out
        assert [c for c in trainer.changes if "out_dir" not in c] == ["max_steps: 4 in the checkpoint, 5 now"]
        assert trainer.fit() == 0 and not old.exists()
        assert main([str(folder / "config.yaml")]) == 0 and "is finished at step 5" in capsys.readouterr().out
    typed = Trainer([str(moved / "config.yaml"), "--out_dir", str(tmp_path / "typed")])
    assert typed.out == tmp_path / "typed" and typed.step == 0 and "as typed" in capsys.readouterr().out
    typed.close()


def test_what_really_changed_is_said(tiny):
    """44 lines `X: None in the checkpoint, Y now` for a run that was gone on with by its own config.yaml."""
    keys = tiny("run", max_steps=4, seed=1337, warmup_steps=..., precision="auto")
    out = trained(keys).out
    again = Trainer([str(out / "config.yaml")])
    assert not again.changes
    again.close()
    del keys["seed"]
    again = Trainer(keys | {"orchestrator": {"check_interval": 7}, "min_lr": 1e-4})
    assert again.changes == [
        "min_lr: 0.00030000000000000003 in the checkpoint, 0.0001 now",
        "orchestrator.check_interval: 100 in the checkpoint, 7 now",
    ]
    again.close()


class TwoRanks(Parallel):
    """One process that shares the rows of a step as two do."""

    def rows(self):
        return 0, 2


def test_config_yaml_on_another_number_of_processes(tiny):
    """out/x/config.yaml of one process on two: `batch_tokens is 16 rows, ... 32: drop one`."""
    for name, changes in (("a", {}), ("b", {"batch_tokens": 128, "gradient_accumulation_steps": ...})):
        first = trained(tiny(name, max_steps=2, **changes))
        again = Trainer([str(first.out / "config.yaml"), "--out_dir", str(first.out) + "-two"], TwoRanks)
        assert again.rows_per_step == first.rows_per_step == 4
        again.close()


def test_a_run_goes_on_on_another_kind_of_device(tiny, monkeypatch):
    """Begun on one kind of device, gone on with on another: fp32, no compiling and slices were kept for ever, or
    compiling where there is no compiler. What `auto` means is found anew, and said."""
    keys = tiny("run", max_steps=4, precision="auto", compile_model="auto", deterministic="auto")
    trained(keys)
    real, auto = checkpoint.Checkpoint.__init__, {}

    def older(self, path):
        real(self, path)
        self.state["auto"] |= auto
        self.state["config"] |= {k: v for k, v in auto.items() if k in self.state["config"] and k != "device"}

    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", older)
    here = Trainer(keys)
    had = here.cfg
    here.close()
    auto |= {"device": "cuda", "deterministic": False, "compile_model": True, "precision": "mixed_fp16"}
    there = Trainer(keys)
    for key in ("precision", "compile_model", "deterministic", "attention"):
        assert getattr(there.cfg, key) == getattr(had, key)
    assert {c.partition(":")[0] for c in there.changes} == {"precision", "compile_model", "deterministic"}
    there.close()
    auto |= {"device": "cpu", "deterministic": True, "precision": had.precision}
    monkeypatch.setattr("plan.find_compiler", lambda: None)
    there = Trainer(keys)
    assert there.cfg.compile_model is False and "compile_model: True in the checkpoint, False now" in there.changes
    there.close()


def test_paths_with_home_and_variables(tiny, tmp_path, shards, monkeypatch):
    """`out_dir: ~/runs` made a folder called ~, which somebody will remove with rm -rf ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shards)
    first = trained(tiny(max_steps=2) | {"out_dir": "~/runs/x", "data_dir": "$WORK/data"})
    assert first.out == tmp_path / "runs/x" and not Path("~").exists()
    keys = tiny("second", max_steps=1, init_from="${WORK}/runs/x", data_dir=...)
    trained(keys | {"data": {"sources": {"s": {"dir": "~/data"}}}})
    keys = {"orchestrator": {"mode": "replay", "replay": "~/d.jsonl"}, "resume": "~/runs/x", "data_dir": "d"}
    prepared = {"sources": ["~/a.txt", "stdlib"], "out": "$WORK/d", "val_sources": ["~/v.txt"]}
    cfg = build_config({"model": {}, "prepare": prepared} | keys, str, [])
    assert (cfg.orchestrator.replay, cfg.resume) == (f"{tmp_path}/d.jsonl", f"{tmp_path}/runs/x")
    assert cfg.prepare["sources"] == [f"{tmp_path}/a.txt", "stdlib"] and cfg.prepare["out"] == f"{tmp_path}/d"
    with pytest.raises(UserError, match=r"\$NOWHERE is not set"):
        build_config({"model": {}, "data_dir": "d", "orchestrator": {}, "out_dir": "$NOWHERE/x"}, str, [])
    (tmp_path / "a.txt").write_text(TEXTS["a"])
    prepare_main(["~/a.txt", "--out=~/made", "--tokenizer", "bytes", "--quiet", "--workers", "1"])
    assert (tmp_path / "made/manifest.json").exists() and not Path("~").exists()
    assert checkpoint.main(["~/runs/x"]) == 0
    export_main(["to_hf", "~/runs/x", "~/hf"])
    assert (tmp_path / "hf/config.json").exists()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_a_colleague_may_read_what_umask_allows(tiny, tmp_path, mask, mode):
    """The .safetensors of checkpoints and exports were 0600, all else 0644."""
    from export import to_hf

    before = os.umask(mask)
    try:
        run = trained(tiny(max_steps=2)).out
        to_hf(run, tmp_path / "hf")
    finally:
        os.umask(before)
    files = [*(run / "step_00000002").iterdir(), *(tmp_path / "hf").iterdir()]
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {p.name: mode for p in files}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank_00000.safetensors"])
def test_a_checkpoint_that_we_may_not_read(tiny, monkeypatch, capsys, name):
    """Another user's 0600 files: "damaged", and the advice was to overwrite the run. It is unreadable, nothing else;
    and no older step is trained on over it."""
    out = trained(tiny(max_steps=6)).out
    file, real, sha256 = out / "step_00000006" / name, Path.read_text, checkpoint.sha256

    def look(do, path, *words, **more):
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return do(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", lambda *a, **k: look(real, *a, **k))
    monkeypatch.setattr(checkpoint, "sha256", lambda path: look(sha256, path))
    before = sorted(out.rglob("*"))
    for do in (lambda: Trainer(tiny(max_steps=8)), lambda: checkpoint.find(out)):
        with pytest.raises(UserError, match="E108.*cannot be read.*Permission denied") as error:
            do()
        assert "overwrite" not in str(error.value) and "damaged" not in str(error.value)
    assert checkpoint.main([str(out)]) == 2
    assert "CANNOT BE READ" in (said := capsys.readouterr().out) and "DAMAGED" not in said
    assert sorted(out.rglob("*")) == before


def test_files_that_are_not_ours(tiny, tmp_path, shards):
    """A config.yaml with notes in the run's folder, a folder beside an export, step_notes.tmp: overwritten, gone."""
    from export import to_hf

    keys = tiny(max_steps=2)
    (out := Path(keys["out_dir"])).mkdir()
    (out / "step_notes.tmp").mkdir()
    (out / "step_by_step.rolled_back").mkdir()
    mine = "# my notes\n" + json.dumps(keys)
    (out / "config.yaml").write_text(mine)
    for steps in ("2", "3"):
        Trainer(
            [str(out / "config.yaml"), "--max_steps", steps, "--save_total_limit", "1"] + ["--out_dir", str(out)]
        ).fit()
        assert (out / "config.yaml").read_text() == mine
    assert main([str(out / "resolved.yaml")]) == 0, "the resolved one runs, too"
    theirs = trained(tiny("other", max_steps=2)).out / "config.yaml"
    for text in (theirs.read_text(), theirs.read_text().partition("\n")[2]):  # as now, and as before there was a sum
        theirs.write_text(text)
        Trainer(tiny("other", max_steps=3)).close()
        assert "max_steps: 3" in theirs.read_text() and not (theirs.parent / "resolved.yaml").exists()
    theirs.write_text(edited := theirs.read_text().replace("max_steps: 3", "max_steps: 4  # a day more"))
    Trainer([str(theirs)]).close()
    assert theirs.read_text() == edited, "edited, it is the user's"
    assert (out / "step_notes.tmp").is_dir() and (out / "step_by_step.rolled_back").is_dir()
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp/mine").write_text("notes")
    with pytest.raises(UserError, match="E117.*x.tmp.*not ours"):
        to_hf(out, tmp_path / "x")
    assert (tmp_path / "x.tmp/mine").exists() and not (tmp_path / "x").exists()
    (tmp_path / "y.tmp").mkdir()
    (tmp_path / "y.tmp/.lumen").touch()  # left by an export that was killed
    to_hf(out, tmp_path / "y")
    assert not (tmp_path / "y.tmp").exists() and not (tmp_path / "y/.lumen").exists()


def test_two_models_in_one_out_dir(tiny):
    """The preset and a copy of it name one out_dir: ten keys differ, "use the model: block"."""
    trained(tiny(max_steps=1))
    with pytest.raises(UserError, match="E305.*n_layers: 2 there, 3 here.*another --out_dir"):
        Trainer(tiny(model={"n_layers": 3}))
    with pytest.raises(UserError, match="E118.*data_dir was") as error:
        Trainer(tiny(val_fraction=0.1))
    assert "out_dir" in str(error.value)
    keys = tiny(init_from=tiny()["out_dir"], resume="none", overwrite=True)
    with pytest.raises(UserError, match="E300.*overwrite: true would delete"):
        Trainer(keys)
    assert checkpoint.list_steps(keys["out_dir"]) == [1]


# ---------------------------------------------------------------- text, shards, sums


# ---------------------------------------------------------------- words on the command line and in the YAML


# ---------------------------------------------------------------- what does not fit


# ---------------------------------------------------------------- numbers


# ---------------------------------------------------------------- health and messages


def steps_of(keys, *lines, at=5):
    """Trains; `lines` of control.jsonl are there when turn `at` begins."""
    trainer = Trainer(keys)
    act = trainer.orchestrator.act

    def first_that():
        if trainer.orchestrator.turn + 1 == at:
            with open(trainer.out / "control.jsonl", "a") as f:
                f.write("".join(line if "{" in line else json.dumps({"method": line}) + "\n" for line in lines))
        return act()

    trainer.orchestrator.act = first_that
    assert trainer.fit() == 0
    return trainer


def decided(trainer) -> list[dict]:
    path = trainer.out / "decisions.jsonl"
    return read_lines(path) if path.exists() else []


def told(trainer) -> str:
    return (trainer.out / "train.log").read_text()


@pytest.mark.parametrize("rate, warmup, steps", [(5, 1, 40), (50, 100, 20)])
def test_a_rate_absurd_from_the_first_step(tiny, capsys, rate, warmup, steps):
    """The loss explodes before anything could be learned, or rises in a warm-up without an end. It is said before, in
    the log, in decisions.jsonl, in the last line and in status.json; nothing is stopped."""
    keys = tiny(learning_rate=rate, min_lr=rate, lr_schedule="constant", warmup_steps=warmup, max_steps=steps)
    keys |= {"save_interval": 0, "orchestrator": {"check_interval": 19}}
    trainer = Trainer(keys)
    assert f"advice     learning_rate {rate} is far above" in capsys.readouterr().out
    assert trainer.fit() == 0
    rows = decided(trainer)
    assert [(r["trigger"], r["action"], r["level"]) for r in rows] == [("chance", "warn", 0)], "once"
    assert "lower learning_rate" in rows[0]["reason"]
    health = [r["health"] for r in read_lines(trainer.out / "metrics.jsonl") if r.get("health")]
    last = told(trainer).splitlines()[-1]
    assert "finished" in last and "worse than guessing" in last and set(health) == {"critical"}
    assert "worse than guessing" in json.loads((trainer.out / "status.json").read_text())["reason"]


def test_guessing_is_no_fault_of_a_young_run(tiny):
    """A run that is healthy, one whose weights begin far above chance and fall, one of two steps: no word of it."""
    wide = {"init_std": 0.2}  # begins above ln(vocab_size), as wide models do
    for name, model, steps, rate in (("plain", {}, 40, 3e-3), ("wide", wide, 40, 1e-2), ("two", wide, 2, 1e-3)):
        keys = tiny(name, model, max_steps=steps, learning_rate=rate, save_interval=0)
        trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
        assert decided(trainer) == [] and "worse than guessing" not in told(trainer).splitlines()[-1]


def test_what_was_not_learned_and_what_was_learned_by_heart(tiny):
    """No rate at all under weights that begin badly; or a training loss that is fine beside a validation loss that is
    not: each is told with its own remedy."""
    keys = tiny(model={"init_std": 0.3}, max_steps=40, learning_rate=0.0, min_lr=0.0, save_interval=0)
    trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
    assert "nothing was learned" in decided(trainer)[0]["reason"]
    watch = trainer.orchestrator
    watch.recent.extend([2.0] * 8)
    trainer.val_loss = 9.0
    assert "fewer epochs" in watch.worse_than_guessing()[1]
    trainer.val_loss = float("nan")
    assert "val_loss is nan" in watch.worse_than_guessing()[0]
    trainer.val_loss = 4.6
    assert watch.worse_than_guessing() is None


def test_the_rate_leaps_where_a_run_goes_on(tiny, capsys):
    """A finished run is made longer, or its schedule, rate or warm-up changed: one line says from what to what, why,
    and what would not. A run that just goes on, and wsd that is made longer in its stable part, hear nothing."""
    keys = tiny(max_steps=20, save_interval=10)
    steps_of(keys)
    for change, why in (
        ({"max_steps": 60}, "max_steps 20 -> 60"),
        ({"max_steps": 60, "lr_schedule": "constant"}, "lr_schedule cosine -> constant"),
        ({"max_steps": 21, "learning_rate": 3e-2, "min_lr": 3e-2}, "learning_rate 0.003 -> 0.03"),
        ({"max_steps": 60, "warmup_steps": 600}, "warmup_steps 2 -> 600"),
        ({"max_steps": 22}, None),
        ({}, None),
    ):
        capsys.readouterr()
        Trainer(keys | change).close()
        lines = [line for line in capsys.readouterr().out.splitlines() if "rate leaps" in line]
        assert len(lines) == (why is not None), (change, lines)
        assert why is None or (why in lines[0] and " 3.21e-04 to" in lines[0] and "wsd" in lines[0]), lines
    stable = tiny("wsd", max_steps=40, save_interval=10, lr_schedule="wsd")
    steps_of(stable, "stop", at=20)
    Trainer(stable | {"max_steps": 90}).close()
    assert "rate leaps" not in capsys.readouterr().out


def test_a_schedule_that_cannot_rise(tiny, capsys):
    """A warm-up longer than the run, one that reaches into wsd's decay, and onecycle, which has its own rise."""
    for change, said in (
        ({"warmup_steps": 2000}, "warmup_steps 2000 of 12 steps: the rate never comes above 1.8e-05 of 0.003"),
        ({"warmup_steps": 11, "lr_schedule": "wsd", "decay_frac": 0.5}, "decay begins within the warm-up"),
        ({"warmup_steps": 2000, "lr_schedule": "onecycle"}, "onecycle 0.003 -> 0.0003, 30 % of it upwards: 3 warm-up"),
    ):
        Trainer(tiny(**change)).close()
        out = capsys.readouterr().out
        assert said in out and ("never comes" in out) == ("never comes" in said)


def test_an_evaluation_that_cannot_be(tiny, shards, tmp_path, capsys):
    """Less held out than one window, nothing at all, one of two sources without any, and a handful of rows: a line
    each. With early_stopping_patience, which could then never stop anything, E114."""
    ids = (np.arange(3000) % 97).astype(np.uint16)
    np.save(tmp_path / "part_0.npy", ids)
    np.save(tmp_path / "val_0.npy", ids[:30])
    few = {"data_dir": str(tmp_path)}
    both = {"data_dir": ..., "data": {"sources": {"much": {"dir": shards}, "little": {"dir": str(tmp_path)}}}}
    for change, said in (
        (few, "no source has a validation window of 33 tokens"),
        ({"val_fraction": 0.0}, "as val_fraction is 0"),
        (both, "no validation in little: val_loss is of the others alone"),
        ({"val_fraction": 0.01}, "an evaluation reads 7 rows of 32 tokens"),
        ({"eval_tokens": 64}, "an evaluation reads 2 rows of 32 tokens"),
    ):
        Trainer(tiny(**change)).close()
        out = capsys.readouterr().out
        assert said in out, (said, out)
    Trainer(tiny()).close()
    assert "advice     an evaluation" not in capsys.readouterr().out
    for change in (few, {"val_fraction": 0.0}):
        with pytest.raises(UserError, match="E114.*early_stopping_patience: 2"):
            Trainer(tiny(**change, early_stopping_patience=2))


def test_a_wait_for_data_that_no_gpu_felt(tiny, monkeypatch):
    """The host waits for data while a GPU computes (its queue is emulated): that is no wait of the run; what the GPU
    waited is; and what ranks compare is the GPU's time, not that of launching."""
    trainer = Trainer(tiny(max_steps=8, log_interval=8))
    trainer.runs_ahead = True
    clock = {"host": 0.0, "device": 0.0}  # seconds; the device begins a piece of work when it was queued, or later

    class Event:
        def __init__(self):
            self.at = clock["device"] = max(clock["device"], clock["host"])

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    following, forward = trainer.loader.next, trainer.model.forward

    def late():
        clock["host"] += 0.3
        return following()

    def work(*args, **more):
        clock["device"] = max(clock["device"], clock["host"]) + 0.5
        return forward(*args, **more)

    trainer.loader.next, trainer.model.forward = late, work
    monkeypatch.setattr(train, "event_now", Event)
    assert trainer.fit() == 0
    on = trainer.on_device
    assert on["compute"] == pytest.approx(0.5 * 8 * 2), "of the queue, not of the host"
    assert on["data"] == pytest.approx(0.3), "the first read alone; later the device still worked"
    assert trainer.spent["data"] == on["data"], "the host's wait is none of the run's"
    assert trainer.orchestrator.counters()["compute"] == on["compute"]


def test_commands_in_one_go_are_done_in_their_order(tiny):
    """`save` and then `rollback_steps`, written into control.jsonl at once: what was there is saved, then it goes back.
    A rollback alone saves too, and does not delete the checkpoint it needs."""
    back = json.dumps({"method": "rollback_steps", "args": [3]}) + "\n"
    for name, lines, limit in (("both", ("save", back), 0), ("alone", (back,), 1)):
        keys = tiny(name, max_steps=14, save_interval=4, save_total_limit=limit)
        keys |= {"orchestrator": {"snapshot_interval": 0}}
        trainer = steps_of(keys, *lines, at=7)
        rows = [r for r in decided(trainer) if r.get("trigger") == "user"]
        assert [r["action"] for r in rows] == [json.loads(line)["method"] if line[0] == "{" else line for line in lines]
        gone = rows[-1]
        assert gone["executed"] and gone["args"]["to_step"] == 4 and gone["before"]["step"] == 7
        aside = {p.name for p in trainer.out.glob("*.rolled_back")}
        assert "step_00000007.rolled_back" in aside, "what was undone is still there"
        assert trainer.step == 14


def test_commands_as_other_programs_write_them(tiny):
    """A byte order mark before the first line, and no newline after the last: both are read, once."""
    line = json.dumps({"method": "adjust_weight_decay", "args": [0.05]}) + "\n"
    trainer = steps_of(tiny(), "\ufeff" + line, json.dumps({"method": "save"}), at=3)
    rows = [(r["action"], r.get("refused")) for r in decided(trainer) if r.get("trigger") == "user"]
    assert rows == [("adjust_weight_decay", None), ("save", None)]


def test_the_story_of_a_run_in_which_nothing_happened(tiny, capsys, tmp_path):
    """`bench.py decisions` of a healthy run, which has no decisions.jsonl, is no error; of no run it is."""
    trainer = steps_of(tiny())
    capsys.readouterr()
    assert bench.main(["decisions", str(trainer.out)]) == 0
    assert "nothing had to be decided" in capsys.readouterr().out
    with pytest.raises(UserError, match="E108"):
        bench.main(["decisions", str(tmp_path / "none")])


def test_a_presets_prompt_goes_with_its_data(tmp_path, shards):
    """quickstart on one's own data: its sample_prompt, a piece of Python, is not continued. One that is typed is,
    and so is that of one's own YAML, and the preset's on its own data."""
    own = write_yaml(tmp_path / "own.yaml", {"data_dir": "x", "sample_prompt": "Once"})
    for words, prompt in (
        (["quickstart", "--prepare", "null", "--data_dir", shards], None),
        (["quickstart", "--prepare", "null", "--data_dir", shards, "--sample_prompt", "Once"], "Once"),
        ([str(own), "--data_dir", shards], "Once"),
    ):
        assert read_config(words)[0].sample_prompt == prompt
    assert read_config(["quickstart"])[0].sample_prompt.startswith("class")


def test_advice_on_memory_only_where_something_is_read_twice(tiny, capsys):
    """A short look at much data cannot memorise it."""
    for steps, said in ((12, False), (400, True)):
        Trainer(tiny(model={"d_model": 128, "d_ff": 256}, max_steps=steps)).close()
        assert ("memorises" in capsys.readouterr().out) == said


def test_the_log_line_has_what_people_look_for(tiny):
    """Perplexity, the balance loss of experts, elapsed and remaining time, on one line."""
    trainer = steps_of(tiny(model={"n_experts": 4, "d_expert": 16}))
    line = next(x for x in told(trainer).splitlines() if x.startswith("step "))
    assert all(word in line for word in ("loss ", "ppl ", "aux ", "lr ", "norm ", "tok/s", " gone, ", " left"))
    plain = steps_of(tiny("dense"))
    assert "  aux " not in told(plain)


def test_overwrite_leaves_no_traces_of_the_run_before(tiny):
    """Curves, a picture and checkpoints set aside belong to the run that is overwritten; a file of the user's stays."""
    trainer = steps_of(tiny())
    for name in ("tensorboard/events.out.tfevents.1", "step_00000008.rolled_back/state.json", "training.png"):
        (trainer.out / name).parent.mkdir(exist_ok=True)
        (trainer.out / name).write_text("old")
    for name in ("tensorboard/mine.txt", "notes.md"):
        (trainer.out / name).write_text("mine")
    Trainer(tiny(resume="none", overwrite=True, max_steps=2)).close()
    left = {str(p.relative_to(trainer.out)) for p in trainer.out.rglob("*") if p.is_file()}
    assert {"tensorboard/mine.txt", "notes.md"} <= left and not [p for p in left if "rolled" in p or "tfevents" in p]
    assert "training.png" not in left


def test_wandb_goes_on_with_the_run_and_is_quiet(tiny, monkeypatch, capfd):
    """Stopped and started again it is one run of wandb, also offline, in one line; overwritten it is another, and so is
    one that goes on from another run's checkpoint."""
    made = []

    class Settings(dict):
        def __init__(self, **options):
            self.update(options)

    class Run:
        url = None

        def __init__(self, **options):
            made.append(options)
            self.id, self.dir = options["id"] or f"id{len(made)}", "w/offline-run/files"

        def define_metric(self, *args, **more): ...

    fake = types.SimpleNamespace(init=Run, Settings=Settings, log=lambda row: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(Run, "log", lambda self, row: None, raising=False)
    monkeypatch.setattr(Run, "finish", lambda self: None, raising=False)
    steps_of(tiny(max_steps=4, wandb_project="p"))
    trainer = steps_of(tiny(max_steps=8, wandb_project="p"))
    steps_of(tiny(max_steps=4, wandb_project="p", resume="none", overwrite=True))
    assert [(o["id"], o["resume"]) for o in made] == [(None, "allow"), ("id1", "allow"), (None, "allow")]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb")]
    assert len(lines) == 3 and "run id1, offline:" in lines[1] and trainer.wandb_id == "id1"


def test_the_picture_names_only_what_happened(tmp_path, monkeypatch):
    """A run without a rollback and without an evaluation: its legend speaks of neither."""
    figure, legends = pytest.importorskip("matplotlib.figure"), []

    def savefig(self, path, **options):
        legends.append([text.get_text() for text in self.axes[0].get_legend().get_texts()])

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    row = {"loss": 3.0, "lr": 1e-3, "grad_norm": 1.0}
    for more in ([], [row | {"step": 2}, {"step": 3, "val_loss": 3.1}]):
        rows = [row | {"step": 2}, row | {"step": 3}, *more]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert bench.main(["picture", str(tmp_path)]) == 0
    assert legends == [["training"], ["training", "rolled back", "validation"]]
