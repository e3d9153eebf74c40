"""TODO."""

from __future__ import annotations

import torch

from lumen import machine as machines
from lumen.errors import UserError
from lumen.experts import add_expert, prune_expert, recycle_expert, restore_expert
from lumen.loader import Loader
from lumen.machine import resident_bytes

RESEED = "re-seed a dead expert"
NO_MOE, NO_MOD = "layer of experts: set model.n_experts", "MoD layer: set model.mod_capacity"
# what an argument of the wrong kind raises somewhere
WRONG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
METHODS = (  # what a line of control.jsonl may name: the methods that LuminaAI's users know, and a few of ours
    "add_expert prune_expert _initialize_new_expert adjust_capacity_factor adjust_routing_temperature "
    "enable_expert_dropout get_expert_statistics adjust_mod_capacity get_mod_statistics adjust_batch_size "
    "_recreate_dataloader get_current_metrics _extract_moe_routing_stats _calculate_throughput "
    "emergency_lr_reduction rollback_steps adjust_weight_decay _update_optimizer_param_groups "
    "restore_expert recycle_expert save stop"
).split()
ROUTER_KNOBS = {
    "capacity_factor": "capacity_factor",
    "routing_temperature": "temperature",
    "expert_dropout": "expert_dropout",
    "bias_update_rate": "bias_rate",
    "aux_loss_weight": "aux_weight",
}


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; 0 where torch's private counter is gone."""
    counters = getattr(torch._dynamo.utils, "counters", {})
    return counters.get("stats", {}).get("unique_graphs", 0)


