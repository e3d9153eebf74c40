"""The sparse layers, property by property: routing, balance, statistics, Mixture of Depths, null experts, slots.

What they compute is held against slow formulas written out here, and against themselves by another way (cached and
full, recomputed and kept, one process and two). The expert op and its backends have tests of their own.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ROOT, losses, read_lines, run_python, write_yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model_moe
import sample
import train
from lumen.cli import read_config
from lumen.config import Config
from lumen.errors import UserError
from lumen.experts import (
    WINDOW,
    add_expert,
    expert_numbers,
    expert_statistics,
    prune_expert,
    recycle_expert,
    release_siblings,
    restore_expert,
)
from lumen.optim import build_optimizer
from model import KVCache, ModelConfig, Transformer, rope_tables, rotate
from model_moe import SUMS, MoD, MoE, draw_dropout, update_balance
from train import Parallel, Trainer, flatten, lr_at, unflatten

torch.set_num_threads(1)

SMALL = dict(
    vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32
)
SHORT = dict(
    save_interval=0, eval_tokens=64, expert_backend="slices"
)  # of a run: nothing is tried out at its start
NO_LOSSES = dict(aux_loss_weight=0.0, router_z_loss_weight=0.0)
FINE = dict(n_experts=8, d_expert=16, router="sigmoid", n_shared_experts=1)
KINDS = {
    "dense": {},
    "switch": dict(n_experts=4, n_experts_per_token=1, d_expert=16),
    "mixtral": dict(n_experts=4, d_expert=16),
    "fine": FINE,
    "slots": dict(n_experts=4, n_experts_max=6, d_expert=16, router="sigmoid"),
    "null": dict(n_experts=4, n_null_experts=2, d_expert=16),
    "mod": dict(mod_capacity=0.5),
    "mod static": dict(mod_capacity=0.375, mod_routing="static"),
    "mod random": dict(mod_capacity=0.5, mod_routing="random"),
    "mod ffn": dict(mod_capacity=0.5, mod_ffn_only=True),
    "hybrid": dict(mod_capacity=0.5, **FINE),
    "hybrid ffn": dict(mod_capacity=0.5, mod_ffn_only=True, n_experts=4, d_expert=16),
    "beside": dict(mod_capacity=0.25, mod_layers=[0], n_experts=4, moe_layers=[1], d_expert=16),
}
SPARSE = [k for k in KINDS if k != "dense"]
EXPERTS = [k for k in KINDS if "n_experts" in KINDS[k]]
DEPTHS = [k for k in KINDS if "mod_capacity" in KINDS[k]]


def config(**changes) -> ModelConfig:
    return ModelConfig(**SMALL | changes)


def make(seed=0, std=0.1, **changes) -> Transformer:
    """Weights large enough for attention and routers to have opinions; every predictor differs from its router."""
    model, gen = Transformer(config(**changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            if "predictor.bias" in name:
                p.zero_()
            elif "mod." in name or "router" in name:
                p.copy_(noise * 0.3)
            else:
                p.copy_(1 + 0.2 * noise if p.dim() == 1 else noise * std)
    return model


def ids(B, T, seed=0):
    """Rows of different ids: equal tokens have equal scores in the first MoD layer, which has a test of its own."""
    return torch.rand(B, 97, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :T]


def layer(d=32, E=8, K=2, seed=0, spread=0.3, **changes) -> MoE:
    """One MoE layer by itself, with random weights."""
    torch.manual_seed(seed)
    changes = {"d_expert": 16} | changes
    moe = MoE(
        config(d_model=d, n_heads=2, n_kv_heads=2, n_experts=E, n_experts_per_token=K, **changes)
    )
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.2)
        moe.router.weight.normal_(0, spread)
    return moe


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def choices(moe, x):
    return moe.router(x)[1]


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradients(model, x, y, seed=0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    total, _ = model(x, y)
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture
def tiny(tiny):
    """The tiny run of conftest, shorter: it saves and evaluates (two rows) at its end."""
    return lambda name="run", model=None, **changes: tiny(name, model, **SHORT | changes)


def finish(keys, parallel=Parallel, before=None) -> Trainer:
    """Run to the end. before: {step: function of the trainer}, called ahead of that step's first micro-step."""
    trainer = Trainer(keys, parallel)
    following, due = trainer.loader.next, dict(before or {})

    def next_rows():
        due.pop(trainer.step, lambda trainer: None)(trainer)
        return following()

    trainer.loader.next = next_rows
    assert trainer.fit() == 0
    return trainer


# ---------------------------------------------------------------- routing


@torch.no_grad()
def by_hand(moe, x):
    """What a MoE layer should give, token by token in fp64: (y, ids, gates)."""
    r, cfg = moe.router, moe.router.cfg
    S, K = r.slots, cfg.n_experts_per_token
    alive = r.alive.tolist() if cfg.n_experts_max else [True] * S
    twin = r.sibling.tolist() if cfg.n_experts_max else list(range(S))
    w13, w2, y, rows, gates = moe.experts.w13.double(), moe.experts.w2.double(), [], [], []
    for t in x.double():
        logit = (r.weight.double() @ t) / cfg.routing_temperature
        live = [e for e in range(r.n) if e >= S or alive[e]]
        if cfg.router == "softmax":
            score = {e: s.item() for e, s in zip(live, logit[live].softmax(0))}
        else:
            score = {e: 1 / (1 + math.exp(-logit[e].item())) for e in live}
        rank = {e: score[e] + r.bias[e].item() for e in live}
        can = [e for e in live if e >= S or twin[e] == e or rank[e] > rank[twin[e]]]
        mean = {
            e: (rank[e] + rank[twin[e]]) / 2 if e < S else rank[e] for e in can
        }  # siblings compete as one
        chosen = sorted(can, key=lambda e: -mean[e])[:K]
        p = torch.tensor([score[e] for e in chosen], dtype=torch.float64)
        p = (p / p.sum() if cfg.norm_topk else p) * cfg.route_scale
        out = torch.zeros_like(t)
        for e, gate in zip(chosen, p):
            if e < S:
                a, b = (w13[e] @ t).chunk(2)
                out += gate * (w2[e] @ (a * a.sigmoid() * b))
        if moe.shared is not None:
            a, b = (moe.shared.w13.weight.double() @ t).chunk(2)
            out += moe.shared.w2.weight.double() @ (a * a.sigmoid() * b)
        y.append(out)
        rows.append(chosen)
        gates.append(p)
    return torch.stack(y), torch.tensor(rows), torch.stack(gates)


class Swi(torch.nn.Module):
    """A shared expert, as model.SwiGLU is."""

    def __init__(self, d, width):
        super().__init__()
        self.w13, self.w2 = (
            torch.nn.Linear(d, 2 * width, bias=False),
            torch.nn.Linear(width, d, bias=False),
        )

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


ROUTINGS = {
    "softmax, raw": dict(norm_topk=False),
    "softmax, renormalised": dict(),
    "sigmoid": dict(router="sigmoid"),
    "sigmoid, raw, scaled": dict(router="sigmoid", norm_topk=False, route_scale=2.5),
    "temperature": dict(routing_temperature=0.3),
    "one": dict(K=1),
    "one, sigmoid": dict(K=1, router="sigmoid"),
    "all": dict(K=8),
    "16 of 32": dict(E=32, K=16, router="sigmoid"),
    "null": dict(n_null_experts=4, router="sigmoid"),
    "null, softmax": dict(n_null_experts=4),
    "slots": dict(n_experts_max=11),
}


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("kind", ROUTINGS)
@torch.no_grad()
def test_a_layer_equals_the_written_out_formula(kind, shared):
    moe, x = layer(**ROUTINGS[kind]), normal(3, 7, 32)
    moe.shared = Swi(32, 24) if shared else None
    moe.router.bias.copy_(0.2 * normal(moe.router.n, seed=2))
    if kind == "slots":
        add_expert(moe, torch.optim.AdamW(moe.parameters()), 0)
    want, want_ids, want_p = by_hand(moe, x.flatten(0, 1))
    p, found, _, _ = moe.router(x.flatten(0, 1))
    assert torch.equal(found, want_ids) and torch.allclose(p.double(), want_p, atol=1e-6)
    assert torch.allclose(moe(x)[0].flatten(0, 1).double(), want, atol=2e-5)
    if "norm" not in kind and moe.router.cfg.norm_topk:
        assert torch.allclose(p.sum(-1), torch.ones(21)), "gates of a token sum to 1"


@pytest.mark.parametrize("router", ("softmax", "sigmoid"))
@torch.no_grad()
def test_the_bias_chooses_and_never_weighs(router):
    moe, x = layer(router=router), normal(50, 32)
    moe.router.bias[5] = 10.0
    p, found, *_ = moe.router(x)
    assert (found[:, 0] == 5).all()
    logits = x @ moe.router.weight.t()
    score = (logits.softmax(-1) if router == "softmax" else logits.sigmoid()).gather(1, found)
    assert torch.allclose(p, score / score.sum(-1, keepdim=True), atol=1e-6)


def test_which_layers_have_experts_or_skip_tokens():
    def layers(key, **changes):
        cfg = config(n_layers=6, **changes)
        return [i for i in range(6) if (cfg.is_moe(i) if key == "moe" else cfg.capacity(i) < 1)]

    assert layers("moe", n_experts=4) == [0, 1, 2, 3, 4, 5]
    assert layers("moe", n_experts=4, n_dense_layers=2) == [2, 3, 4, 5]
    assert layers("moe", n_experts=4, moe_every=3) == [2, 5]
    assert layers("moe", n_experts=4, n_dense_layers=1, moe_every=2) == [2, 4]
    assert layers("moe", n_experts=4, moe_layers=[4, 0]) == [0, 4]
    assert layers("mod", mod_capacity=0.5) == [0, 1, 2, 3, 4, 5]
    assert layers("mod", mod_capacity=0.5, mod_every=2) == [1, 3, 5]
    assert layers("mod", mod_capacity=0.5, mod_start_layer=1, mod_end_layer=4) == [1, 2, 3, 4]
    assert layers("mod", mod_capacity=0.5, mod_start_layer=1, mod_end_layer=4, mod_every=2) == [
        2,
        4,
    ]
    assert layers("mod", mod_capacity=0.5, mod_layers=[3]) == [3]
    assert layers("mod", mod_capacity=[1.0, 0.5, 1.0, 0.25, 1, 1]) == [1, 3]
    model = Transformer(
        config(n_layers=6, mod_capacity=[1.0, 0.5, 1.0, 0.25, 1, 1], n_experts=4, moe_layers=[2, 3])
    )
    assert list(model.sparse_layers("moe")) == [2, 3]
    assert {i: m.tokens for i, m in model.sparse_layers("mod").items()} == {1: 16, 3: 8}


