"""What a run says, made of plain values: lines for the console, rows for metrics.jsonl.

In the order in which they are seen: the block at a start, a log step, sparse layers, an evaluation,
suggested.yaml. Nobody here looks into a Trainer, writes a file or prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import yaml

from lumen import fp8, model_keys, muon, plan, waiting
from lumen import machine as machines
from lumen.buckets import undivided
from lumen.config import Config
from lumen.forecast import BAND
from lumen.hf import refusals
from lumen.launch import clock
from lumen.machine import resident_bytes
from lumen.resolve import Run, resolved
from lumen.schedule import mixture_lines
from lumen.stopwatch import Interval
from lumen.sums import StepNumbers
from model import ModelConfig, Transformer
from model_moe import MoD

# of the block at a start what only train.log gets, and --dry_run: the reasons and the arithmetic
DETAILS = ("plan", "muon", "backend", "compute", "settings", "attention", "loss", "parts")
FEW_ROWS = 16  # below that differences of val_loss are mostly noise


@dataclass
class Start:
    """All that the start lines are made of."""

    cfg: Config
    run: Run
    model: Transformer  # on the meta device: it has shapes, no weights
    machine: machines.Machine
    layout: plan.Layout
    readers: int  # ranks that read rows of their own
    sources: dict  # lumen.windows.Source by name: the training splits, and those held out
    val_sources: dict
    n_working: int  # parameters that work on a token: plan's and Chinchilla's N
    flops_per_token: float
    peak: float = 0.0  # FLOP/s of one rank's matrices
    world: int = 1
    lr_at_peak: float = 0.0  # the scheduled rate at the end of the warm-up, and of the last step
    last_lr: float = 0.0
    misfit: str = ""  # why it may not fit into memory
    notes: list[str] = field(default_factory=list)
    fine_tunes: bool = False  # a base has been trained: laws of training from scratch say nothing
    elsewhere: bool = False  # a dry run for other hardware: this machine computes nothing

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.run.rows_per_step * self.cfg.model.max_seq_len * self.run.max_steps

    @property
    def windows(self) -> int:
        """Rows that the training data hold."""
        return sum(source.windows for source in self.sources.values())


def start_lines(start: Start) -> list[str]:
    """The whole block."""
    cfg, run = start.cfg, start.run
    lines = [f"note       {note}" for note in start.notes]
    lines += model_lines(cfg.model, start.model.n_params(), start.flops_per_token)
    lines += sparse_lines(cfg.model, run.expert_backend, run.experts_why, run.max_steps)
    lines += data_lines(start.sources, start.val_sources)
    lines += length_lines(start)
    lines += mixture_lines(run, start.sources)
    lines += [schedule_line(cfg, run.min_lr, run.peak_step), *muon_lines(start)]
    advice = rate_advice(cfg, run.max_steps, run.peak_step, start.lr_at_peak, start.last_lr)
    advice += validation_advice(cfg, start.sources, start.val_sources)
    lines += [f"advice     {text}" for text in advice]
    if start.elsewhere:
        return lines
    return lines + machine_lines(start) + [f"advice     {text}" for text in machine_advice(start)]


# ---------------------------------------------------------------- a start: model and data


def model_lines(m: ModelConfig, n: dict[str, int], flops: float) -> list[str]:
    """n: the counts of Transformer.n_params; flops: of a token, forward and backward."""
    heads = f"{m.n_heads} heads"
    if m.n_kv_heads != m.n_heads:
        heads += f", {m.n_kv_heads} of keys and values"
    shape = f"{m.n_layers} layers x {m.d_model}, {heads}, d_ff {m.d_ff}, vocab {m.vocab_size}"
    text = f"{n['total']:,}, {n['non_embedding']:,} without embeddings"
    if n["active"] != n["total"]:
        text += f", {n['active']:,} active"
    text += f"; {machines.human_number(flops, 'FLOP')} a token"
    return [f"model      {shape}", f"parameters {text}"]


def sparse_lines(m: ModelConfig, backend: str, why: str, max_steps: int) -> list[str]:
    """On MoE, MoD and extras; `backend` is that of the experts, `why` the reason for it."""
    moe = [i for i in range(m.n_layers) if m.is_moe(i)]
    mod = [i for i in range(m.n_layers) if m.capacity(i) < 1]
    lines = []
    if moe:
        lines.append(f"experts    {moe_text(m, len(moe))}")
        lines.append(f"backend    {backend}: {why}")
    if mod:
        lines.append(f"depth      {mod_text(m, mod)}")
        if m.mod_anneal_steps > max_steps:
            text = f"mod_anneal_steps {m.mod_anneal_steps}: the run ends before capacity has fallen"
            lines.append(f"advice     {text}")
    if m.extras:
        lines.append(f"extras     {', '.join(m.extras)}")
    if idle := model_keys.idle(m):
        text = "without effect, for n_experts or mod_capacity is not set"
        lines.append(f"advice     {text}: {', '.join(idle)}")
    for reason in refusals(m)[:3]:
        lines.append(f"advice     will not export to Hugging Face: {reason}")
    return lines


def moe_text(m: ModelConfig, n_layers: int) -> str:
    text = f"{m.n_experts_per_token} of {m.n_experts} x {m.d_expert}"
    if m.n_shared_experts:
        text += f", {m.n_shared_experts} shared"
    if m.n_null_experts:
        text += f", {m.n_null_experts} null"
    if m.n_experts_max:
        text += f", {m.n_experts_max} slots"
    text += f" in {n_layers} layers; {m.router}"
    if m.norm_topk:
        text += ", renormalised"
    text += f"; balance: loss {m.aux_loss_weight:g}, bias {m.bias_update_rate:g}"
    return f"{text}; capacity {m.capacity_factor:g}" if m.capacity_factor else f"{text}; dropless"


def mod_text(m: ModelConfig, layers: list[int]) -> str:
    mean = sum(m.capacity(i) for i in layers) / len(layers)
    part = "FFN" if m.mod_ffn_only else "block"
    text = f"{m.mod_routing} routing, capacity {mean:.3g}, {part} of {len(layers)} layers"
    if m.mod_anneal_steps:
        text += f", from 1.0 over {m.mod_anneal_steps} steps"
    return text


def data_lines(sources: dict, val_sources: dict) -> list[str]:
    """A line for each source."""
    if not sources:
        text = "not prepared yet: its size, and a length that follows from it, are unknown"
        return [f"data       {text}"]
    lines = []
    for name, source in undivided(sources).items():
        held_out = val_sources[name].tokens if name in val_sources else 0
        text = f"{source.tokens:,} train tokens, {held_out:,} val"
        if source.bare and held_out:
            text += " (tail held out)"
        unused = 100 * source.unused / max(1, source.tokens)
        if unused >= 0.1:  # what is left of each file behind its last whole row
            text += f", {unused:.1f} % unused"
        if len(sources) > 1:
            text = f"{name}: {text}"
        lines.append(f"data       {text}; {source.path}")
    return lines


# ---------------------------------------------------------------- a start: length and schedule


def length_lines(start: Start) -> list[str]:
    """A step's tokens and the run's, and how they compare with Chinchilla's."""
    cfg, run, T = start.cfg, start.run, start.cfg.model.max_seq_len
    batch = f"{run.rows_per_step * T:,} tokens a step: {run.micro_batch} rows x {T} tokens"
    if run.accumulation > 1:
        batch += f" x {run.accumulation} micro-steps"
    if start.readers > 1:
        batch += f" x {start.readers} ranks"
    lines = [f"batch      {batch}"]
    length = f"length     {run.max_steps:,} steps, {start.tokens:,} tokens"
    if not run.max_steps:
        return [*lines, "length     unknown: follows from data that are not prepared yet"]
    if not start.windows:
        return [*lines, length]
    epochs = run.rows_per_step * run.max_steps / start.windows
    length += f", {epochs:,.2f} epochs"
    if start.fine_tunes:
        return [*lines, length]
    counts = (start.n_working, start.windows * T, start.tokens, start.flops_per_token)
    ratio = cfg.tokens_per_parameter or 20.0
    found = plan.chinchilla(*counts, ratio, moe=bool(cfg.model.n_experts))
    target = machines.human_number(found["target_tokens"])
    if epochs > 1:
        length += f" that count as {machines.human_number(found['effective_tokens'])} tokens"
    length += f", {100 * found['coverage']:.3g} % of Chinchilla's {target}"
    return [*lines, length, *plan_lines(found)]


