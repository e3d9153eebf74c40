"""Runs that are hit, in processes of their own: signals, kill -9, full disks, shards that go, ranks
that die.

Nothing is lost, nothing half-written is believed, and the run that was hit ends with the bytes of
one that never was. This file is also what the tests start: `python tests/processes/test_survival.py
MODE ...`, see `main` at its end. A fault is [rank, place, step, action, argument ...] and happens
once."""

import errno
import faulthandler
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, fingerprint, losses, read_lines, run_python, write_yaml
from forks import run_forked

import train
import train_fsdp
from lumen import checkpoint, files, launch, loader, windows
from lumen.errors import UserError
from train import Parallel, Trainer

STEPS = 12


def run_keys(shards, out, **changes) -> dict:
    """The keys of a run of half a second, with dropout; it evaluates and saves at 4, 8 and 12."""
    shape = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
    }
    shape |= {"max_seq_len": 32, "dropout": 0.1}
    run = {
        "data_dir": str(shards),
        "out_dir": str(out),
        "max_steps": STEPS,
        "batch_size": 2,
        "device": "cpu",
    }
    run |= {
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "save_interval": 4,
        "save_total_limit": 0,
        "log_interval": 1,
    }
    run |= {"eval_tokens": 256, "val_fraction": 0.05, "precision": "fp32", "compile_model": False}
    return run | changes | {"model": shape}


def evaluations(out_dir) -> dict:
    """step -> what was evaluated there; the last line of a step counts."""
    names = ("val_loss", "best_val_loss", "best_step")
    rows = read_lines(Path(out_dir) / "metrics.jsonl")
    return {r["step"]: [r[n] for n in names] for r in rows if "val_loss" in r}


def same_as_unhurt(out, whole, steps=STEPS) -> None:
    """All that a run leaves: weights, moments and numbers byte for byte; every loss, every
    evaluation; no rubbish."""
    assert fingerprint(out, steps) == fingerprint(whole, steps)
    assert losses(out) == losses(whole) and evaluations(out) == evaluations(whole)
    assert (Path(out) / "best.json").read_text() == (Path(whole) / "best.json").read_text()
    assert not [p.name for p in Path(out).iterdir() if p.suffix in (".tmp", ".old")]


def start_here(mode, *words, launcher=(), **env):
    return run_python(
        *launcher,
        "tests/processes/test_survival.py",
        mode,
        *words,
        PYTHONPATH=f"{ROOT}:{ROOT}/tests",
        **env,
    )


def two_ranks(max_restarts=0) -> list[str]:
    words = ["--standalone", "--nproc_per_node=2", f"--max-restarts={max_restarts}"]
    return ["-m", "torch.distributed.run", *words]


# ---------------------------------------------------------------- two ranks: signals, disks, shards

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)
SCENES = {  # name: (faults, step at which it ends, exit code or error code, faults of the second start)
    "TERM in an evaluation": ([[1, "evaluate", 4, "signal", TERM]], 4, 0, []),
    "TERM at a step that is evaluated": (
        [[r, "rows", 7, "signal", TERM] for r in (0, 1)],
        8,
        0,
        [],
    ),
    "INT in the last evaluation": ([[0, "evaluate", 12, "signal", INT]], 12, 0, []),
    "INT in a save": ([[1, "write", 4, "signal", INT]], 5, 0, []),
    "TERM in the last words of a save": ([[0, "commit", 8, "signal", TERM]], 9, 0, []),
    "TERM and INT a step apart": (
        [[0, "rows", 5, "signal", TERM], [1, "rows", 6, "signal", INT]],
        6,
        0,
        [],
    ),
    "full disk on a rank": (
        [[1, "write", 4, "limit", 20_000], [1, "rows", 6, "limit", -1]],
        12,
        0,
        [],
    ),
    "full disk on a rank to the end": (
        [[1, "write", 12, "limit", 20_000]],
        12,
        4,
        [[1, "start", 0, "limit", -1]],
    ),
    "shard gone": (
        [[1, "rows", 2, "rename", "part_1.npy", "away"]],
        None,
        "E111 part_1.npy",
        "away",
    ),
    "shard cut": ([[0, "rows", 2, "truncate", "part_1.npy", 1000]], None, "E111 part_1.npy", "cut"),
    "reader that fails twice": ([[1, "rows", 5, "eio", 2]], 12, 0, []),
    "reader that fails in an evaluation": (
        [[1, "evaluate", 8, "eio", 999]],
        8,
        "E111 part_",
        "eio",
    ),
}


