"""The key `prepare`: where its data goes, and what becomes of it beside data that is prepared.

Names of other trainers (mask_user_tokens, eval_data, tokenizer_path) become options of `prepare`,
also where `data_dir`, `data` or a training mode says what is trained on. Then they are held against
what the folders were made with.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lumen.aliases import as_yaml
from lumen.errors import UserError, expand
from lumen.files import read_json

PLACES = ("sources", "val_sources", "out")  # which text; the rest says how


def join(of_file: dict, typed: dict) -> dict:
    """Typed options over the file's: the data goes into a folder of its own, so that what another
    start has made is not in the way."""
    joined = of_file | typed
    if of_file.get("sources") and joined != of_file and "out" not in typed:
        facts = json.dumps(joined, sort_keys=True, default=str)
        tail = hashlib.sha256(facts.encode()).hexdigest()[:6]
        joined["out"] = f"{folder_of(of_file)}-{tail}"
    return joined


def folder_of(prepare: dict) -> str:
    sources = prepare["sources"]
    first = sources if isinstance(sources, str) else sources[0]
    return prepare.get("out") or f"data/{Path(first).stem}"


def with_prepare(tree: dict, place) -> dict:
    """The values of a Config: `prepare` says where its data goes, and data_dir is that place.
    E002 where it has no sources."""
    values = dict(tree)
    prepare = values.get("prepare")
    if prepare is None:
        return values
    if not prepare.get("sources"):
        text = "needs sources: [...]; may have val_sources, tokenizer, out"
        raise UserError("E002", f"{place('prepare')}: prepare: {text}")
    name = values.get("data_dir") or folder_of({"sources": prepare["sources"]})
    values["prepare"] = {"out": name} | prepare
    values["data_dir"] = values.get("data_dir") or values["prepare"]["out"]
    return values


def settle(tree: dict, place, names: dict, notes: list[str]) -> None:
    """Options of `prepare` without sources, in `tree`: held against the folders of the run, and
    left out with a note. names: of our keys, as written. E002 where they ask for what the folders
    are not, or where there is no data."""
    prepare = tree.get("prepare")
    if not isinstance(prepare, dict) or prepare.get("sources") or not prepare:
        return
    folders = folders_of(tree)
    for option, value in prepare.items():
        key = f"prepare.{option}"
        name = names.get(key, key)
        if not folders:
            text = "says how data is prepared, and none is named: prepare: {sources: [FILE, ...]}"
            raise UserError("E002", f"{place(key)}: {name}: {text}, typed --train_data FILE")
        if option == "val_sources":
            text = f"{folders[0]} holds its own val split: prepare_data.py makes it of --val FILE"
            raise UserError("E002", f"{place(key)}: {name}: {text}; drop this key")
        check_option(folders, option, value, f"{place(key)}: {name}")
        notes.append(f"{name} has no effect: {', '.join(folders)} is prepared already")
    tree.pop("prepare")


def folders_of(tree: dict) -> list[str]:
    """Of data that is there, as far as it can be read."""
    if tree.get("data_dir"):
        return [expand(str(tree["data_dir"]))]
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    specs = sources.values() if isinstance(sources, dict) else []
    named = [spec["dir"] for spec in specs if isinstance(spec, dict) and spec.get("dir")]
    return [expand(str(folder)) for folder in named]


def check_option(folders: list[str], option: str, value, where: str) -> None:
    """E002 where conversations were prepared with another template or loss_on."""
    if option not in ("template", "loss_on"):
        return
    for folder in folders:
        manifest = read_json(Path(folder) / "manifest.json", must_exist=False)
        there = manifest.get("loss_on")
        if option == "template":
            part = "formats" if isinstance(value, dict) else "name"
            there = manifest.get("template", {}).get(part)
        if there not in (None, value):
            text = f"{option} {as_yaml(value)} is asked for, and {folder} was prepared with"
            fix = "prepare the conversations themselves anew"
            raise UserError("E002", f"{where}: {text} {as_yaml(there)}; {fix}")
