"""How OpenMP's threads wait is said before torch is imported, and only where nobody else has."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lumen import waiting

COMMANDS = ("train", "train_fsdp", "finetune", "sample", "serve", "evaluate", "export")


def displayed(**environment) -> list[str]:
    """What libgomp says of itself as train.py is imported: of each of NAMES the line."""
    env = {name: value for name, value in os.environ.items() if name not in waiting.NAMES}
    env |= {"OMP_DISPLAY_ENV": "verbose"} | environment
    # in train.py's order, without its seconds
    program = "import lumen.waiting, torch"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split("]")[-1].strip() for line in done.stderr.splitlines()]
    return [line for line in lines if line.startswith(waiting.NAMES)]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are libgomp's on Linux")
def test_libgomp_hears_it_and_the_user_is_heard_first():
    assert f"GOMP_SPINCOUNT = '{waiting.SPINS}'" in displayed()
    assert "GOMP_SPINCOUNT = '77'" in displayed(GOMP_SPINCOUNT="77")
    passive = displayed(OMP_WAIT_POLICY="passive")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in passive and "GOMP_SPINCOUNT = '0'" in passive


@pytest.mark.parametrize("name", [*COMMANDS, "tools/bench"])
def test_every_command_says_it_before_anything_imports_torch(name):
    imported = []
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
    ours = [n for n in imported if n.partition(".")[0] not in sys.stdlib_module_names]
    assert ours[0] == "lumen.waiting"


def test_what_is_said_and_when_not():
    said = {}
    waiting.settle(said, modules={})
    assert said == {"GOMP_SPINCOUNT": waiting.SPINS}
    assert waiting.words(said) == f", GOMP_SPINCOUNT {waiting.SPINS}"
    late = {}
    waiting.settle(late, modules={"torch": None})  # a notebook: libgomp has read all it ever will
    assert late == {} and waiting.words(late) == ""