@pytest.fixture(scope="module")
def scenes(shards, tmp_path_factory) -> dict:
    """Every scene and the run without one, in one launch of two ranks: folder -> what each rank
    said at the end."""
    top = tmp_path_factory.mktemp("scenes")
    jobs = [["whole", run_keys(shards, top / "whole"), []]]
    for name, (faults, _, _, again) in SCENES.items():
        out, data = top / name.replace(" ", "_"), top / f"{name} data"
        shutil.copytree(shards, data)
        part, kept = str(data / "part_1.npy"), str(Path(shards) / "part_1.npy")
        faults = [
            [part if w == "part_1.npy" else f"{part}.away" if w == "away" else w for w in f]
            for f in faults
        ]
        mend = {
            "away": [0, "start", 0, "rename", f"{part}.away", part],
            "cut": [0, "start", 0, "copy", kept, part],
        }
        mend["eio"] = [1, "start", 0, "eio", 0]
        again = [mend[again]] if isinstance(again, str) else again
        jobs += [
            [name, run_keys(data, out), faults],
            [f"{name}, again", run_keys(data, out), again],
        ]
    result = run_forked(__file__, "jobs", write_yaml(top / "jobs", jobs), ranks=2)
    found = {"top": top, "log": result.stderr[-3000:] + result.stdout[-3000:]}
    for line in result.stdout.splitlines():
        if line.startswith("RESULT "):
            job, rank, *rest = json.loads(line[7:])
            found.setdefault(job, {})[rank] = rest
    return found


@pytest.mark.parametrize("name", SCENES)
def test_two_ranks_agree_and_lose_nothing(scenes, name):
    _, step, code, again = SCENES[name]
    assert {0, 1} <= scenes.get(f"{name}, again", {}).keys(), scenes["log"]
    first, second = scenes[name], scenes[f"{name}, again"]
    assert first[0][0] == first[1][0] and first[0][2] == first[1][2], (
        "both ranks ended at the same step, saved as much"
    )
    ended, steps = first[0][0], first[0][2]
    assert ended == step or (step is None and 2 <= ended <= 7)  # some batches had been read ahead
    for rank in (0, 1):
        said = first[rank][1]
        assert said == code or (
            isinstance(code, str) and all(w in str(said) for w in code.split())
        ), said
    assert steps[-1] == (8 if code == 4 else ended), "what was trained was saved"
    if name == "full disk on a rank":
        assert steps == [7, 8, 12], "tried again as soon as there was room"
    if step == STEPS and not code and name != "INT in the last evaluation":
        assert steps == second[0][2], "nothing was left to do"
    assert [second[r][:2] for r in (0, 1)] == [[STEPS, 0]] * 2
    out = scenes["top"] / name.replace(" ", "_")
    same_as_unhurt(out, scenes["top"] / "whole")
    assert all(
        not checkpoint.Checkpoint(checkpoint.step_dir(out, s)).verify()
        for s in checkpoint.list_steps(out)
    )


# ---------------------------------------------------------------- dead ranks, diverged runs,
# torchrun's restarts


IN_A_STEP, IN_A_SAVE = [[1, "rows", 6, "signal", 9]], [[0, "manifest.json", 8, "signal", 9]]
SLOW_DISK = [[1, "write", 4, "wait", os.devnull, 12]]


def test_who_loses_a_peer_asks_for_a_restart(shards, tmp_path):
    """Started by srun or by hand nobody kills the rest: it must not hang, and its exit code must
    say what to do."""
    words = [
        "main",
        json.dumps([IN_A_STEP]),
        write_yaml(tmp_path / "c.yaml", run_keys(shards, tmp_path / "run")),
    ]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with ThreadPoolExecutor() as pool:
        zero, one = pool.map(
            lambda rank: start_here(*words, RANK=str(rank), LOCAL_RANK=str(rank), **env), (0, 1)
        )
    assert one.returncode == -9 and zero.returncode == 75 and "error E601" in zero.stderr, (
        zero.stderr[-2000:]
    )
    short = "import sys, train; from lumen import launch; train.Parallel.STARTUP_TIMEOUT = 2; launch.command(train.main)"
    env |= {"RANK": "0", "LOCAL_RANK": "0"}
    waits = run_python(
        "-c", short, words[2], "--comm_timeout", 2, "--out_dir", tmp_path / "alone", **env
    )
    assert waits.returncode == 75 and "error E601: at the start" in waits.stderr, (
        "a peer that never comes"
    )
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("restart", 75)


