"""What a step is of a run: which phase of its data it belongs to, and its learning rate.

Both are functions of the configuration, the resolved run and the step, and of nothing else: there
is no state to save, and a resumed run needs no scheduler that is wound forward. The two rules for
who writes `auto`, of the rate and of the tokens a step, stand here too.
"""

from __future__ import annotations

import dataclasses
import math

from lumen import mixture
from lumen.config import Config
from lumen.errors import UserError
from lumen.optim import OPTIMIZERS
from model import Transformer

# `learning_rate: auto`, the default. Step Law (Li et al. 2025, 2503.04715) has rate ~ N^-0.713
# D^0.307 for N parameters and D tokens and a best batch ~ D^0.571; at that batch D^0.307 is about
# its square root. Its constant is of 60 M parameters and more, and twice too high for 1 M: ours is
# what a sweep of the quickstart found best. Sweeps at 2 and 10 M parameters confirm the exponent:
# there the rule is within 1.2 % of the best loss (EXPERIMENTS.md). Nothing larger, and no larger
# batch, was swept.
BEST_RATE = 4.5e-3  # AdamW; another optimizer's is RATE times that
OF_PARAMETERS = 804_480  # active, without embedding and head
OF_BATCH = 2048  # tokens a step
RATE_BY_PARAMETERS = -0.713
RATE_BY_BATCH = 0.5
LARGEST_RATE = 6e-3  # 1e-2 was worse with a short warm-up
# `batch_size: auto` without batch_tokens: Step Law's best batch of a run that reads D tokens, which
# hardly depends on the model. Where it says 2,160 and 1,630 (1.8 and 1.1 M tokens), 2,048 and 1,024
# were the best tried (EXPERIMENTS.md, the size of the quickstart). Nothing larger was tried here.
BATCH = 0.58  # tokens
BATCH_BY_TOKENS = 0.571
USUAL_LENGTH = 20  # tokens a parameter (Hoffmann et al. 2022)
FEW_STEPS = 30  # below that a fine-tuning has hardly begun
# what the rows of a step follow from, and the length of a run
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps", "batch_tokens")
LENGTH_KEYS = ("max_steps", "num_epochs", "tokens_per_parameter")

# ---------------------------------------------------------------- little data


def one_row_steps(windows: int, readers: int) -> tuple[int, int]:
    """(epochs, steps) of a row a rank with which little data become a fine-tuning of four times
    FEW_STEPS; (0, 0): there is not even one step."""
    epoch = windows // readers
    if not epoch:
        return 0, 0
    epochs = math.ceil(4 * FEW_STEPS / epoch)
    return epochs, epochs * epoch


def enough_steps(cfg: Config, facts, saved: dict | None, found) -> Config:
    """A fine-tuning whose batch and length nobody has written, and which would end before it has
    learned: a row a step, and as many epochs as it takes. facts, found: of lumen.resolve.

    saved: the state to go on from, which keeps its rows and steps; here it keeps its epochs.
    """
    keys = (*BATCH_KEYS, *LENGTH_KEYS)
    if mixture.sets_length(cfg.data) or cfg.num_epochs is None:
        return cfg
    if any(facts.written.get(key) is not None for key in keys):
        return cfg
    if saved:
        then = saved["written"]
        same = all(then.get(key) is None for key in keys)
        epochs = saved["config"]["num_epochs"] if same else cfg.num_epochs
        return dataclasses.replace(cfg, num_epochs=epochs)
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * facts.readers
    steps = int((facts.windows or 0) * cfg.num_epochs) // rows
    epochs, _ = one_row_steps(facts.windows or 0, facts.readers)
    if steps >= FEW_STEPS or not epochs:
        return cfg
    epochs = max(epochs, cfg.num_epochs)
    text = f"batch_size 1, num_epochs {epochs:g}: {facts.windows:,} rows in steps of {rows}"
    found.changes.append(f"{text} are {steps} steps, which teach little")
    return dataclasses.replace(cfg, batch_size=1, num_epochs=epochs)


# ---------------------------------------------------------------- tokens a step


def auto_rows(cfg: Config, facts, n_working: int) -> tuple[int, str]:
    """(rows of a step, why) for who asks for `batch_size: auto` alone: the law's batch, in such
    rows a rank that many micro-batches divide them: 1, 2, 3, 4, 6, 8, 12 ... facts: a resolve.Facts

    E002 where the data are not known yet.
    """
    if facts.windows is None:
        text = "batch_size: auto goes by the run's tokens, and its data are not prepared yet"
        raise UserError("E002", f"{text}; give batch_tokens")
    tokens, what = tokens_to_read(cfg, facts, n_working)
    unit = cfg.model.max_seq_len * facts.readers
    best = BATCH * tokens**BATCH_BY_TOKENS
    sizes = sorted({1, *(n * 2**k for k in range(40) for n in (2, 3))})
    rows = facts.readers * min(sizes, key=lambda n: abs(math.log(n * unit / max(1.0, best))))
    text = f"batch_size auto: {rows * cfg.model.max_seq_len:,} tokens a step, near {BATCH} x"
    text += f" D^{BATCH_BY_TOKENS} = {best:,.0f}, Step Law's best"
    text += f" for D = {tokens:,.0f} tokens: {what}"
    if "gradient_accumulation_steps" in facts.written:
        text += "; gradient_accumulation_steps follows from it"
    return rows, f"{text}; batch_tokens sets another (docs/recipe.md)"


