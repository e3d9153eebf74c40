"""Damaged files, consoles that go, disks and folders that refuse, clocks that are set back."""

import errno
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, read_lines, run_python, write_yaml
from rig import bytes_data, stop_at

import prepare_data
from lumen import checkpoint, files, plan
from lumen.errors import UserError
from lumen.resolve import memory_at_hand
from prepare_data import prepare
from train import Trainer

# ---------------------------------------------------------------- a run has one owner; restarts;
# consoles, disks


def flip(folder):
    file = folder / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A few documents with their tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "bytes"
    prepare(["synthetic:60"], str(folder), tokenizer="bytes", quiet=True)
    return str(folder)


# ---------------------------------------------------------------- what was damaged


def test_damaged_newer_checkpoints_do_not_eat_the_good_one(tiny):
    """Bits flipped in the three newest of five. The run goes on from the one before; what it saves
    then is kept, is the newest, and is gone on from; the damaged ones are there under another
    name."""
    keys = tiny(max_steps=20, save_total_limit=5)
    assert Trainer(keys).fit() == 0
    for step in (12, 16, 20):
        flip(checkpoint.step_dir(keys["out_dir"], step))
    keys["save_total_limit"] = 3
    trainer = stop_at(Trainer(keys), 9)
    assert trainer.step == 8 and trainer.fit() == 0
    assert checkpoint.list_steps(trainer.out) == [4, 8, 10]
    aside = sorted(p.name for p in trainer.out.glob("*.damaged"))
    assert aside == [f"step_{s:08d}.damaged" for s in (12, 16, 20)]
    assert json.loads((trainer.out / "best.json").read_text())["step"] in (4, 8, 10)
    again = Trainer(keys)
    assert again.step == 10 and again.fit() == 0
    assert checkpoint.find(again.out).step == checkpoint.find(again.out, best=True).step == 20
    assert stop_at(Trainer(keys | {"resume": "none", "overwrite": True}), 0).fit() == 0
    assert not list(again.out.glob("*.damaged")), "overwrite leaves nothing of the old run"


def test_the_best_was_damaged(tiny):
    """The newest is whole, the best before it was set aside: the best of those still there takes
    its place."""
    keys = tiny(max_steps=8, save_total_limit=0)
    assert Trainer(keys).fit() == 0
    out = Path(keys["out_dir"])
    good = checkpoint.Checkpoint(checkpoint.step_dir(out, 4)).state["val_loss"]
    assert checkpoint.best_step(out) == 8
    stop_at(
        Trainer(keys | {"max_steps": 10, "learning_rate": 1.0, "warmup_steps": 0}), 9
    ).fit()  # and worse
    checkpoint.set_damaged_aside(checkpoint.step_dir(out, 8))
    trainer = Trainer(keys | {"max_steps": 10})
    assert trainer.step == 10 and (trainer.progress.best_step, trainer.progress.best_val_loss) == (
        4,
        good,
    )
    assert checkpoint.best_step(out) == 4 and checkpoint.find(out, best=True).step == 4
    trainer.close()


def test_what_cannot_be_read_now_is_not_called_damaged(tiny, monkeypatch):
    """A disk that fails for a moment: passed over, left as it is, and it does not push out what is
    saved meanwhile."""
    keys, real = tiny(max_steps=12), files.sha256
    assert Trainer(keys).fit() == 0

    def failing(path):
        if "step_00000012" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    trainer = stop_at(Trainer(keys | {"save_total_limit": 1}), 9)
    assert trainer.step == 8 and trainer.fit() == 0
    assert {10, 12} <= set(checkpoint.list_steps(trainer.out)) and not list(
        trainer.out.glob("*.damaged")
    )
    monkeypatch.undo()
    assert checkpoint.find(trainer.out).step == 12


