"""Rows of a data set to conversations: every shape that people use becomes a list of messages.

    {"messages" | "conversation" | "conversations": [{"role", "content"} or {"from", "value"}]}
    {"prompt", "response" | "completion"}   texts, or lists of messages
    {"question", "answer"}                  the same, where there is no "text"
    {"instruction", "input", "output"}      also with "history": [[question, answer], ...]
    {"prompt", "chosen", "rejected"}        a preference pair; without prompt: whole conversations;
                                            "messages" or "instruction" may stand for prompt
    {"text"}                                no conversation

"system" beside them is a system turn. A content is a text or a list of {"type": "text", "text"}.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from lumen.chat import Message
from lumen.errors import nearest

ROLES = dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter", "instruction"), "user")
ROLES |= dict.fromkeys(("assistant", "ai", "bot", "gpt", "model", "chatgpt"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
LISTS = ("messages", "conversation", "conversations")
REPLIES = {"response": "prompt", "completion": "prompt", "answer": "question"}  # to what
# a conversation as one text, as in hh-rlhf
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class RowError(Exception):
    """A row that is no conversation. code: E102 a field is missing or of another type, E104 a
    content is empty, E105 the roles, E126 a pair without a difference."""

    def __init__(self, code: str, reason: str):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def row_kind(row: dict) -> str | None:
    """ "pairs", "chat" or "text" by the names of the row's fields; None: none that is known."""
    if "chosen" in row and "rejected" in row:
        return "pairs"
    if any(name in row for name in LISTS):
        return "chat"
    if "instruction" in row and "output" in row:
        return "chat"
    reply = reply_of(row)
    if reply == "answer" and "text" in row:  # the text that both were made from
        return "text"
    if reply:
        return "chat"
    return "text" if "text" in row else None


def reply_of(row: dict) -> str | None:
    """The field with the reply to another field, or None."""
    for reply, asked in REPLIES.items():
        if reply in row and asked in row:
            return reply
    return None


