"""What users of LuminaAI, Lumi and Lunaris Codex bring along: their configurations, and what they
type. Every key is understood, has no effect for a reason, or is refused with one; none is unknown.

tests/fixtures/seeds holds an example of each configuration, written from their lists of keys."""

import dataclasses
import json
import re
import shutil

import pytest
import yaml
from conftest import ROOT, write_yaml

import evaluate
import finetune
import prepare_data
import sample
import serve
from lumen import aliases, modes, option_names, prepare_names, quantise_names
from lumen.cli import read_any, read_config
from lumen.config import BLOCKS, own_keys
from lumen.errors import UserError
from lumen.launch import Words
from lumen.values import without_comments

SEEDS = ROOT / "tests" / "fixtures" / "seeds"

# ---------------------------------------------------------------- their data, so that it is there


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the paths of the fixtures are: texts, folders of prepare_data.py under the
    names of conversations, a base."""
    folder = tmp_path_factory.mktemp("home")
    data = folder / "data"
    data.mkdir()
    for name in ("base_1.txt", "base_2.txt", "eval.txt", "eval.jsonl"):
        (data / name).write_text('{"text": "a text of its own"}\n' * 3)
    rows = [{"prompt": f"{i} and one?", "response": f"{i + 1}."} for i in range(20)]
    (folder / "sft.json").write_text(json.dumps(rows))
    prepare_data.prepare(
        [str(folder / "sft.json")], str(data / "train_1.jsonl"), "bytes", quiet=True
    )
    shutil.copytree(data / "train_1.jsonl", data / "train_2.jsonl")
    base = folder / "base"
    base.mkdir()
    shutil.copy(data / "train_1.jsonl" / "tokenizer.json", base)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320}
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 128, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    (base / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


# ---------------------------------------------------------------- their configurations


@dataclasses.dataclass
class Seed:
    """A file of tests/fixtures/seeds, and what becomes of it."""

    file: str
    values: dict  # of the Config
    refused: dict = dataclasses.field(default_factory=dict)  # key: a part of the reason
    words: tuple = ()  # typed behind it
    read: object = read_config


CONFIGS = [
    Seed(
        "luminaai_000_main.yaml",
        {
            "model.n_experts": 8,
            "model.n_experts_per_token": 2,
            "model.mod_capacity": 0.5,
            "num_epochs": 50.0,
            "tokens_per_parameter": 20.0,
            "learning_rate": 1e-4,
            "min_lr": 1e-6,
            "lr_schedule": "cosine",
            "warmup_steps": 0.02,
            "batch_size": 25,
            "gradient_accumulation_steps": 8,
            "batch_tokens": None,
            "precision": "fp32",
            "compile_model": True,
            "target_memory": 0.85,
            "activation_checkpointing": "block",
            "prepare.sources": ["data/base_1.txt", "data/base_2.txt"],
            "prepare.val_sources": ["data/eval.txt"],
            "out_dir": "out/mine",
            "orchestrator.mode": "act",
            "orchestrator.check_interval": 50,
            "wandb_project": "my-project",
            "backup_interval_hours": 12.0,
            "log_interval": 50,
            "resume": "none",
            "early_stopping_patience": 5,
        },
    ),
    Seed(
        "luminaai_000_7b.yaml",
        {
            "model.d_model": 3072,  # our b7's
            "model.n_experts": 8,
            "model.mod_capacity": 0.5,
            "num_epochs": 3.0,
            "tokens_per_parameter": 20.0,
            "batch_size": 16,
            "gradient_accumulation_steps": 8,
            "precision": "mixed_bf16",
            "reduce_dtype": "bf16",
            "zero_stage": 2,
            "enable_early_stopping": True,
            "early_stopping_patience": 10,
            "save_interval": 1000,
        },
        refused={
            "quantization_method": "to fine-tune on a base of few bits",
            "finetuning_eval_paths": "prepare_data.py makes it of --val FILE",
        },
    ),
    Seed(
        "luminaai_001_flat.yaml",
        {
            "model.d_model": 512,
            "model.n_layers": 8,
            "model.n_kv_heads": 4,
            "model.max_seq_len": 1024,
            "model.norm_eps": 1e-6,
            "model.vocab_size": 50304,
            "model.n_experts": 8,
            "model.n_experts_per_token": 1,
            "model.capacity_factor": 1.5,
            "model.aux_loss_weight": 0.001,
            "model.mod_capacity": 0.5,
            "model.tie_embeddings": True,
            "zero_stage": 0,
            "save_async": True,
            "early_stopping_patience": 0,
            "wandb_project": None,
            "prepare.sources": ["data/train_1.jsonl"],
            "prepare.val_sources": ["data/eval.jsonl"],
            "prepare.loss_on": "assistant",
            "grad_clip": 1.0,
            "orchestrator.intervention_threshold": 0.75,
            "orchestrator.enable_architecture_adaptation": True,
        },
        refused={"quality_threshold": "a score of our own", "stride": "rows do not overlap"},
    ),
    Seed(
        "luminaai_002.yaml",
        {
            "model.d_model": 256,
            "model.n_layers": 4,
            "model.n_heads": 4,
            "model.n_kv_heads": 2,
            "model.d_ff": 768,
            "model.max_seq_len": 256,
            "model.n_experts": 8,
            "model.capacity_factor": 1.25,
            "num_epochs": 3.0,
            "learning_rate": 1e-4,
            "warmup_steps": 0.15,
            "grad_clip": 1.0,
            "attention": "auto",
            "out_dir": "out/custom_7b",
            "save_interval": 1000,
            "eval_interval": 500,
        },
    ),
    Seed(
        "lumi_tiny.json",
        {
            "model.n_layers": 6,
            "model.d_model": 256,
            "model.n_heads": 4,
            "model.d_ff": 1024,
            "model.vocab_size": 32768,
            "model.max_seq_len": 1024,
            "model.dropout": 0.1,
            "prepare.sources": ["data/base_1.txt"],
        },
        words=("--data_path", "data/base_1.txt"),
    ),
    Seed(
        "lumi_gqa.json",
        {"model.n_kv_heads": 5, "model.rope_theta": 10000.0, "model.max_seq_len": 1536},
        words=("--data_path", "data/base_1.txt"),
    ),
    Seed(
        "lumi_sft.json",
        {
            "learning_rate": 5e-5,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_epochs": 3.0,
            "warmup_steps": 0.03,
            "weight_decay": 0.01,
            "save_interval": 500,
            "eval_interval": 250,
            "precision": "fp16",
            "lora.r": 16,
            "lora.alpha": 32.0,
            "lora.dropout": 0.1,
            "prepare.template": "instruct",
            "prepare.sources": ["sft.json"],
            "data_dir": "data/sft-base-",
            "init_from": "base",
        },
        words=("--model_path", "base", "--dataset_path", "sft.json"),
        read=finetune.read,
    ),
    Seed(
        "lumi_dpo.json",
        {
            "method": "dpo",
            "beta": 0.1,
            "learning_rate": 5e-7,
            "num_epochs": 1.0,
            "warmup_steps": 0.1,
            "model.max_seq_len": 1024,
            "early_stopping_patience": 3,
            "lora.targets": ["q_proj", "v_proj"],
            "prepare.template": "instruct",
        },
        words=("--init_from", "base", "--data", "sft.json", "--method", "dpo"),
        read=finetune.read,
    ),
    Seed(
        "lunaris_train_config_moe.yaml",
        {
            "data_dir": "data/shards",
            "model.n_experts_per_token": 1,
            "model.norm_topk": False,
            "max_steps": 200000,
            "num_epochs": None,
            "compile_model": True,
            "out_dir": "checkpoints/lunaris-moe",
        },
    ),
]


def load(file: str) -> dict:
    text = (SEEDS / file).read_text()
    return yaml.safe_load(without_comments(text) if file.endswith(".json") else text)


def leaves(tree: dict) -> list[str]:
    """The names of all keys, those in sections and blocks too, bare."""
    sections = [name for name, row in aliases.table().items() if row.get("section")]
    found = []
    for name, value in tree.items():
        inside = name in (*sections, *BLOCKS) and isinstance(value, dict)
        found += leaves(value) if inside else [name]
    return found


def without(tree: dict, keys) -> dict:
    kept = {name: value for name, value in tree.items() if name not in keys}
    return {n: without(v, keys) if isinstance(v, dict) else v for n, v in kept.items()}


def value_of(cfg, key: str):
    found = cfg
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def answered(name: str, notes: list[str]) -> bool:
    """Whether it is a key of ours by this very name, or a note says what became of it."""
    homes = [key for key in own_keys() if key.rpartition(".")[2] == name]
    words = " ".join(notes).replace(",", " ").split()
    told = name in [word.rpartition(".")[2] for word in words]
    return bool(homes) or told or name in modes.KEYS


@pytest.mark.parametrize("seed", CONFIGS, ids=lambda seed: seed.file)
def test_a_configuration_of_theirs_is_read(seed, there, tmp_path):
    tree = load(seed.file)
    for key, part in seed.refused.items():
        # with all of the file, and one at a time: what is refused has its reason
        only = without(tree, set(seed.refused) - {key})
        path = write_yaml(tmp_path / "with.yaml", only)
        with pytest.raises(UserError) as e:
            seed.read([str(path), *seed.words])
        assert key in e.value.text and part in e.value.text, e.value.text
        assert "unknown key" not in e.value.text
    path = SEEDS / seed.file
    if seed.refused:
        path = write_yaml(tmp_path / "without.yaml", without(tree, seed.refused))
    cfg, _, notes, _ = seed.read([str(path), *seed.words])
    found = {key: value_of(cfg, key) for key in seed.values}
    if seed.read is finetune.read and "data_dir" in found:
        found["data_dir"] = re.sub(r"[0-9a-f]{6}$", "", found["data_dir"])
    assert found == seed.values
    unanswered = [n for n in leaves(tree) if n not in seed.refused and not answered(n, notes)]
    assert not unanswered


@pytest.mark.parametrize(
    "seed",
    [s for s in CONFIGS if s.read is read_config and not s.words],
    ids=lambda seed: seed.file,
)
def test_as_a_dict_it_is_the_same_run(seed, there, tmp_path):
    """`Trainer({...})` reads its argument so."""
    tree = without(load(seed.file), seed.refused)
    cfg, _, notes = read_any(tree)
    path = write_yaml(tmp_path / "file.yaml", tree)
    of_file, _, said, _ = read_config([str(path)])
    if "out_dir" not in seed.values:
        of_file = dataclasses.replace(of_file, out_dir=cfg.out_dir)
    assert cfg == of_file and len(notes) == len(said)


def test_the_trainers_own_section_names_and_preset(there):
    """Main.py's dicts as they stand in its Quick Start."""
    data = {"training_mode": "finetuning_only", "finetuning_paths": ["data/train_1.jsonl"]}
    main = {"config_choice": "debug", "use_adaptive_training": True, "data_params": data}
    main["training_params"] = {"num_epochs": 3, "batch_size": 8, "learning_rate": 1e-4}
    cfg, _, notes = read_any(main)
    preset, *_ = read_config(["debug"])
    assert cfg.model == preset.model and cfg.out_dir == "out/run"
    assert (cfg.num_epochs, cfg.max_steps, cfg.batch_size) == (3.0, None, 8)
    assert cfg.data["sources"]["finetuning"]["dir"] == "data/train_1.jsonl"
    said = "\n".join(notes)
    assert "config_choice debug -> CONFIG " in said and "max_steps: 150 of the file" in said
    with pytest.raises(UserError, match="config: config_choice: b77 does not exist"):
        read_any(main | {"config_choice": "b77"})


