"""Serve a model: `python serve.py out/chat`, then http://127.0.0.1:8000 in a browser, or any client
of OpenAI's API with base_url http://127.0.0.1:8000/v1.

One thread owns the engine (lumen/worker.py); the event loop reads requests (lumen/openai_api.py),
answers them (lumen/answering.py) and keeps strangers out (lumen/gate.py). It binds 127.0.0.1;
another --host needs a key. docs/serving.md has all routes, fields and codes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import math
import os
import sys
import time

import lumen.waiting  # noqa: F401 - before torch

from lumen import kv_int8, option_names, web_page
from lumen.answering import Answering, House
from lumen.engine import Engine
from lumen.errors import UserError, a_path
from lumen.gate import Gate, address, bind, check_key, is_loopback
from lumen.kv_int8 import CACHES
from lumen.launch import Words, command
from lumen.machine import resident_bytes
from lumen.models import Opened, open_model
from lumen.openai_api import Served
from lumen.prompts import choose_template
from lumen.refused import Refused, to_json
from lumen.worker import Desk

IDLE_SECONDS = 60  # for which a connection may say nothing
SWEEP_SECONDS = 5
NO_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    + to_json(Refused("E505", "this is no HTTP request").body())
)

# ---------------------------------------------------------------- the routes


def build_app(house: House, key: str | None = None, host="127.0.0.1", cors=(), connections=None):
    """The ASGI application. connections: a function, how many are open. E003: FastAPI is not
    installed."""
    fastapi = optional("fastapi")
    not_found = optional("starlette.exceptions").HTTPException
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    plain = Plain(house, optional("fastapi.responses").Response)
    gets = {
        "/": plain.page,
        "/v1/models": plain.models,
        "/v1/models/{name:path}": plain.model,
        "/health": plain.health,
        "/metrics": plain.metrics,
    }
    posts = {"/v1/chat/completions": "chat", "/v1/completions": "text", "/generate": "generate"}
    for path, function in gets.items():
        app.router.add_route(path, function, methods=["GET"])
    for path, kind in posts.items():
        app.router.add_route(path, Answering(kind, house), methods=["POST"])
    app.add_exception_handler(not_found, plain.failed)
    return Gate(app, house.desk.gauges, key, host, cors, connections)


class Plain:
    """The routes that ask nothing of the model."""

    def __init__(self, house: House, response):
        self.house = house
        self.response = response
        self.html, self.html_headers = web_page.load()
        served = house.served
        self.about = {
            "id": served.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "lumen",
            "max_model_len": served.context,
            "template": served.template.name if served.template else None,
        }

    def json(self, value, status=200, headers=None):
        return self.response(to_json(value), status, headers, media_type="application/json")

    def refuse(self, error: Refused):
        self.house.desk.gauges.errors[error.code] += 1
        return self.json(error.body(), error.status, error.headers())

    async def page(self, request):
        return self.response(self.html, headers=self.html_headers)

    async def models(self, request):
        return self.json({"object": "list", "data": [self.about]})

    async def model(self, request):
        name = request.path_params["name"]
        if name == self.about["id"]:
            return self.json(self.about)
        text = f"model: {name[:80]!r} is not served here; {self.about['id']!r} is"
        return self.refuse(Refused("E505", text, status=404, word="model_not_found"))

    async def health(self, request):
        desk = self.house.desk
        status = "ok"
        if not desk.worker.is_alive():
            status = "the engine has stopped"
        elif desk.draining:
            status = "closing"
        return self.json({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request):
        desk = self.house.desk
        resident = {"resident_bytes": ("memory that the process holds", resident_bytes() or 0)}
        text = desk.gauges.render(desk.state() | resident)
        return self.response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def failed(self, request, error):
        """404 and 405 of the router."""
        known = {404: "no such route", 405: f"{request.method} is not for this route"}
        text = known.get(error.status_code, str(error.detail))
        routes = "POST /v1/chat/completions, /v1/completions, /generate; GET /v1/models, /health"
        text = f"{request.url.path[:80]}: {text}; {routes}, /metrics"
        made = self.refuse(Refused("E505", text, status=error.status_code))
        if allowed := (error.headers or {}).get("Allow"):
            made.headers["Allow"] = allowed
        return made


def optional(name: str):
    """A module of requirements-serve.txt. E003."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"serve.py needs {name}: pip install -r requirements-serve.txt ({error})"
        raise UserError("E003", text) from None


