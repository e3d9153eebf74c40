"""Near-duplicates: MinHash of word n-grams, in bands (Broder 1997; Leskovec, Rajaraman, Ullman,
chapter 3), and clusters of the documents that share a band.

    bands_of(text, settings)  ->  (bands,) uint64                   in a worker
    near.add(key, bands)      ->  keys.bin, band_00.bin, ...        in the parent, in any order
    near.decide()             ->  the keys to drop, from one band at a time

Of each cluster the document with the smallest key is kept. A key is a hash of the text: so what is
kept depends on the texts alone, not on the order of files, the number of workers, or where a kill
fell. Likeness is not transitive, clusters are: the first and the last of a chain may differ much.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from contextlib import suppress

import numpy as np

from lumen.clean import plain_words
from lumen.errors import UserError
from lumen.values import short

DEFAULTS = {"ngram": 5, "bands": 14, "rows": 8}
SEED = 1  # of the permutations; another one is another dataset
ALGORITHM = 2  # rensa.RMinHash.ALGORITHM_VERSION that the promise of equal bytes is about
KEY = 16  # bytes
BUFFER = 1 << 14  # documents in memory, 2 MB
MIX = 0x9E3779B97F4A7C15  # odd: 2**64 / golden ratio


# ---------------------------------------------------------------- settings


def minhash_settings(value) -> dict | None:
    """`minhash: true | {ngram, bands, rows}` with every key; None where it is not asked for.
    E002."""
    if value is None or value is False:
        return None
    given = {} if value is True else value
    if not isinstance(given, dict) or set(given) - set(DEFAULTS):
        text = f"minhash: {short(value)} is not true, false or {{{', '.join(DEFAULTS)}}}"
        raise UserError("E002", text)
    settings = DEFAULTS | given
    for key, most in (("ngram", 100), ("bands", 256), ("rows", 64)):
        number = settings[key]
        if type(number) is not int or not 1 <= number <= most:
            raise UserError("E002", f"minhash.{key}: {short(number)} is not 1 to {most}")
    return settings


def chance(likeness: float, settings: dict) -> float:
    """That two texts share a band: 1 - (1 - J**rows)**bands."""
    return 1 - (1 - likeness ** settings["rows"]) ** settings["bands"]


def explain(settings: dict) -> list[str]:
    """What share of the pairs is found, by J: n-grams in both texts over n-grams in either."""
    bands, rows, n = settings["bands"], settings["rows"], settings["ngram"]
    middle = (1 / bands) ** (1 / rows)
    found = [f"{chance(j / 10, settings):.1%} at {j / 10}" for j in range(5, 10)]
    return [
        f"near-duplicates: {bands} bands of {rows} over {n} words in a row, threshold {middle:.2f}",
        f"  pairs found, by the share J of word {n}-grams in common: {', '.join(found)}",
        f"  of each cluster one is kept; texts of less than {n} words are not compared",
    ]


# ---------------------------------------------------------------- bands


def rensa_minhash():
    """E003: not there, or one that makes other hashes."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise UserError("E003", "minhash needs rensa: pip install 'rensa>=0.5'") from error
    version = getattr(RMinHash, "ALGORITHM_VERSION", None)
    if version != ALGORITHM:
        text = f"minhash needs rensa whose algorithm is {ALGORITHM}, not {version}"
        raise UserError("E003", f"{text}: pip install 'rensa==0.5.0'")
    return RMinHash


def bands_of(text: str, settings: dict) -> np.ndarray:
    """(bands,) uint64, the same on every machine; two texts are near-duplicates where they agree at
    a place. Compared are letters and digits in lower case (clean.plain_words); what has fewer than
    ngram words agrees with its exact copies only. E003."""
    minhash = rensa_minhash()
    n, bands, rows = settings["ngram"], settings["bands"], settings["rows"]
    words = plain_words(text)
    if len(words) < n:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return mixed(np.full(bands, int.from_bytes(digest, "little"), np.uint64))
    hashes = np.array(minhash.hash_token_sets([words])[0], np.uint64)
    total = len(hashes) - n + 1
    ngrams = hashes[:total]
    for i in range(1, n):
        ngrams = ngrams * np.uint64(MIX) + hashes[i : i + total]
    ends = [0, total]
    made = minhash.digest_matrix_from_flat_token_hashes(ngrams, ends, bands * rows, SEED)
    smallest = np.array(made.to_rows()[0], np.uint64).reshape(bands, rows)
    powers = np.array([pow(MIX, i, 1 << 64) for i in range(rows)], np.uint64)
    return mixed(smallest @ powers)


