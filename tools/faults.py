"""Faults done to small runs on purpose, and what the orchestrator makes of them.

`python -m tools.bench faults` runs them and prints the table of docs/faults.md. In this order: the
faults and how they get into a run; the runs; the results file; the verdicts and the table; healthy
steps. All of it is done from outside: no line of train.py knows of it. Faults of files and
processes are proven by tests (see PROVEN_BY_TESTS).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lumen import checkpoint, files
from lumen.errors import UserError
from lumen.files import read_lines
from lumen.machine import git_commit
from train import Trainer

# ---------------------------------------------------------------- the runs that are hurt

FAULT_RUN = {
    "data_dir": "@one",  # @: the folder that all of it is in, see at_top
    "max_steps": 600,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "warmup_steps": 0.05,  # as when the table was made
    "device": "cpu",
    "precision": "fp32",
    "compile_model": False,
    "eval_tokens": 16384,
    "save_interval": 200,
    "save_total_limit": 2,
    "log_interval": 100,
    "expert_backend": "slices",
    "seed": 1337,
}
FAULT_MODEL = {
    "vocab_size": 128,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 128,
    "max_seq_len": 64,
    "init_std": 0.02,  # as when the table of docs/faults.md was made: by width it would be 0.057
}
FAULT_MOE = {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 64}
FAULT_MOD = {"mod_capacity": 0.5, "mod_layers": [1], "mod_ffn_only": True}
KINDS = {"dense": {}, "moe": FAULT_MOE, "mod": FAULT_MOD, "hybrid": FAULT_MOE | FAULT_MOD}
MODES = ("act", "off", "reference")  # reference: mode off, and LuminaAI's rules
WHEN = {"late": 320, "early": 40}  # iteration of a fault: all detectors are awake; only the guard
SEEDS = 3  # fault-free runs of each kind of model, whose spread says what a difference means
HELD_AGAINST = "0"  # the row whose bits an exact drop must have
HEALTHY = "24"  # the row without a fault


def corpus(folder: Path, n: int = 800_000, vocab: int = 128, seed: int = 0) -> None:
    """A language to learn, n tokens; the last twentieth is the validation split.

    The next token follows from the last one (half), from the last two (two fifths), or is any (a
    tenth, Zipf). Now and then one of 16 phrases is said.
    """
    rng = np.random.default_rng(seed)
    after_one = rng.integers(0, vocab, (vocab, 4)).tolist()
    after_two = rng.integers(0, vocab, (vocab, vocab, 2)).tolist()
    phrases = rng.integers(0, vocab, (16, 12)).tolist()
    which_phrase = rng.integers(0, 16, n).tolist()
    choices = np.minimum(rng.geometric(0.5, n) - 1, 3).tolist()
    any_token = np.minimum(rng.zipf(1.5, n) - 1, vocab - 1).tolist()
    ids = [0, 0]
    for u, choice, token, phrase in zip(rng.random(n).tolist(), choices, any_token, which_phrase):
        a, b = ids[-2:]
        if u < 0.01:
            ids += phrases[phrase]
        elif u < 0.4:
            ids.append(after_two[a][b][choice % 2])
        elif u < 0.9:
            ids.append(after_one[b][choice])
        else:
            ids.append(token)
    folder.mkdir(parents=True)
    split = n - n // 20
    np.save(folder / "train_00000.npy", np.array(ids[:split], np.uint16))
    np.save(folder / "val_00000.npy", np.array(ids[split:n], np.uint16))


# ---------------------------------------------------------------- how a fault gets into a run
# What stands between two steps is done between two steps, in Trainer.iterations(). Inside a step a
# fault stands in for a method at one of the seams: Parallel.reduce, Loader.batch, the guard and the
# rate. Iterations never come back, so a glitch does not either; the data go on after a rollback, so
# bad batches are behind us.


def now(trainer) -> int:
    """The iteration at work."""
    return trainer.orchestrator.iteration


def during(trainer, at: int, iterations: float = 1) -> bool:
    return at <= now(trainer) < at + iterations


def wrap(owner, name: str, change: Callable) -> None:
    """change(real, *args, **kwargs) stands in for a method."""
    real = getattr(owner, name)
    setattr(owner, name, functools.partial(change, real))


def after_reduce(trainer, act: Callable) -> None:
    """act() when the gradients have been summed, before their norm is taken."""

    def reduce(real, *args):
        found = real(*args)
        act()
        return found

    wrap(trainer.parallel, "reduce", reduce)


# ---------------------------------------------------------------- the faults


def scale_rate(trainer, at, factor, iterations=math.inf):
    def lr_factor(real):
        return real() * factor if during(trainer, at, iterations) else real()

    wrap(trainer.orchestrator, "lr_factor", lr_factor)


def scale_gradient(trainer, at, factor, iterations=1):
    def scale():
        if during(trainer, at, iterations):
            torch._foreach_mul_([p.grad for p in trainer.model.parameters()], factor)

    after_reduce(trainer, scale)


def bad_batches(trainer, at, kind, steps):
    """kind: targets (permuted), random (tokens), one (token)."""

    def batch(real, first_row, count):
        found = real(first_row, count)
        rng = np.random.default_rng(first_row)
        if not 0 <= first_row // trainer.run.rows_per_step - at + 1 < steps:
            return found
        _, x, y, *_ = found  # changed in place
        if kind == "targets":
            y[:] = rng.permuted(y, axis=1)
            return found
        x[:] = rng.integers(0, FAULT_MODEL["vocab_size"], x.shape) if kind == "random" else 7
        y[:] = np.roll(x, -1, axis=1)
        return found

    wrap(trainer.loader, "batch", batch)


def scale_activation(trainer, at, factor, iterations):
    def hook(module, args, output):
        if module.training and during(trainer, at, iterations):
            return output * factor
        return None

    trainer.model.blocks[-1].ffn_norm.register_forward_hook(hook)


def change_weights(trainer, at, change, iterations=1):
    """change(trainer, k) at the top of iteration at + k."""

    def act():
        if during(trainer, at, iterations):
            with torch.no_grad():
                change(trainer, now(trainer) - at)

    return act


def healing_noise(trainer, k, size=2.0, iterations=30):
    """On the weights of a layer's FFN; an equal part of it goes each iteration, unless the weights
    went back."""
    weights = list(trainer.model.blocks[-1].ffn.parameters())
    if k == 0:
        gen = torch.Generator().manual_seed(0)
        trainer.noise = [size * p.std() * torch.randn(p.shape, generator=gen) for p in weights]
    if not trainer.orchestrator.escalation.rollbacks:
        torch._foreach_add_(weights, trainer.noise, alpha=-1 / iterations if k else 1.0)


def push_router(trainer, at, push):
    """Add `push` to the logits of expert 0 in each layer, for the mean of what its router sees."""

    def look(router, args):
        router.seen = args[0].detach().mean(0)

    def change(trainer, k):
        for moe in trainer.moe.values():
            seen = moe.router.seen
            moe.router.weight[0] += push * seen / seen.square().sum()

    for moe in trainer.moe.values():
        moe.router.register_forward_pre_hook(look)
    return change_weights(trainer, at, change)


def flip_bit(trainer, k, bit):
    """Of one weight: bits 23 to 30 are its exponent."""
    weight = trainer.model.blocks[0].attn_norm.weight
    weight.view(torch.int32)[3].bitwise_xor_(1 << bit)


def leave_out(trainer, at):
    """No fault: a batch is dropped. What an exact drop must be equal to."""

    def guard(real, *args):
        bad, _ = real(*args)
        return bad | during(trainer, at), torch.zeros((), dtype=bool)

    wrap(trainer.orchestrator, "guard", guard)


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is done to the run, and what is expected of it."""

    what: str
    inject: Callable | None = None  # (trainer, iteration); may return what each iteration calls
    expected: str = "recover"  # or "stop in order"
    lasts: float = 1  # iterations; an action more than 100 iterations after that is a false one
    kinds: tuple = tuple(KINDS)
    when: tuple = ("late", "early")
    exact: bool = False  # must end with the bits of a run that left this batch out
    needs: str = ""  # must be said in decisions.jsonl
    most: dict = field(default_factory=dict)  # action: how often at most
    keys: dict = field(default_factory=dict)  # of the run


