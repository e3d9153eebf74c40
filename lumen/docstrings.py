"""Conversations about the running Python's own library, made of its docstrings: no download.

The source `docstrings` of prepare_data.py. `python -m lumen.docstrings --choices FILE` writes
multiple-choice questions, --pairs preference pairs, --chat the conversations. Files are parsed, not
imported; of modules in C a few without side effects are looked into. The same Python gives the same
rows; train and val have no top-level module in common.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import inspect
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lumen.errors import UserError, a_path, expand
from lumen.files import replacing
from lumen.inputs import STDLIB_PASSED_OVER
from lumen.launch import Words, command

KINDS = ("chat", "choice", "pairs")
SPLITS = ("train", "val")
VAL_SHARE = 0.1  # of the top-level modules
# no library of use (test, tkinter's games), or made by a program
PASSED_OVER = STDLIB_PASSED_OVER | {
    "idlelib",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "tkinter",
    "msilib",
    "distutils",
    "antigravity",
    "this",
}
# the name under which people know a file; others that begin with _ are nobody's
KNOWN_AS = {"posixpath": "os.path", "_pydecimal": "decimal", "_pyio": "io"}
IN_C = ("builtins", "math", "cmath", "itertools", "time", "zlib", "binascii", "gc", "select", "sys")
POSIX = "posix"  # in C too; its functions are os's
SHORTEST, LONGEST = 20, 1500  # characters of a docstring

QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "How does `{name}` work?",
    "What is `{name}` for?",
    "I found `{name}` in some code. What is it?",
    "Please tell me what `{name}` does.",
    "Describe `{name}` from Python's library.",
    "When would I use `{name}`?",
)
SIGNATURES = (
    "What is the signature of `{name}`?",
    "Which arguments does `{name}` take?",
    "How do I call `{name}`?",
)
FURTHER = ("And what does it do?", "What is it for?", "Thanks. What does it do?", "Explain it.")
SYSTEMS = (
    "You know Python's standard library well.",
    "Answer as the documentation does.",
    "You are a helpful assistant for programmers.",
)


class Entry(NamedTuple):
    """A function, class or method: `os.path.join`, of module `os`; "" where the signature is not
    known."""

    name: str
    module: str
    signature: str
    doc: str

    @property
    def summary(self) -> str:
        """The first paragraph in one line."""
        return " ".join(self.doc.split("\n\n")[0].split())


# ---------------------------------------------------------------- what the library says


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All that the library documents, by name; each docstring once."""
    found = {}
    for entry in (*from_files(), *from_c()):
        found.setdefault(entry.name, entry)
    kept = {}
    for _, entry in sorted(found.items()):
        if SHORTEST <= len(entry.doc) <= LONGEST:
            kept.setdefault(entry.summary.lower(), entry)
    return tuple(kept.values())


