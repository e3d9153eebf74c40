"""A page that follows runs while they train: `python -m lumen.report RUN [RUN2 ...] --serve`; with
`--html FILE` the same as one file, which needs no server.

Runs are read from the folders that were named when it started. Nothing is written there, and no
path that a browser asks for is opened. Of a file that grows only the new bytes are read, and the
page gets at most MOST_POINTS points of a curve, however long the run is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from array import array
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from lumen import nearby, story, web_page
from lumen.errors import UserError
from lumen.files import finite, read_json, replacing
from lumen.gate import address, bind, is_loopback, is_our_host
from lumen.refused import Refused, to_json

PAGE = Path(__file__).with_suffix(".html")
MOST_POINTS = 2000  # of a curve
HEAD = 1024  # bytes by which a file is known again
CURVES = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second")
NEWEST = ("tokens", "loss", "val_loss", "best_val_loss", "best_step", "tokens_per_second", "mfu")
NEWEST += ("health", "health_causes", "experts/dead")
DATA_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

# ---------------------------------------------------------------- files that grow


class Lines:
    """The rows of a .jsonl file that somebody else appends to."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0  # bytes of whole lines that were read
        self.head = b""  # the first of them

    def news(self):
        """The rows since the last call; None first, where the file is another one than before (a
        run that was overwritten). Half a last line is left for the next call, and what is no JSON
        object is passed over."""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self.offset or file.read(len(self.head)) != self.head:
                self.offset, self.head = 0, b""
                yield None
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                self.head += line[: HEAD - len(self.head)]
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row


class Curve:
    """A number over the steps; apart from it what was rolled back."""

    def __init__(self):
        self.kept = array("d"), array("d")  # steps, values
        self.lost = array("d"), array("d")

    def add(self, step: int, value: float) -> None:
        self.cut(step)
        self.kept[0].append(step)
        self.kept[1].append(value)

    def cut(self, step: int) -> None:
        """This step comes again, and with it all that follow."""
        while self.kept[0] and self.kept[0][-1] >= step:
            for kept, lost in zip(self.kept, self.lost):
                lost.append(kept.pop())


def thin(steps, values, most: int = MOST_POINTS) -> list[list]:
    """[steps, values], `most` at most: the first, the last, both extremes of each stretch."""
    x, y = np.array(steps), np.array(values)
    if len(x) > most:
        chosen = {0, len(x) - 1}
        for stretch in np.array_split(np.arange(len(x)), (most - 2) // 2):
            chosen |= {stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]}
        places = sorted(chosen)
        x, y = x[places], y[places]
    return [[int(step) for step in x], [float(f"{value:.6g}") for value in y]]


# ---------------------------------------------------------------- runs


class Run:
    """A run's folder, as the page is to show it."""

    def __init__(self, out: Path, name: str):
        self.out, self.name = out, name
        self.metrics = Lines(out / "metrics.jsonl")
        self.decisions = Lines(out / "decisions.jsonl")
        self.decided: list[dict] = []
        self.seen = None  # status.json and two times, when `document` was made
        self.document = b""
        self.forget()

    def forget(self) -> None:
        """What metrics.jsonl said."""
        self.curves = {name: Curve() for name in CURVES}
        self.step = 0
        self.newest: dict = {}
        self.experts: dict | None = None

    def read(self) -> bytes:
        """As JSON, made anew if there is anything new."""
        changed = False
        for row in self.metrics.news():
            changed = True
            if row is None:
                self.forget()
            else:
                self.take(row)
        for row in self.decisions.news():
            changed = True
            if row is None:
                self.decided = []
            else:
                self.decided.append(row)
        # when the last line was written, and when the owner last gave a sign of life
        times = [modified(self.out / name) for name in ("metrics.jsonl", "owner.json")]
        now = read_json(self.out / "status.json"), times
        if changed or now != self.seen:
            self.seen = now
            self.document = to_json(finite(self.describe(*now)))
        return self.document

    def take(self, row: dict) -> None:
        """A row of metrics.jsonl."""
        step = row.get("step")
        if not isinstance(step, int):
            return
        if step < self.step:  # a rollback, or a start from an older checkpoint
            for curve in self.curves.values():
                curve.cut(step)
        self.step = step
        for name, curve in self.curves.items():
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curve.add(step, value)
        self.newest |= {name: row[name] for name in NEWEST if name in row}
        begin = "experts/share/"
        layers = {key[len(begin) :]: row[key] for key in row if key.startswith(begin)}
        if layers:
            self.experts = {"step": step, "layers": layers}

    def describe(self, status: dict, times: list) -> dict:
        decisions = story.told(self.decided)
        curves = {}
        for name, curve in self.curves.items():
            curves[name] = {"kept": thin(*curve.kept), "lost": thin(*curve.lost)}
        return {
            "name": self.name,
            "status": status,
            "written": times[0],
            "alive": times[1],
            "step": self.step,
            "max_steps": max_steps(self.out),
            "newest": self.newest,
            "curves": curves,
            "experts": self.experts,
            "decisions": decisions[-story.MOST_TOLD :],
            "earlier": max(0, len(decisions) - story.MOST_TOLD),
        }


