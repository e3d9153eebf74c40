"""The knobs of a run: a YAML file and the command line -> `Config`, checked before anything starts.

Every knob is one line of a dataclass with its unit and meaning, and RANGES says what it may be:
`python train.py --help` prints both. Names of other trainers stand in configs/aliases.yaml.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
import typing
from dataclasses import dataclass, field

import yaml

from lumen import aliases, mixture, modes, prepare_key
from lumen.aliases import rename
from lumen.errors import UserError, expand, nearest
from lumen.model_keys import model_from_keys
from lumen.values import PATHS, allowed, check_text, convert, in_words, inside, short
from model import ModelConfig

# ---------------------------------------------------------------- the knobs


@dataclass(frozen=True)
class OrchestratorConfig:
    mode: str = "act"  # shadow: decides, writes down, does nothing; replay: repeats the file below
    intervention_threshold: float = 0.75  # confidence from which it acts
    check_interval: int = 100  # steps between slow health checks; the guards look at every step
    enable_emergency_recovery: bool = True  # roll back, and stop a run that cannot be saved
    enable_architecture_adaptation: bool = False  # re-seed dead experts by itself
    snapshot_interval: int = 50  # steps between copies in memory to roll back to; 0: none
    replay: str | None = None  # with mode replay: decisions.jsonl of the run to repeat


@dataclass(frozen=True)
class LoraConfig:
    r: int = 0  # rank of the adapters; 0: none, all weights are trained
    alpha: float = 32.0  # adapters add alpha / r times B A
    rslora: bool = False  # alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023)
    dropout: float = 0.0  # on what goes into an adapter; experts have none
    targets: list | None = None  # parts of names (wqkv, w13 ...); null: all matrices and experts


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 0  # steps between evaluations on tasks, the last step is one; 0: none
    tasks: list | str | None = None  # names, name:path or paths, as evaluate.py --tasks has them
    data: str | None = None  # folder in which tasks are looked for by name
    limit: int | None = 200  # questions of each task, drawn by a fixed seed; null: all
    shots: int | None = None  # examples before each question; null: the task's own


@dataclass(frozen=True)
class Config:
    # data
    data_dir: str | None = None  # folder made by prepare_data.py, or of bare .npy shards
    data: dict | None = None  # {sources: {NAME: {dir, weight}}, phases: [{until, weights}]} ...
    # ... of a source: buckets, difficulty; of a phase: name, epochs, tokens, lr_scale, warmup_steps
    prepare: dict | None = None  # makes data_dir: {sources: [...], tokenizer, out, and options}
    document_mask: bool | None = None  # no document sees another; null: in conversations only
    val_fraction: float = 0.005  # held out where bare shards have no val_*; 0: no evaluation
    allow_data_change: bool = False  # resume although the data is not what was trained on
    allow_tokenizer_change: bool = False  # take weights that were trained with another tokenizer
    # length and batch
    max_steps: int | None = None  # optimizer steps; null: one pass over the data
    num_epochs: float | None = None  # passes over the data, instead of max_steps
    tokens_per_parameter: float | None = None  # length by the active model (20: Chinchilla) ...
    # ... in at most num_epochs passes, 50 where that is null; the optimum is flat from 10 to 40
    batch_size: int | str = 16  # sequences per process and micro-step; auto: as many as fit ...
    # ... of batch_tokens; without that, of a step that the rule of docs/recipe.md finds
    gradient_accumulation_steps: int = 1  # micro-steps per step
    batch_tokens: int | None = None  # tokens per step over all processes; accumulation follows
    target_memory: float = 0.92  # share of the memory that batch_size: auto may plan with
    # optimizer and schedule
    learning_rate: float | str = "auto"  # the peak, absolute; auto: by model and batch, is said
    min_lr: float | None = None  # where the decay ends; null: a tenth of learning_rate
    lr_schedule: str = "cosine"  # after the warm-up; onecycle: up to 30 %, from a 25th
    decay_frac: float = 0.2  # wsd: the last part of max_steps, which decays linearly
    warmup_steps: float | None = None  # below 1: a share of max_steps; null: 10 %, at most 2000
    optimizer: str = "adamw"  # muon: on hidden matrices and experts, AdamW on the rest
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of squares
    eps: float = 1e-8  # added to the root of the mean of squares
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    z_loss: float = 0.0  # weight of logsumexp(logits)^2, keeps logits small; 1e-4 is usual
    router_lr_factor: float = 1.0  # routers of MoE and MoD learn at this times the learning rate
    embedding_lr_factor: float = 1.0  # the embedding likewise, with a tied head the head too
    head_lr_factor: float = 1.0  # the head likewise, where it is not tied
    matrix_lr_factor: float = 1.0  # muon: hidden matrices and experts likewise
    momentum: float = 0.95  # muon: of the gradient, from 0.85 over the first 300 steps
    # evaluation, saving, logging
    eval_interval: int = 0  # steps; 0: at checkpoints. The last step always evaluates and saves
    eval_tokens: int = 524288  # size of the fixed validation set, at most what there is
    early_stopping_patience: int = 0  # stop after so many evaluations without a best; 0: never
    enable_early_stopping: bool = False  # stop, or begin wsd's decay, where the forecast says so
    save_interval: int = 1000  # steps; 0: only the last
    save_async: bool = False  # write checkpoints beside training, which only waits for a copy
    save_total_limit: int = 3  # newest checkpoints kept, besides best and milestones; 0: all
    keep_every: int = 0  # milestones, in steps, are never deleted; 0: none
    backup_dir: str | None = None  # a folder on another disk: verified copies of checkpoints
    backup_interval_hours: float = 6.0  # between two copies; the newest two are kept
    log_interval: int = 20  # steps
    expert_log_interval: int = 0  # of MoE's and MoD's statistics; 0: log_interval, or a multiple
    wandb_project: str | None = None  # log to Weights & Biases, offline without key or network
    wandb_entity: str | None = None  # team or user
    wandb_run_name: str | None = None  # null: the name of out_dir
    tensorboard: bool = False  # write out_dir/tensorboard (pip install tensorboard)
    sample_prompt: str | None = None  # print a continuation of this at the end of the run
    # fine-tuning, by finetune.py only
    method: str = "sft"  # replies; or preferences between two: see docs/fine-tuning.md
    beta: float | None = None  # of preferences, its pull to the reference; null: the method's own
    gamma: float | None = None  # simpo: by how much the better reply should win; null: beta / 2
    label_smoothing: float | None = None  # dpo, cdpo: share of pairs that are the wrong way round
    sft_coef: float = 0.0  # of preferences: weight of the chosen reply's cross-entropy beside them
    quantize_base: str | None = None  # how frozen matrices are held under lora; null: as they are
    freeze: list | None = None  # roles not to train: router, embedding, head, norm, expert, matrix
    init_optimizer: bool = False  # begin with the moments of init_from's optimizer, not with zeros
    # machine
    seed: int = 1337  # of weights, order of data, dropout
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: str = "auto"  # of computing; master weights and moments are fp32 in all
    compile_model: bool | str = "auto"  # auto: on for CUDA, on CPU for runs over ten minutes
    deterministic: bool | str = "auto"  # equal bits run to run; auto: on CPU, not on CUDA (slower)
    attention: str = "auto"  # the fastest that passes its check; in brief CPU runs sdpa (torch)
    expert_backend: str = "auto"  # auto: the fastest that passes its check here
    activation_checkpointing: str = "none"  # recompute: selective: all but matmuls; block: all
    # several processes
    comm_timeout: int = 600  # seconds without a word from a rank until it counts as lost
    # several processes, under train_fsdp.py only
    zero_stage: int = 3  # 3: shard weights; 2: gather them once a step; 1: gradients too; 0: copies
    hsdp_shard_size: int = 0  # ranks that share one copy of the weights, say of a machine; 0: all
    expert_parallel: int = 1  # ranks that share the experts of a layer; tokens travel to them
    reduce_dtype: str = "fp32"  # in which gradients are summed over ranks; bf16 sends half
    # where
    out_dir: str | None = None  # null: out/NAME-of-the-yaml
    resume: str = "auto"  # auto: newest step in out_dir; none: anew; a run or step folder: from it
    init_from: str | None = None  # start from the weights of a run, a step or a Hugging Face folder
    overwrite: bool = False  # with resume none: delete the run that out_dir holds
    lora: LoraConfig = field(default_factory=LoraConfig)  # adapters, by finetune.py; keys: below
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)  # tasks; its keys: below
    orchestrator: OrchestratorConfig = field(default_factory=OrchestratorConfig)  # its keys: below
    model: ModelConfig = field(default_factory=ModelConfig)  # the model's keys: below


# keys that hold keys
BLOCKS = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "evaluate": EvaluateConfig,
    "orchestrator": OrchestratorConfig,
}
KINDS = {cls: typing.get_type_hints(cls) for cls in (Config, *BLOCKS.values())}

# What a knob may be: an interval, a comparison, or one of some words, `cuda:N` with a number. null
# is allowed where the knob's type says so. The limits above only keep sizes within 64 bits.
RANGES = {
    "val_fraction": "[0, 1)",
    "max_steps": "[0, 1e12]",
    "num_epochs": "[0, 1e6]",
    "tokens_per_parameter": "(0, 1e9]",
    "batch_size": "[1, 16777216] | auto",
    "gradient_accumulation_steps": "[1, 16777216]",
    "batch_tokens": "[1, 1e12]",
    "target_memory": "(0, 1]",
    "learning_rate": ">= 0 | auto",
    "min_lr": ">= 0",
    "lr_schedule": "cosine | linear | wsd | constant | onecycle",
    "decay_frac": "(0, 1]",
    "warmup_steps": ">= 0",
    "optimizer": "adamw | muon",
    "beta1": "[0, 1)",
    "beta2": "[0, 1)",
    "eps": "> 0",
    "weight_decay": ">= 0",
    "grad_clip": ">= 0",
    "z_loss": ">= 0",
    "router_lr_factor": ">= 0",
    "embedding_lr_factor": ">= 0",
    "head_lr_factor": ">= 0",
    "matrix_lr_factor": ">= 0",
    "momentum": "[0, 1)",
    "eval_interval": ">= 0",
    "eval_tokens": ">= 1",
    "early_stopping_patience": ">= 0",
    "save_interval": ">= 0",
    "save_total_limit": ">= 0",
    "keep_every": ">= 0",
    "backup_interval_hours": ">= 0",
    "log_interval": ">= 1",
    "expert_log_interval": ">= 0",
    "method": "sft | dpo | cdpo | ipo | hinge | simpo | orpo",
    "beta": "> 0",
    "gamma": ">= 0",
    "label_smoothing": "[0, 0.5)",
    "sft_coef": ">= 0",
    "quantize_base": "int8 | nf4",
    "seed": ">= 0",
    "device": "auto | cuda | cuda:N | mps | cpu",
    "precision": "auto | fp32 | mixed_bf16 | mixed_fp16 | bf16 | fp16 | fp8_e4m3 | fp8_e4m3_rowwise"
    " | fp8_e4m3_emulated | fp8_e4m3_rowwise_emulated",
    "compile_model": "auto | true | false",
    "deterministic": "auto | true | false",
    "attention": "auto | sdpa | blocks | cudnn | flash_sdpa | efficient | flash | varlen",
    "expert_backend": "auto | slices | grouped_mm | triton",
    "activation_checkpointing": "none | selective | block",
    "comm_timeout": "[1, 1e8]",
    "zero_stage": "[0, 3]",
    "hsdp_shard_size": ">= 0",
    "expert_parallel": ">= 1",
    "reduce_dtype": "fp32 | bf16",
    "lora.r": ">= 0",
    "lora.alpha": "> 0",
    "lora.dropout": "[0, 1)",
    "evaluate.every": ">= 0",
    "evaluate.limit": ">= 1",
    "evaluate.shots": ">= 0",
    "orchestrator.mode": "act | shadow | off | replay",
    "orchestrator.intervention_threshold": "[0.5, 0.99]",
    "orchestrator.check_interval": ">= 1",
    "orchestrator.snapshot_interval": ">= 0",
}
# What stands inside a value: a type, [what each item is], {key: what it is}; "*" is any name.
INSIDE = {
    "data": mixture.KEYS,
    "prepare": {
        "sources": [str],
        "val_sources": [str],
        "tokenizer": str,
        "out": str,
        # options of prepare_data.py; --help there
        "val_fraction": float,
        "max_bad": float,
        "field": str,
        "preset": str,
        "rules": [str],
        "language": [str],
        "ftfy": bool,
        "pii": str,
        "min_chars": int,
        "max_chars": int,
        "quality_threshold": float,
        "minhash": (bool, {"ngram": int, "bands": int, "rows": int}),
        "decontaminate": [str],
        "seq_len": int,
        "template": (str, {"*": str}),
        "loss_on": str,
        "too_long": str,
    },
    "freeze": [str],
    "lora.targets": [str],
    "evaluate.tasks": [str],
    "model.extras": [str],
    "model.moe_layers": [int],
    "model.mod_layers": [int],
    "model.mod_capacity": [float],
    "model.rope_scaling": {
        "type": str,
        "rope_type": str,
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "attention_factor": float,
        "beta_fast": float,
        "beta_slow": float,
        "rope_theta": float,
        "mscale": float,
        "mscale_all_dim": float,
        "original_max_position_embeddings": int,
        "truncate": bool,
    },
}
FINE_TUNING = ("method", "beta", "gamma", "label_smoothing", "sft_coef", "quantize_base", "freeze")
FINE_TUNING += ("init_optimizer", "lora")  # of finetune.py
FLAGS = ("dry_run", "print_config", "help")  # of the command line only
SIMULATED = {  # with --dry_run, what it simulates: (type, meaning)
    "world_size": (int, "processes, one a GPU; default: 1"),
    "hardware": (str, "h100, b200, a100-80gb, rtx4090 ..., cpu or measured; several: h100"),
    "peak_flops": (float, "FLOP/s of matmuls, instead of the hardware's"),
    "memory_gb": (float, "GB of a GPU, likewise"),
    "link_gb_s": (float, "GB/s to the GPUs of one machine, one way, likewise"),
    "network_gb_s": (float, "GB/s to other machines, one way and GPU, likewise"),
    "gpus_per_node": (int, "GPUs in a machine, likewise"),
    "mfu": (float, "share of the peak while computing; default: measured here, or assumed"),
    "imbalance": (float, "rows of expert_parallel's busiest rank, in fair shares; default: 1.25"),
    "disk_gb_s": (float, "GB/s that a machine writes of a checkpoint; default: 2"),
}
SHARDING = ("zero_stage", "hsdp_shard_size", "expert_parallel", "reduce_dtype")  # of train_fsdp.py
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


# ---------------------------------------------------------------- checks


@functools.cache
def own_keys() -> dict[str, object]:
    """Every key of ours with its type: {"learning_rate": float, "model.d_model": int}."""
    found = {name: kind for name, kind in KINDS[Config].items() if name not in BLOCKS}
    for block, cls in BLOCKS.items():
        found |= {f"{block}.{name}": kind for name, kind in KINDS[cls].items()}
    return found


def open_blocks(tree: dict, where) -> None:
    """Every block of keys is there, and is a mapping. E002."""
    for block in BLOCKS:
        if tree.get(block) is None:
            tree[block] = {}
        if not isinstance(tree[block], dict):
            text = f"{block}: a mapping of keys is expected, not {short(tree[block])}"
            raise UserError("E002", f"{where(block)}: {text}")


def build_config(tree: dict, where, notes: list[str], wrong: list[str] | None = None) -> Config:
    """The written keys -> Config, all of it checked.

    `where(key)` names file and line. What is written is left in `tree` as it was understood: under
    our names, "3e-4" as 0.0003. `wrong`: what was refused before, said together with the rest.
    """
    open_blocks(tree, where)
    lunaris_rope(tree["model"], where, notes)
    renamed = rename(tree, own_keys(), where)
    notes += renamed.notes
    refuse_unknown(tree, where, [*(wrong or []), *renamed.wrong])
    modes.expand_modes(tree, where, notes)

    def place(key: str) -> str:
        top = re.match(rf"(({'|'.join(BLOCKS)})\.)?\w*", key)[0]
        return where(renamed.moved.get(top, key))

    convert_keys(tree, place)
    names = getattr(where, "names", {}) | renamed.moved
    prepare_key.settle(tree, place, names, notes)
    check_evaluate(tree["evaluate"], place)
    drop_one_epoch(tree, place, notes)
    experts = tree["model"]
    if experts.get("n_experts") and "n_experts_per_token" not in experts:
        notes.append("model.n_experts_per_token is not given: 2 here (Lunaris Codex: 1)")
    if tree.get("data"):
        tree["data"] = mixture.with_curriculum(tree["data"], place, notes)
    values = expand_paths(prepare_key.with_prepare(tree, place), place)
    if values.get("data_dir") and not values.get("prepare"):
        several = mixture.of_folder(values["data_dir"], notes)
        if several and values.get("data") is None:
            values |= {"data": several, "data_dir": None}
    model = build_model(values.pop("model"), place)
    for block in ("lora", "evaluate", "orchestrator"):
        values[block] = BLOCKS[block](**values[block])
    cfg = Config(**values, model=model)
    check_ranges(cfg, place)
    check_together(cfg, place)
    return cfg


def check_written(tree: dict, where, wrong: list[str]) -> None:
    """E002 for what no base and no data can make right: unknown keys, values of another kind, and
    `wrong`. `tree` stays as it is."""
    tree = copy.deepcopy(tree)
    lunaris_rope(tree["model"], where, [])
    renamed = rename(tree, own_keys(), where)
    refuse_unknown(tree, where, [*wrong, *renamed.wrong])
    for key in modes.KEYS:  # they become others, of their own checks
        tree.pop(key, None)
    convert_keys(tree, lambda key: where(renamed.moved.get(key, key)))


def refuse_unknown(tree: dict, where, wrong: list[str]) -> None:
    """E002 with all keys that nobody knows, and `wrong`, in one message."""
    known = {*own_keys(), *BLOCKS, *modes.KEYS}
    names = [*tree, *(f"{block}.{name}" for block in BLOCKS for name in tree[block])]
    unknown = [str(name) for name in names if name not in known]
    told = [f"{where(key)}: unknown key {short(key)[1:-1]}; {meant(key)}" for key in unknown]
    told = [*told, *wrong]
    if len(told) == 1:
        raise UserError("E002", told[0])
    if told:
        what = f"{len(told)} keys cannot be taken" if wrong else f"{len(told)} unknown keys"
        raise UserError("E002", "\n  ".join([what, *told]))


def meant(key: str) -> str:
    """What somebody who wrote this unknown key may have wanted."""
    block, _, name = key.rpartition(".")
    homes: dict[str, list[str]] = {}  # bare name: where it stands
    for full in [*own_keys(), *(f"--{flag}" for flag in (*FLAGS, *SIMULATED))]:
        homes.setdefault(full.lstrip("-").rpartition(".")[2], []).append(full)
    if name in homes:
        home = homes[name][0]
        there = home.rpartition(".")[0]
        if home.startswith("--"):
            return f"it belongs on the command line: {home}"
        if there:
            return f"it belongs under {there}:"
        return f"it belongs at the top level, not under {block}:"
    if near := nearest(name, homes):
        same_block = [full for full in homes[near] if full.rpartition(".")[0] == block]
        return f"did you mean {(same_block or homes[near])[0]}?"
    if near := nearest(name, aliases.table()):
        ours = aliases.table()[near].get("to")
        return f"did you mean {near}, {ours} here?" if ours else f"did you mean {near}?"
    return "python train.py --help lists all"


def convert_keys(tree: dict, place) -> None:
    """Every value as the type of its key, in place; texts and what stands inside them checked."""
    for keys, prefix, cls in [
        (tree, "", Config),
        *((tree[block], f"{block}.", cls) for block, cls in BLOCKS.items()),
    ]:
        for name in [name for name in keys if name not in BLOCKS]:
            key = prefix + name
            value = convert(keys[name], KINDS[cls][name], f"{place(key)}: {key}")
            if isinstance(value, (dict, list)):
                value = inside(value, INSIDE[key], place, key)
            if isinstance(value, str):
                check_text(value, key, place(key))
            keys[name] = value


def check_evaluate(keys: dict, place) -> None:
    """`evaluate`, in place: tasks become a list. E002 where it says when and not what, or what and
    not when; `every: 0` beside tasks leaves them out."""
    if isinstance(keys.get("tasks"), str):
        keys["tasks"] = [name.strip() for name in keys["tasks"].split(",") if name.strip()]
    if keys.get("tasks") and keys.get("every") is None:
        refuse(place, "evaluate.tasks", "needs evaluate.every, the steps between two evaluations")
    if keys.get("every") and not keys.get("tasks"):
        text = "needs evaluate.tasks, what is asked: docstrings, boolq:DIR, my.jsonl"
        refuse(place, "evaluate.every", text)


def drop_one_epoch(tree: dict, place, notes: list[str]) -> None:
    """Lunaris Codex writes num_epochs: 1 beside max_steps; any other number contradicts it."""
    if tree.get("max_steps") is None or tree.get("num_epochs") is None:
        return
    if tree["num_epochs"] != 1:
        text = "num_epochs and max_steps both set the length; drop one (on the command line: "
        raise UserError("E002", f"{place('num_epochs')}: {text}--max_steps null)")
    tree.pop("num_epochs")
    notes.append("num_epochs: 1 is ignored, max_steps sets the length")


def lunaris_rope(model: dict, where, notes: list[str]) -> None:
    """Lunaris Codex' rope_ntk_scale_base is a length: beyond it the base of the rotation grows."""

    def number(key: str, default: float) -> float:
        value = model.get(key)
        if value is None:
            return default
        return convert(value, float, f"{where(f'model.{key}')}: model.{key}")

    base = number("rope_ntk_scale_base", 0)
    model.pop("rope_ntk_scale_base", None)
    length = number("max_seq_len", ModelConfig.max_seq_len) if base else 0
    if length > base > 0:
        theta = number("rope_theta", ModelConfig.rope_theta) * length / base
        model["rope_theta"] = theta
        notes.append(f"model.rope_ntk_scale_base {base:g} is applied: rope_theta {theta:g}")


