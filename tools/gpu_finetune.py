"""The part `finetune` of tools/gpu.py: is fine-tuning right on a card, and how fast.

Right: in fp32 the loss and gradient of a second step against a CPU's; a resumed run's bytes. Fast:
steps of GPT-2 124M on packed conversations beside one of pre-training.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random

import torch

import finetune
import prepare_data
from lumen import lora
from lumen.attention import pick_attention, shape_of
from lumen.base import cast
from lumen.config import LoraConfig
from lumen.optim import build_optimizer
from lumen.quantize import quantize
from model import ModelConfig
from tools import bench_step, timing
from tools.gpu_parts import FEW_EXPERTS, GPT2, SMALL, Here, last_bytes, train
from tools.gpu_parts import run_keys as keys_of_base

WORDS = ("red", "blue", "green", "round", "flat", "old", "new", "tall")
LORA = ("--lora.r", "8")
WAYS = {  # kind of base, data, how it is trained
    "SFT, all weights": ("dense", "chats"),
    "LoRA": ("MoE", "chats", *LORA),
    "LoRA on int8": ("MoE", "chats", *LORA, "--quantize_base", "int8"),
    "LoRA on nf4": ("MoE", "chats", *LORA, "--quantize_base", "nf4"),
    "DPO, all weights": ("dense", "pairs", "--method", "dpo"),
    "DPO, LoRA on int8": ("MoE", "pairs", "--method", "dpo", *LORA, "--quantize_base", "int8"),
}
LAST = tuple(WAYS)[-1:]


def finetune_part(here: Here) -> None:
    """Right, exact, fast."""
    bench_step.few_tiles()
    for way in here.pick(tuple(WAYS), LAST):
        if "nf4" in way and not importlib.util.find_spec("bitsandbytes"):
            here.rows.note(way, "bitsandbytes is not installed")
            continue
        tried = (gradient_error, here, way)
        # what a kernel does wrong is of the gradient's own size
        here.rows.attempt(f"{way}: gradient", *tried, unit="of a CPU's, fp32", most=1e-2)
    for way in LAST:
        here.rows.attempt(f"{way}: the same bytes, stopped and resumed", same_bytes, here, way)
    speeds = {"pre-training": {}, "SFT, all weights": {"talks": True}}
    speeds["LoRA r 16"] = {"talks": True, "r": 16}
    speeds["LoRA r 16 on int8"] = {"talks": True, "r": 16, "kind": "int8"}
    for name, how in speeds.items():
        here.rows.attempt(f"124M, 16 rows, eager: {name}", speed, here, how, unit="tokens/s")


# ---------------------------------------------------------------- runs


def school(here: Here, name: str) -> str:
    """Where it is: a base `dense` or `MoE`, or the data `chats` or `pairs`; made once."""
    folder = here.top / f"school-{name}"
    if folder.exists():
        return str(folder)
    if name in ("chats", "pairs"):
        rng = random.Random(0)
        for split, n in (("train", 60), ("val", 8)):
            rows = (json.dumps(row(rng, name)) for _ in range(n))
            (here.top / f"{name}-{split}.jsonl").write_text("\n".join(rows))
        files = [[str(here.top / f"{name}-{split}.jsonl")] for split in ("train", "val")]
        how = {"template": "chatml", "seq_len": length(here), "quiet": True}
        prepare_data.prepare(files[0], str(folder), "bytes", files[1], **how)
        return str(folder)
    model = {"max_seq_len": length(here), "vocab_size": 320} | (
        FEW_EXPERTS if "MoE" in name else {}
    )
    # a base of few steps; on a CPU, so that both sides begin with the same bytes
    run = {"device": "cpu", "precision": "fp32", "max_steps": 2, "batch_size": 1}
    run |= {"eval_tokens": length(here), "log_interval": 1, "save_interval": 0, "orchestrator": {}}
    train(here, keys_of_base(here, folder.name, model, run))
    return str(folder)


def length(here: Here) -> int:
    return here.pick(256, 128)


def row(rng: random.Random, data: str) -> dict:
    asked, other = (" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2))
    if data == "pairs":
        return {"prompt": asked, "chosen": asked.upper(), "rejected": other}
    return {"prompt": asked, "response": asked.upper()}


def words(here: Here, way: str, name: str, device: str) -> list[str]:
    """finetune.py's of a short deterministic run in fp32: two micro-steps of two rows."""
    kind, data, *how = WAYS[way]
    made = {
        "out_dir": here.top / name,
        "device": device,
        "precision": "fp32",
        "deterministic": "true",
        "compile_model": "false",
        "attention": "sdpa",  # trying the others out takes seconds
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": 6,
        "save_interval": 0,
        "eval_interval": 0,
        "log_interval": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    line = [school(here, kind), "--data", school(here, data), *how]
    for key, value in made.items():
        line += [f"--{key}", str(value)]
    return line


def second_step(here: Here, way: str, device: str) -> tuple[torch.Tensor, float]:
    """Gradient of all that is trained, in one vector on the host, and loss: behind a step, since
    B of LoRA begins as zero and gives A no gradient."""
    trainer = finetune.FineTuner(finetune.read(words(here, way, f"{way}-{device}-0", device)))
    try:
        steps = trainer.iterations()
        next(steps)
        next(steps)
        sums = trainer.accumulate()
        parts = [p.grad.flatten().float().cpu() for p in trainer.weights.values()]
        steps.close()
    finally:
        trainer.close()
    return torch.cat(parts), (sums["ce"] / sums["count"]).item()


def gradient_error(here: Here, way: str) -> dict:
    want, loss = second_step(here, way, "cpu")
    again = here.top / f"{way}-cpu-0"
    if not here.cuda:  # the toy: another run of the same
        again.rename(again.with_name(f"{way}-first"))
    got, other = second_step(here, way, here.device.type)
    apart = abs(other - loss)
    assert apart <= 1e-3, f"the loss is {other}, a CPU's {loss}"
    return {"value": ((got - want).norm() / want.norm()).item(), "nats apart": apart}


def same_bytes(here: Here, way: str) -> bool:
    def stop(trainer, step):
        if step == 2:
            trainer.signals.stop = 1

    def run(name: str, act=None):
        line = words(here, way, f"{way}-{name}", here.device.type)
        return train(here, finetune.read(line), act, make=finetune.FineTuner)

    first = run("parts", stop)
    second = run("parts")
    assert 0 < first.step == second.started_at < second.step, f"{first.step}, {second.started_at}"
    return last_bytes(second.out) == last_bytes(run("whole").out)


# ---------------------------------------------------------------- speed


class Tuned(bench_step.Ours):
    """A step on four conversations a row, half of their tokens replies; or as in pre-training."""

    def __init__(self, here: Here, talks=False, r=0, kind=""):
        model = ModelConfig(**here.pick(GPT2, SMALL))
        super().__init__(model, here.machine, here.pick(16, 2))
        if talks:
            self.talk()
        if r:
            self.optimizer = None  # its moments go before others come
            if kind:
                quantize(self.model, kind)
            cast(self.model, self.machine.compute_dtype)
            lora.add(self.model, LoraConfig(r=r), 0)
            parameters = self.model.named_parameters()
            weights = {name: p for name, p in parameters if p.requires_grad}
            self.optimizer = build_optimizer(self.cfg, weights)
        shape = shape_of(self.model, len(self.x), talks)
        where = (self.machine.device, self.machine.compute_dtype)
        self.model.backend, _ = pick_attention("auto", shape, *where)

    def talk(self) -> None:
        self.docs = bench_step.four_documents(self.x)
        T = self.x.shape[1]
        at = torch.arange(T, device=self.x.device)
        self.y[:, at % (T // 4) < T // 8] = -1


def speed(here: Here, how: dict) -> dict:
    timing.forget_graphs()
    if here.cuda:
        torch.cuda.reset_peak_memory_stats()
    run = Tuned(here, **how)
    times = timing.interleaved({"": run}, here.pick(6, 1), here.device, here.pick(2, 1))[""]
    found = {"value": run.tokens / min(times), "ms": 1e3 * min(times)}
    if here.cuda:
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    found |= {"loss": run().item(), "attention": run.model.backend}
    assert math.isfinite(found["loss"]), f"the loss is {found['loss']}"
    return found
