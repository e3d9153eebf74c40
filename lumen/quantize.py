"""Frozen matrices of few bits: int8, ours, and nf4, by bitsandbytes; for fine-tuning and serving.

Only how weights are held changes. A layer makes its matrix anew in the compute dtype, multiplies as
model.Linear does, and lets it go; backward makes it once more and gives no gradient of it.

int8: w ~ scale q, q from -127 to 127, a scale for each row of outputs (and expert): symmetric, to
the nearest. The scale is rounded to what bf16 can hold, which leaves q within 127 and the error
within half a step, and then bf16 gives scale q as fp32 does, rounded once, without a copy in fp32.
nf4: 16 levels at a normal distribution's quantiles, a scale (absmax) for each 64 numbers: QLoRA
(Dettmers et al. 2023), without its second quantisation of the scales.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from lumen.errors import UserError
from model import Linear, Transformer
from model_moe import Experts, plain_experts

KINDS = ("int8", "nf4")
BLOCK = 64  # numbers that share a scale of nf4

# ---------------------------------------------------------------- a matrix of few bits


@dataclass(frozen=True)
class Packed:
    """A matrix (n, k), or experts' (E, n, k), as stored. It can be asked what kernels.py and
    model_moe.plain_experts ask of a weight: its shape, an expert of it, the numbers in a dtype."""

    kind: str
    shape: tuple[int, ...]
    q: torch.Tensor  # int8 of the shape; or uint8, two numbers in each: (n k / 2,), (E, n k / 2)
    scale: torch.Tensor  # fp32 (n,), (E, n); or (n k / BLOCK,), (E, n k / BLOCK)

    def __getitem__(self, e: int) -> Packed:
        return Packed(self.kind, self.shape[1:], self.q[e], self.scale[e])

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers: scale q in fp32, rounded once."""
        if self.kind == "nf4":
            # as one row: on a CPU 0.50.2 takes rows of 32 or 96 for whole blocks, and is wrong
            row = (1, math.prod(self.shape))
            dequantize = torch.ops.bitsandbytes.dequantize_4bit
            return dequantize(self.q, self.scale, BLOCK, "nf4", row, dtype).view(self.shape)
        # fp16 alone cannot hold the scales
        exact = torch.float32 if dtype == torch.float16 else dtype
        return self.q.to(exact).mul_(self.scale.to(exact).unsqueeze(-1)).to(dtype)


def pack(weight: torch.Tensor, kind: str) -> Packed:
    """weight (n, k), or (E, n, k) expert by expert, in few bits."""
    shape = tuple(weight.shape)
    if len(shape) == 3:
        each = [pack(w, kind) for w in weight]
        q, scale = (torch.stack(parts) for parts in zip(*((p.q, p.scale) for p in each)))
        return Packed(kind, shape, q, scale)
    weight = weight.detach().float().contiguous()
    if kind == "nf4":
        q, scale = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        return Packed(kind, shape, q.flatten(), scale)
    scale = (weight.abs().amax(1) / 127).bfloat16().float()
    # a row of zeros has scale 0
    q = (weight / scale.clamp(min=1e-38).unsqueeze(1)).round_().to(torch.int8)
    return Packed(kind, shape, q, scale)


def load_bitsandbytes() -> None:
    """E003 where it is not installed, or does not work here."""
    # it warns of an optional package for another kernel
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a third party's package can fail in any way
        text = "quantize_base: nf4 needs bitsandbytes, which cannot be imported"
        fix = "pip install -r requirements-finetune.txt, or quantize_base: int8"
        raise UserError("E003", f"{text} ({type(error).__name__}: {error}); {fix}") from None


# ---------------------------------------------------------------- layers


