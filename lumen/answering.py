"""One HTTP request to a model, from its first byte to the last of its answer: ASGI, without a
framework's help, for all of it must end when the client goes, stops reading or sends too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lumen.chat import visible
from lumen.engine import Row
from lumen.errors import UserError
from lumen.gate import send_answer, send_refused
from lumen.openai_api import Asked, Served, read_chat, read_generate, read_text, rows_of
from lumen.openai_shapes import SHAPES, Shape
from lumen.refused import Refused, refused, to_json
from lumen.worker import Desk, Job, too_slow

READERS = {"chat": read_chat, "text": read_text, "generate": read_generate}
BODY_SECONDS = 30  # in which a request's body must be here
DISCARDED = 16 << 20  # bytes of a body that is too large
DISCARD_SECONDS = 1.0  # for each piece of it
STALLED_SECONDS = 30  # for which a reader may take nothing of its stream
MOST_WARNINGS = 100  # about different fields
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
]


class Gone(Exception):
    """The client is, or has stopped to read."""


@dataclass
class House:
    """What all requests share."""

    served: Served
    desk: Desk
    timeout: float  # seconds for a request, waiting included
    max_body: int  # bytes
    say: Callable[[str], None] = print
    warned: set[str] = field(default_factory=set)
    # texts become tokens here: a long one takes a while, for which the event loop must not stand
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokens"))

    def warn(self, asked: Asked) -> None:
        """Once for each field, never its value."""
        for name in asked.unknown:
            name = visible(name[:80])
            if name not in self.warned and len(self.warned) < MOST_WARNINGS:
                self.warned.add(name)
                self.say(f"note: field {name!r} of a request is ignored: not known")


class Answering:
    """The ASGI endpoint of one route."""

    def __init__(self, kind: str, house: House):
        self.kind = kind
        self.house = house

    async def __call__(self, scope, receive, send) -> None:
        answer = Answer(self.kind, self.house, receive, send)
        try:
            await answer.make(dict(reversed(scope["headers"])))
        except Gone:
            pass
        except UserError as error:
            await answer.refuse(refused(error))
        except Exception as error:
            self.house.say(without_values(error))
            text = f"a fault of the server's ({type(error).__name__}); its log says where"
            await answer.refuse(Refused("E503", text, status=500))


def without_values(error: Exception) -> str:
    """Where it was, but not what it says: that may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"error while answering: {type(error).__name__}\n{frames}"


