"""More than one host: launch lines, slurm/train.sbatch with stand-ins for Slurm's commands, ranks
that hang, and two hosts that are two network namespaces of this machine, one of which dies.

Whatever happens on the way, a run ends with the bytes of one that was left alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, fingerprint, losses, read_lines, run, write_yaml

SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'localhost\\nelsewhere\\n' ;;
    requeue) echo "$2" >> "$STAND_IN/requeued" ;;
esac
"""
SRUN = """#!/bin/bash
# as Slurm: the command once a node; TERM to all processes, here as soon as the file $TERM_WHEN has 20 lines
echo "$*" >> "$STAND_IN/started"
while [[ $1 == -* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
if [ "${TERM_WHEN:-}" ]; then
    while (($(cat "$TERM_WHEN" 2> /dev/null | wc -l) < 20)) && kill -0 "${pids[@]}"; do sleep 0.05; done
    for pid in "${pids[@]}"; do kill -TERM "$pid" $(cat "/proc/$pid/task/$pid/children"); done
fi
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit ${code:-0}
"""
SCRIPT = """
import os, sys, yaml
if sys.argv[-1] == "--print_config":
    yaml.safe_dump({"a": 1, "out_dir": os.environ["OUT"]}, sys.stdout)
    sys.exit(int(sys.argv[1] == "bad.yaml") * 2)
"""
TORCHRUN = """#!/bin/bash
[ "$SLURM_NODEID" = 0 ] || exit 0
[ -z "$STEP" ] || mkdir -p "$OUT/step_$STEP"
[ -z "$STATUS" ] || echo "$STATUS" > "$OUT/status.json"
[ -z "$REFUSED" ] || echo "$REFUSED" > "$LUMEN_REFUSED"
exit 1
"""


