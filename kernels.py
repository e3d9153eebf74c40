"""The experts' fast paths: their layer by three backends behind one operator, and what of them can
work here. lumen/tryout.py chooses among the backends by trying them, and `python -m tools.selftest`
checks and times them. Those of attention are in kernels_attention.py.

Optional: model_moe.py computes experts by a plain formula where this file is not. It imports
nothing of ours; errors are plain ValueError.

The experts' layer is one operator: out[t] = sum over k of p[t, k] * w2[e] @ (silu(gate) * up) with
e = ids[t, k] < E and (gate, up) = w13[e] @ x[t]. Everything has a static shape (T * K rows, sorted
by expert), nothing is dropped, and only the backend "slices" waits for the device, so a CUDA graph
and torch.compile(fullgraph=True) can hold it. Kept for backward: x, p, the sort, and z = the rows'
gate and up before the activation; the experts' outputs y are never kept, since the gates' gradient
<dout, w2 @ a> = <w2^T @ dout, a> does not need them (SonicMoE, arXiv 2512.14080). No atomics: the
same inputs give the same bits.

Names: T tokens (rows and positions flattened), d = d_model, I an expert's hidden width, E experts,
K experts per token, R = T * K sorted rows; "the tail": rows without expert, sorted last.
"""

from __future__ import annotations

import importlib
import os

import torch
import torch.nn.functional as F

# Triton's own emulator, on CPU: for tests, far too slow to train
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
triton = None
BROKEN = ""  # why the one that is installed cannot be imported
if INTERPRET or torch.version.cuda or torch.version.hip:
    # a CPU build of torch has no use for it and saves the import
    try:
        import triton

        import kernels_triton
    except Exception as error:  # a third party's package can fail in any way
        triton, BROKEN = None, f"{type(error).__name__}: {error}"

# public since torch 2.10
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
aten = torch.ops.aten

# ---------------------------------------------------------------- sorting


def sort_by_expert(ids, n_experts: int):
    """ids (T, K) int64, n_experts or more means no expert -> order (R,), inv (R,) int64, offs (E,)
    int32.

    order lists the slots t * K + k by expert, ties in order of t, slots without expert (the tail)
    last; inv is its inverse; expert e owns the sorted rows offs[e - 1] to offs[e]. No host sync.
    """
    keys = ids.reshape(-1).clamp(max=n_experts)
    if n_experts < 2**15:
        keys = keys.to(torch.int16)  # a radix sort of 2 bytes instead of 8
    keys, order = keys.sort(stable=True)
    bounds = torch.arange(1, n_experts + 1, device=ids.device, dtype=keys.dtype)
    offs = torch.searchsorted(keys, bounds, out_int32=True)
    inv = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
    return order, inv, offs


# ---------------------------------------------------------------- grouped_mm and triton


def gmm(backend, x, w, offs, tok=None):
    """x (., k) gathered by tok (R,) if given, w (E, n, k) in any strides -> (R, n); the tail's rows
    are garbage."""
    if backend == "triton":
        return kernels_triton.gmm(x, w, offs, tok)
    return grouped_mm(x if tok is None else x[tok], w.transpose(1, 2), offs=offs)


def gmm_dw(backend, dy, x, offs, dtype, dy_tok=None, x_tok=None):
    """dy (., n) and x (., k), each gathered if its index (R,) is given -> (E, n, k) in dtype."""
    if backend == "triton":
        return kernels_triton.gmm_dw(dy, x, offs, dtype, dy_tok, x_tok)
    if dy_tok is not None:
        dy = dy[dy_tok]
    if x_tok is not None:
        x = x[x_tok]
    dw = grouped_mm(dy.t(), x, offs=offs)
    # on Blackwell torch leaves an expert without rows as the memory was (pytorch issue 172439)
    without_rows = offs.diff(prepend=offs.new_zeros(1)) == 0
    return dw.masked_fill_(without_rows[:, None, None], 0).to(dtype)


def gate_up(backend, x, w13, s, offs, tok):
    """x (T, d) gathered by tok (R,), w13 (E, 2I, d), s (R, 1) -> z (R, 2I), the rows' gate and up,
    and s * silu(gate) * up (R, I)."""
    if backend == "triton":
        return kernels_triton.gate_up(x, w13, s, offs, tok)
    z = gmm(backend, x, w13, offs, tok)
    gate, up = z.chunk(2, 1)
    return z, F.silu(gate).mul_(up).mul_(s)