# ---------------------------------------------------------------- the server


def make_server(app, shift: Shift):
    """A uvicorn.Server whose signals are our Shift's. E003."""
    uvicorn = optional("uvicorn")
    protocol = optional("uvicorn.protocols.http.h11_impl").H11Protocol

    class Protocol(protocol):
        def data_received(self, data: bytes) -> None:
            """What comes before its turn is not kept, and the connection ends with the answer:
            uvicorn would read no further, and nobody would see the client go."""
            cycle = self.cycle
            if cycle and not (cycle.more_body or cycle.response_complete):
                cycle.keep_alive = False
            else:
                super().data_received(data)

        def send_400_response(self, msg: str) -> None:
            """What came is no HTTP."""
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(NO_HTTP)
            self.transport.close()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            shift.begin(self)

        def handle_exit(self, number, frame) -> None:
            shift.heard(number)

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    return Server(config)


class Shift:
    """From the moment when the server can be reached to its end."""

    def __init__(self, desk: Desk, drain: float, say, where: str = ""):
        self.desk = desk
        self.seconds = drain
        self.say = say
        self.where = where
        self.stopping = False
        self.server = None
        self.loop = None
        self.tasks = []

    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def begin(self, server) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.tasks.append(self.loop.create_task(self.sweep()))
        self.say(f"{self.where} (Ctrl-C ends it)")

    def heard(self, number: int) -> None:
        """SIGTERM or Ctrl-C, in a signal handler."""
        if self.stopping or self.loop is None:
            os._exit(128 + number)
        self.stopping = True
        self.loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        self.desk.draining = True
        self.tasks.append(self.loop.create_task(self.drain()))

    async def drain(self) -> None:
        """New requests get 503; those that are answered now have some seconds."""
        if n := self.desk.admitted:
            self.say(f"closing: {n} sequences have {self.seconds:g} s; again ends them at once")
        end = time.monotonic() + self.seconds
        while self.desk.admitted and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.desk.close(Refused("E503", "the server is closing", status=503))
        await asyncio.sleep(0.05)
        self.server.should_exit = True

    async def sweep(self) -> None:
        """A connection that sends half a request, or does not read its answer, costs a file and
        some memory: uvicorn has no limit for either."""
        quiet = {}  # connection -> (its last request, since when)
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            found = {}
            for connection in list(self.server.server_state.connections):
                if not is_quiet(connection):
                    continue
                request, since = quiet.get(connection, (None, now))
                if request is not connection.cycle:
                    since = now
                found[connection] = connection.cycle, since
                if now - since > IDLE_SECONDS:
                    connection.transport.abort()
            quiet = found


def is_quiet(connection) -> bool:
    """Nothing is asked, or the answer is complete but not read."""
    closing = connection.transport.is_closing()
    return closing or connection.cycle is None or connection.cycle.response_complete


# ---------------------------------------------------------------- the command


