"""The orchestrator's parts on plain numbers: levels, decisions, outcomes, health, what old
checkpoints say."""

import dataclasses
import json
import types

import pytest
from conftest import ROOT

from lumen.config import OrchestratorConfig
from lumen.decisions import JUDGE_AFTER, Decision, Decisions, Judgement
from lumen.detectors import WAITING, WATCHING, Alarm, Divergence, Explosion, UnbalancedExperts
from lumen.errors import UserError
from lumen.health import Checkup, Health
from lumen.orchestrate import LR_CUT, LR_CUT_ITERATIONS, Escalation, judge, modernised
from lumen.replay import Replay

# ---------------------------------------------------------------- escalation


@pytest.mark.parametrize(
    "past, now, level, spent",
    [
        ([], 5000, 2, False),
        ([4000], 5000, 2, False),
        ([4001], 5000, 3, False),
        ([4001, 4500], 5000, 4, False),
        ([1000, 2000, 3000], 9000, 2, True),
        ([1000, 2000, 3000], 11_000, 2, False),
        (list(range(0, 200_000, 20_000)), 500_000, 2, True),
    ],
)
def test_the_level_of_an_alarm(past, now, level, spent):
    escalation = Escalation(rollbacks=past)
    assert (escalation.level(now), escalation.spent(now)) == (level, spent)
    assert escalation.cooldown_ends == (past[-1] + 200 if past else 0)


def test_the_cut_of_level_3_ends():
    escalation = Escalation(cut_at=1000, cut=LR_CUT)
    half, end = 1000 + LR_CUT_ITERATIONS // 2, 1000 + LR_CUT_ITERATIONS
    assert escalation.lr_factor(1000) == pytest.approx(LR_CUT)
    assert escalation.lr_factor(half) == pytest.approx((1 + LR_CUT) / 2)
    assert escalation.lr_factor(end) == Escalation().lr_factor(5) == 1.0


# ---------------------------------------------------------------- decisions


class Log:
    def __init__(self):
        self.rows, self.lines = [], []

    def append(self, name, row):
        self.rows.append(row)

    def record_decision(self, row):
        self.append("decisions.jsonl", row)

    def say(self, line):
        self.lines.append(line)


def decisions(log, **block) -> Decisions:
    now = {"step": 7, "cursor": 28, "turn": 9, "tokens": 900, "attempt": 1}
    return Decisions(log, OrchestratorConfig(**block), "run", 1, lambda: dict(now), lambda: 2.5)


@pytest.mark.parametrize(
    "block, more, blocked",
    [
        ({}, {}, None),
        ({}, {"confidence": 0.5}, "confidence below 0.75"),
        ({}, {"blocked": "forbidden"}, "forbidden"),
        ({"mode": "shadow"}, {"blocked": "forbidden"}, "mode: shadow"),
        ({"mode": "shadow"}, {"always": True}, None),
        ({"mode": "shadow"}, {"level": 0}, None),
        ({"mode": "off"}, {"trigger": "user"}, None),
    ],
)
def test_what_stands_against_a_decision(block, more, blocked):
    log, done = Log(), []
    words = {"trigger": "x", "action": "act", "reason": "why", "level": 2} | more
    row = decisions(log, **block).decide(Decision(**words), do=lambda: done.append(1))
    assert row["blocked_by"] == blocked and row["executed"] == (blocked is None)
    assert len(done) == (blocked is None) and log.rows == [row]


def test_a_decision_that_is_refused_was_not_executed():
    log = Log()

    def no():
        raise UserError("E308", "there is no such layer")

    desk = decisions(log)
    row = desk.decide(Decision("user", "prune_expert", "asked for", 1), do=no)
    assert (row["executed"], row["refused"]) == (False, "E308") and desk.due == []
    assert log.lines[0].endswith("user: E308 refused: prune_expert")
    done = desk.decide(Decision("user", "save", "asked for", 1))
    assert desk.due == [Judgement(done["id"], 9 + JUDGE_AFTER, "user", 2.5)]
    desk.decide(Decision("nonfinite", "drop", "", 1, always=True))
    desk.decide(Decision("nonfinite", "drop", "", 1, always=True))
    assert [j.kind for j in desk.due] == ["user", "drop"], "one dropped step at a time is judged"
    assert [j.id for j in desk.take_due(9 + JUDGE_AFTER)] == [2, 3] and desk.due == []


def test_outcomes():
    loss, explosion, experts = Divergence(0.75), Explosion(True), UnbalancedExperts(5, 3.0)

    def verdict(kind, rollbacks=(), **more):
        judgement = Judgement(1, 500, kind, **more)
        return judge(judgement, loss, explosion, experts, list(rollbacks))[0]

    assert verdict("rollback", [400]) == "helped"
    assert verdict("rollback", [400, 450]) == "did not hold"
    loss.phase = WAITING
    assert verdict("rollback", [400]) == "did not hold"
    loss.phase = WATCHING
    assert verdict("drop") == "it stayed the only one"
    explosion.dropped.extend([400, 450, 460])
    assert verdict("drop") == "2 more were dropped since"
    experts.checks = {0: 0, 2: 3}
    assert verdict("reseed", layers=[0]) == "helped"
    assert verdict("experts", layers=[0, 2]) == "did not help"


# ---------------------------------------------------------------- health


def checkup(compute=(1.0,), data=0.0, **more) -> Checkup:
    row = {"iterations": 10, "seconds": 2.0, "checkpoint": 0.0, "graphs": 0, "retries": 0}
    row["data"] = data
    words = {"off_course": False, "guessing": None, "above_start": 0.0, "unsaved": False}
    words |= {"rank": 0, "evaluated": False, "unbalanced": []} | more
    return Checkup(rows=[row | {"compute": c} for c in compute], **words)


