"""What a run says: health, advice, commands, logs, and nothing where nothing happened."""

import json
import sys
import types

import numpy as np
import pytest
from conftest import read_lines, write_yaml
from rig import decisions, finish

from lumen import machine as machines
from lumen import report, stopwatch
from lumen.cli import read_config
from lumen.errors import UserError
from train import Trainer

# ---------------------------------------------------------------- words on the command line and in
# the YAML


def test_no_epoch_is_no_step(tiny):
    """num_epochs: 0 is no step, as max_steps: 0 is; it was taken for "not set"."""
    assert Trainer(tiny(max_steps=..., num_epochs=0)).run.max_steps == 0


def test_commands_from_powershell(tiny):
    """control.jsonl in UTF-16, as PowerShell's echo writes it: E309 says what it is, and the run
    goes on."""

    def write(trainer):
        line = json.dumps({"method": "save"}) + "\n"
        (trainer.out / "control.jsonl").write_text(line * 2, encoding="utf-16")

    trainer = Trainer(tiny(max_steps=4))
    write(trainer)
    assert trainer.fit() == 0
    rows = [r for r in read_lines(trainer.out / "decisions.jsonl") if r.get("trigger") == "user"]
    assert len(rows) == 2 and all(r["refused"] == "E309" and "UTF-16" in r["reason"] for r in rows)


# ---------------------------------------------------------------- health and messages


def steps_of(keys, *lines, at=5):
    """Trains; `lines` of control.jsonl, or methods without arguments, are there when iteration `at`
    begins."""
    rows = [line if "{" in line else json.dumps({"method": line}) + "\n" for line in lines]

    def write(trainer):
        with open(trainer.out / "control.jsonl", "a") as f:
            f.writelines(rows)

    return finish(keys, iterations={at: write})


def told(trainer) -> str:
    return (trainer.out / "train.log").read_text()


def last_words(trainer) -> str:
    """How the run ended; one line behind it says what to type next."""
    *_, said, following = told(trainer).splitlines()
    assert following.startswith("next  ")
    return said


@pytest.mark.parametrize("rate, warmup, steps", [(5, 1, 40), (50, 100, 20)])
def test_a_rate_absurd_from_the_first_step(tiny, capsys, rate, warmup, steps):
    """The loss explodes before anything could be learned, or rises in a warm-up without an end. It
    is said before, in the log, in decisions.jsonl, in the last line and in status.json; nothing is
    stopped."""
    keys = tiny(
        learning_rate=rate,
        min_lr=rate,
        lr_schedule="constant",
        warmup_steps=warmup,
        max_steps=steps,
    )
    keys |= {"save_interval": 0, "orchestrator": {"check_interval": 19}}
    trainer = Trainer(keys)
    assert f"advice     learning_rate {rate} is far above" in capsys.readouterr().out
    assert trainer.fit() == 0
    rows = decisions(trainer)
    assert [(r["trigger"], r["action"], r["level"]) for r in rows] == [("chance", "warn", 0)], (
        "once"
    )
    assert "lower learning_rate" in rows[0]["reason"]
    health = [r["health"] for r in read_lines(trainer.out / "metrics.jsonl") if r.get("health")]
    last = last_words(trainer)
    assert "finished" in last and "worse than guessing" in last and set(health) == {"critical"}
    assert "worse than guessing" in json.loads((trainer.out / "status.json").read_text())["reason"]


def test_guessing_is_no_fault_of_a_young_run(tiny):
    """A run that is healthy, one whose weights begin far above chance and fall, one of two steps:
    no word of it."""
    wide = {"init_std": 0.2}  # begins above ln(vocab_size), as wide models do
    for name, model, steps, rate in (
        ("plain", {}, 40, 3e-3),
        ("wide", wide, 40, 1e-2),
        ("two", wide, 2, 1e-3),
    ):
        keys = tiny(name, model, max_steps=steps, learning_rate=rate, save_interval=0)
        trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
        assert decisions(trainer) == [] and "worse than guessing" not in last_words(trainer)


def test_what_was_not_learned_and_what_was_learned_by_heart(tiny):
    """No rate at all under weights that begin badly; or a training loss that is fine beside a
    validation loss that is not: each is told with its own remedy."""
    keys = tiny(
        model={"init_std": 0.3}, max_steps=40, learning_rate=0.0, min_lr=0.0, save_interval=0
    )
    trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
    assert "nothing was learned" in decisions(trainer)[0]["reason"]
    watch = trainer.orchestrator
    watch.loss.losses.extend([2.0] * 8)
    trainer.progress.val_loss = 9.0
    assert "fewer epochs" in watch.worse_than_guessing()[1]
    trainer.progress.val_loss = float("nan")
    assert "val_loss is nan" in watch.worse_than_guessing()[0]
    trainer.progress.val_loss = 4.6
    assert watch.worse_than_guessing() is None


