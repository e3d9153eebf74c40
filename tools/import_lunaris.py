"""Takes over a checkpoint of Lunaris Codex (.pt) as a run: `python export.py from_lunaris`.

Its code has had these layouts:

- the MoE branch: fused wqkv and w13, QK-norm over whole vectors, no norm before attention, with or
  without experts;
- main: one QK-norm per head, after RoPE;
- main before it had QK-norm, which is a Llama; and the MoE branch's first days: the same with
  experts.
"""

from __future__ import annotations

from pathlib import Path

import torch

from export import add_buffers, one_dtype, write_run
from lumen.errors import UserError
from lumen.model_keys import model_from_keys
from model import ModelConfig

LUNARIS_MOE = (
    "--moe scaled is its older code, imported exactly: outputs times the router's probability. "
    "--moe unscaled is its newer code, which has no exact equivalent and is imported only if you "
    "say so: outputs times 1, done by a routing temperature near 0 (set it to 1 to train on); it "
    "drops tokens of full experts in evaluation too, Lumen does not; and it was trained with a "
    "destroyed RoPE (cosines only), Lumen's is whole"
)
DESTROYED_ROPE = (
    "may come from the newer code of Lunaris' MoE branch, which trained with a destroyed RoPE "
    "(cast to real numbers: cosines only). Lumen computes RoPE right, so its logits differ from "
    "those there"
)


class LunarisConfig:
    """In place of the dataclass that some of their files pickle: it takes attributes, runs
    nothing."""


