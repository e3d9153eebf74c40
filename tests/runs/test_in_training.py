"""evaluate: {every, tasks} in a training run: its numbers are those of evaluate.py, and nothing of
the run changes with them."""

import json
import random
import time
from pathlib import Path

import pytest
import yaml
from conftest import read_lines
from forks import run_forked
from rig import KINDS, bytes_data, equal, finish, tensors

from lumen import in_training
from lumen.answers import ask
from lumen.errors import UserError
from lumen.models import open_model
from lumen.parallel import Parallel
from lumen.questions import Asked
from lumen.scorer import Scorer
from lumen.scores import scores_of
from train import Trainer

WORDS = ("red", "blue", "old", "new", "sea")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prepared text, and a task about it: what comes next, a word or none."""
    top = tmp_path_factory.mktemp("in_training")
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(700)]
    (top / "text.txt").write_text("\n".join(lines))
    bytes_data(top / "data", top / "text.txt")
    rows = []
    for line in lines[:12]:
        choices = [rng.choice(WORDS), "qqqq", "zz"]
        answer = rng.randrange(3)
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append({"question": line, "choices": choices, "answer": answer})
    (top / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return top


@pytest.fixture
def keys(files, tiny):
    def make(name, model=None, **changes) -> dict:
        changes = {"save_interval": 0, "eval_interval": 4, "max_steps": 8} | changes
        changes = {"data_dir": str(files / "data"), "val_fraction": ..., **changes}
        shape = {"vocab_size": 260, "max_seq_len": 64}
        return tiny(name, shape | (model or {}), **changes)

    return make


@pytest.fixture
def asks(files):
    """evaluate: every three steps; more keys of it."""

    def make(*more, **keys) -> dict:
        return {"every": 3, "tasks": [str(files / "words.jsonl"), *more], **keys}

    return make


def told(trainer) -> dict[int, dict]:
    """step: what was found at it, without what depends on the attempt."""
    rows = {}
    for row in read_lines(trainer.out / "metrics.jsonl"):
        found = {key: value for key, value in row.items() if key.startswith("eval/")}
        if found:
            assert row["step"] not in rows
            rows[row["step"]] = found
    return rows


def trained(trainer) -> list[dict]:
    """What metrics.jsonl says of training and of val_loss, without what a clock has measured."""
    names = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "best_step", "dropped")
    rows = [row for row in read_lines(trainer.out / "metrics.jsonl")]
    rows = [row for row in rows if "loss" in row or "val_loss" in row]
    return [{name: row.get(name) for name in names} for row in rows]


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_run_has_the_same_bits_and_the_numbers_of_evaluate_py(keys, asks, kind):
    without = finish(keys("without", KINDS[kind]))
    run = finish(keys("with", KINDS[kind], evaluate=asks()))
    assert equal(tensors(without), tensors(run))
    assert trained(without) == trained(run)
    assert list(told(run)) == [3, 6, 8] and not told(without)
    # the checkpoint of the last step, asked as evaluate.py asks
    opened = open_model(run.out, device="cpu", precision="fp32")
    scorer = Scorer(opened.model, opened.tokenizer)
    asked = Asked(opened.model, opened.tokenizer, None, opened.tokenizer.n_vocab, scorer)
    (task,) = in_training.make_tasks(run.cfg.evaluate)
    lines = ask(task, asked, Parallel(run.cfg))
    scores = scores_of(task.kind, task.name, task.metric, lines, asked.n_vocab, 1.0)
    expected = {f"eval/words/{score.metric}": score.value for score in scores}
    for name in ("stderr", "chance", "majority"):
        expected[f"eval/words/{name}"] = getattr(scores[0], name)
    assert told(run)[8] == expected
    assert expected["eval/words/chance"] == pytest.approx(1 / 3)
    assert told(run)[3] != told(run)[8]  # the model has learned


@pytest.mark.parametrize("step", [6, 8])
def test_a_signal_while_it_asks_leaves_it_and_a_resume_asks_again(keys, asks, reference, step):
    whole = reference(keys("whole", evaluate=asks()))
    run = Trainer(keys("run", evaluate=asks()))
    (task,) = run.in_training.tasks
    ask_one, training = task.line, set()

    def line(i, asked):
        training.add(asked.model.training)
        run.signals.stop = int(run.step == step)
        return ask_one(i, asked)

    task.line = line
    assert run.fit() == 0
    assert training == {False}
    assert step not in told(run) and run.step == step
    assert json.loads((run.out / "status.json").read_text())["state"] == "stopped"
    again = finish(keys("run", evaluate=asks()))
    assert again.started_at == step
    assert told(again) == told(whole)  # as if nothing had been
    assert equal(tensors(again), tensors(whole))


def test_what_was_told_is_not_asked_again(keys, asks):
    first = finish(keys("run", max_steps=6, evaluate=asks()))
    assert list(told(first)) == [3, 6]
    assert list(told(finish(keys("run", evaluate=asks())))) == [3, 6, 8]  # told() sees to twice


def test_a_task_that_fails_is_said_and_the_run_goes_on(keys, asks, files, reference):
    other = files / "other.jsonl"
    other.write_text((files / "words.jsonl").read_text())
    run = Trainer(keys("run", evaluate=asks(str(other))))
    run.in_training.tasks[0].line = lambda i, asked: 1 / 0
    assert run.fit() == 0
    whole = reference(keys("whole", evaluate=asks()))
    assert equal(tensors(run), tensors(whole))
    assert all(key.startswith("eval/other/") for row in told(run).values() for key in row)
    assert list(told(run)) == [3, 6, 8]
    said = (run.out / "train.log").read_text()
    assert said.count("evaluate words: RuntimeError: ZeroDivisionError: division by zero") == 3
    assert "other acc_bytes 0." in said and "chance 0.333" in said


def test_speeds_leave_it_out(keys, asks):
    run = Trainer(keys("run", max_steps=3, eval_interval=0, evaluate=asks()))
    (task,) = run.in_training.tasks
    ask_one, leave_out, spent, left = task.line, run.watch.leave_out, [], []

    def line(i, asked):
        began = time.perf_counter()
        found = ask_one(i, asked)
        spent.append(time.perf_counter() - began)
        return found

    def noted(seconds):
        left.append(seconds)
        leave_out(seconds)

    task.line, run.watch.leave_out = line, noted
    assert run.fit() == 0
    assert len(spent) == 12
    assert max(left) >= sum(spent)  # beside the evaluation of val_loss, and the save
    assert run.watch.spent["evaluation"] >= sum(spent)


def test_what_cannot_be_asked_is_refused_before_anything_is_made(keys, asks, files, tiny, tmp_path):
    def refused(code: str, part: str, made: dict) -> None:
        with pytest.raises(UserError) as e:
            Trainer(made)
        assert e.value.code == code and part in e.value.text
        assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()

    prepare = {"sources": [str(files / "text.txt")], "out": str(tmp_path / "new")}
    how = {"data_dir": ..., "prepare": prepare}
    refused("E127", "nowhere", keys("run", evaluate=asks("boolq:nowhere"), **how))
    refused("E127", "did you mean docstrings?", keys("run", evaluate=asks("docstring"), **how))
    refused("E127", "boolq", keys("run", evaluate=asks("boolq"), **how))
    refused("E127", "val", keys("run", evaluate=asks("val"), **how))
    refused("E501", "bare shards", tiny("run", evaluate=asks()))


# ---------------------------------------------------------------- several ranks, fine-tuning


@pytest.mark.nightly
@pytest.mark.parametrize("program", ["train.py", "train_fsdp.py"])
def test_ranks_share_the_questions_and_have_the_numbers_of_one_process(keys, asks, program):
    """A run of two ranks; then one process goes on from its checkpoint and asks once more."""
    made = keys("two", KINDS["hybrid"], save_interval=3, max_steps=6, evaluate=asks())
    path = Path(made["out_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made))
    done = run_forked(program, path, ranks=2)
    assert done.returncode == 0, done.stderr
    rows = read_lines(Path(made["out_dir"]) / "metrics.jsonl")
    found = {row["step"]: row for row in rows if "eval/words/acc" in row}
    assert list(found) == [3, 6]
    step = Path(made["out_dir"]) / "step_00000003"
    one = Trainer(made | {"out_dir": made["out_dir"] + "-one", "resume": str(step)})
    assert one.fit() == 0
    for name, value in told(one)[3].items():
        assert found[3][name] == pytest.approx(value, abs=1e-6), name
