"""LoRA (Hu et al. 2021): small trained matrices beside frozen ones, y = W x + scale B A x.

`add` freezes a model and puts adapters in. What it wraps stands below `.base`, so the base's names
stay what they are, and its kernels too: experts get an effective weight, W + scale B A.

Names: r the rank, C = d_model, E experts (slots), I an expert's hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lumen.base import mean_row, still_routers
from lumen.config import LoraConfig
from lumen.errors import UserError, nearest
from model import Linear, Transformer, role
from model_moe import Experts, plain_experts

# PEFT's names, of matrices that are one here
FUSED = {
    "q_proj": "wqkv",
    "k_proj": "wqkv",
    "v_proj": "wqkv",
    "o_proj": "wo",
    "gate_proj": "w13",
    "up_proj": "w13",
    "down_proj": "w2",
}
ALL = "all-linear"  # PEFT's word for every matrix

# ---------------------------------------------------------------- the wrappers


class LoRA(nn.Module):
    """base(x) + scale (drop(x) A^T) B^T, (..., in) -> (..., out); A and B are fp32.

    base: a Linear or a QuantLinear. wqkv and w13 have one A for all that is fused in them.
    """

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.on = True
        where = {"device": device_of(base), "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, **where))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, **where))

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        h = F.dropout(x, self.dropout, self.training)
        h = F.linear(h, self.lora_a.to(x.dtype)) * self.scale  # (..., r): the cheapest place
        return y + F.linear(h, self.lora_b.to(x.dtype))

    def merged(self) -> Linear:
        weight = self.base.weight.float() + self.scale * (self.lora_b @ self.lora_a)
        return plain_linear(weight)


class LoRAExperts(nn.Module):
    """Experts with an adapter each: W + scale B A, summed in fp32, goes to the base's kernel.

    Backward makes the gradient of the whole W, and of that those of A and B: as dear as training
    the experts, but without their optimizer.
    """

    def __init__(self, base: nn.Module, r: int, scale: float):
        super().__init__()
        self.base = base
        self.scale = scale
        self.on = True
        E, C, I = base.w2.shape
        where = {"device": base.w2.device, "dtype": torch.float32}
        self.lora_a13 = nn.Parameter(torch.empty(E, r, C, **where))
        self.lora_b13 = nn.Parameter(torch.zeros(E, 2 * I, r, **where))
        self.lora_a2 = nn.Parameter(torch.empty(E, r, I, **where))
        self.lora_b2 = nn.Parameter(torch.zeros(E, C, r, **where))

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (E, 2I, C) and w2 (E, C, I) in fp32."""
        w13 = effective(self.base.w13, self.lora_a13, self.lora_b13, self.scale)
        return w13, effective(self.base.w2, self.lora_a2, self.lora_b2, self.scale)

    def forward(self, x, p, ids, backend: str):
        if not self.on:
            return self.base(x, p, ids, backend)
        # the kernel keeps them for backward: cast they are half as large
        w13, w2 = (w.to(x.dtype) for w in self.weights())
        if backend == "plain":
            return plain_experts(x, p, ids, w13, w2)
        return self.base.run(x, p, ids, w13, w2, backend)

    def merged(self) -> Experts:
        return plain_experts_of(*self.weights(), self.base.run)


def effective(weight, a, b, scale: float):
    """weight (E, m, n) + scale b (E, m, r) a (E, r, n), fp32."""
    return torch.baddbmm(weight.float(), b, a, alpha=scale)


class FreshRows(nn.Module):
    """A frozen table (the embedding or an untied head) of which the rows `ids` are trained, (n, C)
    fp32.

    They begin as the mean of the others.
    """

    def __init__(self, base: nn.Module, ids):
        super().__init__()
        self.base = base
        self.on = True
        table = base.weight.detach().float()
        where = torch.tensor(sorted(ids), device=table.device)
        self.register_buffer("ids", where, persistent=False)
        self.rows = nn.Parameter(mean_row(table, list(ids)).expand(len(ids), -1).clone())

    @property
    def weight(self) -> torch.Tensor:
        """(V, C) fp32, so that the rows' gradient is added up in fp32."""
        if not self.on:
            return self.base.weight
        return self.base.weight.float().index_copy(0, self.ids, self.rows)

    def forward(self, x):
        """As the head, x (..., C)."""
        return F.linear(x, self.weight.to(x.dtype))

    def merged(self) -> nn.Module:
        if isinstance(self.base, nn.Embedding):
            return nn.Embedding.from_pretrained(self.weight.detach(), freeze=False)
        return plain_linear(self.weight)


WRAPPERS = (LoRA, LoRAExperts, FreshRows)


def device_of(base: nn.Module) -> torch.device:
    """A quantized matrix has buffers only."""
    return next(iter([*base.parameters(), *base.buffers()])).device


def plain_linear(weight: torch.Tensor) -> Linear:
    with torch.device("meta"):  # no memory, no initialisation
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.detach())
    return linear


def plain_experts_of(w13: torch.Tensor, w2: torch.Tensor, run) -> Experts:
    with torch.device("meta"):
        experts = Experts(*w2.shape, run)
    experts.w13, experts.w2 = nn.Parameter(w13.detach()), nn.Parameter(w2.detach())
    return experts


