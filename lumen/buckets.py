"""Part of a source's windows as a source of its own: those of one rank of difficulty.

Which windows that are is a function of the shards and of one number for each document or window,
so a curriculum is a change of weights like any other: no memory of losses, nothing random, exact on
resume.
"""

from __future__ import annotations

import hashlib
import itertools
import os

import numpy as np

from lumen.errors import UserError
from lumen.windows import Source, beside, documents_of


class Bucket:
    """Windows `numbers`, int (n,), of `source`; all else is as the source has it."""

    def __init__(self, source: Source, numbers: np.ndarray):
        self.source, self.numbers = source, numbers
        self.windows = len(numbers)
        self.tokens = self.windows * source.seq_len
        self.unused = 0
        # by which a checkpoint knows it again: another order of difficulty is other data
        facts = source.fingerprint.encode() + np.asarray(numbers, "<i8").tobytes()
        self.fingerprint = hashlib.sha256(facts).hexdigest()

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def window(self, i: int):
        """Window i of the bucket; see Source.window."""
        return self.source.window(int(self.numbers[i]))

    def row(self, i: int):
        """Row i of the bucket; see Source.row."""
        return self.source.row(int(self.numbers[i]))


def cut(source: Source, n: int, difficulty: str = "length") -> list[Bucket]:
    """n buckets of equally many windows, easy to hard; ties by place. difficulty: `length` of
    documents, `loss` of a model (python -m lumen.difficulty), or a .npy with a number for each
    document. E110, E112, E113, and E114 where there are fewer windows than buckets."""
    if source.windows < n:
        text = f"{source.path}: {source.windows} windows cannot make {n} buckets"
        raise UserError("E114", text)
    scores = window_scores(source, difficulty)
    order = np.argsort(scores, kind="stable")
    borders = [source.windows * k // n for k in range(n + 1)]
    return [Bucket(source, np.sort(order[a:b])) for a, b in itertools.pairwise(borders)]


def undivided(sources: dict) -> dict:
    """Sources by name, as they were before they were cut."""
    found = {}
    for name, source in sources.items():
        if isinstance(source, Bucket):
            name, source = name.rpartition(".")[0], source.source
        found[name] = source
    return found


# ---------------------------------------------------------------- how difficult a window is


def window_scores(source: Source, difficulty: str) -> np.ndarray:
    """A number for each window, (windows,), the larger the harder."""
    if difficulty == "loss":
        return read_scores(loss_file(source), source.windows, "windows", source)
    begins = documents(source)
    if difficulty == "length":
        values = np.diff(begins)  # integers: their sums are exact
    else:
        values = read_scores(difficulty, len(begins) - 1, "documents", source)
    return window_means(begins, values, window_starts(source), source.seq_len)


def window_starts(source: Source) -> np.ndarray:
    """The place of each window's first token over all shards: int64 (windows,)."""
    return source.first + np.arange(source.windows, dtype=np.int64) * source.stride


def window_means(begins: np.ndarray, values: np.ndarray, starts: np.ndarray, T: int) -> np.ndarray:
    """The mean over a window's tokens of the value of the document that each is in.

    begins: where the documents begin, and the end of the last: int64 (D + 1,); values: (D,);
    starts: (N,) of windows of T tokens -> float64 (N,).
    """
    sums = np.concatenate([[0], np.cumsum(values * np.diff(begins))])  # before each document

    def total(at: np.ndarray) -> np.ndarray:
        """The sum over all tokens before `at`."""
        d = np.searchsorted(begins[:-1], at, side="right") - 1
        return sums[d] + (at - begins[d]) * values[d]

    return (total(starts + T) - total(starts)) / T


def documents(source: Source) -> np.ndarray:
    """Where documents begin over all shards, and the end of the last: int64 (D + 1,). E110: there
    are no *.docs.npy; E111: one is damaged."""
    begins = [np.zeros(0, np.int64)]
    for shard, at in zip(source.shards, source.starts):
        file = shard.path.removesuffix(".npy") + ".docs.npy"
        if not os.path.exists(file):
            text = f"{file} is not there, and difficulty is that of documents: prepare_data.py"
            raise UserError("E110", f"{text} writes it; difficulty: loss needs none")
        found = documents_of(beside(shard, file, "documents"), shard.tokens)
        begins.append(found[:-1] + at)
    return np.concatenate([*begins, source.starts[-1:]])


def read_scores(file: str, n: int, of: str, source: Source) -> np.ndarray:
    """n finite numbers. E110: no such file; E112: it holds something else; E113: another number
    of them."""
    if not os.path.exists(file):
        text = f"{file} is not there"
        if of == "windows":
            text += f"; to make it: python -m lumen.difficulty RUN {source.path}"
            text += f" --max_seq_len {source.seq_len}"
        raise UserError("E110", text)
    try:
        scores = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError("E112", f"{file} cannot be read: {error}") from None
    if scores.ndim != 1 or scores.dtype.kind not in "fiu":
        text = f"{file} is an array of shape {scores.shape} and dtype {scores.dtype}"
        raise UserError("E112", f"{text}, one number for each of the {n} {of} is expected")
    if len(scores) != n:
        text = f"{file} holds {len(scores)} numbers, the training split of {source.path} {n} {of}"
        raise UserError("E113", text)
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError("E112", f"{file}: number {at} is {scores[at]}")
    return scores


def loss_file(source: Source) -> str:
    """Where the losses of a source's windows stand: of this length, and of these shards only."""
    name = f"loss_T{source.seq_len}_{source.fingerprint[:16]}.npy"
    return os.path.join(source.path, "difficulty", name)
