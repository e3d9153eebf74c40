"""What a run knows of its sparse layers, and what it can do to their experts: statistics of MoE and
MoD as plain numbers, and the slots in which experts are split, pruned and recycled while training.

No tensor changes its shape: a model with model.n_experts_max has spare slots, and the optimizer's
state has rows for them from the first step. Errors are ValueError with what would work.
"""

from __future__ import annotations

import functools
import math

import torch

from lumen.resolve import flops_without_mod
from model_moe import MOD_SUMS, SUMS, MoD, MoE

NO_STEP = "this process has made no step yet; next(trainer.iterations()) makes one"

# ---------------------------------------------------------------- statistics


def expert_numbers(layers: dict[int, MoE], sums: dict) -> dict:
    """What expert_statistics needs, on the device: the sums of a step over all its micro-steps and
    ranks, as the model names them, and of the routers now moe.bias and moe.alive (layers, n)."""
    if not layers:
        return dict(sums)
    bias, alive = [], []
    for moe in layers.values():
        router = moe.router
        live = torch.ones_like(router.bias)
        if router.cfg.n_experts_max:
            live[: router.slots] = router.alive.float()
        if router.dropped_out is not None:
            live = live * ~router.dropped_out
        bias.append(router.bias)
        alive.append(live)
    return sums | {"moe.bias": torch.stack(bias), "moe.alive": torch.stack(alive)}


def expert_statistics(layers: list[int], numbers: dict, null: int = 0) -> dict:
    """Plain numbers from expert_numbers: {"layers": {layer: {...}}, and the same over all layers}.

    per_expert_utilization: share of the choices (None for an empty slot, and for one that expert
    dropout left out); routing_entropy: of these shares, nats, at most max_entropy;
    load_balance_loss: unweighted, 1.0 when balanced; tokens: how many were routed; tokens_dropped:
    choices beyond the capacity; max_violation: largest load / mean load - 1; dead: experts below a
    tenth of their fair share; bias_range; confidence: mean of the largest probability;
    token_entropy: mean entropy of a token's probabilities, nats; router_z: mean of
    logsumexp(logits)^2; null_share: of the last `null` columns.
    """
    names = (*SUMS, "counts", "bias", "alive")
    columns = {name: numbers[f"moe.{name}"].double().tolist() for name in names}
    by_layer = {}
    for i, layer in enumerate(layers):
        one = {name: column[i] for name, column in columns.items()}
        by_layer[layer] = layer_statistics(one, null)
    found = {}
    for key in by_layer[layers[0]]:
        found[key] = over_layers(key, [one[key] for one in by_layer.values()])
    return found | {"layers": by_layer}


def layer_statistics(sums: dict, null: int) -> dict:
    """Of one layer: SUMS, counts, bias and alive as plain numbers and lists."""
    choices, tokens = max(1.0, sum(sums["counts"])), max(1.0, sums["tokens"])
    share = []
    for count, alive in zip(sums["counts"], sums["alive"]):
        share.append(count / choices if alive else None)
    experts, nulls = share[: len(share) - null], share[len(share) - null :]
    real = [s for s in share if s is not None]
    biases = [b for b, alive in zip(sums["bias"], sums["alive"]) if alive]
    return {
        "per_expert_utilization": experts,
        "routing_entropy": -sum(s * math.log(s) for s in real if s > 0),
        "max_entropy": math.log(len(real)),
        "load_balance_loss": sums["balance"] / tokens,
        "tokens": int(sums["tokens"]),
        "tokens_dropped": int(sums["dropped"]),
        "max_violation": max(real) * len(real) - 1,
        "dead": sum(s is not None and s < 0.1 / len(real) for s in experts),
        "bias_range": [min(biases), max(biases)],
        "confidence": sums["confidence"] / tokens,
        "token_entropy": sums["entropy"] / tokens,
        "router_z": sums["z"] / tokens,
        "null_share": float(sum(s for s in nulls if s is not None)),
    }


