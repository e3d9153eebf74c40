import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import ROOT, fingerprint, losses, read_lines, run_python, write_yaml
from forks import run_forked
from rig import Halves, fake_fp16, faulty, finish, stop_at

import train
from lumen import checkpoint, schedule
from lumen import machine as machines
from lumen.cli import read_config
from lumen.config import RANGES, Config
from lumen.errors import UserError
from lumen.optim import build_optimizer
from lumen.schedule import lr_at, rise
from model import ModelConfig, Transformer
from train import Parallel, Trainer


def same_run(a, b, step=12) -> bool:
    return fingerprint(a["out_dir"], step) == fingerprint(b["out_dir"], step)


# ---------------------------------------------------------------- schedule, optimizer


@pytest.mark.parametrize("name", RANGES["lr_schedule"].split(" | "))
def test_schedules(name):
    cfg = Config(data_dir="x", lr_schedule=name, learning_rate=1.0)
    peak = 30 if name == "onecycle" else 10
    assert rise(name, 100, 10) == peak
    run = SimpleNamespace(max_steps=100, min_lr=0.1, warmup_steps=10, phases=[])
    lr = [lr_at(cfg, run, s) for s in range(101)]
    assert all(a < b for a, b in zip(lr[:peak], lr[1:peak])), "rises"
    assert abs(lr[peak] - 1.0) < 1e-9 and max(lr) <= 1.0 + 1e-9
    assert all(a >= b - 1e-12 for a, b in zip(lr[peak:], lr[peak + 1 :])), "falls"
    assert abs(lr[100] - (1.0 if name == "constant" else 0.1)) < 1e-9
    if name == "cosine":
        assert abs(lr[55] - 0.55) < 1e-9
    if name == "linear":
        assert abs(lr[55] - 0.55) < 1e-9
    if name == "wsd":
        assert lr[80] == 1.0 and abs(lr[90] - 0.55) < 1e-9
    if name != "onecycle":
        assert abs(lr[0] - 0.1) < 1e-9


def test_an_automatic_learning_rate_is_said_saved_and_taken_over(tiny, capsys, monkeypatch):
    keys = tiny(learning_rate="auto", max_steps=6, save_interval=3)
    stop_at(Trainer(keys), 2).fit()
    said = re.search(r"learning_rate auto is (\S+): .* tokens a step", capsys.readouterr().out)
    rate = float(said[1])
    written = yaml.safe_load((Path(keys["out_dir"]) / "config.yaml").read_text())
    assert (written["learning_rate"], written["min_lr"]) == (rate, rate / 10)
    monkeypatch.setattr(schedule, "LARGEST_RATE", 1e-5)  # a later Lumen knows better
    trainer = finish(keys)
    assert trainer.started_at == 3 and trainer.cfg.learning_rate == rate
    assert "learning_rate auto" not in capsys.readouterr().out
    number = finish(tiny("number", learning_rate=rate, max_steps=6, save_interval=3))
    assert fingerprint(trainer.out, 6) == fingerprint(number.out, 6)


def test_optimizer_groups_cover_every_parameter_once_and_decay_matrices_only():
    model = Transformer(ModelConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=2))
    groups = build_optimizer(
        Config(data_dir="x", learning_rate=3e-4, weight_decay=0.3), dict(model.named_parameters())
    ).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all((p.dim() >= 2) == (g["weight_decay"] == 0.3) for g in groups for p in g["params"])


# ---------------------------------------------------------------- the loop


def test_it_learns_and_leaves_what_it_promises(tiny):
    keys = tiny(
        max_steps=60,
        save_interval=20,
        batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
    )
    trainer = finish(keys)
    rows = read_lines(trainer.out / "metrics.jsonl")
    loss = losses(trainer.out)
    # the language has entropy ln 3 = 1.0986; an untrained model has ln 97 = 4.57
    assert loss[1] > 4.0 and loss[60] < 2.0
    stable = {
        "step",
        "attempt",
        "tokens",
        "loss",
        "ppl",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "data_wait",
    }
    stable |= {"mem_allocated", "mem_reserved", "ram"}
    assert all(stable <= set(r) for r in rows if "loss" in r)
    val = [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in val] == [20, 40, 60]
    assert all({"val_accuracy", "val_bpb", "best_val_loss", "best_step"} <= set(r) for r in val)
    assert 0.2 < val[-1]["val_accuracy"] < 0.6
    assert rows[-2]["tokens"] == 60 * 8 * 32 and trainer.cursor == 60 * 8
    status = json.loads((trainer.out / "status.json").read_text())
    assert (status["state"], status["code"], status["step"], status["attempt"]) == (
        "finished",
        0,
        60,
        1,
    )
    best = json.loads((trainer.out / "best.json").read_text())
    assert best["step"] == min(val, key=lambda r: r["val_loss"])["step"]
    assert (trainer.out / "train.log").read_text().count("saved") == 3


