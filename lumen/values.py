"""What a user wrote, as values: texts become numbers, mappings and ranges are checked.

Every refusal is UserError E002 and names the place.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
import typing

from lumen.errors import UserError, nearest, no_path

PATHS = re.compile(
    r"data_dir|out_dir|resume|init_from|orchestrator\.replay|data\.sources\..*\.(dir|difficulty)"
    r"|prepare\.(sources|val_sources|tokenizer|out)|evaluate\.data"
)
MAY_BE_EMPTY = ("sample_prompt",)
shortened = reprlib.Repr()  # of values in messages: a list of a million stays a line
shortened.maxstring = shortened.maxother = 100
short = shortened.repr


def without_comments(text: str) -> str:
    """JSON as YAML reads it: no `//` comments, no tabs between values."""
    kept = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|\t')
    return kept.sub(lambda match: match[1] or " ", text)


# ---------------------------------------------------------------- types


def convert(value, kind, where: str):
    """`value` as the annotated type `kind`; numbers in quotes count. E002 names `where`."""
    kinds = typing.get_args(kind) or (kind,)
    nothing = value is None or (value == "null" and str not in kinds)
    if nothing and type(None) in kinds:
        return None
    if isinstance(value, bool):
        if bool in kinds:
            return value
        if str in kinds and value is False:
            return "none"  # YAML reads off and no as false: none where a word is expected
    elif isinstance(value, (dict, list)):
        if type(value) in kinds:
            return value
    elif not nothing:
        found = from_text(value, kinds)
        if found is not None:
            return found
    names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise UserError("E002", f"{where}: {short(value)} is not {names}")


def from_text(value, kinds: tuple):
    """A number or a text as the first of `kinds` that it can be; None where it can be none."""
    if bool in kinds and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    for number in (int, float):
        if number in kinds and (found := as_number(value, number)) is not None:
            return found
    if str in kinds and isinstance(value, (str, int, float)):
        return str(value)
    return None


def as_number(value, number: type) -> int | float | None:
    """`value`, or the text of it, as a finite int or float of 64 bits; None where it is none."""
    text = str(value).replace("_", "") if isinstance(value, (str, int, float)) else ""
    if len(text) > 400 or re.match(r"[-+]?0\d", text):  # 010 is 8 in YAML 1.1, 10 in YAML 1.2
        return None
    with contextlib.suppress(ValueError, OverflowError):
        found = float(text)
        if number is float:
            return found if abs(found) < float("inf") else None
        if found == int(found) and abs(found) < 2**63:
            return int(text) if text.lstrip("+-").isdigit() else int(found)
    return None


def inside(value, kind, place, key: str):
    """`value` with all that stands in it converted; E002 with the line of the innermost key.

    `kind` is a type, [what each item is], or {name: what it is}, "*" any name. A word is a list of
    one; null in a mapping is not given. (a, b): a, but b of a mapping. `place(key)` names file and
    line.
    """
    if isinstance(kind, tuple):
        kind = kind[isinstance(value, dict)]
    if isinstance(kind, list):
        items = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(items, list):
            raise UserError("E002", f"{place(key)}: {key}: {short(value)} is not a list")
        return [inside(item, kind[0], place, f"{key}[{i}]") for i, item in enumerate(items)]
    if not isinstance(kind, dict):
        value = convert(value, kind, f"{place(key)}: {key}")
        if isinstance(value, str):
            check_text(value, key, place(key))
        return value
    if not isinstance(value, dict):
        names = ", ".join(f"{name}: ..." for name in kind).replace("*", "NAME")
        raise UserError("E002", f"{place(key)}: {key}: {short(value)} is not a mapping {{{names}}}")
    found = {}
    for name, item in value.items():
        below = f"{key}.{name}"
        if name not in kind and "*" not in kind:
            near = nearest(str(name), kind)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(kind)}"
            raise UserError("E002", f"{place(below)}: unknown key {below}; {hint}")
        if item is not None:
            found[str(name)] = inside(item, kind.get(name, kind.get("*")), place, below)
    return found


def check_text(text: str, key: str, where: str) -> None:
    """E002 where a text, or a path, can be none on any machine."""
    if not text.strip() and key not in MAY_BE_EMPTY:
        raise UserError("E002", f"{where}: {key} is empty; leave it out, or write null")
    if "\0" in text:
        raise UserError("E002", f"{where}: {key}: {short(text)} holds a NUL")
    if PATHS.fullmatch(key) and (reason := no_path(text)):
        raise UserError("E002", f"{where}: {key}: {short(text)}: {reason}")


# ---------------------------------------------------------------- ranges


def allowed(value, text: str) -> bool:
    """Whether `value` is what a range says: `[0, 1)`, `>= 1`, `[1, 64] | auto`, `cuda:N`."""
    return any(holds(part, value) for part in text.split(" | "))


def holds(part: str, value) -> bool:
    """One alternative of a range."""
    part = re.sub(r">= (\S+)", r"[\1, inf]", part)
    part = re.sub(r"> (\S+)", r"(\1, inf]", part)
    bounds = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", part)
    if not bounds:
        word = str(value).lower() if isinstance(value, bool) else value
        pattern = re.escape(part).replace("N", r"\d{1,4}")
        return isinstance(word, str) and re.fullmatch(pattern, word) is not None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    low, high = float(bounds[2]), float(bounds[3])
    above = value >= low if bounds[1] == "[" else value > low
    below = value <= high if bounds[4] == "]" else value < high
    return above and below


def in_words(text: str) -> str:
    """A range as a message says it: `>= 1 or auto`, `one of cosine, linear`."""
    parts = text.split(" | ")
    if all(part[0].isalpha() for part in parts):
        return f"one of {', '.join(parts)}" if len(parts) > 1 else parts[0]
    return " or ".join(f"in {part}" if part[0] in "[(" else part for part in parts)
