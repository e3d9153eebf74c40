import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from lumen import cards, forecast, lines, plan
from lumen import machine as machines
from lumen.cards import HARDWARE
from lumen.cli import presets, read_config
from lumen.config import build_config
from lumen.errors import UserError
from lumen.forecast import Forecast
from lumen.machine import human_number
from lumen.optim import OPTIMIZERS
from lumen.parallel import Parallel
from lumen.resolve import check_states, misfit
from model import ModelConfig, Transformer
from tools.simulate import Assumed, Simulation

PRESETS = sorted(presets().values())
# what a name promises: parameters active, in all (None: nothing), and how far off they may be
PROMISES = {f"b{n}": (n * 1e9, n * 8e9, 0.02) for n in (1, 7, 14, 30, 50, 100, 200, 300)}
PROMISES |= {
    "b3_inference": (3e9, 3e9, 0.02),
    "b6_quality": (6e9, 6e9, 0.02),
    "b1_8x2": (1e9, None, 0.02),
}
PROMISES |= {"moe3": (None, 3e9, 0.02), "moe6": (None, 6e9, 0.02), "debug": (0.5e6, 4e6, 0.03)}
PROMISES |= {
    "debug_200m": (200e6, 200e6, 0.02),
    "m70_memory": (70e6, 70e6, 0.02),
    "m120_speed": (120e6, 120e6, 0.02),
}
PROMISES |= {name: (124e6, None, 0.02) for name in ("gpt2_124m", "moe_124m", "hybrid_124m")}
NEVER_RUN = {name for name in PROMISES if re.match(r"(b|moe)\d", name)} | {"lunaris_moe"}


MOE = {"n_experts": 16, "n_experts_per_token": 4, "d_expert": 64}
SIGMOID = MOE | {
    "router": "sigmoid",
    "n_shared_experts": 1,
    "n_dense_layers": 1,
    "n_experts_max": 18,
}
SPARSE = [
    MOE,
    SIGMOID,
    {"mod_capacity": 0.25},
    {"mod_capacity": 0.5, "mod_routing": "static", "mod_every": 2},
]
SPARSE += [SIGMOID | {"mod_capacity": 0.5, "mod_ffn_only": True}]
EXTRAS = {"extras": ["value_residual", "x0", "relu2", "softcap"]}


def saved_bytes(cfg, rows, dtype, recompute) -> int:
    """Bytes that autograd keeps of one forward pass, weights left out, each storage once."""
    model = Transformer(cfg)
    model.init_weights(0)
    model.compute_dtype, model.recompute = dtype, "block" if recompute else "none"
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    idx = torch.zeros(rows, cfg.max_seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total, _ = model(idx, targets=idx)
    copies = (
        sum(p.numel() * 2 for p in model.parameters() if p.dim() == 2)
        if dtype != torch.float32
        else 0
    )
    head = (
        cfg.vocab_size * cfg.d_model * 4 + rows * cfg.max_seq_len * cfg.d_model * dtype.itemsize
    )  # HeadLoss' gradients
    del total
    return sum(n for n, _ in kept.values()) - copies - head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False}, {"n_kv_heads": 4, "d_ff": 512}, {"dropout": 0.1}, EXTRAS, *SPARSE],
)
def test_activation_estimate_is_what_autograd_keeps(changes, dtype):
    cfg = ModelConfig(
        **{
            "vocab_size": 64,
            "d_model": 128,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 2,
            "max_seq_len": 64,
        }
        | changes
    )
    precision = "fp32" if dtype == torch.float32 else "mixed_bf16"
    estimate = plan.memory(cfg, 1, 4, precision)["activations"]
    measured = saved_bytes(cfg, 4, dtype, False)
    assert 0.9 < estimate / measured < 1.1, (estimate, measured)


def test_recompute_keeps_one_tensor_a_block():
    cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=8, n_heads=4, max_seq_len=64)
    full, little = (
        saved_bytes(cfg, 4, torch.float32, False),
        saved_bytes(cfg, 4, torch.float32, True),
    )
    assert little < full / 8
    estimate = plan.memory(cfg, 1, 4, "fp32", recompute="block")["activations"]
    assert (
        little < estimate < full / 3
    )  # while one block is recomputed its own activations are there too


