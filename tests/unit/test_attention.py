"""The attention backends and the choice among them. No test has a GPU: stand-ins on the CPU take the
place of its kernels, and what stands around them is real."""

import functools
import sys
import time
import types
import warnings

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from test_resolve import CPU, T, configured, facts_of, state_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels_attention
from lumen import attention, resolve, tryout
from lumen.attention import Shape, pick_attention, shape_of
from lumen.errors import UserError
from lumen.plan import on_meta
from model import ModelConfig, Transformer

SHAPE = Shape(rows=3, lengths={40: 2}, heads=4, kv_heads=2, head_dim=8)
SMALL = dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
CUDA = torch.device("cuda", 0)


# ---------------------------------------------------------------- the backends


def qkv(T=12, dtype=torch.float32):
    """-> [q, k, v], the output's gradient"""
    return attention.sample(SHAPE, T, "cpu", dtype)


def by_math(q, k, v):
    """The formula by torch, with each key head repeated for its query heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def record(monkeypatch) -> list:
    """What SDPA is called with: (heads of the keys, enable_gqa, the kernels that are allowed)."""
    calls, real = [], F.scaled_dot_product_attention

    def recording(q, k, v, **options):
        allowed = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        calls.append((k.shape[1], options["enable_gqa"], allowed))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    return calls


@pytest.mark.parametrize("backend", kernels_attention.TORCH_KERNELS)
def test_every_backend_equals_keys_that_are_repeated(backend, monkeypatch):
    inputs, dout = qkv()
    want = tryout.fwd_bwd(by_math, inputs, dout)
    before = torch._C._get_sdp_priority_order()
    calls = record(monkeypatch)
    got = tryout.fwd_bwd(lambda *a: kernels_attention.attention(*a, backend), inputs, dout)
    assert all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, want))
    own = [kernels_attention.TORCH_KERNELS[backend], SDPBackend.MATH]
    repeated = backend == "efficient"
    assert calls == [(4 if repeated else 2, not repeated, own)]
    assert torch._C._get_sdp_priority_order() == before


def test_alone_a_kernel_that_refuses_raises_and_else_math_serves(monkeypatch):
    inputs, _ = qkv()
    want, calls = by_math(*inputs), record(monkeypatch)
    with pytest.raises(RuntimeError, match="No (viable|available)"):
        kernels_attention.attention(*inputs, "cudnn", alone=True)
    assert calls[0][2] == [SDPBackend.CUDNN_ATTENTION]
    assert torch.allclose(kernels_attention.attention(*inputs, "cudnn"), want, atol=1e-6)


@pytest.mark.parametrize("backend", [*kernels_attention.TORCH_KERNELS, "blocks"])
def test_a_model_on_a_backend_equals_torchs_choice_and_compiles_whole(backend):
    model = Transformer(ModelConfig(**SMALL, n_kv_heads=2))
    model.init_weights(0)
    x = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    want = model(x)
    model.backend = backend
    assert torch.allclose(model(x), want, atol=1e-5)
    torch.compiler.reset()  # what other tests compiled counts to the limit of 8 graphs
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(model(x), want, atol=1e-5)
    model.recompute = "selective"
    targets = model(x, targets=x)[0]
    targets.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.backend = "sdpa"
    model.zero_grad()
    model(x, targets=x)[0].backward()
    assert all(torch.allclose(p.grad, g, atol=1e-4) for p, g in zip(model.parameters(), grads))


# ---------------------------------------------------------------- blocks


def random_qkv(B, T, H, G, D, dtype=torch.float64, spread=1.0):
    """-> [q, k, v], v a part of a larger tensor, and the output's gradient, not contiguous."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, 2 * H + 2 * G, D, generator=generator).to(dtype)
    q, k, v, _ = x.split((H, G, G, H), 2)
    inputs = [t.detach().requires_grad_() for t in (q.mul(spread).contiguous(), k.clone(), v)]
    return inputs, torch.randn(B, H, T, D, generator=generator).to(dtype).transpose(1, 2)


