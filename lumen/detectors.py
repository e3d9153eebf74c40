"""What is wrong with a run: plain numbers in, alarms out. No torch, no trainer.

`StepNumbers` is what is known of a step, `Alarm` what a detector says of it. What is noise and what
is not they ask lumen/course.py.

To add a detector: a dataclass with `look`, whose fields are its state, and a line in the table
`detectors` of orchestrate.Parts. docs/hacking.md has the recipe.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

from lumen.course import LossCourse, NormLimit, above_chance
from lumen.sums import StepNumbers

# NonFinite: roll back after so many non-finite steps in a row, or so many within so many iterations
MAX_NONFINITE_IN_A_ROW = 3  # steps
MAX_NONFINITE = 5  # steps
MAX_NONFINITE_WITHIN = 200  # iterations
# where nothing may be rolled back the run counts as diverged after so many in a row
MAX_NONFINITE_AT_ALL = 50  # steps

# Explosion
MAX_DROPS_IN_A_ROW = 3  # steps; what explodes more often is for the loss detector to judge
MAX_EXPLOSIONS = 20  # dropped steps; more of them within EXPLOSIONS_WITHIN are no accident
EXPLOSIONS_WITHIN = 1000  # iterations

# Divergence
HEAL_WITHIN = 20  # iterations; most spikes come back by themselves, so they get that long
MAX_EXTENSIONS = 3  # times that long is granted anew, to a spike that has halved
LOW_LOSS_AGAIN = 100  # iterations between two warnings that the loss is too low
RULE = 0.91  # the confidence of a rule, where nothing can be computed: above any usual threshold

# UnbalancedExperts
UNBALANCED_CHECKS = 5  # checks in a row
FIRST_CHECKS = 10  # checks at the start of a run in which routing may be as it likes

# Guessing
LEARNED_WITHIN = 32  # steps after the warm-up in which a run must have become better than guessing

# ModGap
MAX_MOD_GAP = 0.02  # nats between the causal rule and the rule of training, twice in a row

# Collapse
MAX_LOST = 0.5  # nats a token, by which chosen replies may become less likely
LOST_OVER = 20  # steps, a mean over which counts


# ---------------------------------------------------------------- what is known, what is said


@dataclass
class Alarm:
    """What a detector has seen, and what it asks for.

    Levels: 0 a note; 1 the step was dropped; 2 go back to before `onset` (the orchestrator makes 3
    or 4 of it where that did not help before); 4 stop at once.
    """

    trigger: str  # the detector, as decisions.jsonl names it
    action: str
    level: int
    reason: str
    onset: int = 0  # the iteration from which on the run is not to be trusted
    confidence: float = 1.0
    basis: str = "observed"  # or how the confidence was found: pvalue, evalue, rule
    stat: dict | None = None
    # after a rollback: what the loss must have come down to by the end of the cooldown
    recovery_target: float | None = None
    code: str = "E301"  # of the error, at level 4
    always: bool = False  # the device has done it already, in every mode
    id: int | None = None  # of the decision that was made of it


@dataclass
class Healed:
    """What a detector had warned of (decision `id`) is over by itself."""

    id: int | None
    stat: dict


def setting(**more):
    """A field that comes from the configuration and is no state."""
    return field(metadata={"saved": False}, **more)


def recent(size: int):
    """A field: the last `size` values."""
    return field(default_factory=lambda: deque(maxlen=size))


@dataclass
class Detector:
    """Looks at the numbers of each finished step. Its fields are its state, in every checkpoint."""

    def look(self, numbers: StepNumbers) -> Iterator[Alarm | Healed]:
        """At a finished step."""
        return iter(())

    def look_at_evaluation(self, row: dict) -> Iterator[Alarm]:
        """At an evaluation, a row of metrics.jsonl."""
        return iter(())

    def rolled_back(self, to: int, onset: int | None) -> None:
        """Weights are those of iteration `to` again. What came from iteration `onset` on is not to
        be trusted (None: a person asked, nothing is wrong with it)."""

    def cool_down(self, now: int, until: int) -> None:
        """An alarm has brought a rollback in iteration `now`: until iteration `until` nothing that
        is only inferred asks for another one."""

    def saved_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.metadata.get("saved", True)]

    def state(self) -> dict:
        """For state.json."""
        found = {name: getattr(self, name) for name in self.saved_fields()}
        return {name: list(v) if isinstance(v, deque) else v for name, v in found.items()}

    def load(self, state: dict) -> None:
        """What an older checkpoint does not name stays as it is."""
        for name in set(self.saved_fields()) & set(state):
            value, now = state[name], getattr(self, name)
            if isinstance(now, deque):  # JSON has no tuples
                values = [tuple(v) if isinstance(v, list) else v for v in value]
                value = deque(values, maxlen=now.maxlen)
            setattr(self, name, value)


# ---------------------------------------------------------------- detectors


@dataclass
class NonFinite(Detector):
    """Loss or gradient is NaN or infinite. The device has dropped the step, whatever the mode."""

    scaled: bool = setting()  # fp16: an overflow while the loss scale finds its place is no fault
    watching: bool = setting()
    recovers: bool = setting()  # a rollback will follow, and counting begins anew
    diagnose: Callable[[int], str] = setting()  # the cause, from a step's first row; on all ranks
    in_a_row: int = 0  # steps
    iterations: deque = recent(MAX_NONFINITE)  # of the last ones
    cause: str = ""

    def look(self, numbers):
        if numbers.finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        overflow = self.scaled and numbers.loss_finite and not numbers.empty
        if numbers.empty:
            self.cause = "the masks of its rows leave no target that counts"
        elif overflow:
            self.cause = "fp16 overflow, the loss scale halves"
        elif self.in_a_row == 1:
            self.cause = self.diagnose(numbers.cursor)
        stat = {"loss": numbers.loss, "grad_norm": numbers.grad_norm, "in_a_row": self.in_a_row}
        what = "no loss" if numbers.empty else "loss or gradient not finite"
        said = f"{what}; {self.cause}"
        yield Alarm("nonfinite", "drop", 1, said, numbers.iteration, stat=stat, always=True)
        if self.watching and not overflow and not numbers.empty:
            alarm = self.too_many(numbers.iteration)
            if alarm is not None:
                yield alarm
                if self.recovers:
                    self.in_a_row = 0
        if self.in_a_row >= MAX_NONFINITE_AT_ALL:
            said = (
                f"{self.in_a_row} steps in a row had no finite gradient, up to step {numbers.step}"
            )
            code = "E302" if overflow else "E301"
            yield Alarm("nonfinite", "stop", 4, f"{said}; {self.cause}", code=code)

    def too_many(self, iteration: int) -> Alarm | None:
        self.iterations.append(iteration)
        full = len(self.iterations) == MAX_NONFINITE
        often = full and iteration - self.iterations[0] < MAX_NONFINITE_WITHIN
        if often:
            onset = self.iterations[0]
            said = f"{MAX_NONFINITE} in {MAX_NONFINITE_WITHIN} not finite"
        elif self.in_a_row % MAX_NONFINITE_IN_A_ROW == 0:
            onset = iteration - self.in_a_row + 1
            said = f"{self.in_a_row} steps in a row not finite"
        else:
            return None
        self.iterations.clear()
        return Alarm("nonfinite", "rollback", 2, f"{said}; {self.cause}", onset)

    def rolled_back(self, to, onset):
        self.in_a_row = 0


@dataclass
class Explosion(Detector):
    """The gradient's norm is far above its past. Whether, the device has decided by `limit`."""

    acting: bool = setting()
    norms: NormLimit = setting(default_factory=NormLimit)
    let_through: bool = False  # MAX_DROPS_IN_A_ROW were dropped, and it has been said
    dropped: deque = recent(MAX_EXPLOSIONS + 1)  # iterations
    cooldown_ends: int = 0

    def look(self, numbers):
        if not numbers.finite:
            return
        if not numbers.exploded:
            self.let_through = False
        elif numbers.bad or not self.acting:
            yield self.alarm(numbers, "drop", 1)
            self.dropped.append(numbers.iteration)
            if self.too_many(numbers.iteration):
                onset = self.dropped[0]
                said = f"more than {MAX_EXPLOSIONS} of {EXPLOSIONS_WITHIN} steps exploded"
                self.dropped.clear()
                yield Alarm("explosion", "rollback", 2, said, onset, basis="rule")
        elif not self.let_through:
            self.let_through = True
            yield self.alarm(numbers, "accept", 0)
        if not numbers.bad:
            self.norms.add(numbers.iteration, numbers.grad_norm)

    def alarm(self, numbers: StepNumbers, action: str, level: int) -> Alarm:
        norm = numbers.grad_norm
        limit = math.exp(self.norms.limit(numbers.iteration))
        confidence = self.norms.confidence(numbers.iteration, norm)
        said = f"gradient norm {norm:.3g}, at most {limit:.3g} was to be expected"
        if action == "accept":
            said += f"; {MAX_DROPS_IN_A_ROW} were dropped in a row,"
            said += " so it is let through, and so are the next"
        stat = {"grad_norm": norm, "limit": limit}
        return Alarm(
            "explosion", action, level, said, numbers.iteration, confidence, "pvalue", stat
        )

    def too_many(self, iteration: int) -> bool:
        if len(self.dropped) <= MAX_EXPLOSIONS or iteration < self.cooldown_ends:
            return False
        return iteration - self.dropped[0] < EXPLOSIONS_WITHIN

    def rolled_back(self, to, onset):
        if onset is not None:
            self.norms.forget(onset)

    def cool_down(self, now, until):
        self.cooldown_ends = until

    def state(self):
        return super().state() | {"norms": list(self.norms.seen)}

    def load(self, state):
        super().load(state)
        self.norms.seen.extend(map(tuple, state.get("norms", ())))


