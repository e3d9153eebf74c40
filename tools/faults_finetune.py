"""Faults done to fine-tuning on purpose, and what is made of them.

    python -m tools.faults_finetune [--quick] [--only ROWS] [--out FILE]

As tools/faults.py, whose ways into a run these are: a small base is trained on text, then on
conversations (all weights, adapters) or pairs; each run with a fault is held against its healthy
twin of the same seed. Prints the rows of docs/faults.md.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import finetune
import prepare_data
from lumen import files
from lumen.launch import Words, command
from lumen.machine import git_commit
from tools import faults
from tools.faults import scale_rate, wrap
from train import Trainer

STEPS, AT = 300, 150  # steps of a run, iteration of its fault
SEEDS = 3  # healthy runs, whose spread says what a difference means
T = 128
MODEL = {"d_model": 48, "n_layers": 2, "n_heads": 4, "d_ff": 96, "max_seq_len": T}
RUN = "--device cpu --precision fp32 --compile_model false --batch_size 4 --save_interval 100"
RUN += " --eval_interval 50 --log_interval 50 --save_total_limit 2 --warmup_steps 10"
HOWS = {
    "full": ("chats", "--learning_rate 3e-3"),
    "lora": ("chats", "--learning_rate 1e-2 --lora.r 8"),
    "dpo": ("pairs", "--learning_rate 1e-3 --lora.r 8 --method dpo"),
}
HEALTHY, LEFT_OUT = "F0", "F0b"  # rows

# ---------------------------------------------------------------- what there is to learn

WORDS = ["red", "blue", "green", "round", "flat"]
WORDS += ["old", "new", "tall", "deep", "thin"]
SAID = ["ruby", "sky", "leaf", "ball", "plain"]
SAID += ["past", "fresh", "tower", "sea", "paper"]


def conversation(rng: random.Random) -> dict:
    """A question in three words, a reply that follows from them."""
    places = [rng.randrange(len(WORDS)) for _ in range(3)]
    asked, said = ([words[i] for i in places] for words in (WORDS, SAID))
    return {"prompt": f"{' and '.join(asked)}?", "response": ", ".join(said)}


def pair(rng: random.Random) -> dict:
    """The same, and a reply in which one word is wrong."""
    row = conversation(rng)
    begin, _, last = row["response"].rpartition(" ")
    wrong = f"{begin} {rng.choice([word for word in SAID if word != last])}"
    return {"prompt": row["prompt"], "chosen": row["response"], "rejected": wrong}


def make_school(top: Path) -> None:
    """Text, a base, conversations in two templates, pairs, and a base that has learned one."""
    rng = random.Random(0)
    text = [" ".join(rng.choices([*WORDS, *SAID], k=12)) for _ in range(3000)]
    (top / "text.txt").write_text("\n".join(text))
    prepare_data.prepare([str(top / "text.txt")], str(top / "text"), "bytes", quiet=True)
    for name, make, template in (
        ("chats", conversation, "chatml"),
        ("other", conversation, "instruct"),
        ("pairs", pair, "chatml"),
    ):
        for split, n in (("train", 800), ("val", 40)):
            rng = random.Random(f"{make.__name__} {split}")
            rows = [json.dumps(make(rng)) for _ in range(n)]
            (top / f"{name}-{split}.jsonl").write_text("\n".join(rows))
        how = {"val_sources": [str(top / f"{name}-val.jsonl")], "template": template}
        source, out = str(top / f"{name}-train.jsonl"), str(top / name)
        prepare_data.prepare([source], out, "bytes", **how, seq_len=T, quiet=True)
    keys = {"data_dir": str(top / "text"), "out_dir": str(top / "base"), "max_steps": 300}
    keys |= {"warmup_steps": 0.05}  # as when the table of docs/faults.md was made
    keys |= {"batch_size": 8, "learning_rate": 5e-3, "device": "cpu", "precision": "fp32"}
    keys |= {"compile_model": False, "model": MODEL, "eval_tokens": 2048}
    quietly(lambda: Trainer(keys).fit())
    line = words_of(top, "full", "act", 1, STEPS)
    line[line.index("--out_dir") + 1] = str(top / "spoken")
    quietly(lambda: finetune.FineTuner(finetune.read(line)).fit())


def quietly(do: Callable):
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return do()


# ---------------------------------------------------------------- the faults


def at_rows(trainer, at: int, steps: float, change: Callable) -> None:
    """change(batch) in place, of the rows of `steps` iterations from `at` on."""

    def batch(real, first_row, count):
        found = real(first_row, count)
        if 0 <= first_row // trainer.run.rows_per_step - at + 1 < steps:
            change(found)
        return found

    wrap(trainer.loader, "batch", batch)


def mask_all(trainer, at, steps):
    def change(batch):
        batch.y[:] = -1

    at_rows(trainer, at, steps, change)


def row_dominates(trainer, at, steps):
    """A row of noise, all of which counts: more targets than the others' replies together."""

    def change(batch):
        rng = np.random.default_rng(batch.row)
        batch.x[0] = rng.integers(0, 256, T)
        batch.y[0] = np.roll(batch.x[0], -1)

    at_rows(trainer, at, steps, change)


