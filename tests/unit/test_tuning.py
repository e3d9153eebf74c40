"""The memory plan of fine-tuning, lumen/tuning.py, against what models really hold and keep."""

import pytest
import torch

from lumen import base, lora, plan, quantize
from lumen.config import LoraConfig, build_config
from lumen.errors import UserError
from lumen.resolve import check_states, misfit
from lumen.tuning import PRETRAINING, Tuning, tuning_of
from model import ModelConfig, Transformer

SHAPE = {"vocab_size": 64, "d_model": 64, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"max_seq_len": 32, "qk_norm": True}
MOE = {"n_experts": 8, "n_experts_per_token": 2, "d_expert": 32, "n_shared_experts": 1}
MODELS = {
    "dense": SHAPE,
    "untied": SHAPE | {"tie_embeddings": False, "qk_norm": False},
    "moe": SHAPE | MOE,
    "mod": SHAPE | {"mod_capacity": 0.5},
}
TUNINGS = {
    "lora": Tuning(r=4),
    "attention": Tuning(r=4, targets=("q_proj", "wo")),
    "down": Tuning(r=4, targets=("down_proj",), dropout=True),
    "int8": Tuning(r=4, quantize="int8"),
    "nf4": Tuning(r=4, quantize="nf4"),
    "freeze": Tuning(freeze=("matrix", "router")),
}
DTYPES = [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.nightly)]


def make(shape, tuning: Tuning, dtype) -> Transformer:
    """As finetune.py does it."""
    model = Transformer(ModelConfig(**shape))
    model.init_weights(0)
    if tuning.r:
        if tuning.quantize:
            quantize.quantize(model, tuning.quantize)
        base.cast(model, dtype)
        targets = tuning.targets and list(tuning.targets)
        lora.add(model, LoraConfig(r=tuning.r, targets=targets, dropout=0.1 * tuning.dropout), 0)
    else:
        base.freeze(model, tuning.freeze)
    model.compute_dtype = dtype
    return model


@pytest.fixture(params=TUNINGS)
def tuning(request) -> Tuning:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return TUNINGS[request.param]


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_what_the_model_holds(shape, tuning, dtype):
    """Weights, gradients and moments to the byte, but for what is no weight: MoE's few buffers."""
    model = make(shape, tuning, dtype)
    precision = "fp32" if dtype == torch.float32 else "mixed_bf16"
    layout = plan.Layout(cuda=False, tuning=tuning)
    found = plan.rank_memory(plan.on_meta(model.cfg), layout, 1, 1, precision)
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    for name, buffer in model.named_buffers():
        held += 0 if ".router." in name else buffer.numel() * buffer.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["weights"] == held
    assert (found["gradients"], found["moments"]) == (4 * trained, 8 * trained)
    assert plan.trained_parameters(plan.on_meta(model.cfg), tuning) == trained


def kept_bytes(model, rows: int, dtype) -> int:
    """Bytes that autograd keeps of one forward pass, weights left out, each storage once; and the
    copies of trained weights in the compute dtype, which are states."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    ids = torch.zeros(rows, model.cfg.max_seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total, _ = model(ids, targets=ids)
    del total
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_what_autograd_keeps(shape, tuning, dtype):
    """What is frozen does not ask for its input, adapters keep a little."""
    rows = 6
    model = make(shape, tuning, dtype)
    layout = plan.Layout(cuda=False, tuning=tuning)
    precision = "fp32" if dtype == torch.float32 else "mixed_bf16"
    found = plan.rank_memory(plan.on_meta(model.cfg), layout, rows, 1, precision)
    b, cfg = dtype.itemsize, model.cfg
    N = rows * cfg.max_seq_len
    head = N * cfg.d_model * b  # dx
    if tuning.trains("embed.weight" if cfg.tie_embeddings else "head.weight"):
        head += 4 * cfg.vocab_size * cfg.d_model
    measured = kept_bytes(model, rows, dtype) - head
    estimate = found["activations"] + found["gathered"]
    # the first block keeps less, below what is trained there: not counted, one block of eight
    assert 0.9 < estimate / measured < 1.15, (estimate, measured)


def test_all_that_is_trained_is_pre_training(tuning):
    """The one formula for both; what is frozen never costs more."""
    for shape in MODELS.values():
        model = plan.on_meta(ModelConfig(**shape))
        for precision in ("fp32", "mixed_bf16"):
            n = plan.count_parameters(model)
            one = plan.memory(model.cfg, n, 4, precision, cuda=False)
            whole = plan.rank_memory(model, plan.Layout(cuda=False), 4, 1, precision)
            assert whole["total"] == one["total"]
            layout = plan.Layout(cuda=False, tuning=tuning)
            assert plan.rank_memory(model, layout, 4, 1, precision)["total"] < whole["total"]


def test_a_row_of_pairs_is_two_rows_of_the_model():
    model = plan.on_meta(ModelConfig(**SHAPE))
    one, two = (
        plan.rank_memory(model, plan.Layout(tuning=Tuning(sides=sides)), rows, 1, "fp32")
        for sides, rows in ((1, 8), (2, 4))
    )
    assert one == two


def config(**keys):
    tree = {"data_dir": "x", "model": SHAPE | {"n_layers": 2, "d_model": 512}} | keys
    return build_config(tree, lambda key: "test", [])


def test_keys_are_what_is_planned():
    assert tuning_of(config()) == PRETRAINING
    found = tuning_of(config(method="dpo", freeze=["embeddings", "router"]))
    assert found == Tuning(freeze=("embedding", "router"), sides=2)
    keys = {"r": 8, "targets": ["q_proj"], "dropout": 0.1}
    found = tuning_of(config(lora=keys, quantize_base="int8"))
    assert found == Tuning(8, ("q_proj",), True, "int8")


def test_a_base_that_fits_only_with_adapters_is_refused_without(monkeypatch):
    """Before data are prepared; and what would hold adapters is not said of train_fsdp.py."""
    n = plan.count_parameters(plan.on_meta(config().model))
    monkeypatch.setattr("lumen.machine.own_memory", lambda device: 8 * n)
    with pytest.raises(UserError, match="E200.*train_fsdp.py"):
        check_states(config(), plan.Layout())
    check_states(config(lora={"r": 4}), plan.Layout())
    model, layout = plan.on_meta(config().model), plan.Layout(tuning=Tuning(r=4))
    why, sure = misfit(model, layout, 1, 1, ("fp32", "block"), 3 * n)
    assert sure and "alone" in why and "train_fsdp" not in why


def test_reading_the_base_is_counted_where_it_needs_more_than_a_step():
    """In few bits a base is smaller than as it is read, fp32."""
    model = plan.on_meta(ModelConfig(**SHAPE | {"d_model": 512}))
    layout = plan.Layout(cuda=False, tuning=Tuning(r=4, quantize="int8"))
    found = plan.rank_memory(model, layout, 1, 1, "mixed_bf16")
    assert found["loading"] > 0 and found["total"] > 4 * plan.count_parameters(model)
    many = plan.rank_memory(model, layout, 64, 1, "mixed_bf16")
    assert "loading" not in many
    assert sum(v for k, v in many.items() if k not in ("total", "peak")) == many["total"]
