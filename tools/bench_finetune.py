"""What tools/bench.py measures of fine-tuning: what a step costs beside pre-training's and beside
other trainers', and what is learned of the library's docstrings.

In this order: one model and its data; steps of ours in turns; steps of peers, each in a process of
its own; what is learned.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import export
import finetune
import prepare_data
from lumen import chat, files
from lumen import tokenizer as tokenizers
from lumen.conversations import Reader
from lumen.docstrings import docstring_rows
from lumen.errors import UserError
from lumen.machine import cpu_has_bf16
from model import ModelConfig, Transformer
from tools import timing
from train import Trainer

# ---------------------------------------------------------------- one model and its data

MODEL = {  # a Llama of 5 M parameters: all peers have that
    "d_model": 256,
    "n_layers": 5,
    "n_heads": 4,
    "d_ff": 704,
    "max_seq_len": 512,
    "qk_norm": False,
}
SOURCE = "docstrings"
TEMPLATE = "chatml"
ROWS = 8  # 4,096 tokens a step
WORDS = ("--device", "cpu", "--compile_model", "false", "--overwrite", "true", "--resume", "none")
WORDS += ("--eval_interval", "0", "--log_interval", "1000")
QUIET = ("--save_interval", "0", "--max_steps", "1000000", "--eval_tokens", "1")


def make_all(top: Path) -> None:
    """Conversations, the same with a loss on all tokens, a model with random weights as a run and
    as a Hugging Face folder, and the conversations as peers read them."""
    T = MODEL["max_seq_len"]
    how = {"seq_len": T, "template": TEMPLATE, "quiet": True}
    prepare_data.prepare([SOURCE], str(top / "chats"), "bpe:4096", **how)
    file = top / "chats" / "tokenizer.json"
    prepare_data.prepare([SOURCE], str(top / "all"), str(file), loss_on="all", **how)
    own = tokenizers.load(str(file))
    cfg = ModelConfig(**MODEL, vocab_size=own.n_vocab)
    model = Transformer(cfg)
    model.init_weights(0)
    about = {"from": "random weights", "dtype": "float32", "template": TEMPLATE}
    export.write_run(top / "base", cfg, model.state_dict(), about, file, say=str)
    export.to_hf(top / "base", top / "hf", say=str)
    rows = [row for row in docstring_rows("chat") if len(rendered(row, own)) <= T]
    write_lines(top / "messages.jsonl", rows)
    write_lines(top / "litgpt" / "train.jsonl", [as_instruction(row) for row in rows])
    write_lines(top / "litgpt" / "val.jsonl", [as_instruction(row) for row in rows[:16]])


def rendered(row: dict, own) -> list[int]:
    return chat.render(Reader().messages(row), TEMPLATE, own)[0]


def as_instruction(row: dict) -> dict:
    """litgpt has one question and one reply; what came before is part of the question."""
    *before, last = [turn["content"] for turn in row["messages"]]
    return {"instruction": "\n".join(before), "output": last["content"] if last is dict else last}


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- steps of ours

# name: (class, data, keys)
OURS = {
    "pre-training": (Trainer, "all", {"document_mask": "false"}),
    "pre-training, document_mask": (Trainer, "all", {}),
    "SFT, document_mask false": (finetune.FineTuner, "chats", {"document_mask": "false"}),
    "SFT": (finetune.FineTuner, "chats", {}),
    "LoRA r 16": (finetune.FineTuner, "chats", {"lora.r": 16}),
}
AGAINST = (
    ("SFT, document_mask false", "pre-training"),
    ("SFT", "pre-training"),
    ("SFT", "pre-training, document_mask"),
    ("LoRA r 16", "SFT"),
)


def trainer_of(name: str, top: Path, precision: str) -> Trainer:
    kind, data, keys = OURS[name]
    keys = keys | {"precision": precision, "out_dir": top / "runs" / name.replace(" ", "_")}
    words = [str(top / "base"), "--data", str(top / data), "--batch_size", str(ROWS)]
    words += [*WORDS, *QUIET, *as_words(keys)]
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(finetune.read(words))


def as_words(keys: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


class Step(NamedTuple):
    wall: float  # seconds
    cpu: float  # of this process
    supervised: int  # tokens with a loss
    places: int  # tokens, padding among them


def finetuning(words: list[str]) -> int:
    """finetune: steps of ours in turns; then of peers, where they are installed."""
    o = timing.options(words, rounds=9, turns=3, peer="", litgpt="", inside="", no_peer=False)
    if o.inside:
        return peer_launch(json.loads(Path(o.inside).read_text()))
    print(timing.machine_line())
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        make_all(top)
        print(padding_line(top / "chats"))
        for precision in ("fp32", "mixed_bf16") if cpu_has_bf16() else ("fp32",):
            time_ours(top, precision, o.rounds)
            if not o.no_peer:
                time_peers(top, precision, o)
    return 0


def padding_line(folder: Path) -> str:
    found = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"][0]
    text = f"{found['docs']:,} conversations, {found['tokens']:,} tokens in rows"
    return f"{text} of {MODEL['max_seq_len'] + 1}: padding {found['padding'] / found['tokens']:.2%}"


def time_ours(top: Path, precision: str, rounds: int) -> None:
    steps = {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainers = {name: trainer_of(name, top, precision) for name in OURS}
        loops = {name: trainer.iterations() for name, trainer in trainers.items()}
        for i in range(2 + rounds):
            for name, loop in loops.items():
                made = one_step(trainers[name], loop)
                if i > 1:
                    steps.setdefault(name, []).append(made)
        for trainer in trainers.values():
            trainer.close()
    for name, made in steps.items():
        print(f"{precision}, {name}: {rates(made)}")
    for a, b in AGAINST:
        cpu = [[step.cpu for step in steps[name]] for name in (b, a)]
        wall = [[step.wall for step in steps[name]] for name in (b, a)]
        text = f"CPU {timing.ratio(*cpu)}; wall {timing.ratio(*wall)}"
        print(f"{precision}, tokens/s of {a} against {b}: {text}", flush=True)


def one_step(trainer: Trainer, loop) -> Step:
    before, began, cpu = trainer.tokens, time.perf_counter(), time.process_time()
    next(loop)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    places = trainer.run.rows_per_step * trainer.cfg.model.max_seq_len
    return Step(wall, cpu, trainer.tokens - before, places)


def rates(steps: list[Step]) -> str:
    """Tokens per second over all steps."""
    wall, cpu, supervised, places = (sum(column) for column in zip(*steps))
    text = f"supervised tokens/s {supervised / cpu:,.0f} of CPU time, {supervised / wall:,.0f} wall"
    return f"{text}; all places {places / cpu:,.0f} and {places / wall:,.0f} (n {len(steps)})"


# ---------------------------------------------------------------- steps of peers

WARM_UP, TIMED = 2, 4  # steps of a launch
# How trl's SFTTrainer may go through the data; the fastest is compared. Several rows of bfd at once
# take a mask over all of them, twice the time; padded is slower too. Wrapped: documents see each
# other, and are cut.
TRL = {
    "packing bfd, 1 row": {"packing": True, "batch": 1},
    "packing wrapped": {"packing": True, "batch": ROWS, "packing_strategy": "wrapped"},
}
LITGPT = {"padded": {"batch": ROWS}}


class Marks:
    """Notes the time after each optimizer step of anybody's, and what was counted since."""

    def __init__(self):
        self.at, self.steps = None, []
        self.supervised = self.places = 0
        register_optimizer_step_post_hook(lambda *_: self.mark())

    def mark(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self.at:
            wall, cpu = now[0] - self.at[0], now[1] - self.at[1]
            self.steps.append(Step(wall, cpu, self.supervised, self.places))
        self.at, self.supervised, self.places = now, 0, 0

    def count(self, labels) -> None:
        self.supervised += int((labels != -100).sum())
        self.places += labels.numel()


def lumen_steps(job: dict, marks: Marks) -> None:
    trainer = trainer_of("SFT", Path(job["top"]), job["precision"])
    places = trainer.run.rows_per_step * trainer.cfg.model.max_seq_len
    for step in trainer.iterations():
        if marks.steps:  # tokens are counted after the mark
            last = marks.steps[-1]._replace(supervised=trainer.latest.tokens, places=places)
            marks.steps[-1] = last
        if step == job["steps"]:
            break
    trainer.close()


def trl_steps(job: dict, marks: Marks) -> None:
    import datasets
    import transformers
    import trl

    how = dict(job["how"])
    batch = how.pop("batch")
    top = Path(job["top"])
    config = trl.SFTConfig(
        output_dir=str(top / "trl"),
        use_cpu=True,
        bf16=job["precision"] != "fp32",
        gradient_checkpointing=False,
        max_length=MODEL["max_seq_len"],
        assistant_only_loss=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS // batch,
        max_steps=job["steps"],
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        **how,
    )
    lines = (top / "messages.jsonl").read_text(encoding="utf-8").splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    own = transformers.AutoTokenizer.from_pretrained(top / "hf")
    trainer = trl.SFTTrainer(str(top / "hf"), args=config, train_dataset=rows, processing_class=own)
    model = trainer.model
    model.register_forward_pre_hook(lambda _, a, k: marks.count(k["labels"]), with_kwargs=True)
    trainer.train()


def litgpt_steps(job: dict, marks: Marks) -> None:
    """The same shape with random weights; about as many tokens a step as our rows hold."""
    from litgpt import GPT, Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.finetune import full
    from litgpt.prompts import Default
    from litgpt.utils import save_config

    top = Path(job["top"])
    folder = top / "litgpt"
    own = tokenizers.load(str(top / "hf" / "tokenizer.json"))
    config = Config(
        name="same",
        block_size=MODEL["max_seq_len"],
        vocab_size=own.n_vocab,
        padded_vocab_size=own.n_vocab,
        n_layer=MODEL["n_layers"],
        n_embd=MODEL["d_model"],
        n_head=MODEL["n_heads"],
        intermediate_size=MODEL["d_ff"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((top / "hf" / name).read_bytes())
    loss = full.chunked_cross_entropy

    def counted(logits, targets, *rest, **more):
        marks.count(targets)
        return loss(logits, targets, *rest, **more)

    full.chunked_cross_entropy = counted
    full.save_hyperparameters = print  # it would read our command line
    batch = job["how"]["batch"]
    full.setup(
        folder,
        out_dir=folder / "out",
        precision="32-true" if job["precision"] == "fp32" else "bf16-mixed",
        data=JSON(folder, mask_prompt=True, prompt_style=Default(), num_workers=0),
        train=TrainArgs(
            global_batch_size=6 * batch,
            micro_batch_size=batch,
            lr_warmup_steps=1,
            epochs=100,
            max_steps=job["steps"],
            max_seq_length=MODEL["max_seq_len"],
            log_interval=1000,
        ),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, final_validation=False),
    )


PEERS = {"lumen": lumen_steps, "trl": trl_steps, "litgpt": litgpt_steps}


def peer_launch(job: dict) -> int:
    """Inside a launch: its timed steps, as JSON."""
    marks = Marks()
    with contextlib.redirect_stdout(io.StringIO()):
        PEERS[job["who"]](job, marks)
    files.write_json(Path(job["out"]), marks.steps[WARM_UP - 1 :])
    return 0


def launch(top: Path, precision: str, who: str, how: dict, python: str, steps: int) -> list[Step]:
    job = {"top": str(top), "precision": precision, "who": who, "how": how, "steps": steps}
    job["out"] = str(top / "out.json")
    Path(job["out"]).unlink(missing_ok=True)
    (top / "job.json").write_text(json.dumps(job))
    words = [python, "-m", "tools.bench_finetune", "--inside", str(top / "job.json")]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode or not Path(job["out"]).exists():
        raise UserError("E001", f"finetune: {who}: {done.stderr.strip()[-600:]}")
    return [Step(*row) for row in json.loads(Path(job["out"]).read_text())]


def time_peers(top: Path, precision: str, o) -> None:
    """The fastest way of each peer, then launches of all in turns."""
    chosen = {"lumen": (sys.executable, {})}
    for who, ways, python in (("trl", TRL, o.peer), ("litgpt", LITGPT, o.litgpt)):
        python = python or sys.executable
        if version := installed(python, who):
            print(f"peer: {who} {version}")
            if found := fastest_way(top, precision, who, ways, python):
                chosen[who] = (python, found)
        else:
            print(f"no peer: {who} is not installed for {python}")
    steps = {who: [] for who in chosen}
    for _, (who, (python, how)) in itertools.product(range(o.turns), chosen.items()):
        steps[who].append(launch(top, precision, who, how, python, WARM_UP + TIMED))
    for who, rounds in steps.items():
        print(f"{precision}, {who}: {rates([step for steps in rounds for step in steps])}")
    for who in steps.keys() - {"lumen"}:
        for column, name in ((1, "CPU"), (0, "wall")):
            ours, theirs = ([rate(made, column) for made in steps[w]] for w in ("lumen", who))
            text = timing.ratio(theirs, ours)
            print(f"{precision}, supervised tokens/s of lumen against {who}, {name}: {text}")


def rate(steps: list[Step], column: int) -> float:
    """Seconds of a supervised token."""
    return sum(step[column] for step in steps) / sum(step.supervised for step in steps)


def installed(python: str, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def fastest_way(top: Path, precision: str, who: str, ways: dict, python: str) -> dict | None:
    best, least = None, float("inf")
    for name, how in ways.items():
        try:
            made = launch(top, precision, who, how, python, WARM_UP + 2)
        except (UserError, subprocess.TimeoutExpired) as error:
            print(f"  {who}, {name}: left out: {timing.said(error)}")
            continue
        print(f"  {precision}, {who}, {name}: {rates(made)}", flush=True)
        if rate(made, 1) < least:
            best, least = how, rate(made, 1)
    return best


if __name__ == "__main__":
    finetuning(sys.argv[1:])
