"""A server in this process, for the tests: a tiny model on the CPU in fp32, on a port that is
free."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from test_sample import T, make

import serve
from lumen import chat
from lumen.answering import House
from lumen.engine import Engine
from lumen.models import Opened
from lumen.openai_api import Served
from lumen.worker import Desk

CONTEXT = 160
MODEL = make(3, max_seq_len=CONTEXT)
TEMPLATE = chat.find_template("chatml")


def opened(model=MODEL, tokenizer=T, template=TEMPLATE) -> Opened:
    return Opened(model, tokenizer, "tiny", 7, "ab" * 32, {}, template, Path("out/tiny"), "run")


def served(**changes) -> Served:
    made = opened(**changes)
    return Served(made, "tiny", made.model.cfg.max_seq_len, made.template)


class Live:
    """say is kept in `said`; hold() stops the engine before its next step, go(n) lets it do n."""

    def __init__(self, slots=3, queue=8, timeout=60.0, max_body=1 << 20, model=MODEL, **changes):
        self.said = []
        self.served = served(model=model, **changes)
        self.engine = Engine(model, slots, 0, self.served.n_vocab)
        self.steps = None  # a semaphore: how many steps may be done
        step = self.engine.step
        self.real_step = step
        self.engine.step = self.step
        self.desk = Desk(self.engine, queue, self.said.append)
        self.house = House(self.served, self.desk, timeout, max_body, self.said.append)

    def step(self):
        if self.steps:
            self.steps.acquire()
        return self.real_step()

    def hold(self) -> None:
        self.steps = threading.Semaphore(0)

    def go(self, n=10**6) -> None:
        self.steps.release(n)

    def open(self, key=None, host="127.0.0.1", cors=(), drain=5.0) -> None:
        self.socket = serve.bind("127.0.0.1", 0)
        self.url = f"http://{serve.address(self.socket)}"
        self.shift = serve.Shift(self.desk, drain, self.said.append, self.url)
        app = serve.build_app(self.house, key, host, cors, self.shift.connections)
        self.server = serve.make_server(app, self.shift)
        self.desk.worker.start()
        run = self.server.run
        self.thread = threading.Thread(target=run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        wait(lambda: self.shift.server or not self.thread.is_alive())
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.shift.loop.call_soon_threadsafe(self.shift.stop)

    def close(self) -> None:
        if self.steps:
            self.go()
        self.http.close()
        with suppress(RuntimeError):  # it is closed
            self.stop()
        self.thread.join(20)
        self.desk.worker.close()
        self.desk.worker.join(20)
        self.house.readers.shutdown()
        self.socket.close()
        assert not self.thread.is_alive() and not self.desk.worker.is_alive()

    def idle(self) -> bool:
        """Nothing is left of any request."""
        left = self.desk.admitted or self.desk.jobs or self.desk.worker.rows
        return not (left or self.engine.running or self.engine.waiting)

    def ask(self, **body):
        """A conversation of one question."""
        messages = [{"role": "user", "content": body.pop("content", "hi")}]
        return self.http.post("/v1/chat/completions", json={"messages": messages} | body)

    def complete(self, prompt, **body):
        return self.http.post("/v1/completions", json={"prompt": prompt} | body)

    def raw(self, data: bytes) -> socket.socket:
        """A connection that has sent this."""
        found = socket.create_connection(self.socket.getsockname(), timeout=20)
        found.sendall(data)
        return found

    def post(self, path: str, body: dict) -> socket.socket:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return self.raw(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@contextmanager
def live(key=None, host="127.0.0.1", cors=(), drain=5.0, **options):
    made = Live(**options)
    made.open(key, host, cors, drain)
    try:
        yield made
    finally:
        made.close()


def wait(true, seconds=30) -> None:
    """Until it is so. Nothing is asserted on how long that takes, but for a limit."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come to be"
        time.sleep(0.005)
