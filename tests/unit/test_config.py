import dataclasses
import json
import math
import zipfile

import pytest
import yaml
from conftest import ROOT, write_yaml

from lumen import aliases, checkpoint, modes
from lumen.cli import read_config
from lumen.config import (
    INSIDE,
    RANGES,
    Config,
    OrchestratorConfig,
    build_config,
    help_text,
    own_keys,
    printed,
)
from lumen.errors import UserError
from lumen.values import allowed, convert
from model import ModelConfig


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
    path.write_text(f"data_dir: {shards}\norchestrator:\n  d_model: 60\n")
    refused([path], "E002", f"{path}:3", "belongs under model:")
    path.write_text(f"data_dir: {shards}\nmodel:\n  seed: 60\n")
    refused([path], "E002", f"{path}:3", "top level")
    path.write_text(f"data_dir: {shards}\nbatch_size: many\n")
    refused([path], "E002", f"{path}:2", "batch_size: 'many' must be in [1, 16777216] or auto")
    path.write_text(f"data_dir: {shards}\nbatch_size: 2.5\n")
    refused([path], "E002", "batch_size: '2.5' must be")
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
    refused([path, "--batch_size", "0"], "E002", "0 must be in [1, ")
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


def test_help_lists_every_key():
    text = help_text()
    for cls, prefix in (
        (Config, "--"),
        (ModelConfig, "--model."),
        (OrchestratorConfig, "--orchestrator."),
    ):
        for f in dataclasses.fields(cls):
            assert f.name in ("model", "orchestrator") or f"{prefix}{f.name} " in text, f.name


def test_what_is_printed_can_be_loaded_and_means_the_same(tmp_path, shards):
    words = ["moe_124m", "--data_dir", shards, "--hidden_size", "384", "--use_mod"]
    cfg, _, notes, _ = read_config(words)
    text = printed(cfg, False, notes)
    assert "# hidden_size -> model.d_model 384\n" in text
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert read_config([str(path)])[0] == cfg


# ---------------------------------------------------------------- ranges

DEFAULTS = {**dataclasses.asdict(Config()), "model": None}


@pytest.mark.parametrize("key", RANGES)
def test_every_range_holds_the_default_and_refuses_what_lies_outside(key):
    block, _, name = key.rpartition(".")
    default = (DEFAULTS[block] if block else DEFAULTS)[name]
    assert default is None or allowed(default, RANGES[key])
    for value in (math.nan, -1, "nonsense", -1e30):
        assert not allowed(value, RANGES[key])


@pytest.mark.parametrize(("text", "inside", "outside"), [
    ("[0, 1)", [0, 0.5], [1, -0.1, math.inf, True, "0"]),
    ("(0, 1]", [1, 1e-9], [0, 1.1]),
    (">= 1", [1, 10**30], [0.9, None]),
    ("> 0", [5e-324], [0, "auto"]),
    ("[1, 64] | auto", [1, 64, "auto"], [65, "Auto", "autos"]),
    ("auto | true | false", ["auto", True, False], [1, 0, "yes"]),
    ("cpu | cuda:N", ["cpu", "cuda:0", "cuda:12"], ["cuda:", "cuda:x", "cuda:N"]),
])  # fmt: skip
def test_a_range_is_read_as_it_is_written(text, inside, outside):
    assert all(allowed(value, text) for value in inside)
    assert not any(allowed(value, text) for value in outside)


# ---------------------------------------------------------------- names of other trainers


def renamed(tree: dict, under: dict | None = None) -> aliases.Renaming:
    return aliases.rename(tree, own_keys(), lambda key: f"at {key}", under)


def test_our_own_value_is_no_other_name():
    assert renamed({"model": {"n_experts": 0}}).notes == []
    assert renamed({"model": {"n_experts": False}}).notes == [
        "model.n_experts false -> model.n_experts 0"
    ]


def refusals(**tree) -> str:
    return "\n".join(renamed(tree).wrong)


def rows() -> list:
    """(name, value) for each row of configs/aliases.yaml and each value that it lists."""
    found = []
    for name, row in aliases.table().items():
        found += [(name, value) for value in row["values"]]
        if name not in own_keys():
            found.append((name, 0.25))
    return found


