"""Many sequences on one static KV cache, each at its own place: what serves, chats and evaluates.

STUB of the contract; the real one is being written by the founder in /work/main.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lumen.sampling import Choice
from lumen.stream import Stream
from model import Transformer


@dataclass(eq=False)
class Row:
    """One sequence, from its prompt to its end. The engine alone changes it."""

    stream: Stream  # its ids, what they become as text, and when it ends
    choice: Choice = field(default_factory=Choice)  # how the next token is chosen
    seed: int = 0
    n_logprobs: int = -1  # beside each token: its log-probability and the n likeliest; -1: none
    reused: int = 0  # tokens of the prompt whose keys were there already


@dataclass(frozen=True)
class News:
    """One more token of a row, or its end."""

    row: Row
    token: int | None  # None: the row failed (reason "error"), or was cancelled
    piece: str  # of text that is certain by now
    reason: str | None  # eot | stop | length | context | error; None: it goes on
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), likeliest first


class Engine:
    """One thread's. Rows wait in the order of `add`; `step` does one chunk of a prompt and one
    token for each running row."""

    def __init__(self, model: Transformer, slots: int = 8, context: int = 0, n_vocab: int = 0):
        """context: tokens of a row at most, 0: the model's; n_vocab: ids from there on are padding
        and never chosen, 0: all are the tokenizer's."""

    def add(self, row: Row) -> None:
        """It waits for a slot. E502: its prompt leaves no room in the context for a token."""

    def cancel(self, row: Row) -> None:
        """It gets no further token, and its slot is free, waiting or running; else no effect."""

    def step(self) -> list[News]:
        """What came of one pass; [] when there is nothing to do."""

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...
