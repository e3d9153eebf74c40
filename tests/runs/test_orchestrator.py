"""Detectors on numbers, then the orchestrator on runs: idle is identical, what fails is undone, people can steer."""

import json
import math
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, fingerprint, losses, read_lines, run_python, write_yaml
from test_train import Halves, fake_fp16

import train
from lumen import checkpoint, control, forecast
from lumen import machine as machines
from lumen import orchestrate as orchestrator
from lumen.cli import read_config
from lumen.config import RANGES
from lumen.detectors import Divergence, NormLimit
from lumen.errors import UserError
from train import Parallel, Trainer

LONG = {
    "max_steps": 240,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 10,
    "save_interval": 0,
}
LONG |= {"log_interval": 20}
MOE = {"n_experts": 4, "d_expert": 24, "router": "sigmoid", "n_experts_max": 5}
KINDS = {"dense": {}, "moe": MOE, "mod": {"mod_capacity": 0.5, "mod_every": 2}}
KINDS["hybrid"] = MOE | {"mod_capacity": 0.5, "mod_layers": [1], "mod_ffn_only": True}


def run(keys, parallel=Parallel, at=None) -> Trainer:
    """Train to the end; at: {turn: function of the trainer}, called where that turn begins."""
    trainer = Trainer(keys, parallel)
    act = trainer.orchestrator.act

    def first_that():
        turn = trainer.orchestrator.turn + 1
        if at and turn in at:
            at[turn](trainer)
        return act()

    trainer.orchestrator.act = first_that
    assert trainer.fit() == 0
    return trainer


def decisions(trainer) -> list[dict]:
    path = trainer.out / "decisions.jsonl"
    return read_lines(path) if path.exists() else []


def actions(trainer, kind="decision") -> list[tuple]:
    rows = [d for d in decisions(trainer) if d.get("kind", "decision") == kind]
    return [(d["trigger"], d["action"], d["executed"]) for d in rows]


def tensors(trainer) -> dict:
    return {k: v.clone() for k, v in trainer.tensors().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- detectors


def noise(n, df=5, rho=0.0, seed=0):
    rng = np.random.default_rng(seed)
    e, x = rng.standard_t(df, n) / math.sqrt(df / (df - 2)), np.zeros(n)
    for i in range(1, n):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho * rho) * e[i]
    return x


def watch(values, threshold=0.75):
    """[(index, onset)] of the alarms that follow() would raise."""
    c, found = Divergence(), []
    for i, v in enumerate(values):
        c.add(i, v)
        if c.alarm(threshold):
            found.append((i, c.onset()))
            c.restart()
    return found


def course(n):
    t = np.arange(n)
    return 2.5 + 3 * (t / 500.0 + 1) ** -0.3


@pytest.mark.parametrize("df, rho", [(1000, 0.0), (5, 0.0), (5, 0.3), (3.5, 0.0)])
def test_a_healthy_loss_raises_no_alarm(df, rho):
    n = 20_000
    assert watch(course(n) + 0.03 * noise(n, df, rho)) == []
    assert watch(course(n) + 0.1 * noise(n, df, rho, seed=1)) == [], "noise three times as large"


@pytest.mark.parametrize("rise", [0.3, 0.5, 1.0, 5.0])
def test_a_loss_that_jumps_is_found_with_its_onset(rise):
    for seed in range(5):
        y = course(1200) + 0.03 * noise(1200, seed=seed)
        y[800:] += rise
        at, onset = watch(y)[0]
        assert 800 <= at <= 812 and abs(onset - 800) <= 20


def test_a_slow_drift_is_found_and_a_curve_that_flattens_is_none():
    for seed in range(5):
        y = course(1200) + 0.03 * noise(1200, seed=seed)
        y[800:] += 0.004 * np.arange(400)
        assert 800 <= watch(y)[0][0] <= 920
    for steep in (0.02, 0.1):  # a young run: it falls fast, and ever slower
        t = np.arange(1500)
        assert watch(1.5 + 3 * np.exp(-steep * t) + 0.02 * noise(1500)) == []


def test_a_young_run_is_watched_and_its_growing_noise_is_no_alarm():
    """A long warm-up: the loss leaves ln V ever faster, and its noise grows from 0.001 to 0.15 nats."""
    t = np.arange(1500)
    level = 4.85 - 1.2 / (1 + np.exp((500 - t) / 100))
    for seed in range(5):
        y = level + (0.001 + 0.15 / (1 + np.exp((500 - t) / 60))) * noise(1500, seed=seed)
        assert watch(y) == []
        y[300:] += 0.5
        assert 300 <= watch(y)[0][0] <= 312


def test_noise_is_never_all_that_was_learned():
    """However large it is beside what there is to learn, in the first 200 steps of 40 runs each."""
    for sd, drop in ((0.15, 0.0), (0.3, 0.3), (0.6, 1.5)):
        for seed in range(40):
            c = Divergence()
            for y in 4.8 - drop * (1 - np.exp(-np.arange(200) / 100)) + sd * noise(200, seed=seed):
                c.add(0, float(y))
                assert c.lost() is None, (sd, drop, seed)


def test_one_outlier_is_no_alarm_and_neither_is_what_cannot_matter():
    y = course(2000) + 0.03 * noise(2000)
    y[900] += 5.0
    assert watch(y) == []
    y = course(2000) + 0.002 * noise(2000)
    y[900:] += 0.05  # 25 deviations, but less than 0.1 nats
    assert watch(y) == []


def test_a_norm_must_leave_its_own_past_to_be_an_explosion():
    rng, found = np.random.default_rng(0), 0
    for spread in (0.05, 0.3):
        guard = NormLimit()
        for turn, norm in enumerate(np.exp(spread * rng.standard_t(5, 5000))):
            limit = guard.limit(turn)
            assert (limit is None) == (turn < NormLimit.START + 1), (
                "two turns are still on their way"
            )
            found += limit is not None and math.log(norm) > limit
            guard.add(turn, norm)
    assert found == 0
    assert math.exp(guard.limit(6000)) >= 4.0 and guard.confidence(6000, 100.0) > 0.9
    before = guard.limit(5001)
    guard.add(5000, 1e9)
    assert guard.limit(5001) == before and guard.limit(5002) >= before, (
        "the answer never waits for the last turn"
    )


def test_detectors_go_on_where_they_were():
    """Through JSON, as in a checkpoint, at any point."""
    y = course(400) + 0.03 * noise(400)
    y[300:] += 1.0
    for cut in (10, 50, 200, 304):
        one, other = Divergence(), Divergence()
        for i, v in enumerate(y):
            one.add(i, v)
            if i == cut:
                other.load(json.loads(json.dumps(one.state())))
            elif i > cut:
                other.add(i, v)
        assert one.E > 1e6 and (one.E, one.onset(), one.floor()) == (
            other.E,
            other.onset(),
            other.floor(),
        )


# ---------------------------------------------------------------- idle is identical

IDLE = [  # pairwise over kind, schedule, accumulation, dropout; compiled below; the full cross is nightly
    ("dense", "cosine", 1, 0.0),
    ("dense", "wsd", 2, 0.1),
    ("moe", "wsd", 1, 0.1),
    ("moe", "cosine", 2, 0.0),
    ("mod", "cosine", 2, 0.1),
    ("mod", "wsd", 1, 0.0),
    ("hybrid", "wsd", 2, 0.0),
    ("hybrid", "cosine", 1, 0.1),
]


