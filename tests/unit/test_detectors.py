"""Detectors on numbers alone."""

import json
import math
import sys

import numpy as np
import pytest

from lumen import orchestrate as orchestrator
from lumen.cli import read_config
from lumen.detectors import Divergence, NormLimit
from lumen.errors import UserError
from train import Trainer

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


# ---------------------------------------------------------------- length, health


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
