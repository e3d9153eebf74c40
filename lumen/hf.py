"""Which of our models are Hugging Face models, tensor by tensor and key by key, in both directions.

A model without QK-norm IS a Llama, one with QK-norm IS a Qwen3; with experts they are a Mixtral
and a Qwen3Moe, with a sigmoid router a Dots1. Our fused matrices are theirs on top of one another,
so both directions only slice and rename. export.py reads and writes the files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lumen.errors import UserError
from lumen.model_keys import model_from_keys
from model import ModelConfig, Transformer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What lumen/rope_scaling.py reads; transformers would act on other keys too.
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN_KEYS = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *LLAMA3_KEYS),
    "yarn": ("factor", *YARN_KEYS),
}
CLASSES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "dots1": "Dots1",
}
DENSE = {  # our keys in the words of config.json
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
MOE = DENSE | {"n_experts_per_token": "num_experts_per_tok", "d_expert": "moe_intermediate_size"}
KEYS = {
    "llama": DENSE,
    "qwen3": DENSE,
    "mixtral": MOE | {"n_experts": "num_local_experts", "d_expert": "intermediate_size"},
    "qwen3_moe": MOE | {"n_experts": "num_experts", "norm_topk": "norm_topk_prob"},
    "dots1": MOE
    | {
        "n_experts": "n_routed_experts",
        "n_shared_experts": "n_shared_experts",
        "norm_topk": "norm_topk_prob",
        "n_dense_layers": "first_k_dense_replace",
        "route_scale": "routed_scaling_factor",
    },
}
MUST = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
DOTS1_MUST = {
    "n_group": 1,
    "topk_group": 1,
    # for vLLM, which scales the shared expert too (as of 2025)
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
# Dots1's selection bias of an empty slot: no score, which is below 1, can make up for it.
DEAD_BIAS = -1e9


def model_type(cfg: ModelConfig) -> str:
    """Hugging Face's name for this kind of model, provided that `refusals` finds nothing."""
    if not any(cfg.is_moe(i) for i in range(cfg.n_layers)):
        return "qwen3" if cfg.qk_norm else "llama"
    if cfg.router == "sigmoid":
        return "dots1"
    return "qwen3_moe" if cfg.qk_norm else "mixtral"


class Part(NamedTuple):
    """One tensor of theirs, which is a region of one of ours."""

    ours: str
    theirs: str
    first: list[int]  # where it starts in ours
    shape: list[int]


def layout(cfg: ModelConfig, kept: dict | None = None, fused=False) -> list[Part]:
    """Every tensor of theirs, in the order of the model.

    kept: {layer: slots whose experts there are}, by default all. fused: transformers 5 can write a
    layer's experts as two 3-D tensors, as we do; everybody reads a tensor per expert.
    """
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    table = stacked("embed", ("model.embed_tokens", cfg.vocab_size, d))
    for i in range(cfg.n_layers):
        b, h = f"blocks.{i}", f"model.layers.{i}"
        a = f"{h}.self_attn"
        table += stacked(f"{b}.attn_norm", (f"{h}.input_layernorm", d))
        qkv = (f"{a}.q_proj", q, d), (f"{a}.k_proj", kv, d), (f"{a}.v_proj", kv, d)
        table += stacked(f"{b}.attn.wqkv", *qkv)
        table += stacked(f"{b}.attn.wo", (f"{a}.o_proj", d, q))
        if cfg.qk_norm:
            table += stacked(f"{b}.attn.q_norm", (f"{a}.q_norm", cfg.head_dim))
            table += stacked(f"{b}.attn.k_norm", (f"{a}.k_norm", cfg.head_dim))
        table += stacked(f"{b}.ffn_norm", (f"{h}.post_attention_layernorm", d))
        if cfg.is_moe(i):
            slots = kept[i] if kept else list(range(cfg.n_experts_max or cfg.n_experts))
            table += moe_layout(cfg, b, h, slots, fused)
        else:
            table += swiglu_layout(f"{b}.ffn", f"{h}.mlp", cfg.d_ff, d)
    table += stacked("norm", ("model.norm", d))
    if not cfg.tie_embeddings:
        table += stacked("head", ("lm_head", cfg.vocab_size, d))
    return table


