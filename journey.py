"""From text to a chat in one command: the stages of a YAML, each of them a command of Lumen's.

    python journey.py configs/journey_cpu.yaml       again after a kill, it goes on where it was
    python journey.py CONFIG --dry_run               what would run, the time and the disk it takes
    python journey.py CONFIG --from STAGE            that stage anew, and all that depends on it

A stage is `run: SCRIPT WORDS` and the keys of that script; $NAME in it is the folder of a stage,
OUT/NAME, and which stage needs which follows from these names. A stage is done once its command has
ended well. One whose words, files or inputs have changed runs anew; what it had left stays as
NAME.replaced. Nothing is repeated here of what a stage does: each is a process, and one that is
killed goes on by its own means.

What a stage is, and how its process is started and ended, says lumen/stages.py; what is told of a
journey, and its report.md, lumen/journal.py.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lumen.early  # noqa: F401 - before torch

from lumen import files, journal, understood
from lumen.cli import find_journey
from lumen.errors import UserError, a_path, nearest
from lumen.launch import Words, clock, command, print_now
from lumen.owner import Owner
from lumen.stages import Stage, arguments, fill_sums, follow, left_out, read, set_aside, state

QUIET = 30  # seconds between two lines of a stage, where there is no terminal

# ---------------------------------------------------------------- a journey


class Journey:
    """What stands in `out`: journal.json, a row for each stage that was begun; NAME/ and NAME.log
    of each; report.md."""

    def __init__(self, path: Path, out: str | None = None):
        self.path = path
        self.tree, self.stages = read(path, out)
        self.out = self.tree["out"]
        fill_sums(self.stages, self.out)
        self.rows = files.read_json(self.out / "journal.json", "E108", must_exist=False)
        self.terminal = sys.stdout.isatty()

    def forget(self, name: str) -> None:
        """That stage, and all that depends on it, will run anew. E002."""
        names = [s.name for s in self.stages]
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
            raise UserError("E002", f"--from {name}: no such stage; {hint}")
        anew = {name}
        for s in self.stages:
            if anew & {s.name, *s.needs}:
                anew.add(s.name)
                self.rows.pop(s.name, None)

    # ---- what it will take

    def seconds(self, s: Stage) -> float:
        """That a stage takes: as it took here, or as the YAML says, which is of another machine,
        scaled by the stages whose time is known here. 0: unknown."""
        known = {other.name: self.rows.get(other.name, {}) for other in self.stages}
        if known[s.name].get("done"):
            return known[s.name]["seconds"]
        both = [(row["seconds"], t.minutes * 60) for t in self.stages if t.minutes
                for row in [known[t.name]] if row.get("done")]  # fmt: skip
        took, said = (sum(column) for column in zip(*both)) if both else (1.0, 1.0)
        return s.minutes * 60 * took / said

    def left(self, after: Stage) -> float:
        later = self.stages[self.stages.index(after) + 1 :]
        return sum(self.seconds(s) for s in later if self.state(s) != "done")

    def state(self, s: Stage) -> str:
        return state(s, self.rows.get(s.name, {}))

    # ---- running

    def go(self) -> int:
        """Every stage that is not done, in order; the exit code of the first that fails."""
        for s in self.stages:
            what, title = self.state(s), self.title(s)
            if what == "done":
                print_now(f"{title} done, in {clock(self.rows[s.name]['seconds'])}")
                continue
            if why := left_out(s):
                print_now(f"{title} left out: {why}")
                continue
            if code := self.run(s, what, title):
                return code
        journal.write(self)
        print_now(f"report     {self.out / 'report.md'}")
        for line in self.tree["next"]:
            print_now(f"next       python {line}")
        return self.talk()

    def title(self, s: Stage) -> str:
        width = max(len(other.name) for other in self.stages)
        return f"[{self.stages.index(s) + 1}/{len(self.stages)}] {s.name:{width}}"

    def run(self, s: Stage, what: str, title: str) -> int:
        if what.startswith("changed"):
            print_now(f"{title} {what}: it runs anew, and what depends on it")
        if what != "begun":
            set_aside(s, print_now)
        elif not s.in_place:
            shutil.rmtree(s.folder, ignore_errors=True)
        row = {"key": s.key, "sums": s.sums, "done": False, "seconds": 0.0}
        if what == "begun":
            row = self.rows[s.name] | {"done": False}
        self.note(s, row)
        if not s.in_place:
            s.folder.mkdir(parents=True, exist_ok=True)
        on = "goes on: " if what == "begun" and s.in_place else ""
        print_now(f"{title} {on}{shlex.join(s.words)}")
        log, before, began = self.out / f"{s.name}.log", row["seconds"], time.monotonic()
        self.noted = self.told = 0.0
        try:
            with open(log, "a" if what == "begun" and s.in_place else "w", encoding="utf-8") as f:
                code = follow(s.words, f, lambda seconds: self.show(s, title, log, seconds, row))
        finally:
            self.clear()
            row["seconds"] = before + time.monotonic() - began
            self.note(s, row)
        ended = files.read_json(s.folder / "status.json").get("state", "finished")
        if code == 0 and ended != "finished":  # somebody stopped it alone
            raise KeyboardInterrupt
        if code:
            print_now("".join(f"    {line}" for line in journal.tail(log, 12)).rstrip())
            print_now(f"{title} failed with exit code {code}; all it said: {log}")
            return code if code > 0 else 128 - code  # ended by a signal
        size = sum(p.stat().st_size for p in s.folder.rglob("*") if p.is_file())
        self.note(s, row | {"done": True, "bytes": size})
        left = f", about {clock(self.left(s))} left" if self.left(s) else ""
        print_now(f"{title} {clock(row['seconds'])}{left}{journal.said(s.folder)}")
        return 0

    def note(self, s: Stage, row: dict) -> None:
        self.rows[s.name] = row
        files.write_json(self.out / "journal.json", self.rows)

    def show(self, s: Stage, title: str, log: Path, seconds: float, row: dict) -> None:
        """The time, and the last line that the stage has said: all the while on a terminal, each
        half a minute elsewhere. The time is noted now and then, for a kill -9 leaves no time to."""
        if seconds - self.noted > 5:
            self.noted = seconds
            files.write_json(
                self.out / "journal.json",
                self.rows | {s.name: row | {"seconds": row["seconds"] + seconds}},
            )
        if not self.terminal and seconds - self.told < QUIET:
            return
        self.told = seconds
        takes = self.seconds(s)
        text = f"{title} {clock(seconds)}" + (f" of {clock(takes)}" if takes else "")
        if left := self.left(s) + max(0.0, takes - seconds):
            text += f", {clock(left)} left"
        text += f" | {''.join(journal.tail(log, 1)).strip()}"
        if not self.terminal:
            print_now(text)
            return
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    def talk(self) -> int:
        """The chat at the end, where somebody sits at a terminal."""
        words = self.tree["chat"]
        if not words or not (self.terminal and sys.stdin.isatty()):
            return 0
        return subprocess.run(arguments(shlex.split(words))).returncode


# ---------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    words = Words(prog="journey.py", description="From text to a chat, by the stages of a YAML.")
    words.add_argument("config", type=a_path, help="a YAML file, or the name of one in configs/")
    words.add_argument("--dry_run", action="store_true", help="time and disk of each stage")
    words.add_argument("--from", dest="start", metavar="STAGE", help="anew from that stage on")
    words.add_argument("--out", type=a_path, help="where all of it goes, instead of the YAML's out")
    words.add_argument("--no_chat", action="store_true", help="no chat at the end")
    args = words.parse_args(argv)
    journey = Journey(find_journey(args.config), args.out)
    if args.start:
        journey.forget(args.start)
    understood.check(journey.path, [s for s in journey.stages if journey.state(s) != "done"])
    if args.dry_run:
        journal.plan(journey)
        return 0
    if args.no_chat:
        journey.tree["chat"] = ""
    owner = Owner(journey.out)
    owner.take(print_now)
    owner.accept()
    try:
        return journey.go()
    except KeyboardInterrupt:
        print_now(f"stopped    the same command goes on: python journey.py {args.config}")
        return 130
    except OSError as error:
        raise UserError("E119", f"{journey.out}: {error}") from error
    finally:
        owner.release()


if __name__ == "__main__":
    command(main)