# ---------------------------------------------------------------- what is adapted


def adaptable(model: Transformer) -> dict[str, nn.Module]:
    """Every matrix and every layer of experts by its name, quantized or not."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".base") or isinstance(module, WRAPPERS):
            continue
        kind = role(f"{name}.weight") if name else ""
        if kind == "matrix" and hasattr(module, "in_features"):
            found[name] = module
        elif kind == "expert" and hasattr(module, "w13"):
            found[name] = module
    return found


def choose(names: list[str], targets: list[str] | None) -> list[str]:
    """Which of `names` the targets name, in their order. E002: one that names none."""
    if targets is None or ALL in targets:
        return names
    if not targets:
        raise UserError("E002", "lora.targets: [] names nothing; null stands for all")
    wanted = []
    for target in targets:
        part = FUSED.get(target, target)
        wanted.append({name for name in names if f".{part}." in f".{name}."})
        if wanted[-1]:
            continue
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        near = nearest(part, parts)
        hint = f"; did you mean {near}?" if near else ""
        text = f"lora.targets: {target} names no matrix of this model{hint}"
        raise UserError("E002", f"{text}; there are {', '.join(parts)}")
    every = set().union(*wanted)
    return [name for name in names if name in every]


def scale_of(cfg: LoraConfig) -> float:
    """alpha / r; with rslora alpha / sqrt(r), which does not vanish with a large r."""
    return cfg.alpha / (math.sqrt(cfg.r) if cfg.rslora else cfg.r)


def add(model: Transformer, cfg: LoraConfig, seed: int, fresh_ids=()) -> None:
    """Freeze the model and put adapters in, which change nothing yet; train the rows `fresh_ids`
    of embedding and untied head.

    A is drawn from seed and name, by PEFT's rule, kaiming_uniform(sqrt 5): uniform within 1 /
    sqrt(in). UserError E002: a target that names nothing; the model is as it was then.
    """
    places = adaptable(model)
    chosen = choose(list(places), cfg.targets)
    model.requires_grad_(False)
    still_routers(model)
    for name in chosen:
        module = places[name]
        if role(f"{name}.weight") == "expert":
            put(model, name, LoRAExperts(module, cfg.r, scale_of(cfg)))
        else:
            put(model, name, LoRA(module, cfg.r, scale_of(cfg), cfg.dropout))
    if cfg.dropout:
        for block in model.blocks:
            block.random = True  # a block made anew in backward must drop the same
    if fresh_ids:
        for name in ("embed", "head"):
            if hasattr(model, name):
                put(model, name, FreshRows(getattr(model, name), fresh_ids))
    for name, p in model.named_parameters():
        if ".lora_a" in name:
            fill(name, p, seed)
    model.lora = cfg


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def fill(name: str, a: torch.Tensor, seed: int) -> None:
    """The initial A (r, in), or those of all experts (E, r, in); each has a generator of its own,
    as in Transformer.fill."""
    parts = a if a.dim() == 3 else [a]
    bound = 1 / math.sqrt(a.shape[-1])
    for e, part in enumerate(parts):
        digest = hashlib.blake2b(f"{seed}:{name}:{e}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        part.copy_(torch.empty(part.shape).uniform_(-bound, bound, generator=generator))


# ---------------------------------------------------------------- and undone


def wrappers(model: Transformer) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, WRAPPERS)}


def adapter_names(model: Transformer) -> list[str]:
    """The parameters that `add` put in, as in model.named_parameters()."""
    names = []
    for name, module in wrappers(model).items():
        names += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
    return names


@contextlib.contextmanager
def off(model: Transformer):
    """Within it the model is its base, exactly."""
    modules = wrappers(model).values()
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Add adapters to their weights, in fp32, and what is quantized becomes fp32 too: an ordinary
    model again."""
    for name, module in wrappers(model).items():
        put(model, name, module.merged())
    for name, module in adaptable(model).items():
        if hasattr(module, "w13") and not isinstance(module, Experts):
            put(model, name, plain_experts_of(module.w13, module.w2, module.run))
        elif not hasattr(module, "w13") and not isinstance(module, Linear):
            put(model, name, plain_linear(module.weight))


def describe(model: Transformer) -> list[str]:
    """What is trained, for whoever starts it: names with how many there are, sizes, shares."""
    counts = {}  # by the last part of the name: modules, parameters
    for name, module in wrappers(model).items():
        size = sum(p.numel() for p in module.parameters(recurse=False))
        n, before = counts.get(name.rpartition(".")[2], (0, 0))
        counts[name.rpartition(".")[2]] = (n + 1, before + size)
    with torch.device("meta"):  # what is quantized has no parameters to count
        total = Transformer(model.cfg).n_params()["total"]
    trained = sum(size for _, size in counts.values())
    cfg = model.lora
    each = ", ".join(f"{n} {name} ({size:,})" for name, (n, size) in counts.items())
    share = f"{trained:,} trained, {100 * trained / total:.2f} % of {total:,}"
    lines = [f"r {cfg.r}, scale {scale_of(cfg):g}: {share}", each]
    names = [name for name in cfg.targets or () if name in FUSED]
    if names:
        became = ", ".join(f"{name} is {FUSED[name]}" for name in names)
        lines.append(f"{became}: fused here, with one A for all parts")
    return lines
