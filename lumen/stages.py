"""The stages of a journey: what they are, what has become of them, how their processes run.

journey.py has the order of things.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lumen import files
from lumen.cli import load_yaml
from lumen.config import BLOCKS
from lumen.errors import UserError, nearest

HERE = Path(__file__).resolve().parent.parent
KEYS = ("out", "stages", "chat", "next", "plan")
OURS = ("run", "package", "minutes", "mb")  # of a stage; all else is its command's
# where the command writes; such a stage, when killed, goes on in its folder
OUT_OPTION = dict.fromkeys(("train.py", "train_fsdp.py", "finetune.py"), "out_dir")
OUT_OPTION |= dict.fromkeys(("prepare_data.py", "evaluate.py"), "out")
PLANNED = ("train.py", "train_fsdp.py", "finetune.py")  # their --dry_run says more

# ---------------------------------------------------------------- what a stage is


@dataclass
class Stage:
    """words: its command, with the folders of stages in the place of $NAME; needs: those stages;
    named: all texts in which a file may be named; in_place: a killed one goes on, otherwise its
    folder is made anew."""

    name: str
    script: str
    words: list[str]
    named: list[str]
    needs: list[str]
    folder: Path
    in_place: bool
    package: str  # without which it is left out
    minutes: float  # and MB on disk that were seen where the YAML was written; 0: not known
    mb: float
    sums: dict = field(default_factory=dict)  # what it is made of; see `fill_sums`

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.sums, sort_keys=True).encode()).hexdigest()


class Folders(string.Template):
    """$NAME; $$ is a dollar."""

    idpattern = r"[a-z][a-z0-9_]*"
    flags = 0


class Filler:
    """Puts folders in the place of $NAME. folders: of the stages so far; `seen` gathers the names,
    `texts` what they have become."""

    def __init__(self, folders: dict, where: str):
        self.folders, self.where = folders, where
        self.seen, self.texts = set(), []

    def fill(self, value):
        """The value, with all texts in it filled, at any depth. E002."""
        if isinstance(value, list):
            return [self.fill(x) for x in value]
        if isinstance(value, dict):
            return {k: self.fill(x) for k, x in value.items()}
        if not isinstance(value, str):
            return value
        try:
            text = Folders(value).substitute(self.folders)
        except KeyError as error:
            name = error.args[0]
            hint = nearest(name, self.folders) or f"so far: {', '.join(self.folders)}"
            raise UserError(
                "E002", f"{self.where}: ${name} is no stage before it; {hint}"
            ) from None
        except ValueError:
            raise UserError("E002", f"{self.where}: {value}: a dollar is written $$") from None
        self.seen |= {found[1] for found in re.finditer(r"\$\{?([a-z][a-z0-9_]*)", value)}
        self.texts.append(text)
        return text


def read(path: Path, out: str | None = None) -> tuple[dict, list[Stage]]:
    """The YAML of a journey, and where it goes instead: (all of it, its stages). E002 with what is
    wrong."""
    tree, _ = load_yaml(path)
    if tree and "stages" not in tree:
        text = f"{path} has no stages, so it is no journey; python train.py {path} may be meant"
        raise UserError("E002", text)
    for key in tree:
        if key not in KEYS:
            raise UserError("E002", f"{path}: {key} is none of {', '.join(KEYS)}")
    for key, kind in {"chat": str, "next": list, "plan": dict}.items():
        if not isinstance(tree.get(key) or kind(), kind):
            raise UserError("E002", f"{path}: {key}: {tree[key]!r} is no {kind.__name__}")
    asked = tree.get("stages")
    if not isinstance(asked, dict) or not asked:
        raise UserError("E002", f"{path}: stages: names of stages and what they run are expected")
    out = Path(out or str(tree.get("out") or f"out/{path.stem}"))
    folders, stages = {}, []
    for name, spec in asked.items():
        where = f"{path}: stage {name}"
        if not re.fullmatch(Folders.idpattern, str(name)):
            raise UserError("E002", f"{where}: a name is made of a-z, 0-9 and _")
        if not isinstance(spec, dict) or not isinstance(spec.get("run"), str):
            raise UserError("E002", f"{where}: there is no run: SCRIPT WORDS")
        folders[name] = out / name
        stages.append(stage(name, spec, Filler(folders, where)))
    rest = Filler(folders, str(path))
    tree |= {"out": out, "chat": rest.fill(tree.get("chat") or "")}
    return tree | {"next": rest.fill(tree.get("next") or [])}, stages


def stage(name: str, spec: dict, filler: Filler) -> Stage:
    """E002."""
    try:
        words = [filler.fill(word) for word in shlex.split(spec["run"])]
    except ValueError as error:
        raise UserError("E002", f"{filler.where}: run: {spec['run']}: {error}") from error
    if words and re.fullmatch(r"python3?", words[0]):
        words.pop(0)  # as a shell has it
    script = next((word for word in words if word.endswith(".py")), "")
    if not script or not (HERE / script).exists() and not Path(script).exists():
        raise UserError("E002", f"{filler.where}: run: {spec['run']}: names no script that is here")
    in_place = script in OUT_OPTION and name not in filler.seen
    for key, value in spec.items():
        if key not in OURS:
            words += option(key, filler.fill(value), script in PLANNED, filler.where)
    folder = filler.folders[name]
    if in_place and f"--{OUT_OPTION[script]}" not in words:
        words += [f"--{OUT_OPTION[script]}", str(folder)]
    numbers = [spec.get(key) or 0 for key in ("minutes", "mb")]
    if not all(isinstance(x, (int, float)) for x in numbers):
        raise UserError("E002", f"{filler.where}: minutes and mb are numbers")
    needs, more = sorted(filler.seen - {name}), (spec.get("package") or "", *numbers)
    return Stage(name, script, words, filler.texts, needs, folder, in_place, *more)


def option(key: str, value, takes_all: bool, where: str) -> list[str]:
    """A key of a stage as words of its command. takes_all: any value is a word, as train.py has it;
    other commands have switches, and nothing for null. E002."""
    if takes_all and key in BLOCKS and isinstance(value, dict):  # its other keys stay
        return [word for k, v in value.items() for word in option(f"{key}.{k}", v, True, where)]
    if takes_all:
        return [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    if isinstance(value, (list, dict)):
        raise UserError("E002", f"{where}: {key}: this command takes no list: write it into run:")
    if value is None or value is False:
        return []
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]


# ---------------------------------------------------------------- what has become of it


def fill_sums(stages: list[Stage], out: Path) -> None:
    """What each stage is made of: its command, the files that it names, the stages it needs."""
    for s in stages:
        s.sums = {"its command": s.words}
        for text in s.named:
            for part in {text, *re.split("[,:=]", text)} - {"", s.script}:
                with contextlib.suppress(OSError):  # a prompt is too long for a name
                    path = Path(part)
                    inside = out in (path, *path.parents)
                    around = path.resolve() in out.resolve().parents  # `.`, or a prompt of "/"
                    if path.exists() and not inside and not around:
                        s.sums[part] = content(path)
        s.sums |= {f"stage {other.name}": other.key for other in stages if other.name in s.needs}


def content(path: Path) -> str:
    """Of a small file its sum; of a large one, and of a folder's files, name, size and time."""
    if path.is_file() and path.stat().st_size < 1 << 26:
        return files.sha256(path)
    every = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    rows = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in every]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def state(s: Stage, row: dict) -> str:
    """done, new, begun; or what has changed since."""
    if not row:
        return "new"
    if row["key"] != s.key:
        was, now = row["sums"], s.sums
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return f"changed: {', '.join(names)}"
    return "done" if row["done"] and s.folder.exists() else "begun"


