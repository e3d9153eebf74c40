"""What a prepared folder says of itself: report.json for programs, DATA_CARD.md for people,
lengths.png to look at. All of it follows from the text and the settings, like the shards."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator

import numpy as np

from lumen.errors import ERRORS
from lumen.output import NEAR, Output
from lumen.shards import Shards, new_file, to_utf8

# Parameters that a token passes through, of presets (docs/presets.md); a test compares them.
PRESETS = {
    "quickstart": 1_066_624,
    "lumi_tiny": 23_072_000,
    "lumi_small": 83_898_880,
    "gpt2_124m": 123_588_864,
    "lunaris_dense": 277_002_240,
    "b1": 997_873_664,
}
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, Chinchilla: about so many are best for a budget

# ---------------------------------------------------------------- report.json


def make_report(output: Output) -> dict:
    """Documents, tokens and lengths of both splits; what was dropped and why, with the first of
    each kind; languages, roles, targets; what lay there and was not read."""
    rejected = {}
    for code, lines in output.examples.items():
        meaning = meaning_of(code)
        rejected[code] = {"rows": output.counts[code], "meaning": meaning, "first": lines}
    report = {
        "kind": (output.rows_made or {"kind": "text"})["kind"],
        "splits": {name: report_split(output.out, s) for name, s in output.splits.items()},
        "rejected": rejected,
        "duplicates": {"exact": output.counts["E107"], "near": output.counts[NEAR]},
        "train_val_overlap": overlap(output.out, output.splits),
        "counts": dict(output.counts),
        "sources": output.settings["sources"],
        "not_read": output.header["provenance"]["not_read"],
        "chinchilla": chinchilla(output.splits["train"].tokens),
    }
    for kind in ("language", "role"):
        report[f"{kind}s"] = shares(output.facts, kind)
    report["done_to_rows"] = shares(output.facts, "row")  # truncated, merged turns, ...
    if output.facts["masked"]:
        report["masked"] = output.facts["masked"]
    return report


def meaning_of(code: str) -> str:
    if code == NEAR:
        return "nearly the same text as another document"
    if code.startswith("rule:"):
        return f"not of what the rule keeps: {code[5:].replace('_', ' ')}"
    return ERRORS[code][0]


def shares(facts, kind: str) -> dict[str, int]:
    """Of what is counted as "language en": {"en": n}, the most frequent first."""
    found = {name[len(kind) + 1 :]: n for name, n in facts.items() if name.startswith(f"{kind} ")}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def report_split(out: str, shards: Shards) -> dict:
    lengths = document_lengths(out, shards.closed)
    made = {"documents": len(lengths), "tokens": shards.tokens, "bytes_text": shards.bytes_text}
    if len(lengths):
        made["bytes_per_token"] = round(shards.bytes_text / shards.tokens, 4)
        smallest, median, p95, largest = np.percentile(lengths, (0, 50, 95, 100))
        numbers = {"mean": lengths.mean(), "std": lengths.std()}
        numbers |= {"min": smallest, "median": median, "p95": p95, "max": largest}
        rounded = {name: round(float(value), 1) for name, value in numbers.items()}
        made["tokens_per_document"] = rounded
    if shards.rows:
        targets = sum(shard["targets"] for shard in shards.closed)
        padding = sum(shard["padding"] for shard in shards.closed)
        made |= {"targets": targets, "padding": padding}
        if shards.tokens:
            made["share_of_targets"] = round(targets / shards.tokens, 4)
            made["share_of_padding"] = round(padding / shards.tokens, 4)
    return made


def document_lengths(out: str, shards: list[dict]) -> np.ndarray:
    """Tokens of every document of a split: (n,). Padding counts to the document before it."""
    begins = []  # of documents, counted over the borders of shards
    at = 0
    for shard in shards:
        starts = np.load(os.path.join(out, shard["docs_file"]), allow_pickle=False)[:-1]
        begins.append(starts.astype(int) + at)
        at += shard["tokens"]
    return np.diff(np.concatenate([*begins, [at]]))


def overlap(out: str, splits: dict[str, Shards]) -> int:
    """Documents of train whose tokens are those of a document of val, as the shards are on the
    disk. Of those that lie in two shards nobody knows."""
    val = set(document_digests(out, splits["val"]))
    if not val:
        return 0
    return sum(digest in val for digest in document_digests(out, splits["train"]))


def document_digests(out: str, shards: Shards) -> Iterator[bytes]:
    """blake2b-16 of the ids of every document, without its padding."""
    for shard in shards.closed:
        ids = np.load(os.path.join(out, shard["file"]), mmap_mode="r", allow_pickle=False)
        places = np.load(os.path.join(out, shard["docs_file"]), allow_pickle=False).tolist()
        for begin, end in itertools.pairwise(places):
            data = ids[begin:end].tobytes()
            if shards.rows:
                width = ids.itemsize
                pad = shards.pad_id.to_bytes(width, "little")
                while data[-width:] == pad:
                    data = data[:-width]
            yield hashlib.blake2b(data, digest_size=16).digest()


def chinchilla(tokens: int) -> dict:
    """How large a model the tokens suit, and how many passes each preset would make of them."""
    passes = {}
    for name, parameters in PRESETS.items():
        passes[name] = round(TOKENS_PER_PARAMETER * parameters / max(tokens, 1), 2)
    return {"parameters": tokens // TOKENS_PER_PARAMETER, "passes": passes}


# ---------------------------------------------------------------- DATA_CARD.md


def write_card(out: str, report: dict, manifest: dict) -> None:
    with new_file(os.path.join(out, "DATA_CARD.md")) as file:
        file.write(to_utf8("\n".join(card(report, manifest)) + "\n"))


def card(report: dict, manifest: dict) -> list[str]:
    tokenizer, counts = manifest["tokenizer"], manifest["counts"]
    lines = ["# Data card", "", f"Kind: {report['kind']}. Made by Lumen's prepare_data.py."]
    lines += [f"Tokenizer: {tokenizer['name']}, {tokenizer['n_vocab']:,} ids.", ""]
    lines += ["## Sources", "", "| source | files | bytes | rows | kept |", "|---|---|---|---|---|"]
    for source in manifest["sources"]:
        cells = [source["files"], source["bytes"], source["rows"], source["docs"]]
        lines.append(f"| {source['name']} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    lines += ["", "Licences are those of the sources: Lumen does not know them.", ""]
    lines += ["## What is in it", "", "| | train | val |", "|---|---|---|"]
    for label, values in split_rows(report["splits"]):
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    for kind in ("languages", "roles"):
        if report[kind]:
            lines += ["", f"{kind.capitalize()}: {in_percent(report[kind])}."]
    done = [f"{name.replace('_', ' ')} {n:,}" for name, n in report["done_to_rows"].items()]
    if "masked" in report:
        done.append(f"addresses masked {report['masked']:,}")
    if done:
        lines += ["", f"What was done to rows: {', '.join(done)}."]
    both = report["train_val_overlap"]
    lines += ["", f"Documents of train that are in val too: {both:,}.", ""]
    lines += chinchilla_lines(report["chinchilla"])
    lines += ["", "## What was left out", ""]
    kept = f"{counts['kept']:,} of {counts['rows']:,} rows were kept"
    lines += [f"{kept}, {counts['cleaned']:,} of them changed by cleaning.", ""]
    if report["rejected"]:
        lines += ["| code | rows | why | first |", "|---|---|---|---|"]
    for code, found in sorted(report["rejected"].items()):
        first = found["first"][0].replace("|", "\\|").replace("\n", " ")[:120]
        lines.append(f"| {code} | {found['rows']:,} | {found['meaning']} | {first} |")
    lines += ["", "## Settings", "", "```"]
    for name, value in sorted(manifest["settings"].items()):
        lines.append(f"{name}: {json.dumps(value, sort_keys=True, ensure_ascii=False)}")
    return [*lines, "```"]


def split_rows(splits: dict) -> list[tuple[str, list[str]]]:
    """(label, [train's, val's]) of the card's table."""
    rows = []
    for name in ("documents", "tokens", "bytes_text", "bytes_per_token", "targets", "padding"):
        values = [splits[split].get(name) for split in ("train", "val")]
        if values != [None, None]:
            rows.append((name.replace("_", " "), [number(value) for value in values]))
    for name in ("mean", "median", "p95", "max", "std"):
        values = [splits[split].get("tokens_per_document", {}).get(name) for split in splits]
        rows.append((f"tokens a document, {name}", [number(value) for value in values]))
    return rows