def test_any_split_of_the_batch_trains_alike(tiny):
    splits = {(8, 1): None, (2, 4): None, (1, 8): None}
    for micro, accum in splits:
        keys = tiny(
            f"r{micro}",
            {"dropout": 0.0},
            batch_size=micro,
            gradient_accumulation_steps=accum,
            save_interval=0,
        )
        splits[micro, accum] = (
            losses(finish(keys).out),
            finish(keys | {"overwrite": True, "resume": "none"}).progress.val_loss,
        )
    (first, val), *others = splits.values()
    for other, other_val in others:
        assert max(abs(first[s] - other[s]) for s in first) < 1e-5 and abs(val - other_val) < 1e-5


def test_masked_targets_count_in_the_global_mean(tiny):
    """Half the targets ignored: the gradient is that of the mean over the valid ones (not over
    all)."""
    norms = []
    for mask in (False, True):
        trainer = Trainer(tiny(f"m{mask}", {"dropout": 0.0}, max_steps=1, grad_clip=0.0))
        rows = trainer.loader.next

        def following(rows=rows, mask=mask):
            row, x, y, *_ = rows()
            y = y.copy()
            y[:, 16:] = -1
            if not mask:  # the same valid targets, given as rows of half the length
                x, y = x[:, :16], y[:, :16]
            return row, np.ascontiguousarray(x), np.ascontiguousarray(y)

        trainer.loader.next = following
        trainer.fit()
        norms.append(read_lines(trainer.out / "metrics.jsonl")[0]["grad_norm"])
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0], norms


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_bad_step_is_dropped_exactly(tiny, value):
    """Weights, moments and the optimizer's count as before the step; step, cursor and schedule go
    on."""
    snapshots = []

    class Watched(faulty([6], value=value)):
        def grad_norm(self, model):
            snapshots.append({k: v.clone() for k, v in trainer.tensors().items()})
            return super().grad_norm(model)

    trainer = Trainer(tiny(save_interval=0), Watched)
    assert trainer.fit() == 0
    before, after = snapshots[5], snapshots[6]
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(snapshots[4]["model.embed.weight"], before["model.embed.weight"])
    assert not torch.equal(snapshots[7]["model.embed.weight"], after["model.embed.weight"])
    assert all(torch.isfinite(v).all() for v in trainer.tensors().values())
    assert trainer.optimizer.state[trainer.model.embed.weight]["step"].item() == 11
    assert (trainer.step, trainer.cursor, trainer.tokens) == (12, 48, 11 * 4 * 32)
    (decision,) = read_lines(trainer.out / "decisions.jsonl")
    assert (
        decision["step"] == 5
        and decision["trigger"] == "nonfinite"
        and "transient" in decision["reason"]
    )


def test_a_module_that_goes_bad_is_named_and_ends_as_diverged(tiny):
    keys = tiny(max_steps=100)
    trainer = Trainer(keys)
    with torch.no_grad():
        trainer.model.blocks[1].ffn.w2.weight[0, 0] = float("nan")
    with pytest.raises(UserError) as e:
        trainer.fit()
    assert e.value.code == "E301" and e.value.exit_code == 3 and "blocks.1.ffn.w2" in e.value.text
    trainer.loader.close()


def test_fp16_scale_shrinks_until_it_fits_and_is_saved(tiny, monkeypatch):
    """The scaler's arithmetic on the CPU (fp16 itself is for GPUs): overflow halves the scale and
    drops the step."""
    monkeypatch.setattr(machines, "detect", fake_fp16(machines.detect))
    trainer = Trainer(tiny(max_steps=12, precision="mixed_fp16"))
    trainer.loss_scale.value.fill_(2.0**24)
    assert trainer.fit() == 0
    assert 0 < trainer.orchestrator.dropped < 12 and trainer.loss_scale.value.item() < 2.0**24
    loss = losses(trainer.out)
    assert loss[12] < loss[1]
    again = Trainer(tiny(max_steps=14, precision="mixed_fp16"))
    assert again.loss_scale.state() == trainer.loss_scale.state()
    again.loader.close()


def test_bf16_trains_with_fp32_masters(tiny):
    trainer = finish(tiny(max_steps=12, precision="bf16", batch_size=4))
    assert all(v.dtype == torch.float32 for v in trainer.tensors().values())
    loss = losses(trainer.out)
    assert loss[12] < loss[1]


class Counted(Halves):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.lasts = []

    def microstep(self, model, last):
        self.lasts.append(last)
        return super().microstep(model, last)


