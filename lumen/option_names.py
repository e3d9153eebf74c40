"""What users of other tools type, as options of a command: `max_boolq_samples -> limit 100`.

The table is the command's section of configs/aliases.yaml. Where a name means something else here
it is refused, or has no effect, with the reason.
"""

from __future__ import annotations

from lumen.aliases import Claim, as_yaml, claim, plain, table
from lumen.errors import UserError, nearest

FIRST = ("MODEL", "SOURCE")  # a command's first words, which have no name


def translate(command: str, argv: list[str], own, tasks=()) -> tuple[list[str], list[str]]:
    """(the words under our names, notes for the user). E002 where a name cannot be taken.

    command: a section of the table; own: its options, "--limit"; tasks: what evaluate.py asks
    without --tasks.
    """
    found = Names(command, {name.lstrip("-") for name in own}, tasks)
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or not name:
            found.kept.append(word)
        elif row := found.row_of(name):
            found.hear(name, [value] if equals else take_values(words, name, row), row)
        else:
            found.keep(name, word, words)
    return found.words(), found.notes


def parse(parser, argv: list[str], say):
    """What the parser of a command makes of words of any tool; says what became of them. E002."""
    words, notes = translate(parser.prog, argv, parser.names())
    found = parser.parse_args(words)
    for note in notes:
        say(note)
    return found


def take_values(words: list[str], name: str, row: dict) -> list[str]:
    """Takes from `words` what belongs to an option. E002 where nothing does."""
    if "flag" in row:
        said = words and isinstance(plain(words[0]), bool)
        return [words.pop(0)] if said else ["true"]
    values = []
    while words and not words[0].startswith("--") and ("several" in row or not values):
        values.append(words.pop(0))
    if not values:
        raise UserError("E002", f"command line: --{name} needs a value")
    return values


class Names:
    """What has been read of a command line."""

    def __init__(self, command: str, own: set[str], tasks):
        self.table, self.own, self.tasks = table(command), own, list(tasks)
        self.kept: list[str] = []  # words that are the command's own
        self.typed: set[str] = set()  # the options among them
        self.claims: dict[str, Claim] = {}  # our name: what was said of it under which name
        self.each: dict[str, list[str]] = {}  # our name, which may come several times: its values
        self.wishes: list[tuple[str, list[str], dict]] = []  # (name, values, row): for the end
        self.notes: list[str] = []

    def row_of(self, name: str) -> dict | None:
        """The table's row of a name; None: it is ours, or nobody's."""
        row = self.table.get(name)
        return None if row and name in self.own and not row["values"] else row

    def keep(self, name: str, word: str, words: list[str]) -> None:
        """A word that is the command's to read, but for --tasks, which may grow or shrink. E002 for
        what is nearer to a name of the table than to any of ours."""
        near = name if name in self.own else nearest(name, [*self.own, *self.table])
        if near not in self.own and near in self.table:
            raise UserError("E002", f"command line: unknown --{name}; did you mean --{near}?")
        value = word.partition("=")[2]
        if name == "tasks" and self.tasks and (value or words):
            value = value or words.pop(0)
            self.claim(Claim(name, value, name, value))
            return
        self.typed.add(name)
        self.kept.append(word)

    # ---- names of the table

    def hear(self, name: str, values: list[str], row: dict) -> None:
        value = ",".join(values)
        if "flag" in row and not isinstance(plain(value), bool):
            raise UserError("E002", f"command line: --{name} takes no value, {value} is one")
        if "flag" in row and plain(value) is False:
            self.notes.append(f"{name} has no effect: it is off")
        elif row.keys() & {"sets", "skips", "adds"}:
            self.wishes.append((name, values, row))
        elif "pairs" in row:
            self.hear_pairs(name, value, row["pairs"])
        elif "each" in row:
            self.each.setdefault(row["to"], []).extend(values)
            self.notes += [f"{name} -> {row['to']} {as_yaml(value)}" for value in values]
        else:
            self.take(name, value, row)

    def hear_pairs(self, name: str, text: str, known: list[str]) -> None:
        """pretrained=DIR,dtype=float16"""
        for pair in text.split(","):
            key, equals, value = pair.partition("=")
            if key not in known or not equals:
                known_are = ", ".join(f"{other}=..." for other in known)
                text = f"--{name}: {pair!r} has no meaning here; there are {known_are}"
                raise UserError("E002", f"command line: {text}")
            self.take(key, value, self.table.get(key, {"to": key, "values": {}}))

    def take(self, name: str, value: str, row: dict) -> None:
        """A name that is one of ours, or none, whatever else is typed."""
        said = claim(name, value, row)
        if isinstance(said, Claim):
            if "items" in row:
                items = [row["items"].get(item, item) for item in said.value.split(",")]
                said.value = ",".join(items)
            self.claim(said)
        elif "refuse" in said:
            raise UserError("E002", f"command line: --{name} {value}: {said['refuse']}")
        else:
            self.notes.append(f"{name} has no effect: {said['ignore']}")

    def claim(self, said: Claim) -> None:
        """E002 where another name says something else of the same."""
        other = self.claims.setdefault(said.key, said)
        if str(other.value) != str(said.value):
            text = f"--{other.name} {other.given} and --{said.name} {said.given}"
            raise UserError("E002", f"command line: {text} are both {said.key} here; drop one")
        if (said.name, said.given) != (said.key, said.value):
            self.note(said)

    def note(self, said: Claim) -> None:
        name = said.name if said.given in (said.value, True) else f"{said.name} {said.given}"
        self.notes.append(f"{name} -> {said.key} {as_yaml(said.value)}")

    # ---- the end

    def words(self) -> list[str]:
        """The command line in our names. E002 where a foreign and an own one contradict."""
        for key, said in self.claims.items():
            if key in self.typed:
                text = f"--{said.name} is --{key} here, which is typed too; drop one"
                raise UserError("E002", f"command line: {text}")
        for name, values, row in self.wishes:
            if "sets" in row:
                self.set(name, row["sets"])
            else:
                self.change_tasks(name, values, row)
        first, words = [], list(self.kept)
        for key, said in self.claims.items():
            if key in FIRST:
                first.append(said.value)
            elif said.value is True:
                words.append(f"--{key}")
            else:
                words += option(key, said.value)
        for key, values in self.each.items():
            if key in FIRST:
                first += values
            else:
                words += [word for value in values for word in option(key, value)]
        return first + words

    def set(self, name: str, keys: dict) -> None:
        for key, value in keys.items():
            if key in self.typed or key in self.claims:
                self.notes.append(f"{name}: {key} is as typed")
                continue
            self.claims[key] = Claim(name, True, key, value)
            self.note(self.claims[key])

    def change_tasks(self, name: str, values: list[str], row: dict) -> None:
        """--tasks, or what would be asked without it, with more or fewer of them. E002 where none
        is left."""
        said = self.claims.get("tasks")
        tasks = said.value.split(",") if said else list(self.tasks)
        before = list(tasks)
        if "adds" in row:
            tasks += [row["adds"].replace("VALUE", value) for value in values]
        else:
            tasks = [task for task in tasks if task.partition(":")[0] != row["skips"]]
        if tasks == before:
            self.notes.append(f"{name} has no effect: {row['skips']} is not asked anyway")
            return
        if not tasks:
            raise UserError("E002", f"command line: --{name} leaves nothing to ask")
        value = ",".join(tasks)
        self.claims["tasks"] = Claim(name, True, "tasks", value)
        self.note(self.claims["tasks"])


def option(key: str, value) -> list[str]:
    """An option as argparse reads it, also where its value begins with -."""
    text = str(value)
    return [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