def modified(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None


def max_steps(out: Path) -> int | None:
    """As the run's configuration says: resolved.yaml is ours where config.yaml is the user's."""
    for name in ("resolved.yaml", "config.yaml"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (out / name).read_text(encoding="utf-8")
            if found := re.search(r"^max_steps: (\d{1,15})$", text, re.MULTILINE):
                return int(found[1])
    return None


class Runs:
    """Those that a page compares. E108: a folder that is no run."""

    def __init__(self, folders: list[str]):
        by_path = {Path(folder).resolve(): folder for folder in folders}
        for folder in by_path.values():
            if not any(os.path.isfile(f"{folder}/{n}") for n in ("metrics.jsonl", "status.json")):
                text = f"{folder} is no run, it holds neither metrics.jsonl nor status.json"
                raise UserError("E108", text + nearby.hint(folder))
        names = [path.name for path in by_path]
        self.runs = []
        for path, folder in by_path.items():
            unique = names.count(path.name) == 1
            self.runs.append(Run(path, path.name if unique else folder))
        self.lock = threading.Lock()

    def read(self) -> bytes:
        """As JSON, which stays the same as long as nothing new was written."""
        with self.lock:
            return b'{"runs":[' + b",".join(run.read() for run in self.runs) + b"]}"


# ---------------------------------------------------------------- the server


class Handler(BaseHTTPRequestHandler):
    """GET / is the page and GET /data the runs; there is nothing else to ask for."""

    timeout = 30  # seconds for which a connection may say nothing
    server_version, sys_version = "lumen", ""

    def do_GET(self) -> None:
        try:
            self.check_host(self.headers.get("Host", ""))
            self.reply(200, *self.answer(self.path.partition("?")[0]))
        except Refused as error:
            self.reply(error.status, to_json(error.body()), DATA_HEADERS)

    def check_host(self, given: str) -> None:
        if not is_our_host(given, self.server.host):
            text = f"Host {given[:80]!r} is not this machine: a page may be behind it (DNS"
            text += " rebinding); use http://127.0.0.1, or the name that --host was given"
            raise Refused("E504", text, status=403)

    def answer(self, path: str) -> tuple[bytes, dict]:
        if path == "/":
            return self.server.page
        if path != "/data":
            raise Refused("E505", f"{path[:80]}: no such route; GET / and /data", status=404)
        body = self.server.runs.read()
        return body, DATA_HEADERS | {"ETag": f'"{sha256(body).hexdigest()[:16]}"'}

    def reply(self, status: int, body: bytes, headers: dict) -> None:
        if "ETag" in headers and headers["ETag"] == self.headers.get("If-None-Match"):
            status, body = 304, b""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Nothing: a page asks every two seconds."""


class Server(ThreadingHTTPServer):
    def __init__(self, runs: Runs, host: str, port: int):
        """E002: the address cannot be had."""
        self.runs, self.host, self.page = runs, host, web_page.load(PAGE)
        super().__init__((host, port), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bind(host, port)
        self.server_activate()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that went is none of ours
            super().handle_error(request, client_address)


def serve(folders: list[str], host: str, port: int) -> int:
    runs = Runs(folders)
    with Server(runs, host, port) as server:
        runs.read()  # long files take a while at first
        if not is_loopback(host):
            print("note: whoever reaches it can read it; there is no key")
        print(f"http://{address(server.socket)} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def write(folders: list[str], file: str) -> int:
    """The page as a file. E002: it cannot be written."""
    data = json.loads(Runs(folders).read()) | {"made": time.time()}
    page = web_page.alone(PAGE, to_json(data).decode())
    try:
        with replacing(file) as to:
            to.write(page)
    except OSError as error:
        raise UserError("E002", f"--html {file}: {error.strerror}") from error
    print(file)
    return 0