def test_states_are_16_bytes_a_parameter():
    cfg = ModelConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=2)
    assert plan.memory(cfg, 1000, 1, "fp32")["states"] == 16000
    parts = plan.memory(cfg, 1000, 1, "mixed_bf16")
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    assert parts["states"] == 18000
    cfg = ModelConfig(
        vocab_size=64, d_model=64, n_layers=2, n_heads=2, d_expert=32, n_experts=4, n_experts_max=6
    )
    n = plan.on_meta(cfg).n_params()[
        "total"
    ]  # empty slots have states too; experts keep no 16-bit copies
    assert plan.memory(cfg, n, 1, "mixed_bf16")["states"] == 18 * n - 2 * 2 * 6 * 3 * 64 * 32


@pytest.mark.parametrize("bytes_of", [2, 8, 40])
def test_the_plan_asks_the_optimizer_for_the_bytes_of_its_state(monkeypatch, bytes_of):
    """Estimates, refusals and the dry run's checkpoint, for an optimizer that AdamW is not."""

    class Other(OPTIMIZERS["adamw"]):
        STATE_BYTES = HIDDEN_BYTES = bytes_of

    monkeypatch.setitem(OPTIMIZERS, "adamw", Other)
    model = {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
    cfg = build_config({"data_dir": "x", "model": model}, lambda key: "test", [])
    counted = plan.on_meta(cfg.model)
    n = plan.count_parameters(counted)
    parallel = Parallel(cfg)
    layout = parallel.layout
    parallel.close()
    assert layout.state_bytes == (bytes_of, bytes_of, False)
    assert plan.memory(cfg.model, n, 1, "fp32", state_bytes=bytes_of)["states"] == n * (
        8 + bytes_of
    )

    one = plan.rank_memory(counted, layout, 1, 1, "fp32")
    assert (one["moments"], one["gathered"]) == (bytes_of * n, 0)
    shards = dataclasses.replace(layout, world=4, zero_stage=3)
    part = plan.rank_memory(counted, shards, 1, 1, "fp32")
    assert part["moments"] == part["weights"] / 4 * bytes_of
    states = 2 * one["weights"] + one["moments"]
    why, sure = misfit(counted, layout, 1, 1, ("fp32", "block"), states * 0.999)
    assert sure and "weights, gradients and moments alone" in why
    why, _ = misfit(counted, layout, 1, 1, ("fp32", "block"), states * 1.001)
    assert "alone" not in why

    monkeypatch.setattr(machines, "own_memory", lambda device: (8 + 20) * n)
    if bytes_of > 20:
        with pytest.raises(UserError, match="E200.*alone"):
            check_states(cfg, plan.Layout())
    else:
        check_states(cfg, plan.Layout())

    hardware = HARDWARE["h100"]
    step = plan.StepShape(1, 1, "fp32")
    found = Simulation(counted, layout, step, 1, hardware, "h100", Assumed(mfu=0.4))
    size = human_number(n * (4 + bytes_of), "B")
    assert found.checkpoint_line().startswith(f"checkpoint {size}: ")
    seconds = found.as_it_is.seconds["optimizer"]
    assert seconds == pytest.approx(2 * n * (8 + bytes_of) / hardware.bandwidth)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_says_its_true_size_and_can_start(path):
    text = path.read_text()
    said = re.match(rf"# {path.stem}: ([\d,]+) parameters total, ([\d,]+) active", text)
    assert said, "the first comment is the size"
    cfg, _, notes, _ = read_config([str(path)])
    ids = int(re.match(r"bpe:(\d+)", cfg.prepare["tokenizer"])[1])
    cfg.model.vocab_size = cfg.model.vocab_size or ids
    assert cfg.model.vocab_size >= ids
    counts = plan.on_meta(cfg.model).n_params()
    assert [counts["total"], counts["active"]] == [int(n.replace(",", "")) for n in said.groups()]
    active, total, off = PROMISES.get(path.stem, (None, None, 0))
    for promised, count in ((active, counts["active"]), (total, counts["total"])):
        assert promised is None or abs(count / promised - 1) <= off
    head = text.split("\n\n")[0]
    for word in ("learning rate", "warm-up", "batch"):
        assert word in head
    number = re.search(r"learning rate ([\d.e-]+)", head)[1]
    assert float(number) == cfg.learning_rate and f"warm-up {cfg.warmup_steps:g}" in head
    row = cfg.batch_size * cfg.model.max_seq_len
    assert f"batch {cfg.batch_tokens or row * cfg.gradient_accumulation_steps:,}" in head
    assert not (cfg.batch_tokens or 0) % row, "one process can take it"
    assert ("never run" in head) == (path.stem in NEVER_RUN)
    assert not notes
    keys = yaml.safe_load(text)
    assert all(f"{k}:" in text for k in keys)
    if cfg.model.n_experts:
        assert {"aux_loss_weight", "router_z_loss_weight", "max_seq_len"} <= set(keys["model"])
    if counts["total"] > 2e9 and counts["total"] > counts["active"]:
        assert cfg.activation_checkpointing == "block"
    spare = cfg.model.n_experts_max - cfg.model.n_experts
    assert (spare > 0) == (path.stem in ("debug", "hybrid_124m")), (
        "dynamic experts need an empty slot"
    )


def test_every_preset_is_there_and_in_the_docs():
    assert not set(PROMISES) - {p.stem for p in PRESETS}
    rows = re.findall(
        r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| .* \| (.+) \|",
        (ROOT / "docs/presets.md").read_text(),
    )
    said = [
        re.match(r"# (\w+): ([\d,]+) parameters total, ([\d,]+)", p.read_text()).groups()
        for p in PRESETS
    ]
    assert sorted(row[:3] for row in rows) == sorted(said)
    assert {name for name, *_, ran in rows if ran == "never"} == NEVER_RUN


@pytest.mark.parametrize("name", ["b1", "b7", "b14"])
def test_the_gpus_that_the_docs_name_hold_the_preset(name):
    cfg = read_config([name])[0]
    model, rows = plan.on_meta(cfg.model), cfg.batch_tokens // cfg.model.max_seq_len
    found = [plan.fewest_gpus(model, 3, rows, "mixed_bf16", 0.92 * gb * 1e9) for gb in (80, 141)]
    assert re.search(
        rf"\| `{name}` \|.*\| {found[0]} / {found[1]} \|", (ROOT / "docs/presets.md").read_text()
    ), found


def test_what_presets_say_of_their_memory_is_what_the_plan_says():
    """States in all, and how full a GPU is: by the first lines of each preset."""
    found = {}
    for path in PRESETS:
        head, cfg = path.read_text().split("\n\n")[0], read_config([str(path)])[0]
        if not (said := re.search(r"States (?:alone )?are (\d+) GiB", head)):
            continue
        found[path.stem], model = head, plan.on_meta(cfg.model)

        def need(rows, world=1, model=model, mode=cfg.activation_checkpointing):
            layout = plan.Layout(world, 3 if world > 1 else 0)
            return plan.rank_memory(model, layout, rows, 2, "mixed_bf16", mode, plan.IMBALANCE)[
                "total"
            ]

        assert round(16 * plan.count_parameters(model) / 2**30) == int(said[1])
        for rows, gib in re.findall(r"with batch_size (\d+) \((\d+) GiB\)", head):
            assert round(need(int(rows)) / 2**30) == int(gib)
        for gib in re.findall(r"as it is \((\d+) GiB\)", head):
            assert round(need(cfg.batch_size) / 2**30) == int(gib)
        if full := re.search(
            r"two GPUs of (\d+) GB under .* one of (\d+) GB would be (\d+) % full", head
        ):
            assert need(1, 2) < 0.92 * float(full[1]) * 1e9 and round(
                100 * need(1) / float(full[2]) / 1e9
            ) == int(full[3])
    assert set(found) == {"b1", "moe_124m", "hybrid_124m"}


OTHERS = "L40|T400 4GB|GH200 480GB|GB200|H100 PCIe|H100 NVL|H100 80GB HBM3 MIG 1g.10gb|GeForce RTX 4090 Laptop GPU"
OTHERS += "|GeForce RTX 3090 Ti|A10|B300|H800|H20|RTX 5090|RTX 6000 Ada Generation|GeForce RTX 4090 D|H200 NVL|A100X"
OTHERS += "|A100-SXM4-40GB MIG 3g.20gb|GRID T4-16Q|Tesla V100-SXM2-16GB|A100-PCIE-40GB|L40G|Jetson AGX Orin"
CARDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
}
CARDS |= {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A10G": "a10g",
}
CARDS |= {
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090": "3090",
    "NVIDIA L4": "l4",
    "Tesla T4": "t4",
}
CARDS |= {"Tesla V100-SXM2-32GB": "v100"}


