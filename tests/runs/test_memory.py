"""What does not fit is refused before it is built; the probe and the snapshots take what memory
there is."""

import dataclasses
import functools
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fingerprint, write_yaml
from rig import wide

import train
import train_fsdp
from lumen import config, plan, probe, resolve, setup
from lumen import machine as machines
from lumen.cli import presets, read_config
from lumen.errors import UserError
from lumen.snapshots import Snapshots
from model import ModelConfig
from train import Trainer


def memory_of(monkeypatch, size: float) -> None:
    """This machine has `size` bytes."""
    monkeypatch.setattr(machines, "total_memory", lambda device: size)


def forbid(monkeypatch, *names) -> None:
    """Whoever prepares data, meets others or builds a model fails the test."""
    for name in names:
        monkeypatch.setattr(
            train, name, lambda *a, **k: pytest.fail("too late: something was begun")
        )


@pytest.mark.parametrize("name", ["b1", "b3_inference"])
def test_a_preset_that_no_batch_size_makes_fit_is_refused_at_once(monkeypatch, name):
    """`python train.py b1` on a laptop: refused before data are prepared, with what would hold it;
    nothing grows."""
    memory_of(monkeypatch, 16 << 30)
    forbid(monkeypatch, "prepare_first", "Transformer", "Parallel")
    with pytest.raises(UserError) as e:
        train.main([name])
    text, whole = (
        e.value.text,
        {"b1": "118.6 GiB a process, and there are 16.0 GiB", "b3_inference": "44.3 GiB"},
    )
    assert (
        (e.value.code, e.value.exit_code) == ("E200", 2)
        and whole[name] in text
        and "no batch_size helps" in text
    )
    assert {"b1": "a GPU of 192 GB", "b3_inference": "a GPU of 80 GB"}[name] in text
    assert {"b1": "train_fsdp.py needs 2 x 80 GB", "b3_inference": "train_fsdp.py needs 1 x 80 GB"}[
        name
    ] in text


def test_a_model_without_a_vocabulary_yet_is_refused_before_its_text_is_read(
    monkeypatch, tiny, tmp_path
):
    """vocab_size comes with data that are still to be prepared; the layers alone are too much."""
    memory_of(monkeypatch, 1 << 30)
    forbid(monkeypatch, "prepare_first", "Parallel")
    keys = tiny(
        prepare={"sources": ["stdlib"]},
        data_dir=...,
        model={"d_model": 2048, "n_layers": 24, "d_ff": 8192},
    )
    del keys["model"]["vocab_size"]
    with pytest.raises(UserError, match="E200.*alone"):
        train.main([str(write_yaml(tmp_path / "c.yaml", keys))])


def test_what_is_too_large_for_whole_copies_may_fit_in_parts(monkeypatch):
    """b1 on eight machines of 20 GiB: train.py keeps a copy on each and is refused, train_fsdp.py
    is not; on two it is, by its own layout."""
    memory_of(monkeypatch, 20 << 30)
    cfg = read_config(["b1"])[0]
    train.check_states(cfg, train_fsdp.layout_of(cfg, 8))
    for layout in (plan.Layout(8), train_fsdp.layout_of(cfg, 2)):
        with pytest.raises(UserError, match="E200.* gradients and moments alone"):
            train.check_states(cfg, layout)