def test_a_dataset_json_of_lumi_prepares(there, tmp_path, capsys):
    """Named by --config_path, or as the first word; what is typed beats it."""
    text = "\n\n".join(
        f"This is sentence {i}, of a text of some length, for it is kept." for i in range(40)
    )
    (there / "data" / "base_1.txt").write_text(text)
    parser = prepare_data.arguments()
    file = str(SEEDS / "lumi_dataset.json")
    for words in (["--config_path", file], [file], [f"--config={file}"]):
        options, notes = prepare_names.read(words, parser)
        assert options == {
            "sources": ["data/base_1.txt"],
            "out": "data/processed/demo",
            "tokenizer": "bpe:8192",
            "seq_len": 512,
            "min_chars": 50,
            "max_chars": 10000,
            "val_fraction": 0.02,
            "shard_tokens": 5000000,
            "minhash": {"bands": 8, "rows": 10},
        }
        unanswered = [name for name in load("lumi_dataset.json") if not answered(name, notes)]
        assert unanswered == ["shard_tokens"]  # which is ours
    typed = ["--min_length", "5", "--output_dir", str(tmp_path / "d"), "--vocab_size=300"]
    typed += ["--num_workers", "1", "--use_minhash", "false", "--quiet"]
    options, notes = prepare_names.read([file, *typed], parser)
    assert (options["min_chars"], options["tokenizer"]) == (5, "bpe:300")
    prepare_data.main([file, *typed])
    assert (tmp_path / "d" / "manifest.json").exists()
    (there / "spm.json").write_text("{}")
    words = ["x.txt", "--tokenizer_path", "spm.json", "--vocab_size", "300"]
    options, notes = prepare_names.read(words, parser)
    assert options["tokenizer"] == "spm.json" and "has its own" in notes[0]


