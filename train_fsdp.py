"""Train with the model sharded: `torchrun --nproc_per_node=N train_fsdp.py CONFIG`, the same YAML
as train.py's.

`Sharded` is train.Parallel on PyTorch's FSDP2: weights, gradients and moments are sharded over all
ranks (zero_stage) or over groups of them (hsdp_shard_size), and experts live on ranks of their own
(expert_parallel). Loop, orchestrator, logging, data and checkpoints are train.py's; a checkpoint of
any layout is read by any other. In this order: how a model is sharded, which keys go together,
Sharded. How rows travel to experts on other ranks is in lumen/exchange.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import lumen.waiting  # noqa: F401 - before torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import train
from lumen import owners, plan
from lumen.config import Config
from lumen.errors import UserError
from lumen.exchange import exchange
from lumen.launch import command, environment
from lumen.machine import DTYPES, local_region, set_collective_timeout
from model import Transformer, role
from model_moe import Experts
from train import Parallel

# ---------------------------------------------------------------- how a model is sharded


def meshes(kind: str, layout: plan.Layout):
    """-> (mesh of the dense weights, mesh of the experts or None); kind: cuda or cpu.

    Dense: 1-D (shard), or (replicate, shard) where several groups hold a copy each. Experts, with
    expert_parallel: (shard, experts).
    """
    world, size, ep = layout.world, layout.shard, layout.expert_parallel
    if size < world:
        dense = init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))
    else:
        dense = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    sparse = None
    if ep > 1:
        sparse = init_device_mesh(kind, (world // ep, ep), mesh_dim_names=("shard", "experts"))
    return dense, sparse


def parallelize(
    model: Transformer, cfg: Config, dense, sparse=None, compute_dtype=torch.float32, run=exchange
) -> None:
    """FSDP2 on a model on the meta device, block by block.

    `dense`, `sparse`: see meshes; with the latter each rank gets its share of the experts, which
    `run` computes. Embedding, last norm and head are one unit, the root, gathered once a step.
    Weights travel in compute_dtype, but routers and the root's in fp32, in which they compute.
    Gradients are summed, never averaged: the loss is a sum over the tokens of all ranks.
    """
    reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.reduce_dtype]
    low = None if compute_dtype == torch.float32 else compute_dtype  # None: weights stay fp32
    how = {"reduce_dtype": reduce_dtype, "cast_forward_inputs": False}
    in_fp32 = MixedPrecisionPolicy(**how)
    in_compute_dtype = MixedPrecisionPolicy(param_dtype=low, **how)

    def shard(module, mesh, mp_policy, reshard=cfg.zero_stage == 3):
        ranks = mesh.size(-1)

        def placement(p):
            return Shard(plan.cut_dimension(tuple(p.shape), ranks))

        fully_shard(
            module,
            mesh=mesh,
            shard_placement_fn=placement,
            mp_policy=mp_policy,
            reshard_after_forward=reshard,
        )

    if sparse is not None:
        for moe in model.sparse_layers("moe").values():
            keep_own_experts(moe, sparse.get_group("experts"), run)
    for block in model.blocks:
        # units inside the block first: fully_shard takes what no unit below has taken
        for name, module in list(block.named_modules()):
            own = [role(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)]
            if low and "router" in own:
                shard(module, dense, in_fp32)
            if sparse is not None and isinstance(module, Experts):
                shard(module, sparse["shard"], in_compute_dtype)
        shard(block, dense, in_compute_dtype)
    shard(model, dense, in_fp32, reshard=False)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other; right on NCCL too


def keep_own_experts(moe, group, run) -> None:
    """In place of a layer's experts this rank's share of them, which run(group, ...) computes."""
    n, *shape = moe.experts.w2.shape
    with torch.device("meta"):
        moe.experts = Experts(n // group.size(), *shape, functools.partial(run, group))


def region(offset, shape) -> tuple[slice, ...]:
    """Where a shard lies in the whole tensor."""
    return tuple(slice(a, a + n) for a, n in zip(offset, shape))


def fsdp_modules(model) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


# ---------------------------------------------------------------- which keys go together

FP16 = "precision: mixed_fp16 does not go with train_fsdp.py; use mixed_bf16 or fp32"


def layout_of(cfg: Config, world: int) -> plan.Layout:
    """How the keys lay the model on `world` ranks; UserError E002 where they do not go together."""
    if world == 1:
        return plan.Layout()
    if not cfg.zero_stage:
        defaults = {"hsdp_shard_size": 0, "expert_parallel": 1, "reduce_dtype": "fp32"}
        changed = [key for key, value in defaults.items() if getattr(cfg, key) != value]
        if changed:
            text = "zero_stage: 0 keeps a replica on each rank, so it takes no"
            raise UserError("E002", f"{text} {', '.join(changed)}")
        return plan.Layout(world)
    if cfg.precision == "mixed_fp16":
        raise UserError("E002", FP16)
    if cfg.reduce_dtype == "bf16" and (cfg.zero_stage == 1 or 0 < cfg.hsdp_shard_size < world):
        text = "reduce_dtype: bf16 would also sum micro-steps in bf16 with zero_stage 1 or HSDP"
        raise UserError("E002", text)
    layout = plan.Layout(
        world,
        cfg.zero_stage,
        cfg.hsdp_shard_size,
        cfg.expert_parallel,
        reduce_bytes=2 if cfg.reduce_dtype == "bf16" else 4,
    )
    return layout.check(plan.expert_slots(cfg.model))


# ---------------------------------------------------------------- parallel


class Sharded(Parallel):
    """train.Parallel with the model sharded. The optimizer works on this rank's shards, as plain
    tensors.

    shards: name -> (the DTensor, its local shard). regions: name -> (offset, shape of the whole);
    of an expert-parallel layer the whole counts the experts of all ranks. names: id of a DTensor ->
    name.
    """

    collective_free = False  # a forward pass gathers: every rank has to take part in each

    def __init__(self, cfg: Config, layout: plan.Layout | None = None):
        layout = layout or layout_of(cfg, environment("WORLD_SIZE", 1))
        super().__init__(cfg)
        self.stage = cfg.zero_stage
        own = self.layout  # what the model and the machine say, however it is cut
        known = {"cuda": own.cuda, "state_bytes": own.state_bytes, "tuning": own.tuning}
        self.layout = dataclasses.replace(layout, **known)
        self.dense, self.sparse = meshes(self.device.type, layout)
        # their groups begin with torch's own half an hour
        set_collective_timeout(max(self.STARTUP_TIMEOUT, cfg.comm_timeout))
        self.replicas = 1  # copies of the dense weights
        self.writes = True  # of several copies one is saved
        if self.dense.ndim == 2:
            self.replicas = self.dense.size(0)
            self.writes = self.dense.get_local_rank("replicate") == 0

    def build(self, cfg: Config, precision: str, fill: bool = True) -> Transformer:
        """Made on the meta device, sharded, and filled shard by shard.

        Beside its shards a rank holds one unit (a block) at a time, gathered, and the weights are
        those that one process would begin with.
        """
        if precision == "mixed_fp16":  # auto may have become that
            raise UserError("E002", FP16)
        with torch.device("meta"):
            model = Transformer(cfg.model)
        parallelize(model, cfg, self.dense, self.sparse, DTYPES[precision])
        model.to_empty(device=self.device)
        for mod in model.sparse_layers("mod").values():
            mod.collective_free = False
        for moe in model.sparse_layers("moe").values():
            for name, value in moe.router.first_buffers().items():
                getattr(moe.router, name).copy_(value)
        for module in fsdp_modules(model):  # it settles where shards live when it first gathers
            module.unshard()
            module.reshard()
        self.shards, self.regions, self.names = {}, {}, {}  # see the class
        with torch.no_grad():
            for name, p in model.named_parameters():
                local = p.to_local()
                shape, offset = local_region(p)
                assert tuple(local.shape) == tuple(shape), name
                self.shards[name] = (p, local.detach())
                self.regions[name] = self.region_in_all(name, tuple(offset), tuple(p.shape))
                self.names[id(p)] = name
                if fill:
                    self.fill_shard(model, name, local, cfg.seed)
        return model

    def region_in_all(self, name: str, offset: tuple, shape: tuple) -> tuple[tuple, tuple]:
        """(offset, shape) of a shard in its parameter -> in the parameter that one process has."""
        if self.sparse is None or role(name) != "expert":
            return offset, shape
        ranks, index = self.sparse["experts"].size(), self.sparse.get_local_rank("experts")
        first = offset[0] + index * shape[0]
        return (first, *offset[1:]), (shape[0] * ranks, *shape[1:])

    def fill_shard(self, model, name: str, local: torch.Tensor, seed: int) -> None:
        """Initial weights: the whole is drawn on the host, and what is ours copied; of experts one
        at a time."""
        offset, shape = self.regions[name]
        where = region(offset, local.shape)
        if role(name) == "expert":  # (E, a, b)
            for e, shard in enumerate(local, offset[0]):
                full = torch.empty(1, *shape[1:])
                model.fill(name, full, seed, e)
                shard.copy_(full[0][where[1:]])
        elif local.numel():
            full = torch.empty(shape)
            model.fill(name, full, seed)
            local.copy_(full[where])

    def weights(self, model) -> dict[str, torch.Tensor]:
        return {name: local for name, (p, local) in self.shards.items() if p.requires_grad}

    def owners(self):
        return owners.of_shards(self.shards, self.dense, self.sparse)

    @contextlib.contextmanager
    def microstep(self, model, last: bool):
        """When FSDP2 communicates: gradients are sent after each micro-step (stages 2, 3) or after
        the last one."""
        if self.stage == 1:
            model.set_requires_gradient_sync(last)
        if self.stage < 3:
            model.set_reshard_after_backward(last)
        if self.replicas > 1:
            model.set_requires_all_reduce(last)
        yield

    def reduce(self, model, stats: torch.Tensor) -> torch.Tensor:
        """Gradients were summed in backward; here they reach the optimizer's tensors."""
        for p, local in self.shards.values():
            if p.requires_grad:
                local.grad = torch.zeros_like(local) if p.grad is None else p.grad.to_local()
                p.grad = None
        dist.all_reduce(stats)
        return stats

    def grad_norm(self, model) -> torch.Tensor:
        norms = torch._foreach_norm([local.grad for local in self.weights(model).values()])
        square = torch.stack(norms).double().square().sum() / self.replicas
        dist.all_reduce(square)
        return square.sqrt().float()

    def local(self, p) -> torch.Tensor:
        return self.shards[self.names[id(p)]][1]

    def row(self, p, t: torch.Tensor, e: int) -> torch.Tensor:
        (first, *rest), (_, *shape) = self.regions[self.names[id(p)]]
        out = torch.zeros(shape, device=t.device, dtype=t.dtype)
        if self.writes and first <= e < first + len(t):  # of several copies one is sent
            out[region(rest, t.shape[1:])] = t[e - first]
        dist.all_reduce(out)
        return out

    def set_row(self, p, t: torch.Tensor, e: int, value) -> None:
        (first, *rest), _ = self.regions[self.names[id(p)]]
        if first <= e < first + len(t):
            t[e - first] = value[region(rest, t.shape[1:])] if torch.is_tensor(value) else value

    def finite(self, grad) -> bool:
        return super().finite(grad.to_local())

    def checksum(self, model) -> torch.Tensor:
        """Of a whole copy, the same on all ranks that share it; without a second copy nothing can
        be compared."""
        if self.replicas == 1:
            return torch.zeros((), device=self.device)
        sums = [local.view(torch.int32).sum() for _, local in self.shards.values()]
        words = torch.stack(sums).sum() % 1048573
        dist.all_reduce(words, group=self.dense.get_group("shard"))
        return words % 1048573

    def local_shards(self, name: str, tensor: torch.Tensor) -> list[tuple]:
        kind, _, rest = name.partition(".")
        owner = rest if kind == "model" else rest.rpartition(".")[0]
        if owner not in self.regions or not (tensor.dim() or kind == "model"):
            return super().local_shards(name, tensor)
        offset, shape = self.regions[owner]
        if kind == "model":  # of what is frozen the model may show the whole
            tensor = self.shards[owner][1]
        return [(offset, shape, tensor, self.writes)] if tensor.numel() else []


def make_parallel(cfg: Config, layout: plan.Layout | None = None) -> Parallel:
    """zero_stage 0, and a single process, are train.py's. layout: what layout_of has found."""
    layout = layout or layout_of(cfg, environment("WORLD_SIZE", 1))
    return Sharded(cfg, layout) if layout.zero_stage else Parallel(cfg)


def main(argv: list[str]) -> int:
    return train.main(argv, make_parallel, layout_of)


if __name__ == "__main__":
    command(main, lasting=True)
