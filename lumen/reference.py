"""What preferences are measured by: the log-probabilities of all pairs by the model as it began,
computed once; and the evaluation on held-out pairs.

They lie beside the data, and in out_dir, as reference-KEY.npy, float32 (pairs, 2), train's and then
val's; the key is a sum of all that they depend on, which reference-KEY.json spells out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lumen import files
from lumen.errors import UserError, raise_if
from lumen.feed import Pairs
from lumen.preferences import SUM_NAMES, log_probabilities, loss, measured_by
from lumen.windows import dummy_batch, fill_row

TOLD_EVERY = 20  # seconds, while it is computed
DIFFERENCES = {  # of a key's facts, what they are called
    "data": "the data",
    "shards": "the shards",
    "tokenizer": "the tokenizer",
    "seq_len": "model.max_seq_len",
    "base_sha256": "the base",
    "quantize_base": "quantize_base",
    "compute_dtype": "the precision",
    "template": "the chat template",
    "rope": "model.rope_theta or rope_scaling",
}

# ---------------------------------------------------------------- rows through a model


class Left(Exception):
    """Some rank was asked to stop."""


def batches(rows, sources, parallel, batch_size: int, stop=lambda: 0):
    """This rank's share of rows, [(name of the source, number)], in batches of one shape:
    (rows, what Feed.batch gives). UserError of one rank is raised on all; Left."""
    index, count = parallel.rows()
    T = next(iter(sources.values())).seq_len
    for first in range(0, len(rows), batch_size * count):
        begin = first + index * batch_size
        own = rows[begin : begin + batch_size]
        batch, error = dummy_batch(0, batch_size, T, sources.values()), None
        try:
            for r, (name, number) in enumerate(own):
                fill_row(batch, r, sources[name], number)
        except UserError as e:
            error = e
        stopped, failed = parallel.all_reduce_max([stop(), int(error is not None)])
        if failed:
            parallel.run_or_raise_on_all(raise_if, error)
        if stopped:
            raise Left
        # where forward holds collectives a rank without rows takes part all the same
        if own or not parallel.collective_free:
            yield own, parallel.feed.batch(*batch[1:])


@contextlib.contextmanager
def as_trained(model):
    """Evaluation, but for MoD's choice, which is that of training: it is what the loss sees."""
    was_training, was_causal = model.training, model.causal
    model.eval()
    model.causal = False
    try:
        yield
    finally:
        model.train(was_training)
        model.causal = was_causal


# ---------------------------------------------------------------- the reference


