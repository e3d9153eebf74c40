"""A server under load from people of all kinds: `python -m tools.bench_serve out/quickstart
[--clients 200] [--seconds 300] [--slots 8] [--queue 64] [--seed N] [--out FILE]`.

Starts serve.py on a free port of 127.0.0.1 as a process of its own, and in this one that many
clients, each again and again with a request of a random kind: whole and streamed replies that are
read to their ends and compared with what the same request gave on the quiet server, clients that go
in the middle, slow readers, garbage, wrong fields, bodies that are too large, prompts that are too
long. Promised, and checked at the end: every request that was accepted was answered in full and
with the same text, every bad one was refused in OpenAI's shape, no slot is lost, memory is flat.
Exit code 1 where that does not hold. Clients and server share the machine: times are of both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from lumen.launch import Words, command
from tools import timing

KEY = "bench"
MAX_BODY = 65536
ASKED = 24  # different requests whose texts are known
# share of the requests; the rest of them are read as they should be
KINDS = {
    "whole": 30, "stream": 30, "leaves": 10, "leaves stream": 10, "slow": 4,
    "garbage": 4, "no json": 4, "bad field": 4, "too large": 2, "too long": 2,
}  # fmt: skip
STATUS = {"no json": 400, "bad field": 400, "too large": 413, "too long": 400, "garbage": 400}
GROWTH = 1.05  # memory at the end may be this much of that after a third of the time


class Load:
    def __init__(self, host: str, port: int, seed: int):
        self.host, self.port = host, port
        self.random = random.Random(seed)
        self.wanted: dict[int, str] = {}  # text of each request, on the quiet server
        self.counts = Counter()  # (kind, what became of it)
        self.faults: list[str] = []
        self.first: list[float] = []  # seconds to the first piece of a stream

    # ------------------------------------------------------------ the wire

    def head(self, length, path="/v1/completions") -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"Host: {self.host}", f"Authorization: Bearer {KEY}"]
        lines += ["Content-Type: application/json", "Connection: close"]
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

    def body(self, number: int, **more) -> bytes:
        body = {"prompt": f"def f{number}(", "seed": number, "max_tokens": 8 + 3 * number}
        return json.dumps(body | more).encode()

    async def send(self, data: bytes):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(data)
        return reader, writer

    async def answer(self, data: bytes) -> tuple[int, bytes, dict]:
        """(status, body, headers), read to the end."""
        reader, writer = await self.send(data)
        try:
            return split(await reader.read())
        finally:
            writer.close()

    # ------------------------------------------------------------ clients

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                wait = await asyncio.wait_for(getattr(self, kind.replace(" ", "_"))(), 90)
            except (asyncio.TimeoutError, TimeoutError):
                self.faults.append(f"{kind}: no answer in 90 s")
            except (ConnectionError, OSError) as error:
                self.counts[kind, type(error).__name__] += 1
                if kind != "garbage":
                    self.faults.append(f"{kind}: {error!r}")
            else:
                await asyncio.sleep(self.random.random() * 0.5 + (wait or 0))

    def judge(self, kind: str, status: int, body: bytes, headers: dict) -> float:
        """Of an answer that is no text: seconds until the next request."""
        self.counts[kind, status] += 1
        try:
            error = json.loads(body)["error"]
            good = re.match(r"E\d\d\d: ", error["message"]) and set(error) >= {"type", "code"}
        except (ValueError, KeyError, TypeError):
            good = False
        if not good or status not in (503, STATUS.get(kind, 503)):
            self.faults.append(f"{kind}: {status} {body[:200]!r}")
        return float(headers.get("retry-after", 0))

    def compare(self, kind: str, number: int, text: str) -> None:
        self.counts[kind, 200] += 1
        if text != self.wanted[number]:
            self.faults.append(f"{kind}: request {number}: {text!r}, not {self.wanted[number]!r}")

    async def ask(self, number: int) -> tuple[int, bytes, dict]:
        data = self.body(number)
        return await self.answer(self.head(len(data)) + data)

    async def learn(self) -> None:
        """What each request gives on the quiet server."""
        for number in range(ASKED):
            status, body, _ = await self.ask(number)
            assert status == 200, body
            self.wanted[number] = json.loads(body)["choices"][0]["text"]

    async def whole(self):
        number = self.random.randrange(ASKED)
        status, body, headers = await self.ask(number)
        if status != 200:
            return self.judge("whole", status, body, headers)
        self.compare("whole", number, json.loads(body)["choices"][0]["text"])

    async def stream(self, kind="stream", pause=0.0):
        number = self.random.randrange(ASKED)
        data = self.body(number, stream=True)
        begun = time.monotonic()
        reader, writer = await self.send(self.head(len(data)) + data)
        try:
            parts, first = [], None
            while part := await reader.read(512 if pause else 65536):
                first = first or time.monotonic() - begun
                parts.append(part)
                if pause:
                    await asyncio.sleep(pause)
        finally:
            writer.close()
        status, body, headers = split(b"".join(parts))
        if status != 200:
            return self.judge(kind, status, body, headers)
        lines = [line for line in body.decode().split("\n") if line.startswith("data: ")]
        if lines[-1] != "data: [DONE]":
            self.faults.append(f"{kind}: ends with {lines[-1]}")
        if not pause:
            self.first.append(first)
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
        self.compare(kind, number, "".join(pieces))

    async def slow(self):
        return await self.stream("slow", 0.2)

    async def leaves(self, kind="leaves", **more):
        data = self.body(self.random.randrange(ASKED), ignore_eos=True, **more)
        reader, writer = await self.send(self.head(len(data)) + data)
        await asyncio.sleep(self.random.random() * 2)
        writer.transport.abort()
        self.counts[kind, "gone"] += 1

    async def leaves_stream(self):
        await self.leaves("leaves stream", stream=True)

    async def bad(self, kind: str, data: bytes):
        return self.judge(kind, *await self.answer(self.head(len(data)) + data))

    async def garbage(self):
        data = self.random.randbytes(40).replace(b"\n", b"") + b"\r\n\r\n"
        return self.judge("garbage", *await self.answer(data))

    async def no_json(self):
        return await self.bad(
            "no json", self.random.choice([b"{", b"[]", b"\xff", b"", b"[" * 999])
        )

    async def bad_field(self):
        wrong = self.random.choice([{"n": -1}, {"seed": "x"}, {"stop": [""]}, {"suffix": "x"}])
        return await self.bad("bad field", self.body(1, **wrong))

    async def too_large(self):
        return await self.bad("too large", b" " * (MAX_BODY + 1 + self.random.randrange(1 << 20)))

    async def too_long(self):
        return await self.bad("too long", self.body(1, prompt="x = 1\n" * 9000))

    # ------------------------------------------------------------ the server's own numbers

    async def metrics(self) -> dict[str, float]:
        head = f"GET /metrics HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {KEY}\r\n"
        status, body, _ = await self.answer(f"{head}Connection: close\r\n\r\n".encode())
        assert status == 200, body
        lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}


def split(data: bytes) -> tuple[int, bytes, dict]:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while body:
            size, _, body = body.partition(b"\r\n")
            n = int(size, 16)
            parts.append(body[:n])
            body = body[n + 2 :]
        body = b"".join(parts)
    return int(lines[0].split()[1]) if data else 0, body, headers


# ---------------------------------------------------------------- the whole of it


async def measure(load: Load, args) -> dict:
    await load.learn()
    begun = time.monotonic()
    until = begun + args.seconds
    clients = [asyncio.create_task(load.client(until)) for _ in range(args.clients)]
    memory = []
    while time.monotonic() < until:
        await asyncio.sleep(min(1.0, args.seconds / 30))
        numbers = await load.metrics()
        memory.append((time.monotonic() - begun, numbers["lumen_resident_bytes"]))
    await asyncio.gather(*clients)
    seconds = time.monotonic() - begun
    numbers = await at_rest(load)
    for _ in range(2):  # all slots at once, twice: none is lost
        found = await asyncio.gather(*(load.ask(n % ASKED) for n in range(args.slots)))
        if any(status != 200 for status, _, _ in found):
            load.faults.append(f"after the load: {found}")
    return report(load, args, seconds, memory, numbers)


async def at_rest(load: Load) -> dict[str, float]:
    """The server's numbers when nobody asks any more."""
    names = ("running", "waiting", "admitted")
    end = time.monotonic() + 30
    while True:
        numbers = await load.metrics()
        if not any(numbers[f"lumen_sequences_{name}"] for name in names):
            return numbers
        if time.monotonic() > end:
            load.faults.append(f"sequences are left: {numbers}")
            return numbers
        await asyncio.sleep(0.1)


