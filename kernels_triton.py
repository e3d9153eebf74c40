"""The expert layer's kernels in Triton, and how they are launched; kernels.py calls them.

Importing this file needs the package `triton`. With TRITON_INTERPRET=1 the kernels run on a CPU,
for tests. Names and shapes are those of kernels.py.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

# Triton's own emulator, on CPU: far too slow to train
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# ---------------------------------------------------------------- tiles: which of them are tried
# Tuning compiles each tile for each launch that differs in strides or gathers, 0.3 to 1 s each. So
# few are tried, and only those whose compiled code keeps all in registers and shared memory:
# `python -m tools.ptx` shows it. Which is fastest was never measured: no GPU has run them.

MOST_TILES = 3  # tried for a launch
COMPILATIONS = 6 * MOST_TILES + 3  # of an expert layer, forward and backward: a test counts them

# Magnitudes of rows per expert: tiles are tuned once for each. For an argument that is 1 or a
# multiple of 16 Triton compiles anew, so these are not.
FEW, SOME, MANY, UNTUNED = 2, 3, 4, 5


def magnitude(rows: int, n_experts: int) -> int:
    """Of rows per expert. In a deterministic run nothing is tuned: the same tile, the same bits."""
    if torch.are_deterministic_algorithms_enabled():
        return UNTUNED
    mean = rows // n_experts
    if mean < 64:
        return FEW
    return SOME if mean < 256 else MANY


def dots_on(card, dtype, prec: str) -> str:
    """What multiplies there: "none", no tensor cores; "async", those of Hopper and Blackwell, which
    read shared memory by themselves; "sync", the others, which take operands from registers.

    card: what torch.cuda.get_device_properties says; prec: of products in fp32.
    """
    if dtype == torch.float32 and prec == "ieee":
        return "none"
    # 12.x has those of 8.x; HIP numbers its cards otherwise
    return "async" if card.major in (9, 10, 11) and not torch.version.hip else "sync"


def shared_bytes(tile, depth: str, itemsize: int, dots: str) -> int:
    """Bytes of shared memory that a tile takes at most; depth: the size that is summed over."""
    sides = sum(size for name, size in tile.kwargs.items() if name != depth)
    steps = tile.num_stages  # of the loop, whose operands are there at once
    if dots != "async":
        steps = max(steps - 1, 1)
    return steps * tile.kwargs[depth] * sides * itemsize + 1024  # barriers, a sum over the experts


def fits_registers(tile, depth: str, itemsize: int, dots: str) -> bool:
    """Whether a thread's part of the tile fits its registers: beyond these limits the compiler of
    triton 3.9 spilled."""
    sides = [size for name, size in tile.kwargs.items() if name != depth]
    mine = sides[0] * sides[1] / (32 * tile.num_warps)  # sums of one thread
    if dots == "none":  # each product of a step is an instruction of its own
        return mine * tile.kwargs[depth] <= 512
    return mine <= (128 if dots == "async" and itemsize == 2 else 64)


def worth_trying(depth: str, tiles: list, named: dict, **given) -> list:
    """At most MOST_TILES of the tiles, in their order, that fit the card which the kernel's operand
    x is on; the one that needs least where none does."""
    if INTERPRET:
        return tiles[:1]
    x, rows = named["x"], named["bucket"]
    card = torch.cuda.get_device_properties(x.device)
    # HIP has no memory to opt in to
    limit = getattr(card, "shared_memory_per_block_optin", 0) or card.shared_memory_per_block
    args = (depth, x.dtype.itemsize, dots_on(card, x.dtype, given["PREC"]))
    found = []
    for tile in tiles:
        fits = shared_bytes(tile, *args) <= limit
        wide = rows == FEW and tile.kwargs["BM"] > 64  # most of it would be padding
        if fits and not wide and fits_registers(tile, *args):
            found.append(tile)
    if not found:
        found = [min(tiles, key=lambda tile: shared_bytes(tile, *args))]
    return found[:1] if rows == UNTUNED else found[:MOST_TILES]


def measure(call, quantiles):
    """Milliseconds; Triton's own way takes three times as long."""
    return triton.testing.do_bench(call, warmup=10, rep=30, quantiles=quantiles)


