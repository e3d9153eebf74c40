"""The knobs of a run: one YAML file and the command line -> `Config`, all of it checked before anything is allocated.

Every knob is one line of a dataclass, with its unit, meaning and range: `python train.py --help` prints these lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import reprlib
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lumen.errors import UserError, expand, nearest, no_path
from model import ModelConfig


@dataclass
class OrchestratorConfig:
    # fmt: off
    mode: str = "act"  # act | shadow (decides and writes down, does nothing) | off | replay (repeats the file below)
    intervention_threshold: float = 0.75  # confidence from which it acts, 0.5 to 0.99
    check_interval: int = 100  # steps between the slow health checks; the guards look at every step
    enable_emergency_recovery: bool = True  # roll back, and stop a run that cannot be saved
    enable_architecture_adaptation: bool = False  # re-seed dead experts by itself (adding and pruning are yours)
    snapshot_interval: int = 50  # steps between copies in memory to roll back to; 0: none, checkpoints only
    replay: str | None = None  # mode replay: decisions.jsonl of the run to repeat
    # fmt: on


CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MODES = ("act", "shadow", "off", "replay")


@dataclass
class Config:
    # fmt: off
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
    expert_backend: str = "auto"  # auto: the fastest that passes its check here | slices | grouped_mm | triton
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
    # fmt: on


SHARDING = (
    "zero_stage",
    "hsdp_shard_size",
    "expert_parallel",
    "reduce_dtype",
)  # of train_fsdp.py only
IGNORED = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "save_latest_always",
    "backend",
)
FLAGS = ("dry_run", "print_config", "help")  # of the command line only
SIMULATED = {  # with --dry_run: what it simulates. name: (type, meaning)
    "world_size": (int, "processes, one a GPU; default: 1"),
    "hardware": (
        str,
        "h100, h200, b200, a100-80gb, rtx4090 ... (plan.HARDWARE), cpu or measured; several: h100",
    ),
    "peak_flops": (float, "FLOP/s of matrix products, instead of the hardware's"),
    "memory_gb": (float, "GB of a GPU, likewise"),
    "link_gb_s": (float, "GB/s to the GPUs of one machine, one way, likewise"),
    "network_gb_s": (float, "GB/s to other machines, one way and GPU, likewise"),
    "gpus_per_node": (int, "GPUs in a machine, likewise"),
    "mfu": (float, "share of the peak while computing; default: what others published"),
    "imbalance": (
        float,
        "rows of the busiest rank with expert_parallel, times the fair share; default: 1.25",
    ),
    "disk_gb_s": (float, "GB/s that a machine writes of a checkpoint; default: 2"),
}
CHOICES = {
    "lr_schedule": ("cosine", "linear", "wsd", "constant", "onecycle"),
    "optimizer": ("adamw",),
    "precision": ("auto", "fp32", "mixed_bf16", "mixed_fp16", "bf16", "fp16"),
    "compile_model": ("auto", True, False),
    "deterministic": ("auto", True, False),
    "attention": ("auto", "sdpa", "flash", "flex"),
    "activation_checkpointing": ("none", "block", "full", "selective"),
    "reduce_dtype": ("fp32", "bf16"),
    "expert_backend": ("auto", "slices", "grouped_mm", "triton"),
}
AT_LEAST = {
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 0,
    "batch_tokens": 1,
    "eval_tokens": 1,
}
AT_LEAST |= dict.fromkeys(
    ("eval_interval", "save_interval", "save_total_limit", "keep_every", "weight_decay"), 0
)
AT_LEAST |= dict.fromkeys(
    ("grad_clip", "z_loss", "warmup_steps", "min_lr", "num_epochs", "val_fraction", "seed"), 0
)
AT_LEAST |= {
    "expert_log_interval": 0,
    "router_lr_factor": 0,
    "early_stopping_patience": 0,
    "log_interval": 1,
    "learning_rate": 0,
    "beta1": 0,
    "beta2": 0,
}
AT_LEAST |= {"zero_stage": 0, "hsdp_shard_size": 0, "expert_parallel": 1, "comm_timeout": 1}
AT_MOST = {
    "zero_stage": 3,
    "batch_size": 1 << 24,
    "gradient_accumulation_steps": 1 << 24,
    "comm_timeout": 10**8,
}
AT_MOST |= {
    "batch_tokens": 1 << 40,
    "max_steps": 10**12,
    "num_epochs": 10**6,
    "max_auto_epochs": 10**6,
}
ABOVE_ZERO = ("eps", "chinchilla_multiplier", "max_auto_epochs")
BELOW_ONE = ("beta1", "beta2", "val_fraction")
BLOCKS = {
    "model": ModelConfig,
    "orchestrator": OrchestratorConfig,
}  # keys that are mappings of keys
KINDS = {cls: typing.get_type_hints(cls) for cls in (Config, *BLOCKS.values())}
MAY_BE_EMPTY = ("sample_prompt",)
PATHS = re.compile(
    r"data_dir|out_dir|resume|init_from|orchestrator\.replay|prepare\.out|data\.sources\..*\.dir"
)
INSIDE = {  # what stands inside a value: a type, [what each item is], {key: what it is}; "*": any name
    "data": {
        "sources": {"*": {"dir": str, "weight": float}},
        "phases": [{"until": float, "weights": {"*": float}}],
    },
    "prepare": {"sources": [str], "val_sources": [str], "tokenizer": str, "out": str},
    "model.moe_layers": [int],
    "model.mod_layers": [int],
    "model.mod_capacity": [float],
    "model.rope_scaling": {
        **dict.fromkeys(("type", "rope_type"), str),
        **dict.fromkeys(
            ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), float
        ),
        **dict.fromkeys(
            ("beta_fast", "beta_slow", "rope_theta", "mscale", "mscale_all_dim"), float
        ),
        **{"original_max_position_embeddings": int, "truncate": bool},
    },
}
RENAMED = {"expert_back_end": "expert_backend"}  # old name: new name
INSTEAD = {  # typed, a key replaces these of the file, which say the same in another way
    "max_steps": ("num_epochs", "auto_epoch_scaling"),
    "num_epochs": ("max_steps", "auto_epoch_scaling"),
    "auto_epoch_scaling": ("max_steps", "num_epochs"),
    "batch_tokens": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("batch_tokens",),  # batch_size alone goes with batch_tokens
    "data_dir": ("data", "prepare"),
    "data": ("data_dir", "prepare"),
    "prepare": ("data_dir", "data"),
    "model.ffn_hidden_multiplier": ("model.d_ff",),
    "model.moe_layers": ("model.moe_every", "model.n_dense_layers"),
    "model.moe_every": ("model.moe_layers",),
    "model.mod_layers": ("model.mod_every", "model.mod_start_layer", "model.mod_end_layer"),
    "model.mod_every": ("model.mod_layers",),
}
FOREIGN = {  # what other trainers call a key: for hints only
    "hidden_size n_embd embed_dim": "model.d_model",
    "num_layers n_layer num_hidden_layers": "model.n_layers",
    "num_heads n_head num_attention_heads": "model.n_heads",
    "num_kv_heads num_key_value_heads n_kv_head": "model.n_kv_heads",
    "intermediate_size ffn_dim": "model.d_ff",
    "max_position_embeddings seq_length sequence_length seq_len max_length block_size": "model.max_seq_len",
    "rms_norm_eps layer_norm_eps": "model.norm_eps",
    "initializer_range": "model.init_std",
    "tie_word_embeddings": "model.tie_embeddings",
    "use_moe num_experts num_local_experts": "model.n_experts (0: dense)",
    "moe_top_k num_experts_per_tok top_k_experts": "model.n_experts_per_token",
    "moe_intermediate_size": "model.d_expert",
    "load_balancing_weight router_aux_loss_coef": "model.aux_loss_weight",
    "use_mod mod_capacity_factor": "model.mod_capacity (1.0: off)",
    "mod_routing_type": "model.mod_routing",
    "epochs num_train_epochs": "num_epochs",
    "max_iters num_train_steps total_steps": "max_steps",
    "grad_accum gradient_accumulation accumulation_steps": "gradient_accumulation_steps",
    "micro_batch_size per_device_train_batch_size": "batch_size",
    "lr": "learning_rate",
    "min_learning_rate": "min_lr",
    "max_grad_norm gradient_clip_val clip_grad_norm gradient_clipping": "grad_clip",
    "warmup_ratio warmup_fraction": "warmup_steps (below 1: a fraction of max_steps)",
    "lr_scheduler lr_scheduler_type scheduler": "lr_schedule",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "gradient_checkpointing": "activation_checkpointing: block",
    "compile torch_compile": "compile_model",
    "use_flash_attention enable_flash_attention flash_attention": "attention",
    "no_flash_attn": "attention: sdpa",
    "no_deterministic": "deterministic: false",
    "use_deepspeed": "train_fsdp.py with zero_stage",
    "gradient_compression": "reduce_dtype: bf16",
    "mixed_precision dtype": "precision",
    "save_steps save_every save_every_n_batches": "save_interval",
    "eval_steps eval_every eval_every_n_batches": "eval_interval",
    "logging_steps log_every log_every_n_batches log_every_n_steps": "log_interval",
    "experiment_name output_dir": "out_dir",
    "resume_from_checkpoint resume_training auto_resume": "resume",
    "train_data train_data_path data_path dataset_path": "prepare: {sources: [...]}, or data_dir",
    "eval_data eval_data_path": "prepare: {val_sources: [...]}",
    "use_wandb": "wandb_project: NAME",
    "use_tensorboard": "tensorboard",
    "auto_batch_size": "batch_size: auto",
    "target_memory_usage": "target_memory",
    "log_expert_usage expert_usage_frequency": "expert_log_interval",
    "health_check_interval": "orchestrator.check_interval",
    "hardware_profile": "--dry_run --hardware",
    "config config_file config_path config_choice": "the file as first word: python train.py CONFIG",
}
FOREIGN = {name: ours for names, ours in FOREIGN.items() for name in names.split()}
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
TYPED = "command line"  # where a key stands that is in no file
short = reprlib.Repr()  # of values in messages: a list of a million stays a line
short.maxstring = short.maxother = 100
short = short.repr


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
            if number in kinds and (found := as_number(value, number)) is not None:
                return found
        if str in kinds and isinstance(value, (str, int, float)):
            return str(value)
    names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise UserError("E002", f"{where}: {short(value)} is not {names}")


def as_number(value, number: type) -> int | float | None:
    """`value`, or the text of it, as a finite int or float of 64 bits; None where it is none."""
    text = str(value).replace("_", "") if isinstance(value, (str, int, float)) else ""
    if len(text) > 400 or re.match(r"[-+]?0\d", text):  # 010 is 8 in YAML 1.1, 10 in YAML 1.2
        return None
    with contextlib.suppress(ValueError, OverflowError):
        found = float(text)
        if number is float:
            return found if abs(found) < float("inf") else None
        if found == int(found) and abs(found) < 2**63:
            return int(text) if text.lstrip("+-").isdigit() else int(found)
    return None


def inside(value, kind, place, key: str):
    """`value` with all that stands in it as INSIDE says; a word is a list of one, null in a mapping is not given.
    E002, with the line of the innermost key that has one."""
    if isinstance(kind, list):
        items = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(items, list):
            raise UserError("E002", f"{place(key)}: {key}: {short(value)} is not a list")
        return [inside(item, kind[0], place, f"{key}[{i}]") for i, item in enumerate(items)]
    if not isinstance(kind, dict):
        value = convert(value, kind, f"{place(key)}: {key}")
        if isinstance(value, str):
            check_text(value, key, place(key))
        return value
    if not isinstance(value, dict):
        names = ", ".join(f"{name}: ..." for name in kind).replace("*", "NAME")
        raise UserError("E002", f"{place(key)}: {key}: {short(value)} is not a mapping {{{names}}}")
    found = {}
    for name, item in value.items():
        below = f"{key}.{name}"
        if name not in kind and "*" not in kind:
            near = nearest(str(name), kind)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(kind)}"
            raise UserError("E002", f"{place(below)}: unknown key {below}; {hint}")
        if item is not None:
            found[str(name)] = inside(item, kind.get(name, kind.get("*")), place, below)
    return found


def check_text(text: str, key: str, where: str) -> None:
    """E002 where a text, or a path, can be none on any machine."""
    if not text.strip() and key not in MAY_BE_EMPTY:
        raise UserError("E002", f"{where}: {key} is empty; leave it out, or write null")
    if "\0" in text:
        raise UserError("E002", f"{where}: {key}: {short(text)} holds a NUL")
    if PATHS.fullmatch(key) and (reason := no_path(text)):
        raise UserError("E002", f"{where}: {key}: {short(text)}: {reason}")


class Plain(yaml.SafeLoader):
    """YAML whose numbers and dates stay as they were written where something else would be read into them: 010 is no
    8, 1:30 no 90, and a folder called 0.10 or 2026-01-02 keeps its name. convert() makes numbers where they belong."""

    def construct_number(self, node):
        text = node.value
        if re.fullmatch(r"[-+]?(0|[1-9]\d*)", text) and len(text) < 20:
            return int(text)
        try:
            return float(text) if repr(float(text)) == text else text
        except ValueError:
            return text


for kind in ("int", "float", "timestamp"):
    Plain.add_constructor(f"tag:yaml.org,2002:{kind}", Plain.construct_number)
PIPES: dict[str, str] = {}  # text of what can be read only once; main() and the Trainer both ask


def read_text(path: Path) -> str:
    """The text of a YAML file in UTF-8, or in UTF-16 with its mark. E001, E002."""
    if str(path) in PIPES:
        return PIPES[str(path)]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError("E001", f"{path} cannot be read: {error.strerror}") from error
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"byte 0x{data[error.start]:02x} is not {error.encoding.upper()}"
        raise UserError(
            "E002", f"{path}:{line}: {what}; convert the file, for instance with iconv"
        ) from error
    if not path.is_file():
        PIPES[str(path)] = text
    return text


def load_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    """A YAML file as a dict, and the line of each key ("model.d_model": 7). Keys given twice are refused."""
    text, lines, seen = read_text(path), {}, set()

    def walk(node, prefix=""):
        if id(node) in seen:  # an alias
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[f"{prefix}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{prefix}[{i}]")
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            merge = key.tag == "tag:yaml.org,2002:merge"
            name = prefix if merge else f"{prefix}.{key.value}" if prefix else str(key.value)
            if name in lines and not merge:
                raise UserError(
                    "E002",
                    f"{path}:{key.start_mark.line + 1}: {name} stands here for the second time",
                )
            lines[name] = key.start_mark.line + 1
            walk(value, name)

    try:
        loader = Plain(text)
        node = loader.get_single_node()
        walk(node)
        tree = loader.construct_document(node) if node is not None else {}
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError("E002", f"{path}{line}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(
            "E002", f"{path}: not a configuration: nested too deeply, or in itself"
        ) from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            "E002", f"{path}: a mapping of keys is expected, this is a {type(tree).__name__}"
        )
    return tree, lines


def presets() -> dict[str, Path]:
    return {p.stem: p for p in sorted(CONFIGS.rglob("*.yaml")) if p.stem != "aliases"}


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
    places = {key: f"{path}:{line}" for key, line in lines.items()}

    def place(key: str) -> str:
        """Where it, or the innermost mapping around it that is written somewhere, stands."""
        while key and key not in places:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return places.get(key, str(path or TYPED))

    open_blocks(tree, place)
    while words:
        word = words.pop(0)
        word = "--help" if word == "-h" else word
        if not word.startswith("--"):
            raise UserError(
                "E002", f"{TYPED}: {short(word)}: options look like --key value or --key=value"
            )
        key, has_value, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key in FLAGS:
            flags[key] = not has_value or convert(value, bool, f"{TYPED}: --{key}")
            continue
        target, name = slot(tree, key)
        if not has_value:
            has_value = words and not words[0].startswith("--")
            kind = KINDS[BLOCKS.get(key.rpartition(".")[0], Config)].get(name, bool)
            if not has_value and (key in SIMULATED or bool not in (kind, *typing.get_args(kind))):
                raise UserError("E002", f"{TYPED}: --{key} needs a value")
            value = words.pop(0) if has_value else "true"
        if key in SIMULATED:
            flags[key] = convert(value, SIMULATED[key][0], f"{TYPED}: --{key}")
            if not isinstance(flags[key], str) and flags[key] <= 0:
                raise UserError("E002", f"{TYPED}: --{key}: {value} must be above 0")
            continue
        with contextlib.suppress(
            yaml.YAMLError, ValueError, RecursionError
        ):  # what is no YAML is a text
            value = yaml.load(value, Plain) if value else None  # Plain is a SafeLoader
        target[name] = value
        places = {
            old: p for old, p in places.items() if not old.startswith((f"{key}.", f"{key}["))
        } | {key: TYPED}
        open_blocks(tree, place)
    preset = path and CONFIGS in path.resolve().parents
    own = next((key for key in ("prepare", "data_dir", "data") if places.get(key) == TYPED), None)
    if preset and own and places.get("sample_prompt", TYPED) != TYPED:
        tree.pop("sample_prompt")  # it continues the preset's own text
        notes.append(
            f"the preset's sample_prompt goes with its own data, not with --{own}: no sample"
        )
    if (extra := [k for k in flags if k in SIMULATED]) and not flags.get("dry_run"):
        raise UserError(
            "E002", f"{TYPED}: --{extra[0]} goes with --dry_run only; torchrun sets the real number"
        )
    typed_wins(tree, {key for key, where in places.items() if where == TYPED}, notes)
    if path is None and not any(tree.get(key) for key in ("data_dir", "data", "prepare")):
        usage = "usage: python train.py CONFIG [--key value ...]; CONFIG is your YAML file or one of the presets"
        raise UserError("E001", f"which configuration? {usage}: {', '.join(presets())}")
    cfg = build_config(tree, place, notes)
    if moved and tree.get("out_dir") == home:
        notes.append(
            f"out_dir: {home}, where this config.yaml lies; it says {moved}: the run was moved or copied"
        )
    elif home and cfg.out_dir and not same_place(cfg.out_dir, home):
        notes.append(f"out_dir: {cfg.out_dir}, as typed; {path} is of the run in {home}")
    if cfg.out_dir is None:
        cfg.out_dir = f"out/{path.stem if path and path.is_file() else 'run'}"
    return cfg, tree, notes, flags


def same_place(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def run_of(path: Path) -> str | None:
    """The run's folder that a configuration lies in: a run that was moved or copied is gone on with where it lies."""
    folder, names = path.parent, ("config.yaml", "resolved.yaml")
    if path.name in names and (
        (folder / "status.json").exists() or any(folder.glob("step_*/manifest.json"))
    ):
        return str(folder)
    return None


