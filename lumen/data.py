"""What a run reads: its sources, what of them is held out, their tokenizer and vocabulary; and how
the `prepare` key makes them on a first start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lumen import aliases, files, mixture
from lumen import machine as machines
from lumen import tokenizer as tokenizers
from lumen.buckets import Bucket, cut
from lumen.config import Config
from lumen.errors import UserError
from lumen.launch import clock, environment
from lumen.loader import val_rows
from lumen.pairs import PairSource
from lumen.preferences import check_method
from lumen.windows import Source, anew


@dataclass
class Data:
    """The sources of a run, opened and checked; no row has been read yet."""

    weights: dict[str, float]  # of each source, where `data` has no phases
    vocab_size: int  # the model's
    specs: dict[str, dict] = field(default_factory=dict)  # data.sources, as written
    sources: dict[str, Source] = field(default_factory=dict)  # training splits
    val_sources: dict[str, Source] = field(default_factory=dict)  # those that hold something out
    tokenizer_dir: Path | None = None  # holds tokenizer.json; None: bare shards name no tokenizer
    tokenizer_sum: str | None = None  # sha256 of it

    @property
    def fingerprints(self) -> dict[str, str]:
        """By which a checkpoint knows the data again."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    @property
    def document_mask(self) -> bool | None:
        """Whether all sources have one; None: some do."""
        masked = {source.document_mask for source in self.sources.values()} or {False}
        return masked.pop() if len(masked) == 1 else None

    @property
    def windows(self) -> int:
        """Rows of max_seq_len tokens in one pass."""
        return sum(source.windows for source in self.sources.values())

    def facts(self) -> dict[str, dict[str, str]]:
        """Of each prepared source, what its fingerprint is made of: {name: {block: sum}}, so that a
        later start can say what has changed."""
        found = {}
        for name, source in self.sources.items():
            found[name] = facts_of(source.manifest)
            if isinstance(source, Bucket):
                found[name]["buckets"] = source.fingerprint
        return found

    @property
    def template(self) -> dict | None:
        """The chat template that conversations among them were prepared with, as chat.describe has
        it; None: there are none."""
        found = [(source.manifest or {}).get("template") for source in self.sources.values()]
        return next((template for template in found if template), None)

    def token_bytes(self) -> np.ndarray | None:
        """(vocab,): how many bytes of text each token stands for; None for bare shards."""
        if self.tokenizer_dir is None:
            return None
        file = self.tokenizer_dir / "token_bytes.npy"
        return np.load(file, allow_pickle=False).astype(np.int64)

    def same_tokenizer(self, other: Path) -> bool:
        """Whether the tokenizer in that file or folder makes the ids that the data's makes."""
        return tokenizers.load(str(other)).same_ids(tokenizers.load(str(self.tokenizer_dir)))


def open_data(cfg: Config) -> Data:
    """The data that `cfg` names. E113 where sources, tokenizer and vocabulary do not go together,
    E124 for pairs where conversations are trained on and the other way round, E126 for pairs that
    cannot be, E110 to E112 for what is not there or no shard of ours."""
    block = cfg.data or {"sources": {"data": {"dir": cfg.data_dir}}}
    specs = block["sources"]
    data = Data(mixture.weights_of(block), cfg.model.vocab_size, specs=specs)
    where = (cfg.model.max_seq_len, cfg.val_fraction, cfg.document_mask)
    opened = Source
    if cfg.method != "sft":
        opened = PairSource
        check_method(cfg)
    for name, spec in specs.items():
        whole = opened(str(spec["dir"]), "train", *where)
        parts = [whole]
        if spec.get("buckets", 1) > 1:
            if whole.sides == 2:
                text = "difficulty is of text and conversations; preference pairs have no buckets"
                raise UserError("E002", f"data.sources.{name}.buckets: {text}")
            parts = cut(whole, spec["buckets"], spec.get("difficulty", "length"))
        data.sources |= zip(mixture.leaves(name, spec), parts)
    for name, spec in specs.items():
        held_out = opened(str(spec["dir"]), "val", *where)
        if held_out.windows and cfg.val_fraction > 0:
            data.val_sources[name] = held_out
    take_tokenizer(data)
    if not data.vocab_size:
        text = "model.vocab_size must be set: bare shards do not say which tokenizer made them"
        raise UserError("E113", text)
    for source in (*data.sources.values(), *data.val_sources.values()):
        source.check_vocab(data.vocab_size)
    return data