def test_the_rate_leaps_where_a_run_goes_on(tiny, capsys):
    """A finished run is made longer, or its schedule, rate or warm-up changed: one line says from
    what to what, why, and what would not. A run that just goes on, and wsd that is made longer in
    its stable part, hear nothing."""
    keys = tiny(max_steps=20, save_interval=10)
    steps_of(keys)
    for change, why in (
        ({"max_steps": 60}, "max_steps 20 -> 60"),
        ({"max_steps": 60, "lr_schedule": "constant"}, "lr_schedule cosine -> constant"),
        ({"max_steps": 21, "learning_rate": 3e-2, "min_lr": 3e-2}, "learning_rate 0.003 -> 0.03"),
        ({"max_steps": 60, "warmup_steps": 600}, "warmup_steps 2 -> 600"),
        ({"max_steps": 22}, None),
        ({}, None),
    ):
        capsys.readouterr()
        Trainer(keys | change).close()
        lines = [line for line in capsys.readouterr().out.splitlines() if "rate leaps" in line]
        assert len(lines) == (why is not None), (change, lines)
        assert why is None or (
            why in lines[0] and " 3.21e-04 to" in lines[0] and "wsd" in lines[0]
        ), lines
    stable = tiny("wsd", max_steps=40, save_interval=10, lr_schedule="wsd")
    steps_of(stable, "stop", at=20)
    Trainer(stable | {"max_steps": 90}).close()
    assert "rate leaps" not in capsys.readouterr().out


def test_a_schedule_that_cannot_rise(tiny, capsys):
    """A warm-up longer than the run, one that reaches into wsd's decay, and onecycle, which has its
    own rise."""
    for change, said in (
        (
            {"warmup_steps": 2000},
            "warmup_steps 2000 of 12 steps: the rate never comes above 1.8e-05 of 0.003",
        ),
        (
            {"warmup_steps": 11, "lr_schedule": "wsd", "decay_frac": 0.5},
            "decay begins within the warm-up",
        ),
        (
            {"warmup_steps": 2000, "lr_schedule": "onecycle"},
            "onecycle 0.003 -> 0.0003, 30 % of it upwards: 3 warm-up",
        ),
    ):
        Trainer(tiny(**change)).close()
        out = capsys.readouterr().out
        assert said in out and ("never comes" in out) == ("never comes" in said)


def test_an_evaluation_that_cannot_be(tiny, shards, tmp_path, capsys):
    """Less held out than one window, nothing at all, one of two sources without any, and a handful
    of rows: a line each. With early_stopping_patience, which could then never stop anything,
    E114."""
    ids = (np.arange(3000) % 97).astype(np.uint16)
    np.save(tmp_path / "part_0.npy", ids)
    np.save(tmp_path / "val_0.npy", ids[:30])
    few = {"data_dir": str(tmp_path)}
    both = {
        "data_dir": ...,
        "data": {"sources": {"much": {"dir": shards}, "little": {"dir": str(tmp_path)}}},
    }
    for change, said in (
        (few, "no source has a validation window of 33 tokens"),
        ({"val_fraction": 0.0}, "as val_fraction is 0"),
        (both, "no validation in little: val_loss is of the others alone"),
        ({"val_fraction": 0.01}, "an evaluation reads 7 rows of 32 tokens"),
        ({"eval_tokens": 64}, "an evaluation reads 2 rows of 32 tokens"),
    ):
        Trainer(tiny(**change)).close()
        out = capsys.readouterr().out
        assert said in out, (said, out)
    Trainer(tiny()).close()
    assert "advice     an evaluation" not in capsys.readouterr().out
    for change in (few, {"val_fraction": 0.0}):
        with pytest.raises(UserError, match="E114.*early_stopping_patience: 2"):
            Trainer(tiny(**change, early_stopping_patience=2))


def test_a_wait_for_data_that_no_gpu_felt(tiny, monkeypatch):
    """The host waits for data while a GPU computes (its queue is emulated): that is no wait of the
    run; what the GPU waited is; and what ranks compare is the GPU's time, not that of launching."""
    trainer = Trainer(tiny(max_steps=8, log_interval=8))
    trainer.watch.runs_ahead = True
    clock = {
        "host": 0.0,
        "device": 0.0,
    }  # seconds; the device begins a piece of work when it was queued, or later

    class Event:
        def __init__(self):
            self.at = clock["device"] = max(clock["device"], clock["host"])

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    following, forward = trainer.loader.next, trainer.model.forward

    def late():
        clock["host"] += 0.3
        return following()

    def work(*args, **more):
        clock["device"] = max(clock["device"], clock["host"]) + 0.5
        return forward(*args, **more)

    trainer.loader.next, trainer.model.forward = late, work
    monkeypatch.setattr(stopwatch, "event_now", Event)
    assert trainer.fit() == 0
    on = trainer.watch.on_device
    assert on["compute"] == pytest.approx(0.5 * 8 * 2), "of the queue, not of the host"
    assert on["data"] == pytest.approx(0.3), "the first read alone; later the device still worked"
    assert trainer.watch.spent["data"] == on["data"], "the host's wait is none of the run's"
    assert trainer.orchestrator.counters()["compute"] == on["compute"]


