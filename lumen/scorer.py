"""How likely a model finds texts: the log-probability of continuations, each question by itself.

A question is a forward pass of its own, a batch of one: its choices hang, like branches, on what
they begin with alike, which is computed once. So its bits depend on the model and the question, and
on nothing else that is asked; and a question of long context costs little more than one choice.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from lumen.branches import Branches, Tree, common, tree_of
from lumen.questions import Question
from lumen.replies import uncompiled

ROWS = 256  # of logits in fp32 at a time: 50 MB at 50,000 ids


class Scored(NamedTuple):
    """Of one continuation."""

    logprob: float  # nats, the sum over its tokens
    tokens: int
    greedy: bool  # each of its tokens was the most likely
    cut: int = 0  # tokens at the beginning of its context that there was no room for


class Scorer:
    """A model that is asked for log-probabilities. It is left in the mode in which it was."""

    def __init__(self, model, tokenizer, n_vocab: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.n_vocab = n_vocab or tokenizer.n_vocab  # ids from here on are padding
        self.room = model.cfg.max_seq_len
        self.header: tuple[tuple, Branches] | None = None  # the last trunk that questions shared
        self.encoded = {}  # of the last header: text -> ids

    # ---- texts

    def question(self, question: Question) -> dict:
        """As line_of says it."""
        return line_of(self.pairs(question.pairs, question.header))

    def pairs(self, pairs, header: str = "") -> list[Scored]:
        """Of (context, continuation) texts, asked together; `header` stands before each context and
        is shared by many questions, so its keys and values are kept.

        The border between context and continuation is lm-eval's: white space at the end of the
        context goes to the continuation, and what of the ids of both together lies behind as many
        as the context has alone is scored; or the last id, where it holds the border. An empty
        context is <|endoftext|>.
        """
        sequences = [self.encode_pair(header + context, text) for context, text in pairs]
        return self.ids(sequences, self.shared_ids(header, sequences))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(ids of both, how many stand before the continuation)."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            return [self.tokenizer.eot_id, *self.encode(continuation)], 1
        whole = self.encode(bare + continuation)
        # "http:" and "//" are one id together: no id is certain, and would always be the best
        return whole, min(len(self.encode(bare)), len(whole) - 1)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def shared_ids(self, header: str, sequences: list) -> int:
        """How many ids at the start the header makes alone, and all sequences begin with."""
        if not header:
            return 0
        if header not in self.encoded:
            self.encoded = {header: self.encode(header)}
        ids = self.encoded[header]
        return min(common(ids, whole[:n]) for whole, n in sequences)

    # ---- ids

    def ids(self, sequences: list[tuple[list[int], int]], shared: int = 0) -> list[Scored]:
        """The same of (ids, how many of them stand before the continuation, at least one), which
        are cut from the left to what the model's context holds. The first `shared` ids of all are
        kept for later questions."""
        if max(len(whole) - n for whole, n in sequences) > self.room:
            return [self.in_pieces(*sequence) for sequence in sequences]
        lost = [max(0, len(whole) - 1 - self.room) for whole, _ in sequences]
        if any(lost):
            shared = 0  # what is cut from the left has another beginning
            sequences = [(whole[n:], first - n) for (whole, first), n in zip(sequences, lost)]
        found = self.answer(tree_of(sequences, shared))
        return [one._replace(cut=n) for one, n in zip(found, lost)]

    def answer(self, tree: Tree) -> list[Scored]:
        return self.run([tree])[0]

    def in_pieces(self, whole: list[int], n: int) -> Scored:
        """Of a continuation that may be longer than the model's context: piece by piece of half of
        that, each behind as much text as there is room for."""
        size = max(1, self.room // 2)
        pieces = [(whole[: first + size], first) for first in range(n, len(whole), size)]
        found = [self.ids([piece])[0] for piece in pieces]
        logprobs, tokens, greedy, _ = zip(*found)
        return Scored(sum(logprobs), sum(tokens), all(greedy), found[0].cut)

    @contextlib.contextmanager
    def at_rest(self):
        """No gradients, no dropout, MoD by its causal rule, no graph compiled for each length."""
        was_training = self.model.training
        if was_training:  # to tell every module costs a twentieth of a small model's question
            self.model.eval()
        try:
            with torch.no_grad(), uncompiled(self.model):
                yield
        finally:
            if was_training:
                self.model.train()

    def trunk(self, ids: tuple) -> Branches:
        """What questions begin with alike, computed by itself: so it is the same for all of them,
        whichever comes first."""
        if self.header is None or self.header[0] != ids:
            made = Branches([(len(ids), [])], self.device)
            made.ask([len(ids) - 1])
            self.model(torch.tensor([ids], device=self.device), cache=made)
            self.header = (ids, made)
        return self.header[1]

    @property
    def device(self):
        return self.model.embed.weight.device

    def run(self, trees: list[Tree]) -> list[list[Scored]]:
        """One forward pass over trees, all with the same `before`."""
        wanted, targets, idx = [], [], []
        for tree in trees:
            slots, following = tree.wanted()
            wanted += [len(idx) + slot for slot in slots]
            targets += following
            idx += tree.ids()
        with self.at_rest():
            before = self.trunk(trees[0].before) if trees[0].before else None
            row = Branches([tree.sizes() for tree in trees], self.device, before)
            row.ask(wanted)
            logits = self.model(torch.tensor([idx], device=self.device), cache=row)  # (n, V)
            found = self.likelihoods(logits, torch.tensor(targets, device=self.device))
        lengths = [len(whole) - n for tree in trees for whole, n in tree.sequences]
        parts = zip(*(values.split(lengths) for values in found))
        every = (Scored(p.sum().item(), len(p), bool(hits.all())) for p, hits in parts)
        return [[next(every) for _ in tree.sequences] for tree in trees]

    def likelihoods(self, logits, targets):
        """Of logits (n, V) and ids (n,): log-probabilities in fp64 and whether each id is the most
        likely, (n,) each, on the CPU."""
        logprobs, greedy = [], []
        for rows, ids in zip(logits.split(ROWS), targets.split(ROWS)):
            rows = rows[:, : self.n_vocab].float()
            right = rows.gather(1, ids[:, None])[:, 0]
            logprobs.append((right - rows.logsumexp(-1)).cpu().double())
            greedy.append((rows.argmax(-1) == ids).cpu())
        return torch.cat(logprobs), torch.cat(greedy)


class Packed(Scorer):
    """Several questions a forward pass, up to so many tokens: faster where passes are small for the
    device. Their answers agree with those of one pass each to rounding only."""

    def __init__(self, model, tokenizer, tokens: int):
        super().__init__(model, tokenizer)
        self.tokens = tokens
        self.waiting: list[Tree] = []
        self.found = None  # what comes for them; None: they are still being collected

    def lines(self, task, some: list[int], asked) -> list[dict]:
        """Of these questions, each asked twice: what it wants to know is collected, and then told.
        A line is a function of what it is told, so it wants the same."""
        self.waiting, self.found = [], None
        for i in some:
            task.line(i, asked)
        self.found = iter(self.run_packs())
        return [task.line(i, asked) for i in some]

    def answer(self, tree: Tree) -> list[Scored]:
        if self.found is not None:
            return next(self.found)
        self.waiting.append(tree)
        return [Scored(0.0, len(whole) - n, False) for whole, n in tree.sequences]

    def run_packs(self) -> list[list[Scored]]:
        found, pack, size = [], [], 0
        for tree in self.waiting:
            more = len(tree.ids())
            if pack and (pack[0].before != tree.before or size + more > self.tokens):
                found += self.run(pack)
                pack, size = [], 0
            pack.append(tree)
            size += more
        return found + (self.run(pack) if pack else [])


def line_of(found: list[Scored]) -> dict:
    """{logprobs, tokens, greedy}: lists, an entry a choice; and `cut`, tokens, where a context was
    cut."""
    logprobs, tokens, greedy, cut = (list(values) for values in zip(*found))
    line = {"logprobs": logprobs, "tokens": tokens, "greedy": greedy}
    return line | ({"cut": max(cut)} if any(cut) else {})
