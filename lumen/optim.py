"""Optimizers, and what the trainer expects of one.

Whoever adds an optimizer (a recipe stands in docs/hacking.md) keeps five promises:

1. All of its state exists after __init__, as tensors of the parameter's shape or 0-d, so that a
   checkpoint can name it before the first step.
2. `step()` honours the attribute `found_inf` (a 0-d fp32 tensor): at 1.0 the weights, the state and
   the count of steps stay exactly as they are. The host is never asked. torch's fused AdamW does
   that in its kernel; others need torch.where, for 0 x NaN is NaN: multiplying is not skipping.
3. FRESH names the state with which a split expert starts from zero: the first moments, so that
   siblings part.
4. STATE_BYTES is what it holds for a parameter, for lumen/plan.py.
5. Its groups carry `lr_factor`, by which the schedule's rate is multiplied.
"""

from __future__ import annotations

import torch

from lumen.config import Config
from model import ModelConfig, role


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), with its state allocated at once."""

    FRESH = ("exp_avg",)
    STATE_BYTES = 8  # two moments in fp32

    def __init__(self, groups: list[dict], cfg: Config):
        betas = (cfg.beta1, cfg.beta2)
        super().__init__(groups, cfg.learning_rate, betas, cfg.eps, fused=True)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


# Five steps of the best polynomials of degree 5 for singular values in [1e-3, 1], damped so that
# bf16 cannot push one above 1 (The Polar Express, Amsel et al. 2025, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: torch.Tensor, steps=POLAR_EXPRESS) -> torch.Tensor:
    """The nearest matrix with orthonormal rows (or columns), about: U V^T of g = U S V^T.

    g (..., m, n); in g's dtype, by products alone: X becomes a X + b (X X^T) X + c (X X^T)^2 X.
    """
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    # singular values up to 1; a little less, for bf16 rounds
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def parts_of(name: str, p: torch.Tensor, model: ModelConfig) -> list[int]:
    """The rows (of the last two dimensions) of each matrix that a fused one is made of: queries,
    keys, values; gate, up. Each is orthogonalised by itself."""
    rows = p.shape[-2]
    if name.endswith("wqkv.weight"):
        return [D * model.head_dim for D in (model.n_heads, model.n_kv_heads, model.n_kv_heads)]
    if name.endswith(("w13.weight", "experts.w13")):
        return [rows // 2, rows // 2]
    return [rows]


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised (Jordan et al. 2024), for the hidden matrices and
    experts; AdamW for embeddings, head, norms and routers.

    An update has the size of AdamW's, 0.2 an entry (Liu et al. 2025, Moonlight, arXiv 2502.16982),
    so both take the same learning rate. Decay is cautious: only where it points the update's way
    (Chen et al. 2025, arXiv 2510.12402).
    """

    FRESH = ("momentum", "exp_avg")
    STATE_BYTES = 8  # of AdamW's part; a hidden matrix holds 4
    WARM_UP = 300  # steps in which the momentum rises from 0.85

    def __init__(self, groups: list[dict], cfg: Config):
        own = [group for group in groups if group["parts"]]
        self.rest = AdamW([group for group in groups if not group["parts"]], cfg)
        super().__init__(own, {"lr": cfg.learning_rate, "momentum": cfg.momentum})
        for group in own:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "momentum": torch.zeros_like(p),
                }
        self.own = own
        self.param_groups = [*own, *self.rest.param_groups]
        self.state.update(self.rest.state)

    @torch.no_grad()
    def step(self):
        self.rest.found_inf = self.found_inf
        self.rest.step()
        skip = self.found_inf > 0
        for group in self.own:
            for p, parts in zip(group["params"], group["parts"]):
                self.update(p, parts, group, skip)

    def update(self, p, parts: list[int], group: dict, skip) -> None:
        state = self.state[p]
        old, done = state["momentum"], state["step"]
        mu = 0.85 + (group["momentum"] - 0.85) * (done / self.WARM_UP).clamp(max=1.0)
        new = torch.lerp(p.grad, old, mu)
        direction = torch.lerp(p.grad, new, mu)  # Nesterov's
        change = [self.scaled(part) for part in direction.split(parts, -2)]
        change = torch.cat(change, -2)
        decay = group["weight_decay"] * p * (change * p > 0)
        change = group["lr"] * (change + decay)
        p.sub_(torch.where(skip, 0.0, change))
        old.copy_(torch.where(skip, old, new))
        done.add_(~skip)

    def scaled(self, g: torch.Tensor) -> torch.Tensor:
        size = 0.2 * max(g.shape[-2:]) ** 0.5
        return size * orthogonalise(g.to(self.dtype)).float()

    dtype = torch.float32


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}  # the values of the key `optimizer`


def state_bytes(cfg: Config) -> int:
    """Bytes that cfg's optimizer holds for a parameter."""
    return OPTIMIZERS[cfg.optimizer].STATE_BYTES


def build_optimizer(cfg: Config, named: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer that cfg names, for parameters by their names.

    Matrices decay, vectors (norms, biases) do not. Routers are groups of their own, since
    router_lr_factor may slow them down.
    """
    factors = {
        "router": cfg.router_lr_factor,
        "embedding": cfg.embedding_lr_factor,
        "head": cfg.head_lr_factor,
    }
    muon = cfg.optimizer == "muon"
    found: dict[tuple, dict] = {}  # by what its parameters have in common
    for name, p in named.items():
        what = role(name)
        hidden = muon and p.dim() >= 2 and what in ("matrix", "expert")
        lr_factor = cfg.matrix_lr_factor if hidden else factors.get(what, 1.0)
        decay = cfg.weight_decay if p.dim() >= 2 else 0.0
        common = {"weight_decay": decay, "lr_factor": lr_factor, "parts": [] if hidden else None}
        group = found.setdefault((lr_factor, decay, hidden), {"params": [], **common})
        group["params"].append(p)
        if hidden:
            group["parts"].append(parts_of(name, p, cfg.model))
    groups = list(found.values())
    grouped = sorted(id(p) for group in groups for p in group["params"])
    assert grouped == sorted(id(p) for p in named.values()), "every parameter in exactly one group"
    return OPTIMIZERS[cfg.optimizer](groups, cfg)


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
