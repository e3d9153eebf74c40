"""People steer a run: control.jsonl, the eighteen methods, replay of what was done."""

import json
import math

import pytest
from conftest import losses, read_lines
from rig import KINDS, LONG, MOE, at_iteration, decisions, equal, finish, glitch, tensors

from lumen import checkpoint, forecast
from lumen.commands import ARGUMENTS, METHODS
from lumen.errors import UserError
from train import Parallel, Trainer

# ---------------------------------------------------------------- replay


def test_replay_gives_the_same_bytes(tiny):
    """A run with an explosion, a NaN, a rollback and commands, which died once and was stopped
    once: the attempts that survived are repeated, without any of the faults."""

    class Hurt(Parallel):
        def reduce(self, model, stats):
            stats = super().reduce(model, stats)
            times = (
                {4 * 60: 1e4, 4 * 70: math.nan}.get(trainer_of[id(self)].cursor)
                if id(self) in trainer_of
                else None
            )
            for p in model.parameters() if times else ():
                p.grad.mul_(times)
            return stats

    trainer_of = {}

    def go(name, dies_at=None, **block):
        keys = tiny(name, MOE, **LONG | {"save_interval": 50})
        trainer = Trainer(keys | {"orchestrator": {"snapshot_interval": 20} | block}, Hurt)
        following, asked = trainer.loader.next, []
        if not block:
            trainer_of[id(trainer.parallel)] = trainer
        lines = {
            105: '{"method": "emergency_lr_reduction", "args": [2]}',
            200: '{"method": "stop"}',
        }

        def next_rows():
            if block:
                return following()
            now = trainer.cursor // 4
            told = (trainer.out / "control.jsonl").exists() and (
                trainer.out / "control.jsonl"
            ).read_text()
            if now in lines and lines[now] not in (told or "") and not asked:
                asked.append(now)
                with open(trainer.out / "control.jsonl", "a") as f:
                    f.write(lines[now] + "\n")
            if now == 150:
                glitch(trainer)
            if trainer.step == dies_at:
                raise RuntimeError("killed")
            return following()

        trainer.loader.next = next_rows
        if dies_at:
            with pytest.raises(RuntimeError, match="killed"):
                trainer.fit()
            trainer.loader.close()
        else:
            assert trainer.fit() == 0
        return trainer

    go("run", dies_at=120)  # resumes from 100, and is told to cut the rate again
    assert go("run").step < 240
    first = go("run")
    assert first.report.attempt == 3 and first.step == 240
    rows = [d for d in decisions(first) if d.get("executed") and d.get("level")]
    done = [d["action"] for d in rows]
    assert done[:2] == ["drop", "drop"] and [d for d in done if d != "drop"] == [
        *["emergency_lr_reduction"] * 2,
        "rollback",
    ]
    assert [d["kind"] for d in decisions(first) if d.get("kind") == "start"] == ["start"] * 2
    again = go("again", mode="replay", replay=str(first.out / "decisions.jsonl"))
    assert again.step == 240 and equal(tensors(first), tensors(again))
    assert again.control.knobs["lr_scale"] == 0.5
    keys = tiny("other", MOE, **LONG)
    for changes, text in (({"seed": 7}, "another run"), ({"learning_rate": 1e-4}, "another run")):
        with pytest.raises(UserError, match=f"E310.*{text}"):
            block = {"mode": "replay", "replay": str(first.out / "decisions.jsonl")}
            Trainer(keys | changes | {"orchestrator": block})
    for name in ("metrics.jsonl", "train.log"):
        with pytest.raises(UserError, match="E310"):
            Trainer(keys | {"orchestrator": {"mode": "replay", "replay": str(first.out / name)}})


def test_a_replay_that_is_stopped_after_a_cut_ends_where_the_run_did(tiny, monkeypatch):
    monkeypatch.setattr(forecast, "justified_stop", lambda *args: "start the decay: for the test")
    keys = tiny(**LONG | {"max_steps": 120, "lr_schedule": "wsd", "decay_frac": 0.25})
    keys |= {"enable_early_stopping": True, "orchestrator": {"check_interval": 30}}
    run = finish(keys)
    assert run.step == 40, "cut at step 30"
    monkeypatch.undo()
    block = {"mode": "replay", "replay": str(run.out / "decisions.jsonl")}
    keys |= {"out_dir": keys["out_dir"] + "-again", "orchestrator": block}
    stopped = finish(keys, iterations={35: lambda t: t.request_stop()})
    assert 30 < stopped.step < 40 and stopped.run.max_steps == 40
    again = finish(keys)
    assert again.step == 40 and equal(tensors(run), tensors(again))


