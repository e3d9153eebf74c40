"""A look at a few layers of a run on fake tensors: how near the plan's memory comes to it.

For `--dry_run` of train_fsdp.py (tools/simulate.py). Nothing is computed, and nothing allocated.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from kernels import run_experts
from lumen import machine as machines
from lumen.config import Config
from lumen.exchange import AllToAll, Combine
from lumen.plan import GIB, Layout, ShardedStep, StepShape, on_meta
from model import ModelConfig, Transformer
from train_fsdp import meshes, parallelize


def depths(cfg: ModelConfig) -> tuple[int, int]:
    """Two numbers of layers between which a model grows by a whole period of its pattern.
    ValueError where none are.

    From three periods on, as the block before and the block behind the one in backward hold memory
    too.
    """
    one_by_one = cfg.moe_layers or cfg.mod_layers or isinstance(cfg.mod_capacity, list)
    if one_by_one or cfg.mod_end_layer or cfg.mod_start_layer:
        raise ValueError("layers are listed one by one: no straight line leads from few to all")
    period = math.lcm(cfg.moe_every, cfg.mod_every if cfg.mod_capacity != 1 else 1)
    first = cfg.n_dense_layers + 3 * period
    if first + period > cfg.n_layers:
        raise ValueError(f"{cfg.n_layers} layers are too few")
    return first, first + period


def compared_lines(
    words: str,
    seen: dict[int, int],
    model: Transformer,
    layout: Layout,
    rows: int,
    precision: str,
    recompute: str,
) -> list[str]:
    """What a fake run of the configuration `words` saw at two depths (layers -> bytes at the peak)
    beside the plan's, and both extended to all."""
    layers = model.cfg.n_layers

    def planned(n):
        there = model if n == layers else on_meta(replace(model.cfg, n_layers=n))
        return visible_memory(there, layout, rows, precision, recompute)["total"]

    a, b = sorted(seen)
    line = seen[b] + (seen[b] - seen[a]) / (b - a) * (layers - b)
    each = []
    for n in (a, b):
        each.append(f"{n} layers {seen[n] / GIB:.2f}, plan {planned(n) / GIB:.2f}")
    text = f"{words}, on fake tensors; GiB at the peak, balanced,"
    text += f" without moments and inside of experts: {'; '.join(each)}"
    far = f"{layers} layers by a straight line {line / GIB:.2f}, plan {planned(layers) / GIB:.2f}"
    return [f"checked    {text}", f"checked    {far}: {planned(layers) / line - 1:+.1%}"]


def visible_memory(model, layout: Layout, rows: int, precision: str, recompute: str) -> dict:
    """rank_memory of one balanced micro-step, without what fake_run cannot see:
    moments, what the experts' operator allocates inside, and logits in chunks larger than a
    CPU's."""
    step = StepShape(rows, 1, precision, recompute)
    return ShardedStep(model, layout, step, imbalance=1.0, all_visible=False).peak()


def balanced(group, x, p, ids, w13, w2, backend: str):
    """exchange() where every rank sends and gets equally many rows: no host looks at data, of which
    there is none."""
    ranks, rows = group.size(), ids.numel() // group.size() * group.size()
    sizes = [rows // ranks] * ranks
    order = ids.flatten().argsort(stable=True)[:rows]
    tokens = order // ids.shape[1]
    came, gates = (AllToAll.apply(t, sizes, sizes, group) for t in (x[tokens], p.flatten()[order]))
    expert = torch.arange(rows, device=x.device) % len(w2)
    y = run_experts(came, gates[:, None], expert[:, None], w13, w2, backend)
    return Combine.apply(AllToAll.apply(y, sizes, sizes, group), order, *ids.shape)


def fake_run(cfg: Config, layout: Layout, n_layers: int) -> int:
    """Bytes of rank 0 at the peak of a forward and backward pass with so many layers of the model.

    The real classes under FSDP2, on tensors without content and a group of processes that are not
    there, watched by torch's FSDPMemTracker.
    """
    small = replace(cfg.model, n_layers=n_layers)
    mine = not dist.is_initialized()
    if mine:
        machines.init_fake_group(layout.world)
    try:
        with torch.device("meta"):
            model = Transformer(small)
        dtype = machines.DTYPES[cfg.precision]
        parallelize(model, cfg, *meshes("cpu", layout), dtype, balanced)
        model.compute_dtype, model.recompute = dtype, cfg.activation_checkpointing
        with machines.fake_tensors():
            model.to_empty(device="cpu")
            # its moments are not counted here
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            ids = torch.zeros(cfg.batch_size, small.max_seq_len, dtype=torch.long)
            return machines.peak_of_fake_step(model, optimizer, ids)
    finally:
        if mine:
            dist.destroy_process_group()
