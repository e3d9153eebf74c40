"""docs/hacking.md and hacking-more.md name what exists: every `path`, and every `path: name` of a
Python file."""

import ast
import re

import pytest
from conftest import ROOT

from lumen.config import RANGES
from lumen.optim import OPTIMIZERS

FILES = ("hacking.md", "hacking-more.md")
PAGES = {file: (ROOT / "docs" / file).read_text(encoding="utf-8") for file in FILES}
PAGE = "\n".join(PAGES.values())
PATH = r"(?:[\w.]+/)*[\w.]+\.(?:py|md|yaml|toml)|(?:\w+/)+"
# in backticks, a path and perhaps a name in it; a line may end between them
NAMED = re.compile(rf"`({PATH})(?::\s+([\w.]+))?`")


def names_in(source: str) -> set[str]:
    """What a module defines at its top level, and the methods of its classes: Trainer.fit."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED.findall(PAGE))))
def test_what_the_page_names_is_there(path, name):
    file = ROOT / path
    assert file.exists(), path
    if name:
        assert name in names_in(file.read_text(encoding="utf-8")), f"{path}: {name}"


@pytest.mark.parametrize(("file", "least"), [("hacking.md", 60), ("hacking-more.md", 30)])
def test_the_page_names_what_it_should(file, least):
    named = NAMED.findall(PAGES[file])
    found = len([path for path, name in named if name])
    assert found > least, "the pattern finds no names any more"
    assert PAGES[file].count("`lumen/") == sum(path.startswith("lumen/") for path, _ in named)
    assert len(PAGES[file].encode()) <= 9216


def test_a_recipe_stands_on_one_page():
    titles = [re.findall(r"^### (.*)$", page, re.MULTILINE) for page in PAGES.values()]
    assert all(titles) and len(set(sum(titles, []))) == len(sum(titles, []))


def test_every_optimizer_is_a_value_of_its_key_and_keeps_what_can_be_read_off_it():
    """The table cannot stand in config.py, which optim.py imports: so both are compared."""
    assert RANGES["optimizer"].split(" | ") == list(OPTIMIZERS)
    for optimizer in OPTIMIZERS.values():
        assert optimizer.STATE_BYTES >= 0 and isinstance(optimizer.FRESH, tuple)


def test_every_room_is_on_the_page_of_files():
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rooms = {path.stem for path in (ROOT / "lumen").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", page)) == rooms
