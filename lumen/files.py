"""Files that are believed only when they are whole: atomic replacement, JSON, hashes, lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

from lumen.errors import UserError
from lumen.launch import speak

# what os.fsync raises where a file system cannot do it (some FUSE, CIFS) or does not allow it
CANNOT_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
UNSYNCED: set[str] = set()  # "files", "folders": the note about each is said once


def sync(path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss. OSError where they are lost
    already; that a file system cannot sync is noted once, for it matters only if the power
    fails."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        what = "folders" if os.path.isdir(path) else "files"
        if what not in UNSYNCED and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            speak(
                f"note       {what} cannot be synced here ({path}: {error.strerror}): "
                "what was saved just before a power loss may be gone",
                lambda text: print(text, file=sys.stderr, flush=True),
            )
        UNSYNCED.add(what)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write that appears whole or not at all: readers see the old or the new one,
    never a part. OSError when the disk does not take it."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as file:
            yield file
        sync(tmp)
        os.replace(tmp, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        raise
    sync(Path(path).parent)


def write_json(path, data) -> None:
    """Replace a JSON file atomically. OSError."""
    with replacing(path) as file:
        file.write(json.dumps(data, indent=1, sort_keys=True).encode())


def read_json(path, code: str = "", must_exist: bool = True) -> dict:
    """The object in a JSON file. Without a `code`, {} where there is none or it cannot be read;
    with one, UserError of that code, but {} for a file that need not exist."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        absent = isinstance(error, FileNotFoundError) and not must_exist
        if code and not absent:
            raise UserError(code, f"{path} cannot be read: {error}") from error
        return {}
    if isinstance(data, dict):
        return data
    if code:
        raise UserError(code, f"{path} cannot be read: it holds no JSON object")
    return {}


def finite(x):
    """With null for what JSON has no word for: NaN, infinity."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none where there is none. Half a last line is passed over."""
    with contextlib.suppress(OSError):
        text = Path(path).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.split("\n")[:-1]]
    return []


def drop_half_line(path) -> None:
    """Truncate a .jsonl file behind its last line end: what a full disk or a kill left is cut off.
    OSError."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 20)))  # a line is shorter than that
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def sha256(path, core_share: float = 1.0, stopped=lambda: False) -> str:
    """sha256 of a file's bytes, in hex. With a `core_share` below 1 it takes that much of one core;
    once `stopped()` it gives up and returns "". OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            began = time.perf_counter()
            digest.update(block)
            if stopped():
                return ""
            if core_share < 1:
                time.sleep((time.perf_counter() - began) * (1 / core_share - 1))
    return digest.hexdigest()
