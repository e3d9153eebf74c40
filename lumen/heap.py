"""What glibc's malloc does with memory that was freed, while a CPU trains.

A step frees its activations and gradients, and the next one asks for the same again. By default
malloc gives what is large back to the system, which hands it out filled with zeros, page by page:
a tenth of the quickstart's step. So it keeps the pages. Nothing else changes, no bit of a result.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = (1 << 31) - 1  # mallopt takes an int
OLD_LIMIT = 1 << 25  # half an arena: what older glibcs refuse to go beyond (by reading)
NAMES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_pages(memory: float, environment=os.environ) -> bool:
    """From now on this process keeps what it has freed, up to an eighth of its `memory` in bytes;
    blocks of more than that are still given back. Returns whether that could be said: to glibc, and
    only where the user has said nothing."""
    said = [name for name in NAMES if name in environment]
    if said or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = None
    if sys.platform == "linux":  # elsewhere, and beside musl, there is none
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    limit = min(MOST, int(memory / 8))
    for most in (limit, OLD_LIMIT):
        # first this one: where only the other is heard, the rule that adapts both is gone
        if mallopt(M_MMAP_THRESHOLD, most) == 1:
            return mallopt(M_TRIM_THRESHOLD, limit) == 1
    return False
