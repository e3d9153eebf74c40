"""Out of memory: smaller micro-batches, restarts, the probe."""

import json

import pytest
import torch
from conftest import losses, write_yaml
from rig import KINDS, decisions, equal, finish, tensors

import train
from lumen import checkpoint, optim, probe, setup
from lumen import machine as machines
from lumen.errors import UserError
from train import Trainer


def short_of_memory(trainer, limit, rank=0, calls=None, at=20):
    """From step `at` on, more than `limit` rows at once do not fit: the second micro-step fails,
    half accumulated."""
    calls = [0] if calls is None else calls

    def hook(module, inputs):
        rows = inputs[0].shape[0]
        if (
            module.training
            and trainer.parallel.rank == rank
            and trainer.step >= at
            and rows > limit
        ):
            calls[0] += 1
            if calls[0] % 2 == 0 or trainer.run.accumulation == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")

    trainer.model.blocks[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_out_of_memory_halves_the_microbatch_and_loses_nothing(tiny, kind):
    keys = tiny(
        "short",
        KINDS[kind] | {"dropout": 0.0},
        max_steps=40,
        batch_size=8,
        gradient_accumulation_steps=2,
    )
    if (
        kind == "hybrid"
    ):  # static routing: a token on the edge must not fall to the other side for a rounding
        keys["model"]["mod_routing"] = "static"
    trainer = Trainer(keys)
    short_of_memory(trainer, 2)
    assert trainer.fit() == 0
    whole = finish(keys | {"out_dir": keys["out_dir"] + "-whole"})
    assert (trainer.run.micro_batch, trainer.run.accumulation) == (2, 8)
    assert [d["args"]["new_size"] for d in decisions(trainer)] == [4, 2]
    assert (trainer.step, trainer.cursor, trainer.tokens) == (
        whole.step,
        whole.cursor,
        whole.tokens,
    )
    a, b = losses(trainer.out), losses(whole.out)
    assert a.keys() == b.keys() and len(a) == 40
    assert all(a[s] == b[s] for s in range(1, 21)), "until then bit for bit"
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 and abs(a[21] - b[21]) < 1e-6
    again = Trainer(keys | {"max_steps": 44})
    assert again.run.micro_batch == 2, "a resumed run remembers"
    again.loader.close()


def test_out_of_memory_at_one_row_says_what_to_do(tiny):
    trainer = Trainer(tiny(max_steps=30, batch_size=2))
    short_of_memory(trainer, 0)
    with pytest.raises(UserError) as e:
        trainer.fit()
    trainer.loader.close()
    assert e.value.code == "E200" and "activation_checkpointing" in e.value.text
    assert checkpoint.find(trainer.out).step == 20, "and nothing is lost"


def test_out_of_memory_elsewhere_restarts_with_a_hint(tiny, monkeypatch):
    """In the optimizer half of the weights may be new: the process ends with 75, and the next goes
    on smaller."""
    keys = tiny(max_steps=20, batch_size=4, save_interval=5)
    path = write_yaml(checkpoint.Path(keys["out_dir"] + ".yaml"), keys)
    step = optim.AdamW.step
    calls = []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 13:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return step(self, *args)

    monkeypatch.setattr(optim.AdamW, "step", failing)
    with pytest.raises(UserError) as e:
        train.main([str(path)])
    assert (
        e.value.exit_code == 75
        and json.loads((checkpoint.Path(keys["out_dir"]) / "status.json").read_text())["state"]
        == "restart"
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([str(path)]) == 0
    found = checkpoint.find(keys["out_dir"])
    assert found.step == 20 and found.state["config"]["batch_size"] == 2
    assert found.state["cursor"] == 20 * 8, "the same rows a step"


def test_batch_size_auto_is_what_fits(tiny, monkeypatch):
    keys = tiny(
        batch_size="auto", gradient_accumulation_steps=..., batch_tokens=16 * 32, max_steps=1
    )
    plenty = Trainer(keys)
    assert (plenty.run.micro_batch, plenty.run.accumulation) == (16, 1)
    plenty.loader.close()
    cfg, n = plenty.cfg.model, plenty.counted.n_params()["total"]
    need = {r: train.plan.memory(cfg, n, r, "fp32")["total"] for r in (4, 8)}
    monkeypatch.setattr(machines, "total_memory", lambda device: (need[4] + need[8]) / 2 / 0.92)
    small = Trainer(keys | {"out_dir": keys["out_dir"] + "-small"})
    assert (small.run.micro_batch, small.run.accumulation) == (4, 4)
    assert equal(tensors(small), tensors(plenty)), "finding out changes nothing"
    small.loader.close()
    monkeypatch.setattr(machines, "total_memory", lambda device: 1000)
    with pytest.raises(UserError) as e:
        Trainer(keys | {"out_dir": keys["out_dir"] + "-none"})
    assert e.value.code == "E200"


def test_the_probe_on_a_gpu_leaves_no_trace(tiny, monkeypatch):
    """Its arithmetic, with a GPU's numbers made up: 1000 bytes and 100 a row, of 2000."""
    keys = tiny(batch_size=4, gradient_accumulation_steps=4, max_steps=5)
    left, probed = Trainer(keys), Trainer(keys | {"out_dir": keys["out_dir"] + "-probed"})

    def peak(trainer, rows):
        model, ids = trainer.model, torch.zeros(rows, 32, dtype=torch.long)
        model(ids, targets=ids)[0].backward()
        model.zero_grad(set_to_none=True)
        return 1000 + 100 * rows

    monkeypatch.setattr(probe, "peak_bytes", peak)
    monkeypatch.setattr(
        machines, "total_memory", lambda device: 2200
    )  # 0.92 of it are 1024 above the rest: 9 rows
    setup.probe(probed)
    assert (probed.run.micro_batch, probed.run.accumulation) == (8, 2)
    assert equal(tensors(left), tensors(probed))
    probed.set_micro_batch(4)
    assert left.fit() == 0 and probed.fit() == 0 and equal(tensors(left), tensors(probed))
