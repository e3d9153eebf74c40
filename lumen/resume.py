"""Which checkpoint a run goes on from, and whether it may; out_dir, from unclaimed to ours.

`StartingPoint` goes through it in this order: `find_checkpoint` (changes no run yet),
`find_weights` for a new run with init_from, `create_out_dir`, `adopt`. All that can refuse a start
comes before `create_out_dir`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch

from lumen import checkpoint, files, owner
from lumen import tokenizer as tokenizers
from lumen.checkpoint import Checkpoint, refuse_nonfinite
from lumen.config import Config
from lumen.data import Data, what_changed
from lumen.errors import UserError
from lumen.windows import anew
from model import ModelConfig

# what a run leaves in out_dir beside its checkpoints; overwrite: true deletes it
OURS = ("metrics.jsonl", "decisions.jsonl", "control.jsonl", "oom_hint.json", "suggested.yaml")
OURS += ("best.json", "status.json", "train.log", "tokenizer.json", "token_bytes.npy")
OURS += ("resumed.json", "verified.jsonl", "training.png")
# keys of a model that its weights do not depend on
INITIAL = ("init_std", "init_outputs", "init_embedding", "init_head")
FREE = ("dropout", "max_seq_len", *INITIAL, "rope_scaling", "rope_theta")
FREE += ("ffn_hidden_multiplier", "multiple_of", "mod_anneal_steps")


def check_paths(cfg: Config) -> None:
    """E304 at once, before data are prepared, where `resume` or `init_from` name what is not there.

    Neither is checked again once out_dir has steps of its own to go on from.
    """
    out = Path(cfg.out_dir)
    origin = find_origin(cfg)
    if origin:
        check_folder("resume", origin)
    overwrites = cfg.resume == "none" and cfg.overwrite
    anew = overwrites and not owner.again(files.read_json(out / owner.Owner.NAME))
    if not cfg.init_from or origin or (checkpoint.list_steps(out) and not anew):
        return
    path = Path(cfg.init_from)
    if anew and out.resolve() in (path.resolve(), *path.resolve().parents):
        text = f"init_from {path} lies in {out}, which overwrite: true would delete"
        raise UserError("E300", text)
    if not (path / "config.json").is_file():  # else it is a Hugging Face folder
        check_folder("init_from", path)


def check_folder(key: str, path: Path) -> None:
    """E304, E108 where `path` holds no checkpoint."""
    try:
        checkpoint.folders(path)
    except UserError as error:
        raise UserError(error.code, f"{key}: {error.text}") from error


def find_origin(cfg: Config) -> Path | None:
    """What `resume: PATH` goes on from; None without a path.

    None too where out_dir already holds what came from it: then the newest there wins, or each
    restart would begin there again.
    """
    if cfg.resume in ("auto", "none"):
        return None
    out, path = Path(cfg.out_dir), Path(cfg.resume).resolve()
    came_from = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        came_from = json.loads((out / "resumed.json").read_text())["from"]
    if path == out.resolve() or (came_from == str(path) and checkpoint.list_steps(out)):
        return None
    return path


class StartingPoint:
    """Where this start of a run begins: at a checkpoint of out_dir, at one of another folder, at
    weights of another run, or at the very beginning."""

    def __init__(self, cfg: Config, data: Data, parallel, owner, say):
        self.cfg, self.data, self.parallel, self.owner, self.say = cfg, data, parallel, owner, say
        self.out = Path(cfg.out_dir)
        self.main = parallel.rank == 0
        self.model = dataclasses.asdict(cfg.model)  # as it must be in the checkpoint
        self.fingerprints = data.fingerprints
        self.changes: list[str] = []  # what is not as in the checkpoint
        self.origin: Path | None = None  # where `resume: PATH` points
        self.anew = cfg.resume == "none"  # what out_dir holds is not gone on with
        self.damaged: list[Path] = []  # found on the way, to be set aside
        self.tokenizer: str | None = None  # sha256 of the one that earlier steps were made with

    # ---- a checkpoint

    def find_checkpoint(self) -> Checkpoint | None:
        """Rank 0 owns out_dir from here on and picks the checkpoint to go on from; all ranks open
        it. None: a new run. Changes no run."""
        folders = error = None
        if self.main:
            try:
                folders = self.claim()
            except UserError as refusal:
                error = refusal
        chosen = (folders, self.origin, self.anew, error)
        folders, self.origin, self.anew, error = self.parallel.broadcast(chosen)
        if error:
            raise error
        if not folders:
            return None
        found = self.newest_whole(folders)
        if found is None:
            text = f"{self.origin or self.out} holds no whole checkpoint"
            text += f", see `python -m lumen.checkpoint {self.out}`; another out_dir starts anew"
            raise UserError("E303", text)
        saved = Checkpoint(found)
        self.check_same_run(saved)
        self.tokenizer = saved.state.get("tokenizer")
        return saved

    def claim(self) -> list[Path]:
        """Rank 0: out_dir is ours. -> the checkpoints to go on from, the first choice first; none:
        a new run. E300 where it holds a run that is not to be gone on with."""
        cfg, out = self.cfg, self.out
        self.owner.take(self.say)
        if self.anew and owner.again(self.owner.found):
            self.anew = False
            text = "resume: none speaks of the launch's first start; this restart goes on"
            self.say(f"note       {text}")
        checkpoint.clean_up(out)
        steps = checkpoint.list_steps(out)
        used = steps or (out / "metrics.jsonl").exists()
        if self.anew and used and not cfg.overwrite:
            text = f"{out} holds a run at step {max(steps, default=0)}"
            raise UserError("E300", f"{text}; overwrite: true beside resume: none deletes it")
        if self.anew and used:
            return []
        folders = [checkpoint.step_dir(out, step) for step in reversed(steps)]
        self.origin = find_origin(cfg)
        if self.origin:
            if steps and self.origin.parent != out.resolve():
                text = f"{out} holds a run at step {max(steps)}, and resume: {self.origin}"
                raise UserError("E300", f"{text} is of another: give a new out_dir")
            folders = checkpoint.folders(self.origin)
        for folder in folders:  # before minutes are spent on every byte of another model's run
            with contextlib.suppress(UserError):
                newest = Checkpoint(folder)
                break
        else:
            return folders
        self.check_same_run(newest)
        return folders

    def newest_whole(self, folders: list[Path]) -> str | None:
        """The first of these checkpoints in which every byte is as it was written; None: there is
        none. Each rank reads its share of the files.

        E306 where one is newer than this program, E108 where we may not read it.
        """
        par = self.parallel
        for folder in folders:
            code = None
            try:
                wrong = Checkpoint(folder).verify(par.rank, par.world)
            except UserError as error:
                wrong = [error.text]
                if checkpoint.final(error):
                    code = error.code
            told = par.gather((wrong, code))
            wrong = list(dict.fromkeys(text for texts, _ in told for text in texts))
            codes = [code for _, code in told if code]
            if not wrong:
                return str(folder)
            if codes:
                raise UserError(codes[0], wrong[0])
            unreadable = checkpoint.unreadable(wrong)
            code = "E108" if unreadable else "E303"
            self.say(f"{code}: passed over {folder}: {'; '.join(wrong)}")
            if folder.parent.resolve() == self.out.resolve() and not unreadable:
                self.damaged.append(folder)
        return None

    def check_same_run(self, saved: Checkpoint) -> None:
        """E300, E113, E305, E306, E118: no checkpoint to go on from with this model and data."""
        state = saved.state
        if "imported" in state:
            text = f"{self.out} holds an imported model: give it as init_from, with another out_dir"
            raise UserError("E300", text)
        then, now = state["config"].get("optimizer", "adamw"), self.cfg.optimizer
        if then != now:
            text = f"{saved.path} holds the state of optimizer: {then}, and {now} has another"
            fix = "go on with that one, or begin anew from its weights: init_from, another out_dir"
            raise UserError("E305", f"{text}; {fix}")
        other_data = state["fingerprints"] != self.fingerprints
        if other_data:
            file = tokenizers.of_run(saved.path.parent, state.get("tokenizer"))
            self.check_tokenizer(str(saved.path), file, state.get("tokenizer"))
        model = dataclasses.asdict(saved.model_config(written=True))
        differ = []
        for key, value in self.model.items():
            # training has long changed what these were of
            if key not in INITIAL and model.get(key) != value:
                differ.append(f"{key}: {model.get(key)} there, {value} here")
        if differ:
            text = f"{saved.path}: {'; '.join(differ)}. {self.out} holds a run of another model"
            raise UserError("E305", f"{text}: give another --out_dir, or write model: as it was")
        if other_data and not self.cfg.allow_data_change:
            raise UserError("E118", self.other_data(saved))

    def other_data(self, saved: Checkpoint) -> str:
        """What of the data is not as it was, and how to go on all the same."""
        then, now = saved.state["fingerprints"], self.fingerprints
        facts, facts_now = saved.state.get("data_facts", {}), self.data.facts()
        told = []
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                before = facts.get(name, {}) if name in then else None
                told.append(f"{name} {what_changed(before, facts_now.get(name))}")
        text = f"{saved.path} was trained on other data: {'; '.join(told)}"
        text += f" (data_dir was {saved.state['config'].get('data_dir')})"
        return f"{text}. If that is meant: --allow_data_change true"

    def check_tokenizer(self, what: str, file: Path | None, sha256: str | None) -> None:
        """E113 where `what`, weights, were made with another tokenizer than the data. `file`:
        theirs; `sha256`: its sum as a manifest or checkpoint has it; either may be unknown."""
        mine, said = self.data.tokenizer_sum, None
        if mine and sha256 == mine:
            return
        question = f"{what}: made with the tokenizer of the data?"
        try:
            if mine is None or not (file or sha256):
                said = f"{question} {what if mine else 'the data'} cannot say"
            elif file and self.data.same_tokenizer(file):
                return
            elif file and not sha256:
                sha256 = tokenizers.load(str(file)).sha256
        except UserError as error:
            said = f"{question} Its own cannot be read: {error.text}"
        if said is None:
            said = f"{what}: made with another tokenizer (sha256 {sha256}) than the data"
            said += f" (sha256 {mine}), so that an id means another text"
            if not self.cfg.allow_tokenizer_change:
                source = next(iter(self.data.sources.values()))
                fix = anew(source.path, source.manifest, None, file or "THAT_TOKENIZER")
                text = f"{said}. Prepare the data with it: {fix}; or give another --out_dir if it"
                text += " is another run, or allow_tokenizer_change: true if it is meant"
                raise UserError("E113", text)
        if said not in self.changes:
            self.changes.append(said)

    # ---- weights of another run

    def find_weights(self, path: str) -> tuple[ModelConfig, Checkpoint | dict]:
        """init_from, a run of ours or a Hugging Face folder: its model, and its weights as
        take_weights reads them. Refused before anything is changed: E303, E304, E113, and E305
        where the models do not go together."""
        par = self.parallel
        if par.broadcast((Path(path) / "config.json").is_file()):
            from export import read_hf  # upward: the one place that knows foreign names

            model, weights, _, file = par.run_or_raise_on_all(read_hf, path)
            then = None
        else:
            folders = par.run_or_raise_on_all(self.folders_of, path)
            found = self.newest_whole(par.broadcast(folders))
            if found is None:
                raise UserError("E303", f"init_from {path} holds no whole checkpoint")
            weights = Checkpoint(found)
            if "adapter" in weights.state:
                fix = f"make a model of both first: python finetune.py merge {path} OUT"
                raise UserError("E311", f"init_from {found} holds adapters without a base; {fix}")
            model, then = weights.model_config(), weights.state.get("tokenizer")
            file = tokenizers.of_run(weights.path.parent, then)
        par.run_or_raise_on_all(self.check_tokenizer, f"init_from {path}", file, then)
        there, here = dataclasses.asdict(model), dataclasses.asdict(self.cfg.model)
        free = set(FREE)
        if self.cfg.model.n_experts_max >= model.n_experts_max:
            free.add("n_experts_max")  # slots may be added: the first rows are the same
        differ = [key for key in here if there[key] != here[key] and key not in free]
        if differ:
            told = [f"{key}: {there[key]} there, {here[key]} here" for key in differ]
            text = f"init_from {path}: {'; '.join(told)}"
            if "vocab_size" in differ and file:
                text += f"; vocab_size is the tokenizer's: prepare the data with --tokenizer {file}"
            raise UserError("E305", text)
        return model, weights

    def folders_of(self, path: str) -> list[Path] | None:
        return checkpoint.folders(path) if self.main else None

    # ---- out_dir is ours

    def create_out_dir(self) -> None:
        """All is checked: out_dir is this launch's; rank 0 empties it first where overwrite says
        so. E300 where the disk does not let it."""
        if not self.main:
            return
        try:
            if self.anew and self.cfg.overwrite:
                self.empty()
            self.owner.accept()
        except OSError as error:
            raise UserError("E300", f"out_dir {self.out} cannot be emptied: {error}") from error
        self.set_damaged_aside()

    def empty(self) -> None:
        """Deletes a run, and nothing else that somebody may keep in its folder."""
        for folder in checkpoint.all_folders(self.out):
            shutil.rmtree(folder)
        for name in OURS:
            (self.out / name).unlink(missing_ok=True)
        for pattern in ("tensorboard/events.out.tfevents.*", "reference-*.npy", "reference-*.json"):
            for file in self.out.glob(pattern):
                file.unlink()

    def set_damaged_aside(self) -> None:
        """Rank 0, once it may change the run: what was found damaged counts nowhere any more."""
        damaged, self.damaged = self.damaged, []
        if not self.main:
            return
        for folder in damaged:
            try:
                aside = checkpoint.set_damaged_aside(folder)
                self.say(f"note       {folder} is now {aside.name}: it is damaged")
            except OSError as error:  # it stays where it is: what is saved now is kept all the same
                text = f"{folder} is damaged and cannot be renamed: {error.strerror}"
                self.say(f"note       {text}")

    def adopt(self, saved: Checkpoint | None) -> None:
        """`resume: PATH`, on rank 0. The newest step of out_dir is then the one to go on from, also
        for a restart.

        Of this run: what was saved after it is set aside. Of another: it, and its best, become
        steps of out_dir too.
        """
        if saved is None or not self.origin or not self.main:
            return
        note, folder = {"from": str(self.origin), "step": saved.step}, saved.path.resolve()
        try:
            if folder.parent == self.out.resolve():
                checkpoint.set_aside(self.out, saved.step)
                files.write_json(self.out / "resumed.json", note)
                return
            # first: whoever dies in between begins here again
            files.write_json(self.out / "resumed.json", note)
            checkpoint.adopt(folder, self.out)
            best = checkpoint.step_dir(folder.parent, saved.state["best_step"] or saved.step)
            if best != folder and best.exists():
                checkpoint.adopt(best, self.out)
            file = tokenizers.of_run(folder.parent, saved.state.get("tokenizer"))
            if file:
                shutil.copyfile(file, self.out / "tokenizer.json")
        except OSError as error:
            raise UserError("E300", f"out_dir {self.out} cannot be written: {error}") from error


# ---------------------------------------------------------------- the weights of another run


def take_weights(what: str, weights, model: ModelConfig, new_slots: int, mine: dict, parallel):
    """Fills this rank's regions of `mine`, {name: tensor}, from `weights`, a state dict or a
    Checkpoint of `model`, which has `new_slots` fewer expert slots. E303 for NaN and inf."""
    foreign = isinstance(weights, dict)
    if foreign:
        names = list(weights)
    else:
        names = [n.removeprefix("model.") for n in weights.tensors if n.startswith("model.")]
    for name in names:
        full = weights[name] if foreign else None  # None: read region by region
        if new_slots and model.n_null_experts and name.endswith(ROUTER_ROWS):
            full = weights.read(f"model.{name}") if full is None else full
            full = before_null_experts(full, new_slots, model.n_experts_max or model.n_experts)
        shape = weights.tensors[f"model.{name}"]["shape"] if full is None else full.shape
        key = f"model.{name}"
        for offset, _, local, _ in parallel.local_shards(key, mine[key]):
            # (a, n, m): where our region begins, its length, the length there, where slots may lack
            size = [max(0, min(n, m - a)) for a, n, m in zip(offset, local.shape, shape)]
            if math.prod(size) == 0:
                continue
            if full is None:
                part = weights.read(key, offset, size)
            else:
                part = full[tuple(slice(a, a + n) for a, n in zip(offset, size))]
            refuse_nonfinite(f"{what}: {name}", part)
            local[tuple(slice(n) for n in size)].copy_(part)


ROUTER_ROWS = ("router.weight", "router.bias", "router.load")  # a row for each slot, null ones last


def before_null_experts(rows: torch.Tensor, new: int, slots: int) -> torch.Tensor:
    """(slots + null, ...) -> (slots + new + null, ...): new rows of zeros between the two."""
    real, null = rows[:slots], rows[slots:]
    return torch.cat([real, real.new_zeros(new, *real.shape[1:]), null])
