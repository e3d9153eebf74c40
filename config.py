"""The knobs of a run: one YAML file and the command line -> `Config`, all of it checked before anything is allocated.

Every knob is one line of a dataclass, with its unit, meaning and range: `python train.py --help` prints these lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from errors import UserError, expand
from model import ModelConfig
from orchestrator import MODES, OrchestratorConfig


@dataclass
class Config:
    # data
    data_dir: str | None = None  # folder made by prepare_data.py, or of bare .npy shards
    data: dict | None = None  # several: {sources: {name: {dir, weight}}, phases: [{until: step or fraction, weights}]}
    prepare: dict | None = None  # made on first start: {sources: [...], val_sources, tokenizer: bpe:8192, out}
    val_fraction: float = 0.005  # tail of windows held out where bare shards have no val_*; 0: no evaluation
    allow_data_change: bool = False  # resume although the data is not what the checkpoint was trained on
    allow_tokenizer_change: bool = False  # take weights although the data has another tokenizer than theirs had
    # length and batch
    max_steps: int | None = None  # turns of the loop; null: one pass over the data
    num_epochs: float | None = None  # passes over the data, instead of max_steps
    auto_epoch_scaling: bool = False  # max_steps from the model: chinchilla_multiplier tokens an active parameter
    chinchilla_multiplier: float = 20.0  # tokens an active parameter; the optimum is flat from 10 to 40
    min_auto_epochs: float = 0.0  # auto_epoch_scaling passes over the data at least so often (LuminaAI: 1) ...
    max_auto_epochs: float = 50.0  # ... and at most so often
    batch_size: int | str = 16  # rows of max_seq_len tokens per process and micro-step; auto: as many as fit
    gradient_accumulation_steps: int = 1  # micro-steps per step
    batch_tokens: int | None = None  # tokens per step over all processes; accumulation follows from it
    target_memory: float = 0.92  # share of the memory that batch_size: auto may plan with
    # optimizer and schedule
    learning_rate: float = 3e-4  # the peak, absolute
    min_lr: float | None = None  # where the decay ends; null: a tenth of learning_rate
    lr_schedule: str = "cosine"  # cosine | linear | wsd | constant | onecycle (peak at 30 %, from a 25th of it)
    decay_frac: float = 0.2  # wsd: the last part of max_steps that decays linearly
    warmup_steps: float | None = None  # steps, or below 1 a fraction of max_steps; null: min(2000, max_steps / 20)
    optimizer: str = "adamw"  # adamw
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of squares
    eps: float = 1e-8  # added to the root of the mean of squares
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    z_loss: float = 0.0  # weight of logsumexp(logits)^2, keeps logits small; 1e-4 is usual
    router_lr_factor: float = 1.0  # routers of MoE and MoD learn at this times the learning rate
    # evaluation, saving, logging
    eval_interval: int = 0  # steps; 0: at checkpoints. The last step always evaluates and saves
    eval_tokens: int = 524288  # size of the fixed validation set, at most what there is
    early_stopping_patience: int = 0  # stop after so many evaluations without a new best; 0: never
    enable_early_stopping: bool = False  # stop, or begin wsd's decay, where that is justified; false: only say so
    enable_loss_landscape: bool = True  # forecast: phase, predicted final loss, every orchestrator.check_interval
    enable_compute_efficiency: bool = True  # in it: nats gained per doubling of compute
    save_interval: int = 1000  # steps; 0: only the last
    save_async: bool = False  # write checkpoints beside training, which waits for a copy in memory only
    save_total_limit: int = 3  # newest checkpoints kept, besides the best and milestones; 0: all
    keep_every: int = 0  # milestones, in steps, are never deleted; 0: none
    log_interval: int = 20  # steps
    expert_log_interval: int = 0  # steps between the statistics of MoE and MoD, a multiple of log_interval; 0: that
    wandb_project: str | None = None  # set: log to Weights & Biases, offline without key or network
    wandb_entity: str | None = None  # team or user
    wandb_run_name: str | None = None  # null: the name of out_dir
    picture: bool = False  # draw out_dir/training.png at checkpoints, in a process of its own (pip install matplotlib)
    tensorboard: bool = False  # write out_dir/tensorboard (pip install tensorboard)
    sample_prompt: str | None = None  # print a continuation of this at the end of the run
    # machine
    seed: int = 1337  # of weights, order of data, dropout
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | fp32 | mixed_bf16 | mixed_fp16; master weights and moments are fp32 in all
    compile_model: bool | str = "auto"  # auto: on for CUDA, on CPU for runs over ten minutes
    deterministic: bool | str = "auto"  # equal bits run to run; auto: true on CPU, false on CUDA (slower there)
    attention: str = "auto"  # auto | sdpa | flash | flex; what does not work here falls back to sdpa
    expert_back_end: str = "auto"  # auto: the fastest that passes its check here | slices | grouped_mm | triton
    activation_checkpointing: str = "none"  # none | selective: recompute all but products | block (full): whole blocks
    # several processes
    comm_timeout: int = 600  # seconds without a word from a rank, after the first step, until it counts as lost
    # several processes, under train_fsdp.py only
    zero_stage: int = 3  # 3: weights in parts, gathered for use; 2: once a step; 1: and gradients summed once; 0: whole
    hsdp_shard_size: int = 0  # ranks that share one copy of the weights (of one machine, say); 0: all
    expert_parallel: int = 1  # ranks that share the experts of a layer among them; tokens travel to them
    cpu_offload: bool = False  # true is refused: not there, never measured
    reduce_dtype: str = "fp32"  # fp32 | bf16: in which gradients are summed over ranks; bf16 halves what is sent
    # where
    out_dir: str | None = None  # null: out/NAME-of-the-yaml
    resume: str = "auto"  # auto: the newest whole step in out_dir; none: anew; a run or step folder: from there
    init_from: str | None = None  # start from the weights of a run, a step folder, a Hugging Face folder (read by all)
    overwrite: bool = False  # with resume none: delete the run that out_dir holds
    use_adaptive_training: bool = True  # false: orchestrator.mode off
    orchestrator: OrchestratorConfig = field(default_factory=OrchestratorConfig)  # its keys, see below
    model: ModelConfig = field(default_factory=ModelConfig)  # the model's keys, see below


IGNORED = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "save_latest_always", "backend")
FLAGS = ("dry_run", "print_config", "help")  # of the command line only
SIMULATED = {  # with --dry_run: what it simulates. name: (type, meaning)
    "world_size": (int, "processes, one a GPU; default: 1"),
    "hardware": (str, "h100, h200, b200, a100-80gb, rtx4090 ... (plan.HARDWARE), cpu or measured; several: h100"),
    "peak_flops": (float, "FLOP/s of matrix products, instead of the hardware's"),
    "memory_gb": (float, "GB of a GPU, likewise"),
    "link_gb_s": (float, "GB/s to the GPUs of one machine, one way, likewise"),
    "network_gb_s": (float, "GB/s to other machines, one way and GPU, likewise"),
    "gpus_per_node": (int, "GPUs in a machine, likewise"),
    "mfu": (float, "share of the peak while computing; default: what others published"),
    "imbalance": (float, "rows of the busiest rank with expert_parallel, times the fair share; default: 1.25"),
    "disk_gb_s": (float, "GB/s that a machine writes of a checkpoint; default: 2"),
}
CHOICES = {
    "lr_schedule": ("cosine", "linear", "wsd", "constant", "onecycle"),
    "optimizer": ("adamw",),
    "activation_checkpointing": ("none", "block", "full", "selective"),
    "reduce_dtype": ("fp32", "bf16"),
    "expert_back_end": ("auto", "slices", "grouped_mm", "triton"),
}
AT_LEAST = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 0, "batch_tokens": 1, "eval_tokens": 1}
AT_LEAST |= dict.fromkeys(("eval_interval", "save_interval", "save_total_limit", "keep_every", "weight_decay"), 0)
AT_LEAST |= dict.fromkeys(("grad_clip", "z_loss", "warmup_steps", "min_lr", "num_epochs", "val_fraction", "seed"), 0)
AT_LEAST |= {
    "expert_log_interval": 0,
    "router_lr_factor": 0,
    "early_stopping_patience": 0,
    "log_interval": 1,
    "learning_rate": 0,
    "eps": 0,
    "beta1": 0,
    "beta2": 0,
}
AT_LEAST |= {"zero_stage": 0, "hsdp_shard_size": 0, "expert_parallel": 1, "comm_timeout": 1}
BELOW_ONE = ("beta1", "beta2", "val_fraction")
BLOCKS = {"model": ModelConfig, "orchestrator": OrchestratorConfig}  # keys that are mappings of keys


def convert(value, kind, where: str):
    """`value` as the annotated type `kind`; numbers in quotes count. UserError E002 says where it came from."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None or (value == "null" and str not in kinds):
        if type(None) in kinds:
            return None
    elif isinstance(value, bool):
        if bool in kinds:
            return value
        if str in kinds and value is False:
            return "none"  # YAML reads off and no as false: they mean none where a word is expected
    elif (dict in kinds and isinstance(value, dict)) or (list in kinds and isinstance(value, list)):
        return value
    else:
        if bool in kinds and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        for number in (int, float):
            if number in kinds:
                with contextlib.suppress(ValueError, TypeError, OverflowError):
                    as_float = float(str(value).replace("_", ""))
                    if number is float and math.isfinite(as_float):
                        return as_float
                    if number is int and as_float == int(as_float):
                        return int(value) if isinstance(value, int) else int(as_float)
        if str in kinds and isinstance(value, (str, int, float)):
            return str(value)
    names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise UserError("E002", f"{where}: {value!r} is not {names}")


