"""Whether a GGUF file says what the run does: every tensor read back, logits under transformers
where it reads such a file, and all of it under llama.cpp where LLAMA_PYTHON names a Python that has
llama-cpp-python (tools/llama_says.py asks it)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from lumen import chat, hf
from lumen.errors import UserError
from lumen.gguf_model import Plan, folded, stored_as, tensors
from lumen.gguf_vocabulary import chat_template, special_ids
from lumen.hf_check import TEXTS, TOLERANCE, import_transformers
from model import Transformer

# transformers' reader takes the shape of the model from a configuration that we give it: its own
# mapping of keys has no width of a head for Qwen3
READABLE = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
ASK = Path(__file__).parent.parent / "tools" / "llama_says.py"
# llama.cpp rounds what goes into a product of f16, bf16 or q8_0 too, and then a router may choose
# otherwise: those are held to this share of the logits' spread, in half of the rows
LOOSE = {"f16": 0.01, "bf16": 0.03, "q8_0": 0.06}
N_NEW = 24


def check(gguf, file: Path, made: Plan, source, dtype: str) -> dict:
    """{what was compared: how many tensors, the largest difference of logits, or why it was not}.
    E402: it is not the same."""
    found = {"tensors": read_back(gguf, file, made, dtype)}
    model = rounded(gguf, made, source, dtype)
    found |= by_transformers(file, made, model) | by_llama_cpp(file, made, source, model, dtype)
    return found


def told(report: dict) -> list[str]:
    """Its findings for people, where there are any."""
    found = []
    if "tensors" in report:
        found.append(f"{report['tensors']} tensors read back")
    for reader in ("transformers", "llama.cpp"):
        value = report.get(reader)
        if value is not None:
            said = value if isinstance(value, str) else f"logits within {value:.2g}"
            found.append(f"{reader}: {said}")
    return found


# ---------------------------------------------------------------- our own reading


def read_back(gguf, file: Path, made: Plan, dtype: str) -> int:
    """How many tensors are there, each with our values as `dtype` rounds them."""
    table = tensors(made)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if there.keys() != table.keys():
        raise UserError("E402", f"{file}: tensors {sorted(there.keys() ^ table.keys())[:4]}")
    for name, ours in table.items():
        kind = stored_as(gguf, name, ours, dtype)
        values = gguf.quants.dequantize(there[name].data, there[name].tensor_type)
        bound = largest_error(gguf, ours, kind)
        error = (torch.from_numpy(values.copy()).view(ours.shape) - ours).abs()
        if there[name].tensor_type != kind or not (error <= bound).all():
            raise UserError("E402", f"{file}: {name} is off by up to {error.max():.3g}")
    return len(table)


def largest_error(gguf, ours: torch.Tensor, kind) -> torch.Tensor:
    """By how much rounding may change each value. q8_0: half of its block's step, which is its
    largest value / 127 and itself rounded to f16."""
    kinds = gguf.GGMLQuantizationType
    size = ours.abs()
    if kind == kinds.F16:
        return size * 2.0**-11 + 2.0**-25
    if kind == kinds.BF16:
        return size * 2.0**-8
    if kind == kinds.Q8_0:
        blocks = size.reshape(-1, 32).amax(1, keepdim=True).expand(-1, 32)
        return (blocks / 127 * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25).reshape(ours.shape)
    return size * 0


def rounded(gguf, made: Plan, source, dtype: str) -> Transformer:
    """Our model with the values that the file has; what rounding costs is not part of a
    difference."""
    state = source.model.state_dict()
    for name, p in source.model.named_parameters():
        if name.endswith("router.weight"):
            continue
        kind = stored_as(gguf, name, p, dtype)
        scale = folded(made) if name.endswith("experts.w2") else 1.0
        values = gguf.quants.quantize((p.detach() * scale).numpy(), kind)
        values = torch.from_numpy(gguf.quants.dequantize(values, kind).copy())
        state[name] = values.view(p.shape) / scale
    model = Transformer(made.cfg).eval()
    model.load_state_dict(state)
    return model


def rows_of(cfg, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(n, (2, min(48, cfg.max_seq_len)), generator=generator)


# ---------------------------------------------------------------- transformers


@torch.no_grad()
def by_transformers(file: Path, made: Plan, model: Transformer) -> dict:
    kind = hf.model_type(made.cfg)
    scaled = (made.cfg.rope_scaling or {}).get("rope_type", "default") != "default"
    if READABLE.get(kind) != made.arch or scaled:
        return {"transformers": f"cannot read {made.arch} of this kind"}
    try:
        transformers = import_transformers()
    except UserError as error:
        return {"transformers": error.text}
    config = hf.hf_config(made.cfg, "float32", {}, made.n_experts)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    auto = transformers.AutoModelForCausalLM
    how = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    try:
        theirs = auto.from_pretrained(file.parent, **how).eval()
    except ImportError as error:
        return {"transformers": str(error).strip()}
    except Exception as error:  # whatever it raises, the file does not do what it promises
        text = f"transformers {transformers.__version__} cannot load {file}: {error}"
        raise UserError("E402", text) from error
    idx = rows_of(made.cfg, made.cfg.vocab_size)
    difference = (theirs(idx).logits - model(idx)).abs().max().item()
    if not difference <= TOLERANCE:  # a NaN is not
        raise UserError("E402", f"{file}: transformers' logits differ by {difference:.3g}")
    return {"transformers": difference}


# ---------------------------------------------------------------- llama.cpp


def find_python() -> str | None:
    """LLAMA_PYTHON, where it is set. E003: it cannot do what it is named for, which one would
    rather know before a large file is written."""
    python = os.environ.get("LLAMA_PYTHON")
    if not python:
        return None
    words = [python, "-c", "import llama_cpp"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError("E003", f"LLAMA_PYTHON={python}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        text = f"LLAMA_PYTHON={python} -m pip install llama-cpp-python"
        raise UserError("E003", f"{text} ({last})")
    return python


def ask(python: str, file: Path, asked: dict, context: int) -> dict:
    """What tools/llama_says.py answers; logits: float32 (tokens, V). E402: it could not."""
    with tempfile.TemporaryDirectory() as own:
        logits = os.path.join(own, "logits.npy")
        words = [python, str(ASK), str(file), "--context", str(context), "--logits", logits]
        done = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True)
        if done.returncode:
            raise UserError("E402", f"{file}: llama.cpp: {done.stderr.strip()[-600:]}")
        answer = json.loads(done.stdout)
        if asked.get("rows"):
            answer["logits"] = torch.from_numpy(np.load(logits))
    return answer


def questions(made: Plan, source) -> dict:
    cfg, tokenizer = made.cfg, source.tokenizer
    rows = rows_of(cfg, tokenizer.n_vocab).tolist()
    asked = {"texts": TEXTS, "rows": rows, "prompt": rows[0][:8], "n_new": N_NEW}
    asked["n_new"] = min(N_NEW, cfg.max_seq_len - 8)
    if chat_template(source):
        asked["messages"] = [{"role": "user", "content": "Is 7 a prime?"}]
    return asked


@torch.no_grad()
def by_llama_cpp(file: Path, made: Plan, source, model: Transformer, dtype: str) -> dict:
    python = find_python()
    if not python:
        return {"llama.cpp": "not asked: LLAMA_PYTHON names no Python with llama-cpp-python"}
    asked = questions(made, source)
    answer = ask(python, file, asked, made.cfg.max_seq_len)
    ours = model(torch.tensor(asked["rows"])).flatten(0, 1)
    said, wrong = held_to(answer["logits"], ours, dtype)
    for text, ids in zip(TEXTS, answer["ids"]):
        if ids != source.tokenizer.encode(text).tolist():
            wrong.append(f"{text!r} has other ids")
    gap = greedy_gap(model, asked["prompt"], answer["greedy"])
    if dtype == "f32" and not gap <= 2 * TOLERANCE * max(1.0, ours.std().item()):
        wrong.append(f"it chooses tokens whose logits are {gap:.3g} below the largest")
    wanted = special_ids(source, source.template)["eos"]
    if missing := set(wanted) - set(answer["ends"]):
        wrong.append(f"ids {sorted(missing)} do not end a text")
    wrong += other_prompt(source, asked, answer)
    if wrong:
        raise UserError("E402", f"{file}: in llama.cpp {'; '.join(wrong[:6])}")
    return {"llama.cpp": said}


def held_to(theirs: torch.Tensor, ours: torch.Tensor, dtype: str) -> tuple[float | str, list[str]]:
    """(what to say of the logits (T, V), what is wrong with them)."""
    spread = ours.std().item()
    off = theirs - ours
    largest = off.abs().max().item()
    if dtype == "f32":
        bound = TOLERANCE * max(1.0, spread)
        good = largest <= bound  # a NaN is not
        return largest, [] if good else [f"logits differ by {largest:.3g}, more than {bound:.3g}"]
    share = off.square().mean(1).sqrt().median().item() / spread
    said = f"half of the rows of logits within {share:.2g} of their spread"
    good = share <= LOOSE[dtype]
    return said, [] if good else [f"{said}, more than {LOOSE[dtype]:.3g}"]


def greedy_gap(model: Transformer, prompt: list[int], chosen: list[int]) -> float:
    """By how much our logits of the chosen tokens are below the largest, at most."""
    logits = model(torch.tensor([prompt + chosen]))[0, len(prompt) - 1 : -1]  # (n_new, V)
    of_them = logits[torch.arange(len(chosen)), torch.tensor(chosen)]
    return (logits.max(-1).values - of_them).max().item()


def other_prompt(source, asked: dict, answer: dict) -> list[str]:
    """Whether the template in the file gives the text that ours gives."""
    if not source.template or "messages" not in asked:
        return []
    messages = [chat.Message(**message) for message in asked["messages"]]
    ids, _ = chat.render(messages, source.template, source.tokenizer, open_reply=True)
    text = source.tokenizer.decode(ids)
    if answer["conversation"].endswith(text):  # it may begin with a system turn of its own
        return []
    return [f"its template gives {answer['conversation']!r}, ours {text!r}"]
