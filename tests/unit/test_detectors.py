"""What is noise and what is not, on plain numbers; then the detectors: alarms from step to step."""

import json
import math

import numpy as np
import pytest

from lumen.cli import read_config
from lumen.config import build_config
from lumen.course import LossCourse, NormLimit
from lumen.detectors import (
    ACTING,
    WAITING,
    WATCHING,
    Alarm,
    Desync,
    Detector,
    Divergence,
    Explosion,
    Guessing,
    Healed,
    ModGap,
    NonFinite,
    StepNumbers,
    UnbalancedExperts,
)
from lumen.errors import UserError

# ---------------------------------------------------------------- statistics


def noise(n, df=5, rho=0.0, seed=0):
    rng = np.random.default_rng(seed)
    e, x = rng.standard_t(df, n) / math.sqrt(df / (df - 2)), np.zeros(n)
    for i in range(1, n):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho * rho) * e[i]
    return x


def watch(values, threshold=0.75):
    """[(index, onset)] of the alarms."""
    c, found = LossCourse(), []
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
    """A long warm-up: the loss leaves ln V ever faster, and its noise grows from 0.001 to 0.15
    nats."""
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
            c = LossCourse()
            for y in 4.8 - drop * (1 - np.exp(-np.arange(200) / 100)) + sd * noise(200, seed=seed):
                c.add(0, float(y))
                assert c.all_lost() is None, (sd, drop, seed)


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
        one, other = LossCourse(), LossCourse()
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


# ---------------------------------------------------------------- detectors


def numbers(i: int, loss: float = 3.0, norm: float = 1.0, **more) -> StepNumbers:
    """Of a step that is made in iteration i + 1."""
    return StepNumbers(i, 4 * i, i + 1, loss=loss, grad_norm=norm, **more)


def alarms(detector: Detector, rows) -> list[tuple]:
    """(iteration, action, level), as the orchestrator hears them; each gets an id."""
    found = []
    for row in rows:
        for alarm in detector.look(row):
            if isinstance(alarm, Healed):
                found.append((row.iteration, "healed", alarm.id))
            else:
                found.append((row.iteration, alarm.action, alarm.level))
                alarm.id = len(found)
    return found


def nonfinite(recovers=True, watching=True, scaled=False, asked=None) -> NonFinite:
    def diagnose(cursor):
        if asked is not None:
            asked.append(cursor)
        return "the cause"

    return NonFinite(scaled, watching, recovers, diagnose)


def test_three_non_finite_steps_in_a_row_ask_for_a_rollback():
    asked = []
    rows = [numbers(i, loss=math.nan if 5 <= i < 9 else 3.0) for i in range(12)]
    found = alarms(nonfinite(asked=asked), rows)
    assert found == [
        (6, "drop", 1),
        (7, "drop", 1),
        (8, "drop", 1),
        (8, "rollback", 2),
        (9, "drop", 1),
    ]
    assert asked == [20, 32], "once in a series, which begins anew after the rollback"


def test_five_non_finite_steps_in_two_hundred_ask_for_a_rollback():
    bad = {10, 40, 80, 120, 190}
    rows = [numbers(i, norm=math.inf if i in bad else 1.0) for i in range(250)]
    assert [a for a in alarms(nonfinite(), rows) if a[2] == 2] == [(191, "rollback", 2)]
    bad = {10, 60, 120, 180, 240}
    rows = [numbers(i, norm=math.inf if i in bad else 1.0) for i in range(250)]
    assert not [a for a in alarms(nonfinite(), rows) if a[2] == 2]


@pytest.mark.parametrize("scaled, code", [(False, "E301"), (True, "E302")])
def test_fifty_non_finite_steps_in_a_row_end_a_run_that_may_not_go_back(scaled, code):
    detector, last = nonfinite(recovers=False, watching=False, scaled=scaled), None
    for i in range(50):
        for alarm in detector.look(numbers(i, norm=math.inf, loss=3.0)):
            last = alarm
        assert (last.level == 4) == (i == 49)
    assert last.code == code
    assert ("loss scale halves" in last.reason) == scaled