def expand_paths(values: dict, place) -> dict:
    """~ and $NAME in every value that is a path, or may be one."""

    def expanded(value, key: str):
        if isinstance(value, str):
            return expand(value, f"{place(key)}: {key}") if PATHS.fullmatch(key) else value
        if isinstance(value, list):
            return [expanded(item, key) for item in value]
        if isinstance(value, dict):
            return {name: expanded(v, f"{key}.{name}".lstrip(".")) for name, v in value.items()}
        return value

    return expanded(values, "")


def build_model(keys: dict, place) -> ModelConfig:
    """The model's keys -> ModelConfig; its ValueError names the key, here with its place."""
    try:
        return model_from_keys(keys)
    except ValueError as error:
        key = str(error).partition(":")[0]
        where = f"{place(key)}: " if key.removeprefix("model.") in keys else ""
        raise UserError("E002", f"{where}{error}") from error


def refuse(place, key: str, text: str):
    raise UserError("E002", f"{place(key)}: {key}: {text}")


def check_ranges(cfg: Config, place) -> None:
    """Every knob is what RANGES says. E002."""
    for key, text in RANGES.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        if value is not None and not allowed(value, text):
            refuse(place, key, f"{short(value)} must be {in_words(text)}")


def check_together(cfg: Config, place) -> None:
    """Knobs that contradict one another. E002."""
    o = cfg.orchestrator
    if (o.mode == "replay") != bool(o.replay):
        text = "mode: replay and replay: FILE (decisions.jsonl of a run) go together"
        refuse(place, "orchestrator.replay", text)
    if cfg.tokens_per_parameter is not None and cfg.max_steps is not None:
        refuse(place, "tokens_per_parameter", "sets the length, and so does max_steps; drop one")
    if cfg.expert_log_interval % cfg.log_interval:
        text = f"{cfg.expert_log_interval} is not a multiple of log_interval {cfg.log_interval}"
        refuse(place, "expert_log_interval", text)
    if cfg.data_dir and cfg.data is not None:
        refuse(place, "data", "data_dir and data both name the data; drop one")
    if not cfg.data_dir and cfg.data is None:
        raise UserError("E002", "no data: set data_dir (a folder of shards), data, or prepare")
    if cfg.data is not None:
        mixture.check_data(cfg.data, place)
    wandb_mode = os.environ.get("WANDB_MODE", "online")
    if cfg.wandb_project and wandb_mode not in WANDB_MODES:
        text = f"WANDB_MODE={wandb_mode!r} in the environment is not one of "
        refuse(place, "wandb_project", f"{text}{', '.join(WANDB_MODES)}; unset it")


