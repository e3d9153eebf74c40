"""What several test files share: a tiny dataset, a tiny configuration, runs as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two processes share two cores here
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels on the CPU: before model_moe is imported; GPU: 0
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """Three bare shards of a language that is easy to learn: each id is the last one plus 0, 1 or 2, modulo 97."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for i in range(3):
        np.save(folder / f"part_{i}.npy", (np.cumsum(rng.integers(0, 3, 7000)) % 97).astype(np.uint16))
    return str(folder)


@pytest.fixture
def tiny(shards, tmp_path):
    """tiny(**changes) -> the keys of a run that takes a second; dropout on, two micro-steps."""

    def make(name="run", model=None, **changes) -> dict:
        shape = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
        shape |= {"max_seq_len": 32, "dropout": 0.1}
        run = {"data_dir": shards, "out_dir": str(tmp_path / name), "max_steps": 12, "batch_size": 2, "device": "cpu"}
        run |= {"gradient_accumulation_steps": 2, "learning_rate": 3e-3, "warmup_steps": 2, "save_interval": 4}
        run |= {"log_interval": 1, "eval_tokens": 1024, "val_fraction": 0.05, "precision": "fp32"}
        run |= {"compile_model": False, "save_total_limit": 0}
        return {k: v for k, v in (run | changes).items() if v is not ...} | {"model": shape | (model or {})}

    return make


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(out_dir) -> dict[int, float]:
    """step -> training loss; the last line of a step counts."""
    return {r["step"]: r["loss"] for r in read_lines(Path(out_dir) / "metrics.jsonl") if "loss" in r}


def fingerprint(out_dir, step: int) -> dict:
    """What must be equal, byte for byte, between a resumed run and one never stopped."""
    folder = Path(out_dir) / f"step_{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    state = json.loads((folder / "state.json").read_text())
    names = ("step", "cursor", "tokens", "segments", "val_loss", "best_val_loss", "best_step", "scaler", "orchestrator")
    return {k: v["sha256"] for k, v in files.items() if k != "state.json"} | {k: state[k] for k in names}


def run_python(*words, ranks: int = 0, timeout: int = 120, **env) -> subprocess.CompletedProcess:
    """`python words...`, or torchrun with so many ranks, from the root of the checkout."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def write_yaml(path: Path, keys: dict) -> Path:
    path.write_text(json.dumps(keys))  # JSON is YAML
    return path
