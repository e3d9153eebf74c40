"""bench.py at toy sizes: the commands' logic, not their numbers."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook

import kernels
import train
from lumen import files
from lumen import machine as machines
from lumen.errors import UserError
from lumen.report import main as report_main
from lumen.sums import StepNumbers
from model import ModelConfig, Transformer
from tools import (
    bench,
    bench_chat,
    bench_data,
    bench_evaluate,
    bench_finetune,
    bench_learn,
    bench_step,
    faults,
    timing,
)

MOE = {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 16}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No second of matrix products per command, no Triton, whose interpreter takes minutes; and the
    flag that steps set is taken back."""
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(timing, "machine_line", lambda m=None: "this machine")
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_options_are_typed_and_unknown_ones_refused():
    o = timing.options(
        ["--rounds", "3", "--no-peer", "--out=a_b", "sync"],
        rounds=7,
        no_peer=False,
        out="",
        parts=None,
    )
    assert (o.rounds, o.no_peer, o.out, o.parts) == (3, True, "a_b", ["sync"])
    for words in (["--turns", "3"], ["--rounds", "many"], ["--rounds"], ["stray"]):
        with pytest.raises(UserError) as error:
            timing.options(words, rounds=7)
        assert error.value.code == "E002"
    for words in (
        ["fly"],
        ["kernels", "--rond", "1"],
        ["gpu"],
        ["learn", "--only", "sparse"],
        ["learn", "--against", "litgpt"],
    ):
        with pytest.raises(UserError) as error:
            bench.main(words)
        assert error.value.code == "E002"