def test_a_card_is_known_by_all_words_of_its_name_or_not_at_all():
    for name, key in CARDS.items():
        assert cards.data_sheet(name) is cards.HARDWARE[key], name
        assert cards.hardware_key(name) == key
    for name in OTHERS.split("|"):
        assert cards.data_sheet(name) is cards.data_sheet(f"NVIDIA {name}") is None, name
    assert cards.data_sheet("") is cards.data_sheet("x86_64") is cards.data_sheet("NVIDIA") is None


def test_the_peak_of_an_unknown_card_is_measured_never_a_neighbours(monkeypatch):
    monkeypatch.setattr(machines, "matrix_peak", lambda device, dtype: 1e12)
    for name, peak in (("NVIDIA L40", 1e12), ("NVIDIA H100 PCIe", 1e12), ("NVIDIA L40S", 362e12)):
        m = machines.Machine(torch.device("cpu"), name, "mixed_bf16", False)
        assert machines.peak_flops(m) == peak and (machines.sheet_flops(m) == peak) == (peak > 1e12)


def test_a_card_as_people_type_it():
    typed = {
        "rtx3090": "3090",
        "RTX_4090": "rtx4090",
        "4090": "rtx4090",
        "tesla-t4": "t4",
        "cpu": "cpu",
    }
    typed |= {"A100_80GB": "a100-80gb", "h100-sxm": "h100", "Measured": "measured"}
    assert {name: cards.hardware_key(name) for name in typed} == typed
    hints = {
        "a100": "it may be a100-80gb or a100-40gb;",
        "80gb": "it may be h100 or a100-80gb;",
        "h10": "mean h100?",
    }
    hints |= {
        "m1-max": None,
        "apple": None,
        "tpu-v5": None,
        "rtx": None,
        "h100-pcie": None,
        "b300": None,
        "mi300x": None,
    }
    for name, hint in hints.items():
        with pytest.raises(UserError, match="E002.* is not known; .*--peak_flops") as e:
            cards.hardware_key(name)
        assert (hint or "is not known; known: b200") in e.value.text, e.value.text


