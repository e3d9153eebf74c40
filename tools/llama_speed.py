"""How fast llama.cpp runs a GGUF file here, at batch 1, prefill and decode apart:
`LLAMA_PYTHON tools/llama_speed.py FILE --threads 1 --prompt_tokens 128 --new_tokens 128`.

LLAMA_PYTHON is a Python with llama-cpp-python; nothing of Lumen is imported. The last line of
stdout is JSON: prefill and decode in tokens/s of each repetition and their medians, and what was
run. One token is decoded by one llama_decode() and the greedy choice of the next is made from its
logits, as llama-bench does without the choice. The cache is f16 and flash attention is on where
llama.cpp turns it on itself, its defaults.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time


def decode(cpp, context, ids) -> None:
    array = (cpp.llama_token * len(ids))(*ids)
    status = cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(ids)))
    if status:
        sys.exit(f"llama_decode gave {status}")


def best(cpp, context, n_vocab: int) -> int:
    import numpy as np

    found = cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(found, shape=(n_vocab,)).argmax())


def once(cpp, context, n_vocab: int, prompt: list[int], n_new: int) -> tuple[float, float]:
    """(tokens/s of the prompt, of the new tokens)."""
    cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
    began = time.perf_counter()
    decode(cpp, context, prompt)
    token = best(cpp, context, n_vocab)
    middle = time.perf_counter()
    for _ in range(n_new):
        decode(cpp, context, [token])
        token = best(cpp, context, n_vocab)
    ended = time.perf_counter()
    return len(prompt) / (middle - began), n_new / (ended - middle)


def measure(file: str, threads: int, n_prompt: int, n_new: int, repeats: int) -> dict:
    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = cpp.llama_model_load_from_file(file.encode(), cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {file}")
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = n_prompt + n_new + 8
    options.n_threads = options.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, options)
    n_vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    prompt = [(7 * i + 3) % n_vocab for i in range(n_prompt)]
    once(cpp, context, n_vocab, prompt[:16], 4)  # warm
    runs = [once(cpp, context, n_vocab, prompt, n_new) for _ in range(repeats)]
    prefill, decoded = map(list, zip(*runs))
    return {
        "engine": f"llama-cpp-python {cpp.__version__}",
        "file": file,
        "threads": threads,
        "prompt_tokens": n_prompt,
        "new_tokens": n_new,
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decoded),
        "prefill_all": prefill,
        "decode_all": decoded,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    for name, value in (("threads", 1), ("prompt_tokens", 128), ("new_tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    words = parser.parse_args()
    counts = (words.threads, words.prompt_tokens, words.new_tokens, words.repeats)
    print(json.dumps(measure(words.file, *counts)))