@pytest.fixture(scope="module")
def unhurt(scenes, shards, tmp_path_factory) -> dict:
    """The folder of a run of two ranks without a fault: train.py's and train_fsdp.py's."""
    out = tmp_path_factory.mktemp("parts") / "whole"
    path = write_yaml(out.parent / "c.yaml", run_keys(shards, out))
    assert run_forked(__file__, "parts", "[[]]", path, ranks=2).returncode == 0
    return {"main": scenes["top"] / "whole", "parts": out}


@pytest.mark.parametrize(
    "mode, deaths",
    [
        ("main", [IN_A_SAVE]),
        ("parts", [IN_A_STEP]),
        pytest.param("main", [IN_A_STEP, IN_A_SAVE], marks=pytest.mark.nightly),
        pytest.param("parts", [IN_A_SAVE, IN_A_STEP], marks=pytest.mark.nightly),
        pytest.param("main", [SLOW_DISK + IN_A_STEP], marks=pytest.mark.nightly),
    ],
)
def test_dead_ranks_are_restarted_and_nothing_changes(unhurt, tmp_path, shards, mode, deaths):
    """A rank dies, in a step or amid a save; torchrun starts both anew, and again; train_fsdp.py's
    too. A save that is longer than comm_timeout is not taken for a death."""
    keys = run_keys(
        shards, tmp_path / "run", **{"comm_timeout": 8} if SLOW_DISK[0] in deaths[0] else {}
    )
    words = [json.dumps([*deaths, []]), write_yaml(tmp_path / "c.yaml", keys)]
    result = start_here(mode, *words, launcher=two_ranks(max_restarts=len(deaths)))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    rows = [r for r in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in r]
    first = {
        a: [r["step"] for r in rows if r["attempt"] == a][0] for a in range(1, len(deaths) + 2)
    }
    assert first == {1: 1, **{a: 5 for a in range(2, len(deaths) + 2)}}, (
        "from the checkpoint at 4, each time"
    )
    same_as_unhurt(tmp_path / "run", unhurt[mode])
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == (
        "finished",
        STEPS,
        len(deaths) + 1,
    )


def test_a_diverged_run_is_not_restarted(tmp_path, shards):
    keys = run_keys(
        shards,
        tmp_path / "run",
        learning_rate=1e30,
        warmup_steps=0,
        max_steps=2000,
        save_interval=1000,
    )
    keys |= {"log_interval": 10}
    path = write_yaml(tmp_path / "c.yaml", keys)
    result = run_python(*two_ranks(max_restarts=1), "train.py", path)
    assert result.returncode != 0 and result.stderr.count("error E301") == 1, result.stderr[-3000:]
    assert result.stderr.count("not restarted: E301") == 1, result.stderr[-3000:]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"], status["attempt"]) == (
        "diverged",
        3,
        1,
    ) and "E301" in status["reason"]
    assert {r["attempt"] for r in read_lines(tmp_path / "run/metrics.jsonl")} == {1}


# ---------------------------------------------------------------- kill -9 in a save

BYTES = [["rank_00000.safetensors", x] for x in (0, 1, 7, 8, 9, 500, 0.1, 0.5, 0.9, -1)]
BYTES += [["rank_00000.json", x] for x in (0, 0.5, -1)]
BYTES += [["state.json", x] for x in (0, 1, 0.5, -1)] + [
    ["manifest.json", x] for x in (0, 1, 0.5, -1)
]
LATER = [["best.json", x] for x in (0, 0.5)]


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory) -> dict:
    """What a run's last save leaves when it is killed at each point, {point: folder}; "before" and
    "whole" too."""
    top = tmp_path_factory.mktemp("killed")
    keys = run_keys(shards, top / "whole", max_steps=8, save_total_limit=1)
    result = run_forked(__file__, "kill", json.dumps(keys), json.dumps(BYTES + LATER))
    assert result.returncode == 0, result.stderr[-3000:]
    found = {tuple(p): Path(folder) for p, folder in json.loads(result.stdout.splitlines()[-1])}
    return found | {"before": top / "before", "whole": top / "whole", "keys": keys}