P = functools.partial
LONGER = {"max_steps": 900}  # two rollbacks, each with its time to cool down, and the stop
ADAPTING = {"orchestrator": {"check_interval": 10, "enable_architecture_adaptation": True}}
NO_FAULT = P(Fault, when=("late",), lasts=0)
ROUTER = P(Fault, when=("late",), kinds=("moe", "hybrid"), keys=ADAPTING)
MIX = {
    "sources": {"one": {"dir": "@one"}, "two": {"dir": "@two"}},
    "phases": [{"until": 0.5, "weights": {"one": 1}}, {"weights": {"one": 1, "two": 1}}],
}
STOPS = {"expected": "stop in order", "lasts": math.inf}
# fmt: off
FAULTS = {
    "1": Fault("learning rate x30 for 20 iterations",
               P(scale_rate, factor=30, iterations=20), lasts=20),
    "2": Fault("learning rate x100 forever",
               P(scale_rate, factor=100), most={"rollback": 3}, keys=LONGER, **STOPS),
    "3": Fault("12 batches of random tokens",
               P(bad_batches, kind="random", steps=12), lasts=12, most={"rollback": 0}),
    "4": Fault("12 batches of one token",
               P(bad_batches, kind="one", steps=12), lasts=12, needs="low_loss"),
    "5": Fault("gradient NaN once",
               P(scale_gradient, factor=math.nan), exact=True, needs="nonfinite"),
    "6": Fault("activation Inf once",
               P(scale_activation, factor=math.inf, iterations=1), exact=True,
               needs="blocks.1.ffn_norm"),
    "7": Fault("activation NaN forever",
               P(scale_activation, factor=math.nan, iterations=math.inf), **STOPS),
    "8": Fault("gradient x10,000 once",
               P(scale_gradient, factor=1e4), exact=True, needs="explosion"),
    "9": Fault("gradient x30 for 5 iterations",
               P(scale_gradient, factor=30, iterations=5), lasts=5),
    "10": Fault("targets permuted, 30 batches",
                P(bad_batches, kind="targets", steps=30), lasts=30, needs="divergence"),
    "11": Fault("noise that heals in 30 iterations",
                P(change_weights, change=healing_noise, iterations=31), lasts=30,
                most={"rollback": 0}),
    "14": ROUTER("router pushed to one expert", P(push_router, push=10.0)),
    "15": ROUTER("an expert dies", P(push_router, push=-1e4), lasts=math.inf),
    "16b": Fault("top exponent bit flipped, 1 process",
                 P(change_weights, change=P(flip_bit, bit=30))),
    HEALTHY: NO_FAULT("healthy"),
    "25a": NO_FAULT("healthy, data mix switched", keys={"data_dir": None, "data": MIX}),
    "25b": NO_FAULT("healthy, wsd decay", keys={"lr_schedule": "wsd"}),
    "25c": NO_FAULT("healthy, 2 rows a step", keys={"batch_size": 2}),
    HELD_AGAINST: Fault("a batch left out (what 5, 6, 8 are held against)", leave_out),
}
# fmt: on
TWO_RANKS = "tests/runs/test_orchestrator.py::test_what_befalls_one_rank_of_two"
SURVIVAL = "tests/processes/test_survival.py::test_"
PROVEN_BY_TESTS = {  # files, signals, processes: (fault, the test that does it)
    "12": ("4 rows a micro-step do not fit, 1 of 2 ranks", TWO_RANKS),
    "13": (
        "out of memory in optimizer.step",
        "tests/runs/test_bench.py::test_out_of_memory_in_the_optimizer_restarts_smaller",
    ),
    "16": ("exponent bit flipped, 1 of 2 ranks", TWO_RANKS),
    "17": ("SIGTERM", "tests/runs/test_train.py::test_signals_and_kill"),
    "18": (
        "killed in a save, at each byte and call",
        f"{SURVIVAL}killed_before_any_call_of_a_save_the_run_ends_with_the_same_bytes",
    ),
    "19": (
        "newest checkpoint cut; a bit changed",
        "tests/runs/test_train.py::test_damaged_newest_is_named_and_passed_over",
    ),
    "20": ("disk full for a while", "tests/runs/test_train.py::test_disk_full"),
    "21": ("reading fails twice; then forever", f"{SURVIVAL}two_ranks_agree_and_lose_nothing"),
    "22": ("1 of 2 ranks 0.2 s late, each step", TWO_RANKS),
    "23": ("1 of 2 ranks killed", f"{SURVIVAL}dead_ranks_are_restarted_and_nothing_changes"),
}
QUICK = "1,5,7,8,10,11"

