"""lumen/report.py: what Report writes, what a failure costs, and decisions told as a story."""

import json
import math
import sys
import types

import pytest

from lumen import report, story
from lumen.config import Config
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


class Kept:
    """What a chart service was given; as wandb, as a run of it and as TensorBoard's writer."""

    def __init__(self, **options):
        self.options, self.rows, self.calls = options, [], []
        self.id, self.dir, self.url = options.get("id") or "made", "w/offline-run/files", None

    def log(self, row):
        self.rows.append(row)

    def __getattr__(self, name):
        return lambda *args, **more: self.calls.append((name, *args))


@pytest.fixture
def charts(tmp_path, monkeypatch):
    """A Report with both, and what wandb.init was asked."""
    fake = types.SimpleNamespace(Image=lambda x: x, Table=lambda **x: x, Settings=dict, init=Kept)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    one = Report(tmp_path)
    one.wandb, one.board, one.pictures = Kept(), Kept(), True
    return one


def test_experts_are_charted_as_a_picture_with_the_dead_ones_in_red(charts):
    charts.record_experts([[0.5, 0.499, 0.001, None], [0.25, 0.25, 0.25, 0.25]], 7)
    [row], [call] = charts.wandb.rows, charts.board.calls
    assert row["step"] == call[3] == 7 and call[:2] == ("add_image", "experts/by_layer")
    picture = row["experts/by_layer"]
    assert picture.dtype == "uint8" and (picture == call[2]).all()
    size = picture.shape[0] // 2
    cells = picture[::size, ::size].tolist()
    assert len(cells) == 2 and len(cells[0]) == 4
    assert cells[0][2] == [210, 59, 59] and cells[0][3] == [160] * 3
    assert sum(cells[0][0]) < sum(cells[1][0]), "1.5 of a fair share is darker than 1"
    charts.pictures = False  # no Pillow: neither is asked for what it could not do
    charts.record_experts([[1.0]], 8)
    assert len(charts.wandb.rows) == len(charts.board.calls) == 1


def test_decisions_are_charted_as_a_table_and_as_texts(charts):
    charts.record_decision(decision(1, 5))
    assert not charts.wandb.rows, "a table is sent whole: with the next row"
    assert charts.board.calls[0][:2] == ("add_text", "decisions")
    assert "    reason: why" in charts.board.calls[0][2].split("\n")
    for step in (6, 7):
        charts.record({"step": step, "loss": 1.0})
    table = charts.wandb.rows[0]["decisions"]
    assert dict(zip(table["columns"], table["data"][0]))["trigger"] == "nonfinite"
    assert "decisions" not in charts.wandb.rows[1], "nothing new"
    charts.record_decision({"kind": "outcome", "id": 1, "verdict": "better", "step": 9})
    wandb = charts.wandb
    charts.close()
    table = wandb.rows[-1]["decisions"]
    assert dict(zip(table["columns"], table["data"][0]))["outcome"] == "better"
    assert [row["id"] for row in rows(charts.out / "decisions.jsonl")] == [1, 1]


def test_a_run_of_wandb_goes_on_where_the_run_does(charts, monkeypatch):
    """What state.json keeps: tests/runs/test_messages.py."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = Config(data_dir="d", out_dir=str(charts.out), wandb_project="p")
    for before, after in ((None, "made"), ("kept", "kept")):
        charts.wandb_id = before
        charts.open_charts(cfg)
        assert (charts.wandb.options["id"], charts.wandb.options["resume"]) == (before, "allow")
        assert charts.wandb_id == after


def decision(number, turn, **changes):
    row = {"id": number, "turn": turn, "step": turn, "attempt": 1, "mode": "act", "level": 1}
    row |= {"time": "12:00", "trigger": "nonfinite", "action": "drop", "executed": True}
    row |= {"reason": "why", "confidence": 1.0, "basis": "observed", "args": None}
    row |= {"blocked_by": None}
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


def test_a_run_is_told_in_a_few_lines(tmp_path, capsys):
    """Of its last start what it trains on what, its last losses, its checkpoints."""
    row = {"step": 5, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.5, "tokens": 640}
    held_out = {"step": 5, "val_loss": 2.75, "val_bpb": 1.25, "best_val_loss": 2.5, "best_step": 3}
    rows = [row | {"step": 1, "loss": 4.0}, row, held_out]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "status.json").write_text('{"state": "stopped", "reason": "as asked for"}')
    (tmp_path / "config.yaml").write_text("")
    start = "model      {}\ndata       {}\nplan       no detail\n"
    (tmp_path / "train.log").write_text(start.format("old", "old") + start.format("new", "mine"))
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"step_{step:08}").mkdir()
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: stopped at step 5: as asked for",
        "model      new",
        "data       mine",
        "loss       2.5000 at step 5, rate 1.00e-03",
        "speed      1,234 tokens/s, 640 tokens so far",
        "val_loss   2.7500 at step 5, 1.2500 bits per byte; best 2.5000 at step 3",
        "saved      2 more, step_00000003, step_00000004, step_00000005",
        f"{tmp_path}: nothing had to be decided",
    ]


def test_what_was_rolled_back_is_apart():
    steps = [{"step": s} for s in (1, 2, 3, 4, 3, 4, 5)]
    kept, lost = story.without_rolled_back(steps)
    assert [r["step"] for r in kept] == [1, 2, 3, 3, 4, 5] and [r["step"] for r in lost] == [4]


@pytest.mark.parametrize("x, y", [(math.inf, None), ([1.0, math.nan], [1.0, None]), ("a", "a")])
def test_json_has_no_infinity(x, y):
    assert report.finite({"x": x}) == {"x": y}
