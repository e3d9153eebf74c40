"""Fine-tune a model: on conversations (SFT) or on preferences between two replies, all of its
weights or low-rank adapters (LoRA).

    python finetune.py BASE --data chats.jsonl          BASE: a run, a step, a Hugging Face folder
    python finetune.py BASE --data chats.jsonl --lora.r 16 [--quantize_base int8]
    python finetune.py BASE --data pairs.jsonl --method dpo
    torchrun --nproc_per_node=N finetune.py CONFIG      a YAML file with init_from: BASE
    python finetune.py merge RUN OUT [--check]          adapters and base become a model

`FineTuner` is train.py's Trainer with another loss and other weights to train; the loop, the
loader, checkpoints, the orchestrator and exact resume are the same. In this order: the keys that
follow from the base, FineTuner, main. --help prints every key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import lumen.waiting  # noqa: F401 - before torch
import torch

import train
from lumen import base, chat, fp8, lora, modes, preferences, quantize, shown
from lumen import tokenizer as tokenizers
from lumen.checkpoint import Checkpoint
from lumen.cli import TYPED, read_config
from lumen.config import help_text
from lumen.errors import UserError
from lumen.files import read_json
from lumen.launch import command, environment, fitted
from lumen.reference import Reference, evaluate
from lumen.replies import replies
from lumen.resume import take_weights
from lumen.schedule import LENGTH_KEYS
from lumen.tuning import tuning_of, without_batch
from train import Trainer

# ---------------------------------------------------------------- keys

REPLY = 64  # tokens of a reply that an evaluation shows
COMMANDS = ("merge", "to_peft", "from_peft")  # of lumen/adapters.py


def as_keys(argv: list[str]) -> list[str]:
    """`BASE --data FILE ...` in the keys of a run; anything else stays."""
    words, sources = [], []
    rest = list(argv)
    if rest and not rest[0].startswith("-") and not os.path.isfile(rest[0]):
        words += ["--init_from", rest.pop(0)]
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if name != "--data" or (value or (rest or ["{"])[0]).startswith("{"):
            words.append(word)
            continue
        sources.append(value if has_value else rest.pop(0))
        while rest and not rest[0].startswith("-"):  # --data *.jsonl
            sources.append(rest.pop(0))
    if len(sources) == 1 and (Path(sources[0]) / "manifest.json").exists():
        words += ["--data_dir", sources[0]]
    elif sources:
        for folder in sources:
            if (Path(folder) / "manifest.json").exists():
                text = f"--data {folder} is prepared, and goes alone"
                raise UserError("E002", f"{text}; or several by data: {{sources}} in a YAML")
        words += ["--prepare.sources", json.dumps(sources)]
    return words


def complete(tree: dict, place, notes: list[str]) -> None:
    """The keys that follow from the base, where nothing else was written. E125."""
    path = tree.get("init_from")
    if not path:
        text = "which model? python finetune.py BASE --data FILE, or init_from: BASE in the YAML"
        raise UserError("E125", text)
    modes.finetuning_paths(tree, place, notes)
    if not any(tree.get(key) for key in ("data_dir", "data", "prepare", "finetuning_paths")):
        text = "which data? --data FILE: conversations or pairs, or a folder of prepare_data.py"
        raise UserError("E125", text)
    name = Path(path).resolve().name
    method = tree.get("method") or "sft"
    if tree.get("out_dir") is None and place.otherwise == TYPED:
        tree["out_dir"] = f"out/{name}-{method}"
    found = base.read_base_or_run(str(path), tree.get("out_dir"))
    complete_data(tree, found, name, notes)
    if method != "sft" and found.model.dropout and "dropout" not in tree["model"]:
        tree["model"]["dropout"] = 0.0
        notes.append("model.dropout 0: it would be noise between two replies, and the reference")
    tree["model"] = base.model_keys(found, tree["model"])
    with_lora = bool(tree["lora"].get("r"))
    if tree["lora"] and "r" not in tree["lora"]:
        raise UserError("E002", f"{place('lora')}: lora needs r, the rank of the adapters")
    if not with_lora:  # r: 0 is no adapters
        tree["lora"] = {}
    if tree.get("learning_rate", "auto") == "auto":
        tree["learning_rate"], why = base.usual_rate(found.model.d_model, method, with_lora)
        notes.append(f"learning_rate {tree['learning_rate']:g}: {why}")
    for key, value in {"weight_decay": 0.0, "eval_interval": 50}.items():
        tree.setdefault(key, value)


def check_keys(cfg) -> None:
    """E002: what would have no effect here, or does not go together. Nothing asked is left out."""
    wrong = []
    if cfg.method == "sft":
        for key in ("beta", "gamma", "label_smoothing", "sft_coef"):
            if getattr(cfg, key):
                wrong.append(f"{key} is of preferences, not of method sft; --method dpo?")
    else:
        preferences.check_method(cfg)
        if "softcap" in (cfg.model.extras or []):
            wrong.append(f"model.extras: softcap: method {cfg.method} measures logits without it")
    if cfg.lora.r:
        if cfg.freeze:
            wrong.append("freeze: under lora only adapters are trained")
        if cfg.init_optimizer:
            wrong.append("init_optimizer: the base's moments are of weights that lora freezes")
        if cfg.orchestrator.enable_architecture_adaptation:
            wrong.append("orchestrator.enable_architecture_adaptation would change a frozen base")
    elif cfg.quantize_base:
        wrong.append("quantize_base: only a base that lora freezes can be held in few bits")
    hidden = {"matrix", "expert"} if cfg.model.n_experts else {"matrix"}
    if cfg.optimizer == "muon" and (cfg.lora.r or hidden <= set(tuning_of(cfg).freeze)):
        who = "lora freezes; adapters are AdamW's" if cfg.lora.r else "freeze names"
        wrong.append(f"optimizer: muon is for hidden matrices, which {who}: write adamw")
    wrong += fp8.unfit(cfg) + without_batch(cfg)
    if wrong:
        raise UserError("E002", "; ".join(wrong))


def read(argv: list[str]):
    """As lumen.cli.read_config, for FineTuner. E002, E125."""
    cfg, *rest = read_config(as_keys(argv), complete)
    if all(getattr(cfg, key) is None for key in LENGTH_KEYS):
        # not among the written keys: what nobody wrote may grow where data are few (enough_steps)
        cfg = dataclasses.replace(cfg, num_epochs=3 if cfg.method == "sft" else 1)
    check_keys(cfg)
    return cfg, *rest


def complete_data(tree: dict, found: base.Base, name: str, notes: list[str]) -> None:
    """How the data are prepared: with the base's tokenizer, its template, rows of its length."""
    prepare = tree.get("prepare")
    if isinstance(prepare, dict) and prepare.get("sources"):
        if found.tokenizer is None and not prepare.get("tokenizer"):
            text = f"{found.path} has no tokenizer.json: name one by prepare: {{tokenizer: FILE}}"
            raise UserError("E125", text)
        prepare.setdefault("tokenizer", str(found.tokenizer))
        if not prepare.get("template"):
            spoken = found.template
            if spoken is None:
                spoken = chat.default_template(tokenizers.load(prepare["tokenizer"]))
                why = "was taught no chat template"
                if found.foreign_template:
                    why = "has a chat template that Lumen does not know"
                fix = "it learns this one, or that of --template NAME"
                notes.append(f"template {spoken.name}: {found.path} {why}; {fix}")
            if spoken.name not in chat.FORMATS:
                text = f"{found.path} speaks a template of its own, {spoken.name}"
                fix = "prepare the data with prepare_data.py and give the folder as --data"
                raise UserError("E125", f"{text}: {fix}")
            prepare["template"] = spoken.name
        T = tree["model"].get("max_seq_len", found.model.max_seq_len)
        prepare.setdefault("out", base.folder_for(prepare, name, T))
    elif folder := tree.get("data_dir"):
        # rows of conversations have the length for which they were packed
        rows = read_json(Path(str(folder)) / "manifest.json").get("rows")
        if rows and "max_seq_len" not in tree["model"]:
            T, then = rows["length"] - 1, found.model.max_seq_len
            tree["model"]["max_seq_len"] = T
            if T > then:
                text = f"model.max_seq_len {T}: rows of {folder}; {found.path} has seen {then} at"
                notes.append(f"{text} most, and places beyond that are new to it (rope_scaling)")