def test_lengths_of_time_are_in_units_that_one_thinks_in():
    spans = {
        0.5: "0.5 s",
        100: "100 s",
        600: "10 minutes",
        1e4: "2.78 hours",
        1e6: "11.6 days",
        1e8: "3.17 years",
    }
    spans |= {1.3e12: "41,200 years", 4.3e14: "13,600,000 years"}
    assert {s: machines.human_time(s) for s in spans} == spans


def test_lunaris_yaml_is_as_its_readme_has_it():
    keys = yaml.safe_load((ROOT / "configs/scale/lunaris_moe.yaml").read_text())
    assert keys.pop("prepare") and keys.pop("out_dir")  # instead of its own folders
    model = {
        "vocab_size": 50304,
        "d_model": 1024,
        "n_layers": 20,
        "n_heads": 16,
        "n_kv_heads": 4,
        "max_seq_len": 1024,
    }
    model |= {"dropout": 0.0, "n_experts": 8, "n_experts_per_token": 1, "aux_loss_weight": 0.01}
    model |= {"capacity_factor": 1.25, "router_z_loss_weight": 0.001}
    run = {
        "learning_rate": 2e-4,
        "weight_decay": 0.1,
        "warmup_steps": 2000,
        "max_steps": 200000,
        "batch_size": 32,
    }
    run |= {
        "gradient_accumulation_steps": 4,
        "grad_clip": 1.0,
        "compile_model": True,
        "save_interval": 1000,
    }
    run |= {"log_interval": 20, "wandb_project": "lunaris-codex-moe"}
    assert keys == run | {"wandb_run_name": "moe-8ex-gqa-20L", "model": model}
    cfg = read_config([str(ROOT / "configs/scale/lunaris_moe.yaml")])[0].model
    assert cfg.router == "softmax" and not cfg.norm_topk, (
        "with one expert per token the gate is its probability"
    )


def test_presets_share_the_built_in_datasets():
    made = [yaml.safe_load(p.read_text())["prepare"] for p in PRESETS]
    unlike = {str(sorted(spec.items())) for spec in made}
    assert len(unlike) == len({spec["out"] for spec in made}), (
        "another tokenizer into the same folder would be refused"
    )
    assert len(unlike) == 2, "all but debug"


