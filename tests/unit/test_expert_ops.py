"""The expert operator: every backend equals one plain loop, in every odd shape; no wasted memory,
no host sync."""

import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model_moe
from lumen import tryout
from tools import selftest

warnings.filterwarnings("ignore", message=".*overflow encountered.*|.*invalid value.*")
OLD = kernels.triton is not None and tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (
    3,
    8,
)
no_triton = pytest.mark.skipif(
    kernels.triton is None or (OLD and kernels.INTERPRET),
    reason="no triton, or one below 3.8, whose interpreter fails with NumPy 2.4 (3.6 does, 3.7 was not tried)",
)
BACK_ENDS = ["slices", "grouped_mm", pytest.param("triton", marks=no_triton)]
SYNC_FREE = BACK_ENDS[1:]
every_backend = pytest.mark.parametrize("backend", BACK_ENDS)


def layer(x, router, ids, w13, w2, experts):
    """A softmax router whose choice is given, so that the gates' gradient shows in the router's
    weight."""
    scores = (x @ router.t()).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
    scores = torch.cat(
        [scores, scores.new_ones(len(x), 1)], 1
    )  # the null expert's gate is a constant
    return experts(x, scores.gather(1, ids.clamp(max=len(w2))), ids, w13, w2)


def sample_layer(T, d, I, E, K, ids=None, dtype=torch.float32):
    (x, _, ids, w13, w2), dout = tryout.sample("cpu", dtype, T, d, I, E, K, ids)
    router = torch.randn(
        E, d, generator=torch.Generator().manual_seed(5), dtype=x.dtype
    ).requires_grad_()
    return [x, router, ids, w13, w2], dout


def run(backend):
    return lambda *inputs: kernels.run_experts(*inputs, backend)


def worst(got, want):
    errors = [
        (g - w).abs().max() / w.abs().max().clamp(min=1e-20) for g, w in zip(got, want, strict=True)
    ]
    return torch.stack([e.double() for e in errors]).max().item()  # Python's max would lose a NaN


@every_backend
@pytest.mark.parametrize("case", selftest.edge_cases(), ids=lambda case: case[0].replace(" ", "-"))
def test_equals_reference(case, backend):
    _, shape, ids = case
    inputs, dout = sample_layer(*shape, ids)
    want = tryout.fwd_bwd(lambda *a: layer(*a, model_moe.plain_experts), inputs, dout)
    got = tryout.fwd_bwd(lambda *a: layer(*a, run(backend)), inputs, dout)
    for g, w, name in zip(got, want, ["out", "dx", "drouter", "dw13", "dw2"], strict=True):
        assert g.dtype == torch.float32 and g.shape == w.shape
        assert worst([g], [w]) < 1e-5, name


@every_backend
def test_random_shapes(backend):
    g = torch.Generator().manual_seed(11)
    for seed in range(1 if backend == "triton" else 12):
        T, d, I, E = (
            torch.randint(lo, hi, (), generator=g).item()
            for lo, hi in ((1, 40), (1, 6), (1, 6), (1, 9))
        )
        K = torch.randint(1, E + 1, (), generator=g).item()
        ids = torch.rand(T, E + 1, generator=g).topk(K, -1)[1]  # id E: no expert
        inputs, dout = tryout.sample("cpu", torch.float32, T, 8 * d, 8 * I, E, K, ids, seed)
        want = tryout.fwd_bwd(model_moe.plain_experts, inputs, dout)
        assert worst(tryout.fwd_bwd(run(backend), inputs, dout), want) < 1e-5, (
            T,
            8 * d,
            8 * I,
            E,
            K,
        )


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend, dtype):
    """16-bit activations on fp32 weights: fp32 gradients of the weights and gates, near the fp32
    answer."""
    if kernels.backends("cpu", dtype, 16, 24)[backend]:
        pytest.skip(kernels.backends("cpu", dtype, 16, 24)[backend])
    inputs, dout = tryout.sample("cpu", dtype, 20, 16, 24, 4, 2)
    wide = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in inputs]
    want = tryout.fwd_bwd(model_moe.plain_experts, wide, dout.float())
    got = tryout.fwd_bwd(run(backend), inputs, dout)
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    assert worst(got, want) < 0.03


