"""What fine-tuning trains of a model, how it holds the rest, and which bytes that costs a step.

Arithmetic for lumen/plan.py, from names and shapes. It follows lumen/lora.py, lumen/quantize.py and
what finetune.py does with them: under adapters the base is frozen and held in the compute dtype
(routers in fp32) or in few bits; without them what `freeze` names stays in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lumen.config import Config
from lumen.lora import ALL, FUSED
from lumen.quantize import stored_bytes
from model import ModelConfig, role

PACKED = ("matrix", "expert")  # roles that are held in few bits


@dataclass(frozen=True)
class Tuning:
    """The keys of fine-tuning as plain values; as they stand here, all is trained."""

    r: int = 0  # rank of the adapters; 0: none
    targets: tuple[str, ...] | None = None  # what has adapters; None: all matrices and experts
    dropout: bool = False  # on what goes into an adapter
    quantize: str | None = None  # how the matrices below adapters are held
    freeze: tuple[str, ...] = ()  # roles that are not trained, where there are no adapters
    sides: int = 1  # rows of the model for a row of data: 2 with preferences
    fresh: bool = False  # some rows of embedding and head are trained beside adapters

    def trains(self, name: str) -> bool:
        """Whether the base's parameter of this name is trained."""
        return not self.r and role(name) not in self.freeze

    def adapts(self, name: str) -> bool:
        """Whether the module of this name has an adapter."""
        kind = role(f"{name}.weight")
        if not self.r or kind not in PACKED:
            return False
        if self.targets is None or ALL in self.targets:
            return True
        return any(f".{FUSED.get(target, target)}." in f".{name}." for target in self.targets)

    def needs_input(self, name: str) -> bool:
        """Whether backward asks what went into this matrix."""
        return self.trains(f"{name}.weight") or self.adapts(name)


PRETRAINING = Tuning()


def without_batch(cfg: Config) -> list[str]:
    """`batch_size: auto` alone: the rule for a step's tokens is of training from scratch."""
    if cfg.batch_size != "auto" or cfg.batch_tokens:
        return []
    usual = f"the usual 16 rows are batch_tokens: {16 * cfg.model.max_seq_len}"
    return [f"batch_size: auto needs batch_tokens in fine-tuning; {usual}"]


def tuning_of(cfg: Config, fresh: bool = False) -> Tuning:
    """What cfg says of it; `fresh`: the base lacks some control tokens."""
    lora, sides = cfg.lora, 1 if cfg.method == "sft" else 2
    if not lora.r:
        frozen = tuple(name.removesuffix("s") for name in cfg.freeze or ())
        return Tuning(freeze=frozen, sides=sides)
    targets = None if lora.targets is None else tuple(lora.targets)
    dropout = lora.dropout > 0
    return Tuning(lora.r, targets, dropout, cfg.quantize_base, sides=sides, fresh=fresh)


# ---------------------------------------------------------------- weights


def adapter_size(shape: tuple[int, ...], r: int) -> int:
    """Numbers in A and B beside a matrix (n, k) or experts' (E, n, k)."""
    return math.prod(shape[:-2]) * r * (shape[-2] + shape[-1])


def module_of(name: str) -> str:
    """Of the parameter of this name: blocks.0.ffn.experts of blocks.0.ffn.experts.w13."""
    return name.rpartition(".")[0]


def states(tuning: Tuning, named: list, b: int, state_bytes) -> dict[str, int]:
    """Bytes of weights, gradients and moments of the parameters `named` (name, shape) and their
    adapters; copies: what backward needs of trained weights in the compute dtype, of b bytes.
    state_bytes: an optim.StateBytes."""
    found = {"weights": 0, "gradients": 0, "moments": 0, "copies": 0}

    def train(n: int, cast: bool, moments: int) -> None:
        found["weights"] += 4 * n
        found["gradients"] += 4 * n
        found["moments"] += moments
        found["copies"] += 2 * n if cast and b < 4 else 0

    for name, shape in named:
        n, kind = math.prod(shape), role(name)
        if tuning.trains(name):
            train(n, kind != "expert", state_bytes.of([(name, shape)]))
        elif not tuning.r:  # frozen by a key, in fp32
            found["weights"] += 4 * n
            found["copies"] += 2 * n if kind != "expert" and b < 4 else 0
        elif tuning.quantize and kind in PACKED:
            found["weights"] += stored_bytes(shape, tuning.quantize)
        else:
            found["weights"] += n * (4 if kind == "router" else b)
        if tuning.adapts(module_of(name)):
            size = adapter_size(shape, tuning.r)
            train(size, kind != "expert", size * state_bytes.rest)
    return found


def loading(tuning: Tuning, named: list) -> int:
    """Bytes before the first step: a base that adapters freeze is there in fp32 at first, and while
    its largest matrix is packed, that twice more."""
    if not tuning.r:
        return 0
    sizes = [4 * math.prod(shape) for _, shape in named]
    largest = max(math.prod(shape[-2:]) for name, shape in named if role(name) in PACKED)
    return sum(sizes) + (8 * largest if tuning.quantize else 0)


# ---------------------------------------------------------------- activations


