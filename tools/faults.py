"""Faults done to small runs on purpose, and what the orchestrator makes of them: `python -m tools.bench faults`.

First what is done to a run, then the runs, then the table that the README carries, then healthy steps. All of it is
done from outside, by standing in for methods of a Trainer: train.py has no line of it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import train
from lumen import checkpoint, files
from lumen.errors import UserError
from lumen.files import read_lines
from lumen.machine import commit
from train import Parallel, Trainer

# ---------------------------------------------------------------- faults: what is done to a run

FAULT_RUN = {
    "data_dir": "@one",
    "max_steps": 600,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "device": "cpu",
}
FAULT_RUN |= {
    "precision": "fp32",
    "compile_model": False,
    "eval_tokens": 16384,
    "save_interval": 200,
    "seed": 1337,
}
FAULT_RUN |= {"save_total_limit": 2, "log_interval": 100, "expert_backend": "slices"}
FAULT_MODEL = {
    "vocab_size": 128,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 128,
    "max_seq_len": 64,
}
FAULT_MODEL |= {"init_std": 0.02}  # as when README's table was made: by width it would be 0.057
FAULT_MOE = {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 64}
FAULT_MOD = {"mod_capacity": 0.5, "mod_layers": [1], "mod_ffn_only": True}
KINDS = {"dense": {}, "moe": FAULT_MOE, "mod": FAULT_MOD, "hybrid": FAULT_MOE | FAULT_MOD}
# the turn of a fault: all detectors are awake; only the guard is; the middle of 60 steps
WHEN = {"late": 320, "early": 40, "scene": 30}
SEEDS = 3  # fault-free runs of each kind of model, whose spread says what a difference means
SCENE = {
    "max_steps": 60,
    "save_interval": 20,
    "log_interval": 1,
    "save_total_limit": 0,
    "eval_tokens": 4096,
}
MIX = {"sources": {"one": {"dir": "@one"}, "two": {"dir": "@two"}}}
MIX |= {"phases": [{"until": 0.5, "weights": {"one": 1}}, {"weights": {"one": 1, "two": 1}}]}
WATCHED = {"orchestrator": {"check_interval": 10, "enable_architecture_adaptation": True}}


def corpus(folder: Path, n: int = 800_000, vocab: int = 128, seed: int = 0) -> None:
    """A language to learn: the next token follows from the last one (half), the last two (two fifths), or is any (a
    tenth, Zipf); now and then one of 16 phrases is said. The last twentieth is the validation split."""
    rng = np.random.default_rng(seed)
    one, two = (
        rng.integers(0, vocab, (vocab, 4)).tolist(),
        rng.integers(0, vocab, (vocab, vocab, 2)).tolist(),
    )
    phrases, which = rng.integers(0, vocab, (16, 12)).tolist(), rng.integers(0, 16, n).tolist()
    pick, free = (
        np.minimum(rng.geometric(0.5, n) - 1, 3),
        np.minimum(rng.zipf(1.5, n) - 1, vocab - 1),
    )
    ids = [0, 0]
    for u, k, z, i in zip(rng.random(n).tolist(), pick.tolist(), free.tolist(), which):
        a, b = ids[-2:]
        ids += (
            phrases[i]
            if u < 0.01
            else [two[a][b][k % 2] if u < 0.4 else one[b][k] if u < 0.9 else z]
        )
    folder.mkdir(parents=True)
    np.save(folder / "train_00000.npy", np.array(ids[: n - n // 20], np.uint16))
    np.save(folder / "val_00000.npy", np.array(ids[n - n // 20 : n], np.uint16))


# Arrange for a fault at turn `at` of trainer `t`. Turns never come back, so a glitch does not; rows go on after a
# rollback, so bad data is behind us. On several ranks it is the last that is hurt.


def during(t, at, turns=1) -> bool:
    return at <= t.orchestrator.turn < at + turns


def wrap(owner, name, change) -> None:
    """change(real, *args, **kwargs) stands in for a method."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(real, *args, **kwargs))


def rate(t, at, factor, turns=math.inf):
    wrap(
        t.orchestrator, "lr_factor", lambda real: real() * (factor if during(t, at, turns) else 1.0)
    )


def gradient(t, at, factor, turns=1):
    def reduce(real, model, stats):
        stats = real(model, stats)
        torch._foreach_mul_(
            [p.grad for p in model.parameters()], factor if during(t, at, turns) else 1.0
        )
        return stats

    wrap(t.parallel, "reduce", reduce)


def data(t, at, what, steps):
    def batch(real, row, count):
        (x, y), rng = real(row, count), np.random.default_rng(row)
        if 0 <= row // t.run.rows_per_step - at + 1 < steps:
            if what == "targets":
                y[:] = rng.permuted(y, axis=1)
            else:
                x[:] = (
                    rng.integers(0, FAULT_MODEL["vocab_size"], x.shape) if what == "random" else 7
                )
                y[:] = np.roll(x, -1, axis=1)
        return x, y

    wrap(t.loader, "batch", batch)