def over_layers(key: str, values: list):
    """One number for all layers: counts add up, the rest are means, of ranges the widest."""
    if key == "per_expert_utilization":  # slot by slot, over the layers in which it is alive
        slots = []
        for slot in zip(*values):
            alive = [share for share in slot if share is not None]
            slots.append(sum(alive) / len(alive) if alive else None)
        return slots
    if key == "bias_range":
        return [min(low for low, _ in values), max(high for _, high in values)]
    if key == "max_violation":
        return max(values)
    if isinstance(values[0], int):
        return sum(values)
    return sum(values) / len(values)


def mod_statistics(layers: dict[int, MoD], sums: dict, n_layers: int, saved: float) -> dict:
    """Plain numbers from mod.NAME (layers,) and mod.counts (layers, T) of a step; `saved` is the
    share of FLOPs saved.

    average_depth counts layers, average_depth_fraction is its share of n_layers; per_layer_usage:
    share of tokens each MoD layer computed; position_usage: how often each position was kept, mean
    over these layers.
    """
    column = {name: sums[f"mod.{name}"].double().tolist() for name in (*MOD_SUMS, "counts")}
    counts, seen = column["counts"], column["tokens"]
    usage, agree, position = {}, [], [0.0] * len(counts[0])
    for i, layer in enumerate(layers):
        tokens = max(1.0, seen[i])
        usage[layer] = sum(counts[i]) / tokens
        agree.append(column["agree"][i] / tokens)
        for at, kept in enumerate(counts[i]):  # each position was there tokens / T times
            position[at] += kept * len(position) / tokens / len(layers)
    processed = sum(map(sum, counts))
    depth = n_layers - sum(1 - share for share in usage.values())
    return {
        "capacity_factor": sum(mod.capacity for mod in layers.values()) / len(layers),
        "tokens_processed": int(processed),
        "tokens_skipped": int(sum(seen) - processed),
        "average_depth": depth,
        "average_depth_fraction": depth / n_layers,
        "per_layer_usage": usage,
        "compute_savings": saved,
        "predictor_agreement": sum(agree) / len(agree),
        "predictor_loss": sum(column["bce"]) / max(1.0, sum(seen)),
        "position_usage": position,
    }


class Routing:
    """What went where in a model's sparse layers, as plain numbers."""

    def __init__(self, model):
        self.model = model
        self.moe, self.mod = model.sparse_layers("moe"), model.sparse_layers("mod")  # by layer
        self.sums: dict | None = None  # of the last step, as the model names them

    @functools.cached_property
    def flops_without_mod(self) -> float:
        return flops_without_mod(self.model.cfg)

    def numbers(self) -> dict:
        """What statistics() needs of the last step, on the device."""
        return expert_numbers(self.moe, self.sums)

    def statistics(self, sums: dict) -> dict:
        """{"experts": ..., "depth": ...}, as far as `sums` holds them; see expert_statistics and
        mod_statistics."""
        cfg, found = self.model.cfg, {}
        if "moe.counts" in sums:
            found["experts"] = expert_statistics(list(self.moe), sums, cfg.n_null_experts)
        if "mod.counts" in sums:
            saved = 1 - self.model.flops_per_token() / self.flops_without_mod
            found["depth"] = mod_statistics(self.mod, sums, cfg.n_layers, saved)
        return found

    def ask(self, kind: str) -> dict:
        """Of the last step, over all ranks: "experts" or "depth". E308 where there is none."""
        names = {
            "experts": (self.moe, "MoE: set model.n_experts"),
            "depth": (self.mod, "MoD: set model.mod_capacity"),
        }
        layers, remedy = names[kind]
        if not layers:
            return {"refused": "E308", "reason": f"this model has no layer of {remedy}"}
        if self.sums is None:
            return {"refused": "E308", "reason": NO_STEP}
        return self.statistics(self.numbers())[kind]


