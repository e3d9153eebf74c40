"""What fine-tuning shows of its data: a row, what of it is learned, and questions to ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lumen import chat
from lumen.datacard import meaning_of
from lumen.files import read_json
from lumen.schedule import FEW_STEPS, one_row_steps

LOOKED_AT = 256  # rows, of which the share that is learned is told
SHOWN = 192  # tokens of the row that is shown
DONE = {  # of report.json's done_to_rows
    "merged": "with turns of one role merged",
    "tail_dropped": "with turns left out after the last reply",
    "system_dropped": "with an empty system turn left out",
}


def shares(source) -> str:
    """How much of a source's places has a target, and what its preparation left out."""
    n = min(source.windows, LOOKED_AT)
    learned = sum(float((source.row(i)[1] >= 0).mean()) for i in range(n)) / n
    text = f"{100 * learned:.1f} % of the places have a target (the first {n} rows)"
    counts = (source.manifest or {}).get("counts", {})
    dropped = counts.get("dropped", {}).items()
    dropped = [f"{n} {code} ({meaning_of(code)})" for code, n in dropped if n]
    if counts and source.kind != "text":
        rows = "conversations" if source.kind == "chat" else "pairs"
        done = read_json(Path(source.path) / "report.json").get("done_to_rows", {})
        changed = [f"{n} {DONE.get(k, k)}" for k, n in {"truncated": 0, **done}.items()]
        text += f"; of {counts['rows']} {rows} {', '.join(changed)}"
        text += f", dropped: {', '.join(dropped) or 'none'}"
    return text


def first_prompts(sources: dict, rows: list[tuple[str, int]], n: int = 3) -> list[list[int]]:
    """The ids before the first reply of n conversations that are held out: the first of each row,
    and where there are few rows those behind them. None where all is learned: no mask says then
    where a question ends."""
    found = []  # (its place in its row, number of the row, ids)
    for r, (name, number) in enumerate(rows[:n]):
        x, y, docs = sources[name].row(number)
        if docs is None:
            docs = np.zeros(len(x), np.int32)
        for place in range(min(n, int(docs.max()) + 1)):
            own = docs == place
            begins = np.flatnonzero(y[own] >= 0)
            if len(begins) and begins[0] > 0:
                found.append((place, r, x[own][: begins[0] + 1].tolist()))
    return [ids for _, _, ids in sorted(found)[:n]]


def first_row(source, tokenizer) -> str:
    """The beginning of row 0 as it was tokenized, what is learned in green or [ ]; of a row of
    pairs that of the chosen replies, and below that of the rejected."""
    x, y, *_ = source.row(0)
    parts = []
    for ids, targets in zip(np.atleast_2d(x), np.atleast_2d(y)):
        mask = np.concatenate([[0], targets[:-1] >= 0])  # x is a token behind its targets
        n = SHOWN // source.sides
        more = " ..." if len(ids) > n else ""
        parts.append(chat.show(ids[:n], mask[:n], tokenizer) + more)
    return "\n--- rejected ---\n".join(parts)


def few_steps(steps: int, rows_per_step: int, windows: int, readers: int) -> str:
    """Advice where a fine-tuning ends before it has learned much: little data, many rows a step.
    "": it does not. windows: rows of the data, which `readers` ranks share."""
    epochs, makes = one_row_steps(windows, readers)
    if steps >= FEW_STEPS or not epochs:
        return ""
    smaller = "--batch_size 1 " if rows_per_step > readers else ""
    return f"{steps} steps teach little; {smaller}--num_epochs {epochs} makes {makes:,}"
