"""The sparse parts: expert layer with three backends, router, Mixture of Depths, expert slots and their surgery.

`python model_moe.py --selftest` checks and times the expert layer's backends on this machine.
This file imports nothing of ours, so it can be copied out together with model.py; errors are plain ValueError.

The expert layer is one operator: out[t] = sum over k of p[t, k] * w2[e] @ (silu(gate) * up) with e = ids[t, k] < E and
(gate, up) = w13[e] @ x[t]. Everything has a static shape (T * K rows, sorted by expert), nothing is dropped, and only
the backend "slices" waits for the device, so a CUDA graph and torch.compile(fullgraph=True) can hold it. Kept for
backward: x, p, the sort, and z = the rows' gate and up before the activation; the experts' outputs y are never kept,
since the gates' gradient <dout, w2 @ a> = <w2^T @ dout, a> does not need them (SonicMoE, arXiv 2512.14080). No atomics:
the same inputs give the same bits. No GPU has run it yet: the self-test is the proof on yours.

Names: T tokens (rows and positions flattened), d = C = d_model, I an expert's hidden width, E experts, K experts per
token, R = T * K sorted rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import put_rows, register, run_experts, take_rows

# ---------------------------------------------------------------- the plain formula


def reference_experts(x, p, ids, w13, w2):
    """What every backend must equal: a loop, index_add and autograd. Shapes as in run_experts."""
    out = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    for e in range(w2.shape[0]):
        t, k = torch.where(ids == e)
        gate, up = F.linear(x[t], w13[e].to(x.dtype)).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w2[e].to(x.dtype))
        out = out.index_add(0, t, y.to(p.dtype) * p[t, k].unsqueeze(1))
    return out.to(x.dtype)


# ---------------------------------------------------------------- grouped_mm and triton: five steps on sorted rows


# ---------------------------------------------------------------- slices: expert after expert
# On CPU fresh memory costs more than arithmetic on it (page faults, 0.2 ms per MB), so a few experts' rows live in
# buffers that the next ones use again and that mostly stay in the cache; no (R, d) tensor ever exists.


# ---------------------------------------------------------------- the operator


if not hasattr(
    torch.ops.lumen, "experts"
):  # this file can be imported twice, as __main__ and as model_moe
    register()


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


SUMS = ("balance", "z", "tokens", "dropped", "entropy", "confidence")  # of a router, over tokens


class Router(nn.Module):
    """Chooses K experts for each token and weighs them; x (B, T, C) -> gates (BT, K) fp32, ids (BT, K), statistics.

    softmax: gates are the probabilities of the chosen (renormalised with norm_topk: Mixtral, Qwen3). sigmoid: the bias
    takes part in choosing only, gates are the unbiased scores (DeepSeek-V3, Wang et al. 2024). Ids from S = slots on
    compute nothing: null experts, then what was dropped for capacity. All of it is fp32.

    The balance loss takes an expert's load from the row itself (DeepSeek-V3, eq. 17 to 20). So no split of a batch over
    micro-steps or ranks changes it, and it answers at once. Loads of the whole batch are known one step late only, and
    Adam makes so much of that one step that it cost up to 0.2 nats (EXPERIMENTS.md). Rows of one topic are balanced
    too, which a load of the whole batch would not ask for (Qiu et al. 2025): what that costs was not measured.

    Buffers, in checkpoints: bias (S + nulls,), load (S + nulls,): the share of each in the previous optimizer step;
    with slots also alive (S,), sibling (S,): the twin of a split expert, itself without one, retired (S,): the step at
    which it was pruned, or -1.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.slots = cfg, cfg.n_experts_max or cfg.n_experts
        self.n = self.slots + cfg.n_null_experts
        self.weight = nn.Parameter(torch.empty(self.n, cfg.d_model))
        # what may be changed on the way, each a plain number
        self.temperature, self.capacity_factor = cfg.routing_temperature, cfg.capacity_factor
        self.expert_dropout, self.bias_rate, self.aux_weight = (
            cfg.expert_dropout,
            cfg.bias_update_rate,
            cfg.aux_loss_weight,
        )
        for name, value in self.first_buffers().items():
            self.register_buffer(name, value)
        self.dropped_out = (
            None  # (n,) bool for one step of training with expert_dropout: see draw_dropout
        )

    def first_buffers(self) -> dict[str, torch.Tensor]:
        live = torch.arange(self.n) < self.cfg.n_experts
        live[self.slots :] = True
        out = {"bias": torch.zeros(self.n), "load": live / live.sum()}
        if self.cfg.n_experts_max:
            out |= {"alive": live[: self.slots].clone(), "sibling": torch.arange(self.slots)}
            out |= {"retired": torch.full((self.slots,), -1)}
        return out

    def forward(self, x):
        cfg, K = self.cfg, self.cfg.n_experts_per_token
        B = len(x) if x.dim() == 3 else 1
        x = x.reshape(-1, x.shape[-1])
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
            share = (
                score + 1e-7
            )  # so that scores pushed to zero cannot cheat the balance (Megatron issue 1545)
            share = share / share.sum(-1, keepdim=True)
        with torch.no_grad():
            ids = self.select(score.detach() + self.bias).topk(K, -1).indices
            chosen = ids.view(B, -1)  # (B, T K)
            counts = logits.new_zeros(B, self.n).scatter_add_(
                1, chosen, torch.ones_like(chosen, dtype=logits.dtype)
            )
        p = score.gather(1, ids)  # (T, K)
        if cfg.norm_topk:
            p = p / (p.sum(-1, keepdim=True) + 1e-20)
        if cfg.route_scale != 1.0:
            p = p * cfg.route_scale
        # sums over tokens; balance is 1.0 a token when loads are equal: Switch (Fedus et al. 2021), row by row
        load = counts / chosen.shape[1]  # (B, n), sums to 1
        balance = live * (share.view(B, -1, self.n) * load[:, None]).sum()
        z = (logits if cfg.router_z_loss_weight else logits.detach()).logsumexp(-1).square().sum()
        loss = self.aux_weight * balance + cfg.router_z_loss_weight * z
        with torch.no_grad():
            counts = counts.sum(0)
            dropped = logits.new_zeros(())
            if self.capacity_factor and self.training:
                ids, dropped = self.drop(ids, live)
            entropy = -torch.special.xlogy(share, share).sum()
            sums = {
                "balance": balance.detach(),
                "z": z.detach(),
                "tokens": logits.new_full((), len(x)),
                "dropped": dropped,
                "entropy": entropy,
                "confidence": share.amax(-1).sum(),
                "counts": counts,
            }
        return p, ids, loss, sums

    def select(self, choice):
        """Scores to choose by, (T, n), with what cannot be chosen at -inf."""
        if self.training and self.dropped_out is not None:
            choice = choice.masked_fill(self.dropped_out, -math.inf)
        if self.cfg.n_experts_max:
            own = torch.arange(self.slots, device=choice.device)
            mine = choice[:, : self.slots].masked_fill(~self.alive, -math.inf)
            twin = mine[:, self.sibling]
            # of two siblings only the better one, else both would take the same tokens and push out a third; it competes
            # with the others by the mean of both, which right after a split is the parent's score
            worse = (mine < twin) | ((mine == twin) & (own > self.sibling))
            mean = torch.where(twin == -math.inf, mine, (mine + twin) / 2)
            mine = torch.where(self.sibling == own, mine, mean.masked_fill(worse, -math.inf))
            choice = torch.cat([mine, choice[:, self.slots :]], 1)
        return choice

    def drop(self, ids, live):
        """Send what exceeds an expert's capacity to nobody, first come first served; (ids, how many)."""
        sid, order = ids.flatten().sort(stable=True)
        first = torch.searchsorted(sid, torch.arange(self.n, device=ids.device))  # (n,)
        place = torch.arange(ids.numel(), device=ids.device) - first[sid]
        fair = torch.full((), self.capacity_factor * ids.numel(), device=ids.device)
        limit = torch.ceil(fair / live)
        over = torch.empty_like(place, dtype=torch.bool).scatter_(
            0, order, (place >= limit) & (sid < self.slots)
        )
        return ids.masked_fill(over.view_as(ids), self.n), over.sum().float()


