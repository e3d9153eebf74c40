"""tokenizer.py: ids equal those of the `tokenizers` library, text never becomes a control token,
nothing is lost."""

import base64
import hashlib
import json

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import bpe as B
from lumen import tokenizer as T
from lumen import tokenizer_files as F
from lumen.errors import UserError
from lumen.foreign import Foreign
from lumen.patterns import CL100K_PATTERN, GPT2_PATTERN
from lumen.synthetic import synthetic_document
from lumen.vocabulary import mend_surrogates

hf = pytest.importorskip("tokenizers")

CODE = "def f(a, b):\n    if (a[0] == 10 and ((b)) > 255):\n        return self._x(a)\n\n\n    don't(we'll)\t# ...\n"
CORPUS = [synthetic_document(0, n) for n in range(150)] + [CODE] * 40
BYTES = T.load("bytes")
WEIRD = [
    "",
    " ",
    "\n\n  \n\t x  \n",
    "  leading and trailing  ",
    "naïve café Ünïcödé ſ ß İ ı",
    "e\u0301 \u212b 한국어 日本語 العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 \u200d\ufeff\u00a0\u2028\u2029\x85\x0b\x0c\x1c",
    "\x00\x01\x7f\x80\x9f",
    "12345678 ١٢٣٤ ½ Ⅷ 1,234.56",
    "I'm you'LL we'Ve 'S ''t don't",
    "a" * 500 + "^" * 300 + "\r\n" * 50 + " " * 200 + "_",
    "<|endoftext|><|im_start|>system\nhi<|im_end|><|pad|>",
    "<|endoftext|",
    "((a((b))(a, (((a[0][[a    (a\n\n    (b\r\n.(a 'a ''a '_a   'a\t(a",
    "\U0010ffff\U000e0001\u0378",
]
TEXTS = st.text() | st.lists(
    st.sampled_from(["<|endoftext|>", "<|im_start|>", " ", "\n", "a", "'ll", "9", "é"])
).map("".join)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def bpe():
    return T.train_bpe(CORPUS, 700)


def reference(path):
    """The tokenizers library on the same file, told to take control tokens in the text for text."""
    made = hf.Tokenizer.from_file(str(path))
    made.encode_special_tokens = True
    return lambda text: made.encode(text, add_special_tokens=False).ids


def foreign(path, pre=None, specials=("<|endoftext|>",), normalizer=None, words=(), **model):
    """A tokenizer.json as other people make them: trained and written by the library."""
    made = hf.Tokenizer(hf.models.BPE(**model))
    made.pre_tokenizer = pre or hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.normalizer = hf.decoders.ByteLevel(), normalizer
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS + WEIRD, trainer)
    made.add_tokens([hf.AddedToken(word, normalized=False) for word in words])
    made.save(str(path))
    return path


def split(pattern):
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"), byte_level]
    )


# --- our own vocabularies
# ---------------------------------------------------------------------------------------------


def test_training_is_exact_and_independent_of_order(bpe):
    assert bpe.n_vocab == 700 and bpe.name == "bpe:700"
    assert bpe.specials == {
        "<|endoftext|>": 696,
        "<|pad|>": 697,
        "<|im_start|>": 698,
        "<|im_end|>": 699,
    }
    assert (bpe.eot_id, bpe.pad_id, bpe.im_start_id, bpe.im_end_id) == (696, 697, 698, 699)
    assert T.train_bpe(CORPUS[::-1], 700).to_json() == bpe.to_json()
    assert T.train_bpe(CORPUS, 600).to_json() != bpe.to_json()


def test_ordinary_text_gives_the_vocabulary_that_it_gave_before(bpe):
    """Data prepared earlier hold on to this sum. Do not adapt this test."""
    assert bpe.sha256 == "f747504dfe12680300b7d1e8d5c438e056f50c32626753e498113e7f373bceb2"


