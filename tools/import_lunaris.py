"""TODO."""

from __future__ import annotations

from pathlib import Path

import torch

from export import add_buffers, one_dtype, write_run
from lumen.errors import UserError
from lumen.model_keys import model_from_keys
from model import ModelConfig

LUNARIS_MOE = (
    "--moe scaled is its older code, imported exactly: outputs times the router's probability. --moe unscaled is its "
    "newer code, which has no exact equivalent and is imported only if you say so: outputs times 1, done by a routing "
    "temperature near 0 (set it to 1 to train on); it drops tokens of full experts in evaluation too, Lumen does not; "
    "and it was trained with a destroyed RoPE (cosines only), Lumen's is whole"
)


class LunarisConfig:
    """Stands in for the dataclass that some of their files pickle: it takes attributes and runs nothing."""


def read_lunaris(
    file, say=print, moe=None, **given
) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """(configuration, fp32 state dict, dtype) of a Lunaris Codex .pt.

    given: n_heads, max_seq_len, rope_theta, rope_ntk_scale_base, dropout, where the file does not say them.
    moe: see `main`'s help.
    """
    theirs = [
        (LunarisConfig, f"{module}.LunarisCodexConfig")
        for module in ("model", "model_moe", "__main__")
    ]
    try:
        with torch.serialization.safe_globals(theirs):
            data = torch.load(file, map_location="cpu", weights_only=True)
        weights, said = data["model"], data.get("config") or {}
        weights = {
            n.replace("_orig_mod.", "").replace("module.", ""): t for n, t in weights.items()
        }
        said = said.get("model", said)
        said = dict(said if isinstance(said, dict) else vars(said))
        for key, value in given.items():
            if value is not None and said.setdefault(key, value) != value:
                raise UserError("E401", f"{file}: --{key} {value}: the file says {said[key]}")
        return convert_lunaris(weights, said, file, say, moe)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # damaged bytes make torch.load raise anything, and a .pt can hold anything
        first = str(error).strip().split("\n")[0][:300]
        raise UserError(
            "E401", f"{file}: no Lunaris checkpoint: {type(error).__name__}: {first}"
        ) from error


def convert_lunaris(
    weights: dict, said: dict, file, say, moe
) -> tuple[ModelConfig, dict[str, torch.Tensor], str]:
    """Three layouts: the MoE branch (fused wqkv and w13, QK-norm over whole vectors, no norm before attention), with or
    without experts; main (one norm per head, after RoPE); main before it had QK-norm, which is a Llama, and the MoE
    branch's first days, the same with experts."""
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
        raise UserError(
            "E401", f"{file}: does not say {', '.join(lacking)}: give --{' N --'.join(lacking)} N"
        )
    gate = weights.get("transformer.h.0.feed_forward.gate.weight")
    E = 0 if gate is None else len(gate)
    code = "unscaled" if "capacity_factor" in said else "scaled" if "n_experts" in said else moe
    if E and (moe or "scaled") != code:
        raise UserError(
            "E401", f"{file}: a MoE model of the {code or 'older or the newer'} code: {LUNARIS_MOE}"
        )
    n_heads, T, theta = (
        int(said["n_heads"]),
        int(said["max_seq_len"]),
        float(said.get("rope_theta", 10000.0)),
    )
    if d % (2 * n_heads):
        raise UserError(
            "E401", f"{file}: n_heads: {n_heads} heads of even width do not fit into d_model {d}"
        )
    head_dim, state = d // n_heads, {"embed.weight": embed}

    def swiglu(name):
        w13 = [take(f"{name}.{w}.weight") for w in (("w13",) if fused else ("w1", "w3"))]
        return torch.cat(w13), take(f"{name}.w2.weight")

    for i in range(n_layers):
        h, b = f"transformer.h.{i}.", f"blocks.{i}."
        if fused:
            wqkv = take(h + "attention.wqkv.weight")
            kv = (len(wqkv) - d) // 2
            q, k, v = wqkv.split([d, kv, kv])
        else:
            q, k, v = (take(h + f"attention.{x}_proj.weight") for x in "qkv")
            state[b + "attn_norm.weight"] = take(h + "attention_norm.weight")
        state[b + "attn.wqkv.weight"] = torch.cat([unpair(q), unpair(k), v])
        for x in "qk" if qk_norm else "":
            state[b + f"attn.{x}_norm.weight"] = unpair(take(h + f"attention.{x}_norm.weight"))
        state[b + "attn.wo.weight"] = take(h + "attention.o_proj.weight")
        state[b + "ffn_norm.weight"] = take(h + "ffn_norm.weight")
        f = h + "feed_forward"
        if E:
            experts = zip(*(swiglu(f"{f}.experts.{e}") for e in range(E)))
            state[b + "ffn.experts.w13"], state[b + "ffn.experts.w2"] = map(torch.stack, experts)
            state[b + "ffn.router.weight"] = take(f + ".gate.weight")
        else:
            state[b + "ffn.w13.weight"], state[b + "ffn.w2.weight"] = swiglu(f)
    state["norm.weight"] = take("transformer.ln_f.weight")
    if not (tied := torch.equal(embed, head)):
        state["head.weight"] = head
    if weights:
        raise UserError("E401", f"{file}: no place for {', '.join(sorted(weights)[:8])}")
    if not fused:  # main stretches theta by the ratio of contexts; before it had QK-norm it did not
        theta *= max(1.0, T / max(1, int(said.get("rope_ntk_scale_base", 2048 if qk_norm else T))))
    elif code != "scaled":
        say(
            f"note: {file} may come from the newer code of Lunaris' MoE branch, which trained with a destroyed RoPE "
            "(cast to real numbers: cosines only). Lumen computes RoPE right, so its logits differ from those there"
        )
    dropout = (
        said.get("dropout", 0.0) if said.get("resid_dropout") is None else said["resid_dropout"]
    )
    if said.get("attn_dropout"):
        say(
            f"note: attn_dropout {said['attn_dropout']} is left out: Lumen has no dropout on attention weights"
        )
    sparse = {"n_experts": E, "n_experts_per_token": 1, "router_z_loss_weight": 0.0} if E else {}
    sparse |= {"aux_loss_weight": float(said.get("aux_loss_weight", 1e-2))} if E else {}
    if E and code == "unscaled":  # so cold that the best expert's probability is 1.0
        sparse |= {"routing_temperature": 1e-6, "capacity_factor": said.get("capacity_factor")}
    w2 = state["blocks.0.ffn.experts.w2" if E else "blocks.0.ffn.w2.weight"]
    cfg = model_from_keys(dict(
        vocab_size=len(embed), d_model=d, n_layers=n_layers, n_heads=n_heads, n_kv_heads=len(k) // head_dim,
        d_ff=w2.shape[-1], max_seq_len=T, rope_theta=theta, norm_eps=1e-5,
        dropout=dropout, tie_embeddings=tied, qk_norm=qk_norm,
        rope_first=qk_norm and not fused, norm_order="lunaris" if fused else "pre", **sparse,
    ))  # fmt: skip
    return add_buffers(cfg, state), state, one_dtype(dtypes)


def from_lunaris(file, out_dir, say=print, moe=None, **given) -> None:
    """Make a run out of a Lunaris Codex .pt: step 0, without an optimizer or (it has none) a tokenizer."""
    cfg, state, dtype = read_lunaris(file, say, moe, **given)
    write_run(out_dir, cfg, state, {"from": str(Path(file).resolve()), "dtype": dtype}, None, say)
