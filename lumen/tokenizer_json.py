"""tokenizer.json, the only form of a tokenizer on disk: what every kind of it says, and which of
them tiktoken's engine runs with the same ids.

Those have: a BPE model over bytes, its merges in the order of the ids; pre-tokenizer ByteLevel
with its GPT-2 regex, Sequence[Digits(individual), the same], or Sequence[Split(Regex, Isolated),
ByteLevel(use_regex=false)]; normalizer null or NFC; decoder ByteLevel. Post-processors are ignored:
they frame a text, and we encode ordinary text only.
"""

from __future__ import annotations

import json
from collections import defaultdict

from lumen.bpe import parts
from lumen.errors import UserError
from lumen.patterns import COMPLETE_PATTERNS, DIGITS_PATTERN, GPT2_PATTERN, means_the_same
from lumen.vocabulary import EOT_NAMES, TURN_ENDS, is_control

# tokenizer.json writes a byte as a printable character: itself where it is one, else the next free
# one from U+0100 on
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
CHAR = {byte: chr(byte) for byte in _PLAIN}
CHAR |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in CHAR)}
BYTE = {char: byte for byte, char in CHAR.items()}
NO_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no text has
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


class Unlike(Exception):
    """Why tiktoken's engine would make other ids than the file means."""


def need(good: bool, part: str) -> None:
    if not good:
        raise Unlike(part)


def kind(part):
    return part and part.get("type")


def chars(token: bytes) -> str:
    return "".join(CHAR[byte] for byte in token)


# ---------------------------------------------------------------- what every kind has


def added_tokens(whole: dict) -> tuple[dict, dict]:
    """(control tokens, words) of the file: name -> id."""
    specials, words = {}, {}
    for token in whole.get("added_tokens") or []:
        found = specials if token.get("special") else words
        found[token["content"]] = token["id"]
    return specials, words


def end_of_document(whole: dict, beside: list[str], path: str) -> str | None:
    """The token that ends a document where it is none of EOT_NAMES, else None: by model.eot of the
    file, which we write, or by what the files beside it call eos_token. E116: there is none."""
    names = {token["content"] for token in whole.get("added_tokens") or []}
    given = whole["model"].get("eot")
    if given in names:
        return given
    if names.intersection(EOT_NAMES):
        return None
    for name in beside:
        if name in names and name not in TURN_ENDS:
            return name
    text = f"{path}: no end of document: none of {', '.join(EOT_NAMES)} is a special token"
    if turns := [name for name in beside if name in TURN_ENDS]:
        text += f"; {turns[0]} ends a turn, not a document"
    text += '; name one of its added_tokens in tokenizer_config.json beside it: {"eos_token": NAME}'
    raise UserError("E116", text)


# ---------------------------------------------------------------- what tiktoken runs


def as_ranks(whole: dict) -> dict:
    """ranks, specials, pattern, words and nfc of lumen.tokenizer.Tokenizer. Unlike: it cannot be
    one."""
    model = whole["model"]
    check_frame(whole, model)
    specials, words = added_tokens(whole)
    check_words(whole)
    pattern = split_pattern(whole.get("pre_tokenizer"))
    ranks = byte_ranks(model["vocab"], specials, words)
    check_merges(model, ranks)
    missing = {byte for byte in range(256) if bytes([byte]) not in ranks}
    if lost := lacks(missing):
        need(model.get("unk_token") is None, f"{lost} become {model.get('unk_token')}")
    nfc = bool(whole.get("normalizer"))
    return {"ranks": ranks, "specials": specials, "pattern": pattern, "words": words, "nfc": nfc}


