"""Evaluate a model: scores with what chance, the majority and a swapped question would have had.

    python evaluate.py MODEL                  MODEL: a run, a step, adapters, a Hugging Face folder
    python evaluate.py MODEL --tasks docstrings,my.jsonl,boolq:DIR [--shots 5] [--limit 500]
    torchrun --nproc_per_node=N evaluate.py MODEL ...        the questions are shared
    python evaluate.py --compare out/A out/B   paired differences of two that were evaluated
    python evaluate.py MODEL --tasks val:DIR   for both, if they were scored on different texts

Every score stands beside what chance, the majority's answer and a swapped question would have had;
docs/evaluation.md has the tasks, their files and the report. In this order: the options, `Run`,
main. What a question is says lumen/questions.py, how it is asked lumen/answers.py and
lumen/scorer.py, which tasks there are lumen/tasks.py; the loss on held-out rows is that of the
trainer, lumen/evaluation.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
import time
from pathlib import Path

import lumen.waiting  # noqa: F401 - before torch
from tqdm import tqdm

from lumen import chat, comparing, core_bundle, harness, option_names, scoreboard, scores
from lumen.answers import Answers, ask, code_sum, key_of
from lumen.config import Config
from lumen.errors import UserError, a_path, expand
from lumen.files import replacing
from lumen.launch import Words, check_launch, check_tasks, command
from lumen.overlap import overlap
from lumen.owner import Owner
from lumen.parallel import Parallel
from lumen.questions import Asked, Options, Task
from lumen.scorer import Packed, Scorer

# ---------------------------------------------------------------- the command

SHOWN = 8  # replies of a task in the report
TASKS = ("val", "docstrings", "smoke")  # where --tasks names none


def parser() -> Words:
    p = Words(prog="evaluate.py", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", type=a_path, help="a run, a step or a model's folder")
    names = f"names or files, with commas between (default {','.join(TASKS)}); val:DIR: held-out"
    names += " text of a prepared folder, the same one for all models that are compared"
    p.add_argument("--tasks", default="", help=names)
    p.add_argument("--data", metavar="DIR", help="where files of public tasks lie, by name")
    p.add_argument("--out", metavar="DIR", help="default: out/eval/NAME-STEP")
    p.add_argument("--limit", type=int, metavar="N", help="questions a task, drawn by --seed")
    p.add_argument("--shots", type=int, metavar="K", help="examples before each question")
    p.add_argument("--seed", type=int, default=1234, help="of what is drawn (default 1234)")
    p.add_argument("--by_letter", action="store_true", help="list choices, compare their letters")
    p.add_argument("--no_control", action="store_true", help="no swapped questions: half the time")
    p.add_argument("--stride", type=int, metavar="N", help="of texts: tokens a window moves on by")
    p.add_argument("--prompts", metavar="FILE", help="smoke prompts of your own")
    p.add_argument("--template", help="of prompts; default: the one that the model was trained on")
    p.add_argument("--allow_code", action="store_true", help="run what the model writes, here")
    text = "questions a forward pass, up to so many tokens: faster, but equal to rounding only"
    p.add_argument("--pack", type=int, default=0, metavar="N", help=text)
    text = "replies that are written at once: faster, but equal to rounding only; default: 1"
    p.add_argument("--slots", type=int, default=1, metavar="N", help=text)
    p.add_argument("--core_dir", metavar="DIR", help="CORE's bundle: its 22 tasks")
    p.add_argument("--lm_eval", default="", help="tasks of lm-eval (pip install lm-eval)")
    p.add_argument("--lm_eval_path", metavar="DIR", help="tasks of lm-eval that you wrote")
    p.add_argument(
        "--overlap_tokens", type=int, metavar="N", help="training tokens to look through"
    )
    p.add_argument("--detailed", action="store_true", help="each reply and choice: OUT/replies.md")
    p.add_argument("--best", action="store_true", help="the step of the lowest validation loss")
    p.add_argument("--step", type=int, metavar="N", help="that step; default: the newest")
    p.add_argument("--tokenizer", metavar="FILE", help="default: the model's")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16")
    text = "runs that were evaluated, or folders of results: differences from the first"
    p.add_argument("--compare", nargs="+", metavar="RUN", help=text)
    return p


LEAST = {"limit": 1, "shots": 0, "stride": 1, "overlap_tokens": 0, "step": 0, "seed": 0, "pack": 0}
LEAST["slots"] = 1
MOST = 2**62  # a question's number is added to the seed


def check_range(args) -> None:
    """E002."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < MOST:
            text = f"command line: --{name} {value} is not in [{least}, 2^62)"
            raise UserError("E002", text)
    if args.lm_eval_path and not args.lm_eval:
        text = "--lm_eval_path is where lm-eval looks for tasks; --lm_eval NAME says which"
        raise UserError("E002", f"command line: {text}")


