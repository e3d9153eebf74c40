"""The arithmetic before a run: parameters, memory, how many GPUs hold it, how long to train.

In this order: the bytes of a step on one device; how a model lies on many ranks; the peak of a
rank; how many GPUs hold it; the law of compute and tokens. It takes a ModelConfig and plain
numbers, never the run's configuration. `python train.py CONFIG --dry_run` prints all of it
(tools/simulate.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lumen import activations
from lumen.errors import UserError
from lumen.forecast import BAND
from lumen.machine import human_number
from lumen.optim import StateBytes
from lumen.tuning import PRETRAINING, Tuning, parts_of, states
from model import ModelConfig, Transformer, head_rows, role

GIB = 2**30
RECOMPUTE = ("none", "selective", "block")  # activation_checkpointing, from most memory to least


def number_bytes(precision: str) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if precision == "fp32" else 2


# ---------------------------------------------------------------- a step on one device


def kept_bytes(
    cfg: ModelConfig, rows, precision, recompute="none", arrive=0.0, cuda=True, tuning=PRETRAINING
) -> dict:
    """Bytes beside the weights of a step on `rows` rows of T tokens: activations, and what comes
    and goes.

    activations: what backward needs under recompute none | selective (all but matmuls) | block
    (everything), and of the largest block all; kept, again, attention: the same layer by layer.
    head: while the loss is made, chunks of logits and both gradients. rows, travel: in and to the
    experts while a layer of them is in backward. `arrive`: with expert parallelism so many times
    the fair share of rows come to this rank; 0: its own stay here. `cuda`: see model.head_rows.
    """
    b = number_bytes(precision)
    N, C = rows * cfg.max_seq_len, cfg.d_model
    # all of it; what recomputation keeps; attention's share of all
    layers, kept, attention = [], [], []
    for i in range(cfg.n_layers):
        first, second = activations.block(cfg, i, b, False, arrive, tuning)
        layers.append(round(N * (first + second)))
        attention.append(round(N * first))
        held = b * C  # the block's input
        if recompute == "selective":
            held += sum(activations.block(cfg, i, b, True, arrive, tuning))
        kept.append(round(N * held))
    again = layers  # what is there while a block is in backward, beside what all blocks keep
    if recompute == "none":
        kept, again = layers, [0] * cfg.n_layers
    elif recompute == "selective":  # what was kept is not made again
        again = [a - k + N * b * C for a, k in zip(layers, kept)]
    table = cfg.vocab_size * C
    chunk = min(head_rows(cfg.vocab_size, C, b, cuda), N) * cfg.vocab_size  # logits at a time
    head = chunk * 4 + table * 4 + N * C * b
    if cuda:  # one kernel makes the gradient where the logits are, as they were computed
        head = chunk * b + table * 4 + N * C * b
    elif b == 2:
        # the logits as computed; a chunk's gradient of the table (its copy to fp32 is not counted)
        head += chunk * b + table * b
    moe = any(map(cfg.is_moe, range(cfg.n_layers)))
    last_norm = C * (4 + 2 * b)
    own = cfg.n_experts_per_token * b * (4 * cfg.d_expert + C)  # bytes of a token's expert rows
    return {
        "activations": N * last_norm + sum(kept) + max(again),
        "kept": kept,
        "again": again,
        "attention": attention,
        "head": head,
        "rows": round(N * own * (arrive or 1.0)) if moe else 0,
        "travel": round(N * cfg.n_experts_per_token * b * C * arrive),
    }


def memory(
    cfg: ModelConfig,
    n_params: int,
    rows: int,
    precision: str,
    recompute="none",
    cuda=True,
    state_bytes: int = StateBytes().rest,
) -> dict[str, int]:
    """Estimated bytes of a training step on one device: the parts and their total.

    states: weights and gradients in fp32 and the optimizer's `state_bytes` a parameter (expert
    slots not in use included), and 2 more for the 16-bit copies of weights that backward needs
    (experts make theirs anew, a layer at a time). activations: what `rows` rows of T tokens keep
    for backward. work: a chunk of logits, or the backward pass of a layer of experts. `cuda`: see
    model.head_rows.
    """
    kept = kept_bytes(cfg, rows, precision, recompute, cuda=cuda)
    moe_layers = sum(cfg.is_moe(i) for i in range(cfg.n_layers))
    # numbers in the experts of one layer
    experts = (cfg.n_experts_max or cfg.n_experts) * 3 * cfg.d_model * cfg.d_expert
    states = (4 + 4 + state_bytes) * n_params  # weights, gradients, the optimizer's
    work = 4 * experts + kept["rows"]
    if precision != "fp32":
        states += 2 * (n_params - moe_layers * experts)
        work += 2 * experts
    parts = {
        "states": states,
        "activations": kept["activations"],
        "work": max(kept["head"], work) if moe_layers else kept["head"],
    }
    return parts | {"total": sum(parts.values())}


def on_meta(cfg: ModelConfig) -> Transformer:
    """The model without memory: for counting."""
    with torch.device("meta"):
        return Transformer(cfg)


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: Transformer) -> tuple[tuple, list[tuple]]:
    """(name, shape) of the root's parameters (embedding, last norm, head), and of each block's."""

    def named_shapes(named):
        return tuple((name, tuple(p.shape)) for name, p in named)

    blocks = [named_shapes(block.named_parameters()) for block in model.blocks]
    root = [x for x in model.named_parameters() if not x[0].startswith("blocks.")]
    return named_shapes(root), blocks


def all_shapes(model: Transformer) -> list[tuple]:
    root, blocks = parameter_shapes(model)
    return [one for part in (root, *blocks) for one in part]


def count_parameters(model: Transformer) -> int:
    """All of them, expert slots not in use included."""
    return sum(math.prod(shape) for _, shape in all_shapes(model))


def trained_parameters(model: Transformer, tuning: Tuning) -> int:
    """Those that have gradients, adapters among them."""
    return states(tuning, all_shapes(model), 4, StateBytes())["gradients"] // 4


# ---------------------------------------------------------------- a model on many ranks


@dataclass(frozen=True)
class Layout:
    """How a model and its optimizer lie on `world` processes: the keys of train_fsdp.py as plain
    numbers."""

    world: int = 1
    zero_stage: int = 0
    hsdp_shard_size: int = 0
    expert_parallel: int = 1
    reduce_bytes: int = 4  # of a gradient's number on its way
    cuda: bool = True  # GPUs: their loss holds more logits at a time than a CPU's
    state_bytes: StateBytes = StateBytes()  # of the optimizer: optim.state_bytes
    documents: bool = False  # rows hold several that do not see each other
    tuning: Tuning = PRETRAINING  # what is trained, and how the rest is held

    def check(self, slots: int) -> Layout:
        """Itself; E002 for a mesh that does not divide the world, or experts that do not divide."""
        world, size, ep = self.world, self.hsdp_shard_size, self.expert_parallel
        if size and world % size:
            raise UserError("E002", f"hsdp_shard_size: {size} does not divide the {world} ranks")
        if size == 1 and self.zero_stage:
            text = "hsdp_shard_size: 1 leaves nothing to share: that is zero_stage: 0"
            raise UserError("E002", text)
        if world % ep:
            raise UserError("E002", f"expert_parallel: {ep} does not divide the {world} ranks")
        if ep > 1 and (not slots or slots % ep):
            text = f"expert_parallel: {ep} does not divide the {slots} experts of a layer"
            raise UserError("E002", text)
        if ep > 1 and 0 < size < world:
            text = "expert_parallel and hsdp_shard_size do not go together (never built): drop one"
            raise UserError("E002", text)
        return self

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the dense weights; 1: every rank holds a replica."""
        return (self.hsdp_shard_size or self.world) if self.zero_stage else 1

    def __str__(self):
        text = f"{self.world // self.shard} x {self.shard} (replicate, shard)"
        if self.expert_parallel > 1:
            groups = self.world // self.expert_parallel
            text += f"; experts {groups} x {self.expert_parallel} (shard, experts)"
        return text


