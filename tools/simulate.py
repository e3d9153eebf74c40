"""`--dry_run`: what a run would need, on this machine or on a thousand GPUs that are not here.

In this order: traffic and time of a step, by arithmetic; the cheapest configuration; the lines that
are printed; the dry run itself. Memory is lumen/plan.py's, data sheets are lumen/cards.py's.
Nothing here trains: tools/fake_step.py looks at a few layers, and tools/trial.py tries a step of a
run that would be on this machine.
"""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lumen import machine as machines
from lumen.cards import ETHERNET, HARDWARE, NO_BF16, NO_FP8, PCIE, Hardware, hardware_key
from lumen.config import Config
from lumen.data import not_prepared, open_data, planned_data
from lumen.errors import UserError
from lumen.feed import synchronize
from lumen.launch import clock, environment
from lumen.lines import Start, no_validation, start_lines
from lumen.machine import YEAR, Machine, human_number, human_time
from lumen.muon import hidden_matrices, in_bf16, step_flops
from lumen.optim import state_bytes
from lumen.plan import (
    GIB,
    IMBALANCE,
    RECOMPUTE,
    SIZES,
    Layout,
    StepShape,
    Unit,
    all_shapes,
    count_parameters,
    divisors,
    expert_slots,
    fewest_gpus_text,
    fsdp_units,
    kept_bytes,
    layouts,
    number_bytes,
    parameter_shapes,
    rank_memory,
    trained_parameters,
)
from lumen.report import Report
from lumen.resolve import (
    HINT,
    Facts,
    Findings,
    Kept,
    Run,
    meta_model,
    misfit,
    n_working,
    pick_experts,
    read_hint,
    resolve,
    resolve_batch,
    resolve_length,
    with_rate,
    without_effect,
)
from lumen.schedule import enough_steps, lr_at, resolve_order
from lumen.tuning import PRETRAINING, states, tuning_of
from model import ModelConfig, Transformer, role
from tools.fake_step import compared_lines, depths, fake_run
from tools.trial import Trial, try_step

GB = 1e9
TRIED = 10.0  # seconds of a micro-step, as assumed, above which none is tried here

# ---------------------------------------------------------------- a step: traffic and time

# of the peak: torchtitan on H100, Llama 8B 33 to 39 %, DeepSeek-V3 16B 20.5 %
MFU = {"dense": 0.38, "moe": 0.2}


@dataclass(frozen=True)
class Assumed:
    """What arithmetic cannot know."""

    mfu: float  # share of the peak while computing
    imbalance: float = IMBALANCE  # rows of the busiest rank with expert_parallel
    disk_gb_s: float = 2.0  # that a machine writes of a checkpoint
    share: float = 0.92  # of a GPU's memory that a configuration may take
    update: float | None = None  # seconds of the optimizer, where they were measured


@dataclass(frozen=True)
class Simulated:
    """A configuration and what its step needs."""

    layout: Layout
    step: StepShape
    memory: dict  # see plan.rank_memory
    traffic: dict  # see traffic
    seconds: dict  # compute, optimizer, each kind of traffic; step: all together


@functools.lru_cache(maxsize=8)
def training_flops(model: Transformer) -> int:
    """FLOPs a token; kept, since a search asks a thousand times."""
    return model.flops_per_token()


