"""Evaluate a model: scores with what chance, the majority and a swapped question would have had.

    python evaluate.py MODEL                  MODEL: a run, a step, adapters, a Hugging Face folder
    python evaluate.py MODEL --tasks docstrings,my.jsonl,boolq:DIR [--shots 5] [--limit 500]
    torchrun --nproc_per_node=N evaluate.py MODEL ...        the questions are shared
    python evaluate.py --compare out/eval/A out/eval/B       paired differences

In this order: the loss on rows of tokens, the loop that the trainer's evaluations use too; the loop
over the questions of a task (lumen/questions.py); the command. Tasks by name: lumen/tasks.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from lumen.answers import Answers, key_of
from lumen.config import Config
from lumen.decisions import Decision
from lumen.errors import UserError, a_path, expand, raise_if
from lumen.launch import Words, check_launch, command
from lumen.parallel import Parallel
from lumen.questions import Asked, Options, Task
from lumen.windows import Batch, dummy_batch, fill_row


ROUND = 8  # questions that each rank asks before the ranks hear of one another


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
        row = {"val_loss": self.loss, "val_accuracy": self.accuracy}
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


# ---------------------------------------------------------------- questions


def ask(
    task: Task, asked: Asked, parallel, kept: Answers | None = None, stop=never, bar=None
) -> list[dict] | None:
    """A line for each question of a task, in order and the same on all ranks: each asks its part.

    kept: lines from before are not asked again, and new ones are written down one by one. stop() as
    in evaluate_loss, now and then: then None. bar(n): n more are done. A UserError on one rank is
    raised on all.
    """
    lines = {}
    for others in parallel.gather(kept.read() if kept else {}):  # each rank may have its own disk
        lines |= others
    todo = [i for i in range(len(task)) if task.number(i) not in lines]
    # where forward holds collectives all ranks ask the same
    first, ranks = parallel.rows() if parallel.collective_free else (0, 1)
    writes = kept and (parallel.collective_free or parallel.rank == 0)
    found = {}
    for begin in range(0, len(todo), ranks * ROUND):
        error = fault = None
        mine = todo[begin + first : begin + ranks * ROUND : ranks]
        try:
            for i in mine:
                line = task.line(i, asked)
                found[line["i"]] = line
                if writes:
                    kept.append(line)
        except UserError as caught:
            error = caught
        except Exception as caught:  # ours, or memory: the other ranks must not wait for this one
            fault = caught
        stopped, failed = parallel.all_reduce_max([stop(), int(bool(error or fault))])
        if failed:
            parallel.run_or_raise_on_all(raise_if, error)
            texts = parallel.gather(fault and f"{type(fault).__name__}: {fault}")
            raise RuntimeError(next(text for text in texts if text)) from fault
        if stopped:
            return None
        if bar:
            bar(min(ranks * ROUND, len(todo) - begin))
    for others in parallel.gather(found):
        lines |= others
    return [lines[task.number(i)] for i in range(len(task))]


# ---------------------------------------------------------------- rows


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


# ---------------------------------------------------------------- the command

TASKS = ("val", "docstrings", "smoke")  # where --tasks names none


def parse(argv: list[str]) -> argparse.Namespace:
    p = Words(prog="evaluate.py", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", type=a_path, help="a run, a step or a model's folder")
    names = f"names or files, with commas between (default {','.join(TASKS)})"
    p.add_argument("--tasks", default="", help=names)
    p.add_argument("--data", metavar="DIR", help="where files of public tasks lie, by name")
    p.add_argument("--out", metavar="DIR", help="default: out/eval/MODEL")
    p.add_argument("--limit", type=int, metavar="N", help="questions a task, drawn by --seed")
    p.add_argument("--shots", type=int, metavar="K", help="examples before each question")
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--by_letter", action="store_true", help="list choices, compare their letters")
    p.add_argument("--no_control", action="store_true", help="no swapped questions: half the time")
    p.add_argument("--stride", type=int, metavar="N", help="of texts: tokens a window moves on by")
    p.add_argument("--prompts", metavar="FILE", help="smoke prompts of your own")
    p.add_argument("--template", help="of prompts; default: the one that the model was trained on")
    p.add_argument("--allow_code", action="store_true", help="run what the model writes, here")
    p.add_argument("--core_dir", metavar="DIR", help="CORE's bundle: its 22 tasks")
    p.add_argument("--lm_eval", default="", help="tasks of lm-eval (pip install lm-eval)")
    p.add_argument("--lm_eval_path", metavar="DIR", help="tasks of lm-eval that you wrote")
    p.add_argument("--overlap_tokens", type=int, metavar="N", help="training tokens to look through")
    p.add_argument("--detailed", action="store_true", help="all replies, in OUT/replies.md")
    p.add_argument("--best", action="store_true", help="the step of the lowest validation loss")
    p.add_argument("--step", type=int, metavar="N")
    p.add_argument("--tokenizer", metavar="FILE", help="default: the model's")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16")
    p.add_argument("--compare", nargs="+", metavar="OUT", help="results, against the first")
    return p.parse_args(argv)


class Run:
    """One start of this command: the model, how it is asked, where its answers go."""

    def __init__(self, args, parallel: Parallel):
        from lumen.models import open_model

        self.args, self.parallel = args, parallel
        self.main = parallel.rank == 0
        self.say = functools.partial(print, file=sys.stderr, flush=True) if self.main else never_say
        how = (args.best, args.step, args.tokenizer, args.device, args.precision, self.say)
        self.opened = opened = parallel.run_or_raise_on_all(open_model, args.model, *how)
        if opened.tokenizer is None:
            raise UserError("E501", f"{args.model} has no tokenizer.json; --tokenizer names one")
        template = chat.find_template(args.template) if args.template else opened.template
        scorer = Scorer(opened.model, opened.tokenizer)
        n_vocab = opened.tokenizer.n_vocab
        self.asked = Asked(opened.model, opened.tokenizer, template, n_vocab, scorer)
        names = ("shots", "limit", "seed", "by_letter", "allow_code", "stride", "prompts")
        chosen = {name: getattr(args, name) for name in names}
        self.options = Options(**chosen, control=not args.no_control)
        step = "" if opened.step is None else f"-{opened.step}"
        self.out = Path(expand(args.out or f"out/eval/{opened.name}{step}"))

    def tasks(self) -> list[Task]:
        """Those that are asked for, or else those that are built in. E127."""
        from lumen import core_bundle
        from lumen.tasks import find_tasks

        args = self.args
        specs = [spec for spec in args.tasks.split(",") if spec]
        if not specs and not (args.core_dir or args.lm_eval):
            specs = list(TASKS)
        data = Path(expand(args.data)) if args.data else None
        found = find_tasks(specs, data, self.options, self.opened, self.say)
        if args.core_dir:
            found += core_bundle.read_core(Path(expand(args.core_dir)), self.options)
        return found

    def key(self, task: Task) -> str:
        """Of all that an answer depends on beside the question: others are not gone on with."""
        opened, model = self.opened, self.asked.model
        facts = {"model": opened.sha256, "dtype": str(model.compute_dtype), "task": task.about}
        facts |= {"tokenizer": opened.tokenizer.to_json(), "device": self.parallel.device.type}
        facts["template"] = self.asked.template and chat.describe(self.asked.template)
        options = dataclasses.asdict(self.options)
        del options["limit"]  # it chooses questions, and says nothing of an answer
        return key_of(facts | {"options": options, "name": task.name})

    def lines(self, task: Task) -> tuple[list[dict], float]:
        """Of all questions, and how many seconds it took."""
        kept = Answers(self.out / "answers", task.name, self.key(task), self.parallel.rank)
        began = time.perf_counter()
        with tqdm(total=len(task), desc=task.name, unit="q", disable=not self.shows_bar()) as bar:
            lines = ask(task, self.asked, self.parallel, kept, bar=bar.update)
        seconds = time.perf_counter() - began
        kept.close()
        self.parallel.all_reduce_max([0])  # nobody writes any more
        if self.main:
            kept.finish(lines)
        return lines, seconds

    def shows_bar(self) -> bool:
        return self.main and sys.stderr.isatty()

    def score(self, task: Task) -> dict:
        """A task as results.json says it."""
        lines, seconds = self.lines(task)
        about = (task.kind, task.name, task.metric, lines, self.asked.n_vocab, seconds)
        found = scores.scores_of(*about)
        self.say(f"{task.name}: {len(lines)} questions, {len(lines) / seconds:.1f} a second")
        for line in scoreboard.table(found):
            self.say(line)
        how = {"kind": task.kind, "metric": task.metric, "about": task.about}
        return how | {"options": dataclasses.asdict(self.options), "scores": found}


def never_say(text: str) -> None:
    """Of the ranks that do not speak."""


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.compare:
        scoreboard.compare(args.compare, print, args.out and Path(expand(args.out)))
        return 0
    check_launch()
    parallel = Parallel(Config(device=args.device))
    run = Run(args, parallel)
    tasks = parallel.run_or_raise_on_all(run.tasks)
    done = {task.name: run.score(task) for task in tasks}
    parallel.close()
    return 0


if __name__ == "__main__":
    command(main, lasting=True)
