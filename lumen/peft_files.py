"""PEFT's adapter_config.json and adapter_model.safetensors, to and from our names.

Their matrices are parts of our fused ones, q, k and v of wqkv: A is the same for all of them, B is
cut into rows. Where an adapter of theirs has an A for each, ours has all of them on top of one
another, and B is zero but in blocks: a larger rank, the same function.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from lumen.errors import UserError
from lumen.files import read_json
from lumen.hf import Part, layout, refusals
from model import ModelConfig, role

TABLES = {"embed": "model.embed_tokens", "head": "lm_head"}
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
ROWS_KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"

# Keys of adapter_config.json that are read, or that say nothing about what the adapter computes.
# Any other must be empty: it might.
KNOWN = {"r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type", "bias"}
KNOWN |= {"trainable_token_indices", "init_lora_weights", "lora_dropout", "target_modules"}
KNOWN |= {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type"}
KNOWN |= {"exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config"}
KNOWN |= {"megatron_core", "qalora_group_size", "ensure_weight_tying", "peft_version"}
KNOWN |= {"eva_config", "runtime_config"}
# of init_lora_weights: these change the base's weights too
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# what files of another kind raise while they are read
BAD = (OSError, SafetensorError, ValueError, TypeError, AttributeError, LookupError, re.error)


def parts_of(cfg: ModelConfig, name: str) -> list[Part]:
    """Their matrices within our matrix `name`."""
    return [part for part in layout(cfg) if part.ours == f"{name}.weight"]


# ---------------------------------------------------------------- to PEFT


def write(found, base: str) -> tuple[dict, dict]:
    """(adapter_config, tensors) of a step that holds adapters. E400: PEFT cannot express them."""
    about, cfg = found.state["adapter"], found.model_config()
    why = refusals(cfg)
    outside = [name for name in about["targets"] if ".attn." not in name]
    if cfg.n_experts and outside:
        # by name peft 0.21 takes a shared expert's gate_proj for the experts', and drops it
        text = (
            f"{outside[0]} has adapters in a model with experts: others lose those without a word"
        )
        fix = "python finetune.py merge RUN OUT makes a model that can be exported"
        why.append(f"{text} (vllm issue 41384); {fix}")
    if why:
        raise UserError("E400", f"{found.path}: {'; '.join(why)}")
    tensors, modules = {}, []
    for name in about["targets"]:
        a, b = found.read(f"model.{name}.lora_a"), found.read(f"model.{name}.lora_b")
        for part in parts_of(cfg, name):
            theirs = part.theirs.removesuffix(".weight")
            first, rows = part.first[0], part.shape[0]
            modules.append(theirs)
            tensors[f"base_model.model.{theirs}.lora_A.weight"] = a.clone()
            tensors[f"base_model.model.{theirs}.lora_B.weight"] = b[first : first + rows].clone()
    indices = {}
    for table, theirs in TABLES.items():
        if f"model.{table}.rows" in found.tensors:
            tensors[ROWS_KEY.format(theirs)] = found.read(f"model.{table}.rows")
            indices[theirs.rpartition(".")[2]] = sorted(about["fresh_ids"])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": about["r"],
        "lora_alpha": about["alpha"],
        "use_rslora": about["rslora"],
        "lora_dropout": about["dropout"],
        "target_modules": shortest(cfg, modules),
        "trainable_token_indices": indices or None,
        "bias": "none",
        "inference_mode": True,
    }
    return config, tensors


def shortest(cfg: ModelConfig, modules: list[str]) -> list[str]:
    """Their last names, where those name no module that has no adapter."""
    last = sorted({module.rpartition(".")[2] for module in modules})
    every = {part.theirs.removesuffix(".weight") for part in layout(cfg)}
    named = {module for module in every if module.rpartition(".")[2] in last}
    return last if named == set(modules) else modules


# ---------------------------------------------------------------- from PEFT


class Pair(NamedTuple):
    """An adapter of one of their matrices: scale B A."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scale: float


def read(folder: Path, cfg: ModelConfig) -> tuple[dict, dict, dict]:
    """(settings, {our name: tensor}, {table: {id: row}}) of a PEFT folder for a base of this model.

    settings: r, alpha, rslora, dropout, targets. E401: what is in it is not all understood.
    """
    config = read_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
        fresh = take_rows(config, tensors, cfg.vocab_size)
        pairs, wrong = take_pairs(config, tensors)
        wrong += [f"{key} holds NaN or inf" for key, t in tensors.items() if not finite(t)]
    except BAD as error:
        raise UserError("E401", f"{file}: {type(error).__name__}: {error}") from error
    fused = {}
    for name in dict.fromkeys(part.ours for part in layout(cfg) if role(part.ours) == "matrix"):
        name = name.removesuffix(".weight")
        parts = parts_of(cfg, name)
        mine = [pairs.pop(part.theirs.removesuffix(".weight"), None) for part in parts]
        if any(mine):
            fused[name] = (parts, mine)
            wrong += misfits(parts, mine)
    wrong += [f"{name} is no matrix of it" for name in sorted(pairs)]
    if wrong or not fused:
        text = "; ".join(wrong[:8]) or "there is no adapter in it"
        hint = "peft's merge_and_unload makes a model of it, export.py from_hf a run of that"
        raise UserError("E401", f"{file} and the base: {text}; {hint}")
    return *stack(fused, config), fresh


