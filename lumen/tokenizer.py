"""Text to token ids and back.

train_bpe(texts, 8192) makes a vocabulary of our own: 256 bytes, merges, then <|endoftext|> <|pad|>
<|im_start|> <|im_end|>. load(spec) gives "bytes" (no merges, works for everything), tiktoken's
gpt2, cl100k_base, ... with exactly their ids, or a tokenizer.json, the only form on disk.
`tokenizers.Tokenizer.from_file` reads ours, with the same ids. Other people's are run by tiktoken
where it makes the same ids, else by the `tokenizers` library (lumen/foreign.py).
"""

from __future__ import annotations

import base64
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import regex
import tiktoken

from lumen import spm, tokenizer_json
from lumen.bpe import learn
from lumen.errors import UserError, nearest
from lumen.foreign import Foreign
from lumen.patterns import CL100K_PATTERN, engine_pattern
from lumen.tokenizer_files import FILES, HUB, NAMED, eos_beside, file_in, hub_folder, tiktoken_file
from lumen.tokenizer_json import NO_UTF8
from lumen.vocabulary import SPECIALS, Vocabulary, mend_surrogates


class Tokenizer(Vocabulary):
    """The fast kind, which tiktoken runs. ranks: bytes of a token -> its id, which is also the
    priority of its merge. nfc: text is brought into Unicode's NFC first. A byte without a rank
    (SmolLM2 lacks some) is dropped from its piece, as the `tokenizers` library does."""

    def __init__(
        self,
        name: str,
        ranks: dict,
        specials: dict,
        pattern=CL100K_PATTERN,
        words=None,
        nfc=False,
        eot=None,
    ):
        super().__init__(name, specials, words or {}, {i: t for t, i in ranks.items()}, eot)
        self.ranks = ranks
        self.pattern = pattern
        self.nfc = nfc
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        self._missing = bytes(byte for byte in missing if byte not in NO_UTF8)
        # tiktoken wants all bytes; those never come to it
        filled = ranks | {bytes([byte]): self.n_vocab + byte for byte in missing}
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=engine_pattern(pattern),
            mergeable_ranks=filled,
            special_tokens={**specials, **self.words},
        )
        self._words = set(self.words) - set(self.controls)

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids, 1-D, never one of `controls`. Lone surrogates are encoded as U+FFFD."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        try:
            if self._missing and self._spoken(data := text.encode()) != data:
                return self._encode_by_pieces(text)
            ids = self._encoding.encode_to_numpy(
                text, allowed_special=self._words, disallowed_special=()
            )
        except UnicodeEncodeError:
            return self.encode(mend_surrogates(text))
        except ValueError:  # tiktoken's regex engine has no room for a run of some 100,000 blanks
            return self._encode_by_pieces(text)
        return ids.copy()  # tiktoken's array is read-only

    def _spoken(self, data: bytes) -> bytes:
        return data.translate(None, self._missing)

    def _encode_by_pieces(self, text: str) -> np.ndarray:
        """The same ids, slower: cut by Python's regex engine, which has no limit, and without the
        bytes that the vocabulary lacks."""
        find = regex.compile(f"{self.pattern}|(?:(?!{self.pattern})(?s:.))+").finditer
        ids, words = [], [regex.escape(word) for word in self._words]
        for part in regex.split(f"({'|'.join(words)})", text) if words else [text]:
            if part in self._words:
                ids.append(self.words[part])
                continue
            for piece in find(part):
                if data := self._spoken(piece.group().encode()):
                    ids += self._encoding._encode_single_piece(data)
        return np.array(ids, np.uint32)

    def caveats(self) -> list[str]:
        """What is not exact: NFC changes bytes, and some bytes may be lacking."""
        found = ["its normalizer (NFC) changes text"] if self.nfc else []
        if lost := tokenizer_json.lacks(set(self._missing)):
            found.append(f"{lost} are dropped")
        return found

    def to_json(self) -> str:
        """tokenizer.json, the same text for the same tokenizer."""
        return tokenizer_json.written(self)

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether both make the same ids of every text, whatever their names and files."""
        if not isinstance(other, Tokenizer):
            return False
        a, b = ((t.ranks, t.specials, t.words, t.pattern, t.nfc, t.eot_id) for t in (self, other))
        return a == b


def train_bpe(
    texts: Iterable[str], n_vocab: int, name: str | None = None, max_chars: int | None = None
) -> Tokenizer:
    """A vocabulary of n_vocab ids in all, specials included, from the texts (the first max_chars
    characters of each), see lumen.bpe.learn. Texts with too few different pairs give a smaller
    one. E002: n_vocab below 256 + specials."""
    lowest = 256 + len(SPECIALS)
    if n_vocab < lowest:
        raise UserError(
            "E002",
            f"bpe:{n_vocab} is too small: 256 bytes and {len(SPECIALS)} specials make {lowest} ids",
        )
    return _own(name or f"bpe:{n_vocab}", learn(texts, n_vocab - len(SPECIALS), max_chars))


def _own(name: str, tokens: list[bytes]) -> Tokenizer:
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(name, ranks, {special: len(tokens) + i for i, special in enumerate(SPECIALS)})


def locate(spec: str) -> str | None:
    """The path of the file that load(spec) reads; None: it is made here, or tiktoken's. E003,
    E115."""
    if spec == "bytes" or spec in NAMED:
        return None
    if spec.startswith(HUB):
        spec = hub_folder(spec)
    return file_in(spec) if os.path.isdir(spec) else spec


def load(spec: str) -> Vocabulary:
    """A tokenizer by name (bytes, or one of NAMED), from a tokenizer.json or SentencePiece .model,
    from a folder that has one, or from Hugging Face (hf:ORG/NAME).

    E003: a package is missing; E115: the file is not there; E116: it is of a kind that we would
    read wrongly, or has no end of document."""
    if spec == "bytes":
        return _own("bytes", [bytes([byte]) for byte in range(256)])
    if spec in NAMED:
        pattern, specials, sha256 = FILES[NAMED[spec]]
        lines = [line.split() for line in tiktoken_file(spec, sha256).splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return Tokenizer(spec, ranks, specials, pattern)
    path = locate(spec)
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    if spec.startswith(HUB):
        name = spec.removeprefix(HUB).partition("@")[0]
    if path.endswith(".model"):
        tokenizer = from_json(spm.read(path), path, name)
        spm.check(tokenizer, path)
        return tokenizer
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        raise UserError("E115", f"tokenizer {spec}: {error.strerror}; {meant(spec)}") from None
    except ValueError as error:
        raise UserError("E116", f"{path} is not text: {error}") from None
    return from_json(text, path, name)


def meant(spec: str) -> str:
    """Which names there are, and the one that this is near to."""
    names = ("bytes", *NAMED)
    near = nearest(spec, names)
    if found := re.fullmatch(r"bpe\W?(\d*)", spec):
        near = f"bpe:{found[1] or 8192}"
    hint = f"did you mean {near}? " if near else ""
    return f"{hint}names: {', '.join(names)}, hf:ORG/NAME, and bpe:N in prepare_data.py"


def from_json(text: str, path: str, name: str) -> Vocabulary:
    """The tokenizer that this tokenizer.json is: the fast kind where tiktoken makes its ids. E003,
    E116."""
    try:
        whole = json.loads(text)
        eot = tokenizer_json.end_of_document(whole, eos_beside(path), path)
        name = str(whole["model"].get("name") or name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("E116", f"{path} has not the form of a tokenizer.json: {error!r}") from None
    try:
        return Tokenizer(name, **tokenizer_json.as_ranks(whole), eot=eot)
    except tokenizer_json.Unlike as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError, AttributeError, regex.error) as error:
        reason = f"it has not the form that tiktoken needs: {error!r}"
    return Foreign(name, text, eot, f"{path}: {reason}", whole)


def of_run(folder, sha256: str | None = None) -> Path | None:
    """The tokenizer.json in a run's folder for a step whose state.json names this sum. Where a run
    went on with another tokenizer, the one of its steps before is kept as tokenizer.SUM.json.
    None: the run has none."""
    files = [former(folder, sha256)] if sha256 else []
    return next((file for file in (*files, Path(folder) / "tokenizer.json") if file.exists()), None)


def former(folder, sha256: str) -> Path:
    return Path(folder) / f"tokenizer.{sha256[:12]}.json"
