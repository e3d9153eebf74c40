"""To and from Hugging Face folders, with a check; import of Lunaris Codex checkpoints.

    python export.py to_hf out/run DIR [--dtype float32|bfloat16|float16] [--best] [--check]
    python export.py from_hf DIR out/run
    python export.py from_lunaris FILE.pt out/run [--n_heads N --max_seq_len T ...]

A model without QK-norm IS a Llama, one with QK-norm IS a Qwen3; with experts they are a Mixtral and a Qwen3Moe, with a
sigmoid router a Dots1. Our fused matrices are theirs on top of one another, so both directions only slice and rename,
and every bit survives. Nothing is unpickled except a Lunaris .pt, and that with weights_only. Every folder is written
under another name and then renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open

from lumen import checkpoint
from lumen.errors import UserError, a_path, expand
from lumen.files import read_json, sync, write_json
from lumen.launch import Words, command
from lumen.tokenizer import Tokenizer, load, of_run
from model import ModelConfig, Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # largest difference of fp32 logits that the check accepts
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What rope_tables() in model.py reads of rope_scaling; transformers would act on other keys too.
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


def load_tokenizer(path, vocab_size: int) -> tuple[Tokenizer | None, str]:
    """The tokenizer in that tokenizer.json, or None and why not."""
    if path is None or not Path(path).exists():
        return None, "there is no tokenizer.json"
    try:
        tokenizer = load(str(path))
    except UserError as error:
        return None, f"{error.code}: {error.text}"
    if tokenizer.n_vocab > vocab_size:
        return None, f"E113: {path} has {tokenizer.n_vocab} ids, the model {vocab_size} rows"
    return tokenizer, ""


@contextlib.contextmanager
def new_folder(path, used: str):
    """A folder to fill, which gets its name when all went well. UserError `used` when something is
    there that is not ours; E403: it could not be written."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(used, f"{path} exists and is not empty: give another name")
    tmp = path.with_name(path.name + ".tmp")
    mark = tmp / ".lumen"  # what bears it was begun here and never finished
    if os.path.lexists(tmp) and not mark.exists():
        text = f"{tmp}, where {path.name} would be made, is there and not ours: give another name"
        raise UserError(used, text)
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        mark.touch()
        yield tmp
        mark.unlink()
        if path.exists():
            path.rmdir()
        tmp.rename(path)
        sync(path.parent)
    except BaseException as error:
        differs = isinstance(error, UserError) and error.code == "E402"
        if not differs:  # that one is kept, to be looked into
            shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError("E403", f"{path}: {error}") from error
        raise


def versions() -> dict:
    return {"torch": torch.__version__, "python": platform.python_version()}


