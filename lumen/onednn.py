"""Matrices in the layout in which oneDNN multiplies few rows fastest, for models that only answer.

A token that is written reads every weight once, so decoding is as fast as that. torch gives fp32
to MKL and bf16 to oneDNN in the plain layout. Reordered once, by the operators with which
torch.compile freezes weights, SmolLM2's matrices take 0.5 to 0.8 of the time in bf16 and 0.6 to 1.1
in fp32 for one row, 0.3 to 0.65 for eight (AMD EPYC, one thread, a shared machine). That is still
about half of what the memory gives; llama.cpp's kernels reach nearly all (docs/serving.md, Speed).
A torch without these operators, and other devices, keep their layers as they are.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, Transformer

ROWS = 8  # that the layout is made for; more are as fast, and for 1 oneDNN would leave it plain
LEAST = 4  # rows of a product: with fewer it is up to a quarter slower


class DnnLinear(nn.Module):
    """model.Linear with its weight (out, in) reordered. Where that is needed as it was too, `keep`
    it: `weight` is then the same parameter."""

    def __init__(self, weight: nn.Parameter, keep: bool = False):
        super().__init__()
        # no buffer: an opaque tensor can be neither saved nor moved
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.weight = weight if keep else nn.Parameter(self.packed, requires_grad=False)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        n = len(rows)  # 0 where MoD lets no token through
        if n < LEAST:
            rows = F.pad(rows, (0, 0, 0, LEAST - n))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")
        return y[:n].view(*x.shape[:-1], y.shape[1])


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def reorder(model: Transformer) -> None:
    """Every matrix of the model but its experts', in place, and the head, of which the embedding or
    the loss needs the plain one too. Its state_dict can no longer be saved."""
    if not works(model.embed.weight.device, model.compute_dtype):
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear and name != "head":
                setattr(parent, name, DnnLinear(layer.weight))
    model.head = DnnLinear(model.head_weight(), keep=True)
