"""A SentencePiece .model (Kudo & Richardson 2018) written as tokenizer.json, the only form of a
tokenizer on disk, and held against the sentencepiece library before it is used.

BPE without a table of normalization: Llama 2, Mistral, Gemma. For the others the `tokenizers`
library is not exact: it breaks ties of Unigram otherwise, and applies nmt_nfkc's table by
graphemes.
"""

from __future__ import annotations

import json
import os
import random

from lumen.errors import UserError
from lumen.tokenizer_json import FLAGS
from lumen.vocabulary import EOT_NAMES, Vocabulary

BPE = 2  # trainer_spec.model_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of pieces
CHECKED = 400  # texts that both must give the same ids
REMEDY = "take its makers' tokenizer.json, or let transformers write one:"
REMEDY += " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
ODD = ["", " ", "  a  b ", "\n\n\t", "e\u0301 ﬁ ①", "a\u00a0b\u3000c", "<0x0A>", "▁▁a", "</s>"]
ODD += ["\x00", "👩‍👩‍👧 한국어 日本語 العربية ½"]


def read(path: str) -> str:
    """The text of a tokenizer.json with the ids of this .model. E003, E115, E116."""
    model = parsed(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != BPE or normalizer.precompiled_charsmap:
        kind = trainer.ModelType.Name(trainer.model_type)
        text = f"{path}: SentencePiece, {kind}, normalized by {normalizer.name or 'a table'}"
        raise UserError("E116", f"{text}: only BPE with identity is exact here; {REMEDY}")
    added = []
    for i, piece in enumerate(model.pieces):
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            special = piece.type != USER_DEFINED
            added.append({"id": i, "content": piece.piece, **FLAGS, "special": special})
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers(normalizer)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe(model),
    }
    if trainer.eos_piece not in EOT_NAMES:
        whole["model"]["eot"] = trainer.eos_piece
    return json.dumps(whole, ensure_ascii=False) + "\n"


def parsed(path: str):
    """sentencepiece's ModelProto of the file."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        text = f"{path}: a SentencePiece model; pip install sentencepiece protobuf tokenizers"
        raise UserError("E003", f"{text} ({error.name} is missing)") from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
    except OSError as error:
        raise UserError("E115", f"tokenizer {path}: {error.strerror}") from None
    except Exception as error:  # google.protobuf's own class
        raise UserError("E116", f"{path} is no SentencePiece model: {error}") from None
    if not model.pieces:
        raise UserError("E116", f"{path} is no SentencePiece model: it has no pieces")
    return model


def normalizers(spec) -> list[dict]:
    """What sentencepiece does to a text first, in its order."""
    steps = []
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return steps


def bpe(model) -> dict:
    """Any two pieces whose union is a piece may merge; the better its score, the earlier."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    for piece in model.pieces:
        text = piece.piece
        for at in range(1, len(text)):
            left, right = ids.get(text[:at]), ids.get(text[at:])
            if left is not None and right is not None:
                merges.append((-piece.score, left, right, [text[:at], text[at:]]))
    merges.sort()
    return {
        "type": "BPE",
        "unk_token": model.trainer_spec.unk_piece,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": ids,
        "merges": [pair for *_, pair in merges],
    }


def check(tokenizer: Vocabulary, path: str) -> None:
    """E116 where the sentencepiece library gives a text other ids than the tokenizer."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=os.fspath(path))
    for text in check_texts(theirs):
        if tokenizer.encode(text).tolist() != theirs.encode(text):
            what = f"{path}: the tokenizers library gives {text[:40]!r} other ids than"
            raise UserError("E116", f"{what} sentencepiece; {REMEDY}")


def check_texts(theirs) -> list[str]:
    """Texts of the vocabulary's own pieces, of many alphabets, and runs of one sign."""
    draw = random.Random(0)
    ordinary = [i for i in range(theirs.vocab_size()) if not theirs.is_control(i)]
    pieces = [theirs.id_to_piece(i).replace("▁", " ") for i in ordinary]
    letters = [chr(code) for code in [*range(1, 0x250), *range(0x400, 0x3100, 7)]]
    texts = list(ODD)
    while len(texts) < CHECKED:
        pool = draw.choice((pieces, pieces, letters))
        texts.append("".join(draw.choices(pool, k=draw.randrange(1, 30))))
        texts.append(draw.choice(" =-a\n.") * draw.randrange(1, 40))
    return texts