def check_data(args) -> None:
    """E127: --data, where what is evaluated is meant; in other commands that is its meaning."""
    place = Path(expand(args.data))
    prepared = (place / "manifest.json").exists()
    if not prepared and not place.is_file():
        return
    what = "a prepared folder" if prepared else "a file"
    spec = f"val:{args.data}" if prepared else args.data
    text = f"--data {args.data} is {what}; --data says where files of public tasks lie, by name"
    words = shlex.join(["python", "evaluate.py", args.model, "--tasks", spec])
    raise UserError("E127", f"{text}. To evaluate on it: {words}")


class Run:
    """One start of this command: the model, how it is asked, where its answers go."""

    def __init__(self, args, parallel: Parallel):
        from lumen.models import open_model

        self.args, self.parallel = args, parallel
        self.main = parallel.rank == 0
        self.say = functools.partial(print, file=sys.stderr, flush=True) if self.main else never_say
        device = str(parallel.device)  # "auto" would be the first GPU on every rank
        how = (args.best, args.step, args.tokenizer, device, args.precision, self.say)
        self.opened = opened = parallel.run_or_raise_on_all(open_model, args.model, *how)
        if opened.tokenizer is None:
            raise UserError("E501", f"{args.model} has no tokenizer.json; --tokenizer names one")
        ids, rows = opened.tokenizer.n_vocab, opened.model.cfg.vocab_size
        if ids > rows:
            text = f"tokenizer {opened.tokenizer.name} has {ids:,} ids, {args.model} knows {rows:,}"
            raise UserError("E113", text)
        template = chat.find_template(args.template) if args.template else opened.template
        scorer = Scorer(opened.model, opened.tokenizer)
        if args.pack:
            scorer = Packed(opened.model, opened.tokenizer, args.pack)
        n_vocab = opened.tokenizer.n_vocab
        about = (opened.model, opened.tokenizer, template, n_vocab, scorer)
        self.asked = Asked(*about, slots=args.slots)
        names = ("shots", "limit", "seed", "by_letter", "allow_code", "stride", "prompts")
        chosen = {name: getattr(args, name) for name in names}
        self.replies: list[str] = []  # of all tasks, as markdown
        self.options = Options(**chosen, control=not args.no_control)
        step = "" if opened.step is None else f"-{opened.step}"
        self.out = Path(expand(args.out or f"out/eval/{opened.name}{step}"))
        self.owner = Owner(self.out, self.main)  # nobody else writes there meanwhile
        parallel.run_or_raise_on_all(self.owner.take, self.say)
        self.owner.accept()
        found = (scoreboard.earlier, self.out, self.about(), self.say)
        self.before = parallel.run_or_raise_on_all(*found)  # tasks that were asked before

    def tasks(self) -> list[Task]:
        """Those that are asked for, or else those that are built in. E127; E003 for lm-eval's."""
        from lumen.tasks import find_tasks

        args = self.args
        specs = [spec for spec in args.tasks.split(",") if spec]
        if args.core_dir:
            specs.append(f"core:{args.core_dir}")
        if not specs and not args.lm_eval:
            specs = list(TASKS)
        data = Path(expand(args.data)) if args.data else None
        if args.lm_eval and self.main:  # said now, not when all else has been asked
            harness.need()
            harness.find(args.lm_eval.split(","), args.lm_eval_path)
        return find_tasks(specs, data, self.options, self.opened, self.say)

    def key(self, task: Task) -> str:
        """Of all that an answer depends on beside the question: others are not gone on with."""
        opened, model = self.opened, self.asked.model
        facts = {"model": opened.sha256, "dtype": str(model.compute_dtype), "task": task.about}
        facts |= {"tokenizer": opened.tokenizer.to_json(), "device": self.parallel.device.type}
        facts |= {"pack": self.args.pack, "slots": self.args.slots}
        facts["template"] = self.asked.template and chat.describe(self.asked.template)
        options = dataclasses.asdict(self.options)
        del options["limit"]  # it chooses questions, and says nothing of an answer
        # labels may lie in another file than questions, and how both are asked in our code
        facts |= {"records": getattr(task, "records", None), "code": code_sum()}
        return key_of(facts | {"options": options, "name": task.name})

    def lines(self, task: Task) -> tuple[list[dict], float]:
        """Of all questions, and how many seconds those took that were asked now."""
        key = self.key(task)
        if len(set(self.parallel.gather(key))) > 1:  # a run that trains has saved meanwhile
            text = f"{task.name}: the processes have opened other models or other files"
            raise UserError("E600", f"{text}; of a run that trains name the step: --step N")
        kept = Answers(self.out / "answers", task.name, key, self.parallel.rank)
        known = kept.read()
        before = sum(task.number(i) in known for i in range(len(task)))
        progress = Progress(task, before, self.say, self.main and sys.stderr.isatty())
        try:
            lines = ask(task, self.asked, self.parallel, kept, bar=progress)
        except KeyboardInterrupt:
            self.say(f"stopped: {kept.whole.parent} has the answers; the same command goes on")
            raise
        kept.close()
        progress.end()
        self.parallel.all_reduce_max([0])  # nobody writes any more
        if self.main:
            kept.finish(lines)
        return lines, progress.seconds()

    def score(self, task: Task) -> dict:
        """A task as results.json says it."""
        lines, seconds = self.lines(task)
        about = (task.kind, task.name, task.metric, lines, self.asked.n_vocab, seconds)
        found = scores.scores_of(*about)
        how = {"kind": task.kind, "metric": task.metric, "about": task.about, "scores": found}
        if cut := sum("cut" in line for line in lines):
            text = f"{cut} of {len(lines)} prompts, whose beginning max_seq_len has no room for"
            how["about"] = task.about | {"cut": text}
            self.say(f"note       {task.name}: cut are {text}")
        how["date"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        if task.kind == "reply":
            replies = [{"prompt": line["prompt"], "reply": line["reply"]} for line in lines]
            how["samples"] = replies[:SHOWN]
            self.replies.append(scoreboard.detailed(task.name, lines))
        if task.kind == "choice" and self.args.detailed:
            questions = [task.ask(task.records[number]) for number in task.numbers]
            self.replies.append(scoreboard.chosen(task.name, lines, questions, task.metric))
        return how | {"options": dataclasses.asdict(self.options)}

    def score_lm_eval(self, names: list[str]) -> dict:
        """Tasks of lm-eval, by one process. E003, E127."""
        began = time.perf_counter()
        how = {"num_fewshot": self.args.shots, "limit": self.args.limit}
        found = harness.run(self.asked, names, self.args.lm_eval_path, self.opened, **how)
        done = {}
        for score in harness.rows(found, time.perf_counter() - began):
            task = done.setdefault(score.task, {"kind": "lm-eval", "about": how})
            task.setdefault("scores", []).append(score)
        return done

    def about(self) -> dict:
        """What results.json says of the model, and of how it is computed."""
        opened = self.opened
        tokenizer = {"name": opened.tokenizer.name}
        tokenizer["sha256"] = key_of({"tokenizer": opened.tokenizer.to_json()})
        return {
            "name": opened.name,
            "kind": opened.kind,
            "model": dataclasses.asdict(self.asked.model.cfg),
            "checkpoint": {"path": opened.folder, "step": opened.step, "sha256": opened.sha256},
            "tokenizer": tokenizer,
            "template": self.asked.template and self.asked.template.name,
            "precision": str(self.asked.model.compute_dtype).removeprefix("torch."),
            "device": str(self.parallel.device),
            "processes": self.parallel.world,
            "pack": self.args.pack,
            "slots": self.args.slots,
            "command": sys.argv,
        }

    def add_overlap(self, done: dict, tasks: list[Task]) -> None:
        """What of the questions stands in the training data, where they are known."""
        opened = self.opened
        how = (opened.tokenizer, self.say, self.args.overlap_tokens)
        found = overlap(tasks, opened.state, *how) if opened.state else {}
        for name, hits in found.items():
            done[name]["contamination"] = hits
            if hits["n_hit"]:
                self.say(f"{name}: {scoreboard.seen_before(hits)}")
        if tasks and not found:
            self.say(scoreboard.UNKNOWN)

    def write(self, done: dict) -> None:
        """E119."""
        results = self.about() | {"tasks": self.before | done}
        try:
            scoreboard.write(self.out, results, self.say)
            if self.args.detailed:
                with replacing(self.out / "replies.md") as file:
                    file.write("\n".join(self.replies).encode())
        except OSError as error:
            raise UserError("E119", f"{self.out}: {error.strerror}") from error


def never_say(text: str) -> None:
    """Of the ranks that do not speak."""


class Progress:
    """How far a task is: a bar on a terminal, else a line now and then."""

    SECONDS = 30  # between two lines

    def __init__(self, task: Task, before: int, say, terminal: bool):
        """before: questions that have an answer already."""
        self.task, self.before, self.say = task, before, say
        more = {"desc": task.name, "unit": "q", "disable": not terminal}
        self.bar = tqdm(initial=before, total=len(task), **more)
        self.asked = 0  # now, and not before
        self.began = self.told = time.perf_counter()

    def __call__(self, n: int) -> None:
        self.asked += n
        self.bar.update(n)
        if self.bar.disable and time.perf_counter() - self.told > self.SECONDS:
            self.told = time.perf_counter()
            done = self.before + self.asked
            left = (len(self.task) - done) * self.seconds() / self.asked
            text = f"{self.task.name}: {done} of {len(self.task)} questions{self.speed()}"
            self.say(f"{text}, {left:.0f} s left")

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def speed(self) -> str:
        return f", {self.asked / self.seconds():.1f} a second"

    def end(self) -> None:
        self.bar.close()
        speed = self.speed() if self.asked else ", all answered before"
        self.say(f"{self.task.name}: {len(self.task)} questions{speed}")


def main(argv: list[str]) -> int:
    words = parser()
    argv, notes = option_names.translate(words.prog, argv, words.names(), TASKS)
    args = words.parse_args(argv)
    if not (args.model or args.compare):
        text = "which model? python evaluate.py MODEL: a run, a step, a Hugging Face folder"
        raise UserError("E304", text)
    check_range(args)
    if args.compare:
        comparing.compare(args.compare, print, args.out and Path(expand(args.out)))
        return 0
    if args.data:
        check_data(args)
    check_launch()
    check_tasks()
    parallel = Parallel(Config(device=args.device))
    run = Run(args, parallel)
    for note in notes:
        run.say(note)
    tasks = parallel.run_or_raise_on_all(run.tasks)
    done = {task.name: run.score(task) for task in tasks}
    done |= core_bundle.core_result(done)
    parallel.close()  # what follows may take longer than ranks wait for one another
    if not run.main:
        return 0
    if args.lm_eval:
        done |= run.score_lm_eval(args.lm_eval.split(","))
    run.add_overlap(done, tasks)
    run.write(done)
    found = scoreboard.scores_in({"tasks": done})
    for line in scoreboard.table(found):
        print(line)
    run.say(f"{run.out}/report.md, results.json, answers/")
    run.owner.release()
    return 2 if scores.has_nan(found) else 0


if __name__ == "__main__":
    command(main, lasting=True)
