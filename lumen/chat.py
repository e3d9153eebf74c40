"""Conversations to token ids: one renderer, (ids, mask), for data, training, sampling, serving.

A template says for each role how a message is written: a text with {content}, {end} (end-of-text)
and control tokens in braces, {<|im_start|>}. `segments` makes of a conversation pieces of text and
control tokens; `render` encodes each alone, so that no text of a user becomes a control token.
`jinja` writes the same template for tokenizer_config.json, where transformers makes the same ids
and the same mask of it: for that, content loses the white space around it, and a piece ends where
no byte-level BPE merges across (at a control token, or between a newline or colon and a reply).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

LOSS_ON = ("assistant", "last_turn", "completion", "all")
# {content}, {end}, {<|im_start|>}: no space within
FIELD = re.compile(r"\{([^{}\s]+)\}")
LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")


class Message(NamedTuple):
    role: str  # system, user, assistant, or another one that the template has
    content: str


class Segment(NamedTuple):
    """A text, or a control token by its name ({end}: "end"); supervised: part of a reply."""

    text: str
    control: str | None
    supervised: bool


class Template(NamedTuple):
    name: str
    formats: tuple[tuple[str, str], ...]  # (role, format)

    def __contains__(self, role) -> bool:
        return any(name == role for name, _ in self.formats)


def _template(name: str, **formats: str) -> Template:
    return Template(name, tuple(formats.items()))


TEMPLATES = {
    template.name: template
    for template in (
        _template(
            "chatml",
            system="{<|im_start|>}system\n{content}{<|im_end|>}\n",
            user="{<|im_start|>}user\n{content}{<|im_end|>}\n",
            assistant="{<|im_start|>}assistant\n{content}{<|im_end|>}\n",
        ),
        _template(
            "instruct",
            system="{content}\n\n",
            user="### Instruction:\n{content}\n\n",
            assistant="### Response:\n{content}{end}",
        ),
        _template(
            "chat",
            system="{content}\n\n",
            user="Human: {content}\n\n",
            assistant="Assistant: {content}{end}",
        ),
        _template(
            "raw", system="{content}\n", user="{content}\n", assistant="{content}{end}"
        ),
    )
}  # fmt: skip


def template(spec) -> Template:
    """A template by name, or of {role: format}, or of what `describe` gave. E002."""
    raise NotImplementedError


def describe(template) -> dict:
    """{name, formats: {role: format}}, as JSON: `template` makes the same template of it."""
    raise NotImplementedError


def render(
    messages: Iterable[Message], template, tokenizer, loss_on="assistant", open_reply=False
) -> tuple[np.ndarray, np.ndarray]:
    """ids uint32 (n,) and mask uint8 (n,): 1 where the token at this place is a target.

    loss_on: "assistant" every reply, its content and the token that ends it; "last_turn" the last
    reply; "completion" from the first reply to the end of the last; "all" all but the first token.
    open_reply: ends where a reply begins. E105: a role that the template does not have; E113, E501:
    the tokenizer lacks a control token."""
    raise NotImplementedError


def stop_ids(template, tokenizer) -> list[int]:
    """Ids that end a reply: the template's own, then end-of-text."""
    raise NotImplementedError


def stop_texts(template) -> tuple[str, ...]:
    """Texts that end a reply, for a model that goes on with the user's part."""
    raise NotImplementedError


def jinja(template) -> str:
    """The same template as a Jinja chat_template; needs eos_token where the template has {end}."""
    raise NotImplementedError


def template_of(tokenizer_config: Mapping) -> str | None:
    """The name of our template that a tokenizer_config.json holds; None: not one of ours."""
    raise NotImplementedError


def show(ids, mask, tokenizer) -> str:
    """The text of the ids, green (or in brackets, without a terminal) where supervised."""
    raise NotImplementedError
