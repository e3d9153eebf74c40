"""A run as one ONNX file: `python export.py to_onnx out/run FILE`.

The graph scores: ids (batch, length) int64 -> logits (batch, length, V) fp32, both sizes free, the
weights in fp32. It has no cache of keys and values, so to make text with it computes every token
anew; docs/deployment.md says what to take for that. What is known of the model lies in the file's
metadata (`about`), its tokenizer.json too, so the file needs no other. Only where the weights
exceed what a protobuf holds (2 GB) they lie beside it, in FILE.data.

A MoE is exported by a formula that computes all experts for every token (`all_experts`): exact, and
as slow as it says. Mixture of Depths and weights of few bits have no graph here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from lumen import chat, checkpoint, models
from lumen.errors import UserError, a_path, no_path
from lumen.files import sync
from lumen.hf_check import TOLERANCE
from model import Transformer

OPSET = 18  # what onnxruntime 1.14 (2023) reads; later ones would give us nothing
LARGE = 1800 * 2**20  # bytes of weights; with the graph a protobuf holds 2 GiB
INSTALL = "pip install -r requirements-export.txt"
MOST_LOGITS = 2**26  # of the check's longest row: 256 MiB each of theirs and ours


def options(parser) -> None:
    parser.add_argument("run", type=a_path, help="a run, a step of it, or a Hugging Face folder")
    parser.add_argument("file", type=a_path, help="the .onnx file to write")
    parser.add_argument("--check", action="store_true", help="compare logits in onnxruntime")
    parser.add_argument("--best", action="store_true", help="the best step instead of the newest")
    parser.add_argument("--step", type=int, help="the step of this number")


def to_onnx(run, file, check=False, best=False, step=None, say=print, large=LARGE) -> dict:
    """Write the model as an ONNX file; returns its metadata and what `check` found.

    UserError E404: it has no ONNX graph, with the reason; E117: the file exists; E403: it could not
    be written; E003: a package is missing; E402: onnxruntime computes something else; E303: weights
    that are not finite; and those of lumen.models.read_model.
    """
    file = Path(file)
    need_packages("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    data = file.with_name(file.name + ".data")
    for path in (file, data):
        if os.path.lexists(path):
            raise UserError("E117", f"{path} exists: give another name, or remove it first")
        if reason := no_path(str(path)):
            raise UserError("E403", f"{path}: {reason}")
    opened = models.read_model(run, best, step, say=say)
    refuse(opened)
    model = opened.model.eval().requires_grad_(False)
    known = about(opened)
    found = {}
    with written(file) as tmp:
        program = graph(model)
        program.model.metadata_props.update(known)
        n_bytes = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
        program.save(tmp, external_data=n_bytes > large)
        if check:
            found = compare(model, tmp)
    text = f"ONNX, opset {OPSET}, {opened}: {file}"
    if data.exists():
        text += f" and {data.name}, which belongs to it"
    if check:
        text += f"; onnxruntime differs by {found['max_diff']:.1e} at most, over {found['shapes']}"
    say(text)
    return known | found


def need_packages(*names: str) -> None:
    """E003 names the first that cannot be imported."""
    for name in names:
        try:
            __import__(name)
        except Exception as error:  # a third party's package can fail in any way
            text = f"{name} cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
            raise UserError("E003", text) from None


def refuse(opened: models.Opened) -> None:
    """E404 where there is no graph; E303 where a weight is not finite."""
    folder = opened.folder
    if opened.kind == "quantised":
        text = "ONNX holds no matrices of few bits as ours are. Export what it was made from, and "
        text += "use onnxruntime.quantization on the file"
        raise UserError("E404", f"{folder}: {text}")
    if layers := opened.model.sparse_layers("mod"):
        text = f"Mixture of Depths in layers {list(layers)}: how many tokens a layer computes is "
        text += "known only while it computes. sample.py and serve.py make text with this model"
        raise UserError("E404", f"{folder}: {text}")
    if extras := opened.model.cfg.extras:
        text = f"model.extras: {', '.join(extras)}: its graph was never compared with the model"
        raise UserError("E404", f"{folder}: {text}. sample.py and serve.py make text with it")
    for name, tensor in opened.model.state_dict().items():
        if tensor.is_floating_point():
            checkpoint.refuse_nonfinite(f"{folder}: {name}", tensor)


def about(opened: models.Opened) -> dict[str, str]:
    """The file's metadata, all of it text."""
    model, tokenizer, template = opened.model, opened.tokenizer, opened.template
    known = {
        "name": opened.name,
        "step": "" if opened.step is None else str(opened.step),
        "sha256": opened.sha256,  # of the weights and configuration that it was made from
        "max_seq_len": str(model.cfg.max_seq_len),
        "template": json.dumps(chat.describe(template)) if template else "",
    }
    if tokenizer:
        known["tokenizer.json"] = tokenizer.to_json()
        known["eot_id"] = str(tokenizer.eot_id)
        known["n_vocab"] = str(tokenizer.n_vocab)  # logits from here on are padding
    return known


