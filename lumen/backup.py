"""Copies of checkpoints on another disk: `backup_dir`, every `backup_interval_hours`.

A thread of rank 0 copies a step that is finished and clean, holds every byte of the copy against
its manifest, and gives it its name; training does not wait for it. What goes wrong is a note, and
the next save tries again. A run goes on from a copy by `--resume BACKUP_DIR/NAME`.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from lumen import checkpoint
from lumen.errors import UserError
from lumen.files import read_json, sync

KEPT = 2  # newest copies
BESIDE = ("config.yaml", "resolved.yaml", "tokenizer.json", "token_bytes.npy", "best.json")


class Backup:
    """Of one run, on rank 0. say: Report.say."""

    def __init__(self, cfg, say):
        self.out = Path(cfg.out_dir)
        self.folder = Path(cfg.backup_dir) / self.out.resolve().name
        self.interval = cfg.backup_interval_hours * 3600
        self.say = say
        self.thread: threading.Thread | None = None

    def due(self) -> bool:
        """The newest copy says when the last one was made, an earlier start's too."""
        if self.thread and self.thread.is_alive():
            return False
        steps = checkpoint.list_steps(self.folder)
        if not steps:
            return True
        newest = checkpoint.step_dir(self.folder, steps[-1])
        return time.time() - newest.stat().st_mtime >= self.interval

    def after_save(self, step: Path) -> None:
        """`step` has its name now."""
        if self.due():
            self.thread = threading.Thread(target=self.copy, args=(step,), daemon=True)
            self.thread.start()

    def finish(self) -> None:
        """At the end of a run: its last step too, however young the copy before is."""
        if self.thread:
            self.thread.join()
        steps = checkpoint.list_steps(self.out)
        if not steps:
            return
        last = checkpoint.step_dir(self.out, steps[-1])
        there = self.folder / last.name  # perhaps of a run that was overwritten since
        if read_json(there / "manifest.json") != read_json(last / "manifest.json"):
            self.copy(last)

    def copy(self, step: Path) -> None:
        if not read_json(step / "state.json").get("clean", True):
            return
        final, tmp = self.folder / step.name, self.folder / f"{step.name}.tmp"
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.copytree(step, tmp, copy_function=shutil.copyfile)
            wrong = checkpoint.Checkpoint(tmp).verify()
            if wrong:
                raise OSError(f"the copy is damaged: {', '.join(wrong)}")
            for file in tmp.iterdir():
                sync(file)
            for file in filter(Path.exists, (self.out / name for name in BESIDE)):
                shutil.copyfile(file, self.folder / file.name)
            shutil.rmtree(final, ignore_errors=True)
            tmp.rename(final)
            final.touch()  # rename keeps the time at which copying began
            for old in checkpoint.list_steps(self.folder)[:-KEPT]:
                shutil.rmtree(checkpoint.step_dir(self.folder, old), ignore_errors=True)
        except (OSError, shutil.Error, UserError) as error:
            shutil.rmtree(tmp, ignore_errors=True)
            self.say(f"note       no backup of {step}: {error}; the next save tries again")
            return
        self.say(f"backup     {final}")
