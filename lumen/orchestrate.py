"""The orchestrator: looks at every step, acts on failures, leaves a healthy run untouched to the bit, writes down why.

Snapshots first, then `Orchestrator`, which train.py calls at three places of its loop: act() at the top of a turn,
guard() before the optimizer's step, observe() when a step's numbers have arrived; then `ByHand`, the methods by which
people drive a run. A *turn* is one pass through the loop and never comes back; a *step* does, after a rollback.

Every rank sees the same reduced numbers and so decides the same; only what one rank alone can know (files, commands,
the other ranks' clocks) travels, and only on turns where something is to be done.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import statistics
import time
from collections import deque
from pathlib import Path

import torch

from lumen import checkpoint
from lumen import machine as machines
from lumen.control import METHODS, RESEED, ROUTER_KNOBS, WRONG, compiled_graphs
from lumen.detectors import Divergence, NormLimit, StepNumbers, above_chance
from lumen.errors import UserError
from lumen.launch import environment
from lumen.resolve import with_length

SAFE = 40  # healthy steps until a snapshot counts as certified: twice what the slowest alarm on a real spike took


# ---------------------------------------------------------------- snapshots


class Snapshots:
    """Copies of all tensors of a run in the host's memory: one candidate and the two newest certified ones.

    Each rank copies the regions that it holds. Memory is kept and used again; on CUDA the copies are queued on the
    step's own stream, so they see the weights between two steps and the host does not wait.
    """

    def __init__(self, trainer, allowed: bool):
        self.trainer, self.allowed, self.free = trainer, allowed, []
        self.certified, self.candidate, self.pinned = [], None, {}

    def regions(self) -> dict[str, torch.Tensor]:
        """Every local region of every tensor, and the loss scale."""
        t = self.trainer
        out = {
            f"{n}@{at}": local
            for n, x in t.tensors().items()
            for at, _, local, _ in t.parallel.local_shards(n, x)
        }
        return out | (t.loss_scale.tensors() if t.loss_scale else {})

    def size(self) -> int:
        """Bytes of a copy in the host's memory. Pinned, for CUDA, torch rounds each block up to a power of two."""
        sizes = [(x.numel() * x.element_size(), x.is_cuda) for x in self.regions().values()]
        return sum(1 << (n - 1).bit_length() if pinned and n else n for n, pinned in sizes)

    def copy(self, note: dict) -> dict:
        mine = self.regions()
        if self.free:
            data = self.free.pop()
        else:
            data = {
                k: torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                for k, x in mine.items()
            }
        for name, x in mine.items():
            data[name].copy_(x, non_blocking=True)
        return note | {"data": data}

    def take(self, note: dict, certified: bool = False) -> None:
        """`note`: the numbers that belong to the copy (step, turn, tokens ...)."""
        if self.candidate:
            self.free.append(self.candidate.pop("data"))
        self.candidate = self.copy(note)
        if certified:
            self.certify()

    def certify(self) -> None:
        if len(self.certified) == 2:
            self.free.append(self.certified.pop(0).pop("data"))
        self.certified.append(self.candidate)
        self.candidate = None

    def discard(self, since: int) -> None:
        """Those taken at turn `since` or later are not to be trusted."""
        if self.candidate:
            self.free.append(self.candidate.pop("data"))
            self.candidate = None
        for bad in [s for s in self.certified if s["turn"] >= since]:
            self.free.append(bad.pop("data"))
            self.certified.remove(bad)

    def restore(self, snapshot: dict) -> None:
        """Copy it back, in place: pointers of the optimizer and of compiled graphs stay valid."""
        with torch.no_grad():
            for name, x in self.regions().items():
                x.copy_(snapshot["data"][name], non_blocking=True)


# ---------------------------------------------------------------- orchestrator


