"""Accidents of real life: what people and machines do to a run, one test each. Nothing may be lost, nobody misled.

Each test is an accident that happened to somebody (a report about another trainer, a try of our own), told in its
docstring: what was done, and what must be there afterwards.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, fingerprint, read_lines, run_python, write_yaml
from safetensors.torch import load_file, save_file

import kernels
import prepare_data
import train
import train_fsdp
from export import main as export_main
from lumen import (
    checkpoint,
    config,
    files,
    launch,
    loader,
    plan,
    report,
    sources,
    stopwatch,
    tokenizer,
)
from lumen import machine as machines
from lumen import orchestrate as orchestrator
from lumen import owner as owners
from lumen.cli import presets, read_config
from lumen.config import Config, OrchestratorConfig, build_config
from lumen.errors import ERRORS, UserError
from model import HeadLoss, ModelConfig, Transformer
from prepare_data import main as prepare_main
from prepare_data import prepare
from tools import simulate
from train import Parallel, Trainer, main

# ---------------------------------------------------------------- a run has one owner; restarts; consoles, disks

HOLDER = """
import sys, time
from lumen import owner as owners
owner = owners.Owner(sys.argv[1])
owner.take()
print("mine", flush=True)
time.sleep(99)
"""


@contextlib.contextmanager
def owned(out):
    """Another process that owns the folder, and does nothing with it."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.kill()
        process.wait()


def everything(folder) -> dict:
    """Every file and folder: bytes and time of the last change."""
    found = {
        str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns)
        for p in Path(folder).rglob("*")
    }
    return {k: v for k, v in found.items() if not k.endswith("owner.json")} | {
        k: v[0] for k, v in found.items()
    }


def stop_at(trainer, step, then=None):
    """The signal to stop comes while `step` is read; `then()` is called with it."""
    following = trainer.loader.next

    def rows():
        if trainer.step == step and not trainer.stop_signal:
            trainer.stop_signal = 1
            if then:
                then()
        return following()

    trainer.loader.next = rows
    return trainer


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


def test_a_second_start_into_a_live_run(tiny, monkeypatch):
    """The same command twice, with overwrite or another model: the second hears who is at work and changes nothing, no
    checkpoint that is being written, no half line. When the first is killed with -9 the next start goes on."""
    keys = tiny(max_steps=4)
    assert Trainer(keys).fit() == 0
    out = Path(keys["out_dir"])
    (out / "step_00000009.tmp").mkdir()
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"half')
    monkeypatch.setattr(owners, "GRACE", 0.1)
    with owned(out) as first:
        before = everything(out)
        for changes in (
            {},
            {"resume": "none", "overwrite": True},
            {"model": keys["model"] | {"n_layers": 3}},
        ):
            with pytest.raises(UserError) as e:
                Trainer(keys | changes)
            who = f"process {first.pid} on {owners.identity()['host']}"
            assert e.value.code == "E300" and e.value.exit_code == 2 and who in e.value.text
        assert everything(out) == before
    trainer = Trainer(keys | {"max_steps": 6})
    assert trainer.step == 4 and not (out / "step_00000009.tmp").exists() and trainer.fit() == 0
    assert (
        checkpoint.list_steps(out)[-1] == 6 and files.read_json(out / "owner.json")["pid"] is None
    )


def test_a_start_that_is_refused_leaves_nothing(tiny, tmp_path):
    """A mistake in the YAML: no folder comes of it, and a run that is there stays as it was, to the byte."""
    with pytest.raises(UserError, match="E002"):
        Trainer(tiny("a/b/c", batch_tokens=100, gradient_accumulation_steps=...))
    assert not (tmp_path / "a").exists()
    keys = tiny(max_steps=2)
    assert Trainer(keys).fit() == 0
    for remains in (True, False):
        before = everything(keys["out_dir"])
        with pytest.raises(UserError, match="E305"):
            Trainer(keys | {"model": keys["model"] | {"d_ff": 64}})
        assert everything(keys["out_dir"]) == before
        if remains:
            (Path(keys["out_dir"]) / "owner.json").unlink()  # a run of before there was one


def test_owners_that_are_gone_and_owners_elsewhere(tmp_path, monkeypatch):
    """A file of a host that is not this one blocks while it is touched, by the clock of the file system; one from
    before this host's last boot, of a dead process, or not touched for long, blocks nobody."""
    monkeypatch.setattr(owners, "GRACE", 0)
    here, file = owners.identity(), tmp_path / "owner.json"
    elsewhere, rebooted = (
        here | {"host": "elsewhere", "locked": True},
        here | {"boot": "before", "locked": True},
    )
    contained = here | {
        "space": "pid:[1]",
        "locked": False,
    }  # a container beside this one: the same number is another
    dead = here | {"pid": 2**22 - 1, "began": "1", "locked": False}
    reused = here | {
        "pid": os.getppid(),
        "began": "1",
        "locked": False,
    }  # the number has come again
    parent = here | {"pid": os.getppid(), "began": launch.process(os.getppid()), "locked": False}
    cases = [
        (elsewhere, 0, True),
        (elsewhere, owners.STALE + 60, False),
        (rebooted, 0, False),
        (dead, 0, False),
    ]
    cases += [
        (contained, 0, True),
        (contained, 9999, False),
        (reused, 0, False),
        (parent, 9999, True),
    ]
    cases += [
        (parent | {"locked": True}, 0, False)
    ]  # its lock is not there: it was a copy of the folder
    cases += [({"pid": 5}, 0, True), ({}, 0, False), (elsewhere | {"pid": None}, 0, False)]
    monkeypatch.setattr(owners.time, "time", lambda: 0.0)  # the clock of this host says nothing
    for row, seconds, blocks in cases:
        file.write_text(json.dumps(row))
        now = os.stat(file).st_mtime
        os.utime(file, (now - seconds, now - seconds))
        owner = owners.Owner(tmp_path)
        if blocks:
            with pytest.raises(UserError, match="E300.*in use by process"):
                owner.take()
            assert json.loads(file.read_text()) == row
        else:
            owner.take()
            assert files.read_json(file)["pid"] == os.getpid(), row
        owner.release()
        assert json.loads(file.read_text() or "{}") == row, "never accepted: as it was"
    file.write_text('{"half')
    owners.Owner(tmp_path).take()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """The file alone must do: a live process on this host blocks, a killed one does not; of two that start at the same
    moment one has it; and an owner that was taken for dead notices before it saves."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owners, "GRACE", 0)
    monkeypatch.setattr(owners.fcntl, "flock", flock)
    monkeypatch.setattr(owners, "SETTLE", 0.01)
    owner = owners.Owner(tmp_path)
    with owned(tmp_path):
        with pytest.raises(UserError, match="E300"):
            owner.take()
    owner.take()
    owner.accept()
    assert files.read_json(owner.path)["locked"] is False
    owner.keep()
    other = owners.identity() | {"host": "elsewhere", "pid": 7, "since": "now"}
    owner.path.write_text(json.dumps(other))
    with pytest.raises(OSError, match="process 7 on elsewhere"):
        owner.keep()
    owner.release()
    owner.path.unlink()
    sleep = owners.time.sleep
    monkeypatch.setattr(
        owners.time, "sleep", lambda s: (owner.path.write_text(json.dumps(other)), sleep(s))
    )
    with pytest.raises(UserError, match="E300"):
        owners.Owner(tmp_path).take()


def test_signs_of_life(tmp_path, monkeypatch):
    """An owner touches its file, so that other hosts see it live; nobody does once it has ended."""
    monkeypatch.setattr(owners, "BEAT", 0.02)
    owner = owners.Owner(tmp_path)
    owner.take()
    os.utime(owner.path, (1, 1))
    until = time.monotonic() + 20
    while os.stat(owner.path).st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert os.stat(owner.path).st_mtime > 2
    owner.accept()
    del owner  # nobody closed it
    gc.collect()
    time.sleep(0.1)
    assert files.read_json(tmp_path / "owner.json")["pid"] is None
    os.utime(tmp_path / "owner.json", (1, 1))
    time.sleep(0.1)
    assert os.stat(tmp_path / "owner.json").st_mtime < 2


def test_a_restart_waits_for_the_one_before_it(tiny, monkeypatch):
    """Slurm starts a job again while its last process is still dying: it waits instead of being refused for good."""
    keys = tiny(max_steps=2)
    monkeypatch.setattr(owners, "GRACE", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(keys["out_dir"]) as first:
        threading.Timer(0.5, first.kill).start()
        assert Trainer(keys).fit() == 0


def test_a_notebook_that_makes_its_trainer_again(tiny, monkeypatch):
    """After an exception, or without one, a new Trainer in the same process has the run; not while the other trains."""
    monkeypatch.setattr(owners, "GRACE", 0)
    keys, said = tiny(max_steps=6), []

    def again():
        with pytest.raises(UserError, match="E300.*of this process") as e:
            Trainer(keys)
        said.append(e.value.code)
        raise KeyboardInterrupt

    first = stop_at(Trainer(keys), 3, again)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = Trainer(keys)
    assert said == ["E300"] and second.fit() == 0 and checkpoint.list_steps(second.out)[-1] == 6
    with owned(second.out):
        pass  # it was given back: another process can have it


@pytest.mark.parametrize(
    "env",
    [
        {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "1",
        },
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "4"},
    ],
)
def test_srun_without_torchrun(tiny, tmp_path, monkeypatch, env):
    """`srun -n 2 python train.py`, or mpirun: two whole runs in one folder are refused at once, with what to type. A
    batch script that asked for many tasks and starts one, and ranks of torchrun under srun, are none of that."""
    path = write_yaml(
        tmp_path / "c.yaml", tiny(prepare={"sources": ["stdlib"], "out": str(tmp_path / "data")})
    )
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="E600.*slurm/train.sbatch"):
        train.main([str(path)])
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()
    monkeypatch.setenv("RANK", "0")
    launch.check_tasks()
    monkeypatch.delenv("RANK")
    for name in env:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    launch.check_tasks()


@pytest.mark.parametrize("words", [{"resume": "none"}, {"resume": "none", "overwrite": True}])
def test_words_of_a_launch_are_not_words_of_its_restarts(tiny, monkeypatch, words):
    """`resume: none`, with overwrite or without, and a job that is preempted: the restart goes on from what the first
    start saved. If that died before it came to own the folder, the restart does what it would have done."""
    keys = tiny(max_steps=12) | words
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    stop_at(Trainer(keys), 5).fit()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = stop_at(Trainer(keys), 8)
    assert again.step == 6 and again.fit() == 0 and checkpoint.list_steps(again.out)[-1] == 9
    monkeypatch.setenv("SLURM_JOB_ID", "2")  # another launch, whose first start died early
    if not words.get("overwrite"):
        with pytest.raises(UserError, match="E300"):
            Trainer(keys)
        assert checkpoint.list_steps(again.out) == [4, 6, 8, 9]
        return
    assert stop_at(Trainer(keys), 1).fit() == 0 and checkpoint.list_steps(again.out) == [2]
    third = Trainer(keys)
    assert third.step == 2, "its own second restart goes on"
    third.close()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert Trainer(keys).step == 2, "where nobody can say which launch it was, nothing is deleted"


def test_what_an_earlier_launch_died_of_ends_no_restart(tiny, monkeypatch):
    """The run diverged last week. Today's job dies before it has begun and is started again: it is not refused with
    last week's words; its own are."""
    keys = tiny(max_steps=2)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainer = Trainer(keys)
    trainer.write_status("diverged", 3, "E301: it diverged")
    trainer.close()
    assert owners.hopeless(keys["out_dir"])["code"] == 3
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert owners.hopeless(keys["out_dir"]) is None


@pytest.mark.nightly
def test_overwrite_under_torchrun_whose_rank_dies(tiny, tmp_path):
    """A rank is killed after the first checkpoint; torchrun starts all with the same words: nothing is deleted."""
    keys = tiny(resume="none", overwrite=True, save_interval=4, max_steps=12)
    code = "import os, sys, train\nfrom lumen import launch\ntake = train.Trainer.finish_pending_step\ndef drain(self):\n"
    code += "    if self.step == 6 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os.kill(os.getpid(), 9)\n"
    code += "    return take(self)\ntrain.Trainer.finish_pending_step = drain\nlaunch.command(train.main, lasting=True)\n"
    (tmp_path / "dies.py").write_text(code)
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=1",
        "--master_port=29617",
    ]
    result = run_python(*words, tmp_path / "dies.py", write_yaml(tmp_path / "c.yaml", keys))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    rows = [
        r for r in read_lines(tmp_path / "run/metrics.jsonl") if r["attempt"] == 2 and "loss" in r
    ]
    assert rows[0]["step"] == 5, "from the checkpoint at 4"


# ---- what was damaged


def test_damaged_newer_checkpoints_do_not_eat_the_good_one(tiny):
    """Bits flipped in the three newest of five. The run goes on from the one before; what it saves then is kept, is the
    newest, and is gone on from; the damaged ones are there under another name."""
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
    """The newest is whole, the best before it was set aside: the best of those still there takes its place."""
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
    assert trainer.step == 10 and (trainer.best_step, trainer.best_val_loss) == (4, good)
    assert checkpoint.best_step(out) == 4 and checkpoint.find(out, best=True).step == 4
    trainer.close()