def adapter_nan(trainer, at):
    def change(trainer, k):
        next(p for name, p in trainer.weights.items() if "lora_b" in name)[0, 0] = math.nan

    return faults.change_weights(trainer, at, change)


def never_stops(trainer, at):
    """The template's end of a reply is never learned."""
    end = trainer.tokenizer.control("<|im_end|>")

    def change(batch):
        batch.y[batch.y == end] = -1

    at_rows(trainer, 0, math.inf, change)


@dataclass(frozen=True)
class Row:
    """A row of the table; `needs`: must be said in decisions.jsonl or train.log."""

    what: str
    inject: Callable | None = None
    expected: str = "recover"  # or "stop in order", "said"
    hows: tuple = ("full", "lora")
    exact: bool = False  # the bits of a run that left this batch out
    needs: str = ""
    steps: int = STEPS
    data: str = ""
    base: str = "base"
    more: str = ""  # words of the command line


P = functools.partial
ROWS = {
    HEALTHY: Row("healthy", hows=("full", "lora", "dpo")),
    LEFT_OUT: Row("a batch left out (what F1 is held against)", faults.leave_out),
    "F1": Row("a batch without a target", P(mask_all, steps=1), exact=True, needs="no target"),
    "F2": Row("a row of noise dominates 12 batches", P(row_dominates, steps=12)),
    "F3": Row("NaN in one adapter", adapter_nan, hows=("lora",), needs="nonfinite"),
    "F4": Row("another template than the base's", expected="said", needs="learn another one",
              data="other", base="spoken"),
    "F5": Row("learning rate x100 forever", P(scale_rate, factor=100), "stop in order",
              steps=800),
    "F6": Row("learning rate x30 from the start, dpo", expected="said", hows=("dpo",),
              needs="chosen replies lost", more="--learning_rate 3e-2"),
    "F7": Row("the end of replies is never learned", never_stops, "said", needs="no reply stopped"),
}  # fmt: skip
QUICK = "F3"

# ---------------------------------------------------------------- the runs


def words_of(top: Path, how: str, mode: str, seed: int, steps: int, row: Row | None = None) -> list:
    data, more = HOWS[how]
    row = row or ROWS[HEALTHY]
    line = [str(top / row.base), "--data", str(top / (row.data or data)), "--seed", str(seed)]
    line += ["--out_dir", str(top / "run"), "--max_steps", str(steps), *RUN.split()]
    return [*line, *f"{more} {row.more}".split(), "--orchestrator.mode", mode]


def run_once(top: Path, name: str) -> dict:
    """name: row/how/mode/seed."""
    number, how, mode, seed = name.split("/")
    row = ROWS[number]
    line = words_of(top, how, mode, int(seed), row.steps, row)

    def make(words):
        return finetune.FineTuner(finetune.read(words))

    began = time.process_time()
    try:
        found = faults.train(line, row.inject, AT, make=make)
        log = (top / "run" / "train.log").read_text(encoding="utf-8", errors="replace")
    finally:
        faults.shutil.rmtree(top / "run", ignore_errors=True)
    found["log"] = [x for x in log.splitlines() if x.startswith(("note", "advice", "health"))]
    return found | {"cpu": time.process_time() - began, "commit": git_commit()}


def all_runs(top: Path, out: Path, only: list[str]) -> dict:
    """Those that the file does not hold yet; each healthy twin first."""
    runs = json.loads(out.read_text()) if out.exists() else {}
    names = []
    hows = sorted({how for number in only for how in ROWS[number].hows})
    names += [f"{HEALTHY}/{how}/{mode}/{1}" for how in hows for mode in ("off", "act")]
    names += [f"{HEALTHY}/{how}/off/{seed}" for how in hows for seed in range(2, SEEDS + 1)]
    for number in only:
        for how in ROWS[number].hows:
            if ROWS[number].exact:
                names.append(f"{LEFT_OUT}/{how}/act/1")
            names += [f"{number}/{how}/{mode}/1" for mode in ("act", "off")]
    for name in dict.fromkeys(names):
        if name not in runs:
            runs[name] = run_once(top, name)
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(out, runs)
            print(f"{name}: {runs[name]['cpu']:.0f} s, code {runs[name]['code']}", flush=True)
    return runs