# ---------------------------------------------------------------- the graph


def all_experts(x, p, ids, w13, w2, backend: str, columns: int):
    """What model_moe.plain_experts computes, without its rows by expert, of which no graph knows
    the number: every expert on every token, times its gate or zero. `columns`: what ids are of,
    the experts and behind them those that compute nothing."""
    gates = p.new_zeros(len(x), columns).scatter_add(1, ids, p)[:, : len(w2)]  # (T, E)
    gate, up = (x @ w13.transpose(1, 2)).chunk(2, -1)  # (E, T, I) each
    y = (F.silu(gate) * up) @ w2.transpose(1, 2)  # (E, T, C)
    return (gates.t().unsqueeze(-1) * y).sum(0)


@contextlib.contextmanager
def for_export(model: Transformer):
    """Its experts by `all_experts`, and torch's remarks about its own parts unsaid."""
    layers = model.sparse_layers("moe").values()
    before = [(moe, moe.experts.run, moe.backend) for moe in layers]
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        for moe in layers:
            moe.experts.run = functools.partial(all_experts, columns=moe.router.n)
            moe.backend = "slices"  # not plain, which would not ask `run`
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        for moe, run, backend in before:
            moe.experts.run, moe.backend = run, backend


def graph(model: Transformer):
    """The model as a torch.onnx.ONNXProgram. E404: torch cannot make it."""
    ids = torch.zeros(2, 8, dtype=torch.long)  # sizes of 0 or 1 would be taken for fixed ones
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with for_export(model), torch.no_grad():
            return torch.onnx.export(
                model,
                (ids,),
                dynamic_shapes=(sizes,),
                input_names=["ids"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter can fail in any way
        reason = str(error).strip().partition("\n")[0]
        text = f"torch {torch.__version__} cannot export this model"
        raise UserError("E404", f"{text}: {type(error).__name__}: {reason}") from error


# ---------------------------------------------------------------- the file


@contextlib.contextmanager
def written(file: Path):
    """Where to write, in a folder beside: what is there gets its names when all went well. E403."""
    folder = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(".tmp", file.name + ".", file.parent))
        yield folder / file.name
        # the graph last: while there is none, nobody takes the weights for a model
        for path in sorted(folder.iterdir(), key=lambda path: path.name == file.name):
            sync(path)
            path.rename(file.with_name(path.name))
        sync(file.parent)
    except OSError as error:
        raise UserError("E403", f"{file}: {error}") from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def compare(model: Transformer, file: Path) -> dict:
    """{max_diff, shapes, onnxruntime} of logits in onnxruntime on the CPU against ours. E402: they
    differ by more than TOLERANCE, of the largest logit where that is above 1: fp32 itself, against
    fp64, costs SmolLM2-135M 2.5e-4 at logits up to 34."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    cfg = model.cfg
    longest = max(1, min(cfg.max_seq_len, MOST_LOGITS // cfg.vocab_size))
    shapes = [(1, 1), (3, 1), (1, 7), (3, 7), (1, longest)]
    generator = torch.Generator().manual_seed(0)
    diffs, close = [], True
    for shape in shapes:
        ids = torch.randint(cfg.vocab_size, shape, generator=generator)
        theirs = torch.from_numpy(session.run(["logits"], {"ids": ids.numpy()})[0])
        ours = model(ids)
        diffs.append((theirs - ours).abs().max().item())
        close &= diffs[-1] <= TOLERANCE * max(1.0, ours.abs().max().item())  # a NaN is not
    sizes = ", ".join(f"{rows}x{length}" for rows, length in shapes)
    if not close:
        text = f"logits differ by {diffs} at {sizes} in onnxruntime {onnxruntime.__version__}"
        raise UserError("E402", f"{file.name}: {text}; it was not kept")
    return {"max_diff": max(diffs), "shapes": sizes, "onnxruntime": onnxruntime.__version__}