def test_what_cannot_be_read_now_is_not_called_damaged(tiny, monkeypatch):
    """A disk that fails for a moment: passed over, left as it is, and it does not push out what is saved meanwhile."""
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


# ---- consoles, signals, clocks


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("console", ["latin-1", "ascii", "closed pipe", "closed file", "full disk"])
def test_a_console_that_does_not_take_it(tiny, text, monkeypatch, console):
    """The letters of a sample on a console that lacks them, a pipe nobody reads, a full disk under train.log: the run
    is finished, its exit code is 0, and train.log has what there was room for."""
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


LASTS = """
import sys
from lumen import launch
def main(argv):
    for i in range(3000): print("caf\\u00e9 \\u2192 \\udce9", i)
    print("still here", file=sys.stderr)
    open(argv[0], "w").write("done")
launch.command(main, lasting=True)
"""


@pytest.mark.parametrize(
    "end", ["| head -n 1", "> /dev/full", ">&-", "<&- >&- 2>&-", "> /dev/full 2>&1", "| true"]
)
def test_a_program_lasts_longer_than_its_console(tmp_path, end):
    """`| head`, a full disk behind the redirection, no stdout at all: the work is done, and that is what the exit code
    says. (prepare_data.py, export.py and both trainers are started so.)"""
    (tmp_path / "program.py").write_text(LASTS)
    words = f"set -o pipefail; {sys.executable} {tmp_path}/program.py {tmp_path}/out {end}"
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
    """ssh breaks off (HUP), Ctrl-C, or TERM: the step is made and saved. Ctrl-C says that it was heard, and what a
    second one does. What nohup has set to be ignored stays ignored."""
    names = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")]
    before = {n: signal.getsignal(n) for n in names}
    try:
        trainer = Trainer(tiny(max_steps=12))
        stop_at(
            trainer,
            5,
            lambda: (
                setattr(trainer, "stop_signal", 0),
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
    """Somebody sets the clock back by hours at every look: no time that the run says is below zero."""
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    trainer = Trainer(tiny(max_steps=2))
    monkeypatch.setattr(time, "time", back)
    assert trainer.fit() == 0
    assert re.search(r"finished at step 2: .*, \d+m\d\ds, the orch", capsys.readouterr().out)


# ---- niceties


def test_a_file_system_that_cannot_sync_a_folder(tiny, tmp_path, monkeypatch, capfd):
    """fsync of a folder is refused, or the folder cannot even be opened: valid checkpoints and an export, exit code 0,
    one note. That bytes of a file are lost is no such thing."""
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


@pytest.mark.parametrize(
    "what", ["generate", "tokenizer", "suggest", "charts", "best.json"]
)
def test_a_nicety_fails(tiny, text, monkeypatch, what):
    """The sample's logits are NaN, its tokenizer.json cannot be read, suggested.yaml, best.json or a chart cannot be
    written: that is said, and the run is finished all the same. A chart that failed once is not tried again."""
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
    """`prepare:` names data that lie finished where nothing can be written or deleted: training starts."""

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
    """`rm -rf` of the folder, or of files in it: with the next save all that sample.py needs is there again, and the
    folder has its owner."""
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
    """A GPU ran out of memory and left its hint; on one of another kind or size the batch is what was asked for."""
    keys = tiny(max_steps=1, batch_size=4)
    out = Path(keys["out_dir"])
    out.mkdir()
    trainer = Trainer(keys)
    here = trainer.memory_at_hand()
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


# ---------------------------------------------------------------- what belongs to the data; moved and resumed runs

TEXTS = {  # three languages; the third speaks as the first does
    "a": "".join(f"the cat {i % 7} sat on the mat {i % 5} and slept\n\n" for i in range(900)),
    "b": "".join(
        f"zwei {i % 9} kleine jecke {i % 4} fuhren quer durch xyz\n\n" for i in range(900)
    ),
}
TEXTS["more"] = TEXTS["a"].replace("cat", "dog") * 2


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Folders of data: `a` and `b` with a tokenizer each of equally many ids, `more` with a's, `bytes` with bytes."""
    top = tmp_path_factory.mktemp("spoken")
    for name, text in TEXTS.items():
        (top / f"{name}.txt").write_text(text)
    for name, source, spec in (
        ("a", "a", "bpe:270"),
        ("b", "b", "bpe:270"),
        ("more", "more", str(top / "a")),
        ("bytes", "a", "bytes"),
    ):
        options = {"val_fraction": 0.2, "max_doc_chars": 500, "workers": 1, "quiet": True}
        prepare([str(top / f"{source}.txt")], str(top / name), spec, **options)
    return top


def speak(tiny, data, name="run", **changes) -> dict:
    """Keys of a run on prepared data."""
    keys = tiny(name, {"vocab_size": 0}, val_fraction=..., save_interval=2, max_steps=4)
    return keys | {"data_dir": str(data)} | changes


def trained(keys) -> Trainer:
    trainer = Trainer(keys)
    assert trainer.fit() == 0
    return trainer


def sum_of(data) -> str:
    return json.loads((data / "manifest.json").read_text())["tokenizer"]["sha256"]


def damage(folder, name: str, value: float) -> None:
    """Put `value` into a tensor of a checkpoint, with all sums right again: so a run that diverged leaves it."""
    file = Path(folder) / "rank_00000.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    manifest["files"][file.name] = {"sha256": files.sha256(file), "size": file.stat().st_size}
    checkpoint.write_json(
        Path(folder) / "manifest.json", manifest | {"sha256": checkpoint.manifest_sha256(manifest)}
    )


def test_weights_of_another_tokenizer(tiny, spoken, tmp_path, capsys):
    """init_from a run whose tokenizer is not that of the data, of as many ids: trained from noise, without a word."""
    first = trained(speak(tiny, spoken / "a", "first"))
    fresh = speak(tiny, spoken / "b", "second", init_from=str(first.out))
    for init_from in (first.out, checkpoint.step_dir(first.out, 2)):
        with pytest.raises(UserError, match="E113.*--tokenizer") as error:
            Trainer(fresh | {"init_from": str(init_from)})
        assert all(sum_of(spoken / name) in error.value.text for name in "ab")
    assert not Path(fresh["out_dir"]).exists(), "who is refused changes nothing"
    meant = Trainer(fresh | {"allow_tokenizer_change": True})
    assert any("another tokenizer" in line for line in meant.changes)
    meant.close()
    good = Trainer(speak(tiny, spoken / "more", "third", init_from=str(first.out)))
    assert not good.changes
    good.close()
    with pytest.raises(UserError, match="E113.*--tokenizer"):  # not: ten keys of the model differ
        Trainer(fresh | {"data_dir": str(spoken / "bytes")})
    with pytest.raises(UserError, match="E305.*vocab_size: 270 there, 260 here.*--tokenizer"):
        Trainer(fresh | {"data_dir": str(spoken / "bytes"), "allow_tokenizer_change": True})


def test_weights_and_tokenizer_of_a_hugging_face_folder(tiny, spoken, tmp_path):
    """The same from a Hugging Face folder, whose tokenizer.json another program wrote anew: its content counts."""
    from export import from_hf, to_hf

    first = trained(
        speak(
            tiny, spoken / "a", "first", model=tiny()["model"] | {"vocab_size": 0, "dropout": 0.0}
        )
    )
    to_hf(first.out, folder := tmp_path / "hf", say=print)
    whole = json.loads((folder / "tokenizer.json").read_text())
    del whole["model"]["name"]
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=2))
    from_hf(folder, tmp_path / "imported")
    for source in (folder, tmp_path / "imported"):
        Trainer(speak(tiny, spoken / "a", f"good {source.name}", init_from=str(source))).close()
        with pytest.raises(UserError, match=f"E113.*{sum_of(spoken / 'b')}"):
            Trainer(speak(tiny, spoken / "b", "bad", init_from=str(source)))
    (folder / "tokenizer.json").unlink()
    silent = Trainer(speak(tiny, spoken / "b", "silent", init_from=str(folder)))
    assert sum("cannot say" in line for line in silent.changes) == 1, "nothing to compare: one note"
    silent.close()


def test_a_run_goes_on_with_another_tokenizer(tiny, spoken, capsys):
    """allow_data_change onto data of another tokenizer: out_dir kept the first one's tokenizer.json, and all its text
    was nonsense. Refused; where it is meant, each step is read with its own."""
    import sample

    keys = speak(tiny, spoken / "a", save_total_limit=0)
    out = trained(keys).out
    other = keys | {"data_dir": str(spoken / "b"), "max_steps": 6, "allow_data_change": True}
    with pytest.raises(UserError, match=f"E113.*{sum_of(spoken / 'a')}.*{sum_of(spoken / 'b')}"):
        Trainer(other)
    assert (out / "tokenizer.json").read_bytes() == (spoken / "a/tokenizer.json").read_bytes()
    trained(other | {"allow_tokenizer_change": True})
    for name in ("tokenizer.json", "token_bytes.npy"):
        assert (out / name).read_bytes() == (spoken / "b" / name).read_bytes()
    for step, name in ((4, "a"), (6, "b")):
        assert sample.load(out, step=step)[1].sha256 == sum_of(spoken / name)


def test_numbers_of_another_validation_set_are_not_compared(tiny, spoken, capsys):
    """A run went on with other data: the best of the old validation text stayed the best for ever, --best gave the old
    model and patience counted against it. All of that begins anew, and is kept where the set is the same."""
    keys = speak(tiny, spoken / "a", early_stopping_patience=5)
    first = trained(keys)
    assert first.best_step == 4

    def again(**changes):
        trainer = Trainer(keys | {"allow_data_change": True, "max_steps": 6} | changes)
        found = trainer.best_val_loss, trainer.best_step, (trainer.out / "best.json").exists()
        trainer.close()
        return found

    assert again() == (first.best_val_loss, 4, True), "the same set"
    capsys.readouterr()
    for change in ({"data_dir": str(spoken / "more")}, {"eval_tokens": 512}):
        shutil.copytree(first.out, copy := Path(f"{first.out}-{len(change)}-{[*change][0]}"))
        assert again(**change, out_dir=str(copy)) == (None, None, False), change
        assert capsys.readouterr().out.count("begins anew") == 1
    last = trained(
        keys | {"allow_data_change": True, "max_steps": 6, "data_dir": str(spoken / "more")}
    )
    assert (
        last.best_step == 6
        and checkpoint.best_step(last.out) == 6
        and not last.evaluations_since_best
    )


def test_more_text_for_training_leaves_the_validation_set_as_it_is(tiny, shards, tmp_path):
    """Shards were added, the val_ shard is the same: its best is still the best."""
    shutil.copytree(shards, folder := tmp_path / "data")
    (folder / "part_2.npy").rename(folder / "val_0.npy")
    best = trained(tiny(data_dir=str(folder), max_steps=4)).best_val_loss
    np.save(folder / "part_9.npy", np.arange(3000, dtype=np.uint16) % 97)
    again = Trainer(tiny(data_dir=str(folder), max_steps=5, allow_data_change=True))
    assert again.best_val_loss == best
    again.close()


def test_weights_that_are_nan(tiny, tmp_path):
    """A run that diverged was taken as init_from: three steps, then "lower learning_rate". Its export was "a bug"."""
    from export import from_hf, to_hf

    first = trained(tiny("first", {"dropout": 0.0}, max_steps=4))
    to_hf(first.out, tmp_path / "hf")
    step, name = checkpoint.step_dir(first.out, 4), "blocks.1.attn.wo.weight"
    damage(step, f"model.{name}", 1e6)
    with pytest.raises(UserError, match=f"E400.*float16 cannot hold.*{name}"):
        to_hf(first.out, tmp_path / "x", dtype="float16")
    for value, word in ((math.nan, "NaN"), (-math.inf, "inf")):
        damage(step, f"model.{name}", value)
        with pytest.raises(UserError, match=f"E303.*{name} holds {word}"):
            Trainer(tiny("second", init_from=str(step)))
        with pytest.raises(UserError, match=f"E303.*{name} holds {word}"):
            to_hf(first.out, tmp_path / "x", check=True)
    damage(step, f"model.{name}", 0.0)
    damage(step, f"optim.{name}.exp_avg_sq", math.inf)
    with pytest.raises(UserError, match="E303.*exp_avg_sq holds inf"):
        Trainer(tiny("first", {"dropout": 0.0}, max_steps=6))
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="E401.*norm.weight holds NaN"):
        from_hf(tmp_path / "hf", tmp_path / "imported")
    with pytest.raises(UserError, match="E303.*norm.weight holds NaN"):
        Trainer(tiny("third", {"dropout": 0.0}, init_from=str(tmp_path / "hf")))