def take_tokenizer(data: Data) -> None:
    """The tokenizer and vocabulary of the prepared sources. E113 where they have several."""
    prepared = [source for source in data.sources.values() if source.manifest]
    if not prepared:
        return
    first = prepared[0]
    data.tokenizer_dir = Path(first.path)
    data.tokenizer_sum = first.manifest["tokenizer"]["sha256"]
    data.vocab_size = data.vocab_size or first.manifest["tokenizer"]["n_vocab"]
    names = {}  # sha256: the last source with it
    for name, source in data.sources.items():
        if source.manifest:
            names[source.manifest["tokenizer"]["sha256"]] = name
    if len(names) == 1:
        return
    for name in names.values():  # other bytes may still be the same tokenizer
        if not data.same_tokenizer(Path(data.sources[name].path)):
            text = f"data.sources {' and '.join(names.values())} have different tokenizers"
            source = data.sources[name]
            command = anew(source.path, source.manifest, None, Path(first.path, "tokenizer.json"))
            raise UserError("E113", f"{text}; prepare {name} with the first's: {command}")


def not_prepared(cfg: Config) -> bool:
    """Whether the data would have to be made first: by `prepare`, or by a command of yours, where
    the folder is not there and the vocabulary is written."""
    if cfg.prepare:
        return not (Path(cfg.data_dir) / "manifest.json").exists()
    return bool(cfg.data_dir and cfg.model.vocab_size) and not Path(cfg.data_dir).exists()


def planned_data(cfg: Config) -> Data:
    """For a dry run, which prepares nothing: no sources, and the vocabulary that there will be."""
    vocab_size = cfg.model.vocab_size
    if not vocab_size:
        spec = cfg.prepare.get("tokenizer") or "bpe:8192"
        vocab_size = int(spec[4:]) if spec.startswith("bpe:") else tokenizers.load(spec).n_vocab
    return Data({"data": 1.0}, vocab_size)


# ---------------------------------------------------------------- data that a first start makes


def prepare_first(cfg: Config) -> None:
    """The `prepare` key: rank 0 makes the data before the process group exists, the others wait for
    it or for its error."""
    if cfg.prepare is None:
        return
    machines.detect(cfg.device, cfg.precision, False, environment("LOCAL_RANK", 0))  # E003 first
    began = time.time()
    out = Path(cfg.prepare["out"])
    failure = Path(f"{out}.error.json")  # beside the folder, which may not exist yet
    if environment("RANK", 0) == 0:
        make_data(cfg, out, failure)
    else:
        wait_for_data(out, failure, began)


def this_start() -> str:
    """What all ranks of one start have in common, and no other start has."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(os.environ.get(name, "") for name in (*names, "SLURM_JOB_ID"))


def make_data(cfg: Config, out: Path, failure: Path) -> None:
    """Rank 0. An error is written down for the other ranks."""
    import prepare_data  # upward: it is a command, and only a first start calls it

    with contextlib.suppress(OSError):  # the data may lie finished where nobody can write
        failure.unlink()
    spec = {name: value for name, value in cfg.prepare.items() if name not in ("sources", "out")}
    spec["tokenizer"] = spec.get("tokenizer") or "bpe:8192"
    # rows of conversations are as long as those of the model
    spec.setdefault("seq_len", cfg.model.max_seq_len)
    try:
        prepare_data.prepare([str(s) for s in cfg.prepare["sources"]], str(out), **spec)
    except UserError as error:
        if environment("WORLD_SIZE", 1) > 1:
            row = {"launch": this_start(), "time": time.time()}
            row |= {"code": error.code, "text": error.text}
            with contextlib.suppress(OSError):
                failure.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(failure, row)
        raise


def wait_for_data(out: Path, failure: Path, began: float) -> None:
    """The other ranks, without a limit. Rank 0's error of this start is raised here too."""
    waits = told = time.monotonic()
    while not (out / "manifest.json").exists():
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(failure.read_text())
            # hosts' clocks may be a minute apart
            if said["launch"] == this_start() and said["time"] > began - 60:
                raise UserError(said["code"], said["text"])
        if time.monotonic() - told > 60:
            told = time.monotonic()
            text = f"rank {os.environ['RANK']} waits for {out} ({clock(told - waits)})"
            print(text, file=sys.stderr, flush=True)
        time.sleep(0.2)