@torch.no_grad()
def test_jitter_moves_the_router_in_training_only():
    moe, plain, x = layer(router_jitter=0.3), layer(), normal(64, 32)
    assert not torch.equal(moe.router(x)[0], moe.router(x)[0])
    moe.eval(), plain.eval()
    assert torch.equal(moe(x)[0], plain(x)[0])
    moe.train()
    moe.router.weight.zero_()  # nothing to choose by: the same experts, which see the input as it is
    plain.router.weight.zero_()
    assert torch.equal(moe(x)[0], plain(x)[0])


@torch.no_grad()
def test_expert_dropout_mutes_at_least_nothing_that_is_needed():
    layers, x = [layer(expert_dropout=0.7, K=3, seed=s) for s in (0, 0)], normal(64, 32)
    masks = set()
    for seed in range(40):
        draw_dropout(layers, seed)
        dropped_out = [m.router.dropped_out.clone() for m in layers]
        draw_dropout(layers, seed)
        assert all(torch.equal(a, m.router.dropped_out) for a, m in zip(dropped_out, layers)), (
            "a function of the seed"
        )
        masks.add(tuple(dropped_out[0].tolist()))
        assert not dropped_out[0].all() and (~dropped_out[0]).sum() >= 3
        chosen = choices(layers[0], x)
        assert not dropped_out[0][chosen].any()
        layers[0].eval()
        assert torch.equal(layers[0](x)[0], layer(K=3).eval()(x)[0]), "nothing at evaluation"
        layers[0].train()
    assert len(masks) > 20 and 0.4 < np.mean([np.mean(m) for m in masks]) < 0.7
    draw_dropout(layers, 7)
    assert not torch.equal(layers[0].router.dropped_out, layers[1].router.dropped_out), (
        "each layer draws its own"
    )


@torch.no_grad()
def test_expert_dropout_beside_twins_leaves_every_token_k_experts():
    """Of siblings only one can be chosen, so a pair is one that stays; and a dropped_out twin does not stand in the way."""
    moe, x = layer(E=3, K=2, n_experts_max=5, expert_dropout=0.6, n_null_experts=0), normal(64, 32)
    add_expert(moe, torch.optim.AdamW(moe.parameters()), 0)
    for seed in range(60):
        draw_dropout([moe], seed)
        can = ~moe.router.dropped_out & moe.router.alive
        _, found, _, sums = moe.router(x)
        assert can[found].all(), f"seed {seed}: a dropped_out or empty slot was chosen"


@torch.no_grad()
def test_what_dropout_mutes_is_not_dead():
    moe, x = layer(E=8, n_experts_max=8, expert_dropout=0.5), normal(400, 32)
    for seed in range(4):
        draw_dropout([moe], seed)
        sums = moe.router(x)[3]
        update_balance([moe], [sums["counts"]], torch.tensor(False))
        assert moe.router.load.sum().item() == pytest.approx(1) and (moe.router.load > 0).all()
        found = expert_statistics([0], expert_numbers({0: moe}, stacked(sums)))
        share = found["per_expert_utilization"]
        assert [s is None for s in share] == moe.router.dropped_out.tolist() and found["dead"] == 0
    with pytest.raises(ValueError, match="fair share"):
        recycle_expert(moe, torch.optim.AdamW(moe.parameters()), 9)


def test_keys_without_their_switch_are_told(tiny, capsys):
    keys = {
        "router": "sigmoid",
        "moe_every": 2,
        "mod_every": 2,
        "mod_ffn_only": True,
        "d_expert": 16,
    }
    assert sorted(config(**keys).idle()) == sorted(keys) and not config(**FINE).idle()
    finish(tiny("run", keys, max_steps=1))
    said = capsys.readouterr().out
    assert "without effect" in said and "mod_ffn_only" in said


def test_expert_dropout_is_drawn_once_a_step_from_the_cursor(tiny, monkeypatch):
    seeds, masks, real = [], [], model_moe.draw_dropout

    def draw(layers, seed):
        real(layers, seed)
        seeds.append(seed)
        masks.append([m.router.dropped_out.clone() for m in layers])

    monkeypatch.setattr(train, "draw_dropout", draw)
    model = KINDS["mixtral"] | {"expert_dropout": 0.4}
    trainer = finish(tiny("a", model, max_steps=6))
    assert len(seeds) == len(set(seeds)) == 6 and len(masks[0]) == 2
    assert not any("dropped_out" in name for name in trainer.tensors())
    finish(tiny("b", model, max_steps=6, batch_size=1, gradient_accumulation_steps=4))
    assert seeds[6:] == seeds[:6], "of any split"
    loaded, *_ = sample.load(trainer.out, device="cpu", precision="fp32", say=lambda text: None)
    x = ids(1, 9)
    assert torch.equal(loaded(x), trainer.model.eval()(x)), "and made for sampling"


def crowded(K, **changes):
    """A layer of four experts whose tokens all prefer expert 0, then 1, 2, 3; and 64 such tokens."""
    moe, x = layer(E=4, K=K, **changes), normal(64, 32)
    with torch.no_grad():
        x[:, 0] = 4.0
        moe.router.weight.mul_(0.01)[:, 0] = torch.tensor([0.4, 0.2, 0.1, 0.0])
    return moe, x.requires_grad_()