def test_files_of_options_and_files_of_data_are_told_apart(tmp_path):
    def is_options(tree) -> bool:
        path = tmp_path / "f.json"
        path.write_text(json.dumps(tree))
        return prepare_names.holds_options(str(path))

    assert is_options({"input_path": "a.txt"}) and is_options({"sources": {"a": {"path": "x"}}})
    for data in ([{"text": "a"}], {"text": "a"}, {"prompt": "a", "response": "b"}, "text", {}):
        assert not is_options(data)
    assert not prepare_names.holds_options(str(tmp_path / "none.json"))
    for words, part in (
        (["--config_path", str(tmp_path / "none.json")], "No such file"),
        (["--config", "a.json", "--config_path", "b.json"], "are both files of options"),
        (["x", "--minhash_threshold", "0.9"], "bands and rows decide"),
        (["x", "--drop_urls"], "nothing is cut out of a text"),
        (["x", "--min_lenght", "5"], "did you mean --min_length?"),
        (["x", "--validate_data=5"], "--validate_data takes no value"),
    ):
        with pytest.raises(UserError) as e:
            prepare_names.read(words, prepare_data.arguments())
        assert part in e.value.text, e.value.text
    path = tmp_path / "m.json"
    path.write_text('{"input_path": "a.txt", "min_length": {"x": 1}}')
    with pytest.raises(UserError, match="m.json: min_length: "):
        prepare_names.read([str(path)], prepare_data.arguments())


