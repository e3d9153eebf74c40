"""Runs that hold adapters only: read with their base, merged into a model, and as PEFT writes them.

    python finetune.py merge RUN OUT [--check] [--best]
    python finetune.py to_peft RUN DIR [--base HF_FOLDER] [--best]
    python finetune.py from_peft DIR RUN --base BASE

A base is named by its path and by a sum of its bytes: another one is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path

import torch

from lumen import base as bases
from lumen import chat, checkpoint, lora, peft_files
from lumen import tokenizer as tokenizers
from lumen.checkpoint import Checkpoint
from lumen.config import LoraConfig
from lumen.errors import UserError, a_path, expand
from lumen.files import write_json
from lumen.hf import refusals
from lumen.hf_check import TOLERANCE
from lumen.launch import Words, command
from model import ModelConfig, Transformer

# ---------------------------------------------------------------- with their base


def load_model(found: Checkpoint) -> Transformer:
    """The model that a step holds, in fp32 on the CPU, adapters merged.

    E305: its tensors do not fit its configuration; E311: its adapters are for another base, or that
    one is gone.
    """
    try:
        if "adapter" not in found.state:
            return filled(found.model_config(), found.model_state())
        model = load_adapted(found)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("E305", f"{found.path}: {error}") from error
    lora.merge(model)
    return model


def filled(cfg: ModelConfig, state: dict) -> Transformer:
    with torch.device("meta"):  # no memory, no initialisation
        model = Transformer(cfg)
    model.load_state_dict(state, assign=True)
    return model


def load_adapted(found: Checkpoint) -> Transformer:
    """The base in fp32, or as it was quantized, with the adapters that the step holds around it."""
    about = found.state["adapter"]
    model = filled(found.model_config(), base_state(find_base(found)))
    if about["quantize_base"]:
        from lumen.quantize import quantize

        quantize(model, about["quantize_base"])
    lora.add(model, lora_config(about), 0, about["fresh_ids"])
    state = found.model_state()
    lacking = sorted(set(lora.adapter_names(model)) - set(state))
    too_many = model.load_state_dict(state, strict=False).unexpected_keys
    if lacking or too_many:
        raise ValueError(f"tensors lacking: {lacking[:4]}; too many: {too_many[:4]}")
    return model


def lora_config(about: dict) -> LoraConfig:
    names = [field.name for field in dataclasses.fields(LoraConfig)]
    return LoraConfig(**{name: about[name] for name in names})


def find_base(found: Checkpoint) -> Path:
    """Where the base of these adapters is: as its path was written, or from the run's folder or one
    above it. E311: it is gone, or another model."""
    about = found.state["adapter"]
    run = found.path.resolve().parent
    places = dict.fromkeys(place / about["base"] for place in (Path(), run, *run.parents))
    others = []
    for place in places:
        if not (place / "config.json").is_file() and not (place / "manifest.json").is_file():
            continue
        sum_here = bases.base_sha256(place)
        if sum_here == about["base_sha256"]:
            return place
        others.append(f"{place} is another model (sha256 {sum_here})")
    text = f"{found.path} holds adapters for {about['base']} (sha256 {about['base_sha256']})"
    raise UserError("E311", f"{text}; {'; '.join(others) or 'that is gone'}")


def base_state(path: Path) -> dict[str, torch.Tensor]:
    """E303, E304, E401."""
    if (path / "config.json").is_file():
        from export import read_hf  # upward: the one place that knows foreign names

        return read_hf(path)[1]
    return checkpoint.find(path).model_state()


class Merged:
    """A step with adapters as if it held the merged model: all that export.py asks of a step."""

    def __init__(self, found: Checkpoint):
        self.path, self.step, self.state = found.path, found.step, found.state
        self.model_config = found.model_config
        self.weights = load_model(found).state_dict()
        self.tensors = {f"model.{n}": {"shape": list(t.shape)} for n, t in self.weights.items()}

    def model_state(self) -> dict[str, torch.Tensor]:
        return dict(self.weights)

    def read(self, name: str, offset=None, shape=None) -> torch.Tensor:
        tensor = self.weights[name.removeprefix("model.")]
        offset = offset or [0] * tensor.dim()
        shape = tensor.shape if shape is None else shape
        return tensor[tuple(slice(a, a + n) for a, n in zip(offset, shape))].detach().clone()


def merged(found: Checkpoint) -> Checkpoint | Merged:
    return Merged(found) if "adapter" in found.state else found


# ---------------------------------------------------------------- merge


def find_adapter(run, best: bool, say) -> Checkpoint:
    """E002: it holds a whole model."""
    found = checkpoint.find(run, best, say)
    if "adapter" not in found.state:
        raise UserError("E002", f"{found.path} holds a whole model, and no adapters")
    return found


@torch.no_grad()
def some_logits(model: Transformer) -> torch.Tensor:
    """(2, T, V) of random ids."""
    generator = torch.Generator().manual_seed(0)
    T = min(64, model.cfg.max_seq_len)
    return model.eval()(torch.randint(model.cfg.vocab_size, (2, T), generator=generator))


def merge(run, out, check=False, best=False, say=print) -> dict:
    """Write adapters and base as one run of a whole model, step 0; returns what its MERGE.json
    says.

    check: the logits of both, and of the merged model exported under transformers where that is
    installed. E402: they differ; E300: out is used.
    """
    import export  # upward: the one place that writes runs without a Trainer

    found = find_adapter(run, best, say)
    model = load_adapted(found)
    before = some_logits(model) if check else None
    lora.merge(model)
    report = {"source": str(found.path), "source_step": found.step}
    report |= {"adapter": found.state["adapter"], "versions": export.versions()}
    if check:
        report["max_diff"] = (some_logits(model) - before).abs().max().item()
        if not report["max_diff"] <= TOLERANCE:  # a NaN is not
            text = f"{found.path}: merging changes logits by {report['max_diff']}"
            raise UserError("E402", text)
    about = {"imported": {"from": str(found.path), "dtype": "float32"}}
    if template := chat.template_of_run(found.state):
        about["template"] = chat.describe(template)
    tokenizer = tokenizers.of_run(found.path.parent, found.state.get("tokenizer"))
    export.write_step(out, model.cfg, model.state_dict(), about, tokenizer, say)
    if check:
        report["exported"] = check_exported(out, model, say)
        if isinstance(report["exported"], str):
            say(f"note: as a Hugging Face model {report['exported']}")
    write_json(Path(out) / "MERGE.json", report)
    done = f"{model.n_params()['total']:,} parameters, adapters of step {found.step} merged: {out}"
    say(f"{done}, logits within {report['max_diff']:.1e}" if check else done)
    return report


def check_exported(run, model: Transformer, say) -> dict | str:
    """What export.py's check finds of a merged run; or why it is not asked."""
    import export  # upward, as above

    if why := refusals(model.cfg):
        return f"not exported: {why[0]}"
    if importlib.util.find_spec("transformers") is None:
        return "not checked: transformers is not installed"
    with tempfile.TemporaryDirectory(dir=Path(run).resolve().parent) as tmp:
        found = export.to_hf(run, Path(tmp) / "hf", check=True, say=lambda text: None)
    return {key: found[key] for key in ("architecture", "max_diff", "greedy_equal", "ids_equal")}


