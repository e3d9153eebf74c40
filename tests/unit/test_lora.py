"""lumen/lora.py: adapters that change nothing at first, learn by the formula W + scale B A, can be
switched off and merged; what they are put around, and what that refuses."""

import pytest
import torch
from sparse_models import KINDS, ids, make

from lumen import lora
from lumen.config import LoraConfig
from lumen.errors import UserError
from model import HeadLoss, role

FOUR = ("dense", "fine", "mod", "hybrid")
R4 = LoraConfig(r=4)


def adapted(kind, cfg=R4, fresh=(), backend="slices", **changes):
    """A model with adapters that do something."""
    model = make(**KINDS[kind], **changes)
    for moe in model.sparse_layers("moe").values():
        moe.backend = backend
    lora.add(model, cfg, 1, fresh)
    stir(model)
    return model


def stir(model) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in lora.adapter_names(model):
            p = model.get_parameter(name)
            if ".lora_a" not in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def hold(model, dtype) -> None:
    """Frozen weights as a trainer holds them."""
    model.compute_dtype = dtype
    for name, p in model.named_parameters():
        if role(name) != "router":
            p.data = p.data.to(dtype)


def gradients(model, x) -> dict:
    """Of the adapters, by the trainer's loss."""
    model.train().zero_grad()
    torch.manual_seed(0)
    model(x, x)[0].backward()
    return {name: model.get_parameter(name).grad for name in lora.adapter_names(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOUR)
def test_at_first_and_switched_off_a_model_is_its_base(kind, dtype):
    model = make(**KINDS[kind]).eval()
    hold(model, dtype)
    x = ids(2, 16)
    base = model(x)
    lora.add(model, R4, 1)
    assert torch.equal(model(x), base)
    stir(model)
    moved = model(x)
    assert not torch.equal(moved, base)
    with lora.off(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), moved)


@pytest.mark.parametrize("kind", FOUR)
def test_only_adapters_are_trained_and_the_bases_names_stay(kind):
    before = dict(make(**KINDS[kind]).named_parameters())
    model = adapted(kind, fresh=(3, 5))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora.adapter_names(model))
    for name, p in model.named_parameters():
        if name not in trained:
            assert torch.equal(before.pop(name.replace(".base.", ".")), p)
            assert role(name) == role(name.replace(".base.", "."))
    assert not before


@pytest.mark.parametrize("backend", ["plain", "slices"])
@pytest.mark.parametrize("kind", FOUR)
def test_gradients_are_those_of_the_dense_formula(kind, backend):
    """autograd through W + scale B A, put into the same model without adapters."""
    if backend == "plain" and kind in ("dense", "mod"):
        pytest.skip("no experts")
    model = adapted(kind, LoraConfig(r=4, rslora=True), (3, 5), backend)
    plain = make(**KINDS[kind]).train()
    for moe in plain.sparse_layers("moe").values():
        moe.backend = backend
        moe.router.aux_weight = 0.0
    lora_of = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    weights = {}
    for name, weight in plain.named_parameters():
        place = name.removesuffix(".weight")
        if f"{place}.lora_a" in lora_of:
            weight = weight + 16 * lora_of[f"{place}.lora_b"] @ lora_of[f"{place}.lora_a"]
        elif name.endswith((".w13", ".w2")):
            layer, _, which = name.rpartition(".w")
            a, b = lora_of[f"{layer}.lora_a{which}"], lora_of[f"{layer}.lora_b{which}"]
            weight = weight + 16 * torch.einsum("eor,eri->eoi", b, a)
        elif place == "embed":
            rows = lora_of["embed.rows"]
            weight = torch.cat([weight[:3], rows[:1], weight[4:5], rows[1:], weight[6:]])
        weights[name] = weight
    x = ids(2, 16)
    found = gradients(model, x)
    total, _ = torch.func.functional_call(plain, weights, (x, x))
    total.backward()
    for name, grad in found.items():
        torch.testing.assert_close(grad, lora_of[name].grad, rtol=1e-4, atol=2e-4)
        assert grad.abs().max() > 0.01, name


@pytest.mark.parametrize("kind", FOUR)
def test_merged_is_the_same_function_of_ordinary_parts(kind):
    model = adapted(kind, fresh=(3, 5), tie_embeddings=False).eval()
    x = ids(2, 16)
    want = model(x)
    lora.merge(model)
    names = make(**KINDS[kind], tie_embeddings=False).state_dict().keys()
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_a_frozen_router_is_not_pushed():
    model = adapted("mixtral").train()
    x = ids(2, 16)
    with torch.no_grad():
        total, sums = model(x, x)
    assert total == sums["ce"]
    assert all(moe.router.bias_rate == 0 for moe in model.sparse_layers("moe").values())
    assert sums["moe.balance"].min() > 0 and sums["moe.z"].min() > 0  # looked at, all the same


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "targets, count",
    [
        (None, 10),
        (["all-linear"], 10),
        (["wqkv"], 2),
        (["q_proj", "v_proj"], 2),
        (["attn"], 4),
        (["attn.wo", "experts"], 4),
        (["blocks.1"], 5),
        (["gate_proj", "down_proj"], 4),
    ],
)
def test_targets_are_parts_of_names(targets, count):
    model = adapted("fine", LoraConfig(r=2, targets=targets))
    kinds = {role(name) for name in lora.adapter_names(model)}
    assert len(lora.wrappers(model)) == count and kinds <= {"matrix", "expert"}


