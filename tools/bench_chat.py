"""What fine-tuning teaches: held-out replies, multiple choice and preferences about the library's
docstrings, before and after. `learn_chat` of tools/bench.py.

Train and held-out rows have no top-level module of the library in common (lumen/docstrings.py), and
no docstring's first paragraph.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import finetune
import prepare_data
import sample
from lumen import chat, files
from lumen import tokenizer as tokenizers
from lumen.base import read_base
from lumen.chat import Message
from lumen.conversations import Reader
from lumen.docstrings import docstring_rows
from lumen.errors import UserError, expand
from tools import timing

VARIANTS = {  # what each changes; those after a "+" go on from the SFT of all weights
    "base": None,
    "SFT": {},
    "SFT, LoRA r 8": {"lora.r": 8},
    "SFT, LoRA r 32": {"lora.r": 32},
    "SFT, int8 base, LoRA r 8": {"lora.r": 8, "quantize_base": "int8"},
    "SFT + DPO": {"method": "dpo"},
    "SFT + SimPO": {"method": "simpo"},
    "SFT + more SFT": {},
}
AFTER = "SFT + "
TEMPLATE = "chatml"
WORDS = ("--device", "cpu", "--compile_model", "false", "--resume", "none", "--overwrite", "true")
WORDS += ("--save_interval", "0", "--log_interval", "1000000", "--eval_interval", "0")

# ---------------------------------------------------------------- what is measured


class Held:
    """Held-out conversations, questions with four choices, and pairs, as ids and masks."""

    def __init__(self, own, limit: int, most: int):
        self.own, self.limit = own, limit
        reader = Reader()
        self.replies = self.rendered(map(reader.messages, docstring_rows("chat", "val")), most)
        choices, self.answers = [], []
        for row in docstring_rows("choice", "val"):
            question = Message("user", row["question"])
            four = [[question, Message("assistant", text)] for text in row["choices"]]
            found = self.rendered(four, 4)
            if len(found) == 4 and len(self.answers) < most:
                choices += found
                self.answers.append(row["answer"])
        self.choices = choices
        self.pairs = []
        for row in docstring_rows("pairs", "val"):
            found = self.rendered(reader.pair(row), 2)
            if len(found) == 2 and len(self.pairs) < 2 * most:
                self.pairs += found

    def rendered(self, conversations, most: int) -> list:
        """(ids, mask) of the first `most` that fit into the context."""
        found = []
        for messages in conversations:
            ids, mask = chat.render(messages, TEMPLATE, self.own)
            if len(ids) <= self.limit and len(found) < most:
                found.append((ids, mask))
        return found

    def measure(self, model) -> dict:
        """reply_loss: nats a token; choice and preference: shares that are right, by the mean
        log-probability of a reply's tokens; preference_sum: by their sum; pairs: those sums."""
        sums, counts = log_probabilities(model, self.replies)
        found = {"reply_loss": -(sum(sums) / sum(counts))}
        means = [a / b for a, b in zip(*log_probabilities(model, self.choices))]
        picked = [four.index(max(four)) for four in in_groups(means, 4)]
        found["choice"] = share(a == b for a, b in zip(picked, self.answers))
        sums, counts = log_probabilities(model, self.pairs)
        means = [a / b for a, b in zip(sums, counts)]
        found["preference"] = share(a > b for a, b in in_groups(means, 2))
        found["preference_sum"] = share(a > b for a, b in in_groups(sums, 2))
        chosen, rejected = means[::2], means[1::2]
        found |= {"chosen": statistics.mean(chosen), "rejected": statistics.mean(rejected)}
        return found | {"pairs": sums}


def in_groups(values: list, n: int) -> list:
    return [values[i : i + n] for i in range(0, len(values), n)]


def share(right) -> float:
    return statistics.mean(map(float, right))