@pytest.mark.parametrize(("name", "value"), rows(), ids=str)
def test_every_row_of_the_table_does_what_it_says(name, value):
    row = aliases.table()[name]
    block, _, bare = name.rpartition(".")
    tree = {block: {bare: value}} if block else {name: value}
    if "section" in row:
        assert not renamed({name: {"lr": 1}}).wrong and refusals(**{name: 1}).startswith("at ")
        return
    if "expands" in row:  # see test_mixture.py
        assert not renamed(tree).notes and tree == {name: value}
        return
    if "with" in row:
        assert any(f"no effect: {row['with']} is not true" in n for n in renamed({**tree}).notes)
        tree[row["with"]] = True
    done, new = renamed(tree), row["values"].get(value, row)
    if isinstance(new, dict) and "refuse" in new:
        why = new["refuse"].replace("VALUE", str(value))
        assert len(done.wrong) == 1 and done.wrong[0].endswith(why)
        assert done.wrong[0].startswith(f"at {name}: {name}: ")
        return
    assert not done.wrong
    if isinstance(new, dict) and "ignore" in new:
        assert done.notes == [f"{name} has no effect: {new['ignore']}"] and tree.get(name) is None
        return
    key = row.get("to", name)
    if isinstance(new, list):
        new = new[0]
    if new is row:
        new = row["form"].replace("NAME", "0.25") if "form" in row else value
        new = 1 - value if "one_minus" in row else new
    assert aliases.get(tree, key) == new
    assert any(f"-> {key} {aliases.as_yaml(new)}" in note for note in done.notes)
    if value in row["values"] and key in own_keys() and new is not None:
        assert key not in RANGES or allowed(convert(new, own_keys()[key], ""), RANGES[key])


def test_every_name_leads_to_a_key_that_exists_and_hides_none():
    own = {*own_keys(), *(f"prepare.{key}" for key in INSIDE["prepare"]), *modes.KEYS}
    no_key = {"ignore", "refuse", "section", "expands"}
    for name, row in aliases.table().items():
        assert row.get("to", name) in own or row.keys() & no_key, name
        assert name not in own or "to" not in row, f"{name} is a key of ours"
        assert row.get("with", name) in aliases.table()


LUMINA = {
    "training_params": {"epochs": 3, "lr": "1e-4", "grad_accum": 4, "gradient_clip_val": 1.0},
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "seq_length": 64,
    "dropout": 0.1,  # ours, but it stands under model:
    "use_moe": True,
    "num_experts": 4,
    "moe_top_k": 2,
    "use_mod": False,
    "mod_capacity_factor": 0.5,
    "gradient_checkpointing": True,
    "warmup_ratio": 0.15,
    "use_adaptive_training": True,
    "health_check_interval": 50,
    "experiment_name": "mine",
    "num_workers": 4,
    "train_data": "a.jsonl",
}


@pytest.mark.parametrize("form", ["yaml", "json", "typed", "dict", "nested"])
def test_a_configuration_of_another_trainer_runs(form, tmp_path):
    """Flat or nested, YAML, JSON with comments, the command line or Python: the same run."""
    tree, path = json.loads(json.dumps(LUMINA)), tmp_path / f"mine.{form}"
    if form == "dict":
        notes = []
        cfg = build_config(tree, lambda key: "config", notes)
    elif form == "typed":
        flat = tree.pop("training_params") | tree
        words = [w for key, value in flat.items() for w in (f"--{key}", json.dumps(value))]
        cfg, _, notes, _ = read_config(words)
    else:
        if form == "nested":
            tree["model"] = {key: tree.pop(key) for key in ("hidden_size", "num_heads", "use_moe")}
        text = json.dumps(tree, indent="\t").replace("{\n", '{ // it\'s "mine"\n', 1)
        if form != "json":
            text = yaml.safe_dump(tree)
        path = path if form == "json" else tmp_path / "mine.yaml"
        path.write_text(text)
        cfg, _, notes, _ = read_config([str(path)])
    m = cfg.model
    assert (m.d_model, m.n_layers, m.n_heads, m.n_kv_heads, m.max_seq_len) == (128, 2, 4, 2, 64)
    assert (m.dropout, m.n_experts, m.n_experts_per_token, m.mod_capacity) == (0.1, 4, 2, 1.0)
    assert (cfg.num_epochs, cfg.learning_rate, cfg.gradient_accumulation_steps) == (3, 1e-4, 4)
    assert (cfg.grad_clip, cfg.activation_checkpointing, cfg.warmup_steps) == (1.0, "block", 0.15)
    assert (cfg.out_dir, cfg.prepare["sources"], cfg.data_dir) == (
        "out/mine",
        ["a.jsonl"],
        "data/a",
    )
    assert (cfg.orchestrator.mode, cfg.orchestrator.check_interval) == ("act", 50)
    said = "\n".join(notes)
    for text in ("seq_length -> model.max_seq_len 64", "dropout -> model.dropout 0.1"):
        assert said.count(text) == 1, said
    assert "gradient_checkpointing true -> activation_checkpointing block" in said
    assert said.count("num_workers has no effect") == 1