@pytest.mark.parametrize("target, near", [("wqk", "wqkv"), ("router", ""), ("expert", "experts")])
def test_a_target_that_names_nothing_is_refused_and_nothing_changed(target, near):
    model = make(**KINDS["fine"])
    with pytest.raises(UserError) as error:
        lora.add(model, LoraConfig(r=2, targets=["wo", target]), 1)
    assert error.value.code == "E002" and target in error.value.text
    assert (f"did you mean {near}?" in error.value.text) == bool(near)
    assert not lora.wrappers(model) and all(p.requires_grad for p in model.parameters())


def test_no_targets_at_all_are_refused():
    with pytest.raises(UserError, match="null stands for all"):
        lora.add(make(), LoraConfig(r=2, targets=[]), 1)


def test_what_is_trained_is_told():
    model = adapted("fine", LoraConfig(r=4, targets=["q_proj", "experts"]), (3, 5))
    first, each, fused = lora.describe(model)
    sizes = {"embed": 2 * 32, "wqkv": 2 * 4 * (32 + 64), "experts": 2 * 8 * 4 * (64 + 48)}
    assert f"{sum(sizes.values()):,} trained" in first and "scale 8" in first
    assert f"2 experts ({sizes['experts']:,})" in each
    assert "q_proj is wqkv" in fused


def test_a_starts_by_seed_and_name_alone():
    torch.manual_seed(5)
    one, two = make(**KINDS["fine"]), make(**KINDS["fine"])
    lora.add(one, R4, 1)
    torch.manual_seed(6)
    lora.add(two, LoraConfig(r=4, targets=["experts", "wo"]), 1)
    for name in lora.adapter_names(two):
        assert torch.equal(one.get_parameter(name), two.get_parameter(name))
        if ".lora_a" in name:
            a = one.get_parameter(name)
            bound = a.shape[-1] ** -0.5  # kaiming_uniform(sqrt 5)
            assert 0.9 * bound < a.abs().max() <= bound
    other = make(**KINDS["fine"])
    lora.add(other, R4, 2)
    names = [name for name in lora.adapter_names(one) if ".lora_a" in name]
    assert not any(torch.equal(one.get_parameter(n), other.get_parameter(n)) for n in names)
    first, second = one.blocks[0].ffn.experts.lora_a13[:2]
    assert not torch.equal(first, second)
    assert not torch.equal(one.blocks[0].attn.wo.lora_a, one.blocks[1].attn.wo.lora_a)


# ---------------------------------------------------------------- fresh rows, dropout, the head


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_rows_begin_as_the_mean_of_the_others_and_are_trained(tied):
    model = make(tie_embeddings=tied)
    tables = {"embed": model.embed.weight.detach()}
    if not tied:
        tables["head"] = model.head.weight.detach()
    lora.add(model, R4, 1, (90, 7))
    for name, table in tables.items():
        others = torch.cat([table[:7], table[8:90], table[91:]])
        weight = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(weight[[7, 90]], others.mean(0).expand(2, -1))
        assert torch.equal(torch.cat([weight[:7], weight[8:90], weight[91:]]), others)
    x = ids(2, 16)
    x[0, 4] = 90
    for name, grad in gradients(model, x).items():
        if name.endswith("rows"):
            assert grad.abs().amax(1).min() > (1e-3 if tied or name == "head.rows" else -1)
            assert grad[1].abs().max() > 1e-3, name  # 90 was read


@pytest.mark.parametrize("how", ["block", "selective"])
def test_what_backward_makes_anew_drops_the_same(how):
    model = adapted("fine", LoraConfig(r=4, dropout=0.3))
    x = ids(2, 16)
    want = gradients(model, x)
    model.recompute = how
    assert all(torch.equal(grad, want[name]) for name, grad in gradients(model, x).items())
    dry = adapted("fine").eval()
    assert torch.equal(model.eval()(x), dry(x))
    assert not torch.equal(
        want["blocks.0.attn.wo.lora_b"], gradients(dry, x)["blocks.0.attn.wo.lora_b"]
    )


def test_a_frozen_head_has_no_gradient_made(monkeypatch):
    x, weight = torch.randn(300, 16).requires_grad_(), torch.randn(97, 16)
    targets = torch.randint(97, (300,))
    zeros_like, made, found = torch.zeros_like, [], []

    def counted(tensor):
        made.append(tensor.shape == weight.shape)
        return zeros_like(tensor)

    monkeypatch.setattr(torch, "zeros_like", counted)
    for frozen in (False, True):
        total = HeadLoss.apply(x, weight.requires_grad_(not frozen), targets, 1e-3, True)[0]
        found.append((total.detach(), *torch.autograd.grad(total, x)))
    assert sum(made) == 1  # not for the frozen one
    for one, two in zip(*found):
        assert torch.equal(one, two)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_compiled_block_with_adapters_is_one_graph(kind):
    torch._dynamo.reset()
    model = adapted(kind, fresh=(3, 5), backend="grouped_mm")
    x = ids(2, 16)
    want = gradients(model, x)
    monkey = torch.compiler.config.recompile_limit
    torch.compiler.config.recompile_limit = 64
    try:
        for block in model.blocks:
            block.compile(fullgraph=True)
        for name, grad in gradients(model, x).items():
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-4)
    finally:
        torch.compiler.config.recompile_limit = monkey
