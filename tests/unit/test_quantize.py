"""lumen/quantize.py: matrices of few bits are near what they were and compute as the matrix they
stand for; nothing is kept, nothing is trained, nothing is saved of them."""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import kernels
from lumen import quantize, tryout
from lumen.errors import UserError
from lumen.quantize import Packed, QuantExperts, QuantLinear, pack
from model import Linear, ModelConfig, Transformer, role
from model_moe import Experts

SHAPE = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 24}
SPARSE = {"n_experts": 4, "d_expert": 24, "n_shared_experts": 1, "mod_capacity": 0.5}
MODELS = {"dense": SHAPE, "sparse": SHAPE | SPARSE}


@pytest.fixture(params=quantize.KINDS)
def kind(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
        quantize.load_bitsandbytes()
    return request.param


def make(shape, kind=None, **changes) -> Transformer:
    model = Transformer(ModelConfig(**shape))
    model.init_weights(3)
    for name, value in changes.items():
        setattr(model, name, value)
    if kind:
        quantize.quantize(model, kind)
    return model


def packed_modules(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantExperts)}


def with_the_same_numbers(model, shape, **changes) -> Transformer:
    """The ordinary model whose weights are what the packed ones stand for."""
    plain = make(shape, **changes)
    for name, module in packed_modules(model).items():
        ordinary = plain.get_submodule(name)
        for key, p in ordinary.named_parameters():
            p.data = getattr(module, key)
    return plain


# ---------------------------------------------------------------- a matrix


@pytest.mark.parametrize("shape", [(48, 40), (8, 32), (3, 6, 96), (2, 16, 200)])
def test_no_number_is_off_by_more_than_half_a_step(kind, shape):
    """int8: of its row's largest / 127. nf4: of the widest gap between its levels times the
    largest of 64; rows of 32 and 96 are what bitsandbytes gets wrong by itself."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[:-1]).unsqueeze(-1)
    weight.view(-1, shape[-1])[1] = 0.0
    weight.view(-1, shape[-1])[2] *= 1e-30
    packed = pack(weight, kind)
    assert sum(t.numel() * t.itemsize for t in (packed.q, packed.scale)) == quantize.stored_bytes(
        shape, kind
    )
    off = (packed.to(torch.float32) - weight).abs()
    if kind == "int8":
        assert packed.q.abs().max() == 127
        step = packed.scale.unsqueeze(-1)
        assert (step <= weight.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)).all()
    else:  # the lowest two levels are -1 and -0.6962
        largest = weight.reshape(-1, 64).abs().amax(-1, keepdim=True)
        step = (largest * (1 - 0.6961)).expand(-1, 64).reshape(shape)
    assert (off <= step / 2 * (1 + 1e-5)).all()
    assert off.max() > 0.3 * step.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_fp32_rounded_once(kind, dtype):
    """So LoRA's merge, which adds in fp32, starts from what was computed with."""
    if kind == "nf4" and dtype == torch.float64:
        pytest.skip("bitsandbytes knows no fp64")
    packed = pack(torch.randn(96, 64) * 10.0 ** torch.linspace(-5, 2, 96)[:, None], kind)
    assert torch.equal(packed.to(dtype), packed.to(torch.float32).to(dtype))


