"""Ids to text, piece by piece: what may be shown of sequences that are still being drawn."""

from __future__ import annotations

import codecs
import contextlib
import sys
import time


class Stream:
    """One sequence on its way to text. `reason` says why it ended: eot, stop, length
    (max_new_tokens) or context."""

    def __init__(self, tokenizer, ids: list[int], stop: tuple, ends: tuple, limit: int, room: int):
        self.tokenizer = tokenizer  # None: ids are written as they are
        self.ids = ids
        self.stop = stop
        self.ends = ends  # ids, end-of-text for one
        self.limit = min(limit, room)  # new tokens: as asked for, or until the context is full
        self.reason_at_limit = "length" if limit <= room else "context"
        # keeps the bytes of an unfinished character
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.n_new = 0
        self.held = ""  # may be the beginning of a stop string
        self.text = ""
        self.reason: str | None = None

    def add(self, token: int) -> str:
        """Take one more id; returns the text that is certain by now and sets `reason` if this was
        the last one."""
        self.n_new += 1
        if token in self.ends:
            self.reason = "eot"
        else:
            self.held += self.text_of(token)
            self.look_for_end()
        keep = 0
        if not self.reason:
            keep = max((_overlap(self.held, text) for text in self.stop), default=0)
        certain = len(self.held) - keep
        piece = self.held[:certain]
        self.held = self.held[certain:]
        if self.reason and self.reason != "stop":
            piece += self.utf8.decode(b"", final=True)
        self.text += piece
        return piece

    def text_of(self, token: int) -> str:
        if self.tokenizer is None:
            return f" {token}"
        return self.utf8.decode(self.tokenizer.decode_bytes([token]))

    def look_for_end(self) -> None:
        ends = []
        for text in self.stop:
            at = self.held.find(text)
            if at >= 0:
                ends.append((at + len(text), at))
        if ends:  # the one completed first, however the text was cut into tokens
            self.held = self.held[: min(ends)[1]]
            self.reason = "stop"
        elif self.n_new == self.limit:
            self.reason = self.reason_at_limit


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that could begin stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def decode(steps, streams: list[Stream], on_text=None) -> dict[str, float]:
    """Draw tokens, of Transformer.generate, until all streams have ended; on_text(stream's number,
    piece of text, None or why it ended). Returns prefill_seconds and decode_seconds.
    FloatingPointError: the model's logits are not finite."""
    start = time.perf_counter()
    first = None
    with contextlib.closing(steps):
        for tokens in steps:
            first = first or time.perf_counter()
            for i, (stream, token) in enumerate(zip(streams, tokens)):
                if stream.reason is None:
                    piece = stream.add(token)
                    if on_text and (piece or stream.reason):
                        on_text(i, piece, stream.reason)
            if all(stream.reason for stream in streams):
                break
    return {"prefill_seconds": first - start, "decode_seconds": time.perf_counter() - first}


class Printer:
    """on_text for a terminal: sequences appear in order; the first unfinished one is live, later
    ones wait."""

    def __init__(self, heads: list[str]):
        self.waiting = heads  # text not yet printed, by sequence
        self.ended: set[int] = set()
        self.live = 0

    def __call__(self, i: int, piece: str, reason: str | None) -> None:
        self.waiting[i] += piece
        if reason:
            self.waiting[i] += "\n"
            self.ended.add(i)
        while self.live < len(self.waiting):
            sys.stdout.write(self.waiting[self.live])
            self.waiting[self.live] = ""
            if self.live not in self.ended:
                break
            self.live += 1
        sys.stdout.flush()
