"""Evaluation files on disk: which file of a folder is the split that is asked, its rows, and what
is wrong with one: UserError E127 with file, line, field, value, remedy."""

from __future__ import annotations

import hashlib
import re
import reprlib
from pathlib import Path
from typing import NamedTuple

from lumen.errors import UserError
from lumen.files import sha256
from lumen.inputs import Input, Reading, kind_of
from lumen.readers import read_items
from lumen.rows import csv_records, item_rows
from lumen.vocabulary import mend_surrogates

# What people call the splits, in their files' names or their folders'.
TRAIN = ("train",)
VALIDATION = ("validation", "valid", "val", "dev", "development")
TEST = ("test",)
DEV = ("dev",)  # MMLU has five examples a subject there, and a validation split beside
SPLIT_WORDS = {*TRAIN, *VALIDATION, *TEST}
# Where a split lies there in several forms: the first of these.
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".raw", ".tokens", ".txt")
TABLES = ENDINGS[:5]
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 60

# ---------------------------------------------------------------- rows


class Record(NamedTuple):
    """A row as it was read. What is asked of it and is not there raises E127."""

    path: Path
    line: int  # from 1; of a table the row
    row: dict

    def bad(self, field: str, why: str) -> UserError:
        value = "missing"
        if field in self.row:
            value = SHOWN.repr(self.row[field])
        return UserError("E127", f"{self.path}, line {self.line}: {field} is {value}; {why}")

    def text(self, field: str) -> str:
        value = written(self.row.get(field))
        if not isinstance(value, str):
            raise self.bad(field, f"it should be text; the fields are {', '.join(self.row)}")
        return value

    def texts(self, field: str) -> list[str]:
        """At least two texts: the choices."""
        values = self.row.get(field)
        if isinstance(values, list):
            values = [written(one) for one in values]
        fits = isinstance(values, list) and all(isinstance(one, str) for one in values)
        if not fits or len(values) < 2:
            raise self.bad(field, "it should be a list of at least two texts")
        if not all(values):
            raise self.bad(field, "none of the choices may be empty")
        return values

    def index(self, field: str, known: dict | list) -> int:
        """The number of the right answer: what `known` says of the field's value, which may be
        written as text or as a number."""
        if isinstance(known, list):
            known = {name: i for i, name in enumerate(known)}
        value = str(self.row.get(field, "")).strip()
        if value not in known:
            hidden = ""
            if value in ("", "-1", "?"):
                hidden = "; are these the questions of a test split whose answers are kept secret?"
                hidden += " Take the validation split"
            raise self.bad(field, f"it should be one of {', '.join(known)}{hidden}")
        return known[value]


def written(value):
    """A number as the text that any template would make of it."""
    return str(value) if type(value) in (int, float) else value


def records(paths: list[Path], header: tuple[str, ...] = ()) -> list[Record]:
    """The rows of a split's files. `header`: the columns of a .csv that has no line of names.

    UserError E127: a row that is none, no rows; E003: no pyarrow."""
    found = []
    for path in paths:
        if header and path.suffix == ".csv":
            found += csv_without_names(path, header)
        else:
            found += table(path)
    if not found:
        raise UserError("E127", f"{', '.join(map(str, paths))}: there are no rows in it")
    return found


def table(path: Path) -> list[Record]:
    found = []
    kind = kind_of(str(path))
    if kind in ("", "text"):
        known = " ".join(TABLES)
        raise UserError("E127", f"{path}: rows with fields are read from {known}, not from this")
    given = Input(0, "", kind, path.name, str(path), shape="any")
    for item in read_items(Reading(0, given)):
        for row in item_rows(item):
            if row.code == "blank":
                continue
            if row.code:
                text = f"{path}, line {row.line}: {row.value.reason} {row.value.excerpt}"
                raise UserError("E127", text.rstrip())
            found.append(Record(path, row.line, mended(row.value)))
    return found


def mended(value):
    """JSON may hold half a surrogate pair, which is no text."""
    if isinstance(value, str):
        return value if value.isascii() else mend_surrogates(value)
    if isinstance(value, list):
        return [mended(one) for one in value]
    if isinstance(value, dict):
        return {key: mended(one) for key, one in value.items()}
    return value


def csv_without_names(path: Path, header: tuple[str, ...]) -> list[Record]:
    found = []
    try:
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("E127", f"{path}: {error}") from None
    for first, _, cells, wrong in csv_records(data, ","):
        if not wrong and len(cells) not in (0, len(header)):
            wrong = f"{len(cells)} cells instead of {len(header)}: {', '.join(header)}"
        if wrong:
            raise UserError("E127", f"{path}, line {first + 1}: {wrong}")
        if cells and tuple(cells) != header:
            found.append(Record(path, first + 1, dict(zip(header, cells))))
    return found


