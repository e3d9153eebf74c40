"""Frozen matrices of few bits: int8 and int4, ours, and nf4, by bitsandbytes. Fine-tuning takes
int8 and nf4, serving int8 and int4.

Only how weights are held changes. A layer makes its matrix anew in the compute dtype, multiplies as
model.Linear does, and lets it go; backward makes it once more and gives no gradient of it.

int8: w ~ scale q, q from -127 to 127, a scale for each row of outputs (and expert): symmetric, to
the nearest. The scale is rounded to what bf16 can hold, which leaves q within 127 and the error
within half a step, and then bf16 gives scale q as fp32 does, rounded once, without a copy in fp32.
int4: lumen/fewbits.py, which also multiplies a few rows by int8 and int4 without unpacking them.
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
from lumen import fewbits
from lumen.errors import UserError
from model import Linear, Transformer
from model_moe import Experts, plain_experts

KINDS = ("int8", "nf4")  # of a base that is fine-tuned; int4 is for serving
BLOCK = 64  # numbers that share a scale of nf4

# ---------------------------------------------------------------- a matrix of few bits


@dataclass(frozen=True)
class Packed:
    """A matrix (n, k), or experts' (E, n, k), as stored. It can be asked what kernels.py and
    model_moe.plain_experts ask of a weight: its shape, an expert of it, the numbers in a dtype."""

    kind: str
    shape: tuple[int, ...]
    # int8: of the shape; nf4: uint8, two numbers in each, (n k / 2,), (E, n k / 2); int4, and
    # int4 as the kernel wants it (blocks): lumen/fewbits.py
    q: torch.Tensor
    scale: torch.Tensor  # fp32 (n,), (E, n); nf4: (n k / BLOCK,), (E, n k / BLOCK)

    def __getitem__(self, e: int) -> Packed:
        return Packed(self.kind, self.shape[1:], self.q[e], self.scale[e])

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers: scale q in fp32, rounded once."""
        if self.kind == "nf4":
            # as one row: on a CPU 0.50.2 takes rows of 32 or 96 for whole blocks, and is wrong
            row = (1, math.prod(self.shape))
            dequantize = torch.ops.bitsandbytes.dequantize_4bit
            return dequantize(self.q, self.scale, BLOCK, "nf4", row, dtype).view(self.shape)
        if self.kind == "int4":
            return fewbits.unpack(self.q, self.scale, self.shape[-1], dtype)
        if self.kind == "blocks":
            if len(self.shape) == 3:
                return torch.stack([self[e].to(dtype) for e in range(self.shape[0])])
            return fewbits.unpack_blocks(self.q, self.scale, dtype)
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
    if kind == "int4":
        return Packed(kind, shape, *fewbits.pack(weight))
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
    """model.Linear with a frozen weight (out, in) of few bits, which is in no state_dict.

    packed: what the weight became, where it is not to be rounded to the nearest."""

    def __init__(self, weight: torch.Tensor, kind: str, packed: Packed | None = None):
        super().__init__()
        self.kind = kind
        self.few_rows = 0  # so many at most are multiplied without unpacking the matrix
        self.out_features, self.in_features = weight.shape
        packed = packed or pack(weight, kind)
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
        if self.few_rows and fewbits.few(x, self.few_rows):
            return fewbits.multiply(x, self.packed)
        shape = (self.out_features, self.in_features)
        return FrozenLinear.apply(x, self.q, self.scale, self.kind, shape)


class QuantExperts(nn.Module):
    """model_moe.Experts with frozen weights of few bits, which are in no state_dict."""

    def __init__(self, experts: Experts, kind: str, packed: dict[str, Packed] | None = None):
        super().__init__()
        self.kind, self.run = kind, experts.run
        self.few_rows = 0
        slots, self.d_model, self.width = experts.w2.shape
        self.slots = slots
        for name in ("w13", "w2"):
            packed_now = packed[name] if packed else pack(getattr(experts, name), kind)
            self.register_buffer(f"{name}_q", packed_now.q, persistent=False)
            self.register_buffer(f"{name}_scale", packed_now.scale, persistent=False)

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
        if self.few_rows and fewbits.few(x, self.few_rows):
            return fewbits.experts(x, p, ids, *self.packed())
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
    for path in convertible(model):
        module = model.get_submodule(path)
        made = QuantExperts if isinstance(module, Experts) else QuantLinear
        put(model, path, made(module if made is QuantExperts else module.weight, kind))
    return summary(model, kind)


def convertible(model: Transformer) -> list[str]:
    """Where the matrices and layers of experts are, found by what they are: routers, norms,
    embedding and head are none. Paths alone: a list of modules would hold all of their weights."""
    found = []
    for path, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, (Experts, Linear)):
            found.append(path)
    return found


def put(model: Transformer, path: str, made: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)


def summary(model: Transformer, kind: str) -> str:
    """What was converted, counted by what it is, and what stays."""
    after = numbers = 0
    counts: dict[str, int] = {}
    for path, layer in quantised_layers(model).items():
        name = ".".join(path.split(".")[2:])  # blocks.7.attn.wo: attn.wo
        counts[name] = counts.get(name, 0) + 1
        after += sum(b.numel() * b.itemsize for b in layer.buffers())
        numbers += n_numbers(layer)
    rest = sum(p.numel() for p in model.parameters())
    text = f"quantised  {sum(counts.values())} matrices and layers of experts to {kind}"
    each = ", ".join(f"{name} {n}" for name, n in counts.items())
    sizes = f"{4 * numbers / 2**20:,.1f} MiB in fp32 are {after / 2**20:,.1f} MiB"
    stays = f"{rest:,} others (embedding, head, norms, routers) stay"
    return f"{text} ({each}): {numbers:,} numbers, {sizes}; {stays}"


def quantised_layers(model: nn.Module) -> dict[str, QuantLinear | QuantExperts]:
    """By their path."""
    kinds = (QuantLinear, QuantExperts)
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}


def n_parameters(model: Transformer) -> int:
    """All of them; those of few bits are buffers, which n_params() does not see."""
    total = model.n_params()["total"]
    return total + sum(n_numbers(layer) for layer in quantised_layers(model).values())


def n_numbers(layer: QuantLinear | QuantExperts) -> int:
    if isinstance(layer, QuantLinear):
        return layer.out_features * layer.in_features
    return 3 * layer.slots * layer.d_model * layer.width  # gate, up and down


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a packed weight of this shape, scales included."""
    n = math.prod(shape)
    if kind == "int4":
        return n // shape[-1] * fewbits.row_bytes(shape[-1])
    if kind == "nf4":
        return -(-n // 2) + 4 * -(-n // BLOCK)
    return n + 4 * (n // shape[-1])