def test_resume_from_an_older_step(tiny, tmp_path):
    """`--resume out/x/step_00000004` of 12: to the same bytes as never stopped, in its own folder and in another."""
    whole = trained(tiny("whole")).out
    shutil.copytree(whole, own := tmp_path / "own")
    (own / "control.jsonl").write_text(
        '{"action": "stop"}\n'
    )  # written to a course that is left now
    older = {"resume": str(own / "step_00000004")}
    again = Trainer(tiny("own", **older))
    assert again.step == 4 and checkpoint.list_steps(own) == [4]
    assert again.fit() == 0 and fingerprint(own, 12) == fingerprint(whole, 12) | {
        "orchestrator": json.loads((own / "step_00000012/state.json").read_text())["orchestrator"]
    }
    assert (own / "step_00000012.rolled_back/manifest.json").exists(), "set aside, not deleted"
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    other = trained(tiny("other", resume=str(whole / "step_00000004"))).out
    assert fingerprint(other, 12) == fingerprint(whole, 12)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}, (
        "the original is untouched"
    )


def test_resume_from_a_path_is_started_again(tiny, tmp_path, monkeypatch, capsys):
    """The same command again, or a requeue of it: what was done since is gone on with, also where PATH was pruned
    since; and a death before the first save begins at PATH again."""
    whole = trained(tiny("whole")).out
    for name, path in (("whole", whole / "step_00000004"), ("other", whole / "step_00000004")):
        keys = tiny(name, resume=str(path))
        Trainer(keys).close()  # and dies
        trainer = Trainer(keys)
        assert trainer.step == 4
        trainer.stop_signal = 1
        trainer.fit()
        step = max(checkpoint.list_steps(trainer.out))
        assert step > 4
        if name == "other":
            shutil.rmtree(path)
        again = Trainer(keys)
        assert again.step == step
        again.close()
    with pytest.raises(UserError, match="E300.*is of another: give a new out_dir"):
        Trainer(tiny("other", resume=str(tmp_path / "whole")))
    monkeypatch.setattr("train.prepare_first", None)  # nothing is prepared
    capsys.readouterr()
    for changes in (
        {"resume": "/no/such/step_00000004"},
        {"resume": str(tmp_path)},
        {"init_from": str(tmp_path)},
    ):
        with pytest.raises(UserError, match="E304: (resume|init_from): "):
            Trainer(tiny("new", **changes))
    assert not capsys.readouterr().out, "before the start block"


def test_a_run_that_was_moved(tiny, tmp_path, capsys):
    """`mv out/x out/y`, `cp -r out/x out/z`, then `train.py out/y/config.yaml`: a new run began at the old place."""
    old = trained(tiny("old", max_steps=4)).out
    shutil.copytree(old, copy := tmp_path / "copy")
    old.rename(moved := tmp_path / "moved")
    capsys.readouterr()
    for folder in (moved, copy):
        trainer = Trainer([str(folder / "config.yaml"), "--max_steps", "5"])
        assert (trainer.out, trainer.step) == (folder, 4)
        assert "it says" in capsys.readouterr().out
        assert [
            c for c in trainer.changes if not c.startswith(("out_dir", "the learning rate"))
        ] == ["max_steps: 4 in the checkpoint, 5 now"]
        assert trainer.fit() == 0 and not old.exists()
        assert (
            main([str(folder / "config.yaml")]) == 0
            and "is finished at step 5" in capsys.readouterr().out
        )
    typed = Trainer([str(moved / "config.yaml"), "--out_dir", str(tmp_path / "typed")])
    assert (
        typed.out == tmp_path / "typed"
        and typed.step == 0
        and "as typed" in capsys.readouterr().out
    )
    typed.close()


def test_what_really_changed_is_said(tiny):
    """44 lines `X: None in the checkpoint, Y now` for a run that was gone on with by its own config.yaml."""
    keys = tiny("run", max_steps=4, seed=1337, warmup_steps=..., precision="auto")
    out = trained(keys).out
    again = Trainer([str(out / "config.yaml")])
    assert not again.changes
    again.close()
    del keys["seed"]
    again = Trainer(keys | {"orchestrator": {"check_interval": 7}, "min_lr": 1e-4})
    assert again.changes == [
        "min_lr: 0.00030000000000000003 in the checkpoint, 0.0001 now",
        "orchestrator.check_interval: 100 in the checkpoint, 7 now",
    ]
    again.close()


class TwoRanks(Parallel):
    """One process that shares the rows of a step as two do."""

    def rows(self):
        return 0, 2


def test_config_yaml_on_another_number_of_processes(tiny):
    """out/x/config.yaml of one process on two: `batch_tokens is 16 rows, ... 32: drop one`."""
    for name, changes in (
        ("a", {}),
        ("b", {"batch_tokens": 128, "gradient_accumulation_steps": ...}),
    ):
        first = trained(tiny(name, max_steps=2, **changes))
        again = Trainer(
            [str(first.out / "config.yaml"), "--out_dir", str(first.out) + "-two"], TwoRanks
        )
        assert again.run.rows_per_step == first.run.rows_per_step == 4
        again.close()


def test_a_run_goes_on_on_another_kind_of_device(tiny, monkeypatch):
    """Begun on one kind of device, gone on with on another: fp32, no compiling and slices were kept for ever, or
    compiling where there is no compiler. What `auto` means is found anew, and said."""
    keys = tiny("run", max_steps=4, precision="auto", compile_model="auto", deterministic="auto")
    trained(keys)
    real, auto = checkpoint.Checkpoint.__init__, {}

    def older(self, path):
        real(self, path)
        self.state["run"] |= auto
        self.state["config"] |= {
            k: v for k, v in auto.items() if k in self.state["config"] and k != "device"
        }

    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", older)
    here = Trainer(keys)
    had = here.run
    here.close()
    auto |= {
        "device": "cuda",
        "deterministic": False,
        "compile_model": True,
        "precision": "mixed_fp16",
    }
    there = Trainer(keys)
    for key in ("precision", "compile_model", "deterministic", "attention"):
        assert getattr(there.run, key) == getattr(had, key)
    assert {c.partition(":")[0] for c in there.changes} == {
        "precision",
        "compile_model",
        "deterministic",
    }
    there.close()
    auto |= {"device": "cpu", "deterministic": True, "precision": had.precision}
    monkeypatch.setattr("lumen.machine.find_compiler", lambda: None)
    there = Trainer(keys)
    assert (
        there.run.compile_model is False
        and "compile_model: True in the checkpoint, False now" in there.changes
    )
    there.close()


def test_paths_with_home_and_variables(tiny, tmp_path, shards, monkeypatch):
    """`out_dir: ~/runs` made a folder called ~, which somebody will remove with rm -rf ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shards)
    first = trained(tiny(max_steps=2) | {"out_dir": "~/runs/x", "data_dir": "$WORK/data"})
    assert first.out == tmp_path / "runs/x" and not Path("~").exists()
    keys = tiny("second", max_steps=1, init_from="${WORK}/runs/x", data_dir=...)
    trained(keys | {"data": {"sources": {"s": {"dir": "~/data"}}}})
    keys = {
        "orchestrator": {"mode": "replay", "replay": "~/d.jsonl"},
        "resume": "~/runs/x",
        "data_dir": "d",
    }
    prepared = {"sources": ["~/a.txt", "stdlib"], "out": "$WORK/d", "val_sources": ["~/v.txt"]}
    cfg = build_config({"model": {}, "prepare": prepared} | keys, str, [])
    assert (cfg.orchestrator.replay, cfg.resume) == (f"{tmp_path}/d.jsonl", f"{tmp_path}/runs/x")
    assert (
        cfg.prepare["sources"] == [f"{tmp_path}/a.txt", "stdlib"]
        and cfg.prepare["out"] == f"{tmp_path}/d"
    )
    with pytest.raises(UserError, match=r"\$NOWHERE is not set"):
        build_config(
            {"model": {}, "data_dir": "d", "orchestrator": {}, "out_dir": "$NOWHERE/x"}, str, []
        )
    (tmp_path / "a.txt").write_text(TEXTS["a"])
    prepare_main(["~/a.txt", "--out=~/made", "--tokenizer", "bytes", "--quiet", "--workers", "1"])
    assert (tmp_path / "made/manifest.json").exists() and not Path("~").exists()
    assert checkpoint.main(["~/runs/x"]) == 0
    export_main(["to_hf", "~/runs/x", "~/hf"])
    assert (tmp_path / "hf/config.json").exists()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_a_colleague_may_read_what_umask_allows(tiny, tmp_path, mask, mode):
    """The .safetensors of checkpoints and exports were 0600, all else 0644."""
    from export import to_hf

    before = os.umask(mask)
    try:
        run = trained(tiny(max_steps=2)).out
        to_hf(run, tmp_path / "hf")
    finally:
        os.umask(before)
    files = [*(run / "step_00000002").iterdir(), *(tmp_path / "hf").iterdir()]
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {p.name: mode for p in files}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank_00000.safetensors"])
def test_a_checkpoint_that_we_may_not_read(tiny, monkeypatch, capsys, name):
    """Another user's 0600 files: "damaged", and the advice was to overwrite the run. It is unreadable, nothing else;
    and no older step is trained on over it."""
    out = trained(tiny(max_steps=6)).out
    file, real, sha256 = out / "step_00000006" / name, Path.read_text, files.sha256

    def look(do, path, *words, **more):
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return do(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", lambda *a, **k: look(real, *a, **k))
    monkeypatch.setattr(checkpoint, "sha256", lambda path: look(sha256, path))
    before = sorted(out.rglob("*"))
    for do in (lambda: Trainer(tiny(max_steps=8)), lambda: checkpoint.find(out)):
        with pytest.raises(UserError, match="E108.*cannot be read.*Permission denied") as error:
            do()
        assert "overwrite" not in str(error.value) and "damaged" not in str(error.value)
    assert checkpoint.main([str(out)]) == 2
    assert "CANNOT BE READ" in (said := capsys.readouterr().out) and "DAMAGED" not in said
    assert sorted(out.rglob("*")) == before


def test_files_that_are_not_ours(tiny, tmp_path, shards):
    """A config.yaml with notes in the run's folder, a folder beside an export, step_notes.tmp: overwritten, gone."""
    from export import to_hf

    keys = tiny(max_steps=2)
    (out := Path(keys["out_dir"])).mkdir()
    (out / "step_notes.tmp").mkdir()
    (out / "step_by_step.rolled_back").mkdir()
    mine = "# my notes\n" + json.dumps(keys)
    (out / "config.yaml").write_text(mine)
    for steps in ("2", "3"):
        Trainer(
            [str(out / "config.yaml"), "--max_steps", steps, "--save_total_limit", "1"]
            + ["--out_dir", str(out)]
        ).fit()
        assert (out / "config.yaml").read_text() == mine
    assert main([str(out / "resolved.yaml")]) == 0, "the resolved one runs, too"
    theirs = trained(tiny("other", max_steps=2)).out / "config.yaml"
    for text in (
        theirs.read_text(),
        theirs.read_text().partition("\n")[2],
    ):  # as now, and as before there was a sum
        theirs.write_text(text)
        Trainer(tiny("other", max_steps=3)).close()
        assert (
            "max_steps: 3" in theirs.read_text() and not (theirs.parent / "resolved.yaml").exists()
        )
    theirs.write_text(
        edited := theirs.read_text().replace("max_steps: 3", "max_steps: 4  # a day more")
    )
    Trainer([str(theirs)]).close()
    assert theirs.read_text() == edited, "edited, it is the user's"
    assert (out / "step_notes.tmp").is_dir() and (out / "step_by_step.rolled_back").is_dir()
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp/mine").write_text("notes")
    with pytest.raises(UserError, match="E117.*x.tmp.*not ours"):
        to_hf(out, tmp_path / "x")
    assert (tmp_path / "x.tmp/mine").exists() and not (tmp_path / "x").exists()
    (tmp_path / "y.tmp").mkdir()
    (tmp_path / "y.tmp/.lumen").touch()  # left by an export that was killed
    to_hf(out, tmp_path / "y")
    assert not (tmp_path / "y.tmp").exists() and not (tmp_path / "y/.lumen").exists()


def test_two_models_in_one_out_dir(tiny):
    """The preset and a copy of it name one out_dir: ten keys differ, "use the model: block"."""
    trained(tiny(max_steps=1))
    with pytest.raises(UserError, match="E305.*n_layers: 2 there, 3 here.*another --out_dir"):
        Trainer(tiny(model={"n_layers": 3}))
    with pytest.raises(UserError, match="E118.*data_dir was") as error:
        Trainer(tiny(val_fraction=0.1))
    assert "out_dir" in str(error.value)
    keys = tiny(init_from=tiny()["out_dir"], resume="none", overwrite=True)
    with pytest.raises(UserError, match="E300.*overwrite: true would delete"):
        Trainer(keys)
    assert checkpoint.list_steps(keys["out_dir"]) == [1]


# ---------------------------------------------------------------- text, shards, sums


def bytes_data(folder, sources, **options) -> dict:
    """Prepares with the tokenizer `bytes`; its manifest."""
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    return prepare_data.prepare(
        list(map(str, sources)), str(folder), "bytes", **{"quiet": True, **options}
    )