def read_config(file: Path) -> dict:
    """E401: another kind of adapter, or a key that could change what it computes."""
    config = read_json(file, "E401")
    odd = [f"{key}: {value}" for key, value in config.items() if value and key not in KNOWN]
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        odd.append(f"bias: {config['bias']}")
    if str(config.get("init_lora_weights", "")).startswith(CHANGES_BASE):
        odd.append(f"init_lora_weights: {config['init_lora_weights']} changes the base too")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or not config[key] > 0:
            odd.append(f"{key}: {config.get(key)}")
    if odd:
        raise UserError("E401", f"{file}: {'; '.join(odd)}: only plain LoRA can be read")
    return config


def scale_of(config: dict, module: str, r: int) -> float:
    """By PEFT's rule: a pattern is a module's whole name or its end, as a regular expression."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # a stranger's pattern may take for ever: nested quantifiers do
        if len(re.findall(r"[*+{]", pattern)) > 1:
            raise ValueError(f"alpha_pattern {pattern!r} is no simple one")
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def take_rows(config: dict, tensors: dict, V: int) -> dict[str, dict[int, torch.Tensor]]:
    """{our table: {id: its trained row}}, out of `tensors`."""
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, list):
        indices = {"embed_tokens": indices}
    fresh = {}
    for table, theirs in TABLES.items():
        rows = tensors.pop(ROWS_KEY.format(theirs), None)
        if rows is None:
            continue
        ids = indices.get(theirs.rpartition(".")[2], [])
        if len(ids) != len(rows) or not set(ids) <= set(range(V)) or len(set(ids)) < len(ids):
            raise ValueError(f"{theirs} has {len(rows)} trained rows of {V} for the ids {ids}")
        if not finite(rows):
            raise ValueError(f"{theirs} has trained rows of NaN or inf")
        fresh[table] = dict(zip(ids, rows.float()))
    return fresh


def take_pairs(config: dict, tensors: dict) -> tuple[dict[str, Pair], list[str]]:
    """({their module: its adapter}, what else is in the file)."""
    halves, wrong = {}, []
    for key, tensor in tensors.items():
        if match := LORA_KEY.fullmatch(key):
            halves.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            wrong.append(f"{key} is no adapter of a matrix")
    pairs = {}
    for module, half in halves.items():
        if len(half) < 2:
            wrong.append(f"{module} has lora_{next(iter(half))} alone")
            continue
        scale = scale_of(config, module, len(half["A"]))
        pairs[module] = Pair(half["A"], half["B"], scale)
    return pairs, wrong


def misfits(parts: list[Part], pairs: list[Pair | None]) -> list[str]:
    wrong = []
    for part, pair in zip(parts, pairs):
        if pair is None:
            continue
        r = len(pair.a)
        shapes = [list(pair.a.shape), list(pair.b.shape)]
        if shapes != [[r, part.shape[1]], [part.shape[0], r]]:
            wrong.append(f"{part.theirs} is {part.shape}, its adapter {shapes}")
    return wrong


def stack(fused: dict, config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors) of our adapters, all of one rank and one scale. fused: {our name: (the
    parts of its matrix, their adapters or None)}."""
    r, rslora = config["r"], bool(config.get("use_rslora"))
    scale = config["lora_alpha"] / (r**0.5 if rslora else r)
    made = {name: join(parts, pairs, scale) for name, (parts, pairs) in fused.items()}
    largest = max(len(a) for a, _ in made.values())
    settings = {"r": r, "alpha": config["lora_alpha"], "rslora": rslora}
    if largest != r:
        settings = {"r": largest, "alpha": scale * largest, "rslora": False}
    settings |= {"dropout": config.get("lora_dropout") or 0.0, "targets": list(made)}
    tensors = {}
    for name, (a, b) in made.items():
        lacking = largest - len(a)  # zeros, which add nothing
        tensors[f"{name}.lora_a"] = F.pad(a, (0, 0, 0, lacking))
        tensors[f"{name}.lora_b"] = F.pad(b, (0, lacking))
    return settings, tensors


def join(parts: list[Part], pairs: list[Pair | None], scale: float):
    """A (r, in) and B (out, r) of a fused matrix from the adapters of its parts, for one scale."""
    first = next(pair for pair in pairs if pair)
    if all(pair and torch.equal(pair.a, first.a) for pair in pairs):
        return first.a, torch.cat([pair.b * (pair.scale / scale) for pair in pairs])
    blocks = []
    for part, pair in zip(parts, pairs):
        b = torch.zeros(part.shape[0], 0)
        blocks.append(pair.b * (pair.scale / scale) if pair else b)
    return torch.cat([pair.a for pair in pairs if pair]), torch.block_diag(*blocks)