WATCHING = "watching"
WAITING = "waiting"  # an alarm was said; it may heal by itself
ACTING = "acting"  # a rollback was asked for: the orchestrator answers in the next iteration


@dataclass
class Divergence(Detector):
    """The loss has left its course, or all that was learned is lost; and the wait that most
    spikes deserve. One detector, for its three rules share one course and exclude one another."""

    threshold: float = setting()  # of the confidence
    course: LossCourse = setting(default_factory=LossCourse)
    losses: deque = recent(8)  # the last ones, whatever became of them
    phase: str = WATCHING
    began: int = 0  # the iteration of the alarm
    onset: int = 0
    until: int = 0  # the iteration up to which it may heal by itself
    # what the loss must come down to, where all was lost; None: back to its course
    target: float | None = None
    peak: float = 0.0  # the highest median of 5 residuals since the alarm
    extensions: int = 0
    id: int | None = None  # of the decision to wait
    recovery_target: float | None = None  # see Alarm
    warned: int = -LOW_LOSS_AGAIN
    rolled_back_at: int = 0  # the last rollback that an alarm brought
    cooldown_ends: int = 0

    def look(self, numbers):
        if not numbers.finite or numbers.bad:
            return
        self.losses.append(numbers.loss)
        if self.phase == WATCHING and self.recovery_target is not None:
            if numbers.iteration >= self.cooldown_ends:
                yield from self.check_recovery(numbers.iteration)
                if self.phase == ACTING:
                    return
        self.course.add(numbers.iteration, numbers.loss)
        if self.phase == WATCHING:
            yield from self.watch(numbers)
        elif self.phase == WAITING and self.target is not None:
            yield from self.wait_for_target(numbers.iteration)
        elif self.phase == WAITING:
            yield from self.wait_for_course(numbers.iteration)

    def check_recovery(self, iteration: int):
        """The cooldown after a rollback from lost progress is over: half of it must be back."""
        target, self.recovery_target = self.recovery_target, None
        level = statistics.median(self.losses)
        if level <= target:
            return
        self.begin(iteration, self.rolled_back_at, target=target)
        self.until = iteration
        said = (
            f"what was lost is not back: the loss is {level:.3f}, {target:.3f} would be half of it,"
        )
        yield self.act(f"{said} {iteration - self.onset} steps after a rollback")

    def watch(self, numbers: StepNumbers):
        course = self.course
        if course.frozen > course.MAX_FROZEN and not course.alarm(self.threshold):
            course.forget()
        lost = course.all_lost()
        if lost is not None:
            yield from self.warn_of_loss(numbers.iteration, *lost)
        elif course.too_low() and numbers.iteration - self.warned >= LOW_LOSS_AGAIN:
            self.warned = numbers.iteration
            said = f"the loss fell by {-course.residual:.3f} nats at once:"
            said += f" look at the data around row {numbers.cursor}"
            stat = {"residual": course.residual}
            yield Alarm("low_loss", "warn", 0, said, basis="rule", stat=stat)
        elif course.alarm(self.threshold):
            yield from self.warn_of_spike(numbers.iteration)

    def warn_of_loss(self, iteration: int, since: int, half: float):
        self.begin(iteration, iteration - since, target=half)
        above = self.course.above_start()
        said = f"the loss is {above:.3f} nats above where it began, {since} steps ago it was below"
        alarm = Alarm("divergence", "wait", 0, said, self.onset, RULE, "rule", {"above": above})
        yield alarm
        self.id = alarm.id

    def warn_of_spike(self, iteration: int):
        course = self.course
        excess = course.excess(7)
        self.begin(iteration, course.onset(), peak=excess)
        said = f"the loss is {excess:.3f} nats above its course, floor {course.floor():.3f};"
        said += " most spikes heal"
        if self.until > iteration + HEAL_WITHIN:
            said += f", and the last rollback gets {self.cooldown_ends - self.rolled_back_at}"
            said += " iterations"
        stat = self.statistic(excess)
        alarm = Alarm("divergence", "wait", 0, said, self.onset, course.confidence, "evalue", stat)
        yield alarm
        self.id = alarm.id

    def begin(self, iteration: int, onset: int, target: float | None = None, peak: float = 0.0):
        """An alarm: from now on it may heal."""
        self.phase = WAITING
        self.began, self.onset = iteration, onset
        self.until = max(iteration + HEAL_WITHIN, self.cooldown_ends)
        self.target, self.peak = target, peak
        self.extensions = 0
        self.id = None

    def wait_for_target(self, iteration: int):
        level = self.course.level()
        if level <= self.target:
            yield self.heal({"turns": iteration - self.began})
        elif iteration >= self.until:
            said = f"what was learned is lost: the loss is {level:.3f},"
            yield self.act(f"{said} half of it would be {self.target:.3f}")

    def wait_for_course(self, iteration: int):
        course = self.course
        excess, floor = course.excess(5), course.floor()
        self.peak = max(self.peak, excess)
        if excess <= floor:
            yield self.heal({"excess": excess, "turns": iteration - self.began})
            course.restart()
        elif iteration < self.until:
            return
        elif excess < self.peak / 2 and self.extensions < MAX_EXTENSIONS:
            self.until = iteration + HEAL_WITHIN
            self.extensions += 1
        else:
            said = f"{excess:.3f} nats above its course {iteration - self.began} steps after"
            self.phase = ACTING
            yield Alarm(
                trigger="divergence",
                action="rollback",
                level=2,
                reason=f"{said} the alarm (floor {floor:.3f})",
                onset=self.onset,
                confidence=course.confidence,
                basis="evalue",
                stat=self.statistic(excess),
            )

    def act(self, said: str) -> Alarm:
        """A rule asks for a rollback, after which half of what was lost must come back."""
        self.phase = ACTING
        alarm = Alarm("divergence", "rollback", 2, said, self.onset, RULE, "rule")
        alarm.recovery_target = self.target
        return alarm

    def heal(self, stat: dict) -> Healed:
        self.phase = WATCHING
        return Healed(self.id, stat)

    def statistic(self, excess: float) -> dict:
        """What decisions.jsonl says of the course. rho1: see LossCourse.correlation."""
        return {
            "E": self.course.E,
            "onset": self.onset,
            "excess": excess,
            "floor": self.course.floor(),
            "rho1": self.course.correlation(self.onset),
        }

    @property
    def calm(self) -> bool:
        """No alarm, and none building up."""
        return self.phase == WATCHING and not self.course.suspicious

    def rolled_back(self, to, onset):
        self.phase = WATCHING
        self.course.restart(before=to + 1 if onset is None else onset)

    def cool_down(self, now, until):
        self.rolled_back_at = now
        self.cooldown_ends = until

    def state(self):
        return super().state() | {"course": self.course.state()}

    def load(self, state):
        super().load(state)
        if self.phase == ACTING:  # it had been asked for and not been done yet
            self.phase = WAITING
        if "course" in state:
            self.course.load(state["course"])


