"""What a run says of itself: before it starts, at each log step, at its end.

`Teller` reads a Trainer and changes nothing in it. The texts are made in lumen/lines.py, from plain
values; the files are Report's.
"""

from __future__ import annotations

import shlex
import time

import torch

from lumen import lines
from lumen import machine as machines
from lumen.launch import clock
from lumen.machine import resident_bytes
from lumen.orchestrate import LR_CUT
from lumen.resolve import n_working
from lumen.schedule import every
from lumen.sums import StepNumbers


class Teller:
    def __init__(self, trainer):
        self.trainer = trainer
        self.forecast: dict = {}  # what the last look ahead found, for the next row
        self.peak_tries = 3  # how often the peak may still be measured again

    def facts(self, notes: list[str] | None = None) -> lines.Start:
        """What the start lines and suggested.yaml are made of."""
        t = self.trainer
        hint = [t.found.hint] if t.found.hint else []
        return lines.Start(
            cfg=t.cfg,
            run=t.run,
            model=t.counted,
            machine=t.machine,
            layout=t.parallel.layout,
            readers=t.parallel.rows()[1],
            sources=t.data.sources,
            val_sources=t.data.val_sources,
            n_working=n_working(t.counted),
            flops_per_token=t.flops_per_token,
            peak=t.found.peak,
            world=t.parallel.world,
            lr_at_peak=t.scheduled_lr(t.run.peak_step),
            last_lr=t.scheduled_lr(max(0, t.run.max_steps - 1)),
            misfit=t.found.misfit,
            fine_tunes=t.fine_tunes,
            notes=[*(notes or []), *t.machine.notes, *hint, *t.found.changes],
        )

    def start(self, notes: list[str]) -> None:
        """What will run; the console gets what everybody wants to know."""
        for line in lines.start_lines(self.facts(notes)):
            detail = line.split()[0] in lines.DETAILS
            say = self.trainer.report.log if detail else self.trainer.say
            say(line)

    def step(self, numbers: StepNumbers) -> None:
        """Each one moves the bar. The first of a start has a line, for the first log step of a
        large model is far away."""
        t, done = self.trainer, numbers.step + 1
        if every(t.cfg.log_interval, done) or done == t.run.max_steps:
            self.log_step(numbers)
        elif numbers.step == t.started_at:
            self.first_step(numbers)
        t.report.progress(done, numbers.loss)

    def first_step(self, numbers: StepNumbers) -> None:
        t, done = self.trainer, numbers.step + 1
        fresh = done == 1 and not (t.fine_tunes or t.cfg.init_from)
        n_vocab = t.cfg.model.vocab_size if fresh else 0
        t.say(lines.first_line(done, t.run.max_steps, numbers.loss, n_vocab))

    def log_step(self, numbers: StepNumbers) -> None:
        """A line on the console and a row of metrics.jsonl; speeds are means since the last one."""
        t, cfg, done = self.trainer, self.trainer.cfg, numbers.step + 1
        interval = t.watch.interval(done)
        row = {"step": done, "attempt": t.report.attempt, "tokens": t.tokens}
        row |= lines.step_row(numbers)
        # MoD's capacity may be annealed, and the FLOPs with it
        flops = t.model.flops_per_token() if t.mod else t.flops_per_token
        rate = interval.speed() * t.targets_per_step * flops
        row |= lines.speed_row(interval, t.targets_per_step, flops, self.peak(rate))
        row["dropped"] = t.orchestrator.dropped
        row |= lines.health_row(t.orchestrator.health.status, t.orchestrator.health.causes)
        row |= self.forecast
        self.forecast = {}
        row |= lines.memory_row(t.parallel.device)
        if cfg.z_loss:
            row["z_loss"] = numbers.z_loss
        if numbers.experts is not None:
            # the weight in force: it is a knob, and may have been changed on the way
            weight = next(iter(t.moe.values())).router.aux_weight
            z_weight = cfg.model.router_z_loss_weight
            row |= lines.experts_row(numbers.experts, t.targets_per_step, weight, z_weight)
        if numbers.depth is not None:
            row |= lines.depth_row(numbers.depth)
        cursor = numbers.cursor + t.run.rows_per_step
        read = (t.loader.epochs(cursor), t.loader.rows(cursor))
        row |= lines.epoch_row(*read, cfg.model.max_seq_len)
        t.report.record(row)
        for name, values in lines.routing_bars(numbers.experts, numbers.depth).items():
            t.report.record_bars(name, values, done)
        if numbers.experts is not None:
            t.report.record_experts(list(lines.share_bars(numbers.experts).values()), done)
        gone = sum(t.watch.spent.values())
        left = (t.run.max_steps - done) / interval.speed()
        t.say(lines.step_line(row, t.run.max_steps, gone, left))
        for line in lines.routing_lines(numbers.experts, numbers.depth, cfg.model.n_layers):
            t.say(line)
        t.watch.restart(done, interval)

    def peak(self, rate: float) -> float:
        """FLOP/s of all ranks' matrices together. A step at a higher `rate` shows that it was
        measured while the machine was busy: again, on this rank, a few times at most."""
        t = self.trainer
        sheet = machines.sheet_flops(t.machine)  # nothing that is measured
        if rate > t.found.peak * t.parallel.world and self.peak_tries and not sheet:
            self.peak_tries -= 1
            t.found.peak = max(t.found.peak, machines.peak_flops(t.machine))
        return t.found.peak * t.parallel.world

    def evaluation(self, found, new_best: bool, took: float) -> dict:
        """Lines on the console and a row of metrics.jsonl, which is returned. found: of
        evaluate.evaluate_loss; took: seconds."""
        t = self.trainer
        row = {"step": t.step, "attempt": t.report.attempt, "tokens": t.tokens} | found.row()
        row |= {"best_val_loss": t.progress.best_val_loss, "best_step": t.progress.best_step}
        t.report.record(row)
        for line in lines.evaluation_lines(row, new_best, took, t.cfg.model):
            t.say(line)
        return row

    def end(self, state: str, code: int) -> str:
        """The last line; returns the reason that status.json gives."""
        t, orch = self.trainer, self.trainer.orchestrator
        worse = "; ".join(orch.worse_than_guessing() or ())
        learned = " learned" if t.fine_tunes else ""  # of a conversation the replies alone
        text = f"{state} at step {t.step}: {t.tokens:,} tokens{learned}"
        if orch.dropped:
            text += f", {orch.dropped} steps dropped"
        text += f", {clock(time.monotonic() - t.started)}"
        if spent := sum(t.watch.spent.values()):
            share = 100 * orch.seconds / spent
            t.report.log(f"settings   the orchestrator took {share:.2f} % of the time")
        if worse:
            text += f"; {worse}"
        if code:
            text += "; E307: the last checkpoint could not be written"
        t.say(text)
        t.say(f"next       {self.what_next(state)}")
        if code:
            return "the last checkpoint could not be written"
        if state == "finished":
            return worse
        # stopped by a signal: a scheduler may start it again
        return "as asked for" if t.signals.stop == 2 else ""

    def what_next(self, state: str) -> str:
        """What a user may type now."""
        t, out = self.trainer, shlex.quote(str(self.trainer.out))
        if state != "finished":
            return "the same command goes on from here"
        if t.fine_tunes and t.template:  # of conversations, not of plain text
            return f"python sample.py {out} --chat"
        return f'python sample.py {out} --prompt "..."; python evaluate.py {out}'

    def suggest(self) -> None:
        """suggested.yaml, from what this run has found."""
        t, device = self.trainer, self.trainer.parallel.device
        used = resident_bytes() or 0
        if device.type == "cuda":
            used = torch.cuda.max_memory_reserved()
        found = (used / machines.total_memory(device), t.found.hint)
        rollbacks = len(t.orchestrator.escalation.rollbacks)
        t.report.write_suggestion(
            lines.suggestion(self.facts(), t.written, *found, rollbacks, LR_CUT)
        )
