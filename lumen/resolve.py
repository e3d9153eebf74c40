"""What `auto` and null become at the start of a run: `Config`, as written -> `Run`, as resolved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lumen.config import Config


@dataclass(frozen=True)
class Run:
    """What a run does where its configuration left that open. Saved as `run` in state.json, and kept on resume."""

    # a step's batch
    rows_per_step: int  # over all ranks, whatever their number
    micro_batch: int  # rows of a rank and micro-step
    accumulation: int  # micro-steps a step
    # length and schedule
    max_steps: int
    min_lr: float  # where the decay ends
    warmup_steps: int
    peak_step: int  # steps until the learning rate is at its peak
    # machine
    device: str  # cpu | cuda | mps
    precision: str  # fp32 | mixed_bf16 | mixed_fp16
    compile_model: bool
    attention: str  # backend ...
    attention_why: str  # ... and why it is that one
    expert_backend: str
    experts_why: str
    deterministic: bool
    # the order of data
    segments: list  # [[row from which on, {source: weight}], ...], the rows ascending


def rise(schedule: str, max_steps: int, warmup_steps: int) -> int:
    """Steps until the learning rate is at its peak."""
    return max(1, int(0.3 * max_steps)) if schedule == "onecycle" else warmup_steps


def with_length(cfg: Config, run: Run, max_steps: int) -> Run:
    """`run` with another end, and what depends on that."""
    peak = rise(cfg.lr_schedule, max_steps, run.warmup_steps)
    return dataclasses.replace(run, max_steps=max_steps, peak_step=peak)


def resolved(cfg: Config, run: Run) -> dict:
    """The configuration with every value that `run` has found for it: config.yaml, and `config` in state.json."""
    keys = dataclasses.asdict(cfg)
    for name in ("max_steps", "min_lr", "warmup_steps", "precision", "compile_model", "attention"):
        keys[name] = getattr(run, name)
    keys["deterministic"] = run.deterministic
    keys["expert_backend"] = run.expert_backend
    keys["batch_size"] = run.micro_batch
    keys["gradient_accumulation_steps"] = run.accumulation
    return keys
