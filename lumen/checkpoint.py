"""Checkpoints: safetensors and JSON only, checksummed, whole or not there. `python -m lumen.checkpoint out/run` lists them.

    out/run/step_00001000/rank_00000.safetensors  the pieces of tensors that this rank owns
                          state.json              step, cursor, tokens, configuration, versions, metrics
                          manifest.json           shape, dtype, pieces of every tensor; sha256, size of every file,
                                                  and its own sha256

Saving has two halves: `write` (every rank, no collective) and `commit` (rank 0, once all ranks agreed). All of it goes
to step_N.tmp, is synced and then renamed, so a name without suffix is complete. Loading takes overlapping slices, so
any number of ranks reads what any other number wrote. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
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

import prepare_data
from lumen import aliases, checkpoint
from lumen.config import own_keys
from lumen.errors import UserError, a_path, expand
from lumen.files import sha256, sync, write_json
from lumen.launch import Words, command
from model import ModelConfig

FORMAT = 1  # of state.json and manifest.json; a reader refuses a larger one
STEP = re.compile(r"step_(\d{8,})")


def step_dir(out_dir, step: int) -> Path:
    return Path(out_dir) / f"step_{step:08d}"


def step_of(folder) -> int:
    return int(STEP.fullmatch(Path(folder).name)[1])


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A synced .safetensors file that others may read as far as umask lets them: safetensors makes its own 0600."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # some file systems know no modes
        file.chmod(mode)
    sync(file)


def odd(tensor: torch.Tensor) -> str:
    """ "NaN" or "inf" if a value of `tensor` is that, else "": one pass, without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    low, high = (x.item() for x in tensor.aminmax())
    if math.isnan(low):
        return "NaN"
    return "inf" if math.isinf(low) or math.isinf(high) else ""


def digest(manifest: dict) -> str:
    """sha256 of a manifest without its own: one flipped bit in an offset would fill a tensor with what is not its."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- saving


def write(folder: Path, rank: int, pieces: dict[str, list]) -> str | None:
    """Write this rank's file and its index into `folder`. Returns None, or what went wrong (disk full, ...).

    pieces: {tensor name: [(global shape, offset, local tensor), ...]}, each region on exactly one rank.
    """
    name = f"rank_{rank:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, tensors, index = folder / f"{name}.safetensors", {}, {}
        for tensor_name, parts in pieces.items():
            for shape, offset, local in parts:
                key = (
                    tensor_name
                    if not any(offset)
                    else f"{tensor_name}@{'.'.join(map(str, offset))}"
                )
                tensors[key] = local.detach().contiguous().cpu()
                dtype = str(local.dtype).removeprefix("torch.")
                part = [list(offset), list(local.shape), file.name, key]
                index.setdefault(tensor_name, {"shape": list(shape), "dtype": dtype, "pieces": []})[
                    "pieces"
                ].append(part)
        files = {}
        if tensors:
            save_tensors(tensors, file)
            files[file.name] = {"sha256": sha256(file), "size": file.stat().st_size}
        write_json(folder / f"{name}.json", {"files": files, "tensors": index})
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def commit(folder: Path, final: Path, world: int, state: dict) -> None:
    """Rank 0, after all ranks wrote: manifest, sync, rename. OSError when the disk does not take it."""
    manifest = {"format": FORMAT, "files": {}, "tensors": {}}
    for rank in range(world):
        file = folder / f"rank_{rank:05d}.json"
        index = json.loads(file.read_text())
        file.unlink()
        manifest["files"] |= index["files"]
        for name, tensor in index["tensors"].items():
            manifest["tensors"].setdefault(name, tensor | {"pieces": []})["pieces"] += tensor[
                "pieces"
            ]
    write_json(folder / "state.json", state | {"format": FORMAT})
    size = (folder / "state.json").stat().st_size
    manifest["files"]["state.json"] = {"sha256": sha256(folder / "state.json"), "size": size}
    write_json(folder / "manifest.json", manifest | {"sha256": digest(manifest)})
    aside = Path(f"{final}.old")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    folder.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(out_dir) -> None:
    """Undo what a crash left: unfinished folders go; a folder moved aside comes back if nothing took its place; half a
    line at the end of a diary, all that a full disk took, goes."""
    for path in _called(out_dir, "tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _called(out_dir, "old"):
        final = path.with_suffix("")
        shutil.rmtree(path, ignore_errors=True) if final.exists() else path.rename(final)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        with contextlib.suppress(OSError), open(Path(out_dir) / name, "rb+") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - (1 << 20)))
            tail = f.read()
            f.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def prune(out_dir, limit: int, keep_every: int, best: int | None, saved: int | None = None) -> None:
    """Keep the newest `limit` checkpoints (0: all), the newest clean one, the best one and every keep_every-th step.
    `saved`: the step that was written just now. One beyond it is not newer, whatever its number says: it stays, and is
    not counted."""
    steps = [s for s in list_steps(out_dir) if saved is None or s <= saved]
    clean = next((s for s in reversed(steps) if _is_clean(step_dir(out_dir, s))), None)
    keep = {best, clean, *steps[-limit:], *(s for s in steps if keep_every and s % keep_every == 0)}
    for step in steps:
        if limit and step not in keep:
            doomed = step_dir(out_dir, step).with_suffix(
                ".tmp"
            )  # a crash in the middle of deleting leaves no half one
            step_dir(out_dir, step).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    aside = sorted(_called(out_dir, "rolled_back"), key=lambda path: (path.stat().st_mtime, path))
    for path in aside[:-limit] if limit else ():
        shutil.rmtree(path, ignore_errors=True)


def set_aside(out_dir, step: int) -> None:
    """After a rollback to `step`: what was saved beyond it gets a name under which nothing takes it for newest."""
    for beyond in [s for s in list_steps(out_dir) if s > step]:
        aside = Path(f"{step_dir(out_dir, beyond)}.rolled_back")
        shutil.rmtree(aside, ignore_errors=True)
        step_dir(out_dir, beyond).rename(aside)


def adopt(folder: Path, out_dir) -> None:
    """Another run's step becomes one of out_dir's: by hard links where the disk can, as nobody writes into a finished
    step. OSError when the disk does not take it."""

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:  # another disk, or somebody else's files
            shutil.copyfile(source, target)
            sync(target)

    final = step_dir(out_dir, step_of(folder))
    tmp = Path(f"{final}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for file in folder.iterdir():
        link(file, tmp / file.name)
    tmp.rename(final)
    sync(final.parent)


def _called(out_dir, suffix: str) -> list[Path]:
    """Our step_N.SUFFIX in a run's folder, and nothing else that somebody may keep there."""
    return [p for p in Path(out_dir).glob(f"step_*.{suffix}") if STEP.fullmatch(p.stem)]


