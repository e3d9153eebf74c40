"""What fine-tuning begins with: a run of ours, one of its steps, or a Hugging Face folder.

Read before there is a Trainer: the model, the tokenizer and the chat template that a fine-tuned
run takes over; and what follows from them where its keys leave it open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lumen import chat, checkpoint, hf, nearby, preferences
from lumen import tokenizer as tokenizers
from lumen.errors import UserError
from lumen.files import read_json, sha256
from model import ModelConfig, role


@dataclass
class Base:
    """A model that is there already."""

    path: str
    model: ModelConfig
    tokenizer: Path | None  # its tokenizer.json
    template: chat.Template | None  # the one it speaks; None: it knows no conversations, or ...
    foreign_template: str = ""  # ... those of this Jinja text, which is none of ours


def read_base(path: str) -> Base:
    """E125: nothing to begin with; E303, E304, E401 as those who load it raise them."""
    folder = Path(path)
    if not folder.exists():
        text = f"the base {path} does not exist; BASE, or init_from, says where it is now"
        raise UserError("E304", text + nearby.hint(path))
    if (folder / "config.json").is_file():
        return read_hf_base(folder)
    found = checkpoint.find(folder, say=print)
    if "adapter" in found.state:
        text = f"init_from {path} holds adapters; make a model of them and their base first"
        raise UserError("E125", f"{text}: python finetune.py merge {path} OUT")
    file = tokenizers.of_run(found.path.parent, found.state.get("tokenizer"))
    # MoD's capacity has come down in the base's run, and does not begin at 1.0 again
    model = dataclasses.replace(found.model_config(), mod_anneal_steps=0)
    return Base(path, model, file, chat.template_of_run(found.state))


def read_base_or_run(path: str, out_dir: str | None) -> Base:
    """As read_base; where the base has gone, a run of all its weights goes on without it."""
    if out_dir and not Path(path).exists() and checkpoint.list_steps(out_dir):
        state = checkpoint.find(out_dir, say=print).state
        if "base" in state and "adapter" not in state:
            return dataclasses.replace(read_base(out_dir), path=path)
    return read_base(path)


def read_hf_base(folder: Path) -> Base:
    config = read_json(folder / "config.json", "E401")
    try:
        model = hf.model_config(config, folder / "config.json")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError("E401", f"{folder / 'config.json'}: {error}") from error
    file = folder / "tokenizer.json"
    jinja = jinja_of(folder)
    name = chat.template_of({"chat_template": jinja})
    template = chat.find_template(name) if name else None
    return Base(str(folder), model, file if file.exists() else None, template, str(jinja or ""))


def jinja_of(folder: Path):
    """The chat template of a Hugging Face folder; newer versions of transformers keep it in a file
    of its own."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return read_json(folder / "tokenizer_config.json").get("chat_template")