class ByHand:
    """The methods that LuminaAI's users know, for Trainer: each returns a decision, refused with its reason where it
    cannot apply. Call them on all ranks between two turns, or write a line to control.jsonl, which does."""

    def surgery(self, action: str, layer_idx: int, do, **args) -> dict:
        def change():
            if layer_idx not in self.moe:
                has = list(self.moe) or "none"
                raise UserError(
                    "E308", f"layer {layer_idx} has no experts; layers that have: {has}"
                )
            try:  # the same bits on every rank, so the same choice, and the same refusal
                return do(self.moe[layer_idx]) or {}
            except WRONG as error:
                raise UserError("E308", f"layer {layer_idx}: {error}") from error

        return self.orchestrator.by_hand(action, change, layer_idx=layer_idx, **args)

    def add_expert(self, layer_idx: int, parent: int | None = None) -> dict:
        """Split an expert, by default the hottest, into a free slot of the layer."""

        def do(moe):
            seed = self.split_seed(layer_idx)
            pair = add_expert(moe, self.optimizer, self.step, self.parallel, parent, seed)
            return dict(zip(("parent", "expert"), pair))

        return self.surgery("add_expert", layer_idx, do, parent=parent)

    def prune_expert(self, layer_idx: int, expert_idx: int, force: bool = False) -> dict:
        """Take an expert out of the choice; restore_expert undoes it while its window is open."""

        def do(moe):
            prune_expert(moe, self.step, expert_idx, force, self.optimizer, self.parallel)

        return self.surgery("prune_expert", layer_idx, do, expert_idx=expert_idx, force=force)

    def restore_expert(self, layer_idx: int, expert_idx: int) -> dict:
        """Undo prune_expert."""

        def do(moe):
            restore_expert(moe, self.step, expert_idx)

        return self.surgery("restore_expert", layer_idx, do, expert_idx=expert_idx)

    def recycle_expert(self, layer_idx: int, expert_idx: int | None = None) -> dict:
        """Prune a dead expert, by default the coldest, and split the hottest into its slot."""

        def do(moe):
            self.save()  # it cannot be undone
            return self.recycle(layer_idx, expert_idx)

        return self.surgery("recycle_expert", layer_idx, do, expert_idx=expert_idx)

    def recycle(self, layer: int, expert: int | None = None, parents=None) -> dict:
        moe, seed = self.moe[layer], self.split_seed(layer)
        try:
            pair = recycle_expert(
                moe, self.optimizer, self.step, self.parallel, expert, seed, parents
            )
        except ValueError as error:
            raise UserError("E308", f"layer {layer}: {error}") from error
        return dict(zip(("parent", "expert"), pair))

    def _initialize_new_expert(self, new_expert: list, existing_experts: list) -> dict:
        """Make slot new_expert = [layer, slot] a copy, with noise, of the hottest of existing_experts. The slot must be
        free or its expert dead: one that works is not overwritten."""
        layer, slot = new_expert

        def do(moe):
            self.save()  # it cannot be undone
            return self.recycle(layer, slot, existing_experts)

        named = {"new_expert": new_expert, "existing_experts": existing_experts}
        return self.surgery("_initialize_new_expert", layer, do, **named)

    def knob(
        self, action: str, args: dict, name: str, value, low: float, high: float, has=True, needs=""
    ) -> dict:
        def do():
            if not has:
                raise UserError("E308", f"this model has no {needs}")
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not low <= value <= high
            ):
                raise UserError(
                    "E309", f"{action}: {value!r} is not a number from {low:g} to {high:g}"
                )
            before = self.orchestrator.get_knob(name)
            self.orchestrator.set_knob(name, value)
            return {"before": {name: before}, "after": {name: value}}

        return self.orchestrator.by_hand(action, do, **args)

    def adjust_capacity_factor(self, factor: float) -> dict:
        """Tokens an expert takes at most, times its fair share; on a dropless model this turns capacity on."""
        m = self.cfg.model
        low = 1 / max(1, m.n_experts)
        args = {"factor": factor}
        return self.knob(
            "adjust_capacity_factor", args, "capacity_factor", factor, low, 1e6, self.moe, NO_MOE
        )

    def adjust_routing_temperature(self, temp: float) -> dict:
        """Divide the router's logits by `temp`: above 1 flatter, below sharper."""
        args = {"temp": temp}
        return self.knob(
            "adjust_routing_temperature",
            args,
            "routing_temperature",
            temp,
            0.01,
            100,
            self.moe,
            NO_MOE,
        )

    def enable_expert_dropout(self, prob: float) -> dict:
        """Mute experts with this probability, drawn anew each step, while training."""
        m, most = (
            self.cfg.model,
            0.99 if self.cfg.model.n_experts_per_token < self.cfg.model.n_experts else 0.0,
        )
        has = self.moe and (m.n_experts > m.n_experts_per_token or not prob)
        return self.knob(
            "enable_expert_dropout", {"prob": prob}, "expert_dropout", prob, 0.0, most, has, NO_MOE
        )

    def adjust_mod_capacity(self, factor: float) -> dict:
        """The share of tokens that MoD layers compute, from the next step on (their annealing goes to it)."""
        low = 1 / self.cfg.model.max_seq_len
        return self.knob(
            "adjust_mod_capacity",
            {"factor": factor},
            "mod_capacity",
            factor,
            low,
            1.0,
            self.mod,
            NO_MOD,
        )

    def adjust_batch_size(self, new_size: int) -> dict:
        """Rows a micro-step; accumulation follows, so that the batch of a step stays what it is."""
        return self.orchestrator.by_hand(
            "adjust_batch_size", lambda: self.set_micro_batch(int(new_size)), new_size=new_size
        )

    def _recreate_dataloader(self, dataset: dict | None = None) -> dict:
        """Close the reader and open another at the same row: what it read ahead is read again. `dataset`, a dict of
        loader.Source by name, takes the place of the sources it had."""

        def do():
            if dataset is not None:
                if set(dataset) != set(self.sources):
                    raise UserError(
                        "E309", f"dataset: sources named {list(self.sources)} are expected"
                    )
                loader = Loader(
                    dataset, self.cfg.seed, self.run.segments, self.cfg.model.vocab_size
                )
                self.loader.close()
                self.sources, self.loader = dataset, loader
            self.set_micro_batch(self.run.micro_batch)

        return self.orchestrator.by_hand("_recreate_dataloader", do, dataset=None)

    def emergency_lr_reduction(self, factor: float = 10.0) -> dict:
        """Divide the learning rate by `factor` from the next step on; the schedule goes on below it."""
        scale = self.orchestrator.knobs.get("lr_scale", 1.0)
        ok = isinstance(factor, (int, float)) and factor >= 1  # less would raise it
        value = scale / factor if ok else None
        return self.knob("emergency_lr_reduction", {"factor": factor}, "lr_scale", value, 1e-6, 1e6)

    def rollback_steps(self, num_steps: int = 100) -> dict:
        """Back by at least so many steps, to a snapshot or a checkpoint, moments included; data goes on where
        it is. The run is saved before: that checkpoint is set aside as step_N.rolled_back."""
        self.finish_pending_step()
        watch = self.orchestrator

        def do():
            source = watch.source(step=self.step - int(num_steps)) if int(num_steps) > 0 else None
            if source is None:
                raise UserError(
                    "E309",
                    f"rollback_steps({num_steps}): nothing clean at step {self.step - int(num_steps)} or before",
                )
            self.save(prune=False)  # what is gone back to may be the oldest that is kept
            return watch.go_back(source, None)

        return watch.by_hand("rollback_steps", do, num_steps=num_steps)

    def adjust_weight_decay(self, value: float) -> dict:
        """Weight decay of all matrices from the next step on."""
        return self.knob("adjust_weight_decay", {"value": value}, "weight_decay", value, 0.0, 10.0)

    def _update_optimizer_param_groups(self, param: str, value: float) -> dict:
        """Set lr (the schedule is scaled: it is `value` now), weight_decay, beta1, beta2 or eps of all groups."""
        action, named = "_update_optimizer_param_groups", {"param": param, "value": value}
        limits = {
            "lr": (0.0, 1e3),
            "weight_decay": (0.0, 10.0),
            "beta1": (0.0, 0.99999),
            "beta2": (0.0, 0.999999),
        }
        limits["eps"] = (0.0, 1.0)
        low, high = limits.get(param, (1, 0))
        has = f"parameter {param!r}; there are {', '.join(limits)}"
        if param == "lr" and isinstance(value, (int, float)):
            value, param = value / max(self.scheduled_lr(), 1e-30), "lr_scale"
            low, high = 0.0, 1e6
        return self.knob(action, named, param, value, low, high, high > low, has)

    def get_current_metrics(self) -> dict:
        """Of the last finished step, as plain numbers: loss, learning_rate, grad_norm, throughput (tokens/s),
        memory_usage (share of what this process may use), epoch, step."""
        self.finish_pending_step()
        seen, cuda = self.latest, self.parallel.device.type == "cuda"
        if seen is None:
            return {"refused": "E308", "reason": "no step has been made yet"}
        used = torch.cuda.max_memory_reserved() if cuda else resident_bytes() or 0
        epochs = self.loader.epochs(seen.cursor + self.run.rows_per_step)
        return {
            "loss": seen.loss,
            "learning_rate": seen.lr,
            "grad_norm": seen.grad_norm,
            "throughput": self._calculate_throughput(),
            "memory_usage": used / machines.total_memory(self.parallel.device),
            "epoch": max(epochs.values()),
            "step": seen.step + 1,
        }

    def _calculate_throughput(self) -> float:
        """Tokens a second over all ranks since the last log line, without evaluation and saving."""
        interval = self.watch.interval(self.step)
        if interval.steps <= 0:
            interval = self.watch.last
        return interval.speed() * self.run.rows_per_step * self.cfg.model.max_seq_len

    def _extract_moe_routing_stats(self) -> dict:
        """get_expert_statistics, by the name it has in LuminaAI."""
        return self.get_expert_statistics()

    def save_now(self) -> None:
        """Evaluate and save between two turns: what a command after it changes is changed after it."""
        if self.step == 0:
            self.request_save()
            return
        if self.step != self.started_at and self.evaluated_at != self.step:
            self.evaluate()
        self.save()

    def request_save(self) -> None:
        """A checkpoint at the next step."""
        self.save_signal = 1

    def request_stop(self) -> None:
        """Finish the step, save, end in order; slurm/train.sbatch does not start such a run again."""
        self.stop_signal = 2
