"""What a run asks its model on the way: `evaluate: {every: N, tasks: [...]}` in a training YAML.

Nothing here touches what is trained: a run has the same bits without it. The tasks are those of
evaluate.py (lumen/tasks.py); their numbers go where the run's others go, as eval/TASK/METRIC. Each
question is asked by itself, so that a number depends on the weights and on no number of processes.
"""

from __future__ import annotations

import time
from pathlib import Path

from lumen import chat
from lumen import tokenizer as tokenizers
from lumen.answers import ask
from lumen.config import EvaluateConfig
from lumen.errors import UserError
from lumen.files import read_lines
from lumen.questions import Asked, Options, Task
from lumen.replies import uncompiled
from lumen.scorer import Scorer
from lumen.scores import Score, scores_of

SAID = ("stderr", "chance", "majority")  # of a task's headline, beside its value


def make_tasks(cfg: EvaluateConfig) -> list[Task]:
    """Without their controls, which evaluate.py asks too: here they would double the time. E127."""
    from lumen.tasks import find_tasks  # many rooms, which only a run that asks has need of

    options = Options(shots=cfg.shots, limit=cfg.limit, control=False)
    return find_tasks(cfg.tasks, Path(cfg.data) if cfg.data else None, options)


class InTraining:
    """Of a Trainer, whose `iterations` calls `look` before each step."""

    def __init__(self, trainer):
        """Before anything is prepared or allocated. E127."""
        self.trainer = trainer
        self.every = trainer.cfg.evaluate.every
        self.tasks = make_tasks(trainer.cfg.evaluate) if self.every else []
        self.tokenizer = self.template = None
        self.asked_at: int | None = None  # the step before which all were asked

    def open(self) -> None:
        """The data are there, and with them what questions are written in. E501; E600 where ranks
        read other files."""
        if not self.tasks:
            return
        data, par = self.trainer.data, self.trainer.parallel
        if data.tokenizer_dir is None:
            text = "evaluate.tasks are texts, and bare shards bring no tokenizer"
            raise UserError("E501", f"{text}: prepare the data with prepare_data.py")
        self.tokenizer = tokenizers.load(str(data.tokenizer_dir))
        self.template = chat.find_template(data.template) if data.template else None
        sizes = par.gather([(task.name, len(task)) for task in self.tasks])
        if any(other != sizes[0] for other in sizes):
            raise UserError("E600", f"evaluate.tasks: ranks have other questions: {sizes}")

    # ---- when

    def is_due(self, due) -> bool:
        t = self.trainer
        if not self.tasks or t.stopping or not t.step:
            return False
        return (due.last or t.step % self.every == 0) and self.asked_at != t.step

    def was_asked(self) -> bool:
        """Whether metrics.jsonl has all of the step from which this process goes on."""
        t, told = self.trainer, set()
        with t.report.optional("metrics.jsonl"):
            for row in read_lines(t.out / "metrics.jsonl"):
                if row.get("step") == t.step:
                    told |= set(row)
        told = t.parallel.broadcast(told)  # of rank 0, whatever the others see there
        return all(any(key.startswith(prefix(task)) for key in told) for task in self.tasks)

    def look(self, due) -> None:
        """Asks, where it is time. A signal leaves it, and then the run is saved and ends."""
        t = self.trainer
        if self.asked_at != t.step:
            self.asked_at = None  # after a rollback a step comes again
        if not self.is_due(due):
            return
        self.asked_at = t.step
        if t.step == t.started_at and self.was_asked():
            return
        t.watch.lap("other")
        began = time.perf_counter()
        whole = self.ask_all()
        t.watch.leave_out(time.perf_counter() - began)  # tokens per second are those of training
        t.watch.lap("evaluation")
        if not whole:
            t.say("evaluation on tasks left: a signal came")
            t.stopping = True
            due.save = due.save or t.step != t.started_at
            if due.last:  # else the run would be finished, and nobody would ask any more
                t.progress.evaluated_at = None

    # ---- what

    def ask_all(self) -> bool:
        """Every task, a line on the console and a row of metrics.jsonl; False: a signal came. What
        goes wrong is said, and the run goes on."""
        t = self.trainer
        scorer = Scorer(t.model, self.tokenizer)  # anew: it remembers what these weights made
        asked = Asked(t.model, self.tokenizer, self.template, self.tokenizer.n_vocab, scorer)
        row = {"step": t.step, "attempt": t.report.attempt, "tokens": t.tokens}
        found = {}
        was_training = t.model.training
        t.model.eval()  # no dropout, and MoD by its causal rule
        try:
            for task in self.tasks:
                with t.report.optional(f"evaluate {task.name}"), uncompiled(t.model):
                    began = time.perf_counter()
                    lines = ask(task, asked, t.parallel, stop=lambda: t.signals.stop)
                    if lines is None:
                        return False
                    found |= self.tell(task, lines, time.perf_counter() - began)
        finally:
            t.model.train(was_training)
        if found:
            t.report.record(row | found)
        return True

    def tell(self, task: Task, lines: list[dict], seconds: float) -> dict:
        """The numbers of a task as metrics.jsonl says them, once they are on the console."""
        row = {}
        about = (task.kind, task.name, task.metric, lines, self.tokenizer.n_vocab, seconds)
        for score in scores_of(*about):
            row[prefix(task) + score.metric] = score.value
            if score.headline:
                row |= {prefix(task) + name: getattr(score, name) for name in SAID}
                step = self.trainer.step
                self.trainer.say(f"eval       step {step}: {in_words(score)}, {seconds:.1f} s")
        return row


def prefix(task: Task) -> str:
    return f"eval/{task.name}/"


def in_words(score: Score) -> str:
    """docstrings acc 0.310 ± 0.020 (chance 0.250, majority 0.260), 200 questions"""
    text = f"{score.task} {score.metric} {score.value:.3f}"
    if score.stderr is not None:
        text += f" ± {score.stderr:.3f}"
    beside = []
    for name in ("chance", "majority"):
        if getattr(score, name) is not None:
            beside.append(f"{name} {getattr(score, name):.3f}")
    if beside:
        text += f" ({', '.join(beside)})"
    return f"{text}, {score.n:,} questions"
