"""Matmuls in fp8: against a formula written out here, which matrices they are, what passes through,
where they are refused. Whole runs: tests/runs/test_fp8.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from sparse_models import FINE, config
from torch.utils._python_dispatch import TorchDispatchMode

from lumen import fp8, lora, machine, models, quantize
from lumen.config import LoraConfig
from lumen.errors import UserError
from model import Linear, Transformer, role

TENSORWISE, ROWWISE = "fp8_e4m3_emulated", "fp8_e4m3_rowwise_emulated"
WORDS = [TENSORWISE, ROWWISE]
SIZES = {"d_model": 32, "d_ff": 48}  # all of them multiples of 16
MOST = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}


def drawn(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def made(word=TENSORWISE, n_in=32, n_out=48) -> Linear:
    """A converted layer, with weights."""
    layer = Linear(n_in, n_out)
    layer.weight.data = drawn((n_out, n_in), seed=1)[0]
    model = SimpleNamespace(blocks=torch.nn.ModuleList([layer]))
    fp8.convert(model, word)
    assert type(layer) is fp8.Fp8Linear
    return layer


def built(word=TENSORWISE, seed=1, **keys) -> Transformer:
    model = Transformer(config(**SIZES | keys))
    model.init_weights(seed)
    model.compute_dtype = torch.bfloat16
    fp8.convert(model, word)
    return model


# ---------------------------------------------------------------- numbers


def rounded(x, dtype, dim):
    """x through fp8 and back, row by row (dim 1), column by column (0), or as a whole (None)."""
    if dim is None:
        factor = MOST[dtype] / x.abs().max().item()
        return (x * factor).to(dtype).float() / factor
    if dim == 0:
        return rounded(x.t(), dtype, 1).t()
    rows = []
    for row in x:
        factor = 2.0 ** math.floor(math.log2(MOST[dtype] / row.abs().max().item()))
        rows.append((row * factor).to(dtype).float() / factor)
    return torch.stack(rows)


@pytest.mark.parametrize("word", WORDS)
def test_the_three_matmuls_are_those_of_operands_in_eight_bits(word):
    """Each operand rounded as the recipe says, then multiplied in fp32."""
    layer, rowwise = made(word), word == ROWWISE
    x, grad = drawn((64, 32), (64, 48))
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    x, w = x.detach(), layer.weight.detach()
    e4m3, of_grad = torch.float8_e4m3fn, torch.float8_e4m3fn if rowwise else torch.float8_e5m2
    one, zero = (1, 0) if rowwise else (None, None)  # along which a scale is shared
    right = rounded(x, e4m3, one) @ rounded(w, e4m3, one).t()
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    right = rounded(grad, of_grad, one) @ rounded(w, e4m3, zero)
    torch.testing.assert_close(layer_grad(layer, x, grad), right, rtol=1e-5, atol=1e-5)
    right = rounded(grad, of_grad, zero).t() @ rounded(x, e4m3, zero)
    torch.testing.assert_close(layer.weight.grad, right, rtol=1e-5, atol=1e-5)
    # and it is no rounding of bf16's kind
    assert 0.01 < (y - x @ w.t()).norm() / y.norm() < 0.06


def layer_grad(layer, x, grad):
    x = x.clone().requires_grad_()
    layer(x).backward(grad, inputs=[x])
    return x.grad


def require_scaled_mm(rowwise: bool) -> None:
    """torch._scaled_mm is made for GPUs; most CPU builds have it too."""
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones((16, 1) if rowwise else ())
    try:
        torch._scaled_mm(ones, ones.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch has it on GPUs only: {error}")


@pytest.mark.parametrize("rowwise", [False, True])
def test_emulated_numbers_are_those_of_the_matmul_that_a_gpu_runs(rowwise):
    require_scaled_mm(rowwise)
    off = fp8.try_out(torch.device("cpu"), rowwise)
    assert off < 3e-3  # one is rounded to bf16 before the scales of rows, the other after


@pytest.fixture
def strict(monkeypatch) -> list:
    """In the place of scaled_matmul one that takes what cuBLAS and CUTLASS take, and no more; the
    shapes that it was called with."""
    calls = []

    def scaled(a, b, scale_a, scale_b, dtype, fast):
        (m, k), n = a.shape, b.shape[1]
        assert a.is_contiguous() and b.t().is_contiguous(), "row-major and column-major"
        assert k % 16 == 0 and n % 16 == 0, "rows of 16 bytes"
        assert {a.dtype, b.dtype} <= set(MOST) and b.dtype == torch.float8_e4m3fn
        assert scale_a.dtype == scale_b.dtype == torch.float32
        shapes = (tuple(scale_a.shape), tuple(scale_b.shape))
        assert shapes in [((), ()), ((m, 1), (1, n))]
        assert dtype == torch.bfloat16, "all that is written by row"
        calls.append((m, k, n, fast))
        return fp8.matmul(a, scale_a, b, scale_b, dtype, fast, emulated=True)

    monkeypatch.setattr(fp8, "scaled_matmul", scaled)
    return calls


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("word", ["fp8_e4m3", "fp8_e4m3_rowwise"])
def test_a_gpus_matmul_gets_what_it_can_take(strict, word, frozen):
    layer, emulated = made(word), made(f"{word}_emulated")
    layer.weight.requires_grad_(not frozen)
    x, grad = drawn((3, 7, 32), (3, 7, 48), dtype=torch.bfloat16)
    for one in (layer, emulated):
        one.got = x.clone().requires_grad_()
        one.y = one(one.got)
        one.y.backward(grad)
    sizes = [(32, 32, 48, True), (32, 48, 32, False), (48, 32, 32, False)]
    assert strict == sizes[: 2 if frozen else 3], "y, dx, and dW where it is wanted"
    assert torch.equal(layer.y, emulated.y)
    assert torch.equal(layer.got.grad, emulated.got.grad)
    assert frozen or torch.equal(layer.weight.grad, emulated.weight.grad)


class Counts(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += op is torch.ops.aten._scaled_mm.default
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("how, each", [("none", 3), ("selective", 3), ("block", 4)])
def test_selective_recomputation_keeps_its_results(how, each):
    require_scaled_mm(False)
    model = built("fp8_e4m3")
    model.recompute = how
    idx = torch.arange(64).view(2, 32)
    with Counts() as counts:
        model(idx, targets=idx)[0].backward()
    assert counts.n == each * len(fp8.matrices(model))


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_what_is_quantised_uses_the_whole_range_and_comes_back(dtype, dim):
    x = drawn((16, 24))[0] * 1e-4
    q, scale = fp8.quantize(x, dtype, dim)
    assert q.dtype == dtype and scale.dtype == torch.float32
    assert scale.shape == {None: (), 0: (1, 24), 1: (16, 1)}[dim]
    most = q.float().abs().amax() if dim is None else q.float().abs().amax(dim)
    # powers of two waste up to half of the range
    assert (most <= MOST[dtype]).all() and (most > MOST[dtype] / 2.5).all()
    digits = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}[dtype]
    least = x.abs().amax() / MOST[dtype]
    off = (q.float() * scale - x).abs()
    assert (off <= x.abs() * 2.0 ** -(digits + 1) * 1.001 + least).all()


@pytest.mark.parametrize("word", WORDS)
def test_zeros_and_small_numbers_are_no_trouble(word):
    layer = made(word)
    x = drawn((16, 32))[0]
    x[3] = 0  # a row that has no largest value
    grad = torch.zeros(16, 48)
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert (y[3] == 0).all() and y.isfinite().all() and y[0].abs().max() > 0
    assert (x.grad == 0).all() and (layer.weight.grad == 0).all()
    tiny = layer_grad(layer, x.detach(), drawn((16, 48))[0] * 1e-20)
    large = layer_grad(layer, x.detach(), drawn((16, 48))[0])
    assert (tiny * 1e20 - large).norm() / large.norm() < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@pytest.mark.parametrize("word", WORDS)
def test_what_is_not_finite_reaches_the_guard(word, where, bad):
    """A cast to e4m3 alone would make 448 of Inf, and the guard would see a healthy step."""
    layer = made(word)
    x, grad = drawn((16, 32), (16, 48))
    {"x": x, "weight": layer.weight.data, "grad": grad}[where][2, 5] = bad
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    if where != "grad":
        assert not y.isfinite().all()
    if where != "weight":
        assert not layer.weight.grad.isfinite().all()
    if where != "x":
        assert not x.grad.isfinite().all()


@pytest.mark.parametrize("word", WORDS)
def test_any_number_of_tokens_will_do(word):
    """MoD lets through what it likes; the units want sixteens."""
    layer = made(word)
    x, grad = drawn((3, 7, 32), (3, 7, 48))
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert y.shape == (3, 7, 48)
    args = (x.detach()[:, None].flatten(0, 2), layer.weight.detach().clone())
    rows, weight = (t.requires_grad_() for t in args)
    right = fp8.Fp8Matmul.apply(rows, weight, word == ROWWISE, True)  # of 21 rows, emulated
    right.backward(grad.flatten(0, 1))
    torch.testing.assert_close(y.flatten(0, 1), right)
    torch.testing.assert_close(x.grad.flatten(0, 1), rows.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


# ---------------------------------------------------------------- which matrices

MODELS = {
    "dense": ({}, 8),
    "untied": ({"tie_embeddings": False}, 8),
    "shared expert": (FINE, 8),
    "experts": ({"n_experts": 4, "d_expert": 16}, 4),
    "depths": ({"mod_capacity": 0.5}, 8),
    "odd ffn": ({"d_ff": 40, "n_layers": 1}, 2),  # w13 is 32 to 80: a multiple; w2 is 40 to 32
    "odd heads": ({"head_dim": 6}, 4),  # wqkv is 32 to 48, wo 24 to 32
}


@pytest.mark.parametrize("kind", MODELS)
def test_matrices_of_the_blocks_are_converted_and_nothing_else(kind):
    keys, count = MODELS[kind]
    model, plain = built(**keys), Transformer(config(**SIZES | keys))
    converted = {n for n, m in model.named_modules() if isinstance(m, fp8.Fp8Linear)}
    assert set(fp8.matrices(model)) == converted
    for name, p in plain.named_parameters():
        fits = p.dim() == 2 and p.shape[0] % 16 == 0 and p.shape[1] % 16 == 0
        right = role(name) == "matrix" and fits
        assert (name.removesuffix(".weight") in converted) == right, name
    if kind == "odd ffn":
        assert converted == {"blocks.0.attn.wqkv", "blocks.0.attn.wo", "blocks.0.ffn.w13"}
    elif kind == "odd heads":
        assert {name.rpartition(".")[2] for name in converted} == {"wqkv", "w13", "w2"}
    else:
        assert len(converted) == count
    # no name has changed: a checkpoint is one of any precision
    assert list(model.state_dict()) == list(plain.state_dict())
    said = fp8.describe(model, TENSORWISE)
    n = sum(p.numel() for name, p in model.named_parameters() if name[:-7] in converted)
    assert said.startswith(f"{len(converted)} matrices, {n:,} of ")


def test_other_precisions_convert_nothing():
    for word in ("fp32", "mixed_bf16", "mixed_fp16"):
        assert not any(isinstance(m, fp8.Fp8Linear) for m in built(word).modules())


@pytest.mark.parametrize("word", WORDS)
def test_evaluation_is_in_bf16(word):
    """A scale shared with neighbours would make a text's value depend on its batch."""
    model, plain = built(word), built("mixed_bf16")
    idx = torch.arange(48).view(2, 24)
    assert not torch.equal(model(idx), plain(idx))
    model.eval()
    plain.eval()
    with torch.no_grad():
        assert torch.equal(model(idx), plain(idx))
        assert torch.equal(model(idx)[:1], model(idx[:1]))


