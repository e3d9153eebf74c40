"""docs/hacking.md names files, functions and tables: they are where it says."""

import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs/hacking.md").read_text(encoding="utf-8")
# `file`, `Name` and `Name.method` ... up to the next file or the end of the sentence's list
PLACES = re.findall(r"`([\w/]+\.py)`,((?:,? (?:and )?`[\w.\[\]\"]+`)+)", PAGE)


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGE))))
def test_a_file_that_is_named_is_there(file):
    assert (ROOT / file).is_file()


def test_what_is_said_to_be_in_a_file_is_there():
    assert len(PLACES) > 15
    for file, names in PLACES:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)", names):
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", text), f"{file}: {name}"
