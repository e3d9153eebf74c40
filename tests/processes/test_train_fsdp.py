"""train_fsdp.py against train.py: the model in parts trains, saves and is repaired as the whole one
is.

This file is also what torchrun starts: `torchrun tests/processes/test_train_fsdp.py JOBS`, see
`main` at its end."""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_lines, run_python, write_yaml
from forks import run_forked
from safetensors.torch import load_file

import export
import sample
import train
from lumen import checkpoint, heap
from lumen.config import build_config
from lumen.errors import UserError
from lumen.launch import command
from tools.bench import high_water
from train import Parallel, Trainer
from train_fsdp import Sharded, make_parallel

MOE = {
    "n_experts": 4,
    "n_experts_per_token": 2,
    "d_expert": 24,
    "n_experts_max": 8,
    "router": "sigmoid",
}
KINDS = {
    "dense": {"tie_embeddings": False},
    "moe": MOE,
    "hybrid": MOE | {"mod_capacity": 0.5, "mod_layers": [1]},
}
KINDS["documents"] = KINDS["hybrid"]  # on rows whose documents do not see each other
KINDS["few"] = MOE | {
    "n_experts_max": 6
}  # neither 6 nor 3 experts divide evenly: cut along the next dimension
KINDS["muon"] = KINDS["hybrid"]  # with that optimizer
KINDS["muon, few"] = KINDS["few"]
# two numbers a mix: of four ranks two hold none of it
KINDS["extras"] = {"extras": ["value_residual", "x0", "relu2", "softcap"]}
BF16 = {"precision": "mixed_bf16"}
LAYOUTS = {  # ranks, kind of model, keys
    "fsdp 2": (2, "dense", {}),
    "fsdp 2 moe": (2, "moe", {}),
    "fsdp 2 hybrid": (2, "hybrid", {}),
    "zero 2": (2, "moe", {"zero_stage": 2}),
    "zero 1": (2, "moe", {"zero_stage": 1}),
    "zero 0": (2, "moe", {"zero_stage": 0}),
    "ep 2": (2, "moe", {"expert_parallel": 2}),
    "recompute": (2, "moe", {"activation_checkpointing": "full"}),
    "selective": (2, "hybrid", {"activation_checkpointing": "selective", "expert_parallel": 2}),
    "bf16": (2, "moe", BF16),
    "bf16 ep 2": (2, "moe", BF16 | {"expert_parallel": 2}),
    "reduce bf16": (2, "dense", {"reduce_dtype": "bf16"}),
    "fsdp 4": (4, "hybrid", {"save_async": True}),
    "hsdp 2 x 2": (4, "moe", {"hsdp_shard_size": 2}),
    "ep 4": (4, "moe", {"expert_parallel": 4}),
    "ep 2 x fsdp 2": (4, "moe", {"expert_parallel": 2}),
    "compiled": (2, "moe", {"expert_parallel": 2, "compile_model": True}),
    "hsdp, zero 1": (4, "dense", {"hsdp_shard_size": 2, "zero_stage": 1}),
    "documents": (2, "documents", {}),
    "documents, ep 2": (
        2,
        "documents",
        {"expert_parallel": 2, "activation_checkpointing": "selective"},
    ),
    "documents, zero 0": (2, "documents", {"zero_stage": 0}),
    "extras": (4, "extras", {"activation_checkpointing": "block"}),
    "few experts": (4, "few", {}),
    "few experts, ep 2": (4, "few", {"expert_parallel": 2}),
    "muon": (2, "muon", {}),
    "muon, zero 1": (2, "muon", {"zero_stage": 1}),
    "muon, zero 0": (2, "muon", {"zero_stage": 0}),
    "muon, ep 2": (2, "muon", {"expert_parallel": 2}),
    "muon, bf16": (2, "muon", BF16),
    "muon, hsdp 2 x 2": (4, "muon", {"hsdp_shard_size": 2}),
    "muon, few experts": (4, "muon, few", {}),  # each expert is gathered
    "muon, few experts, ep 2": (4, "muon, few", {"expert_parallel": 2}),
}
NIGHTLY = {
    "documents, ep 2",
    "documents, zero 0",
    "ep 4",  # what it reads, writes and goes on from is seen below
    "zero 2",
    "compiled",
    "zero 0",
    "recompute",
    "bf16",
    "reduce bf16",
    "fsdp 2 moe",
    "fsdp 2 hybrid",
    "muon, zero 1",
    "muon, zero 0",
    "muon, ep 2",
    "muon, bf16",
    "muon, hsdp 2 x 2",
    "muon, few experts, ep 2",
    "extras",
}
ROUGH = {"bf16", "bf16 ep 2", "reduce bf16", "muon, bf16"}
STEPS = 7


