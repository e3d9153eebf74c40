"""What `auto` and null become at the start of a run: `Config`, as written -> `Run`, as resolved.

`resolve` decides in the order of its four steps: batch, length, machine, order of the data (which
is lumen/schedule.py's). What a
checkpoint decided is kept as long as the keys that it follows from still say the same. Nothing here
knows a Trainer: `Facts` is all that is asked of the world outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from lumen import files, mixture, plan, schedule
from lumen import machine as machines
from lumen.attention import BRIEF, pick_attention, shape_of
from lumen.config import SHARDING, Config
from lumen.errors import UserError
from lumen.launch import environment
from lumen.machine import Machine
from lumen.optim import state_bytes
from lumen.schedule import auto_rate, phase_ends, resolve_order, resolve_phases, rise, stretch
from lumen.tryout import as_in_the_run, pick_backend, pick_loss
from lumen.tuning import tuning_of
from model import ModelConfig, Transformer

GIB = 2**30
# a run is refused only this far above the memory: measured, the estimate was at most 6.4 % too high
CERTAIN = 1.1
BATCH_KEYS, LENGTH_KEYS = schedule.BATCH_KEYS, schedule.LENGTH_KEYS


@dataclass(frozen=True)
class Run:
    """What a run does where its configuration left that open.

    Saved as `run` in state.json, and kept on resume.
    """

    # a step's batch
    rows_per_step: int  # over all ranks, whatever their number
    micro_batch: int  # rows of a rank and micro-step
    accumulation: int  # micro-steps a step
    # length and schedule
    max_steps: int
    learning_rate: float  # the peak
    min_lr: float  # where the decay ends
    warmup_steps: int
    peak_step: int  # steps until the learning rate is at its peak
    # machine
    device: str  # cpu | cuda | mps
    precision: str  # fp32 | mixed_bf16 | mixed_fp16
    compile_model: bool
    attention: str  # backend ...
    attention_why: str  # ... and why it is that one
    loss: str  # plain | fused ...
    loss_why: str
    expert_backend: str
    experts_why: str
    deterministic: bool
    # the order of data
    segments: list  # [[row from which on, {source: weight}], ...], the rows ascending
    phases: list = field(default_factory=list)  # of schedule.resolve_phases, the steps ascending


@dataclass
class Facts:
    """What a start knows of its machine, its ranks and its data."""

    written: dict  # the keys as the user wrote them
    readers: int  # ranks that read rows of their own
    layout: plan.Layout  # how the model lies on the ranks
    windows: int | None  # rows of max_seq_len tokens in one pass over the data; None: not known
    weights: dict[str, float]  # of the sources, where `data` has no phases
    model: Transformer  # on the meta device: shapes, no weights
    machine: Machine  # as detected for the written configuration
    memory: float  # bytes that this rank may have
    held: dict[str, int] = field(default_factory=dict)  # `windows` of each source
    hint: int | None = None  # micro-batch that an earlier start's lack of memory asks for ...
    hint_file: Path | None = None  # ... in this file
    dry_run: bool = False  # what does not fit is said, not refused


@dataclass
class Findings:
    """What else came to light: for the start block, for the Trainer, none of it is saved."""

    changes: list[str] = field(default_factory=list)  # what is not as written, or as it was
    hint: str = ""  # how the micro-batch came about
    estimated: bool = False  # batch_size: auto, and no run has proven it yet
    misfit: str = ""  # why the run may not fit into memory
    probes: bool = False  # ... so it is to be tried out
    machine: Machine | None = None  # with the precision of the run
    peak: float = 0.0  # FLOP/s of this rank's matrices


class Kept:
    """What the checkpoint's run had resolved, where that still holds."""

    def __init__(self, saved: dict | None, written: dict, device: str):
        self.run = saved["run"] if saved else {}
        self.then = saved["written"] if saved else {}
        self.written, self.device = written, device

    def get(self, name: str, *keys: str):
        """`name` of its run, or None where the user writes one of `keys` (`name`) otherwise now."""
        if any(self.written.get(key) != self.then.get(key) for key in keys or (name,)):
            return None
        return self.run.get(name)

    def get_here(self, name: str, *keys: str):
        """The same for what suits a kind of device: a CPU's choice does not suit a GPU."""
        then = self.run.get("device", self.device)  # the oldest checkpoints do not say
        return self.get(name, *keys) if then == self.device else None


