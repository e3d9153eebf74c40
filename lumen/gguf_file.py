"""A run as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run:
`python export.py to_gguf out/run FILE`.

The file is written by the `gguf` package, under another name first. Matrices are of --type; norms,
router and its bias stay f32. One model in fp32 and one tensor more are in memory.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from lumen import gguf_check, gguf_vocabulary, models
from lumen.errors import UserError, a_path
from lumen.files import sync
from lumen.gguf_model import Plan, encoded, plan, stored_as, tensors
from model import ModelConfig, rope_kind

TYPES = ("f32", "f16", "bf16", "q8_0")
FILE_TYPES = dict(zip(TYPES, ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16", "MOSTLY_Q8_0")))


def options(parser) -> None:
    parser.add_argument("run", type=a_path, help="a run, a step of it, or a Hugging Face folder")
    parser.add_argument("file", type=a_path, help="FILE.gguf; it must not be there yet")
    parser.add_argument("--type", dest="dtype", choices=TYPES, default="f16", help="default: f16")
    parser.add_argument("--best", action="store_true", help="the best step instead of the newest")
    parser.add_argument("--step", type=int, help="the step of this number")
    parser.add_argument("--tokenizer", type=a_path, help="default: what lies with the model")
    parser.add_argument("--pre", help="llama.cpp's name of a pre-tokenizer, where ours has none")
    check = "read every tensor back; logits, tokens and text in what can run it here"
    parser.add_argument("--check", action="store_true", help=check)


def import_gguf():
    try:
        import gguf
    except ImportError as error:
        text = f"GGUF needs a package: pip install -r requirements-export.txt ({error})"
        raise UserError("E003", text) from error
    return gguf


# ---------------------------------------------------------------- keys


def add_keys(writer, gguf, plan: Plan, dtype: str, name: str) -> None:
    cfg = plan.cfg
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    mixtral = plan.arch == "llama" and plan.kept
    writer.add_feed_forward_length(cfg.d_expert if mixtral else cfg.d_ff)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(plan.n_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    add_scaling(writer, gguf, cfg)
    if plan.kept:
        writer.add_expert_count(plan.n_experts)
        writer.add_expert_used_count(cfg.n_experts_per_token)
        writer.add_expert_feed_forward_length(cfg.d_expert)
    if plan.arch == "dots1":
        sigmoid = cfg.router == "sigmoid"
        function = gguf.ExpertGatingFuncType["SIGMOID" if sigmoid else "SOFTMAX"]
        writer.add_expert_gating_func(function)
        writer.add_leading_dense_block_count(plan.n_dense)
        writer.add_expert_shared_count(max(cfg.n_shared_experts, 1))
        writer.add_expert_weights_scale(cfg.route_scale)
        writer.add_expert_weights_norm(bool(cfg.norm_topk))


def add_scaling(writer, gguf, cfg: ModelConfig) -> None:
    """Linear and YaRN by keys; Llama 3's are a tensor."""
    scaling = cfg.rope_scaling or {}
    kind = rope_kind(scaling)
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "linear":
        return
    original = scaling.get("original_max_position_embeddings") or cfg.max_seq_len
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32))
    writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1))
    if gain := scaling.get("attention_factor"):  # llama.cpp multiplies its own by this one
        own = 0.1 * math.log(max(scaling["factor"], 1.0)) + 1.0
        writer.add_rope_scaling_attn_factors(gain / own)


# ---------------------------------------------------------------- the file


@contextlib.contextmanager
def new_file(path: Path):
    """A path to write to, which becomes `path` when all went well. E117: something is there; E403:
    it could not be written. What a check found wrong keeps its other name, to be looked into."""
    if os.path.lexists(path):
        raise UserError("E117", f"{path} is there already: give another name")
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except BaseException as error:
        differs = isinstance(error, UserError) and error.code == "E402"
        if not differs:
            with contextlib.suppress(OSError):
                tmp.unlink()
        if isinstance(error, OSError):
            raise UserError("E403", f"{path}: {error}") from error
        raise


def write(gguf, tmp: Path, plan: Plan, source, dtype: str, pre: str) -> dict:
    """Returns {GGUF's name: its type}."""
    table = tensors(plan)
    writer = gguf.GGUFWriter(None, plan.arch)
    add_keys(writer, gguf, plan, dtype, source.name)
    gguf_vocabulary.add(writer, source, pre, plan.cfg.vocab_size)
    kinds = {}
    for name, tensor in table.items():
        kind = kinds[name] = stored_as(gguf, name, tensor, dtype)
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
        writer.add_tensor_info(name, list(tensor.shape), tensor.numpy().dtype, size, kind)
    try:
        writer.write_header_to_file(tmp)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in table.items():
            writer.write_tensor_data(encoded(gguf, name, tensor, kinds[name]))
    finally:
        writer.close()
    return kinds


def to_gguf(run, file, dtype="f16", pre=None, check=False, say=print, **which) -> dict:
    """Write a run, a step, adapters with their base or a Hugging Face folder as one file; returns
    what was written. which: best, step, tokenizer of models.read_model. E404 with every reason
    when llama.cpp has no such model or tokenizer, E402 when `check` finds a difference (the file
    then keeps the suffix .tmp)."""
    gguf = import_gguf()
    if dtype not in TYPES:
        raise UserError("E404", f"type: {dtype!r} is not one of {', '.join(TYPES)}")
    file = Path(file).resolve()
    if check:
        gguf_check.find_python()
    with new_file(file) as tmp:
        source = models.read_model(run, **which, say=say)
        made = plan(source)
        rows = made.cfg.vocab_size
        name = gguf_vocabulary.check(source.tokenizer, pre, rows, source.folder)
        kinds = write(gguf, tmp, made, source, dtype, name)
        report = {"architecture": made.arch, "type": dtype, "pre": name, "source": str(source)}
        report["bytes"] = tmp.stat().st_size
        if check:
            report |= gguf_check.check(gguf, tmp, made, source, dtype)
    for note in [*made.notes, *short_rows(kinds, dtype), *gguf_vocabulary.caveats(source, pre)]:
        say(f"note: {note}")
    size = f"{report['bytes'] / 2**20:,.1f} MiB"
    say(f"{made.arch}, {source}, {dtype}, {size}, pre-tokenizer {name}: {file}")
    for what in gguf_check.told(report):
        say(f"checked: {what}")
    return report


def short_rows(kinds: dict, dtype: str) -> list[str]:
    """What blocks of 32 do not fit, for people."""
    short = [name for name, kind in kinds.items() if dtype == "q8_0" and kind.name == "F16"]
    if not short:
        return []
    some = ", ".join(sorted(short)[:3])
    return [f"{len(short)} matrices are f16, since 32 does not divide their rows: {some}"]