# TERM to all that was started, which torchrun hands on to its workers; then KILL. Generous:
# machines are busy
LIMIT = ("timeout", "-k", "40", "400")
LONGEST = 460  # LIMIT's, and some to end


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stand_ins(folder: Path, **commands) -> dict:
    """The environment of a job of two nodes with one rank each, whose commands are first on the
    PATH."""
    folder.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, **commands}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = Path(sys.executable).parent
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    env |= {
        "PATH": f"{folder}:{python}:{env['PATH']}",
        "STAND_IN": str(folder),
        "TMPDIR": str(folder),
    }
    env |= {
        "SLURM_JOB_ID": str(port()),
        "SLURM_JOB_NODELIST": "localhost,elsewhere",
        "SLURM_NNODES": "2",
    }
    env |= {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"
    }  # below LIMIT's 40: no torchrun dies before its workers
    return env | {"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}


def batch(cwd: Path, env: dict, *words, **more) -> subprocess.CompletedProcess:
    command = [*LIMIT, "bash", str(ROOT / "slurm/train.sbatch"), *map(str, words)]
    return run(command, LONGEST, cwd=cwd, env=env | more)


# what status.json says at the end of srun (None: nothing new), how often the job comes back, exit
# code, what is said
ENDS = {
    "finished": ("finished", 0, "", [0], 0, "finished"),
    "stopped by TERM": ("stopped", 0, "", [1, 2, 3, 4], 0, "requeue: stopped in order"),
    "stopped by hand": (
        "stopped",
        0,
        "as asked for",
        [0],
        0,
        "not requeued: stopped, as asked for",
    ),
    "diverged": ("diverged", 3, "E301: step 7", [0], 3, "not requeued, diverged 3: E301: step 7"),
    "bad input": ("input_error", 2, "E111: x", [0], 2, "not requeued, input_error 2: E111: x"),
    "killed": ("running", 0, "", [1, 2, 2], 1, "3 deaths without a new checkpoint (running 0"),
    "lost a peer": (
        "restart",
        75,
        "E601",
        [1, 2, 2],
        1,
        "3 deaths without a new checkpoint (restart 75: E601)",
    ),
    "a bug": (
        "stopped",
        1,
        "KeyError",
        [1, 2, 2],
        1,
        "3 deaths without a new checkpoint (stopped 1: KeyError)",
    ),
    "full disk": (
        "finished",
        4,
        "no room",
        [1, 2, 2],
        1,
        "3 deaths without a new checkpoint (finished 4: no room)",
    ),
    "died at once": (
        None,
        0,
        "",
        [1, 2, 2],
        1,
        "3 deaths without a new checkpoint (ended before it began",
    ),
    "refused": (None, 0, "", [0], 2, "not requeued: E112: no such mesh"),
    "refused by a restart": ("running", 0, "", [0], 2, "not requeued: E112: no such mesh"),
    "refused, finished": ("finished", 0, "", [0], 0, "finished"),
}


@pytest.mark.parametrize("name", ENDS)
def test_status_decides_whether_the_job_comes_back(tmp_path, name):
    state, code, reason, requeued, ended, said = ENDS[name]
    out = tmp_path / ("été, " + "in words that YAML folds " * 4)  # and quotes, and escapes
    env = stand_ins(tmp_path / "bin", torchrun=TORCHRUN) | {
        "OUT": str(out),
        "STEP": "",
        "STATUS": "",
    }
    env |= {"REFUSED": "E112: no such mesh" if "refused" in name else ""}
    out.mkdir()
    (out / "status.json").write_text(
        json.dumps({"state": "stopped", "code": 0, "reason": "", "attempt": 7})
    )
    refused = tmp_path / f"slurm-{env['SLURM_JOB_ID']}.refused"
    refused.write_text("by an earlier start")
    (tmp_path / "train.py").write_text(SCRIPT)
    for attempt, count in enumerate(requeued, 8):
        row = {"state": state, "code": code, "step": 9, "attempt": attempt, "reason": reason}
        result = batch(tmp_path, env, "train.py", "c.yaml", STATUS=json.dumps(row) if state else "")
        calls = tmp_path / "bin/requeued"
        assert len(calls.read_text().split() if calls.exists() else []) == count, (
            result.stdout + result.stderr
        )
        assert set(calls.read_text().split() if count else []) <= {env["SLURM_JOB_ID"]}
    assert result.returncode == ended and said in result.stdout, result.stdout + result.stderr
    assert not refused.exists()


def test_deaths_with_progress_between_them_are_not_counted(tmp_path):
    env = stand_ins(tmp_path / "bin", torchrun=TORCHRUN) | {"OUT": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    (tmp_path / "train.py").write_text(SCRIPT)
    for attempt in range(1, 7):
        row = {"state": "running", "code": 0, "step": 9, "attempt": attempt, "reason": ""}
        result = batch(
            tmp_path, env, "train.py", "c.yaml", STATUS=json.dumps(row), STEP=f"{attempt // 2:08}"
        )
        assert result.returncode == 0 and "requeue: running" in result.stdout, (
            result.stdout + result.stderr
        )


def test_bad_input_is_said_before_anything_starts(tmp_path):
    env = stand_ins(tmp_path / "bin")
    path = write_yaml(tmp_path / "c.yaml", {"learning_rat": 1})
    result = batch(ROOT, env, "train_fsdp.py", path)
    assert result.returncode == 2 and "E002" in result.stderr and "learning_rate" in result.stderr
    assert not (tmp_path / "bin/started").exists() and not (tmp_path / "bin/requeued").exists()


def test_shellcheck_finds_nothing():
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    result = run([shellcheck, ROOT / "slurm/train.sbatch"], 60)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- with real processes


STEPS = 60


def run_keys(shards, out, **changes) -> dict:
    """The keys of a run of some seconds on two ranks."""
    shape = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
    }
    run = {
        "data_dir": shards,
        "out_dir": str(out),
        "max_steps": STEPS,
        "batch_size": 4,
        "device": "cpu",
    }
    run |= {
        "learning_rate": 3e-3,
        "warmup_steps": 10,
        "save_interval": 15,
        "save_total_limit": 0,
        "log_interval": 1,
    }
    run |= {"eval_tokens": 256, "val_fraction": 0.05, "precision": "fp32", "compile_model": False}
    return run | changes | {"model": shape | {"max_seq_len": 32, "dropout": 0.1}}


def status(out) -> dict:
    return json.loads((Path(out) / "status.json").read_text())


def same(out, whole) -> None:
    assert status(out)["state"] == "finished" and fingerprint(out, STEPS) == fingerprint(
        whole, STEPS
    )
    assert losses(out) == losses(whole)


# as Lunaris Codex prints them, but for the names of script and YAML, and the sizes: here are two
# cores
ONE_MACHINE = "torchrun --standalone --nproc_per_node=auto train.py CONFIG"
ITS_SIZES = "--nproc_per_node=8 --nnodes=4"
MORE = f"""torchrun {ITS_SIZES} --node_rank=$SLURM_NODEID --rdzv_id=$SLURM_JOB_ID --rdzv_backend=c10d \\
    --rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT train_fsdp.py CONFIG"""


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> dict:
    """script -> the out_dir of a run on two ranks that nothing happened to, started by Lunaris'
    line."""
    top = tmp_path_factory.mktemp("whole")
    env, done = stand_ins(top / "bin"), {}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port())}
    two = (
        "taskset",
        "-c",
        ",".join(map(str, sorted(os.sched_getaffinity(0))[:2])),
    )  # auto: as many ranks as cores
    for script, line, nodes in (("train.py", ONE_MACHINE, 1), ("train_fsdp.py", MORE, 2)):
        done[script] = top / script
        path = write_yaml(top / f"{script}.yaml", run_keys(shards, done[script]))
        line = line.replace("CONFIG", str(path)).replace(ITS_SIZES, "--nproc_per_node=1 --nnodes=2")
        options = {
            "cwd": ROOT,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        started = []
        for node in map(str, range(nodes)):
            words = [*LIMIT, *two, "bash", "-c", line]
            started.append(subprocess.Popen(words, env=env | {"SLURM_NODEID": node}, **options))
        said = "".join(host.communicate(timeout=LONGEST)[0] for host in started)
        assert [host.returncode for host in started] == [0] * nodes, said[-5000:]
    return done


needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="--nproc_per_node=auto: one core, one rank"
)