def base_sha256(path) -> str:
    """Stands for every byte of a base: of a step its manifest's own sum; of a Hugging Face folder
    one over its config.json and weights."""
    path = Path(path)
    if not (path / "config.json").is_file():
        return checkpoint.manifest_sha256(checkpoint.Checkpoint(path).manifest)
    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    sums = [f"{file.name} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def holds(named: str, step: str) -> bool:
    """Whether `step`, with which a run began, is there, and is `named` or a step of it."""
    home = Path(step).resolve()
    return home.exists() and Path(named).resolve() in (home, home.parent)


def usual_rate(d_model: int, method: str, lora: bool) -> tuple[float, str]:
    """(learning rate, where it is from) for who names none.

    5e-5 (2000 / d_model)^0.781, with adapters ten times that: Schulman et al., LoRA Without Regret
    (2025), as their tinker-cookbook has it for Llama. Preferences a twentieth: DPO's recipes lie at
    1/10 to 1/40 of their SFT's (Tunstall et al., Zephyr, 2023; Lambert et al., Tulu 3, 2024).
    """
    rate = 5e-5 * (2000 / d_model) ** 0.781
    why = f"5e-5 x (2000 / {d_model})^0.781"
    if lora:
        rate, why = 10 * rate, f"{why} x 10 for adapters"
    if method != "sft":
        rate, why = rate / 20, f"{why} / 20 for preferences"
    return float(f"{rate:.2g}"), why


def folder_for(prepare: dict, name: str, seq_len: int) -> str:
    """Where conversations are prepared for the base `name`: a folder of its own for other files, a
    file that has changed, other options or rows of another length, so that none is in the way."""
    files = []
    sources = prepare.get("sources") or "data"
    for source in [sources] if isinstance(sources, str) else sources:
        stamp = None
        with contextlib.suppress(OSError):
            stat = os.stat(source)
            stamp = [stat.st_size, stat.st_mtime_ns]
        files.append([os.path.abspath(source), stamp])
    facts = json.dumps([files, seq_len, prepare], sort_keys=True, default=str)
    stem = re.sub("[^A-Za-z0-9._-]+", "-", Path(files[0][0]).stem)
    return f"data/{stem}-{name}-{hashlib.sha256(facts.encode()).hexdigest()[:6]}"


# ---------------------------------------------------------------- may a run go on


def check_goes_on(cfg, saved, targets: list[str]) -> None:
    """E300: a run of train.py; E305: what is trained is not what was trained."""
    state, now = saved.state, {"r": cfg.lora.r}
    if "base" not in state:
        text = f"{saved.path} is of train.py: fine-tuning begins with it as BASE"
        raise UserError("E300", f"{text}, in an out_dir of its own")
    if preferences.needs_reference(cfg.method) and "reference" not in state:
        text = f"{saved.path}: method was {state['config']['method']}, and {cfg.method}"
        fix = f"give another out_dir, and begin with it: init_from {saved.path.parent}"
        text += f" needs a reference from before its first step; {fix}"
        raise UserError("E312", text)
    then = state.get("adapter", {"r": 0})
    if now["r"] and then["r"]:
        now |= {"alpha": cfg.lora.alpha, "rslora": cfg.lora.rslora}
        now |= {"quantize_base": cfg.quantize_base}
    if now["r"] and then["r"] and set(then["targets"]) != set(targets):
        then, now["targets"] = then | {"targets": len(then["targets"])}, len(targets)
    differ = [f"{k}: {then[k]} there, {v} here" for k, v in now.items() if then[k] != v]
    if differ:
        text = f"{saved.path} holds other adapters: {'; '.join(differ)} (r 0: all weights)"
        raise UserError("E305", f"{text}; go on as it began, or in another out_dir")


def check_templates(data) -> None:
    """E113 where sources have several: a model would end its replies by one or the other."""
    found = {}
    for name, source in data.sources.items():
        if template := (source.manifest or {}).get("template"):
            found[name] = template
    if any(template != data.template for template in found.values()):
        text = ", ".join(f"{name} {template['name']}" for name, template in found.items())
        raise UserError("E113", f"templates of the sources differ: {text}; prepare all alike")


# ---------------------------------------------------------------- control tokens


def fresh_ids(base: Base, template: chat.Template, tokenizer) -> list[int]:
    """Control tokens of `template` that the base has never been trained on, so that their rows of
    the embedding say nothing: all but end-of-text, where the base speaks no such template."""
    if tokenizer is None or base.template == template:
        return []
    found = set()
    for form in chat.compiled(template).values():
        for piece in (*form.before, *form.after):
            if piece.control in (None, "end") or piece.control in base.foreign_template:
                continue
            found.add(tokenizer.control(piece.control))
    return sorted(i for i in found if i is not None and i != tokenizer.eot_id)


def mean_row(table: torch.Tensor, fresh: list[int]) -> torch.Tensor:
    """(C,): the mean of the rows of (V, C) that are not fresh. A new token that begins there is
    likely to be none of the others (Hewitt 2021)."""
    keep = torch.ones(len(table), dtype=torch.bool)
    keep[fresh] = False
    return table[keep.to(table.device)].mean(0)


# ---------------------------------------------------------------- what is trained

ROLES = ("embedding", "head", "norm", "router", "expert", "matrix")


def check_frozen(model, roles) -> None:
    """E002: a role that there is not, one that this model has no weights of, or nothing is left."""
    wanted = frozen_roles(roles)
    unknown = [name for name in wanted if name not in ROLES]
    if unknown:
        raise UserError("E002", f"freeze: {', '.join(unknown)} is none of {', '.join(ROLES)}")
    there = {role(name) for name, _ in model.named_parameters()}
    absent = [name for name in wanted if name not in there]
    if absent:
        text = f"freeze: this model has no {', '.join(absent)}; it has {', '.join(sorted(there))}"
        if "head" in absent:
            text += " (a tied head is the embedding)"
        raise UserError("E002", text)
    if there <= set(wanted):
        raise UserError("E002", "freeze: nothing is left to be trained")


def frozen_roles(roles) -> list[str]:
    return [name.removesuffix("s") for name in roles or ()]


def freeze(model, roles) -> None:
    """Parameters of these roles are not trained."""
    wanted = frozen_roles(roles)
    for name, p in model.named_parameters():
        if role(name) in wanted:
            p.requires_grad_(False)
    if "router" in wanted:
        still_routers(model)


def still_routers(model) -> None:
    """A router that is not trained is not pushed either: its bias stays, and it has no losses,
    which could only move what comes before it."""
    for moe in model.sparse_layers("moe").values():
        moe.router.bias_rate = 0.0
        moe.router.aux_weight = 0.0
        moe.router.cfg = dataclasses.replace(moe.router.cfg, router_z_loss_weight=0.0)


def cast(model, dtype: torch.dtype) -> None:
    """Weights that no optimizer updates are held as they are computed with: layers would cast them
    in every forward pass, to the same numbers. Routers choose in fp32."""
    for name, p in model.named_parameters():
        if role(name) != "router":
            p.data = p.data.to(dtype)


def model_keys(base: Base, written: dict) -> dict:
    """The `model:` block of a run on this base: what is not the default, and over that what was
    written."""
    found = dataclasses.asdict(base.model)
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    return {key: value for key, value in found.items() if value != defaults[key]} | written