# ---------------------------------------------------------------- the table


def verdict(name: str, runs: dict, limit: float) -> tuple[list, bool]:
    """(cells, as expected?) of a run."""
    number, how, mode, seed = name.split("/")
    row, run, twin = ROWS[number], runs[name], runs[f"{HEALTHY}/{how}/off/{seed}"]
    rows = [d for d in run["decisions"] if d.get("trigger", "user") != "user"]
    actions = Counter(d["action"] for d in rows if d["executed"])
    said = " ".join([f"{d['trigger']} {d['reason']}" for d in rows] + run["log"])
    came, gap = f"code {run['code']}", None
    if run["code"] == 3 and run["kept"] is not None:
        came = "stop in order"
    elif run["code"] == 0:
        gap = run["val_loss"] - twin["val_loss"]
        came = "recover" if gap <= limit else "not recovered"
    wrong = []
    if row.expected != "said" and came != row.expected:
        wrong.append(came)
    if mode == "act" and row.needs not in said:
        wrong.append(f"nothing said of {row.needs!r}")
    if row.exact and run["digest"] != runs[f"{LEFT_OUT}/{how}/act/{seed}"]["digest"]:
        wrong.append("not the bits without the batch")
    if number == HEALTHY and run["digest"] != twin["digest"]:
        wrong.append("not the bits of mode off")
    early = [d for d in rows if row.inject and d["turn"] < AT and d["level"] and d["executed"]]
    if (early and row.inject is not never_stops) or (number == HEALTHY and actions):
        wrong.append("an action without a fault")
    lost = run["iterations"] - run["step"] + run["dropped"]
    found = next((d["turn"] - AT for d in rows if d["turn"] >= AT), None)
    cells = [number, row.what, how, mode, row.expected, came]
    cells += ["-" if gap is None else f"{gap:+.4f}", lost, "-" if found is None else found]
    cells += [", ".join(f"{n} {what}" for what, n in actions.items()) or "-"]
    return [*cells, "; ".join(["**no**", *wrong]) if wrong else "yes"], not wrong


def table(runs: dict) -> tuple[list[str], int]:
    """Lines of Markdown, and how many rows of mode act did not go as expected."""
    lines, limits, bad = [], {}, 0
    for how in HOWS:
        losses = [r["val_loss"] for n, r in runs.items() if n.startswith(f"{HEALTHY}/{how}/off")]
        if len(losses) > 1:
            sigma = statistics.stdev(losses)
            limits[how] = max(2 * sigma, 0.01)
            text = f"{how}, no fault: val loss {statistics.mean(losses):.4f}"
            lines.append(f"{text}, sigma {sigma:.4f}, n {len(losses)}")
    titles = ["row", "fault", "model", "mode", "expected", "came", "gap", "lost", "found after"]
    titles += ["actions", "as expected"]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in sorted(runs):
        number, how, mode, _ = name.split("/")
        if number == LEFT_OUT or (number == HEALTHY and mode == "off"):
            continue
        cells, good = verdict(name, runs, limits[how])
        bad += not good and mode == "act"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    made = ", ".join(sorted({run["commit"] for run in runs.values()}))
    cpu = sum(run["cpu"] for run in runs.values()) / 60
    day = time.strftime("%Y-%m-%d")
    return [*lines, "", f"{len(runs)} runs, {cpu:.0f} minutes of a core; {day}, commit {made}"], bad


def main(argv: list[str]) -> int:
    parser = Words(prog="python -m tools.faults_finetune", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only row {QUICK}")
    parser.add_argument("--only", default="", help="rows, with commas between")
    parser.add_argument("--out", default="out/faults_finetune.json", type=Path)
    args = parser.parse_args(argv)
    known = [number for number in ROWS if number not in (HEALTHY, LEFT_OUT)]
    only = (QUICK if args.quick else args.only) or ",".join(known)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        make_school(Path(top))
        runs = all_runs(Path(top), args.out, list(faults.chosen(only, known, known)))
    lines, bad = table(runs)
    print("\n".join(lines))
    return int(bad > 0)


if __name__ == "__main__":
    command(main)
