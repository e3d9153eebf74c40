"""What llama.cpp makes of a GGUF file, asked by export.py to_gguf --check and by
tests/unit/test_llama_cpp.py: `LLAMA_PYTHON tools/llama_says.py FILE < QUESTIONS > ANSWERS`.

LLAMA_PYTHON is a Python with llama-cpp-python; nothing of Lumen is imported. Both ends are JSON:

    texts      [text]        -> ids        [[id]], control tokens in it are text
    marked     [text]        -> marked     [[id]], control tokens in it are control tokens
    rows       [[id]]        -> (logits)   .npy at LOGITS: float32 (sum of lengths, vocabulary)
    prompt     [id], n_new   -> greedy     [id], the best token each time, whatever ends a text
    messages   [{role, content}]           -> conversation, the file's template rendered
    always                   -> ends       ids that end a text; about: the file's keys

Everything is computed in fp32: the cache too, and without flash attention.
"""

from __future__ import annotations

import argparse
import json
import sys


def score(llama, ids) -> object:
    """(T, V) fp32."""
    llama.reset()
    llama.eval(ids)
    return llama.scores[: len(ids)].copy()


def greedy(llama, prompt, n_new: int) -> list[int]:
    row = score(llama, prompt)[-1]
    found = [int(row.argmax())]
    while len(found) < n_new:
        llama.eval(found[-1:])
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
    return found


def conversation(llama, messages) -> str | None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    names = []
    for i in (llama.token_eos(), llama.token_bos()):
        names.append(llama._model.token_get_text(i) if i >= 0 else "")
    return Jinja2ChatFormatter(template, *names)(messages=messages).prompt


def ends(llama) -> list[int]:
    import llama_cpp

    vocab = llama._model.vocab
    return [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]


def answer(file: str, asked: dict, context: int, threads: int, logits: str | None) -> dict:
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        file,
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    found = {"about": llama.metadata, "ends": ends(llama), "version": llama_cpp.__version__}
    for key, out, special in (("texts", "ids", False), ("marked", "marked", True)):
        made = []
        for text in asked.get(key, []):
            made.append(llama.tokenize(text.encode(), add_bos=False, special=special))
        found[out] = made
    if rows := asked.get("rows"):
        np.save(logits, np.concatenate([score(llama, row) for row in rows]))
    if prompt := asked.get("prompt"):
        found["greedy"] = greedy(llama, prompt, asked["n_new"])
    if messages := asked.get("messages"):
        found["conversation"] = conversation(llama, messages)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logits", help="where the .npy goes")
    words = parser.parse_args()
    asked = json.load(sys.stdin)
    said = answer(words.file, asked, words.context, words.threads, words.logits)
    json.dump(said, sys.stdout)