def anneal_depth(model, step: int) -> None:
    """MoD's capacity at a step: from 1.0 to its target in eight equal steps over
    cfg.mod_anneal_steps."""
    done = 1.0
    if model.cfg.mod_anneal_steps:
        done = min(1.0, 8 * step // model.cfg.mod_anneal_steps / 8)
    for mod in model.sparse_layers("mod").values():
        capacity = 1 - (1 - mod.target) * done
        if capacity != mod.capacity:
            mod.set_capacity(capacity)


def draw_dropout(layers: list[MoE], seed: int) -> None:
    """Leave experts out for one step: each layer draws its own, at least K stay."""
    device, n = layers[0].router.bias.device, layers[0].router.slots
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(layers))]
    draws = torch.stack([torch.rand(n, generator=g) for g in generators])  # (layers, S)
    if device.type == "cuda":
        draws = draws.pin_memory().to(device, non_blocking=True)
    else:
        draws = draws.to(device)
    for moe, draw in zip(layers, draws):
        router, cfg = moe.router, moe.router.cfg
        can = torch.ones_like(draw, dtype=torch.bool)
        if cfg.n_experts_max:  # of two siblings only one can be chosen, so only the first counts
            first = router.sibling >= torch.arange(router.slots, device=draw.device)
            can = router.alive & (first | ~router.alive[router.sibling])
        lowest = draw.masked_fill(~can, math.inf).topk(cfg.n_experts_per_token, largest=False)
        if router.dropped_out is None:
            router.dropped_out = torch.zeros_like(router.bias, dtype=torch.bool)
        out = draw >= 1 - router.expert_dropout
        router.dropped_out[: router.slots] = out.scatter(0, lowest.indices, False)


@torch.no_grad()
def update_balance(layers: list[MoE], counts: list[torch.Tensor], bad: torch.Tensor) -> None:
    """After an optimizer step, from each layer's choices per column (n,) over all micro-steps and
    ranks: the load shares, by which experts are split and pruned, and the selection bias,
    b += rate * sign(mean - count), centred (Wang et al. 2024).

    Nothing changes where `bad`, a 0-d bool: that step was dropped. No host sync.
    """
    for moe, count in zip(layers, counts):
        router = moe.router
        count = count.float()
        live = torch.ones_like(router.bias)
        if router.cfg.n_experts_max:
            live[: router.slots] = router.alive.float()
        load = count / count.sum().clamp(min=1)
        out = router.dropped_out
        if out is not None:  # they had no chance: they keep what they had before
            load = torch.where(out, router.load, load * (router.load * ~out).sum())
        router.load.copy_(torch.where(bad, router.load, load))
        if router.bias_rate:
            mean = count.sum() / live.sum()
            bias = router.bias + router.bias_rate * torch.sign(mean - count) * live
            # without this the sum drifts (torchtitan issue 1506)
            bias = bias - (bias * live).sum() / live.sum() * live
            router.bias.copy_(torch.where(bad, router.bias, bias))


# ---------------------------------------------------------------- slots and surgery
# `rows` is the run's Parallel: its local, row and set_row reach one expert's row of a parameter, or
# of a tensor of its optimizer's state, wherever that row is. Sharded, they are collectives, so all
# of this is called on all ranks, with the same arguments.

# steps in which a pruned expert can be restored; before, its slot is not given to another
WINDOW = 200
# an expert with less than this part of its fair share carries no load
DEAD = 0.1
# steps between checks whether siblings have drifted apart: each is a host sync
RELEASE_EVERY = 50
# below this cosine of their weights siblings have drifted apart
MIN_COSINE = 0.98


def slots_of(moe: MoE) -> tuple[list[bool], list[int], list[int], list[float]]:
    """alive, sibling, retired, load as plain lists. ValueError when this model has no slots."""
    r = moe.router
    if not r.cfg.n_experts_max:
        text = "these experts are fixed; a run with slots has for example model.n_experts_max:"
        raise ValueError(f"{text} {r.cfg.n_experts + 1} (init_from takes the weights over)")
    return r.alive.tolist(), r.sibling.tolist(), r.retired.tolist(), r.load.tolist()


def restorable(alive: bool, retired: int, step: int) -> bool:
    """Whether a slot holds a pruned expert that can still come back."""
    return not alive and retired >= 0 and step - retired < WINDOW


def numbers_where(flags: list[bool]) -> list[int]:
    return [e for e, flag in enumerate(flags) if flag]


def require_alive(expert: int, alive: list[bool]) -> None:
    if not (0 <= expert < len(alive) and alive[expert]):
        raise ValueError(f"expert {expert} is not alive; alive: {numbers_where(alive)}")


