"""A path becomes a model that can be asked: a run or one of its steps, adapters with their base, a
Hugging Face folder, a quantised one (lumen/quantised.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lumen import adapters, chat, checkpoint, few_rows, nearby, onednn, quantised
from lumen import base as bases
from lumen import tokenizer as tokenizers
from lumen.errors import UserError, expand
from lumen.experts import anneal_depth
from lumen.machine import Machine, detect
from lumen.quantize import n_parameters, quantised_layers
from lumen.vocabulary import Vocabulary
from model import Transformer, role


@dataclass
class Opened:
    """A model, and what is known of it."""

    model: Transformer
    tokenizer: Vocabulary | None
    name: str  # of the run's folder, or of the folder; steps of one run share it
    step: int | None  # None: of a Hugging Face folder
    sha256: str  # stands for every byte of its weights and configuration
    state: dict  # the checkpoint's state.json; of a quantised one its source's; or {}
    template: chat.Template | None  # None: it knows no conversations, or none of our templates
    folder: Path  # the step's, or the folder
    kind: str  # run | adapters | huggingface | quantised

    def __str__(self) -> str:
        """What it is, for people: "step 330, 5,308,672 parameters"."""
        parts = [] if self.step is None else [f"step {self.step}"]
        if self.kind != "run":
            parts.append(KINDS[self.kind])
        return ", ".join([*parts, f"{n_parameters(self.model):,} parameters"])


KINDS = {
    "adapters": "adapters merged with their base",
    "huggingface": "a Hugging Face folder",
    "quantised": "quantised",
}


def open_model(
    path, best=False, step=None, tokenizer=None, device="auto", precision="auto", say=print
) -> Opened:
    """The model in eval mode, without gradients, on its device and in its compute dtype. Of a run
    the newest checkpoint, or the `best`, or that of `step`; `tokenizer`: a file or a name, what
    lies with the model by default. UserError E304: no model there; E303, E306: it is damaged, or of
    a newer version; E305: its tensors do not fit its configuration; E311: its adapters' base is
    gone or another; E401: a foreign folder that cannot be read exactly; E002: `best` or `step` of
    what has no steps, or a precision that is none."""
    here = detect(device, inference_precision(precision), False)
    opened = read_model(path, best, step, tokenizer, say)
    if line := make_ready(opened.model, here, exact=precision == "fp32"):
        say(line)
    return opened


def inference_precision(precision: str) -> str:
    """E002: a --precision in which no model is asked. Matmuls in fp8 are for training: a scale
    that neighbours share would make a text's likelihood depend on what it is asked with."""
    if precision in ("auto", "fp32", "bf16", "fp16", "mixed_bf16", "mixed_fp16"):
        return precision
    text = f"--precision: {precision!r} is not auto, fp32, bf16 or fp16"
    if precision.startswith("fp8"):
        text += "; fp8 is for training, and what it trained opens in bf16 on any machine"
    if precision in ("int8", "int4"):
        text += "; python export.py quantize RUN DIR --bits 8 or 4 makes such a model"
    raise UserError("E002", text)


def make_ready(model: Transformer, here: Machine, exact: bool = False) -> str:
    """A layer would cast its weight in every forward pass; nobody needs the fp32 ones here, so it
    is done once. But routers choose in fp32. Matrices of few bits: by kernels that round what they
    multiply to bf16, unless it is to be `exact`; the line says which."""
    for name, p in model.named_parameters():
        dtype = torch.float32 if role(name) == "router" else here.compute_dtype
        p.data = p.data.to(here.device, dtype)
    model.to(here.device).eval().requires_grad_(False)
    model.compute_dtype = here.compute_dtype
    onednn.reorder(model)
    layers = list(quantised_layers(model).values())
    return "" if exact or not layers else few_rows.speed_up(layers)


# ---------------------------------------------------------------- as it is stored


def read_model(path, best=False, step=None, tokenizer=None, say=print) -> Opened:
    """As open_model, but in fp32 on the CPU."""
    if best and step is not None:
        raise UserError("E002", "--best and --step name two checkpoints; give one of them")
    folder = Path(expand(str(path)))
    read = reader_of(folder)
    if read is None:
        return read_run(folder, best, step, tokenizer, say)
    if best or step is not None:
        raise UserError("E002", f"{folder} is no run: no steps for --best or --step to choose from")
    return read(folder, tokenizer)


def reader_of(folder: Path):
    """What reads this folder; None: a run or a step, which it is when nothing says otherwise."""
    if os.path.isfile(folder / "config.json"):
        return read_huggingface
    if os.path.isfile(folder / quantised.ABOUT):
        return read_quantised
    return None


def read_run(folder: Path, best: bool, step: int | None, tokenizer, say) -> Opened:
    place = folder if step is None else checkpoint.step_dir(folder, step)
    try:
        found = checkpoint.find(place, best, say)
    except UserError as error:
        if error.code == "E304" and not checkpoint.list_steps(folder):
            raise UserError("E304", f"{error.text}{looked_for(folder)}") from None
        raise
    model = adapters.load_model(found)
    anneal_depth(model, found.step)  # where MoD's capacity was
    file = tokenizers.of_run(found.path.parent, found.state.get("tokenizer"))
    reads = load_tokenizer(tokenizer, file)
    if tokenizer and file and not reads.same_ids(tokenizers.load(str(file))):
        say(f"note: {tokenizer} is not the tokenizer that the run was trained with, {file}")
    return Opened(
        model=model,
        tokenizer=reads,
        name=name_of(found.path.parent),
        step=found.step,
        sha256=bases.base_sha256(found.path),
        state=found.state,
        template=chat.template_of_run(found.state),
        folder=found.path,
        kind="adapters" if "adapter" in found.state else "run",
    )


def looked_for(folder: Path) -> str:
    if os.path.isfile(folder / "adapter_config.json"):
        command = f"python finetune.py from_peft {folder} RUN --base BASE"
        return f"; it holds adapters of PEFT: {command} makes a run of them"
    if nearby.hint(folder):
        return ""  # which says better what to take
    places = "a run (step_* folders), one of its steps, a Hugging Face folder (config.json)"
    return f"; a model is {places} or a quantised one ({quantised.ABOUT})"


def read_huggingface(folder: Path, tokenizer) -> Opened:
    from export import read_hf  # upward: the one place that knows foreign names

    cfg, state, _, file = read_hf(folder)
    try:
        model = adapters.filled(cfg, state)
    except RuntimeError as error:
        raise UserError("E401", f"{folder}: {error}") from error
    return Opened(
        model=model,
        tokenizer=load_tokenizer(tokenizer, file),
        name=name_of(folder),
        step=None,
        sha256=bases.base_sha256(folder),
        state={},
        template=bases.read_hf_base(folder).template,
        folder=folder,
        kind="huggingface",
    )


def read_quantised(folder: Path, tokenizer) -> Opened:
    model, about, state = quantised.read(folder)
    file = folder / "tokenizer.json"
    template = about["template"]
    return Opened(
        model=model,
        tokenizer=load_tokenizer(tokenizer, file if file.exists() else None),
        name=name_of(folder),
        step=about["source_step"],
        sha256=about["sha256"],
        state=state,
        template=chat.find_template(template) if template else None,
        folder=folder,
        kind="quantised",
    )


def name_of(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))


def load_tokenizer(asked: str | None, file: Path | None) -> Vocabulary | None:
    spec = expand(asked) if asked else file
    return tokenizers.load(str(spec)) if spec else None