@pytest.fixture(scope="module")
def keys(shards, tmp_path_factory):
    """keys(name, kind, **changes): of a run of 16 rows a step, which 1, 2 and 4 ranks can share."""
    top = tmp_path_factory.mktemp("fsdp")
    documents, rng = str(tmp_path_factory.mktemp("documents")), np.random.default_rng(0)
    for file in sorted(Path(shards).glob("*.npy")):
        shutil.copy(file, documents)
        starts = np.cumsum(np.append(0, rng.integers(1, 60, 100))).astype(np.uint64)
        tokens = len(np.load(file))
        starts = np.append(starts[starts < tokens], np.uint64(tokens))
        np.save(Path(documents) / f"{file.stem}.docs.npy", starts)

    def make(name, kind="moe", **changes) -> dict:
        shape = {
            "vocab_size": 97,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 48,
        }
        shape |= {"init_std": 0.02}  # what rounding costs is absolute
        run = {
            "data_dir": shards,
            "out_dir": str(top / name.replace(" ", "_")),
            "max_steps": STEPS,
            "device": "cpu",
        }
        run |= {
            "batch_size": 2,
            "batch_tokens": 16 * 32,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "grad_clip": 0.5,
        }
        run |= {
            "save_interval": 5,
            "log_interval": 1,
            "eval_tokens": 512,
            "precision": "fp32",
            "compile_model": False,
        }
        run |= {"save_total_limit": 0, "expert_backend": "slices", "val_fraction": 0.05}
        if kind == "documents":
            run |= {"data_dir": documents, "document_mask": True}
        if "muon" in kind:
            run |= {"optimizer": "muon"}
        return run | {"model": shape | {"max_seq_len": 32} | KINDS[kind]} | changes

    return make


def launch(top, jobs, ranks) -> str:
    path = write_yaml(Path(top) / f"jobs_{ranks}", jobs)
    result = run_forked(__file__, path, ranks=ranks, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-10000:]
    return result.stdout


def whole(out_dir, step=STEPS) -> dict[str, torch.Tensor]:
    saved = checkpoint.Checkpoint(checkpoint.step_dir(out_dir, step))
    assert not saved.verify()
    return {n: saved.read(n, [0] * len(t["shape"]), t["shape"]) for n, t in saved.tensors.items()}


def rows(out_dir, key) -> dict:
    return {r["step"]: r[key] for r in read_lines(Path(out_dir) / "metrics.jsonl") if key in r}


def alone(config) -> dict:
    trainer = Trainer(config)
    assert trainer.fit() == 0
    return config


@pytest.fixture(scope="module")
def bases(keys) -> dict:
    """What one process makes of each kind of model."""
    return {kind: alone(keys(f"base {kind}", kind))["out_dir"] for kind in KINDS}


