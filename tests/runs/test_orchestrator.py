"""The orchestrator on runs: what fails is dropped or undone, and what heals is left alone."""

import json
import math

import pytest
import torch
from conftest import losses, read_lines
from forks import run_forked
from rig import (
    KINDS,
    LONG,
    MOE,
    Halves,
    actions,
    at_each_step,
    at_iteration,
    decisions,
    equal,
    fake_fp16,
    faulty,
    finish,
    glitch,
    tensors,
)

from lumen import checkpoint
from lumen import machine as machines
from lumen.config import RANGES
from lumen.decisions import JUDGE_AFTER
from lumen.detectors import Alarm
from lumen.errors import UserError
from train import Parallel, Trainer

# ---------------------------------------------------------------- the guard


@pytest.fixture(scope="module")
def skipped():
    """skipped(keys) -> the tensors and tokens of a run that passes over turn 50's step, trained
    once an optimizer."""
    found = {}

    def run(keys):
        name = keys["optimizer"]
        if name not in found:
            out = keys["out_dir"] + "-skipped"
            trainer = Trainer(keys | {"out_dir": out, "orchestrator": {"mode": "off"}})
            step = trainer.optimizer.step
            turn = trainer.orchestrator
            trainer.optimizer.step = lambda: step() if turn.iteration != 50 else None
            assert trainer.fit() == 0
            found[name] = tensors(trainer), trainer.tokens
        return found[name]

    return run


@pytest.mark.parametrize("name", RANGES["optimizer"].split(" | "))
@pytest.mark.parametrize("times", [1e4, float("nan"), 1e30])
def test_a_bad_gradient_is_as_if_its_batch_had_not_been(tiny, skipped, name, times):
    """Every optimizer must pass: weights, moments and counts equal a run whose step was never made
    at that turn."""
    keys = tiny("guarded", optimizer=name, **LONG | {"max_steps": 80})
    guarded = finish(keys, faulty([50], times))
    trigger = "explosion" if times == 1e4 else "nonfinite"
    assert actions(guarded) == [(trigger, "drop", True)] and guarded.orchestrator.dropped == 1

    expected, tokens = skipped(keys)
    assert equal(tensors(guarded), expected)
    assert guarded.tokens == tokens - guarded.run.rows_per_step * 32, (
        "the reference believed it had trained on it"
    )


def test_three_explosions_in_a_row_are_dropped_the_fourth_is_let_through(tiny):
    spoils = faulty([50, 51, 52, 53, 54, 60], 100.0)
    trainer = finish(tiny(**LONG | {"max_steps": 90}), spoils)
    seen = [(d["turn"], d["action"]) for d in decisions(trainer) if d["trigger"] == "explosion"]
    assert seen == [(50, "drop"), (51, "drop"), (52, "drop"), (53, "accept"), (60, "drop")]


def test_shadow_and_off_leave_an_explosion_alone(tiny):
    keys = {m: tiny(m, **LONG | {"max_steps": 80}) for m in ("shadow", "off")}
    shadow, off = (
        finish(k | {"orchestrator": {"mode": mode}}, faulty([50], 1e4)) for mode, k in keys.items()
    )
    assert equal(tensors(shadow), tensors(off)) and decisions(off) == []
    assert actions(shadow) == [("explosion", "drop", False)]


def test_an_explosion_is_no_overflow_to_the_scaler_of_fp16(tiny, monkeypatch):
    """fp16's arithmetic on the CPU: an explosion is dropped and the scale stays; an overflow halves
    it, and is none."""
    monkeypatch.setattr(machines, "detect", fake_fp16(machines.detect))
    keys = tiny(precision="mixed_fp16", **LONG | {"max_steps": 80})
    for times, trigger in ((300.0, "explosion"), (float("inf"), "nonfinite")):
        trainer = Trainer(keys | {"out_dir": keys["out_dir"] + trigger}, faulty([60], times))
        trainer.loss_scale.value.fill_(1024.0)
        assert trainer.fit() == 0
        assert (trigger, "drop", True) in actions(trainer) and trainer.orchestrator.dropped == 1
        assert trainer.loss_scale.value.item() == (1024.0 if trigger == "explosion" else 512.0)