def stacked(ours: str, *parts) -> list[Part]:
    """Their weights (name, rows, ...) on top of one another are our one."""
    table = []
    first = 0
    for theirs, *shape in parts:
        at = [first] + [0] * (len(shape) - 1)
        table.append(Part(f"{ours}.weight", f"{theirs}.weight", at, shape))
        first += shape[0]
    return table


def unclaimed(cfg: ModelConfig) -> list[str]:
    """Why a model of ours would lose something: parameters that `layout` gives no place, which a
    change of model.py has brought."""
    with torch.device("meta"):
        own = [name for name, _ in Transformer(cfg).named_parameters()]
    placed = {part.ours for part in layout(cfg)}
    left = [name for name in own if name not in placed]
    if not left:
        return []
    shown = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
    return [f"parameters {shown}: they have no place there"]


def swiglu_layout(ours: str, theirs: str, width: int, d: int) -> list[Part]:
    gate, up = (f"{theirs}.gate_proj", width, d), (f"{theirs}.up_proj", width, d)
    return [
        *stacked(f"{ours}.w13", gate, up),
        *stacked(f"{ours}.w2", (f"{theirs}.down_proj", d, width)),
    ]


def moe_layout(cfg: ModelConfig, b: str, h: str, slots: list[int], fused: bool) -> list[Part]:
    d, width, kind = cfg.d_model, cfg.d_expert, model_type(cfg)
    mlp, gate, up, down = f"{h}.mlp", "gate_proj", "up_proj", "down_proj"
    if kind == "mixtral" and not fused:
        mlp, gate, up, down = f"{h}.block_sparse_moe", "w1", "w3", "w2"
    table = stacked(f"{b}.ffn.router", (f"{mlp}.gate", len(slots), d))
    if kind == "dots1":
        bias = f"{mlp}.gate.e_score_correction_bias"
        table.append(Part(f"{b}.ffn.router.bias", bias, [0], [len(slots)]))
        shared = cfg.n_shared_experts * width  # 0 without any
        table += swiglu_layout(f"{b}.ffn.shared", f"{mlp}.shared_experts", shared, d)
    w13, w2 = f"{b}.ffn.experts.w13", f"{b}.ffn.experts.w2"
    if fused:
        n, theirs = len(slots), f"{mlp}.experts"
        table.append(Part(w13, f"{theirs}.gate_up_proj", [0, 0, 0], [n, 2 * width, d]))
        table.append(Part(w2, f"{theirs}.down_proj", [0, 0, 0], [n, d, width]))
        return table
    for j, slot in enumerate(slots):
        theirs = f"{mlp}.experts.{j}"
        table.append(Part(w13, f"{theirs}.{gate}.weight", [slot, 0, 0], [width, d]))
        table.append(Part(w13, f"{theirs}.{up}.weight", [slot, width, 0], [width, d]))
        table.append(Part(w2, f"{theirs}.{down}.weight", [slot, 0, 0], [d, width]))
    return table