def test_commands_in_one_go_are_done_in_their_order(tiny):
    """`save` and then `rollback_steps`, written into control.jsonl at once: what was there is
    saved, then it goes back. A rollback alone saves too, and does not delete the checkpoint it
    needs."""
    back = json.dumps({"method": "rollback_steps", "args": [3]}) + "\n"
    for name, lines, limit in (("both", ("save", back), 0), ("alone", (back,), 1)):
        keys = tiny(name, max_steps=14, save_interval=4, save_total_limit=limit)
        keys |= {"orchestrator": {"snapshot_interval": 0}}
        trainer = steps_of(keys, *lines, at=7)
        rows = [r for r in decisions(trainer) if r.get("trigger") == "user"]
        assert [r["action"] for r in rows] == [
            json.loads(line)["method"] if line[0] == "{" else line for line in lines
        ]
        gone = rows[-1]
        assert gone["executed"] and gone["args"]["to_step"] == 4 and gone["before"]["step"] == 7
        aside = {p.name for p in trainer.out.glob("*.rolled_back")}
        assert "step_00000007.rolled_back" in aside, "what was undone is still there"
        assert trainer.step == 14


def test_commands_as_other_programs_write_them(tiny):
    """A byte order mark before the first line, and no newline after the last: both are read,
    once."""
    line = json.dumps({"method": "adjust_weight_decay", "args": [0.05]}) + "\n"
    trainer = steps_of(tiny(), "\ufeff" + line, json.dumps({"method": "save"}), at=3)
    rows = [
        (r["action"], r.get("refused")) for r in decisions(trainer) if r.get("trigger") == "user"
    ]
    assert rows == [("adjust_weight_decay", None), ("save", None)]


def test_the_story_of_a_run_in_which_nothing_happened(tiny, capsys, tmp_path):
    """`bench.py decisions` of a healthy run, which has no decisions.jsonl, is no error; of no run
    it is."""
    trainer = steps_of(tiny())
    capsys.readouterr()
    assert report.main([str(trainer.out)]) == 0
    assert "nothing had to be decided" in capsys.readouterr().out
    with pytest.raises(UserError, match="E108"):
        report.main([str(tmp_path / "none")])


def test_a_presets_prompt_goes_with_its_data(tmp_path, shards):
    """quickstart on one's own data: its sample_prompt, a piece of Python, is not continued, the
    sample begins a new text. One that is typed is, and so is that of one's own YAML, and the
    preset's on its own data."""
    own = write_yaml(tmp_path / "own.yaml", {"data_dir": "x", "sample_prompt": "Once"})
    for words, prompt in (
        (["quickstart", "--prepare", "null", "--data_dir", shards], ""),
        (
            ["quickstart", "--prepare", "null", "--data_dir", shards, "--sample_prompt", "Once"],
            "Once",
        ),
        ([str(own), "--data_dir", shards], "Once"),
    ):
        assert read_config(words)[0].sample_prompt == prompt
    assert read_config(["quickstart"])[0].sample_prompt.startswith("class")


def test_advice_on_memory_only_where_something_is_read_twice(tiny, capsys):
    """A short look at much data cannot memorise it."""
    for steps, said in ((12, False), (400, True)):
        Trainer(tiny(model={"d_model": 128, "d_ff": 256}, max_steps=steps)).close()
        assert ("memorises" in capsys.readouterr().out) == said


def test_the_log_line_has_what_people_look_for(tiny):
    """Perplexity, the balance loss of experts, elapsed and remaining time, on one line."""
    trainer = steps_of(tiny(model={"n_experts": 4, "d_expert": 16}))
    line = next(x for x in told(trainer).splitlines() if x.startswith("step "))
    assert all(
        word in line
        for word in ("loss ", "ppl ", "aux ", "lr ", "norm ", "tok/s", " gone, ", " left")
    )
    plain = steps_of(tiny("dense"))
    assert "  aux " not in told(plain)