def check_command(cfg: Config, fine_tunes: bool) -> None:
    """E002 where train.py is asked for what finetune.py does: it would train something else."""
    plain = {field.name: field.default for field in dataclasses.fields(cfg)} | {
        "lora": LoraConfig()
    }
    asked = [key for key in FINE_TUNING if getattr(cfg, key) != plain[key]]
    if asked and not fine_tunes:
        text = "train.py trains all weights on the next token"
        raise UserError("E002", f"{', '.join(asked)}: for finetune.py; {text}")


# ---------------------------------------------------------------- printing


def printed(cfg: Config, sharded: bool, notes: list[str] = ()) -> str:
    """YAML that runs as it is; its comments say what only a start decides, and what was noted."""
    tree = dataclasses.asdict(cfg)
    later = [f"{key}: auto" for key, v in tree.items() if v == "auto" and key != "resume"]
    for key in ("max_steps", "min_lr", "warmup_steps"):
        if tree[key] is None:
            later.append(f"{key}: null")
    if not cfg.model.vocab_size:
        later.append("model.vocab_size: 0")
    lines = list(notes)
    if later:
        where = "decided at the start of the run, see config.yaml in its out_dir"
        lines.append(f"{where}: {', '.join(later)}")
    if not sharded:
        effect = "without effect under train.py, for train_fsdp.py only"
        lines.append(f"{effect}: {', '.join(SHARDING)}")
    comments = "".join(f"# {line}\n" for line in "\n".join(lines).splitlines())
    return comments + yaml.safe_dump(tree, sort_keys=False)


