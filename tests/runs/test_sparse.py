"""Sparse models in training: what the trainer draws, logs, saves and changes."""

import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import losses, read_lines
from forks import run_forked
from rig import faulty, finish, stop
from sparse_models import FINE, KINDS, config, ids

import sample
import train
from lumen import experts
from lumen.model_keys import idle
from model import Transformer
from model_moe import MoD
from train import Trainer, lr_at

SHORT = dict(
    save_interval=0, eval_tokens=64, expert_backend="slices"
)  # of a run: nothing is tried out at its start


@pytest.fixture
def tiny(tiny):
    """The tiny run of conftest, shorter: it saves and evaluates (two rows) at its end."""
    return lambda name="run", model=None, **changes: tiny(name, model, **SHORT | changes)


# ---------------------------------------------------------------- routing


def test_keys_without_their_switch_are_told(tiny, capsys):
    keys = {
        "router": "sigmoid",
        "moe_every": 2,
        "mod_every": 2,
        "mod_ffn_only": True,
        "d_expert": 16,
    }
    assert sorted(idle(config(**keys))) == sorted(keys) and not idle(config(**FINE))
    finish(tiny("run", keys, max_steps=1))
    said = capsys.readouterr().out
    assert "without effect" in said and "mod_ffn_only" in said


def test_expert_dropout_is_drawn_once_a_step_from_the_cursor(tiny, monkeypatch):
    seeds, masks, real = [], [], experts.draw_dropout

    def draw(layers, seed):
        real(layers, seed)
        seeds.append(seed)
        masks.append([m.router.dropped_out.clone() for m in layers])

    monkeypatch.setattr(train, "draw_dropout", draw)
    model = KINDS["mixtral"] | {"expert_dropout": 0.4}
    trainer = finish(tiny("a", model, max_steps=6))
    assert len(seeds) == len(set(seeds)) == 6 and len(masks[0]) == 2
    assert not any("dropped_out" in name for name in trainer.tensors())
    finish(tiny("b", model, max_steps=6, batch_size=1, gradient_accumulation_steps=4))
    assert seeds[6:] == seeds[:6], "of any split"
    loaded, *_ = sample.load(trainer.out, device="cpu", precision="fp32", say=lambda text: None)
    x = ids(1, 9)
    assert torch.equal(loaded(x), trainer.model.eval()(x)), "and made for sampling"


@pytest.mark.parametrize("kind", ("mixtral", "hybrid"))
def test_a_model_made_for_bf16_sampling_routes_as_in_training(kind, tiny):
    """sample.py casts the weights once; routers stay as they are, else another expert would be
    chosen."""
    trainer = finish(tiny("run", KINDS[kind], max_steps=2))
    loaded, *_ = sample.load(trainer.out, device="cpu", precision="bf16", say=lambda text: None)
    model, x = trainer.model.eval(), ids(2, 20)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_the_routers_learning_rate_survives_the_schedule(tiny):
    """Lunaris overwrites it in the first step."""
    for factor in (0.5, 0.0):
        trainer = Trainer(tiny(f"f{factor}", KINDS["hybrid"], router_lr_factor=factor, max_steps=6))
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.fit()
        routers = {n for n in before if ".router." in n or ".predictor." in n}
        lr = lr_at(trainer.cfg, trainer.run, 6)
        for group in trainer.optimizer.param_groups:
            mine = {
                n
                for n, p in trainer.model.named_parameters()
                if any(p is q for q in group["params"])
            }
            assert mine <= routers or not mine & routers
            assert group["lr"] == pytest.approx(lr * factor if mine <= routers else lr)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == set(before) - (routers if factor == 0 else set())


# ---------------------------------------------------------------- balance


def watch(monkeypatch) -> list:
    told, real = [], train.update_balance

    def update(layers, counts, bad):
        before = [m.router.bias.clone() for m in layers] + [m.router.load.clone() for m in layers]
        real(layers, counts, bad)
        after = [m.router.bias.clone() for m in layers] + [m.router.load.clone() for m in layers]
        told.append((torch.stack(list(counts)), bool(bad), before, after))

    monkeypatch.setattr(train, "update_balance", update)
    return told


