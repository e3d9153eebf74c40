"""lumen/feed.py: the order of a batch's way to the device, on a GPU that is simulated.

Two streams whose work is done later, in any order that their events allow; memory that is given out
again as CUDA's allocator does it.
"""

import random
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumen import feed
from lumen.feed import Feed


class Gpu:
    """What is asked of it is in `log`; `advance` does one piece of the work that is queued."""

    def __init__(self, seed=0, full=()):
        self.random = random.Random(seed)
        self.log: list[str] = []
        self.copy_fails = deque(full)  # whether the next copies run out of memory
        self.computing = Stream(self, "computing")
        self.copying = None
        self.current = self.computing
        self.pinned_bytes = 0
        self.blocks: list[Block] = []

    def streams(self):
        return [s for s in (self.computing, self.copying) if s is not None]

    def advance(self) -> bool:
        can = [s for s in self.streams() if s.queue and s.queue[0].ready()]
        if can:
            self.random.choice(can).queue.popleft().do()
        return bool(can)

    def wait(self, done) -> None:
        """The host waits, and meanwhile the device works."""
        while not done():
            assert self.advance(), "waits for ever"

    # ---- what lumen/feed.py calls

    def make_stream(self, device):
        self.copying = Stream(self, "copying")
        return self.copying

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def empty(self, size, dtype, pin_memory):
        assert pin_memory and dtype == torch.int64
        self.pinned_bytes += 8 * size
        Pinned.gpu = self
        return torch.full((size,), -7, dtype=dtype).as_subclass(Pinned)

    def allocate(self, shape) -> "Block":
        """A free block, as the allocator sees it: of this stream, and no other stream that was
        recorded for it still works."""
        for block in self.blocks:
            if block.free and block.stream is self.current and block.shape == shape:
                if all(point.done() for point in block.others):
                    block.free, block.others = False, []
                    return block
        block = Block(self.current, shape)
        self.blocks.append(block)
        return block


class Work:
    def __init__(self, do, ready=lambda: True):
        self.do, self.ready = do, ready


class Stream:
    def __init__(self, gpu, name):
        self.gpu, self.name, self.queue = gpu, name, deque()

    def wait_event(self, event):
        self.gpu.log.append(f"{self.name} waits")
        passed = event.passed
        self.queue.append(Work(lambda: None, lambda: passed()))


class Event:
    gpu = None

    def __init__(self):
        self.passed = lambda: True

    def record(self, stream):
        self.gpu.log.append(f"record on {stream.name}")
        state = []
        stream.queue.append(Work(lambda: state.append(1)))
        self.passed = lambda: bool(state)

    def synchronize(self):
        self.gpu.log.append("host waits")
        self.gpu.wait(self.passed)


class Point:
    """All that a stream has queued so far."""

    def __init__(self, stream):
        state = []
        stream.queue.append(Work(lambda: state.append(1)))
        self.done = lambda: bool(state)


class Block:
    """Memory of the device, of the stream on which it was first asked for."""

    def __init__(self, stream, shape):
        self.stream, self.shape, self.free = stream, shape, False
        self.values, self.recorded, self.others = None, [], []

    def record_stream(self, stream):
        stream.gpu.log.append(f"recorded for {stream.name}")
        self.recorded.append(stream)

    def give_back(self):
        """Its last tensor is gone, as far as the host is concerned."""
        self.others = [Point(stream) for stream in self.recorded]
        self.free, self.recorded = True, []

    def __iter__(self):
        return ((self, i) for i in range(self.shape[0]))


class Pinned(torch.Tensor):
    """Of the host; a copy out of it reads what lies there when it is done, not when it is asked."""

    gpu: Gpu

    def to(self, device, non_blocking):
        gpu = Pinned.gpu
        assert non_blocking and device.type == "cuda"
        if gpu.copy_fails and gpu.copy_fails.popleft():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        gpu.log.append(f"copy on {gpu.current.name}")
        block = gpu.allocate(tuple(self.shape))
        source = self.as_subclass(torch.Tensor)
        gpu.current.queue.append(Work(lambda: setattr(block, "values", source.clone())))
        return block

    def copy_(self, other):
        Pinned.gpu.log.append("fill")
        return super().copy_(other)