@needs_two_cores
def test_the_launch_lines_of_lunaris_codex(whole):
    """Both ran, on two ranks, and docs/distributed.md has them."""
    assert all(line in (ROOT / "docs/distributed.md").read_text() for line in (ONE_MACHINE, MORE))
    for out in whole.values():
        assert status(out)["state"] == "finished" and losses(out).keys() == set(range(1, STEPS + 1))
    assert len(list((whole["train_fsdp.py"] / f"step_{STEPS:08}").glob("rank_*.safetensors"))) == 2
    rows = json.loads((whole["train.py"] / f"step_{STEPS:08}/state.json").read_text())["cursor"]
    assert rows == 2 * 4 * STEPS, "two ranks' rows"


@needs_two_cores
@pytest.mark.parametrize(
    "script", ["train.py", pytest.param("train_fsdp.py", marks=pytest.mark.nightly)]
)
def test_a_job_is_stopped_comes_back_and_nothing_has_changed(whole, shards, tmp_path, script):
    """The real script, torchrun and ranks: TERM in the first job, the second ends the run."""
    env, out = stand_ins(tmp_path / "bin"), tmp_path / "run"
    words = [script, write_yaml(tmp_path / "c.yaml", run_keys(shards, out))]
    result = batch(ROOT, env, *words, TERM_WHEN=str(out / "metrics.jsonl"))
    assert result.returncode == 0 and (tmp_path / "bin/requeued").exists(), (
        result.stdout + result.stderr
    )
    assert status(out)["state"] == "stopped" and 20 <= status(out)["step"] < STEPS
    result = batch(ROOT, env, *words, SLURM_RESTART_COUNT="1")
    assert result.returncode == 0 and "finished" in result.stdout.splitlines(), (
        result.stdout + result.stderr
    )
    assert (tmp_path / "bin/requeued").read_text().count("\n") == 1, "once"
    same(out, whole[script])