# ---------------------------------------------------------------- by hand


def test_commands_in_control_jsonl(tiny):
    """Valid ones take effect at the next step and are written down; what cannot be is refused, and
    the run goes on."""
    lines = [
        '{"method": "adjust_weight_decay", "args": [0.03]}',
        "not json",
        '{"method": "format_disk"}',
        '{"method": "adjust_weight_decay", "args": {"valeu": 1}}',
        '{"method": "adjust_weight_decay", "args": [-1]}',
        '["adjust_weight_decay"]',
        '{"method": "save"}',
        '{"method": "get_current_metrics"}',
        '{"method": "add_expert", "args": {"layer_idx": 0}}',
    ]

    def write(trainer):
        with open(trainer.out / "control.jsonl", "a") as f:
            f.write("\n".join(lines) + '\n{"method": "half a line')

    trainer = finish(tiny(max_steps=20, save_interval=0), iterations={5: write})
    rows = decisions(trainer)
    assert [(r["action"], r.get("refused")) for r in rows] == [
        ("adjust_weight_decay", None),
        ("?", "E309"),
        ("format_disk", "E309"),
        ("adjust_weight_decay", "E309"),
        ("adjust_weight_decay", "E309"),
        ("?", "E309"),
        ("save", None),
        ("get_current_metrics", None),
        ("add_expert", "E308"),
    ]
    assert {r["trigger"] for r in rows} == {"user"} and {r["turn"] for r in rows} == {6}
    assert (
        rows[7]["answer"]["step"] == 5 and trainer.optimizer.param_groups[0]["weight_decay"] == 0.03
    )
    assert 5 in checkpoint.list_steps(trainer.out), "save: before what stands after it"
    again = Trainer(tiny(max_steps=22, save_interval=0))
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.03, "and a resumed run remembers"
    done = [d for d in decisions(again) if d.get("kind") != "start"] if again.fit() == 0 else None
    assert len(done) == len(rows), "no command is carried out twice"


def test_arguments_by_the_names_they_have_in_luminaai(tiny):
    """In Python and in control.jsonl, either name does the same; both at once are refused."""
    values = {"temperature": 1.5, "dropout_prob": 0.25, "capacity_factor": 0.75}
    values |= {"new_batch_size": 1, "reduction_factor": 4.0, "weight_decay": 0.03}
    asked = [(method, *pair) for method, names in ARGUMENTS.items() for pair in names.items()]
    lines = []
    for method, theirs, ours in asked:
        value = values[theirs]
        lines += [{"method": method, "args": {name: value}} for name in (theirs, ours)]
    both = {"value": 0.1, "weight_decay": 0.2}
    lines.append({"method": "adjust_weight_decay", "args": both})
    answers = []

    def write(trainer):
        (trainer.out / "control.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")

    def call(trainer):
        for method, theirs, ours in asked:
            for name in (theirs, ours):
                answers.append(getattr(trainer, method)(**{name: values[theirs]}))
        with pytest.raises(TypeError, match="weight_decay is value"):
            trainer.adjust_weight_decay(**both)

    model = MOE | {"mod_capacity": 0.5}
    keys = tiny(model=model, max_steps=8, save_interval=0)
    trainer = finish(keys, iterations={3: write, 6: call})
    rows = [row for row in decisions(trainer) if row["trigger"] == "user"]
    assert rows[len(asked) * 2]["refused"] == "E309"
    for found in (rows[: len(asked) * 2], answers):
        for i, (method, theirs, ours) in enumerate(asked):
            for row in found[2 * i : 2 * i + 2]:
                assert (row["action"], row["args"]) == (method, {ours: values[theirs]})
                assert "refused" not in row, row


