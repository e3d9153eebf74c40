import re

import pytest
import torch
import yaml
from conftest import ROOT

import plan
from errors import UserError
from model import ModelConfig, Transformer
from train import read_config

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
# what a name promises: parameters active, in all (None: nothing), and how far off they may be
PROMISES = {f"b{n}": (n * 1e9, n * 8e9, 0.02) for n in (1, 7, 14, 30, 50, 100, 200, 300)}
PROMISES |= {"b3_inference": (3e9, 3e9, 0.02), "b6_quality": (6e9, 6e9, 0.02), "b1_8x2": (1e9, None, 0.02)}
PROMISES |= {"moe3": (None, 3e9, 0.02), "moe6": (None, 6e9, 0.02), "debug": (0.5e6, 4e6, 0.03)}
PROMISES |= {"debug_200m": (200e6, 200e6, 0.02), "m70_memory": (70e6, 70e6, 0.02), "m120_speed": (120e6, 120e6, 0.02)}
PROMISES |= {name: (124e6, None, 0.02) for name in ("gpt2_124m", "moe_124m", "hybrid_124m")}
NEVER_RUN = {name for name in PROMISES if re.match(r"(b|moe)\d", name)} | {"lunaris_moe"}


MOE = {"n_experts": 16, "n_experts_per_token": 4, "d_expert": 64}
SIGMOID = MOE | {"router": "sigmoid", "n_shared_experts": 1, "n_dense_layers": 1, "n_experts_max": 18}
SPARSE = [MOE, SIGMOID, {"mod_capacity": 0.25}, {"mod_capacity": 0.5, "mod_routing": "static", "mod_every": 2}]
SPARSE += [SIGMOID | {"mod_capacity": 0.5, "mod_ffn_only": True}]


def saved_bytes(cfg, rows, dtype, recompute) -> int:
    """Bytes that autograd keeps of one forward pass, weights left out, each storage once."""
    model = Transformer(cfg)
    model.init_weights(0)
    model.compute_dtype, model.recompute = dtype, recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    idx = torch.zeros(rows, cfg.max_seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total, _ = model(idx, targets=idx)
    copies = sum(p.numel() * 2 for p in model.parameters() if p.dim() == 2) if dtype != torch.float32 else 0
    head = (
        cfg.vocab_size * cfg.d_model * 4 + rows * cfg.max_seq_len * cfg.d_model * dtype.itemsize
    )  # HeadLoss' gradients
    del total
    return sum(n for n, _ in kept.values()) - copies - head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"n_kv_heads": 4, "d_ff": 512}, {"dropout": 0.1}, *SPARSE])
def test_activation_estimate_is_what_autograd_keeps(changes, dtype):
    cfg = ModelConfig(
        **{"vocab_size": 64, "d_model": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64} | changes
    )
    precision = "fp32" if dtype == torch.float32 else "mixed_bf16"
    estimate = plan.memory(cfg, 1, 4, precision)["activations"]
    measured = saved_bytes(cfg, 4, dtype, False)
    assert 0.9 < estimate / measured < 1.1, (estimate, measured)


def test_recompute_keeps_one_tensor_a_block():
    cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=8, n_heads=4, max_seq_len=64)
    full, little = saved_bytes(cfg, 4, torch.float32, False), saved_bytes(cfg, 4, torch.float32, True)
    assert little < full / 8
    estimate = plan.memory(cfg, 1, 4, "fp32", recompute=True)["activations"]
    assert little < estimate < full / 3  # while one block is recomputed its own activations are there too


def test_states_are_16_bytes_a_parameter():
    cfg = ModelConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=2)
    assert plan.memory(cfg, 1000, 1, "fp32")["states"] == 16000
    parts = plan.memory(cfg, 1000, 1, "mixed_bf16")
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    assert parts["states"] == 18000
    cfg = ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=2, d_expert=32, n_experts=4, n_experts_max=6)
    n = plan.on_meta(cfg).n_params()["total"]  # empty slots have states too; experts keep no 16-bit copies
    assert plan.memory(cfg, n, 1, "mixed_bf16")["states"] == 18 * n - 2 * 2 * 6 * 3 * 64 * 32


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
    assert (spare > 0) == (path.stem in ("debug", "hybrid_124m")), "dynamic experts need an empty slot"


