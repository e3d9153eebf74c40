"""The sparse parts: expert layer, router, Mixture of Depths, expert slots and their surgery.

`python model_moe.py --selftest` checks and times the expert layer's back ends on this machine.
This file imports nothing of ours, so it can be copied out together with model.py; errors are plain ValueError.

Names: T tokens (rows and positions flattened), C = d_model, E experts, K experts per token, I an expert's hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# EXPERT OPS GO HERE


def run_experts(x, p, ids, w13, w2, back_end):
    out = torch.zeros_like(x)
    for e in range(w2.shape[0]):
        t, k = torch.where(ids == e)
        gate, up = (x[t] @ w13[e].to(x.dtype).t()).chunk(2, dim=-1)
        out = out.index_add(0, t, (F.silu(gate) * up) @ w2[e].to(x.dtype).t() * p[t, k, None].to(x.dtype))
    return out


def pick_back_end(choice, device, dtype, d, I, E, K, T):
    return "slices", "placeholder"


# ---------------------------------------------------------------- routing


class RouterLogits(torch.autograd.Function):
    """x W^T in fp32 whatever x's dtype, keeping x itself for backward and not its fp32 copy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (grad @ weight).to(x.dtype), grad.t() @ x.float()


SUMS = ("balance", "z", "tokens", "dropped", "entropy", "confidence")  # of a MoE layer's statistics, before the counts


class Router(nn.Module):
    """Chooses K experts for each token and weighs them; x (T, C) -> gates (T, K) fp32, ids (T, K), statistics.

    softmax: gates are the probabilities of the chosen (renormalised with norm_topk: Mixtral, Qwen3). sigmoid: the bias
    takes part in choosing only, gates are the unbiased scores (DeepSeek-V3, Wang et al. 2024). Ids from S = slots on
    compute nothing: null experts, then what was dropped for capacity. All of it is fp32.

    Buffers, in checkpoints: bias (S + nulls,), load (S + nulls,): the share of each in the previous optimizer step;
    with slots also alive (S,), sibling (S,): the twin of a split expert, itself without one, retired (S,): the step at
    which it was pruned, or -1.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.slots = cfg, cfg.n_experts_max or cfg.n_experts
        self.n = self.slots + cfg.n_null_experts
        self.weight = nn.Parameter(torch.empty(self.n, cfg.d_model))
        self.temperature, self.capacity_factor = cfg.routing_temperature, cfg.capacity_factor
        self.register_buffer("bias", torch.zeros(self.n))
        live = torch.arange(self.n) < cfg.n_experts
        live[self.slots :] = True
        self.register_buffer("load", live / live.sum())
        if cfg.n_experts_max:
            self.register_buffer("alive", live[: self.slots].clone())
            self.register_buffer("sibling", torch.arange(self.slots))
            self.register_buffer("retired", torch.full((self.slots,), -1))
        if cfg.expert_dropout:  # drawn by whoever trains, once a step and for all ranks: see draw_dropout
            self.register_buffer("muted", torch.zeros(self.n, dtype=torch.bool), persistent=False)

    def forward(self, x):
        cfg, K = self.cfg, self.cfg.n_experts_per_token
        if self.training and cfg.router_jitter:
            x = x * torch.empty_like(x).uniform_(1 - cfg.router_jitter, 1 + cfg.router_jitter)
        logits = RouterLogits.apply(x, self.weight)  # (T, n)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        live = self.n
        if cfg.n_experts_max:
            dead = F.pad(~self.alive, (0, cfg.n_null_experts))
            live, logits = self.n - dead.sum(), logits.masked_fill(dead, -math.inf)
        if cfg.router == "softmax":
            score = share = logits.softmax(-1)
        else:
            score = logits.sigmoid()
            share = score + 1e-7  # so that scores pushed to zero cannot cheat the balance (Megatron issue 1545)
            share = share / share.sum(-1, keepdim=True)
        with torch.no_grad():
            ids = self.select(score.detach() + self.bias).topk(K, -1).indices
        p = score.gather(1, ids)  # (T, K)
        if cfg.norm_topk:
            p = p / (p.sum(-1, keepdim=True) + 1e-20)
        if cfg.route_scale != 1.0:
            p = p * cfg.route_scale
        # sums over tokens; balance is 1.0 a token when loads are equal: Switch (Fedus et al. 2021), with the loads of
        # the previous optimizer step over the whole batch (Qiu et al. 2025), so that no split changes the gradient
        balance = live * (share @ self.load).sum()
        z = logits.logsumexp(-1).square().sum() if cfg.router_z_loss_weight else logits.new_zeros(())
        loss = cfg.aux_loss_weight * balance + cfg.router_z_loss_weight * z
        with torch.no_grad():
            counts = logits.new_zeros(self.n).scatter_add_(0, ids.flatten(), logits.new_ones(ids.numel()))
            dropped = logits.new_zeros(())
            if self.capacity_factor and self.training:
                ids, dropped = self.drop(ids, live)
            entropy = -torch.special.xlogy(share, share).sum()
            sums = torch.stack([balance, z, logits.new_full((), len(x)), dropped, entropy, share.amax(-1).sum()])
        return p, ids, loss, torch.cat([sums, counts])

    def select(self, choice):
        """Scores to choose by, (T, n), with what cannot be chosen at -inf."""
        cfg = self.cfg
        if cfg.n_experts_max:
            own = torch.arange(self.slots, device=choice.device)
            mine, twin = choice[:, : self.slots], choice[:, self.sibling]
            # of two twins only the better one: else both would take the same tokens and push out a third
            worse = (mine < twin) | ((mine == twin) & (own > self.sibling))
            bar = (worse & (self.sibling != own)) | ~self.alive
            choice = choice.masked_fill(F.pad(bar, (0, cfg.n_null_experts)), -math.inf)
        if self.training and cfg.expert_dropout:
            choice = choice.masked_fill(self.muted, -math.inf)
        return choice

    def drop(self, ids, live):
        """Send what exceeds an expert's capacity to nobody, first come first served; (ids, how many)."""
        sid, order = ids.flatten().sort(stable=True)
        first = torch.searchsorted(sid, torch.arange(self.n, device=ids.device))  # (n,)
        place = torch.arange(ids.numel(), device=ids.device) - first[sid]
        limit = torch.ceil(torch.as_tensor(self.capacity_factor * ids.numel(), device=ids.device) / live)
        over = torch.empty_like(place, dtype=torch.bool).scatter_(0, order, (place >= limit) & (sid < self.slots))
        return ids.masked_fill(over.view_as(ids), self.n), over.sum().float()