def tuned(*sizes, depth: str):
    """Autotune over those of the tiles (BM, BN, BK, warps, stages) that are worth trying, once per
    weight shape and magnitude of rows per expert; the choice is kept in Triton's cache on disk.

    depth: the size that is summed over. The kernel must write nothing that it reads.
    """
    configs = []
    for m, n, k, warps, stages in [(16, 16, 16, 4, 1)] if INTERPRET else sizes:
        tile = {"BM": m, "BN": n, "BK": k}
        configs.append(triton.Config(tile, num_warps=warps, num_stages=stages))

    return triton.autotune(
        configs,
        key=["N", "K", "E", "bucket", "PREC"],  # and the dtypes: Triton adds them
        prune_configs_by={"early_config_prune": functools.partial(worth_trying, depth)},
        do_bench=measure,
        cache_results=True,
    )


def tuning_text() -> str:
    """What tuning costs, for the start of a run."""
    return f"about {COMPILATIONS} compilations, cached in {triton.knobs.cache.dir}"


# ---------------------------------------------------------------- kernels
# One program computes one tile of one expert. The host does not know how many rows an expert has:
# it launches the upper bound of cdiv(R, BM) + E row tiles; each program counts the tiles of all
# experts from offs (E numbers, in registers), finds its own expert and first row, and leaves if it
# is one too many. Rows are int64: R * d passes 2^31.