# ---------------------------------------------------------------- consoles, signals, clocks


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("console", ["latin-1", "ascii", "closed pipe", "closed file", "full disk"])
def test_a_console_that_does_not_take_it(tiny, text, monkeypatch, console):
    """The letters of a sample on a console that lacks them, a pipe nobody reads, a full disk under
    train.log: the run is finished, its exit code is 0, and train.log has what there was room
    for."""
    closed = io.StringIO()
    closed.close()
    streams = {"closed pipe": Broken(), "closed file": closed}
    stream = streams.get(console) or io.TextIOWrapper(
        io.BytesIO(), encoding=console.replace("full disk", "utf-8")
    )
    keys = tiny(
        data_dir=text, model={"vocab_size": 0}, max_steps=2, sample_prompt="Ada \u2192 \udce9"
    )
    trainer = Trainer(keys)
    if console == "full disk":
        trainer.report.log_file.close()
        trainer.report.log_file = open("/dev/full", "w", buffering=1)
        trainer.report.furnish = lambda: None
    monkeypatch.setattr(sys, "stdout", stream)
    assert trainer.fit() == 0
    monkeypatch.undo()
    assert json.loads((trainer.out / "status.json").read_text())["state"] == "finished"
    if console != "full disk":
        assert "finished at step 2" in (trainer.out / "train.log").read_text()


@pytest.mark.parametrize(
    "end", ["| head -n 1", "> /dev/full", ">&-", "<&- >&- 2>&-", "> /dev/full 2>&1", "| true"]
)
def test_a_program_lasts_longer_than_its_console(tmp_path, end):
    """`| head`, a full disk behind the redirection, no stdout at all: the work is done, and that is
    what the exit code says. (prepare_data.py, export.py and both trainers are started so.)"""
    words = f"set -o pipefail; {sys.executable} tests/programs/lasting.py {tmp_path}/out {end}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1:strict"}
    result = subprocess.run(["bash", "-c", words], cwd=ROOT, env=env, capture_output=True)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert (tmp_path / "out").read_text() == "done"


def test_a_pipe_that_is_not_the_console(tmp_path):
    """Something else that a run talks to has gone: that is no order to stop with exit code 0."""
    code = "from lumen import launch\ndef main(argv): raise BrokenPipeError(32, 'Broken pipe')\n"
    assert run_python("-c", code + "launch.command(main, lasting=True)").returncode == 1
    assert run_python("-c", code + "launch.command(main)").returncode == 0