@pytest.mark.parametrize("router", ("softmax", "sigmoid"))
def test_capacity_serves_the_first_and_leaves_the_others_exactly_alone(router):
    moe, x = crowded(1, capacity_factor=1.0, router=router)
    y, stats = moe(x)
    assert stats["moe.dropped"] == 48  # 64 tokens, 4 experts: 16 each
    assert stats["moe.counts"].tolist() == [64, 0, 0, 0], "what was wanted, for the balance"
    assert (y[16:] == 0).all() and (y[:16] != 0).any(1).all()
    (gx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert (gx[16:] == 0).all() and (gx[:16] != 0).any(1).all()
    (gw,) = torch.autograd.grad(y.sum(), moe.router.weight)
    assert gw.isfinite().all() and gw.norm() > 0
    moe.eval()
    full, stats = moe(x)
    assert (full != 0).any(1).all() and stats["moe.dropped"] == 0
    assert torch.allclose(full[:16], y[:16], atol=1e-6)


@torch.no_grad()
def test_capacity_drops_choices_and_not_tokens():
    """K = 2, capacity factor 1.25 of 32 a expert: experts 0 and 1 take 40 each; the gates are not made larger."""
    moe, x = crowded(2, capacity_factor=1.25)
    y, stats = moe(x)
    p, found, *_ = layer_without_capacity(moe).router(x)
    assert stats["moe.dropped"] == 48 and found[:, 0].eq(0).all() and found[:, 1].eq(1).all()
    assert (y[40:] == 0).all()
    assert torch.allclose(y[:40].double(), by_hand(moe, x[:40])[0], atol=1e-5)
    # expert 1 alone is crowded: its dropped tokens still get their part of the other
    moe.router.weight[0] = normal(32, seed=5) * 0.5
    moe.router.weight[3] = normal(32, seed=6) * 0.5
    y, _ = moe(x)
    p, found, *_ = layer_without_capacity(moe).router(x)
    want, seen, drops = torch.zeros_like(y), [0] * 4, 0
    for t in range(64):
        for k in range(2):
            e = found[t, k].item()
            seen[e] += 1
            if seen[e] <= 40:
                a, b = (moe.experts.w13[e] @ x[t]).chunk(2)
                want[t] += p[t, k] * (moe.experts.w2[e] @ (F.silu(a) * b))
            else:
                drops += 1
    assert 0 < drops < 64, "this test can fail"
    assert torch.allclose(y, want, atol=1e-5)


def layer_without_capacity(moe):
    moe.router.capacity_factor, was = None, moe.router.capacity_factor
    copy = layer(E=4, K=2)
    copy.load_state_dict(moe.state_dict())
    moe.router.capacity_factor = was
    return copy


def test_dropped_tokens_keep_their_residual_in_the_block():
    model = make(n_experts=4, n_experts_per_token=1, capacity_factor=0.25, **NO_LOSSES)
    block, x = model.blocks[0], normal(2, 32, 32)
    seen = {}
    block.ffn.register_forward_hook(lambda m, i, o: seen.update(y=o[0]))
    block.attn.register_forward_hook(lambda m, i, o: seen.update(h=o))
    change, stats = block(x, rope_tables(model.cfg, torch.arange(32)))
    dropped = (seen["y"] == 0).all(-1)
    assert dropped.sum() == stats["moe.dropped"] > 20
    assert torch.equal(change[dropped], seen["h"][dropped]) and not torch.equal(change, seen["h"])


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_router_learns_from_the_language_model_alone(kind):
    """Lunaris' Switch layer does not multiply by the gate: its router gets nothing from the loss that counts."""
    model = make(**KINDS[kind] | NO_LOSSES)
    for weights in (False, True):
        got = gradients(model, ids(2, 32), ids(2, 32, seed=1))
        for i in model.sparse_layers("moe"):
            g = got[f"blocks.{i}.ffn.router.weight"]
            assert (g.norm(dim=1) > 1e-5).sum() >= 3, "the rows of the chosen experts"
        with torch.no_grad():  # the same far from a uniform router
            for p in model.parameters():
                p.mul_(1.5 if weights else 1.0)


def test_a_raw_gate_moves_towards_the_expert_that_helps():
    """K = 1: a step against the gradient lowers the loss, with nothing but the router moving."""
    model, x, y = make(**KINDS["switch"] | NO_LOSSES), ids(2, 32), ids(2, 32, seed=1)
    got = gradients(model, x, y)
    before = model(x, y)[0].item()
    slope = 0.0
    with torch.no_grad():
        for i in (0, 1):
            g = got[f"blocks.{i}.ffn.router.weight"]
            model.blocks[i].ffn.router.weight -= 1e-4 * g
            slope += 1e-4 * g.square().sum().item()
    assert slope > 0 and model(x, y)[0].item() < before


@torch.no_grad()
def test_routing_is_fp32_under_bf16():
    moe, x = (
        layer(E=32, K=4, spread=0.002),
        normal(200, 32).bfloat16(),
    )  # so even that bf16 would tie
    p, found, loss, sums = moe.router(x)
    assert {t.dtype for t in (p, loss, *sums.values())} == {torch.float32}
    q, want, *_ = moe.router(x.float())
    assert torch.equal(found, want) and torch.equal(p, q)
    rounded = (x @ moe.router.weight.bfloat16().t()).topk(4).indices
    assert not torch.equal(rounded.sort().values, found.sort().values), "this test can fail"
    assert moe(x)[0].dtype == torch.bfloat16
    model, seen = make(mod_capacity=0.5, n_layers=1), []
    model.blocks[0].mod.router.weight.mul_(0.01)
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model.compute_dtype = torch.bfloat16
    stats, (x,) = model(ids(1, 32), ids(1, 32))[1], seen
    assert x.dtype == torch.bfloat16
    score = F.rms_norm(x[0].float(), (32,), eps=1e-6) @ model.blocks[0].mod.router.weight[0]
    assert (
        stats["mod.counts"][0].nonzero()[:, 0].tolist()
        == score.topk(16).indices.sort().values.tolist()
    )


@pytest.mark.parametrize("kind", ("mixtral", "hybrid"))
def test_a_model_made_for_bf16_sampling_routes_as_in_training(kind, tiny):
    """sample.py casts the weights once; routers stay as they are, else another expert would be chosen."""
    trainer = finish(tiny("run", KINDS[kind], max_steps=2))
    loaded, *_ = sample.load(trainer.out, device="cpu", precision="bf16", say=lambda text: None)
    model, x = trainer.model.eval(), ids(2, 20)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_the_routers_learning_rate_survives_the_schedule(tiny):
    """Lunaris overwrites it in the first step."""
    for factor in (0.5, 0.0):
        trainer = Trainer(tiny(f"f{factor}", KINDS["hybrid"], router_lr_factor=factor, max_steps=6))
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.fit()
        routers = {n for n in before if ".router." in n or ".predictor." in n}
        lr = lr_at(trainer.cfg, trainer.run, 6)
        for group in trainer.optimizer.param_groups:
            mine = {
                n
                for n, p in trainer.model.named_parameters()
                if any(p is q for q in group["params"])
            }
            assert mine <= routers or not mine & routers
            assert group["lr"] == pytest.approx(lr * factor if mine <= routers else lr)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == set(before) - (routers if factor == 0 else set())


@pytest.mark.parametrize("kind", ("hybrid", "slots"))
def test_matrices_decay_and_nothing_else(kind):
    model = make(**KINDS[kind])
    groups = build_optimizer(
        Config(data_dir="x", weight_decay=0.3), dict(model.named_parameters())
    ).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    wrong = [
        names[id(p)]
        for g in groups
        for p in g["params"]
        if (p.dim() >= 2) != (g["weight_decay"] == 0.3)
    ]
    assert not wrong


# ---------------------------------------------------------------- balance


def count_tensor(moe, counts):
    return torch.tensor(counts + [0.0] * (moe.router.n - len(counts)))


@pytest.mark.parametrize("slots", (0, 6))
def test_update_balance_is_the_sign_rule_centred(slots):
    moe = layer(
        E=4, router="sigmoid", bias_update_rate=0.01, **(dict(n_experts_max=slots) if slots else {})
    )
    counts, good = count_tensor(moe, [70.0, 10.0, 10.0, 10.0]), torch.tensor(False)
    for _ in range(3):
        update_balance([moe], [counts], good)
    live = moe.router.bias[:4]
    step = torch.tensor([-1.0, 1, 1, 1]) * 0.01
    assert torch.allclose(live, 3 * (step - step.mean()), atol=1e-7)
    assert abs(live.sum()) < 1e-7, "without centring it would be 0.06"
    assert (moe.router.bias[4:] == 0).all() and torch.allclose(
        moe.router.load[:4], counts[:4] / 100
    )
    before = [moe.router.bias.clone(), moe.router.load.clone()]
    update_balance([moe], [counts.flip(0) * math.nan], torch.tensor(True))
    assert torch.equal(before[0], moe.router.bias) and torch.equal(before[1], moe.router.load), (
        "a dropped step"
    )
    update_balance([moe], [count_tensor(moe, [5.0] * 4)], good)
    assert torch.allclose(moe.router.bias, before[0]), "equal loads: nothing to do"


def test_the_bias_balances_a_lopsided_router():
    moe, good = layer(E=8, router="sigmoid", bias_update_rate=0.02, spread=0.4), torch.tensor(False)
    shares = []
    for step in range(200):
        x = normal(256, 32, seed=step) + 0.5
        counts = moe.router(x)[3]["counts"]
        shares.append((counts.max() / counts.sum()).item())
        update_balance([moe], [counts], good)
    assert np.mean(shares[:5]) > 0.25 and np.mean(shares[-20:]) < 0.17


@pytest.mark.parametrize("router", ("softmax", "sigmoid"))
def test_balance_loss_by_hand_row_by_row(router):
    """n times the sum over tokens of share times the load of the token's own row; 1.0 a token at equal loads."""
    weights = dict(aux_loss_weight=0.5, router_z_loss_weight=0.0)
    for slots in ({}, {"n_experts_max": 11}):
        moe, x = layer(router=router, **weights, **slots), normal(4, 25, 32)
        _, ids, loss, sums = moe.router(x)
        logits = (x @ moe.router.weight.t())[..., :8]
        share = (
            logits.softmax(-1)
            if router == "softmax"
            else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        )
        load = F.one_hot(ids.view(4, -1), 8).float().mean(1)  # (rows, experts), of 2 x 25 choices
        want = 8 * (share * load[:, None]).sum()
        assert sums["balance"].item() == pytest.approx(want.item(), rel=1e-4)
        assert loss.item() == pytest.approx(0.5 * want.item(), rel=1e-4)
        loss.backward()
        step = moe.router.weight.detach() - 1e-3 * moe.router.weight.grad
        alone = sum(moe.router(row[None])[2] for row in x)
        assert alone.item() == pytest.approx(loss.item(), rel=1e-5), "no row knows of another"
        with torch.no_grad():
            moe.router.weight.copy_(step)
            assert moe.router(x)[2] < loss


def test_balance_loss_is_one_a_token_at_equal_loads():
    moe = layer(aux_loss_weight=0.5, router_z_loss_weight=0.0, router="softmax")
    with torch.no_grad():  # of unit vectors each goes to the two experts of its number, in turn
        moe.router.weight.zero_()
        for e in range(8):
            moe.router.weight[e, e // 2 * 2 : e // 2 * 2 + 2] = 5.0
    x = torch.eye(32)[torch.arange(8).repeat(3)][None]
    _, _, loss, sums = moe.router(x)
    assert sums["balance"].item() == pytest.approx(24, rel=1e-5)
    loss.backward()
    assert moe.router.weight.grad.abs().max() < 1e-4, "equal loads say nothing about a direction"


@torch.no_grad()
def test_z_loss_is_the_squared_logsumexp():
    moe, x = (
        layer(router_z_loss_weight=0.1, aux_loss_weight=0.0, routing_temperature=2.0),
        normal(100, 32),
    )
    z = (x @ moe.router.weight.t() / 2).logsumexp(-1).square().sum()
    _, _, loss, sums = moe.router(x)
    assert torch.allclose(loss, 0.1 * z) and torch.allclose(sums["z"], z)


def test_sigmoids_pushed_to_zero_do_not_cheat_the_balance():
    """With an epsilon beside nothing the sum of shares would fall to 0, and the loss with it (Megatron issue 1545)."""
    moe, x = layer(router="sigmoid", aux_loss_weight=1.0), normal(50, 32).abs()
    with torch.no_grad():
        moe.router.weight.fill_(-10.0)
    assert moe.router(x)[3]["balance"].item() == pytest.approx(50, rel=1e-3)


class Poisoned(Parallel):
    """At step `bad` the gradient is not finite."""

    bad, at = -1, 0

    def reduce(self, model, stats):
        stats = super().reduce(model, stats)
        if self.at == self.bad:
            model.blocks[0].attn.wo.weight.grad[0, 0] = math.nan
        self.at += 1
        return stats


def watch(monkeypatch) -> list:
    told, real = [], model_moe.update_balance

    def update(layers, counts, bad):
        before = [m.router.bias.clone() for m in layers] + [m.router.load.clone() for m in layers]
        real(layers, counts, bad)
        after = [m.router.bias.clone() for m in layers] + [m.router.load.clone() for m in layers]
        told.append((torch.stack(list(counts)), bool(bad), before, after))

    monkeypatch.setattr(train, "update_balance", update)
    return told


def test_balance_is_updated_once_a_step_from_all_micro_steps(tiny, monkeypatch):
    told, runs = watch(monkeypatch), {}
    model = KINDS["fine"] | {"dropout": 0.0, "bias_update_rate": 0.01}
    for name, changes in {
        "four": dict(batch_size=1, gradient_accumulation_steps=4),
        "one": dict(batch_size=4, gradient_accumulation_steps=1),
        "recomputed": dict(
            batch_size=1, gradient_accumulation_steps=4, activation_checkpointing="block"
        ),
    }.items():
        finish(tiny(name, model, max_steps=4, **changes))
        runs[name] = told.copy()
        told.clear()
    for run in runs.values():
        assert len(run) == 4
        for counts, _, _, after in run:
            assert (counts.sum(1) == 4 * 32 * 2).all(), (
                "4 rows of 32 tokens, K = 2: neither more nor less"
            )
            for layer_counts, load in zip(counts, after[2:]):
                assert torch.allclose(load.double(), layer_counts / 256, atol=1e-6), (
                    "the load of the step"
                )
    for name in ("one", "recomputed"):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(runs["four"], runs[name])), name


def test_balance_stands_still_in_a_dropped_step(tiny, monkeypatch):
    told = watch(monkeypatch)
    monkeypatch.setattr(Poisoned, "bad", 2)
    finish(tiny("run", KINDS["fine"] | {"bias_update_rate": 0.01}, max_steps=4), Poisoned)
    assert [bad for _, bad, *_ in told] == [False, False, True, False]
    for _, bad, before, after in told:
        assert all(torch.equal(a, b) for a, b in zip(before, after)) == bad


SPLIT = dict(aux_loss_weight=0.5, router_z_loss_weight=0.01, dropout=0.0)


@pytest.mark.parametrize("kind", ("null", "hybrid"))
def test_any_split_of_the_batch_trains_alike(tiny, kind):
    """The balance loss takes its loads from its row, MoD chooses row by row: a split changes neither."""
    model, found = KINDS[kind] | SPLIT, []
    for micro in (4, 1):
        rows = dict(batch_size=micro, gradient_accumulation_steps=4 // micro)
        trainer = finish(tiny(f"r{micro}", model, max_steps=8, **rows))
        found.append((losses(trainer.out), trainer.val_loss))
    (a, val), (b, other) = found
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 and abs(val - other) < 1e-5


@pytest.mark.parametrize("capacity", (0.125, 0.5))
def test_of_equal_tokens_the_earlier_is_taken(capacity):
    """In the first layer equal ids score equally, so at the limit of capacity a rule must decide, not rounding: else
    the row above in the batch would change what this row computes."""
    model = make(mod_capacity=capacity, n_layers=1)
    x = torch.randint(0, 6, (64, 32), generator=torch.Generator().manual_seed(1))
    n, kept = model.blocks[0].mod.tokens, torch.zeros(64, 32)
    h = F.rms_norm(model.embed.weight.double(), (32,), eps=1e-6)
    score = (h @ model.blocks[0].mod.router.weight[0].double())[x]
    for row in range(64):
        kept[row, sorted(range(32), key=lambda t: (-score[row, t].item(), t))[:n]] = 1
    for rows in (slice(0, 64), slice(3, 4), slice(5, 12)):
        assert torch.equal(model(x[rows], x[rows])[1]["mod.counts"][0], kept[rows].sum(0))


@pytest.mark.parametrize("kind", ("mixtral", "hybrid"))
def test_losses_are_logged_apart(tiny, kind):
    model = KINDS[kind] | SPLIT
    trainer = Trainer(tiny("run", model, max_steps=2))
    rows = [trainer.loader.batch(r, 2) for r in (0, 2)]
    with torch.no_grad():
        ce = trainer.model.train()
        ce = [
            F.cross_entropy(trainer.model(torch.tensor(x)).flatten(0, 1), torch.tensor(y).flatten())
            for x, y in rows
        ]
        parts = [trainer.model(torch.tensor(x), targets=torch.tensor(y))[1] for x, y in rows]
    trainer.fit()
    row = next(r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r)
    assert row["loss"] == pytest.approx(np.mean([c.item() for c in ce]), abs=1e-5), (
        "the language model's alone"
    )
    balance = sum(p["moe.balance"].sum().item() for p in parts) / (4 * 32)
    assert row["aux_loss"] == pytest.approx(0.5 * balance, rel=1e-4), (
        "weight x what all layers add up to"
    )
    z = sum(p["moe.z"].sum().item() for p in parts) / (4 * 32)
    assert row["router_z_loss"] == pytest.approx(0.01 * z, rel=1e-4) and row["router_z_loss"] > 0
    if kind == "hybrid":
        bce = sum(p["mod.bce"].sum().item() for p in parts) / (4 * 32)
        assert row["mod_loss"] == pytest.approx(MoD.BCE_WEIGHT * bce, rel=1e-4)
    else:
        assert "mod_loss" not in row


# ---------------------------------------------------------------- statistics


def stacked(*layers):
    """What the model makes of its routers' sums: moe.NAME, a row a layer."""
    return {f"moe.{name}": torch.stack([row[name] for row in layers]) for name in layers[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_has_the_name_and_the_shape_that_was_promised(kind):
    """The trainer lays out its one collective by sum_shapes before it has seen a batch; there and back nothing is lost."""
    model, x = make(**KINDS[kind]), ids(2, 32)
    sums = model(x, x)[1]
    assert {name: tuple(t.shape) for name, t in sums.items()} == model.sum_shapes()
    assert ("moe.counts" in sums) == (kind in EXPERTS) and ("mod.counts" in sums) == (
        kind in DEPTHS
    )
    vector, shapes = flatten(sums)
    assert vector.dtype == torch.float64 and vector.dim() == 1
    back = unflatten(vector, shapes)
    assert list(back) == list(sums) and all(torch.equal(v, sums[k]) for k, v in back.items())


def test_expert_statistics_by_hand():
    sums = dict(balance=220.0, z=400.0, tokens=200.0, dropped=7.0, entropy=100.0, confidence=90.0)
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    a = sums | {"counts": torch.tensor([200.0, 100, 96, 4])}
    b = sums | {"counts": torch.tensor([100.0, 100, 100, 100])}
    moes = {0: layer(E=4), 3: layer(E=4)}
    moes[0].router.bias.copy_(torch.tensor([-0.3, 0.1, 0.1, 0.1]))
    found = expert_statistics([0, 3], expert_numbers(moes, stacked(a, b)))
    first, second = found["layers"][0], found["layers"][3]
    share = [0.5, 0.25, 0.24, 0.01]
    assert first["per_expert_utilization"] == pytest.approx(share)
    assert first["routing_entropy"] == pytest.approx(-sum(s * math.log(s) for s in share))
    assert second["routing_entropy"] == pytest.approx(math.log(4)) == second["max_entropy"]
    assert first["load_balance_loss"] == pytest.approx(1.1) and first["router_z"] == pytest.approx(
        2.0
    )
    assert (first["tokens_dropped"], first["dead"], second["dead"]) == (7, 1, 0)
    assert first["max_violation"] == pytest.approx(1.0) and second[
        "max_violation"
    ] == pytest.approx(0.0)
    assert first["bias_range"] == pytest.approx([-0.3, 0.1]) and first[
        "confidence"
    ] == pytest.approx(0.45)
    assert first["token_entropy"] == pytest.approx(0.5)
    assert (
        found["tokens_dropped"] == 14
        and found["dead"] == 1
        and found["max_violation"] == pytest.approx(1.0)
    )
    assert found["per_expert_utilization"] == pytest.approx([0.375, 0.25, 0.245, 0.13])
    assert found["routing_entropy"] == pytest.approx((first["routing_entropy"] + math.log(4)) / 2)


def test_statistics_of_dead_slots_and_nulls():
    moe = layer(E=2, n_experts_max=3, n_null_experts=1, bias_update_rate=0.1)
    row = dict.fromkeys(SUMS, torch.tensor(0.0)) | {"tokens": torch.tensor(50.0)}
    row["counts"] = torch.tensor([60.0, 20, 0, 20])
    found = expert_statistics([0], expert_numbers({0: moe}, stacked(row)), 1)
    assert (
        found["per_expert_utilization"][2] is None
        and found["layers"][0]["per_expert_utilization"][2] is None
    )
    assert found["per_expert_utilization"][:2] == pytest.approx([0.6, 0.2]) and found[
        "null_share"
    ] == pytest.approx(0.2)
    assert found["max_entropy"] == pytest.approx(math.log(3)) and found["dead"] == 0


def test_statistics_count_what_was_routed():
    model, x = make(**KINDS["fine"]), ids(2, 32)
    seen = []
    for moe in model.sparse_layers("moe").values():
        moe.router.register_forward_hook(lambda m, i, o: seen.append((i[0].detach(), o[1])))
    _, stats = model(x, x)
    routers = [moe.router for moe in model.sparse_layers("moe").values()]
    for i, ((inputs, chosen), router) in enumerate(zip(seen, routers)):
        named = {name: stats[f"moe.{name}"][i] for name in SUMS}
        assert (
            stats["moe.counts"][i].tolist()
            == torch.bincount(chosen.flatten(), minlength=8).tolist()
        )
        share = (inputs @ router.weight.t()).sigmoid()
        share = share / share.sum(-1, keepdim=True)
        assert named["tokens"] == 64 and named["dropped"] == 0
        assert named["entropy"].item() == pytest.approx(
            -(share * share.log()).sum().item(), rel=1e-4
        )
        assert named["confidence"].item() == pytest.approx(share.amax(-1).sum().item(), rel=1e-4)
    model.eval()
    assert set(model(x, x)[1]) == {"ce", "z", "count"}, "nothing is counted in evaluation"


def test_the_trainers_statistics(tiny):
    trainer = Trainer(tiny("run", KINDS["hybrid"] | {"capacity_factor": 1.0}, max_steps=3))
    assert trainer.get_expert_statistics()["refused"] == "E308", "no step yet"
    trainer.fit()
    found = trainer.get_expert_statistics()
    keys = {"per_expert_utilization", "routing_entropy", "load_balance_loss", "tokens_dropped"}
    for row in (found, *found["layers"].values()):
        assert keys <= set(row)
        assert len(row["per_expert_utilization"]) == 8 and sum(
            row["per_expert_utilization"]
        ) == pytest.approx(1)
        assert 0 < row["routing_entropy"] <= row["max_entropy"] == pytest.approx(math.log(8))
    assert list(found["layers"]) == [0, 1]
    assert found["tokens_dropped"] == sum(r["tokens_dropped"] for r in found["layers"].values()) > 0
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r][-1]
    assert row["experts/share/1"] == pytest.approx(found["layers"][1]["per_expert_utilization"])
    assert row["experts/tokens_dropped"] == found["tokens_dropped"]
    found = trainer.get_mod_statistics()
    tokens = 4 * 32  # of a step
    assert found["capacity_factor"] == 0.5 and found["per_layer_usage"] == {0: 0.5, 1: 0.5}
    assert (found["tokens_processed"], found["tokens_skipped"]) == (tokens, tokens)
    assert (found["average_depth"], found["average_depth_fraction"]) == (1.0, 0.5)
    assert len(found["position_usage"]) == 32 and np.mean(found["position_usage"]) == pytest.approx(
        0.5
    )
    assert 0 <= min(found["position_usage"]) and max(found["position_usage"]) <= 1
    dense = Transformer(config(**FINE)).flops_per_token()
    assert found["compute_savings"] == pytest.approx(1 - trainer.model.flops_per_token() / dense)
    json.dumps(found), json.dumps(trainer.get_expert_statistics())


def test_a_dense_model_refuses_with_a_code(tiny):
    trainer = finish(tiny(max_steps=1))
    calls = [
        trainer.get_expert_statistics,
        trainer.get_mod_statistics,
        lambda: trainer.add_expert(0),
    ]
    calls += [
        lambda: trainer.prune_expert(0, 1),
        lambda: trainer.restore_expert(0, 1),
        lambda: trainer.recycle_expert(1),
    ]
    for call in calls:
        answer = call()
        assert answer["refused"] == "E308" and answer["reason"]
    assert [d["action"] for d in read_lines(trainer.out / "decisions.jsonl")][
        -1
    ] == "recycle_expert"


# ---------------------------------------------------------------- Mixture of Depths


def slow(model, x, kept_of) -> torch.Tensor:
    """Logits of a model whose MoD blocks run on all tokens, attention masked to the kept keys.

    kept_of(block, score, logit) -> (kept (B, T), gate (B, T)).
    """
    cfg, (B, T) = model.cfg, x.shape
    rope, h = rope_tables(cfg, torch.arange(T)), F.embedding(x, model.embed.weight)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for block in model.blocks:
        kept, gate = torch.ones(B, T, dtype=torch.bool), torch.ones(B, T)

        def choose(x, block=block):
            score = logit = None
            if block.mod.routing == "learned":
                n = F.rms_norm(x, (x.shape[-1],), eps=cfg.norm_eps)
                score = n @ block.mod.router.weight[0]
                logit = score + n @ block.mod.predictor.weight[0] + block.mod.predictor.bias
            return kept_of(block, score, logit)

        if block.mod is not None and not cfg.mod_ffn_only:
            kept, gate = choose(h)
        a = block.attn
        q, k, v = a.wqkv(block.attn_norm(h)).split(a.sizes, dim=-1)
        q, k, v = (t.view(B, T, -1, cfg.head_dim) for t in (q, k, v))
        q, k = rotate(a.q_norm(q), rope), rotate(a.k_norm(k), rope)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) / math.sqrt(
            cfg.head_dim
        )
        mask = causal & kept[:, None, None, :]
        y = torch.where(mask, scores, -1e30).softmax(-1) @ v.repeat_interleave(2, dim=2).transpose(
            1, 2
        )
        attn = a.wo(y.transpose(1, 2).flatten(2))
        if block.mod is not None and cfg.mod_ffn_only:
            kept, gate = choose(h + attn)
        y = block.ffn(block.ffn_norm(h + attn))
        y = y[0] if isinstance(y, tuple) else y
        part = torch.where(kept, gate, 0.0)[..., None]
        h = h + (attn + part * y if cfg.mod_ffn_only else part * (attn + y))
    return F.linear(model.norm(h), model.embed.weight)


def positions(n, T) -> list[bool]:
    return [p * n // T != (p - 1) * n // T for p in range(T)]


@pytest.mark.parametrize("kind", ("mod", "mod static", "mod ffn", "hybrid", "hybrid ffn", "beside"))
@torch.no_grad()
def test_mod_equals_the_block_on_all_tokens_with_masked_attention(kind):
    """As trained: the best of a row, in order, with their own positions, attending to each other only."""
    model, x = make(**KINDS[kind]), ids(3, 32)

    def kept_of(block, score, logit):
        n = block.mod.tokens
        if block.mod.routing == "static":
            return torch.tensor(positions(n, 32)).expand(3, 32), torch.ones(3, 32)
        bar = score.sort(dim=1, descending=True).values[:, n - 1 : n]
        return score >= bar, 2 * score.sigmoid()

    assert torch.allclose(model(x), slow(model, x, kept_of), atol=2e-5)
    model.eval()
    model.causal = False
    assert torch.allclose(model(x), slow(model, x, kept_of), atol=2e-5)


@pytest.mark.parametrize("kind", DEPTHS)
@torch.no_grad()
def test_the_causal_rule_equals_the_block_on_all_tokens_with_masked_attention(kind):
    model, x = make(**KINDS[kind]).eval(), ids(3, 32)
    shares = []

    def kept_of(block, score, logit):
        mod = block.mod
        if mod.routing == "learned":
            kept = logit > 0
        elif mod.routing == "static":
            kept = torch.tensor(positions(mod.tokens, 32)).expand(3, 32)
        else:
            kept = (model_moe.hashed(torch.arange(32), mod.layer) < mod.capacity).expand(3, 32)
        shares.append(kept.float().mean().item())
        return kept, 2 * score.sigmoid() if score is not None else torch.ones(3, 32)

    assert torch.allclose(model(x), slow(model, x, kept_of), atol=2e-5)
    assert all(0.1 < s < 0.9 for s in shares)


@pytest.mark.parametrize("kind", DEPTHS)
def test_only_the_chosen_tokens_are_computed(kind):
    model, x = make(**KINDS[kind]), ids(3, 32)
    rows = {"attn": [], "ffn": []}
    for i in model.sparse_layers("mod"):
        for name in rows:
            part = getattr(model.blocks[i], name)
            part.register_forward_hook(
                lambda m, i, o, name=name: rows[name].append(tuple(i[0].shape))
            )
    total, stats = model(x, x)
    want = [(3, m.tokens, 32) for m in model.sparse_layers("mod").values()]
    assert rows["ffn"] == want
    assert rows["attn"] == ([(3, 32, 32)] * len(want) if "ffn" in kind else want)
    for kept, tokens, (_, n, _) in zip(stats["mod.counts"], stats["mod.tokens"], want):
        assert kept.sum() == 3 * n and tokens == 96 and kept.max() <= 3
    if "moe.tokens" in stats and kind != "beside":
        assert (stats["moe.tokens"] == 3 * want[0][1]).all(), "experts inside see these tokens only"
    total.backward()


@pytest.mark.parametrize(
    "changes", [{}, dict(mod_routing="static"), dict(mod_ffn_only=True), dict(mod_every=2)], ids=str
)
def test_flops_fall_as_predicted(changes):
    def measured(model):
        x, extra = (
            ids(2, 32),
            {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * math.prod(a) * b[1]},
        )
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=extra) as counter,
        ):
            model(x, x)[0].backward()
        return counter.get_total_flops() / 64

    dense, mod = make(), make(mod_capacity=0.25, **changes)
    assert measured(mod) == pytest.approx(mod.flops_per_token(), rel=0.02)
    saved = 1 - measured(mod) / measured(dense)
    assert saved == pytest.approx(1 - mod.flops_per_token() / dense.flops_per_token(), rel=0.02)
    assert saved > 0.15


def test_parameters_and_flops_of_experts():
    cfg = config(**FINE)
    model, dense = Transformer(cfg), Transformer(config(n_experts=0))
    each, n = 3 * 32 * 16, model.n_params()
    assert n["total"] == sum(p.numel() for p in model.parameters())
    assert n["total"] - n["active"] == 2 * 6 * each
    ffn = 6 * 2 * (3 * 32 * 48)
    assert model.flops_per_token() == dense.flops_per_token() - ffn + 6 * 2 * (
        2 * each + each + 8 * 32
    )
    null = Transformer(config(**FINE | dict(n_null_experts=8)))
    assert (
        null.experts_used() == 1.0
        and null.n_params()["total"] - null.n_params()["active"] == 2 * 7 * each
    )


@pytest.mark.parametrize("kind", ("mod", "mod static", "mod random", "mod ffn", "hybrid"))
@torch.no_grad()
def test_full_capacity_and_a_gate_of_one_is_the_dense_block(kind):
    model = make(**KINDS[kind] | {"mod_anneal_steps": 80})
    model.set_step(0)
    dense = Transformer(config(**{k: v for k, v in KINDS[kind].items() if not k.startswith("mod")}))
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".mod." not in k})
    for mod in model.sparse_layers("mod").values():
        assert mod.tokens == 32 and mod.capacity == 1.0
        if mod.routing == "learned":
            mod.router.weight.zero_()
    x = ids(2, 32)
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_capacity_is_annealed_in_eight_equal_steps():
    model = make(mod_capacity=[0.25, 0.5], mod_anneal_steps=80)
    first, second = model.sparse_layers("mod").values()
    seen = []
    for step in range(100):
        model.set_step(step)
        assert second.capacity == pytest.approx(1 - (1 - first.capacity) * 2 / 3)
        assert first.tokens == math.ceil(32 * first.capacity - 1e-9)
        seen.append(first.capacity)
    assert sorted({round(c, 6) for c in seen}, reverse=True) == [
        round(1 - 0.75 * i / 8, 6) for i in range(9)
    ]
    assert [seen.index(c) for c in dict.fromkeys(seen)] == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert first.tokens == 8 and make(mod_capacity=0.25).blocks[0].mod.tokens == 8
    model.set_step(0)
    assert first.tokens == 32, "a function of the step alone"


