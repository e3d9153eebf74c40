"""What fine-tuning shows of its data: a row, what of it is learned, and questions to ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lumen import chat
from lumen.files import read_json
from lumen.schedule import FEW_STEPS, one_row_steps

LOOKED_AT = 256  # rows, of which the share that is learned is told
SHOWN = 192  # tokens of the row that is shown, at most ...
LINES = 8  # ... and lines
COLUMNS = 100  # of a console
INDENT = " " * 11  # below the name of a line
ASKED = 52  # columns of a question
DONE = {  # of report.json's done_to_rows, and what was left out
    "dropped": "left out",
    "merged": "with turns of one role merged",
    "tail_dropped": "with turns left out after the last reply",
    "system_dropped": "with an empty system turn left out",
}


def shares(source) -> str:
    """How much of a source is learned, and what its preparation did to conversations or pairs."""
    n = min(source.windows, LOOKED_AT)
    learned = sum(float((source.row(i)[1] >= 0).mean()) for i in range(n)) / n
    about = "about " if n < source.windows else ""
    text = f"{about}{100 * learned:.1f} % of the tokens"
    if source.kind == "text":
        return text
    manifest = source.manifest or {}
    if manifest.get("loss_on") != "all":
        text += " (replies)"
    counts = manifest.get("counts", {})
    done = {}
    if counts:
        done = dict(read_json(Path(source.path) / "report.json").get("done_to_rows", {}))
        done["dropped"] = sum(counts.get("dropped", {}).values())
    told = [f"{n:,} {DONE.get(name, name)}" for name, n in done.items() if n]
    if told:
        rows = "conversations" if source.kind == "chat" else "pairs"
        text += f"; of {counts['rows']:,} {rows} {', '.join(told)}"
    return cut(text, COLUMNS - len(INDENT))


def cut(text: str, most: int) -> str:
    """At most so many columns."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def answered(question: str, answer: str) -> str:
    """A line of a reply: the end of what was asked, the beginning of what was said."""
    asked, said = " ".join(question.split()), repr(" ".join(answer.split()))
    if len(asked) > ASKED:
        asked = f"... {asked[4 - ASKED :]}"
    room = COLUMNS - len(f"{INDENT}{asked} -> ")
    return f"{INDENT}{asked} -> {cut(said, room)}"


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
        n = min(len(ids), SHOWN // source.sides)
        while tokenizer.decode(ids[:n]).count("\n") >= LINES // source.sides:
            n -= 1
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