@pytest.mark.nightly
def test_a_mesh_that_does_not_divide_is_said_once_a_host(shards, tmp_path):
    """Two torchruns of two ranks, as on two hosts: rank 0 says it, on the host without rank 0 one
    rank does."""
    path = write_yaml(tmp_path / "c.yaml", run_keys(shards, tmp_path / "run", hsdp_shard_size=3))
    words = [
        "--nproc_per_node=2",
        "--nnodes=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port()}",
    ]
    command = [
        *LIMIT,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *words,
        "--rdzv_id=1",
        "train_fsdp.py",
        path,
    ]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    began = time.time()
    hosts = [subprocess.Popen([str(w) for w in command], **options) for _ in range(2)]
    said = [host.communicate(timeout=LONGEST)[0] for host in hosts]
    assert all(host.returncode for host in hosts) and time.time() - began < 60
    assert sorted(text.count("error E002") for text in said) in ([0, 1], [1, 1]), said
    lines = [line for text in said for line in text.splitlines() if "error E002" in line]
    assert sum(line.startswith("error") for line in lines) == 1, lines
    assert all("hsdp_shard_size: 3 does not divide the 4 ranks" in line for line in lines)


# ---------------------------------------------------------------- a rank that hangs


SHARDED = pytest.param("train_fsdp", 0, marks=pytest.mark.nightly)  # 12 s, the same seam


@pytest.mark.parametrize("script, rank", [("train", 1), SHARDED])
def test_who_waits_for_a_rank_that_hangs_gives_up(shards, tmp_path, script, rank):
    """One of two ranks sleeps for ever after three steps. The limit of the first step, half an
    hour, holds no longer: the other one says E601 and asks for a restart."""
    path = write_yaml(tmp_path / "c.yaml", run_keys(shards, tmp_path / "run", comm_timeout=3))
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port())}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = ["tests/programs/hanging.py", script, str(rank), str(path)]
    started = []
    for r in (0, 1):
        env |= {"RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, *words], env=env, **options))
    asleep, waits = started[rank], started[1 - rank]
    try:
        _, said = waits.communicate(timeout=180)
        assert waits.returncode == 75 and "error E601: step 3: another rank hangs" in said, said[
            -3000:
        ]
        assert asleep.poll() is None
        assert (status(tmp_path / "run")["state"], rank) in [
            ("restart", 1),
            ("running", 0),
        ]  # who sleeps writes nothing
    finally:
        for process in started:
            process.kill()
        assert "ASLEEP" in asleep.communicate(timeout=20)[0]


# ---------------------------------------------------------------- two hosts


def sh(*words) -> None:
    result = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=20)
    if result.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {result.stderr.strip() or result.returncode}")


def network_of(pid) -> str | None:
    """Which network namespace a process lives in; None: it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


class Host:
    """A network namespace with its own address. It has no name that could be left over: it goes
    with its last process, and all of those end with the tests' (setpriv), or with the agent that
    started them (a pid namespace: power off)."""

    ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")

    def __init__(self, address: str):
        self.address, self.agent, self.log = address, None, ""
        self.holder = subprocess.Popen(
            [*self.ENDS_WITH_US, "unshare", "--net", "sleep", "1200"], stderr=subprocess.PIPE
        )
        until = time.time() + 10
        while (network := network_of(self.holder.pid)) in (None, network_of("self")):
            if self.holder.poll() is not None or time.time() > until:
                self.holder.kill()
                raise OSError(self.holder.communicate(timeout=20)[1].decode().strip())
            time.sleep(0.01)
        self.network = network
        self.inside = ("nsenter", "-t", str(self.holder.pid), "-n")

    def ip(self, *words) -> None:
        sh(*self.inside, "ip", *words)

    def start(self, first: str, log: Path, *words) -> None:
        """torchrun with one rank; `first`: the address of the host that keeps the rendezvous."""
        conf = f"is_host={int(first == self.address)},keep_alive_interval=2"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
        ]
        torchrun += [
            "--max-restarts=3",
            "--rdzv_backend=c10d",
            "--rdzv_id=1",
            f"--rdzv_endpoint={first}:29511",
        ]
        torchrun += ["--rdzv_conf", conf, "--local-addr", self.address, *map(str, words)]
        command = [
            *self.ENDS_WITH_US,
            *self.inside,
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            *torchrun,
        ]
        env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        # in each of these hosts torchrun is process 1: without this its word on a launch that was
        # refused would be
        # taken for another host's, or for that of a session of tests before this one
        refused = Path(f"{log}.refused")
        refused.unlink(missing_ok=True)
        env["LUMEN_REFUSED"] = str(refused)
        self.log = log
        with open(log, "a") as file:
            self.agent = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )

    def power_off(self) -> None:
        """The agent dies, and with it its workers."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait(20)
        self.only([self.holder.pid])

    def only(self, expected: list[int], seconds=10) -> None:
        """These processes live here and, after a moment, no others."""
        until, found = time.time() + seconds, None
        while found != expected and time.time() < until:
            found = [
                int(pid)
                for pid in os.listdir("/proc")
                if pid.isdigit() and network_of(pid) == self.network
            ]
            time.sleep(0.02)
        assert found == expected

    def close(self) -> None:
        self.power_off()
        self.holder.kill()
        self.holder.wait(20)
        self.only([])  # no process is left, and so no namespace


