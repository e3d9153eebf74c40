"""tuning_peak.py KIND PRECISION RECOMPUTE [moe]: the most memory that a process took to fine-tune a
model of 60 M parameters for two steps, as finetune.py does it, and what the plan says: bytes.

KIND: full | lora | int8 | nf4. Run it with MALLOC_MMAP_THRESHOLD_=65536: so what is freed goes back
to the system, and what is measured is what was asked for.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lumen import base, lora, plan, quantize
from lumen.config import Config, LoraConfig
from lumen.optim import build_optimizer, step_optimizer
from lumen.tuning import Tuning
from model import ModelConfig, Transformer, role

ROWS = 2


def status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) << 10


def make(cfg: ModelConfig, tuning: Tuning, dtype) -> Transformer:
    model = Transformer(cfg)
    for name, p in model.named_parameters():
        # in place: Transformer.fill draws a copy
        torch.nn.init.ones_(p) if role(name) == "norm" else torch.nn.init.normal_(p, 0.0, 0.02)
    if tuning.quantize:
        quantize.quantize(model, tuning.quantize)
    if tuning.r:
        base.cast(model, dtype)
        lora.add(model, LoraConfig(r=tuning.r), 0)
    model.compute_dtype = dtype
    return model


def train(model: Transformer, steps: int) -> float:
    """CPU seconds of the fastest step, of two micro-steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(Config(learning_rate=1e-3), trained)
    T = model.cfg.max_seq_len
    ids = (torch.arange(ROWS * T) * 7919 % model.cfg.vocab_size).view(ROWS, T)
    times = []
    for _ in range(steps):
        start = time.process_time()
        for _ in range(2):
            (model(ids, targets=ids)[0] / (ROWS * T)).backward()
        one, never = torch.ones(()), torch.zeros((), dtype=torch.bool)
        step_optimizer(optimizer, list(trained.values()), one, never)
        times.append(time.process_time() - start)
    return min(times)


def main(kind: str, precision: str, recompute: str, *moe: str) -> None:
    torch.set_num_threads(1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tuning = Tuning(r=0 if kind == "full" else 8, quantize=kind if kind in quantize.KINDS else None)
    sparse = {"n_experts": 8, "d_expert": 512, "n_layers": 4} if moe else {}
    small = {"vocab_size": 64, "d_model": 64, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}
    if moe:
        small |= {"n_experts": 2, "d_expert": 32}
    train(make(ModelConfig(**small), tuning, dtype), 1)  # code and threads are there
    gc.collect()
    before = status("VmRSS")
    shape = {"vocab_size": 8192, "d_model": 768, "n_layers": 8, "n_heads": 12, "max_seq_len": 512}
    cfg = ModelConfig(**shape | sparse)
    model = make(cfg, tuning, dtype)
    model.recompute = recompute
    seconds = train(model, 2)
    layout = plan.Layout(cuda=False, tuning=tuning)
    how = (ROWS, 2, precision, recompute)
    found = plan.rank_memory(plan.on_meta(cfg), layout, *how)
    measured = {"measured": status("VmHWM") - before, "seconds": seconds}
    print(json.dumps(found | measured))


main(*sys.argv[1:])