@tuned(
    (128, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 256, 64, 8, 3),
    (128, 128, 32, 8, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 8, 3),
    (32, 64, 32, 4, 3),
    (32, 32, 32, 4, 2),
    depth="BK",
)
@triton.jit
def gmm_kernel(x, w, y, tok, offs, R, N, K, bucket, we, wn, wk,
               E: tl.constexpr, EP: tl.constexpr, GATHER: tl.constexpr, PREC: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y[r] = w[e] @ x[tok[r]] (or x[r]): x (., K), w (E, N, K) by strides, y (R, N)."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(N, BN)
    tile = pid // n_tiles
    e = tl.arange(0, EP)
    begin = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
    end = tl.load(offs + e, mask=e < E, other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    last = tl.cumsum(tiles, 0)  # tiles up to and including expert e
    mine = tl.sum((last <= tile).to(tl.int32), 0)
    if mine >= E:
        return
    own = e == mine
    first = tl.sum(tl.where(own, begin + (tile - last + tiles) * BM, 0), 0)
    stop = tl.sum(tl.where(own, end, 0), 0)
    r = first + tl.arange(0, BM)
    n = (pid % n_tiles) * BN + tl.arange(0, BN)
    rows, cols = r < stop, n < N
    source = tl.load(tok + r, mask=rows, other=0).to(tl.int64) if GATHER else r.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = x + source[:, None] * K + k[None, :]
        a = tl.load(at, mask=rows[:, None] & (k < K)[None, :], other=0.0)
        at = w + mine.to(tl.int64) * we + n[None, :] * wn + k[:, None] * wk
        b = tl.load(at, mask=cols[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    at = y + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=rows[:, None] & cols[None, :])


@tuned(
    (64, 128, 128, 8, 3),
    (64, 64, 128, 8, 4),
    (64, 128, 256, 8, 3),
    (32, 128, 128, 8, 4),
    (32, 64, 64, 8, 3),
    (16, 64, 64, 4, 3),
    (16, 32, 32, 4, 2),
    depth="BM",
)
@triton.jit
def dw_kernel(dy, x, dw, dy_tok, x_tok, offs, N, K, bucket,
              E: tl.constexpr, DY_GATHER: tl.constexpr, X_GATHER: tl.constexpr,
              PREC: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """dw[e] = sum over e's rows r of dy[r] x[r]^T, (N, K); an expert without rows gets 0."""
    pid, e = tl.program_id(0), tl.program_id(1)
    n = (pid // tl.cdiv(K, BK)) * BN + tl.arange(0, BN)
    k = (pid % tl.cdiv(K, BK)) * BK + tl.arange(0, BK)
    begin = tl.where(e > 0, tl.load(offs + tl.maximum(e - 1, 0)), 0)
    end = tl.load(offs + e)
    acc = tl.zeros((BN, BK), tl.float32)
    for r0 in range(begin, end, BM):
        r = r0 + tl.arange(0, BM)
        rows = r < end
        ry = tl.load(dy_tok + r, mask=rows, other=0) if DY_GATHER else r
        rx = tl.load(x_tok + r, mask=rows, other=0) if X_GATHER else r
        at = dy + ry.to(tl.int64)[:, None] * N + n[None, :]
        a = tl.load(at, mask=rows[:, None] & (n < N)[None, :], other=0.0)
        at = x + rx.to(tl.int64)[:, None] * K + k[None, :]
        b = tl.load(at, mask=rows[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PREC)
    at = dw + e.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def swiglu_kernel(z, s, a, end, I, BI: tl.constexpr):
    """a[r] = s[r] * silu(gate) * up, one row a program, rows of the tail left alone."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(end):
        return
    c = tl.program_id(1) * BI + tl.arange(0, BI)
    gate = tl.load(z + r * 2 * I + c, mask=c < I, other=0.0).to(tl.float32)
    up = tl.load(z + r * 2 * I + I + c, mask=c < I, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * tl.load(s + r)
    tl.store(a + r * I + c, value.to(a.dtype.element_ty), mask=c < I)


@triton.jit
def swiglu_grad_kernel(z, s, da, dz, ds, end, I, BI: tl.constexpr):
    """dz and ds from da, which becomes s * a, what dW2 needs; ds of the tail is 0. One row a
    program."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(end):
        tl.store(ds + r, 0.0)
        return
    scale = tl.load(s + r)
    total = tl.zeros((BI,), tl.float32)
    for c0 in range(0, I, BI):
        c = c0 + tl.arange(0, BI)
        gate = tl.load(z + r * 2 * I + c, mask=c < I, other=0.0).to(tl.float32)
        up = tl.load(z + r * 2 * I + I + c, mask=c < I, other=0.0).to(tl.float32)
        grad = tl.load(da + r * I + c, mask=c < I, other=0.0).to(tl.float32)
        sig = tl.sigmoid(gate)
        act = gate * sig
        total += grad * act * up
        tl.store(da + r * I + c, (scale * act * up).to(da.dtype.element_ty), mask=c < I)
        dgate = scale * grad * up * (sig + act * (1 - sig))
        dup = scale * grad * act
        tl.store(dz + r * 2 * I + c, dgate.to(dz.dtype.element_ty), mask=c < I)
        tl.store(dz + r * 2 * I + I + c, dup.to(dz.dtype.element_ty), mask=c < I)
    tl.store(ds + r, tl.sum(total, 0))


@triton.jit
def combine_kernel(y, inv, out, end, K, d, BD: tl.constexpr):
    """out[t] = sum over k of y[inv[t, k]], the tail left out."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    stop = tl.load(end)
    for k in range(K):
        r = tl.load(inv + t * K + k)
        row = tl.load(y + r * d + c, mask=c < tl.where(r < stop, d, 0), other=0.0)
        acc += row.to(tl.float32)
    tl.store(out + t * d + c, acc.to(out.dtype.element_ty), mask=c < d)


# ---------------------------------------------------------------- launchers


def precision() -> str:
    """Of Triton's dot in fp32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gmm(x, w, offs, tok=None):
    """x (., k) gathered by tok (R,) if given, w (E, n, k) in any strides -> (R, n); the tail's rows
    are garbage."""
    E, N, K = w.shape
    R = len(x if tok is None else tok)
    y = x.new_empty(R, N)
    bucket = magnitude(R, E)

    def grid(meta):
        return ((triton.cdiv(R, meta["BM"]) + E) * triton.cdiv(N, meta["BN"]),)

    rows = offs if tok is None else tok
    fixed = {"E": E, "EP": triton.next_power_of_2(E), "GATHER": tok is not None}
    fixed["PREC"] = precision()
    gmm_kernel[grid](x, w, y, rows, offs, R, N, K, bucket, *w.stride(), **fixed)
    return y


def gmm_dw(dy, x, offs, dtype, dy_tok=None, x_tok=None):
    """dy (., n) and x (., k), each gathered if its index (R,) is given -> (E, n, k) in dtype."""
    E, N, K = offs.numel(), dy.shape[1], x.shape[1]
    R = len(dy if dy_tok is None else dy_tok)
    bucket = magnitude(R, E)
    dw = torch.empty(E, N, K, dtype=dtype, device=x.device)

    def grid(meta):
        return (triton.cdiv(N, meta["BN"]) * triton.cdiv(K, meta["BK"]), E)

    tables = (offs if dy_tok is None else dy_tok, offs if x_tok is None else x_tok, offs)
    fixed = {"E": E, "DY_GATHER": dy_tok is not None, "X_GATHER": x_tok is not None}
    fixed["PREC"] = precision()
    dw_kernel[grid](dy, x, dw, *tables, N, K, bucket, **fixed)
    return dw


def swiglu(z, s, offs):
    """z (R, 2I), s (R, 1) -> s * silu(gate) * up (R, I)."""
    R, I = z.shape[0], z.shape[1] // 2
    a = z.new_empty(R, I)
    block = min(triton.next_power_of_2(I), 1024)
    swiglu_kernel[(R, triton.cdiv(I, block))](z, s, a, offs[-1:], I, BI=block)
    return a


def swiglu_grad(z, s, da, dz, offs):
    """z (R, 2I), s (R, 1), da = w2^T dout (R, I) -> ds (R,) fp32, 0 in the tail; dz is filled, and
    da becomes s * a, which is what dW2 needs."""
    R, I = da.shape
    ds = s.new_empty(R)
    block = min(triton.next_power_of_2(I), 1024)
    swiglu_grad_kernel[(R,)](z, s, da, dz, ds, offs[-1:], I, BI=block)
    return ds


def combine(y, inv, offs, T):
    """y (R, d) -> out[t] = sum over k of y[inv[t * K + k]] (T, d), the tail left out whatever its
    rows hold."""
    R, d = y.shape
    out = y.new_empty(T, d)
    block = min(triton.next_power_of_2(d), 1024)
    combine_kernel[(T, triton.cdiv(d, block))](y, inv, out, offs[-1:], R // T, d, BD=block)
    return out


# ---------------------------------------------------------------- the loss


@triton.jit
def cross_entropy_kernel(logits, targets, sums, V, z_loss, GRAD: tl.constexpr, BV: tl.constexpr):
    """model.cross_entropy of one row of logits, which its gradient overwrites; sums (n, 3)."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * V
    target = tl.load(targets + r)
    valid = target >= 0
    # the largest logit, where it stands, and the sum of exponentials, which shrinks whenever a
    # larger logit comes (Milakov and Gimelshein 2018): one pass in place of two
    top = -float("inf")
    guess = -1
    total = 0.0
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        largest, at = tl.max(x, 0, return_indices=True)
        guess = tl.where(largest > top, v0 + at, guess)
        new = tl.maximum(largest, top)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    lse = top + tl.log(total)
    right = tl.load(row + tl.where(valid, target, 0)).to(tl.float32)
    tl.store(sums + 3 * r, tl.where(valid, lse - right, 0.0))
    tl.store(sums + 3 * r + 1, tl.where(valid, z_loss * lse * lse, 0.0))
    tl.store(sums + 3 * r + 2, (valid & (guess == target)).to(tl.float32))
    if GRAD:
        scale = tl.where(valid, (1 + 2 * z_loss * lse) / total, 0.0)
        for v0 in range(0, V, BV):
            v = v0 + tl.arange(0, BV)
            x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - top) * scale - (v == target).to(tl.float32)
            tl.store(row + v, p.to(logits.dtype.element_ty), mask=v < V)


def cross_entropy(logits, targets, z_loss: float, need_grad: bool):
    """model.cross_entropy, in place: logits (n, V), contiguous, of any dtype but fp64."""
    n, V = logits.shape
    sums = torch.empty(n, 3, device=logits.device)
    # on sm_90 five programs share an SM; of twice the block only two would (registers)
    block = min(triton.next_power_of_2(V), 4096)
    fixed = {"GRAD": need_grad, "BV": block, "num_warps": 8}
    cross_entropy_kernel[(n,)](logits, targets, sums, V, z_loss, **fixed)
    return sums.sum(0), logits