@dataclass
class Desync(Detector):
    """The ranks hold different weights: a flipped bit, a faulty part."""

    check_interval: int = setting()  # steps
    compare: Callable[[], str] = setting()  # who differs; on all ranks
    in_sync_at: int = 0  # the iteration of the last check that was passed

    def look(self, numbers):
        if numbers.desynced:
            said = f"the ranks' weights differ at step {numbers.step} ({self.compare()}):"
            said += " a memory or transfer error of that machine"
            yield Alarm("desync", "rollback", 2, said, self.in_sync_at + 1)
        elif numbers.step % self.check_interval == 0:
            self.in_sync_at = numbers.iteration


@dataclass
class UnbalancedExperts(Detector):
    """Layers with a dead expert, or one that has far too much, at several checks in a row."""

    check_interval: int = setting()  # steps
    # the most by which a layer's largest load may exceed its mean load, in means
    max_violation: float = setting()
    checks: dict = field(default_factory=dict)  # layer: unbalanced so many checks in a row

    def look(self, numbers):
        done = numbers.step + 1
        if numbers.experts is None or done % self.check_interval:
            return
        layers = numbers.experts["layers"]
        for i, layer in layers.items():
            wrong = layer["dead"] > 0 or layer["max_violation"] > self.max_violation
            self.checks[i] = self.checks.get(i, 0) + 1 if wrong else 0
        lasting = self.lasting()
        if not lasting or done < FIRST_CHECKS * self.check_interval:
            return
        dead = {i: layers[i]["dead"] for i in lasting}
        worst = max(layers[i]["max_violation"] for i in lasting)
        said = f"layers {lasting} unbalanced for {UNBALANCED_CHECKS} checks:"
        said += f" {sum(dead.values())} dead experts, max violation {worst:.2f}"
        stat = {"layers": lasting, "dead": dead, "max_violation": worst}
        yield Alarm("experts", "rebalance", 2, said, numbers.iteration, stat=stat)

    def lasting(self) -> list[int]:
        """The layers that have been unbalanced for long."""
        return [i for i, n in self.checks.items() if n >= UNBALANCED_CHECKS]

    def load(self, state):
        super().load(state)
        self.checks = {int(k): v for k, v in self.checks.items()}  # JSON has no integer keys