def mixed(values: np.ndarray) -> np.ndarray:
    """(bands,) with every bit of each spread over all its bits, and its place too: splitmix64
    (Steele 2014)."""
    values = values + np.arange(1, len(values) + 1, dtype=np.uint64) * np.uint64(MIX)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---------------------------------------------------------------- clusters


class Keys:
    """Sorted keys of 16 bytes each, and as much memory: len, `keys[i]`, `key in keys`."""

    def __init__(self, data: bytes):
        self.data = data

    def __len__(self) -> int:
        return len(self.data) // KEY

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.data[i * KEY : (i + 1) * KEY]

    def __contains__(self, key: bytes) -> bool:
        i = bisect_left(self, key)
        return i < len(self) and self[i] == key


def join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Makes one tree of the trees of left[i] and right[i], for all i. A root is the smallest of its
    tree; parents[i] is the root of i, before and after. In place."""
    while True:
        left, right = parents[left], parents[right]
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
        while True:
            above = parents[parents]
            if np.array_equal(above, parents):
                break
            parents[:] = above


class Near:
    """Keys and bands of all documents so far, in append-only files of a folder: 8 bytes a band and
    16 a key. What is not flushed dies with the process; a killed flush leaves files of unequal
    length, of which the common part counts. E119: they cannot be written."""

    def __init__(self, folder: str, settings: dict):
        self.settings = settings
        names = ["keys.bin", *(f"band_{i:02d}.bin" for i in range(settings["bands"]))]
        self.paths = [os.path.join(folder, name) for name in names]
        self.widths = [KEY] + [8] * settings["bands"]
        self.keys: list[bytes] = []  # not yet in the files
        self.bands: list[np.ndarray] = []
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError("E119", f"{folder}: {error.strerror or error}") from None
        self.written = min(map(documents_in, self.paths, self.widths))

    def count(self) -> int:
        """Documents added so far, flushed or not."""
        return self.written + len(self.keys)

    def add(self, key: bytes, bands: np.ndarray) -> None:
        """key: 16 bytes, equal for equal texts; bands: of bands_of."""
        assert len(key) == KEY, key
        self.keys.append(key)
        self.bands.append(bands)
        if len(self.keys) >= BUFFER:
            self.write()

    def write(self) -> None:
        columns = np.array(self.bands, np.dtype("<u8")).reshape(len(self.keys), -1).T
        data = [b"".join(self.keys), *(column.tobytes() for column in columns)]
        for path, width, more in zip(self.paths, self.widths, data):
            append(path, self.written * width, more)
        self.written += len(self.keys)
        self.keys, self.bands = [], []

    def flush(self) -> None:
        """All that was added survives a power loss."""
        if self.keys:
            self.write()
        for path, width in zip(self.paths, self.widths):
            append(path, self.written * width, b"", synced=True)

    def truncate(self, count: int) -> None:
        """Forgets all but the first `count` documents. E111: there are fewer."""
        if self.keys:
            self.write()
        if count > self.written:
            text = f"{self.paths[0]}: {self.written:,} documents, {count:,} were journaled"
            raise UserError("E111", text)
        self.written = count
        for path, width in zip(self.paths, self.widths):
            append(path, count * width, b"", synced=True)

    def remove(self) -> None:
        """Removes the files, and the folder if nothing else is in it."""
        for path in self.paths:
            if os.path.exists(path):
                os.remove(path)
        with suppress(OSError):
            os.rmdir(os.path.dirname(self.paths[0]))

    def decide(self) -> Keys:
        """The keys to drop: of each cluster all but the smallest. Memory: about 80 bytes a
        document."""
        self.flush()
        n = self.written
        keys = np.fromfile(self.paths[0], np.dtype(">u8"), 2 * n).reshape(n, 2)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys = keys[order]
        parents = np.arange(n)  # of the documents in the order of their keys
        for path in self.paths[1:]:
            band = np.fromfile(path, np.dtype("<u8"), n)[order]
            by_value = np.argsort(band)
            same = band[by_value[1:]] == band[by_value[:-1]]
            join(parents, by_value[1:][same], by_value[:-1][same])
        dropped = (keys != keys[parents]).any(axis=1)
        return Keys(unique_rows(keys[dropped]).tobytes())


def unique_rows(keys: np.ndarray) -> np.ndarray:
    """(n, 2), sorted, without what equals the row before."""
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return keys[new]


def documents_in(path: str, width: int) -> int:
    return os.path.getsize(path) // width if os.path.exists(path) else 0


def append(path: str, length: int, data: bytes, synced: bool = False) -> None:
    """Goes on after a file's first `length` bytes, whatever a killed run left behind them. E119."""
    try:
        with open(path, "ab") as file:
            file.truncate(length)
            file.write(data)
            if synced:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError("E119", f"{path}: {error.strerror or error}") from None
