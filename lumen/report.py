"""What a run says and leaves: start block, log lines, metrics.jsonl, charts, status.json, suggested.yaml, the sample.

`Report` is the part of `Trainer` that only looks. Nothing here changes what is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from lumen import files, plan
from lumen import machine as machines
from lumen import tokenizer as tokenizers
from lumen.config import Config
from lumen.errors import UserError, a_path
from lumen.experts import expert_numbers, expert_statistics, mod_statistics
from lumen.files import read_lines
from lumen.launch import Words, clock, command, print_now, speak
from lumen.machine import resident_bytes
from lumen.orchestrate import Orchestrator
from model_moe import MoD


class Report:
    """Trainer's methods that speak."""

    # ---- before it runs

    def start_block(self, notes: list[str]) -> None:
        """What will run, before it runs."""
        cfg, m, say = self.cfg, self.cfg.model, self.say
        n, T, rows = self.counted.n_params(), m.max_seq_len, self.run.rows_per_step
        tokens = rows * T * self.run.max_steps
        for note in (
            *notes,
            *self.machine.notes,
            *([self.hint] if self.hint else []),
            *self.changes,
        ):
            say(f"note       {note}")
        shape = f"{m.n_layers} x {m.d_model}, {m.n_heads}/{m.n_kv_heads} heads, d_ff {m.d_ff}, vocab {m.vocab_size}"
        active = f", {n['active']:,} active" if n["active"] != n["total"] else ""
        say(
            f"model      {n['total']:,} parameters{active}, {n['non_embedding']:,} of them no embeddings: {shape}"
        )
        for line in self.sparse_lines():
            say(line)
        if not self.sources:
            say(
                "data       not prepared yet: its size, and a length that follows from it, are unknown"
            )
        for name, s in self.sources.items():
            held = self.val_sources[name].tokens if name in self.val_sources else 0
            tail = " (tail held out)" if s.bare and held else ""
            unused = 100 * s.unused / max(1, s.tokens)
            say(
                f"data       {name}: {s.tokens:,} train tokens, {held:,} val{tail}; {unused:.3f} % unused; {s.path}"
            )
        layout = f"{self.run.accumulation} micro-steps x {self.parallel.rows()[1]} ranks"
        say(
            f"batch      {rows * T:,} tokens a step: {self.run.micro_batch} rows x {T} tokens x {layout}"
        )
        windows = sum(s.windows for s in self.sources.values())
        epochs = f", {rows * self.run.max_steps / windows:.2f} epochs" if windows else ""
        say(f"length     {self.run.max_steps:,} steps, {tokens:,} tokens{epochs}")
        if windows:
            counts = (
                self.n_working,
                windows * T,
                tokens,
                self.flops_per_token,
                cfg.chinchilla_multiplier,
            )
            for line in plan.plan_lines(plan.chinchilla(*counts, moe=bool(m.n_experts))):
                say(line)
        warm_up = "30 % of it upwards: " if cfg.lr_schedule == "onecycle" else ""
        warm_up += f"{self.run.peak_step} warm-up steps"
        say(f"schedule   {cfg.lr_schedule} {cfg.learning_rate:g} -> {self.run.min_lr:g}, {warm_up}")
        for line in (*self.rate_lines(), *self.validation_lines()):
            say(f"advice     {line}")
        if self.dry_run and self.dry_run["hardware"] != "measured":
            return
        per_token, in_all = (plan.describe(self.flops_per_token * k, "FLOP") for k in (1, tokens))
        least = plan.span(self.flops_per_token * tokens / self.peak / self.parallel.world)
        peak = plan.describe(self.peak, "FLOP/s") + (
            " measured here" * (self.peak != machines.sheet_flops(self.machine))
        )
        say(
            f"compute    {per_token} a token, {in_all} in all: {least} if every FLOP ran at the matrix peak, {peak}"
        )
        flags = f" ({' '.join(machines.cpu_flags())})" if self.machine.device.type == "cpu" else ""
        state = f"{self.run.precision}, compile {self.run.compile_model}, deterministic {self.run.deterministic}"
        say(
            f"device     {self.machine.device} {self.machine.name}{flags}, {torch.get_num_threads()} threads: {state}"
        )
        say(f"attention  {self.run.attention}: {self.run.attention_why}")
        steps, how = self.run.accumulation, (self.run.precision, cfg.activation_checkpointing)
        if self.parallel.layout.shard == 1:
            need = plan.memory(m, n["total"], self.run.micro_batch, *how, self.parallel.layout.cuda)
        else:
            need = plan.rank_memory(
                self.counted,
                self.parallel.layout,
                self.run.micro_batch,
                steps,
                *how,
                plan.IMBALANCE,
            )
        parts = ", ".join(
            f"{k} {v / 2**30:.2f}" for k, v in need.items() if k not in ("total", "peak")
        )
        have = machines.own_memory(self.machine.device)
        say(
            f"memory     about {need['total'] / 2**30:.2f} of {have / 2**30:.1f} GiB a process ({parts} GiB)"
        )
        if self.misfit:
            say(f"advice     {self.misfit}")
        if m.vocab_size % 64:
            say(f"advice     vocab_size {m.vocab_size} is not a multiple of 64: slower on GPUs")
        if n["total"] > tokens > windows * T > 0:
            say(
                "advice     fewer tokens than parameters, read more than once: such a model mostly memorises"
            )
        if self.machine.device.type == "cuda" and self.run.deterministic:
            say("advice     deterministic: true costs speed on CUDA (not measured yet)")

    def rate_lines(self) -> list[str]:
        """What is odd about the learning rate, seen before a step is made."""
        cfg, lines = self.cfg, []
        usual = 0.5 / cfg.model.d_model  # near GPT-3's, 768 to 12288 wide (Brown et al. 2020)
        peak, steps, up = cfg.learning_rate, self.run.max_steps, self.run.peak_step
        if peak > min(1e-2, 10 * usual):
            text = f"learning_rate {peak:g} is far above what {cfg.optimizer} bears at this width"
            text += f", {min(1e-2, 2 * usual):.1g} is usual"
            lines.append(f"{text}: the loss may explode in the first steps")
        if steps and up >= steps:
            text = f"warmup_steps {up} of {steps} steps: the rate never comes above"
            lines.append(
                f"{text} {self.scheduled_lr(steps - 1):.2g} of {peak:g}; lower warmup_steps"
            )
        elif cfg.lr_schedule == "wsd" and self.scheduled_lr(up) < peak / 1.5:
            text = f"wsd's decay begins within the warm-up: the rate falls from {peak:g} to"
            text += f" {self.scheduled_lr(up):.2g} at step {up}"
            lines.append(f"{text}; lower warmup_steps or decay_frac")
        return lines

    def validation_lines(self) -> list[str]:
        """An evaluation that cannot be, or that says little."""
        if not self.sources:
            return []
        missing = [name for name in self.sources if name not in self.val_sources]
        if not self.val_sources:
            return [self.no_validation()]
        lines, T = [], self.cfg.model.max_seq_len
        if missing:
            lines.append(f"no validation in {', '.join(missing)}: val_loss is of the others alone")
        windows = sum(s.windows for s in self.val_sources.values())
        if (rows := min(windows, max(1, self.cfg.eval_tokens // T))) < 16:
            text = f"an evaluation reads {rows} rows of {T} tokens"
            lines.append(f"{text}: differences of val_loss are mostly noise")
        return lines

    def no_validation(self) -> str:
        """Why there is none, and what to do."""
        if self.cfg.val_fraction == 0:
            return "no evaluation, as val_fraction is 0: best.json names the last step"
        need = self.cfg.model.max_seq_len + 1
        text = f"no evaluation: no source has a validation window of {need} tokens, best.json names the"
        return f"{text} last step; hold out more text, or lower model.max_seq_len"

    def simulate(self, watch=None) -> None:
        """The dry run's second half: what the run would need elsewhere, and how near a look at a few layers comes."""
        from tools import simulate  # upward, and only in a dry run

        cfg, m, given = self.cfg, self.cfg.model, self.dry_run
        layout, precision = self.parallel.layout, given.get("precision", self.run.precision)
        hw, mode = (
            machines.hardware(given["hardware"], self.machine, given),
            cfg.activation_checkpointing,
        )
        assumed = {k: given[k] for k in ("mfu", "imbalance", "disk_gb_s") if k in given} | {
            "share": cfg.target_memory
        }
        counts = (self.run.micro_batch, self.run.rows_per_step, self.run.max_steps, precision, mode)
        lines, best = simulate.dry_run_lines(
            self.counted, layout, *counts, given["hardware"], hw, **assumed
        )
        for line in lines:
            self.say(line)
        layout, rows, mode = best["layout"], best["rows"], best["recompute"]
        if watch is None or layout.shard == 1:
            return
        try:
            depths = simulate.depths(m)
        except ValueError as error:
            self.say(f"checked    not: {error}")
            return
        cfg = dataclasses.replace(
            cfg, precision=precision, batch_size=rows, activation_checkpointing=mode
        )
        try:
            seen = {n: watch(cfg, layout, simulate.shallow(m, n)) for n in depths}
            shown = simulate.compared_lines(seen, self.counted, layout, rows, precision, mode)
        except (
            Exception
        ) as error:  # a private part of torch, another in each version: the dry run goes without
            text = str(error).strip().splitlines() or ["?"]
            shown = [
                f"checked    not: fake tensors failed on torch {torch.__version__}: {type(error).__name__}: {text[0]}"
            ]
        for line in shown:
            self.say(line)

    def sparse_lines(self) -> list[str]:
        """The start block's lines on MoE and MoD."""
        m, lines = self.cfg.model, []
        moe = [i for i in range(m.n_layers) if m.is_moe(i)]
        mod = [i for i in range(m.n_layers) if m.capacity(i) < 1]
        if moe:
            more = f", {m.n_shared_experts} shared" if m.n_shared_experts else ""
            more += f", {m.n_null_experts} null" if m.n_null_experts else ""
            more += f", {m.n_experts_max} slots" if m.n_experts_max else ""
            gates = f"{m.router}{', renormalised' if m.norm_topk else ''}"
            text = f"{m.n_experts_per_token} of {m.n_experts} x {m.d_expert}{more} in {len(moe)} layers; {gates}"
            text += f"; balance: loss {m.aux_loss_weight:g}, bias {m.bias_update_rate:g}"
            drop = f"capacity {m.capacity_factor:g}" if m.capacity_factor else "dropless"
            lines.append(
                f"experts    {text}; {drop}; {self.run.expert_backend}: {self.run.experts_why}"
            )
        if mod:
            what = "FFN" if m.mod_ffn_only else "block"
            mean = sum(m.capacity(i) for i in mod) / len(mod)
            text = f"{m.mod_routing} routing, capacity {mean:.3g}, {what} of {len(mod)} layers"
            anneal = f", from 1.0 over {m.mod_anneal_steps} steps" if m.mod_anneal_steps else ""
            lines.append(f"depth      {text}{anneal}")
        if m.mod_anneal_steps > self.run.max_steps and mod:
            lines.append(
                f"advice     mod_anneal_steps {m.mod_anneal_steps}: the run ends before capacity has fallen"
            )
        if idle := m.idle():
            lines.append(
                f"advice     without effect, for n_experts or mod_capacity is not set: {', '.join(idle)}"
            )
        if moe or mod:
            from export import refusals

            lines += [
                f"advice     will not export to Hugging Face: {why}" for why in refusals(m)[:3]
            ]
        return lines

    # ---- lines and rows

    def say(self, text: str) -> None:
        """One line to the console and to train.log, from rank 0."""
        if not getattr(self, "main", True):
            return
        speak(text, tqdm.write if self.bar else print_now)
        if self.log_file:
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self.log_file.write(text + "\n")

    @contextlib.contextmanager
    def nicety(self, what: str):
        """What a run can do without: if it fails that is said, and the run goes on."""
        try:
            yield
        except Exception as error:
            text = getattr(error, "text", "") or (str(error).splitlines() or [""])[0]
            self.say(f"note       {what}: {getattr(error, 'code', type(error).__name__)}: {text}")

    def append(self, name: str, row: dict) -> None:
        """One line to an append-only file in out_dir, from rank 0."""
        if self.main:
            lines = (
                self.unwritten.get(name, b"")
                + json.dumps(finite(row), allow_nan=False).encode()
                + b"\n"
            )
            with contextlib.suppress(OSError), open(self.out / name, "ab", buffering=0) as f:
                lines = lines[
                    f.write(lines) :
                ]  # a full disk takes a part of them, or none: the rest comes later
            self.unwritten[name] = lines

    def record(self, row: dict) -> None:
        """One line of metrics.jsonl, and the same to wandb and TensorBoard."""
        self.append("metrics.jsonl", row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self.wandb:  # the step is a number among others: after a rollback it comes again, which wandb would refuse
            with self.charts("wandb"):
                self.wandb.log(numbers | {"step": row["step"]})
        if self.board:
            with self.charts("board"):
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, row["step"])

    @contextlib.contextmanager
    def charts(self, name: str):
        """wandb or board: one that fails (no room, no network, a bug of theirs) is not written to any more."""
        try:
            yield
        except Exception as error:
            what = {"wandb": "wandb", "board": "TensorBoard"}[name]
            self.say(
                f"note       {what}: {type(error).__name__}: {error}; nothing more is written to it"
            )
            setattr(self, name, None)

    def close_writers(self) -> None:
        with self.charts("wandb"):
            if self.wandb:
                self.wandb.finish()
        with self.charts("board"):  # what was still to be written may not fit on the disk
            if self.board:
                self.board.close()
        with contextlib.suppress(OSError):
            if self.log_file:
                self.log_file.close()
        self.wandb = self.board = self.log_file = None

    def log(self, seen: dict) -> None:
        """One line per log step; speeds are means since the last one, without evaluation and saving."""
        cfg, done = self.cfg, seen["step"] + 1
        seconds = max(1e-9, time.perf_counter() - self.clock)
        steps = max(1, done - self.clock_step)
        speed = self.speed = steps * self.run.rows_per_step * cfg.model.max_seq_len / seconds
        cuda = self.parallel.device.type == "cuda"
        epochs = self.loader.epochs(seen["cursor"] + self.run.rows_per_step)
        row = {"step": done, "attempt": self.attempt, "tokens": self.tokens, "loss": seen["loss"]}
        row |= {
            "ppl": math.exp(min(seen["loss"], 50.0)),
            "lr": seen["lr"],
            "grad_norm": seen["grad_norm"],
        }
        flops = (
            self.model.flops_per_token() if self.mod else self.flops_per_token
        )  # MoD's capacity may be annealed
        mfu = speed * flops / (self.peak * self.parallel.world)
        row |= {
            "tokens_per_second": speed,
            "mfu": mfu if mfu <= 1 else None,
        }  # None: the peak was measured too low
        times = {name: spent - self.logged[name] for name, spent in self.spent.items()}
        row |= {"data_wait": times["data"] / seconds, "dropped": self.orchestrator.dropped}
        row |= {
            f"time/{name}": spent / max(1e-9, sum(times.values())) for name, spent in times.items()
        }
        row |= {
            "health": self.orchestrator.health,
            "health_causes": self.orchestrator.causes,
            **self.outlook,
        }
        if row["health"]:
            row["health_level"] = ("healthy", "warning", "critical").index(row["health"])
        self.outlook = {}
        row |= {"mem_allocated": torch.cuda.max_memory_allocated() if cuda else None}
        row |= {
            "mem_reserved": torch.cuda.max_memory_reserved() if cuda else None,
            "ram": resident_bytes(),
        }
        row |= {"z_loss": seen["z_loss"]} if cfg.z_loss else {}
        row |= self.routing_row(seen)
        row |= {f"epoch/{n}" if len(epochs) > 1 else "epoch": e for n, e in epochs.items()}
        self.record(row)
        left = (self.run.max_steps - done) * seconds / steps
        share = "mfu -" if row["mfu"] is None else f"mfu {100 * mfu:.0f} %"
        share += f", data {100 * row['data_wait']:.1f} %, epoch {max(epochs.values()):.2f}"
        numbers = f"loss {seen['loss']:.4f}  ppl {row['ppl']:.4g}"
        numbers += f"  aux {row['aux_loss']:.4f}" if "aux_loss" in row else ""
        numbers += (
            f"  lr {seen['lr']:.2e}  norm {seen['grad_norm']:.2f}  {plan.describe(speed)} tok/s"
        )
        share += f"  {row['mem_reserved'] / 2**30:.1f} GiB" if cuda else ""
        went = f"{clock(sum(self.spent.values()))} gone, {clock(left)} left"
        self.say(f"step {done:>6}/{self.run.max_steps}  {numbers}  {share}  {went}")
        for line in self.routing_lines(seen):
            self.say(line)
        if self.bar:
            self.bar.set_postfix(loss=f"{seen['loss']:.3f}")
        self.restart_clock()
        self.clock_step = done

    # ---- sparse layers

    def routing_lines(self, seen: dict) -> list[str]:
        """The compact form for the console."""
        lines = []
        if "experts" in seen:
            e = seen["experts"]
            worst = max(e["layers"], key=lambda i: e["layers"][i]["max_violation"])
            text = f"hottest {1 + e['max_violation']:.2f} x fair (layer {worst}), entropy {e['routing_entropy']:.3f} of "
            text += f"{e['max_entropy']:.3f} nats, dead {e['dead']}, dropped {e['tokens_dropped']}, bias "
            text += (
                "{:+.3f} to {:+.3f}, ".format(*e["bias_range"])
                + f"confidence {e['confidence']:.2f}"
            )
            lines.append(f"experts    {text}")
        if "depth" in seen:
            d = seen["depth"]
            text = (
                f"{d['average_depth']:.2f} of {self.cfg.model.n_layers} layers a token, capacity "
            )
            text += f"{d['capacity_factor']:.3f}, predictor agrees {100 * d['predictor_agreement']:.1f} %"
            lines.append(f"depth      {text}")
        return lines

    def routing(self, numbers: torch.Tensor) -> dict:
        """Statistics of the sparse layers from one host copy: {"experts": ..., "depth": ...}."""
        cfg, found = self.cfg.model, {}
        kept = self.sparse_shapes[1][0] * self.sparse_shapes[1][1]
        moe, mod = numbers.split([len(numbers) - kept, kept])
        if self.moe:
            rows = moe.view(len(self.moe), -1)
            found["experts"] = expert_statistics(list(self.moe), rows, cfg.n_null_experts)
        if self.mod:
            saved = 1 - self.model.flops_per_token() / self.flops_undiminished
            rows = mod.view(self.sparse_shapes[1])
            found["depth"] = mod_statistics(self.mod, rows, cfg.n_layers, saved)
        return found

    def routing_row(self, seen: dict) -> dict:
        """What metrics.jsonl says of the sparse layers; and their charts, to wandb and TensorBoard."""
        cfg, row = self.cfg.model, {}
        if "experts" in seen:
            e, layers = seen["experts"], seen["experts"]["layers"]
            nominal = (
                self.run.rows_per_step * cfg.max_seq_len
            )  # of which a router inside MoD sees a part
            in_force = next(
                iter(self.moe.values())
            ).router.aux_weight  # a knob: it may have been changed on the way
            for key, weight, name in (
                ("aux_loss", in_force, "load_balance_loss"),
                ("router_z_loss", cfg.router_z_loss_weight, "router_z"),
            ):
                row[key] = weight * sum(x[name] * x["tokens"] for x in layers.values()) / nominal
            names = (
                "routing_entropy",
                "max_entropy",
                "max_violation",
                "tokens_dropped",
                "dead",
                "confidence",
            )
            row |= {f"experts/{k}": e[k] for k in (*names, "token_entropy", "null_share")}
            row |= {"experts/bias_min": e["bias_range"][0], "experts/bias_max": e["bias_range"][1]}
            row |= {f"experts/share/{i}": x["per_expert_utilization"] for i, x in layers.items()}
            for i, x in layers.items():
                self.chart(f"experts/share/{i}", x["per_expert_utilization"], seen["step"] + 1)
        if "depth" in seen:
            d = seen["depth"]
            row |= {"mod_loss": MoD.BCE_WEIGHT * d["predictor_loss"] * len(self.mod)}
            row |= {
                f"depth/{k}": d[k]
                for k in ("capacity_factor", "average_depth", "predictor_agreement")
            }
            row |= {f"depth/usage/{i}": u for i, u in d["per_layer_usage"].items()}
            self.chart("depth/position", d["position_usage"], seen["step"] + 1)
        return row

    def chart(self, name: str, values: list, step: int) -> None:
        """A bar per value, to wandb and TensorBoard."""
        values = np.array([v or 0.0 for v in values])
        edges = np.arange(len(values) + 1) - 0.5
        if self.wandb:
            import wandb

            with self.charts("wandb"):
                self.wandb.log({name: wandb.Histogram(np_histogram=(values, edges)), "step": step})
        if self.board:
            centres = np.arange(len(values))
            total, squares = float((values * centres).sum()), float((values * centres**2).sum())
            sums = (0.0, len(values) - 1.0, float(values.sum()), total, squares)
            with self.charts("board"):
                self.board.add_histogram_raw(name, *sums, edges[1:].tolist(), values.tolist(), step)

    def last_routing(self, kind: str) -> dict:
        if not (self.moe if kind == "experts" else self.mod):
            what = (
                "MoE: set model.n_experts" if kind == "experts" else "MoD: set model.mod_capacity"
            )
            return {"refused": "E308", "reason": f"this model has no layer of {what}"}
        if self.sparse is None:
            return {"refused": "E308", "reason": "no step has been made yet"}
        moe, mod = self.unpack(self.sparse)
        moe = expert_numbers(self.moe, moe) if self.moe else moe
        return self.routing(torch.cat([moe.flatten(), mod.flatten()]).cpu())[kind]

    def get_expert_statistics(self) -> dict:
        """Of the last step, over all ranks: per_expert_utilization, routing_entropy, load_balance_loss, tokens_dropped
        and more, per layer under "layers" and over all; see model_moe.expert_statistics."""
        return self.last_routing("experts")

    def get_mod_statistics(self) -> dict:
        """Of the last step, over all ranks; see model_moe.mod_statistics."""
        return self.last_routing("depth")

    # ---- the end

    def read_status(self) -> dict:
        try:
            return json.loads((self.out / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def write_status(
        self, state: str, code: int = 0, reason: str = "", anyone: bool = False
    ) -> None:
        """By rank 0, or (`anyone`) by the one rank that knows."""
        if (self.main or anyone) and self.attempt:
            row = {
                "state": state,
                "code": code,
                "step": self.step,
                "attempt": self.attempt,
                "reason": reason,
            }
            with contextlib.suppress(OSError):
                files.write_json(self.out / "status.json", row)

    def suggest(self) -> None:
        """suggested.yaml: this run's configuration for next time, with what was found on the way and why."""
        cfg, n = self.cfg, self.counted.n_params()
        T, cuda = cfg.model.max_seq_len, self.parallel.device.type == "cuda"
        ours = "batch_size gradient_accumulation_steps max_steps batch_tokens num_epochs auto_epoch_scaling resume "
        ours = f"{ours} overwrite out_dir".split()  # out_dir: this run's is finished
        keys = {k: v for k, v in self.written.items() if k not in ours}
        keys["orchestrator"] = {
            k: v for k, v in keys.get("orchestrator", {}).items() if k != "replay" and v != "replay"
        }
        used = torch.cuda.max_memory_reserved() if cuda else resident_bytes() or 0
        share = used / machines.total_memory(self.parallel.device)
        unique = sum(s.windows for s in self.sources.values()) * T
        limits = (cfg.chinchilla_multiplier, cfg.min_auto_epochs, cfg.max_auto_epochs)
        steps, why = plan.auto_steps(self.n_working, unique, self.run.rows_per_step * T, *limits)
        asked = self.written.get("batch_size")
        found = f"as run, {100 * share:.0f} % of the memory used"
        if asked not in (None, self.run.micro_batch):
            found = f"{asked} was asked for; " + (self.hint or found)
        lines = [
            f"# made at the end of {self.out}, {n['total']:,} parameters; the comments say why"
        ]
        lines += [f"batch_size: {self.run.micro_batch}  # {found}"]
        accumulate = f"{self.run.accumulation} micro-steps on {self.parallel.rows()[1]} ranks"
        lines += [
            f"batch_tokens: {self.run.rows_per_step * T}  # as run; accumulation follows from it: {accumulate}"
        ]
        lines += [
            f"max_steps: {steps}  # {why.removeprefix('length').strip()}; this run had {self.run.max_steps}"
        ]
        rolled = len(self.orchestrator.rollbacks)
        if rolled:
            keys["learning_rate"] = cfg.learning_rate * Orchestrator.CUT
            lines += [
                f"# learning_rate: x {Orchestrator.CUT}, for this run was rolled back {rolled} times"
            ]
        with contextlib.suppress(OSError):
            text = "\n".join(lines) + "\n" + yaml.safe_dump(keys, sort_keys=False)
            (self.out / "suggested.yaml").write_text(
                text, encoding="utf-8", errors="backslashreplace"
            )

    def print_sample(self) -> None:
        """Continue sample_prompt with the trained model."""
        path, par, tok, found = self.out / "tokenizer.json", self.parallel, None, None
        with self.nicety("sample"):  # of rank 0: what the others make depends on it
            tok = tokenizers.load(str(path)) if self.main and path.exists() else None
            found = tok and (
                tok.encode(self.cfg.sample_prompt).tolist() or [tok.eot_id],
                tok.eot_id,
                tok.n_vocab,
            )
        if (found := found if par.collective_free else par.broadcast(found)) is None:
            self.say("sample     none: bare shards bring no tokenizer")
            return
        prompt, end, n_vocab = found
        new = min(160, self.cfg.model.max_seq_len - len(prompt))
        stop = (
            (end,) if par.collective_free else ()
        )  # where each token is a matter of all ranks, none may stop before another
        options = {"temperature": 0.7, "top_p": 0.9, "stop_ids": stop, "n_vocab": n_vocab}
        with torch.compiler.set_stance("force_eager"):
            ids = [row[0] for row in self.model.generate([prompt], new, [self.cfg.seed], **options)]
        if not self.main:
            return
        ids = ids[: ids.index(end)] if end in ids else ids
        text = tok.decode(prompt + ids)
        self.say(
            f"sample     of the trained model, seed {self.cfg.seed}:\n{'-' * 60}\n{text}\n{'-' * 60}"
        )

    def draw(self) -> None:
        """out_dir/training.png, by a process of its own with the lowest priority: no step waits for it."""
        if (
            self.drawing is None or self.drawing.poll() is not None
        ):  # else the last one is still at it
            words = [sys.executable, "-m", "lumen.report", str(self.out), "--picture"]
            nice = ["nice", "-n", "19"] if shutil.which("nice") else []
            quiet = {
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.DEVNULL,
                "start_new_session": True,
            }
            env = {
                k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            }
            self.drawing = subprocess.Popen(
                [*nice, *words], env=env | {"CUDA_VISIBLE_DEVICES": ""}, **quiet
            )


def finite(x):
    """With null for what JSON has no word for: NaN, infinity."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def open_log_file(path):
    """train.log takes any text: of a name that is no UTF-8 it writes what Python made of it."""
    return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)


def start_wandb(cfg: Config, say, run_id: str | None = None):
    """A wandb run, or (`run_id`) one that goes on; offline, with a line, when there is no key or no network; None when
    it cannot be at all. It says nothing itself: its farewell is a history of forty lines."""
    os.environ.setdefault("WANDB_SILENT", "true")  # before the import
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "E003", "wandb_project is set but wandb is not installed: pip install wandb"
        ) from error
    options = {
        "project": cfg.wandb_project,
        "entity": cfg.wandb_entity,
        "dir": cfg.out_dir,
        "config": dataclasses.asdict(cfg),
    }
    options |= {"name": cfg.wandb_run_name or Path(cfg.out_dir).name}
    options |= {"id": run_id, "resume": "allow"}
    options |= {"settings": wandb.Settings(init_timeout=30, console="off")}
    mode, run = os.environ.get("WANDB_MODE", "online"), None
    if mode == "online":
        try:
            with contextlib.redirect_stderr(
                io.StringIO()
            ):  # a warning of theirs about the name `api`
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
    where = run.url if mode == "online" else f"{mode}: wandb sync {Path(run.dir).parent} uploads it"
    say(
        "wandb      disabled by WANDB_MODE"
        if mode == "disabled"
        else f"wandb      run {run.id}, {where}"
    )
    return run


def of_run(folder: str, name: str) -> tuple[Path, list[dict]]:
    """(out_dir, rows) of a run's jsonl file; E108 where there is none or it cannot be read."""
    path = Path(folder, name)
    if not path.is_file():
        if name == "decisions.jsonl" and (path.parent / "config.yaml").exists():
            return path.parent, []
        raise UserError("E108", f"there is no {path}")
    try:
        rows = read_lines(path)
    except ValueError as error:
        raise UserError("E108", f"{path}: {error}") from error
    if not rows:
        raise UserError("E104", f"{path} is empty")
    return path.parent, rows


def decisions(folder: str) -> int:
    """decisions.jsonl as a story: what happened, why, what was done, how it turned out. What lies within 100 turns
    belongs together; what is the same in turns on end is said once."""
    out, rows = of_run(folder, "decisions.jsonl")
    if not rows:
        print(f"{out}: nothing had to be decided")
        return 0
    outcomes, told = {r["id"]: r for r in rows if r.get("kind") == "outcome"}, []
    for r in (r for r in rows if "trigger" in r):
        last = told[-1] if told else None
        same = last and all(r[k] == last[k] for k in ("trigger", "action", "executed", "attempt"))
        if same and r["id"] not in outcomes and r["turn"] - last["until"] <= 1:
            last |= {"until": r["turn"], "to": r["step"]}
        else:
            told.append(r | {"until": r["turn"], "to": r["step"], "last": last})
    print(f"{out}: {len(rows) - len(outcomes)} decisions")
    for r in told:
        if (
            not (last := r["last"])
            or r["attempt"] != last["attempt"]
            or r["turn"] - last["until"] > 100
        ):
            print(f"\n{r['time']}, attempt {r['attempt']}, mode {r['mode']}")
        state = "done" if r["executed"] else f"NOT done: {r.get('refused') or r['blocked_by']}"
        state = f"level {r['level']}, {state}" if r["level"] else "a note"
        steps = f"step {r['step']}" + (f" to {r['to']}" if r["to"] != r["step"] else "")
        print(f"  {steps}: {r['trigger']}: {r['action']} (#{r['id']}, {state})")
        print(f"    why     {r['reason']}; confidence {r['confidence']:.2f} ({r['basis']})")
        if isinstance(how := r.get("args") or {}, dict) and how:
            print("    how     " + ", ".join(f"{k} {v}" for k, v in how.items() if v is not None))
        if o := outcomes.get(r["id"]):
            print(f"    outcome {o['verdict']}, seen at step {o['step']}")
    return 0


def picture(folder: str) -> int:
    """RUN/training.png: loss, learning rate, gradient norm, expert shares, and where something was decided."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("E003", "a picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out, rows = of_run(folder, "metrics.jsonl")
    marks = [d for d in read_lines(out / "decisions.jsonl") if "trigger" in d and d["executed"]]
    kept, lost = [], []  # a step that comes again was rolled back
    for r in rows:
        while kept and kept[-1]["step"] > r["step"]:
            lost.append(kept.pop())
        kept.append(r)
    shares = sorted({k for r in kept for k in r if k.startswith("experts/share/")})
    panels = ["loss", "lr", "grad_norm", *shares]
    figure, axes = pyplot.subplots(
        len(panels), 1, sharex=True, figsize=(10, 2.2 * len(panels)), squeeze=False
    )

    def draw(ax, rows, name, style, **more):
        found = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        if found:  # the legend names what happened only
            ax.plot([step for step, _ in found], [x for _, x in found], style, **more)

    for name, ax in zip(panels, axes[:, 0]):
        if name in shares:
            here = [r for r in kept if name in r]
            ax.stackplot(
                [r["step"] for r in here], np.array([[x or 0.0 for x in r[name]] for r in here]).T
            )
        else:
            draw(ax, kept, name, "-", label="training")
            draw(ax, lost, name, ".", color="0.7", label="rolled back")
        for d in marks:
            ax.axvline(
                d["step"],
                color=("0.8", "tab:orange", "tab:red", "tab:red", "black")[d["level"]],
                linewidth=0.8,
            )
        ax.set_ylabel(name.removeprefix("experts/"))
    draw(axes[0, 0], kept, "val_loss", "o-", markersize=3, label="validation")
    axes[0, 0].legend(fontsize=8)
    axes[2, 0].set_yscale("log")
    for d in (d for d in marks if d["level"] > 1 or d["trigger"] == "user"):
        axes[0, 0].annotate(
            d["action"],
            (d["step"], 1.02),
            xycoords=("data", "axes fraction"),
            rotation=30,
            fontsize=7,
        )
    axes[-1, 0].set_xlabel("step")
    figure.savefig(out / "training.png", dpi=120, bbox_inches="tight")
    print(out / "training.png")
    return 0


def main(argv: list[str]) -> int:
    words = Words(prog="python -m lumen.report", description="What a run decided, as a story.")
    words.add_argument("run", type=a_path, help="the out_dir of a run")
    words.add_argument("--picture", action="store_true", help="write training.png into it instead")
    args = words.parse_args(argv)
    return picture(args.run) if args.picture else decisions(args.run)


if __name__ == "__main__":
    command(main)
