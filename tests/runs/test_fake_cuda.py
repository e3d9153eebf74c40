"""`device: cuda` without a GPU: steps that never wait, evaluation, text, surgery, the way back.

The tests stand in fake_cuda_cases.py; they need a process of their own, see fake_cuda.py.
"""

import pytest
import torch
from conftest import run_python
from fake_cuda import compiler

pytestmark = [
    pytest.mark.skipif(not compiler(), reason="no C++ compiler, to tell torch of a GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has a GPU or knows that it has none"),
]
CASES = "tests/runs/fake_cuda_cases.py"


def run_cases(marked: str, timeout: int) -> None:
    words = ["tests/fake_cuda.py", CASES, "-m", marked, "-p", "no:hypothesispytest", "-q"]
    done = run_python(*words, timeout=timeout)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_on_a_gpu_that_is_not_there():
    run_cases("not nightly", 600)


@pytest.mark.nightly
def test_every_kind_on_a_gpu_that_is_not_there():
    run_cases("nightly", 3600)