def help_text(words: str = "train.py CONFIG") -> str:
    """Every key with its meaning, default and range, read from the dataclasses above."""
    rows = [f"usage: python {words} [--key value | --key=value | --model.key value ...]"]
    rows.append("       --dry_run: sizes, memory, time and length, no training")
    rows.append("       --print_config: what a run would use; --help")
    rows += help_rows(Config, "")
    for block, cls in BLOCKS.items():
        rows += [f"\n{block}", *help_rows(cls, f"{block}.")]
    rows.append("\nwith --dry_run: a simulation of")
    rows += [f"  --{name:<32} {text}" for name, (_, text) in SIMULATED.items()]
    return "\n".join(rows)


def help_rows(cls, prefix: str) -> list[str]:
    """The knobs of one dataclass. Its source is read, as a comment is its documentation."""
    rows = []
    for line in inspect.getsource(cls).splitlines():
        if knob := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)", line):
            name, default, meaning = knob.groups()
            if prefix + name in RANGES:
                meaning += f"; {in_words(RANGES[prefix + name])}"
            if not default.startswith("field("):
                default = default.replace("None", "null").strip('"')
                meaning += f" [{default.lower() if default in ('True', 'False') else default}]"
            rows.append(f"  --{prefix + name:<32} {meaning}")
        elif comment := re.match(r"    # (?!fmt:)(.+)", line):
            more = comment[1].startswith("... ")  # the knob above goes on
            rows.append(f"  {'':<34} {comment[1]}" if more else f"\n{comment[1]}")
    return rows
