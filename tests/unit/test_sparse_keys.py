"""Keys of sparse models: what is refused, and the defaults by router."""

import pytest
from conftest import write_yaml
from sparse_models import SMALL, config

from lumen.cli import read_config
from lumen.errors import UserError

REFUSALS = [
    (
        dict(n_experts=4, n_experts_per_token=5),
        "model.n_experts_per_token",
        ("5", "from 1 to", "4"),
    ),
    (
        dict(n_experts=4, n_experts_per_token=0),
        "model.n_experts_per_token",
        ("0", "from 1 to", "4"),
    ),
    (
        dict(n_experts=4, n_experts_per_token=1, norm_topk=True),
        "model.norm_topk",
        ("true", "1", "norm_topk: false"),
    ),
    (dict(n_experts=4, d_model=36, head_dim=8), "model.d_model", ("36", "multiple of 8", "32")),
    (dict(n_experts=4, d_expert=20), "model.d_expert", ("20", "multiple of 8", "16")),
    (
        dict(n_experts=4, n_experts_max=6, norm_topk=False),
        "model.n_experts_max",
        ("raw", "norm_topk: true", "sigmoid"),
    ),
    (dict(n_experts=4, n_experts_max=3), "model.n_experts_max", ("3", "4", "5")),
    (
        dict(n_experts=4, capacity_factor=0.2),
        "model.capacity_factor",
        ("0.2", "1 / n_experts", "1.25"),
    ),
    (
        dict(n_experts=4, n_null_experts=2, bias_update_rate=0.0),
        "model.n_null_experts",
        ("bias_update_rate: 1e-3",),
    ),
    (dict(n_null_experts=2), "model.n_null_experts", ("n_experts",)),
    (dict(n_experts=4, router="hash"), "model.router", ("'hash'", "softmax", "sigmoid")),
    (dict(n_experts=4, routing_temperature=0.0), "model.routing_temperature", ("0.0", "> 0")),
    (dict(n_experts=4, router_jitter=1.0), "model.router_jitter", ("1.0", "[0, 1)")),
    (dict(n_experts=4, expert_dropout=1.0), "model.expert_dropout", ("1.0", "[0, 1)")),
    (dict(n_experts=4, moe_layers=[0, 2]), "model.moe_layers", ("[0, 2]", "0 to 1")),
    (dict(n_experts=4, moe_layers=[-1]), "model.moe_layers", ("[-1]", "0 to 1")),
    (dict(n_experts=4, moe_layers=[1, 1]), "model.moe_layers", ("[1, 1]", "different")),
    (dict(n_experts=4, moe_layers=[1], moe_every=2), "model.moe_layers", ("moe_every", "drop one")),
    (dict(moe_layers=[1]), "model.moe_layers", ("n_experts",)),
    (dict(n_experts=4, moe_every=0), "model.moe_every", ("0", ">= 1")),
    (dict(n_experts=4, n_dense_layers=3), "model.n_dense_layers", ("3", "n_layers 2")),
    (dict(mod_capacity=0.0), "model.mod_capacity", ("0.0", "(0, 1]", "0.5")),
    (dict(mod_capacity=1.5), "model.mod_capacity", ("1.5", "(0, 1]")),
    (dict(mod_capacity=0.01), "model.mod_capacity", ("0.01", "32", "less than one", "0.0312")),
    (dict(mod_capacity=[0.5]), "model.mod_capacity", ("2 numbers", "not 1")),
    (dict(mod_capacity=[0.5, 0.0]), "model.mod_capacity", ("0.0", "(0, 1]")),
    (dict(mod_capacity=[0.5, "x"]), "model.mod_capacity", ("'x'", "(0, 1]")),
    (dict(mod_capacity=[0.5, 1.0], mod_every=2), "model.mod_capacity", ("drop",)),
    (dict(mod_capacity=[0.5, 1.0], mod_end_layer=0), "model.mod_capacity", ("drop",)),
    (dict(mod_layers=[1]), "model.mod_layers", ("mod_capacity", "0.5")),
    (dict(n_experts=2, expert_dropout=0.5), "model.expert_dropout", ("0.5", "2")),
    (dict(mod_capacity=0.5, mod_layers=[2]), "model.mod_layers", ("[2]", "0 to 1")),
    (
        dict(mod_capacity=0.5, mod_layers=[1], mod_every=2),
        "model.mod_layers",
        ("mod_every", "drop one"),
    ),
    (dict(mod_capacity=0.5, mod_end_layer=2), "model.mod_end_layer", ("2", "0 to 1")),
    (dict(mod_capacity=0.5, mod_start_layer=2), "model.mod_start_layer", ("2", "0 to 1")),
    (
        dict(mod_capacity=0.5, mod_routing="best"),
        "model.mod_routing",
        ("'best'", "learned", "static", "random"),
    ),
    (dict(mod_capacity=0.5, mod_anneal_steps=-1), "model.mod_anneal_steps", ("-1", ">= 0")),
    # asked for, and no layer would have it: LuminaAI's hybrid pattern trains without a word
    (dict(n_experts=4, moe_every=3), "model.moe_every", ("3",)),
    (dict(n_experts=4, n_dense_layers=2), "model.n_dense_layers", ("2",)),
    (dict(n_experts=4, moe_layers=[]), "model.moe_layers", ("[]",)),
    (dict(mod_capacity=0.5, mod_every=3), "model.mod_every", ("3", "mod_capacity")),
    # where both patterns match no layer the message names a key and what that key is about
    (
        dict(n_experts=4, moe_every=3, mod_capacity=0.5, mod_every=3),
        "model.moe_every",
        ("3", "leaves none of the 2 layers to n_experts"),
    ),
    (
        dict(n_experts=4, mod_capacity=0.5, mod_every=3),
        "model.mod_every",
        ("3", "leaves none of the 2 layers to mod_capacity"),
    ),
    (dict(mod_capacity=0.5, mod_layers=[]), "model.mod_layers", ("[]",)),
    (
        dict(mod_capacity=0.5, mod_layers=[0], mod_end_layer=1),
        "model.mod_layers",
        ("mod_end_layer",),
    ),
]


