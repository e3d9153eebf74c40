"""TODO."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist

from kernels import run_experts
from lumen import machine as machines
from lumen import plan
from lumen.config import Config
from lumen.launch import environment
from lumen.machine import Hardware, describe
from lumen.plan import (
    IMBALANCE,
    RECOMPUTE,
    SIZES,
    YEAR,
    Layout,
    Unit,
    candidates,
    count,
    kept_bytes,
    on_meta,
    rank_memory,
    shapes,
    smallest_machines,
    span,
    training_flops,
    units,
)
from model import ModelConfig, Transformer
from train import Parallel
from train_fsdp import AllToAll, Combine, Sharded, meshes, parallelize

MFU = {
    "dense": 0.38,
    "moe": 0.2,
}  # of the peak: torchtitan on H100, Llama 8B 33 to 39 %, DeepSeek-V3 16B 20.5 %
DISK = 2e9  # bytes/s that a machine writes of a checkpoint


def travel(hw: Hardware, n_bytes: float, ranks: int, stride: int = 1, each: bool = False) -> float:
    """Seconds in which each of `ranks` gets n_bytes from all of them: rings over every link and network card.

    In a ring a machine lets each byte in once and spreads it inside; `each`: every rank gets other bytes (all-to-all).
    """
    near = min(ranks, max(1, hw.per_node // stride))  # of the group in one machine
    inside = n_bytes * (near - 1) / (ranks if each else near) / hw.link
    outside = n_bytes * (1 - near / ranks) / (1 if each else near) / hw.network
    return max(inside, outside)


def traffic(
    model, layout: Layout, rows: int, steps: int, precision: str, recompute="none", imbalance=1.0
) -> dict:
    """What a rank receives in an optimizer step: name -> [(bytes, ranks of the group, stride)]."""
    cfg, b, world = model.cfg, 4 if precision == "fp32" else 2, layout.world
    root, blocks = units(model, layout, precision)
    out = {"all-gather": [], "reduce-scatter": [], "all-reduce": [], "all-to-all": []}
    if layout.shard == 1:
        return out | {"all-reduce": [(2 * 4 * count(model), world, 1)]}
    sends = steps if layout.zero_stage > 1 else 1
    each = [(root, 1, 1)]  # a unit, how many are alike, how often it is gathered in a micro-step
    for block, k in Counter(
        blocks
    ).items():  # for forward and backward; units inside a block also when it is made again
        each += [(u, k, 2 + (u is not block[0] and recompute != "none")) for u in block]
    for unit, alike, times in each:
        times = times * steps if layout.zero_stage == 3 else 1
        out["all-gather"] += [(alike * times * unit.padded() * unit.size, unit.ranks, unit.stride)]
        out["reduce-scatter"] += [
            (alike * sends * unit.padded() * layout.reduce_bytes, unit.ranks, unit.stride)
        ]
        if layout.shard < world:  # between the copies, once a step
            message = 2 * alike * unit.local() * layout.reduce_bytes
            out["all-reduce"] += [(message, world // layout.shard, layout.shard)]
    if (
        layout.expert_parallel > 1
    ):  # there and back, in forward, in backward, and when forward is made again
        moe, trips = sum(map(cfg.is_moe, range(cfg.n_layers))), 4 + 2 * (recompute != "none")
        pairs = rows * cfg.max_seq_len * cfg.n_experts_per_token * imbalance
        out["all-to-all"] += [
            (moe * trips * steps * pairs * cfg.d_model * b, layout.expert_parallel, 1)
        ]
    return out


def simulate(
    model: Transformer,
    layout: Layout,
    rows: int,
    rows_per_step: int,
    precision: str,
    recompute: str,
    hw: Hardware,
    mfu: float,
    imbalance: float = IMBALANCE,
) -> dict:
    """Memory, traffic and seconds of a step, all of it arithmetic: nothing here was measured.

    seconds: compute (FLOPs at `mfu` of the peak, blocks that are made again among them, the busiest rank's experts;
    activations that are made again are written and read once more); what is gathered and reduced in every micro-step is
    hidden behind it where it is shorter, what is once a step behind the backward pass of one micro-step; train.py's
    reduction, all-to-all and the optimizer (32 bytes a parameter) are not hidden.
    """
    cfg, steps = model.cfg, rows_per_step // (rows * layout.world)
    args = (rows, steps, precision, recompute, imbalance)
    found = {"layout": layout, "rows": rows, "steps": steps, "recompute": recompute}
    found |= {"memory": rank_memory(model, layout, *args), "traffic": traffic(model, layout, *args)}
    flops = training_flops(model)
    again = (flops - 6 * cfg.vocab_size * cfg.d_model) / 3 if recompute == "block" else 0
    if layout.expert_parallel > 1:
        experts = (
            18
            * cfg.d_model
            * cfg.d_expert
            * model.experts_used()
            * sum(map(cfg.is_moe, range(cfg.n_layers)))
        )
        again += (imbalance - 1) * experts * (4 / 3 if recompute == "block" else 1)
    seconds = {
        "compute": (flops + again) * rows * cfg.max_seq_len * steps / (hw.peak(precision) * mfu)
    }
    remade = sum(
        sum(kept_bytes(cfg, rows, precision, k)["kept"]) * sign
        for k, sign in (("none", 2), (recompute, -2))
    )
    seconds["compute"] += max(0, remade) * steps / hw.bandwidth
    for name, messages in found["traffic"].items():
        seconds[name] = sum(
            travel(hw, n, ranks, stride, name == "all-to-all") for n, ranks, stride in messages
        )
    seconds["optimizer"] = 8 * found["memory"]["weights"] / hw.bandwidth
    each = {3: ("all-gather", "reduce-scatter"), 2: ("reduce-scatter",)}.get(layout.zero_stage, ())
    each = sum(seconds[k] for k in each)
    once = seconds["all-gather"] + seconds["reduce-scatter"] + seconds["all-reduce"] - each
    room = seconds["compute"] * 2 / 3 / steps if layout.shard > 1 else 0.0
    exposed = max(0.0, each - seconds["compute"]) + max(0.0, once - room)
    seconds["step"] = seconds["compute"] + exposed + seconds["all-to-all"] + seconds["optimizer"]
    return found | {"seconds": seconds}


def cheapest(
    model,
    world: int,
    stage: int,
    rows_per_step: int,
    precision: str,
    hw: Hardware,
    room: float,
    **assumed,
):
    """The candidate that fits into `room` bytes with the shortest step, or None. Of equal ones that which sends least:
    the assumed mfu is the same for every micro-batch."""
    slots = (model.cfg.n_experts_max or model.cfg.n_experts) if model.cfg.n_experts else 0
    best, kind = None, (assumed.pop("reduce_bytes", 4), assumed.pop("cuda", True))
    for layout, rows, recompute in candidates(world, stage, slots, rows_per_step, *kind):
        found = simulate(model, layout, rows, rows_per_step, precision, recompute, hw, **assumed)
        sent = sum(found["seconds"][k] for k in found["traffic"])
        key = (found["seconds"]["step"], sent, found["memory"]["total"])
        if found["memory"]["total"] <= room and (best is None or key < best[0]):
            best = key, found
    return best and best[1]


def table_lines(head: str, rows: list[list]) -> list[str]:
    """Columns under `head`'s words, numbers to the right."""
    cells = [head.split("|"), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:]))
        for row in cells
    ]


