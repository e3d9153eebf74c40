"""Documents that hold text of an evaluation: a model that was trained on them has seen the answers.

As GPT-3 did (Brown 2020, appendix C): a document is contaminated if it has 13 words in a row of an
evaluation's text. A text of 8 to 12 words must be there as a whole; shorter ones are not looked
for, or "the answer is" would drop everything. Words are letters and digits of any script in lower
case (clean.plain_words); in scripts without blanks a letter is a word.
"""

from __future__ import annotations

import json

import numpy as np

from lumen.clean import plain_words
from lumen.errors import UserError
from lumen.values import short

SHORTEST = 8  # words, of a text that is looked for as a whole
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 / golden ratio


def texts_of(path: str):
    """.txt: the whole file; .jsonl: every string in every row, however deep. E002 another ending,
    E101 no JSON, E103 no UTF-8, E108 cannot be read."""
    if not path.endswith((".txt", ".jsonl")):
        raise UserError("E002", f"decontaminate: {path} is no .txt or .jsonl file")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError("E108", f"{path}: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("E103", f"{path}: byte {error.start:,} is no UTF-8") from None
    if path.endswith(".txt"):
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError("E101", f"{path}:{number}: {short(line)} is no JSON") from None
        yield from strings_in(row)


def strings_in(value):
    """All strings of a JSON value, but the names of fields."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


class Contaminated:
    """The n-grams of evaluation files, as sorted hashes. Picklable.

    A word's number is its place in the sorted vocabulary of those files; 0 is any other word, and
    no n-gram has it. E002, E101, E103, E108: see texts_of.
    """

    def __init__(self, files: list[str], ngram: int = 13):
        if type(ngram) is not int or not 1 <= ngram <= 100:
            raise UserError("E002", f"decontaminate: ngram {short(ngram)} is not 1 to 100")
        self.ngram = ngram
        texts = [plain_words(text) for path in files for text in texts_of(path)]
        shortest = min(SHORTEST, ngram)
        used = [words for words in texts if len(words) >= shortest]
        self.texts = len(used)
        self.short = sum(0 < len(words) < shortest for words in texts)
        vocabulary = sorted({word for words in used for word in words})
        self.numbers = {word: i for i, word in enumerate(vocabulary, 1)}
        hashes: dict[int, list] = {}  # n: of n words in a row
        for words in used:
            n = min(len(words), ngram)
            hashes.setdefault(n, []).append(self.hashed(words, [n])[n])
        self.hashes = {n: np.unique(np.concatenate(hashes[n])) for n in sorted(hashes)}

    def hashed(self, words: list[bytes], lengths) -> dict[int, np.ndarray]:
        """{n: a hash of each n words in a row}, for the n of `lengths` for which n known words
        are in a row somewhere."""
        get = self.numbers.get
        ids = np.array([get(word, 0) for word in words], np.uint64)
        places = np.arange(len(ids))
        known = places - np.maximum.accumulate(np.where(ids == 0, places, -1))  # in a row, up to it
        longest = int(known.max(initial=0))
        made = {}
        hashes = ids
        for n in range(1, min(longest, max(lengths)) + 1):
            if n > 1:
                hashes = hashes[:-1] * MIX + ids[n - 1 :]
            if n in lengths:
                made[n] = hashes
        return made

    def hits(self, text: str) -> str:
        """The first words in a row of the text that are in the files too, or ""."""
        if not self.hashes:
            return ""
        words = plain_words(text)
        first = len(words)
        found = ""
        for n, hashes in self.hashed(words, self.hashes).items():
            known = self.hashes[n]
            places = np.searchsorted(known, hashes)
            places[places == len(known)] = 0
            at = np.flatnonzero(known[places] == hashes)
            if len(at) and at[0] < first:
                first = int(at[0])
                found = b" ".join(words[first : first + n]).decode()
        return found

    def explain(self) -> list[str]:
        n = self.ngram
        total = sum(map(len, self.hashes.values()))
        lines = [f"free_of_evaluation_text: kept if it has no {n} words in a row of {self.texts:,}"]
        lines[0] += f" evaluation texts ({total:,} n-grams)"
        if n > SHORTEST:
            lines.append(f"  texts of {SHORTEST} to {n - 1} words are looked for as a whole")
        lines.append(f"  {self.short:,} shorter ones are not looked for")
        return lines
