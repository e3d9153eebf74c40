"""Where text comes from: a source (file, folder, glob, stdlib, packages, synthetic:N, hf:NAME) is a
list of inputs, an input is read as items, an item is split into rows.

    read_spec(yaml, ...)   ->  SourceSpec(paths, name, weight, field, shape)
    find_inputs("texts/")  ->  Input(kind "jsonl", path, size, ...), ...
    settle_shapes(inputs)  ->  the same with the field and the shape of their rows
    read_items(Reading)    ->  Item(kind "jsonl", offset, line, bytes), ...   readers.READERS
    item_rows(item)        ->  Row(offset, line, None, text), or Row(offset, line, "E101", Reject)

The parent process makes items, cheaply; a worker makes rows of them. Both are pure functions of
the text. What flows is in lumen/inputs.py, readers in lumen/readers.py, rows in lumen/rows.py.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from lumen import nearby
from lumen.columns import hf_input, is_saved, split_name
from lumen.errors import UserError, expand
from lumen.files import sha256
from lumen.inputs import (
    CODECS,
    ENDINGS,
    SHAPES,
    STDLIB_PASSED_OVER,
    Input,
    Item,
    Reading,
    Reject,
    Row,
    kind_of,
    stored_input,
)
from lumen.readers import document_key, read_items
from lumen.rows import TEXT_FIELDS, item_rows, row_shape, text_field, unpacked
from lumen.values import as_number, short

# the public names of reading, whichever file holds them
__all__ = ["ENDINGS", "Input", "Item", "Reading", "Reject", "Row", "SourceSpec", "detect"]
__all__ += ["document_key", "file_sha256", "find_inputs", "is_prepared", "item_rows", "kind_of"]
__all__ += ["label", "read_items", "read_spec", "settle_shapes", "stored_input", "what_changed"]

PACKAGES_PASSED_OVER = STDLIB_PASSED_OVER - {"lib2to3", "encodings"} | {
    "testing",
    "benchmarks",
    "vendor",
    "vendored",
    "_vendor",
    "_vendored",
    "third_party",
    "extern",
    "externals",
}
PACKAGES_ENDINGS = (".py", ".md", ".txt", ".rst")
# of a folder that save_to_disk of `datasets` made
DATASETS_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
DOCSTRINGS_SIZE = 700_000  # bytes, about
ROWS_LOOKED_AT = 20  # of each source, to see what its rows are
FILES_LOOKED_AT = 4
PLAIN_KINDS = ("text", "synthetic", "topics")  # nothing but text
TABLE_KINDS = ("csv", "parquet", "arrow", "hf")  # what has columns

# ---------------------------------------------------------------- what a user asks for


class SourceSpec(NamedTuple):
    """One source as a user describes it: a word, or a mapping of a YAML file."""

    paths: tuple[str, ...]  # files, folders, globs, stdlib, packages, synthetic:N, hf:NAME
    name: str = ""  # default: label(spec)
    weight: float = 1.0
    field: str = ""  # the column or field of the text, or of the messages; "": detected
    shape: str = ""  # "text" | "chat" | "pairs"; "": detected. `kind` in YAML


SPEC_KEYS = ("path", "paths", "name", "weight", "field", "kind")


def read_spec(value, where: str, name: str = "") -> SourceSpec:
    """A source as YAML has it: a word, or a mapping with SPEC_KEYS. E002 begins with `where`."""
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise UserError("E002", f"{where}: {short(value)} is no path and no mapping")
    for key in value:
        if key not in SPEC_KEYS:
            known = ", ".join(SPEC_KEYS)
            raise UserError("E002", f"{where}.{key}: there is no such key; there are {known}")
    if ("path" in value) == ("paths" in value):
        raise UserError("E002", f"{where}: one of path and paths is needed")
    paths = [value["path"]] if "path" in value else value["paths"]
    if not isinstance(paths, list) or not paths:
        raise UserError("E002", f"{where}.paths: {short(paths)} is not a list of paths")
    for path in paths:
        a_word(path, f"{where}.path")
    weight = as_number(value.get("weight", 1), float)
    if weight is None or isinstance(value.get("weight"), bool) or weight <= 0:
        weight = short(value["weight"])
        raise UserError("E002", f"{where}.weight: {weight} is not a number above 0")
    shape = a_word(value.get("kind", "auto"), f"{where}.kind")
    if shape not in ("auto", *SHAPES):
        raise UserError("E002", f"{where}.kind: {shape} is not auto, {', '.join(SHAPES)}")
    field = a_word(value.get("field", "auto"), f"{where}.field")
    field = "" if field == "auto" else field
    if field and shape == "pairs":
        raise UserError("E002", f"{where}.field: pairs are found by chosen and rejected")
    paths = tuple(expand(path, where) for path in paths)
    spec = SourceSpec(paths, "", weight, field, shape.replace("auto", ""))
    name = a_word(value.get("name", name or label(spec)), f"{where}.name")
    return spec._replace(name=name)


def a_word(value, where: str) -> str:
    if isinstance(value, str) and value:
        return value
    raise UserError("E002", f"{where}: {short(value)} is not a word")


def is_builtin(spec: str) -> bool:
    named = re.fullmatch(r"stdlib|packages|docstrings(:pairs)?|synthetic(:\d{1,9})?", spec)
    return bool(named) and not os.path.exists(spec)


def is_glob(spec: str) -> bool:
    return glob.has_magic(spec) and not os.path.exists(spec)


def fixed_part(pattern: str) -> str:
    """The folder of a glob, all that stands before its first * ? or [."""
    folder = os.path.dirname(pattern[: re.search(r"[*?\[]", pattern).start()] + "x")
    return folder or os.curdir


def label(spec: str | SourceSpec) -> str:
    """A source's name in the fingerprinted part of the manifest: that which it was given, or the
    last part of its path."""
    if isinstance(spec, SourceSpec):
        return spec.name or ", ".join(label(path) for path in spec.paths)
    if is_builtin(spec):
        return spec
    if spec.startswith("hf:"):
        name = split_name(spec)[0]
        return spec.replace(name, label(name)) if os.path.isdir(name) else spec
    if is_glob(spec):
        folder = fixed_part(spec)
        return f"{label(folder)}/{relative(spec, folder)}"
    return os.path.basename(os.path.abspath(spec))


def is_prepared(folder: str) -> bool:
    """Whether a folder holds prepared data, finished or not."""
    for name in ("manifest.json", "progress.json"):
        with suppress(OSError, ValueError), open(os.path.join(folder, name), "rb") as file:
            head = file.read(1 << 20)
            if b'"npy-tokens"' in head or b'"shard_tokens"' in head:
                return True
    return False


# ---------------------------------------------------------------- sources to inputs


def find_inputs(
    spec: str | SourceSpec, source: int, split: str, out: str = "", unread: dict | None = None
) -> list[Input]:
    """The inputs of one source, in a fixed order, whatever the file system says; what lies there
    and is none goes into `unread`: {why: [how many, the first]}. The folder `out` is none, nor is
    any other prepared data.

    UserError E108: not there, nothing readable in it, a folder that may not be entered, no network;
    E002, E003 of hf:."""
    unread = {} if unread is None else unread
    if not isinstance(spec, SourceSpec):
        return [given._replace(shape="") for given in find_path(spec, source, split, out, unread)]
    inputs = []
    for n, path in enumerate(spec.paths):
        for given in find_path(path, source, split, out, unread):
            if len(spec.paths) > 1:  # two of them may have the same last part
                given = given._replace(name=f"{label(spec)}/{n}/{given.name}")
            inputs.append(given._replace(field=spec.field, shape=spec.shape))
    return inputs


def find_path(spec: str, source: int, split: str, out: str, unread: dict) -> list[Input]:
    if is_builtin(spec):
        return builtin_inputs(spec, source, split)
    if spec.startswith("hf:"):
        return [hf_input(spec, label(spec), source, split)]
    if is_glob(spec):
        folder = fixed_part(spec)
        paths = matching(spec, folder, out, unread)
    elif not os.path.exists(spec):
        text = f"source {spec}: there is no such file or folder{nearby.file(spec)}"
        if re.fullmatch(r"[\w-]+(/[\w-]+)?", spec):
            text += f"; a dataset of the hub is hf:{spec}"
        raise UserError("E108", text)
    elif os.path.isdir(spec):
        folder = spec
        paths = walk(spec, out, unread)
    else:
        kind = kind_of(spec)
        if not kind:
            text = f"source {spec}: only {all_endings()} can be read; unpack or convert it first"
            raise UserError("E108", text)
        return [Input(source, split, kind, label(spec), spec).measured()]
    inputs = []
    for path in in_fixed_order(paths):
        name = f"{label(folder)}/{relative(path, folder)}"
        inputs.append(Input(source, split, kind_of(path), name, path).measured())
    if not inputs:
        prepared = is_prepared(folder)
        why = "it is data that was prepared already" if prepared else f"no {all_endings()} files"
        raise UserError("E108", f"source {spec}: {why}")
    return inputs


def all_endings() -> str:
    return f"{' '.join(ENDINGS)} (texts also {' '.join(CODECS)})"


def builtin_inputs(spec: str, source: int, split: str) -> list[Input]:
    if spec == "stdlib":
        return stdlib_inputs(source, split)
    if spec == "packages":
        return packages_inputs(source, split)
    if spec.startswith("docstrings"):
        return docstrings_inputs(spec, source, split)
    documents = int(spec.partition(":")[2] or 2000)
    size = 600 * documents  # about
    return [Input(source, split, "synthetic", spec, spec, size, documents=documents)]


def stdlib_inputs(source: int, split: str) -> list[Input]:
    """The running Python's own library: its .py files, and a table of English prose in one of
    them."""
    root = sysconfig.get_path("stdlib")
    inputs = []
    for path in in_fixed_order(walk(root, "", {}, STDLIB_PASSED_OVER)):
        name = f"stdlib/{relative(path, root)}"
        kind = "topics" if name.endswith("pydoc_data/topics.py") else "text"
        given = Input(source, split, kind, name, path).measured()
        if path.endswith(".py") and given.size and "_sysconfigdata" not in name:
            inputs.append(given)
    return inputs


def docstrings_inputs(spec: str, source: int, split: str) -> list[Input]:
    """Conversations about the library, or pairs; they are split by module, not by hash."""
    inputs = []
    for part in ("val", "train"):
        wanted = part if split == "hash" else split
        given = Input(source, wanted, "docstrings", f"{spec}/{part}", spec, size=DOCSTRINGS_SIZE)
        inputs.append(given._replace(revision=platform.python_version()))
    return inputs


def packages_inputs(source: int, split: str) -> list[Input]:
    """What the installed packages say themselves: their code and prose, without tests, without what
    they carry of others, and without tables of numbers. E108: there are none."""
    roots = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    inputs = []
    for root in roots:
        if not os.path.isdir(root):
            continue
        for path in in_fixed_order(walk(root, "", {}, PACKAGES_PASSED_OVER, prose_or_code)):
            given = Input(source, split, "text", f"packages/{relative(path, root)}", path)
            given = given.measured()
            if given.size and not is_table_of_numbers(given):
                inputs.append(given)
    if not inputs:
        raise UserError("E108", f"source packages: there are none in {', '.join(roots)}")
    return inputs


def prose_or_code(path: str) -> bool:
    parts = path.replace(os.sep, "/")
    return path.endswith(PACKAGES_ENDINGS) and "-info/" not in parts


def is_table_of_numbers(given: Input) -> bool:
    """Whether a large file is one in its middle: more than a fifth are digits; code has 3 %."""
    if given.size < 32_000:
        return False
    with suppress(OSError), open(given.path, "rb") as file:
        file.seek(given.size // 2)
        middle = file.read(16_000)
        digits = sum(middle.count(b"%d" % digit) for digit in range(10))
        return digits > len(middle) / 5
    return False


def in_fixed_order(paths) -> list[str]:
    return sorted(paths, key=lambda path: path.replace(os.sep, "/"))


def relative(path: str, root: str) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def matching(pattern: str, root: str, out: str, unread: dict) -> Iterator[str]:
    """The paths of the text files that a glob names, but hidden ones and prepared data; ** stands
    for folders in folders."""
    out = os.path.realpath(out) if out else ""
    seen = set()  # ** also goes through links to folders
    closed = {}  # folder -> whether it, or one above it, holds prepared data
    for path in in_fixed_order(glob.iglob(pattern, recursive=True)):
        where = os.path.dirname(path)
        if where not in closed:
            closed[where] = is_closed(where, root, out)
        real = os.path.realpath(path)
        if os.path.isdir(path) or closed[where] or real in seen:
            continue
        seen.add(real)
        why = why_not_read(path, out)
        if why is None:
            yield path
        elif why:
            unread.setdefault(why, [0, relative(path, root)])[0] += 1


def is_closed(folder: str, root: str, out: str) -> bool:
    while True:
        if os.path.realpath(folder) == out or is_prepared(folder):
            return True
        if len(folder) <= len(root) or not os.path.dirname(folder):
            return False
        folder = os.path.dirname(folder)


def walk(
    root: str, out: str, unread: dict, passed_over=(), wanted: Callable | None = None
) -> Iterator[str]:
    """The paths of the text files in a folder, or of those that are `wanted`; why others are not
    read, and which, goes into `unread`."""

    def refuse(error: OSError):
        text = f"source {root}: {error.filename} cannot be entered: {error.strerror}"
        raise UserError("E108", text)

    def note(why: str, path: str) -> None:
        unread.setdefault(why, [0, os.path.relpath(path, root)])[0] += 1

    out = os.path.realpath(out) if out else ""
    for folder, folders, names in os.walk(root, onerror=refuse):
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name in passed_over:
                continue
            why = why_not_entered(path, out)
            if why:
                note(why, path)
            else:
                kept.append(name)
        folders[:] = kept  # os.walk goes on with these
        if folder == root and is_prepared(root):
            continue
        for name in sorted(names):
            path = os.path.join(folder, name)
            why = why_not_read(path, out)
            if wanted:
                why = None if wanted(path) else ""
            if why is None:
                yield path
            elif why:
                note(why, path)


def why_not_entered(folder: str, out: str) -> str:
    if os.path.basename(folder).startswith("."):
        return "hidden folders"
    if os.path.realpath(folder) == out or is_prepared(folder):
        return "folders of prepared data"
    return "links to folders" if os.path.islink(folder) else ""


def why_not_read(path: str, out: str) -> str | None:
    """None for a text file; "" for what is ours and not worth a word."""
    name = os.path.basename(path)
    if name.startswith("._"):  # what a Mac stores beside a file on a foreign disk
        return "AppleDouble files"
    # of a training run with a prepare: key
    if name.endswith(".error.json") and os.path.realpath(path) == f"{out}.error.json":
        return ""
    if name in DATASETS_FILES and is_saved(os.path.dirname(path)):
        return "files that `datasets` keeps about its tables"
    if kind_of(path):
        return None
    if os.path.isfile(path):
        return f"ending {os.path.splitext(name)[1].lower() or 'none'}"
    return "pipes, sockets and dead links"


# ---------------------------------------------------------------- what rows a source has


def settle_shapes(inputs: list[Input]) -> tuple[list[Input], str, list[str]]:
    """The inputs of all sources with `field` and `shape` filled in; the one shape of all of them;
    a line to print for each source. To be called once, when a preparation begins: the inputs in
    its progress.json have both. Plain texts beside conversations, such as a README.md, are left
    out.

    E120: sources of different shapes; E102: a table without a column of text."""
    found = {}  # source -> (shape, field)
    lines = []
    for source in sorted({given.source for given in inputs if given.source >= 0}):
        own = [given for given in inputs if given.source == source]
        shape, field, line = detect(own)
        found[source] = (shape, field)
        lines.append(line)
    shapes = {}
    for source, (shape, _) in found.items():
        first = next(given for given in inputs if given.source == source)
        shapes.setdefault(shape, first.path)
    if len(shapes) > 1:
        said = ", ".join(f"{path} holds {shape}" for shape, path in shapes.items())
        raise UserError("E120", said)
    settled = []
    for given in inputs:
        shape, field = found.get(given.source, ("text", ""))
        if given.source < 0 or shape == "text" or given.kind not in PLAIN_KINDS:
            settled.append(given._replace(shape=shape, field=field))
    return settled, next(iter(shapes), "text"), lines


def detect(inputs: list[Input]) -> tuple[str, str, str]:
    """(shape, field, line to print) of one source, from its first rows, and those of some of its
    other files.

    E120: files of different shapes; E102: a table without a column of text."""
    asked = inputs[0]
    name = asked.name.partition("/")[0] if len(inputs) > 1 else asked.name
    rows = [given for given in inputs if given.kind not in PLAIN_KINDS]
    if not rows:
        if asked.shape in ("chat", "pairs"):
            raise UserError("E120", f"{asked.path} is plain text; kind {asked.shape} is asked for")
        return "text", "", f"{name}: text"
    step = max(1, len(rows) // FILES_LOOKED_AT)
    votes = {}  # shape -> the first file of it
    fields = Counter()
    for given in rows[::step][:FILES_LOOKED_AT]:
        shape, field = majority(given)
        fields.update(field)
        if shape:
            votes.setdefault(shape, given.path)
    if len(votes) > 1 and not asked.shape:
        said = ", ".join(f"{path} holds {shape}" for shape, path in votes.items())
        raise UserError("E120", f"{said}; kind: in a YAML of sources says which to take")
    shape = asked.shape or next(iter(votes), "text")
    field = asked.field
    if shape == "text" and not field and fields:
        field = fields.most_common(1)[0][0]
    return shape, field, f"{name}: {what_is_read(shape, field)}"


def what_is_read(shape: str, field: str) -> str:
    if shape == "pairs":
        return "pairs of replies (chosen, rejected)"
    if shape == "chat":
        return f'conversations in "{field}"' if field else "conversations"
    return f'text in "{field}"' if field else "text"


def majority(given: Input) -> tuple[str, dict]:
    """(the shape of most of a file's first rows, or "" where there are none; {the field of text:
    rows}). E102: a table without a column of text."""
    shapes = Counter()
    fields = Counter()
    names = []
    for row in first_rows(given):
        if isinstance(row, str):  # a new format whose documents are files
            return "text", fields
        if given.field:
            value = unpacked(row.get(given.field))
            shape = {str: "text", list: "chat"}.get(type(value))
        else:
            shape = row_shape(row)
        if shape == "text":
            fields[given.field or text_field(row)] += 1
        if shape:
            shapes[shape] += 1
        names = list(row)
    if shapes:
        return shapes.most_common(1)[0][0], fields
    if names and given.kind in TABLE_KINDS and not given.shape:
        columns = ", ".join(map(str, names))[:300]
        wanted = given.field or f"of text ({', '.join(TEXT_FIELDS)}) or messages"
        said = f"{given.path}: no column {wanted}; the columns are {columns}"
        raise UserError("E102", f"{said}; field: in a YAML of sources names it")
    return "", fields


def first_rows(given: Input) -> list[dict]:
    """The first good rows as they are."""
    rows = []
    reading = Reading(0, given._replace(shape="any", field=""), block=1 << 16)
    for item in read_items(reading):
        for row in item_rows(item):
            if row.code is None:
                rows.append(row.value)
            if len(rows) >= ROWS_LOOKED_AT:
                return rows
    return rows


# ---------------------------------------------------------------- is it what it was?


def file_sha256(path: str) -> str:
    """Empty for what is no file or cannot be read: reading it will tell."""
    if os.path.isfile(path):  # opening a pipe would wait for ever
        with suppress(OSError):
            return sha256(path)
    return ""


def what_changed(was: Input, now: Input) -> bool:
    """Whether an input has other contents than it had; they are read only where size or time
    differ. Of an hf: source without a revision nobody can tell: no."""
    if was.kind in ("hf", "docstrings"):
        return bool(was.revision and now.revision) and was.revision != now.revision
    if (was.size, was.mtime, was.documents) == (now.size, now.mtime, now.documents):
        return False
    return was.kind == "synthetic" or was.sha256 != file_sha256(now.path)
