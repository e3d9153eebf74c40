"""`optimizer: muon` on several ranks that hold replicas, each of which orthogonalises its share; in
shards: test_train_fsdp.py."""

import json

import pytest
from conftest import losses, read_lines
from forks import run_forked
from rig import stop_at

from lumen import checkpoint
from train import Trainer

MOE = {"n_experts": 4, "d_expert": 24, "n_experts_max": 5, "moe_layers": [0], "dropout": 0.0}
BF16 = {"precision": "mixed_bf16"}


@pytest.fixture
def keys(tiny):
    def make(name, **more) -> dict:
        rows = {"batch_tokens": 12 * 32, "batch_size": 2, "gradient_accumulation_steps": ...}
        run = {"optimizer": "muon", "max_steps": 5, "expert_backend": "slices"}
        return tiny(name, MOE, **rows | run | more)

    return make


def on_ranks(jobs: list[dict], world: int) -> list[str]:
    """The digests of all jobs, which are the same on all ranks."""
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=world)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    said = [line.split("RANKS ")[1] for line in result.stdout.splitlines() if "RANKS " in line]
    said = [json.loads(row) for row in said]
    assert len(said) == len(jobs) and all(row["same"] for row in said), "ranks agree"
    return [row["digest"] for row in said]


def test_two_ranks_that_share_the_work_have_the_bits_of_redundant_work(keys, tmp_path):
    """In bf16 (in fp32: below), to the last bit of weights and state, and resumed too. A step that
    one rank's gradient spoils is dropped by both."""
    jobs = [
        {"config": keys("redundant", **BF16), "redundant": True},
        {"config": keys("shared", **BF16)},
        {"config": keys("parts", **BF16), "stop_at": 2},
        {"config": keys("parts", **BF16)},
        {
            "config": keys("spoilt", max_steps=22, save_interval=0, batch_tokens=8 * 32),
            "fault": "infinite",
        },
    ]
    found = on_ranks([job | {"digest": True} for job in jobs], 2)
    redundant, shared, stopped, resumed, _ = found
    assert redundant == shared == resumed != stopped
    (row,) = read_lines(tmp_path / "spoilt" / "decisions.jsonl")
    assert (row["step"], row["trigger"]) == (20, "nonfinite")
    saved = checkpoint.find(tmp_path / "spoilt")
    for name in ("embed.weight", "blocks.1.attn.wo.weight", "blocks.0.ffn.experts.w13"):
        assert saved.read(f"optim.{name}.step").item() == 21


def test_three_ranks_go_on_from_a_checkpoint_of_one(keys):
    moved = keys("moved")
    trainer = Trainer(moved)
    stop_at(trainer, 2)
    trainer.fit()
    jobs = [{"config": keys("redundant"), "redundant": True}, {"config": keys("shared")}]
    jobs.append({"config": moved})
    redundant, shared, _ = on_ranks([job | {"digest": True} for job in jobs], 3)
    assert redundant == shared
    a, b = losses(keys("shared")["out_dir"]), losses(moved["out_dir"])
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4
