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

from lumen import chat, checkpoint, hf
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


def is_base(path) -> bool:
    """Whether `path` may be one: it holds steps, or is one, or a config.json."""
    path = Path(path)
    inside = ("config.json", "state.json", "manifest.json", "config.yaml")
    shards = (path / "manifest.json").exists() and not (path / "state.json").exists()
    if shards and not (path / "config.json").exists():
        return False
    return any((path / name).exists() for name in inside) or bool(checkpoint.list_steps(path))


def read_base(path: str) -> Base:
    """E125: nothing to begin with; E303, E304, E401 as those who load it raise them."""
    folder = Path(path)
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


def read_base_of_run(path: str, out_dir: str | None) -> Base:
    """As read_base. A run of all weights goes on without its base: then what it says in out_dir."""
    try:
        return read_base(path)
    except UserError:
        steps = checkpoint.list_steps(Path(out_dir)) if out_dir and not Path(path).exists() else []
        found = checkpoint.find(Path(out_dir)) if steps else None
        if found is None or "base" not in found.state or "adapter" in found.state:
            raise
    return read_base(out_dir)


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
    for source in prepare.get("sources") or ["data"]:
        stamp = None
        with contextlib.suppress(OSError):
            stat = os.stat(source)
            stamp = [stat.st_size, stat.st_mtime_ns]
        files.append([os.path.abspath(source), stamp])
    facts = json.dumps([files, seq_len, prepare], sort_keys=True, default=str)
    stem = re.sub("[^A-Za-z0-9._-]+", "-", Path(files[0][0]).stem)
    return f"data/{stem}-{name}-{hashlib.sha256(facts.encode()).hexdigest()[:6]}"


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


def freeze(model, roles) -> None:
    """Parameters of these roles are not trained. E002: a role that this model does not have, or
    nothing is left to train."""
    wanted = [name.removesuffix("s") for name in roles or ()]
    there = {role(name) for name, _ in model.named_parameters()}
    unknown = [name for name in wanted if name not in there]
    if unknown or not there - set(wanted):
        what = f"{', '.join(unknown)} is none of" if unknown else "nothing would be trained of"
        text = f"freeze: {what} {', '.join(name for name in ROLES if name in there)}"
        tied = "; a tied head is the embedding" if "head" in unknown else ""
        raise UserError("E002", f"{text}, which this model has{tied}")
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
