"""A tokenizer.json that tiktoken's engine cannot run with the same ids: the `tokenizers` library
runs it itself, with the ids that transformers makes of it (add_special_tokens=False,
split_special_tokens=True).

One difference: where a model could spell a control token out of text (Unigram has "</s>" among
its pieces), transformers gives the control id, and we never do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets

import numpy as np

from lumen.errors import UserError
from lumen.tokenizer_json import BYTE, added_tokens, kind, lacks
from lumen.vocabulary import EOT_NAMES, Vocabulary, is_control, mend_surrogates

OFF = ("truncation", "padding", "post_processor")  # what a file adds to a text, or takes from it
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Foreign(Vocabulary):
    """text: the tokenizer.json, kept as it is. reason: why tiktoken does not run it."""

    def __init__(self, name: str, text: str, eot: str | None, reason: str, whole=None):
        """whole: `text` parsed, where somebody has it already. E003: tokenizers is not installed;
        E116: it refuses the file."""
        whole = whole or json.loads(text)
        self.reason = reason
        self._text = text
        try:
            specials, words, pieces = self._start(whole, eot)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            text = f"{reason}; and it has not the form of a tokenizer.json: {error!r}"
            raise UserError("E116", text) from None
        super().__init__(name, specials, words, pieces, eot)

    def _start(self, whole: dict, eot: str | None) -> tuple[dict, dict, dict]:
        """The engine, and what it says of control tokens, words and pieces."""
        specials, words = added_tokens(whole)
        controls = [*specials, *(name for name in words if name == eot or is_control(name))]
        unknown = unknown_token(whole["model"])
        if unknown and unknown in (eot, *EOT_NAMES):
            if kind(whole["model"]) != "BPE":  # which can do without
                text = f"{self.reason}; and what it cannot spell becomes {unknown}"
                raise UserError("E116", f"{text}, the end of a document")
            whole["model"]["unk_token"] = unknown = None
        secret = f"\U0010ffff{secrets.token_hex(16)}"
        renamed = {name: f"{secret}{i}" for i, name in enumerate(controls)}
        self._engine = start_engine(out_of_reach(whole, renamed), self.reason)
        names = {renamed.get(name, name): name for name in (*specials, *words)}
        ids = {names.get(name, name): i for name, i in self._engine.get_vocab().items()}
        if len(set(ids.values())) != len(ids) or max(ids.values()) >= 1 << 24:
            raise ValueError("two tokens have one id, or it is absurd")
        self.unk_id = ids.get(unknown)
        self._spelling = Spelling(whole.get("decoder"), self.reason)
        self._caveats = caveats(whole, ids, unknown)
        specials = {name: ids[name] for name in specials if name != unknown}
        words = {name: ids[name] for name in words if name != unknown}
        own = [name for name in ids if name == unknown or name not in renamed]
        return specials, words, {ids[name]: self._spelling.bytes_of(name) for name in own}

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids, 1-D, never one of `controls`. Lone surrogates are encoded as U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = mend_surrogates(text)
        # _fast: without offsets
        with refusing("the tokenizers library broke on a text", self.reason):
            made = self._engine.encode_batch_fast([text], add_special_tokens=False)
        return np.array(made[0].ids, np.uint32)

    def decode(self, ids) -> str:
        """The text of the ids, without the blank that the kind puts before every text."""
        text = super().decode(ids)
        blanks = len(text) - len(text.lstrip(" "))
        return text[min(blanks, self._spelling.lead) :]

    def caveats(self) -> list[str]:
        """What is not exact, of ids to text and of token_bytes()."""
        return self._caveats

    def to_json(self) -> str:
        """The file as it is; where its end of document was found beside it, with that in
        model.eot."""
        if not self.eot:
            return self._text
        whole = json.loads(self._text)
        whole["model"]["eot"] = self.eot
        return json.dumps(whole, ensure_ascii=False) + "\n"

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether both files mean the same, whatever they put around a text."""
        if not isinstance(other, Foreign) or self.eot_id != other.eot_id:
            return False
        return meaning(self._text) == meaning(other._text)


def unknown_token(model: dict) -> str | None:
    """The token that stands for what the vocabulary cannot spell."""
    if model.get("type") == "Unigram":
        place = model.get("unk_id")
        return None if place is None else model["vocab"][place][0]
    return model.get("unk_token")


def out_of_reach(whole: dict, renamed: dict) -> dict:
    """The same tokenizer, in which no text spells a control token: they bear names that nobody can
    guess, and no merge leads to one."""
    whole = whole | dict.fromkeys(OFF)
    model = dict(whole["model"])
    if model.get("dropout"):
        model["dropout"] = None  # it makes ids random, which is for training only
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(name, name): i for name, i in vocab.items()}
    else:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if merges := model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in merges if not leads_to(merge, prefix, renamed)]
    whole["model"] = model
    whole["added_tokens"] = [
        token | {"content": renamed[name], "special": True} if name in renamed else token
        for token in whole.get("added_tokens") or []
        if (name := token["content"]) is not None
    ]
    return whole


def leads_to(merge, prefix: str, names: dict) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return not names.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))