@dataclass
class ModGap(Detector):
    """Text is made by MoD's causal rule, training by one that looks ahead: they must not part."""

    evaluations: int = 0  # in a row with too large a gap

    def look_at_evaluation(self, row):
        gap = row.get("mod_gap") or 0.0
        self.evaluations = self.evaluations + 1 if gap > MAX_MOD_GAP else 0
        if self.evaluations == 2:
            said = f"text is made by a rule that costs {gap:.3f} nats against the rule of training"
            said += f" (agreement {100 * row['mod_agreement']:.1f} %):"
            said += " anneal more slowly (mod_anneal_steps), or raise mod_capacity"
            yield Alarm("mod_gap", "advise", 0, said, basis="rule", stat={"gap": gap})


@dataclass
class Collapse(Detector):
    """Preferences: the chosen replies become unlikely as well, only less so than the rejected; the
    margin still rises (likelihood displacement: Pal et al. 2024, Razin et al. 2024)."""

    by_reference: bool = setting()  # the method has one; else: by what the run began with
    end: Callable[[str], None] | None = setting(default=None)  # the run, where that is asked for
    gains: deque = recent(LOST_OVER)  # of steps: preferences.SUM_NAMES' chosen_gain, ...
    margins: deque = recent(LOST_OVER)  # ... margin
    first: list = field(default_factory=list)  # both at the beginning
    said: bool = False

    def look(self, numbers):
        if numbers.bad or "chosen_gain" not in numbers.more:
            return
        self.gains.append(numbers.more["chosen_gain"])
        self.margins.append(numbers.more["margin"])
        if len(self.gains) < LOST_OVER or self.said:
            return
        gain, margin = statistics.fmean(self.gains), statistics.fmean(self.margins)
        # the reference is where it began
        self.first = self.first or [0.0 if self.by_reference else gain, margin]
        lost = self.first[0] - gain
        if lost > MAX_LOST and margin >= self.first[1]:
            self.said = True
            said = f"chosen replies lost {lost:.2f} nats a token while margins rise: raise beta or"
            said += " sft_coef, or lower learning_rate"
            stat = {"lost": lost, "margin": margin}
            yield Alarm("collapse", "warn", 0, said, basis="rule", stat=stat)
            if self.end:
                self.end(f"stop: {said}")

    def rolled_back(self, to, onset):
        self.gains.clear()
        self.margins.clear()