class Theirs:
    """The weights of their file, of which each is taken once. E401 for one that is not there."""

    def __init__(self, weights: dict[str, torch.Tensor], file):
        self.weights, self.file = weights, file
        self.fused = "transformer.h.0.attention.wqkv.weight" in weights
        self.qk_norm = "transformer.h.0.attention.q_norm.weight" in weights
        self.dtypes: set[str] = set()  # of those that were taken

    def refuse(self, text: str):
        raise UserError("E401", f"{self.file}: {text}")

    def take(self, name: str) -> torch.Tensor:
        """In fp32."""
        if name not in self.weights:
            self.refuse(f"{name}: missing")
        tensor = self.weights.pop(name)
        self.dtypes.add(str(tensor.dtype).removeprefix("torch."))
        return tensor.float()

    def take_swiglu(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (2 d_ff, C), gate first, and w2 (C, d_ff)."""
        names = ("w13",) if self.fused else ("w1", "w3")
        w13 = torch.cat([self.take(f"{name}.{w}.weight") for w in names])
        return w13, self.take(f"{name}.w2.weight")

    def take_qkv(self, name: str, d: int) -> tuple[torch.Tensor, ...]:
        """q (d, C), k and v (G D, C)."""
        if not self.fused:
            return tuple(self.take(f"{name}.{x}_proj.weight") for x in "qkv")
        wqkv = self.take(f"{name}.wqkv.weight")
        kv = (len(wqkv) - d) // 2
        return wqkv.split([d, kv, kv])


def read_lunaris(
    file, say=print, moe=None, **given
) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """(configuration, fp32 state dict, dtype) of a Lunaris Codex .pt. E401 for any other file.

    given: n_heads, max_seq_len, rope_theta, rope_ntk_scale_base, dropout, where the file does not
    say them. moe: see LUNARIS_MOE.
    """
    modules = ("model", "model_moe", "__main__")
    allowed = [(LunarisConfig, f"{module}.LunarisCodexConfig") for module in modules]
    try:
        with torch.serialization.safe_globals(allowed):
            data = torch.load(file, map_location="cpu", weights_only=True)
        weights = {}
        for name, tensor in data["model"].items():
            # torch.compile's and DDP's prefixes
            weights[name.replace("_orig_mod.", "").replace("module.", "")] = tensor
        said = data.get("config") or {}
        said = said.get("model", said)
        said = dict(said if isinstance(said, dict) else vars(said))
        for key, value in given.items():
            if value is not None and said.setdefault(key, value) != value:
                raise UserError("E401", f"{file}: --{key} {value}: the file says {said[key]}")
        return convert_lunaris(Theirs(weights, file), said, say, moe)
    except UserError:
        raise
    except Exception as error:
        # damaged bytes make torch.load raise anything, and a .pt can hold anything
        first = str(error).strip().split("\n")[0][:300]
        text = f"{file}: no Lunaris checkpoint: {type(error).__name__}: {first}"
        raise UserError("E401", text) from error


def convert_lunaris(
    theirs: Theirs, said: dict, say, moe
) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """See read_lunaris; said: the configuration in the file, and what the user gave besides."""
    embed = theirs.take("transformer.wte.weight")  # (V, C)
    head = theirs.take("lm_head.weight") if "lm_head.weight" in theirs.weights else embed
    d = embed.shape[1]
    n_layers = sum(name.endswith(".ffn_norm.weight") for name in theirs.weights)
    n_heads = heads(theirs, said, d)
    gate = theirs.weights.get("transformer.h.0.feed_forward.gate.weight")
    n_experts = 0 if gate is None else len(gate)
    code = code_of(theirs, said, n_experts, moe)
    state = {"embed.weight": embed}
    for i in range(n_layers):
        state |= convert_block(theirs, i, d, d // n_heads, n_experts)
    state["norm.weight"] = theirs.take("transformer.ln_f.weight")
    tied = torch.equal(embed, head)
    if not tied:
        state["head.weight"] = head
    if theirs.weights:
        theirs.refuse(f"no place for {', '.join(sorted(theirs.weights)[:8])}")
    if theirs.fused and code != "scaled":
        say(f"note: {theirs.file} {DESTROYED_ROPE}")
    if said.get("attn_dropout"):
        text = f"note: attn_dropout {said['attn_dropout']} is left out"
        say(f"{text}: Lumen has no dropout on attention weights")
    kv = (len(state["blocks.0.attn.wqkv.weight"]) - d) // 2
    w2 = state["blocks.0.ffn.experts.w2" if n_experts else "blocks.0.ffn.w2.weight"]
    keys = {
        "vocab_size": len(embed),
        "d_model": d,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": kv // (d // n_heads),
        "d_ff": w2.shape[-1],
        "max_seq_len": int(said["max_seq_len"]),
        "rope_theta": rope_theta(theirs, said),
        "norm_eps": 1e-5,
        "dropout": dropout(said),
        "tie_embeddings": tied,
        "qk_norm": theirs.qk_norm,
        "rope_first": theirs.qk_norm and not theirs.fused,
        "norm_order": "lunaris" if theirs.fused else "pre",
    }
    if n_experts:
        keys |= {"n_experts": n_experts, "n_experts_per_token": 1, "router_z_loss_weight": 0.0}
        keys["aux_loss_weight"] = float(said.get("aux_loss_weight", 1e-2))
        if code == "unscaled":  # so cold that the best expert's probability is 1.0
            keys["routing_temperature"] = 1e-6
            keys["capacity_factor"] = said.get("capacity_factor")
    cfg = model_from_keys(keys)
    return add_buffers(cfg, state), state, one_dtype(theirs.dtypes)


def heads(theirs: Theirs, said: dict, d: int) -> int:
    """How many query heads; E401 where nobody says it, or max_seq_len, or they do not fit."""
    if theirs.qk_norm and not theirs.fused:  # the norm says the width of a head
        norm = theirs.weights["transformer.h.0.attention.q_norm.weight"]
        said.setdefault("n_heads", d // len(norm))
    lacking = [key for key in ("n_heads", "max_seq_len") if not said.get(key)]
    if lacking:
        options = " N --".join(lacking)
        theirs.refuse(f"does not say {', '.join(lacking)}: give --{options} N")
    n_heads = int(said["n_heads"])
    if d % (2 * n_heads):
        theirs.refuse(f"n_heads: {n_heads} heads of even width do not fit into d_model {d}")
    return n_heads


def code_of(theirs: Theirs, said: dict, n_experts: int, moe: str | None) -> str | None:
    """Which code of the MoE branch: scaled, unscaled, or as the user says. E401 where a model with
    experts is of another than the user means."""
    code = moe
    if "capacity_factor" in said:
        code = "unscaled"
    elif "n_experts" in said:
        code = "scaled"
    if n_experts and (moe or "scaled") != code:
        theirs.refuse(f"a MoE model of the {code or 'older or the newer'} code: {LUNARIS_MOE}")
    return code


def rope_theta(theirs: Theirs, said: dict) -> float:
    theta = float(said.get("rope_theta", 10000.0))
    if theirs.fused:
        return theta
    # main stretches theta by the ratio of contexts; before it had QK-norm it did not
    T = int(said["max_seq_len"])
    trained = int(said.get("rope_ntk_scale_base", 2048 if theirs.qk_norm else T))
    return theta * max(1.0, T / max(1, trained))


def dropout(said: dict) -> float:
    if said.get("resid_dropout") is not None:
        return said["resid_dropout"]
    return said.get("dropout", 0.0)


def convert_block(theirs: Theirs, i: int, d: int, head_dim: int, n_experts: int) -> dict:
    """Our names and tensors of block i."""
    h, b = f"transformer.h.{i}", f"blocks.{i}"
    q, k, v = theirs.take_qkv(f"{h}.attention", d)
    wqkv = torch.cat([unpair(q, head_dim), unpair(k, head_dim), v])
    state = {f"{b}.attn.wqkv.weight": wqkv}
    if not theirs.fused:
        state[f"{b}.attn_norm.weight"] = theirs.take(f"{h}.attention_norm.weight")
    if theirs.qk_norm:
        for x in "qk":
            norm = theirs.take(f"{h}.attention.{x}_norm.weight")
            state[f"{b}.attn.{x}_norm.weight"] = unpair(norm, head_dim)
    state[f"{b}.attn.wo.weight"] = theirs.take(f"{h}.attention.o_proj.weight")
    state[f"{b}.ffn_norm.weight"] = theirs.take(f"{h}.ffn_norm.weight")
    if not n_experts:
        w13, w2 = theirs.take_swiglu(f"{h}.feed_forward")
        return state | {f"{b}.ffn.w13.weight": w13, f"{b}.ffn.w2.weight": w2}
    each = [theirs.take_swiglu(f"{h}.feed_forward.experts.{e}") for e in range(n_experts)]
    state[f"{b}.ffn.experts.w13"] = torch.stack([w13 for w13, _ in each])
    state[f"{b}.ffn.experts.w2"] = torch.stack([w2 for _, w2 in each])
    state[f"{b}.ffn.router.weight"] = theirs.take(f"{h}.feed_forward.gate.weight")
    return state


def unpair(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Their RoPE turns pairs (0, 1), (2, 3) ..., ours (0, D/2), (1, D/2 + 1) ...: of each head the
    even rows, then the odd ones."""
    pairs = w.reshape(-1, head_dim // 2, 2, *w.shape[1:])
    return pairs.transpose(1, 2).reshape(w.shape)


def from_lunaris(file, out_dir, say=print, moe=None, **given) -> None:
    """Make a run out of a Lunaris Codex .pt: step 0, without an optimizer and (it has none) without
    a tokenizer."""
    cfg, state, dtype = read_lunaris(file, say, moe, **given)
    write_run(out_dir, cfg, state, {"from": str(Path(file).resolve()), "dtype": dtype}, None, say)
