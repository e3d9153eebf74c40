"""The numbers of a step: named sums on the device, one vector for the one collective that carries
them, plain numbers on the host a little later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from model_moe import MOD_SUMS, SUMS

# beside the model's sums, what the ranks tell one another in each step
FLAGS = (
    "unread",  # this rank cannot read its rows
    "oom",  # ... ran out of memory
    "stop",  # ... was asked to stop
    "save",  # ... was asked to save
    "control",  # ... found lines in control.jsonl
    "checksum",  # of its weights
    "checksum_square",
    "writing",  # ... is still writing a checkpoint
)

# all that step_numbers has a place for
KNOWN = {"ce", "z", "count", "tokens", "norm", "bad", "exploded", *FLAGS}


@dataclass
class StepNumbers:
    """What the host knows of one step, once its numbers have arrived. Sums are over all ranks."""

    step: int
    cursor: int  # the first row of the step's batch
    iteration: int  # passes through the loop; never comes back, as a step does after a rollback
    lr: float = 0.0
    loss: float = math.nan  # cross-entropy, mean over the step's targets, nats
    z_loss: float = 0.0  # unweighted, mean over the step's targets
    grad_norm: float = math.nan  # of the true gradient, before clipping
    tokens: int = 0  # targets that were trained on: 0 where the step was dropped
    bad: bool = False  # the step was dropped
    exploded: bool = False  # its gradient norm was above what was to be expected
    loss_finite: bool = True
    empty: bool = False  # masks left it no target: it was dropped, and has no loss
    oom: bool = False  # a rank ran out of memory: the step is void, and none of the numbers holds
    stop: bool = False  # a rank was asked to stop
    save: bool = False  # a rank was asked for a checkpoint
    control: bool = False  # control.jsonl has new lines
    desynced: bool = False  # the ranks' weights differ
    experts: dict | None = None  # experts.expert_statistics, where the sums were fetched
    depth: dict | None = None  # experts.mod_statistics, where the sums were fetched
    # means over `count` of the sums that a run has beside the model's (Trainer.sum_names)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Pending:
    """A step whose numbers are on their way to the host."""

    step: int
    cursor: int
    iteration: int
    lr: float
    numbers: torch.Tensor  # a vector, on the host once `arrived` has passed
    shapes: dict[str, tuple]  # of what lies in it
    arrived: object  # a CUDA event; None: it is there
    marks: list  # of the stopwatch

    def take(self) -> dict[str, torch.Tensor]:
        """The sums, by name; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return unflatten(self.numbers, self.shapes)


def sum_dtype(device: torch.device) -> torch.dtype:
    """fp64: of a sum over tokens fp32 would lose the last digits. MPS has no other than fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


def flatten(sums: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, tuple]]:
    """One vector of all the sums, for the one collective; and the shape of each."""
    dtype = sum_dtype(next(iter(sums.values())).device)
    vector = torch.cat([value.reshape(-1).to(dtype) for value in sums.values()])
    return vector, {name: value.shape for name, value in sums.items()}


def unflatten(vector: torch.Tensor, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """What flatten was given: views of the vector."""
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


def of_layers(name: str) -> bool:
    """Whether a sum is one of the sparse layers': moe.NAME or mod.NAME, (layers, ...)."""
    return "." in name


def sum_shapes(model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each sum that the model returns of a training step; they add up over
    micro-steps and ranks."""
    shapes = {"ce": (), "z": (), "count": ()}
    moe = model.sparse_layers("moe")
    mod = model.sparse_layers("mod")
    if moe:
        shapes |= {f"moe.{name}": (len(moe),) for name in SUMS}
        shapes["moe.counts"] = (len(moe), next(iter(moe.values())).router.n)
    if mod:
        shapes |= {f"mod.{name}": (len(mod),) for name in MOD_SUMS}
        shapes["mod.counts"] = (len(mod), model.cfg.max_seq_len)
    return shapes


def empty_sums(model, device: torch.device, extra=()) -> dict[str, torch.Tensor]:
    """Zeros for all that the collective carries: the model's sums, `extra` of the loss, our flags,
    the sparse layers' sums. Made and filled on the device, for a copy would be a sync."""
    shapes = sum_shapes(model)
    order = [name for name in shapes if not of_layers(name)]
    order += [*extra, *FLAGS, *(name for name in shapes if of_layers(name))]
    dtype = sum_dtype(device)
    return {name: torch.zeros(shapes.get(name, ()), dtype=dtype, device=device) for name in order}


def raise_flags(trainer, sums: dict[str, torch.Tensor]) -> None:
    """What this rank has to tell the others beside its sums."""
    t, par, orch = trainer, trainer.parallel, trainer.orchestrator
    flags = {
        "stop": t.signals.stop,
        "save": t.signals.save,
        "control": orch.new_commands(),
        "writing": t.saver.busy,
    }
    for name, flag in flags.items():
        if flag:
            sums[name].fill_(1)
    look = par.world > 1 and orch.watching
    if look and t.step % t.cfg.orchestrator.check_interval == 0:
        # do all ranks hold the same weights? If so, world * sum of squares = square of the sum
        check = par.checksum(t.model).to(sums["checksum"].dtype)
        sums["checksum"] += check
        sums["checksum_square"] += check * check


def step_numbers(pending: Pending, sums: dict[str, torch.Tensor], world: int) -> StepNumbers:
    """What the reduced sums of a step say, as plain numbers; without those of the sparse layers."""
    got = {name: value.item() for name, value in sums.items() if not of_layers(name)}
    numbers = StepNumbers(pending.step, pending.cursor, pending.iteration, pending.lr)
    numbers.oom = got["oom"] > 0
    numbers.stop = got["stop"] > 0
    numbers.save = got["save"] > 0
    numbers.control = got["control"] > 0
    if numbers.oom:
        return numbers
    count = max(got["count"], 1)
    numbers.empty = not got["count"]
    numbers.loss = math.nan if numbers.empty else got["ce"] / count
    numbers.z_loss = got["z"] / count
    numbers.loss_finite = math.isfinite(got["ce"])
    numbers.grad_norm = got["norm"]
    numbers.bad = bool(got["bad"])
    numbers.exploded = bool(got["exploded"])
    # of pairs there are fewer than tokens, and then those are counted too
    numbers.tokens = 0 if numbers.bad else int(got.get("tokens", got["count"]))
    numbers.more = {name: got[name] / count for name in got if name not in KNOWN}
    # equal numbers x on all ranks: world * sum of squares = square of the sum
    square = got["checksum"] * got["checksum"]
    numbers.desynced = world * got["checksum_square"] != square
    return numbers
