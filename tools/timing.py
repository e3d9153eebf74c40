"""What a measured number stands on: interleaved rounds, nothing compiled meanwhile, the machine.

Times are ratios of interleaved rounds in one run; a time made while something compiles is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import time
from pathlib import Path

import torch

from lumen import machine as machines
from lumen.errors import a_path
from lumen.feed import synchronize
from lumen.launch import Words
from lumen.machine import compiled_so_far, free_memory, git_commit, human_number


def options(words: list[str], **known) -> argparse.Namespace:
    """`--name value` of the default's type; False: a flag; None: the words without `--`, a list."""
    parser = Words(prog="tools.bench", add_help=False)
    for name, default in known.items():
        if default is None:
            parser.add_argument(name, nargs="*", type=a_path, default=[])
        elif default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_intermixed_args(words)


# ---------------------------------------------------------------- to take times


def seconds_of(run, device, name: str = "") -> float:
    """Of one run(); one in which something was compiled does not count and is done again, which is
    said of a run with a name."""
    for _ in range(8):
        synchronize(device)
        before = compiled_so_far()
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - began
        if compiled_so_far() == before:
            return seconds
        if name:
            print(f"  {name}: something was compiled meanwhile; timed again", flush=True)
    raise RuntimeError("something was compiled in each of 8 runs: there is no time to tell")


def interleaved(runs: dict, rounds: int, device, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run in each round; the runs take turns, so that a busy machine is slow for
    all of them."""
    times = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        for name, run in runs.items():
            seconds = seconds_of(run, device, name if i >= warm_up else "")
            if i >= warm_up:
                times[name].append(seconds)
    return times


class Company:
    """What other processes take of the cores while this one works; Linux only, else it says
    nothing.

    with Company() as company: ...; company.said() -> a line.
    """

    def __enter__(self) -> Company:
        self.began = time.perf_counter(), waited()
        return self

    def __exit__(self, *_) -> None:
        began, before = self.began
        self.share = (waited() - before) / (time.perf_counter() - began)

    def said(self) -> str:
        """How long a thread had to wait for a core, for each second of the clock."""
        text = f"its threads waited {self.share:.2f} s for a core in each second"
        return f"{text}: the machine was busy, so these are no speeds" if self.busy else text

    @property
    def busy(self) -> bool:
        return self.share > 0.1


def waited() -> float:
    """Seconds for which threads of this process were ready and had no core; 0 where the system does
    not say."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # that thread has ended
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


@contextlib.contextmanager
def time_limit(seconds: float):
    """TimeoutError after so many seconds (in the main thread, where signals are)."""

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_graphs() -> None:
    """Give back what compiled graphs and dead models hold."""
    torch.compiler.reset()
    free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


# ---------------------------------------------------------------- to tell them


def machine_line(m: machines.Machine | None = None) -> str:
    """Hardware, flags, measured peak, versions, commit, date: printed with every number."""
    m = m or machines.detect()
    peak = human_number(machines.matrix_peak(m.device, m.compute_dtype, 1.0), "FLOP/s")
    flags = " ".join(machines.cpu_flags())
    text = f"{m.device.type} {m.name} ({flags}), {torch.get_num_threads()} threads,"
    text += f" {m.precision} matrices {peak}, torch {torch.__version__}"
    return f"{text}, commit {git_commit()}, {time.strftime('%Y-%m-%d')}"


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"median {statistics.median(values):.4g} (n {len(values)}, {low:.4g} to {high:.4g})"


def ratio(a: list[float], b: list[float]) -> str:
    """How many times as long a takes as b: in each round, and best against best."""
    return f"{spread([x / y for x, y in zip(a, b)])}, best against best {min(a) / min(b):.3f}"


def mfu(rates: list[float], m: machines.Machine, peak: float) -> str:
    """FLOP/s as shares of `peak`. Above 100 % it was measured while the machine was busy: it is
    measured again, in this process, its dtype and its threads; where that does not help there is
    no MFU, and the reason."""
    if max(rates) > peak:
        peak = max(peak, machines.matrix_peak(m.device, m.compute_dtype, 1.0))
    if max(rates) > peak:
        rate = human_number(max(rates), "FLOP/s")
        text = f"{rate} is above the peak, {human_number(peak, 'FLOP/s')}"
        return f"- ({text}: was the machine busy?)"
    if len(rates) > 1:
        return spread([rate / peak for rate in rates])
    return f"{100 * rates[0] / peak:.1f} %"


def percent_of_peak(rate: float, m: machines.Machine) -> float | None:
    """FLOP/s against the data sheet's or what is measured; None above that: it is wrong."""
    percent = 100 * rate / machines.peak_flops(m)
    return percent if percent <= 100 else None


def said(error: BaseException) -> str:
    """An error of somebody's code on one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def markdown(titles: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
