"""Conversations to token ids: one renderer, (ids, mask), for data, training, sampling, serving.

A template says for each role how a message is written: a text with {content}, {end} (end-of-text)
and control tokens in braces, {<|im_start|>}. `segments` makes of a conversation pieces of text and
control tokens; `render` encodes each alone, so that no text of a user becomes a control token.
`jinja` writes the same template for tokenizer_config.json, where transformers makes the same ids
and the same mask of it. For that, content loses the white space around it, and a reply begins
where byte-level BPE merges nothing: after a newline, or with its own space after a colon.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lumen.errors import UserError, nearest
from lumen.files import read_json

LOSS_ON = ("assistant", "last_turn", "completion", "all")
FIELD = re.compile(r"\{([^{}\s]+)\}")  # a brace with a space in it is a brace
LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")


class Message(NamedTuple):
    role: str  # system, user, assistant, or another one that the template has
    content: str


class Segment(NamedTuple):
    """A text, or a control token by its name ("end": end-of-text); supervised: of a reply."""

    text: str
    control: str | None = None
    supervised: bool = False


class Template(NamedTuple):
    name: str
    formats: tuple[tuple[str, str], ...]  # (role, format), by role: JSON may have another order

    @property
    def roles(self) -> list[str]:
        return [role for role, _ in self.formats]


CHATML = "{<|im_start|>}ROLE\n{content}{<|im_end|>}\n"
FORMATS = {
    "chatml": {role: CHATML.replace("ROLE", role) for role in ("system", "user", "assistant")},
    "instruct": {
        "system": "{content}\n\n",
        "user": "### Instruction:\n{content}\n\n",
        "assistant": "### Response:\n{content}{end}",
    },
    "chat": {
        "system": "{content}\n\n",
        "user": "Human: {content}\n\n",
        "assistant": "Assistant: {content}{end}",
    },
    "raw": {"system": "{content}\n", "user": "{content}\n", "assistant": "{content}{end}"},
}
DEFAULT = "chatml"

# ---------------------------------------------------------------- templates


def find_template(spec) -> Template:
    """A template by its name, of {role: format}, or of what `describe` gave. E002."""
    if isinstance(spec, Template):
        return spec
    if isinstance(spec, str):
        if spec not in FORMATS:
            near = nearest(spec, FORMATS)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError("E002", f"template: {spec!r} is none of {', '.join(FORMATS)}{hint}")
        return Template(spec, tuple(sorted(FORMATS[spec].items())))
    formats = spec.get("formats", spec) if isinstance(spec, Mapping) else None
    if not isinstance(formats, Mapping) or not formats:
        raise UserError("E002", f"template: {spec!r} is no name and no {{role: format}}")
    pairs = []
    for role, text in formats.items():
        if not isinstance(role, str) or not isinstance(text, str):
            raise UserError("E002", f"template: {role!r}: {text!r}: both must be text")
        pairs.append((role, text))
    made = Template(
        str(spec.get("name", "own")) if formats is not spec else "own", tuple(sorted(pairs))
    )
    compiled(made)
    return made


def describe(template) -> dict:
    """{name, formats: {role: format}} for a manifest or a checkpoint; `find_template` reads it."""
    found = find_template(template)
    return {"name": found.name, "formats": dict(found.formats)}


def default_template(tokenizer) -> Template:
    """The first that the tokenizer has all control tokens for."""
    chatml = find_template(DEFAULT)
    names = set(FIELD.findall("".join(text for _, text in chatml.formats))) - {"content", "end"}
    if tokenizer is not None and names <= set(tokenizer.controls):
        return chatml
    return find_template("instruct")


def data_folders(state: Mapping) -> list[str]:
    """Where the data of a checkpoint's run were."""
    config = state.get("config") or {}
    sources = (config.get("data") or {}).get("sources") or {}
    folders = [config.get("data_dir"), *(source.get("dir") for source in sources.values())]
    return [folder for folder in folders if folder]