class Experts(nn.Module):
    """S SwiGLU networks of hidden width I as two 3-D weights: gate and up in one, gate first."""

    def __init__(self, slots: int, d_model: int, width: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(slots, 2 * width, d_model))
        self.w2 = nn.Parameter(torch.empty(slots, d_model, width))


class MoE(nn.Module):
    """A FFN of experts; x (..., C) -> (y (..., C), stats). `shared` is a module that every token visits, or None.

    stats: loss (with gradient: balance and z, weighted), moe: the sums of SUMS and the tokens per expert.
    """

    def __init__(self, cfg, shared: nn.Module | None = None):
        super().__init__()
        self.router = Router(cfg)
        self.experts = Experts(self.router.slots, cfg.d_model, cfg.d_expert)
        self.shared = shared
        self.back_end = "slices"

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        p, ids, loss, sums = self.router(flat)
        y = run_experts(flat, p, ids, self.experts.w13, self.experts.w2, self.back_end).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, {"loss": loss, "moe": sums}


def draw_dropout(layers: list[MoE], seed: int) -> None:
    """Mute experts for one step: each layer draws its own, at least K stay."""
    for i, moe in enumerate(layers):
        router, cfg = moe.router, moe.router.cfg
        draw = torch.rand(router.slots, generator=torch.Generator().manual_seed(seed + i)).to(router.bias.device)
        alive = router.alive if cfg.n_experts_max else torch.ones_like(draw, dtype=torch.bool)
        draw = draw.masked_fill(~alive, math.inf)
        keep = torch.zeros_like(alive).scatter(0, draw.topk(cfg.n_experts_per_token, largest=False).indices, True)
        router.muted[: router.slots] = (draw >= 1 - cfg.expert_dropout) & ~keep


