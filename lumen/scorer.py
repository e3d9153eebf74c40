"""How likely a model finds texts: the log-probability of continuations, each question by itself."""

from __future__ import annotations

from typing import NamedTuple

from lumen.questions import Question


class Scored(NamedTuple):
    """Of one continuation."""

    logprob: float  # nats, the sum over its tokens
    tokens: int
    greedy: bool  # each of its tokens was the most likely


class Scorer:
    """A model that is asked for log-probabilities. A question is a forward pass of its own: its
    bits depend on the model and on the question, not on what else is asked."""

    def __init__(self, model, tokenizer, n_vocab: int | None = None):
        self.model, self.tokenizer = model, tokenizer

    def question(self, question: Question) -> dict:
        """{logprobs, tokens, greedy}: lists, an entry a choice."""
        raise NotImplementedError

    def pairs(self, pairs, header: str = "") -> list[Scored]:
        """Of (context, continuation) texts, asked together: what they begin with alike is computed
        once. The border between the two is that of lm-eval."""
        raise NotImplementedError

    def ids(self, sequences: list[tuple[list[int], int]], shared: int = 0) -> list[Scored]:
        """The same of (ids, how many of them stand before the continuation)."""
        raise NotImplementedError
