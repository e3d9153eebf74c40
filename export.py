"""To and from Hugging Face folders, with a check; models of few bits; import of Lunaris Codex
checkpoints.

    python export.py to_hf out/run DIR [--dtype float32|bfloat16|float16] [--best] [--check]
    python export.py from_hf DIR out/run
    python export.py quantize out/run DIR [--bits 8|4] [--method rtn|gptq] [--max_loss PERCENT]
    python export.py to_gguf out/run FILE [--type f32|f16|bf16|q8_0]
    python export.py to_onnx out/run FILE
    python export.py from_lunaris FILE.pt out/run [--n_heads N --max_seq_len T ...]

A model without QK-norm IS a Llama, one with QK-norm IS a Qwen3; with experts they are a Mixtral
and a Qwen3Moe, with a sigmoid router a Dots1. Our fused matrices are theirs on top of one another,
so both directions only slice and rename, and every bit survives. Nothing is unpickled except a
Lunaris .pt, and that with weights_only. Every folder is written under another name and then
renamed.
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

import lumen.waiting  # noqa: F401 - before torch
import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open

from lumen import (
    adapters,
    chat,
    checkpoint,
    gguf_file,
    models,
    onnx_file,
    quantise_names,
    quantised,
)
from lumen.base import jinja_of
from lumen.errors import UserError, a_path, expand
from lumen.files import read_json, sync, write_json
from lumen.hf import (
    CLASSES,
    DEAD_BIAS,
    TOKEN_IDS,
    Part,
    folded,
    hf_config,
    layout,
    model_config,
    model_type,
    refusals,
)
from lumen.hf_check import DTYPES, TOLERANCE, compare, import_transformers, same_conversations
from lumen.launch import Words, command
from lumen.tokenizer import Tokenizer, load, of_run
from model import ModelConfig, Transformer, role


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


def routers(source: checkpoint.Checkpoint, cfg: ModelConfig) -> tuple[dict, dict, list[str]]:
    """({layer: slots to export}, {our router tensor: its values as exported}, why a layer has no
    architecture).

    Empty slots are left out where all layers have as many; Dots1 can also keep them, never to be
    chosen.
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
                    "only one can be chosen, which no class knows: train on until they drift apart"
                )
                why.append(f"layer {i}: of the siblings {own[siblings].tolist()} {text}")
        kept[i] = own[a | keep_dead].tolist()
        router = f"blocks.{i}.ffn.router"
        ready[f"{router}.weight"] = read(i, "weight")[kept[i]] / cfg.routing_temperature
        ready[f"{router}.bias"] = bias.masked_fill(~a, DEAD_BIAS)[kept[i]]
    return kept, ready, why


def to_hf(
    run, folder, dtype: str | None = None, best=False, check=False, say=print, shard_bytes=5 * 10**9
) -> dict:
    """Write the run's newest (or best) step as a Hugging Face folder; returns what EXPORT.json
    says.

    dtype: default float32, for an imported step 0 the one it came in. UserError E400 with every
    reason when the model has no Hugging Face architecture, E402 when `check` finds a difference
    (the folder then keeps the suffix .tmp).
    """
    source = adapters.merged(checkpoint.find(run, best, say))
    cfg = source.model_config()
    imported = source.state.get("imported") or {}
    dtype = dtype or imported.get("dtype", "float32")
    kept, ready = check_exportable(source, cfg, dtype)
    transformers = import_transformers() if check else None

    tokenizer_file = of_run(source.path.parent, source.state.get("tokenizer"))
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    ids = {key: imported.get(key) for key in TOKEN_IDS}
    if tokenizer and "eos_token_id" not in imported:
        # A pad id that can occur in a prompt makes generate() mask it there: a real pad token or
        # none
        ids = dict(zip(TOKEN_IDS, (tokenizer.eot_id, tokenizer.eot_id, tokenizer.pad_id)))
    template = chat.template_of_run(source.state) if tokenizer else None
    if template:
        ids["eos_token_id"] = ends(ids["eos_token_id"], template, tokenizer)
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
            if template:
                made["chat_template"] = chat.jinja(template)
            write_json(tmp / "tokenizer_config.json", made)
        if check:
            report |= compare(transformers, source, cfg, dtype, tokenizer, tmp)
            if template and not same_conversations(transformers, tokenizer, template, tmp):
                report["ids_equal"] = False
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
    names = {i: name for name, i in tokenizer.controls.items()}
    for key, i in ids.items():
        i = i[0] if isinstance(i, list) else i  # Llama 3 has several ends; this file names one
        config |= {key.removesuffix("_id"): names[i]} if i in names else {}
    return config


