"""bench.py at toy sizes: the commands' logic, not their numbers."""

import json
import math

import pytest
import torch

import bench
import plan
from errors import UserError
from model import ModelConfig

MOE = {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 16}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No second of matrix products per command, no Triton, whose interpreter takes minutes; and the flag that steps set
    is taken back."""
    monkeypatch.setattr(bench.model_moe, "triton", None)
    monkeypatch.setattr(bench, "machine_line", lambda m=None: "this machine")
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_options_are_typed_and_unknown_ones_refused():
    o = bench.options(["--rounds", "3", "--no-peer", "--out=a_b", "sync"], rounds=7, no_peer=False, out="", parts=None)
    assert (o.rounds, o.no_peer, o.out, o.parts) == (3, True, "a_b", ["sync"])
    for words in (["--turns", "3"], ["--rounds", "many"], ["--rounds"], ["stray"]):
        with pytest.raises(UserError) as error:
            bench.options(words, rounds=7)
        assert error.value.code == "E002"
    for words in (["fly"], ["kernels", "--rond", "1"], ["gpu", "moon"], ["learn", "--only", "sparse"]):
        with pytest.raises(UserError) as error:
            bench.main(words)
        assert error.value.code == "E002"


def test_kernels_compares_the_back_ends(capsys):
    assert bench.main(["kernels", "--size", "toy", "--rounds", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "of 2Td + 4TKI" in said and "slices" in said and "differs from slices by" in said


def test_kept_bytes_counts_a_storage_once_and_not_what_is_left_out():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert bench.kept_bytes(lambda: (x @ w) * (x @ w).view(10, 4), [w]) == 3 * 160
    assert bench.kept_bytes(lambda: x[:5] @ w + x[5:] @ w, [w]) == 160


@pytest.mark.parametrize("keys", [{}, MOE, bench.HALF])
def test_our_step_clips_and_feeds_adam_the_gradient_of_the_mean_loss(keys):
    cfg = ModelConfig(**bench.TOY | keys)
    run = bench.Ours(cfg, plan.machine("cpu", "fp32"), 2)
    before = [p.detach().clone() for p in run.model.parameters()]
    (run.model(run.x, targets=run.y)[0] / run.x.numel()).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    expected = [0.1 * p.grad for p in run.model.parameters()]
    run.optimizer.zero_grad(set_to_none=True)
    loss = run()
    assert abs(loss.item() - math.log(cfg.vocab_size)) < 0.3
    for p, old, grad in zip(run.model.parameters(), before, expected):
        assert torch.equal(p, old)  # the rate is 0
        torch.testing.assert_close(run.optimizer.state[p]["exp_avg"], grad, rtol=1e-4, atol=1e-7)
    counts = [moe.router.load.sum().item() for moe in run.moe]
    assert counts == pytest.approx([1.0] * len(run.moe))


def test_peer_has_the_same_size_and_both_bf16_forms_step():
    pytest.importorskip("transformers")
    m = plan.machine("cpu", "fp32")
    cfg = ModelConfig(**bench.TOY | MOE)
    ours = sum(p.numel() for p in bench.Ours(cfg, m, 2).model.parameters())
    for precision in ("fp32", "autocast", "masters"):
        peer = bench.Peer(cfg, m, 2, experts="eager", precision=precision)
        assert sum(p.numel() for p in peer.model.parameters()) == ours
        assert abs(peer().item() - 4.85) < 0.3
        assert all(p.dtype == torch.float32 and p.grad is None for p in peer.masters)
    copies = 4 * 2 * cfg.max_seq_len * 2 * 3 * cfg.d_model * cfg.d_expert * cfg.n_layers
    assert any("batched_mm" in v[0] for v in bench.peer_variants(cfg, m, 2)) == (copies < plan.total_memory("cpu") / 2)


def test_time_limit_and_variants_that_fail(capsys):
    with pytest.raises(TimeoutError), bench.time_limit(0.05):
        while True:
            pass

    def broken():
        raise ImportError("no such kernel")

    works = bench.fastest("x", [("a", broken, False), ("b", lambda: lambda: torch.zeros(()), False)], 5, "cpu")
    assert works is not None and "left out: ImportError: no such kernel" in capsys.readouterr().out


def test_learn_keeps_what_is_there_and_tells_it(tiny, tmp_path, monkeypatch, capsys):
    keys = tiny("x", max_steps=4)
    keys.pop("out_dir")
    monkeypatch.setattr(bench, "load_yaml", lambda path: (json.loads(json.dumps(keys)), {}))
    monkeypatch.setattr(bench, "LEARN", {"dense": {}, "both": {**MOE, **bench.HALF}})
    out = tmp_path / "learn"
    words = ["learn", "--steps", "3", "--seeds", "1", "--out", str(out)]
    assert bench.main([*words, "--only", "both"]) == 0
    first = (out / "both-1337.json").stat().st_mtime_ns
    assert bench.main(words) == 0
    assert (out / "both-1337.json").stat().st_mtime_ns == first
    row = json.loads((out / "both-1337.json").read_text())
    assert row["steps"] == 3 and row["router"] > 0 and row["mod_gap"] is not None and row["active"] < row["total"]
    table = capsys.readouterr().out.split("this machine")[-1]
    assert f"| both | 1 | {row['val_loss']:.4f}" in table and "| dense | 1 |" in table


def test_gpu_parts_run_on_the_cpu(capsys):
    assert bench.sync_check(plan.machine("cpu", "fp32"), True) == 0
    assert "sigmoid, shared" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(UserError) as error:
            bench.main(["gpu"])
        assert error.value.code == "E003"
