"""Saving checkpoints while a run trains: copy, write (perhaps in a thread), agree, commit, tidy up.

`checkpoint` knows what a checkpoint is. `Saver` knows when it is written: one at a time, by all
ranks together, and a failure never ends the run.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import torch

from lumen import checkpoint, files
from lumen.backup import Backup
from lumen.errors import UserError


def live_tensors(model, weights: dict, optimizer) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of a run, by name: parameters, buffers (selection bias, loads,
    slots), the optimizer's state. Each is this rank's part of it; no copy is made.

    `weights`: what the optimizer updates, by name.
    """
    own = {name: p.detach() for name, p in weights.items()}
    found = {}
    for name, tensor in model.state_dict().items():
        found[f"model.{name}"] = own.get(name, tensor)
    for name, p in weights.items():
        for key, value in optimizer.state[p].items():
            found[f"optim.{name}.{key}"] = value
    return found


def copy_in(saved: checkpoint.Checkpoint, mine: dict[str, torch.Tensor], parallel) -> None:
    """Fill `mine` from a checkpoint, in place. E305 where its tensors or shapes are others, E303
    where they hold NaN or inf."""
    differ = set(mine) ^ set(saved.tensors)
    if differ:
        raise UserError("E305", f"{saved.path}: tensors differ: {sorted(differ)[:5]}")
    for name, tensor in mine.items():
        for offset, shape, local, _ in parallel.local_shards(name, tensor):
            there = saved.tensors[name]["shape"]
            if list(shape) != there:
                text = f"{name} has shape {there} there, {list(shape)} here"
                raise UserError("E305", f"{saved.path}: {text}")
            part = saved.read(name, offset, local.shape)
            checkpoint.refuse_nonfinite(f"{saved.path}: {name}", part)
            local.copy_(part)


class Writing(threading.Thread):
    """A checkpoint on its way to the disk: this rank's part of it."""

    def __init__(self, final: Path, rank: int, pieces: dict[str, list], state: str | None):
        super().__init__(name="checkpoint", daemon=True)
        self.final = final  # the name it gets once all ranks have written
        self.folder = Path(f"{final}.tmp")
        self.rank = rank
        self.pieces = pieces
        self.state = state  # rank 0: state.json as it was when the save began
        self.error: str | None = None
        # set by Saver.save
        self.iteration = 0  # of the orchestrator, in which the save began
        self.prune = True
        self.began = 0.0
        self.stall = 0.0  # seconds that training has waited for it

    def run(self) -> None:
        try:
            self.error = checkpoint.write(self.folder, self.rank, self.pieces)
        except Exception as error:  # in a thread nobody else would hear of it
            self.error = f"{type(error).__name__}: {error}"
        self.pieces = None  # the copies


