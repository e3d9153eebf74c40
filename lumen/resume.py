"""How a run starts: its data, and what it goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from lumen import files
from lumen.config import Config
from lumen.errors import UserError
from lumen.launch import clock, environment


def prepare_first(cfg: Config, dry_run: bool = False) -> None:
    """The `prepare` key: rank 0 makes the data before the process group exists, the others wait for it or its error."""
    if cfg.prepare is None or dry_run:
        return
    out = Path(cfg.prepare["out"])
    failure = Path(f"{out}.error.json")  # beside the folder, which may not exist yet
    keys = (
        "TORCHELASTIC_RUN_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
    )
    this, began, waits = (
        "/".join(os.environ.get(k, "") for k in keys),
        time.time(),
        time.monotonic(),
    )
    if environment("RANK", 0) == 0:
        import prepare_data

        with contextlib.suppress(
            OSError
        ):  # the data may lie finished on a disk that nobody can write to
            failure.unlink()
        try:
            spec = {
                "tokenizer": cfg.prepare.get("tokenizer") or "bpe:8192",
                "val_sources": cfg.prepare.get("val_sources"),
            }
            prepare_data.prepare([str(s) for s in cfg.prepare["sources"]], str(out), **spec)
        except UserError as error:
            if environment("WORLD_SIZE", 1) > 1:
                row = {"launch": this, "time": time.time(), "code": error.code, "text": error.text}
                with contextlib.suppress(OSError):
                    failure.parent.mkdir(parents=True, exist_ok=True)
                    files.write_json(failure, row)
            raise
        return
    told = waits
    while not (out / "manifest.json").exists():
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(failure.read_text())
            if said["launch"] == this and said["time"] > began - 60:
                raise UserError(said["code"], said["text"])
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(
                f"rank {os.environ['RANK']} waits for {out} ({clock(told - waits)})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.2)