def test_no_argument_ends_a_run(tiny):
    """Whatever is written there: carried out or refused, by a run that goes on, and by one that
    resumes from it."""
    odd = (
        [None],
        ["x"],
        [[1], 2],
        [5],
        [0, "x"],
        [[0, 4, 5], [1]],
        [3, [1]],
        [{}],
        {"x": 1},
        [True],
        [1e999],
    )
    lines = [json.dumps({"method": m, "args": a}) for m in METHODS if m != "stop" for a in odd]

    def write(trainer):
        (trainer.out / "control.jsonl").write_text("\n".join(lines) + "\n")

    trainer = finish(tiny(model=MOE, max_steps=12, save_interval=0), iterations={5: write})
    rows = [r for r in decisions(trainer) if r["trigger"] == "user"]
    assert len(rows) == len(lines) and trainer.step == 12
    assert sum("refused" in r for r in rows) > 150, "most of it is nonsense"


def test_control_jsonl_written_anew_and_without_a_last_newline(tiny):
    line = '{"method": "adjust_weight_decay", "args": [%g]}'

    def write(text):
        return lambda trainer: (trainer.out / "control.jsonl").write_text(text)

    asked = []
    trainer = Trainer(tiny(max_steps=20, save_interval=0))
    take = trainer.orchestrator.take_commands
    trainer.orchestrator.take_commands = lambda: (asked.append(trainer.step), take())
    texts = {
        5: write(f"{line % 0.03}\n{line % 0.02}\n"),
        9: write(f"{line % 0.01}\n"),
        12: write((line % 0.5)[:-1]),
    }
    assert at_iteration(trainer, texts).fit() == 0
    assert [r["args"]["value"] for r in decisions(trainer)] == [0.03, 0.02, 0.01], (
        "the last is not a whole line"
    )
    assert len(asked) == 3, "and asks nobody anything until it grows"
    assert [r["before"] for r in decisions(trainer)] == [
        {"weight_decay": x} for x in (0.1, 0.03, 0.02)
    ]


@pytest.fixture
def weights_after(tiny, reference):
    """weights_after(name, do) -> (what do(trainer) answered before iteration 6 of 9, the run, the
    same run left alone)."""

    def run(name, do, model=None, **changes):
        short = {"max_steps": 9, "save_interval": 0, "warmup_steps": 0, "lr_schedule": "constant"}
        keys, answers = tiny(name, model, **short, **changes), []
        trainer = finish(keys, iterations={6: lambda t: answers.append(do(t))})
        return answers[0], trainer, reference(keys)

    return run


def test_methods_on_the_optimizer_change_the_next_steps(weights_after):
    answer, t, left = weights_after("lr", lambda t: t.emergency_lr_reduction(10.0))
    assert answer["executed"] and not equal(tensors(t), tensors(left))
    rows = {r["step"]: r["lr"] for r in read_lines(t.out / "metrics.jsonl") if "lr" in r}
    assert rows[7] == pytest.approx(rows[5] / 10) and rows[9] == pytest.approx(rows[5] / 10)
    answer, t, left = weights_after("wd", lambda t: t.adjust_weight_decay(0.5))
    assert answer["executed"] and not equal(tensors(t), tensors(left))
    assert [g["weight_decay"] for g in t.optimizer.param_groups] == [0.5, 0.0]
    answer, t, left = weights_after("lr2", lambda t: t._update_optimizer_param_groups("lr", 1e-4))
    rows = {r["step"]: r["lr"] for r in read_lines(t.out / "metrics.jsonl") if "lr" in r}
    assert rows[7] == pytest.approx(1e-4)
    for param, value in (("beta1", 0.5), ("beta2", 0.5), ("eps", 1e-3), ("weight_decay", 0.7)):
        answer, t, left = weights_after(
            param, lambda t, p=param, v=value: t._update_optimizer_param_groups(p, v)
        )
        assert answer["executed"] and not equal(tensors(t), tensors(left)), param
    assert t.emergency_lr_reduction(0.5)["refused"] == "E309", "it would raise it"
    refused = t._update_optimizer_param_groups("momentum", 1.0)
    assert refused["refused"] and "beta1" in refused["reason"]
    assert (
        t.adjust_weight_decay("much")["refused"]
        == t.emergency_lr_reduction(-1)["refused"]
        == "E309"
    )


