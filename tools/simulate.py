"""TODO."""

from __future__ import annotations

import contextlib
import json
import math
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import pick_attention, pick_backend, run_experts
from lumen import machine as machines
from lumen import tokenizer as tokenizers
from lumen.config import SHARDING, Config
from lumen.errors import UserError
from lumen.launch import environment
from lumen.loader import Source
from lumen.machine import Hardware, describe
from lumen.plan import (
    IMBALANCE,
    RECOMPUTE,
    SIZES,
    YEAR,
    Layout,
    Unit,
    auto_steps,
    candidates,
    count,
    kept_bytes,
    misfit,
    on_meta,
    rank_memory,
    shapes,
    smallest_machines,
    span,
    training_flops,
    units,
)
from lumen.report import Report
from model import ModelConfig, Transformer
from train import lr_at, rise
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


def fake_run(cfg: Config, layout: Layout, small: ModelConfig) -> dict[str, int]:
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
        dtype = Sharded.compute_dtype(cfg)
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


# ---------------------------------------------------------------- python train.py CONFIG --dry_run


def open_data(cfg: Config) -> tuple[dict[str, Source], dict[str, Source], int]:
    """-> the sources' training and validation splits, and the size of the vocabulary.

    What a real start refuses is refused (E113, E114). Data that `prepare` would make are not made: no sources then.
    """
    vocab_size = cfg.model.vocab_size
    if cfg.prepare and not (Path(cfg.data_dir) / "manifest.json").exists():
        spec = cfg.prepare.get("tokenizer") or "bpe:8192"
        if not vocab_size:
            vocab_size = int(spec[4:]) if spec.startswith("bpe:") else tokenizers.load(spec).n_vocab
        return {}, {}, vocab_size
    if cfg.data_dir:
        folders = {"data": cfg.data_dir}
    else:
        folders = {name: str(spec["dir"]) for name, spec in cfg.data["sources"].items()}
    train, val, sums = {}, {}, {}
    for name, folder in folders.items():
        train[name] = Source(folder, "train", cfg.model.max_seq_len, cfg.val_fraction)
        held_out = Source(folder, "val", cfg.model.max_seq_len, cfg.val_fraction)
        if held_out.windows and cfg.val_fraction > 0:
            val[name] = held_out
        if train[name].manifest:
            sums[train[name].manifest["tokenizer"]["sha256"]] = name
    prepared = [train[name] for name in sums.values()]
    for source in prepared[1:]:
        if not tokenizers.load(source.path).same_ids(tokenizers.load(prepared[0].path)):
            names = " and ".join(sums.values())
            raise UserError("E113", f"data.sources {names} have different tokenizers")
    if prepared and not vocab_size:
        vocab_size = prepared[0].manifest["tokenizer"]["n_vocab"]
    if not vocab_size:
        text = "model.vocab_size must be set: bare shards do not say which tokenizer made them"
        raise UserError("E113", text)
    for source in (*train.values(), *val.values()):
        source.check_vocab(vocab_size)
    return train, val, vocab_size


