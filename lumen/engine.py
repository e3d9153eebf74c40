"""Many sequences on one static KV cache, each at its own place: what serves, chats and evaluates.

A pass of `Engine.step` reads one chunk of the prompts that wait, and then draws one token for each
sequence that has read its prompt. Sequences come and go at any time; what one writes depends on its
own prompt, options and seed, and on its neighbours only as far as sums of floats do (in fp32 that
is the last digit, in bf16 it can be a word).

A prompt that begins as another sequence does, one that is running or one whose keys still lie in
their slot, takes those keys over: a system prompt is read once, and a conversation goes on where it
ended. Continuous batching is Orca's (Yu et al. 2022), chunked prefill Sarathi's (Agrawal et al.
2023); without paged memory: each slot has room for a whole context.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lumen.branches import common
from lumen.errors import UserError
from lumen.graphs import Graphs
from lumen.sampling import Choice, History
from lumen.stream import Stream
from model import KVCache, Transformer

CHUNK = 256  # tokens of prompts in a pass, for so long the others wait
LEAST = 8  # tokens; a shorter beginning is not worth looking for

# ---------------------------------------------------------------- a sequence


@dataclass(eq=False)
class Row:
    """One sequence, from its prompt to its end. The engine alone changes it."""

    stream: Stream  # its ids, what they become as text, and when it ends
    choice: Choice = field(default_factory=Choice)  # how the next token is chosen
    seed: int = 0
    n_logprobs: int = -1  # beside each token: its log-probability and the n likeliest; -1: none
    reused: int = 0  # tokens of the prompt whose keys were there already

    def __post_init__(self):
        self.slot = -1  # where in the cache; -1: it waits, or has ended
        self.turn = 0  # the how-manieth it came: in this order prompts are read
        self.begun = False  # whether anything of its prompt was read
        self.last: int | None = None  # the newest token, whose keys come next; None: still reading
        # on the CPU, so that a seed gives the same text on every device
        self.generator = torch.Generator().manual_seed(self.seed)
        self.history: History | None = None  # where its choice asks for one


@dataclass(frozen=True)
class News:
    """One more token of a row, or its end."""

    row: Row
    token: int | None  # None: its logits were not finite, reason "error"
    piece: str  # of text that is certain by now
    reason: str | None  # eot | stop | length | context | error; None: it goes on
    logprob: float | None = None  # of the token, before penalties and temperature
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), likeliest first


# ---------------------------------------------------------------- the cache


class Slots:
    """A KVCache with a row for each sequence, and what the host knows of it."""

    def __init__(self, model: Transformer, slots: int, length: int):
        device, dtype = model.embed.weight.device, model.compute_dtype
        self.cache = model.cache_type(model.cfg, slots, length, device, dtype)
        self.held: list[list[int]] = [[] for _ in range(slots)]  # ids whose keys lie in each slot
        self.views: dict[tuple[int, int], KVCache] = {}

    def rows(self, first: int, n: int, used: int) -> KVCache:
        """n slots from `first` on as a cache of their own, on the same memory; at most `used`
        tokens of each are looked at."""
        if (first, n) not in self.views:
            view = copy.copy(self.cache)
            part = slice(first, first + n)
            view.k = [k[part] for k in self.cache.k]
            view.v = [v[part] for v in self.cache.v]
            view.kept = {i: kept[part] for i, kept in self.cache.kept.items()}
            view.filled = self.cache.filled[part]
            view.rows = self.cache.rows[:n]
            self.views[first, n] = view
        view = self.views[first, n]
        view.used = used
        return view

    def begin(self, slot: int, n: int) -> None:
        """Keep the first n tokens of a slot; what comes then is written over the rest."""
        del self.held[slot][n:]
        self.cache.filled[slot] = n
        for kept in self.cache.kept.values():
            kept[slot, n:] = False

    def copy(self, source: int, slot: int, n: int) -> None:
        """Take over the first n tokens of another slot."""
        for x in (*self.cache.k, *self.cache.v):
            x[slot, :, :n] = x[source, :, :n]
        for kept in self.cache.kept.values():
            kept[slot, :n] = kept[source, :n]
        self.held[slot] = self.held[source][:n]
        self.begin(slot, n)

    def clean(self, slot: int) -> None:
        """After NaN: a weight of zero times NaN would reach whoever comes next."""
        for x in (*self.cache.k, *self.cache.v):
            x[slot] = 0.0
        self.begin(slot, 0)


# ---------------------------------------------------------------- the engine


class Engine:
    """One thread's. Rows wait in the order of `add`; `step` does one chunk of prompts and one token
    for each running row. Rows 0 to n of the cache are kept dense, since a pass is of a range."""

    def __init__(
        self,
        model: Transformer,
        slots: int = 8,
        context: int = 0,  # tokens of a row at most; 0: the model's max_seq_len
        n_vocab: int = 0,  # ids from here on are padding and never chosen; 0: there are none
        chunk: int = CHUNK,
        reuse: bool = True,  # False: every prompt is read whole, so its bits are its own
        inference: bool = True,  # False: no_grad, for a model that goes on to train
    ):
        self.model = model
        self.context = context or model.cfg.max_seq_len
        self.n_vocab = n_vocab or model.cfg.vocab_size
        self.chunk, self.reuse = chunk, reuse
        # a tenth faster than no_grad on a CPU
        self.mode = torch.inference_mode if inference else torch.no_grad
        self.device = model.embed.weight.device
        self.slots = Slots(model, slots, self.context)
        self.rows: list[Row | None] = [None] * slots  # by slot
        self.queue: deque[Row] = deque()
        self.turns = itertools.count()
        self.clock = 0  # passes so far
        self.left = [0] * slots  # when each slot became free
        self.graphs = Graphs(model) if self.device.type == "cuda" else None
        self.reset_counts()

    def reset_counts(self) -> None:
        """Of each kind of pass."""
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        return sum(row is not None for row in self.rows)

    def add(self, row: Row) -> None:
        """It waits for a slot. E502: its prompt leaves no room in the context for a token."""
        n = len(row.stream.ids)
        if n + row.stream.limit > self.context or row.stream.limit < 1:
            text = f"the prompt has {n} tokens, the context is {self.context} tokens"
            raise UserError("E502", f"{text}, the reply included")
        row.turn = next(self.turns)
        self.queue.append(row)

    def cancel(self, row: Row) -> None:
        """It gets no further token, and its slot is free; of one that has ended nothing changes."""
        slot = row.slot
        if slot >= 0:
            self.end(row)
            if row.last is None:  # nobody has seen yet whether these keys are finite
                with self.mode():
                    self.slots.clean(slot)
        with contextlib.suppress(ValueError):
            self.queue.remove(row)

    def clear(self) -> list[Row]:
        """Cancel all, after an exception in `step`; returns whom. No key is believed any more."""
        rows = [*filter(None, self.rows), *self.queue]
        for row in rows:
            self.cancel(row)
        with self.mode():
            for slot in range(len(self.rows)):
                self.slots.clean(slot)
        return rows

    def step(self) -> list[News]:
        """What came of one pass; [] when there was nothing to do."""
        self.clock += 1
        with self.mode(), generating(self.model):
            self.admit()
            with self.timed("prefill"):
                news = self.prefill()
            with self.timed("decode"):
                return news + self.decode()

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - start

    # ------------------------------------------------------------ slots

    def admit(self) -> None:
        """Give slots to those that wait, the longest free first."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        while self.queue and free:
            row = self.queue.popleft()
            row.slot = self.best_slot(row.stream.ids, free)
            free.remove(row.slot)
            self.rows[row.slot] = row

    def best_slot(self, ids: list[int], free: list[int]) -> int:
        """One whose own beginning is most of what it holds, as in a conversation that goes on;
        else the one that was left first."""
        held = self.slots.held
        n, slot = max((common(ids, held[slot]), slot) for slot in free)
        if self.reuse and n >= LEAST and 2 * n >= len(held[slot]):
            return slot
        return min(free, key=lambda slot: self.left[slot])

    def end(self, row: Row) -> None:
        self.free(row)
        row.history = None  # as large as the vocabulary

    def free(self, row: Row) -> None:
        self.left[row.slot] = self.clock
        self.rows[row.slot] = None
        row.slot = -1

    def begin(self, row: Row) -> None:
        """Before its first chunk: take over what another slot, or its own, has read already."""
        ids, held = row.stream.ids, self.slots.held
        n, source = 0, row.slot
        if self.reuse:
            n = common(ids, held[row.slot])
            for slot, other in enumerate(held):
                if common(ids, other) > n:
                    n, source = common(ids, other), slot
        # the last token is read in any case, for its logits
        row.reused = min(n, len(ids) - 1) if n >= LEAST else 0
        if row.reused and source != row.slot:
            self.slots.copy(source, row.slot, row.reused)
        else:
            self.slots.begin(row.slot, row.reused)
        if row.choice.needs_history():
            row.history = History(ids, self.model.cfg.vocab_size, self.device)
        row.begun = True

    def close_gaps(self) -> None:
        """Move the last rows into free slots between the others: a pass is of a range of slots."""
        while True:
            taken = [slot for slot, row in enumerate(self.rows) if row]
            gaps = [slot for slot in range(taken[0], taken[-1]) if self.rows[slot] is None]
            if not gaps:
                return
            row = self.rows[taken[-1]]
            slot = min(gaps, key=lambda slot: self.left[slot])
            if row.begun:
                self.slots.copy(row.slot, slot, len(self.slots.held[row.slot]))
                if row.last is None:
                    self.slots.clean(row.slot)  # as in `cancel`
            self.free(row)
            row.slot = slot
            self.rows[slot] = row

    # ------------------------------------------------------------ passes

    def prefill(self) -> list[News]:
        """One chunk of the prompt that came first, and of those in the slots behind it that fit
        into the chunk beside it."""
        reading = [row for row in self.rows if row and row.last is None]
        if not reading:
            return []
        first = min(reading, key=lambda row: row.turn).slot
        rows: list[Row] = []
        rests: list[list[int]] = []  # of their prompts
        width = 0
        for row in self.rows[first:]:
            if row is None or row.last is not None or self.would_copy(row, rows):
                break
            if not row.begun:
                self.begin(row)
            rest = row.stream.ids[len(self.slots.held[row.slot]) :]
            wide = max(width, min(len(rest), self.chunk))
            if rows and wide * (len(rows) + 1) > self.chunk:
                break
            width = wide
            rows.append(row)
            rests.append(rest)
        parts = [rest[:width] for rest in rests]
        self.tokens["prefill"] += sum(map(len, parts))
        logits = self.forward(first, parts, width)
        read = [row if len(rest) <= width else None for row, rest in zip(rows, rests)]
        return self.choose(read, logits)

    def would_copy(self, row: Row, rows: list[Row]) -> bool:
        """Whether it had better wait for one of these, which begins as it does."""
        if not self.reuse or row.begun:
            return False
        ids = row.stream.ids
        have = max(common(ids, held) for held in self.slots.held)
        return any(common(ids, other.stream.ids) >= max(LEAST, have + 1) for other in rows)

    def decode(self) -> list[News]:
        """One token for each row that has read its prompt."""
        if not any(row and row.last is not None for row in self.rows):
            return []
        self.close_gaps()
        ready = [row if row and row.last is not None else None for row in self.rows]
        slots = [slot for slot, row in enumerate(ready) if row]
        first, end = slots[0], slots[-1] + 1
        if self.graphs:  # few different shapes
            first, end = 0, min(1 << (end - 1).bit_length(), len(ready))
        ready = ready[first:end]
        self.tokens["decode"] += len(slots)
        logits = self.forward(first, [[row.last] if row else [] for row in ready], 1)
        return self.choose(ready, logits)

    def forward(self, first: int, parts: list[list[int]], width: int) -> torch.Tensor:
        """Put tokens behind those of slots first, first + 1 ...: logits (n, V) of each one's last,
        fp32."""
        idx = torch.tensor([part + [-1] * (width - len(part)) for part in parts])  # (n, width)
        held = self.slots.held[first : first + len(parts)]
        used = max(len(ids) for ids, part in zip(held, parts) if part)
        view = self.slots.rows(first, len(parts), used)
        if self.graphs and width == 1:
            logits = self.graphs(idx, view)
        else:
            logits = self.model(idx.to(self.device), cache=view)
        for ids, part in zip(held, parts):
            ids += part
        # what MPS lacks, fp64, drawing needs
        return logits.float() if self.device.type in ("cpu", "cuda") else logits.float().cpu()

    # ------------------------------------------------------------ the next token

    def choose(self, rows: list[Row | None], logits: torch.Tensor) -> list[News]:
        """Of the logits of rows (n, V); None: that one's are not asked for."""
        asked = [i for i, row in enumerate(rows) if row]
        if not asked:
            return []
        rows = [rows[i] for i in asked]
        if len(asked) < len(logits):
            logits = logits[asked]
        finite = logits.isfinite().all(1)  # (n,)
        # ids that no text has: the vocabulary was padded
        logits[:, self.n_vocab :] = -torch.inf
        logits = logits.masked_fill(~finite[:, None], 0.0)  # so that the others can be drawn
        ids = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        groups: dict[Choice, list[int]] = {}  # rows that choose alike do it at once
        for i, row in enumerate(rows):
            groups.setdefault(row.choice, []).append(i)
        for choice, members in groups.items():
            some = logits if len(groups) == 1 else logits[members]
            some = choice.adjusted(some, [rows[i].history for i in members])
            ids[members] = choice.pick(some, [rows[i].generator for i in members])
        # the one place where the host waits for the device
        chosen, fine = torch.stack((ids, finite.long())).tolist()
        scores = self.scores(rows, logits, chosen)
        return [self.tell(*one) for one in zip(rows, chosen, fine, scores)]

    def scores(
        self, rows: list[Row], logits, chosen: list[int]
    ) -> list[tuple[float | None, tuple]]:
        """Of each row: (log-probability of what was chosen, the likeliest), where it asks."""
        found = [(None, ())] * len(rows)
        for i, row in enumerate(rows):
            if row.n_logprobs >= 0:
                logp = logits[i].log_softmax(-1)
                values, ids = logp.topk(min(row.n_logprobs, self.n_vocab))
                top = tuple(zip(ids.tolist(), values.tolist()))
                found[i] = logp[chosen[i]].item(), top
        return found

    def tell(self, row: Row, token: int, fine: int, score: tuple) -> News:
        if not fine:
            slot = row.slot
            self.end(row)
            self.slots.clean(slot)
            return News(row, None, "", "error")
        row.last = token
        if row.history:
            row.history.add(token)
        piece = row.stream.add(token)
        if row.stream.reason:
            self.end(row)
        return News(row, token, piece, row.stream.reason, *score)


@contextlib.contextmanager
def generating(model: Transformer) -> Iterator[None]:
    """The model in eval mode (MoD by its causal rule), its experts by the backend for few tokens;
    then as it was."""
    moe = list(model.sparse_layers("moe").values())
    before = model.training, [layer.backend for layer in moe]
    if model.training:
        model.eval()
    device = model.embed.weight.device
    for layer in moe:
        layer.backend = layer.generation_backend(device, model.compute_dtype)
    try:
        yield
    finally:
        if before[0]:
            model.train()
        for layer, backend in zip(moe, before[1]):
            layer.backend = backend


def run(engine: Engine, rows: list[Row]) -> Iterator[News]:
    """All of these rows, to their ends."""
    for row in rows:
        engine.add(row)
    while engine.waiting or engine.running:
        yield from engine.step()
