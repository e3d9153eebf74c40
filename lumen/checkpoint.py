"""Checkpoints: safetensors and JSON only, checksummed, whole or not there.
`python -m lumen.checkpoint out/run` lists them.

    out/run/step_00001000/rank_00000.safetensors  the shards of tensors that this rank owns
                          state.json              step, cursor, tokens, configuration, versions
                          manifest.json           shape, dtype, shards of every tensor; sha256, size
                                                  of every file, and its own sha256

Saving has two halves: `write` (every rank, no collective) and `commit` (rank 0, once all ranks
agreed). All of it goes to step_N.tmp, is synced and then renamed, so a name without suffix is
complete. Loading takes overlapping slices, so any number of ranks reads what any other number
wrote. Nothing is ever unpickled. lumen/saver.py decides when a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lumen import aliases, nearby
from lumen.config import own_keys
from lumen.errors import UserError, a_path, expand
from lumen.files import drop_half_line, read_json, sha256, sync, write_json
from lumen.launch import Words, command
from lumen.model_keys import model_from_keys
from model import ModelConfig

FORMAT = 1  # of state.json and manifest.json; a reader refuses a larger one
STEP = re.compile(r"step_(\d{8,})")


def step_dir(out_dir, step: int) -> Path:
    return Path(out_dir) / f"step_{step:08d}"


def step_of(folder) -> int:
    return int(STEP.fullmatch(Path(folder).name)[1])


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A synced .safetensors file that others may read as far as umask lets them: safetensors makes
    its own 0600. OSError, SafetensorError."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # some file systems know no modes
        file.chmod(mode)
    sync(file)


def nonfinite(tensor: torch.Tensor) -> str:
    """ "NaN" or "inf" if a value of `tensor` is that, else "": one pass, without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    low, high = tensor.aminmax()
    low, high = low.item(), high.item()
    if math.isnan(low):
        return "NaN"
    return "inf" if math.isinf(low) or math.isinf(high) else ""


def refuse_nonfinite(what: str, tensor: torch.Tensor) -> None:
    """E303 for NaN and inf, with which nothing can be trained."""
    if value := nonfinite(tensor):
        text = f"{what} holds {value}: whoever wrote it had diverged; take an earlier step"
        raise UserError("E303", text)