@pytest.fixture(scope="module")
def parts(request, keys, bases, tmp_path_factory) -> dict:
    """The same in every layout: one launch of two ranks, one of four."""
    left_out = NIGHTLY if request.config.option.markexpr == "not nightly" else ()
    out = {
        name: keys(name, kind, **changes)
        for name, (_, kind, changes) in LAYOUTS.items()
        if name not in left_out
    }
    for ranks in (2, 4):
        jobs = [{"do": "train", "config": out[name]} for name in out if LAYOUTS[name][0] == ranks]
        said = launch(tmp_path_factory.mktemp("jobs"), jobs, ranks)
    assert said.count("of which training waited") == 2, "save_async: both times of both saves"
    return {name: config["out_dir"] for name, config in out.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.nightly) if n in NIGHTLY else n for n in LAYOUTS]
)
def test_parts_train_as_the_whole(parts, bases, name):
    """Losses, norms, routing, evaluations and all tensors, moments too, after seven clipped steps
    of two to eight micro-steps; expert gradients are those of all ranks' tokens, whoever holds the
    expert."""
    mine, base = parts[name], bases[LAYOUTS[name][1]]
    loss, norm = (1e-2, 1e-2) if name in ROUGH else (1e-5, 1e-4)
    for key, limit in (("loss", loss), ("grad_norm", norm), ("val_loss", loss)):
        a, b = rows(mine, key), rows(base, key)
        assert len(a) >= 2 and a == pytest.approx(b, abs=limit), key
    a, b = whole(mine), whole(base)
    assert a.keys() == b.keys()
    for tensor in a:
        apart = (a[tensor].double() - b[tensor].double()).abs()
        if name not in ROUGH and name.startswith("muon"):
            # its cautious decay goes by a sign, which a rounding may turn: lr x decay x weight
            assert apart.max() <= 2e-5 and (apart > 2e-6).float().mean() <= 1e-3, tensor
        elif name not in ROUGH:
            assert apart.max() <= 2e-6, tensor
        elif (
            tensor.startswith("model.") and a[tensor].dim() > 1
        ):  # AdamW turns the sign of a rounding into a whole step
            assert apart.norm() <= 0.1 * b[tensor].double().norm(), tensor
    if name not in ROUGH and "n_experts" in KINDS[LAYOUTS[name][1]]:
        a, b = (rows(d, "experts/share/0") for d in (mine, base))
        assert all(x[:4] == pytest.approx(b[step][:4]) for step, x in a.items()), (
            "counted over all ranks"
        )


# ---------------------------------------------------------------- checkpoints

WRITERS = {2: ("fsdp 2", "zero 0", "ep 2"), 4: ("fsdp 4", "hsdp 2 x 2", "ep 2 x fsdp 2", "ep 4")}


@pytest.mark.parametrize("ranks", [4, pytest.param([2, 4], marks=pytest.mark.nightly)], ids=str)
def test_any_layout_reads_what_any_other_wrote(keys, bases, tmp_path, ranks):
    """Seven layouts load one checkpoint and write it again; each then reads all of these, and goes
    on from one."""
    writers = {n: names for n, names in WRITERS.items() if n == ranks or ranks == [2, 4]}
    first = {n: t for n, t in whole(bases["hybrid"], 5).items()}
    layouts, folders = {}, {"base": checkpoint.step_dir(bases["hybrid"], 5)}
    for ranks, names in writers.items():
        for name in names:
            config = keys(f"again {len(writers)} {ranks} {name}", "hybrid", **LAYOUTS[name][2])
            shutil.copytree(folders["base"], checkpoint.step_dir(config["out_dir"], 5))
            layouts[ranks, name] = config
            folders[name] = checkpoint.step_dir(config["out_dir"], 5)
    for ranks, names in writers.items():
        launch(tmp_path, [{"do": "write", "config": layouts[ranks, name]} for name in names], ranks)
    for name, folder in folders.items():
        saved = checkpoint.Checkpoint(folder)
        again = whole(folder.parent, 5)
        assert again.keys() == first.keys() and all(
            torch.equal(again[n], first[n]) for n in first
        ), name
        files = [f for f in saved.manifest["files"] if f.endswith(".safetensors")]
        assert len(files) == {"base": 1, "zero 0": 1, "hsdp 2 x 2": 2}.get(
            name, 4 if name in WRITERS[4] else 2
        ), name
    for ranks, names in writers.items():
        flipped = keys(
            f"flipped {len(writers)}", hsdp_shard_size=2, orchestrator={"check_interval": 2}
        )
        few = keys(f"few again {len(writers)} {ranks}", "few", expert_parallel=2)
        jobs = [
            {"do": "read", "config": few, "folders": [str(checkpoint.step_dir(bases["few"], 5))]}
        ]
        jobs += [{"do": "train", "config": flipped, "flip": [3, 5]}] * (ranks == 4)
        for name in names:
            jobs.append(
                {
                    "do": "read",
                    "config": layouts[ranks, name],
                    "folders": [str(f) for f in folders.values()],
                }
            )
            jobs.append({"do": "train", "config": layouts[ranks, name]})
        launch(tmp_path, jobs, ranks)
        if ranks == 4:  # two copies of the weights, which are compared every second step
            row = next(
                d
                for d in read_lines(Path(flipped["out_dir"]) / "decisions.jsonl")
                if d["trigger"] == "desync"
            )
            assert (
                row["action"] == "rollback"
                and row["turn"] <= 8
                and "weights differ" in row["reason"]
            )
        for name in names:
            after, base = (
                rows(layouts[ranks, name]["out_dir"], "loss"),
                rows(bases["hybrid"], "loss"),
            )
            assert after == pytest.approx({s: base[s] for s in range(6, STEPS + 1)}, abs=1e-6), name
    again = keys(f"alone again {len(writers)}", "hybrid")
    shutil.copytree(folders["ep 2 x fsdp 2"], checkpoint.step_dir(again["out_dir"], 5))
    after = rows(alone(again)["out_dir"], "loss")
    assert after == pytest.approx({s: base[s] for s in range(6, STEPS + 1)}, abs=1e-6), (
        "one process after four"
    )


