"""What is said of a prepared folder, and whether it still holds.

manifest.json names every shard with its size and sha256, the tokenizer, the sources, the settings,
and a fingerprint over all of that (lumen/datacard.py is for people). `check_sizes` is the quick
look at a finished folder, `verify` the look at every byte.
"""

from __future__ import annotations

import os

import numpy as np

from lumen.errors import UserError
from lumen.files import read_json, sha256
from lumen.output import Output
from lumen.shards import json_sha256
from lumen.tokenizer import Tokenizer
from lumen.windows import DAMAGED

# ---------------------------------------------------------------- manifest.json


def read_dataset_json(path: str) -> dict:
    """{} where there is none. E117: it cannot be read."""
    return read_json(path, "E117", must_exist=False)


def make_manifest(output: Output) -> dict:
    """The manifest without provenance; all of it is in the fingerprint."""
    tokenizer, counts, rows = output.tokenizer, output.counts, output.rows_made
    splits = {}
    for split, shards in output.splits.items():
        splits[split] = {
            "tokens": shards.tokens,
            "docs": sum(shard["docs"] for shard in shards.closed),
            "bytes_text": shards.bytes_text,
            "shards": shards.closed,
        }
    names = output.settings["sources"] + output.settings["val_sources"]
    manifest = {
        "format": "npy-tokens",
        "version": 1,
        "dtype": np.dtype(token_dtype(tokenizer)).name,
        "doc_layout": "rendered" if rows else "append_eot",
        "splits": splits,
        "tokenizer": {
            "file": "tokenizer.json",
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "n_vocab": tokenizer.n_vocab,
            "eot_id": tokenizer.eot_id,
            "pad_id": tokenizer.pad_id,
            "im_start_id": tokenizer.im_start_id,
            "im_end_id": tokenizer.im_end_id,
            "specials": tokenizer.specials,
            "pattern": tokenizer.pattern,
        },
        "sources": [describe_source(output, i, name) for i, name in enumerate(names)],
        "settings": output.settings,
        "settings_sha256": json_sha256(output.settings),
        "counts": {
            "rows": counts["rows"],
            "kept": counts["kept"],
            "blank_lines": counts["blank_lines"],
            "cleaned": counts["cleaned"],
            "cut": counts["cut"],
            "tail_held_out": counts["tail_held_out"],
            "dropped": {code: counts[code] for code in sorted(output.examples)},
        },
    }
    if rows:
        manifest |= {"kind": rows["kind"], "rows": {"length": rows["length"]}}
        manifest |= {"template": rows["template"], "loss_on": rows["loss_on"]}
    return manifest | {"fingerprint": json_sha256(manifest)}


def describe_source(output: Output, i: int, name: str) -> dict:
    files = [given for given in output.inputs if given.source == i]
    return {
        "name": name,
        "files": len(files),
        "bytes": sum(given.size for given in files),
        "rows": output.rows[str(i)],
        "docs": output.kept[str(i)],
        "kinds": sorted({given.kind for given in files}),
        "sha256": json_sha256([[given.name, given.sha256] for given in files]),
    }


def token_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.n_vocab <= 65536 else "<u4"


# ---------------------------------------------------------------- does it still hold?


def check_sizes(out: str, manifest: dict) -> None:
    """E111: a file of a finished folder is missing, or a shard has another size."""
    for split in ("train", "val"):
        for shard in manifest["splits"][split]["shards"]:
            path = os.path.join(out, shard["file"])
            if not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]:
                text = f"{path} is not there, or has another size than manifest.json says"
                raise UserError("E111", text)
    for name in ("tokenizer.json", "token_bytes.npy"):
        path = os.path.join(out, name)
        if not os.path.exists(path):
            raise UserError("E111", f"{path} is not there")


def verify(folder: str) -> None:
    """Holds every byte of the shards in a finished folder against its manifest. E110: it is none,
    E111: names them."""
    manifest = read_dataset_json(os.path.join(folder, "manifest.json"))
    if not isinstance(manifest.get("splits"), dict):
        raise UserError("E110", f"{folder} has no manifest.json of prepared data")
    wanted = {}
    size = 0
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            size += shard["bytes"]
            for name in ("", "docs_", "mask_"):
                if want := shard.get(f"{name}sha256"):  # older manifests have the first only
                    wanted[shard[f"{name}file"]] = want
    wanted["tokenizer.json"] = manifest["tokenizer"]["sha256"]
    bad = []
    for name, want in wanted.items():
        path = os.path.join(folder, name)
        try:
            problem = "" if sha256(path) == want else DAMAGED
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            bad.append(path)
            print(f"{path}: {problem}", flush=True)
    good = f"{len(wanted) - len(bad):,} of {len(wanted):,} files, {size / 1e6:,.1f} MB"
    print(f"{folder}: {good}, are as they were prepared")
    if bad:
        shown = bad[:3] + ["..."] if len(bad) > 3 else bad
        raise UserError("E111", f"{', '.join(shown)}: {DAMAGED}")