# ---------------------------------------------------------------- what they type behind train.py

LINES = [  # (typed, values of the Config, flags)
    (
        "--config b7 --train-data sft.json --experiment-name x",
        {"out_dir": "out/x", "prepare.sources": ["sft.json"], "model.n_layers": 32},
        {},
    ),
    ("--config-choice debug", {"out_dir": "out/debug"}, {}),
    ("--estimate-parameters --config b7", {}, {"dry_run": True}),
    ("b14 --analyze-memory --sequence-length 2048", {"model.max_seq_len": 2048}, {"dry_run": True}),
    (
        "b7 --estimate-time --hardware-profile a100-80gb --detailed",
        {},
        {"dry_run": True, "hardware": "a100-80gb"},
    ),
    (
        "debug --epochs 3 --learning-rate 1e-4 --batch-size 4 --grad-accum 8 --warmup-ratio 0.15"
        " --weight-decay 0.01 --max-grad-norm 1.0 --seed 42",
        {"num_epochs": 3.0, "gradient_accumulation_steps": 8, "warmup_steps": 0.15, "seed": 42},
        {},
    ),
    ("debug --compile --enable-flash-attention --num-workers 8", {"compile_model": True}, {}),
    ("debug --batch-size 1 --grad-accum 32 --precision fp16 --gradient-checkpointing",
     {"batch_size": 1, "activation_checkpointing": "block"}, {}),
    ("debug --lr-scheduler none", {"lr_schedule": "constant"}, {}),
    ("debug --lr-scheduler linear --use-lr-scheduler", {"lr_schedule": "linear"}, {}),
    ("debug --backup-every-n-hours 6", {"backup_interval_hours": 6.0}, {}),
    ("debug --track-best-model --best-metric validation_ppl --verbose --debug", {}, {}),
    ("debug --shard-size-mb 256 --force-streaming --disable-sharding", {}, {}),
    ("debug --auto-resume --experiment-name z --modify-config", {"out_dir": "out/z"}, {}),
    ("debug --log-every-n-batches 30 --save-every-n-batches 50", {"save_interval": 50}, {}),
    ("debug --no-compile --cpu --steps 100", {"max_steps": 100, "device": "cpu"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "values", "flags"), LINES)
def test_a_command_line_of_theirs_is_understood(line, values, flags, there):
    cfg, _, notes, found = read_config(line.split())
    assert {key: value_of(cfg, key) for key in values} == values and found == flags
    names = [w[2:].replace("-", "_") for w in line.split() if w.startswith("--")]
    assert [name for name in names if not answered(name, notes)] == []


@pytest.mark.parametrize(("line", "code", "part"), [
    ("debug --config b1", "E002", "--config b1: debug is the file or preset; drop one"),
    ("--config b77", "E001", "b77 does not exist"),
    ("journey_cpu", "E001", "is a journey: python journey.py journey_cpu"),
    ("--config", "E002", "--config needs a value"),
    ("b7 --hardware-profile a100-80gb", "E002", "with --dry_run only"),
    ("--check-environment", "E002", "python -m lumen.machine shows it"),  # no list of presets
    ("--check-enviroment", "E002", "did you mean check_environment?"),
    ("b7 --test-generation --test-prompts a b", "E002", "python sample.py OUT_DIR --prompt A"),
    ("b7 --validate-data f.jsonl --create-report", "E002", "prepare_data.py FILE --validate_only"),
    ("b7 --benchmark-generation --batch-sizes 1,4", "E002", "python -m tools.bench generate"),
    ("b7 --profile-training", "E002", "python -m tools.bench speed"),
    ("debug --data_dirs a b --data_weights 0.7 0.3", "E002", "data: {sources:"),
    ("--resume nowhere", "E304", "nowhere does not exist"),
    ("--resume base/config.json", "E304", "is a file; a run, or a step of it, is a folder"),
    ("--mask_user_tokens true", "E002", "mask_user_tokens: says how data is prepared, and none"),
    ("--quiet", "E001", "which configuration?"),
])  # fmt: skip
def test_what_cannot_be_is_answered_and_not_unknown(line, code, part, there):
    with pytest.raises(UserError) as e:
        read_config(line.split())
    assert e.value.code == code and part in e.value.text, e.value.text
    assert "unknown key" not in e.value.text or "did you mean" in e.value.text


def test_resume_alone_takes_the_configuration_of_that_run(tmp_path, shards):
    run = tmp_path / "run"
    (run / "step_00000004").mkdir(parents=True)
    (run / "step_00000004" / "manifest.json").write_text("{}")
    keys = {"data_dir": shards, "out_dir": str(run), "seed": 7, "model": {"vocab_size": 97}}
    write_yaml(run / "config.yaml", keys)
    for words in (["--resume", run], ["--resume_from_checkpoint", run / "step_00000004"]):
        cfg, _, notes, _ = read_config([str(word) for word in words])
        assert (cfg.out_dir, cfg.seed) == (str(run), 7)
        assert any("config.yaml" in note for note in notes)
    cfg, *_ = read_config(["--resume", str(run), "--out_dir", "out/copy"])
    assert (cfg.out_dir, cfg.seed, cfg.resume) == ("out/copy", 7, str(run))
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="lies in no run with a config.yaml"):
        read_config(["--resume", str(run)])


