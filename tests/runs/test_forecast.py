"""The length of a run, its forecast, its health."""

import time

import pytest
import torch
from conftest import read_lines
from rig import LONG, MOE, actions, finish

from lumen import forecast
from lumen import machine as machines
from lumen.cli import read_config
from lumen.errors import UserError
from train import Trainer


def test_tokens_per_parameter_sets_the_length(tiny):
    keys = tiny(max_steps=..., tokens_per_parameter=0.5)

    def steps(**more):
        name = f"{keys['out_dir']}-{len(more)}{'-'.join(more)}"
        trainer = Trainer(keys | {"out_dir": name} | more)
        trainer.loader.close()
        return trainer.run.max_steps, trainer

    found, trainer = steps()
    tokens, n = trainer.run.rows_per_step * 32, trainer.counted.n_params()["active"]
    assert found == round(0.5 * n / tokens)
    found_moe, moe = steps(model=keys["model"] | MOE)
    assert found_moe == round(0.5 * moe.counted.n_params()["active"] / tokens) > found
    data = sum(s.windows for s in trainer.data.sources.values()) * 32
    assert steps(num_epochs=0.25)[0] == round(0.25 * data / tokens) < found  # at most so often
    lumina = {
        "tokens_per_parameter": None,
        "auto_epoch_scaling": True,
        "chinchilla_multiplier": 0.5,
    }
    assert steps(**lumina)[0] == found
    for more in ({"max_steps": 5}, {"min_auto_epochs": 3}):
        with pytest.raises(UserError) as e:
            Trainer(keys | more)
        assert e.value.code == "E002"


def test_the_forecast_is_recorded_and_survives_a_resume(tiny):
    keys = tiny(**LONG | {"save_interval": 100})
    keys["orchestrator"] = {"check_interval": 20}
    whole = finish(keys | {"out_dir": keys["out_dir"] + "-whole"})
    finish(keys, iterations={131: lambda t: t.request_stop()})
    finish(keys)
    rows = [
        {r["step"]: r for r in read_lines(f"{out}/metrics.jsonl") if "forecast/final" in r}
        for out in (keys["out_dir"], whole.out)
    ]
    assert len(rows[0]) >= 8 and rows[0].keys() == rows[1].keys()
    assert all(rows[0][s]["forecast/final"] == rows[1][s]["forecast/final"] for s in rows[0])
    last = rows[0][max(rows[0])]
    assert last["forecast/final_low"] < last["forecast/final"] < last["forecast/final_high"]
    assert last["forecast/slope_low"] < last["forecast/slope"] < last["forecast/slope_high"]
    assert "; training loss at the end " in (whole.out / "train.log").read_text()


@pytest.mark.parametrize("act", [False, True])
def test_a_run_is_cut_short_only_where_that_is_justified_and_allowed(tiny, monkeypatch, act):
    """The reasons are plan.py's and tested there; here: what is done about them, and that it is
    done once."""
    monkeypatch.setattr(forecast, "justified_stop", lambda *args: "start the decay: for the test")
    keys = tiny(**LONG | {"lr_schedule": "wsd", "enable_early_stopping": act, "decay_frac": 0.25})
    keys["orchestrator"] = {"check_interval": 60}
    trainer = finish(keys)
    assert actions(trainer) == [("length", "start the decay", act)]
    assert trainer.step == (80 if act else 240)
    rows = {r["step"]: r["lr"] for r in read_lines(trainer.out / "metrics.jsonl") if "lr" in r}
    assert rows[60] == 3e-3 and (rows[80] < 6e-4 if act else rows[80] == 3e-3)


def test_a_replay_that_is_stopped_after_a_cut_goes_on_to_the_cut_length(tiny, monkeypatch):
    """The length stood in cfg and in what a resume keeps; a replay changed the first only."""
    monkeypatch.setattr(forecast, "justified_stop", lambda *args: "start the decay: for the test")
    keys = tiny(**LONG | {"lr_schedule": "wsd", "enable_early_stopping": True, "decay_frac": 0.25})
    keys["orchestrator"] = {"check_interval": 60}
    real = finish(keys)
    keys |= {"out_dir": keys["out_dir"] + "-replay", "enable_early_stopping": False}
    file = str(real.out / "decisions.jsonl")
    keys["orchestrator"] = {"check_interval": 60, "mode": "replay", "replay": file}
    finish(keys, iterations={70: lambda t: t.request_stop()})
    again = finish(keys)
    assert again.started_at == 70 and again.step == again.run.max_steps == real.step == 80


def test_suggested_yaml_runs_as_it_is(tiny):
    trainer = finish(tiny(max_steps=8))
    path = trainer.out / "suggested.yaml"
    cfg, *_ = read_config([str(path)])
    assert (
        cfg.batch_size == trainer.run.micro_batch
        and cfg.batch_tokens == trainer.run.rows_per_step * 32
    )
    assert cfg.max_steps > 8 and path.read_text().count("#") >= 4
    again = Trainer([str(path), "--max_steps", "2", "--out_dir", str(trainer.out) + "-again"])
    assert again.run.rows_per_step == trainer.run.rows_per_step and again.fit() == 0


def test_health_names_the_cause(tiny):
    def slow(trainer):
        following = trainer.loader.next

        def late():
            time.sleep(0.02)
            return following()

        trainer.loader.next = late

    keys = tiny(max_steps=40) | {"orchestrator": {"check_interval": 10}}
    trainer = finish(keys, iterations={1: slow})
    rows = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r]
    assert (
        rows[0]["health"] is None
        and rows[-1]["health_level"] == 1
        and "waiting" in rows[-1]["health_causes"][0]
    )
    assert (
        rows[-1]["health"] == "warning"
        and "waiting for data" in (trainer.out / "train.log").read_text()
    )
    assert sum(v for k, v in rows[-1].items() if k.startswith("time/")) == pytest.approx(1)
    assert rows[-1]["time/data"] > 0.3


def test_health_says_that_all_is_lost_before_there_is_a_course(tiny):
    def lose(trainer):
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))

    keys = tiny(max_steps=30, warmup_steps=25, save_interval=0) | {
        "orchestrator": {"check_interval": 10}
    }
    for at, critical in (({}, False), ({12: lose}, True)):
        trainer = finish(keys | {"out_dir": f"{keys['out_dir']}{critical}"}, iterations=at)
        health = [r["health"] for r in read_lines(trainer.out / "metrics.jsonl") if "health" in r][
            -1
        ]
        said = "above where this run began" in (trainer.out / "train.log").read_text()
        assert (health == "critical") == said == critical


def test_a_torch_that_no_longer_counts_its_graphs_ends_no_run(monkeypatch):
    import torch._dynamo.utils as private

    assert machines.compiled_graphs() >= 0
    monkeypatch.delattr(private, "counters", raising=False)
    assert machines.compiled_graphs() == 0
