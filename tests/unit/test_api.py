"""docs/api*.md are what tools/api.py writes from the source."""

import ast
import importlib

import pytest
from conftest import ROOT
from documented import PAGES, blocks

from lumen.commands import METHODS
from tools import api

FILES = {"run": "api.md", "model": "api-model.md", "text": "api-text.md"}


@pytest.mark.parametrize("page", FILES)
def test_a_page_is_what_the_source_says(page, capsys):
    api.main([page])
    written = (ROOT / "docs" / FILES[page]).read_text(encoding="utf-8")
    remedy = f"python -m tools.api {page} > docs/{FILES[page]}"
    assert capsys.readouterr().out == written, f"the source has changed: {remedy}"


def test_every_method_that_steers_a_run_is_there():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"- `{name}(" not in text] == []


def test_an_entry_is_a_signature_and_the_first_paragraph(tmp_path, monkeypatch):
    source = """
class A:
    def f(self, x: dict[str, int] = {}, *, y=2, z: int | None = None) -> list:
        '''What it
        does.

        More.'''
"""
    (tmp_path / "a.py").write_text(source)
    monkeypatch.setattr(api, "ROOT", tmp_path)
    found = api.entries("a.py", "f", owners=("B.", "A."))
    wanted = "- `f(x: dict[str, int] = {}, *, y=2, z: int | None = None) -> list`: What it does."
    assert found == wanted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_imports_what_exists(page):
    for kind, line, body in blocks(page.read_text(encoding="utf-8")):
        if kind != "python" or page.name == "README.md":  # where a young model wrote it
            continue
        for node in ast.walk(ast.parse(body)):
            file = getattr(node, "module", None) or "-"
            if (
                isinstance(node, ast.ImportFrom)
                and (ROOT / f"{file.replace('.', '/')}.py").exists()
            ):
                module = importlib.import_module(node.module)
                names = [alias.name for alias in node.names]
                assert all(hasattr(module, name) for name in names), f"{page.name}:{line}: {names}"
