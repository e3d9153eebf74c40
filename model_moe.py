"""The sparse layers: the plain formula of experts, router, MoE, balance, Mixture of Depths.

This file imports nothing of ours but kernels.py, and that only where it is there: without it the
experts are computed by the plain formula, which is slow and clear. So it can be copied out together
with model.py. It never imports model: MoE gets the shared expert and MoD the block as arguments.

Names: B batch, T tokens (where rows and positions are flattened, B T of them), C = d_model, E
experts, K experts per token, S slots for experts, n = S + null experts: columns of the router.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from kernels import for_generation, run_experts
except ImportError:  # copied out without kernels.py
    for_generation = run_experts = None

# ---------------------------------------------------------------- the plain formula


def plain_experts(x, p, ids, w13, w2):
    """out[t] = sum over k of p[t, k] * w2[e] @ (silu(gate) * up), with e = ids[t, k] and
    (gate, up) = w13[e] @ x[t]: what every backend must equal, by a loop, index_add and autograd.

    x (T, C), gates p (T, K) fp32, ids (T, K) of which E or more mean no expert, w13 (E, 2 I, C),
    w2 (E, C, I) -> (T, C). The host waits for the device here: the backends in kernels.py do not.
    """
    out = torch.zeros(x.shape, dtype=p.dtype, device=x.device)
    for e in range(w2.shape[0]):
        t, k = torch.where(ids == e)
        gate, up = F.linear(x[t], w13[e].to(x.dtype)).chunk(2, -1)  # (rows of e, I) each
        y = F.linear(F.silu(gate) * up, w2[e].to(x.dtype))
        out = out.index_add(0, t, y.to(p.dtype) * p[t, k].unsqueeze(1))
    return out.to(x.dtype)


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
    """Chooses K experts for each token and weighs them: x (B, T, C) or (T, C) -> gates (BT, K)
    fp32, ids (BT, K), the loss, and sums: SUMS and counts (n,), the choices of each column.

    softmax: gates are the probabilities of the chosen (renormalised with norm_topk: Mixtral,
    Qwen3). sigmoid: the bias takes part in choosing only, gates are the unbiased scores
    (DeepSeek-V3, Wang et al. 2024). Ids from S on compute nothing: null experts, then what was
    dropped for capacity. All of it is fp32.

    The balance loss takes an expert's load from the row itself (DeepSeek-V3, eq. 17 to 20). So no
    split of a batch over micro-steps or ranks changes it, and it answers at once. Loads of the
    whole batch are known one step late only, and Adam makes so much of that one step that it cost
    up to 0.2 nats (EXPERIMENTS.md). Rows of one topic are balanced too, which a load of the whole
    batch would not ask for (Qiu et al. 2025): what that costs was not measured. With documents that
    do not see each other each of them is such a row: packed, they train as they would apart.

    Buffers, in checkpoints: bias (n,); load (n,), the share of each in the previous optimizer step;
    with slots also alive (S,); sibling (S,), the other half of a split expert, itself without one;
    retired (S,), the step at which it was pruned, or -1.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.slots = cfg.n_experts_max or cfg.n_experts
        self.n = self.slots + cfg.n_null_experts
        self.weight = nn.Parameter(torch.empty(self.n, cfg.d_model))
        # what may be changed while training, each a plain number
        self.temperature = cfg.routing_temperature
        self.capacity_factor = cfg.capacity_factor
        self.expert_dropout = cfg.expert_dropout
        self.bias_rate = cfg.bias_update_rate
        self.aux_weight = cfg.aux_loss_weight
        for name, value in self.first_buffers().items():
            self.register_buffer(name, value)
        # (n,) bool, for one step of training with expert_dropout: see lumen.experts.draw_dropout
        self.dropped_out = None

    def first_buffers(self) -> dict[str, torch.Tensor]:
        live = torch.arange(self.n) < self.cfg.n_experts
        live[self.slots :] = True  # null experts
        buffers = {"bias": torch.zeros(self.n), "load": live / live.sum()}
        if self.cfg.n_experts_max:
            buffers["alive"] = live[: self.slots].clone()
            buffers["sibling"] = torch.arange(self.slots)
            buffers["retired"] = torch.full((self.slots,), -1)
        return buffers

    def forward(self, x, docs=None):
        cfg = self.cfg
        K = cfg.n_experts_per_token
        B = len(x) if x.dim() == 3 else 1
        x = x.reshape(-1, x.shape[-1])  # (T, C), here and below T is B T
        logits, live = self.logits(x)  # (T, n)
        if cfg.router == "softmax":
            score = share = logits.softmax(-1)
        else:
            score = logits.sigmoid()
            # scores pushed to zero must not cheat the balance (Megatron issue 1545)
            share = score + 1e-7
            share = share / share.sum(-1, keepdim=True)
        with torch.no_grad():
            ids = self.select(score.detach() + self.bias).topk(K, -1).indices  # (T, K)
            if docs is None:
                ones = torch.ones_like(ids, dtype=logits.dtype).view(B, -1)
                counts = logits.new_zeros(B, self.n).scatter_add_(1, ids.view(B, -1), ones)
                load = (counts / ones.shape[1])[:, None]  # (B, 1, n), each row sums to 1
                counts = counts.sum(0)
            else:
                counts, load = docs.choices(ids, self.n)
        p = score.gather(1, ids)  # (T, K)
        if cfg.norm_topk:
            p = p / (p.sum(-1, keepdim=True) + 1e-20)
        if cfg.route_scale != 1.0:
            p = p * cfg.route_scale
        z = (logits if cfg.router_z_loss_weight else logits.detach()).logsumexp(-1).square()
        tokens = logits.new_full((), len(x))
        if docs is not None and docs.real is not None:  # the others count for nothing
            real = docs.real.view(-1, 1)
            share, z, tokens = share * real, z * real[:, 0], real.sum().to(z.dtype)
            ids = ids.masked_fill(~real, self.n)
        # 1.0 a token when loads are equal: Switch (Fedus et al. 2021), row by row
        balance = live * (share.view(B, -1, self.n) * load).sum()
        z = z.sum()
        loss = self.aux_weight * balance + cfg.router_z_loss_weight * z
        with torch.no_grad():
            dropped = logits.new_zeros(())
            if self.capacity_factor and self.training:
                ids, dropped = self.drop(ids, live)
            sums = {
                "balance": balance.detach(),
                "z": z.detach(),
                "tokens": tokens,
                "dropped": dropped,
                "entropy": -torch.special.xlogy(share, share).sum(),
                "confidence": share.amax(-1).sum(),
                "counts": counts,  # what was wanted, dropped or not
            }
        return p, ids, loss, sums

    def logits(self, x):
        """(logits (T, n) with empty slots at -inf, how many columns are not empty)."""
        jitter = self.cfg.router_jitter
        if self.training and jitter:
            x = x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        logits = RouterLogits.apply(x, self.weight)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if not self.cfg.n_experts_max:
            return logits, self.n
        dead = F.pad(~self.alive, (0, self.cfg.n_null_experts))
        return logits.masked_fill(dead, -math.inf), self.n - dead.sum()

    def select(self, choice):
        """Scores to choose by, (T, n), with what cannot be chosen at -inf."""
        if self.training and self.dropped_out is not None:
            choice = choice.masked_fill(self.dropped_out, -math.inf)
        if not self.cfg.n_experts_max:
            return choice
        # Siblings exclude each other, else both would take the same tokens and push out a third:
        # only the higher-scoring one is eligible, ranked by the pair's mean, which right after a
        # split is the parent's score.
        own = torch.arange(self.slots, device=choice.device)
        mine = choice[:, : self.slots].masked_fill(~self.alive, -math.inf)
        other = mine[:, self.sibling]
        worse = (mine < other) | ((mine == other) & (own > self.sibling))
        mean = torch.where(other == -math.inf, mine, (mine + other) / 2)
        mine = torch.where(self.sibling == own, mine, mean.masked_fill(worse, -math.inf))
        return torch.cat([mine, choice[:, self.slots :]], 1)

    def drop(self, ids, live):
        """Send what exceeds an expert's capacity to nobody, first come first served: (ids, how
        many)."""
        sid, order = ids.flatten().sort(stable=True)
        first = torch.searchsorted(sid, torch.arange(self.n + 1, device=ids.device))
        place = torch.arange(ids.numel(), device=ids.device) - first[sid]  # in its expert's queue
        fair = torch.full((), self.capacity_factor * ids.numel(), device=ids.device)
        late = (place >= torch.ceil(fair / live)) & (sid < self.slots)
        over = torch.empty_like(place, dtype=torch.bool).scatter_(0, order, late)
        return ids.masked_fill(over.view_as(ids), self.n), over.sum().float()


