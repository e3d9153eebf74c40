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


def compilations(tiles: int) -> int:
    """Of an expert layer, forward and backward, with so many tiles a launch: a test counts them."""
    return 6 * tiles + 1


def tuning_text() -> str:
    """What tuning costs, for the start of a run."""
    most = 1 if torch.are_deterministic_algorithms_enabled() else MOST_TILES
    return f"about {compilations(most)} compilations, cached in {triton.knobs.cache.dir}"


# ---------------------------------------------------------------- kernels
# Rows are sorted by expert, and a program computes one tile of one expert. The host does not know
# how many rows an expert has: it launches the upper bound of cdiv(R, BM) + E row tiles, and each
# program finds its own from offs (E numbers, in registers). Rows are int64: R * d passes 2^31.


@triton.jit
def find_tile(offs, n_tiles, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """This program's expert (E or more: it is one too many), its rows, which of them that expert
    has, and which of the n_tiles column tiles is its own."""
    HEIGHT: tl.constexpr = 16  # row tiles that share w's column tiles in the L2 cache
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    begin = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
    end = tl.load(offs + e, mask=e < E, other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    last = tl.cumsum(tiles, 0)  # row tiles up to and including expert e
    mine = tl.sum((last <= pid // n_tiles).to(tl.int32), 0)
    own = e == mine
    first = tl.sum(tl.where(own, begin, 0), 0)
    stop = tl.sum(tl.where(own, end, 0), 0)
    # its programs go down HEIGHT row tiles of a column, then the next column, then further down
    nth = pid - n_tiles * tl.sum(tl.where(own, last - tiles, 0), 0)
    top = nth // (HEIGHT * n_tiles) * HEIGHT
    height = tl.maximum(tl.minimum(tl.cdiv(stop - first, BM) - top, HEIGHT), 1)
    nth -= top * n_tiles
    r = first + (top + nth % height) * BM + tl.arange(0, BM)
    return mine, r, r < stop, nth // height


@triton.jit
def find_rows(tok, r, inside, GATHER: tl.constexpr):
    """Where the sorted rows r are in x."""
    if GATHER:
        return tl.load(tok + r, mask=inside, other=0).to(tl.int64)
    return r.to(tl.int64)


@triton.jit
def product(x, w, tok, e, r, inside, n, cols, K, we, wn, wk, GATHER: tl.constexpr,
            PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr):  # fmt: skip
    """x[tok[r]] (or x[r]) @ w[e][n]^T, summed in fp32; 0 outside of rows inside and of cols."""
    rows = find_rows(tok, r, inside, GATHER)
    w += e.to(tl.int64) * we
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = x + rows[:, None] * K + k[None, :]
        a = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        at = w + n[None, :] * wn + k[:, None] * wk
        b = tl.load(at, mask=cols[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def halves(tile):
    """Its left and right columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


GMM_TILES = (
    (128, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 256, 64, 8, 3),
    (128, 128, 32, 8, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 8, 3),
    (32, 64, 32, 4, 3),
    (32, 32, 32, 4, 2),
)


@tuned(*GMM_TILES, depth="BK")
@triton.jit
def gmm_kernel(x, w, y, tok, offs, N, K, bucket, we, wn, wk,
               E: tl.constexpr, EP: tl.constexpr, GATHER: tl.constexpr, PREC: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y[r] = w[e] @ x[tok[r]] (or x[r]): x (., K), w (E, N, K) by strides, y (R, N)."""
    e, r, inside, column = find_tile(offs, tl.cdiv(N, BN), E, EP, BM)
    if e >= E:
        return
    n = column * BN + tl.arange(0, BN)
    acc = product(x, w, tok, e, r, inside, n, n < N, K, we, wn, wk, GATHER, PREC, BM, BN, BK)
    at = y + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@tuned(*GMM_TILES, depth="BK")
@triton.jit
def gate_up_kernel(x, w, z, a, s, tok, offs, N, K, bucket, we, wn, wk,
                   E: tl.constexpr, EP: tl.constexpr, GATHER: tl.constexpr, PREC: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """z[r] = w[e] @ x[tok[r]] as in gmm_kernel, N = 2I, and a[r] = s[r] * silu(gate) * up."""
    I = N // 2
    e, r, inside, column = find_tile(offs, tl.cdiv(N, BN), E, EP, BM)
    if e >= E:
        return
    c = tl.arange(0, BN)  # columns of the product: the first half gate, the second up
    i = column * (BN // 2) + c % (BN // 2)
    n = i + c // (BN // 2) * I
    acc = product(x, w, tok, e, r, inside, n, i < I, K, we, wn, wk, GATHER, PREC, BM, BN, BK)
    # rounded first, so that the activation is that of the z which backward reads
    gate, up = halves(acc.to(z.dtype.element_ty))
    i = column * (BN // 2) + tl.arange(0, BN // 2)
    mask = inside[:, None] & (i < I)[None, :]
    at = z + r.to(tl.int64)[:, None] * N + i[None, :]
    tl.store(at, gate, mask=mask)
    tl.store(at + I, up, mask=mask)
    gate, scale = gate.to(tl.float32), tl.load(s + r, mask=inside, other=0.0)
    value = gate * tl.sigmoid(gate) * up.to(tl.float32) * scale[:, None]
    at = a + r.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, value.to(a.dtype.element_ty), mask=mask)


# A tile's part of the gates' gradient stands in the first of its BN / PART places, 0 in the others:
# how many there are does not depend on the tile.
PART = 8 if INTERPRET else 32


@triton.jit
def activation_grad(da, z, s, a, dz, r, inside, n, N):
    """From columns n of da: those of a = s * silu(gate) * up and of dz are stored, and the rows'
    sum of da * silu(gate) * up is returned."""
    mask = inside[:, None] & (n < N)[None, :]
    at = r.to(tl.int64)[:, None] * (2 * N) + n[None, :]
    gate = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z + at + N, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(s + r, mask=inside, other=0.0)[:, None]
    sig = tl.sigmoid(gate)
    act = gate * sig
    dgate = scale * da * up * (sig + act * (1 - sig))
    tl.store(dz + at, dgate.to(dz.dtype.element_ty), mask=mask)
    tl.store(dz + at + N, (scale * da * act).to(dz.dtype.element_ty), mask=mask)
    at = a + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, (scale * act * up).to(a.dtype.element_ty), mask=mask)
    return tl.sum(da * act * up, 1)


@tuned(
    (128, 128, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 16, 8, 4),
    (32, 64, 32, 4, 3),
    (32, 32, 32, 4, 2),
    depth="BK",
)
@triton.jit
def gate_up_grad_kernel(x, w, z, s, a, dz, ds, tok, offs, N, K, bucket, we, wn, wk,
                        E: tl.constexpr, EP: tl.constexpr, GATHER: tl.constexpr,
                        PREC: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr,
                        BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """da[r] = w[e] @ x[tok[r]] as in gmm_kernel, with x = dout and N = I, is not stored, but what
    follows from it: a, dz, and ds (R, cdiv(N, PART)), whose rows are to be summed."""
    e, r, inside, column = find_tile(offs, tl.cdiv(N, BN), E, EP, BM)
    if e >= E:
        return
    n = column * BN + tl.arange(0, BN)
    acc = product(x, w, tok, e, r, inside, n, n < N, K, we, wn, wk, GATHER, PREC, BM, BN, BK)
    # a quarter after the other: a whole tile's values do not fit the registers
    left, right = halves(acc)
    first, second = halves(left)
    third, fourth = halves(right)
    n = column * BN + tl.arange(0, BN // 4)
    total = activation_grad(first, z, s, a, dz, r, inside, n, N)
    total += activation_grad(second, z, s, a, dz, r, inside, n + BN // 4, N)
    total += activation_grad(third, z, s, a, dz, r, inside, n + BN // 2, N)
    total += activation_grad(fourth, z, s, a, dz, r, inside, n + BN // 4 * 3, N)
    place = tl.arange(0, BN // PART)
    mine = column * (BN // PART) + place
    parts = tl.cdiv(N, PART)
    at = ds + r.to(tl.int64)[:, None] * parts + mine[None, :]
    values = tl.where(place[None, :] == 0, total[:, None], 0.0)
    tl.store(at, values, mask=inside[:, None] & (mine < parts)[None, :])


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
    r = begin + tl.arange(0, BM)
    # Loaded one step ahead: an index loaded in the step that uses it takes a stage of the pipeline.
    # dy is loaded transposed: on sm_80 a tile that is transposed later passes through registers.
    dy_rows = find_rows(dy_tok, r, r < end, DY_GATHER)
    x_rows = find_rows(x_tok, r, r < end, X_GATHER)
    for _ in range(begin, end, BM):
        inside = r < end
        at = dy + dy_rows[None, :] * N + n[:, None]
        a = tl.load(at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        at = x + x_rows[:, None] * K + k[None, :]
        b = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        r += BM
        dy_rows = find_rows(dy_tok, r, r < end, DY_GATHER)
        x_rows = find_rows(x_tok, r, r < end, X_GATHER)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    at = dw + e.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


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


def rows_of(kernel, x, w, tensors, offs, tok, **fixed):
    """Launch one of the kernels that find their tile in offs; tensors: what stands between w and
    tok."""
    E, N, K = w.shape
    R = len(x if tok is None else tok)
    bucket = magnitude(R, E)

    def grid(meta):
        return ((triton.cdiv(R, meta["BM"]) + E) * triton.cdiv(N, meta["BN"]),)

    rows = offs if tok is None else tok
    fixed |= {"E": E, "EP": triton.next_power_of_2(E), "GATHER": tok is not None}
    fixed["PREC"] = precision()
    kernel[grid](x, w, *tensors, rows, offs, N, K, bucket, *w.stride(), **fixed)


def gmm(x, w, offs, tok=None):
    """x (., k) gathered by tok (R,) if given, w (E, n, k) in any strides -> (R, n); the tail's rows
    are garbage."""
    y = x.new_empty(len(x if tok is None else tok), w.shape[1])
    rows_of(gmm_kernel, x, w, [y], offs, tok)
    return y


def gate_up(x, w13, s, offs, tok):
    """x (T, d) gathered by tok (R,), w13 (E, 2I, d), s (R, 1) -> z (R, 2I), the rows' gate and up,
    and s * silu(gate) * up (R, I); the tail's rows are garbage."""
    z = x.new_empty(len(tok), w13.shape[1])
    a = x.new_empty(len(tok), w13.shape[1] // 2)
    rows_of(gate_up_kernel, x, w13, [z, a, s], offs, tok)
    return z, a


def gate_up_grad(dout, w2, z, s, offs, tok):
    """dout (T, d) gathered by tok (R,), w2 (E, d, I), z (R, 2I), s (R, 1) -> a as gate_up's, what
    dW2 needs, dz and ds (R,) in fp32; the tail's rows are garbage."""
    R, I = len(z), w2.shape[2]
    dz, a = torch.empty_like(z), z.new_empty(R, I)
    ds = s.new_empty(R, triton.cdiv(I, PART))
    tensors = [z, s, a, dz, ds]
    rows_of(gate_up_grad_kernel, dout, w2.transpose(1, 2), tensors, offs, tok, PART=PART)
    return a, dz, ds.sum(1)


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
    # on sm_90 four or five programs share an SM; of twice the block two would (registers)
    block = min(triton.next_power_of_2(V), 4096)
    fixed = {"GRAD": need_grad, "BV": block, "num_warps": 8}
    cross_entropy_kernel[(n,)](logits, targets, sums, V, z_loss, **fixed)
    return sums.sum(0), logits