def test_balance_is_updated_once_a_step_from_all_micro_steps(tiny, monkeypatch):
    told, runs = watch(monkeypatch), {}
    model = KINDS["fine"] | {"dropout": 0.0, "bias_update_rate": 0.01}
    for name, changes in {
        "four": dict(batch_size=1, gradient_accumulation_steps=4),
        "one": dict(batch_size=4, gradient_accumulation_steps=1),
        "recomputed": dict(
            batch_size=1, gradient_accumulation_steps=4, activation_checkpointing="block"
        ),
    }.items():
        finish(tiny(name, model, max_steps=4, **changes))
        runs[name] = told.copy()
        told.clear()
    for run in runs.values():
        assert len(run) == 4
        for counts, _, _, after in run:
            assert (counts.sum(1) == 4 * 32 * 2).all(), (
                "4 rows of 32 tokens, K = 2: neither more nor less"
            )
            for layer_counts, load in zip(counts, after[2:]):
                assert torch.allclose(load.double(), layer_counts / 256, atol=1e-6), (
                    "the load of the step"
                )
    for name in ("one", "recomputed"):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(runs["four"], runs[name])), name


def test_balance_stands_still_in_a_dropped_step(tiny, monkeypatch):
    told = watch(monkeypatch)
    keys = tiny("run", KINDS["fine"] | {"bias_update_rate": 0.01}, max_steps=4)
    finish(keys, faulty([3], value=math.nan))
    assert [bad for _, bad, *_ in told] == [False, False, True, False]
    for _, bad, before, after in told:
        assert all(torch.equal(a, b) for a, b in zip(before, after)) == bad


SPLIT = dict(aux_loss_weight=0.5, router_z_loss_weight=0.01, dropout=0.0)


@pytest.mark.parametrize("kind", ("null", "hybrid"))
def test_any_split_of_the_batch_trains_alike(tiny, kind):
    """The balance loss takes its loads from its row, MoD chooses row by row: a split changes
    neither."""
    model, found = KINDS[kind] | SPLIT, []
    for micro in (4, 1):
        rows = dict(batch_size=micro, gradient_accumulation_steps=4 // micro)
        trainer = finish(tiny(f"r{micro}", model, max_steps=8, **rows))
        found.append((losses(trainer.out), trainer.progress.val_loss))
    (a, val), (b, other) = found
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 and abs(val - other) < 1e-5


@pytest.mark.parametrize("kind", ("mixtral", "hybrid"))
def test_losses_are_logged_apart(tiny, kind):
    model = KINDS[kind] | SPLIT
    trainer = Trainer(tiny("run", model, max_steps=2))
    rows = [trainer.loader.batch(r, 2)[1:3] for r in (0, 2)]
    with torch.no_grad():
        ce = trainer.model.train()
        ce = [
            F.cross_entropy(trainer.model(torch.tensor(x)).flatten(0, 1), torch.tensor(y).flatten())
            for x, y in rows
        ]
        parts = [trainer.model(torch.tensor(x), targets=torch.tensor(y))[1] for x, y in rows]
    trainer.fit()
    row = next(r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r)
    assert row["loss"] == pytest.approx(np.mean([c.item() for c in ce]), abs=1e-5), (
        "the language model's alone"
    )
    balance = sum(p["moe.balance"].sum().item() for p in parts) / (4 * 32)
    assert row["aux_loss"] == pytest.approx(0.5 * balance, rel=1e-4), (
        "weight x what all layers add up to"
    )
    z = sum(p["moe.z"].sum().item() for p in parts) / (4 * 32)
    assert row["router_z_loss"] == pytest.approx(0.01 * z, rel=1e-4) and row["router_z_loss"] > 0
    if kind == "hybrid":
        bce = sum(p["mod.bce"].sum().item() for p in parts) / (4 * 32)
        assert row["mod_loss"] == pytest.approx(MoD.BCE_WEIGHT * bce, rel=1e-4)
    else:
        assert "mod_loss" not in row


# ---------------------------------------------------------------- statistics


def test_the_trainers_statistics(tiny):
    trainer = Trainer(tiny("run", KINDS["hybrid"] | {"capacity_factor": 1.0}, max_steps=3))
    for ask in (trainer.get_expert_statistics, trainer.get_mod_statistics):
        assert ask()["refused"] == "E308" and "made no step yet" in ask()["reason"]
    trainer.fit()
    found = trainer.get_expert_statistics()
    keys = {"per_expert_utilization", "routing_entropy", "load_balance_loss", "tokens_dropped"}
    for row in (found, *found["layers"].values()):
        assert keys <= set(row)
        assert len(row["per_expert_utilization"]) == 8 and sum(
            row["per_expert_utilization"]
        ) == pytest.approx(1)
        assert 0 < row["routing_entropy"] <= row["max_entropy"] == pytest.approx(math.log(8))
    assert list(found["layers"]) == [0, 1]
    assert found["tokens_dropped"] == sum(r["tokens_dropped"] for r in found["layers"].values()) > 0
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r][-1]
    assert row["experts/share/1"] == pytest.approx(found["layers"][1]["per_expert_utilization"])
    assert row["experts/tokens_dropped"] == found["tokens_dropped"]
    found = trainer.get_mod_statistics()
    tokens = 4 * 32  # of a step
    assert found["capacity_factor"] == 0.5 and found["per_layer_usage"] == {0: 0.5, 1: 0.5}
    assert (found["tokens_processed"], found["tokens_skipped"]) == (tokens, tokens)
    assert (found["average_depth"], found["average_depth_fraction"]) == (1.0, 0.5)
    assert len(found["position_usage"]) == 32 and np.mean(found["position_usage"]) == pytest.approx(
        0.5
    )
    assert 0 <= min(found["position_usage"]) and max(found["position_usage"]) <= 1
    dense = Transformer(config(**FINE)).flops_per_token()
    assert found["compute_savings"] == pytest.approx(1 - trainer.model.flops_per_token() / dense)
    json.dumps(found), json.dumps(trainer.get_expert_statistics())


