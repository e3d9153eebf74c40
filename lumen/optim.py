"""TODO."""

from __future__ import annotations

import torch

from lumen.config import Config


def build_optimizer(cfg: Config, named: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """Fused AdamW with its state allocated at once; matrices decay, norms do not; every parameter in one group.

    Routers are a group of their own; `lr_factor` is what each group multiplies the schedule by.
    """
    routing = [p for name, p in named.items() if ".router." in name or ".predictor." in name]
    routers, factor = {id(p) for p in routing}, cfg.router_lr_factor
    others = [p for p in named.values() if id(p) not in routers]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {
            "params": [p for p in routing if p.dim() >= 2],
            "weight_decay": cfg.weight_decay,
            "lr_factor": factor,
        },
        {"params": [p for p in routing if p.dim() < 2], "weight_decay": 0.0, "lr_factor": factor},
    ]
    groups = [{"lr_factor": 1.0} | g for g in groups if g["params"]]
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in named.values()), (
        "groups must cover every parameter exactly once"
    )
    optimizer = torch.optim.AdamW(
        groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), cfg.eps, fused=True
    )
    for p in named.values():
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    return optimizer