def manifest_sha256(manifest: dict) -> str:
    """Of a manifest without its own sum. Without it one flipped bit in an offset would fill a
    tensor with values of another."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- saving


def write(folder: Path, rank: int, pieces: dict[str, list]) -> str | None:
    """Write this rank's file and its index into `folder`. Returns None, or what went wrong (disk
    full, ...).

    pieces: {tensor name: [(global shape, offset, local tensor), ...]}, each region on one rank.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank_{rank:05d}.safetensors"
        tensors, index = {}, {}
        for name, parts in pieces.items():
            for shape, offset, local in parts:
                key = f"{name}@{'.'.join(map(str, offset))}" if any(offset) else name
                tensors[key] = local.detach().contiguous().cpu()
                if name not in index:
                    dtype = str(local.dtype).removeprefix("torch.")
                    index[name] = {"shape": list(shape), "dtype": dtype, "pieces": []}
                index[name]["pieces"].append([list(offset), list(local.shape), file.name, key])
        files = {}
        if tensors:
            save_tensors(tensors, file)
            files[file.name] = {"sha256": sha256(file), "size": file.stat().st_size}
        write_json(folder / f"rank_{rank:05d}.json", {"files": files, "tensors": index})
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def commit(folder: Path, final: Path, world: int, state: dict) -> None:
    """Rank 0, after all ranks wrote: manifest, sync, rename. OSError when the disk does not take
    it."""
    manifest = {"format": FORMAT, "files": {}, "tensors": {}}
    for rank in range(world):
        file = folder / f"rank_{rank:05d}.json"
        index = json.loads(file.read_text())
        file.unlink()
        manifest["files"] |= index["files"]
        for name, tensor in index["tensors"].items():
            whole = manifest["tensors"].setdefault(name, tensor | {"pieces": []})
            whole["pieces"] += tensor["pieces"]
    file = folder / "state.json"
    write_json(file, state | {"format": FORMAT})
    manifest["files"]["state.json"] = {"sha256": sha256(file), "size": file.stat().st_size}
    write_json(folder / "manifest.json", manifest | {"sha256": manifest_sha256(manifest)})
    aside = Path(f"{final}.old")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    folder.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(out_dir) -> None:
    """Undo what a crash left: unfinished folders go; a folder moved aside comes back if nothing
    took its place; a half-written last line of metrics.jsonl and decisions.jsonl is cut off."""
    for path in _called(out_dir, "tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _called(out_dir, "old"):
        final = path.with_suffix("")
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        with contextlib.suppress(OSError):
            drop_half_line(Path(out_dir) / name)


def prune(out_dir, limit: int, keep_every: int, best: int | None, saved: int | None = None) -> None:
    """Keep the newest `limit` checkpoints (0: all), the newest clean one, the best one and every
    keep_every-th step. `saved`: the step that was written just now. One beyond it is not newer,
    whatever its number says: it stays, and is not counted."""
    if not limit:
        return
    steps = [step for step in list_steps(out_dir) if saved is None or step <= saved]
    keep = {best, *steps[-limit:]}
    for step in reversed(steps):
        if _is_clean(step_dir(out_dir, step)):
            keep.add(step)
            break
    for step in steps:
        if step in keep or (keep_every and step % keep_every == 0):
            continue
        # renamed first: a crash in the middle of deleting leaves no half one
        doomed = step_dir(out_dir, step).with_suffix(".tmp")
        step_dir(out_dir, step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    aside = sorted(_called(out_dir, "rolled_back"), key=lambda path: (path.stat().st_mtime, path))
    for path in aside[:-limit]:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(out_dir, step: int) -> None:
    """After a rollback to `step`: what was saved beyond it gets a name under which nothing takes it
    for newest."""
    for beyond in list_steps(out_dir):
        if beyond > step:
            _renamed(step_dir(out_dir, beyond), "rolled_back")


def set_damaged_aside(folder: Path) -> Path:
    """What has wrong bytes gets a name under which it counts nowhere. Nothing of it is deleted but
    an earlier one."""
    return _renamed(folder, "damaged")


def _renamed(folder: Path, suffix: str) -> Path:
    aside = Path(f"{folder}.{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def adopt(folder: Path, out_dir) -> None:
    """Another run's step becomes one of out_dir's: by hard links where the disk can, as nobody
    writes into a finished step. OSError when the disk does not take it."""
    final = step_dir(out_dir, step_of(folder))
    tmp = Path(f"{final}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for file in folder.iterdir():
        try:
            os.link(file, tmp / file.name)
        except OSError:  # another disk, or somebody else's files
            shutil.copyfile(file, tmp / file.name)
            sync(tmp / file.name)
    tmp.rename(final)
    sync(final.parent)


def _called(out_dir, suffix: str) -> list[Path]:
    """Our step_N.SUFFIX in a run's folder, and nothing else that somebody may keep there."""
    return [p for p in Path(out_dir).glob(f"step_*.{suffix}") if STEP.fullmatch(p.stem)]


def _is_clean(folder: Path) -> bool:
    state = read_json(folder / "state.json")
    return bool(state) and state.get("clean", True)


# ---------------------------------------------------------------- loading


def list_steps(out_dir) -> list[int]:
    """Steps whose folder is complete (it has its final name), ascending; not verified."""
    names = [path.name for path in Path(out_dir).glob("step_*")]
    return sorted(step_of(name) for name in names if STEP.fullmatch(name))


def all_folders(out_dir) -> list[Path]:
    """Every step of a run, and what was set aside or left half done."""
    ours = re.compile(rf"{STEP.pattern}(\.(tmp|old|rolled_back|damaged))?")
    return [p for p in Path(out_dir).glob("step_*") if ours.fullmatch(p.name)]


def modernised(state: dict) -> dict:
    """The state with the names of today for what older versions called otherwise."""
    for block in ("config", "written"):
        if isinstance(state.get(block), dict):
            aliases.rename(state[block], own_keys(), str)
    if "auto" in state:  # what is `run` now; some of it stood in the resolved configuration only
        run = state["run"] = state.pop("auto")
        if "expert_back_end" in run:
            run["expert_backend"] = run.pop("expert_back_end")
        run["rows_per_step"] = run.pop("rows")
        run["segments"] = state.pop("segments")
        run["accumulation"] = state["config"]["gradient_accumulation_steps"]
        for name in ("min_lr", "warmup_steps"):
            run[name] = state["config"][name]
    if "run" in state and "config" in state:  # before `auto` a rate was a number from the start
        state["run"].setdefault("learning_rate", state["config"].get("learning_rate"))
    return state


class Checkpoint:
    """One saved step, read lazily. UserError E303 when it is damaged, E306 when a newer Lumen wrote
    it, E108 when it cannot be read, which says nothing about what is in it."""

    def __init__(self, path):
        self.path = Path(path)
        self._open = {}  # safetensors files by name
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text())
            self.state = modernised(json.loads((self.path / "state.json").read_text()))
            made_by = self.manifest["format"]
            self.step = self.state["step"]
            self.tensors = self.manifest["tensors"]
            # the first manifests had no sum of their own
            wanted = self.manifest.get("sha256", "")
            whole = wanted in ("", manifest_sha256(self.manifest))
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError("E303", f"{self.path}: {type(error).__name__}: {error}") from error
        except OSError as error:
            raise UserError("E108", f"{self.path} cannot be read: {error}") from error
        if not whole:
            raise UserError("E303", f"{self.path}: manifest.json has another sha256")
        if made_by > FORMAT:
            raise UserError("E306", f"{self.path} has format {made_by}, this Lumen reads {FORMAT}")

    def model_config(self, written: bool = False):
        """The model that it holds, or with `written` the one that the user wrote; keys that are
        newer than the checkpoint have their defaults. E306: it has keys or values that this
        version does not know."""
        try:
            keys = self.state["config"]["model"]
            if written:
                keys = self.state.get("model_written") or keys
            unknown = sorted(set(keys) - {field.name for field in dataclasses.fields(ModelConfig)})
            if unknown:
                raise ValueError(f"model.{', model.'.join(unknown)}: not known to this version")
            return model_from_keys(keys)
        except (TypeError, ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError("E306", f"{self.path}: {reason}") from error

    def verify(self, part: int = 0, of: int = 1) -> list[str]:
        """Every file, or one in `of`, against its size and sha256; returns what is wrong. E108: not
        allowed to look."""
        return wrong_files(self.path, dict(list(self.manifest["files"].items())[part::of]))

    def size(self) -> int:
        """Bytes of all files."""
        return sum(file["size"] for file in self.manifest["files"].values())

    def read(self, name: str, offset=None, shape=None) -> torch.Tensor:
        """The region of tensor `name` that starts at `offset` and has `shape` (default: all), on
        the CPU. E303, E108."""
        tensor = self.tensors[name]
        shape = list(tensor["shape"] if shape is None else shape)
        offset = list(offset or [0] * len(shape))
        out = torch.empty(shape, dtype=getattr(torch, tensor["dtype"]))
        missing = math.prod(shape)
        for piece_offset, piece_shape, file, key in tensor["pieces"]:
            # the overlap of region and piece is [low, high) in the coordinates of the whole tensor
            low, high = [], []
            for a, n, b, m in zip(offset, shape, piece_offset, piece_shape):
                low.append(max(a, b))
                high.append(min(a + n, b + m))
            if any(stop <= start for start, stop in zip(low, high)):
                continue
            source = self._read_slice(file, key, _slices(low, high, piece_offset))
            out[_slices(low, high, offset)] = source
            missing -= source.numel()
        if missing:
            text = f"{missing} values of {name} are in none of its files"
            raise UserError("E303", f"{self.path}: {text}")
        return out

    def _read_slice(self, file: str, key: str, slices) -> torch.Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, "pt")
            return self._open[file].get_slice(key)[slices]
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError("E303", f"{self.path / file}: {error}") from error
        except OSError as error:
            raise UserError("E108", f"{self.path / file} cannot be read: {error}") from error

    def model_state(self) -> dict[str, torch.Tensor]:
        """The model's tensors, whole, named as in Transformer.state_dict()."""
        names = [name for name in self.tensors if name.startswith("model.")]
        return {name.removeprefix("model."): self.read(name) for name in names}


def wrong_files(folder: Path, files: dict) -> list[str]:
    """What is wrong with {name: {size, sha256}} in a folder. E108: not allowed to look."""
    wrong = []
    for name, want in files.items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != want["size"]:
                wrong.append(f"{name} has {size} bytes instead of {want['size']}")
            elif sha256(file) != want["sha256"]:
                wrong.append(f"{name} has another sha256")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except PermissionError as error:
            raise UserError("E108", f"{file} cannot be read: {error.strerror}") from error
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error}")
    return wrong


def _slices(low: list[int], high: list[int], origin: list[int]):
    """[low, high) counted from `origin`; of a scalar all there is."""
    slices = tuple(slice(start - at, stop - at) for start, stop, at in zip(low, high, origin))
    return slices or ...


def best_of(out_dir, steps: list[int], measured_on: str) -> tuple[float | None, int | None]:
    """(val_loss, step) of the best of these checkpoints on one validation set; (None, None)."""
    found = []
    for step in steps:
        with contextlib.suppress(UserError):
            state = Checkpoint(step_dir(out_dir, step)).state
            same_set = state.get("measured_on", measured_on) == measured_on
            if same_set and state["evaluated_at"] == step and state["val_loss"]:
                found.append((state["val_loss"], step))
    return min(found, default=(None, None))


def best_step(out_dir) -> int | None:
    """The step that best.json names; None where there is no such file, or a damaged one."""
    try:
        return int(read_json(Path(out_dir) / "best.json")["step"])
    except (ValueError, LookupError, TypeError):
        return None


def folders(path, best: bool = False) -> list[Path]:
    """The step folders of a run (or its best one), newest first, or the one given itself; not
    looked into. E304, and E108 where we may not look."""
    path = Path(path)
    try:
        os.listdir(path)
    except NotADirectoryError:
        raise UserError("E304", f"{path} {what_file(path)}{nearby.hint(path)}") from None
    except FileNotFoundError:
        steps = list_steps(path.parent) if STEP.fullmatch(path.name) else []
        there = f"; there are {', '.join(map(str, steps[-8:]))}" if steps else nearby.hint(path)
        raise UserError("E304", f"{path} does not exist{there}") from None
    except OSError as error:
        raise UserError("E108", f"{path} cannot be read: {error.strerror}") from error
    if STEP.fullmatch(path.name):
        return [path]
    if best:
        step = best_step(path)
        if step is None:
            text = "has no readable best.json: no evaluation has named a best step"
            raise UserError("E304", f"{path} {text}")
        return [step_dir(path, step)]
    steps = list_steps(path)
    if not steps:
        more = of_few_bits(path) or nearby.hint(path)
        raise UserError("E304", f"{path} holds no checkpoint{more}")
    return [step_dir(path, s) for s in reversed(steps)]


def what_file(path: Path) -> str:
    """Of a path that is no folder, in the place of a run."""
    if not path.is_file():
        return "does not exist"  # something above it is a file
    text = "is a file; a run, or a step of it, is a folder"
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        text += ". Of Lunaris Codex: python export.py from_lunaris FILE OUT_DIR makes a run of it;"
        text += " other trainers' files are not read, their Hugging Face folders are"
    return text


def of_few_bits(path: Path) -> str:
    """What to do with a quantised folder, which can be asked and not trained; "" for another."""
    about = read_json(path / "EXPORT.json")
    if about.get("kind") != "quantised":
        return ""
    source = about.get("source") or "what it was made from"
    text = f": it is a quantised model, for sample.py, evaluate.py and serve.py. Take {source}"
    return f"{text}; to fine-tune on a base of few bits, add --quantize_base int8 --lora.r 16"


def final(error: UserError) -> bool:
    """Whether an older step would be no way out: a newer Lumen's checkpoint, or one that we have
    no right to read."""
    return error.code == "E306" or isinstance(error.__cause__, PermissionError)


def unreadable(wrong: list[str]) -> bool:
    """Whether all that verify() or an error found is that a file cannot be read: it may be
    whole."""
    return all("cannot be read" in text for text in wrong)


def find(path, best: bool = False, say=print) -> Checkpoint:
    """The newest complete and verified checkpoint of a run (or its best one), or the step folder
    given itself.

    A damaged one is named and passed over. UserError E304 when none is left, E303 when the one
    asked for is damaged.
    """
    asked = best or STEP.fullmatch(Path(path).name)
    for folder in folders(path, best):
        try:
            found = Checkpoint(folder)
            wrong = found.verify()
        except UserError as error:
            if asked or final(error):
                raise
            wrong = [error.text]
        if not wrong:
            return found
        if asked:
            raise UserError("E303", f"{folder}: {'; '.join(wrong)}")
        code = "E108" if unreadable(wrong) else "E303"
        say(f"{code}: passed over {folder}: {'; '.join(wrong)}")
    raise UserError("E304", f"{path} holds no whole checkpoint")


def main(argv: list[str]) -> int:
    """List a run's checkpoints with size and metrics, and verify every byte. Exit code 2 when one
    is damaged."""
    parser = Words(prog="python -m lumen.checkpoint", description=main.__doc__)
    parser.add_argument("out_dir", type=a_path, help="folder of a run")
    run = expand(parser.parse_args(argv).out_dir)
    best = best_step(run)
    damaged = 0
    steps = list(reversed(folders(run)))
    print(f"{'step':>10} {'MB':>10} {'tokens':>15} {'val_loss':>9}  state")
    for folder in steps:
        step = step_of(folder)
        size = 0
        state = {}
        try:
            saved = Checkpoint(folder)
            wrong = saved.verify()
            size = saved.size() / 1e6
            state = saved.state
        except UserError as error:
            wrong = [error.text]
        marks = ["verified"]
        if wrong:
            bad = "CANNOT BE READ" if unreadable(wrong) else "DAMAGED"
            marks = [f"{bad}: {'; '.join(wrong)}"]
            damaged += 1
        if step == best:
            marks.append("best")
        if not state.get("clean", True):
            marks.append("not clean")
        val_loss = state.get("val_loss")
        loss = "-" if val_loss is None else f"{val_loss:.4f}"
        tokens = state.get("tokens", 0)
        print(f"{step:>10} {size:>10.1f} {tokens:>15,} {loss:>9}  {', '.join(marks)}")
    return 2 if damaged else 0


if __name__ == "__main__":
    command(main)