# ---------------------------------------------------------------- the runs


class ReferenceRules:
    """What LuminaAI's trainers do, for comparison; `acted_at`: the iterations at which they would
    act. Without `act`: only listed.

    Loss variance below 0.001 over 50 steps: learning rate x1.5. Gradient norm above 100: a tenth of
    it. 50 iterations between changes.
    """

    def __init__(self, trainer, act: bool):
        self.knobs, self.act = trainer.control, act
        self.losses = deque(maxlen=50)
        self.acted_at: list[int] = []
        self.seen = 0  # the last iteration whose numbers were looked at

    def look(self, numbers) -> None:
        """At a finished step; at the same one only once."""
        if numbers is None or numbers.iteration == self.seen or not math.isfinite(numbers.loss):
            return
        self.seen = numbers.iteration
        self.losses.append(numbers.loss)
        flat = len(self.losses) == 50 and np.var(self.losses) < 0.001
        large = numbers.grad_norm > 100
        last = self.acted_at[-1] if self.acted_at else 0
        if not (flat or large) or numbers.iteration < last + 50:
            return
        self.acted_at.append(numbers.iteration)
        if self.act:
            rate = self.knobs.get_knob("lr_scale") * (0.1 if large else 1.5)
            self.knobs.set_knob("lr_scale", rate)


