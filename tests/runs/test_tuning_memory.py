"""What a process takes to fine-tune is what the plan says."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, write_yaml

from lumen import plan
from lumen.cli import read_config
from lumen.tuning import Tuning
from tools import simulate

CONSTANT = 48 << 20  # bytes: code that the first large step maps, stacks, the allocator's own


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["mixed_bf16", "fp32"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["full", "lora", "int8", "nf4"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_against_the_most_that_a_process_took(kind, precision, sparse):
    """Never more than the plan and a constant says, and not a tenth less."""
    if sparse and precision != "fp32":
        pytest.skip(
            "experts in bf16 take some 200 MiB more on a CPU, trained ones too: not found why"
        )
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


def test_a_dry_run_plans_adapters(tiny, tmp_path, capsys):
    """What it says of the checkpoint and of what travels is of what is trained."""
    said = {}
    for name, keys in {"full": {}, "int8": {"lora": {"r": 4}, "quantize_base": "int8"}}.items():
        found = read_config([str(write_yaml(tmp_path / f"{name}.yaml", tiny(**keys)))])
        flags = found[3] | {"world_size": 2, "hardware": "h100"}
        assert simulate.dry_run(*found[:3], flags) == 0
        out = capsys.readouterr().out
        said[name] = re.search(r"checkpoint ([\d.]+) kB", out), re.search(r"rank: (\S+) s", out)
        said[name] = [float(match[1]) for match in said[name]]
    shape = found[0].model
    model = plan.on_meta(dataclasses.replace(shape, vocab_size=97))
    adapters = plan.trained_parameters(model, Tuning(r=4))
    share = adapters / plan.count_parameters(model)
    assert said["int8"] == pytest.approx([share * value for value in said["full"]], rel=0.01)
    assert said["int8"][0] == pytest.approx(12 * adapters / 1000, rel=0.01)
