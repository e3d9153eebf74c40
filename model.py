"""The whole transformer, top to bottom: ModelConfig, RMSNorm, RoPE, KV cache, attention, SwiGLU,
Block, head and loss, Transformer (init, forward, generate, counts, FLOPs). The sparse layers, MoE
and MoD, are in model_moe.py. The two files work by themselves; beside kernels*.py they are faster.

Qwen3-shaped by default: pre-norm RMSNorm, RoPE in the half-rotation convention, GQA with fused QKV,
QK-norm per head before RoPE, SwiGLU with fused gate and up, no biases. `qk_norm: false` is Llama.
No autocast: parameters are fp32, each layer casts its weight to the dtype of its input, and
`model.compute_dtype` decides that dtype at the embedding.

Names: B batch, T tokens, C = d_model, H heads, G key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import checkpoint as remat

from model_moe import MoD, MoE

# ---------------------------------------------------------------- configuration


# What the formulas below need. Sizes and periods that something is divided by:
AT_LEAST_ONE = ("d_model", "n_layers", "n_heads", "multiple_of", "max_seq_len")
AT_LEAST_ONE += ("moe_every", "mod_every")
# and names that something is chosen by: a misspelt one would quietly be another model
NAMES = {
    "norm_order": ("pre", "lunaris"),
    "init_outputs": ("scaled", "same", "zero"),
    "router": ("softmax", "sigmoid"),
    "mod_routing": ("learned", "static", "random"),
}
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass
class ModelConfig:
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
    rope_scaling: dict | None = None  # longer contexts: {type: linear | yarn | llama3, factor ...}
    rope_first: bool = False  # QK-norm after RoPE (Lunaris' main branch); does not export
    dropout: float = 0.0  # on the embedding and on what attention and FFN add, 0 to 1
    norm_eps: float = 1e-6  # RMSNorm's epsilon
    init_std: float | None = None  # of the initial weights; null: 0.02 sqrt(512 / d_model)
    init_outputs: str = "scaled"  # of wo and w2, which add to the stream; or same | zero
    init_embedding: float | None = None  # std of the embedding, tied: of the head too; null: as all
    init_head: float | None = None  # std of an untied head; null: as all
    qk_norm: bool = True  # RMSNorm on queries and keys; false with norm_order pre: Llama
    tie_embeddings: bool = True  # the head is the embedding, no second parameter
    norm_order: str = "pre"  # pre | lunaris (no pre-attention norm, QK-norm over whole vectors)
    extras: list | None = None  # of value_residual, x0, relu2, softcap, which do not export
    # Mixture of Experts (n_experts: 0 is a dense model)
    n_experts: int = 0  # routed experts per MoE layer
    n_experts_per_token: int = 2  # K, experts that each token visits
    d_expert: int = 0  # hidden width of an expert; 0: d_ff
    n_shared_experts: int = 0  # visited by every token, one SwiGLU of this many times d_expert
    n_dense_layers: int = 0  # the first layers keep the dense FFN of width d_ff
    moe_every: int = 1  # of the layers after them, every n-th is MoE (the n-th, the 2n-th ...)
    moe_layers: list | None = None  # or: exactly these layers, counted from 0
    router: str = "softmax"  # softmax | sigmoid (the bias chooses, the score weighs: DeepSeek-V3)
    norm_topk: bool | None = None  # gates of a token sum to 1; null: where K > 1 (K = 1 learns not)
    route_scale: float = 1.0  # factor on the gates
    aux_loss_weight: float | None = None  # load balancing loss; null: 1e-2, for sigmoid 1e-4
    router_z_loss_weight: float | None = None  # logsumexp(logits)^2; null: 1e-3, for sigmoid 0
    bias_update_rate: float | None = None  # of the choosing bias; null: 0, sigmoid or nulls 1e-3
    capacity_factor: float | None = None  # times the fair share per expert; null: drops nothing
    routing_temperature: float = 1.0  # divides the router's logits
    router_jitter: float = 0.0  # training noise on the router's input: times uniform(1 - x, 1 + x)
    expert_dropout: float = 0.0  # share of experts not to be chosen, drawn each training step
    n_experts_max: int = 0  # slots, to add, split and prune experts while training; 0: no surgery
    n_null_experts: int = 0  # choices that compute nothing, so that depth varies by token
    # Mixture of Depths (mod_capacity: 1.0 is off)
    mod_capacity: float | list = 1.0  # share of tokens a MoD layer computes; or one per layer
    mod_routing: str = "learned"  # learned | static (evenly spaced positions) | random
    mod_start_layer: int = 0  # first layer, from 0
    mod_end_layer: int | None = None  # last layer; null: the last there is
    mod_every: int = 1  # of the layers between, every n-th is MoD (the n-th, the 2n-th ...)
    mod_layers: list | None = None  # or: exactly these layers, counted from 0
    mod_ffn_only: bool = False  # only the FFN skips tokens, attention sees all
    mod_anneal_steps: int = 0  # capacity falls from 1.0 in eight equal steps over this many steps

    def __post_init__(self):
        """Fill in what follows from the rest. ValueError where the arithmetic would fail; what a
        user may write is checked in full, and with a remedy, by lumen/model_keys.py."""
        for key in AT_LEAST_ONE:
            self.require(key, getattr(self, key) >= 1, "must be at least 1")
        self.fill_in()
        self.require("d_ff", self.d_ff >= 1, "must be at least 1; so says ffn_hidden_multiplier")
        for key in ("head_dim", "n_kv_heads"):
            self.require(key, getattr(self, key) >= 1, "must be at least 1")
        self.require("head_dim", self.head_dim % 2 == 0, "is odd; RoPE turns pairs, so be it even")
        self.require("n_kv_heads", self.n_heads % self.n_kv_heads == 0, "does not divide n_heads")
        for key, names in NAMES.items():
            self.require(key, getattr(self, key) in names, f"is not one of {', '.join(names)}")
        if self.rope_scaling is not None:
            kind = rope_kind(self.rope_scaling)
            text = f"has type {kind!r}, not one of {', '.join(ROPE_SCALINGS)}"
            self.require("rope_scaling", kind in ROPE_SCALINGS, text)
        if self.norm_order == "lunaris":
            text = "does not go with norm_order lunaris: no norm would be left"
            self.require("qk_norm", self.qk_norm, text)
        if isinstance(self.mod_capacity, list):
            L, given = self.n_layers, len(self.mod_capacity)
            text = f"needs {L} numbers, one per layer, not {given}"
            self.require("mod_capacity", given == L, text)
        self.require("n_experts", self.n_experts >= 0, "must be at least 0, a dense model")
        if self.n_experts:
            self.require_experts()

    def require_experts(self) -> None:
        text = f"must be from 1 to n_experts, {self.n_experts}"
        self.require("n_experts_per_token", 1 <= self.n_experts_per_token <= self.n_experts, text)
        for key in ("d_model", "d_expert"):
            # grouped GEMMs need rows of 16 bytes, in every precision
            size = getattr(self, key)
            text = f"must be a multiple of 8 in a MoE; near it: {max(8, round(size / 8) * 8)}"
            self.require(key, size >= 1 and size % 8 == 0, text)

    def require(self, key: str, holds: bool, text: str) -> None:
        if not holds:
            value = getattr(self, key)
            value = str(value).lower() if isinstance(value, bool) else repr(value)
            raise ValueError(f"model.{key}: {value} {text}")

    def fill_in(self) -> None:
        """Defaults that depend on other keys: null, and the sizes that are 0."""
        if not self.head_dim:
            divides = self.d_model % self.n_heads == 0
            self.require("n_heads", divides, f"does not divide d_model {self.d_model}")
            self.head_dim = self.d_model // self.n_heads
        # as many as query heads is ordinary attention, 1 is multi-query, between them GQA
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if not self.d_ff:
            hidden = int(self.ffn_hidden_multiplier * self.d_model)
            if "relu2" not in (self.extras or []):
                # SwiGLU has three matrices where an ordinary FFN has two
                hidden = int(2 * hidden / 3)
            self.d_ff = self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)
        self.d_expert = self.d_expert or self.d_ff
        if self.init_std is None:
            self.init_std = 0.02 * math.sqrt(512 / self.d_model)
        if self.norm_topk is None:
            # with one expert its normalised gate is always 1, and the router would learn nothing
            self.norm_topk = self.n_experts_per_token > 1
        sigmoid = self.router == "sigmoid"
        if self.aux_loss_weight is None:
            self.aux_loss_weight = 1e-4 if sigmoid else 1e-2
        if self.router_z_loss_weight is None:
            self.router_z_loss_weight = 0.0 if sigmoid else 1e-3
        if self.bias_update_rate is None:
            self.bias_update_rate = 1e-3 if sigmoid or self.n_null_experts else 0.0

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's FFN is made of experts."""
        if not self.n_experts:
            return False
        if self.moe_layers is not None:
            return layer in self.moe_layers
        after = layer - self.n_dense_layers
        return after >= 0 and (after + 1) % self.moe_every == 0

    def capacity(self, layer: int) -> float:
        """The share of tokens that this layer computes; 1.0: it has no MoD."""
        if isinstance(self.mod_capacity, list):
            return float(self.mod_capacity[layer])
        if self.mod_layers is not None:
            routed = layer in self.mod_layers
        else:
            last = self.n_layers - 1 if self.mod_end_layer is None else self.mod_end_layer
            after = layer - self.mod_start_layer
            inside = self.mod_start_layer <= layer <= last
            routed = inside and (after + 1) % self.mod_every == 0
        return float(self.mod_capacity) if routed else 1.0


