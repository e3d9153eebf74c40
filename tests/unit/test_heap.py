"""What malloc keeps of what a step has freed: asked once, on a CPU, unless the user has spoken."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from lumen import heap, setup
from model import ModelConfig, Transformer

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is asked")

# frees and takes 40 MB ten times over, and says how many pages the system had to hand out anew
PROGRAM = """
import ctypes, resource
from lumen import heap
libc = ctypes.CDLL(None)  # numpy asks for huge pages, which are few
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
kept = heap.keep_pages(8e9)
for turn in range(11):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(40 << 20)
    libc.memset(block, 1, 40 << 20)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(**environment) -> tuple[str, int]:
    env = {name: value for name, value in os.environ.items() if name not in heap.NAMES}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=env | environment, cwd=ROOT, capture_output=True, text=True)
    kept, n = done.stdout.split()
    return kept, int(n)


@LINUX
def test_what_a_step_frees_it_gets_again_without_the_system():
    each = (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    # a word that changes nothing: the user has spoken
    kept, n = pages(GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert kept == "False" and n > 9 * each
    kept, n = pages()
    assert kept == "True" and n < each


def test_the_user_is_heard_first():
    for name in heap.NAMES:
        assert not heap.keep_pages(8e9, {name: "65536"})
    assert not heap.keep_pages(8e9, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"})


@LINUX
def test_an_old_glibc_gets_what_it_takes(monkeypatch):
    said = {}

    def mallopt(which, value):
        taken = which != heap.M_MMAP_THRESHOLD or value <= heap.OLD_LIMIT
        said.update({which: value} if taken else {})
        return int(taken)

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert heap.keep_pages(8e9, {})
    assert said == {heap.M_MMAP_THRESHOLD: 1 << 25, heap.M_TRIM_THRESHOLD: 10**9}
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    assert not heap.keep_pages(8e9, {})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_on_a_cpu_keeps_its_pages(device, monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "keep_pages", asked.append)
    run = SimpleNamespace(device=device, loss="", attention="sdpa", precision="fp32")
    run.compile_model, run.expert_backend = False, "slices"
    cfg = SimpleNamespace(z_loss=0.0, activation_checkpointing="none")
    shape = {"vocab_size": 16, "d_model": 16, "n_layers": 1, "n_heads": 1, "d_ff": 16}
    setup.prepare_model(Transformer(ModelConfig(**shape)), cfg, run, None)
    assert len(asked) == (device == "cpu")
