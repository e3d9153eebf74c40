"""What a process takes to fine-tune is what the plan says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

CONSTANT = 48 << 20  # bytes: code that the first large step maps, stacks, the allocator's own


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["mixed_bf16", "fp32"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["full", "lora", "int8", "nf4"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_against_the_most_that_a_process_took(kind, precision, sparse):
    """Never more than the plan and a constant says, and not a tenth less."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    words = [kind, precision, "none", *(["moe"] if sparse else [])]
    program = ROOT / "tests" / "programs" / "tuning_peak.py"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    how = {"env": environment, "capture_output": True, "text": True, "check": True}
    out = subprocess.run([sys.executable, str(program), *words], **how).stdout
    found = json.loads(out.splitlines()[-1])
    planned, measured = found["total"], found["measured"]
    print(
        f"{' '.join(words)}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}, "
        f"{planned / measured:.2f}; {found['seconds']:.2f} s of CPU a step"
    )
    assert planned / 1.1 < measured < planned * 1.03 + CONSTANT
