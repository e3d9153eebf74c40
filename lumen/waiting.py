"""How the threads of a CPU wait for one another. Every command imports this before torch.

torch's threads are libgomp's, which reads the environment once, as torch is imported. Unless told
otherwise they spin for milliseconds after each operation before they sleep, on cores that somebody
else may need: beside one busy process a step of the quickstart took 3 to 10 times as long (`python
-m tools.bench threads`). So they spin for some microseconds, which covers what lies between two
operations. Where other threads than libgomp's are at work, or one alone, this does nothing.
"""

from __future__ import annotations

import os
import sys

import lumen.early  # noqa: F401 - for Ctrl-C while torch is imported

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "1000"


def settle(environment=os.environ, modules=sys.modules) -> None:
    """Says it to libgomp, unless the user has said something, or libgomp is there already."""
    if "torch" not in modules and not any(name in environment for name in NAMES):
        environment[NAMES[0]] = SPINS


def words(environment=os.environ) -> str:
    """What was said, for the line of the device: ", GOMP_SPINCOUNT 1000"; "": nothing."""
    said = [f", {name} {environment[name]}" for name in NAMES if name in environment]
    return "".join(said)


settle()