def read_back(folder, split="train") -> list[str]:
    """The documents of a split, found by the end-of-text id alone."""
    made = tokenizer.load(str(folder))
    files = sorted(Path(folder).glob(f"{split}_*[0-9].npy"))
    text = made.decode(np.concatenate([np.load(f) for f in files])) if files else ""
    assert text.endswith("<|endoftext|>") or not text
    return text.split("<|endoftext|>")[:-1]


BOOK = "".join(f"Line {i} of a book that is longer than all the notes.\n" for i in range(900))


def test_a_book_of_many_pieces_is_one_document(tmp_path, monkeypatch):
    """A text file too long to be read at once, between notes: it lies in one split, whole and with one end, whatever
    the seed, the shards and the number of workers."""
    monkeypatch.setattr(sources, "PIECE", 7_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "book.txt").write_text(BOOK)
    (tmp_path / "in" / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"note {i}"}) + "\n" for i in range(30))
    )
    (tmp_path / "in" / "same.txt").write_text(BOOK + "\n\n")  # duplicates are told by document too
    (tmp_path / "in" / "z.jsonl").write_text(json.dumps({"text": BOOK}))
    sides = set()
    for seed in (1, 2, 3):
        out = tmp_path / f"out{seed}"
        manifest = bytes_data(
            out, tmp_path / "in", seed=seed, val_fraction=0.3, shard_tokens=7000, max_doc_chars=900
        )
        train, val = read_back(out), read_back(out, "val")
        assert (BOOK in train) + (BOOK in val) == 1 and len(train) + len(val) == 31 == manifest[
            "counts"
        ]["kept"]
        assert manifest["counts"]["dropped"] == {"E107": 2} and manifest["counts"]["cut"] == 1
        assert [manifest["splits"][s]["docs"] for s in ("train", "val")] == [len(train), len(val)]
        assert json.loads((out / "report.json").read_text())["counts"]["parts"] > 80
        sides.add(BOOK in val)
    assert sides == {True, False}


def test_a_long_book_among_pieces_is_killed_at_every_journal(tmp_path, monkeypatch):
    """The preparation of long files ends at each of its journals: what goes on from there gives the same bytes."""
    monkeypatch.setattr(sources, "PIECE", 5_000)
    (tmp_path / "in").mkdir()
    for i, text in enumerate(
        (BOOK[:25_000], "a note", BOOK[:25_000], BOOK[25_000:].replace("\n", "\r\n"))
    ):
        (tmp_path / "in" / f"{i}.txt").write_text(text, newline="")
    options = {"shard_tokens": 3_000, "max_doc_chars": 1_000, "val_fraction": 0.4}
    whole = bytes_data(tmp_path / "whole", tmp_path / "in", **options)
    journal, stops = prepare_data.Output.journal, 0

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Output, "journal", stop)
    while True:
        try:
            again = bytes_data(tmp_path / "again", tmp_path / "in", **options)
            break
        except KeyboardInterrupt:
            stops += 1
    assert (
        stops > 5 and again["counts"]["cleaned"] == 1 and again["counts"]["dropped"] == {"E107": 1}
    )
    for file in sorted((tmp_path / "whole").glob("*.*")):
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert again["fingerprint"] == whole["fingerprint"]


def test_one_long_file_alone_gives_its_end_to_validation(tmp_path, monkeypatch):
    """All the text is one long file: a share of it, its end, is held out, and the rest has one end of text."""
    monkeypatch.setattr(sources, "PIECE", 12_000)
    (tmp_path / "book.txt").write_text(BOOK)
    for fraction in (0.05, 0.4):  # it is drawn for training, or for validation
        out = tmp_path / f"{fraction}"
        manifest = bytes_data(out, tmp_path / "book.txt", val_fraction=fraction, shard_tokens=5000)
        (head,), (tail,) = read_back(out), read_back(out, "val")
        assert head + tail == BOOK and tail.startswith("Line")
        assert fraction / 2 < len(tail) / len(BOOK) < 2 * fraction
        assert manifest["counts"]["tail_held_out"] == 1


def test_one_bad_byte_in_a_long_file(tmp_path, monkeypatch):
    """A long file that is no UTF-8 somewhere in its middle: none of it is taken, and the line is named."""
    monkeypatch.setattr(sources, "PIECE", 9_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(
        BOOK[:30_000].encode() + b"\xe9" + BOOK[30_000:].encode()
    )
    (tmp_path / "in" / "b.txt").write_text("a good one")
    with pytest.raises(UserError, match="E109.*whole files lost.*a.txt") as caught:
        bytes_data(tmp_path / "out", tmp_path / "in")
    assert (
        f"a.txt:{1 + BOOK.count(chr(10), 0, 30_000)}:" in caught.value.text
        and "--max_bad" in caught.value.text
    )


def test_a_share_far_from_what_was_asked_for_is_said(tmp_path, capsys):
    """Half of the text is drawn for validation where five percent were asked for: a line says so."""
    rows = [{"text": f"short {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows + [{"text": "long " * 2000}])
    )
    said = set()
    for seed in range(6):
        manifest = bytes_data(
            tmp_path / f"{seed}", tmp_path / "a.jsonl", seed=seed, val_fraction=0.2, quiet=False
        )
        tokens = [manifest["splits"][s]["tokens"] for s in ("train", "val")]
        far = not 0.1 <= tokens[1] / sum(tokens) <= 0.4
        assert ("were asked for" in capsys.readouterr().out) == far
        said.add(far)
    assert True in said


def old_rules(folder) -> None:
    """Makes of a prepared folder one as the Lumen before this one left it."""
    for name in ("manifest.json", "progress.json"):
        if (path := Path(folder, name)).exists():
            whole = json.loads(path.read_text())
            whole["provenance"].pop("rules", None)
            whole["provenance"].pop("not_read", None)
            whole["provenance"]["inputs"] = [row[:8] for row in whole["provenance"]["inputs"]]
            whole.get("state", {}).pop("open", None)
            path.write_text(json.dumps(whole))


def test_data_prepared_by_an_older_lumen(tmp_path, capsys, monkeypatch):
    """The sources of finished data are prepared again after an upgrade: they are reused, and where documents were cut
    a note says what is in them. What was begun is begun anew."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(BOOK)
    (tmp_path / "in" / "b.txt").write_text("short")
    made = bytes_data(tmp_path / "out", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)
    old_rules(tmp_path / "out")
    (tmp_path / "in" / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    again = bytes_data(
        tmp_path / "out", tmp_path / "in", max_doc_chars=900, shard_tokens=9000, quiet=False
    )
    said = capsys.readouterr().out
    assert (
        again["fingerprint"] == made["fingerprint"]
        and "end-of-text at every cut" in said
        and "--verify" in said
    )

    journal = prepare_data.Output.journal
    for path in (tmp_path / "in").glob("[0-9]*"):
        path.unlink()
    (tmp_path / "in" / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 900}) + "\n" for i in range(30))
    )

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.Output, "journal", stop)
        bytes_data(tmp_path / "half", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)
    old_rules(tmp_path / "half")
    half = bytes_data(
        tmp_path / "half", tmp_path / "in", max_doc_chars=900, shard_tokens=9000, quiet=False
    )
    assert "begun anew" in capsys.readouterr().out
    assert (
        half["fingerprint"]
        == bytes_data(tmp_path / "new", tmp_path / "in", max_doc_chars=900, shard_tokens=9000)[
            "fingerprint"
        ]
    )


def test_a_run_of_a_million_letters(tmp_path):
    """Genomes, ruled lines, base64 of zeros, and a blank file of a million spaces: a vocabulary is trained on them
    and written; no token is longer than 128 bytes; what comes back is the text."""
    for text in (
        "Some words. " * 80 + "N" * 200_000,
        "=" * 200_000 + "x",
        "ab" * 99_000,
        "x" + " " * 10**6 + "y",
    ):
        made = tokenizer.train_bpe([text], 600)
        assert max(map(len, made.ranks)) <= tokenizer.LONGEST_TOKEN == 128
        assert (
            made.decode(made.encode(text)) == text
            and made.token_bytes().max() <= 128
            and len(made.sha256) == 64
        )


def test_a_foreign_vocabulary_with_a_token_of_70000_letters(tmp_path):
    """A tokenizer.json of somebody who trained without such a limit: it is read, written and measured."""
    ranks = {bytes([i]): i for i in range(256)} | {b"N" * 2**k: 255 + k for k in range(1, 17)}
    made = tokenizer.Tokenizer(
        "x", ranks, {name: 300 + i for i, name in enumerate(tokenizer.SPECIALS)}
    )
    made.save(tmp_path / "tokenizer.json")
    again = tokenizer.load(str(tmp_path))
    assert again.ranks == made.ranks and again.token_bytes().max() == 2**16
    assert again.encode("N" * 2**16).tolist() == [255 + 16]


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    """One folder of the source is shut: that is an error, not half of the text."""
    for name in ("open", "shut"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.txt").write_text(name)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="E108.*shut cannot be entered: Permission denied"):
        bytes_data(tmp_path / "out", tmp_path / "in")


def test_what_is_not_read_is_said(tmp_path, capsys):
    """A source with everything in it that is no text for us: each kind is counted and named in one line."""
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "y.txt").write_text("elsewhere")
    os.symlink(tmp_path / "else", folder / "link")
    os.mkfifo(folder / "pipe")
    (folder / "good.txt").write_text("good text " * 300)
    (folder / "._good.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    for name in ("a.pdf", "b.pdf", "LICENSE"):
        (folder / name).write_text("x")
    bytes_data(folder / "data", folder)  # a data set of ours, in the source of the next
    capsys.readouterr()
    bytes_data(tmp_path / "out", folder, quiet=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not read:")]
    for line in ("1 hidden folders, as .git", "1 links to folders, as link", "1 folders of prepared data, as data",
                 "1 AppleDouble files, as ._good.txt", "1 pipes, sockets and dead links, as pipe",
                 "3 files of other endings: .pdf 2, none 1"):  # fmt: skip
        assert f"not read: {line}" in said
    assert (
        len(said) == 6
        and json.loads((tmp_path / "out" / "report.json").read_text())["not_read"]["ending .pdf"]
    )
    assert [*read_back(tmp_path / "out"), *read_back(tmp_path / "out", "val")] != ["hidden"]


def test_data_are_prepared_into_a_folder_inside_their_source(tmp_path, monkeypatch):
    """--out texts/prepared: the same command finds it again, and goes on after it was killed there."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 20)
    journal = prepare_data.Output.journal

    def stop(self):
        journal(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.Output, "journal", stop)
        bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900)
    (tmp_path / "prepared.error.json").write_text(
        "{}"
    )  # what train.py leaves where ranks must hear of an error
    made = bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900)
    assert (
        bytes_data(tmp_path / "prepared", tmp_path, shard_tokens=900) == made
        and made["counts"]["rows"] == 40
    )