def test_one_file_from_parts_without_a_moment(parts, bases, tmp_path, monkeypatch):
    """export.py and sample.py read what two ranks wrote as they read any other run; a weight at a
    time, no moment."""
    read, asked, folders = checkpoint.Checkpoint.read, [], (bases["dense"], parts["fsdp 2"])
    monkeypatch.setattr(
        checkpoint.Checkpoint,
        "read",
        lambda s, name, *a: (asked.append(name), read(s, name, *a))[1],
    )
    for i, folder in enumerate(folders):
        export.to_hf(folder, tmp_path / str(i))
    one, two = (load_file(tmp_path / str(i) / "model.safetensors") for i in range(2))
    assert one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= 2e-6 for k in one)
    models = [sample.load(folder, device="cpu", precision="fp32")[0] for folder in folders]
    ids = torch.arange(20)[None]
    assert (models[0](ids) - models[1](ids)).abs().max() < 1e-4
    assert asked and all(name.startswith("model.") for name in asked)


# ---------------------------------------------------------------- what is done to a run


# of which seven are cut along the next dimension
SLOTS = {2: {"fsdp 2": 7, "ep 2": 8}, 4: {"hsdp 2 x 2": 7, "ep 2 x fsdp 2": 8}}


@pytest.mark.parametrize(
    "ranks, optimizer",
    [
        (2, "adamw"),
        pytest.param(4, "adamw", marks=pytest.mark.nightly),
        pytest.param(2, "muon", marks=pytest.mark.nightly),
    ],
)
def test_slots_and_rollback_in_parts_are_those_of_the_whole(keys, tmp_path, ranks, optimizer):
    """Experts are split, pruned and recycled where their rows lie on other ranks; the weights go
    back to a snapshot in parts, moments too. And init_from takes such a run's weights into a model
    with more slots."""
    todo = {
        3: ["add_expert", 0],
        5: ["prune_expert", 0, 1, True],
        6: ["_initialize_new_expert", [1, 5], [0, 2]],
    }
    todo |= {7: ["rollback_steps", 3], 8: ["adjust_batch_size", 1], 9: ["get_expert_statistics"]}
    name = f"slots base {ranks} {optimizer}"
    config = keys(name, max_steps=10, orchestrator={"snapshot_interval": 1}, optimizer=optimizer)
    pairs = []
    for name, slots in SLOTS[ranks].items():
        base = config | {
            "out_dir": f"{config['out_dir']} {slots}",
            "model": config["model"] | {"n_experts_max": slots},
        }
        pairs.append(
            (name, base, base | {"out_dir": f"{config['out_dir']} {name}"} | LAYOUTS[name][2])
        )
        trainer = Trainer(base)
        drive(trainer, todo)
        assert trainer.fit() == 0
        said = [(d["action"], d["executed"]) for d in read_lines(trainer.out / "decisions.jsonl")]
        wanted = [(t[0], True) for t in todo.values() if t[0] != "get_expert_statistics"]
        assert [s for s in said if s[1]] == wanted, said
    fresh = {
        "max_steps": 2,
        "init_from": (first := pairs[0][1])["out_dir"],
        "out_dir": f"{first['out_dir']} and on",
    }
    fresh = alone(first | fresh | {"model": first["model"] | {"n_experts_max": 8}})
    jobs = [{"do": "train", "config": job, "todo": todo} for _, _, job in pairs]
    pairs.append(
        (
            "init_from",
            fresh,
            fresh | {"out_dir": f"{fresh['out_dir']} {ranks}", "expert_parallel": ranks},
        )
    )
    damaged = pairs[-1][2] | {
        "out_dir": str(tmp_path / "none"),
        "init_from": str(tmp_path / "step_00000010"),
    }
    shutil.copytree(checkpoint.step_dir(first["out_dir"], 10), damaged["init_from"])
    file = next(Path(damaged["init_from"]).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused, again = (
        {"do": "refused", "config": damaged, "code": "E303"},
        {"do": "train", "config": pairs[-1][2]},
    )
    assert launch(tmp_path, [*jobs, refused, again], ranks).count("refused: init_from") == ranks
    for name, base, job in pairs:
        if name != "init_from":
            assert [
                (d["action"], d["executed"])
                for d in read_lines(Path(job["out_dir"]) / "decisions.jsonl")
            ] == said
        a, b = (whole(c["out_dir"], base["max_steps"]) for c in (job, base))
        assert a.keys() == b.keys(), name
        # fresh moments make a whole step of a gradient that is nearly zero: its rounding shows more
        limit = 1e-5 if name == "init_from" else 2e-6
        for tensor in a:
            assert (a[tensor].double() - b[tensor].double()).abs().max() <= limit, (name, tensor)


def test_a_rank_that_cannot_read_a_signal_and_a_flipped_bit(keys, parts, tmp_path):
    """Forward and backward hold collectives: a rank without data still takes part, and all save and
    end alike. A checkpoint of which one rank's file is damaged is not gone on from by any."""
    names = {"shard gone": {"unreadable": [1, 3]}, "stop": {"stop_at": 4}}
    jobs = [
        {"do": "train", "config": keys(n, sample_prompt="a"), **more} for n, more in names.items()
    ]
    wide = keys("wide", "dense")
    jobs.append(
        {
            "do": "build",
            "config": wide
            | {"model": wide["model"] | {"d_model": 512, "d_ff": 2048, "n_layers": 6}},
        }
    )
    shutil.copytree(parts["fsdp 2"], (damaged := keys("damaged", "dense", max_steps=12))["out_dir"])
    file = checkpoint.step_dir(damaged["out_dir"], STEPS) / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    jobs.append({"do": "train", "config": damaged})
    for name, more in (("none kept", {"expert_parallel": 2}), ("none kept bf16", BF16)):
        jobs.append(
            {"do": "train", "config": keys(name, "hybrid", max_steps=2, **more), "none_kept": 1}
        )
    said = launch(tmp_path, jobs, 2)
    again = [
        r["step"] for r in read_lines(Path(damaged["out_dir"]) / "metrics.jsonl") if "loss" in r
    ][STEPS:]
    assert again == list(range(6, 13)), said
    assert said.count("built within its part and a unit") == 2
    assert said.count("injected: a shard changed") == 2
    for name, step in (("shard gone", 3), ("stop", 5)):
        assert max(checkpoint.list_steps(keys(name)["out_dir"])) == step


@pytest.mark.nightly
def test_out_of_memory_in_a_collective_step_restarts_smaller(keys, tmp_path):
    """One rank of two runs out in a micro-step: the others wait for it, so the whole launch begins
    again, smaller."""
    config = keys("oom", batch_size=8)
    path = write_yaml(tmp_path / "jobs", [{"do": "oom", "config": config}])
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
        __file__,
        path,
    ]
    result = run_python(*words, timeout=200, PYTHONPATH=f"{ROOT}:{ROOT}/tests")
    assert result.returncode == 0, result.stderr[-3000:]
    hint = json.loads((Path(config["out_dir"]) / "oom_hint.json").read_text())
    assert (
        hint["micro_batch"] == 4
        and json.loads((Path(config["out_dir"]) / "status.json").read_text())["attempt"] == 2
    )
    assert rows(config["out_dir"], "loss").keys() == set(range(1, STEPS + 1))