def plan_lines(p: dict) -> list[str]:
    """The start-up lines on `p`, a plan of plan.chinchilla, advice last."""
    numbers = {k: machines.human_number(v) for k, v in p.items() if isinstance(v, (int, float))}
    text = f"{numbers['n_params_active']} active parameters;"
    text += f" {numbers['planned_tokens']} tokens planned, {numbers['unique_tokens']} unique:"
    lines = [f"plan       {text} {p['epochs']:.2f} epochs"]
    text = f"target {numbers['target_tokens']} tokens, {p['multiplier']:g} a parameter: coverage"
    text += f" {100 * p['coverage']:.3g} %"
    if p["epochs"] > 1:
        text += f" (repeats count as {numbers['effective_tokens']} tokens)"
    lines.append(f"plan       {text}")
    compute = "no other size and length would need much less compute"
    if p["extra_compute"] >= 0.05:
        times = f"{1 + p['extra_compute']:.3g} times"
        compute = f"needs {times} the compute that the best size and length would need"
    text = f"{p['tokens_per_param']:.3g} tokens a parameter, {p['band']} the flat band"
    text += f" {BAND[0]} to {BAND[1]}: {compute} for this loss"
    lines.append(f"plan       {text}")
    if p["extrapolated"]:
        text = f"extrapolated: {', '.join(p['extrapolated'])} outside the law's data"
        lines.append(f"plan       {text}")
    if p["moe"]:
        text = "that law is of dense models, on active parameters a lower bound"
        lines.append(f"plan       {text}: MoE usually wants more")
    if p["epochs"] > 4:
        text = (
            f"beyond 4 epochs repeats fade: a token of the last counts {p['last_epoch_value']:.2f}"
        )
        lines.append(f"advice     {text}")
    if p["data_limited"]:
        low, high = (machines.human_number(n) for n in p["fitting_params"])
        text = f"data-limited: these tokens fit {low} (4 epochs) to {high} parameters; or add data"
        lines.append(f"advice     {text}")
    return lines