class Reference:
    """Of all the pairs of a run.

    data: lumen.data.Data of pairs; base: what else the numbers depend on, {base_sha256,
    quantize_base, compute_dtype, template}; out_dir: where they go if the data's folder cannot be
    written; say: a line to the console, of one rank.
    """

    def __init__(self, data, base: dict, out_dir, say=print):
        self.sources = data.sources
        self.val_sources = data.val_sources
        self.tokenizer = data.tokenizer_sum
        self.base, self.out_dir, self.say = base, Path(out_dir), say

    def splits(self, name: str) -> list:
        """The training split of a source, and what of it is held out."""
        found = [self.sources[name]]
        if name in self.val_sources:
            found.append(self.val_sources[name])
        return found

    def facts(self, name: str) -> dict:
        """What the numbers of one source depend on."""
        source = self.sources[name]
        shards = {}
        for split in self.splits(name):
            entries = split.manifest["splits"][split.split]["shards"]
            sums = ("sha256", "mask_sha256", "docs_sha256")
            shards[split.split] = [[entry.get(key) for key in sums] for entry in entries]
        found = {"data": source.fingerprint, "shards": shards, "tokenizer": self.tokenizer}
        # rows are packed by it, and MoD chooses among the tokens of a document
        return found | {"seq_len": source.seq_len} | self.base

    def load_or_compute(self, model, parallel, batch_size: int, known=None, off=None) -> dict:
        """Sets `reference` of every source; returns {source: facts and means}, for state.json.

        known: what the resumed checkpoint says of it (None: a run that begins; its model, as it is
        now, is the reference); off: makes a context in which a model that has been trained is what
        it began as (lora.off). A file that is damaged or of something else is made anew.
        E312: the run began with another reference; or it is gone, and the base with it.
        """
        found = {}
        for name in self.sources:
            facts = json.loads(json.dumps(self.facts(name)))
            key = files_key(facts)
            if known is not None:
                self.check_known(name, known.get(name), facts)
            # other ranks may be on machines that do not see the file
            values = self.read(name, key, facts) if parallel.rank == 0 else None
            values = parallel.broadcast(values)
            missing = values is None
            if missing:
                if known is not None and off is None:
                    text = f"{self.place(name, key)[0]} is gone or damaged, and the model has been"
                    raise UserError("E312", f"{text} trained since: restore it, or begin anew")
                base = contextlib.nullcontext if known is None else off
                with base():
                    values = self.compute(model, name, parallel, batch_size)
            means = values.mean(0, dtype=np.float64).tolist()
            if known is not None:
                self.check_means(name, known[name]["means"], means, rounding(model))
            if parallel.rank == 0:
                self.write(name, key, facts, values)
            self.hand_out(name, values)
            found[name] = facts | {"means": means}
        return found

    def check_means(self, name: str, then: list, now: list, limit: float) -> None:
        """E312 where the numbers are not those that the run began with, though all that they are
        known to depend on is: a base that was changed by hand, or rows of new control tokens."""
        if not np.allclose(then, now, rtol=limit):
            text = f"{name}: chosen and rejected replies have mean log-probabilities {now}, the run"
            raise UserError(
                "E312", f"{text} began with {then}: restore the file it had, or begin anew"
            )

    def check_known(self, name: str, then: dict | None, now: dict) -> None:
        """E312 where the run that is resumed began with something else."""
        then = then or {}
        differ = [words for key, words in DIFFERENCES.items() if then.get(key) != now.get(key)]
        if differ:
            text = f"{name}: the run began with other reference log-probabilities"
            raise UserError("E312", f"{text}; changed since: {', '.join(differ)}")

    # ------------------------------------------------------------ files

    def place(self, name: str, key: str) -> list[Path]:
        """Where the file is: beside the data, for other runs, and in out_dir, which may be moved
        without the data."""
        file = f"reference-{key[:12]}.npy"
        return [Path(self.sources[name].path) / file, self.out_dir / file]

    def read(self, name: str, key: str, facts: dict) -> np.ndarray | None:
        """(pairs, 2), or None where there is no file of this key that is whole."""
        pairs = sum(split.pairs for split in self.splits(name))
        for path in self.place(name, key):
            values = read_file(path, key, facts)
            if values is None:
                continue
            if values.shape == (pairs, 2):
                self.say(f"reference  {name}: {pairs:,} pairs, read from {path}")
                return values
            self.say(f"reference  {path} is damaged")
        return None

    def write(self, name: str, key: str, facts: dict, values: np.ndarray) -> None:
        """By one rank, wherever it is not yet; where neither folder takes it the run goes on
        without."""
        kept, there_already, failed = [], False, []
        for path in self.place(name, key):
            there = read_file(path, key, facts)
            if there is not None and np.array_equal(there, values):
                there_already = True
                continue
            note = {"key": key, "facts": facts, "pairs": len(values)}
            try:
                os.makedirs(path.parent, exist_ok=True)
                with files.replacing(path) as file:
                    np.save(file, values, allow_pickle=False)
                note["sha256"] = files.sha256(path)
                files.write_json(path.with_suffix(".json"), note)
                kept.append(path)
            except OSError as error:
                failed.append(f"{path} cannot be written: {error.strerror or error}")
        if kept:
            places = " and ".join(map(str, kept))
            self.say(f"reference  {name}: {len(values):,} pairs, kept in {places}")
        elif not there_already:
            self.say(f"reference  {'; '.join(failed)}")

    # ------------------------------------------------------------ numbers

    @torch.no_grad()
    def compute(self, model, name: str, parallel, batch_size: int) -> np.ndarray:
        """float32 (pairs, 2) of all splits, on every rank. Each rank takes some rows, and all are
        told all numbers. E312: one is not finite."""
        splits = {split.split: split for split in self.splits(name)}
        rows = [(split, i) for split, source in splits.items() for i in range(source.windows)]
        own = []  # (split, pair, its two numbers)
        self.say(f"reference  {name}: {sum(s.pairs for s in splits.values()):,} pairs, once")
        told = time.monotonic()
        with as_trained(model):
            for n, batch in enumerate(batches(rows, splits, parallel, batch_size), 1):
                mine, (x, y, docs, pairs) = batch
                if time.monotonic() - told > TOLD_EVERY:
                    told = time.monotonic()
                    done = min(1.0, n * batch_size * parallel.rows()[1] / len(rows))
                    self.say(f"reference  {100 * done:.0f} %")
                logp = model_log_probabilities(model, x, y, docs, pairs)
                for (split, i), values in zip(mine, logp.tolist()):
                    own += [
                        (split, p, v) for p, v in zip(splits[split].numbers(i).tolist(), values)
                    ]
        values = {split: np.full((s.pairs, 2), np.nan, np.float32) for split, s in splits.items()}
        for rank in parallel.gather(own):
            for split, p, logps in rank:
                values[split][p] = logps
        values = np.concatenate(list(values.values()))
        if not np.isfinite(values).all():
            p = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            text = f"{name}: the base gives pair {p} the log-probabilities {values[p].tolist()}"
            raise UserError("E312", f"{text}; another precision or another base is needed")
        return values

    def hand_out(self, name: str, values: np.ndarray) -> None:
        at = 0
        for split in self.splits(name):
            split.reference = values[at : at + split.pairs]
            at += split.pairs

    @torch.no_grad()
    def check_start(self, model, cfg, parallel, batch_size: int = 1) -> str:
        """A line on the first rows of each source; the model should still be the reference: loss
        (ln 2; of ipo 1 / (2 beta)^2, of hinge 1) and margins. E312 where the log-probabilities are
        further from the reference than rounding takes them."""
        rows = []
        for name, source in self.sources.items():
            rows += [(name, i) for i in range(min(batch_size, source.windows))]
        ce, margin, gap, count = 0.0, 0.0, 0.0, 0
        cfg = dataclasses.replace(cfg, sft_coef=0.0)
        with as_trained(model):
            for own, (x, y, docs, pairs) in batches(rows, self.sources, parallel, batch_size):
                logp = model_log_probabilities(model, x, y, docs, pairs)
                reference = pairs.reference
                rise = ((logp - reference).abs() / (1 + reference.abs())).nan_to_num()
                _, sums = loss(model, cfg, x, y, docs, pairs)
                if own:
                    gap = max(gap, rise.max().item())
                    ce, count = ce + sums["ce"].item(), count + int(sums["count"])
                    margin += sums["margin"].item()
        ranks = parallel.gather((ce, margin, gap, count))
        ce, margin, _, count = (sum(values) for values in zip(*ranks))
        gap = max(rank[2] for rank in ranks)
        limit = rounding(model)
        text = f"step 0: loss {ce / count:.6f}, margin {margin / count:+.2e} over {count} pairs"
        text += f"; log-probabilities within {gap:.1e} of the reference's"
        if gap > limit:
            raise UserError("E312", f"{text}, rounding explains {limit:.1e}")
        return text