@pytest.mark.nightly
def test_initial_weights_are_those_of_one_process_whatever_the_parts(keys, tmp_path):
    for ranks, names in WRITERS.items():
        jobs = [
            {"do": "first", "config": keys(f"first {name}", "hybrid", **LAYOUTS[name][2])}
            for name in names
        ]
        assert launch(tmp_path, jobs, ranks).count("as one process") == ranks * len(names)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"hsdp_shard_size": 3}, "hsdp_shard_size: 3 does not divide the 4 ranks"),
        ({"expert_parallel": 3}, "expert_parallel: 3 does not divide the 4 ranks"),
        (
            {"expert_parallel": 4, "kind": "dense"},
            "expert_parallel: 4 does not divide the 0 experts",
        ),
        ({"expert_parallel": 2, "hsdp_shard_size": 2}, "do not go together"),
        ({"cpu_offload": True}, "cpu_offload"),
        (
            {"zero_stage": 0, "expert_parallel": 2, "kind": "moe"},
            "zero_stage: 0 keeps a replica .* expert_parallel",
        ),
        ({"precision": "mixed_fp16"}, "mixed_fp16"),
        ({"reduce_dtype": "bf16", "zero_stage": 1}, "sum micro-steps in bf16"),
        ({"reduce_dtype": "bf16", "hsdp_shard_size": 2}, "sum micro-steps in bf16"),
        ({"hsdp_shard_size": 1}, "leaves nothing to share"),
    ],
)
def test_meshes_that_cannot_be_are_refused_before_anything_starts(keys, changes, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=text) as error:
        Trainer(keys("refused", **changes), make_parallel)
    assert error.value.code == "E002" and not dist.is_initialized()