def open_blocks(tree: dict, place) -> None:
    """Every block of keys is there, and is a mapping. E002."""
    for block in BLOCKS:
        tree[block] = {} if tree.get(block) is None else tree[block]
        if not isinstance(tree[block], dict):
            raise UserError(
                "E002",
                f"{place(block)}: {block}: a mapping of keys is expected, not {short(tree[block])}",
            )


def slot(tree: dict, key: str) -> tuple[dict, str]:
    """The mapping in which a key stands, and its name there."""
    block, _, name = key.partition(".")
    return (tree[block], name) if name and block in BLOCKS else (tree, key)


def typed_wins(tree: dict, typed: set[str], notes: list[str]) -> None:
    """What is typed beats what the file says in another way, with a note."""
    for key in [k for k in INSTEAD if k in typed]:
        target, name = slot(tree, key)
        for other in INSTEAD[key]:
            where, theirs = slot(tree, other)
            if (
                target.get(name) in (None, False)
                or where.get(theirs) in (None, False)
                or other in typed
            ):
                continue
            made = (
                where[theirs].get("out")
                if other == "prepare" and isinstance(where[theirs], dict)
                else None
            )
            if made is not None and made == target.get(name):  # data_dir is what the file prepares
                continue
            notes.append(
                f"{key} was typed: {other}: {short(where.pop(theirs))} of the file is left out"
            )


