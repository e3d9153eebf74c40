"""Small sparse models for the tests, and what is asked of them again and again."""

import torch
import torch._dynamo.testing

from lumen.model_keys import model_from_keys
from model import ModelConfig, Transformer
from model_moe import MoE

SMALL = dict(
    vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32
)


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


DEPTHS = [k for k in KINDS if "mod_capacity" in KINDS[k]]


def config(**changes) -> ModelConfig:
    return model_from_keys(SMALL | changes)


def make(seed=0, std=0.1, **changes) -> Transformer:
    """Weights large enough for attention and routers to have opinions; every predictor differs from
    its router."""
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
    """Rows of different ids: equal tokens have equal scores in the first MoD layer, which has a
    test of its own."""
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


def gradients(model, x, y, seed=0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    total, _ = model(x, y)
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}