def test_names_that_are_no_utf8(tmp_path):
    """A file name in latin-1, good or with bad text in it: the second start finds the data, also of an older Lumen."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"caf\xe8.txt", b"b.txt"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_text(
            f"a good text {len(name)} {name[3]}"
        )
    Path(os.fsdecode(bytes(folder) + b"/bad\xe9.txt")).write_bytes(b"\xff")
    made = bytes_data(tmp_path / "out", folder, max_bad=1)
    assert bytes_data(tmp_path / "out", folder, max_bad=1) == made
    path = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["file"]
    assert os.path.exists(path) and "bad" in path
    old_rules(tmp_path / "out")
    whole = (tmp_path / "out" / "manifest.json").read_text()
    for escape in ("\\udce9", "\\udce8"):
        whole = whole.replace(escape, "?")
    (tmp_path / "out" / "manifest.json").write_text(whole)
    assert bytes_data(tmp_path / "out", folder, max_bad=1)["fingerprint"] == made["fingerprint"]


def test_two_runs_prepare_one_folder(tmp_path, capsys):
    """The second of a sweep comes while the first prepares: it waits, says so, and takes what is made. Nothing tells
    anybody to delete a folder."""
    (tmp_path / "a.txt").write_text("text " * 900)
    made, out = [], tmp_path / "out"
    with prepare_data.holding(str(out)):
        second = threading.Thread(
            target=lambda: made.append(bytes_data(out, tmp_path / "a.txt", quiet=False)),
            daemon=True,
        )
        second.start()
        said, until = "", time.time() + 20
        while "waiting for it" not in said and time.time() < until:
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert "waiting for it" in said and not made
    second.join(
        20
    )  # the first had nothing to leave there: its empty folder is gone, and made again
    assert made and (out / "manifest.json").exists()
    assert not [text for pair in ERRORS.values() for text in pair if "delete" in text]


def test_ctrl_c_while_workers_prepare(tmp_path):
    """Ctrl-C on the terminal reaches all processes: no traceback of any, and the same command goes on."""
    words = [sys.executable, "prepare_data.py", "synthetic:30000", "--out", str(tmp_path / "out")]
    words += ["--tokenizer", "bytes", "--workers", "2", "--shard_tokens", "100000"]
    process = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "out" / "progress.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)  # the workers are importing now
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def make_hole(folder, fill: int) -> str:
    """A hole in the first shard, as a broken copy leaves it: same size. Its path."""
    path = Path(folder) / "train_00000.npy"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes([fill]) * (len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("fill", [0, 255])
def test_a_shard_with_a_hole(fill, tiny, tmp_path):
    """100,000 zeros, or ids that no tokenizer has, in a shard of the right size: the run says which shard it is, saves
    and stops, instead of training on them; --verify says the same."""
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
    """Rank 0 finds a wrong sum: both ranks end with E111 and a checkpoint, none waits for the other."""
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


def test_sums_are_not_read_again_on_resume(tmp_path, monkeypatch):
    """A run is resumed: shards that were verified and were not touched since are not read again; one that was is."""
    bytes_data(tmp_path / "data", "synthetic:60", shard_tokens=5000)
    read, real = [], loader.sha256
    monkeypatch.setattr(
        loader, "sha256", lambda path, *more: read.append(path) or real(path, *more)
    )
    for touched, wanted in ((False, None), (False, 0), (True, 1)):
        source = loader.Source(str(tmp_path / "data"), "train", 16)
        if touched:
            os.utime(source.shards[0].path, (1, 1))
            source = loader.Source(str(tmp_path / "data"), "train", 16)
        read.clear()
        sums = loader.Sums([source], str(tmp_path / "verified.jsonl"))
        sums.thread.join(20)
        assert sums.error is None and len(read) == (
            len(source.shards) if wanted is None else wanted
        )


def test_text_is_given_where_tokens_belong(tmp_path):
    """--data_dir my_texts, or a .jsonl: the message says what to type; nobody is told to write into it."""
    (tmp_path / "my_texts" / "sub").mkdir(parents=True)
    (tmp_path / "my_texts" / "sub" / "a.md").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name, stem in (("my_texts", "my_texts"), ("rows.jsonl", "rows")):
        with pytest.raises(UserError, match="E110.*is text, not tokens") as caught:
            loader.Source(str(tmp_path / name), "train", 8)
        assert f"python prepare_data.py {tmp_path / name} --out data/{stem}" in caught.value.text
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="E110.*--out data/NAME"):
        loader.Source(str(tmp_path / "pictures"), "train", 8)


def test_objects_over_several_lines(tmp_path):
    """Three records, each over several lines, in a .jsonl or one after the other in a .json: they are read."""
    records = "\n".join(json.dumps({"text": f"record {i}"}, indent=2) for i in range(3))
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(records)
        assert (
            bytes_data(tmp_path / f"out {name}", tmp_path / name, val_fraction=0)["counts"]["kept"]
            == 3
        )
    (tmp_path / "b.jsonl").write_text(records + "\n{")  # the cause is named once, not at each line
    with pytest.raises(UserError, match="E109.*1 of 4 rows"):
        bytes_data(tmp_path / "out b", tmp_path / "b.jsonl", val_fraction=0)


def test_one_byte_of_text(tmp_path, capsys):
    """A text of one letter is no data to train on: it is not called ready, and numbers in its manifest are numbers."""
    (tmp_path / "a.txt").write_text("a")
    made = bytes_data(tmp_path / "out", tmp_path / "a.txt", quiet=False)
    assert "is ready" not in capsys.readouterr().out and read_back(tmp_path / "out") == ["a"]
    assert type(made["counts"]["cut"]) is int and type(made["counts"]["cleaned"]) is int


# ---------------------------------------------------------------- words on the command line and in the YAML

WRONG_VALUES = [
    None,
    [],
    {},
    "",
    " ",
    "x",
    "a\0b",
    -1,
    0,
    0.5,
    3,
    1e30,
    10**30,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
]
WRONG_VALUES += [
    True,
    False,
    [1],
    [0, 0],
    [{}],
    ["x"],
    [None],
    {"a": {"b": [1]}},
    [[[]]],
    "x" * 300,
    "x/" * 3000,
]
WRONG_VALUES += [
    "010",
    "1:30",
    "0x10",
    "1_0",
    "-0",
    "1e400",
    "\u0663",
    {"sources": "x"},
    {"sources": {"a": 5}},
]
WRONG_VALUES += [{"sources": {"a": {"dir": "d", "weight": "x"}}}, {"sources": {"a": {"dir": []}}}]
WRONG_VALUES += [
    {"sources": ["x"], "tokenizer": [5]},
    {"sources": ["x"], "out": []},
    {"sources": [[]]},
]
WRONG_VALUES += [{"type": "yarn", "factor": "x"}, {"type": []}, {"type": "linear", "factor": 0}]
PHASES = [("x", {"a": 1}), (1, {"b": 1}), (math.nan, {"a": 1}), (1, {"a": -1}), (1, 5)]
WRONG_VALUES += [
    {"sources": {"a": {"dir": "d"}}, "phases": [{"until": u, "weights": w}]} for u, w in PHASES
]


def answer(words, main=read_config) -> str:
    """What a command says to words that it refuses."""
    with pytest.raises(UserError) as e:
        main([str(w) for w in words])
    assert e.value.exit_code == 2
    return str(e.value)


def test_every_key_with_every_wrong_value():
    """Any key is given anything. It is a configuration then, or the user is told with a code: nothing else happens."""
    seen = Counter()
    for block, cls in (("", Config), ("model", ModelConfig), ("orchestrator", OrchestratorConfig)):
        for f in dataclasses.fields(cls):
            for value in WRONG_VALUES:
                tree = {"data_dir": "d"} if f.name not in ("data", "prepare") else {}
                tree |= {block: {f.name: value}} if block else {f.name: value}
                try:
                    build_config(tree, lambda key: "there", [])
                    seen["right"] += 1
                except UserError as error:
                    assert error.code == "E002" and re.match(
                        "there: |model\\.|no data|. unknown keys", error.text
                    ), error.text
                    seen["refused"] += 1
    assert min(seen["right"], seen["refused"] / 3) > 300, seen


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 10**400, True, "x", [], {}, None, -5])
def test_a_model_of_anything(value):
    """ModelConfig is built by hand with anything: it is a model's shape, or ValueError says which key."""
    for f in dataclasses.fields(ModelConfig):
        for base in ({}, {"n_experts": 4}, {"mod_capacity": 0.5}):
            try:
                ModelConfig(**(base | {f.name: value}))
            except ValueError as error:
                assert str(error).startswith("model."), error


NESTED = [
    ("data: {sources: {x: {dir: d,\n weight: abc}}}", 2, "data.sources.x.weight: 'abc' is not float"),
    ("data: {sources: {x: {dir: d}},\n\n phases: 5}", 3, "data.phases"),
    ("data:\n  sources: {x: {dir: d}}\n  phases:\n  - {until: 1,\n     weights: {x: no1}}", 5, "phases[0].weights.x"),
    ("data: {sources: {x: {dir: d}}, phases: [{weights: {y: 1}}]}", 1, "names of x"),
    ("data: {sources: {x: {dir: d,\n wieght: 1}}}", 2, "did you mean weight?"),
    ("prepare:\n  sources: [stdlib]\n  tokenizer: [5]", 3, "prepare.tokenizer"),
    ("prepare:\n  sources: [stdlib]\n  out: %s" % ("x" * 300), 3, "too long"),
    ("data_dir: d\nmodel:\n  rope_scaling:\n    type: yarn\n    factor: big", 5, "model.rope_scaling.factor"),
    ("data_dir: d\nmodel:\n  n_layers: 2\n  mod_capacity: [0.5,\n    half]", 5, "model.mod_capacity[1]"),
    ("data_dir: d\norchestrator:\n  mode: act\n  check_interval: often", 4, "orchestrator.check_interval"),
    ("data_dir: d\nmodel:\n  n_heads: 010", 3, "'010' is not int"),  # 8 in YAML 1.1
    ("data_dir: d\nmax_steps: 1:30", 2, "'1:30' is not int"),  # 90 in YAML 1.1
    ("data_dir: d\nmodel:\n  rope_ntk_scale_base: x", 3, "'x' is not float"),
    ("data_dir: d\nbatch_tokens: 1e30", 2, "is not int"),
    ("data_dir: d\neps: 0", 2, "must be > 0"),
    ("data_dir: d\nprecision: fp8_e4m3", 2, "no fp8"),
    ("data_dir: d\ndevice: gpu", 2, "must be one of auto, cuda"),
    ("data_dir: d\nattention: fast", 2, "flash"),
    ("data_dir: d\nmodel: &m\n  n_layers: *m", 3, "model.n_layers"),  # in itself
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "part"), NESTED, ids=lambda v: "" if isinstance(v, str) else str(v)
)
def test_a_mistake_deep_in_the_yaml(text, line, part, tmp_path):
    """A value within a value is wrong. The message names the line of that value."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    said = answer([path])
    assert said.startswith("E002: ") and part in said, said
    assert f"{path}:{line}: " in said, said


def test_words_that_are_no_numbers_keep_their_letters(tmp_path):
    """A folder is called 0.10, 007 or 2026-01-02; a source is one word. YAML reads them as something else."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "out_dir: 0.10\nwandb_run_name: 2026-01-02\nprepare: {sources: stdlib, out: 007}\nseed: '12'\n"
    )
    cfg, tree, *_ = read_config([str(path)])
    assert (cfg.out_dir, cfg.wandb_run_name, cfg.seed, tree["seed"]) == (
        "0.10",
        "2026-01-02",
        12,
        12,
    )
    assert cfg.prepare == {"sources": ["stdlib"], "out": "007"}


def test_encodings_of_the_yaml(tmp_path):
    """The YAML comes from Windows (UTF-16, a BOM) or from an old editor (latin-1)."""
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "w.yaml").write_text("data_dir: caf\u00e9\n", encoding=encoding)
        assert read_config([str(tmp_path / "w.yaml")])[0].data_dir == "caf\u00e9"
    (tmp_path / "l.yaml").write_bytes(b"data_dir: d\n# caf\xe9\n")
    assert f"{tmp_path}/l.yaml:2: byte 0xe9 is not UTF-8" in answer([tmp_path / "l.yaml"])


def test_a_pipe_is_a_configuration(tmp_path):
    """`python train.py <(...)`: what can be read only once is asked for twice, by main() and by the Trainer."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"data_dir: d\nseed: 5\n")
    os.close(write_end)
    for _ in range(2):
        cfg, *_ = read_config([f"/dev/fd/{read_end}"])
        assert (cfg.seed, cfg.out_dir) == (5, "out/run")
    os.close(read_end)


def test_a_configuration_that_is_not_where_it_was_looked_for(tmp_path, monkeypatch):
    """The path is right from another folder, misspelt, a folder, or none was given: no hint is what was typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("data_dir: d\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data_dir: d\n")
    assert str(ROOT / "configs/quickstart.yaml") in answer(["configs/quickstart.yaml"])
    assert "did you mean mine.yaml?" in answer(["mien.yaml"])
    assert "did you mean run/config.yaml?" in answer(["run"])
    assert "did you mean" not in answer(["63"])
    for words in ([], ["--dry_run"], ["--seed", "3"]):
        assert "which configuration?" in answer(words) and "quickstart" in answer(words)


def test_all_unknown_keys_at_once(tmp_path):
    """A YAML of another trainer: what Lumen has no name for is named in one message, with its line
    and what may be meant; so is what has another meaning here."""
    path = tmp_path / "c.yaml"
    keys = {
        "n_layer": None,  # understood: not a word about it
        "dry_run": "unknown key dry_run; it belongs on the command line: --dry_run",
        "learnin_rate": "unknown key learnin_rate; did you mean learning_rate?",
        "hiden_size": "unknown key hiden_size; did you mean hidden_size, model.d_model here?",
        "finetuning_paths": "unknown key finetuning_paths; python train.py --help lists all",
        "cpu_offload": "cpu_offload: 1: not there, as its cost was never measured",
        "warmup_ratio": "warmup_ratio: 1: must be in [0, 1)",
    }
    path.write_text("".join(f"{key}: 1\n" for key in keys) + "model:\n  snapshot_interval: 5\n")
    said = answer([path, "--mod_capcity", "0.5"])
    for i, text in enumerate(keys.values(), 1):
        assert f"{path}:{i}: {text}" in said if text else f"{path}:{i}: " not in said
    assert f"{path}:9: unknown key model.snapshot_interval; it belongs under orchestrator:" in said
    assert "command line: unknown key mod_capcity; did you mean model.mod_capacity?" in said