def parts_slowly(token, ranks):
    """What parts() says, by looking at all pairs again after each merge."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=20), max_size=30, unique=True))
def test_parts_of_a_token(tokens):
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    for token in tokens:
        assert B.parts(token.encode(), ranks) == parts_slowly(token.encode(), ranks)


def test_long_runs_are_trained_on_in_pieces(monkeypatch):
    """The vocabulary of a text whose pieces are longer than the limit is that of the text cut
    there."""
    monkeypatch.setattr(B, "LONGEST_PIECE", 10)
    monkeypatch.setattr(B, "LONGEST_TOKEN", 5)
    cut = [
        text[i : i + 10] for text in ("ACGTTACGGA" * 20, "x" * 97) for i in range(0, len(text), 10)
    ]
    made = T.train_bpe(["ACGTTACGGA" * 20, "x" * 97], 300)
    assert made.to_json() == T.train_bpe(cut, 300).to_json() and max(map(len, made.ranks)) == 5


def test_encoding_by_pieces_gives_the_same_ids(bpe, tmp_path):
    """What stands in where tiktoken's regex engine gives up on a run of blanks."""
    words = T.load(
        str(
            foreign(
                tmp_path / "tokenizer.json", pre=split(LLAMA3), words=("<tool_call>", "<think>")
            )
        )
    )
    for made in (bpe, words, BYTES):
        for text in [*WEIRD[1:], "a <tool_call>{}<think> </tool_call><tool_call"]:
            assert made._encode_by_pieces(text).tolist() == made.encode(text).tolist(), text
    text = "x" + " " * 600_000 + "\n" + " " * 600_000 + "y"
    assert bpe.decode(bpe.encode(text)) == text


def test_training_against_a_slow_one():
    """The first merges, counted from scratch each time: most frequent pair, then the smallest."""
    words = [
        list(piece.encode())
        for text in CORPUS[:20]
        for piece in regex.findall(CL100K_PATTERN, text)
    ]
    made = T.train_bpe(CORPUS[:20], 256 + 60 + 4)
    tokens = sorted(made.ranks, key=made.ranks.get)
    for new in range(256, 316):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        assert tokens[new] == tokens[a] + tokens[b]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [new]
                i += 1


def test_small_texts_and_small_vocabularies():
    assert (
        T.train_bpe(["abab"], 1000).n_vocab == 256 + 2 + 4
    )  # ab, abab: there is nothing more to merge
    assert T.train_bpe([], 300).n_vocab == 260
    with pytest.raises(UserError, match="E002"):
        T.train_bpe(CORPUS, 259)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_round_trip_and_no_control_ids(bpe, text):
    for made in (bpe, BYTES):
        ids = made.encode(text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert made.decode(ids) == text
        assert not set(ids.tolist()) & set(made.specials.values())
        assert made.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec=None, categories=None)))
def test_surrogates_do_not_crash(bpe, text):
    mended = mend_surrogates(text)
    assert bpe.decode(bpe.encode(text)) == mended
    assert (
        bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
        and bpe.decode(bpe.encode("\ud83d\ude00")) == "😀"
    )


def test_decoding(bpe):
    assert bpe.decode([bpe.eot_id, *bpe.encode("x")]) == "<|endoftext|>x"
    assert bpe.decode([0xC3]) == "\ufffd" and bpe.decode_bytes([0xC3, 0xA9]) == "é".encode()
    assert bpe.decode(np.array([], dtype=np.int64)) == ""
    lengths = bpe.token_bytes()
    assert (
        lengths.shape == (700,)
        and lengths.dtype == np.uint16
        and not lengths[696:].any()
        and lengths[:696].all()
    )
    for wrong in ([700], [-1]):
        with pytest.raises(UserError, match="E113"):
            bpe.decode(wrong)


def test_file_round_trip(bpe, tmp_path):
    for made in (bpe, BYTES):
        made.save(tmp_path / "tokenizer.json")
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            back = T.load(str(path))
            assert (back.to_json(), back.name, back.sha256) == (
                made.to_json(),
                made.name,
                made.sha256,
            )


