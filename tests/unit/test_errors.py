import os
import pickle
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_python

from lumen.errors import ERRORS, UserError


@pytest.mark.parametrize(
    "word, code", [("user", 2), ("diverged", 3), ("bug", 1), ("interrupt", 130), ("0", 0), ("4", 4)]
)
def test_exit_codes_and_who_sees_a_traceback(word, code):
    result = run_python("tests/programs/exits.py", word)
    assert result.returncode == code
    assert ("Traceback" in result.stderr) == (word == "bug")
    if word == "user":
        assert (
            result.stderr.startswith("error E114: x.npy:3: 12 tokens; 65 needed\n")
            and "max_seq_len" in result.stderr
        )


@pytest.mark.parametrize(
    "text",
    [
        "out/x does not exist; did you mean out/y?",
        "out/x does not exist; runs there: out/y",
        "no shards. Make it: python prepare_data.py SOURCE --out DIR",
        "wandb is not installed: pip install wandb",
        "2 of 2 rows are bad\n  all of them: out/rejected.jsonl",
    ],
)
def test_what_says_what_to_do_is_not_followed_by_what_the_table_says(text):
    assert str(UserError("E304", text)) == f"E304: {text}"


def test_what_says_no_more_is_followed_by_what_the_table_says():
    for code, (meaning, remedy) in ERRORS.items():
        first, second = str(UserError(code, "x.npy:3: 12 tokens")).split("\n")
        assert second.startswith(f"  {meaning}; ") and remedy.endswith(second[-20:].lstrip())
        assert first == f"{code}: x.npy:3: 12 tokens" and "see the message; " not in second


def test_a_closed_pipe_is_no_error():
    code = "from lumen.launch import command\ndef main(argv):\n    for i in range(100000): print(i)\ncommand(main)"
    words = f"{sys.executable} -c '{code}' | head -n 1"
    result = subprocess.run(
        words, shell=True, cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert result.stdout == "0\n" and result.stderr == ""


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(
        pickle.dumps(UserError("E301", "text"))
    )  # multiprocessing and gather_object do this
    assert (error.code, error.text, error.exit_code) == ("E301", "text", 3)


def test_every_code_that_is_raised_stands_in_the_table_and_every_code_is_used():
    used = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lumen/*.py"), *ROOT.glob("tools/*.py")):
        if path.name != "errors.py":
            used |= set(re.findall(r"\bE\d{3}\b", path.read_text()))
    assert used <= set(ERRORS), used - set(ERRORS)
    assert set(ERRORS) <= used, set(ERRORS) - used


PRINT_TABLE = ("-m", "lumen.errors")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_errors_holds_the_table():
    """docs/errors.md is written from ERRORS: paste what the command prints."""
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    result = run_python(*PRINT_TABLE)
    assert result.stdout.startswith("| code") and result.stdout.strip() in page, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_are_short_and_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= (12_288 if page.name == "README.md" else 9_216)
    for path in re.findall(r"\b(?:configs|slurm|lumen|tools|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:lumen|tools)\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
