"""Text to token ids and back: byte-level BPE (Sennrich et al. 2016, in GPT-2's form).

train_bpe(texts, 8192) makes a vocabulary of our own: 256 bytes, merges, then <|endoftext|> <|pad|>
<|im_start|> <|im_end|>. load(spec) gives "bytes" (no merges, works for everything), tiktoken's
gpt2, cl100k_base, ... with exactly their ids, or a tokenizer.json, the only form on disk.
`tokenizers.Tokenizer.from_file` reads ours, with the same ids. Of other people's we read those
whose ids tiktoken can reproduce, and refuse the rest (E116). They have: a BPE model over all 256
bytes, its merges in the order of the ids; pre-tokenizer ByteLevel with its GPT-2 regex, or
Sequence[Split( Regex, Isolated), ByteLevel(use_regex=false)]; normalizer null or NFC; decoder
ByteLevel. Post-processors are ignored: they frame a text, and we encode ordinary text only.

Text never becomes a control token: "<|endoftext|>" in a document is encoded as the characters that
it is made of, and control ids enter a stream only as integers that our code puts there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import heapq
import json
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from operator import add
from pathlib import Path

import numpy as np
import regex
import tiktoken

from lumen.errors import UserError
from lumen.vocabulary import EOT, EOT_NAMES, SPECIALS, Vocabulary, mend_surrogates

# The split patterns as they were published. tiktoken's newer spellings (`\s++$`, `{1,3}+`) mean
# the same to tiktoken's regex engine but not to that of `tokenizers` (Oniguruma, where $ matches
# at every line end), so they are not used.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# with these every character of every text is in some match
COMPLETE_PATTERNS = (GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN)

# What of a foreign pattern means the same in both engines. Not among it: ^ $ \b \w \h {1,3}+
# [a&&b] (?<=...).
_SAFE_CLASS = r"\[\^?(?:\\[pP]\{\w+\}|\\[sSdrnt]|\\[^\w\s]|\w-\w|[^\\\[\]&~-])+\]"
_SAFE_PATTERN = regex.compile(
    rf"(?:{_SAFE_CLASS}|\\[pP]\{{\w+\}}|\\[sSdrnt]|\\[^\w\s]|\((?:\?(?:i:|:|!|=|>))?|\)"
    r"|\{\d+(?:,\d*)?\}(?!\+)|[?*+]\+?|[|.]|[^\\\[\](){}^$.|?*+])*+"
)

# A run of N in a genome, of = in a log: without a limit its merges double to tokens of any length,
# seldom met again. 128 bytes hold what words, indentation and ruled lines need: the longest piece
# in the standard library has 95.
LONGEST_TOKEN = 128
# characters: a longer one is trained on in pieces, else each merge would go over all of it
LONGEST_PIECE = 1000

_END = "<|endofprompt|>"
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, _END: 100276}
_FILES = {  # tiktoken's: pattern, special ids, sha256
    "r50k_base": (GPT2_PATTERN, {EOT: 50256},
                  "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "p50k_base": (GPT2_PATTERN, {EOT: 50256},
                  "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"),
    "cl100k_base": (CL100K_PATTERN, {EOT: 100257, **_FIM},
                    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k_base": (O200K_PATTERN, {EOT: 199999, _END: 200018},
                   "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}  # fmt: skip
# gpt2 and r50k_base are one vocabulary; r50k_base has it in one file, not two
NAMED = {"gpt2": "r50k_base"} | {name: name for name in _FILES}

# tokenizer.json writes a byte as a printable character: itself where it is one, else the next free
# one from U+0100 on
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_CHAR = {byte: chr(byte) for byte in _PLAIN}
_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in _CHAR)}
_BYTE = {char: byte for byte, char in _CHAR.items()}


def _chars(token: bytes) -> str:
    return "".join(_CHAR[byte] for byte in token)


class Tokenizer(Vocabulary):
    """ranks: bytes of a token -> its id, which is also the priority of its merge. specials:
    control tokens -> id. words: added tokens that stand for their text wherever it occurs
    (`<tool_call>` in Qwen's files); they are no control tokens. n_vocab is the largest id + 1,
    specials included."""

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
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=_engine_pattern(pattern),
            mergeable_ranks=ranks,
            special_tokens={**specials, **self.words},
        )
        self._words = set(self.words) - set(self.controls)

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids, 1-D, never one of `specials`. Lone surrogates are encoded as U+FFFD."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        try:
            ids = self._encoding.encode_to_numpy(
                text, allowed_special=self._words, disallowed_special=()
            )
        except UnicodeEncodeError:
            return self.encode(mend_surrogates(text))
        except ValueError:  # tiktoken's regex engine has no room for a run of some 100,000 blanks
            return self._encode_by_pieces(text)
        return ids.copy()  # tiktoken's array is read-only

    def _encode_by_pieces(self, text: str) -> np.ndarray:
        """The same ids, slower: cut by Python's regex engine, which knows no such limit."""
        whole = tiktoken.Encoding(
            "piece", pat_str="(?s:.+)", mergeable_ranks=self.ranks, special_tokens={}
        )
        find = regex.compile(f"{self.pattern}|(?:(?!{self.pattern})(?s:.))+").finditer
        ids, words = [], [regex.escape(word) for word in self._words]
        for part in regex.split(f"({'|'.join(words)})", text) if words else [text]:
            if part in self._words:
                ids.append(self.words[part])
            else:
                ids += [i for piece in find(part) for i in whole.encode_ordinary(piece.group())]
        return np.array(ids, np.uint32)

    def to_json(self) -> str:
        """tokenizer.json, the same text for the same tokenizer. The key model.name is ours;
        tokenizers ignores it."""
        multi = sorted((rank, token) for token, rank in self.ranks.items() if len(token) > 1)
        pairs = [_parts(token, self.ranks) for _, token in multi]
        added = sorted((i, text) for text, i in {**self.specials, **self.words}.items())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        # Added tokens stand in the vocabulary too: otherwise tokenizers numbers them anew, without
        # cl100k_base's gaps.
        vocab = {_chars(token): i for token, i in self.ranks.items()} | {
            text: i for i, text in added
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pattern},
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
            "name": self.name,
            # tokens that only a whole piece can be
            "ignore_merges": any(len(pair) != 2 for pair in pairs),
        }
        model["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
        model["merges"] = [" ".join(map(_chars, pair)) for pair in pairs if len(pair) == 2]
        whole = {"version": "1.0", "truncation": None, "padding": None}
        whole["added_tokens"] = [
            {"id": i, "content": t, **flags, "special": t in self.specials} for i, t in added
        ]
        whole["normalizer"] = {"type": "NFC"} if self.nfc else None
        whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        whole |= {"post_processor": None, "decoder": byte_level, "model": model}
        return json.dumps(whole, ensure_ascii=False) + "\n"

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both make the same ids of every text. Unlike sha256 it does not look at the
        name, which a file of another program takes from its folder, nor at how a file is
        spelled."""
        a, b = ((t.ranks, t.specials, t.words, t.pattern, t.nfc) for t in (self, other))
        return a == b


def _engine_pattern(pattern: str) -> str:
    """The same matches, written for tiktoken's engine: one group without lookahead runs as an
    automaton, and encoding is 1.4 times as fast. cl100k's possessive quantifiers are followed by
    nothing that could take a character back."""
    # tiktoken drops what no match covers, tokenizers keeps it as a piece of its own: so does this
    # last alternative
    cover = "" if pattern in COMPLETE_PATTERNS else f"|(?:(?!{pattern})(?s:.))+"
    if pattern == CL100K_PATTERN:
        pattern = pattern.replace("?+", "?").replace("++", "+")
    head, lookahead, rest = pattern.partition(r"|\s+(?!\S)")
    return f"(?:{head}){lookahead}{rest}{cover}"


def _parts(token: bytes, ranks: dict) -> list[bytes]:
    """What BPE makes of the token's bytes with the ranks below its own. Two parts are the pair
    whose merge it is; more mean that no merge ever leads to it. When each merge is this pair,
    merging by rank (tiktoken) and by a list of pairs (tokenizers) are the same: before the merge's
    turn, its bytes are in just this state wherever they stand."""
    own, n = ranks[token], len(token)
    ends = list(range(1, n + 1))  # of the part that starts there
    starts = list(range(-1, n))  # of the part that ends there
    heap = [
        (rank, i, i + 2) for i in range(n - 1) if (rank := ranks.get(token[i : i + 2], own)) < own
    ]
    heapq.heapify(heap)
    # the lowest rank, of equals the first: linear but for the heap, however long the token is
    while heap:
        _, i, end = heapq.heappop(heap)
        middle = ends[i]
        # one of its parts is in another part since
        if middle is None or middle >= n or ends[middle] != end:
            continue
        ends[i], ends[middle], starts[end] = end, None, i
        for a, b in ((starts[i], end), (i, ends[end] if end < n else n)):
            if a >= 0 and b - a > end - i and (rank := ranks.get(token[a:b], own)) < own:
                heapq.heappush(heap, (rank, a, b))
    parts, i = [], 0
    while i < n:
        parts.append(token[i : ends[i]])
        i = ends[i]
    return parts


def train_bpe(
    texts: Iterable[str], n_vocab: int, name: str | None = None, max_chars: int | None = None
) -> Tokenizer:
    """A vocabulary of n_vocab ids in all, specials included, from the texts (the first max_chars
    characters of each).

    The next merge is that of the most frequent pair, of equals the one with the smallest ids, so
    the result depends on the texts only, not on their order. Takes memory for the distinct pieces
    of the texts, not for the texts. Texts with too few different pairs give a smaller vocabulary.
    No token is longer than LONGEST_TOKEN bytes. E002: n_vocab below 256 + specials."""
    lowest = 256 + len(SPECIALS)
    if n_vocab < lowest:
        raise UserError(
            "E002",
            f"bpe:{n_vocab} is too small: 256 bytes and {len(SPECIALS)} specials make {lowest} ids",
        )
    find, pieces = regex.compile(CL100K_PATTERN).findall, Counter()
    for text in texts:
        pieces.update(find(text[:max_chars]))
    for piece in [piece for piece in pieces if len(piece) > LONGEST_PIECE]:
        times = pieces.pop(piece)
        for i in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[i : i + LONGEST_PIECE]] += times
    counts = list(pieces.values())
    # one character per token: chr(id)
    words = [piece.encode("utf-8", "replace").decode("latin-1") for piece in pieces]
    pair_count = Counter()
    where = defaultdict(set)  # words that hold, or once held, the pair
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_count[pair] += counts[i]
            where[pair].add(i)
    tokens = [bytes([byte]) for byte in range(256)]
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < n_vocab - len(SPECIALS):
        count, pair = heapq.heappop(heap)
        # counts fall and the heap is not told, so look again when the pair comes up
        if -count != pair_count[pair]:
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        token = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        if len(token) > LONGEST_TOKEN:
            continue
        new, touched = chr(len(tokens)), set()
        tokens.append(token)
        first, second = pair
        for i in where.pop(pair):
            between = words[i].split(pair)  # from left to right, without overlap: as BPE merges
            words[i], come = new.join(between), []
            # pairs change beside an occurrence only
            for n, (left, right) in enumerate(zip(between, between[1:])):
                if left:
                    pair_count[left[-1] + first] -= counts[i]
                    come.append(left[-1] + new)
                elif n:  # the occurrence before it ends here
                    pair_count[second + first] -= counts[i]
                    come.append(new + new)
                if right:
                    pair_count[second + right[0]] -= counts[i]
                    come.append(new + right[0])
            for made in come:
                pair_count[made] += counts[i]
                where[made].add(i)
            touched.update(come)
        del pair_count[pair]
        for come in touched:
            heapq.heappush(heap, (-pair_count[come], come))
    return _own(name or f"bpe:{n_vocab}", tokens)


def _own(name: str, tokens: list[bytes]) -> Tokenizer:
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(name, ranks, {special: len(tokens) + i for i, special in enumerate(SPECIALS)})


def load(spec: str) -> Tokenizer:
    """A tokenizer by name (bytes, or one of NAMED), or from a tokenizer.json, or a folder that has
    one.

    E115: the file is not there; E116: it is of a kind that we would read wrongly."""
    if spec == "bytes":
        return _own("bytes", [bytes([byte]) for byte in range(256)])
    if spec in NAMED:
        pattern, specials, sha256 = _FILES[NAMED[spec]]
        lines = [line.split() for line in _tiktoken_file(spec, sha256).splitlines()]
        return Tokenizer(
            spec, {base64.b64decode(token): int(rank) for token, rank in lines}, specials, pattern
        )
    path = os.path.join(spec, "tokenizer.json") if os.path.isdir(spec) else spec
    try:
        with open(path, encoding="utf-8") as file:
            return _from_json(json.load(file), path)
    except OSError as error:
        raise UserError(
            "E115", f"tokenizer {spec}: {error.strerror}; names: {', '.join(('bytes', *NAMED))}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, regex.error) as error:
        raise UserError("E116", f"{path} has not the form of a tokenizer.json: {error!r}") from None


def of_run(folder, sha256: str | None = None) -> Path | None:
    """The tokenizer.json in a run's folder for a step whose state.json names this sum. Where a run
    went on with another tokenizer, the one of its steps before is kept as tokenizer.SUM.json.
    None: the run has none."""
    files = [former(folder, sha256)] if sha256 else []
    return next((file for file in (*files, Path(folder) / "tokenizer.json") if file.exists()), None)


def former(folder, sha256: str) -> Path:
    return Path(folder) / f"tokenizer.{sha256[:12]}.json"


def _tiktoken_file(name: str, sha256: str) -> bytes:
    """tiktoken's file, from its cache folder or else the network, checked. Not by tiktoken's own
    loader: that one waits for the network without a limit and deletes a file whose sum is wrong.
    Never another vocabulary instead."""
    url = f"https://openaipublic.blob.core.windows.net/encodings/{NAMED[name]}.tiktoken"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    path, problem = os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()), "is not there"
    if os.path.exists(path):
        with open(path, "rb") as cached:
            data = cached.read()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        problem = "is damaged (another sha256)"
    try:
        import requests  # tiktoken's own dependency

        answer = requests.get(url, timeout=(4, 15))
        answer.raise_for_status()
        if hashlib.sha256(answer.content).hexdigest() != sha256:
            raise ValueError("what came has another sha256")
    except Exception as error:
        text = f"tokenizer {name}: {path} {problem}, and the network did not give it"
        text += f" ({type(error).__name__});\n  fetch {url} elsewhere and put it there"
        text += " under exactly that name, or set TIKTOKEN_CACHE_DIR to its folder"
        raise UserError("E115", text) from None
    with contextlib.suppress(OSError):  # keeping it only saves the next download
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.{os.getpid()}.tmp", "wb") as target:
            target.write(answer.content)
        os.replace(target.name, path)
    return answer.content


def _from_json(whole: dict, path: str) -> Tokenizer:
    def need(good: bool, part: str) -> None:
        if not good:
            raise UserError("E116", f"{path}: {part}")

    def kind(part):
        return part and part.get("type")

    model, normalizer, pre = whole["model"], whole.get("normalizer"), whole.get("pre_tokenizer")
    post, decoder = whole.get("post_processor"), whole.get("decoder")
    need(kind(model) == "BPE", f"model is {kind(model)}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(key), f"model.{key} is set")
    need(kind(normalizer) in (None, "NFC"), f"normalizer is {kind(normalizer)}, not null or NFC")
    need(kind(decoder) == "ByteLevel", f"decoder is {kind(decoder)}, not ByteLevel")
    for part in post["processors"] if kind(post) == "Sequence" else [post]:
        need(
            kind(part) in (None, "ByteLevel", "TemplateProcessing"),
            f"post_processor is {kind(part)}",
        )

    steps = pre["pretokenizers"] if kind(pre) == "Sequence" else [pre]
    kinds, byte_level = [kind(step) for step in steps], steps[-1] or {}
    need(
        kinds in (["ByteLevel"], ["Split", "ByteLevel"]),
        f"pre_tokenizer is {kinds}, not ByteLevel or Split, ByteLevel",
    )
    need(
        not byte_level.get("add_prefix_space", True), "pre_tokenizer ByteLevel has add_prefix_space"
    )
    use_regex, pattern = byte_level.get("use_regex", True), GPT2_PATTERN
    need(use_regex == (len(steps) == 1), f"pre_tokenizer ByteLevel has use_regex {use_regex}")
    if len(steps) == 2:
        pattern, behavior = (
            steps[0]["pattern"].get("Regex"),
            (steps[0].get("behavior"), steps[0].get("invert")),
        )
        need(
            behavior == ("Isolated", False),
            f"pre_tokenizer Split has behavior and invert {behavior}",
        )
        need(isinstance(pattern, str), "pre_tokenizer Split has no Regex")
        known = (
            pattern in COMPLETE_PATTERNS
            or _SAFE_PATTERN.fullmatch(pattern)
            and not regex.fullmatch(pattern, "")
        )
        need(known, f"pre_tokenizer Split: the regex {pattern} may mean something else to us")

    specials, words = {}, {}
    for token in whole.get("added_tokens") or []:
        text, special = token["content"], token.get("special")
        (specials if special else words)[text] = token["id"]
        strips = [
            flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag) and not special
        ]
        need(text and not strips, f"added token {text!r} has {strips}")
    need(
        any(name in specials for name in EOT_NAMES),
        f"no end of document: none of {EOT_NAMES} is a special token",
    )
    clash = [(a, b) for a in words for b in words if a != b and a in b]
    need(not clash, f"added tokens contain one another: {clash[:1]}")

    vocab = {
        text: i for text, i in model["vocab"].items() if text not in specials and text not in words
    }
    strange = [text for text in vocab if not all(char in _BYTE for char in text)]
    need(not strange, f"vocabulary entry {strange[:1]} is not byte-level")
    ranks = {bytes(_BYTE[char] for char in text): i for text, i in vocab.items()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    need(not missing, f"the vocabulary lacks the bytes {missing[:5]}")
    ids = [*ranks.values(), *specials.values(), *words.values()]
    need(
        len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) < 1 << 24,
        "two tokens have one id, or it is absurd",
    )

    pairs, last = defaultdict(set), -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        need(
            left in vocab and right in vocab and left + right in vocab,
            f"merge {merge} is not in the vocabulary",
        )
        need(
            vocab[left + right] >= last,
            f"merge {merge} is out of order: merges and ids must have the same order",
        )
        last = vocab[left + right]
        pairs[last].add((left, right))
    for token, i in ranks.items():
        parts = tuple(map(_chars, _parts(token, ranks))) if len(token) > 1 else ()
        if len(parts) == 2:
            need(
                parts in pairs[i],
                f"merges make {_chars(token)} of {sorted(pairs[i])}, its ranks make it of {parts}",
            )
        elif parts:
            need(
                bool(model.get("ignore_merges")),
                f"no merges lead to {_chars(token)}, and ignore_merges is false",
            )
    name = model.get("name") or os.path.basename(os.path.dirname(os.path.abspath(path)))
    return Tokenizer(str(name), ranks, specials, pattern, words, nfc=bool(normalizer))
