"""Kind text: how well a model predicts the documents of a file.

lm-eval's loglikelihood_rolling, done with the model's own loss (logits of a whole vocabulary are
never all there at once). Sums over windows are fp64. A run's held-out rows: lumen/held_out.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lumen.errors import UserError
from lumen.files import sha256
from lumen.inputs import ENDINGS, Input, Reading, kind_of
from lumen.questions import Asked, Options, Task, chosen, partner
from lumen.readers import read_items
from lumen.rows import item_rows
from lumen.vocabulary import mend_surrogates

FEW = 32  # documents; of fewer no interval could be made, so stretches of them are the questions
STRETCH = 2048  # bytes of such a question: a window of about 500 tokens begins in it
CONTROLS = 100  # questions that have one at least, and a tenth of them: the time does not double
SPACE = re.compile(r"\s+")
BLOCKS = "disjoint windows of max_seq_len, the last filled with its left context, as lm-eval's"
UNIGRAM = "the baseline is the unigram of the very text that is predicted, which flatters it"


# ---------------------------------------------------------------- windows


class Window(NamedTuple):
    """Of the stream <|endoftext|>, token 0, token 1, ...: its inputs are places [begin, end), and
    tokens [first, end) are predicted in it, which come one place later."""

    begin: int
    first: int
    end: int


def windows(n: int, T: int, stride: int | None = None) -> list[Window]:
    """How n tokens are predicted, each once, T places at a time.

    Every token sees at least T - stride tokens, where there are so many. stride None is T: disjoint
    windows, as lm-eval 0.4.13's get_rolling_token_windows with context_len 1.
    """
    step = stride or T
    found = [Window(0, 0, min(n, T))] if n else []
    while found and found[-1].end < n:
        first = found[-1].end
        end = min(n, first + step)
        found.append(Window(end - T, first, end))
    return found


class Sums(NamedTuple):
    """Over targets."""

    nats: float
    tokens: int
    right: int

    def control(self) -> dict:
        return {"nats": self.nats, "tokens": self.tokens}


def predict(asked: Asked, rows) -> Sums:
    """Over rows (inputs, targets), int64 (n,) each, of at most max_seq_len; -1: no target. Each is
    a forward pass of its own."""
    nats, tokens, right = 0.0, 0, 0
    device = asked.model.embed.weight.device
    with asked.scorer.at_rest():
        for x, y in rows:
            x, y = (torch.from_numpy(part)[None].to(device) for part in (x, y))
            _, found = asked.model(x, targets=y)
            nats += found["ce"].item()
            tokens += int(found["count"].item())
            right += int(found["correct"].item())
    return Sums(nats, tokens, right)


def with_control(n: int, options: Options) -> set[int]:
    """The questions of n that are asked once more, with another's inputs."""
    if not options.control or n < 2:
        return set()
    # those that a small limit asks are among them
    return set(chosen(n, replace(options, limit=max(CONTROLS, n // 10))))


class Unigram:
    """The frequencies of tokens among all targets of a task: the best that sees no context, and a
    little better than that, for they are those of the text itself."""

    def __init__(self, counts: np.ndarray):
        """counts: (V,)."""
        total = max(1, int(counts.sum()))
        self.nats_of = np.log(total) - np.log(np.maximum(counts, 1))  # (V,)

    def nats(self, targets: np.ndarray) -> float:
        return float(self.nats_of[targets].sum())


# ---------------------------------------------------------------- documents


class Unit(NamedTuple):
    """A question: a document, or a stretch of one."""

    document: int
    begin: int  # bytes
    end: int
    last: bool  # of its document


@dataclass
class TextTask(Task):
    """Texts. A question is a document; or where `by_stretch`, the windows of one that begin in so
    many bytes of it, so that a single text has an interval too.

    The line of a question depends on the model and its document; `majority` and `control` on the
    others, by what they are. Bytes and words are those of the text: their sums are lm-eval's.
    """

    documents: list[str] = field(default_factory=list)
    stride: int | None = None  # tokens that a window moves on by; None: that of the options
    by_stretch: int | None = None
    kind = "text"
    metric = "bits_per_byte"

    def __post_init__(self):
        self.stride = self.stride or self.options.stride
        self.units = list(self.make_units())
        self.numbers = chosen(len(self.units), self.options)
        self.controls = with_control(len(self.units), self.options)
        self.encoded: Encoded | None = None
        how = BLOCKS
        if self.stride:
            how = f"a window of max_seq_len that moves on by {self.stride} tokens"
        said = [self.about.get("said"), how, UNIGRAM]
        if self.by_stretch:
            said.insert(1, f"a question is the windows that begin in {self.by_stretch:,} bytes")
        self.about["said"] = "; ".join(filter(None, said))

    def make_units(self) -> Iterator[Unit]:
        for number, text in enumerate(self.documents):
            size = len(text.encode())
            step = self.by_stretch or max(1, size)
            for begin in range(0, size, step):
                yield Unit(number, begin, min(size, begin + step), begin + step >= size)

    def line(self, i: int, asked: Asked) -> dict:
        """E127: a stride that is longer than the model's context."""
        number, T = self.numbers[i], asked.model.cfg.max_seq_len
        if not 1 <= (self.stride or 1) <= T:
            text = f"{self.name}: a stride of {self.stride} tokens; the model's max_seq_len is {T}"
            raise UserError("E127", f"{text}: take 1 to {T}")
        if self.encoded is None or self.encoded.tokenizer is not asked.tokenizer:
            self.encoded = Encoded(self.documents, asked.tokenizer)
        text = self.encoded
        unit = self.units[number]
        mine = text.windows_in(unit, T, self.stride)
        found = predict(asked, (text.row(unit.document, window) for window in mine))
        line = {"i": number, **found._asdict()}
        begin, stop = (mine[0].first, mine[-1].end) if mine else (0, 0)
        line |= text.sizes(unit.document, begin, stop)
        line["majority"] = text.unigram.nats(text.ids[unit.document][begin:stop])
        if number in self.controls and mine:
            other = self.units[partner(number, len(self.units))]
            rows = text.swapped(unit.document, mine, other)
            line["control"] = predict(asked, rows).control()
        return line

    def texts(self) -> Iterator[tuple[int, str]]:
        encoded = lru_cache(1)(str.encode)  # a document has many stretches
        for number in self.numbers:
            document, begin, end, _ = self.units[number]
            data = encoded(self.documents[document])
            yield number, data[begin:end].decode(errors="ignore")


class Places(NamedTuple):
    """Where in the bytes of a document what begins."""

    tokens: np.ndarray  # (n + 1,): its tokens, from 0, and at last its length
    spaces: np.ndarray  # white space, runs of it

    @classmethod
    def of(cls, text: str, sizes: np.ndarray) -> Places:
        """sizes: bytes of each token. Where they are not those of the text, since other people's
        tokenizers change it a little, they are spread over it."""
        length = len(text.encode())
        tokens = np.concatenate([[0], np.cumsum(sizes)])
        if tokens[-1] != length:
            tokens = np.round(tokens * (length / max(1, tokens[-1]))).astype(np.int64)
            tokens[-1] = length
        spaces = np.array([found.start() for found in SPACE.finditer(text)], np.int64)
        if not text.isascii():
            spaces = byte_places(text)[spaces]
        return cls(tokens, spaces)


def byte_places(text: str) -> np.ndarray:
    """(len(text),): where each character begins in its UTF-8."""
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = np.ones(len(code), np.uint8)
    for last in (0x7F, 0x7FF, 0xFFFF):  # of one, two, three bytes
        width += code > last
    return np.cumsum(width, dtype=np.int64) - width


class Encoded:
    """The documents of a task as ids."""

    def __init__(self, documents: list[str], tokenizer):
        self.documents, self.tokenizer = documents, tokenizer
        self.ids = [tokenizer.encode(text) for text in documents]
        counts = np.zeros(tokenizer.n_vocab, np.int64)
        for ids in self.ids:
            counts += np.bincount(ids, minlength=len(counts))
        self.unigram = Unigram(counts)
        self.bytes_of = tokenizer.token_bytes().astype(np.int64)  # (V,)
        self.places = lru_cache(FEW)(self.places)
        self.windows = lru_cache(FEW)(self.windows)

    def places(self, document: int) -> Places:
        return Places.of(self.documents[document], self.bytes_of[self.ids[document]])

    def windows(self, document: int, T: int, stride: int | None) -> tuple[list, np.ndarray]:
        """(its windows, where the targets of each begin)."""
        found = windows(len(self.ids[document]), T, stride)
        return found, np.array([window.first for window in found], np.int64)

    def tokens_in(self, unit: Unit) -> tuple[int, int]:
        """[first, end) of the tokens that begin in it."""
        n = len(self.ids[unit.document])
        if unit.begin == 0 and unit.last:
            return 0, n
        at = self.places(unit.document).tokens
        first, end = np.searchsorted(at[:-1], (unit.begin, unit.end)).tolist()
        return first, n if unit.last else end

    def windows_in(self, unit: Unit, T: int, stride: int | None) -> list[Window]:
        """Those whose first target begins in it."""
        found, firsts = self.windows(unit.document, T, stride)
        first, end = np.searchsorted(firsts, self.tokens_in(unit)).tolist()
        return found[first:end]

    def sizes(self, document: int, first: int, end: int) -> dict:
        """{bytes, words} of tokens [first, end): over a document they add up to len(text.encode())
        and, as lm-eval counts, len(re.split(r"\\s+", text))."""
        found = self.places(document)
        begin, stop = found.tokens[[first, end]].tolist()
        before, through = np.searchsorted(found.spaces, (begin, stop)).tolist()
        return {"bytes": stop - begin, "words": through - before + int(end > first == 0)}

    def stream(self, document: int, begin: int, end: int) -> np.ndarray:
        """Places [begin, end) of <|endoftext|> and the document's ids, as many as there are."""
        ids = self.ids[document][max(0, begin - 1) : max(0, end - 1)].astype(np.int64)
        return np.concatenate([[self.tokenizer.eot_id], ids]) if begin == 0 else ids

    def targets(self, document: int, window: Window) -> np.ndarray:
        y = self.ids[document][window.begin : window.end].astype(np.int64)
        y[: window.first - window.begin] = -1
        return y

    def row(self, document: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
        x = self.stream(document, window.begin, window.end)
        return x, self.targets(document, window)

    def swapped(self, document: int, mine: list[Window], other: Unit):
        """The targets of these windows behind what another unit's windows would have read."""
        start = self.tokens_in(other)[0] - mine[0].begin
        for window in mine:
            x = self.stream(other.document, window.begin + start, window.end + start)
            y = self.targets(document, window)
            n = min(len(x), len(y))
            if n and (y[:n] >= 0).any():
                yield x[:n], y[:n]


# ---------------------------------------------------------------- files of texts


def read_texts(path: Path, options: Options) -> list[Task]:
    """A file that prepare_data.py could read too (.txt and .md are one document, .jsonl a document
    a row, ...), as a task. E127: none, or a row of it is no text."""
    path = Path(path)
    documents = [text for text in read_documents(path) if text.strip()]
    if not documents:
        raise UserError("E127", f"{path} holds no text")
    by_stretch = STRETCH if len(documents) < FEW else None
    about = {"path": str(path), "sha256": sha256(path)}
    return [TextTask(path.stem, options, about, documents, by_stretch=by_stretch)]


def read_documents(path: Path) -> Iterator[str]:
    """E127."""
    kind = kind_of(str(path))
    if not kind or not path.is_file():
        endings = ", ".join(ENDINGS)
        raise UserError("E127", f"{path} is no file of text; its name would end on {endings}")
    # the key is of prepare_data.py, which reads long files twice; without one they are not read
    given = Input(0, "val", kind, path.name, str(path), key="read").measured()
    pieces = []  # of a long document
    for item in read_items(Reading(0, given)):
        for row in item_rows(item):
            if row.code == "blank":
                continue
            if row.code:
                why = f"{path}:{row.line}: {row.value.reason} ({row.code})"
                raise UserError("E127", f"{why}: {row.value.excerpt}".removesuffix(": "))
            pieces.append(row.value)
            if item.kind != "piece":
                # JSON may hold half a surrogate pair
                yield mend_surrogates("".join(pieces))
                pieces = []
