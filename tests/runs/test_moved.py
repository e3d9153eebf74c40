"""Runs that go on elsewhere: another tokenizer, another machine, another folder, files that are not
ours."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import fingerprint
from safetensors.torch import load_file, save_file

from export import main as export_main
from lumen import checkpoint, files
from lumen.config import build_config
from lumen.errors import UserError
from prepare_data import main as prepare_main
from prepare_data import prepare
from train import Parallel, Trainer, main

TEXTS = {  # three languages; the third speaks as the first does
    "a": "".join(f"the cat {i % 7} sat on the mat {i % 5} and slept\n\n" for i in range(900)),
    "b": "".join(
        f"zwei {i % 9} kleine jecke {i % 4} fuhren quer durch xyz\n\n" for i in range(900)
    ),
}


TEXTS["more"] = TEXTS["a"].replace("cat", "dog") * 2


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Folders of data: `a` and `b` with a tokenizer each of equally many ids, `more` with a's,
    `bytes` with bytes."""
    top = tmp_path_factory.mktemp("spoken")
    for name, text in TEXTS.items():
        (top / f"{name}.txt").write_text(text)
    for name, source, spec in (
        ("a", "a", "bpe:270"),
        ("b", "b", "bpe:270"),
        ("more", "more", str(top / "a")),
        ("bytes", "a", "bytes"),
    ):
        options = {"val_fraction": 0.2, "max_doc_chars": 500, "workers": 1, "quiet": True}
        prepare([str(top / f"{source}.txt")], str(top / name), spec, **options)
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
    """Put `value` into a tensor of a checkpoint, with all sums right again: so a run that diverged
    leaves it."""
    file = Path(folder) / "rank_00000.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    manifest["files"][file.name] = {"sha256": files.sha256(file), "size": file.stat().st_size}
    checkpoint.write_json(
        Path(folder) / "manifest.json", manifest | {"sha256": checkpoint.manifest_sha256(manifest)}
    )


def test_weights_of_another_tokenizer(tiny, spoken, tmp_path, capsys):
    """init_from a run whose tokenizer is not that of the data, of as many ids: trained from noise,
    without a word."""
    first = trained(speak(tiny, spoken / "a", "first"))
    fresh = speak(tiny, spoken / "b", "second", init_from=str(first.out))
    for init_from in (first.out, checkpoint.step_dir(first.out, 2)):
        with pytest.raises(UserError, match="E113.*--tokenizer") as error:
            Trainer(fresh | {"init_from": str(init_from)})
        assert all(sum_of(spoken / name) in error.value.text for name in "ab")
    assert not Path(fresh["out_dir"]).exists(), "who is refused changes nothing"
    meant = Trainer(fresh | {"allow_tokenizer_change": True})
    assert any("another tokenizer" in line for line in meant.found.changes)
    meant.close()
    good = Trainer(speak(tiny, spoken / "more", "third", init_from=str(first.out)))
    assert not good.found.changes
    good.close()
    with pytest.raises(UserError, match="E113.*--tokenizer"):  # not: ten keys of the model differ
        Trainer(fresh | {"data_dir": str(spoken / "bytes")})
    with pytest.raises(UserError, match="E305.*vocab_size: 270 there, 260 here.*--tokenizer"):
        Trainer(fresh | {"data_dir": str(spoken / "bytes"), "allow_tokenizer_change": True})


def test_weights_and_tokenizer_of_a_hugging_face_folder(tiny, spoken, tmp_path):
    """The same from a Hugging Face folder, whose tokenizer.json another program wrote anew: its
    content counts."""
    from export import from_hf, to_hf

    first = trained(
        speak(
            tiny, spoken / "a", "first", model=tiny()["model"] | {"vocab_size": 0, "dropout": 0.0}
        )
    )
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
    assert sum("cannot say" in line for line in silent.found.changes) == 1, (
        "nothing to compare: one note"
    )
    silent.close()


def test_a_run_goes_on_with_another_tokenizer(tiny, spoken, capsys):
    """allow_data_change onto data of another tokenizer: out_dir kept the first one's
    tokenizer.json, and all its text was nonsense. Refused; where it is meant, each step is read
    with its own."""
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
    """A run went on with other data: the best of the old validation text stayed the best for ever,
    --best gave the old model and patience counted against it. All of that begins anew, and is kept
    where the set is the same."""
    keys = speak(tiny, spoken / "a", early_stopping_patience=5)
    first = trained(keys)
    assert first.progress.best_step == 4

    def again(**changes):
        trainer = Trainer(keys | {"allow_data_change": True, "max_steps": 6} | changes)
        found = (
            trainer.progress.best_val_loss,
            trainer.progress.best_step,
            (trainer.out / "best.json").exists(),
        )
        trainer.close()
        return found

    assert again() == (first.progress.best_val_loss, 4, True), "the same set"
    capsys.readouterr()
    for change in ({"data_dir": str(spoken / "more")}, {"eval_tokens": 512}):
        shutil.copytree(first.out, copy := Path(f"{first.out}-{len(change)}-{[*change][0]}"))
        assert again(**change, out_dir=str(copy)) == (None, None, False), change
        assert capsys.readouterr().out.count("begins anew") == 1
    last = trained(
        keys | {"allow_data_change": True, "max_steps": 6, "data_dir": str(spoken / "more")}
    )
    assert (
        last.progress.best_step == 6
        and checkpoint.best_step(last.out) == 6
        and not last.progress.evaluations_since_best
    )


