"""Mode replay: a run with the decisions of another one, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lumen.commands import METHODS
from lumen.decisions import RESEED, Decision
from lumen.errors import UserError
from lumen.resolve import with_length
from lumen.snapshots import Snapshot


def run_id(trainer) -> str:
    """The same for runs whose decisions may be repeated one by the other."""
    cfg = trainer.cfg
    words = [cfg.seed, trainer.model_written, trainer.data.fingerprints, trainer.run.rows_per_step]
    words += [cfg.learning_rate, cfg.lr_schedule, cfg.optimizer, cfg.grad_clip, cfg.z_loss]
    if trainer.fine_tunes:
        words += [cfg.method, cfg.freeze, vars(cfg.lora), cfg.quantize_base]
        words += [trainer.beside["base"]["sha256"]]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]


def read_decisions(path: str | None) -> list[dict] | None:
    """The rows of a decisions.jsonl to be repeated, without outcomes; None: there is nothing to be
    repeated. E310 for another file."""
    if not path:
        return None
    needed = {"run", "id", "turn", "cursor", "action"}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        rows = [row for row in rows if row.get("kind") != "outcome"]
        whole = all(needed <= set(row) or row.get("kind") == "start" for row in rows)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError("E310", f"orchestrator.replay: {path}: {error}") from error
    if not rows or not whole:
        raise UserError("E310", f"orchestrator.replay: {path} holds no decisions of a run")
    return rows


class Replay:
    """Mode replay: at which cursor what is to be done, of what the surviving attempts decided.

    E310 when the rows are of another run.
    """

    def __init__(self, rows: list[dict], path: str, run: str, world: int):
        others = {row["run"] for row in rows if row["run"] != run}
        if others:
            text = f"{path} was written by another run ({', '.join(others)}, this is {run})"
            text += ": seed, model, data, schedule, optimizer and rows a step must be the same"
            raise UserError("E310", f"orchestrator.replay: {text}")
        others = {row["ranks"] for row in rows if row.get("ranks", world) != world}
        if others:
            text = f"{path} is of a run on {others} ranks, this one has {world}"
            raise UserError("E310", f"orchestrator.replay: {text}")
        self.script: dict[int, list[dict]] = {}
        for row in rows:
            if row.get("kind") == "start":  # what stands after this id did not survive
                for cursor, done in self.script.items():
                    self.script[cursor] = [r for r in done if r["id"] < row["next_id"]]
            elif row.get("executed"):
                self.script.setdefault(row["cursor"], []).append(row)
        # the cursors at which a snapshot is needed, for a rollback leads there
        self.targets: dict[int, Snapshot | None] = {}
        for done in self.script.values():
            for row in done:
                if row["action"].startswith("rollback"):
                    self.targets[row["args"]["to_cursor"]] = None

    def at(self, cursor: int) -> list[dict]:
        return self.script.get(cursor, [])

    def drops(self, cursor: int) -> tuple[bool, bool]:
        """(was this step dropped?, for an explosion?)"""
        triggers = [row["trigger"] for row in self.at(cursor) if row["action"] == "drop"]
        return bool(triggers), "explosion" in triggers

    def repeat(self, row: dict, orchestrator) -> None:
        """Carry out a decision of the run that is repeated."""
        trainer, control = orchestrator.trainer, orchestrator.control
        action, trigger, args = row["action"], row["trigger"], row.get("args") or {}
        if action.startswith("rollback"):
            self.roll_back(row, args, orchestrator)
        elif action == "stop" and row["level"] == 4:
            orchestrator.decide(Decision(trigger, action, row["reason"], 4, always=True))
            raise UserError("E301", row["reason"])
        elif action.startswith("set "):
            control.set_knob(action.removeprefix("set "), row["value"])
        elif action == RESEED:
            control.recycle(args["layer"])
        elif trigger == "length":
            if action == "stop":
                trainer.progress.stopped_early = True
            else:
                trainer.run = with_length(trainer.cfg, trainer.run, args["max_steps"])
        elif trigger == "oom":
            trainer.set_micro_batch(args["new_size"])
        elif trigger == "user" and action in METHODS and action not in ("save", "stop"):
            method = getattr(trainer, action)
            if isinstance(args, dict):
                method(**args)
            else:
                method(*args)

    def roll_back(self, row: dict, args: dict, orchestrator) -> None:
        # this run's own checkpoint of that step, if it has one
        own = orchestrator.trainer.out / Path(args["from"]).name
        source = self.targets.get(args["to_cursor"])
        if source is None:
            source = str(own) if own.exists() else args["from"]
        d = Decision(row["trigger"], row["action"], row["reason"], row["level"], always=True)
        onset, lr = args["onset"], args["lr_mult"]
        orchestrator.decide(d, do=lambda: orchestrator.go_back(source, onset, lr))