def train(keys, inject=None, at: int = 0, by_reference_rules: bool = False, make=Trainer) -> dict:
    """Train with a fault: how it ended, what was decided, and a digest of all tensors.

    inject(trainer, at): see Fault; what it returns, if anything, is called at the top of each
    iteration. UserErrors of the run become its exit code, as in train.main. make(keys) -> Trainer.
    """
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        trainer = make(keys)
        rules = ReferenceRules(trainer, by_reference_rules)
        act = inject(trainer, at) if inject else None
        try:
            for _ in trainer.iterations():
                rules.look(trainer.latest)
                if act:
                    act()
            code, reason = trainer.end(), ""
        except UserError as error:
            code, reason = error.exit_code, str(error)
        except Exception as error:
            code, reason = 1, f"{type(error).__name__}: {error}"
        trainer.close()
    if trainer.signals.stop:
        raise KeyboardInterrupt  # what it asked to stop is all of it
    digest = hashlib.sha256()
    for tensor in trainer.tensors().values():
        digest.update(tensor.detach().numpy().tobytes())
    row = {
        "code": code,
        "reason": reason[:300],
        "step": trainer.step,
        "iterations": now(trainer) - (1 if code == 0 else 0),  # an iteration that only ended it
        "val_loss": trainer.progress.val_loss,
        "dropped": trainer.orchestrator.dropped,
        "decisions": decisions_of(trainer.out),
        "reference": len(rules.acted_at),
        "digest": digest.hexdigest()[:16],
        "health": [],
        "kept": newest_clean(trainer.out) if code == 3 else None,
    }
    with contextlib.suppress(OSError):
        lines = (trainer.out / "train.log").read_text(encoding="utf-8").splitlines()
        row["health"] = [line for line in lines if line.startswith("health")]
    return row


def decisions_of(out: Path) -> list[dict]:
    """decisions.jsonl without what differs from run to run."""
    names = ["id", "kind", "step", "turn", "level", "trigger", "action", "executed", "reason"]
    names += ["verdict", "basis", "confidence"]
    return [{k: row[k] for k in names if k in row} for row in read_lines(out / "decisions.jsonl")]


def newest_clean(out: Path) -> int | None:
    """Step of the newest checkpoint that may be trusted: clean, whole, finite. None without one."""
    newest = None
    for step in checkpoint.list_steps(out):
        saved = checkpoint.Checkpoint(checkpoint.step_dir(out, step))
        finite = all(torch.isfinite(x).all() for x in saved.model_state().values())
        if saved.state["clean"] and finite and not saved.verify():
            newest = step
    return newest


def at_top(keys: dict, top: str) -> dict:
    """@ stands for the folder that all of it is in."""
    return json.loads(json.dumps(keys).replace('"@', f'"{top}/'))


def in_folder(keys: dict, top: str, *how) -> dict:
    """train() in a folder that goes with the run."""
    try:
        return train(at_top(keys | {"out_dir": "@run"}, top), *how)
    finally:
        shutil.rmtree(f"{top}/run", ignore_errors=True)


# ---------------------------------------------------------------- the results file


