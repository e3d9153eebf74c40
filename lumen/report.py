"""What a run leaves beside its checkpoints: console, metrics.jsonl, charts, status.json, a sample.

`Report` is that console and those files. What they say is made of plain values in lumen/lines.py;
nothing here changes what is trained.

`python -m lumen.report RUN` tells a run's decisions as a story; `--picture` draws training.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lumen import files, follow, owner, story
from lumen import tokenizer as tokenizers
from lumen.config import Config
from lumen.errors import UserError, a_path
from lumen.experts import DEAD
from lumen.files import finite, read_lines
from lumen.launch import Words, command, print_now, speak
from lumen.sampling import Sampling

# the first line of a config.yaml of ours, and the sha256 of what follows it
WRITTEN = "# written by Lumen anew at each start; edited, it is yours and is left alone:"
TOKENIZER_FILES = ("tokenizer.json", "token_bytes.npy")
CHARTS = {"wandb": "wandb", "board": "TensorBoard"}  # attribute of Report: its name


class Report:
    """A run's console, and the files in out_dir that only tell of it.

    Rank 0 (`main`) speaks and writes; on other ranks the same calls do nothing. No failure here
    ends a run: a console that is gone, a full disk, a chart service that is down.
    """

    def __init__(self, out, main: bool = True):
        self.out, self.main = Path(out), main
        self.attempt = 0  # which start of the run this is; 0 until it owns out_dir
        self.config = ""  # config.yaml
        self.tokenizer_dir: Path | None = None  # the data's
        self.log_file = None
        self.early: list[str] = []  # lines that came before train.log was open
        self.bar = None  # tqdm's, on a terminal
        self.wandb = self.wandb_id = None
        self.board = None  # TensorBoard's writer
        self.pictures = find_spec("PIL") is not None  # what both draw with; neither brings it
        self.decided = False  # since wandb last got the table of decisions
        self._unwritten: dict[str, bytes] = {}  # file: lines that it did not take

    # ---- the console

    def say(self, text: str) -> None:
        """One line to the console and to train.log."""
        if not self.main:
            return
        speak(text, tqdm.write if self.bar else print_now)
        self.log(text)

    def log(self, text: str) -> None:
        """One line to train.log alone."""
        if not self.main:
            return
        if not self.log_file:
            self.early.append(text)
        else:
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self.log_file.write(text + "\n")

    @contextlib.contextmanager
    def optional(self, what: str):
        """For what a run can do without: if it fails that is said, and the run goes on."""
        try:
            yield
        except Exception as error:
            text = getattr(error, "text", "") or (str(error).splitlines() or [""])[0]
            self.say(f"note       {what}: {getattr(error, 'code', type(error).__name__)}: {text}")

    def open_bar(self, max_steps: int, step: int) -> None:
        """On a terminal: a bar that `progress` moves."""
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def progress(self, step: int, loss: float | None = None) -> None:
        """So many steps are done; fewer than before after a rollback."""
        if self.bar and loss is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self.bar:
            self.bar.update(step - self.bar.n)

    def close_bar(self) -> None:
        if self.bar:
            self.bar.close()
        self.bar = None

    # ---- files that grow

    def append(self, name: str, row: dict) -> None:
        """One line to an append-only file in out_dir."""
        if not self.main:
            return
        line = json.dumps(finite(row), allow_nan=False).encode() + b"\n"
        lines = self._unwritten.get(name, b"") + line
        with contextlib.suppress(OSError), open(self.out / name, "ab", buffering=0) as f:
            # a full disk takes a part of them, or none: the rest is tried again with the next line
            lines = lines[f.write(lines) :]
        self._unwritten[name] = lines

    def record(self, row: dict) -> None:
        """One line of metrics.jsonl, and the same to wandb and TensorBoard."""
        self.append("metrics.jsonl", row)
        step = row["step"]
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self.wandb:
            # the step is one number among others: after a rollback it comes again, and wandb would
            # refuse that of its own step
            with self.chart("wandb"):
                self.wandb.log(numbers | self.decisions_table() | {"step": step})
        if self.board:
            with self.chart("board"):
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, step)

    def record_bars(self, name: str, values: list, step: int) -> None:
        """A bar for each value, to wandb and TensorBoard."""
        values = np.array([value or 0.0 for value in values])
        places = np.arange(len(values))
        edges = np.arange(len(values) + 1) - 0.5
        if self.wandb:
            import wandb

            with self.chart("wandb"):
                self.wandb.log({name: wandb.Histogram(np_histogram=(values, edges)), "step": step})
        if self.board:
            total, squares = float((values * places).sum()), float((values * places**2).sum())
            about = (0.0, len(values) - 1.0, float(values.sum()), total, squares)
            with self.chart("board"):
                bars = (edges[1:].tolist(), values.tolist())
                self.board.add_histogram_raw(name, *about, *bars, step)

    def record_experts(self, layers: list[list], step: int) -> None:
        """Shares of the choices as a picture, a row a layer, to wandb and TensorBoard."""
        if not self.pictures or not (self.wandb or self.board):
            return
        picture = heat_map(layers)
        if self.wandb:
            import wandb

            with self.chart("wandb"):
                self.wandb.log({"experts/by_layer": wandb.Image(picture), "step": step})
        if self.board:
            with self.chart("board"):
                self.board.add_image("experts/by_layer", picture, step, dataformats="HWC")

    def record_decision(self, row: dict) -> None:
        """One line of decisions.jsonl: a decision, or an outcome; TensorBoard gets it as a text."""
        self.append("decisions.jsonl", row)
        self.decided = True
        if self.board:
            words = (f"    {name}: {value}" for name, value in row.items())  # code, to Markdown
            with self.chart("board"):
                self.board.add_text("decisions", "\n".join(words), row["step"])

    def decisions_table(self) -> dict:
        """All decisions as a table for wandb, if there is a new one: wandb replaces tables whole,
        so it goes with the next row."""
        if not self.decided:
            return {}
        import wandb

        self.decided = False
        with self.optional("the table of decisions"):
            told = story.told(read_lines(self.out / "decisions.jsonl"))[-story.MOST_TOLD :]
            rows = [list(row.values()) for row in told]
            return {"decisions": wandb.Table(columns=list(told[0]), data=rows)} if told else {}
        return {}

    @contextlib.contextmanager
    def chart(self, name: str):
        """wandb or board: one that fails (no room, no network, a bug of theirs) is given up."""
        try:
            yield
        except Exception as error:
            text = f"{CHARTS[name]}: {type(error).__name__}: {error}"
            self.say(f"note       {text}; nothing more is written to it")
            setattr(self, name, None)

    # ---- files that are there

    def open(self, config: str, tokenizer_dir: Path | None) -> None:
        """Rank 0, whose out_dir is now: a number for this attempt, train.log, config.yaml. OSError.

        config: what config.yaml says; tokenizer_dir: where the data's tokenizer lies.
        """
        self.attempt = self.read_status().get("attempt", 0) + 1
        self.config, self.tokenizer_dir = config, tokenizer_dir
        self.log_file = open_log_file(self.out / "train.log")
        early, self.early = self.early, []
        self.log_file.writelines(f"{line}\n" for line in early)
        self.write_config()

    def open_charts(self, cfg: Config) -> None:
        """wandb and TensorBoard, if they are asked for. E003 where their package is missing."""
        if cfg.wandb_project:
            self.wandb = start_wandb(cfg, self.say, self.wandb_id)
            if self.wandb:
                self.wandb_id = self.wandb.id
        if (cfg.wandb_project or cfg.tensorboard) and cfg.model.n_experts and not self.pictures:
            self.say("note       experts are charted as bars only: pip install pillow draws them")
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                text = "tensorboard: true needs its package: pip install tensorboard"
                raise UserError("E003", text) from error
            with self.optional("TensorBoard"):
                self.board = SummaryWriter(str(self.out / "tensorboard"))

    def write_config(self) -> None:
        """config.yaml: started with it the run goes on, or with another out_dir is repeated.

        One that is not what Lumen wrote stays, and ours is resolved.yaml.
        """
        theirs = self.out / "config.yaml"
        ours = [file for file in (theirs, self.out / "resolved.yaml") if may_replace(file)]
        if ours:
            text = f"{WRITTEN} {text_sum(self.config)}\n{self.config}"
            ours[0].write_text(text, encoding="utf-8")
        if theirs not in ours:
            where = ours[0] if ours else "nowhere"
            text = f"{theirs} is not what Lumen wrote and stays; as resolved: {where}"
            self.say(f"note       {text}")

    def copy_tokenizer(self, now: str | None, then: str | None) -> None:
        """tokenizer.json and token_bytes.npy become those of the data that the run trains on `now`.

        One that the steps so far were made with, `then`, is kept under its sum. Both are sha256.
        """
        if not self.tokenizer_dir:
            return
        file = self.out / "tokenizer.json"
        if then and file.exists() and then != now:
            file.rename(tokenizers.former(self.out, then))
        for name in TOKENIZER_FILES:
            data = (self.tokenizer_dir / name).read_bytes()
            if not (self.out / name).exists() or (self.out / name).read_bytes() != data:
                (self.out / name).write_bytes(data)

    def furnish(self) -> None:
        """At a save: what stands beside the checkpoints comes back if somebody deleted it."""
        if not (self.out / "config.yaml").exists():
            self.write_config()
        for name in TOKENIZER_FILES:
            if self.tokenizer_dir and not (self.out / name).exists():
                shutil.copyfile(self.tokenizer_dir / name, self.out / name)
        if not owner.same_file(self.log_file, self.out / "train.log"):
            old, self.log_file = self.log_file, open_log_file(self.out / "train.log")
            with contextlib.suppress(OSError):
                old.close()

    def status(
        self, state: str, step: int, code: int = 0, reason: str = "", anyone: bool = False
    ) -> None:
        """status.json, by rank 0 or (`anyone`) by the one rank that knows."""
        if not self.attempt or not (self.main or anyone):
            return
        row = {"state": state, "code": code, "step": step}
        row |= {"attempt": self.attempt, "reason": reason}
        with contextlib.suppress(OSError):
            files.write_json(self.out / "status.json", row)

    def read_status(self) -> dict:
        return files.read_json(self.out / "status.json")

    def write_suggestion(self, text: str) -> None:
        """suggested.yaml: this run's configuration for next time."""
        with contextlib.suppress(OSError):
            file = self.out / "suggested.yaml"
            file.write_text(text, encoding="utf-8", errors="backslashreplace")

    def print_sample(self, model, parallel, prompt: str, seed: int) -> None:
        """Continue `prompt` with the trained model; by all ranks if forward holds collectives."""
        file, tokenizer, found = self.out / "tokenizer.json", None, None
        with self.optional("sample"):  # by rank 0; what the others do depends on it
            if self.main and file.exists():
                tokenizer = tokenizers.load(str(file))
                ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]
                found = ids, tokenizer.eot_id, tokenizer.n_vocab
        if not parallel.collective_free:
            found = parallel.broadcast(found)
        if found is None:
            self.say("sample     none: bare shards bring no tokenizer")
            return
        ids, end, n_vocab = found
        # where every token takes all ranks, none may stop before another
        stop = (end,) if parallel.collective_free else ()
        choose = Sampling([ids], model.cfg.vocab_size, temperature=0.7, top_p=0.9)
        new = min(160, model.cfg.max_seq_len - len(ids))
        with torch.compiler.set_stance("force_eager"):
            steps = model.generate([ids], new, [seed], stop, n_vocab, choose=choose)
            made = [row[0] for row in steps]
        if not self.main:
            return
        if end in made:
            made = made[: made.index(end)]
        line = "-" * 60
        text = tokenizer.decode(ids + made if prompt else made)
        self.say(f"sample     of the trained model, seed {seed}:\n{line}\n{text}\n{line}")

    def close(self) -> None:
        """Charts and train.log; what was still to be written may fail."""
        with self.chart("wandb"):
            if self.wandb:
                if last := self.decisions_table():
                    self.wandb.log(last)
                self.wandb.finish()
        with self.chart("board"):  # what was still to be written may not fit on the disk
            if self.board:
                self.board.close()
        with contextlib.suppress(OSError):
            if self.log_file:
                self.log_file.close()
        self.wandb = self.board = self.log_file = None


