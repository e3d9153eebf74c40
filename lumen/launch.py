"""How a program is started and ends: what the launcher's environment says, the words of a command
line, the console, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

from lumen import early
from lumen.errors import UserError, nearest

# ---------------------------------------------------------------- what the environment says


def restarts() -> int:
    """How often torchrun or Slurm has started this launch again."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return max(int(os.environ.get(name, 0) or 0) for name in names)


def launch_id() -> str:
    """What all starts of one launch have in common; "" where that cannot be known."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {job}"
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":  # nobody gave one: torchrun's process stands for it
        return f"torchrun {socket.gethostname()} {parent()}"
    return f"torchrun {name}" if name else ""


def check_tasks() -> None:
    """E600 where srun or mpirun started several of us without torchrun: each would be a run of its
    own, all in one out_dir."""
    if "RANK" in os.environ:
        return

    def number(name: str) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdigit() else 0

    # SLURM_NTASKS alone says nothing: a batch script has it too, and runs once
    step = number("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else 0
    counts = {"srun": max(number("SLURM_STEP_NUM_TASKS"), step, number("SLURM_PROCID") + 1)}
    counts["mpirun"] = max(number("OMPI_COMM_WORLD_SIZE"), number("PMI_SIZE"))
    for by, n in counts.items():
        if n > 1:
            text = f"{by} started {n} processes, and without torchrun each would be a whole run"
            fix = f"sbatch slurm/train.sbatch, or {by} with one task a node that is torchrun"
            raise UserError("E600", f"{text} in the same out_dir: {fix}")


def environment(name: str, default: int) -> int:
    """A whole number that a launcher leaves in the environment, RANK for example. E600 names what
    is none."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        text = f"{name}={value!r} in the environment is not a number; unset {name}, or use torchrun"
        raise UserError("E600", text)
    return int(value)


NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
NUMBERS += ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def check_launch() -> None:
    """E600 where what a launcher leaves in the environment cannot be: half of it is there, or a
    rank too many."""
    for name in NUMBERS:
        environment(name, 0)
    rank, world = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if rank >= world:
        text = f"RANK={rank} and WORLD_SIZE={world} in the environment: the last rank is"
        text += f" {world - 1}; unset both for one process, or use torchrun"
        raise UserError("E600", text)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        text = f"WORLD_SIZE={world} in the environment without {', '.join(missing)}"
        fix = "unset WORLD_SIZE for one process, or start all of them with torchrun"
        raise UserError("E600", f"{text}: {fix}")


def process(pid: int) -> str:
    """When the process of this number began, for the number alone may come again; "": none of it
    is alive."""
    with contextlib.suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    return ""


def parent() -> str:
    return f"{os.getppid()}-{process(os.getppid())}"


# ---------------------------------------------------------------- words of a command line


class Understood(Exception):
    """The words are right, and no more was asked; see Words.only_parse."""


class Words(argparse.ArgumentParser):
    """The command line of a command. - and _ in an option's name are the same, nothing is
    abbreviated, and a mistake is E002 with the nearest option instead of a page of usage."""

    only_parse = False  # lumen/understood.py: parse_args() ends in Understood, before any work

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
            words.append(name + equals + value)
        return super().parse_known_args(words, namespace)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        if Words.only_parse:
            raise Understood
        return found

    def action(self, name: str) -> argparse.Action | None:
        """What stands behind an option, "--limit"."""
        return self._option_string_actions.get(name)

    def names(self) -> list[str]:
        """Of all options, "--limit"."""
        return list(self._option_string_actions)  # private, and as old as argparse

    def error(self, message: str):
        wrong = []
        if "unrecognized" in message:
            wrong = [word for word in message.split() if word.startswith("--")]
        known = self.names()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                if message.endswith(f"required: {action.dest}"):
                    raise UserError("E002", which_command(self.prog, action))
                for parser in action.choices.values():
                    known += parser._option_string_actions
        near = [nearest(word.partition("=")[0], known) for word in wrong]
        hints = ", ".join(dict.fromkeys(name for name in near if name))
        text = f"{message}; did you mean {hints}?" if hints else message
        raise UserError("E002", f"command line: {self.prog}: {text}")


def which_command(prog: str, action: argparse._SubParsersAction) -> str:
    """Its commands, each with what it does, for who has named none."""
    lines = [f"which command? python {prog} COMMAND --help, of"]
    lines += [f"  {choice.dest:14}{choice.help}" for choice in action._choices_actions]
    return "\n".join(lines)


# ---------------------------------------------------------------- console and exit codes


class Console:
    """stdout or stderr of a program whose work is not what it says: a pipe that was closed, a
    terminal that went, a full disk take the words and nothing else."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def print_now(text: str) -> None:
    print(text, flush=True)


def speak(text: str, write=print_now) -> None:
    """One line to the console, as far as it takes it; whoever speaks goes on."""
    with contextlib.suppress(OSError, ValueError):
        try:
            write(text)
        except UnicodeError:
            write(text.encode("ascii", "backslashreplace").decode())


def open_console(lasting: bool) -> None:
    """A letter that the console does not have is written as \\x.., never an error."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed by who started us: else the next file opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Console(stream) if lasting else stream)


def command(main, lasting: bool = False) -> None:
    """Run `main(argv) -> exit code or None` as a program.

    Under torchrun rank 0 speaks, and first; another rank only where rank 0 has nothing to say.
    `lasting`: its work goes on whatever becomes of the console.
    """
    open_console(lasting)
    rank = 0
    try:
        early.listen()
        rank = environment("RANK", 0)
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        code = error.exit_code
        tell(error, rank)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` closed our output
        if lasting:  # not ours, for that raises nothing: a service, another process
            raise
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, a closed pipe: Python would try again and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "RANK" in os.environ:
        # gloo's threads can abort the process in its own exit handlers, when all work is done
        os._exit(code)
    sys.exit(code)


def tell(error: UserError, rank: int) -> None:
    """On stderr, once for all ranks where that can be."""
    if rank == 0 or error.code == "E601":  # rank 0 may be what was lost
        print(f"error {error}", file=sys.stderr)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would let it sleep on
    # torchrun ends all ranks of a host as soon as one has failed: rank 0 must have said why by
    # then, and where there is no rank 0 one of them is enough
    local = os.environ.get("LOCAL_RANK", "")
    time.sleep(5 + (int(local) if local.isdigit() else 0))
    print(f"rank {rank}: error {error}", file=sys.stderr)  # nobody has ended us: only we know


def fitted(text: str) -> str:
    """A table of keys, its long lines wrapped to the width of a terminal, if it is one."""
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return text
    width, lines = max(40, shutil.get_terminal_size().columns), []
    for line in text.splitlines():
        indent = min(37, width // 2) if line.startswith("  ") else 0
        how = {"subsequent_indent": "".ljust(indent), "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, **how) or [""]
    return "\n".join(lines)


def in_bytes(n: float) -> str:
    """ "12 bytes", "3.4 kB", "10.1 MB"."""
    if n < 1e3:
        return f"{n:.0f} bytes"
    return f"{n / 1e3:.1f} kB" if n < 1e6 else f"{n / 1e6:,.1f} MB"


def clock(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
