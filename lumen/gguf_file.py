"""A run as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run:
`python export.py to_gguf out/run FILE`.

Which of llama.cpp's architectures a model is (src/models/*.cpp of August 2026):

    llama     no QK-norm; with experts a Mixtral. Its RoPE turns neighbours, ours halves: the rows
              of q and k change places.
    qwen3     QK-norm
    qwen3moe  QK-norm, experts in every layer, gates that sum to 1
    dots1     QK-norm, experts behind the first layers, sigmoid or softmax, shared experts. Its
              loader wants as many key heads as query heads, a shared expert and a head of its own:
              ours are repeated, an expert of zeros, and the embedding once more.

The file is written by the `gguf` package, under another name first. Matrices are of --type; norms,
router and its bias stay f32. One model in fp32 and one tensor more are in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lumen import checkpoint, gguf_vocabulary, models
from lumen.errors import UserError, a_path
from lumen.files import sync
from lumen.hf import folded, odd_rope
from model import ModelConfig, rope_kind, rope_tables

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


# ---------------------------------------------------------------- which architecture


def architecture(cfg: ModelConfig) -> str:
    """llama.cpp's name for this kind of model, provided that `refusals` finds nothing."""
    moe = [cfg.is_moe(i) for i in range(cfg.n_layers)]
    if not cfg.qk_norm:
        return "llama"
    if not any(moe):
        return "qwen3"
    plain = cfg.router == "softmax" and cfg.norm_topk and not cfg.n_shared_experts
    return "qwen3moe" if plain and all(moe) else "dots1"


def refusals(cfg: ModelConfig) -> list[str]:
    """Why llama.cpp has no such model, key by key; empty when it has one."""
    moe = [i for i in range(cfg.n_layers) if cfg.is_moe(i)]
    dense = [i for i in range(cfg.n_layers) if not cfg.is_moe(i)]
    why = []

    def refuse(wrong, text: str) -> None:
        if wrong:
            why.append(f"model.{text}")

    order = f"norm_order: {cfg.norm_order} (QK-norm over whole vectors, no norm before attention)"
    refuse(cfg.norm_order != "pre", order)
    refuse(cfg.rope_first, "rope_first: true: QK-norm comes before RoPE there")
    skips = any(cfg.capacity(i) < 1 for i in range(cfg.n_layers))
    refuse(skips, f"mod_capacity: {cfg.mod_capacity}: every block computes every token there")
    nulls = f"n_null_experts: {cfg.n_null_experts}: there are no such choices"
    refuse(moe and cfg.n_null_experts, nulls)
    if moe and not cfg.qk_norm:  # as a Mixtral
        without = "without qk_norm"
        refuse(cfg.router == "sigmoid", f"router: sigmoid {without}")
        refuse(dense, f"moe_layers: layers {dense} are dense, {without} none can be")
        refuse(not cfg.norm_topk, f"norm_topk: false {without}: gates sum to 1 there")
        refuse(cfg.n_shared_experts, f"n_shared_experts: {cfg.n_shared_experts} {without}")
    if moe and cfg.qk_norm:
        first = dense == list(range(len(dense)))
        refuse(not first, f"moe_layers: layers {dense} are dense, which can only come first")
    scaling = cfg.rope_scaling or {}
    refuse(
        cfg.qk_norm and rope_kind(scaling) == "llama3",
        "rope_scaling: llama3 with qk_norm: only its Llama reads such factors",
    )
    return why + [f"model.{reason}" for reason in odd_rope(scaling)]


