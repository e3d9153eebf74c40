"""The loss of a model on held-out rows: the loop of the trainer's evaluations and evaluate.py's."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field

import torch

from lumen.decisions import Decision
from lumen.errors import UserError, raise_if
from lumen.windows import Batch, dummy_batch, fill_row


@dataclass
class Evaluation:
    """What an evaluation found over all its rows. Losses are nats per target."""

    loss: float
    accuracy: float  # share of targets whose token had the highest logit
    bits_per_byte: float | None  # None where the tokens' lengths are unknown
    by_source: dict[str, float]  # where there are several: the loss of each that has rows
    batch_losses: list[float]  # mean loss of each batch; the same batches every time
    mod: dict[str, float] = field(default_factory=dict)  # models with Mixture of Depths only

    def row(self) -> dict:
        """As metrics.jsonl says it."""
        row = {"val_loss": self.loss, "val_ppl": math.exp(min(self.loss, 50.0))}
        row |= {"val_accuracy": self.accuracy}
        row |= {"val_bpb": self.bits_per_byte} | self.mod
        return row | {f"val_loss/{name}": loss for name, loss in self.by_source.items()}

    def beside(self, other: Evaluation | None) -> Evaluation | None:
        """This one with the losses of other sources too; None where that evaluation was left."""
        if other is None:
            return None
        return dataclasses.replace(self, by_source=self.by_source | other.by_source)


def never() -> int:
    return 0


@torch.no_grad()
def evaluate_loss(
    model, rows, sources, parallel, batch_size: int, token_bytes=None, stop=never
) -> Evaluation | None:
    """The mean loss of `model` on validation rows, on all ranks: each reads its part of them.

    rows: [(name of the source, number of the window)]; sources: {name: lumen.windows.Source};
    token_bytes: (vocab_size,) bytes of each token. stop() is asked after each batch: where it is
    not 0 on any rank the evaluation is left, and is None. A row that one rank cannot read is that
    UserError on all ranks. Afterwards the model is in the mode in which it was before.
    """
    reader, readers = parallel.rows()
    loop = Loop(model, sources, parallel, batch_size, token_bytes)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(rows), batch_size * readers):
            begin = first + reader * batch_size
            loop.add(rows[begin : begin + batch_size])
            stopped, failed = parallel.all_reduce_max([stop(), int(loop.error is not None)])
            if failed:
                parallel.run_or_raise_on_all(raise_if, loop.error)
            if stopped:
                return None
    finally:
        model.train(was_training)
    return loop.result()


def evaluate_run(trainer) -> bool:
    """An evaluation of a run that trains, and what follows from it: patience, a row of
    metrics.jsonl, the orchestrator's look at it. Returns whether it is a new best.

    A signal leaves it; UserError, after a save, where a row cannot be read.
    """
    t, progress = trainer, trainer.progress
    t.finish_pending_step()
    t.watch.lap("other")
    began = time.perf_counter()
    progress.evaluated_at = t.step
    if not t.val_set:  # val_fraction: 0; the last checkpoint counts as the best then
        return False
    try:
        found = t.measure(t.val_set, t.token_bytes)
        if found and t.val_aside:  # sources of earlier phases: said, but no part of val_loss
            found = found.beside(t.measure(t.val_aside))
    except UserError:
        progress.evaluated_at = None
        t.save()
        raise
    if found is None:
        progress.evaluated_at = None
        t.stopping = True
        t.say("evaluation left: a signal came")
        return False
    new_best = progress.compare(t.step, found.loss, found.batch_losses)
    why = progress.out_of_patience(t.cfg.early_stopping_patience)
    if why:
        t.say(why)
        t.orchestrator.decide(Decision("patience", "stop", why, 2, basis="rule", always=True))
        progress.stopped_early = True
    took = time.perf_counter() - began
    row = t.tell.evaluation(found, new_best, took)
    t.orchestrator.evaluated(row)
    t.watch.leave_out(took)  # tokens per second are those of training
    t.watch.lap("evaluation")
    return new_best


class Loop:
    """One rank's part of an evaluation: sums over its batches, to which other ranks' are added."""

    def __init__(self, model, sources, parallel, batch_size: int, token_bytes):
        self.model, self.sources, self.parallel = model, sources, parallel
        self.batch_size, self.token_bytes = batch_size, token_bytes
        self.mod = list(model.sparse_layers("mod").values())
        self.error: UserError | None = None  # a row that could not be read
        device = parallel.device
        double = torch.float32 if device.type == "mps" else torch.float64
        # (n_sources, 4): cross-entropy, targets, how many were right, cross-entropy as MoD trains
        self.sums = torch.zeros(len(sources), 4, dtype=double, device=device)
        # (n_mod_layers, 2): tokens that the layer computed, tokens on which its two rules agree
        self.depth = torch.zeros(len(self.mod), 2, dtype=double, device=device)
        self.n_bytes = torch.zeros(len(sources), 1, dtype=torch.float64)  # of the targets
        self.means = []  # 0-d: the loss of each batch

    def add(self, rows) -> None:
        """A batch of rows, source by source; sets `error` where one cannot be read."""
        for k, (name, source) in enumerate(self.sources.items()):
            numbers = [number for of, number in rows if of == name]
            # where forward holds collectives a rank without rows takes part with none that counts
            if not numbers and self.parallel.collective_free:
                continue
            try:
                batch = self.read(source, numbers)
            except UserError as error:
                self.error = error
                if self.parallel.collective_free:
                    return
                batch = self.read(source, [])
            self.add_batch(k, batch)

    def read(self, source, numbers: list[int]) -> Batch:
        """Rows of a source; a short batch is filled up with rows without a target."""
        batch = dummy_batch(0, self.batch_size, self.model.cfg.max_seq_len, [source])
        for r, number in enumerate(numbers):
            fill_row(batch, r, source, number)
        return batch

    def add_batch(self, k: int, batch: Batch) -> None:
        """The sums of one forward pass to those of source k."""
        model, targets = self.model, batch.y[batch.y >= 0]
        if self.token_bytes is not None:
            self.n_bytes[k] += int(self.token_bytes[targets].sum())
        x, y, docs = self.parallel.feed.batch(*batch[1:])
        _, stats = model(x, targets=y, docs=docs)
        as_trained = stats["ce"]
        if self.mod:
            self.depth += stats["depth"].to(self.depth.dtype)
        if any(layer.routing == "learned" for layer in self.mod):
            # Once more by the rule of training, which chooses among all tokens of a row, later ones
            # too. Text is made by the causal rule, so that one's loss is the loss.
            model.causal = False
            as_trained = model(x, targets=y, docs=docs)[1]["ce"]
            model.causal = True
        sums = torch.stack([stats["ce"], stats["count"], stats["correct"], as_trained])
        self.sums[k] += sums.to(self.sums.dtype)
        if len(targets):
            self.means.append(stats["ce"] / stats["count"])

    def result(self) -> Evaluation:
        """Over all ranks, the same on each of them."""
        means = torch.stack(self.means).tolist() if self.means else []
        sums = torch.cat([self.sums.cpu(), self.n_bytes], dim=1)
        # plain numbers: of a tensor the others would get one on this rank's GPU
        ranks = self.parallel.gather((sums.tolist(), self.depth.tolist(), means))
        sums = torch.tensor([rank[0] for rank in ranks], dtype=torch.float64).sum(0)
        ce, targets, right, as_trained, n_bytes = sums.sum(0).tolist()
        if not targets:
            raise UserError("E114", "masks leave no target in the rows that an evaluation reads")
        by_source = {}
        if len(self.sources) > 1:
            by_source = {n: (s[0] / s[1]).item() for n, s in zip(self.sources, sums) if s[1]}
        found = Evaluation(
            loss=ce / targets,
            accuracy=right / targets,
            bits_per_byte=ce / math.log(2) / n_bytes if n_bytes else None,
            by_source=by_source,
            batch_losses=[loss for rank in ranks for loss in rank[2]],
        )
        if self.mod:
            depth = torch.tensor([rank[1] for rank in ranks], dtype=torch.float64).sum(0)
            usage, agree = (depth / targets).T.tolist()  # shares of all tokens, layer by layer
            skipped = sum(1 - share for share in usage)  # layers, for a token on average
            found.mod = {
                "val_loss_as_trained": as_trained / targets,
                "mod_gap": (ce - as_trained) / targets,
                "mod_agreement": sum(agree) / len(agree),
                "mod_depth": self.model.cfg.n_layers - skipped,
            }
        return found