def test_another_parallel_needs_nothing_but_the_seam(tiny):
    plain = tiny("plain")
    finish(plain)
    keys = tiny("halves")
    first = stop_at(Trainer(keys, Counted), 6)
    assert first.fit() == 0
    assert first.parallel.lasts == [False, True] * first.step
    saved = checkpoint.find(first.out)
    assert len(saved.tensors["model.embed.weight"]["pieces"]) == 2
    finish(keys)  # the plain Parallel reads what the other wrote
    whole = checkpoint.find(plain["out_dir"])
    ours = checkpoint.find(keys["out_dir"])
    assert ours.step == whole.step == 12
    assert all(torch.equal(whole.read(n), ours.read(n)) for n in whole.tensors)
    assert all(torch.equal(v, whole.read(n)) for n, v in Trainer(keys, Halves).tensors().items()), (
        "and the other way"
    )


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_equals_never_stopped(tiny, reference, dropout):
    model = {"dropout": dropout}
    whole, parts = reference.keys(tiny("whole", model)), tiny("parts", model)
    for step in (2, 5, 8):
        trainer = Trainer(parts)
        stop_at(trainer, step)
        assert trainer.fit() == 0 and trainer.step == step + 1
        assert json.loads((trainer.out / "status.json").read_text())["state"] == "stopped"
    trainer = finish(parts)
    assert trainer.report.attempt == 4 and same_run(whole, parts)
    assert losses(whole["out_dir"]) == losses(parts["out_dir"])
    assert Trainer(parts).step == 12


def test_what_attention_auto_measured_is_kept_and_resuming_is_exact(tiny, monkeypatch):
    monkeypatch.setattr("lumen.resolve.BRIEF", 0.0)
    measured = {"sdpa": 2.0, "blocks": 1.0}
    monkeypatch.setattr("lumen.attention.in_turns", lambda steps, limit: dict(measured))
    model = {"n_heads": 4, "n_kv_heads": 2}
    whole, parts = tiny("whole", model), tiny("parts", model)
    assert finish(whole).run.attention == "blocks"
    assert stop_at(Trainer(parts), 5).fit() == 0
    measured["sdpa"] = 0.5
    trainer = finish(parts)
    assert trainer.model.backend == "blocks" and same_run(whole, parts)
    assert finish(tiny("anew", model)).run.attention == "sdpa"
    assert not same_run(whole, tiny("anew", model))


@pytest.mark.nightly
def test_resumed_equals_never_stopped_with_extras(tiny):
    names = {"extras": ["value_residual", "x0", "relu2", "softcap"]}
    whole = finish(tiny("whole", names, activation_checkpointing="selective"))
    parts = tiny("parts", names, activation_checkpointing="selective")
    stop_at(Trainer(parts), 5).fit()
    assert fingerprint(finish(parts).out, 12) == fingerprint(whole.out, 12)
    with pytest.raises(UserError, match="E305.*extras"):
        Trainer(tiny("parts", {"extras": ["softcap"]}))


def test_finished_run_says_so(tiny, capsys):
    keys = tiny(max_steps=2)
    finish(keys)
    words = [f"--{k}={json.dumps(v)}" for k, v in keys.items()]
    path = write_yaml(Path(keys["out_dir"]) / "c.yaml", keys)
    assert words and train.main([str(path)]) == 0
    assert "is finished at step 2" in capsys.readouterr().out
    assert len(read_lines(Path(keys["out_dir"]) / "metrics.jsonl")) == 3
    assert train.main([str(path), "--max_steps", "4"]) == 0
    assert losses(keys["out_dir"]).keys() == {1, 2, 3, 4}


def test_used_out_dir(tiny):
    finish(tiny(max_steps=4))
    with pytest.raises(UserError, match="E300"):
        Trainer(tiny(resume="none"))
    trainer = finish(tiny(resume="none", overwrite=True, max_steps=3))
    assert (
        checkpoint.list_steps(trainer.out) == [3]
        and len(read_lines(trainer.out / "metrics.jsonl")) == 4
    )


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing"])
def test_damaged_newest_is_named_and_passed_over(tiny, reference, damage, capsys):
    whole, keys = reference.keys(tiny("whole")), tiny()
    trainer = Trainer(keys)
    stop_at(trainer, 8)
    trainer.fit()
    newest = checkpoint.step_dir(trainer.out, 9)
    file = newest / ("manifest.json" if damage == "manifest" else "rank_00000.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert checkpoint.main([str(trainer.out)]) == 2
    assert "DAMAGED" in capsys.readouterr().out
    finish(keys)
    said = capsys.readouterr().out
    assert f"passed over {newest}" in said and "from step 8" in said
    assert same_run(whole, keys)


def test_all_damaged_does_not_silently_start_anew(tiny):
    trainer = finish(tiny(max_steps=3))
    file = checkpoint.step_dir(trainer.out, 3) / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="E303"):
        Trainer(tiny(max_steps=3))