def template_of_run(state: Mapping) -> Template | None:
    """The template that a checkpoint's state names, or its data's manifests, or the folder that it
    was imported from; None: it was not trained on conversations."""
    specs = [state.get("template")]
    for folder in data_folders(state):
        specs.append(read_json(os.path.join(folder, "manifest.json")).get("template"))
    specs.append((state.get("imported") or {}).get("template"))
    return next((find_template(spec) for spec in specs if spec), None)


class Form(NamedTuple):
    """One role's format: what stands before and after the content, each with its flag."""

    before: tuple[Segment, ...]
    after: tuple[Segment, ...]
    lead: str  # a space that belongs to the reply's first word
    supervised: bool


@functools.lru_cache(64)
def compiled(template: Template) -> dict[str, Form]:
    """{role: Form}. E002: a format that cannot work."""
    forms = {role: _form(role, text) for role, text in template.formats}
    for role in ("user", "assistant"):
        if role not in forms:
            raise UserError("E002", f"template {template.name}: it has no format for {role}")
    return forms


def _form(role: str, text: str) -> Form:
    def wrong(reason: str):
        raise UserError("E002", f"template, format of {role}: {text!r}: {reason}")

    if text.count("{content}") != 1:
        wrong("{content} must stand in it once")
    if mark := LOOKS_LIKE_CONTROL.search(FIELD.sub("", text)):
        wrong(f"a control token stands in braces: {{{mark[0]}}}")
    head, tail = text.split("{content}")
    reply = role == "assistant"
    lead = ""
    if reply and head.endswith(" "):
        head = head[:-1]
        lead = " "
    before = tuple(_pieces(head))
    after = tuple(_pieces(tail))
    if reply:
        ends = [i for i, piece in enumerate(after) if piece.control]
        if not ends:
            wrong("a reply ends with a control token, as {end}, or a model would never stop")
        own = after[: ends[0] + 1]
        after = tuple(piece._replace(supervised=True) for piece in own) + after[ends[0] + 1 :]
    return Form(before, after, lead, reply)


def _pieces(text: str) -> Iterator[Segment]:
    for i, part in enumerate(FIELD.split(text)):
        if i % 2:
            yield Segment("", part)
        elif part:
            yield Segment(part)


# ---------------------------------------------------------------- the renderer


def segments(messages: Iterable, template: Template, open_reply=False) -> Iterator[Segment]:
    """The conversation in pieces. E105: a role that the template does not have."""
    forms = compiled(template)
    for role, content in messages:
        form = forms.get(role)
        if form is None:
            text = f"role {role!r}: template {template.name} has {', '.join(forms)}"
            raise UserError("E105", text)
        yield from form.before
        yield Segment(form.lead + content.strip(), None, form.supervised)
        yield from form.after
    if open_reply:
        yield from forms["assistant"].before


def joined(pieces: Iterable[Segment]) -> list[Segment]:
    """Neighbouring texts made one, but never a reply's with what is not: merges of the ids could
    cross there."""
    whole = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if piece.control is None and not piece.text:
            continue
        if last and not piece.control and not last.control and piece.supervised == last.supervised:
            whole[-1] = Segment(last.text + piece.text, None, piece.supervised)
        else:
            whole.append(piece)
    return whole


def render(
    messages: Iterable, template, tokenizer, loss_on="assistant", open_reply=False
) -> tuple[np.ndarray, np.ndarray]:
    """ids uint32 (n,) and mask uint8 (n,), 1 where the token at this place is a target.

    messages: (role, content) each. loss_on: "assistant" every reply, its content and the token
    that ends it; "last_turn" the last reply; "completion" from the first reply to the end of the
    last; "all" everything but the first token, before which there is nothing. open_reply: ends
    where a reply begins. E002, E105: a role that the template lacks; E113, E501: the tokenizer
    lacks a control token."""
    if loss_on not in LOSS_ON:
        raise UserError("E002", f"loss_on: {loss_on!r} is none of {', '.join(LOSS_ON)}")
    template = find_template(template)
    if tokenizer is None:
        refuse("", template, tokenizer)
    pieces = joined(segments(messages, template, open_reply))
    parts = [_encode(piece, template, tokenizer) for piece in pieces]
    if not parts:
        return np.empty(0, np.uint32), np.empty(0, np.uint8)
    flags = _flags([piece.supervised for piece in pieces], loss_on)
    mask = np.repeat(np.array(flags, np.uint8), [len(part) for part in parts])
    if loss_on == "all":
        mask[:1] = 0
    return np.concatenate(parts), mask


