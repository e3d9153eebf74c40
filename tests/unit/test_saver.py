"""lumen/saver.py on plain tensors: what is saved when, and what a failure leaves."""

import contextlib
import json
import threading
import types

import pytest
import torch

from lumen import checkpoint
from lumen.saver import Saver
from lumen.stopwatch import Stopwatch


class OneRank:
    """What Saver asks of train.Parallel."""

    rank, world, STARTUP_TIMEOUT = 0, 1, 600

    def __init__(self):
        self.timeouts = []

    def set_timeout(self, seconds):
        self.timeouts.append(seconds)

    def all_reduce_max(self, flags):
        return [int(flag) for flag in flags]

    def gather(self, x):
        return [x]

    def local_shards(self, name, tensor):
        return [((0,) * tensor.dim(), tuple(tensor.shape), tensor, True)]


class Listener:
    """What Saver asks of Report."""

    def __init__(self):
        self.said, self.furnished = [], 0

    def say(self, text):
        self.said.append(text)

    def furnish(self):
        self.furnished += 1

    @contextlib.contextmanager
    def optional(self, what):
        yield


@pytest.fixture
def saver(tmp_path):
    cfg = types.SimpleNamespace(out_dir=str(tmp_path), comm_timeout=60, save_async=False)
    cfg.save_total_limit, cfg.keep_every, cfg.backup_dir = 1, 0, None
    owner = types.SimpleNamespace(keep=lambda: None)
    return Saver(cfg, OneRank(), owner, Listener(), Stopwatch())


def state(step, best=None):
    return {"step": step, "best_step": best or step, "best_val_loss": 1.0, "clean": True}


def test_a_save_is_there_when_it_returns_and_old_ones_go(saver):
    tensors = {"model.w": torch.arange(6.0).view(2, 3)}
    for step in (1, 2, 3):
        assert saver.save(step, tensors, state(step, best=1))
    assert checkpoint.list_steps(saver.out) == [1, 3], "the best and the newest"
    assert torch.equal(checkpoint.find(saver.out).read("model.w"), tensors["model.w"])
    assert (
        saver.report.furnished == 3
        and json.loads((saver.out / "best.json").read_text())["step"] == 1
    )
    assert saver.save(4, tensors, state(4, best=1), prune=False)
    assert checkpoint.list_steps(saver.out) == [1, 3, 4]
    assert saver.watch.spent["checkpoint"] > 0 and not saver.busy


def test_timeouts_are_long_while_something_is_saved(saver):
    saver.set_timeout(60)
    saver.save(1, {}, state(1))
    assert saver.parallel.timeouts == [60, 600, 600, 60]


def test_a_failure_is_said_cleaned_up_and_made_good(saver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", lambda *args: "OSError: no room")
        assert not saver.save(1, {"a": torch.ones(1)}, state(1))
    assert saver.unsaved and "E307" in saver.report.said[0] and "no room" in saver.report.said[0]
    assert not list(saver.out.glob("step_*")) and not (saver.out / "best.json").exists()
    assert saver.save(2, {"a": torch.ones(1)}, state(2)) and not saver.unsaved


def test_training_goes_on_while_a_thread_writes_a_copy(saver, monkeypatch):
    written, real, tensor = threading.Event(), checkpoint.write, torch.zeros(3)

    def slow(*args):
        written.wait(30)
        return real(*args)

    monkeypatch.setattr(checkpoint, "write", slow)
    saved = state(5, best=3)
    assert saver.save(5, {"a": tensor}, saved, iteration=7, wait=False) and saver.busy
    tensor += 1
    saved["best_step"] = 6  # a newer best, not yet on the disk
    saver.finish_if_written(6, 0)  # an iteration before the save began
    saver.finish_if_written(8, 1)  # somebody still writes
    assert saver.busy and checkpoint.list_steps(saver.out) == []
    written.set()
    saver.finish_if_written(8, 0)
    assert not saver.busy and torch.equal(checkpoint.find(saver.out).read("a"), torch.zeros(3))
    assert json.loads((saver.out / "best.json").read_text())["step"] == 3
