"""The README's numbers: `python bench.py speed CONFIG`, `python bench.py decode [RUN]`.

speed: steps of a configuration without evaluation or saving: tokens per second, share of the matrix peak, data wait.
decode: cached decoding against recomputing the whole sequence for each token, same model, same ids.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
import time

import torch

import checkpoint
import plan
from errors import UserError, command
from model import KVCache, ModelConfig, Transformer
from train import Trainer


def machine_line() -> str:
    """Hardware, flags, measured peak, versions, commit and date: what every number is printed with."""
    m = plan.machine()
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = "?"
    peak = plan.describe(plan.matrix_peak(m.device, m.compute_dtype, 1.0), "FLOP/s")
    flags = " ".join(plan.cpu_flags())
    return (
        f"{m.device.type} {m.name} ({flags}), {torch.get_num_threads()} threads, {m.precision} matrices {peak}, "
        f"torch {torch.__version__}, commit {commit or '?'}, {time.strftime('%Y-%m-%d')}"
    )


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.4g} (n {len(values)}, {min(values):.4g} to {max(values):.4g})"


def speed(words: list[str]) -> int:
    """Train 40 steps of a configuration into a temporary folder; the first 8 are warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--out_dir", folder, "--resume", "none", "--overwrite", "--max_steps", "40", "--save_interval", "0"]
        trainer = Trainer([*words, *fixed, "--log_interval", "4", "--eval_tokens", "1", "--sample_prompt", "null"])
        rows = []
        trainer.record = rows.append
        trainer.fit()
    rows = [r for r in rows if "loss" in r][2:]
    print(machine_line())
    print("tokens/s  " + spread([r["tokens_per_second"] for r in rows]))
    print("mfu       " + spread([r["mfu"] for r in rows]) + " of the measured matrix peak")
    print("data wait " + spread([r["data_wait"] for r in rows]) + " of the step")
    return 0


def decode(words: list[str]) -> int:
    """512 greedy tokens with the cache, and without it; a random 8.9 M model unless a run is given."""
    if words:
        saved = checkpoint.find(words[0])
        model = Transformer(ModelConfig(**saved.state["config"]["model"]))
        model.load_state_dict(saved.model_state())
    else:
        model = Transformer(
            ModelConfig(vocab_size=8192, d_model=256, n_layers=8, n_heads=4, d_ff=704, max_seq_len=1024)
        )
        model.init_weights(0)
    model.eval()
    total = min(512, model.cfg.max_seq_len)

    @torch.inference_mode()
    def recompute() -> list[int]:
        ids = torch.tensor([[1]])
        for _ in range(total - 1):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[0, 1:].tolist()

    def cached() -> list[int]:
        with torch.inference_mode():
            return [row[0] for row in model.generate([[1]], total - 1, [0], temperature=0)]

    @torch.inference_mode()
    def last_token() -> tuple[float, float]:
        """Seconds of the last of `total` tokens, recomputed and cached: best of 5 each."""
        row, cache, best = torch.tensor([ids[cached]]), KVCache(model.cfg, 1, total + 5), [math.inf, math.inf]
        model(row, cache=cache)
        for _ in range(5):
            for k, run in enumerate((lambda: model(row), lambda: model(row[:, -1:], cache=cache))):
                began = time.perf_counter()
                run()
                best[k] = min(best[k], time.perf_counter() - began)
        return tuple(best)

    times = {recompute: [], cached: []}
    ids = {}
    for _ in range(3):
        for run in times:
            began = time.perf_counter()
            ids[run] = run()
            times[run].append(time.perf_counter() - began)
    print(machine_line())
    print(f"model {model.n_params()['total']:,} parameters, {total} tokens; same ids: {ids[recompute] == ids[cached]}")
    print("recompute s " + spread(times[recompute]))
    print("cached    s " + spread(times[cached]) + f", {(total - 1) / min(times[cached]):.0f} tokens/s at best")
    print(
        "ratio       " + spread([a / b for a, b in zip(times[recompute], times[cached])]) + " over the whole generation"
    )
    at_end = [last_token() for _ in range(5)]
    slow, fast = (min(t) * 1e3 for t in zip(*at_end))
    print(f"at the end  {slow:.1f} ms recomputed, {fast:.2f} ms cached")
    print("ratio       " + spread([a / b for a, b in at_end]) + f" at {total} tokens")
    return 0


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("speed", "decode"):
        return {"speed": speed, "decode": decode}[argv[0]](argv[1:])
    print(__doc__)
    if not argv or argv[0] in ("-h", "--help"):
        return 0
    raise UserError("E002", f"{argv[0]!r} is not speed or decode")


if __name__ == "__main__":
    command(main)
