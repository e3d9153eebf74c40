"""The whole transformer, top to bottom: ModelConfig, RMSNorm, RoPE, attention with its fast paths and KV cache, SwiGLU,
Block, Transformer (init, forward, generate, counts, FLOPs). The sparse layers, MoE and MoD, come from model_moe.py.

Qwen3-shaped by default: pre-norm RMSNorm, RoPE in the half-rotation convention, GQA with fused QKV, QK-norm per head
before RoPE, SwiGLU with fused gate and up, no biases. `qk_norm: false` is Llama. No autocast: parameters are fp32, each
layer casts its weight to the dtype of its input, and `model.compute_dtype` decides that dtype at the embedding.

Names: B batch, T tokens, C = d_model, H heads, G key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import attend, for_generation
from model_moe import MOD_SUMS, SUMS, MoD, MoE

# ---------------------------------------------------------------- configuration

ROPE_NUMBERS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
ROPE_NUMBERS += ("original_max_position_embeddings",)
MOST = {
    "d_model": 1 << 20,
    "n_layers": 1 << 14,
    "n_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_seq_len": 1 << 30,
}


@dataclass
class ModelConfig:
    # fmt: off
    vocab_size: int = 0  # ids; 0: the tokenizer's
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # query heads
    n_kv_heads: int = 0  # key/value heads (GQA); 0: n_heads; must divide n_heads
    head_dim: int = 0  # width of a head, even; 0: d_model / n_heads
    d_ff: int = 0  # SwiGLU's hidden width; 0: Lunaris' rule from the next two
    ffn_hidden_multiplier: float = 4.0  # d_ff = 2/3 of this times d_model, rounded up to ...
    multiple_of: int = 256  # ... a multiple of this
    max_seq_len: int = 1024  # T, tokens in a training row
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # longer contexts, as in transformers: {type: linear | yarn | llama3, factor}
    rope_first: bool = False  # QK-norm after RoPE (Lunaris' main branch): trains, imports its .pt, does not export
    dropout: float = 0.0  # on the embedding and on what attention and FFN add to the stream, 0 to 1
    norm_eps: float = 1e-6  # RMSNorm's epsilon
    init_std: float | None = None  # standard deviation of the initial weights; null: 0.02 sqrt(512 / d_model)
    qk_norm: bool = True  # RMSNorm on queries and keys; false with norm_order pre: Llama
    tie_embeddings: bool = True  # the head is the embedding, no second parameter
    norm_order: str = "pre"  # pre | lunaris (no pre-attention norm, QK-norm over the whole q and k vectors)
    # Mixture of Experts (n_experts: 0 is a dense model)
    n_experts: int = 0  # routed experts per MoE layer
    n_experts_per_token: int = 2  # K, experts that each token visits
    d_expert: int = 0  # hidden width of an expert; 0: d_ff
    n_shared_experts: int = 0  # experts that every token visits, as one SwiGLU of this many times d_expert
    n_dense_layers: int = 0  # the first layers keep the dense FFN of width d_ff
    moe_every: int = 1  # of the layers after them, every n-th is MoE (the n-th, the 2n-th ...)
    moe_layers: list | None = None  # or: exactly these layers, counted from 0
    router: str = "softmax"  # softmax | sigmoid (the bias chooses, the unbiased score weighs: DeepSeek-V3)
    norm_topk: bool | None = None  # gates of a token sum to 1; null: where K > 1 (at K = 1 the router could not learn)
    route_scale: float = 1.0  # factor on the gates
    aux_loss_weight: float | None = None  # load balancing loss; null: 1e-2, for sigmoid 1e-4
    router_z_loss_weight: float | None = None  # logsumexp(router logits)^2; null: 1e-3, for sigmoid 0
    bias_update_rate: float | None = None  # balancing by selection bias, a step; null: 0, for sigmoid or nulls 1e-3
    capacity_factor: float | None = None  # at most so many times the fair share per expert; null: nothing is dropped
    routing_temperature: float = 1.0  # divides the router's logits
    router_jitter: float = 0.0  # training noise on the router's input: times uniform(1 - x, 1 + x)
    expert_dropout: float = 0.0  # share of experts that cannot be chosen, drawn anew each step, training only
    n_experts_max: int = 0  # slots, for adding, splitting and pruning experts while training; 0: no surgery
    n_null_experts: int = 0  # choices that compute nothing; n of E + n are used, so depth varies by token
    # Mixture of Depths (mod_capacity: 1.0 is off)
    mod_capacity: float | list = 1.0  # share of tokens that a MoD layer computes; or a list, one number per layer
    mod_routing: str = "learned"  # learned | static (evenly spaced positions) | random
    mod_start_layer: int = 0  # first layer, from 0
    mod_end_layer: int | None = None  # last layer; null: the last there is
    mod_every: int = 1  # of the layers between, every n-th is MoD (the n-th, the 2n-th ...)
    mod_layers: list | None = None  # or: exactly these layers, counted from 0
    mod_ffn_only: bool = False  # only the FFN skips tokens, attention sees all
    mod_anneal_steps: int = 0  # capacity falls from 1.0 in eight equal steps over this many steps
    # fmt: on

    def __post_init__(self):
        """Fill in what follows from the rest. Raises ValueError naming the key, its value and what would work."""

        def check(ok, text):
            if not ok:
                raise ValueError(text)

        for f in dataclasses.fields(
            self
        ):  # of which kind, finite, and not so large that counting it would hang
            value, kinds = getattr(self, f.name), f.type.split(" | ")
            ok = type(value).__name__ in kinds or (value is None and "None" in kinds)
            ok = ok or (type(value) is int and "float" in kinds)
            check(ok, f"model.{f.name}: {value!r} is not {f.type}")
            number = value if type(value) in (int, float) else 0
            most = MOST.get(f.name, 1 << 24 if type(value) is int else 1e30)
            check(abs(number) <= most, f"model.{f.name}: {number} is not finite, or beyond {most}")
        for key in ("d_model", "n_layers", "n_heads", "max_seq_len", "multiple_of"):
            check(getattr(self, key) >= 1, f"model.{key}: {getattr(self, key)} must be at least 1")
        if self.init_std is None:
            self.init_std = 0.02 * math.sqrt(512 / self.d_model)
        for key in (
            "vocab_size",
            "n_kv_heads",
            "head_dim",
            "ffn_hidden_multiplier",
            "norm_eps",
            "init_std",
        ):
            check(getattr(self, key) >= 0, f"model.{key}: {getattr(self, key)} must be 0 or more")
        check(self.rope_theta > 0, f"model.rope_theta: {self.rope_theta} must be above 0")
        if not self.head_dim:
            even = [h for h in range(1, self.d_model + 1) if self.d_model % (2 * h) == 0]
            near = sorted(sorted(even, key=lambda h: abs(h - self.n_heads))[:3])
            ok = self.d_model % self.n_heads == 0
            check(
                ok,
                f"model.n_heads: {self.n_heads} does not divide d_model {self.d_model}; near it: {near}",
            )
            self.head_dim = self.d_model // self.n_heads
        check(
            self.head_dim % 2 == 0,
            f"model.head_dim: {self.head_dim} is odd; RoPE turns pairs, take an even one",
        )
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        near = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
        ok = self.n_heads % self.n_kv_heads == 0
        check(
            ok,
            f"model.n_kv_heads: {self.n_kv_heads} does not divide n_heads {self.n_heads}; possible: {near}",
        )
        if not self.d_ff:
            hidden = int(2 * int(self.ffn_hidden_multiplier * self.d_model) / 3)
            self.d_ff = self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)
        check(self.d_ff >= 1, f"model.d_ff: {self.d_ff} must be at least 1")
        check(0 <= self.dropout < 1, f"model.dropout: {self.dropout} is not in [0, 1)")
        check(
            self.norm_order in ("pre", "lunaris"),
            f"model.norm_order: {self.norm_order!r} is not pre or lunaris",
        )
        check(
            self.norm_order == "pre" or self.qk_norm,
            "model.qk_norm: false does not go with norm_order lunaris: no norm",
        )
        scaling = self.rope_scaling
        if scaling is not None:
            kind = scaling.get("rope_type", scaling.get("type"))
            need = {"linear": ["factor"], "yarn": ["factor"], "default": []}
            need["llama3"] = [
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ]
            check(
                isinstance(kind, str) and kind in need,
                f"model.rope_scaling: type {kind!r} is not one of {', '.join(need)}",
            )
            missing = [k for k in need[kind] if scaling.get(k) is None]
            check(not missing, f"model.rope_scaling: {kind} needs {', '.join(missing)}")
            check(
                kind != "yarn" or self.rope_theta > 1,
                f"model.rope_theta: {self.rope_theta} must be above 1 for yarn",
            )
            for key in set(ROPE_NUMBERS) & set(scaling):
                value = scaling[key]
                ok = value is None or (type(value) in (int, float) and 0 < value < math.inf)
                check(ok, f"model.rope_scaling: {key} {value!r} is not a number above 0")
            low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
            check(
                kind != "llama3" or low != high,
                f"model.rope_scaling: low_freq_factor and high_freq_factor are both {low}",
            )
            extra = set(scaling) & {"mscale", "mscale_all_dim", "truncate"}
            check(
                not extra,
                f"model.rope_scaling: {', '.join(sorted(extra))} of DeepSeek's yarn is not supported",
            )
        self.check_sparse(check)

    def check_sparse(self, check) -> None:
        """The second half of __post_init__: what concerns MoE and MoD."""
        E, K, L, T = self.n_experts, self.n_experts_per_token, self.n_layers, self.max_seq_len
        sigmoid = self.router == "sigmoid"
        self.d_expert = self.d_expert or self.d_ff
        self.norm_topk = K > 1 if self.norm_topk is None else self.norm_topk
        for key, soft, other in (
            ("aux_loss_weight", 1e-2, 1e-4),
            ("router_z_loss_weight", 1e-3, 0.0),
        ):
            if getattr(self, key) is None:
                setattr(self, key, other if sigmoid else soft)
        if self.bias_update_rate is None:
            self.bias_update_rate = 1e-3 if sigmoid or self.n_null_experts else 0.0
        counts = "n_experts d_expert n_shared_experts n_dense_layers n_experts_max n_null_experts mod_anneal_steps"
        for key in counts.split():
            check(getattr(self, key) >= 0, f"model.{key}: {getattr(self, key)} must be 0 or more")
        for key in ("moe_every", "mod_every"):
            check(getattr(self, key) >= 1, f"model.{key}: {getattr(self, key)} must be at least 1")
        for kind, others in (
            ("moe", ("n_dense_layers", "moe_every")),
            ("mod", ("mod_start_layer", "mod_every")),
        ):
            layers = getattr(self, f"{kind}_layers")
            if layers is None:
                continue
            ok = all(type(i) is int and 0 <= i < L for i in layers) and len(set(layers)) == len(
                layers
            )
            check(
                ok,
                f"model.{kind}_layers: {layers} must be different whole numbers from 0 to {L - 1}",
            )
            both = [k for k in others if getattr(self, k) != (1 if k.endswith("every") else 0)]
            check(
                not both,
                f"model.{kind}_layers: says which layers, and so does model.{', '.join(both)}; drop one",
            )
        text = "model.mod_layers: says which layers, and so does model.mod_end_layer; drop one"
        check(self.mod_layers is None or self.mod_end_layer is None, text)
        check(
            self.n_dense_layers <= L,
            f"model.n_dense_layers: {self.n_dense_layers} is more than n_layers {L}",
        )
        if E:
            check(1 <= K <= E, f"model.n_experts_per_token: {K} must be from 1 to n_experts, {E}")
            check(
                self.router in ("softmax", "sigmoid"),
                f"model.router: {self.router!r} is not softmax or sigmoid",
            )
            text = "each gate would be 1 and the router could not learn; set norm_topk: false"
            check(
                K > 1 or not self.norm_topk,
                f"model.norm_topk: true does not go with n_experts_per_token: 1: {text}",
            )
            for key in (
                "d_model",
                "d_expert",
            ):  # rows of 16 bytes in every precision: what grouped GEMMs need
                near = max(8, round(getattr(self, key) / 8) * 8)
                ok = getattr(self, key) % 8 == 0
                check(
                    ok,
                    f"model.{key}: {getattr(self, key)} must be a multiple of 8 in a MoE; near it: {near}",
                )
            factor, least = self.capacity_factor, 1 / E
            text = f"model.capacity_factor: {factor} is below 1 / n_experts: experts would get no token; try 1.25"
            check(factor is None or factor >= least, text)
            for key in ("routing_temperature", "route_scale"):
                check(getattr(self, key) > 0, f"model.{key}: {getattr(self, key)} must be above 0")
            for key in ("aux_loss_weight", "router_z_loss_weight", "bias_update_rate"):
                check(
                    getattr(self, key) >= 0, f"model.{key}: {getattr(self, key)} must be 0 or more"
                )
            for key in ("router_jitter", "expert_dropout"):
                check(
                    0 <= getattr(self, key) < 1,
                    f"model.{key}: {getattr(self, key)} is not in [0, 1)",
                )
            text = f"model.n_experts_max: {self.n_experts_max} is below n_experts {E}; one spare slot: {E + 1}"
            check(not self.n_experts_max or self.n_experts_max >= E, text)
            text = "model.n_experts_max: raw softmax gates depend on the experts not chosen, so a split would change them"
            ok = not self.n_experts_max or sigmoid or self.norm_topk
            check(ok, f"{text}; set norm_topk: true or router: sigmoid")
            text = "model.n_null_experts: their share is held by the selection bias; set bias_update_rate: 1e-3"
            check(not self.n_null_experts or self.bias_update_rate > 0, text)
            text = f"model.expert_dropout: {self.expert_dropout} can mute none where every token needs all {E}"
            check(not self.expert_dropout or K < E, text)
        else:
            check(
                not self.n_null_experts,
                "model.n_null_experts: needs n_experts; they are choices beside real ones",
            )
            check(not self.moe_layers, "model.moe_layers: needs n_experts")
        if self.mod_capacity == 1:
            check(
                not self.mod_layers, "model.mod_layers: needs mod_capacity below 1, 0.5 for example"
            )
        if self.mod_end_layer is not None:
            ok = self.mod_start_layer <= self.mod_end_layer < L
            text = f"from mod_start_layer {self.mod_start_layer} to {L - 1}"
            check(ok, f"model.mod_end_layer: {self.mod_end_layer} must be {text}")
        check(
            0 <= self.mod_start_layer < L,
            f"model.mod_start_layer: {self.mod_start_layer} must be from 0 to {L - 1}",
        )
        routings = ("learned", "static", "random")
        check(
            self.mod_routing in routings,
            f"model.mod_routing: {self.mod_routing!r} is not learned, static or random",
        )
        if isinstance(self.mod_capacity, list):
            n, c = len(self.mod_capacity), self.mod_capacity
            check(
                n == L,
                f"model.mod_capacity: a list needs {L} numbers, one per layer (1.0: not this one), not {n}",
            )
            text = "model.mod_capacity: a list says which layers (1.0: not this one); drop mod_layers, mod_every ..."
            ok = self.mod_layers is None and self.mod_end_layer is None and self.mod_every == 1
            check(ok and not self.mod_start_layer, text)
        for c in self.mod_capacity if isinstance(self.mod_capacity, list) else [self.mod_capacity]:
            ok = type(c) in (int, float) and 0 < c <= 1
            check(
                ok,
                f"model.mod_capacity: {c!r} is not in (0, 1]; 1.0 is off, 0.5 or 0.125 are usual",
            )
            check(
                c * T >= 1,
                f"model.mod_capacity: {c} of {T} tokens is less than one; at least {1 / T:.3g}",
            )
        # asked for, and no layer would be so: a mistake that would train without a word
        moe = not E or any(map(self.is_moe, range(L)))
        mod = isinstance(self.mod_capacity, list) or self.mod_capacity == 1
        mod = mod or any(self.capacity(i) < 1 for i in range(L))
        for name in "moe_layers moe_every n_dense_layers mod_layers mod_every".split():
            value, some = getattr(self, name), mod if name.startswith("mod") else moe
            text = f"model.{name}: {value} leaves none of the {L} layers to "
            check(
                some or value == getattr(ModelConfig, name),
                text + ("n_experts" if mod else "mod_capacity"),
            )

    def idle(self) -> list[str]:
        """Keys that were given and have no effect, since what they belong to is off."""
        experts = "d_expert n_shared_experts n_dense_layers moe_every n_experts_max router capacity_factor "
        experts += "routing_temperature router_jitter expert_dropout"
        depth = "mod_routing mod_start_layer mod_end_layer mod_every mod_ffn_only mod_anneal_steps"
        off = (experts.split() if not self.n_experts else []) + (
            depth.split() if self.mod_capacity == 1 else []
        )
        defaults = vars(ModelConfig) | {"d_expert": self.d_ff}
        return [key for key in off if getattr(self, key) != defaults[key]]

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's FFN is made of experts."""
        if not self.n_experts or self.moe_layers is not None:
            return bool(self.n_experts) and layer in self.moe_layers
        after = layer - self.n_dense_layers
        return after >= 0 and (after + 1) % self.moe_every == 0

    def capacity(self, layer: int) -> float:
        """The share of tokens that this layer computes; 1.0: it has no MoD."""
        if isinstance(self.mod_capacity, list):
            return float(self.mod_capacity[layer])
        last = self.n_layers - 1 if self.mod_end_layer is None else self.mod_end_layer
        after = layer - self.mod_start_layer
        routed = 0 <= after <= last - self.mod_start_layer and (after + 1) % self.mod_every == 0
        if self.mod_layers is not None:
            routed = layer in self.mod_layers
        return float(self.mod_capacity) if routed else 1.0