COMMANDS = [
    ["add_expert", [0]],
    ["prune_expert", [0, 1, True]],
    ["_initialize_new_expert", [[0, 4], [2, 3]]],
    ["adjust_capacity_factor", [1.0]],
    ["adjust_routing_temperature", [1.5]],
    ["enable_expert_dropout", [0.2]],
    ["get_expert_statistics", []],
    ["adjust_mod_capacity", [0.25]],
    ["get_mod_statistics", []],
    ["adjust_batch_size", [1]],
    ["_recreate_dataloader", [None]],
    ["get_current_metrics", []],
    ["_extract_moe_routing_stats", []],
    ["_calculate_throughput", []],
    ["emergency_lr_reduction", [2.0]],
    ["adjust_weight_decay", [0.05]],
    ["_update_optimizer_param_groups", ["eps", 1e-6]],
    ["rollback_steps", [1]],
]


def test_what_befalls_one_rank_of_two(tiny, tmp_path):
    """A gradient that is not finite in one micro-step, memory that runs out half-way, a weight that
    changed: the other rank follows, and nothing is lost."""
    base = tiny(
        "whole", {"dropout": 0.0}, max_steps=60, batch_size=2, save_interval=0, warmup_steps=5
    )
    base["orchestrator"] = {"check_interval": 10, "snapshot_interval": 10}
    faults = ("infinite", "memory", "flip", "slow")
    jobs = [{"config": base}]
    jobs += [{"config": base | {"out_dir": str(tmp_path / f)}, "fault": f} for f in faults]
    hybrid = tiny("commands", KINDS["hybrid"], max_steps=14, batch_size=2)
    hybrid["orchestrator"] = {"check_interval": 1}
    jobs.append({"config": hybrid, "commands": COMMANDS})
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=2, timeout=300)
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
    rows = {name: read_lines(tmp_path / name / "decisions.jsonl") for name in faults[:3]}
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


def test_a_loss_that_does_not_come_back_is_rolled_back_past_its_data(tiny, reference):
    keys = tiny(**LONG | {"save_interval": 40, "min_lr": 1e-5}) | {
        "orchestrator": {"snapshot_interval": 20}
    }
    kept, went, last = {}, {}, [-1]

    def watch(trainer):
        if trainer.step < last[-1]:
            went.update(now=tensors(trainer), step=trainer.step, cursor=trainer.cursor)
            went["before"] = last[-1] + 1
        elif trainer.step % 20 == 0:
            kept.setdefault(trainer.step, tensors(trainer))
        last.append(trainer.step)

    trainer = at_each_step(at_iteration(Trainer(keys), {150: glitch}), watch)
    assert trainer.fit() == 0
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
    healthy = reference(tiny("healthy", **LONG | {"min_lr": 1e-5}))
    assert abs(trainer.progress.val_loss - healthy.progress.val_loss) < 0.05
    row = next(d for d in decisions(trainer) if d.get("action") == "rollback")
    due = row["turn"] + JUDGE_AFTER
    outcome = [d for d in decisions(trainer) if d.get("kind") == "outcome" and d["id"] == row["id"]]
    assert [d["verdict"] for d in outcome] == (
        ["helped"] if due <= trainer.orchestrator.iteration - 1 else []
    )