@pytest.mark.parametrize("number", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_the_terminal_goes(tiny, monkeypatch, capfd, number):
    """ssh breaks off (HUP), Ctrl-C, or TERM: the step is made and saved. Ctrl-C says that it was
    heard, and what a second one does. What nohup has set to be ignored stays ignored."""
    names = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")]
    before = {n: signal.getsignal(n) for n in names}
    try:
        trainer = Trainer(tiny(max_steps=12))
        stop_at(
            trainer,
            5,
            lambda: (
                setattr(trainer.signals, "stop", 0),
                signal.raise_signal(getattr(signal, number)),
            ),
        )
        assert trainer.fit() == 0 and checkpoint.list_steps(trainer.out) == [4, 6]
        status = json.loads((trainer.out / "status.json").read_text())
        assert (status["state"], status["code"]) == ("stopped", 0)
        assert ("Ctrl-C again leaves at once" in capfd.readouterr().err) == (number == "SIGINT")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Trainer(tiny(max_steps=12)).close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_the_clock_is_set_back(tiny, monkeypatch, capsys):
    """Somebody sets the clock back by hours at every look: no time that the run says is below
    zero."""
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    trainer = Trainer(tiny(max_steps=2))
    monkeypatch.setattr(time, "time", back)
    assert trainer.fit() == 0
    assert re.search(r"finished at step 2: .*, \d+m\d\ds", capsys.readouterr().out)


# ---------------------------------------------------------------- niceties


def test_a_file_system_that_cannot_sync_a_folder(tiny, tmp_path, monkeypatch, capfd):
    """fsync of a folder is refused, or the folder cannot even be opened: valid checkpoints and an
    export, exit code 0, one note. That bytes of a file are lost is no such thing."""
    from export import to_hf

    fsync, opens, failing = os.fsync, os.open, [errno.EINVAL]

    def no_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(failing[0], os.strerror(failing[0]))
        fsync(fd)

    def no_opening(path, flags, *args, **options):
        if failing[0] == errno.EACCES and os.path.isdir(path) and flags == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(path, flags, *args, **options)

    monkeypatch.setattr(files, "UNSYNCED", set())
    monkeypatch.setattr(os, "fsync", no_folders)
    monkeypatch.setattr(os, "open", no_opening)
    for failing[0] in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
        trainer = Trainer(tiny(f"run{failing[0]}", max_steps=2))
        assert trainer.fit() == 0 and checkpoint.find(trainer.out).step == 2
        to_hf(trainer.out, tmp_path / f"hf{failing[0]}", say=lambda text: None)
    assert capfd.readouterr().err.count("folders cannot be synced here") == 1
    failing[0] = errno.EIO
    assert Trainer(tiny("lost", max_steps=2)).fit() == 4


class Poor:
    """A service or a writer of charts that raises at every call."""

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls += 1
            raise RuntimeError(f"{name} is not to be had")

        return call

    calls = 0


@pytest.mark.parametrize("what", ["generate", "tokenizer", "suggest", "charts", "best.json"])
def test_a_nicety_fails(tiny, text, monkeypatch, what):
    """The sample's logits are NaN, its tokenizer.json cannot be read, suggested.yaml, best.json or
    a chart cannot be written: that is said, and the run is finished all the same. A chart that
    failed once is not tried again."""
    trainer = Trainer(
        tiny(
            data_dir=text, model={"vocab_size": 0}, max_steps=4, save_interval=2, sample_prompt="A"
        )
    )

    def fails(*args, **options):
        raise (
            FloatingPointError("not finite") if what == "generate" else RuntimeError("of a nicety")
        )

    if what == "generate":
        monkeypatch.setattr(trainer.model, "generate", fails)
    if what == "tokenizer":
        (trainer.out / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    if what == "suggest":
        monkeypatch.setattr(plan, "auto_steps", fails)
    if what == "charts":
        trainer.report.wandb, trainer.report.board = charts = [Poor(), Poor()]
    if what == "best.json":
        (trainer.out / "best.json").mkdir()
    assert trainer.fit() == 0
    status = json.loads((trainer.out / "status.json").read_text())
    assert (status["state"], status["code"]) == ("finished", 0)
    assert checkpoint.find(trainer.out).step == 4
    said = (trainer.out / "train.log").read_text()
    words = {
        "generate": "sample: FloatingPointError",
        "tokenizer": "sample: E116",
        "best.json": "best.json: Is",
    }
    assert said.count("note ") >= 1 and words.get(what, "") in said, said
    if what == "charts":
        assert [c.calls for c in charts] == [1, 1] and said.count(
            "nothing more is written to it"
        ) == 2


def test_data_finished_on_a_disk_that_is_read_only(text, tmp_path, monkeypatch):
    """`prepare:` names data that lie finished where nothing can be written or deleted: training
    starts."""

    real = Path.unlink

    def unlink(path, missing_ok=False):
        if str(path).startswith(text):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    spec = {"sources": ["synthetic:60"], "tokenizer": "bytes", "out": text}
    model = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}
    keys = {
        "prepare": spec,
        "out_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    assert Trainer(keys | {"model": model, "compile_model": False, "batch_size": 2}).fit() == 0


def test_out_dir_is_deleted_under_the_run(tiny, text):
    """`rm -rf` of the folder, or of files in it: with the next save all that sample.py needs is
    there again, and the folder has its owner."""
    trainer = Trainer(tiny(data_dir=text, model={"vocab_size": 0}, max_steps=8))
    stop_at(trainer, 5, lambda: shutil.rmtree(trainer.out))
    assert trainer.fit() == 0
    names = {p.name for p in trainer.out.iterdir()}
    assert {
        "tokenizer.json",
        "token_bytes.npy",
        "config.yaml",
        "train.log",
        "owner.json",
        "best.json",
    } <= names
    assert (
        "saved" in (trainer.out / "train.log").read_text()
        and checkpoint.find(trainer.out).step == 6
    )
    assert files.read_json(trainer.out / "owner.json")["pid"] is None
    from sample import load

    assert load(str(trainer.out))[1] is not None


def test_a_hint_of_another_device(tiny):
    """A GPU ran out of memory and left its hint; on one of another kind or size the batch is what
    was asked for."""
    keys = tiny(max_steps=1, batch_size=4)
    out = Path(keys["out_dir"])
    out.mkdir()
    trainer = Trainer(keys)
    here = memory_at_hand(trainer.machine)
    trainer.close()
    for device, rows in (
        (here, 2),
        (["NVIDIA H100", 80], 4),
        ([here[0], here[1] + 8], 4),
        (None, 2),
    ):
        hint = {"micro_batch": 2, "written": 4, "step": 1} | ({"device": device} if device else {})
        checkpoint.write_json(out / "oom_hint.json", hint)
        trainer = Trainer(keys)
        assert trainer.run.micro_batch == rows
        trainer.close()


# ---------------------------------------------------------------- text, shards, sums


def make_hole(folder, fill: int) -> str:
    """A hole in the first shard, as a broken copy leaves it: same size. Its path."""
    path = Path(folder) / "train_00000.npy"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes([fill]) * (len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("fill", [0, 255])
def test_a_shard_with_a_hole(fill, tiny, tmp_path):
    """100,000 zeros, or ids that no tokenizer has, in a shard of the right size: the run says which
    shard it is, saves and stops, instead of training on them; --verify says the same."""
    made = bytes_data(tmp_path / "data", "synthetic:60")
    config = tiny(
        data_dir=str(tmp_path / "data"),
        max_steps=100_000,
        model={"vocab_size": 260},
        log_interval=1000,
    )
    config |= {"save_interval": 100_000, "eval_interval": 0}
    trainer = Trainer(config | {"max_steps": 3, "out_dir": str(tmp_path / "good")})
    trainer.loader.sums.thread.join(20)
    trainer.fit()
    verified = read_lines(tmp_path / "good" / "verified.jsonl")
    assert {row["sha256"] for row in verified} == {
        s["sha256"] for x in made["splits"].values() for s in x["shards"]
    }
    prepare_data.main(["--verify", str(tmp_path / "data")])
    path = make_hole(tmp_path / "data", fill)
    with pytest.raises(UserError, match="E111") as caught:
        trainer = Trainer(config)
        if fill == 0:
            trainer.loader.sums.thread.join(20)
        trainer.fit()
    assert path in caught.value.text and checkpoint.list_steps(trainer.out)
    with pytest.raises(UserError, match="E111.*train_00000"):
        prepare_data.main(["--verify", str(tmp_path / "data")])


@pytest.mark.nightly
def test_two_ranks_hear_of_a_hole(tiny, tmp_path):
    """Rank 0 finds a wrong sum: both ranks end with E111 and a checkpoint, none waits for the
    other."""
    bytes_data(tmp_path / "data", "synthetic:60")
    path = make_hole(tmp_path / "data", 0)
    config = tiny(
        data_dir=str(tmp_path / "data"),
        max_steps=100_000,
        model={"vocab_size": 260},
        log_interval=1000,
    )
    result = run_python(
        "train.py", write_yaml(tmp_path / "c.yaml", config | {"save_interval": 100_000}), ranks=2
    )
    assert (
        result.returncode == 1
        and f"error E111: shard {path}" in result.stderr
        and "E601" not in result.stderr
    )
    assert checkpoint.list_steps(Path(config["out_dir"]))