def test_an_old_and_a_new_name_that_differ_are_refused_naming_both():
    for tree, both in (
        ({"lr": 1e-3, "learning_rate": 2e-3}, ("lr: 0.001", "learning_rate: 0.002")),
        ({"max_iters": 5, "train_steps": 6}, ("max_iters: 5", "train_steps: 6")),
        ({"n_embd": 64, "model": {"d_model": 32}}, ("n_embd: 64", "model.d_model: 32")),
        ({"use_adaptive_training": False, "orchestrator": {"mode": "act"}}, ("false", "act")),
        ({"training_params": {"lr": 1}, "lr": 2}, ("training_params.lr", "top level")),
        ({"expert_back_end": "slices", "expert_backend": "triton"}, ("slices", "triton")),
    ):
        said = refusals(**tree)
        assert all(text in said for text in both) and "drop one" in said, said
    assert not refusals(lr="1e-3", learning_rate=0.001)  # the same, spelt in two ways
    assert not refusals(use_moe=False, num_experts=8)  # a switch that is off says more
    assert not refusals(use_adaptive_training=False, orchestrator={"mode": "shadow"})


def test_what_is_typed_beats_the_file_under_its_other_names_too(tmp_path):
    path = tmp_path / "c.yaml"
    text = "data_dir: d\nmax_iters: 9\nn_embd: 64\nn_head: 4\nuse_moe: true\nnum_experts: 4\n"
    path.write_text(f"{text}orchestrator: {{mode: shadow}}\n")

    def read(*words):
        cfg, _, notes, _ = read_config([str(path), *words])
        return cfg, "\n".join(notes)

    cfg, said = read("--epochs", "2", "--hidden_size", "128")
    assert (cfg.max_steps, cfg.num_epochs, cfg.model.d_model) == (None, 2.0, 128)
    assert "num_epochs was typed: max_steps: 9 of the file is left out" in said
    assert read("--model.d_model", "32")[0].model.d_model == 32
    assert read("--use_moe")[0].model.n_experts == 4  # how many says the file
    assert read("--use_moe", "false")[0].model.n_experts == 0
    assert read("--use_adaptive_training")[0].orchestrator.mode == "shadow"
    assert "model.n_experts 4 says it" in read("--use_moe")[1]
    assert read("--use_adaptive_training=false")[0].orchestrator.mode == "off"
    assert read("--train_data", "mine.txt")[0].data_dir == "data/mine"
    refused([path, "--epochs"], "E002", "--epochs needs a value")
    refused([path, "--hidden_size", "x"], "E002", "command line: model.d_model: 'x' is not int")
    path.write_text("data_dir: d\norchestrator: {mode: off}\n")
    assert read("--use_adaptive_training")[0].orchestrator.mode == "act"
    assert read("--use_moe")[0].model.n_experts == 8
    path.write_text("data_dir: d\ntraining_params:\n  epochs: x\n")
    refused([path], "E002", f"{path}:3: num_epochs: 'x' is not float")
    path.write_text("data_dir: d\ntraining_params:\n  betas: x\n  nonsense: 1\n")
    refused([path], "E002", f"{path}:3: betas: ", f"{path}:4: unknown key nonsense")
    path.write_text("data_dir: d\nhidden_size: x\n")
    refused([path], "E002", f"{path}:2: model.d_model: 'x' is not int")


