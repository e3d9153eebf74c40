"""What made speed runs learn faster and no Hugging Face class has: `model.extras`, a list. Such a
model trains, samples, is evaluated and served; it does not export.

    value_residual  the first layer's values are mixed into every other layer's (Zhou et al. 2024,
                    arXiv 2410.17897), half and half at first
    x0              so is what the first block was given into every other's stream, a tenth at first
                    (modded-nanogpt's embed shortcut, nanochat's x0 and resid lambdas)
    relu2           relu(x W1^T)^2 W2^T in place of SwiGLU (So et al. 2021, Primer): two matrices,
                    so with the default rule they are half as wide again, for as many parameters
    softcap         logits become 15 tanh(logits / 15) (Gemma 2, arXiv 2408.00118; modded-nanogpt)

Both mixes are two learned numbers a block, which begin at 1, as norms do, and do not decay.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import AttentionInputs, Block, Linear, ModelConfig

CAP = 15.0  # of the logits
OF_VALUES = (0.5, 0.5)  # shares at first: of the layer's own values, of the first layer's
OF_STREAM = (1.0, 0.1)


class Mix(nn.Module):
    """a w[0] x + b w[1] first, for the shares (a, b) at first."""

    def __init__(self, shares: tuple[float, float]):
        super().__init__()
        self.shares = shares
        self.weight = nn.Parameter(torch.ones(2))  # FSDP2 takes no 0-d parameter

    def forward(self, x, first):
        w = self.weight.to(x.dtype)
        return self.shares[0] * w[0] * x + self.shares[1] * w[1] * first


class ReLU2(nn.Module):
    """(..., C) -> (..., C), by a hidden width d_ff."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x):
        return self.w2(F.relu(self.w1(x)).square())


class ExtraBlock(Block):
    """model.Block with what cfg.extras names. The first one hands its stream and its values on to
    the others: as `first` among its statistics, which Transformer.forward puts into their inputs.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        if "relu2" in cfg.extras:
            self.ffn = ReLU2(cfg.d_model, cfg.d_ff)
        shares = {"value_residual": OF_VALUES, "x0": OF_STREAM}
        own = {name: Mix(of) for name, of in shares.items() if name in cfg.extras and layer}
        self.value_mix, self.stream_mix = own.get("value_residual"), own.get("x0")
        self.gives_first = not layer and bool(cfg.extras and set(shares) & set(cfg.extras))

    def branch(self, x, inputs: AttentionInputs):
        """x (B, T, C) -> (change, statistics)."""
        stream = x
        if self.stream_mix is not None:
            stream = self.stream_mix(x, inputs.first[0])
        q, k, v = self.attn.project(self.attn_norm(stream))
        if self.value_mix is not None:
            v = self.value_mix(v, inputs.first[1])
        h = self.attn.attended(q, k, v, inputs)
        h = F.dropout(h, self.dropout, self.training)
        y, stats = self.ffn_branch(stream + h, inputs)
        if self.gives_first:
            stats = stats | {"first": (x, v)}
        # the caller adds the change to x
        return (h + y if stream is x else stream - x + h + y), stats


def cap(logits: torch.Tensor) -> torch.Tensor:
    """(..., V), by way of fp32: bf16 would lose digits three times."""
    return (CAP * (logits.float() / CAP).tanh()).to(logits.dtype)


def cross_entropy(logits, targets, z_loss: float, need_grad: bool):
    """model.cross_entropy of the capped logits, with the gradient of those that came in."""
    share = (logits.float() / CAP).tanh()
    sums, p = model.cross_entropy(CAP * share, targets, z_loss, need_grad)
    if need_grad:
        p.mul_(1 - share.square())  # d tanh
    return sums, p
