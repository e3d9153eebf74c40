"""Train a language model: `python train.py configs/quickstart.yaml`, or `torchrun --nproc_per_node=N train.py CONFIG`.

Optimizer and schedule, Parallel (all that depends on the number of processes), Trainer, main; in that order. The knobs
are in config.py, what a run says in report.py, what happens when something breaks in orchestrator.py.
`Trainer("configs/x.yaml").fit()` works in a notebook; `python train.py --help` prints every key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from kernels import pick_attention, pick_backend
from lumen import checkpoint, files, forecast, launch, owner, plan
from lumen import machine as machines
from lumen import tokenizer as tokenizers
from lumen.checkpoint import Writing, model_of, refuse_odd
from lumen.config import SHARDING, Config, build_config, help_text, printed, read_config
from lumen.control import ByHand
from lumen.detectors import above_chance
from lumen.errors import UserError
from lumen.experts import Rows, expert_numbers, release_siblings
from lumen.launch import check_launch, clock, command, environment
from lumen.loader import Loader, Source, Sums, val_rows
from lumen.machine import event_now, free_memory, peak_bytes, to_host
from lumen.optim import build_optimizer
from lumen.orchestrate import Orchestrator, read_decisions
from lumen.report import Report, open_log_file, start_wandb
from lumen.resolve import Run, resolved, rise
from lumen.resume import prepare_first
from model import ModelConfig, Transformer
from model_moe import MOD_SUMS, SUMS, draw_dropout, update_balance

# ---------------------------------------------------------------- schedule and optimizer


def lr_at(cfg: Config, run: Run, step: int) -> float:
    """The learning rate of step `step` (from 0) of run.max_steps, before the orchestrator's factor."""
    peak, low, n = cfg.learning_rate, run.min_lr, run.max_steps
    if cfg.lr_schedule == "onecycle":  # Smith 2018: cosine up over 30 %, cosine down over the rest
        up = run.peak_step
        if step < up:
            return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * step / up)) / 2
        return low + (peak - low) * (1 + math.cos(math.pi * (step - up) / max(1, n - up))) / 2
    if step < run.warmup_steps:
        return peak * (step + 1) / run.warmup_steps
    if cfg.lr_schedule == "constant":
        return peak
    if cfg.lr_schedule == "wsd":  # warm-up, stable, decay
        decay = max(1, round(cfg.decay_frac * n))
        return low + (peak - low) * min(1.0, (n - step) / decay)
    done = (step - run.warmup_steps) / max(1, n - run.warmup_steps)
    cosine = cfg.lr_schedule == "cosine"
    share = (1 + math.cos(math.pi * done)) / 2 if cosine else 1 - done
    return low + (peak - low) * share


def mix(seed: int, row: int) -> int:
    """A seed for the micro-step that starts at `row`: no random state ever needs saving."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest(), "little")
        >> 1
    )


def leap(before: dict, cfg: Config, run: Run, step: int) -> str | None:
    """A resumed run whose learning rate would leap: the rate of `step` by the configuration `before`, as the
    checkpoint has it resolved, against today's, and what makes the difference; None where it does not."""
    now = resolved(cfg, run)
    then = types.SimpleNamespace(**now | before)
    then.peak_step = rise(then.lr_schedule, then.max_steps, then.warmup_steps)
    was = lr_at(then, then, max(0, min(step, then.max_steps - 1)))
    becomes = lr_at(cfg, run, step)
    if step >= run.max_steps or (becomes <= 1.5 * was and was <= 1.5 * becomes):
        return None
    why = []
    for key in (
        "learning_rate",
        "min_lr",
        "lr_schedule",
        "max_steps",
        "warmup_steps",
        "decay_frac",
    ):
        if getattr(then, key) != now[key]:
            why.append(f"{key} {getattr(then, key)} -> {now[key]}")
    text = (
        f"the learning rate leaps from {was:.2e} to {becomes:.2e} at step {step} ({', '.join(why)})"
    )
    text += "; lr_schedule: wsd can be made longer without that, init_from starts a new schedule"
    return text


# ---------------------------------------------------------------- parallel


def set_timeouts(seconds: int) -> None:
    """How long a collective of any group of processes waits from now on. The list of groups is private to torch (the
    same in 2.11 to 2.14); where it is gone, only the group of all processes changes: meshes keep the longest wait."""
    c10d = dist.distributed_c10d
    set_timeout = (
        getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
    )  # public since torch 2.14
    world = getattr(c10d, "_world", None)
    for group in [None] if world is None else list(world.pg_map):
        set_timeout(timedelta(seconds=seconds), group)


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed: NCCL has a type for that, gloo only words."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


class Parallel(Rows):
    """All that changes with the number of processes. This one replicates the model and reduces gradients itself.

    Forward and backward hold no collective. Gradients are then summed in chunks of fixed size in parameter order, and
    statistics in a collective of their own, so a resumed run adds in the same order as one never stopped.
    """

    CHUNK = 1 << 22  # numbers per collective
    STARTUP_TIMEOUT = 1800  # seconds that ranks wait for one another until all have taken a step: compilers, cold disks
    collective_free = True  # forward and backward hold no collective: a rank may leave a step, or be the only one to sample

    def __init__(self, cfg: Config):
        self.rank, self.world = environment("RANK", 0), environment("WORLD_SIZE", 1)
        self.device = machines.detect(
            cfg.device, "fp32", False, environment("LOCAL_RANK", 0)
        ).device
        self.layout = plan.Layout(self.world, cuda=self.device.type == "cuda")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if cfg.deterministic is True:  # must be set before the first matrix product
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.world > 1 and not dist.is_initialized():
            # objects and flags travel over gloo, so that asking a question never waits for the GPU
            backend, store = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", None
            if (
                os.environ.get("GROUP_WORLD_SIZE") == "1"
            ):  # torchrun keeps its store when it restarts all ranks here:
                store, *_ = next(
                    dist.rendezvous("env://")
                )  # they would call the dead at their addresses, and hang
                store = dist.PrefixStore(
                    f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
                )
            limit = timedelta(seconds=max(self.STARTUP_TIMEOUT, cfg.comm_timeout))
            try:
                dist.init_process_group(backend, None, limit, self.world, self.rank, store)
            except Exception as error:
                if not lost_peer(error):
                    raise
                raise UserError("E601", f"at the start: {str(error).splitlines()[0]}") from error
        self.buffer = None

    def rows(self) -> tuple[int, int]:
        """(index, count): which reader of the data this rank is."""
        return self.rank, self.world

    def build(self, cfg: Config, precision: str, fill: bool = True) -> Transformer:
        """The model on this rank's device; `precision` as resolved; with its initial weights, or (not `fill`) for others to be copied in."""
        with torch.device(self.device):
            model = Transformer(cfg.model)
        if fill:
            model.init_weights(cfg.seed)
        return model

    def weights(self, model) -> dict[str, torch.Tensor]:
        """What the optimizer updates, by the parameters' names: plain tensors, whose .grad reduce() sets."""
        return dict(model.named_parameters())

    def microstep(self, model, last: bool):
        """Context of one forward and backward pass; `last` of its step."""
        return contextlib.nullcontext()

    def reduce(self, model, stats: torch.Tensor) -> torch.Tensor:
        """Sum gradients in place and `stats` over all ranks; returns the summed stats."""
        for p in model.parameters():
            if p.grad is None:  # a rank that could not read its rows still takes part
                p.grad = torch.zeros_like(p)
        if self.world == 1:
            return stats
        dist.all_reduce(stats)
        if self.buffer is None:
            size = min(self.CHUNK, sum(p.numel() for p in model.parameters()))
            self.buffer = torch.empty(size, device=self.device)
        pieces, used = [], 0

        def flush():
            for at, piece in pieces:
                self.buffer[at : at + len(piece)] = piece
            dist.all_reduce(self.buffer[:used])
            for at, piece in pieces:
                piece.copy_(self.buffer[at : at + len(piece)])
            pieces.clear()

        for p in model.parameters():
            for piece in p.grad.view(-1).split(len(self.buffer)):
                while len(piece):
                    room = min(len(self.buffer) - used, len(piece))
                    pieces.append((used, piece[:room]))
                    used, piece = used + room, piece[room:]
                    if used == len(self.buffer):
                        flush()
                        used = 0
        if used:
            flush()
        return stats

    def finite(self, grad: torch.Tensor) -> bool:
        return bool(torch.isfinite(grad).all())

    def grad_norm(self, model) -> torch.Tensor:
        """2-norm of the reduced gradient, a 0-d tensor."""
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

    def checksum(self, model) -> torch.Tensor:
        """Of the bits of the weights, which every rank should hold alike: 0-d, a whole number below 2^20; no sync."""
        words = torch.stack([p.detach().view(torch.int32).sum() for p in model.parameters()])
        return words.sum() % 1048573  # a prime: of a power of two the upper bits would not be seen

    def all_reduce_max(self, flags: list[int]) -> list[int]:
        """The maximum of each flag over all ranks."""
        if self.world == 1:
            return flags
        tensor = torch.tensor(flags)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def set_timeout(self, seconds: int) -> None:
        """All ranks have taken a step: from now on a collective in which one is missing for so long fails in those that
        wait. Collectives of gloo raise: E601, exit code 75. NCCL's watchdog aborts the process instead (SIGABRT, so
        status.json still says `running`); torchrun and slurm/train.sbatch start both again. NCCL's part has never run.
        """
        if self.world > 1:
            self.all_reduce_max([0])  # the slowest has finished what it needed the long limit for
            set_timeouts(seconds)

    def gather(self, obj) -> list:
        """What each rank says, in order of rank."""
        if self.world == 1:
            return [obj]
        rows = [None] * self.world
        dist.all_gather_object(rows, obj)
        return rows

    def broadcast(self, obj):
        """Rank 0's object on every rank."""
        if self.world == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def run_or_raise_on_all(self, do, *args):
        """do(*args) on every rank; a UserError on any of them is raised on all of them."""
        result = error = None
        try:
            result = do(*args)
        except UserError as e:
            error = e
        for rank, e in enumerate(self.gather(error)):
            if e is not None:
                raise UserError(e.code, e.text if rank == 0 else f"rank {rank}: {e.text}")
        return result

    def local_shards(self, name: str, tensor: torch.Tensor) -> list[tuple]:
        """[(offset, global shape, local tensor, writes)]: every region of `tensor` that this rank holds."""
        return [((0,) * tensor.dim(), tuple(tensor.shape), tensor, self.rank == 0)]

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------- trainer

# what is summed over ranks in each step
STATS = ("ce", "z", "count", "unread", "oom", "stop", "save", "control", "sum", "square", "writing")
STAT = {name: i for i, name in enumerate(STATS)}
LAPS = (
    "data",
    "compute",
    "communication",
    "update",
    "evaluation",
    "checkpoint",
    "other",
)  # what a run's time goes to
NUMBERS = "tokens val_loss best_val_loss best_step evaluations_since_best evaluated_at stopped_early gains rises "
NUMBERS = f"{NUMBERS} best_parts measured_on".split()
RELEASE_EVERY = (
    50  # steps between looks at whether the halves of split experts have parted: a host sync
)
OURS = "metrics.jsonl decisions.jsonl control.jsonl oom_hint.json suggested.yaml best.json status.json train.log".split()
OURS += ["tokenizer.json", "token_bytes.npy", "resumed.json", "verified.jsonl", "training.png"]
WRITTEN = "# written by Lumen anew at each start; edited, it is yours and is left alone:"  # and the rest's sha256


