"""What Muon computes: hidden matrices, one by one, replaced by the nearest orthonormal ones.

Here is the arithmetic, and which parameters it is for. The optimizer itself stands in
lumen/optim.py; who computes what on several ranks in lumen/owners.py.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from lumen.machine import DTYPES
from model import ModelConfig, role

# Five steps of the best polynomials of degree 5 for singular values in [1e-3, 1], damped against
# bf16's roundings; they come out between 0.86 and 1.14, in bf16 as in fp32 (Polar Express: Amsel et
# al. 2025, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # singular values begin a little below 1, for bf16 rounds


def orthogonalise(
    g: torch.Tensor, steps=POLAR_EXPRESS, margin: float = MARGIN, size: float = 1.0
) -> torch.Tensor:
    """`size` times the nearest matrix with orthonormal rows (or columns), about: U V^T of g = U S
    V^T.

    g (m, n) or (batch, m, n); in g's dtype, by products alone: X becomes a X + b (X X^T) X +
    c (X X^T)^2 X, on whichever side is the shorter.
    """
    tall = g.shape[-2] > g.shape[-1]
    add_product = torch.addmm if g.dim() == 2 else torch.baddbmm
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = g * (1 / (norm * margin + 1e-7)).to(g.dtype)
    for i, (a, b, c) in enumerate(steps, 1):
        factor = size if i == len(steps) else 1.0
        gram = x.mT @ x if tall else x @ x.mT
        poly = add_product(gram, gram, gram, beta=b * factor, alpha=c * factor)
        left, right = (x, poly) if tall else (poly, x)
        x = add_product(x, left, right, beta=a * factor)
    return x


def by_parts(x: torch.Tensor, parts: tuple[int, ...], steps, margin: float) -> torch.Tensor:
    """x (..., rows, n) with each part orthogonalised by itself, 0.2 an entry (root mean square), as
    AdamW's updates have (Liu et al. 2025, Moonlight, arXiv 2502.16982)."""
    done, at = [], 0
    for rows, equal in itertools.groupby(parts):  # gate and up; keys and values: one batch
        count = len(list(equal))
        part = x.narrow(-2, at, rows * count)
        at += rows * count
        matrices = part.reshape(-1, rows, x.shape[-1])
        if len(matrices) == 1:  # a CPU's bf16 products are slower as a batch of one
            matrices = matrices[0]
        size = 0.2 * max(matrices.shape[-2:]) ** 0.5
        done.append(orthogonalise(matrices, steps, margin, size).view(part.shape))
    return done[0] if len(done) == 1 else torch.cat(done, -2)


# ---------------------------------------------------------------- which parameters


class Matrix(NamedTuple):
    """A hidden matrix, or a layer's experts, whole."""

    name: str
    shape: tuple[int, ...]  # (rows, n) or (E, rows, n)
    parts: tuple[int, ...]  # rows of each matrix that it is made of
    row: int | None = None  # of a parameter's experts this one


def is_hidden(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon orthogonalises the parameter of this name; AdamW has the others."""
    return len(shape) >= 2 and role(name) in ("matrix", "expert")


def parts_of(name: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """Rows of the matrices that a fused one is made of: queries, keys, values; gate, up."""
    rows = shape[-2]
    if name.endswith("wqkv.weight"):
        return tuple(n * model.head_dim for n in (model.n_heads, *[model.n_kv_heads] * 2))
    if name.endswith(("w13.weight", "experts.w13")):
        return (rows // 2, rows // 2)
    return (rows,)


def hidden_matrices(named, model: ModelConfig) -> list[Matrix]:
    """Of (name, whole shape)."""
    found = []
    for name, shape in named:
        if is_hidden(name, shape):
            found.append(Matrix(name, tuple(shape), parts_of(name, shape, model)))
    return found


def flops(matrix: Matrix) -> int:
    """Of orthogonalising it once."""
    total = 0
    for rows in matrix.parts:
        m, n = sorted((rows, matrix.shape[-1]))
        total += len(POLAR_EXPRESS) * (4 * m * m * n + 2 * m**3)
    return total * math.prod(matrix.shape[:-2])


# A batched product of small matrices costs a launch as a single one does; large ones gain nothing,
# and a CPU loses where a stack outgrows its cache (width 128, bf16: 34 ms; one by one 48).
STACK = 1 << 18  # numbers


def stacks(matrices: list[Matrix]) -> list[list[Matrix]]:
    """What is computed at a time: matrices of one shape, as long as they hold at most STACK
    numbers. The longest work first; the same whatever the number of ranks, for a product's bits
    may depend on how many there are in its batch."""
    alike: dict[tuple, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, matrix.parts), []).append(matrix)
    found = []
    for (shape, _), group in alike.items():
        count = max(1, STACK // math.prod(shape))
        found += [group[i : i + count] for i in range(0, len(group), count)]
    return sorted(found, key=lambda stack: -sum(map(flops, stack)))


def describe(matrices: list[Matrix], n_params: int) -> str:
    """What Muon owns of n_params, in words."""
    count = sum(len(m.parts) * math.prod(m.shape[:-2]) for m in matrices)
    share = sum(math.prod(m.shape) for m in matrices) / n_params
    text = f"{count:,} matrices in {len(matrices)} tensors, {100 * share:.0f} % of the parameters"
    return f"{text}; adamw the rest"


# ---------------------------------------------------------------- what it costs


def in_bf16(precision: str) -> bool:
    """Whether a run of this precision, as resolved, orthogonalises in bf16; else in fp32."""
    return DTYPES[precision] == torch.bfloat16


def step_flops(named, model: ModelConfig) -> int:
    """Of orthogonalising all of (name, shape) once."""
    return sum(map(flops, hidden_matrices(named, model)))


def at_a_rank(named, model: ModelConfig, ranks: int) -> list[Matrix]:
    """What is computed whole at one of the ranks that share a copy: all matrices, one rank or the
    other, and each rank's share of the experts. named: (name, shape)."""
    found = []
    for matrix in hidden_matrices(named, model):
        if len(matrix.shape) == 3:
            matrix = matrix._replace(shape=(-(-matrix.shape[0] // ranks), *matrix.shape[1:]))
        found.append(matrix)
    return found


def work_bytes(matrices: list[Matrix], precision: str, gathered: bool) -> int:
    """Bytes that come and go in a step beside gradients, at most: a stack before and after a
    product, and two Gram matrices; `gathered`: twice more as it travels, there and back."""
    b, most = 2 if in_bf16(precision) else 4, 0
    for stack in stacks(matrices):
        n = sum(math.prod(m.shape) for m in stack)
        short, long = sorted((max(stack[0].parts), stack[0].shape[-1]))
        gram = n * short // long
        most = max(most, b * (2 * n + 2 * gram + (4 * n if gathered else 0)))
    return most