@pytest.fixture(scope="module")
def references(bpe, tmp_path_factory):
    pairs = []
    for made in (bpe, BYTES):
        path = tmp_path_factory.mktemp("own") / "tokenizer.json"
        made.save(path)
        ids = hf.Tokenizer.from_file(str(path))
        assert {name: ids.token_to_id(name) for name in made.specials} == made.specials
        pairs.append((made, reference(path)))
    return pairs


@settings(max_examples=250, deadline=None)
@given(text=TEXTS)
def test_ids_equal_tokenizers(references, text):
    for made, theirs in references:
        assert theirs(text) == made.encode(text).tolist()


def test_ids_equal_tokenizers_on_known_texts(references):
    for made, theirs in references:
        assert all(theirs(text) == made.encode(text).tolist() for text in WEIRD + CORPUS[:30])


# --- other people's files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "nfc", "words", "gaps"])
def test_imported_ids_equal_tokenizers(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    given_ = {
        "gpt2": {},
        "llama3": {"pre": split(LLAMA3), "specials": ("<s>", "</s>", "<unk>")},
        "nfc": {"pre": split(GPT2_PATTERN), "normalizer": hf.normalizers.NFC()},
        "words": {"pre": split(LLAMA3), "words": ("<tool_call>", "<think>")},
        "gaps": {
            "pre": split(r"\p{L}+|\p{N}")
        },  # covers only part of a text: the rest is kept in pieces
    }[kind]
    foreign(path, **given_)
    made, theirs = T.load(str(path)), reference(path)
    texts = (
        WEIRD + CORPUS[:30] + ["a <tool_call>{}<think> </tool_call><tool_call", "<s>hi</s><unk>"]
    )
    for text in texts:
        assert theirs(text) == made.encode(text).tolist(), text
        if kind != "nfc":
            assert made.decode(made.encode(text)) == text
    made.save(
        tmp_path / "ours.json"
    )  # what a dataset gets: again the same ids, for us and for the library
    again, theirs = T.load(str(tmp_path / "ours.json")), reference(tmp_path / "ours.json")
    for text in texts:
        assert again.encode(text).tolist() == theirs(text) == made.encode(text).tolist(), text
    assert made.n_vocab == again.n_vocab and made.specials == again.specials
    if kind == "words":
        word = made.words["<think>"]
        assert word in made.encode("<think>") and made.token_bytes()[word] == len("<think>")


def test_whole_pieces_that_no_merge_makes(tmp_path):
    """ignore_merges (Llama 3): such a token is used for a whole piece only, by us as by the
    library."""
    path = foreign(tmp_path / "tokenizer.json")
    whole = json.loads(path.read_text())
    whole["model"]["vocab"]["Zyzzyva"] = 500
    path.write_text(json.dumps(whole))
    assert "no merges lead to Zyzzyva" in T.load(str(path)).reason
    whole["model"]["ignore_merges"] = True
    path.write_text(json.dumps(whole))
    made, theirs = T.load(str(path)), reference(path)
    assert made.encode("Zyzzyva").tolist() == theirs("Zyzzyva") == [500]
    assert made.encode(" Zyzzyva Zyzzyvas").tolist() == theirs(" Zyzzyva Zyzzyvas")
    assert T.load(str(path)).to_json() == made.to_json()


def without_a_byte(whole):
    model = whole["model"]
    model["unk_token"] = "!"
    model["vocab"].pop("~")
    model["merges"] = [pair for pair in model["merges"] if "~" not in "".join(pair)]


def word(text, i, **flags):
    false = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": text, **false, **flags}


def swap_merges(whole):
    merges = whole["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def other_pair(whole):
    """A token made of another pair than its ranks say: 'abc' of a + bc although ab comes first."""
    model, n = whole["model"], max(whole["model"]["vocab"].values())
    model["vocab"] |= {"QX": n + 1, "XZ": n + 2, "QXZ": n + 3}
    model["merges"] += [["Q", "X"], ["X", "Z"], ["Q", "XZ"]]


BREAKS = {
    "model is WordPiece": lambda w: w["model"].update(type="WordPiece"),
    "dropout": lambda w: w["model"].update(dropout=0.1),
    "continuing_subword_prefix": lambda w: w["model"].update(continuing_subword_prefix="##"),
    "end_of_word_suffix": lambda w: w["model"].update(end_of_word_suffix="</w>"),
    "normalizer is Lowercase": lambda w: w.update(normalizer={"type": "Lowercase"}),
    "normalizer is Sequence": lambda w: w.update(
        normalizer={"type": "Sequence", "normalizers": []}
    ),
    "decoder is None": lambda w: w.update(decoder=None),
    "decoder is Metaspace": lambda w: w.update(decoder={"type": "Metaspace"}),
    "post_processor is BertProcessing": lambda w: w.update(
        post_processor={"type": "BertProcessing", "sep": ["!", 1], "cls": ["!", 1]}
    ),
    "add_prefix_space": lambda w: w["pre_tokenizer"].update(add_prefix_space=True),
    "use_regex False": lambda w: w["pre_tokenizer"].update(use_regex=False),
    r"pre_tokenizer is \[None\]": lambda w: w.update(pre_tokenizer=None),
    "'Punctuation', 'ByteLevel'": lambda w: w.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, w["pre_tokenizer"]],
        }
    ),
    "behavior": lambda w: with_split(w, "x+", behavior="Removed"),
    "'Removed', True": lambda w: with_split(w, r"\p{L}+", behavior="Removed", invert=True),
    "no Regex": lambda w: with_split(w, None, pattern={"String": " "}),
    r"the regex \\s\+\$": lambda w: with_split(
        w, r"\s+$|\S+"
    ),  # $ is every line's end in Oniguruma
    r"the regex \\w": lambda w: with_split(w, r"\w+"),
    r"the regex \\p\{N\}\{1,3\}\+": lambda w: with_split(w, r"\p{N}{1,3}+"),
    r"the regex x\*": lambda w: with_split(w, r"x*"),
    "has not the form": lambda w: with_split(w, r"(x"),
    "no end of document": lambda w: w.update(added_tokens=[]),
    "lstrip": lambda w: w["added_tokens"].append(word("<x>", 900, lstrip=True)),
    "contain one another": lambda w: w["added_tokens"].extend(
        word(text, 900 + i) for i, text in enumerate(("<x>", "<x>y"))
    ),
    "Digits keeps numbers": lambda w: w.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": False}, w["pre_tokenizer"]],
        }
    ),
    r"lacks 1 bytes \(0x7e\).*become !": without_a_byte,
    "not byte-level": lambda w: w["model"]["vocab"].update({"▁the": 900}),
    "two tokens have one id": lambda w: w["model"]["vocab"].update({"!": 300}),
    "is not in the vocabulary": lambda w: w["model"]["merges"].append(["q", "!q"]),
    "out of order": swap_merges,
    "its ranks make it of": other_pair,
    r"not the form of a tokenizer.json: KeyError\('model'\)": lambda w: w.pop("model"),
}