# ---------------------------------------------------------------- has it changed?

# blocks of a manifest, in the order in which they are told, and what a user calls them
BLOCKS = {
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "rows": "the length of rows",
    "loss_on": "what of a conversation is learned (loss_on)",
    "settings": "the settings of prepare_data.py",
    "splits.train": "the training shards",
    "splits.val": "the val split",
    "buckets": "which windows are how difficult",
}


def facts_of(manifest: dict | None) -> dict[str, str]:
    """A sum of each of BLOCKS that a manifest has; {} for bare shards."""
    found = {}
    for block in BLOCKS:
        value = aliases.get(manifest or {}, block)
        if value is not None:
            text = json.dumps(value, sort_keys=True)
            found[block] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def what_changed(then: dict | None, now: dict | None) -> str:
    """In words, from the facts of one source at both times; None where it is not there."""
    if now is None or then is None:
        return "is gone" if now is None else "is new"
    differ = [words for block, words in BLOCKS.items() if then.get(block) != now.get(block)]
    if not then or not now:  # bare shards, or a checkpoint from before there were facts
        return "holds other shards, or another part of them is held out"
    return f"has changed: {', '.join(differ) or 'its sources'}"


# ---------------------------------------------------------------- what an evaluation reads


def choose_val_rows(data: Data, cfg: Config, segments: list) -> tuple[list, list]:
    """(source, window) of the fixed validation set, by the weights that the run ends with; and of
    sources that only earlier phases weigh, whose loss is told but counts for nothing."""
    if not data.val_sources:
        return [], []
    shares = shares_of(data, segments[-1:])
    if not any(shares.values()):
        shares = dict.fromkeys(shares, 1.0)
    sides = max(source.sides for source in data.val_sources.values())
    count = max(1, cfg.eval_tokens // (cfg.model.max_seq_len * sides))
    rows = val_rows(data.val_sources, shares, count)
    earlier = shares_of(data, segments)
    earlier = {name: weight for name, weight in earlier.items() if not shares[name]}
    if not any(earlier.values()):
        return rows, []
    return rows, val_rows(data.val_sources, earlier, max(1, count // 4))


def shares_of(data: Data, segments: list) -> dict[str, float]:
    """The weight of each source that holds something out, summed over segments."""
    found = dict.fromkeys(data.val_sources, 0.0)
    for _, weights in segments:
        for name, weight in mixture.whole(data.specs, weights).items():
            if name in found:
                found[name] += float(weight)
    return found


def val_sum(val_sources: dict, val_set: list[tuple[str, int]], max_seq_len: int) -> str:
    """Stands for the validation set: its text, which rows of it, how long they are."""
    texts = {}
    for name, source in val_sources.items():
        shards = source.manifest["splits"]["val"]["shards"] if source.manifest else []
        texts[name] = [s.get("sha256", s["file"]) for s in shards] or source.fingerprint
        # which of its targets count
        masks = [s["mask_sha256"] for s in shards if "mask_sha256" in s]
        if masks or source.document_mask:
            texts[name] = [texts[name], masks, source.document_mask]
    rows = [[name, int(i)] for name, i in val_set]
    return hashlib.sha256(json.dumps([texts, rows, max_seq_len]).encode()).hexdigest()
