"""Who orthogonalises which matrix, where there are several ranks; how directions get there and
results come back. lumen/optim.py's Muon asks.

The work goes round by size: the longest stack to rank 0, the next to rank 1, and so on, so that all
ranks compute stacks of nearly one length and then exchange them. What travels has the dtype in
which it is computed, so every rank has the bits that it would have computed itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from lumen.muon import Matrix, stacks
from model import role


def take(tensors: dict[str, torch.Tensor], stack: list[Matrix]) -> list[torch.Tensor]:
    """This rank's part of each matrix of a stack: views."""
    found = []
    for matrix in stack:
        tensor = tensors[matrix.name]
        found.append(tensor if matrix.row is None else tensor[matrix.row])
    return found


def put(tensors: dict[str, torch.Tensor], stack: list[Matrix], results) -> None:
    for tensor, result in zip(take(tensors, stack), results):
        tensor.copy_(result)


class Alone:
    """One process: every matrix is here, and it does all the work."""

    def shape(self, name: str, p: torch.Tensor) -> tuple[int, ...]:
        """Of the whole parameter that `p` is, or is a shard of."""
        return tuple(p.shape)

    def divide(self, matrices: list[Matrix]) -> None:
        """Before the first step: there are these."""
        self.stacks = stacks(matrices)

    def orthogonalise(self, tensors: dict[str, torch.Tensor], compute, dtype) -> None:
        """In place, each matrix of `tensors`, by name. compute(list of whole matrices, their parts)
        -> (stack, ...) of `dtype`."""
        for stack in self.stacks:
            put(tensors, stack, compute(take(tensors, stack), stack[0].parts))


class Replicas(Alone):
    """Every rank holds all, computes its share, and sends it to the others."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def orthogonalise(self, tensors, compute, dtype) -> None:
        for first in range(0, len(self.stacks), self.world):
            now = self.stacks[first : first + self.world]
            mine = None
            if self.rank < len(now):
                stack = now[self.rank]
                mine = compute(take(tensors, stack), stack[0].parts).contiguous()
            for owner, stack in enumerate(now):
                result = mine
                if owner != self.rank:
                    device = tensors[stack[0].name].device
                    shape = (len(stack), *stack[0].shape)
                    result = torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(as_bytes(result), owner)
                put(tensors, stack, result)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A view that travels as it is over gloo too, which does not know every dtype."""
    return x.view(-1).view(torch.uint8)


# ---------------------------------------------------------------- shards


class Cut(NamedTuple):
    """How a parameter lies on the ranks of a group."""

    group: dist.ProcessGroup
    shape: tuple[int, ...]  # of what the group holds together
    dim: int  # along which it is cut, as torch.chunk does

    def part(self, rank: int, dim: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """(begin, length) along `dim` of that rank's part of a matrix of this shape."""
        n = shape[dim]
        part = -(-n // self.group.size())
        begin = min(n, rank * part)
        return begin, min(part, n - begin)


class Shards(Alone):
    """Each rank holds a shard of each matrix, or whole experts. A matrix in parts is gathered at
    one rank, orthogonalised there, and its shards go back.

    Where several groups hold a copy each (HSDP), each group does its own work.
    """

    def __init__(self, cuts: dict[str, Cut]):
        self.cuts = cuts

    def shape(self, name, p):
        return self.cuts[name].shape

    def divide(self, matrices):
        self.here: list[Matrix] = []  # no rank needs what another has
        apart: dict[dist.ProcessGroup, list[Matrix]] = {}
        for matrix in matrices:
            name, shape, parts, _ = matrix
            cut = self.cuts[name]
            split = apart.setdefault(cut.group, [])
            if cut.group.size() == 1 or (len(shape) == 3 and cut.dim == 0):
                self.here.append(matrix)
            elif len(shape) == 3:  # each expert in parts: a matrix like any other
                split += [Matrix(name, shape[1:], parts, e) for e in range(shape[0])]
            else:
                split.append(matrix)
        self.apart = [(group, stacks(split)) for group, split in apart.items()]

    def orthogonalise(self, tensors, compute, dtype) -> None:
        for matrix in self.here:
            tensor = tensors[matrix.name]
            if tensor.numel():
                tensor.copy_(compute([tensor], matrix.parts)[0])
        for group, found in self.apart:
            for first in range(0, len(found), group.size()):
                self.exchange(tensors, found[first : first + group.size()], group, compute, dtype)

    def exchange(self, tensors, now: list[list[Matrix]], group, compute, dtype) -> None:
        """The i-th stack of `now` is the i-th rank's of `group`."""
        size, me = group.size(), group.rank()
        mine = now[me] if me < len(now) else []
        # to each rank my parts of its stack; from each its parts of mine
        leaving = [take(tensors, stack) for stack in now]
        out = [sum(x.numel() for x in parts) for parts in leaving] + [0] * (size - len(now))
        regions = [[self.region(matrix, rank) for matrix in mine] for rank in range(size)]
        back = [sum(numel(region) for region in of_rank) for of_rank in regions]
        flat = torch.cat([x.to(dtype).reshape(-1) for parts in leaving for x in parts])
        arrived = send(flat, out, back, group)
        results = arrived  # of a rank without a stack: nothing
        if mine:
            whole = self.assemble(arrived, mine, regions)
            done = compute(whole, mine[0].parts)
            found = []
            for of_rank in regions:
                for matrix, (dim, begin, length, _) in zip(done, of_rank):
                    found.append(matrix.narrow(dim, begin, length).reshape(-1))
            results = torch.cat(found)
        home, at = send(results, back, out, group), 0
        for parts in leaving:
            for x in parts:
                x.copy_(home[at : at + x.numel()].view(x.shape))
                at += x.numel()

    def region(self, matrix: Matrix, rank: int) -> tuple[int, int, int, int]:
        """(dimension, begin, length, numbers across) of the rank's part."""
        cut = self.cuts[matrix.name]
        dim = cut.dim if matrix.row is None else cut.dim - 1
        begin, length = cut.part(rank, dim, matrix.shape)
        return dim, begin, length, matrix.shape[1 - dim]

    def assemble(self, arrived, mine: list[Matrix], regions) -> list[torch.Tensor]:
        """The whole matrices, from the ranks' parts, which lie one after the other."""
        parts: list[list] = [[] for _ in mine]
        at = 0
        for of_rank in regions:
            for i, (dim, _, length, across) in enumerate(of_rank):
                shape = (length, across) if dim == 0 else (across, length)
                parts[i].append(arrived[at : at + length * across].view(shape))
                at += length * across
        return [torch.cat(found, regions[0][i][0]) for i, found in enumerate(parts)]


def numel(region: tuple[int, int, int, int]) -> int:
    return region[2] * region[3]


def send(x: torch.Tensor, out: list[int], back: list[int], group) -> torch.Tensor:
    """x (numbers,): out[i] of them to rank i of the group, back[i] from it."""
    width = x.element_size()
    arrived = torch.empty(sum(back), dtype=x.dtype, device=x.device)
    sizes = [width * n for n in back], [width * n for n in out]
    dist.all_to_all_single(as_bytes(arrived), as_bytes(x), *sizes, group=group)
    return arrived


def of_shards(shards: dict, dense, sparse) -> Shards:
    """shards: name -> (DTensor, local shard), on these meshes; see train_fsdp.Sharded."""
    cuts = {}
    for name, (p, _) in shards.items():
        expert = sparse is not None and role(name) == "expert"
        group = (sparse if expert else dense).get_group("shard")
        cuts[name] = Cut(group, tuple(p.shape), p.placements[-1].dim)
    return Shards(cuts)
