"""What may stand in the model's keys: every refusal that a user may meet, with a remedy.

`model_from_keys` makes a ModelConfig of what a user, a checkpoint or a foreign file says.
ModelConfig itself checks only what its arithmetic needs, so that model.py stays short for those who
copy it. So does `dataclasses.replace`, which is enough for values that Lumen computed itself.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

from model import ModelConfig, rope_kind

# What a number of ModelConfig may be. The upper bounds of sizes are no physics: to build the
# messages below, or to count the layers, would take for ever beyond them.
RANGES = {
    "d_model": "[1, 1048576]",
    "n_layers": "[1, 16384]",
    "n_heads": "[1, 65536]",
    "n_kv_heads": "[0, 65536]",
    "head_dim": "[0, 65536]",
    "rope_theta": "> 0",
    "route_scale": "> 0",
    "routing_temperature": "> 0",
}
RANGES |= dict.fromkeys(("multiple_of", "max_seq_len", "moe_every", "mod_every"), ">= 1")
RANGES |= dict.fromkeys(("vocab_size", "d_ff", "ffn_hidden_multiplier"), ">= 0")
RANGES |= dict.fromkeys(("norm_eps", "init_std", "init_embedding", "init_head"), ">= 0")
RANGES |= dict.fromkeys(("mod_anneal_steps", "d_expert"), ">= 0")
RANGES |= dict.fromkeys(("n_experts", "n_experts_max", "n_shared_experts"), ">= 0")
RANGES |= dict.fromkeys(("n_dense_layers", "n_null_experts", "aux_loss_weight"), ">= 0")
RANGES |= dict.fromkeys(("router_z_loss_weight", "bias_update_rate"), ">= 0")
RANGES |= dict.fromkeys(("dropout", "router_jitter", "expert_dropout"), "[0, 1)")

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NEEDS = {"default": (), "linear": ("factor",), "yarn": ("factor",), "llama3": LLAMA3}
EXTRAS = ("value_residual", "x0", "relu2", "softcap")  # see lumen/extras.py
ROPE_NUMBERS = {"attention_factor", "beta_fast", "beta_slow", *LLAMA3}


def model_from_keys(keys: dict) -> ModelConfig:
    """The model that these keys describe. ValueError names the key, its value and a remedy."""
    # Types, ranges and sizes are checked as they were written, before anything is computed from
    # them: ModelConfig would divide by a zero.
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    written = SimpleNamespace(**(defaults | keys))
    check_types(written)
    for key, interval in RANGES.items():
        value = getattr(written, key)
        if value is not None:
            check_range(f"model.{key}", value, interval)
    check_sizes(written)
    cfg = ModelConfig(**keys)
    check_rope(cfg)
    if cfg.n_experts:
        check_moe(cfg)
    elif cfg.n_null_experts:
        refuse(cfg, "n_null_experts", "needs n_experts; they are choices beside real ones")
    check_mod(cfg)
    check_layers(cfg)
    check_extras(cfg)
    if cfg.init_head is not None and cfg.tie_embeddings:
        refuse(cfg, "init_head", "needs tie_embeddings: false; tied, init_embedding says it")
    return cfg


def refuse(cfg, key: str, text: str):
    value = getattr(cfg, key)
    value = str(value).lower() if isinstance(value, bool) else repr(value)
    raise ValueError(f"model.{key}: {value} {text}")


def given(cfg, *keys: str) -> list[str]:
    """Those of the keys that do not have their default."""
    return [key for key in keys if getattr(cfg, key) != getattr(ModelConfig, key)]


def idle(cfg) -> list[str]:
    """Keys that were given and have no effect, since what they belong to is off."""
    keys = []
    if not cfg.n_experts:
        keys += given(cfg, "n_shared_experts", "n_dense_layers", "moe_every", "n_experts_max")
        keys += given(cfg, "router", "capacity_factor", "routing_temperature")
        keys += given(cfg, "router_jitter", "expert_dropout")
        if cfg.d_expert != cfg.d_ff:
            keys.append("d_expert")
    if cfg.mod_capacity == 1:
        keys += given(cfg, "mod_routing", "mod_start_layer", "mod_end_layer", "mod_every")
        keys += given(cfg, "mod_ffn_only", "mod_anneal_steps")
    return keys


def check_range(key: str, value: float, interval: str) -> None:
    """ValueError unless the number lies in the interval: "> 0", ">= 1", "[0, 1)", "(0, 1]" ..."""
    if interval[0] == ">":
        sign, bound = interval.split()
        inside = value > float(bound) or (sign == ">=" and value == float(bound))
    else:
        low, high = map(float, interval[1:-1].split(","))
        at_low = interval[0] == "[" and value == low
        at_high = interval[-1] == "]" and value == high
        inside = low < value < high or at_low or at_high
    if not inside:  # a NaN is nowhere inside
        relation = "must be" if interval[0] == ">" else "is not in"
        raise ValueError(f"{key}: {value} {relation} {interval}")


def check_types(cfg) -> None:
    for field in dataclasses.fields(ModelConfig):
        value, kinds = getattr(cfg, field.name), field.type.split(" | ")
        fits = type(value).__name__ in kinds or (value is None and "None" in kinds)
        if not fits and not (type(value) is int and "float" in kinds):
            refuse(cfg, field.name, f"is not {field.type}")
        # no model has larger numbers, and to count its parameters would take for ever
        if type(value) in (int, float):
            most = "1e30" if type(value) is float else "1073741824"
            check_range(f"model.{field.name}", value, f"[-{most}, {most}]")


def check_sizes(cfg) -> None:
    """Heads, and the widths of FFN and experts, as they were written: 0 follows from the rest."""
    C, H = cfg.d_model, cfg.n_heads
    if not cfg.head_dim and C % H:
        even = [h for h in range(1, C + 1) if C % (2 * h) == 0]
        near = sorted(sorted(even, key=lambda h: abs(h - H))[:3])
        refuse(cfg, "n_heads", f"does not divide d_model {C}; near it: {near}")
    if cfg.n_kv_heads and H % cfg.n_kv_heads:
        possible = [g for g in range(1, H + 1) if H % g == 0]
        refuse(cfg, "n_kv_heads", f"does not divide n_heads {H}; possible: {possible}")


def check_rope(cfg) -> None:
    scaling = cfg.rope_scaling
    if scaling is None:
        return
    kind = rope_kind(scaling)
    missing = [key for key in ROPE_NEEDS[kind] if scaling.get(key) is None]
    if missing:
        refuse(cfg, "rope_scaling", f"lacks what {kind} needs: {', '.join(missing)}")
    for key in sorted(ROPE_NUMBERS & set(scaling)):
        value = scaling[key]
        number = type(value) in (int, float) and 0 < value < math.inf
        if value is not None and not number:
            refuse(cfg, "rope_scaling", f"has {key} {value!r}, which is not a number above 0")
    if kind == "yarn" and cfg.rope_theta <= 1:
        refuse(cfg, "rope_theta", "must be above 1 for yarn")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if kind == "llama3" and low == high:
        refuse(cfg, "rope_scaling", f"has low_freq_factor and high_freq_factor both {low}")
    foreign = sorted(set(scaling) & {"mscale", "mscale_all_dim", "truncate"})
    if foreign:
        refuse(cfg, "rope_scaling", f"{', '.join(foreign)} of DeepSeek's yarn is not supported")


def check_moe(cfg) -> None:
    E, K = cfg.n_experts, cfg.n_experts_per_token
    if K == 1 and cfg.norm_topk:
        text = "each gate would be 1 and the router could not learn; set norm_topk: false"
        refuse(cfg, "norm_topk", f"does not go with n_experts_per_token: 1: {text}")
    if cfg.capacity_factor is not None and cfg.capacity_factor < 1 / E:
        text = "is below 1 / n_experts: no expert gets a token; try 1.25"
        refuse(cfg, "capacity_factor", text)
    if cfg.n_experts_max and cfg.n_experts_max < E:
        refuse(cfg, "n_experts_max", f"is below n_experts {E}; one spare slot: {E + 1}")
    if cfg.n_experts_max and cfg.router == "softmax" and not cfg.norm_topk:
        text = "raw softmax gates depend on the experts not chosen, so a split would change them"
        refuse(cfg, "n_experts_max", f"{text}; set norm_topk: true or router: sigmoid")
    if cfg.n_null_experts and cfg.bias_update_rate == 0:
        text = "need the selection bias, which holds their share; set bias_update_rate: 1e-3"
        refuse(cfg, "n_null_experts", text)
    if cfg.expert_dropout and K == E:
        refuse(cfg, "expert_dropout", f"can drop none where every token needs all {E}")


def check_mod(cfg) -> None:
    L, T, capacity = cfg.n_layers, cfg.max_seq_len, cfg.mod_capacity
    if isinstance(capacity, list):
        if given(cfg, "mod_layers", "mod_start_layer", "mod_end_layer", "mod_every"):
            text = "is a list, which says the layers (1.0: not this one); drop mod_every ..."
            refuse(cfg, "mod_capacity", text)
    for c in capacity if isinstance(capacity, list) else [capacity]:
        if type(c) not in (int, float) or not 0 < c <= 1:
            text = f"{c!r} is not in (0, 1]; 1.0 is off, 0.5 or 0.125 are usual"
            raise ValueError(f"model.mod_capacity: {text}")
        if c * T < 1:
            text = f"{c} of {T} tokens is less than one; at least {1 / T:.3g}"
            raise ValueError(f"model.mod_capacity: {text}")
    start, last = cfg.mod_start_layer, cfg.mod_end_layer
    if not 0 <= start < L:
        refuse(cfg, "mod_start_layer", f"must be from 0 to {L - 1}")
    if last is not None and not start <= last < L:
        refuse(cfg, "mod_end_layer", f"must be from mod_start_layer {start} to {L - 1}")


def check_extras(cfg) -> None:
    """What speed runs have, and what it does not go with."""
    names = cfg.extras or []
    if set(names) - set(EXTRAS) or len(set(names)) < len(names):
        refuse(cfg, "extras", f"must be different ones of {', '.join(EXTRAS)}")
    if "relu2" in names and cfg.n_experts:
        refuse(cfg, "extras", "relu2 is of dense models: the experts' kernels are SwiGLU's")
    routed = any(cfg.capacity(i) < 1 for i in range(cfg.n_layers))
    if routed and {"value_residual", "x0"} & {*names}:
        text = "value_residual and x0 need every token in every block, mod_capacity skips some"
        refuse(cfg, "extras", text)


def check_layers(cfg) -> None:
    """The lists of layers; and that whoever asks for sparse layers gets at least one."""
    L = cfg.n_layers
    if cfg.n_dense_layers > L:
        refuse(cfg, "n_dense_layers", f"is more than n_layers {L}")
    if cfg.moe_layers and not cfg.n_experts:
        refuse(cfg, "moe_layers", "needs n_experts")
    if cfg.mod_layers and cfg.mod_capacity == 1:
        refuse(cfg, "mod_layers", "needs mod_capacity below 1, 0.5 for example")
    check_list(cfg, "moe_layers", "n_dense_layers", "moe_every")
    check_list(cfg, "mod_layers", "mod_start_layer", "mod_end_layer", "mod_every")
    # a pattern that matches no layer is a mistake that would train without a word
    if cfg.n_experts and not any(cfg.is_moe(i) for i in range(L)):
        key = given(cfg, "moe_layers", "moe_every", "n_dense_layers")[0]
        refuse(cfg, key, f"leaves none of the {L} layers to n_experts")
    listed = isinstance(cfg.mod_capacity, list)
    routed = [i for i in range(L) if cfg.capacity(i) < 1]
    if not listed and cfg.mod_capacity < 1 and not routed:
        key = given(cfg, "mod_layers", "mod_every")[0]
        refuse(cfg, key, f"leaves none of the {L} layers to mod_capacity")


def check_list(cfg, key: str, *others: str) -> None:
    layers, L = getattr(cfg, key), cfg.n_layers
    if layers is None:
        return
    if not all(type(i) is int and 0 <= i < L for i in layers) or len({*layers}) < len(layers):
        refuse(cfg, key, f"must be different whole numbers from 0 to {L - 1}")
    both = given(cfg, *others)
    if both:
        refuse(cfg, key, f"says which layers, and so does model.{', '.join(both)}; drop one")