@torch.no_grad()
def update_balance(layers: list[MoE], counts: list[torch.Tensor], bad: torch.Tensor) -> None:
    """After an optimizer step, from the tokens per expert (n,) over all its micro-steps and ranks, layer by layer:
    the load shares of the next balance loss, and the selection bias: b += rate * sign(mean - count), centred.
    Nothing changes where `bad`, a 0-d bool: that step was dropped. No host sync.
    """
    for moe, count in zip(layers, counts):
        router, cfg = moe.router, moe.router.cfg
        count = count.float()
        live = torch.ones_like(router.bias)
        if cfg.n_experts_max:
            live[: router.slots] = router.alive.float()
        router.load.copy_(torch.where(bad, router.load, count / count.sum().clamp(min=1)))
        if cfg.bias_update_rate:
            mean = count.sum() / live.sum()
            bias = router.bias + cfg.bias_update_rate * torch.sign(mean - count) * live
            bias = bias - (bias * live).sum() / live.sum() * live  # without it the sum drifts (torchtitan issue 1506)
            router.bias.copy_(torch.where(bad, router.bias, bias))


# ---------------------------------------------------------------- Mixture of Depths


class MoD(nn.Module):
    """Lets a share of a row's tokens through a block and carries the rest past it (Raposo et al. 2024).

    forward(x, change, rope, ...) -> (the change to x, zero where a token was passed by; stats). `change(x, rope, pos)`
    computes the block's change for the chosen tokens only: in order, with their own positions, causal among
    themselves. learned: of each row the highest scores, and the change is multiplied by 2 sigmoid(score), so that the
    router learns; static: evenly spaced positions; random: drawn in training, hashed from the position otherwise.

    Which tokens score highest depends on later ones, so text is not made by that rule but by the causal one: a linear
    predictor on the same normalised, detached input, trained beside by cross-entropy (BCE_WEIGHT), which cannot touch
    the language-model loss. stats: loss, mod: the sums of MOD_SUMS and how often each position was kept (T,); when not
    training: kept and agree, (B, T) bool.
    """

    BCE_WEIGHT = 0.01

    def __init__(self, cfg, layer: int):
        super().__init__()
        self.routing, self.layer, self.full = cfg.mod_routing, layer, cfg.max_seq_len
        self.eps, self.target = cfg.norm_eps, cfg.capacity(layer)
        self.set_capacity(self.target)
        if self.routing == "learned":
            self.router = nn.Linear(cfg.d_model, 1, bias=False)
            self.predictor = nn.Linear(cfg.d_model, 1)

    def set_capacity(self, capacity: float) -> None:
        """Tokens of a full row that are let through from now on, a plain int: another number is another graph."""
        self.capacity, self.tokens = capacity, max(1, math.ceil(capacity * self.full - 1e-9))

    def forward(self, x, change, rope=None, pos=None, cache=None, causal=False):
        B, T, C = x.shape
        score = logit = None
        if self.routing == "learned":
            h = F.rms_norm(x.float(), (C,), eps=self.eps)
            score = self.router(h)[..., 0]  # (B, T)
            logit = score.detach() + self.predictor(h.detach())[..., 0]  # above 0: chosen by the causal rule
        if causal and not self.training:
            return self.causal_forward(x, change, rope, pos, cache, score, logit)
        if self.routing == "learned":
            n = math.ceil(self.tokens * T / self.full)
            idx = score.detach().topk(n, dim=1).indices.sort(dim=1).values  # (B, n), in order
        elif self.routing == "random" and self.training:
            n = math.ceil(self.tokens * T / self.full)
            idx = torch.rand(B, T, device=x.device).topk(n, dim=1).indices.sort(dim=1).values
        elif self.routing == "static":
            n = (T - 1) * self.tokens // self.full + 1
            idx = (torch.arange(n, device=x.device) * self.full + self.tokens - 1) // self.tokens
            idx = idx.expand(B, n)
        else:
            return self.causal_forward(x, change, rope, pos, cache, score, logit)
        rows = (idx + torch.arange(0, B * T, T, device=x.device)[:, None]).flatten()
        y, stats = change(take_rows(x.flatten(0, 1), rows).view(B, n, C), self.rope_of(rope, idx), None)
        if self.routing == "learned":
            y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
        y = put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C)
        with torch.no_grad():
            kept = x.new_zeros(B, T, dtype=torch.float32).scatter_(1, idx, 1.0)
        agree, loss = kept, None
        if self.routing == "learned":
            loss = self.BCE_WEIGHT * F.binary_cross_entropy_with_logits(logit, kept, reduction="sum")
            agree = ((logit > 0) == (kept > 0)).float()
        bce = kept.new_zeros(()) if loss is None else loss.detach() / self.BCE_WEIGHT
        own = {"mod": torch.cat([torch.stack([bce, agree.sum(), kept.new_full((), B * T)]), kept.sum(0)])}
        if not self.training:
            own |= {"kept": kept > 0, "agree": agree > 0}
        if loss is not None:
            own["loss"] = loss + stats.get("loss", 0.0)
        return y, stats | own

    def causal_forward(self, x, change, rope, pos, cache, score, logit):
        """Each token decided by itself and its position. Rows keep different numbers, so here the host looks."""
        B, T, C = x.shape
        at = torch.arange(T, device=x.device).expand(B, T) if pos is None or pos.dim() == 1 else pos  # (B, T)
        if self.routing == "learned":
            keep = logit > 0
        elif self.routing == "static":
            keep = at * self.tokens // self.full != (at - 1) * self.tokens // self.full
        else:
            keep = hashed(at, self.layer) < self.capacity
        if cache is not None:
            keep = keep & (at < cache.length)  # padding
        stats = {"kept": keep, "agree": torch.ones_like(keep)}
        if self.routing == "learned":
            n = math.ceil(self.tokens * T / self.full)
            best = torch.zeros_like(keep).scatter(1, score.topk(n, dim=1).indices, True)
            stats["agree"] = keep == best
        n = int(keep.sum(1).max())
        if n == 0:
            return torch.zeros_like(x), stats
        # the chosen first, in order; behind them, in rows that keep fewer, tokens whose result is thrown away
        idx = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :n]  # (B, n)
        real = keep.gather(1, idx)
        pos = at.gather(1, idx)
        if cache is not None:
            pos = pos.masked_fill(~real, cache.length)  # the spare slot, which nobody reads
        rows = (idx + torch.arange(0, B * T, T, device=x.device)[:, None]).flatten()
        y, inner = change(x.flatten(0, 1)[rows].view(B, n, C), self.rope_of(rope, idx), pos)
        if score is not None:
            y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
        y = torch.where(real[..., None], y, 0.0)  # not times zero: without a key to look at, attention gives NaN
        return put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C), inner | stats

    @staticmethod
    def rope_of(rope, idx):
        """cos and sin (T or B, T, 1, D/2) of the chosen positions: (B, n, 1, D/2)."""
        if rope is None:
            return None
        B, n = idx.shape
        return tuple(t[idx] if t.dim() == 3 else t[torch.arange(B, device=idx.device)[:, None], idx] for t in rope)


