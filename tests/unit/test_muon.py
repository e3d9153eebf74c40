"""lumen/muon.py and optim.Muon: what it computes, on one process."""

import math

import pytest
import torch

from lumen import muon, plan
from lumen.config import build_config
from lumen.optim import Muon, build_optimizer, state_bytes
from model import Transformer
from tools.simulate import HARDWARE, Assumed, muon_seconds, simulate_step

SHAPE = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
SHAPE |= {"max_seq_len": 16}
MOE = SHAPE | {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 24, "n_shared_experts": 1}


def config(model=SHAPE, **keys):
    fixed = {"data_dir": "x", "optimizer": "muon", "learning_rate": 3e-4}
    keys = fixed | {"model": dict(model)} | keys
    return build_config(keys, lambda key: "test", [])


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """A model whose gradients are drawn."""

    def __init__(self, cfg, precision="fp32"):
        self.model = Transformer(cfg.model)
        self.model.init_weights(1)
        self.named = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(cfg, self.named, precision)

    def step(self, seed=0, skip=False, grads=None) -> None:
        for i, (name, p) in enumerate(self.named.items()):
            p.grad = normal(*p.shape, seed=1000 * seed + i) if grads is None else grads(name, p)
        self.optimizer.found_inf = torch.tensor(float(skip))
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.named)
        for name, p in self.named.items():
            found |= {f"{name}.{key}": t for key, t in self.optimizer.state[p].items()}
        return {name: t.detach().clone() for name, t in found.items()}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32)


# ---------------------------------------------------------------- orthogonalising


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (3, 40, 64), (3, 64, 40)])
def test_singular_values_become_about_one(shape, dtype):
    """Also those of a matrix whose own reach from 1 down to 1/100, in bf16 as in fp32: in the band
    that five steps of the polynomials leave, and around 1."""
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    g = (u * torch.logspace(0, -2, min(shape[-2:]))) @ v
    x = muon.orthogonalise(g.to(dtype)).float()
    singular = torch.linalg.svdvals(x)
    assert 0.85 < singular.min() and singular.max() < 1.15
    assert abs(singular.mean() - 1) < 0.03
    assert (x - u @ v).norm() < 0.12 * (u @ v).norm()


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_golden_against_torchs_muon(precision, monkeypatch):
    """torch.optim.Muon on a 2-D matrix: its Newton-Schulz coefficients, momentum and rate.

    In fp32, for which its cast to bf16 is taken out, products differ by their rounding only: 1e-4
    of a step's largest entry, where five steps of coefficients beyond 4 amplify 1e-7. In bf16, as
    it is, both are as far from the exact as roundings of 2^-8 let them: about 3 % of an entry."""

    class Theirs(Muon):
        polynomials, margin = ((3.4445, -4.7750, 2.0315),) * 5, 1.0
        FIRST = 1.0  # no warm-up

    limit = 0.08
    if precision == "fp32":
        limit = 1e-4
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    rate = 0.01
    for shape in ((48, 80), (80, 48)):
        a, b = (torch.nn.Parameter(normal(*shape, seed=3)) for _ in range(2))
        group = {"params": [a], "weight_decay": 0.0, "lr_factor": 1.0}
        group["matrices"] = [muon.Matrix("w", shape, (shape[0],))]
        mine = Theirs([group], config(learning_rate=rate), precision)
        mine.found_inf = torch.zeros(())
        how = {"weight_decay": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        theirs = torch.optim.Muon([b], lr=rate, **how)
        for seed in range(6):
            was = a.detach().clone(), b.detach().clone()
            a.grad, b.grad = (normal(*shape, seed=seed) for _ in range(2))
            mine.step()
            theirs.step()
            moved, wanted = a - was[0], b - was[1]
            assert wanted.abs().max() > 0.1 * rate
            assert (moved - wanted).abs().max() <= limit * wanted.abs().max()


def test_fused_matrices_are_taken_by_their_parts():
    """Queries, keys, values; gate and up; each expert: as if each stood alone."""
    cfg = config(MOE)
    run = Run(cfg)
    before = run.tensors()
    run.step(grads=lambda name, p: normal(*p.shape, seed=len(name)))
    moved = {n: (before[n] - p.detach()) / cfg.learning_rate for n, p in run.named.items()}

    def update(name, at, weight):
        g = normal(*run.named[name].shape, seed=len(name))[at]
        x = muon.orthogonalise(g) * 0.2 * max(g.shape) ** 0.5
        return x + cfg.weight_decay * weight[at] * (x * weight[at] > 0)

    wanted = {"blocks.0.attn.wqkv.weight": [slice(0, 32), slice(32, 48), slice(48, 64)]}
    wanted["blocks.1.ffn.shared.w13.weight"] = [slice(0, 24), slice(24, 48)]
    wanted["blocks.1.attn.wo.weight"] = [slice(0, 32)]
    wanted["blocks.0.ffn.experts.w13"] = [
        (e, slice(24 * i, 24 * i + 24)) for e in (0, 3) for i in (0, 1)
    ]
    wanted["blocks.0.ffn.experts.w2"] = [1, 2]
    for name, places in wanted.items():
        for at in places:
            expected = update(name, at, before[name])
            torch.testing.assert_close(moved[name][at], expected, rtol=1e-3, atol=1e-3)
    rest = [p for g in run.optimizer.rest.param_groups for p in g["params"]]
    names = {name for name, p in run.named.items() if any(p is q for q in rest)}
    assert all(
        name.endswith("norm.weight") or "router" in name or "embed" in name for name in names
    )
    assert len(names) + len(run.optimizer.own["params"]) == len(run.named)


def test_an_update_has_adamws_size():
    run = Run(config(weight_decay=0.0))
    for seed in range(3):
        before = run.tensors()
        run.step(seed)
    for name in ("blocks.0.ffn.w13.weight", "blocks.1.attn.wqkv.weight", "blocks.0.ffn.w2.weight"):
        size = (before[name] - run.named[name]).square().mean().sqrt() / 3e-4
        assert 0.17 < size < 0.23, name


def test_the_momentum_rises_to_what_is_written():
    """From 0.85 over 300 steps; one that is lower from the start stays as it is."""
    for written, wanted in ((0.95, (0.85, 0.90, 0.95)), (0.5, (0.5, 0.5, 0.5))):
        run = Run(config(momentum=written))
        name = "blocks.0.attn.wo.weight"
        state = run.optimizer.state[run.named[name]]
        for count, mu in zip((0, 150, 1000), wanted):
            for p in run.optimizer.own["params"]:
                run.optimizer.state[p]["step"].fill_(count)
            state["momentum"].zero_()
            run.step(grads=lambda name, p: torch.ones_like(p))
            torch.testing.assert_close(state["momentum"].mean(), torch.tensor(1 - mu))


# ---------------------------------------------------------------- what an optimizer promises


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_no_bit(bad, precision):
    """Of weights, state and counts, whatever the gradients are; nor of zeros' signs."""
    run = Run(config(MOE), precision)
    run.step(1)
    with torch.no_grad():
        for p in run.optimizer.own["params"]:
            p.view(-1)[:4] = torch.tensor([-0.0, 0.0, -1e-40, 1e-40])
            run.optimizer.state[p]["momentum"].view(-1)[:4] = torch.tensor([-0.0, 0.0, -1e-40, 1.0])
    before = run.tensors()

    def grads(name, p):
        g = normal(*p.shape, seed=5)
        g.view(-1)[::3] *= bad
        return g

    run.step(skip=True, grads=grads)
    after = run.tensors()
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before)
    run.step(2)
    assert any((after[name] != t).any() for name, t in run.tensors().items())


