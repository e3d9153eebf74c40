"""What a model is quantised by and judged by: calibration rows of its run's own training shards,
and the bits per byte of the rows that the run holds out, before and after."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

from lumen.chat import data_folders
from lumen.errors import UserError
from lumen.evaluation import Loop
from lumen.held_out import Alone, ValTask, val_task
from lumen.questions import Options
from lumen.texts import read_documents
from lumen.windows import Source

LONGEST = 2048  # tokens of a row that is made of a file's text
REMEDY = "--calibrate FILE or DIR names text to calibrate by (.txt, .jsonl, a prepared folder)"

# ---------------------------------------------------------------- calibration


def calibration_rows(opened, named: str | None, tokens: int) -> tuple[torch.Tensor, str]:
    """(ids (B, T), where they are from): about `tokens` of them, spread evenly over the training
    split of the run's data, or of `named`, a prepared folder or a file of text.

    opened: models.Opened. E002: there are none; E113: ids that the model does not know; E127: the
    file holds no text; and what a folder's data raise.
    """
    if named and not os.path.isdir(named):
        rows = rows_of_text(opened, Path(named), tokens)
        where = named
    else:
        folders = [named] if named else folders_of_run(opened)
        rows = np.concatenate([rows_of(opened, f, tokens // len(folders)) for f in folders])
        where = ", ".join(folders)
    vocab = opened.model.cfg.vocab_size
    if rows.max() >= vocab:
        text = f"{where} holds token id {rows.max()}, the model's vocab_size is {vocab}"
        raise UserError("E113", f"{text}: it was prepared with another tokenizer; {REMEDY}")
    return torch.from_numpy(rows.astype(np.int64)), where


def folders_of_run(opened) -> list[str]:
    folders = data_folders(opened.state)
    gone = [folder for folder in folders if not os.path.exists(folder)]
    if not folders or gone:
        why = f"{opened.folder} names no training data"
        if gone:
            why = f"the run's data are not here any more: {', '.join(gone)}"
        raise UserError("E002", f"--method gptq: {why}; {REMEDY}")
    return folders


def rows_of(opened, folder: str, tokens: int) -> np.ndarray:
    """(B, T) of a folder of shards."""
    T = opened.model.cfg.max_seq_len
    fraction = (opened.state.get("config") or {}).get("val_fraction", 0.0)
    try:
        source = Source(folder, "train", T, fraction)
    except UserError as error:
        raise UserError(error.code, f"{error.text}; {REMEDY}") from error
    count = min(source.windows, max(1, tokens // T))
    numbers = np.linspace(0, source.windows - 1, count).round().astype(int)
    return np.stack([source.row(int(i))[0] for i in numbers])


def rows_of_text(opened, file: Path, tokens: int) -> np.ndarray:
    """(B, T) of a file of text: its documents one after the other, ended as they are in shards."""
    if not file.exists():
        raise UserError("E002", f"--calibrate {file} does not exist; {REMEDY}")
    if opened.tokenizer is None:
        text = f"{opened.folder} has no tokenizer.json to read --calibrate {file} with"
        raise UserError("E501", f"{text}; name a prepared folder, whose shards hold ids")
    ids: list[int] = []
    for text in read_documents(file):
        ids += [*opened.tokenizer.encode(text).tolist(), opened.tokenizer.eot_id]
    T = min(LONGEST, opened.model.cfg.max_seq_len)
    if len(ids) < T:
        raise UserError("E114", f"{file} has {len(ids)} tokens, a row of calibration needs {T}")
    windows = np.array(ids[: len(ids) // T * T]).reshape(-1, T)
    count = min(len(windows), max(1, tokens // T))
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


# ---------------------------------------------------------------- bits per byte


class Judge:
    """Measures a model before and after, on the same held-out rows."""

    def __init__(self, opened, tokens: int, val_data: str | None, say):
        """val_data: a prepared folder, in place of what the run held out. E113 and what it raises;
        where nothing is held out, that is said and `task` is None."""
        folder = Path(val_data) if val_data else None
        self.task: ValTask | None = None
        if tokens:
            self.task = val_task(opened, Options(control=False), say, folder)
        self.rows = []
        if self.task:
            rows = self.task.rows
            count = min(len(rows), max(1, tokens // opened.model.cfg.max_seq_len))
            each = np.linspace(0, len(rows) - 1, count).round().astype(int)
            self.rows = [rows[i] for i in each]
        self.found: list[tuple[float, int]] = []  # (loss, targets), a measurement each

    def measure(self, model) -> float | None:
        """Bits per byte, or nats per token where nobody knows the tokens' bytes."""
        if not self.task:
            return None
        sources, token_bytes = self.task.sources, self.task.token_bytes
        loop = Loop(model, sources, Alone(torch.device("cpu")), 1, token_bytes)
        with torch.no_grad():
            model.eval()
            for row in self.rows:
                loop.add([row])
                if loop.error:
                    raise loop.error
        nats, targets = loop.sums.sum(0)[:2].tolist()
        n_bytes = loop.n_bytes.sum().item()
        value = nats / math.log(2) / n_bytes if n_bytes else nats / targets
        self.found.append((value, int(targets)))
        return value

    def report(self) -> dict | None:
        """As EXPORT.json says it; loss in percent of `before`."""
        if len(self.found) < 2:
            return None
        (before, targets), (after, _) = self.found
        metric = "bits_per_byte" if self.task.token_bytes is not None else "nats_per_token"
        found = {"metric": metric, "before": before, "after": after}
        found |= {"loss_percent": 100 * (after / before - 1), "tokens": targets}
        return found | {"data": self.task.about["path"], "data_sha256": self.task.about["sha256"]}


def check_loss(found: dict | None, most: float | None, asked: bool) -> None:
    """E405: more than `most` percent were lost; or that was `asked` for and cannot be told."""
    if found is None and asked:
        text = "--max_loss needs held-out rows to measure on, and there are none"
        raise UserError("E405", f"{text}; --val_data DIR names a prepared folder")
    if found is None or most is None:
        return
    lost = found["loss_percent"]
    if not lost <= most:  # so written that a NaN fails too
        numbers = f"{found['before']:.4f} to {found['after']:.4f} {found['metric']}"
        raise UserError("E405", f"{numbers} is {lost:.2f} % more; --max_loss {most:g} allows less")