# ---------------------------------------------------------------- Mixture of Experts


class Experts(nn.Module):
    """S SwiGLU networks of hidden width I as two 3-D weights, gate and up in one, gate first.

    `run` stands for kernels.run_experts where other processes hold experts too.
    """

    def __init__(self, slots: int, d_model: int, width: int, run=None):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(slots, 2 * width, d_model))
        self.w2 = nn.Parameter(torch.empty(slots, d_model, width))
        self.run = run or run_experts

    def forward(self, x, p, ids, backend: str):
        if backend == "plain":
            return plain_experts(x, p, ids, self.w13, self.w2)
        return self.run(x, p, ids, self.w13, self.w2, backend)


class MoE(nn.Module):
    """A FFN of experts: x (..., C) -> (y (..., C), stats).

    `shared` is a module that every token visits, or None. stats: loss (with gradient: balance and
    z, weighted); moe.NAME for each of SUMS, 0-d; moe.counts (n,), the choices of each column.
    """

    def __init__(self, cfg, shared: nn.Module | None = None):
        super().__init__()
        self.router = Router(cfg)
        self.experts = Experts(self.router.slots, cfg.d_model, cfg.d_expert)
        self.shared = shared
        self.backend = "slices" if run_experts else "plain"

    def forward(self, x, docs=None):
        p, ids, loss, sums = self.router(x, docs)
        y = self.experts(x.reshape(-1, x.shape[-1]), p, ids, self.backend).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, {"loss": loss} | {f"moe.{name}": value for name, value in sums.items()}

    def generation_backend(self, device, dtype) -> str:
        """The backend for a few tokens at a time, which may be another than the one to train."""
        if self.backend == "plain":
            return "plain"
        cfg = self.router.cfg
        return for_generation(self.backend, device, dtype, cfg.d_model, cfg.d_expert)


