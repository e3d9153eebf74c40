"""Preference pairs as rows."""

from __future__ import annotations

import numpy as np

from lumen.windows import Source


class PairSource(Source):
    """One split of a dataset of pairs, packed when it is opened. `pairs`: how many there are;
    `most`: in a row; `reference`: (pairs, 2) float32 log-probabilities, None: 0.0 for all."""

    sides = 2
    pairs: int
    most: int
    reference: np.ndarray | None = None

    def numbers(self, i: int) -> np.ndarray:
        """The pairs of row i, int64 (n,), in their order."""
        raise NotImplementedError

    def row(self, i: int):
        """x, y (2, T) int64, docs (2, T) int32, reference (most, 2) float32."""
        raise NotImplementedError