@pytest.mark.parametrize(
    "ids", [[[0, 2], [2, 1], [0, 3], [3, 4], [2, 0]], [[3, 4]] * 5], ids=["mixed", "all-tail"]
)
def test_gradcheck(ids):
    """fp64, with slots of no expert (3 and 4) and, in the first case, a rarely used one."""
    (x, p, ids, w13, w2), _ = tryout.sample("cpu", torch.float64, 5, 4, 3, 3, 2, torch.tensor(ids))
    assert torch.autograd.gradcheck(
        lambda x, p, w13, w2: kernels.run_experts(x, p, ids, w13, w2, "slices"), (x, p, w13, w2)
    )


def test_sort():
    ids = torch.tensor([[2, 0], [5, 2], [0, 4], [9, 2]])
    order, inv, offs = kernels.sort_by_expert(ids, 4)
    assert (
        order.tolist() == [1, 4, 0, 3, 7, 2, 5, 6]
        and offs.tolist() == [2, 2, 5, 5]
        and offs.dtype == torch.int32
    )
    assert torch.equal(order[inv], torch.arange(8))
    big = torch.randint(0, 40000, (64, 2), generator=torch.Generator().manual_seed(0))  # past int16
    order, _, offs = kernels.sort_by_expert(big, 39000)
    assert torch.equal(order, big.view(-1).clamp(max=39000).sort(stable=True)[1])
    assert offs[-1] == (big < 39000).sum() and offs[20000] == (big <= 20000).sum()


@every_backend
def test_tokens_are_independent(backend):
    """Permuting tokens permutes outputs: nothing is dropped and no row reads another's."""
    (x, p, ids, w13, w2), _ = tryout.sample("cpu", torch.float32, 30, 16, 24, 5, 2)
    perm = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    out = kernels.run_experts(x, p, ids, w13, w2, backend)
    shuffled = kernels.run_experts(x[perm], p[perm], ids[perm], w13, w2, backend)
    assert worst([shuffled], [out[perm]]) < 1e-6


@every_backend
def test_tail_is_never_read(backend):
    """NaN in every tensor of tokens without expert, forward and backward, reaches no other
    number."""
    T, E = 24, 4
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(2)).topk(2, -1)[1]
    off = torch.arange(T) % 3 == 0
    ids[off], ids[1, 1] = E, E + 3
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, T, 16, 24, E, 2, ids)
    want = tryout.fwd_bwd(model_moe.plain_experts, [x, p, ids, w13, w2], dout)
    with torch.no_grad():
        x[off], p[off], dout[off], p[1, 1] = torch.nan, torch.nan, torch.nan, torch.nan
    got = tryout.fwd_bwd(run(backend), [x, p, ids, w13, w2], dout)
    assert all(g.isfinite().all() for g in got) and worst(got, want) < 1e-5
    assert (got[0][off] == 0).all() and (got[1][off] == 0).all() and (got[2][ids >= E] == 0).all()


def test_garbage_rows_of_grouped_mm(monkeypatch):
    """On GPUs torch's grouped_mm leaves the rows past the last expert uninitialised; here they are
    made NaN."""
    real = kernels.grouped_mm

    def garbage(a, b, offs):
        out = real(a, b, offs=offs)
        return (
            out.index_fill(0, torch.arange(offs[-1], len(out)), torch.nan)
            if out.dim() == 2
            else out
        )

    ids = torch.rand(24, 5, generator=torch.Generator().manual_seed(2)).topk(2, -1)[
        1
    ]  # 4: no expert
    inputs, dout = tryout.sample("cpu", torch.float32, 24, 16, 24, 4, 2, ids)
    want = tryout.fwd_bwd(model_moe.plain_experts, inputs, dout)
    monkeypatch.setattr(kernels, "grouped_mm", garbage)
    assert worst(tryout.fwd_bwd(run("grouped_mm"), inputs, dout), want) < 1e-5


def forgets(a, b, offs, real=kernels.grouped_mm):
    """grouped_mm as torch has it on Blackwell: of an expert without rows it writes no dW."""
    out = real(a, b, offs=offs)
    if out.dim() == 3 and out.shape[0] == len(offs) and a.dim() == b.dim() == 2:
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
    return out


def test_experts_without_tokens_under_a_grouped_mm_that_forgets_them(monkeypatch):
    """Their gradient was what lay in memory (pytorch issue 172439): with two spare slots a norm of
    548 instead of 0.7, and nothing said."""
    ids = tryout.hard_ids("cpu", 40, 6, 2)
    inputs, dout = tryout.sample("cpu", torch.float32, 40, 16, 24, 6, 2, ids)
    want = tryout.fwd_bwd(model_moe.plain_experts, inputs, dout)
    monkeypatch.setattr(kernels, "grouped_mm", forgets)
    assert worst(tryout.fwd_bwd(run("grouped_mm"), inputs, dout), want) < 1e-5


