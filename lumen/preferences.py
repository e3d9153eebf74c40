"""Learning from preferences."""

from __future__ import annotations

# what `loss` adds up over pairs beside ce, z, count and tokens: Trainer.sum_names
SUM_NAMES = ("tokens", "reward_chosen", "reward_rejected", "margin", "accuracy")
SUM_NAMES += ("logp_chosen", "logp_rejected", "tokens_chosen", "reference_chosen")


def needs_reference(method: str) -> bool:
    """dpo, cdpo, ipo and hinge compare with the model as it began; simpo and orpo do not."""
    return method in ("dpo", "cdpo", "ipo", "hinge")


def loss(model, cfg, x, y, docs, reference, pairs_per_row: float = 1.0):
    """(total, sums): as model(x, targets=y, docs=docs), of pairs. reference: (rows, most, 2) fp32.
    pairs_per_row: of all the data, for the weight of the routers' losses."""
    raise NotImplementedError
