"""The parts of the orchestrator: what train.py's `Orchestrator` calls.

Escalation (how far an alarm goes), judge (what came of a decision), Rebalancing (experts).
What is checked, decided and done in each iteration stands in train.py; what is noise and what is
not in detectors.py; where to go back to in snapshots.py; what is written down in decisions.py;
what people ask for in control.py.

An *iteration* is one pass through the loop and never comes back; a *step* does, after a rollback.
On the disk (state.json, decisions.jsonl) an iteration is called `turn`, as it always was.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, fields

import torch

from lumen import checkpoint
from lumen.control import Control
from lumen.decisions import JUDGE_AFTER, RESEED, Decision, Decisions, Judgement
from lumen.detectors import (
    LEARNED_WITHIN,
    WATCHING,
    Alarm,
    Collapse,
    Desync,
    Detector,
    Divergence,
    Explosion,
    Guessing,
    ModGap,
    NonFinite,
    UnbalancedExperts,
)
from lumen.diagnose import diagnose_step
from lumen.health import Checkup, Health, counters
from lumen.preferences import needs_reference
from lumen.replay import Replay, run_id
from lumen.resolve import with_length
from lumen.snapshots import Snapshot, Snapshots, find_source
from lumen.sums import StepNumbers

ESCALATE_WITHIN = 1000  # iterations; an alarm so soon after a rollback is met a level higher
MAX_ROLLBACKS = 10  # in a run
MAX_RECENT_ROLLBACKS = 3
RECENT = 10_000  # iterations
COOLDOWN_ITERATIONS = 200  # after a rollback: what is gone back to gets the time to settle
LR_CUT = 0.7  # level 3: the learning rate times this,
LR_CUT_ITERATIONS = 500  # and back to 1 along a cosine
MAX_CORRELATION = 0.5  # of the loss's noise; above it the ranks of residuals are no fair bets

REBALANCE_CHECKS = 10  # checks for which a knob of the router pulls twice as hard
MAX_RESEEDS = 2  # dead experts that are made anew, in a run


# ---------------------------------------------------------------- escalation


@dataclass
class Escalation:
    """How far an alarm goes, which depends on the rollbacks before it. Its fields are its state."""

    rollbacks: list[int] = field(default_factory=list)  # iterations; those by hand do not count
    last_source: int | None = None  # the step that was gone back to
    cut_at: int | None = None  # the iteration in which the learning rate was cut
    cut: float = 1.0

    def level(self, iteration: int) -> int:
        """2 for the first alarm, 3 and 4 for those that soon follow a rollback."""
        return 2 + sum(iteration - at < ESCALATE_WITHIN for at in self.rollbacks)

    def spent(self, iteration: int) -> bool:
        """Whether rolling back has been tried often enough."""
        recent = sum(iteration - at < RECENT for at in self.rollbacks)
        return recent >= MAX_RECENT_ROLLBACKS or len(self.rollbacks) >= MAX_ROLLBACKS

    @property
    def cooldown_ends(self) -> int:
        """The first iteration in which the loss may bring another rollback."""
        return self.rollbacks[-1] + COOLDOWN_ITERATIONS if self.rollbacks else 0

    def lr_factor(self, iteration: int) -> float:
        """Exactly 1.0 in a run that was not cut."""
        if self.cut_at is None or iteration - self.cut_at >= LR_CUT_ITERATIONS:
            return 1.0
        done = (iteration - self.cut_at) / LR_CUT_ITERATIONS
        return 1 - (1 - self.cut) * (1 + math.cos(math.pi * done)) / 2

    def state(self) -> dict:
        return asdict(self)

    def load(self, state: dict) -> None:
        for f in fields(self):
            setattr(self, f.name, state.get(f.name, getattr(self, f.name)))


# ---------------------------------------------------------------- to be done, and judged


@dataclass
class EndEarly:
    """To be done: what forecast.justified_stop advises."""

    advice: str  # begins with "stop:" or "start the decay:"


@dataclass
class KnobBack:
    """To be done: a knob that was turned for a while gets its value back."""

    knob: str
    value: float
    decision: int


def judge(judgement: Judgement, loss, explosion, experts, rollbacks: list[int]) -> tuple[str, dict]:
    """(verdict, numbers) on a decision of JUDGE_AFTER iterations ago, by what the detectors
    Divergence, Explosion and UnbalancedExperts have seen since."""
    since = judgement.iteration - JUDGE_AFTER
    if judgement.kind == "rollback":
        again = any(at > since for at in rollbacks)
        target = loss.recovery_target
        gone = target is not None and statistics.median(loss.losses) > target
        failed = again or gone or loss.phase != WATCHING
        stat = {"excess": loss.course.excess(7), "floor": loss.course.floor()}
        return "did not hold" if failed else "helped", stat
    if judgement.kind == "drop":
        more = sum(at > since for at in explosion.dropped)
        return f"{more} more were dropped since" if more else "it stayed the only one", {}
    if judgement.kind == "user":
        return "seen", {"loss_before": judgement.loss, "loss_after": loss.course.level()}
    unbalanced = any(experts.checks.get(i, 0) for i in judgement.layers)
    return "did not help" if unbalanced else "helped", {}


# ---------------------------------------------------------------- experts


class Rebalancing:
    """What is done about layers whose experts stay unbalanced. The selection bias is the standing
    response; for REBALANCE_CHECKS it pulls twice as hard, then the loss does; then, where that is
    allowed, a dead expert is made anew."""

    def __init__(self, decisions: Decisions, control: Control, cfg):
        self.decisions, self.control, self.cfg = decisions, control, cfg
        self.failures: dict[str, int] = {}  # how often what did not help

    @property
    def waits(self) -> bool:
        """A knob is turned, and not judged yet."""
        return any(j.kind == "experts" for j in self.decisions.due)

    def answer(self, alarm: Alarm, checks: dict[int, int], iteration: int) -> None:
        """`checks` of UnbalancedExperts begin anew for layers that get a new expert."""
        later = iteration + REBALANCE_CHECKS * self.cfg.check_interval
        layers = alarm.stat["layers"]
        for knob in ("bias_update_rate", "aux_loss_weight"):
            now = self.control.get_knob(knob)
            if now and not self.failures.get(knob):
                reason = f"{alarm.reason}; twice the pull for {REBALANCE_CHECKS} checks"
                row = self.change(knob, 2 * now, reason, {"stat": alarm.stat})
                if row["executed"]:
                    due = Judgement(row["id"], later, "experts", None, layers, knob, now)
                    self.decisions.due.append(due)
                else:  # mode shadow: said once
                    self.failures[knob] = 1
                return
        layer = next((i for i, dead in alarm.stat["dead"].items() if dead), None)
        if layer is None or self.failures.get("recycle", 0) >= MAX_RESEEDS:
            return
        for i in layers:
            checks[i] = 0
        self.failures["recycle"] = self.failures.get("recycle", 0) + 1
        d = Decision("experts", RESEED, alarm.reason, 3)
        d.more = {"args": {"layer": layer}, "stat": alarm.stat}
        if not self.cfg.enable_architecture_adaptation:
            d.blocked = "enable_architecture_adaptation: false"
        row = self.decisions.decide(d, do=lambda: self.control.reseed(layer))
        if row["executed"]:
            self.decisions.due.append(Judgement(row["id"], later, "reseed", None, [layer]))

    def change(self, knob: str, value: float, reason: str, more: dict) -> dict:
        """A decision to set a knob."""
        before = self.control.get_knob(knob)
        d = Decision("experts", f"set {knob}", reason, 2)
        d.more = {"value": value, "before": before} | more
        return self.decisions.decide(d, do=lambda: self.control.set_knob(knob, value))


# ---------------------------------------------------------------- all of it


class Parts:
    """What an orchestrator consists of, its state, and its chores. It watches and drives the whole
    run, so it gets the whole trainer; what it decides stands in train.Orchestrator."""

    def __init__(self, trainer, replay: list[dict] | None = None):
        """`replay`: the rows of the file to repeat. E310 where they are of another run."""
        t = self.trainer = trainer
        cfg = self.cfg = t.cfg.orchestrator
        self.acting = cfg.mode == "act"
        self.watching = cfg.mode in ("act", "shadow")
        self.iteration = 0
        self.went_back = 0  # the last iteration that did
        self.todo: list = []  # Alarm, Commands, EndEarly, KnobBack: for the next iteration's top
        self.dropped = 0  # steps
        self.seconds = 0.0  # that all of this has taken
        self.ended: list[str] = []  # advice on the run's length that was decided on
        self.cursor = t.cursor  # of the iteration before
        # on the device: explosions in a row; whether a rank had no gradient to give
        self.streak = torch.zeros((), dtype=torch.int32, device=t.parallel.device)
        self.halted = torch.zeros((), dtype=torch.bool, device=t.parallel.device)

        m, recovers = t.cfg.model, self.acting and cfg.enable_emergency_recovery
        # of the largest violation that there can be: one expert of K has every token
        most = min(4.0, 0.75 * (m.n_experts / m.n_experts_per_token - 1)) if m.n_experts else 0.0
        self.desync = Desync(cfg.check_interval, self.who_differs)
        self.nonfinite = NonFinite(t.loss_scale is not None, self.watching, recovers, self.diagnose)
        self.explosion = Explosion(self.acting)
        self.loss = Divergence(cfg.intervention_threshold)
        self.experts = UnbalancedExperts(cfg.check_interval, most)
        self.guessing = Guessing(m.vocab_size, t.run.peak_step + LEARNED_WITHIN, self.loss)
        self.detectors: dict[str, Detector] = {
            "desync": self.desync,
            "nonfinite": self.nonfinite,
            "explosion": self.explosion,
            "divergence": self.loss,
            "experts": self.experts,
            "mod_gap": ModGap(),
            "guessing": self.guessing,
        }
        if t.cfg.method != "sft":
            end = self.end_early if t.cfg.enable_early_stopping else None
            self.detectors["collapse"] = Collapse(needs_reference(t.cfg.method), end)
        # what is not finite is dropped in every mode
        self.looking = list(self.detectors.values()) if self.watching else [self.nonfinite]

        run, world = run_id(t), t.parallel.world
        self.control = t.control
        self.snapshots = Snapshots(self.regions)
        self.escalation = Escalation()
        self.decisions = Decisions(t.report, cfg, run, world, self.now, self.loss.course.level)
        self.rebalancing = Rebalancing(self.decisions, self.control, cfg)
        self.health = Health()
        self.replay = Replay(replay, cfg.replay, run, world) if cfg.mode == "replay" else None

    @property
    def clean(self) -> bool:
        """Whether what is saved now may be trusted."""
        return self.loss.calm and self.nonfinite.in_a_row == 0

    # ---- what the parts ask

    def now(self) -> dict:
        t = self.trainer
        place = {"step": t.step, "cursor": t.cursor, "turn": self.iteration}
        return place | {"tokens": t.tokens, "attempt": t.report.attempt}

    def decide(self, decision: Decision, numbers: StepNumbers | None = None, do=None) -> dict:
        return self.decisions.decide(decision, numbers, do)

    def regions(self) -> dict[str, torch.Tensor]:
        """Every local region of every tensor, and the loss scale."""
        t, found = self.trainer, {}
        for name, tensor in t.tensors().items():
            for at, _, local, _ in t.parallel.local_shards(name, tensor):
                found[f"{name}@{at}"] = local
        if t.loss_scale is not None:
            found |= t.loss_scale.tensors()
        return found

    def who_differs(self) -> str:
        """Of the ranks' weights. On all ranks."""
        par = self.trainer.parallel
        sums = par.gather(int(par.checksum(self.trainer.model)))
        odd = [rank for rank, x in enumerate(sums) if sums.count(x) < (len(sums) + 1) // 2]
        if not odd:
            return "there is no majority"
        return f"rank {', '.join(map(str, odd))} differs from most"

    def diagnose(self, cursor: int) -> str:
        """Why a step was not finite, by the first rank that can say. On all ranks."""
        found = self.trainer.parallel.gather(diagnose_step(self.trainer, cursor))
        found = [text for text in found if text]
        found.sort(key=lambda text: text.startswith("not repeated"))  # another may have seen it
        return found[0] if found else "transient: finite when repeated"

    def source(self, before=None, step=None, older_than=None) -> Snapshot | str | None:
        """Where to go back to, see find_source."""
        return find_source(self.trainer, self.snapshots, before, step, older_than)

    def restore(self, source: Snapshot | str) -> tuple[int, int | None]:
        """Weights, moments and numbers of a snapshot or checkpoint: (its iteration, the cursor of a
        snapshot). On all ranks."""
        t = self.trainer
        if isinstance(source, Snapshot):  # in memory
            self.snapshots.restore(source)
            t.state.rewind({"step": source.step} | source.numbers)
            return source.iteration, source.cursor
        saved = t.parallel.run_or_raise_on_all(checkpoint.Checkpoint, source)
        t.parallel.run_or_raise_on_all(t.state.restore, saved)
        t.state.rewind(saved.state)
        return saved.state.get("orchestrator", {}).get("turn", 0), None

    # ---- commands

    def new_commands(self) -> bool:
        return self.control.file.changed()

    def take_commands(self) -> None:
        """To be carried out at the top of the next iteration."""
        self.todo.append(self.control.file.take())

    # ---- chores

    def keep_snapshot(self) -> None:
        """At the first step, and every snapshot_interval steps while nothing is wrong."""
        t, interval = self.trainer, self.cfg.snapshot_interval
        snapshot = Snapshot(t.step, t.cursor, self.iteration, late=t.pending is not None)
        if self.replay:
            if t.cursor in self.replay.targets:
                snapshot.numbers = t.state.numbers()
                self.replay.targets[t.cursor] = self.snapshots.copy(snapshot)
            return
        resumed = t.step == t.started_at and not self.snapshots.certified
        first = self.iteration == 1 or resumed
        if first and interval and not self.snapshots.make_room(t.parallel):
            said = "no room for snapshots in memory: a rollback takes the newest clean checkpoint"
            t.say(f"note       {said}")
        if not self.snapshots.allowed or not self.clean:
            return
        if first or (self.snapshots.candidate is None and t.step % interval == 0):
            snapshot.numbers = t.state.numbers()
            self.snapshots.take(snapshot, certified=first)

    def worse_than_guessing(self) -> tuple[str, str] | None:
        """See Guessing.verdict; a loss of pairs is none of a vocabulary."""
        t = self.trainer
        if t.cfg.method != "sft":
            return None
        return self.guessing.verdict(t.step, self.iteration - self.went_back, t.progress.val_loss)

    def note_guessing(self) -> tuple[str, str] | None:
        """The verdict, written down once; None too where another detector has more to say."""
        if self.loss.phase != WATCHING or self.nonfinite.in_a_row:
            return None
        verdict = self.worse_than_guessing()
        for alarm in self.guessing.note(verdict):
            self.decide(Decision.of(alarm))
        return verdict

    def counters(self) -> dict:
        """See health.counters."""
        t = self.trainer
        cuda = t.parallel.device.type == "cuda"
        return counters(self.iteration, t.watch, t.run.compile_model, cuda)

    def examine(self, numbers: StepNumbers) -> None:
        """Health, once in check_interval steps. What ranks tell one another waits for no GPU."""
        t = self.trainer
        mine = self.health.grown(self.counters())
        off_course = not self.clean
        guessing = self.note_guessing()
        if guessing is None and self.loss.phase == WATCHING:
            self.guessing.said = False
        last = t.progress.evaluated_at
        checkup = Checkup(
            off_course,
            guessing,
            above_start=self.loss.course.above_start(),
            unsaved=t.saver.unsaved,
            rows=t.parallel.gather(mine),
            rank=t.parallel.rank,
            evaluated=last is not None and last > numbers.step - self.cfg.check_interval,
            unbalanced=self.experts.lasting(),
        )
        if line := self.health.examine(checkup):
            t.say(f"health     {line}")

    def judge(self, iteration: int) -> None:
        """What was done a while ago; what did not help and can be undone is undone."""
        for due in self.decisions.take_due(iteration):
            rollbacks = self.escalation.rollbacks
            verdict, stat = judge(due, self.loss, self.explosion, self.experts, rollbacks)
            if due.kind == "experts":
                failures = self.rebalancing.failures
                failures[due.knob] = failures.get(due.knob, 0) + (verdict != "helped")
                self.todo.append(KnobBack(due.knob, due.was, due.id))
                stat = {"reverted": True}
            self.decisions.outcome(due.id, verdict, self.trainer.step, stat)

    def end_early(self, advice: str) -> None:
        """What forecast.justified_stop advises: decided once."""
        kind = advice.partition(":")[0]
        if kind not in self.ended and self.watching:
            self.ended.append(kind)
            self.todo.append(EndEarly(advice))

    def shorten(self, advice: str) -> None:
        """Stop, or begin the decay now; done where enable_early_stopping allows it."""
        t, kind = self.trainer, advice.partition(":")[0]

        def do():
            if kind == "stop":
                t.progress.stopped_early = True
                return {}
            before = t.run.max_steps
            steps = round(t.step / (1 - t.cfg.decay_frac))  # of which the decay is that share
            t.run = with_length(t.cfg, t.run, min(max(t.step + 1, steps), before))
            return {"args": {"max_steps": t.run.max_steps}, "before": {"max_steps": before}}

        d = Decision("length", kind, advice, 2, basis="rule")
        if not t.cfg.enable_early_stopping:
            d.blocked = "enable_early_stopping: false"
        self.decide(d, do=do)

    # ---- state

    def begin_attempt(self) -> None:
        """Once out_dir is ours and the attempt has its number."""
        if self.trainer.report.attempt > 1 and (self.trainer.out / "decisions.jsonl").exists():
            self.decisions.begin_attempt()

    def state(self) -> dict:
        """For state.json. A save happens within an iteration, which a resumed run begins again."""
        return {
            "turn": self.iteration - 1,
            "run": self.decisions.run,
            "dropped": self.dropped,
            "streak": int(self.streak),
            "ended": self.ended,
            "detectors": {name: d.state() for name, d in self.detectors.items()},
            "escalation": self.escalation.state(),
            "decisions": self.decisions.state(),
            "failures": self.rebalancing.failures,
            "control": self.control.state(),
        }

    def load(self, state: dict, other_data: bool = False, other_course: bool = False) -> None:
        """Detectors go on where they were: a resumed run is not blind.

        other_data: losses and norms of then say nothing now. other_course: this run goes on from
        another's checkpoint, so commands that were written until now are not taken again.
        """
        state = modernised(state)
        self.iteration = state["turn"]
        self.dropped = state["dropped"]
        self.streak.fill_(state["streak"])
        self.ended = list(state["ended"])
        for name, detector in self.detectors.items():
            saved = dict(state["detectors"].get(name, {}))
            if other_data:
                saved.pop("course", None)
                saved.pop("norms", None)
            detector.load(saved)
        self.escalation.load(state["escalation"])
        self.decisions.load(state["decisions"])
        self.rebalancing.failures = dict(state["failures"])
        self.control.load(state["control"], other_course)


# ---------------------------------------------------------------- state of before


def modernised(state: dict) -> dict:
    """The orchestrator's block of state.json as it is now, from one that was written before
    detectors had blocks of their own."""
    if "detectors" in state:
        return state
    alarm = state.get("alarm") or {}
    rollbacks = state["rollbacks"]
    cooldown_ends = rollbacks[-1] + COOLDOWN_ITERATIONS if rollbacks else 0
    loss = {"course": state["course"], "losses": state.get("recent", [])}
    loss |= {"warned": state["warned"], "recovery_target": state.get("regain")}
    loss |= {"cooldown_ends": cooldown_ends, "rolled_back_at": max(rollbacks, default=0)}
    if alarm:
        loss |= {"phase": "waiting", "began": alarm["turn"], "target": alarm.get("half")}
        loss |= {name: alarm[name] for name in ("onset", "until", "peak", "id") if name in alarm}
        loss["extensions"] = alarm.get("waits", 0)
    nonfinite = {"in_a_row": state["in_a_row"], "iterations": state["bad_turns"]}
    explosion = {"let_through": state["letting"], "dropped": state.get("skipped", [])}
    explosion |= {"norms": state["norms"], "cooldown_ends": cooldown_ends}
    advised = state.get("advised", [])
    cut = state["cut"] or [None, 1.0]
    due = []
    for d in state["due"]:
        layers = d.get("layers") or d.get("stat", {}).get("layers", [])
        known = {"id": d["id"], "iteration": d["turn"], "kind": d["kind"], "layers": layers}
        due.append(known | {name: d.get(name) for name in ("loss", "knob", "was")})
    return {
        "turn": state["turn"],
        "run": state["run"],
        "dropped": state["dropped"],
        "streak": state["streak"],
        "ended": [kind for kind in advised if kind != "guessing"],
        "detectors": {
            "nonfinite": nonfinite | {"cause": state.get("reason", "")},
            "explosion": explosion,
            "divergence": loss,
            "desync": {"in_sync_at": state["together"]},
            "experts": {"checks": state["unbalanced"]},
            "mod_gap": {"evaluations": state["gaps"]},
            "guessing": {"said": "guessing" in advised},
        },
        "escalation": {
            "rollbacks": rollbacks,
            "last_source": state["last_source"],
            "cut_at": cut[0],
            "cut": cut[1],
        },
        "decisions": {"next_id": state["next_id"], "due": due},
        "failures": state["failures"],
        "control": {"read_to": state["read_to"], "knobs": state["knobs"]},
    }
