"""Run by torchrun in test_train.py: several runs one after the other in the same processes, to save their start.

argv[1] is a JSON list of runs: {"config": {...}, "stop_at": step or null, "unreadable_at": [rank, step] or null}.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401 - sets the threads before torch starts them

from lumen.errors import UserError
from train import Parallel, Trainer


class Kept(Parallel):
    def close(self):  # the process group serves the next run too
        dist.barrier()


torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    trainer = Trainer(job["config"], Kept)
    rank, following = trainer.parallel.rank, trainer.loader.next

    def following_with_faults(trainer=trainer, job=job, rank=rank, following=following):
        if job.get("stop_at") == trainer.step and rank == trainer.parallel.world - 1:
            trainer.stop_signal = 1  # as the handler does; one rank alone has heard the signal
        if job.get("unreadable_at") == [rank, trainer.step]:
            raise UserError("E111", "injected: a shard changed")
        return following()

    trainer.loader.next = following_with_faults
    try:
        trainer.fit()
    except UserError as error:
        print(f"rank {rank} raised {error.code} {error.text}", flush=True)
        trainer.loader.close()
dist.barrier()
sys.stdout.flush()
os._exit(0)
