"""Near-duplicates: MinHash of word n-grams, bands, and clusters of the documents that share one.

bands_of(text, settings)  ->  (bands,) uint64        in a worker
near = Near(folder, settings)
near.add(key, bands); near.flush(); near.truncate(count)
drops = near.decide();  key in drops
"""

from __future__ import annotations

import numpy as np

DEFAULTS = {"ngram": 5, "bands": 14, "rows": 8}


def minhash_settings(value) -> dict | None:
    """`minhash: true | {ngram, bands, rows}` with every key; None: not asked for. E002."""
    raise NotImplementedError


def explain(settings: dict) -> list[str]:
    """What share of the pairs of documents is found, by their likeness J."""
    raise NotImplementedError


def bands_of(text: str, settings: dict) -> np.ndarray:
    """(bands,) uint64: two texts are near-duplicates where they share one. E003 without rensa."""
    raise NotImplementedError


class Keys:
    """Sorted keys, 16 bytes each: len, iteration and `key in keys`."""


class Near:
    """The bands of all documents so far, in append-only files of a folder."""

    def __init__(self, folder: str, settings: dict):
        """Goes on with what is there. E119."""

    def count(self) -> int:
        """Documents added so far, flushed or not."""
        raise NotImplementedError

    def add(self, key: bytes, bands: np.ndarray) -> None:
        """key: 16 bytes; equal texts have equal keys."""
        raise NotImplementedError

    def flush(self) -> None:
        """All that was added is on the disk now. E119."""
        raise NotImplementedError

    def truncate(self, count: int) -> None:
        """Forgets all but the first `count` documents: what came after the last journal. E119."""
        raise NotImplementedError

    def decide(self) -> Keys:
        """The documents to drop: of each cluster all but the one with the smallest key."""
        raise NotImplementedError

    def remove(self) -> None:
        """Removes the files."""
        raise NotImplementedError