def schedule_line(cfg: Config, min_lr: float, peak_step: int) -> str:
    text = f"{cfg.optimizer}, {cfg.lr_schedule} {cfg.learning_rate:g}"
    if cfg.lr_schedule != "constant":
        text += f" -> {min_lr:g}"
    if cfg.lr_schedule == "onecycle":
        return f"schedule   {text}, 30 % of it upwards: {peak_step} warm-up steps"
    return f"schedule   {text}, {peak_step} warm-up steps"


def muon_lines(start: Start) -> list[str]:
    """What Muon owns, so that nobody takes it for active where it has nothing; and what it costs
    where that shows: of a step's FLOPs, over all ranks."""
    cfg, layout = start.cfg, start.layout
    if cfg.optimizer != "muon":
        return []
    shapes = plan.all_shapes(start.model)
    named = [(name, shape) for name, shape in shapes if layout.tuning.trains(name)]
    matrices = muon.hidden_matrices(named, cfg.model)
    lines = [f"muon       {muon.describe(matrices, plan.count_parameters(start.model))}"]
    copies = layout.world // layout.shard if layout.shard > 1 else 1  # each does it for itself
    tokens = start.run.rows_per_step * cfg.model.max_seq_len
    share = copies * sum(map(muon.flops, matrices)) / (start.flops_per_token * tokens)
    if share > 0.05:
        text = f"Muon's own work is {100 * share:.0f} % of the FLOPs of a step's other work"
        lines.append(f"plan       {text}: more tokens a step would make that less")
    return lines