def test_what_has_no_gradient_stays():
    """Empty slots: they neither move nor decay."""
    run = Run(config(MOE))
    before = run.tensors()

    def grads(name, p):
        g = normal(*p.shape)
        if "experts" in name:
            g[2] = 0
        return g

    for _ in range(2):
        run.step(grads=grads)
    for name in ("blocks.0.ffn.experts.w13", "blocks.1.ffn.experts.w2"):
        assert torch.equal(before[name][2], run.named[name][2])
        assert not torch.equal(before[name][1], run.named[name][1])


def test_state_is_there_at_once_and_planned():
    cfg = config(MOE)
    run = Run(cfg)
    shapes = [(name, tuple(p.shape)) for name, p in run.named.items()]
    held = sum(
        t.nbytes for p in run.named.values() for t in run.optimizer.state[p].values() if t.dim()
    )
    assert held == state_bytes(cfg).of(shapes)
    counted = plan.on_meta(cfg.model)
    layout = plan.Layout(cuda=False, state_bytes=state_bytes(cfg))
    assert plan.rank_memory(counted, layout, 1, 1, "fp32")["moments"] == held
    adamw = plan.rank_memory(counted, plan.Layout(cuda=False), 1, 1, "fp32")["moments"]
    assert held < 0.7 * adamw
    shards = plan.Layout(4, 3, cuda=False, state_bytes=state_bytes(cfg))
    part = plan.rank_memory(counted, shards, 1, 1, "fp32")
    assert part["moments"] == pytest.approx(
        part["weights"] * held / sum(4 * p.numel() for p in run.named.values()), abs=1
    )


def test_work_of_large_matrices_is_in_the_plan():
    """One short row: the optimizer holds most then."""
    cfg = config(SHAPE | {"d_model": 512, "d_ff": 2048, "max_seq_len": 1, "vocab_size": 8})
    counted = plan.on_meta(cfg.model)
    found = {}
    for world in (1, 4):
        layout = plan.Layout(world, 3 if world > 1 else 0, cuda=False, state_bytes=state_bytes(cfg))
        found[world] = plan.rank_memory(counted, layout, 1, 1, "fp32")
        assert found[world]["peak"] == "optimizer", found[world]
    matrix = 4 * 2 * 512 * 2048  # gate and up
    assert 2 * matrix <= found[1]["work"] <= 4 * matrix
    assert 6 * matrix <= found[4]["work"] <= 8 * matrix


def test_the_dry_run_counts_its_time_and_traffic():
    """Beside AdamW's: FLOPs that the ranks share, results to replicas, shards there and back."""
    cfg = config(SHAPE)
    counted = plan.on_meta(cfg.model)
    hardware, step = HARDWARE["h100"], plan.StepShape(1, 1, "mixed_bf16")
    hidden = sum(
        math.prod(m.shape) for m in muon.hidden_matrices(plan.all_shapes(counted), cfg.model)
    )
    for shape, kind, travels in (
        ((4, 0), "all-gather", 2 * hidden),
        ((4, 3), "all-to-all", hidden),
    ):
        found = []
        for held in (state_bytes(cfg), plan.StateBytes()):
            layout = plan.Layout(*shape, state_bytes=held)
            found.append(simulate_step(counted, layout, step, hardware, Assumed(mfu=0.4)))
        mine, adamw = [sum(size for size, *_ in x.traffic[kind]) for x in found]
        assert mine - adamw == travels
        flops = muon.step_flops(plan.all_shapes(counted), cfg.model) / 4
        assert muon_seconds(counted, found[0].layout, step, hardware, Assumed(mfu=0.4)) == (
            flops / (0.4 * hardware.peak("mixed_bf16"))
        )