def ring_seconds(hw: Hardware, n_bytes: float, ranks: int, stride: int = 1, each=False) -> float:
    """Seconds in which each of `ranks` gets n_bytes from all of them: rings over every link and
    network card.

    In a ring a machine lets each byte in once and spreads it inside; `each`: every rank gets other
    bytes (all-to-all). stride: between neighbours of the group.
    """
    near = min(ranks, max(1, hw.per_node // stride))  # of the group in one machine
    inside = n_bytes * (near - 1) / (ranks if each else near) / hw.link
    outside = n_bytes * (1 - near / ranks) / (1 if each else near) / hw.network
    return max(inside, outside)


def traffic(
    model, layout: Layout, rows: int, steps: int, precision: str, recompute="none", imbalance=1.0
) -> dict[str, list[tuple]]:
    """What a rank receives in an optimizer step: name -> [(bytes, ranks of the group, stride)]."""
    messages = {"all-gather": [], "reduce-scatter": [], "all-reduce": [], "all-to-all": []}
    if layout.shard == 1:  # replicas: a ring sums and hands back every gradient
        size = 2 * 4 * trained_parameters(model, layout.tuning)
        messages["all-reduce"].append((size, layout.world, 1))
        messages["all-gather"].append((muon_bytes(model, layout, precision), layout.world, 1))
        return messages
    recomputed = recompute != "none"
    root, blocks = fsdp_units(model, layout, precision)
    each = [(root, 1, 1)]  # a unit, how many are alike, how often it is gathered in a micro-step
    for block, alike in Counter(blocks).items():
        for unit in block:  # for forward and backward; inside a block also when it is made again
            again = recomputed and unit is not block[0]
            each.append((unit, alike, 3 if again else 2))
    sends = steps if layout.zero_stage > 1 else 1
    for unit, alike, times in each:
        gathers = times * steps if layout.zero_stage == 3 else 1
        group = (unit.ranks, unit.stride)
        messages["all-gather"].append((alike * gathers * unit.padded() * unit.size, *group))
        reduced = alike * sends * unit.padded() * layout.reduce_bytes
        messages["reduce-scatter"].append((reduced, *group))
        if layout.shard < layout.world:  # between the copies, once a step
            size = 2 * alike * unit.local() * layout.reduce_bytes
            messages["all-reduce"].append((size, layout.world // layout.shard, layout.shard))
    if layout.expert_parallel > 1:
        size = expert_traffic(model.cfg, rows, precision, recomputed)
        messages["all-to-all"].append((size * steps * imbalance, layout.expert_parallel, 1))
    there_and_back = 2 * muon_bytes(model, layout, precision) // layout.shard
    messages["all-to-all"].append((there_and_back, layout.shard, 1))
    return messages


def muon_bytes(model, layout: Layout, precision: str) -> int:
    """Of the matrices that a rank orthogonalises for others: all but experts that it has whole."""
    if not layout.state_bytes.orthogonal:
        return 0
    sizes = []
    for matrix in hidden_matrices(all_shapes(model), model.cfg):
        if layout.shard == 1 or len(matrix.shape) == 2:
            sizes.append(math.prod(matrix.shape))
    return (2 if in_bf16(precision) else 4) * sum(sizes)


def expert_traffic(cfg: ModelConfig, rows: int, precision: str, recomputed: bool) -> int:
    """Bytes of a micro-step's (token, expert) pairs: there and back, forward, backward and when
    forward is made again."""
    moe_layers = sum(cfg.is_moe(i) for i in range(cfg.n_layers))
    trips = 6 if recomputed else 4
    pairs = rows * cfg.max_seq_len * cfg.n_experts_per_token
    return moe_layers * trips * pairs * cfg.d_model * number_bytes(precision)


def compute_seconds(
    model, layout: Layout, step: StepShape, hw: Hardware, assumed: Assumed
) -> float:
    """Of all micro-steps: the FLOPs at `mfu` of the peak, blocks that are made again and the
    busiest rank's experts among them; activations that are made again are written and read once
    more."""
    cfg, (rows, steps, precision, recompute) = model.cfg, step
    flops = training_flops(model)  # a token
    extra = 0.0
    if recompute == "block":  # forward, a third of it, but not the head
        extra = (flops - 6 * cfg.vocab_size * cfg.d_model) / 3
    if layout.expert_parallel > 1:
        moe_layers = sum(cfg.is_moe(i) for i in range(cfg.n_layers))
        experts = 18 * cfg.d_model * cfg.d_expert * model.experts_used() * moe_layers
        extra += (assumed.imbalance - 1) * experts * (4 / 3 if recompute == "block" else 1)
    tokens = rows * cfg.max_seq_len * steps
    seconds = (flops + extra) * tokens / (hw.peak(precision) * assumed.mfu)
    whole = sum(kept_bytes(cfg, rows, precision, "none")["kept"])
    remade = 2 * (whole - sum(kept_bytes(cfg, rows, precision, recompute)["kept"]))
    return seconds + max(0, remade) * steps / hw.bandwidth


def measured(found: Simulated, model, hw: Hardware, assumed: Assumed, trial: Trial) -> Assumed:
    """`assumed`, with the mfu by which compute_seconds is what the trial took."""
    how = (model, found.layout, found.step, hw)
    # what is written and read again is not computing; a tenth is left for that at least
    other = compute_seconds(*how, replace(assumed, mfu=math.inf))
    took = trial.micro_step * found.step.micro_steps
    at_peak = compute_seconds(*how, replace(assumed, mfu=1.0)) - other
    return replace(assumed, mfu=at_peak / max(took - other, took / 10), update=trial.update)


def muon_seconds(model, layout: Layout, step: StepShape, hw: Hardware, assumed: Assumed) -> float:
    """Of orthogonalising, which the ranks that share a copy, or hold replicas, share."""
    if not layout.state_bytes.orthogonal:
        return 0.0
    flops = step_flops(all_shapes(model), model.cfg)
    sharing = layout.shard if layout.shard > 1 else layout.world
    return flops / sharing / (hw.peak(step.precision) * assumed.mfu)


def simulate_step(
    model: Transformer, layout: Layout, step: StepShape, hw: Hardware, assumed: Assumed
) -> Simulated:
    """Memory, traffic and seconds of a step, all of it arithmetic: nothing here was measured.

    What is gathered and reduced in every micro-step is hidden behind the compute where it is
    shorter; what is once a step, behind the backward pass of one micro-step. train.py's reduction,
    all-to-all and the optimizer are not hidden.
    """
    memory = rank_memory(model, layout, *step, assumed.imbalance)
    messages = traffic(model, layout, *step, assumed.imbalance)
    seconds = {"compute": compute_seconds(model, layout, step, hw, assumed)}
    for kind, sizes in messages.items():
        each = kind == "all-to-all"
        seconds[kind] = sum(ring_seconds(hw, *size, each) for size in sizes)
    # trained weights, gradients and the optimizer's state are read and written
    own = memory["gradients"] if layout.shard == 1 else memory["weights"]
    touched = 2 * (2 * own + memory["moments"])
    seconds["optimizer"] = touched / hw.bandwidth + muon_seconds(model, layout, step, hw, assumed)
    if assumed.update is not None:
        seconds["optimizer"] = assumed.update
    reductions = seconds["all-gather"] + seconds["reduce-scatter"] + seconds["all-reduce"]
    every_micro_step = 0.0
    if layout.zero_stage >= 2:
        every_micro_step = seconds["reduce-scatter"]
    if layout.zero_stage == 3:
        every_micro_step = seconds["all-gather"] + seconds["reduce-scatter"]
    once = reductions - every_micro_step
    backward = 0.0  # of one micro-step, behind which `once` hides
    if layout.shard > 1:
        backward = seconds["compute"] * 2 / 3 / step.micro_steps
    exposed = max(0.0, every_micro_step - seconds["compute"]) + max(0.0, once - backward)
    seconds["step"] = seconds["compute"] + exposed + seconds["all-to-all"] + seconds["optimizer"]
    return Simulated(layout, step, memory, messages, seconds)


def candidates(base: Layout, slots: int, rows_per_step: int):
    """(layout, micro-batch, recompute) of every configuration that train_fsdp.py would take.

    base: see plan.layouts. None where the rows do not divide.
    """
    if rows_per_step % base.world:
        return
    for layout in layouts(base, slots):
        for rows in divisors(rows_per_step // base.world):
            for recompute in RECOMPUTE:
                yield layout, rows, recompute


def cheapest(
    model,
    base: Layout,
    rows_per_step: int,
    precision: str,
    hw: Hardware,
    room: float,
    assumed: Assumed,
) -> Simulated | None:
    """The configuration that fits into `room` bytes with the shortest step, or None. base: see
    candidates.

    Of equal ones that which sends least: the assumed mfu is the same for every micro-batch.
    """
    best, best_key = None, None
    for layout, rows, recompute in candidates(base, expert_slots(model.cfg), rows_per_step):
        steps = rows_per_step // (rows * layout.world)
        step = StepShape(rows, steps, precision, recompute)
        found = simulate_step(model, layout, step, hw, assumed)
        sent = sum(found.seconds[kind] for kind in found.traffic)
        key = (found.seconds["step"], sent, found.memory["total"])
        if found.memory["total"] <= room and (best is None or key < best_key):
            best, best_key = found, key
    return best


# ---------------------------------------------------------------- the lines


def table_lines(head: list[str], rows: list[list]) -> list[str]:
    """Columns under `head`'s words, numbers to the right."""
    cells = [head, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        numbers = "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:]))
        lines.append(f"  {row[0]:<{widths[0]}}  {numbers}")
    return lines


def kind_of(name: str) -> str:
    """Of a parameter, for the table."""
    what = role(name)
    if what in ("embedding", "head"):
        return "embeddings"
    if what in ("router", "norm"):
        return "routers, norms"
    if what == "expert":
        return "experts"
    if "attn" in name.split("."):
        return "attention"
    return "shared experts" if "shared" in name.split(".") else "dense FFN"


def parameter_lines(model: Transformer, layout: Layout, alone=False) -> list[str]:
    """Where the parameters are: in all, active for a token, and on the rank that holds most, unless
    there is but one (`alone`)."""
    kinds = ("embeddings", "attention", "dense FFN", "shared experts", "experts", "routers, norms")
    total, active, fullest = (dict.fromkeys(kinds, 0) for _ in range(3))
    used = model.experts_used() / max(1, model.cfg.n_experts_max or model.cfg.n_experts)
    ep = layout.expert_parallel
    root, blocks = parameter_shapes(model)
    for name, shape in itertools.chain(root, *blocks):
        n, kind = math.prod(shape), kind_of(name)
        unit = Unit((shape,), layout.shard, 1, 4)
        if kind == "experts" and ep > 1:
            unit = Unit(((shape[0] // ep, *shape[1:]),), layout.world // ep, ep, 4)
        total[kind] += n
        active[kind] += n * used if kind == "experts" else n
        fullest[kind] += unit.local()
    columns = {"total": total, "active": active}
    if not alone:
        columns["on the fullest rank"] = fullest
    rows = []
    for kind in kinds:
        if total[kind]:
            rows.append([kind, *(f"{round(column[kind]):,}" for column in columns.values())])
    rows.append(["all", *(f"{round(sum(column.values())):,}" for column in columns.values())])
    return table_lines(["parameters", *columns], rows)


def command_line(layout: Layout, rows: int, recompute: str) -> str:
    """A configuration as the command line has it."""
    words = []
    if layout.expert_parallel > 1:
        words.append(f"--expert_parallel={layout.expert_parallel}")
    if layout.zero_stage and layout.shard < layout.world:
        words.append(f"--hsdp_shard_size={layout.hsdp_shard_size}")
    words += [f"--batch_size={rows}", f"--activation_checkpointing={recompute}"]
    return " ".join(words)


class Simulation:
    """The simulation of a run: numbers first, then a line each."""

    def __init__(
        self, model, layout: Layout, step: StepShape, max_steps: int, hw, name: str, assumed
    ):
        """hw: Hardware, called `name`. E002 where the layout cannot be."""
        layout.check(expert_slots(model.cfg))
        self.model, self.layout, self.step, self.max_steps = model, layout, step, max_steps
        self.hw, self.name, self.assumed = hw, name, assumed
        self.rows_per_step = step.rows * step.micro_steps * layout.world
        self.tokens = self.rows_per_step * model.cfg.max_seq_len
        self.by_recompute = {}
        for mode in RECOMPUTE:
            as_mode = step._replace(recompute=mode)
            self.by_recompute[mode] = simulate_step(model, layout, as_mode, hw, assumed)
        self.as_it_is = self.by_recompute[step.recompute]
        room = assumed.share * hw.memory
        how = (layout, self.rows_per_step, step.precision, hw, room, assumed)
        self.cheapest = cheapest(model, *how)
        self.unit, self.rate = "GPU-hours", layout.world / 3600  # of a second of all processes
        if not layout.cuda:
            self.unit = "core-hours"
            self.rate *= torch.get_num_threads() / hw.per_node

    def lines(self) -> list[str]:
        """Parameters, mesh, memory, checkpoint, traffic, time, assumptions, the cheapest way, the
        smallest machine."""
        text = f"SIMULATION of {self.layout.world:,} x {self.name}: arithmetic on data sheets and"
        return [
            f"{text} assumptions, nothing below was measured",
            *parameter_lines(self.model, self.layout),
            f"mesh       {self.layout}, zero_stage {self.layout.zero_stage}; {self.step.precision}",
            *self.memory_lines(),
            self.checkpoint_line(),
            *self.traffic_lines(),
            *self.time_lines(),
            *self.assumed_lines(),
            self.cheapest_line(),
            self.smallest_line(),
        ]

    def memory_lines(self) -> list[str]:
        step, share = self.step, self.assumed.share
        text = "GiB on the fullest rank by activation_checkpointing"
        text += f" (here: {step.recompute}), {step.rows} rows of {self.model.cfg.max_seq_len}"
        text += f" tokens; fits {share:.0%} of so many GB"
        names = ["weights", "gradients", "moments", "gathered", "reducing", "activations", "work"]
        if any("loading" in found.memory for found in self.by_recompute.values()):
            names.append("loading")
        names.append("total")
        rows = []
        for mode, found in self.by_recompute.items():
            total = found.memory["total"]
            fits = [str(gb) if total <= share * gb * GB else "-" for gb in SIZES]
            sizes = [f"{found.memory.get(name, 0) / GIB:.2f}" for name in names]
            rows.append([mode, *sizes, " ".join(fits)])
        return [f"memory     {text}", *table_lines(["keep", *names, "fits GB"], rows)]

    def checkpoint_bytes(self) -> int:
        """Weights in fp32 and the optimizer's state; with adapters only theirs."""
        tuning = self.layout.tuning
        found = states(tuning, all_shapes(self.model), 4, self.layout.state_bytes)
        saved = found["gradients"] if tuning.r else 4 * count_parameters(self.model)
        return saved + found["moments"]

    def checkpoint_line(self) -> str:
        size = self.checkpoint_bytes()
        nodes = -(-self.layout.shard // self.hw.per_node)
        speed = self.assumed.disk_gb_s
        seconds = size / nodes / speed / GB
        text = f"{human_number(size, 'B')}: {seconds:.0f} s from {nodes} machines"
        return f"checkpoint {text} at {speed:g} GB/s each (assumed)"

    def traffic_lines(self) -> list[str]:
        lines = []
        for kind, messages in self.as_it_is.traffic.items():
            n = sum(size for size, ranks, _ in messages if ranks > 1)
            if n:
                seconds = self.as_it_is.seconds[kind]
                lines.append(f"traffic    {kind} {n / GB:,.1f} GB a step and rank: {seconds:.3g} s")
        return lines

    def time_lines(self) -> list[str]:
        s, tokens = self.as_it_is.seconds, self.tokens
        peak = human_number(self.hw.peak(self.step.precision), "FLOP/s")
        text = f"{s['step']:.3g} s a step of {tokens:,} tokens ({self.step.micro_steps}"
        text += f" micro-steps): compute {s['compute']:.3g} s at {self.assumed.mfu:.0%} of {peak},"
        text += f" optimizer {s['optimizer']:.2g} s; {human_number(tokens / s['step'])} tokens/s"
        took = s["step"] * self.max_steps
        length = f"{self.max_steps:,} steps, {human_number(tokens * self.max_steps)} tokens:"
        length += f" {human_time(took)}, {human_number(took * self.rate)} {self.unit}"
        if took > YEAR and self.name in ("cpu", "measured"):
            length += ": not on this machine"
        return [f"time       {text}", f"length     {length}"]

    def assumed_lines(self) -> list[str]:
        hw = self.hw
        link = f"link {hw.link / GB:g} GB/s, network {hw.network / GB:g} GB/s a GPU"
        mfu = f"mfu {self.assumed.mfu:g} (torchtitan on H100: dense 8B 0.33 to 0.39, MoE 16B 0.205;"
        mfu += " Lumen's own is not known); gathers and reductions hide behind the compute of their"
        mfu += " micro-step, all-to-all and optimizer do not;"
        if self.layout.expert_parallel > 1:
            mfu += f" the busiest rank gets {self.assumed.imbalance:g} x the fair share of rows"
        return [f"assumed    {link}, {hw.per_node} in a machine: {hw.source}", f"assumed    {mfu}"]

    def cheapest_line(self) -> str:
        best = self.cheapest
        if best is None:
            gpus = f"{self.layout.world} x {self.hw.memory / GB:.0f} GB"
            return f"cheapest   none: no configuration fits {gpus}"
        words = command_line(best.layout, best.step.rows, best.step.recompute)
        seconds = best.seconds["step"]
        text = f"{words}: {best.memory['total'] / GIB:.1f} GiB, {seconds:.3g} s a step"
        hours = human_number(seconds * self.max_steps * self.rate)
        return f"cheapest   {text}, {hours} {self.unit}"

    def smallest_line(self) -> str:
        stage = self.layout.zero_stage
        known = (self.layout.state_bytes, self.layout.tuning)
        how = (self.rows_per_step, self.step.precision, self.assumed.share, known)
        fewest, every = fewest_gpus_text(self.model, stage, *how)
        text = f"{', '.join(fewest)} hold it"
        if not stage and not every and not self.layout.tuning.r:
            shards, _ = fewest_gpus_text(self.model, 3, *how)
            text = f"{', '.join(fewest)} hold replicas of it"
            text += f"; train_fsdp.py needs {' or '.join(shards)}"
        return f"smallest   {text} (powers of two that divide the batch, to 4,096)"


class Here(Simulation):
    """A run of one process on this machine: no mesh, no traffic, no GPUs to buy."""

    def __init__(self, simulated: tuple, assumed: Assumed, cfg: Config, source: list[str]):
        """simulated: Simulation's arguments before `assumed`; source: of the time, lines that begin
        with measured, given or assumed."""
        super().__init__(*simulated, assumed)
        self.cfg, self.source = cfg, source

    def lines(self) -> list[str]:
        source = self.source[0].split()[0]
        return [
            f"on this machine: one process; sizes are arithmetic, the time is {source}",
            *parameter_lines(self.model, self.layout, alone=True),
            *self.memory_lines(),
            self.checkpoint_line(),
            *self.time_lines(),
            *self.source,
        ]

    def memory_lines(self) -> list[str]:
        """Columns in which there is nothing are left out."""
        step, room = self.step, self.assumed.share * self.hw.memory
        text = f"by activation_checkpointing (here: {step.recompute}), {step.rows} rows of"
        text += f" {self.model.cfg.max_seq_len} tokens; {size_text(room)} may be used"
        needs = [found.memory for found in self.by_recompute.values()]
        names = ["weights", "gradients", "moments", "gathered", "activations", "work", "loading"]
        names = [name for name in names if any(need.get(name) for need in needs)] + ["total"]
        rows = []
        for mode, need in zip(self.by_recompute, needs):
            rows.append([mode, *(size_text(need.get(name, 0)) for name in names)])
        # what FSDP gathers is here a copy in the compute dtype
        head = ["copies" if name == "gathered" else name for name in names]
        return [f"memory     {text}", *table_lines(["keep", *head], rows)]

    def checkpoint_line(self) -> str:
        cfg, size, steps = self.cfg, self.checkpoint_bytes(), self.max_steps
        text = f"checkpoint {human_number(size, 'B')} each"
        if not steps:  # of unknown length
            return text
        kept = -(-steps // cfg.save_interval) if cfg.save_interval else 1
        if cfg.eval_interval:  # each may find a new best
            kept += steps // cfg.eval_interval
        if cfg.save_total_limit:  # the newest, the best and milestones
            milestones = steps // cfg.keep_every if cfg.keep_every else 0
            kept = min(kept, cfg.save_total_limit + 1 + milestones)
        return f"{text}, {kept} of them at most: {human_number(kept * size, 'B')}"

    def time_lines(self) -> list[str]:
        s, tokens, steps = self.as_it_is.seconds, self.tokens, self.max_steps
        text = f"{plain_time(s['step'])} a step of {tokens:,} tokens,"
        text += f" {plain_time(s['optimizer'])} of it the optimizer;"
        lines = [f"time       {text} {human_number(tokens / s['step'])} tokens/s"]
        if steps:
            took = s["step"] * steps
            text = f"{steps:,} steps, {human_number(tokens * steps)} tokens:"
            text += f" about {plain_time(took)} without evaluations and checkpoints"
            if took > YEAR:
                text += ": not on this machine"
            lines.append(f"length     {text}")
        return lines


def size_text(n: float) -> str:
    """Bytes, in the unit in which they are no row of zeros."""
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / 2**20:.3g} MiB"


def plain_time(seconds: float) -> str:
    """A time as one says it: 47 ms, 8.2 s, 2m20s, 3h05m; from two days on as human_time."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return clock(seconds) if seconds < 2 * 86400 else human_time(seconds)


# ---------------------------------------------------------------- python train.py CONFIG --dry_run


GIVEN = {  # --name: (field of Hardware, unit)
    "peak_flops": ("flops", 1),
    "memory_gb": ("memory", 1e9),
    "link_gb_s": ("link", 1e9),
    "network_gb_s": ("network", 1e9),
    "gpus_per_node": ("per_node", 1),
}


def hardware(name: str, m: Machine, given: dict) -> Hardware:
    """The table's row, or this machine measured (`measured`; `cpu`: its CPU), with what `given`
    overrides.

    given: see GIVEN. UserError E002: see hardware_key.
    """
    key = hardware_key(name)
    row = HARDWARE[key] if key in HARDWARE else measured_hardware(key, m, given)
    changed = {}
    for option, (name_here, unit) in GIVEN.items():
        if option in given:
            changed[name_here] = given[option] * unit
    source = row.source
    if changed:
        source += f"; given: {', '.join(changed)}"
    return replace(row, **changed, source=source)


def measured_hardware(key: str, m: Machine, given: dict) -> Hardware:
    """This machine's device, or (`cpu`) its CPU, which the processes of a machine share."""
    device = m.device if key == "measured" else torch.device("cpu")
    dtype = m.compute_dtype if key == "measured" else torch.float32
    cuda = device.type == "cuda"
    flops, bandwidth = machines.matrix_peak(device, dtype), copy_bandwidth(device)
    local = torch.cuda.device_count() if cuda else 1
    per_node = max(local, given.get("gpus_per_node", 1))
    share = per_node if device.type == "cpu" else 1
    return Hardware(
        flops=flops / share,
        fp32=flops / share,
        memory=machines.total_memory(device) / share,
        bandwidth=bandwidth / share,
        link=PCIE * 1e9,
        network=8 * ETHERNET * 1e9 / per_node,
        per_node=local,
        source="matrices and memory measured here; network assumed",
    )


def copy_bandwidth(device: torch.device) -> float:
    """bytes/s of the device's memory, read and written, the best of three copies of 64 MiB."""
    block = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        block.clone()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * len(block) / best


def precision_there(hardware: str, precision: str) -> str:
    """The precision by which a run on other hardware is counted, whatever this machine can do: of
    fp8 that is bf16."""
    if precision == "fp32" or hardware == "cpu":
        return "fp32"
    return "mixed_fp16" if hardware in NO_BF16 else "mixed_bf16"


class DryRun:
    """A run, resolved but neither built nor given a folder.

    `elsewhere`: --hardware names a card; then this machine computes nothing, and what it cannot do
    does not matter.
    """

    def __init__(self, cfg: Config, written: dict, flags: dict, layout: Layout):
        self.flags, self.layout = flags, layout
        self.elsewhere = flags["hardware"] != "measured"
        self.precision = None  # there; None: as this machine resolves it
        if self.elsewhere:
            self.precision = precision_there(flags["hardware"], cfg.precision)
            cpu = {"precision": "fp32", "device": "cpu", "compile_model": False}
            cfg = replace(cfg, **cpu, expert_backend="slices")
        local_rank = environment("LOCAL_RANK", 0)
        self.machine = machines.detect(cfg.device, cfg.precision, cfg.compile_model, local_rank)
        self.data = planned_data(cfg) if not_prepared(cfg) else open_data(cfg)
        self.cfg = replace(cfg, model=replace(cfg.model, vocab_size=self.data.vocab_size))
        documents = bool(cfg.document_mask) or self.data.document_mask is not False
        self.layout = replace(layout, documents=documents)
        if cfg.early_stopping_patience and self.data.sources and not self.data.val_sources:
            text = f"early_stopping_patience: {cfg.early_stopping_patience} stops by evaluations"
            raise UserError("E114", f"{text}; {no_validation(cfg)}")
        self.model = meta_model(self.cfg.model)
        self.found = Findings(machine=self.machine)
        self.run = self.resolve(written)
        self.cfg = with_rate(self.cfg, self.run)

    def resolve(self, written: dict) -> Run:
        """As a start of today would, but nothing that is elsewhere is tried here."""
        cfg, found, machine = self.cfg, self.found, self.machine
        facts = Facts(
            written=written,
            readers=self.layout.world,
            layout=self.layout,
            windows=self.data.windows if self.data.sources else None,
            weights=self.data.weights,
            held={name: source.windows for name, source in self.data.sources.items()},
            model=self.model,
            machine=machine,
            memory=machines.own_memory(machine.device),
            dry_run=True,
        )
        if self.flags.get("fine_tunes"):
            cfg = self.cfg = enough_steps(cfg, facts, None, found)
        if not self.elsewhere:
            out = Path(cfg.out_dir)
            facts.hint = read_hint(out, written.get("batch_size"), machine)
            facts.hint_file = out / HINT
            return resolve(cfg, facts, None, found)
        facts.machine = replace(machine, precision=self.precision)  # for the estimate
        facts.memory = self.hardware().memory
        kept = Kept(None, written, machine.device.type)
        batch = resolve_batch(cfg, facts, kept, found)
        length = resolve_length(cfg, facts, kept, batch["rows_per_step"], found)
        experts, why = cfg.expert_backend, ""
        if cfg.model.n_experts:
            experts, why = pick_experts(cfg, facts, kept, batch["micro_batch"], found)
        return Run(
            **batch,
            **length,
            device=machine.device.type,
            precision=cfg.precision,
            compile_model=cfg.compile_model,
            attention=cfg.attention,
            attention_why="",
            loss="plain",
            loss_why="",
            expert_backend=experts,
            experts_why=why,
            deterministic=cfg.deterministic,
            segments=resolve_order(cfg, facts.weights, None, batch | length),
        )

    def hardware(self) -> Hardware:
        return hardware(self.flags["hardware"], self.machine, self.flags)

    def facts(self, notes: list[str]) -> Start:
        """What the start lines are made of."""
        cfg, run, found = self.cfg, self.run, self.found
        hint = [found.hint] if found.hint else []
        return Start(
            cfg=cfg,
            run=run,
            model=self.model,
            machine=self.machine,
            layout=self.layout,
            readers=self.layout.world,
            sources=self.data.sources,
            val_sources=self.data.val_sources,
            n_working=n_working(self.model),
            flops_per_token=self.model.flops_per_token(),
            peak=found.peak,
            lr_at_peak=lr_at(cfg, run, run.peak_step),
            last_lr=lr_at(cfg, run, max(0, run.max_steps - 1)),
            misfit=found.misfit,
            notes=[*notes, *self.machine.notes, *hint, *found.changes],
            elsewhere=self.elsewhere,
            fine_tunes=self.flags.get("fine_tunes", False),
        )

    def simulation(self) -> Simulation:
        """What the run would need where it is to run."""
        cfg, run, given = self.cfg, self.run, self.flags
        assumed = {k: given[k] for k in ("mfu", "imbalance", "disk_gb_s") if k in given}
        assumed.setdefault("mfu", MFU["moe" if cfg.model.n_experts else "dense"])
        assumed = Assumed(**assumed, share=cfg.target_memory)
        how = (self.precision or run.precision, cfg.activation_checkpointing)
        step = StepShape(run.micro_batch, run.accumulation, *how)
        hw, name = self.hardware(), given["hardware"]
        simulated = (self.model, self.layout, step, run.max_steps, hw, name)
        if self.layout.world > 1 or name not in ("measured", "cpu"):
            return Simulation(*simulated, assumed)
        found = simulate_step(self.model, self.layout, step, hw, assumed)
        assumed, source = self.tried(found, hw, assumed)
        return Here(simulated, assumed, cfg, [*source, *self.remedy(found, hw, assumed)])

    def tried(self, found: Simulated, hw: Hardware, assumed: Assumed) -> tuple[Assumed, list[str]]:
        """With what a trial on this machine measured, where there can be one; and lines that say
        where the time comes from."""
        run, share = self.run, f"{100 * assumed.mfu:.2g} % of the matrix peak (mfu)"
        if "mfu" in self.flags:
            return assumed, [f"given      {share} by --mfu; the optimizer's time is assumed"]
        why = self.no_trial(found, hw, assumed)
        try:
            if not why:
                trial, n = try_step(self.cfg, run, self.machine, self.layout.documents)
                assumed = measured(found, self.model, hw, assumed, trial)
                text = f"here, the median of {n} steps after a warm-up:"
                lines = [f"measured   {text} {100 * assumed.mfu:.2g} % of the matrix peak (mfu)"]
                if run.compile_model:
                    lines.append("measured   eager; the run itself compiles, and may be faster")
                return assumed, lines
        except Exception as error:  # whatever cannot work here: the arithmetic still can
            first = (str(error).strip().splitlines() or ["?"])[0]
            why = f"a trial failed, {type(error).__name__}: {first}"[:76]
        text = f"{share} is a guess, small models reach less; --mfu gives another"
        return assumed, [f"assumed    {text}", f"assumed    not measured: {why}"]

    def no_trial(self, found: Simulated, hw: Hardware, assumed: Assumed) -> str:
        """Why no step can be tried, or nothing."""
        if self.elsewhere:
            return "that is done where --hardware is not given"
        if "peak_flops" in self.flags or environment("WORLD_SIZE", 1) > 1:
            return "this is another machine, or another number of processes"
        if self.layout.tuning != PRETRAINING:
            return "only whole models are tried, not adapters, frozen weights or preferences"
        room = assumed.share * hw.memory
        if not self.layout.cuda:
            room = min(room, machines.available_memory())
        if found.memory["total"] > room:
            return f"it needs more memory than the {size_text(room)} that it may have"
        seconds = found.seconds["compute"] / found.step.micro_steps
        if seconds > TRIED:
            text = f"a micro-batch would take about {plain_time(seconds)}"
            return f"{text}; a smaller --batch_size would be tried"
        return ""

    def remedy(self, found: Simulated, hw: Hardware, assumed: Assumed) -> list[str]:
        """What would fit, where the start lines have not said it."""
        rows, _, precision, recompute = found.step
        batch = (rows, self.run.rows_per_step, (precision, recompute))
        room = assumed.share * hw.memory
        why, _ = misfit(self.model, self.layout, *batch, room, 1.0)
        if not why or self.found.misfit:
            return []
        return [f"advice     {part}" for part in textwrap.wrap(f"this may not fit: {why}", 89)]

    def checked_lines(self, best: Simulated) -> list[str]:
        """How near rank_memory comes to a look at a few layers of the configuration `best`, on fake
        tensors."""
        layout, (rows, _, precision, recompute) = best.layout, best.step
        if layout.shard == 1:
            return []
        changed = {"batch_size": rows, "activation_checkpointing": recompute}
        cfg = replace(self.cfg, precision=precision, **changed)
        try:
            few = depths(cfg.model)
        except ValueError as error:
            return [f"checked    not: {error}"]
        try:
            seen = {n: fake_run(cfg, layout, n) for n in few}
            words = command_line(layout, rows, recompute)
            how = (layout, rows, precision, recompute)
            return compared_lines(words, seen, self.model, *how)
        except Exception as error:  # private parts of torch may differ: it goes without
            first = (str(error).strip().splitlines() or ["?"])[0]
            text = f"checked    not: fake tensors failed on torch {torch.__version__}"
            return [f"{text}: {type(error).__name__}: {first}"]


def dry_run(cfg: Config, written: dict, notes: list[str], flags: dict, check=None) -> int:
    """`--dry_run`: prints what the run would be on this machine, or on --world_size x --hardware.
    Returns 0.

    The first four are what read_config returns. check(cfg, world) -> Layout: train_fsdp.py's;
    without it every rank holds a replica. UserErrors are those of a real start, but E200: what fits
    is the question here.
    """
    world = flags.get("world_size", environment("WORLD_SIZE", 1))
    kind = hardware_key(flags.get("hardware", "measured" if world == 1 else "h100"))
    flags = flags | {"world_size": world, "hardware": kind}
    if cfg.precision in machines.FP8 and kind in NO_FP8:
        text = (
            f"precision: {cfg.precision} needs compute capability 8.9 or more, which {kind} has not"
        )
        raise UserError("E003", f"{text}; take mixed_bf16 or other --hardware")
    there = cfg
    if kind in NO_BF16 and cfg.precision != "fp32":
        there = replace(cfg, precision="mixed_fp16")
    layout = check(there, world) if check else Layout(world)
    device = kind
    if kind == "measured":
        device = machines.detect(cfg.device, "fp32", False).device.type
    cuda = device not in ("cpu", "mps")
    known = {"cuda": cuda, "state_bytes": state_bytes(cfg), "tuning": tuning_of(cfg)}
    layout = replace(layout, **known)
    run = DryRun(cfg, written, flags, layout)
    if cfg.precision in machines.FP8:
        text = f"precision: {cfg.precision} is counted as mixed_bf16 here"
        notes = [*notes, f"{text}; how much faster it is has not been measured"]
    if not run.data.sources and not cfg.prepare:
        notes = [*notes, f"data_dir {cfg.data_dir} is not there yet"]
    if layout.shard == 1:  # zero_stage: 0 is what this is
        notes = [*notes, *without_effect(cfg, written)]
    report = Report(cfg.out_dir, environment("RANK", 0) == 0)
    for line in start_lines(run.facts(notes)):
        report.say(line)
    simulation = run.simulation()
    for line in simulation.lines():
        report.say(line)
    if check:
        for line in run.checked_lines(simulation.cheapest or simulation.as_it_is):
            report.say(line)
    return 0
