"""Text as it is trained on: cleaned, and cut where it must be cut. What its words are."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from lumen.tokenizer import mend_surrogates

CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n")
# Letters of scripts that put no blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Tai, Han,
# kana. Each of them is a word here: a real one has two, more or less (see rules.Measures.n_words).
NO_BLANKS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U000323af"
)
HAS_NO_BLANKS = re.compile(f"[{NO_BLANKS}]")
WRITTEN = re.compile(rf"[{NO_BLANKS}][^\w\s]*|[^\s{NO_BLANKS}]+")  # marks, commas go with a letter
ASCII_WORDS = bytes(
    byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256)
).lower()


def clean(text: str) -> str:
    """CR LF and lone CR to LF, other C0 controls but tab dropped, NFC, surrogates without a partner
    to U+FFFD."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = mend_surrogates(text).encode()
    kept = data.translate(None, CONTROL)  # ten times as fast as a regular expression over the text
    if len(kept) < len(data) or not text.isascii():
        text = unicodedata.normalize("NFC", kept.decode())
    return text


def cut_place(text: str, low: int, high: int) -> int:
    """Where to cut between low and high: after the last blank line, else line, else word, else at
    high."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, low, high)
        if at >= 0:
            return at + len(mark)
    return high


def cut_text(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that together are the text."""
    parts = []
    start = 0
    while len(text) - start > limit:
        end = cut_place(text, start + limit // 2, start + limit)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def written_words(text: str) -> list[str]:
    """The words as they stand between blanks, commas and all; a letter of NO_BLANKS stands
    alone."""
    if text.isascii() or not HAS_NO_BLANKS.search(text):
        return text.split()
    return WRITTEN.findall(text)


@cache
def marks() -> str:
    """Vowel signs and accents that follow their letter: `\\w` leaves them out."""
    return "".join(
        chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M"
    )


@cache
def patterns() -> tuple[re.Pattern, re.Pattern]:
    """What is no part of a word beyond ASCII; a letter of NO_BLANKS with its marks."""
    return (re.compile(rf"[^\x00-\x7f\w{marks()}]+"), re.compile(rf"([{NO_BLANKS}][{marks()}]*)"))


def plain_words(text: str) -> list[bytes]:
    """What two texts are compared by: letters and digits of any script, in lower case, UTF-8."""
    if not text.isascii():
        between, alone = patterns()
        text = between.sub(" ", text.lower())
        if HAS_NO_BLANKS.search(text):
            text = alone.sub(r" \1 ", text)
    return text.encode().translate(ASCII_WORDS).split()
