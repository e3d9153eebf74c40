"""Training with matmuls in fp8: `precision: fp8_e4m3`, or fp8_e4m3_rowwise. torch._scaled_mm is
all that is needed; why it is not torchao: docs/configuration.md.

y = x W^T and the two matmuls of its backward take operands of 8 bits, which share a scale chosen
anew each time from their largest value: one for a whole matrix (tensorwise; gradients are e5m2,
which has more range and fewer digits), or one for all that is summed up in one output (rowwise; all
is e4m3, scales are powers of two). The recipes, and in eager mode the numbers, are those of torchao
0.18 (Micikevicius et al. 2022). There is no state: names, checkpoints, resuming are as in bf16.

Weights and moments stay fp32, activations bf16. Only matrices of the blocks are converted whose
sizes are multiples of 16. In evaluation nothing is: a scale shared with neighbours would make the
value of a text depend on the batch that it stands in. So what fp8 trained is measured in bf16.
"""

from __future__ import annotations

import collections

import torch
import torch.nn as nn
import torch.nn.functional as F

from lumen.errors import UserError
from lumen.machine import FP8, scaled_matmul
from model import Linear, Transformer, role

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # what every size of a matmul must be a multiple of
# the least largest value that a scale fits, so that zeros have one, too. torchao's is 1e-12; here
# gradients come divided by the tokens of a step, and those of a row may be small
SMALLEST = 1e-30

# ---------------------------------------------------------------- the matmul


def quantize(x: torch.Tensor, dtype: torch.dtype, dim: int | None = None):
    """x (m, n) ~ scale q: (q in dtype, scale in fp32). dim: along it a scale is shared, so it is
    (m, 1) or (1, n); None: one for all, 0-d.

    What is not finite stays so: NaN is NaN, and Inf makes the scale 0, and NaN of itself; the guard
    must see it. (The cast alone would make Inf 448.)
    """
    most = torch.finfo(dtype).max
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    # in fp64, for compiled code divides in fp32 less exactly than eager code
    factor = (most / amax.double().clamp(min=SMALLEST)).float()
    if dim is not None:
        # a power of two: then a value is the same whichever way its matrix is scaled
        factor = factor.log2().floor().exp2()
    # the cast does not saturate in every torch
    q = (x.float() * factor).clamp(-most, most).to(dtype)
    return q, factor.reciprocal()


def column_major(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


class Fp8Matmul(torch.autograd.Function):
    """x W^T, x (m, k) and W (n, k) -> (m, n) in x's dtype.

    fast sums in forward only, as torchao does. Kept for backward: x, of 8 bits where that will do,
    and W itself, which is kept anyway (under FSDP2 only its shards are).
    """

    @staticmethod
    def forward(ctx, x, weight, rowwise: bool, emulated: bool):
        ctx.rowwise, ctx.emulated = rowwise, emulated
        along = 1 if rowwise else None
        q, scale = quantize(x, E4M3, along)
        # cast first: under FSDP2 weights come in x's dtype, and the numbers shall be the same
        w, w_scale = quantize(weight.to(x.dtype), E4M3, along)
        kept = (x,) if rowwise else (q, scale)
        ctx.save_for_backward(weight, *kept)
        how = {"dtype": x.dtype, "fast": True, "emulated": emulated}
        return matmul(q, scale, w.t(), w_scale.t(), **how)

    @staticmethod
    def backward(ctx, grad):
        weight, *kept = ctx.saved_tensors
        rowwise = ctx.rowwise
        how = {"dtype": grad.dtype, "fast": False, "emulated": ctx.emulated}
        kind = E4M3 if rowwise else E5M2
        g, g_scale = quantize(grad, kind, 1 if rowwise else None)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w, w_scale = quantize(weight.to(grad.dtype), E4M3, 0 if rowwise else None)
            dx = matmul(g.contiguous(), g_scale, column_major(w), w_scale, **how)
        if ctx.needs_input_grad[1]:  # not under LoRA
            if rowwise:  # here it is tokens that are summed up, so they share a scale
                g, g_scale = quantize(grad, kind, 0)
                kept = quantize(kept[0], E4M3, 0)
            q, scale = kept
            dw = matmul(g.t().contiguous(), g_scale.t(), column_major(q), scale, **how)
            dw = dw.to(weight.dtype)
        return dx, dw, None, None


def matmul(a, scale_a, b, scale_b, dtype: torch.dtype, fast: bool, emulated: bool):
    """(scale_a a) (scale_b b), see scaled_matmul. Emulated: the same numbers in fp32, which holds
    every product of two of 8 bits; only the order of the sums differs."""
    if emulated:
        return ((a.float() @ b.float()) * scale_a * scale_b).to(dtype)
    return scaled_matmul(a, b, scale_a, scale_b, dtype, fast)


class Fp8Linear(Linear):
    """model.Linear, which multiplies in fp8 while training. Made of one by `convert`."""

    rowwise = emulated = False

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        rows = x.flatten(0, -2)  # (m, k)
        # MoD lets any number of tokens through, which backward sums up. Zeros change nothing
        missing = -len(rows) % MULTIPLE
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))
        y = Fp8Matmul.apply(rows, self.weight, self.rowwise, self.emulated)
        return y[: len(y) - missing].unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------- which matrices