def parameter_lines(model: Transformer, layout: Layout, precision: str) -> list[str]:
    """Where the parameters are: in all, active for a token, and on the rank that holds most."""
    cfg, ranks = model.cfg, layout.shard
    kinds = {
        "embeddings": 0,
        "attention": 0,
        "dense FFN": 0,
        "shared experts": 0,
        "experts": 0,
        "routers, norms": 0,
    }
    most, active = dict(kinds), dict(kinds)
    for block in (shapes(model)[0], *shapes(model)[1]):
        for name, shape in block:
            n = math.prod(shape)
            kind = "embeddings" if name.startswith(("embed", "head")) else "routers, norms"
            kind = "attention" if ".wqkv." in f".{name}" or ".wo." in f".{name}" else kind
            if ".w13" in name or ".w2" in name:
                kind = (
                    "experts"
                    if ".experts." in name
                    else "shared experts"
                    if ".shared." in name
                    else "dense FFN"
                )
            kinds[kind] += n
            used = (
                model.experts_used() / max(1, cfg.n_experts_max or cfg.n_experts)
                if kind == "experts"
                else 1
            )
            active[kind] += n * used
            apart, ep = kind == "experts", layout.expert_parallel
            here = (
                Unit(((shape[0] // ep, *shape[1:]),), layout.world // ep, ep, 4)
                if apart and ep > 1
                else None
            )
            most[kind] += (here or Unit((shape,), ranks, 1, 4)).local()
    rows = [[k, f"{n:,}", f"{round(active[k]):,}", f"{most[k]:,}"] for k, n in kinds.items() if n]
    rows.append(["all", *(f"{round(sum(x.values())):,}" for x in (kinds, active, most))])
    return table_lines("parameters|total|active|on the fullest rank", rows)


def name_of(found: dict) -> str:
    """A configuration as the command line has it."""
    at, text = found["layout"], ""
    text += f"--expert_parallel={at.expert_parallel} " if at.expert_parallel > 1 else ""
    text += (
        f"--hsdp_shard_size={at.hsdp_shard_size} " if at.shard < at.world and at.zero_stage else ""
    )
    return f"{text}--batch_size={found['rows']} --activation_checkpointing={found['recompute']}"


def dry_run_lines(
    model: Transformer,
    layout: Layout,
    rows: int,
    rows_per_step: int,
    max_steps: int,
    precision: str,
    recompute: str,
    name: str,
    hw: Hardware,
    mfu: float | None = None,
    imbalance: float = IMBALANCE,
    disk_gb_s: float = DISK / 1e9,
    share: float = 0.92,
) -> tuple[list[str], dict]:
    """The simulation of a run, a line each: parameters, mesh, memory, checkpoint, traffic, time, the cheapest way; and
    what simulate found of that, or of the run as it is where nothing fits."""
    cfg, world, GB = model.cfg, layout.world, 1e9
    slots = (cfg.n_experts_max or cfg.n_experts) if cfg.n_experts else 0
    layout.check(slots)
    mfu = mfu or MFU["moe" if cfg.n_experts else "dense"]
    assumed = {"mfu": mfu, "imbalance": imbalance}
    here = {
        k: simulate(model, layout, rows, rows_per_step, precision, k, hw, **assumed)
        for k in RECOMPUTE
    }
    now, tokens = here[recompute], rows_per_step * cfg.max_seq_len
    lines = [
        f"SIMULATION of {world:,} x {name}: arithmetic on data sheets and assumptions, nothing below was measured",
        *parameter_lines(model, layout, precision),
        f"mesh       {layout}, zero_stage {layout.zero_stage}; {precision}",
    ]
    names = (
        "weights",
        "gradients",
        "moments",
        "gathered",
        "reducing",
        "activations",
        "work",
        "total",
    )
    body = [
        [k, *(f"{s['memory'][n] / 2**30:.2f}" for n in names)]
        + [" ".join(f"{g}" if s["memory"]["total"] <= share * g * GB else "-" for g in SIZES)]
        for k, s in here.items()
    ]
    lines.append(f"memory     GiB on the fullest rank by activation_checkpointing (here: {recompute}), {rows} rows of"
                 f" {cfg.max_seq_len} tokens; fits {share:.0%} of so many GB")  # fmt: skip
    lines += table_lines(f"keep|{'|'.join(names)}|fits GB", body)
    size, nodes = 12 * count(model), -(-layout.shard // hw.per_node)
    lines.append(f"checkpoint {describe(size, 'B')}: {size / nodes / disk_gb_s / GB:.0f} s from {nodes} machines at"
                 f" {disk_gb_s:g} GB/s each (assumed)")  # fmt: skip
    s = now["seconds"]
    for kind, messages in now["traffic"].items():
        if n := sum(m[0] * (m[1] > 1) for m in messages):
            lines.append(f"traffic    {kind} {n / GB:,.1f} GB a step and rank: {s[kind]:.3g} s")
    peak = describe(hw.peak(precision), "FLOP/s")
    lines.append(f"time       {s['step']:.3g} s a step of {tokens:,} tokens ({now['steps']} micro-steps): compute"
                 f" {s['compute']:.3g} s at {mfu:.0%} of {peak}, optimizer {s['optimizer']:.2g} s;"
                 f" {describe(tokens / s['step'])} tokens/s")  # fmt: skip
    took, busy = s["step"] * max_steps, "GPU-hours"
    units = world / 3600
    if not layout.cuda:
        units, busy = units * torch.get_num_threads() / hw.per_node, "core-hours"
    never = ": not on this machine" if took > YEAR and name in ("cpu", "measured") else ""
    lines.append(f"length     {max_steps:,} steps, {describe(tokens * max_steps)} tokens: {span(took)},"
                 f" {describe(took * units)} {busy}{never}")  # fmt: skip
    lines += [
        f"assumed    link {hw.link / GB:g} GB/s, network {hw.network / GB:g} GB/s a GPU, {hw.per_node} in a machine:"
        f" {hw.source}",
        f"assumed    mfu {mfu:g} (torchtitan on H100: dense 8B 0.33 to 0.39, MoE 16B 0.205; Lumen's own is not known);"
        f" gathers and reductions hide behind the compute of their micro-step, all-to-all and optimizer do not;"
        + f" the busiest rank gets {imbalance:g} x the fair share of rows"
        * (layout.expert_parallel > 1),
    ]
    best = cheapest(model, world, layout.zero_stage, rows_per_step, precision, hw, share * hw.memory,
                    reduce_bytes=layout.reduce_bytes, cuda=layout.cuda, **assumed)  # fmt: skip
    if best:
        b = best["seconds"]["step"]
        lines.append(f"cheapest   {name_of(best)}: {best['memory']['total'] / 2**30:.1f} GiB, {b:.3g} s a step,"
                     f" {describe(b * max_steps * units)} {busy}")  # fmt: skip
    else:
        lines.append(f"cheapest   none: no configuration fits {world} x {hw.memory / GB:.0f} GB")
    least, asked = smallest_machines(model, layout.zero_stage, rows_per_step, precision, share)
    text = f"{', '.join(least)} hold it"
    if not layout.zero_stage and not asked:
        parts, _ = smallest_machines(model, 3, rows_per_step, precision, share)
        text += f" in whole copies; train_fsdp.py needs {' or '.join(parts)}"
    lines.append(f"smallest   {text} (powers of two that divide the batch, to 4,096)")
    return lines, best or now


def depths(cfg: ModelConfig) -> tuple[int, int]:
    """Two numbers of layers between which a model grows by a whole period of its pattern; from three periods on, as the
    block before and the block behind the one in backward hold memory too."""
    period = math.lcm(cfg.moe_every, cfg.mod_every if cfg.mod_capacity != 1 else 1)
    if (
        cfg.moe_layers
        or cfg.mod_layers
        or isinstance(cfg.mod_capacity, list)
        or cfg.mod_end_layer
        or cfg.mod_start_layer
    ):
        raise ValueError("layers are listed one by one: no straight line leads from few to all")
    first = cfg.n_dense_layers + 3 * period
    if first + period > cfg.n_layers:
        raise ValueError(f"{cfg.n_layers} layers are too few")
    return first, first + period


def shallow(cfg: ModelConfig, n_layers: int) -> ModelConfig:
    return replace(cfg, n_layers=n_layers)


def compared_lines(
    seen: dict[int, dict], model: Transformer, layout, rows, precision, recompute
) -> list[str]:
    """What a fake run saw at two depths (layers -> its peak) beside rank_memory, and both extended to the model."""
    name = name_of({"layout": layout, "rows": rows, "recompute": recompute})

    def planned(n):
        there = model if n == whole else on_meta(shallow(model.cfg, n))
        return rank_memory(there, layout, rows, 1, precision, recompute, 1.0, True)["total"]

    (a, b), whole, GiB = sorted(seen), model.cfg.n_layers, 2**30
    saw = {n: seen[n]["Total"] for n in (a, b)}
    far = saw[b] + (saw[b] - saw[a]) / (b - a) * (whole - b)
    text = "; ".join(f"{n} layers {saw[n] / GiB:.2f}, plan {planned(n) / GiB:.2f}" for n in (a, b))
    off = planned(whole) / far - 1
    return [
        f"checked    {name}, on fake tensors; GiB at the peak, balanced, without moments and inside of experts: {text}",
        f"checked    {whole} layers by a straight line {far / GiB:.2f}, plan {planned(whole) / GiB:.2f}: {off:+.1%}",
    ]


def balanced(group, x, p, ids, w13, w2, backend: str):
    """exchange() where every rank sends and gets equally many rows: no host looks at data, of which there is none."""
    ranks, rows = group.size(), ids.numel() // group.size() * group.size()
    sizes = [rows // ranks] * ranks
    order = ids.flatten().argsort(stable=True)[:rows]
    tokens = order // ids.shape[1]
    came, gates = (AllToAll.apply(t, sizes, sizes, group) for t in (x[tokens], p.flatten()[order]))
    expert = torch.arange(rows, device=x.device) % len(w2)
    y = run_experts(came, gates[:, None], expert[:, None], w13, w2, backend)
    return Combine.apply(AllToAll.apply(y, sizes, sizes, group), order, *ids.shape)


def fake_run(cfg: Config, layout: plan.Layout, small: ModelConfig) -> dict[str, int]:
    """Bytes of rank 0 at the peak of a forward and backward pass of a shallow model: the real classes under FSDP2 on
    tensors without content and a group of processes that are not there, watched by torch's FSDPMemTracker."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("fake", rank=0, world_size=layout.world, store=FakeStore())
    try:
        with torch.device("meta"):
            model = Transformer(small)
        dtype = Sharded.compute_dtype(cfg.precision)
        parallelize(model, cfg, *meshes("cpu", layout), dtype, balanced)
        model.compute_dtype, model.recompute = dtype, cfg.activation_checkpointing
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(
                model.parameters(), foreach=False
            )  # its moments are not counted here
            ids = torch.zeros(cfg.batch_size, small.max_seq_len, dtype=torch.long)
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((ids,))
            with tracker:
                model(ids, targets=ids)[0].backward()
    finally:
        if mine:
            dist.destroy_process_group()
    peak = {}
    for found in tracker.get_tracker_snapshot("peak").values():
        for kind, n in found.items():
            kind = str(getattr(kind, "value", kind))
            peak[kind] = peak.get(kind, 0) + n
    return peak


class Planned(Parallel):
    """One process that counts as `world`: for dry runs."""

    def __init__(self, cfg: Config, layout: plan.Layout):
        self.rank, self.world, self.layout, self.buffer = environment("RANK", 0), 1, layout, None
        self.device, self.collective_free = (
            machines.detect(cfg.device, "fp32", False).device,
            layout.shard == 1,
        )

    def rows(self) -> tuple[int, int]:
        return 0, self.layout.world