@torch.no_grad()
def log_probabilities(model, rows: list, batch: int = 16) -> tuple[list[float], list[int]]:
    """Of the supervised tokens of each row: the sum of their log-probabilities, and how many."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    for some in in_groups(order, batch):
        T = len(rows[some[-1]][0])
        x = torch.zeros(len(some), T, dtype=torch.long)
        learned = torch.zeros(len(some), T)
        for row, i in enumerate(some):
            ids, mask = rows[i]
            x[row, : len(ids)] = torch.from_numpy(ids.astype("int64"))
            learned[row, : len(ids)] = torch.from_numpy(mask.astype("float32"))
        logits = model(x[:, :-1]).float()  # (B, T - 1, V); what follows a row is not seen by it
        logp = -F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        for i, total in zip(some, (logp * learned[:, 1:]).double().sum(1).tolist()):
            sums[i] = total
        for i, n in zip(some, learned[:, 1:].sum(1).int().tolist()):
            counts[i] = n
    return sums, counts


# ---------------------------------------------------------------- runs


def learn_chat(words: list[str]) -> int:
    """One file per run in --out, then the table; a run that --out holds is not repeated."""
    o = timing.options(
        words,
        base="",
        out="out/learn_chat",
        seeds=3,
        only="",
        steps=60,
        pair_steps=40,
        rows=8,
        most=240,
        factors="1",
        precision="auto",
        measured="fp32",
    )
    only = o.only.split(";") if o.only else list(VARIANTS)
    if unknown := [name for name in only if name not in VARIANTS]:
        text = f"--only: no {', '.join(unknown)}; there are: {'; '.join(VARIANTS)}"
        raise UserError("E002", text)
    if not o.base:
        raise UserError("E002", "--base RUN: which model is to be taught?")
    out = Path(expand(o.out))
    out.mkdir(parents=True, exist_ok=True)
    where = {"machine": timing.machine_line()}
    found = read_base(expand(o.base))
    own = tokenizers.load(str(found.tokenizer))
    T = min(512, found.model.max_seq_len)
    how = {"seq_len": T, "template": TEMPLATE, "quiet": True}
    prepare_data.prepare(["docstrings"], str(out / "chats"), str(found.tokenizer), **how)
    # every third: their reference is computed before the first step
    some = itertools.islice(docstring_rows("pairs"), 0, None, 3)
    lines = "".join(f"{json.dumps(row)}\n" for row in some)
    (out / "pairs.jsonl").write_text(lines, encoding="utf-8")
    sources = [str(out / "pairs.jsonl")]
    prepare_data.prepare(sources, str(out / "pairs"), str(found.tokenizer), **how)
    held = Held(own, T, o.most)
    for seed in range(1, o.seeds + 1):
        for name in only:
            for factor in map(float, o.factors.split(",")):
                learn_once(name, seed, factor, held, out, o, where)
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    print("\n".join(table(rows)))
    return 0


def path_of(out: Path, name: str, seed: int, factor: float = 1.0) -> Path:
    stem = name.replace(", ", "_").replace(" + ", "+").replace(" ", "_")
    scaled = "" if factor == 1 else f"-x{factor:g}"
    return out / f"{stem}-{seed}{scaled}.json"


def learn_once(name: str, seed: int, factor: float, held: Held, out: Path, o, where: dict) -> None:
    path = path_of(out, name, seed, factor)
    if path.exists() or (VARIANTS[name] is None and (seed > 1 or factor != 1)):
        return
    row = {"variant": name, "seed": seed, "factor": factor}
    if VARIANTS[name] is None:
        run = o.base
    else:
        base = expand(o.base)
        if name.startswith(AFTER):
            base = str(path_of(out, "SFT", seed).with_suffix(""))
        run = path.with_suffix("")
        row |= train_once(name, seed, factor, base, run, out, o)
    row |= held.measure(sample.load(run, precision=o.measured, say=str)[0])
    files.write_json(path, row | where | {"base": o.base})
    said = ", ".join(f"{key} {row[key]:.4f}" for key in ("reply_loss", *SHARES))
    print(f"{time.strftime('%T')} {path.stem}: {said}", flush=True)


def train_once(name: str, seed: int, factor: float, base: str, run: Path, out: Path, o) -> dict:
    """Fine-tune into `run`; what was paid for it."""
    keys = dict(VARIANTS[name])
    pairs = "method" in keys
    data = out / ("pairs" if pairs else "chats")
    rows = o.rows // 2 if pairs else o.rows  # a row of pairs is two rows of the model
    steps = o.pair_steps if name.startswith(AFTER) else o.steps
    keys |= {"batch_size": rows, "max_steps": steps, "seed": seed, "out_dir": run}
    keys |= {"precision": o.precision, "eval_tokens": 1}
    words = [base, "--data", str(data), *WORDS, *(f"--{k}={v}" for k, v in keys.items())]
    if factor != 1:
        usual = finetune.read(words)[0].learning_rate
        words.append(f"--learning_rate={usual * factor}")
    began, cpu = time.perf_counter(), time.process_time()
    log = run.with_name(f"{run.name}.log")
    with open(log, "w", encoding="utf-8") as f, contextlib.redirect_stdout(f):
        trainer = finetune.FineTuner(finetune.read(words))
        trainer.fit()
    seconds = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return seconds | {"steps": trainer.step, "learning_rate": trainer.cfg.learning_rate}


# ---------------------------------------------------------------- the table

SHARES = ("choice", "preference", "preference_sum")


def table(rows: list[dict]) -> list[str]:
    """Markdown, a line per variant and factor of the usual learning rate; means and ranges."""
    titles = ["", "n", "learning rate", "held-out reply loss", "multiple choice"]
    titles += ["preference, mean log-probability", "by the sum", "chosen, rejected"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in VARIANTS:
        for factor in sorted({row["factor"] for row in rows if row["variant"] == name}):
            mine = [r for r in rows if r["variant"] == name and r["factor"] == factor]
            lines.append(line_of(name, mine))
    return lines


def line_of(name: str, mine: list[dict]) -> str:
    def told(key: str, form: str) -> str:
        values = [row[key] for row in mine]
        text = format(statistics.mean(values), form)
        if len(values) == 1:
            return text
        return f"{text} ({min(values):{form}} to {max(values):{form}})"

    rate = mine[0].get("learning_rate")
    cells = [name, str(len(mine)), f"{rate:.2g}" if rate else "-", told("reply_loss", ".3f")]
    cells += [told(key, ".3f") for key in SHARES]
    cells.append(f"{told('chosen', '.2f')}, {told('rejected', '.2f')}")
    return f"| {' | '.join(cells)} |"
