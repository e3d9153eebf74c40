"""The picture of docs/architecture.md: a drawing that names what exists."""

import re
from xml.etree import ElementTree

from conftest import ROOT

PICTURE = ROOT / "docs" / "architecture.svg"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def words() -> list[str]:
    found = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return [text.text for text in found]


def test_the_picture_is_small_and_the_page_shows_it():
    assert PICTURE.stat().st_size <= 6_144 and len(PAGE.encode()) <= 6_144
    assert "](architecture.svg)" in PAGE


def test_files_that_the_picture_names_are_there():
    files = {file for line in words() for file in re.findall(r"[\w/]+\.py", line)}
    assert len(files) > 20
    for file in files:  # "lumen/loader.py, feed.py": the folder is said once
        assert (ROOT / file).exists() or (ROOT / "lumen" / file).exists(), file


def test_the_page_follows_the_picture():
    steps = [line for line in words() if f"| {line} |" in PAGE]
    assert steps == [
        "learning rate",
        "rows",
        "sum over ranks",
        "does it count?",
        "update",
        "observe",
        "tell",
    ]
    for name in re.findall(r"`((?:lumen/)?\w+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
    rows = re.findall(r"^\| ([\w ,?]+) \|", PAGE, re.MULTILINE)
    assert [row for row in rows if row in steps] == steps, "in the same order"