def test_what_lumen_wrote_before_nine_keys_went_is_read(tmp_path):
    """The whole config of an old state.json, as it stood in config.yaml too."""
    archive = zipfile.ZipFile(ROOT / "tests" / "fixtures" / "run_77c1c6b.zip")
    old = json.loads(archive.read("step_00000010/state.json"))["config"]
    assert {"use_adaptive_training", "picture", "cpu_offload", "max_auto_epochs"} < set(old)
    cfg, *_ = read_config([str(write_yaml(tmp_path / "config.yaml", old))])
    kept = {key: value for key, value in dataclasses.asdict(cfg).items() if key in old}
    kept["model"] = {key: value for key, value in kept["model"].items() if key in old["model"]}
    assert kept == {key: old[key] for key in kept} and cfg.tokens_per_parameter is None
    off = old | {"use_adaptive_training": False, "orchestrator": {"mode": "off"}}
    cfg, *_ = read_config([str(write_yaml(tmp_path / "config.yaml", off))])
    assert cfg.orchestrator.mode == "off"


def test_checkpoints_from_before_are_read_under_the_names_of_today():
    old = {"auto_epoch_scaling": True, "chinchilla_multiplier": 25, "max_auto_epochs": 4}
    resolved = {"gradient_accumulation_steps": 2, "min_lr": 0.0, "warmup_steps": 5}
    resolved["learning_rate"] = 3e-4
    gone = {"attention": "flex", "picture": True, "use_adaptive_training": True}
    state = {"config": old | resolved | gone, "written": dict(old), "segments": [], "step": 5}
    state |= {"auto": {"expert_back_end": "slices", "rows": 8}}
    now = checkpoint.modernised(state)
    length = {"tokens_per_parameter": 25, "num_epochs": 4}
    assert now["written"] == length and now["run"]["expert_backend"] == "slices"
    assert now["run"]["learning_rate"] == 3e-4, "the default of then, before it was auto"
    assert now["config"] == resolved | length | {"orchestrator": {"mode": "act"}}
    assert checkpoint.modernised({"step": 5}) == {"step": 5}


# ---------------------------------------------------------------- evaluate


def test_tasks_on_the_way_are_a_list_however_they_are_written(tmp_path, shards):
    path = tmp_path / "c.yaml"
    path.write_text(f"data_dir: {shards}\nevaluate:\n  every: 5\n  tasks: [a.jsonl, boolq:d]\n")
    cfg = read_config([str(path)])[0].evaluate
    assert (cfg.every, cfg.tasks, cfg.limit) == (5, ["a.jsonl", "boolq:d"], 200)
    words = [str(path), "--evaluate.tasks", "a.jsonl, boolq:d", "--evaluate.limit", "null"]
    assert read_config(words)[0].evaluate == dataclasses.replace(cfg, limit=None)
    off = read_config([str(path), "--evaluate.every", "0"])[0].evaluate
    assert off.every == 0 and off.tasks == cfg.tasks
    named = read_config([str(path), "--core_metric_every", "7", "--num_fewshot", "2"])[0].evaluate
    assert (named.every, named.shots) == (7, 2)
    refused([path, "--evaluate.limit", "0"], "E002", "evaluate.limit: 0 must be >= 1")
    refused([path, "--evaluate.task", "x"], "E002", "did you mean evaluate.tasks?")
    path.write_text(f"data_dir: {shards}\nevaluate:\n  tasks: [a]\n")
    refused([path], "E002", f"{path}:3: evaluate.tasks: needs evaluate.every")
    path.write_text(f"data_dir: {shards}\nevaluate:\n  every: 3\n")
    refused([path], "E002", f"{path}:3: evaluate.every: needs evaluate.tasks")
    path.write_text(f"data_dir: {shards}\nevaluate:\n  every: 3\n  tasks: [[]]\n")
    refused([path], "E002", f"{path}:4: evaluate.tasks[0]")