@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 2), (3, 2), (6, 2), (40, 4)])
def test_auto_tries_what_spare_slots_and_dropped_tokens_bring(E, K):
    """Experts without tokens, choices of none; of a token no expert twice."""
    ids = tryout.hard_ids("cpu", 64, E, K)
    assert ids.shape == (64, K) and ids.min() >= 0
    counts = torch.bincount(ids.flatten(), minlength=E + 1)
    assert counts[E] == 4 and (counts[:E] == 0).sum() == min(2, E - K)
    assert all(len(set(row)) == K for row in ids.tolist())


def test_auto_refuses_a_grouped_mm_that_forgets_experts_without_tokens(monkeypatch):
    """Were its gradient not put right, auto would see it: by routing as a run has it, and NaN in
    memory that is used again."""
    left_alone = []

    def gmm_dw(backend, dy, x, offs, dtype, dy_tok=None, x_tok=None):
        dy = dy if dy_tok is None else dy[dy_tok]
        dw = kernels.grouped_mm(dy.t(), x if x_tok is None else x[x_tok], offs=offs)
        idle = offs.diff(prepend=offs.new_zeros(1)) == 0
        left_alone.append(int(idle.sum()))
        dw[idle] = torch.nan
        return dw.to(dtype)

    monkeypatch.setattr(kernels, "gmm_dw", gmm_dw)
    picked, why = tryout.pick_backend("auto", "cpu", torch.float32, 32, 16, 8, 2, 64)
    assert picked == "slices" and "grouped_mm" in why and "inf" in why
    assert set(left_alone) == {2}


def test_what_a_kernel_does_not_write_is_seen():
    """The second run gets the memory of the first, as CUDA's allocator gives it."""
    memory = torch.zeros(3)
    calls = []

    def step():
        calls.append(memory.isnan().all().item())
        if len(calls) == 1:
            memory.fill_(1.0)
        else:
            memory[:2] = 1.0  # the last is forgotten
        return (memory,)

    (found,) = tryout.on_used_memory(step)
    assert calls == [False, True]
    assert tryout.relative_error((found,), (torch.ones(3),)) == float("inf")


@every_backend
def test_same_bits(backend):
    tokens = 20 if backend == "triton" else 50  # its interpreter is slow
    inputs, dout = tryout.sample("cpu", torch.float32, tokens, 16, 24, 4, 3)
    first, second = (tryout.fwd_bwd(run(backend), inputs, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def saved_bytes(T, d, I, E, K, backend, make=torch.empty):
    saved = {}
    x = make(T, d, dtype=torch.bfloat16).requires_grad_()
    p, w13, w2 = (make(*s).requires_grad_() for s in ((T, K), (E, 2 * I, d), (E, d, I)))
    ids = torch.arange(T * K).view(T, K) % E

    def keep(t):
        if not any(t is w for w in (w13, w2)):  # the master weights live anyway
            saved[id(t)] = t, t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        kernels.run_experts(x, p, ids, w13, w2, backend)
    return sum(n for _, n in saved.values()) / (2 * T * d + 4 * T * K * I)


@every_backend
def test_saved_bytes(backend):
    """bf16 keeps x, z and next to nothing else: no 16-bit weights, no activation, no gathered
    rows."""
    with torch._subclasses.FakeTensorMode():  # the real size, without its arithmetic
        assert 1 <= saved_bytes(4096, 512, 192, 32, 8, backend) <= 1.1
    assert 1 <= saved_bytes(16, 128, 96, 2, 2, backend, torch.zeros) <= 1.1


@every_backend
def test_compiles_in_one_graph(backend):
    inputs, dout = sample_layer(33, 16, 24, 4, 2, torch.arange(66).view(33, 2) % 5)
    want = tryout.fwd_bwd(lambda *a: layer(*a, run(backend)), inputs, dout)
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a: layer(*a, run(backend)), fullgraph=True, backend=compiler
        )
        assert worst(tryout.fwd_bwd(compiled, inputs, dout), want) < 1e-6


def test_inductor():
    inputs, dout = sample_layer(33, 16, 24, 4, 2)
    want = tryout.fwd_bwd(lambda *a: layer(*a, run("slices")), inputs, dout)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: layer(*a, run("slices")), fullgraph=True)
    assert worst(tryout.fwd_bwd(compiled, inputs, dout), want) < 1e-5