def test_a_run_anneals(tiny):
    trainer = finish(tiny("run", dict(mod_capacity=0.25, mod_anneal_steps=8), max_steps=10))
    rows = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r]
    want = [1 - 0.75 * min(8, s) / 8 for s in range(10)]
    assert [r["depth/capacity_factor"] for r in rows] == pytest.approx(want)
    assert [r["depth/usage/0"] for r in rows] == pytest.approx(
        [math.ceil(32 * c) / 32 for c in want]
    )


def test_statistics_while_annealing_say_what_is_saved_now(tiny):
    trainer = finish(tiny("run", dict(mod_capacity=0.25, mod_anneal_steps=1000), max_steps=2))
    found = trainer.get_mod_statistics()
    assert found["capacity_factor"] == 1.0 and -0.01 < found["compute_savings"] <= 0


@torch.no_grad()
def test_static_and_random_positions():
    for capacity, T in ((0.25, 32), (0.375, 32), (0.5, 19), (0.7, 32)):
        model = make(mod_capacity=capacity, mod_routing="static")
        mod, seen = model.blocks[0].mod, []
        model.blocks[0].ffn.register_forward_hook(
            lambda m, i, o, seen=seen: seen.append(i[0].shape[1])
        )
        x = ids(2, T)
        trained = model(x)
        kept = positions(mod.tokens, 32)[:T]
        assert seen == [sum(kept)] and kept[0]
        gaps = np.diff(np.flatnonzero(kept))
        assert gaps.max() - gaps.min() <= 1, "evenly spaced"
        assert torch.allclose(model.eval()(x), trained, atol=1e-5), (
            "one rule in training and out of it"
        )
    share = (model_moe.hashed(torch.arange(4096), 3) < 0.3).float()
    assert abs(share.mean() - 0.3) < 0.03
    assert share.view(-1, 16).mean(1).std() < 0.2 and not torch.equal(
        share, (model_moe.hashed(torch.arange(4096), 4) < 0.3).float()
    )
    model, x = make(mod_capacity=0.5, mod_routing="random"), ids(4, 32)
    torch.manual_seed(0)
    a, b = model(x), model(x)
    torch.manual_seed(0)
    assert torch.equal(a, model(x)) and not torch.allclose(a, b), (
        "drawn anew each time in training, from the seed"
    )
    _, stats = model(x.repeat(64, 1), x.repeat(64, 1))
    assert (stats["mod.counts"] / 256 - 0.5).abs().max() < 0.15, "no position is preferred"
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(kind):
    """In evaluation, as text is made. LuminaAI's MoD moves earlier logits by 1.8e-3."""
    model, x = make(**KINDS[kind]).eval(), ids(4, 32)
    if kind == "mixtral":
        for moe in model.sparse_layers("moe").values():
            moe.router.capacity_factor = 0.5  # must not be active here
    want = model(x)
    for cut in (1, 7, 16, 31):
        other = x.clone()
        other[:, cut:] = ids(4, 32 - cut, seed=cut)
        assert torch.allclose(model(other)[:, :cut], want[:, :cut], atol=1e-5), (
            f"the tokens from {cut} on"
        )
        assert torch.allclose(model(x[:, :cut]), want[:, :cut], atol=1e-5), f"a prefix of {cut}"


