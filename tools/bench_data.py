"""What tools/bench.py measures of data: how fast text is prepared, and what documents that do not
see each other cost in training."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import prepare_data
from lumen import chat, machine, near, rules, tokenizer
from lumen.conversations import to_messages
from lumen.docstrings import docstring_rows
from model import ModelConfig, Transformer
from tools import timing

SOURCE = "stdlib"
MODEL = {"vocab_size": 4096, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024}
LENGTHS = (1000, 300, 100)  # of documents, about

# ---------------------------------------------------------------- preparing


def preparing(words: list[str]) -> int:
    """data: MB/s of CPU time, one process."""
    asked = timing.options(words, rounds=3)
    print(timing.machine_line())
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "tokenizer"
        first = prepare_data.prepare([SOURCE], str(made), "bpe:8192", quiet=True)
        file = str(made / "tokenizer.json")
        size = sum(source["bytes"] for source in first["sources"])
        for name, options in (("as it is", {}), ("minhash", {"minhash": True})):
            rates = []
            for n in range(asked.rounds):
                out = str(Path(folder) / f"{name} {n}")
                took = cpu_seconds(prepare_data.prepare, [SOURCE], out, file, quiet=True, **options)
                rates.append(size / took / 1e6)
            print(f"{SOURCE}, {name}: {timing.spread(rates)} MB/s")
        measure_parts(tokenizer.load(file), asked.rounds)
    return 0


def measure_parts(own, rounds: int) -> None:
    """What becomes of one text or conversation, by itself."""
    conversations = [to_messages(row) for row in docstring_rows()]
    texts = ["\n".join(content for _, content in one) for one in conversations]
    web = rules.Rules({"preset": "web"})
    signing = near.minhash_settings(True)
    parts = {
        "rendering conversations": lambda i: chat.render(conversations[i], "chatml", own),
        "preset web": lambda i: web.look(texts[i]),
        "bands of minhash": lambda i: near.bands_of(texts[i], signing),
    }
    size = sum(len(text.encode()) for text in texts)
    for name, run in parts.items():
        rates = []
        for _ in range(rounds):
            took = cpu_seconds(lambda run=run: [run(i) for i in range(len(texts))])
            rates.append(size / took / 1e6)
        mean = size // len(texts)
        print(f"{name}, of {mean} bytes each: {timing.spread(rates)} MB/s")


def cpu_seconds(run, *args, **options) -> float:
    began = time.process_time()
    run(*args, **options)
    return time.process_time() - began


# ---------------------------------------------------------------- training on documents


def documents(words: list[str]) -> int:
    """documents: a step with document_mask against the same step without, by length."""
    asked = timing.options(words, rounds=5, rows=2)
    here = machine.detect(device="cpu")
    print(timing.machine_line(here))
    cfg = ModelConfig(**MODEL, max_seq_len=1024)
    model = Transformer(cfg)
    model.init_weights(1)
    model.compute_dtype = here.compute_dtype
    generator = torch.Generator().manual_seed(0)
    shape = (asked.rows, cfg.max_seq_len)
    x = torch.randint(cfg.vocab_size, shape, generator=generator)

    def step(docs) -> None:
        model.zero_grad()
        total, _ = model(x, targets=x, docs=docs)
        total.backward()

    runs = {"causal": lambda: step(None)}
    for mean in LENGTHS:
        docs = drawn(mean, *shape)
        runs[f"documents of about {mean}"] = lambda docs=docs: step(docs)
    times = timing.interleaved(runs, asked.rounds, here.device)
    for name in islice(runs, 1, None):
        print(f"{name}: {timing.ratio(times[name], times['causal'])} of the time of causal")
    return 0


def drawn(mean: int, rows: int, T: int) -> torch.Tensor:
    """The number of the document of each position, (rows, T) int32; lengths as in real text: many
    short ones, few long ones."""
    rng = np.random.default_rng(0)
    numbers = np.zeros((rows, T), np.int32)
    for row in numbers:
        lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.32, 0.8, T)).astype(int)
        ends = np.cumsum(lengths)
        row[:] = np.searchsorted(ends, np.arange(T), side="right")
    return torch.from_numpy(numbers)