def test_every_preset_is_there_and_in_the_readme():
    assert not set(PROMISES) - {p.stem for p in PRESETS}
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| .* \| (.+) \|", (ROOT / "README.md").read_text())
    said = [re.match(r"# (\w+): ([\d,]+) parameters total, ([\d,]+)", p.read_text()).groups() for p in PRESETS]
    assert sorted(row[:3] for row in rows) == sorted(said)
    assert {name for name, *_, ran in rows if ran == "never"} == NEVER_RUN


def test_lunaris_yaml_is_as_its_readme_has_it():
    keys = yaml.safe_load((ROOT / "configs/lunaris_moe.yaml").read_text())
    assert keys.pop("prepare")  # instead of its data_dir
    model = {"vocab_size": 50304, "d_model": 1024, "n_layers": 20, "n_heads": 16, "n_kv_heads": 4, "max_seq_len": 1024}
    model |= {"dropout": 0.0, "n_experts": 8, "n_experts_per_token": 1, "aux_loss_weight": 0.01}
    model |= {"capacity_factor": 1.25, "router_z_loss_weight": 0.001}
    run = {"learning_rate": 2e-4, "weight_decay": 0.1, "warmup_steps": 2000, "max_steps": 200000, "batch_size": 32}
    run |= {"gradient_accumulation_steps": 4, "grad_clip": 1.0, "compile_model": True, "save_interval": 1000}
    run |= {"out_dir": "checkpoints/lunaris-moe", "log_interval": 20, "wandb_project": "lunaris-codex-moe"}
    assert keys == run | {"wandb_run_name": "moe-8ex-gqa-20L", "model": model}
    cfg = read_config([str(ROOT / "configs/lunaris_moe.yaml")])[0].model
    assert cfg.router == "softmax" and not cfg.norm_topk, "with one expert per token the gate is its probability"


def test_presets_share_the_built_in_datasets():
    made = [yaml.safe_load(p.read_text())["prepare"] for p in PRESETS]
    unlike = {str(sorted(spec.items())) for spec in made}
    assert len(unlike) == len({spec["out"] for spec in made}), "another tokenizer into the same folder would be refused"
    assert len(unlike) == 2, "all but debug"


def test_machine_resolves_and_refuses(monkeypatch):
    m = plan.machine("cpu", "bf16", False)
    assert m.precision == "mixed_bf16" and m.compute_dtype == torch.bfloat16 and any("bf16 means" in n for n in m.notes)
    for there, precision in ((True, "mixed_bf16"), (False, "fp32")):
        monkeypatch.setattr(plan, "cpu_has_bf16", lambda there=there: there)
        assert plan.machine("cpu").precision == precision
    monkeypatch.setattr(plan, "find_compiler", lambda: None)
    assert plan.machine("cpu").compile is False
    for words, code in (
        (("cpu", "fp32", True), "E003"),
        (("cpu", "fp16"), "E003"),
        (("cpu", "int8"), "E002"),
        (("tpu",), "E002"),
        (("cpu", "fp32", "maybe"), "E002"),
    ):
        with pytest.raises(UserError) as e:
            plan.machine(*words)
        assert e.value.code == code
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="E003.*only cpu"):
            plan.machine("cuda")


def test_env_reports_and_says_when_training_cannot_work(capsys, monkeypatch):
    monkeypatch.setattr(plan, "matrix_peak", lambda *a: 1e12)
    assert plan.main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "precision", "fp32 1 TFLOP/s", "memory", "disk", "flash", "wandb", "ready"):
        assert word in out
    monkeypatch.setattr(plan.torch, "__version__", "2.5.1")
    assert plan.main(["env"]) == 2 and "PROBLEM      torch 2.5.1" in capsys.readouterr().out


def test_matrix_peak_is_a_speed():
    assert 1e8 < plan.matrix_peak("cpu", torch.float32, 0.05) < 1e15
