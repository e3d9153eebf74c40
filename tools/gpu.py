"""Fifteen minutes on a GPU: one prepared list, in the order of what is worth most.

    python -m tools.gpu A          the first call, at most 5.5 minutes: is it right, is it fast
    python -m tools.gpu B          the second call, at most 5.5 minutes
    python -m tools.gpu C          what is left, where there is time
    python -m tools.gpu PART ...   some of the parts; `--out FOLDER`, by default $OUT or out/gpu
    python -m tools.gpu --toy A B C  the same logic at toy sizes on a CPU, in this process
    python -m tools.gpu report FOLDER [--write]   the tables of docs/gpu.md from what A and B left

Each part is a process of its own with a time limit: a fault in a kernel ends a CUDA context, not
the list. What a part finds is a JSON line in FOLDER/PART.jsonl as soon as it is known, and a short
line here; all else that it says is in FOLDER/log.txt. The exit code is 1 if anything failed. This
file starts the parts and reads what they leave, without torch; they stand in tools/gpu_parts.py,
some in files of their own: tools/gpu_finetune.py, gpu_evaluate.py, gpu_serve.py, gpu_fp8.py,
gpu_muon.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lumen.errors import UserError, nearest
from lumen.launch import Words, command

ROOT = Path(__file__).resolve().parent.parent
CALL_SECONDS = 330  # that a call takes at most, START among them
START = 10  # this process, and ending what must be ended
# seconds that each part may take; it gets besides what the parts before it have left over
CALLS = {
    "A": {
        "kernels": 70,
        "trainer": 70,
        "step": 65,
        "sync": 35,
        "big": 50,
        "attention": 15,
        "evaluate": 15,
    },
    "B": {
        "compile": 70,
        "finetune": 40,
        "fsdp": 30,
        "models": 70,
        "experts": 65,
        "generation": 20,
        "tests": 25,
    },
    "C": {"fp8": 120, "serve": 25, "muon": 40},
}
PARTS = {name: seconds for call in CALLS.values() for name, seconds in call.items()}
LOST = 3  # exit code of a part whose CUDA context is gone
STARTS = 6  # of a part at most: it goes on behind what has killed it
MARK = "## "  # before the name of what is tried, in log.txt
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- tools.gpu report: begin -->", "<!-- tools.gpu report: end -->"

# ---------------------------------------------------------------- what a part finds


def append(path: Path, row: dict) -> None:
    """One line, in one write: who is killed leaves no half of it."""
    with open(path, "ab", buffering=0) as f:
        f.write(json.dumps(row).encode() + b"\n")


def read_rows(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows) of the last run that a part's file holds; ({}, []) where there is none."""
    header, rows = {}, []
    if not os.path.exists(path):  # nor where its name is too long
        return header, rows
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "header" in row:
            header, rows = row, []
        else:
            rows.append(row)
    return header, rows


