"""Rows of a data set to conversations: every shape that people use, one list of messages.

{"messages": [{"role", "content"}]}, {"conversation": ...}, {"conversations": [{"from", "value"}]}
{"prompt", "response" or "completion"}   texts, or lists of messages
{"instruction", "input", "output"}       with "system", "history"
{"prompt", "chosen", "rejected"}         preference pairs; also without prompt
{"text"}                                 no conversation
"""

from __future__ import annotations

from collections import Counter

from lumen.chat import Message


class RowError(Exception):
    """A row that is no conversation. code: E102, E104 or E105."""

    def __init__(self, code: str, reason: str):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def row_kind(row: dict) -> str | None:
    """ "chat", "pairs" or "text" by the names of its fields; None: none of ours."""
    raise NotImplementedError


def to_messages(
    row: dict, roles=None, strict=False, tools=False, counts: Counter | None = None
) -> list[Message]:
    """The conversation of a row; it ends with a reply. roles: {name: role} beside ROLES; tools:
    the template has them. counts gets what was done: merged, tail_dropped, system_dropped."""
    raise NotImplementedError


def to_pair(
    row: dict, roles=None, strict=False, tools=False, counts: Counter | None = None
) -> tuple[list[Message], list[Message]]:
    """(chosen, rejected): two conversations that differ in the last reply only."""
    raise NotImplementedError
