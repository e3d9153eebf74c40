"""The task `val`: the rows that a run holds out, asked one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from lumen import tokenizer as tokenizers
from lumen.chat import data_folders
from lumen.config import Config
from lumen.data import Data, choose_val_rows, open_data, val_sum
from lumen.errors import UserError
from lumen.evaluation import Loop
from lumen.feed import Feed
from lumen.model_keys import model_from_keys
from lumen.questions import Asked, Options, Task, chosen, partner
from lumen.texts import SPACE, UNIGRAM, Sums, Unigram, with_control
from lumen.windows import Batch, anew


class Alone:
    """What an evaluation.Loop asks of lumen.parallel.Parallel, of one rank by itself."""

    collective_free = True

    def __init__(self, device):
        self.device, self.feed = device, Feed(device)


class ValTask(Task):
    """The rows of a run's held-out split, one by one through the loop of its trainer: blocks and
    masks as there, so that all of them together have its val_loss."""

    kind = "text"
    metric = "loss"

    def __init__(self, options: Options, about: dict, data: Data, rows: list, tokenizer):
        """rows: (source, window), as of choose_val_rows."""
        super().__init__("val", options, about)
        self.sources, self.rows, self.tokenizer = data.val_sources, rows, tokenizer
        self.token_bytes = data.token_bytes()
        if self.token_bytes is not None:  # models of other tokenizers compare, too
            self.metric = "bits_per_byte"
        self.numbers = chosen(len(rows), options)
        self.controls = with_control(len(rows), options)
        self.here: Alone | None = None

    def targets(self, number: int) -> np.ndarray:
        name, window = self.rows[number]
        y = self.sources[name].row(window)[1]
        return y[y >= 0]

    @cached_property
    def unigram(self) -> Unigram:
        """E111."""
        counts = np.zeros(0, np.int64)
        for number in range(len(self.rows)):
            more = np.bincount(self.targets(number), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        return Unigram(counts)

    def line(self, i: int, asked: Asked) -> dict:
        """Rows are read here, as the trainer reads them. E111: a shard has changed."""
        number = self.numbers[i]
        found, n_bytes = self.measure(asked, number)
        line = {"i": number, **found._asdict()}
        if self.token_bytes is not None:
            line["bytes"] = n_bytes
        targets = self.targets(number)
        # words that end in the row: one that its end cuts in two is one
        line["words"] = len(SPACE.findall(asked.tokenizer.decode(targets)))
        line["majority"] = self.unigram.nats(targets)
        if number in self.controls:
            other = partner(number, len(self.rows))
            line["control"] = self.measure(asked, number, other)[0].control()
        return line

    def measure(self, asked: Asked, number: int, inputs: int | None = None) -> tuple[Sums, int]:
        """(sums over the targets of a row, their bytes); inputs: the row whose inputs are read."""
        device = asked.model.embed.weight.device
        if self.here is None or self.here.device != device:
            self.here = Alone(device)
        loop = Loop(asked.model, self.sources, self.here, 1, self.token_bytes)
        batch = self.read(loop, number)
        if inputs is not None:
            batch = self.read(loop, inputs)._replace(y=batch.y)
        with asked.scorer.at_rest():
            loop.add_batch(0, batch)
        nats, tokens, right, _ = loop.sums[0].tolist()
        return Sums(nats, int(tokens), int(right)), int(loop.n_bytes[0])

    def read(self, loop: Loop, number: int) -> Batch:
        name, window = self.rows[number]
        return loop.read(self.sources[name], [window])

    def texts(self) -> Iterator[tuple[int, str]]:
        for number in self.numbers:
            yield number, self.tokenizer.decode(self.targets(number))


def val_task(opened, options: Options, say, folder: Path | None = None) -> ValTask | None:
    """Of a lumen.models.Opened, or of a prepared `folder`; None, and why is said, where nothing is
    held out or the data are not here any more."""
    why = "" if folder else why_no_val(opened.state)
    if why:
        say(f"val: left out: {why}")
        return None
    cfg = config_of(opened, folder)
    data = open_data(cfg)
    segments = [(0, data.weights)] if folder else opened.state["run"]["segments"]
    rows, _ = choose_val_rows(data, cfg, segments)
    if not rows:
        say("val: left out: nothing is held out")
        return None
    there = data.tokenizer_dir
    if there and opened.tokenizer and not opened.tokenizer.same_ids(tokenizers.load(str(there))):
        text = f"{folder or 'the data'} and the model have different tokenizers"
        source = next(iter(data.sources.values()))
        where = opened.folder.parent if opened.step is not None else opened.folder
        command = anew(source.path, source.manifest, None, where / "tokenizer.json")
        raise UserError("E113", f"{text}; prepare it with the model's: {command}")
    about = {"path": ", ".join(sorted({source.path for source in data.val_sources.values()}))}
    about["sha256"] = val_sum(data.val_sources, rows, cfg.model.max_seq_len)
    about["said"] = f"rows of max_seq_len as the trainer evaluates them; {UNIGRAM}"
    then = opened.state.get("measured_on")
    if then and then != about["sha256"] and not folder:
        changed = "not the rows that the run was evaluated on: its data or eval_tokens have changed"
        about["said"] += f"; {changed}"
        say(f"val: {changed}")
    task = ValTask(options, about, data, rows, opened.tokenizer)
    if folder:
        task.name = f"val-{folder.name}"
    return task


def why_no_val(state: dict) -> str:
    """ "" where its rows can be asked."""
    folders = data_folders(state)
    gone = [folder for folder in folders if not Path(folder).exists()]
    if "run" not in state or not folders:
        return "no training run, so nothing is held out"
    if gone:
        return f"the run's data are not here: {', '.join(gone)}"
    if state["config"].get("method", "sft") != "sft":
        return f"the run trains on preferences ({state['config']['method']}), not on text"
    return ""


def config_of(opened, folder: Path | None) -> Config:
    """What of a run's configuration says which rows are whose; of a folder by itself only that."""
    if folder:
        return Config(data_dir=str(folder), model=opened.model.cfg)
    state = opened.state
    names = ("data_dir", "data", "val_fraction", "document_mask", "eval_tokens")
    given = {name: state["config"][name] for name in names if name in state["config"]}
    return Config(**given, model=model_from_keys(state["config"]["model"]))
