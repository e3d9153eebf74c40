"""Train a language model.

    python train.py configs/quickstart.yaml
    torchrun --nproc_per_node=N train.py CONFIG [--key value ...]

In this order: `Orchestrator`, which looks at every step and acts on failures; `Trainer`, whose
`iterations` is the training loop; main. `Trainer("configs/x.yaml").fit()` works in a notebook.
`--help` prints every key. The learning rate of a step is lumen/schedule.py's. All that changes with
the number of processes stands in lumen/parallel.py, what auto and null become in lumen/resolve.py,
what a run says in lumen/lines.py.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import lumen.waiting  # noqa: F401 - before torch
import torch

from lumen import checkpoint, failure, forecast, owner, plan, setup
from lumen.cli import read_any, read_config
from lumen.commands import Commands
from lumen.config import check_command, help_text, printed
from lumen.control import ByHand, Control
from lumen.data import choose_val_rows, open_data, prepare_first, val_sum
from lumen.decisions import JUDGE_AFTER, Decision, Judgement
from lumen.detectors import MAX_DROPS_IN_A_ROW, WATCHING, Alarm, Healed
from lumen.errors import UserError, raise_if
from lumen.evaluation import evaluate_loss, evaluate_run
from lumen.experts import Routing, anneal_depth, draw_dropout, release_parted, update_balance
from lumen.feed import to_host
from lumen.in_training import InTraining
from lumen.launch import check_launch, check_tasks, command, environment, fitted
from lumen.loader import Loader, mix
from lumen.machine import free_memory
from lumen.optim import LossScale, build_optimizer, clip_factor, step_optimizer
from lumen.orchestrate import LR_CUT, MAX_CORRELATION, EndEarly, KnobBack, Parts
from lumen.parallel import Parallel
from lumen.progress import Progress
from lumen.replay import read_decisions
from lumen.report import Report
from lumen.resolve import check_states, with_micro_batch, without_effect
from lumen.resume import StartingPoint, check_paths
from lumen.saver import Saver, live_tensors
from lumen.schedule import every, lr_at
from lumen.signals import Signals
from lumen.snapshots import Snapshot
from lumen.state import State
from lumen.stopwatch import Stopwatch
from lumen.sums import (
    Pending,
    StepNumbers,
    empty_sums,
    flatten,
    of_layers,
    raise_flags,
    step_numbers,
    unflatten,
)
from lumen.tell import Teller
from lumen.windows import Sums, dummy_batch
from model import Transformer

# ---------------------------------------------------------------- orchestrator


class Orchestrator(Parts):
    """Looks at every step and acts on failures; a healthy run is the same to the bit without it.

    It looks at the numbers of each finished step and at each evaluation. What it may do:

    level 0  a note: a warning, advice, patience with a spike of the loss that may heal by itself
    level 1  drop a step whose gradient is not finite or explodes (the device decides, see guard)
    level 2  go back to the newest snapshot from before the onset, past the data since
    level 3  the same so soon again: go back further, with a lower learning rate for a while
    level 4  and again: stop with a diagnosis (E301)

    Modes: act; shadow (decides and writes down, does nothing); replay (repeats the decisions of a
    run); off (non-finite steps are dropped all the same). All ranks see the same reduced numbers,
    so all decide alike; only what one rank alone can know (files, clocks) has to travel.
    """

    # ---- the places in the loop

    def begin_iteration(self) -> bool:
        """What was decided an iteration ago, and a snapshot. Returns whether the run went back."""
        began, t = time.perf_counter(), self.trainer
        self.iteration += 1
        # data.phases: the row from which another mixture of sources begins has been passed
        new_mixture = any(self.cursor < start <= t.cursor for start, _ in t.run.segments[1:])
        if new_mixture and self.watching:
            self.loss.course.forget()  # other data, perhaps another loss
        self.cursor = t.cursor
        # Here all ranks stand between two steps, so here, and only here, weights may change. The
        # list is emptied first: what is carried out may ask for more.
        todo, self.todo = self.todo, []
        for item in todo:
            self.carry_out(item)
        if self.replay:
            for row in self.replay.at(t.cursor):
                self.replay.repeat(row, self)
        # after all that: a snapshot is of the run as it goes on from here
        if self.watching or self.replay:
            self.keep_snapshot()
        self.seconds += time.perf_counter() - began
        return self.went_back == self.iteration

    def lr_factor(self) -> float:
        """What the schedule is multiplied by: exactly 1.0 in a run nobody touched."""
        return self.control.knobs.get("lr_scale", 1.0) * self.escalation.lr_factor(self.iteration)

    def guard(self, loss, norm, unusable) -> tuple[torch.Tensor, torch.Tensor]:
        """(drop this step?, did its gradient explode?): 0-d bools on the device; nobody waits.

        loss: the mean, NaN where masks left no target; norm: of the true gradient; unusable: ranks
        that have no gradient to give (their data, their memory). All 0-d.
        """
        began = time.perf_counter()
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | (unusable > 0) | self.halted
        # on CUDA the host learns of it an iteration late: that iteration is void too
        self.halted = self.halted | (unusable > 0)
        # log G above what accepted steps make likely (course.NormLimit); None while they are few
        exploded = torch.zeros_like(bad)
        limit = self.explosion.norms.limit(self.iteration) if self.watching else None
        if self.replay:  # what broke then may not break now
            dropped, by_explosion = self.replay.drops(self.trainer.cursor)
            bad = torch.ones_like(bad) if dropped else bad
            exploded = torch.ones_like(bad) if by_explosion else exploded
        elif limit is not None:
            exploded = ~bad & (norm.log() > limit)
            # only so many in a row: a norm that stays high is a new normal, and dropping every
            # step from here on would be a run that stands still
            drop = exploded & (self.streak < MAX_DROPS_IN_A_ROW)
            self.streak = torch.where(exploded, self.streak + 1, torch.zeros_like(self.streak))
            bad = bad | drop if self.acting else bad
        self.seconds += time.perf_counter() - began
        return bad, exploded

    def observe(self, numbers: StepNumbers) -> None:
        """A finished step. UserError E301, E302 when the run cannot be saved."""
        began = time.perf_counter()
        # once a step, in the order of the steps, one iteration late on CUDA
        self.dropped += numbers.bad
        for detector in self.looking:
            for alarm in detector.look(numbers):
                self.hear(alarm, numbers)
        if not numbers.bad:
            self.snapshots.step_done(numbers.iteration, self.trainer.tokens, self.clean)
        if self.watching and every(self.cfg.check_interval, numbers.step + 1):
            self.examine(numbers)
        self.judge(numbers.iteration)
        self.seconds += time.perf_counter() - began

    def evaluated(self, row: dict) -> None:
        """An evaluation: it shows what training does not."""
        if not self.watching:
            return
        for detector in self.looking:
            for alarm in detector.look_at_evaluation(row):
                self.decide(Decision.of(alarm))
        verdict = self.note_guessing()
        if verdict:
            self.health.status, self.health.causes = "critical", [verdict[0]]

    # ---- what an alarm leads to

    def hear(self, alarm: Alarm | Healed, numbers: StepNumbers) -> None:
        """Notes and dropped steps are written down at once; what changes the run waits for the top
        of the next iteration, where all ranks stand between two steps."""
        if isinstance(alarm, Healed):
            if alarm.id is not None:
                self.decisions.outcome(alarm.id, "healed", numbers.step, alarm.stat)
        elif alarm.level == 4:  # nothing helps: the run ends, exit code 3
            raise UserError(alarm.code, alarm.reason)
        elif alarm.level < 2:  # on record; weights stay as they are
            alarm.id = self.decide(Decision.of(alarm), numbers)["id"]
        elif alarm.trigger != "experts" or not self.rebalancing.waits:
            self.todo.append(alarm)

    def carry_out(self, item) -> None:
        if isinstance(item, Commands):
            self.control.carry_out(item)
        elif isinstance(item, EndEarly):
            self.shorten(item.advice)
        elif isinstance(item, KnobBack):
            reason = f"the time of #{item.decision} is over"
            self.rebalancing.change(item.knob, item.value, reason, {})
        elif item.trigger == "experts":
            self.rebalancing.answer(item, self.experts.checks, self.iteration)
        else:
            self.escalate(item)
            if item.recovery_target is not None:
                back = self.went_back == self.iteration
                self.loss.recovery_target = item.recovery_target if back else None

    def escalate(self, alarm: Alarm) -> None:
        """Levels 2 to 4."""
        t, now = self.trainer, self.iteration
        if self.went_back == now:  # two alarms of one step: the first has been answered
            return
        d = Decision.of(alarm)
        d.more = {"stat": alarm.stat}
        # 2, or higher where the last rollback was not long ago and has not helped
        d.level = self.escalation.level(now)
        source = None
        if d.level <= 3 and not self.escalation.spent(now):
            older_than = self.escalation.last_source if d.level == 3 else None
            source = self.source(alarm.onset, older_than=older_than)
        # The tests behind an alarm take losses for independent. Data that are not shuffled make
        # them correlated, and then an alarm may be no more than a hard stretch of text.
        rho = abs((alarm.stat or {}).get("rho1", 0.0))
        if not self.cfg.enable_emergency_recovery:
            d.blocked = "enable_emergency_recovery: false"
        if rho > MAX_CORRELATION:
            d.blocked = f"losses are correlated ({alarm.stat['rho1']:.2f}): shuffle the data"
        # a hint for whoever reads decisions.jsonl: which weights went furthest since the snapshot
        moved = self.snapshots.moved_most(t.weights, t.cfg.model.init_std, t.parallel)
        if source is None:
            tried = self.escalation.rollbacks
            why = "rolling back did not help" if tried else "there is nothing to go back to"
            d.action, d.level, d.reason = "stop", 4, f"{alarm.reason}; {why}; {moved}"
            row = self.decide(d)
            if row["executed"]:
                text = f"{d.reason}; step {t.step}; the newest clean checkpoint in {t.out}"
                raise UserError("E301", f"{text} is not touched")
        else:
            lr = LR_CUT if d.level == 3 else 1.0
            d.reason = f"{alarm.reason}; {moved}"
            row = self.decide(d, do=lambda: self.go_back(source, alarm.onset, lr))
            if row["executed"]:
                self.escalation.rollbacks.append(now)
                # in a while it is judged whether that has helped
                self.decisions.due.append(Judgement(row["id"], now + JUDGE_AFTER, "rollback"))
                for detector in self.detectors.values():
                    detector.cool_down(now, self.escalation.cooldown_ends)
        if not row["executed"]:  # shadow: said once, then the new course is followed
            self.loss.course.forget()
        self.loss.phase = WATCHING

    def go_back(self, source: Snapshot | str, onset: int | None, lr: float = 1.0) -> dict:
        """Weights, moments and the step return to a snapshot or checkpoint; the cursor does not."""
        t = self.trainer
        before = {"step": t.step, "tokens": t.tokens}
        iteration, to_cursor = self.restore(source)
        # what is newer than where we are now never happened
        self.snapshots.discard(iteration + 1)
        for detector in self.detectors.values():
            detector.rolled_back(iteration, onset)
        self.went_back = self.iteration
        self.escalation.last_source = t.step
        if lr != 1.0:
            self.escalation.cut_at, self.escalation.cut = self.iteration, lr
        args = {"to_step": t.step, "next_row": t.cursor, "lr_mult": lr, "onset": onset}
        args |= {"from": "memory" if isinstance(source, Snapshot) else str(source)}
        args |= {"to_cursor": to_cursor}
        row = {"args": args, "before": before, "after": {"step": t.step, "tokens": t.tokens}}
        return row | {"cost": {"steps": before["step"] - t.step}}


# ---------------------------------------------------------------- trainer


@dataclass
class Due:
    """What comes before the next step."""

    evaluate: bool
    save: bool
    last: bool  # there is no next step
    fresh: bool  # this process was not just loaded from here: saving would repeat nothing


class Trainer(ByHand):
    """One run: cfg, run, model, optimizer, loader, orchestrator, parallel, step, cursor; `fit()`
    is the loop.

    config: a path, a preset's name, a list of command-line words, a dict of keys, or what
    read_config has made of one of these. parallel(cfg) -> Parallel.
    """

    def __init__(self, config, parallel=Parallel):
        cfg, written, notes = read_any(config)
        self.cfg = cfg  # as written; only the vocabulary is the data's to say
        self.written = written  # the keys that the user wrote, under our names
        self.out = Path(cfg.out_dir)
        self.started = time.monotonic()

        # where the run stands
        self.step = 0  # finished optimizer steps, dropped ones among them
        self.cursor = 0  # the next row that nobody has read
        self.tokens = 0  # trained on, without those of dropped steps
        self.progress = Progress()  # what the evaluations have found
        self.forecast = forecast.Forecast()  # where it will end
        self.pending: Pending | None = None  # the step whose numbers are on their way to the host
        self.latest: StepNumbers | None = None  # of the last finished step
        self.data_error: UserError | None = None  # why this rank could not read its rows

        # signals and commands, once all ranks have agreed on them
        self.stopping = False
        self.save_asked = False

        # made in build()
        self.model: Transformer | None = None
        self.loss_scale: LossScale | None = None  # of mixed_fp16
        self.beside: dict = {}  # what else state.json says of this run

        # nothing is written and no rank is waited for until here
        check_paths(cfg)
        check_command(cfg, self.fine_tunes)
        self.in_training = InTraining(self)  # reads the tasks that it will ask on the way
        prepare_first(cfg)  # before the ranks meet: it may take hours, a collective may not
        self.parallel = parallel(cfg)
        self.main = self.parallel.rank == 0  # this rank speaks and writes
        self.report = Report(self.out, self.main)
        self.owner = owner.Owner(self.out, self.main)
        self.tell = Teller(self)
        self.state = State(self)
        self.signals = Signals(self.main)  # what this rank has heard
        if self.parallel.collective_free:  # zero_stage: 0 is what this is
            notes = [*notes, *without_effect(cfg, written)]
        try:
            self.begin(notes)
        except BaseException:  # Ctrl-C too: out_dir must not stay claimed by a run that is not one
            self.owner.release()
            raise

    # ---- setting up; what is done once, and long, stands in lumen/setup.py

    def begin(self, notes: list[str]) -> None:
        """All that may refuse this start, and what it needs to train; from find_checkpoint on
        out_dir is its own."""
        cfg, par = self.cfg, self.parallel
        # what there is to read, and what there is to go on from
        self.data = par.run_or_raise_on_all(open_data, cfg)
        setup.take_vocabulary(self)
        self.start = StartingPoint(self.cfg, self.data, par, self.owner, self.say)
        self.model_written = self.start.model  # the model's keys, before anything was changed
        saved = par.run_or_raise_on_all(self.start.find_checkpoint)
        # what auto and null become; a resumed run keeps what it had
        setup.resolve(self, saved)
        weights = self.find_weights(saved)
        self.tell.start(notes)
        # read before out_dir is emptied, it may lie there
        replay = par.run_or_raise_on_all(read_decisions, cfg.orchestrator.replay)
        # from here on the disk changes: out_dir becomes this run's
        par.run_or_raise_on_all(self.start.create_out_dir)
        par.run_or_raise_on_all(self.start.adopt, saved)
        self.build(saved, weights)
        self.started_at = self.step  # 0, or the checkpoint's
        self.watch = Stopwatch(self.step, runs_ahead=par.device.type == "cuda")
        self.saver = Saver(cfg, par, self.owner, self.report, self.watch)
        self.control = Control(self)
        self.orchestrator = par.run_or_raise_on_all(Orchestrator, self, replay)
        if saved is not None:
            self.state.load_history(saved)
        setup.open_run(self)

    def build(self, saved: checkpoint.Checkpoint | None, weights: tuple | None) -> None:
        """Model, optimizer, loader; then their state from a checkpoint, or the weights that
        find_weights found."""
        cfg, run, par, data = self.cfg, self.run, self.parallel, self.data
        setup.use_deterministic(run.deterministic)
        # model; a checkpoint will overwrite every weight, so it needs no initial ones
        self.model = par.build(cfg, run.precision, fill=saved is None)
        weights = self.adapt(weights)  # here a base is frozen and gets its adapters
        setup.prepare_model(self.model, cfg, run, self.machine.compute_dtype)
        self.routing = Routing(self.model)
        self.moe, self.mod = self.routing.moe, self.routing.mod  # the sparse layers, by number
        # optimizer: all of its state exists from here on, so that it can be filled in place
        self.weights = par.weights(self.model)  # what the optimizer updates, by name
        self.optimizer = build_optimizer(cfg, self.weights, run.precision, par.owners())
        if run.precision == "mixed_fp16":
            self.loss_scale = LossScale(par.device)
        self.targets_per_step = run.rows_per_step * cfg.model.max_seq_len  # if all are valid
        # the same validation rows in every evaluation, or losses could not be compared; aside: of
        # sources that only earlier phases weigh, whose loss is told and counts for nothing
        self.val_set, self.val_aside = choose_val_rows(data, cfg, run.segments)
        self.progress.measured_on = val_sum(data.val_sources, self.val_set, cfg.model.max_seq_len)
        setup.fill(self, saved, weights)
        if self.found.probes:
            setup.probe(self)
        # loader: a seek is all it takes to go on where a checkpoint stood
        self.loader = Loader(data.sources, cfg.seed, run.segments, cfg.model.vocab_size)
        # self.run, not run: the probe may have found another size
        self.loader.start(self.cursor, *par.rows(), self.run.micro_batch, self.run.accumulation)
        if self.main:
            every_source = [*data.sources.values(), *data.val_sources.values()]
            self.loader.sums = Sums(every_source, str(self.out / "verified.jsonl"))

    # ---- where fine-tuning differs: finetune.py overrides these

    fine_tunes = False  # train.py refuses keys that only finetune.py obeys
    sum_names: tuple[str, ...] = ()  # what `loss` adds up beside the model's own sums

    def find_weights(self, saved: checkpoint.Checkpoint | None) -> tuple | None:
        """StartingPoint.find_weights, where this start has need of what init_from names."""
        if saved is not None and "base" in saved.state:
            raise UserError("E300", f"{saved.path} is of finetune.py, which goes on with it")
        anew = saved is None and self.cfg.init_from  # a checkpoint has all of its own
        return self.start.find_weights(self.cfg.init_from) if anew else None

    def adapt(self, weights: tuple | None) -> tuple | None:
        """The model has no optimizer yet. Returns the `weights` that are still to be filled in."""
        return weights  # all of them: nothing is frozen

    def loss(self, x, y, docs, *more) -> tuple[torch.Tensor, dict]:
        """(what is differentiated, sums by name) of a micro-batch, as the feed gives it."""
        return self.model(x, targets=y, docs=docs)  # `more` is of preference pairs

    def measure(self, rows: list, token_bytes=None):
        """An evaluate.Evaluation of these validation rows; None where a signal left it."""
        rest = (self.data.val_sources, self.parallel, self.run.micro_batch, token_bytes)
        return evaluate_loss(self.model, rows, *rest, lambda: self.signals.stop)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, by name; see saver.live_tensors."""
        return live_tensors(self.model, self.weights, self.optimizer)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do, not even the last evaluation."""
        through = self.step >= self.run.max_steps or self.progress.stopped_early
        return through and self.progress.evaluated_at == self.step

    # ---- the loop

    @owner.owning
    def fit(self) -> int:
        """Train to max_steps or until a signal. Returns the exit code; 4: the last save failed."""
        for _ in self.iterations():
            pass
        return self.end()

    def iterations(self):
        """The training loop. It yields the step at the top of each iteration, so that a notebook, a
        test or a benchmark can look and act between two steps.

        An iteration never comes back; a step does, after a rollback or when it ran out of memory.
        """
        cfg, par, model = self.cfg, self.parallel, self.model
        orch, watch = self.orchestrator, self.watch
        watch.start(self.step)
        self.report.open_bar(self.run.max_steps, self.step)
        model.train()
        while True:
            # what was decided an iteration ago: a rollback, commands; and a snapshot
            rolled_back = orch.begin_iteration()
            # whoever steps through this generator sees the run between two steps, and may change it
            yield self.step
            began_at = self.step

            # schedule: a function of the step and nothing else, so there is no state to save, and a
            # rollback takes it back with it; phases of the data may begin it anew
            lr = lr_at(cfg, self.run, self.step) * orch.lr_factor()
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            anneal_depth(model, self.step)
            release_parted(self.moe, self.step, par, self.say)  # halves of experts that were split

            # evaluate, save: of the weights as they are now, after self.step steps
            due = self.due(rolled_back)
            if due.evaluate:
                self.evaluate_now(due)
            self.in_training.look(due)  # asks the model `evaluate.tasks`, where it is time
            if due.save:
                self.save(wait=not cfg.save_async or due.last or self.stopping or rolled_back)
            if due.last or self.stopping:
                return
            if self.step < began_at:  # it was learned just now that the step before is void
                continue

            # forward and backward over the micro-batches
            sums = self.accumulate()

            # reduce: the sums, then the gradients in a fixed order. A replicated model's ranks have
            # not waited for one another until here: one without memory or data can still say so.
            vector, shapes = flatten(sums)  # (n,), fp64
            sums = unflatten(par.reduce(model, vector), shapes)
            # Each loss was divided by the targets of a step in which all are valid. The true count,
            # fp16's scale and clipping make one factor: exactly 1.0 when there is nothing to mend.
            factor = (self.targets_per_step / sums["count"].clamp(min=1)).float()  # 0-d, as below
            if self.loss_scale is not None:
                factor = factor / self.loss_scale.value
            norm = par.grad_norm(model) * factor  # of the true gradient
            watch.lap("communication")

            # guard: decided on the device, and nobody waits for it; a bad step changes nothing
            loss, unusable = sums["ce"] / sums["count"], sums["unread"] + sums["oom"]
            bad, exploded = orch.guard(loss, norm, unusable)

            # step
            factor = clip_factor(norm, cfg.grad_clip) * factor
            step_optimizer(self.optimizer, self.weights.values(), factor, bad)
            if self.loss_scale is not None:
                self.loss_scale.update(norm, orch.halted)
            if self.moe:
                update_balance(list(self.moe.values()), list(sums["moe.counts"]), bad)
            watch.lap("update")

            # observe and log the step before this one, whose numbers have arrived by now
            numbers = self.finish_pending_step()
            if numbers and numbers.oom:  # it was void, and so is this one: both are begun again
                continue
            self.pending = self.send_to_host(lr, sums, norm, bad, exploded)

            # advance; dropped steps too: the schedule goes on, and the rows are not read again
            self.step += 1
            self.cursor += self.run.rows_per_step  # over all ranks
            # on CUDA the numbers of this step are looked at an iteration later, so that the host
            # can queue the next one while the device still computes
            if not self.may_lag():
                numbers = self.finish_pending_step() or numbers
            self.heed(numbers)

    def due(self, rolled_back: bool) -> Due:
        """What comes before the next step. Pure: it looks, and changes nothing."""
        cfg, step = self.cfg, self.step
        moved = step != self.started_at
        last = step >= self.run.max_steps or self.progress.stopped_early
        # A process neither evaluates nor saves what it has just loaded, unless that was saved for a
        # signal, without its evaluation.
        missing = self.progress.evaluated_at != step
        fresh = moved or (missing and (last or step > 0))
        # a save always evaluates first, or nobody knew how good it is; the last step does both
        scheduled = last or every(cfg.save_interval, step)
        wanted = scheduled or self.save_asked or rolled_back or every(cfg.eval_interval, step)
        evaluate = wanted and not self.stopping and (rolled_back or (fresh and missing))
        # what could not be written is tried again ten times an interval
        retry = self.saver.unsaved and not self.saver.writing
        retry = retry and every(max(1, cfg.save_interval // 10), step)
        asked = self.stopping or self.save_asked or retry
        save = rolled_back or (fresh and scheduled) or (moved and asked)
        return Due(evaluate, save, last, fresh)

    def evaluate_now(self, due: Due) -> None:
        """Evaluate; a new best is saved, patience or a signal may end the run."""
        new_best = self.evaluate()
        # patience may just have run out
        due.last = due.last or self.progress.stopped_early
        if due.fresh and (new_best or self.progress.stopped_early):
            due.save = True
        if self.stopping and self.step != self.started_at:  # a signal came in the meantime
            due.save = True

    def accumulate(self) -> dict[str, torch.Tensor]:
        """Forward and backward over this rank's micro-batches. Returns its sums and flags, by name.

        A rank that runs out of memory or cannot read its rows says so in a flag: all learn it from
        the reduced sums, and the step is void everywhere.
        """
        par = self.parallel
        self.model.zero_grad(set_to_none=True)  # whatever came before: a step sums its own only
        # one draw a step, not one a micro-batch: an expert that is out is out for all rows
        layers = list(self.moe.values())
        if layers and layers[0].router.expert_dropout:
            draw_dropout(layers, mix(self.cfg.seed, -1 - self.cursor) >> 8)
        self.watch.take_marks()  # those of an iteration that was void
        sums = empty_sums(self.model, par.device, self.sum_names)
        out_of_memory = False
        try:
            for micro in range(self.run.accumulation):
                self.watch.lap("compute" if micro else "other")
                self.watch.mark("compute")
                if not self.microstep(micro, sums):
                    break
        except torch.OutOfMemoryError:
            # where forward holds collectives the others wait in one: nothing can be mended here
            if not par.collective_free:
                raise
            out_of_memory = True
        if out_of_memory:  # out here, where no traceback holds on to tensors any more
            self.optimizer.zero_grad(set_to_none=True)
            for value in sums.values():
                value.zero_()
            sums["oom"].fill_(1)
            free_memory(par.device)
        self.watch.lap("compute")
        self.watch.mark("compute")
        raise_flags(self, sums)  # what the others have to know of this rank
        return sums

    def microstep(self, micro: int, sums: dict[str, torch.Tensor]) -> bool:
        """One forward and backward pass; adds to `sums`. False where its rows cannot be read."""
        par = self.parallel
        try:
            row, *batch = self.loader.next()  # x, y: (rows, T), y one token further; documents
        except UserError as error:  # this rank cannot go on; the others learn it from the flag
            self.data_error = error
            sums["unread"].fill_(1)
            if par.collective_free:  # else it has a part in the collectives of forward and backward
                return False
            shape = (self.run.micro_batch, self.model.cfg.max_seq_len)
            row, *batch = dummy_batch(self.cursor, *shape, self.data.sources.values())
        self.watch.lap("data")
        self.watch.mark("data")
        torch.manual_seed(mix(self.cfg.seed, row))  # dropout is a function of the row
        with par.microstep(self.model, micro == self.run.accumulation - 1):
            total, counted = self.loss(*par.feed.batch(*batch))  # x, y, docs: (rows, T) each
            # a constant, not this micro-batch's own count: the gradient of a step is any cut's
            loss = total / self.targets_per_step
            if self.loss_scale is not None:
                loss = loss * self.loss_scale.value
            loss.backward()  # gradients add up over the micro-steps
        for name, value in counted.items():
            sums[name] += value  # on the device, without a sync
        return True

    def send_to_host(self, lr: float, sums: dict, norm, bad, exploded) -> Pending:
        """The numbers of this step, on their way to the host."""
        cfg = self.cfg
        self.routing.sums = {name: sums[name] for name in sums if of_layers(name)}
        numbers = {name: sums[name] for name in sums if not of_layers(name)}
        numbers |= {"norm": norm, "bad": bad, "exploded": exploded}
        # statistics of experts are long: (layers, experts) each, so only where somebody looks
        log_interval = cfg.expert_log_interval or cfg.log_interval
        following = self.step + 1
        if every(log_interval, following) or every(cfg.orchestrator.check_interval, following):
            numbers |= self.routing.numbers()
        vector, shapes = flatten(numbers)
        host, arrived = to_host(vector)  # nobody waits here
        place = (self.step, self.cursor, self.orchestrator.iteration)
        return Pending(*place, lr, host, shapes, arrived, self.watch.take_marks())

    def finish_pending_step(self) -> StepNumbers | None:
        """Take the numbers of the pending step off the device: count tokens, observe, log."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        sums = pending.take()
        self.watch.measure(pending.marks)
        numbers = step_numbers(pending, sums, self.parallel.world)
        # once all ranks have written their part of a checkpoint it gets its name
        self.saver.finish_if_written(pending.iteration, sums["writing"])
        if sums["unread"]:  # that step was dropped: go back to before it, save, say what happened
            self.step, self.cursor = pending.step, pending.cursor
            self.save()
            self.parallel.run_or_raise_on_all(raise_if, self.data_error)  # each with its own words
        if numbers.control:
            self.orchestrator.take_commands()
        if numbers.oom:
            failure.begin_again_smaller(self, pending.step, pending.cursor)
            return numbers
        routing = self.routing.statistics(sums)
        numbers.experts = routing.get("experts")
        numbers.depth = routing.get("depth")
        # from here on the step has happened
        self.tokens += numbers.tokens
        self.latest = numbers
        if not numbers.bad:
            flops = self.tokens * self.flops_per_token
            self.forecast.add(self.tokens, flops, numbers.loss, pending.lr)
        self.orchestrator.observe(numbers)
        following = pending.step + 1
        end = self.run.max_steps
        if every(self.cfg.orchestrator.check_interval, following) and following < end:
            forecast.advise(self)  # there may be a reason to cut the run short
        self.tell.step(numbers)
        return numbers

    def may_lag(self) -> bool:
        """Whether a step's numbers may still be on their way when the next one begins. A CPU has
        nothing to overlap them with, and a save must not leave a step half counted."""
        cfg, step = self.cfg, self.step
        intervals = (cfg.save_interval, cfg.eval_interval, cfg.evaluate.every)
        ends = step >= self.run.max_steps or any(every(n, step) for n in intervals)
        return not (ends or self.parallel.device.type == "cpu")

    def heed(self, numbers: StepNumbers | None) -> None:
        """What a rank was asked for (a signal, a command) and all have learned from the sums."""
        self.stopping = numbers is not None and numbers.stop
        self.save_asked = numbers is not None and numbers.save
        if self.save_asked:
            self.signals.save = 0
        if self.step == self.started_at + 1:  # compilers are done and disks are warm
            self.saver.set_timeout(self.cfg.comm_timeout)

    def end(self) -> int:
        """After the last iteration: the last save, the last words. Returns the exit code."""
        self.saver.finish()
        for _ in range(3):  # a full disk may have been freed in the meantime
            if self.saver.unsaved:
                time.sleep(1)
                self.save()
        self.finish_pending_step()
        state = "finished" if self.is_finished() else "stopped"
        code = 4 if self.saver.unsaved else 0
        setup.finish(self, state, code)
        return code

    # ---- small parts, and the end

    def say(self, text: str) -> None:
        """One line to the console and to train.log, from rank 0."""
        self.report.say(text)

    def write_status(self, state: str, code: int = 0, reason: str = "", anyone=False) -> None:
        """status.json, by rank 0 or (`anyone`) by the one rank that knows."""
        self.report.status(state, self.step, code, reason, anyone)

    def evaluate(self) -> bool:
        """Loss over the fixed validation set, on all ranks. Returns whether it is a new best."""
        return evaluate_run(self)

    def save(self, wait: bool = True, prune: bool = True) -> bool:
        """Write step_N, on all ranks; see Saver.save."""
        self.finish_pending_step()  # or its tokens would not be counted in what is saved
        self.saver.finish()  # one at a time
        if self.progress.best_val_loss is None:
            self.progress.best_step = self.step  # nothing to compare by: the last is the best
        state = self.state.document() if self.main else None
        tensors, iteration = self.tensors(), self.orchestrator.iteration
        return self.saver.save(self.step, tensors, state, iteration, wait, prune)

    def set_micro_batch(self, size: int) -> None:
        """Rows of a micro-batch from the next step on; accumulation follows, the step stays."""
        self.run = with_micro_batch(self.run, size, self.parallel.rows()[1])
        self.loader.start(self.cursor, *self.parallel.rows(), size, self.run.accumulation)

    def scheduled_lr(self, step: int | None = None) -> float:
        """The learning rate of a step, by default of this one, before the orchestrator's factor."""
        return lr_at(self.cfg, self.run, self.step if step is None else step)

    def close(self) -> None:
        """Threads, writers and the process group, in this order."""
        if self.model is not None:
            self.loader.close()  # its thread reads ahead
            if self.loader.sums:
                self.loader.sums.end()
        self.report.close()
        self.parallel.close()  # waits for all ranks
        self.owner.release()  # from here on another run may have out_dir