@every_backend
def test_opcheck(backend):
    """torch's own check of schema, aliasing, fake shapes and autograd registration."""
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, 6, 8, 8, 3, 2)
    args = (x, p, w13, w2, *kernels.sort_by_expert(ids, 3))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.lumen.experts.default, (*args, backend), test_utils=checks)
    z = torch.ops.lumen.experts(*args, backend)[1].detach()
    args = [t.detach() for t in args]
    torch.library.opcheck(
        torch.ops.lumen.experts_backward.default, (dout, *args, z, backend), test_utils=checks
    )


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, (
            "the host waits for the device"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", SYNC_FREE)
def test_no_host_sync(backend):
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, 12, 8, 8, 3, 2)
    with torch.no_grad(), NoSync():  # inside the operators, which a mode cannot see through
        sort = kernels.sort_by_expert(ids, 3)
        _, z = kernels.forward_rows(x, p, w13, w2, *sort, backend)
        kernels.backward_rows(dout, x, p, w13, w2, *sort, z, backend)
        with pytest.raises(AssertionError):
            sort[2][-1].item()
    names = "sort_by_expert run_experts forward_rows backward_rows gmm gmm_dw gate_up gate_up_grad"
    for name in f"{names} swiglu_grad combine".split():
        source = inspect.getsource(getattr(kernels, name))
        assert not any(
            call in source for call in (".item(", ".tolist(", ".cpu(", "nonzero", "bincount")
        ), name


@pytest.mark.parametrize("group", [1, 7, 10**6])
def test_slices_in_any_grouping(group, monkeypatch):
    """How many experts share a buffer changes no number but by rounding; empty experts anywhere."""
    monkeypatch.setattr(kernels, "GROUP", group)
    ids = torch.tensor([1, 2, 4, 7])[
        torch.rand(40, 4, generator=torch.Generator().manual_seed(4)).topk(2, -1)[1]
    ]
    inputs, dout = tryout.sample(
        "cpu", torch.float32, 40, 16, 8, 7, 2, ids
    )  # experts 0, 3, 5, 6 empty, 7 is no expert
    assert (
        worst(
            tryout.fwd_bwd(run("slices"), inputs, dout),
            tryout.fwd_bwd(model_moe.plain_experts, inputs, dout),
        )
        < 1e-5
    )


@every_backend
def test_gradient_accumulates_for_unused_experts(backend):
    """Zeros, not None: DDP waits for every parameter."""
    (x, p, ids, w13, w2), dout = tryout.sample(
        "cpu", torch.float32, 8, 16, 16, 4, 2, torch.full((8, 2), 7)
    )
    kernels.run_experts(x, p, ids, w13, w2, backend).backward(dout)
    assert all(t.grad is not None and (t.grad == 0).all() for t in (x, p, w13, w2))


@every_backend
def test_gradient_without_strides(backend):
    """out.sum() sends an expanded gradient, which torch's grouped_mm refuses; x may be a transposed
    view."""
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, 16, 16, 16, 4, 2)
    turned = x.detach().t().contiguous().t().requires_grad_()
    got = torch.autograd.grad(
        kernels.run_experts(turned, p, ids, w13, w2, backend).sum(), [turned, w2]
    )
    want = torch.autograd.grad(model_moe.plain_experts(x, p, ids, w13, w2).sum(), [x, w2])
    assert worst(got, want) < 1e-5