REFUSED = (
    "model is WordPiece",
    "decoder is Metaspace",
    "continuing_subword_prefix",
    "has not the form",
    "no end of document",
    "two tokens have one id",
    "is not in the vocabulary",
    r"not the form of a tokenizer.json: KeyError\('model'\)",
)


def with_split(whole, cut, behavior="Isolated", pattern=None, invert=False):
    whole["pre_tokenizer"] |= {"use_regex": False}
    step = {
        "type": "Split",
        "pattern": pattern or {"Regex": cut},
        "behavior": behavior,
        "invert": invert,
    }
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, whole["pre_tokenizer"]]}


@pytest.fixture(scope="module")
def plain_json(tmp_path_factory):
    return foreign(tmp_path_factory.mktemp("plain") / "tokenizer.json").read_text()


@pytest.mark.parametrize("part", BREAKS)
def test_what_tiktoken_would_read_wrongly(part, plain_json, tmp_path):
    """It is run by the tokenizers library, or refused: never by tiktoken."""
    whole = json.loads(plain_json)
    BREAKS[part](whole)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(whole))
    if part in REFUSED:
        with pytest.raises(UserError, match=f"(?s)E116.*{part}"):
            T.load(str(path))
        return
    made = T.load(str(path))
    assert isinstance(made, Foreign) and regex.search(part, made.reason)
    whole["model"]["dropout"] = None  # which would make the library's ids random
    path.write_text(json.dumps(whole))
    theirs = reference(path)
    for text in WEIRD[:-4] + CORPUS[:5]:
        assert made.encode(text).tolist() == theirs(text), text


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="E115.*No such file"):
        T.load(str(tmp_path / "none.json"))
    for text in ("{", "[]", "3", "null", '{"model": 3}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="E116"):
            T.load(str(tmp_path))


# --- tiktoken's encodings
# ---------------------------------------------------------------------------------------------


def small_tiktoken_file(monkeypatch, folder):
    """A stand-in for cl100k_base's file, which tests cannot download: the ranks of a small
    vocabulary."""
    made = T.train_bpe(CORPUS, 400)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in made.ranks.items()]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    sha256 = hashlib.sha256(b"".join(lines)).hexdigest()
    monkeypatch.setitem(F.FILES, "cl100k_base", (*F.FILES["cl100k_base"][:2], sha256))
    return b"".join(lines), folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4", made


