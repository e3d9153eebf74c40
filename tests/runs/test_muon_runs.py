"""A run with `optimizer: muon`, on one process: what it says, and that it resumes and goes back
exactly."""

import pytest
import torch
from conftest import fingerprint
from rig import finish, stop_at

import finetune
from lumen.cli import read_any
from lumen.errors import UserError
from train import Trainer

MOE = {"n_experts": 4, "d_expert": 24, "n_experts_max": 5, "moe_layers": [0]}


def test_a_run_resumes_exactly_and_says_what_muon_owns(tiny):
    """In bf16, from the checkpoint of a signal; and a checkpoint of AdamW is not gone on with."""
    keys = {"optimizer": "muon", "precision": "mixed_bf16", "expert_backend": "slices"}
    whole, parts = (tiny(name, MOE, **keys, max_steps=8) for name in ("whole", "parts"))
    finish(whole)
    trainer = Trainer(parts)
    assert trainer.optimizer.dtype == torch.bfloat16
    stop_at(trainer, 5)
    trainer.fit()
    finish(parts)
    assert fingerprint(whole["out_dir"], 8) == fingerprint(parts["out_dir"], 8)
    said = (trainer.out / "train.log").read_text()
    # a layer: q, k, v; wo; then 5 slots of gate, up and w2, or one of each
    assert "muon       26 matrices in 8 tensors, " in said and "adamw the rest" in said
    assert "Muon's own work is" in said, "a step of 128 tokens"
    with pytest.raises(UserError, match="state of optimizer: muon, and adamw has another") as error:
        Trainer(parts | {"optimizer": "adamw", "max_steps": 9})
    assert error.value.code == "E305"


def test_knobs_and_a_rollback(tiny):
    """Weights and momentum go back bit for bit; a knob of AdamW's part does not trip over ours."""
    more = {"save_interval": 0, "orchestrator": {"snapshot_interval": 3}}
    trainer = Trainer(tiny("knobs", MOE, optimizer="muon", **more))
    seen = []
    for step in trainer.iterations():
        if step == 8:
            break
        seen.append({name: t.clone() for name, t in trainer.tensors().items()})
    trainer.rollback_steps(2)
    now = trainer.tensors()
    assert 0 < trainer.step <= 6
    assert all(torch.equal(now[name], t) for name, t in seen[trainer.step].items())
    trainer.adjust_weight_decay(0.05)
    trainer._update_optimizer_param_groups("beta1", 0.8)
    groups = trainer.optimizer.param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert {g["betas"][0] for g in groups} == {0.8}
    trainer.close()


def test_fine_tuning_where_muon_has_nothing_is_refused():
    for more, why in (
        ({"lora": {"r": 4, "alpha": 8.0}}, "lora freezes"),
        ({"freeze": ["matrix"]}, "freeze"),
    ):
        cfg = read_any({"data_dir": "x", "optimizer": "muon", "init_from": "x"} | more)[0]
        with pytest.raises(UserError, match=f"muon is for hidden matrices, which {why}"):
            finetune.check_keys(cfg)
    kept = {"freeze": ["embedding"], "optimizer": "muon", "init_from": "x", "data_dir": "x"}
    finetune.check_keys(read_any(kept)[0])
