"""Names that other trainers and older versions use, made ours: the table is configs/aliases.yaml.

A key that is met is printed as `hidden_size -> model.d_model 2048`. Where the meaning differs it is
refused, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lumen.errors import UserError
from lumen.values import allowed, as_number, convert, in_words, short

TABLE = Path(__file__).resolve().parent.parent / "configs" / "aliases.yaml"
# sections of the table that are of commands
APART = ("train.py", "prepare_data.py", "evaluate.py", "export.py quantize", "sample.py")
APART += ("serve.py",)


@functools.cache
def table(command: str = "") -> dict[str, dict]:
    """Foreign name -> its row, {"to": key} where that is all. Names with commas share one.

    command: one of APART, whose options have a table of their own.
    """
    rows = {}
    quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tree = yaml.load(TABLE.read_text(encoding="utf-8"), quick)
    apart = {name: tree.pop(name) for name in APART}
    for names, row in apart.get(command, tree).items():
        row = row if isinstance(row, dict) else {"to": row}
        if "switch" in row:
            row |= {"to": row["switch"], "values": {True: row[True], False: row[False]}}
        values = row.get("values", {})
        values = {n: new for old, new in values.items() for n in split(old)}
        rows |= {name: row | {"values": values} for name in split(names)}
    return rows


def split(names) -> list:
    return names.split(", ") if isinstance(names, str) else [names]


@dataclass
class Claim:
    """What one key that was written says of one of ours."""

    name: str  # as written: "hidden_size", "model.hidden_size"
    given: object  # the value as written
    key: str  # ours
    value: object  # ours
    agrees: tuple = ()  # other values of ours that it does not contradict
    weight: int = 1  # 0: a switch that is on gives way; 2: one that is off beats foreign names, ...
    off: object = None  # of a switch: what ours is when it is off
    beats: bool = False  # ... and some beat ours too


@dataclass
class Renaming:
    """What became of the foreign names in one tree of keys."""

    moved: dict[str, str] = field(default_factory=dict)  # our key: the name it was written under
    wrong: list[str] = field(default_factory=list)  # refusals, each with its place
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)  # why: names


def rename(tree: dict, own: dict, where: Callable[[str], str], under: dict | None = None):
    """Make the foreign names in `tree` ours, in place -> Renaming.

    own: {our key, as "model.d_model": its type}. where(key): file and line. under: the tree of the
    file that `tree` was typed over; a switch that is on does not touch what it says.
    """
    done, under = Renaming(), under or {}
    lift_sections(tree, done, where)

    def place(name: str) -> str:
        return where(done.moved.get(name, name))

    given = written(tree, own)
    claims: dict[str, list[Claim]] = {}
    held = []  # what counts only beside a key of ours, which may come of another name
    for name, value in given.items():
        row = row_of(name, value, own)
        if row is None:
            continue
        said = claim(name, value, row)
        if why := switched_off(row, given, under):
            said = {"ignore": why}
        if isinstance(said, Claim):
            claims.setdefault(said.key, []).append(said)
        elif "equals" in said:
            held.append((name, value, said))
        elif "refuse" in said:
            done.wrong.append(refusal(name, value, said, place))
        else:
            done.ignored.setdefault(said["ignore"], []).append(name)
        drop(tree, name)
    for several in claims.values():
        settle(tree, several, own, place, under, done)
    hold(held, tree, own, place, under, done)
    for why, names in done.ignored.items():
        done.notes.append(f"{', '.join(names)} has no effect: {why}")
    return done


def hold(held: list, tree: dict, own: dict, place, under: dict, done: Renaming) -> None:
    """Names that say nothing new where one of our keys has the same value, and cannot be taken
    where it has another."""
    for name, value, said in held:
        ours = get(tree, said["equals"])
        ours = get(under, said["equals"]) if ours is None else ours
        if same(said["equals"], value, ours, own):
            done.ignored.setdefault(said["ignore"], []).append(name)
        else:
            done.wrong.append(refusal(name, value, said, place))


def refusal(name: str, value, said: dict, place) -> str:
    why = said["refuse"].replace("VALUE", str(value))
    return f"{place(name)}: {name}: {short(value)}: {why}"


def switched_off(row: dict, given: dict, under: dict) -> str:
    """Why a row does not count, by the switch that it names; "" where it does."""
    needs, of = row.get("with"), row.get("of")
    if needs and not plain(given.get(needs)) and get(under, row["to"]) is None:
        return f"{needs} is not true"
    return f"{of} is false" if of in given and not plain(given[of]) else ""


def lift_sections(tree: dict, done: Renaming, where) -> None:
    """What a `training_params:` holds is read as if it stood at the top level, or in one of our
    blocks."""
    for section in [name for name in tree if table().get(name, {}).get("section")]:
        inner, block = tree.pop(section), table()[section]["section"]
        if inner is not None and not isinstance(inner, dict):
            done.wrong.append(f"{where(section)}: {section}: a mapping of keys is expected")
            continue
        for name, value in (inner or {}).items():
            key, home = name, "at the top level"
            if block is not True:
                key, home = f"{block}.{name}", f"under {block}:"
            if name in (tree if block is True else tree.get(block) or {}):
                text = f"{section}.{name} stands {home} too; drop one"
                done.wrong.append(f"{where(f'{section}.{name}')}: {text}")
            put(tree, key, value)
            done.moved[key] = f"{section}.{name}"


def blocks_of(own: dict) -> list[str]:
    return sorted({name.partition(".")[0] for name in own if "." in name})


def written(tree: dict, own: dict) -> dict[str, object]:
    """Every key that was written: {"model.d_model": its value}."""
    found = {}
    for name, value in tree.items():
        if name not in blocks_of(own):
            found[str(name)] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{below}": inner for below, inner in value.items()}
    return found


def row_of(name: str, value, own: dict) -> dict | None:
    """The row of the table for a key and its value; None where there is nothing to do.

    Our own key has one where the table knows another name for this value. A key of a block that
    stands at the top level goes into its block.
    """
    bare = name.rpartition(".")[2]
    if name in own:
        row = table().get(name)
        known = row is not None and "values" in row and plain(value) in row["values"]
        return row | {"to": name} if known else None
    row = table().get(bare, {})
    if row.keys() & {"to", "ignore", "refuse"}:
        return row
    # of these keys (r, alpha, dropout; tasks, limit) no bare name says whose it is
    blocks = [block for block in blocks_of(own) if block not in ("lora", "evaluate")]
    homes = [f"{block}.{bare}" for block in blocks if f"{block}.{bare}" in own]
    return {"to": homes[0], "values": {}} if name == bare and len(homes) == 1 else None


def plain(value):
    """A value as the table writes it: 'true' is true, '1e-2' is 0.01, a list is its text."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    number = None if isinstance(value, bool) else as_number(value, float)
    if number is not None:
        return number
    return str(value) if isinstance(value, (dict, list)) else value