@dataclass
class Guessing(Detector):
    """The loss is above what guessing costs. A note: by itself it stops no run, for what can be
    undone is the other detectors' to see."""

    n_vocab: int = setting()
    settled: int = setting()  # the step from which on something must have been learned
    loss: Divergence = setting()  # whose first and last losses are compared
    said: bool = False

    def verdict(
        self, step: int, since_rollback: int, val_loss: float | None
    ) -> tuple[str, str] | None:
        """(what, advice), or None. `since_rollback`: iterations.

        Until something must have been learned only a loss that has risen counts: fresh weights
        begin a little above, and those of wide models more than a little.
        """
        losses = {} if val_loss is None else {"val_loss": val_loss}
        first = math.log(self.n_vocab) + 3
        last = self.loss.losses
        if len(last) == 8 and since_rollback > 8:  # all by the weights of now
            losses = {"the loss": statistics.median(last)} | losses
            # of weights that no step had touched, or of new data
            first = next(iter(self.loss.course.first), first)
        for name, loss in losses.items():
            risen = not loss <= 1.1 * first
            if not above_chance(loss, self.n_vocab) or not (risen or step >= self.settled):
                continue
            chance = f"guessing costs ln(vocab_size) = {math.log(self.n_vocab):.2f}"
            what = f"worse than guessing: {name} is {loss:.2f}, {chance}"
            if name == "val_loss" and "the loss" in losses:
                advice = "training alone is well: fewer epochs, or more data of validation's kind"
            elif risen:
                advice = "lower learning_rate, or lengthen warmup_steps"
            else:
                advice = "nothing was learned: try another learning_rate, and look at the data"
            return what, advice
        return None

    def note(self, verdict: tuple[str, str] | None) -> Iterator[Alarm]:
        """Said once, where it begins."""
        if verdict is not None and not self.said:
            self.said = True
            yield Alarm("chance", "warn", 0, "; ".join(verdict), basis="rule")