# ---------------------------------------------------------------- to Hugging Face


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

    order = f"norm_order: {cfg.norm_order} (QK-norm over whole vectors, no norm before attention)"
    refuse(cfg.norm_order != "pre", f"{order} has no class")
    refuse(
        cfg.rope_first,
        "rope_first: true (QK-norm after RoPE) has no class, Qwen3 norms before RoPE",
    )
    refuse(
        kind == "llama" and cfg.d_model % cfg.n_heads,
        f"n_heads: {cfg.n_heads} does not divide d_model {cfg.d_model}, which Llama's class refuses",
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
    return why + [f"model.{reason}" for reason in odd_rope(cfg.rope_scaling or {})]


def routers(source: checkpoint.Checkpoint, cfg: ModelConfig) -> tuple[dict, dict, list[str]]:
    """({layer: slots to export}, {our router tensor: its values as exported}, why a layer has no architecture).

    Empty slots are left out where all layers have as many; Dots1 can also keep them, never to be chosen.
    """
    kind, n_slots = model_type(cfg), cfg.n_experts_max or cfg.n_experts
    own = torch.arange(n_slots)

    def read(i: int, name: str) -> torch.Tensor:
        return source.read(f"model.blocks.{i}.ffn.router.{name}")

    alive = {}  # by layer, bool (n_slots,)
    for i in range(cfg.n_layers):
        if cfg.is_moe(i):
            alive[i] = read(i, "alive") if cfg.n_experts_max else own >= 0
    counts = {i: int(a.sum()) for i, a in alive.items()}
    kept, ready, why = {}, {}, []
    differ = len(set(counts.values())) > 1
    keep_dead = kind == "dots1" and (differ or 1 in counts.values())  # its class needs two
    if differ and not keep_dead:
        only = "only with router sigmoid (Dots1) can layers differ"
        why.append(f"experts alive by layer: {counts}: {only}")
    for i, a in alive.items():
        bias = read(i, "bias")[:n_slots]
        if kind != "dots1" and bias[a].any():
            has_none = f"its router has a selection bias, and {CLASSES[kind]}'s has none"
            why.append(f"layer {i}: {has_none}")
        if cfg.n_experts_max:
            siblings = a & (read(i, "sibling") != own)
            if siblings.any():
                text = (
                    "only one can be chosen, which no class knows: train on until they have parted"
                )
                why.append(f"layer {i}: of the siblings {own[siblings].tolist()} {text}")
        kept[i] = own[a | keep_dead].tolist()
        router = f"blocks.{i}.ffn.router"
        ready[f"{router}.weight"] = read(i, "weight")[kept[i]] / cfg.routing_temperature
        ready[f"{router}.bias"] = bias.masked_fill(~a, DEAD_BIAS)[kept[i]]
    return kept, ready, why


def hf_config(cfg: ModelConfig, dtype: str, ids: dict, n_experts: int = 0) -> dict:
    """config.json, with RoPE in the spelling of transformers 4 and in that of 5: each ignores the other's without a
    word and falls back to theta 10000. Keys with dangerous defaults (head_dim, the ids, windows) are always there."""
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


def to_hf(
    run, folder, dtype: str | None = None, best=False, check=False, say=print, shard_bytes=5 * 10**9
) -> dict:
    """Write the run's newest (or best) step as a Hugging Face folder; returns what EXPORT.json says.

    dtype: default float32, for an imported step 0 the one it came in. UserError E400 with every reason when the model
    has no Hugging Face architecture, E402 when `check` finds a difference (the folder then keeps the suffix .tmp).
    """
    source = checkpoint.find(run, best, say)
    cfg = source.model_config()
    imported = source.state.get("imported") or {}
    dtype = dtype or imported.get("dtype", "float32")
    kept, ready = check_exportable(source, cfg, dtype)
    transformers = import_transformers() if check else None

    tokenizer_file = of_run(source.path.parent, source.state.get("tokenizer"))
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    ids = {key: imported.get(key) for key in TOKEN_IDS}
    if tokenizer and "eos_token_id" not in imported:
        # A pad id that can occur in a prompt makes generate() mask it there: a real pad token or none
        ids = dict(zip(TOKEN_IDS, (tokenizer.eot_id, tokenizer.eot_id, tokenizer.pad_id)))
    config = hf_config(cfg, dtype, ids, max(map(len, kept.values()), default=0))
    report = {
        "architecture": config["architectures"][0],
        "dtype": dtype,
        "source": str(source.path),
        "source_step": source.step,
        "versions": versions(),
    }
    result = ""
    with new_folder(folder, "E117") as tmp:
        write_shards(source, cfg, layout(cfg, kept), ready, DTYPES[dtype], tmp, shard_bytes)
        write_json(tmp / "config.json", config)
        write_json(tmp / "generation_config.json", ids)
        if tokenizer:
            shutil.copy(tokenizer_file, tmp / "tokenizer.json")
            made = tokenizer_config(tokenizer, ids, cfg.max_seq_len)
            write_json(tmp / "tokenizer_config.json", made)
        if check:
            report |= compare(transformers, source, cfg, dtype, tokenizer, tmp)
            report["versions"]["transformers"] = transformers.__version__
        write_json(tmp / "EXPORT.json", report)
        if check:
            found = [f"{key} {report[key]}" for key in ("max_diff", "greedy_equal", "ids_equal")]
            result = ", ".join(found)
            close = report["max_diff"] <= TOLERANCE  # a NaN is not
            if not close or not report["greedy_equal"] or report["ids_equal"] is False:
                raise UserError("E402", f"{tmp / 'EXPORT.json'}: {result}")
    if not tokenizer:
        say(f"exported without a tokenizer: {why_not}")
    parts = [report["architecture"], f"step {source.step}", dtype, *([result] if result else [])]
    say(f"{', '.join(parts)}: {folder}")
    return report


def check_exportable(source, cfg: ModelConfig, dtype: str) -> tuple[dict, dict]:
    """What `routers` keeps. E400: no Hugging Face architecture, E305: tensors and configuration
    differ."""
    with torch.device("meta"):
        tensors = Transformer(cfg).state_dict()
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in tensors.items()}
    saved = {}
    for name, tensor in source.tensors.items():
        if name.startswith("model."):
            saved[name] = tensor["shape"]
    wrong = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
    why = refusals(cfg)
    kept, ready = {}, {}
    if not wrong:
        kept, ready, more = routers(source, cfg)
        why += more
    if dtype not in DTYPES:
        why.append(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if why:
        raise UserError("E400", f"{source.path}: {'; '.join(why)}")
    if wrong:
        text = f"not the same in its weights and its config: {', '.join(wrong[:8])}"
        raise UserError("E305", f"{source.path}: {text}")
    return kept, ready


def folded(cfg: ModelConfig) -> float:
    """What their experts' last matrices are multiplied by, since of these classes only Dots1 scales gates."""
    return 1.0 if model_type(cfg) == "dots1" else cfg.route_scale


def write_shards(
    source,
    cfg: ModelConfig,
    table: list[Part],
    ready: dict,
    dtype: torch.dtype,
    folder: Path,
    shard_bytes: int,
) -> None:
    """model.safetensors, or numbered shards and their index; holds one shard in memory."""
    shards = [[]]
    room = shard_bytes
    total = 0
    for part in table:
        size = dtype_of(part.ours, dtype).itemsize * math.prod(part.shape)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= size
        total += size
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for part in shard:
            tensors[part.theirs] = export_tensor(source, cfg, part, ready, dtype)
        checkpoint.save_tensors(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def dtype_of(ours: str, dtype: torch.dtype) -> torch.dtype:
    """A bias decides between near-equal scores: it stays fp32."""
    return torch.float32 if ours.endswith(".bias") else dtype


def export_tensor(source, cfg, part: Part, ready: dict, dtype: torch.dtype) -> torch.Tensor:
    """E303: its values are not finite, E400: `dtype` cannot hold them."""
    if part.ours in ready:
        tensor = ready[part.ours]
    elif 0 in part.shape:
        tensor = torch.empty(part.shape)
    else:
        # an expert is a matrix of a 3-D tensor
        region = [1] * (len(part.first) - len(part.shape)) + part.shape
        tensor = source.read(f"model.{part.ours}", part.first, region).view(part.shape)
        if part.ours.endswith("experts.w2"):
            tensor *= folded(cfg)
    rounded = tensor.to(dtype_of(part.ours, dtype))
    if value := checkpoint.nonfinite(rounded):
        if checkpoint.nonfinite(tensor):
            text = f"model.{part.ours} holds {value}: the run had diverged"
            raise UserError("E303", f"{source.path}: {text}")
        text = f"dtype: {dtype} cannot hold all of model.{part.ours}; take bfloat16 or float32"
        raise UserError("E400", f"{source.path}: {text}")
    return rounded


def tokenizer_config(tokenizer: Tokenizer, ids: dict, max_seq_len: int) -> dict:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
    config |= {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    names = {i: name for name, i in tokenizer.specials.items()}
    for key, i in ids.items():
        i = i[0] if isinstance(i, list) else i  # Llama 3 has several ends; this file names one
        config |= {key.removesuffix("_id"): names[i]} if i in names else {}
    return config


# ---------------------------------------------------------------- the check

TEXTS = [
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", "", " ", "  two  spaces ", "\n\n\tindented\r\n",
    "def f(x):\n    return x ** 2  # square\n", "don't I'll we've THEY'RE", "3.14159 1,000,000 0x1F 2024-11-21",
    "https://example.org/a?b=c&d=%20", "naïve café Straße", "Привет, мир", "你好，世界", "こんにちは", "안녕하세요",
    "مرحبا بالعالم", "नमस्ते", "👩‍👩‍👧‍👦 🇧🇷 ☺️", "a\u0301 \u200b\ufeff", "ends with spaces   ",
]  # fmt: skip


def import_transformers():
    try:
        import transformers
    except ImportError as error:
        text = f"the check needs transformers: pip install transformers ({error})"
        raise UserError("E003", text) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def compare(
    transformers, source: checkpoint.Checkpoint, cfg, dtype: str, tokenizer, folder: Path
) -> dict:
    """Logits, 32 greedy tokens and token ids under transformers against ours, in fp32 on the CPU.

    Ours are the checkpoint's weights rounded to `dtype`, so what rounding costs is not part of the difference.
    """
    ours = Transformer(cfg).eval()
    state = source.model_state()
    for name in {name for name, _ in ours.named_parameters()}:
        scale = 1.0  # what was folded in before the rounding
        if name.endswith("router.weight"):
            scale = cfg.routing_temperature
        elif name.endswith("experts.w2"):
            scale = 1 / folded(cfg)
        state[name] = (state[name] / scale).to(DTYPES[dtype]).float() * scale
    ours.load_state_dict(state)
    auto = transformers.AutoModelForCausalLM
    try:
        theirs = auto.from_pretrained(folder, torch_dtype=torch.float32).eval()
        other = transformers.AutoTokenizer.from_pretrained(folder) if tokenizer else None
    except Exception as error:  # whatever it raises, the folder does not do what it promises
        text = f"transformers {transformers.__version__} cannot load {folder}: {error}"
        raise UserError("E402", text) from error
    n = tokenizer.n_vocab if tokenizer else cfg.vocab_size
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(n, (2, min(64, cfg.max_seq_len)), generator=generator)  # (B, T)
    diff = (ours(idx) - theirs(idx).logits).abs().max().item()
    # Their cached decoding against our full forward: each token they choose has our largest logit,
    # or ties with it.
    theirs.generation_config.eos_token_id = None  # go on for 32 tokens
    out = theirs.generate(idx[:1, :8], max_new_tokens=32, do_sample=False)
    logits, new = ours(out)[0, -33:-1], out[0, -32:]  # (32, V), (32,)
    gap = (logits.max(-1).values - logits[torch.arange(32), new]).max().item()
    equal = None
    if tokenizer:
        equal = all(
            tokenizer.encode(text).tolist() == other(text, add_special_tokens=False).input_ids
            for text in TEXTS
        )
    return {"max_diff": diff, "greedy_equal": gap <= 2 * TOLERANCE, "ids_equal": equal}


# ---------------------------------------------------------------- from Hugging Face

# Keys of config.json, beside KEYS and MUST, that we read or that do not change the function; any other must be off
# (false, null, 0, empty). OWN and DEFAULTS are what transformers takes for a key that is not there.
HARMLESS = {
    "architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "torch_dtype", "dtype", "use_cache", "pretraining_tp", "attention_dropout", "max_window_layers",
    "is_llama_config", "return_dict", "id2label", "label2id", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", *TOKEN_IDS,
}  # fmt: skip
DEFAULTS = {
    "num_key_value_heads": 0, "head_dim": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "norm_topk_prob": False, "n_shared_experts": 0,
    "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
}  # fmt: skip
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
    config, known, why = OWN[kind] | config, HARMLESS | {*KEYS[kind].values(), *OWN[kind]}, []
    must, experts = MUST | (DOTS1_MUST if kind == "dots1" else {}), config.get("num_local_experts")
    if kind == "qwen3_moe" and config.setdefault("num_experts", experts) == experts:
        known.add("num_local_experts")  # what transformers 5 calls it
    if (
        kind == "dots1"
        and not config.get("layer_types")
        and config["num_hidden_layers"] > config["max_window_layers"]
    ):
        known.remove("sliding_window")
    for key, value in config.items():
        if key == "layer_types":
            off = all(v == "full_attention" for v in value or [])
        elif key in must:
            off = value in (None, must[key]) or (key, value) == (
                "scoring_func",
                "noaux_tc",
            )  # a name for the same
        else:
            off = not value or key in known or key.startswith(("_", "transformers"))
        why += [] if off else [f"{key}: {value!r} cannot be imported"]
    places = [config, *(config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))]
    if not all(isinstance(place, dict) for place in places):
        raise UserError(
            "E401", f"{where}: rope_scaling and rope_parameters must be objects, not {places[1:]}"
        )
    thetas = {float(place["rope_theta"]) for place in places if place.get("rope_theta") is not None}
    rope = dict(places[1] or places[2])
    why += [f"rope_theta: {sorted(thetas)} contradict one another"] if len(thetas) > 1 else []
    if any(place.get("partial_rotary_factor") not in (None, 1.0) for place in places):
        why.append("partial_rotary_factor: only 1.0 can be imported")
    rope.pop("partial_rotary_factor", None)
    if why := why + odd_rope(rope):
        raise UserError("E401", f"{where}: {'; '.join(why)}")
    rope = {k: v for k, v in rope.items() if v is not None and k not in ("rope_theta", "truncate")}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    config = DEFAULTS | config
    ours = {
        ours: 0 if config[theirs] is None else config[theirs] for ours, theirs in KEYS[kind].items()
    }
    ours |= {"mixtral": {"norm_topk": True}, "dots1": {"router": "sigmoid"}}.get(kind, {})
    if kind == "qwen3_moe" and ours["n_experts"]:
        step, dense = config["decoder_sparse_step"] or 1, config["mlp_only_layers"] or ()
        sparse = [i for i in range(ours["n_layers"]) if i not in dense and (i + 1) % step == 0]
        ours["moe_layers"] = sparse if len(sparse) < ours["n_layers"] else None
    ours |= {"rope_theta": max(thetas, default=1e6 if kind == "mixtral" else 1e4)}
    return ModelConfig(
        rope_scaling=None if plain else rope, qk_norm=kind not in ("llama", "mixtral"), **ours
    )


def read_hf(folder) -> tuple[ModelConfig, dict[str, torch.Tensor], str, Path | None]:
    """(Our configuration, fp32 state dict, dtype of the files, path of tokenizer.json or None) of a folder.

    UserError E401 when a key of the configuration or a tensor is too many, missing, or of another shape.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "E401")
    try:
        cfg = model_config(config, folder / "config.json")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error}") from error
    except KeyError as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error.args[0]}: missing") from error
    index, shards = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists():
        weight_map = read_json(index, "E401").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("E401", f"{index}: holds no weight_map")
        shards = [folder / str(name) for name in sorted(set(weight_map.values()))]
    elif not shards[0].exists():
        raise UserError(
            "E401",
            f"{folder}: no model.safetensors and no index of shards; pickled .bin files are not read",
        )
    where, parts, dtypes = {}, {}, set()
    try:
        for file in shards:
            where |= dict.fromkeys((handle := safe_open(file, "pt")).keys(), handle)
        table = layout(cfg, fused=any(n.endswith("experts.gate_up_proj") for n in where))
        wanted = {theirs for _, theirs, *_ in table}
        extra = {
            n for n in where if n not in wanted and not n.endswith("rotary_emb.inv_freq")
        }  # a table of old files
        if cfg.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(where):
            head, embed = (
                where[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
            )
            extra -= (
                {"lm_head.weight"} if torch.equal(head, embed) else set()
            )  # some files hold a tied head twice
        why = [f"{n}: has no place in this {config['model_type']}" for n in sorted(extra)]
        table = [
            row for row in table if row[1] in where or 0 not in row[3]
        ]  # shared experts of width 0: there or not
        why += [f"{n}: missing" for n in sorted({theirs for _, theirs, *_ in table} - set(where))]
        for ours, theirs, _, shape in table if not why else []:
            tensor = where[theirs].get_tensor(theirs)
            if list(tensor.shape) != shape or tensor.dtype not in DTYPES.values():
                why.append(
                    f"{theirs}: {tensor.dtype} {list(tensor.shape)}, expected {shape} of {', '.join(DTYPES)}"
                )
            if 0 not in shape:
                dtypes |= (
                    {str(tensor.dtype).removeprefix("torch.")}
                    if not ours.endswith(".bias")
                    else set()
                )
                parts.setdefault(ours, []).append(tensor.float())
    except (OSError, SafetensorError) as error:
        raise UserError("E401", f"{folder}: {error}") from error
    if why:
        raise UserError(
            "E401",
            f"{folder}: {'; '.join(why[:8])}{f'; {len(why) - 8} more' if len(why) > 8 else ''}",
        )
    state = {
        ours: torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        for ours, tensors in parts.items()
    }
    for name in [n for n in state if ".experts." in n]:
        state[name] = state[name].view(cfg.n_experts, -1, state[name].shape[-1])
    cfg = add_buffers(cfg, state)
    tokenizer_file = folder / "tokenizer.json"
    return cfg, state, one_dtype(dtypes), tokenizer_file if tokenizer_file.exists() else None


def add_buffers(cfg: ModelConfig, state: dict) -> ModelConfig:
    """Put the routers' buffers that only training needs into `state`; experts that are never chosen are empty slots."""
    E, names = (
        cfg.n_experts,
        [f"blocks.{i}.ffn.router." for i in range(cfg.n_layers) if cfg.is_moe(i)],
    )
    alive = [state.setdefault(r + "bias", torch.zeros(E)) > DEAD_BIAS / 2 for r in names]
    counts = [int(a.sum()) for a in alive]
    slots = names and cfg.n_experts_per_token <= min(counts) < E
    for r, a in zip(names, alive):
        state[r + "load"] = a / a.sum() if slots else torch.full((E,), 1 / E)
        if slots:
            state[r + "bias"] = state[r + "bias"].masked_fill(~a, 0.0)
            state |= {
                r + "alive": a,
                r + "sibling": torch.arange(E),
                r + "retired": torch.full((E,), -1),
            }
    return dataclasses.replace(cfg, n_experts=max(counts), n_experts_max=E) if slots else cfg


def one_dtype(names: set[str]) -> str:
    """A mixed file is fp32 to us, which holds both others exactly."""
    return next(iter(names)) if len(names) == 1 else "float32"


def from_hf(folder, out_dir, say=print) -> None:
    """Make a run out of a Hugging Face folder: step 0, without an optimizer."""
    cfg, state, dtype, tokenizer_file = read_hf(folder)
    config = read_json(Path(folder) / "config.json", "E401")
    imported = {
        "from": str(Path(folder).resolve()),
        "dtype": dtype,
        **{key: config.get(key) for key in TOKEN_IDS},
    }
    write_run(out_dir, cfg, state, imported, tokenizer_file, say)


def write_run(
    out_dir, cfg: ModelConfig, state: dict, imported: dict, tokenizer_file: Path | None, say
) -> None:
    """out_dir with step_00000000, config.yaml and, where we can read it, the tokenizer. UserError E300 when used."""
    with torch.device("meta"):
        model = Transformer(cfg)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    if wrong := [
        n for n in sorted({*shapes, *state}) if n not in state or state[n].shape != shapes.get(n)
    ]:
        raise UserError(
            "E401", f"{imported['from']}: do not fit the configuration: {', '.join(wrong[:8])}"
        )
    if broken := [
        f"{name} holds {value}" for name, t in state.items() if (value := checkpoint.nonfinite(t))
    ]:
        raise UserError("E401", f"{imported['from']}: {'; '.join(broken[:8])}")
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    config = {"model": dataclasses.asdict(cfg)}
    about = {"step": 0, "cursor": 0, "tokens": 0, "segments": [], "clean": True, "config": config}
    about |= {"imported": imported, "versions": versions()}
    pieces = {f"model.{name}": [(list(t.shape), [0] * t.dim(), t)] for name, t in state.items()}
    with new_folder(out_dir, "E300") as tmp:
        step = checkpoint.step_dir(tmp, 0)
        if trouble := checkpoint.write(Path(f"{step}.tmp"), 0, pieces):
            raise OSError(trouble)
        checkpoint.commit(Path(f"{step}.tmp"), step, 1, about)
        text = f"# imported from {imported['from']}\n" + yaml.safe_dump(config, sort_keys=False)
        (tmp / "config.yaml").write_text(text, encoding="utf-8")
        if tokenizer:
            shutil.copy(tokenizer_file, tmp / "tokenizer.json")
            np.save(tmp / "token_bytes.npy", tokenizer.token_bytes())
    if not tokenizer:
        say(f"imported without a tokenizer: {why_not}")
    say(f"{model.n_params()['total']:,} parameters, {imported['dtype']} made fp32: {out_dir}")


# ---------------------------------------------------------------- from Lunaris Codex


# ---------------------------------------------------------------- command


def main(argv: list[str]) -> None:
    from tools.import_lunaris import LUNARIS_MOE, from_lunaris

    parser = Words(
        prog="export.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("to_hf", help="a run to a Hugging Face folder")
    p.add_argument("run", type=a_path, help="out/run, or one of its step folders")
    p.add_argument("folder", type=a_path)
    p.add_argument(
        "--dtype", choices=DTYPES, help="default: float32; for an imported run the dtype it came in"
    )
    p.add_argument("--best", action="store_true", help="the best step instead of the newest")
    p.add_argument(
        "--check",
        action="store_true",
        help="compare logits, greedy tokens and token ids with transformers",
    )
    p = commands.add_parser(
        "from_hf", help="a folder of Llama, Qwen3, Mixtral, Qwen3Moe or Dots1 to a run"
    )
    p.add_argument("folder", type=a_path)
    p.add_argument("out_dir", type=a_path)
    p = commands.add_parser("from_lunaris", help="a Lunaris Codex .pt to a run")
    p.add_argument("file", type=a_path)
    p.add_argument("out_dir", type=a_path)
    p.add_argument("--moe", choices=("scaled", "unscaled"), help=LUNARIS_MOE)
    for key in ("n_heads", "max_seq_len", "rope_ntk_scale_base", "rope_theta", "dropout"):
        p.add_argument(f"--{key}", type=float if key in ("rope_theta", "dropout") else int)
    args = vars(parser.parse_args(argv))
    args |= {key: expand(args[key]) for key in ("run", "folder", "out_dir", "file") if key in args}
    {"to_hf": to_hf, "from_hf": from_hf, "from_lunaris": from_lunaris}[args.pop("command")](**args)


if __name__ == "__main__":
    command(main, lasting=True)