def explode(detector: Explosion, at, n=120, acting=True) -> list[tuple]:
    """The device's part is done here: what is above the limit explodes, three in a row are
    dropped."""
    found, streak = [], 0
    for i in range(n):
        norm = 100.0 if i + 1 in at else 1.0 + 0.01 * (i % 7)
        limit = detector.norms.limit(i + 1)
        exploded = limit is not None and math.log(norm) > limit
        bad = acting and exploded and streak < 3
        streak = streak + 1 if exploded else 0
        found += alarms(detector, [numbers(i, norm=norm, exploded=exploded, bad=bad)])
    return found


def test_the_fourth_explosion_in_a_row_is_let_through():
    found = explode(Explosion(acting=True), (50, 51, 52, 53, 54, 60))
    assert found == [
        (50, "drop", 1),
        (51, "drop", 1),
        (52, "drop", 1),
        (53, "accept", 0),
        (60, "drop", 1),
    ]


def test_more_than_twenty_explosions_are_no_accident_except_in_the_cooldown():
    detector = Explosion(acting=True)
    found = [a for a in explode(detector, range(40, 400, 5), 400) if a[2] == 2]
    assert found[0] == (40 + 5 * 20, "rollback", 2)
    detector = Explosion(acting=True)
    detector.cool_down(39, 300)
    assert [a for a in explode(detector, range(40, 400, 5), 400) if a[2] == 2][0][0] >= 300


def losses_of(y) -> list[StepNumbers]:
    return [numbers(i, loss=float(v)) for i, v in enumerate(y)]


def healthy(n, seed=0):
    return course(n) + 0.03 * noise(n, seed=seed)


def test_a_spike_that_heals_is_waited_for():
    y = healthy(400)
    y[300:312] += 2.0
    found = alarms(Divergence(0.75), losses_of(y))
    assert [a[1:] for a in found] == [("wait", 0), ("healed", 1)]


def test_a_loss_that_does_not_come_back_asks_for_a_rollback_once():
    y = healthy(400)
    y[300:] += 2.0
    detector = Divergence(0.75)
    rows = losses_of(y)
    found = alarms(detector, rows[:340])
    assert [a[1:] for a in found] == [("wait", 0), ("rollback", 2)]
    assert found[1][0] - found[0][0] == 20 and detector.phase == ACTING
    assert alarms(detector, rows[340:]) == [], "the orchestrator has been asked"
    detector.rolled_back(280, 300)
    assert detector.phase == WATCHING and all(at < 300 for at, _ in detector.course.residuals)


def test_after_a_rollback_a_loss_waits_for_the_end_of_the_cooldown():
    y = healthy(700)
    y[300:] += 2.0
    detector = Divergence(0.75)
    detector.cool_down(250, 450)
    found = alarms(detector, losses_of(y)[:460])
    assert [a[1:] for a in found] == [("wait", 0), ("rollback", 2)] and found[1][0] == 450


def test_all_that_was_learned_is_lost_and_must_come_back():
    y = np.concatenate([4.6 - 2 * (1 - np.exp(-np.arange(40) / 10)), np.full(60, 8.0)])
    detector = Divergence(0.75)
    rows = losses_of(y + 0.01 * noise(100))
    heard = []
    while len(heard) < 2:
        heard += list(detector.look(rows.pop(0)))
    now = rows[0].step
    assert [a.action for a in heard] == ["wait", "rollback"]
    assert heard[1].recovery_target == detector.target and abs(heard[1].onset - 40) <= 8
    detector.rolled_back(20, heard[1].onset)
    detector.cool_down(now, now + 200)
    detector.recovery_target = heard[1].recovery_target
    # it only stays where it began, which is no alarm by itself
    again = [a for i in range(now, 300) for a in detector.look(numbers(i, loss=4.0))]
    assert again[-1].action == "rollback" and "is not back" in again[-1].reason
    assert again[-1].onset == now and len(again) == 1