@pytest.mark.parametrize("kind", ("mod", "hybrid"))
@torch.no_grad()
def test_the_training_rule_looks_ahead_and_is_another_number(kind):
    """Which is why both are reported, and why the causal rule's is val_loss."""
    model, x = make(**KINDS[kind]).eval(), ids(4, 32)
    causal = model(x, x)[0]
    model.causal = False
    trained, want, other = model(x, x)[0], model(x), x.clone()
    assert abs(trained - causal) > 1e-3 * causal
    other[:, 16:] = ids(4, 16, seed=9)
    assert (model(other)[:, :16] - want[:, :16]).abs().max() > 1e-3


def decode(model, x, lengths, chunk=1):
    """Logits (B, T, V) by way of the cache: ragged prompts at once, padded on the right, then `chunk` tokens a time."""
    B, T = x.shape
    cache, out = KVCache(model.cfg, B, T), torch.full((B, T, 97), math.nan)
    idx = torch.full((B, max(lengths)), -1)
    for row, n in enumerate(lengths):
        idx[row, :n] = x[row, :n]
    logits, at = model(idx, cache=cache), list(lengths)
    while True:
        for row in range(B):
            if idx[row, 0] >= 0:
                out[row, at[row] - 1] = logits[row]
        if all(n == T for n in at):
            return out
        idx = torch.full((B, chunk), -1)
        for row in range(B):
            n = min(chunk, T - at[row])
            idx[row, :n] = x[row, at[row] : at[row] + n]
            at[row] += n
        logits = model(idx, cache=cache)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_equals_the_causal_forward(kind):
    """Ragged rows, right padding, one token at a time and three; also where few tokens or none are kept."""
    model, x = make(**KINDS[kind]).eval(), ids(4, 24)
    learned = [m for m in model.sparse_layers("mod").values() if m.routing == "learned"]
    for bias, chunk in ((0.0, 1), (0.0, 3)) + (((-3.0, 1), (-100.0, 1)) if learned else ()):
        for mod in learned:
            mod.predictor.bias.fill_(bias)
        want, got = model(x), decode(model, x, [5, 1, 11, 8], chunk)
        seen = got.isfinite().all(-1)
        assert seen.sum() >= 20 and torch.allclose(got[seen], want[seen], atol=2e-5)
    if "mod" in kind:
        kept = model(x, x)[1]["depth"][:, 0]
        assert (kept == 0).all() if learned else (kept > 0).all()


