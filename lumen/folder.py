"""The folder of a dataset while it is made: one process writes to it, what is in it is ours, and
what it was made from is still the same."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import contextmanager, suppress

from lumen.errors import UserError
from lumen.manifest import check_sizes, read_dataset_json
from lumen.sources import Input, stored_input, what_changed

JOURNAL_FILES = re.compile(r"progress\.json|seen\.bin|pending_\d+\.npz|near_\w+\.npy|.*\.tmp")
DATASET_FILES = re.compile(
    rf"{JOURNAL_FILES.pattern}|(train|val)_\d{{5}}(\.docs|\.mask)?\.npy|token_bytes\.npy"
    r"|(report|tokenizer)\.json|DATA_CARD\.md|lengths\.png|keys\.npy"
)

# settings that are not there where nothing was asked for
LEFT_OUT = ("rules", "minhash", "decontaminate", "fields", "near", "after")


def remove(out: str, pattern: re.Pattern) -> None:
    for name in os.listdir(out):
        path = os.path.join(out, name)
        if pattern.fullmatch(name) and os.path.isdir(path):
            shutil.rmtree(path)  # a search for near-duplicates that was cut short
        elif pattern.fullmatch(name):
            os.remove(path)


@contextmanager
def holding(out: str, say=print):
    """Makes the folder; where there are locks, waits until no other process writes to it; removes
    it if it stays empty."""
    handle = lock_folder(out, say)
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(out)
        if handle is not None:
            os.close(handle)


def lock_folder(out: str, say) -> int | None:
    """An open descriptor that holds the lock; None where there are no locks (Windows, some file
    systems)."""
    said_at = None
    while True:
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise UserError("E119", f"{out}: {error.strerror}") from None
        handle = None
        try:
            import fcntl

            handle = os.open(out, os.O_RDONLY)
            # a finished folder is only read, by any number
            finished = os.path.exists(os.path.join(out, "manifest.json"))
            mode = fcntl.LOCK_SH if finished else fcntl.LOCK_EX
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == os.stat(out).st_ino:
                return handle
        except BlockingIOError:
            if said_at is None or time.monotonic() - said_at > 60:
                said_at = time.monotonic()
                say(f"another process is writing to {out}: waiting for it")
            time.sleep(0.3)
        except FileNotFoundError:  # the other one had nothing to leave there
            pass
        except (ImportError, OSError):
            return handle
        if handle is not None:
            os.close(handle)


def difference(key: str, before, now) -> str:
    """What of a setting is another; of a block, its keys that are."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                return difference(f"{key}.{name}", before.get(name), now.get(name))
    return f"{key} {before}, not {now}"


def look_into(
    out: str, settings: dict, inputs: list[Input] | None, rows_of=lambda kind: {}
) -> tuple[dict, dict]:
    """(manifest, {}) of a finished folder, ({}, progress) of an unfinished one, ({}, {}) of an
    empty one. rows_of(kind): the settings that data of that kind has beside.

    E117: it was made, or begun, by another command or from other text, or holds other things;
    E111: a shard is damaged."""
    manifest = read_dataset_json(os.path.join(out, "manifest.json"))
    progress = read_dataset_json(os.path.join(out, "progress.json"))
    if old := manifest or progress:
        before = old["settings"]
        settings = settings | rows_of(before.get("rows", {}).get("kind", "text"))
        for key in [*settings, *(name for name in LEFT_OUT if name in before)]:
            value = settings.get(key)
            if value != before.get(key) and (value is not None or key in LEFT_OUT):
                change = difference(key, before.get(key), value)
                raise UserError("E117", f"{out} was made with {change}")
        if inputs is not None and (change := changed_input(old["provenance"], inputs)):
            fix = "to make it anew, delete that folder, which prepare_data.py made"
            raise UserError("E117", f"{out} was made from other text: {change}; {fix}")
    else:
        others = []
        for name in sorted(os.listdir(out)):
            if name != "rejected.jsonl" and not name.endswith(".tmp"):
                others.append(name)
        if others:
            names = ", ".join(others[:3])
            raise UserError("E117", f"{out} holds files that are no dataset of ours: {names}")
    if not manifest:
        return {}, progress
    check_sizes(out, manifest)
    remove(out, JOURNAL_FILES)  # killed after the manifest
    return manifest, {}


def changed_input(provenance: dict, inputs: list[Input]) -> str:
    """The first input that is not what it was, or ""; size and time are looked at first, contents
    where those differ."""
    before = [stored_input(values) for values in provenance["inputs"]]
    if provenance.get("rules", 1) < 2:
        # then names that are no UTF-8 were kept with a ?, and AppleDouble files were tried
        before = [given for given in before if not os.path.basename(given.path).startswith("._")]
        names = [given.name.encode("utf-8", "replace").decode() for given in inputs]
        inputs = [given._replace(name=name) for given, name in zip(inputs, names)]
    old = {(given.source, given.name): given for given in before}
    new = {(given.source, given.name): given for given in inputs}
    for key in [*old, *new]:
        if key not in new:
            return f"{old[key].path} is gone"
        if key not in old:
            return f"{new[key].path} is new"
        was, now = old[key], new[key]
        if what_changed(was, now):
            return f"{now.path} has changed"
    return ""
