"""What tools/bench.py measures of learning: Lumen's sparse variants beside each other, and Lumen
beside transformers on the same rows in the same order, with the same optimizer, schedule and clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lumen import files
from lumen import machine as machines
from lumen.cli import find_yaml, load_yaml
from lumen.errors import UserError
from lumen.hf import hf_config, layout
from lumen.machine import git_commit, human_number
from model import ModelConfig, role
from tools import bench_step, timing
from tools.bench_step import HALF
from train import Trainer, lr_at

MOE = {"n_experts": 8, "n_experts_per_token": 2, "d_expert": 176}  # 2 x 176 is quickstart's d_ff
LEARN = {  # what each changes of quickstart's model
    "dense": {},
    "moe": MOE,
    "mod-ffn": {**HALF, "mod_ffn_only": True},
    "mod-block": HALF,
    "hybrid": {**MOE, **HALF, "mod_ffn_only": True},
}


def learn(words: list[str]) -> int:
    """learn of tools/bench.py: with --against another trainer beside ours, else our variants."""
    if any(word.partition("=")[0] == "--against" for word in words):
        return against(words)
    return variants(words)


# ---------------------------------------------------------------- our variants


def variants(words: list[str]) -> int:
    """One file per run in --out (two processes may share it, --only says who does what); then the
    table, with the time of a step measured for all variants in turns."""
    o = timing.options(words, steps=0, seeds=3, threads=1, rounds=9, only="", out="out/learn")
    out = Path(o.out)
    only = o.only.split(",") if o.only else list(LEARN)
    if unknown := [name for name in only if name not in LEARN]:
        raise UserError("E002", f"--only: no {', '.join(unknown)}; there are: {', '.join(LEARN)}")
    torch.set_num_threads(o.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("E108", f"--out {out}: {error.strerror}") from error
    line = timing.machine_line()
    for seed in range(1337, 1337 + o.seeds):
        for name in only:
            learn_once(name, seed, o.steps, out, {"threads": o.threads, "machine": line})
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    if set(LEARN) <= {row["variant"] for row in rows}:
        add_speeds(rows, o.rounds)
    print(line)
    print("\n".join(learn_table(rows)))
    return 0


def learn_once(name: str, seed: int, steps: int, out: Path, where: dict) -> None:
    """One run of a variant, unless its file is there already."""
    tree = load_yaml(find_yaml("quickstart"))[0]
    tree |= {
        "seed": seed,
        "max_steps": steps or tree["max_steps"],
        "save_interval": 0,
        "sample_prompt": None,
        "compile_model": False,
        "resume": "none",
        "expert_backend": "slices",
    }
    tree["model"] |= LEARN[name]
    keys = json.loads(json.dumps(tree))
    path = out / f"{name}-{seed}.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text())["keys"] == keys:
            return
    row = train_once(tree, path.with_suffix(".log"))
    row |= {"variant": name, "seed": seed, "keys": keys}
    files.write_json(path, row | where)
    print(f"{time.strftime('%T')} {path}: val_loss {row['val_loss']:.4f}", flush=True)


def add_speeds(rows: list[dict], rounds: int) -> None:
    """A step of every variant, in turns: prints the times and puts tokens/s into the rows."""
    tree = load_yaml(find_yaml("quickstart"))[0]
    m = machines.detect("cpu", tree.get("precision", "auto"))
    built = {}
    for name, changes in LEARN.items():
        model = ModelConfig(**{"vocab_size": 2048} | tree["model"] | changes)
        built[name] = bench_step.Ours(model, m, tree["batch_size"], backend="slices")
    times = timing.interleaved(built, rounds, "cpu")
    for name, seconds in times.items():
        print(f"step of {name}, time against dense: {timing.ratio(seconds, times['dense'])}")
    for row in rows:
        if row["variant"] in times:
            row["tokens_per_second"] = built["dense"].tokens / min(times[row["variant"]])


def train_once(tree: dict, log: Path) -> dict:
    """Train the configuration into a temporary folder; the numbers of its end."""
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(log, "w", encoding="utf-8") as f:
        with contextlib.redirect_stdout(f):
            trainer = Trainer(tree | {"out_dir": folder})
            trainer.report.record = rows.append
            trainer.fit()
        if trainer.step < trainer.run.max_steps:  # a signal: what it asked to stop is all of it
            raise KeyboardInterrupt
    last = next(row for row in reversed(rows) if "val_loss" in row)
    names = ("val_loss", "val_bpb", "val_loss_as_trained", "mod_gap", "mod_agreement", "mod_depth")
    n, speeds = trainer.model.n_params(), [row.get("tokens_per_second") for row in rows]
    named = trainer.model.named_parameters()
    return {name: last.get(name) for name in names} | {
        "total": n["total"],
        "active": n["active"],
        "flops_per_token": trainer.flops_per_token,
        "router": sum(p.numel() for name, p in named if role(name) == "router"),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "tokens_per_second": statistics.median(filter(None, speeds)),
        "seconds": time.perf_counter() - began,
    }


def learn_table(rows: list[dict]) -> list[str]:
    """A markdown table, a line per variant; runs of another length than most are left out."""
    if not rows:
        return ["no runs"]
    steps = statistics.mode(row["steps"] for row in rows)
    same = [row for row in rows if row["steps"] == steps]
    text = f"{steps} steps, {same[0]['tokens']:,} tokens each. Val loss: mean (lowest to highest)"
    text += " over seeds, for MoD by the causal rule; gap: what the rule of training, which looks"
    titles = ["variant", "n", "val loss", "bits per byte", "gap", "total", "active"]
    titles += ["of it routers", "FLOP a token", "tokens/s"]
    lines = [f"{text} ahead, would gain.", "", *timing.markdown(titles)]
    for name in dict.fromkeys([*LEARN, *(row["variant"] for row in rows)]):
        mine = [row for row in same if row["variant"] == name]
        if mine:
            lines.append(learn_row(name, mine))
    others = [row for row in rows if row["steps"] != steps]
    if others:
        names = [f"{row['variant']} {row['seed']} ({row['steps']} steps)" for row in others]
        lines.append(f"left out: {', '.join(names)}")
    return lines


def learn_row(name: str, mine: list[dict]) -> str:
    def mean(key, form):
        if mine[0][key] is None:
            return "-"
        return format(statistics.mean(row[key] for row in mine), form)

    first, loss = mine[0], [row["val_loss"] for row in mine]
    speed = statistics.median(row["tokens_per_second"] for row in mine)
    cells = [name, len(mine), f"{mean('val_loss', '.4f')} ({min(loss):.4f} to {max(loss):.4f})"]
    cells += [mean("val_bpb", ".4f"), mean("mod_gap", "+.4f")]
    cells += [f"{first[key]:,}" for key in ("total", "active", "router")]
    cells += [human_number(first["flops_per_token"]), human_number(speed)]
    return f"| {' | '.join(map(str, cells))} |"


# ---------------------------------------------------------------- beside transformers: what

V, T = 32, 128  # of the source: symbols, tokens a row
POINTS = 5  # of a curve, evenly spaced over the run
BALANCE = 0.01  # of the balance loss, by the formula whose value is 1 when loads are equal


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained on what; `text` False: the order-2 source."""

    model: dict
    run: dict
    text: bool = True