class FrozenLinear(torch.autograd.Function):
    """x W^T, of which backward gives dx only and keeps nothing but the packed W itself."""

    @staticmethod
    def forward(ctx, x, q, scale, kind: str, shape: tuple[int, int]):
        ctx.save_for_backward(q, scale)
        ctx.kind, ctx.shape = kind, shape
        return F.linear(x, Packed(kind, shape, q, scale).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight = Packed(ctx.kind, ctx.shape, *ctx.saved_tensors).to(grad.dtype)
        return grad @ weight, None, None, None, None


class QuantLinear(nn.Module):
    """model.Linear with a frozen weight (out, in) of few bits, which is in no state_dict."""

    def __init__(self, weight: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = weight.shape
        packed = pack(weight, kind)
        self.register_buffer("q", packed.q, persistent=False)
        self.register_buffer("scale", packed.scale, persistent=False)

    @property
    def packed(self) -> Packed:
        return Packed(self.kind, (self.out_features, self.in_features), self.q, self.scale)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in) fp32, made anew each time."""
        return self.packed.to(torch.float32)

    def forward(self, x):
        shape = (self.out_features, self.in_features)
        return FrozenLinear.apply(x, self.q, self.scale, self.kind, shape)


class QuantExperts(nn.Module):
    """model_moe.Experts with frozen weights of few bits, which are in no state_dict."""

    def __init__(self, experts: Experts, kind: str):
        super().__init__()
        self.kind, self.run = kind, experts.run
        slots, self.d_model, self.width = experts.w2.shape
        self.slots = slots
        for name in ("w13", "w2"):
            packed = pack(getattr(experts, name), kind)
            self.register_buffer(f"{name}_q", packed.q, persistent=False)
            self.register_buffer(f"{name}_scale", packed.scale, persistent=False)

    def held(self) -> tuple[torch.Tensor, ...]:
        return self.w13_q, self.w13_scale, self.w2_q, self.w2_scale

    def packed(self) -> tuple[Packed, Packed]:
        """w13, w2."""
        return both(self.kind, self.d_model, self.width, self.held())

    @property
    def w13(self) -> torch.Tensor:
        """(E, 2 I, C) fp32, made anew each time."""
        return self.packed()[0].to(torch.float32)

    @property
    def w2(self) -> torch.Tensor:
        """(E, C, I) fp32, made anew each time."""
        return self.packed()[1].to(torch.float32)

    def forward(self, x, p, ids, backend: str):
        if backend == "plain":
            return plain_experts(x, p, ids, *self.packed())
        sort = kernels.sort_by_expert(ids, self.slots)
        rows = (x.contiguous(), p.contiguous(), list(self.held()), *sort)
        return torch.ops.lumen.frozen_experts(*rows, backend, self.kind, self.width)[0]


def both(kind: str, d_model: int, width: int, held) -> tuple[Packed, Packed]:
    """w13 and w2 of as many experts as there are; held: q and scale of each."""
    q13, scale13, q2, scale2 = held
    slots = len(q2)
    w13 = Packed(kind, (slots, 2 * width, d_model), q13, scale13)
    return w13, Packed(kind, (slots, d_model, width), q2, scale2)


def register():
    """lumen::frozen_experts and its backward: lumen::experts with packed weights, of which slices
    makes an expert's matrix at a time, the other backends a layer's."""
    given = "Tensor x, Tensor p, Tensor[] held, Tensor order, Tensor inv, Tensor offs"
    how = "str backend, str kind, int width"
    schema = f"({given}, {how}) -> (Tensor, Tensor)"

    @torch.library.custom_op("lumen::frozen_experts", mutates_args=(), schema=schema)
    def forward(x, p, held, *more):
        order, inv, offs, backend, kind, width = more
        weights = both(kind, x.shape[1], width, held)
        if backend == "slices":
            return kernels.forward_slices(x, p, *weights, order, offs)
        return kernels.forward_rows(x, p, *weights, order, inv, offs, backend)

    @forward.register_fake
    def _(x, p, held, *more):
        return x.new_empty(x.shape), x.new_empty(p.numel(), 2 * more[-1])

    schema = f"(Tensor dout, {given}, Tensor z, {how}) -> (Tensor, Tensor)"

    @torch.library.custom_op("lumen::frozen_experts_backward", mutates_args=(), schema=schema)
    def backward(dout, x, p, held, *more):
        *sort, z, backend, kind, width = more
        rows = (dout, x, p, *both(kind, x.shape[1], width, held), *sort, z)
        if backend == "slices":
            return kernels.backward_slices(*rows, frozen=True)[:2]
        return kernels.backward_rows(*rows, backend, frozen=True)[:2]

    @backward.register_fake
    def _(dout, x, p, held, *more):
        return x.new_empty(x.shape), p.new_empty(p.shape)

    def setup_context(ctx, inputs, output):
        x, p, held, *sort, backend, kind, width = inputs
        ctx.how = (backend, kind, width)
        ctx.set_materialize_grads(False)  # no zeros for z's gradient, which nobody asks for
        ctx.save_for_backward(x, p, *held, *sort, output[1])

    def gradients(ctx, dout, _):
        if dout is None:
            return (None,) * 9
        x, p, *held_and_more = ctx.saved_tensors
        held, more = held_and_more[:4], held_and_more[4:]
        run = torch.ops.lumen.frozen_experts_backward
        dx, dp = run(dout.contiguous(), x, p, held, *more, *ctx.how)
        return dx, dp, [None] * 4, *(None,) * 6

    forward.register_autograd(gradients, setup_context=setup_context)


if not hasattr(torch.ops.lumen, "frozen_experts"):
    register()

# ---------------------------------------------------------------- a model


@torch.no_grad()
def quantize(model: Transformer, kind: str) -> str:
    """The blocks' matrices and experts become QuantLinear and QuantExperts, one after the other;
    embedding, head, norms and routers stay. Returns a line that says what became of them. E003:
    nf4 without bitsandbytes."""
    if kind == "nf4":
        load_bitsandbytes()
    count = before = after = 0
    # names alone: a list of modules would hold all of their weights until its end
    for path in [path for path, _ in model.blocks.named_modules(prefix="blocks")]:
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            made = QuantExperts(module, kind)
        elif isinstance(module, Linear):  # routers are none
            made = QuantLinear(module.weight, kind)
        else:
            continue
        count += 1
        before += sum(p.numel() * p.itemsize for p in module.parameters())
        after += sum(b.numel() * b.itemsize for b in made.buffers())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    sizes = f"{before / 2**20:,.1f} MiB are {after / 2**20:,.1f} MiB"
    return f"quantised  {count} matrices and layers of experts to {kind}: {sizes}"


def quantised_layers(model: nn.Module) -> dict[str, QuantLinear | QuantExperts]:
    """By their path."""
    kinds = (QuantLinear, QuantExperts)
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}


def n_parameters(model: Transformer) -> int:
    """All of them; those of few bits are buffers, which n_params() does not see."""
    total = model.n_params()["total"]
    for layer in quantised_layers(model).values():
        if isinstance(layer, QuantLinear):
            total += layer.out_features * layer.in_features
        else:
            total += 3 * layer.slots * layer.d_model * layer.width  # gate, up and down
    return total


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a packed weight of this shape, scales included."""
    n = math.prod(shape)
    if kind == "nf4":
        return -(-n // 2) + 4 * -(-n // BLOCK)
    return n + 4 * (n // shape[-1])