def test_no_step_at_all_is_an_evaluation(tiny):
    trainer = finish(tiny(max_steps=0, warmup_steps=0))
    assert trainer.step == 0 and trainer.progress.val_loss > 4


def test_retention(tiny):
    trainer = finish(tiny(max_steps=14, save_interval=2, save_total_limit=2, keep_every=6))
    assert set(checkpoint.list_steps(trainer.out)) == {6, 12, 14, trainer.progress.best_step}


def test_model_keys_and_data_must_match(tiny, tmp_path, shards, monkeypatch):
    finish(tiny(max_steps=3))
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "sha256", None
        )  # no minutes are spent on the bytes of another model
        with pytest.raises(UserError, match="E305.*d_ff: 48 there, 64 here"):
            Trainer(tiny(model={"d_ff": 64}))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    np.save(other / "part_9.npy", np.zeros(300, np.uint16))
    with pytest.raises(UserError, match="E118"):
        Trainer(tiny(data_dir=str(other)))
    trainer = Trainer(tiny(data_dir=str(other), allow_data_change=True, max_steps=5))
    assert trainer.step == 3 and any(
        "max_steps: 3 in the checkpoint, 5 now" in c for c in trainer.found.changes
    )
    trainer.fit()


def test_resolved_values_are_kept_unless_the_yaml_changes(tiny):
    keys = tiny(max_steps=..., num_epochs=0.05, save_interval=2, warmup_steps=...)
    trainer = Trainer(keys)
    stop_at(trainer, 3)
    trainer.fit()
    steps = trainer.run.max_steps
    assert steps == int(trainer.data.sources["data"].windows * 0.05) // 4
    again = Trainer(keys | {"log_interval": 7})
    assert again.run.max_steps == steps and again.step == 4
    again.loader.close()
    longer = Trainer(keys | {"num_epochs": 0.1})
    assert longer.run.max_steps > steps
    longer.loader.close()


def test_init_from_takes_weights_only(tiny, tmp_path):
    first = finish(tiny("first", max_steps=6))
    trainer = Trainer(
        tiny("second", {"dropout": 0.0}, init_from=str(first.out), learning_rate=1e-4)
    )
    assert trainer.step == 0 and trainer.tokens == 0
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, first.model.get_parameter(name))
    trainer.fit()
    assert losses(trainer.out)[1] < losses(first.out)[1] - 0.1
    with pytest.raises(UserError, match="E305.*n_layers"):
        Trainer(tiny("third", {"n_layers": 3}, init_from=str(first.out)))
    with pytest.raises(UserError, match="E304"):
        Trainer(tiny("fourth", init_from="/no/such"))
    later = checkpoint.step_dir(
        tmp_path, 1
    )  # of a Lumen that has keys which this one does not know
    checkpoint.write(tmp_path / "writing", 0, {"model.a": [((2,), (0,), torch.zeros(2))]})
    checkpoint.commit(
        tmp_path / "writing", later, 1, {"step": 1, "config": {"model": {"n_minds": 2}}}
    )
    with pytest.raises(UserError, match="E306.*n_minds"):
        Trainer(tiny("fifth", init_from=str(later)))


def test_init_from_a_hugging_face_folder(tiny, tmp_path):
    from export import to_hf

    first = finish(tiny("first", max_steps=4))
    to_hf(str(first.out), str(tmp_path / "hf"))
    trainer = Trainer(tiny("second", init_from=str(tmp_path / "hf")))
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, first.model.get_parameter(name))
    trainer.loader.close()


def test_recomputing_blocks_changes_nothing_and_z_loss_is_logged_apart(tiny):
    kept, again = (
        finish(tiny("kept", z_loss=1e-3)),
        finish(tiny("again", z_loss=1e-3, activation_checkpointing="block")),
    )
    assert again.model.recompute == "block" and losses(kept.out) == losses(again.out)
    without = finish(tiny("without"))
    rows = [r for r in read_lines(kept.out / "metrics.jsonl") if "loss" in r]
    assert all(0.001 < r["z_loss"] < 0.1 for r in rows)
    assert abs(rows[0]["loss"] - losses(without.out)[1]) < 1e-6, (
        "the loss itself is plain cross-entropy"
    )
    assert losses(without.out)[12] != rows[-1]["loss"]


def test_data_that_does_not_say_its_vocabulary_or_says_two(tiny, tmp_path):
    from prepare_data import prepare

    with pytest.raises(UserError, match="E113.*vocab_size must be set"):
        Trainer(tiny(model={"vocab_size": 0}))
    for name in ("bpe:300", "bytes"):
        prepare(["synthetic:60"], str(tmp_path / name), tokenizer=name, quiet=True)
    sources = {n: {"dir": str(tmp_path / n)} for n in ("bpe:300", "bytes")}
    with pytest.raises(UserError, match="E113.*different tokenizers"):
        Trainer(tiny(data_dir=..., data={"sources": sources}))
    trainer = Trainer(tiny(data_dir=str(tmp_path / "bytes"), model={"vocab_size": 0}))
    assert trainer.cfg.model.vocab_size == 260 and trainer.data.val_sources
    trainer.loader.close()