# ---------------------------------------------------------------- options of prepare


def test_typed_options_of_prepare_join_those_of_the_file(there, tmp_path):
    own = write_yaml(tmp_path / "own.yaml", {
        "prepare": {"sources": ["data/base_1.txt"], "tokenizer": "bpe:512", "out": "data/a"},
        "prompt_template": "instruct",
    })  # fmt: skip

    def read(*words):
        cfg, _, notes, _ = read_config([str(word) for word in words])
        return cfg.prepare, notes

    # the preset's text, into a folder of its own
    prepare, _ = read("quickstart", "--eval_data", "data/eval.txt")
    assert prepare["sources"] == ["stdlib"] and prepare["tokenizer"] == "bpe:2048"
    assert prepare["val_sources"] == ["data/eval.txt"]
    assert prepare["out"].startswith("data/stdlib-")
    assert read("quickstart", "--mask_user_tokens", "false")[0]["out"] != prepare["out"]
    assert read("quickstart", "--prepare.out", "data/b", "--max_bad", "0.5")[0] == {
        "sources": ["stdlib"], "tokenizer": "bpe:2048", "out": "data/b", "max_bad": 0.5,
    }  # fmt: skip
    # other text: the preset's options go with its own, those of one's own file stay
    prepare, notes = read("quickstart", "--train_data", "data/base_2.txt")
    assert prepare == {"sources": ["data/base_2.txt"], "out": "data/base_2"}
    assert any("not with --train_data: the sample begins a new" in note for note in notes)
    prepare, _ = read(own, "--train_data", "data/base_2.txt")
    assert prepare == {
        "sources": ["data/base_2.txt"], "out": "data/base_2", "tokenizer": "bpe:512",
        "template": "instruct",
    }  # fmt: skip
    whole, _ = read(own, "--prepare", '{"sources": ["data/base_2.txt"]}')
    assert whole == {"sources": ["data/base_2.txt"], "out": "data/base_2"}


