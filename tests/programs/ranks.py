"""Started by torchrun: several runs one after the other in the same processes, to save their start.

argv[1] is a JSON list of runs: {"config": keys of a Trainer (or "tune": words of a FineTuner), and
of these what is wanted:
    "stop_at": step at which the last rank alone hears a signal,
    "unreadable_at": [rank, step] of a shard that cannot be read,
    "do": {step: [[method, argument ...], ...]}, called on all ranks,
    "commands": lines of control.jsonl, there from the start,
    "fault": one of FAULTS, of rank 1,
    "redundant": true: each rank does all of the optimizer's work,
    "digest": true, to print `RANKS {run, same: whether all ranks are, digest: of all tensors}` at the end}.
"""

import hashlib
import json
import os
import sys
import time

import conftest  # noqa: F401 - sets the threads before torch starts them
import rig
import torch
import torch.distributed as dist

import finetune
import train_fsdp
from lumen.errors import UserError
from lumen.owners import Alone
from train import Trainer

torch.set_num_threads(1)


def infinite(trainer) -> None:
    """One micro-step of step 20 is not finite, and so is its repetition for the diagnosis."""
    calls = []

    def poison(module, inputs, output):
        if module.training and trainer.step in (20, 21):
            calls.append(1)
            if len(calls) in (2, 4):
                return output * float("inf")

    trainer.model.blocks[1].ffn.w2.register_forward_hook(poison)


def memory(trainer) -> None:
    """The second micro-step of step 20 does not fit while it has more than one row."""
    calls = []

    def too_large(module, inputs):
        if module.training and trainer.step == 20 and inputs[0].shape[0] > 1:
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    trainer.model.blocks[1].register_forward_pre_hook(too_large)


def flip(trainer) -> None:
    """A weight changes before iteration 46."""

    def change(trainer):
        with torch.no_grad():
            trainer.model.blocks[0].attn.wo.weight[0, 0] += 0.25

    rig.at_iteration(trainer, {46: change})


def slow(trainer) -> None:
    trainer.model.blocks[1].register_forward_pre_hook(lambda module, inputs: time.sleep(0.02))


FAULTS = {"infinite": infinite, "memory": memory, "flip": flip, "slow": slow}


def call(methods):
    def act(trainer):
        for name, *arguments in methods:
            getattr(trainer, name)(*arguments)

    return act


def unreadable(trainer) -> None:
    raise UserError("E111", "injected: a shard changed")


def arrange(trainer, job: dict) -> None:
    rank, last = trainer.parallel.rank, trainer.parallel.world - 1
    rig.at_step(trainer, {int(step): call(do) for step, do in job.get("do", {}).items()})
    if "redundant" in job:
        optimizer = trainer.optimizer
        optimizer.owners = Alone()
        optimizer.owners.divide(optimizer.own["matrices"])
    if "stop_at" in job and rank == last:
        rig.stop_at(trainer, job["stop_at"])
    if "unreadable_at" in job and rank == job["unreadable_at"][0]:
        rig.at_step(trainer, {job["unreadable_at"][1]: unreadable})
    if "commands" in job and rank == 0:
        lines = [json.dumps({"method": name, "args": args}) for name, args in job["commands"]]
        (trainer.out / "control.jsonl").write_text("\n".join(lines) + "\n")
    if "fault" in job and rank == 1:
        FAULTS[job["fault"]](trainer)


def report(trainer) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.tensors().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    found = trainer.parallel.gather((digest.hexdigest(), trainer.get_expert_statistics()))
    if trainer.parallel.rank == 0:
        row = {"run": str(trainer.out), "same": found[0] == found[-1], "digest": found[0][0]}
        print("RANKS", json.dumps(row), flush=True)


def begin(job: dict) -> Trainer:
    if "tune" not in job:
        return Trainer(job["config"], rig.Kept)
    found = finetune.read(job["tune"])
    kind = rig.Kept
    if "zero_stage" in found[1]:
        kind = type("KeptShards", (rig.Kept, train_fsdp.Sharded), {})
    return finetune.FineTuner(found, kind)


for job in json.loads(sys.argv[1]):
    trainer = begin(job)
    arrange(trainer, job)
    try:
        assert trainer.fit() == 0
    except UserError as error:
        print(f"rank {trainer.parallel.rank} raised {error.code} {error.text}", flush=True)
        trainer.loader.close()
    if job.get("digest"):
        report(trainer)
dist.barrier()
sys.stdout.flush()
os._exit(0)