def gate_up_grad(backend, dout, w2, z, s, offs, tok):
    """dout (T, d) gathered by tok (R,), w2 (E, d, I), z (R, 2I), s (R, 1) -> a as gate_up's, what
    dW2 needs, dz, and ds (R,), 0 in the tail."""
    if backend == "triton":
        a, dz, ds = kernels_triton.gate_up_grad(dout, w2, z, s, offs, tok)
    else:
        da = gmm(backend, dout, w2.transpose(1, 2), offs, tok)
        a, dz = torch.empty_like(da), torch.empty_like(z)
        ds = swiglu_grad(z, s, da, a, dz)
    ds.masked_fill_(torch.arange(len(ds), device=ds.device) >= offs[-1:], 0)
    return a, dz, ds


def swiglu_grad(z, s, da, a, dz):
    """z (n, 2I), s (n, 1), da = w2^T dout (n, I) -> ds (n,) = <da, a>; a becomes s * a, dz is
    filled, da is used up."""
    gate, up = z.chunk(2, 1)
    dgate, dup = dz.chunk(2, 1)
    aten.silu.out(gate, out=a)
    torch.mul(da, a, out=dup)  # still without s, as <da, a> = sum of da * silu(gate) * up needs it
    ds = (dup * up).sum(1, dtype=s.dtype)
    dup.mul_(s)
    aten.silu_backward.grad_input(da.mul_(up).mul_(s), gate, grad_input=dgate)
    a.mul_(up).mul_(s)
    return ds


def combine(backend, y, inv, offs, T):
    """y (R, d) -> out[t] = sum over k of y[inv[t * K + k]] (T, d), the tail left out whatever its
    rows hold."""
    if backend == "triton":
        return kernels_triton.combine(y, inv, offs, T)
    in_tail = torch.arange(len(y), device=y.device) >= offs[-1:]
    y.masked_fill_(in_tail.unsqueeze(1), 0)
    # an embedding bag is the fused gather and sum
    return F.embedding_bag(inv.view(T, -1), y, mode="sum")


def forward_rows(x, p, w13, w2, order, inv, offs, backend):
    """-> out (T, d), z (R, 2I). The gates are applied to the I-wide rows, so that combine is a
    plain sum."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    z, a = gate_up(backend, x, w13.to(x.dtype), s, offs, tok)
    y = gmm(backend, a, w2.to(x.dtype), offs)
    return combine(backend, y, inv, offs, len(x)), z


def backward_rows(dout, x, p, w13, w2, order, inv, offs, z, backend, frozen=False):
    """-> dx, dp, dw13, dw2, the last two empty where they are `frozen`."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    a, dz, ds = gate_up_grad(backend, dout, w2.to(x.dtype), z, s, offs, tok)
    dw13, dw2 = dout.new_empty(0), dout.new_empty(0)
    if not frozen:
        dw2 = gmm_dw(backend, dout, a, offs, w2.dtype, dy_tok=tok)
        dw13 = gmm_dw(backend, dz, x, offs, w13.dtype, x_tok=tok)
    rows = gmm(backend, dz, w13.to(x.dtype).transpose(1, 2), offs)
    dx = combine(backend, rows, inv, offs, len(x))
    return dx, ds[inv.view(p.shape)], dw13, dw2


# ---------------------------------------------------------------- slices: expert after expert
# On CPU fresh memory costs more than arithmetic on it (page faults, 0.2 ms per MB), so a few
# experts' rows live in buffers that the next ones use again and that mostly stay in the cache; no
# (R, d) tensor ever exists.

# rows at a time; at E 64 1 and 1024 took 10 to 19 % longer (1 thread, 2 noisy runs), 4096 the same
GROUP = 2048


