"""What keys and values in int8 cost (lumen/kv_int8.py), on a text of your own:

    python -m tools.kv MODEL FILE... [--tokens 8192] [--context 1024] [--precision fp32]

Bits per byte of the text through the cached path, every token seeing the keys and values before it
as the cache gives them back, with a cache in the model's dtype and with one in int8; how often both
find the same token likeliest; the bytes of a token; and the time of decoding a token, the two
caches in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F

from lumen.errors import UserError, a_path
from lumen.kv_int8 import Int8Cache
from lumen.launch import Words, command
from lumen.models import open_model
from model import KVCache

TYPES = {"full": KVCache, "int8": Int8Cache}
STEPS = 4  # of decoding, for each time; the median of seven counts


def logits_of(model, cache_type, ids: torch.Tensor) -> torch.Tensor:
    """Of each token of ids (1, T), read through a cache: (T, V) fp32."""
    cache = cache_type(model.cfg, 1, ids.shape[1], dtype=model.compute_dtype)
    place = cache.place

    def place_and_ask_all(idx):
        placed = place(idx)
        cache.last = cache.rows, torch.arange(idx.shape[1])[None]
        return placed

    cache.place = place_and_ask_all
    return model(ids, cache=cache)[0].float()


def losses(model, token_bytes, ids: torch.Tensor, context: int) -> dict:
    """Of ids (n,), in rows of `context`: bits per byte by kind of cache, and `same`."""
    nats = dict.fromkeys(TYPES, 0.0)
    n_bytes = same = n = 0
    for row in ids.split(context):
        if len(row) < 2:
            continue
        best = []
        for name, cache_type in TYPES.items():
            logits = logits_of(model, cache_type, row[None])[:-1]
            nats[name] += F.cross_entropy(logits, row[1:], reduction="sum").item()
            best.append(logits.argmax(-1))
        same += int((best[0] == best[1]).sum())
        n += len(row) - 1
        n_bytes += int(token_bytes[row[1:]].sum())
    found = {name: total / math.log(2) / n_bytes for name, total in nats.items()}
    return found | {"same": same / n, "tokens": n}


def bytes_per_token(model, cache_type) -> float:
    """Of keys and values as they lie in memory, counted."""
    few, many = (cache_type(model.cfg, 1, n, dtype=model.compute_dtype) for n in (0, 64))
    counts = []
    for cache in (few, many):
        parts = [*cache.k, *cache.v]
        counts.append(sum(x.nbytes if torch.is_tensor(x) else x.n_bytes() for x in parts))
    return (counts[1] - counts[0]) / 64


def decode_seconds(model, batch: int, context: int) -> dict:
    """{kind of cache: median seconds of a step of `batch` rows behind `context` tokens}."""
    caches = {}
    for name, cache_type in TYPES.items():
        cache = caches[name] = cache_type(model.cfg, batch, context + 1, dtype=model.compute_dtype)
        cache.filled += context  # of zeros, which take as long
    found = {name: [] for name in caches}
    one = torch.zeros(batch, 1, dtype=torch.long)
    for turn in range(8):
        for name, cache in caches.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                cache.filled.fill_(context)
                cache.used = context
                model(one, cache=cache)
            if turn:  # the first warms up
                found[name].append((time.perf_counter() - start) / STEPS)
    return {name: statistics.median(times) for name, times in found.items()}


def main(argv: list[str]) -> None:
    p = Words(prog="tools.kv", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model", type=a_path)
    p.add_argument("file", type=a_path, nargs="+")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--precision", default="fp32")
    args = p.parse_args(argv)
    opened = open_model(args.model, device="cpu", precision=args.precision)
    model, tokenizer = opened.model, opened.tokenizer
    if tokenizer is None:
        raise UserError("E501", f"{args.model} has no tokenizer.json to read text with")
    text = ""
    for file in args.file:
        with open(file, encoding="utf-8") as f:
            text += f.read()
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))[: args.tokens]
    context = min(args.context, model.cfg.max_seq_len)
    token_bytes = torch.from_numpy(tokenizer.token_bytes().astype("int64"))
    with torch.inference_mode():
        found = losses(model, token_bytes, ids, context)
        more = found["int8"] - found["full"]
        print(f"{opened}, {args.precision}, {torch.get_num_threads()} threads")
        print(f"{found['tokens']} tokens in rows of {context}: bits per byte {found['full']:.5f}")
        print(f"int8 {found['int8']:.5f} ({more:+.5f}), likeliest the same {found['same']:.2%}")
        full, int8 = (bytes_per_token(model, kind) for kind in TYPES.values())
        print(f"bytes a token {full:,.0f}, int8 {int8:,.0f}: {int8 / full:.1%}")
        for batch in (1, 8):
            times = decode_seconds(model, batch, context - 1)
            ratio = times["int8"] / times["full"]
            ms = f"{1e3 * times['full']:.2f} ms, int8 {1e3 * times['int8']:.2f} ms"
            print(f"a step of {batch} rows behind {context - 1}: {ms}, {ratio:.2f} times")


if __name__ == "__main__":
    command(main)