def said(error: BaseException) -> str:
    """An error on one line, with the place of ours that it came from."""
    text = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
    place, frame = "", error.__traceback__
    while frame is not None:
        file = Path(frame.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.name not in OF_THE_LIST:
            place = f" ({file.name}:{frame.tb_lineno})"
        frame = frame.tb_next
    return text + place


def number(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


OF_THE_LIST = ("gpu.py", "gpu_parts.py", "gpu_finetune.py", "gpu_evaluate.py", "gpu_serve.py")
OF_THE_LIST += ("gpu_fp8.py",)
FIELDS = ("part", "name", "value", "unit", "ok", "error", "seconds", "note", "detail")


def beside(row: dict) -> str:
    """What else a row says: its note, and its other numbers by name."""
    words = [row["note"]] if row.get("note") else []
    words += [f"{name} {number(value)}" for name, value in row.items() if name not in FIELDS]
    return ", ".join(words)


@dataclass
class Rows:
    """A part's file, and what is said of it on the console.

    after() is called behind every failure: what it raises means that nothing more can work here.
    """

    folder: Path
    part: str
    again: bool = False  # goes on behind what is there
    speak: object = print
    after: object = None
    there: dict[str, dict] = field(default_factory=dict)  # what has been tried, by name

    def __post_init__(self):
        self.path = self.folder / f"{self.part}.jsonl"
        self.began = time.perf_counter()
        if self.again:
            self.there = {row["name"]: row for row in read_rows(self.path)[1]}

    def header(self, machine: dict) -> None:
        """On which machine the rows that follow were found."""
        if not self.again:
            append(self.path, {"header": 1, "part": self.part, **machine})

    def attempt(self, name: str, run, *args, unit="", most=math.inf, detail=False) -> dict:
        """A row of what run(*args) returns: a number, a bool, a text, or a dict with `value` and
        more.

        It failed if it raises, is False, above `most` or no number. `detail`: a row that nobody
        needs to see unless it failed.
        """
        if name in self.there:
            return self.there[name]
        print(f"{MARK}{name}", flush=True)  # into the log
        began, found, error = time.perf_counter(), {"value": None}, ""
        try:
            found = run(*args)
        except Exception as e:  # the next line of the list may still come
            error = said(e)
        if not isinstance(found, dict):
            found = {"value": found}
        value = found["value"]
        good = not error and value is not False
        if isinstance(value, float):
            good = good and value <= most  # a NaN is not
        if not good and not error:
            error = f"{number(value)}, at most {most:g}" if most < math.inf else "it is not so"
        row = {"part": self.part, "name": name, "value": value, "unit": unit, "ok": good}
        row |= {"error": error, "seconds": round(time.perf_counter() - began, 2)}
        if detail:
            row["detail"] = True
        self.write(row | found)
        if error and self.after is not None:
            self.end_if_lost()
        return row

    def note(self, name: str, why: str) -> None:
        """What is not tried here, and why."""
        if name not in self.there:
            row = {"part": self.part, "name": name, "value": None, "unit": "", "ok": True}
            self.write(row | {"error": "", "seconds": 0.0, "note": why})

    def write(self, row: dict) -> None:
        value = row["value"]
        if isinstance(value, float) and not math.isfinite(value):
            row["value"] = str(value)  # JSON knows no NaN
        self.there[row["name"]] = row
        append(self.path, row)
        if not (row["ok"] and row.get("detail")):
            text = console_line(row)
            self.speak(f"[{time.perf_counter() - self.began:5.1f}] {text[:170]}")

    def end_if_lost(self) -> None:
        """After a fault in a kernel every call into CUDA fails: a fresh process goes on."""
        try:
            self.after()
        except Exception as error:
            print(f"the CUDA context is gone: {error}", flush=True)
            os._exit(LOST)  # what cleans up at an exit would call into CUDA too


def console_line(row: dict) -> str:
    if not row["ok"]:
        return f"FAILED {row['name']}: {row['error']}"
    value = "-" if row["value"] is None else f"{number(row['value'])} {row['unit']}".strip()
    more = beside(row)
    return f"{row['name']}: {value}" + (f" ({more})" if more else "")


# ---------------------------------------------------------------- a part as a process


def part_command(name: str, o, again: bool) -> list[str]:
    """The command line of a part."""
    words = [sys.executable, "-m", "tools.gpu", name, "--inside", "--out", str(o.out)]
    words += ["--commit", o.commit, "--command", o.command]
    return [*words, "--again"] if again else words


def run_process(words: list[str], limit: float, log: Path) -> int | None:
    """The exit code; None: it took longer, and was killed with all that it had started."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    with open(log, "ab") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=errors, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # Ctrl-C too
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """The process, its descendants (a session of their own does not save them), its group."""
    pids = [process.pid, *descendants(process.pid)] if process.poll() is None else []
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """By /proc; elsewhere than on Linux none are found."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def last_words(log: Path, start: int) -> tuple[str, str]:
    """(what was being tried, the last line) of a log from byte `start` on."""
    with open(log, "rb") as f:
        f.seek(start)
        lines = f.read().decode(errors="replace").splitlines()
    tried = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    words = [line for line in lines if line.strip() and not line.startswith(MARK)]
    words += [line for line in lines if line.startswith("error ")]  # a UserError, before its remedy
    return (tried or ["the start"])[-1], (words or [""])[-1].strip()[:200]


def run_part(name: str, words, limit: float, folder: Path) -> bool:
    """Runs a part to its end or its limit; whether all of it went well.

    words(again) -> its command line. Where a process of it dies, a line says in what, and another
    goes on behind that.
    """
    until = time.perf_counter() + limit
    path, log = folder / f"{name}.jsonl", folder / "log.txt"
    log.touch()
    before = path.stat().st_size if path.exists() else 0
    for n in range(STARTS):
        start, began = log.stat().st_size, time.perf_counter()
        code = run_process(words(n > 0), max(0.1, until - began), log)
        if code in (0, LOST):
            if code == 0:
                break
            continue
        tried, last = last_words(log, start)
        if code == 2:  # our own word for what cannot be here at all
            raise UserError("E003", f"{name}: {last.removeprefix('error E003: ')}")
        error = f"cut off at the part's limit, {limit:.0f} s"
        if code is not None:
            error = f"the process ended with {code}: {last}"
        row = {"part": name, "name": tried, "value": None, "unit": "", "ok": False, "error": error}
        append(path, row | {"seconds": round(time.perf_counter() - began, 2)})
        print(f"  {console_line(row)}", flush=True)
        if code is None or tried == "the start":
            break
    rows = read_rows(path)[1]
    found = len(rows) > 0 and path.stat().st_size > before
    return found and all(row["ok"] for row in rows)


def inside(name: str, o) -> None:
    """The part itself, in this process: the console is for its rows, the rest goes to the log."""
    console, log = sys.stdout, sys.stderr
    if not o.toy:  # C++ writes to file descriptors
        console = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    rows = Rows(o.out, name, o.again, lambda text: print(text, file=console, flush=True))
    with contextlib.ExitStack() as stack:
        if o.toy:
            log = stack.enter_context(open(o.out / "log.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        from tools import gpu_parts  # here: the list itself starts without torch

        with gpu_parts.Here(rows, o.toy) as here:
            rows.header(here.about() | about_call(o))
            part_of(name)(here)


def part_of(name: str):
    """The function of a part."""
    from tools import gpu_evaluate, gpu_finetune, gpu_fp8, gpu_muon, gpu_parts, gpu_serve

    places = {"finetune": gpu_finetune, "evaluate": gpu_evaluate}
    places |= {"serve": gpu_serve, "fp8": gpu_fp8, "muon": gpu_muon}
    return getattr(places.get(name, gpu_parts), f"{name}_part")


def about_call(o) -> dict:
    """What of a part's header torch need not say."""
    words = {"command": o.command, "date": time.strftime("%Y-%m-%d"), "driver": "none"}
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        words["driver"] = next(iter(re.findall(r"\d+\.\d+[.\d]*", text)), "?")
    if o.commit:
        words["commit"] = o.commit
    return words


def run_list(names: list[str], o) -> int:
    """The parts in turn; a part gets its own seconds and what those before it have left."""
    failed, spare = [], 0.0
    for name in names:
        limit, began = PARTS[name] + spare, time.perf_counter()
        print(f"== {name} (at most {limit:.0f} s)", flush=True)
        if o.toy:
            inside(name, o)
            good = all(row["ok"] for row in read_rows(o.out / f"{name}.jsonl")[1])
        else:
            good = run_part(name, lambda again, n=name: part_command(n, o, again), limit, o.out)
        took = time.perf_counter() - began
        spare = max(0.0, limit - took)
        print(f"== {name}: {'done' if good else 'FAILED'}, {took:.0f} s", flush=True)
        if not good:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}; python -m tools.gpu report {o.out}", flush=True)
    return 1 if failed else 0


# ---------------------------------------------------------------- docs/gpu.md


def about(header: dict) -> str:
    """On what a part ran."""
    words = [header.get("card", "?"), f"driver {header.get('driver', '?')}"]
    words += [f"{name} {header.get(name, '?')}" for name in ("torch", "triton", "commit")]
    words.append(header.get("date", "?"))
    if header.get("toy"):
        words.insert(0, "TOY SIZES, no numbers")
    return f"`{header.get('command', '?')}` on {', '.join(words)}"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict]) -> list[str]:
    """Markdown; of the details only those that failed."""
    lines = ["| what | number | beside it |", "|---|---|---|"]
    for row in rows:
        if row["ok"] and row.get("detail"):
            continue
        if not row["ok"]:
            cells = [row["name"], "**failed**", row["error"]]
        elif row["value"] is None:
            cells = [row["name"], "not tried", beside(row)]
        else:
            cells = [row["name"], f"{number(row['value'])} {row['unit']}".strip(), beside(row)]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return lines


def report_lines(folder: Path) -> list[str]:
    """The tables of what a folder holds, part by part. E108 where it holds nothing."""
    lines, last = [], ""
    for name in PARTS:
        header, rows = read_rows(folder / f"{name}.jsonl")
        if not rows:
            continue
        bad = sum(not row["ok"] for row in rows)
        lines += ["", f"### {name}" + (f": {bad} of {len(rows)} failed" if bad else ""), ""]
        if about(header) != last:
            last = about(header)
            lines += [f"{last}.", ""]
        lines += table(rows)
    if not lines:
        raise UserError("E108", f"report: {folder} holds no PART.jsonl of tools.gpu")
    missing = [name for name in PARTS if not read_rows(folder / f"{name}.jsonl")[1]]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return lines[1:]


def report(words: list[str]) -> int:
    """Prints the tables, or with --write puts them between the marks of docs/gpu.md."""
    parser = Words(prog="tools.gpu report", add_help=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args(words)
    lines = report_lines(o.folder)
    if not o.write:
        print("\n".join(lines))
        return 0
    if any(read_rows(o.folder / f"{name}.jsonl")[0].get("toy") for name in PARTS):
        raise UserError("E002", f"report --write: {o.folder} has toy sizes on a CPU, no numbers")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    text = "\n".join([head + BEGIN, *lines, END])
    PAGE.write_text(text + tail, encoding="utf-8")
    print(f"{PAGE}: {len(lines)} lines written; look at them before they are committed")
    return 0


# ---------------------------------------------------------------- the command


def options(words: list[str]):
    """E002 for what is no call and no part. `parts` are names of parts, each once."""
    parser = Words(prog="tools.gpu", add_help=False)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/gpu")))
    parser.add_argument("--commit", default="")  # for a checkout without .git
    parser.add_argument("--command", default="")
    for flag in ("toy", "inside", "again"):
        parser.add_argument(f"--{flag}", action="store_true")
    o = parser.parse_intermixed_args(words)
    names = []
    for word in o.parts:
        if word not in CALLS and word not in PARTS:
            near = nearest(word, [*CALLS, *PARTS])
            hint = f"did you mean {near}?" if near else f"there are: {', '.join([*CALLS, *PARTS])}"
            raise UserError("E002", f"command line: tools.gpu: no part {word!r}; {hint}")
        names += CALLS.get(word, [word])
    o.parts = list(dict.fromkeys(names))
    if not o.parts:
        text = f"which part? {', '.join(CALLS)} or some of {', '.join(PARTS)}"
        raise UserError("E002", f"command line: tools.gpu: {text}; or report FOLDER")
    return o


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv and argv[0] == "report":
        return report(argv[1:])
    o = options(argv)
    o.command = o.command or " ".join(["python -m tools.gpu", *argv])
    try:
        o.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("E108", f"--out {o.out}: {error.strerror}") from error
    o.out = o.out.resolve()
    if o.inside:
        inside(o.parts[0], o)
        return 0
    return run_list(o.parts, o)


if __name__ == "__main__":
    command(main)
