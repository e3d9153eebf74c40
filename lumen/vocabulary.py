"""What every tokenizer has, whichever library runs it: names, ids and the bytes of each id.

lumen/tokenizer.py runs tiktoken, lumen/foreign.py the `tokenizers` library. Text never becomes a
control token: "<|endoftext|>" in a document is encoded as the characters that it is made of, and
control ids enter a stream only as integers that our code puts there.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property

import numpy as np

from lumen.errors import UserError

EOT = "<|endoftext|>"
SPECIALS = (EOT, "<|pad|>", "<|im_start|>", "<|im_end|>")  # of our own vocabularies, in this order
# What ends a document, the first of them that is there. The end of a turn is none of them
# (<|eot_id|>, <|im_end|>, <end_of_turn>), although tuned models name it their eos_token.
EOT_NAMES = (
    EOT,  # GPT-2, GPT-NeoX, SmolLM2, Qwen, Phi, OLMo, StarCoder
    "<|end_of_text|>",  # Llama 3, Granite, SmolLM3
    "</s>",  # Llama 2, Mistral, T5
    "<eos>",  # Gemma
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "<|end▁of▁sentence|>",
    "<EOS_TOKEN>",  # Command R
    "[EOS]",  # Kimi
    "[SEP]",  # BERT
)
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eom_id|>")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
PAD_NAMES += ("<｜▁pad▁｜>", "<PAD>")
# Some files call their role markers ordinary words (<｜User｜> of DeepSeek): they are none.
CONTROL_FORM = re.compile(r"<[|｜].*[|｜]>|<(start|end)_of_turn>", re.DOTALL)
# ids that their makers left free for others
SPARE_FORM = re.compile(
    r"[<\[][|｜]?(reserved|extra|unused|dummy|place.?holder).*[|｜]?[>\]]", re.DOTALL
)


def is_control(name: str) -> bool:
    """Whether an added token of this name stands for no text, whatever its file calls it."""
    if name in EOT_NAMES or name in PAD_NAMES:
        return True
    return bool(CONTROL_FORM.fullmatch(name) or SPARE_FORM.fullmatch(name))


def mend_surrogates(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates with U+FFFD: then the text can be
    UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Vocabulary:
    """name; n_vocab, the largest id + 1.

    specials: control tokens -> id, as the file says. words: added tokens that stand for their text
    (`<tool_call>` in Qwen's files) -> id; those whose name is_control() are not taken from text
    either. pattern: the regex that cuts a text into pieces; None: it is cut otherwise. eot_id ends
    a document; pad_id, im_start_id, im_end_id, unk_id may be None. unk_id: what a character becomes
    that the vocabulary cannot spell. spare: ids that are free for control tokens of one's own.
    """

    pattern: str | None = None
    unk_id: int | None = None

    def __init__(self, name: str, specials: dict, words: dict, pieces: dict, eot: str | None):
        """pieces: id -> bytes, of specials and words where they stand for other bytes than those of
        their names; eot: the name of the end of a document where it is none of EOT_NAMES."""
        self.name = name
        self.specials = specials
        self.words = words
        self.eot = eot
        self.controls = dict(specials)
        self.controls |= {text: i for text, i in words.items() if text == eot or is_control(text)}
        self.n_vocab = 1 + max((*pieces, *specials.values(), *words.values()))
        self.eot_id = next(i for n in (eot, *EOT_NAMES) if (i := self.control(n)) is not None)
        pads = [self.controls[name] for name in PAD_NAMES if name in self.controls]
        self.pad_id = pads[0] if pads else None
        self.im_start_id = self.control("<|im_start|>")
        self.im_end_id = self.control("<|im_end|>")
        # ids that mean nothing (cl100k_base has some) decode to nothing
        self._bytes = [b""] * self.n_vocab
        for text, i in {**specials, **words}.items():
            self._bytes[i] = text.encode()
        for i, token in pieces.items():
            self._bytes[i] = token

    def control(self, name: str | None) -> int | None:
        """The id of the control token of that name; None: there is none."""
        return self.controls.get(name)

    @property
    def spare(self) -> list[int]:
        return sorted(i for name, i in self.controls.items() if SPARE_FORM.fullmatch(name))

    def caveats(self) -> list[str]:
        """What is not exact with this tokenizer, for people; nothing: all of it is."""
        return []

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids, 1-D, never one of `controls`. Lone surrogates are encoded as U+FFFD."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """The bytes of the ids (a sequence or array of integers); a control token gives its name.
        E113: no such id."""
        ids = np.asarray(ids).ravel()
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_vocab:
            raise UserError(
                "E113",
                f"token ids {ids.min()} to {ids.max()}, but {self.name} has {self.n_vocab} ids",
            )
        return b"".join([self._bytes[i] for i in ids.tolist()])

    def decode(self, ids) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """uint16 (n_vocab,): bytes of text per id, 0 for control tokens; turns nats per token into
        bits per byte. uint32 for other people's vocabularies whose longest token does not fit."""
        lengths = np.array([len(token) for token in self._bytes])
        lengths = lengths.astype(np.uint16 if lengths.max() < 1 << 16 else np.uint32)
        lengths[list(self.controls.values())] = 0
        if self.unk_id is not None:
            lengths[self.unk_id] = 0
        return lengths

    def to_json(self) -> str:
        """tokenizer.json, the same text for the same tokenizer."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether both make the same ids of every text. Unlike sha256 it does not look at the
        name, which a file of another program takes from its folder, nor at how a file is
        spelled."""
        raise NotImplementedError

    def save(self, path) -> None:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(self.to_json())