@pytest.mark.parametrize(("text", "words", "gone", "kept"), [
    ("max_steps: 9", ["--num_epochs", "3"], "max_steps", {"num_epochs": 3.0}),
    ("max_steps: 9", ["--epochs", "2"], "max_steps", {"num_epochs": 2.0}),
    ("num_epochs: 2", ["--tokens_per_parameter", "9"], "num_epochs", {"tokens_per_parameter": 9.0}),
    ("num_epochs: 2", ["--auto_epoch_scaling"], "num_epochs", {"tokens_per_parameter": 20.0}),
    ("grad_accum: 2", ["--batch_tokens", "64"], "gradient_accumulation_steps", {"batch_tokens": 64}),
    ("batch_tokens: 4096", ["--gradient_accumulation_steps", "2"], "batch_tokens", {"gradient_accumulation_steps": 2}),
    ("gradient_accumulation_steps: 2", ["--batch_tokens", "64"], "gradient_accumulation_steps", {"batch_tokens": 64}),
    ("prepare: {sources: [x], out: o}", ["--data_dir", "e"], "prepare", {"data_dir": "e"}),
    ("prepare: {sources: [x], out: o}", ["--data_dir", "o"], None, {"data_dir": "o"}),
    ("data: {sources: {x: {dir: d}}}", ["--data_dir", "e"], "data", {"data_dir": "e"}),
    ("batch_tokens: 4096", ["--batch_size", "2"], None, {"batch_size": 2, "batch_tokens": 4096}),  # they go together
])  # fmt: skip
def test_what_is_typed_beats_what_the_file_says(text, words, gone, kept, tmp_path):
    """One key is typed, the file says the same in another way: the typed one holds, and a note names the other."""
    path = tmp_path / "c.yaml"
    path.write_text(
        text
        + ("\n" if "d" in text.partition(":")[0][:1] or "prepare" in text else "\ndata_dir: d\n")
    )
    cfg, tree, notes, _ = read_config([str(path), *words])
    assert {key: getattr(cfg, key) for key in kept} == kept
    assert (gone is None and not notes) or (gone not in tree and f"{gone}: " in notes[-1])
    path.write_text(
        "data_dir: d\nmax_steps: 5\nnum_epochs: 2\n"
    )  # in one place they still contradict each other
    assert "--max_steps null" in answer([path])


def test_no_epoch_is_no_step(tiny):
    """num_epochs: 0 is no step, as max_steps: 0 is; it was taken for "not set"."""
    assert Trainer(tiny(max_steps=..., num_epochs=0)).run.max_steps == 0