def test_after_a_rollback_only_what_is_observed_brings_another_soon(tiny):
    """A loss that leaves its course again waits until 200 turns have passed; a NaN never waits
    (tests above)."""
    keys = tiny(model={"init_std": 0.02}, **LONG | {"max_steps": 420, "min_lr": 1e-5})
    trainer = finish(keys, iterations={150: glitch, 230: glitch})
    rows = [d for d in decisions(trainer) if d.get("trigger") == "divergence"]
    assert [d["action"] for d in rows] == ["wait", "rollback", "wait", "rollback"] and rows[3][
        "level"
    ] == 3
    first, again = rows[1]["turn"], rows[3]["turn"]
    assert first < 190 and rows[2]["turn"] < 250 and first + 200 <= again <= first + 202
    assert "last rollback gets 200 iterations" in rows[2]["reason"]
    assert trainer.orchestrator.escalation.cooldown_ends == again + 200


def test_a_young_run_that_loses_all_goes_back(tiny, reference):
    """At turn 40 there is no course to leave yet; but a loss above where it began needs none."""
    trainer = finish(tiny(**LONG | {"min_lr": 1e-5}), iterations={40: glitch})
    row = next(d for d in decisions(trainer) if d.get("action") == "rollback")
    assert (
        60 <= row["turn"] <= 75
        and abs(row["args"]["onset"] - 40) <= 8
        and row["args"]["to_step"] < 40
    )
    healthy = reference(tiny("healthy", **LONG | {"min_lr": 1e-5}))
    assert (
        actions(healthy) == [] and abs(trainer.progress.val_loss - healthy.progress.val_loss) < 0.3
    )


def test_what_does_not_come_back_after_a_rollback_stops_the_run(tiny):
    """The cause is still there, a rate far too high: a loss that only stays where it began must not
    count as healed."""

    def for_ever(trainer):
        trainer.control.knobs["lr_scale"] = 300.0

    with pytest.raises(UserError, match="E301") as error:
        finish(keys := tiny(**LONG | {"max_steps": 400}), iterations={40: for_ever})
    rows = [
        d
        for d in read_lines(f"{keys['out_dir']}/decisions.jsonl")
        if d.get("trigger") == "divergence"
    ]
    rows = [d for d in rows if d["level"]]
    # chaos at that rate: whether a second rollback comes before depends on the CPU's last digits
    assert [d["action"] for d in rows] in (["rollback"] * k + ["stop"] for k in (1, 2)), rows
    assert 200 <= rows[-1]["turn"] - rows[-2]["turn"] <= 202 and "is not back" in rows[-1]["reason"]
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

    trainer = finish(tiny(**LONG), iterations={150: spike, 165: heal})
    assert ("divergence", "rollback", True) not in actions(trainer)
    verdicts = [d["verdict"] for d in decisions(trainer) if d.get("kind") == "outcome"]
    assert ("divergence", "wait", True) in actions(trainer) and verdicts == ["healed"]


def test_what_is_never_finite_ends_soon_with_a_good_checkpoint(tiny):
    def poison(trainer):
        trainer.model.blocks[1].ffn.w2.register_forward_hook(
            lambda m, i, o: o * float("nan") if m.training else o
        )

    keys = tiny(**LONG | {"save_interval": 50})
    trainer = at_iteration(Trainer(keys), {100: poison})
    with pytest.raises(UserError) as e:
        trainer.fit()
    trainer.loader.close()
    assert e.value.code == "E301" and e.value.exit_code == 3 and "blocks.1.ffn.w2" in e.value.text
    assert trainer.orchestrator.iteration <= 120
    levels = [d["level"] for d in decisions(trainer) if d["action"] != "drop"]
    assert levels == [2, 3, 4]
    found = checkpoint.find(trainer.out)
    assert found.state["clean"] and all(torch.isfinite(found.read(n)).all() for n in found.tensors)


def test_without_memory_the_newest_clean_checkpoint_serves(tiny, monkeypatch):
    monkeypatch.setattr(machines, "available_memory", lambda: 1000)
    trainer = finish(tiny(**LONG | {"save_interval": 40}), iterations={150: glitch})
    row = next(d for d in decisions(trainer) if d["action"] == "rollback")
    assert row["args"]["from"].endswith("step_00000120") and row["args"]["to_step"] == 120


