"""lumen/stopwatch.py: laps, marks and intervals, with clocks that the test sets."""

import pytest

from lumen import stopwatch
from lumen.stopwatch import PARTS, Interval, Stopwatch


@pytest.fixture
def now(monkeypatch):
    """now["host"]: what the host's clock says; now["device"]: how far the GPU has come."""
    now = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self):
            self.at = now["device"]

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now["host"])
    monkeypatch.setattr(stopwatch, "event_now", Event)
    return now


def test_laps_add_up_to_the_time_that_passed(now):
    watch = Stopwatch()
    for seconds, name in ((2.0, "data"), (3.0, "compute"), (1.0, "data"), (4.0, "other")):
        now["host"] += seconds
        watch.lap(name)
    spent = {name: seconds for name, seconds in watch.spent.items() if seconds}
    assert spent == {"data": 3.0, "compute": 3.0, "other": 4.0}
    assert set(watch.spent) == set(PARTS)
    now["host"] += 50
    watch.start(0)  # what came before the loop is nobody's lap
    now["host"] += 1
    watch.lap("data")
    assert watch.spent["data"] == 4.0


def test_a_wait_for_data_counts_as_compute_until_the_gpu_says_otherwise(now):
    watch = Stopwatch(runs_ahead=True)
    watch.mark("compute")
    now["host"] += 5.0  # the host waits for data; the GPU had work for 3 seconds of it
    watch.lap("data")
    assert (watch.spent["data"], watch.spent["compute"]) == (0.0, 5.0)
    now["device"] += 3.0
    watch.mark("compute")
    now["device"] += 2.0
    watch.mark("data")
    marks = watch.take_marks()
    assert len(marks) == 3 and watch.take_marks() == []
    watch.measure(marks)
    assert (watch.spent["data"], watch.spent["compute"]) == (2.0, 3.0)
    assert watch.on_device == {"compute": 3.0, "data": 2.0}


def test_without_a_gpu_there_are_no_marks(now):
    watch = Stopwatch()
    watch.mark("compute")
    assert watch.take_marks() == []


def test_an_interval_leaves_out_what_was_no_training(now):
    watch = Stopwatch(step=10)
    assert watch.last.speed() == 0, "no log line yet"
    now["host"] += 6.0
    watch.lap("compute")
    now["host"] += 30.0
    watch.lap("evaluation")
    watch.leave_out(30.0)
    interval = watch.interval(13)
    assert interval[:2] == (3, 6.0) and interval.speed() == 0.5
    assert interval.shares()["compute"] == pytest.approx(6 / 36)
    watch.restart(13, interval)
    assert watch.last == interval
    now["host"] += 1.0
    watch.lap("data")
    assert watch.interval(14).spent["compute"] == 0, "only what was spent since"
    watch.restart(5)  # a rollback is no log line
    assert watch.last == interval and isinstance(watch.last, Interval)
