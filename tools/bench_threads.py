"""How the threads of a CPU should wait for one another: `python -m tools.bench threads`.

One process for each way, all alive at once and asked in turns for some steps of the quickstart's
model: first alone, then beside a process that computes without end. A way is what the environment
says when libgomp is loaded; it cannot be changed afterwards.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import torch
from lumen.waiting import NAMES

from lumen import machine as machines
from lumen.cli import find_yaml, load_yaml
from lumen.errors import UserError
from lumen.machine import human_number
from model import ModelConfig
from tools import bench_step, timing

SPINS = "GOMP_SPINCOUNT"
WAYS = {  # name: what it sets; the others of NAMES are unset
    "as Lumen sets it": {},
    "torch's own": {SPINS: "300000"},  # libgomp's default, where nobody says anything
    "100 spins": {SPINS: "100"},
    "1,000 spins": {SPINS: "1000"},
    "10,000 spins": {SPINS: "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    # with any such word lumen/heap.py leaves malloc as it is; this one changes nothing
    "pages given back": {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"},
}
BUSY = "while True: pass"


class Stepper:
    """A process that makes steps when it is told to."""

    def __init__(self, way: dict[str, str], size: str, threads: int):
        kept = {name: value for name, value in os.environ.items() if name not in NAMES}
        env = kept | {"OMP_NUM_THREADS": str(threads)} | way
        words = [sys.executable, "-m", "tools.bench", "threads", "--inside", size]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=env, **pipes)

    def read(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise UserError("E001", f"threads: a process ended, code {self.process.wait()}")
        return float(line)

    def seconds(self, steps: int) -> float:
        """Of so many steps."""
        print(steps, file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()  # it ends by itself
        self.process.wait()
        self.process.stdout.close()


def steps_when_told(size: str) -> int:
    """Inside such a process: a line of stdin says how many steps, one of stdout how many seconds
    they took."""
    step = quickstart_step(size)
    asked = iter(["3"])  # warm-up
    while (line := next(asked, None) or sys.stdin.readline()).strip():
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)
    return 0


def quickstart_step(size: str) -> bench_step.Ours:
    if size == "toy":
        return bench_step.Ours(ModelConfig(**bench_step.TOY), machines.detect("cpu"), 2)
    tree = load_yaml(find_yaml("quickstart"))[0]
    model = ModelConfig(**{"vocab_size": 2048} | tree["model"])
    return bench_step.Ours(model, machines.detect("cpu"), tree["batch_size"])


@contextlib.contextmanager
def busy(processes: int):
    """So many processes that compute without end."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def time_threads(words: list[str]) -> int:
    """Prints tokens/s of each way, alone and beside busy processes, and how it compares."""
    known = {"rounds": 5, "steps": 5, "busy": 1, "threads": torch.get_num_threads()}
    o = timing.options(words, **known, size="cpu", only="", inside="")
    if o.inside:
        return steps_when_told(o.inside)
    names = o.only.split(";") if o.only else list(WAYS)
    if unknown := [name for name in names if name not in WAYS]:
        raise UserError("E002", f"--only: no {', '.join(unknown)}; there are: {'; '.join(WAYS)}")
    print(timing.machine_line(machines.detect("cpu")))
    print(f"{o.threads} threads, {o.steps} steps a turn, time against {names[0]}")
    with contextlib.ExitStack() as stack:
        steppers = {}
        for name in names:
            steppers[name] = Stepper(WAYS[name], o.size, o.threads)
            stack.callback(steppers[name].close)
        for stepper in steppers.values():
            stepper.read()  # it is warm
        for beside in dict.fromkeys((0, o.busy)):
            with busy(beside):
                times = turns(steppers, o)
            print(f"beside {beside} busy processes", flush=True)
            for name in names:
                print(f"  {name:<17} {row(times[name], times[names[0]], o)}", flush=True)
    return 0


def turns(steppers: dict[str, Stepper], o) -> dict[str, list[float]]:
    times = {name: [] for name in steppers}
    for _ in range(o.rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.seconds(o.steps))
    return times


def row(mine: list[float], base: list[float], o) -> str:
    tokens = 2048 if o.size == "cpu" else 64
    speed = human_number(tokens * o.steps / sorted(mine)[len(mine) // 2])
    return f"{speed:>6} tokens/s; time {timing.ratio(mine, base)}"