def claim(name: str, value, row: dict) -> Claim | dict:
    """What a row of the table makes of a value: a Claim, {ignore: why} or {refuse: why}."""
    key, is_off = row.get("to"), plain(value) in (None, False)
    if plain(value) in row["values"]:
        new = row["values"][plain(value)]
        if isinstance(new, dict):
            return new
        first, *agrees = as_list(new)
        if "switch" not in row:
            return Claim(name, value, key, first, tuple(agrees))
        off = as_list(row["values"][False])[0]
        beats = is_off and "beats" in row
        return Claim(name, value, key, first, tuple(agrees), 2 if is_off else 0, off, beats)
    if "refuse" in row:
        return {"ignore": "it is off"} if is_off else row
    if "ignore" in row:
        return row
    if value is None:
        return {"ignore": "it is null"}
    if "range" in row and not allowed(as_number(value, float), row["range"]):
        return {"refuse": f"must be {in_words(row['range'])}"}
    if "one_minus" in row and (number := as_number(value, float)) is not None:
        return Claim(name, value, key, round(1 - number, 9))
    if "form" in row:
        return Claim(name, value, key, row["form"].replace("NAME", str(value)))
    beats = "beats" in row
    return Claim(name, value, key, value, weight=2 if beats else 1, beats=beats)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def settle(tree, several: list[Claim], own, place, under: dict, done: Renaming) -> None:
    """Give one of our keys the value that foreign names say; refuse what contradicts another."""
    told = ""
    best = max(several, key=lambda said: (said.weight, not said.agrees))
    key, ours = best.key, get(tree, best.key)
    if best.weight == 0:  # on: how much of it, our key may say
        of_file = get(under, key)
        if ours is None and of_file is not None and not same(key, of_file, best.off, own):
            ours = of_file
        if ours is not None:
            done.notes.append(f"{best.name} {as_yaml(best.given)}: {key} {as_yaml(ours)} says it")
            return
    for other in several:
        values = (other.value, *other.agrees)
        if other.weight == best.weight and not any(same(key, best.value, v, own) for v in values):
            text = f"{other.name}: {as_yaml(other.given)} and {best.name}: {as_yaml(best.given)}"
            done.wrong.append(f"{place(best.name)}: {text} are both {key} here; drop one")
    if ours is not None and best.beats:
        told = f", {key} {as_yaml(ours)} gives way"
        put(tree, key, best.value)
    elif ours is not None and not any(same(key, ours, v, own) for v in (best.value, *best.agrees)):
        text = f"{best.name}: {as_yaml(best.given)} is {key}: {as_yaml(best.value)} here"
        done.wrong.append(f"{place(best.name)}: {text}, and {key}: {as_yaml(ours)}; drop one")
    if ours is None:
        put(tree, key, best.value)
        done.moved[key] = done.moved.get(best.name, best.name)
    given, meant = as_yaml(best.given), as_yaml(best.value)
    if (best.name, given) == (key, meant):
        return  # n_experts: 0, which a table cannot tell from its false
    short_name = best.name if given == meant else f"{best.name} {given}"
    told += beside(best, several)
    done.notes.append(f"{short_name} -> {key} {as_yaml(get(tree, key))}{told}")


def beside(best: Claim, several: list[Claim]) -> str:
    """What other names said of the same key."""
    told = ""
    for other in several:
        if other is not best:
            loses = best.weight == 2 and other.weight == 1
            told += f", {other.name} {as_yaml(other.given)} {'gives way' if loses else 'too'}"
    return told


def same(key: str, a, b, own: dict) -> bool:
    """Whether two spellings mean one value: 3e-4 and "0.0003"."""
    with contextlib.suppress(UserError, KeyError):
        return convert(a, own[key], "") == convert(b, own[key], "")
    return a == b


def as_yaml(value) -> str:
    """A value as a user writes it, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) and len(value) < 60 else short(value)


# ---------------------------------------------------------------- places in a tree


def get(tree: dict, key: str):
    """What stands at "model.d_model", None where nothing does."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, key: str, value) -> None:
    block, _, name = key.rpartition(".")
    if block:
        if not isinstance(tree.get(block), dict):
            tree[block] = {}
        tree = tree[block]
    tree[name] = value


def drop(tree: dict, key: str) -> None:
    block, _, name = key.rpartition(".")
    (tree[block] if block else tree).pop(name)
