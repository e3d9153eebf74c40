"""All that changes with the number of processes.

`Parallel` replicates the model; train_fsdp.py's `Sharded` cuts it. With one process the same code
runs, and what concerns others does nothing.
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lumen import machine as machines
from lumen import plan
from lumen.config import Config
from lumen.errors import UserError
from lumen.failure import lost_peer
from lumen.feed import Feed, synchronize
from lumen.launch import environment
from lumen.optim import state_bytes
from lumen.owners import Alone, Replicas
from lumen.tuning import tuning_of
from model import Transformer


def trained(model) -> list[torch.Tensor]:
    """The parameters that are not frozen: all of them, but in fine-tuning."""
    return [p for p in model.parameters() if p.requires_grad]


class Parallel:
    """All that changes with the number of processes; this one replicates the model.

    There is no DistributedDataParallel. Forward and backward hold no collective; then gradients are
    summed in chunks of fixed size in parameter order, so that a resumed run adds in the same order
    as one that was never stopped (DDP does not, from three ranks on). train_fsdp.py has the other
    implementation: it overrides these methods and repeats none.
    """

    CHUNK = 1 << 22  # numbers in a collective
    STARTUP_TIMEOUT = 1800  # seconds, until all ranks have taken a step: compilers, cold disks
    # no collectives in forward and backward: one rank may skip a micro-batch (out of memory), or
    # be the only one to make a sample
    collective_free = True

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
        cuda = self.device.type == "cuda"
        known = {"cuda": cuda, "state_bytes": state_bytes(cfg), "tuning": tuning_of(cfg)}
        self.layout = plan.Layout(self.world, **known)
        self.feed = Feed(self.device)  # batches to the device
        self.buffer = None  # what reduce() sums gradients in

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
        # No device_id, which would have NCCL connect here and not at its first collective: torch
        # up to 2.13 then cuts a mesh's groups out of this one and loses their gloo part's timeout,
        # and barrier() goes over NCCL. The device is set before, and NCCL takes the tensors' own.
        try:
            dist.init_process_group(backend, None, limit, self.world, self.rank, store)
        except Exception as error:
            if not lost_peer(error):
                raise
            raise UserError("E601", f"at the start: {str(error).splitlines()[0]}") from error

    def rows(self) -> tuple[int, int]:
        """(index, count): which reader of the data this rank is."""
        return self.rank, self.world

    def build(self, cfg: Config, precision: str, fill: bool = True) -> Transformer:
        """The model on this rank's device, with its initial weights.

        `precision`: as resolved. Not `fill`: without weights, for others are about to be copied in.
        """
        with torch.device(self.device):
            model = Transformer(cfg.model)
        if fill:
            model.init_weights(cfg.seed)
        return model

    def weights(self, model) -> dict[str, torch.Tensor]:
        """What the optimizer updates, by name: plain tensors, whose .grad reduce() sets."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def owners(self) -> Alone:
        """Who computes which part of the optimizer's step, for lumen/optim.py's Muon."""
        return Replicas(self.rank, self.world) if self.world > 1 else Alone()

    def microstep(self, model, last: bool):
        """Context of one forward and backward pass; `last`: the last of its step."""
        return contextlib.nullcontext()

    def reduce(self, model, sums: torch.Tensor) -> torch.Tensor:
        """Sum the gradients in place, and `sums` (a vector), over all ranks; returns the sums."""
        for p in trained(model):
            if p.grad is None:  # a rank that could not read its rows takes part all the same
                p.grad = torch.zeros_like(p)
        if self.world == 1:
            return sums
        # in a collective of its own: in a gradient's chunk it would shift the order of adding
        dist.all_reduce(sums)
        for chunk in self.chunks([p.grad for p in trained(model)]):
            for start, part in chunk:
                self.buffer[start : start + len(part)] = part
            end = chunk[-1][0] + len(chunk[-1][1])
            dist.all_reduce(self.buffer[:end])
            for start, part in chunk:
                part.copy_(self.buffer[start : start + len(part)])
        return sums

    def chunks(self, grads: list[torch.Tensor]):
        """Cut gradients, in order, into chunks that fill the buffer: lists of (start, view)."""
        if self.buffer is None:
            size = min(self.CHUNK, sum(grad.numel() for grad in grads))
            self.buffer = torch.empty(size, device=self.device)
        chunk, used = [], 0
        for grad in grads:
            rest = grad.view(-1)
            while len(rest):
                part = rest[: len(self.buffer) - used]
                rest = rest[len(part) :]
                chunk.append((used, part))
                used += len(part)
                if used == len(self.buffer):
                    yield chunk
                    chunk, used = [], 0
        if chunk:
            yield chunk

    def finite(self, grad: torch.Tensor) -> bool:
        return bool(torch.isfinite(grad).all())

    def grad_norm(self, model) -> torch.Tensor:
        """2-norm of the reduced gradient, a 0-d tensor."""
        return torch.nn.utils.get_total_norm([p.grad for p in trained(model)])

    def checksum(self, model) -> torch.Tensor:
        """Of the bits of the weights, which every rank should hold alike.

        0-d, a whole number below 2^20, so that its square is exact; no sync.
        """
        words = torch.stack([p.detach().view(torch.int32).sum() for p in trained(model)])
        return words.sum() % 1048573  # a prime: modulo a power of two the upper bits would be lost

    # ---- what the ranks tell one another

    def all_reduce_max(self, flags: list[int]) -> list[int]:
        """The maximum of each flag over all ranks."""
        if self.world == 1:
            return flags
        tensor = torch.tensor(flags, device="cpu")  # so it goes over gloo
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def set_timeout(self, seconds: int) -> None:
        """The timeout of every collective from here on; called by all ranks.

        gloo raises then: E601, exit code 75. NCCL's watchdog aborts the process (SIGABRT, torch's
        default: what a GPU computed beside a broken collective is not to be trusted; status.json
        still says `running`). torchrun and slurm/train.sbatch start both again. NCCL's part has
        never run.
        """
        if self.world > 1:
            self.all_reduce_max([0])  # the slowest has done what it needed the longer limit for
            machines.set_collective_timeout(seconds)

    def gather(self, obj) -> list:
        """What each rank says, in order of rank: plain objects, over gloo. Never a tensor of a GPU,
        which the others would get on that GPU."""
        if self.world == 1:
            return [obj]
        answers = [None] * self.world
        dist.all_gather_object(answers, obj)
        return answers

    def broadcast(self, obj):
        """Rank 0's object, on every rank; as gather."""
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

    # ---- where a tensor lies

    def local_shards(self, name: str, tensor: torch.Tensor) -> list[tuple]:
        """Every region of `tensor` that this rank holds.

        [(offset, global shape, local tensor, whether this rank is the one that writes it)]
        """
        return [((0,) * tensor.dim(), tuple(tensor.shape), tensor, self.rank == 0)]

    # how surgery reaches one expert's row of a parameter, or of a tensor of its optimizer's state

    def local(self, p: torch.Tensor) -> torch.Tensor:
        """What the optimizer knows the parameter as."""
        return p

    def row(self, p: torch.Tensor, tensor: torch.Tensor, e: int) -> torch.Tensor:
        """A copy of row e of `tensor`, which is local(p) or has its shape."""
        return tensor[e].clone()

    def set_row(self, p: torch.Tensor, tensor: torch.Tensor, e: int, value) -> None:
        tensor[e] = value

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            synchronize(self.device)  # no collective is on its way any more
            self.all_reduce_max([0])  # a barrier over gloo: torch's own may choose NCCL
            dist.destroy_process_group()
