"""`optimizer: muon` on several ranks that hold replicas, each of which orthogonalises its share; in
shards: test_train_fsdp.py."""

import json

import pytest
from conftest import losses, read_lines
from forks import run_forked
from rig import stop_at

from lumen import checkpoint
from train import Trainer

MOE = {"n_experts": 4, "d_expert": 24, "n_experts_max": 5, "moe_layers": [0]}


@pytest.mark.parametrize("world", [2, 3])
def test_shared_work_has_the_bits_of_redundant_work(tiny, tmp_path, world):
    """To the last bit of weights and state, on all ranks, and resumed too; a checkpoint of one
    process goes on. A step that one rank's gradient spoils is dropped by all."""

    def keys(name, **more):
        rows = {"batch_tokens": 12 * 32, "batch_size": 2, "gradient_accumulation_steps": ...}
        return tiny(name, MOE | {"dropout": 0.0}, optimizer="muon", **rows | more)

    bf16 = {"precision": "mixed_bf16"}
    whole, moved = keys("whole"), keys("moved")
    trainer = Trainer(moved)
    stop_at(trainer, 6)
    trainer.fit()
    jobs = [
        {"config": whole, "redundant": True, "digest": True},
        {"config": keys("shared"), "digest": True},
        {"config": keys("parts"), "digest": True, "stop_at": 5},
        {"config": keys("parts"), "digest": True},
        {"config": keys("whole bf16", **bf16), "redundant": True, "digest": True},
        {"config": keys("shared bf16", **bf16), "digest": True},
        {"config": moved},
    ]
    spoilt = keys("spoilt", max_steps=22, save_interval=0, batch_tokens=8 * 32)
    jobs += [{"config": spoilt, "fault": "infinite"}] * (world == 2)
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=world)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    said = [line.split("RANKS ")[1] for line in result.stdout.splitlines() if "RANKS " in line]
    said = [json.loads(row) for row in said]
    assert all(row["same"] for row in said), "ranks agree"
    redundant, shared, stopped, resumed, redundant_bf16, shared_bf16 = [r["digest"] for r in said]
    assert redundant == shared == resumed != stopped
    assert redundant_bf16 == shared_bf16 != shared
    a, b = losses(whole["out_dir"]), losses(moved["out_dir"])
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4
    if world == 2:
        (row,) = read_lines(tmp_path / "spoilt" / "decisions.jsonl")
        assert (row["step"], row["trigger"]) == (20, "nonfinite")
        found = checkpoint.find(tmp_path / "spoilt")
        for name in ("embed.weight", "blocks.1.attn.wo.weight", "blocks.0.ffn.experts.w13"):
            assert found.read(f"optim.{name}.step").item() == 21