def set_damaged_aside(folder: Path) -> Path:
    """What has wrong bytes gets a name under which it counts nowhere. Nothing of it is deleted but an earlier one."""
    aside = Path(f"{folder}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def _is_clean(folder: Path) -> bool:
    try:
        return json.loads((folder / "state.json").read_text()).get("clean", True)
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- loading


def list_steps(out_dir) -> list[int]:
    """Steps whose folder is complete (it has its final name), ascending; not verified."""
    found = (STEP.fullmatch(p.name) for p in Path(out_dir).glob("step_*"))
    return sorted(int(m[1]) for m in found if m)


def all_folders(out_dir) -> list[Path]:
    """Every step of a run, and what was set aside or left half done."""
    ours = re.compile(rf"{STEP.pattern}(\.(tmp|old|rolled_back|damaged))?")
    return [p for p in Path(out_dir).glob("step_*") if ours.fullmatch(p.name)]


def modernised(state: dict) -> dict:
    """The state of a checkpoint with the names of today for what older versions called otherwise."""
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
    return state


class Checkpoint:
    """One saved step, read lazily. UserError E303 when it is damaged, E306 when a newer Lumen wrote it, E108 when it
    cannot be read, which says nothing about what is in it."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text())
            self.state = modernised(json.loads((self.path / "state.json").read_text()))
            made_by, self.step, self.tensors = (
                self.manifest["format"],
                self.state["step"],
                self.manifest["tensors"],
            )
            whole = self.manifest.get("sha256", "") in (
                "",
                digest(self.manifest),
            )  # older ones have none
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError("E303", f"{self.path}: {type(error).__name__}: {error}") from error
        except OSError as error:
            raise UserError("E108", f"{self.path} cannot be read: {error}") from error
        if not whole:
            raise UserError("E303", f"{self.path}: manifest.json has another sha256")
        if made_by > FORMAT:
            raise UserError("E306", f"{self.path} has format {made_by}, this Lumen reads {FORMAT}")
        self._open = {}

    def verify(self, part: int = 0, of: int = 1) -> list[str]:
        """Every file, or one in `of`, against its size and sha256; returns what is wrong. E108: not allowed to look."""
        wrong = []
        for name, want in list(self.manifest["files"].items())[part::of]:
            file = self.path / name
            try:
                if (size := file.stat().st_size) != want["size"]:
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

    def size(self) -> int:
        return sum(f["size"] for f in self.manifest["files"].values())

    def read(self, name: str, offset=None, shape=None) -> torch.Tensor:
        """The region of tensor `name` that starts at `offset` and has `shape` (default: all), on the CPU."""
        tensor = self.tensors[name]
        shape = list(tensor["shape"] if shape is None else shape)
        offset = list(offset or [0] * len(shape))
        out, missing = torch.empty(shape, dtype=getattr(torch, tensor["dtype"])), 1
        for dim in shape:
            missing *= dim
        for p_offset, p_shape, file, key in tensor["pieces"]:
            low = [max(a, b) for a, b in zip(offset, p_offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, p_offset, p_shape)]
            if any(h <= l for l, h in zip(low, high)):
                continue
            try:
                if file not in self._open:
                    self._open[file] = safe_open(self.path / file, "pt")
                piece = self._open[file].get_slice(key)
                source = (
                    piece[tuple(slice(l - b, h - b) for l, h, b in zip(low, high, p_offset))]
                    if shape
                    else piece[...]
                )
            except (FileNotFoundError, SafetensorError) as error:
                raise UserError("E303", f"{self.path / file}: {error}") from error
            except OSError as error:
                raise UserError("E108", f"{self.path / file} cannot be read: {error}") from error
            target = (
                out[tuple(slice(l - a, h - a) for l, h, a in zip(low, high, offset))]
                if shape
                else out
            )
            target.copy_(source)
            missing -= source.numel()
        if missing:
            raise UserError(
                "E303", f"{self.path}: {missing} values of {name} are in none of its files"
            )
        return out

    def model_state(self) -> dict[str, torch.Tensor]:
        """The model's tensors, whole, named as in Transformer.state_dict()."""
        return {
            n.removeprefix("model."): self.read(n) for n in self.tensors if n.startswith("model.")
        }


def best_step(out_dir) -> int | None:
    """The step that best.json names; None where there is no such file, or a damaged one."""
    try:
        return int(json.loads((Path(out_dir) / "best.json").read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def folders(path, best: bool = False) -> list[Path]:
    """The step folders of a run (or its best one), newest first, or the one given itself; not looked into. E304, and
    E108 where we may not look."""
    path = Path(path)
    try:
        os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("E304", f"{path} does not exist") from None
    except OSError as error:
        raise UserError("E108", f"{path} cannot be read: {error.strerror}") from error
    if STEP.fullmatch(path.name):
        return [path]
    if best:
        if (step := best_step(path)) is None:
            raise UserError(
                "E304", f"{path} has no readable best.json: no evaluation has named a best step"
            )
        return [step_dir(path, step)]
    if not (steps := list_steps(path)):
        raise UserError("E304", f"{path} holds no checkpoint")
    return [step_dir(path, s) for s in reversed(steps)]


def final(error: UserError) -> bool:
    """Whether an older step would be no way out: a newer Lumen's checkpoint, or one that we have no right to read."""
    return error.code == "E306" or isinstance(error.__cause__, PermissionError)


def unreadable(wrong: list[str]) -> bool:
    """Whether all that verify() or an error found is that a file cannot be read: it may be whole."""
    return all("cannot be read" in text for text in wrong)


def find(path, best: bool = False, say=print) -> Checkpoint:
    """The newest complete and verified checkpoint of a run (or its best one), or the step folder given itself.

    A damaged one is named and passed over. UserError E304 when none is left, E303 when the one asked for is damaged.
    """
    asked = best or STEP.fullmatch(Path(path).name)
    for folder in folders(path, best):
        try:
            checkpoint = Checkpoint(folder)
            wrong = prepare_data.verify()
        except UserError as error:
            if asked or final(error):
                raise
            wrong = [error.text]
        if not wrong:
            return checkpoint
        if asked:
            raise UserError("E303", f"{folder}: {'; '.join(wrong)}")
        say(f"{'E108' if unreadable(wrong) else 'E303'}: passed over {folder}: {'; '.join(wrong)}")
    raise UserError("E304", f"{path} holds no whole checkpoint")


def main(argv: list[str]) -> int:
    """List a run's checkpoints with size and metrics, and verify every byte. Exit code 2 when one is damaged."""
    parser = Words(prog="python -m lumen.checkpoint", description=main.__doc__)
    parser.add_argument("out_dir", type=a_path, help="folder of a run")
    run = expand(parser.parse_args(argv).out_dir)
    best, damaged = best_step(run), 0
    print(f"{'step':>10} {'MB':>10} {'tokens':>15} {'val_loss':>9}  state")
    for folder in reversed(folders(run)):
        step = step_of(folder)
        try:
            checkpoint = Checkpoint(folder)
            wrong, state = prepare_data.verify(), checkpoint.state
            size, tokens, val_loss = (
                checkpoint.size() / 1e6,
                state.get("tokens", 0),
                state.get("val_loss"),
            )
        except UserError as error:
            wrong, size, tokens, val_loss, state = [error.text], 0, 0, None, {}
        bad = "CANNOT BE READ" if unreadable(wrong) else "DAMAGED"
        marks = [f"{bad}: {'; '.join(wrong)}" if wrong else "verified"]
        marks += ["best"] if step == best else []
        marks += ["not clean"] if not state.get("clean", True) else []
        loss = "-" if val_loss is None else f"{val_loss:.4f}"
        print(f"{step:>10} {size:>10.1f} {tokens:>15,} {loss:>9}  {', '.join(marks)}")
        damaged += bool(wrong)
    return 2 if damaged else 0


if __name__ == "__main__":
    command(main)


def model_of(saved: Checkpoint, key: str = "") -> ModelConfig:
    """The model that a checkpoint holds; keys that are newer than it have their defaults. E306."""
    try:
        return ModelConfig(**(saved.state.get(key) or saved.state["config"]["model"]))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError("E306", f"{saved.path}: {type(error).__name__}: {error}") from error


def refuse_odd(what: str, tensor: torch.Tensor) -> None:
    """E303 for NaN and inf, with which nothing can be trained."""
    if value := checkpoint.odd(tensor):
        raise UserError(
            "E303", f"{what} holds {value}: whoever wrote it had diverged; take an earlier step"
        )