def open_log_file(path):
    """train.log takes any text: of a name that is no UTF-8 it writes what Python made of it."""
    return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)


def text_sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def may_replace(file: Path) -> bool:
    """Whether a config.yaml is as Lumen left it there, or not there."""
    if not file.exists():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    head, _, rest = text.partition("\n")
    if head == f"{WRITTEN} {text_sum(rest)}":
        return True
    # early versions of Lumen wrote no sum on top
    early = "\nnum_epochs: null\nauto_epoch_scaling: false\nchinchilla_multiplier: "
    return head.startswith("data_dir: ") and early in text


WIDTH = 1200  # pixels of a heat map, at most where its experts are fewer


def heat_map(layers: list[list]) -> np.ndarray:
    """(H, W, 3) uint8 of each expert's share of the choices, a row a layer: darker blue for more,
    white for none; red: dead, below a tenth of a fair share; grey: a slot without an expert."""
    shares = np.array([[np.nan if x is None else x for x in layer] for layer in layers], float)
    load = shares * (~np.isnan(shares)).sum(1, keepdims=True)  # 1: a fair share
    dark = np.clip(np.nan_to_num(load) / 2, 0, 1)[..., None]
    cells = 255 - dark * (255 - np.array([8.0, 48.0, 107.0]))
    cells[load < DEAD] = (210, 59, 59)
    cells[np.isnan(load)] = 160
    pixels = max(1, min(12, WIDTH // cells.shape[1]))
    return cells.astype(np.uint8).repeat(pixels, 0).repeat(pixels, 1)


# ---------------------------------------------------------------- wandb


def start_wandb(cfg: Config, say, run_id: str | None = None):
    """A wandb run, or (`run_id`) one that goes on; None when it cannot be at all.

    Offline, with a line, when there is no key or no network. It is told to be silent: its farewell
    alone is forty lines.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # before the import
    try:
        import wandb
    except ImportError as error:
        text = "wandb_project is set but wandb is not installed: pip install wandb"
        raise UserError("E003", text) from error
    name = cfg.wandb_run_name or Path(cfg.out_dir).name
    options = {"project": cfg.wandb_project, "entity": cfg.wandb_entity, "name": name}
    options |= {"id": run_id, "resume": "allow", "dir": cfg.out_dir}
    options |= {"config": dataclasses.asdict(cfg)}
    options |= {"settings": wandb.Settings(init_timeout=30, console="off")}
    mode, run = os.environ.get("WANDB_MODE", "online"), None
    if mode == "online":
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # theirs warns of its own name `api`
                key = wandb.api.api_key
            if not key:
                raise RuntimeError("no key: wandb login stores one")
            run = wandb.init(**options)
        except Exception as error:  # any failure of theirs: the run matters more than its picture
            say(f"note       wandb goes on offline ({error}); wandb sync uploads it later")
            mode = "offline"
    try:
        run = run or wandb.init(**options, mode=mode)
        run.define_metric("*", step_metric="step")
    except Exception as error:
        say(f"note       wandb: {type(error).__name__}: {error}; nothing is written to it")
        return None
    if mode == "disabled":
        say("wandb      disabled by WANDB_MODE")
    elif mode == "online":
        say(f"wandb      run {run.id}, {run.url}")
    else:
        folder = Path(run.dir).parent
        say(f"wandb      run {run.id}, {mode}: wandb sync {folder} uploads it")
    return run


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    about = "What runs decided, as a story; or a page that follows them."
    words = Words(prog="python -m lumen.report", description=about)
    words.add_argument("run", nargs="+", type=a_path, help="the out_dir of a run")
    instead = words.add_mutually_exclusive_group()
    instead.add_argument("--picture", action="store_true", help="write training.png into it")
    instead.add_argument("--serve", action="store_true", help="a page, as long as this runs")
    instead.add_argument("--html", type=a_path, metavar="FILE", help="that page as a file")
    words.add_argument("--port", type=int, default=6006, help="of --serve; 0: any that is free")
    words.add_argument("--host", default="127.0.0.1", help="of --serve (default 127.0.0.1)")
    args = words.parse_args(argv)
    if args.serve:
        return follow.serve(args.run, args.host, args.port)
    if args.html:
        return follow.write(args.run, args.html)
    for run in args.run:
        if args.picture:
            story.picture(run)
        else:
            story.decisions(run)
    return 0


if __name__ == "__main__":
    command(main)