def test_machine_resolves_and_refuses(monkeypatch):
    m = machines.detect("cpu", "bf16", False)
    assert (
        m.precision == "mixed_bf16"
        and m.compute_dtype == torch.bfloat16
        and any("bf16 means" in n for n in m.notes)
    )
    for there, precision in ((True, "mixed_bf16"), (False, "fp32")):
        monkeypatch.setattr(machines, "cpu_has_bf16", lambda there=there: there)
        assert machines.detect("cpu").precision == precision
    monkeypatch.setattr(machines, "find_compiler", lambda: None)
    assert machines.detect("cpu").compile is False
    for words, code in (
        (("cpu", "fp32", True), "E003"),
        (("cpu", "fp16"), "E003"),
        (("cpu", "int8"), "E002"),
        (("tpu",), "E002"),
        (("cpu", "fp32", "maybe"), "E002"),
    ):
        with pytest.raises(UserError) as e:
            machines.detect(*words)
        assert e.value.code == code
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="E003.*only cpu"):
            machines.detect("cuda")


def test_env_reports_and_says_when_training_cannot_work(capsys, monkeypatch):
    monkeypatch.setattr(machines, "matrix_peak", lambda *a: 1e12)
    assert machines.main([]) == 0
    out = capsys.readouterr().out
    for word in (
        "python",
        "torch",
        "precision",
        "fp32 1 TFLOP/s",
        "memory",
        "disk",
        "flash",
        "wandb",
        "ready",
    ):
        assert word in out
    monkeypatch.setattr(plan.torch, "__version__", "2.5.1")
    assert machines.main([]) == 2 and "PROBLEM      torch 2.5.1" in capsys.readouterr().out
    monkeypatch.setattr(plan.torch, "__version__", "2.99.0a0+git1234567")
    assert machines.main([]) == 0, "what was not tried is said, not forbidden"
    assert (
        f"torch 2.99.0a0+git1234567 is newer than {machines.TRIED[-1]}" in capsys.readouterr().out
    )


def test_the_versions_of_torch_that_were_tried_are_those_that_pip_takes():
    wanted_lines = (ROOT / "requirements.txt").read_text().splitlines()
    (wanted,) = (Requirement(line).specifier for line in wanted_lines if line.startswith("torch"))
    assert all(f"{version}.0" in wanted for version in machines.TRIED)
    assert f"torch>={machines.TRIED[0]}," in "\n".join(wanted_lines), (
        "the oldest that pip takes was tried"
    )
    assert [machines.untried(f"{version}.9+cu130") for version in machines.TRIED] == [[]] * len(
        machines.TRIED
    )
    assert (
        machines.version_numbers("2.9.1")
        < machines.version_numbers("2.11.0")
        < machines.version_numbers("3.0")
    ), "numbers, not letters"


