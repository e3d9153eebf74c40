"""To and from Hugging Face folders, with a check; import of dense Lunaris Codex checkpoints.

    python export.py to_hf out/run DIR [--dtype float32|bfloat16|float16] [--best] [--check]
    python export.py from_hf DIR out/run
    python export.py from_lunaris FILE.pt out/run [--n_heads N --max_seq_len T ...: only what the file does not say]

A model without QK-norm IS a Llama, one with QK-norm IS a Qwen3: our fused matrices are theirs on top of one another,
so both directions only slice and rename, and every bit survives. Nothing is unpickled except a Lunaris .pt, and that
with weights_only. Every folder is written under another name and then renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import checkpoint
from errors import UserError, command
from model import ModelConfig, Transformer
from tokenizer import Tokenizer, load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # largest difference of fp32 logits that the check accepts
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_KEYS = {  # what rope_tables() in model.py reads of rope_scaling; transformers would act on other keys too
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
}


def layout(cfg: ModelConfig) -> list[tuple[str, str, int, list[int]]]:
    """(our tensor, Hugging Face's tensor, its first row in ours, its shape) for every one of theirs."""
    d, f, q, kv = cfg.d_model, cfg.d_ff, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    table = []

    def add(ours, *parts):
        first = 0
        for theirs, *shape in parts:
            table.append((f"{ours}.weight", f"{theirs}.weight", first, shape))
            first += shape[0]

    add("embed", ("model.embed_tokens", cfg.vocab_size, d))
    for i in range(cfg.n_layers):
        b, h = f"blocks.{i}", f"model.layers.{i}"
        a, m = f"{h}.self_attn", f"{h}.mlp"
        add(f"{b}.attn_norm", (f"{h}.input_layernorm", d))
        add(f"{b}.attn.wqkv", (f"{a}.q_proj", q, d), (f"{a}.k_proj", kv, d), (f"{a}.v_proj", kv, d))
        add(f"{b}.attn.wo", (f"{a}.o_proj", d, q))
        if cfg.qk_norm:
            add(f"{b}.attn.q_norm", (f"{a}.q_norm", cfg.head_dim))
            add(f"{b}.attn.k_norm", (f"{a}.k_norm", cfg.head_dim))
        add(f"{b}.ffn_norm", (f"{h}.post_attention_layernorm", d))
        add(f"{b}.ffn.w13", (f"{m}.gate_proj", f, d), (f"{m}.up_proj", f, d))
        add(f"{b}.ffn.w2", (f"{m}.down_proj", d, f))
    add("norm", ("model.norm", d))
    if not cfg.tie_embeddings:
        add("head", ("lm_head", cfg.vocab_size, d))
    return table


def odd_rope(scaling: dict) -> list[str]:
    """What of a rope_scaling only transformers would act on, or nobody could."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KEYS:
        return [f"rope_scaling: type {kind!r} is not one of {', '.join(ROPE_KEYS)}"]
    odd = []
    for key, value in scaling.items():
        if key in ("type", "rope_type", "rope_theta") or value is None or (key, value) == ("truncate", True):
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
    """A folder to fill, which gets its name when all went well. UserError `used` when something is there, or E307."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(used, f"{path} exists and is not empty: give another name, or delete it")
    tmp = path.with_name(path.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        if path.exists():
            path.rmdir()
        tmp.rename(path)
        checkpoint.sync(path.parent)
    except BaseException as error:
        if not (isinstance(error, UserError) and error.code == "E402"):  # that one is kept, to be looked into
            shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError("E403", f"{path}: {error}") from error
        raise


def versions() -> dict:
    return {"torch": torch.__version__, "python": platform.python_version()}


# ---------------------------------------------------------------- to Hugging Face


def refusals(cfg: ModelConfig) -> list[str]:
    """Why this model has no Hugging Face architecture, key by key; empty when it has one."""
    why = []
    if cfg.norm_order != "pre":
        why.append(f"norm_order: {cfg.norm_order} (QK-norm over whole vectors, no norm before attention) has no class")
    if cfg.rope_first:
        why.append("rope_first: true (QK-norm after RoPE) has no class, Qwen3 norms before RoPE")
    if not cfg.qk_norm and cfg.d_model % cfg.n_heads:
        why.append(f"n_heads: {cfg.n_heads} does not divide d_model {cfg.d_model}, which Llama's class refuses")
    return [f"model.{reason}" for reason in why + odd_rope(cfg.rope_scaling or {})]


def hf_config(cfg: ModelConfig, dtype: str, ids: dict) -> dict:
    """config.json, with RoPE in the spelling of transformers 4 and in that of 5: each ignores the other's without a
    word and falls back to theta 10000. Keys with dangerous defaults (head_dim, the ids, windows) are always there."""
    scaling = {k: v for k, v in (cfg.rope_scaling or {}).items() if v is not None}
    scaling = {"rope_type": scaling.pop("rope_type", scaling.pop("type", "default")), **scaling}
    return {
        "architectures": ["Qwen3ForCausalLM" if cfg.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if cfg.qk_norm else "llama",
        "vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": cfg.max_seq_len,
        "hidden_size": cfg.d_model, "num_hidden_layers": cfg.n_layers, "intermediate_size": cfg.d_ff,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope_theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
        "rms_norm_eps": cfg.norm_eps, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False, "sliding_window": None, "attention_dropout": 0.0,
        "initializer_range": cfg.init_std, "use_cache": True, "torch_dtype": dtype, **ids,
    }  # fmt: skip


def to_hf(run, folder, dtype: str | None = None, best=False, check=False, say=print, shard_bytes=5 * 10**9) -> dict:
    """Write the run's newest (or best) step as a Hugging Face folder; returns what EXPORT.json says.

    dtype: default float32, for an imported step 0 the one it came in. UserError E400 with every reason when the model
    has no Hugging Face architecture, E402 when `check` finds a difference (the folder then keeps the suffix .tmp).
    """
    source = checkpoint.find(run, best, say)
    keys, imported = source.state["config"]["model"], source.state.get("imported") or {}
    if unknown := sorted(set(keys) - {f.name for f in dataclasses.fields(ModelConfig)}):
        raise UserError("E400", f"{source.path}: model.{', model.'.join(unknown)}: not known to this version")
    cfg, dtype = ModelConfig(**keys), dtype or imported.get("dtype", "float32")
    why = refusals(cfg) + ([] if dtype in DTYPES else [f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}"])
    if why:
        raise UserError("E400", f"{source.path}: {'; '.join(why)}")
    table = layout(cfg)
    names = {f"model.{ours}" for ours, *_ in table}
    if wrong := sorted(names ^ {n for n in source.tensors if n.startswith("model.")}):
        raise UserError("E305", f"{source.path}: not both in its weights and its config: {', '.join(wrong[:8])}")
    transformers = import_transformers() if check else None

    tokenizer_file = source.path.parent / "tokenizer.json"
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    ids = {key: imported.get(key) for key in TOKEN_IDS}
    if tokenizer and "eos_token_id" not in imported:
        # A pad id that can occur in a prompt makes generate() mask it there: a real pad token or none.
        ids = dict(zip(TOKEN_IDS, (tokenizer.eot_id, tokenizer.eot_id, tokenizer.pad_id)))
    config = hf_config(cfg, dtype, ids)
    report = {"architecture": config["architectures"][0], "dtype": dtype, "source": str(source.path)}
    report |= {"source_step": source.step, "versions": versions()}
    with new_folder(folder, "E117") as tmp:
        write_shards(source, table, DTYPES[dtype], tmp, shard_bytes)
        checkpoint.write_json(tmp / "config.json", config)
        checkpoint.write_json(tmp / "generation_config.json", ids)
        if tokenizer:
            shutil.copy(tokenizer_file, tmp / "tokenizer.json")
            checkpoint.write_json(tmp / "tokenizer_config.json", tokenizer_config(tokenizer, ids, cfg.max_seq_len))
        if check:
            report |= compare(transformers, source, cfg, dtype, tokenizer, tmp)
            report["versions"]["transformers"] = transformers.__version__
        checkpoint.write_json(tmp / "EXPORT.json", report)
        found = [report.get(key) for key in ("max_diff", "greedy_equal", "ids_equal")]
        text = "max_diff {}, greedy_equal {}, ids_equal {}".format(*found)
        if check and not (found[0] <= TOLERANCE and found[1] and found[2] is not False):  # a NaN is not <= either
            raise UserError("E402", f"{tmp / 'EXPORT.json'}: {text}")
    if not tokenizer:
        say(f"exported without a tokenizer: {why_not}")
    say(f"{report['architecture']}, step {source.step}, {dtype}{', ' + text if check else ''}: {folder}")
    return report


def write_shards(source: checkpoint.Checkpoint, table, dtype: torch.dtype, folder: Path, shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and their index; holds one shard in memory."""
    sizes = [dtype.itemsize * math.prod(shape) for *_, shape in table]
    shards, room = [], 0
    for row, size in zip(table, sizes):
        if size > room and (not shards or shards[-1]):
            shards, room = [*shards, []], shard_bytes
        shards[-1].append(row)
        room -= size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for ours, theirs, first, shape in shard:
            tensors[theirs] = source.read(f"model.{ours}", [first, 0][: len(shape)], shape).to(dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        checkpoint.sync(folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)


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
        raise UserError("E003", f"the check needs transformers: pip install transformers ({error})") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def compare(transformers, source: checkpoint.Checkpoint, cfg, dtype: str, tokenizer, folder: Path) -> dict:
    """Logits, 32 greedy tokens and token ids under transformers against ours, in fp32 on the CPU.

    Ours are the checkpoint's weights rounded to `dtype`, so what rounding costs is not part of the difference.
    """
    ours = Transformer(cfg).eval()
    ours.load_state_dict({name: t.to(DTYPES[dtype]).float() for name, t in source.model_state().items()})
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        other = transformers.AutoTokenizer.from_pretrained(folder) if tokenizer else None
    except Exception as error:  # whatever it raises, the folder does not do what it promises
        raise UserError("E402", f"transformers {transformers.__version__} cannot load {folder}: {error}") from error
    n = tokenizer.n_vocab if tokenizer else cfg.vocab_size
    idx = torch.randint(n, (2, min(64, cfg.max_seq_len)), generator=torch.Generator().manual_seed(0))
    diff = (ours(idx) - theirs(idx).logits).abs().max().item()
    # Their cached decoding against our full forward: each token they choose has our largest logit, or ties with it.
    theirs.generation_config.eos_token_id = None  # go on for 32 tokens
    out = theirs.generate(idx[:1, :8], max_new_tokens=32, do_sample=False)
    logits, new = ours(out)[0, -33:-1], out[0, -32:]
    gap = (logits.max(-1).values - logits[torch.arange(32), new]).max().item()
    equal = other and all(tokenizer.encode(t).tolist() == other(t, add_special_tokens=False).input_ids for t in TEXTS)
    return {"max_diff": diff, "greedy_equal": gap <= 2 * TOLERANCE, "ids_equal": equal}


# ---------------------------------------------------------------- from Hugging Face

# Keys of config.json that we read or that do not change the function; any other must be off (false, null, 0, empty).
HARMLESS = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "pretraining_tp", "attention_dropout", "max_window_layers", "is_llama_config", "return_dict", "id2label",
    "label2id", *TOKEN_IDS,
}  # fmt: skip
MUST = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
MUST |= {"partial_rotary_factor": 1.0}


def model_config(config: dict, where) -> ModelConfig:
    """Our configuration of a Llama's or Qwen3's config.json. UserError E401 naming every key that we cannot follow.

    Defaults are those of transformers' two classes; of two spellings of RoPE the one that transformers 5 prefers.
    """
    kind = config.get("model_type")
    why = [] if kind in ("llama", "qwen3") else [f"model_type: {kind!r} is not llama or qwen3"]
    for key, value in config.items():
        if key == "layer_types":
            off = all(v == "full_attention" for v in value or [])
        elif key in MUST:
            off = value in (None, MUST[key])
        else:
            off = not value or key in HARMLESS or key.startswith(("_", "transformers"))
            off = off or (key == "sliding_window" and kind == "qwen3")  # there use_sliding_window decides
        why += [] if off else [f"{key}: {value!r} cannot be imported"]
    places = [config, *(config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))]
    if not all(isinstance(place, dict) for place in places):
        raise UserError("E401", f"{where}: rope_scaling and rope_parameters must be objects, not {places[1:]}")
    thetas = {float(place["rope_theta"]) for place in places if place.get("rope_theta") is not None}
    rope = dict(places[1] or places[2])
    why += [f"rope_theta: {sorted(thetas)} contradict one another"] if len(thetas) > 1 else []
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        why.append("rope_parameters.partial_rotary_factor: only 1.0 can be imported")
    if why := why + odd_rope(rope):
        raise UserError("E401", f"{where}: {'; '.join(why)}")
    rope = {k: v for k, v in rope.items() if v is not None and k not in ("rope_theta", "truncate")}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return ModelConfig(
        vocab_size=config["vocab_size"], d_model=config["hidden_size"], n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"], n_kv_heads=config.get("num_key_value_heads") or 0,
        head_dim=config.get("head_dim", 128 if kind == "qwen3" else 0) or 0, d_ff=config["intermediate_size"],
        max_seq_len=config.get("max_position_embeddings", 32768 if kind == "qwen3" else 2048),
        rope_theta=max(thetas, default=10000.0), rope_scaling=None if plain else rope, qk_norm=kind == "qwen3",
        norm_eps=config.get("rms_norm_eps", 1e-6), init_std=config.get("initializer_range", 0.02),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("E401", f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError("E401", f"{path}: holds no JSON object")
    return data


def read_hf(folder) -> tuple[ModelConfig, dict[str, torch.Tensor], str, Path | None]:
    """A Llama's or Qwen3's (configuration, fp32 state dict, dtype of the files, path of tokenizer.json or None).

    UserError E401 when a key of the configuration or a tensor is too many, missing, or of another shape.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        cfg = model_config(config, folder / "config.json")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error}") from error
    except KeyError as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error.args[0]}: missing") from error
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("E401", f"{index}: holds no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    elif not files[0].exists():
        raise UserError(
            "E401", f"{folder}: no model.safetensors and no index of shards; pickled .bin files are not read"
        )
    table, where, parts, dtypes = layout(cfg), {}, {}, set()
    try:
        for file in files:
            where |= dict.fromkeys((handle := safe_open(file, "pt")).keys(), handle)
        wanted = {theirs for _, theirs, *_ in table}
        extra = {n for n in where if n not in wanted and not n.endswith("rotary_emb.inv_freq")}  # a table of old files
        if cfg.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(where):
            head, embed = (where[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
            extra -= {"lm_head.weight"} if torch.equal(head, embed) else set()  # some files hold a tied head twice
        why = [f"{n}: has no place in this {config['model_type']}" for n in sorted(extra)]
        why += [f"{n}: missing" for n in sorted(wanted - set(where))]
        for ours, theirs, _, shape in table if not why else []:
            tensor = where[theirs].get_tensor(theirs)
            if list(tensor.shape) != shape or tensor.dtype not in DTYPES.values():
                why.append(f"{theirs}: {tensor.dtype} {list(tensor.shape)}, expected {shape} of {', '.join(DTYPES)}")
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            parts.setdefault(ours, []).append(tensor.float())
    except (OSError, SafetensorError) as error:
        raise UserError("E401", f"{folder}: {error}") from error
    if why:
        raise UserError("E401", f"{folder}: {'; '.join(why[:8])}{f'; {len(why) - 8} more' if len(why) > 8 else ''}")
    state = {ours: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for ours, tensors in parts.items()}
    tokenizer_file = folder / "tokenizer.json"
    return cfg, state, one_dtype(dtypes), tokenizer_file if tokenizer_file.exists() else None


def one_dtype(names: set[str]) -> str:
    """A mixed file is fp32 to us, which holds both others exactly."""
    return next(iter(names)) if len(names) == 1 else "float32"


def from_hf(folder, out_dir, say=print) -> None:
    """Make a run out of a Hugging Face folder: step 0, without an optimizer."""
    cfg, state, dtype, tokenizer_file = read_hf(folder)
    config = read_json(Path(folder) / "config.json")
    imported = {"from": str(Path(folder).resolve()), "dtype": dtype, **{key: config.get(key) for key in TOKEN_IDS}}
    write_run(out_dir, cfg, state, imported, tokenizer_file, say)


def write_run(out_dir, cfg: ModelConfig, state: dict, imported: dict, tokenizer_file: Path | None, say) -> None:
    """out_dir with step_00000000, config.yaml and, where we can read it, the tokenizer. UserError E300 when used."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(cfg).state_dict().items()}
    if wrong := [n for n in sorted({*shapes, *state}) if n not in state or state[n].shape != shapes.get(n)]:
        raise UserError("E401", f"{imported['from']}: do not fit the configuration: {', '.join(wrong[:8])}")
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
    say(f"{sum(t.numel() for t in state.values()):,} parameters, {imported['dtype']} made fp32: {out_dir}")


# ---------------------------------------------------------------- from Lunaris Codex


class LunarisConfig:
    """Stands in for the dataclass that some of their files pickle: it takes attributes and runs nothing."""


def read_lunaris(file, say=print, **given) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """(configuration, fp32 state dict, dtype) of a dense Lunaris Codex .pt.

    given: n_heads, max_seq_len, rope_theta, rope_ntk_scale_base, dropout, where the file does not say them.
    """
    theirs = [(LunarisConfig, f"{module}.LunarisCodexConfig") for module in ("model", "model_moe", "__main__")]
    try:
        with torch.serialization.safe_globals(theirs):
            data = torch.load(file, map_location="cpu", weights_only=True)
        weights, said = data["model"], data.get("config") or {}
        weights = {n.replace("_orig_mod.", "").replace("module.", ""): t for n, t in weights.items()}
        said = said.get("model", said)
        said = dict(said if isinstance(said, dict) else vars(said))
        for key, value in given.items():
            if value is not None and said.setdefault(key, value) != value:
                raise UserError("E401", f"{file}: --{key} {value}: the file says {said[key]}")
        return convert_lunaris(weights, said, file, say)
    except UserError:
        raise
    except Exception as error:  # damaged bytes make torch.load raise anything, and a .pt can hold anything
        first = str(error).strip().split("\n")[0][:300]
        raise UserError("E401", f"{file}: no Lunaris checkpoint: {type(error).__name__}: {first}") from error


def convert_lunaris(weights: dict, said: dict, file, say) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """Three layouts: the MoE branch without experts (fused wqkv and w13, QK-norm over whole vectors, no norm before
    attention); main (one norm per head, after RoPE); main before it had QK-norm, which is a Llama."""
    if moe := [n for n in weights if ".experts." in n or ".feed_forward.gate." in n]:
        raise UserError("E401", f"{file}: {moe[0]}: a MoE model; sparse import comes with the sparse layers")
    dtypes = set()

    def take(name):
        if name not in weights:
            raise UserError("E401", f"{file}: {name}: missing")
        dtypes.add(str(weights[name].dtype).removeprefix("torch."))
        return weights.pop(name).float()

    def unpair(w):
        """Their RoPE turns pairs (0, 1), (2, 3), ..., ours (0, D/2), (1, D/2 + 1), ...: rows to 0, 2, ..., 1, 3, ..."""
        return w.reshape(-1, head_dim // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)

    embed = take("transformer.wte.weight")
    head = take("lm_head.weight") if "lm_head.weight" in weights else embed
    d, n_layers = embed.shape[1], sum(name.endswith(".ffn_norm.weight") for name in weights)
    fused = "transformer.h.0.attention.wqkv.weight" in weights
    qk_norm = "transformer.h.0.attention.q_norm.weight" in weights
    if qk_norm and not fused:  # the norm says the width of a head
        said.setdefault("n_heads", d // len(weights["transformer.h.0.attention.q_norm.weight"]))
    if lacking := [key for key in ("n_heads", "max_seq_len") if not said.get(key)]:
        raise UserError("E401", f"{file}: does not say {', '.join(lacking)}: give --{' N --'.join(lacking)} N")
    n_heads, T, theta = int(said["n_heads"]), int(said["max_seq_len"]), float(said.get("rope_theta", 10000.0))
    if d % (2 * n_heads):
        raise UserError("E401", f"{file}: n_heads: {n_heads} heads of even width do not fit into d_model {d}")
    head_dim, state = d // n_heads, {"embed.weight": embed}
    for i in range(n_layers):
        h, b = f"transformer.h.{i}.", f"blocks.{i}."
        if fused:
            wqkv, w13 = take(h + "attention.wqkv.weight"), take(h + "feed_forward.w13.weight")
            kv = (len(wqkv) - d) // 2
            q, k, v = wqkv.split([d, kv, kv])
        else:
            q, k, v = (take(h + f"attention.{x}_proj.weight") for x in "qkv")
            w13 = torch.cat([take(h + f"feed_forward.{w}.weight") for w in ("w1", "w3")])
            state[b + "attn_norm.weight"] = take(h + "attention_norm.weight")
        state[b + "attn.wqkv.weight"] = torch.cat([unpair(q), unpair(k), v])
        for x in "qk" if qk_norm else "":
            state[b + f"attn.{x}_norm.weight"] = unpair(take(h + f"attention.{x}_norm.weight"))
        state[b + "attn.wo.weight"] = take(h + "attention.o_proj.weight")
        state[b + "ffn_norm.weight"] = take(h + "ffn_norm.weight")
        state[b + "ffn.w13.weight"], state[b + "ffn.w2.weight"] = w13, take(h + "feed_forward.w2.weight")
    state["norm.weight"] = take("transformer.ln_f.weight")
    if not (tied := torch.equal(embed, head)):
        state["head.weight"] = head
    if weights:
        raise UserError("E401", f"{file}: no place for {', '.join(sorted(weights)[:8])}")
    if not fused:  # main stretches theta by the ratio of contexts; before it had QK-norm it did not
        theta *= max(1.0, T / max(1, int(said.get("rope_ntk_scale_base", 2048 if qk_norm else T))))
    elif "capacity_factor" in said or "n_layers" not in said:
        say(
            f"note: {file} may come from the newer code of Lunaris' MoE branch, which trained with a destroyed RoPE "
            "(cast to real numbers: cosines only). Lumen computes RoPE right, so its logits differ from those there"
        )
    dropout = said.get("dropout", 0.0) if said.get("resid_dropout") is None else said["resid_dropout"]
    if said.get("attn_dropout"):
        say(f"note: attn_dropout {said['attn_dropout']} is left out: Lumen has no dropout on attention weights")
    cfg = ModelConfig(
        vocab_size=len(embed), d_model=d, n_layers=n_layers, n_heads=n_heads, n_kv_heads=len(k) // head_dim,
        d_ff=state["blocks.0.ffn.w2.weight"].shape[1], max_seq_len=T, rope_theta=theta, norm_eps=1e-5,
        dropout=dropout, tie_embeddings=tied, qk_norm=qk_norm,
        rope_first=qk_norm and not fused, norm_order="lunaris" if fused else "pre",
    )  # fmt: skip
    return cfg, state, one_dtype(dtypes)


def from_lunaris(file, out_dir, say=print, **given) -> None:
    """Make a run out of a Lunaris Codex .pt: step 0, without an optimizer or (it has none) a tokenizer."""
    cfg, state, dtype = read_lunaris(file, say, **given)
    write_run(out_dir, cfg, state, {"from": str(Path(file).resolve()), "dtype": dtype}, None, say)


# ---------------------------------------------------------------- command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("to_hf", help="a run to a Hugging Face folder")
    p.add_argument("run", help="out/run, or one of its step folders")
    p.add_argument("folder")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32; for an imported run the dtype it came in")
    p.add_argument("--best", action="store_true", help="the best step instead of the newest")
    p.add_argument("--check", action="store_true", help="compare logits, greedy tokens and token ids with transformers")
    p = commands.add_parser("from_hf", help="a Llama or Qwen3 folder to a run")
    p.add_argument("folder")
    p.add_argument("out_dir")
    p = commands.add_parser("from_lunaris", help="a dense Lunaris Codex .pt to a run")
    p.add_argument("file")
    p.add_argument("out_dir")
    for key in ("n_heads", "max_seq_len", "rope_ntk_scale_base", "rope_theta", "dropout"):
        p.add_argument(f"--{key}", type=float if key in ("rope_theta", "dropout") else int)
    args = vars(parser.parse_args(argv))
    {"to_hf": to_hf, "from_hf": from_hf, "from_lunaris": from_lunaris}[args.pop("command")](**args)


if __name__ == "__main__":
    command(main)
