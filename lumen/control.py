"""What people may do to a run while it trains: in a notebook `trainer.add_expert(0)`, from outside
a line in control.jsonl, {"method": "add_expert", "args": [0]}.

`Control` holds the methods, by the names that LuminaAI's users know, and a few of ours. Each
returns a decision, a row of decisions.jsonl; one that cannot apply is refused in it, with a code
and a reason. In a notebook call them on all ranks, between two iterations.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from lumen import machine as machines
from lumen.commands import METHODS, CommandFile, Commands, either_name, our_arguments, parse_command
from lumen.decisions import Decision
from lumen.errors import UserError
from lumen.experts import NO_STEP, Routing, add_expert, prune_expert, recycle_expert, restore_expert
from lumen.loader import Loader, mix

NO_MOE = "layer of experts: set model.n_experts"
NO_MOD = "MoD layer: set model.mod_capacity"
# what an argument of the wrong kind raises somewhere
BAD_ARGUMENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Knob:
    """A number that may be changed while the run trains. It is in checkpoints, by its name, and
    comes back on resume."""

    low: float
    high: float
    router: str = ""  # the attribute of each layer's router
    group: bool = False  # a key of the optimizer's groups


KNOBS = {
    "capacity_factor": Knob(0.0, 1e6, router="capacity_factor"),  # from 1 / n_experts
    "routing_temperature": Knob(0.01, 100.0, router="temperature"),
    "expert_dropout": Knob(0.0, 0.99, router="expert_dropout"),  # 0 where all experts are chosen
    "bias_update_rate": Knob(0.0, 1.0, router="bias_rate"),
    "aux_loss_weight": Knob(0.0, 1.0, router="aux_weight"),
    "mod_capacity": Knob(0.0, 1.0),  # from 1 / max_seq_len
    "weight_decay": Knob(0.0, 10.0, group=True),
    "beta1": Knob(0.0, 0.99999, group=True),
    "beta2": Knob(0.0, 0.999999, group=True),
    "eps": Knob(0.0, 1.0, group=True),
    "lr_scale": Knob(0.0, 1e6),  # the schedule times this
}


class Control:
    """The methods, the knobs, and control.jsonl.

    It drives the whole run, so it gets the whole trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.knobs: dict[str, float] = {}  # those that were changed
        self.file = CommandFile(trainer.out / "control.jsonl", trainer.parallel)

    # ---- knobs

    def get_knob(self, name: str) -> float:
        t, knob = self.trainer, KNOBS[name]
        if knob.router:
            return getattr(next(iter(t.moe.values())).router, knob.router)
        if name == "mod_capacity":
            return next(iter(t.mod.values())).target
        group = t.optimizer.param_groups[0]
        if name in ("beta1", "beta2"):
            return group["betas"][name == "beta2"]
        if knob.group:
            return group[name]
        return self.knobs.get(name, 1.0)

    def set_knob(self, name: str, value: float) -> None:
        t, knob = self.trainer, KNOBS[name]
        if knob.router:
            for moe in t.moe.values():
                setattr(moe.router, knob.router, value)
                if name == "expert_dropout" and not value:
                    moe.router.dropped_out = None  # all may be chosen again
        elif name == "mod_capacity":
            for mod in t.mod.values():
                mod.target = value
        elif knob.group:
            for group in t.optimizer.param_groups:
                self.set_group(group, name, value)
        self.knobs[name] = value

    def model_keys(self) -> dict:
        """Keys of the model that a knob has changed, as a checkpoint's reader must see them."""
        changed, model = {}, self.trainer.cfg.model
        if "routing_temperature" in self.knobs:
            changed["routing_temperature"] = self.knobs["routing_temperature"]
        if "mod_capacity" in self.knobs:
            now, was = self.knobs["mod_capacity"], model.mod_capacity
            per_layer = isinstance(was, list)
            changed["mod_capacity"] = [now if x < 1 else x for x in was] if per_layer else now
        return changed

    def set_group(self, group: dict, name: str, value: float) -> None:
        """In one of the optimizer's groups."""
        if name == "weight_decay":  # of matrices only
            group[name] = value if group["params"][0].dim() >= 2 else 0.0
        elif name == "beta1":
            group["betas"] = (value, group["betas"][1])
        elif name == "beta2":
            group["betas"] = (group["betas"][0], value)
        else:
            group[name] = value

    def split_seed(self, layer: int) -> int:
        """Of the noise with which an expert is split now: alike on all ranks, and in a replay."""
        t = self.trainer
        return (mix(t.cfg.seed, -1 - t.cursor) >> 8) + layer

    def limits(self, name: str) -> tuple[float, float]:
        m, knob = self.trainer.cfg.model, KNOBS[name]
        low, high = knob.low, knob.high
        if name == "capacity_factor":
            low = 1 / max(1, m.n_experts)
        if name == "mod_capacity":
            low = 1 / m.max_seq_len
        if name == "expert_dropout" and m.n_experts_per_token >= m.n_experts:
            high = 0.0
        return low, high

    def turn_knob(
        self, action: str, args: dict, name: str, value, missing: str = "", low: float = 0.0
    ) -> dict:
        """A decision to set a knob. E308 where the model has none, in words: `missing`; E309 where
        the value is no number within its limits, or is below `low`."""

        def do():
            if missing:
                raise UserError("E308", f"this model has no {missing}")
            least, high = self.limits(name)
            least = max(least, low)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value <= high:
                text = f"{action}: {value!r} is not a number from {least:g} to {high:g}"
                raise UserError("E309", text)
            before = self.get_knob(name)
            self.set_knob(name, value)
            return {"before": {name: before}, "after": {name: value}}

        return self.by_hand(action, do, **args)

    # ---- decisions of people

    def by_hand(self, action: str, do, **args) -> dict:
        """Written down, and done at once. `do` raises UserError, or what a bad argument raises,
        where it cannot be; nothing is changed then."""

        def careful():
            try:
                return do()
            except BAD_ARGUMENT as error:
                raise UserError("E309", f"{action}{args}: {error}") from error

        decision = Decision("user", action, "asked for", 1, more={"args": args})
        return self.trainer.orchestrator.decide(decision, do=careful)

    def surgery(self, action: str, layer_idx: int, do, **args) -> dict:
        """by_hand, on a layer of experts: do(moe)."""
        t = self.trainer

        def change():
            if layer_idx not in t.moe:
                has = list(t.moe) or "none"
                text = f"layer {layer_idx} has no experts; layers that have: {has}"
                raise UserError("E308", text)
            if t.cfg.lora.r:
                raise UserError("E308", "under lora experts stay as the base has them")
            try:  # the same bits on every rank, so the same choice, and the same refusal
                return do(t.moe[layer_idx])
            except BAD_ARGUMENT as error:
                raise UserError("E308", f"layer {layer_idx}: {error}") from error

        return self.by_hand(action, change, layer_idx=layer_idx, **args)

    # ---- experts

    def add_expert(self, layer_idx: int, parent: int | None = None) -> dict:
        """Split an expert, by default the hottest, into a free slot of the layer."""
        t = self.trainer

        def do(moe):
            seed = self.split_seed(layer_idx)
            made = add_expert(moe, t.optimizer, t.step, t.parallel, parent, seed)
            return {"parent": made[0], "expert": made[1]}

        return self.surgery("add_expert", layer_idx, do, parent=parent)

    def prune_expert(self, layer_idx: int, expert_idx: int, force: bool = False) -> dict:
        """Take an expert out of the choice; restore_expert undoes it while its window is open."""
        t = self.trainer

        def do(moe):
            prune_expert(moe, t.step, expert_idx, force, t.optimizer, t.parallel)

        return self.surgery("prune_expert", layer_idx, do, expert_idx=expert_idx, force=force)

    def restore_expert(self, layer_idx: int, expert_idx: int) -> dict:
        """Undo prune_expert."""

        def do(moe):
            restore_expert(moe, self.trainer.step, expert_idx)

        return self.surgery("restore_expert", layer_idx, do, expert_idx=expert_idx)

    def recycle_expert(self, layer_idx: int, expert_idx: int | None = None) -> dict:
        """Prune a dead expert, by default the coldest, and split the hottest into its slot."""

        def do(moe):
            return self.reseed(layer_idx, expert_idx)

        return self.surgery("recycle_expert", layer_idx, do, expert_idx=expert_idx)

    def _initialize_new_expert(self, new_expert: list, existing_experts: list) -> dict:
        """Split the hottest of existing_experts into slot new_expert = [layer, slot].

        The slot must be free or its expert dead: one that works is not overwritten.
        """
        layer, slot = new_expert

        def do(moe):
            return self.reseed(layer, slot, existing_experts)

        named = {"new_expert": new_expert, "existing_experts": existing_experts}
        return self.surgery("_initialize_new_expert", layer, do, **named)

    def reseed(self, layer: int, expert: int | None = None, parents=None) -> dict:
        """recycle(); the run is saved before, for it cannot be undone."""
        self.trainer.save()
        return self.recycle(layer, expert, parents)

    def recycle(self, layer: int, expert: int | None = None, parents=None) -> dict:
        """A dead expert's slot gets half of the hottest of `parents`. E308 where that cannot be."""
        t = self.trainer
        moe, seed = t.moe[layer], self.split_seed(layer)
        try:
            made = recycle_expert(moe, t.optimizer, t.step, t.parallel, expert, seed, parents)
        except ValueError as error:
            raise UserError("E308", f"layer {layer}: {error}") from error
        return {"parent": made[0], "expert": made[1]}

    # ---- routing

    def adjust_capacity_factor(self, factor: float) -> dict:
        """Tokens an expert takes at most, times its fair share; on a dropless model this turns
        capacity on."""
        missing = "" if self.trainer.moe else NO_MOE
        args = {"factor": factor}
        return self.turn_knob("adjust_capacity_factor", args, "capacity_factor", factor, missing)

    def adjust_routing_temperature(self, temp: float) -> dict:
        """Divide the router's logits by `temp`: above 1 flatter, below sharper."""
        missing = "" if self.trainer.moe else NO_MOE
        args = {"temp": temp}
        return self.turn_knob(
            "adjust_routing_temperature", args, "routing_temperature", temp, missing
        )

    def enable_expert_dropout(self, prob: float) -> dict:
        """Drop experts out with this probability, drawn anew each training step."""
        m = self.trainer.cfg.model
        choice = m.n_experts > m.n_experts_per_token or not prob
        missing = "" if self.trainer.moe and choice else NO_MOE
        return self.turn_knob(
            "enable_expert_dropout", {"prob": prob}, "expert_dropout", prob, missing
        )

    def adjust_mod_capacity(self, factor: float) -> dict:
        """The share of tokens that MoD layers compute, from the next step on (their annealing goes
        to it)."""
        missing = "" if self.trainer.mod else NO_MOD
        args = {"factor": factor}
        return self.turn_knob("adjust_mod_capacity", args, "mod_capacity", factor, missing)

    # ---- data

    def adjust_batch_size(self, new_size: int) -> dict:
        """Rows a micro-step; accumulation follows, so that the batch of a step stays what it is."""

        def do():
            self.trainer.set_micro_batch(int(new_size))

        return self.by_hand("adjust_batch_size", do, new_size=new_size)

    def _recreate_dataloader(self, dataset: dict | None = None) -> dict:
        """Close the reader and open another at the same row: what it read ahead is read again.

        dataset: a dict of windows.Source by name, takes the place of the sources it had.
        """
        t = self.trainer

        def do():
            if dataset is not None:
                if set(dataset) != set(t.data.sources):
                    text = f"dataset: sources named {list(t.data.sources)} are expected"
                    raise UserError("E309", text)
                loader = Loader(dataset, t.cfg.seed, t.run.segments, t.cfg.model.vocab_size)
                t.loader.close()
                t.data.sources, t.loader = dataset, loader
            t.set_micro_batch(t.run.micro_batch)

        return self.by_hand("_recreate_dataloader", do, dataset=None)

    # ---- optimizer

    def emergency_lr_reduction(self, factor: float = 10.0) -> dict:
        """Divide the learning rate by `factor` from the next step on; the schedule goes on."""
        value = None  # a factor below 1 would raise it
        if isinstance(factor, (int, float)) and factor >= 1:
            value = self.knobs.get("lr_scale", 1.0) / factor
        args = {"factor": factor}
        return self.turn_knob("emergency_lr_reduction", args, "lr_scale", value, low=1e-6)

    def adjust_weight_decay(self, value: float) -> dict:
        """Weight decay of all matrices from the next step on."""
        return self.turn_knob("adjust_weight_decay", {"value": value}, "weight_decay", value)

    def _update_optimizer_param_groups(self, param: str, value: float) -> dict:
        """Set weight_decay, beta1, beta2, eps or lr (the schedule is scaled: it is `value` now)."""
        args = {"param": param, "value": value}
        names = ["lr", *(name for name, knob in KNOBS.items() if knob.group)]
        missing = "" if param in names else f"parameter {param!r}; there are {', '.join(names)}"
        name = param
        if param == "lr":
            name = "lr_scale"
            if isinstance(value, (int, float)):
                value = value / max(self.trainer.scheduled_lr(), 1e-30)
        return self.turn_knob("_update_optimizer_param_groups", args, name, value, missing)

    def rollback_steps(self, num_steps: int = 100) -> dict:
        """Back by at least so many steps, to a snapshot or a checkpoint, moments included.

        Data goes on where it is. The run is saved before, as step_N.rolled_back.
        """
        t = self.trainer
        t.finish_pending_step()

        def do():
            step = t.step - int(num_steps)
            source = None
            if int(num_steps) > 0:
                source = t.orchestrator.source(step=step)
            if source is None:
                text = f"rollback_steps({num_steps}): nothing clean at step {step} or before"
                raise UserError("E309", text)
            t.save(prune=False)  # what is gone back to may be the oldest that is kept
            return t.orchestrator.go_back(source, None)

        return self.by_hand("rollback_steps", do, num_steps=num_steps)

    # ---- questions

    def get_current_metrics(self) -> dict:
        """Of the last finished step, as plain numbers.

        loss, learning_rate, grad_norm, throughput (tokens a second), memory_usage (share of what
        this process may use), epoch, step.
        """
        t = self.trainer
        t.finish_pending_step()
        latest = t.latest
        if latest is None:
            return {"refused": "E308", "reason": NO_STEP}
        if t.parallel.device.type == "cuda":
            used = torch.cuda.max_memory_reserved()
        else:
            used = machines.resident_bytes() or 0
        epochs = t.loader.epochs(latest.cursor + t.run.rows_per_step)
        return {
            "loss": latest.loss,
            "learning_rate": latest.lr,
            "grad_norm": latest.grad_norm,
            "throughput": self._calculate_throughput(),
            "memory_usage": used / machines.total_memory(t.parallel.device),
            "epoch": max(epochs.values()),
            "step": latest.step + 1,
        }

    def _calculate_throughput(self) -> float:
        """Tokens a second over all ranks since the last log line, without evaluation and saving."""
        t = self.trainer
        interval = t.watch.interval(t.step)
        if interval.steps <= 0:
            interval = t.watch.last
        return interval.speed() * t.run.rows_per_step * t.cfg.model.max_seq_len

    def _extract_moe_routing_stats(self) -> dict:
        """get_expert_statistics, by the name it has in LuminaAI."""
        return self.trainer.get_expert_statistics()

    def save(self) -> None:
        """Evaluate and save between two iterations, ahead of what the next command changes."""
        t = self.trainer
        if t.step == 0:
            t.request_save()
            return
        if t.step != t.started_at and t.progress.evaluated_at != t.step:
            t.evaluate()
        t.save()

    def stop(self) -> None:
        """Finish the step, save, end; slurm/train.sbatch does not start such a run again."""
        self.trainer.signals.stop = 2

    # ---- control.jsonl

    def carry_out(self, commands: Commands) -> None:
        """On all ranks. A process that dies in the midst of it reads them all again."""
        for line in commands.lines:
            self.command(line)
        self.file.done = commands.end

    def command(self, line: str) -> None:
        """One line {"method": NAME, "args": [...] or {...}}. What cannot be is refused (E309), and
        the run goes on."""
        decide = self.trainer.orchestrator.decide
        name = "?"
        try:
            row = parse_command(line)
            name = row["method"]
            method, args, kwargs = self.bind(name, row.get("args", []))
        except UserError as error:
            more = {"refused": error.code, "stat": {"line": line[:500]}}
            decide(Decision("user", str(name), error.text, 1, more=more))
            return
        try:
            answer = method(*args, **kwargs)
        except BAD_ARGUMENT as error:
            answer = {"refused": "E309", "reason": f"{name}: {error}"}
        decided = isinstance(answer, dict) and "action" in answer
        if decided:
            return
        more = {"args": row.get("args", [])}  # a question, or save: nothing else wrote it down
        if answer is not None:
            more["answer"] = answer
        if isinstance(answer, dict) and "refused" in answer:
            more["refused"] = answer["refused"]
        decide(Decision("user", name, "asked for in control.jsonl", 0, more=more))

    def bind(self, name: str, args) -> tuple:
        """(method, args, kwargs); E309 where there is none, or they do not fit."""
        if name not in METHODS:
            raise UserError("E309", f"no method {name!r}; there are: {', '.join(METHODS)}")
        kwargs = {}
        if isinstance(args, dict):
            args, kwargs = [], args
        elif not isinstance(args, list):
            args = [args]
        owner = self if hasattr(self, name) else self.trainer
        method = getattr(owner, name)
        try:
            kwargs = our_arguments(name, kwargs)
            inspect.signature(method).bind(*args, **kwargs)
        except TypeError as error:
            raise UserError("E309", f"{name}{inspect.signature(method)}: {error}") from error
        return method, args, kwargs

    # ---- state

    def state(self) -> dict:
        return {"read_to": self.file.done, "knobs": self.knobs}

    def load(self, state: dict, other_course: bool) -> None:
        """`other_course`: the commands that are there were for another run."""
        self.file.resume(state["read_to"], other_course)
        for name, value in state["knobs"].items():
            self.set_knob(name, value)


