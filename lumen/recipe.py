"""What prepare_data.py was asked for: its options, and the settings that follow from them.

Settings decide the bytes of a dataset: they are in its manifest and its fingerprint. The rest of
the options does not. A setting that changes nothing is left out, so that the fingerprint of data
that was prepared without it stays.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import yaml

from lumen.errors import UserError, expand
from lumen.launch import speak
from lumen.near import minhash_settings
from lumen.rules import chosen_rules, complete
from lumen.sources import SPEC_KEYS, SourceSpec, label, read_spec
from lumen.tokenizer import NAMED
from lumen.values import short, without_comments

# ---------------------------------------------------------------- options

# Each: (default, meaning). A default of None depends on the text.
COMMON = {
    "val_fraction": (
        None,
        "share of documents held out, by hash; default 0.05 below 100 MB of text, else 0.005",
    ),
    "seed": (1337, "of the split and of synthetic text"),
    "shard_tokens": (100_000_000, "a shard is closed before it would be longer"),
    "max_doc_chars": (200_000, "longer documents are given to the tokenizer in parts"),
    "field": ("", "the text field or column; default: found by itself, and printed"),
    "workers": (None, "processes; default min(cores, 8), but 1 below 32 MB of text"),
    "batch_bytes": (1 << 20, "what a worker gets at a time"),
    "max_bad": (0.01, "fail at the end when a larger share of the rows is bad"),
    "strict": (False, "stop at the first bad row"),
    "quiet": (False, "no lines, no progress bar, no lengths.png"),
    "export_clean": ("", "a .jsonl to write the cleaned rows to that were kept"),
}
# What decides whether a text is kept, and what is changed in it: lumen/rules.py, lumen/near.py.
CLEANING = {
    "preset": ("none", "none, or web: the rules of Gopher and FineWeb, ftfy"),
    "rules": ("", "names of rules to add, with a - before it to leave out, with commas between"),
    "language": ("", "codes of the languages to keep, with commas between: en,de"),
    "ftfy": (None, "mend text that was decoded wrongly; default: with preset web"),
    "pii": ("", "mask: e-mail and IP addresses become fixed words"),
    "min_chars": (None, "shorter texts are dropped"),
    "max_chars": (None, "longer texts are dropped"),
    "quality_threshold": (None, "drop texts with a lower score, 0 to 1"),
    "minhash": (False, "drop near-duplicates: word 5-grams, 14 bands of 8"),
    "decontaminate": ("", "evaluation files, with commas between: texts that share 13 words go"),
}
# Of conversations and preference pairs only: lumen/chat.py.
CONVERSATIONS = {
    "seq_len": (1024, "conversations: tokens of a row, the max_seq_len of the run"),
    "template": ("chatml", "conversations: chatml, instruct, chat or raw"),
    "loss_on": ("", "what is a target: assistant (of pairs last_turn), completion or all"),
    "too_long": ("truncate", "conversations longer than a row: truncate, turns or drop"),
}
OPTIONS = COMMON | CLEANING | CONVERSATIONS
FLOATS = ("val_fraction", "max_bad", "quality_threshold")
SWITCHES = ("ftfy",)  # true or false
NAMES = ("rules", "language", "decontaminate")  # with commas between, or a list
# What of CLEANING Rules reads.
RULES = (
    "preset",
    "rules",
    "language",
    "ftfy",
    "pii",
    "min_chars",
    "max_chars",
    "quality_threshold",
)


class Job(NamedTuple):
    """What was asked for."""

    sources: list[str | SourceSpec]
    val_sources: list[str]
    out: str
    tokenizer: str
    options: dict  # OPTIONS
    settings: dict
    # of a mixture:
    taken: tuple[str, ...] = ()  # folders whose documents are not taken again
    near: str = ""  # the keys of texts that are nearly like another, of all its sources

    def say(self, text: str) -> None:
        if not self.options["quiet"]:
            speak(text.encode("utf-8", "backslashreplace").decode())

    @property
    def trains_tokenizer(self) -> bool:
        return self.tokenizer.startswith("bpe:")


def is_tokenizer_file(spec: str) -> bool:
    return not spec.startswith(("bpe:", "hf:")) and spec != "bytes" and spec not in NAMED


def plan_job(sources, out: str, tokenizer: str, val_sources, options: dict) -> Job:
    """The checked options, and the settings that follow from them. E002."""
    if unknown := set(options) - set(OPTIONS):
        names = ", ".join(sorted(unknown))
        raise UserError("E002", f"prepare has no option {names}; it has {', '.join(OPTIONS)}")
    options = {name: value for name, value in options.items() if value is not None}
    options = {name: options.get(name, default) for name, (default, _) in OPTIONS.items()}
    sources = expand_all(sources, "sources")
    val_sources = expand_all(val_sources, "val")
    out = expand(out)
    tokenizer = expand(tokenizer)
    check_options(options, bool(val_sources))
    if not out or not tokenizer:
        raise UserError("E002", f"{'tokenizer' if out else 'out'} is empty")
    if tokenizer.startswith("bpe:") and not re.fullmatch(r"bpe:\d{3,7}", tokenizer):
        meaning = "bpe:8192 means a vocabulary of 8,192 ids, specials included"
        raise UserError("E002", f"tokenizer {tokenizer}: {meaning}")
    settings = {
        "version": 1,
        "sources": [label(spec) for spec in sources],
        "val_sources": [label(spec) for spec in val_sources],
        "val_fraction": 0.0 if val_sources else options["val_fraction"],
        "seed": options["seed"],
        "shard_tokens": options["shard_tokens"],
        "max_doc_chars": options["max_doc_chars"],
        "tokenizer": label(tokenizer) if is_tokenizer_file(tokenizer) else tokenizer,
    }
    settings |= cleaning_of(options) | fields_of([*sources, *val_sources], options["field"])
    if "rules" in settings:
        chosen_rules(complete(settings["rules"]))  # a wrong name is said now, not after hours
    return Job(sources, val_sources, out, tokenizer, options, settings)


def fields_of(specs: list[str | SourceSpec], field: str) -> dict:
    """The setting `fields`: (field, kind) of each source, where any was asked for."""
    asked = []
    for spec in specs:
        own = spec if isinstance(spec, SourceSpec) else SourceSpec(())
        asked.append([own.field or field, own.shape])
    return {"fields": asked} if any(map(any, asked)) else {}


def expand_all(specs, where: str) -> list[str | SourceSpec]:
    if isinstance(specs, str):
        specs = [specs]
    specs = specs or []
    if not isinstance(specs, (list, tuple)) or not all(
        isinstance(spec, (str, SourceSpec)) for spec in specs
    ):
        raise UserError("E002", f"{where}: {short(specs)} is no path and no list of paths")
    return [spec if isinstance(spec, SourceSpec) else expand(spec) for spec in specs]


def names_in(text) -> list[str]:
    """The names in a text with commas between, or in a list as YAML has it."""
    names = text if isinstance(text, (list, tuple)) else str(text or "").split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def cleaning_of(options: dict) -> dict:
    """The settings of CLEANING: only those that do something."""
    rules = {}
    for name in RULES:
        value = options[name]
        if name in ("rules", "language"):
            value = names_in(value)
        if value not in (None, "", [], "none"):
            rules[name] = value
    settings = {"rules": rules} if rules else {}
    if minhash := minhash_settings(options["minhash"]):
        settings["minhash"] = minhash
    if options["decontaminate"]:
        settings["decontaminate"] = [label(name) for name in evaluation_files(options)]
    return settings


def evaluation_files(options: dict) -> list[str]:
    return [expand(name) for name in names_in(options["decontaminate"])]


def rows_of(shape: str, options: dict, template: dict) -> dict:
    """The setting `rows` of conversations and pairs. `template`: chat.describe."""
    if shape == "text":
        return {}
    # of a pair only the last replies differ, and only they are compared
    loss_on = options["loss_on"] or ("last_turn" if shape == "pairs" else "assistant")
    rows = {"kind": shape, "length": options["seq_len"] + 1, "long": options["too_long"]}
    return {"rows": rows | {"loss_on": loss_on, "template": template}}


# ---------------------------------------------------------------- several sources: data.yaml


class Mixture(NamedTuple):
    """What a data.yaml asks for: a dataset for each of its sources, in a folder under `out`."""

    out: str
    jobs: dict[str, Job]  # by the source's name
    weights: dict[str, float]


OF_A_SOURCE = ("path", "paths", "weight", "field", "kind", "val", "export_clean", *CLEANING)


def read_mixture(file: str, typed: dict) -> Mixture:
    """`typed`: options of the command line, which beat the file's. E002, E108."""
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
        tree = yaml.safe_load(without_comments(text) if file.endswith(".json") else text)
    except OSError as error:
        raise UserError("E108", f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("E002", f"{file} is no YAML: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("sources"), dict):
        raise UserError("E002", f"{file}: needs sources: {{NAME: {{path: ...}}}}")
    tree = tree | typed
    refuse_unknown(file, "", tree, ("out", "tokenizer", "sources", *OPTIONS))
    out = expand(str(tree.get("out") or f"data/{os.path.splitext(os.path.basename(file))[0]}"))
    jobs, weights = {}, {}
    for name, source in tree["sources"].items():
        place = f"sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(name)):
            raise UserError("E002", f"{file}: {place}: a name is letters, digits, _ - and .")
        source = source if isinstance(source, dict) else {"path": source}
        refuse_unknown(file, place, source, OF_A_SOURCE)
        own = tree | source | typed
        asked = {key: value for key, value in own.items() if key in SPEC_KEYS}
        spec = read_spec(asked, f"{file}: {place}", str(name))
        weights[name] = spec.weight
        options = {key: value for key, value in own.items() if key in OPTIONS}
        folder = os.path.join(out, name)
        tokenizer = str(tree.get("tokenizer") or "bpe:8192")
        options["field"] = ""  # it is in the spec
        try:
            jobs[name] = plan_job([spec], folder, tokenizer, source.get("val"), options)
        except UserError as error:
            raise UserError(error.code, f"{file}: {place}: {error.text}") from None
    refuse_unlike(file, jobs)
    return Mixture(out, jobs, weights)


def refuse_unlike(file: str, jobs: dict[str, Job]) -> None:
    """E002: sources that would write to one file, or whose near-duplicates cannot be compared."""
    written, alike = {}, {}
    for name, job in jobs.items():
        if path := job.options["export_clean"]:
            other = written.setdefault(os.path.realpath(expand(path)), name)
            if other != name:
                text = f"{other} and {name} would both write to {path}; give each its own"
                raise UserError("E002", f"{file}: export_clean: {text}")
        if minhash := job.settings.get("minhash"):
            other, first = alike.setdefault("minhash", (name, minhash))
            if first != minhash:
                text = f"that of {other} is not that of {name}: their texts cannot be compared"
                raise UserError("E002", f"{file}: minhash: {text}")


def refuse_unknown(file: str, place: str, tree: dict, known) -> None:
    unknown = [str(key) for key in tree if key not in known]
    if unknown:
        where = f"{file}: {place}" if place else file
        text = f"{where}: unknown key {', '.join(unknown)}; it may have {', '.join(known)}"
        raise UserError("E002", text)


# ---------------------------------------------------------------- what an option may be

CHOICES = {
    "preset": ("none", "web"),
    "pii": ("", "mask"),
    "loss_on": ("", "assistant", "last_turn", "completion", "all"),
    "too_long": ("truncate", "turns", "drop"),
}


def what_it_is(name: str) -> tuple[str, tuple]:
    """(in words, the types) of an option's value; YAML reads `no` as false, and 1e6 as a word."""
    default = OPTIONS[name][0]
    if name in NAMES:
        return "a word or a list of words (in quotes, if YAML takes it for another thing)", (str,)
    if name == "minhash":
        return "true, false or a mapping", (bool, dict)
    if name == "template":
        return "a word or {role: format}", (str, dict)
    if isinstance(default, bool) or name in SWITCHES:
        return "true or false", (bool,)
    if isinstance(default, str):
        return "a word", (str,)
    return ("a number", (int, float)) if name in FLOATS else ("a whole number", (int,))


def check_type(name: str, value) -> None:
    words, kinds = what_it_is(name)
    for one in value if name in NAMES and isinstance(value, (list, tuple)) else [value]:
        if type(one) not in kinds:
            raise UserError("E002", f"{name}: {short(value)} is not {words}")


LIMITS = {
    "val_fraction": (0, 0.5),
    "max_bad": (0, 1),
    "quality_threshold": (0, 1),
    "shard_tokens": (1, 10**12),
    "max_doc_chars": (1, 10**12),
    "batch_bytes": (1, 10**9),
    "seq_len": (1, 10**7),
    "workers": (1, 1024),
    "seed": (-(2**63), 2**63 - 1),
}


def check_options(options: dict, has_val_sources: bool) -> None:
    for name, value in options.items():
        if value is not None:
            check_type(name, value)
    val_fraction = options["val_fraction"]
    if has_val_sources and val_fraction is not None:
        text = "val and val_fraction exclude each other: with val all sources are for training"
        raise UserError("E002", text)
    for name, known in CHOICES.items():
        if (options[name] or known[0]) not in known:
            text = f"{name}: {options[name]!r} is not one of {', '.join(filter(None, known))}"
            raise UserError("E002", text)
    for name, (low, high) in LIMITS.items():
        value = options[name]
        if value is not None and not low <= value <= high:
            raise UserError("E002", f"{name}: {value} is not from {low} to {high}")
