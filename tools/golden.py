"""Golden runs: that a redesign has not changed one bit.

    python tools/golden.py --write        # at the commit that a redesign starts from
    python tools/golden.py                # at every commit after it; exit code 1: a bit differs
    python tools/golden.py moe replay     # some of the runs only

Fourteen short runs, each of which takes another road through the trainer. Of each: a sha256 over
all tensors of the last checkpoint, one over the losses, gradient norms and learning rates of every
step, and one over the decisions (times and texts aside). They stand in tests/golden.json together
with the machine that made them. Bits are the same only on the same kind of machine with the same torch, so
where that differs the commit named in the file is checked out beside this one and run again here.

Nothing below knows more of the house than `from train import Trainer`, the forward of
model.Transformer, and the files that a run leaves: it must outlive what it guards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "golden.json"
STEPS = 60

MODEL = {
    "vocab_size": 97,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_seq_len": 32,
    "dropout": 0.1,
}
RUN = {
    "max_steps": STEPS,
    "batch_size": 2,
    "device": "cpu",
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "save_interval": 30,
    "log_interval": 1,
    "eval_tokens": 1024,
    "val_fraction": 0.05,
    "precision": "fp32",
    "compile_model": False,
}
MOE = {"n_experts": 4, "d_expert": 32}
HYBRID = MOE | {"mod_capacity": 0.5, "mod_ffn_only": True}
SIGMOID = MOE | {"router": "sigmoid", "n_shared_experts": 1}

# name: (keys of the run, keys of the model, where it is hurt: fault, at which forward passes)
RUNS = {
    "dense": ({}, {}, None),
    "moe": ({}, MOE, None),
    "sigmoid": ({"z_loss": 1e-4}, SIGMOID, None),
    "mod": ({}, {"mod_capacity": 0.5}, None),
    "hybrid": ({"activation_checkpointing": "block"}, HYBRID, None),
    "accumulation": ({"gradient_accumulation_steps": 3, "lr_schedule": "wsd"}, {}, None),
    "fp16": ({"precision": "mixed_fp16"}, {}, None),
    "oom": ({"batch_size": 4}, MOE, ("oom", [25])),
    "resume": ({}, HYBRID, ("stop", [37])),
    # three steps, each repeated once for the diagnosis, that are not finite: back to a snapshot
    "rollback": ({"orchestrator": {"snapshot_interval": 10}}, MOE, ("nan", list(range(50, 56)))),
    "commands": ({}, MOE | {"n_experts_max": 6}, ("command", [110])),
    "replay": ({"orchestrator": {"mode": "replay"}}, MOE, None),  # of "rollback"
    "ranks": ({}, HYBRID, None),
    "fsdp": ({}, HYBRID, None),
}
COMMANDS = [
    {"method": "add_expert", "args": [0]},
    {"method": "adjust_routing_temperature", "args": [1.5]},
    {"method": "adjust_weight_decay", "args": [0.05]},
    {"method": "emergency_lr_reduction", "args": [2.0]},
    {"method": "adjust_batch_size", "args": [1]},
    {"method": "prune_expert", "args": [0, 1]},
]
LATER = {"method": "rollback_steps", "args": [5]}
TIMES = {"time", "reason", "id", "versions", "run", "seconds", "cost", "ram"}
NUMBERS = ("step", "loss", "grad_norm", "lr", "tokens", "val_loss", "val_accuracy")


# ---------------------------------------------------------------- one run, in a process of its own


def make_data(folder: Path) -> None:
    """Three bare shards: each id is the last one plus 0, 1 or 2, modulo 97."""
    import numpy as np

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        ids = np.cumsum(rng.integers(0, 3, 7000)) % 97
        np.save(folder / f"part_{i}.npy", ids.astype(np.uint16))


def hurt(out: Path, fault: str, at: list[int]) -> None:
    """Make the forward passes number `at` (while training, from 0) fail in this way."""
    import torch

    import model

    real, passes = model.Transformer.forward, [0]

    def forward(self, idx, targets=None, *args, **more):
        result = real(self, idx, targets, *args, **more)
        if not self.training or targets is None:
            return result
        now = passes[0]
        passes[0] += 1
        if now not in at:
            return result
        if fault == "oom":
            raise torch.OutOfMemoryError("injected by tools/golden.py")
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            return result
        if fault == "command":
            with (out / "control.jsonl").open("a") as file:
                file.write(json.dumps(LATER) + "\n")
            return result
        total, sums = result
        return total * float("nan"), {**sums, "ce": sums["ce"] * float("nan")}

    model.Transformer.forward = forward


def fake_fp16() -> None:
    """Let a CPU believe that it can do fp16: what is looked at is the loss scale's arithmetic."""
    import dataclasses

    try:
        from lumen import machine as home

        name = "detect"
    except ImportError:  # as it was until 77c1c6b
        import plan as home

        name = "machine"
    real = getattr(home, name)

    def machine(device, precision, *args, **more):
        found = real(device, "fp32", *args, **more)
        return dataclasses.replace(found, precision="mixed_fp16")

    setattr(home, name, machine)