def test_early_stopping_and_its_memory(tiny):
    keys = tiny(
        max_steps=40, eval_interval=2, early_stopping_patience=2, learning_rate=0.0, min_lr=0.0
    )
    trainer = finish(keys)
    assert trainer.step == 6 and trainer.progress.stopped_early
    again = Trainer(keys)
    assert again.progress.stopped_early and again.step == 6
    again.loader.close()


def test_phases_and_several_sources(tiny, tmp_path):
    rng = np.random.default_rng(1)
    for name, base in (("low", 0), ("high", 50)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", (base + rng.integers(0, 40, 5000)).astype(np.uint16))
    sources = {n: {"dir": str(tmp_path / n)} for n in ("low", "high")}
    phases = [{"until": 0.5, "weights": {"low": 1}}, {"weights": {"high": 3, "low": 1}}]
    keys = tiny(
        data_dir=..., data={"sources": sources, "phases": phases}, max_steps=20, eval_interval=10
    )
    trainer = Trainer(keys)
    assert trainer.run.segments == [[0, {"low": 1}], [40, {"high": 3, "low": 1}]]
    stop_at(trainer, 13)
    trainer.fit()
    resumed = finish(keys)
    whole = finish(keys | {"out_dir": str(tmp_path / "whole")})
    assert fingerprint(resumed.out, 20) == fingerprint(whole.out, 20)
    last = read_lines(whole.out / "metrics.jsonl")[-1]
    assert {"val_loss/low", "val_loss/high"} <= set(last)
    epochs = read_lines(whole.out / "metrics.jsonl")[-2]
    assert epochs["epoch/high"] > 0 and epochs["epoch/low"] > 0


def test_shard_truncated_under_the_run_saves_and_resumes_to_the_same_bytes(tiny, tmp_path, shards):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    keys, whole = (
        tiny(data_dir=str(copy), max_steps=40),
        tiny("whole", data_dir=str(copy), max_steps=40),
    )
    finish(whole)
    trainer = Trainer(keys)
    following, file = trainer.loader.next, copy / "part_0.npy"
    bytes_before, times = file.read_bytes(), file.stat()

    def next_rows():
        if trainer.step == 6 and file.stat().st_size > 1000:
            os.truncate(file, 1000)
        return following()

    trainer.loader.next = next_rows
    with pytest.raises(UserError) as e:
        trainer.fit()
    assert e.value.code == "E111" and "part_0.npy" in e.value.text
    trainer.loader.close()
    assert checkpoint.find(trainer.out).step == trainer.step >= 6
    file.write_bytes(bytes_before)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    finish(keys)
    assert same_run(whole, keys, 40)


# ---------------------------------------------------------------- what a run is started from


def test_lunaris_yaml_runs_unchanged(tmp_path, shards):
    """The keys of its TrainConfig and model config, numbers in quotes, its workers' options."""
    keys = {
        "data_dir": shards,
        "learning_rate": "2.0e-4",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
    }
    keys |= {
        "warmup_steps": 2000,
        "max_steps": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_epochs": 1,
    }
    keys |= {
        "grad_clip": 1.0,
        "device": "cpu",
        "compile_model": False,
        "out_dir": str(tmp_path / "l"),
        "backend": "ddp",
    }
    keys |= {
        "num_workers": 4,
        "pin_memory": True,
        "save_latest_always": True,
        "wandb_project": None,
    }
    model = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_seq_len": 16,
    }
    model |= {
        "multiple_of": 32,
        "use_qk_norm": True,
        "attn_dropout": 0.0,
        "rope_ntk_scale_base": 8,
        "n_experts": None,
    }
    cfg, _, notes, _ = read_config([str(write_yaml(tmp_path / "l.yaml", keys | {"model": model}))])
    assert cfg.model.rope_theta == 20000 and cfg.model.qk_norm and cfg.learning_rate == 2e-4
    for word in ("num_workers", "pin_memory", "backend", "num_epochs: 1"):
        assert any(word in note for note in notes), word
    lunaris = Trainer([str(tmp_path / "l.yaml")])
    assert lunaris.fit() == 0 and lunaris.step == 3


def test_printed_configuration_runs_as_it_is(tiny, tmp_path):
    assert Trainer(tiny(max_steps=3, num_epochs=...)).fit() == 0
    again = tiny()["out_dir"] + "/config.yaml"
    cfg, *_ = read_config([again])
    first = yaml.safe_load(Path(again).read_text())
    assert dataclasses.asdict(cfg) == first | {
        "gradient_accumulation_steps": 1
    }  # it follows from batch_tokens
    a = Trainer([again, "--out_dir", str(tmp_path / "again")])
    assert a.fit() == 0
    assert fingerprint(tiny()["out_dir"], 3) == fingerprint(a.out, 3)