def rate_advice(
    cfg: Config, max_steps: int, peak_step: int, lr_at_peak: float, last_lr: float
) -> list[str]:
    """What is odd about the learning rate, seen before a step is made."""
    lines, peak = [], cfg.learning_rate
    usual = 0.5 / cfg.model.d_model  # near GPT-3's, 768 to 12288 wide (Brown et al. 2020)
    if cfg.lora.r:
        usual *= 10  # adapters bear ten times the rate (lumen/base.py)
    if peak > min(1e-2, 10 * usual):
        text = f"learning_rate {peak:g} is far above what {cfg.optimizer} bears at this width"
        text += f", {min(1e-2, 2 * usual):.1g} is usual"
        lines.append(f"{text}: the loss may explode in the first steps")
    if max_steps and peak_step >= max_steps and last_lr < 0.99 * peak:
        text = f"warmup_steps {peak_step} of {max_steps} steps: the rate never comes above"
        lines.append(f"{text} {last_lr:.2g} of {peak:g}; lower warmup_steps")
    elif cfg.lr_schedule == "wsd" and lr_at_peak < peak / 1.5:
        text = f"wsd's decay begins within the warm-up: the rate falls from {peak:g} to"
        text += f" {lr_at_peak:.2g} at step {peak_step}"
        lines.append(f"{text}; lower warmup_steps or decay_frac")
    return lines