def test_the_peak_was_measured_while_the_machine_was_busy(tiny, monkeypatch):
    """A run then came out above 100 % of what the machine can do: it is measured again, and while
    that says the same such a share is not a number."""
    measured = iter([1.0, 1e18])

    def peak(m):
        return next(measured)

    trainer = Trainer(tiny(max_steps=3))
    trainer.found.peak = 1.0
    monkeypatch.setattr(machines, "peak_flops", peak)
    trainer.fit()
    assert told(trainer).count("  mfu -  ") == 1
    mfu = [r["mfu"] for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r]
    assert mfu[0] is None and 0 < mfu[1] < 1 and 0 < mfu[2] < 1
    assert list(measured) == [] and trainer.tell.peak_tries == 1


def test_overwrite_leaves_no_traces_of_the_run_before(tiny):
    """Curves, a picture and checkpoints set aside belong to the run that is overwritten; a file of
    the user's stays."""
    trainer = steps_of(tiny())
    for name in (
        "tensorboard/events.out.tfevents.1",
        "step_00000008.rolled_back/state.json",
        "training.png",
    ):
        (trainer.out / name).parent.mkdir(exist_ok=True)
        (trainer.out / name).write_text("old")
    for name in ("tensorboard/mine.txt", "notes.md"):
        (trainer.out / name).write_text("mine")
    Trainer(tiny(resume="none", overwrite=True, max_steps=2)).close()
    left = {str(p.relative_to(trainer.out)) for p in trainer.out.rglob("*") if p.is_file()}
    assert {"tensorboard/mine.txt", "notes.md"} <= left and not [
        p for p in left if "rolled" in p or "tfevents" in p
    ]
    assert "training.png" not in left


def test_wandb_goes_on_with_the_run_and_is_quiet(tiny, monkeypatch, capfd):
    """Stopped and started again it is one run of wandb, also offline, in one line; overwritten it
    is another."""
    made = []

    class Settings(dict):
        def __init__(self, **options):
            self.update(options)

    class Run:
        url = None

        def __init__(self, **options):
            made.append(options)
            self.id, self.dir = options["id"] or f"id{len(made)}", "w/offline-run/files"

        def define_metric(self, *args, **more): ...

    fake = types.SimpleNamespace(
        init=Run, Settings=Settings, log=lambda row: None, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(Run, "log", lambda self, row: None, raising=False)
    monkeypatch.setattr(Run, "finish", lambda self: None, raising=False)
    steps_of(tiny(max_steps=4, wandb_project="p"))
    trainer = steps_of(tiny(max_steps=8, wandb_project="p"))
    steps_of(tiny(max_steps=4, wandb_project="p", resume="none", overwrite=True))
    assert [(o["id"], o["resume"]) for o in made] == [
        (None, "allow"),
        ("id1", "allow"),
        (None, "allow"),
    ]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb")]
    assert len(lines) == 3 and "run id1, offline:" in lines[1] and trainer.report.wandb_id == "id1"


def test_the_picture_names_only_what_happened(tmp_path, monkeypatch):
    """A run without a rollback and without an evaluation: its legend speaks of neither."""
    figure, legends = pytest.importorskip("matplotlib.figure"), []

    def savefig(self, path, **options):
        legends.append([text.get_text() for text in self.axes[0].get_legend().get_texts()])

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    row = {"loss": 3.0, "lr": 1e-3, "grad_norm": 1.0}
    for more in ([], [row | {"step": 2}, {"step": 3, "val_loss": 3.1}]):
        rows = [row | {"step": 2}, row | {"step": 3}, *more]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert report.main([str(tmp_path), "--picture"]) == 0
    assert legends == [["training"], ["training", "rolled back", "validation"]]


def test_the_console_is_short_and_train_log_is_whole(tiny, capsys):
    """The reasons and the arithmetic of a start are in train.log alone; all of the console is there
    too. The first step is told at once, also of a run that goes on."""
    keys = tiny(model={"n_experts": 4, "d_expert": 16}, log_interval=8, save_interval=6)
    trainer = steps_of(keys, "stop", at=6)
    out, log = capsys.readouterr().out, told(trainer)
    for head in ("plan", "backend", "compute", "settings", "attention", "parts"):
        assert f"\n{head} " not in out and f"\n{head} " in log, head
    assert set(out.splitlines()) <= set(log.splitlines())
    assert f"step      1/{trainer.run.max_steps}  loss" in out and "(guessing: 4.57)" in out
    assert log.endswith("next       the same command goes on from here\n"), "it was stopped"
    trainer = Trainer(keys)
    first = trainer.step + 1
    assert 1 < first < 8
    trainer.fit()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert said[0].startswith(f"step {first:>6}/") and "guessing" not in said[0]
    assert f"next       python sample.py {trainer.out} --prompt" in told(trainer).splitlines()[-1]