def test_a_torch_that_was_not_tried_is_said_once_at_the_start_of_a_run(tiny, capsys, monkeypatch):
    monkeypatch.setattr(machines, "TRIED", ("2.9", "2.10"))
    Trainer(tiny(max_steps=1)).close()
    assert (
        capsys.readouterr().out.count(
            "is newer than 2.10, the newest on which Lumen's tests were run"
        )
        == 1
    )


# ---------------------------------------------------------------- processes, signals, faults


def start(keys, path, *words, ranks=0):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    command = [sys.executable, *launcher, "train.py", str(write_yaml(path, keys)), *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(out_dir, step, process, seconds=60):
    until = time.time() + seconds
    while time.time() < until and process.poll() is None:
        if (Path(out_dir) / "metrics.jsonl").exists() and max(losses(out_dir) or [0]) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=10)[0])


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_signals_and_kill(tiny, tmp_path, ranks):
    """TERM, INT and KILL at three places; the run that gets all three ends with the same bytes as
    one never stopped.

    What is hit is started as users start it; the whole run and the last part, which nothing hits,
    are forked."""
    changes = {
        "max_steps": 180,
        "save_interval": 25,
        "eval_interval": 0,
        "eval_tokens": 64,
        "log_interval": 1,
    }
    keys, whole = tiny("cut", **changes), tiny("whole", **changes)
    result = run_forked("train.py", write_yaml(tmp_path / "w.yaml", whole), ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    for step, number in ((20, signal.SIGTERM), (40, signal.SIGINT), (60, signal.SIGKILL)):
        process = start(keys, tmp_path / "c.yaml", ranks=ranks)
        wait_for_step(keys["out_dir"], step, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        status = json.loads((Path(keys["out_dir"]) / "status.json").read_text())
        if number == signal.SIGKILL:
            time.sleep(1.0 if ranks else 0)  # the workers notice that their agent is gone
        else:
            assert status["state"] == "stopped" and (process.returncode == 0 or ranks), out
            assert max(losses(keys["out_dir"])) == checkpoint.list_steps(keys["out_dir"])[-1]
    result = run_forked("train.py", tmp_path / "c.yaml", ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    assert same_run(keys, whole, 180)


@pytest.mark.parametrize("point", ["before commit", "no manifest", "moved aside", "pruning"])
def test_power_loss_in_a_save(tiny, reference, tmp_path, point):
    keys = tiny("cut", save_total_limit=1)
    whole = reference.keys(keys)
    path = write_yaml(tmp_path / "c.yaml", keys)
    result = run_forked("tests/programs/power_loss.py", point, 8, path)
    assert result.returncode == 9, result.stderr + result.stdout
    finish(keys)
    assert same_run(whole, keys)
    assert not list(Path(keys["out_dir"]).glob("*.tmp")) and not list(
        Path(keys["out_dir"]).glob("*.old")
    )


def test_disk_full(tiny, reference, tmp_path):
    keys = tiny("cut", save_interval=4, max_steps=16)
    path = write_yaml(tmp_path / "c.yaml", keys)
    result = run_forked("tests/programs/full_disk.py", 4, 9, path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout.count("E307") >= 2 and checkpoint.list_steps(keys["out_dir"])[-1] == 16
    assert 4 not in checkpoint.list_steps(keys["out_dir"]) and 9 in checkpoint.list_steps(
        keys["out_dir"]
    ), "tried again"
    whole = reference.keys(tiny("whole", max_steps=16))
    assert same_run(whole, keys, 16)
    last = tiny("last", save_interval=4, max_steps=16)
    result = run_forked(
        "tests/programs/full_disk.py", 16, 99, write_yaml(tmp_path / "l.yaml", last)
    )
    assert result.returncode == 4, result.stderr + result.stdout
    assert checkpoint.list_steps(last["out_dir"]) == [4, 8, 12]
    assert json.loads((Path(last["out_dir"]) / "status.json").read_text())["code"] == 4


def test_a_checkpoint_is_written_beside_training(tiny, reference, monkeypatch):
    """Training goes on while a thread writes; what is written is the step of the copy, and a
    failure is made good."""
    base = reference(tiny("base"))
    real, turns, fail = checkpoint.write, {}, []

    def slow(folder, rank, pieces):
        turns[folder.name] = [trainer.orchestrator.iteration]
        until = time.monotonic() + 30
        while trainer.step < 7 and not fail and time.monotonic() < until:
            time.sleep(0.01)
        turns[folder.name].append(trainer.orchestrator.iteration)
        return "OSError: no room" if fail and fail.pop() else real(folder, rank, pieces)

    monkeypatch.setattr(checkpoint, "write", slow)
    trainer = Trainer(tiny("beside", save_async=True))
    assert trainer.fit() == 0
    first, last = turns["step_00000004.tmp"]
    assert first == 5 and last >= 7, "steps were made in the meantime"
    for step in (4, 8, 12):
        assert fingerprint(trainer.out, step) == fingerprint(base.out, step)
    assert (
        losses(trainer.out) == losses(base.out)
        and "of which training waited" in (trainer.out / "train.log").read_text()
    )
    fail.append(True)
    trainer = Trainer(tiny("failing", save_async=True))
    assert trainer.fit() == 0
    assert (
        checkpoint.list_steps(trainer.out)[0] in (5, 6)
        and "E307" in (trainer.out / "train.log").read_text()
    )
    assert fingerprint(trainer.out, 12) == fingerprint(base.out, 12)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks(tiny, tmp_path, world):
    """Losses as on one process; resume to the same bytes; another world size; signal or fault on
    one rank only."""
    rows = {"batch_tokens": 12 * 32, "batch_size": 2, "gradient_accumulation_steps": ...}
    one, many = tiny("one", {"dropout": 0.0}, **rows), tiny("many", {"dropout": 0.0}, **rows)
    whole, parts = tiny("whole", **rows), tiny("parts", **rows)
    faulty, moved = tiny("faulty", **rows), tiny("moved", {"dropout": 0.0}, **rows)
    finish(one)
    trainer = Trainer(moved)
    stop_at(trainer, 6)
    trainer.fit()
    jobs = [
        {"config": many},
        {"config": whole},
        {"config": parts, "stop_at": 5},
        {"config": parts},
        {"config": moved},
    ]
    jobs += [{"config": faulty, "unreadable_at": [1, 6]}, {"config": faulty}]
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=world)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    a, b, c = (losses(k["out_dir"]) for k in (one, many, moved))
    assert a.keys() == b.keys() == c.keys()
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5, "one process and many"
    assert max(abs(a[s] - c[s]) for s in a) < 1e-5, "begun on one, ended on many"
    assert [
        r["val_loss"] for r in read_lines(many["out_dir"] + "/metrics.jsonl") if "val_loss" in r
    ] == pytest.approx(
        [r["val_loss"] for r in read_lines(one["out_dir"] + "/metrics.jsonl") if "val_loss" in r],
        abs=1e-5,
    )
    assert same_run(whole, parts), "resumed"
    for rank in range(world):
        assert f"rank {rank} raised E111 rank 1: injected" in result.stdout
    assert same_run(whole, faulty), "after the fault"
    finish(tiny("back", {"dropout": 0.0}, **rows) | {"init_from": many["out_dir"], "max_steps": 2})


def test_rows_that_cannot_be_shared_name_the_sizes_that_can(tiny, monkeypatch):
    trainer = Trainer(tiny(batch_size=4, gradient_accumulation_steps=2))
    stop_at(trainer, 2)
    trainer.fit()

    class Three(Parallel):
        def rows(self):
            return 0, 3

    with pytest.raises(
        UserError, match=r"E600.*8 rows per step cannot be shared by 3 processes; can: \[2, 4\]"
    ):
        Trainer(tiny(batch_size=4, gradient_accumulation_steps=2), Three)
    with pytest.raises(UserError, match="E002.*nearest that is: 96"):
        Trainer(tiny("other", batch_tokens=100, gradient_accumulation_steps=...))


def test_one_message_and_no_traceback_for_a_users_mistake(tiny, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", tiny() | {"learnin_rate": 1})
    result = run_python("train.py", path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error E002") and result.stderr.count("E002") == 1
    result = run_python(
        "train.py", write_yaml(tmp_path / "d.yaml", tiny(data_dir=str(tmp_path / "none"))), ranks=2
    )
    assert result.returncode != 0 and result.stderr.count("error E110") == 1
    assert "prepare_data.py" in result.stderr
    assert (
        'train.py", line' not in result.stderr and 'loader.py", line' not in result.stderr
    )  # the rest is torchrun's


@pytest.mark.parametrize(
    "changes, code",
    [
        ({"model": {"vocab_size": 40}}, "E113"),
        ({"model": {"max_seq_len": 100_000}}, "E114"),
        ({"data_dir": "/no/such/folder"}, "E110"),
        ({"device": "cuda"}, "E003"),
        ({"device": "tpu"}, "E002"),
        ({"attention": "fast"}, "E002"),
        ({"precision": "int8"}, "E002"),
        ({"precision": "fp16"}, "E003"),
        ({"deterministic": "maybe"}, "E002"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(tiny, changes, code):
    if code == "E003" and changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    keys = tiny(**changes)
    try:
        with pytest.raises(UserError) as e:
            trainer = Trainer(keys)
            trainer.loader.next()  # bare shards say their largest id when it is read
        assert e.value.code == code
    finally:
        if code != "E113":
            assert not Path(keys["out_dir"]).exists()


def test_dry_run_prints_and_touches_nothing(tiny, tmp_path, capsys):
    path = write_yaml(tmp_path / "c.yaml", tiny())
    assert train.main([str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "tokens a step", "FLOP", "memory", "GiB"):
        assert word in out
    assert not Path(tiny()["out_dir"]).exists()


def test_prepare_key_trains_on_text_on_several_ranks(tmp_path):
    """From text to a sample in one command; the other ranks wait for rank 0, or take its error."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(
            "".join(f"the {w} number {i} is {i * 7 % 13}\n" for w in ("first", "second")) * 9
        )
    prepare = {"sources": [str(text)], "tokenizer": "bpe:300", "out": str(tmp_path / "data")}
    keys = {
        "prepare": prepare,
        "out_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "batch_size": 2,
        "device": "cpu",
    }
    keys |= {"sample_prompt": "the", "precision": "fp32", "eval_tokens": 512}
    keys |= {"model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}}
    result = run_forked("train.py", write_yaml(tmp_path / "c.yaml", keys), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "bits per byte" in result.stdout and "sample " in result.stdout
    out = tmp_path / "out"
    assert (out / "tokenizer.json").exists() and (out / "token_bytes.npy").exists()
    bpb = [r["val_bpb"] for r in read_lines(out / "metrics.jsonl") if "val_loss" in r]
    assert bpb and 0.5 < bpb[-1] < 8
    keys["prepare"] |= {"sources": [str(tmp_path / "none")], "out": str(tmp_path / "other")}
    result = run_forked("train.py", write_yaml(tmp_path / "d.yaml", keys), ranks=2)
    assert result.returncode != 0 and result.stderr.count("error E1") == 1, result.stderr[-3000:]


def test_a_restarted_process_does_not_repeat_a_hopeless_run(tiny, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", tiny())
    trainer = finish(tiny(max_steps=2))
    checkpoint.write_json(
        trainer.out / "status.json", {"state": "diverged", "code": 3, "reason": "E301: it diverged"}
    )
    result = run_forked("train.py", path, TORCHELASTIC_RESTART_COUNT="1")
    assert result.returncode == 3 and "E301" in result.stderr


def test_wandb_offline_and_tensorboard(tiny, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    sparse = {"n_experts": 4, "d_expert": 16, "mod_capacity": 0.5}
    trainer = finish(tiny("run", sparse, max_steps=3, wandb_project="lumen-test", tensorboard=True))
    assert list((trainer.out / "wandb").glob("offline-run-*"))
    assert "offline" in (trainer.out / "train.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trainer.out / "tensorboard")).Reload()
    assert "loss" in board.Tags()["scalars"]
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r][-1]
    for layer in (0, 1):  # a bar per expert
        last = board.Histograms(f"experts/share/{layer}")[-1]
        assert last.step == 3 and sum(last.histogram_value.bucket) == pytest.approx(1)
        assert last.histogram_value.bucket == pytest.approx(row[f"experts/share/{layer}"])
    assert (
        len(board.Histograms("depth/position")[-1].histogram_value.bucket) == 32
    )  # a bar per position


@pytest.mark.nightly
def test_compiled_resume_equals_never_stopped(tiny):
    still = {"dropout": 0.0}  # compiled dropout draws other numbers than eager dropout
    whole, parts = (
        tiny("whole", still, compile_model=True),
        tiny("parts", still, compile_model=True),
    )
    finish(whole)
    trainer = Trainer(parts)
    stop_at(trainer, 5)
    trainer.fit()
    torch._dynamo.reset()
    finish(parts)
    assert same_run(whole, parts)
    plain = finish(tiny("plain", still))
    a, b = losses(whole["out_dir"]), losses(plain.out)
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_how_long_ranks_wait_is_set_for_every_group_in_each_version_of_torch(monkeypatch):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # torch 2.14 warns of the private call that older ones need
            machines.set_collective_timeout(77)
        assert [g._get_backend(torch.device("cpu")).options._timeout.seconds for g in groups] == [
            77,
            77,
        ]
    finally:
        dist.destroy_process_group()
    told = []
    without = SimpleNamespace(
        _set_pg_timeout=lambda *words: told.append(words)
    )  # a torch without its private list
    monkeypatch.setattr(dist, "distributed_c10d", without)
    monkeypatch.setattr(dist, "set_timeout", without._set_pg_timeout, raising=False)
    machines.set_collective_timeout(78)
    assert [(time.seconds, group) for time, group in told] == [(78, None)]
