"""int4, and a few rows by torch's kernels: near the numbers they were, equal to the plain formula,
each row by itself, and unpacked where the kernels cannot work."""

import json

import pytest
import torch
import torch.nn.functional as F
from sparse_models import KINDS as SHAPES
from sparse_models import make as make_sparse
from test_sample import code, save

import export
from lumen import base, checkpoint, few_rows, fewbits, machine, models, quantize
from lumen.machine import detect
from lumen.models import open_model
from lumen.quantize import Packed, QuantExperts, QuantLinear, pack

CPU = {"device": "cpu", "precision": "fp32"}
# sizes that the kernels take, and a few experts
WIDE = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "d_ff": 96, "max_seq_len": 32}


@pytest.fixture
def kernels():
    """Chosen whatever the time says; skips where torch's are not right here."""
    before = dict(few_rows.CHOSEN)
    for kind in ("int8", "int4"):
        works, why = few_rows.tried(kind)
        if not works and "ms" not in why:
            pytest.skip(why)
        few_rows.CHOSEN[kind] = True, "as the test wants it"
    yield
    few_rows.CHOSEN.clear()
    few_rows.CHOSEN.update(before)


def quiet(text):
    pass


# ---------------------------------------------------------------- int4


@pytest.mark.parametrize("shape", [(48, 256), (8, 192), (7, 96), (5, 40), (3, 6, 33)])
def test_int4_is_near_and_as_small_as_said(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[:-1]).unsqueeze(-1)
    weight.view(-1, shape[-1])[1] = 0.0
    weight.view(-1, shape[-1])[2] *= 1e-30
    packed = pack(weight, "int4")
    size = sum(t.numel() * t.itemsize for t in (packed.q, packed.scale))
    assert size == quantize.stored_bytes(shape, "int4")
    assert torch.equal(packed.scale, packed.scale.bfloat16().float())
    off = (packed.to(torch.float32) - weight).view(-1, shape[-1])
    rows = weight.view(-1, shape[-1])
    assert (off[1] == 0).all()
    # a step of the plain rule is 1 / 8 of the largest; its error is uniform in half of one
    share = off.square().mean(1).sqrt() / rows.abs().amax(1).clamp(min=1e-38)
    assert (share < 1 / 8 / 12**0.5 * 1.3).all()


def test_the_layout_is_as_documented():
    """Spelt out, in numpy's words: byte j of a row holds inputs 2 j and 2 j + 1."""
    weight = torch.randn(3, 256)
    packed = pack(weight, "int4")
    q, scale = packed.q.numpy(), packed.scale.numpy()
    made = packed.to(torch.float32).numpy()
    for n in range(3):
        for k in range(256):
            number = q[n, k // 2] >> 4 if k % 2 else q[n, k // 2] & 15
            assert made[n, k] == scale[n, k // 128] * (int(number) - 8)


def test_scales_are_searched_for():
    """Better than the plain rule, which takes the largest number whatever the others are."""
    groups = fewbits.grouped(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    plain = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8

    def error(scale):
        made = (fewbits.round_to(groups, scale) - 8) * scale.unsqueeze(-1)
        return (made - groups).square().sum().item()

    assert error(fewbits.best_scales(groups)) < 0.95 * error(plain.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_fp32_rounded_once(dtype):
    packed = pack(torch.randn(96, 64) * 10.0 ** torch.linspace(-5, 2, 96)[:, None], "int4")
    assert torch.equal(packed.to(dtype), packed.to(torch.float32).to(dtype))


def test_what_is_not_finite_stays_so():
    weight = torch.randn(4, 64)
    weight[2, 3] = float("nan")
    assert not pack(weight, "int4").to(torch.float32)[2].isfinite().all()


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("n", [16, 48, 64, 112, 192])
@pytest.mark.parametrize("k", [32, 64, 96, 384])
def test_blocks_hold_the_same_numbers(kernels, n, k):
    plain = pack(torch.randn(n, k), "int4")
    made = Packed("blocks", plain.shape, *fewbits.to_blocks(plain.q, plain.scale))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(made.to(dtype), plain.to(dtype))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_are_those_of_the_formula_each_by_itself(kernels, kind, dtype):
    """To bf16's rounding; and the same bits whichever rows are beside it."""
    torch.manual_seed(0)
    layer = QuantLinear(torch.randn(112, 192), kind)
    want = layer.weight
    assert "kernel" in few_rows.speed_up([layer]) and layer.few_rows
    x = torch.randn(2, 4, 192, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
        exact = F.linear(x.bfloat16().float(), want)
        assert y.dtype == dtype and (y.float() - exact).abs().max() < 5e-3 * exact.abs().max()
        alone = torch.stack([layer(row) for row in x.flatten(0, 1).split(1)]).view_as(y)
        assert torch.equal(alone, y)
        many = torch.randn(few_rows.FEW_ROWS + 1, 192, dtype=dtype)
        assert torch.equal(layer(many), F.linear(many, layer.packed.to(dtype)))


def test_with_a_gradient_the_formula_is_taken(kernels):
    layer = QuantLinear(torch.randn(32, 64), "int4")
    few_rows.speed_up([layer])
    x = torch.randn(2, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, layer.weight))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "null", "hybrid"])
def test_a_model_decodes_as_its_formula_says(kernels, kind, name):
    """Experts too, with null ones and MoD; routers choose as before, so logits are near."""
    model = make_sparse(**SHAPES[name] | WIDE | {"d_expert": 32})
    quantize.quantize(model, kind)
    model.eval()
    ids = torch.arange(6)[None] * 7 % 97
    with torch.no_grad():
        want = model(ids)
        layers = quantize.quantised_layers(model)
        few_rows.speed_up(list(layers.values()))
        assert all(layer.few_rows for layer in layers.values())
        got = model(ids)
    assert any(isinstance(layer, QuantExperts) for layer in layers.values())
    assert not torch.equal(got, want)
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(16, 40), (24, 64), (16, 8)])
def test_sizes_beyond_whose_end_a_kernel_would_read_are_unpacked(kernels, kind, shape):
    layer = QuantLinear(torch.randn(shape), kind)
    assert few_rows.speed_up([layer]) == "" and not layer.few_rows and layer.kind == kind