class Weights:
    """A model's tensors, by the names and the method of a checkpoint."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def read(self, name: str) -> torch.Tensor:
        return self.state[name.removeprefix("model.")]


@dataclass
class Plan:
    """What is written of a model, and as what."""

    cfg: ModelConfig
    arch: str
    state: dict[str, torch.Tensor]  # fp32
    kept: dict[int, list[int]]  # layer -> slots whose experts there are
    n_dense: int  # layers before the first with experts, all of them in a dense model
    notes: list[str] = field(default_factory=list)  # what is larger than in the run, and why

    @property
    def n_experts(self) -> int:
        return max(map(len, self.kept.values()), default=0)

    @property
    def n_kv_heads(self) -> int:
        return self.cfg.n_heads if self.arch == "dots1" else self.cfg.n_kv_heads


def plan(source) -> Plan:
    """E404 with every reason: llama.cpp has no such model. source: models.Opened."""
    from export import routers  # upward: which slots have experts is decided there

    if source.kind == "quantised":
        text = "is quantised already; take what it was made from, and --type q8_0"
        raise UserError("E404", f"{source.folder} {text}")
    cfg, state = source.model.cfg, source.model.state_dict()
    kept, ready, more = {}, {}, []
    why = refusals(cfg)
    if not cfg.n_null_experts:
        kept, ready, more = routers(Weights(state), cfg)
    if why or more:
        raise UserError("E404", f"{source.folder}: llama.cpp has no {'; '.join(why + more)}")
    made = Plan(cfg, architecture(cfg), state | ready, kept, cfg.n_layers - len(kept))
    if made.arch == "dots1":
        made.notes = dots1_notes(cfg)
    return made


def dots1_notes(cfg: ModelConfig) -> list[str]:
    notes = []
    if cfg.n_kv_heads != cfg.n_heads:
        times = cfg.n_heads // cfg.n_kv_heads
        notes.append(f"each key and value head {times} times, and so is llama.cpp's cache")
    if not cfg.n_shared_experts:
        notes.append("a shared expert of zeros")
    if cfg.tie_embeddings:
        notes.append("the embedding once more, as the head")
    return notes


# ---------------------------------------------------------------- tensors


def tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """{GGUF's name: fp32}, in the order of the model; views where the values are ours."""
    cfg, state = plan.cfg, plan.state
    table = {"token_embd.weight": state["embed.weight"]}
    for i in range(cfg.n_layers):
        table |= attention(plan, i)
        table[f"blk.{i}.ffn_norm.weight"] = state[f"blocks.{i}.ffn_norm.weight"]
        if i in plan.kept:
            table |= experts(plan, i)
        else:
            table |= swiglu(state, f"blocks.{i}.ffn", f"blk.{i}.ffn_{{}}.weight")
    table["output_norm.weight"] = state["norm.weight"]
    if not cfg.tie_embeddings:
        table["output.weight"] = state["head.weight"]
    elif plan.arch == "dots1":
        table["output.weight"] = state["embed.weight"]
    if rope_kind(cfg.rope_scaling or {}) == "llama3":
        table["rope_freqs.weight"] = rope_factors(cfg)
    return table


def attention(plan: Plan, i: int) -> dict[str, torch.Tensor]:
    cfg, state = plan.cfg, plan.state
    ours, theirs = f"blocks.{i}", f"blk.{i}"
    width = cfg.n_kv_heads * cfg.head_dim
    wqkv = state[f"{ours}.attn.wqkv.weight"]
    q, k, v = wqkv.split([cfg.n_heads * cfg.head_dim, width, width])
    if plan.arch == "llama":
        q, k = neighbours(q, cfg.head_dim), neighbours(k, cfg.head_dim)
    k, v = repeated(k, cfg.head_dim, plan), repeated(v, cfg.head_dim, plan)
    table = {
        f"{theirs}.attn_norm.weight": state[f"{ours}.attn_norm.weight"],
        f"{theirs}.attn_q.weight": q,
        f"{theirs}.attn_k.weight": k,
        f"{theirs}.attn_v.weight": v,
        f"{theirs}.attn_output.weight": state[f"{ours}.attn.wo.weight"],
    }
    if cfg.qk_norm:
        table[f"{theirs}.attn_q_norm.weight"] = state[f"{ours}.attn.q_norm.weight"]
        table[f"{theirs}.attn_k_norm.weight"] = state[f"{ours}.attn.k_norm.weight"]
    return table


def neighbours(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (H D, C) so ordered that the pair (i, i + D/2) of a head becomes (2i, 2i + 1)."""
    halves = w.view(-1, 2, head_dim // 2, w.shape[-1])  # (H, 2, D/2, C)
    return halves.transpose(1, 2).reshape(w.shape)


def repeated(w: torch.Tensor, head_dim: int, plan: Plan) -> torch.Tensor:
    """Each head's rows as often as there are query heads that read it."""
    times = plan.n_kv_heads // plan.cfg.n_kv_heads
    if times == 1:
        return w
    return w.view(-1, head_dim, w.shape[-1]).repeat_interleave(times, 0).flatten(0, 1)


def swiglu(state: dict, ours: str, theirs: str) -> dict[str, torch.Tensor]:
    gate, up = state[f"{ours}.w13.weight"].chunk(2)
    down = state[f"{ours}.w2.weight"]
    return {theirs.format(name): w for name, w in (("gate", gate), ("up", up), ("down", down))}


def experts(plan: Plan, i: int) -> dict[str, torch.Tensor]:
    """The router and the experts of a layer, (E, out, in) each."""
    cfg, state = plan.cfg, plan.state
    ours, theirs, slots = f"blocks.{i}.ffn", f"blk.{i}.ffn", plan.kept[i]
    gate, up = state[f"{ours}.experts.w13"][slots].chunk(2, 1)
    down = state[f"{ours}.experts.w2"][slots]
    if plan.arch != "dots1":  # which has a key for that
        down = down * cfg.route_scale
    table = {
        f"{theirs}_gate_inp.weight": state[f"{ours}.router.weight"],
        f"{theirs}_gate_exps.weight": gate,
        f"{theirs}_up_exps.weight": up,
        f"{theirs}_down_exps.weight": down,
    }
    if plan.arch != "dots1":
        return table
    table[f"blk.{i}.exp_probs_b.bias"] = state[f"{ours}.router.bias"]
    shared = f"{theirs}_{{}}_shexp.weight"
    if cfg.n_shared_experts:
        return table | swiglu(state, f"{ours}.shared", shared)
    zeros = torch.zeros(cfg.d_expert, cfg.d_model)
    return table | {
        shared.format("gate"): zeros,
        shared.format("up"): zeros,
        shared.format("down"): zeros.t(),
    }


def rope_factors(cfg: ModelConfig) -> torch.Tensor:
    """(D/2,): by how much Llama 3 slows each frequency down."""
    one = torch.ones(1)  # the angle of position 1 is the frequency

    def frequencies(cfg):
        cos, sin = rope_tables(cfg, one)
        return torch.atan2(sin, cos).flatten()

    plain = dataclasses.replace(cfg, rope_scaling=None)
    return frequencies(plain) / frequencies(cfg)


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


# ---------------------------------------------------------------- values


def stored_as(gguf, name: str, tensor: torch.Tensor, dtype: str):
    """gguf.GGMLQuantizationType of a tensor: what is small or decides stays f32; rows that blocks
    of 32 do not fill are f16."""
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return kinds.F32
    if dtype == "q8_0" and tensor.shape[-1] % 32:
        return kinds.F16
    return kinds[dtype.upper()]


def encoded(gguf, name: str, tensor: torch.Tensor, kind):
    """Its values as numpy's bytes. E303: they are not finite; E404: f16 cannot hold them."""
    if value := checkpoint.nonfinite(tensor):
        raise UserError("E303", f"{name} holds {value}: the run had diverged")
    if kind == gguf.GGMLQuantizationType.F16 and checkpoint.nonfinite(tensor.half()):
        raise UserError("E404", f"{name}: f16 cannot hold its values; take --type bf16 or f32")
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


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


def to_gguf(
    run,
    file,
    dtype="f16",
    best=False,
    step=None,
    tokenizer=None,
    pre=None,
    check=False,
    say=print,
) -> dict:
    """Write a run, a step, adapters with their base or a Hugging Face folder as one file; returns
    what was written. E404 with every reason when llama.cpp has no such model or tokenizer, E402
    when `check` finds a difference (the file then keeps the suffix .tmp)."""
    gguf = import_gguf()
    if dtype not in TYPES:
        raise UserError("E404", f"type: {dtype!r} is not one of {', '.join(TYPES)}")
    file = Path(file).resolve()
    with new_file(file) as tmp:
        source = models.read_model(run, best, step, tokenizer, say=say)
        made = plan(source)
        n_rows = made.cfg.vocab_size
        name = gguf_vocabulary.check(source.tokenizer, pre, n_rows, source.folder)
        kinds = write(gguf, tmp, made, source, dtype, name)
        report = {"architecture": made.arch, "type": dtype, "pre": name, "source": str(source)}
        report["bytes"] = tmp.stat().st_size
    for note in made.notes:
        say(f"llama.cpp's {made.arch} wants it: {note}")
    for note in gguf_vocabulary.caveats(source.tokenizer, pre):
        say(f"note: {note}")
    short = sorted(name for name, kind in kinds.items() if dtype == "q8_0" and kind.name == "F16")
    if short:
        say(f"f16, since 32 does not divide their rows: {', '.join(short[:4])}, {len(short)} in all")
    size = f"{report['bytes'] / 2**20:,.1f} MiB"
    say(f"{made.arch}, {source}, {dtype}, {size}, pre-tokenizer {name}: {file}")
    return report