def test_a_dense_model_refuses_with_a_code(tiny):
    trainer = finish(tiny(max_steps=1))
    calls = [
        trainer.get_expert_statistics,
        trainer.get_mod_statistics,
        lambda: trainer.add_expert(0),
    ]
    calls += [
        lambda: trainer.prune_expert(0, 1),
        lambda: trainer.restore_expert(0, 1),
        lambda: trainer.recycle_expert(1),
    ]
    for call in calls:
        answer = call()
        assert answer["refused"] == "E308" and answer["reason"]
    assert [d["action"] for d in read_lines(trainer.out / "decisions.jsonl")][
        -1
    ] == "recycle_expert"


# ---------------------------------------------------------------- Mixture of Depths


def test_a_run_anneals(tiny):
    trainer = finish(tiny("run", dict(mod_capacity=0.25, mod_anneal_steps=8), max_steps=10))
    rows = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r]
    want = [1 - 0.75 * min(8, s) / 8 for s in range(10)]
    assert [r["depth/capacity_factor"] for r in rows] == pytest.approx(want)
    assert [r["depth/usage/0"] for r in rows] == pytest.approx(
        [math.ceil(32 * c) / 32 for c in want]
    )


def test_statistics_while_annealing_say_what_is_saved_now(tiny):
    trainer = finish(tiny("run", dict(mod_capacity=0.25, mod_anneal_steps=1000), max_steps=2))
    found = trainer.get_mod_statistics()
    assert found["capacity_factor"] == 1.0 and -0.01 < found["compute_savings"] <= 0


@pytest.mark.parametrize("kind", ("mod", "mod random", "beside"))
def test_evaluation_reports_both_rules(tiny, kind):
    trainer = finish(tiny("run", KINDS[kind], max_steps=6, learning_rate=1e-2))
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "val_loss" in r][-1]
    assert row["mod_gap"] == pytest.approx(row["val_loss"] - row["val_loss_as_trained"])
    model, sums = trainer.model.eval(), {}
    windows = torch.tensor(
        np.stack([trainer.data.val_sources[n].window(i) for n, i in trainer.val_set])
    ).long()
    with torch.no_grad():
        for causal in (True, False):
            model.causal = causal
            logits = model(windows[:, :-1])
            sums[causal] = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        model.causal = True
        depth = model(windows[:, :-1], targets=windows[:, 1:])[1]["depth"] / windows[:, 1:].numel()
    assert row["val_loss"] == pytest.approx(sums[True], abs=1e-5)
    assert row["val_loss_as_trained"] == pytest.approx(sums[False], abs=1e-5)
    assert row["mod_depth"] == pytest.approx((2 - (1 - depth[:, 0]).sum()).item(), abs=1e-5)
    assert row["mod_agreement"] == pytest.approx(depth[:, 1].mean().item(), abs=1e-5)
    assert (row["mod_gap"] != 0) == (kind != "mod random") and (row["mod_agreement"] == 1) == (
        kind == "mod random"
    )


# ---------------------------------------------------------------- slots and surgery


