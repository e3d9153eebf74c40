"""Texts that begin alike, in one row: a trunk and its branches, several of them where asked, and
what attention needs to keep them apart."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tree(NamedTuple):
    """Sequences of ids, on what they begin with alike."""

    sequences: list[tuple[list[int], int]]  # (ids, how many of them only stand before the others)
    before: tuple[int, ...]  # ids that all begin with, and other trees too
    trunk: list[int]  # ids behind those
    behind: list[list[int]]  # of each sequence, the ids behind the trunk, but its last

    def sizes(self) -> tuple[int, list[int]]:
        return len(self.trunk), [len(ids) for ids in self.behind]

    def ids(self) -> list[int]:
        return [*self.trunk, *(i for ids in self.behind for i in ids)]

    def wanted(self) -> tuple[list[int], list[int]]:
        """(slots within the tree, the ids that should follow them)."""
        slots, targets = [], []
        first, trunk = len(self.before), len(self.trunk)
        start = trunk
        for (whole, n), ids in zip(self.sequences, self.behind):
            for at in range(n - 1, len(whole) - 1):  # whole[at] predicts whole[at + 1]
                in_trunk = at - first
                slots.append(in_trunk if in_trunk < trunk else start + in_trunk - trunk)
                targets.append(whole[at + 1])
            start += len(ids)
        return slots, targets


def tree_of(sequences: list[tuple[list[int], int]], shared: int) -> Tree:
    """The first `shared` ids of all are what other trees begin with too."""
    # the last id of a sequence predicts nothing
    inputs = [whole[:-1] for whole, _ in sequences]
    shared = min(shared, *(n - 1 for _, n in sequences))
    trunk = inputs[0]
    for other in inputs[1:]:
        trunk = trunk[: common(trunk, other)]
    behind = [ids[len(trunk) :] for ids in inputs]
    return Tree(sequences, tuple(trunk[:shared]), trunk[shared:], behind)


class Branches:
    """What one forward pass over trees needs in the place of a model.KVCache.

    sizes: (tokens of the trunk, tokens of each branch) of each tree; slots are in that order. A
    token sees its tree's trunk, up to itself, and what of its own branch came before. Positions are
    those that a branch would have behind its trunk alone. `before`: the Branches of a trunk that
    was computed earlier and is seen by all, which has kept its keys and values.
    """

    def __init__(self, sizes: list[tuple], device, before: Branches | None = None):
        self.before = before
        first = before.length if before else 0
        rows = []  # position, tree, branch (0: the trunk): (3, tokens) each
        for tree, (trunk, branches) in enumerate(sizes):
            for branch, n in enumerate([trunk, *branches]):
                row = torch.tensor([[first], [tree], [branch]]).repeat(1, n)
                row[0] += torch.arange(n) + (trunk if branch else 0)
                rows.append(row)
        positions, tree, branch = torch.cat(rows, dim=1).to(device)
        self.positions = positions[None]  # (1, T)
        self.length = len(positions)  # tokens; the slot behind is padding, which sees none
        earlier = torch.arange(self.length, device=device)
        # (T + 1, T + 1): whether the token of a slot (row) sees that of another (column)
        self.sees = torch.zeros(self.length + 1, self.length + 1, dtype=torch.bool, device=device)
        same = (branch[:, None] == branch) | (branch == 0)
        same &= tree[:, None] == tree
        self.sees[:-1, :-1] = same & (earlier <= earlier[:, None])
        self.last = None  # slots whose successor is asked for, as model.forward indexes with it
        self.keys, self.values = {}, {}  # by layer, of the slots that it computed
        self.mask = None  # (slots, keys before them, what they may look at) of the last layer

    def ask(self, slots: list[int]) -> None:
        """Logits are wanted of these slots only."""
        columns = torch.tensor(slots, device=self.sees.device)
        self.last = torch.zeros_like(columns), columns

    def place(self, idx):
        slots = torch.arange(self.length, device=idx.device)[None]
        return self.positions, slots

    def write(self, layer: int, slots, k, v):
        """k, v (1, n, G, D) of the tokens in `slots` (1, n), all that this layer computes (MoD may
        pass tokens by): returns them behind those of the trunk before, (1, G, all, D) each."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.keys[layer], self.values[layer] = k, v
        if self.before and layer in self.before.keys:
            k = torch.cat((self.before.keys[layer], k), dim=2)
            v = torch.cat((self.before.values[layer], v), dim=2)
        return k, v

    def visible(self, layer: int, slots):
        """Which of the keys that write has returned the tokens in `slots` may look at: bool
        (1, 1, n, all)."""
        seen = 0
        if self.before and layer in self.before.keys:
            seen = self.before.keys[layer].shape[2]
        # most layers compute all tokens: the same tensor of slots
        if self.mask is None or self.mask[0] is not slots or self.mask[1] != seen:
            mask = self.sees[slots[0][:, None], slots[0]]
            if seen:
                mask = torch.cat((mask.new_ones(len(mask), seen), mask), dim=1)
            self.mask = (slots, seen, mask[None, None])
        return self.mask[2]


def common(a, b) -> int:
    """How many elements two lists begin with alike."""
    n = min(len(a), len(b))
    for at in range(0, n, 64):  # slices are compared faster than elements
        if a[at : at + 64] != b[at : at + 64]:
            return next((i for i in range(at, n) if a[i] != b[i]), n)
    return n