def find_yaml(name: str) -> Path:
    """A path, or the name of a preset in configs/."""
    path, known = Path(expand(name)), presets()
    try:
        if path.exists() and not path.is_dir():  # a pipe is right too
            return path
        if name in known:
            return known[name]
        inner = path / "config.yaml"
        if path.is_dir():
            hint = (
                f"did you mean {inner}?"
                if inner.is_file()
                else "a YAML file, or the name of a preset, is expected"
            )
            raise UserError("E001", f"{name} is a folder; {hint}")
        here = {str(p): p for p in path.parent.glob("*.y*ml")}
        elsewhere = CONFIGS.parent / name
        if elsewhere.is_file():
            hint = f"{elsewhere} does"
            hint += (
                f": {path.stem} alone names that preset"
                if known.get(path.stem) == elsewhere
                else ""
            )
            raise UserError("E001", f"{name} does not exist in {Path.cwd()}; {hint}")
    except (OSError, ValueError) as error:  # too long for a name, a NUL in it
        raise UserError(
            "E001", f"{short(name)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    near = nearest(path.stem, known)
    near = nearest(str(path), here) or (f"configs/{near}.yaml" if near else None)
    hint = f"did you mean {near}?" if near else f"presets: {', '.join(known)}"
    raise UserError("E001", f"{name} does not exist; {hint}")


def meant(key: str) -> str:
    """What somebody who wrote this unknown key may have wanted."""
    tables = {"": Config, **{f"{block}.": cls for block, cls in BLOCKS.items()}}
    ours = [prefix + f.name for prefix, cls in tables.items() for f in dataclasses.fields(cls)]
    ours += [f"--{name}" for name in (*FLAGS, *SIMULATED)]
    block, _, name = key.rpartition(".")
    bare = {}
    for full in ours:  # the block that was written first, then the top level
        bare.setdefault(full.lstrip("-").rpartition(".")[2], []).append(full)
    fits = bare.get(name, [])
    if fits and fits[0].startswith("--"):
        return f"it belongs on the command line: {fits[0]}"
    if fits:
        there = fits[0].rpartition(".")[0]
        return (
            f"it belongs under {there}:"
            if there
            else f"it belongs at the top level, not under {block}:"
        )
    if name in FOREIGN:
        return f"it is {FOREIGN[name]} here"
    if near := nearest(name, bare):
        same = [full for full in bare[near] if full.rpartition(".")[0] == block]
        return f"did you mean {(same or bare[near])[0]}?"
    return "python train.py --help lists all"


def build_config(tree: dict, where, notes: list[str]) -> Config:
    """The written keys -> Config, all of it checked. `where(key)` names file and line. What is written is left in
    `tree` as it was understood: "3e-4" and 0.0003 are the same."""
    for old, new in RENAMED.items():
        if old in tree:
            tree[new] = tree.pop(old)
    for key in [k for k in IGNORED if k in tree]:
        tree.pop(key)
        notes.append(f"{key} has no effect in Lumen and is ignored")
    open_blocks(tree, where)
    lunaris_keys(tree["model"], where, notes)
    named = [
        ("", Config, tree),
        *((f"{block}.", cls, tree[block]) for block, cls in BLOCKS.items()),
    ]
    unknown = [f"{prefix}{k}" for prefix, cls, keys in named for k in keys if k not in KINDS[cls]]
    if unknown:
        told = [
            f"{where(key)}: unknown key {short(key).strip(repr('')[0])}; {meant(key)}"
            for key in unknown
        ]
        raise UserError(
            "E002",
            told[0] if len(told) == 1 else f"{len(told)} unknown keys\n  " + "\n  ".join(told),
        )
    for prefix, cls, keys in named:
        for key in [k for k in keys if k not in BLOCKS]:
            place, name = where(prefix + key), prefix + key
            keys[key] = convert(keys[key], KINDS[cls][key], f"{place}: {name}")
            if isinstance(keys[key], (dict, list)):
                keys[key] = inside(keys[key], INSIDE[name], where, name)
            if isinstance(keys[key], str):
                check_text(keys[key], name, place)
    if tree.get("max_steps") is not None and tree.get("num_epochs") is not None:
        if tree["num_epochs"] != 1:
            text = "num_epochs and max_steps both set the length; drop one (on the command line: --max_steps null)"
            raise UserError("E002", f"{where('num_epochs')}: {text}")
        tree.pop("num_epochs")
        notes.append("num_epochs: 1 is ignored, max_steps sets the length")
    try:
        model = ModelConfig(**tree["model"])
    except ValueError as error:
        key = str(error).partition(":")[0]
        place = f"{where(key)}: " if key.removeprefix("model.") in tree["model"] else ""
        raise UserError("E002", f"{place}{error}") from error
    orchestrator = OrchestratorConfig(**tree["orchestrator"])
    rest = {key: value for key, value in tree.items() if key not in BLOCKS}
    cfg = Config(**rest, model=model, orchestrator=orchestrator)

    def refuse(key, text):
        raise UserError("E002", f"{where(key)}: {key}: {text}")

    if cfg.precision.startswith("fp8"):
        refuse("precision", "Lumen has no fp8 matrices yet; mixed_bf16 is the nearest")
    for key, choices in CHOICES.items():
        if getattr(cfg, key) not in choices:
            words = ", ".join(str(c).lower() if isinstance(c, bool) else c for c in choices)
            refuse(key, f"{short(getattr(cfg, key))} is not one of {words}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", cfg.device):
        refuse("device", f"{short(cfg.device)} is not auto, cuda, cuda:N, mps or cpu")
    if isinstance(cfg.batch_size, str) and (cfg.batch_size != "auto" or not cfg.batch_tokens):
        auto = cfg.batch_size == "auto"
        text = "needs batch_tokens, the size of the whole batch" if auto else "is not int or auto"
        refuse("batch_size", f"{short(cfg.batch_size)} {text}")
    for key, low in AT_LEAST.items():
        value = getattr(cfg, key)
        if isinstance(value, (int, float)) and value < low:
            refuse(key, f"{value} must be at least {low}")
    for key, high in AT_MOST.items():
        value = getattr(cfg, key)
        if isinstance(value, (int, float)) and value > high:
            refuse(key, f"{value} must be at most {high}")
    for key in ABOVE_ZERO:
        if getattr(cfg, key) <= 0:
            refuse(key, f"{getattr(cfg, key)} must be above 0")
    for key in BELOW_ONE:
        if getattr(cfg, key) >= 1:
            refuse(key, f"{getattr(cfg, key)} must be below 1")
    if cfg.activation_checkpointing == "full":
        cfg.activation_checkpointing = "block"
    o = cfg.orchestrator
    o.mode = "off" if o.mode == "none" else o.mode  # YAML reads off as false
    if o.mode not in MODES:
        refuse("orchestrator.mode", f"{short(o.mode)} is not one of {', '.join(MODES)}")
    if not cfg.use_adaptive_training:
        if o.mode in ("act", "replay") and "mode" in tree["orchestrator"]:
            refuse(
                "orchestrator.mode",
                f"{o.mode} does not go with use_adaptive_training: false; drop one",
            )
        o.mode = "off" if o.mode == "act" else o.mode
    if not 0.5 <= o.intervention_threshold <= 0.99:
        refuse(
            "orchestrator.intervention_threshold",
            f"{o.intervention_threshold} is not from 0.5 to 0.99",
        )
    for key, low in (("check_interval", 1), ("snapshot_interval", 0)):
        if getattr(o, key) < low:
            refuse(f"orchestrator.{key}", f"{getattr(o, key)} must be at least {low}")
    if (o.mode == "replay") != bool(o.replay):
        refuse(
            "orchestrator.replay",
            "mode: replay and replay: FILE (decisions.jsonl of a run) go together",
        )
    if cfg.auto_epoch_scaling and (cfg.max_steps is not None or cfg.num_epochs is not None):
        refuse(
            "auto_epoch_scaling", "sets the length, and so does max_steps or num_epochs; drop one"
        )
    if not 0 <= cfg.min_auto_epochs <= cfg.max_auto_epochs:
        refuse("min_auto_epochs", "0 <= min_auto_epochs <= max_auto_epochs is expected")
    if cfg.cpu_offload:
        text = "true: not there, as its cost was never measured; more ranks at zero_stage: 3, expert_parallel and"
        refuse("cpu_offload", f"{text} activation_checkpointing: block need less memory each")
    if not 0 < cfg.target_memory <= 1:
        refuse("target_memory", f"{cfg.target_memory} is not in (0, 1]")
    if not 0 < cfg.decay_frac <= 1:
        refuse("decay_frac", f"{cfg.decay_frac} is not in (0, 1]")
    if cfg.data_dir and cfg.data is not None:
        refuse("data", "data_dir and data both name the data; drop one")
    if cfg.prepare is not None:
        if not cfg.prepare.get("sources"):
            refuse("prepare", "needs sources: [...]; may have val_sources, tokenizer, out")
        out = cfg.prepare.setdefault(
            "out", cfg.data_dir or f"data/{Path(cfg.prepare['sources'][0]).stem}"
        )
        cfg.data_dir = cfg.data_dir or out
    if not cfg.data_dir and cfg.data is None:
        raise UserError("E002", "no data: set data_dir (a folder of shards), data, or prepare")
    if cfg.data is not None:
        check_data(cfg.data, refuse)
    expand_paths(cfg, where)
    if cfg.expert_log_interval % cfg.log_interval:
        refuse(
            "expert_log_interval",
            f"{cfg.expert_log_interval} is not a multiple of log_interval {cfg.log_interval}",
        )
    if cfg.wandb_project and os.environ.get("WANDB_MODE", "online") not in WANDB_MODES:
        text = f"WANDB_MODE={os.environ['WANDB_MODE']!r} in the environment is not one of {', '.join(WANDB_MODES)}"
        refuse("wandb_project", f"{text}; unset it")
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


def check_data(data: dict, refuse) -> None:
    """The `data` key: sources that say where they are, and phases that weigh them."""
    sources = data.get("sources") or refuse(
        "data", "{sources: {NAME: {dir: FOLDER, weight: 1.0}}} is expected"
    )
    for name, source in sources.items():
        if not source.get("dir") or source.get("weight", 1.0) < 0:
            refuse(
                f"data.sources.{name}",
                "{dir: FOLDER, weight: 1.0} is expected, the weight not below 0",
            )
    phases = [{"weights": {name: source.get("weight", 1.0) for name, source in sources.items()}}]
    for i, phase in enumerate(data.get("phases") or phases):
        key, weights = f"data.phases[{i}]", phase.get("weights") or {}
        if not weights or set(weights) - set(sources):
            refuse(
                key,
                f"{{until: STEP, weights: {{NAME: ...}}}} with names of {', '.join(sources)} is expected",
            )
        if not min(weights.values()) >= 0 < max(weights.values()):
            refuse(
                key if "phases" in data else "data.sources",
                f"weights {weights}: none below 0, not all 0",
            )
        if phase.get("until", 1) < 0:
            refuse(
                f"{key}.until", f"{phase['until']} is neither a step nor a fraction of max_steps"
            )


def lunaris_keys(model: dict, where, notes: list[str]) -> None:
    """Keys of Lunaris Codex's `model:` block that have another name or no place here."""

    def number(key: str, default: float, take=model.get) -> float:
        value = take(key, None)
        return (
            default
            if value is None
            else convert(value, float, f"{where(f'model.{key}')}: model.{key}")
        )

    for old, new in (("use_qk_norm", "qk_norm"), ("resid_dropout", "dropout")):
        if model.get(old) is not None:
            model[new] = model[old]
            notes.append(f"model.{old} is model.{new} here")
        model.pop(old, None)
    if number("attn_dropout", 0, model.pop):
        raise UserError(
            "E002",
            f"{where('model.attn_dropout')}: dropout inside attention is not supported; use dropout",
        )
    base, length = (
        number("rope_ntk_scale_base", 0, model.pop),
        number("max_seq_len", ModelConfig.max_seq_len),
    )
    if length > base > 0:
        theta = number("rope_theta", ModelConfig.rope_theta) * length / base
        model["rope_theta"] = theta
        notes.append(f"model.rope_ntk_scale_base {base:g} is applied: rope_theta {theta:g}")
    if "n_experts" in model and model["n_experts"] in (None, False):
        model["n_experts"] = 0  # null is a dense model there
    if model.get("n_experts") and "n_experts_per_token" not in model:
        notes.append("model.n_experts_per_token is not given: 2 here (Lunaris Codex: 1)")


def printed(cfg: Config, sharded: bool) -> str:
    """YAML that runs as it is; its comments say what only a start decides, and what has no effect under train.py."""
    tree = dataclasses.asdict(cfg)
    later = [
        f"{key}: {value}" for key, value in tree.items() if value == "auto" and key != "resume"
    ]
    later += [
        f"{key}: null" for key in ("max_steps", "min_lr", "warmup_steps") if tree[key] is None
    ]
    later += ["model.vocab_size: 0"] if not cfg.model.vocab_size else []
    notes = (
        [f"decided at the start of the run, see config.yaml in its out_dir: {', '.join(later)}"]
        if later
        else []
    )
    if not sharded:
        notes.append(
            f"without effect under train.py, for train_fsdp.py only: {', '.join(SHARDING)}"
        )
    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(tree, sort_keys=False)


def help_text() -> str:
    """Every key with its default and meaning, read from the dataclasses above."""
    rows = []
    for cls, prefix in ((Config, ""), *((block, f"{name}.") for name, block in BLOCKS.items())):
        for line in inspect.getsource(cls).splitlines():
            if m := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)", line):
                default = "" if m[2].startswith("field(") else f" [{m[2]}]"
                rows.append(f"  --{prefix}{m[1]:<{32 - len(prefix)}} {m[3]}{default}")
            elif m := re.match(r"    # (.+)", line):
                rows.append(f"\n{m[1]}")
        rows.append({Config: "\nmodel", ModelConfig: "\norchestrator"}.get(cls, ""))
    usage = "usage: python train.py CONFIG [--key value | --key=value | --model.key value ...]\n"
    rows += ["\nwith --dry_run: a simulation of"]
    rows += [f"  --{name:<32} {text}" for name, (_, text) in SIMULATED.items()]
    flags = (
        "       --dry_run: sizes, memory, time and length, no training; --print_config; --help\n"
    )
    return usage + flags + "\n".join(rows)