def splittable(moe: MoE, step: int) -> list[int]:
    """Experts that can be split: alive, with no sibling, or one that is gone for good."""
    alive, sibling, retired, _ = slots_of(moe)
    single = []
    for e in numbers_where(alive):
        s = sibling[e]
        if s == e or not (alive[s] or restorable(alive[s], retired[s], step)):
            single.append(e)
    return single


def add_expert(
    moe: MoE, optimizer, step: int, rows, parent: int | None = None, seed: int = 0
) -> tuple[int, int]:
    """Split an expert, by default the one with the most load, into a free slot: (parent, slot).

    Both halves get the weights of the parent, router rows w + n and w - n with n at right angles to
    w and 2 % of its length, and exclude each other from being chosen until they drift apart: so the
    layer's output hardly moves, and they share the parent's tokens. Of the optimizer's state the
    child gets the second moments, its first ones are zero. ValueError without a free slot.
    """
    alive, sibling, retired, load = slots_of(moe)
    taken = [a or restorable(a, retired[e], step) for e, a in enumerate(alive)]
    if all(taken):
        text = f"no free slot of {len(alive)}"
        if not all(alive):
            soon = min(retired[e] + WINDOW for e, a in enumerate(alive) if not a)
            text += f"; the next is free at step {soon}"
        raise ValueError(f"{text}; a run with more has model.n_experts_max: {len(alive) + 1}")
    single = splittable(moe, step)
    if parent is None:
        if not single:
            text = "every expert has a sibling too like it"
            raise ValueError(f"{text}; train on before you split again")
        parent = max(single, key=lambda e: load[e])
    require_alive(parent, alive)
    if parent not in single:
        text = f"expert {parent} is still too like its sibling {sibling[parent]}"
        raise ValueError(f"{text}; train on or split another")
    slot = taken.index(False)
    split(moe, optimizer, parent, slot, seed, rows)
    return parent, slot


def moments(optimizer, p) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's tensors that have a row per expert as p has, p as the optimizer knows it."""
    state = optimizer.state.get(p, {})
    return [(n, t) for n, t in state.items() if torch.is_tensor(t) and t.shape == p.shape]


@torch.no_grad()
def split(moe: MoE, optimizer, parent: int, slot: int, seed: int, rows) -> None:
    """Make `slot` the sibling of `parent`; what was in it is gone."""
    r = moe.router
    # the parent's weights and second moments; of its momentum nothing: it belongs to where the
    # parent was going
    for p in (r.weight, moe.experts.w13, moe.experts.w2):
        mine = rows.local(p)
        rows.set_row(p, mine, slot, rows.row(p, mine, parent))
        for name, t in moments(optimizer, mine):
            value = rows.row(p, t, parent)
            rows.set_row(p, t, slot, 0.0 if name in optimizer.FRESH else value)
    # whoever had one of them as a sibling has none any more, and what was pruned cannot come back
    for e in (parent, slot):
        other = r.sibling[e].clone()
        r.sibling[other] = other
    # router rows w + n and w - n
    mine = rows.local(r.weight)
    w = rows.row(r.weight, mine, parent)
    n = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(w)
    n -= (n @ w) / (w @ w).clamp(min=1e-30) * w  # at right angles
    n *= 0.02 * w.norm() / n.norm()
    rows.set_row(r.weight, mine, parent, w + n)
    rows.set_row(r.weight, mine, slot, w - n)
    # the buffers
    r.bias[slot] = r.bias[parent]
    r.load[parent] /= 2
    r.load[slot] = r.load[parent]
    r.alive[slot] = True
    r.retired[slot] = -1
    r.sibling[slot] = parent
    r.sibling[parent] = slot