def report(load: Load, args, seconds: float, memory: list, numbers: dict) -> dict:
    third = [rss for at, rss in memory if args.seconds / 3 <= at <= args.seconds / 2]
    last = [rss for at, rss in memory if at >= args.seconds * 5 / 6]
    growth = statistics.mean(last) / statistics.mean(third)
    if growth > GROWTH:
        load.faults.append(f"memory grew {growth:.2f} times from the second third to the end")
    kinds = {f"{kind}, {what}": n for (kind, what), n in sorted(load.counts.items(), key=str)}
    ended = {k: v for k, v in numbers.items() if k.startswith("lumen_sequences_total")}
    first = sorted(load.first)
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "slots": args.slots,
        "queue": args.queue,
        "requests": sum(load.counts.values()),
        "by_kind": kinds,
        "sequences": ended,
        "tokens_per_second": round(numbers['lumen_tokens_total{kind="new"}'] / seconds, 1),
        "first_piece_p50_p95": [round(first[int(len(first) * q)], 3) for q in (0.5, 0.95)],
        "rss_mb": [round(rss / 1e6, 1) for _, rss in memory[:: max(1, len(memory) // 10)]],
        "growth": round(growth, 3),
        "faults": load.faults[:20],
        "n_faults": len(load.faults),
    }


def start(args) -> tuple[subprocess.Popen, str, int]:
    argv = [sys.executable, "serve.py", args.run, "--port", "0", "--device", "cpu"]
    argv += ["--precision", "fp32", "--slots", str(args.slots), "--queue", str(args.queue)]
    argv += ["--timeout", "60", "--max_body", str(MAX_BODY), "--drain", "5"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"LUMEN_API_KEY": KEY}
    process = subprocess.Popen(argv, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"http://(.+):(\d+) ", line):
            return process, found[1], int(found[2])
    raise SystemExit(process.wait() or 1)


def main(argv: list[str]) -> int:
    p = Words(
        prog="bench_serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("run")
    for name, kind, default in (
        ("clients", int, 200), ("seconds", float, 300), ("slots", int, 8), ("queue", int, 64),
        ("seed", int, 1), ("out", str, None),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=kind, default=default)
    args = p.parse_args(argv)
    process, host, port = start(args)
    load = Load(host, port, args.seed)
    try:
        found = asyncio.run(measure(load, args))
    finally:
        process.terminate()
    found["exit_code"] = process.wait(30)
    found["said"] = process.stderr.read().splitlines()[-5:]
    found["machine"] = timing.machine_line()
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    return 1 if found["n_faults"] or found["exit_code"] else 0


if __name__ == "__main__":
    command(main)