# ---------------------------------------------------------------- the trainer


class FineTuner(Trainer):
    """A Trainer that begins with a base, and trains all of it or adapters around it."""

    fine_tunes = True
    pairs_per_row = 1.0  # of the data; until they have been counted

    def begin(self, notes):
        self.began_with: dict = {}  # the base: path, sha256
        self.template: chat.Template | None = None  # of the conversations
        self.tokenizer = None
        self.fresh: list[int] = []  # control tokens that the base does not know
        self.targets: list[str] = []  # matrices that get adapters
        super().begin(notes)
        if self.started_at == 0:
            self.parallel.run_or_raise_on_all(self.tell_data)

    # ---- the base

    def find_weights(self, saved):
        """The base's; a run of all weights that goes on has them in its checkpoint. E311: it goes
        on with another base. All that can refuse, and out_dir is as it was."""
        self.parallel.run_or_raise_on_all(self.check_trained)
        base.check_templates(self.data)
        if self.data.template:
            self.template = chat.find_template(self.data.template)
        if self.data.tokenizer_dir is not None:
            self.tokenizer = tokenizers.load(str(self.data.tokenizer_dir))
        named, then = self.cfg.init_from, {}
        if saved:
            base.check_goes_on(self.cfg, saved, self.targets)
            self.began_with = then = saved.state["base"]
            self.fresh = then["fresh"]
        there = bool(then) and base.holds(named, then["path"])
        if saved and not self.cfg.lora.r and (there or not os.path.exists(named)):
            return None
        weights = self.start.find_weights(then["path"] if there else named)
        model, step = weights
        if self.cfg.lora.r and model.n_experts_max != self.cfg.model.n_experts_max:
            text = f"model.n_experts_max: under lora it stays the base's, {model.n_experts_max}"
            raise UserError("E002", text)
        path = str(step.path if isinstance(step, Checkpoint) else named)
        found = self.parallel.broadcast(base.base_sha256(path) if self.main else None)
        if then and then["sha256"] != found:
            text = f"{saved.path} began with {then['path']} (sha256 {then['sha256']})"
            fix = "give another --out_dir"
            raise UserError("E311", f"{text}; {path} is another model ({found}): {fix}")
        if not saved:
            self.fresh = self.fresh_ids()
            self.began_with = {"path": path, "sha256": found, "fresh": self.fresh}
        return weights if self.cfg.lora.r or not saved else None

    def check_trained(self) -> None:
        """E002: lora.targets or freeze that this model has not; E003."""
        if self.cfg.lora.r:
            self.targets = lora.choose(list(lora.adaptable(self.counted)), self.cfg.lora.targets)
            if self.cfg.lora.dropout and all(name.endswith(".experts") for name in self.targets):
                text = f"lora.dropout: {self.cfg.lora.dropout}: adapters of experts have none"
                raise UserError("E002", f"{text}, and there are no others")
        base.check_frozen(self.counted, self.cfg.freeze)
        if self.cfg.quantize_base == "nf4":
            quantize.load_bitsandbytes()

    def fresh_ids(self) -> list[int]:
        found = base.read_base(self.cfg.init_from)
        if self.template is None or self.tokenizer is None:
            return []
        if found.template not in (None, self.template):
            text = f"{found.path} speaks {found.template.name}, the data {self.template.name}"
            self.found.changes.append(f"template: {text}: it will have to learn another one")
        return base.fresh_ids(found, self.template, self.tokenizer)

    # ---- the loss

    def loss(self, x, y, docs, *more):
        if self.cfg.method == "sft":
            return super().loss(x, y, docs)
        return preferences.loss(self.model, self.cfg, x, y, docs, *more, self.pairs_per_row)

    def measure(self, rows, token_bytes=None):
        if self.cfg.method == "sft":
            return super().measure(rows, token_bytes)
        rest = (self.data.val_sources, self.parallel, self.run.micro_batch)
        return evaluate(self.model, self.cfg, rows, *rest, lambda: self.signals.stop)

    # ---- what is trained

    def adapt(self, weights):
        cfg, model = self.cfg, self.model
        if not cfg.lora.r:
            base.freeze(model, cfg.freeze)
            return weights
        # a base that is frozen: as it is computed with, and under the adapters
        mine = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        take = (cfg.init_from, weights[1], weights[0], 0, mine, self.parallel)
        self.parallel.run_or_raise_on_all(take_weights, *take)
        if cfg.quantize_base:
            quantize.quantize(model, cfg.quantize_base)
        base.cast(model, self.machine.compute_dtype)
        lora.add(model, cfg.lora, cfg.seed, self.fresh)
        return None

    def build(self, saved, weights):
        super().build(saved, weights)
        if self.cfg.init_optimizer and saved is None:
            self.parallel.run_or_raise_on_all(self.take_moments, weights[1])
        if saved is None and self.fresh and not self.cfg.lora.r:
            self.parallel.run_or_raise_on_all(self.begin_fresh_rows, weights[1])
        self.beside = {"base": self.began_with}
        if self.cfg.method != "sft":
            self.compare_with_base(saved)
        if self.cfg.lora.r:
            self.beside["adapter"] = self.adapter()

    def compare_with_base(self, saved) -> None:
        """Preferences: the data have two rows of the model each, and the base's log-probabilities
        of every pair are there before the first step."""
        cfg, sources = self.cfg, self.data.sources.values()
        self.sum_names = preferences.SUM_NAMES
        self.targets_per_step *= 2
        self.pairs_per_row = sum(s.pairs for s in sources) / sum(s.windows for s in sources)
        if not preferences.needs_reference(cfg.method):
            return
        facts = {"base_sha256": self.began_with["sha256"], "quantize_base": cfg.quantize_base}
        facts |= {"compute_dtype": str(self.machine.compute_dtype), "template": self.template}
        # the weights fit others than the base's
        facts["rope"] = [cfg.model.rope_theta, cfg.model.rope_scaling]
        found = Reference(self.data, facts, self.out, self.say)
        known = saved.state["reference"] if saved else None
        # new rows were trained from the mean on, not from what the base has there
        can = cfg.lora.r and not self.fresh
        off = functools.partial(lora.off, self.model) if can else None
        where = (self.parallel, self.run.micro_batch)
        self.beside["reference"] = found.load_or_compute(self.model, *where, known, off)
        if not saved:
            self.say(f"reference  {found.check_start(self.model, cfg, *where)}")

    @torch.no_grad()
    def begin_fresh_rows(self, weights) -> None:
        """All weights are trained: rows of new control tokens begin at the mean of the others.
        weights: the base's, a state dict or a checkpoint."""
        par = self.parallel
        for name, p in self.model.named_parameters():
            if base.role(name) in ("embedding", "head"):
                ours = isinstance(weights, Checkpoint)
                table = weights.read(f"model.{name}") if ours else weights[name]
                mean = base.mean_row(table, self.fresh).to(par.device)
                for i in self.fresh:
                    par.set_row(p, par.local(p), i, mean)

    def adapter(self) -> dict:
        """What a checkpoint says of its adapters."""
        found = dataclasses.asdict(self.cfg.lora) | {"targets": self.targets}
        found |= {"fresh_ids": self.fresh, "quantize_base": self.cfg.quantize_base}
        return found | {"base": self.began_with["path"], "base_sha256": self.began_with["sha256"]}

    def tensors(self):
        """Under adapters: what is trained, and the routers' buffers."""
        found = super().tensors()
        if not self.cfg.lora.r:
            return found
        parameters = self.model.named_parameters()
        frozen = {f"model.{name}" for name, p in parameters if not p.requires_grad}
        return {name: tensor for name, tensor in found.items() if name not in frozen}

    @torch.no_grad()
    def take_moments(self, step) -> None:
        """init_optimizer: go on with the moments of the base's run. E125: it has none."""
        there = step.tensors if isinstance(step, Checkpoint) else ()
        mine = {n: tensor for n, tensor in self.tensors().items() if n.startswith("optim.")}
        lacking = [name for name in mine if name not in there]
        if lacking:
            text = f"init_optimizer: {self.cfg.init_from} has no optimizer's state {lacking[0]}"
            raise UserError("E125", f"{text}: it holds weights, or that was not trained so")
        for name, tensor in mine.items():
            for offset, _, local, _ in self.parallel.local_shards(name, tensor):
                local.copy_(step.read(name, offset, local.shape))

    # ---- what it says

    def evaluate(self) -> bool:
        """As a Trainer; and what the model answers to the first questions that are held out."""
        new_best = super().evaluate()
        asks = self.cfg.method == "sft" and self.template and self.tokenizer and self.val_set
        # where a forward pass takes all ranks, all of them ask
        if asks and not self.stopping and (self.main or not self.parallel.collective_free):
            began = time.perf_counter()
            prompts = shown.first_prompts(self.data.val_sources, self.val_set)
            if not prompts:
                return new_best
            with self.report.optional("replies"):
                how = (self.model, self.tokenizer, self.template, prompts, REPLY)
                self.tell_replies(prompts, replies(*how))
            self.watch.leave_out(time.perf_counter() - began)  # as the evaluation itself
            self.watch.lap("evaluation")
        return new_best

    def tell_replies(self, prompts: list[list[int]], answers: list[tuple[str, bool]]) -> None:
        ended = sum(stopped for _, stopped in answers)
        self.say(f"replies    step {self.step}: stops: {ended} of {len(answers)}")
        for ids, (text, _) in zip(prompts, answers):
            # the last part of the question, without its control tokens
            words = [i for i in ids if i not in self.tokenizer.controls.values()]
            self.say(shown.answered(self.tokenizer.decode(words), text))
        if answers and not ended and self.step >= self.run.max_steps:
            text = f"no reply stopped within {REPLY} tokens: where replies are shorter than that,"
            self.say(f"advice     {text} their end was not learned yet: more steps, a higher rate")
        row = {"step": self.step, "attempt": self.report.attempt}
        self.report.record(row | {"replies": len(answers), "replies_stopped": ended})

    def tell_data(self) -> None:
        """One row, what of it is learned in green; and how much of all rows that is. By rank 0."""
        if not self.main:
            return
        run, windows = self.run, sum(s.windows for s in self.data.sources.values())
        if few := shown.few_steps(
            run.max_steps, run.rows_per_step, windows, self.parallel.rows()[1]
        ):
            self.say(f"advice     {few}")
        if self.fresh:
            names = f"{len(self.fresh)} control tokens are new to the base"
            self.say(f"template   {self.template.name}: {names}: their rows begin at the mean")
        if self.cfg.lora.r:
            for line in lora.describe(self.model):
                self.say(f"adapters   {line}")
        for name, source in self.data.sources.items():
            which = f"{name}: " if len(self.data.sources) > 1 else ""
            self.say(f"learned    {which}{shown.shares(source)}")
            if source.kind == "text":
                self.say(f"note       {name} is text, no conversations: all of it is learned")
        if self.tokenizer:
            first = next(iter(self.data.sources.values()))
            self.say(f"row 0      {shown.first_row(first, self.tokenizer)}")


# ---------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        from lumen import adapters

        return adapters.main(argv)
    if {"-h", "--help"} & set(argv):
        words = "finetune.py BASE --data FILE"
        print(f"{__doc__.partition('`FineTuner`')[0]}{fitted(help_text(words))}")
        return 0
    if environment("WORLD_SIZE", 1) > 1:
        cfg, written, *_ = read(argv)
        if written.get("zero_stage"):
            return sharded(argv, cfg)
    return train.main(argv, make=FineTuner, read=read)


def sharded(argv: list[str], cfg) -> int:
    """Where zero_stage is written: all weights, as train_fsdp.py shards them. E002 for adapters."""
    import train_fsdp

    if cfg.lora.r:
        text = "lora does not go with zero_stage: adapters are small, so every rank has them all"
        raise UserError("E002", f"{text}; leave zero_stage out")
    layout = (train_fsdp.make_parallel, train_fsdp.layout_of)
    return train.main(argv, *layout, make=FineTuner, read=read)


if __name__ == "__main__":
    command(main, lasting=True)