def test_more_text_for_training_leaves_the_validation_set_as_it_is(tiny, shards, tmp_path):
    """Shards were added, the val_ shard is the same: its best is still the best."""
    shutil.copytree(shards, folder := tmp_path / "data")
    (folder / "part_2.npy").rename(folder / "val_0.npy")
    best = trained(tiny(data_dir=str(folder), max_steps=4)).progress.best_val_loss
    np.save(folder / "part_9.npy", np.arange(3000, dtype=np.uint16) % 97)
    again = Trainer(tiny(data_dir=str(folder), max_steps=5, allow_data_change=True))
    assert again.progress.best_val_loss == best
    again.close()


def test_weights_that_are_nan(tiny, tmp_path):
    """A run that diverged was taken as init_from: three steps, then "lower learning_rate". Its
    export was "a bug"."""
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
    """`--resume out/x/step_00000004` of 12: to the same bytes as never stopped, in its own folder
    and in another."""
    whole = trained(tiny("whole")).out
    shutil.copytree(whole, own := tmp_path / "own")
    (own / "control.jsonl").write_text(
        '{"action": "stop"}\n'
    )  # written to a course that is left now
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
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}, (
        "the original is untouched"
    )


def test_resume_from_a_path_is_started_again(tiny, tmp_path, monkeypatch, capsys):
    """The same command again, or a requeue of it: what was done since is gone on with, also where
    PATH was pruned since; and a death before the first save begins at PATH again."""
    whole = trained(tiny("whole")).out
    for name, path in (("whole", whole / "step_00000004"), ("other", whole / "step_00000004")):
        keys = tiny(name, resume=str(path))
        Trainer(keys).close()  # and dies
        trainer = Trainer(keys)
        assert trainer.step == 4
        trainer.signals.stop = 1
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
    for changes in (
        {"resume": "/no/such/step_00000004"},
        {"resume": str(tmp_path)},
        {"init_from": str(tmp_path)},
    ):
        with pytest.raises(UserError, match="E304: (resume|init_from): "):
            Trainer(tiny("new", **changes))
    assert not capsys.readouterr().out, "before the start block"


def test_a_run_that_was_moved(tiny, tmp_path, capsys):
    """`mv out/x out/y`, `cp -r out/x out/z`, then `train.py out/y/config.yaml`: a new run began at
    the old place."""
    old = trained(tiny("old", max_steps=4)).out
    shutil.copytree(old, copy := tmp_path / "copy")
    old.rename(moved := tmp_path / "moved")
    capsys.readouterr()
    for folder in (moved, copy):
        trainer = Trainer([str(folder / "config.yaml"), "--max_steps", "5"])
        assert (trainer.out, trainer.step) == (folder, 4)
        assert "it says" in capsys.readouterr().out
        assert [
            c for c in trainer.found.changes if not c.startswith(("out_dir", "the learning rate"))
        ] == ["max_steps: 4 in the checkpoint, 5 now"]
        assert trainer.fit() == 0 and not old.exists()
        assert (
            main([str(folder / "config.yaml")]) == 0
            and "is finished at step 5" in capsys.readouterr().out
        )
    typed = Trainer([str(moved / "config.yaml"), "--out_dir", str(tmp_path / "typed")])
    assert (
        typed.out == tmp_path / "typed"
        and typed.step == 0
        and "as typed" in capsys.readouterr().out
    )
    typed.close()