@pytest.mark.parametrize("way", ["data_dir", "data", "training_mode"])
def test_options_of_prepare_beside_prepared_data_are_held_against_it(way, there, tmp_path):
    folder = "data/train_1.jsonl"  # prepared with loss_on assistant, as conversations are
    keys = {
        "data_dir": {"data_dir": folder},
        "data": {"data": {"sources": {"a": {"dir": folder}}}},
        "training_mode": {"training_mode": "finetuning_only", "finetuning_paths": [folder]},
    }[way]
    file = write_yaml(tmp_path / "c.yaml", keys)

    def read(*words):
        cfg, _, notes, _ = read_config([str(file), *words])
        assert cfg.prepare is None
        return "\n".join(notes)

    assert f"mask_user_tokens has no effect: {folder} is prepared" in read("--mask_user_tokens")
    assert "tokenizer_path has no effect" in read("--tokenizer_path", "x", "--max_bad", "0.5")
    for words, part in (
        ("--mask_user_tokens false", f"loss_on all is asked for, and {folder} was prepared with"),
        ("--prompt_template raw", f"template raw is asked for, and {folder} was prepared with"),
        ("--eval_data x", "holds its own val split: prepare_data.py makes it of --val FILE"),
    ):
        name = words.split()[0][2:]
        with pytest.raises(UserError) as e:
            read(*words.split())
        assert e.value.text.startswith(f"command line: {name}: ") and part in e.value.text
    write_yaml(file, keys | {"eval_data_path": "x"})
    with pytest.raises(UserError, match=rf"c.yaml:\d+: eval_data_path: {folder} holds"):
        read()