def same_in_all_modes(tiny, kind, schedule, accumulate, dropout, **changes):
    found = {}
    changes = {"max_steps": 130, "batch_size": 4 // accumulate, "save_interval": 50} | changes
    for name in ("off", "act", "shadow"):
        more = {"orchestrator": {"mode": name, "check_interval": 20, "snapshot_interval": 10}}
        keys = tiny(
            name, KINDS[kind] | {"dropout": dropout}, gradient_accumulation_steps=accumulate
        )
        trainer = run(keys | changes | {"lr_schedule": schedule} | more)
        assert trainer.orchestrator.mode == name and decisions(trainer) == []
        found[name] = tensors(trainer)
    assert equal(found["off"], found["act"]) and equal(found["off"], found["shadow"])


@pytest.mark.parametrize("kind, schedule, accumulate, dropout", IDLE)
def test_idle_is_identical(tiny, kind, schedule, accumulate, dropout):
    same_in_all_modes(tiny, kind, schedule, accumulate, dropout)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_idle_is_identical_when_compiled(tiny, kind):
    found = []
    for mode in ("off", "act"):
        keys = tiny(mode, KINDS[kind], compile_model=True, max_steps=80, save_interval=0)
        block = {"mode": mode, "snapshot_interval": 10, "check_interval": 20}
        found.append(tensors(run(keys | {"orchestrator": block})))
    assert equal(*found)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_idle_is_identical_everywhere(tiny, kind, schedule, accumulate, dropout, compiled):
    same_in_all_modes(
        tiny, kind, schedule, accumulate, dropout, compile_model=compiled, max_steps=100
    )


@pytest.mark.parametrize("ranks, kinds", [(2, ("dense", "hybrid")), (3, ("moe",))])
def test_idle_is_identical_on_several_ranks(tiny, ranks, kinds):
    jobs = []
    for kind in kinds:
        for mode in ("off", "act", "shadow"):
            keys = tiny(f"{kind}-{mode}", KINDS[kind], max_steps=80, batch_size=1, save_interval=0)
            block = {"mode": mode, "snapshot_interval": 10, "check_interval": 20}
            jobs.append({"config": keys | {"orchestrator": block}})
    result = run_python(ROOT / "tests" / "ranks.py", json.dumps(jobs), ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    for i in range(0, len(jobs), 3):
        prints = [fingerprint(job["config"]["out_dir"], 80) for job in jobs[i : i + 3]]
        files = [{k: v for k, v in p.items() if k.endswith(".safetensors")} for p in prints]
        assert files[0] and files[0] == files[1] == files[2]


# ---------------------------------------------------------------- the guard


class Faulty(Parallel):
    """Multiplies the reduced gradient by `times` at the turns `at`."""

    at, times = (), 1e4
    trainer = None

    def reduce(self, model, stats):
        stats = super().reduce(model, stats)
        if self.trainer and self.trainer.orchestrator.turn in self.at:
            for p in model.parameters():
                p.grad.mul_(self.times)
        return stats


def faulty(keys, at, times=1e4, mode="act") -> Trainer:
    trainer = Trainer(keys | {"orchestrator": {"mode": mode}}, Faulty)
    trainer.parallel.trainer, trainer.parallel.at, trainer.parallel.times = trainer, at, times
    assert trainer.fit() == 0
    return trainer


@pytest.mark.parametrize("name", RANGES["optimizer"].split(" | "))
@pytest.mark.parametrize("times", [1e4, float("nan"), 1e30])
def test_a_bad_gradient_is_as_if_its_batch_had_not_been(tiny, name, times):
    """Every optimizer must pass: weights, moments and counts equal a run whose step was never made at that turn."""
    keys = tiny("guarded", optimizer=name, **LONG | {"max_steps": 80})
    guarded = faulty(keys, (50,), times)
    trigger = "explosion" if times == 1e4 else "nonfinite"
    assert actions(guarded) == [(trigger, "drop", True)] and guarded.orchestrator.dropped == 1

    reference = Trainer(
        keys | {"out_dir": keys["out_dir"] + "-ref", "orchestrator": {"mode": "off"}}
    )
    step = reference.optimizer.step
    reference.optimizer.step = lambda: step() if reference.orchestrator.turn != 50 else None
    assert reference.fit() == 0
    assert equal(tensors(guarded), tensors(reference))
    assert guarded.tokens == reference.tokens - guarded.run.rows_per_step * 32, (
        "the reference believed it had trained on it"
    )


def test_three_explosions_in_a_row_are_dropped_the_fourth_is_let_through(tiny):
    trainer = faulty(tiny(**LONG | {"max_steps": 90}), (50, 51, 52, 53, 54, 60), 100.0)
    seen = [(d["turn"], d["action"]) for d in decisions(trainer) if d["trigger"] == "explosion"]
    assert seen == [(50, "drop"), (51, "drop"), (52, "drop"), (53, "accept"), (60, "drop")]


def test_shadow_and_off_leave_an_explosion_alone(tiny):
    shadow, off = (
        faulty(tiny(m, **LONG | {"max_steps": 80}), (50,), mode=m) for m in ("shadow", "off")
    )
    assert equal(tensors(shadow), tensors(off)) and decisions(off) == []
    assert actions(shadow) == [("explosion", "drop", False)]


def test_an_explosion_is_no_overflow_to_the_scaler_of_fp16(tiny, monkeypatch):
    """fp16's arithmetic on the CPU: an explosion is dropped and the scale stays; an overflow halves it, and is none."""
    monkeypatch.setattr(machines, "detect", fake_fp16(machines.detect))
    keys = tiny(precision="mixed_fp16", **LONG | {"max_steps": 80})
    for times, trigger in ((300.0, "explosion"), (float("inf"), "nonfinite")):
        trainer = Trainer(keys | {"out_dir": keys["out_dir"] + trigger}, Faulty)
        trainer.scale.fill_(1024.0)
        trainer.parallel.trainer, trainer.parallel.at, trainer.parallel.times = (
            trainer,
            (60,),
            times,
        )
        assert trainer.fit() == 0
        assert (trigger, "drop", True) in actions(trainer) and trainer.orchestrator.dropped == 1
        assert trainer.scale.item() == (1024.0 if trigger == "explosion" else 512.0)


ONE_OF_TWO = """
import json, os, sys, time, torch, torch.distributed as dist
from conftest import ROOT
from train import Parallel, Trainer

class Kept(Parallel):
    def close(self):
        dist.barrier()

torch.set_num_threads(1)
for fault, keys in json.loads(sys.argv[1]).items():
    trainer, calls = Trainer(keys, Kept), [0]
    mine = trainer.parallel.rank == 1

    def poison(module, inputs, output):  # rank 1's second micro-step of step 20, and its repetition for the diagnosis
        if mine and module.training and trainer.step in (20, 21):
            calls[0] += 1
            if calls[0] in (2, 4):
                return output * float("inf")

    def too_large(module, inputs):
        if mine and module.training and trainer.step == 20 and inputs[0].shape[0] > 1:
            calls[0] += 1
            if calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    def flip(act=trainer.orchestrator.act):
        if mine and trainer.orchestrator.turn == 45:
            with torch.no_grad():
                trainer.model.blocks[0].attn.wo.weight[0, 0] += 0.25
        return act()

    if fault == "infinite":
        trainer.model.blocks[1].ffn.w2.register_forward_hook(poison)
    if fault == "memory":
        trainer.model.blocks[1].register_forward_pre_hook(too_large)
    if fault == "flip":
        trainer.orchestrator.act = flip
    if fault == "commands" and not mine:
        lines = json.loads(sys.argv[2])
        with open(trainer.out / "control.jsonl", "w") as f:
            f.write("".join(json.dumps({"method": m, "args": a}) + chr(10) for m, a in lines))
    if fault == "slow" and mine:
        trainer.model.blocks[1].register_forward_pre_hook(lambda m, i: time.sleep(0.02))
    assert trainer.fit() == 0
sys.stdout.flush()
os._exit(0)
"""


COMMANDS = [
    ["add_expert", [0]],
    ["prune_expert", [0, 1, True]],
    ["_initialize_new_expert", [[0, 4], [2, 3]]],
]
COMMANDS += [
    ["adjust_capacity_factor", [1.0]],
    ["adjust_routing_temperature", [1.5]],
    ["enable_expert_dropout", [0.2]],
]
COMMANDS += [
    ["get_expert_statistics", []],
    ["adjust_mod_capacity", [0.25]],
    ["get_mod_statistics", []],
]
COMMANDS += [
    ["adjust_batch_size", [1]],
    ["_recreate_dataloader", [None]],
    ["get_current_metrics", []],
]
COMMANDS += [
    ["_extract_moe_routing_stats", []],
    ["_calculate_throughput", []],
    ["emergency_lr_reduction", [2.0]],
]
COMMANDS += [
    ["adjust_weight_decay", [0.05]],
    ["_update_optimizer_param_groups", ["eps", 1e-6]],
    ["rollback_steps", [1]],
]


def test_what_befalls_one_rank_of_two(tiny, tmp_path):
    """A gradient that is not finite in one micro-step, memory that runs out half-way, a weight that changed: the other
    rank follows, and nothing is lost."""
    base = tiny(
        "whole", {"dropout": 0.0}, max_steps=60, batch_size=2, save_interval=0, warmup_steps=5
    )
    base["orchestrator"] = {"check_interval": 10, "snapshot_interval": 10}
    jobs = {
        name: base | {"out_dir": str(tmp_path / name)}
        for name in ("whole", "infinite", "memory", "flip", "slow")
    }
    jobs["commands"] = tiny("commands", KINDS["hybrid"], max_steps=14, batch_size=2) | {
        "orchestrator": {"check_interval": 1}
    }
    (tmp_path / "one_of_two.py").write_text(ONE_OF_TWO)
    path = f"{ROOT}:{ROOT}/tests"
    result = run_python(
        tmp_path / "one_of_two.py",
        json.dumps(jobs),
        json.dumps(COMMANDS),
        ranks=2,
        PYTHONPATH=path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-2000:]
    done = read_lines(tmp_path / "commands" / "decisions.jsonl")
    assert not [r for r in done if r.get("trigger") == "desync"], (
        "the weights of both ranks were compared at each step"
    )
    assert [r["action"] for r in done if r["trigger"] == "user"] == [name for name, _ in COMMANDS]
    assert {r["action"]: r["reason"] for r in done if not r["executed"]}.keys() <= {
        "_initialize_new_expert"
    }
    assert {r["turn"] for r in done} == {2} and done[-1]["args"]["to_step"] == 0
    rows = {name: read_lines(tmp_path / name / "decisions.jsonl") for name in list(jobs)[1:4]}
    (row,) = rows["infinite"]
    assert (row["step"], row["trigger"]) == (
        20,
        "nonfinite",
    ) and "blocks.1.ffn.w2 is not finite on rank 1" in row["reason"]
    found = checkpoint.find(tmp_path / "infinite")
    assert all(torch.isfinite(found.read(n)).all() for n in found.tensors)
    assert found.read("optim.embed.weight.step").item() == 59
    (row,) = rows["memory"]
    assert (row["step"], row["trigger"], row["args"]) == (20, "oom", {"new_size": 1})
    a, b = losses(tmp_path / "memory"), losses(tmp_path / "whole")
    assert all(a[s] == b[s] for s in range(1, 21)) and abs(a[21] - b[21]) < 1e-6
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4
    row = next(r for r in rows["flip"] if r.get("trigger") == "desync")
    assert row["executed"] and row["args"]["to_step"] <= 45 and "differ" in row["reason"]
    after = [r for r in rows["flip"] if r.get("trigger") == "desync" and r["turn"] > row["turn"]]
    assert not after, "the ranks are one again"
    log = (tmp_path / "slow" / "train.log").read_text()
    assert "rank 1 computes" in log and "rank 0 computes" not in log and "warning" in log
    assert losses(tmp_path / "slow") == b and not (tmp_path / "slow" / "decisions.jsonl").exists()


# ---------------------------------------------------------------- rollback


def glitch(trainer):
    """Weights that somebody has shaken: the loss jumps and does not come back by itself soon."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in trainer.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.6)


def test_a_loss_that_does_not_come_back_is_rolled_back_past_its_data(tiny):
    keys = tiny(**LONG | {"save_interval": 40, "min_lr": 1e-5}) | {
        "orchestrator": {"snapshot_interval": 20}
    }
    kept, went = {}, {}

    def watch_act(trainer):
        act = trainer.orchestrator.act

        def watched():
            if trainer.step % 20 == 0:
                kept.setdefault(trainer.step, tensors(trainer))
            before = trainer.step
            rolled = act()
            if rolled:
                went.update(
                    now=tensors(trainer), step=trainer.step, before=before, cursor=trainer.cursor
                )
            return rolled

        trainer.orchestrator.act = watched

    trainer = run(keys, at={1: watch_act, 150: glitch})
    assert [a for a in actions(trainer) if a[0] != "explosion"] == [
        ("divergence", "wait", True),
        ("divergence", "rollback", True),
    ]
    row = next(d for d in decisions(trainer) if d["action"] == "rollback")
    assert row["level"] == 2 and row["confidence"] >= 0.75 and abs(row["args"]["onset"] - 150) <= 10
    assert (
        went["step"] < 150 and went["before"] <= 190 and equal(went["now"], kept[went["step"]])
    ), "moments too"
    assert went["cursor"] == went["before"] * trainer.run.rows_per_step, (
        "the data goes on where it was"
    )
    assert (
        trainer.step == 240
        and trainer.cursor == (240 + went["before"] - went["step"]) * trainer.run.rows_per_step
    )
    assert trainer.tokens == 240 * trainer.run.rows_per_step * 32, (
        "those dropped came before, and were taken back too"
    )
    aside = sorted(p.name for p in trainer.out.glob("*.rolled_back"))
    assert aside and went["step"] in checkpoint.list_steps(trainer.out), (
        "what was saved beyond is not the newest any more"
    )
    assert all(
        checkpoint.Checkpoint(checkpoint.step_dir(trainer.out, s)).state["clean"]
        for s in (went["step"], 240)
    )
    assert not json.loads((trainer.out / aside[-1] / "state.json").read_text())["clean"], (
        "saved during the alarm"
    )
    healthy = run(tiny("healthy", **LONG | {"min_lr": 1e-5}))
    assert abs(trainer.val_loss - healthy.val_loss) < 0.05
    row = next(d for d in decisions(trainer) if d.get("action") == "rollback")
    due = row["turn"] + trainer.orchestrator.OUTCOME
    outcome = [d for d in decisions(trainer) if d.get("kind") == "outcome" and d["id"] == row["id"]]
    assert [d["verdict"] for d in outcome] == (
        ["helped"] if due <= trainer.orchestrator.turn - 1 else []
    )


def test_after_a_rollback_only_what_is_observed_brings_another_soon(tiny):
    """A loss that leaves its course again waits until 200 turns have passed; a NaN never waits (tests above)."""
    keys = tiny(model={"init_std": 0.02}, **LONG | {"max_steps": 420, "min_lr": 1e-5})
    trainer = run(keys, at={150: glitch, 230: glitch})
    rows = [d for d in decisions(trainer) if d.get("trigger") == "divergence"]
    assert [d["action"] for d in rows] == ["wait", "rollback", "wait", "rollback"] and rows[3][
        "level"
    ] == 3
    first, again = rows[1]["turn"], rows[3]["turn"]
    assert first < 190 and rows[2]["turn"] < 250 and first + 200 <= again <= first + 202
    assert "last rollback gets 200 turns" in rows[2]["reason"]
    trainer.orchestrator.turn, trainer.orchestrator.rollbacks = 1000, [801]
    assert trainer.orchestrator.cool() == 1001


def test_a_young_run_that_loses_all_goes_back(tiny):
    """At turn 40 there is no course to leave yet; but a loss above where it began needs none."""
    trainer = run(tiny(**LONG | {"min_lr": 1e-5}), at={40: glitch})
    row = next(d for d in decisions(trainer) if d.get("action") == "rollback")
    assert (
        60 <= row["turn"] <= 75
        and abs(row["args"]["onset"] - 40) <= 8
        and row["args"]["to_step"] < 40
    )
    healthy = run(tiny("healthy", **LONG | {"min_lr": 1e-5}))
    assert actions(healthy) == [] and abs(trainer.val_loss - healthy.val_loss) < 0.3


def test_what_does_not_come_back_after_a_rollback_stops_the_run(tiny):
    """The cause is still there, a rate far too high: a loss that only stays where it began must not count as healed."""

    def for_ever(trainer):
        trainer.orchestrator.knobs["lr_scale"] = 300.0

    with pytest.raises(UserError, match="E301") as error:
        run(keys := tiny(**LONG | {"max_steps": 400}), at={40: for_ever})
    rows = [
        d
        for d in read_lines(f"{keys['out_dir']}/decisions.jsonl")
        if d.get("trigger") == "divergence"
    ]
    rows = [d for d in rows if d["level"]]
    assert [d["action"] for d in rows] == ["rollback", "rollback", "stop"], rows
    assert 200 <= rows[2]["turn"] - rows[1]["turn"] <= 202 and "is not back" in rows[2]["reason"]
    assert error.value.exit_code == 3


def test_a_spike_that_heals_is_left_alone(tiny):
    def spike(trainer):
        saved = tensors(trainer)
        glitch(trainer)
        trainer.healing = saved

    def heal(trainer):
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.copy_(trainer.healing[f"model.{name}"])

    trainer = run(tiny(**LONG), at={150: spike, 165: heal})
    assert ("divergence", "rollback", True) not in actions(trainer)
    verdicts = [d["verdict"] for d in decisions(trainer) if d.get("kind") == "outcome"]
    assert ("divergence", "wait", True) in actions(trainer) and verdicts == ["healed"]


def test_what_is_never_finite_ends_soon_with_a_good_checkpoint(tiny):
    def poison(trainer):
        trainer.model.blocks[1].ffn.w2.register_forward_hook(
            lambda m, i, o: o * float("nan") if m.training else o
        )

    keys = tiny(**LONG | {"save_interval": 50})
    trainer = Trainer(keys)
    following = trainer.loader.next
    trainer.loader.next = lambda: (
        poison(trainer) if trainer.orchestrator.turn == 100 else None,
        following(),
    )[1]
    with pytest.raises(UserError) as e:
        trainer.fit()
    trainer.loader.close()
    assert e.value.code == "E301" and e.value.exit_code == 3 and "blocks.1.ffn.w2" in e.value.text
    assert trainer.orchestrator.turn <= 120
    levels = [d["level"] for d in decisions(trainer) if d["action"] != "drop"]
    assert levels == [2, 3, 4]
    found = checkpoint.find(trainer.out)
    assert found.state["clean"] and all(torch.isfinite(found.read(n)).all() for n in found.tensors)


def test_without_memory_the_newest_clean_checkpoint_serves(tiny, monkeypatch):
    monkeypatch.setattr(machines, "available_memory", lambda: 1000)
    trainer = run(tiny(**LONG | {"save_interval": 40}), at={150: glitch})
    row = next(d for d in decisions(trainer) if d["action"] == "rollback")
    assert row["args"]["from"].endswith("step_00000120") and row["args"]["to_step"] == 120


def test_recovery_can_be_forbidden(tiny):
    trainer = run(
        tiny(**LONG) | {"orchestrator": {"enable_emergency_recovery": False}}, at={150: glitch}
    )
    row = next(d for d in decisions(trainer) if d["action"] == "rollback")
    assert (
        not row["executed"]
        and "enable_emergency_recovery" in row["blocked_by"]
        and trainer.cursor == 240 * 4
    )


def test_rollback_by_hand_restores_the_moments(tiny):
    kept = {}

    def back(trainer):
        kept["answer"] = trainer.rollback_steps(15)
        kept["step"], kept["now"] = trainer.step, tensors(trainer)
        kept["refused"] = trainer.rollback_steps(10_000)

    keys = tiny(**LONG | {"max_steps": 80, "save_interval": 20})
    trainer = Trainer(keys)
    states, act = {}, trainer.orchestrator.act

    def watched():
        states.setdefault(trainer.step, tensors(trainer))
        if trainer.orchestrator.turn == 60 and not kept:
            back(trainer)
        return act()

    trainer.orchestrator.act = watched
    assert trainer.fit() == 0
    assert kept["answer"]["executed"] and kept["step"] == 40 and equal(kept["now"], states[40])
    assert kept["refused"]["refused"] == "E309" and not kept["refused"]["executed"]


def test_rollback_where_a_tensor_lives_in_pieces(tiny):
    """The seam that sharding uses: the same run, every tensor snapshot in two regions."""
    keys = tiny(**LONG | {"min_lr": 1e-5}) | {"orchestrator": {"snapshot_interval": 20}}
    plain, halves = (
        run(keys | {"out_dir": keys["out_dir"] + p.__name__}, p, {150: glitch})
        for p in (Parallel, Halves)
    )
    assert ("divergence", "rollback", True) in actions(halves) and equal(
        tensors(plain), tensors(halves)
    )


# ---------------------------------------------------------------- experts


def kill_expert(trainer):
    """Nothing goes to expert 1 of the first layer any more, whatever the bias does."""
    router = trainer.moe[0].router
    forward = router.select

    def without(choice):
        choice = forward(choice).clone()
        choice[:, 1] = -1e9
        return choice

    router.select = without


@pytest.mark.parametrize("allowed", [False, True])
def test_experts_that_stay_unbalanced(tiny, allowed):
    """The bias gets twice its rate, then the loss its weight, each for ten checks and back; then a dead one is re-made,
    where that is allowed, and the run is saved before."""
    block = {"check_interval": 5, "enable_architecture_adaptation": allowed}
    keys = tiny(model=MOE, **LONG | {"max_steps": 230, "batch_size": 2}) | {"orchestrator": block}
    trainer = run(keys, at={1: kill_expert})
    rows = [d for d in decisions(trainer) if d.get("trigger") == "experts"]
    seen = [(d["action"], d["executed"], d.get("value")) for d in rows]
    rate, weight = trainer.cfg.model.bias_update_rate, trainer.cfg.model.aux_loss_weight
    assert seen[:4] == [
        ("set bias_update_rate", True, 2 * rate),
        ("set bias_update_rate", True, rate),
        ("set aux_loss_weight", True, 2 * weight),
        ("set aux_loss_weight", True, weight),
    ]
    assert (
        rows[1]["turn"] - rows[0]["turn"] == 10 * 5 + 1
        or rows[1]["turn"] - rows[0]["turn"] == 10 * 5
    )
    verdicts = [d["verdict"] for d in decisions(trainer) if d.get("kind") == "outcome"]
    assert verdicts[:2] == ["did not help"] * 2
    assert seen[4][:2] == ("re-seed a dead expert", allowed)
    assert not allowed or (
        rows[4]["step"] in checkpoint.list_steps(trainer.out) and rows[4]["expert"] == 1
    )
    healthy = run(keys | {"out_dir": keys["out_dir"] + "-healthy"})
    assert decisions(healthy) == []


# ---------------------------------------------------------------- replay


def test_replay_gives_the_same_bytes(tiny):
    """A run with an explosion, a NaN, a rollback and commands, which died once and was stopped once: the attempts that
    survived are repeated, without any of the faults."""

    class Hurt(Parallel):
        def reduce(self, model, stats):
            stats = super().reduce(model, stats)
            times = (
                {4 * 60: 1e4, 4 * 70: math.nan}.get(trainer_of[id(self)].cursor)
                if id(self) in trainer_of
                else None
            )
            for p in model.parameters() if times else ():
                p.grad.mul_(times)
            return stats

    trainer_of = {}

    def go(name, dies_at=None, **block):
        keys = tiny(name, MOE, **LONG | {"save_interval": 50})
        trainer = Trainer(keys | {"orchestrator": {"snapshot_interval": 20} | block}, Hurt)
        following, asked = trainer.loader.next, []
        if not block:
            trainer_of[id(trainer.parallel)] = trainer
        lines = {
            105: '{"method": "emergency_lr_reduction", "args": [2]}',
            200: '{"method": "stop"}',
        }

        def next_rows():
            if block:
                return following()
            now = trainer.cursor // 4
            told = (trainer.out / "control.jsonl").exists() and (
                trainer.out / "control.jsonl"
            ).read_text()
            if now in lines and lines[now] not in (told or "") and not asked:
                asked.append(now)
                with open(trainer.out / "control.jsonl", "a") as f:
                    f.write(lines[now] + "\n")
            if now == 150:
                glitch(trainer)
            if trainer.step == dies_at:
                raise RuntimeError("killed")
            return following()

        trainer.loader.next = next_rows
        if dies_at:
            with pytest.raises(RuntimeError, match="killed"):
                trainer.fit()
            trainer.loader.close()
        else:
            assert trainer.fit() == 0
        return trainer

    go("run", dies_at=120)  # resumes from 100, and is told to cut the rate again
    assert go("run").step < 240
    first = go("run")
    assert first.attempt == 3 and first.step == 240
    rows = [d for d in decisions(first) if d.get("executed") and d.get("level")]
    done = [d["action"] for d in rows]
    assert done[:2] == ["drop", "drop"] and [d for d in done if d != "drop"] == [
        *["emergency_lr_reduction"] * 2,
        "rollback",
    ]
    assert [d["kind"] for d in decisions(first) if d.get("kind") == "start"] == ["start"] * 2
    again = go("again", mode="replay", replay=str(first.out / "decisions.jsonl"))
    assert again.step == 240 and equal(tensors(first), tensors(again))
    assert again.orchestrator.knobs["lr_scale"] == 0.5
    keys = tiny("other", MOE, **LONG)
    for changes, text in (({"seed": 7}, "another run"), ({"learning_rate": 1e-4}, "another run")):
        with pytest.raises(UserError, match=f"E310.*{text}"):
            block = {"mode": "replay", "replay": str(first.out / "decisions.jsonl")}
            Trainer(keys | changes | {"orchestrator": block})
    for name in ("metrics.jsonl", "train.log"):
        with pytest.raises(UserError, match="E310"):
            Trainer(keys | {"orchestrator": {"mode": "replay", "replay": str(first.out / name)}})


# what was decided long ago


def test_the_cut_of_level_3_ends_and_the_budget_too(tiny):
    trainer = Trainer(tiny(max_steps=3))
    o = trainer.orchestrator
    o.turn, o.cut = 1000, [1000, o.CUT]
    first = o.lr_factor()
    o.turn += o.CUT_TURNS // 2
    middle = o.lr_factor()
    o.turn += o.CUT_TURNS // 2
    assert (first, o.lr_factor()) == (pytest.approx(o.CUT), 1.0) and middle == pytest.approx(
        (1 + o.CUT) / 2
    )
    o.keep_snapshot(first=True)
    for past, level in (
        ([], 2),
        ([100], 2),
        ([o.turn - 999], 3),
        ([o.turn - 999, o.turn - 500], 4),
    ):
        o.rollbacks, o.went_back, n = list(past), 0, len(decisions(trainer))
        if level < 4:
            o.recover("divergence", o.turn + 1, 0.9, "evalue", "for the test")
        else:
            with pytest.raises(UserError, match="E301"):
                o.recover("divergence", o.turn + 1, 0.9, "evalue", "for the test")
        assert decisions(trainer)[n]["level"] == level
    o.turn = 50_000  # three in ten thousand turns, or ten in all
    for past in ([41_000, 44_000, 47_000], list(range(0, 20_000, 2000))):
        o.rollbacks, o.went_back = past, 0
        with pytest.raises(UserError, match="E301.*did not help"):
            o.recover("divergence", o.turn + 1, 0.9, "evalue", "for the test")
    trainer.close()


def test_rollbacks_by_hand_are_no_failed_attempts(tiny):
    trainer = run(tiny(max_steps=30, save_interval=5), at={20: lambda t: t.rollback_steps(8)})
    assert [d["action"] for d in decisions(trainer)] == [
        "rollback_steps"
    ] and trainer.orchestrator.rollbacks == []


def test_explosions_without_end_are_no_accident(tiny):
    """Every fifth step explodes and is dropped: more than 2 % of a thousand steps."""

    class Often(Faulty):
        at = range(40, 240, 5)

    trainer = Trainer(tiny(**LONG), Often)
    trainer.parallel.trainer = trainer
    assert trainer.fit() == 0
    rolled = [d["turn"] for d in decisions(trainer) if d.get("action") == "rollback"]
    assert rolled and rolled[0] == 40 + 5 * 20 + 1


def test_the_gap_of_mod_is_watched(tiny):
    trainer = Trainer(tiny(model={"mod_capacity": 0.5}, max_steps=3))
    for gap in (0.03, 0.01, 0.03, 0.04, 0.05):
        trainer.orchestrator.evaluated({"mod_gap": gap, "mod_agreement": 0.9})
    rows = decisions(trainer)
    assert [d["action"] for d in rows] == ["advise"] and rows[0]["stat"] == {"gap": 0.04}
    trainer.close()


def test_a_fault_in_backward_alone_is_named(tiny):
    def hurt(trainer):
        weight = dict(trainer.model.named_parameters())["blocks.1.ffn.w2.weight"]
        weight.register_hook(lambda g: g * math.nan if trainer.orchestrator.turn in (6, 7) else g)

    trainer = run(tiny(max_steps=12), at={2: hurt})
    rows = [d for d in decisions(trainer) if "action" in d]
    assert (
        "gradient of blocks.1.ffn.w2.weight" in rows[0]["reason"]
        and rows[0]["stat"]["grad_norm"] is None
    )


# ---------------------------------------------------------------- out of memory


def short_of_memory(trainer, limit, rank=0, calls=None, at=20):
    """From step `at` on, more than `limit` rows at once do not fit: the second micro-step fails, half accumulated."""
    calls = [0] if calls is None else calls

    def hook(module, inputs):
        rows = inputs[0].shape[0]
        if (
            module.training
            and trainer.parallel.rank == rank
            and trainer.step >= at
            and rows > limit
        ):
            calls[0] += 1
            if calls[0] % 2 == 0 or trainer.run.accumulation == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")

    trainer.model.blocks[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_out_of_memory_halves_the_microbatch_and_loses_nothing(tiny, kind):
    keys = tiny(
        "short",
        KINDS[kind] | {"dropout": 0.0},
        max_steps=40,
        batch_size=8,
        gradient_accumulation_steps=2,
    )
    if (
        kind == "hybrid"
    ):  # static routing: a token on the edge must not fall to the other side for a rounding
        keys["model"]["mod_routing"] = "static"
    trainer = Trainer(keys)
    short_of_memory(trainer, 2)
    assert trainer.fit() == 0
    whole = run(keys | {"out_dir": keys["out_dir"] + "-whole"})
    assert (trainer.run.micro_batch, trainer.run.accumulation) == (2, 8)
    assert [d["args"]["new_size"] for d in decisions(trainer)] == [4, 2]
    assert (trainer.step, trainer.cursor, trainer.tokens) == (
        whole.step,
        whole.cursor,
        whole.tokens,
    )
    a, b = losses(trainer.out), losses(whole.out)
    assert a.keys() == b.keys() and len(a) == 40
    assert all(a[s] == b[s] for s in range(1, 21)), "until then bit for bit"
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 and abs(a[21] - b[21]) < 1e-6
    again = Trainer(keys | {"max_steps": 44})
    assert again.run.micro_batch == 2, "a resumed run remembers"
    again.loader.close()


def test_out_of_memory_at_one_row_says_what_to_do(tiny):
    trainer = Trainer(tiny(max_steps=30, batch_size=2))
    short_of_memory(trainer, 0)
    with pytest.raises(UserError) as e:
        trainer.fit()
    trainer.loader.close()
    assert e.value.code == "E200" and "activation_checkpointing" in e.value.text
    assert checkpoint.find(trainer.out).step == 20, "and nothing is lost"


def test_out_of_memory_elsewhere_restarts_with_a_hint(tiny, monkeypatch):
    """In the optimizer half of the weights may be new: the process ends with 75, and the next goes on smaller."""
    keys = tiny(max_steps=20, batch_size=4, save_interval=5)
    path = write_yaml(checkpoint.Path(keys["out_dir"] + ".yaml"), keys)
    step = torch.optim.AdamW.step
    calls = []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 13:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(UserError) as e:
        train.main([str(path)])
    assert (
        e.value.exit_code == 75
        and json.loads((checkpoint.Path(keys["out_dir"]) / "status.json").read_text())["state"]
        == "restart"
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([str(path)]) == 0
    found = checkpoint.find(keys["out_dir"])
    assert found.step == 20 and found.state["config"]["batch_size"] == 2
    assert found.state["cursor"] == 20 * 8, "the same rows a step"


def test_batch_size_auto_is_what_fits(tiny, monkeypatch):
    keys = tiny(
        batch_size="auto", gradient_accumulation_steps=..., batch_tokens=16 * 32, max_steps=1
    )
    plenty = Trainer(keys)
    assert (plenty.run.micro_batch, plenty.run.accumulation) == (16, 1)
    plenty.loader.close()
    cfg, n = plenty.cfg.model, plenty.counted.n_params()["total"]
    need = {r: train.plan.memory(cfg, n, r, "fp32")["total"] for r in (4, 8)}
    monkeypatch.setattr(machines, "total_memory", lambda device: (need[4] + need[8]) / 2 / 0.92)
    small = Trainer(keys | {"out_dir": keys["out_dir"] + "-small"})
    assert (small.run.micro_batch, small.run.accumulation) == (4, 4)
    assert equal(tensors(small), tensors(plenty)), "finding out changes nothing"
    small.loader.close()
    monkeypatch.setattr(machines, "total_memory", lambda device: 1000)
    with pytest.raises(UserError) as e:
        Trainer(keys | {"out_dir": keys["out_dir"] + "-none"})
    assert e.value.code == "E200"
    with pytest.raises(UserError) as e:
        Trainer(tiny("x", batch_size="auto"))
    assert e.value.code == "E002" and "batch_tokens" in e.value.text


def test_the_probe_on_a_gpu_leaves_no_trace(tiny, monkeypatch):
    """Its arithmetic, with a GPU's numbers made up: 1000 bytes and 100 a row, of 2000."""
    keys = tiny(batch_size=4, gradient_accumulation_steps=4, max_steps=5)
    left, probed = Trainer(keys), Trainer(keys | {"out_dir": keys["out_dir"] + "-probed"})

    def peak(model, rows, device):
        ids = torch.zeros(rows, 32, dtype=torch.long)
        model(ids, targets=ids)[0].backward()
        model.zero_grad(set_to_none=True)
        return 1000 + 100 * rows

    monkeypatch.setattr(train, "peak_bytes", peak)
    monkeypatch.setattr(
        machines, "total_memory", lambda device: 2200
    )  # 0.92 of it are 1024 above the rest: 9 rows
    probed.probe()
    assert (probed.run.micro_batch, probed.run.accumulation) == (8, 2)
    assert equal(tensors(left), tensors(probed))
    probed.set_micro_batch(4)
    assert left.fit() == 0 and probed.fit() == 0 and equal(tensors(left), tensors(probed))


# ---------------------------------------------------------------- by hand


def test_commands_in_control_jsonl(tiny):
    """Valid ones take effect at the next step and are written down; what cannot be is refused, and the run goes on."""
    lines = [
        '{"method": "adjust_weight_decay", "args": [0.03]}',
        "not json",
        '{"method": "format_disk"}',
        '{"method": "adjust_weight_decay", "args": {"valeu": 1}}',
        '{"method": "adjust_weight_decay", "args": [-1]}',
        '["adjust_weight_decay"]',
        '{"method": "save"}',
        '{"method": "get_current_metrics"}',
        '{"method": "add_expert", "args": {"layer_idx": 0}}',
    ]

    def write(trainer):
        with open(trainer.out / "control.jsonl", "a") as f:
            f.write("\n".join(lines) + '\n{"method": "half a line')

    trainer = run(tiny(max_steps=20, save_interval=0), at={5: write})
    rows = decisions(trainer)
    assert [(r["action"], r.get("refused")) for r in rows] == [
        ("adjust_weight_decay", None),
        ("?", "E309"),
        ("format_disk", "E309"),
        ("adjust_weight_decay", "E309"),
        ("adjust_weight_decay", "E309"),
        ("?", "E309"),
        ("save", None),
        ("get_current_metrics", None),
        ("add_expert", "E308"),
    ]
    assert {r["trigger"] for r in rows} == {"user"} and {r["turn"] for r in rows} == {6}
    assert (
        rows[7]["answer"]["step"] == 5 and trainer.optimizer.param_groups[0]["weight_decay"] == 0.03
    )
    assert 5 in checkpoint.list_steps(trainer.out), "save: before what stands after it"
    again = Trainer(tiny(max_steps=22, save_interval=0))
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.03, "and a resumed run remembers"
    done = [d for d in decisions(again) if d.get("kind") != "start"] if again.fit() == 0 else None
    assert len(done) == len(rows), "no command is carried out twice"


def test_no_argument_ends_a_run(tiny):
    """Whatever is written there: carried out or refused, by a run that goes on, and by one that resumes from it."""
    odd = (
        [None],
        ["x"],
        [[1], 2],
        [5],
        [0, "x"],
        [[0, 4, 5], [1]],
        [3, [1]],
        [{}],
        {"x": 1},
        [True],
        [1e999],
    )
    lines = [
        json.dumps({"method": m, "args": a}) for m in control.METHODS if m != "stop" for a in odd
    ]

    def write(trainer):
        (trainer.out / "control.jsonl").write_text("\n".join(lines) + "\n")

    trainer = run(tiny(model=MOE, max_steps=12, save_interval=0), at={5: write})
    rows = [r for r in decisions(trainer) if r["trigger"] == "user"]
    assert len(rows) == len(lines) and trainer.step == 12
    assert sum("refused" in r for r in rows) > 150, "most of it is nonsense"


def test_control_jsonl_written_anew_and_without_a_last_newline(tiny):
    line = '{"method": "adjust_weight_decay", "args": [%g]}'

    def write(text):
        return lambda trainer: (trainer.out / "control.jsonl").write_text(text)

    asked = []
    trainer = Trainer(tiny(max_steps=20, save_interval=0))
    take = trainer.orchestrator.take_commands
    trainer.orchestrator.take_commands = lambda: (asked.append(trainer.step), take())
    at = {
        5: write(f"{line % 0.03}\n{line % 0.02}\n"),
        9: write(f"{line % 0.01}\n"),
        12: write((line % 0.5)[:-1]),
    }
    act = trainer.orchestrator.act

    def first_that():
        at.get(trainer.orchestrator.turn + 1, lambda t: None)(trainer)
        return act()

    trainer.orchestrator.act = first_that
    assert trainer.fit() == 0
    assert [r["args"]["value"] for r in decisions(trainer)] == [0.03, 0.02, 0.01], (
        "the last is not a whole line"
    )
    assert len(asked) == 3, "and asks nobody anything until it grows"
    assert [r["before"] for r in decisions(trainer)] == [
        {"weight_decay": x} for x in (0.1, 0.03, 0.02)
    ]


def weights_after(tiny, name, do, model=None, **changes):
    """(answer, weights after three more steps, weights of the same run left alone)."""
    found = {}
    both = []
    for which in ("left", name):
        keys = tiny(
            f"{name}-{which}",
            model,
            max_steps=9,
            save_interval=0,
            warmup_steps=0,
            lr_schedule="constant",
            **changes,
        )
        trainer = run(keys, at={6: lambda t: found.update(answer=do(t))} if which == name else None)
        both.append(trainer)
    return found["answer"], both[1], both[0]


def test_methods_on_the_optimizer_change_the_next_steps(tiny):
    answer, t, left = weights_after(tiny, "lr", lambda t: t.emergency_lr_reduction(10.0))
    assert answer["executed"] and not equal(tensors(t), tensors(left))
    rows = {r["step"]: r["lr"] for r in read_lines(t.out / "metrics.jsonl") if "lr" in r}
    assert rows[7] == pytest.approx(rows[5] / 10) and rows[9] == pytest.approx(rows[5] / 10)
    answer, t, left = weights_after(tiny, "wd", lambda t: t.adjust_weight_decay(0.5))
    assert answer["executed"] and not equal(tensors(t), tensors(left))
    assert [g["weight_decay"] for g in t.optimizer.param_groups] == [0.5, 0.0]
    answer, t, left = weights_after(
        tiny, "lr2", lambda t: t._update_optimizer_param_groups("lr", 1e-4)
    )
    rows = {r["step"]: r["lr"] for r in read_lines(t.out / "metrics.jsonl") if "lr" in r}
    assert rows[7] == pytest.approx(1e-4)
    for param, value in (("beta1", 0.5), ("beta2", 0.5), ("eps", 1e-3), ("weight_decay", 0.7)):
        answer, t, left = weights_after(
            tiny, param, lambda t, p=param, v=value: t._update_optimizer_param_groups(p, v)
        )
        assert answer["executed"] and not equal(tensors(t), tensors(left)), param
    assert t.emergency_lr_reduction(0.5)["refused"] == "E309", "it would raise it"
    refused = t._update_optimizer_param_groups("momentum", 1.0)
    assert refused["refused"] and "beta1" in refused["reason"]
    assert (
        t.adjust_weight_decay("much")["refused"]
        == t.emergency_lr_reduction(-1)["refused"]
        == "E309"
    )


def test_methods_on_routing_change_the_next_steps(tiny):
    moe, mod = KINDS["moe"], {"mod_capacity": 0.5}
    for name, value in (
        ("adjust_capacity_factor", 0.5),
        ("adjust_routing_temperature", 2.0),
        ("enable_expert_dropout", 0.4),
    ):
        answer, t, left = weights_after(
            tiny, name, lambda t, n=name, v=value: getattr(t, n)(v), moe
        )
        assert answer["executed"] and not equal(tensors(t), tensors(left)), name
        if name == "adjust_capacity_factor":
            assert (
                t.get_expert_statistics()["tokens_dropped"]
                > 0
                == left.get_expert_statistics()["tokens_dropped"]
            )
        if name == "enable_expert_dropout":
            assert (
                any(m.router.dropped_out.any() for m in t.moe.values())
                and left.moe[0].router.dropped_out is None
            )
            assert (
                t.enable_expert_dropout(0.0)["executed"] and t.moe[0].router.dropped_out is None
            ), "all may be chosen again"
    answer, t, left = weights_after(tiny, "mod", lambda t: t.adjust_mod_capacity(0.25), mod)
    assert (
        t.get_mod_statistics()["capacity_factor"] == 0.25
        and left.get_mod_statistics()["capacity_factor"] == 0.5
    )
    state = checkpoint.find(t.out).state
    assert (
        state["config"]["model"]["mod_capacity"] == 0.25
        and state["model_written"]["mod_capacity"] == 0.5
    )
    again = Trainer(t.written | {"max_steps": 10})
    assert again.fit() == 0 and again.get_mod_statistics()["capacity_factor"] == 0.25
    answer, t, left = weights_after(
        tiny, "new", lambda t: t._initialize_new_expert([0, 4], [1, 2]), moe
    )
    assert (
        answer["executed"] and answer["parent"] in (1, 2) and t.model.blocks[0].ffn.router.alive[4]
    )
    dense = run(tiny("dense", max_steps=2))
    for call in (
        "adjust_capacity_factor",
        "adjust_routing_temperature",
        "enable_expert_dropout",
        "adjust_mod_capacity",
    ):
        assert getattr(dense, call)(0.5)["refused"] == "E308", call


def test_batch_and_reader_by_hand_change_no_row(tiny):
    found = {}

    def change(trainer):
        found["refused"] = trainer.adjust_batch_size(3)
        found["done"] = trainer.adjust_batch_size(1)

    keys = tiny("left", max_steps=12)
    rows = {}
    for name, at in (
        ("left", None),
        ("smaller", {6: change}),
        ("reader", {6: lambda t: t._recreate_dataloader(t.sources)}),
    ):
        trainer = run(
            keys | {"out_dir": keys["out_dir"] + name, "model": keys["model"] | {"dropout": 0.0}},
            at=at,
        )
        rows[name] = losses(trainer.out)
        assert trainer.cursor == 12 * 4
    assert (
        rows["reader"] == rows["left"]
        and found["refused"]["refused"] == "E309"
        and found["done"]["executed"]
    )
    assert max(abs(rows["smaller"][s] - rows["left"][s]) for s in rows["left"]) < 1e-5


def test_current_metrics_are_plain_numbers(tiny):
    trainer = run(tiny(KINDS["moe"] and "run", KINDS["moe"], max_steps=5))
    found = trainer.get_current_metrics()
    assert list(found) == [
        "loss",
        "learning_rate",
        "grad_norm",
        "throughput",
        "memory_usage",
        "epoch",
        "step",
    ]
    assert all(type(v) in (int, float) and math.isfinite(v) for v in found.values())
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r][-1]
    assert (
        found["step"] == 5
        and found["loss"] == row["loss"]
        and found["grad_norm"] == row["grad_norm"] > 0
    )
    assert (
        found["throughput"] == pytest.approx(row["tokens_per_second"])
        and 0 < found["memory_usage"] < 1
    )
    assert trainer._extract_moe_routing_stats() == trainer.get_expert_statistics()


# ---------------------------------------------------------------- length, health


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
    data = sum(s.windows for s in trainer.sources.values()) * 32
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
    whole = run(keys | {"out_dir": keys["out_dir"] + "-whole"})
    run(keys, at={131: lambda t: t.request_stop()})
    run(keys)
    rows = [
        {r["step"]: r for r in read_lines(f"{out}/metrics.jsonl") if "forecast/final" in r}
        for out in (keys["out_dir"], whole.out)
    ]
    assert len(rows[0]) >= 8 and rows[0].keys() == rows[1].keys()
    assert all(rows[0][s]["forecast/final"] == rows[1][s]["forecast/final"] for s in rows[0])
    last = rows[0][max(rows[0])]
    assert last["forecast/final_low"] < last["forecast/final"] < last["forecast/final_high"]
    assert last["forecast/slope_low"] < last["forecast/slope"] < last["forecast/slope_high"]
    assert "nats per doubling of compute" in (whole.out / "train.log").read_text()


@pytest.mark.parametrize("act", [False, True])
def test_a_run_is_cut_short_only_where_that_is_justified_and_allowed(tiny, monkeypatch, act):
    """The reasons are plan.py's and tested there; here: what is done about them, and that it is done once."""
    monkeypatch.setattr(forecast, "justified_stop", lambda *args: "start the decay: for the test")
    keys = tiny(**LONG | {"lr_schedule": "wsd", "enable_early_stopping": act, "decay_frac": 0.25})
    keys["orchestrator"] = {"check_interval": 60}
    trainer = run(keys)
    assert actions(trainer) == [("length", "start the decay", act)]
    assert trainer.step == (80 if act else 240)
    rows = {r["step"]: r["lr"] for r in read_lines(trainer.out / "metrics.jsonl") if "lr" in r}
    assert rows[60] == 3e-3 and (rows[80] < 6e-4 if act else rows[80] == 3e-3)


def test_suggested_yaml_runs_as_it_is(tiny):
    trainer = run(tiny(max_steps=8))
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
    trainer = run(keys, at={1: slow})
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
        trainer = run(keys | {"out_dir": f"{keys['out_dir']}{critical}"}, at=at)
        health = [r["health"] for r in read_lines(trainer.out / "metrics.jsonl") if "health" in r][
            -1
        ]
        said = "above where this run began" in (trainer.out / "train.log").read_text()
        assert (health == "critical") == said == critical


@pytest.mark.parametrize(
    "block, key",
    [
        ({"mode": "on"}, "mode"),
        ({"intervention_threshold": 0.2}, "intervention_threshold"),
        ({"intervention_threshold": 1.5}, "intervention_threshold"),
        ({"check_interval": 0}, "check_interval"),
        ({"mode": "replay"}, "replay"),
        ({"replay": "x.jsonl"}, "replay"),
        ({"treshold": 1}, "treshold"),
    ],
)
def test_bad_orchestrator_keys_are_refused(tiny, block, key):
    with pytest.raises(UserError) as e:
        Trainer(tiny() | {"orchestrator": block})
    assert e.value.code == "E002" and key in e.value.text


def test_off_is_a_word_in_yaml(tiny, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(tiny())[:-1] + ', "orchestrator": {"mode": false}}')
    assert read_config([str(path)])[0].orchestrator.mode == "off"
    assert (
        read_config([str(path), "--orchestrator.mode", "shadow"])[0].orchestrator.mode == "shadow"
    )
    assert sys.modules["lumen.orchestrate"] is orchestrator


def test_a_torch_that_no_longer_counts_its_graphs_ends_no_run(monkeypatch):
    import torch._dynamo.utils as private

    assert control.compiled_graphs() >= 0
    monkeypatch.delattr(private, "counters", raising=False)
    assert control.compiled_graphs() == 0