def test_recovery_can_be_forbidden(tiny):
    trainer = finish(
        tiny(**LONG) | {"orchestrator": {"enable_emergency_recovery": False}},
        iterations={150: glitch},
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
    states = {}
    trainer = at_iteration(Trainer(keys), {61: back})
    at_each_step(trainer, lambda t: states.setdefault(t.step, tensors(t)))
    assert trainer.fit() == 0
    assert kept["answer"]["executed"] and kept["step"] == 40 and equal(kept["now"], states[40])
    assert kept["refused"]["refused"] == "E309" and not kept["refused"]["executed"]


def test_rollback_where_a_tensor_lives_in_pieces(tiny):
    """The seam that sharding uses: the same run, every tensor snapshot in two regions."""
    keys = tiny(**LONG | {"min_lr": 1e-5}) | {"orchestrator": {"snapshot_interval": 20}}
    plain, halves = (
        finish(keys | {"out_dir": keys["out_dir"] + p.__name__}, p, {150: glitch})
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
    """The bias gets twice its rate, then the loss its weight, each for ten checks and back; then a
    dead one is re-made, where that is allowed, and the run is saved before."""
    block = {"check_interval": 5, "enable_architecture_adaptation": allowed}
    keys = tiny(model=MOE, **LONG | {"max_steps": 230, "batch_size": 2}) | {"orchestrator": block}
    trainer = finish(keys, iterations={1: kill_expert})
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
    if allowed:  # all that could be done, and nothing is
        healthy = finish(keys | {"out_dir": keys["out_dir"] + "-healthy"})
        assert decisions(healthy) == []


# ---------------------------------------------------------------- escalation


def test_the_level_of_an_alarm_follows_from_the_rollbacks_before_it(tiny):
    trainer = Trainer(tiny(max_steps=3))
    o = trainer.orchestrator
    o.iteration = 1  # the first snapshot is taken in the first iteration
    o.keep_snapshot()

    def alarm(now, past):
        o.iteration, o.escalation.rollbacks, o.went_back = now, list(past), 0
        before = len(decisions(trainer))
        try:
            o.escalate(Alarm("divergence", "rollback", 2, "for the test", now + 1, 0.9, "evalue"))
        finally:
            row = decisions(trainer)[before]
        return row["level"]

    assert alarm(1000, []) == 2
    assert alarm(1100, [100]) == 2
    assert alarm(1999, [1000]) == 3
    assert o.lr_factor() == pytest.approx(0.7), "level 3: with a lower rate"
    for past in ([1000, 1500], [41_000, 44_000, 47_000], list(range(0, 20_000, 2000))):
        with pytest.raises(UserError, match="E301.*did not help"):
            alarm(1999 if past[0] == 1000 else 50_000, past)
    trainer.close()


def test_rollbacks_by_hand_are_no_failed_attempts(tiny):
    trainer = finish(
        tiny(max_steps=30, save_interval=5), iterations={20: lambda t: t.rollback_steps(8)}
    )
    assert [d["action"] for d in decisions(trainer)] == [
        "rollback_steps"
    ] and trainer.orchestrator.escalation.rollbacks == []


def test_explosions_without_end_are_no_accident(tiny):
    """Every fifth step explodes and is dropped: more than 2 % of a thousand steps."""
    trainer = finish(tiny(**LONG), faulty(range(40, 240, 5), 1e4))
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
        weight.register_hook(
            lambda g: g * math.nan if trainer.orchestrator.iteration in (6, 7) else g
        )

    trainer = finish(tiny(max_steps=12), iterations={2: hurt})
    rows = [d for d in decisions(trainer) if "action" in d]
    assert (
        "gradient of blocks.1.ffn.w2.weight" in rows[0]["reason"]
        and rows[0]["stat"]["grad_norm"] is None
    )