@pytest.mark.parametrize("how", ["selective", "block"])
@pytest.mark.parametrize("word", WORDS)
def test_recomputation_changes_no_bit(word, how):
    grads = []
    for recompute in ("none", how):
        model = built(word, mod_capacity=0.5, mod_ffn_only=True)
        model.recompute = recompute
        idx = torch.arange(64).view(2, 32)
        model(idx, targets=idx)[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_under_lora_the_base_multiplies_in_fp8_and_gets_no_gradient():
    model = built("mixed_bf16")
    lora.add(model, LoraConfig(r=2), seed=1)
    fp8.convert(model, TENSORWISE)
    wrapped = [m for m in model.modules() if isinstance(m, lora.LoRA)]
    assert len(wrapped) == 8 and all(type(m.base) is fp8.Fp8Linear for m in wrapped)
    idx = torch.arange(64).view(2, 32)
    model(idx, targets=idx)[0].backward()
    assert all(m.base.weight.grad is None for m in wrapped)
    assert all(m.lora_b.grad.abs().max() > 0 for m in wrapped)


# ---------------------------------------------------------------- where it is refused


def refusal(do, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        do(*args)
    return caught.value


GPU = ("cuda", "a card")
REFUSED = [
    (("fp8_e4m3", "cpu", "x86"), (0, 0), "run on cpu"),
    (("fp8_e4m3_rowwise", "mps", "M4"), (0, 0), "run on mps"),
    (("fp8_e4m3", *GPU), (8, 6), "a card has 8.6"),
    ((TENSORWISE, *GPU), (7, 5), "no bf16"),
]


@pytest.mark.parametrize("words, capability, text", REFUSED)
def test_hardware_without_it_is_refused_with_the_remedy(words, capability, text):
    error = refusal(machine.find_precision, *words, capability, [])
    assert error.code == "E003" and text in error.text
    if not words[0].endswith("_emulated"):
        assert "8.9" in error.text and "mixed_bf16" in error.text
        assert f"{words[0]}_emulated" in error.text


def test_a_torch_that_cannot_is_refused(monkeypatch):
    assert machine.find_precision("fp8_e4m3", *GPU, (8, 9), []) == "fp8_e4m3"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in refusal(machine.find_precision, "fp8_e4m3", *GPU, (9, 4), []).text
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delattr(torch, "_scaled_mm")
    error = refusal(machine.find_precision, "fp8_e4m3", *GPU, (9, 0), [])
    assert error.code == "E003" and "_scaled_mm" in error.text


@pytest.mark.parametrize("broken", ["raises", "is wrong"])
def test_a_card_on_which_it_does_not_work_is_refused_at_the_start(monkeypatch, broken):
    def scaled(a, b, scale_a, scale_b, dtype, fast):
        if broken == "raises":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return a.to(dtype) @ b.to(dtype)

    model = Transformer(config(**SIZES))
    monkeypatch.setattr(fp8, "scaled_matmul", scaled)
    error = refusal(fp8.check, model, "fp8_e4m3", torch.device("cpu"))
    assert error.code == "E003" and "take mixed_bf16" in error.text and "more" not in error.text
    fp8.check(model, TENSORWISE, torch.device("cpu"))  # has no need of it


def test_a_model_without_a_matrix_that_fits_is_refused():
    model = Transformer(config(d_model=24, d_ff=40, n_heads=3, n_kv_heads=1))
    error = refusal(fp8.check, model, TENSORWISE, torch.device("cpu"))
    assert error.code == "E002" and "d_model 24" in error.text
    fp8.check(model, "mixed_bf16", torch.device("cpu"))


def test_no_model_is_asked_in_fp8():
    for word in ("fp8", "fp8_e4m3", "int8", "mixed"):
        error = refusal(models.inference_precision, word)
        assert error.code == "E002" and "auto, fp32, bf16 or fp16" in error.text
        assert ("for training" in error.text) == word.startswith("fp8")
    for word in ("auto", "fp32", "bf16", "fp16", "mixed_bf16"):
        assert models.inference_precision(word) == word


def test_compiling_is_asked_for(monkeypatch):
    place = torch.device("cuda", 0), "a card", (9, 0)
    monkeypatch.setattr(machine, "find_device", lambda *words: place)
    notes = machine.detect("cuda", "fp8_e4m3", False).notes
    assert any("without torch.compile is slower" in note for note in notes)
    assert not any("torch.compile is slower" in n for n in machine.detect("cuda", "bf16", 0).notes)


def test_what_does_not_go_with_it_in_fine_tuning():
    usual = {"precision": TENSORWISE, "method": "sft", "quantize_base": None}

    def cfg(**keys):
        return SimpleNamespace(**usual | keys)

    assert fp8.unfit(cfg()) == []
    assert "quantize_base" in fp8.unfit(cfg(quantize_base="int8"))[0]
    assert "reference" in fp8.unfit(cfg(method="dpo"))[0]
    assert fp8.unfit(cfg(precision="mixed_bf16", method="dpo", quantize_base="int8")) == []


def test_a_base_in_few_bits_has_nothing_to_convert():
    model = built("fp32")
    quantize.quantize(model, "int8")
    assert fp8.matrices(model) == {}