def ffn_matrices(cfg: ModelConfig, layer: int) -> list[tuple[str, str, int, int]]:
    """Of a layer's FFN without its routed experts: names of the first matrix and of the second,
    outputs of the first, inputs of the second."""
    if cfg.is_moe(layer):
        width = cfg.n_shared_experts * cfg.d_expert
        return [("ffn.shared.w13", "ffn.shared.w2", 2 * width, width)] if width else []
    if "relu2" in (cfg.extras or []):  # of lumen/extras.py
        return [("ffn.w1", "ffn.w2", cfg.d_ff, cfg.d_ff)]
    return [("ffn.w13", "ffn.w2", 2 * cfg.d_ff, cfg.d_ff)]


def kept_less(
    cfg: ModelConfig, layer: int, b: int, selective: bool, tuning: Tuning
) -> tuple[float, float]:
    """Bytes a token that attention's and the FFN's half keep less than where all is trained;
    negative where adapters keep more. What is not trained does not ask for its input."""
    C, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    block = f"blocks.{layer}"

    def of(name: str, n_in: int, n_out: int) -> float:
        """Of a matrix; not its input, which others may ask for too."""
        if not tuning.adapts(f"{block}.{name}"):
            return 0.0
        made = tuning.r + n_out if selective else tuning.r
        # dropout's mask, on a CPU in the compute dtype
        return -b * made - (b * n_in if tuning.dropout else 0)

    def norm(name: str) -> float:  # its input before the weight
        return 0.0 if tuning.trains(f"{block}.{name}.weight") else 1.0

    def idle(name: str) -> float:
        return 0.0 if tuning.needs_input(f"{block}.{name}") else 1.0

    attention = of("attn.wqkv", C, q + 2 * kv) + of("attn.wo", q, C)
    if tuning.dropout and tuning.adapts(f"{block}.attn.wo"):
        attention -= b * q  # what is left of attention's output, which itself is kept too
    ffn, parts = 0.0, ffn_matrices(cfg, layer)
    for w13, w2, wide, width in parts:
        ffn += of(w13, C, wide) + of(w2, width, C)
    if selective:
        return attention, ffn
    if cfg.norm_order == "pre":
        attention += b * C * (norm("attn_norm") + idle("attn.wqkv"))
    if cfg.qk_norm:
        attention += b * (q + kv) * norm("attn.q_norm")
    ffn += b * C * norm("ffn_norm")
    for w13, w2, _, width in parts:
        # a router keeps the same input
        ffn += b * (width * idle(w2) + (0 if cfg.is_moe(layer) else C * idle(w13)))
    return attention, ffn


# ---------------------------------------------------------------- a step


def adapted_experts(cfg: ModelConfig, tuning: Tuning) -> int:
    """How many layers of experts have adapters."""
    moe = [i for i in range(cfg.n_layers) if cfg.is_moe(i)]
    return sum(tuning.adapts(f"blocks.{i}.ffn.experts") for i in moe)


def head_work(cfg: ModelConfig, tuning: Tuning, head: int, b: int, cuda: bool) -> int:
    """Bytes while the loss is made, of `head` where the table is trained."""
    table = cfg.vocab_size * cfg.d_model
    if tuning.fresh:  # the table with the rows in place, in fp32; its gradient, twice
        return head + 8 * table
    if tuning.trains("embed.weight" if cfg.tie_embeddings else "head.weight"):
        return head
    chunk = table * b if b == 2 and not cuda else 0  # a chunk's gradient of it
    return head - 4 * table - chunk


def layer_work(cfg: ModelConfig, tuning: Tuning, named: list, b: int, cuda: bool) -> int:
    """Bytes of weights that come and go in the backward pass of a layer: frozen ones of few bits
    made again, experts' gradients."""
    largest = max(math.prod(shape[-2:]) for name, shape in named if role(name) in PACKED)
    made = b * largest if tuning.quantize else 0
    if not any(map(cfg.is_moe, range(cfg.n_layers))):
        return made
    experts = (cfg.n_experts_max or cfg.n_experts) * 3 * cfg.d_model * cfg.d_expert
    if adapted_experts(cfg, tuning):
        # gradients of the effective weights, as computed and in fp32; one of the two bases
        return (b + 4) * experts + (4 * experts * 2 // 3 if tuning.quantize else 0)
    if tuning.r or "expert" in tuning.freeze:
        # only kernels that take a layer at once want it whole
        return max(made, b * experts if tuning.quantize and cuda else 0)
    return 4 * experts + (2 * experts if b < 4 else 0)


def parts_of(cfg: ModelConfig, tuning: Tuning, named: list, kept: dict, how: tuple) -> dict:
    """Bytes at the peak of a rank that holds all: weights, gradients, moments, gathered (copies in
    the compute dtype), activations, work; loading: by how much reading the base needs more than a
    step, if it does. kept: plan.kept_bytes'; how: (b, recompute, cuda, state_bytes)."""
    b, recompute, cuda, state_bytes = how
    parts = states(tuning, named, b, state_bytes)
    copies = parts.pop("copies")
    layers = adapted_experts(cfg, tuning)
    if layers:  # the effective weights of a layer, until its backward pass
        experts = (cfg.n_experts_max or cfg.n_experts) * 3 * cfg.d_model * cfg.d_expert
        copies += b * experts * (layers if recompute == "none" else 1)
    layer = layer_work(cfg, tuning, named, b, cuda) + kept["rows"]
    parts |= {
        "gathered": copies,
        "activations": kept["activations"],
        "work": max(layer, head_work(cfg, tuning, kept["head"], b, cuda)),
    }
    more = loading(tuning, named) - sum(parts.values())
    return parts | ({"loading": more} if more > 0 else {})