def gather_facts(cfg: Config, written: dict, data, parallel, hints: Path | None) -> Facts:
    """Of this rank. hints: where an earlier start may have left word of its lack of memory."""
    local_rank = environment("LOCAL_RANK", 0)
    machine = machines.detect(cfg.device, cfg.precision, cfg.compile_model, local_rank)
    hint = read_hint(hints, written.get("batch_size"), machine) if hints else None
    return Facts(
        written=written,
        readers=parallel.rows()[1],
        layout=dataclasses.replace(parallel.layout, documents=data.document_mask is not False),
        windows=data.windows,
        weights=data.weights,
        held={name: source.windows for name, source in data.sources.items()},
        model=meta_model(cfg.model),
        machine=machine,
        memory=machines.own_memory(machine.device),
        hint=hint,
        hint_file=hints / HINT if hints else None,
    )


def resolve_on_all(cfg: Config, facts: Facts, saved: dict | None, found: Findings, parallel) -> Run:
    """Run as rank 0 finds it, on all ranks. UserError where any of them cannot do that."""
    run = parallel.run_or_raise_on_all(resolve, cfg, facts, saved, found)
    run, found.peak = parallel.broadcast((run, found.peak))
    found.machine = dataclasses.replace(found.machine, precision=run.precision)
    # once more, with what rank 0 has chosen: this rank may have less memory
    size = {"micro_batch": run.micro_batch, "rows_per_step": run.rows_per_step}
    args = (cfg, facts, run.precision, size)
    found.misfit = parallel.run_or_raise_on_all(check_memory, *args)
    # where forward and backward hold collectives no rank can try alone
    on_cuda = parallel.device.type == "cuda"
    found.probes = found.estimated and on_cuda and parallel.collective_free
    return run


def resolve(cfg: Config, facts: Facts, saved: dict | None, found: Findings) -> Run:
    """`saved`: the state of the checkpoint to go on from; None: a new run. Fills `found`.

    Raises E002 and E003 for what cannot be, E114 where the data are less than a step, E200 where
    the run cannot fit, E600 where rows cannot be shared. Ranks may come to unlike ends: the caller
    takes rank 0's.
    """
    kept = Kept(saved, facts.written, facts.machine.device.type)
    batch = resolve_batch(cfg, facts, kept, found)
    length = resolve_length(cfg, facts, kept, batch["rows_per_step"], found)
    machine = resolve_machine(cfg, facts, kept, batch | length, found)
    segments = resolve_order(cfg, facts.weights, saved, batch | length)
    return Run(**batch, **length, **machine, segments=segments)


# ---------------------------------------------------------------- batch