@pytest.mark.parametrize(
    ("change", "key", "words"), REFUSALS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_refusals_name_key_value_and_remedy(change, key, words, tmp_path, shards):
    with pytest.raises(ValueError) as error:
        config(**change)
    text = str(error.value)
    assert text.startswith(key), text
    for word in words:
        assert word in text, text
    path = write_yaml(tmp_path / "c.yaml", {"data_dir": shards, "model": SMALL | change})
    with pytest.raises(UserError) as error:
        read_config([str(path)])
    assert error.value.code == "E002" and key in error.value.text


def test_refusals_of_the_model_name_file_and_line(tmp_path, shards):
    path = tmp_path / "c.yaml"
    path.write_text(f"data_dir: {shards}\nmodel:\n  n_experts: 4\n  n_experts_per_token: 9\n")
    with pytest.raises(UserError) as error:
        read_config([str(path)])
    assert error.value.code == "E002" and f"{path}:4" in error.value.text, error.value.text
    path.write_text(f"data_dir: {shards}\nmodel:\n  n_experts: 4\n")
    with pytest.raises(UserError) as error:
        read_config([str(path), "--model.mod_capacity", "3"])
    assert "command line" in error.value.text, error.value.text


def test_defaults_by_router():
    soft, sigmoid = config(n_experts=4), config(n_experts=4, router="sigmoid")
    assert (soft.aux_loss_weight, soft.router_z_loss_weight, soft.bias_update_rate) == (
        1e-2,
        1e-3,
        0.0,
    )
    assert (sigmoid.aux_loss_weight, sigmoid.router_z_loss_weight, sigmoid.bias_update_rate) == (
        1e-4,
        0.0,
        1e-3,
    )
    assert config(n_experts=4, n_null_experts=1).bias_update_rate == 1e-3
    assert soft.norm_topk and not config(n_experts=4, n_experts_per_token=1).norm_topk
