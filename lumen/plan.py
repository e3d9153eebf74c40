"""What this machine is, and the arithmetic before a run: parameters, FLOPs, memory, time. `python -m lumen.machine`.

Takes a ModelConfig and plain numbers, never the run's configuration; `python train.py CONFIG --dry_run` prints it all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lumen.errors import UserError
from lumen.forecast import BAND
from lumen.machine import describe
from model import ModelConfig, Transformer, head_rows


def kept_bytes(
    cfg: ModelConfig, rows: int, precision: str, recompute="none", arrive: float = 0.0, cuda=True
) -> dict:
    """Bytes beside the weights of a step on `rows` rows of T tokens: activations, and what comes and goes.

    activations: what backward needs under recompute none | selective (all but products) | block (everything), and of
    the largest block all; kept, again, attention: the same layer by layer. head: while the loss is made, chunks of
    logits and both gradients. rows, travel: in and to the experts while a layer of them is in backward. `arrive`: with
    expert parallelism so many times the fair share of rows come to this rank; 0: its own stay here. `cuda`: see
    model.head_rows.
    """
    b = 4 if precision == "fp32" else 2
    C, q, kv, F = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim, cfg.d_ff
    K, width, slots = cfg.n_experts_per_token, cfg.d_expert, cfg.n_experts_max or cfg.n_experts
    N, norm = (
        rows * cfg.max_seq_len,
        C * (4 + 2 * b),
    )  # the norm's fp32 input; normalized; times weight
    qk = (q + kv) * (b + (4 if b == 2 else 0)) if cfg.qk_norm else 0
    attn = (
        norm * (cfg.norm_order == "pre") + qk + b * ((q + 2 * kv) + (q + kv) + q)
    )  # qkv; rotated; output
    dropout = C if cfg.dropout else 0
    # probabilities in fp32 (sigmoid: and normalised; with a z-loss the logits too); gates, choices and their order;
    # the experts keep their pre-activation alone; a shared one is a SwiGLU
    n, share = slots + cfg.n_null_experts, arrive or 1.0
    scores = n * 4 * (1 + (cfg.router == "sigmoid") + (cfg.router_z_loss_weight > 0))
    experts = (
        scores
        + K * (3 * 4 + 3 * 8)
        + b * K * 2 * width * share
        + b * 4 * cfg.n_shared_experts * width
    )
    experts += K * (b * C + 3 * 8) * arrive  # rows that came, their order
    # selective keeps what products, attention and topk gave
    products_attn = b * ((q + 2 * kv) + q + C) + 4 * cfg.n_heads
    products = {
        False: b * (2 * F + C),
        True: 4 * n + 12 * K + b * (C * max(1, K * arrive) + K * 2 * width * share),
    }
    products[True] += b * (2 * cfg.n_shared_experts * width + C) * (cfg.n_shared_experts > 0)
    layers, kept, attention = (
        [],
        [],
        [],
    )  # all of it; what recomputation keeps; attention's share of all
    for i in range(cfg.n_layers):
        moe, c, first = cfg.is_moe(i), cfg.capacity(i), attn + dropout
        c = 1.0 if cfg.mod_anneal_steps else c  # annealed: it begins whole
        second = norm + (experts if moe else b * 4 * F) + dropout  # gate and up; silu; product
        outer = 1 if c < 1 and cfg.mod_ffn_only else c
        if c < 1:  # MoD
            learned = (
                cfg.mod_routing == "learned"
            )  # its fp32 input and that normalized, of every token; ungated change
            second = c * (second + b * C * learned) + 8 * C * learned
            first *= outer
        layers.append(round(N * (first + second)))
        attention.append(round(N * first))
        kept.append(
            round(
                N
                * (b * C + (recompute == "selective") * (outer * products_attn + c * products[moe]))
            )
        )
    again = layers  # what is there while a block is in backward, beside what all blocks keep
    if recompute == "none":
        kept, again = layers, [0] * cfg.n_layers
    elif recompute == "selective":  # what was kept is not made again
        again = [a - k + N * b * C for a, k in zip(layers, kept)]
    table = cfg.vocab_size * C
    head = min(head_rows(cfg.vocab_size, cuda), N) * cfg.vocab_size * 4 + table * 4 + N * C * b
    if (
        b == 2
    ):  # the logits as computed; a chunk's gradient of the table (its copy to fp32 on a CPU is not counted)
        head += min(head_rows(cfg.vocab_size, cuda), N) * cfg.vocab_size * b + table * b
    moe = any(map(cfg.is_moe, range(cfg.n_layers)))
    return {
        "activations": N * norm + sum(kept) + max(again),
        "kept": kept,
        "again": again,
        "attention": attention,
        "head": head,
        "rows": round(N * K * b * (4 * width + C) * share) * moe,
        "travel": round(N * K * b * C * share) * (arrive > 0),
    }


def memory(
    cfg: ModelConfig, n_params: int, rows: int, precision: str, recompute="none", cuda=True
) -> dict[str, int]:
    """Estimated bytes of a training step on one device: the parts and their total.

    states: weights, gradients and both moments in fp32, 16 per parameter (expert slots not in use included), and 2 more
    for the 16-bit copies of weights that backward needs (experts make theirs anew, a layer at a time). activations:
    what `rows` rows of T tokens keep for backward. work: a chunk of logits, or the backward pass of a layer of experts.
    """
    b, kept = (
        4 if precision == "fp32" else 2,
        kept_bytes(cfg, rows, precision, recompute, cuda=cuda),
    )
    layer = (
        (cfg.n_experts_max or cfg.n_experts) * 3 * cfg.d_model * cfg.d_expert
    )  # numbers in the experts of a layer
    moe = sum(map(cfg.is_moe, range(cfg.n_layers)))
    work = layer * (4 + (b if b == 2 else 0)) + kept["rows"]  # gradients and 16-bit copies; rows
    parts = {
        "states": n_params * 16 + (2 * (n_params - moe * layer) if b == 2 else 0),
        "activations": kept["activations"],
        "work": max(kept["head"], work if moe else 0),
    }
    return parts | {"total": sum(parts.values())}


def on_meta(cfg: ModelConfig) -> Transformer:
    """The model without memory: for counting."""
    with torch.device("meta"):
        return Transformer(cfg)


# ---------------------------------------------------------------- many processes, simulated

IMBALANCE = 1.25  # rows of the busiest rank with expert parallelism, times the fair share
SIZES = (24, 40, 80, 141, 192)  # GB of GPUs on the market
RECOMPUTE = ("none", "selective", "block")


@dataclass(frozen=True)
class Layout:
    """How a model lies on `world` processes; names and meanings of the keys of train_fsdp.py, as plain numbers."""

    world: int = 1
    zero_stage: int = 0
    hsdp_shard_size: int = 0
    expert_parallel: int = 1
    reduce_bytes: int = 4
    cuda: bool = True  # GPUs: their loss holds more logits at a time than a CPU's

    def check(self, slots: int) -> Layout:
        """UserError E002 for a mesh that does not divide the world, or experts that do not divide."""
        world, size, ep = self.world, self.hsdp_shard_size, self.expert_parallel
        if size and world % size:
            raise UserError("E002", f"hsdp_shard_size: {size} does not divide the {world} ranks")
        if size == 1 and self.zero_stage:
            raise UserError(
                "E002", "hsdp_shard_size: 1 leaves nothing to share: that is zero_stage: 0"
            )
        if world % ep:
            raise UserError("E002", f"expert_parallel: {ep} does not divide the {world} ranks")
        if ep > 1 and (not slots or slots % ep):
            raise UserError(
                "E002", f"expert_parallel: {ep} does not divide the {slots} experts of a layer"
            )
        if ep > 1 and 0 < size < world:
            raise UserError(
                "E002",
                "expert_parallel and hsdp_shard_size do not go together (never built): drop one",
            )
        return self

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the dense weights."""
        return (self.hsdp_shard_size or self.world) if self.zero_stage else 1

    def __str__(self):
        dense = f"{self.world // self.shard} x {self.shard} (replicate, shard)"
        ep = self.expert_parallel
        return dense + (f"; experts {self.world // ep} x {ep} (shard, experts)" if ep > 1 else "")