# ---------------------------------------------------------------- layers


class Linear(nn.Linear):
    """y = x W^T without bias; the fp32 weight is cast to x's dtype (this replaces autocast)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight.to(
            x.dtype
        )


def rope_tables(cfg: ModelConfig, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, (..., T, 1, D/2) fp32, for positions (..., T) (Su et al. 2021).

    Computed anew in each forward pass: a table kept in the model would be cast along with it. The scalings are those
    of transformers: linear (divide by factor), llama3 (Llama 3.1's smooth cut), yarn (Peng et al. 2023).
    """
    D, device = cfg.head_dim, pos.device
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    s, gain = cfg.rope_scaling or {}, 1.0
    kind = s.get("rope_type", s.get("type"))
    if kind == "linear":
        freq = freq / s["factor"]
    elif kind == "llama3":
        turns = (
            s["original_max_position_embeddings"] * freq / (2 * math.pi)
        )  # over the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as trained, 0: slowed by factor
        freq = freq * (keep + (1 - keep) / s["factor"])
    elif kind == "yarn":
        context = s.get("original_max_position_embeddings") or cfg.max_seq_len
        dim = [
            D * math.log(context / (n * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
            for n in (s.get("beta_fast", 32), s.get("beta_slow", 1))
        ]
        low, high = max(math.floor(dim[0]), 0), min(math.ceil(dim[1]), D - 1)
        ramp = (torch.arange(D // 2, device=device, dtype=torch.float32) - low) / max(
            high - low, 1e-3
        )
        keep = 1 - ramp.clamp(0, 1)
        freq = freq * (keep + (1 - keep) / s["factor"])
        gain = (
            s.get("attention_factor") or 0.1 * math.log(max(s["factor"], 1.0)) + 1.0
        )  # it is above 0, or not given
    angle = pos[..., None, None].float() * freq
    return angle.cos() * gain, angle.sin() * gain


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of x (B, T, H, D) by the angles of rope: transformers' half-rotation convention."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of a batch for decoding, of static shape (B, G, length + 1, D) per layer.

    Rows are ragged: `filled` (B,) counts the tokens each has, and the caller keeps it within `length`. The slot behind
    takes the padding and is never read. `used`, a plain int, bounds `filled`: attention looks at no more than that.
    Layers that MoD routes around store only the tokens they compute; `kept` says which.
    """

    def __init__(self, cfg: ModelConfig, batch: int, length: int, device=None, dtype=torch.float32):
        shape = (batch, cfg.n_kv_heads, length + 1, cfg.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
        self.filled = torch.zeros(batch, dtype=torch.long, device=device)
        routed = () if cfg.mod_ffn_only else [i for i in range(cfg.n_layers) if cfg.capacity(i) < 1]
        self.kept = {
            i: torch.zeros(batch, length + 1, dtype=torch.bool, device=device) for i in routed
        }
        self.length, self.used, self.rows = length, 0, torch.arange(batch, device=device)[:, None]

    def place(self, idx: torch.Tensor) -> torch.Tensor:
        """Positions (B, T) of new tokens idx (B, T), where -1 is padding on the right; makes the mask for attention."""
        B, T = idx.shape
        pos = self.filled[:, None] + torch.arange(T, device=idx.device)
        pos = pos.masked_fill(idx < 0, self.length)
        self.used = min(self.used + T, self.length)
        self.mask = (
            torch.arange(self.used, device=idx.device) <= pos[:, None, :, None]
        )  # (B, 1, T, used)
        return pos

    def write(self, layer: int, pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store k and v (B, T, G, D) at positions pos (B, T); return all that the layer has, (B, G, used, D)."""
        self.k[layer][self.rows, :, pos] = k
        self.v[layer][self.rows, :, pos] = v
        if layer in self.kept:
            self.kept[layer][self.rows, pos] = True
        return self.k[layer][:, :, : self.used], self.v[layer][:, :, : self.used]

    def visible(self, layer: int, pos: torch.Tensor) -> torch.Tensor:
        """Which of the used slots queries at pos (B, T) may look at, (B, 1, T, used)."""
        if layer not in self.kept:
            return self.mask
        before = torch.arange(self.used, device=pos.device) <= pos[:, None, :, None]
        return before & self.kept[layer][:, None, None, : self.used]


# ---------------------------------------------------------------- attention


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE and optional QK-norm; x (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.sizes = (
            cfg,
            [h * cfg.head_dim for h in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)],
        )
        self.wqkv = Linear(cfg.d_model, sum(self.sizes))
        self.wo = Linear(self.sizes[0], cfg.d_model)
        if cfg.qk_norm:  # per head, or over the whole vector in Lunaris' order
            whole = cfg.norm_order == "lunaris"
            self.q_norm = RMSNorm(self.sizes[0] if whole else cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(self.sizes[1] if whole else cfg.head_dim, cfg.norm_eps)

    def forward(self, x, rope, backend="sdpa", cache=None, layer=0, pos=None):
        cfg, (B, T, _) = self.cfg, x.shape
        q, k, v = self.wqkv(x).split(self.sizes, dim=-1)
        if cfg.norm_order == "lunaris":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, cfg.head_dim) for t in (q, k, v))  # (B, T, H or G, D)
        if cfg.rope_first:
            q, k = rotate(q, rope), rotate(k, rope)
        if cfg.qk_norm and cfg.norm_order == "pre":
            q, k = self.q_norm(q), self.k_norm(k)
        if not cfg.rope_first:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is None:
            y = attend(q, k, v, backend)
        else:
            k, v = cache.write(layer, pos, k, v)
            q, gqa, mask = (
                q.transpose(1, 2),
                cfg.n_kv_heads != cfg.n_heads,
                cache.visible(layer, pos),
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).transpose(
                1, 2
            )
        return self.wo(y.reshape(B, T, -1))


class SwiGLU(nn.Module):
    """w2(silu(gate) * up), gate and up in one matrix, gate first (Shazeer 2020); x (..., C) -> (..., C)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w13 = Linear(d_model, 2 * d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """What attention and FFN add to the residual stream: x (B, T, C) -> (change (B, T, C), stats of sparse layers).

    h = attention(norm(x)); change = h + FFN(norm(x + h)). Lunaris' order has no norm before attention. The FFN is
    SwiGLU or MoE; with MoD the block, or only its FFN, computes a share of the tokens.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = (
            RMSNorm(cfg.d_model, cfg.norm_eps) if cfg.norm_order == "pre" else nn.Identity()
        )
        self.attn = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        if cfg.is_moe(layer):
            n = cfg.n_shared_experts
            self.ffn = MoE(cfg, SwiGLU(cfg.d_model, n * cfg.d_expert) if n else None)
        else:
            self.ffn = SwiGLU(cfg.d_model, cfg.d_ff)
        self.mod = MoD(cfg, layer) if cfg.capacity(layer) < 1 else None
        self.dropout, self.ffn_only = cfg.dropout, cfg.mod_ffn_only
        self.random = cfg.dropout > 0 or cfg.router_jitter > 0 or cfg.mod_routing == "random"

    def feed(self, x, rope=None, pos=None):
        """The FFN's change to x."""
        y = self.ffn(self.ffn_norm(x))
        y, stats = y if isinstance(y, tuple) else (y, {})
        return F.dropout(y, self.dropout, self.training), stats

    def forward(
        self, x, rope, backend="sdpa", cache=None, layer=0, pos=None, causal=True, recompute="none"
    ):
        """`recompute`: see recomputed(). In here only where the block is compiled."""
        if recompute == "none":
            return self.change(x, rope, backend, cache, layer, pos, causal)
        return recomputed(
            lambda x: self.change(x, rope, backend, cache, layer, pos, causal),
            recompute,
            self.random,
            x,
        )

    def change(self, x, rope, backend, cache, layer, pos, causal):
        def whole(x, rope, pos):
            h = self.attn(self.attn_norm(x), rope, backend, cache, layer, pos)
            h = F.dropout(h, self.dropout, self.training)
            if self.mod is not None and self.ffn_only:
                y, stats = self.mod(x + h, self.feed, None, pos, cache, causal)
            else:
                y, stats = self.feed(x + h)
            return h + y, stats

        if self.mod is not None and not self.ffn_only:
            return self.mod(x, whole, rope, pos, cache, causal)
        return whole(x, rope, pos)


# ---------------------------------------------------------------- head and loss


def head_rows(vocab_size: int, cuda: bool) -> int:
    """Tokens whose fp32 logits HeadLoss holds at a time: 512 MB of logits on CUDA, 16 MB on a CPU."""
    return max(64, (1 << 27 if cuda else 1 << 22) // vocab_size)


class HeadLoss(torch.autograd.Function):
    """Sum over tokens of cross-entropy (+ z_loss * logsumexp^2) of x W^T, without ever holding all the logits.

    The gradient with respect to x and W is computed chunk by chunk in the forward pass (the loss is the last thing
    there is, so backward only scales it): three matrix products in all, as with full logits, nothing recomputed.
    x (N, C), weight (V, C), targets (N,), negative = ignored. Returns (total, ce, z, correct), fp32 scalars.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, z_loss: float, need_grad: bool):
        W, rows = weight.to(x.dtype), head_rows(weight.shape[0], x.is_cuda)
        dx = torch.empty_like(x) if need_grad else None
        dW = torch.zeros_like(weight) if need_grad else None
        ce, z, correct = (torch.zeros((), device=x.device) for _ in range(3))
        starts = list(range(0, len(x), rows))
        if len(starts) > 1 and starts[-1] == len(x) - 1:
            starts.pop()  # a single row, alone, loses two digits of its gradient in MKL on Intel: it joins those before
        for a, b in zip(starts, [*starts[1:], len(x)]):
            xs, t, logits, p = x[a:b], targets[a:b], None, None  # the last chunk's are freed first
            valid = t >= 0
            index = t.clamp(min=0)[:, None]
            logits = F.linear(xs, W).float()  # (n, V)
            right, valid = logits.gather(1, index), valid[:, None].float()
            if not need_grad:
                correct += ((logits.argmax(-1) == t) & (t >= 0)).sum()
            top = logits.amax(-1, keepdim=True)  # (n, 1)
            p = logits.sub_(
                top
            ).exp_()  # in place and once: on CPU this costs as much as a fifth of the products
            total = p.sum(-1, keepdim=True)
            lse = top + total.log()
            ce += ((lse - right) * valid).sum()
            z += z_loss * (lse.square() * valid).sum()
            if not need_grad:
                continue
            # d(ce)/d(logits) = softmax - onehot; d(z)/d(logits) = 2 z_loss lse softmax
            p.mul_((1 + 2 * z_loss * lse) * valid / total).scatter_add_(1, index, -valid)
            p = p.to(x.dtype)
            dx[a:b] = p @ W
            if x.dtype == weight.dtype:
                dW.addmm_(p.t(), xs)
            else:
                dW += p.t() @ xs
        ctx.save_for_backward(dx, dW)
        ctx.mark_non_differentiable(ce_ := ce.clone(), z, correct)
        return ce + z, ce_, z, correct

    @staticmethod
    def backward(ctx, grad, *_):
        """`grad` holds 1 / (targets in a step): rounded to bf16 it would be off by up to 0.4 % for all that lies below
        the head, and for the head itself not. So it multiplies in fp32, in pieces where that is a copy."""
        dx, dW = ctx.saved_tensors
        if dx.dtype.itemsize >= 4:
            return dx * grad, dW * grad, None, None, None
        out, rows = torch.empty_like(dx), 4096
        for a in range(0, len(dx), rows):
            out[a : a + rows] = dx[a : a + rows].float() * grad
        return out, dW * grad, None, None, None


# ---------------------------------------------------------------- the model

MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::topk", "lumen::experts")


def keep_matmuls(ctx, op, *args, **kwargs):
    """Selective recomputation: what is dear (products, attention) or decides (topk) is kept, the rest is made anew."""
    name = op.name() if hasattr(op, "name") else ""
    keep = name.partition(".")[0] in MATMULS or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(run, how: str, random: bool, *args):
    """run(*args), of which backward makes anew all (how: block) or all but the products (selective).

    Around a block, FSDP's hooks included, which count what they do in forward and in backward. But inside a compiled
    one: around it, selective would save buffers that the compiled code uses again, and backward would fail."""
    options = {"use_reentrant": False, "preserve_rng_state": random}
    if how == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, keep_matmuls
        )
    return checkpoint(run, *args, **options)


class Transformer(nn.Module):
    """A decoder-only language model. Attributes outside the configuration, set by whoever runs it:

    compute_dtype (fp32), z_loss (0), backend (sdpa), recompute in backward (none; block: all of it; selective: all but
    the products), causal (True: without training MoD chooses by its causal rule, False: as in training).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError("model.vocab_size is not set and no tokenizer says it")
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.head = Linear(cfg.d_model, cfg.vocab_size)
        self.compute_dtype, self.z_loss, self.backend = torch.float32, 0.0, "sdpa"
        self.recompute, self.causal = "none", True

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter; each has a generator of its own, so any sharding starts from the same weights.

        | parameter                       | initial value                        |
        |---------------------------------|--------------------------------------|
        | norms                           | 1                                    |
        | embed, head, wqkv, w13, routers | normal(0, init_std)                  |
        | wo, w2 (they add to the stream) | normal(0, init_std / sqrt(2 n_layers)) |
        | MoD's predictor                 | 0: at first it is the router         |

        By default init_std follows the width, so that a matrix's output is about 0.45 of its input at any: with 0.02 at
        width 128, three matrices in a row leave next to nothing, and a model learns late (EXPERIMENTS.md).
        Each expert has a generator of its own too, so spare slots change no other expert (routers they do).
        """
        for name, p in self.named_parameters():
            self.fill(name, p, seed)

    @torch.no_grad()
    def fill(self, name: str, p: torch.Tensor, seed: int, first: int = 0) -> None:
        """The initial values of one parameter; of experts' weights also of some alone, from number `first` on."""
        if p.dim() < 2 or "mod.predictor" in name:
            p.fill_(0.0 if "mod.predictor" in name else 1.0)
            return
        std = self.cfg.init_std
        if name.endswith(("wo.weight", "w2.weight", "experts.w2")):
            std /= math.sqrt(2 * self.cfg.n_layers)
        for e, part in enumerate(p if p.dim() == 3 else [p], first):
            digest = hashlib.blake2b(
                f"{seed}:{name}{f':{e}' if e else ''}".encode(), digest_size=8
            ).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            there = (
                part.device.type == "cpu" and part.is_contiguous() and part.dtype == torch.float32
            )
            value = torch.randn(
                part.shape, generator=generator, out=part.data if there else None
            ).mul_(std)
            if not there:
                part.copy_(value)

    def head_weight(self) -> torch.Tensor:
        """(V, C)."""
        return self.embed.weight if self.cfg.tie_embeddings else self.head.weight

    def forward(self, idx, targets=None, cache: KVCache | None = None):
        """idx (B, T) long.

        Without targets: logits (B, T, V) in the compute dtype.
        With a cache: idx continues each row; -1 pads rows on the right; logits (B, V) of each row's last real token.
        With targets (B, T), negative = ignored: (total, sums): total is what is differentiated, a sum over the valid
        targets; sums holds ce, z (z-loss), count (valid targets) and what sum_shapes names; when gradients are off
        also correct, and in evaluation of a model with MoD also depth (layers, 2): tokens kept, and agreeing.
        """
        cfg, (B, T) = self.cfg, idx.shape
        if cache is None:
            pos = torch.arange(T, device=idx.device)
        else:
            pos, real = cache.place(idx), (idx >= 0).sum(1)  # (B, T), (B,)
            idx = idx.clamp(min=0)
        rope = rope_tables(cfg, pos)
        x = F.embedding(idx, self.embed.weight).to(self.compute_dtype)
        x = F.dropout(x, cfg.dropout, self.training)
        found = []  # statistics of the sparse layers, block by block
        for i, block in enumerate(self.blocks):
            args = (x, rope, self.backend, cache, i, pos, self.causal)
            how = self.recompute if torch.is_grad_enabled() else "none"
            if how == "none" or block._compiled_call_impl is not None:
                change, stats = block(*args, how)
            else:
                change, stats = recomputed(block, how, block.random, *args)
            x = x + change
            found.append(stats)
        x = self.norm(x)
        if cache is not None:
            x = x[torch.arange(B, device=x.device), (real - 1).clamp(min=0)]
            cache.filled += real
        if targets is None:
            return F.linear(x, self.head_weight().to(x.dtype))
        grad, valid = torch.is_grad_enabled(), targets >= 0
        total, ce, z, correct = HeadLoss.apply(
            x.flatten(0, 1), self.head_weight(), targets.flatten(), self.z_loss, grad
        )
        stats = {"ce": ce, "z": z, "count": valid.sum().float()}
        if not grad:
            stats["correct"] = correct
        losses = [s["loss"] for s in found if "loss" in s]
        if losses and self.training:
            total = total + torch.stack(losses).sum()
        if self.training:
            for name in self.sum_shapes():
                if "." in name:  # of the sparse layers: (layers, ...)
                    stats[name] = torch.stack([s[name] for s in found if name in s])
        elif kept := [
            s for s in found if "kept" in s
        ]:  # (layers, 2): kept and agreeing among the valid tokens
            stats["depth"] = torch.stack(
                [torch.stack([(s[k] & valid).sum() for k in ("kept", "agree")]) for s in kept]
            )
        return total, stats

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each sum that a training step leaves; all of them add up over micro-steps and ranks."""
        shapes = {"ce": (), "z": (), "count": ()}
        moe, mod = self.sparse_layers("moe"), self.sparse_layers("mod")
        if moe:
            shapes |= {f"moe.{name}": (len(moe),) for name in SUMS}
            shapes["moe.counts"] = (len(moe), next(iter(moe.values())).router.n)
        if mod:
            shapes |= {f"mod.{name}": (len(mod),) for name in MOD_SUMS}
            shapes["mod.counts"] = (len(mod), self.cfg.max_seq_len)
        return shapes

    def sparse_layers(self, kind: str) -> dict[int, nn.Module]:
        """The MoE (kind moe) or MoD (kind mod) modules by layer."""
        picked = {
            i: block.ffn if kind == "moe" else block.mod for i, block in enumerate(self.blocks)
        }
        return {i: m for i, m in picked.items() if isinstance(m, (MoE, MoD))}

    def set_step(self, step: int) -> None:
        """Anneal MoD's capacity: from 1.0 to its target in eight equal steps over cfg.mod_anneal_steps."""
        for mod in self.sparse_layers("mod").values():
            done = (
                min(1.0, 8 * step // self.cfg.mod_anneal_steps / 8)
                if self.cfg.mod_anneal_steps
                else 1.0
            )
            if (capacity := 1 - (1 - mod.target) * done) != mod.capacity:
                mod.set_capacity(capacity)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        seeds: list[int],
        stop_ids: tuple[int, ...] = (),
        n_vocab: int | None = None,
        **sampling,
    ) -> Iterator[list[int | None]]:
        """Continue a ragged batch of prompts; yields one id per row and step, None for rows that have ended.

        Each row draws from a generator of its own, so its text does not depend on its neighbours. `n_vocab` masks the
        rows of a padded vocabulary. Sampling options: see `choose`. A row ends after one of stop_ids, all rows after
        max_new_tokens; the caller keeps prompt + new tokens within the context it trusts.
        """
        was_training, device = self.training, self.embed.weight.device
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        longest = max(map(len, prompts))
        cache = KVCache(
            self.cfg, len(prompts), longest + max_new_tokens, device, self.compute_dtype
        )
        idx = torch.tensor([p + [-1] * (longest - len(p)) for p in prompts], device=device)
        seen = torch.zeros(len(prompts), self.cfg.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        alive = [True] * len(prompts)
        trained = {moe: moe.backend for moe in self.sparse_layers("moe").values()}
        for moe, name in trained.items():
            sizes = (self.cfg.d_model, self.cfg.d_expert)
            moe.backend = for_generation(name, device, self.compute_dtype, *sizes)
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits = self(idx, cache=cache).float().cpu()
                if not logits.isfinite().all():
                    raise FloatingPointError("the model's logits are NaN or infinite")
                logits[:, n_vocab or self.cfg.vocab_size :] = -math.inf
                ids = choose(logits, seen, generators, **sampling)
                seen[torch.arange(len(ids)), ids] = True
                out = [i if a else None for i, a in zip(ids.tolist(), alive)]
                yield out
                alive = [a and i not in stop_ids for a, i in zip(alive, out)]
                if not any(alive):
                    break
                idx = torch.tensor([[i if a else -1] for i, a in zip(out, alive)], device=device)
        finally:  # also when the caller stops listening
            self.train(was_training)
            for moe, name in trained.items():
                moe.backend = name

    # ---- arithmetic

    def n_params(self) -> dict[str, int]:
        """Parameters: total, active per token (K of the experts; null experts save their share), without embeddings."""
        cfg, total = self.cfg, sum(p.numel() for p in self.parameters())
        tables = self.embed.weight.numel() * (1 if cfg.tie_embeddings else 2)
        idle = 0
        for moe in self.sparse_layers("moe").values():
            each = 3 * cfg.d_model * cfg.d_expert
            idle += moe.router.slots * each - round(self.experts_used() * each)
        return {"total": total, "active": total - idle, "non_embedding": total - tables}

    def experts_used(self) -> float:
        """Experts that compute something for a token, on average when loads are balanced."""
        cfg = self.cfg
        return cfg.n_experts_per_token * cfg.n_experts / max(1, cfg.n_experts + cfg.n_null_experts)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Training FLOPs per token, forward and backward: 6 per weight that multiplies + 12 L H D T for attention.

        PaLM's convention (Chowdhery et al. 2022, appendix B): causality is not discounted, so that MFUs compare. Of the
        experts those that are used count; in a MoD layer of capacity c weights count c times, attention c^2 times.
        """
        cfg, T = self.cfg, seq_len or self.cfg.max_seq_len
        flops = 6 * cfg.vocab_size * cfg.d_model
        for i, block in enumerate(self.blocks):
            c = block.mod.capacity if block.mod is not None else 1.0
            attn = sum(p.numel() for p in block.attn.parameters() if p.dim() >= 2)
            ffn = sum(p.numel() for p in block.ffn.parameters() if p.dim() == 2)
            if cfg.is_moe(i):
                ffn += self.experts_used() * 3 * cfg.d_model * cfg.d_expert
            mod = (
                sum(p.numel() for p in block.mod.parameters() if p.dim() == 2)
                if block.mod is not None
                else 0
            )
            deep = 1.0 if cfg.mod_ffn_only else c  # the share of tokens that attention computes
            flops += (
                6 * (deep * attn + c * ffn + mod) + 12 * cfg.n_heads * cfg.head_dim * T * deep**2
            )
        return round(flops)

    def kv_cache_bytes(self, tokens: int = 1, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values for `tokens` tokens of one sequence."""
        cfg = self.cfg
        return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * tokens * bytes_per_value


def choose(
    logits: torch.Tensor,  # (B, V) fp32 on the CPU
    seen: torch.Tensor,  # (B, V) bool: ids that occurred before in each row
    generators: list[torch.Generator],
    temperature: float = 1.0,  # 0: the most likely token
    top_k: int = 0,  # keep the k most likely; 0: all
    top_p: float = 1.0,  # keep the smallest set with this much probability
    min_p: float = 0.0,  # keep what has at least this share of the largest probability
    repetition_penalty: float = 1.0,  # divides positive and multiplies negative logits of seen ids (Keskar et al. 2019)
) -> torch.Tensor:
    """The next id of each row (B,), in the order of transformers: penalty, temperature, top-k, top-p, min-p."""
    if repetition_penalty != 1.0:
        punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = (
        logits - logits.amax(-1, keepdim=True)
    ) / temperature  # at most 0: no temperature is too small
    k, order = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1], None
    if k < logits.shape[-1] or top_p < 1.0:  # from here on only the candidates, most likely first
        logits, order = (
            logits.topk(k, -1) if k < logits.shape[-1] else logits.sort(-1, descending=True)
        )
    p = logits.softmax(-1)
    if top_p < 1.0:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # what is likelier suffices
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    # one uniform number per row, found in the cumulative distribution: a number per id would cost more than all above
    total = p.double().cumsum(-1)
    u = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=g) for g in generators])
    pick = (total <= u * total[:, -1:]).sum(-1, keepdim=True)
    return (pick if order is None else order.gather(-1, pick))[:, 0]
