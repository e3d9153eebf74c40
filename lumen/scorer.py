"""How likely a model finds texts: the log-probability of continuations, each question by itself.

A question is a forward pass of its own, a batch of one: its choices hang, like branches, on what
they begin with alike, which is computed once. So its bits depend on the model and the question, and
on nothing else that is asked; and a question of long context costs little more than one choice.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from lumen.questions import Question
from lumen.replies import uncompiled

ROWS = 256  # of logits in fp32 at a time: 50 MB at 50,000 ids


class Scored(NamedTuple):
    """Of one continuation."""

    logprob: float  # nats, the sum over its tokens
    tokens: int
    greedy: bool  # each of its tokens was the most likely
    cut: int = 0  # tokens at the beginning of its context that there was no room for


class Branches:
    """What one forward pass over a trunk and its branches needs in the place of a model.KVCache.

    Slot s of the row holds a token of the trunk (its first `trunk` slots) or of a branch; a token
    sees the trunk, up to itself, and what of its own branch came before. Positions are those that a
    branch would have behind the trunk alone. `before`: the Branches of a trunk that was computed
    earlier and is seen by all, which has kept its keys and values.
    """

    def __init__(self, trunk: int, branches: list[int], device, before: Branches | None = None):
        self.before = before
        self.length = trunk + sum(branches)  # tokens; the slot behind is padding, which sees none
        first = before.length if before else 0
        positions = [torch.arange(trunk)]
        of = [torch.zeros(trunk, dtype=torch.long)]  # the branch of each slot; 0: the trunk
        for number, n in enumerate(branches, 1):
            positions.append(trunk + torch.arange(n))
            of.append(torch.full((n,), number))
        self.positions = first + torch.cat(positions)[None].to(device)  # (1, T)
        of = torch.cat(of).to(device)
        earlier = torch.arange(self.length, device=device)
        # (T + 1, T + 1): whether the token of a slot (row) sees that of another (column)
        self.sees = torch.zeros(self.length + 1, self.length + 1, dtype=torch.bool, device=device)
        same = (of[:, None] == of) | (of == 0)
        self.sees[:-1, :-1] = same & (earlier <= earlier[:, None])
        self.last = None  # slots whose successor is asked for, as model.forward indexes with it
        self.keys, self.values = {}, {}  # by layer, of the slots that it computed
        self.mask = None  # (slots, keys before them, what they may look at) of the last layer

    def ask(self, slots: list[int]) -> None:
        """Logits are wanted of these slots only."""
        columns = torch.tensor(slots, device=self.sees.device)
        self.last = torch.zeros_like(columns), columns

    def place(self, idx):
        slots = torch.arange(self.length, device=idx.device)[None]
        return self.positions, slots

    def write(self, layer: int, slots, k, v):
        """k, v (1, n, G, D) of the tokens in `slots` (1, n), all that this layer computes (MoD may
        pass tokens by): returns them behind those of the trunk before, (1, G, all, D) each."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.keys[layer], self.values[layer] = k, v
        if self.before and layer in self.before.keys:
            k = torch.cat((self.before.keys[layer], k), dim=2)
            v = torch.cat((self.before.values[layer], v), dim=2)
        return k, v

    def visible(self, layer: int, slots):
        """Which of the keys that write has returned the tokens in `slots` may look at: bool
        (1, 1, n, all)."""
        seen = 0
        if self.before and layer in self.before.keys:
            seen = self.before.keys[layer].shape[2]
        # most layers compute all tokens: the same tensor of slots
        if self.mask is None or self.mask[0] is not slots or self.mask[1] != seen:
            mask = self.sees[slots[0][:, None], slots[0]]
            if seen:
                mask = torch.cat((mask.new_ones(len(mask), seen), mask), dim=1)
            self.mask = (slots, seen, mask[None, None])
        return self.mask[2]


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
        # the last id of a sequence predicts nothing
        inputs = [whole[:-1] for whole, _ in sequences]
        shared = min(shared, *(n - 1 for _, n in sequences))
        trunk = inputs[0]
        for other in inputs[1:]:
            trunk = trunk[: common(trunk, other)]
        with self.at_rest():
            before = self.trunk(tuple(trunk[:shared])) if shared else None
            found = self.branches(sequences, inputs, trunk[shared:], before)
        return [one._replace(cut=n) for one, n in zip(found, lost)]

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
            made = Branches(len(ids), [], self.device)
            made.ask([len(ids) - 1])
            self.model(torch.tensor([ids], device=self.device), cache=made)
            self.header = (ids, made)
        return self.header[1]

    @property
    def device(self):
        return self.model.embed.weight.device

    def branches(self, sequences, inputs, trunk, before) -> list[Scored]:
        """One forward pass over the trunk and what each sequence has behind it."""
        first = before.length if before else 0
        behind = [ids[first + len(trunk) :] for ids in inputs]
        row = Branches(len(trunk), [len(ids) for ids in behind], self.device, before)
        wanted, targets = [], []  # slots, and the ids that should follow
        start = len(trunk)
        for (whole, n), ids in zip(sequences, behind):
            for at in range(n - 1, len(whole) - 1):  # whole[at] predicts whole[at + 1]
                in_trunk = at - first
                slot = in_trunk if in_trunk < len(trunk) else start + in_trunk - len(trunk)
                wanted.append(slot)
                targets.append(whole[at + 1])
            start += len(ids)
        row.ask(wanted)
        idx = [*trunk, *(i for ids in behind for i in ids)]
        logits = self.model(torch.tensor([idx], device=self.device), cache=row)  # (n, V)
        logprobs, greedy = self.likelihoods(logits, torch.tensor(targets, device=self.device))
        found, at = [], 0
        for whole, n in sequences:
            part = slice(at, at + len(whole) - n)
            total = logprobs[part].sum().item()
            found.append(Scored(total, len(whole) - n, bool(greedy[part].all())))
            at = part.stop
        return found

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


def line_of(found: list[Scored]) -> dict:
    """{logprobs, tokens, greedy}: lists, an entry a choice; and `cut`, tokens, where a context was
    cut."""
    logprobs, tokens, greedy, cut = (list(values) for values in zip(*found))
    line = {"logprobs": logprobs, "tokens": tokens, "greedy": greedy}
    return line | ({"cut": max(cut)} if any(cut) else {})


def common(a, b) -> int:
    """How many elements two lists begin with alike."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
