"""What the processes of a run tell one another, whatever lies on them.

`train.Parallel` extends this by what is done with a model.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lumen import machine as machines
from lumen.config import Config
from lumen.errors import UserError
from lumen.failure import lost_peer
from lumen.launch import environment


class Ranks:
    """This process among all: `rank` of `world`, and its device."""

    STARTUP_TIMEOUT = 1800  # seconds, until all ranks have taken a step: compilers, cold disks

    def __init__(self, cfg: Config):
        self.rank = environment("RANK", 0)
        self.world = environment("WORLD_SIZE", 1)
        local_rank = environment("LOCAL_RANK", 0)
        self.device = machines.detect(cfg.device, "fp32", False, local_rank).device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if cfg.deterministic is True:  # must be set before the first matmul
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.world > 1 and not dist.is_initialized():
            self.init_process_group(max(self.STARTUP_TIMEOUT, cfg.comm_timeout))

    def init_process_group(self, timeout: int) -> None:
        """E601 where a peer does not come."""
        # objects and flags travel over gloo, so that asking a question never waits for the GPU
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        store = None
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it restarts all ranks here. Without a prefix of their
            # own they would call the dead at their old addresses, and hang.
            store, *_ = next(dist.rendezvous("env://"))
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart_{restarts}", store)
        limit = timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, None, limit, self.world, self.rank, store)
        except Exception as error:
            if not lost_peer(error):
                raise
            raise UserError("E601", f"at the start: {str(error).splitlines()[0]}") from error

    def all_reduce_max(self, flags: list[int]) -> list[int]:
        """The maximum of each flag over all ranks."""
        if self.world == 1:
            return flags
        tensor = torch.tensor(flags)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def set_timeout(self, seconds: int) -> None:
        """The timeout of every collective from here on; called by all ranks.

        gloo raises then: E601, exit code 75. NCCL's watchdog aborts the process (SIGABRT;
        status.json still says `running`); torchrun and slurm/train.sbatch start both again.
        NCCL's part has never run.
        """
        if self.world > 1:
            self.all_reduce_max([0])  # the slowest has done what it needed the longer limit for
            machines.set_collective_timeout(seconds)

    def gather(self, obj) -> list:
        """What each rank says, in order of rank."""
        if self.world == 1:
            return [obj]
        answers = [None] * self.world
        dist.all_gather_object(answers, obj)
        return answers

    def broadcast(self, obj):
        """Rank 0's object, on every rank."""
        if self.world == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def run_or_raise_on_all(self, do, *args):
        """do(*args) on every rank; a UserError on any of them is raised on all of them."""
        result = error = None
        try:
            result = do(*args)
        except UserError as e:
            error = e
        for rank, e in enumerate(self.gather(error)):
            if e is not None:
                raise UserError(e.code, e.text if rank == 0 else f"rank {rank}: {e.text}")
        return result

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