# ---------------------------------------------------------------- PEFT's folders


def to_peft(run, folder, base=None, best=False, say=print) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft.PeftModel reads; base:
    the Hugging Face folder that they name. E400: PEFT cannot express them."""
    import export  # upward, as above

    found = find_adapter(run, best, say)
    about = found.state["adapter"]
    where = find_base(found)
    config, tensors = peft_files.write(found, str(base or where))
    if base is None and not (where / "config.json").is_file():
        say("note: PEFT needs that base as python export.py to_hf writes it: --base DIR names it")
    if about["quantize_base"]:
        kind = about["quantize_base"]
        say(f"note: they were trained with a base in {kind}: with another precision logits differ")
    with export.new_folder(folder, "E117") as tmp:
        checkpoint.save_tensors(tensors, tmp / "adapter_model.safetensors")
        write_json(tmp / "adapter_config.json", config)
    say(f"{len(tensors)} tensors, step {found.step}: {folder}")


def from_peft(folder, run, base, say=print) -> None:
    """Make a run, step 0, of a PEFT folder's adapters for `base`, a run, a step or a Hugging Face
    folder. E401: what is in it cannot be read exactly."""
    import export  # upward, as above

    known = bases.read_base(str(base))
    where = Path(base)
    if not (where / "config.json").is_file():
        where = checkpoint.find(where, say=say).path
    settings, state, fresh = peft_files.read(Path(folder), known.model)
    if fresh:
        state |= fresh_rows(fresh, base_state(where))
    ids = sorted({i for rows in fresh.values() for i in rows})
    adapter = settings | {"fresh_ids": ids, "quantize_base": None}
    adapter |= {"base": str(where), "base_sha256": bases.base_sha256(where)}
    about = {"adapter": adapter, "imported": {"from": str(Path(folder).resolve())}}
    if known.template:
        about["template"] = chat.describe(known.template)
    export.write_step(run, known.model, state, about, known.tokenizer, say)
    say(f"r {adapter['r']}, {len(adapter['targets'])} matrices of {where}: {run}")


def fresh_rows(fresh: dict, weights: dict) -> dict[str, torch.Tensor]:
    """fresh: {table: {id: row}}; a table's rows that only the other one trains are the base's."""
    ids = sorted({i for rows in fresh.values() for i in rows})
    state = {}
    for table in ("embed", "head"):
        key = f"{table}.weight"
        if key in weights:
            rows = [fresh.get(table, {}).get(i, weights[key][i]) for i in ids]
            state[f"{table}.rows"] = torch.stack([row.float() for row in rows])
    return state


# ---------------------------------------------------------------- the commands


def main(argv: list[str]) -> None:
    """Adapters: merged with their base, written for PEFT, read from PEFT."""
    parser = Words(prog="finetune.py", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("merge", help="adapters and their base become a run of a whole model")
    p.add_argument("run", type=a_path, help="a run that holds adapters, or one of its steps")
    p.add_argument("out", type=a_path, help="a new folder")
    p.add_argument("--check", action="store_true", help="compare logits before and after")
    p.add_argument("--best", action="store_true", help="the best step instead of the newest")
    p = commands.add_parser("to_peft", help="adapters to a folder that PeftModel reads")
    p.add_argument("run", type=a_path)
    p.add_argument("folder", type=a_path, help="a new folder")
    p.add_argument("--base", type=a_path, help="the base as a Hugging Face folder, to be named")
    p.add_argument("--best", action="store_true")
    p = commands.add_parser("from_peft", help="a PEFT folder to a run that holds adapters")
    p.add_argument("folder", type=a_path)
    p.add_argument("run", type=a_path, help="a new folder")
    p.add_argument(
        "--base", type=a_path, required=True, help="a run, a step, a Hugging Face folder"
    )
    args = vars(parser.parse_args(argv))
    for key in ("run", "out", "folder", "base"):
        if args.get(key):
            args[key] = expand(args[key])
    run = {"merge": merge, "to_peft": to_peft, "from_peft": from_peft}[args.pop("command")]
    run(**args)


if __name__ == "__main__":
    command(main, lasting=True)