def test_bf16_of_a_cpu_is_known_without_torchs_private_word(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    for flags, there in ((["avx2"], False), (["avx2", "amx_bf16"], True)):
        monkeypatch.setattr(machines, "cpu_flags", lambda flags=flags: flags)
        assert machines.cpu_has_bf16() is there


def test_matrix_peak_is_a_speed():
    assert 1e8 < machines.matrix_peak("cpu", torch.float32, 0.05) < 1e15


def test_the_peak_is_found_beside_other_processes(monkeypatch):
    """They take turns of some milliseconds: what is longer than a turn waits for them."""
    now = [0.0]

    def matmul(a, b):
        seconds = 2 * a.shape[0] ** 3 / 4e11
        now[0] += seconds + (0.02 if seconds > 0.002 else 0.0)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(machines.time, "perf_counter", lambda: now[0])
    peak = getattr(machines.matrix_peak, "__wrapped__", machines.matrix_peak)  # once a process
    assert peak("cpu", torch.float32, 0.2) > 0.9 * 4e11


# ---- how long to train

TABLE = {
    1e17: (24.7e6, 27),
    1e18: (80e6, 26),
    1e19: (262e6, 24),
    1e20: (853e6, 23),
    1e21: (2.8e9, 22),
}
TABLE |= {1e22: (9.0e9, 20), 5.76e23: (72e9, 18)}  # FLOPs: parameters, tokens a parameter
FLAT = {
    1e18: (1.75, 1.27, 1.08, 1.02, 1.18, 1.45, 2.13),
    1e20: (1.67, 1.23, 1.06, 1.03, 1.21, 1.51, 2.25),
}
EPOCHS = {
    1: (1, 1),
    2: (1.97, 0.94),
    4: (3.73, 0.82),
    8: (6.6, 0.63),
    16: (10.6, 0.38),
    32: (14.3, 0.13),
}


def test_optimum_is_the_refitted_chinchilla():
    sizes = []
    for flops, (n, ratio) in TABLE.items():
        params, tokens = plan.optimum(flops)
        assert params == pytest.approx(n, rel=0.01) and tokens / params == pytest.approx(
            ratio, abs=0.5
        )
        assert 6 * params * tokens == pytest.approx(flops)
        assert plan.extra_compute(params, tokens) == pytest.approx(0, abs=1e-9)
        for off in (0.5, 0.9, 1.1, 2):  # no other shape is as good
            assert plan.extra_compute(params * off, tokens / off) > 1e-4
        sizes.append((params, tokens))
    assert sizes == sorted(sizes) and [d for _, d in sizes] == sorted(d for _, d in sizes)


@pytest.mark.parametrize("flops", FLAT)
def test_the_flat_band_costs_what_the_table_says(flops):
    for ratio, times in zip((2, 5, 10, 40, 100, 200, 500), FLAT[flops]):
        c = flops
        for _ in range(40):  # the compute at this ratio that has the loss of the optimum at `flops`
            c = flops * (1 + plan.extra_compute((c / 6 / ratio) ** 0.5, (c / 6 * ratio) ** 0.5))
        assert c / flops == pytest.approx(times, abs=0.0051)


def test_repeated_tokens_are_worth_what_muennighoff_says():
    for epochs, (worth, last) in EPOCHS.items():
        assert plan.effective_tokens(1e9, epochs * 1e9) / 1e9 == pytest.approx(worth, rel=0.006)
        assert plan.chinchilla(10**8, 10**9, epochs * 10**9, 6e8)[
            "last_epoch_value"
        ] == pytest.approx(last, abs=0.006)
    worth = [plan.effective_tokens(100, d) for d in range(1, 10000, 50)]
    assert worth == sorted(worth) and worth[0] == 1 and worth[-1] < 100 * (1 + plan.REPEAT)


def test_plan_of_a_sound_run_and_of_one_without_data():
    sound = plan.chinchilla(124_000_000, 2_600_000_000, 2_480_000_000, 8.5e8)
    assert sound["coverage"] == 1 and sound["band"] == "inside" and sound["extra_compute"] < 0.01
    assert (
        sound["epochs"] == pytest.approx(0.954, abs=1e-3)
        and not sound["extrapolated"]
        and not sound["data_limited"]
    )
    assert len(lines.plan_lines(sound)) == 3 and all(
        line.startswith("plan  ") for line in lines.plan_lines(sound)
    )
    # LuminaAI's notebook: a billion parameters on 2.5 million tokens
    starved = plan.chinchilla(10**9, 2_500_000, 125_000_000, 6e9, moe=True)
    assert (
        starved["effective_tokens"] == pytest.approx(40e6, rel=0.02) and starved["band"] == "below"
    )
    assert starved["data_limited"] and 2e6 < starved["fitting_params"][1] < 5e6
    assert starved["extrapolated"] == ["tokens", "FLOPs"]
    text = "\n".join(lines.plan_lines(starved))
    assert re.search(
        r"needs [\d.]+ times the compute that the best size and length would need for this loss",
        text,
    )
    for words in (
        "50.00 epochs",
        "extrapolated",
        "MoE",
        "beyond 4 epochs",
        "data-limited",
        "3.11M parameters",
    ):
        assert words in text
    assert "nats" not in text and "loss 2" not in text, (
        "no absolute loss: it would be another text's"
    )
    assert (
        plan.chinchilla(10**6, 0, 0, 6e6)["epochs"] == 1
    )  # nothing known yet: no division by zero


def test_auto_steps_aims_and_clamps():
    steps, line = plan.auto_steps(
        1_000_000, 40_000_000, 2048
    )  # half an epoch, never rounded up to one
    assert steps == round(20e6 / 2048) and "0.5 epochs" in line and "clamped" not in line
    steps, line = plan.auto_steps(1_000_000_000, 2_500_000, 2048)
    assert (
        steps == round(50 * 2.5e6 / 2048)
        and "clamped to max_epochs 50" in line
        and "worth 15.8 fresh" in line
    )
    steps, line = plan.auto_steps(1_000, 2_500_000, 2048, min_epochs=1)
    assert steps == round(2.5e6 / 2048) and "clamped to min_epochs 1" in line
    assert plan.auto_steps(1, 10, 2048)[0] == 1
    assert (
        plan.auto_steps(10**6, 10**8, 2000, 40)[0]
        == 2 * plan.auto_steps(10**6, 10**8, 2000)[0]
        == 20_000
    )


# ---- the forecast


def lr_of(kind):
    """share of the run -> rate: 3 % warm-up, then the schedule, down to a tenth."""

    def rate(x):
        if x < 0.03:
            return max(x, 1e-4) / 0.03
        if kind == "cosine":
            return 0.1 + 0.45 * (1 + math.cos(math.pi * (x - 0.03) / 0.97))
        return {
            "wsd": min(1, 0.1 + 0.9 * (1 - x) / 0.2),
            "linear": 1 - 0.9 * (x - 0.03) / 0.97,
            "constant": 1,
        }[kind]

    return rate


def feed(forecast, curve, kind="constant", upto=1.0, steps=1000, noise=0.05, seed=0, start=0):
    rng = np.random.default_rng(seed)
    for i in range(start + 1, int(upto * steps) + 1):
        forecast.add(
            i * 1e4,
            i * 1e12,
            curve(i / steps) + noise * rng.normal(),
            1e-3 * lr_of(kind)(i / steps),
        )
    return forecast.status(steps * 1e4, lambda x: 1e-3 * lr_of(kind)(x))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_forecast_finds_a_power_law_in_noise(kind):
    def curve(x):
        return 1.8 + 0.9 * x**-0.3 + 0.15 * lr_of(kind)(x)

    truth = np.mean([curve(x) for x in np.linspace(0.95, 1, 50)])
    inside, errors = [], {0.25: [], 0.5: [], 0.75: []}
    for seed in range(5):
        forecast = Forecast()
        for begin, upto in ((0, 0.25), (250, 0.5), (500, 0.75)):
            s = feed(forecast, curve, kind, upto, seed=7 * seed + begin, start=begin)
            inside.append(s["final_low"] < truth < s["final_high"])
            errors[upto].append(abs(s["final"] - truth))
            assert (
                s["share"] == upto
                and 0 <= s["gained"] <= 1
                and s["slope_low"] < s["slope"] < s["slope_high"]
            )
            assert s["slope_low"] > 0 and s["recommendation"] == "continue"
    assert sum(inside) >= 14, inside  # of 15, at 90 %
    assert np.mean(errors[0.25]) < 0.1 and np.mean(errors[0.75]) < 0.04
    assert s["phase"] == ("annealing" if kind in ("cosine", "linear") else "learning")
    assert (s["stable_gain"] is None) == (kind in ("cosine", "linear"))


def test_forecast_survives_what_a_run_can_bring():
    forecast = Forecast()
    assert feed(forecast, lambda x: 5.0, upto=0.003) is None, "3 points"
    for loss, lr in ((math.nan, 1e-3), (math.inf, 1e-3), (3.0, math.nan)):
        forecast.add(10**9, 1e15, loss, lr)
    assert len(forecast.windows) == 3, "what is not finite is left out"
    forecast.add(3e4, 3e12, 9.0, 1e-3)
    assert len(forecast.windows) == 3, "a dropped step adds no tokens"
    with np.errstate(all="raise", under="ignore"):
        for level in (0.0, 3.0, 1e6):
            s = feed(Forecast(), lambda x, level=level: level, noise=0)
            assert s["final_low"] <= s["now"] + 1e-3 * level and s["final_high"] >= s["final"]
            json.dumps(s, allow_nan=False)
        wild = feed(Forecast(), lambda x: 3.0, noise=100.0)
        assert wild["final_high"] - wild["final_low"] > 10
    assert feed(Forecast(), lambda x: 3.0, upto=1.2) is not None, "beyond the plan"
    forecast = Forecast()
    feed(forecast, lambda x: 3.0)
    for planned, rate in ((0, 1.0), (math.nan, 1.0), (1e7, math.nan), (1e7, math.inf)):
        assert forecast.status(planned, lambda x, rate=rate: rate) is None
    still = Forecast()
    for i in range(50):
        still.add(i + 1, 0.0, 3.0, 0.0)
    assert still.status(100, lambda x: 0.0) is None, "no rate, no forecast"


def test_forecast_says_the_phase_and_never_to_stop_under_a_falling_rate():
    assert feed(Forecast(), lambda x: 3.0, upto=0.025)["phase"] == "warm-up"
    flat = feed(Forecast(), lambda x: 3.0, upto=0.6, noise=5e-4)
    assert flat["phase"] == "converged?" and "start the decay" in flat["recommendation"]
    assert (
        feed(Forecast(), lambda x: 3 - 0.02 * math.log(x), upto=0.6, noise=5e-4)["phase"]
        == "flattening"
    )
    assert feed(Forecast(), lambda x: 3 + x, upto=0.6, noise=5e-4)["phase"] == "rising"
    for upto in (0.3, 0.45, 0.6, 0.99):
        assert (
            feed(Forecast(), lambda x: 3.0, "cosine", upto, noise=5e-4)["recommendation"]
            == "continue"
        )
    forecast = Forecast()
    feed(forecast, lambda x: 3 + x**-0.3)
    assert "data repeats (epoch 5.0)" in forecast.status(1e7, lambda x: 1e-3, 2e6)["recommendation"]


def test_forecast_state_is_small_json_and_gives_the_same_bits():
    whole, first, second = Forecast(), Forecast(), Forecast()
    for i in range(1, 5001):
        if i == 2222:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for f in (whole, first if i < 2222 else second):
            f.add(i * 512, i * 1e9, 3 + 20 / (i + 99) + math.sin(i * i) / 20, 1e-3)
    assert second.state_dict() == whole.state_dict()
    status = whole.status(4e6, lambda x: 1e-3)
    assert (
        status["final_low"] < 3 < status["final_high"]
        and second.status(4e6, lambda x: 1e-3) == status
    )
    assert len(whole.windows) < 256 and len(json.dumps(whole.state_dict())) < 30_000
    assert sum(w[2] for w in whole.windows) / len(whole.windows) == pytest.approx(
        np.mean(
            [
                3 + 20 / (i + 99) + math.sin(i * i) / 20
                for i in range(1, len(whole.windows) * whole.per + 1)
            ]
        )
    )
    whole.add(1000 * 512, 1e12, 3.0, 1e-3)  # rolled back: what lay beyond is forgotten
    assert whole.windows[-1][0] < 1000 * 512 and whole.status(4e6, lambda x: 1e-3)["share"] < 0.13


# ---- stopping


def test_paired_rise_is_calibrated_and_finds_a_small_rise():
    rng = np.random.default_rng(0)
    for rows in (8, 100):
        p = np.array(
            [forecast.paired_rise(np.zeros(rows), d) for d in rng.normal(size=(2000, rows))]
        )
        for level in (0.5, 0.05, 0.01, 1e-3):
            assert abs((p < level).mean() - level) < 4 * (level / 2000) ** 0.5  # 4 sd of a binomial
    hard = rng.normal(3, 1, 400)  # rows differ by much more than the rise: pairing is what finds it
    assert forecast.paired_rise(hard, hard + 0.02 + rng.normal(0, 0.05, 400)) < 1e-6
    assert forecast.paired_rise(hard, hard - 0.02 + rng.normal(0, 0.05, 400)) > 0.99
    for best, now in ((hard, hard), (hard[:5], hard[:5] + 1), (hard, hard * np.nan), ([], [])):
        assert forecast.paired_rise(best, now) == 1.0


def test_a_stop_is_justified_only_by_these_two():
    assert forecast.justified_stop("wsd", [0.1, 0.004, 0.004, 0.004]).startswith("start the decay")
    for gains in ([], [0.004] * 2, [0.004, 0.006, 0.004], [0.004, None, 0.004]):
        assert forecast.justified_stop("wsd", gains) is None
    for schedule in ("cosine", "linear", "constant", "onecycle"):
        assert forecast.justified_stop(schedule, [0.0] * 9) is None
    over = {"rise_ps": [0.5, 1e-4, 1e-5], "epochs": 3, "rise": 0.05, "anneal_gain": 0.02}
    assert forecast.justified_stop("cosine", **over).startswith("stop: the validation loss rises")
    for change in (
        {"rise_ps": [1e-5]},
        {"rise_ps": [1e-5, 0.01]},
        {"epochs": 0.9},
        {"anneal_gain": 0.06},
    ):
        assert forecast.justified_stop("cosine", **(over | change)) is None
