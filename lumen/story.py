"""What `python -m lumen.report RUN` tells: the run in a few lines, its decisions as a story,
training.png."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from lumen import nearby
from lumen.errors import UserError
from lumen.files import read_json, read_lines


def of_run(folder: str, name: str) -> tuple[Path, list[dict]]:
    """(out_dir, rows) of a run's jsonl file. E108 where there is none or it cannot be read, E104
    where it is empty; a run without decisions.jsonl has decided nothing."""
    path = Path(folder, name)
    if not path.is_file():
        if name == "decisions.jsonl" and (path.parent / "config.yaml").exists():
            return path.parent, []
        if (path.parent / "config.yaml").exists():
            raise UserError("E108", f"there is no {path}: the run has logged nothing yet")
        raise UserError("E108", f"{folder} is no run{nearby.hint(folder)}")
    try:
        rows = read_lines(path)
    except ValueError as error:
        raise UserError("E108", f"{path}: {error}") from error
    if not rows:
        raise UserError("E104", f"{path} is empty")
    return path.parent, rows


# of train.log's last start, what a summary repeats
HEADS = ("model", "parameters", "experts", "depth", "data", "length", "memory")


def summary(folder: str) -> list[str]:
    """A run in a few lines: its state, what it trains on what, its losses, speed, checkpoints."""
    out, rows = of_run(folder, "metrics.jsonl")
    status = read_json(out / "status.json")
    reason = f": {status['reason']}" if status.get("reason") else ""
    lines = [f"{out}: {status.get('state', 'begun')} at step {rows[-1].get('step', 0)}{reason}"]
    lines += last_start(out / "train.log")
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "val_loss" in row]
    if steps:
        row = steps[-1]
        text = f"{row['loss']:.4f} at step {row['step']}, rate {row['lr']:.2e}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['tokens']:,} tokens so far"
        lines += [f"loss       {text}", f"speed      {speed}"]
    if evals:
        row = evals[-1]
        text = f"{row['val_loss']:.4f} at step {row['step']}"
        if row.get("val_bpb") is not None:
            text += f", {row['val_bpb']:.4f} bits per byte"
        if row.get("best_step") is not None:
            text += f"; best {row['best_val_loss']:.4f} at step {row['best_step']}"
        lines.append(f"val_loss   {text}")
    if saved := sorted(path.name for path in out.glob("step_*") if path.is_dir()):
        more = f"{len(saved) - 3} more, " if len(saved) > 3 else ""
        lines.append(f"saved      {more}{', '.join(saved[-3:])}")
    return lines


def last_start(log: Path) -> list[str]:
    """What train.log said of the run as it was last started."""
    found = []
    with suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            head = line.partition(" ")[0]
            if head == "model":
                found = []
            if head in HEADS and len(line) > 11 and line[10] == " ":
                found.append(line)
    return found


HEADING_GAP = 100  # iterations: what lies nearer together is told under one heading


def decisions(folder: str) -> int:
    """The run in a few lines, and decisions.jsonl as a story: what happened, why, what was done,
    how it turned out."""
    out, rows = of_run(folder, "decisions.jsonl")
    if (out / "metrics.jsonl").is_file():
        print("\n".join(summary(folder)))
    if not rows:
        print(f"{out}: nothing had to be decided")
        return 0
    outcomes = {row["id"]: row for row in rows if row.get("kind") == "outcome"}
    print(f"{out}: {sum('trigger' in row for row in rows)} decisions")
    last = None
    for first, final in series([row for row in rows if "trigger" in row], outcomes):
        if begins_a_heading(first, last):
            print(f"\n{first['time']}, attempt {first['attempt']}, mode {first['mode']}")
        for line in decision_lines(first, final["step"], outcomes.get(first["id"])):
            print(line)
        last = final
    return 0


def series(rows: list[dict], outcomes: dict) -> list[tuple[dict, dict]]:
    """(first, last) of decisions that are the same in iterations on end, to be told once."""
    told = []
    for row in rows:
        if told and row["id"] not in outcomes and goes_on(row, *told[-1]):
            told[-1] = told[-1][0], row
        else:
            told.append((row, row))
    return told


def goes_on(row: dict, first: dict, last: dict) -> bool:
    same = all(row[k] == first[k] for k in ("trigger", "action", "executed", "attempt"))
    return same and row["turn"] - last["turn"] <= 1


def begins_a_heading(row: dict, last: dict | None) -> bool:
    if last is None or row["attempt"] != last["attempt"]:
        return True
    return row["turn"] - last["turn"] > HEADING_GAP


def decision_lines(row: dict, until: int, outcome: dict | None) -> list[str]:
    """A decision that was made at row["step"], and again at each step until `until`."""
    state = "done"
    if not row["executed"]:
        state = f"NOT done: {row.get('refused') or row['blocked_by']}"
    state = f"level {row['level']}, {state}" if row["level"] else "a note"
    steps = f"step {row['step']}"
    if until != row["step"]:
        steps += f" to {until}"
    lines = [f"  {steps}: {row['trigger']}: {row['action']} (#{row['id']}, {state})"]
    why = f"{row['reason']}; confidence {row['confidence']:.2f} ({row['basis']})"
    lines.append(f"    why     {why}")
    args = row.get("args")
    if args and isinstance(args, dict):
        text = ", ".join(f"{key} {value}" for key, value in args.items() if value is not None)
        lines.append(f"    how     {text}")
    if outcome:
        lines.append(f"    outcome {outcome['verdict']}, seen at step {outcome['step']}")
    return lines


MOST_TOLD = 300  # decisions that a page or a table shows: the newest
NEEDED = {"id", "time", "step", "turn", "attempt", "trigger", "action", "level", "executed"}
NEEDED |= {"reason", "confidence", "basis", "blocked_by"}


def told(rows: list[dict]) -> list[dict]:
    """The same as rows of a table, from those of decisions.jsonl. A row without what belongs to a
    decision is passed over."""
    outcomes = {row.get("id"): row for row in rows if row.get("kind") == "outcome"}
    found = []
    for first, last in series([row for row in rows if NEEDED <= set(row)], outcomes):
        outcome = outcomes.get(first["id"])
        lines = decision_lines(first, last["step"], outcome)
        names = ("step", "time", "attempt", "level", "trigger", "action", "executed", "reason")
        made = {name: first[name] for name in names}
        made["outcome"] = outcome["verdict"] if outcome else None
        found.append(made | {"text": "\n".join(line[2:] for line in lines)})
    return found


LEVEL_COLOURS = ("0.8", "tab:orange", "tab:red", "tab:red", "black")


def picture(folder: str) -> int:
    """RUN/training.png: loss, rate, gradient norm, expert shares, and what was decided where."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("E003", "a picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out, rows = of_run(folder, "metrics.jsonl")
    decided = read_lines(out / "decisions.jsonl")
    done = [row for row in decided if "trigger" in row and row["executed"]]
    kept, lost = without_rolled_back(rows)
    shares = sorted({key for row in kept for key in row if key.startswith("experts/share/")})
    panels = ["loss", "lr", "grad_norm", *shares]
    size = (10, 2.2 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=size, squeeze=False)
    axes = dict(zip(panels, axes[:, 0]))
    for name, ax in axes.items():
        if name in shares:
            draw_shares(ax, kept, name)
        else:
            draw_line(ax, kept, name, "-", label="training")
            draw_line(ax, lost, name, ".", color="0.7", label="rolled back")
        for row in done:
            ax.axvline(row["step"], color=LEVEL_COLOURS[row["level"]], linewidth=0.8)
        ax.set_ylabel(name.removeprefix("experts/"))
        ax.set_xlabel("step" if name == panels[-1] else "")
    draw_line(axes["loss"], kept, "val_loss", "o-", markersize=3, label="validation")
    axes["loss"].legend(fontsize=8)
    axes["grad_norm"].set_yscale("log")
    for row in done:
        if row["level"] > 1 or row["trigger"] == "user":
            place = {"xy": (row["step"], 1.02), "xycoords": ("data", "axes fraction")}
            axes["loss"].annotate(row["action"], **place, rotation=30, fontsize=7)
    figure.savefig(out / "training.png", dpi=120, bbox_inches="tight")
    print(out / "training.png")
    return 0


def without_rolled_back(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(what the run is made of, what was rolled back): rows beyond a step that comes again."""
    kept, lost = [], []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            lost.append(kept.pop())
        kept.append(row)
    return kept, lost


def draw_line(ax, rows: list[dict], name: str, style: str, **options) -> None:
    """What rows say under `name`; nothing, in the legend either, where none says it."""
    said = [row for row in rows if row.get(name) is not None]
    if said:
        ax.plot([row["step"] for row in said], [row[name] for row in said], style, **options)


def draw_shares(ax, rows: list[dict], name: str) -> None:
    """Shares of experts, stacked; a slot without an expert has none."""
    said = [row for row in rows if name in row]
    shares = np.array([[share or 0.0 for share in row[name]] for row in said])
    ax.stackplot([row["step"] for row in said], shares.T)
