"""How the next token is chosen, with all that transformers offers.

model.py has the plain ways, temperature and top-k, for those who copy it; `Transformer.generate`
takes a `Sampling` in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lumen.errors import UserError
from model import draw

RANGES = {  # option: (lowest, highest, in words)
    "max_new_tokens": (1, 2**31, "at least 1"),
    "temperature": (0, 100, "between 0 (the most likely token) and 100"),
    "top_k": (0, 2**31, "0 (off) or more"),
    "top_p": (1e-6, 1, "above 0, at most 1 (off)"),
    "min_p": (0, 1, "between 0 (off) and 1"),
    "repetition_penalty": (0.01, 100, "between 0.01 and 100; 1 is off, above 1 discourages"),
    "presence_penalty": (-2, 2, "between -2 and 2; 0 is off, above 0 discourages"),
    "frequency_penalty": (-2, 2, "between -2 and 2; 0 is off, above 0 discourages"),
    "seed": (0, 2**62, "0 or more, below 2^62"),
    "num_samples": (1, 65536, "between 1 and 65536"),
}


def check(stop=(), **numbers) -> None:
    """UserError E500 for an option out of range."""
    for name, value in numbers.items():
        low, high, words = RANGES[name]
        if not low <= value <= high:
            raise UserError("E500", f"{name}: {value} is out of range; it must be {words}")
    if not all(stop):
        raise UserError("E500", "stop: an empty string would stop everything; leave it out")


class History:
    """What one sequence has said."""

    def __init__(self, prompt: list[int], vocab_size: int, device="cpu"):
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # or was in its prompt
        self.seen[prompt] = True
        self.written = torch.zeros(vocab_size, device=device)  # how often

    def add(self, token: int) -> None:
        self.seen[token] = True
        self.written[token] += 1


@dataclass(frozen=True)
class Choice:
    """How one sequence's next token is chosen. In transformers' order: penalty (Keskar et al.
    2019), presence and frequency (OpenAI), bias, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 1.0  # keep the smallest set with this much probability
    min_p: float = 0.0  # keep what has at least this share of the largest probability
    repetition_penalty: float = 1.0  # divides seen ids' logits, or multiplies negative ones
    presence_penalty: float = 0.0  # off the logits of ids that were written
    frequency_penalty: float = 0.0  # the same, as often as they were
    bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)

    def needs_history(self) -> bool:
        """Whether it asks what a sequence has said before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def adjusted(self, logits: torch.Tensor, histories: list[History | None]) -> torch.Tensor:
        """Logits (n, V) after penalties and bias; a history a row, None where none is needed."""
        if self.needs_history():
            logits = self.punished(logits, histories)
        if self.bias:
            ids, values = zip(*self.bias)
            logits = logits.clone()
            logits[:, list(ids)] += torch.tensor(values, device=logits.device)
        return logits

    def punished(self, logits: torch.Tensor, histories: list[History]) -> torch.Tensor:
        penalty = self.repetition_penalty
        if penalty != 1.0:
            seen = torch.stack([history.seen for history in histories])  # (n, V)
            # less likely in either case
            less = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(seen, less, logits)
        if self.presence_penalty or self.frequency_penalty:
            written = torch.stack([history.written for history in histories])
            logits = logits - self.presence_penalty * (written > 0)
            logits = logits - self.frequency_penalty * written
        return logits

    def pick(self, logits: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """The next ids (n,) of adjusted logits (n, V), fp32."""
        if self.temperature < 1e-30:  # or 0 / 0 in fp32
            return logits.argmax(-1)
        # at most 0 before the division: so none of the rest is too small
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        order = None  # from where on only candidates are left, most likely first: their ids
        if 0 < self.top_k < logits.shape[-1]:
            logits, order = logits.topk(self.top_k, -1)
        elif self.top_p < 1.0:
            logits, order = logits.sort(-1, descending=True)
        p = logits.softmax(-1)  # (n, candidates)
        if self.top_p < 1.0:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)  # what is likelier suffices
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        pick = draw(p, generators)  # what is left need not add up to 1
        if order is not None:
            pick = order.gather(-1, pick)
        return pick[:, 0]


class Sampling:
    """`choose` for one call of Transformer.generate, the same for all rows; it remembers what each
    has said."""

    def __init__(self, prompts: list[list[int]], vocab_size: int, **choice):
        self.choice = Choice(**choice)
        self.histories = [History(prompt, vocab_size) for prompt in prompts]

    def __call__(self, logits, generators: list[torch.Generator]) -> torch.Tensor:
        """The next id of each row (B,), of logits (B, V), fp32 on the CPU."""
        ids = self.choice.pick(self.choice.adjusted(logits, self.histories), generators)
        for history, token in zip(self.histories, ids.tolist()):
            history.add(token)
        return ids