def odd_rope(scaling: dict) -> list[str]:
    """What of a rope_scaling only transformers would act on, or nobody could."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KEYS:
        return [f"rope_scaling: type {kind!r} is not one of {', '.join(ROPE_KEYS)}"]
    odd = []
    for key, value in scaling.items():
        if key in ("type", "rope_type", "rope_theta") or value is None:
            continue
        if key == "truncate" and value is True:  # what we do
            continue
        if key not in ROPE_KEYS[kind]:
            odd.append(f"rope_scaling.{key}: {value!r} has no meaning here for type {kind}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            odd.append(f"rope_scaling.{key}: {value!r} is not a number")
    return odd


# ---------------------------------------------------------------- our configuration in their words


def refusals(cfg: ModelConfig) -> list[str]:
    """Why this model has no Hugging Face architecture, key by key; empty when it has one."""
    kind = model_type(cfg)
    moe = [i for i in range(cfg.n_layers) if cfg.is_moe(i)]
    dense = [i for i in range(cfg.n_layers) if not cfg.is_moe(i)]
    first_are_dense = dense == list(range(len(dense)))
    why = []

    def refuse(wrong, text: str) -> None:
        if wrong:
            why.append(f"model.{text}")

    refuse(cfg.extras, f"extras: {', '.join(cfg.extras or [])} has no class")
    order = f"norm_order: {cfg.norm_order} (QK-norm over whole vectors, no norm before attention)"
    refuse(cfg.norm_order != "pre", f"{order} has no class")
    refuse(
        cfg.rope_first,
        "rope_first: true (QK-norm after RoPE) has no class, Qwen3 norms before RoPE",
    )
    refuse(
        kind == "llama" and cfg.d_model % cfg.n_heads,
        f"n_heads: {cfg.n_heads} does not divide d_model {cfg.d_model}: Llama's class refuses that",
    )
    refuse(
        any(cfg.capacity(i) < 1 for i in range(cfg.n_layers)),
        f"mod_capacity: {cfg.mod_capacity}: no class routes tokens around blocks",
    )
    nulls = f"n_null_experts: {cfg.n_null_experts}"
    refuse(moe and cfg.n_null_experts, f"{nulls}: no class has such choices")
    layers = f"moe_layers: layers {dense} are dense"
    if kind == "dots1":
        refuse(
            not cfg.qk_norm, "router: sigmoid with qk_norm: false has no class, Dots1 has QK-norm"
        )
        refuse(
            not first_are_dense,
            f"{layers}: with router sigmoid (Dots1) dense layers can only come first",
        )
        few = max(cfg.n_experts, cfg.n_experts_max) < 2
        refuse(few, "n_experts: 1: Dots1's class needs two")
    if kind == "mixtral":
        refuse(dense, f"{layers}: without qk_norm (Mixtral) none can be")
        refuse(not cfg.norm_topk, "norm_topk: false without qk_norm: Mixtral makes gates sum to 1")
    if kind in ("mixtral", "qwen3_moe"):
        shared = f"n_shared_experts: {cfg.n_shared_experts} with router softmax"
        refuse(cfg.n_shared_experts, f"{shared} has no class, only with sigmoid (Dots1)")
    why += [f"model.{reason}" for reason in odd_rope(cfg.rope_scaling or {})]
    return why or unclaimed(cfg)


def hf_config(cfg: ModelConfig, dtype: str, ids: dict, n_experts: int = 0) -> dict:
    """config.json, with RoPE in the spelling of transformers 4 and in that of 5: each ignores the
    other's without a word and falls back to theta 10000. Keys with dangerous defaults (head_dim,
    the ids, windows) are always there."""
    scaling = {k: v for k, v in (cfg.rope_scaling or {}).items() if v is not None}
    rope_type = scaling.pop("type", "default")
    scaling = {"rope_type": scaling.pop("rope_type", rope_type), **scaling}
    kind = model_type(cfg)
    dense = [i for i in range(cfg.n_layers) if not cfg.is_moe(i)]
    config = {theirs: getattr(cfg, ours) for ours, theirs in KEYS[kind].items()}
    config |= MUST
    config |= {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    config |= ids
    if n_experts:
        config[KEYS[kind]["n_experts"]] = n_experts
    if kind == "qwen3_moe":
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if kind == "dots1":
        config |= DOTS1_MUST | {"first_k_dense_replace": len(dense)}
    return config


def folded(cfg: ModelConfig) -> float:
    """What their experts' last matrices are multiplied by, since of these classes only Dots1
    scales gates."""
    return 1.0 if model_type(cfg) == "dots1" else cfg.route_scale


# ---------------------------------------------------------------- their configuration in our words

# Keys of config.json, beside KEYS and MUST, that we read or that do not change the function; any
# other must be off (false, null, 0, empty). OWN and DEFAULTS are what transformers takes for a key
# that is not there.
HARMLESS = {
    "architectures",
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "torch_dtype",
    "dtype",
    "use_cache",
    "pretraining_tp",
    "attention_dropout",
    "max_window_layers",
    "is_llama_config",
    "return_dict",
    "id2label",
    "label2id",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "output_router_logits",
    *TOKEN_IDS,
}
DEFAULTS = {
    "num_key_value_heads": 0,
    "head_dim": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}  # has use_sliding_window
OWN = {
    "llama": {},
    "qwen3": QWEN | {"head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    "qwen3_moe": QWEN | {"num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": ()},
    "dots1": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62},
}


def model_config(config: dict, where) -> ModelConfig:
    """Our configuration of a config.json. UserError E401 naming every key that we cannot follow.

    Of two spellings of RoPE the one that transformers 5 prefers.
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise UserError("E401", f"{where}: model_type: {kind!r} is not one of {', '.join(CLASSES)}")
    config = OWN[kind] | config
    why = odd_keys(config, kind)
    places = [config]
    for key in ("rope_scaling", "rope_parameters"):
        places.append(config.get(key) or {})
    if not all(isinstance(place, dict) for place in places):
        text = f"rope_scaling and rope_parameters must be objects, not {places[1:]}"
        raise UserError("E401", f"{where}: {text}")
    thetas = {float(place["rope_theta"]) for place in places if place.get("rope_theta") is not None}
    if len(thetas) > 1:
        why.append(f"rope_theta: {sorted(thetas)} contradict one another")
    if any(place.get("partial_rotary_factor") not in (None, 1.0) for place in places):
        why.append("partial_rotary_factor: only 1.0 can be imported")
    rope = dict(places[1] or places[2])
    rope.pop("partial_rotary_factor", None)
    why += odd_rope(rope)
    if why:
        raise UserError("E401", f"{where}: {'; '.join(why)}")
    rope = {k: v for k, v in rope.items() if v is not None and k not in ("rope_theta", "truncate")}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"

    config = DEFAULTS | config
    ours = {}
    for our_key, their_key in KEYS[kind].items():
        ours[our_key] = 0 if config[their_key] is None else config[their_key]
    if kind == "mixtral":
        ours["norm_topk"] = True
    if kind == "dots1":
        ours["router"] = "sigmoid"
    if kind == "qwen3_moe" and ours["n_experts"]:
        every, dense = config["decoder_sparse_step"] or 1, config["mlp_only_layers"] or ()
        sparse = [i for i in range(ours["n_layers"]) if i not in dense and (i + 1) % every == 0]
        ours["moe_layers"] = sparse if len(sparse) < ours["n_layers"] else None
    ours["rope_theta"] = max(thetas, default=1e6 if kind == "mixtral" else 1e4)
    ours["rope_scaling"] = None if plain else rope
    ours["qk_norm"] = kind not in ("llama", "mixtral")
    return model_from_keys(ours)


def odd_keys(config: dict, kind: str) -> list[str]:
    """Keys of a config.json, RoPE's aside, that we cannot follow."""
    known = HARMLESS | {*KEYS[kind].values(), *OWN[kind]}
    must = dict(MUST)
    if kind == "qwen3_moe":
        experts = config.get("num_local_experts")  # what transformers 5 calls it
        if config.setdefault("num_experts", experts) == experts:
            known.add("num_local_experts")
    if kind == "dots1":
        must |= DOTS1_MUST
        deep = config["num_hidden_layers"] > config["max_window_layers"]
        if deep and not config.get("layer_types"):
            known.remove("sliding_window")
    odd = []
    for key, value in config.items():
        if key == "layer_types":
            fine = all(kind == "full_attention" for kind in value or [])
        elif key in must:
            # noaux_tc is a name for the same
            fine = value in (None, must[key]) or (key, value) == ("scoring_func", "noaux_tc")
        else:
            fine = not value or key in known or key.startswith(("_", "transformers"))
        if not fine:
            odd.append(f"{key}: {value!r} cannot be imported")
    return odd
