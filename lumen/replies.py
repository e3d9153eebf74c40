"""What a model answers, for an evaluation: the most likely replies, without printing.

sample.py is for people. Here a model that is being trained is asked: nothing of it changes.
"""

from __future__ import annotations

import contextlib

import torch

from lumen import chat
from lumen.stream import Stream, decode
from model import Transformer


def replies(
    model: Transformer,
    tokenizer,
    template,
    prompts: list[list],  # each (role, content) pairs, up to the question; or ids, up to the reply
    max_new_tokens: int,
    n_vocab: int | None = None,  # ids from here on are padding; None: the tokenizer says it
) -> list[tuple[str, bool]]:
    """The greedy reply to each prompt and whether a stop id ended it, as one ragged batch.

    A text that ends a reply (chat.stop_texts) ends it too, but is no stop id. A prompt that
    fills the model's context gets ("", False); so do all that are open when logits are not finite,
    with the text that stands. Under FSDP all ranks ask the same. E105, E113, E501 of chat.render.
    """
    stop_ids = tuple(chat.stop_ids(template, tokenizer))
    stop_texts = chat.stop_texts(template)
    streams = []
    asked = []  # those that there is room for
    for ids in prompts:
        if not isinstance(ids[0], int):
            ids = chat.render(ids, template, tokenizer, open_reply=True)[0].tolist()
        room = model.cfg.max_seq_len - len(ids)
        stream = Stream(tokenizer, ids, stop_texts, stop_ids, max_new_tokens, room)
        streams.append(stream)
        if room > 0:
            asked.append(stream)
    if asked:
        steps = model.generate(
            [stream.ids for stream in asked],
            max(stream.limit for stream in asked),
            [0] * len(asked),
            stop_ids,
            n_vocab or tokenizer.n_vocab,
            temperature=0,
        )
        with torch.no_grad(), uncompiled(model), contextlib.suppress(FloatingPointError):
            decode(steps, asked)
    return [(stream.text.strip(), stream.reason == "eot") for stream in streams]


def uncompiled(model: Transformer):
    """A context: a graph for each length of the cache would be compiled, for three replies."""
    if any(block._compiled_call_impl is not None for block in model.blocks):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