def _flags(replies: list[bool], loss_on: str) -> list[bool]:
    """Which pieces count, of which are parts of a reply."""
    if loss_on == "all":
        return [True] * len(replies)
    if loss_on == "assistant" or True not in replies:
        return replies
    last = len(replies) - 1 - replies[::-1].index(True)
    if loss_on == "completion":
        first = replies.index(True)
    else:
        first = last
        while first and replies[first - 1]:
            first -= 1
    return [first <= i <= last for i in range(len(replies))]


def _encode(piece: Segment, template: Template, tokenizer) -> np.ndarray:
    if piece.control:
        ids = _encode_control(tokenizer, piece.control)
        return refuse(piece.control, template, tokenizer) if ids is None else ids
    if len(piece.text) <= 32:
        return _encode_short(tokenizer, piece.text)
    return tokenizer.encode(piece.text)


# Headers come again and again. Nobody writes into these arrays.
@functools.lru_cache(4096)
def _encode_short(tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text)


@functools.lru_cache(256)
def _encode_control(tokenizer, name: str) -> np.ndarray | None:
    if tokenizer is None:
        return None
    found = tokenizer.eot_id if name == "end" else tokenizer.control(name)
    return None if found is None else np.array([found], np.uint32)


def refuse(name: str, template: Template, tokenizer):
    """E501: there is no tokenizer; E113: it lacks a control token of the template."""
    if tokenizer is None:
        text = f"template {template.name} is made of tokens, and there is no tokenizer"
        raise UserError("E501", text)
    fix = "take template instruct or chat, which need none, or a tokenizer that has it (bpe:N)"
    text = f"template {template.name} needs the control token {name}, and the tokenizer"
    raise UserError("E113", f"{text} {tokenizer.name} has no such special token: {fix}")


def check_tokenizer(template, tokenizer) -> None:
    """E113, E501 where the tokenizer lacks what the template needs, before anything is read."""
    template = find_template(template)
    for form in compiled(template).values():
        for piece in form.before + form.after:
            if piece.control:
                _encode(piece, template, tokenizer)


# ---------------------------------------------------------------- the end of a reply


def stop_ids(template, tokenizer) -> list[int]:
    """Ids that end a reply: the template's own first, then end-of-text. E113, E501."""
    template = find_template(template)
    form = compiled(template)["assistant"]
    ends = [piece for piece in form.after if piece.control and piece.supervised]
    ids = [int(_encode(end, template, tokenizer)[0]) for end in (*ends, Segment("", "end"))]
    return list(dict.fromkeys(ids))


def stop_texts(template) -> tuple[str, ...]:
    """Texts that end a reply too: of a model that goes on with the user's part."""
    before = compiled(find_template(template))["user"].before
    if not before or before[0].control:
        return ()
    return ("\n" + before[0].text.strip(),)


# ---------------------------------------------------------------- the same as Jinja

JINJA = """\
{{%- for message in messages %}}{{%- set content = message['content'] | trim %}}
{roles}
{{%- else %}}{{{{- raise_exception({refusal} + message['role']) }}}}
{{%- endif %}}{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- {header} }}}}{{%- endif %}}"""


def jinja(template) -> str:
    """The same template as a chat_template. transformers makes the ids and, by its tag
    {% generation %}, the mask of loss_on "assistant"; where the template has {end}, eos_token must
    be end-of-text."""
    template = find_template(template)
    forms = compiled(template)
    branches = []
    for i, (role, form) in enumerate(forms.items()):
        test = f"{{%- {'elif' if i else 'if'} message['role'] == {_quoted(role)} %}}"
        own = [piece for piece in form.after if piece.supervised]
        rest = form.after[len(own) :]
        body = f"content{_sum(own)}" if not form.lead else f'" " + content{_sum(own)}'
        if form.supervised:
            body = f"{{%- generation %}}{{{{- {body} }}}}{{%- endgeneration %}}"
        else:
            body = f"{{{{- {body} }}}}"
        branches.append(f"{test}{_expression(form.before)}{body}{_expression(rest)}")
    refusal = _quoted(f"template {template.name} has no role ")
    header = "''" + _sum(forms["assistant"].before)
    return JINJA.format(roles="\n".join(branches), refusal=refusal, header=header)