def rounding(model) -> float:
    """How far log-probabilities of the same weights may be apart, relatively: by other batches,
    another machine."""
    return min(64 * torch.finfo(model.compute_dtype).eps, 0.02)


def read_file(path: Path, key: str, facts: dict) -> np.ndarray | None:
    """What a reference file of these facts holds, nothing where it is damaged; None: there is
    none."""
    note = files.read_json(path.with_suffix(".json"))
    if note.get("key") != key or note.get("facts") != facts or not path.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        if files.sha256(path) == note.get("sha256"):
            return np.load(path, allow_pickle=False)
    return np.zeros(0, np.float32)


def files_key(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def model_log_probabilities(model, x, y, docs, pairs: Pairs) -> torch.Tensor:
    """(rows, most, 2), nats."""

    def measure(stream, targets, found):
        return log_probabilities(model, stream, targets, docs.of, pairs)[0], {}

    with measured_by(model, measure):
        return model(x, targets=y, docs=docs)[0]


# ---------------------------------------------------------------- evaluation


@dataclass
class PairEvaluation:
    """What an evaluation found over all its pairs; as evaluate.Evaluation."""

    loss: float  # mean over pairs
    more: dict[str, float]  # means over pairs of preferences.SUM_NAMES
    by_source: dict[str, float]
    batch_losses: list[float]  # mean loss of each batch; the same batches every time

    def row(self) -> dict:
        """As metrics.jsonl says it; val_accuracy: share of pairs whose chosen reply has the higher
        reward."""
        row = {"val_loss": self.loss, "val_accuracy": self.more["accuracy"], "val_bpb": None}
        for name in SUM_NAMES:
            if name not in ("accuracy", "tokens"):
                row[f"val_{name}"] = self.more[name]
        return row | {f"val_loss/{name}": loss for name, loss in self.by_source.items()}

    def beside(self, other: PairEvaluation | None) -> PairEvaluation | None:
        """This one with the losses of other sources too; None where that evaluation was left."""
        if other is None:
            return None
        return dataclasses.replace(self, by_source=self.by_source | other.by_source)


@torch.no_grad()
def evaluate(
    model, cfg, rows, sources, parallel, batch_size: int, stop=lambda: 0
) -> PairEvaluation | None:
    """The loss of held-out pairs on all ranks, as evaluate.evaluate_loss of tokens: rows are
    [(name of the source, number)], stop() is asked before each batch, and what one rank cannot read
    all raise. Every batch is of one source."""
    names = ("ce", "count", *SUM_NAMES)
    of, found = [], []  # of this rank: each batch's source, its sums on the device
    try:
        with as_trained(model):
            for name, source in sources.items():
                of_source = [row for row in rows if row[0] == name]
                for own, batch in batches(of_source, {name: source}, parallel, batch_size, stop):
                    _, sums = loss(model, cfg, *batch)
                    if own:
                        of.append(name)
                        found.append(torch.stack([sums[key].float() for key in names]))
    except Left:
        return None
    numbers = torch.stack(found).tolist() if found else []  # read once
    ranks = parallel.gather(list(zip(of, numbers)))
    every = [one for rank in ranks for one in rank]
    if not every:
        raise UserError("E126", "there is no pair in the rows that an evaluation reads")
    total = dict(zip(names, map(math.fsum, zip(*(sums for _, sums in every)))))
    by_source = {}
    if len(sources) > 1:
        for name in sources:
            ce, pairs = (sum(s[k] for of, s in every if of == name) for k in (0, 1))
            if pairs:
                by_source[name] = ce / pairs
    return PairEvaluation(
        loss=total["ce"] / total["count"],
        more={name: total[name] / total["count"] for name in SUM_NAMES},
        by_source=by_source,
        batch_losses=[sums[0] / sums[1] for _, sums in every],
    )