def test_a_kernel_that_is_wrong_missing_or_slow_is_not_taken(monkeypatch):
    def missing(*given):
        raise AttributeError("no such operator")

    right = machine.int4_matmul
    cases = {
        "differs": ("int4_matmul", lambda *given: right(*given) * 1.1),
        "does not work here (no such operator": ("int4_matmul", missing),
        "unknown order": ("int4_blocks", lambda q: q[:, 0::2] << 4 | q[:, 1::2]),
        "unpacked": ("int4_matmul", lambda *given: [right(*given) for _ in range(300)][0]),
    }
    for text, (name, made) in cases.items():
        monkeypatch.setattr(few_rows, "CHOSEN", {})
        with monkeypatch.context() as patched:
            patched.setattr(machine, name, made)
            layer = QuantLinear(torch.randn(32, 64), "int4")
            line = few_rows.speed_up([layer])
        assert text in line and not layer.few_rows and layer.kind == "int4"
        assert layer(torch.ones(1, 64)).isfinite().all()


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["dense", "fine", "slots", "hybrid"])
def test_a_folder_of_4_bits_has_the_bits_of_quantising_in_memory(tmp_path, name):
    save(tmp_path / "run", 8, model=make_sparse(**SHAPES[name] | WIDE), tokenizer=False)
    about = export.quantize(tmp_path / "run", tmp_path / "q", bits=4, say=quiet)
    assert (about["format"], about["bits"], about["method"]) == (2, 4, "rtn")
    for precision in ("fp32", "auto"):
        want = models.read_model(tmp_path / "run").model
        quantize.quantize(want, "int4")
        models.make_ready(want, detect("cpu", precision, False), exact=precision == "fp32")
        found = open_model(tmp_path / "q", device="cpu", precision=precision, say=quiet).model
        both = zip(want.named_buffers(), found.named_buffers(), strict=True)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in both)
        ids = torch.arange(10)[None]
        with torch.no_grad():
            assert torch.equal(found(ids), want(ids))


def test_exact_in_fp32_by_name_only(kernels, tmp_path):
    """What is asked for by name is the formula; what auto finds may round to bf16."""
    save(tmp_path / "run", 8, model=make_sparse(**WIDE), tokenizer=False)
    export.quantize(tmp_path / "run", tmp_path / "q", bits=4, say=quiet)
    for precision, few in (("fp32", 0), ("auto", few_rows.FEW_ROWS), ("bf16", few_rows.FEW_ROWS)):
        said = []
        opened = open_model(tmp_path / "q", device="cpu", precision=precision, say=said.append)
        layers = quantize.quantised_layers(opened.model).values()
        assert {layer.few_rows for layer in layers} == {few}
        assert bool(said) == bool(few)


def test_a_folder_of_before_still_opens(tmp_path):
    """Format 1: int8, without what 2 says more."""
    save(tmp_path / "run", 8, model=make_sparse(), tokenizer=False)
    about = export.quantize(tmp_path / "run", tmp_path / "q", say=quiet)
    want = open_model(tmp_path / "q", **CPU).model
    for key in ("measured", "calibration", "rounded_to_nearest"):
        del about[key]
    about["format"] = 1
    about["sha256"] = checkpoint.manifest_sha256(about)
    (tmp_path / "q" / "EXPORT.json").write_text(json.dumps(about))
    found = open_model(tmp_path / "q", **CPU).model
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(found(ids), want(ids))


def test_int8_and_int4_as_precision_say_what_to_do(tmp_path):
    save(tmp_path / "run", 8, model=make_sparse(), tokenizer=False)
    for precision in ("int8", "int4"):
        text = code(open_model, tmp_path / "run", precision=precision)
        assert text.startswith("E002") and "export.py quantize" in text


def test_fine_tuning_a_quantised_folder_names_its_source(tmp_path):
    save(tmp_path / "run", 8, model=make_sparse(), tokenizer=False)
    export.quantize(tmp_path / "run", tmp_path / "q", say=quiet)
    for refuse in (base.read_base, checkpoint.find, export.to_hf):
        more = (tmp_path / "hf",) if refuse is export.to_hf else ()
        text = code(refuse, tmp_path / "q", *more)
        assert text.startswith("E304") and "quantize_base int8" in text
        assert str(tmp_path / "run") in text
