"""Experts and their router against the formula written out, balance, statistics, gradients,
compilation."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from sparse_models import DEPTHS, KINDS, choices, config, gradients, ids, layer, make, normal

from lumen.config import Config
from lumen.experts import (
    add_expert,
    draw_dropout,
    expert_numbers,
    expert_statistics,
    recycle_expert,
    update_balance,
)
from lumen.optim import build_optimizer
from lumen.sums import flatten, sum_shapes, unflatten
from model import AttentionInputs, Transformer, rope_tables
from model_moe import SUMS
from train import Parallel

NO_LOSSES = dict(aux_loss_weight=0.0, router_z_loss_weight=0.0)
ROWS = Parallel(Config(data_dir="x"))  # how surgery reaches an expert's row: one process


EXPERTS = [k for k in KINDS if "n_experts" in KINDS[k]]


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
        add_expert(moe, torch.optim.AdamW(moe.parameters()), 0, ROWS)
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
    """Of siblings only one can be chosen, so a pair is one that stays; and a dropped_out twin does
    not stand in the way."""
    moe, x = layer(E=3, K=2, n_experts_max=5, expert_dropout=0.6, n_null_experts=0), normal(64, 32)
    add_expert(moe, torch.optim.AdamW(moe.parameters()), 0, ROWS)
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
        recycle_expert(moe, torch.optim.AdamW(moe.parameters()), 9, ROWS)


def crowded(K, **changes):
    """A layer of four experts whose tokens all prefer expert 0, then 1, 2, 3; and 64 such
    tokens."""
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
    """K = 2, capacity factor 1.25 of 32 a expert: experts 0 and 1 take 40 each; the gates are not
    made larger."""
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
    change, stats = block(x, AttentionInputs(rope_tables(model.cfg, torch.arange(32))))
    dropped = (seen["y"] == 0).all(-1)
    assert dropped.sum() == stats["moe.dropped"] > 20
    assert torch.equal(change[dropped], seen["h"][dropped]) and not torch.equal(change, seen["h"])


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_router_learns_from_the_language_model_alone(kind):
    """Lunaris' Switch layer does not multiply by the gate: its router gets nothing from the loss
    that counts."""
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


@pytest.mark.parametrize("kind", ("hybrid", "slots"))
def test_matrices_decay_and_nothing_else(kind):
    model = make(**KINDS[kind])
    groups = build_optimizer(
        Config(data_dir="x", learning_rate=3e-4, weight_decay=0.3), dict(model.named_parameters())
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
    """n times the sum over tokens of share times the load of the token's own row; 1.0 a token at
    equal loads."""
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
    """With an epsilon beside nothing the sum of shares would fall to 0, and the loss with it
    (Megatron issue 1545)."""
    moe, x = layer(router="sigmoid", aux_loss_weight=1.0), normal(50, 32).abs()
    with torch.no_grad():
        moe.router.weight.fill_(-10.0)
    assert moe.router(x)[3]["balance"].item() == pytest.approx(50, rel=1e-3)


@pytest.mark.parametrize("capacity", (0.125, 0.5))
def test_of_equal_tokens_the_earlier_is_taken(capacity):
    """In the first layer equal ids score equally, so at the limit of capacity a rule must decide,
    not rounding: else the row above in the batch would change what this row computes."""
    model = make(mod_capacity=capacity, n_layers=1)
    x = torch.randint(0, 6, (64, 32), generator=torch.Generator().manual_seed(1))
    n, kept = model.blocks[0].mod.tokens, torch.zeros(64, 32)
    h = F.rms_norm(model.embed.weight.double(), (32,), eps=1e-6)
    score = (h @ model.blocks[0].mod.router.weight[0].double())[x]
    for row in range(64):
        kept[row, sorted(range(32), key=lambda t: (-score[row, t].item(), t))[:n]] = 1
    for rows in (slice(0, 64), slice(3, 4), slice(5, 12)):
        assert torch.equal(model(x[rows], x[rows])[1]["mod.counts"][0], kept[rows].sum(0))


# ---------------------------------------------------------------- statistics


def stacked(*layers):
    """What the model makes of its routers' sums: moe.NAME, a row a layer."""
    return {f"moe.{name}": torch.stack([row[name] for row in layers]) for name in layers[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_has_the_name_and_the_shape_that_was_promised(kind):
    """The trainer lays out its one collective by sum_shapes before it has seen a batch; there and
    back nothing is lost."""
    model, x = make(**KINDS[kind]), ids(2, 32)
    sums = model(x, x)[1]
    assert {name: tuple(t.shape) for name, t in sums.items()} == sum_shapes(model)
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


# ---------------------------------------------------------------- gradients, recomputation,
# compilation


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    """Also an expert without a token: None on one rank would hang, or misalign, the reduction
    (Lunaris' DDP)."""
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
    block, x, found = model.blocks[0], normal(2, 32, 32), []
    inputs = AttentionInputs(rope_tables(model.cfg, torch.arange(32)))
    for run in (block, torch.compile(block, backend=backend, fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(0)
        y, stats = run(x, inputs)
        (y.square().sum() + stats.get("loss", 0.0)).backward()
        found.append((y.detach(), {n: p.grad.clone() for n, p in block.named_parameters()}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(g, found[1][1][n], atol=1e-4) for n, g in found[0][1].items())