def test_health_is_said_when_it_changes():
    health = Health()
    assert health.examine(checkup()) is None and health.status == "healthy"
    line = health.examine(checkup(data=0.6))
    assert line.startswith("warning: 30 % of the time is waiting for data; advice: use a faster")
    assert health.examine(checkup(data=0.6)) is None
    assert health.examine(checkup(data=0.7, unsaved=True)).startswith("critical: the last")
    assert health.causes[1].startswith("35 %")
    assert health.examine(checkup()) == "healthy"
    line = health.examine(checkup(compute=(1.0, 1.0, 1.5)))
    assert "rank 2 computes 1.5 times" in line


def test_a_run_that_slows_down_is_told_at_the_third_checkup():
    health = Health()
    for _ in range(5):
        health.examine(checkup())
    slow = checkup()
    slow.rows[0]["seconds"] = 4.0
    assert health.examine(slow) is None and health.examine(slow) is None
    assert "5e" in health.examine(slow) or "2.5 steps/s" in health.causes[0]


# ---------------------------------------------------------------- replay


def test_what_did_not_survive_is_not_repeated():
    def row(id, cursor, **more):
        words = {"run": "r", "id": id, "turn": id, "cursor": cursor, "action": "drop"}
        return words | {"trigger": "nonfinite", "executed": True, "level": 1} | more

    back = {"action": "rollback", "args": {"to_cursor": 8}}
    start = {"kind": "start", "run": "r", "next_id": 3}
    rows = [row(1, 4), row(2, 8), row(3, 12), start, row(3, 16, trigger="explosion")]
    replay = Replay([*rows, row(4, 20, **back)], "file", "r", 1)
    assert replay.drops(4) == (True, False) and replay.drops(16) == (True, True)
    assert replay.drops(12) == (False, False) and replay.targets == {8: None}
    for run, world in (("other", 1), ("r", 2)):
        with pytest.raises(UserError, match="E310"):
            Replay([row(1, 4, ranks=1)], "file", run, world)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_replay_cuts_the_run_by_the_same_method(resumed):
    """Else one that is stopped after the cut goes on to the old length."""
    make = dataclasses.make_dataclass
    run = make("Run", ["max_steps", "warmup_steps", "peak_step", "phases"])(100, 5, 5, [])
    progress = types.SimpleNamespace(stopped_early=False)
    cfg = types.SimpleNamespace(lr_schedule="wsd")
    trainer = types.SimpleNamespace(cfg=cfg, run=run, progress=progress)
    orchestrator = types.SimpleNamespace(trainer=trainer, control=None)
    row = {"run": "r", "id": 1, "turn": 1, "cursor": 4, "trigger": "length", "level": 2}
    row |= {"action": "start the decay", "args": {"max_steps": 80}, "executed": True}
    replay = Replay([row], "file", "r", 1)
    replay.repeat(row if not resumed else row | {"action": "stop"}, orchestrator)
    found = (trainer.run.max_steps, trainer.progress.stopped_early)
    assert found == ((100, True) if resumed else (80, False))


# ---------------------------------------------------------------- state of before

OLD = json.loads((ROOT / "tests" / "fixtures" / "orchestrator_77c1c6b.json").read_text())


@pytest.mark.parametrize("name", OLD)
def test_the_state_of_an_old_checkpoint_is_understood(name):
    """Written at commit 77c1c6b by runs whose weights were shaken."""
    old, new = OLD[name], modernised(OLD[name])
    assert modernised(new) is new and json.loads(json.dumps(new)) == new
    assert (new["turn"], new["run"], new["dropped"]) == (old["turn"], old["run"], old["dropped"])
    loss, explosion, experts = Divergence(0.75), Explosion(True), UnbalancedExperts(5, 3.0)
    loss.load(new["detectors"]["divergence"])
    explosion.load(new["detectors"]["explosion"])
    experts.load(new["detectors"]["experts"])
    escalation = Escalation()
    escalation.load(new["escalation"])
    assert loss.phase == (WAITING if old["alarm"] else WATCHING)
    assert (
        loss.course.E == old["course"]["E"] and list(loss.course.losses) == old["course"]["losses"]
    )
    assert list(map(list, explosion.norms.seen)) == old["norms"]
    assert list(explosion.dropped) == old["skipped"] and loss.recovery_target == old["regain"]
    assert escalation.rollbacks == old["rollbacks"] and new["control"]["knobs"] == old["knobs"]
    due = [Judgement(**d) for d in new["decisions"]["due"]]
    assert [(d.id, d.iteration, d.kind) for d in due] == [
        (d["id"], d["turn"], d["kind"]) for d in old["due"]
    ]
    if old["alarm"]:
        assert (loss.began, loss.onset, loss.until, loss.id) == tuple(
            old["alarm"][k] for k in ("turn", "onset", "until", "id")
        )
        assert loss.target == old["alarm"].get("half")
    if name.startswith("experts"):
        assert experts.checks == {0: 5, 2: 0} and [d.layers for d in due] == [[0], [0]]
        assert due[0].was == 0.001 and escalation.lr_factor(181) == pytest.approx(0.7)
        assert new["ended"] == ["stop"] and new["detectors"]["guessing"]["said"]


def test_an_alarm_becomes_a_decision():
    alarm = Alarm("explosion", "drop", 1, "why", 3, 0.9, "pvalue", {"grad_norm": 5.0})
    d = Decision.of(alarm)
    assert (d.trigger, d.action, d.level, d.confidence, d.basis) == (
        "explosion",
        "drop",
        1,
        0.9,
        "pvalue",
    )
    assert d.more == {"stat": {"grad_norm": 5.0}} and not d.always