def start_engine(whole: dict, reason: str):
    """tokenizers.Tokenizer. E003, E116."""
    # one thread: prepare_data.py has a process per core, and threads do not survive a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer as Engine
    except ImportError:
        text = f"{reason}: only the tokenizers library can run it; pip install tokenizers"
        raise UserError("E003", text) from None
    if not hasattr(Engine, "encode_batch_fast"):
        raise UserError("E003", f"{reason}: pip install --upgrade 'tokenizers>=0.20'")
    with refusing("the tokenizers library cannot run it", reason):
        engine = Engine.from_str(json.dumps(whole))
        # has it a token for characters that it does not know?
        engine.encode("a \u0b83\u2603\u4e02\U0010fffd", add_special_tokens=False)
    return engine


@contextlib.contextmanager
def refusing(what: str, reason: str):
    """E116 for whatever the library raises: Exception itself, or the end of its Rust
    (PanicException), which is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError("E116", f"{reason}; and {what}: {error}") from None


class Spelling:
    """The bytes of a piece, as the file's decoder says. lead: how many blanks it takes from the
    beginning of a text."""

    def __init__(self, decoder: dict | None, reason: str):
        self.lead = 0
        self.steps = decoder["decoders"] if kind(decoder) == "Sequence" else [decoder]
        kinds = [kind(step) for step in self.steps]
        for step in self.steps:
            if kind(step) not in STEPS or "Regex" in (step or {}).get("pattern", {}):
                text = f"{reason}; and Lumen does not know its decoder {kind(step)}"
                raise UserError("E116", text)
            metaspace = kind(step) == "Metaspace" and step.get("prepend_scheme") != "never"
            if metaspace or kind(step) in (None, "WordPiece"):
                self.lead = 1
        if "Fuse" in kinds:  # what comes after it sees the whole text
            after = self.steps[kinds.index("Fuse") :]
            self.steps = self.steps[: kinds.index("Fuse")]
            self.lead += sum(step["start"] for step in after if kind(step) == "Strip")

    def bytes_of(self, piece: str) -> bytes:
        for step in self.steps:
            piece = STEPS[kind(step)](piece, step)
            if isinstance(piece, bytes):
                return piece
        return piece.encode()


def byte_level(piece: str, step: dict) -> str | bytes:
    if all(char in BYTE for char in piece):
        return bytes(BYTE[char] for char in piece)
    return piece


def byte_fallback(piece: str, step: dict) -> str | bytes:
    found = FALLBACK.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece


def word_piece(piece: str, step: dict) -> str:
    return piece.removeprefix(step["prefix"]) if piece.startswith(step["prefix"]) else f" {piece}"


def strip(piece: str, step: dict) -> str:
    content = step["content"]
    for _ in range(step["start"]):
        piece = piece.removeprefix(content)
    for _ in range(step["stop"]):
        piece = piece.removesuffix(content)
    return piece


STEPS = {
    None: lambda piece, step: f" {piece}",  # the library puts a blank between any two
    "BPEDecoder": lambda piece, step: piece.replace(step["suffix"], " "),
    "ByteFallback": byte_fallback,
    "ByteLevel": byte_level,
    "Fuse": lambda piece, step: piece,
    "Metaspace": lambda piece, step: piece.replace(step["replacement"], " "),
    "Replace": lambda piece, step: piece.replace(step["pattern"]["String"], step["content"]),
    "Strip": strip,
    "WordPiece": word_piece,
}


def inside(part: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer; of none, none."""
    if kind(part) == "Sequence":
        return part[key]
    return [part] if part else []


def caveats(whole: dict, ids: dict, unknown: str | None) -> list[str]:
    """What of a text the ids do not say, for people."""
    found = []
    normalizers = inside(whole.get("normalizer"), "normalizers")
    before = inside(whole.get("pre_tokenizer"), "pretokenizers")
    changing = [kind(step) for step in normalizers if not is_taken_back(step)]
    if changing:
        found.append(f"its normalizer ({', '.join(changing)}) changes text")
    prepends = any(kind(step) == "Prepend" for step in normalizers)
    prepends |= any(step.get("add_prefix_space") for step in before)
    prepends |= any(step.get("prepend_scheme", "never") != "never" for step in before)
    if prepends:
        found.append("it puts a blank before a text, which counts as a byte")
    if lost := unspelled(whole["model"], before, ids):
        fate = f"become {unknown}" if unknown in ids else "are dropped"
        found.append(f"{lost} {fate}")
    return found


def is_taken_back(step: dict) -> bool:
    """Whether decoders undo this step of a normalizer."""
    plain = kind(step) == "Replace" and "String" in step["pattern"]
    return plain or kind(step) == "Prepend"


def unspelled(model: dict, before: list[dict], ids: dict) -> str:
    """Which characters the vocabulary cannot spell; none: ""."""
    if any(kind(step) == "ByteLevel" for step in before):
        return lacks({byte for char, byte in BYTE.items() if char not in ids})
    if model.get("byte_fallback"):
        return lacks({byte for byte in range(256) if f"<0x{byte:02X}>" not in ids})
    return "characters that it does not know"


def meaning(text: str) -> dict:
    """What of a tokenizer.json decides ids; spellings that mean the same made equal."""
    whole = json.loads(text)
    model = {key: value for key, value in whole["model"].items() if value not in (None, False)}
    for key in ("name", "eot", "dropout"):
        model.pop(key, None)
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
        model["merges"] = pairs
    names = ("added_tokens", "normalizer", "pre_tokenizer")
    return {name: whole.get(name) for name in names} | {"model": model}