def check_frame(whole: dict, model: dict) -> None:
    need(kind(model) == "BPE", f"model is {kind(model)}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(key), f"model.{key} is set")
    normalizer, decoder = kind(whole.get("normalizer")), kind(whole.get("decoder"))
    need(normalizer in (None, "NFC"), f"normalizer is {normalizer}, not null or NFC")
    need(decoder == "ByteLevel", f"decoder is {decoder}, not ByteLevel")
    post = whole.get("post_processor")
    for part in post["processors"] if kind(post) == "Sequence" else [post]:
        good = kind(part) in (None, "ByteLevel", "TemplateProcessing")
        need(good, f"post_processor is {kind(part)}")


def split_pattern(pre: dict | None) -> str:
    steps = pre["pretokenizers"] if kind(pre) == "Sequence" else [pre]
    kinds = [kind(step) for step in steps]
    good = kinds in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"])
    need(good, f"pre_tokenizer is {kinds}, not ByteLevel, or Split or Digits before it")
    byte_level = steps[-1]
    prefix = byte_level.get("add_prefix_space", True)
    need(not prefix, "pre_tokenizer ByteLevel has add_prefix_space")
    use_regex = byte_level.get("use_regex", True)
    good = use_regex == (kinds[0] != "Split")
    need(good, f"pre_tokenizer ByteLevel has use_regex {use_regex}")
    if len(steps) == 1:
        return GPT2_PATTERN
    if kinds[0] == "Digits":
        need(steps[0]["individual_digits"] is True, "pre_tokenizer Digits keeps numbers whole")
        return DIGITS_PATTERN
    pattern = steps[0]["pattern"].get("Regex")
    behavior = (steps[0].get("behavior"), steps[0].get("invert"))
    need(isinstance(pattern, str), "pre_tokenizer Split has no Regex")
    # what no match covers is taken away: where there is nothing such, both mean the same
    removed = behavior == ("Removed", True) and pattern in COMPLETE_PATTERNS
    good = behavior == ("Isolated", False) or removed
    need(good, f"pre_tokenizer Split has behavior and invert {behavior}")
    odd = f"pre_tokenizer Split: the regex {pattern} may mean something else to us"
    need(means_the_same(pattern), odd)
    return pattern


def lacks(missing: set[int]) -> str:
    """What is wrong with a vocabulary without these bytes; nothing: ""."""
    missing = sorted(missing - NO_UTF8)
    some = ", ".join(f"0x{byte:02x}" for byte in missing[:5])
    return f"it lacks {len(missing)} bytes ({some}): characters with them" if missing else ""


def check_words(whole: dict) -> None:
    """Words are found in a text as they stand; what is no word is never looked for."""
    words = []
    for token in whole.get("added_tokens") or []:
        text = token["content"]
        word = not token.get("special") and not is_control(text)
        strips = [flag for flag in ("single_word", "lstrip", "rstrip") if word and token.get(flag)]
        need(text and not strips, f"added token {text!r} has {strips}")
        if word:
            words.append(text)
    clash = [(a, b) for a in words for b in words if a != b and a in b]
    need(not clash, f"added tokens contain one another: {clash[:1]}")


def byte_ranks(vocab: dict, specials: dict, words: dict) -> dict:
    own = {text: i for text, i in vocab.items() if text not in specials and text not in words}
    strange = [text for text in own if not all(char in BYTE for char in text)]
    need(not strange, f"vocabulary entry {strange[:1]} is not byte-level")
    ranks = {bytes(BYTE[char] for char in text): i for text, i in own.items()}
    ids = [*ranks.values(), *specials.values(), *words.values()]
    good = len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) < 1 << 24
    need(good, "two tokens have one id, or it is absurd")
    return ranks


def check_merges(model: dict, ranks: dict) -> None:
    """Merging by rank is what the list of merges says."""
    vocab = {chars(token): i for token, i in ranks.items()}
    pairs, last = defaultdict(set), -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        known = left in vocab and right in vocab and left + right in vocab
        need(known, f"merge {merge} is not in the vocabulary")
        order = f"merge {merge} is out of order: merges and ids must have the same order"
        need(vocab[left + right] >= last, order)
        last = vocab[left + right]
        pairs[last].add((left, right))
    whole_pieces = bool(model.get("ignore_merges"))
    for token, i in ranks.items():
        pair = tuple(map(chars, parts(token, ranks))) if len(token) > 1 else ()
        if len(pair) == 2:
            text = f"merges make {chars(token)} of {sorted(pairs[i])}, its ranks make it of {pair}"
            need(pair in pairs[i], text)
        elif pair:
            text = f"no merges lead to {chars(token)}, and ignore_merges is false"
            need(whole_pieces, text)


def written(tokenizer) -> str:
    """tokenizer.json of a lumen.tokenizer.Tokenizer, the same text for the same tokenizer. The
    keys model.name and model.eot are ours; tokenizers ignores them."""
    ranks, specials, words = tokenizer.ranks, tokenizer.specials, tokenizer.words
    multi = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    pairs = [parts(token, ranks) for _, token in multi]
    added = sorted((i, text) for text, i in {**specials, **words}.items())
    # Added tokens stand in the vocabulary too: otherwise tokenizers numbers them anew, without
    # cl100k_base's gaps.
    vocab = {chars(token): i for token, i in ranks.items()} | {text: i for i, text in added}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "name": tokenizer.name,
        # tokens that only a whole piece can be
        "ignore_merges": any(len(pair) != 2 for pair in pairs),
    }
    if tokenizer.eot:
        model["eot"] = tokenizer.eot
    model["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    model["merges"] = [" ".join(map(chars, pair)) for pair in pairs if len(pair) == 2]
    whole = {"version": "1.0", "truncation": None, "padding": None}
    whole["added_tokens"] = [
        {"id": i, "content": text, **FLAGS, "special": text in specials} for i, text in added
    ]
    whole["normalizer"] = {"type": "NFC"} if tokenizer.nfc else None
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    whole |= {"post_processor": None, "decoder": BYTE_LEVEL, "model": model}
    return json.dumps(whole, ensure_ascii=False) + "\n"
