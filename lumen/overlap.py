"""Contamination: which questions of an evaluation stand in the text that a run was trained on.

As GPT-3 looked for it (Brown et al. 2020, appendix C), but in tokens: a question counts as seen if
13 of its tokens in a row are somewhere in the training shards. Its first and last token are left
out, since a question by itself is cut otherwise there than amid a text. What has 8 to 12 tokens
then must be there as a whole; less is not looked for, or "the answer is" would be a hit. Of a task
of kind text, whose questions are whole pages, half of a question's n-grams must be there: of idioms
and licences any page has some.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lumen import checkpoint
from lumen import tokenizer as tokenizers
from lumen.chat import data_folders
from lumen.errors import UserError
from lumen.pairs import PairSource
from lumen.windows import Source

NGRAM = 13  # tokens
SHORTEST = 8
TEXT_SHARE = 0.5  # of the n-grams of a page
MOST = 4_000_000_000  # training tokens that are looked through; a minute on one core
READ = 1 << 20  # tokens at a time
BLOCK = 1 << 15  # tokens whose hashes stay in a core's cache
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 / golden ratio
EXAMPLES = 3
SAY_EVERY = 10  # seconds


def overlap(tasks, state: dict, tokenizer, say, most_tokens: int | None = None) -> dict:
    """{name of a task: {share, n, n_hit, hits, short, ngrams, examples, tokens, of, said}}.

    state: of the run's checkpoint. n: questions that were looked for; hits: the `i` of those that
    were found; short: how many were too short; ngrams: the share of all their n-grams that was
    found, for long texts; examples: [[i, text that was found]]; tokens of `of` were looked through.
    {} where no training data are here, or none are wanted.
    """
    if most_tokens == 0:
        return {}
    sources, notes = training_sources(state, tokenizer)
    for note in notes:
        say(f"overlap: {note}")
    if not sources:
        return {}
    questions = Questions(tasks, tokenizer)
    total = sum(source.tokens for source in sources)
    most = MOST if most_tokens is None else most_tokens
    if total > most:
        notes.append(f"{most:,} of {total:,} training tokens, spread evenly, so hits are too few")
        say(f"overlap: looks through {notes[-1]} (--overlap_tokens N)")
    looked = 0
    began = told = time.perf_counter()
    damaged = []
    for ids, fresh in blocks(sources, min(1.0, most / max(1, total)), damaged):
        questions.look(ids)
        looked += fresh
        now = time.perf_counter()
        if now - told > SAY_EVERY:
            told = now
            speed = looked / (now - began) / 1e6
            of = min(total, most) / 1e6
            say(f"overlap: {looked / 1e6:,.0f} of {of:,.0f} M training tokens, {speed:.0f} M/s")
    for note in damaged:
        say(f"overlap: {note}")
    common = {"tokens": looked, "of": total, "said": "; ".join(notes + damaged)}
    return {task.name: questions.result(task) | common for task in tasks}


# ---------------------------------------------------------------- the training data


def training_sources(state: dict, tokenizer) -> tuple[list[Source], list[str]]:
    """(the training splits of a run and of what it was fine-tuned from, what is not looked at)."""
    found, notes, seen = {}, [], set()
    while state:
        for folder in data_folders(state):
            if not Path(folder).exists():
                notes.append(f"{folder} is not here any more; not looked at")
                continue
            try:
                if same_ids(folder, tokenizer):
                    found[folder] = open_source(folder, state["config"])
                else:
                    notes.append(f"{folder} has another tokenizer; not looked at")
            except UserError as error:  # no reason to lose the scores
                notes.append(f"{error.text}; not looked at")
        base = name_of_base(state)
        if not base or base in seen:
            break
        seen.add(base)
        state, note = state_of(base)
        notes += filter(None, [note])
    return list(found.values()), notes


def open_source(folder: str, config: dict) -> Source:
    """Its training split."""
    T = config["model"]["max_seq_len"]
    if config.get("method", "sft") != "sft":
        return PairSource(folder, "train", T)
    return Source(folder, "train", T, config.get("val_fraction", 0.0))


def same_ids(folder: str, tokenizer) -> bool:
    if not (Path(folder) / "tokenizer.json").exists():  # bare shards name none
        return True
    there = tokenizers.load(folder)
    return there.sha256 == tokenizer.sha256 or there.same_ids(tokenizer)


def name_of_base(state: dict) -> str | None:
    """What the run began with, or was made of."""
    adapted = (state.get("adapter") or {}).get("base")
    path = (state.get("base") or {}).get("path") or adapted
    return path or (state.get("imported") or {}).get("from")


def state_of(base: str) -> tuple[dict, str]:
    """(the state of its checkpoint, {} where it has none; a note)."""
    try:
        return checkpoint.find(base, say=lambda text: None).state, ""
    except (UserError, OSError):
        return {}, f"what the base {base} was trained on is not known; not looked at"


def blocks(sources: list[Source], share: float, damaged: list[str]) -> Iterator:
    """(ids, how many of them are new) over all tokens of the sources, or a share of them. The rest
    of a source that cannot be read is left out, and `damaged` says so."""
    for source in sources:
        try:
            yield from blocks_of(source, share)
        except UserError as error:
            damaged.append(f"{error.text}; not looked at from there on")


def blocks_of(source: Source, share: float) -> Iterator[tuple[np.ndarray, int]]:
    """Of one, in evenly spread parts. A part begins with the end of the one before, so no n-gram is
    cut, whatever the shards."""
    starts = np.arange(0, source.tokens, READ)
    if share < 1:
        n = max(1, round(len(starts) * share))
        starts = starts[np.linspace(0, len(starts) - 1, n).round().astype(int)]
    for start in starts.tolist():
        end = min(source.tokens, start + READ + NGRAM - 1)
        spans = source.spans_of(source.first + start, source.first + end)
        ids = np.concatenate([source.shards[k].read(first, n) for k, first, n in spans])
        for at in range(0, min(READ, len(ids)), BLOCK):
            part = ids[at : at + BLOCK + NGRAM - 1]
            yield part, min(len(part), BLOCK)


# ---------------------------------------------------------------- the questions


class Questions:
    """The n-grams of all questions, and which of them have been found."""

    def __init__(self, tasks, tokenizer):
        self.tokenizer = tokenizer
        self.names: list[tuple[str, int]] = []  # (task, i) of each question looked for
        self.short = dict.fromkeys((task.name for task in tasks), 0)
        parts, lengths = [], []
        for task in tasks:
            for number, text in task.texts():
                ids = tokenizer.encode(text)
                if len(ids) >= SHORTEST + 2:
                    ids = ids[1:-1]
                if len(ids) < SHORTEST:
                    self.short[task.name] += 1
                    continue
                self.names.append((task.name, number))
                parts.append(ids)
                lengths.append(len(ids))
        self.ids = np.concatenate([np.zeros(0, np.uint32), *parts]).astype(np.uint64)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        hashes = dict(hashed(self.ids))
        self.tables: dict[int, Table] = {}  # n: of n-grams
        for n in sorted({min(length, NGRAM) for length in lengths}):
            places, owners = self.places(n, starts, np.array(lengths))
            self.tables[n] = Table(n, hashes[n][places], places, owners)

    @staticmethod
    def places(n: int, starts, lengths) -> tuple[np.ndarray, np.ndarray]:
        """(where the n-grams begin in `ids`, the question of each), (N,) each."""
        questions = np.flatnonzero(np.minimum(lengths, NGRAM) == n)
        counts = lengths[questions] - n + 1
        owners = np.repeat(questions, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return starts[owners] + within, owners

    def look(self, ids: np.ndarray) -> None:
        """Marks the n-grams that are in `ids`, (N,) of a training shard."""
        for n, hashes in hashed(ids.astype(np.uint64)):
            if n in self.tables:
                self.tables[n].look(hashes, ids, self.ids)

    def result(self, task) -> dict:
        """As `overlap` says it, of one task."""
        mine = np.array([name == task.name for name, _ in self.names], bool)
        found, total = np.zeros((2, len(mine)), np.int64)
        where = {}  # question: (n, the place of an n-gram that was found)
        for n, table in self.tables.items():
            hit = table.found[table.inverse]
            owners, places = table.owners[hit], table.occurrences[hit]
            found += np.bincount(owners, minlength=len(mine))
            total += np.bincount(table.owners, minlength=len(mine))
            where |= {q: (n, p) for q, p in zip(owners.tolist(), places.tolist())}
        least = total * TEXT_SHARE if task.kind == "text" else 1
        hits = np.flatnonzero(mine & (found > 0) & (found >= least)).tolist()
        examples = []
        for question in hits[:EXAMPLES]:
            n, place = where[question]
            text = self.tokenizer.decode(self.ids[place : place + n])
            examples.append([self.names[question][1], text])
        looked_for = int(mine.sum())
        return {
            "share": len(hits) / max(1, looked_for),
            "n": looked_for,
            "n_hit": len(hits),
            "hits": [self.names[question][1] for question in hits],
            "short": self.short[task.name],
            "ngrams": float(found[mine].sum() / max(1, total[mine].sum())),
            "examples": examples,
        }


class Table:
    """n-grams of one length. Of a hash that several share the first stands for all."""

    def __init__(self, n: int, hashes: np.ndarray, places: np.ndarray, owners: np.ndarray):
        """hashes, places, owners: (N,), of n-grams as of Questions.places."""
        self.n, self.owners, self.occurrences = n, owners, places
        self.hashes, first, self.inverse = np.unique(hashes, return_index=True, return_inverse=True)
        self.places = places[first]
        self.found = np.zeros(len(self.hashes), bool)
        # 16 places or more for each hash: of what is not among them one in 16 goes on to a search
        bits = min(26, max(16, 4 + len(self.hashes).bit_length()))
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)
        self.filter[(self.hashes >> self.shift).astype(np.int64)] = True

    def look(self, hashes: np.ndarray, ids: np.ndarray, known: np.ndarray) -> None:
        """hashes: (N,), those of the n-grams of ids, (N + n - 1,); known: ids of all questions."""
        at = np.flatnonzero(self.filter.take((hashes >> self.shift).view(np.int64)))
        k = np.searchsorted(self.hashes, hashes[at])
        k[k == len(self.hashes)] = 0
        new = (self.hashes[k] == hashes[at]) & ~self.found[k]
        at, k = at[new], k[new]
        if not len(at):
            return
        each = np.arange(self.n)
        same = (ids[at[:, None] + each] == known[self.places[k][:, None] + each]).all(1)
        self.found[k[same]] = True


def hashed(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(n, a hash of each n ids in a row) for n from SHORTEST to NGRAM; ids: uint64 (N,).

    A polynomial in MIX modulo 2**64, so the hash of 2n is made of two of n."""
    hashes, power, n = ids, np.array([MIX]), 1
    while n < SHORTEST:
        hashes = hashes[:-n] * power + hashes[n:]
        power = power * power
        n *= 2
    while n <= NGRAM and len(hashes):
        yield n, hashes
        hashes = hashes[:-1] * MIX + ids[n:]
        n += 1