def train_once(name: str, top: Path) -> None:
    """The run `name`, in this process. torchrun starts it once a rank."""
    import torch

    torch.set_num_threads(1)
    from train import Trainer

    keys, model, fault = RUNS[name]
    out = top / name
    config = RUN | keys | {"data_dir": str(top / "data"), "out_dir": str(out)}
    config["model"] = MODEL | model
    if name == "fp16":
        fake_fp16()
    if name == "replay":
        rows = str(top / "rollback" / "decisions.jsonl")
        config["orchestrator"] = config["orchestrator"] | {"replay": rows}
    if name == "commands":
        out.mkdir()
        lines = "".join(json.dumps(command) + "\n" for command in COMMANDS)
        (out / "control.jsonl").write_text(lines)
    if fault:
        hurt(out, *fault)
    if name == "fsdp":
        from train_fsdp import Sharded

        code = Trainer(config, Sharded).fit()
    else:
        code = Trainer(config).fit()
    if fault and fault[0] == "stop":  # it was told to stop: a new Trainer goes on
        code = Trainer(config).fit()
    assert code == 0, code
    sys.stdout.flush()
    os._exit(0)  # gloo can abort at exit although the work is done


# ---------------------------------------------------------------- what a run left


def sha(text: bytes | str) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def without_times(value):
    """The same without what depends on the clock or is prose."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return value


def sums_of(out: Path) -> dict:
    """The sums of a finished run."""
    from safetensors import safe_open

    folder = out / f"step_{STEPS:08d}"
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "numpy") as opened:
            for key in opened.keys():
                tensor = opened.get_tensor(key)
                words = f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
                tensors[f"{file.name} {key}"] = sha(words)
    metrics = [[r[k] for k in NUMBERS if k in r] for r in rows_of(out / "metrics.jsonl")]
    decisions = [without_times(r) for r in rows_of(out / "decisions.jsonl")]
    return {
        "tensors": sha(json.dumps(sorted(tensors.items()))),
        "metrics": sha(json.dumps(metrics)),
        "decisions": f"{len(decisions)} {sha(json.dumps(decisions, sort_keys=True))}",
    }


def run_all(root: Path, names: list[str], keep: Path | None = None) -> dict:
    """{name: sums} of the house that stands in `root`, each run in processes of its own."""
    top = Path(keep or tempfile.mkdtemp(prefix="golden_"))
    if keep:
        shutil.rmtree(top, ignore_errors=True)
    make_data(top / "data")
    found = {}
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    for name in names:
        command = [sys.executable]
        if name in ("ranks", "fsdp"):
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(Path(__file__).resolve()), "--one", name, "--top", str(top)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            found[name] = {"failed": str(done.returncode)}
        else:
            found[name] = sums_of(top / name)
        print(f"{name:14}", *found[name].values(), flush=True)
    if not keep:
        shutil.rmtree(top)
    return found


# ---------------------------------------------------------------- comparing


def this_machine() -> dict:
    """What the bits depend on besides the code."""
    import torch

    about = Path("/proc/cpuinfo")  # Intel's and AMD's kernels of one capability round differently
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()} | {
        "matmul": bool(torch.cpu._is_avx512_bf16_supported()),
        "name": (names or [platform.processor()])[0],
    }


def run_commit(commit: str, names: list[str]) -> dict:
    """The sums of another commit, checked out beside this one, on this machine."""
    folder = tempfile.mkdtemp(prefix="golden_tree_")
    subprocess.run(
        ["git", "-C", ROOT, "worktree", "add", "-q", "-f", "--detach", folder, commit], check=True
    )
    try:
        return run_all(Path(folder), names)
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}; without any: all")
    parser.add_argument("--write", action="store_true", help="write the sums of this commit, all")
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder, to look at")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--top", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        train_once(args.one, args.top)
    names = args.runs or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"no run {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if "replay" in names and "rollback" not in names:  # it repeats what that one decided
        names.insert(0, "rollback")
    if args.write:
        git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        rows = {"commit": commit, "machine": this_machine(), "runs": run_all(ROOT, list(RUNS))}
        if failed := [name for name, sums in rows["runs"].items() if "failed" in sums]:
            print(f"nothing is written: {', '.join(failed)} failed")
            return 1
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        return 0
    golden = json.loads(FILE.read_text())
    if golden["machine"] != this_machine():
        print(f"another machine than {golden['machine']}: {golden['commit'][:9]} runs here first")
        golden["runs"] = run_commit(golden["commit"], names)
    now = run_all(ROOT, names, args.keep)
    wrong = [n for n in names if now[n] != golden["runs"][n] or "failed" in now[n]]
    for name in wrong:
        pairs = zip(golden["runs"][name].items(), now[name].values())
        print(f"DIFFERS {name}:", *(f"{k} {a} -> {b}" for (k, a), b in pairs if a != b))
    print(f"{len(names) - len(wrong)} of {len(names)} as at {golden['commit'][:9]}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