def activation(t, at, value, turns):
    def hook(module, args, output):
        return output * value if module.training and during(t, at, turns) else None

    t.model.blocks[-1].ffn_norm.register_forward_hook(hook)


def no_memory(t, at, rows):
    def hook(module, args):
        if (
            module.training
            and t.orchestrator.turn >= at
            and len(args[0]) > rows
            and t.parallel.rank
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")

    t.model.register_forward_pre_hook(hook)


def no_memory_in_step(t, at):
    def step(real):
        if t.orchestrator.turn >= at and t.run.micro_batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (injected)")
        real()

    wrap(t.optimizer, "step", step)


def late(t, at):
    def hook(module, args):
        if module.training and t.orchestrator.turn >= at and t.parallel.rank:
            time.sleep(0.2)

    t.model.register_forward_pre_hook(hook)


def at_turn(t, at, change, turns=1):
    """change(trainer, k) at the top of turn at + k."""

    def set_step(real, step):
        real(step)
        if during(t, at, turns) and t.parallel.rank == t.parallel.world - 1:
            with torch.no_grad():
                change(t, t.orchestrator.turn - at)

    wrap(t.model, "set_step", set_step)


def noise(t, k, size=2.0, turns=30):
    """On the weights of a layer's FFN; an equal part of it goes each turn, unless the weights went back."""
    mine = list(t.model.blocks[-1].ffn.parameters())
    if k == 0:
        gen = torch.Generator().manual_seed(0)
        t.noise = [size * p.std() * torch.randn(p.shape, generator=gen) for p in mine]
    if not t.orchestrator.rollbacks:
        torch._foreach_add_(mine, t.noise, alpha=-1 / turns if k else 1.0)


def router(t, at, push):
    """Add `push` to the logits of expert 0 in each layer, for the mean of what its router sees."""

    def change(t, k):
        for moe in t.moe.values():
            moe.router.weight[0] += push * moe.router.seen / moe.router.seen.square().sum()

    for moe in t.moe.values():
        moe.router.register_forward_pre_hook(
            lambda m, args: setattr(m, "seen", args[0].detach().mean(0))
        )
    at_turn(t, at, change)


def flip(t, k, bit):
    """A bit of one weight: 23 to 30 are its exponent."""
    t.model.blocks[0].attn_norm.weight.view(torch.int32)[3].bitwise_xor_(1 << bit)


def signals(t, k, number):
    if t.attempt == 1:
        os.kill(os.getpid(), number)


def left_out(t, at):
    """No fault: a batch is dropped. What an exact drop must be equal to."""
    wrap(
        t.orchestrator,
        "guard",
        lambda real, *args: (real(*args)[0] | during(t, at), torch.zeros((), dtype=bool)),
    )


def full_disk(t, at):
    """No file may grow beyond 100 kB from turn at - 15 on, for 30 turns."""
    limits = {0: 100_000, 30: -1}
    at_turn(
        t,
        at - 15,
        lambda t, k: k in limits and resource.setrlimit(resource.RLIMIT_FSIZE, (limits[k], -1)),
        math.inf,
    )


def killed_saves(t, at):
    """Before the save at step 40: 20 forks save, each in a copy of the run, and end at a byte of the checkpoint (by the
    kernel, SIGXFSZ) or before a call of the file system (SIGKILL)."""

    def die(n, folder, size):
        def count(event, args, left=[n - 11]):  # noqa: B006 - it counts down
            if event in ("open", "os.rename", "os.mkdir") and str(args[0]).startswith(str(folder)):
                left[0] -= 1
                left[0] or os.kill(os.getpid(), signal.SIGKILL)

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if n < 12:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * n // 12, -1))
        else:
            sys.addaudithook(count)

    def save(real, **how):
        size = max((f.stat().st_size for f in t.out.glob("step_*/*.safetensors")), default=0)
        for n in range(20 if t.step == 40 else 0):
            shutil.copytree(t.out, folder := Path(f"{t.out}-{n:02d}"))
            if not (pid := os.fork()):
                t.out = folder
                die(n, folder, size)
                real(**how)
                os._exit(0)
            os.waitpid(pid, 0)
        return real(**how)

    wrap(t, "save", save)


@dataclass(frozen=True)
class Fault:
    what: str
    hurt: Callable | None = None  # (trainer, turn)
    expected: str = "recover"  # or "stop in order", "restart"
    lasts: float = 1  # turns; what is done more than 100 turns after that is a false action
    kinds: tuple = tuple(KINDS)
    when: tuple = ("late", "early")
    exact: bool = False  # must end with the bits of a run that left this batch out
    needs: str = ""  # must be said in decisions.jsonl
    most: dict = field(default_factory=dict)  # action: how often at most
    keys: dict = field(default_factory=dict)


P, S = functools.partial, functools.partial(Fault, when=("scene",))
HEALTHY = functools.partial(Fault, when=("late",), lasts=0)
LONGER = {"max_steps": 900}  # two rollbacks, each with its time to cool down, and the stop
ROUTER = functools.partial(Fault, when=("late",), kinds=("moe", "hybrid"), keys=WATCHED)
FAULTS = {  # the rows of README's table
    "1": Fault("learning rate x30 for 20 turns", P(rate, factor=30, turns=20), lasts=20),
    "2": Fault(
        "learning rate x100 for ever",
        P(rate, factor=100),
        "stop in order",
        math.inf,
        most={"rollback": 3},
        keys=LONGER,
    ),
    "3": Fault(
        "12 batches of random tokens",
        P(data, what="random", steps=12),
        lasts=12,
        most={"rollback": 0},
    ),
    "4": Fault(
        "12 batches of one token", P(data, what="one", steps=12), lasts=12, needs="low_loss"
    ),
    "5": Fault("gradient NaN once", P(gradient, factor=math.nan), exact=True, needs="nonfinite"),
    "6": Fault(
        "activation Inf once",
        P(activation, value=math.inf, turns=1),
        exact=True,
        needs="blocks.1.ffn_norm",
    ),
    "7": Fault(
        "activation NaN for ever",
        P(activation, value=math.nan, turns=math.inf),
        "stop in order",
        math.inf,
    ),
    "8": Fault("gradient x10,000 once", P(gradient, factor=1e4), exact=True, needs="explosion"),
    "9": Fault("gradient x30 for 5 turns", P(gradient, factor=30, turns=5), lasts=5),
    "10": Fault(
        "targets permuted, 30 batches",
        P(data, what="targets", steps=30),
        lasts=30,
        needs="divergence",
    ),
    "11": Fault(
        "noise that heals in 30 turns",
        P(at_turn, change=noise, turns=31),
        lasts=30,
        most={"rollback": 0},
    ),
    "12": S("4 rows a micro-step do not fit, 1 of 2 ranks", P(no_memory, rows=3)),
    "13": S("out of memory in optimizer.step", no_memory_in_step, "restart"),
    "14": ROUTER("router pushed to one expert", P(router, push=10.0)),
    "15": ROUTER("an expert dies", P(router, push=-1e4), lasts=math.inf),
    "16": S("exponent bit flipped, 1 of 2 ranks", P(at_turn, change=P(flip, bit=26))),
    "16b": Fault("top exponent bit flipped, 1 process", P(at_turn, change=P(flip, bit=30))),
    "17": S("SIGTERM", P(at_turn, change=P(signals, number=signal.SIGTERM)), "restart"),
    "18": S("killed in a save, at 20 places", killed_saves, "restart"),
    "19": S("newest checkpoint cut; a bit changed", None, "restart"),
    "20": S("disk full for 30 turns", full_disk),
    "21": S("reading fails twice; then for ever"),
    "22": S("1 of 2 ranks 0.2 s late, each step", late, needs="rank 1 computes"),
    "23": S("1 of 2 ranks killed", P(at_turn, change=P(signals, number=signal.SIGKILL)), "restart"),
    "24": HEALTHY("healthy"),
    "25a": HEALTHY("healthy, data mix switched", keys={"data_dir": None, "data": MIX}),
    "25b": HEALTHY("healthy, wsd decay", keys={"lr_schedule": "wsd"}),
    "25c": HEALTHY("healthy, 2 rows a step", keys={"batch_size": 2}),
    "0": Fault("a batch left out (what 5, 6, 8 are held against)", left_out),
}
QUICK = "1,5,7,8,10,11"
SURE = (0.99, 0.9, 0.75, 0.5, 0.0)  # steps of confidence that are counted apart

# ---------------------------------------------------------------- faults: the runs


class Kept(Parallel):
    def close(self):  # the process group serves the next run too
        self.gather(None)


def reference(t, act: bool) -> list:
    """What LuminaAI's trainers do: loss variance below 0.001 over 50 steps -> learning rate x1.5; gradient norm above
    100 -> a tenth of it; 50 steps between changes. Without `act` it is only listed."""
    losses, done = deque(maxlen=50), []

    def drain(real):
        if (seen := real()) and "loss" in seen:
            losses.append(seen["loss"])
            flat = len(losses) == 50 and np.var(losses) < 0.001
            if (flat or seen["grad_norm"] > 100) and seen["turn"] >= (done[-1] if done else 0) + 50:
                done.append(seen["turn"])
                times = 0.1 if seen["grad_norm"] > 100 else 1.5
                act and t.orchestrator.set_knob(
                    "lr_scale", t.orchestrator.get_knob("lr_scale") * times
                )
        return seen

    wrap(t, "drain", drain)
    return done


def start(keys: dict, hurt=None, at: int = 0, parallel=Parallel, by_rules: bool = False) -> dict:
    """Train as `python train.py` does, with a fault: how it ended, what was decided, a digest of all tensors."""
    real, found, reason, path = (
        Trainer.open_log,
        [],
        "",
        Path(f"{keys['out_dir']}.{os.getpid()}.yaml"),
    )

    def open_log(self):
        real(self)
        found.extend([self, reference(self, by_rules)])
        if hurt:
            hurt(self, at)

    files.write_json(path, keys)
    Trainer.open_log = open_log
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = train.main([str(path)], parallel)
    except UserError as error:
        code, reason = error.exit_code, str(error)
    except Exception as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
    finally:
        Trainer.open_log = real
    if not found:
        raise UserError("E002", f"a run could not start: {reason}")
    t, rules = found
    t.loader.close()
    if t.first_interrupt and hurt is not FAULTS["17"].hurt:
        raise KeyboardInterrupt  # what it asked to stop is all of it
    bytes_of = (x.detach().numpy().tobytes() for x in t.tensors().values())
    names = (
        "id kind step turn level trigger action executed reason verdict basis confidence".split()
    )
    rows = [{k: r[k] for k in names if k in r} for r in read_lines(t.out / "decisions.jsonl")]
    row = {
        "code": code,
        "reason": reason[:300],
        "step": t.step,
        "turns": t.orchestrator.turn - (code == 0),
    }
    row |= {
        "val_loss": t.val_loss,
        "dropped": t.orchestrator.dropped,
        "decisions": rows,
        "reference": len(rules),
    }
    with contextlib.suppress(OSError):
        said_so = (t.out / "train.log").read_text(encoding="utf-8").splitlines()
        row["health"] = [line for line in said_so if line.startswith("health")]
    row |= {"digest": hashlib.sha256(b"".join(bytes_of)).hexdigest()[:16], "kept": None}
    for step in (
        checkpoint.list_steps(t.out) if code == 3 else ()
    ):  # the newest that may be trusted, if there is one
        saved = checkpoint.Checkpoint(checkpoint.step_dir(t.out, step))
        finite = all(torch.isfinite(x).all() for x in saved.model_state().values())
        row["kept"] = (
            step if saved.state["clean"] and finite and not saved.verify() else row["kept"]
        )
    return row


def at_top(keys: dict, top: str) -> dict:
    """@ stands for the folder that all is in."""
    return json.loads(json.dumps(keys).replace('"@', f'"{top}/'))


def in_folder(keys: dict, top: str, *how) -> dict:
    """A run whose folder goes with it."""
    try:
        return start(at_top(keys | {"out_dir": "@run"}, top), *how)
    finally:
        shutil.rmtree(f"{top}/run", ignore_errors=True)


def launch(top: str, jobs: list, ranks: int = 0) -> tuple[int, dict]:
    """[(row of FAULTS or a name, keys)] one after the other in processes of their own; (exit code, {(row, rank): how
    it ended})."""
    files.write_json(Path(top, "jobs"), jobs)
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "--max-restarts=1",
    ]
    words = [sys.executable, *(words if ranks else ()), "-m", "tools.faults", f"{top}/jobs"]
    code = subprocess.run(words, capture_output=True, timeout=600).returncode
    found = [f.name.split(".")[1:] for f in Path(top).glob("jobs.*.?")]
    return code, {
        (n, int(rank)): json.loads(Path(top, f"jobs.{n}.{rank}").read_text()) for n, rank in found
    }