@torch.no_grad()
def test_a_layer_that_keeps_nothing_passes_everything():
    model, x = make(mod_capacity=0.5).eval(), ids(2, 16)
    for mod in model.sparse_layers("mod").values():
        mod.predictor.bias.fill_(-100.0)
    assert torch.equal(model(x), F.linear(model.norm(model.embed(x)), model.embed.weight))


def test_the_predictor_learns_the_rule():
    model = make(mod_capacity=0.5, dropout=0.0)
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if "predictor" in n], lr=0.03
    )
    seen = []
    for step in range(60):
        x = ids(8, 32, seed=step)
        total, stats = model(x, x)
        tokens = stats["mod.tokens"].sum()
        seen.append([(stats[name].sum() / tokens).item() for name in ("mod.bce", "mod.agree")])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert np.mean(seen[-5:], 0)[0] < 0.5 * seen[0][0], "cross-entropy"
    assert np.mean(seen[-5:], 0)[1] > max(0.85, seen[0][1] + 0.1), "agreement"


@pytest.mark.parametrize("kind", ("mod", "mod ffn", "hybrid"))
def test_the_predictor_does_not_touch_the_language_model(kind, monkeypatch):
    model, x, y = make(**KINDS[kind]), ids(2, 32), ids(2, 32, seed=1)
    with_it = gradients(model, x, y)
    monkeypatch.setattr(MoD, "BCE_WEIGHT", 1e-30)
    got = gradients(model, x, y)
    for name in with_it:
        if "predictor" in name:
            assert with_it[name].norm() > 1e-4 > got[name].norm()
        else:
            assert torch.equal(with_it[name], got[name]), name


def test_the_mod_router_learns_from_the_language_model():
    model = make(mod_capacity=0.5)
    got = gradients(model, ids(2, 32), ids(2, 32, seed=1))
    assert all(got[f"blocks.{i}.mod.router.weight"].norm() > 1e-4 for i in (0, 1))


@pytest.mark.parametrize("kind", ("mod", "mod random", "beside"))
def test_evaluation_reports_both_rules(tiny, kind):
    trainer = finish(tiny("run", KINDS[kind], max_steps=6, learning_rate=1e-2))
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "val_loss" in r][-1]
    assert row["mod_gap"] == pytest.approx(row["val_loss"] - row["val_loss_as_trained"])
    model, sums = trainer.model.eval(), {}
    windows = torch.tensor(
        np.stack([trainer.val_sources[n].window(i) for n, i in trainer.val_set])
    ).long()
    with torch.no_grad():
        for causal in (True, False):
            model.causal = causal
            logits = model(windows[:, :-1])
            sums[causal] = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        model.causal = True
        depth = model(windows[:, :-1], targets=windows[:, 1:])[1]["depth"] / windows[:, 1:].numel()
    assert row["val_loss"] == pytest.approx(sums[True], abs=1e-5)
    assert row["val_loss_as_trained"] == pytest.approx(sums[False], abs=1e-5)
    assert row["mod_depth"] == pytest.approx((2 - (1 - depth[:, 0]).sum()).item(), abs=1e-5)
    assert row["mod_agreement"] == pytest.approx(depth[:, 1].mean().item(), abs=1e-5)
    assert (row["mod_gap"] != 0) == (kind != "mod random") and (row["mod_agreement"] == 1) == (
        kind == "mod random"
    )


# ---------------------------------------------------------------- null experts


def test_the_bias_holds_the_share_of_null_experts():
    moe, good, shares = layer(E=6, n_null_experts=2, bias_update_rate=0.01), torch.tensor(False), []
    for step in range(240):
        counts = moe.router(normal(512, 32, seed=step))[3]["counts"]
        shares.append((counts[6:].sum() / counts.sum()).item())
        update_balance([moe], [counts], good)
    assert np.mean(shares[-60:]) == pytest.approx(2 / 8, abs=0.015)
    moe.router.weight.data[6:] *= 3  # wherever the router drifts
    for step in range(240):
        counts = moe.router(normal(512, 32, seed=step) + 0.2)[3]["counts"]
        shares.append((counts[6:].sum() / counts.sum()).item())
        update_balance([moe], [counts], good)
    assert np.mean(shares[-60:]) == pytest.approx(2 / 8, abs=0.02)


def test_null_choices_contribute_exactly_nothing():
    moe, x = layer(E=4, K=2, n_null_experts=2, bias_update_rate=0.1, **NO_LOSSES), normal(20, 32)
    moe.router.bias[4:] = 10.0
    x.requires_grad_()
    y, stats = moe(x)
    assert (y == 0).all() and stats["moe.counts"].tolist() == [0, 0, 0, 0, 20, 20]
    y.sum().backward()
    assert (
        (x.grad == 0).all()
        and (moe.experts.w2.grad == 0).all()
        and moe.router.weight.grad is not None
    )
    moe.router.bias[4] = -10.0  # now one null and one expert: half of the depth, its gate as chosen
    y, stats = moe(x.detach())
    want, _, _ = by_hand(moe, x.detach())
    assert torch.allclose(y.double(), want, atol=1e-5) and stats["moe.counts"][5] == 20
    assert (y != 0).any(1).all()


# ---------------------------------------------------------------- slots and surgery


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
        assert add_expert(moe, torch.optim.AdamW(moe.parameters()), 0) == (hottest, E)
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


def surgery_layer(E=4, K=2, spare=2, **changes):
    moe = layer(E=E, K=K, n_experts_max=E + spare, **changes)
    cfg = Config(data_dir="x")
    holder = torch.nn.Module()
    holder.ffn = moe
    optimizer = build_optimizer(cfg, dict(holder.named_parameters()))
    for p in moe.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name].copy_(normal(*p.shape, seed=len(name)).abs())
    return moe, optimizer


def test_a_split_of_the_optimizers_state():
    moe, optimizer = surgery_layer(router="sigmoid", bias_update_rate=0.1)
    params = (moe.router.weight, moe.experts.w13, moe.experts.w2)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    weights = [p.detach().clone() for p in params]
    moe.router.bias[2], moe.router.load[2] = 0.25, 0.4
    assert add_expert(moe, optimizer, 7, parent=2) == (2, 4)
    for p, was, w in zip(params, before, weights):
        state = optimizer.state[p]
        assert (state["exp_avg"][4] == 0).all(), "the child has no momentum"
        assert torch.equal(state["exp_avg_sq"][4], was["exp_avg_sq"][2])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][[0, 1, 2, 3, 5]], was[key][[0, 1, 2, 3, 5]]), (
                "and the others keep theirs"
            )
        assert torch.equal(state["step"], was["step"])
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
    refused(lambda: add_expert(moe, optimizer, 0, parent=3), "expert 3 is not alive")
    refused(lambda: restore_expert(moe, 0, 1), "expert 1")
    (
        refused(lambda: restore_expert(moe, 0, 3), "expert 3"),
        refused(lambda: restore_expert(moe, 0, 9), "expert 9"),
    )
    refused(lambda: recycle_expert(moe, optimizer, 0), "expert 2 carries")
    prune_expert(moe, 10, 2, force=True)
    refused(lambda: prune_expert(moe, 10, 1, force=True), "expert 1 is needed", "2")
    restore_expert(moe, 10, 2)
    assert add_expert(moe, optimizer, 10) == (0, 3)
    refused(lambda: add_expert(moe, optimizer, 10), "no free slot of 4", "model.n_experts_max: 5")
    refused(lambda: recycle_expert(moe, optimizer, 10, 0), "carries")
    prune_expert(moe, 11, 1, force=True)  # 0, 2, 3 are left, of which 0 and 3 are one choice
    refused(lambda: prune_expert(moe, 11, 2, force=True), "expert 2 is needed")
    refused(lambda: add_expert(moe, optimizer, 12), "free at step 211", "model.n_experts_max: 5")
    fixed = layer()
    with pytest.raises(ValueError, match="model.n_experts_max: 9"):
        add_expert(fixed, optimizer, 0)