def test_kernels_compares_the_backends(capsys):
    assert bench.main(["kernels", "--size", "toy", "--rounds", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "of 2Td + 4TKI" in said and "slices" in said and "differs from slices by" in said


def test_kept_bytes_counts_a_storage_once_and_not_what_is_left_out():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert bench_step.kept_bytes(lambda: (x @ w) * (x @ w).view(10, 4), [w]) == 3 * 160
    assert bench_step.kept_bytes(lambda: x[:5] @ w + x[5:] @ w, [w]) == 160


def test_what_is_measured_of_data(monkeypatch, capsys):
    """Each row of both commands, at a toy size."""
    monkeypatch.setattr(bench_data, "SOURCE", "synthetic:40")
    few = list(itertools.islice(bench_data.docstring_rows(), 20))
    monkeypatch.setattr(bench_data, "docstring_rows", lambda: iter(few))
    toy = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    monkeypatch.setattr(bench_data, "MODEL", toy)
    assert bench.main(["data", "--rounds", "1"]) == 0
    assert bench.main(["documents", "--rounds", "1", "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("MB/s") == 5 and said.count("of the time of causal") == 3


def test_drawn_documents_are_about_as_long_as_asked():
    for mean in bench_data.LENGTHS[1:]:
        numbers = bench_data.drawn(mean, 64, 1024)
        found = numbers.numel() / float((numbers[:, -1] + 1).sum())
        assert mean / 2 < found < 2 * mean and (numbers.diff() >= 0).all()


@pytest.mark.parametrize("keys", [{}, MOE, bench_step.HALF])
def test_our_step_clips_and_feeds_adam_the_gradient_of_the_mean_loss(keys):
    cfg = ModelConfig(**bench_step.TOY | keys)
    run = bench_step.Ours(cfg, machines.detect("cpu", "fp32"), 2)
    before = [p.detach().clone() for p in run.model.parameters()]
    (run.model(run.x, targets=run.y)[0] / run.x.numel()).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    expected = [0.1 * p.grad for p in run.model.parameters()]
    run.optimizer.zero_grad(set_to_none=True)
    loss = run()
    assert abs(loss.item() - math.log(cfg.vocab_size)) < 0.3
    for p, old, grad in zip(run.model.parameters(), before, expected):
        assert torch.equal(p, old)  # the rate is 0
        torch.testing.assert_close(run.optimizer.state[p]["exp_avg"], grad, rtol=1e-4, atol=1e-7)
    counts = [moe.router.load.sum().item() for moe in run.moe]
    assert counts == pytest.approx([1.0] * len(run.moe))


def test_peer_has_the_same_size_and_both_bf16_forms_step():
    pytest.importorskip("transformers")
    m = machines.detect("cpu", "fp32")
    cfg = ModelConfig(**bench_step.TOY | MOE)
    ours = sum(p.numel() for p in bench_step.Ours(cfg, m, 2).model.parameters())
    for precision in ("fp32", "autocast", "masters"):
        peer = bench_step.Peer(cfg, m, 2, experts="eager", precision=precision)
        assert sum(p.numel() for p in peer.model.parameters()) == ours
        assert abs(peer().item() - 4.85) < 0.3
        assert all(p.dtype == torch.float32 and p.grad is None for p in peer.masters)
    copies = 4 * 2 * cfg.max_seq_len * 2 * 3 * cfg.d_model * cfg.d_expert * cfg.n_layers
    assert any("batched_mm" in v[0] for v in bench_step.peer_variants(cfg, m, 2)) == (
        copies < machines.total_memory("cpu") / 2
    )


def test_threads_are_timed_alone_and_beside_a_busy_process(capsys):
    toy = ["--size", "toy", "--rounds", "2", "--steps", "1"]
    assert bench.main(["threads", *toy, "--only", "one thread"]) == 0
    said = capsys.readouterr().out
    assert "beside 0 busy processes" in said and "beside 1 busy processes" in said
    assert said.count("one thread") == 3 and "(n 2, 1 to 1)" in said
    with pytest.raises(UserError, match="no two threads"):
        bench.main(["threads", "--only", "two threads"])


def test_speed_takes_as_many_steps_as_it_is_told(tiny, tmp_path, capsys, monkeypatch):
    """--max_steps 10 ran 40 steps, evaluated and saved; an option that it would overrule is
    refused."""
    keys = tiny(max_steps=300, eval_interval=2, save_interval=...)
    path = write_yaml(tmp_path / "quick.yaml", {k: v for k, v in keys.items() if k != "out_dir"})
    assert bench.main(["speed", str(path), "--max-steps", "10", "--learning_rate=1e-3"]) == 0
    said = capsys.readouterr().out
    assert "10/10 " in said and "11/" not in said and "(n 8," in said and "1.00e-03" in said
    assert "eval " not in said and "saved " not in said and "left out" not in said
    for words in (
        ["--max_steps", "2"],
        ["--eval_interval", "3"],
        ["--save-interval=5"],
        ["--out_dir", "x"],
    ):
        with pytest.raises(UserError) as error:
            bench.main(["speed", str(path), *words])
        assert error.value.code == "E002"
    counts = iter(range(1000))
    monkeypatch.setattr(bench, "compiled_so_far", lambda: next(counts))
    assert bench.main(["speed", str(path), "--max_steps", "5"]) == 0
    assert "tokens/s  - (something was compiled in all of them" in capsys.readouterr().out


def test_no_time_of_a_run_that_compiled(monkeypatch, capsys):
    """The second run of a new shape compiles again (dynamic sizes), forward and backward: neither
    is timed. What compiles for ever has no time."""
    now, size = [0.0], [3]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    f = torch.compile(lambda x: (x * 2).sin().sum(), backend="aot_eager")

    def run():
        before = timing.compiled_so_far()
        f(torch.ones(size[0], requires_grad=True)).backward()
        now[0] += 60.0 if timing.compiled_so_far() > before else 1.0
        size[0] = 4

    assert timing.interleaved({"ours": run}, 3, "cpu", warm_up=0) == {"ours": [1.0] * 3}
    # two in the first round: said, for a number that somebody waits for comes late
    assert capsys.readouterr().out.count("ours: something was compiled meanwhile; timed again") == 2
    counts = iter(range(1000))
    monkeypatch.setattr(timing, "compiled_so_far", lambda: next(counts))
    with pytest.raises(RuntimeError, match="compiled in each"):
        timing.interleaved({"": lambda: None}, 1, "cpu")


def test_no_share_above_the_peak(monkeypatch):
    monkeypatch.setattr(timing.machines, "peak_flops", lambda m: 200.0)
    assert timing.percent_of_peak(50.0, None) == 25
    assert timing.percent_of_peak(200.5, None) is None


def test_company_is_seen(monkeypatch):
    """What others take of the cores shows in how long threads wait for one."""
    clock, waits = iter([10.0, 14.0, 20.0, 24.0]), iter([1.0, 1.2, 2.0, 14.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "waited", lambda: next(waits))
    with timing.Company() as quiet:
        pass
    with timing.Company() as busy:
        pass
    assert quiet.said() == "its threads waited 0.05 s for a core in each second"
    assert busy.said().endswith(
        "3.00 s for a core in each second: the machine was busy, so these are no speeds"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler's numbers are Linux'")
def test_what_the_scheduler_says_grows():
    before = timing.waited()
    until = timing.time.perf_counter() + 0.05
    while timing.time.perf_counter() < until:
        pass
    assert 0 <= before <= timing.waited()


def test_mfu_is_never_above_the_peak(monkeypatch):
    """The peak was measured while the machine was busy: again, or there is none."""
    m = machines.detect("cpu", "fp32")
    monkeypatch.setattr(machines, "matrix_peak", lambda *a: 200.0)
    assert timing.mfu([50.0], m, 100.0) == "50.0 %"
    assert timing.mfu([50.0, 120.0], m, 100.0).startswith("median 0.425")
    assert timing.mfu([50.0, 220.0], m, 100.0).startswith("- (")
    assert timing.percent_of_peak(50.0, m) == 25.0 and timing.percent_of_peak(201.0, m) is None


def test_time_limit_and_variants_that_fail(capsys):
    with pytest.raises(TimeoutError), timing.time_limit(0.05):
        while True:
            pass

    def broken():
        raise ImportError("no such kernel")

    works = bench_step.fastest(
        "x", [("a", broken, False), ("b", lambda: lambda: torch.zeros(()), False)], 5, "cpu"
    )
    assert works is not None and "left out: ImportError: no such kernel" in capsys.readouterr().out


def test_learn_keeps_what_is_there_and_tells_it(tiny, tmp_path, monkeypatch, capsys):
    keys = tiny("x", max_steps=4)
    keys.pop("out_dir")
    monkeypatch.setattr(bench_learn, "load_yaml", lambda path: (json.loads(json.dumps(keys)), {}))
    monkeypatch.setattr(bench_learn, "LEARN", {"dense": {}, "both": {**MOE, **bench_step.HALF}})
    out = tmp_path / "learn"
    words = ["learn", "--steps", "3", "--seeds", "1", "--out", str(out)]
    assert bench.main([*words, "--only", "both"]) == 0
    first = (out / "both-1337.json").stat().st_mtime_ns
    assert bench.main(words) == 0
    assert (out / "both-1337.json").stat().st_mtime_ns == first
    row = json.loads((out / "both-1337.json").read_text())
    assert (
        row["steps"] == 3
        and row["router"] > 0
        and row["mod_gap"] is not None
        and row["active"] < row["total"]
    )
    table = capsys.readouterr().out.split("this machine")[-1]
    assert f"| both | 1 | {row['val_loss']:.4f}" in table and "| dense | 1 |" in table


@pytest.mark.nightly  # 22 s: a benchmark's own run
def test_what_a_layout_costs(capsys, monkeypatch):
    """Two launches of two ranks: what they gather and reduce is what the plan says they do."""
    monkeypatch.setitem(
        bench.SPREAD,
        "model",
        bench.SPREAD["model"] | {"n_layers": 2, "max_seq_len": 64, "d_model": 192},
    )
    assert bench.main(["layouts", "--only", "zero_stage 3", "--rounds", "1", "--steps", "4"]) == 0
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "zero_stage 3" and 0 < float(cells[3].split()[0]) < 100
    sent = re.findall(r"(\d+) \((\d+)\)", cells[4])
    assert all(a == b for a, b in sent) and int(sent[0][0]) > int(sent[1][0]) > 3, cells
    assert sent[2] == ("0", "0"), "no expert travels"


# ---------------------------------------------------------------- faults


@pytest.fixture
def small(monkeypatch, tmp_path):
    """faults WORDS at sizes that take seconds; returns the file of its runs."""
    for name, keys in (
        ("FAULT_RUN", {"max_steps": 70, "batch_size": 4, "eval_tokens": 512, "save_interval": 20}),
        ("FAULT_MODEL", {"d_model": 32, "d_ff": 32, "max_seq_len": 32}),
        ("SMALLER_RUN", {"max_steps": 30, "eval_tokens": 128}),
        ("WHEN", {"late": 50}),
    ):
        monkeypatch.setattr(faults, name, getattr(faults, name) | keys)
    corpus = faults.corpus
    monkeypatch.setattr(
        faults, "corpus", lambda folder, n=0, seed=0: corpus(folder, 20_000, 128, seed)
    )
    monkeypatch.setattr(faults, "SEEDS", 2)

    def go(*words):
        assert bench.main(["faults", "--out", str(tmp_path / "faults.json"), *words]) == 0
        return json.loads((tmp_path / "faults.json").read_text())

    return go


@pytest.mark.nightly  # 7 s: `tools.bench faults --quick` in .ci/run goes the same way
def test_faults_are_injected_judged_and_not_run_twice(small, capsys, monkeypatch):
    # in turn, and in this process: a new one would not see the sizes of `small`
    monkeypatch.setattr(
        faults, "side_by_side", lambda results, parts: [p.run(results.path) for p in parts]
    )
    words = ("--quick", "--only", "5,8,7,24")
    runs = small(*words)["runs"]
    table = capsys.readouterr().out
    rows = {
        tuple(c.strip() for c in line.split("|")[1:6]): line
        for line in table.splitlines()
        if line[:2] == "| "
    }
    for row, what in (("5", "gradient NaN once"), ("8", "gradient x10,000 once")):
        line = rows[row, what, "dense", "late", "act"]
        assert "| recover | recover |" in line and "| 1 | 0 | 1 drop | 0 | yes |" in line, line
        assert (
            runs[f"{row}/dense/act/late/1337"]["digest"] == runs["0/dense/act/late/1337"]["digest"]
        )
    line = rows["7", "activation NaN forever", "dense", "late", "act"]
    assert "| stop in order | stop in order |" in line and line.endswith("| 0 | yes |"), line
    assert rows["24", "healthy", "dense", "late", "act"].endswith(
        "| +0.0000 | 0 | - | - | 0 | yes |"
    )
    assert "late, act: 4 of 4 as expected, 0 false actions" in table and "sigma" in table
    counts = [
        [c.strip() for c in line.split("|")[1:5]]
        for line in table.splitlines()
        if "and more" in line
    ]
    assert counts and all(c[2] == c[3] for c in counts), "what was decided was real"
    monkeypatch.setattr(faults, "train", None)  # nothing is run again
    assert small(*words)["runs"] == runs
    assert small("--table")["runs"] == runs
    monkeypatch.setattr(faults, "FAULT_RUN", faults.FAULT_RUN | {"max_steps": 71})
    with pytest.raises(UserError) as error:
        small("--table")
    assert error.value.code == "E117"
    for words in (["--only", "99"], ["--modes", "on"], ["--kinds", "sparse"]):
        with pytest.raises(UserError) as error:
            bench.main(["faults", *words])
        assert error.value.code == "E002"


@pytest.mark.nightly  # 10 s
def test_kinds_of_model_run_side_by_side(tmp_path, capsys):
    """Each in its process, from what the file holds and back into it; a part that fails is said."""
    out, run = (
        tmp_path / "faults.json",
        {"val_loss": 1.0, "seconds": 1, "cpu_seconds": 1, "commit": "c", "date": "d"},
    )
    run |= {
        "code": 0,
        "step": 600,
        "iterations": 600,
        "dropped": 0,
        "digest": "a",
        "reference": 0,
        "decisions": [],
        "health": [],
    }
    results = faults.Results(out)
    for kind in ("dense", "moe"):
        results.data["runs"] |= {f"24/{kind}/off/late/{1337 + i}": run for i in range(faults.SEEDS)}
        results.data["runs"][f"24/{kind}/act/late/1337"] = run
    files.write_json(f"{out}.1", results.data)  # a part that had been done
    files.write_json(
        out,
        results.data | {"runs": {k: r for k, r in results.data["runs"].items() if "moe" not in k}},
    )
    words = ["faults", "--only", "24", "--modes", "act", "--out", str(out)]
    assert bench.main(words) == 0 and sorted(tmp_path.iterdir()) == [out]
    assert "late, act: 2 of 2 as expected" in capsys.readouterr().out
    assert json.loads(out.read_text()) == results.data
    (tmp_path / "faults.json.1").write_text('{"plan": 0, "runs": {}}')
    with pytest.raises(UserError, match="a part of it failed"):
        bench.main(words)


def test_a_fault_does_harm(small, monkeypatch):
    """Where nothing is done about it: or the table would prove nothing."""
    monkeypatch.setattr(faults, "SEEDS", 1)
    runs = small("--only", "1,10", "--kinds", "moe", "--modes", "off")["runs"]
    for row in ("1", "10"):
        assert (
            runs[f"{row}/moe/off/late/1337"]["val_loss"]
            > runs["24/moe/off/late/1337"]["val_loss"] + 0.02
        )


def test_healthy_steps_add_up(small, capsys):
    first = small("--healthy", "30")["healthy"]
    both = small("--healthy", "31")["healthy"]
    assert len(first) == 1 and len(both) == 2 and {k: both[k] for k in first} == first
    assert all(r["steps"] == 30 and r["same"] for r in both.values())
    said = capsys.readouterr().out
    assert "60 healthy steps" in said and "0 interventions, below 0.05 a step" in said
    assert "bits of mode off in 2 of 2" in said


def test_rows_about_files_and_processes_name_a_test_that_is_there():
    for row, (_, name) in faults.PROVEN_BY_TESTS.items():
        file, test = name.split("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), row
    assert not faults.PROVEN_BY_TESTS.keys() & faults.FAULTS.keys()
    with pytest.raises(UserError, match="test_survival.py"):
        bench.main(["faults", "--only", "18"])


@pytest.mark.nightly
def test_out_of_memory_in_the_optimizer_restarts_smaller(tiny, tmp_path, request):
    """Row 13: no micro-step can be made smaller there, so the process asks to be started again
    (75)."""
    path = write_yaml(tmp_path / "c.yaml", tiny("run", batch_size=4, max_steps=12))
    steps = []

    def run_out(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")

    hook = register_optimizer_step_pre_hook(run_out)
    request.addfinalizer(hook.remove)
    with pytest.raises(UserError) as error:
        train.main([str(path)])
    assert (error.value.code, error.value.exit_code) == ("E201", 75)
    out = tmp_path / "run"
    assert json.loads((out / "oom_hint.json").read_text())["micro_batch"] == 2
    assert json.loads((out / "status.json").read_text())["state"] == "restart"
    assert train.main([str(path)]) == 0
    assert json.loads((out / "status.json").read_text())["step"] == 12


BASE = {"val_loss": 1.0, "digest": "a"}
ROLLBACK = {"id": 1, "level": 2, "executed": True, "action": "rollback", "trigger": "t"}
ROLLBACK |= {"basis": "evalue", "confidence": 0.8, "reason": ""}


def verdict(fault, mode: str, limit: float = 0.03, **changes):
    run = {"code": 0, "step": faults.FAULT_RUN["max_steps"], "iterations": 700, "dropped": 2}
    run |= {"val_loss": 1.02, "digest": "b", "decisions": [], "reference": 0, "health": []}
    against = {"base": BASE, "bits": None}
    return faults.judge(fault, f"1/dense/{mode}/late/1337", run | changes, against, limit)


def test_failures_are_said_as_such():
    fault = faults.Fault("x", lasts=5, needs="divergence", most={"rollback": 0})
    rows = [ROLLBACK | {"turn": 300}, ROLLBACK | {"turn": 330, "id": 2}]
    v = verdict(fault, "act", 0.01, decisions=rows)
    assert v.came == "not recovered" and v.gap == pytest.approx(0.02) and not v.good
    assert (v.lost, v.found_after, v.false_actions) == (102, 10, 1)
    assert v.confidences == [("evalue", 0.8, False), ("evalue", 0.8, True)], (
        "before the fault it was not real"
    )
    assert v.wrong == ["nothing said of divergence", "2 x rollback", "1 false actions"]
    v = verdict(faults.Fault("x"), "off")
    assert v.good and v.came == "recover"
    assert verdict(fault, "off", code=3, kept=None).came == "code 3"
    v = verdict(fault, "off", code=3, kept=200)
    assert v.came == "stop in order" and not v.good
    assert verdict(faults.Fault("x", lasts=0), "act").wrong == ["not the bits of mode off"]


def test_the_reference_rules(tiny):
    trainer = train.Trainer(tiny("ref", max_steps=80, save_interval=0))
    losses = [3.0] * 60 + [9.0, 3.0] * 80
    now = StepNumbers(0, 0, 0)
    rules = faults.ReferenceRules(trainer, True)
    for now.iteration in range(1, 120):
        now.loss = losses[now.iteration - 1]
        now.grad_norm = 1e4 if now.iteration == 115 else 1.0
        rules.look(now)
        rules.look(now)  # it is looked at in each iteration, also where no step was finished
    assert rules.acted_at == [50, 115]
    assert trainer.control.knobs["lr_scale"] == pytest.approx(0.15)
    trainer.close()


# ---------------------------------------------------------------- what a run decided


def decided(folder, rows) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("")
    (folder / "decisions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


ROW = {
    "time": "2026-01-01T00:00:00Z",
    "attempt": 1,
    "mode": "act",
    "confidence": 1.0,
    "basis": "observed",
}
ROW |= {
    "executed": True,
    "blocked_by": None,
    "trigger": "explosion",
    "action": "drop",
    "level": 1,
    "reason": "large",
}


def test_decisions_tell_a_story(tmp_path, capsys):
    rows = [ROW | {"id": i + 1, "turn": t, "step": t - 1} for i, t in enumerate((10, 11, 12))]
    more = {
        "trigger": "divergence",
        "action": "rollback",
        "level": 2,
        "reason": "it rose",
        "args": {"to_step": 5},
    }
    rows += [ROW | more | {"id": 4, "turn": 300, "step": 299}]
    rows += [{"id": 4, "kind": "outcome", "step": 310, "verdict": "helped"}]
    rows += [
        ROW
        | more
        | {"id": 5, "turn": 301, "step": 300, "executed": False, "blocked_by": "mode: shadow"}
    ]
    assert report_main([decided(tmp_path / "run", rows)]) == 0
    said = capsys.readouterr().out
    assert "5 decisions" in said and said.count("2026-01-01") == 2
    assert "step 9 to 11: explosion: drop (#1, level 1, done)" in said and "#2" not in said
    assert (
        "why     it rose; confidence 1.00 (observed)\n    how     to_step 5\n    outcome helped, seen at"
        in said
    )
    assert "NOT done: mode: shadow" in said
    for words, code in (
        ([], "E002"),
        ([str(tmp_path / "none")], "E108"),
        ([decided(tmp_path / "e", [])], "E104"),
    ):
        with pytest.raises(UserError) as error:
            report_main([*words])
        assert error.value.code == code
    (tmp_path / "e/decisions.jsonl").unlink()
    assert report_main([str(tmp_path / "e")]) == 0
    assert "nothing had to be decided" in capsys.readouterr().out


def test_a_picture_needs_matplotlib_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib") as error:
        report_main([str(tmp_path), "--picture"])
    assert error.value.code == "E003"


def test_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": s, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "experts/share/0": [0.5, None]}
        for s in (1, 2, 2, 3)
    ]
    folder = tmp_path / "run"
    decided(folder, [ROW | {"id": 1, "turn": 2, "step": 2, "level": 2}])
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [*rows, {"step": 3, "val_loss": 3.1}])
    )
    assert report_main([str(folder), "--picture"]) == 0
    assert (
        folder / "training.png"
    ).stat().st_size > 10_000 and "training.png" in capsys.readouterr().out


# ---------------------------------------------------------------- fine-tuning


def test_log_probabilities_are_those_of_each_row_alone():
    cfg = ModelConfig(vocab_size=61, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=32)
    model = Transformer(cfg)
    model.init_weights(1)
    rng = np.random.default_rng(0)
    rows = []
    for n in (9, 30, 2, 17, 9):
        mask = rng.integers(0, 2, n).astype(np.uint8)
        mask[-1] = 1
        rows.append((rng.integers(0, 61, n).astype(np.uint32), mask))
    sums, counts = bench_chat.log_probabilities(model, rows, batch=3)
    for (ids, mask), total, count in zip(rows, sums, counts):
        x = torch.from_numpy(ids.astype(np.int64))[None]
        y = x[:, 1:].masked_fill(torch.from_numpy(mask)[None, 1:] == 0, -1)
        _, want = model(x[:, :-1], targets=y)
        assert count == want["count"].item() == mask[1:].sum()
        assert total == pytest.approx(-want["ce"].item(), rel=1e-5)


def test_the_table_of_learn_chat_has_means_and_ranges():
    row = {"variant": "SFT", "factor": 1.0, "learning_rate": 2.5e-4, "reply_loss": 4.0}
    row |= {"choice": 0.25, "preference": 0.5, "preference_sum": 0.5, "chosen": -4, "rejected": -5}
    rows = [row, row | {"reply_loss": 3.0}, row | {"factor": 3.0}, row | {"variant": "base"}]
    lines = bench_chat.table(rows)
    assert len(lines) == 5 and lines[2].startswith("| base | 1 |")
    assert lines[3].startswith("| SFT | 2 | 0.00025 | 3.500 (3.000 to 4.000) | 0.250 (0.250 to")
    assert lines[4].startswith("| SFT | 1 |")


@pytest.mark.nightly
def test_finetune_and_learn_chat_at_toy_sizes(tmp_path, capsys, monkeypatch):
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 32, "max_seq_len": 512}
    monkeypatch.setattr(bench_finetune, "MODEL", shape | {"qk_norm": False})
    monkeypatch.setattr(bench_finetune, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(bench_finetune, "installed", lambda python, package: "")
    assert bench.main(["finetune", "--rounds", "1", "--turns", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rows of 513: padding 0\.\d\d%", said)
    assert "tokens/s of LoRA r 16 against SFT: CPU median" in said
    assert "no peer: trl" in said and "no peer: litgpt" in said
    assert "fp32, lumen: supervised tokens/s" in said
    bench_finetune.make_all(tmp_path)
    words = ["learn_chat", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    words += ["--seeds", "1", "--steps", "2", "--pair_steps", "1", "--most", "4"]
    assert bench.main([*words, "--only", "base;SFT;SFT + DPO"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| base", "| SFT", "| SFT + DPO"]
    assert bench.main([*words, "--only", "SFT"]) == 0  # nothing is done again
    assert capsys.readouterr().out.splitlines() == lines[-5:]


@pytest.mark.nightly  # lm-eval, and a vocabulary is learned
def test_evaluate_compares_us_with_lm_eval_at_toy_sizes(capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 32, "max_seq_len": 2048}
    monkeypatch.setattr(bench_evaluate, "MODEL", shape)
    monkeypatch.setattr(bench_evaluate, "VOCAB", 400)
    assert bench.main(["evaluate", "--rounds", "1", "--n", "2"]) == 0
    said = capsys.readouterr().out
    for kind in bench_evaluate.KINDS:
        found = re.search(rf"{kind}: 2 questions, log-probabilities differ by at most (\S+)", said)
        assert float(found[1]) < 1e-3
    assert len(re.findall(r"times as fast +median \d", said)) == len(bench_evaluate.KINDS)
    for words in (["--only", "letter"], ["--precision", "fp8"]):
        with pytest.raises(UserError, match="E002"):
            bench.main(["evaluate", *words])