def test_what_really_changed_is_said(tiny):
    """44 lines `X: None in the checkpoint, Y now` for a run that was gone on with by its own
    config.yaml."""
    keys = tiny("run", max_steps=4, seed=1337, warmup_steps=..., precision="auto")
    out = trained(keys).out
    again = Trainer([str(out / "config.yaml")])
    assert not again.found.changes
    again.close()
    del keys["seed"]
    again = Trainer(keys | {"orchestrator": {"check_interval": 7}, "min_lr": 1e-4})
    assert again.found.changes == [
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
    for name, changes in (
        ("a", {}),
        ("b", {"batch_tokens": 128, "gradient_accumulation_steps": ...}),
    ):
        first = trained(tiny(name, max_steps=2, **changes))
        again = Trainer(
            [str(first.out / "config.yaml"), "--out_dir", str(first.out) + "-two"], TwoRanks
        )
        assert again.run.rows_per_step == first.run.rows_per_step == 4
        again.close()


def test_a_run_goes_on_on_another_kind_of_device(tiny, monkeypatch):
    """Begun on one kind of device, gone on with on another: fp32, no compiling and slices were kept
    for ever, or compiling where there is no compiler. What `auto` means is found anew, and said."""
    keys = tiny("run", max_steps=4, precision="auto", compile_model="auto", deterministic="auto")
    trained(keys)
    real, auto = checkpoint.Checkpoint.__init__, {}

    def older(self, path):
        real(self, path)
        self.state["run"] |= auto
        self.state["config"] |= {
            k: v for k, v in auto.items() if k in self.state["config"] and k != "device"
        }

    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", older)
    here = Trainer(keys)
    had = here.run
    here.close()
    auto |= {
        "device": "cuda",
        "deterministic": False,
        "compile_model": True,
        "precision": "mixed_fp16",
    }
    there = Trainer(keys)
    for key in ("precision", "compile_model", "deterministic", "attention"):
        assert getattr(there.run, key) == getattr(had, key)
    assert {c.partition(":")[0] for c in there.found.changes} == {
        "precision",
        "compile_model",
        "deterministic",
    }
    there.close()
    auto |= {"device": "cpu", "deterministic": True, "precision": had.precision}
    monkeypatch.setattr("lumen.machine.find_compiler", lambda: None)
    there = Trainer(keys)
    assert (
        there.run.compile_model is False
        and "compile_model: True in the checkpoint, False now" in there.found.changes
    )
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
    keys = {
        "orchestrator": {"mode": "replay", "replay": "~/d.jsonl"},
        "resume": "~/runs/x",
        "data_dir": "d",
    }
    prepared = {"sources": ["~/a.txt", "stdlib"], "out": "$WORK/d", "val_sources": ["~/v.txt"]}
    cfg = build_config({"model": {}, "prepare": prepared} | keys, str, [])
    assert (cfg.orchestrator.replay, cfg.resume) == (f"{tmp_path}/d.jsonl", f"{tmp_path}/runs/x")
    assert (
        cfg.prepare["sources"] == [f"{tmp_path}/a.txt", "stdlib"]
        and cfg.prepare["out"] == f"{tmp_path}/d"
    )
    with pytest.raises(UserError, match=r"\$NOWHERE is not set"):
        build_config(
            {"model": {}, "data_dir": "d", "orchestrator": {}, "out_dir": "$NOWHERE/x"}, str, []
        )
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
    """Another user's 0600 files: "damaged", and the advice was to overwrite the run. It is
    unreadable, nothing else; and no older step is trained on over it."""
    out = trained(tiny(max_steps=6)).out
    file, real, sha256 = out / "step_00000006" / name, Path.read_text, files.sha256

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
    """A config.yaml with notes in the run's folder, a folder beside an export, step_notes.tmp:
    overwritten, gone."""
    from export import to_hf

    keys = tiny(max_steps=2)
    (out := Path(keys["out_dir"])).mkdir()
    (out / "step_notes.tmp").mkdir()
    (out / "step_by_step.rolled_back").mkdir()
    mine = "# my notes\n" + json.dumps(keys)
    (out / "config.yaml").write_text(mine)
    for steps in ("2", "3"):
        Trainer(
            [str(out / "config.yaml"), "--max_steps", steps, "--save_total_limit", "1"]
            + ["--out_dir", str(out)]
        ).fit()
        assert (out / "config.yaml").read_text() == mine
    assert main([str(out / "resolved.yaml")]) == 0, "the resolved one runs, too"
    theirs = trained(tiny("other", max_steps=2)).out / "config.yaml"
    now, early = theirs.read_text(), theirs.read_text().partition("\n")[2]
    then = "auto_epoch_scaling: false\nchinchilla_multiplier: 20.0\n"
    early = early.replace("tokens_per_parameter: null\n", then)
    assert then in early
    for text in (now, early):  # as now, and as before there was a sum
        theirs.write_text(text)
        Trainer(tiny("other", max_steps=3)).close()
        assert (
            "max_steps: 3" in theirs.read_text() and not (theirs.parent / "resolved.yaml").exists()
        )
    theirs.write_text(
        edited := theirs.read_text().replace("max_steps: 3", "max_steps: 4  # a day more")
    )
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