@functools.lru_cache(maxsize=8)
def shapes(model: Transformer) -> tuple[tuple, list[tuple]]:
    """(name, shape) of the root's parameters; the same of each block's."""

    def of(named):
        return tuple((name, tuple(p.shape)) for name, p in named)

    blocks = [of(block.named_parameters()) for block in model.blocks]
    return of(x for x in model.named_parameters() if not x[0].startswith("blocks.")), blocks


def count(model: Transformer) -> int:
    """Parameters in all."""
    root, blocks = shapes(model)
    return sum(math.prod(shape) for block in (root, *blocks) for _, shape in block)


@functools.lru_cache(maxsize=8)
def training_flops(model: Transformer) -> int:
    return model.flops_per_token()


def cut(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension along which a parameter is cut into `ranks` parts: its first; of experts' (E, a, b) the first that
    divides evenly, so that a thousand ranks can share sixty-four experts."""
    return next((i for i, n in enumerate(shape) if n % ranks == 0), 0) if len(shape) == 3 else 0


class Unit(NamedTuple):
    """Parameters that are gathered together: FSDP2 cuts each into `ranks` parts."""

    shapes: tuple  # of its parameters
    ranks: int
    stride: int  # between neighbours of the group
    size: int  # bytes of a number while gathered

    def local(self, rank: int = 0) -> int:
        """Numbers that the rank-th of the group holds; the first holds most (torch.chunk)."""
        total = 0
        for shape in self.shapes:
            n = shape[cut(shape, self.ranks)]
            part = -(-n // self.ranks)
            total += max(0, min(part, n - rank * part)) * (math.prod(shape) // n)
        return total

    def padded(self) -> int:
        """Numbers while gathered: every part as large as the first."""
        return self.local() * self.ranks

    def gathered(self) -> int:
        """Bytes while gathered."""
        return self.padded() * self.size


@functools.lru_cache(maxsize=4096)
def units(
    model: Transformer, layout: Layout, precision: str
) -> tuple[Unit, list[tuple[Unit, ...]]]:
    """What train_fsdp.parallelize makes: the root unit, and the units of each block."""
    b, ep, made = 4 if precision == "fp32" else 2, layout.expert_parallel, {}
    root, blocks = shapes(model)
    for block in set(blocks):
        parts = {"block": [], "router": [], "experts": []}
        for name, shape in block:
            apart = "experts" if ".experts." in name and ep > 1 else "block"
            apart = "router" if b < 4 and (".router." in name or ".predictor." in name) else apart
            parts[apart].append((shape[0] // ep, *shape[1:]) if apart == "experts" else shape)
        own = [
            Unit(tuple(parts["block"]), layout.shard, 1, b),
            Unit(tuple(parts["router"]), layout.shard, 1, 4),
        ]
        own.append(Unit(tuple(parts["experts"]), layout.world // ep, ep, b))
        made[block] = tuple(u for u in own if u.shapes)
    return Unit(tuple(shape for _, shape in root), layout.shard, 1, 4), [
        made[block] for block in blocks
    ]


def rank_memory(
    model,
    layout: Layout,
    rows: int,
    steps: int,
    precision: str,
    recompute="none",
    imbalance=1.0,
    seen=False,
):
    """Estimated bytes at the peak of the rank that holds most, with `rows` rows in each of `steps` micro-steps.

    weights, moments, gradients: fp32, the rank's part. gathered: units in use and the one under way, in the compute
    dtype (root and routers fp32). reducing: gradients on their way to their owners. activations, work: see kept_bytes.
    The peak is the largest of: the loss, the backward pass of each block and of the root, the optimizer. Not in it:
    what the driver, the communication library and the allocator's gaps take. `seen`: only what train_fsdp.fake_run
    can see: no moments, not what the experts' operator allocates inside, logits in the smaller chunks of a CPU.
    """
    cfg, b, zero3 = model.cfg, 4 if precision == "fp32" else 2, layout.zero_stage == 3
    if layout.shard == 1:  # replicated: train.py
        n = count(model)
        parts = memory(cfg, n, rows, precision, recompute, layout.cuda)
        held = {
            "weights": 4 * n,
            "moments": 8 * n,
            "gradients": 4 * n,
            "gathered": parts["states"] - 16 * n,
        }
        held |= {"reducing": 4 * min(n, 1 << 22) * (layout.world > 1)}
        held |= {"activations": parts["activations"], "work": parts["work"]}
        return held | {"total": sum(held.values()), "peak": "backward"}
    root, blocks = units(model, layout, precision)
    arrive = imbalance if layout.expert_parallel > 1 else 0.0
    kept = kept_bytes(cfg, rows, precision, recompute, arrive, layout.cuda and not seen)
    table, stream = 4 * cfg.vocab_size * cfg.d_model, rows * cfg.max_seq_len * cfg.d_model * b
    sizes = {
        block: [sum(f(u) for u in block) for f in (Unit.local, Unit.padded, Unit.gathered)]
        for block in blocks
    }
    own, padded, gathered = zip(*(sizes[block] for block in blocks))
    mine = 4 * (root.local() + sum(own))
    everything = 0 if zero3 else sum(gathered)
    waiting = (
        layout.reduce_bytes * (root.padded() + sum(padded)) * (layout.zero_stage == 1 and steps > 1)
    )

    def phase(name, gathered, reducing, activations, work, gradients=mine):
        gradients = mine if steps > 1 else gradients
        return {
            "gradients": gradients,
            "gathered": gathered + everything,
            "reducing": reducing + waiting,
        } | {"activations": activations, "work": work, "peak": name}

    lead = rows * cfg.max_seq_len * cfg.d_model * (4 + 2 * b)  # what the last norm keeps
    phases = [
        phase(
            "loss",
            root.gathered(),
            0,
            lead + sum(kept["kept"]),
            kept["head"] + table // 2 * (b < 4),
            0,
        )
    ]
    gone, there, flying = (
        0,
        sum(kept["kept"]),
        0,
    )  # bytes of gradients that are home, of activations, of those under way
    for i in reversed(range(cfg.n_layers)):
        # the next unit is on its way, or the last one's buffer is still there
        more = max(
            (u.gathered() for u in (*blocks[i][1:], *(blocks[i - 1] if i else ()))), default=0
        )
        held = root.gathered() + (gathered[i] + more) * zero3
        work = 2 * stream + (kept["travel"] + kept["rows"] * (not seen)) * cfg.is_moe(i)
        acts = there + kept["again"][i]
        there -= kept["kept"][i]
        name, most = f"backward of block {i}", max(u.gathered() for u in blocks[i])
        phases.append(
            phase(name, held, table + most + flying, acts, work, gone)
        )  # the head's gradient waits, too
        for u in reversed(blocks[i]):  # experts of their own come first, then what is left
            rest = there + kept["attention"][i] * (u is not blocks[i][0])
            flying = layout.reduce_bytes * u.padded()
            held -= u.gathered() * zero3
            phases.append(phase(name, held, table + u.gathered() + flying, rest, 2 * stream, gone))
            gone += 4 * u.local()
    ends = (4 + layout.reduce_bytes) * root.padded() + table * cfg.tie_embeddings
    phases += [phase("backward of the root", 0, ends, 0, stream), phase("optimizer", 0, 0, 0, 0)]
    most = max(phases, key=lambda p: sum(v for k, v in p.items() if k != "peak"))
    held = {"weights": mine, "moments": 0 if seen else 2 * mine} | most
    return held | {"total": sum(v for k, v in held.items() if k != "peak")}


def smallest(model, stage: int, rows_per_step: int, precision: str, room: float) -> int | None:
    """The least power of two of GPUs, up to 4096, on which some configuration fits into `room` bytes each."""
    slots = (model.cfg.n_experts_max or model.cfg.n_experts) if model.cfg.n_experts else 0
    for world in (1 << k for k in range(13)):
        if rows_per_step % world:
            return None
        for layout, rows, recompute in candidates(
            world, stage if world > 1 else 0, slots, rows_per_step
        ):
            if rows == 1 and recompute == "block":  # what needs least
                steps = rows_per_step // world
                if (
                    rank_memory(model, layout, rows, steps, precision, recompute, IMBALANCE)[
                        "total"
                    ]
                    <= room
                ):
                    return world
    return None


# ---------------------------------------------------------------- what does not fit

SURE = 1.1  # a run is refused only this far above the memory: measured, the estimate was at most 6.4 % too high


def misfit(
    model: Transformer,
    layout: Layout,
    rows: int,
    rows_per_step: int,
    how: tuple,
    have: float,
    share: float = 0.92,
) -> tuple[str, bool]:
    """Why a run cannot fit into `have` bytes a process, and what could, or ""; and whether that is beyond doubt.

    Beyond doubt are states (weights, gradients, moments: exact) above the memory, and an estimate SURE times it.
    how: (precision, recompute). What is named instead leaves room: it takes `share` of the memory.
    """
    per_rank, recompute, there = rows_per_step // layout.world, how[1], f"{have / 2**30:.1f} GiB"

    def need(rows, recompute):
        return rank_memory(model, layout, rows, per_rank // rows, how[0], recompute, IMBALANCE)

    now = need(rows, recompute)
    states, total = 4 * now["weights"], now["total"]
    if max(states, total) <= have:
        return "", False
    would = []
    for mode in RECOMPUTE[RECOMPUTE.index(recompute) :]:
        sizes = [
            r
            for r in range(1, rows + 1)
            if per_rank % r == 0 and need(r, mode)["total"] <= share * have
        ]
        words = [] if mode == recompute else [f"activation_checkpointing: {mode}"]
        if sizes and max(sizes) < rows:
            words.append(f"batch_size: {max(sizes)}")
        if sizes and words:
            would.append(" with ".join(words))
    text = f"about {total / 2**30:.1f} GiB a process, and there are {there}"
    if would:
        return f"{text}; {' or '.join(would)} would fit", total > SURE * have
    if states > have:
        text = f"weights, gradients and moments alone are {states / 2**30:.1f} GiB a process, and there are {there}:"
        text = f"{text} no batch_size helps"
    else:
        least = need(1, "block")["total"] / 2**30
        text = f"{text}, and one row with activation_checkpointing: block still needs about {least:.1f}"
    return f"{text}. {who_holds(model, layout, share)}", states > have or total > SURE * have


def who_holds(model: Transformer, layout: Layout, share: float) -> str:
    """The smallest GPU for whole copies and the fewest for parts, whatever the batch; in mixed_bf16, of one row."""
    need = rank_memory(model, Layout(), 1, 2, "mixed_bf16", "block")["total"]
    whole = next(
        (f"a GPU of {gb} GB" for gb in SIZES if need <= share * gb * 1e9), "more than any GPU has"
    )
    parts, _ = smallest_machines(model, layout.zero_stage or 3, 1 << 13, "mixed_bf16", share)
    return f"Whole copies need about {need / 2**30:.1f} GiB: {whole}; train_fsdp.py needs {' or '.join(parts)}"


# ---------------------------------------------------------------- how long to train

# L(N, D) = E + A/N^a + B/D^b: Besiroglu et al. 2024 (2404.10102), the refit of "Chinchilla" (Hoffmann et al. 2022).
# E, 1.8172 nats of another text and tokenizer, is not needed: only ratios of compute and tokens carry over.
LAW_A, LAW_B, LAW_a, LAW_b = 482.01, 2085.43, 0.3478, 0.3658
FITTED = {
    "parameters": (57e6, 16e9),
    "tokens": (0.25e9, 318e9),
    "FLOPs": (1.4e18, 1.3e22),
}  # where the law was fitted
REPEAT = 15.388  # epochs over which the worth of a repeat falls by 1/e: Muennighoff et al. 2023 (2305.16264)


def optimum(flops: float) -> tuple[float, float]:
    """(parameters, tokens) of the lowest loss at `flops` = 6ND: N = G (C/6)^(b/(a+b)), G = (aA/bB)^(1/(a+b))."""
    n = (LAW_a * LAW_A / (LAW_b * LAW_B)) ** (1 / (LAW_a + LAW_b)) * (flops / 6) ** (
        LAW_b / (LAW_a + LAW_b)
    )
    return n, flops / 6 / n


def effective_tokens(unique: float, tokens: float) -> float:
    """What `tokens` on `unique` ones are worth in fresh ones: U + U R (1 - e^-(epochs - 1)/R) (Muennighoff)."""
    return (
        tokens
        if tokens <= unique
        else unique * (1 + REPEAT * (1 - math.exp(-(tokens / unique - 1) / REPEAT)))
    )


def extra_compute(n_params: float, tokens: float, fresh: float | None = None) -> float:
    """Compute 6ND beyond the least that reaches the same loss, as a share: 0.08 is 8 % more. `fresh`: D's worth.

    On the optimal path A/N^a + B/D^b falls as C^-g, g = ab/(a+b), which inverts in closed form.
    """
    above = LAW_A * n_params**-LAW_a + LAW_B * (fresh or tokens) ** -LAW_b
    n, d = optimum(6.0)
    least = ((LAW_A * n**-LAW_a + LAW_B * d**-LAW_b) / above) ** (1 / LAW_a + 1 / LAW_b)
    return n_params * tokens / least - 1


def chinchilla(
    n_params_active: int,
    unique_tokens: int,
    planned_tokens: int,
    flops_per_token: float,
    multiplier: float = 20.0,
    moe: bool = False,
) -> dict:
    """Whether a run's length fits its model and data, in counts and ratios; the target: multiplier x active tokens."""
    n, unique, tokens = n_params_active, max(1, unique_tokens), max(1, planned_tokens)
    fresh, ratio, epochs = effective_tokens(unique, tokens), tokens / n, tokens / unique
    here = {"parameters": n, "tokens": tokens, "FLOPs": 6.0 * n * tokens}
    plan = {
        "n_params_active": n,
        "flops_per_token": flops_per_token,
        "unique_tokens": unique,
        "planned_tokens": tokens,
    }
    plan |= {
        "multiplier": multiplier,
        "moe": moe,
        "target_tokens": multiplier * n,
        "tokens_per_param": ratio,
    }
    plan |= {"epochs": epochs, "effective_tokens": fresh, "coverage": fresh / (multiplier * n)}
    plan |= {"last_epoch_value": math.exp(-max(0.0, epochs - 1) / REPEAT)}
    plan |= {"band": "below" if ratio < BAND[0] else "above" if ratio > BAND[1] else "inside"}
    plan |= {"extra_compute": extra_compute(n, tokens, fresh)}
    plan |= {"extrapolated": [k for k, (low, high) in FITTED.items() if not low <= here[k] <= high]}
    # parameters that the data fit: in 4 epochs, nearly as good as fresh; in 22, all that is worth repeating, and lean
    fits = (
        effective_tokens(unique, 4 * unique) / multiplier,
        effective_tokens(unique, 22 * unique) / BAND[0],
    )
    plan |= {"fitting_params": fits, "data_limited": unique < multiplier * n / 8}
    return plan


def plan_lines(plan: dict) -> list[str]:
    """The start-up lines on a chinchilla() plan, advice last."""
    p, d = plan, describe
    per_token, repeats = (
        d(p["flops_per_token"], "FLOP"),
        f" (repeats count as {d(p['effective_tokens'])} tokens)",
    )
    compute = f"needs {1 + p['extra_compute']:.3g} times the compute that the best size and length would need"
    if p["extra_compute"] < 0.05:
        compute = "no other size and length would need much less compute"
    far = (
        f"; extrapolated: {', '.join(p['extrapolated'])} outside the law's data"
        if p["extrapolated"]
        else ""
    )
    lines = [
        f"plan       {d(p['n_params_active'])} active parameters, {per_token} a token; {d(p['planned_tokens'])} tokens"
        f" planned, {d(p['unique_tokens'])} unique: {p['epochs']:.2f} epochs",
        f"plan       target {d(p['target_tokens'])} tokens, {p['multiplier']:g} a parameter: coverage"
        f" {100 * p['coverage']:.3g} %{repeats if p['epochs'] > 1 else ''}",
        f"plan       {p['tokens_per_param']:.3g} tokens a parameter, {p['band']} the flat band {BAND[0]} to {BAND[1]}:"
        f" {compute} for this loss{far}",
    ]
    if p["moe"]:
        lines += [
            "plan       that law is of dense models, on active parameters a lower bound: MoE usually wants more"
        ]
    if p["epochs"] > 4:
        lines += [
            f"advice     beyond 4 epochs repeats fade: a token of the last counts {p['last_epoch_value']:.2f}"
        ]
    if p["data_limited"]:
        low, high = map(d, p["fitting_params"])
        lines += [
            f"advice     data-limited: these tokens fit {low} (4 epochs) to {high} parameters; or add data"
        ]
    return lines


def auto_steps(
    n_params_active: int,
    unique_tokens: int,
    tokens_per_step: int,
    multiplier: float = 20.0,
    min_epochs: float = 0.0,
    max_epochs: float = 50.0,
) -> tuple[int, str]:
    """tokens_per_parameter: steps for `multiplier` tokens an active parameter, in epochs; and why."""
    target = multiplier * n_params_active
    wanted = target / max(1, unique_tokens)
    epochs = min(max(wanted, min_epochs), max_epochs)
    steps = max(1, round(epochs * unique_tokens / tokens_per_step))
    why = f"{multiplier:g} x {describe(n_params_active)} = {describe(target)} tokens are {describe(wanted)} epochs"
    if epochs != wanted:
        why += f", clamped to {'max' if epochs < wanted else 'min'}_epochs {epochs:g}"
    if epochs > 4:
        why += f", worth {effective_tokens(1, epochs):.3g} fresh ones"
    return steps, f"length     {steps:,} steps by tokens_per_parameter: {why}"


# ---------------------------------------------------------------- during the run


# ---------------------------------------------------------------- python -m lumen.machine


def candidates(
    world: int, stage: int, slots: int, rows_per_step: int, reduce_bytes: int = 4, cuda: bool = True
):
    """(layout, micro-batch, recompute) of every configuration that train_fsdp.py would take."""

    def divisors(n):
        return [k for k in range(1, n + 1) if n % k == 0]

    shapes = [(0, 1)]  # hsdp_shard_size, expert_parallel
    if stage:
        shapes += [(size, 1) for size in divisors(world)[1:-1]]
        shapes += [(0, ep) for ep in divisors(math.gcd(world, slots))[1:]]
    layouts = [Layout(world, stage, size, ep, reduce_bytes, cuda) for size, ep in shapes]
    for layout in layouts:
        for rows in divisors(rows_per_step // world) if rows_per_step % world == 0 else ():
            for recompute in RECOMPUTE:
                yield layout, rows, recompute


def smallest_machines(
    model, stage: int, rows_per_step: int, precision: str, share: float
) -> tuple[list[str], bool]:
    """The fewest GPUs of 80 and of 141 GB that hold it, as text; whether both sizes do."""
    found = {
        gb: smallest(model, stage, rows_per_step, precision, share * gb * 1e9) for gb in (80, 141)
    }
    return [f"{n or 'none'} x {gb} GB" for gb, n in found.items()], all(found.values())


YEAR = 365.25 * 86400


def span(seconds: float) -> str:
    """A length of time in the unit that one thinks of it in: 45 s, 3.2 hours, 40,000 years."""
    for unit, size in (("years", YEAR), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            n = float(f"{seconds / size:.3g}")
            return f"{n:,.0f} {unit}" if n >= 100 else f"{n:g} {unit}"
    return f"{seconds:.3g} s"