def number(value) -> str:
    return "-" if value is None else f"{value:,}"


def in_percent(counts: dict[str, int], most: int = 12) -> str:
    total = sum(counts.values())
    shown = [f"{name} {n / total:.1%}" for name, n in list(counts.items())[:most]]
    if len(counts) > most:
        shown.append(f"{len(counts) - most} more")
    return ", ".join(shown)


def chinchilla_lines(found: dict) -> list[str]:
    suits = f"{TOKENS_PER_PARAMETER} tokens a parameter suit {found['parameters']:,} parameters."
    passes = ", ".join(f"{name} {n:,}" for name, n in found["passes"].items())
    return [suits, f"Passes over the data that a preset makes by that rule: {passes}."]


# ---------------------------------------------------------------- lengths.png


def draw_lengths(out: str, splits: dict[str, Shards]) -> bool:
    """A histogram of the documents' lengths. False: matplotlib is not there, and no picture."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, shards in splits.items():
        lengths = document_lengths(out, shards.closed)
        if len(lengths):
            edges = np.geomspace(1, lengths.max() + 1, 60)
            axes.hist(lengths, edges, histtype="step", label=f"{name}, {len(lengths):,} documents")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.legend()
    with new_file(os.path.join(out, "lengths.png")) as file:
        # without a date or version in it: the same bytes each time
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return True