def tree(folder) -> dict:
    """Every file of a run that is not a diary: path -> hash."""
    files = [
        p
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.suffix not in (".jsonl", ".log")
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_at_any_byte_of_a_save_leaves_the_run_as_it_was(killed):
    before = tree(killed["before"])
    assert len(BYTES) >= 20 and "step_00000004/manifest.json" in before
    left = set()
    for point in BYTES:
        left.add(json.dumps(tree(killed[tuple(point)]), sort_keys=True))
        checkpoint.clean_up(killed[tuple(point)])
        assert tree(killed[tuple(point)]) == before, point
    assert len(left) == len(BYTES), "each left something else behind"


def test_killed_before_any_call_of_a_save_the_run_ends_with_the_same_bytes(killed, tmp_path):
    """Of the last save, so that nothing comes after it that would put it right."""
    calls, ends = [p for p in killed if p[0] == "call"], {}
    assert len(calls) > 20
    for point in [*calls, *map(tuple, LATER + BYTES[::9])]:
        checkpoint.clean_up(killed[point])
        assert checkpoint.best_step(killed[point]) in checkpoint.list_steps(killed[point]), (
            "the best is always there"
        )
        ends.setdefault(json.dumps(tree(killed[point]), sort_keys=True), killed[point])
    assert 4 <= len(ends) <= 12  # not saved; saved; best.json; deleted what is no longer kept
    kinds = set()
    for i, folder in enumerate(ends.values()):
        kinds.add(tuple(checkpoint.list_steps(folder)))
        path = write_yaml(tmp_path / f"{i}.yaml", killed["keys"] | {"out_dir": str(folder)})
        assert train.main([str(path)]) == 0
        same_as_unhurt(folder, killed["whole"], 8)
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert checkpoint.find(folder, best=True).step == checkpoint.find(folder).step == 8
    assert kinds == {(4,), (4, 8), (8,)}


# ---------------------------------------------------------------- a disk that is full to the last
# byte


def small_disk() -> list[str]:
    """How to run a command that may mount a disk of its own; it goes when the command ends."""
    for words in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            if not subprocess.run(
                [*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
            ).returncode:
                return words
        except OSError:
            pass
    return []


def test_a_disk_full_to_the_last_byte(shards, tmp_path):
    """A real one. Its run goes on, and when there is room again nothing is missing: no checkpoint,
    no line of a log. Where there is none until the end, the exit code says so, and the next start
    writes what was missing."""
    if not (words := small_disk()):
        pytest.skip("mounting a tmpfs needs root or user namespaces")
    disk, out = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    folders, longer = (
        (disk / "for a while", disk / "to the end", out / "whole"),
        {"max_steps": 32, "save_interval": 8},
    )
    keys = [run_keys(shards, folder, **longer) for folder in folders]
    full, free = (
        [0, "rows", 9, "fill", f"{disk}/filler"],
        [0, "rows", 25, "remove", f"{disk}/filler"],
    )
    jobs = [["for a while", keys[0], [full, free]], ["to the end", keys[1], [full]]]
    jobs += [
        ["again", keys[1], [[0, "start", 0, "remove", f"{disk}/filler"]]],
        ["whole", keys[2], []],
    ]
    script = f"mount -t tmpfs -o size=3m none '{disk}' && '{sys.executable}' tests/processes/test_survival.py jobs \"$1\""
    script += f" && cp -r '{disk}'/* '{out}'"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [*words, "sh", "-c", script, "sh", str(write_yaml(tmp_path / "jobs", jobs))]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    said = [
        json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")
    ]
    ended = {name: rest for name, _, *rest in said}
    assert "No space left on device" in result.stdout and "E307" in result.stdout
    assert ended["for a while"] == [32, 0, [8, 26, 32]] and ended["to the end"] == [32, 4, [8]]
    assert ended["again"][:2] == [32, 0]
    for name in ("for a while", "to the end"):
        same_as_unhurt(out / name, out / "whole", 32)


# ---------------------------------------------------------------- for nights: torchrun itself is
# hit


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["evaluate", "write", "commit"])
@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("mode", ["main", "parts"])
def test_torchrun_is_told_to_stop(unhurt, tmp_path, shards, place, number, mode):
    """The signal goes to torchrun, which hands it on; TERM to it at a moment when its ranks
    evaluate or save."""
    keys, marker = run_keys(shards, tmp_path / "run"), tmp_path / "here"
    path = write_yaml(tmp_path / "c.yaml", keys)
    faults = [[rank, place, 4, "wait", str(marker), 3] for rank in (0, 1)]
    command = [
        sys.executable,
        *two_ranks(),
        "tests/processes/test_survival.py",
        mode,
        json.dumps([faults]),
        str(path),
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.time() + 60
    while not marker.exists() and time.time() < until:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    status = json.loads((tmp_path / "run/status.json").read_text())
    step = 4 if place == "evaluate" else 5
    assert (status["state"], status["step"]) == ("stopped", step), out[-3000:]
    assert checkpoint.list_steps(tmp_path / "run")[-1] == step
    result = start_here(mode, "[[]]", path, launcher=two_ranks())
    assert result.returncode == 0, result.stderr[-3000:]
    same_as_unhurt(tmp_path / "run", unhurt[mode])


@pytest.mark.nightly
def test_killed_again_and_again_at_any_moment(shards, tmp_path):
    """kill -9 of the whole process after a random time, until the run is through."""
    keys = {
        "max_steps": 160,
        "save_interval": 3,
        "save_total_limit": 2,
        "eval_tokens": 64,
        "log_interval": 1,
    }
    cut, whole = (
        run_keys(shards, tmp_path / "cut", **keys),
        run_keys(shards, tmp_path / "whole", **keys),
    )
    assert Trainer(whole).fit() == 0
    path, gen, kills = write_yaml(tmp_path / "c.yaml", cut), torch.Generator().manual_seed(0), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "train.py", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        rows = Path(cut["out_dir"]) / "metrics.jsonl"
        size, until = rows.stat().st_size if rows.exists() else 0, time.time() + 60
        while (
            process.poll() is None
            and time.time() < until
            and not (rows.exists() and rows.stat().st_size > size)
        ):
            time.sleep(0.01)
        time.sleep(float(torch.rand((), generator=gen)) * 0.5)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 5
    same_as_unhurt(cut["out_dir"], whole["out_dir"], 160)


# ---------------------------------------------------------------- what the tests start

HERE = {"trainer": None, "faults": [], "eio": 0}  # of the run at work in this process


class Halves(Parallel):
    """Each rank owns, and so writes, its part of each tensor; all of it is on every rank as in
    Parallel."""

    def local_shards(self, name, tensor):
        if not tensor.dim():
            return super().local_shards(name, tensor)
        shape, out = tuple(tensor.shape), []
        for rank in range(self.world):
            a, b = (len(tensor) * r // self.world for r in (rank, rank + 1))
            out += (
                [((a, *(0 for _ in shape[1:])), shape, tensor[a:b], rank == self.rank)]
                if b > a
                else []
            )
        return out


class Kept(Halves):
    def close(self):  # the process group serves the next run too
        if self.world > 1:
            dist.barrier()


def fill(path):
    """Take what room there is, to the last byte."""
    with open(path, "wb", buffering=0) as f:
        for size in (1 << 16, 1 << 9, 1):
            try:
                while f.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def wait(path, seconds):
    Path(path).touch()
    until = time.time() + seconds  # a signal ends a sleep, not this
    while time.time() < until:
        time.sleep(0.1)


ACTIONS = {
    "signal": lambda number: os.kill(os.getpid(), number),
    "limit": lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)),
    "rename": os.rename,
    "truncate": os.truncate,
    "copy": shutil.copyfile,
    "remove": os.remove,
    "eio": lambda times: HERE.update(eio=times),
    "fill": fill,
    "wait": wait,
}


def hit(place) -> None:
    rank, step = int(os.environ.get("RANK", 0)), HERE["trainer"].step if place != "start" else 0
    for fault in [f for f in HERE["faults"] if f[:3] == [rank, place, step]]:
        HERE["faults"].remove(fault)
        ACTIONS[fault[3]](*fault[4:])


def before(owner, name, place=None) -> None:
    """Make `place` (or the name of the file that is written) a place where faults can happen."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        hit(place or Path(args[0]).name)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def install() -> None:
    """Open the places for faults."""
    before(loader.Loader, "next", "rows")
    before(Trainer, "evaluate", "evaluate")
    before(checkpoint, "write", "write")
    before(checkpoint, "commit", "commit")
    before(checkpoint, "write_json")
    windows.RETRY_WAITS_SECONDS, windows.DISK_RETRY_WAITS_SECONDS = (0.01, 0.02), (0.03, 0.04)
    pread, build = os.pread, Trainer.build

    def failing(*args):
        if HERE["eio"]:
            HERE["eio"] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(*args)

    def building(self, *args):
        HERE["trainer"] = self
        return build(self, *args)

    os.pread, Trainer.build = failing, building


def jobs(path) -> None:
    """Runs one after the other in the same processes, to save their start; each says how it
    ended."""
    install()
    sleep, train.time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))
    for name, keys, faults in json.loads(Path(path).read_text()):
        HERE.update(faults=faults, trainer=None)
        faulthandler.dump_traceback_later(
            60, exit=True
        )  # ranks that wait for one another do so for half an hour
        hit("start")
        if dist.is_initialized():
            dist.barrier()
        trainer = Trainer(keys, Kept)
        try:
            code = trainer.fit()
        except UserError as error:
            trainer.loader.close()
            code = f"{error.code} {error.text}"
        steps = checkpoint.list_steps(trainer.out)
        row = json.dumps([name, trainer.parallel.rank, trainer.step, code, steps])
        if dist.is_initialized():
            dist.barrier()  # all have looked
        os.write(1, f"RESULT {row}\n".encode())  # in one go: the other rank writes too


def kill(keys, points) -> None:
    """Train; in place of the last save let forked copies of this process save, each in a copy of
    the run, and die at one point each: at a byte of a file, or before a call of the file system.
    Then save for good."""
    keys, points = json.loads(keys), json.loads(points)
    top, real, done = Path(keys["out_dir"]).parent, Trainer.save, []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def save(self, **how):
        if self.step == keys["max_steps"] and not done:
            shutil.copytree(self.out, top / "before")
            calls, killed = 0, True
            while killed:
                calls += len(done) >= len(points)
                point = points[len(done)] if len(done) < len(points) else ["call", calls]
                folder = top / "-".join(map(str, point))
                shutil.copytree(top / "before", folder)
                if not (pid := os.fork()):
                    self.out = self.saver.out = self.report.out = folder
                    die_at(*point, folder)
                    real(self, **how)
                    os._exit(0)
                killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
                assert killed or point[0] == "call", f"it lived through {point}"
                done.append([point, str(folder)])
            done.pop()  # this one lived: it had no more calls
        return real(self, **how)

    Trainer.save = save
    assert Trainer(keys).fit() == 0
    print(json.dumps(done))


def die_at(name, at, folder) -> None:
    """Arrange for this process to die before byte `at` (a share of the file if it is a fraction,
    from its end if below 0) of the file `name` is written, or before the at-th call that opens,
    makes, moves or deletes something."""
    save_file, write_json = checkpoint.save_file, files.write_json

    def offset(size):
        return int(size * at) if isinstance(at, float) else at % size

    def cut(tensors, path, **options):
        save_file(
            tensors, path, **options
        )  # it may write under another name and rename; this is the worse case
        if Path(path).name == name:
            os.truncate(path, offset(os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)

    def limited(path, data):
        if Path(path).name == name:  # the kernel kills whoever writes on beyond the limit
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            size = offset(len(json.dumps(data, indent=1, sort_keys=True)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write_json(path, data)

    def call(event, args, left=[at]):  # noqa: B006 - it counts down
        if event.split(".")[0] in ("open", "os", "shutil") and str(args[0]).startswith(str(folder)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    if name == "call":
        sys.addaudithook(call)
    checkpoint.save_file, files.write_json = cut, limited
    checkpoint.write_json = limited


def main(mode, *words) -> None:
    if mode == "jobs":
        jobs(*words)
    if mode == "kill":
        kill(*words)
    if mode in (
        "main",
        "parts",
    ):  # as train.py or train_fsdp.py runs, with the faults of this restart
        install()
        HERE["faults"] = json.loads(words[0])[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
        sys.argv = ["train.py", *words[1:]]
        launch.command(
            lambda argv: train.main(argv, Halves if mode == "main" else train_fsdp.make_parallel)
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # as launch.command does: gloo's threads can abort a process that has done all its work


if __name__ == "__main__":
    main(*sys.argv[1:])