def inside(path: str) -> int:
    for name, keys in json.loads(Path(path).read_text()):
        hurt = FAULTS[name].hurt if name in FAULTS else None
        row = start(keys, hurt, WHEN["scene"], Kept if "RANK" in os.environ else Parallel)
        files.write_json(Path(f"{path}.{name}.{os.environ.get('RANK', 0)}"), row)
    return row["code"]


def scene(row: str, data_at: str, top: str) -> dict:
    """The rows about files and processes, on short runs of the dense model: real ranks, signals, limits and deaths."""

    def keys(name):
        more = {
            "model": FAULT_MODEL,
            "out_dir": f"{top}/{name}",
            "orchestrator": {"check_interval": 10},
        }
        return at_top(FAULT_RUN | SCENE | more, data_at)

    def demand(met, text):
        wrong.extend([] if met else [text])

    run, out, wrong, pread = keys("run"), Path(top, "run"), [], os.pread
    hurt, at = FAULTS[row].hurt, WHEN["scene"]
    if row in ("12", "16", "22", "23"):
        code, found = launch(top, [("whole", keys("whole")), (row, run)], 2)
        if len(found) < 4:
            return {"code": code, "wrong": [f"a rank did not come to its end, code {code}"]}
        whole, last = found["whole", 0], found[row, 0]
        demand(last["digest"] == found[row, 1]["digest"], "the ranks' weights differ")
    else:
        whole = start(keys("whole"))
    if row == "12":
        one, other = (
            [r["loss"] for r in read_lines(Path(top, n, "metrics.jsonl")) if "loss" in r]
            for n in ("whole", "run")
        )
        demand(
            abs(one[at - 1] - other[at - 1]) < 1e-6, "another loss in the step that was begun again"
        )
    elif row == "13":
        code = start(run, hurt, at)["code"]
        demand(code == 75 and (out / "oom_hint.json").exists(), f"code {code}, or no hint")
        last = start(run, hurt, at)
    elif row == "17":
        code, found = launch(top, [(row, run)])
        demand(
            code == 0 and found[row, 0]["step"] == at,
            f"code {code}, {[r['step'] for r in found.values()]}",
        )
        last = start(run)
    elif row == "18":
        unhurt = start(run, hurt, at)
        for folder in (folders := sorted(Path(top).glob("run-*"))):
            checkpoint.clean_up(folder)
        ends = [checkpoint.find(folder, say=lambda text: None).step for folder in folders]
        demand(
            len(ends) == 20 and set(ends) <= {20, 40} and ends[:12] == [20] * 12,
            f"checkpoints {ends}",
        )
        demand(not unhurt["code"], f"the run that was not killed: {unhurt['reason']}")
        out = folders[5] if len(folders) > 5 else out
        last = start(run | {"out_dir": str(out)})
    elif row == "19":
        for name in ("cut", "run"):
            shutil.copytree(f"{top}/whole", f"{top}/{name}")
            shutil.rmtree(checkpoint.step_dir(f"{top}/{name}", 60))
            file = checkpoint.step_dir(f"{top}/{name}", 40) / "rank_00000.safetensors"
            half = len(old := file.read_bytes()) // 2
            file.write_bytes(
                old[:half]
                if name == "cut"
                else old[:half] + bytes([old[half] ^ 1]) + old[half + 1 :]
            )
        demand(start(keys("cut"))["digest"] == whole["digest"], "cut: other bits")
        last = start(run)
    elif row == "20":
        try:
            last = start(run, hurt, at)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        steps = checkpoint.list_steps(out)
        demand(20 not in steps and len(steps) > 1, f"checkpoints {steps}")
    elif row == "21":
        left = [2]

        def read(*args):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pread(*args)

        hurt = functools.partial(at_turn, change=lambda t, k: setattr(os, "pread", read))
        try:
            last, os.pread, left[0] = start(run, hurt, at), pread, math.inf
            ever = start(keys("ever"), hurt, at)
        finally:
            os.pread = pread
        saved = max(checkpoint.list_steps(f"{top}/ever"), default=0)
        demand(
            "E111" in ever["reason"] and saved == ever["step"],
            f"for ever: code {ever['code']}, saved {saved}",
        )
    demand(not last["code"], f"ended with code {last['code']}: {last['reason'][:100]}")
    demand(
        row in ("12", "13", "16") or last["digest"] == whole["digest"],
        "other bits than a run never hurt",
    )
    made = sum("loss" in r for r in read_lines(out / "metrics.jsonl"))
    return last | {
        "wrong": wrong,
        "gap": last["val_loss"] - whole["val_loss"],
        "lost": made - SCENE["max_steps"],
    }