@pytest.mark.parametrize("cut", [250, 306, 315])
def test_a_detector_goes_on_where_it_was(cut):
    """Through JSON, as in a checkpoint, in any phase but the one in which a rollback is due."""
    y = healthy(400)
    y[300:] += 2.0
    one, other = Divergence(0.75), Divergence(0.75)
    rows = losses_of(y)
    found = alarms(one, rows[:cut])
    other.load(json.loads(json.dumps(one.state())))
    assert json.dumps(other.state()) == json.dumps(one.state())
    assert alarms(one, rows[cut:]) == alarms(other, rows[cut:])
    assert (one.phase, other.phase) == (ACTING, ACTING) and len(found) == (cut > 310)
    other.load(json.loads(json.dumps(one.state())))
    assert other.phase == WAITING, "what had been asked for was not done: it is asked for again"


def test_a_loss_far_below_its_course_is_a_warning():
    y = healthy(400)
    y[300:330] -= 2.0
    found = alarms(Divergence(0.75), losses_of(y))
    assert found == [(301, "warn", 0)], "said once in a hundred iterations"


def test_ranks_that_differ_go_back_to_the_last_check_that_was_passed():
    detector = Desync(10, lambda: "rank 1 differs from most")
    rows = [numbers(i, desynced=i == 40) for i in range(41)]
    (alarm,) = [a for row in rows for a in detector.look(row)]
    assert (alarm.level, alarm.onset, detector.in_sync_at) == (2, 32, 31)
    assert "rank 1 differs" in alarm.reason


def test_experts_must_stay_unbalanced_for_five_checks_late_enough():
    def row(i, dead):
        layers = {0: {"dead": dead, "max_violation": 1.0}, 2: {"dead": 0, "max_violation": 0.1}}
        return numbers(i, experts={"layers": layers} if (i + 1) % 5 == 0 else None)

    detector = UnbalancedExperts(5, 3.0)
    found = [a for i in range(60) for a in detector.look(row(i, 1))]
    assert len(found) == 3 and found[0].stat == {
        "layers": [0],
        "dead": {0: 1},
        "max_violation": 1.0,
    }
    other = UnbalancedExperts(5, 3.0)
    other.load(json.loads(json.dumps(detector.state())))
    assert other.lasting() == [0], "JSON has no integer keys"
    assert not list(detector.look(row(64, 0))) and detector.lasting() == []


def test_the_gap_of_mod_is_told_at_the_second_evaluation_in_a_row():
    detector, found = ModGap(), []
    for gap in (0.03, 0.01, 0.03, 0.04, 0.05):
        found += detector.look_at_evaluation({"mod_gap": gap, "mod_agreement": 0.9})
    assert [a.stat for a in found] == [{"gap": 0.04}]
    assert not list(detector.look_at_evaluation({"val_loss": 1.0}))


def test_worse_than_guessing_is_a_matter_of_time_and_told_once():
    loss = Divergence(0.75)
    guessing = Guessing(97, 100, loss)
    assert guessing.verdict(10, 10, 4.9) is None, "fresh weights begin a little above"
    assert "nothing was learned" in guessing.verdict(100, 10, 4.9)[1]
    assert "lower learning_rate" in guessing.verdict(10, 10, 99.0)[1]
    loss.losses.extend([2.0] * 8)
    loss.course.first = [4.6]
    assert "fewer epochs" in guessing.verdict(100, 10, 4.9)[1]
    verdict = guessing.verdict(100, 10, math.nan)
    assert [a.action for a in guessing.note(verdict)] == ["warn"] and guessing.said
    assert not list(guessing.note(verdict)) and not list(guessing.note(None))


def test_an_alarm_is_plain_data():
    alarm = Alarm("x", "rollback", 2, "why", 3)
    assert alarm == Alarm("x", "rollback", 2, "why", 3) and "rollback" in repr(alarm)


# ---------------------------------------------------------------- keys


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
        build_config(tiny() | {"orchestrator": block}, lambda key: "config", [])
    assert e.value.code == "E002" and key in e.value.text


def test_off_is_a_word_in_yaml(tiny, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(tiny())[:-1] + ', "orchestrator": {"mode": false}}')
    assert read_config([str(path)])[0].orchestrator.mode == "off"
    assert (
        read_config([str(path), "--orchestrator.mode", "shadow"])[0].orchestrator.mode == "shadow"
    )