# ---------------------------------------------------------------- main


def main(argv: list[str], parallel=Parallel, layout_of=None, make=Trainer, read=read_config) -> int:
    """Train as the command line says; returns the exit code.

    layout_of(cfg, world) -> plan.Layout: refuses keys that cannot lay the model on so many ranks,
    and `parallel` takes what it returns; None: every rank holds a replica. read: see read_config.
    """
    if {"-h", "--help"} & set(argv):
        print(fitted(help_text()))
        return 0
    check_launch()  # torchrun, srun, mpirun, or none of them
    found = read(argv)
    cfg, written, notes, flags = found
    if flags.get("print_config"):
        if environment("RANK", 0) == 0:
            print(printed(cfg, layout_of is not None, notes), end="")
        return 0
    status = owner.hopeless(cfg.out_dir)  # --max-restarts and requeue restart on any failure
    if status:
        return owner.not_restarted(status)
    # sizes, memory and time of any cluster, on this machine, without training
    if flags.get("dry_run"):
        from tools.simulate import dry_run  # upward, and only a dry run calls it

        return dry_run(cfg, written, notes, flags | {"fine_tunes": make.fine_tunes}, layout_of)
    try:
        check_tasks()
        world = environment("WORLD_SIZE", 1)
        layout = plan.Layout(world)
        if layout_of:
            layout = layout_of(cfg, world)
            parallel = functools.partial(parallel, layout=layout)
        check_states(cfg, layout)  # before data are prepared
        trainer = make(found, parallel)  # all that may refuse this start
    except UserError as error:
        owner.refused(error)
        raise
    # a scheduler that restarts whatever has ended must not train on
    if trainer.is_finished():
        return setup.nothing_left(trainer)
    try:
        return trainer.fit()
    except Exception as error:
        # status.json says what a restart has to know; the user sees a code and a remedy where there
        # is one, and the whole traceback where the fault is ours
        failure.raise_explained(trainer, error)


if __name__ == "__main__":
    command(main, lasting=True)
