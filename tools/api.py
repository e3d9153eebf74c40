"""The Python API, from the source: signatures, first paragraphs of docstrings, comments.
`python -m tools.api > docs/api.md`; `model` is docs/api-model.md, `text` docs/api-text.md."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from lumen.commands import METHODS
from lumen.control import KNOBS
from lumen.launch import Words, command
from lumen.model_keys import RANGES

ROOT = Path(__file__).parent.parent
RUN = """# Python: a run

Written by `python -m tools.api`. [The model](api-model.md). [Tokenizers, conversations, models from
disk](api-text.md). [Every key](configuration.md). [A run that breaks and heals](tour.ipynb).

```python
from train import Trainer

# in Lumen's folder; elsewhere: PYTHONPATH=/path/to/lumen
trainer = Trainer(["quickstart", "--max_steps", "40"])  # or a preset's name, a path, a dict of keys
for step in trainer.iterations():  # or trainer.fit()
    if step == 10:
        print(trainer.get_current_metrics())
        trainer.emergency_lr_reduction(factor=2)
code = trainer.end()
```

What cannot be is a `lumen.errors.UserError`: `code`, `text` ([errors.md](errors.md))."""
STEERING = """Between two iterations, on all ranks; or from outside as a line of control.jsonl,
`{"method": NAME, "args": [...] or {...}}` ([orchestrator.md](orchestrator.md)). Layers and experts
count from 0. What changes a run returns a decision, a dict as in decisions.jsonl: `executed`,
`before`, `after`. One that cannot apply changes nothing: `refused` is a code, `reason` says why.
Limits: """
MODEL = """# Python: the model

A run: [api.md](api.md). B batch, T tokens, C = d_model, V vocabulary.

```python
import torch

from model import ModelConfig, Transformer

model = Transformer(ModelConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=2, max_seq_len=32))
model.init_weights(seed=0)
ids = torch.randint(256, (4, 32))  # (B, T)
total, sums = model(ids, targets=ids.roll(-1, 1))  # the mean loss: sums["ce"] / sums["count"]
```"""
TEXT = "# Python: tokenizers, conversations, models from disk\n\nA run: [api.md](api.md)."
ATTRIBUTES = ("cfg", "step", "cursor", "tokens", "latest", "progress", "forecast")
FIT = ("fit", "iterations", "end", "evaluate", "save", "is_finished", "scheduled_lr")
FIT += ("set_micro_batch", "tensors", "close")
ASKED = ("init_weights", "forward", "generate", "n_params", "experts_used", "flops_per_token")
IDS = ("encode", "decode", "decode_bytes", "token_bytes", "control", "to_json", "caveats")
CHAT = ("find_template", "render", "segments", "stop_ids", "default_template", "jinja", "show")
WHOLE = ("Trainer", "forward", "generate", "get_current_metrics", "render")  # all paragraphs
WHOLE += ("expert_statistics", "mod_statistics")


@cache
def definitions(file: str) -> dict[str, ast.AST]:
    """Functions, classes and methods of a file: "Trainer.fit"."""
    found = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for one in [node, *inside]:
            if isinstance(one, ast.FunctionDef | ast.ClassDef):
                found[one.name if one is node else f"{node.name}.{one.name}"] = one
    return found


def about(file: str, name: str) -> str:
    text = ast.get_docstring(definitions(file)[name])
    return " ".join((text if name.rpartition(".")[2] in WHOLE else text.split("\n\n")[0]).split())


def entries(file: str, *names: str, owners=("",)) -> str:
    """- `name(arguments) -> type`: what it does. owners: classes, of which the first has it."""
    lines = []
    for name in names:
        name = next(owner + name for owner in owners if owner + name in definitions(file))
        node = definitions(file)[name]
        arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
        # `a: int=1` as people write it
        shown = re.sub(r"(: [\w. |]+(?:\[[^\]]*\])?[\w. |]*)=", r"\1 = ", arguments)
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        lines.append(f"- `{node.name}({shown}){result}`: {about(file, name)}")
    return "\n".join(lines)


def comment(file: str, name: str) -> str:
    """What stands behind its first assignment."""
    pattern = rf"^ +(?:self\.)?{name}(?::.*?)? = .*?  # (.*)"
    return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1]


def keys() -> str:
    """ModelConfig's fields as a table, each with its default, its range and its comment."""
    fields = [
        n for n in definitions("model.py")["ModelConfig"].body if isinstance(n, ast.AnnAssign)
    ]
    rows = ["| key | default | range | |", "|---|---|---|---|"]
    for name, value in ((n.target.id, ast.unparse(n.value)) for n in fields):
        text = comment("model.py", name).replace("|", "or")
        rows.append(f"| `{name}` | {value} | {RANGES.get(name, '')} | {text} |")
    return "\n".join(rows)


def pages() -> dict[str, list[str]]:
    own = "\n".join(f"- `{name}`: {comment('train.py', name)}" for name in ATTRIBUTES)
    limits = ", ".join(f"{name} {knob.low:g} to {knob.high:g}" for name, knob in KNOBS.items())
    run = [RUN, "## Trainer(config)", about("train.py", "Trainer"), own]
    run += [entries("train.py", *FIT, owners=("Trainer.",)), "## Steering", f"{STEERING}{limits}."]
    run += [entries("lumen/control.py", *METHODS, owners=("Control.", "ByHand."))]
    run += ["## Plans", entries("lumen/plan.py", "memory", "chinchilla", "auto_steps")]
    run += ["## Afterwards"]
    run += ["`python -m lumen.report RUN`: " + about("lumen/story.py", "decisions")]
    run += ["`python -m lumen.checkpoint RUN`: " + about("lumen/checkpoint.py", "main")]
    model = [MODEL, "## Transformer(cfg)", entries("model.py", *ASKED, owners=("Transformer.",))]
    model += ["## ModelConfig", keys()]
    text = [TEXT, "## lumen.tokenizer", entries("lumen/tokenizer.py", "load", "train_bpe")]
    text += ["Of each:", entries("lumen/vocabulary.py", *IDS, owners=("Vocabulary.",))]
    text += ["## lumen.chat", entries("lumen/chat.py", *CHAT), "## Models from disk"]
    text += [entries("lumen/models.py", "open_model"), entries("sample.py", "sample")]
    text += [entries("lumen/checkpoint.py", "find")]
    text += ["## Data", entries("prepare_data.py", "prepare")]
    for name in ("expert_statistics", "mod_statistics"):
        text += [f"## get_{name}()", about("lumen/experts.py", name)]
    return {"run": run, "model": model, "text": text}


def main(argv: list[str]) -> None:
    words = Words(prog="python -m tools.api", description=__doc__)
    words.add_argument("page", nargs="?", default="run", choices=("run", "model", "text"))
    print("\n\n".join(pages()[words.parse_args(argv).page]))


if __name__ == "__main__":
    command(main)