def on_text(layers: int, width: int, hidden: int, heads: int, steps: int, **run) -> Size:
    model = {"d_model": width, "n_layers": layers, "n_heads": heads, "d_ff": hidden}
    run = {"learning_rate": 1.5e-3, "warmup_steps": 20, "max_steps": steps, "batch_size": 8} | run
    return Size(model | {"max_seq_len": 256}, run | {"eval_tokens": 65536})


SIZES = {
    "source": Size(
        {
            "vocab_size": V,
            "d_model": 128,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 512,
            "max_seq_len": T,
        },
        {"learning_rate": 2e-3, "warmup_steps": 50, "max_steps": 240, "batch_size": 32},
        text=False,
    ),
    "4x128": on_text(4, 128, 384, 2, 425, learning_rate=4.5e-3),
    "4x256": on_text(4, 256, 768, 4, 425),
    "6x384": on_text(6, 384, 1024, 6, 300, learning_rate=1e-3),
    "12x768": on_text(12, 768, 2048, 12, 40, learning_rate=6e-4, eval_tokens=8192),
}
EXPERTS = {"dense": None, "top-1": (8, 1), "top-2": (8, 2), "64xtop-8": (64, 8)}


def order2(folder: Path) -> Path:
    """Shards of a language in which the last two symbols decide the odds of the next: entropy 2.475
    nats."""
    if (folder / "val_00000.npy").exists():
        return folder
    rng = np.random.default_rng(7)
    odds = rng.dirichlet([0.3] * V, size=V * V).cumsum(1)

    def text(n):
        u, ids, a, b = rng.random(n), np.empty(n, np.uint16), 0, 0
        for i in range(n):
            ids[i] = min(int(np.searchsorted(odds[a * V + b], u[i])), V - 1)
            a, b = b, ids[i]
        return ids

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train_00000.npy", text(T * 16000))
    np.save(folder / "val_00000.npy", text(12800))
    return folder


