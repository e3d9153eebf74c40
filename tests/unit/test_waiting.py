"""How OpenMP's threads wait is said before torch is imported, and only where nobody else has."""

import ast
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from lumen import early, waiting

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


# ---------------------------------------------------------------- Ctrl-C, in the first seconds


def interrupted(folder, command, ignored=False):
    """That command, to which Ctrl-C comes as it imports numpy or torch."""
    folder.mkdir()
    for name in ("numpy", "torch"):
        text = (
            "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('alive')\n"
        )
        (folder / f"{name}.py").write_text(text)
    action = signal.SIG_IGN if ignored else signal.default_int_handler
    return subprocess.run(
        [sys.executable, command, "--help"],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, action),
    )


def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_word(tmp_path):
    """All of them are asked, so that a new one is too."""
    commands = [p.name for p in ROOT.glob("*.py") if "command(main" in p.read_text()]
    assert sorted(commands) == sorted(f"{name}.py" for name in early.COMMANDS)
    for name in commands:
        done = interrupted(tmp_path / name, name)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, ""), name  # 130 in a shell


def test_ctrl_c_that_is_ignored_stays_so_and_other_programs_keep_theirs(tmp_path):
    done = interrupted(tmp_path / "ignored", "sample.py", ignored=True)
    assert done.returncode == 1 and "alive" in done.stderr
    mine = tmp_path / "mine.py"
    mine.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n")
    assert "KeyboardInterrupt" in interrupted(tmp_path / "mine", mine).stderr


def test_what_is_said_and_when_not():
    said = {}
    waiting.settle(said, modules={})
    assert said == {"GOMP_SPINCOUNT": waiting.SPINS, waiting.KERNELS: waiting.REMEMBERED}
    assert waiting.words(said) == f", GOMP_SPINCOUNT {waiting.SPINS}, {waiting.KERNELS} 4096"
    theirs = {waiting.KERNELS: "7", "OMP_WAIT_POLICY": "passive"}
    waiting.settle(theirs, modules={})
    assert theirs == {waiting.KERNELS: "7", "OMP_WAIT_POLICY": "passive"}, "the user is heard first"
    late = {}
    waiting.settle(late, modules={"torch": None})  # a notebook: libgomp has read all it ever will
    assert late == {} and waiting.words(late) == ""