def role(name: str) -> str:
    """What a parameter is, by its name: embedding | head | norm | router | expert | matrix.

    Whoever treats parameters differently asks here: optimizer groups, precision, sharding, counts.
    MoD's router and its predictor count as router; a shared expert's weights are matrices.
    """
    # by whole modules, never by parts of a word: "wnorm" is no norm
    modules = name.split(".")[:-1]
    if "experts" in modules:
        return "expert"
    if "router" in modules or "predictor" in modules:
        return "router"
    if modules[-1].endswith(("norm", "mix")):  # mix: of lumen/extras.py
        return "norm"
    return {"embed": "embedding", "head": "head"}.get(modules[0], "matrix")


# ---------------------------------------------------------------- layers


class Linear(nn.Linear):
    """y = x W^T without bias; the fp32 weight is cast to x's dtype (this replaces autocast)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))  # (..., n_in) -> (..., n_out)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # in fp32: bf16 cannot sum the squares, and beyond 256 fp16 cannot hold one
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


def rope_kind(scaling: dict):
    """What kind of rope_scaling it is, by transformers' old name for that or the new one."""
    return scaling.get("rope_type", scaling.get("type"))


def rope_tables(cfg: ModelConfig, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, (..., T, 1, D) fp32, for positions (..., T); see rotate().

    Su et al. 2021. Computed anew in each forward pass: a table kept in the model would be cast
    along with it.
    """
    D = cfg.head_dim
    # D/2 frequencies, from one radian a token down to about one in rope_theta tokens
    pair = torch.arange(D // 2, device=pos.device, dtype=torch.float32)
    freq, gain = 1.0 / cfg.rope_theta ** (2 * pair / D), 1.0
    if rope_kind(cfg.rope_scaling or {}) not in (None, "default"):
        from lumen.rope_scaling import scaled  # upward, so not where this file is copied out

        freq, gain = scaled(cfg, freq)
    # in fp32: bf16 knows position 4,000 only to the next multiple of 16
    angle = pos[..., None, None].float() * torch.cat((-freq, freq))
    return angle.cos() * gain, angle.sin() * gain


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (a, b) that lie at i and i + D/2 of x (B, T, H, D), the half-rotation: to
    (a cos - b sin, b cos + a sin). The first half of rope's sines is negative."""
    cos, sin = rope
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of a batch for decoding, of static shape (B, G, length + 1, D) per layer.

    Rows are ragged: `filled` (B,) counts the tokens each has; the caller keeps it within `length`.
    The slot behind takes the padding and is never read. `used`, a plain int, bounds `filled`, and
    attention looks no further. What MoD routes around a layer is not stored: `kept` says which.
    """

    def __init__(self, cfg: ModelConfig, batch: int, length: int, device=None, dtype=torch.float32):
        shape = (batch, cfg.n_kv_heads, length + 1, cfg.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
        self.filled = torch.zeros(batch, dtype=torch.long, device=device)  # tokens of each row
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1), to index with pos (B, T)
        self.length = length
        self.used = 0
        self.kept = {}  # layer -> (B, length + 1): which tokens it has computed
        for i in range(cfg.n_layers):
            if cfg.capacity(i) < 1 and not cfg.mod_ffn_only:
                self.kept[i] = torch.zeros(batch, length + 1, dtype=torch.bool, device=device)

    def place(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of new tokens idx (B, T), -1 pads on the right: (positions, slots), (B, T) each. Makes
        the mask. In lumen/scorer.py's cache slots are no positions."""
        T = idx.shape[1]
        pos = self.filled[:, None] + torch.arange(T, device=idx.device)
        pos = pos.masked_fill(idx < 0, self.length)  # padding goes to the slot that nobody reads
        real = (idx >= 0).sum(1)  # (B,), tokens that are no padding
        self.filled += real
        self.last = self.rows[:, 0], (real - 1).clamp(min=0)  # of each row
        # an upper bound that the host knows; the true lengths would be a sync a token
        self.used = min(self.used + T, self.length)
        self.mask = self.before(pos)
        return pos, pos

    def before(self, pos: torch.Tensor) -> torch.Tensor:
        """Which of the used slots lie at or before pos (B, T): (B, 1, T, used)."""
        return torch.arange(self.used, device=pos.device) <= pos[:, None, :, None]

    def write(self, layer: int, pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store k, v (B, T, G, D) at pos (B, T); return all the layer has, (B, G, used, D) each."""
        self.k[layer][self.rows, :, pos] = k
        self.v[layer][self.rows, :, pos] = v
        if layer in self.kept:
            self.kept[layer][self.rows, pos] = True
        return self.k[layer][:, :, : self.used], self.v[layer][:, :, : self.used]

    def visible(self, layer: int, pos: torch.Tensor) -> torch.Tensor:
        """Which of the used slots queries at pos (B, T) may look at, (B, 1, T, used)."""
        if layer not in self.kept:
            return self.mask
        return self.before(pos) & self.kept[layer][:, None, None, : self.used]


# ---------------------------------------------------------------- attention


class AttentionInputs(NamedTuple):
    """What one forward pass gives to every attention layer beside the stream. MoD replaces rope,
    pos and slots by those of the tokens that it lets through."""

    rope: tuple[torch.Tensor, torch.Tensor]  # cos and sin, (T, 1, D) or (B, T, 1, D)
    backend: str = "sdpa"  # or one of kernels_attention.ATTENTION
    cache: KVCache | None = None  # decoding
    pos: torch.Tensor | None = None  # (T,) or with a cache (B, T)
    slots: torch.Tensor | None = None  # (B, T), where the cache stores them
    causal: bool = True  # in evaluation MoD chooses by its causal rule; False: as in training
    docs: tuple | None = None  # kernels_attention.Documents, which do not see each other
    first: tuple | None = None  # what the first block gives the others: lumen/extras.py


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE and optional QK-norm; x (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig, layer: int = 0):
        super().__init__()
        self.cfg = cfg
        self.layer = layer
        H, G, D = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.sizes = [H * D, G * D, G * D]
        self.wqkv = Linear(cfg.d_model, sum(self.sizes))
        self.wo = Linear(H * D, cfg.d_model)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(D, cfg.norm_eps)
            self.k_norm = RMSNorm(D, cfg.norm_eps)

    def norm_and_rotate(self, q, k, inputs: AttentionInputs):
        """q (B, T, H, D) and k (B, T, G, D): a norm per head, then RoPE."""
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, inputs.rope), rotate(k, inputs.rope)

    def forward(self, x, inputs: AttentionInputs):
        return self.attended(*self.project(x), inputs)

    def project(self, x):
        """Queries (B, T, H, D), keys and values (B, T, G, D), by one matmul for all three."""
        parts = self.wqkv(x).split(self.sizes, dim=-1)
        return [part.view(*x.shape[:2], -1, self.cfg.head_dim) for part in parts]

    def attended(self, q, k, v, inputs: AttentionInputs):
        q, k = self.norm_and_rotate(q, k, inputs)
        if inputs.docs is not None or (inputs.backend != "sdpa" and inputs.cache is None):
            from kernels_attention import attention  # optional; lumen/attention.py has tried it

            y = attention(q, k, v, inputs.backend, inputs.docs)
        else:
            y = self.attend(q, k, v, inputs)
        return self.wo(y.flatten(2))

    def attend(self, q, k, v, inputs: AttentionInputs):
        """softmax(q k^T / sqrt(D)) v, causal, (B, T, H, D); torch picks its fastest kernel."""
        shape = q.shape
        q = q.transpose(1, 2)  # (B, H, T, D)
        if inputs.cache is None:
            # without a mask: only so may torch take its flash kernel
            options = {"is_causal": True}
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, D)
        else:
            k, v = inputs.cache.write(self.layer, inputs.slots, k, v)  # (B, G, used, D)
            options = {"attn_mask": inputs.cache.visible(self.layer, inputs.slots)}
            if shape[1] == 1:
                # the queries of a key head as if they were tokens: bf16 on a CPU is 5 times as fast
                q = q.reshape(*k.shape[:2], -1, shape[3])  # (B, G, H / G, D)
        # each key head serves H / G query heads, without a copy where a kernel can
        options["enable_gqa"] = k.shape[1] != q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return y.reshape(shape) if shape[1] == 1 else y.transpose(1, 2)


# ---------------------------------------------------------------- block


class SwiGLU(nn.Module):
    """w2(silu(gate) * up), gate and up in one matrix, gate first (Shazeer 2020); (..., C)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w13 = Linear(d_model, 2 * d_ff)  # gate and up: one matmul in place of two
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)  # (..., d_ff) each
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """What attention and FFN add to the stream: x (B, T, C) -> (change (B, T, C), statistics).

    h = attention(norm(x)); change = h + FFN(norm(x + h)). The FFN is SwiGLU or MoE; with MoD the
    block, or only its FFN, computes a share of the tokens. Statistics are those of sparse layers.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        pre = cfg.norm_order == "pre"
        # an Identity has no parameter, so a checkpoint of this kind has no name for it
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps) if pre else nn.Identity()
        attention = Attention
        if cfg.rope_first or not pre:
            # Lunaris Codex' two variants. Upward, so they do not go where this file is copied out.
            from lumen.lunaris import LunarisAttention as attention
        self.attn = attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        if cfg.is_moe(layer):
            shared = None
            if cfg.n_shared_experts:
                # n experts that everybody visits are one that is n times as wide
                shared = SwiGLU(cfg.d_model, cfg.n_shared_experts * cfg.d_expert)
            self.ffn = MoE(cfg, shared)
        else:
            self.ffn = SwiGLU(cfg.d_model, cfg.d_ff)
        self.mod = MoD(cfg, layer) if cfg.capacity(layer) < 1 else None
        self.ffn_only = cfg.mod_ffn_only
        self.dropout = cfg.dropout
        # whether backward must see the same random numbers when it makes the block anew
        self.random = cfg.dropout > 0 or cfg.router_jitter > 0 or cfg.mod_routing == "random"

    def forward(self, x, inputs: AttentionInputs, recompute: str = "none"):
        """`recompute`: see recomputed(). In here only where the block is compiled."""
        if recompute != "none":
            return recomputed(self.routed, recompute, self.random, x, inputs)
        return self.routed(x, inputs)

    def routed(self, x, inputs: AttentionInputs):
        """The block on all tokens, or on those that MoD lets through."""
        if self.mod is not None and not self.ffn_only:
            return self.mod(x, self.branch, inputs)
        return self.branch(x, inputs)

    def branch(self, x, inputs: AttentionInputs):
        """The block on all the tokens it is given."""
        h = self.attn(self.attn_norm(x), inputs)  # (B, T, C)
        h = F.dropout(h, self.dropout, self.training)
        if self.mod is not None and self.ffn_only:
            y, stats = self.mod(x + h, self.ffn_branch, inputs)
        else:
            y, stats = self.ffn_branch(x + h, inputs)
        # the change, not x plus it: MoD scales it by its gate, and the caller adds it once
        return h + y, stats

    def ffn_branch(self, x, inputs: AttentionInputs):
        x, stats = self.ffn_norm(x), {}  # SwiGLU has none
        if isinstance(self.ffn, MoE):
            y, stats = self.ffn(x, inputs.docs)
        else:
            y = self.ffn(x)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training), stats


def recomputed(run, how: str, random: bool, *args):
    """run(*args), of which backward makes anew everything (how: block) or all but the matmuls
    (selective).

    It stands around a block, FSDP's hooks included, which count what they do in forward and in
    backward. A compiled block has it inside: around it, selective would save buffers that the
    compiled code uses again, and backward would fail.
    """
    # keeping the random state costs a copy from the device, so only where something is drawn
    options = {"use_reentrant": False, "preserve_rng_state": random}
    if how == "selective":
        from lumen.activations import keep_matmuls  # upward, so not where this file is copied out

        make = functools.partial(remat.create_selective_checkpoint_contexts, keep_matmuls)
        options["context_fn"] = make
    return remat.checkpoint(run, *args, **options)


# ---------------------------------------------------------------- head and loss


def head_rows(V: int, C: int, itemsize: int, cuda: bool) -> int:
    """Tokens whose logits HeadLoss holds at a time: on a CPU 16 MB of them; on CUDA as many bytes
    as the head's gradient takes: with fewer tokens that would be read and written too often."""
    if cuda:
        return max(64, max(1 << 26, 4 * V * C) // (V * itemsize))
    return max(64, (1 << 22) // V)


def cross_entropy(logits, targets, z_loss: float, need_grad: bool):
    """Of some tokens' logits (n, V), which are used up, and targets (n,), negative = ignored: the
    sums (3,) that HeadLoss returns, and the gradient of the first two (n, V)."""
    valid = (targets >= 0)[:, None].float()  # (n, 1)
    index = targets.clamp(min=0)[:, None]
    logits = logits.float()
    right = logits.gather(1, index)
    hits = torch.zeros_like(valid)
    if not need_grad:
        hits = (logits.argmax(-1, keepdim=True) == index) * valid
    top = logits.amax(-1, keepdim=True)  # (n, 1)
    # in place and once: on CPU this costs as much as a fifth of the matmuls
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = top + total.log()  # (n, 1), of the shifted logits, so exp cannot overflow
    ce, z = ((lse - right) * valid).sum(), z_loss * (lse.square() * valid).sum()
    if need_grad:
        # d(ce)/d(logits) = softmax - onehot; d(z)/d(logits) = 2 z_loss lse softmax
        p.mul_((1 + 2 * z_loss * lse) * valid / total).scatter_add_(1, index, -valid)
    return torch.stack((ce, z, hits.sum())), p


class HeadLoss(torch.autograd.Function):
    """Sum over tokens of cross-entropy + z_loss logsumexp^2 of logits x W^T, never all at once.

    The gradient of x and W is computed chunk by chunk in the forward pass (backward only scales
    it): three matmuls in all, as with full logits. x (N, C), weight (V, C), targets (N,), negative
    = ignored. Returns (total, ce, z, correct), fp32; the last without gradients only.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, z_loss: float, need_grad: bool, fused=False):
        of_chunk = cross_entropy
        if fused == "capped":
            from lumen.extras import cross_entropy as of_chunk
        elif fused:
            from kernels_triton import cross_entropy as of_chunk
        W = weight.to(x.dtype)  # (V, C)
        # at 50,000 ids the full logits would be 200 kB a token
        rows = head_rows(*weight.shape, x.dtype.itemsize, x.is_cuda)
        dx = torch.empty_like(x) if need_grad else None  # (N, C)
        dW = None  # under LoRA the weight is frozen
        if need_grad and ctx.needs_input_grad[1]:
            dW = torch.zeros_like(weight)  # (V, C), fp32 as the weight: many chunks add up in it
        sums = torch.zeros(3, device=x.device)
        starts = list(range(0, len(x), rows))
        if len(starts) > 1 and starts[-1] == len(x) - 1:
            # a single row, alone, loses two digits of its gradient in MKL on Intel: to those before
            starts.pop()
        for a, b in zip(starts, [*starts[1:], len(x)]):
            p = None  # the last chunk's are freed before this one's are made
            xs = x[a:b]
            found, p = of_chunk(F.linear(xs, W), targets[a:b], z_loss, need_grad)
            sums += found
            if need_grad:
                p = p.to(x.dtype)  # (n, V)
                dx[a:b] = p @ W
            if dW is None:
                continue
            if x.dtype == weight.dtype:
                dW.addmm_(p.t(), xs)
            elif x.is_cuda:  # cuBLAS adds bf16 matmuls up in fp32: there is no second copy
                torch.addmm(dW, p.t(), xs, out_dtype=dW.dtype, out=dW)
            else:
                dW += p.t() @ xs
        ctx.save_for_backward(dx, dW)
        # only the total is differentiated; the others are to be looked at
        ce, z, correct = (value.clone() for value in sums)
        ctx.mark_non_differentiable(ce, z, correct)
        return ce + z, ce, z, correct

    @staticmethod
    def backward(ctx, grad, *_):
        """`grad` holds 1 / (targets in a step), which bf16 would put off by up to 0.4 %: so it
        multiplies in fp32, and in place, for both are large (torch refuses a second backward)."""
        dx, dW = ctx.saved_tensors
        for part in dx.split(4096):  # rows: of 32 MB in fp32 at a width of 2,048
            part.copy_(part.float() * grad)
        return dx, None if dW is None else dW.mul_(grad), None, None, None, None


# ---------------------------------------------------------------- the next token


def choose(
    logits: torch.Tensor,  # (B, V) fp32 on the CPU
    generators: list[torch.Generator],  # one a row
    temperature: float = 1.0,  # 0: the most likely token
    top_k: int = 0,  # only the k most likely; 0: all
) -> torch.Tensor:
    """The next id of each row, (B,). top-p, min-p and penalties: lumen/sampling.py."""
    if temperature < 1e-30:  # or 0 / 0 in fp32
        return logits.argmax(-1)
    # at most 0 before the division: so none of the rest is too small
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k, -1)  # (B, k) each
        return order.gather(-1, draw(logits.softmax(-1), generators))[:, 0]
    return draw(logits.softmax(-1), generators)[:, 0]


def draw(p: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Where in its row of p (B, n), which need not add up to 1, each row's token lies: (B, 1)."""
    # one uniform number per row, found in the cumulative distribution: a number per id would cost
    # more than all the rest
    total = p.double().cumsum(-1)  # (B, n)
    u = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=g) for g in generators])
    return (total <= u.to(p.device) * total[:, -1:]).sum(-1, keepdim=True)


