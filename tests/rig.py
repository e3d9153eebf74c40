"""Runs in this process: how tests start them, step into them, hurt them, and look at what they
leave.

This is the only place that knows how to get into the loop: at_iteration and at_step."""

import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import read_lines

import prepare_data
from lumen.parallel import trained
from train import Parallel, Trainer

LONG = {  # a run in which the detectors have seen enough to speak
    "max_steps": 240,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 10,
    "save_interval": 0,
    "log_interval": 20,
}
MOE = {"n_experts": 4, "d_expert": 24, "router": "sigmoid", "n_experts_max": 5}
KINDS = {
    "dense": {},
    "moe": MOE,
    "mod": {"mod_capacity": 0.5, "mod_every": 2},
    "hybrid": MOE | {"mod_capacity": 0.5, "mod_layers": [1], "mod_ffn_only": True},
}

# ---------------------------------------------------------------- into the loop


def at_iteration(trainer, acts: dict) -> Trainer:
    """acts: {iteration, from 1: function of the trainer}, called before it begins: ahead of a
    rollback, of commands."""
    act = trainer.orchestrator.begin_iteration

    def first_that():
        acts.get(trainer.orchestrator.iteration + 1, nothing)(trainer)
        return act()

    trainer.orchestrator.begin_iteration = first_that
    return trainer


def at_step(trainer, acts: dict) -> Trainer:
    """acts: {step, from 0: function of the trainer}, called once, when that step's first rows are
    read."""
    following, due = trainer.loader.next, dict(acts)

    def next_rows():
        due.pop(trainer.step, nothing)(trainer)
        return following()

    trainer.loader.next = next_rows
    return trainer


def at_each_step(trainer, act) -> Trainer:
    """act(trainer) when the first rows of any step are read: behind a rollback, ahead of the
    forward pass."""
    following, seen = trainer.loader.next, set()

    def next_rows():
        iteration = trainer.orchestrator.iteration
        if iteration not in seen:
            seen.add(iteration)
            act(trainer)
        return following()

    trainer.loader.next = next_rows
    return trainer


def nothing(trainer) -> None:
    pass


def stop(trainer) -> None:
    """As the handler of a signal does: the run ends after this step."""
    trainer.signals.stop = 1


def stop_at(trainer, step, then=None) -> Trainer:
    """The signal to stop comes while `step` is read; `then()` is called with it."""

    def act(trainer):
        stop(trainer)
        if then:
            then()

    return at_step(trainer, {step: act})


def finish(keys, parallel=Parallel, iterations=None, steps=None) -> Trainer:
    """Train to the end, which is a good one. iterations, steps: as at_iteration and at_step take
    them."""
    trainer = at_step(at_iteration(Trainer(keys, parallel), iterations or {}), steps or {})
    assert trainer.fit() == 0
    return trainer


# ---------------------------------------------------------------- other kinds of Parallel


class Kept(Parallel):
    """The process group serves the next run too."""

    def close(self):
        if self.world > 1:
            dist.barrier()


class Halves(Parallel):
    """The toy second implementation that keeps the seam honest: each tensor lives in regions of its
    first axis, one a rank and two in one process; all of it is on every rank, as in Parallel."""

    def local_shards(self, name, tensor):
        if not tensor.dim():
            return super().local_shards(name, tensor)
        regions, shape = max(2, self.world), tuple(tensor.shape)
        shards = []
        for i in range(regions):
            a, b = len(tensor) * i // regions, len(tensor) * (i + 1) // regions
            if b > a:
                mine = self.world == 1 or i == self.rank
                shards.append(((a, *[0] * (len(shape) - 1)), shape, tensor[a:b], mine))
        return shards


class Faulty(Parallel):
    """Spoils the reduced gradient at the iterations `at`, counted from 1."""

    at, times, value = (), 1.0, None
    iteration = 0

    def reduce(self, model, sums):
        sums = super().reduce(model, sums)
        self.iteration += 1
        if self.iteration in self.at:
            for p in trained(model):
                p.grad.mul_(self.times)
            if self.value is not None:
                model.blocks[-1].attn.wo.weight.grad[0, 0] = self.value
        return sums


def faulty(at, times=1.0, value=None) -> type[Faulty]:
    """The whole gradient times `times`, or one element of it is `value`."""
    return type("Faulty", (Faulty,), {"at": tuple(at), "times": times, "value": value})


def fake_fp16(detect):
    """lumen.machine.detect for fp16's arithmetic on the CPU: all of it but the rounding."""

    def machine(device, precision, compile_model, local_rank=0):
        return dataclasses.replace(
            detect(device, "fp32", compile_model, local_rank), precision="mixed_fp16"
        )

    return machine


def glitch(trainer) -> None:
    """Weights that somebody has shaken: the loss jumps and does not come back by itself soon."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.6)


# ---------------------------------------------------------------- what a run leaves


def decisions(trainer) -> list[dict]:
    path = trainer.out / "decisions.jsonl"
    return read_lines(path) if path.exists() else []


def actions(trainer, kind="decision") -> list[tuple]:
    rows = [d for d in decisions(trainer) if d.get("kind", "decision") == kind]
    return [(d["trigger"], d["action"], d["executed"]) for d in rows]


def tensors(trainer) -> dict:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_only(folder) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            os.chmod(path, 0o444)


class References:
    """reference(keys) -> a finished run of these keys, trained once a session whatever its out_dir.
    For runs that are only compared with: its files are read-only, and whoever wants to change one
    copies it."""

    def __init__(self, folder):
        self.folder, self.runs = folder, {}

    def __call__(self, keys) -> Trainer:
        name = json.dumps({k: v for k, v in keys.items() if k != "out_dir"}, sort_keys=True)
        if name not in self.runs:
            out = self.folder / f"run_{len(self.runs)}"
            self.runs[name] = finish(keys | {"out_dir": str(out)})
            read_only(out)
        return self.runs[name]

    def keys(self, keys) -> dict:
        """The keys of that run, its own out_dir among them."""
        return keys | {"out_dir": str(self(keys).out)}


# ---------------------------------------------------------------- data, sizes


def bytes_data(folder, sources, **options) -> dict:
    """Prepares with the tokenizer `bytes`; its manifest."""
    sources = [sources] if isinstance(sources, str | Path) else sources
    options = {"quiet": True} | options
    return prepare_data.prepare([str(s) for s in sources], str(folder), "bytes", **options)


def wide(tiny, **changes) -> dict:
    """A run whose activations are many times its states."""
    return tiny(batch_size=64, model={"max_seq_len": 128, "dropout": 0.0}, max_steps=1, **changes)