class ByHand:
    """Trainer's side of Control: `trainer.add_expert(0)` in a notebook."""

    control: Control
    routing: Routing

    def add_expert(self, layer_idx: int, parent: int | None = None) -> dict:
        return self.control.add_expert(layer_idx, parent)

    def prune_expert(self, layer_idx: int, expert_idx: int, force: bool = False) -> dict:
        return self.control.prune_expert(layer_idx, expert_idx, force)

    def restore_expert(self, layer_idx: int, expert_idx: int) -> dict:
        return self.control.restore_expert(layer_idx, expert_idx)

    def recycle_expert(self, layer_idx: int, expert_idx: int | None = None) -> dict:
        return self.control.recycle_expert(layer_idx, expert_idx)

    def _initialize_new_expert(self, new_expert: list, existing_experts: list) -> dict:
        return self.control._initialize_new_expert(new_expert, existing_experts)

    @either_name
    def adjust_capacity_factor(self, factor: float) -> dict:
        return self.control.adjust_capacity_factor(factor)

    @either_name
    def adjust_routing_temperature(self, temp: float) -> dict:
        return self.control.adjust_routing_temperature(temp)

    @either_name
    def enable_expert_dropout(self, prob: float) -> dict:
        return self.control.enable_expert_dropout(prob)

    @either_name
    def adjust_mod_capacity(self, factor: float) -> dict:
        return self.control.adjust_mod_capacity(factor)

    @either_name
    def adjust_batch_size(self, new_size: int) -> dict:
        return self.control.adjust_batch_size(new_size)

    def _recreate_dataloader(self, dataset: dict | None = None) -> dict:
        return self.control._recreate_dataloader(dataset)

    @either_name
    def emergency_lr_reduction(self, factor: float = 10.0) -> dict:
        return self.control.emergency_lr_reduction(factor)

    def rollback_steps(self, num_steps: int = 100) -> dict:
        return self.control.rollback_steps(num_steps)

    @either_name
    def adjust_weight_decay(self, value: float) -> dict:
        return self.control.adjust_weight_decay(value)

    def _update_optimizer_param_groups(self, param: str, value: float) -> dict:
        return self.control._update_optimizer_param_groups(param, value)

    def get_expert_statistics(self) -> dict:
        """Of the last step, over all ranks: see experts.expert_statistics. `refused` and `reason`
        before this process has made one, and where the model has no experts."""
        return self.routing.ask("experts")

    def get_mod_statistics(self) -> dict:
        """Of the last step, over all ranks: see experts.mod_statistics. `refused` and `reason`
        before this process has made one, and where the model has no MoD."""
        return self.routing.ask("depth")

    def get_current_metrics(self) -> dict:
        return self.control.get_current_metrics()

    def _calculate_throughput(self) -> float:
        return self.control._calculate_throughput()

    def _extract_moe_routing_stats(self) -> dict:
        return self.control._extract_moe_routing_stats()

    def request_save(self) -> None:
        """A checkpoint at the next step."""
        self.signals.save = 1

    def request_stop(self) -> None:
        self.control.stop()