def need(keys) -> float:
    cfg = config.build_config(keys | {"orchestrator": {}}, lambda key: "test", [])
    rows = (cfg.batch_size, cfg.batch_size * cfg.gradient_accumulation_steps // cfg.batch_size)
    model, how = plan.on_meta(cfg.model), ("fp32", cfg.activation_checkpointing)
    return plan.rank_memory(model, plan.Layout(cuda=False), *rows, *how, plan.IMBALANCE)["total"]


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_too_many_rows_are_refused_and_what_is_named_instead_fits(monkeypatch, tiny, share):
    """A batch that needs more than there is: the message names a batch_size and a recomputation,
    and each starts."""
    keys = wide(tiny)
    memory_of(monkeypatch, need(keys) * share)
    with pytest.raises(UserError, match="E200") as e:
        Trainer(keys)
    assert not Path(keys["out_dir"]).exists()
    named = [dict(pair.split(": ") for pair in words.split(" with ")) for words in re.findall(
        r"((?:\w+: \w+)(?: with \w+: \w+)*)(?= or | would fit)", e.value.text)]  # fmt: skip
    assert len(named) == 3 and {"batch_size", "activation_checkpointing"} == {
        k for found in named for k in found
    }
    for found in named:
        Trainer(keys | {k: int(v) if v.isdigit() else v for k, v in found.items()}).loader.close()


def test_what_may_fit_is_advised_against_and_tried(monkeypatch, tiny, capsys):
    """The estimate is a few percent above the memory, and may be wrong by that: the run starts,
    with a warning."""
    keys = wide(tiny)
    memory_of(monkeypatch, need(keys) / 1.07)
    Trainer(keys).loader.close()
    assert re.search(r"advice     this may not fit: about .* would fit", capsys.readouterr().out)
    memory_of(monkeypatch, need(keys) * 1.01)
    Trainer(keys | {"out_dir": keys["out_dir"] + "-2"}).loader.close()
    assert "not fit" not in capsys.readouterr().out


def test_a_dry_run_never_refuses(monkeypatch, tiny, tmp_path, capsys):
    """Its question is what would fit: it says that this does not, also where batch_size: auto finds
    nothing."""
    memory_of(monkeypatch, 1000)
    keys = tiny(
        batch_size="auto", batch_tokens=512, gradient_accumulation_steps=..., model={"n_experts": 4}
    )
    monkeypatch.setattr(resolve, "pick_backend", lambda *a: pytest.fail("experts were made"))
    assert train.main([str(write_yaml(tmp_path / "c.yaml", keys)), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "slices: nothing tried" in out, "a layer of b300's experts alone is 97 GB"
    assert "this will not fit: weights, gradients and moments alone" in out
    assert "not measured: it needs more memory" in out


def on_a_gpu(monkeypatch, trainer, memory: float, need) -> None:
    """The trainer's probe meets a GPU of so many bytes, of which r rows take need(r): what does not
    fit ends in the middle of backward. Made up: never run on a GPU."""

    def peak(trainer, rows):
        model = trainer.model
        held = sum(p.grad is not None for p in model.parameters())
        step = trainer.run.rows_per_step
        assert held == (len(list(model.parameters())) if rows < step else 0), (
            "an earlier micro-step's gradients"
        )
        ids = torch.zeros(2, 32, dtype=torch.long)
        total, hook = model(ids, targets=ids)[0], model.blocks[0].attn.wqkv.weight.register_hook
        hook = hook(lambda grad: full() if need(rows) > memory else None)
        try:
            total.backward()
        finally:
            hook.remove()
        return need(rows)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    monkeypatch.setattr(probe, "peak_bytes", peak)
    memory_of(monkeypatch, memory)


def test_the_probe_finds_the_largest_batch_that_fits(monkeypatch, tiny):
    """batch_size: auto drew a straight line through one and two rows, but the loss takes only so
    many logits at a time: 32 rows were found where 64 fitted, by the plan's own numbers."""
    trainer = Trainer(tiny(model={"dropout": 0.0}))
    for name, memory in (("gpt2_124m", 80e9), ("moe_124m", 80e9), ("lumi_base", 24e9)):
        keys = yaml.safe_load(presets()[name].read_text())
        cfg = ModelConfig(**keys["model"])
        n, rows = plan.count_parameters(plan.on_meta(cfg)), keys["batch_tokens"] // cfg.max_seq_len
        need = functools.cache(
            lambda r, cfg=cfg, n=n: plan.memory(cfg, n, r, "mixed_bf16")["total"]
        )
        on_a_gpu(monkeypatch, trainer, memory, need)
        trainer.run = dataclasses.replace(trainer.run, rows_per_step=rows)
        setup.probe(trainer)
        best = max(r for r in range(1, rows + 1) if rows % r == 0 and need(r) <= 0.92 * memory)
        assert 1 < best < rows and trainer.run.micro_batch == best
    trainer.loader.close()


def test_a_probe_that_runs_out_of_memory_leaves_no_gradient(monkeypatch, tiny):
    """In the middle of backward, at one of the sizes it tries: what lay in .grad then was trained
    on. And where one row is too much it says so; torch's error came out of it as a traceback."""
    whole, trainer = (
        Trainer(tiny(name, model={"dropout": 0.0}, max_steps=2)) for name in ("whole", "run")
    )
    on_a_gpu(monkeypatch, trainer, 2500, lambda rows: 1000 * rows)
    setup.probe(trainer)
    assert trainer.run.micro_batch == 2 and all(p.grad is None for p in trainer.model.parameters())
    on_a_gpu(monkeypatch, trainer, 900, lambda rows: 1000 * rows)
    with pytest.raises(UserError, match="E200: batch_size: auto.*one row does not fit") as e:
        setup.probe(trainer)
    assert e.value.exit_code == 2 and all(p.grad is None for p in trainer.model.parameters())
    assert trainer.fit() == whole.fit() == 0
    assert fingerprint(trainer.out, 2) == fingerprint(whole.out, 2)


def test_memory_that_holds_only_files_is_free_for_snapshots(tmp_path):
    """A container has read its data and the kernel keeps the pages: they count as used, and are
    given to whoever asks. Limits may lie above the process's own group, as Slurm's do, and be of
    cgroups' version 1 or 2."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 200 kB\nMemAvailable:       104857600 kB\n")
    assert machines.available_memory(tmp_path) == 100 << 30
    (tmp_path / "proc/self/cgroup").write_text(
        "4:cpu,cpuacct:/x\n3:memory:/job/step\n0::/job/step\n"
    )
    for root, job, names in (
        ("sys/fs/cgroup", "job", ("memory.max", "memory.current", "")),
        (
            "sys/fs/cgroup/memory",
            "job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
        (
            "sys/fs/cgroup/memory",
            "",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),  # a container's
    ):
        folder = tmp_path / root / job
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(f"{64 << 30}\n")
        (folder / names[1]).write_text(f"{63 << 30}\n")
        assert machines.available_memory(tmp_path) == 1 << 30
        lines = f"anon 5\n{names[2]}active_file {20 << 30}\n{names[2]}inactive_file {33 << 30}\n"
        (folder / "memory.stat").write_text(lines)
        assert machines.available_memory(tmp_path) == 54 << 30 and (64 << 30) in [
            n for n, _ in machines.cgroups(tmp_path)
        ]
        shutil.rmtree(tmp_path / "sys")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machines.cgroups(tmp_path) == [] and machines.available_memory(tmp_path) == 100 << 30


def test_where_the_system_does_not_say_what_is_free_there_are_snapshots(tmp_path):
    """macOS has no /proc: nothing counted as free, so there was never a snapshot."""
    assert machines.available_memory(tmp_path) == machines.total_memory("cpu") // 2 > 0


def test_pinned_snapshots_count_as_large_as_torch_makes_them():
    """CUDA's host allocator rounds up to powers of two: what seemed to fit was up to twice as
    much."""
    sizes = {"a": (3, True), "b": (1025, True), "c": (1025, False), "none": (0, True)}
    regions = {k: types.SimpleNamespace(numel=lambda n=n: n, element_size=lambda: 4, is_cuda=c) for k, (n, c) in
               sizes.items()}  # fmt: skip
    snapshots = Snapshots(lambda: regions)
    assert snapshots.size() == 16 + 8192 + 4100