@torch.no_grad()
def test_prune_and_restore_give_back_the_same_bits():
    moe, optimizer = surgery_layer(spare=3)
    x = normal(200, 32)
    before = moe(x)[0]
    prune_expert(moe, 100, 3, force=True)
    assert not torch.equal(moe(x)[0], before) and not (choices(moe, x) == 3).any()
    assert moe.router.load[3] == 0 and moe.router.load.sum() == pytest.approx(1)
    assert add_expert(moe, optimizer, 100 + WINDOW - 1, parent=0)[1] == 4, (
        "its slot is not given away"
    )
    with pytest.raises(ValueError):
        restore_expert(moe, 100 + WINDOW, 3)
    moe, optimizer = surgery_layer(spare=3)
    prune_expert(moe, 100, 3, force=True)
    restore_expert(moe, 100 + WINDOW - 1, 3)
    assert torch.equal(moe(x)[0], before)
    prune_expert(moe, 300, 3, force=True)
    assert add_expert(moe, optimizer, 300 + WINDOW, parent=0)[1] == 3, (
        "after it the slot is free again"
    )


@torch.no_grad()
def test_a_restored_twin_is_a_twin_again():
    """Without the exclusion both would take the same tokens: the output would move by a third."""
    for which in (0, 4):
        moe, optimizer = surgery_layer()
        x = normal(200, 32)
        assert add_expert(moe, optimizer, 5, parent=0) == (0, 4)
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
    prune_expert(moe, 0, 1, True, optimizer)
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
    assert recycle_expert(moe, optimizer, 50) == (0, 2)
    assert torch.equal(moe.experts.w13[2], w13[0]) and moe.router.alive.all()
    assert moe.router.sibling.tolist() == [2, 1, 0, 3] and moe.router.retired.tolist() == [-1] * 4
    assert (optimizer.state[moe.experts.w2]["exp_avg"][2] == 0).all()
    moe.router.load.copy_(torch.tensor([0.4, 0.2, 0.4, 0.0]))
    assert recycle_expert(moe, optimizer, 51) == (1, 3), "0 and 2 have not parted"
    moe.router.load.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="twin"):
        recycle_expert(moe, optimizer, 52)


@torch.no_grad()
def test_twins_are_released_when_their_weights_have_parted():
    moe, optimizer = surgery_layer()
    add_expert(moe, optimizer, 0, parent=1)
    assert release_siblings(moe) == []
    x = normal(300, 32)
    assert not ((choices(moe, x) == 1).any(1) & (choices(moe, x) == 4).any(1)).any(), "never both"
    moe.experts.w13[4] += (
        0.1 * moe.experts.w13[4].norm() / math.sqrt(32 * 32) * normal(32, 32, seed=9)
    )
    assert release_siblings(moe) == []
    moe.experts.w13[4] += (
        0.4 * moe.experts.w13[4].norm() / math.sqrt(32 * 32) * normal(32, 32, seed=8)
    )
    assert release_siblings(moe) == [(1, 4)] and moe.router.sibling.tolist() == list(range(6))
    assert ((choices(moe, x) == 1).any(1) & (choices(moe, x) == 4).any(1)).any()
    assert release_siblings(moe) == []


def test_no_recompilation_after_surgery():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = make(**KINDS["slots"])
    block, x, rope = model.blocks[0], normal(2, 32, 32), rope_tables(model.cfg, torch.arange(32))
    optimizer = build_optimizer(Config(data_dir="x"), dict(model.named_parameters()))
    run = torch.compile(block, backend=counter, fullgraph=True)
    run(x, rope)[0].sum().backward()
    graphs = counter.frame_count
    assert graphs >= 1
    changes = (
        lambda: add_expert(block.ffn, optimizer, 0),
        lambda: prune_expert(block.ffn, 1, 2, force=True),
        lambda: restore_expert(block.ffn, 2, 2),
        lambda: add_expert(block.ffn, optimizer, 3),
        lambda: update_balance([block.ffn], [torch.arange(6.0)], torch.tensor(False)),
    )
    for change in changes:
        change()
        got, want = run(x, rope), block(x, rope)
        assert torch.allclose(got[0], want[0], atol=1e-6) and all(
            torch.equal(got[1][name], want[1][name]) for name in want[1] if name != "loss"
        )
        got[0].sum().backward()
    assert counter.frame_count == graphs


def test_more_slots_for_a_run_that_goes_on(tiny):
    """init_from with a larger n_experts_max: the same experts, the same null experts, the same text."""
    for i, (kind, slots) in enumerate((("slots", 6), ("null", 6), ("null", 0))):
        model = KINDS[kind] | {"n_experts_max": slots}
        first = finish(tiny(f"a{i}", model, max_steps=3))
        moved = model | {"n_experts_max": 9}
        second = Trainer(tiny(f"b{i}", moved, max_steps=3, init_from=str(first.out)))
        x = ids(2, 32)
        with torch.no_grad():
            assert torch.allclose(second.model.eval()(x), first.model.eval()(x), atol=1e-6), (
                kind,
                slots,
            )
        assert (second.model.blocks[0].ffn.router.retired == -1).all(), "steps of another run"
        assert "refused" not in second.add_expert(0)
        second.close()


def test_how_often_is_logged_changes_nothing(tiny):
    """Twins are released while training, at steps that have nothing to do with what is printed."""
    found = []
    for every in (1, 4):
        keys = tiny(
            f"l{every}", KINDS["slots"], max_steps=8, log_interval=every, learning_rate=1e-2
        )
        found.append(finish(keys, before={1: lambda t: t.add_expert(0)}).tensors())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