def test_what_is_not_finite_stays_so(kind):
    """A broken base must not become a sound one by being rounded."""
    weight = torch.randn(4, 64)
    weight[2, 3] = float("nan")
    assert not pack(weight, kind).to(torch.float32)[2].isfinite().all()


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_as_the_matrix_it_stands_for(kind, dtype):
    torch.manual_seed(0)
    linear = Linear(40, 56)
    packed = QuantLinear(linear.weight, kind)
    assert (packed.in_features, packed.out_features) == (40, 56)
    rows = torch.randn(2, 9, 40, dtype=dtype)
    grad = torch.randn(2, 9, 56, dtype=dtype)
    found = []
    for run in (packed, lambda x: F.linear(x, packed.weight.to(dtype))):
        x = rows.clone().requires_grad_()
        y = run(x)
        y.backward(grad)
        found.append((y, x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


EMULATED = pytest.param("triton", marks=pytest.mark.nightly)


@pytest.mark.parametrize("backend", ["plain", "slices", "grouped_mm", EMULATED])
def test_experts_compute_as_the_matrices_they_stand_for(kind, backend):
    if backend != "plain" and kernels.backends("cpu", torch.float32, 16, 24)[backend]:
        pytest.skip("not here")
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, 33, 16, 24, 4, 2)
    experts = Experts(4, 16, 24)
    experts.w13.data, experts.w2.data = w13.detach(), w2.detach()
    packed = QuantExperts(experts, kind)
    experts.w13.data, experts.w2.data = packed.w13, packed.w2
    found = []
    for layer in (packed, experts):
        rows = [t.detach().clone().requires_grad_() for t in (x, p)]
        y = layer(*rows, ids, backend)
        y.backward(dout)
        found.append((y, *(t.grad for t in rows)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", ["slices", "grouped_mm"])
def test_frozen_experts_make_no_gradient_of_weights(backend, monkeypatch):
    """dx and dp are those of trained ones; what backward makes beside them is gone."""
    (x, p, ids, w13, w2), dout = tryout.sample("cpu", torch.float32, 33, 16, 24, 4, 2)
    sort = kernels.sort_by_expert(ids, 4)
    found, frozen = [], []
    for name in ("backward_slices", "backward_rows"):

        def spy(*given, run=getattr(kernels, name)):
            frozen.append(given[-1])
            return run(*given)

        monkeypatch.setattr(kernels, name, spy)
    for trained in (True, False):
        rows = [t.detach().clone().requires_grad_() for t in (x, p)]
        weights = [w.detach().clone().requires_grad_(trained) for w in (w13, w2)]
        y, z = torch.ops.lumen.experts(*rows, *weights, *sort, backend)
        y.backward(dout)
        assert frozen.pop() is not trained
        assert all((w.grad is not None) == trained for w in weights)
        found.append([t.grad for t in rows])
        rest = (dout, *rows, *weights, *sort, z)
        grads = torch.ops.lumen.experts_backward(*(t.detach() for t in rest), backend, not trained)
        assert [g.numel() > 0 for g in grads[2:]] == [trained, trained]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_operator_is_sound(kind):
    """torch's own check of schema, aliasing, fake shapes and autograd registration."""
    (x, p, ids, w13, w2), _ = tryout.sample("cpu", torch.float32, 6, 8, 8, 3, 2)
    packed = [pack(w, kind) for w in (w13, w2)]
    held = [t for one in packed for t in (one.q, one.scale)]
    for backend in ("slices", "grouped_mm"):
        args = (x, p, held, *kernels.sort_by_expert(ids, 3), backend, kind, 8)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.lumen.frozen_experts.default, args, test_utils=checks)


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_only_the_blocks_matrices_change(kind, shape):
    """The very objects of all the rest stay, in the state_dict too."""
    model = make(shape)
    before = dict(model.named_parameters())
    line = quantize.quantize(model, kind)
    after = dict(model.named_parameters())
    assert {role(name) for name in before.keys() - after.keys()} <= {"matrix", "expert"}
    assert not {"matrix", "expert"} & {role(name) for name in after}
    assert all(after[name] is before[name] for name in after)
    buffers = {name for name, _ in make(shape).named_buffers()}
    assert model.state_dict().keys() == after.keys() | buffers
    assert line.startswith("quantised") and kind in line


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_model_trains_as_the_one_it_stands_for(kind, shape, dtype, recompute):
    """Loss and the gradients of what is left, with and without recomputation, bit for bit."""
    how = {"compute_dtype": dtype, "recompute": recompute}
    model = make(shape, kind, **how)
    plain = with_the_same_numbers(model, shape, **how)
    ids = torch.arange(48).view(2, 24) % 97
    totals = []
    for one in (model, plain):
        total, _ = one(ids, targets=ids)
        total.backward()
        totals.append(total)
    assert torch.equal(*totals)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_nothing_is_kept_for_backward_but_what_is_stored(kind, shape):
    """No copy of a matrix, and of a frozen layer not even its input: what autograd keeps is less
    than with trained weights, and the packed tensors themselves."""
    model = make(shape, kind)
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    widths = {m.weight.shape for m in packed_modules(model).values() if isinstance(m, QuantLinear)}
    kept = []

    def pack_hook(t):
        kept.append(t)
        return t

    ids = torch.arange(44).view(2, 22)  # 44 is no matrix's width
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        model(ids, targets=ids)
    fresh = [t for t in kept if t.data_ptr() not in own]
    assert any(t.data_ptr() in own and t.dtype in (torch.int8, torch.uint8) for t in kept)
    assert not [t.shape for t in fresh if t.shape in widths]
    assert not [t.shape for t in fresh if t.dim() == 3 and len(t) == 4 and t.shape[0] != 2]


def test_a_layer_of_sliced_experts_is_never_all_there(kind, monkeypatch):
    """slices makes an expert's matrix at a time, in backward too."""
    made = []
    to = Packed.to
    monkeypatch.setattr(
        Packed, "to", lambda self, dtype: (made.append(self.shape), to(self, dtype))[1]
    )
    model = make(SHAPE | SPARSE, kind)
    ids = torch.arange(48).view(2, 24) % 97
    model(ids, targets=ids)[0].backward()
    assert made and {len(shape) for shape in made} == {2}


def test_a_matrix_is_gone_before_the_next_is_packed(monkeypatch):
    """So a base never needs more than itself in fp32 and a matrix."""
    model = make(SHAPE | SPARSE)
    names = ("matrix", "expert")
    weights = [weakref.ref(p) for name, p in model.named_parameters() if role(name) in names]
    alive = []

    def packing(weight, kind, pack=quantize.pack):
        if weight.dim() == 2:
            alive.append(sum(ref() is not None for ref in weights))
        return pack(weight, kind)

    monkeypatch.setattr(quantize, "pack", packing)
    quantize.quantize(model, "int8")
    assert alive[0] == len(weights) and alive[-1] <= 2
    assert sum(ref() is not None for ref in weights) == 0


def test_nf4_without_bitsandbytes_is_refused_and_nothing_has_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = make(SHAPE)
    with pytest.raises(UserError, match="E003.*requirements-finetune.txt.*int8") as e:
        quantize.quantize(model, "nf4")
    assert e.value.exit_code == 2 and not packed_modules(model)


@pytest.mark.nightly
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_it_computes_the_same(kind, shape, recompute):
    torch._dynamo.reset()
    model = make(shape, kind, recompute=recompute)
    ids = torch.arange(48).view(2, 24) % 97
    found = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile()
        model.zero_grad()
        total = model(ids, targets=ids)[0]
        total.backward()
        found.append((total, model.embed.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_a_learned_model_loses_little(kind):
    """Trained to tell what comes next, it is as good in 8 bits to a thousandth, in 4 to some
    percent."""
    model = make(SHAPE | {"d_model": 64})
    ids = torch.randint(0, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = model(ids[:, :-1], targets=ids[:, 1:])[0] / (8 * 23)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = model(ids[:, :-1], targets=ids[:, 1:])[0] / (8 * 23)
        quantize.quantize(model, kind)
        after = model(ids[:, :-1], targets=ids[:, 1:])[0] / (8 * 23)
    print(f"{kind}: {before:.4f} to {after:.4f} nats")
    assert before < 2.0
    assert abs(after - before) < {"int8": 0.005, "nf4": 0.2}[kind]