class Experts(nn.Module):
    """S SwiGLU networks of hidden width I as two 3-D weights: gate and up in one, gate first; see run_experts, which
    `run` stands for where other processes hold experts too."""

    def __init__(self, slots: int, d_model: int, width: int, run=None):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(slots, 2 * width, d_model))
        self.w2 = nn.Parameter(torch.empty(slots, d_model, width))
        self.run = run or run_experts

    def forward(self, x, p, ids, backend: str):
        return self.run(x, p, ids, self.w13, self.w2, backend)


class MoE(nn.Module):
    """A FFN of experts; x (..., C) -> (y (..., C), stats). `shared` is a module that every token visits, or None.

    stats: loss (with gradient: balance and z, weighted); moe.NAME for each of SUMS, 0-d; moe.counts, the tokens per
    expert (n,).
    """

    def __init__(self, cfg, shared: nn.Module | None = None):
        super().__init__()
        self.router = Router(cfg)
        self.experts = Experts(self.router.slots, cfg.d_model, cfg.d_expert)
        self.shared = shared
        self.backend = "slices"

    def forward(self, x):
        p, ids, loss, sums = self.router(x)
        y = self.experts(x.reshape(-1, x.shape[-1]), p, ids, self.backend).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, {"loss": loss} | {f"moe.{name}": value for name, value in sums.items()}