def groups(x, p, z, order, ends, widths):
    """Yield for some experts at a time: tokens, gates and z of their rows, [(expert, its rows)], a
    buffer per width."""
    tok, s = order // p.shape[1], p.view(-1)[order].unsqueeze(1)
    begin = 0
    parts = [[]]
    sizes = [0]
    for e, end in enumerate(ends):
        if end == begin:  # in decoding most
            continue
        # on CUDA one at a time: a token twice in one index_add would need atomics
        n = end - begin
        if sizes[-1] and (sizes[-1] + n > GROUP or x.is_cuda):
            parts.append([])
            sizes.append(0)
        parts[-1].append((e, slice(sizes[-1], sizes[-1] + n)))
        sizes[-1] += n
        begin = end
    buffers = [x.new_empty(max(sizes), width) for width in widths]
    split = (t[:begin].split(sizes) for t in (tok, s, z))
    for experts, size, *rows in zip(parts, sizes, *split):
        yield *rows, experts, *[b[:size] for b in buffers]


def forward_slices(x, p, w13, w2, order, offs):
    I = w2.shape[2]
    out = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    z = x.new_empty(p.numel(), 2 * I)
    for tok, s, zs, experts, rows, a in groups(x, p, z, order, offs.tolist(), (x.shape[1], I)):
        torch.index_select(x, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(rows[own], w13[e].to(x.dtype).t(), out=zs[own])
        gate, up = zs.chunk(2, 1)
        aten.silu.out(gate, out=a).mul_(up).mul_(s)
        for e, own in experts:
            torch.mm(a[own], w2[e].to(x.dtype).t(), out=rows[own])
        out.index_add_(0, tok, rows.to(out.dtype))
    return out.to(x.dtype), z


def backward_slices(dout, x, p, w13, w2, order, inv, offs, z, frozen=False):
    I = w2.shape[2]
    ends = offs.tolist()
    dx = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    ds = p.new_zeros(p.numel())
    every = len({0, *ends}) > len(ends)  # every expert has rows; those without get zeros
    empty = torch.empty_like if every else torch.zeros_like
    dw13, dw2 = (x.new_empty(0) if frozen else empty(w) for w in (w13, w2))

    def store(a, b, out):  # a^T b, straight into the gradient where no cast is needed
        if out.dtype == x.dtype:
            torch.mm(a.t(), b, out=out)
        else:
            out.copy_(a.t() @ b)

    begin = 0
    widths = (x.shape[1], I, I, 2 * I)
    for tok, s, zs, experts, rows, da, a, dz in groups(x, p, z, order, ends, widths):
        torch.index_select(dout, 0, tok, out=rows)
        for e, own in experts:
            torch.mm(rows[own], w2[e].to(x.dtype), out=da[own])
        ds[begin : begin + len(tok)] = swiglu_grad(zs, s, da, a, dz)
        begin += len(tok)
        if not frozen:
            for e, own in experts:
                store(rows[own], a[own], dw2[e])
            torch.index_select(x, 0, tok, out=rows)
            for e, own in experts:
                store(dz[own], rows[own], dw13[e])
        for e, own in experts:
            torch.mm(dz[own], w13[e].to(x.dtype), out=rows[own])
        dx.index_add_(0, tok, rows.to(dx.dtype))
    return dx.to(x.dtype), ds[inv.view(p.shape)], dw13, dw2


# ---------------------------------------------------------------- the operator


def register():
    """lumen::experts and lumen::experts_backward, opaque to torch.compile, which sees only their
    shapes."""
    given = "Tensor x, Tensor p, Tensor w13, Tensor w2, Tensor order, Tensor inv, Tensor offs"
    schema = f"({given}, str backend) -> (Tensor, Tensor)"
    four = "(Tensor, Tensor, Tensor, Tensor)"
    grad_schema = f"(Tensor dout, {given}, Tensor z, str backend, bool frozen=False) -> {four}"

    @torch.library.custom_op("lumen::experts", mutates_args=(), schema=schema)
    def experts(x, p, w13, w2, order, inv, offs, backend):
        if backend == "slices":
            return forward_slices(x, p, w13, w2, order, offs)
        return forward_rows(x, p, w13, w2, order, inv, offs, backend)

    @experts.register_fake
    def _(x, p, w13, w2, order, inv, offs, backend):
        return x.new_empty(x.shape), x.new_empty(p.numel(), w13.shape[1])

    @torch.library.custom_op("lumen::experts_backward", mutates_args=(), schema=grad_schema)
    def experts_backward(dout, x, p, w13, w2, order, inv, offs, z, backend, frozen=False):
        rows = (dout, x, p, w13, w2, order, inv, offs, z)
        if backend == "slices":
            return backward_slices(*rows, frozen)
        return backward_rows(*rows, backend, frozen)

    @experts_backward.register_fake
    def _(dout, x, p, w13, w2, order, inv, offs, z, backend, frozen=False):
        weights = [w.new_empty(0 if frozen else w.shape) for w in (w13, w2)]
        return x.new_empty(x.shape), p.new_empty(p.shape), *weights

    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.set_materialize_grads(False)  # no zeros for z's gradient, which nobody asks for
        ctx.save_for_backward(*tensors, output[1])

    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 8
        frozen = not any(ctx.needs_input_grad[2:4])
        given = (dout.contiguous(), *ctx.saved_tensors, ctx.backend, frozen)
        dx, dp, *dw = torch.ops.lumen.experts_backward(*given)
        return dx, dp, *([None] * 2 if frozen else dw), None, None, None, None

    experts.register_autograd(backward, setup_context=setup_context)


# this file can be imported twice, under two names
if not hasattr(torch.ops.lumen, "experts"):
    register()


def run_experts(x, p, ids, w13, w2, backend: str):
    """x (T, d); gates p (T, K) in fp32 (fp64 with x in fp64); ids (T, K), E or more means none ->
    out (T, d).

    w13 (E, 2I, d), gate rows then up, and w2 (E, d, I) are fp32 master weights: cast to x.dtype
    inside, so no copy is kept, and given fp32 gradients, zero for an expert without tokens. The ids
    of a token differ from each other.
    """
    sort = sort_by_expert(ids, w2.shape[0])
    return torch.ops.lumen.experts(x.contiguous(), p.contiguous(), w13, w2, *sort, backend)[0]


# ---------------------------------------------------------------- which backend


def versioned(name: str) -> str:
    """A backend's name; Triton's with its version where one is installed, imported or not."""
    if name != "triton":
        return name
    try:
        return f"triton {triton.__version__ if triton else importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "triton"


def backends(device, dtype, d: int, I: int) -> dict[str, str | None]:
    """Backend -> None if it can work here, else the reason why not."""
    device = torch.device(device)
    return {
        "triton": no_triton(device, dtype),
        "grouped_mm": no_grouped_mm(device, dtype, d, I),
        "slices": None,
    }


def no_grouped_mm(device: torch.device, dtype, d: int, I: int) -> str | None:
    """Why torch's grouped matrix multiplication cannot work here."""
    step = 4 if dtype == torch.float32 else 8
    if grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm; install torch 2.10 or newer"
    if dtype == torch.float64:
        return "grouped_mm does not know float64; use slices"
    if d % step or I % step:
        sizes = f"d_model {d} and the experts' width {I}"
        return f"grouped_mm needs {sizes} to be multiples of {step} in {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0 or newer; use triton or slices"
    return None


def no_triton(device: torch.device, dtype) -> str | None:
    """Why our Triton kernels cannot work here."""
    found = versioned("triton")
    if found == "triton":
        return "triton is not installed (pip install triton)"
    if BROKEN:
        return f"{found} cannot be imported ({BROKEN})"
    if triton is None:
        return f"{found} is there, but torch {torch.__version__} is a CPU build"
    if dtype == torch.float64:
        return f"the kernels for {found} do not know float64; use slices"
    if INTERPRET and dtype == torch.bfloat16:
        return f"the interpreter of {found} multiplies the bits of bfloat16 as integers"
    if device.type != "cuda" and not INTERPRET:
        return f"{found} needs a GPU (TRITON_INTERPRET=1 emulates one, for tests)"
    return None


def for_generation(trained: str, device, dtype, d: int, I: int) -> str:
    """The backend for a few tokens at a time, from the one for training.

    On CUDA slices would wait for the device in each layer, and triton would tune its kernels anew:
    grouped_mm where it can work. By reading: no GPU has run it.
    """
    if torch.device(device).type != "cuda":
        return trained
    return "grouped_mm" if backends(device, dtype, d, I)["grouped_mm"] is None else "slices"