def ends(eos, template: chat.Template, tokenizer: Tokenizer) -> int | list[int]:
    """eos_token_id of a model that answers: what ends a reply, then what ended a text before."""
    before = eos if isinstance(eos, list) else [eos]
    ids = dict.fromkeys((*chat.stop_ids(template, tokenizer), *before))
    ids.pop(None, None)
    return list(ids) if len(ids) > 1 else next(iter(ids))


# ---------------------------------------------------------------- from Hugging Face


def read_hf(folder) -> tuple[ModelConfig, dict[str, torch.Tensor], str, Path | None]:
    """(Our configuration, fp32 state dict, dtype of the files, path of tokenizer.json or None) of
    a folder.

    UserError E401 when a key of the configuration or a tensor is too many, missing, or of another
    shape.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "E401")
    try:
        cfg = model_config(config, folder / "config.json")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error}") from error
    except KeyError as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error.args[0]}: missing") from error
    try:
        where = {}
        for file in shard_files(folder):
            handle = safe_open(file, "pt")
            where |= dict.fromkeys(handle.keys(), handle)
        table, why = match_tensors(cfg, where, config["model_type"])
        parts, dtypes = {}, set()
        if not why:
            parts, dtypes, why = read_parts(table, where)
    except (OSError, SafetensorError) as error:
        raise UserError("E401", f"{folder}: {error}") from error
    if why:
        more = [f"{len(why) - 8} more"] if len(why) > 8 else []
        raise UserError("E401", f"{folder}: {'; '.join(why[:8] + more)}")
    state = {}
    for name, tensors in parts.items():
        state[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if role(name) == "expert":
            state[name] = state[name].view(cfg.n_experts, -1, state[name].shape[-1])
    cfg = add_buffers(cfg, state)
    tokenizer_file = folder / "tokenizer.json"
    return cfg, state, one_dtype(dtypes), tokenizer_file if tokenizer_file.exists() else None


def shard_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, "E401").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("E401", f"{index}: holds no weight_map")
        return [folder / str(name) for name in sorted(set(weight_map.values()))]
    file = folder / "model.safetensors"
    if not file.exists():
        text = "no model.safetensors and no index of shards; pickled .bin files are not read"
        raise UserError("E401", f"{folder}: {text}")
    return [file]


def match_tensors(cfg: ModelConfig, where: dict, kind: str) -> tuple[list[Part], list[str]]:
    """(the parts to read, tensors that are too many or missing). where: {name: its file}."""
    fused = any(name.endswith("experts.gate_up_proj") for name in where)
    table = layout(cfg, fused=fused)
    extra = set(where) - {part.theirs for part in table}
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}  # of old files
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if cfg.tie_embeddings and head in where and embed in where:
        # some files hold a tied head twice
        if torch.equal(where[head].get_tensor(head), where[embed].get_tensor(embed)):
            extra.discard(head)
    # shared experts of width 0: there or not
    table = [part for part in table if part.theirs in where or 0 not in part.shape]
    missing = {part.theirs for part in table} - set(where)
    why = [f"{name}: has no place in this {kind}" for name in sorted(extra)]
    return table, why + [f"{name}: missing" for name in sorted(missing)]


def read_parts(table: list[Part], where: dict) -> tuple[dict, set[str], list[str]]:
    """({our name: its fp32 parts in order}, dtypes of the files, what is of another shape)."""
    parts, dtypes, why = {}, set(), []
    for part in table:
        tensor = where[part.theirs].get_tensor(part.theirs)
        found = f"{tensor.dtype} {list(tensor.shape)}"
        if list(tensor.shape) != part.shape or tensor.dtype not in DTYPES.values():
            why.append(f"{part.theirs}: {found}, expected {part.shape} of {', '.join(DTYPES)}")
        if 0 in part.shape:
            continue
        if not part.ours.endswith(".bias"):
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
        parts.setdefault(part.ours, []).append(tensor.float())
    return parts, dtypes, why


def add_buffers(cfg: ModelConfig, state: dict) -> ModelConfig:
    """Put the routers' buffers that only training needs into `state`; experts that are never
    chosen are empty slots."""
    E = cfg.n_experts
    routers = [f"blocks.{i}.ffn.router." for i in range(cfg.n_layers) if cfg.is_moe(i)]
    if not routers:
        return cfg
    alive = []  # by layer, bool (E,)
    for name in routers:
        bias = state.setdefault(f"{name}bias", torch.zeros(E))
        alive.append(bias > DEAD_BIAS / 2)
    counts = [int(a.sum()) for a in alive]
    slots = cfg.n_experts_per_token <= min(counts) < E
    for name, a in zip(routers, alive):
        if not slots:
            state[f"{name}load"] = torch.full((E,), 1 / E)
            continue
        state[f"{name}load"] = a / a.sum()
        state[f"{name}bias"] = state[f"{name}bias"].masked_fill(~a, 0.0)
        state[f"{name}alive"] = a
        state[f"{name}sibling"] = torch.arange(E)
        state[f"{name}retired"] = torch.full((E,), -1)
    if not slots:
        return cfg
    return dataclasses.replace(cfg, n_experts=max(counts), n_experts_max=E)


def one_dtype(names: set[str]) -> str:
    """A mixed file is fp32 to us, which holds both others exactly."""
    return next(iter(names)) if len(names) == 1 else "float32"


def from_hf(folder, out_dir, say=print) -> None:
    """Make a run out of a Hugging Face folder: step 0, without an optimizer."""
    cfg, state, dtype, tokenizer_file = read_hf(folder)
    config = read_json(Path(folder) / "config.json", "E401")
    imported = {"from": str(Path(folder).resolve()), "dtype": dtype}
    imported |= {key: config.get(key) for key in TOKEN_IDS}
    imported |= read_template(Path(folder), say)
    write_run(out_dir, cfg, state, imported, tokenizer_file, say)


def read_template(folder: Path, say) -> dict:
    """{template: its name, where the folder's is one of ours; system: the turn with which it begins
    a conversation that has none}."""
    text = jinja_of(folder)
    name = chat.template_of({"chat_template": text})
    if text and name is None:
        known = ", ".join(chat.FORMATS)
        say(f"note: its chat template is none of {known}: conversations need --template")
    if name is None:
        return {}
    found = {"template": name}
    if isinstance(text, str) and (system := chat.without_system(text)[1]):
        found["system"] = system
        say(f"note: its chat template begins with a system turn where there is none: {system!r}")
    return found


def write_run(
    out_dir, cfg: ModelConfig, state: dict, imported: dict, tokenizer_file: Path | None, say
) -> None:
    """out_dir with step_00000000, config.yaml and, where we can read it, the tokenizer. UserError
    E300 when used."""
    with torch.device("meta"):
        model = Transformer(cfg)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    wrong = [name for name in sorted({*shapes, *found}) if shapes.get(name) != found.get(name)]
    if wrong:
        text = f"do not fit the configuration: {', '.join(wrong[:8])}"
        raise UserError("E401", f"{imported['from']}: {text}")
    broken = []
    for name, tensor in state.items():
        if value := checkpoint.nonfinite(tensor):
            broken.append(f"{name} holds {value}")
    if broken:
        raise UserError("E401", f"{imported['from']}: {'; '.join(broken[:8])}")
    write_step(out_dir, cfg, state, {"imported": imported}, tokenizer_file, say)
    say(f"{model.n_params()['total']:,} parameters, {imported['dtype']} made fp32: {out_dir}")


def write_step(
    out_dir, cfg: ModelConfig, state: dict, about: dict, tokenizer_file: Path | None, say
) -> None:
    """A run's folder with step 0 of these tensors, of which `about` is what state.json says more;
    about["imported"]["from"]: where they come from. E300, E403."""
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    # step 0 of a model whose MoD has been annealed
    config = {"model": dataclasses.asdict(cfg) | {"mod_anneal_steps": 0}}
    about = about | {
        "step": 0,
        "cursor": 0,
        "tokens": 0,
        "segments": [],
        "clean": True,
        "config": config,
        "versions": versions(),
    }
    pieces = {f"model.{name}": [(list(t.shape), [0] * t.dim(), t)] for name, t in state.items()}
    with new_folder(out_dir, "E300") as tmp:
        step = checkpoint.step_dir(tmp, 0)
        if trouble := checkpoint.write(Path(f"{step}.tmp"), 0, pieces):
            raise OSError(trouble)
        checkpoint.commit(Path(f"{step}.tmp"), step, 1, about)
        text = f"# imported from {about['imported']['from']}\n"
        text += yaml.safe_dump(config, sort_keys=False)
        (tmp / "config.yaml").write_text(text, encoding="utf-8")
        if tokenizer:
            tokenizer.save(tmp / "tokenizer.json")  # its end may stand in a file beside the old one
            np.save(tmp / "token_bytes.npy", tokenizer.token_bytes())
    if not tokenizer:
        say(f"imported without a tokenizer: {why_not}")


# ---------------------------------------------------------------- few bits


def quantize(run, folder, best=False, step=None, say=print, **how) -> dict:
    """Write a run, a step or a Hugging Face folder with its matrices in few bits; returns what its
    EXPORT.json says. how: of quantised.How. E303: the model holds what is not finite; E405: it
    loses more than it may."""
    quantise_names.check(how, run)
    how = quantised.How(**how)
    source = models.read_model(run, best, step, say=say)
    with new_folder(folder, "E117") as tmp:
        report = quantised.write(source, tmp, how, say)
    sizes = f"{report['bytes_before'] / 2**20:,.1f} MiB are {report['bytes_after'] / 2**20:,.1f}"
    say(f"{source}, in {how.bits} bits: {sizes} MiB with all that stays: {folder}")
    return report


# ---------------------------------------------------------------- command


def main(argv: list[str]) -> None:
    from tools.import_lunaris import LUNARIS_MOE, from_lunaris

    parser = Words(
        prog="export.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    dtype = "default: float32; for an imported run the dtype it came in"
    compare = "compare logits, greedy tokens and token ids with transformers"
    p = commands.add_parser("to_hf", help="a run to a Hugging Face folder")
    p.add_argument("run", type=a_path, help="out/run, or one of its step folders")
    p.add_argument("folder", type=a_path)
    p.add_argument("--dtype", choices=DTYPES, help=dtype)
    p.add_argument("--best", action="store_true", help="the best step instead of the newest")
    p.add_argument("--check", action="store_true", help=compare)
    folder = "a folder of Llama, Qwen3, Mixtral, Qwen3Moe or Dots1 to a run"
    p = commands.add_parser("from_hf", help=folder)
    p.add_argument("folder", type=a_path)
    p.add_argument("out_dir", type=a_path)
    few = commands.add_parser("quantize", help="a model in few bits, for sample, evaluate, serve")
    quantise_names.options(few)
    gguf_file.options(commands.add_parser("to_gguf", help="a run to a GGUF file, for llama.cpp"))
    onnx_file.options(commands.add_parser("to_onnx", help="a run to an ONNX graph that scores"))
    p = commands.add_parser("from_lunaris", help="a Lunaris Codex .pt to a run")
    p.add_argument("file", type=a_path)
    p.add_argument("out_dir", type=a_path)
    p.add_argument("--moe", choices=("scaled", "unscaled"), help=LUNARIS_MOE)
    for key in ("n_heads", "max_seq_len", "rope_ntk_scale_base"):
        p.add_argument(f"--{key}", type=int)
    for key in ("rope_theta", "dropout"):
        p.add_argument(f"--{key}", type=float)
    if argv[:1] == ["quantize"]:
        argv = quantise_names.translate(argv, few.names(), print)
    args = vars(parser.parse_args(argv))
    for key in ("run", "folder", "out_dir", "file", "calibrate", "val_data"):
        if args.get(key):
            args[key] = expand(args[key])
    run = {
        "to_hf": to_hf,
        "from_hf": from_hf,
        "quantize": quantize,
        "to_gguf": gguf_file.to_gguf,
        "to_onnx": onnx_file.to_onnx,
        "from_lunaris": from_lunaris,
    }
    run[args.pop("command")](**args)


if __name__ == "__main__":
    command(main, lasting=True)
