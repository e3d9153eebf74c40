"""Experts on other ranks: (token, expert) pairs travel to the expert's rank and back.

train_fsdp.py calls exchange() in place of kernels.run_experts where expert_parallel is above 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from kernels import run_experts


class AllToAll(torch.autograd.Function):
    """Rows to the ranks of `group`: ins[i] of them to rank i, outs[i] from it; gradients go back
    the same way."""

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
    """out[t] = the sum of what came back for token t: y (N, d), row i for the pair order[i] = token
    * K + k -> (T, d).

    One k after the other and in fp32: index_add would need atomics on CUDA, add in any order, and
    keep y for backward.
    """

    @staticmethod
    def forward(ctx, y, order, T, K):
        ctx.tokens = order // K
        out = y.new_zeros(T, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
        # where[pair]: its row of y; pairs that went to nobody share a row of zeros at the end
        rows = torch.arange(len(y), device=y.device)
        where = order.new_full((T * K,), len(y)).index_copy_(0, order, rows)
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
        for k in range(K):
            out += y[where[k::K]]
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.tokens], None, None, None


@torch.compiler.disable  # the host looks at sizes; torch 2.11 compiles that wrongly
def exchange(group, x, p, ids, w13, w2, backend: str):
    """run_experts where each rank of `group` holds a share of the experts, in order -> (T, d).

    (token, expert) pairs travel to the expert's rank, are computed and weighed there, and come
    back. x (T, d); p (T, K) gates; ids (T, K) over all experts; w13 and w2 those of this rank. The
    sizes that travel must be known to the host: one sync a layer.
    """
    ranks = group.size()
    here = len(w2)  # experts on a rank
    n_experts = here * ranks
    flat = ids.flatten()
    # ids beyond the experts go to nobody (null experts, dropped tokens)
    leaving = torch.bincount(flat.clamp(max=n_experts), minlength=n_experts + 1)
    leaving = leaving[:n_experts]  # pairs of this rank for each expert of all ranks
    arriving = torch.empty_like(leaving)  # pairs from each rank for each expert of this one
    dist.all_to_all_single(arriving, leaving, group=group)
    per_rank = [counts.view(ranks, here).sum(1) for counts in (leaving, arriving)]
    ins, outs = torch.stack(per_rank).tolist()  # the one sync
    # pairs in the order of their experts, and so of their ranks; what goes to nobody is last
    order = flat.argsort(stable=True)[: sum(ins)]
    tokens = order // ids.shape[1]
    rows = AllToAll.apply(x[tokens], outs, ins, group)
    gates = AllToAll.apply(p.flatten()[order], outs, ins, group)
    # rows arrive from one rank after the other, each rank's in the order of the experts here
    expert = torch.arange(here, device=x.device).repeat(ranks)
    expert = expert.repeat_interleave(arriving, output_size=sum(outs))
    if not len(rows):  # a row for nobody, so that the weights get their (zero) gradients
        rows = rows.new_zeros(1, rows.shape[1]) + rows.sum()
        gates = gates.new_zeros(1) + gates.sum()
        expert = expert.new_full((1,), here)
    y = run_experts(rows, gates[:, None], expert[:, None], w13, w2, backend)[: sum(outs)]
    return Combine.apply(AllToAll.apply(y, ins, outs, group), order, *ids.shape)
