"""What several test files share: a tiny dataset, a tiny configuration, runs as processes of their
own."""

import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two processes share two cores here
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # Triton kernels on the CPU: before model_moe is imported; GPU: 0
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

from lumen import machine

# what MFU is counted against is measured for 0.2 s at the start of a run: here once a process, not
# once a Trainer
machine.matrix_peak = functools.lru_cache(None)(machine.matrix_peak)
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
HANGS = 900  # seconds a test may take

# ---------------------------------------------------------------- no test hangs, none leaves a
# process behind

MARK = None  # in the environment of all that this pytest process starts
HELPERS = ("resource_tracker", "forkserver", "compile_worker")  # they end when their parent does
LEFT = []  # command lines of processes that outlived the tests
STDERR = []  # a copy from before a test's output is captured, else the traceback of one that hangs is lost


def pytest_configure(config):
    """Not at import: ranks import this file too, and what they start is to bear the mark of the
    tests. A worker of pytest-xdist comes here by itself and has a mark of its own."""
    global MARK
    MARK = f"LUMEN_TESTS={os.getpid()}-{time.time_ns()}"
    os.environ["LUMEN_TESTS"] = MARK.partition("=")[2]
    STDERR.append(os.dup(2))
    if getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = (
            "0"  # else a test that hangs has eight more workers to do it again
        )


def orphans() -> dict[int, str]:
    """pid -> command line of what tests started and nobody waits for; torchrun's ranks are in
    sessions of their own, so the environment alone tells. /proc shows that of the exec: never this
    process, nor pytest-xdist's."""
    found = {}
    if MARK is None or sys.platform != "linux":
        return found
    for pid in filter(str.isdigit, os.listdir("/proc")):
        folder = Path("/proc", pid)
        try:
            if MARK.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            line = (
                (folder / "cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
        except OSError:  # it has ended, or is another user's
            continue
        if os.getpid() not in (int(pid), parent) and not any(name in line for name in HELPERS):
            found[int(pid)] = line
    return found


def end_orphans(patience: float = 0) -> list[str]:
    """Kills those that have not ended after so many seconds; what they were."""
    until, killed = time.time() + patience, {}
    while (left := orphans()) and time.time() < until:
        time.sleep(0.1)
    until = time.time() + 10
    while left and time.time() < until:
        killed |= left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.05)
        left = orphans()
    return [f"{pid}: {line}" for pid, line in killed.items()]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if "forks" in sys.modules:
        sys.modules["forks"].stop()
    if not session.config.pluginmanager.hasplugin(
        "dsession"
    ):  # else pytest-xdist's controller, whose workers look
        LEFT.extend(end_orphans(10))
    if hasattr(session.config, "workeroutput"):  # a worker's exit status and output go nowhere
        session.config.workeroutput["left"] = LEFT
    if LEFT:
        session.exitstatus = session.exitstatus or 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LEFT.extend((getattr(node, "workeroutput", None) or {}).get("left", []))


def pytest_terminal_summary(terminalreporter):
    if LEFT:
        terminalreporter.section("processes that outlived the tests, killed", red=True)
        terminalreporter.write_line("\n".join(LEFT))


@pytest.fixture(autouse=True)
def ends():
    """A test that hangs ends with a traceback of all threads, and its pytest process with it."""
    faulthandler.dump_traceback_later(HANGS, exit=True, file=STDERR[0])
    yield
    faulthandler.cancel_dump_traceback_later()


# ---------------------------------------------------------------- data, runs


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """Three bare shards of a language that is easy to learn: each id is the last one plus 0, 1 or
    2, modulo 97."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for i in range(3):
        np.save(
            folder / f"part_{i}.npy", (np.cumsum(rng.integers(0, 3, 7000)) % 97).astype(np.uint16)
        )
    return str(folder)


@pytest.fixture
def tiny(shards, tmp_path):
    """tiny(**changes) -> the keys of a run that takes a second; dropout on, two micro-steps."""

    def make(name="run", model=None, **changes) -> dict:
        shape = {
            "vocab_size": 97,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 48,
        }
        shape |= {"max_seq_len": 32, "dropout": 0.1}
        run = {
            "data_dir": shards,
            "out_dir": str(tmp_path / name),
            "max_steps": 12,
            "batch_size": 2,
            "device": "cpu",
        }
        run |= {
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "save_interval": 4,
        }
        run |= {"log_interval": 1, "eval_tokens": 1024, "val_fraction": 0.05, "precision": "fp32"}
        run |= {"compile_model": False, "save_total_limit": 0}
        return {k: v for k, v in (run | changes).items() if v is not ...} | {
            "model": shape | (model or {})
        }

    return make


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """reference(keys) -> a finished run that tests only compare with, trained once a session; see
    rig.References."""
    import rig  # here, for those who import this file only for its names need no trainer

    return rig.References(tmp_path_factory.mktemp("reference"))


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(out_dir) -> dict[int, float]:
    """step -> training loss; the last line of a step counts."""
    return {
        r["step"]: r["loss"] for r in read_lines(Path(out_dir) / "metrics.jsonl") if "loss" in r
    }


def fingerprint(out_dir, step: int) -> dict:
    """What must be equal, byte for byte, between a resumed run and one never stopped."""
    folder = Path(out_dir) / f"step_{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    state = json.loads((folder / "state.json").read_text())
    names = (
        "step",
        "cursor",
        "tokens",
        "val_loss",
        "best_val_loss",
        "best_step",
        "scaler",
        "orchestrator",
    )
    sums = {k: v["sha256"] for k, v in files.items() if k != "state.json"}
    return sums | {k: state[k] for k in names} | {"segments": state["run"]["segments"]}


def run(command: list, timeout: float, **options) -> subprocess.CompletedProcess:
    """Past the time limit all that it started ends with it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        end_orphans()
        raise


def run_python(*words, ranks: int = 0, timeout: int = 120, **env) -> subprocess.CompletedProcess:
    """`python words...`, or torchrun with so many ranks, from the root of the checkout."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | env
    return run([*launcher, *map(str, words)], timeout, cwd=ROOT, env=env)


def write_yaml(path: Path, keys: dict) -> Path:
    path.write_text(json.dumps(keys))  # JSON is YAML
    return path