def test_a_base_is_tuned_on_the_paths_of_finetuning_only(there):
    def read(*words):
        return finetune.read(["base", *words])

    words = ["--finetuning_paths", "sft.json", "--finetuning_eval_paths", "sft.json"]
    cfg, _, notes, _ = read("--training_mode", "finetuning_only", *words)
    assert cfg.prepare["sources"] == ["sft.json"] and cfg.prepare["val_sources"] == ["sft.json"]
    assert "finetuning_paths -> prepare.sources ['sft.json']" in notes
    assert read("--finetuning_paths", "data/train_1.jsonl")[0].data["sources"]
    assert read("--data", "sft.json", "--use_lora", "false")[0].lora.r == 0
    with pytest.raises(UserError, match="train.py's; finetune.py trains a BASE on conversations"):
        read("--training_mode", "hybrid_sequential", *words)
    taught = [note for note in read("--data", "sft.json")[2] if "template" in note]
    fix = "it learns this one, or that of --template NAME"
    assert taught == [f"template chatml: base was taught no chat template; {fix}"]
    # without a base: as train_data is, and the way to one is said
    cfg, _, notes, _ = read_config(["debug", "--finetuning_paths", "sft.json"])
    assert cfg.prepare == read_config(["debug", "--train-data", "sft.json"])[0].prepare
    assert "from scratch; for a model that there is: python finetune.py BASE --data FILE" in notes


# ---------------------------------------------------------------- every row of the table

PARSERS = {
    "prepare_data.py": prepare_data.arguments(),
    "evaluate.py": evaluate.parser(),
    "export.py quantize": Words(prog="export.py quantize"),
    "sample.py": sample.arguments(),
    "serve.py": serve.arguments(),
}
quantise_names.options(PARSERS["export.py quantize"])
ROWS = [(command, name) for command in PARSERS for name in aliases.table(command)]


@pytest.mark.parametrize("name", aliases.table())
def test_a_note_names_both_keys(name):
    row = aliases.table()[name]
    if "to" not in row:
        assert row.keys() & {"ignore", "refuse", "section", "expands", "values"}
        return
    tree, switch = {name: 0.25}, row.get("with")
    done = aliases.rename(tree | ({switch: True} if switch else {}), own_keys(), str)
    assert any(note.startswith(name) and f"-> {row['to']} " in note for note in done.notes)


@pytest.mark.parametrize(("command", "name"), ROWS)
def test_an_option_leads_to_one_of_the_command_or_to_a_reason(command, name):
    row, parser = aliases.table(command)[name], PARSERS[command]
    targets = [row["to"]] if "to" in row else list(row.get("sets", {}))
    for target in targets:
        assert target in option_names.FIRST or f"--{target}" in parser.names()
    words = [f"--{name}"] if "flag" in row else [f"--{name}", "0.25" if "range" in row else "5"]
    if row.keys() & {"pairs", "adds", "skips"} or f"--{name}" in parser.names():
        return  # see test_evaluate_names.py; an option of ours, of which some values have other names
    try:
        _, notes = option_names.translate(command, words, parser.names())
    except UserError as error:
        assert error.code == "E002" and error.text.endswith(row["refuse"])
        return
    assert notes and all(note.startswith(name) for note in notes)
    assert all("has no effect: " in note or " -> " in note for note in notes)


