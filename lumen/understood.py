"""Whether the commands of a journey understand their words, before the first of them runs.

A typo in the last stage must not show after hours. One process asks them all: they import torch,
which a journey that only waits has no use for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

from lumen import prepare_names
from lumen.errors import UserError
from lumen.launch import Understood, Words
from lumen.stages import HERE, PLANNED, Stage

COMMANDS = (*PLANNED, "prepare_data.py", "evaluate.py", "sample.py", "serve.py", "export.py")
# the folder of the user stays the current one, for words may name files in it
CHILD = f"import sys; sys.path.insert(0, {str(HERE)!r}); from lumen import understood; "
CHILD += "understood.answer()"


def check(path: Path, stages: list[Stage]) -> None:
    """E002 with every stage whose command does not understand its words. Scripts that are not
    Lumen's are not asked."""
    asked = []
    for s in stages:
        if s.script in COMMANDS and (HERE / s.script).exists():
            asked.append((s.name, s.script, s.words[s.words.index(s.script) + 1 :]))
    if not asked:
        return
    words = [sys.executable, "-c", CHILD]
    found = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"a stage's words could not be checked: {found.stderr}")
    wrong = [f"{path}: stage {name}: {text}" for name, text in json.loads(found.stdout)]
    if wrong:
        raise UserError("E002", "\n  ".join(wrong))


def answer() -> None:
    """In the process that check() starts: stages in, [name, what is wrong] out."""
    found = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name, script, words in json.load(sys.stdin):
            if text := mistake(script, words):
                found.append((name, text))
    print(json.dumps(found))


def mistake(script: str, words: list[str]) -> str:
    """What the command says against its words, "" for nothing. What it says of files is left out:
    stages before it may make them."""
    command = importlib.import_module(script.removesuffix(".py"))
    try:
        if script in PLANNED and words[:1] not in [[c] for c in getattr(command, "COMMANDS", ())]:
            command.main([*words, "--print_config"])
        elif script == "prepare_data.py":  # reads words twice, where a file of options is named
            prepare_names.read(words, command.arguments())
        else:
            Words.only_parse = True
            command.main(words)
    except (Understood, SystemExit):  # SystemExit: --help
        return ""
    except UserError as error:
        return error.text.removeprefix("command line: ") if error.code == "E002" else ""
    finally:
        Words.only_parse = False
    return ""
