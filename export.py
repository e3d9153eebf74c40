"""To and from Hugging Face folders, with a check; import of Lunaris Codex checkpoints.

    python export.py to_hf out/run DIR [--dtype float32|bfloat16|float16] [--best] [--check]
    python export.py from_hf DIR out/run
    python export.py from_lunaris FILE.pt out/run [--n_heads N --max_seq_len T ...: only what the file does not say]

A model without QK-norm IS a Llama, one with QK-norm IS a Qwen3: our fused matrices are theirs on top of one another,
so both directions only slice and rename, and every bit survives. Nothing is unpickled except a Lunaris .pt, and that
with weights_only=True. Every folder is written under another name and then renamed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
TOLERANCE = 1e-4  # largest difference of fp32 logits that --check accepts
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_KEYS = {  # what rope_tables() in model.py reads of rope_scaling; transformers would act on any other key
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
}


def layout(cfg: ModelConfig) -> list[tuple[str, str, int, list[int]]]:
    """(our tensor, Hugging Face's tensor, its first row in ours, its shape), for every one of theirs."""
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
    """What of a rope_scaling only one side would act on, or no side could."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KEYS:
        return [f"rope_type: {kind!r} is not one of {', '.join(ROPE_KEYS)}"]
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


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("E401", f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError("E401", f"{path}: holds no JSON object")
    return data


def free_place(path, code: str) -> tuple[Path, Path]:
    """(the folder to make, the name it has until it is whole). UserError when something is there already."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(code, f"{path} exists and is not empty; give a new name or delete it")
    tmp = path.with_name(path.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    return path, tmp


# ---------------------------------------------------------------- to Hugging Face


def refusals(cfg: ModelConfig) -> list[str]:
    """Why this model has no Hugging Face architecture, key by key; empty when it has one."""
    why = []
    if cfg.norm_order != "pre":
        why.append(
            f"model.norm_order: {cfg.norm_order} (QK-norm over whole vectors, no norm before attention) has no class"
        )
    if cfg.rope_first:
        why.append("model.rope_first: true (QK-norm after RoPE) has no class: Qwen3 norms before RoPE")
    if not cfg.qk_norm and cfg.d_model % cfg.n_heads:
        why.append(f"model.n_heads: {cfg.n_heads} does not divide d_model {cfg.d_model}, which Llama's class refuses")
    return why + [f"model.{odd}" for odd in odd_rope(cfg.rope_scaling or {})]


def hf_config(cfg: ModelConfig, dtype: str, ids: dict) -> dict:
    """config.json. RoPE and the dtype stand in the spelling of transformers 4 and in that of 5: each ignores the
    other's without a word, and RoPE then falls back to theta 10000."""
    scaling = {k: v for k, v in (cfg.rope_scaling or {}).items() if v is not None and k != "type"}
    scaling["rope_type"] = (cfg.rope_scaling or {}).get("rope_type", (cfg.rope_scaling or {}).get("type", "default"))
    return {
        "architectures": ["Qwen3ForCausalLM" if cfg.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if cfg.qk_norm else "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": cfg.init_std,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }


def to_hf(run, folder, dtype: str | None = None, best=False, check=False, say=print, shard_bytes=5 * 10**9) -> dict:
    """Write the run's newest (or best) step as a Hugging Face folder; returns what EXPORT.json says.

    dtype: default float32, for an imported run the one it came in. UserError E400 with every reason when the model has
    no Hugging Face architecture, E402 when `check` finds a difference (the folder then keeps the suffix .tmp).
    """
    source = checkpoint.find(run, best, say)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    model_keys = source.state["config"]["model"]
    if unknown := sorted(set(model_keys) - known):
        raise UserError(
            "E400", f"{source.path}: " + "; ".join(f"model.{k}: not known to this version" for k in unknown)
        )
    cfg = ModelConfig(**model_keys)
    if why := refusals(cfg):
        raise UserError("E400", f"{source.path}: " + "; ".join(why))
    imported = source.state.get("imported") or {}
    dtype = dtype or imported.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UserError("E400", f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    table = layout(cfg)
    names = {f"model.{ours}" for ours, *_ in table}
    if wrong := sorted(names ^ {n for n in source.tensors if n.startswith("model.")}):
        raise UserError(
            "E305", f"{source.path}: {', '.join(wrong[:5])} stand in the weights or the config, not in both"
        )
    if check:
        import_transformers()
    final, tmp = free_place(folder, "E117")

    step_run = source.path.parent
    tokenizer, why_not = load_tokenizer(step_run / "tokenizer.json", cfg.vocab_size)
    ids = dict.fromkeys(TOKEN_IDS)
    if "eos_token_id" in imported:
        ids = {key: imported.get(key) for key in TOKEN_IDS}
    elif tokenizer:
        # A pad id that occurs in a prompt makes generate() mask it: only a real pad token, else none.
        ids |= {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
        ids["pad_token_id"] = tokenizer.pad_id
    config = hf_config(cfg, dtype, ids)
    report = {
        "architecture": config["architectures"][0],
        "dtype": dtype,
        "source": str(source.path),
        "source_step": source.step,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    try:
        tmp.mkdir(parents=True)
        write_shards(source, table, DTYPES[dtype], tmp, shard_bytes)
        checkpoint.write_json(tmp / "config.json", config)
        checkpoint.write_json(tmp / "generation_config.json", {"do_sample": True, **ids})
        if tokenizer:
            write_tokenizer(tokenizer, step_run / "tokenizer.json", tmp, ids, cfg.max_seq_len)
        else:
            say(f"exported without a tokenizer: {why_not}")
        if check:
            report |= compare(source, cfg, dtype, tokenizer, tmp)
        checkpoint.write_json(tmp / "EXPORT.json", report)
        if check and not report["ok"]:
            raise UserError("E402", f"{tmp / 'EXPORT.json'}: {json.dumps(report, sort_keys=True)}")
        if final.exists():
            final.rmdir()  # free_place saw that it is empty
        tmp.rename(final)
        checkpoint.sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError("E307", f"{final}: {error}") from error
    say(f"{report['architecture']}, step {source.step}, {dtype}: {final}")
    return report


def write_shards(source: checkpoint.Checkpoint, table, dtype: torch.dtype, folder: Path, shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and their index. Reads tensor by tensor: memory is one shard's."""
    shards, total = [[]], 0
    for entry in table:
        size = dtype.itemsize * int(np.prod(entry[3]))
        if shards[-1] and sum(s for _, s in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append((entry, size))
        total += size
    weight_map = {}
    for i, shard in enumerate(shards):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for (ours, theirs, first, shape), _ in shard:
            piece = source.read(f"model.{ours}", [first] + [0] * (len(shape) - 1), shape)
            tensors[theirs], weight_map[theirs] = piece.to(dtype), file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        checkpoint.sync(folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(tokenizer: Tokenizer, file: Path, folder: Path, ids: dict, max_seq_len: int) -> None:
    shutil.copy(file, folder / "tokenizer.json")
    text = {i: name for name, i in tokenizer.specials.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
    config |= {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    for key, value in ids.items():
        one = value[0] if isinstance(value, list) else value  # Llama 3 has several ends; this file names one
        if one in text:
            config[key.removesuffix("_id")] = text[one]
    checkpoint.write_json(folder / "tokenizer_config.json", config)


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
        raise UserError(
            "E003", f"--check compares with transformers, not here: pip install transformers ({error})"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def compare(source: checkpoint.Checkpoint, cfg: ModelConfig, dtype: str, tokenizer, folder: Path) -> dict:
    """Logits, 32 greedy tokens and token ids of the folder under transformers against ours; in fp32, on the CPU.

    Ours are the checkpoint's weights rounded to `dtype`, so what rounding costs is not part of the difference.
    """
    transformers = import_transformers()
    ours = Transformer(cfg).eval()
    ours.load_state_dict({k: v.to(DTYPES[dtype]).float() for k, v in source.model_state().items()})
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    theirs.eval()
    n = tokenizer.n_vocab if tokenizer else cfg.vocab_size
    ids = torch.randint(n, (2, min(64, cfg.max_seq_len)), generator=torch.Generator().manual_seed(0))
    diff = (ours(ids) - theirs(ids).logits).abs().max().item()
    # Their cached decoding against our full forward: each of their tokens must be our largest logit (or tie with it).
    prompt = ids[:1, :8]
    theirs.generation_config.eos_token_id = None  # go on for 32 tokens
    out = theirs.generate(prompt, max_new_tokens=32, do_sample=False)
    new = out[0, prompt.shape[1] :]
    logits = ours(out)[0, prompt.shape[1] - 1 : -1]
    gap = (logits.max(-1).values - logits.gather(1, new[:, None])[:, 0]).max().item()
    report = {
        "max_diff": diff,
        "greedy_equal": len(new) == 32 and gap <= 2 * TOLERANCE,
        "ids_equal": None,
        "keys_missing": sorted(info["missing_keys"]),
        "keys_unexpected": sorted(info["unexpected_keys"]),
    }
    if tokenizer:
        other = transformers.AutoTokenizer.from_pretrained(folder)
        pairs = [(tokenizer.encode(t).tolist(), other(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
        report["ids_equal"] = all(a == b for a, b in pairs)
    report["ok"] = bool(
        diff <= TOLERANCE  # false for NaN too
        and report["greedy_equal"]
        and report["ids_equal"] is not False
        and not report["keys_missing"] + report["keys_unexpected"]
    )
    report["versions"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
    }
    return report


# ---------------------------------------------------------------- from Hugging Face

# Keys of config.json that do not change the function, or that model_config() reads itself; others must be off.
HARMLESS = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "pretraining_tp", "attention_dropout", "max_window_layers", "is_llama_config", "bos_token_id", "eos_token_id",
    "pad_token_id", "return_dict", "id2label", "label2id", "chunk_size_feed_forward", "problem_type",
}  # fmt: skip


def model_config(config: dict, where) -> ModelConfig:
    """Our configuration of a Llama's or Qwen3's config.json. UserError E401 naming every key that we cannot follow."""
    kind = config.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise UserError("E401", f"{where}: model_type: {kind!r} is not llama or qwen3")
    must = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    must |= {"partial_rotary_factor": 1.0}
    why = [f"{k}: missing" for k in ("hidden_size", "num_attention_heads", "intermediate_size") if k not in config]
    why += [f"{k}: missing" for k in ("num_hidden_layers", "vocab_size") if k not in config]
    for key, value in config.items():
        if key == "layer_types":
            on = any(v != "full_attention" for v in value or [])
        elif key in must:
            on = value is not None and value != must[key]
        elif key == "sliding_window" and kind == "qwen3":
            on = False  # use_sliding_window decides
        else:
            on = value and key not in HARMLESS and not key.startswith(("_", "transformers"))
        if on:
            why.append(f"{key}: {value!r} cannot be imported")
    places = [config.get(k) or {} for k in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(p, dict) for p in places):
        why, places = why + [f"rope_scaling, rope_parameters: {places} are not objects"], [{}, {}]
    rope = dict(places[0] or places[1])  # transformers 5 takes the old spelling first
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        why.append("rope_parameters.partial_rotary_factor: only 1.0 can be imported")
    thetas = {p["rope_theta"] for p in (config, *places) if isinstance(p.get("rope_theta"), (int, float))}
    if len(thetas) > 1:
        why.append(f"rope_theta: {sorted(thetas)} contradict one another")
    why += odd_rope(rope)
    if why:
        raise UserError("E401", f"{where}: " + "; ".join(why))
    scaling = {k: v for k, v in rope.items() if v is not None and k not in ("rope_theta", "truncate")}
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    head_dim = config.get("head_dim", 128 if kind == "qwen3" else 0)  # defaults are those of transformers' classes
    try:
        return ModelConfig(
            vocab_size=config["vocab_size"],
            d_model=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads") or 0,
            head_dim=head_dim or 0,
            d_ff=config["intermediate_size"],
            max_seq_len=config.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
            rope_theta=float(*thetas or [10000.0]),
            rope_scaling=None if plain else scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qk_norm=kind == "qwen3",
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except (ValueError, TypeError) as error:
        raise UserError("E401", f"{where}: {error}") from error


def read_hf(folder) -> tuple[ModelConfig, dict[str, torch.Tensor], str, Path | None]:
    """A Llama's or Qwen3's (configuration, fp32 state dict, dtype of the files, path of tokenizer.json or None).

    UserError E401 when a key of the configuration or a tensor is too many, missing or of another shape.
    """
    folder = Path(folder)
    cfg = model_config(read_json(folder / "config.json"), folder / "config.json")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("E401", f"{index}: holds no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    elif single.exists():
        files = [single]
    else:
        raise UserError("E401", f"{folder}: no model.safetensors and no index (pickled .bin files are not read)")
    table, where, parts, dtypes = layout(cfg), {}, {}, set()
    try:
        for file in files:
            where |= dict.fromkeys((handle := safe_open(file, "pt")).keys(), handle)
        extra = set(where) - {theirs for _, theirs, *_ in table}
        extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}  # a table old files carry along
        if "lm_head.weight" in extra and cfg.tie_embeddings and "model.embed_tokens.weight" in where:
            a, b = (where[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
            extra -= {"lm_head.weight"} if torch.equal(a, b) else set()  # some files hold the tied head twice
        missing = {theirs for _, theirs, *_ in table} - set(where)
        if extra or missing:
            what = [f"{n}: has no place in a {'Qwen3' if cfg.qk_norm else 'Llama'}" for n in sorted(extra)]
            what += [f"{n}: missing" for n in sorted(missing)]
            raise UserError("E401", f"{folder}: {'; '.join(what[:8])}{' ...' if len(what) > 8 else ''}")
        for ours, theirs, _, shape in table:
            tensor = where[theirs].get_tensor(theirs)
            if list(tensor.shape) != shape or tensor.dtype not in DTYPES.values():
                raise UserError("E401", f"{folder}: {theirs}: {tensor.dtype} {list(tensor.shape)}, expected {shape}")
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            parts.setdefault(ours, []).append(tensor.float())
    except (OSError, SafetensorError) as error:
        raise UserError("E401", f"{folder}: {error}") from error
    state = {ours: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for ours, tensors in parts.items()}
    tokenizer = folder / "tokenizer.json"
    return cfg, state, dtypes.pop() if len(dtypes) == 1 else "float32", tokenizer if tokenizer.exists() else None


def from_hf(folder, out_dir, say=print) -> None:
    """Make a run out of a Hugging Face folder: step 0, without an optimizer."""
    cfg, state, dtype, tokenizer = read_hf(folder)
    config = read_json(Path(folder) / "config.json")
    imported = {"from": str(Path(folder).resolve()), "dtype": dtype, **{k: config.get(k) for k in TOKEN_IDS}}
    write_run(out_dir, cfg, state, imported, tokenizer, say)


def write_run(out_dir, cfg: ModelConfig, state: dict, imported: dict, tokenizer_file: Path | None, say) -> None:
    """out_dir with step_00000000, config.yaml and, when we can read it, the tokenizer. UserError E300 on a used one."""
    final, tmp = free_place(out_dir, "E300")
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Transformer(cfg).state_dict().items()}
    wrong = [n for n in sorted({*expected, *state}) if n not in state or state[n].shape != expected.get(n)]
    if wrong:
        raise UserError("E401", f"{imported['from']}: these do not fit the configuration: {', '.join(wrong[:8])}")
    tokenizer, why_not = load_tokenizer(tokenizer_file, cfg.vocab_size)
    model = dataclasses.asdict(cfg)
    about = {"step": 0, "cursor": 0, "tokens": 0, "segments": [], "clean": True, "imported": imported}
    about |= {"config": {"model": model}}
    about |= {"versions": {"torch": torch.__version__, "python": platform.python_version()}}
    step = checkpoint.step_dir(tmp, 0)
    pieces = {f"model.{name}": [(list(t.shape), [0] * t.dim(), t.float())] for name, t in state.items()}
    try:
        if trouble := checkpoint.write(Path(f"{step}.tmp"), 0, pieces):
            raise OSError(trouble)
        checkpoint.commit(Path(f"{step}.tmp"), step, 1, about)
        text = f"# imported from {imported['from']}\n" + yaml.safe_dump({"model": model}, sort_keys=False)
        (tmp / "config.yaml").write_text(text, encoding="utf-8")
        if tokenizer:
            shutil.copy(tokenizer_file, tmp / "tokenizer.json")
            np.save(tmp / "token_bytes.npy", tokenizer.token_bytes())
        if final.exists():
            final.rmdir()  # free_place saw that it is empty
        tmp.rename(final)
        checkpoint.sync(final.parent)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError("E307", f"{final}: {error}") from error
    if not tokenizer:
        say(f"imported without a tokenizer: {why_not}")
    total = sum(t.numel() for t in state.values())
    say(f"{total:,} parameters, {imported['dtype']} made fp32: {final}")


# ---------------------------------------------------------------- from Lunaris Codex


class LunarisConfig:
    """Stands in for their dataclass, which some of their files pickle: it takes attributes and runs nothing."""


def unpair(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """From RoPE's pairs (0, 1), (2, 3), ... to (0, D/2), (1, D/2 + 1), ...: a head's rows to 0, 2, ..., 1, 3, ..."""
    return weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_lunaris(file, say=print, **given) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """(configuration, fp32 state dict, dtype) of a dense Lunaris Codex .pt.

    given: n_heads, max_seq_len, rope_theta, rope_ntk_scale_base, dropout, where the file does not say them.
    """
    theirs = [(LunarisConfig, f"{module}.LunarisCodexConfig") for module in ("model", "model_moe", "__main__")]
    try:
        with torch.serialization.safe_globals(theirs):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch.load raise anything
        first = str(error).strip().split("\n")[0][:300]
        raise UserError("E401", f"{file}: {type(error).__name__}: {first}") from error
    weights = data.get("model") if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError("E401", f"{file}: no `model` with tensors in it; Lunaris writes model, optimizer, config, ...")
    weights = {n.replace("_orig_mod.", "").replace("module.", ""): t for n, t in weights.items()}
    if moe := [n for n in weights if ".experts." in n or ".feed_forward.gate." in n]:
        raise UserError("E401", f"{file}: {moe[0]}: a MoE model; sparse import comes with the sparse layers")

    def take(name):
        if name not in weights:
            raise UserError("E401", f"{file}: {name}: missing")
        dtypes.add(str(weights[name].dtype).removeprefix("torch."))
        return weights.pop(name).float()

    said = data.get("config") or {}
    said = said.get("model", said) if isinstance(said, dict) else said
    said = dict(said) if isinstance(said, dict) else vars(said)
    for key, value in given.items():
        if value is not None and said.setdefault(key, value) != value:
            raise UserError("E401", f"{file}: --{key} {value}: the file says {said[key]}")
    h, dtypes = "transformer.h.{}.".format, set()
    embed = take("transformer.wte.weight")
    head = take("lm_head.weight") if "lm_head.weight" in weights else embed
    n_layers = sum(n.endswith(".ffn_norm.weight") for n in weights)
    fused, qk_norm = h(0) + "attention.wqkv.weight" in weights, h(0) + "attention.q_norm.weight" in weights
    if qk_norm and not fused:  # their main branch: one norm per head, so the file itself says the head's width
        said.setdefault("n_heads", embed.shape[1] // len(weights[h(0) + "attention.q_norm.weight"]))
    if lacking := [k for k in ("n_heads", "max_seq_len") if not said.get(k)]:
        raise UserError("E401", f"{file}: does not say {', '.join(lacking)}; give --{' N --'.join(lacking)} N")
    n_heads, T, d = int(said["n_heads"]), int(said["max_seq_len"]), embed.shape[1]
    if d % (2 * n_heads):
        raise UserError("E401", f"{file}: n_heads: {n_heads} heads of even width do not fit d_model {d}")
    head_dim, state = d // n_heads, {"embed.weight": embed}
    for i in range(n_layers):
        a, f, b = h(i) + "attention.", h(i) + "feed_forward.", f"blocks.{i}."
        if fused:
            wqkv = take(a + "wqkv.weight")
            kv = (len(wqkv) - d) // 2
            q, k, v = wqkv.split([d, kv, len(wqkv) - d - kv])
        else:
            q, k, v = (take(a + f"{x}_proj.weight") for x in "qkv")
        if len(k) % head_dim or len(k) != len(v) or len(q) != d:
            raise UserError("E401", f"{file}: {a}: {len(q)}, {len(k)}, {len(v)} rows do not fit heads of {head_dim}")
        state[b + "attn.wqkv.weight"] = torch.cat([unpair(q, head_dim), unpair(k, head_dim), v])
        state[b + "attn.wo.weight"] = take(a + "o_proj.weight")
        for x in "qk" if qk_norm else "":
            state[b + f"attn.{x}_norm.weight"] = unpair(take(a + f"{x}_norm.weight"), head_dim)
        if not fused:
            state[b + "attn_norm.weight"] = take(h(i) + "attention_norm.weight")
        state[b + "ffn_norm.weight"] = take(h(i) + "ffn_norm.weight")
        gate_up = [take(f + "w13.weight")] if fused else [take(f + "w1.weight"), take(f + "w3.weight")]
        state[b + "ffn.w13.weight"], state[b + "ffn.w2.weight"] = torch.cat(gate_up), take(f + "w2.weight")
    state["norm.weight"] = take("transformer.ln_f.weight")
    tied = torch.equal(embed, head)
    if not tied:
        state["head.weight"] = head
    if weights:
        raise UserError("E401", f"{file}: has no place for {', '.join(sorted(weights)[:8])}")
    theta = float(said.get("rope_theta", 10000.0))
    if not fused:  # main: NTK by the ratio of contexts; the code before QK-norm had none
        base = said.get("rope_ntk_scale_base", 2048 if qk_norm else T)
        theta *= max(1.0, T / max(1, int(base)))
    if fused and ("capacity_factor" in said or "n_layers" not in said):
        say(
            "note: the newer code of Lunaris' MoE branch trained with a destroyed RoPE (cast to real: cos only). "
            "Lumen computes RoPE right, so such a model gives other logits than there until it is trained on"
        )
    if said.get("attn_dropout"):
        say(f"note: attn_dropout {said['attn_dropout']} is not carried over: Lumen has no dropout on attention weights")
    cfg = ModelConfig(
        vocab_size=len(embed), d_model=d, n_layers=n_layers, n_heads=n_heads, n_kv_heads=len(k) // head_dim,
        d_ff=state["blocks.0.ffn.w2.weight"].shape[1], max_seq_len=T, rope_theta=theta, norm_eps=1e-5,
        dropout=float(said.get("resid_dropout") or said.get("dropout") or 0.0), tie_embeddings=tied,
        qk_norm=qk_norm, rope_first=qk_norm and not fused, norm_order="lunaris" if fused else "pre",
    )  # fmt: skip
    return cfg, state, dtypes.pop() if len(dtypes) == 1 else "float32"


def from_lunaris(file, out_dir, say=print, **given) -> None:
    """Make a run out of a Lunaris Codex .pt: step 0, without an optimizer and without a tokenizer (it has none)."""
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
    for key in ("n_heads", "max_seq_len", "rope_ntk_scale_base"):
        p.add_argument(f"--{key}", type=int)
    for key in ("rope_theta", "dropout"):
        p.add_argument(f"--{key}", type=float)
    args = vars(parser.parse_args(argv))
    {"to_hf": to_hf, "from_hf": from_hf, "from_lunaris": from_lunaris}[args.pop("command")](**args)


if __name__ == "__main__":
    command(main)
