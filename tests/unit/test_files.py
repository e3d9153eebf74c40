"""lumen/files.py: whole or not there, and one meaning of a JSON file that cannot be read."""

import hashlib
import json

import pytest

from lumen import files
from lumen.errors import UserError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": "é"})
    assert json.loads(path.read_text()) == {"a": "é", "b": 1}
    with pytest.raises(OSError), files.replacing(path) as file:
        file.write(b"half of it")
        raise OSError("disk full")
    assert files.read_json(path) == {"a": "é", "b": 1} and list(tmp_path.iterdir()) == [path]


def test_read_json(tmp_path):
    """Without a code nothing is raised; with one only a file that need not exist is passed over."""
    absent = tmp_path / "absent.json"
    assert files.read_json(absent) == files.read_json(absent, "E117", must_exist=False) == {}
    with pytest.raises(UserError, match="E401.*absent.json cannot be read"):
        files.read_json(absent, "E401")
    for text in ("{", "[1]", '"text"', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        assert files.read_json(tmp_path / "bad.json") == {}
        with pytest.raises(UserError, match="E117.*bad.json cannot be read"):
            files.read_json(tmp_path / "bad.json", "E117", must_exist=False)


def test_read_lines_passes_over_half_a_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_lines(path) == []
    for text, rows in (
        ("", []),
        ('{"a": 1', []),
        ('{"a": 1}', []),
        ('{"a": "x\u2028y"}\n{"a"', [{"a": "x\u2028y"}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ):
        path.write_text(text)
        assert files.read_lines(path) == rows


def test_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.sha256(path) == files.sha256(path, core_share=0.9) == whole
    assert files.sha256(path, stopped=lambda: True) == ""