def read_decisions(path: str) -> list[dict]:
    """The rows of a decisions.jsonl to be repeated, outcomes left out. E310 where that is something else."""
    try:
        rows = [
            json.loads(line)
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        rows = [r for r in rows if r.get("kind") != "outcome"]
        wrong = [
            r
            for r in rows
            if not {"run", "id", "turn", "cursor", "action"} <= set(r) and r.get("kind") != "start"
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError("E310", f"orchestrator.replay: {path}: {error}") from error
    if wrong or not rows:
        raise UserError("E310", f"orchestrator.replay: {path} holds no decisions of a run")
    return rows


class Orchestrator:
    """Guards every step, follows the loss, rolls back, takes commands; see README "The orchestrator".

    Levels: 0 a note; 1 a step is dropped; 2 back to the newest certified snapshot from before the onset, past the data
    since; 3 an older one and a lower rate for a while; 4 stop with a diagnosis (E301).
    """

    LIMIT = (
        50  # bad steps in a row before the run counts as diverged, where nothing may be rolled back
    )
    IN_A_ROW, OFTEN, AMONG = (
        3,
        5,
        200,
    )  # not finite so many times in a row, or in so many turns: level 2
    STREAK = 3  # explosions dropped in a row; what explodes more often is for the other detector to judge
    WAIT, PATIENCE = (
        20,
        3,
    )  # turns in which a spike may heal by itself, and how often they are granted anew
    SKIPS = (20, 1000)  # explosions dropped in so many turns: more is no accident
    AGAIN, BUDGET, MOST = (
        1000,
        (3, 10_000),
        10,
    )  # turns within which an alarm escalates; rollbacks in turns; in all
    COOL = 200  # turns after a rollback in which only what is observed, not what is inferred, brings another
    CUT, CUT_TURNS = 0.7, 500  # level 3: the learning rate times this, back to 1 along a cosine
    SAVED = "dropped in_a_row rollbacks last_source cut due next_id read_to failures warned letting together gaps"
    SAVED = f"{SAVED} alarm advised reason regain".split()
    OUTCOME = 100  # turns after which a rollback is judged
    LEARNED = 32  # steps after the warm-up within which a run must have become better than guessing

    def __init__(self, trainer, replay: list[dict] | None = None):
        """`replay`: the rows of the file to repeat, see read_decisions."""
        self.trainer, self.cfg = trainer, trainer.cfg.orchestrator
        t, self.mode = trainer, trainer.cfg.orchestrator.mode
        self.turn, self.norms, self.course = 0, NormLimit(), Divergence()
        self.streak = torch.zeros((), dtype=torch.int32, device=t.parallel.device)
        self.halted = torch.zeros((), dtype=torch.bool, device=t.parallel.device)
        self.dropped, self.in_a_row, self.reason, self.bad_turns = (
            0,
            0,
            "",
            deque(maxlen=self.OFTEN),
        )
        self.alarm, self.todo, self.warned = None, [], -self.AGAIN
        self.rollbacks, self.last_source, self.cut = (
            [],
            None,
            None,
        )  # turns; where to; (turn, factor)
        self.went_back, self.skipped = (
            0,
            deque(maxlen=self.SKIPS[0] + 1),
        )  # the last turn that did; turns dropped
        self.regain, self.recent = (
            None,
            deque(maxlen=8),
        )  # what the loss must be again after a rollback; the last ones
        self.knobs, self.due, self.next_id = {}, [], 1
        self.read_to = self.taken = self.sized = (
            0  # of control.jsonl: carried out, read, size when read
        )
        self.unbalanced, self.failures, self.letting = {}, {}, False
        self.at, self.together, self.gaps, self.advised = t.cursor, 0, 0, []
        self.seconds, self.health, self.causes = 0.0, None, []  # health: nobody has looked yet
        self.checked, self.slow, self.paces = (
            None,
            0,
            [],
        )  # counters at the last check; steps/s at the first ones
        words = [t.cfg.seed, t.model_written, t.fingerprints, t.run.rows_per_step]
        words += [
            getattr(t.cfg, k)
            for k in ("learning_rate", "lr_schedule", "optimizer", "grad_clip", "z_loss")
        ]
        self.run = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]
        self.commands = t.out / "control.jsonl"
        self.snapshots = Snapshots(t, False)
        self.script = self.read_script(replay) if self.mode == "replay" else {}

    @property
    def acting(self) -> bool:
        return self.mode == "act"

    @property
    def watching(self) -> bool:
        return self.mode in ("act", "shadow")

    @property
    def clean(self) -> bool:
        """Whether what is saved now may be trusted."""
        return self.alarm is None and self.in_a_row == 0 and not self.course.suspicious

    # ---- the three places in the loop

    def act(self) -> bool:
        """At the top of a turn: what was decided, commands, a snapshot. Returns whether the run went back."""
        began, t = time.perf_counter(), self.trainer
        self.turn += 1
        if any(self.at < start <= t.cursor for start, _ in t.run.segments[1:]) and self.watching:
            self.course.forget()  # another mixture of data begins: the loss may be another
        self.at = t.cursor
        todo, self.todo = self.todo, []
        for do in todo:
            do()
        for row in self.script.get(t.cursor, ()):
            self.repeat(row)
        rolled = self.went_back == self.turn
        if self.watching or self.mode == "replay":
            self.keep_snapshot(
                first=self.turn == 1 or t.step == t.started_at and not self.snapshots.certified
            )
        self.seconds += time.perf_counter() - began
        return rolled

    def guard(
        self, ce: torch.Tensor, norm: torch.Tensor, lost: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(drop this step?, did its gradient explode?), 0-d bools on the device, without waiting for it.

        ce: the summed loss; norm: of the true gradient; lost: ranks that have no gradient to give (data, memory).
        """
        began = time.perf_counter()
        bad = ~(torch.isfinite(ce) & torch.isfinite(norm)) | (lost > 0) | self.halted
        self.halted = self.halted | (
            lost > 0
        )  # on CUDA the host learns of it a turn late: that turn is void too
        exploded = torch.zeros_like(bad)
        if self.mode == "replay":
            for row in (
                row for row in self.at_cursor() if row["action"] == "drop"
            ):  # what broke then may not now
                bad = torch.ones_like(bad)
                exploded = bad if row["trigger"] == "explosion" else exploded
        elif self.watching and (limit := self.norms.limit(self.turn)) is not None:
            exploded = ~bad & (norm.log() > limit)
            drop = exploded & (self.streak < self.STREAK)
            self.streak = torch.where(exploded, self.streak + 1, torch.zeros_like(self.streak))
            if self.acting:
                bad = bad | drop
        self.seconds += time.perf_counter() - began
        return bad, exploded

    def observe(self, seen: StepNumbers) -> None:
        """The plain numbers of a finished turn. UserError E301, E302 when the run cannot be saved."""
        began, turn = time.perf_counter(), seen.iteration
        self.dropped += seen.bad
        finite = math.isfinite(seen.loss) and math.isfinite(seen.grad_norm)
        if seen.desynced:
            self.out_of_step(seen)
        elif seen.step % self.cfg.check_interval == 0:
            self.together = turn
        if not finite:
            self.not_finite(seen)
        else:
            self.in_a_row = 0
            if seen.exploded and self.watching:
                self.explosion(seen)
            elif not seen.exploded:
                self.letting = False
            if self.watching and not seen.bad:
                self.norms.add(turn, seen.grad_norm)
                self.follow(seen)
        if not seen.bad:
            self.mature(turn)
        if (
            self.watching
            and seen.experts is not None
            and (seen.step + 1) % self.cfg.check_interval == 0
        ):
            self.check_experts(seen)
        if self.watching and (seen.step + 1) % self.cfg.check_interval == 0:
            self.examine(seen)
        self.settle(turn)
        self.seconds += time.perf_counter() - began

    # ---- what goes wrong

    def out_of_step(self, seen: StepNumbers) -> None:
        """The ranks hold different weights (a flipped bit, a faulty part): back to the last check that they passed."""
        t = self.trainer
        sums = t.parallel.gather(int(t.parallel.checksum(t.model)))
        odd = [rank for rank, x in enumerate(sums) if sums.count(x) < (len(sums) + 1) // 2]
        who = (
            f"rank {', '.join(map(str, odd))} differs from most" if odd else "there is no majority"
        )
        said = f"the ranks' weights differ at step {seen.step} ({who}): a memory or transfer error of that machine"
        self.todo.append(lambda: self.recover("desync", self.together + 1, 1.0, "observed", said))

    def shorten(self, advice: str) -> None:
        """What forecast.justified_stop advises, done where enable_early_stopping allows it."""
        t = self.trainer
        kind = advice.partition(":")[0]
        if kind in self.advised or not self.watching:
            return
        self.advised.append(kind)

        def do():
            if kind == "stop":
                t.stopped_early = True
                return {}
            steps = max(
                t.step + 1, round(t.step / (1 - t.cfg.decay_frac))
            )  # of which the decay is that share
            before = t.run.max_steps
            t.run = with_length(t.cfg, t.run, min(steps, before))
            return {"args": {"max_steps": t.run.max_steps}, "before": {"max_steps": before}}

        blocked = None if t.cfg.enable_early_stopping else "enable_early_stopping: false"
        self.todo.append(
            lambda: self.decide("length", kind, advice, 2, do=do, basis="rule", blocked=blocked)
        )

    def evaluated(self, row: dict) -> None:
        """What an evaluation shows that training does not."""
        gap = row.get("mod_gap") or 0.0
        self.gaps = self.gaps + 1 if gap > 0.02 else 0
        if self.gaps == 2 and self.watching:
            said = f"text is made by a rule that costs {gap:.3f} nats against the rule of training (agreement "
            said += f"{100 * row['mod_agreement']:.1f} %): anneal more slowly (mod_anneal_steps), or raise mod_capacity"
            self.decide("mod_gap", "advise", said, 0, stat={"gap": gap}, basis="rule")
        if self.watching and self.note_guessing():
            self.health, self.causes = "critical", [self.worse_than_guessing()[0]]

    def worse_than_guessing(self) -> tuple[str, str] | None:
        """(what, advice) where the loss, or that of the last evaluation, is above what guessing costs. Until
        the warm-up is over only one that has risen counts: fresh weights begin a little above, and those of
        wide models more than a little."""
        t, n = self.trainer, self.trainer.cfg.model.vocab_size
        losses, first = {} if t.val_loss is None else {"val_loss": t.val_loss}, math.log(n) + 3
        if (
            len(self.recent) == 8 and self.turn - self.went_back > 8
        ):  # all made by the weights of now
            losses = {"the loss": statistics.median(self.recent)} | losses
            first = next(
                iter(self.course.first), first
            )  # of weights that no step had touched, or of new data
        for name, loss in losses.items():
            risen = not loss <= 1.1 * first
            if not above_chance(loss, n) or not (risen or t.step >= t.run.peak_step + self.LEARNED):
                continue
            chance = f"guessing costs ln(vocab_size) = {math.log(n):.2f}"
            said = f"worse than guessing: {name} is {loss:.2f}, {chance}"
            if name == "val_loss" and "the loss" in losses:
                return (
                    said,
                    "training alone is well: fewer epochs, or more data of validation's kind",
                )
            if risen:
                return said, "lower learning_rate, or lengthen warmup_steps"
            return said, "nothing was learned: try another learning_rate, and look at the data"
        return None

    def note_guessing(self) -> bool:
        """A line of decisions.jsonl where that begins. It is a note: by itself it stops no run, for what can
        be undone is the other detectors' to see."""
        worse = None if self.alarm or self.in_a_row else self.worse_than_guessing()
        if worse is None:
            return False
        if "guessing" not in self.advised:
            self.advised.append("guessing")
            self.decide("chance", "warn", "; ".join(worse), 0, basis="rule")
        return True

    def not_finite(self, seen: StepNumbers) -> None:
        t, turn = self.trainer, seen.iteration
        self.in_a_row += 1
        scaling = (
            t.loss_scale is not None and seen.loss_finite
        )  # fp16: an overflow while the loss scale finds its place
        if self.in_a_row == 1 and not scaling:
            found = [f for f in t.parallel.gather(t.diagnose(seen.cursor)) if f]
            found.sort(key=lambda f: f.startswith("not repeated"))  # another rank may have seen it
            self.reason = found[0] if found else "transient: finite when repeated"
        elif scaling:
            self.reason = "fp16 overflow, the loss scale halves"
        stat = {"loss": seen.loss, "grad_norm": seen.grad_norm, "in_a_row": self.in_a_row}
        said = f"loss or gradient not finite; {self.reason}"
        self.decide("nonfinite", "drop", said, 1, seen, stat=stat, always=True)
        if not scaling and self.watching:
            self.bad_turns.append(turn)
            often = len(self.bad_turns) == self.OFTEN and turn - self.bad_turns[0] < self.AMONG
            if self.in_a_row % self.IN_A_ROW == 0 or often:
                n, onset = self.in_a_row, self.bad_turns[0] if often else turn - self.in_a_row + 1
                said = (
                    f"{n} steps in a row not finite"
                    if not often
                    else f"{self.OFTEN} in {self.AMONG} not finite"
                )
                self.bad_turns.clear()
                self.todo.append(
                    lambda: self.recover(
                        "nonfinite", onset, 1.0, "observed", f"{said}; {self.reason}"
                    )
                )
                if self.acting and self.cfg.enable_emergency_recovery:
                    self.in_a_row = 0
                    return
        if self.in_a_row >= self.LIMIT:
            text = f"{self.in_a_row} steps in a row had no finite gradient, up to step {seen.step}; {self.reason}"
            raise UserError("E302" if scaling else "E301", text)

    def explosion(self, seen: StepNumbers) -> None:
        limit, norm = self.norms.limit(seen.iteration), seen.grad_norm
        stat = {"grad_norm": norm, "limit": math.exp(limit)}
        said = f"gradient norm {norm:.3g}, at most {math.exp(limit):.3g} was to be expected"
        confidence = self.norms.confidence(seen.iteration, norm)
        if seen.bad or not self.acting:
            self.decide(
                "explosion", "drop", said, 1, seen, stat=stat, confidence=confidence, basis="pvalue"
            )
            self.skipped.append(seen.iteration)
            often = (
                len(self.skipped) > self.SKIPS[0]
                and seen.iteration - self.skipped[0] < self.SKIPS[1]
            )
            if often and seen.iteration >= self.cool():
                onset, said = (
                    self.skipped[0],
                    f"more than {self.SKIPS[0]} of {self.SKIPS[1]} steps exploded",
                )
                self.skipped.clear()
                self.todo.append(lambda: self.recover("explosion", onset, 1.0, "rule", said))
        elif not self.letting:
            self.letting = True  # said once
            said += (
                f"; {self.STREAK} were dropped in a row, so it is let through, and so are the next"
            )
            self.decide(
                "explosion",
                "accept",
                said,
                0,
                seen,
                stat=stat,
                confidence=confidence,
                basis="pvalue",
            )

    def cool(self) -> int:
        """The turn from which on a loss may bring a rollback: what was gone back to gets the time to settle."""
        return self.rollbacks[-1] + self.COOL if self.rollbacks else 0

    def regain_by(self, half: float, recover) -> None:
        """Go back next turn; by the end of the cool-down half of what had been learned must be there again."""

        def do():
            recover()
            self.regain = half if self.went_back == self.turn else None

        self.todo.append(do)

    def follow(self, seen: StepNumbers) -> None:
        """The divergence detector, and the patience that most spikes deserve."""
        c, turn, a = self.course, seen.iteration, self.alarm
        until = max(turn + self.WAIT, self.cool())
        self.recent.append(seen.loss)
        if a is None and self.regain is not None and turn >= self.cool():
            half, level, self.regain = self.regain, statistics.median(self.recent), None
            if level > half:
                onset = self.rollbacks[-1]
                said = f"what was lost is not back: the loss is {level:.3f}, {half:.3f}"
                self.alarm = {
                    "turn": turn,
                    "onset": onset,
                    "until": turn,
                    "half": half,
                    "acting": True,
                }
                said += f" would be half of it, {turn - onset} steps after a rollback"
                self.regain_by(half, lambda: self.recover("divergence", onset, 0.91, "rule", said))
                return
        c.add(turn, seen.loss)
        if a is None:
            if c.frozen > c.PATIENCE and not c.alarm(self.cfg.intervention_threshold):
                c.forget()
            if (lost := c.lost()) is not None:
                since, half = lost
                said = f"the loss is {c.above_start():.3f} nats above where it began, {since} steps ago it was below"
                self.alarm = {"turn": turn, "onset": turn - since, "until": until, "half": half}
                more = {"stat": {"above": c.above_start()}, "confidence": 0.91, "basis": "rule"}
                self.alarm["id"] = self.decide("divergence", "wait", said, 0, seen, **more)["id"]
                return
            if c.too_low() and turn - self.warned >= 100:
                self.warned = turn
                said = f"the loss fell by {-c.residual:.3f} nats at once: look at the data around row {seen.cursor}"
                self.decide(
                    "low_loss", "warn", said, 0, seen, stat={"residual": c.residual}, basis="rule"
                )
            if c.alarm(self.cfg.intervention_threshold):
                floor, onset = c.floor(), c.onset()
                stat = {
                    "E": c.E,
                    "onset": onset,
                    "excess": c.excess(7),
                    "floor": floor,
                    "rho1": c.correlation(onset),
                }
                self.alarm = {
                    "turn": turn,
                    "onset": onset,
                    "until": until,
                    "peak": c.excess(7),
                    "waits": 0,
                }
                said = f"the loss is {c.excess(7):.3f} nats above its course, floor {floor:.3f}; most spikes heal"
                said += (
                    f", and the last rollback gets {self.COOL} turns"
                    if until > turn + self.WAIT
                    else ""
                )
                more = {"stat": stat, "confidence": c.confidence, "basis": "evalue"}
                self.alarm["id"] = self.decide("divergence", "wait", said, 0, seen, **more)["id"]
            return
        if a.get("acting"):
            return
        if "half" in a:
            if c.level() <= a["half"]:
                self.outcome(a["id"], "healed", seen, turns=turn - a["turn"])
                self.alarm = None
            elif turn >= a["until"]:
                a["acting"] = True
                said = f"what was learned is lost: the loss is {c.level():.3f}, half of it would be {a['half']:.3f}"
                self.regain_by(
                    a["half"], lambda: self.recover("divergence", a["onset"], 0.91, "rule", said)
                )
            return
        now, floor = c.excess(5), c.floor()
        a["peak"] = max(a["peak"], now)
        if now <= floor:
            self.outcome(a["id"], "healed", seen, excess=now, turns=turn - a["turn"])
            self.alarm = None
            c.restart()
        elif turn >= a["until"]:
            if now < a["peak"] / 2 and a["waits"] < self.PATIENCE:
                a |= {"until": turn + self.WAIT, "waits": a["waits"] + 1}
                return
            a["acting"] = True
            said = f"{now:.3f} nats above its course {turn - a['turn']} steps after the alarm (floor {floor:.3f})"
            stat = {
                "E": c.E,
                "onset": a["onset"],
                "excess": now,
                "floor": floor,
                "rho1": c.correlation(a["onset"]),
            }
            self.todo.append(
                lambda: self.recover("divergence", a["onset"], c.confidence, "evalue", said, stat)
            )

    def recover(
        self, trigger: str, onset: int, confidence: float, basis: str, reason: str, stat=None
    ) -> None:
        """Levels 2 to 4. `onset`: the turn from which on the run is not to be trusted."""
        t, more = self.trainer, {"stat": stat, "confidence": confidence, "basis": basis}
        if self.went_back == self.turn:  # two alarms of one turn: the first has been answered
            return
        level = 2 + sum(self.turn - r < self.AGAIN for r in self.rollbacks)
        spent = sum(self.turn - r < self.BUDGET[1] for r in self.rollbacks) >= self.BUDGET[0]
        spent = spent or len(self.rollbacks) >= self.MOST
        blocked = None if self.cfg.enable_emergency_recovery else "enable_emergency_recovery: false"
        if stat and abs(stat["rho1"]) > 0.5:
            blocked = f"losses are correlated ({stat['rho1']:.2f}): shuffle the data"
        source = None if level > 3 or spent else self.source(onset, older=level == 3)
        if source is None:
            why = (
                "rolling back did not help" if self.rollbacks else "there is nothing to go back to"
            )
            why = f"{why}; {self.worst()}"
            text = f"{reason}; {why}; step {t.step}"
            row = self.decide(trigger, "stop", f"{reason}; {why}", 4, blocked=blocked, **more)
            if row["executed"]:
                raise UserError(
                    "E301", f"{text}; the newest clean checkpoint in {t.out} is not touched"
                )
        else:
            lr = self.CUT if level == 3 else 1.0
            reason += f"; {self.worst()}"
            more |= {"do": lambda: self.go_back(source, onset, lr), "blocked": blocked}
            row = self.decide(trigger, "rollback", reason, level, **more)
            if row["executed"]:
                self.rollbacks.append(self.turn)  # by hand they are no failed attempts
                self.due.append(
                    {"id": row["id"], "turn": self.turn + self.OUTCOME, "kind": "rollback"}
                )
        if not row["executed"]:  # shadow: say it once, then follow the new course
            self.course.forget()
        self.alarm = None

    def source(self, before: int | None = None, step: int | None = None, older: bool = False):
        """The newest certified snapshot from before turn `before` (or of at most `step`), else a clean checkpoint's
        path; `older`: older than what the last rollback took, if there is such a one."""
        snaps = (
            self.snapshots.certified
            if step is None
            else [*self.snapshots.certified, self.snapshots.candidate]
        )
        snaps = [
            s
            for s in snaps
            if s and (before is None or s["turn"] < before) and (step is None or s["step"] <= step)
        ]
        last = self.last_source if older else None
        fresh = [s for s in snaps if last is None or s["step"] < last]
        if fresh and step is None:
            return fresh[-1]
        t = self.trainer
        most = min(t.step if step is None else step, math.inf if last is None else last - 1)
        good = []
        for s in [s for s in checkpoint.list_steps(t.out) if s <= most] if t.main else ():
            with contextlib.suppress(UserError):
                saved = checkpoint.Checkpoint(checkpoint.step_dir(t.out, s))
                turn = saved.state.get("orchestrator", {}).get("turn", 0)
                if saved.state.get("clean", True) and (before is None or turn < before):
                    good.append(s)
        found = t.newest_whole(
            [checkpoint.step_dir(t.out, s) for s in reversed(t.parallel.broadcast(good))]
        )
        if fresh and (
            found is None or fresh[-1]["step"] >= checkpoint.step_of(found)
        ):  # by hand: the newer of the two
            return fresh[-1]
        return found or (snaps[-1] if snaps else None)

    def worst(self) -> str:
        """The parameter that has moved furthest since the last certified snapshot: where to look."""
        if not self.snapshots.certified:
            return "no snapshot to compare with"
        most, name = -1.0, ""
        with contextlib.suppress(
            torch.OutOfMemoryError
        ):  # this is no more than a hint, and what follows goes without
            most, name = self.furthest()
        most, name = max(
            self.trainer.parallel.gather((most, name)),
            key=lambda x: math.inf if math.isnan(x[0]) else x[0],
        )
        if not name:
            return "no memory to see which parameter moved most"
        name = name.removeprefix("model.").partition("@")[0]
        return f"{name} moved most, by {100 * most:.3g} % since the last certified snapshot"

    def furthest(self) -> tuple[float, str]:
        """Of this rank's parameters: (by how much of its norm, which)."""
        t, data, most, name = self.trainer, self.snapshots.certified[-1]["data"], -1.0, ""
        for key, x in self.snapshots.regions().items():
            if key.removeprefix("model.").partition("@")[0] in t.weights:
                was = data[key].to(x.device)
                least = t.cfg.model.init_std * math.sqrt(
                    x.numel()
                )  # what was zero at first may move
                moved = ((x - was).norm() / was.norm().clamp(min=least)).item()
                if not moved <= most:
                    most, name = moved, key
                if math.isnan(moved):  # furthest of all
                    break
        return most, name

    def go_back(self, source, onset: int | None, lr: float = 1.0) -> dict:
        """Weights, moments and the step return to `source`, a snapshot or a checkpoint's path; the cursor does not."""
        t, before = self.trainer, {"step": self.trainer.step, "tokens": self.trainer.tokens}
        if isinstance(source, dict):
            self.snapshots.restore(source)
            t.rewind(source)
            turn = source["turn"]
        else:
            saved = t.parallel.run_or_raise_on_all(checkpoint.Checkpoint, source)
            t.parallel.run_or_raise_on_all(t.restore, saved)
            t.rewind(saved.state)
            turn = saved.state.get("orchestrator", {}).get("turn", 0)
        self.snapshots.discard(turn + 1)
        self.course.restart(before=turn + 1 if onset is None else onset)
        self.norms.seen = deque(
            ((at, x) for at, x in self.norms.seen if onset is None or at < onset),
            self.norms.seen.maxlen,
        )
        self.went_back = self.turn
        self.last_source, self.alarm, self.in_a_row = t.step, None, 0
        if lr != 1.0:
            self.cut = [self.turn, lr]
        args = {"to_step": t.step, "next_row": t.cursor, "lr_mult": lr, "onset": onset}
        memory = isinstance(source, dict)
        args |= {
            "from": "memory" if memory else str(source),
            "to_cursor": source["cursor"] if memory else None,
        }
        after = {"step": t.step, "tokens": t.tokens}
        return {
            "args": args,
            "before": before,
            "after": after,
            "cost": {"steps": before["step"] - t.step},
        }

    def lr_factor(self) -> float:
        """What the schedule is multiplied by: exactly 1.0 in a run nobody touched."""
        factor = self.knobs.get("lr_scale", 1.0)
        if self.cut and self.turn - self.cut[0] < self.CUT_TURNS:
            done = (self.turn - self.cut[0]) / self.CUT_TURNS
            factor *= 1 - (1 - self.cut[1]) * (1 + math.cos(math.pi * done)) / 2
        return factor

    # ---- snapshots

    def keep_snapshot(self, first: bool) -> None:
        t, every = self.trainer, self.cfg.snapshot_interval
        note = {
            "step": t.step,
            "cursor": t.cursor,
            "turn": self.turn,
            "healthy": 0,
            "late": t.pending is not None,
        }
        if self.mode == "replay":
            if t.cursor in self.targets:
                self.snapshots.candidate = None
                self.targets[t.cursor] = self.snapshots.copy(note | t.numbers())
            return
        if first:
            size = 3 * self.snapshots.size() * environment("LOCAL_WORLD_SIZE", 1)
            room = every > 0 and size < machines.available_memory() / 4
            self.snapshots.allowed = not t.parallel.all_reduce_max([not room])[0]
            if every and not self.snapshots.allowed:
                t.say(
                    "note       no room for snapshots in memory: a rollback takes the newest clean checkpoint"
                )
        if not self.snapshots.allowed or not self.clean:
            return
        if first or (self.snapshots.candidate is None and t.step % every == 0):
            self.snapshots.take(note | t.numbers(), certified=first)

    def mature(self, turn: int) -> None:
        """A healthy step more for the candidate."""
        s = self.snapshots.candidate
        for c in (s, *self.snapshots.certified):
            if c and c["late"] and turn == c["turn"] - 1:  # its tokens were still on their way
                c.update(tokens=self.trainer.tokens, late=False)
        if s and turn >= s["turn"] and self.clean:
            s["healthy"] += 1
            if s["healthy"] >= SAFE:
                self.snapshots.certify()

    # ---- health

    def examine(self, seen: StepNumbers) -> None:
        """Every check_interval steps: healthy | warning | critical, the causes, and advice on the first of them."""
        t, now, found = self.trainer, self.counters(), []
        before, self.checked = self.checked or now, now
        mine = {k: v - before[k] for k, v in now.items()}
        rows = t.parallel.gather(mine)  # over gloo, once in check_interval steps: waits for no GPU
        steps, work = mine["turns"], max(1e-9, mine["seconds"] - mine["checkpoint"])
        if self.alarm or self.in_a_row or self.course.suspicious:
            found.append((2, "the loss or gradients have left their course", "see decisions.jsonl"))
        if self.note_guessing():
            found.append((2, *self.worse_than_guessing()))
        elif not self.alarm and "guessing" in self.advised:
            self.advised.remove("guessing")
        if (above := self.course.above_start()) > 0.1:
            said = f"the loss is {above:.2f} nats above where this run began"
            found.append(
                (2, said, "lower learning_rate, lengthen warmup_steps, or look at the data")
            )
        if t.saver.unsaved:
            found.append((2, "the last checkpoint could not be written", "free disk space"))
        if steps:
            if (wait := max(r["data"] for r in rows) / work) > 0.2:
                found.append(
                    (
                        1,
                        f"{100 * wait:.0f} % of the time is waiting for data",
                        "use a faster disk, or copy the data",
                    )
                )
            for rank, r in enumerate(rows):
                others = [o["compute"] for i, o in enumerate(rows) if i != rank]
                if (
                    others
                    and r["compute"] > 1.2 * statistics.median(others)
                    and r["compute"] > 0.02 * work
                ):
                    ratio = r["compute"] / max(1e-9, statistics.median(others))
                    found.append(
                        (
                            1,
                            f"rank {rank} computes {ratio:.1f} times as long as the others",
                            "look at its machine",
                        )
                    )
            if any(r["retries"] for r in rows):
                found.append(
                    (
                        1,
                        "the allocator ran out of memory and tried again",
                        "lower batch_size (adjust_batch_size)",
                    )
                )
            looked = (
                t.evaluated_at is not None and t.evaluated_at > seen.step - self.cfg.check_interval
            )
            if (
                any(r["graphs"] for r in rows) and self.paces and not looked
            ):  # evaluation has a graph of its own
                found.append(
                    (
                        1,
                        f"{mine['graphs']} graphs were compiled anew",
                        "keep shapes and capacities constant",
                    )
                )
            pace = steps / work
            self.paces = [*self.paces, pace] if len(self.paces) < 5 else self.paces
            usual = statistics.median(self.paces)
            self.slow = self.slow + 1 if pace < usual / 1.25 else 0
            if self.slow >= 3:
                found.append(
                    (
                        1,
                        f"{pace:.3g} steps/s, at first it was {usual:.3g}",
                        "is something else on this machine?",
                    )
                )
        if self.unbalanced and max(self.unbalanced.values()) >= 5:
            layers = [i for i, n in self.unbalanced.items() if n >= 5]
            found.append(
                (
                    1,
                    f"experts of layers {layers} stay unbalanced",
                    "raise bias_update_rate or aux_loss_weight",
                )
            )
        found.sort(key=lambda f: -f[0])
        status = ("healthy", "warning", "critical")[found[0][0] if found else 0]
        causes = [text for _, text, _ in found]
        kinds = [text.split(" ")[:3] for text in causes]
        if status != (self.health or "healthy") or kinds != [
            text.split(" ")[:3] for text in self.causes
        ]:
            t.say(
                f"health     {status}"
                + (f": {'; '.join(causes)}; advice: {found[0][2]}" if found else "")
            )
        self.health, self.causes = status, causes

    def counters(self) -> dict:
        """What grows on this rank."""
        t, cuda = self.trainer, self.trainer.parallel.device.type == "cuda"
        out = {"turns": self.turn, "seconds": time.perf_counter(), "graphs": 0} | t.watch.spent
        out |= t.watch.on_device  # launching takes alike on all ranks, whatever their GPUs do
        if t.run.compile_model:
            out["graphs"] = compiled_graphs()
        return out | {
            "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) if cuda else 0
        }

    # ---- experts

    def check_experts(self, seen: StepNumbers) -> None:
        """The selection bias is the standing response; what stays unbalanced for five checks gets more of it."""
        m, e = self.trainer.cfg.model, seen.experts
        most = min(
            4.0, 0.75 * (m.n_experts / m.n_experts_per_token - 1)
        )  # of the largest violation there can be
        for i, x in e["layers"].items():
            wrong = x["dead"] > 0 or x["max_violation"] > most
            self.unbalanced[i] = self.unbalanced.get(i, 0) + 1 if wrong else 0
        if seen.step + 1 < 10 * self.cfg.check_interval or any(
            d["kind"] == "experts" for d in self.due
        ):
            return
        layers = [i for i, n in self.unbalanced.items() if n >= 5]
        if layers:
            dead = {i: e["layers"][i]["dead"] for i in layers}
            worst = max(e["layers"][i]["max_violation"] for i in layers)
            reason = f"layers {layers} unbalanced for 5 checks: {sum(dead.values())} dead experts, "
            stat = {"layers": layers, "dead": dead, "max_violation": worst}
            self.todo.append(lambda: self.rebalance(f"{reason}max violation {worst:.2f}", stat))

    def rebalance(self, reason: str, stat: dict) -> None:
        """Twice the pull for ten checks: of the bias, then of the loss; then, where allowed, dead ones are re-made."""
        for knob in ("bias_update_rate", "aux_loss_weight"):
            if (now := self.get_knob(knob)) and self.failures.get(knob, 0) < 1:
                row = self.change(
                    knob,
                    2 * now,
                    "experts",
                    f"{reason}; twice the pull for 10 checks",
                    2,
                    stat=stat,
                )
                if not row["executed"]:  # mode shadow: said once
                    self.failures[knob] = 1
                else:
                    due = {
                        "kind": "experts",
                        "turn": self.turn + 10 * self.cfg.check_interval,
                        "stat": stat,
                    }
                    self.due.append(due | {"id": row["id"], "knob": knob, "was": now})
                return
        blocked = (
            None
            if self.cfg.enable_architecture_adaptation
            else "enable_architecture_adaptation: false"
        )
        layer = next((i for i, dead in stat["dead"].items() if dead), None)
        if layer is None or self.failures.get("recycle", 0) >= 2:
            return
        for i in stat["layers"]:
            self.unbalanced[i] = 0
        self.failures["recycle"] = self.failures.get("recycle", 0) + 1
        more = {"stat": stat, "blocked": blocked, "do": lambda: self.reseed(layer)}
        row = self.decide("experts", RESEED, reason, 3, args={"layer": layer}, **more)
        if row["executed"]:
            self.due.append(
                {
                    "kind": "reseed",
                    "turn": self.turn + 10 * self.cfg.check_interval,
                    "id": row["id"],
                }
            )
            self.due[-1] |= {"layers": [layer]}

    def reseed(self, layer: int) -> dict:
        self.trainer.save()  # it cannot be undone
        return self.trainer.recycle(layer)

    def change(self, knob: str, value, trigger: str, reason: str, level: int, **more) -> dict:
        """A decision to set a knob."""
        was = self.get_knob(knob)

        def do():
            self.set_knob(knob, value)

        return self.decide(
            trigger, f"set {knob}", reason, level, do=do, value=value, before=was, **more
        )

    def get_knob(self, name: str):
        t = self.trainer
        if name in ROUTER_KNOBS:
            return getattr(next(iter(t.moe.values())).router, ROUTER_KNOBS[name])
        if name == "mod_capacity":
            return next(iter(t.mod.values())).target
        group = t.optimizer.param_groups[0]
        known = {"weight_decay": group["weight_decay"], "eps": group["eps"]}
        known |= dict(zip(("beta1", "beta2"), group["betas"]))
        return known.get(name, self.knobs.get(name, 1.0))  # lr_scale: 1.0 where nobody touched it

    def set_knob(self, name: str, value) -> None:
        """Change a number of the run: it is in checkpoints and comes back on resume."""
        t = self.trainer
        if name in ROUTER_KNOBS:
            for moe in t.moe.values():
                setattr(moe.router, ROUTER_KNOBS[name], value)
                if name == "expert_dropout" and not value:
                    moe.router.dropped_out = None
        elif name == "mod_capacity":
            for mod in t.mod.values():
                mod.target = value
        elif name == "weight_decay":
            for group in t.optimizer.param_groups:
                group["weight_decay"] = value if group["params"][0].dim() >= 2 else 0.0
        elif name in ("beta1", "beta2", "eps"):
            for group in t.optimizer.param_groups:
                b1, b2 = group["betas"]
                group |= (
                    {"eps": value}
                    if name == "eps"
                    else {"betas": (value, b2) if name == "beta1" else (b1, value)}
                )
        self.knobs[name] = value

    # ---- decisions

    def decide(
        self,
        trigger,
        action,
        reason,
        level,
        seen=None,
        do=None,
        confidence=1.0,
        basis="observed",
        **more,
    ) -> dict:
        """Write a decision down and, unless something stands against it, do it. `always`: not a matter of the mode."""
        t, blocked, always = self.trainer, more.pop("blocked", None), more.pop("always", False)
        if level and not always and trigger != "user":
            if not self.acting:
                blocked = f"mode: {self.mode}"
            elif confidence < self.cfg.intervention_threshold:
                blocked = f"confidence below {self.cfg.intervention_threshold}"
        at = seen or StepNumbers(t.step, t.cursor, self.turn)
        row = {
            "v": 1,
            "id": self.next_id,
            "run": self.run,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        row |= {
            "step": at.step,
            "cursor": at.cursor,
            "turn": at.iteration,
            "tokens": t.tokens,
            "attempt": t.attempt,
        }
        row |= {
            "mode": self.mode,
            "level": level,
            "trigger": trigger,
            "action": action,
            "reason": reason,
        }
        row |= {
            "confidence": round(confidence, 4),
            "basis": basis,
            "threshold": self.cfg.intervention_threshold,
        }
        row |= {
            "executed": blocked is None,
            "blocked_by": blocked,
            "ranks": t.parallel.world,
            **more,
        }
        self.next_id += 1
        if do and blocked is None:
            try:
                row |= do() or {}
            except UserError as error:
                row |= {"executed": False, "refused": error.code, "reason": error.text}
        if "refused" in row:
            row["executed"] = False
        t.append("decisions.jsonl", row)
        kind = "user" if trigger == "user" and level else "drop" if action == "drop" else None
        if kind and row["executed"] and not any(d["kind"] == kind == "drop" for d in self.due):
            due = {
                "id": row["id"],
                "turn": self.turn + self.OUTCOME,
                "kind": kind,
                "loss": self.course.level(),
            }
            self.due.append(due)
        state = (
            f"{row['refused']} refused: "
            if "refused" in row
            else ""
            if row["executed"]
            else "not done: "
        )
        args = row.get("args") or ""
        t.say(
            f"decision   #{row['id']} step {row['step']}, {trigger}: {state}{action} {args}".rstrip()
        )
        t.say(f"reasoning  {row['reason']}" + (f" [{blocked}]" if blocked else ""))
        t.say(f"confidence {confidence:.2f} ({basis}), level {level}")
        return row

    def outcome(self, decision: int, verdict: str, seen: StepNumbers | None = None, **more) -> None:
        step = seen.step if seen else self.trainer.step
        self.trainer.append(
            "decisions.jsonl",
            {
                "id": decision,
                "attempt": self.trainer.attempt,
                "kind": "outcome",
                "step": step,
                "verdict": verdict,
                **more,
            },
        )
        self.trainer.say(f"outcome    of #{decision}: {verdict}")

    def settle(self, turn: int) -> None:
        """Judge what was done a while ago; what did not help and can be undone is undone."""
        for d in [d for d in self.due if turn >= d["turn"]]:
            self.due.remove(d)
            if d["kind"] == "rollback":
                again = any(r > d["turn"] - self.OUTCOME for r in self.rollbacks)
                gone = self.regain is not None and statistics.median(self.recent) > self.regain
                verdict = "did not hold" if again or self.alarm or gone else "helped"
                self.outcome(
                    d["id"], verdict, excess=self.course.excess(7), floor=self.course.floor()
                )
            elif d["kind"] == "drop":
                more = sum(x > d["turn"] - self.OUTCOME for x in self.skipped)
                self.outcome(
                    d["id"], f"{more} more were dropped since" if more else "it stayed the only one"
                )
            elif d["kind"] == "user":
                self.outcome(d["id"], "seen", loss_before=d["loss"], loss_after=self.course.level())
            elif d["kind"] == "reseed":
                left = max(self.unbalanced.get(i, 0) for i in d["layers"])
                self.outcome(d["id"], "did not help" if left else "helped")
            else:
                now = max(self.unbalanced.get(i, 0) for i in d["stat"]["layers"])
                helped = now == 0
                self.failures[d["knob"]] = self.failures.get(d["knob"], 0) + (not helped)
                self.outcome(d["id"], "helped" if helped else "did not help", reverted=True)
                said = f"the time of #{d['id']} is over"
                self.todo.append(
                    lambda d=d, s=said: self.change(d["knob"], d["was"], "experts", s, 2)
                )

    # ---- commands and replay

    def new_commands(self) -> bool:
        """Rank 0: has control.jsonl changed?"""
        try:
            size = os.stat(self.commands).st_size if self.trainer.main else self.sized
        except OSError:
            return False
        return size != self.sized

    def take_commands(self) -> None:
        """Read the new lines of control.jsonl, on rank 0; carry them out on all ranks at the top of the next turn."""
        lines, end, size = [], self.taken, 0
        if self.trainer.main:
            with contextlib.suppress(OSError), open(self.commands, "rb") as f:
                size = f.seek(0, os.SEEK_END)
                end = f.seek(0 if size < end else end)  # it was written anew
                data = f.read()
                whole = data[: data.rfind(b"\n") + 1]  # half a line is still being written
                with contextlib.suppress(ValueError):  # unless it is all of a line but its end
                    whole = data if isinstance(json.loads(data[len(whole) :]), dict) else whole
                end += len(whole)
                lines = [
                    line
                    for line in whole.decode("utf-8-sig", "replace").split("\n")
                    if line.strip(" \r\t\0")
                ]
        lines, self.taken, self.sized = self.trainer.parallel.broadcast((lines, end, size))
        for line in lines:
            self.todo.append(lambda line=line: self.command(line))
        self.todo.append(
            lambda end=end: setattr(self, "read_to", end)
        )  # a process that dies before reads them again

    def command(self, line: str) -> None:
        """One line {"method": NAME, "args": [...] or {...}}; what cannot be is refused (E309), and the run goes on."""
        t, name, args = self.trainer, "?", []
        try:
            try:
                if "\0" in line:  # PowerShell's echo
                    raise UserError(
                        "E309", f"control.jsonl is UTF-16 here; write UTF-8: {line[:200]!r}"
                    )
                row = json.loads(line)
            except ValueError as error:
                raise UserError("E309", f"not valid JSON ({error}): {line[:200]}") from error
            if not isinstance(row, dict) or set(row) - {"method", "args"} or "method" not in row:
                raise UserError(
                    "E309", f"{{'method': NAME, 'args': [...]}} is expected, not {line[:200]}"
                )
            name, args = row["method"], row.get("args", [])
            if name not in METHODS:
                raise UserError("E309", f"no method {name!r}; there are: {', '.join(METHODS)}")
            args, kwargs = (
                ([], args)
                if isinstance(args, dict)
                else (args if isinstance(args, list) else [args], {})
            )
            method = getattr(t, {"save": "save_now", "stop": "request_stop"}.get(name, name))
            try:
                inspect.signature(method).bind(*args, **kwargs)
            except TypeError as error:
                raise UserError("E309", f"{name}{inspect.signature(method)}: {error}") from error
        except UserError as error:
            self.decide(
                "user", str(name), error.text, 1, refused=error.code, stat={"line": line[:500]}
            )
            return
        try:
            answer = method(*args, **kwargs)
        except WRONG as error:
            answer = {"refused": "E309", "reason": f"{name}: {error}"}
        if (
            not isinstance(answer, dict) or "action" not in answer
        ):  # a question, or save: nothing else wrote it down
            said = {"answer": answer} if answer is not None else {}
            if isinstance(answer, dict) and "refused" in answer:
                said = {"refused": answer["refused"], "answer": answer}
            self.decide(
                "user", name, "asked for in control.jsonl", 0, args=row.get("args", []), **said
            )

    def by_hand(self, action: str, do, reason: str = "asked for", **args) -> dict:
        """A decision of the user's; `do` raises UserError or ValueError where it cannot be, and nothing is changed."""

        def careful():
            try:
                return do()
            except WRONG as error:
                raise UserError("E309", f"{action}{args}: {error}") from error

        return self.decide("user", action, reason, 1, do=careful, args=args)

    def read_script(self, rows: list[dict]) -> dict[int, list[dict]]:
        """Mode replay: what to do at which cursor, of what the surviving attempts did. E310 when it is another run."""
        path, world = self.cfg.replay, self.trainer.parallel.world
        if others := {r["run"] for r in rows if r["run"] != self.run}:
            text = f"orchestrator.replay: {path} was written by another run ({', '.join(others)}, this is {self.run})"
            raise UserError(
                "E310",
                f"{text}: seed, model, data, schedule, optimizer and rows a step must be the same",
            )
        if others := {r["ranks"] for r in rows if r.get("ranks", world) != world}:
            raise UserError(
                "E310",
                f"orchestrator.replay: {path} is of a run on {others} ranks, this one has {world}",
            )
        script: dict[int, list[dict]] = {}
        for row in rows:
            if (
                row.get("kind") == "start"
            ):  # what came after this point in an attempt before did not survive
                script = {
                    c: [r for r in done if r["id"] < row["next_id"]] for c, done in script.items()
                }
            elif row.get("executed"):
                script.setdefault(row["cursor"], []).append(row)
        back = [
            r["args"]["to_cursor"]
            for done in script.values()
            for r in done
            if r["action"].startswith("rollback")
        ]
        self.targets = dict.fromkeys(back)
        return script

    def begin(self) -> None:
        """A resumed attempt: whatever decisions.jsonl holds from here on did not survive."""
        if self.trainer.attempt > 1 and (self.trainer.out / "decisions.jsonl").exists():
            row = {
                "v": 1,
                "kind": "start",
                "run": self.run,
                "attempt": self.trainer.attempt,
                "next_id": self.next_id,
            }
            self.trainer.append("decisions.jsonl", row)

    def at_cursor(self) -> list[dict]:
        return self.script.get(self.trainer.cursor, [])

    def repeat(self, row: dict) -> None:
        """Carry out a decision of the run that is repeated."""
        action, args = row["action"], row.get("args") or {}
        if action.startswith("rollback"):
            own = (
                self.trainer.out / Path(args["from"]).name
            )  # this run's own checkpoint of that step, if it has one
            source = self.targets.get(args["to_cursor"]) or (
                str(own) if own.exists() else args["from"]
            )

            def do():
                return self.go_back(source, args["onset"], args["lr_mult"])

            self.decide(row["trigger"], action, row["reason"], row["level"], do=do, always=True)
        elif action == "stop" and row["level"] == 4:
            self.decide(row["trigger"], action, row["reason"], 4, always=True)
            raise UserError("E301", row["reason"])
        elif action.startswith("set "):
            self.set_knob(action[4:], row["value"])
        elif action == RESEED:
            self.trainer.recycle(args["layer"])
        elif row["trigger"] == "length":
            self.trainer.stopped_early |= action == "stop"
            t = self.trainer
            t.run = with_length(t.cfg, t.run, args.get("max_steps", t.run.max_steps))
        elif row["trigger"] == "oom":
            self.trainer.set_micro_batch(args["new_size"])
        elif row["trigger"] == "user" and action in METHODS and action not in ("save", "stop"):
            getattr(self.trainer, action)(**args) if isinstance(args, dict) else getattr(
                self.trainer, action
            )(*args)

    # ---- state

    def state(self) -> dict:
        """For state.json. A save happens within a turn, which a resumed run begins again."""
        names = (*self.SAVED, "knobs", "unbalanced")
        out = {name: getattr(self, name) for name in names} | {
            "turn": self.turn - 1,
            "run": self.run,
        }
        out |= {"norms": list(self.norms.seen), "course": self.course.state()}
        out |= {
            "streak": int(self.streak),
            "bad_turns": list(self.bad_turns),
            "recent": list(self.recent),
            "skipped": list(self.skipped),
            "alarm": self.alarm,
            "reason": self.reason,
        }
        return out

    def load(self, s: dict, other_data: bool = False, other_course: bool = False) -> None:
        """Detectors go on where they were: a resumed run is not blind. Losses and norms of other data say nothing here;
        on another course (`resume: PATH`) the commands that were written so far are not taken again."""
        for name in (*self.SAVED, "turn"):
            setattr(self, name, s.get(name, getattr(self, name)))
        if other_course:
            self.read_to = os.stat(self.commands).st_size if self.commands.exists() else 0
        self.taken, self.sized = self.read_to, -1
        if self.alarm:
            self.alarm.pop("acting", None)  # it had been decided and not done yet
        if not other_data:
            self.course.load(s["course"])
            self.norms.seen.extend(map(tuple, s["norms"]))
        self.bad_turns.extend(s["bad_turns"])
        self.recent.extend(s.get("recent", ()))
        self.skipped.extend(s.get("skipped", ()))
        self.unbalanced = {
            int(k): v for k, v in s["unbalanced"].items()
        }  # JSON has no integer keys
        self.streak.fill_(s["streak"])
        for name, value in s["knobs"].items():
            self.set_knob(name, value)


# ---------------------------------------------------------------- by hand
