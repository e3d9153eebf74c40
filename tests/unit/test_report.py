"""lumen/report.py: what Report writes, what a failure costs, and decisions told as a story."""

import json
import math

import pytest

from lumen import report, story
from lumen.report import Report


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_only_rank_0_speaks_and_writes(tmp_path, capsys):
    for main in (True, False):
        one = Report(tmp_path / str(main), main)
        one.out.mkdir()
        one.say("a line")
        one.append("x.jsonl", {"a": 1})
        one.attempt = 1
        one.status("running", 0)
    assert capsys.readouterr().out == "a line\n"
    assert not list((tmp_path / "False").iterdir())
    one.status("restart", 3, 75, "the only one who knows", anyone=True)
    assert one.read_status()["reason"] == "the only one who knows"


def test_an_attempt_has_its_number_and_its_log(tmp_path, capsys):
    for attempt in (1, 2):
        one = Report(tmp_path)
        one.status("running", 0)
        assert one.read_status().get("attempt", 0) == attempt - 1, "it does not own out_dir yet"
        one.open("a: 1\n", None)
        one.status("running", 7)
        one.say(f"attempt {one.attempt}")
        one.close()
    assert one.read_status() == {
        "state": "running",
        "code": 0,
        "step": 7,
        "attempt": 2,
        "reason": "",
    }
    assert (tmp_path / "train.log").read_text() == "attempt 1\nattempt 2\n"


def test_a_config_that_somebody_edited_stays(tmp_path, capsys):
    one = Report(tmp_path)
    one.open("a: 1\n", None)
    first = (tmp_path / "config.yaml").read_text()
    one.config = "a: 2\n"
    one.write_config()
    assert (tmp_path / "config.yaml").read_text() != first, "ours is written anew"
    (tmp_path / "config.yaml").write_text("# mine\n" + first)
    one.write_config()
    assert (tmp_path / "config.yaml").read_text() == "# mine\n" + first
    assert (tmp_path / "resolved.yaml").read_text().endswith("a: 2\n")
    assert "stays" in capsys.readouterr().out


def test_what_was_deleted_comes_back(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in report.TOKENIZER_FILES:
        (data / name).write_text("of the data")
    one = Report(tmp_path / "run")
    one.out.mkdir()
    one.open("a: 1\n", data)
    one.copy_tokenizer("now", "then")
    (one.out / "tokenizer.json").write_text("of the steps so far")
    one.copy_tokenizer("now", "then")
    kept = [p for p in one.out.glob("tokenizer*") if p.read_text() == "of the steps so far"]
    assert len(kept) == 1 and "then" in kept[0].name
    for file in one.out.iterdir():
        file.unlink()
    one.furnish()
    one.say("again")
    names = {file.name for file in one.out.iterdir()}
    assert names == {"config.yaml", "train.log", *report.TOKENIZER_FILES}
    assert (one.out / "train.log").read_text() == "again\n"


def test_lines_that_a_disk_did_not_take_come_later(tmp_path):
    one = Report(tmp_path / "not_there_yet")
    one.append("x.jsonl", {"a": 1, "b": math.nan})
    one.out.mkdir()
    one.append("x.jsonl", {"a": 2})
    assert rows(one.out / "x.jsonl") == [{"a": 1, "b": None}, {"a": 2}]


def test_a_chart_that_fails_is_given_up_and_the_rows_are_not(tmp_path, capsys):
    class Poor:
        calls = 0

        def log(self, row):
            self.calls += 1
            raise OSError("no network")

        add_scalar = add_histogram_raw = lambda self, *args: self.log(None)

    one = Report(tmp_path)
    one.wandb, one.board = wandb, board = Poor(), Poor()
    for step in (1, 2):
        one.record({"step": step, "loss": 1.0, "health_causes": ["not a number"]})
        one.record_bars("shares", [0.5, None], step)
    assert (wandb.calls, board.calls) == (1, 1) and one.wandb is None and one.board is None
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().out.count("nothing more is written to it") == 2


def decision(number, turn, **changes):
    row = {"id": number, "turn": turn, "step": turn, "attempt": 1, "mode": "act", "level": 1}
    row |= {"time": "12:00", "trigger": "nonfinite", "action": "drop", "executed": True}
    row |= {"reason": "why", "confidence": 1.0, "basis": "observed", "args": None}
    return row | changes


def test_decisions_are_told_as_a_story(tmp_path, capsys):
    told = [decision(1, 5), decision(2, 6), decision(3, 7)]
    told += [decision(4, 50, trigger="user", action="save", level=0, args={"a": 1, "b": None})]
    told += [decision(5, 151, action="rollback", level=2, executed=False, blocked_by="mode")]
    told += [{"kind": "outcome", "id": 5, "verdict": "better", "step": 300}]
    told += [decision(6, 5, attempt=2)]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in told))
    assert report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("6 decisions")
    assert sum("attempt" in line for line in out) == 3, "three scenes: 151 is far, 2 is another"
    text = "\n".join(out)
    assert "step 5 to 7: nonfinite: drop (#1, level 1, done)" in text, "one line for three steps"
    assert "(#4, a note)" in text and "    how     a 1" in out
    assert "(#5, level 2, NOT done: mode)" in text
    assert "    outcome better, seen at step 300" in out


def test_what_was_rolled_back_is_apart():
    steps = [{"step": s} for s in (1, 2, 3, 4, 3, 4, 5)]
    kept, lost = story.without_rolled_back(steps)
    assert [r["step"] for r in kept] == [1, 2, 3, 3, 4, 5] and [r["step"] for r in lost] == [4]


@pytest.mark.parametrize("x, y", [(math.inf, None), ([1.0, math.nan], [1.0, None]), ("a", "a")])
def test_json_has_no_infinity(x, y):
    assert report.finite({"x": x}) == {"x": y}