def within(kind, low, high=math.inf):
    """`type=` of an option with a range."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= high:
            words = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {words}")
        return value

    number.__name__ = kind.__name__  # argparse: "invalid int value"
    return number


def arguments() -> Words:
    p = Words(prog="serve.py", description="Serve a model: OpenAI's API and a web chat.")
    places = "a run, a step of it, a Hugging Face or quantised folder"

    def option(name: str, kind, default, help: str, **more) -> None:
        shown = "" if default in (None, "") else f" (default {default})"
        p.add_argument(f"--{name}", type=kind, default=default, help=help + shown, **more)

    p.add_argument("run", type=a_path, help=places)
    option("host", str, "127.0.0.1", "other than this machine's own needs a key")
    option("port", within(int, 0, 65535), 8000, "0: any that is free")
    option("api_key", str, None, "clients must send it; better in LUMEN_API_KEY: ps shows options")
    option("cors", str, None, "a page that may use it; repeatable", action="append")
    option("slots", within(int, 1, 1024), 8, "sequences that are written at the same time")
    option("context", within(int, 0), 0, "tokens of a prompt and its reply; 0: the model's most")
    option("queue", within(int, 0, 100_000), 64, "sequences that may wait for a slot")
    option("timeout", within(float, 0.1), 600.0, "seconds for a request, waiting included")
    option("max_body", within(int, 1024), 1 << 20, "bytes of a request")
    option("drain", within(float, 0), 30.0, "seconds that requests have to end after SIGTERM")
    option("template", str, None, "of conversations; default: the run's")
    option("system", str, "", "what a conversation without a system message begins with")
    option("name", str, None, "of the model; default: its folder's")
    option("tokenizer", str, None, "default: the run's tokenizer.json", metavar="FILE")
    p.add_argument("--best", action="store_true", help="the lowest validation loss, not the newest")
    option("step", int, None, "the checkpoint of step N", metavar="N")
    option("device", str, "auto", "auto, cpu, cuda, mps")
    option("precision", str, "auto", "auto, fp32, bf16, fp16")
    option("kv", str, "full", "int8: keys and values in half of bf16's memory", choices=CACHES)
    return p


def open_house(args: argparse.Namespace, say) -> House:
    """The model, ready to be asked."""
    opened = open_model(
        args.run, args.best, args.step, args.tokenizer, args.device, args.precision, say
    )
    context = args.context or opened.model.cfg.max_seq_len
    if context > opened.model.cfg.max_seq_len:
        text = f"--context {context}: the model's max_seq_len is {opened.model.cfg.max_seq_len}"
        raise UserError("E002", text)
    template = template_for(opened, args.template, say)
    served = Served(opened, args.name or opened.name, context, template, args.system)
    kv_int8.use(opened.model, args.kv)
    try:
        engine = Engine(opened.model, args.slots, context, served.n_vocab)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        text = f"--slots {args.slots} sequences of --context {context} tokens do not fit: {error}"
        raise UserError("E200", text) from error
    desk = Desk(engine, args.queue, say)
    return House(served, desk, args.timeout, args.max_body, say)


def template_for(opened: Opened, asked: str | None, say):
    """None: there is no tokenizer to write conversations with, or it lacks what they need."""
    try:
        return choose_template(opened, asked, say)
    except UserError as error:
        if asked or error.code not in ("E113", "E501"):
            raise
        say(f"note: no conversations: {error.text}")
        return None


def main(argv: list[str]) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    args = option_names.parse(arguments(), argv, say)
    key = args.api_key if args.api_key is not None else os.environ.get("LUMEN_API_KEY")
    cors = args.cors or []
    check_key(key, args.host, cors)
    for name in ("fastapi", "uvicorn"):  # before a large model is read
        optional(name)
    with contextlib.closing(bind(args.host, args.port)) as listening:
        house = open_house(args, say)
        shift = Shift(house.desk, args.drain, say, f"http://{address(listening)}")
        app = build_app(house, key, args.host, cors, shift.connections)
        tell(house, args, key, say)
        house.desk.worker.start()
        make_server(app, shift).run(sockets=[listening])
    house.desk.worker.close()
    house.desk.worker.join(10)
    return 0


def tell(house: House, args, key: str | None, say) -> None:
    """What is served: the URL follows when it is."""
    model, served = house.served.opened.model, house.served
    dtype = str(model.compute_dtype).removeprefix("torch.")
    say(f"{args.run}: {served.opened}, {model.embed.weight.device}, {dtype}")
    template = f"template {served.template.name}" if served.template else "token ids only"
    say(f"model {served.name!r}, {template}, {args.slots} slots of {served.context} tokens")
    if not is_loopback(args.host):
        say("note: others reach it; the key goes over the wire as it is: put https before it")
    elif key is None:
        say("note: no key: every program of this machine may use it")


if __name__ == "__main__":
    command(main)