def test_a_refused_launch_says_so_once_and_is_not_restarted(keys, parts, tmp_path):
    """What only fails again is not tried again by --max-restarts, nor is the run in out_dir said to
    have failed."""
    other = keys("fsdp 2", "dense", grad_clip=0.4) | {
        "model": keys("x", "dense")["model"] | {"n_layers": 3}
    }
    before = (Path(other["out_dir"]) / "status.json").read_bytes()
    path = write_yaml(tmp_path / "c.yaml", other)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["--max-restarts=1", ROOT / "train_fsdp.py", path]
    result = run_python(*words, timeout=100)
    assert "n_layers: 2 there" in result.stderr and result.stderr.count("not restarted: E") == 1
    assert result.returncode and result.stderr.count("error E") == 1, result.stderr[-3000:]
    mesh = write_yaml(tmp_path / "mesh.yaml", keys("mesh", hsdp_shard_size=3))
    result = run_forked(ROOT / "train_fsdp.py", mesh, ranks=2)
    assert "does not divide the 2 ranks" in result.stderr, "before there is a group"
    assert result.returncode and result.stderr.count("error E") == 1, result.stderr[-3000:]
    assert (Path(other["out_dir"]) / "status.json").read_bytes() == before


def test_train_py_says_what_has_no_effect(keys, capsys, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", keys("said", expert_parallel=2, max_steps=1))
    assert train.main([str(path), "--dry_run", "--hardware", "measured"]) == 0
    assert "expert_parallel: takes effect under train_fsdp.py" in capsys.readouterr().out


# ---------------------------------------------------------------- inside torchrun


def drive(trainer, todo=None, unreadable=None, stop_at=None, flip=None, none_kept=None) -> None:
    """todo: {turn: [method, arguments ...]}, called where that turn begins; unreadable: [rank,
    step]; flip a bit of the weights: [rank, turn]; none_kept: a rank whose MoD layers let no token
    through while evaluating."""
    for mod in trainer.mod.values() if trainer.parallel.rank == none_kept else ():
        mod.predictor.register_forward_hook(lambda m, i, out: out - 1e4)
    act, following, todo = (
        trainer.orchestrator.begin_iteration,
        trainer.loader.next,
        {int(k): v for k, v in (todo or {}).items()},
    )
    last = trainer.parallel.rank == trainer.parallel.world - 1

    def first_that():
        if words := todo.get(trainer.orchestrator.iteration + 1):
            getattr(trainer, words[0])(*words[1:])
        if flip == [trainer.parallel.rank, trainer.orchestrator.iteration + 1]:
            trainer.weights["blocks.0.attn.wo.weight"].view(torch.int32)[0, 0] ^= 1 << 20
        return act()

    def next_rows():
        trainer.signals.stop = int(last and trainer.step == stop_at)
        if unreadable == [trainer.parallel.rank, trainer.step]:
            raise UserError("E111", "injected: a shard changed")
        return following()

    trainer.orchestrator.begin_iteration, trainer.loader.next = first_that, next_rows


def kept(config):
    """The layout's Parallel, whose process group serves the next job too."""
    made = make_parallel(config)
    made.close = dist.barrier
    return made


def local_parts_are_those_of(trainer, read) -> bool:
    mine, good = trainer.tensors(), True
    for name, tensor in mine.items():
        for offset, shape, local, _ in trainer.parallel.local_shards(name, tensor):
            good &= torch.equal(local.cpu(), read(name, offset, shape, local.shape))
    return good


def build(config) -> None:
    """The memory that a rank needs to make its part of the model: no more than that and one unit,
    and it is half."""
    parallel = kept(build_config(config, lambda key: "config", []))
    # a run tells malloc to keep what is freed once its model stands (lumen/heap.py), and this
    # process has had runs: as at the start of one, large blocks are mapped and given back again
    ctypes.CDLL(None).mallopt(heap.M_MMAP_THRESHOLD, 1 << 17)
    for _ in range(2):  # the first time modules are loaded, too
        before = high_water(reset=True)
        model = parallel.build(build_config(config, lambda key: "config", []), "fp32")
        most = high_water() - before
        part = sum(x.nbytes for x in parallel.weights(model).values())
        block = max(
            sum(p.numel() * 4 for p in unit.parameters()) for unit in (*model.blocks, model.embed)
        )
        whole = sum(p.numel() * 4 for p in model.parameters())
        del model
        parallel.shards = {}
        gc.collect()
    print(f"most {most:,} part {part:,} block {block:,} whole {whole:,}", flush=True)
    assert part < 0.51 * whole and most < part + block + (4 << 20), (most, part, block, whole)
    print("built within its part and a unit", flush=True)


def do(job) -> None:
    config, what = job["config"], job["do"]
    if what == "train":
        trainer = Trainer(config, kept)
        drive(
            trainer, *(job.get(k) for k in ("todo", "unreadable", "stop_at", "flip", "none_kept"))
        )
        try:
            assert trainer.fit() == 0
        except UserError as error:
            print(error.code, error.text, flush=True)
            trainer.loader.close()
            trainer.parallel.close()
        return
    if what == "build":
        return build(config)
    if what == "refused":
        with pytest.raises(UserError, match=job["code"]) as error:
            Trainer(config, kept)
        print(f"refused: {error.value.text}", flush=True)
        return
    trainer = Trainer(config, kept)
    if what == "write":
        assert trainer.step == 5 and trainer.save()
    elif what == "read":
        for folder in job["folders"]:
            for tensor in trainer.tensors().values():
                tensor.zero_()
            saved = checkpoint.Checkpoint(folder)
            trainer.state.restore(saved)
            base = checkpoint.Checkpoint(job["folders"][0])
            assert local_parts_are_those_of(
                trainer, lambda n, at, _, size, base=base: base.read(n, at, size)
            ), folder
    elif what == "first":
        with contextlib.redirect_stdout(None):
            one = Parallel.build(trainer.parallel, trainer.cfg, trainer.run.precision).state_dict()

        def read(name, offset, shape, size):
            tensor = one.get(name.removeprefix("model."), torch.zeros(shape))
            return tensor[tuple(slice(a, a + n) for a, n in zip(offset, size))]

        assert local_parts_are_those_of(trainer, read) and isinstance(
            trainer.parallel, (Sharded, Parallel)
        )
        print("as one process", flush=True)
    trainer.close()


def main(path) -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(path).read_text()):
        if job["do"] == "oom":

            def hook(module, inputs):
                if module.training and len(inputs[0]) > 4 and int(os.environ["RANK"]):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")

            torch.nn.modules.module.register_module_forward_pre_hook(
                lambda m, i: hook(m, i) if type(m).__name__.endswith("Block") else None
            )
            sys.argv = [
                "train_fsdp.py",
                str(write_yaml(Path(path).parent / "c.yaml", job["config"])),
            ]
            command(lambda argv: train.main(argv, make_parallel))
        do(job)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
