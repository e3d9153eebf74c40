"""Train with the model in parts: `torchrun --nproc_per_node=N train_fsdp.py CONFIG`, the same YAML as train.py's.

`Sharded` is train.Parallel on PyTorch's FSDP2: weights, gradients and moments live in parts on the ranks (zero_stage),
on groups of them (hsdp_shard_size), and experts on ranks of their own (expert_parallel). Loop, orchestrator, logging,
data and checkpoints are train.py's; a checkpoint of any layout is read by any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import train
from kernels import run_experts
from lumen import plan
from lumen.config import Config
from lumen.errors import UserError
from lumen.launch import command, environment
from model import Transformer
from model_moe import Experts
from train import Parallel

# ---------------------------------------------------------------- experts on other ranks


class AllToAll(torch.autograd.Function):
    """Rows to the ranks of `group`: ins[i] of them to rank i, outs[i] from it; gradients go the other way."""

    @staticmethod
    def forward(ctx, x, outs, ins, group):
        ctx.sizes = ins, outs, group
        y = x.new_empty(sum(outs), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), outs, ins, group=group)
        return y

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.sizes), None, None, None


class Combine(torch.autograd.Function):
    """out[t] = the sum of what came back for token t: y (N, d), row i for the pair order[i] = token * K + k -> (T, d).
    One k after the other and in fp32: index_add would need atomics on CUDA, add in any order, and keep y."""

    @staticmethod
    def forward(ctx, y, order, T, K):
        ctx.tokens = order // K
        out = y.new_zeros(T, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
        at = order.new_full((T * K,), len(y)).index_copy_(
            0, order, torch.arange(len(y), device=y.device)
        )
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])  # for the pairs that went to nobody
        for k in range(K):
            out += y[at[k::K]]
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.tokens], None, None, None


@torch.compiler.disable  # the host looks at sizes; torch 2.11 compiles that wrongly
def exchange(group, x, p, ids, w13, w2, backend: str):
    """run_experts where each rank of `group` holds a share of the experts, in order: (token, expert) pairs travel to
    the expert's rank, are computed and weighed there, and come back. x (T, d), p (T, K), ids (T, K) over all experts,
    w13 and w2 those of this rank -> (T, d). The sizes that travel are known to the host: one sync."""
    here, ranks = len(w2), group.size()
    flat = ids.flatten()
    counts = torch.bincount(flat.clamp(max=here * ranks), minlength=here * ranks + 1)[
        : here * ranks
    ]
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=group)
    ins, outs = torch.stack([c.view(ranks, here).sum(1) for c in (counts, theirs)]).tolist()
    order = flat.argsort(stable=True)[: sum(ins)]  # what goes to nobody is last
    tokens = order // ids.shape[1]
    rows, gates = (AllToAll.apply(t, outs, ins, group) for t in (x[tokens], p.flatten()[order]))
    expert = (
        torch.arange(here, device=x.device)
        .repeat(ranks)
        .repeat_interleave(theirs, output_size=sum(outs))
    )
    if not len(rows):  # a row for nobody, so that the weights get their (zero) gradients
        rows, gates = (
            rows.new_zeros(1, rows.shape[1]) + rows.sum(),
            gates.new_zeros(1) + gates.sum(),
        )
        expert = expert.new_full((1,), here)
    y = run_experts(rows, gates[:, None], expert[:, None], w13, w2, backend)[: sum(outs)]
    return Combine.apply(AllToAll.apply(y, ins, outs, group), order, *ids.shape)


# ---------------------------------------------------------------- parallel


def meshes(kind: str, layout: plan.Layout):
    """-> mesh of the dense weights, 1-D or (replicate, shard); with expert_parallel that of the experts, else None."""
    world, size, ep = layout.world, layout.shard, layout.expert_parallel
    if size < world:
        dense = init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))
    else:
        dense = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return dense, init_device_mesh(
        kind, (world // ep, ep), mesh_dim_names=("shard", "experts")
    ) if ep > 1 else None


def parallelize(
    model: Transformer, cfg: Config, dense, sparse=None, compute_dtype=torch.float32, run=exchange
) -> None:
    """FSDP2 on a model on the meta device, block by block; embedding, last norm and head are one unit, gathered once a
    step. `dense`, `sparse`: see meshes; with the latter each rank gets its share of the experts, which `run` computes.

    Weights travel in compute_dtype, but routers and the root's in fp32, in which they compute. Gradients are summed,
    never averaged: the loss is a sum over the tokens of all ranks.
    """
    low = None if compute_dtype == torch.float32 else compute_dtype
    reduce = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.reduce_dtype]
    whole = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduce, cast_forward_inputs=False)

    def unit(module, mesh, policy, reshard=cfg.zero_stage == 3):
        ranks = mesh.size(-1)
        how = {"shard_placement_fn": lambda p: Shard(plan.cut_dimension(tuple(p.shape), ranks))}
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **how)

    for moe in model.sparse_layers("moe").values() if sparse is not None else ():
        group = sparse.get_group("experts")
        own = (len(moe.experts.w2) // group.size(), *moe.experts.w2.shape[1:])
        with torch.device("meta"):
            moe.experts = Experts(*own, functools.partial(run, group))
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            if (
                low
                and name.endswith(("router", "predictor"))
                and any(True for _ in module.parameters(recurse=False))
            ):
                unit(module, dense, whole)
            if sparse is not None and isinstance(module, Experts):
                unit(module, sparse["shard"], policy)
        unit(block, dense, policy)
    unit(model, dense, whole, reshard=False)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other; right on NCCL too


def region(offset, shape) -> tuple[slice, ...]:
    """Where a part of a tensor lies in the whole."""
    return tuple(slice(a, a + n) for a, n in zip(offset, shape))


def units(model) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


FP16 = "precision: mixed_fp16 does not go with train_fsdp.py; use mixed_bf16 or fp32"


def check(cfg: Config, world: int) -> plan.Layout:
    """How the keys lay the model on `world` ranks; UserError E002 where they do not go together."""
    if world == 1:
        return plan.Layout()
    if not cfg.zero_stage:
        given = {"hsdp_shard_size": 0, "expert_parallel": 1, "reduce_dtype": "fp32"}
        if wrong := [key for key, default in given.items() if getattr(cfg, key) != default]:
            raise UserError(
                "E002",
                f"zero_stage: 0 keeps whole copies on all ranks, so it takes no {', '.join(wrong)}",
            )
        return plan.Layout(world)
    if cfg.precision == "mixed_fp16":
        raise UserError("E002", FP16)
    if cfg.reduce_dtype == "bf16" and (cfg.zero_stage == 1 or 0 < cfg.hsdp_shard_size < world):
        raise UserError(
            "E002",
            "reduce_dtype: bf16 would also sum micro-steps in bf16 with zero_stage 1 or HSDP",
        )
    slots = (cfg.model.n_experts_max or cfg.model.n_experts) if cfg.model.n_experts else 0
    bytes_sent = 2 if cfg.reduce_dtype == "bf16" else 4
    return plan.Layout(
        world, cfg.zero_stage, cfg.hsdp_shard_size, cfg.expert_parallel, bytes_sent
    ).check(slots)


class Sharded(Parallel):
    """train.Parallel with the model in parts. The optimizer works on this rank's parts, as plain tensors."""

    collective_free = False

    def __init__(self, cfg: Config):
        layout = check(cfg, environment("WORLD_SIZE", 1))
        super().__init__(cfg)
        self.stage, kind = cfg.zero_stage, self.device.type
        self.layout = dataclasses.replace(layout, cuda=kind == "cuda")
        self.dense, self.sparse = meshes(kind, layout)
        self.replicas = self.dense.size(0) if self.dense.ndim == 2 else 1
        self.writes = self.dense.ndim == 1 or self.dense.get_local_rank("replicate") == 0

    def build(self, cfg: Config, precision: str, fill: bool = True) -> Transformer:
        """Made on the meta device, sharded, and filled part by part: beside its part a rank holds one unit (a block) at
        a time, gathered, and the weights are those that one process would begin with."""
        if precision == "mixed_fp16":  # auto may have become that
            raise UserError("E002", FP16)
        with torch.device("meta"):
            model = Transformer(cfg.model)
        parallelize(model, cfg, self.dense, self.sparse, self.compute_dtype(precision))
        model.to_empty(device=self.device)
        for mod in model.sparse_layers("mod").values():
            mod.collective_free = False
        for moe in model.sparse_layers("moe").values():
            for name, value in moe.router.first_buffers().items():
                getattr(moe.router, name).copy_(value)
        for unit in units(model):  # FSDP settles where its parts live when it first gathers them
            unit.unshard()
            unit.reshard()
        self.parts, self.regions, self.names = {}, {}, {}
        with torch.no_grad():
            for name, p in model.named_parameters():
                local = p.to_local()
                shape, offset = compute_local_shape_and_global_offset(
                    p.shape, p.device_mesh, p.placements
                )
                whole = list(p.shape)
                if self.sparse is not None and ".experts." in name:
                    ep, index = self.sparse["experts"].size(), self.sparse.get_local_rank("experts")
                    offset, whole = (
                        (offset[0] + index * whole[0], *offset[1:]),
                        [whole[0] * ep, *whole[1:]],
                    )
                assert tuple(local.shape) == tuple(shape), name
                self.parts[name], self.regions[name] = (
                    (p, local.detach()),
                    (tuple(offset), tuple(whole)),
                )
                self.names[id(p)] = name
                where = region(offset, shape)
                if not fill:
                    continue
                if p.dim() == 3:  # expert by expert
                    for e, part in enumerate(local, offset[0]):
                        full = torch.empty(1, *whole[1:])
                        model.fill(name, full, cfg.seed, e)
                        part.copy_(full[0][where[1:]])
                elif local.numel():
                    full = torch.empty(whole)
                    model.fill(name, full, cfg.seed)
                    local.copy_(full[where])
        return model

    @staticmethod
    def compute_dtype(precision: str) -> torch.dtype:
        return torch.bfloat16 if precision == "mixed_bf16" else torch.float32

    def weights(self, model) -> dict[str, torch.Tensor]:
        return {name: local for name, (_, local) in self.parts.items()}

    @contextlib.contextmanager
    def microstep(self, model, last: bool):
        if self.stage == 1:
            model.set_requires_gradient_sync(last)
        if self.stage < 3:
            model.set_reshard_after_backward(last)
        if self.replicas > 1:
            model.set_requires_all_reduce(last)
        yield

    def reduce(self, model, stats: torch.Tensor) -> torch.Tensor:
        """Gradients were summed in backward; here they reach the optimizer's tensors."""
        for p, local in self.parts.values():
            local.grad = torch.zeros_like(local) if p.grad is None else p.grad.to_local()
            p.grad = None
        dist.all_reduce(stats)
        return stats

    def grad_norm(self, model) -> torch.Tensor:
        norms = torch._foreach_norm([local.grad for _, local in self.parts.values()])
        square = torch.stack(norms).double().square().sum() / self.replicas
        dist.all_reduce(square)
        return square.sqrt().float()

    def local(self, p) -> torch.Tensor:
        return self.parts[self.names[id(p)]][1]

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
        """Of a whole copy, the same on all ranks that share it; without a second copy there is nothing to compare."""
        if self.replicas == 1:
            return torch.zeros((), device=self.device)
        words = (
            torch.stack([local.view(torch.int32).sum() for _, local in self.parts.values()]).sum()
            % 1048573
        )
        dist.all_reduce(words, group=self.dense.get_group("shard"))
        return words % 1048573

    def local_shards(self, name: str, tensor: torch.Tensor) -> list[tuple]:
        kind, _, rest = name.partition(".")
        owner = rest if kind == "model" else rest.rpartition(".")[0]
        if owner not in self.regions or not (tensor.dim() or kind == "model"):
            return super().local_shards(name, tensor)
        offset, shape = self.regions[owner]
        return [(offset, shape, tensor, self.writes)] if tensor.numel() else []


def layout(cfg: Config) -> Parallel:
    """zero_stage 0, and a single process, are train.py's."""
    return Sharded(cfg) if check(cfg, environment("WORLD_SIZE", 1)).zero_stage else Parallel(cfg)


def main(argv: list[str]) -> int:
    return train.main(argv, layout, check)


if __name__ == "__main__":
    command(main, lasting=True)
