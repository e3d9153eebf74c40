"""The thread that owns the engine, and what stands between it and the event loop of a server.

Orders (add, cancel) go in by a queue, news come out by `call_soon_threadsafe`, one call for each
step: neither side ever waits for the other. What a reader has not taken yet is kept with its job as
text, so a slow reader costs no more memory than its own reply, and the engine no time.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
import traceback
from dataclasses import dataclass, field

import torch

from lumen.engine import Engine, News, Row
from lumen.errors import UserError
from lumen.gauges import Gauges
from lumen.refused import Refused

NOT_FINITE = "the model's logits are not finite: it has diverged, or --precision fp32 helps"


class Worker(threading.Thread):
    """Nobody else touches the engine. deliver(news, time.monotonic()), fail(row, error): called in
    this thread."""

    def __init__(self, engine: Engine, deliver, fail, say=print):
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.deliver = deliver
        self.fail = fail
        self.say = say
        self.orders: queue.SimpleQueue[tuple[str, Row | None]] = queue.SimpleQueue()
        self.rows: set[Row] = set()  # of the engine
        self.running = 0  # of them, in a slot; for whoever looks from outside

    def add(self, row: Row) -> None:
        self.orders.put(("add", row))

    def cancel(self, row: Row) -> None:
        self.orders.put(("cancel", row))

    def close(self) -> None:
        self.orders.put(("close", None))

    # ------------------------------------------------------------ in the thread

    def run(self) -> None:
        error = Refused("E503", "the server is closing", status=503)
        try:
            with torch.inference_mode():
                while self.take_orders():
                    self.step()
        except Exception as reason:  # of the engine's clearing up: then nothing is left of it
            error = as_refused(reason, self.say)
        finally:
            self.fail_all(error)

    def fail_all(self, error: Refused) -> None:
        while not self.orders.empty():
            what, row = self.orders.get()
            if what == "add":
                self.rows.add(row)
        for row in self.rows:
            self.fail(row, error)

    def take_orders(self) -> bool:
        """Waits for one where there is nothing else to do. False: it is the end."""
        wait = not self.rows
        while True:
            try:
                what, row = self.orders.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if what == "close":
                return False
            try:
                self.obey(what, row)
            except Exception as error:
                self.rows.discard(row)
                self.fail(row, as_refused(error, self.say))

    def obey(self, what: str, row: Row) -> None:
        if what == "add":
            self.engine.add(row)
            self.rows.add(row)
        elif row in self.rows:
            self.rows.discard(row)
            self.engine.cancel(row)

    def step(self) -> None:
        try:
            news = self.engine.step()
        except Exception as error:
            self.clear(error)
            return
        for item in news:
            if item.reason:
                self.rows.discard(item.row)
        self.running = self.engine.running
        if news:
            self.deliver(news, time.monotonic())

    def clear(self, error: Exception) -> None:
        """The step's rows are lost, and what the cache holds may be half of something."""
        refused = as_refused(error, self.say)
        for row in self.rows:
            self.fail(row, refused)
        self.rows.clear()
        self.running = 0
        self.engine.clear()


def as_refused(error: Exception, say) -> Refused:
    """What the client is told. What only we should know is said here."""
    if isinstance(error, UserError):
        return Refused(error.code, error.text, status=400)
    if isinstance(error, FloatingPointError):
        return Refused("E500", NOT_FINITE, status=500)
    say("error in the engine:\n" + "".join(traceback.format_exception(error)))
    text = f"the model failed ({type(error).__name__}); the server's log says why"
    return Refused("E503", text, status=500)


def too_slow() -> Refused:
    text = "the reply took longer than the server's --timeout; ask for fewer tokens"
    return Refused("E503", text, status=504, word="timeout")


# ---------------------------------------------------------------- in the event loop


@dataclass
class Part:
    """What came of one row since its reader last looked."""

    number: int  # of the row in its job
    pieces: list[str] = field(default_factory=list)
    tokens: list[News] = field(default_factory=list)  # kept where log-probabilities were asked for
    reason: str | None = None  # eot | stop | length | context

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Job:
    """One request's rows, and what its reader has not taken yet. Lives in the event loop."""

    def __init__(self, rows: list[Row], begun: float, in_pieces: bool):
        self.rows = rows
        self.in_pieces = in_pieces  # False: nobody reads before all of it is there
        self.begun = begun  # time.monotonic() of the request's arrival
        self.last: list[float | None] = [None] * len(rows)  # when each row's last token came
        self.open = len(rows)
        self.new_tokens = 0
        self.parts: dict[int, Part] = {}
        self.error: UserError | None = None
        self.gone = False  # the client is
        self.changed = asyncio.Event()

    def take(self, number: int, news: News) -> None:
        part = self.parts.setdefault(number, Part(number))
        if news.piece:
            part.pieces.append(news.piece)
        if news.logprob is not None:
            part.tokens.append(news)
        if news.token is not None:
            self.new_tokens += 1
        if news.reason:
            part.reason = news.reason
            self.open -= 1
        if self.ready():
            self.changed.set()

    def fail(self, error: UserError) -> None:
        self.error = self.error or error
        self.changed.set()

    def leave(self) -> None:
        self.gone = True
        self.changed.set()

    def ready(self) -> bool:
        come = self.parts and (self.in_pieces or not self.open)
        return bool(come or self.error or self.gone)

    async def read(self, deadline: float) -> list[Part]:
        """What is new, in the order of the rows; [] when the client is gone. The job's error, or
        E503 after `deadline`, of time.monotonic()."""
        if self.open and time.monotonic() > deadline:  # however much is ready
            raise too_slow()
        if not self.ready():
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), max(deadline - time.monotonic(), 0))
            except (asyncio.TimeoutError, TimeoutError):
                raise too_slow() from None
        if self.gone:
            return []
        if self.error:
            raise self.error
        parts = sorted(self.parts.values(), key=lambda part: part.number)
        self.parts = {}
        return parts