class Trainer(ByHand, Report):
    """One run: cfg, model, optimizer, loader, orchestrator, parallel, step, cursor; `fit()` is the loop.

    `config`: a path, a preset's name, a list of command-line words, or a dict of keys.
    """

    def __init__(self, config, parallel=Parallel, dry_run: dict | None = None):
        if isinstance(config, dict):
            self.written, notes = json.loads(json.dumps(config, default=str)), []
            self.cfg = build_config(self.written, lambda key: "config", notes)
            self.cfg.out_dir = self.cfg.out_dir or "out/run"
        else:
            words = config if isinstance(config, list) else [str(config)]
            self.cfg, self.written, notes, _ = read_config(words)
        self.started = time.monotonic()
        self.bar, self.log_file, self.wandb, self.board, self.drawing = None, None, None, None, None
        self.wandb_id = None
        self.step = self.cursor = self.tokens = 0
        self.val_loss, self.best_val_loss, self.best_step, self.evaluations_since_best = (
            None,
            None,
            None,
            0,
        )
        self.evaluated_at, self.stopped_early, self.unsaved, self.data_error = (
            None,
            False,
            False,
            None,
        )
        self.stop_signal = self.save_signal = self.left = 0
        self.writing: Writing | None = None
        self.unwritten: dict[str, bytes] = {}  # file: lines that it did not take
        self.pending, self.model, self.scale, self.seen = None, None, None, {}
        self.forecast, self.outlook, self.val_parts, self.best_parts = (
            forecast.Forecast(),
            {},
            [],
            [],
        )
        self.measured_on = None  # which validation set val_loss and what follows from it are of
        self.changes, self.origin = (
            [],
            None,
        )  # what is not as in the checkpoint; where `resume: PATH` points
        self.tokenizer_sum = self.tokenizer_then = None  # of the data; of the checkpoint: sha256
        self.gains, self.rises = (
            [],
            [],
        )  # of successive checks and evaluations: see forecast.justified_stop
        self.spent, self.lapped = dict.fromkeys(LAPS, 0.0), time.perf_counter()
        self.marks, self.on_device = [], {}  # see mark()
        self.out, self.attempt = Path(self.cfg.out_dir), 0

        self.dry_run = dry_run
        if (
            dry_run and dry_run["hardware"] != "measured"
        ):  # what this machine cannot do does not matter
            low = "mixed_fp16" if dry_run["hardware"].lower() in machines.NO_BF16 else "mixed_bf16"
            precision = (
                "fp32" if self.cfg.precision == "fp32" or dry_run["hardware"] == "cpu" else low
            )
            dry_run["precision"], self.cfg.precision, self.cfg.device = precision, "fp32", "cpu"
            self.cfg.compile_model, self.cfg.expert_backend = False, "slices"
        if not dry_run:
            self.check_paths()
        prepare_first(self.cfg, bool(dry_run))
        self.parallel = parallel(self.cfg)
        self.runs_ahead = self.parallel.device.type == "cuda"  # the host, of what it has queued
        self.main = self.parallel.rank == 0  # this rank speaks and writes
        self.longest_timeout = self.timeout = max(
            self.parallel.STARTUP_TIMEOUT, self.cfg.comm_timeout
        )  # seconds ranks wait for others
        if self.parallel.collective_free:  # zero_stage 0 is what this is
            given = [
                key
                for key in SHARDING
                if key in self.written and (key, self.cfg.zero_stage) != ("zero_stage", 0)
            ]
            notes += (
                [f"{', '.join(given)}: takes effect under train_fsdp.py, on several ranks"]
                if given
                else []
            )
        self.owner = owner.Owner(self.out, self.main)
        try:
            self.begin(notes)
        except BaseException:
            self.owner.release()
            raise

    def begin(self, notes: list[str]) -> None:
        """All that may refuse this start, and what it needs to train; from claim_out_dir on out_dir is its own."""
        dry_run = self.dry_run
        self.parallel.run_or_raise_on_all(self.open_data, bool(dry_run))
        saved = None if dry_run else self.parallel.run_or_raise_on_all(self.claim_out_dir)
        self.resolve(saved)
        weights = (
            self.find_weights() if saved is None and self.cfg.init_from and not dry_run else None
        )
        self.start_block(notes)
        if dry_run:
            return
        replay = self.cfg.orchestrator.replay  # read before out_dir is emptied, it may lie there
        replay = self.parallel.run_or_raise_on_all(read_decisions, replay) if replay else None
        self.parallel.run_or_raise_on_all(self.own_out_dir)
        self.parallel.run_or_raise_on_all(self.adopt, saved)
        self.build(saved, weights)
        self.started_at = self.step
        if saved is not None:
            self.find_best()
        same_data = saved is not None and saved.state["fingerprints"] == self.fingerprints
        if same_data and "forecast" in saved.state:
            self.forecast.load_state_dict(saved.state["forecast"])
        self.orchestrator = self.parallel.run_or_raise_on_all(Orchestrator, self, replay)
        if saved is not None and "orchestrator" in saved.state:
            self.orchestrator.load(
                saved.state["orchestrator"], not same_data, self.origin is not None
            )
        self.open_log()
        self.restart_clock()

    # ---- setting up

    def open_data(self, dry_run: bool) -> None:
        """Sources, their validation splits, tokenizer and vocabulary; every mismatch is refused here."""
        cfg, T = self.cfg, self.cfg.model.max_seq_len
        if dry_run and cfg.prepare and not (Path(cfg.data_dir) / "manifest.json").exists():
            spec = (
                cfg.prepare.get("tokenizer") or "bpe:8192"
            )  # not prepared yet, and a dry run does not start it
            n_vocab = int(spec[4:]) if spec.startswith("bpe:") else tokenizers.load(spec).n_vocab
            cfg.model.vocab_size = cfg.model.vocab_size or n_vocab
            self.weights, self.sources, self.val_sources, self.fingerprints = (
                {"data": 1.0},
                {},
                {},
                {},
            )
            return
        folders = {"data": {"dir": cfg.data_dir}} if cfg.data_dir else cfg.data["sources"]
        self.weights = {name: float(spec.get("weight", 1.0)) for name, spec in folders.items()}
        self.sources = {
            n: Source(str(s["dir"]), "train", T, cfg.val_fraction) for n, s in folders.items()
        }
        val = {n: Source(str(s["dir"]), "val", T, cfg.val_fraction) for n, s in folders.items()}
        self.val_sources = {n: s for n, s in val.items() if s.windows and cfg.val_fraction > 0}
        made = next((s for s in self.sources.values() if s.manifest), None)
        self.token_bytes, self.tokenizer_dir = None, Path(made.path) if made else None
        if made:
            self.tokenizer_sum = made.manifest["tokenizer"]["sha256"]
            used = {
                s.manifest["tokenizer"]["sha256"]: n for n, s in self.sources.items() if s.manifest
            }
            for name in used.values():
                if len(used) > 1 and not self.same_tokenizer(Path(self.sources[name].path)):
                    raise UserError(
                        "E113",
                        f"data.sources {' and '.join(used.values())} have different tokenizers",
                    )
            cfg.model.vocab_size = cfg.model.vocab_size or made.manifest["tokenizer"]["n_vocab"]
            self.token_bytes = np.load(
                Path(made.path) / "token_bytes.npy", allow_pickle=False
            ).astype(np.int64)
        if not cfg.model.vocab_size:
            raise UserError(
                "E113",
                "model.vocab_size must be set: bare shards do not say which tokenizer made them",
            )
        for source in (*self.sources.values(), *self.val_sources.values()):
            source.check_vocab(cfg.model.vocab_size)
        self.fingerprints = {n: s.fingerprint for n, s in self.sources.items()}
        if cfg.early_stopping_patience and not self.val_sources:
            text = f"early_stopping_patience: {cfg.early_stopping_patience} stops by evaluations"
            raise UserError("E114", f"{text}; {self.no_validation()}")

    def same_tokenizer(self, other: Path) -> bool:
        """Whether the tokenizer in that file or folder makes the ids that the data's makes."""
        return tokenizers.load(str(other)).same_ids(tokenizers.load(str(self.tokenizer_dir)))

    def check_tokenizer(self, what: str, file: Path | None, sha256: str | None) -> None:
        """E113 where `what`, weights, were made with another tokenizer than the data. `file`: theirs; `sha256`: its sum
        as a manifest or checkpoint has it; either may be unknown."""
        mine, said = self.tokenizer_sum, None
        if mine and sha256 == mine:
            return
        try:
            if mine is None or not (file or sha256):
                side = what if mine else "the data"
                said = f"{what}: made with the tokenizer of the data? {side} cannot say"
            elif file and self.same_tokenizer(file):
                return
            sha256 = sha256 or (file and mine and tokenizers.load(str(file)).sha256)
        except UserError as error:
            said = (
                f"{what}: made with the tokenizer of the data? Its own cannot be read: {error.text}"
            )
        if said is None:
            said = f"{what}: made with another tokenizer (sha256 {sha256}) than the data (sha256 {mine}),"
            said += " so that an id means another text"
            if not self.cfg.allow_tokenizer_change:
                fix = f"prepare the data with --tokenizer {file or 'of that run'}"
                raise UserError(
                    "E113", f"{said}; {fix}, or allow_tokenizer_change: true if it is meant"
                )
        self.changes += [said] if said not in self.changes else []

    def check_paths(self) -> None:
        """E304 at once, before data are prepared, where `resume` or `init_from` name what is not there. Neither is
        looked at again once out_dir has steps of its own to go on from."""
        cfg, steps = self.cfg, checkpoint.list_steps(self.out)
        anew = (
            cfg.resume == "none"
            and cfg.overwrite
            and not owner.again(files.read(self.out / owner.Owner.NAME))
        )
        if origin := self.find_origin():
            try:
                checkpoint.folders(origin)
            except UserError as error:
                raise UserError(error.code, f"resume: {error.text}") from error
        if cfg.init_from and not origin and (anew or not steps):
            path = Path(cfg.init_from)
            if anew and self.out.resolve() in (path.resolve(), *path.resolve().parents):
                raise UserError(
                    "E300",
                    f"init_from {path} lies in {self.out}, which overwrite: true would delete",
                )
            try:
                (path / "config.json").is_file() or checkpoint.folders(path)
            except UserError as error:
                raise UserError(error.code, f"init_from: {error.text}") from error

    def find_origin(self) -> Path | None:
        """What `resume: PATH` goes on from; None without a path, or where out_dir already holds what came from it: then
        the newest there wins, else each restart would begin there again."""
        if self.cfg.resume in ("auto", "none"):
            return None
        path, steps = Path(self.cfg.resume).resolve(), checkpoint.list_steps(self.out)
        came = None
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            came = json.loads((self.out / "resumed.json").read_text())["from"]
        if path == self.out.resolve() or (steps and came == str(path)):
            return None
        return path

    def claim_out_dir(self) -> checkpoint.Checkpoint | None:
        """Rank 0 owns out_dir from here on, and picks the checkpoint to go on from; all ranks open it; None: a fresh
        start. Changes no run."""
        cfg, found, text, origin = self.cfg, None, None, None
        self.model_written, self.damaged, self.anew = (
            dataclasses.asdict(cfg.model),
            [],
            cfg.resume == "none",
        )
        if self.main:
            try:
                self.owner.take(self.say)
                if self.anew and owner.again(self.owner.found):
                    self.anew = False
                    self.say(
                        "note       resume: none speaks of the launch's first start; this restart goes on"
                    )
                checkpoint.clean_up(self.out)
                steps = checkpoint.list_steps(self.out)
                if self.anew and (steps or (self.out / "metrics.jsonl").exists()):
                    if not cfg.overwrite:
                        raise UserError(
                            "E300", f"{self.out} holds a run at step {max(steps, default=0)}"
                        )
                else:
                    found = [str(checkpoint.step_dir(self.out, step)) for step in reversed(steps)]
                    if origin := self.find_origin():
                        if steps and origin.parent != self.out.resolve():
                            text = f"{self.out} holds a run at step {max(steps)}, and resume: {origin} is of another"
                            raise UserError("E300", f"{text}: give a new out_dir")
                        found = [str(folder) for folder in checkpoint.folders(origin)]
                    for (
                        folder
                    ) in found:  # before minutes are spent on every byte of another model's run
                        try:
                            newest = checkpoint.Checkpoint(folder)
                        except UserError:
                            continue
                        self.same_run(newest)
                        break
            except UserError as error:
                text = error
        folders, self.origin, self.anew, error = self.parallel.broadcast(
            (found, origin, self.anew, text)
        )
        if error:
            raise error
        found = self.newest_whole([Path(folder) for folder in folders]) if folders else None
        if folders and found is None:
            text = f"{self.origin or self.out} holds no whole checkpoint, see `python -m lumen.checkpoint {self.out}`"
            raise UserError("E303", f"{text}; another out_dir starts anew")
        saved = checkpoint.Checkpoint(found) if found else None
        if saved:
            self.same_run(saved)
            self.tokenizer_then = saved.state.get("tokenizer")
        return saved

    def same_run(self, saved: checkpoint.Checkpoint) -> None:
        """E300, E113, E305, E306, E118: this is not a checkpoint to go on from with this model and these data."""
        if "imported" in saved.state:
            raise UserError(
                "E300",
                f"{self.out} holds an imported model: give it as init_from, with another out_dir",
            )
        if saved.state["fingerprints"] != self.fingerprints:
            then = saved.state.get("tokenizer")
            self.check_tokenizer(str(saved.path), tokenizers.of_run(saved.path.parent, then), then)
        now, model = self.model_written, dataclasses.asdict(model_of(saved, "model_written"))
        here = {
            k: v for k, v in now.items() if k != "init_std"
        }  # of what has long been changed by training
        differ = [
            f"{k}: {model.get(k)} there, {v} here" for k, v in here.items() if model.get(k) != v
        ]
        if differ:
            fix = f"{self.out} holds a run of another model: give another --out_dir, or write model: as it was"
            raise UserError("E305", f"{saved.path}: {'; '.join(differ)}. {fix}")
        if saved.state["fingerprints"] != self.fingerprints and not self.cfg.allow_data_change:
            was = saved.state["fingerprints"]
            names = [
                n for n in {**was, **self.fingerprints} if was.get(n) != self.fingerprints.get(n)
            ]
            text = f"{saved.path} was trained on other data than {', '.join(names)} holds now"
            raise UserError("E118", f"{text}; data_dir was {saved.state['config'].get('data_dir')}")

    def newest_whole(self, folders: list[Path]) -> str | None:
        """The first of these checkpoints in which every byte is as it was written, None without one; each rank reads
        its share of the files. E306 where one is newer than this program, E108 where we may not read it."""
        par = self.parallel
        for folder in folders:
            try:
                mine = checkpoint.Checkpoint(folder).verify(par.rank, par.world), None
            except UserError as error:
                mine = [error.text], error.code if checkpoint.final(error) else None
            rows = par.gather(mine)
            wrong = list(dict.fromkeys(text for texts, _ in rows for text in texts))
            if not wrong:
                return str(folder)
            if code := next((code for _, code in rows if code), None):
                raise UserError(code, wrong[0])
            self.say(
                f"{'E108' if checkpoint.unreadable(wrong) else 'E303'}: passed over {folder}: {'; '.join(wrong)}"
            )
            if folder.parent.resolve() == self.out.resolve() and not checkpoint.unreadable(wrong):
                self.damaged.append(folder)
        return None

    def set_damaged_aside(self) -> None:
        """Rank 0, once it may change the run: what was found damaged counts nowhere any more."""
        for folder in self.damaged if self.main else ():
            try:
                self.say(
                    f"note       {folder} is now {checkpoint.set_damaged_aside(folder).name}: it is damaged"
                )
            except OSError as error:  # it stays where it is: what is saved now is kept all the same
                self.say(f"note       {folder} is damaged and cannot be renamed: {error.strerror}")
        self.damaged = []

    def resolve(self, saved: checkpoint.Checkpoint | None) -> None:
        """Turn auto and null into values: the checkpoint's where the YAML still says the same, else rank 0's choice."""
        cfg, par, T = self.cfg, self.parallel, self.cfg.model.max_seq_len
        before = saved.state if saved else {"written": {}, "run": {}}
        self.hint, self.measure_memory = None, False

        def kept(name, *keys):
            same = all(self.written.get(k) == before["written"].get(k) for k in keys or (name,))
            return before["run"].get(name) if same else None

        def kept_here(
            name, *keys
        ):  # what suited a CPU does not suit a GPU; older checkpoints do not say
            here = par.device.type
            return kept(name, *keys) if before["run"].get("device", here) == here else None

        # batch: rows per step stay what they were, on any world size
        rank_count, rows = (
            par.rows()[1],
            kept("rows_per_step", "batch_size", "gradient_accumulation_steps", "batch_tokens"),
        )
        if rows is None and cfg.batch_tokens:
            unit = T * rank_count
            if cfg.batch_tokens % unit:
                near = max(1, round(cfg.batch_tokens / unit)) * unit
                text = f"batch_tokens: {cfg.batch_tokens} is not a multiple of processes x max_seq_len, {rank_count} x {T}"
                raise UserError("E002", f"{text}; the nearest that is: {near}")
            rows = cfg.batch_tokens // T
            fixed = (
                rows
                if cfg.batch_size == "auto"
                else cfg.batch_size * cfg.gradient_accumulation_steps * rank_count
            )
            if "gradient_accumulation_steps" in self.written and fixed != rows:
                raise UserError(
                    "E002",
                    f"batch_tokens is {rows} rows, batch_size x accumulation x processes {fixed}: drop one",
                )
        elif rows is None:
            rows = cfg.batch_size * cfg.gradient_accumulation_steps * rank_count
        kept_size = kept_here("micro_batch", "batch_size", "batch_tokens")
        cfg.batch_size = par.broadcast(
            par.run_or_raise_on_all(self.micro_batch, rows // rank_count, kept_size)
        )
        micro = next(
            (m for m in range(min(cfg.batch_size, rows), 0, -1) if rows % (m * rank_count) == 0),
            None,
        )
        if micro is None:
            can = [w for w in range(1, 2 * rank_count + 2) if rows % w == 0]
            near = sorted(can, key=lambda w: abs(w - rank_count))[:2]
            text = f"{rows} rows per step cannot be shared by {rank_count} processes"
            raise UserError("E600", f"{text}; can: {sorted(near)}")
        if micro != cfg.batch_size and self.written.get("batch_size", "auto") != "auto":
            self.changes.append(
                f"batch_size: {cfg.batch_size} does not fit {rows} rows on {rank_count} ranks: {micro}"
            )
        cfg.batch_size, cfg.gradient_accumulation_steps = micro, rows // (micro * rank_count)

        # length
        windows = sum(s.windows for s in self.sources.values())
        try:
            self.counted = plan.on_meta(cfg.model)
        except ValueError as error:
            raise UserError("E002", str(error)) from error
        self.flops_per_token = self.counted.flops_per_token()
        whole = dataclasses.replace(cfg.model, mod_capacity=1.0, mod_layers=None)
        self.flops_undiminished = plan.on_meta(whole).flops_per_token()  # without MoD
        # what works on a token: MoE's active parameters, MoD's weighted by its FLOPs
        self.n_working = round(
            self.counted.n_params()["active"] * self.flops_per_token / self.flops_undiminished
        )
        keys = ("auto_epoch_scaling", "chinchilla_multiplier", "min_auto_epochs", "max_auto_epochs")
        steps = kept("max_steps", "max_steps", "num_epochs", *keys)
        cfg.max_steps = cfg.max_steps if steps is None else steps
        if cfg.max_steps is None and cfg.auto_epoch_scaling and windows:
            limits = (cfg.chinchilla_multiplier, cfg.min_auto_epochs, cfg.max_auto_epochs)
            cfg.max_steps, why = plan.auto_steps(self.n_working, windows * T, rows * T, *limits)
            self.changes.append(why)
        if cfg.max_steps is None:
            cfg.max_steps = (
                int(windows * (1.0 if cfg.num_epochs is None else cfg.num_epochs)) // rows
            )
        asked = "max_steps" in self.written or cfg.num_epochs == 0  # for no step at all
        if cfg.max_steps < 1 and not asked and self.sources:
            raise UserError(
                "E114",
                f"{windows} rows of {T} tokens are less than one step of {rows}; lower the batch",
            )
        cfg.min_lr = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
        warmup = min(2000, cfg.max_steps // 20) if cfg.warmup_steps is None else cfg.warmup_steps
        cfg.warmup_steps = round(warmup * cfg.max_steps) if 0 < warmup < 1 else int(warmup)

        # machine: what rank 0 finds, kept on resume
        precision = kept_here("precision")
        machine = machines.detect(
            cfg.device, cfg.precision, cfg.compile_model, environment("LOCAL_RANK", 0)
        )
        if precision not in (None, machine.precision) and cfg.precision == "auto":
            with contextlib.suppress(
                UserError
            ):  # the hardware of today cannot do it: today's choice, said
                machine = machines.detect(
                    cfg.device, precision, cfg.compile_model, environment("LOCAL_RANK", 0)
                )
        cfg.precision = par.broadcast(machine.precision)
        self.machine = dataclasses.replace(machine, precision=cfg.precision)
        self.misfit = par.run_or_raise_on_all(self.check_memory, rows)
        self.peak = par.broadcast(machines.peak_flops(self.machine))
        compiled = kept_here("compile_model")
        if compiled is None or machine.compile is False:  # there may be no compiler any more
            seconds = self.flops_per_token * rows * T * cfg.max_steps / (self.peak * rank_count)
            compiled = seconds > 600 if machine.compile is None else machine.compile
        cfg.compile_model = par.broadcast(compiled)
        try:
            choice = kept_here("attention") or cfg.attention
            backend, why = pick_attention(choice, cfg.model, par.device, self.machine.compute_dtype)
        except ValueError as error:
            raise UserError("E002", str(error)) from error
        cfg.attention, attention_why = par.broadcast((backend, why))
        experts_why = ""
        if cfg.model.n_experts:
            cfg.expert_backend, experts_why = par.broadcast(
                self.pick_experts(kept_here("expert_backend"))
            )
        deterministic = kept_here("deterministic")
        if deterministic is None:
            deterministic = (
                cfg.deterministic if cfg.deterministic != "auto" else par.device.type == "cpu"
            )
        cfg.deterministic = par.broadcast(deterministic)
        self.versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        self.versions |= {"device": self.machine.name, "world": par.world}
        was = before.get("versions", {})
        here = self.versions | {"micro_batch": micro}
        if saved:
            was = was | {"micro_batch": before["run"]["micro_batch"]}
        differ = [f"{k} {was[k]} -> {v}" for k, v in here.items() if k in was and was[k] != v]
        if differ and cfg.deterministic:
            self.changes.append(
                f"equal bits to the run so far cannot be promised: {', '.join(differ)}"
            )

        # the order of data: segments of weights over the cursor, kept on resume as far as they lie in the past
        weights = self.weights
        segments, start = [], 0
        for phase in (cfg.data or {}).get("phases") or [{"weights": weights}]:
            segments.append([start * rows, phase["weights"]])
            until = phase.get("until", cfg.max_steps)
            start = round(until * cfg.max_steps) if until <= 1 else int(until)
        if saved and before["run"]["segments"] != segments:
            self.cursor = before["cursor"]
            past = [
                s
                for s in before["run"]["segments"]
                if s[0] < self.cursor and set(s[1]) <= set(weights)
            ]
            future = [s for s in segments if s[0] > self.cursor]
            current = next(s[1] for s in reversed(segments) if s[0] <= self.cursor)
            if not past:
                past = [[0, current]]
            elif past[-1][1] != current:
                past.append([self.cursor, current])
            segments = past + future
        self.run = Run(
            rows_per_step=rows,
            micro_batch=micro,
            accumulation=cfg.gradient_accumulation_steps,
            max_steps=cfg.max_steps,
            min_lr=cfg.min_lr,
            warmup_steps=cfg.warmup_steps,
            peak_step=rise(cfg.lr_schedule, cfg.max_steps, cfg.warmup_steps),
            device=par.device.type,
            precision=cfg.precision,
            compile_model=cfg.compile_model,
            attention=cfg.attention,
            attention_why=attention_why,
            expert_backend=cfg.expert_backend,
            experts_why=experts_why,
            deterministic=cfg.deterministic,
            segments=segments,
        )
        if saved:
            if said := leap(before["config"], cfg, self.run, before["step"]):
                self.changes.append(said)
            self.compare(before["config"] | {"batch_tokens": before["run"]["rows_per_step"] * T})

    def compare(self, before: dict) -> None:
        """A line for each knob that is not what the checkpoint's run had, both as resolved. `before`: its config."""
        now = resolved(self.cfg, self.run)
        now["batch_tokens"] = self.run.rows_per_step * self.cfg.model.max_seq_len
        apart = {
            "model",
            "resume",
            "overwrite",
            "init_from",
            "allow_data_change",
            "allow_tokenizer_change",
        }
        for key, value in now.items():
            then = before.get(key, value)  # a key that is newer than the checkpoint
            pairs = [(key, then, value)]
            if key == "orchestrator":
                pairs = [(f"{key}.{k}", then.get(k, v), v) for k, v in value.items()]
            if key not in apart:
                self.changes += [
                    f"{k}: {a} in the checkpoint, {b} now" for k, a, b in pairs if a != b
                ]

    def micro_batch(self, rows: int, kept: int | None) -> int:
        """Rows a micro-step, of `rows` a rank and step: as written, or as much as was found to fit, or for auto what
        the estimate says (on CUDA a probe has the last word; a CPU kills where CUDA raises, so there it decides)."""
        cfg, m = self.cfg, self.cfg.model
        with contextlib.suppress(OSError, ValueError, KeyError):
            if cfg.overwrite and not self.dry_run and self.anew:
                raise OSError("it is about to be deleted")
            hint = json.loads((self.out / "oom_hint.json").read_text())
            same = hint.get("device") in (
                None,
                self.memory_at_hand(),
            )  # another device, another limit
            if same and hint["written"] == self.written.get("batch_size"):
                kept = min(hint["micro_batch"], kept or hint["micro_batch"])
                self.hint = f"batch_size: {kept}, since a larger one ran out of memory ({self.out / 'oom_hint.json'})"
        if cfg.batch_size != "auto":
            return min(cfg.batch_size, kept or cfg.batch_size)
        if kept:
            return kept
        machine = machines.detect(cfg.device, cfg.precision, False, environment("LOCAL_RANK", 0))
        have, precision = machines.own_memory(machine.device), machine.precision
        if self.dry_run and self.dry_run["hardware"] != "measured":
            have = machines.hardware(self.dry_run["hardware"], machine, self.dry_run).memory
            precision = self.dry_run["precision"]
        room, model, layout = cfg.target_memory * have, plan.on_meta(m), self.parallel.layout
        fits = [r for r in range(1, rows + 1) if rows % r == 0]
        how = (precision, cfg.activation_checkpointing)
        need = {
            r: plan.rank_memory(model, layout, r, rows // r, *how, plan.IMBALANCE)["total"]
            for r in fits
        }
        best = max(
            (r for r in fits if need[r] <= room), default=1
        )  # check_memory says where one row is too many
        self.measure_memory = (
            machine.device.type == "cuda" and self.parallel.collective_free
        )  # in parts no rank can try alone
        self.hint = (
            f"batch_size: auto is {best}: about {need[best] / 2**30:.2f} of {room / 2**30:.2f} GiB"
        )
        return best

    def check_memory(self, rows: int) -> str:
        """E200 where the run is sure not to fit; advice where it may not, and in a dry run, which is for elsewhere."""
        cfg, machine = self.cfg, self.machine
        if self.dry_run and self.dry_run["hardware"] != "measured":  # its lines say so
            return ""
        how, have = (
            (machine.precision, cfg.activation_checkpointing),
            machines.own_memory(machine.device),
        )
        args = (
            self.counted,
            self.parallel.layout,
            cfg.batch_size,
            rows,
            how,
            have,
            cfg.target_memory,
        )
        why, sure = plan.misfit(*args)
        if sure and not self.dry_run:
            raise UserError("E200", why)
        return why and f"this {'will' if sure else 'may'} not fit: {why}"

    def memory_at_hand(self) -> list:
        """Which device ran out of memory, or would: its name and GiB."""
        machine = machines.detect(self.cfg.device, "fp32", False, environment("LOCAL_RANK", 0))
        return [machine.name, round(machines.total_memory(machine.device) / 2**30)]

    def pick_experts(self, kept: str | None) -> tuple[str, str]:
        """The backend of the expert layer and why it is that one."""
        cfg, m = self.cfg, self.cfg.model
        if self.misfit and self.dry_run:  # a layer of its experts alone may be too much
            return "slices", "nothing tried, since the run does not fit here"
        shape = (
            m.d_model,
            m.d_expert,
            m.n_experts,
            m.n_experts_per_token,
            cfg.batch_size * m.max_seq_len,
        )
        where = (self.parallel.device, self.machine.compute_dtype, *shape)
        if kept:
            try:
                return pick_backend(kept, *where)[0], "as in the checkpoint"
            except ValueError as error:  # another machine
                self.changes.append(f"expert_backend: {error}")
        try:
            return pick_backend(cfg.expert_backend, *where)
        except ValueError as error:
            raise UserError("E003", f"expert_backend: {error}") from error

    def own_out_dir(self) -> None:
        """All is checked: out_dir is this launch's; rank 0 empties it first where overwrite says so."""
        if not self.main:
            return
        try:
            if self.anew and self.cfg.overwrite:
                for folder in checkpoint.all_folders(self.out):
                    shutil.rmtree(folder)
                for name in OURS:
                    (self.out / name).unlink(missing_ok=True)
                for curve in self.out.glob("tensorboard/events.out.tfevents.*"):
                    curve.unlink()
            self.owner.accept()
        except OSError as error:
            raise UserError("E300", f"out_dir {self.out} cannot be emptied: {error}") from error
        self.set_damaged_aside()

    def adopt(self, saved) -> None:
        """resume: PATH. Of this run: what was saved after it is set aside. Of another: it, and its best, become steps
        of out_dir too. Either way the newest step here is then the one to go on from, also for a restart."""
        if not self.origin or not self.main:
            return
        note, folder = {"from": str(self.origin), "step": saved.step}, saved.path.resolve()
        try:
            if folder.parent == self.out.resolve():
                checkpoint.set_aside(self.out, saved.step)
                files.write_json(self.out / "resumed.json", note)
                return
            files.write_json(
                self.out / "resumed.json", note
            )  # first: whoever dies in between begins here again
            checkpoint.adopt(folder, self.out)
            best = checkpoint.step_dir(folder.parent, saved.state["best_step"] or saved.step)
            if best != folder and best.exists():
                checkpoint.adopt(best, self.out)
            if file := tokenizers.of_run(folder.parent, saved.state.get("tokenizer")):
                shutil.copyfile(file, self.out / "tokenizer.json")
        except OSError as error:
            raise UserError("E300", f"out_dir {self.out} cannot be written: {error}") from error

    def build(self, saved, weights) -> None:
        """Model, optimizer, loader; then their state from a checkpoint, or the weights that find_weights found."""
        cfg, par = self.cfg, self.parallel
        torch.use_deterministic_algorithms(
            self.run.deterministic
        )  # off too: this may be a process's second run
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # a debugging aid that costs a pass over memory
        )
        model = self.model = par.build(cfg, self.run.precision, saved is None)
        model.compute_dtype, model.z_loss, model.backend = (
            self.machine.compute_dtype,
            cfg.z_loss,
            self.run.attention,
        )
        model.recompute = cfg.activation_checkpointing
        self.moe, self.mod = model.sparse_layers("moe"), model.sparse_layers("mod")
        for moe in self.moe.values():
            moe.backend = self.run.expert_backend
        n = next(iter(self.moe.values())).router.n if self.moe else 0
        self.sparse_shapes = [
            (len(self.moe), len(SUMS) + n),
            (len(self.mod), len(MOD_SUMS) + cfg.model.max_seq_len),
        ]
        self.n_sparse, self.sparse = sum(a * b for a, b in self.sparse_shapes), None
        if self.run.compile_model:
            torch.compiler.config.recompile_limit = (
                64  # dense, MoE and MoD blocks, each while training and evaluating
            )
            for block in (
                model.blocks
            ):  # one graph serves all layers: fast to compile, and nothing else gains by it
                block.compile()
        self.weights = par.weights(model)
        self.optimizer = build_optimizer(cfg, self.weights)
        if self.run.precision == "mixed_fp16":
            self.scale = torch.tensor(65536.0, device=par.device)
            self.scale_good = torch.zeros((), device=par.device)  # steps since the last change
        last = self.run.segments[-1][1]
        shares = {n: float(last.get(n, 0)) for n in self.val_sources}
        if not any(shares.values()):
            shares = dict.fromkeys(shares, 1.0)
        count = max(1, cfg.eval_tokens // cfg.model.max_seq_len)
        self.val_set = val_rows(self.val_sources, shares, count) if shares else []
        self.measured_on = self.val_sum()
        if saved is not None:
            self.parallel.run_or_raise_on_all(self.load, saved)
        elif weights:
            par.run_or_raise_on_all(self.take_weights, cfg.init_from, *weights)
            self.say(f"weights    from {cfg.init_from}")
        if self.measure_memory:
            self.probe()
        micro, accum = self.run.micro_batch, self.run.accumulation
        self.loader = Loader(self.sources, cfg.seed, self.run.segments, cfg.model.vocab_size)
        self.loader.start(self.cursor, *par.rows(), micro, accum)
        if self.main:
            every = [*self.sources.values(), *self.val_sources.values()]
            self.loader.sums = Sums(every, str(self.out / "verified.jsonl"))

    def val_sum(self) -> str:
        """Stands for the validation set: its text, which rows of it, how long they are."""
        said = {}
        for name, source in self.val_sources.items():
            shards = source.manifest["splits"]["val"]["shards"] if source.manifest else []
            said[name] = [s.get("sha256", s["file"]) for s in shards] or source.fingerprint
        rows = [[name, int(i)] for name, i in self.val_set]
        return hashlib.sha256(
            json.dumps([said, rows, self.cfg.model.max_seq_len]).encode()
        ).hexdigest()

    def take_numbers(self, numbers: dict) -> None:
        """Those of a checkpoint or snapshot; what was measured on another validation set is not compared, and begins
        anew."""
        measured_on = self.measured_on
        for name in NUMBERS:
            setattr(self, name, numbers.get(name, getattr(self, name)))
        self.measured_on, there = measured_on, numbers.get("measured_on")
        # older checkpoints do not say on what: other data is another set there
        if there == measured_on or (
            there is None and numbers.get("fingerprints") == self.fingerprints
        ):
            return
        if self.best_val_loss is not None:
            best = f"best {self.best_val_loss:.4f} at step {self.best_step}"
            self.say(f"note       val_loss begins anew: {best} was of another validation set")
        self.val_loss = self.best_val_loss = self.best_step = None
        self.evaluations_since_best, self.stopped_early, self.gains, self.rises, self.best_parts = (
            0,
            False,
            [],
            [],
            [],
        )

    def probe(self) -> None:
        """batch_size: auto on CUDA: the most rows, of those that divide a step's, whose forward and backward pass stays
        within target_memory; tried out, by bisection. Weights, moments and seeds stay as they are, no gradient is left.
        E200 where one row does not fit. Never run on a GPU yet: the search and what it leaves behind are tested."""
        cfg, device = self.cfg, self.parallel.device
        rows, room = (
            self.run.rows_per_step // self.parallel.rows()[1],
            cfg.target_memory * machines.total_memory(device),
        )
        sizes, peaks = [n for n in range(1, rows + 1) if rows % n == 0], {}

        def fits(n: int) -> bool:
            peaks[n] = math.inf
            try:
                for p in (
                    self.model.parameters() if n < rows else ()
                ):  # those of the micro-steps before
                    p.grad = torch.zeros_like(p)
                peaks[n] = peak_bytes(self.model, n, device)
            except torch.OutOfMemoryError:
                pass
            finally:
                self.model.zero_grad(set_to_none=True)
            free_memory(device)  # out here, where no traceback holds on to tensors any more
            return peaks[n] <= room

        low, high = 0, len(sizes)  # the first `low` sizes fit, those from `high` on do not
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
        best = -self.parallel.all_reduce_max([-sizes[low - 1] if low else 0])[
            0
        ]  # the least of all ranks
        if not best:
            text = f"batch_size: auto: a probe found that one row does not fit into {room / 2**30:.2f} GiB"
            raise UserError(
                "E200",
                f"{text}; try activation_checkpointing: block, or train_fsdp.py on more GPUs",
            )
        self.run = dataclasses.replace(self.run, micro_batch=best, accumulation=rows // best)
        need = peaks.get(best, 0) / 2**30  # 0: another rank's choice
        self.say(
            f"batch_size {best} rows a micro-step, by a probe: {need:.2f} of {room / 2**30:.2f} GiB"
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, by name: parameters, buffers (selection bias, loads, slots), moments."""
        own = {name: p.detach() for name, p in self.weights.items()}
        out = {
            f"model.{name}": own.get(name, tensor)
            for name, tensor in self.model.state_dict().items()
        }
        for name, p in self.weights.items():
            out |= {f"optim.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        return out

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Weights, moments and every number of the run, in place."""
        self.restore(saved)
        self.step, self.cursor = saved.state["step"], saved.state["cursor"]
        self.take_numbers(saved.state)
        if Path(saved.path).resolve().parent == self.out.resolve():  # another run keeps its curves
            self.wandb_id = saved.state.get("wandb_id")

    def copy_in(self, saved: checkpoint.Checkpoint, names: dict[str, str]) -> None:
        """Fill tensor `a` of ours from tensor `b` of the checkpoint for each a: b."""
        mine = self.tensors()
        for ours, theirs in names.items():
            for offset, shape, local, _ in self.parallel.local_shards(ours, mine[ours]):
                if list(shape) != saved.tensors[theirs]["shape"]:
                    shapes = f"{saved.tensors[theirs]['shape']} there, {list(shape)} here"
                    raise UserError("E305", f"{saved.path}: {theirs} has shape {shapes}")
                part = saved.read(theirs, offset, local.shape)
                refuse_odd(f"{saved.path}: {theirs}", part)
                local.copy_(part)

    def find_weights(self) -> tuple:
        """init_from, of one of our runs or of a Hugging Face folder: (its model, its weights as take_weights reads
        them). Refused before anything is changed: E303, E304, E113, and E305 where the models do not go together."""
        path, par = self.cfg.init_from, self.parallel
        if par.broadcast((Path(path) / "config.json").is_file()):
            from export import read_hf

            model, state, _, file = par.run_or_raise_on_all(read_hf, path)
            par.run_or_raise_on_all(self.check_tokenizer, f"init_from {path}", file, None)
        else:
            folders = par.broadcast(
                par.run_or_raise_on_all(lambda: checkpoint.folders(path) if self.main else None)
            )
            if (found := self.newest_whole(folders)) is None:
                raise UserError("E303", f"init_from {path} holds no whole checkpoint")
            state = checkpoint.Checkpoint(found)
            then = state.state.get("tokenizer")
            file = tokenizers.of_run(state.path.parent, then)
            par.run_or_raise_on_all(self.check_tokenizer, f"init_from {path}", file, then)
            model = model_of(state)
        free = "dropout max_seq_len init_std rope_scaling rope_theta ffn_hidden_multiplier multiple_of".split()
        if (
            self.cfg.model.n_experts_max >= model.n_experts_max
        ):  # slots may be added: the first rows are the same
            free.append("n_experts_max")
        there, here = dataclasses.asdict(model), dataclasses.asdict(self.cfg.model)
        differ = [
            f"{k}: {there[k]} there, {here[k]} here"
            for k in here
            if there[k] != here[k] and k not in free
        ]
        if differ:
            text = f"init_from {path}: {'; '.join(differ)}"
            if there["vocab_size"] != here["vocab_size"] and file:
                text += f"; vocab_size is the tokenizer's: prepare the data with --tokenizer {file}"
            raise UserError("E305", text)
        return model, state

    def take_weights(self, path: str, model: ModelConfig, state) -> None:
        """The rows of a state dict or checkpoint that are this rank's. E303 for weights that are NaN or inf."""
        slots, before = (m.n_experts_max or m.n_experts for m in (self.cfg.model, model))
        mine, new = self.tensors(), slots - before
        for name in (
            state
            if isinstance(state, dict)
            else [n[6:] for n in state.tensors if n.startswith("model.")]
        ):
            whole = state[name] if isinstance(state, dict) else None
            if (
                new
                and model.n_null_experts
                and name.endswith(("router.weight", "router.bias", "router.load"))
            ):
                whole = state.read(f"model.{name}") if whole is None else whole
                real, null = whole[:before], whole[before:]
                whole = torch.cat([real, whole.new_zeros(new, *whole.shape[1:]), null])
            shape = state.tensors[f"model.{name}"]["shape"] if whole is None else whole.shape
            for offset, _, local, _ in self.parallel.local_shards(
                f"model.{name}", mine[f"model.{name}"]
            ):
                size = [
                    max(0, min(n, m - a)) for a, n, m in zip(offset, local.shape, shape)
                ]  # fewer slots there
                if math.prod(size) == 0:
                    continue
                where = tuple(slice(a, a + n) for a, n in zip(offset, size))
                part = state.read(f"model.{name}", offset, size) if whole is None else whole[where]
                refuse_odd(f"init_from {path}: {name}", part)
                local[tuple(map(slice, size))].copy_(part)
        for moe in self.moe.values() if self.cfg.model.n_experts_max else ():
            moe.router.retired.fill_(-1)  # the steps of another run

    def open_files(self) -> None:
        """Rank 0: this process owns out_dir now."""
        cfg = self.cfg
        if not self.main:
            return
        self.attempt = self.read_status().get("attempt", 0) + 1
        try:
            self.log_file = open_log_file(self.out / "train.log")
            self.write_config()
            self.copy_tokenizer()
        except OSError as error:
            raise UserError("E300", f"out_dir {self.out} cannot be written: {error}") from error
        if self.step:  # a process that was killed may have saved and not yet said so
            best = {"step": self.best_step, "val_loss": self.best_val_loss}
            with contextlib.suppress(OSError):
                if self.best_step is None:  # the one it names is of another validation set
                    (self.out / "best.json").unlink(missing_ok=True)
                else:
                    files.write_json(self.out / "best.json", best)
        self.write_status("running")
        if cfg.wandb_project:
            self.wandb = start_wandb(cfg, self.say, self.wandb_id)
            self.wandb_id = self.wandb.id if self.wandb else self.wandb_id
        if cfg.picture and importlib.util.find_spec("matplotlib") is None:
            raise UserError("E003", "picture: true needs its package: pip install matplotlib")
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(
                    "E003", "tensorboard: true needs its package: pip install tensorboard"
                ) from error
            with self.nicety("TensorBoard"):
                self.board = SummaryWriter(str(self.out / "tensorboard"))

    def furnish(self) -> None:
        """At a save: what stands beside the checkpoints, and sample.py needs, comes back if it was deleted."""
        if not (self.out / "config.yaml").exists():
            self.write_config()
        for name in ("tokenizer.json", "token_bytes.npy"):
            if self.tokenizer_dir and not (self.out / name).exists():
                shutil.copyfile(self.tokenizer_dir / name, self.out / name)
        if not owner.same_file(self.log_file, self.out / "train.log"):
            old, self.log_file = self.log_file, open_log_file(self.out / "train.log")
            with contextlib.suppress(OSError):
                old.close()

    def write_config(self) -> None:
        """config.yaml, as resolved: started with it the run goes on, or with another out_dir is repeated, on any number
        of processes. A config.yaml that is not what Lumen wrote stays, and ours is resolved.yaml."""
        cfg, theirs = self.cfg, self.out / "config.yaml"
        keys = resolved(cfg, self.run)
        keys |= {"num_epochs": None, "auto_epoch_scaling": False}  # max_steps says it
        keys |= {"resume": "auto", "overwrite": False}  # they were said for this start
        keys["batch_tokens"] = self.run.rows_per_step * cfg.model.max_seq_len
        del keys["gradient_accumulation_steps"]  # follows from it
        text = yaml.safe_dump(keys, sort_keys=False)
        free = [f for f in (theirs, self.out / "resolved.yaml") if not f.exists() or lumen_wrote(f)]
        if free:
            free[0].write_text(f"{WRITTEN} {text_sum(text)}\n{text}", encoding="utf-8")
        if theirs not in free:
            self.say(
                f"note       {theirs} is not what Lumen wrote and stays; as resolved: {[*free, 'nowhere'][0]}"
            )

    def copy_tokenizer(self) -> None:
        """tokenizer.json and token_bytes.npy are those of the data that the run trains on now; a tokenizer that earlier
        steps were made with is kept under its sum."""
        if not self.tokenizer_dir:
            return
        file, then = self.out / "tokenizer.json", self.tokenizer_then
        if then and file.exists() and then != self.tokenizer_sum:
            file.rename(tokenizers.former(self.out, then))
        for name in ("tokenizer.json", "token_bytes.npy"):
            data = (self.tokenizer_dir / name).read_bytes()
            if not (self.out / name).exists() or (self.out / name).read_bytes() != data:
                (self.out / name).write_bytes(data)

    def open_log(self) -> None:
        """Files, a number for this attempt, signals."""
        self.parallel.run_or_raise_on_all(self.open_files)
        self.attempt = self.parallel.broadcast(self.attempt)
        self.orchestrator.begin()
        begun = f"from step {self.step}" if self.step else "new"
        self.say(f"run        {self.out}, attempt {self.attempt}, {begun}")
        self.first_interrupt = None
        for name in ("SIGTERM", "SIGINT", "SIGHUP") + (
            ("SIGUSR1",) if "RANK" not in os.environ else ()
        ):
            with contextlib.suppress(
                ValueError, AttributeError
            ):  # not the main thread; not on this system
                if (
                    name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
                ):  # nohup's word stands
                    signal.signal(getattr(signal, name), self.on_signal)

    def on_signal(self, number, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save_signal = 1
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            if (
                self.first_interrupt and now - self.first_interrupt > 2
            ):  # sooner: it came by two ways, torchrun's too
                os._exit(130)
            if (
                self.main and not self.first_interrupt
            ):  # no print: it may have been interrupted itself
                with contextlib.suppress(OSError):
                    os.write(
                        2,
                        b"\nstopping after this step and saving; Ctrl-C again leaves at once, without saving\n",
                    )
            self.first_interrupt = self.first_interrupt or now
        self.stop_signal = self.stop_signal or 1

    # ---- the loop

    @owner.owning
    def fit(self) -> int:
        """Train to max_steps, or until a signal. Returns the exit code: 0, or 4 when the last save failed."""
        cfg, par, model, optimizer = self.cfg, self.parallel, self.model, self.optimizer
        nominal = (
            self.run.rows_per_step * cfg.model.max_seq_len
        )  # targets in a step when all are valid
        double = torch.float32 if par.device.type == "mps" else torch.float64
        stop = wants_save = False
        watch, self.lapped = self.orchestrator, time.perf_counter()
        self.restart_clock()
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.run.max_steps, initial=self.step, unit="step", dynamic_ncols=True
            )
        model.train()
        while True:
            rolled = watch.act()  # what was decided a turn ago: a rollback, commands, a snapshot
            begun = self.step
            model.zero_grad(
                set_to_none=True
            )  # whatever came before, a step sums its own micro-steps only
            # schedule
            lr = lr_at(cfg, self.run, self.step) * watch.lr_factor()
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            model.set_step(self.step)
            for layer, moe in (
                self.moe.items()
                if cfg.model.n_experts_max and self.step % RELEASE_EVERY == 0
                else ()
            ):
                for pair in release_siblings(moe, par.broadcast, par):
                    self.say(
                        f"experts    layer {layer}: siblings {pair[0]} and {pair[1]} have parted, both can be chosen"
                    )
            # evaluate, save
            last = self.step >= self.run.max_steps or self.stopped_early
            owed = self.evaluated_at != self.step and (
                last or self.step > 0
            )  # left for a signal, before this start
            here = self.step != self.started_at or owed
            due_save = last or (cfg.save_interval and self.step % cfg.save_interval == 0)
            due_eval = (
                due_save
                or wants_save
                or rolled
                or (cfg.eval_interval and self.step % cfg.eval_interval == 0)
            )
            fresh = (
                here and self.evaluated_at != self.step
            ) or rolled  # a void turn comes here twice
            new_best = fresh and due_eval and not stop and self.evaluate()
            stop = stop or self.left
            last = last or self.stopped_early
            retry = (
                self.unsaved
                and self.writing is None
                and self.step % max(1, cfg.save_interval // 10) == 0
            )
            moved = self.step != self.started_at
            if (
                (here and (due_save or new_best or last))
                or (moved and (stop or wants_save or retry))
                or rolled
            ):
                self.save(wait=not cfg.save_async or last or stop or rolled)
            if last or stop:
                self.end_save()
                for _ in range(3):  # a full disk may have been freed in the meantime
                    if self.unsaved:
                        time.sleep(1)
                        self.save()
                break
            if self.step < begun:  # it was learned just now that the step before is void
                continue
            # micro-steps
            stats = torch.zeros(
                len(STATS), dtype=double, device=par.device
            )  # filled there: a copy would be a sync
            sums = torch.zeros(3, dtype=double, device=par.device)
            sparse = torch.zeros(
                self.n_sparse, dtype=double, device=par.device
            )  # what MoE and MoD layers counted
            if self.moe and next(iter(self.moe.values())).router.expert_dropout:
                draw_dropout(list(self.moe.values()), mix(cfg.seed, -1 - self.cursor) >> 8)
            void, self.marks = False, []
            try:
                for micro in range(self.run.accumulation):
                    self.lap("compute" if micro else "other")
                    self.mark("compute")
                    try:
                        row, x, y = self.loader.next()
                    except (
                        UserError
                    ) as error:  # this rank cannot go on; the others learn it from the statistics
                        self.data_error = error
                        stats[STAT["unread"]] = 1
                        if par.collective_free:
                            break
                        row, x, y = (
                            self.blank()
                        )  # its part of the collectives that forward and backward hold
                    self.lap("data")
                    self.mark("data")
                    x, y = self.to_device(x), self.to_device(y)
                    torch.manual_seed(mix(cfg.seed, row))
                    with par.microstep(model, micro == self.run.accumulation - 1):
                        total, parts = model(x, targets=y)
                        loss = total / nominal
                        (loss if self.scale is None else loss * self.scale).backward()
                    sums += torch.stack([parts["ce"], parts["z"], parts["count"]]).to(double)
                    if self.n_sparse:
                        sparse += torch.cat(
                            [parts[k].flatten() for k in ("moe", "mod") if k in parts]
                        ).to(double)
            except (
                torch.OutOfMemoryError
            ):  # this rank's step is void, so everybody's is; drain() begins it again
                if not par.collective_free:
                    raise
                void = True
            if void:  # out here, where no traceback holds on to tensors any more
                total = parts = loss = None
                optimizer.zero_grad(set_to_none=True)
                sums, sparse = torch.zeros_like(sums), torch.zeros_like(sparse)
                stats[STAT["oom"]] = 1
                free_memory(par.device)
            self.lap("compute")
            self.mark("compute")
            # reduce
            stats[:3] = sums
            for name, flag in (
                ("stop", self.stop_signal),
                ("save", self.save_signal),
                ("control", watch.new_commands()),
            ):
                if flag:
                    stats[STAT[name]] = 1
            if self.writing and self.writing.is_alive():
                stats[STAT["writing"]] = 1
            if (
                par.world > 1
                and watch.watching
                and self.step % cfg.orchestrator.check_interval == 0
            ):
                stats[STAT["sum"]] = check = par.checksum(model).to(
                    double
                )  # do all ranks hold the same weights?
                stats[STAT["square"]] = check * check
            stats, sparse = par.reduce(model, torch.cat([stats, sparse])).split(
                [len(STATS), self.n_sparse]
            )
            # the true gradient is what was summed, times the true count of targets and without fp16's scale: the factor
            # goes into the clip coefficient (exactly 1.0 without either)
            factor = (nominal / stats[STAT["count"]]).float()
            if self.scale is not None:
                factor = factor / self.scale
            norm = par.grad_norm(model) * factor
            self.lap("communication")
            # guard
            bad, exploded = watch.guard(
                stats[STAT["ce"]], norm, stats[STAT["unread"]] + stats[STAT["oom"]]
            )
            # step
            clip = (
                (cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0)
                if cfg.grad_clip
                else torch.ones_like(norm)
            )
            torch._foreach_mul_([p.grad for p in self.weights.values()], clip * factor)
            optimizer.found_inf = bad.float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.lap("update")
            moe_sums, mod_sums = self.unpack(sparse)
            update_balance(list(self.moe.values()), [row[len(SUMS) :] for row in moe_sums], bad)
            if self.scale is not None:  # halve after an overflow, double after 2000 steps without
                overflow = (
                    ~torch.isfinite(norm) & ~watch.halted
                )  # what ran out of memory has no norm, and comes again
                self.scale_good = torch.where(overflow, 0.0, self.scale_good + ~watch.halted)
                grow = self.scale_good >= 2000
                self.scale = torch.where(
                    overflow, self.scale / 2, torch.where(grow, self.scale * 2, self.scale)
                )
                self.scale_good = torch.where(grow, 0.0, self.scale_good)
            # observe and log the step before this one, whose numbers have arrived by now
            seen = self.drain()
            if (
                seen and seen["oom"]
            ):  # the step before was void, and so was this one: it waits for that to be made good
                continue
            numbers = torch.cat([stats, torch.stack([x.to(double) for x in (norm, bad, exploded)])])
            every = (cfg.expert_log_interval or cfg.log_interval, cfg.orchestrator.check_interval)
            if self.n_sparse and any((self.step + 1) % n == 0 for n in every):
                if self.moe:
                    moe_sums = expert_numbers(self.moe, moe_sums)
                numbers = torch.cat([numbers, moe_sums.flatten(), mod_sums.flatten()])
            self.sparse = sparse
            self.pending = (self.step, self.cursor, watch.turn, lr, *to_host(numbers), self.marks)
            # advance
            self.step += 1
            self.cursor += self.run.rows_per_step
            if self.step == self.started_at + 1:
                self.timeout = cfg.comm_timeout
                par.set_timeout(self.timeout)
            due = (
                cfg.save_interval and self.step % cfg.save_interval == 0
            ) or self.step >= self.run.max_steps
            if (
                par.device.type == "cpu"
                or due
                or (cfg.eval_interval and self.step % cfg.eval_interval == 0)
            ):
                seen = (
                    self.drain() or seen
                )  # the CPU has nothing to overlap; a save must not leave a step half counted
            stop, wants_save = bool(seen and seen["stop"]), bool(seen and seen["save"])
            if wants_save:
                self.save_signal = 0
        self.drain()
        state = "finished" if last and self.evaluated_at == self.step else "stopped"
        code = 4 if self.unsaved else 0
        self.finish(state, code)
        return code

    def blank(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(row, x, y) of a micro-step without a valid target."""
        shape = (self.run.micro_batch, self.cfg.model.max_seq_len)
        return self.cursor, np.zeros(shape, np.int64), np.full(shape, -1, np.int64)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.parallel.device.type == "cuda":
            return tensor.pin_memory().to(self.parallel.device, non_blocking=True)
        return tensor.to(self.parallel.device)

    def drain(self) -> dict | None:
        """Take the numbers of the pending step off the device: count tokens, observe, log."""
        if self.pending is None:
            return None
        step, cursor, turn, lr, numbers, arrived, marks = self.pending
        self.pending = None
        if arrived is not None:
            arrived.synchronize()
        self.measure(marks)
        numbers, sparse = numbers[: len(STATS) + 3].tolist(), numbers[len(STATS) + 3 :]
        (
            ce,
            z,
            count,
            unread,
            oom,
            stop,
            save,
            control,
            check,
            square,
            writing,
            norm,
            bad,
            exploded,
        ) = numbers
        if self.writing and not writing and self.writing.turn <= turn:  # on no rank any more
            self.end_save()
        if unread:  # its step was dropped: go back to before it, save, and say what happened
            self.step, self.cursor = step, cursor
            self.save()
            self.parallel.run_or_raise_on_all(self.raise_data_error)
        seen = {
            "step": step,
            "cursor": cursor,
            "turn": turn,
            "lr": lr,
            "oom": oom > 0,
            "stop": stop > 0,
            "save": save > 0,
        }
        if control:
            self.orchestrator.take_commands()
        if oom:
            self.out_of_memory(step, cursor)
            return seen
        self.tokens += 0 if bad else int(count)
        seen |= {
            "loss": ce / max(count, 1),
            "z_loss": z / max(count, 1),
            "loss_finite": math.isfinite(ce),
        }
        seen |= {"grad_norm": norm, "bad": bool(bad), "exploded": bool(exploded)}
        seen["apart"] = (
            self.parallel.world * square != check * check
        )  # sums over ranks: equal where all are equal
        if len(sparse):
            seen |= self.routing(sparse)
        self.seen = seen
        if not bad:
            self.forecast.add(self.tokens, self.tokens * self.flops_per_token, seen["loss"], lr)
        self.orchestrator.observe(seen)
        due = (
            step + 1
        ) % self.cfg.orchestrator.check_interval == 0 and step + 1 < self.run.max_steps
        if due and (self.cfg.enable_loss_landscape or self.cfg.enable_early_stopping):
            self.look_ahead()
        if (step + 1) % self.cfg.log_interval == 0 or step + 1 == self.run.max_steps:
            self.log(seen)
        if self.bar:
            self.bar.update(1)
        return seen

    def look_ahead(self) -> None:
        """Where the run stands and where it will end; what is justified to do about its length."""
        cfg, T = self.cfg, self.cfg.model.max_seq_len
        planned = self.run.rows_per_step * T * self.run.max_steps
        unique = sum(s.windows for s in self.sources.values()) * T
        try:
            found = self.forecast.status(
                planned,
                lambda share: lr_at(cfg, self.run, round(share * self.run.max_steps)),
                unique,
            )
        except (
            Exception
        ) as error:  # arithmetic on whatever the losses were: to know more is not worth a run
            self.say(f"forecast   none: {type(error).__name__}: {error}")
            found = None
        advice = self.said_of(found, planned, unique) if found else None
        if (
            cfg.enable_early_stopping
        ):  # it will be acted on: unlike machines may have computed unlike last digits
            advice = self.parallel.broadcast(advice)
        if advice:
            self.orchestrator.shorten(advice)

    def said_of(self, found: dict, planned: float, unique: int) -> str | None:
        """Say what the forecast found; returns the advice."""
        cfg, efficient = self.cfg, self.cfg.enable_compute_efficiency
        text = f"{100 * found['share']:.0f} % of the tokens, {found['phase']}"
        if "final" in found:
            text += f"; loss {found['now']:.3f}, at the end {found['final']:.3f} (90 %: {found['final_low']:.3f} to "
            text += f"{found['final_high']:.3f}), {100 * found['gained']:.0f} % of the way there"
            self.gains = [*self.gains[-2:], found["stable_gain_high"]]
            if efficient:
                slopes = (math.log(2) * found[k] for k in ("slope", "slope_low", "slope_high"))
                text += "; {:.3f} ({:.3f} to {:.3f}) nats per doubling of compute".format(*slopes)
        self.say(f"forecast   {text}; {found['recommendation']}")
        self.outlook = {
            f"forecast/{k}": v for k, v in found.items() if efficient or not k.startswith("slope")
        }
        rise = (self.val_loss or 0.0) - (self.best_val_loss or 0.0)
        epochs = found["share"] * planned / max(1, unique)
        gain = found.get("anneal_gain", 0.0)
        return forecast.justified_stop(cfg.lr_schedule, self.gains, self.rises, epochs, rise, gain)

    def out_of_memory(self, step: int, cursor: int) -> None:
        """Some rank ran out of memory in the micro-steps of `step`, which was dropped everywhere: begin it again, with
        the same rows in smaller micro-batches. E200 where they cannot be smaller."""
        self.step, self.cursor = step, cursor
        rows, micro = self.run.rows_per_step // self.parallel.rows()[1], self.run.micro_batch
        smaller = max((m for m in range(1, micro // 2 + 1) if rows % m == 0), default=None)
        said = f"a rank ran out of memory with {micro} rows a micro-step"
        if smaller is None:
            self.save()
            advice = "activation_checkpointing: block, a shorter max_seq_len, or a smaller model"
            raise UserError(
                "E200", f"{said} at step {step}, and there are none smaller; try {advice}"
            )
        self.orchestrator.halted.zero_()
        self.set_micro_batch(smaller)
        args = {"new_size": smaller}
        self.hint = f"a rank ran out of memory at step {step} with {micro}"
        at = {"step": step, "cursor": cursor, "turn": self.orchestrator.turn}
        self.orchestrator.decide(
            "oom",
            "adjust_batch_size",
            f"{said}: same rows again",
            1,
            at,
            always=True,
            args=args,
            before=micro,
        )

    def set_micro_batch(self, size: int) -> None:
        """Rows a micro-step from the next step on; accumulation follows, the batch of a step stays."""
        cfg, (index, count) = self.cfg, self.parallel.rows()
        rows = self.run.rows_per_step // count
        if not 0 < size <= rows or rows % size:
            near = sorted(
                (m for m in range(1, rows + 1) if rows % m == 0), key=lambda m: abs(m - size)
            )[:2]
            raise ValueError(
                f"batch_size: {size} does not divide the {rows} rows of a rank and step; near it: {near}"
            )
        self.run = dataclasses.replace(self.run, micro_batch=size, accumulation=rows // size)
        self.loader.start(self.cursor, index, count, size, self.run.accumulation)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Tensors and loss scale of a checkpoint, in place."""
        mine = self.tensors()
        if set(mine) != set(saved.tensors):
            raise UserError(
                "E305",
                f"{saved.path}: tensors differ: {sorted(set(mine) ^ set(saved.tensors))[:5]}",
            )
        self.copy_in(saved, {name: name for name in mine})
        if self.scale is not None and saved.state["scaler"]:
            self.scale.fill_(saved.state["scaler"][0])
            self.scale_good.fill_(saved.state["scaler"][1])

    def numbers(self) -> dict:
        """What goes back with the weights in a rollback, besides the step."""
        return {name: getattr(self, name) for name in NUMBERS}

    def rewind(self, note: dict) -> None:
        """Back to the step of `note`, whose tensors are there already; the cursor stays beyond what was read. The
        checkpoints after it are set aside."""
        self.end_save()
        self.pending, self.step = None, note["step"]
        self.take_numbers(note)
        self.set_damaged_aside()
        if self.main:
            with contextlib.suppress(OSError):
                checkpoint.set_aside(self.out, self.step)
        self.find_best()
        self.set_micro_batch(self.run.micro_batch)  # the loader reads on from the cursor
        self.restart_clock()
        if self.bar:
            self.bar.n = self.step

    def find_best(self) -> None:
        """If the best step is gone (set aside, damaged, deleted) the best of those still there takes its place."""
        if self.main:
            steps = checkpoint.list_steps(self.out)
            if (
                self.best_step is not None and self.best_step not in steps
            ):  # it is gone: the best of those still there
                found = []
                for step in steps:
                    with contextlib.suppress(UserError):
                        state = checkpoint.Checkpoint(checkpoint.step_dir(self.out, step)).state
                        ours = state.get("measured_on", self.measured_on) == self.measured_on
                        if ours and state["evaluated_at"] == step and state["val_loss"]:
                            found.append((state["val_loss"], step))
                self.best_val_loss, self.best_step = min(found, default=(None, None))
        self.best_val_loss, self.best_step = self.parallel.broadcast(
            (self.best_val_loss, self.best_step)
        )

    def raise_data_error(self) -> None:
        if self.data_error:
            raise self.data_error

    def diagnose(self, cursor: int) -> str | None:
        """Repeat this rank's rows of a bad step, without any effect: the first module whose output is not finite, or
        the parameter nearest to the loss whose gradient is not. It is eager, so it may need more memory than the step
        did: then row by row, or not at all. (In parts row by row at once, and all ranks or none: errors are raised.)"""
        cfg, par, why = self.cfg, self.parallel, ""
        for rows in (self.run.micro_batch, 1) if par.collective_free else (1,):
            try:
                return self.repeat_rows(cursor, rows)
            except Exception as error:  # to know more is not worth a run
                if not par.collective_free:
                    raise
                memory = isinstance(error, torch.OutOfMemoryError)
                why = "no memory" if memory else f"{type(error).__name__}: {error}"
            finally:
                self.model.zero_grad(set_to_none=True)
            free_memory(par.device)  # out here, where no traceback holds on to tensors any more
            if not memory:
                break
        return f"not repeated on rank {par.rank}: {why}"

    def repeat_rows(self, cursor: int, rows: int) -> str | None:
        """diagnose() with so many rows a micro-step; gradients are left."""
        cfg, model, par, found = self.cfg, self.model, self.parallel, []

        def look(name):
            def hook(module, inputs, output):
                first = output[0] if isinstance(output, tuple) else output
                if not found and not torch.isfinite(first).all():
                    found.append(f"{name or 'the loss'} is not finite on rank {par.rank}")

            return hook

        hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules()]
        index, count = par.rows()
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                each = self.run.micro_batch
                for part in range(self.run.accumulation * each // rows):
                    micro, inside = divmod(part * rows, each)
                    row = cursor + (micro * count + index) * each + inside
                    try:
                        x, y = self.loader.batch(row, rows)
                    except UserError as error:
                        if par.collective_free:
                            return error.text
                        found.append(error.text)
                        _, x, y = self.blank()
                    torch.manual_seed(mix(cfg.seed, row))
                    with par.microstep(model, True):
                        model(self.to_device(x), targets=self.to_device(y))[0].backward()
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            bad = [
                n
                for n, p in model.named_parameters()
                if p.grad is not None and not par.finite(p.grad)
            ]
            found += [f"the gradient of {bad[-1]} is not finite on rank {par.rank}"] if bad else []
        return found[0] if found else None

    # ---- evaluation and saving

    @torch.no_grad()
    def evaluate(self) -> bool:
        """Loss over the fixed validation set, on all ranks. Returns whether it is a new best. A signal leaves it."""
        cfg, par, model = self.cfg, self.parallel, self.model
        self.drain()
        self.lap("other")
        began = time.perf_counter()
        self.evaluated_at = self.step
        if not self.val_set:
            return False
        (index, count), rows, T = par.rows(), self.run.micro_batch, cfg.model.max_seq_len
        names = list(self.val_sources)
        double = torch.float32 if par.device.type == "mps" else torch.float64
        sums = torch.zeros(
            len(names), 4, dtype=double, device=par.device
        )  # ce, targets, correct; ce as MoD trains
        depth = torch.zeros(
            len(self.mod), 2, dtype=double, device=par.device
        )  # tokens kept; agreeing with training
        learned = any(mod.routing == "learned" for mod in self.mod.values())
        sizes, means = torch.zeros(len(names), 1, dtype=double), []  # bytes; loss of each batch
        model.eval()
        for first in range(0, len(self.val_set), rows * count):
            mine = self.val_set[first + index * rows : first + (index + 1) * rows]
            for k, name in enumerate(names):
                chosen = [i for n, i in mine if n == name]
                if not chosen and par.collective_free:
                    continue
                window = np.full(
                    (rows, T + 1), -1, dtype=np.int64
                )  # short batches are padded with ignored rows
                try:
                    for r, i in enumerate(chosen):
                        window[r] = self.val_sources[name].window(i)
                except (
                    UserError
                ) as error:  # the other ranks are about to agree: they learn it there
                    self.data_error = error
                    if par.collective_free:
                        break
                x, y = window[:, :-1].clip(min=0), window[:, 1:]
                sizes[k] += (
                    int(self.token_bytes[y[y >= 0]].sum()) if self.token_bytes is not None else 0
                )
                x, y = (
                    self.to_device(np.ascontiguousarray(x)),
                    self.to_device(np.ascontiguousarray(y)),
                )
                _, parts = model(x, targets=y)
                as_trained = parts["ce"]
                if self.mod:
                    depth += parts["depth"].to(double)
                if learned:  # once more by the rule of training, which may look ahead
                    model.causal = False
                    as_trained = model(x, targets=y)[1]["ce"]
                    model.causal = True
                sums[k] += torch.stack(
                    [parts["ce"], parts["count"], parts["correct"], as_trained]
                ).to(double)
                means += [parts["ce"] / parts["count"]] if chosen else []
            self.left, failed = par.all_reduce_max(
                [self.stop_signal, int(self.data_error is not None)]
            )
            if self.left or failed:
                model.train()
                self.evaluated_at = None
                if failed:
                    self.save()
                    par.run_or_raise_on_all(self.raise_data_error)
                self.say("evaluation left: a signal came")
                return False
        model.train()
        mine = torch.stack(means).tolist() if means else []
        parts = par.gather((torch.cat([sums.cpu(), sizes], dim=1), depth.cpu(), mine))
        *parts, means = zip(*parts)
        sums, depth = (torch.stack(part).sum(0) for part in parts)
        means = [x for mine in means for x in mine]
        ce, targets, correct, as_trained, size = sums.sum(0).tolist()
        self.val_loss = ce / targets
        better = self.best_val_loss is None or self.val_loss < self.best_val_loss
        new_best = better and math.isfinite(self.val_loss)
        if new_best:
            self.best_val_loss, self.best_step, self.evaluations_since_best = (
                self.val_loss,
                self.step,
                0,
            )
            self.best_parts, self.rises = means, []
        else:
            self.evaluations_since_best += 1
            if len(means) == len(self.best_parts):  # the same batches as at the best
                self.rises = [
                    *self.rises[-1:],
                    forecast.paired_rise(np.array(self.best_parts), np.array(means)),
                ]
        if (
            cfg.early_stopping_patience
            and self.evaluations_since_best >= cfg.early_stopping_patience
        ):
            said = f"early stop: {self.evaluations_since_best} evaluations without a new best"
            self.say(said)
            self.orchestrator.decide("patience", "stop", said, 2, basis="rule", always=True)
            self.stopped_early = True
        row = {
            "step": self.step,
            "attempt": self.attempt,
            "tokens": self.tokens,
            "val_loss": self.val_loss,
        }
        row |= {
            "val_accuracy": correct / targets,
            "val_bpb": ce / math.log(2) / size if size else None,
        }
        row |= {"best_val_loss": self.best_val_loss, "best_step": self.best_step}
        if self.mod:  # a model makes text by the causal rule, so that is val_loss
            usage, agree = (depth / targets).T.tolist()
            row |= {
                "val_loss_as_trained": as_trained / targets,
                "mod_gap": (ce - as_trained) / targets,
            }
            row |= {"mod_agreement": sum(agree) / len(agree)}
            row |= {"mod_depth": cfg.model.n_layers - sum(1 - u for u in usage)}
        if len(names) > 1:
            row |= {f"val_loss/{n}": (s[0] / s[1]).item() for n, s in zip(names, sums) if s[1]}
        self.record(row)
        self.orchestrator.evaluated(row)
        bpb = f", {row['val_bpb']:.4f} bits per byte" if size else ""
        best = (
            " (best)"
            if new_best
            else f" (best {self.best_val_loss or math.nan:.4f} at step {self.best_step})"
        )
        if above_chance(self.val_loss, cfg.model.vocab_size):
            best += f", worse than guessing ({math.log(cfg.model.vocab_size):.2f})"
        took = time.perf_counter() - began
        right = f"{100 * row['val_accuracy']:.1f} % right"
        self.say(
            f"eval       step {self.step}: val_loss {self.val_loss:.4f}{bpb}, {right}{best}, {took:.1f} s"
        )
        if self.mod:
            text = f"as trained {row['val_loss_as_trained']:.4f}, gap {row['mod_gap']:+.4f}, the rules agree on "
            text += f"{100 * row['mod_agreement']:.1f} %, {row['mod_depth']:.2f} of {cfg.model.n_layers} layers a token"
            self.say(f"           causal rule above; {text}")
        self.clock += took
        self.lap("evaluation")
        return new_best

    def save(self, wait: bool = True, prune: bool = True) -> bool:
        """Write step_N; all ranks agree on success. A failure is cleaned up and said, and the run goes on. With `wait`
        false only a copy is made here; a thread writes it, and a later turn ends it, see end_save. `prune` false: no
        older checkpoint is deleted for it."""
        self.drain()
        self.end_save()
        self.lap("other")
        began, par, final = (
            time.perf_counter(),
            self.parallel,
            checkpoint.step_dir(self.out, self.step),
        )
        folder = Path(f"{final}.tmp")
        if self.best_val_loss is None:
            self.best_step = self.step  # nothing to compare by: the last is the best
        if self.main:
            shutil.rmtree(folder, ignore_errors=True)
        par.set_timeout(
            self.longest_timeout
        )  # a disk takes its time; and nobody writes before the old one is gone
        pieces = {}
        for name, tensor in self.tensors().items():
            own = [
                (shape, offset, local)
                for offset, shape, local, writes in par.local_shards(name, tensor)
                if writes
            ]
            if not wait:
                own = [
                    (shape, offset, local.detach().to("cpu", copy=True))
                    for shape, offset, local in own
                ]
            pieces |= {name: own} if own else {}
        state = json.dumps(self.state()) if self.main else None
        self.writing = writing = Writing(
            folder, final, par.rank, pieces, state, self.orchestrator.turn, began
        )
        writing.run() if wait else writing.start()
        writing.stall = time.perf_counter() - began
        self.clock += writing.stall
        self.lap("checkpoint")
        if wait:
            return self.end_save(prune)
        par.set_timeout(self.timeout)
        return True

    def end_save(self, prune: bool = True) -> bool:
        """Wait for what is being written, agree, and give it its name."""
        if self.writing is None:
            return True
        self.lap("other")
        w, self.writing, par, began = self.writing, None, self.parallel, time.perf_counter()
        par.set_timeout(self.longest_timeout)
        if w.is_alive():
            w.join()
        error = w.error
        failed = par.all_reduce_max([error is not None])[0]
        if not failed and self.main:
            try:
                self.owner.keep()
                checkpoint.commit(w.folder, w.final, par.world, json.loads(w.state))
            except OSError as e:
                error = f"{type(e).__name__}: {e}"
        failed = par.all_reduce_max([error is not None])[0]
        par.set_timeout(self.timeout)
        self.unsaved = bool(failed)
        if failed:
            said = "; ".join(e for e in par.gather(error) if e)
            if self.main:
                shutil.rmtree(w.folder, ignore_errors=True)
            self.say(
                f"E307       {w.final} could not be written ({said}); the run goes on and tries again"
            )
        else:
            if self.main:
                self.after_save(w, prune)
            now = time.perf_counter()
            stall = w.stall + now - began
            beside = f", of which training waited {stall:.1f} s" if self.cfg.save_async else ""
            self.say(f"saved      {w.final}, {now - w.began:.1f} s{beside}")
            if self.cfg.picture and self.main:
                with self.nicety("picture"):
                    self.draw()
        self.clock += time.perf_counter() - began
        self.lap("checkpoint")
        return not failed

    def after_save(self, w: Writing, prune: bool) -> None:
        """Rank 0, the checkpoint has its name: what belongs beside it, and what is not kept any more. None of it can
        make the save a failure; what cannot be done now can be after the next one."""
        cfg, state = self.cfg, json.loads(w.state)
        best = {"step": state["best_step"], "val_loss": state["best_val_loss"]}
        with self.nicety(f"beside {w.final.name}"):
            self.furnish()
        with self.nicety("best.json"):
            files.write_json(self.out / "best.json", best)
            keep = (cfg.save_total_limit, cfg.keep_every, self.best_step)
            if prune:
                checkpoint.prune(self.out, *keep, saved=checkpoint.step_of(w.final))

    def state(self) -> dict:
        """state.json: every number that a resumed run needs, and what it ran with."""
        config = resolved(self.cfg, self.run)
        names = ("step", "cursor", *NUMBERS, "written", "model_written", "fingerprints", "versions")
        names += ("attempt", "wandb_id")
        knobs, model = (
            self.orchestrator.knobs,
            config["model"],
        )  # what was changed on the way and matters to samplers
        model["routing_temperature"] = knobs.get(
            "routing_temperature", model["routing_temperature"]
        )
        if (c := knobs.get("mod_capacity")) is not None:
            was = model["mod_capacity"]
            model["mod_capacity"] = [c if x < 1 else x for x in was] if isinstance(was, list) else c
        scaler = None if self.scale is None else [self.scale.item(), self.scale_good.item()]
        extra = {
            "config": config,
            "run": dataclasses.asdict(self.run),
            "scaler": scaler,
            "orchestrator": self.orchestrator.state(),
        }
        extra |= {"tokenizer": self.tokenizer_sum or self.tokenizer_then}
        extra |= {"clean": self.orchestrator.clean, "forecast": self.forecast.state_dict()}
        return {name: getattr(self, name) for name in names} | extra

    # ---- small parts, and the end

    def unpack(self, sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One flat vector of sums -> those of the MoE layers and of the MoD layers, a row each."""
        parts = sparse.split([a * b for a, b in self.sparse_shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.sparse_shapes))

    def split_seed(self, layer: int) -> int:
        """Of the noise with which an expert is split now: the same on every rank, and in a run that is repeated."""
        return (mix(self.cfg.seed, -1 - self.cursor) >> 8) + layer

    def scheduled_lr(self, step: int | None = None) -> float:
        """The learning rate of a step, by default of this one, before the orchestrator's factor."""
        return lr_at(self.cfg, self.run, self.step if step is None else step)

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`. (The host's: a GPU's work shows where it is waited
        for. While it waits for data a GPU computes, and only measure() knows how long it did not.)"""
        now = time.perf_counter()
        self.spent["compute" if self.runs_ahead and name == "data" else name] += now - self.lapped
        self.lapped = now

    def mark(self, name: str) -> None:
        """On CUDA: what is in the queue since the last mark is `name`. Between the marks before and after a
        wait for data, no work between them, lies the time for which the GPU had nothing to do. Never run on one."""
        if self.runs_ahead:
            self.marks.append((name, event_now()))

    def measure(self, marks: list) -> None:
        """Seconds between the marks of a turn that is over, into `spent` and, for what ranks compare, `on_device`."""
        for (_, before), (name, after) in zip(marks, marks[1:]):
            seconds = before.elapsed_time(after) / 1000  # it says milliseconds
            self.on_device[name] = self.on_device.get(name, 0.0) + seconds
            if name == "data":
                self.spent["data"] += seconds
                self.spent["compute"] -= seconds

    def restart_clock(self) -> None:
        self.clock, self.clock_step, self.logged = time.perf_counter(), self.step, dict(self.spent)
        self.speed = getattr(self, "speed", 0.0)  # tokens/s of the last log line

    def finish(self, state: str, code: int) -> None:
        """The last words: a sample, the status, everything closed."""
        if self.bar:
            self.bar.close()
            self.bar = None
        if (
            state == "finished"
            and (self.main or not self.parallel.collective_free)
            and self.cfg.sample_prompt is not None
        ):
            with self.nicety("sample"):
                self.print_sample()
        took = clock(time.monotonic() - self.started)
        what = f"{state} at step {self.step}: {self.tokens:,} tokens, {self.orchestrator.dropped} steps dropped, {took}"
        what += f", the orchestrator took {100 * self.orchestrator.seconds / max(1e-9, sum(self.spent.values())):.2f} %"
        worse = "; ".join(self.orchestrator.worse_than_guessing() or ())
        what += f"; {worse}" if worse else ""
        self.say(what + ("" if code == 0 else "; E307: the last checkpoint could not be written"))
        if state == "finished" and self.main:
            with self.nicety("suggested.yaml"):
                self.suggest()
        asked = (
            state == "stopped" and self.stop_signal == 2
        )  # else it was a signal: a scheduler may start it again
        reason = "as asked for" if asked else worse if state == "finished" else ""
        self.write_status(
            state, code, "the last checkpoint could not be written" if code else reason
        )
        self.close()

    def close(self) -> None:
        """Threads, writers and the process group, in this order."""
        if self.model is not None:
            self.loader.close()
            if self.loader.sums:
                self.loader.sums.end()
        self.close_writers()
        self.parallel.close()
        self.owner.release()


def text_sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lumen_wrote(file: Path) -> bool:
    """Whether a config.yaml is as Lumen left it there."""
    text = file.read_text(encoding="utf-8", errors="replace")
    head, _, rest = text.partition("\n")
    before = "\nnum_epochs: null\nauto_epoch_scaling: false\nchinchilla_multiplier: "  # when no sum stood on top
    return head == f"{WRITTEN} {text_sum(rest)}" or (
        head.startswith("data_dir: ") and before in text
    )


def check_states(cfg: Config, layout: plan.Layout) -> None:
    """E200 where not even one row would fit: before data is prepared, processes meet and anything is built."""
    machine = machines.detect(cfg.device, cfg.precision, False, environment("LOCAL_RANK", 0))
    layout = dataclasses.replace(layout, cuda=machine.device.type == "cuda")
    try:  # a vocabulary that the data will name can only make it larger
        model = plan.on_meta(dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 1))
    except ValueError as error:
        raise UserError("E002", str(error)) from error
    have = machines.own_memory(machine.device)
    why, sure = plan.misfit(
        model, layout, 1, layout.world, (machine.precision, "block"), have, cfg.target_memory
    )
    if sure:
        raise UserError("E200", why)


# ---------------------------------------------------------------- main


def main(argv: list[str], parallel=Parallel, watch=None, check=None) -> int:
    """For dry runs: `watch` measures a few layers, see train_fsdp.fake_run, and `check` refuses a layout."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    check_launch()
    rank = environment("RANK", 0)
    cfg, _, _, flags = read_config(argv)
    if flags.get("print_config"):
        print(printed(cfg, sharded=check is not None) if rank == 0 else "", end="")
        return 0
    if status := owner.hopeless(cfg.out_dir):  # --max-restarts and requeue restart on any failure
        if rank == 0:
            print(f"not restarted: {status['reason']}", file=sys.stderr, flush=True)
        else:
            time.sleep(
                5
            )  # torchrun ends all ranks as soon as one has: rank 0 must have said why by then
        return status["code"]
    if flags.get("dry_run"):
        world = flags.setdefault("world_size", environment("WORLD_SIZE", 1))
        flags.setdefault("hardware", "measured" if world == 1 else "h100")
        kind = flags["hardware"] = machines.hardware_key(flags["hardware"])
        if kind in machines.NO_BF16 and cfg.precision != "fp32":
            cfg.precision = "mixed_fp16"
        layout = check(cfg, world) if check else plan.Layout(world)
        here = (
            machines.detect(cfg.device, "fp32", False).device.type if kind == "measured" else kind
        )
        layout = dataclasses.replace(layout, cuda=here not in ("cpu", "mps"))
        from tools.simulate import Planned

        Trainer(argv, functools.partial(Planned, layout=layout), flags).simulate(watch)
        return 0
    try:
        world = environment("WORLD_SIZE", 1)  # all three before data is prepared
        launch.check_tasks()
        check_states(cfg, check(cfg, world) if check else plan.Layout(world))
        trainer = Trainer(argv, parallel)
    except UserError as error:
        owner.refused(error)
        raise
    if (
        trainer.step >= trainer.run.max_steps or trainer.stopped_early
    ) and trainer.evaluated_at == trainer.step:
        trainer.say(f"{trainer.out} is finished at step {trainer.step}; a larger max_steps goes on")
        trainer.write_status("finished")
        trainer.close()
        return 0
    try:
        return trainer.fit()
    except UserError as error:
        trainer.close_writers()
        trainer.write_status(
            "diverged" if error.exit_code == 3 else "input_error", error.exit_code, str(error)
        )
        raise
    except (
        torch.OutOfMemoryError
    ) as error:  # not in a micro-step: in a collective, the optimizer, an evaluation
        trainer.close_writers()
        first = (str(error).splitlines() or ["?"])[0]
        if trainer.run.micro_batch == 1:
            text = f"step {trainer.step}, one row a micro-step: {first}"
            trainer.write_status("input_error", 2, text, anyone=True)
            raise UserError(
                "E200", f"{text}; try activation_checkpointing: block, or a smaller model"
            ) from error
        smaller = trainer.run.micro_batch // 2
        hint = {
            "micro_batch": smaller,
            "written": trainer.written.get("batch_size"),
            "step": trainer.step,
        }
        hint |= {"device": trainer.memory_at_hand()}
        own = trainer.out / f"oom_hint.{rank}.json"  # whichever rank it was, or all of them
        with contextlib.suppress(OSError):
            files.write_json(own, hint)
            own.replace(trainer.out / "oom_hint.json")
        text = f"step {trainer.step}: {first}; a restart goes on with {smaller} rows a micro-step (oom_hint.json)"
        trainer.write_status("restart", 75, text, anyone=True)
        raise UserError("E201", text) from error
    except Exception as error:
        trainer.close_writers()
        if trainer.parallel.world > 1 and lost_peer(error):
            late = "another rank hangs or cannot be reached: " * ("imed out" in str(error))
            text = f"step {trainer.step}: {late}{str(error).splitlines()[0]}"
            there = trainer.read_status()  # of the rank that was lost, if it could say why
            if (there.get("attempt"), there.get("state")) not in [
                (trainer.attempt, s) for s in ("input_error", "restart")
            ]:
                trainer.write_status("restart", 75, text)
            raise UserError("E601", text) from error
        trainer.write_status("stopped", 1, f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    command(main, lasting=True)