class Results:
    """Finished runs in one JSON file, with commit and date; none is run twice. E117 where it is of
    other sizes."""

    def __init__(self, path: str | Path):
        sizes = [FAULT_RUN, FAULT_MODEL, KINDS, WHEN, SMALLER_MODEL, SMALLER_RUN]
        sizes = json.loads(json.dumps(sizes))
        self.path = Path(path)
        self.data = {"plan": sizes, "runs": {}, "healthy": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        if self.data["plan"] != sizes:
            text = f"{path} holds runs of other sizes than these; give another --out"
            raise UserError("E117", text)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def once(self, part: str, key: str, make: Callable) -> dict:
        """The row `key` of a part (runs, healthy): as it is there, or made now and written."""
        rows = self.data[part]
        if key not in rows:
            began, cpu = time.perf_counter(), sum(os.times()[:4])
            row = make()
            row |= {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": sum(os.times()[:4]) - cpu,
            }
            rows[key] = row | {"commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
            files.write_json(self.path, self.data)
            text = f"{time.strftime('%T')} {key}: {row['seconds']:.0f} s, code {row['code']}"
            print(text, flush=True)
        return rows[key]


@dataclass(frozen=True)
class Part:
    """Rows of the table that one process runs."""

    rows: tuple
    modes: tuple
    kinds: tuple
    times: int = 2  # 2: late and early; 1: late
    with_seeds: bool = True  # fault-free runs with other seeds too, for sigma

    def run(self, path: Path) -> None:
        """What the results file does not hold yet."""
        torch.set_num_threads(1)
        results = Results(path)
        with tempfile.TemporaryDirectory() as top:
            make_data(top)
            for row in self.rows:
                for kind in self.kinds:
                    if kind in FAULTS[row].kinds:
                        self.run_row(results, top, row, kind)

    def run_row(self, results: Results, top: str, row: str, kind: str) -> None:
        """The runs of a row and a kind of model; first those that they are held against."""
        fault = FAULTS[row]
        for i in range(SEEDS if self.with_seeds else 0):
            run_once(results, top, f"{HEALTHY}/{kind}/off/late/{FAULT_RUN['seed'] + i}")
        seed, off = FAULT_RUN["seed"], None
        if "off" in self.modes or not fault.lasts:
            off = run_once(results, top, f"{row}/{kind}/off/late/{seed}")
        if "act" in self.modes:
            for when in fault.when[: self.times]:
                if fault.exact:
                    run_once(results, top, f"{HELD_AGAINST}/{kind}/act/{when}/{seed}")
                run_once(results, top, f"{row}/{kind}/act/{when}/{seed}")
        if "reference" in self.modes and off and off["reference"]:
            run_once(results, top, f"{row}/{kind}/reference/late/{seed}")


def make_data(top: str) -> None:
    corpus(Path(top, "one"))
    corpus(Path(top, "two"), 200_000, seed=1)


def run_once(results: Results, top: str, name: str) -> dict:
    """name: row/kind/mode/when/seed."""
    row, kind, mode, when, seed = name.split("/")
    keys = FAULT_RUN | FAULTS[row].keys
    keys |= {"seed": int(seed), "model": FAULT_MODEL | KINDS[kind]}
    orchestrator = keys.get("orchestrator", {})
    keys["orchestrator"] = orchestrator | {"mode": "act" if mode == "act" else "off"}
    how = (FAULTS[row].inject, WHEN[when], mode == "reference")
    return results.once("runs", name, lambda: in_folder(keys, top, *how))


def chosen(given: str, known, default) -> tuple:
    """--only, --kinds, --modes: words with commas. E002 names those that are not known."""
    words = given.split(",") if given else list(default)
    if unknown := [word for word in words if word not in known]:
        text = f"faults: no {', '.join(unknown)}; there are: {', '.join(known)}"
        if proven := [word for word in unknown if word in PROVEN_BY_TESTS]:
            text += f"; row {proven[0]} is proven by {PROVEN_BY_TESTS[proven[0]][1]}"
        raise UserError("E002", text)
    return tuple(words)


def run(o) -> Results:
    """The runs that the file o.out does not hold yet; o: the options of `tools.bench faults`."""
    if o.quick:
        o.only, o.modes, o.kinds = o.only or QUICK, "act", "dense"
    rows = chosen(o.only, FAULTS, FAULTS)
    modes = chosen(o.modes, MODES, MODES)
    kinds = chosen(o.kinds, KINDS, ("dense", "moe"))
    results = Results(o.out)
    if o.healthy:
        run_healthy(results, o.healthy)
    elif not o.table:
        parts = [Part(rows, modes, (kind,)) for kind in kinds]
        if o.quick:
            parts = two_halves(rows, modes, kinds)
        if len(parts) > 1:
            side_by_side(results, parts)
        else:
            parts[0].run(results.path)
    return Results(o.out)


def two_halves(rows: tuple, modes: tuple, kinds: tuple) -> list[Part]:
    """Of the quick rows, for two cores. What the fault-free runs beside the second half cost is
    SEEDS rows."""
    half = min((len(rows) + SEEDS) // 2, len(rows) - 1)
    first = Part(rows[half:], modes, kinds, 1)
    return [first, Part(rows[:half], modes, kinds, 1, with_seeds=False)]


def side_by_side(results: Results, parts: list[Part]) -> None:
    """Each part in a process and with a file of its own, which this one then takes in."""
    paths = [Path(f"{results.path}.{i}") for i in range(len(parts))]
    running = []
    for part, path in zip(parts, paths):
        if not path.exists():  # else it goes on where it was
            files.write_json(path, results.data)
        process = multiprocessing.get_context("spawn").Process(target=part.run, args=(path,))
        process.start()
        running.append(process)
    for process in running:
        process.join()
    for path in paths:
        results.data["runs"] |= json.loads(path.read_text())["runs"]
    files.write_json(results.path, results.data)
    if any(process.exitcode for process in running):
        text = "faults: a part of it failed, see above; the same command goes on from there"
        raise UserError("E002", text)
    for path in paths:
        path.unlink()


# ---------------------------------------------------------------- verdicts and the table

NOTES = """
recover: completed, with a validation loss at most max(2 sigma of fault-free seeds, 0.01 nats) above
the fault-free run of the same seed. stop in order: E301, and a clean, whole, finite checkpoint is
there. Lost: iterations whose work did not stay. Found after: iterations to the first line of
decisions.jsonl. False: actions before the fault or over 100 iterations after.
early: iteration 40, where the loss has no trend to leave yet (64 accepted steps): only the guard
can help. The same outcome is expected all the same; that the loss's detector says something is not.
off: steps that are not finite are dropped in every mode, and 50 of them in a row stop it.
reference: LuminaAI's rules, where they would have done something.
14, 15: with check_interval 10 and enable_architecture_adaptation: 600 steps are few, and the latter
is off by default.
2: 900 steps, so that there is time for two rollbacks and 200 iterations after each.
25: Lumen has no batch ramp, so that part is left out."""
CONFIDENCES = (0.99, 0.9, 0.75, 0.5, 0.0)  # decisions are counted from each of these up


@dataclass
class Verdict:
    """What came of a run."""

    came: str  # recover | not recovered | stop in order | code N
    gap: float | None  # validation loss above the fault-free run's, nats
    lost: int | None  # iterations whose work did not stay
    found_after: int | None  # iterations from the fault to the first decision
    actions: Counter  # of level 1 and more, that were executed
    info: Counter  # of level 0
    false_actions: int
    confidences: list  # (basis, confidence, whether there was a fault) of each decision
    wrong: list  # what else is not as it should be

    good: bool = False


def judge(fault: Fault, name: str, run: dict, against: dict, limit: float) -> Verdict:
    """A run `name` (row/kind/mode/when/seed) of a fault.

    against: {"base": its fault-free run, "bits": digest of the run that left the batch out, or
    None}. limit: nats that it may lie above the fault-free run.
    """
    _, _, mode, when, _ = name.split("/")
    at, base = WHEN[when], against["base"]
    rows = [d for d in run["decisions"] if d.get("trigger", "user") != "user"]
    actions = [d for d in rows if d["level"] and d["executed"]]
    ended = run["code"] == 0 and run["step"] == fault.keys.get("max_steps", FAULT_RUN["max_steps"])
    came, gap, lost = f"code {run['code']}", None, None
    if run["code"] == 3 and run["kept"] is not None:
        came = "stop in order"
    elif ended:
        gap = run["val_loss"] - base["val_loss"]
        lost = run["iterations"] - run["step"] + run["dropped"]
        came = "recover" if gap <= limit else "not recovered"
    real = {d["id"]: fault.lasts > 0 and 0 <= d["turn"] - at <= fault.lasts + 100 for d in rows}
    verdict = Verdict(
        came=came,
        gap=gap,
        lost=lost,
        found_after=next((d["turn"] - at for d in rows if d["turn"] >= at), None),
        actions=Counter(d["action"] for d in actions),
        info=Counter(d["action"] for d in rows if not d["level"]),
        false_actions=sum(not real[d["id"]] for d in actions),
        confidences=[(d["basis"], d["confidence"], real[d["id"]]) for d in rows],
        wrong=[],
    )
    if mode == "act":
        verdict.wrong = complaints(fault, when, run, verdict, against, rows)
    verdict.good = came == fault.expected and not verdict.wrong
    return verdict


def complaints(fault: Fault, when: str, run, verdict: Verdict, against, rows) -> list[str]:
    """What a run in mode act should have said, done and left, and did not."""
    wrong = []
    said = [f"{d['trigger']} {d['reason']}" for d in rows] + run["health"]
    asleep = when == "early" and fault.needs in ("divergence", "low_loss")
    if fault.needs not in " ".join(said) and not asleep:
        wrong.append(f"nothing said of {fault.needs}")
    for action, most in fault.most.items():
        if verdict.actions[action] > most:
            wrong.append(f"{verdict.actions[action]} x {action}")
    if not fault.lasts and run["digest"] != against["base"]["digest"]:
        wrong.append("not the bits of mode off")
    if fault.exact and against["bits"] and run["digest"] != against["bits"]:
        wrong.append("not the bits without the batch")
    if verdict.false_actions:
        wrong.append(f"{verdict.false_actions} false actions")
    return wrong


def verdicts(runs: dict, limits: dict) -> dict[str, Verdict]:
    """name: verdict, in the order of the table, of the runs that are not only for comparison."""
    words = [*FAULTS, *KINDS, *WHEN, *MODES]
    order = {word: i for i, word in enumerate(words)}
    found = {}
    for name in sorted(runs, key=lambda name: [order.get(word, 0) for word in name.split("/")]):
        row, kind, mode, when, seed = name.split("/")
        if row == HELD_AGAINST or (row == HEALTHY and mode == "off"):
            continue
        base = runs.get(f"{HEALTHY if FAULTS[row].lasts else row}/{kind}/off/late/{seed}")
        if base is None or base is runs[name]:
            continue
        bits = runs.get(f"{HELD_AGAINST}/{kind}/act/{when}/{seed}", {}).get("digest")
        against = {"base": base, "bits": bits}
        found[name] = judge(FAULTS[row], name, runs[name], against, limits[kind])
    return found


def table_row(name: str, verdict: Verdict) -> str:
    row, kind, mode, when, _ = name.split("/")
    fault = FAULTS[row]
    actions = ", ".join(f"{n} {what}" for what, n in verdict.actions.items()) or "-"
    if verdict.info:
        actions += f" ({', '.join(f'{n} {what}' for what, n in verdict.info.items())})"
    gap = None if verdict.gap is None else f"{verdict.gap:+.4f}"
    numbers = ["-" if x is None else x for x in (gap, verdict.lost, verdict.found_after)]
    cells = [row, fault.what, kind, when, mode, fault.expected, verdict.came, *numbers]
    good = "yes" if verdict.good else "; ".join(["**no**", *verdict.wrong])
    cells += [actions, verdict.false_actions, good]
    return f"| {' | '.join(map(str, cells))} |"


def summary_lines(found: dict[str, Verdict]) -> list[str]:
    """For each (when, mode): how many went as expected, and how far from the fault-free run."""
    groups: dict[str, list] = {}
    for name, verdict in found.items():
        row, _, mode, when, _ = name.split("/")
        groups.setdefault(f"{when}, {mode}", []).append((FAULTS[row], verdict))
    lines = []
    for name, group in groups.items():
        good = sum(v.good for _, v in group)
        false = sum(v.false_actions for _, v in group)
        text = f"{name}: {good} of {len(group)} as expected, {false} false actions"
        gaps = []
        for fault, verdict in group:
            if fault.expected == "recover" and fault.lasts and verdict.gap is not None:
                if not math.isnan(verdict.gap):
                    gaps.append(verdict.gap)
        if gaps:
            text += f"; gaps: median {statistics.median(gaps):+.4f}, largest {max(gaps):+.4f}"
        lines += ["", text]
    return lines


def confidence_lines(found: dict[str, Verdict]) -> list[str]:
    """How often there was a fault when mode act decided, by its confidence."""
    counts: dict[tuple, list] = {}
    for name, verdict in found.items():
        if name.split("/")[2] != "act":
            continue
        for basis, confidence, real in verdict.confidences:
            step = next(x for x in CONFIDENCES if confidence >= x)
            counts.setdefault((basis, step), []).append(real)
    head = "Decisions of mode act by confidence; real: made while there was a fault, or within 100"
    lines = ["", f"{head} iterations of it:", ""]
    lines += ["| basis | confidence | decisions | real |", "|---" * 4 + "|"]
    for (basis, step), real in sorted(counts.items()):
        lines.append(f"| {basis} | {step:g} and more | {len(real)} | {sum(real)} |")
    return lines


def fault_table(runs: dict) -> tuple[list[str], int]:
    """Lines of Markdown, and how many rows did not go as expected."""
    lines, limits = [], {}
    for kind in KINDS:
        start = f"{HEALTHY}/{kind}/off/late/"
        losses = [run["val_loss"] for name, run in runs.items() if name.startswith(start)]
        sigma = statistics.stdev(losses) if len(losses) > 1 else 0.0
        limits[kind] = max(2 * sigma, 0.01)
        if len(losses) > 1:
            mean = statistics.mean(losses)
            text = f"{kind}, no fault: val loss {mean:.4f}, sigma {sigma:.4f}, n {len(losses)}"
            lines.append(text)
    found = verdicts(runs, limits)
    titles = ["row", "fault", "model", "when", "mode", "expected", "came", "gap", "lost"]
    titles += ["found after", "actions", "false", "as expected"]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [table_row(name, verdict) for name, verdict in found.items()]
    lines += summary_lines(found)
    lines += ["", "Proven by tests, on real files, signals and processes:", ""]
    lines += ["| row | fault | python -m pytest -m '' |", "|---|---|---|"]
    lines += [f"| {row} | {what} | {test} |" for row, (what, test) in PROVEN_BY_TESTS.items()]
    lines += confidence_lines(found)
    wall, cpu = (sum(run[k] for run in runs.values()) / 60 for k in ("seconds", "cpu_seconds"))
    made = ", ".join(sorted({f"{run['commit']} ({run['date']})" for run in runs.values()}))
    text = f"{len(runs)} runs in {wall:.0f} minutes, {cpu:.0f} of a core's; commit {made}"
    lines += ["", text, NOTES]
    return lines, sum(not verdict.good for verdict in found.values())


# ---------------------------------------------------------------- healthy steps

SMALLER_MODEL = {
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
HARD = {  # kinds of runs, easy and hard
    "plain": {},
    "mix": FAULTS["25a"].keys,
    "tiny batch": {"batch_size": 1},
    "warm-up": {"warmup_steps": 800},
}


def run_healthy(results: Results, n: int) -> None:
    """Fault-free runs over seeds, kinds of model, schedules and HARD, one after the other, until
    there are n steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        make_data(top)
        combinations = itertools.product(range(10**6), KINDS, ("cosine", "wsd"))
        for i, (seed, kind, schedule) in enumerate(combinations):
            if sum(row["steps"] for row in results.data["healthy"].values()) >= n:
                return
            hard = list(HARD)[(seed + i) % len(HARD)]
            keys = FAULT_RUN | SMALLER_RUN | HARD[hard]
            keys |= {"seed": seed, "lr_schedule": schedule, "model": SMALLER_MODEL | KINDS[kind]}
            name = f"{seed}/{kind}/{schedule}/{hard}"
            results.once("healthy", name, functools.partial(healthy_run, keys, top))


def healthy_run(keys: dict, top: str) -> dict:
    """What was decided in a run without a fault; of seed 0 the same once more with mode off, to
    compare the bits."""
    run = in_folder(keys, top)
    rows = [d for d in run["decisions"] if "trigger" in d]
    row = {"code": run["code"], "steps": run["iterations"]}
    row["actions"] = Counter(f"{d['trigger']}: {d['action']}" for d in rows if d["level"])
    row["info"] = Counter(f"{d['trigger']}: {d['action']}" for d in rows if not d["level"])
    if keys["seed"] == 0:
        off = in_folder(keys | {"orchestrator": {"mode": "off"}}, top)
        row["same"] = off["digest"] == run["digest"]
    return row


def healthy_table(rows: dict) -> list[str]:
    if not rows:
        return []
    steps = sum(row["steps"] for row in rows.values())
    actions, info = Counter(), Counter()
    for row in rows.values():
        actions.update(row["actions"])
        info.update(row["info"])
    same = [row["same"] for row in rows.values() if "same" in row]
    count = actions.total()
    bound = f"{count / steps:.2g} a step" if count else f"below {3 / steps:.2g} a step at 95 %"
    model = f"{SMALLER_MODEL['n_layers']} x {SMALLER_MODEL['d_model']}"
    text = f"{steps:,} healthy steps ({len(rows)} runs of {SMALLER_RUN['max_steps']}, {model}):"
    text += f" {count} interventions, {bound} {dict(actions) or ''};"
    text += f" {info.total()} notes {dict(info) or ''};"
    text += f" bits of mode off in {sum(same)} of {len(same)}"
    lines = ["", text]
    for name, row in rows.items():
        if row["actions"]:
            lines.append(f"  {name}: {row['actions']}")
    return lines