def matrices(model: Transformer) -> dict[str, Linear]:
    """The Linears of the blocks that can be converted, by name. By object: the embedding and the
    head are in no block, MoD's router and predictor are no model.Linear, experts are 3-D, what
    quantize_base has packed and LoRA's own matrices are none either."""
    found = {}
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Linear) and fits(module):
            found[name] = module
    return found


def fits(module: nn.Linear) -> bool:
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def convert(model: Transformer, precision: str) -> None:
    """Make the matrices fp8's, where they are: parameters and whoever holds them (FSDP2, LoRA, an
    optimizer) see no change. Nothing where the precision is not one of fp8."""
    if precision not in FP8:
        return
    rowwise, emulated = FP8[precision]
    for module in matrices(model).values():
        module.__class__ = Fp8Linear
        module.rowwise, module.emulated = rowwise, emulated


def describe(model: Transformer, precision: str) -> str:
    """What is converted, and what is not: "8 matrices, 61 % of ..."."""
    chosen = {f"{name}.weight" for name in matrices(model)}
    counts, sizes = collections.Counter(), collections.Counter()
    for name, p in model.named_parameters():
        kind = "converted" if name in chosen else role(name)
        counts[kind] += 1
        sizes[kind] += p.numel()
    share = f"{sizes['converted']:,} of {sum(sizes.values()):,} parameters"
    scaled = "rowwise" if FP8[precision][0] else "tensorwise"
    text = f"{counts.pop('converted')} matrices, {share}, in e4m3 while training, scaled {scaled}"
    rest = ", ".join(f"{n} {plural(kind, n)}" for kind, n in sorted(counts.items()))
    return f"{text}; as in mixed_bf16: {rest}"


def plural(kind: str, n: int) -> str:
    if kind == "matrix":
        return f"matrices with a size that is no multiple of {MULTIPLE}"
    return kind if n == 1 else f"{kind}s"


# ---------------------------------------------------------------- whether it can be


def unfit(cfg) -> list[str]:
    """What of finetune.py's keys does not go with fp8."""
    if not cfg.precision.startswith("fp8"):
        return []
    wrong = []
    if cfg.quantize_base:
        wrong.append(f"precision: {cfg.precision} and quantize_base both say how matrices are held")
    if cfg.method != "sft":
        text = (
            f"precision: {cfg.precision} is not for method {cfg.method}: the reference is measured"
        )
        wrong.append(f"{text} in bf16, and margins would begin away from 0")
    return wrong


def check(model: Transformer, precision: str, device: torch.device) -> None:
    """E002: no matrix of the model (its shapes) can be converted; E003: this GPU does not multiply
    in fp8 after all. Nothing is tried where the precision is not one of fp8."""
    if precision not in FP8:
        return
    if not matrices(model):
        text = (
            f"precision: {precision} converts no matrix of this model: d_model {model.cfg.d_model}"
        )
        text += f", d_ff {model.cfg.d_ff} or the heads' width are no multiples of {MULTIPLE}"
        raise UserError("E002", f"{text}; change them, or take mixed_bf16")
    rowwise, emulated = FP8[precision]
    if emulated:
        return
    try:
        off = try_out(device, rowwise)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        off = str(error).strip().splitlines()[0][:200]
    if not isinstance(off, float) or not off < 1e-2:
        text = f"precision: {precision} does not work with torch {torch.__version__} here"
        raise UserError("E003", f"{text} ({off}); take mixed_bf16")


def try_out(device: torch.device, rowwise: bool) -> float:
    """How far a small matmul and its gradients are from the emulated ones, relatively."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 32), (48, 32), (64, 48))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for emulated in (False, True):
        x, weight, grad = (t.to(device, torch.bfloat16) for t in drawn)
        x.requires_grad_()
        weight.requires_grad_()
        y = Fp8Matmul.apply(x, weight, rowwise, emulated)
        y.backward(grad)
        results.append([t.detach().float() for t in (y, x.grad, weight.grad)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results))