def test_named_encoding_from_the_cache(monkeypatch, tmp_path):
    data, path, made = small_tiktoken_file(monkeypatch, tmp_path)
    path.write_bytes(data)
    named = T.load("cl100k_base")
    assert named.ranks == made.ranks and named.eot_id == 100257 and named.n_vocab == 100277
    assert (named.pad_id, named.im_start_id, named.im_end_id) == (None, None, None)
    named.save(tmp_path / "tokenizer.json")  # gaps in the ids survive, in the library too
    ids = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert {name: ids.token_to_id(name) for name in named.specials} == named.specials
    assert T.load(str(tmp_path)).specials == named.specials
    assert named.decode([100256]) == "" and named.decode([100257]) == "<|endoftext|>"
    theirs = reference(tmp_path / "tokenizer.json")
    assert all(theirs(text) == named.encode(text).tolist() for text in WEIRD)


@pytest.mark.parametrize("name, sha1", [
    ("gpt2", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"),  # r50k_base's one file, not vocab.bpe and encoder.json
    ("r50k_base", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"),
    ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
])  # fmt: skip
def test_without_network(name, sha1, monkeypatch, tmp_path):
    calls = []

    def no_network(url, timeout=None, **_):
        calls.append(timeout)
        raise OSError("no network")

    monkeypatch.setattr("requests.get", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        T.load(name)
    assert caught.value.code == "E115" and str(tmp_path / sha1) in caught.value.text
    assert calls and max(calls[0]) <= 20  # it never waits without a limit
    (tmp_path / sha1).write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match="E115.*damaged"):
        T.load(name)
    assert (tmp_path / sha1).exists()  # it is the user's file


def test_download_is_checked_and_kept(monkeypatch, tmp_path):
    data, path, made = small_tiktoken_file(monkeypatch, tmp_path)

    class Answer:
        content = b"something else"

        def raise_for_status(self):
            pass

    monkeypatch.setattr("requests.get", lambda url, timeout: Answer)
    Answer.raise_for_status = lambda: None
    with pytest.raises(UserError, match="E115"):
        T.load("cl100k_base")
    assert not path.exists()
    Answer.content = data
    assert T.load("cl100k_base").ranks == made.ranks and path.read_bytes() == data


@pytest.mark.parametrize(
    "spec, said",
    [
        ("bpe8192", "did you mean bpe:8192? names: "),
        ("bpe-4096", "did you mean bpe:4096?"),
        ("bpe", "did you mean bpe:8192?"),
        ("byte", "did you mean bytes?"),
        ("o200k", "did you mean o200k_base?"),
        ("mine.json", "No such file or directory; names: bytes, gpt2, "),
    ],
)
def test_a_tokenizer_that_is_not_there_names_what_may_be_meant(spec, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        T.load(spec)
    assert said in error.value.text and "hf:ORG/NAME, and bpe:N in prepare" in error.value.text
