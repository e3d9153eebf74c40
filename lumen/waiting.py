"""How the threads of a CPU wait for one another, and how much oneDNN remembers. Every command
imports this before torch.

torch's threads are libgomp's, which reads the environment once, as torch is imported. Unless told
otherwise they spin for milliseconds after each operation before they sleep, on cores that somebody
else may need: beside one busy process a step of the quickstart took 3 to 10 times as long (`python
-m tools.bench threads`). So they spin for some microseconds, which covers what lies between two
operations. Where other threads than libgomp's are at work, or one alone, this does nothing.

In bf16 oneDNN makes a kernel for each new shape, about a millisecond, and forgets all but the last
1,024. Each expert of a MoE has another number of rows in each step, times six products: the preset
debug took 1.3 to 1.7 times the CPU time that it takes with 4,096 or more (a Xeon with AMX, one
thread, busy, six pairs of 60 or 120 steps; the same bits). That took 1.3 GB more; no more shapes
than that were met. Rows rounded up to a few sizes would need neither; not tried.
"""

from __future__ import annotations

import os
import sys

import lumen.early  # noqa: F401 - for Ctrl-C while torch is imported

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "1000"
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
REMEMBERED = "4096"


def settle(environment=os.environ, modules=sys.modules) -> None:
    """Says it to both, unless the user has said something, or torch is there already."""
    if "torch" in modules:
        return
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = SPINS
    environment.setdefault(KERNELS, REMEMBERED)


def words(environment=os.environ) -> str:
    """What was said, for the line of the device: ", GOMP_SPINCOUNT 1000"; "": nothing."""
    names = (*NAMES, KERNELS)
    said = [f", {name} {environment[name]}" for name in names if name in environment]
    return "".join(said)


settle()
