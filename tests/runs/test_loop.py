"""The parts of the loop that only look: what is due before a step, which intervals have come."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lumen.progress import Progress
from lumen.schedule import every
from lumen.sums import FLAGS, flatten, unflatten
from train import Due, Trainer

FRESH = {  # a run of 20 steps in the midst of its life
    "step": 7,
    "started_at": 5,
    "evaluated_at": 5,
    "stopped_early": False,
    "stopping": False,
    "save_asked": False,
    "unsaved": False,
    "save_interval": 10,
    "eval_interval": 0,
}


def state(**changes) -> SimpleNamespace:
    """What Trainer.due looks at."""
    keys = FRESH | changes
    intervals = {name: keys.pop(name) for name in ("save_interval", "eval_interval")}
    saver = SimpleNamespace(unsaved=keys.pop("unsaved"), writing=None)
    progress = Progress(
        evaluated_at=keys.pop("evaluated_at"), stopped_early=keys.pop("stopped_early")
    )
    keys["progress"] = progress
    run = SimpleNamespace(max_steps=20)
    return SimpleNamespace(**keys, cfg=SimpleNamespace(**intervals), run=run, saver=saver)


def due(rolled_back=False, **changes) -> tuple[bool, bool, bool]:
    """(evaluate, save, last)"""
    found = Trainer.due(state(**changes), rolled_back)
    return found.evaluate, found.save, found.last


@pytest.mark.parametrize(
    "what, changes, expected",
    [
        ("an ordinary step", {}, (False, False, False)),
        ("save_interval: a save always evaluates first", {"step": 10}, (True, True, False)),
        ("eval_interval", {"eval_interval": 7}, (True, False, False)),
        ("the last step", {"step": 20}, (True, True, True)),
        ("no interval at all", {"step": 10, "save_interval": 0}, (False, False, False)),
        ("patience has ended it", {"stopped_early": True}, (True, True, True)),
        ("where it started from", {"step": 5, "save_interval": 5}, (False, False, False)),
        (
            "where it started from, its evaluation was left for a signal",
            {"step": 5, "save_interval": 5, "evaluated_at": None},
            (True, True, False),
        ),
        ("the very first step", {"step": 0, "started_at": 0, "evaluated_at": None}, (False,) * 3),
        ("a signal", {"stopping": True}, (False, True, False)),
        ("a signal at the start", {"stopping": True, "step": 5}, (False, False, False)),
        ("asked for a save", {"save_asked": True}, (True, True, False)),
        ("asked for a save, evaluated already", {"save_asked": True, "evaluated_at": 7},
         (False, True, False)),
        ("a failed save is tried again", {"unsaved": True}, (False, True, False)),
        ("... ten times an interval", {"unsaved": True, "save_interval": 100}, (False, False, False)),
        ("... ten times an interval", {"unsaved": True, "save_interval": 70}, (False, True, False)),
    ],
)  # fmt: skip
def test_what_is_due(what, changes, expected):
    assert due(**changes) == expected, what


def test_after_a_rollback_it_is_always_evaluated_and_saved():
    for step in (0, 5, 7, 20):
        assert due(True, step=step)[:2] == (True, True)
    assert due(True, stopping=True)[:2] == (False, True)


def as_it_was(s, rolled, new_best) -> tuple[bool, bool]:
    """(whether it evaluates, whether it saves): the loop's own lines at commit 77c1c6b."""
    cfg = s.cfg
    stop, wants_save = s.stopping, s.save_asked
    last = s.step >= s.run.max_steps or s.progress.stopped_early
    owed = s.progress.evaluated_at != s.step and (last or s.step > 0)
    here = s.step != s.started_at or owed
    due_save = last or (cfg.save_interval and s.step % cfg.save_interval == 0)
    due_eval = due_save or wants_save or rolled
    due_eval = due_eval or (cfg.eval_interval and s.step % cfg.eval_interval == 0)
    fresh = (here and s.progress.evaluated_at != s.step) or rolled
    evaluates = bool(fresh and due_eval and not stop)
    new_best = evaluates and new_best
    retry = s.saver.unsaved and s.step % max(1, cfg.save_interval // 10) == 0
    moved = s.step != s.started_at
    saves = (here and (due_save or new_best or last)) or (moved and (stop or wants_save or retry))
    return evaluates, bool(saves or rolled)


def test_due_is_what_the_loop_did_before_it_had_a_name():
    """Every combination of what it looks at: 23,040."""
    flags = ("stopped_early", "stopping", "save_asked", "unsaved")
    numbers = itertools.product((0, 5, 7, 10, 20), (0, 5, 10), (None, 5, 7, 10), (0, 5, 40), (0, 7))
    for step, started_at, evaluated_at, save_interval, eval_interval in numbers:
        for values in itertools.product((False, True), repeat=len(flags) + 2):
            *set_flags, rolled, new_best = values
            keys = dict(zip(flags, set_flags))
            keys |= {"step": step, "started_at": started_at, "evaluated_at": evaluated_at}
            keys |= {"save_interval": save_interval, "eval_interval": eval_interval}
            now = state(**keys)
            found = Trainer.due(now, rolled)
            now.evaluate = lambda best=new_best: best
            before = found.evaluate
            if found.evaluate:
                Trainer.evaluate_now(now, found)
            assert (before, found.save) == as_it_was(state(**keys), rolled, new_best), keys


def test_every():
    assert [step for step in range(10) if every(3, step)] == [0, 3, 6, 9]
    assert not any(every(0, step) for step in range(10))


def test_sums_come_back_from_the_one_vector():
    sums = {
        "ce": torch.tensor(1.5),
        "counts": torch.arange(6).view(2, 3),
        "none": torch.zeros(0, 4),
    }
    vector, shapes = flatten(sums)
    assert vector.dtype == torch.float64 and len(vector) == 7
    again = unflatten(vector, shapes)
    assert list(again) == list(sums)
    assert all(torch.equal(again[name], sums[name].double()) for name in sums)


def test_flags_are_no_names_of_sums():
    assert not {"ce", "z", "count"} & set(FLAGS) and all("." not in name for name in FLAGS)
    assert Due(False, False, False, False) == Due(
        evaluate=False, save=False, last=False, fresh=False
    )