def left_out(s: Stage) -> str:
    """Why the stage cannot run here; "": it can."""
    if s.package and importlib.util.find_spec(s.package) is None:
        return f"it needs pip install {s.package}"
    return ""


def set_aside(s: Stage, say) -> None:
    """What an earlier form of the stage left; one that was set aside before goes."""
    if s.folder.exists() and any(s.folder.iterdir()):
        old = s.folder.with_name(f"{s.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        s.folder.rename(old)
        say(f"           {old} is what was there")


# ---------------------------------------------------------------- a stage's process


def arguments(words: list[str]) -> list[str]:
    """SCRIPT WORDS, or torchrun WORDS SCRIPT WORDS, as this Python starts them."""
    rest = [str(HERE / w) if w.endswith(".py") and (HERE / w).exists() else w for w in words]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *rest[1:]]
    return [sys.executable, *rest]


# before there are threads: a child between fork and exec may not look for it
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_us() -> None:
    """In the child: it is told to end when we are killed. PR_SET_PDEATHSIG, Linux only."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)


def follow(words: list[str], log, show) -> int:
    """The exit code of the command, whose words go to the file `log`; show(seconds) is called
    twice a second.

    KeyboardInterrupt where a signal came: the command got it too and has ended in its own order.
    """
    options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    if os.name == "posix":
        options |= {"preexec_fn": end_with_us, "start_new_session": True}
    caught, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, _: caught.append(number))
    began, sent = time.monotonic(), 0
    child = subprocess.Popen(arguments(words), **options)
    while child.poll() is None:
        for number in caught[sent:]:  # a second Ctrl-C is the command's to judge
            child.send_signal(number)
            sent += 1
        show(time.monotonic() - began)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
    return child.returncode