LONG = "x" * 300
COMMANDS = {
    "train": [[], ["nope"], [LONG], ["FOLDER"], ["quickstart", "--nope"], ["quickstart", "--seed"], ["quickstart", "x"],
              ["quickstart", "--seed", "x"], ["--="], ["quickstart", "--model", "5"],
              ["quickstart", "--world_size", "2"],
              ["quickstart", "--dry_run", "--world_size", "x"], ["quickstart", "--data_dir", "FOLDER"],
              ["quickstart", "--data_dir", "FILE"], ["quickstart", "--out_dir", LONG], ["FILE"]],
    "train_fsdp": [[], ["nope"], ["quickstart", "--nope"]],
    "prepare_data": [[], ["FILE"], ["FILE", "--out"], ["FILE", "--out", "o", "--nope"], ["nope", "--out", "o"],
                     ["FOLDER", "--out", "o"], ["FILE", "--out", "o", "--seed", "x"], ["FILE", "--out", ""],
                     ["FILE", "--out", "o", "--max_bad", "nan"], ["FILE", "--out", "o", "--workers", "0"],
                     [LONG, "--out", "o"], ["FILE", "--out", LONG], ["FILE", "--out", "o", "--tokenizer", "FOLDER"],
                     ["synthetic:99999999999999", "--out", "o"]],
    "sample": [[], ["nope", "--ids", "1"], ["FOLDER", "--ids", "1"], ["FILE", "--ids", "1"], [LONG],
               ["FOLDER", "--nope"], ["FOLDER", "--top_k"], ["FOLDER", "--top_k", "x"],
               ["FOLDER", "--prompt_file", "FOLDER"], ["FOLDER", "--ids", "x"]],
    "export": [[], ["nope"], ["to_hf"], ["to_hf", "nope", "o"], ["to_hf", "FILE", "o"], ["to_hf", LONG, "o"],
               ["to_hf", "FOLDER", "o", "--dtype", "x"], ["from_hf", "FOLDER", "o"], ["from_hf", "FILE", "o"],
               ["from_lunaris", "FOLDER", "o"], ["from_lunaris", "FILE", "o", "--n_heads", "x"]],
    "lumen.checkpoint": [[], ["--nope"], ["nope"], ["FOLDER"], ["FILE"], ["a", "b"], [LONG]],
    "lumen.machine": [["--nope"], ["envv"]],
    "tools.bench": [[], ["--nope"], ["nope"], ["decisions"], ["decisions", "nope"], ["picture", "FILE"], ["speed"], [LONG],
              ["speed", "nope"], ["step", "--rounds", "x"], ["step", "--no"], ["kernels", "--size", "huge"],
              ["gpu", "nope"], ["decode", "nope"], ["learn", "--out", "FILE"], ["decisions", LONG]],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_words_to_every_command(name, tmp_path, monkeypatch):
    """No words, unknown ones, half of them, files that are not there or are folders: exit code 2 with a code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE.txt").write_text("words")
    main = importlib.import_module(name).main
    for words in COMMANDS[name]:
        assert re.match(
            r"E\d{3}: .", answer([w.replace("FILE", "FILE.txt") for w in words], main)
        ), words


def test_one_style_of_options():
    """- or _ in an option, a misspelt one, a shortened one: all commands answer alike, and name the nearest."""
    import export
    import sample

    assert sample.parse(["run", "--max-tokens", "5"]).max_new_tokens == 5
    assert "did you mean --temperature?" in answer(["run", "--temp", "1"], sample.main)
    assert "did you mean --val_fraction?" in answer(
        ["x", "--out", "o", "--val-frac", "1"], prepare_data.main
    )
    assert "did you mean --best?" in answer(["to_hf", "run", "o", "--besst"], export.main)
    assert run_python("kernels.py", "--selftes").stderr.startswith(
        "error E002: command line: kernels.py: "
    )


@pytest.mark.parametrize("env", [
    {"RANK": ""}, {"RANK": "x"}, {"LOCAL_RANK": "x"}, {"SLURM_RESTART_COUNT": "x"}, {"WORLD_SIZE": "-1"},
    {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "2"}, {"WORLD_SIZE": "2"}, {"MASTER_PORT": "x"},
    {"WORLD_SIZE": "9" * 5000},
])  # fmt: skip
def test_half_of_a_launch_in_the_environment(env, tiny, tmp_path, monkeypatch):
    """A shell still has RANK or WORLD_SIZE of something else: E600 names the variable, nothing is started."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    said = answer([write_yaml(tmp_path / "c.yaml", tiny())], train.main)
    assert said.startswith("E600: ") and next(iter(env)) in said


def test_a_process_whose_rank_is_no_number():
    """The rank is needed to say who speaks: it is said nevertheless, by a process, with exit code 2."""
    result = run_python("train.py", "quickstart", RANK="x")
    assert result.returncode == 2 and result.stderr.startswith("error E600: RANK='x'"), (
        result.stderr
    )


def test_wandb_mode_is_no_mode(tmp_path, monkeypatch):
    """WANDB_MODE is empty or misspelt; wandb would raise when the run has begun."""
    path = write_yaml(tmp_path / "c.yaml", {"data_dir": "d", "wandb_project": "p"})
    for mode in ("", "offlin"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert f"WANDB_MODE={mode!r}" in answer([path])


def test_print_config_says_what_it_does_not_know(capsys, tmp_path):
    """What auto and null become is decided by the start: the printed YAML says so, and runs as it is."""
    for module, sharded in ((train, False), (train_fsdp, True)):
        assert module.main(["quickstart", "--print_config"]) == 0
        text = capsys.readouterr().out
        assert (
            "precision: auto" in text.splitlines()[0]
            and "model.vocab_size: 0" in text.splitlines()[0]
        )
        assert ("without effect under train.py" in text) != sharded
        (tmp_path / "p.yaml").write_text(text)
        assert read_config([str(tmp_path / "p.yaml")])[0] == read_config(["quickstart"])[0]
    assert train.main(["--help"]) == 0
    assert "field(" not in capsys.readouterr().out


def test_help_names_no_file_that_is_not_here():
    """Help and comments send nobody to a page that is not in the repository."""
    for path in (*ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")):
        assert not re.search(r"research/|DESIGN", path.read_text(encoding="utf-8")), path


def test_commands_from_powershell(tiny):
    """control.jsonl in UTF-16, as PowerShell's echo writes it: E309 says what it is, and the run goes on."""

    def write(trainer):
        line = json.dumps({"method": "save"}) + "\n"
        (trainer.out / "control.jsonl").write_text(line * 2, encoding="utf-16")

    trainer = Trainer(tiny(max_steps=4))
    write(trainer)
    assert trainer.fit() == 0
    rows = [r for r in read_lines(trainer.out / "decisions.jsonl") if r.get("trigger") == "user"]
    assert len(rows) == 2 and all(r["refused"] == "E309" and "UTF-16" in r["reason"] for r in rows)


# ---------------------------------------------------------------- what does not fit


def memory_of(monkeypatch, size: float) -> None:
    """This machine has `size` bytes."""
    monkeypatch.setattr(machines, "total_memory", lambda device: size)


def forbid(monkeypatch, *names) -> None:
    """Whoever prepares data, meets others or builds a model fails the test."""
    for name in names:
        monkeypatch.setattr(
            train, name, lambda *a, **k: pytest.fail("too late: something was begun")
        )


@pytest.mark.parametrize("name", ["b1", "b3_inference"])
def test_a_preset_that_no_batch_size_makes_fit_is_refused_at_once(monkeypatch, name):
    """`python train.py b1` on a laptop: refused before data are prepared, with what would hold it; nothing grows."""
    memory_of(monkeypatch, 16 << 30)
    forbid(monkeypatch, "prepare_first", "Transformer", "Parallel")
    with pytest.raises(UserError) as e:
        train.main([name])
    text, whole = (
        e.value.text,
        {"b1": "118.6 GiB a process, and there are 16.0 GiB", "b3_inference": "44.3 GiB"},
    )
    assert (
        (e.value.code, e.value.exit_code) == ("E200", 2)
        and whole[name] in text
        and "no batch_size helps" in text
    )
    assert {"b1": "a GPU of 192 GB", "b3_inference": "a GPU of 80 GB"}[name] in text
    assert {"b1": "train_fsdp.py needs 2 x 80 GB", "b3_inference": "train_fsdp.py needs 1 x 80 GB"}[
        name
    ] in text


def test_a_model_without_a_vocabulary_yet_is_refused_before_its_text_is_read(
    monkeypatch, tiny, tmp_path
):
    """vocab_size comes with data that are still to be prepared; the layers alone are too much."""
    memory_of(monkeypatch, 1 << 30)
    forbid(monkeypatch, "prepare_first", "Parallel")
    keys = tiny(
        prepare={"sources": ["stdlib"]},
        data_dir=...,
        model={"d_model": 2048, "n_layers": 24, "d_ff": 8192},
    )
    del keys["model"]["vocab_size"]
    with pytest.raises(UserError, match="E200.*alone"):
        train.main([str(write_yaml(tmp_path / "c.yaml", keys))])


def test_what_is_too_large_for_whole_copies_may_fit_in_parts(monkeypatch):
    """b1 on eight machines of 20 GiB: train.py keeps a copy on each and is refused, train_fsdp.py is not; on two it
    is, by its own layout."""
    memory_of(monkeypatch, 20 << 30)
    cfg = read_config(["b1"])[0]
    train.check_states(cfg, train_fsdp.layout_of(cfg, 8))
    for layout in (plan.Layout(8), train_fsdp.layout_of(cfg, 2)):
        with pytest.raises(UserError, match="E200.* gradients and moments alone"):
            train.check_states(cfg, layout)


def wide(tiny, **changes):
    """A run whose activations are many times its states."""
    return tiny(batch_size=64, model={"max_seq_len": 128, "dropout": 0.0}, max_steps=1, **changes)


def need(keys) -> float:
    cfg = config.build_config(keys | {"orchestrator": {}}, lambda key: "test", [])
    rows = (cfg.batch_size, cfg.batch_size * cfg.gradient_accumulation_steps // cfg.batch_size)
    model, how = plan.on_meta(cfg.model), ("fp32", cfg.activation_checkpointing)
    return plan.rank_memory(model, plan.Layout(cuda=False), *rows, *how, plan.IMBALANCE)["total"]


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_too_many_rows_are_refused_and_what_is_named_instead_fits(monkeypatch, tiny, share):
    """A batch that needs more than there is: the message names a batch_size and a recomputation, and each starts."""
    keys = wide(tiny)
    memory_of(monkeypatch, need(keys) * share)
    with pytest.raises(UserError, match="E200") as e:
        Trainer(keys)
    assert not Path(keys["out_dir"]).exists()
    named = [dict(pair.split(": ") for pair in words.split(" with ")) for words in re.findall(
        r"((?:\w+: \w+)(?: with \w+: \w+)*)(?= or | would fit)", e.value.text)]  # fmt: skip
    assert len(named) == 3 and {"batch_size", "activation_checkpointing"} == {
        k for found in named for k in found
    }
    for found in named:
        Trainer(keys | {k: int(v) if v.isdigit() else v for k, v in found.items()}).loader.close()


def test_what_may_fit_is_advised_against_and_tried(monkeypatch, tiny, capsys):
    """The estimate is a few percent above the memory, and may be wrong by that: the run starts, with a warning."""
    keys = wide(tiny)
    memory_of(monkeypatch, need(keys) / 1.07)
    Trainer(keys).loader.close()
    assert re.search(r"advice     this may not fit: about .* would fit", capsys.readouterr().out)
    memory_of(monkeypatch, need(keys) * 1.01)
    Trainer(keys | {"out_dir": keys["out_dir"] + "-2"}).loader.close()
    assert "not fit" not in capsys.readouterr().out


def test_a_dry_run_never_refuses(monkeypatch, tiny, tmp_path, capsys):
    """Its question is what would fit: it says that this does not, also where batch_size: auto finds nothing."""
    memory_of(monkeypatch, 1000)
    keys = tiny(
        batch_size="auto", batch_tokens=512, gradient_accumulation_steps=..., model={"n_experts": 4}
    )
    monkeypatch.setattr(simulate, "pick_backend", lambda *a: pytest.fail("experts were made"))
    assert train.main([str(write_yaml(tmp_path / "c.yaml", keys)), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "slices: nothing tried" in out, "a layer of b300's experts alone is 97 GB"
    assert (
        "this will not fit: weights, gradients and moments alone" in out
        and "cheapest   none" in out
    )


def on_a_gpu(monkeypatch, trainer, memory: float, need) -> None:
    """The trainer's probe meets a GPU of so many bytes, of which r rows take need(r): what does not fit ends in the
    middle of backward. Made up: never run on a GPU."""

    def peak(model, rows, device):
        held = sum(p.grad is not None for p in model.parameters())
        step = trainer.run.rows_per_step
        assert held == (len(list(model.parameters())) if rows < step else 0), (
            "an earlier micro-step's gradients"
        )
        ids = torch.zeros(2, 32, dtype=torch.long)
        total, hook = model(ids, targets=ids)[0], model.blocks[0].attn.wqkv.weight.register_hook
        hook = hook(lambda grad: full() if need(rows) > memory else None)
        try:
            total.backward()
        finally:
            hook.remove()
        return need(rows)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    monkeypatch.setattr(train, "peak_bytes", peak)
    memory_of(monkeypatch, memory)


def test_the_probe_finds_the_largest_batch_that_fits(monkeypatch, tiny):
    """batch_size: auto drew a straight line through one and two rows, but the loss takes only so many logits at a time:
    32 rows were found where 64 fitted, by the plan's own numbers."""
    trainer = Trainer(tiny(model={"dropout": 0.0}))
    for name, memory in (("gpt2_124m", 80e9), ("moe_124m", 80e9), ("lumi_base", 24e9)):
        keys = yaml.safe_load(presets()[name].read_text())
        cfg = ModelConfig(**keys["model"])
        n, rows = plan.count_parameters(plan.on_meta(cfg)), keys["batch_tokens"] // cfg.max_seq_len
        need = functools.cache(
            lambda r, cfg=cfg, n=n: plan.memory(cfg, n, r, "mixed_bf16")["total"]
        )
        on_a_gpu(monkeypatch, trainer, memory, need)
        trainer.run = dataclasses.replace(trainer.run, rows_per_step=rows)
        trainer.probe()
        best = max(r for r in range(1, rows + 1) if rows % r == 0 and need(r) <= 0.92 * memory)
        assert 1 < best < rows and trainer.run.micro_batch == best
    trainer.loader.close()


def test_a_probe_that_runs_out_of_memory_leaves_no_gradient(monkeypatch, tiny):
    """In the middle of backward, at one of the sizes it tries: what lay in .grad then was trained on. And where one row
    is too much it says so; torch's error came out of it as a traceback."""
    whole, trainer = (
        Trainer(tiny(name, model={"dropout": 0.0}, max_steps=2)) for name in ("whole", "run")
    )
    on_a_gpu(monkeypatch, trainer, 2500, lambda rows: 1000 * rows)
    trainer.probe()
    assert trainer.run.micro_batch == 2 and all(p.grad is None for p in trainer.model.parameters())
    on_a_gpu(monkeypatch, trainer, 900, lambda rows: 1000 * rows)
    with pytest.raises(UserError, match="E200: batch_size: auto.*one row does not fit") as e:
        trainer.probe()
    assert e.value.exit_code == 2 and all(p.grad is None for p in trainer.model.parameters())
    assert trainer.fit() == whole.fit() == 0
    assert fingerprint(trainer.out, 2) == fingerprint(whole.out, 2)


def test_memory_that_holds_only_files_is_free_for_snapshots(tmp_path):
    """A container has read its data and the kernel keeps the pages: they count as used, and are given to whoever asks.
    Limits may lie above the process's own group, as Slurm's do, and be of cgroups' version 1 or 2."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 200 kB\nMemAvailable:       104857600 kB\n")
    assert machines.available_memory(tmp_path) == 100 << 30
    (tmp_path / "proc/self/cgroup").write_text(
        "4:cpu,cpuacct:/x\n3:memory:/job/step\n0::/job/step\n"
    )
    for root, job, names in (
        ("sys/fs/cgroup", "job", ("memory.max", "memory.current", "")),
        (
            "sys/fs/cgroup/memory",
            "job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
        (
            "sys/fs/cgroup/memory",
            "",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),  # a container's
    ):
        folder = tmp_path / root / job
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(f"{64 << 30}\n")
        (folder / names[1]).write_text(f"{63 << 30}\n")
        assert machines.available_memory(tmp_path) == 1 << 30
        lines = f"anon 5\n{names[2]}active_file {20 << 30}\n{names[2]}inactive_file {33 << 30}\n"
        (folder / "memory.stat").write_text(lines)
        assert machines.available_memory(tmp_path) == 54 << 30 and (64 << 30) in [
            n for n, _ in machines.cgroups(tmp_path)
        ]
        shutil.rmtree(tmp_path / "sys")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machines.cgroups(tmp_path) == [] and machines.available_memory(tmp_path) == 100 << 30


def test_where_the_system_does_not_say_what_is_free_there_are_snapshots(tmp_path):
    """macOS has no /proc: nothing counted as free, so there was never a snapshot."""
    assert machines.available_memory(tmp_path) == machines.total_memory("cpu") // 2 > 0


def test_pinned_snapshots_count_as_large_as_torch_makes_them(monkeypatch):
    """CUDA's host allocator rounds up to powers of two: what seemed to fit was up to twice as much."""
    snapshots = orchestrator.Snapshots(None, True)
    sizes = {"a": (3, True), "b": (1025, True), "c": (1025, False), "none": (0, True)}
    regions = {k: types.SimpleNamespace(numel=lambda n=n: n, element_size=lambda: 4, is_cuda=c) for k, (n, c) in
               sizes.items()}  # fmt: skip
    monkeypatch.setattr(snapshots, "regions", lambda: regions)
    assert snapshots.size() == 16 + 8192 + 4100


# ---------------------------------------------------------------- numbers


KINDS = {
    "dense": {},
    "moe": {"n_experts": 4, "d_expert": 32, "capacity_factor": 1.0},
    "mod": {"mod_capacity": 0.5},
    "hybrid": {"n_experts": 4, "d_expert": 32, "mod_capacity": 0.5, "mod_ffn_only": True},
}


def gradients(kind="dense", recompute="none", compiled=False, **more) -> dict[str, torch.Tensor]:
    """Of a tiny model's second turn on the same ids."""
    sizes = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 48,
        "max_seq_len": 32,
    }
    model = Transformer(ModelConfig(**sizes | KINDS[kind] | more))
    model.init_weights(0)
    model.recompute = recompute
    for block in model.blocks if compiled else ():
        block.compile()
    x, y = (
        torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(2)
    )
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(7)
        model(x, targets=y)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def apart(a: dict, b: dict) -> float:
    """The largest relative difference of two gradients, parameter by parameter."""
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-6)).item() for n in b)


def test_selective_recomputation_of_a_compiled_model():
    """--dry_run advises activation_checkpointing: selective, and on a GPU models are compiled: the first backward pass
    crashed. Its gradients are those of the plain model."""
    assert apart(gradients(recompute="selective", compiled=True), gradients()) < 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize(
    "noise", ({}, {"dropout": 0.5, "router_jitter": 0.5}), ids=("still", "noise")
)
@pytest.mark.parametrize("recompute", ("selective", "block"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_recomputation_of_every_compiled_model(kind, recompute, noise):
    """As above, with experts, depths and both; with dropout and jitter the same numbers are drawn again: the gradient
    is that of the loss, seen along itself."""
    torch._dynamo.reset()
    if not noise:
        assert apart(gradients(kind, recompute, True), gradients(kind)) < 1e-4
        return
    sizes = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "d_ff": 48,
        "max_seq_len": 32,
    }
    model = Transformer(ModelConfig(**sizes | KINDS[kind] | noise))
    model.init_weights(0)
    model.recompute = recompute
    for block in model.blocks:
        block.compile()
    x, y = (
        torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(2)
    )

    def loss():
        torch.manual_seed(7)
        return model(x, targets=y)[0]

    @torch.no_grad()
    def move(by: float) -> None:
        for p, d in zip(model.parameters(), along):
            p.add_(d, alpha=by)

    loss().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    along = [p.grad / norm for p in model.parameters()]
    move(0.001)
    above = loss().item()
    move(-0.002)
    assert (above - loss().item()) / 0.002 == pytest.approx(norm, rel=0.02)


def test_gradients_that_somebody_left_behind(tiny):
    """A notebook called backward() on the trainer's model, or a probe ran out of memory in the middle of one: the run
    that follows is the same."""
    trainer = Trainer(tiny("a", max_steps=2, eval_tokens=64))
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    assert trainer.fit() == 0 and Trainer(tiny("b", max_steps=2, eval_tokens=64)).fit() == 0
    assert fingerprint(tiny("a")["out_dir"], 2) == fingerprint(tiny("b")["out_dir"], 2)


@pytest.mark.parametrize("fits", ("a row", "nothing", "a fork's model"))
def test_the_diagnosis_of_a_bad_step_runs_out_of_memory(tiny, fits):
    """A step was not finite; repeating it in eager mode, for the diagnosis, needs more memory than there is (or fails
    in another way). It is repeated row by row, or not; the run goes on, its micro-batch as it was."""
    trainer = Trainer(tiny(max_steps=5, batch_size=4, eval_tokens=64))
    forward, diagnose, looking, left = trainer.model.forward, trainer.diagnose, [], []

    def poisoned(idx, **more):
        if looking and fits == "a fork's model":
            raise TypeError("unexpected")
        if looking and len(idx) > (fits == "a row"):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        total, stats = forward(idx, **more)
        bad = trainer.step == 3 or looking
        return total * float("nan") if bad and trainer.model.training else total, stats

    def watched(cursor):
        looking.append(1)
        found = diagnose(cursor)
        looking.clear()
        left.extend(p.grad for p in trainer.model.parameters())
        return found

    trainer.model.forward, trainer.diagnose = poisoned, watched
    assert trainer.fit() == 0 and trainer.orchestrator.dropped == 1 and trainer.run.micro_batch == 4
    assert (
        left
        and not any(g is not None for g in left)
        and not (trainer.out / "oom_hint.json").exists()
    )
    (row,) = read_lines(trainer.out / "decisions.jsonl")
    expected = {"a row": "is not finite on rank 0", "nothing": "not repeated on rank 0: no memory"}
    assert expected.get(fits, "not repeated on rank 0: TypeError: unexpected") in row["reason"]


def test_what_only_informs_fails(tiny, capsys):
    """The forecast's arithmetic and the look at which parameter moved most fail: both are said, neither ends a run."""
    trainer = Trainer(
        tiny(
            max_steps=5,
            eval_tokens=64,
            enable_early_stopping=True,
            orchestrator={"check_interval": 2},
        )
    )

    def fails(*args):
        raise np.linalg.LinAlgError("Singular matrix")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    trainer.forecast.status, trainer.orchestrator.furthest = fails, full
    assert (
        trainer.fit() == 0
        and "forecast   none: LinAlgError: Singular matrix" in capsys.readouterr().out
    )
    trainer.orchestrator.snapshots.certified = [{"data": {}}]
    assert trainer.orchestrator.worst().startswith("no memory")


@pytest.mark.parametrize(
    "dtype, scale",
    [
        (torch.bfloat16, 1 / (480 * 1024)),
        (torch.bfloat16, 1 / 1799),
        (torch.float16, 4 / 1_799_000),
    ],
)
def test_a_batch_that_is_no_power_of_two(dtype, scale):
    """The loss is divided by the targets of a step; in bf16 the trunk's gradient was off by 0.3 % against the head's,
    and in fp16 too, once the loss scale had fallen."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4100, 16, generator=g), 10 * torch.randn(64, 16, generator=g)
    y = torch.randint(64, (4100,), generator=g)
    found = []
    for kind in (dtype, torch.float32):
        a, b = x.to(dtype).to(kind).requires_grad_(), w.to(dtype).float().requires_grad_()
        (HeadLoss.apply(a, b, y, 0.0, True)[0] * scale).backward()
        found.append((a.grad.double(), b.grad.double()))
    for low, exact in zip(*found):
        assert ((low * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=7e-4)
    assert not found[0][0][-4:].eq(0).all()  # the last piece too


SHORT = {"max_steps": 8, "save_interval": 20, "eval_tokens": 64}


def run_one_turn_late(keys: dict, hurt: int) -> Trainer:
    """In the order of a GPU, on the CPU: the numbers of a turn are seen in the next one. A save is asked for at step 3,
    and step `hurt` runs out of memory once."""
    trainer = Trainer(keys)
    drain, forward, act, done = (
        trainer.finish_pending_step,
        trainer.model.forward,
        trainer.orchestrator.act,
        [],
    )

    def late():
        due = trainer.step % trainer.cfg.save_interval == 0 or trainer.step >= trainer.run.max_steps
        own = trainer.pending and trainer.pending[2] == trainer.orchestrator.turn
        return None if own and not due and "late" in keys["out_dir"] else drain()

    def full(idx, **more):
        if trainer.model.training and trainer.step == hurt and not done:
            done.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(idx, **more)

    def asked():
        trainer.save_signal = trainer.save_signal or int(trainer.orchestrator.turn == 3)
        return act()

    trainer.finish_pending_step, trainer.model.forward, trainer.orchestrator.act = late, full, asked
    assert trainer.fit() == 0 and done
    return trainer


def test_out_of_memory_is_learned_of_by_a_save(tiny):
    """On a GPU a step's numbers are seen a turn late, here by a save that was asked for. The void step is begun again
    with its own learning rate, not the next one's."""
    runs = [run_one_turn_late(tiny(name, **SHORT), 4) for name in ("late", "at_once")]
    sums = [
        {k: v for k, v in fingerprint(t.out, 8).items() if k.endswith(".safetensors")} for t in runs
    ]
    rates = [
        {r["step"]: r["lr"] for r in read_lines(t.out / "metrics.jsonl") if "lr" in r} for t in runs
    ]
    assert sums[0] == sums[1] and sums[0]
    assert rates[0] == rates[1] and len(rates[0]) == 8


def test_out_of_memory_is_no_overflow(tiny, monkeypatch):
    """fp16: a step that was void for memory halved the loss scale, though nothing had overflowed."""
    real = machines.detect

    def machine(device, precision, compile_model=False, local_rank=0):
        return dataclasses.replace(
            real(device, "fp32", compile_model, local_rank), precision="mixed_fp16"
        )

    monkeypatch.setattr(machines, "detect", machine)
    for name in ("late", "at_once"):
        trainer = run_one_turn_late(tiny(name, **SHORT, precision="mixed_fp16"), 5)
        assert trainer.orchestrator.dropped == 0
        assert trainer.loss_scale.state() == [65536.0, 8.0]


def test_a_weight_that_was_changed_on_the_way(tiny):
    """aux_loss_weight is set by hand, or by the orchestrator: the aux_loss that is said is of the weight in force."""
    trainer = Trainer(tiny(max_steps=2, eval_tokens=64, model={"n_experts": 4, "d_expert": 16}))
    trainer.orchestrator.set_knob("aux_loss_weight", 1.0)
    assert trainer.fit() == 0
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "aux_loss" in r][-1]
    assert row["aux_loss"] == pytest.approx(
        2 * trainer.get_expert_statistics()["load_balance_loss"], rel=1e-4
    )


def test_a_second_run_in_one_notebook(tiny):
    """The first was deterministic, the second says that it is not: so it is not."""
    try:
        for name, flag in (("a", True), ("b", False), ("c", True)):
            Trainer(tiny(name, deterministic=flag)).close()
            assert torch.are_deterministic_algorithms_enabled() is flag
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_slow_kernel_is_timed_without_its_warm_up(monkeypatch):
    """A kernel of a second on a GPU that works behind the host's back: only one run is timed, and it took a second."""
    now, queue = [0.0], [0.0]

    def kernel():
        queue[0] += 1.0

    def wait(device=None):
        now[0], queue[0] = now[0] + queue[0], 0.0

    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert kernels.best_time(kernel, "cuda") == 1.0


def test_text_is_made_while_training_by_another_backend(monkeypatch):
    """A sample at the end of a run on a GPU: triton would tune its kernels for one token, slices wait in each layer. It
    is made by grouped_mm; afterwards, and when nobody listens to the end, the layer is as it was."""
    assert kernels.for_generation("triton", "cpu", torch.float32, 32, 32) == "triton"
    for reason, expected in ((None, "grouped_mm"), ("too old", "slices")):
        monkeypatch.setattr(kernels, "backends", lambda *a, r=reason: {"grouped_mm": r})
        assert kernels.for_generation("triton", "cuda", torch.float32, 32, 32) == expected
    model = Transformer(
        ModelConfig(97, 32, 1, 2, d_ff=48, max_seq_len=32, n_experts=4, d_expert=32)
    )
    model.init_weights(0)
    own = [row[0] for row in model.generate([[1, 2, 3]], 6, [0], temperature=0)]
    monkeypatch.setattr("model.for_generation", lambda *a: "grouped_mm")
    steps = model.generate([[1, 2, 3]], 6, [0], temperature=0)
    found, (moe,) = [next(steps)[0]], model.sparse_layers("moe").values()
    assert moe.backend == "grouped_mm"
    assert found + [row[0] for row in steps] == own and moe.backend == "slices"
    steps = model.generate([[1, 2, 3]], 6, [0], temperature=0)
    next(steps)
    steps.close()
    assert moe.backend == "slices"


# ---------------------------------------------------------------- health and messages


def steps_of(keys, *lines, at=5):
    """Trains; `lines` of control.jsonl are there when turn `at` begins."""
    trainer = Trainer(keys)
    act = trainer.orchestrator.act

    def first_that():
        if trainer.orchestrator.turn + 1 == at:
            with open(trainer.out / "control.jsonl", "a") as f:
                f.write(
                    "".join(
                        line if "{" in line else json.dumps({"method": line}) + "\n"
                        for line in lines
                    )
                )
        return act()

    trainer.orchestrator.act = first_that
    assert trainer.fit() == 0
    return trainer


def decided(trainer) -> list[dict]:
    path = trainer.out / "decisions.jsonl"
    return read_lines(path) if path.exists() else []


def told(trainer) -> str:
    return (trainer.out / "train.log").read_text()


@pytest.mark.parametrize("rate, warmup, steps", [(5, 1, 40), (50, 100, 20)])
def test_a_rate_absurd_from_the_first_step(tiny, capsys, rate, warmup, steps):
    """The loss explodes before anything could be learned, or rises in a warm-up without an end. It is said before, in
    the log, in decisions.jsonl, in the last line and in status.json; nothing is stopped."""
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
    rows = decided(trainer)
    assert [(r["trigger"], r["action"], r["level"]) for r in rows] == [("chance", "warn", 0)], (
        "once"
    )
    assert "lower learning_rate" in rows[0]["reason"]
    health = [r["health"] for r in read_lines(trainer.out / "metrics.jsonl") if r.get("health")]
    last = told(trainer).splitlines()[-1]
    assert "finished" in last and "worse than guessing" in last and set(health) == {"critical"}
    assert "worse than guessing" in json.loads((trainer.out / "status.json").read_text())["reason"]


def test_guessing_is_no_fault_of_a_young_run(tiny):
    """A run that is healthy, one whose weights begin far above chance and fall, one of two steps: no word of it."""
    wide = {"init_std": 0.2}  # begins above ln(vocab_size), as wide models do
    for name, model, steps, rate in (
        ("plain", {}, 40, 3e-3),
        ("wide", wide, 40, 1e-2),
        ("two", wide, 2, 1e-3),
    ):
        keys = tiny(name, model, max_steps=steps, learning_rate=rate, save_interval=0)
        trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
        assert (
            decided(trainer) == [] and "worse than guessing" not in told(trainer).splitlines()[-1]
        )


def test_what_was_not_learned_and_what_was_learned_by_heart(tiny):
    """No rate at all under weights that begin badly; or a training loss that is fine beside a validation loss that is
    not: each is told with its own remedy."""
    keys = tiny(
        model={"init_std": 0.3}, max_steps=40, learning_rate=0.0, min_lr=0.0, save_interval=0
    )
    trainer = steps_of(keys | {"orchestrator": {"check_interval": 20}})
    assert "nothing was learned" in decided(trainer)[0]["reason"]
    watch = trainer.orchestrator
    watch.recent.extend([2.0] * 8)
    trainer.val_loss = 9.0
    assert "fewer epochs" in watch.worse_than_guessing()[1]
    trainer.val_loss = float("nan")
    assert "val_loss is nan" in watch.worse_than_guessing()[0]
    trainer.val_loss = 4.6
    assert watch.worse_than_guessing() is None


def test_the_rate_leaps_where_a_run_goes_on(tiny, capsys):
    """A finished run is made longer, or its schedule, rate or warm-up changed: one line says from what to what, why,
    and what would not. A run that just goes on, and wsd that is made longer in its stable part, hear nothing."""
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
    """A warm-up longer than the run, one that reaches into wsd's decay, and onecycle, which has its own rise."""
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
    """Less held out than one window, nothing at all, one of two sources without any, and a handful of rows: a line
    each. With early_stopping_patience, which could then never stop anything, E114."""
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
    """The host waits for data while a GPU computes (its queue is emulated): that is no wait of the run; what the GPU
    waited is; and what ranks compare is the GPU's time, not that of launching."""
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
    """`save` and then `rollback_steps`, written into control.jsonl at once: what was there is saved, then it goes back.
    A rollback alone saves too, and does not delete the checkpoint it needs."""
    back = json.dumps({"method": "rollback_steps", "args": [3]}) + "\n"
    for name, lines, limit in (("both", ("save", back), 0), ("alone", (back,), 1)):
        keys = tiny(name, max_steps=14, save_interval=4, save_total_limit=limit)
        keys |= {"orchestrator": {"snapshot_interval": 0}}
        trainer = steps_of(keys, *lines, at=7)
        rows = [r for r in decided(trainer) if r.get("trigger") == "user"]
        assert [r["action"] for r in rows] == [
            json.loads(line)["method"] if line[0] == "{" else line for line in lines
        ]
        gone = rows[-1]
        assert gone["executed"] and gone["args"]["to_step"] == 4 and gone["before"]["step"] == 7
        aside = {p.name for p in trainer.out.glob("*.rolled_back")}
        assert "step_00000007.rolled_back" in aside, "what was undone is still there"
        assert trainer.step == 14


def test_commands_as_other_programs_write_them(tiny):
    """A byte order mark before the first line, and no newline after the last: both are read, once."""
    line = json.dumps({"method": "adjust_weight_decay", "args": [0.05]}) + "\n"
    trainer = steps_of(tiny(), "\ufeff" + line, json.dumps({"method": "save"}), at=3)
    rows = [(r["action"], r.get("refused")) for r in decided(trainer) if r.get("trigger") == "user"]
    assert rows == [("adjust_weight_decay", None), ("save", None)]


def test_the_story_of_a_run_in_which_nothing_happened(tiny, capsys, tmp_path):
    """`bench.py decisions` of a healthy run, which has no decisions.jsonl, is no error; of no run it is."""
    trainer = steps_of(tiny())
    capsys.readouterr()
    assert report.main([str(trainer.out)]) == 0
    assert "nothing had to be decided" in capsys.readouterr().out
    with pytest.raises(UserError, match="E108"):
        report.main([str(tmp_path / "none")])


def test_a_presets_prompt_goes_with_its_data(tmp_path, shards):
    """quickstart on one's own data: its sample_prompt, a piece of Python, is not continued. One that is typed is,
    and so is that of one's own YAML, and the preset's on its own data."""
    own = write_yaml(tmp_path / "own.yaml", {"data_dir": "x", "sample_prompt": "Once"})
    for words, prompt in (
        (["quickstart", "--prepare", "null", "--data_dir", shards], None),
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


def test_the_peak_was_measured_while_the_machine_was_busy(tiny):
    """A run then came out above 100 % of what the machine can do: such a share is not a number."""
    trainer = Trainer(tiny(max_steps=2))
    trainer.peak = 1.0
    trainer.fit()
    assert "mfu -, data" in told(trainer)
    assert [r["mfu"] for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r] == [
        None,
        None,
    ]


def test_overwrite_leaves_no_traces_of_the_run_before(tiny):
    """Curves, a picture and checkpoints set aside belong to the run that is overwritten; a file of the user's stays."""
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
    """Stopped and started again it is one run of wandb, also offline, in one line; overwritten it is another."""
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
