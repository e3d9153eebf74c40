"""In what a run that goes on differs from the run that its checkpoint is of: lines for the user."""

from __future__ import annotations

import types

import torch

from lumen.config import Config
from lumen.machine import Machine
from lumen.resolve import Run, resolved
from lumen.schedule import lr_at

# what the learning rate of a step depends on
SCHEDULE_KEYS = ("learning_rate", "min_lr", "lr_schedule")
SCHEDULE_KEYS += ("max_steps", "warmup_steps", "decay_frac")
# keys that say how to start, not what to train
OF_ONE_START = ("resume", "overwrite", "init_from", "allow_data_change", "allow_tokenizer_change")


def compare(cfg: Config, run: Run, saved: dict) -> list[str]:
    """A line for each knob that is not what the checkpoint's run had, both as resolved. (The model
    must be the same, or the start was refused.)"""
    T = cfg.model.max_seq_len
    before = saved["config"] | {"batch_tokens": saved["run"]["rows_per_step"] * T}
    now = resolved(cfg, run) | {"batch_tokens": run.rows_per_step * T}
    there, here = {}, {}
    for key, value in now.items():
        if key in OF_ONE_START or key == "model":
            continue
        then = before.get(key, value)  # a key that is newer than the checkpoint
        if key in ("orchestrator", "evaluate"):
            there |= {f"{key}.{name}": then.get(name, value[name]) for name in value}
            here |= {f"{key}.{name}": value[name] for name in value}
        else:
            there |= leaves(key, then)
            here |= leaves(key, value)
    told = []
    for key in {**here, **there}:
        then, value = there.get(key), here.get(key)
        if then != value:
            told.append(f"{key}: {worded(then)} in the checkpoint, {worded(value)} now")
    return told


def leaves(key: str, value) -> dict:
    """What stands in a block, prepare.max_bad, or the value of a key that is none."""
    if not isinstance(value, dict):
        return {} if value is None else {key: value}
    found = {}
    for name, inner in value.items():
        found |= leaves(f"{key}.{name}", inner)
    return found


def worded(value) -> str:
    return "nothing" if value is None else str(value)


def versions(machine: Machine, world: int) -> dict:
    """On what equal bits depend, besides the run itself."""
    here = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return here | {"device": machine.name, "world": world}


def other_bits(run: Run, now: dict, saved: dict) -> list[str]:
    """A line where a deterministic run goes on on what cannot give the bits that it had."""
    then = saved.get("versions", {}) | {"micro_batch": saved["run"]["micro_batch"]}
    now = now | {"micro_batch": run.micro_batch}
    differ = [f"{k} {then[k]} -> {now[k]}" for k in now if k in then and then[k] != now[k]]
    if not differ or not run.deterministic:
        return []
    return [f"equal bits to the run so far cannot be promised: {', '.join(differ)}"]


def leap(saved: dict, cfg: Config, run: Run, step: int) -> list[str]:
    """A line where a resumed run's learning rate would leap: by the checkpoint's configuration, as
    resolved, against today's; and what makes the difference."""
    now = resolved(cfg, run)
    then = types.SimpleNamespace(**now | saved["config"])
    then.phases = saved["run"].get("phases", [])
    was = lr_at(then, then, max(0, min(step, then.max_steps - 1)))
    becomes = lr_at(cfg, run, step)
    if step >= run.max_steps or (becomes <= 1.5 * was and was <= 1.5 * becomes):
        return []
    changed = []
    for key in SCHEDULE_KEYS:
        if getattr(then, key) != now[key]:
            changed.append(f"{key} {getattr(then, key)} -> {now[key]}")
    if then.phases != run.phases:
        changed.append("data.phases")
    text = f"the learning rate leaps from {was:.2e} to {becomes:.2e} at step {step}"
    text += f" ({', '.join(changed)}); lr_schedule: wsd can be made longer without that,"
    return [f"{text} init_from starts a new schedule"]


def differences(cfg: Config, run: Run, now: dict, saved: dict, step: int) -> list[str]:
    """All of the above. now: versions() of this start."""
    lines = leap(saved, cfg, run, step)
    return lines + other_bits(run, now, saved) + compare(cfg, run, saved)