class DryRun(Report):
    """A run as its start block and the simulation want to see it: resolved, but neither built nor given a folder.

    `elsewhere`: --hardware names a card; then this machine computes nothing and what it cannot do does not matter.
    """

    def __init__(self, cfg: Config, written: dict, flags: dict, layout: Layout):
        self.bar = self.log_file = None
        self.main = environment("RANK", 0) == 0  # this rank speaks
        self.written, self.dry_run, self.layout = written, flags, layout
        self.elsewhere = flags["hardware"] != "measured"
        self.precision = None  # there; None: as this machine resolves it
        if self.elsewhere:
            self.precision = "fp32" if flags["hardware"] == "cpu" else "mixed_bf16"
            if flags["hardware"] in machines.NO_BF16:
                self.precision = "mixed_fp16"
            if cfg.precision == "fp32":
                self.precision = "fp32"
            cpu = {"precision": "fp32", "device": "cpu", "compile_model": False}
            cfg = replace(cfg, **cpu, expert_backend="slices")
        local_rank = environment("LOCAL_RANK", 0)
        self.machine = machines.detect(cfg.device, cfg.precision, cfg.compile_model, local_rank)
        self.sources, self.val_sources, vocab_size = open_data(cfg)
        self.cfg = replace(cfg, model=replace(cfg.model, vocab_size=vocab_size))
        if cfg.early_stopping_patience and not self.val_sources:
            text = f"early_stopping_patience: {cfg.early_stopping_patience} stops by evaluations"
            raise UserError("E114", f"{text}; {self.no_validation()}")
        try:
            self.counted = on_meta(self.cfg.model)
        except ValueError as error:
            raise UserError("E002", str(error)) from error
        self.changes: list[str] = []
        self.hint: str | None = None
        self.misfit = ""
        self.rows_per_step = self.rows_of_a_step()
        self.share_rows()
        self.set_length()
        if not self.elsewhere:
            self.look_here()
        self.experts_why = ""
        if self.cfg.model.n_experts:
            backend, self.experts_why = self.pick_experts()
            self.cfg = replace(self.cfg, expert_backend=backend)

    def rows_of_a_step(self) -> int:
        """Rows of all ranks and micro-steps. E002 where the keys contradict each other."""
        cfg, ranks, T = self.cfg, self.layout.world, self.cfg.model.max_seq_len
        if not cfg.batch_tokens:
            return cfg.batch_size * cfg.gradient_accumulation_steps * ranks
        unit = T * ranks
        if cfg.batch_tokens % unit:
            near = max(1, round(cfg.batch_tokens / unit)) * unit
            text = f"batch_tokens: {cfg.batch_tokens} is not a multiple of processes x max_seq_len"
            raise UserError("E002", f"{text}, {ranks} x {T}; the nearest that is: {near}")
        rows = cfg.batch_tokens // T
        if "gradient_accumulation_steps" in self.written and cfg.batch_size != "auto":
            fixed = cfg.batch_size * cfg.gradient_accumulation_steps * ranks
            if fixed != rows:
                text = f"batch_tokens is {rows} rows, batch_size x accumulation x processes {fixed}"
                raise UserError("E002", f"{text}: drop one")
        return rows

    def share_rows(self) -> None:
        """The micro-batch: as written, as an earlier run here found it to fit, or for auto as the estimate says."""
        rows, ranks = self.rows_per_step, self.layout.world
        size = self.cfg.batch_size
        if not self.elsewhere:
            size = self.hinted_size(size)
        if size == "auto":
            size = self.largest_that_fits(rows // ranks)
        fits = [n for n in range(1, min(size, rows) + 1) if rows % (n * ranks) == 0]
        if not fits:
            can = [world for world in range(1, 2 * ranks + 2) if rows % world == 0]
            near = sorted(can, key=lambda world: abs(world - ranks))[:2]
            text = f"{rows} rows per step cannot be shared by {ranks} processes"
            raise UserError("E600", f"{text}; can: {sorted(near)}")
        micro = max(fits)
        if micro != size and self.written.get("batch_size", "auto") != "auto":
            text = f"batch_size: {size} does not fit {rows} rows on {ranks} ranks: {micro}"
            self.changes.append(text)
        steps = rows // (micro * ranks)
        self.cfg = replace(self.cfg, batch_size=micro, gradient_accumulation_steps=steps)

    def hinted_size(self, size: int | str) -> int | str:
        """`size`, or less where a run in out_dir has met the end of this machine's memory (oom_hint.json)."""
        file = Path(self.cfg.out_dir) / "oom_hint.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            hint = json.loads(file.read_text())
            total = round(machines.total_memory(self.machine.device) / 2**30)
            same_device = hint.get("device") in (None, [self.machine.name, total])
            if same_device and hint["written"] == self.written.get("batch_size"):
                kept = hint["micro_batch"]
                self.hint = f"batch_size: {kept}, since a larger one ran out of memory ({file})"
                return kept if size == "auto" else min(size, kept)
        return size

    def largest_that_fits(self, rows: int) -> int:
        """batch_size: auto. The most rows, of those that divide a rank's, that the estimate fits into target_memory."""
        have = machines.own_memory(self.machine.device)
        precision = self.precision or self.machine.precision
        if self.elsewhere:
            have = self.hardware().memory
        room, recompute = self.cfg.target_memory * have, self.cfg.activation_checkpointing
        need = {}
        for n in range(1, rows + 1):
            if rows % n == 0:
                args = (n, rows // n, precision, recompute, IMBALANCE)
                need[n] = rank_memory(self.counted, self.layout, *args)["total"]
        best = max((n for n, size in need.items() if size <= room), default=1)
        sizes = f"about {need[best] / 2**30:.2f} of {room / 2**30:.2f} GiB"
        self.hint = f"batch_size: auto is {best}: {sizes}"
        return best

    def set_length(self) -> None:
        """Steps, warm-up and the lowest rate. E114 where the data are less than one step."""
        cfg, T, rows = self.cfg, self.cfg.model.max_seq_len, self.rows_per_step
        windows = sum(source.windows for source in self.sources.values())
        self.flops_per_token = self.counted.flops_per_token()
        without_mod = replace(cfg.model, mod_capacity=1.0, mod_layers=None)
        # parameters that work on a token: MoE's active ones, MoD's weighted by its share of the FLOPs
        share = self.flops_per_token / on_meta(without_mod).flops_per_token()
        self.n_working = round(self.counted.n_params()["active"] * share)
        steps = cfg.max_steps
        if steps is None and cfg.auto_epoch_scaling and windows:
            limits = (cfg.chinchilla_multiplier, cfg.min_auto_epochs, cfg.max_auto_epochs)
            steps, why = auto_steps(self.n_working, windows * T, rows * T, *limits)
            self.changes.append(why)
        if steps is None:
            epochs = 1.0 if cfg.num_epochs is None else cfg.num_epochs
            steps = int(windows * epochs) // rows
        asked = "max_steps" in self.written or cfg.num_epochs == 0
        if steps < 1 and not asked and self.sources:
            text = f"{windows} rows of {T} tokens are less than one step of {rows}"
            raise UserError("E114", f"{text}; lower the batch")
        low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
        warmup = min(2000, steps // 20) if cfg.warmup_steps is None else cfg.warmup_steps
        if 0 < warmup < 1:
            warmup = round(warmup * steps)
        self.cfg = replace(cfg, max_steps=steps, min_lr=low, warmup_steps=int(warmup))
        self.warm_up = rise(self.cfg)

    def look_here(self) -> None:
        """The run as it would be on this machine: whether it fits, the speed of its matrices, what `auto` becomes."""
        cfg, machine = self.cfg, self.machine
        how = (machine.precision, cfg.activation_checkpointing)
        have = machines.own_memory(machine.device)
        args = (cfg.batch_size, self.rows_per_step, how, have, cfg.target_memory)
        why, sure = misfit(self.counted, self.layout, *args)
        if why:
            self.misfit = f"this {'will' if sure else 'may'} not fit: {why}"
        self.peak = machines.peak_flops(machine)
        compiled = machine.compile
        if compiled is None:
            tokens = self.rows_per_step * cfg.model.max_seq_len * cfg.max_steps
            compiled = self.flops_per_token * tokens / (self.peak * self.layout.world) > 600
        try:
            place = (machine.device, machine.compute_dtype)
            attention, self.attention_why = pick_attention(cfg.attention, cfg.model, *place)
        except ValueError as error:
            raise UserError("E002", str(error)) from error
        deterministic = cfg.deterministic
        if deterministic == "auto":
            deterministic = machine.device.type == "cpu"
        changed = {"precision": machine.precision, "compile_model": compiled}
        changed |= {"attention": attention, "deterministic": deterministic}
        self.cfg = replace(cfg, **changed)

    def pick_experts(self) -> tuple[str, str]:
        """The backend of the expert layers, and why it is that one."""
        cfg, m = self.cfg, self.cfg.model
        if self.misfit:  # a layer of its experts alone may be too much
            return "slices", "nothing tried, since the run does not fit here"
        shape = (m.d_model, m.d_expert, m.n_experts, m.n_experts_per_token)
        place = (self.machine.device, self.machine.compute_dtype)
        try:
            return pick_backend(cfg.expert_backend, *place, *shape, cfg.batch_size * m.max_seq_len)
        except ValueError as error:
            raise UserError("E003", f"expert_backend: {error}") from error

    def hardware(self) -> Hardware:
        return machines.hardware(self.dry_run["hardware"], self.machine, self.dry_run)

    @property
    def parallel(self):
        """What the start block asks of Parallel."""
        rows = (0, self.layout.world)
        return types.SimpleNamespace(rows=lambda: rows, layout=self.layout, world=1)

    def scheduled_lr(self, step: int) -> float:
        return lr_at(self.cfg, step)

    def simulated(self) -> dict:
        """Says what the run would need where it is to run; the configuration that is to be checked, see below."""
        cfg, given = self.cfg, self.dry_run
        assumed = {k: given[k] for k in ("mfu", "imbalance", "disk_gb_s") if k in given}
        assumed["share"] = cfg.target_memory
        precision = self.precision or cfg.precision
        counts = (cfg.batch_size, self.rows_per_step, cfg.max_steps, precision)
        where = (given["hardware"], self.hardware())
        lines, best = dry_run_lines(
            self.counted, self.layout, *counts, cfg.activation_checkpointing, *where, **assumed
        )
        for line in lines:
            self.say(line)
        return best

    def checked_lines(self, best: dict) -> list[str]:
        """How near rank_memory comes to a look at a few layers of the configuration `best`, on fake tensors."""
        layout, rows, recompute = best["layout"], best["rows"], best["recompute"]
        if layout.shard == 1:
            return []
        precision = self.precision or self.cfg.precision
        changed = {"batch_size": rows, "activation_checkpointing": recompute}
        cfg = replace(self.cfg, precision=precision, **changed)
        try:
            two = depths(cfg.model)
        except ValueError as error:
            return [f"checked    not: {error}"]
        try:
            seen = {n: fake_run(cfg, layout, shallow(cfg.model, n)) for n in two}
            return compared_lines(seen, self.counted, layout, rows, precision, recompute)
        except (
            Exception
        ) as error:  # private parts of torch, others in each version: it goes without
            first = (str(error).strip().splitlines() or ["?"])[0]
            text = f"checked    not: fake tensors failed on torch {torch.__version__}"
            return [f"{text}: {type(error).__name__}: {first}"]


def dry_run(cfg: Config, written: dict, notes: list[str], flags: dict, check=None) -> int:
    """`--dry_run`: prints what the run would be on this machine, or on --world_size x --hardware. Returns 0.

    The first four are what read_config returns. check(cfg, world) -> Layout: train_fsdp.py's; without it every rank
    holds a replica. UserErrors are those of a real start, but E200: what fits is the question here.
    """
    world = flags.get("world_size", environment("WORLD_SIZE", 1))
    kind = machines.hardware_key(flags.get("hardware", "measured" if world == 1 else "h100"))
    flags = flags | {"world_size": world, "hardware": kind}
    there = cfg
    if kind in machines.NO_BF16 and cfg.precision != "fp32":
        there = replace(cfg, precision="mixed_fp16")
    layout = check(there, world) if check else Layout(world)
    device = kind
    if kind == "measured":
        device = machines.detect(cfg.device, "fp32", False).device.type
    layout = replace(layout, cuda=device not in ("cpu", "mps"))
    run = DryRun(cfg, written, flags, layout)
    if layout.shard == 1:  # zero_stage: 0 is what this is
        without_effect = [key for key in SHARDING if key in written]
        if cfg.zero_stage == 0 and "zero_stage" in without_effect:
            without_effect.remove("zero_stage")
        if without_effect:
            where = "takes effect under train_fsdp.py, on several ranks"
            notes = [*notes, f"{', '.join(without_effect)}: {where}"]
    run.start_block(notes)
    best = run.simulated()
    if check:
        for line in run.checked_lines(best):
            run.say(line)
    return 0
