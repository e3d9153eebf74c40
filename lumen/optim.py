"""Optimizers, and what the trainer expects of one.

Whoever adds an optimizer (a recipe stands in docs/hacking.md) keeps five promises:

1. All of its state exists after __init__, in `self.state[p]` of each parameter, as tensors of the
   parameter's shape or 0-d, so that a checkpoint can name it before the first step. The names are
   its own; a count of steps is 0-d and of each parameter.
2. `step()` honours the attribute `found_inf` (a 0-d fp32 tensor): at 1.0 the weights, the state and
   the count of steps stay exactly as they are. The host is never asked. torch's fused AdamW does
   that in its kernel; others need torch.where, for 0 x NaN is NaN: multiplying is not skipping.
3. FRESH names the state with which a split expert starts from zero: the first moments, so that
   siblings part. Each parameter has one of them; a name that is not there counts for nothing.
4. STATE_BYTES is what it holds for a parameter, for lumen/plan.py; HIDDEN_BYTES for a hidden
   matrix's (lumen/muon.py: is_hidden). RATE: its best learning rate, times AdamW's, for
   `learning_rate: auto`.
5. Its groups carry `lr_factor`, by which the schedule's rate is multiplied; it reads `lr` and
   `weight_decay` there in each step, and has `betas` and `eps` there if those knobs shall turn.

All but what a step computes is held by tests/unit/test_optim.py over every class of OPTIMIZERS.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lumen.config import Config
from lumen.muon import (
    MARGIN,
    POLAR_EXPRESS,
    at_a_rank,
    by_parts,
    hidden_matrices,
    in_bf16,
    is_hidden,
    work_bytes,
)
from lumen.owners import Alone
from model import ModelConfig, role


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), with its state allocated at once."""

    FRESH = ("exp_avg",)
    STATE_BYTES = HIDDEN_BYTES = 8  # two moments in fp32
    RATE = 1.0

    def __init__(self, groups: list[dict], cfg: Config, precision="fp32", owners=None):
        betas = (cfg.beta1, cfg.beta2)
        super().__init__(groups, cfg.learning_rate, betas, cfg.eps, fused=True)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised (Jordan et al. 2024), for the hidden matrices and
    experts; AdamW for embeddings, head, norms and routers.

    An update has the size of AdamW's (lumen/muon.py), so both take the same learning rate. Decay is
    cautious: only where it points the update's way (Chen et al. 2025, arXiv 2510.12402). A step
    leaves no gradients: they become directions, and directions updates.
    """

    FRESH = ("momentum", "exp_avg")
    STATE_BYTES = 8  # of AdamW's part
    HIDDEN_BYTES = 4
    RATE = 2.2  # by the sweep that lumen/schedule.py tells of
    FIRST = 0.85  # the momentum of the first step, from which it rises ...
    WARM_UP = 300  # ... in so many
    polynomials, margin = POLAR_EXPRESS, MARGIN

    def __init__(self, groups: list[dict], cfg: Config, precision="fp32", owners=None):
        own = [group for group in groups if group["matrices"]]
        rest = [group for group in groups if not group["matrices"]]
        assert len(own) == 1, "see check_optimizer"
        self.rest = AdamW(rest, cfg) if rest else None
        betas = (cfg.beta1, cfg.beta2)  # nothing here asks for these: knobs of all groups
        defaults = {"lr": cfg.learning_rate, "momentum": cfg.momentum}
        super().__init__(own, defaults | {"betas": betas, "eps": cfg.eps})
        self.own = self.param_groups[0]
        for p in self.own["params"]:
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "momentum": torch.zeros_like(p),
            }
        if rest:
            self.param_groups += self.rest.param_groups
            self.state.update(self.rest.state)
        # as the run computes, so that a resumed one does the same
        self.dtype = torch.bfloat16 if in_bf16(precision) else torch.float32
        self.owners = owners or Alone()
        self.owners.divide(self.own["matrices"])

    @torch.no_grad()
    def step(self):
        if self.rest:
            self.rest.found_inf = self.found_inf
            self.rest.step()
        skip, own = self.found_inf > 0, self.own
        counts = [self.state[p]["step"] for p in own["params"]]
        first = min(self.FIRST, own["momentum"])
        risen = (counts[0] / self.WARM_UP).clamp(max=1.0)
        mu = first + (own["momentum"] - first) * risen  # 0-d
        for p in own["params"]:
            for g, momentum in chunks(p.grad, self.state[p]["momentum"]):
                # adding -0.0 changes no bit; torch.where would take longer
                momentum.add_((g - momentum).mul_(1 - mu).masked_fill_(skip, -0.0))
                # Nesterov's; a skipped step has none, so below nothing moves and nothing decays
                g.lerp_(momentum, mu).masked_fill_(skip, 0.0)
        # ranks exchange their work whether it is skipped or not: the host does not know
        directions = {m.name: p.grad for m, p in zip(own["matrices"], own["params"])}
        self.owners.orthogonalise(directions, self.compute, self.dtype)
        for p in own["params"]:
            for w, g in chunks(p, p.grad):
                if own["weight_decay"]:  # of w where w and g have one sign
                    shrinking = (w * g).sign_().relu_()
                    g.add_(shrinking.mul_(w), alpha=own["weight_decay"])
                w.sub_(g, alpha=own["lr"])
        # a list: one tensor for all would be read by the host
        torch._foreach_add_(counts, [(~skip).float()] * len(counts))

    def compute(self, matrices: list[torch.Tensor], parts: tuple[int, ...]) -> torch.Tensor:
        """Whole matrices of one shape -> (stack, ...), orthogonalised and scaled."""
        if len(matrices) == 1:
            x = matrices[0].to(self.dtype)[None]
        else:
            x = torch.stack([matrix.to(self.dtype) for matrix in matrices])
        return by_parts(x, parts, self.polynomials, self.margin)


CHUNK = 1 << 16  # numbers


def chunks(*tensors: torch.Tensor):
    """Rows of equally shaped tensors, as many at a time as a CPU's cache holds, so that several
    passes over them cost one over memory. A GPU takes all at once."""
    a = tensors[0]
    if a.device.type != "cpu" or a.numel() <= CHUNK:
        return [tensors] if a.numel() else []
    rows = max(1, CHUNK * len(a) // a.numel())
    return zip(*(tensor.split(rows) for tensor in tensors))


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}  # the values of the key `optimizer`


class StateBytes(NamedTuple):
    """Bytes that an optimizer holds for a parameter."""

    rest: int = AdamW.STATE_BYTES
    hidden: int = AdamW.HIDDEN_BYTES  # of what lumen/muon.py: is_hidden says
    orthogonal: bool = False  # those are orthogonalised, which takes memory and time of its own

    def of(self, named) -> int:
        """Of (name, shape), all together."""
        total = 0
        for name, shape in named:
            total += math.prod(shape) * (self.hidden if is_hidden(name, shape) else self.rest)
        return total

    def mean(self, named) -> float:
        """Of one number: of each tensor a rank holds about the same share."""
        return self.of(named) / sum(math.prod(shape) for _, shape in named)

    def work(self, named, model: ModelConfig, ranks: int, precision: str) -> int:
        """Bytes that come and go in a step, where so many ranks share a copy of the model."""
        if not self.orthogonal:
            return 0
        return work_bytes(at_a_rank(named, model, ranks), precision, ranks > 1)


def state_bytes(cfg: Config) -> StateBytes:
    kind = OPTIMIZERS[cfg.optimizer]
    return StateBytes(kind.STATE_BYTES, kind.HIDDEN_BYTES, cfg.optimizer == "muon")


def build_optimizer(
    cfg: Config, named: dict[str, torch.Tensor], precision: str = "fp32", owners=None
) -> torch.optim.Optimizer:
    """The optimizer that cfg names, for parameters by their names.

    precision: as resolved; owners: of lumen/owners.py, None on one process. Matrices decay, vectors
    (norms, biases) do not. Routers are groups of their own, since router_lr_factor may slow them
    down.
    """
    owners = owners or Alone()
    factors = {
        "router": cfg.router_lr_factor,
        "embedding": cfg.embedding_lr_factor,
        "head": cfg.head_lr_factor,
    }
    found: dict[tuple, dict] = {}  # by what its parameters have in common
    for name, p in named.items():
        shape = owners.shape(name, p)
        hidden = cfg.optimizer == "muon" and is_hidden(name, shape)
        lr_factor = cfg.matrix_lr_factor if hidden else factors.get(role(name), 1.0)
        decay = cfg.weight_decay if p.dim() >= 2 else 0.0
        common = {"weight_decay": decay, "lr_factor": lr_factor, "matrices": []}
        group = found.setdefault((lr_factor, decay, hidden), {"params": [], **common})
        group["params"].append(p)
        if hidden:
            group["matrices"] += hidden_matrices([(name, shape)], cfg.model)
    groups = list(found.values())
    grouped = sorted(id(p) for group in groups for p in group["params"])
    assert grouped == sorted(id(p) for p in named.values()), "every parameter in exactly one group"
    return OPTIMIZERS[cfg.optimizer](groups, cfg, precision, owners)


def clip_factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """The factor (0-d) that brings a gradient of this norm down to `limit`; 0: there is none."""
    if not limit:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def step_optimizer(optimizer, weights, factor: torch.Tensor, skip: torch.Tensor) -> None:
    """One step with the gradients times `factor` (0-d); none where `skip` (0-d bool) says so.

    `weights`: what the optimizer updates. The device decides, so the host never waits. Afterwards
    there are no gradients.
    """
    torch._foreach_mul_([p.grad for p in weights], factor)
    optimizer.found_inf = skip.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class LossScale:
    """fp16 only: the loss is multiplied by `value`, so that small gradients do not vanish.

    Halved after a step that overflowed, doubled after GROW_AFTER steps that did not. Both numbers
    are 0-d tensors on the device, so that deciding costs no wait.
    """

    GROW_AFTER = 2000  # steps

    def __init__(self, device):
        self.value = torch.tensor(65536.0, device=device)
        self.good_steps = torch.zeros((), device=device)  # since the last change

    def update(self, norm: torch.Tensor, halted: torch.Tensor) -> None:
        """After a step with a gradient of this `norm`. Where `halted` (0-d bool) it ran out of
        memory: it has no norm and comes again, so nothing changes."""
        overflow = ~torch.isfinite(norm) & ~halted
        good = torch.where(overflow, 0.0, self.good_steps + ~halted)
        grow = good >= self.GROW_AFTER
        grown = torch.where(grow, self.value * 2, self.value)
        self.value = torch.where(overflow, self.value / 2, grown)
        self.good_steps = torch.where(grow, 0.0, good)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a snapshot copies."""
        return {"scale": self.value, "scale_good": self.good_steps}

    def state(self) -> list[float]:
        return [self.value.item(), self.good_steps.item()]

    def load(self, state: list[float]) -> None:
        self.value.fill_(state[0])
        self.good_steps.fill_(state[1])