def validation_advice(cfg: Config, sources: dict, val_sources: dict) -> list[str]:
    """An evaluation that cannot be, or that says little."""
    if not sources:
        return []
    if not val_sources:
        return [no_validation(cfg)]
    lines, T = [], cfg.model.max_seq_len
    missing = [name for name in undivided(sources) if name not in val_sources]
    if missing:
        lines.append(f"no validation in {', '.join(missing)}: val_loss is of the others alone")
    windows = sum(source.windows for source in val_sources.values())
    rows = min(windows, max(1, cfg.eval_tokens // T))
    if rows < FEW_ROWS:
        text = f"an evaluation reads {rows} rows of {T} tokens"
        lines.append(f"{text}: differences of val_loss are mostly noise")
    return lines


def no_validation(cfg: Config) -> str:
    """Why there is no evaluation, and what to do."""
    if cfg.val_fraction == 0:
        return "no evaluation, as val_fraction is 0: best.json names the last step"
    text = "no evaluation: no source has a validation window of"
    text += f" {cfg.model.max_seq_len + 1} tokens, best.json names the last step"
    return f"{text}; hold out more text, or lower model.max_seq_len"


# ---------------------------------------------------------------- a start: this machine


def machine_lines(start: Start) -> list[str]:
    """How long it would take here at least, on what it runs, and the memory that it needs."""
    run, machine = start.run, start.machine
    flops = start.flops_per_token * start.tokens
    least = machines.human_time(flops / start.peak / start.world)
    peak = machines.human_number(start.peak, "FLOP/s")
    if start.peak != machines.sheet_flops(machine):
        peak += " measured here"
    text = f"{machines.human_number(flops, 'FLOP')} in all"
    lines = [f"compute    {text}: {least} if every FLOP ran at the matrix peak, {peak}"]
    text = f"{machine.device} {machine.name}"
    if machine.device.type == "cpu":
        text += f" ({' '.join(machines.cpu_flags())})"
    text += f", {torch.get_num_threads()} threads: {run.precision}, {run.attention} attention"
    lines.append(f"device     {text}{', compiled' if run.compile_model else ''}")
    text = f"compile {run.compile_model}, deterministic {run.deterministic}{waiting.words()}"
    lines.append(f"settings   {text}")
    if run.precision in machines.FP8:
        lines.append(f"fp8        {fp8.describe(start.model, run.precision)}")
    lines.append(f"attention  {run.attention}: {run.attention_why}")
    if machine.device.type == "cuda":
        lines.append(f"loss       {run.loss}: {run.loss_why}")
    return lines + memory_lines(start)


def memory_lines(start: Start) -> list[str]:
    """The estimate for a process, and what it has; what the estimate is made of."""
    cfg, run, layout = start.cfg, start.run, start.layout
    how = (run.precision, cfg.activation_checkpointing)
    plain = layout.tuning == plan.PRETRAINING and not layout.state_bytes.orthogonal
    if layout.shard == 1 and plain:
        total = start.model.n_params()["total"]
        where = (layout.cuda, layout.state_bytes.rest)
        need = plan.memory(cfg.model, total, run.micro_batch, *how, *where)
    else:
        batch = (run.micro_batch, run.accumulation)
        need = plan.rank_memory(start.model, layout, *batch, *how, plan.IMBALANCE)
    parts = [f"{k} {v / 2**20:,.1f}" for k, v in need.items() if k not in ("total", "peak")]
    text = f"about {need['total'] / 2**20:,.0f} MiB of"
    text += f" {machines.own_memory(start.machine.device) / 2**30:.1f} GiB a process"
    return [f"memory     {text}", f"parts      of the memory, MiB: {', '.join(parts)}"]


def machine_advice(start: Start) -> list[str]:
    cfg, tokens = start.cfg, start.tokens
    lines = []
    if start.misfit:
        lines.append(start.misfit)
    if cfg.model.vocab_size % 64:
        lines.append(f"vocab_size {cfg.model.vocab_size} is not a multiple of 64: slower on GPUs")
    unique = start.windows * cfg.model.max_seq_len
    few = start.model.n_params()["total"] > tokens > unique > 0
    if few and not start.fine_tunes:
        text = "fewer tokens than parameters, read more than once"
        lines.append(f"{text}: such a model mostly memorises")
    if start.machine.device.type == "cuda" and start.run.deterministic:
        lines.append("deterministic: true costs speed on CUDA (not measured yet)")
    return lines


# ---------------------------------------------------------------- a log step


def step_row(numbers: StepNumbers) -> dict:
    """What metrics.jsonl says of the step itself."""
    row = {"loss": numbers.loss, "ppl": math.exp(min(numbers.loss, 50.0))} | numbers.more
    return row | {"lr": numbers.lr, "grad_norm": numbers.grad_norm}


def speed_row(interval: Interval, tokens: int, flops: float, peak: float) -> dict:
    """How fast steps were, and where the time went.

    tokens: of a step; flops: of a token; peak: FLOP/s of all ranks' matrices together.
    """
    speed = interval.speed() * tokens
    mfu = speed * flops / peak
    row = {"tokens_per_second": speed}
    row["mfu"] = mfu if mfu <= 1 else None  # above 1 the peak was measured too low
    row["data_wait"] = interval.spent["data"] / interval.seconds
    return row | {f"time/{name}": share for name, share in interval.shares().items()}


def memory_row(device: torch.device) -> dict:
    """Bytes: of the GPU at most, allocated and reserved, and of this process."""
    row = {"mem_allocated": None, "mem_reserved": None, "ram": resident_bytes()}
    if device.type == "cuda":
        row["mem_allocated"] = torch.cuda.max_memory_allocated()
        row["mem_reserved"] = torch.cuda.max_memory_reserved()
    return row


def health_row(health: str | None, causes: list[str]) -> dict:
    row = {"health": health, "health_causes": causes}
    if health:
        row["health_level"] = ("healthy", "warning", "critical").index(health)
    return row


def epoch_row(epochs: dict[str, float], rows: dict[str, int], T: int) -> dict:
    """Of each source: how often it was read, and where there are several how many tokens of it;
    those of dropped steps and of steps that were taken back are among them."""
    if len(epochs) == 1:
        return {"epoch": next(iter(epochs.values()))}
    row = {f"epoch/{name}": count for name, count in epochs.items()}
    return row | {f"tokens/{name}": count * T for name, count in rows.items()}


def first_line(step: int, max_steps: int, loss: float, n_vocab: int) -> str:
    """n_vocab: of fresh weights, whose loss should be near guessing; 0 if they have learned."""
    text = f"step {step:>6}/{max_steps}  loss {loss:.4f}"
    return f"{text}  (guessing: {math.log(n_vocab):.2f})" if n_vocab else text


def step_line(row: dict, max_steps: int, gone: float, left: float) -> str:
    """A row of metrics.jsonl for the console; seconds since the start, and to the end."""
    text = f"step {row['step']:>6}/{max_steps}  loss {row['loss']:.4f}"
    if "margin" in row:
        text += f"  margin {row['margin']:+.3f}  {100 * row['accuracy']:.0f} % right"
    else:
        text += f"  ppl {row['ppl']:.4g}"
    if "aux_loss" in row:
        text += f"  aux {row['aux_loss']:.4f}"
    text += f"  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}"
    text += f"  {machines.human_number(row['tokens_per_second'])} tok/s"
    text += "  mfu -" if row["mfu"] is None else f"  mfu {100 * row['mfu']:.0f} %"
    if row["data_wait"] >= 0.05:
        text += f"  waits for data {100 * row['data_wait']:.0f} %"
    if row["mem_reserved"] is not None:
        text += f"  {row['mem_reserved'] / 2**30:.1f} GiB"
    return f"{text}  {clock(gone)} gone, {clock(left)} left"


# ---------------------------------------------------------------- sparse layers


def routing_lines(experts: dict | None, depth: dict | None, n_layers: int) -> list[str]:
    """experts.expert_statistics and mod_statistics of a step, for the console."""
    lines = []
    if experts is not None:
        layers = experts["layers"]
        worst = max(layers, key=lambda i: layers[i]["max_violation"])
        text = f"hottest {1 + experts['max_violation']:.2f} x fair (layer {worst})"
        text += f", entropy {experts['routing_entropy']:.3f} of {experts['max_entropy']:.3f} nats"
        text += f", dead {experts['dead']}, dropped {experts['tokens_dropped']}"
        lines.append(f"experts    {text}")
    if depth is not None:
        text = f"{depth['average_depth']:.2f} of {n_layers} layers a token"
        text += f", capacity {depth['capacity_factor']:.3f}"
        text += f", predictor agrees {100 * depth['predictor_agreement']:.1f} %"
        lines.append(f"depth      {text}")
    return lines


def experts_row(experts: dict, tokens: int, aux_weight: float, z_weight: float) -> dict:
    """What metrics.jsonl says of MoE layers; tokens: of a step; the weights of their two losses.

    A router inside MoD sees a part of the tokens only, so a layer's mean counts by what it saw.
    """
    layers, row = experts["layers"], {}
    losses = (
        ("aux_loss", aux_weight, "load_balance_loss"),
        ("router_z_loss", z_weight, "router_z"),
    )
    for key, weight, name in losses:
        row[key] = weight * sum(x[name] * x["tokens"] for x in layers.values()) / tokens
    for name in ("routing_entropy", "max_entropy", "max_violation", "tokens_dropped", "dead"):
        row[f"experts/{name}"] = experts[name]
    for name in ("confidence", "token_entropy", "null_share"):
        row[f"experts/{name}"] = experts[name]
    row["experts/bias_min"], row["experts/bias_max"] = experts["bias_range"]
    return row | share_bars(experts)


def share_bars(experts: dict) -> dict[str, list]:
    """Each expert's share of the choices, by layer."""
    layers = experts["layers"].items()
    return {f"experts/share/{i}": layer["per_expert_utilization"] for i, layer in layers}


def routing_bars(experts: dict | None, depth: dict | None) -> dict[str, list]:
    """What is charted as bars: shares of experts, and how often MoD layers kept each position."""
    bars = {} if experts is None else share_bars(experts)
    if depth is not None:
        bars["depth/position"] = depth["position_usage"]
    return bars


def depth_row(depth: dict) -> dict:
    """What metrics.jsonl says of MoD layers."""
    usage = depth["per_layer_usage"]
    row = {"mod_loss": MoD.BCE_WEIGHT * depth["predictor_loss"] * len(usage)}
    for name in ("capacity_factor", "average_depth", "predictor_agreement"):
        row[f"depth/{name}"] = depth[name]
    return row | {f"depth/usage/{i}": share for i, share in usage.items()}


# ---------------------------------------------------------------- evaluations, the end


def evaluation_lines(row: dict, new_best: bool, took: float, model: ModelConfig) -> list[str]:
    """An evaluation for the console, from its row of metrics.jsonl; took: seconds."""
    text = f"step {row['step']}: val_loss {row['val_loss']:.4f}"
    if "val_ppl" in row:
        text += f" (ppl {row['val_ppl']:.4g})"
    if row["val_bpb"] is not None:
        text += f", {row['val_bpb']:.4f} bits per byte"
    text += f", {100 * row['val_accuracy']:.1f} % right"
    if new_best:
        text += " (best)"
    else:
        best = row["best_val_loss"] or math.nan
        text += f" (best {best:.4f} at step {row['best_step']})"
    if "val_margin" in row:
        text += f", margin {row['val_margin']:+.3f}"
    lines = [f"eval       {text}, {took:.1f} s"]
    by_source = {key[9:]: loss for key, loss in row.items() if key.startswith("val_loss/")}
    if by_source:
        parts = []
        for name, loss in by_source.items():
            parts.append(f"{name} {loss:.4f} (ppl {math.exp(min(loss, 50.0)):.4g})")
        lines.append(f"           {', '.join(parts)}")
    if "mod_gap" in row:
        text = f"as trained {row['val_loss_as_trained']:.4f}, gap {row['mod_gap']:+.4f}"
        text += f", the rules agree on {100 * row['mod_agreement']:.1f} %"
        text += f", {row['mod_depth']:.2f} of {model.n_layers} layers a token"
        lines.append(f"           causal rule above; {text}")
    return lines


def config_yaml(cfg: Config, run: Run) -> str:
    """config.yaml, as resolved: a start with it goes on, or in another out_dir repeats the run, on
    any number of processes."""
    keys = resolved(cfg, run)
    keys |= {"num_epochs": None, "tokens_per_parameter": None}  # max_steps says it
    keys |= {"resume": "auto", "overwrite": False}  # they were said for this start
    keys["batch_tokens"] = run.rows_per_step * cfg.model.max_seq_len
    del keys["gradient_accumulation_steps"]  # follows from it
    return yaml.safe_dump(keys, sort_keys=False)


# what the next run has of its own, or what is said anew
NOT_SUGGESTED = {"batch_size", "gradient_accumulation_steps", "batch_tokens"}
NOT_SUGGESTED |= {"max_steps", "num_epochs", "tokens_per_parameter"}
NOT_SUGGESTED |= {"resume", "overwrite", "out_dir"}


def suggestion(
    start: Start,
    written: dict,
    memory_share: float,
    hint: str | None,
    rollbacks: int,
    lr_cut: float,
) -> str:
    """suggested.yaml: a run's configuration for next time, with what was found on the way, and why.

    start: of the run as it is now; written: its configuration as it was written; memory_share: how
    much of the memory it used; hint: why the micro-batch is not what was asked for; lr_cut: the
    factor of a rollback.
    """
    cfg, run, T = start.cfg, start.run, start.cfg.model.max_seq_len
    rows = run.rows_per_step
    why_size = f"as run, {100 * memory_share:.0f} % of the memory used"
    asked = written.get("batch_size")
    if asked not in (None, run.micro_batch):
        why_size = f"{asked} was asked for; {hint or why_size}"
    counts = (start.n_working, start.windows * T, rows * T)
    steps, why_steps = plan.auto_steps(*counts, cfg.tokens_per_parameter or 20.0)
    why_steps = why_steps.removeprefix("length").strip()
    follows = f"accumulation follows from it: {run.accumulation} micro-steps"
    parameters = start.model.n_params()["total"]
    lines = [f"# made at the end of {cfg.out_dir}, {parameters:,} parameters; the comments say why"]
    lines += [f"batch_size: {run.micro_batch}  # {why_size}"]
    lines += [f"batch_tokens: {rows * T}  # as run; {follows} on {start.readers} ranks"]
    lines += [f"max_steps: {steps}  # {why_steps}; this run had {run.max_steps}"]
    keys = {key: value for key, value in written.items() if key not in NOT_SUGGESTED}
    orchestrator = keys.get("orchestrator", {})
    keys["orchestrator"] = {
        k: v for k, v in orchestrator.items() if k != "replay" and v != "replay"
    }
    if rollbacks:
        keys["learning_rate"] = cfg.learning_rate * lr_cut
        lines += [f"# learning_rate: x {lr_cut}, for this run was rolled back {rollbacks} times"]
    return "\n".join(lines) + "\n" + yaml.safe_dump(keys, sort_keys=False)
