"""decisions.jsonl: every decision with its reason, and later what came of it.

On the disk an iteration is called `turn`, as it always was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from lumen.detectors import Alarm
from lumen.errors import UserError
from lumen.sums import StepNumbers

RESEED = "re-seed a dead expert"  # an action, which a replay must know again
JUDGE_AFTER = 100  # iterations; then it is written down what came of a decision


@dataclass
class Decision:
    """What is to be written down, and done unless something stands against it."""

    trigger: str
    action: str
    reason: str
    level: int
    confidence: float = 1.0
    basis: str = "observed"
    blocked: str | None = None  # what stands against it
    always: bool = False  # not a matter of the mode
    more: dict = field(default_factory=dict)  # fields of the row: args, stat, before, value ...

    @classmethod
    def of(cls, alarm: Alarm) -> Decision:
        names = ("trigger", "action", "reason", "level", "confidence", "basis", "always")
        more = {} if alarm.stat is None else {"stat": alarm.stat}
        return cls(**{name: getattr(alarm, name) for name in names}, more=more)


@dataclass
class Judgement:
    """A decision whose outcome is written down in that iteration. kind: rollback, drop, user,
    experts (a knob, turned for a while) or reseed."""

    id: int
    iteration: int
    kind: str
    loss: float | None = None  # before
    layers: list[int] = field(default_factory=list)
    knob: str | None = None
    was: float | None = None


class Decisions:
    """Writes decisions.jsonl and says what it writes.

    report: has say, append and record_decision; cfg: OrchestratorConfig; run: what identifies it;
    now: returns step, cursor, turn, tokens and attempt; level: the loss of now.
    """

    def __init__(self, report, cfg, run: str, world: int, now: Callable, level: Callable):
        self.report, self.cfg, self.run, self.world = report, cfg, run, world
        self.now, self.level = now, level
        self.next_id = 1
        self.due: list[Judgement] = []

    def obstacle(self, d: Decision) -> str | None:
        """Why it is not done."""
        if not d.level or d.always or d.trigger == "user":
            return d.blocked
        if self.cfg.mode != "act":
            return f"mode: {self.cfg.mode}"
        if d.confidence < self.cfg.intervention_threshold:
            return f"confidence below {self.cfg.intervention_threshold}"
        return d.blocked

    def decide(self, d: Decision, numbers: StepNumbers | None = None, do=None) -> dict:
        """Write it down. `do` is called at once unless something stands against it; it returns more
        of the row, or raises UserError where it cannot be. `numbers`: of the step it is about."""
        now = self.now()
        blocked = self.obstacle(d)
        row = {"v": 1, "id": self.next_id, "run": self.run}
        row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row |= now
        if numbers is not None:
            row |= {"step": numbers.step, "cursor": numbers.cursor, "turn": numbers.iteration}
        row |= {"mode": self.cfg.mode, "level": d.level, "trigger": d.trigger, "action": d.action}
        row |= {"reason": d.reason, "confidence": round(d.confidence, 4), "basis": d.basis}
        row |= {"threshold": self.cfg.intervention_threshold, "executed": blocked is None}
        row |= {"blocked_by": blocked, "ranks": self.world, **d.more}
        self.next_id += 1
        if do is not None and blocked is None:
            try:
                row |= do() or {}
            except UserError as error:
                row |= {"refused": error.code, "reason": error.text}
        if "refused" in row:
            row["executed"] = False
        self.report.record_decision(row)
        if row["executed"]:
            self.judge_later(row, now["turn"] + JUDGE_AFTER)
        self.say(row, d.confidence)
        return row

    def judge_later(self, row: dict, iteration: int) -> None:
        kind = None
        if row["action"] == "drop":  # one of them at a time
            kind = None if any(j.kind == "drop" for j in self.due) else "drop"
        if row["trigger"] == "user" and row["level"]:
            kind = "user"
        if kind:
            self.due.append(Judgement(row["id"], iteration, kind, self.level()))

    def say(self, row: dict, confidence: float) -> None:
        state = "" if row["executed"] else "not done: "
        if "refused" in row:
            state = f"{row['refused']} refused: "
        what = f"{state}{row['action']} {row.get('args') or ''}".rstrip()
        blocked = f" [{row['blocked_by']}]" if row["blocked_by"] else ""
        say = self.report.say
        say(f"decision   #{row['id']} step {row['step']}, {row['trigger']}: {what}")
        say(f"reasoning  {row['reason']}{blocked}")
        say(f"confidence {confidence:.2f} ({row['basis']}), level {row['level']}")

    def outcome(self, id: int, verdict: str, step: int, stat: dict) -> None:
        """What came of a decision."""
        row = {"id": id, "attempt": self.now()["attempt"], "kind": "outcome", "step": step}
        self.report.record_decision(row | {"verdict": verdict} | stat)
        self.report.say(f"outcome    of #{id}: {verdict}")

    def take_due(self, iteration: int) -> list[Judgement]:
        """Those that are to be judged now."""
        now = [j for j in self.due if iteration >= j.iteration]
        self.due = [j for j in self.due if iteration < j.iteration]
        return now

    def begin_attempt(self) -> None:
        """A resumed run: whatever decisions.jsonl holds from this id on did not survive."""
        row = {"v": 1, "kind": "start", "run": self.run, "attempt": self.now()["attempt"]}
        self.report.append("decisions.jsonl", row | {"next_id": self.next_id})

    def state(self) -> dict:
        return {"next_id": self.next_id, "due": [asdict(j) for j in self.due]}

    def load(self, state: dict) -> None:
        self.next_id = state["next_id"]
        self.due = [Judgement(**j) for j in state["due"]]