def cut_dimension(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension along which a parameter is cut into `ranks` parts: its first.

    Of experts' (E, a, b) the first that divides evenly, so that a thousand ranks can share
    sixty-four experts; where none does, the first.
    """
    if len(shape) == 3:
        for i, n in enumerate(shape):
            if n % ranks == 0:
                return i
    return 0


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
            n = shape[cut_dimension(shape, self.ranks)]
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
def fsdp_units(
    model: Transformer, layout: Layout, precision: str
) -> tuple[Unit, list[tuple[Unit, ...]]]:
    """What train_fsdp.parallelize makes: the root unit, and the units of each block, the block's
    own first."""
    b, ep = number_bytes(precision), layout.expert_parallel
    root, blocks = parameter_shapes(model)
    made = {}
    for block in set(blocks):  # most blocks are alike
        dense, routers, experts = [], [], []
        for name, shape in block:
            if role(name) == "expert" and ep > 1:
                experts.append((shape[0] // ep, *shape[1:]))
            elif role(name) == "router" and b < 4:
                routers.append(shape)  # they compute in fp32
            else:
                dense.append(shape)
        units = [
            Unit(tuple(dense), layout.shard, 1, b),
            Unit(tuple(routers), layout.shard, 1, 4),
            Unit(tuple(experts), layout.world // ep, ep, b),
        ]
        made[block] = tuple(unit for unit in units if unit.shapes)
    root_unit = Unit(tuple(shape for _, shape in root), layout.shard, 1, 4)
    return root_unit, [made[block] for block in blocks]


# ---------------------------------------------------------------- the peak of a rank

IMBALANCE = 1.25  # rows of the busiest rank with expert parallelism, times the fair share


class StepShape(NamedTuple):
    """How a rank takes a step."""

    rows: int  # of a micro-step
    micro_steps: int
    precision: str
    recompute: str = "none"


def rank_memory(
    model, layout: Layout, rows: int, steps: int, precision: str, recompute="none", imbalance=1.0
) -> dict:
    """Estimated bytes at the peak of the rank that holds most, with `rows` rows in each of `steps`
    micro-steps.

    weights, gradients: fp32, the rank's part; moments: the optimizer's state for it. gathered:
    units in use and the one under way, in the compute dtype (root and routers fp32). reducing:
    gradients on their way to their owners. activations, work: see kept_bytes. peak: the phase that
    holds most, of the loss, the backward pass of each block and of the root, the optimizer. Not in
    it: what the driver, the communication library and the allocator's gaps take.
    """
    step = StepShape(rows * layout.tuning.sides, steps, precision, recompute)
    if layout.shard == 1:
        held = replica_memory(model, layout, step)
    else:
        held = ShardedStep(model, layout, step, imbalance).peak()
    if layout.documents and layout.cuda and precision == "fp32":
        # no kernel that knows documents takes fp32, so there is a mask; by reading
        mask = 4 * step.rows * model.cfg.max_seq_len**2
        held["activations"] += mask
        held["total"] += mask
    return held


def replica_memory(model, layout: Layout, step: StepShape) -> dict:
    """rank_memory of train.py and finetune.py, where each rank holds all: see tuning.parts_of."""
    how = (step.rows, step.precision, step.recompute, 0.0, layout.cuda, layout.tuning)
    kept = kept_bytes(model.cfg, *how)
    how = (number_bytes(step.precision), step.recompute, layout.cuda, layout.state_bytes)
    held = parts_of(model.cfg, layout.tuning, all_shapes(model), kept, how)
    chunk = min(held["gradients"], 4 << 22)  # lumen.parallel.Parallel.CHUNK
    held["reducing"] = chunk if layout.world > 1 else 0
    work = layout.state_bytes.work(all_shapes(model), model.cfg, 1, step.precision)
    if work > sum(held[name] for name in ("gathered", "activations", "work")):
        held |= {"gathered": 0, "activations": 0, "work": work, "peak": "optimizer"}
    return {"peak": "backward"} | held | {"total": total_of(held)}


class ShardedStep:
    """The bytes of a step under FSDP2, phase by phase, on the rank that holds most."""

    def __init__(self, model, layout: Layout, step: StepShape, imbalance: float, all_visible=True):
        self.cfg, self.layout, self.step, self.all_visible = model.cfg, layout, step, all_visible
        self.root, self.blocks = fsdp_units(model, layout, step.precision)
        arrive = imbalance if layout.expert_parallel > 1 else 0.0
        cuda = layout.cuda and all_visible
        how = (step.rows, step.precision, step.recompute, arrive, cuda)
        self.kept = kept_bytes(model.cfg, *how)
        sums = {}  # of the units of a block; most blocks are alike
        for block in set(self.blocks):
            functions = (Unit.local, Unit.padded, Unit.gathered)
            sums[block] = [sum(f(unit) for unit in block) for f in functions]
        local, padded, gathered = zip(*(sums[block] for block in self.blocks))
        self.own = 4 * (self.root.local() + sum(local))  # this rank's weights; its gradients
        named, held = all_shapes(model), layout.state_bytes
        self.moments = round(self.own / 4 * held.mean(named)) if all_visible else 0
        self.optimizer_work = held.work(named, model.cfg, layout.shard, step.precision)
        self.gathered = gathered  # of each block
        self.table = 4 * self.cfg.vocab_size * self.cfg.d_model  # a gradient of the embedding
        N = step.rows * self.cfg.max_seq_len
        b = number_bytes(step.precision)
        self.stream = N * self.cfg.d_model * b  # the residual stream
        self.last_norm = N * self.cfg.d_model * (4 + 2 * b)  # what it keeps
        # stages 1 and 2 keep the blocks gathered for the whole step
        self.zero3 = layout.zero_stage == 3
        self.always_gathered = 0 if self.zero3 else sum(gathered)
        # stage 1 sums whole gradients over micro-steps before it sends them
        self.waiting = 0
        if layout.zero_stage == 1 and step.micro_steps > 1:
            self.waiting = layout.reduce_bytes * (self.root.padded() + sum(padded))

    def phase(self, name, gathered=0, reducing=0, activations=0, work=0, gradients=None) -> dict:
        """gradients: bytes that have come home; None, and from the second micro-step on: all."""
        if gradients is None or self.step.micro_steps > 1:
            gradients = self.own
        return {
            "gradients": gradients,
            "gathered": gathered + self.always_gathered,
            "reducing": reducing + self.waiting,
            "activations": activations,
            "work": work,
            "peak": name,
        }

    def peak(self) -> dict:
        """The phase that holds most."""
        layout, root = self.layout, self.root
        work = self.kept["head"]
        if self.step.precision != "fp32":
            work += self.table // 2
        activations = self.last_norm + sum(self.kept["kept"])
        phases = [self.phase("loss", root.gathered(), 0, activations, work, gradients=0)]
        phases += self.backward()
        reducing = (4 + layout.reduce_bytes) * root.padded()
        if self.cfg.tie_embeddings:
            reducing += self.table  # the head's and the embedding's
        phases.append(self.phase("backward of the root", 0, reducing, 0, self.stream))
        phases.append(self.phase("optimizer", work=self.optimizer_work))
        most = max(phases, key=total_of)
        held = {"weights": self.own, "moments": self.moments} | most
        return held | {"total": total_of(held)}

    def backward(self) -> list[dict]:
        """The phases of the blocks' backward passes, from the last to the first: of each block all
        of its activations are there first, then one unit after the other sends its gradients
        off."""
        root, kept, reduce_bytes = self.root, self.kept, self.layout.reduce_bytes
        phases = []
        home = flying = 0  # bytes of gradients that are with their owner; that are on their way
        left = sum(kept["kept"])  # bytes of activations
        for i in reversed(range(self.cfg.n_layers)):
            name, units = f"backward of block {i}", self.blocks[i]
            held = root.gathered()
            if self.zero3:
                # the next unit is on its way, or the last one's buffer is still there
                others = units[1:] if i == 0 else (*units[1:], *self.blocks[i - 1])
                next_one = max((unit.gathered() for unit in others), default=0)
                held += self.gathered[i] + next_one
            work = 2 * self.stream
            if self.cfg.is_moe(i):
                work += kept["travel"] + (kept["rows"] if self.all_visible else 0)
            largest = max(unit.gathered() for unit in units)
            reducing = self.table + largest + flying  # the head's gradient waits, too
            activations = left + kept["again"][i]
            phases.append(self.phase(name, held, reducing, activations, work, home))
            left -= kept["kept"][i]
            for unit in reversed(units):  # experts of their own come first, then what is left
                flying = reduce_bytes * unit.padded()
                if self.zero3:
                    held -= unit.gathered()
                reducing = self.table + unit.gathered() + flying
                rest = left if unit is units[0] else left + kept["attention"][i]
                phases.append(self.phase(name, held, reducing, rest, 2 * self.stream, home))
                home += 4 * unit.local()
        return phases


def total_of(phase: dict) -> int:
    return sum(size for name, size in phase.items() if name != "peak")


# ---------------------------------------------------------------- how many GPUs hold it

SIZES = (24, 40, 80, 141, 192)  # GB of GPUs on the market


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def expert_slots(cfg: ModelConfig) -> int:
    """Of a layer, those not in use included; 0 for a dense model."""
    return (cfg.n_experts_max or cfg.n_experts) if cfg.n_experts else 0


def layouts(base: Layout, slots: int):
    """Every layout that train_fsdp.py would take with the world, zero_stage, reduce_bytes and cuda
    of `base`."""
    shapes = [(0, 1)]  # hsdp_shard_size, expert_parallel
    if base.zero_stage:
        shapes += [(size, 1) for size in divisors(base.world)[1:-1]]
        shapes += [(0, ep) for ep in divisors(math.gcd(base.world, slots))[1:]]
    for size, ep in shapes:
        yield replace(base, hsdp_shard_size=size, expert_parallel=ep)


def fewest_gpus(
    model,
    stage: int,
    rows_per_step: int,
    precision: str,
    room: float,
    known: tuple = (StateBytes(), PRETRAINING),
) -> int | None:
    """The least power of two of GPUs, up to 4096, on which some configuration fits into `room`
    bytes each. known: state_bytes and tuning of Layout."""
    state_bytes, tuning = known
    for world in (1 << k for k in range(13)):
        if rows_per_step % world:
            return None
        shards = stage if world > 1 else 0
        base = Layout(world, shards, state_bytes=state_bytes, tuning=tuning)
        steps = rows_per_step // world
        for layout in layouts(base, expert_slots(model.cfg)):
            how = (1, steps, precision, "block", IMBALANCE)  # which needs least
            if rank_memory(model, layout, *how)["total"] <= room:
                return world
    return None


def fewest_gpus_text(
    model, stage: int, rows_per_step: int, precision: str, share: float, known: tuple
) -> tuple[list[str], bool]:
    """The fewest GPUs of 80 and of 141 GB that hold it, as text; whether both sizes do. known: see
    fewest_gpus."""
    texts, every = [], True
    for gb in (80, 141):
        room = share * gb * 1e9
        n = fewest_gpus(model, stage, rows_per_step, precision, room, known)
        texts.append(f"{n or 'none'} x {gb} GB")
        every = every and n is not None
    return texts, every


# ---------------------------------------------------------------- how long to train

# L(N, D) = E + A/N^a + B/D^b: Besiroglu et al. 2024 (2404.10102), the refit of "Chinchilla"
# (Hoffmann et al. 2022). E, 1.8172 nats of another text and tokenizer, is not needed: only ratios
# of compute and tokens carry over.
LAW_A = 482.01
LAW_B = 2085.43
LAW_a = 0.3478
LAW_b = 0.3658
FITTED = {  # where the law was fitted
    "parameters": (57e6, 16e9),
    "tokens": (0.25e9, 318e9),
    "FLOPs": (1.4e18, 1.3e22),
}
# epochs over which the worth of a repeat falls by 1/e: Muennighoff et al. 2023 (2305.16264)
REPEAT = 15.388


def optimum(flops: float) -> tuple[float, float]:
    """(parameters, tokens) of the lowest loss at `flops` = 6ND: N = G (C/6)^(b/(a+b)), G =
    (aA/bB)^(1/(a+b))."""
    g = (LAW_a * LAW_A / (LAW_b * LAW_B)) ** (1 / (LAW_a + LAW_b))
    n = g * (flops / 6) ** (LAW_b / (LAW_a + LAW_b))
    return n, flops / 6 / n


def effective_tokens(unique: float, tokens: float) -> float:
    """What `tokens` on `unique` ones are worth in fresh ones: U + U R (1 - e^-(epochs - 1)/R)
    (Muennighoff)."""
    if tokens <= unique:
        return tokens
    return unique * (1 + REPEAT * (1 - math.exp(-(tokens / unique - 1) / REPEAT)))


def extra_compute(n_params: float, tokens: float, fresh: float | None = None) -> float:
    """Compute 6ND beyond the least that reaches the same loss, as a share: 0.08 is 8 % more.
    `fresh`: D's worth.

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
    """Whether a run's length fits its model and data, in counts and ratios; target: multiplier x
    active tokens."""
    n, unique, tokens = n_params_active, max(1, unique_tokens), max(1, planned_tokens)
    fresh, ratio, epochs = effective_tokens(unique, tokens), tokens / n, tokens / unique
    here = {"parameters": n, "tokens": tokens, "FLOPs": 6.0 * n * tokens}
    extrapolated = [k for k, (low, high) in FITTED.items() if not low <= here[k] <= high]
    band = "inside"
    if ratio < BAND[0]:
        band = "below"
    elif ratio > BAND[1]:
        band = "above"
    # parameters that the data fit: in 4 epochs, nearly as good as fresh; in 22, which is all that
    # is worth repeating, and lean
    four = effective_tokens(unique, 4 * unique) / multiplier
    most = effective_tokens(unique, 22 * unique) / BAND[0]
    return {
        "n_params_active": n,
        "flops_per_token": flops_per_token,
        "unique_tokens": unique,
        "planned_tokens": tokens,
        "multiplier": multiplier,
        "moe": moe,
        "target_tokens": multiplier * n,
        "tokens_per_param": ratio,
        "epochs": epochs,
        "effective_tokens": fresh,
        "coverage": fresh / (multiplier * n),
        "last_epoch_value": math.exp(-max(0.0, epochs - 1) / REPEAT),
        "band": band,
        "extra_compute": extra_compute(n, tokens, fresh),
        "extrapolated": extrapolated,
        "fitting_params": (four, most),
        "data_limited": unique < multiplier * n / 8,
    }


def auto_steps(
    n_params_active: int,
    unique_tokens: int,
    tokens_per_step: int,
    multiplier: float = 20.0,
    min_epochs: float = 0.0,
    max_epochs: float = 50.0,
) -> tuple[int, str]:
    """Steps for `multiplier` tokens an active parameter (tokens_per_parameter), and why."""
    target = multiplier * n_params_active
    wanted = target / max(1, unique_tokens)
    epochs = min(max(wanted, min_epochs), max_epochs)
    steps = max(1, round(epochs * unique_tokens / tokens_per_step))
    tokens = f"{multiplier:g} x {human_number(n_params_active)} = {human_number(target)} tokens"
    why = f"{tokens} are {human_number(wanted)} epochs"
    if epochs != wanted:
        why += f", clamped to {'max' if epochs < wanted else 'min'}_epochs {epochs:g}"
    if epochs > 4:
        why += f", worth {effective_tokens(1, epochs):.3g} fresh ones"
    return steps, f"length     {steps:,} steps by tokens_per_parameter: {why}"
