"""A model of few bits as a folder: `python export.py quantize RUN DIR` writes it,
lumen/models.py opens it.

    DIR/EXPORT.json        format 2, kind "quantised", method, bits; source, source_step and
                           source_sha256; what was converted; the calibration; bits per byte before
                           and after; bytes before and after; the chat template; size and sha256 of
                           the other files, and its own sha256
        config.yaml        the model: block
        model.safetensors  NAME.q and NAME.scale of each converted matrix, all else by its own name
        state.json         of the step that it was made from, {} of a Hugging Face folder
        tokenizer.json, token_bytes.npy    where the source had a tokenizer

NAME is as in Transformer.state_dict(), without ".weight": blocks.0.attn.wqkv.q int8 (out, in) and
.scale (out,), w ~ scale q; blocks.0.ffn.experts.w13_q (E, 2 I, C) and w13_scale (E, 2 I)
(lumen/quantize.py). In 4 bits q is uint8 (out, in / 2), two inputs a byte, the even one low, and
scale (out, in / group), w ~ scale (q - 8); group is the largest of 128, 64, 32 that divides in
(lumen/fewbits.py). Format 1 was the same without 4 bits. Embedding, head, norms and routers are not
converted. Floats are held in bf16 where that loses nothing, which is so of every scale, else in
fp32.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from lumen import chat, checkpoint, gptq
from lumen.calibration import Judge, calibration_rows, check_loss
from lumen.errors import UserError
from lumen.experts import anneal_depth
from lumen.files import read_json, sha256, write_json
from lumen.model_keys import model_from_keys
from lumen.quantize import n_parameters, quantised_layers, quantize, summary
from model import Transformer

ABOUT = "EXPORT.json"
FORMAT = 2  # of the folder; a reader refuses a larger one
KINDS = {8: "int8", 4: "int4"}  # bits -> kind of lumen/quantize.py
METHODS = ("rtn", "gptq")
MAX_LOSS = 10.0  # percent more bits per byte: beyond it something is broken, not rounded


# ---------------------------------------------------------------- write


@dataclasses.dataclass
class How:
    """How a model is quantised, as `export.py quantize` has it."""

    bits: int = 8
    method: str = "rtn"  # round to nearest | gptq
    max_loss: float | None = None  # percent more bits per byte; None: as MAX_LOSS
    eval_tokens: int = 65536  # held-out tokens to measure on; 0: none
    val_data: str | None = None  # a prepared folder to measure on, not the run's own
    calibrate: str | None = None  # text for gptq: a file or a prepared folder, not the run's own
    calibrate_tokens: int = 65536
    act_order: bool = False  # gptq: columns of large inputs first


def write(source, folder: Path, how: How, say) -> dict:
    """Fill an empty folder; returns what EXPORT.json says. source: models.Opened, in fp32 on the
    CPU; its model is quantised in place. E303: its weights are not finite; E401: it is quantised
    already; E405: it loses more than it may; and what calibration and measuring raise."""
    if source.kind == "quantised":
        raise UserError("E401", f"{source.folder} is quantised already; take what it was made from")
    for name, tensor in source.model.state_dict().items():
        checkpoint.refuse_nonfinite(f"{source.folder}: {name}", tensor)
    # all that can be refused comes before the work
    judge = Judge(source, how.eval_tokens, how.val_data, say)
    if judge.task is None:
        check_loss(None, how.max_loss, how.max_loss is not None)
    rows, calibration = None, None
    if how.method == "gptq":
        rows, calibration = calibration_rows(source, how.calibrate, how.calibrate_tokens)
    before = n_bytes(stored(source.model))
    judge.measure(source.model)
    kind, nearest = KINDS[how.bits], []
    if rows is None:
        say(quantize(source.model, kind))
    else:
        report = gptq.quantize(source.model, kind, rows, say, how.act_order)
        nearest = report.nearest
        say(summary(source.model, kind))
        say(f"gptq       {report}, from {calibration}")
        calibration = {"data": calibration, "tokens": report.tokens, "act_order": how.act_order}
    judge.measure(source.model)
    found = judge.report()
    if found:
        numbers = f"{found['before']:.4f} to {found['after']:.4f} {found['metric']}"
        say(f"measured   {numbers}, {found['loss_percent']:+.2f} %, {found['tokens']:,} tokens")
    most = MAX_LOSS if how.max_loss is None else how.max_loss
    check_loss(found, most, asked=False)
    tensors = stored(source.model)
    checkpoint.save_tensors(tensors, folder / "model.safetensors")
    config = {"model": dataclasses.asdict(source.model.cfg)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(folder / "state.json", source.state)
    if source.tokenizer:
        source.tokenizer.save(folder / "tokenizer.json")
        np.save(folder / "token_bytes.npy", source.tokenizer.token_bytes())
    about = {
        "format": FORMAT,
        "kind": "quantised",
        "method": how.method,
        "bits": how.bits,
        "source": str(source.folder),
        "source_step": source.step,
        "source_sha256": source.sha256,
        "template": chat.describe(source.template) if source.template else None,
        "converted": sorted(quantised_layers(source.model)),
        "rounded_to_nearest": nearest,  # by gptq, for want of inputs
        "calibration": calibration,
        "measured": found,  # before, after, loss_percent
        "parameters": n_parameters(source.model),
        "bytes_before": before,
        "bytes_after": n_bytes(tensors),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "files": {},
    }
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            about["files"][file.name] = {"sha256": sha256(file), "size": file.stat().st_size}
    about["sha256"] = checkpoint.manifest_sha256(about)
    write_json(folder / ABOUT, about)
    return about


def stored(model: Transformer) -> dict[str, torch.Tensor]:
    """All that is written of a model, each tensor as small as it loses nothing."""
    tensors = model.state_dict() | packed(model)
    return {name: smallest(tensor).contiguous() for name, tensor in tensors.items()}


def packed(model: Transformer) -> dict[str, torch.Tensor]:
    """The buffers of few bits, which are in no state_dict."""
    found = {}
    for name, layer in quantised_layers(model).items():
        found |= dict(layer.named_buffers(name))
    return found


def smallest(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    short = tensor.bfloat16()
    return short if torch.equal(short.float(), tensor) else tensor


def n_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


# ---------------------------------------------------------------- read


def read(folder: Path) -> tuple[Transformer, dict, dict]:
    """(model with the bits that `write` had, EXPORT.json, state.json), every byte checked.

    UserError E303: it is damaged; E306: a newer Lumen wrote it; E401: it is something else.
    """
    about = read_about(folder)
    wrong = checkpoint.wrong_files(folder, about["files"])
    if wrong:
        raise UserError("E303", f"{folder}: {'; '.join(wrong)}; quantise its source once more")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        cfg = model_from_keys(config["model"])
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise UserError("E306", f"{folder / 'config.yaml'}: {error}") from error
    with torch.device("meta"):
        model = Transformer(cfg)
    quantize(model, KINDS[about["bits"]])
    try:
        tensors = load_file(folder / "model.safetensors")
        fill(model, tensors)
    except (OSError, SafetensorError, LookupError, RuntimeError) as error:
        raise UserError("E305", f"{folder}: {error}") from error
    anneal_depth(model, about["source_step"] or 0)
    return model, about, checkpoint.modernised(read_json(folder / "state.json", "E303"))


def read_about(folder: Path) -> dict:
    about = read_json(folder / ABOUT, "E303")
    if about.get("kind") != "quantised":
        text = f"{folder} is no quantised model, by its {ABOUT}, and has no config.json"
        raise UserError("E401", f"{text} of a Hugging Face one")
    if about.get("sha256") != checkpoint.manifest_sha256(about):
        raise UserError("E303", f"{folder}: {ABOUT} has another sha256")
    if about["format"] > FORMAT or about["bits"] not in KINDS:
        what = f"has format {about['format']} and {about['bits']} bits"
        text = f"this Lumen reads format {FORMAT} and {', '.join(map(str, KINDS))} bits"
        raise UserError("E306", f"{folder} {what}, {text}")
    return about


def fill(model: Transformer, tensors: dict[str, torch.Tensor]) -> None:
    """Put stored tensors into a quantised model on the meta device. KeyError, RuntimeError: they
    are not its own."""
    floats = {}
    for name, tensor in tensors.items():
        floats[name] = tensor.float() if tensor.is_floating_point() else tensor
    for path, layer in quantised_layers(model).items():
        for name, buffer in layer.named_buffers():
            made = floats.pop(f"{path}.{name}")
            if made.shape != buffer.shape or made.dtype != buffer.dtype:
                raise RuntimeError(f"{path}.{name}: {made.dtype} {list(made.shape)}")
            setattr(layer, name, made)
    model.load_state_dict(floats, assign=True)
