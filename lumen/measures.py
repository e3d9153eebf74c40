"""A text's numbers, for the rules: words, lines, what repeats, its language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache, cached_property

import numpy as np

from lumen.clean import HAS_NO_BLANKS, marks, written_words
from lumen.errors import UserError

LANGUAGE_CHARS = 1000  # of a text, to tell its language: 2 ms
# What may end a sentence, or a quotation, in any script; Thai and Lao have no full stop.
LINE_ENDS = {*".!?…\"'”’»›。！？．｡」』؟۔।॥།။።។", *map(chr, range(0x0E00, 0x0F00))}
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha() and byte not in b" \t\n")
NO_LETTER = re.compile(r"[\d_]|[^\w\s]")
SHORT_LINE = 30  # characters, of a script with blanks
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 / golden ratio


class Measures:
    """A text's numbers, each computed when first asked for."""

    def __init__(self, text: str, language_threshold: float):
        self.text = text
        self.language_threshold = language_threshold
        self.hashes = {}  # n: of n-grams
        self.covered: dict[int, float] = {}  # n: what n-grams repeat; see repeated
        self.score = -1.0  # quality, once it was asked for

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, self.text.split("\n\n")) if part]

    @cached_property
    def words(self) -> list[str]:
        return written_words(self.text)

    @cached_property
    def n_alone(self) -> int:
        """Letters that stand for themselves in `words`."""
        if self.text.isascii() or not HAS_NO_BLANKS.search(self.text):
            return 0
        return len(HAS_NO_BLANKS.findall("".join([word[0] for word in self.words])))

    @cached_property
    def n_words(self) -> int:
        return max(1, len(self.words) - self.n_alone // 2)

    @cached_property
    def without_blanks(self) -> bool:
        """Most of the text is written without blanks."""
        return 2 * self.n_alone > len(self.words)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(len(words),) characters."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def characters(self) -> int:
        """But blanks."""
        return max(1, int(self.lengths.sum()))

    @cached_property
    def mean_word_length(self) -> float | None:
        """Characters, of the words between blanks; None where they are few."""
        if self.without_blanks:
            return None
        words = self.words
        length = self.characters / self.n_words
        if self.n_alone:
            words = [word for word in self.words if not HAS_NO_BLANKS.match(word)]
            length = len("".join(words)) / max(1, len(words))
        if length > 10:  # Tamil words are not too long, their letters bear many marks
            length = len(mark().sub("", "".join(words))) / len(words)
        return length

    @cached_property
    def words_with_letters(self) -> float:
        if self.text.isascii():
            letters = (self.text + " ").encode().translate(None, NO_LETTERS)
            blank = np.frombuffer(letters, np.uint8) <= ord(" ")
            # a blank behind a letter: a word is over
            with_letters = int(np.count_nonzero(blank[1:] > blank[:-1]))
        else:
            with_letters = len(written_words(NO_LETTER.sub("", self.text)))
        return with_letters / max(1, len(self.words))

    @cached_property
    def ended_lines(self) -> float:
        ends = [line[-1] for line in self.lines]
        return share(map(LINE_ENDS.__contains__, ends), len(ends))

    @cached_property
    def short_lines(self) -> float:
        # Thirty characters are five words; where there are no blanks those have ten letters.
        short = SHORT_LINE // 3 if self.without_blanks else SHORT_LINE
        return share(map(short.__ge__, map(len, self.lines)), len(self.lines))

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        return duplicates(self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        return duplicates(self.paragraphs)

    @cached_property
    def letters(self) -> float:
        """Letters and their marks, of all characters but blanks."""
        letters = 0
        for character, n in Counter("".join(self.words)).items():
            if character.isalpha() or unicodedata.category(character)[0] == "M":
                letters += n
        return letters / self.characters

    @cached_property
    def language(self) -> tuple[str, float]:
        """(code, probability); (und, probability) below the threshold."""
        code, probability = identifier().classify(self.text[:LANGUAGE_CHARS])
        if probability < self.language_threshold:
            return "und", probability
        return code, probability

    # ---- n-grams

    @cached_property
    def ids(self) -> np.ndarray:
        """(len(words),) uint64: equal words have equal ids."""
        last = dict(zip(self.words, range(len(self.words))))
        return np.fromiter(map(last.__getitem__, self.words), np.uint64, len(self.words))

    @cached_property
    def before(self) -> np.ndarray:
        """(len(words) + 1,) characters before each word."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    def words_in(self, n: int) -> int:
        """Of an n-gram."""
        return 2 * n if self.without_blanks else n

    def ngrams(self, n: int) -> np.ndarray:
        """A hash of each n of `words` in a row."""
        if n == 1:
            return self.ids
        if n not in self.hashes:
            shorter = self.ngrams(n - 1)[:-1]
            self.hashes[n] = shorter * MIX + self.ids[n - 1 :]
        return self.hashes[n]

    def top_ngram(self, n: int, limit: float) -> float:
        """Share of the characters that the most frequent n-gram has, the longest of several; 0
        where none comes twice, or where it is certain that the share is at most `limit`."""
        n = self.words_in(n)
        if len(self.ids) <= n:
            return 0.0
        hashes = self.ngrams(n)
        sizes = self.before[n:] - self.before[:-n]
        # so many times at least, were it as long as the longest
        least = max(2, int(limit * self.characters / sizes.max()) + 1)
        ordered = np.sort(hashes)
        if not (ordered[least - 1 :] == ordered[: len(ordered) - least + 1]).any():
            return 0.0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = counts.max()
        return int(most * sizes[first[counts == most]].max()) / self.characters

    def repeated(self, n: int, limit: float) -> float:
        """Share of the characters in n-grams that came before; or a number above it and at most
        `limit`: words that repeat an n-gram repeat a shorter one too."""
        for shorter, share in self.covered.items():
            if shorter < n and share <= limit:
                return share
        if n not in self.covered:
            self.covered[n] = self.repeated_share(self.words_in(n))
        return self.covered[n]

    def repeated_share(self, n: int) -> float:
        if len(self.ids) <= n:
            return 0.0
        hashes = self.ngrams(n)
        ordered = np.sort(hashes)
        if not (ordered[1:] == ordered[:-1]).any():
            return 0.0
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        changes = np.zeros(len(self.ids) + 1, np.int64)
        changes[again] += 1
        changes[again + n] -= 1
        inside = np.cumsum(changes[:-1]) > 0
        return int(self.lengths[inside].sum()) / self.characters


def share(found, of: int) -> float:
    """Of 0, 0."""
    return sum(found) / max(1, of)


def duplicates(items: list[str]) -> tuple[float, float]:
    """Items that came before: their share, and their share of the characters."""
    if len(set(items)) == len(items):
        return 0.0, 0.0
    again, seen = [], set()
    for item in items:
        if item in seen:
            again.append(item)
        seen.add(item)
    return len(again) / len(items), sum(map(len, again)) / sum(map(len, items))


@cache
def mark() -> re.Pattern:
    return re.compile(f"[{marks()}]+")


@cache
def identifier():
    """py3langid with probabilities. E003."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        text = "telling languages needs py3langid: pip install 'py3langid>=0.4'"
        without = "without it: no language, and of preset web no two_stop_words (rules: -NAME)"
        raise UserError("E003", f"{text}; {without}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