class Desk:
    """Admits requests, and hands each what came of its rows. All of it runs in the event loop, but
    for `from_worker` and `failed_in_worker`."""

    def __init__(self, engine: Engine, queue: int, say=print):
        self.slots = len(engine.rows)
        self.most = self.slots + queue  # sequences in the house
        self.say = say
        self.gauges = Gauges()
        self.worker = Worker(engine, self.from_worker, self.failed_in_worker, say)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.admitted = 0  # sequences of requests that are not answered yet
        self.jobs: dict[Row, tuple[Job, int]] = {}
        self.draining = False

    def state(self) -> dict[str, tuple[str, float]]:
        running = min(self.worker.running, len(self.jobs))
        return {
            "slots": ("sequences that are written at the same time", self.slots),
            "sequences_running": ("sequences in a slot", running),
            "sequences_waiting": ("sequences that wait for a slot", len(self.jobs) - running),
            "sequences_admitted": ("sequences of unanswered requests", self.admitted),
            "sequences_most": ("the most that are admitted: --slots + --queue", self.most),
        }

    # ------------------------------------------------------------ admission

    def admit(self, n: int) -> None:
        """A place for n sequences, until `leave`. E503: there is none."""
        if self.draining:
            raise self.refused("the server is closing")
        if not self.worker.is_alive():
            raise self.refused("the server's engine has stopped")
        if n > self.most:
            text = f"{n} sequences in one request; the server takes {self.most} (--slots + --queue)"
            raise Refused("E505", f"{text}: lower n, or send fewer prompts", param="n")
        if self.admitted + n > self.most:
            text = f"{self.admitted} sequences are written or wait, the most is {self.most}"
            raise self.refused(f"the server is full: {text}")
        self.admitted += n

    def refused(self, text: str) -> Refused:
        return Refused("E503", text, status=503, retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Seconds until a place is free, roughly: what a request takes, on average."""
        n = sum(self.gauges.request.counts)
        mean = self.gauges.request.total / n if n else 1
        return min(max(math.ceil(mean), 1), 60)

    def leave(self, n: int) -> None:
        self.admitted -= n

    # ------------------------------------------------------------ jobs

    def begin(self, job: Job) -> None:
        self.loop = asyncio.get_running_loop()
        for number, row in enumerate(job.rows):
            self.jobs[row] = (job, number)
            self.worker.add(row)

    def end(self, job: Job, why: str) -> None:
        """Rows that go on are stopped: the client is gone, or an error has come."""
        for row in job.rows:
            if self.jobs.pop(row, None):
                self.worker.cancel(row)
                self.gauges.ended[why] += 1

    def close(self, error: UserError) -> None:
        """Everybody who still waits is told."""
        for job, _ in list(self.jobs.values()):
            job.fail(error)

    # ------------------------------------------------------------ from the worker's thread

    def from_worker(self, news: list[News], now: float) -> None:
        self.call(self.deliver, news, now)

    def failed_in_worker(self, row: Row, error: UserError) -> None:
        self.call(self.fail, row, error)

    def call(self, function, *args) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody reads any more
            pass

    def deliver(self, news: list[News], now: float) -> None:
        new = 0
        for item in news:
            found = self.jobs.get(item.row)
            if found is None:  # was cancelled while this was on its way
                continue
            job, number = found
            if item.reason == "error":
                self.fail(item.row, Refused("E500", NOT_FINITE, status=500))
                continue
            if item.token is None:
                continue
            new += 1
            self.measure(job, number, now)
            if item.reason:
                del self.jobs[item.row]
                self.gauges.ended["length" if item.reason == "context" else item.reason] += 1
            job.take(number, item)
        self.gauges.new_tokens(new, now)

    def measure(self, job: Job, number: int, now: float) -> None:
        before = job.last[number]
        job.last[number] = now
        if before is not None:
            self.gauges.between_tokens.add(now - before)
            return
        row = job.rows[number]
        self.gauges.first_token.add(now - job.begun)
        self.gauges.tokens["prompt"] += len(row.stream.ids)
        self.gauges.tokens["reused"] += row.reused
        self.gauges.prompt_tokens.add(len(row.stream.ids))

    def fail(self, row: Row, error: UserError) -> None:
        found = self.jobs.pop(row, None)
        if found:
            self.gauges.ended["error"] += 1
            found[0].fail(error)