# ---------------------------------------------------------------- Mixture of Depths


class TakeRows(torch.autograd.Function):
    """x[rows] for rows that are all different: backward is a copy into zeros, where index_select
    would add."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, grad.shape[1]).index_copy_(0, rows, grad), None


class PutRows(torch.autograd.Function):
    """(n, C) with y at `rows`, all different, and zeros elsewhere. torch's index_copy would keep y
    for backward."""

    @staticmethod
    def forward(ctx, y, rows, n):
        ctx.save_for_backward(rows)
        # not in place: that, torch 2.11 compiles to a gradient of zero
        return y.new_zeros(n, y.shape[1]).index_copy(0, rows, y)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None


MOD_SUMS = ("bce", "agree", "tokens")  # of a MoD layer, over tokens


class MoD(nn.Module):
    """Lets a share of a row's tokens through a block and carries the rest past it.

    Raposo et al. 2024. forward(x (B, T, C), branch, inputs) -> (the change to x, zero where a token
    was passed by; stats). branch(x, inputs) computes the block's change for the chosen tokens only:
    in order, with their own positions, causal among themselves; inputs is model.AttentionInputs,
    and of each of its documents is chosen what would be if it were a row. learned: of each row the
    highest scores, and the change is multiplied by 2 sigmoid(score), so that the router learns;
    static: evenly spaced; random: drawn in training, hashed from the position otherwise.

    Which tokens score highest depends on later ones, so text is not made by that rule but by the
    causal one: a linear predictor on the same normalised, detached input, trained beside by
    cross-entropy (BCE_WEIGHT), which cannot touch the language-model loss.

    stats: the branch's; loss; mod.NAME for each of MOD_SUMS, 0-d; mod.counts (T,), how often each
    position was kept; when not training: kept and agree, (B, T) bool.
    """

    BCE_WEIGHT = 0.01
    collective_free = True  # the branch holds no collective: a batch that keeps none may skip it

    def __init__(self, cfg, layer: int):
        super().__init__()
        self.routing = cfg.mod_routing
        self.layer = layer
        self.full = cfg.max_seq_len
        self.eps = cfg.norm_eps
        self.target = cfg.capacity(layer)
        self.set_capacity(self.target)
        if self.routing == "learned":
            self.router = nn.Linear(cfg.d_model, 1, bias=False)
            self.predictor = nn.Linear(cfg.d_model, 1)

    def set_capacity(self, capacity: float) -> None:
        """Tokens of a full row that are let through from now on, a plain int: another number is
        another compiled graph."""
        self.capacity = capacity
        self.tokens = max(1, math.ceil(capacity * self.full - 1e-9))

    def forward(self, x, branch, inputs):
        B, T, C = x.shape
        score = logit = None
        if self.routing == "learned":
            h = F.rms_norm(x.float(), (C,), eps=self.eps)
            score = self.router(h)[..., 0]  # (B, T)
            # above 0: chosen by the causal rule
            logit = score.detach() + self.predictor(h.detach())[..., 0]
        if not self.training and (inputs.causal or self.routing == "random"):
            return self.causal_forward(x, branch, inputs, score, logit)
        docs = inputs.docs
        keep, n = self.choose(x, score, docs)
        idx, real = first(keep, n)
        # without documents each row has exactly n
        y, stats = compute(x, branch, inputs, idx, score, real=None if docs is None else real)
        return y, stats | self.statistics(keep.float(), logit, stats, docs)

    def choose(self, x, score, docs):
        """Which tokens of x (B, T, C) go through, as trained: (B, T) bool; and how many of a row at
        most."""
        B, T, _ = x.shape
        n = None if docs is None else docs.most_of_best(self.tokens, self.full)
        if self.routing == "static":
            at = torch.arange(T, device=x.device).expand(B, T) if docs is None else docs.places()
            return self.causal_choice(at, None), n or (T - 1) * self.tokens // self.full + 1
        if self.routing == "random":
            order = torch.rand(B, T, device=x.device).argsort(dim=1, descending=True)
        else:
            order = highest(score, T)
        if docs is not None:
            return docs.best(order, self.tokens, self.full), n
        n = math.ceil(self.tokens * T / self.full)
        keep = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        return keep.scatter_(1, order[:, :n], True), n

    def statistics(self, kept, logit, inner: dict, docs=None) -> dict:
        """Of kept (B, T), 1.0 or 0.0, and what the predictor says of it."""
        counts = kept.sum(0)
        if docs is not None:
            counts = torch.zeros_like(counts).scatter_add_(
                0, docs.places().flatten(), kept.flatten()
            )
        own = {"mod.tokens": kept.new_full((), kept.numel()), "mod.counts": counts}
        bce = kept.new_zeros(())
        agree = kept
        if logit is not None:
            bce = F.binary_cross_entropy_with_logits(logit, kept, reduction="sum")
            loss = self.BCE_WEIGHT * bce
            own["loss"] = loss + inner.get("loss", 0.0)
            bce = loss.detach() / self.BCE_WEIGHT
            agree = ((logit > 0) == (kept > 0)).float()
        own |= {"mod.bce": bce, "mod.agree": agree.sum()}
        if not self.training:
            own |= {"kept": kept > 0, "agree": agree > 0}
        return own

    def causal_choice(self, at, logit):
        """(B, T) bool for tokens at positions `at` (B, T): each decided by itself."""
        if self.routing == "learned":
            return logit > 0
        if self.routing == "static":
            return at * self.tokens // self.full != (at - 1) * self.tokens // self.full
        return hashed(at, self.layer) < math.ceil(self.capacity * 2**32)

    def causal_forward(self, x, branch, inputs, score, logit):
        """By the causal rule. Rows keep different numbers, so here the host looks."""
        B, T, _ = x.shape
        cache, docs = inputs.cache, inputs.docs
        at = inputs.pos if docs is None else docs.places()
        at = at.expand(B, T)  # in decoding it is that already
        keep = self.causal_choice(at, logit)  # (B, T) bool
        if cache is not None:
            keep = keep & (inputs.slots < cache.length)  # padding
        stats = {"kept": keep, "agree": torch.ones_like(keep)}
        if logit is not None:
            stats["agree"] = keep == self.choose(x, score, docs)[0]
        n = int(keep.sum(1).max())
        if n == 0 and self.collective_free:
            return torch.zeros_like(x), stats
        idx, real = first(keep, max(1, n))
        chosen = {"pos": at.gather(1, idx)}
        if cache is not None:  # others than those go to the spare slot, which nobody reads
            chosen["slots"] = inputs.slots.gather(1, idx).masked_fill(~real, cache.length)
        y, inner = compute(x, branch, inputs._replace(**chosen), idx, score, real)
        return y, inner | stats


def compute(x, branch, inputs, idx, score, real=None):
    """(The branch's change to the tokens idx (B, n) of x (B, T, C), elsewhere zero; stats). score
    (B, T) weighs it; real (B, n) bool: whose counts."""
    B, T, C = x.shape
    rows = (idx + torch.arange(0, B * T, T, device=x.device)[:, None]).flatten()  # (B n,)
    taken = TakeRows.apply(x.flatten(0, 1), rows).view(*idx.shape, C)
    docs = inputs.docs
    if docs is not None:
        docs = docs.chosen(idx, real, inputs.backend, x.dtype)
    y, stats = branch(taken, inputs._replace(rope=rope_of(inputs.rope, idx), docs=docs))
    if score is not None:
        # 1 where the score is 0, so that at first MoD changes little
        y = y * (2 * score.gather(1, idx).sigmoid()).to(y.dtype)[..., None]
    if real is not None:
        # not times zero: without a key to look at, attention gives NaN
        y = torch.where(real[..., None], y, 0.0)
    return PutRows.apply(y.flatten(0, 1), rows, B * T).view(B, T, C), stats


def first(keep, n: int):
    """The positions that keep (B, T) marks, in order, then others that fill the row up: (B, n); and
    which of them are marked, (B, n) bool."""
    idx = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :n]
    return idx, keep.gather(1, idx)


def rope_of(rope, idx):
    """cos and sin (T or B, T, 1, D/2) of the chosen positions idx (B, n): (B, n, 1, D/2)."""
    rows = torch.arange(len(idx), device=idx.device)[:, None]
    return tuple(t[idx] if t.dim() == 3 else t[rows, idx] for t in rope)


def highest(score: torch.Tensor, n: int) -> torch.Tensor:
    """Where the n highest scores of each row are, (B, n), of equal ones the earlier.

    In the first layer equal tokens score equally but for rounding, which depends on the batch: so
    scores count as equal in steps of 2^-12.
    """
    steps = (score.detach() * 4096).round()
    return steps.sort(dim=1, descending=True, stable=True).indices[:, :n]


def hashed(pos: torch.Tensor, layer: int) -> torch.Tensor:
    """A whole number in [0, 2^32) for each position, the same in every run."""
    h = (pos * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B) % (1 << 32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D % (1 << 32)
    return h ^ (h >> 12)  # whole: MPS has no fp64, and fp32 would round it