class Reader:
    """How rows become messages. roles: {name: role} beside ROLES, tools: the template has them,
    strict: two turns of one role are refused, not merged. counts gets what was done to rows:
    merged, tail_dropped, system_dropped."""

    def __init__(self, roles: Mapping | None = None, strict=False, tools=False):
        self.roles = ROLES
        if roles:
            self.roles = ROLES | {name.strip().lower(): role for name, role in roles.items()}
        self.strict = strict
        self.tools = tools
        self.counts = Counter()

    # ------------------------------------------------------------ rows

    def messages(self, row: dict) -> list[Message]:
        """The conversation of a chat row; it ends with a reply. RowError."""
        if name := next((name for name in LISTS if name in row), None):
            turns = self.turns(row[name], name)
        elif "instruction" in row:
            turns = self.history(row) + [self.question(row)]
            turns.append(self.message("assistant", row.get("output"), "output"))
        else:
            name = reply_of(row)
            if name is None:
                raise RowError("E102", f"fields {', '.join(map(str, row))}: no conversation")
            asked = REPLIES[name]
            turns = self.history(row) + self.turns(row[asked], asked, "user")
            turns += self.turns(row[name], name, "assistant")
        return self.whole(self.with_system(row, turns))

    def pair(self, row: dict) -> tuple[list[Message], list[Message]]:
        """(chosen, rejected) of a pairs row: they differ in the last reply only. RowError."""
        sides = []
        prompt = self.prompt(row)
        for name in ("chosen", "rejected"):
            turns = self.side(row[name], name, explicit=prompt is not None)
            if prompt is not None and not begins_with(turns, prompt):
                turns = prompt + turns
            dropped = self.counts["tail_dropped"]
            turns = self.whole(self.with_system(row, turns))
            if self.counts["tail_dropped"] != dropped:
                raise RowError("E105", f"{name} does not end with a reply")
            sides.append(turns)
        chosen, rejected = sides
        if chosen == rejected:
            raise RowError("E126", "chosen and rejected are the same")
        if chosen[:-1] != rejected[:-1]:
            raise RowError("E105", "chosen and rejected differ before the last reply")
        return chosen, rejected

    def prompt(self, row: dict) -> list[Message] | None:
        """What both sides of a pair answer, where the row has it apart."""
        for name in ("prompt", *LISTS):
            if row.get(name) is not None:
                return self.turns(row[name], name, "user")
        if "instruction" in row:
            return [self.question(row)]
        return None

    def side(self, value, name: str, explicit: bool) -> list[Message]:
        if explicit or not isinstance(value, str):
            return self.turns(value, name, "assistant" if explicit else None)
        _, *parts = TURN.split(value)
        if not parts:
            raise RowError("E102", f'"{name}" is one text, and there is no "prompt"')
        return [self.message(r, c, name) for r, c in zip(parts[::2], parts[1::2])]

    def with_system(self, row: dict, turns: list[Message]) -> list[Message]:
        system = row.get("system")
        if not isinstance(system, str) or not system.strip():
            return turns
        if turns and turns[0].role == "system":
            return turns
        return [Message("system", system), *turns]

    def history(self, row: dict) -> list[Message]:
        turns = []
        for exchange in row.get("history") or []:
            if not isinstance(exchange, list) or len(exchange) != 2:
                raise RowError("E102", '"history" is a list of [question, answer]')
            for role, content in zip(("user", "assistant"), exchange):
                turns.append(self.message(role, content, "history"))
        return turns

    def question(self, row: dict) -> Message:
        text = text_of(row["instruction"], "instruction")
        more = text_of(row.get("input"), "input")
        if more.strip():
            text = f"{text}\n\n{more}" if text.strip() else more
        return self.message("user", text, "instruction")

    # ------------------------------------------------------------ turns

    def turns(self, value, name: str, role: str | None = None) -> list[Message]:
        """The messages of a list, or one message of that role of a text."""
        if isinstance(value, str) and role:
            return [self.message(role, value, name)]
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise RowError("E102", f'"{name}" is {kind_of(value)}, not a list of messages')
        found = []
        for number, turn in enumerate(value, 1):
            where = f"{name}, message {number}"
            if not isinstance(turn, Mapping):
                raise RowError("E102", f"{where} is {kind_of(turn)}, not an object")
            said = turn.get("role", turn.get("from"))
            content = turn.get("content", turn.get("value"))
            if turn.get("tool_calls") and not content:
                raise RowError("E105", f"{where}: a call of a tool, which no template has")
            found.append(self.message(said, content, where))
        return [turn for turn in found if turn]

    def message(self, said, content, where: str) -> Message | None:
        """None: an empty system turn, which says nothing."""
        if not isinstance(said, str):
            raise RowError("E102", f"{where}: its role is {kind_of(said)}, not a text")
        role = self.roles.get(said.strip().lower())
        if role is None:
            near = nearest(said.strip().lower(), self.roles)
            why = f"is none of {', '.join(sorted(self.roles))}"
            if near:
                why = f"is unknown; did you mean {near}?"
            raise RowError("E105", f"{where}: role {said[:40]!r} {why}")
        if role == "tool" and not self.tools:
            raise RowError("E105", f"{where}: a tool's turn, which the template does not have")
        text = text_of(content, where)
        if text.strip():
            return Message(role, text)
        if role == "system":
            self.counts["system_dropped"] += 1
            return None
        raise RowError("E104", f"{where} is empty")

    def whole(self, turns: list[Message]) -> list[Message]:
        """Neighbours of one role merged, what follows the last reply dropped."""
        kept = []
        for turn in turns:
            if not kept or kept[-1].role != turn.role or turn.role == "tool":
                kept.append(turn)
                continue
            if self.strict:
                raise RowError("E105", f"two turns of {turn.role}, one after the other")
            self.counts["merged"] += 1
            before = kept.pop().content
            kept.append(Message(turn.role, f"{before.rstrip()}\n\n{turn.content.lstrip()}"))
        while kept and kept[-1].role != "assistant":
            kept.pop()
            self.counts["tail_dropped"] += 1
        if not kept:
            raise RowError("E105", "there is no reply")
        return kept


def begins_with(turns: list[Message], prompt: list[Message]) -> bool:
    """Whether the turns are the whole conversation, its prompt included."""
    return len(turns) > len(prompt) and turns[: len(prompt)] == prompt


def text_of(content, where: str) -> str:
    """A content's text. RowError E102: it is no text, or has parts that are none."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, (list, tuple)):
        raise RowError("E102", f"{where}: its content is {kind_of(content)}, not a text")
    parts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            if part.get("type", "text") == "text":
                parts.append(part["text"])
                continue
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        raise RowError("E102", f"{where}: a part of its content is {kind}, not text")
    return "".join(parts)


def kind_of(value) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def to_messages(row: dict, roles=None, strict=False, tools=False, counts=None) -> list[Message]:
    """The conversation of a row, as `Reader.messages`; counts: a Counter that gets what was
    done."""
    reader = Reader(roles, strict, tools)
    messages = reader.messages(row)
    if counts is not None:
        counts.update(reader.counts)
    return messages


def to_pair(row: dict, roles=None, strict=False, tools=False, counts=None):
    """(chosen, rejected) of a row, as `Reader.pair`; counts as in `to_messages`."""
    reader = Reader(roles, strict, tools)
    pair = reader.pair(row)
    if counts is not None:
        counts.update(reader.counts)
    return pair