def test_second_import_shares_the_operator():
    """A notebook may import the file once more, under another name."""
    spec = importlib.util.spec_from_file_location("expert_ops_again", kernels.__file__)
    again = sys.modules["expert_ops_again"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    inputs, _ = tryout.sample("cpu", torch.float32, 8, 8, 8, 4, 2)
    assert torch.equal(again.run_experts(*inputs, "slices"), kernels.run_experts(*inputs, "slices"))


def test_backends_and_choice():
    f32, f64 = torch.float32, torch.float64
    assert [kernels.backends("cpu", f32, 16, 16)[name] for name in ("slices", "grouped_mm")] == [
        None,
        None,
    ]
    assert "multiples of 8" in kernels.backends("cpu", torch.bfloat16, 16, 12)["grouped_mm"]
    assert "multiples of 4" in kernels.backends("cpu", f32, 18, 16)["grouped_mm"]
    assert "float64" in kernels.backends("cpu", f64, 16, 16)["grouped_mm"]
    assert tryout.pick_backend("slices", "cpu", f64, 5, 3, 4, 2, 64)[0] == "slices"
    assert tryout.pick_backend("auto", "cpu", f64, 5, 3, 4, 2, 64)[0] == "slices"
    name, why = tryout.pick_backend("auto", "cpu", f32, 32, 16, 8, 2, 10**6)
    assert name in ("slices", "grouped_mm") and "ms" in why  # never the interpreted triton
    with pytest.raises(ValueError, match="float64.*slices"):
        tryout.pick_backend("grouped_mm", "cpu", f64, 16, 16, 4, 2, 64)
    with pytest.raises(ValueError, match="not one of auto"):
        tryout.pick_backend("cutlass", "cpu", f32, 16, 16, 4, 2, 64)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    assert kernels.backends("cpu", torch.float32, 16, 16)["triton"]
    with pytest.raises(ValueError, match="triton cannot work here"):
        tryout.pick_backend("triton", "cpu", torch.float32, 16, 16, 4, 2, 64)
    assert (
        "; no triton: triton"
        in tryout.pick_backend("auto", "cpu", torch.float32, 16, 16, 4, 2, 64)[1]
    )


VERSION = "triton 3.4.5"


@pytest.mark.parametrize(
    "changes, dtype, reason",
    [
        (
            {"triton": None},
            torch.float32,
            f"{VERSION} is there, but torch {torch.__version__} is a CPU build",
        ),
        (
            {"triton": None, "BROKEN": "OSError: no libcuda"},
            torch.float32,
            f"{VERSION} cannot be imported (OSError",
        ),
        ({"INTERPRET": False}, torch.float32, f"{VERSION} needs a GPU"),
        ({"INTERPRET": True}, torch.bfloat16, VERSION),
        ({}, torch.float64, VERSION),
    ],
)
def test_where_triton_cannot_work_its_version_is_said(changes, dtype, reason, monkeypatch):
    monkeypatch.setattr(kernels, "triton", SimpleNamespace(__version__="3.4.5"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.5")
    for name, value in changes.items():
        monkeypatch.setattr(kernels, name, value)
    assert reason in kernels.backends("cpu", dtype, 16, 16)["triton"]
    assert (
        f"no triton: {kernels.backends('cpu', dtype, 16, 16)['triton']}"
        in tryout.pick_backend("auto", "cpu", dtype, 16, 16, 4, 2, 64)[1]
    )


def test_a_triton_that_is_not_there_or_cannot_be_imported(monkeypatch, tmp_path):
    """A package of another torch can fail in any way, and must not take the whole of Lumen with
    it."""
    (tmp_path / "triton.py").write_text("raise AttributeError('made for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("expert_ops_broken", kernels.__file__)
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "expert_ops_broken", broken)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.5")
    why = broken.backends("cpu", torch.float32, 16, 16)["triton"]
    assert why == "triton 3.4.5 cannot be imported (AttributeError: made for another torch)"

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    assert "not installed" in broken.backends("cpu", torch.float32, 16, 16)["triton"]


def test_auto_refuses_a_wrong_backend(monkeypatch):
    """A miscompiled kernel (Triton 3.7.1 had one) must not train a model."""
    monkeypatch.setattr(
        kernels,
        "forward_rows",
        lambda *a: (torch.zeros_like(a[0]), a[0].new_zeros(a[1].numel(), 32)),
    )
    assert tryout.pick_backend("auto", "cpu", torch.float32, 32, 16, 8, 2, 64)[0] == "slices"


@pytest.mark.skipif(OLD and kernels.INTERPRET, reason="the interpreter of this triton fails")
def test_main(capsys):
    assert selftest.report(selftest.edge_cases()[4:5], [(64, 16, 16, 4, 2)]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or kernels.INTERPRET, reason="needs a GPU and TRITON_INTERPRET=0"
)
@pytest.mark.parametrize("shape", [(4096, 512, 192, 32, 8), (1000, 768, 520, 5, 2)])
def test_gpu(shape):
    """bf16: triton and grouped_mm near the fp32 reference (guards against miscompiles), and no sync
    in triton."""
    results = tryout.selftest("cuda", torch.bfloat16, *shape, timed=False)
    assert results and all(
        error < tryout.TOLERANCE[torch.bfloat16] for error, _ in results.values()
    )
    inputs, dout = tryout.sample("cuda", torch.bfloat16, *shape)
    tryout.fwd_bwd(run("triton"), inputs, dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tryout.fwd_bwd(run("triton"), inputs, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- Triton's kernels, one by one


def by_expert(rows, w, counts):
    """rows @ w[e]^T for each expert's rows."""
    return torch.cat([part @ w[e].t() for e, part in enumerate(rows.split(counts))])


@no_triton
def test_every_tile_is_computed_once():
    """An expert of more row tiles than share a column, an empty one, a short one; sizes that no
    tile divides; a tail, which stays as it was."""
    counts = [0, 300, 20]
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(330, 24, generator=g), torch.randn(3, 40, 24, generator=g)
    y = x.new_full((330, 40), torch.nan)
    kernels_triton = kernels.kernels_triton
    kernels_triton.rows_of(kernels_triton.gmm_kernel, x, w, [y], offs, None)
    assert worst([y[:320]], [by_expert(x[:320], w, counts)]) < 1e-5
    assert y[320:].isnan().all()


def small_layer(dtype):
    """x, w13, w2, s, offs, tok: 70 tokens on 3 of 4 experts, with a tail of 4; widths 20 and 24."""
    g = torch.Generator().manual_seed(1)
    x, w13, w2 = (torch.randn(*s, generator=g) for s in ((70, 24), (4, 40, 24), (4, 24, 20)))
    s = torch.rand(70, 1, generator=g)
    offs = torch.tensor([30, 30, 33, 66], dtype=torch.int32)
    return x.to(dtype), w13.to(dtype), w2.to(dtype), s, offs, torch.randperm(70, generator=g)


@no_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate_and_up_in_one_pass(dtype):
    """z has the bits of the plain product, and the activation is that of the rounded z, the one
    backward knows."""
    x, w13, _, s, offs, tok = small_layer(dtype)
    z, a = kernels.gate_up("triton", x, w13, s, offs, tok)
    assert torch.equal(z[:66], kernels.gmm("triton", x, w13, offs, tok)[:66])
    gate, up = z[:66].float().chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up * s[:66]
    assert a.dtype == dtype and a.shape == (70, 20)
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(a[:66].float(), want, rtol=rtol, atol=1e-6)


@no_triton
def test_gradient_of_gate_and_up_fills_every_place():
    """a, dz and the gates' gradient are autograd's, and no part of its sum is left as it was."""
    x, _, w2, s, offs, tok = small_layer(torch.float32)
    z = torch.randn(70, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scale = s.clone().requires_grad_()
    gate, up = z.chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up * scale
    da = by_expert(x[tok][:66], w2.transpose(1, 2), [30, 0, 3, 33])
    want_dz, want_ds = torch.autograd.grad(want[:66], [z, scale], da)
    a, dz, ds = kernels.gate_up_grad("triton", x, w2, z.detach(), s, offs, tok)
    assert worst([a[:66], dz[:66]], [want[:66].detach(), want_dz[:66]]) < 1e-5
    assert worst([ds], [want_ds[:, 0]]) < 1e-5 and (ds[66:] == 0).all()
    kernels_triton = kernels.kernels_triton
    parts = s.new_full((70, -(-20 // kernels_triton.PART)), torch.nan)
    tensors = [z.detach(), s, torch.empty_like(a), torch.empty_like(dz), parts]
    kernel, turned = kernels_triton.gate_up_grad_kernel, w2.transpose(1, 2)
    kernels_triton.rows_of(kernel, x, turned, tensors, offs, tok, PART=kernels_triton.PART)
    assert parts[:66].isfinite().all() and parts[66:].isnan().all()


@no_triton
def test_weight_gradient_of_each_expert():
    """Rows gathered on either side, more of them than a step takes; zeros for an expert without."""
    x, _, _, _, offs, tok = small_layer(torch.float32)
    dy = torch.randn(70, 20, generator=torch.Generator().manual_seed(3))
    counts = [30, 0, 3, 33]
    pairs = zip(dy[:66].split(counts), x[tok][:66].split(counts))
    want = torch.stack([a.t() @ b for a, b in pairs])
    got = kernels.gmm_dw("triton", dy, x, offs, torch.float32, x_tok=tok)
    turned = kernels.gmm_dw("triton", x, dy, offs, torch.float32, dy_tok=tok)
    assert worst([got, turned], [want, want.transpose(1, 2)]) < 1e-5
    assert (got[1] == 0).all()