def resolve_batch(cfg: Config, facts: Facts, kept: Kept, found: Findings) -> dict:
    """rows_per_step, micro_batch, accumulation. Rows per step stay what they were on any number of
    ranks: accumulation gives way."""
    rows = kept.get("rows_per_step", *BATCH_KEYS) or rows_of_a_step(cfg, facts, found)
    asked = rows_that_fit(cfg, facts, kept, rows // facts.readers, found)
    sizes = [n for n in range(1, min(asked, rows) + 1) if rows % (n * facts.readers) == 0]
    if not sizes:
        can = [world for world in range(1, 2 * facts.readers + 2) if rows % world == 0]
        near = sorted(can, key=lambda world: abs(world - facts.readers))[:2]
        text = f"{rows} rows per step cannot be shared by {facts.readers} processes"
        raise UserError("E600", f"{text}; can: {sorted(near)}")
    micro = max(sizes)
    if micro != asked and facts.written.get("batch_size", "auto") != "auto":
        text = f"batch_size: {asked} does not fit {rows} rows on {facts.readers} ranks: {micro}"
        found.changes.append(text)
    accumulation = rows // (micro * facts.readers)
    return {"rows_per_step": rows, "micro_batch": micro, "accumulation": accumulation}


def rows_of_a_step(cfg: Config, facts: Facts, found: Findings) -> int:
    """As written: batch_tokens, or batch_size x accumulation x ranks. E002 where the two differ."""
    T, readers = cfg.model.max_seq_len, facts.readers
    if not cfg.batch_tokens and cfg.batch_size == "auto":
        rows, why = schedule.auto_rows(cfg, facts, n_working(facts.model))
        found.changes.append(why)
        return rows
    if not cfg.batch_tokens:
        return cfg.batch_size * cfg.gradient_accumulation_steps * readers
    unit = T * readers
    if cfg.batch_tokens % unit:
        near = max(1, round(cfg.batch_tokens / unit)) * unit
        text = f"batch_tokens: {cfg.batch_tokens} is not a multiple of processes x max_seq_len"
        raise UserError("E002", f"{text}, {readers} x {T}; the nearest that is: {near}")
    rows = cfg.batch_tokens // T
    if "gradient_accumulation_steps" in facts.written and cfg.batch_size != "auto":
        product = cfg.batch_size * cfg.gradient_accumulation_steps * readers
        if product != rows:
            text = f"batch_tokens is {rows} rows, batch_size x accumulation x processes {product}"
            raise UserError("E002", f"{text}: drop one")
    return rows


def rows_that_fit(cfg: Config, facts: Facts, kept: Kept, rows: int, found: Findings) -> int:
    """Rows a micro-step, of `rows` a rank and step: as written, or as many as were found to fit, or
    for auto what the estimate says.

    On CUDA a probe has the last word. A CPU kills where CUDA raises, so there the estimate has it.
    """
    known = kept.get_here("micro_batch", "batch_size", "batch_tokens")
    if facts.hint:
        known = min(facts.hint, known or facts.hint)
        found.hint = f"batch_size: {known}, since a larger one ran out of memory"
        found.hint += f" ({facts.hint_file})"
    if cfg.batch_size != "auto":
        return min(cfg.batch_size, known or cfg.batch_size)
    if known:
        return known
    room = cfg.target_memory * facts.memory
    need = {}
    for n in range(1, rows + 1):
        if rows % n == 0:
            step = (n, rows // n, facts.machine.precision, cfg.activation_checkpointing)
            found_bytes = plan.rank_memory(facts.model, facts.layout, *step, plan.IMBALANCE)
            need[n] = found_bytes["total"]
    # 1 where even that is too much: check_memory says so
    best = max((n for n, size in need.items() if size <= room), default=1)
    found.estimated = True
    found.hint = f"batch_size: auto is {best}: about {need[best] / GIB:.2f} of {room / GIB:.2f} GiB"
    return best


# ---------------------------------------------------------------- length and schedule


def resolve_length(cfg: Config, facts: Facts, kept: Kept, rows: int, found: Findings) -> dict:
    """max_steps, learning_rate, min_lr, warmup_steps, peak_step, phases. E114 where the data are
    less than one step."""
    steps = kept_length(cfg, kept)
    if steps is None:
        steps = cfg.max_steps
    T = cfg.model.max_seq_len
    if steps is None and cfg.tokens_per_parameter and facts.windows:
        tokens = (facts.windows * T, rows * T)
        most = 50 if cfg.num_epochs is None else cfg.num_epochs
        working = (n_working(facts.model), *tokens, cfg.tokens_per_parameter)
        steps, why = plan.auto_steps(*working, max_epochs=most)
        found.changes.append(why)
    if steps is None and cfg.num_epochs is None and mixture.sets_length(cfg.data):
        steps = phase_ends(cfg, facts.held, rows, None)[-1]
    if steps is None:
        epochs = 1.0 if cfg.num_epochs is None else cfg.num_epochs
        steps = int((facts.windows or 0) * epochs) // rows
    asked = "max_steps" in facts.written or cfg.num_epochs == 0  # for no step at all
    if steps < 1 and facts.windows is not None and not asked:
        text = f"{facts.windows} rows of {T} tokens are less than one step of {rows}"
        most = facts.windows * T
        key = f"batch_tokens: {most}" if cfg.batch_tokens else "batch_size: 1"
        raise UserError("E114", f"{text}; bring more text, or lower the batch: {key}")
    # kept: a run that was cut short on its way must not move the phases that have been
    phases = kept.get("phases", "data", *LENGTH_KEYS, *BATCH_KEYS)
    if phases is None:
        phases = resolve_phases(cfg, facts.held, rows, steps)
    anew = [phase["step"] for phase in phases if phase["warmup_steps"] is not None]
    first = min([steps, *anew])  # steps of the schedule that the run begins with
    warmup = kept.get("warmup_steps", "warmup_steps", "data", *LENGTH_KEYS, *BATCH_KEYS)
    if warmup is None:
        warmup = min(2000, first // 10) if cfg.warmup_steps is None else cfg.warmup_steps
    if 0 < warmup < 1:
        warmup = round(warmup * first)
    rate = resolve_rate(cfg, facts, kept, rows * T, found)
    return {
        "max_steps": steps,
        "learning_rate": rate,
        "min_lr": rate / 10 if cfg.min_lr is None else cfg.min_lr,
        "warmup_steps": int(warmup),
        "peak_step": rise(cfg.lr_schedule, first, int(warmup)),
        "phases": phases,
    }


def resolve_rate(cfg: Config, facts: Facts, kept: Kept, batch: int, found: Findings) -> float:
    """The peak of the learning rate; a number is never touched. batch: tokens of a step."""
    if cfg.learning_rate != "auto":
        return cfg.learning_rate
    rate = kept.get("learning_rate", "learning_rate", *BATCH_KEYS)
    if rate is None:
        rate, why = auto_rate(facts.model, batch, cfg.optimizer)
        found.changes.append(why)
    return rate


def with_rate(cfg: Config, run: Run) -> Config:
    """cfg with a number where `auto` stood, for all who ask after the start."""
    return dataclasses.replace(cfg, learning_rate=run.learning_rate)


def kept_length(cfg: Config, kept: Kept) -> int | None:
    """The checkpoint's max_steps, where what it follows from still says the same."""
    now, then = [(keys.get("data") or {}).get("phases") for keys in (kept.written, kept.then)]
    if now != then and mixture.sets_length(cfg.data):
        return None
    return kept.get("max_steps", *LENGTH_KEYS)


def with_length(cfg: Config, run: Run, max_steps: int) -> Run:
    """`run` with another end, and what depends on that."""
    _, end, warmup, _ = stretch(dataclasses.replace(run, max_steps=max_steps), 0)
    peak = rise(cfg.lr_schedule, end, warmup)
    return dataclasses.replace(run, max_steps=max_steps, peak_step=peak)


def with_micro_batch(run: Run, size: int, readers: int) -> Run:
    """Rows of a micro-batch; accumulation follows. ValueError where a step cannot be cut so."""
    rows = run.rows_per_step // readers
    if not 0 < size <= rows or rows % size:
        fits = [m for m in range(1, rows + 1) if rows % m == 0]
        near = sorted(fits, key=lambda m: abs(m - size))[:2]
        text = f"batch_size: {size} does not divide the {rows} rows of a rank and step"
        raise ValueError(f"{text}; near it: {near}")
    return dataclasses.replace(run, micro_batch=size, accumulation=rows // size)


def n_working(model: Transformer) -> int:
    """Parameters that work on a token: MoE's active ones, MoD's by their share of the FLOPs."""
    active = model.n_params()["active"]
    return round(active * model.flops_per_token() / flops_without_mod(model.cfg))


def flops_without_mod(model: ModelConfig) -> float:
    """FLOPs a token if no layer left any out."""
    return plan.on_meta(
        dataclasses.replace(model, mod_capacity=1.0, mod_layers=None)
    ).flops_per_token()


def meta_model(model: ModelConfig) -> Transformer:
    """The model as shapes without weights. E002 where its keys contradict each other."""
    try:
        return plan.on_meta(model)
    except ValueError as error:
        raise UserError("E002", str(error)) from error


# ---------------------------------------------------------------- machine


def resolve_machine(cfg: Config, facts: Facts, kept: Kept, run: dict, found: Findings) -> dict:
    """device, precision, compile_model, attention, expert_backend and deterministic.

    `run`: batch and length. What was chosen on this kind of device is kept. E003 and E002 for a
    choice that cannot work here, E200 where the run cannot fit.
    """
    machine = found.machine = with_kept_precision(cfg, facts, kept)
    found.misfit = check_memory(cfg, facts, machine.precision, run)
    found.peak = machines.peak_flops(machine)
    compiled = kept.get_here("compile_model")
    if compiled is None or machine.compile is False:  # there may be no compiler any more
        compiled = machine.compile
    tokens = run["rows_per_step"] * cfg.model.max_seq_len * run["max_steps"]
    # of the whole run, were there nothing but matmuls at their peak
    seconds = facts.model.flops_per_token() * tokens / (found.peak * facts.readers)
    if compiled is None:  # on a CPU it pays in runs of more than ten minutes
        compiled = seconds > 600
    deterministic = kept.get_here("deterministic")
    if deterministic is None:
        deterministic = cfg.deterministic
    if deterministic == "auto":
        deterministic = machine.device.type == "cpu"
    where = (machine.device, machine.compute_dtype)
    shape = shape_of(facts.model, run["micro_batch"], facts.layout.documents)
    brief = seconds < BRIEF
    attention, attention_why = find_attention(cfg, kept, (shape, *where, deterministic, brief))
    loss, loss_why = pick_loss(*where, cfg.model.vocab_size)
    if "softcap" in (cfg.model.extras or []):
        loss, loss_why = "plain", "Triton's kernel knows no softcap"
    experts, experts_why = cfg.expert_backend, ""
    if cfg.model.n_experts:
        with as_in_the_run(deterministic):
            experts, experts_why = pick_experts(cfg, facts, kept, run["micro_batch"], found)
    return {
        "device": machine.device.type,
        "precision": machine.precision,
        "compile_model": compiled,
        "attention": attention,
        "attention_why": attention_why,
        "loss": loss,
        "loss_why": loss_why,
        "expert_backend": experts,
        "experts_why": experts_why,
        "deterministic": deterministic,
    }


def with_kept_precision(cfg: Config, facts: Facts, kept: Kept) -> Machine:
    """The machine in the checkpoint's precision, where `auto` chose that and this hardware can."""
    precision = kept.get_here("precision")
    if cfg.precision == "auto" and precision not in (None, facts.machine.precision):
        with contextlib.suppress(UserError):  # it cannot: today's choice, and compare() says so
            local_rank = environment("LOCAL_RANK", 0)
            return machines.detect(cfg.device, precision, cfg.compile_model, local_rank)
    return facts.machine


def check_memory(cfg: Config, facts: Facts, precision: str, run: dict) -> str:
    """E200 where the run is sure not to fit; else advice where it may not. A dry run is for
    elsewhere: it gets advice only."""
    size = (run["micro_batch"], run["rows_per_step"], (precision, cfg.activation_checkpointing))
    limits = (facts.memory, cfg.target_memory)
    why, sure = misfit(facts.model, facts.layout, *size, *limits)
    if sure and not facts.dry_run:
        raise UserError("E200", why)
    return why and f"this {'will' if sure else 'may'} not fit: {why}"


def find_attention(cfg: Config, kept: Kept, where: tuple) -> tuple[str, str]:
    """The attention backend and why it is that one; where: what pick_attention takes after the
    choice. What the checkpoint's run had stays, if it works here."""
    before = kept.get_here("attention")
    try:
        if before not in (None, "sdpa") and pick_attention(before, *where)[0] == before:
            return before, "as in the checkpoint"
        return pick_attention(before if before == "sdpa" else cfg.attention, *where)
    except ValueError as error:
        raise UserError("E002", str(error)) from error


def pick_experts(
    cfg: Config, facts: Facts, kept: Kept, rows: int, found: Findings
) -> tuple[str, str]:
    """The backend of the expert layers and why it is that one; auto tries and measures them."""
    if found.misfit and facts.dry_run:  # a layer of its experts alone may be too much
        return "slices", "nothing tried, since the run does not fit here"
    m, machine = cfg.model, found.machine
    shape = (m.d_model, m.d_expert, m.n_experts, m.n_experts_per_token, rows * m.max_seq_len)
    where = (machine.device, machine.compute_dtype, *shape)
    if before := kept.get_here("expert_backend"):
        try:
            backend, why = pick_backend(before, *where)
            return backend, why.replace("as asked", "as in the checkpoint")
        except ValueError as error:  # another machine
            found.changes.append(f"expert_backend: {error}")
    try:
        return pick_backend(cfg.expert_backend, *where)
    except ValueError as error:
        raise UserError("E003", f"expert_backend: {error}") from error


def misfit(
    model: Transformer,
    layout: plan.Layout,
    rows: int,
    rows_per_step: int,
    how: tuple,
    have: float,
    share: float = 0.92,
) -> tuple[str, bool]:
    """Why a run cannot fit into `have` bytes a process, and what could, or ""; and whether that is
    certain.

    Certain are states (weights, gradients, moments: exact) above the memory, and an estimate
    CERTAIN times it. how: (precision, recompute). What is named instead takes at most `share` of
    the memory.
    """
    precision, recompute = how
    rank_rows = rows_per_step // layout.world

    def need(rows, recompute):
        args = (rows, rank_rows // rows, precision, recompute, plan.IMBALANCE)
        return plan.rank_memory(model, layout, *args)

    now = need(rows, recompute)
    # the gradients of shards come one by one: in the end there is one for each weight
    gradients = now["gradients"] if layout.shard == 1 else now["weights"]
    states = now["weights"] + gradients + now["moments"]
    total = now["total"]
    if max(states, total) <= have:
        return "", False
    would_fit = []
    for mode in plan.RECOMPUTE[plan.RECOMPUTE.index(recompute) :]:
        sizes = []
        for r in range(1, rows + 1):
            if rank_rows % r == 0 and need(r, mode)["total"] <= share * have:
                sizes.append(r)
        words = [] if mode == recompute else [f"activation_checkpointing: {mode}"]
        if sizes and max(sizes) < rows:
            words.append(f"batch_size: {max(sizes)}")
        if sizes and words:
            would_fit.append(" with ".join(words))
    there = f"and there are {have / GIB:.1f} GiB"
    text = f"about {total / GIB:.1f} GiB a process, {there}"
    if would_fit:
        return f"{text}; {' or '.join(would_fit)} would fit", total > CERTAIN * have
    if states > have:
        text = f"weights, gradients and moments alone are {states / GIB:.1f} GiB a process, {there}"
        text += ": no batch_size helps"
    else:
        least = need(1, "block")["total"] / GIB
        text += f", and one row with activation_checkpointing: block still needs about {least:.1f}"
    certain = states > have or total > CERTAIN * have
    return f"{text}. {who_holds(model, layout, share)}", certain


def who_holds(model: Transformer, layout: plan.Layout, share: float) -> str:
    """The smallest GPU for a replica and the fewest for shards, whatever the batch; one row in
    mixed_bf16."""
    replica = plan.Layout(state_bytes=layout.state_bytes, tuning=layout.tuning)
    need = plan.rank_memory(model, replica, 1, 2, "mixed_bf16", "block")["total"]
    fitting = [gb for gb in plan.SIZES if need <= share * gb * 1e9]
    holder = f"a GPU of {fitting[0]} GB" if fitting else "more than any GPU has"
    text = f"Replicated it needs about {need / GIB:.1f} GiB: {holder}"
    if layout.tuning.r:  # train_fsdp.py takes no adapters
        return text
    stage = layout.zero_stage or 3
    how = ("mixed_bf16", share, (layout.state_bytes, layout.tuning))
    shards, _ = plan.fewest_gpus_text(model, stage, 1 << 13, *how)
    return f"{text}; train_fsdp.py needs {' or '.join(shards)}"


def check_states(cfg: Config, layout: plan.Layout) -> None:
    """E200 where not even one row would fit: before data is prepared, processes meet and anything
    is built."""
    machine = machines.detect(cfg.device, cfg.precision, False, environment("LOCAL_RANK", 0))
    cuda = machine.device.type == "cuda"
    known = {"cuda": cuda, "state_bytes": state_bytes(cfg), "tuning": tuning_of(cfg)}
    layout = dataclasses.replace(layout, **known)
    # a vocabulary that the data will name can only make it larger
    model = meta_model(dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 1))
    limits = (machines.own_memory(machine.device), cfg.target_memory)
    why, sure = misfit(model, layout, 1, layout.world, (machine.precision, "block"), *limits)
    if sure:
        raise UserError("E200", why)


# ---------------------------------------------------------------- as it is written down


def resolved(cfg: Config, run: Run) -> dict:
    """The configuration, after with_rate, with all that `run` has found: config.yaml, and `config`
    in state.json."""
    keys = dataclasses.asdict(cfg)
    for name in ("max_steps", "min_lr", "warmup_steps", "precision", "compile_model", "attention"):
        keys[name] = getattr(run, name)
    keys["deterministic"] = run.deterministic
    keys["expert_backend"] = run.expert_backend
    keys["batch_size"] = run.micro_batch
    keys["gradient_accumulation_steps"] = run.accumulation
    return keys


def without_effect(cfg: Config, written: dict) -> list[str]:
    """A note, where ranks hold replicas, on keys that only train_fsdp.py obeys. A run's own
    config.yaml has all of them; at its default a key asks for nothing."""
    default = Config()
    given = [k for k in SHARDING if k in written and getattr(cfg, k) != getattr(default, k)]
    if "zero_stage" in given and cfg.zero_stage == 0:  # that is what this is
        given.remove("zero_stage")
    text = "takes effect under train_fsdp.py, on several ranks"
    return [f"{', '.join(given)}: {text}"] if given else []


# ---------------------------------------------------------------- what a start learnt of memory

HINT = "oom_hint.json"


def memory_at_hand(machine: Machine) -> list:
    """Which device ran out of memory, or would: its name and GiB."""
    return [machine.name, round(machines.total_memory(machine.device) / GIB)]


def read_hint(out: Path, batch_size, machine: Machine) -> int | None:
    """The micro-batch that a start before this one left, where it still holds: on such a device,
    and for `batch_size` as written; None without one."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        hint = json.loads((out / HINT).read_text())
        if hint.get("device") in (None, memory_at_hand(machine)) and hint["written"] == batch_size:
            return hint["micro_batch"]
    return None


def write_hint(out: Path, rank: int, hint: dict) -> None:
    """Whichever rank ran out of memory, or all of them at once."""
    own = out / f"oom_hint.{rank}.json"
    with contextlib.suppress(OSError):
        files.write_json(own, hint)
        own.replace(out / HINT)