def from_files() -> Iterator[Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not PASSED_OVER.intersection(parts):
            files[".".join(parts)] = path
    for module, path in sorted(files.items()):
        name = KNOWN_AS.get(module, module)
        if not all(part.isidentifier() and part[0] != "_" for part in name.split(".")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from from_body(tree.body, name, name.partition(".")[0])


def from_body(body: list, prefix: str, module: str) -> Iterator[Entry]:
    for node in body:
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (function or isinstance(node, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        signature = ""
        if function:
            signature = f"{node.name}({ast.unparse(node.args)})"
        if doc := ast.get_docstring(node):
            yield Entry(name, module, signature, doc.strip())
        if not function:
            yield from from_body(node.body, name, module)


def from_c() -> Iterator[Entry]:
    for module in (*IN_C, POSIX):
        try:
            holder = importlib.import_module(module)
        except ImportError:
            continue
        shown = "os" if module == POSIX else module
        for name, value in sorted(vars(holder).items()):
            if name.startswith("_"):
                continue
            full = name if module == "builtins" else f"{shown}.{name}"
            yield from from_object(value, full, name, shown)
            if isinstance(value, type) and not issubclass(value, BaseException):
                for method, inner in sorted(vars(value).items()):
                    if not method.startswith("_"):
                        yield from from_object(inner, f"{full}.{method}", method, shown)


def from_object(value, full: str, name: str, module: str) -> Iterator[Entry]:
    # a module's constants have their type's docstring
    documented = inspect.isroutine(value) or inspect.isclass(value)
    if not documented or not isinstance(getattr(value, "__doc__", None), str):
        return
    signature = ""
    if text := getattr(value, "__text_signature__", None):
        bare = re.sub(r"\$\w+,? ?", "", text)  # $self and $module, which nobody writes
        signature = name + re.sub(r"(?<=\()/(?:, )?|, /(?=\))", "", bare)
    yield Entry(full, module, signature, inspect.cleandoc(value.__doc__).strip())


# ---------------------------------------------------------------- rows


def number(*words: str) -> int:
    """The same on every machine, without order among the entries."""
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest(), "big")


def pick(options, *words: str):
    return options[number(*words) % len(options)]


def split_of(module: str) -> str:
    return "val" if number("split", module) % 1000 < 1000 * VAL_SHARE else "train"


def docstring_rows(kind="chat", split="train") -> Iterator[dict]:
    """kind "chat": {messages}; "choice": {question, choices, answer: an index}; "pairs": {prompt,
    chosen, rejected}. What is wrong in them comes from the same split. E002; E110: this Python has
    too few."""
    makers = dict(zip(KINDS, (conversation, multiple_choice, preference)))
    if kind not in makers or split not in SPLITS:
        text = f"docstrings: kind {kind!r} is one of {', '.join(KINDS)}, split {split!r} one of"
        raise UserError("E002", f"{text} {', '.join(SPLITS)}")
    some = [entry for entry in entries() if split_of(entry.module) == split]
    if len(some) < 4:
        text = f"docstrings: {len(some)} of split {split} in this Python's library: too few"
        raise UserError("E110", f"{text}; is its source here, and was Python started without -OO?")
    for entry in some:
        yield makers[kind](entry, some)


def conversation(entry: Entry, some: list[Entry]) -> dict:
    """One question, or the signature first; one in four with a system turn."""
    name = entry.name
    messages = []
    if number("system?", name) % 4 == 0:
        messages.append({"role": "system", "content": pick(SYSTEMS, "system", name)})
    question = question_about(entry)
    if entry.signature and number("turns", name) % 3 == 0:
        first = pick(SIGNATURES, "signature", name).format(name=name)
        messages.append({"role": "user", "content": first})
        messages.append({"role": "assistant", "content": f"`{entry.signature}`"})
        question = pick(FURTHER, "further", name)
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": entry.doc})
    return {"messages": messages}


def question_about(entry: Entry) -> str:
    return pick(QUESTIONS, "question", entry.name).format(name=entry.name)


def others(entry: Entry, some: list[Entry], n: int) -> list[Entry]:
    """n more entries, drawn by the entry's name."""
    found = []
    i = number("others", entry.name)
    while len(found) < n:
        other = some[i % len(some)]
        if other is not entry and other not in found:
            found.append(other)
        i = i * 6364136223846793005 + 1442695040888963407 & (1 << 63) - 1  # Knuth's, MMIX
        i ^= i >> 29
    return found


def multiple_choice(entry: Entry, some: list[Entry]) -> dict:
    """Which does this docstring describe, or which docstring belongs to it: one of four."""
    four = others(entry, some, 3)
    answer = number("answer", entry.name) % 4
    four.insert(answer, entry)
    told = entry.name.rpartition(".")[2].lower() in entry.summary.lower()
    if told or number("way", entry.name) % 2:
        question = question_about(entry)
        choices = [one.summary for one in four]
    else:
        question = f"Which of these does this describe? {entry.summary}"
        choices = [one.name for one in four]
    return {"question": question, "choices": choices, "answer": answer}


def preference(entry: Entry, some: list[Entry]) -> dict:
    """Another one's docstring is the rejected answer."""
    return {
        "prompt": question_about(entry),
        "chosen": entry.doc,
        "rejected": others(entry, some, 1)[0].doc,
    }


def main(argv: list[str]) -> None:
    parser = Words(prog="python -m lumen.docstrings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    files = {"chat": "--chat", "choice": "--choices", "pairs": "--pairs"}
    for kind, option in files.items():
        text = f"write the {kind} rows, one JSON object a line"
        parser.add_argument(option, dest=kind, type=a_path, metavar="FILE", help=text)
    text = "of the library's modules; default: val of --choices, train of the others"
    parser.add_argument("--split", choices=SPLITS, help=text)
    args = parser.parse_args(argv)
    wanted = {kind: getattr(args, kind) for kind in files if getattr(args, kind)}
    if not wanted:
        raise UserError("E002", f"nothing to write: give one of {', '.join(files.values())}")
    for kind, file in wanted.items():
        split = args.split or ("val" if kind == "choice" else "train")
        lines = [json.dumps(row, ensure_ascii=False) for row in docstring_rows(kind, split)]
        try:
            with replacing(expand(file)) as target:
                target.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise UserError("E119", f"{file}: {error.strerror}") from error
        print(f"{len(lines)} rows, {kind}, {split}: {file}")


if __name__ == "__main__":
    command(main)
