"""`device: cuda` without a GPU: steps that never wait, evaluation, text, surgery, the way back.

The tests stand in fake_cuda_cases.py; they need a process of their own, see with_fake_cuda.py.
"""

import pytest
import torch
from conftest import run_python
from with_fake_cuda import compiler

pytestmark = [
    pytest.mark.skipif(not compiler(), reason="no C++ compiler, to tell torch of a GPU"),
    pytest.mark.skipif(bool(torch.version.cuda), reason="a CUDA build asks the real driver"),
]
CASES = "tests/runs/fake_cuda_cases.py"
TUNING = "tests/runs/fake_cuda_finetune_cases.py"
# at night: all kinds in all precisions, in parts, since no test may take 15 minutes
PARTS = {
    "steps": (CASES, "no_step or recomputed"),
    "runs": (CASES, "run_is_that or snapshot or resumed"),
    "others": (CASES, "not (no_step or recomputed or run_is_that or snapshot or resumed)"),
    "fine-tuning": (TUNING, "test"),
}


def run_cases(*words) -> None:
    words = ["tests/with_fake_cuda.py", "-p", "no:hypothesispytest", *words]
    done = run_python(*words, timeout=880)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_on_a_gpu_that_is_not_there():
    run_cases(CASES, TUNING, "-m", "not nightly")


@pytest.mark.nightly
@pytest.mark.parametrize("part", PARTS)
def test_every_kind_on_a_gpu_that_is_not_there(part):
    file, names = PARTS[part]
    run_cases(file, "-m", "nightly", "-k", names)
