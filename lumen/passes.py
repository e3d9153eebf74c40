"""Going over all texts before they are encoded: to find near-duplicates, or to say what each rule
would drop."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lumen.encode import Cleaned, Cleaner, Encoder, all_text
from lumen.errors import UserError
from lumen.files import read_json
from lumen.inputs import is_packed
from lumen.near import Keys, Near, bands_of
from lumen.pool import in_order
from lumen.recipe import Job
from lumen.rules import Examples
from lumen.shards import json_sha256, write_dataset_json, write_keys
from lumen.sources import Input, Item, Reading, item_rows, read_items
from lumen.tokenizer import Tokenizer

JOURNAL_SECONDS = 20  # between two journals of the search for near-duplicates


def read_batches(inputs: list[Input], position, size: int, seed: int):
    """Lists of items of about `size` bytes in all, from the position on."""
    batch = []
    weight = 0
    first, offset, line = position
    for index in range(first, len(inputs)):
        if index > first:
            offset, line = 0, 1
        for item in read_items(Reading(index, inputs[index], offset, line, size, seed)):
            batch.append(item)
            weight += len(item.data) + 200
            if weight >= size:
                yield batch
                batch = []
                weight = 0
    if batch:
        yield batch


def text_of(value: str | list | tuple) -> str:
    """All text of a Cleaned.value."""
    if isinstance(value, str):
        return value
    return all_text(value if isinstance(value, tuple) else (value,))


class Pass(NamedTuple):
    """What a pass goes over, and how."""

    job: Job
    settings: dict
    inputs: list[Input]
    workers: int
    evaluation: object = None  # a Contaminated

    @property
    def total(self) -> int | None:
        """Bytes that there are to read, for the bar's ETA; None: some are packed, nobody knows."""
        if any(is_packed(given) for given in self.inputs):
            return None
        return sum(given.size for given in self.inputs)

    def batches(self, what: str, make, given: tuple, position=(0, 0, 1)):
        """(batch, make(*given)(batch)) in order, with a bar."""
        size, seed = self.job.options["batch_bytes"], self.settings["seed"]
        batches = read_batches(self.inputs, position, size, seed)
        hidden = True if self.job.options["quiet"] else None  # None: on a terminal only
        with tqdm(total=self.total, unit="B", unit_scale=True, desc=what, disable=hidden) as bar:
            for batch, result in in_order(batches, self.workers, make, given):
                yield batch, result
                bar.update(sum(len(item.data) for item in batch))


# ---------------------------------------------------------------- near-duplicates


class Signer:
    """A batch of items -> the keys of the texts that are kept, and their bands."""

    def __init__(self, settings: dict, evaluation, tokenizer: Tokenizer):
        self.settings = settings
        self.encoder = Encoder(settings, tokenizer, "<u4", {"evaluation": evaluation})
        self.cleaner = self.encoder.cleaner

    def __call__(self, batch: list[Item]) -> list[tuple[bytes, np.ndarray]]:
        signed = []
        for item in batch:
            for row in item_rows(item):
                if row.code is None:
                    row = self.cleaner.look(item, row)
                if row.code is None and row.value.key:  # a piece of a long file has none
                    cleaned: Cleaned = row.value
                    # too long for a row: it is not kept, so it may not be the one of its group
                    if "rows" in self.settings and self.encoder.encode(item, row).code:
                        continue
                    bands = bands_of(text_of(cleaned.value), self.settings["minhash"])
                    signed.append((cleaned.key, bands))
        return signed


def find_near_duplicates(passes: list[Pass], out: str, tokenizer: Tokenizer) -> str:
    """The file of the keys of all texts but one of each group that are nearly alike.

    The same keys for any number of workers, any order of files, any place of a kill. The file's
    name stands for the texts as they are and the settings: others are looked at anew."""
    facts = [[over.settings, [given[:7] for given in over.inputs]] for over in passes]
    facts.append(tokenizer.sha256)
    path = os.path.join(out, f"near_{json_sha256(facts)[:12]}.npy")
    if not os.path.exists(path):
        began = time.monotonic()
        drop = sign_all(passes, path.replace(".npy", ".tmp"), tokenizer)
        write_keys(path, drop)
        text = f"near-duplicates: {len(drop):,}, in {time.monotonic() - began:.1f} s"
        passes[0].job.say(text)
    return path


def sign_all(passes: list[Pass], folder: str, tokenizer: Tokenizer) -> Keys:
    """Goes on where a killed search was: near.json says where, and how many were signed by
    then."""
    journal = os.path.join(folder, "near.json")
    os.makedirs(folder, exist_ok=True)
    state = {"pass": 0, "position": [0, 0, 1], "count": 0}
    state |= read_json(journal, "E117", must_exist=False)
    near = Near(folder, passes[0].settings["minhash"])
    near.truncate(state["count"])
    wrote = time.monotonic()
    for number in range(state["pass"], len(passes)):
        over, position = passes[number], (0, 0, 1)
        if number == state["pass"]:
            position = tuple(state["position"])
        given = (over.settings, over.evaluation, tokenizer)
        for batch, signed in over.batches("near-duplicates", Signer, given, position):
            if time.monotonic() - wrote > JOURNAL_SECONDS:
                near.flush()
                at = [batch[0].index, batch[0].offset, batch[0].line]
                row = {"pass": number, "position": at, "count": near.count()}
                write_dataset_json(journal, row)
                wrote = time.monotonic()
            for key, bands in signed:
                near.add(key, bands)
    near.flush()
    drop = near.decide()
    shutil.rmtree(folder)
    return drop


def read_keys(path: str) -> Keys:
    """E111."""
    try:
        return Keys(np.load(path, allow_pickle=False).tobytes())
    except (OSError, ValueError) as error:
        text = f"{path} cannot be read: {error}"
        raise UserError("E111", f"{text}; remove its folder, and it is made again") from None


# ---------------------------------------------------------------- what would be dropped


class Judge:
    """A batch of items -> what each rule says of it when it is looked at alone."""

    def __init__(self, settings: dict, inputs: list[Input], evaluation):
        self.inputs = inputs
        self.cleaner = Cleaner(settings, evaluation)

    def __call__(self, batch: list[Item]) -> tuple[Examples, Counter]:
        examples, counts = Examples(), Counter()
        for item in batch:
            if item.kind in ("piece", "last"):  # of a long file, which no rule drops
                counts["rows"] += int(item.kind == "last")
                continue
            for row in item_rows(item):
                where = f"{self.inputs[item.index].path}:{row.line}"
                self.judge(row, where, examples, counts)
        return examples, counts

    def judge(self, row, where: str, examples: Examples, counts: Counter) -> None:
        if row.code == "blank":
            return
        counts["rows"] += 1
        if row.code:
            counts[row.code] += 1
            return
        text, why = self.cleaner.would_drop(row)
        examples.add(where, text, why)


def dry_run(over: Pass) -> tuple[Examples, Counter]:
    examples, counts = Examples(), Counter()
    given = (over.settings, over.inputs, over.evaluation)
    for _, (more, found) in over.batches("looking", Judge, given):
        examples.merge(more)
        counts += found
    return examples, counts
