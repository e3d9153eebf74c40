"""What backward needs of a forward pass: bytes a token, layer by layer.

Whoever changes what a layer of model.py keeps changes its function here; tests/unit/test_plan.py
counts what autograd really keeps. In all of them `b` is the bytes of a value, and `selective` asks
for what selective recomputation keeps: what matmuls, attention and topk gave.
"""

from __future__ import annotations

from torch.utils import checkpoint as remat

from lumen.tuning import PRETRAINING, Tuning, kept_less
from model import ModelConfig


def attention(cfg: ModelConfig, b: int, selective: bool) -> float:
    C, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    if selective:  # qkv; attention's output and its logsumexp; wo's output
        return b * ((q + 2 * kv) + q + C) + 4 * cfg.n_heads
    # the norm keeps its input in fp32 too, where that is a copy, and itself before the weight
    norm = (q + kv) * (b + (4 if b == 2 else 0)) if cfg.qk_norm else 0
    return norm + b * ((q + 2 * kv) + (q + kv) + q)  # qkv; rotated; attention's output


def swiglu(d_model: int, d_ff: int, b: int, selective: bool) -> float:
    if selective:
        return b * (2 * d_ff + d_model)
    return b * 4 * d_ff  # gate and up; silu(gate); their product


def relu2(d_model: int, d_ff: int, b: int, selective: bool) -> float:
    if selective:
        return b * (d_ff + d_model)
    return b * 2 * d_ff  # relu; its square


def extras(cfg: ModelConfig, layer: int, b: int, selective: bool) -> float:
    """What the mixes of lumen/extras.py keep of each token: both parts, and the sum."""
    names = cfg.extras or []
    width = (cfg.d_model if "x0" in names else 0) if layer else 0
    if "value_residual" in names and layer:
        width += cfg.n_kv_heads * cfg.head_dim
    return b * width * (0 if selective else 1)


def moe(cfg: ModelConfig, b: int, selective: bool, arrive: float = 0.0) -> float:
    """Without the shared expert. arrive: with experts on other ranks, the rows that come here as a
    share of this rank's own."""
    C, K, width = cfg.d_model, cfg.n_experts_per_token, cfg.d_expert
    n = (cfg.n_experts_max or cfg.n_experts) + cfg.n_null_experts
    # of the experts only the pre-activation is kept, of the rows that are computed here
    experts = b * K * 2 * width * (arrive or 1.0)
    if selective:
        return 4 * n + 12 * K + b * C * max(1, K * arrive) + experts
    # probabilities in fp32; of sigmoid also normalised; with a z-loss the logits too
    tables = 1 + (1 if cfg.router == "sigmoid" else 0)
    tables += 1 if cfg.router_z_loss_weight else 0
    choices = K * (3 * 4 + 3 * 8)  # gates; ids and their order
    came = K * (b * C + 3 * 8) * arrive  # rows from other ranks; their order
    return 4 * n * tables + choices + experts + came


def block(
    cfg: ModelConfig,
    layer: int,
    b: int,
    selective: bool,
    arrive: float,
    tuning: Tuning = PRETRAINING,
) -> tuple[float, float]:
    """A token of the batch: (attention's half, the FFN's half). arrive: see moe."""
    C = cfg.d_model
    less_attn, less_ffn = kept_less(cfg, layer, b, selective, tuning)
    attn = attention(cfg, b, selective) + extras(cfg, layer, b, selective)
    if cfg.is_moe(layer):
        ffn = moe(cfg, b, selective, arrive)
        if cfg.n_shared_experts:
            ffn += swiglu(C, cfg.n_shared_experts * cfg.d_expert, b, selective)
    elif "relu2" in (cfg.extras or []):
        ffn = relu2(C, cfg.d_ff, b, selective)
    else:
        ffn = swiglu(C, cfg.d_ff, b, selective)
    # a capacity that is annealed begins with all tokens
    share = 1.0 if cfg.mod_anneal_steps else cfg.capacity(layer)
    deep = 1.0 if cfg.mod_ffn_only else share
    attn, ffn = attn - less_attn, ffn - less_ffn
    if selective:
        return deep * attn, share * ffn
    norm = C * (4 + 2 * b)  # its input in fp32; normalised; times the weight
    dropout = C if cfg.dropout else 0
    attn += dropout + (norm if cfg.norm_order == "pre" else 0)
    ffn += dropout + norm
    if share < 1 and cfg.mod_routing == "learned":
        # every token's fp32 input of the router and that normalised; the change before its gate
        trains = tuning.trains(f"blocks.{layer}.mod.router.weight")
        return deep * attn, share * (ffn + b * C) + (8 if trains else 4) * C
    return deep * attn, share * ffn


# ---------------------------------------------------------------- selective recomputation

MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::topk")
MATMULS += ("lumen::experts", "lumen::frozen_experts", "lumen::attend", "torch_attn::_varlen_attn")


def keep_matmuls(ctx, op, *args, **kwargs):
    """Selective recomputation: keep the outputs of matmuls, attention and topk (which decides the
    routing: recomputed, it could differ), make the rest anew."""
    name = op.name() if hasattr(op, "name") else ""
    keep = name.partition(".")[0] in MATMULS or "scaled_dot_product" in name
    policy = remat.CheckpointPolicy
    return policy.MUST_SAVE if keep else policy.PREFER_RECOMPUTE