# ---------------------------------------------------------------- faults: the table

NOTES = """
recover: completed, with a validation loss at most max(2 sigma of fault-free seeds, 0.01 nats) above the fault-free run
of the same seed. stop in order: E301, and a clean, whole and finite checkpoint is there. Lost: turns whose work did not
stay. Found after: turns to the first line of decisions.jsonl. False: actions before the fault or over 100 turns after.
early: turn 40, where the loss has no course to leave yet (64 accepted steps): only the guard can help.
The same outcome is expected all the same; that the loss's detector says something is not.
off: steps that are not finite are dropped in every mode, and 50 of them in a row stop it. reference: LuminaAI's rules,
where they would have done something.
12, 13, 16 to 23: 60 steps of the dense model, turn 30; the kind of model is nothing to them. 18: a file-size limit ends
twelve forks at a byte (SIGXFSZ), SIGKILL eight before a call. 20: that limit (EFBIG) is the full disk, too.
14, 15: with check_interval 10 and enable_architecture_adaptation: 600 steps are few, and the latter is off by default.
2: 900 steps, so that there is time for two rollbacks and 200 turns after each.
25: Lumen has no batch ramp, so that part is left out."""


def judge(
    fault: Fault, when: str, arm: str, run: dict, base: dict, limit: float, bits: str | None
) -> dict:
    """What came of a run, against its fault-free run; `bits`: the digest of one that left the batch out."""
    at, rows = (
        WHEN[when],
        [d for d in run.get("decisions", ()) if d.get("trigger", "user") != "user"],
    )
    done = [d for d in rows if d["level"] and d["executed"]]
    steps = fault.keys.get("max_steps", FAULT_RUN["max_steps"])
    ended = run["code"] == 0 and run["step"] == steps
    j = {
        "gap": run["val_loss"] - base["val_loss"] if ended else run.get("gap"),
        "wrong": list(run.get("wrong", ())),
    }
    j |= {"lost": run["turns"] - run["step"] + run["dropped"] if ended else run.get("lost")}
    j |= {
        "found": next((d["turn"] - at for d in rows if d["turn"] >= at), None),
        "came": f"code {run['code']}",
    }
    j |= {
        "actions": Counter(d["action"] for d in done),
        "notes": Counter(d["action"] for d in rows if not d["level"]),
    }
    if when == "scene":
        j["came"] = "-" if j["wrong"] else fault.expected
    elif run["code"] == 3 and run["kept"] is not None:
        j["came"] = "stop in order"
    elif ended:
        j["came"] = "recover" if j["gap"] <= limit else "not recovered"
    real = {d["id"]: fault.lasts > 0 and 0 <= d["turn"] - at <= fault.lasts + 100 for d in rows}
    j["false"] = sum(not real[d["id"]] for d in done)
    j["sure"] = [(d["basis"], d["confidence"], real[d["id"]]) for d in rows]
    if arm == "act":
        told = " ".join([*(f"{d['trigger']} {d['reason']}" for d in rows), *run.get("health", ())])
        off = {
            "of mode off": not fault.lasts and base["digest"],
            "without the batch": fault.exact and bits,
        }
        asleep = when == "early" and fault.needs in ("divergence", "low_loss")
        j["wrong"] += (
            [f"nothing said of {fault.needs}"] if fault.needs not in told and not asleep else []
        )
        j["wrong"] += [
            f"{j['actions'][a]} x {a}" for a, n in fault.most.items() if j["actions"][a] > n
        ]
        j["wrong"] += [
            f"not the bits {what}" for what, b in off.items() if b and run["digest"] != b
        ]
        j["wrong"] += [f"{j['false']} false actions"] if j["false"] else []
    return j | {"good": j["came"] == fault.expected and not j["wrong"]}