@torch.no_grad()
def prune_expert(
    moe: MoE, step: int, expert: int, force: bool = False, optimizer=None, rows=None
) -> None:
    """Take an expert out of the choice. Its weights stay for WINDOW steps (weight decay goes on,
    its momentum ends where an `optimizer` is given), so restore_expert can bring it back.

    ValueError when it is not alive, is needed for K choices, or carries load without `force`.
    """
    alive, sibling, _, load = slots_of(moe)
    r, K = moe.router, moe.router.cfg.n_experts_per_token
    require_alive(expert, alive)
    left = [e for e in numbers_where(alive) if e != expert]
    pairs = sum(sibling[e] != e and sibling[e] in left for e in left) // 2
    if len(left) - pairs < K:  # of two siblings a token can choose one
        text = f"every token chooses {K}, and {len(left)} would be left"
        raise ValueError(f"expert {expert} is needed: {text}")
    share = load[expert] * (sum(alive) + r.cfg.n_null_experts)
    if share >= DEAD and not force:
        text = f"carries {share:.2f} of a fair share; below {DEAD} it counts as dead (force)"
        raise ValueError(f"expert {expert} {text}")
    r.alive[expert] = False
    r.retired[expert] = step
    if optimizer is not None:
        for p in (r.weight, moe.experts.w13, moe.experts.w2):
            for name, t in moments(optimizer, rows.local(p)):
                if name in optimizer.FRESH:
                    rows.set_row(p, t, expert, 0.0)
    r.load[expert] = 0  # and if it had all of it, nobody has any until the next step counts
    r.load /= r.load.sum().clamp(min=1e-9)


@torch.no_grad()
def restore_expert(moe: MoE, step: int, expert: int) -> None:
    """Undo prune_expert. ValueError when its window has closed."""
    alive, _, retired, _ = slots_of(moe)
    inside = 0 <= expert < len(alive)
    if not (inside and restorable(alive[expert], retired[expert], step)):
        raise ValueError(f"expert {expert} was not pruned in the last {WINDOW} steps")
    moe.router.alive[expert] = True
    moe.router.retired[expert] = -1


def recycle_expert(
    moe: MoE, optimizer, step: int, rows, expert: int | None = None, seed: int = 0, parents=None
) -> tuple[int, int]:
    """Prune a dead expert (by default the one with the least load; or take a free slot) and split
    the hottest (of `parents`) into its slot: (parent, slot). Cannot be undone.

    ValueError when no expert is dead or none can be split.
    """
    alive, _, retired, load = slots_of(moe)
    if expert is None:
        expert = min(numbers_where(alive), key=lambda e: load[e])
    single = [e for e in splittable(moe, step) if e != expert and (parents is None or e in parents)]
    if not single:
        raise ValueError("no expert without a sibling is left to split; train on first")
    if not 0 <= expert < len(alive):
        raise ValueError(f"there is no slot {expert}, only 0 to {len(alive) - 1}")
    if restorable(alive[expert], retired[expert], step):
        until = retired[expert] + WINDOW
        raise ValueError(f"slot {expert} can still be restored, until step {until}")
    if alive[expert]:
        prune_expert(moe, step, expert)
    parent = max(single, key=lambda e: load[e])
    split(moe, optimizer, parent, expert, seed, rows)
    return parent, expert


@torch.no_grad()
def release_parted(layers: dict[int, MoE], step: int, rows, say) -> None:
    """Now and then: both halves of a split expert may be chosen once they have drifted apart."""
    if step % RELEASE_EVERY:
        return
    for layer, moe in layers.items():
        if not moe.router.cfg.n_experts_max:  # it has no slots
            return
        for a, b in release_siblings(moe, rows):
            text = f"siblings {a} and {b} have drifted apart, both can be chosen"
            say(f"experts    layer {layer}: {text}")


def release_siblings(moe: MoE, rows) -> list[tuple[int, int]]:
    """End the exclusion between siblings whose weights have drifted apart; returns those pairs.

    What rank 0 finds all ranks do: the sums on unlike machines differ in their last digits.
    """
    alive, sibling, _, _ = slots_of(moe)
    pairs = [(a, b) for a, b in enumerate(sibling) if a < b and alive[a] and alive[b]]
    if not pairs:
        return []
    released = []
    for a, b in pairs:
        dots = torch.zeros(3, device=moe.router.bias.device)  # a b, a a, b b
        for p in (moe.experts.w13, moe.experts.w2):
            one, other = rows.row(p, rows.local(p), a), rows.row(p, rows.local(p), b)
            dots += torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()])
        if dots[0] < MIN_COSINE * (dots[1] * dots[2]).sqrt():
            released.append((a, b))
    released = rows.broadcast(released)
    for a, b in released:
        moe.router.sibling[a] = a
        moe.router.sibling[b] = b
    return released