def draw_dropout(layers: list[MoE], seed: int) -> None:
    """Mute experts for one step: each layer draws its own, at least K stay."""
    device, n = layers[0].router.bias.device, layers[0].router.slots
    draws = torch.stack(
        [
            torch.rand(n, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(layers))
        ]
    )
    draws = (
        draws.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else draws.to(device)
    )
    for moe, draw in zip(layers, draws):
        router, cfg = moe.router, moe.router.cfg
        can = torch.ones_like(draw, dtype=torch.bool)
        if cfg.n_experts_max:  # of two siblings only one can be chosen, so only the first counts
            first = router.sibling >= torch.arange(router.slots, device=draw.device)
            can = router.alive & (first | ~router.alive[router.sibling])
        keep = draw.masked_fill(~can, math.inf).topk(cfg.n_experts_per_token, largest=False).indices
        if router.dropped_out is None:
            router.dropped_out = torch.zeros_like(router.bias, dtype=torch.bool)
        router.dropped_out[: router.slots] = (draw >= 1 - router.expert_dropout).scatter(
            0, keep, False
        )


@torch.no_grad()
def update_balance(layers: list[MoE], counts: list[torch.Tensor], bad: torch.Tensor) -> None:
    """After an optimizer step, from the tokens per expert (n,) over all its micro-steps and ranks, layer by layer:
    the load shares (what surgery goes by), and the selection bias: b += rate * sign(mean - count), centred.
    Nothing changes where `bad`, a 0-d bool: that step was dropped. No host sync.
    """
    for moe, count in zip(layers, counts):
        router, cfg = moe.router, moe.router.cfg
        count = count.float()
        live = torch.ones_like(router.bias)
        if cfg.n_experts_max:
            live[: router.slots] = router.alive.float()
        load = count / count.sum().clamp(min=1)
        if router.dropped_out is not None:  # they had no chance: what they had before
            load = torch.where(
                router.dropped_out, router.load, load * (router.load * ~router.dropped_out).sum()
            )
        router.load.copy_(torch.where(bad, router.load, load))
        if router.bias_rate:
            mean = count.sum() / live.sum()
            bias = router.bias + router.bias_rate * torch.sign(mean - count) * live
            bias = (
                bias - (bias * live).sum() / live.sum() * live
            )  # without it the sum drifts (torchtitan issue 1506)
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
    the language-model loss. stats: loss; mod.NAME for each of MOD_SUMS, 0-d; mod.counts, how often each position was
    kept (T,); when not training: kept and agree, (B, T) bool.
    """

    BCE_WEIGHT = 0.01
    collective_free = True  # what is inside holds no collective: a batch of which no token is kept may leave it out

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
            logit = (
                score.detach() + self.predictor(h.detach())[..., 0]
            )  # above 0: chosen by the causal rule
        if causal and not self.training:
            return self.causal_forward(x, change, rope, pos, cache, score, logit)
        if self.routing == "learned":
            n = math.ceil(self.tokens * T / self.full)
            idx = highest(score, n).sort(dim=1).values  # (B, n), in order
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
        y, stats = change(
            take_rows(x.flatten(0, 1), rows).view(B, n, C), self.rope_of(rope, idx), None
        )
        if self.routing == "learned":
            y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
        y = put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C)
        with torch.no_grad():
            kept = x.new_zeros(B, T, dtype=torch.float32).scatter_(1, idx, 1.0)
        agree, loss = kept, None
        if self.routing == "learned":
            loss = self.BCE_WEIGHT * F.binary_cross_entropy_with_logits(
                logit, kept, reduction="sum"
            )
            agree = ((logit > 0) == (kept > 0)).float()
        own = {
            "mod.bce": kept.new_zeros(()) if loss is None else loss.detach() / self.BCE_WEIGHT,
            "mod.agree": agree.sum(),
            "mod.tokens": kept.new_full((), B * T),
            "mod.counts": kept.sum(0),
        }
        if not self.training:
            own |= {"kept": kept > 0, "agree": agree > 0}
        if loss is not None:
            own["loss"] = loss + stats.get("loss", 0.0)
        return y, stats | own

    def causal_forward(self, x, change, rope, pos, cache, score, logit):
        """Each token decided by itself and its position. Rows keep different numbers, so here the host looks."""
        B, T, C = x.shape
        at = (
            torch.arange(T, device=x.device).expand(B, T) if pos is None or pos.dim() == 1 else pos
        )  # (B, T)
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
            best = torch.zeros_like(keep).scatter(1, highest(score, n), True)
            stats["agree"] = keep == best
        n = int(keep.sum(1).max())
        if n == 0 and self.collective_free:
            return torch.zeros_like(x), stats
        n = max(1, n)
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
        y = torch.where(
            real[..., None], y, 0.0
        )  # not times zero: without a key to look at, attention gives NaN
        return put_rows(y.flatten(0, 1), rows, B * T).view(B, T, C), inner | stats

    @staticmethod
    def rope_of(rope, idx):
        """cos and sin (T or B, T, 1, D/2) of the chosen positions: (B, n, 1, D/2)."""
        if rope is None:
            return None
        B, n = idx.shape
        return tuple(
            t[idx] if t.dim() == 3 else t[torch.arange(B, device=idx.device)[:, None], idx]
            for t in rope
        )


MOD_SUMS = ("bce", "agree", "tokens")  # of a MoD layer, over tokens


def hashed(pos: torch.Tensor, layer: int) -> torch.Tensor:
    """A number in [0, 1) for each position, the same in every run (an integer hash)."""
    h = (pos * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B) % (1 << 32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D % (1 << 32)
    return ((h ^ (h >> 12)) % (1 << 32)).double() / (1 << 32)


# ---------------------------------------------------------------- statistics


# ---------------------------------------------------------------- slots and surgery


# ---------------------------------------------------------------- which backend: refuse, check, time


def highest(score: torch.Tensor, n: int) -> torch.Tensor:
    """Where the n highest scores of each row are, (B, n), of equal ones the earlier. In the first layer equal tokens
    score equally but for rounding, which depends on the batch: so scores count as equal in steps of 2^-12."""
    return (score.detach() * 4096).round().sort(dim=1, descending=True, stable=True).indices[:, :n]
