"""What does not export (lumen/extras.py), against a whole model written out plainly: logits, loss
and every gradient; and who refuses it. Cached decoding, causality, FLOPs, counts and any split into
micro-batches run over its kinds in test_model.py."""

import pytest
import torch
import torch.nn.functional as F

from lumen import gguf_model, gptq, hf, onnx_file
from lumen.config import Config
from lumen.errors import UserError
from lumen.extras import CAP
from lumen.model_keys import EXTRAS, model_from_keys
from lumen.optim import build_optimizer
from model import HeadLoss, Transformer, role, rope_tables, rotate

SMALL = dict(vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=32)
SMALL |= dict(multiple_of=16)
SETS = [[name] for name in EXTRAS] + [["value_residual", "x0"], list(EXTRAS)]


def make(**keys) -> Transformer:
    model = Transformer(model_from_keys(SMALL | keys))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else 0.2 * noise)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def written_out(model, idx):
    """The logits of the model, by the formulas of the papers, from its parameters by name."""
    cfg, w = model.cfg, dict(model.named_parameters())
    names, D = cfg.extras, cfg.head_dim
    rope = rope_tables(cfg, torch.arange(idx.shape[1]))

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + cfg.norm_eps).rsqrt() * w[f"{name}.weight"]

    x = x0 = w["embed.weight"][idx]
    first = None
    for i in range(cfg.n_layers):
        at = f"blocks.{i}"
        if i and "x0" in names:
            a, b = w[f"{at}.stream_mix.weight"]
            x = a * x + 0.1 * b * x0
        qkv = norm(x, f"{at}.attn_norm") @ w[f"{at}.attn.wqkv.weight"].T
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split(model.blocks[i].attn.sizes, -1))
        first = v if first is None else first
        if i and "value_residual" in names:
            a, b = w[f"{at}.value_mix.weight"]
            v = (a * v + b * first) / 2
        q, k = (rotate(norm(t, f"{at}.attn.{n}_norm"), rope) for t, n in ((q, "q"), (k, "k")))
        k, v = (t.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D**0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(mask, -torch.inf).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)
        x = x + y @ w[f"{at}.attn.wo.weight"].T
        h = norm(x, f"{at}.ffn_norm")
        if "relu2" in names:
            h = (h @ w[f"{at}.ffn.w1.weight"].T).clamp(min=0) ** 2
        else:
            gate, up = (h @ w[f"{at}.ffn.w13.weight"].T).chunk(2, -1)
            h = gate * gate.sigmoid() * up
        x = x + h @ w[f"{at}.ffn.w2.weight"].T
    logits = norm(x, "norm") @ w["embed.weight"].T
    return 15 * torch.tanh(logits / 15) if "softcap" in names else logits


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ("none", "block", "selective"))
@pytest.mark.parametrize("names", SETS, ids=",".join)
def test_logits_loss_and_gradients_equal_the_formulas(names, recompute):
    model, x, y = make(extras=names), ids(2, 12), ids(2, 12, seed=1)
    logits = written_out(model, x)
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=2e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
    want = gradients(model, loss)
    model.recompute = recompute
    total, sums = model(x, y)
    found = gradients(model, total)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in want.items():
        assert grad.abs().max() > 0, name
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    with torch.no_grad():
        assert model(x, y)[1]["ce"].item() == pytest.approx(sums["ce"].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_softcap_in_chunks_is_exact(dtype):
    """300 rows of 70,000 ids are several chunks; logits up to 60, far beyond the cap; z-loss too."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator) for n in (130, 70_000))
    x, w = (6 * x).to(dtype).requires_grad_(), w.requires_grad_()
    targets = torch.randint(70_000, (130,), generator=generator)
    targets[::7] = -1
    logits = (x @ w.to(dtype).T).float()
    assert logits.max() > 3 * CAP
    logits = CAP * (logits / CAP).tanh()
    ce = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    z = 1e-3 * (logits.logsumexp(-1).square() * (targets >= 0)).sum()
    want = torch.autograd.grad(ce + z, (x, w))
    total, found_ce, found_z, _ = HeadLoss.apply(x, w, targets, 1e-3, True, "capped")
    found = torch.autograd.grad(total, (x, w))
    assert found_ce.item() == pytest.approx(ce.item(), rel=1e-5)
    assert found_z.item() == pytest.approx(z.item(), rel=1e-5)
    for a, b in zip(found, want):
        off = (a.double() - b.double()).norm() / b.double().norm()
        assert off < (1e-5 if dtype == torch.float32 else 1e-2)


def test_roles_decay_and_where_they_begin():
    model = make(extras=list(EXTRAS))
    model.init_weights(0)
    named = dict(model.named_parameters())
    mixes = {name: p for name, p in named.items() if "mix" in name}
    kinds = ("stream_mix", "value_mix")
    assert sorted(mixes) == [f"blocks.{i}.{kind}.weight" for i in (1, 2) for kind in kinds]
    assert {role(name) for name in mixes} == {"norm"}
    assert all(p.tolist() == [1.0, 1.0] for p in mixes.values())
    for optimizer in ("adamw", "muon"):
        cfg = Config(data_dir="x", model=model.cfg, learning_rate=3e-4, optimizer=optimizer)
        for group in build_optimizer(cfg, named).param_groups:
            if any(p is mix for p in group["params"] for mix in mixes.values()):
                assert group["weight_decay"] == 0


def test_relu2_has_as_many_parameters_as_swiglu():
    plain, wide = make(multiple_of=8, d_model=96), make(multiple_of=8, d_model=96, extras=["relu2"])
    assert (plain.cfg.d_ff, wide.cfg.d_ff) == (256, 384)
    assert plain.n_params() == wide.n_params()
    assert make(extras=["relu2"], d_ff=48).cfg.d_ff == 48


REFUSED = [
    (dict(extras=["softcp"]), "must be different ones of value_residual, x0, relu2, softcap"),
    (dict(extras=["x0", "x0"]), "must be different ones"),
    (dict(extras=["relu2"], n_experts=4), "relu2 is of dense models"),
    (dict(extras=["x0"], mod_capacity=0.5), "mod_capacity skips some"),
]


@pytest.mark.parametrize(("keys", "text"), REFUSED)
def test_what_it_does_not_go_with(keys, text):
    with pytest.raises(ValueError, match=f"model.extras: .*{text}"):
        model_from_keys(SMALL | keys)
    allowed = dict(extras=["softcap", "value_residual"], n_experts=4, d_expert=16)
    assert model_from_keys(SMALL | allowed).extras


def test_it_does_not_export():
    cfg = model_from_keys(SMALL | dict(extras=["x0", "softcap"]))
    for refusals in (hf.refusals, gguf_model.refusals):
        assert any("model.extras: x0, softcap" in why for why in refusals(cfg))
    opened = type("Opened", (), {"folder": "f", "kind": "run", "model": Transformer(cfg)})
    with pytest.raises(UserError, match=r"E404: f: model.extras: x0, softcap"):
        onnx_file.refuse(opened)


@torch.no_grad()
def test_gptq_hands_the_first_block_on():
    """It runs block by block itself. Of weights that int8 can hold next to nothing is rounded, so
    what its last block gives is what the model's gives."""
    model, rows = make(extras=["value_residual", "x0"], d_ff=32), ids(2, 32)
    given = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: given.append(output[0]))
    for p in model.parameters():
        if p.dim() == 2:
            p.copy_((p * 100).round().clamp(-127, 127) / 100)
            p[:, 0] = 1.27  # so that the scale of each row is 0.01
    model(rows)
    gptq.quantize(model, "int8", rows, lambda text: None)
    off = torch.cat(given[-2:]) - given[0]
    assert off.norm() < 0.01 * given[0].norm()
