import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import fingerprint, write_yaml

from lumen.cli import read_config
from lumen.config import Config, OrchestratorConfig, help_text
from lumen.errors import UserError
from model import ModelConfig
from train import Trainer


def refused(words, code, *parts):
    with pytest.raises(UserError) as e:
        read_config([str(w) for w in words])
    assert e.value.code == code
    for part in parts:
        assert part in e.value.text, e.value.text


def test_every_spelling_of_an_option_is_the_same(tmp_path, shards):
    path = write_yaml(
        tmp_path / "c.yaml",
        {"data_dir": shards, "learning_rate": "3e-4", "model": {"d_model": "64", "n_heads": 4}},
    )
    spellings = (
        ["--learning_rate=1e-2", "--model.n_layers=3"],
        ["--learning-rate", "0.01", "--model.n-layers", "3"],
        ["--learning_rate", "'1e-2'", "--model.n_layers", "3.0"],
    )
    for words in spellings:
        cfg, *_ = read_config([str(path), *words])
        assert (cfg.learning_rate, cfg.model.n_layers, cfg.model.d_model) == (0.01, 3, 64)
    cfg, *_ = read_config([str(path)])
    assert cfg.learning_rate == 3e-4 and cfg.out_dir == "out/c"
    cfg, *_ = read_config(
        [
            str(path),
            "--resume",
            "off",
            "--overwrite",
            "--activation_checkpointing=no",
            "--tensorboard",
        ]
    )
    assert (cfg.resume, cfg.overwrite, cfg.activation_checkpointing, cfg.tensorboard) == (
        "none",
        True,
        "none",
        True,
    )


def test_bad_configurations_are_refused_with_file_line_and_remedy(tmp_path, shards):
    path = tmp_path / "c.yaml"
    path.write_text(f"data_dir: {shards}\nlearnin_rate: 1e-3\n")
    refused([path], "E002", f"{path}:2", "did you mean learning_rate?")
    path.write_text(f"data_dir: {shards}\nmodel:\n  d_model: 60\n  n_headz: 4\n")
    refused([path], "E002", f"{path}:4", "model.n_heads?")
    path.write_text(f"data_dir: {shards}\nd_model: 60\n")
    refused([path], "E002", f"{path}:2", "belongs under model:")
    path.write_text(f"data_dir: {shards}\nmodel:\n  seed: 60\n")
    refused([path], "E002", f"{path}:3", "top level")
    path.write_text(f"data_dir: {shards}\nbatch_size: many\n")
    refused([path], "E002", f"{path}:2", "'many' is not int or auto")
    path.write_text(f"data_dir: {shards}\nbatch_size: 2.5\n")
    refused([path], "E002", "'2.5' is not int")
    path.write_text(f"data_dir: {shards}\nseed: 1\nseed: 2\n")
    refused([path], "E002", f"{path}:3", "second time")
    path.write_text(f"data_dir: {shards}\nmax_steps: 5\nnum_epochs: 2\n")
    refused([path], "E002", "num_epochs and max_steps")
    path.write_text("a: [1, 2\n")
    refused([path], "E002", "not valid YAML")
    path.write_text(f"data_dir: {shards}\n")
    refused(
        [path, "--model.d_model", "64", "--model.n_heads", "5"],
        "E002",
        "does not divide d_model 64",
        "4",
    )
    refused([path, "--model.n_kv_heads", "5"], "E002", "n_kv_heads")
    refused([path, "--lr_schedule", "cosin"], "E002", "cosine")
    refused([path, "--batch_size", "0"], "E002", "at least 1")
    path.write_text(f"data_dir: {shards}\nmodel:\n  n_experts: 4\n  n_experts_per_token: 5\n")
    refused([path], "E002", f"{path}:4: model.n_experts_per_token: 5", "1 to n_experts, 4")
    path.write_text(f"data_dir: {shards}\n")
    refused(
        [path, "--model.mod_capacity", "[0.5, 0.5]"],
        "E002",
        "command line: model.mod_capacity",
        "12 numbers",
    )
    refused([path, "stray"], "E002", "stray")
    refused([tmp_path / "no.yaml"], "E001", "does not exist")
    refused(["gpt2_142m"], "E001", "gpt2_124m.yaml?")
    write_yaml(path, {"model": {}})
    refused([path], "E002", "no data")


def test_lunaris_yaml_runs_unchanged(tmp_path, shards):
    """The keys of its TrainConfig and model config, numbers in quotes, its workers' options."""
    keys = {
        "data_dir": shards,
        "learning_rate": "2.0e-4",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
    }
    keys |= {
        "warmup_steps": 2000,
        "max_steps": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_epochs": 1,
    }
    keys |= {
        "grad_clip": 1.0,
        "device": "cpu",
        "compile_model": False,
        "out_dir": str(tmp_path / "l"),
        "backend": "ddp",
    }
    keys |= {
        "num_workers": 4,
        "pin_memory": True,
        "save_latest_always": True,
        "wandb_project": None,
    }
    model = {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_seq_len": 16,
    }
    model |= {
        "multiple_of": 32,
        "use_qk_norm": True,
        "attn_dropout": 0.0,
        "rope_ntk_scale_base": 8,
        "n_experts": None,
    }
    cfg, _, notes, _ = read_config([str(write_yaml(tmp_path / "l.yaml", keys | {"model": model}))])
    assert cfg.model.rope_theta == 20000 and cfg.model.qk_norm and cfg.learning_rate == 2e-4
    for word in ("num_workers", "pin_memory", "backend", "num_epochs: 1"):
        assert any(word in note for note in notes), word
    lunaris = Trainer([str(tmp_path / "l.yaml")])
    assert lunaris.fit() == 0 and lunaris.step == 3


def test_help_lists_every_key():
    text = help_text()
    for cls, prefix in (
        (Config, "--"),
        (ModelConfig, "--model."),
        (OrchestratorConfig, "--orchestrator."),
    ):
        for f in dataclasses.fields(cls):
            assert f.name in ("model", "orchestrator") or f"{prefix}{f.name} " in text, f.name


def test_printed_configuration_runs_as_it_is(tiny, tmp_path):
    assert Trainer(tiny(max_steps=3, num_epochs=...)).fit() == 0
    again = tiny()["out_dir"] + "/config.yaml"
    cfg, *_ = read_config([again])
    first = yaml.safe_load(Path(again).read_text())
    assert dataclasses.asdict(cfg) == first | {
        "gradient_accumulation_steps": 1
    }  # it follows from batch_tokens
    a = Trainer([again, "--out_dir", str(tmp_path / "again")])
    assert a.fit() == 0
    assert fingerprint(tiny()["out_dir"], 3) == fingerprint(a.out, 3)