class Book:
    """Finished runs in one file, with commit and date; none is run twice."""

    def __init__(self, path: str | Path):
        sizes = json.loads(
            json.dumps([FAULT_RUN, FAULT_MODEL, KINDS, WHEN, SCENE, SMALLER, SMALLER_RUN])
        )
        self.path, self.data = Path(path), {"plan": sizes, "runs": {}, "healthy": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        if self.data["plan"] != sizes:
            raise UserError(
                "E117", f"{path} holds runs of other sizes than these; give another --out"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def once(self, part: str, key: str, make) -> dict:
        if key not in (rows := self.data[part]):
            began, cpu = time.perf_counter(), sum(os.times()[:4])
            row = make() | {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": sum(os.times()[:4]) - cpu,
            }
            rows[key] = row | {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
            files.write_json(self.path, self.data)
            print(
                f"{time.strftime('%T')} {key}: {row['seconds']:.0f} s, code {row['code']}",
                flush=True,
            )
        return rows[key]


def run(o) -> Book:
    """The runs that the file o.out does not hold yet; o: the options of `bench.py faults`."""
    if o.quick:
        o.only, o.arms, o.kinds = o.only or QUICK, "act", "dense"
    only, arms, kinds = (x.split(",") if x else [] for x in (o.only, o.arms, o.kinds))
    for given, there in ((only, FAULTS), (arms, ("act", "off", "reference")), (kinds, KINDS)):
        if unknown := [x for x in given if x not in there]:
            raise UserError(
                "E002", f"faults: no {', '.join(unknown)}; there are: {', '.join(there)}"
            )
    book = Book(o.out)
    if o.healthy:
        work(book.path, (), (), (), steps=o.healthy)
    elif not o.table:
        rows = only or list(FAULTS)
        parts = [(rows, arms, [kind]) for kind in kinds]
        if o.quick:  # two halves, and what is held against the fault-free runs beside these: they cost SEEDS rows
            rows.sort(
                key=lambda row: "dense" in FAULTS[row].kinds and "scene" not in FAULTS[row].when
            )
            half = min((len(rows) + SEEDS) // 2, len(rows) - 1)
            parts = [(rows[half:], arms, kinds, 1), (rows[:half], arms, kinds, 1, False)]
        side_by_side(book, parts) if len(parts) > 1 else work(book.path, *parts[0])
    return Book(o.out)


def side_by_side(book: Book, parts: list) -> None:
    """Each part (arguments of work) in a process and with a file of its own, which this one then takes in."""
    parts_of, running = [Path(f"{book.path}.{i}") for i in range(len(parts))], []
    for part, file in zip(parts, parts_of):
        if not file.exists():  # else it goes on where it was
            files.write_json(file, book.data)
        running.append(
            multiprocessing.get_context("spawn").Process(target=work, args=(file, *part))
        )
        running[-1].start()
    for child in running:
        child.join()
    for file in parts_of:
        book.data["runs"] |= json.loads(file.read_text())["runs"]
    files.write_json(book.path, book.data)
    if any(child.exitcode for child in running):
        raise UserError(
            "E002", "faults: a part of it failed, see above; the same command goes on from there"
        )
    for file in parts_of:
        file.unlink()


def work(path: Path, rows, arms, kinds, times: int = 2, seeds: bool = True, steps: int = 0) -> None:
    """What the rows need, at so many times (late, early); seeds: fault-free runs, too, for sigma; or healthy steps."""
    torch.set_num_threads(1)
    book = Book(path)
    with tempfile.TemporaryDirectory() as top:
        corpus(Path(top, "one"))
        corpus(Path(top, "two"), 200_000, seed=1)
        if steps:
            healthy(book, top, steps)
        for row in rows:
            arms_of(book, top, row, arms, kinds, times, seeds)


def arms_of(
    book: Book, top: str, row: str, arms: list, kinds: list, times: int, seeds: bool
) -> None:
    """The runs of a row, and before them those that they are held against."""

    def go(row, kind, arm, when, seed=FAULT_RUN["seed"]):
        def make():
            if when == "scene":
                with tempfile.TemporaryDirectory(dir=top) as folder:
                    return scene(row, top, folder)
            keys = FAULT_RUN | FAULTS[row].keys | {"seed": seed, "model": FAULT_MODEL | KINDS[kind]}
            keys["orchestrator"] = keys.get("orchestrator", {}) | {
                "mode": "act" if arm == "act" else "off"
            }
            return in_folder(keys, top, FAULTS[row].hurt, WHEN[when], Parallel, arm == "reference")

        return book.once("runs", f"{row}/{kind}/{arm}/{when}/{seed}", make)

    fault = FAULTS[row]
    if "scene" in fault.when and "dense" in kinds:
        go(row, "dense", "act", "scene")
    for kind in (k for k in kinds if k in fault.kinds and "scene" not in fault.when):
        for i in range(SEEDS if seeds else 0):
            go("24", kind, "off", "late", FAULT_RUN["seed"] + i)
        off = go(row, kind, "off", "late") if "off" in arms or not fault.lasts else {}
        for when in fault.when[:times] if "act" in arms else ():
            if fault.exact:
                go("0", kind, "act", when)
            go(row, kind, "act", when)
        if off.get("reference") and "reference" in arms:
            go(row, kind, "reference", "late")


def fault_table(runs: dict) -> tuple[list[str], int]:
    """Lines of Markdown, and how many rows did not go as expected."""
    text, tally, sure, sigma = [], {}, {}, dict.fromkeys(KINDS, 0.0)
    for kind in KINDS:
        loss = [r["val_loss"] for k, r in runs.items() if k.startswith(f"24/{kind}/off/late/")]
        if len(loss) > 1:
            sigma[kind] = statistics.stdev(loss)
            text += [
                f"{kind}, no fault: val loss {statistics.mean(loss):.4f}, sigma {sigma[kind]:.4f}, n {len(loss)}"
            ]
    titles = "row, fault, model, when, mode, expected, came, gap, lost, found after, actions, false, as expected"
    text += ["", f"| {titles.replace(', ', ' | ')} |", "|---" * 13 + "|"]
    order = {name: i for i, name in enumerate((*FAULTS, *KINDS, *WHEN, "act", "off", "reference"))}
    for key in sorted(runs, key=lambda k: [order.get(w, 0) for w in k.split("/")]):
        row, kind, arm, when, seed = key.split("/")
        fault, run = FAULTS[row], runs[key]
        base = runs.get(f"{24 if fault.lasts else row}/{kind}/off/late/{seed}")
        if (
            row == "0"
            or base is run
            or (not base and when != "scene")
            or (row == "24" and arm == "off")
        ):
            continue
        bits = runs.get(f"0/{kind}/act/{when}/{seed}", {}).get("digest")
        j = judge(fault, when, arm, run, base, max(2 * sigma[kind], 0.01), bits)
        did, noted = (
            ", ".join(f"{n} {what}" for what, n in j[k].items()) for k in ("actions", "notes")
        )
        numbers = [f"{j['gap']:+.4f}" if j["gap"] is not None else None, j["lost"], j["found"]]
        cells = [row, fault.what, kind, when, arm, fault.expected, j["came"]]
        cells += ["-" if x is None else x for x in numbers]
        cells += [(did or "-") + (f" ({noted})" if noted else ""), j["false"]]
        cells += ["yes" if j["good"] else "; ".join(["**no**", *j["wrong"]])]
        text += [f"| {' | '.join(map(str, cells))} |"]
        tally.setdefault(f"{when}, {arm}", []).append((fault, j))
        for basis, confidence, real in j["sure"] if arm == "act" else ():
            step = next(x for x in SURE if confidence >= x)
            sure.setdefault((basis, step), []).append(real)
    for name, mine in tally.items():
        gaps = [
            j["gap"]
            for f, j in mine
            if f.expected == "recover" and f.lasts and j["gap"] == j["gap"] is not None
        ]
        n, false = sum(j["good"] for _, j in mine), sum(j["false"] for _, j in mine)
        text += ["", f"{name}: {n} of {len(mine)} as expected, {false} false actions"]
        text[-1] += (
            f"; gaps: median {statistics.median(gaps):+.4f}, largest {max(gaps):+.4f}"
            if gaps
            else ""
        )
    text += [
        "",
        "Decisions of mode act by confidence; real: made while there was a fault, or within 100 turns of it:",
        "",
    ]
    text += ["| basis | confidence | decisions | real |", "|---" * 4 + "|"]
    text += [
        f"| {basis} | {step:g} and more | {len(x)} | {sum(x)} |"
        for (basis, step), x in sorted(sure.items())
    ]
    wall, cpu = (sum(r[k] for r in runs.values()) / 60 for k in ("seconds", "cpu_seconds"))
    made = ", ".join(sorted({f"{r['commit']} ({r['date']})" for r in runs.values()}))
    text += [
        "",
        f"{len(runs)} runs in {wall:.0f} minutes, {cpu:.0f} of a core's; commit {made}",
        NOTES,
    ]
    return text, sum(not j["good"] for mine in tally.values() for _, j in mine)


# ---------------------------------------------------------------- healthy steps

SMALLER = {
    "vocab_size": 128,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 32,
    "max_seq_len": 16,
}
SMALLER_RUN = {
    "max_steps": 1300,
    "batch_size": 8,
    "eval_tokens": 1024,
    "save_interval": 0,
    "log_interval": 1000,
}
HARD = {
    "plain": {},
    "mix": FAULTS["25a"].keys,
    "tiny batch": {"batch_size": 1},
    "warm-up": {"warmup_steps": 800},
}


def healthy(book: Book, top: str, n: int) -> None:
    """Fault-free runs in turn over seeds, kinds of model and schedules until there are n steps, the easy and the hard
    kinds of run (HARD) taking turns; of seed 0 each once more with mode off, to compare the bits."""
    for i, (seed, kind, schedule) in enumerate(
        itertools.product(range(10**6), KINDS, ("cosine", "wsd"))
    ):
        hard = list(HARD)[(seed + i) % len(HARD)]
        if sum(r["steps"] for r in book.data["healthy"].values()) >= n:
            return
        more = {"seed": seed, "lr_schedule": schedule, "model": SMALLER | KINDS[kind]}
        keys = FAULT_RUN | SMALLER_RUN | HARD[hard] | more

        def both(keys=keys, seed=seed):
            run = in_folder(keys, top)
            rows = [d for d in run["decisions"] if "trigger" in d]
            row = {"code": run["code"], "steps": run["turns"]}
            for name, wanted in (("done", True), ("noted", False)):
                row[name] = Counter(
                    f"{d['trigger']}: {d['action']}" for d in rows if bool(d["level"]) == wanted
                )
            if seed == 0:
                row["same"] = (
                    in_folder(keys | {"orchestrator": {"mode": "off"}}, top)["digest"]
                    == run["digest"]
                )
            return row

        book.once("healthy", f"{seed}/{kind}/{schedule}/{hard}", both)


def healthy_table(rows: dict) -> list[str]:
    if not rows:
        return []
    n, done, noted = sum(r["steps"] for r in rows.values()), Counter(), Counter()
    for r in rows.values():
        done.update(r["done"])
        noted.update(r["noted"])
    same, count = [r["same"] for r in rows.values() if "same" in r], sum(done.values())
    bound = f"{count / n:.2g} a step" if count else f"below {3 / n:.2g} a step at 95 %"
    shape = f"{len(rows)} runs of {SMALLER_RUN['max_steps']}, {SMALLER['n_layers']} x {SMALLER['d_model']}"
    text = f"{n:,} healthy steps ({shape}): {count} interventions, {bound} {dict(done) or ''}; "
    text += f"{sum(noted.values())} notes {dict(noted) or ''}; bits of mode off in {sum(same)} of {len(same)}"
    return ["", text, *(f"  {k}: {r['done']}" for k, r in rows.items() if r["done"])]


if __name__ == "__main__":  # a process of a row about processes
    sys.exit(inside(sys.argv[1]))