def keys(size: str, kind: str, seed: int, steps: int = 0) -> dict:
    """A configuration without data_dir and out_dir. The experts of all kinds compute as much for a
    token as the dense FFN does."""
    shape, run = SIZES[size].model, SIZES[size].run
    if EXPERTS[kind]:
        experts, chosen = EXPERTS[kind]
        shape = shape | {"n_experts": experts, "n_experts_per_token": chosen}
        shape["d_expert"] = shape["d_ff"] // chosen
    fixed = {
        "device": "cpu",
        "precision": "fp32",
        "compile_model": False,
        "save_interval": 0,
        "resume": "none",
        "orchestrator": {"mode": "off"},
        "expert_backend": "slices",
    }
    steps = steps or run["max_steps"]
    every = max(1, steps // POINTS)
    run = run | {"max_steps": steps, "eval_interval": every, "log_interval": every, "seed": seed}
    return fixed | run | {"model": shape}


# ---------------------------------------------------------------- beside transformers: a run


def theirs(trainer: Trainer, copy: bool):
    """transformers' model of this shape; with `copy` it starts from the trainer's weights, else
    from its own."""
    import transformers

    cfg = trainer.cfg.model
    config = hf_config(cfg, "float32", {}, cfg.n_experts)
    config = transformers.AutoConfig.for_model(**config)
    config.output_router_logits = bool(cfg.n_experts)
    torch.manual_seed(trainer.cfg.seed)
    make = transformers.AutoModelForCausalLM.from_config
    model = make(config, attn_implementation="sdpa").float()
    if copy:
        own, state = trainer.model.state_dict(), model.state_dict()
        for name, theirs, first, shape in layout(cfg, fused=True):
            where = tuple(slice(a, a + n) for a, n in zip(first, shape))
            state[theirs].copy_(own[name][where])  # in place, the model's own tensors
    return model


@torch.no_grad()
def val_loss(model, trainer: Trainer) -> float:
    """Of transformers' model, over the trainer's own validation rows."""
    model.eval()
    windows = [trainer.data.val_sources[name].window(i) for name, i in trainer.val_set]
    losses = []
    for first in range(0, len(windows), trainer.run.micro_batch):
        rows = np.stack(windows[first : first + trainer.run.micro_batch]).astype(np.int64)
        logits = model(input_ids=torch.from_numpy(rows[:, :-1])).logits.flatten(0, 1)
        wanted = torch.from_numpy(rows[:, 1:].copy()).flatten()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
    model.train()
    return torch.cat(losses).mean().item()


def decayed(model, weight_decay: float) -> list[dict]:
    """The groups of AdamW: matrices are decayed, norms are not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]


def balance_loss(logits, experts: int, chosen: int):
    """transformers' own formula. It is `chosen` when loads are equal, where ours is 1."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    return load_balancing_loss_func(logits, experts, chosen) / chosen


def train_theirs(model, trainer: Trainer, balance: float) -> tuple[list[float], list]:
    """The plain loop of a user of transformers over the trainer's own rows: (loss of each step,
    [step, validation loss] where the trainer has its own)."""
    cfg, steps, rows = trainer.cfg, trainer.run.max_steps, trainer.run.micro_batch
    losses, curve = [], []
    groups = decayed(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, trainer.run, step)
        _, x, y, *_ = trainer.loader.batch(step * rows, rows)
        out = model(input_ids=torch.from_numpy(x))
        loss = F.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(y).flatten())
        losses.append(loss.item())
        if cfg.model.n_experts and balance:
            routed = (cfg.model.n_experts, cfg.model.n_experts_per_token)
            loss = loss + balance * balance_loss(out.router_logits, *routed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == steps or (step + 1) % cfg.eval_interval == 0:
            curve.append([step + 1, val_loss(model, trainer)])
    return losses, curve


def train_ours(trainer: Trainer) -> list:
    """[step, validation loss] of the trainer's run."""
    curve, record = {}, trainer.report.record

    def look(row: dict) -> None:
        if row.get("val_loss") is not None:
            curve[row["step"]] = row["val_loss"]
        record(row)

    trainer.report.record = look
    trainer.fit()
    if trainer.step < trainer.run.max_steps:  # a signal: what it asked to stop is all of it
        raise KeyboardInterrupt
    return [[step, loss] for step, loss in sorted(curve.items())]


def curve_of(who: str, tree: dict) -> list:
    """One run of this configuration: [step, validation loss] at the points of its curve."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            trainer = Trainer(tree | {"out_dir": folder})
            if who == "Lumen":
                return train_ours(trainer)
            try:
                return train_theirs(theirs(trainer, copy=False), trainer, BALANCE)[1]
            finally:
                trainer.close()


# ---------------------------------------------------------------- beside transformers: the study


def against(words: list[str]) -> int:
    """A line a run in --out, in which a study that was stopped finds what is done; then the
    tables."""
    known = {"against": "", "sizes": "source,4x128", "kinds": ",".join(EXPERTS), "data": ""}
    o = timing.options(words, **known, seeds=3, steps=0, threads=1, out="out/learn")
    sizes = listed("--sizes", o.sizes, SIZES)
    kinds = listed("--kinds", o.kinds, EXPERTS)
    listed("--against", o.against, ["transformers"])
    torch.set_num_threads(o.threads)
    file = Path(o.out) / "against.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("E108", f"--out {o.out}: {error.strerror}") from error
    rows = read_rows(file)
    wanted = []
    for size in sizes:
        data = data_of(size, o.data, file.parent)
        for seed in range(1, 1 + o.seeds):
            for kind in kinds:
                tree = keys(size, kind, seed, o.steps)
                for who in (o.against, "Lumen"):
                    wanted.append(run_once(who, (size, kind, seed), tree, data, rows, file))
    print(timing.machine_line())
    print("\n".join(gap_table(wanted)))
    return 0


def listed(option: str, names: str, known) -> list[str]:
    """The names of a comma-separated list. E002."""
    names = names.split(",")
    if unknown := [name for name in names if name not in known]:
        text = f"learn: {option}: no {', '.join(unknown)}; there are: {', '.join(known)}"
        raise UserError("E002", text)
    return names


def data_of(size: str, text: str, out: Path) -> dict:
    """The keys of a configuration that name its data: the source, which is made in `out`, or the
    folder `text`, or the quickstart's text."""
    if not SIZES[size].text:
        return {"data_dir": str(order2(out / "order2"))}
    if text:
        return {"data_dir": text}
    return {"prepare": load_yaml(find_yaml("quickstart"))[0]["prepare"]}


def read_rows(file: Path) -> list[dict]:
    """The runs that a file holds; a line that was cut off is none, and is ended here."""
    rows, text = [], file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    if text and not text.endswith("\n"):
        with open(file, "a", encoding="utf-8") as f:
            f.write("\n")
    return rows


def run_once(who: str, what: tuple, tree: dict, data: dict, rows: list[dict], file: Path) -> dict:
    """The row of a run: one that `rows` holds, or a new one, which is written to `file` at once."""
    asked = {"who": who} | dict(zip(("size", "kind", "seed"), what))
    # Lumen's own is trained anew where a default of its model has changed
    shape = ModelConfig(**{"vocab_size": V} | tree["model"])
    own = dataclasses.asdict(shape) if who == "Lumen" else tree["model"]
    asked |= {"keys": json.loads(json.dumps(tree | {"model": own}))}
    for row in rows:
        if asked.items() <= row.items():
            return row
    began = time.perf_counter()
    row = asked | {"curve": curve_of(who, tree | data), "commit": git_commit()}
    row["seconds"] = time.perf_counter() - began
    with open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    name = " ".join(map(str, what))
    print(f"{time.strftime('%T')} {name} {who}: {row['curve'][-1][1]:.4f}", flush=True)
    return row


def gaps(rows: list[dict], a, b) -> dict[int, list[float]]:
    """By step, the loss of the runs that `a` names less that of those that `b` names, seed by seed.
    a, b: (who, size, kind)."""
    curves = {(r["who"], r["size"], r["kind"], r["seed"]): dict(r["curve"]) for r in rows}
    found = defaultdict(list)
    for (*name, seed), curve in curves.items():
        other = curves.get((*b, seed), {})
        if tuple(name) == a:
            for step in curve.keys() & other.keys():
                found[step].append(curve[step] - other[step])
    return dict(sorted(found.items()))


def mean_and_error(values: list[float]) -> str:
    """The mean, and its standard error where there are several."""
    mean = f"{statistics.mean(values):+.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({statistics.stdev(values) / math.sqrt(len(values)):.3f})"


def gap_table(rows: list[dict]) -> list[str]:
    """Lines of Markdown: a row for each size and kind against transformers, and one for each kind
    of experts against Lumen's own dense model."""
    titles = ["size", "kind", "against", "n", *(f"{i}/{POINTS}" for i in range(1, 1 + POINTS))]
    titles += ["its loss at the end", "the other's"]
    text = "Validation loss of Lumen less the other's, nats: mean over seeds (standard error), at"
    lines = [f"{text} these parts of the run.", "", *timing.markdown(titles)]
    for size, kind in dict.fromkeys((row["size"], row["kind"]) for row in rows):
        others = [("transformers", size, kind)]
        if kind != "dense":
            others.append(("Lumen", size, "dense"))
        for other in others:
            found = gaps(rows, ("Lumen", size, kind), other)
            if found:
                lines.append(gap_row(rows, (size, kind), other, found))
    return lines


def gap_row(rows: list[dict], what: tuple, other: tuple, found: dict) -> str:
    def at_end(name: tuple) -> str:
        mine = [r for r in rows if (r["who"], r["size"], r["kind"]) == name]
        return f"{statistics.mean(row['curve'][-1][1] for row in mine):.3f}"

    name = "transformers" if other[0] == "transformers" else "our dense"
    steps = sorted(found)
    cells = [*what, name, len(found[steps[-1]])]
    cells += [mean_and_error(found[step]) for step in steps[: POINTS - 1] + steps[-1:]]
    cells += [at_end(("Lumen", *what)), at_end(other)]
    return f"| {' | '.join(map(str, cells))} |"
