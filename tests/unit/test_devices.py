"""Devices that are not here: what they cannot do, on fake tensors."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumen import experts, feed, machine, sums, tryout
from model import ModelConfig, Transformer

KINDS = {
    "moe": {"n_experts": 4, "d_expert": 32, "n_shared_experts": 1},
    "mod": {"mod_capacity": 0.5},
    "random": {"mod_capacity": 0.5, "mod_routing": "random"},
    "hybrid": {"n_experts": 4, "d_expert": 32, "mod_capacity": 0.5, "mod_every": 2},
}


class NoDoubles(TorchDispatchMode):
    """As on Apple's GPUs (MPS): there are no numbers in fp64. The meta device stands in for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and leaf.device.type == "meta":
                assert leaf.dtype != torch.float64, f"{func} makes fp64 on MPS"
        return out


@pytest.fixture
def mps(monkeypatch):
    assert sums.sum_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setattr(sums, "sum_dtype", lambda device: torch.float32)
    with NoDoubles():
        yield torch.device("meta")


def model_on(device, kind: str) -> tuple[Transformer, torch.Tensor]:
    cfg = ModelConfig(97, 32, 2, 2, d_ff=48, max_seq_len=16, **KINDS[kind])
    with torch.device(device):
        model = Transformer(cfg)
        for moe in model.sparse_layers("moe").values():
            moe.backend = "grouped_mm"
        return model, torch.zeros(2, 16, dtype=torch.long)


def test_the_stand_in_for_mps_refuses_fp64(mps):
    with pytest.raises(AssertionError, match="fp64"):
        torch.ones(3, device=mps).double()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_a_step_on_mps(mps, kind):
    """From the model to what goes to the host nothing is fp64."""
    model, ids = model_on(mps, kind)
    _, counted = model(ids, targets=ids)
    total = sums.empty_sums(model, mps)
    for name, value in counted.items():
        total[name] += value
    routing = experts.Routing(model)
    routing.sums = {name: total[name] for name in total if sums.of_layers(name)}
    vector, _ = sums.flatten(routing.numbers())
    assert vector.dtype == torch.float32


def test_numbers_come_to_the_host_from_any_device():
    """Statistics are counted from them in fp64: a run with experts or depths on MPS ended at its
    first, for to_host left the numbers where they were."""
    numbers = torch.arange(3.0)
    on_mps = SimpleNamespace(is_cuda=False, cpu=lambda: numbers)
    host, arrived = feed.to_host(on_mps)
    assert host is numbers and arrived is None
    assert feed.to_host(numbers)[0] is numbers  # a CPU's are there: no copy


def test_random_depths_by_the_causal_rule_on_mps(mps):
    """The hash of a position was divided in fp64."""
    model, _ = model_on(mps, "random")
    mod = next(iter(model.sparse_layers("mod").values()))
    kept = mod.causal_choice(torch.arange(16, device=mps).expand(2, 16), None)
    assert kept.dtype == torch.bool and kept.shape == (2, 16)


def test_errors_of_backends_on_mps(mps, monkeypatch):
    """They were compared in fp64: every backend had failed, and auto said why, wrongly."""
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.25)  # there is nothing in them
    got, want = (torch.ones(3, device=mps, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert tryout.relative_error([got], [want]) == 0.25


def test_a_measured_time_waits_for_the_device(monkeypatch):
    """Of any kind: else it is the time to queue."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in ("cpu", "mps", "cuda:1"):
        feed.synchronize(device)
    assert waited == ["mps", "cuda"]
    del waited[:]
    monkeypatch.setattr(tryout, "synchronize", waited.append)
    tryout.best_time(lambda: None, "mps")
    assert len(waited) == 6 and set(waited) == {"mps"}  # the warm-up too
    monkeypatch.setattr(machine, "synchronize", waited.append)
    machine.matrix_peak("cpu", seconds=0.0)
    assert waited[-1] == "cpu"


@pytest.mark.parametrize(
    ("tools", "triton", "why"),
    [
        (["gcc"], True, None),
        (["clang"], True, None),
        ([], True, "there is no C compiler"),
        (["gcc"], False, "triton is not installed"),
    ],
)
def test_auto_compiles_on_a_gpu_only_where_that_can_work(monkeypatch, tools, triton, why):
    """A "runtime" image of torch has no C compiler: the first step ended in Inductor."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: triton or None)
    notes = []
    assert machine.find_compilation("auto", "cuda", notes) is (why is None)
    assert len(notes) == (why is not None) and all(why in note for note in notes)
    assert machine.find_compilation(True, "cuda", []) is True  # who writes it has his reason