def by_blocks(q, k, v):
    return kernels_attention.attention(q, k, v, "blocks")


SHAPES = {  # B, T, H, G, D
    "gqa": (3, 70, 6, 2, 16),
    "mha": (2, 40, 3, 3, 8),
    "mqa": (2, 33, 4, 1, 24),
    "one token": (2, 1, 4, 2, 8),
    "one row": (1, 64, 2, 2, 8),
    "many siblings": (1, 19, 8, 1, 5),
}


@pytest.mark.parametrize("scores", [1, 5000, 2**20])  # a head, some heads, all at a time
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_equal_the_formula(shape, scores, monkeypatch):
    monkeypatch.setattr(kernels_attention, "ROWS", 24)  # several blocks, the last one shorter
    monkeypatch.setattr(kernels_attention, "SCORES", scores)
    for spread in (1.0, 100.0):  # scores as they are, and less the largest of their row
        inputs, dout = random_qkv(*shape, spread=spread)
        want = tryout.fwd_bwd(by_math, inputs, dout)
        got = tryout.fwd_bwd(by_blocks, inputs, dout)
        for g, w in zip(got, want):
            assert torch.allclose(g, w, rtol=1e-9, atol=1e-9) and g.dtype == w.dtype
        with torch.no_grad():
            assert torch.allclose(by_blocks(*inputs), want[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_gradients_a_row_does_not_depend_on_its_neighbours(dtype):
    inputs, _ = random_qkv(3, 70, 4, 2, 16, dtype)
    with torch.no_grad():
        inputs[0][1] *= 0.1  # alone its scores would be taken as they are
        alone = by_blocks(*(t[1:2] for t in inputs))
        assert torch.equal(by_blocks(*inputs)[1:2], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread, times", [(0.3, 3), (4.0, 3), (64.0, 3), (1000.0, 9)])
def test_blocks_are_as_near_as_the_dtype_lets_them(dtype, spread, times):
    """Scores of hundreds and thousands neither overflow nor lose their digits: torch's own kernel
    is at most so many `times` as near to the formula in fp64."""
    inputs, dout = random_qkv(2, 150, 4, 2, 64, dtype, spread)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    want = tryout.fwd_bwd(by_math, wide, dout.double())
    torchs = functools.partial(kernels_attention.attention, backend="sdpa")
    errors = []
    for attend in (by_blocks, torchs):
        got = tryout.fwd_bwd(attend, inputs, dout)
        errors.append([((g - w).norm() / w.norm()).item() for g, w in zip(got, want)])
    for ours, theirs in zip(*errors):
        assert ours <= times * theirs + torch.finfo(dtype).eps


def test_blocks_see_nothing_of_what_follows_and_pass_on_what_is_not_finite():
    inputs, _ = random_qkv(1, 70, 4, 2, 8, torch.float32)
    with torch.no_grad():
        want = by_blocks(*inputs)
        for value in (300.0, torch.nan, torch.inf):
            for t in inputs:
                t[:, 50:] = value
            got = by_blocks(*inputs)
            if value == 300:
                assert torch.allclose(got[:, :50], want[:, :50], atol=1e-6)
                assert got.isfinite().all()
            else:  # the loss is not finite either, and the step is skipped
                assert not got[:, 50:].isfinite().any()


def test_blocks_give_the_same_bits_again_whatever_memory_holds():
    inputs, dout = random_qkv(2, 200, 6, 2, 32, torch.bfloat16)
    want = [t.detach().clone() for t in tryout.fwd_bwd(by_blocks, inputs, dout)]
    step = functools.partial(tryout.fwd_bwd, by_blocks, inputs, dout)
    assert all(torch.equal(g, w) for g, w in zip(tryout.on_used_memory(step), want))
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(g, w) for g, w in zip(step(), want))
    finally:
        torch.use_deterministic_algorithms(False)


def test_blocks_are_an_operator_by_torchs_rules():
    inputs, _ = random_qkv(2, 20, 4, 2, 8, torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.lumen.scaled_dot_product_blocks
    torch.library.opcheck(op, tuple(inputs), test_utils=checks)
    with pytest.raises(ValueError, match="blocks is for CPUs"):
        kernels_attention.attention(*(t.to("meta") for t in inputs), "blocks")


def test_blocks_train_what_mod_lets_through_and_decode_by_torch(monkeypatch):
    model = Transformer(ModelConfig(**SMALL, n_kv_heads=2, mod_capacity=0.5))
    model.init_weights(0)
    x = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    found = {}
    for backend in ("sdpa", "blocks"):
        model.backend = backend
        model.zero_grad()
        total = model(x, targets=x)[0]
        total.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            model.eval()
            found[backend] = [total.detach(), *grads, model(x, targets=x)[0]]
            model.train()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found.values()))
    monkeypatch.setattr(kernels_attention, "portions", None)
    assert len(list(model.generate([[1, 2, 3]], 4, seeds=[0]))) > 1


def test_selective_recomputation_keeps_what_blocks_gave(monkeypatch):
    calls, real = [], kernels_attention.forward_heads
    monkeypatch.setattr(
        kernels_attention, "forward_heads", lambda *given: (calls.append(1), real(*given))[1]
    )
    model = Transformer(ModelConfig(**SMALL))
    model.init_weights(0)
    model.backend = "blocks"
    x = torch.arange(24).view(2, 12)
    for recompute, times in (("none", 1), ("selective", 1), ("block", 2)):
        calls.clear()
        model.recompute = recompute
        model(x, targets=x)[0].backward()
        assert len(calls) == times * len(model.blocks)


# ---------------------------------------------------------------- a package


def fake_flash(monkeypatch, function):
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_flash_attn_is_used_without_a_cache_and_told_of_determinism(monkeypatch):
    calls = []

    def flash(q, k, v, causal, deterministic):
        calls.append((causal, deterministic))
        return by_math(q, k, v)

    fake_flash(monkeypatch, flash)
    assert pick_attention("flash", SHAPE, "cpu") == ("flash", "as asked; agrees with fp32 math")
    assert set(calls) == {(True, False)}
    assert pick_attention("flash", SHAPE, "cpu", deterministic=True)[0] == "flash"
    assert set(calls) == {(True, False), (True, True)}
    model = Transformer(ModelConfig(**SMALL, n_kv_heads=2))
    model.init_weights(0)
    x = torch.arange(12).view(1, 12)
    want, calls[:] = model(x), []
    model.backend = "flash"
    assert torch.allclose(model(x), want, atol=1e-5) and len(calls) == 2
    assert len(list(model.generate([[1, 2, 3]], 4, seeds=[0]))) > 1
    assert len(calls) == 2, "decoding has a mask, which flash-attn has not"


# ---------------------------------------------------------------- what is compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [1, 40 * 4 * 7, 2**26])
def test_the_formula_by_some_queries_at_a_time_equals_the_whole(scores, dtype, monkeypatch):
    monkeypatch.setattr(attention, "MOST_SCORES", scores)
    inputs, dout = qkv(40, dtype)
    want = [t[0] for t in tryout.fwd_bwd(by_math, inputs, dout)]
    got = attention.softmax_attention(*inputs, dout)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert all(torch.allclose(g, w, atol=tolerance) for g, w in zip(got, want))


def test_the_sample_looks_as_what_the_model_gives(monkeypatch):
    """Shapes, strides and dtypes of q, k, v: a kernel may refuse a stride or be slow on it."""
    seen = []

    def look(q, k, v, backend, docs=None, alone=False):
        seen.append([(t.shape, t.stride(), t.dtype) for t in (q, k, v)])
        return by_math(q, k, v)

    monkeypatch.setattr(kernels_attention, "attention", look)
    model = Transformer(ModelConfig(**SMALL, n_kv_heads=2))
    model.init_weights(0)
    model.compute_dtype, model.backend = torch.bfloat16, "cudnn"
    model(torch.zeros(5, 32, dtype=torch.long))
    sample, dout = attention.sample(shape_of(model, 5), 32, "cpu", torch.bfloat16)
    assert seen[0] == [(t.shape, t.stride(), t.dtype) for t in sample]
    assert dout.is_contiguous() and all(t.is_leaf and t.requires_grad for t in sample)


def test_the_shape_is_the_runs():
    sizes = dict(vocab_size=97, d_model=48, n_layers=4, n_heads=6, n_kv_heads=2, max_seq_len=64)
    dense = on_meta(ModelConfig(**sizes))
    assert shape_of(dense, 7) == Shape(7, {64: 4}, 6, 2, 8, False)
    deep = on_meta(ModelConfig(**sizes, mod_capacity=0.4, mod_every=2))
    assert shape_of(deep, 7) == Shape(7, {64: 2, 26: 2}, 6, 2, 8, True)
    own = on_meta(ModelConfig(**sizes, mod_capacity=[1.0, 0.5, 0.5, 0.25], mod_every=1))
    assert shape_of(own, 1).lengths == {64: 1, 32: 2, 16: 1}
    ffn = on_meta(ModelConfig(**sizes, mod_capacity=0.4, mod_every=2, mod_ffn_only=True))
    assert shape_of(ffn, 7) == Shape(7, {64: 4}, 6, 2, 8, False)


@pytest.mark.parametrize("rows, length, tried", [(3, 40, 3), (9, 2**13, 4), (2, 2**15, 1)])
def test_few_enough_rows_are_tried_to_fit(rows, length, tried):
    shape = Shape(rows, {length: 1}, heads=1, kv_heads=1, head_dim=2)
    (q, k, v), dout = attention.sample(shape, length, "cpu", torch.float32)
    assert q.shape == dout.shape == (tried, length, 1, 2)


# ---------------------------------------------------------------- the choice


def causeless(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def wrong_backward(q, k, v):
    y = by_math(q, k, v)
    return y + 0.5 * (y - y.detach())


def wrong_at_the_end(q, k, v):
    """As cuDNN was once where T was no multiple of 128."""
    y = by_math(q, k, v)
    return torch.cat((y[:, :-1], y[:, -1:] * 1.5), 1)


def wrong_in_the_last_row(q, k, v):
    y = by_math(q, k, v)
    return torch.cat((y[:-1], y[-1:] * 1.5))


def wrong_siblings(q, k, v):
    """Query head h by key head h % G."""
    return by_math(q, *(t.repeat(1, 1, 2, 1) for t in (k, v)))


def not_a_number(q, k, v):
    return by_math(q, k, v) * torch.tensor([1.0] * 7 + [torch.nan])


def no_memory(q, k, v):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsecond line")


def misbuilt(q, k, v):
    raise OSError("undefined symbol: _ZN3c10\nsecond line")


def odd(q, k, v):
    return torch.zeros(3)


WRONG = {
    causeless: "ArithmeticError: differs from fp32 math by",
    wrong_backward: "ArithmeticError: differs from fp32 math by",
    wrong_at_the_end: "ArithmeticError: differs from fp32 math by",
    wrong_in_the_last_row: "ArithmeticError: differs from fp32 math by",
    wrong_siblings: "ArithmeticError: differs from fp32 math by",
    not_a_number: "ArithmeticError: differs from fp32 math by nan",
    no_memory: "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    misbuilt: "OSError: undefined symbol: _ZN3c10",
    odd: "RuntimeError: ",
}


@pytest.fixture
def on_cuda(monkeypatch):
    """-> a function that sets what stands for each backend, all else being refused; the device is
    cuda by name only."""
    real = attention.sample
    monkeypatch.setattr(attention, "sample", lambda s, T, device, dtype: real(s, T, "cpu", dtype))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def stand_in(**functions):
        def stands(q, k, v, backend, docs=None, alone=False):
            assert alone, "math must not stand in for it here"
            return functions.get(backend, misbuilt)(q, k, v)

        monkeypatch.setattr(kernels_attention, "attention", stands)

    return stand_in


def slow(seconds):
    def function(q, k, v):
        time.sleep(seconds)
        return by_math(q, k, v)

    return function


def test_elsewhere_torch_decides_and_nothing_is_tried(on_cuda):
    on_cuda()
    text = "torch picks its fastest kernel for this device"
    assert pick_attention("auto", SHAPE, "cpu", brief=True) == ("sdpa", text)
    assert pick_attention("auto", SHAPE, torch.device("mps")) == ("sdpa", text)
    assert pick_attention("sdpa", SHAPE, CUDA) == ("sdpa", text)
    for unknown in ("xformers", "flex"):
        with pytest.raises(
            ValueError, match=f"'{unknown}' is not one of auto, sdpa, cudnn, .*flash"
        ):
            pick_attention(unknown, SHAPE, "cpu")


def test_on_a_cpu_blocks_are_taken_where_they_are_clearly_faster(on_cuda):
    on_cuda(sdpa=slow(0.02), blocks=slow(0.002))
    name, why = pick_attention("auto", SHAPE, "cpu")
    assert name == "blocks"
    times, rows = why.rsplit(", ", 1)
    first, second = (text.split() for text in times.split(", "))
    assert (first[0], second[0], rows) == ("sdpa", "blocks", "for 3 rows")
    assert float(first[1]) >= 20 > float(second[1]) >= 2
    on_cuda(sdpa=slow(0.1), blocks=slow(0.099))
    assert pick_attention("auto", SHAPE, "cpu")[0] == "sdpa", "not by what noise may be"
    on_cuda(sdpa=slow(0.002), blocks=slow(0.02))
    assert pick_attention("auto", SHAPE, "cpu")[0] == "sdpa"
    on_cuda(sdpa=slow(0.02), blocks=slow(0.002))
    assert pick_attention("auto", SHAPE._replace(documents=True), "cpu")[0] == "sdpa"


@pytest.mark.parametrize("function", WRONG)
def test_on_a_cpu_what_is_wrong_or_raises_is_not_taken(function, on_cuda):
    on_cuda(sdpa=slow(0.01), blocks=function)
    name, why = pick_attention("auto", SHAPE, "cpu")
    assert name == "sdpa" and f"; no blocks: {WRONG[function]}" in why
    name, why = pick_attention("blocks", SHAPE, "cpu")
    assert name == "sdpa" and why.startswith(f"blocks does not work here ({WRONG[function]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_pass_their_check_and_are_for_cpus_only(dtype):
    for shape in (SHAPE, SHAPE._replace(lengths={5: 1, 200: 2})):
        found = pick_attention("blocks", shape, "cpu", dtype)
        assert found == ("blocks", "as asked; agrees with fp32 math")


def test_turns_end_when_their_time_is_over_and_the_shortest_call_counts():
    calls = []
    rests = [0.05, 0.001, 0.05, 0.05, 0.05]

    def step():
        time.sleep(rests[len(calls) // 2])
        calls.append(1)

    found = attention.in_turns({"a": step, "b": step}, 10.0)
    assert len(calls) == 10 and all(0.001 <= seconds < 0.05 for seconds in found.values())
    calls.clear()
    attention.in_turns({"a": step, "b": step}, 0.01)
    assert len(calls) == 2


def test_a_part_of_the_shape_is_tried_on_a_cpu():
    part = attention.part_of
    assert part(SHAPE) == SHAPE
    large = Shape(rows=64, lengths={512: 6}, heads=6, kv_heads=2, head_dim=64)
    assert part(large) == large._replace(rows=4)
    long = Shape(rows=8, lengths={8192: 12, 4096: 2}, heads=32, kv_heads=8, head_dim=128)
    shorter = {512: 12, 256: 2}
    assert part(long) == Shape(2, shorter, heads=4, kv_heads=1, head_dim=128)


def test_the_fastest_that_is_right_is_taken_and_the_reason_names_all(on_cuda):
    on_cuda(cudnn=slow(0.02), flash_sdpa=slow(0.002), efficient=causeless)
    name, why = pick_attention("auto", SHAPE, CUDA)
    assert name == "flash_sdpa"
    times, efficient, flash = why.split("; ")
    first, second = (text.split() for text in times.split(", "))
    assert first[0] == "cudnn" and first[2] == "ms" and float(first[1]) >= 20
    assert second[0] == "flash_sdpa" and 2 <= float(second[1]) < float(first[1])
    assert efficient.startswith("no efficient: ArithmeticError: differs from fp32 math by ")
    assert flash == "no flash: OSError: undefined symbol: _ZN3c10"


@pytest.mark.parametrize("function", WRONG)
def test_what_is_wrong_or_raises_is_not_taken_however_fast(function, on_cuda):
    on_cuda(cudnn=function, flash_sdpa=slow(0.01))
    name, why = pick_attention("auto", SHAPE, CUDA)
    assert name == "flash_sdpa" and f"; no cudnn: {WRONG[function]}" in why and "\n" not in why
    on_cuda(cudnn=function)
    name, why = pick_attention("auto", SHAPE, CUDA)
    assert name == "sdpa" and why.startswith("torch decides, since nothing else works; no cudnn: ")
    name, why = pick_attention("cudnn", SHAPE, CUDA)
    assert name == "sdpa" and why.startswith(f"cudnn does not work here ({WRONG[function]}")
    on_cuda(cudnn=by_math)
    assert pick_attention("cudnn", SHAPE, CUDA) == ("cudnn", "as asked; agrees with fp32 math")


def rounds_to(dtype):
    return lambda q, k, v: by_math(*(t.to(dtype).to(q.dtype) for t in (q, k, v)))


def test_an_error_of_the_dtypes_size_passes_and_a_larger_one_does_not(on_cuda):
    on_cuda(cudnn=wrong_at_the_end)  # on average over the positions small enough
    longer = SHAPE._replace(lengths={400: 1})
    assert pick_attention("cudnn", longer, CUDA, torch.bfloat16)[0] == "sdpa"
    for dtype, passes in ((torch.bfloat16, True), (torch.float32, False)):
        on_cuda(cudnn=rounds_to(torch.bfloat16))
        assert (pick_attention("cudnn", SHAPE, CUDA, dtype)[0] == "cudnn") == passes
    on_cuda(cudnn=rounds_to(torch.float8_e4m3fn))
    assert pick_attention("cudnn", SHAPE, CUDA, torch.bfloat16)[0] == "sdpa"


def test_every_length_is_tried_and_counts_by_its_layers(on_cuda):
    seen = []

    def cudnn(q, k, v):  # wins at 40, which one layer has, and loses at 16, which five have
        time.sleep(0.002 if q.shape[1] == 40 else 0.016)
        seen.append((q.shape, k.shape))
        return by_math(q, k, v)

    shape = SHAPE._replace(lengths={40: 1, 16: 5})
    on_cuda(cudnn=cudnn, flash_sdpa=slow(0.01))
    assert pick_attention("auto", shape, CUDA)[0] == "flash_sdpa"
    assert set(seen) == {((3, n, 4, 8), (3, n, 2, 8)) for n in (40, 16)}
    on_cuda(cudnn=lambda q, k, v: (by_math if q.shape[1] == 40 else causeless)(q, k, v))
    assert pick_attention("auto", shape, CUDA)[0] == "sdpa", "right at one length only"


def test_cudnn_is_left_out_where_mod_has_a_length_for_each_batch(on_cuda):
    on_cuda(cudnn=by_math, flash_sdpa=slow(0.01))
    assert pick_attention("auto", SHAPE, CUDA)[0] == "cudnn"
    name, why = pick_attention("auto", SHAPE._replace(varies=True), CUDA)
    assert name == "flash_sdpa" and "no cudnn: it plans anew for each length" in why
    assert pick_attention("cudnn", SHAPE._replace(varies=True), CUDA)[0] == "cudnn"


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_tried_is_as_deterministic_as_the_run(wanted, on_cuda):
    seen = set()

    def function(q, k, v):
        seen.add(torch.are_deterministic_algorithms_enabled())
        return by_math(q, k, v)

    for before in (True, False):
        torch.use_deterministic_algorithms(before)
        on_cuda(cudnn=function, flash_sdpa=misbuilt)
        pick_attention("auto", SHAPE, CUDA, deterministic=wanted)
        assert seen == {wanted} and torch.are_deterministic_algorithms_enabled() is before


def test_the_reason_is_what_torch_warns_of(on_cuda):
    """The texts are torch 2.14's, as a machine without GPU gave them."""
    place = (
        " (Triggered internally at /pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:1)"
    )

    def refuses(q, k, v):
        for text in (
            "Memory efficient kernel not used because:",
            "Memory Efficient attention has been runtime disabled.",
            "Flash attention kernel not used because:",
            "flash attention requires a CUDA device, which is not available.",
            "cuDNN attention kernel not used because:",
            "cuDNN attention has been runtime disabled.",
        ):
            warnings.warn(text + place, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    on_cuda(flash_sdpa=refuses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none gets out
        why = pick_attention("flash_sdpa", SHAPE, CUDA)[1]
    text = "RuntimeError: flash attention requires a CUDA device, which is not available."
    assert why == f"flash_sdpa does not work here ({text})"


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    text = "flash does not work here (flash_attn is not installed)"
    assert pick_attention("flash", SHAPE, "cpu") == ("sdpa", text)


# ---------------------------------------------------------------- the run's


def resolved_run(saved=None, machine=CPU, **keys):
    cfg, written = configured(**keys)
    facts = facts_of(cfg, written, machine=machine)
    run = resolve.resolve(cfg, facts, saved, resolve.Findings())
    return run, state_of(run, cfg, written)


def test_the_choice_is_made_for_the_runs_shape_and_kept_on_resume(monkeypatch):
    calls = []

    def picks(choice, *where):
        calls.append((choice, *where))
        return ("cudnn", "it is fast") if choice in ("auto", "cudnn") else (choice, "as asked")

    monkeypatch.setattr(resolve, "pick_attention", picks)
    run, saved = resolved_run(batch_size=4)
    shape = Shape(4, {T: 1}, 2, 2, 16)
    assert calls == [("auto", shape, CPU.device, torch.float32, True, True)]
    assert (run.attention, run.attention_why) == ("cudnn", "it is fast")
    assert saved["config"]["attention"] == "cudnn"
    calls.clear()
    resolved_run(batch_size=4, max_steps=10**8)
    assert calls[0][-1] is False, "long enough to be worth trying"
    calls.clear()
    run, _ = resolved_run(saved, batch_size=4, learning_rate=1e-5)
    assert (run.attention, run.attention_why) == ("cudnn", "as in the checkpoint")
    assert [choice for choice, *_ in calls] == ["cudnn"], (
        "tried again, since another card may be here"
    )
    run, _ = resolved_run(saved, batch_size=4, attention="efficient")
    assert (run.attention, run.attention_why) == ("efficient", "as asked")
    saved["run"]["attention"] = "sdpa"
    calls.clear()
    assert resolved_run(saved, batch_size=4)[0].attention == "sdpa"
    saved["run"]["device"] = "cuda"
    resolved_run(saved, batch_size=4)
    assert [choice for choice, *_ in calls] == ["sdpa", "auto"], "another kind of device"


def test_a_kept_choice_that_does_not_work_here_is_made_anew():
    run, saved = resolved_run(attention="flash_sdpa")
    assert (run.attention, run.attention_why) == ("flash_sdpa", "as asked; agrees with fp32 math")
    run, _ = resolved_run(saved, attention="flash_sdpa", batch_size=3)
    assert (run.attention, run.attention_why) == ("flash_sdpa", "as in the checkpoint")
    _, saved = resolved_run()
    assert saved["run"]["attention"] == "sdpa"
    text = "torch picks its fastest kernel for this device"
    for kept in ("cudnn", "sdpa"):
        saved["run"]["attention"] = kept
        run, _ = resolved_run(saved)
        assert (run.attention, run.attention_why) == ("sdpa", text)
    saved["run"]["attention"] = "fast"
    with pytest.raises(UserError, match="E002.*'fast' is not one of"):
        resolved_run(saved)


# ---------------------------------------------------------------- documents

PACKED = SHAPE._replace(documents=True)


def each_alone(q, k, v, ends):
    """By documents, q, k, v (N, H, D); ends: where they begin, and the end."""
    out = torch.empty_like(q)
    for a, b in zip(ends.tolist(), ends[1:].tolist()):
        if a < b:
            out[a:b] = by_math(*(t[None, a:b] for t in (q, k, v)))[0]
    return out


def test_kernels_that_know_documents_are_given_them_and_held_against_the_formula(monkeypatch):
    asked = []

    def varlen(q, k, v, ends, *more, window_size):
        same, *most = more
        asked.append((q.shape[1], k.shape[1], *most, window_size, ends.dtype))
        assert ends is same and ends[0] == 0 and ends[-1] == len(q)
        return each_alone(q, k, v, ends)

    def flash(q, k, v, ends, *more, **options):
        asked.append((q.shape[1], k.shape[1], more[1], *options.values()))
        return each_alone(q, k, v, ends)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    fake_flash(monkeypatch, None)
    sys.modules["flash_attn"].flash_attn_varlen_func = flash
    for name in kernels_attention.WITHIN:
        assert pick_attention(name, PACKED, "cpu") == (name, "as asked; agrees with fp32 math")
    assert set(asked) == {(4, 4, 40, 40, (-1, 0), torch.int32), (4, 2, 40, True, False)}
    # one that looks across, and one that sees half of the row
    wrong = (lambda ends: ends[[0, -1]], lambda ends: ends[[0, *range(2, len(ends))]])
    for change in wrong:
        monkeypatch.setattr(
            torch.nn.attention.varlen,
            "varlen_attn",
            lambda q, k, v, ends, *_, change=change, **more: each_alone(q, k, v, change(ends)),
        )
        name, why = pick_attention("varlen", PACKED, "cpu")
        assert name == "sdpa" and why.startswith("varlen does not work here (ArithmeticError")


def test_with_documents_only_those_that_know_them_are_tried(on_cuda):
    on_cuda(cudnn=by_math)
    name, why = pick_attention("auto", PACKED, CUDA)
    assert name == "sdpa" and "no varlen" in why and "no flash" in why and "cudnn" not in why
    why = "torch picks its fastest kernel for this device, document by document"
    assert pick_attention("auto", PACKED, "cpu") == ("sdpa", why)
    assert pick_attention("sdpa", PACKED, CUDA)[1].endswith("on whole rows with a mask")
    why = "cudnn does not go with document_mask: true (that has varlen, flash)"
    assert pick_attention("cudnn", PACKED, CUDA) == ("sdpa", why)
    assert pick_attention("varlen", SHAPE, CUDA)[1].startswith("varlen does not go with")


def test_a_model_on_varlen_equals_the_cpus_way(monkeypatch):
    monkeypatch.setattr(
        torch.nn.attention.varlen,
        "varlen_attn",
        lambda q, k, v, ends, *_, **more: each_alone(q, k, v, ends),
    )
    for changes in ({}, dict(mod_capacity=0.5)):
        model = Transformer(ModelConfig(**SMALL, n_kv_heads=2, **changes))
        model.init_weights(0)
        x = torch.arange(64).view(2, 32)
        of = torch.tensor([[0] * 5 + [1] * 27, [0] + [1] * 20 + [2] * 11])
        want = model(x, docs=of)
        model.backend = "varlen"
        assert torch.allclose(model(x, docs=of), want, atol=1e-5)
