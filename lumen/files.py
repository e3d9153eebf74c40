"""Files that are believed only when they are whole: atomic JSON, hashes, lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from pathlib import Path

from lumen.launch import speak

CANNOT = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
UNSYNCED: set[str] = set()  # what was said once


def sync(path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss. OSError where they are lost already; that a file
    system cannot do it (some FUSE, CIFS) or does not allow it is noted once, for it matters only if the power fails."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        what = "folders" if os.path.isdir(path) else "files"
        if what not in UNSYNCED and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            text = f"note       {what} cannot be synced here ({path}: {error.strerror}): what was saved just before"
            speak(
                f"{text} a power loss may be gone",
                lambda text: print(text, file=sys.stderr, flush=True),
            )
        UNSYNCED.add(what)


def write_json(path, data) -> None:
    """Replace a JSON file atomically: readers see the old or the new one, never a part."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, sort_keys=True)
    sync(tmp)
    os.replace(tmp, path)
    sync(tmp.parent)


def sha256(path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read(path) -> dict:
    """What stands in an owner.json; {} where there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        row = json.loads(Path(path).read_text())
        return row if isinstance(row, dict) else {}
    return {}


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none where there is none."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8")
        return [
            json.loads(line) for line in text[: text.rfind("\n")].splitlines()
        ]  # the last may be half written
    return []