def sum_of(paths: list[Path]) -> str:
    """sha256 of what the files hold: of one its own, of several that of the list of theirs."""
    sums = [sha256(path) for path in paths]
    if len(sums) == 1:
        return sums[0]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


# ---------------------------------------------------------------- which file


def words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def split_of(path: Path) -> str:
    """The word in a file's name, or in its folder's, that says which split it is; or ""."""
    for name in (path.stem, path.parent.name):
        for word in words(name):
            if word in SPLIT_WORDS:
                return word
    return ""


def subject_of(path: Path, passed_over: tuple[str, ...] = ()) -> str:
    """What else a file's name says, or that of its folder: arc_easy, anatomy."""
    names = [re.sub(r"-\d+-of-\d+.*|^\d+$", "", path.stem), path.parent.name]
    for name in (*names, path.parent.parent.name):
        left = []
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word and word not in SPLIT_WORDS and word not in passed_over:
                left.append(word)
        if left:
            return "_".join(left)
    return ""


class Place(NamedTuple):
    """Where a benchmark's files are looked for, and by what."""

    root: Path
    wanted: tuple[str, ...] = ()  # words of the path that are preferred, where any has them
    unwanted: tuple[str, ...] = ()  # and of another benchmark's
    endings: tuple[str, ...] = TABLES
    depth: str = "**/*"  # of the files, as a glob

    def files(self) -> list[Path]:
        found = []
        for path in sorted(self.root.glob(self.depth)):
            inside = path.relative_to(self.root)
            hidden = any(part.startswith(".") for part in inside.parts)
            other = any(word in str(inside).lower() for word in self.unwanted)
            if self.ending(path) and not hidden and not other and path.is_file():
                found.append(path)
        for word in self.wanted:
            named = [path for path in found if word in str(path.relative_to(self.root)).lower()]
            found = named or found
        return found

    def ending(self, path: Path) -> str:
        """Of those that are read; "": it is none of them."""
        for ending in self.endings:
            if path.name.lower().endswith((ending, f"{ending}.gz", f"{ending}.zst")):
                return ending
        return ""

    def split(self, names: tuple[str, ...]) -> list[list[Path]]:
        """The files of a split: lists, each the shards of one table; of the ending that comes first
        in `endings` where there are several."""
        found = [path for path in self.files() if split_of(path) in names]
        if not found:
            return []
        best = min(self.endings.index(self.ending(path)) for path in found)
        tables: dict[tuple, list[Path]] = {}
        for path in found:
            if self.ending(path) == self.endings[best]:
                name = re.sub(r"\d+", "", re.sub(r"-\d+-of-\d+.*", "", path.name))
                tables.setdefault((path.parent, name), []).append(path)
        return list(tables.values())


def asked_files(place: Place, splits: list[tuple[str, ...]]) -> list[list[Path]]:
    """The files of the first of the splits that is there; `place.root` itself if it is a file.

    E127: no such file, no such split in the folder."""
    root = place.root
    if root.is_file():
        return [[root]]
    if not root.is_dir():
        raise UserError("E127", f"{root}: there is no such file or folder")
    for names in splits:
        found = place.split(names)
        if found:
            return found
    known = ", ".join(names[0] for names in splits)
    text = f"{root}: no file named {known} in it, of {' '.join(place.endings)}"
    raise UserError("E127", f"{text}; name the file itself")


def only(tables: list[list[Path]]) -> list[Path]:
    """E127: there are several."""
    if len(tables) > 1:
        names = ", ".join(str(paths[0]) for paths in tables[:4])
        raise UserError("E127", f"which of these is meant? {names}; name the file itself")
    return tables[0]


def beside(file: Path, place: Place, splits: list[tuple[str, ...]]) -> list[Path]:
    """The files of another split of the same table as `file`, of the first of the splits that is
    there: boolq_train.jsonl beside boolq_val.jsonl, dev/anatomy_dev.csv beside
    test/anatomy_test.csv; []: none is."""
    file = file.absolute()
    place = place._replace(root=file.parent, depth="*")
    if file.parent.name.lower() in SPLIT_WORDS:
        place = place._replace(root=file.parent.parent, depth="*/*")
    own = subject_of(file, place.wanted)
    for names in splits:
        for paths in place.split(names):
            if subject_of(paths[0], place.wanted) == own and file not in paths:
                return paths
    return []