class Answer:
    def __init__(self, kind: str, house: House, receive, send):
        self.kind = kind
        self.house = house
        self.receive = receive
        self.send = send
        self.begun = time.monotonic()
        self.deadline = self.begun + house.timeout
        self.streaming = False

    async def make(self, headers: dict) -> None:
        body = await read_json(self.receive, headers, self.house.max_body)
        asked = READERS[self.kind](body, self.house.served)
        self.house.warn(asked)
        desk = self.house.desk
        desk.admit(asked.n_rows)
        try:
            await self.answer(asked)
        finally:
            desk.leave(asked.n_rows)
            desk.gauges.request.add(time.monotonic() - self.begun)

    async def answer(self, asked: Asked) -> None:
        rows = await self.read(asked)
        job = Job(rows, self.begun, in_pieces=asked.stream)
        shape = SHAPES[self.kind](asked, self.house.served, rows)
        watch = asyncio.create_task(self.watch(job))
        why = "error"
        self.house.desk.begin(job)
        try:
            if asked.stream:
                await self.stream(job, shape)
            else:
                await self.whole(job, shape)
        except Gone:
            why = "gone"
            raise
        except Refused as error:
            why = "timeout" if error.word == "timeout" else "error"
            raise
        finally:
            self.house.desk.end(job, why)
            watch.cancel()

    async def read(self, asked: Asked) -> list[Row]:
        """Prompts to tokens, in a thread. E503 where that takes too long."""
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self.house.readers, rows_of, asked, self.house.served)
        try:
            return await asyncio.wait_for(reading, max(self.deadline - time.monotonic(), 0))
        except (asyncio.TimeoutError, TimeoutError):
            raise too_slow() from None

    async def watch(self, job: Job) -> None:
        """Until the client goes."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        job.leave()

    async def whole(self, job: Job, shape: Shape) -> None:
        parts = await job.read(self.deadline)
        if not parts:
            raise Gone
        data = to_json(shape.whole(parts, job.new_tokens))
        await send_answer(self.send, 200, [(b"content-type", b"application/json")], data)

    # ------------------------------------------------------------ a stream

    async def stream(self, job: Job, shape: Shape) -> None:
        """The status waits for the first token: until then an error still has its own."""
        chunks = None
        while job.open or job.parts or chunks is None:
            parts = await job.read(self.deadline)
            if not parts:
                raise Gone
            if chunks is None:
                await self.begin_stream()
                chunks = shape.opening()
            for part in parts:
                chunks += shape.chunks(part)
            if chunks:
                await self.push(b"".join(event(chunk) for chunk in chunks))
            chunks = []
        ends = [event(chunk) for chunk in shape.closing(job.new_tokens)]
        await self.push(b"".join([*ends, b"data: [DONE]\n\n"]), last=True)

    async def begin_stream(self) -> None:
        self.streaming = True
        await self.send({"type": "http.response.start", "status": 200, "headers": SSE})

    async def push(self, data: bytes, last=False) -> None:
        """Gone: nobody has taken anything for a while."""
        message = {"type": "http.response.body", "body": data, "more_body": not last}
        try:
            await asyncio.wait_for(self.send(message), STALLED_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise Gone from None

    async def refuse(self, error: Refused) -> None:
        """In a stream that has begun it is the last event, without [DONE]: openai's client raises
        it."""
        self.house.desk.gauges.errors[error.code] += 1
        if not self.streaming:
            await send_refused(self.send, error)
            return
        with contextlib.suppress(Gone):
            await self.push(event(error.body()), last=True)


def event(value: dict) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


# ---------------------------------------------------------------- a request's body


async def read_json(receive, headers: dict, most: int) -> dict:
    """E505: it is no JSON object, is too large, came too slowly, or is declared to be something
    else: a form of another page, which a browser sends without asking, is no application/json."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        text = "a request is JSON: send the header Content-Type: application/json"
        raise Refused("E505", text, status=415)
    declared = headers.get(b"content-length", b"0")
    large = declared.isdigit() and int(declared[:20]) > most
    if large and b"expect" in headers:  # nothing is on its way yet
        raise too_large(most)
    try:
        data = await asyncio.wait_for(read_body(receive, 0 if large else most), BODY_SECONDS)
        if data is None:
            await discard(receive)
            raise too_large(most)
    except (asyncio.TimeoutError, TimeoutError):
        text = f"the body did not come within {BODY_SECONDS} s"
        raise Refused("E505", text, status=408) from None
    return parse_json(data)


async def read_body(receive, most: int) -> bytes | None:
    """None: it has more bytes than that, whatever was declared."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def discard(receive) -> None:
    """The rest of a body that is too large, up to a limit: a client that is cut off while it sends
    would see a broken connection, and not why."""
    size = 0
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        while size < DISCARDED:
            message = await asyncio.wait_for(receive(), DISCARD_SECONDS)
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def too_large(most: int) -> Refused:
    text = f"the body has more than {most:,} bytes; --max_body of the server raises that"
    return Refused("E505", text, status=413, word="request_too_large")


def parse_json(data: bytes) -> dict:
    if not data.strip():
        raise Refused("E505", "the body is empty; it must be a JSON object")
    try:
        value = json.loads(data)
    except RecursionError:
        raise Refused("E505", "the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise Refused("E505", "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        said = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise Refused("E505", f"the body is no JSON: {said}, {where}") from None
    except ValueError:
        raise Refused("E505", "the body is no JSON: a number has too many digits") from None
    if not isinstance(value, dict):
        raise Refused("E505", f"the body is a JSON {type(value).__name__}; it must be an object")
    return value
