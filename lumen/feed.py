"""Between the host and the device: batches on their way there, numbers on their way back, and when
to wait."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

from kernels_attention import Documents


class Pairs(NamedTuple):
    """What a batch of preference pairs has beside ids, targets and documents."""

    reference: torch.Tensor  # (R, most, 2) fp32, NaN where there is no pair
    places: torch.Tensor  # (n,) int64: where y.flatten() has a target; asking y would be a sync


class Buffer:
    """Pinned memory of the host, made once and larger when it must be, out of which a copy may
    still be on its way."""

    def __init__(self):
        self.memory: torch.Tensor | None = None
        self.copied = torch.cuda.Event()  # the last copy out of it is over; before it: at once

    def fill(self, arrays: tuple[np.ndarray, ...]) -> torch.Tensor:
        """(len(arrays), *shape): a view of it that holds them. Waits for the last copy alone."""
        self.copied.synchronize()
        size = sum(array.size for array in arrays)
        if self.memory is None or size > len(self.memory):
            self.memory = torch.empty(size, dtype=torch.int64, pin_memory=True)
        host = self.memory[:size].view(len(arrays), *arrays[0].shape)
        for part, array in zip(host, arrays):
            part.copy_(torch.from_numpy(array))
        return host


class Feed:
    """Batches from the host to the device, while the device computes those before them.

    On CUDA the copy runs on a stream of its own, which waits for nothing that is computed: the host
    queues a micro-step while the ones before it still run, so its ids lie there when its turn
    comes. Two buffers take turns. Elsewhere nothing is copied that need not be. Never run on a GPU:
    tested with streams and events that are simulated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.buffers = itertools.cycle([Buffer(), Buffer()])

    def send(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """int64 arrays of one shape -> tensors on the device, which the current stream may use."""
        if self.stream is None:
            return tuple(self.without_stream(array) for array in arrays)
        buffer = next(self.buffers)
        host = buffer.fill(arrays)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            sent = host.to(self.device, non_blocking=True)
            buffer.copied.record(self.stream)
        computing.wait_event(buffer.copied)
        # their memory is the copying stream's: once freed it is used again when this one is through
        sent.record_stream(computing)
        return tuple(sent)

    def batch(self, x, y, docs=None, reference=None) -> tuple:
        """What lumen.windows.Batch holds, on the device: ids, targets, Documents or None;
        and of preferences Pairs. Of docs the host says how many there are, in steps of powers of
        two, so that few shapes are compiled."""
        if docs is None:
            return *self.send(x, y), None
        more = []
        if reference is not None:  # all in one copy, so the buffers' turns stay those of batches
            places = np.flatnonzero(y >= 0)
            more = [padded(reference.view(np.int32), x.shape), padded(places, x.shape)]
        sent_x, sent_y, of, *more = self.send(x, y, docs.astype(np.int64), *more)
        batch = sent_x, sent_y, Documents(of, 1 << int(docs.max()).bit_length())
        if reference is None:
            return batch
        bits, where = (part.flatten() for part in more)
        reference = bits[: reference.size].view(reference.shape).int().view(torch.float32)
        return *batch, Pairs(reference, where[: places.size])

    def without_stream(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def padded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int64 of this shape, whose first numbers are these."""
    found = np.zeros(shape, np.int64)
    found.reshape(-1)[: values.size] = values.reshape(-1)
    return found


# ---------------------------------------------------------------- the way back, and waiting


def to_host(numbers: torch.Tensor) -> tuple:
    """A copy on its way to the host, and the event that says it has arrived (None: it has)."""
    if not numbers.is_cuda:
        return numbers.cpu(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def synchronize(device) -> None:
    """Wait until a device has done all that was queued; a CPU has."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def event_now():
    """A CUDA event that is over when all that was queued before it is."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
