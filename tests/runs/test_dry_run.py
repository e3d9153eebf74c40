"""The dry run: memory, traffic and time of many processes, all arithmetic; and its look at fake
tensors."""

import dataclasses
import itertools
import re
import statistics
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python, write_yaml

import train
import train_fsdp
from lumen import cards, plan
from lumen import machine as machines
from lumen.cli import read_config
from lumen.errors import UserError
from model import HeadLoss, ModelConfig, Transformer
from tools import simulate, trial

SMALL = {
    "vocab_size": 96,
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 64,
}
DENSE, MOE = (
    ModelConfig(**SMALL),
    ModelConfig(**SMALL, n_experts=8, d_expert=32, n_shared_experts=1, n_dense_layers=1),
)
H100 = cards.HARDWARE["h100"]
LAYOUTS = [
    plan.Layout(*x)
    for x in ((8, 3), (8, 2), (8, 1), (8, 3, 2), (8, 3, 4), (6, 3), (8, 3, 0, 2), (8, 3, 0, 8))
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_every_parameter_lies_on_as_many_ranks_as_there_are_copies(layout, precision):
    for cfg in (DENSE, MOE) if layout.expert_parallel == 1 else (MOE,):
        model = plan.on_meta(cfg)
        root, blocks = plan.fsdp_units(model, layout, precision)
        total = 0
        for unit, alike in ((root, 1), *((u, 1) for block in blocks for u in block)):
            held = [unit.local(rank) for rank in range(unit.ranks)]
            assert max(held) == held[0] and unit.padded() >= sum(held)
            total += alike * sum(held) * (layout.world // unit.ranks)
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        apart = (
            layout.expert_parallel > 1
        )  # then each is held once in all, though a group holds only its own
        copies = layout.world // layout.shard
        assert total == copies * (plan.count_parameters(model) - experts * apart) + experts * apart
        assert plan.count_parameters(model) == model.n_params()["total"]


def total(model, layout, rows=2, recompute="none", precision="mixed_bf16", steps=4, **more):
    return plan.rank_memory(model, layout, rows, steps, precision, recompute, **more)["total"]


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_memory_falls_and_rises_as_it_must(cfg, precision):
    model = plan.on_meta(dataclasses.replace(cfg, max_seq_len=1024, d_model=256, head_dim=64))
    need = [
        total(model, plan.Layout(w, 3), precision=precision) for w in (2, 4, 8)
    ]  # of more, some have no expert
    assert need == sorted(need, reverse=True) and need[-1] < need[0]
    for recompute in plan.RECOMPUTE:
        need = [total(model, plan.Layout(4, 3), rows, recompute, precision) for rows in range(1, 9)]
        assert need == sorted(need) and len(set(need)) == 8
    none, selective, block = (
        total(model, plan.Layout(4, 3), 8, k, precision) for k in plan.RECOMPUTE
    )
    assert block < selective < none
    stages = [total(model, plan.Layout(8, stage), precision=precision) for stage in (3, 2, 1)]
    assert stages == sorted(stages)
    assert (
        total(model, plan.Layout(8, 3, 8))
        == total(model, plan.Layout(8, 3))
        < total(model, plan.Layout(8, 3, 2))
    )
    parts = plan.rank_memory(model, plan.Layout(4, 3), 2, 4, precision)
    assert parts["total"] == sum(v for k, v in parts.items() if k not in ("total", "peak"))
    if cfg is MOE:
        even, uneven = (total(model, plan.Layout(8, 3, 0, 4), 8, imbalance=x) for x in (1.0, 2.0))
        assert even < uneven
    one = plan.memory(model.cfg, plan.count_parameters(model), 2, precision)
    assert total(model, plan.Layout(1, 0), precision=precision) == one["total"]


def test_traffic_by_hand():
    """Four ranks in one machine, fp32: each gathers 3/4 of the weights twice a micro-step, and
    sends as many back."""
    model = plan.on_meta(dataclasses.replace(DENSE, vocab_size=128))
    found = simulate.traffic(model, plan.Layout(4, 3), 2, 5, "fp32")
    n, root = (
        plan.count_parameters(model),
        sum(p.numel() for p in (model.embed.weight, model.norm.weight)),
    )
    assert sum(m[0] for m in found["all-gather"]) == 4 * 5 * (2 * (n - root) + root)
    assert sum(m[0] for m in found["reduce-scatter"]) == 4 * 5 * n
    fast = dataclasses.replace(H100, link=1e15)
    assert simulate.ring_seconds(H100, 450e9, 4) == pytest.approx(3 / 4)
    assert simulate.ring_seconds(fast, 8 * 50e9, 16) == pytest.approx(1 / 2), (
        "a machine's cards share what comes in"
    )
    assert simulate.ring_seconds(fast, 50e9, 16, 1, True) == pytest.approx(1 / 2), (
        "all-to-all: all of it is one's own"
    )
    assert (
        simulate.ring_seconds(H100, 50e9, 2, 8) == pytest.approx(1 / 2)
        and simulate.ring_seconds(H100, 1e9, 1) == 0
    )
    two = simulate.traffic(model, plan.Layout(4, 2), 2, 5, "fp32")
    assert sum(m[0] for m in two["all-gather"]) == 4 * n
    copies = simulate.traffic(model, plan.Layout(4, 3, 2), 2, 5, "fp32")["all-reduce"]
    assert sum(m[0] for m in copies) == 2 * 4 * n / 2 and {m[1:] for m in copies} == {(2, 2)}
    moe = plan.on_meta(MOE)
    plain, again = (
        simulate.traffic(moe, plan.Layout(8, 3, 0, 4), 2, 5, "fp32", k)["all-to-all"]
        for k in ("none", "block")
    )
    assert plain[0][0] == 3 * 4 * 5 * (2 * 64 * 2) * 64 * 4 and again[0][0] == 1.5 * plain[0][0]


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_search_finds_the_cheapest_that_fits(cfg):
    model, world, rows_per_step = plan.on_meta(cfg), 8, 64
    base, assumed = plan.Layout(world, 3), simulate.Assumed(mfu=0.4)

    def step(layout, rows, recompute):
        steps = rows_per_step // (rows * world)
        shape = plan.StepShape(rows, steps, "mixed_bf16", recompute)
        return simulate.simulate_step(model, layout, shape, H100, assumed)

    every = simulate.candidates(base, cfg.n_experts, rows_per_step)
    need = sorted(step(*candidate).memory["total"] for candidate in every)
    for room in (need[0] - 1, need[0], need[len(need) // 2], need[-1]):
        how = (rows_per_step, "mixed_bf16", H100, room, assumed)
        found = simulate.cheapest(model, base, *how)
        best = None  # the same by brute force, with loops of its own
        for size, ep, rows, k in itertools.product(
            (0, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8), plan.RECOMPUTE
        ):
            if (size and ep > 1) or (ep > 1 and not cfg.n_experts):
                continue
            s = step(plan.Layout(8, 3, size, ep), rows, k)
            if s.memory["total"] <= room:
                best = min(best or 9e99, s.seconds["step"])
        assert (found is None) == (best is None) == (room < need[0])
        if found:
            assert found.memory["total"] <= room and found.seconds["step"] == best


@pytest.mark.parametrize("recompute", plan.RECOMPUTE)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_memory_model_against_the_measured_peak_of_a_step(sparse, recompute):
    """Bytes that the CPU's allocator really gave out, by torch's profiler, in a forward and
    backward pass."""
    more = {"n_experts": 8, "d_expert": 128, "n_shared_experts": 1} if sparse else {}
    shape = {
        "vocab_size": 512,
        "d_model": 256,
        "n_layers": 6,
        "n_heads": 4,
        "d_ff": 704,
        "max_seq_len": 256,
    }
    cfg = ModelConfig(**shape, **more)
    model = Transformer(cfg)
    model.init_weights(0)
    model.recompute = recompute
    ids = torch.zeros(4, cfg.max_seq_len, dtype=torch.long)
    model(ids, targets=ids)[0].backward()
    model.zero_grad(set_to_none=False)  # gradients are there, as in the second micro-step
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        model(ids, targets=ids)[0].backward()
    now = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    n = plan.count_parameters(model)
    parts = plan.memory(cfg, n, 4, "fp32", recompute, cuda=False)
    estimate = parts["total"] - 16 * n
    kind, off = "moe" if sparse else "dense", estimate / most - 1
    print(
        f"{kind} {recompute}: {most / 2**20:.1f} MiB measured, {estimate / 2**20:.1f} planned, {off:+.1%}"
    )
    assert 0.9 < estimate / most < 1.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_takes_what_the_plan_says_on_this_device(dtype):
    """Its chunk of logits is a CPU's or a GPU's, whatever the precision; the last chunk is gone
    before the next."""
    V, C, N = 50304, 16, 256
    x, w = torch.randn(N, C).to(dtype).requires_grad_(), torch.randn(V, C, requires_grad=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        HeadLoss.apply(x, w, torch.zeros(N, dtype=torch.long), 0.0, True)
    now = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    precision = "fp32" if dtype == torch.float32 else "mixed_bf16"
    cfg = ModelConfig(vocab_size=V, d_model=C, n_heads=2, n_layers=1, max_seq_len=N)
    cpu, gpu = (plan.kept_bytes(cfg, 1, precision, cuda=cuda)["head"] for cuda in (False, True))
    print(
        f"{precision}: {most / 2**20:.1f} MiB measured, {cpu / 2**20:.1f} planned, {gpu / 2**20:.1f} on CUDA"
    )
    copy = 0 if precision == "fp32" else 2 * V * C  # of the weights, which counts as states
    assert 0.9 * cpu < most - copy < 1.15 * cpu
    assert gpu != cpu


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_a_gpu_is_planned_as_a_gpu_from_a_machine_without_one(tiny, tmp_path, capsys, precision):
    keys = tiny(
        model={"vocab_size": 50304, "max_seq_len": 256},
        batch_size=8,
        precision=precision,
        batch_tokens=2**15,
    )
    keys.pop("gradient_accumulation_steps")
    path = write_yaml(tmp_path / "c.yaml", keys)
    found = []
    for words in (("--hardware=h100",), ("--hardware=cpu",), ()):
        assert train.main([str(path), "--dry_run", *words]) == 0
        found.append(capsys.readouterr().out)
    gpu = float(re.search(r"^  none .*  ([\d.]+) +[\d.]+  [\d -]+$", found[0], re.M)[1])
    cpus = (re.search(r"^  none .*  ([\d.]+) MiB +[\d.]+ MiB$", out, re.M)[1] for out in found[1:])
    assert gpu > 0.06, "GiB of work: 64 MB of logits"
    assert max(map(float, cpus)) < 40, "MiB of work: 16 MB of logits"
    assert "GPU-hours" in found[0] and all("GPU-hours" not in out for out in found[1:])


def test_what_whole_copies_cannot_do_parts_may(tiny, tmp_path, capsys, monkeypatch):
    """Too large for any one GPU: train.py's dry run names train_fsdp.py, whose own has nothing to
    add; a card that is not known is named before a line is printed."""
    monkeypatch.setattr(simulate, "fake_run", None)
    wide = {"d_model": 8192, "n_layers": 12, "d_ff": 32768, "max_seq_len": 64}
    path = write_yaml(
        tmp_path / "c.yaml", tiny(model=wide, batch_size=1, gradient_accumulation_steps=8)
    )
    assert train.main([str(path), "--dry_run", "--hardware=h100"]) == 0
    text = "none x 80 GB, none x 141 GB hold replicas of it; train_fsdp.py needs 4 x 80 GB or 2 x 141 GB"
    assert text in capsys.readouterr().out
    out = dry(capsys, path, "--world_size=4", "--hardware=h100")
    assert "4 x 80 GB, 2 x 141 GB hold it (powers" in out and "replicas" not in out
    with pytest.raises(UserError, match="a100-80gb or a100-40gb"):
        train.main([str(path), "--dry_run", "--hardware=a100"])
    assert capsys.readouterr().out == ""


def test_years_on_a_cpu_are_called_years(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machines, "matrix_peak", lambda *a: 1e5)
    path = write_yaml(tmp_path / "c.yaml", tiny(max_steps=10**6))
    assert train.main([str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^length .* years without .*: not on this machine$", out, re.M)
    assert re.search(r"^assumed .*not measured: a micro-batch would take about ", out, re.M)
    assert re.search(
        r"^compute .* years if every FLOP ran at the matrix peak, 100 kFLOP/s measured here$",
        out,
        re.M,
    )


def dry(capsys, *words) -> str:
    assert train_fsdp.main([*map(str, words), "--dry_run"]) == 0
    return capsys.readouterr().out


@pytest.mark.nightly  # 12 s; the smaller ones stay
def test_the_largest_preset_in_a_minute():
    start = time.time()
    result = run_python(
        "train_fsdp.py", "configs/scale/b300.yaml", "--dry_run", "--world_size=1024", timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seconds = time.time() - start
    print(f"{seconds:.0f} s")
    for words in ("SIMULATION of 1,024 x h100", "2,426,875,024,384", "fits", "checkpoint 29.1 TB", "all-gather",
                  "GPU-hours", "cheapest", "smallest", "data sheet"):  # fmt: skip
        assert words in result.stdout, words
    assert re.search(r"checked .* plan", result.stdout), result.stdout[-1500:]


@pytest.mark.parametrize("words", [(), ("--expert_parallel=4",)])
def test_fake_tensors_and_the_plan_agree(capsys, words):
    given = ("--model.n_experts=8", "--model.d_expert=512", "--model.n_layers=8", "--batch_size=2")
    given += (
        "--batch_tokens=null",
        "--max_steps=100",
        "--model.d_model=768",
        "--activation_checkpointing=block",
    )
    out = dry(
        capsys, ROOT / "configs/gpt2_124m.yaml", *given, *words, "--world_size=8", "--hardware=h200"
    )
    off = float(re.search(r"checked .*: ([+-][\d.]+)%", out)[1])
    print(f"{off:+.1f} %")
    assert abs(off) < 5, out


def test_refusals(tiny, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", tiny(model={"n_experts": 6, "d_expert": 16})))
    for words, code, text in (
        (["--hardware=h10"], "E002", "did you mean h100?"),
        (
            ["--world_size=8", "--hsdp_shard_size=3"],
            "E002",
            "hsdp_shard_size: 3 does not divide the 8 ranks",
        ),
        (
            ["--world_size=8", "--expert_parallel=4"],
            "E002",
            "expert_parallel: 4 does not divide the 6 experts",
        ),
        (
            ["--world_size=9", "--expert_parallel=2"],
            "E002",
            "expert_parallel: 2 does not divide the 9 ranks",
        ),
        (["--world_size=4", "--expert_parallel=2", "--hsdp_shard_size=2"], "E002", "drop one"),
        (["--world_size=many"], "E002", "--world_size: 'many' is not int"),
        (["--world_size=0"], "E002", "must be above 0"),
        (["--mfu=-1"], "E002", "must be above 0"),
    ):
        with pytest.raises(UserError, match=re.escape(text)) as e:
            dry(capsys, path, *words)
        assert e.value.code == code
    with pytest.raises(UserError, match="--dry_run only"):
        read_config([path, "--world_size=2"])


def test_train_py_simulates_copies_and_this_machine(tiny, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", tiny()))
    assert (
        train.main([path, "--dry_run", "--world_size=2", "--hardware=rtx4090", "--memory_gb=12"])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "2 x 1 (replicate, shard), zero_stage 0" in out
        and "all-reduce" in out
        and "given: memory" in out
    )
    assert train.main([path, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "on this machine: one process" in out and "traffic" not in out
    assert re.search("^measured   here, the median of", out, re.M)


# ---------------------------------------------------------------- a run on this machine

SPARSE = {
    "dense": {},
    "moe": {"n_experts": 4, "d_expert": 32, "n_experts_per_token": 2},
    "mod": {"mod_capacity": 0.5, "mod_every": 2},
}


def said_here(capsys, path, *words) -> str:
    """What the dry run says after the start lines."""
    assert train.main([str(path), "--dry_run", *words]) == 0
    out = capsys.readouterr().out
    assert out.count("\non this machine: ") == 1
    return out[out.index("on this machine: ") :]


def tokens_per_second(out: str) -> float:
    number, unit = re.search(r"; ([\d.]+)([kM]?) tokens/s$", out, re.M).groups()
    return float(number) * {"": 1, "k": 1e3, "M": 1e6}[unit]


@pytest.mark.parametrize("kind", SPARSE)
def test_a_step_is_as_fast_as_was_said(tiny, tmp_path, capsys, kind):
    """Beside the real steps, in one process; the assumption would be off twenty times here. And
    checkpoints: how many are kept, and how large they are."""
    keys = tiny(
        model=SPARSE[kind] | {"d_model": 64}, save_total_limit=1, max_steps=30, save_interval=10
    )
    out = said_here(capsys, write_yaml(tmp_path / "c.yaml", keys))
    assert "the time is measured" in out and "assumed" not in out
    trainer, times = train.Trainer(keys), []
    for _ in trainer.iterations():
        times.append(time.perf_counter())
    trainer.end()
    capsys.readouterr()
    real = 2 * 2 * 32 / statistics.median(b - a for a, b in itertools.pairwise(times))
    print(f"{tokens_per_second(out):.0f} tokens/s said, {real:.0f} real")
    assert 1 / 4 < tokens_per_second(out) / real < 4
    size, unit, most = re.search(
        r"^checkpoint ([\d.]+) ([kM])B each, (\d+) of them", out, re.M
    ).groups()
    kept = sorted(Path(keys["out_dir"]).glob("step_*"))
    assert 1 <= len(kept) <= int(most) == 2
    real = sum(file.stat().st_size for file in kept[-1].glob("*.safetensors"))
    assert float(size) * {"k": 1e3, "M": 1e6}[unit] == pytest.approx(real, rel=0.1)


def test_a_given_mfu_wins(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simulate, "try_step", lambda *a: pytest.fail("a step was tried"))
    path = write_yaml(tmp_path / "c.yaml", tiny())
    slow, fast = (said_here(capsys, path, f"--mfu={mfu}") for mfu in (1e-5, 1e-4))
    assert "0.001 % of the matrix peak (mfu) by --mfu" in slow and "time is given" in slow
    assert tokens_per_second(fast) == pytest.approx(10 * tokens_per_second(slow), rel=0.2)


@pytest.mark.parametrize("words", [(), ("--hardware=cpu",), ("--mfu=0.3",), ("--memory_gb=1e-3",)])
def test_a_cpu_is_told_nothing_of_gpus(tiny, tmp_path, capsys, words):
    path = write_yaml(tmp_path / "c.yaml", tiny(model=SPARSE["moe"]))
    out = said_here(capsys, path, *words)
    if "--memory_gb=1e-3" in words:  # there the advice names what would hold it
        assert "not measured: it needs more memory than the 0.877 MiB" in out
        out = out[: out.index("advice     this may not fit: ")]
    for foreign in ("GPU", "H100", "h100", "torchtitan", "SIMULATION", "core-hours", "fits"):
        assert foreign not in out
    for foreign in ("cheapest", "smallest", "mesh", "rank", "link", " GB/s", " 0.00"):
        assert foreign not in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_cluster_is_simulated_as_before(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simulate, "try_step", lambda *a: pytest.fail("a step was tried"))
    path = write_yaml(tmp_path / "c.yaml", tiny(batch_size=4))
    several = ["--world_size=2"]
    for words in (
        ["--hardware=h200"],
        [*several, "--hardware=h200"],
        several,
        [*several, "--hardware=measured"],
    ):
        assert train.main([str(path), "--dry_run", *words]) == 0
        out = capsys.readouterr().out
        assert "SIMULATION of" in out and "nothing below was measured" in out
        for label in ("mesh", "checkpoint", "time", "assumed", "cheapest", "smallest"):
            assert f"\n{label} " in out
        unit = "core-hours" if "--hardware=measured" in words else "GPU-hours"
        assert "fits GB" in out and unit in out and "on this machine" not in out


def test_what_cannot_be_tried_is_assumed_and_says_why(tiny, tmp_path, capsys, monkeypatch):
    path = write_yaml(tmp_path / "c.yaml", tiny())

    def fails(*a):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(simulate, "try_step", fails)
    out = said_here(capsys, path)
    assert "not measured: a trial failed, RuntimeError: no such kernel\n" in out
    assert "the time is assumed" in out and "38 % of the matrix peak (mfu) is a guess" in out
    monkeypatch.setattr(simulate, "try_step", lambda *a: pytest.fail("a step was tried"))
    for key, value in {"freeze": ["embeddings"], "lora": {"r": 2}}.items():
        found = read_config([str(write_yaml(tmp_path / f"{key}.yaml", tiny(**{key: value})))])
        assert simulate.dry_run(*found[:3], {}) == 0
        assert "not measured: only whole models are tried" in capsys.readouterr().out
    monkeypatch.setattr(machines, "available_memory", lambda: 1000)
    assert "not measured: it needs more memory than the 0.000954 MiB" in said_here(capsys, path)


@pytest.mark.parametrize("documents", [False, True])
def test_a_trial_takes_other_ids_each_step_and_changes_nothing(documents, tiny, monkeypatch):
    """Experts then get other numbers of tokens each time, as in a run."""
    trainer = train.Trainer(tiny(model=SPARSE["moe"] | {"dropout": 0.0}))
    seen, micro_step = [], trial.Step.micro_step

    def looked_at(step):
        seen.append((step.x.clone(), step.docs))
        assert {moe.backend for moe in step.moe} == {trainer.run.expert_backend}
        return micro_step(step)

    monkeypatch.setattr(trial.Step, "micro_step", looked_at)
    monkeypatch.setattr(trial, "ENOUGH", 0.0)
    assert trainer.run.deterministic
    torch.use_deterministic_algorithms(False)
    how = (trainer.cfg, trainer.run, trainer.machine)
    found, n = trial.try_step(*how, documents)
    trainer.close()
    assert n == trial.LEAST and len(seen) == n + 1 and min(found) > 0
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations(seen, 2))
    assert all((docs is not None) == documents for _, docs in seen)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("recompute", plan.RECOMPUTE)
def test_the_mfu_is_that_with_which_a_step_takes_what_it_took(recompute):
    model, layout = plan.on_meta(DENSE), plan.Layout()
    step = plan.StepShape(2, 3, "fp32", recompute)
    assumed = simulate.Assumed(mfu=0.4)
    before = simulate.simulate_step(model, layout, step, H100, assumed)
    for factor in (0.5, 20):
        took = trial.Trial(factor * before.seconds["compute"] / 3, 0.125)
        assumed = simulate.measured(before, model, H100, assumed, took)
        after = simulate.simulate_step(model, layout, step, H100, assumed)
        assert after.seconds["compute"] == pytest.approx(factor * before.seconds["compute"])
        assert after.seconds["optimizer"] == 0.125
        if recompute == "none":
            assert assumed.mfu == pytest.approx(0.4 / factor)


def test_sizes_and_times_as_one_says_them():
    sizes = {4266496: "4.07 MiB", 5000: "0.00477 MiB", 3 << 29: "1.50 GiB"}
    assert {n: simulate.size_text(n) for n in sizes} == sizes
    times = {
        0.047: "47 ms",
        8.21: "8.21 s",
        140: "2m20s",
        3599.7: "59m59s",
        11100: "3h05m",
        5e6: "57.9 days",
    }
    assert {seconds: simulate.plain_time(seconds) for seconds in times} == times