@pytest.fixture
def hosts():
    """Two hosts and a cable."""
    made = []
    try:
        try:
            for address in ("10.77.0.1", "10.77.0.2"):
                made.append(Host(address))
            ends = [("eth0", "netns", host.holder.pid) for host in made]
            sh("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for host in made:
                host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    host.ip("link", "set", device, "up")
            sh("unshare", "--pid", "--fork", "--kill-child", "true")
        except OSError as error:
            pytest.skip(
                f"two hosts on one machine need network and pid namespaces (root, iproute2): {error}"
            )
        yield made
    finally:
        for host in made:
            host.close()


def wait_for(what, seconds, *hosts) -> None:
    until = time.time() + seconds
    while not what():
        logs = "\n".join(Path(host.log).read_text()[-3000:] for host in hosts)
        assert time.time() < until, f"nothing for {seconds} s\n{logs}"
        time.sleep(0.02)


@needs_two_cores
@pytest.mark.parametrize(
    "script, dies, cable",
    [
        ("train.py", 1, "stays"),
        pytest.param("train_fsdp.py", 1, "is pulled", marks=pytest.mark.nightly),
        pytest.param("train.py", 0, "stays", marks=pytest.mark.nightly),
        pytest.param("train_fsdp.py", 0, "is pulled", marks=pytest.mark.nightly),
    ],
)
def test_a_host_dies_and_comes_back(hosts, whole, shards, tmp_path, script, dies, cable):
    """With its cable in, the other host hears that at once; without, comm_timeout must tell. Then
    torchrun there waits for the host that died, whose new torchrun joins it; where the one that
    kept the rendezvous died, both are started anew. The end of the run is that of one on one
    host."""
    out, first = tmp_path / "run", hosts[0].address
    words = [ROOT / script, write_yaml(tmp_path / "c.yaml", run_keys(shards, out, comm_timeout=10))]
    for i, host in enumerate(hosts):
        host.start(first, tmp_path / f"host_{i}.log", *words)
    rows = out / "metrics.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 20, 180, *hosts)
    other, dead = hosts[1 - dies], hosts[dies]
    if cable == "is pulled":
        dead.ip("link", "set", "eth0", "down")
    dead.power_off()
    wait_for(lambda: "E601" in Path(other.log).read_text(), 180, other)
    if cable == "is pulled":
        dead.ip("link", "set", "eth0", "up")
    if dies == 0:
        other.power_off()
        other.start(first, other.log, *words)
    dead.start(first, dead.log, *words)
    for host in hosts:
        assert host.agent.wait(300) == 0, Path(host.log).read_text()[-5000:]
    attempts = [r["step"] for r in read_lines(rows) if r.get("attempt") == 2 and "loss" in r]
    assert attempts and attempts[0] in range(16, STEPS, 15), "it went on from a checkpoint"
    same(out, whole[script])
