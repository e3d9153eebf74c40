"""What users of Lumi, LuminaAI and others type behind prepare_data.py, or write in a JSON for it:
`min_length -> min_chars 50`.

lumen/option_names.py translates names one by one. Here: a file of them (`--config_path FILE`, or
the first word), and what says something only in pairs.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from lumen.aliases import plain, table
from lumen.errors import UserError, expand
from lumen.option_names import FIRST, translate
from lumen.values import short, without_comments

FILE = ("config", "config_path", "config_file")
YAML, JSON = (".yaml", ".yml"), ".json"
SMALL = 1 << 16  # bytes; a file of options is no longer
SWITCHES = ("use_minhash", "force_tokenizer_training")  # true or false may follow, or nothing
BANDS = {0.7: (14, 8), 0.8: (8, 10), 0.85: (9, 13)}  # likeness at which half of the pairs are found


def read(argv: list[str], parser) -> tuple[dict, list[str]]:
    """(options that were typed or stand in a file, notes for the user); what is typed beats the
    file. E002, E108."""
    file, typed = take_file(argv)
    if file is None:
        return options_of(typed, parser)
    tree = read_tree(file)
    if isinstance(tree.get("sources"), dict):  # a mixture: prepare_data.py reads the file
        return options_of([file, *typed], parser)
    try:
        options, notes = options_of(as_words(tree, file, parser), parser)
    except UserError as error:
        text = error.text.removeprefix("command line: ")
        raise UserError(error.code, f"{file}: {text}") from error
    over, more = options_of(typed, parser)
    return options | over, notes + more


def options_of(words: list[str], parser) -> tuple[dict, list[str]]:
    words, more, notes = pairs(words)
    words, said = translate(parser.prog, words, parser.names())
    return vars(parser.parse_args(words)) | more, notes + said


# ---------------------------------------------------------------- a file of options


def take_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the file of options, the other words). E002: it is not named, or several are."""
    words, rest, files = list(argv), [], []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name.removeprefix("--").replace("-", "_") not in FILE or not word.startswith("--"):
            rest.append(word)
        elif equals or words:
            files.append(value if equals else words.pop(0))
    if not files and rest and holds_options(rest[0]):
        files.append(rest.pop(0))
    if len(files) > 1:
        text = f"{' and '.join(files)} are both files of options; drop one"
        raise UserError("E002", f"command line: {text}")
    return (files[0] if files else None), rest


def read_tree(file: str) -> dict:
    """A YAML, or a JSON with comments. E108, E002."""
    try:
        text = Path(expand(file)).read_text(encoding="utf-8-sig")
        tree = yaml.safe_load(without_comments(text) if file.endswith(JSON) else text)
    except OSError as error:
        raise UserError("E108", f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("E002", f"{file} is no YAML and no JSON: {error}") from None
    if not isinstance(tree, dict):
        text = "options are expected: {input_path: FILE, output_dir: FOLDER ...}"
        raise UserError("E002", f"{file}: {text}")
    return tree


def holds_options(path: str) -> bool:
    """Whether a first word is a file of options, no data: it names what is to be read."""
    try:
        if not path.endswith((*YAML, JSON)) or os.path.getsize(expand(path)) > SMALL:
            return False
        tree = read_tree(path)
    except (UserError, OSError, ValueError):
        return False
    if isinstance(tree.get("sources"), dict):
        return True
    named = [key for key, row in table("prepare_data.py").items() if row.get("to") in FIRST]
    return bool(tree.keys() & {*named})


def is_mixture(source: str) -> bool:
    """Whether a source is a file of several: a YAML, or a JSON that holds options."""
    return source.endswith(YAML) or (source.endswith(JSON) and holds_options(source))


def as_words(tree: dict, file: str, parser) -> list[str]:
    """Keys of a file as they would be typed. E002: a mapping."""
    first, words = [], []
    for key, value in tree.items():
        if isinstance(value, dict) or value is None:
            if value is not None:
                text = f"{short(value)}: mappings are for a data.yaml, sources: {{NAME: {{...}}}}"
                raise UserError("E002", f"{key}: {text}")
            continue
        values = value if isinstance(value, list) else [value]
        values = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
        action = parser.action(f"--{key}")
        if key == "sources":
            first += values
        elif action is not None and action.nargs == 0:  # a switch of ours
            words += [f"--{key}"] if plain(values[0]) is True else []
        elif len(values) == 1:
            words.append(f"--{key}={values[0]}")
        else:
            words += [f"--{key}", *values]
    return first + words


# ---------------------------------------------------------------- names that go together


def pairs(words: list[str]) -> tuple[list[str], dict, list[str]]:
    """(the words without what is settled here, options, notes)"""
    notes, options = [], {}
    path, size = value_of(words, "tokenizer_path"), value_of(words, "vocab_size")
    if path and size:
        there = os.path.exists(expand(path))
        anew = plain(value_of(words, "force_tokenizer_training")) is True
        if there and not anew:
            words = without(words, "vocab_size")
            notes.append(f"vocab_size has no effect: {path} has its own")
        else:
            words = without(words, "tokenizer_path", *(SWITCHES[1:] if anew else ()))
            why = "force_tokenizer_training is true" if anew else "it is not there"
            notes.append(f"tokenizer_path has no effect: {why}, and one is trained with the data")
    likeness, wanted = value_of(words, "minhash_threshold"), value_of(words, "use_minhash")
    if likeness and plain(wanted) is False:
        words = without(words, "minhash_threshold")
        notes.append("minhash_threshold has no effect: use_minhash is false")
    elif likeness and plain(likeness) in BANDS:
        bands, rows = BANDS[plain(likeness)]
        words = without(words, "minhash_threshold", "use_minhash")
        options["minhash"] = {"bands": bands, "rows": rows}
        said = "minhash_threshold, use_minhash" if wanted else "minhash_threshold"
        notes.append(f"{said} {likeness} -> minhash {{bands: {bands}, rows: {rows}}}")
    return words, options, notes


def value_of(words: list[str], name: str) -> str | None:
    """The value of an option, "true" of a switch; None: it is not there."""
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key.replace("-", "_") == f"__{name}":  # --name
            rest = words[i + 1 :]
            return value if equals else " ".join(rest[: follow(name, rest)]) or "true"
    return None


def follow(name: str, rest: list[str]) -> int:
    """How many words behind an option are its value: 1 or 0."""
    if not rest or rest[0].startswith("--"):
        return 0
    return int(name not in SWITCHES or isinstance(plain(rest[0]), bool))


def without(words: list[str], *names: str) -> list[str]:
    """The words without these options and their values."""
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if name not in names or not word.startswith("--"):
            kept.append(word)
        elif not equals:
            del rest[: follow(name, rest)]
    return kept
