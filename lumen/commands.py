"""control.jsonl: one command a line, {"method": NAME, "args": [...] or {...}}."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lumen.errors import UserError

# what a line of control.jsonl may name
METHODS = (
    "add_expert",
    "prune_expert",
    "_initialize_new_expert",
    "adjust_capacity_factor",
    "adjust_routing_temperature",
    "enable_expert_dropout",
    "get_expert_statistics",
    "adjust_mod_capacity",
    "get_mod_statistics",
    "adjust_batch_size",
    "_recreate_dataloader",
    "get_current_metrics",
    "_extract_moe_routing_stats",
    "_calculate_throughput",
    "emergency_lr_reduction",
    "rollback_steps",
    "adjust_weight_decay",
    "_update_optimizer_param_groups",
    "restore_expert",
    "recycle_expert",
    "save",
    "stop",
)

# what LuminaAI calls an argument of a method -> what it is here
ARGUMENTS = {
    "adjust_routing_temperature": {"temperature": "temp"},
    "enable_expert_dropout": {"dropout_prob": "prob"},
    "adjust_capacity_factor": {"capacity_factor": "factor"},
    "adjust_mod_capacity": {"capacity_factor": "factor"},
    "adjust_batch_size": {"new_batch_size": "new_size"},
    "emergency_lr_reduction": {"reduction_factor": "factor"},
    "adjust_weight_decay": {"weight_decay": "value"},
}


def our_arguments(method: str, named: dict) -> dict:
    """Arguments under our names. TypeError where one is given under both."""
    theirs = ARGUMENTS.get(method, {})
    for name in theirs:
        if name in named and theirs[name] in named:
            raise TypeError(f"{method}: {name} is {theirs[name]}, which is given too")
    return {theirs.get(name, name): value for name, value in named.items()}


def either_name(method):
    """A method whose arguments may also have the names of ARGUMENTS."""

    @functools.wraps(method)
    def call(self, *args, **named):
        return method(self, *args, **our_arguments(method.__name__, named))

    return call


@dataclass
class Commands:
    """To be done: lines of control.jsonl."""

    lines: list[str]
    end: int  # up to which the file has been read then, bytes


class CommandFile:
    """Reads what is new in control.jsonl. `parallel`: rank 0 reads for all."""

    def __init__(self, path: Path, parallel):
        self.path, self.parallel = path, parallel
        self.done = 0  # bytes of it that have been carried out
        self.taken = 0  # bytes of it that have been read
        self.sized = 0  # its size when it was read

    def changed(self) -> bool:
        """On rank 0; False elsewhere."""
        if self.parallel.rank:
            return False
        try:
            return os.stat(self.path).st_size != self.sized
        except OSError:
            return False

    def take(self) -> Commands:
        """The new lines, read by rank 0, on all ranks."""
        found = ([], self.taken, 0)
        if self.parallel.rank == 0:
            with contextlib.suppress(OSError), open(self.path, "rb") as f:
                found = self.read_lines(f)
        lines, self.taken, self.sized = self.parallel.broadcast(found)
        return Commands(lines, self.taken)

    def read_lines(self, f) -> tuple[list[str], int, int]:
        """(whole lines, where they end, the file's size)"""
        size = f.seek(0, os.SEEK_END)
        start = 0 if size < self.taken else self.taken  # it was written anew
        f.seek(start)
        data = f.read()
        whole = data[: data.rfind(b"\n") + 1]  # half a line is still being written
        with contextlib.suppress(ValueError):  # unless it is all of a line but its end
            if isinstance(json.loads(data[len(whole) :]), dict):
                whole = data
        lines = whole.decode("utf-8-sig", "replace").split("\n")
        lines = [line for line in lines if line.strip(" \r\t\0")]
        return lines, start + len(whole), size

    def resume(self, done: int, anew: bool) -> None:
        """Read on after `done` bytes; `anew`: after all that is there, meant for another run."""
        if anew:
            done = os.stat(self.path).st_size if self.path.exists() else 0
        self.done = self.taken = done
        self.sized = -1


def parse_command(line: str) -> dict:
    """{"method": ..., "args": ...} of a line; E309 where it is something else."""
    if "\0" in line:  # PowerShell's echo
        raise UserError("E309", f"control.jsonl is UTF-16 here; write UTF-8: {line[:200]!r}")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError("E309", f"not valid JSON ({error}): {line[:200]}") from error
    if not isinstance(row, dict) or set(row) - {"method", "args"} or "method" not in row:
        text = f"{{'method': NAME, 'args': [...]}} is expected, not {line[:200]}"
        raise UserError("E309", text)
    return row