class Saver:
    """Writes step_N folders into out_dir; at most one at a time is on its way to the disk.

    Every method is called by all ranks together, `busy` excepted. `report` says what was saved and
    restores what belongs beside a checkpoint; `owner` refreshes rank 0's claim to out_dir.
    """

    def __init__(self, cfg, parallel, owner, report, watch):
        self.cfg, self.parallel = cfg, parallel
        self.owner, self.report, self.watch = owner, report, watch
        self.out = Path(cfg.out_dir)
        self.main = parallel.rank == 0
        # Collectives wait for the slowest rank. That may take long while it is at its disk, or
        # compiles its first step; at other times a rank missing for cfg.comm_timeout is lost.
        self.saving_timeout = max(parallel.STARTUP_TIMEOUT, cfg.comm_timeout)
        self.timeout = self.saving_timeout
        self.writing: Writing | None = None
        self.unsaved = False  # the last save failed: to be tried again
        self.backup = None
        if cfg.backup_dir and self.main:
            self.backup = Backup(cfg, report.say)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self.writing is not None and self.writing.is_alive()

    def set_timeout(self, seconds: int) -> None:
        """From now on collectives wait so long while nothing is saved."""
        self.timeout = seconds
        self.parallel.set_timeout(seconds)

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict | None,
        iteration: int = 0,
        wait: bool = True,
        prune: bool = True,
    ) -> bool:
        """Write step_N. Returns whether it is on the disk or, without `wait`, on its way there.

        tensors: by name, as local_shards takes them; state: what goes into state.json, on rank 0.
        A failure is cleaned up and said; it raises nothing. Without `wait` only a copy is made
        here, a thread writes it, and `finish` ends it. Without `prune` no older checkpoint goes.
        """
        self.finish()
        self.watch.lap("other")
        began = time.perf_counter()
        final = checkpoint.step_dir(self.out, step)
        state = None if state is None else json.dumps(state)
        writing = Writing(final, self.parallel.rank, {}, state)
        if self.main:
            shutil.rmtree(writing.folder, ignore_errors=True)
        # also a barrier: no rank writes into the folder before the old one is gone
        self.parallel.set_timeout(self.saving_timeout)
        writing.pieces = self.own_pieces(tensors, copy=not wait)
        writing.iteration, writing.prune, writing.began = iteration, prune, began
        self.writing = writing
        if wait:
            writing.run()
        else:
            writing.start()
        writing.stall = time.perf_counter() - began
        self.watch.leave_out(writing.stall)
        self.watch.lap("checkpoint")
        if wait:
            return self.finish()
        self.parallel.set_timeout(self.timeout)
        return True

    def own_pieces(self, tensors: dict[str, torch.Tensor], copy: bool) -> dict[str, list]:
        """What this rank writes, as checkpoint.write takes it.

        {tensor name: [(global shape, offset, local tensor), ...]}; `copy`: training will go on.
        """
        pieces = {}
        for name, tensor in tensors.items():
            for offset, shape, local, writes in self.parallel.local_shards(name, tensor):
                if writes:
                    local = local.detach()
                    if copy:
                        local = local.to("cpu", copy=True)
                    pieces.setdefault(name, []).append((shape, offset, local))
        return pieces

    def finish_if_written(self, iteration: int, ranks_writing: float) -> None:
        """Give its name to what no rank is writing any more.

        `ranks_writing`: how many still were in `iteration`. Of a save begun later it says nothing.
        """
        writing = self.writing
        if writing and not ranks_writing and writing.iteration <= iteration:
            self.finish()

    def finish(self) -> bool:
        """Wait for what is being written, agree, give it its name. False if it could not be."""
        if self.writing is None:
            return True
        self.watch.lap("other")
        began = time.perf_counter()
        writing, self.writing = self.writing, None
        self.parallel.set_timeout(self.saving_timeout)
        if writing.is_alive():
            writing.join()
        error = self.commit(writing)
        self.unsaved = bool(self.parallel.all_reduce_max([error is not None])[0])
        self.parallel.set_timeout(self.timeout)
        if self.unsaved:
            self.give_up(writing, error)
        else:
            self.tidy_up(writing)
            now = time.perf_counter()
            text = f"saved      {writing.final}, {now - writing.began:.1f} s"
            if self.cfg.save_async:
                text += f", of which training waited {writing.stall + now - began:.1f} s"
            self.report.say(text)
        self.watch.leave_out(time.perf_counter() - began)
        self.watch.lap("checkpoint")
        return not self.unsaved

    def commit(self, writing: Writing) -> str | None:
        """If all ranks wrote their parts, rank 0 makes a checkpoint of them. Returns the error."""
        error = writing.error
        failed = self.parallel.all_reduce_max([error is not None])[0]
        if self.main and not failed:
            state = json.loads(writing.state)
            try:
                self.owner.keep()
                checkpoint.commit(writing.folder, writing.final, self.parallel.world, state)
            except OSError as failure:
                error = f"{type(failure).__name__}: {failure}"
        return error

    def give_up(self, writing: Writing, error: str | None) -> None:
        """Nothing of it stays; the run goes on and will try again."""
        reasons = [reason for reason in self.parallel.gather(error) if reason]
        if self.main:
            shutil.rmtree(writing.folder, ignore_errors=True)
        text = f"{writing.final} could not be written ({'; '.join(reasons)})"
        self.report.say(f"E307       {text}; the run goes on and tries again")

    def tidy_up(self, writing: Writing) -> None:
        """On rank 0, for a checkpoint that has its name: restore what belongs beside it, delete
        what is not kept any more. What fails here is no failed save: it is done after the next."""
        if not self.main:
            return
        state, report = json.loads(writing.state), self.report
        best = {"step": state["best_step"], "val_loss": state["best_val_loss"]}
        with report.optional(f"beside {writing.final.name}"):
            report.furnish()
        with report.optional("best.json"):
            files.write_json(self.out / "best.json", best)
            if writing.prune:
                # The best step as of this checkpoint: a newer one may not be on the disk yet.
                kept = (self.cfg.save_total_limit, self.cfg.keep_every, state["best_step"])
                checkpoint.prune(self.out, *kept, saved=checkpoint.step_of(writing.final))
        if self.backup:
            with report.optional("backup"):
                self.backup.after_save(writing.final)
