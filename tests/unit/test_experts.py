"""Slots and surgery: experts are split, pruned, restored, recycled."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from sparse_models import KINDS, choices, layer, make, normal

from lumen.config import Config
from lumen.experts import (
    WINDOW,
    add_expert,
    prune_expert,
    recycle_expert,
    release_siblings,
    restore_expert,
    update_balance,
)
from lumen.optim import OPTIMIZERS, build_optimizer
from model import AttentionInputs, rope_tables
from train import Parallel

ROWS = Parallel(Config(data_dir="x"))  # how surgery reaches an expert's row: one process


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("router", ("softmax", "sigmoid"))
@pytest.mark.parametrize(("E", "K", "limit"), ((8, 2, 0.06), (64, 8, 0.03)))
@torch.no_grad()
def test_a_split_hardly_moves_the_output_and_halves_the_load(E, K, limit, router):
    """A random layer, T = 4096, d = 64, I = 32; mean of three."""
    moved, naive = [], []
    for seed in range(3):
        moe = layer(d=64, E=E, K=K, n_experts_max=E + 2, d_expert=32, router=router).eval()
        for i, (p, std) in enumerate(
            zip((moe.router.weight, moe.experts.w13, moe.experts.w2), (0.12, 0.1, 0.1))
        ):
            p.copy_(normal(*p.shape, seed=10 * seed + i) * std)
        x = normal(4096, 64, seed=10 * seed + 4)
        before, stats = moe(x)
        counts = stats["moe.counts"]
        moe.router.load.copy_(counts / counts.sum())
        hottest = int(counts.argmax())
        assert add_expert(moe, torch.optim.AdamW(moe.parameters()), 0, ROWS) == (hottest, E)
        after, stats = moe(x)
        now = stats["moe.counts"][[hottest, E]]
        moved.append(distance(after, before))
        assert now.sum().item() == pytest.approx(counts[hottest].item(), rel=0.1)
        assert (now / counts[hottest] - 0.5).abs().max() < 0.1
        moe.router.sibling.copy_(torch.arange(E + 2))  # naive cloning, as others do it
        after, stats = moe(x)
        naive.append(distance(after, before))
        assert stats["moe.counts"][[hottest, E]].sum() > 1.4 * counts[hottest], (
            "both take the same tokens"
        )
    assert 0 < np.mean(moved) < limit and np.mean(naive) > 4 * limit, (moved, naive)


def surgery_layer(E=4, K=2, spare=2, optimizer="adamw", **changes):
    moe = layer(E=E, K=K, n_experts_max=E + spare, **changes)
    cfg = Config(data_dir="x", learning_rate=3e-4, optimizer=optimizer)
    holder = torch.nn.Module()
    holder.ffn = moe
    optimizer = build_optimizer(cfg, dict(holder.named_parameters()))
    for p in moe.parameters():
        for name, t in optimizer.state[p].items():
            if t.dim():
                t.copy_(normal(*p.shape, seed=len(name)).abs())
    return moe, optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_split_of_the_optimizers_state(optimizer):
    first_moments = set(OPTIMIZERS[optimizer].FRESH)
    moe, optimizer = surgery_layer(optimizer=optimizer, router="sigmoid", bias_update_rate=0.1)
    params = (moe.router.weight, moe.experts.w13, moe.experts.w2)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    weights = [p.detach().clone() for p in params]
    moe.router.bias[2], moe.router.load[2] = 0.25, 0.4
    assert add_expert(moe, optimizer, 7, ROWS, parent=2) == (2, 4)
    for p, was, w in zip(params, before, weights):
        state = optimizer.state[p]
        fresh = first_moments & set(state)
        assert len(fresh) == 1, f"FRESH names {first_moments}, and there are {set(state)}"
        counts = {key for key, t in state.items() if not t.dim()}
        for key in set(state) - counts:
            value = torch.zeros_like(p[0]) if key in fresh else was[key][2]
            assert torch.equal(state[key][4], value), "the child has no momentum"
            assert torch.equal(state[key][[0, 1, 2, 3, 5]], was[key][[0, 1, 2, 3, 5]]), (
                "and the others keep theirs"
            )
        assert all(torch.equal(state[key], was[key]) for key in counts)
        assert torch.equal(p[[0, 1, 3, 5]], w[[0, 1, 3, 5]])
        if p is not moe.router.weight:
            assert torch.equal(p[4], w[2]) and torch.equal(p[2], w[2])
    row, child, parent = weights[0][2], moe.router.weight[4].detach(), moe.router.weight[2].detach()
    assert torch.allclose((child + parent) / 2, row, atol=1e-6)
    n = (parent - child) / 2
    assert 0.005 * row.norm() < n.norm() < 0.021 * row.norm() and abs(n @ row) < 1e-4 * row.norm()
    r = moe.router
    assert r.bias[4] == 0.25 and r.load[[2, 4]].tolist() == pytest.approx([0.2, 0.2])
    assert r.alive.tolist() == [True] * 5 + [False] and r.sibling.tolist() == [0, 1, 4, 3, 2, 5]


def test_surgery_that_cannot_be_is_refused_and_changes_nothing():
    moe, optimizer = surgery_layer(E=3, K=2, spare=1)
    moe.router.load.copy_(torch.tensor([0.5, 0.3, 0.2, 0.0]))

    def refused(do, *words):
        before = {k: v.clone() for k, v in moe.state_dict().items()}
        with pytest.raises(ValueError) as error:
            do()
        assert all(torch.equal(v, before[k]) for k, v in moe.state_dict().items())
        for word in words:
            assert word in str(error.value), str(error.value)

    refused(lambda: prune_expert(moe, 0, 2), "expert 2", "0.60", "0.1", "force")
    refused(lambda: prune_expert(moe, 0, 3, force=True), "expert 3 is not alive", "[0, 1, 2]")
    refused(lambda: prune_expert(moe, 0, -1, force=True), "not alive")
    refused(lambda: add_expert(moe, optimizer, 0, ROWS, parent=3), "expert 3 is not alive")
    refused(lambda: restore_expert(moe, 0, 1), "expert 1")
    (
        refused(lambda: restore_expert(moe, 0, 3), "expert 3"),
        refused(lambda: restore_expert(moe, 0, 9), "expert 9"),
    )
    refused(lambda: recycle_expert(moe, optimizer, 0, ROWS), "expert 2 carries")
    prune_expert(moe, 10, 2, force=True)
    refused(lambda: prune_expert(moe, 10, 1, force=True), "expert 1 is needed", "2")
    restore_expert(moe, 10, 2)
    assert add_expert(moe, optimizer, 10, ROWS) == (0, 3)
    refused(
        lambda: add_expert(moe, optimizer, 10, ROWS), "no free slot of 4", "model.n_experts_max: 5"
    )
    refused(lambda: recycle_expert(moe, optimizer, 10, ROWS, 0), "carries")
    prune_expert(moe, 11, 1, force=True)  # 0, 2, 3 are left, of which 0 and 3 are one choice
    refused(lambda: prune_expert(moe, 11, 2, force=True), "expert 2 is needed")
    refused(
        lambda: add_expert(moe, optimizer, 12, ROWS), "free at step 211", "model.n_experts_max: 5"
    )
    fixed = layer()
    with pytest.raises(ValueError, match="model.n_experts_max: 9"):
        add_expert(fixed, optimizer, 0, ROWS)


@torch.no_grad()
def test_prune_and_restore_give_back_the_same_bits():
    moe, optimizer = surgery_layer(spare=3)
    x = normal(200, 32)
    before = moe(x)[0]
    prune_expert(moe, 100, 3, force=True)
    assert not torch.equal(moe(x)[0], before) and not (choices(moe, x) == 3).any()
    assert moe.router.load[3] == 0 and moe.router.load.sum() == pytest.approx(1)
    assert add_expert(moe, optimizer, 100 + WINDOW - 1, ROWS, parent=0)[1] == 4, (
        "its slot is not given away"
    )
    with pytest.raises(ValueError):
        restore_expert(moe, 100 + WINDOW, 3)
    moe, optimizer = surgery_layer(spare=3)
    prune_expert(moe, 100, 3, force=True)
    restore_expert(moe, 100 + WINDOW - 1, 3)
    assert torch.equal(moe(x)[0], before)
    prune_expert(moe, 300, 3, force=True)
    assert add_expert(moe, optimizer, 300 + WINDOW, ROWS, parent=0)[1] == 3, (
        "after it the slot is free again"
    )


@torch.no_grad()
def test_a_restored_twin_is_a_twin_again():
    """Without the exclusion both would take the same tokens: the output would move by a third."""
    for which in (0, 4):
        moe, optimizer = surgery_layer()
        x = normal(200, 32)
        assert add_expert(moe, optimizer, 5, ROWS, parent=0) == (0, 4)
        before = moe(x)[0]
        prune_expert(moe, 6, which, force=True)
        left = 4 - which
        assert (choices(moe, x) == left).any(), "the other one can be chosen"
        restore_expert(moe, 7, which)
        assert torch.equal(moe(x)[0], before)


@torch.no_grad()
def test_a_pruned_expert_stands_still():
    """Adam would go on moving it by its momentum."""
    moe, optimizer = surgery_layer()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for p in moe.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    prune_expert(moe, 0, 1, True, optimizer, ROWS)
    before = [p[1].clone() for p in moe.parameters()]
    for p in moe.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(
        torch.equal(p[1], old) and not torch.equal(p[2], old)
        for p, old in zip(moe.parameters(), before)
    )


@torch.no_grad()
def test_pruning_what_had_all_the_load_leaves_numbers():
    moe, _ = surgery_layer()
    moe.router.load.zero_()[1] = 1.0
    prune_expert(moe, 0, 1, force=True)
    assert moe.router.load.isfinite().all() and moe(normal(20, 32))[1]["loss"].isfinite()


@torch.no_grad()
def test_recycle_puts_half_of_the_hottest_into_the_slot_of_the_dead():
    moe, optimizer = surgery_layer(E=4, spare=0)
    moe.router.load.copy_(torch.tensor([0.5, 0.29, 0.01, 0.2]))
    w13 = moe.experts.w13.clone()
    assert recycle_expert(moe, optimizer, 50, ROWS) == (0, 2)
    assert torch.equal(moe.experts.w13[2], w13[0]) and moe.router.alive.all()
    assert moe.router.sibling.tolist() == [2, 1, 0, 3] and moe.router.retired.tolist() == [-1] * 4
    assert (optimizer.state[moe.experts.w2]["exp_avg"][2] == 0).all()
    moe.router.load.copy_(torch.tensor([0.4, 0.2, 0.4, 0.0]))
    assert recycle_expert(moe, optimizer, 51, ROWS) == (1, 3), "0 and 2 are still alike"
    moe.router.load.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="sibling"):
        recycle_expert(moe, optimizer, 52, ROWS)


@torch.no_grad()
def test_siblings_are_released_when_their_weights_have_drifted_apart():
    moe, optimizer = surgery_layer()
    add_expert(moe, optimizer, 0, ROWS, parent=1)
    assert release_siblings(moe, ROWS) == []
    x = normal(300, 32)
    assert not ((choices(moe, x) == 1).any(1) & (choices(moe, x) == 4).any(1)).any(), "never both"
    moe.experts.w13[4] += (
        0.1 * moe.experts.w13[4].norm() / math.sqrt(32 * 32) * normal(32, 32, seed=9)
    )
    assert release_siblings(moe, ROWS) == []
    moe.experts.w13[4] += (
        0.4 * moe.experts.w13[4].norm() / math.sqrt(32 * 32) * normal(32, 32, seed=8)
    )
    assert release_siblings(moe, ROWS) == [(1, 4)] and moe.router.sibling.tolist() == list(range(6))
    assert ((choices(moe, x) == 1).any(1) & (choices(moe, x) == 4).any(1)).any()
    assert release_siblings(moe, ROWS) == []


def test_no_recompilation_after_surgery():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = make(**KINDS["slots"])
    block, x = model.blocks[0], normal(2, 32, 32)
    inputs = AttentionInputs(rope_tables(model.cfg, torch.arange(32)))
    optimizer = build_optimizer(
        Config(data_dir="x", learning_rate=3e-4), dict(model.named_parameters())
    )
    run = torch.compile(block, backend=counter, fullgraph=True)
    run(x, inputs)[0].sum().backward()
    graphs = counter.frame_count
    assert graphs >= 1
    changes = (
        lambda: add_expert(block.ffn, optimizer, 0, ROWS),
        lambda: prune_expert(block.ffn, 1, 2, force=True),
        lambda: restore_expert(block.ffn, 2, 2),
        lambda: add_expert(block.ffn, optimizer, 3, ROWS),
        lambda: update_balance([block.ffn], [torch.arange(6.0)], torch.tensor(False)),
    )
    for change in changes:
        change()
        got, want = run(x, inputs), block(x, inputs)
        assert torch.allclose(got[0], want[0], atol=1e-6) and all(
            torch.equal(got[1][name], want[1][name]) for name in want[1] if name != "loss"
        )
        got[0].sum().backward()
    assert counter.frame_count == graphs