def tokens_to_read(cfg: Config, facts, n_working: int) -> tuple[float, str]:
    """(how many tokens a run will read, before its batch is known; what they are).

    max_steps alone leaves them open: then it is the length that suggested.yaml would name.
    """
    data = facts.windows * cfg.model.max_seq_len
    if cfg.max_steps is not None:
        what = f"{USUAL_LENGTH} a parameter, in one pass over the data at most"
        return min(USUAL_LENGTH * n_working, data), what
    if cfg.tokens_per_parameter:
        most = 50 if cfg.num_epochs is None else cfg.num_epochs
        return min(cfg.tokens_per_parameter * n_working, most * data), "by tokens_per_parameter"
    if cfg.num_epochs is None and mixture.sets_length(cfg.data):
        return phase_ends(cfg, facts.held, 1, None)[-1] * cfg.model.max_seq_len, "by data.phases"
    epochs = 1 if cfg.num_epochs is None else cfg.num_epochs
    return epochs * data, f"{epochs:g} x the data"


# ---------------------------------------------------------------- the learning rate


def auto_rate(model: Transformer, batch_tokens: int, optimizer="adamw") -> tuple[float, str]:
    """(the peak of the learning rate, why) for who asks for `auto`; model: on the meta device."""
    times = OPTIMIZERS[optimizer].RATE
    best, most = times * BEST_RATE, times * LARGEST_RATE
    counts = model.n_params()
    n = counts["active"] - (counts["total"] - counts["non_embedding"])
    rate = best * (n / OF_PARAMETERS) ** RATE_BY_PARAMETERS
    rate *= (batch_tokens / OF_BATCH) ** RATE_BY_BATCH
    rate = float(f"{min(rate, most):.2g}")
    text = f"learning_rate auto is {rate:g}: {best:.2g}"
    text += f" x ({n / 1e6:.3g} M active parameters / {OF_PARAMETERS / 1e6:.3g} M)"
    text += f"^{RATE_BY_PARAMETERS} x ({batch_tokens:,} tokens a step / {OF_BATCH:,})"
    return rate, f"{text}^{RATE_BY_BATCH}, at most {most:.2g} (docs/recipe.md)"


def every(interval: int, step: int) -> bool:
    """Whether `step` is one of every `interval` steps; never with interval 0."""
    return interval > 0 and step % interval == 0


def lr_at(cfg: Config, run, step: int) -> float:
    """The learning rate of a step (from 0) of run.max_steps, before the orchestrator's factor.

    Note that a rollback takes the schedule back with it.
    """
    begin, end, warmup, scale = stretch(run, step)
    return scale * curve(cfg, run.min_lr, step - begin, end - begin, warmup)


def stretch(run, step: int) -> tuple[int, int, int, float]:
    """(first step, end, warm-up steps, factor) of the schedule that `step` lies in.

    A run has one schedule, unless a phase of its data warms up anew: there the schedule so far has
    ended, and another begins (re-warming and re-decaying, Ibrahim et al. 2024, 2403.08763).
    """
    begin, end, warmup, scale = 0, run.max_steps, run.warmup_steps, 1.0
    for phase in run.phases:
        anew = phase["warmup_steps"] is not None
        if phase["step"] <= step:
            scale = phase["lr_scale"]
            if anew:
                begin, warmup = phase["step"], phase["warmup_steps"]
        elif anew:  # a run that was cut short may end before
            return begin, min(end, phase["step"]), warmup, scale
    return begin, end, warmup, scale


def curve(cfg: Config, low: float, step: int, n: int, warmup: int) -> float:
    """The learning rate of a step of a schedule of n steps that ends at `low`."""
    peak = cfg.learning_rate
    if cfg.lr_schedule == "onecycle":  # Smith 2018: cosine up over 30 %, cosine down over the rest
        up = rise(cfg.lr_schedule, n, warmup)
        if step < up:
            return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * step / up)) / 2
        return low + (peak - low) * (1 + math.cos(math.pi * (step - up) / max(1, n - up))) / 2
    # linear warm-up; step + 1, or the first step would change nothing
    if step < warmup:
        return peak * (step + 1) / warmup
    if cfg.lr_schedule == "constant":
        return peak
    if cfg.lr_schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, MiniCPM)
        # the one that can be made longer afterwards: until the decay it does not know the end
        decay = max(1, round(cfg.decay_frac * n))
        return low + (peak - low) * min(1.0, (n - step) / decay)
    # what is left: a cosine, or a straight line, from the peak to min_lr
    done = (step - warmup) / max(1, n - warmup)
    cosine = cfg.lr_schedule == "cosine"
    share = (1 + math.cos(math.pi * done)) / 2 if cosine else 1 - done
    return low + (peak - low) * share


