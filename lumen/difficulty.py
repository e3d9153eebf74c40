"""How hard each window of a source is for a model: its loss, for buckets by `difficulty: loss`.

    python -m lumen.difficulty RUN DATA_DIR [--max_seq_len 128]

Written once beside the data, DATA_DIR/difficulty/loss_T128_SUM.npy: float32, one number a window,
in the order of windows. T and the sum of the shards are in the name, so that numbers of other data
are never taken.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
import torch.nn.functional as F

from lumen import files
from lumen import tokenizer as tokenizers
from lumen.buckets import loss_file
from lumen.errors import UserError, a_path, expand
from lumen.feed import Feed
from lumen.launch import Words, clock, command
from lumen.machine import human_number
from lumen.models import open_model
from lumen.windows import Source
from model import Transformer


@torch.no_grad()
def window_losses(model: Transformer, source: Source, rows: int, feed: Feed, say) -> np.ndarray:
    """Mean cross-entropy of each window's targets, in nats: float32 (windows,).

    rows: of a batch; say(windows done) is called after each. A window without a target: 0.
    """
    losses = np.zeros(source.windows, np.float32)
    for first in range(0, source.windows, rows):
        last = min(first + rows, source.windows)
        x, y, docs = zip(*(source.row(i) for i in range(first, last)))
        docs = np.stack(docs) if source.document_mask else None  # (B, T), as x and y
        x, y, docs = feed.batch(np.stack(x), np.stack(y), docs)
        logits = model(x, docs=docs).float()  # (B, T, V)
        ce = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
        counted = (y >= 0).sum(1).clamp(min=1)
        losses[first:last] = (ce.view(y.shape).sum(1) / counted).cpu().numpy()
        say(last)
    return losses


def check_tokenizer(run: str, tokenizer, source: Source) -> None:
    """E113 where the run's tokenizer and that of the data make other ids."""
    if tokenizer is None or source.manifest is None:
        return
    if not tokenizer.same_ids(tokenizers.load(source.path)):
        text = f"{run} was trained with another tokenizer than {source.path} was prepared with"
        raise UserError("E113", text)


class Progress:
    """A line every ten seconds: how far, how fast, how long still."""

    def __init__(self, windows: int, T: int):
        self.windows, self.T = windows, T
        self.began = self.told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < 10:
            return
        self.told = now
        speed = done / (now - self.began)
        left = clock((self.windows - done) / speed)
        text = f"{100 * done / self.windows:5.1f} %, {human_number(speed * self.T)} tok/s"
        print(f"{text}, {left} left", flush=True)


def main(argv: list[str]) -> int:
    """Write the loss of each window of a source, for `data: {sources: {NAME: {dir, buckets: 3,
    difficulty: loss}}}`."""
    parser = Words(prog="python -m lumen.difficulty", description=main.__doc__)
    parser.add_argument("run", type=a_path, help="the model that judges: a run or one of its steps")
    parser.add_argument("data_dir", type=a_path, help="folder of shards")
    parser.add_argument("--max_seq_len", type=int, help="of the run to come; default: the model's")
    parser.add_argument("--val_fraction", type=float, default=0.005, help="likewise; bare shards")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time (default 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    for name in ("max_seq_len", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError("E002", f"--{name}: {value} must be at least 1")
    opened = open_model(args.run, device=args.device)
    model = opened.model
    T = args.max_seq_len or model.cfg.max_seq_len
    source = Source(expand(args.data_dir), "train", T, args.val_fraction, None)
    source.check_vocab(model.cfg.vocab_size)
    check_tokenizer(args.run, opened.tokenizer, source)
    feed = Feed(next(model.parameters()).device)
    losses = window_losses(model, source, args.batch_size, feed, Progress(source.windows, T))
    file = loss_file(source)
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with files.replacing(file) as out:
            np.save(out, losses)
    except OSError as error:
        raise UserError("E119", f"{file} cannot be written: {error.strerror}") from error
    low, middle, high = np.percentile(losses, (5, 50, 95))
    judge = args.run if opened.step is None else f"step {opened.step} of {args.run}"
    text = f"{source.windows:,} windows of {T} tokens, {judge}: loss 5 % below"
    print(f"{file}: {text} {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f} nats")
    return 0


if __name__ == "__main__":
    command(main)