def test_more_slots_for_a_run_that_goes_on(tiny):
    """init_from with a larger n_experts_max: the same experts, the same null experts, the same
    text."""
    for i, (kind, slots) in enumerate((("slots", 6), ("null", 6), ("null", 0))):
        model = KINDS[kind] | {"n_experts_max": slots}
        first = finish(tiny(f"a{i}", model, max_steps=3))
        moved = model | {"n_experts_max": 9}
        second = Trainer(tiny(f"b{i}", moved, max_steps=3, init_from=str(first.out)))
        x = ids(2, 32)
        with torch.no_grad():
            assert torch.allclose(second.model.eval()(x), first.model.eval()(x), atol=1e-6), (
                kind,
                slots,
            )
        assert (second.model.blocks[0].ffn.router.retired == -1).all(), "steps of another run"
        assert "refused" not in second.add_expert(0)
        second.close()


def test_how_often_is_logged_changes_nothing(tiny):
    """Twins are released while training, at steps that have nothing to do with what is printed."""
    found = []
    for every in (1, 4):
        keys = tiny(
            f"l{every}", KINDS["slots"], max_steps=8, log_interval=every, learning_rate=1e-2
        )
        found.append(finish(keys, steps={1: lambda t: t.add_expert(0)}).tensors())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_two_ranks_do_what_one_does(tiny, tmp_path):
    """Experts inside MoD split, pruned and restored mid-run: equal bits on both ranks, the losses
    of one process (4 micro-steps against 2 x 2), and a run resumed after a split is the run never
    stopped, bit for bit."""
    model = (
        KINDS["slots"] | SPLIT | {"bias_update_rate": 0.01, "mod_capacity": 0.5, "mod_layers": [1]}
    )
    plan = {
        2: [["add_expert", 0], ["add_expert", 1, 2]],
        4: [["prune_expert", 0, 1, True], ["recycle_expert", 1]],
    }
    plan[5] = [["add_expert", 0, 3], ["restore_expert", 0, 1]]
    one = tiny("one", model, max_steps=7, batch_size=1, gradient_accumulation_steps=4)
    many, parts = (
        tiny(n, model, max_steps=7, batch_size=1, gradient_accumulation_steps=2)
        for n in ("many", "parts")
    )

    def act(trainer):
        for name, *args in plan[trainer.step]:
            getattr(trainer, name)(*args)

    single = finish(one, steps={step: act for step in plan})
    many, parts = {"config": many, "digest": True}, {"config": parts, "digest": True}
    later = {step: plan[step] for step in (4, 5)}
    jobs = [many | {"do": plan}, parts | {"do": plan, "stop_at": 3}, parts | {"do": later}]
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    said = [
        json.loads(line.split("RANKS ")[1])
        for line in result.stdout.splitlines()
        if "RANKS " in line
    ]
    assert [s["same"] for s in said] == [True] * 3, "bits and statistics of the ranks"
    assert said[0]["digest"] == said[2]["digest"] != said[1]["digest"], (
        "resumed equals uninterrupted"
    )
    a, b = losses(one["out_dir"]), losses(many["config"]["out_dir"])
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-5
    decisions = [read_lines(f"{k['out_dir']}/decisions.jsonl") for k in (one, many["config"])]
    decisions = [
        [{k: v for k, v in row.items() if k not in ("time", "ranks")} for row in rows]
        for rows in decisions
    ]
    assert decisions[0] == decisions[1] and len(decisions[0]) == 6
    assert [d.get("expert") for d in decisions[0][:2]] == [4, 4] and decisions[0][1]["parent"] == 2
    assert "refused" not in decisions[0][0] and single.model.blocks[0].ffn.router.alive.sum() == 6


@pytest.mark.parametrize("kind", ("slots", "hybrid"))
def test_resume_is_exact(tiny, kind):
    """One process: buffers (bias, loads, slots) come back, dropout of experts and jitter need no
    state."""
    model = KINDS[kind] | {
        "expert_dropout": 0.2,
        "router_jitter": 0.1,
        "bias_update_rate": 0.01,
        "mod_anneal_steps": 6,
    }
    changes = {2: lambda t: t.add_expert(0)} if kind == "slots" else {}
    whole = finish(tiny("whole", model, max_steps=6), steps=changes)
    assert finish(tiny("parts", model, max_steps=6), steps=changes | {3: stop}).step < 6
    parts = finish(tiny("parts", model, max_steps=6))
    a, b = whole.tensors(), parts.tensors()
    assert parts.step == 6 and all(torch.equal(a[k], b[k]) for k in a)
    if kind == "slots":
        assert (
            "model.blocks.0.ffn.router.alive" in a
            and parts.model.blocks[0].ffn.router.alive.sum() == 5
        )
