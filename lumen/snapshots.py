"""Copies of a run in memory, and where to go back to.

An *iteration* is one pass through the loop and never comes back; a *step* does, after a rollback.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lumen import checkpoint
from lumen import machine as machines
from lumen.errors import UserError
from lumen.launch import environment

CERTIFY_AFTER = 40  # healthy steps; twice what the slowest alarm on a real spike took
CERTIFIED = 2  # snapshots that are kept besides the candidate
SNAPSHOT_MEMORY = 0.25  # of the memory that is free at the start: more they may not take


@dataclass
class Snapshot:
    """A copy of all tensors of this rank, and the numbers that belong to it."""

    step: int
    cursor: int
    iteration: int
    numbers: dict = field(default_factory=dict)  # of the trainer: tokens, the best evaluation ...
    late: bool = False  # the tokens of its step were still on their way when it was taken
    healthy: int = 0  # steps since
    data: dict[str, torch.Tensor] = field(default_factory=dict)


class Snapshots:
    """In the host's memory: one candidate and the two newest certified ones.

    `regions` returns this rank's tensors by name. Memory is kept and used again; on CUDA the copies
    are queued on the step's own stream, so they see the weights between two steps and the host does
    not wait.
    """

    def __init__(self, regions: Callable[[], dict[str, torch.Tensor]]):
        self.regions = regions
        self.allowed = False  # there is room for them
        self.certified: list[Snapshot] = []
        self.candidate: Snapshot | None = None
        self.free: list[dict] = []  # memory to be used again

    def size(self) -> int:
        """Bytes of a copy in the host's memory. torch rounds pinned blocks up to powers of two."""
        total = 0
        for x in self.regions().values():
            n = x.numel() * x.element_size()
            if x.is_cuda and n:
                n = 1 << (n - 1).bit_length()
            total += n
        return total

    def make_room(self, parallel) -> bool:
        """Whether every rank has memory for three copies of each process on its host."""
        need = (CERTIFIED + 1) * self.size() * environment("LOCAL_WORLD_SIZE", 1)
        full = need >= machines.available_memory() * SNAPSHOT_MEMORY
        self.allowed = not parallel.all_reduce_max([full])[0]
        return self.allowed

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """Fill it."""
        mine = self.regions()
        if self.free:
            snapshot.data = self.free.pop()
        else:
            for name, x in mine.items():
                empty = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                snapshot.data[name] = empty
        for name, x in mine.items():
            snapshot.data[name].copy_(x, non_blocking=True)
        return snapshot

    def take(self, snapshot: Snapshot, certified: bool = False) -> None:
        self.drop_candidate()
        self.candidate = self.copy(snapshot)
        if certified:
            self.certify()

    def drop_candidate(self) -> None:
        if self.candidate:
            self.free.append(self.candidate.data)
            self.candidate = None

    def certify(self) -> None:
        if len(self.certified) == CERTIFIED:
            self.free.append(self.certified.pop(0).data)
        self.certified.append(self.candidate)
        self.candidate = None

    def step_done(self, iteration: int, tokens: int, healthy: bool) -> None:
        """A step was made in `iteration`, and the run has trained on so many tokens."""
        candidate = self.candidate
        for s in (candidate, *self.certified):
            if s and s.late and iteration == s.iteration - 1:
                s.numbers["tokens"] = tokens
                s.late = False
        if candidate and healthy and iteration >= candidate.iteration:
            candidate.healthy += 1
            if candidate.healthy >= CERTIFY_AFTER:
                self.certify()

    def discard(self, since: int) -> None:
        """Those of iteration `since` and later are not to be trusted."""
        self.drop_candidate()
        for s in self.certified:
            if s.iteration >= since:
                self.free.append(s.data)
        self.certified = [s for s in self.certified if s.iteration < since]

    def restore(self, snapshot: Snapshot) -> None:
        """Copy it back, in place: pointers of the optimizer and of compiled graphs stay valid."""
        with torch.no_grad():
            for name, x in self.regions().items():
                x.copy_(snapshot.data[name], non_blocking=True)

    def furthest(self, parameters, init_std: float) -> tuple[float, str]:
        """(by how much of its norm, which) of this rank's parameters has moved furthest since the
        newest certified snapshot. What was zero at first may move by init_std."""
        most, name = -1.0, ""
        for key, x in self.regions().items():
            if key.removeprefix("model.").partition("@")[0] not in parameters:
                continue
            was = self.certified[-1].data[key].to(x.device)
            least = init_std * math.sqrt(x.numel())
            moved = ((x - was).norm() / was.norm().clamp(min=least)).item()
            if not moved <= most:
                most, name = moved, key
            if math.isnan(moved):  # furthest of all
                break
        return most, name

    def moved_most(self, parameters, init_std: float, parallel) -> str:
        """In words, of all ranks: where to look."""
        if not self.certified:
            return "no snapshot to compare with"
        mine = (-1.0, "")
        with contextlib.suppress(torch.OutOfMemoryError):  # no more than a hint: go without it
            mine = self.furthest(parameters, init_std)
        found = parallel.gather(mine)
        most, name = max(found, key=lambda x: math.inf if math.isnan(x[0]) else x[0])
        if not name:
            return "no memory to see which parameter moved most"
        name = name.removeprefix("model.").partition("@")[0]
        return f"{name} moved most, by {100 * most:.3g} % since the last certified snapshot"


def clean_checkpoints(out: Path, newest: int, before: int | None) -> list[int]:
    """Steps up to `newest` whose checkpoint was saved without an alarm, and before an iteration."""
    good = []
    for step in checkpoint.list_steps(out):
        if step > newest:
            continue
        with contextlib.suppress(UserError):
            state = checkpoint.Checkpoint(checkpoint.step_dir(out, step)).state
            iteration = state.get("orchestrator", {}).get("turn", 0)
            if state.get("clean", True) and (before is None or iteration < before):
                good.append(step)
    return good


def find_source(
    trainer,
    snapshots: Snapshots,
    before: int | None = None,
    step: int | None = None,
    older_than: int | None = None,
) -> Snapshot | str | None:
    """Where to go back to: a snapshot, the path of a clean checkpoint, or None.

    before: it must be older than that iteration. step: of at most that step (a person asked, so the
    candidate will do, and the newer of snapshot and checkpoint is taken). older_than: of an earlier
    step than that, if there is any such. From the trainer: step, out, main, parallel, newest_whole.
    """
    fitting = list(snapshots.certified)
    if step is not None and snapshots.candidate:
        fitting.append(snapshots.candidate)
    if before is not None:
        fitting = [s for s in fitting if s.iteration < before]
    if step is not None:
        fitting = [s for s in fitting if s.step <= step]
    earlier = fitting if older_than is None else [s for s in fitting if s.step < older_than]
    if earlier and step is None:
        return earlier[-1]
    newest = trainer.step if step is None else step
    if older_than is not None:
        newest = min(newest, older_than - 1)
    good = clean_checkpoints(trainer.out, newest, before) if trainer.main else None
    good = trainer.parallel.broadcast(good)
    folders = [checkpoint.step_dir(trainer.out, s) for s in reversed(good)]
    found = trainer.start.newest_whole(folders)
    if earlier and (found is None or earlier[-1].step >= checkpoint.step_of(found)):
        return earlier[-1]
    return found or (fitting[-1] if fitting else None)
