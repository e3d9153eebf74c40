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
from model import role


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


OPTIMIZERS = {"adamw": AdamW}  # the values of the key `optimizer`


def state_bytes(cfg: Config) -> int:
    """Bytes that cfg's optimizer holds for a parameter."""
    return OPTIMIZERS[cfg.optimizer].STATE_BYTES


def build_optimizer(cfg: Config, named: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer that cfg names, for parameters by their names.

    Matrices decay, vectors (norms, biases) do not. Routers are groups of their own, since
    router_lr_factor may slow them down.
    """
    is_router = {name: role(name) == "router" for name in named}
    groups = []
    for of_routers in (False, True):
        params = [p for name, p in named.items() if is_router[name] == of_routers]
        lr_factor = cfg.router_lr_factor if of_routers else 1.0
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]
        for some, decay in ((matrices, cfg.weight_decay), (vectors, 0.0)):
            if some:
                groups.append({"params": some, "weight_decay": decay, "lr_factor": lr_factor})
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
