"""What lumen/optim.py promises of an optimizer, held over every class of OPTIMIZERS."""

import pytest
import torch

from lumen.config import build_config
from lumen.optim import OPTIMIZERS, build_optimizer, state_bytes, step_optimizer
from model import Transformer

MODEL = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}
MODEL |= {"n_experts": 4, "d_expert": 24, "moe_layers": [1], "n_experts_max": 5}


class Run:
    """A model whose gradients are drawn; the rates of routers and embedding are their own."""

    def __init__(self, kind: str, precision: str = "fp32"):
        keys = {"data_dir": "x", "learning_rate": 1e-2, "model": dict(MODEL), "optimizer": kind}
        keys |= {"router_lr_factor": 0.5, "embedding_lr_factor": 2.0}
        self.cfg = build_config(keys, lambda key: "test", [])
        self.model = Transformer(self.cfg.model)
        self.model.init_weights(1)
        self.named = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.cfg, self.named, precision)

    def step(self, seed: int, skip=False, factor=1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.named.values():
            p.grad = torch.randn(p.shape, generator=generator) * factor
        weights = list(self.named.values())
        step_optimizer(self.optimizer, weights, torch.tensor(1.0), torch.tensor(skip))

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.named)
        for name, p in self.named.items():
            found |= {f"{name}.{key}": t for key, t in self.optimizer.state[p].items()}
        return {name: t.detach().clone() for name, t in found.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_there_at_once(kind):
    """Promise 1: before the first step, and no step adds to it or makes it anew."""
    run = Run(kind)
    before = {name: t for p in run.named.values() for name, t in run.optimizer.state[p].items()}
    places = {id(t) for p in run.named.values() for t in run.optimizer.state[p].values()}
    for name, p in run.named.items():
        for key, t in run.optimizer.state[p].items():
            assert t.shape in (p.shape, ()), f"{name}: {key} has the shape {tuple(t.shape)}"
    assert before, "an optimizer without state would have nothing to resume"
    run.step(0)
    assert {id(t) for p in run.named.values() for t in run.optimizer.state[p].values()} == places


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
@pytest.mark.parametrize("bad", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_changes_no_bit(kind, bad, precision):
    """Promise 2: weights, state and counts stay, whatever the gradients are; and the next step is
    the one that would have come without it."""
    run, other = Run(kind, precision), Run(kind, precision)
    run.step(1)
    other.step(1)
    before = run.tensors()
    run.step(2, skip=True, factor=bad)
    changed = [name for name, t in run.tensors().items() if not torch.equal(t, before[name])]
    assert not changed, (
        f"a step with found_inf at 1 changed {changed[:3]}: use torch.where, not a factor"
    )
    run.step(3)
    other.step(3)
    after = other.tensors()
    assert all(torch.equal(t, after[name]) for name, t in run.tensors().items())
    assert all(not torch.equal(after[name], before[name]) for name in run.named), "nothing moved"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_its_class_says_is_so(kind):
    """Promises 3 and 4: names of first moments, one a parameter, and bytes."""
    run, made = Run(kind), OPTIMIZERS[kind]
    for name, p in run.named.items():
        state = run.optimizer.state[p]
        assert len(set(made.FRESH) & set(state)) == 1, f"{name}: FRESH {made.FRESH} of {[*state]}"
        assert all(state[key].shape == p.shape for key in set(made.FRESH) & set(state))
    shapes = [(name, tuple(p.shape)) for name, p in run.named.items()]
    states = [run.optimizer.state[p] for p in run.named.values()]
    held = sum(t.nbytes for state in states for t in state.values() if t.dim())
    assert held == state_bytes(run.cfg).of(shapes)
    assert made.RATE > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_its_groups_bear_their_rates(kind):
    """Promise 5: each parameter in one group, with what the schedule and the knobs set there."""
    run = Run(kind)
    factors = {
        id(p): group["lr_factor"] for group in run.optimizer.param_groups for p in group["params"]
    }
    assert factors.keys() == {id(p) for p in run.named.values()}
    assert factors[id(run.named["embed.weight"])] == 2.0
    assert {factors[id(p)] for name, p in run.named.items() if "router" in name} == {0.5}
    for group in run.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        assert group.keys() >= {"lr", "weight_decay", "lr_factor"}
    before = run.tensors()
    run.step(0)
    after = run.tensors()
    assert all(torch.equal(before[name], after[name]) for name in run.named), "group['lr'] is 0"