MOD_SUMS = ("bce", "agree", "tokens")  # of a MoD layer's statistics, before the counts per position


def hashed(pos: torch.Tensor, layer: int) -> torch.Tensor:
    """A number in [0, 1) for each position, the same in every run (an integer hash)."""
    h = (pos * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B) % (1 << 32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D % (1 << 32)
    return ((h ^ (h >> 12)) % (1 << 32)).double() / (1 << 32)


class TakeRows(torch.autograd.Function):
    """x[rows] for rows that are all different: backward is a copy into zeros, where index_select would add."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, grad.shape[1]).index_copy_(0, rows, grad), None


take_rows = TakeRows.apply


def put_rows(y: torch.Tensor, rows: torch.Tensor, n: int) -> torch.Tensor:
    """(n, C) with y at `rows` and zeros elsewhere."""
    return y.new_zeros(n, y.shape[1]).index_copy(0, rows, y)


# ---------------------------------------------------------------- statistics


def expert_numbers(layers: dict[int, MoE], sums: torch.Tensor) -> torch.Tensor:
    """What expert_statistics needs, in one tensor on the device: sums (layers, len(SUMS) + n) of a step over all its
    micro-steps and ranks, then each layer's bias and which columns are alive; (layers, len(SUMS) + 3 n)."""
    rows = []
    for row, moe in zip(sums, layers.values()):
        r = moe.router
        alive = torch.ones_like(r.bias)
        if r.cfg.n_experts_max:
            alive[: r.slots] = r.alive.float()
        rows.append(torch.cat([row, r.bias.to(row.dtype), alive.to(row.dtype)]))
    return torch.stack(rows)


def expert_statistics(layers: list[int], numbers: torch.Tensor, null: int = 0) -> dict:
    """Plain numbers from expert_numbers: {"layers": {layer: {...}}, and the same keys over all layers}.

    per_expert_utilization: share of the choices (None for a dead slot); routing_entropy: of these shares, nats, at most
    max_entropy; load_balance_loss: unweighted, 1.0 when balanced; tokens_dropped: choices beyond the capacity;
    max_violation: largest load / mean load - 1; dead: experts below a tenth of their fair share; bias_range;
    confidence: mean of the largest probability; token_entropy: mean entropy of a token's probabilities, nats.
    """
    out, n = {}, (numbers.shape[1] - len(SUMS)) // 3
    for layer, row in zip(layers, numbers.double().tolist()):
        sums, counts = dict(zip(SUMS, row)), row[len(SUMS) : len(SUMS) + n]
        bias, alive = row[len(SUMS) + n : len(SUMS) + 2 * n], row[len(SUMS) + 2 * n :]
        total, tokens = max(1.0, sum(counts)), max(1.0, sums["tokens"])
        share = [c / total if a else None for c, a in zip(counts, alive)]
        real, biases = [s for s in share if s is not None], [b for b, a in zip(bias, alive) if a]
        out[layer] = {
            "per_expert_utilization": share[: n - null],
            "routing_entropy": -sum(s * math.log(s) for s in real if s > 0),
            "max_entropy": math.log(len(real)),
            "load_balance_loss": sums["balance"] / tokens,
            "tokens_dropped": int(sums["dropped"]),
            "max_violation": max(real) * len(real) - 1,
            "dead": sum(s is not None and s < 0.1 / len(real) for s in share[: n - null]),
            "bias_range": [min(biases), max(biases)],
            "confidence": sums["confidence"] / tokens,
            "token_entropy": sums["entropy"] / tokens,
            "router_z": sums["z"] / tokens,
            "null_share": sum(s for s in share[n - null :] if s is not None) if null else 0.0,
        }
    mean = {}
    for key, value in next(iter(out.values())).items():
        values = [s[key] for s in out.values()]
        if key == "per_expert_utilization":  # slot by slot over the layers in which it is alive
            slots = [[v for v in slot if v is not None] for slot in zip(*values)]
            mean[key] = [sum(v) / len(v) if v else None for v in slots]
        elif key == "bias_range":
            mean[key] = [min(v[0] for v in values), max(v[1] for v in values)]
        elif isinstance(value, int):
            mean[key] = sum(values)
        else:
            mean[key] = max(values) if key == "max_violation" else sum(values) / len(values)
    return mean | {"layers": out}


def mod_statistics(layers: dict[int, MoD], sums: torch.Tensor, n_layers: int, saved: float) -> dict:
    """Plain numbers from the sums (layers, len(MOD_SUMS) + T) of a step; `saved` is the share of FLOPs saved.

    average_depth counts layers, average_depth_fraction is its share of n_layers; per_layer_usage: share of tokens each
    MoD layer computed; position_usage: how often each position was kept, mean over these layers.
    """
    rows, usage, agree, position = sums.double().tolist(), {}, [], None
    for (layer, _), row in zip(layers.items(), rows):
        named, kept = dict(zip(MOD_SUMS, row)), row[len(MOD_SUMS) :]
        tokens = max(1.0, named["tokens"])
        usage[layer] = sum(kept) / tokens
        agree.append(named["agree"] / tokens)
        part = [k * len(kept) / tokens / len(rows) for k in kept]
        position = part if position is None else [a + b for a, b in zip(position, part)]
    processed = sum(sum(row[len(MOD_SUMS) :]) for row in rows)
    depth = n_layers - sum(1 - u for u in usage.values())
    return {
        "capacity_factor": sum(mod.capacity for mod in layers.values()) / len(layers),
        "tokens_processed": int(processed),
        "tokens_skipped": int(sum(row[2] for row in rows) - processed),
        "average_depth": depth,
        "average_depth_fraction": depth / n_layers,
        "per_layer_usage": usage,
        "compute_savings": saved,
        "predictor_agreement": sum(agree) / len(agree),
        "predictor_loss": sum(row[0] for row in rows) / max(1.0, sum(row[2] for row in rows)),
        "position_usage": position,
    }


# ---------------------------------------------------------------- slots and surgery

WINDOW = 200  # steps for which a pruned expert can be restored; its slot is not given to another before
DEAD = 0.1  # an expert with less than this part of its fair share carries no load
APART = 0.98  # below this cosine of their weights twins have parted


def slots_of(moe: MoE) -> tuple[list[bool], list[int], list[int], list[float]]:
    """alive, sibling, retired, load as plain lists. ValueError when this model has no slots."""
    r = moe.router
    if not r.cfg.n_experts_max:
        text = "these experts are fixed; a run with slots has for example"
        raise ValueError(f"{text} model.n_experts_max: {r.cfg.n_experts + 1} (init_from takes the weights over)")
    return r.alive.tolist(), r.sibling.tolist(), r.retired.tolist(), r.load.tolist()


def add_expert(moe: MoE, optimizer, step: int, parent: int | None = None, seed: int = 0, move=None) -> tuple[int, int]:
    """Split an expert, by default the one with the most load, into a free slot; returns (parent, slot).

    Both halves get the weights of the parent, router rows w + n and w - n with n at right angles to w and 2 % of its
    length, and exclude each other from being chosen until they have parted: so the layer's output hardly moves, and
    they share the parent's tokens (research/sparse.md 4.1). Of the optimizer's state the child gets the second moments,
    its first ones are zero. move(tensor, from, to) copies a row (default: in place). ValueError without a free slot.
    """
    alive, sibling, retired, load = slots_of(moe)
    free = [e for e, a in enumerate(alive) if not a and (retired[e] < 0 or step - retired[e] >= WINDOW)]
    if not free:
        soon = [retired[e] + WINDOW for e, a in enumerate(alive) if not a]
        text = f"no free slot of {len(alive)}" + (f"; the next is free at step {min(soon)}" if soon else "")
        raise ValueError(f"{text}; a run with more has model.n_experts_max: {len(alive) + 1}")
    single = [e for e, a in enumerate(alive) if a and sibling[e] == e]
    if parent is None:
        if not single:
            raise ValueError("every expert has a twin that it has not parted from; train on before the next split")
        parent = max(single, key=lambda e: load[e])
    elif not (0 <= parent < len(alive) and alive[parent]):
        raise ValueError(f"expert {parent} is not alive; alive: {[e for e, a in enumerate(alive) if a]}")
    elif parent not in single:
        raise ValueError(
            f"expert {parent} has not parted from its twin {sibling[parent]} yet; train on or split another"
        )
    _split(moe, optimizer, parent, free[0], seed, move or copy_row)
    return parent, free[0]


@torch.no_grad()
def _split(moe: MoE, optimizer, parent: int, slot: int, seed: int, move) -> None:
    r = moe.router
    for p in (r.weight, moe.experts.w13, moe.experts.w2):
        move(p, parent, slot)
        for name, t in optimizer.state.get(p, {}).items():
            if torch.is_tensor(t) and t.shape == p.shape:
                move(t, parent, slot)
                if not name.endswith("_sq"):  # momentum belongs to where the parent was going
                    t[slot].zero_()
    w = r.weight[parent].clone()
    n = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(w)
    n -= (n @ w) / (w @ w).clamp(min=1e-30) * w
    n *= 0.02 * w.norm() / n.norm()
    r.weight[parent], r.weight[slot] = w + n, w - n
    r.bias[slot] = r.bias[parent]
    r.load[parent] /= 2
    r.load[slot] = r.load[parent]
    r.alive[slot], r.retired[slot] = True, -1
    r.sibling[slot], r.sibling[parent] = parent, slot


def copy_row(tensor: torch.Tensor, source: int, target: int) -> None:
    tensor[target].copy_(tensor[source])


@torch.no_grad()
def prune_expert(moe: MoE, step: int, expert: int, force: bool = False) -> None:
    """Take an expert out of the choice. Its weights stay for WINDOW steps (weight decay goes on), so restore_expert can
    bring it back. ValueError when it is not alive, is needed for K choices, or carries load and `force` is false."""
    alive, sibling, _, load = slots_of(moe)
    r, K = moe.router, moe.router.cfg.n_experts_per_token
    if not (0 <= expert < len(alive) and alive[expert]):
        raise ValueError(f"expert {expert} is not alive; alive: {[e for e, a in enumerate(alive) if a]}")
    left = [e for e, a in enumerate(alive) if a and e != expert]
    if len(left) - sum(sibling[e] != e and sibling[e] != expert for e in left) // 2 < K:
        raise ValueError(f"expert {expert} is needed: every token chooses {K}, and {len(left)} would be left")
    share = load[expert] * (sum(alive) + r.cfg.n_null_experts)
    if share >= DEAD and not force:
        raise ValueError(f"expert {expert} carries {share:.2f} of a fair share; below {DEAD} it counts as dead (force)")
    r.alive[expert], r.retired[expert] = False, step
    r.sibling[sibling[expert]], r.sibling[expert] = sibling[expert], expert
    r.load[expert] = 0
    r.load /= r.load.sum()


@torch.no_grad()
def restore_expert(moe: MoE, step: int, expert: int) -> None:
    """Undo prune_expert. ValueError when its window has closed."""
    alive, _, retired, _ = slots_of(moe)
    if not 0 <= expert < len(alive) or alive[expert] or retired[expert] < 0 or step - retired[expert] >= WINDOW:
        raise ValueError(f"expert {expert} was not pruned in the last {WINDOW} steps")
    moe.router.alive[expert], moe.router.retired[expert] = True, -1


def recycle_expert(moe: MoE, optimizer, step: int, expert: int | None = None, seed: int = 0, move=None):
    """Prune a dead expert (default: the one with the least load) and split the hottest into its slot; no tensor changes
    its shape. Cannot be undone. Returns (parent, slot). ValueError when no expert is dead or none can be split."""
    alive, sibling, _, load = slots_of(moe)
    single = [e for e, a in enumerate(alive) if a and sibling[e] == e]
    if expert is None:
        expert = min((e for e, a in enumerate(alive) if a), key=lambda e: load[e])
    single = [e for e in single if e != expert]
    if not single:
        raise ValueError("no expert without a twin is left to split; train on before")
    prune_expert(moe, step, expert)
    _split(moe, optimizer, max(single, key=lambda e: load[e]), expert, seed, move or copy_row)
    return moe.router.sibling[expert].item(), expert


@torch.no_grad()
def release_twins(moe: MoE) -> list[tuple[int, int]]:
    """End the exclusion between twins whose weights have parted; returns those pairs."""
    alive, sibling, _, _ = slots_of(moe)
    done = []
    for a, b in ((a, b) for a, b in enumerate(sibling) if a < b and alive[a] and alive[b]):
        dots = torch.zeros(3, device=moe.router.bias.device)
        for w in (moe.experts.w13, moe.experts.w2):
            dots += torch.stack([(w[a] * w[b]).sum(), w[a].square().sum(), w[b].square().sum()])
        if dots[0] < APART * (dots[1] * dots[2]).sqrt():
            moe.router.sibling[a], moe.router.sibling[b] = a, b
            done.append((a, b))
    return done
