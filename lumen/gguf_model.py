"""Which of llama.cpp's models ours are, and their tensors under GGUF's names.

By src/models/*.cpp of August 2026:

    llama     no QK-norm; with experts a Mixtral. Its RoPE turns neighbours, ours halves: the rows
              of q and k change places.
    qwen3     QK-norm
    qwen3moe  QK-norm, experts in every layer, gates that sum to 1
    dots1     QK-norm, experts behind the first layers, sigmoid or softmax, shared experts. Its
              loader wants as many key heads as query heads, a shared expert and a head of its own:
              ours are repeated, an expert of zeros, and the embedding once more.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from lumen import checkpoint
from lumen.errors import UserError
from lumen.hf import odd_rope
from model import ModelConfig, rope_kind, rope_tables

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

    refuse(cfg.extras, f"extras: {', '.join(cfg.extras or [])}: llama.cpp computes no such block")
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


class Read(dict):
    """Tensors by name, which remembers what was asked for."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__(state)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return super().__getitem__(name)


@dataclass
class Plan:
    """What is written of a model, and as what."""

    cfg: ModelConfig
    arch: str
    state: Read  # fp32
    parameters: list[str]
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
    own = [name for name, _ in source.model.named_parameters()]
    state = Read(state | ready)
    made = Plan(cfg, architecture(cfg), state, own, kept, cfg.n_layers - len(kept))
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
    return [f"llama.cpp's dots1 wants {note}" for note in notes]


# ---------------------------------------------------------------- tensors


def tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """{GGUF's name: fp32}, in the order of the model; views where the values are ours. E404:
    parameters that a change of model.py has brought have no place there."""
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
    if left := [name for name in plan.parameters if name not in state.seen]:
        text = f"llama.cpp has no place for parameters {', '.join(left[:3])}"
        raise UserError("E404", f"{text}; see `refusals` in lumen/gguf_model.py")
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
    gate, up = chosen(state[f"{ours}.experts.w13"], slots).chunk(2, 1)
    down = chosen(state[f"{ours}.experts.w2"], slots)
    if (scale := folded(plan)) != 1.0:
        down = down * scale
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


def chosen(experts: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Those of these slots; a view where it is all of them."""
    return experts if slots == list(range(len(experts))) else experts[slots]


def folded(plan: Plan) -> float:
    """What the experts' last matrices are multiplied by: only dots1 has a key for gates' scale."""
    return 1.0 if plan.arch == "dots1" else plan.cfg.route_scale


def rope_factors(cfg: ModelConfig) -> torch.Tensor:
    """(D/2,): by how much Llama 3 slows each frequency down."""
    one = torch.ones(1)  # the angle of position 1 is the frequency

    def frequencies(cfg):
        cos, sin = rope_tables(cfg, one)
        both = torch.atan2(sin, cos).flatten()  # the first half backwards: see model.rotate
        return both[len(both) // 2 :]

    plain = dataclasses.replace(cfg, rope_scaling=None)
    return frequencies(plain) / frequencies(cfg)


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
