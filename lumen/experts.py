"""TODO."""

from __future__ import annotations

import math

import torch

from model_moe import MOD_SUMS, SUMS, MoD, MoE


def expert_numbers(layers: dict[int, MoE], sums: dict) -> dict:
    """What expert_statistics needs, on the device: the sums of a step over all its micro-steps and ranks, as the model
    names them, and of the routers now: moe.bias and moe.alive (layers, n)."""
    bias, alive = [], []
    for moe in layers.values():
        r = moe.router
        live = torch.ones_like(r.bias)
        if r.cfg.n_experts_max:
            live[: r.slots] = r.alive.float()
        if r.dropped_out is not None:
            live = live * ~r.dropped_out
        bias.append(r.bias)
        alive.append(live)
    if not layers:
        return dict(sums)
    return sums | {"moe.bias": torch.stack(bias), "moe.alive": torch.stack(alive)}


def expert_statistics(layers: list[int], numbers: dict, null: int = 0) -> dict:
    """Plain numbers from expert_numbers: {"layers": {layer: {...}}, and the same keys over all layers}.

    per_expert_utilization: share of the choices (None for an empty slot, and for one dropped_out by expert_dropout);
    routing_entropy: of these shares, nats, at most max_entropy; load_balance_loss: unweighted, 1.0 when balanced;
    tokens: how many were routed; tokens_dropped: choices beyond the capacity; max_violation: largest load / mean load
    - 1; dead: experts below a tenth of their fair share; bias_range; confidence: mean of the largest probability;
    token_entropy: mean entropy of a token's probabilities, nats; router_z: mean of logsumexp(logits)^2.
    """
    out, n = {}, numbers["moe.counts"].shape[1]
    names = (*SUMS, "counts", "bias", "alive")
    columns = [numbers[f"moe.{name}"].double().tolist() for name in names]
    for layer, *row in zip(layers, *columns):
        sums = dict(zip(names, row))
        counts, bias, alive = sums["counts"], sums["bias"], sums["alive"]
        total, tokens = max(1.0, sum(counts)), max(1.0, sums["tokens"])
        share = [c / total if a else None for c, a in zip(counts, alive)]
        real, biases = [s for s in share if s is not None], [b for b, a in zip(bias, alive) if a]
        out[layer] = {
            "per_expert_utilization": share[: n - null],
            "routing_entropy": -sum(s * math.log(s) for s in real if s > 0),
            "max_entropy": math.log(len(real)),
            "load_balance_loss": sums["balance"] / tokens,
            "tokens": int(sums["tokens"]),
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


def mod_statistics(layers: dict[int, MoD], sums: dict, n_layers: int, saved: float) -> dict:
    """Plain numbers from the sums mod.NAME (layers,) and mod.counts (layers, T) of a step; `saved` is the share of
    FLOPs saved.

    average_depth counts layers, average_depth_fraction is its share of n_layers; per_layer_usage: share of tokens each
    MoD layer computed; position_usage: how often each position was kept, mean over these layers.
    """
    bce, agreeing, all_tokens, counts = (
        sums[f"mod.{name}"].double().tolist() for name in (*MOD_SUMS, "counts")
    )
    usage, agree, position = {}, [], [0.0] * len(counts[0])
    for layer, kept, agreed, tokens in zip(layers, counts, agreeing, all_tokens):
        tokens = max(1.0, tokens)
        usage[layer] = sum(kept) / tokens
        agree.append(agreed / tokens)
        part = [k * len(kept) / tokens / len(layers) for k in kept]
        position = [a + b for a, b in zip(position, part)]
    processed = sum(sum(kept) for kept in counts)
    depth = n_layers - sum(1 - u for u in usage.values())
    return {
        "capacity_factor": sum(mod.capacity for mod in layers.values()) / len(layers),
        "tokens_processed": int(processed),
        "tokens_skipped": int(sum(all_tokens) - processed),
        "average_depth": depth,
        "average_depth_fraction": depth / n_layers,
        "per_layer_usage": usage,
        "compute_savings": saved,
        "predictor_agreement": sum(agree) / len(agree),
        "predictor_loss": sum(bce) / max(1.0, sum(all_tokens)),
        "position_usage": position,
    }


WINDOW = (
    200  # steps for which a pruned expert can be restored; its slot is not given to another before
)
DEAD = 0.1  # an expert with less than this part of its fair share carries no load
APART = 0.98  # below this cosine of their weights siblings have parted


class Rows:
    """How surgery reaches row e, one expert's, of a parameter `p` or of a tensor of its optimizer's state; here all of
    them are on this process. See train_fsdp.Sharded for the other case: there every method is called on all ranks."""

    def local(self, p: torch.Tensor) -> torch.Tensor:
        """What the optimizer knows the parameter as."""
        return p

    def row(self, p, t: torch.Tensor, e: int) -> torch.Tensor:
        """A copy of row e of t, which is local(p) or of its shape."""
        return t[e].clone()

    def set_row(self, p, t: torch.Tensor, e: int, value) -> None:
        t[e] = value


def slots_of(moe: MoE) -> tuple[list[bool], list[int], list[int], list[float]]:
    """alive, sibling, retired, load as plain lists. ValueError when this model has no slots."""
    r = moe.router
    if not r.cfg.n_experts_max:
        text = "these experts are fixed; a run with slots has for example"
        raise ValueError(
            f"{text} model.n_experts_max: {r.cfg.n_experts + 1} (init_from takes the weights over)"
        )
    return r.alive.tolist(), r.sibling.tolist(), r.retired.tolist(), r.load.tolist()


def splittable(moe: MoE, step: int) -> list[int]:
    """Experts that can be split: alive, without a twin or one that could come back (see restore_expert)."""
    alive, sibling, retired, _ = slots_of(moe)
    gone = [not a and (retired[e] < 0 or step - retired[e] >= WINDOW) for e, a in enumerate(alive)]
    return [e for e, a in enumerate(alive) if a and (sibling[e] == e or gone[sibling[e]])]


def add_expert(
    moe: MoE, optimizer, step: int, parent: int | None = None, seed: int = 0, rows=None
) -> tuple[int, int]:
    """Split an expert, by default the one with the most load, into a free slot; returns (parent, slot).

    Both halves get the weights of the parent, router rows w + n and w - n with n at right angles to w and 2 % of its
    length, and exclude each other from being chosen until they have parted: so the layer's output hardly moves, and
    they share the parent's tokens. Of the optimizer's state the child gets the second moments,
    its first ones are zero. `rows`: see Rows. ValueError without a free slot.
    """
    alive, sibling, retired, load = slots_of(moe)
    free = [
        e for e, a in enumerate(alive) if not a and (retired[e] < 0 or step - retired[e] >= WINDOW)
    ]
    if not free:
        soon = [retired[e] + WINDOW for e, a in enumerate(alive) if not a]
        text = f"no free slot of {len(alive)}" + (
            f"; the next is free at step {min(soon)}" if soon else ""
        )
        raise ValueError(f"{text}; a run with more has model.n_experts_max: {len(alive) + 1}")
    single = splittable(moe, step)
    if parent is None:
        if not single:
            raise ValueError(
                "every expert has a twin that it has not parted from; train on before the next split"
            )
        parent = max(single, key=lambda e: load[e])
    elif not (0 <= parent < len(alive) and alive[parent]):
        raise ValueError(
            f"expert {parent} is not alive; alive: {[e for e, a in enumerate(alive) if a]}"
        )
    elif parent not in single:
        raise ValueError(
            f"expert {parent} has not parted from its twin {sibling[parent]} yet; train on or split another"
        )
    _split(moe, optimizer, parent, free[0], seed, rows or Rows())
    return parent, free[0]


def moments(optimizer, p) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's tensors that have a row per expert as p has, p as the optimizer knows it."""
    return [
        (n, t)
        for n, t in optimizer.state.get(p, {}).items()
        if torch.is_tensor(t) and t.shape == p.shape
    ]


@torch.no_grad()
def _split(moe: MoE, optimizer, parent: int, slot: int, seed: int, rows: Rows) -> None:
    r = moe.router
    for p in (r.weight, moe.experts.w13, moe.experts.w2):
        mine = rows.local(p)
        rows.set_row(p, mine, slot, rows.row(p, mine, parent))
        for name, t in moments(optimizer, mine):
            value = rows.row(
                p, t, parent
            )  # of the momentum nothing: it belongs to where the parent was going
            rows.set_row(p, t, slot, value if name.endswith("_sq") else 0.0)
    for e in (parent, slot):  # what was pruned cannot come back as a twin
        r.sibling[r.sibling[e]] = r.sibling[e].clone()
    mine = rows.local(r.weight)
    w = rows.row(r.weight, mine, parent)
    n = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(w)
    n -= (n @ w) / (w @ w).clamp(min=1e-30) * w
    n *= 0.02 * w.norm() / n.norm()
    rows.set_row(r.weight, mine, parent, w + n)
    rows.set_row(r.weight, mine, slot, w - n)
    r.bias[slot] = r.bias[parent]
    r.load[parent] /= 2
    r.load[slot] = r.load[parent]
    r.alive[slot], r.retired[slot] = True, -1
    r.sibling[slot], r.sibling[parent] = parent, slot


@torch.no_grad()
def prune_expert(
    moe: MoE, step: int, expert: int, force: bool = False, optimizer=None, rows=None
) -> None:
    """Take an expert out of the choice. Its weights stay for WINDOW steps (weight decay goes on, its momentum ends with
    `optimizer`), so restore_expert can bring it back. ValueError when it is not alive, is needed for K choices, or
    carries load and `force` is false."""
    alive, sibling, _, load = slots_of(moe)
    r, K = moe.router, moe.router.cfg.n_experts_per_token
    if not (0 <= expert < len(alive) and alive[expert]):
        raise ValueError(
            f"expert {expert} is not alive; alive: {[e for e, a in enumerate(alive) if a]}"
        )
    left = [e for e, a in enumerate(alive) if a and e != expert]
    if len(left) - sum(sibling[e] != e and sibling[e] in left for e in left) // 2 < K:
        raise ValueError(
            f"expert {expert} is needed: every token chooses {K}, and {len(left)} would be left"
        )
    share = load[expert] * (sum(alive) + r.cfg.n_null_experts)
    if share >= DEAD and not force:
        raise ValueError(
            f"expert {expert} carries {share:.2f} of a fair share; below {DEAD} it counts as dead (force)"
        )
    r.alive[expert], r.retired[expert] = False, step
    rows = rows or Rows()
    for p in (r.weight, moe.experts.w13, moe.experts.w2) if optimizer else ():
        for name, t in moments(optimizer, rows.local(p)):
            if not name.endswith("_sq"):
                rows.set_row(p, t, expert, 0.0)
    r.load[expert] = 0  # and if it had all of it, nobody has any until the next step counts
    r.load /= r.load.sum().clamp(min=1e-9)


@torch.no_grad()
def restore_expert(moe: MoE, step: int, expert: int) -> None:
    """Undo prune_expert. ValueError when its window has closed."""
    alive, _, retired, _ = slots_of(moe)
    if (
        not 0 <= expert < len(alive)
        or alive[expert]
        or retired[expert] < 0
        or step - retired[expert] >= WINDOW
    ):
        raise ValueError(f"expert {expert} was not pruned in the last {WINDOW} steps")
    moe.router.alive[expert], moe.router.retired[expert] = True, -1


def recycle_expert(
    moe, optimizer, step: int, expert: int | None = None, seed: int = 0, rows=None, parents=None
):
    """Prune a dead expert (default: the one with the least load) and split the hottest (of `parents`) into its slot; no
    tensor changes its shape. Cannot be undone. `expert` may be a free slot too. Returns (parent, slot). ValueError when
    no expert is dead or none can be split."""
    alive, _, retired, load = slots_of(moe)
    if expert is None:
        expert = min((e for e, a in enumerate(alive) if a), key=lambda e: load[e])
    single = [e for e in splittable(moe, step) if e != expert and (parents is None or e in parents)]
    if not single:
        raise ValueError("no expert without a twin is left to split; train on before")
    if not 0 <= expert < len(alive):
        raise ValueError(f"there is no slot {expert}, only 0 to {len(alive) - 1}")
    if alive[expert]:
        prune_expert(moe, step, expert)
    elif retired[expert] >= 0 and step - retired[expert] < WINDOW:
        raise ValueError(
            f"slot {expert} can still be restored, until step {retired[expert] + WINDOW}"
        )
    _split(moe, optimizer, max(single, key=lambda e: load[e]), expert, seed, rows or Rows())
    return moe.router.sibling[expert].item(), expert


@torch.no_grad()
def release_siblings(moe: MoE, agree=lambda pairs: pairs, rows=None) -> list[tuple[int, int]]:
    """End the exclusion between siblings whose weights have parted; returns those pairs. agree: what one rank found ->
    what all do, for sums on unlike machines differ."""
    alive, sibling, _, _ = slots_of(moe)
    siblings = [(a, b) for a, b in enumerate(sibling) if a < b and alive[a] and alive[b]]
    parted, rows = [], rows or Rows()
    for pair in siblings:
        a, b = pair
        dots = torch.zeros(3, device=moe.router.bias.device)
        for p in (moe.experts.w13, moe.experts.w2):
            one, other = (rows.row(p, rows.local(p), e) for e in pair)
            dots += torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()])
        if dots[0] < APART * (dots[1] * dots[2]).sqrt():
            parted.append((a, b))
    parted = agree(parted) if siblings else []
    for a, b in parted:
        moe.router.sibling[a], moe.router.sibling[b] = a, b
    return parted