SURGERY = """
import hashlib, json, os, sys
import torch
import torch.distributed as dist
from conftest import ROOT
from train import Parallel, Trainer

class Kept(Parallel):
    def close(self):  # the process group serves the next run too
        dist.barrier()

torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    trainer = Trainer(job["config"], Kept)
    following, due = trainer.loader.next, {int(k): v for k, v in job.get("surgery", {}).items()}

    def next_rows(trainer=trainer, following=following, due=due, job=job):
        for name, *args in due.pop(trainer.step, []):
            getattr(trainer, name)(*args)
        if job.get("stop_at") == trainer.step:
            trainer.stop_signal = 1
        return following()

    trainer.loader.next = next_rows
    assert trainer.fit() == 0
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.tensors().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    found = trainer.parallel.gather((digest.hexdigest(), trainer.get_expert_statistics()))
    if trainer.parallel.rank == 0:
        print("RANKS", json.dumps({"run": str(trainer.out), "same": found[0] == found[-1], "digest": found[0][0]}))
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_two_ranks_do_what_one_does(tiny, tmp_path):
    """Experts inside MoD split, pruned and restored mid-run: equal bits on both ranks, the losses of one process (4
    micro-steps against 2 x 2), and a run resumed after a split is the run never stopped, bit for bit."""
    model = (
        KINDS["slots"] | SPLIT | {"bias_update_rate": 0.01, "mod_capacity": 0.5, "mod_layers": [1]}
    )
    plan = {
        2: [["add_expert", 0], ["add_expert", 1, 2]],
        4: [["prune_expert", 0, 1, True], ["recycle_expert", 1]],
    }
    plan[5] = [["add_expert", 0, 3], ["restore_expert", 0, 1]]
    one = tiny("one", model, max_steps=7, batch_size=1, gradient_accumulation_steps=4)
    many, parts = (
        tiny(n, model, max_steps=7, batch_size=1, gradient_accumulation_steps=2)
        for n in ("many", "parts")
    )

    def act(trainer):
        for name, *args in plan[trainer.step]:
            getattr(trainer, name)(*args)

    single = finish(one, before={step: act for step in plan})
    jobs = [{"config": many, "surgery": plan}, {"config": parts, "surgery": plan, "stop_at": 3}]
    jobs += [{"config": parts, "surgery": {4: plan[4], 5: plan[5]}}]
    (tmp_path / "surgery.py").write_text(SURGERY)
    result = run_python(
        tmp_path / "surgery.py", json.dumps(jobs), ranks=2, PYTHONPATH=f"{ROOT}:{ROOT}/tests"
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    said = [
        json.loads(line.split("RANKS ")[1])
        for line in result.stdout.splitlines()
        if "RANKS " in line
    ]
    assert [s["same"] for s in said] == [True] * 3, "bits and statistics of the ranks"
    assert said[0]["digest"] == said[2]["digest"] != said[1]["digest"], (
        "resumed equals uninterrupted"
    )
    a, b = losses(one["out_dir"]), losses(many["out_dir"])
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-5
    decisions = [read_lines(f"{k['out_dir']}/decisions.jsonl") for k in (one, many)]
    decisions = [
        [{k: v for k, v in row.items() if k not in ("time", "ranks")} for row in rows]
        for rows in decisions
    ]
    assert decisions[0] == decisions[1] and len(decisions[0]) == 6
    assert [d.get("expert") for d in decisions[0][:2]] == [4, 4] and decisions[0][1]["parent"] == 2
    assert "refused" not in decisions[0][0] and single.model.blocks[0].ffn.router.alive.sum() == 6


@pytest.mark.parametrize("kind", ("slots", "hybrid"))
def test_resume_is_exact(tiny, kind):
    """One process: buffers (bias, loads, slots) come back, dropout of experts and jitter need no state."""
    model = KINDS[kind] | {
        "expert_dropout": 0.2,
        "router_jitter": 0.1,
        "bias_update_rate": 0.01,
        "mod_anneal_steps": 6,
    }
    changes = {2: lambda t: t.add_expert(0)} if kind == "slots" else {}
    whole = finish(tiny("whole", model, max_steps=6), before=changes)

    def stop(trainer):
        trainer.stop_signal = 1

    assert finish(tiny("parts", model, max_steps=6), before=changes | {3: stop}).step < 6
    parts = finish(tiny("parts", model, max_steps=6))
    a, b = whole.tensors(), parts.tensors()
    assert parts.step == 6 and all(torch.equal(a[k], b[k]) for k in a)
    if kind == "slots":
        assert (
            "model.blocks.0.ffn.router.alive" in a
            and parts.model.blocks[0].ffn.router.alive.sum() == 5
        )


# ---------------------------------------------------------------- refusals

REFUSALS = [
    (
        dict(n_experts=4, n_experts_per_token=5),
        "model.n_experts_per_token",
        ("5", "from 1 to", "4"),
    ),
    (
        dict(n_experts=4, n_experts_per_token=0),
        "model.n_experts_per_token",
        ("0", "from 1 to", "4"),
    ),
    (
        dict(n_experts=4, n_experts_per_token=1, norm_topk=True),
        "model.norm_topk",
        ("true", "1", "norm_topk: false"),
    ),
    (dict(n_experts=4, d_model=36, head_dim=8), "model.d_model", ("36", "multiple of 8", "32")),
    (dict(n_experts=4, d_expert=20), "model.d_expert", ("20", "multiple of 8", "16")),
    (
        dict(n_experts=4, n_experts_max=6, norm_topk=False),
        "model.n_experts_max",
        ("raw", "norm_topk: true", "sigmoid"),
    ),
    (dict(n_experts=4, n_experts_max=3), "model.n_experts_max", ("3", "4", "5")),
    (
        dict(n_experts=4, capacity_factor=0.2),
        "model.capacity_factor",
        ("0.2", "1 / n_experts", "1.25"),
    ),
    (
        dict(n_experts=4, n_null_experts=2, bias_update_rate=0.0),
        "model.n_null_experts",
        ("bias_update_rate: 1e-3",),
    ),
    (dict(n_null_experts=2), "model.n_null_experts", ("n_experts",)),
    (dict(n_experts=4, router="hash"), "model.router", ("'hash'", "softmax", "sigmoid")),
    (dict(n_experts=4, routing_temperature=0.0), "model.routing_temperature", ("0.0", "above 0")),
    (dict(n_experts=4, router_jitter=1.0), "model.router_jitter", ("1.0", "[0, 1)")),
    (dict(n_experts=4, expert_dropout=1.0), "model.expert_dropout", ("1.0", "[0, 1)")),
    (dict(n_experts=4, moe_layers=[0, 2]), "model.moe_layers", ("[0, 2]", "0 to 1")),
    (dict(n_experts=4, moe_layers=[-1]), "model.moe_layers", ("[-1]", "0 to 1")),
    (dict(n_experts=4, moe_layers=[1, 1]), "model.moe_layers", ("[1, 1]", "different")),
    (dict(n_experts=4, moe_layers=[1], moe_every=2), "model.moe_layers", ("moe_every", "drop one")),
    (dict(moe_layers=[1]), "model.moe_layers", ("n_experts",)),
    (dict(n_experts=4, moe_every=0), "model.moe_every", ("0", "at least 1")),
    (dict(n_experts=4, n_dense_layers=3), "model.n_dense_layers", ("3", "n_layers 2")),
    (dict(mod_capacity=0.0), "model.mod_capacity", ("0.0", "(0, 1]", "0.5")),
    (dict(mod_capacity=1.5), "model.mod_capacity", ("1.5", "(0, 1]")),
    (dict(mod_capacity=0.01), "model.mod_capacity", ("0.01", "32", "less than one", "0.0312")),
    (dict(mod_capacity=[0.5]), "model.mod_capacity", ("2 numbers", "not 1")),
    (dict(mod_capacity=[0.5, 0.0]), "model.mod_capacity", ("0.0", "(0, 1]")),
    (dict(mod_capacity=[0.5, "x"]), "model.mod_capacity", ("'x'", "(0, 1]")),
    (dict(mod_capacity=[0.5, 1.0], mod_every=2), "model.mod_capacity", ("drop",)),
    (dict(mod_capacity=[0.5, 1.0], mod_end_layer=0), "model.mod_capacity", ("drop",)),
    (dict(mod_layers=[1]), "model.mod_layers", ("mod_capacity", "0.5")),
    (dict(n_experts=2, expert_dropout=0.5), "model.expert_dropout", ("0.5", "2")),
    (dict(mod_capacity=0.5, mod_layers=[2]), "model.mod_layers", ("[2]", "0 to 1")),
    (
        dict(mod_capacity=0.5, mod_layers=[1], mod_every=2),
        "model.mod_layers",
        ("mod_every", "drop one"),
    ),
    (dict(mod_capacity=0.5, mod_end_layer=2), "model.mod_end_layer", ("2", "0 to 1")),
    (dict(mod_capacity=0.5, mod_start_layer=2), "model.mod_start_layer", ("2", "0 to 1")),
    (
        dict(mod_capacity=0.5, mod_routing="best"),
        "model.mod_routing",
        ("'best'", "learned", "static", "random"),
    ),
    (dict(mod_capacity=0.5, mod_anneal_steps=-1), "model.mod_anneal_steps", ("-1", "0 or more")),
    # asked for, and no layer would have it: LuminaAI's hybrid pattern trains without a word
    (dict(n_experts=4, moe_every=3), "model.moe_every", ("3",)),
    (dict(n_experts=4, n_dense_layers=2), "model.n_dense_layers", ("2",)),
    (dict(n_experts=4, moe_layers=[]), "model.moe_layers", ("[]",)),
    (dict(mod_capacity=0.5, mod_every=3), "model.mod_every", ("3",)),
    (dict(mod_capacity=0.5, mod_layers=[]), "model.mod_layers", ("[]",)),
    (
        dict(mod_capacity=0.5, mod_layers=[0], mod_end_layer=1),
        "model.mod_layers",
        ("mod_end_layer",),
    ),
]


@pytest.mark.parametrize(
    ("change", "key", "words"), REFUSALS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_refusals_name_key_value_and_remedy(change, key, words, tmp_path, shards):
    with pytest.raises(ValueError) as error:
        config(**change)
    text = str(error.value)
    assert text.startswith(key), text
    for word in words:
        assert word in text, text
    path = write_yaml(tmp_path / "c.yaml", {"data_dir": shards, "model": SMALL | change})
    with pytest.raises(UserError) as error:
        read_config([str(path)])
    assert error.value.code == "E002" and key in error.value.text


def test_refusals_of_the_model_name_file_and_line(tmp_path, shards):
    path = tmp_path / "c.yaml"
    path.write_text(f"data_dir: {shards}\nmodel:\n  n_experts: 4\n  n_experts_per_token: 9\n")
    with pytest.raises(UserError) as error:
        read_config([str(path)])
    assert error.value.code == "E002" and f"{path}:4" in error.value.text, error.value.text
    path.write_text(f"data_dir: {shards}\nmodel:\n  n_experts: 4\n")
    with pytest.raises(UserError) as error:
        read_config([str(path), "--model.mod_capacity", "3"])
    assert "command line" in error.value.text, error.value.text


def test_defaults_by_router():
    soft, sigmoid = config(n_experts=4), config(n_experts=4, router="sigmoid")
    assert (soft.aux_loss_weight, soft.router_z_loss_weight, soft.bias_update_rate) == (
        1e-2,
        1e-3,
        0.0,
    )
    assert (sigmoid.aux_loss_weight, sigmoid.router_z_loss_weight, sigmoid.bias_update_rate) == (
        1e-4,
        0.0,
        1e-3,
    )
    assert config(n_experts=4, n_null_experts=1).bias_update_rate == 1e-3
    assert soft.norm_topk and not config(n_experts=4, n_experts_per_token=1).norm_topk


# ---------------------------------------------------------------- gradients, recomputation, compilation


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    """Also an expert without a token: None on one rank would hang, or misalign, the reduction (Lunaris' DDP)."""
    model = make(**KINDS[kind])
    for moe in model.sparse_layers("moe").values():
        with torch.no_grad():
            moe.router.weight[1:] -= moe.router.weight[0]  # hardly anyone gets a token
            moe.router.bias[0] = 50.0
    got = gradients(model, ids(1, 4), ids(1, 4))
    assert set(got) == {n for n, _ in model.named_parameters()}
    assert all(g.isfinite().all() for g in got.values())
    for i, moe in model.sparse_layers("moe").items():
        idle = torch.bincount(torch.zeros(1, dtype=torch.long), minlength=moe.router.slots) == 0
        assert (
            idle.any() and (got[f"blocks.{i}.ffn.experts.w2"].flatten(1).abs().amax(1) == 0).any()
        )


RANDOM = {
    "jitter": KINDS["fine"] | {"router_jitter": 0.2},
    "experts dropped_out": KINDS["mixtral"] | {"expert_dropout": 0.4},
    "capacity": KINDS["mixtral"] | {"capacity_factor": 1.0},
}


@pytest.mark.parametrize("kind", [*KINDS, *RANDOM])
def test_recomputation_gives_the_same_gradients(kind):
    model, x, y = make(**(KINDS | RANDOM)[kind]), ids(2, 32), ids(2, 32, seed=1)
    if kind == "experts dropped_out":
        draw_dropout(list(model.sparse_layers("moe").values()), 3)
    kept = gradients(model, x, y)
    torch.manual_seed(0)
    stats = model(x, y)[1]
    model.recompute = "block"
    again = gradients(model, x, y)
    torch.manual_seed(0)
    total, other = model(x, y)
    total.backward()
    assert all(torch.allclose(kept[n], again[n], atol=1e-6) for n in kept)
    assert all(torch.equal(stats[k], other[k]) for k in stats), "and nothing is counted twice"


GRAPHS = {
    "switch": KINDS["switch"] | {"capacity_factor": 1.0, "router_jitter": 0.1},
    "fine": KINDS["fine"] | {"expert_dropout": 0.4},
    "null": KINDS["null"] | {"n_experts_max": 6},
    "mod random": KINDS["mod random"],
    "hybrid": KINDS["hybrid"],
    "hybrid ffn": KINDS["hybrid ffn"] | {"mod_routing": "static"},
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(k, "eager") for k in GRAPHS]
    + [pytest.param("hybrid", "aot_eager", marks=pytest.mark.nightly)],
)
def test_a_block_is_one_graph_in_training(kind, backend):
    torch._dynamo.reset()
    model = make(**GRAPHS[kind])
    if kind == "fine":
        draw_dropout(list(model.sparse_layers("moe").values()), 3)
    block, x, rope, found = (
        model.blocks[0],
        normal(2, 32, 32),
        rope_tables(model.cfg, torch.arange(32)),
        [],
    )
    for run in (block, torch.compile(block, backend=backend, fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(0)
        y, stats = run(x, rope)
        (y.square().sum() + stats.get("loss", 0.0)).backward()
        found.append((y.detach(), {n: p.grad.clone() for n, p in block.named_parameters()}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(g, found[1][1][n], atol=1e-4) for n, g in found[0][1].items())