# ---------------------------------------------------------------- the model


class Transformer(nn.Module):
    """A decoder-only language model. Attributes outside the configuration, set by whoever runs it:

    compute_dtype (fp32), z_loss (0), fused_loss (Triton's), backend (sdpa), recompute in backward
    (none; block: all; selective: all but the matmuls), causal (see AttentionInputs), skip_masked.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError("model.vocab_size is not set and no tokenizer says it")
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        block, self.cap = Block, None
        if cfg.extras:
            # upward, so they do not go where this file is copied out
            from lumen.extras import ExtraBlock as block
            from lumen.extras import cap

            self.cap = cap if "softcap" in cfg.extras else None
        self.blocks = nn.ModuleList(block(cfg, i) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        # tied: there is no second parameter, forward takes the embedding's
        if not cfg.tie_embeddings:
            self.head = Linear(cfg.d_model, cfg.vocab_size)
        self.compute_dtype = torch.float32
        self.z_loss = 0.0
        self.fused_loss = False
        self.skip_masked = False  # on a GPU the host would wait to know what is masked
        self.backend = "sdpa"
        self.recompute = "none"
        self.causal = True
        self.cache_type = KVCache  # of generate; lumen/kv_int8.py has one of half the bytes

    def init_weights(self, seed: int) -> None:
        """Fill every parameter; each has a generator of its own, so any sharding starts alike.

        | parameter                       | initial value                                     |
        |---------------------------------|---------------------------------------------------|
        | norms                           | 1                                                 |
        | wqkv, w13, routers              | normal(0, init_std)                               |
        | embed, head                     | the same, or init_embedding, init_head as the std |
        | wo, w2 (they add to the stream) | init_outputs scaled: std init_std / sqrt(2        |
        |                                 | n_layers); same: init_std; zero: 0                |
        | MoD's predictor                 | 0: at first it is the router                      |

        By default init_std follows the width: with 0.02 at width 128, three matrices in a row leave
        next to nothing (EXPERIMENTS.md). Each expert has a generator of its own too, so spare slots
        change no other expert (routers they do).
        """
        for name, p in self.named_parameters():
            self.fill(name, p, seed)

    @torch.no_grad()
    def fill(self, name: str, p: torch.Tensor, seed: int, first: int = 0) -> None:
        """The initial values of one parameter; or of some experts alone, from number `first` on."""
        if "mod.predictor" in name:
            p.fill_(0.0)
            return
        if role(name) == "norm":
            p.fill_(1.0)
            return
        std = self.initial_std(name)
        parts = p if role(name) == "expert" else [p]
        for e, part in enumerate(parts, first):
            key = f"{seed}:{name}:{e}" if e else f"{seed}:{name}"
            # not hash(), which Python salts anew in every process
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            # drawn on the CPU in fp32 whatever the device, so every device starts from the same
            part.copy_(torch.randn(part.shape, generator=generator).mul_(std))

    def initial_std(self, name: str) -> float:
        cfg = self.cfg
        if name.endswith(("wo.weight", "w2.weight", "experts.w2")):
            # 2 n_layers of these add to the stream, so each adds that much less (GPT-2)
            scaled = cfg.init_std / math.sqrt(2 * cfg.n_layers)
            return {"scaled": scaled, "same": cfg.init_std, "zero": 0.0}[cfg.init_outputs]
        own = {"embedding": cfg.init_embedding, "head": cfg.init_head}.get(role(name))
        return cfg.init_std if own is None else own

    def head_weight(self) -> torch.Tensor:
        """(V, C)."""
        return self.embed.weight if self.cfg.tie_embeddings else self.head.weight

    def forward(self, idx, targets=None, cache: KVCache | None = None, docs=None):
        """idx (B, T) long -> without targets logits (B, T, V) in the compute dtype.

        With a cache: idx continues each row; -1 pads rows on the right; logits (B, V) of each row's
        last real token.
        With targets (B, T), negative = ignored: (total, sums). total is what is differentiated, a
        sum over the valid targets. sums are tensors by name: ce, z (z-loss), count (valid targets)
        and in training the sparse layers' (model_moe.SUMS and MOD_SUMS); without gradients correct;
        in evaluation of MoD depth (layers, 2): valid tokens kept, and those the rules agree on.
        docs, Documents or a tensor (B, T) like its `of`, do not see each other. Positions run on:
        to RoPE only distances count.
        """
        if cache is None:
            pos, slots = torch.arange(idx.shape[1], device=idx.device), None  # (T,)
        else:
            pos, slots = cache.place(idx)  # (B, T) each
            idx = idx.clamp(min=0)
        rope = rope_tables(self.cfg, pos)
        if docs is not None:
            from kernels_attention import documents  # optional, too

            docs = documents(docs, self.backend, self.compute_dtype)
        inputs = AttentionInputs(rope, self.backend, cache, pos, slots, self.causal, docs)
        x = F.embedding(idx, self.embed.weight).to(self.compute_dtype)  # (B, T, C)
        x = F.dropout(x, self.cfg.dropout, self.training)
        found = []  # statistics of the sparse layers, block by block
        for block in self.blocks:
            change, stats = self.run_block(block, x, inputs)
            if "first" in stats:
                inputs = inputs._replace(first=stats.pop("first"))
            x = x + change
            found.append(stats)  # empty where the block is dense
        if cache is not None:
            x = x[cache.last]  # (B, C): who asks what follows a row's other tokens?
        x = self.norm(x)
        if targets is None:
            head = getattr(self, "head", None)  # where untied, or made ready by lumen/onednn.py
            y = head(x) if head else F.linear(x, self.head_weight().to(x.dtype))
            return self.cap(y) if self.cap else y
        return self.loss(x, targets, found)

    def run_block(self, block: Block, x, inputs: AttentionInputs):
        # without gradients nothing is kept, so there is nothing to make anew
        how = self.recompute if torch.is_grad_enabled() else "none"
        if how == "none" or block._compiled_call_impl is not None:
            return block(x, inputs, how)
        return recomputed(block, how, block.random, x, inputs)

    def loss(self, x, targets, found: list[dict]) -> tuple[torch.Tensor, dict]:
        """(total, sums), see forward, from the stream x (B, T, C) and the blocks' statistics."""
        grad = torch.is_grad_enabled()
        valid = targets >= 0
        x, asked, of = x.flatten(0, 1), valid.flatten(), targets.flatten()
        if self.skip_masked and not asked.all():
            x, of = x[asked], of[asked]  # masked places need no logits
        how = (self.z_loss, grad, "capped" if self.cap else self.fused_loss)
        total, ce, z, correct = HeadLoss.apply(x, self.head_weight(), of, *how)
        sums = {"ce": ce, "z": z, "count": valid.sum().float()}
        if not grad:
            sums["correct"] = correct
        if self.training:
            aux, of_layers = layer_sums(found)  # sums over tokens, too
            return total if aux is None else total + aux, sums | of_layers
        kept = [s for s in found if "kept" in s]  # kept, agree: (B, T) bool
        if kept:
            depth = [[(s[key] & valid).sum() for key in ("kept", "agree")] for s in kept]
            sums["depth"] = torch.stack([torch.stack(pair) for pair in depth])
        return total, sums

    def sparse_layers(self, kind: str) -> dict[int, nn.Module]:
        """The MoE (kind moe) or MoD (kind mod) modules by layer."""
        modules = [block.ffn if kind == "moe" else block.mod for block in self.blocks]
        return {i: m for i, m in enumerate(modules) if isinstance(m, (MoE, MoD))}

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        seeds: list[int],
        stop_ids: tuple[int, ...] = (),
        n_vocab: int | None = None,
        choose=choose,
        **options,
    ) -> Iterator[list[int | None]]:
        """Continue a ragged batch of prompts; yields one id a row and step, None for ended rows.

        Each row draws from a generator of its own, so its text does not depend on its neighbours.
        `n_vocab` masks the rows of a padded vocabulary. choose(logits (B, V), generators,
        **options) says the ids (B,). A row ends after one of stop_ids, all rows after
        max_new_tokens; the caller keeps prompt + new tokens within the context it trusts.
        FloatingPointError where logits are not finite.
        """
        was_training = self.training
        device = self.embed.weight.device
        # on the CPU, so that a seed gives the same text on every device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        most = max(map(len, prompts))
        size = len(prompts), most + max_new_tokens
        cache = self.cache_type(self.cfg, *size, device, self.compute_dtype)
        idx = torch.tensor([p + [-1] * (most - len(p)) for p in prompts], device=device)
        alive = [True] * len(prompts)  # a row that has ended is padded from then on
        trained = {moe: moe.backend for moe in self.sparse_layers("moe").values()}
        for moe in trained:
            moe.backend = moe.generation_backend(device, self.compute_dtype)
        self.eval()  # no dropout, and MoD by its causal rule
        try:
            for _ in range(max_new_tokens):
                # first all of the prompts, from then on one token a row: (B, T) -> (B, V)
                logits = self(idx, cache=cache).float().cpu()
                if not logits.isfinite().all():
                    raise FloatingPointError("the model's logits are NaN or infinite")
                # ids that no text has: the vocabulary was padded
                logits[:, n_vocab or self.cfg.vocab_size :] = -math.inf
                ids = choose(logits, generators, **options).tolist()
                out = [i if a else None for i, a in zip(ids, alive)]
                yield out
                alive = [a and i not in stop_ids for a, i in zip(alive, out)]
                if not any(alive):
                    break
                idx = torch.tensor([[i if a else -1] for i, a in zip(out, alive)], device=device)
        finally:  # also when the caller stops listening
            self.train(was_training)
            for moe, backend in trained.items():
                moe.backend = backend

    # ---- arithmetic

    def n_params(self) -> dict[str, int]:
        """Parameters: total, active per token (less what null experts save), non_embedding."""
        cfg = self.cfg
        total = sum(p.numel() for p in self.parameters())
        tables = self.embed.weight.numel() * (1 if cfg.tie_embeddings else 2)
        each = 3 * cfg.d_model * cfg.d_expert  # weights of an expert: gate, up and down
        used = round(self.experts_used() * each)
        moe = self.sparse_layers("moe").values()
        idle = sum(layer.router.slots * each - used for layer in moe)
        return {"total": total, "active": total - idle, "non_embedding": total - tables}

    def experts_used(self) -> float:
        """Experts that compute something for a token, on average when loads are balanced."""
        E, K = self.cfg.n_experts, self.cfg.n_experts_per_token
        return K * E / max(1, E + self.cfg.n_null_experts)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Training FLOPs per token, forward and backward: 6 per weight that multiplies, and
        12 L H D T for attention.

        PaLM's convention (Chowdhery et al. 2022, appendix B): causality is not discounted. Of the
        experts those used count; in a MoD layer of capacity c weights c times, attention c^2.
        """
        cfg, T = self.cfg, seq_len or self.cfg.max_seq_len
        flops = 6 * cfg.vocab_size * cfg.d_model  # the head; the embedding is a lookup
        for i, block in enumerate(self.blocks):
            c = block.mod.capacity if block.mod is not None else 1.0
            deep = 1.0 if cfg.mod_ffn_only else c  # the share of tokens that attention computes
            attn, ffn, mod = (matrices(part) for part in (block.attn, block.ffn, block.mod))
            if cfg.is_moe(i):
                ffn += self.experts_used() * 3 * cfg.d_model * cfg.d_expert
            # q k^T and its product with v, forward once and backward twice
            scores = 12 * cfg.n_heads * cfg.head_dim * T
            flops += 6 * (deep * attn + c * ffn + mod) + scores * deep**2
        return round(flops)


def layer_sums(found: list[dict]) -> tuple[torch.Tensor | None, dict]:
    """Of the blocks' statistics: (the routers' losses, weighted, or None; sums, a row a layer)."""
    losses = [s["loss"] for s in found if "loss" in s]
    names = dict.fromkeys(name for s in found for name in s if "." in name)  # moe.NAME, mod.NAME
    sums = {name: torch.stack([s[name] for s in found if name in s]) for name in names}
    return torch.stack(losses).sum() if losses else None, sums


def matrices(module: nn.Module | None) -> int:
    """Weights that multiply every token: no norms, and no experts, which are 3-D."""
    if module is None:
        return 0
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