@pytest.fixture
def simulated(monkeypatch):
    def make(seed=0, full=()):
        gpu = Gpu(seed, full)
        Event.gpu = gpu
        cuda = SimpleNamespace(
            Event=Event,
            Stream=gpu.make_stream,
            stream=gpu.on,
            current_stream=lambda device: gpu.current,
        )
        fake = SimpleNamespace(
            cuda=cuda, empty=gpu.empty, from_numpy=torch.from_numpy, int64=torch.int64
        )
        monkeypatch.setattr(feed, "torch", fake)
        return gpu, Feed(torch.device("cuda", 0))

    return make


def rows(seed: int, n=2, T=3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 40, (n, T))


def test_the_order_of_a_batchs_way_to_the_device(simulated):
    gpu, queue = simulated()
    for i in range(3):
        queue.send(rows(i), rows(i + 50))
    one = ["host waits", "fill", "fill", "copy on copying", "record on copying"]
    assert gpu.log == 3 * [*one, "computing waits", "recorded for computing"]


def test_the_copy_waits_for_nothing_that_is_computed(simulated):
    """So a batch lies there while the micro-steps before it still compute."""
    gpu, queue = simulated()
    gpu.computing.queue.append(Work(lambda: None, lambda: False))  # a kernel without end
    for i in range(5):
        (x,) = queue.send(rows(i))
        while gpu.advance():
            pass
        assert torch.equal(x[0].values[0], torch.from_numpy(rows(i)))


def test_memory_is_pinned_twice_and_again_only_for_more_rows(simulated):
    gpu, queue = simulated()
    for i in range(20):
        queue.send(rows(i), rows(i))
    assert gpu.pinned_bytes == 2 * 2 * 6 * 8
    for i in range(20):
        queue.send(rows(i, n=1), rows(i, n=1))
    assert gpu.pinned_bytes == 2 * 2 * 6 * 8
    for i in range(20):
        queue.send(rows(i, n=4), rows(i, n=4))
    assert gpu.pinned_bytes == (2 + 4) * 2 * 6 * 8


def train(gpu, queue, steps: int) -> list[tuple]:
    """Each micro-step reads its batch on the computing stream, some time later; [(sent, read)]."""
    found = []
    for i in range(steps):
        x, y = rows(i, n=1 + i % 3), rows(i + 1000, n=1 + i % 3)
        try:
            sent_x, sent_y = queue.send(x, y)
        except torch.OutOfMemoryError:
            continue
        block = sent_x[0]

        def read(block=block, x=x, y=y):
            found.append((np.stack([x, y]), block.values.numpy().copy()))

        for _ in range(2):  # forward, and backward again
            gpu.computing.queue.append(Work(read))
        del sent_x, sent_y
        block.give_back()  # the host has let go of it, before anything was computed
        for _ in range(gpu.random.randrange(6)):
            gpu.advance()
    while gpu.advance():
        pass
    assert not any(s.queue for s in gpu.streams())
    return found


@pytest.mark.parametrize("full", [(), (False, True, False, False, True, True, False)])
@pytest.mark.parametrize("seed", range(40))
def test_what_is_computed_is_what_was_sent(simulated, seed, full):
    """However the streams come along: no buffer is written while a copy reads it, no tensor is read
    before it is there, no memory is given to the next copy before the step is through; nor after a
    copy that found no memory."""
    gpu, queue = simulated(seed, full)
    found = train(gpu, queue, 12)
    assert len(found) == 2 * (12 - sum(full))
    for sent, read in found:
        assert np.array_equal(sent, read)


def test_without_a_gpu_nothing_is_copied():
    """The tensor is the array's own memory; what is a view with gaps becomes one without."""
    windows = rows(0, n=2, T=4)
    whole, part = Feed(torch.device("cpu")).send(windows, windows[:, 1:])
    assert whole.data_ptr() == windows.ctypes.data
    assert part.is_contiguous() and np.array_equal(part.numpy(), windows[:, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_that_is_behind():
    """What arrives is what was sent, and sending waits for nothing that is computed."""
    device = torch.device("cuda", 0)
    queue, busy = Feed(device), torch.randn(4096, 4096, device=device)
    sent, found = [], []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(50):
            sent.append(np.stack([rows(i, 8, 512), rows(i + 1000, 8, 512)]))
            x, y = queue.send(*sent[-1])
            torch.mm(busy, busy)
            found.append(torch.stack([x, y]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for before, after in zip(sent, found):
        assert np.array_equal(before, after.cpu().numpy())