def rise(schedule: str, max_steps: int, warmup_steps: int) -> int:
    """Steps until the learning rate is at its peak."""
    return max(1, int(0.3 * max_steps)) if schedule == "onecycle" else warmup_steps


# ---------------------------------------------------------------- phases of the data


def phase_ends(cfg: Config, windows: dict[str, int], rows: int, max_steps: int | None) -> list[int]:
    """The step at which each phase ends: int (n_phases,). E002 where one would end before it
    begins.

    windows: rows in one pass over each source; rows: of a step; max_steps: None where the phases
    alone set the length. So many `epochs` are so many times the rows that the sources of the phase
    hold, as num_epochs counts them.
    """
    ends, at = [], 0
    for i, phase in enumerate(mixture.phases_of(cfg.data)):
        if "epochs" in phase:
            held = sum(windows.get(name, 0) for name, w in phase["weights"].items() if w)
            end = at + max(1, int(held * phase["epochs"]) // rows)
        elif "tokens" in phase:
            end = at + max(1, round(phase["tokens"] / (rows * cfg.model.max_seq_len)))
        else:
            until = phase.get("until", max_steps)
            end = round(until * max_steps) if until <= 1 else int(until)
        if end < at:
            text = f"data.phases[{i}] ends at step {end}, before it begins at step {at}"
            raise UserError("E002", text)
        ends.append(end)
        at = end
    return ends


def resolve_phases(cfg: Config, windows: dict[str, int], rows: int, max_steps: int) -> list[dict]:
    """What Run.phases holds: {step, name, lr_scale, warmup_steps} of each phase, from the step on
    which it begins; warmup_steps: None where the schedule of the phase before goes on. E002."""
    found, at = [], 0
    ends = phase_ends(cfg, windows, rows, max_steps)
    for phase, end in zip(mixture.phases_of(cfg.data), ends):
        warmup = phase.get("warmup_steps")
        if warmup is not None and 0 < warmup < 1:
            warmup = round(warmup * (end - at))
        row = {"step": at, "name": phase.get("name"), "lr_scale": phase.get("lr_scale", 1.0)}
        found.append(row | {"warmup_steps": None if warmup is None else int(warmup)})
        at = end
    return found


def resolve_order(cfg: Config, weights: dict, saved: dict | None, run: dict) -> list:
    """Segments of source weights over the cursor. On resume what lies in the past stays as it was:
    which row came where is a matter of record.

    weights: of the sources where `data` has no phases; run: rows_per_step and phases.
    """
    segments = []
    for phase, resolved in zip(mixture.phases_of(cfg.data), run["phases"]):
        segments.append([resolved["step"] * run["rows_per_step"], phase["weights"]])
    segments = segments or [[0, weights]]
    if saved is None or saved["run"]["segments"] == segments:
        return segments
    cursor = saved["cursor"]
    # what has begun; it may name a source that is gone, see Loader
    past = [segment for segment in saved["run"]["segments"] if segment[0] < cursor]
    future = [segment for segment in segments if segment[0] > cursor]
    current = [now for start, now in segments if start <= cursor][-1]
    if not past:
        past = [[0, current]]
    elif past[-1][1] != current:
        past.append([cursor, current])
    return past + future


# ---------------------------------------------------------------- as the start-up block says it


def mixture_lines(run, sources: dict) -> list[str]:
    """A line for each phase: when, of what, how often, and how its learning rate differs."""
    if len(run.segments) * len(sources) <= 1:
        return []
    lines, total = [], dict.fromkeys(sources, 0.0)
    phases = {phase["step"]: phase for phase in run.phases}
    end = run.max_steps * run.rows_per_step
    ends = [*(first for first, _ in run.segments[1:]), end]
    for (first, weights), last in zip(run.segments, ends):
        step, rows = first // run.rows_per_step, max(0, min(last, end) - first)
        phase = phases.get(step, {})
        parts = []
        for name, weight in weights.items():
            if not weight or name not in sources:
                continue
            share = weight / sum(weights.values())
            epochs = share * rows / sources[name].windows
            total[name] += epochs
            parts.append(f"{name} {100 * share:.1f} % ({epochs:.2f} epochs)")
        text = f"{phase.get('name') or 'data'} from step {step:,}: {', '.join(parts)}"
        lines.append(f"mixture    {text}{rate_text(phase)}")
        if not rows:
            lines.append("advice     the run ends before that begins: raise max_steps")
    for name, epochs in total.items():
        if epochs > 4:
            text = f"{name} is read {epochs:.1f} times; beyond 4 epochs repeats fade"
            lines.append(f"advice     {text}: give it less weight, or add data")
    return lines


def rate_text(phase: dict) -> str:
    """How the learning rate of a phase differs from a schedule without phases; "": it does not."""
    text = ""
    if phase.get("lr_scale", 1.0) != 1.0:
        text = f"; learning rate x {phase['lr_scale']:g}"
    if phase.get("warmup_steps") is not None:
        text += f"; the schedule begins anew with {phase['warmup_steps']} warm-up steps"
    return text