def test_methods_on_routing_change_the_next_steps(tiny, weights_after):
    moe, mod = KINDS["moe"], {"mod_capacity": 0.5}
    for name, value in (
        ("adjust_capacity_factor", 0.5),
        ("adjust_routing_temperature", 2.0),
        ("enable_expert_dropout", 0.4),
    ):
        answer, t, left = weights_after(name, lambda t, n=name, v=value: getattr(t, n)(v), moe)
        assert answer["executed"] and not equal(tensors(t), tensors(left)), name
        if name == "adjust_capacity_factor":
            assert (
                t.get_expert_statistics()["tokens_dropped"]
                > 0
                == left.get_expert_statistics()["tokens_dropped"]
            )
        if name == "enable_expert_dropout":
            assert (
                any(m.router.dropped_out.any() for m in t.moe.values())
                and left.moe[0].router.dropped_out is None
            )
            assert (
                t.enable_expert_dropout(0.0)["executed"] and t.moe[0].router.dropped_out is None
            ), "all may be chosen again"
    answer, t, left = weights_after("mod", lambda t: t.adjust_mod_capacity(0.25), mod)
    assert (
        t.get_mod_statistics()["capacity_factor"] == 0.25
        and left.get_mod_statistics()["capacity_factor"] == 0.5
    )
    state = checkpoint.find(t.out).state
    assert (
        state["config"]["model"]["mod_capacity"] == 0.25
        and state["model_written"]["mod_capacity"] == 0.5
    )
    again = Trainer(t.written | {"max_steps": 10})
    assert again.fit() == 0 and again.get_mod_statistics()["capacity_factor"] == 0.25
    answer, t, left = weights_after("new", lambda t: t._initialize_new_expert([0, 4], [1, 2]), moe)
    assert (
        answer["executed"] and answer["parent"] in (1, 2) and t.model.blocks[0].ffn.router.alive[4]
    )
    dense = finish(tiny("dense", max_steps=2))
    for call in (
        "adjust_capacity_factor",
        "adjust_routing_temperature",
        "enable_expert_dropout",
        "adjust_mod_capacity",
    ):
        assert getattr(dense, call)(0.5)["refused"] == "E308", call


def test_batch_and_reader_by_hand_change_no_row(tiny):
    found = {}

    def change(trainer):
        found["refused"] = trainer.adjust_batch_size(3)
        found["done"] = trainer.adjust_batch_size(1)

    keys = tiny("left", max_steps=12)
    rows = {}
    for name, at in (
        ("left", None),
        ("smaller", {6: change}),
        ("reader", {6: lambda t: t._recreate_dataloader(t.data.sources)}),
    ):
        trainer = finish(
            keys | {"out_dir": keys["out_dir"] + name, "model": keys["model"] | {"dropout": 0.0}},
            iterations=at,
        )
        rows[name] = losses(trainer.out)
        assert trainer.cursor == 12 * 4
    assert (
        rows["reader"] == rows["left"]
        and found["refused"]["refused"] == "E309"
        and found["done"]["executed"]
    )
    assert max(abs(rows["smaller"][s] - rows["left"][s]) for s in rows["left"]) < 1e-5


def test_current_metrics_are_plain_numbers(tiny):
    trainer = finish(tiny("run", KINDS["moe"], max_steps=5))
    found = trainer.get_current_metrics()
    assert list(found) == [
        "loss",
        "learning_rate",
        "grad_norm",
        "throughput",
        "memory_usage",
        "epoch",
        "step",
    ]
    assert all(type(v) in (int, float) and math.isfinite(v) for v in found.values())
    row = [r for r in read_lines(trainer.out / "metrics.jsonl") if "loss" in r][-1]
    assert (
        found["step"] == 5
        and found["loss"] == row["loss"]
        and found["grad_norm"] == row["grad_norm"] > 0
    )
    assert (
        found["throughput"] == pytest.approx(row["tokens_per_second"])
        and 0 < found["memory_usage"] < 1
    )
    assert trainer._extract_moe_routing_stats() == trainer.get_expert_statistics()
