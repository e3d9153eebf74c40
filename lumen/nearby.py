"""What lies where a run or a file was expected, and which are near it: the end of a message."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lumen.errors import nearest

SHOWN = 5  # runs at most
RUN = ("config.yaml", "step_*")
MODEL = (*RUN, "config.json", "EXPORT.json")  # Hugging Face and quantised folders too
OTHERS = {  # what a folder that is no run holds: what it is
    "manifest.json": "it holds data, made by prepare_data.py",
    "journal.json": "it is a journey's folder",
    "results.json": "it holds results of evaluate.py",
}


def holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def folders_in(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Its folders that hold one of these, the newest first."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and holds(path, patterns):
                found[str(path)] = path.stat().st_mtime
    return sorted(found, key=found.get, reverse=True)


def hint(path) -> str:
    """ "; did you mean out/quickstart?", or what the folder is and which runs are in it; "" where
    nothing is known."""
    path = Path(path)
    with suppress(OSError):  # where we may not look there is nothing to name
        return inside(path) if path.is_dir() else near(path)
    return ""


def file(path) -> str:
    """ "; did you mean chats.jsonl?", of a file or folder that is not there; "" where none in its
    folder is near."""
    path = Path(path)
    with suppress(OSError):
        if name := nearest(path.name, sorted(p.name for p in path.parent.iterdir())):
            return f"; did you mean {path.parent / name}?"
    return ""


def inside(folder: Path) -> str:
    parts = [what for name, what in OTHERS.items() if (folder / name).is_file()][:1]
    if not parts and holds(folder, RUN[:1]):
        parts = ["it is a run that has saved nothing yet"]
    if runs := folders_in(folder, RUN):
        parts.append(f"runs in it: {listed(runs)}")
    return "".join(f"; {part}" for part in parts)


def near(path: Path) -> str:
    """Of a path that is no folder."""
    if path.is_file() and holds(path.parent, RUN):
        return f"; did you mean {path.parent}?"
    places = [path.parent, Path("out")] if len(path.parts) == 1 else [path.parent]
    for place in places:
        # the shortest first: quickstar is the beginning of quickstart-sft too
        found = sorted(folders_in(place, MODEL), key=len)
        names = {Path(name).name: name for name in found}
        if name := nearest(path.name, names):
            return f"; did you mean {names[name]}?"
    runs = [name for place in places for name in folders_in(place, RUN)]
    return f"; runs there: {listed(runs)}" if runs else ""


def listed(runs: list[str]) -> str:
    more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    return ", ".join(runs[:SHOWN]) + more