def load_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    """A YAML file as a dict, and the line of each key ("model.d_model": 7). Keys given twice are refused."""
    text, lines = path.read_text(encoding="utf-8"), {}

    def walk(node, prefix=""):
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = f"{prefix}{key.value}"
            if name in lines:
                raise UserError("E002", f"{path}:{key.start_mark.line + 1}: {name} stands here for the second time")
            lines[name] = key.start_mark.line + 1
            walk(value, f"{name}.")

    try:
        walk(yaml.compose(text, yaml.SafeLoader))
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError("E002", f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError("E002", f"{path}: a mapping of keys is expected, this is a {type(tree).__name__}")
    return tree, lines


def read_config(argv: list[str]) -> tuple[Config, dict, list[str], dict]:
    """YAML file and command line -> (Config, the keys as written, notes for the user, flags of the command line)."""
    flags, path, tree, lines, notes, home, moved = {}, None, {}, {}, [], None, None
    words = list(argv)
    if words and not words[0].startswith("-"):
        path = find_yaml(words.pop(0))
        tree, lines = load_yaml(path)
        home, says = run_of(path), str(tree.get("out_dir"))
        if home and not same_place(expand(says), home):
            tree["out_dir"], moved = home, says
    for block in BLOCKS:
        if tree.get(block) is None:
            tree[block] = {}
        if not isinstance(tree[block], dict):
            raise UserError("E002", f"{path}:{lines[block]}: {block}: a mapping of keys is expected")
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError("E002", f"command line: {word!r}: options look like --key value or --key=value")
        key, has_value, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key in FLAGS:
            flags[key] = True
            continue
        if not has_value:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        if key in SIMULATED:
            flags[key] = convert(value, SIMULATED[key][0], f"command line: --{key}")
            if not isinstance(flags[key], str) and flags[key] <= 0:
                raise UserError("E002", f"command line: --{key}: {value} must be above 0")
            continue
        try:
            value = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            pass  # a text that is no YAML is that text
        block, _, name = key.partition(".")
        target, name = (tree[block], name) if name and block in BLOCKS else (tree, key)
        target[name] = value
        lines[key] = None
    typed = [key for key in ("prepare", "data_dir", "data") if lines.get(key, 0) is None]
    preset = path and path.resolve().parent == Path(__file__).resolve().parent / "configs"
    if preset and typed and lines.get("sample_prompt"):
        tree.pop("sample_prompt")  # it continues the preset's own text
        notes.append(f"the preset's sample_prompt goes with its own data, not with --{typed[0]}: no sample")
    if (extra := [k for k in flags if k in SIMULATED]) and not flags.get("dry_run"):
        raise UserError("E002", f"command line: --{extra[0]} goes with --dry_run only; torchrun sets the real number")
    if moved and tree["out_dir"] == home:
        notes.append(f"out_dir: {home}, where this config.yaml lies; it says {moved}: the run was moved or copied")
    elif home and not same_place(tree["out_dir"], home):
        notes.append(f"out_dir: {tree['out_dir']}, as typed; {path} is of the run in {home}")
    cfg = build_config(tree, lambda key: f"{path}:{lines[key]}" if lines.get(key) else "command line", notes)
    if cfg.out_dir is None:
        cfg.out_dir = f"out/{path.stem if path else 'run'}"
    return cfg, tree, notes, flags


def same_place(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def run_of(path: Path) -> str | None:
    """The run's folder that a configuration lies in: a run that was moved or copied is gone on with where it lies."""
    folder, names = path.parent, ("config.yaml", "resolved.yaml")
    if path.name in names and ((folder / "status.json").exists() or any(folder.glob("step_*/manifest.json"))):
        return str(folder)
    return None


def find_yaml(name: str) -> Path:
    """A path, or the name of a preset in configs/."""
    presets = {p.stem: p for p in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
    path = Path(expand(name))
    if path.is_file():
        return path
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(path.stem, presets, 1, 0.4)
    hint = f"; did you mean configs/{near[0]}.yaml?" if near else f"; presets: {', '.join(presets)}"
    raise UserError("E001", f"{name} does not exist{hint}")


def build_config(tree: dict, where, notes: list[str]) -> Config:
    """The written keys -> Config, all of it checked. `where(key)` names file and line."""
    for key in [k for k in IGNORED if k in tree]:
        tree.pop(key)
        notes.append(f"{key} has no effect in Lumen and is ignored")
    if tree.get("max_steps") is not None and tree.get("num_epochs") is not None:
        if float(tree["num_epochs"]) != 1:
            raise UserError("E002", f"{where('num_epochs')}: num_epochs and max_steps both set the length; drop one")
        tree.pop("num_epochs")
        notes.append("num_epochs: 1 is ignored, max_steps sets the length")
    lunaris_keys(tree["model"], where, notes)

    def build(cls, keys: dict, prefix: str):
        kinds = {k: v for k, v in typing.get_type_hints(cls).items() if k not in BLOCKS}
        for key in keys:
            if key not in kinds and key not in BLOCKS:
                near = difflib.get_close_matches(str(key), kinds, 1, 0.5)
                hint = f"did you mean {prefix}{near[0]}?" if near else "python train.py --help lists all"
                for block, other in (*BLOCKS.items(), ("", Config)):
                    if other is not cls and key in typing.get_type_hints(other):
                        there = f"under {block}:" if block else f"at the top level, not under {prefix[:-1]}:"
                        hint = f"it belongs {there}"
                raise UserError("E002", f"{where(prefix + str(key))}: unknown key {prefix}{key}; {hint}")
        values = {k: convert(v, kinds[k], f"{where(prefix + k)}: {prefix}{k}") for k, v in keys.items() if k in kinds}
        return cls(**values)

    try:
        model = build(ModelConfig, tree["model"], "model.")
    except ValueError as error:
        key = str(error).partition(":")[0]
        place = f"{where(key)}: " if key.removeprefix("model.") in tree["model"] else ""
        raise UserError("E002", f"{place}{error}") from error
    orchestrator = build(OrchestratorConfig, tree.get("orchestrator") or {}, "orchestrator.")
    cfg = dataclasses.replace(build(Config, tree, ""), model=model, orchestrator=orchestrator)

    def refuse(key, text):
        raise UserError("E002", f"{where(key)}: {key}: {text}")

    for key, choices in CHOICES.items():
        if getattr(cfg, key) not in choices:
            refuse(key, f"{getattr(cfg, key)!r} is not one of {', '.join(choices)}")
    if isinstance(cfg.batch_size, str) and (cfg.batch_size != "auto" or not cfg.batch_tokens):
        auto = cfg.batch_size == "auto"
        text = "needs batch_tokens, the size of the whole batch" if auto else "is not int or auto"
        refuse("batch_size", f"{cfg.batch_size!r} {text}")
    for key, low in AT_LEAST.items():
        value = getattr(cfg, key)
        if isinstance(value, (int, float)) and value < low:
            refuse(key, f"{value} must be at least {low}")
    for key in BELOW_ONE:
        if getattr(cfg, key) >= 1:
            refuse(key, f"{getattr(cfg, key)} must be below 1")
    if cfg.activation_checkpointing == "full":
        cfg.activation_checkpointing = "block"
    o = cfg.orchestrator
    o.mode = "off" if o.mode == "none" else o.mode  # YAML reads off as false
    if o.mode not in MODES:
        refuse("orchestrator.mode", f"{o.mode!r} is not one of {', '.join(MODES)}")
    if not cfg.use_adaptive_training:
        if o.mode in ("act", "replay") and "mode" in (tree.get("orchestrator") or {}):
            refuse("orchestrator.mode", f"{o.mode} does not go with use_adaptive_training: false; drop one")
        o.mode = "off" if o.mode == "act" else o.mode
    if not 0.5 <= o.intervention_threshold <= 0.99:
        refuse("orchestrator.intervention_threshold", f"{o.intervention_threshold} is not from 0.5 to 0.99")
    for key, low in (("check_interval", 1), ("snapshot_interval", 0)):
        if getattr(o, key) < low:
            refuse(f"orchestrator.{key}", f"{getattr(o, key)} must be at least {low}")
    if (o.mode == "replay") != bool(o.replay):
        refuse("orchestrator.replay", "mode: replay and replay: FILE (decisions.jsonl of a run) go together")
    if cfg.auto_epoch_scaling and (cfg.max_steps is not None or cfg.num_epochs is not None):
        refuse("auto_epoch_scaling", "sets the length, and so does max_steps or num_epochs; drop one")
    if not 0 <= cfg.min_auto_epochs <= cfg.max_auto_epochs or not cfg.max_auto_epochs or cfg.chinchilla_multiplier <= 0:
        refuse("min_auto_epochs", "0 <= min_auto_epochs <= max_auto_epochs and chinchilla_multiplier > 0 are expected")
    if cfg.cpu_offload:
        text = "true: not there, as its cost was never measured; more ranks at zero_stage: 3, expert_parallel and"
        refuse("cpu_offload", f"{text} activation_checkpointing: block need less memory each")
    if cfg.zero_stage > 3:
        refuse("zero_stage", f"{cfg.zero_stage} is not 0, 1, 2 or 3")
    if not 0 < cfg.target_memory <= 1:
        refuse("target_memory", f"{cfg.target_memory} is not in (0, 1]")
    if not 0 < cfg.decay_frac <= 1:
        refuse("decay_frac", f"{cfg.decay_frac} is not in (0, 1]")
    if cfg.data_dir and cfg.data:
        refuse("data", "data_dir and data both name the data; drop one")
    if cfg.prepare is not None:
        unknown = set(cfg.prepare) - {"sources", "val_sources", "tokenizer", "out"}
        if unknown or not cfg.prepare.get("sources"):
            refuse("prepare", f"needs sources: [...]; may have val_sources, tokenizer, out; unknown: {unknown or '-'}")
        out = cfg.prepare.setdefault("out", cfg.data_dir or f"data/{Path(str(cfg.prepare['sources'][0])).stem}")
        cfg.data_dir = cfg.data_dir or out
    if not (cfg.data_dir or cfg.data):
        raise UserError("E002", "no data: set data_dir (a folder of shards), data, or prepare")
    if cfg.data and not isinstance(cfg.data.get("sources"), dict):
        refuse("data", "{sources: {NAME: {dir: FOLDER, weight: 1.0}}} is expected")
    expand_paths(cfg, where)
    if cfg.expert_log_interval % cfg.log_interval:
        refuse("expert_log_interval", f"{cfg.expert_log_interval} is not a multiple of log_interval {cfg.log_interval}")
    return cfg


def expand_paths(cfg: Config, where) -> None:
    """~ and $NAME in every key that is a path, or may be one."""

    def expanded(value, key):
        if isinstance(value, list):
            return [expanded(v, key) for v in value]
        return expand(value, f"{where(key)}: {key}") if isinstance(value, str) else value

    for key in ("data_dir", "out_dir", "init_from", "resume"):
        setattr(cfg, key, expanded(getattr(cfg, key), key))
    cfg.orchestrator.replay = expanded(cfg.orchestrator.replay, "orchestrator.replay")
    if cfg.prepare is not None:
        cfg.prepare = {key: expanded(value, f"prepare.{key}") for key, value in cfg.prepare.items()}
    sources = dict((cfg.data or {}).get("sources") or {})
    for name, spec in sources.items():
        if isinstance(spec, dict) and "dir" in spec:
            sources[name] = spec | {"dir": expanded(spec["dir"], f"data.sources.{name}.dir")}
    if cfg.data:
        cfg.data = cfg.data | {"sources": sources}


def lunaris_keys(model: dict, where, notes: list[str]) -> None:
    """Keys of Lunaris Codex's `model:` block that have another name or no place here."""
    for old, new in (("use_qk_norm", "qk_norm"), ("resid_dropout", "dropout")):
        if model.get(old) is not None:
            model[new] = model[old]
            notes.append(f"model.{old} is model.{new} here")
        model.pop(old, None)
    if float(model.pop("attn_dropout", 0) or 0):
        raise UserError(
            "E002", f"{where('model.attn_dropout')}: dropout inside attention is not supported; use dropout"
        )
    base = float(model.pop("rope_ntk_scale_base", 0) or 0)
    if base and float(model.get("max_seq_len", 1024)) > base:
        theta = float(model.get("rope_theta", 10000.0)) * float(model.get("max_seq_len", 1024)) / base
        model["rope_theta"] = theta
        notes.append(f"model.rope_ntk_scale_base {base:g} is applied: rope_theta {theta:g}")
    if "n_experts" in model and not model["n_experts"]:
        model["n_experts"] = 0  # null is a dense model there
    if model.get("n_experts") and "n_experts_per_token" not in model:
        notes.append("model.n_experts_per_token is not given: 2 here (Lunaris Codex: 1)")


def help_text() -> str:
    """Every key with its default and meaning, read from the dataclasses above."""
    rows = []
    for cls, prefix in ((Config, ""), *((block, f"{name}.") for name, block in BLOCKS.items())):
        for line in inspect.getsource(cls).splitlines():
            if m := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)", line):
                rows.append(f"  --{prefix}{m[1]:<{32 - len(prefix)}} {m[3]} [{m[2]}]")
            elif m := re.match(r"    # (.+)", line):
                rows.append(f"\n{m[1]}")
        rows.append({Config: "\nmodel", ModelConfig: "\norchestrator"}.get(cls, ""))
    usage = "usage: python train.py CONFIG [--key value | --key=value | --model.key value ...]\n"
    rows += ["\nwith --dry_run: a simulation of"]
    rows += [f"  --{name:<32} {text}" for name, (_, text) in SIMULATED.items()]
    flags = "       --dry_run: sizes, memory, time and length, no training; --print_config; --help\n"
    return usage + flags + "\n".join(rows)
