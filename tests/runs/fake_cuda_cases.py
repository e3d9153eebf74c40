"""On a GPU that is not there (fake_cuda.py); test_fake_cuda.py runs these in a process of their
own."""

import itertools

import fake_cuda
import pytest
import torch
from fake_cuda import READS, Event
from rig import finish
from sparse_models import KINDS

from lumen import machine
from train import Trainer

SPARE = {"n_experts": 4, "d_expert": 16, "n_experts_max": 6, "router": "sigmoid"}
MODELS = KINDS | {
    "lunaris": {"norm_order": "lunaris", "rope_first": True, "tie_embeddings": False},
    "noisy": {"n_experts": 4, "d_expert": 16, "router_jitter": 0.1, "capacity_factor": 1.0},
    "thinned": SPARE | {"expert_dropout": 0.3, "routing_temperature": 0.7},
    "annealed": {"mod_capacity": 0.25, "mod_anneal_steps": 8},
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    fake_cuda.plug_in(monkeypatch)
    # 8,192 rows and columns on a GPU
    monkeypatch.setattr(machine, "matrix_peak", lambda *_: 1e14)
    with fake_cuda.Gpu():
        yield


@pytest.fixture
def keys(tiny):
    """keys(**changes) -> a short run on the GPU, with everything on that a step may hold."""

    def make(model=None, **changes):
        run = {"device": "cuda", "z_loss": 1e-4, "expert_backend": "grouped_mm", "save_interval": 0}
        run |= {"log_interval": 2, "max_steps": 5, "orchestrator": {"check_interval": 2}}
        return tiny(model={"multiple_of": 8} | (model or {}), **run | changes)

    return make


def steady(trainer, steps=4) -> dict:
    """Iterations of a run that has begun; what the host has read of the device in them."""
    run = trainer.iterations()
    next(run)
    next(run)  # the first step is made
    with READS:
        for _ in itertools.islice(run, steps):
            pass
    run.close()
    trainer.close()
    return READS


def test_the_device_itself():
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.is_cuda and x.grad.inner.tolist() == [2, 2, 2]
    with READS:
        assert x.sum().item() == 3
        assert bool(x[0] == 1)
        x.tolist()
        x.cpu()
        torch.ones(2).to("cuda", non_blocking=True)
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        x[x > 1]
        x.detach()[x > 1] = 0.0
        x[torch.tensor([0, 1])]
    print(READS.lines)
    with pytest.raises(RuntimeError, match="is on the CPU"):
        x + torch.ones(3)


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16", "mixed_fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_never_waits_for_the_device(keys, kind, precision):
    steady(Trainer(keys(MODELS[kind], precision=precision))).are()