def test_options_of_chats_and_servers():
    found = sample.parse(
        "--resume out/a --max-tokens 5 --system-prompt x --mode interactive".split()
    )
    assert (found.run, found.max_new_tokens, found.system, found.chat) == ("out/a", 5, "x", True)
    found = sample.parse("out/a --test_prompts a b --prompt c --dtype float16".split())
    assert (found.prompt, found.precision) == (["c", "a", "b"], "fp16")
    said = []
    words = "--mode api --model_path out/a --temperature 0.7 --max_num_seqs 4"
    found = option_names.parse(serve.arguments(), words.split(), said.append)
    assert (found.run, found.slots) == ("out/a", 4) and len(said) == 4
    for module, mode, part in ((sample, "api", "serve.py RUN"), (serve, "interactive", "--chat")):
        with pytest.raises(UserError, match=part):
            option_names.parse(module.arguments(), ["a", "--mode", mode], said.append)


def test_a_small_preset_keeps_its_tokenizer_with_other_text(tmp_path):
    (tmp_path / "my.txt").write_text("words")
    text = ["--train-data", str(tmp_path / "my.txt")]
    assert read_config(["debug", *text])[0].prepare["tokenizer"] == "bpe:512"
    assert "tokenizer" not in read_config(["gpt2_124m", *text])[0].prepare
    typed = read_config(["debug", *text, "--tokenizer", "bytes"])[0]
    assert typed.prepare["tokenizer"] == "bytes"


# ---------------------------------------------------------------- nanoGPT's

NANOGPT = """eval_interval: 250
eval_iters: 200
log_interval: 10
always_save_checkpoint: false
wandb_log: false
wandb_project: shakespeare-char
gradient_accumulation_steps: 1
batch_size: 64
block_size: 256
n_layer: 6
n_head: 6
n_embd: 384
dropout: 0.2
learning_rate: 1e-3
max_iters: 5000
lr_decay_iters: 5000
min_lr: 1e-4
beta2: 0.99
warmup_iters: 100
device: cpu
compile: false
decay_lr: true
init_from: scratch
dtype: float16
bias: false
weight_decay: 0.1
grad_clip: 1.0
"""


def test_nanogpts_own_keys_need_nothing_but_data(tmp_path):
    file = tmp_path / "train_shakespeare_char.yaml"
    file.write_text(f"{NANOGPT}data_dir: data/mine\n")
    cfg, _, notes, _ = read_config([str(file)])
    assert (cfg.max_steps, cfg.warmup_steps, cfg.model.d_model) == (5000, 100, 384)
    assert cfg.wandb_project is None
    said = "\n".join(notes)
    assert "eval_iters has no effect: eval_tokens says" in said
    assert "lr_decay_iters has no effect: every schedule ends at max_steps" in said
    assert "wandb_log false -> wandb_project null, wandb_project shakespeare-char gives way" in said


def test_what_cannot_be_taken_of_nanogpt_says_what_is_written_instead(tmp_path):
    """The data in one answer, with the command that makes them."""
    file = tmp_path / "n.yaml"
    file.write_text(f"{NANOGPT}dataset: shakespeare_char\n")
    with pytest.raises(UserError) as caught:
        read_config([str(file)])
    command = "python prepare_data.py FILES --out data/shakespeare_char --tokenizer bpe:8192"
    assert command in caught.value.text and "data_dir: data/shakespeare_char" in caught.value.text
    assert len(caught.value.text.splitlines()) == 1
    longer = NANOGPT.replace("lr_decay_iters: 5000", "lr_decay_iters: 600000")
    file.write_text(f"{longer}data_dir: data/mine\n")
    with pytest.raises(
        UserError, match="lr_decay_iters: 600000: every schedule ends at max_steps;"
    ):
        read_config([str(file)])
