"""Work that is shared out among processes, and whose results come back in order.

    for batch, result in in_order(batches, workers, Encoder, given): ...

Each process makes one `Encoder(*given)` and calls it with batch after batch; with one worker that
is this process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial

from lumen.errors import UserError

BATCHES_AHEAD = 4  # of each worker: enough to keep it busy, little to hold in memory


def start_worker(make, given: tuple) -> None:
    """Once a process. A process of a pool ends with its parent, even if that is killed with -9."""
    global _make
    # Ctrl-C goes to all of a terminal: the parent answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    # not made here: what an initializer raises is lost, and the pool only says that it broke
    _make = partial(make, *given)


def end_with(parent) -> None:
    parent.join()
    os._exit(1)


@cache
def the_worker():
    return _make()


def work(batch):
    return the_worker()(batch)


def in_order(batches, workers: int, make, given: tuple):
    """(batch, make(*given)(batch)) in the order of the batches. E003: a process died."""
    if workers == 1:
        worker = make(*given)
        for batch in batches:
            yield batch, worker(batch)
        return
    waiting = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (make, given)) as pool:
        try:
            for batch in batches:
                # a process that begins here inherits it, and is not interrupted while it imports
                with interrupts_blocked():
                    waiting.append((batch, pool.submit(work, batch)))
                if len(waiting) >= BATCHES_AHEAD * workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()
        except BrokenProcessPool:
            text = "a worker process died, out of memory perhaps"
            again = "the same command with fewer --workers goes on"
            raise UserError("E003", f"{text}: {again}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is under way ends, the rest does not begin
            raise


@contextmanager
def interrupts_blocked():
    """Ctrl-C waits until this is over, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