def _sum(pieces: Iterable[Segment]) -> str:
    """The pieces as ` + "a" + eos_token`."""
    terms = []
    for piece in pieces:
        end = piece.control == "end"
        terms.append(" + eos_token" if end else f" + {_quoted(piece.control or piece.text)}")
    return "".join(terms)


def _expression(pieces: Iterable[Segment]) -> str:
    terms = _sum(pieces).removeprefix(" + ")
    return f"{{{{- {terms} }}}}" if terms else ""


def _quoted(text: str) -> str:
    """A text for Jinja, which reads escapes as Python does."""
    return json.dumps(text, ensure_ascii=False)


# what most people's ChatML looks like; it differs from ours in keeping white space
COMMON_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# of SmolLM2, Qwen2 and others: what the model is told where the conversation has no system turn
DEFAULT_SYSTEM = re.compile(
    r"\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}"
    r"\{\{ ?'<\|im_start\|>system\\n((?:[^'\\]|\\.)*)<\|im_end\|>\\n' ?\}\}\{% endif %\}"
)


def without_system(text: str) -> tuple[str, str]:
    """(a Jinja template without its system turn for conversations that have none, that turn)."""
    # GGUF keeps the newlines of Jinja's texts as they are
    text = re.sub(r"\n(?=[^{}]*\}\})", r"\\n", text)
    found = DEFAULT_SYSTEM.search(text)
    if not found:
        return text, ""
    said = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[1])
    return text.replace(found[0], ""), said


def template_of(tokenizer_config: Mapping) -> str | None:
    """The name of our template that a tokenizer_config.json holds; None: none, or another one."""
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
        found = named.get("default")
    if not isinstance(found, str):
        return None
    plain, _ = without_system(found)
    if "".join(plain.split()) == "".join(COMMON_CHATML.split()):
        return "chatml"
    return next((name for name in FORMATS if jinja(name).strip() == found.strip()), None)


# ---------------------------------------------------------------- to look at

GREEN, YELLOW, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[0m"


def show(ids, mask, tokenizer, colour: bool | None = None) -> str:
    """The text of the ids: green where supervised, control tokens yellow where not; where the
    output is no terminal or NO_COLOR is set, supervised text in [ ] and control tokens in { }."""
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    ids = np.asarray(ids)
    control = np.isin(ids, list(tokenizer.controls.values()))
    kinds = np.asarray(mask).astype(np.int8) * 2 + control
    cuts = [0, *(np.flatnonzero(np.diff(kinds) != 0) + 1).tolist(), len(ids)]
    parts = []
    for begin, end in zip(cuts, cuts[1:]):
        if begin == end:
            continue
        text = visible(tokenizer.decode(ids[begin:end]))
        if end - begin > 3 and (ids[begin:end] == ids[begin]).all() and control[begin]:
            text = f"{tokenizer.decode(ids[begin : begin + 1])} x {end - begin}"  # padding
        supervised, is_control = divmod(int(kinds[begin]), 2)
        parts.append(_marked(text, bool(supervised), bool(is_control), colour))
    return "".join(parts)


def _marked(text: str, supervised: bool, control: bool, colour: bool) -> str:
    if colour:
        if supervised:
            return f"{GREEN}{text}{PLAIN}"
        return f"{YELLOW}{text}{PLAIN}" if control else text
    if control:
        text = f"{{{text}}}"
    return f"[{text}]" if supervised else text


def visible(text: str) -> str:
    """Nothing in it moves the cursor or sets colours."""
    shown = []
    for char in text:
        hidden = unicodedata.category(char) == "Cc" and char not in "\n\t"
        shown.append(f"\\x{ord(char):02x}" if hidden else char)
    return "".join(shown)
