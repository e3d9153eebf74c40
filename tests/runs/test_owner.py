"""A run has one owner: second starts, dead owners, restarts, launches by srun and torchrun,
notebooks."""

import contextlib
import errno
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, read_lines, run_python, write_yaml
from rig import stop_at

import train
from lumen import checkpoint, files, launch
from lumen import owner as owners
from lumen.errors import UserError
from train import Trainer


@contextlib.contextmanager
def owned(out):
    """Another process that owns the folder, and does nothing with it."""
    command = [sys.executable, "tests/programs/holder.py", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
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


def test_a_second_start_into_a_live_run(tiny, monkeypatch):
    """The same command twice, with overwrite or another model: the second hears who is at work and
    changes nothing, no checkpoint that is being written, no half line. When the first is killed
    with -9 the next start goes on."""
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
    """A mistake in the YAML: no folder comes of it, and a run that is there stays as it was, to the
    byte."""
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
    """A file of a host that is not this one blocks while it is touched, by the clock of the file
    system; one from before this host's last boot, of a dead process, or not touched for long,
    blocks nobody."""
    monkeypatch.setattr(owners, "GRACE", 0)
    here, file = owners.identity(), tmp_path / "owner.json"
    elsewhere, rebooted = (
        here | {"host": "elsewhere", "boot": "its own", "locked": True},
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
    """The file alone must do: a live process on this host blocks, a killed one does not; of two
    that start at the same moment one has it; and an owner that was taken for dead notices before it
    saves."""

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
    """Slurm starts a job again while its last process is still dying: it waits instead of being
    refused for good."""
    keys = tiny(max_steps=2)
    monkeypatch.setattr(owners, "GRACE", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(keys["out_dir"]) as first:
        threading.Timer(0.5, first.kill).start()
        assert Trainer(keys).fit() == 0


def test_a_notebook_that_makes_its_trainer_again(tiny, monkeypatch):
    """After an exception, or without one, a new Trainer in the same process has the run; not while
    the other trains."""
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
    """`srun -n 2 python train.py`, or mpirun: two whole runs in one folder are refused at once,
    with what to type. A batch script that asked for many tasks and starts one, and ranks of
    torchrun under srun, are none of that."""
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
    """`resume: none`, with overwrite or without, and a job that is preempted: the restart goes on
    from what the first start saved. If that died before it came to own the folder, the restart does
    what it would have done."""
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
    """The run diverged last week. Today's job dies before it has begun and is started again: it is
    not refused with last week's words; its own are."""
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
    """A rank is killed after the first checkpoint; torchrun starts all with the same words: nothing
    is deleted."""
    keys = tiny(resume="none", overwrite=True, save_interval=4, max_steps=12)
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=1",
        "--master_port=29617",
    ]
    result = run_python(*words, "tests/programs/dying.py", write_yaml(tmp_path / "c.yaml", keys))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    rows = [
        r for r in read_lines(tmp_path / "run/metrics.jsonl") if r["attempt"] == 2 and "loss" in r
    ]
    assert rows[0]["step"] == 5, "from the checkpoint at 4"


def test_a_refusal_is_of_one_boot_and_one_container(monkeypatch, tmp_path):
    """torchrun is process 1 in many containers: what one of them was refused for stopped the
    restarts of others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LUMEN_REFUSED", raising=False)
    real = owners.identity
    owners.refused(UserError("E300", "in use"))
    assert "in use" in owners.refused()
    for other in ({"boot": "another"}, {"space": "pid:[1]"}):
        monkeypatch.setattr(owners, "identity", lambda other=other: real() | other)
        assert owners.refused() == ""


@pytest.mark.parametrize("locked", [True, False])
def test_a_container_that_was_killed_gives_its_folder_back(tmp_path, monkeypatch, locked):
    """Another pid namespace and another name on the same kernel, started anew at once: it was
    refused for five minutes. Without a lock to go by it still is."""
    row = owners.identity() | {"host": "gone", "space": "pid:[1]", "pid": 4, "locked": locked}
    (tmp_path / owners.Owner.NAME).write_text(json.dumps(row))
    monkeypatch.setattr(owners, "GRACE", 0)
    owner = owners.Owner(tmp_path)
    if locked:
        owner.take()
        owner.release()
    else:
        with pytest.raises(UserError, match="E300.*process 4 on gone"):
            owner.take()
