"""foreign.py: every kind of public tokenizer makes the ids that transformers makes of it, and text
never becomes a control token."""

import json
import pickle
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumen import tokenizer as T
from lumen.errors import UserError
from lumen.foreign import Foreign
from lumen.tokenizer import Tokenizer
from lumen.vocabulary import mend_surrogates

hf = pytest.importorskip("tokenizers")
import tokenizer_kinds as K  # noqa: E402

LOSSLESS = ("llama3", "olmo2", "deepseek", "gemma", "llama2")
HOSTILE = [
    "",
    " ",
    "\x00",
    "\n\n",
    "  a  b ",
    "a\x00\x01\x0eb",
    "🏳️‍🌈e\u0301\u212b",
    "<0x0A>",
    "▁▁a",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder as one downloads it."""
    found = {}
    for kind, make in K.KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        text = json.dumps(make(), ensure_ascii=False, indent=2)
        (found[kind] / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (found[kind] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def made(folders):
    return {kind: T.load(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(params=K.KINDS)
def one(request, made):
    return made[request.param]


def test_who_runs_what(made):
    for kind, tokenizer in made.items():
        assert isinstance(tokenizer, Tokenizer if kind in K.FAST else Foreign), kind


def compare_with_transformers(made, folders, n):
    transformers = pytest.importorskip("transformers")
    texts = [*HOSTILE, *K.texts(n)]
    for kind, folder in folders.items():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        for text, want in zip(texts, ids):
            got = made[kind].encode(text)
            assert got.dtype == np.uint32 and got.tolist() == want, (kind, text)
            if kind not in K.FAST and kind != "bert":  # whose library mends blanks before commas
                assert made[kind].decode(got) == theirs.decode(
                    want, clean_up_tokenization_spaces=False
                )
            if kind in LOSSLESS and "▁" not in text:
                assert made[kind].decode(got) == text, (kind, text)


def test_ids_equal_transformers(made, folders):
    compare_with_transformers(made, folders, 200)


@pytest.mark.nightly
def test_ids_equal_transformers_on_many_texts(made, folders):
    compare_with_transformers(made, folders, 5000)


@pytest.mark.nightly
def test_every_character_on_tiktoken_as_in_the_library(made, folders):
    """Each has its own tables of Unicode: every character that is assigned in Python's."""
    for kind in K.FAST:
        theirs = hf.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        for code in range(0, 0x110000, 64):
            chars = map(chr, range(code, code + 64))
            chars = [c for c in chars if unicodedata.category(c) not in ("Cn", "Cs")]
            text = "".join(f"a{c}b {c}1{c} {c}\n {c}  {c}" for c in chars)
            assert (
                made[kind].encode(text).tolist()
                == theirs.encode(text, add_special_tokens=False).ids
            )


def injected(made):
    """Texts with control tokens, whole, cut and run together, among ordinary ones."""
    names = sorted({name for tokenizer in made.values() for name in tokenizer.controls})
    names += [name[:-1] for name in names[::7]] + [name[1:] for name in names[::7]]
    return st.lists(st.sampled_from([*names, " ", "a", "\n", "▁", "7"]) | st.text(max_size=5)).map(
        "".join
    )


def no_text_becomes_a_control_token(made, text):
    for kind, tokenizer in made.items():
        ids = tokenizer.encode(text).tolist()
        assert not set(ids) & set(tokenizer.controls.values()), (kind, text)
        if kind in LOSSLESS and "▁" not in text:
            assert tokenizer.decode(ids) == text, (kind, text)


def test_no_name_of_a_control_token_becomes_one(made):
    for tokenizer in made.values():
        for name in tokenizer.controls:
            for text in (name, f"a{name}b", f" {name} ", f"{name}{name}"):
                no_text_becomes_a_control_token({"": tokenizer}, text)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_control_token(made, data):
    no_text_becomes_a_control_token(made, data.draw(injected(made)))


@pytest.mark.nightly
@settings(max_examples=3000, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_control_token_nightly(made, data):
    no_text_becomes_a_control_token(made, data.draw(injected(made)))


def test_a_vocabulary_that_spells_its_control_tokens(folders, tmp_path):
    """BPE whose merges make <|im_end|>, or that takes it whole (ignore_merges): neither for text."""
    for ignore in (False, True):
        whole = json.loads((folders["smollm2"] / "tokenizer.json").read_text(encoding="utf-8"))
        vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        whole["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
        whole["model"]["ignore_merges"] = ignore
        for end in range(2, len("<|im_end|>")):
            vocab.setdefault("<|im_end|>"[:end], len(vocab))
        if not ignore:
            at = [["<|im_end|>"[:end], "<|im_end|>"[end]] for end in range(1, len("<|im_end|>"))]
            whole["model"]["merges"] = at + [pair for pair in merges if pair not in at]
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        theirs.encode_special_tokens = True
        assert theirs.encode("<|im_end|>").ids == [2]  # the library alone is not enough
        tokenizer = T.load(str(tmp_path))
        ids = tokenizer.encode("a<|im_end|>b")
        assert 2 not in ids and tokenizer.decode(ids) == "a<|im_end|>b"
        assert tokenizer.control("<|im_end|>") == tokenizer.im_end_id == 2


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(codec=None, categories=None)))
@example("a\ud800b")
@example("\ud83d\ude00")
def test_surrogates(made, text):
    for tokenizer in made.values():
        assert tokenizer.encode(text).tolist() == tokenizer.encode(mend_surrogates(text)).tolist()


LONG = {
    "200,000 blanks": " " * 200_000,
    "without a blank": "xyz" * 340_000,
    "lines": "\n" * 200_000,
    "signs": "=-" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_take_bounded_time(made, name):
    text = LONG[name]
    for kind, tokenizer in made.items():
        began = time.process_time()
        ids = tokenizer.encode(text)
        assert time.process_time() - began < 5, kind
        if kind in LOSSLESS:
            assert tokenizer.decode(ids) == text


def test_bytes_of_ids(made):
    """Summed over the ids of a text they are its bytes, but for what caveats() says."""
    texts = [*HOSTILE, *K.texts(40)]
    for kind, tokenizer in made.items():
        lengths = tokenizer.token_bytes()
        assert (
            lengths.shape == (tokenizer.n_vocab,)
            and not lengths[list(tokenizer.controls.values())].any()
        )
        before = any("blank before" in caveat for caveat in tokenizer.caveats())
        for text in texts:
            ids = tokenizer.encode(text)
            size = len(text.encode())
            assert lengths[ids].sum() <= len(tokenizer.decode_bytes(ids))
            if kind in LOSSLESS and "▁" not in text:
                assert lengths[ids].sum() == size + (before and size > 0), (kind, text)
    gemma = made["gemma"]
    assert gemma.token_bytes()[gemma.control("<eos>") + 6 : 262].tolist()[:1] == [1]  # <0x00>


def test_control_tokens_and_spare_ids(made):
    assert {kind: t.decode([t.eot_id]) for kind, t in made.items()} == {
        "smollm2": "<|endoftext|>",
        "llama3": "<|end_of_text|>",  # not <|eot_id|>
        "olmo2": "<|endoftext|>",
        "qwen2": "<|endoftext|>",
        "neox": "<|endoftext|>",
        "deepseek": "<｜end▁of▁sentence｜>",
        "gemma": "<eos>",
        "llama2": "</s>",
        "metaspace": "</s>",
        "unigram": "</s>",
        "bert": "[SEP]",
    }
    for tokenizer in made.values():
        for name, i in tokenizer.controls.items():
            assert tokenizer.control(name) == i and tokenizer.decode([i]) == name
        assert tokenizer.control("no such token") is None and tokenizer.control("a") is None
    assert [made["llama3"].decode([i]) for i in made["llama3"].spare] == K.RESERVED
    assert [made["gemma"].decode([i]) for i in made["gemma"].spare] == ["<unused0>", "<unused1>"]
    assert made["smollm2"].im_start_id == 1 and made["bert"].im_start_id is None
    assert made["deepseek"].control("<｜User｜>") and not made["deepseek"].control("<think>")
    assert made["qwen2"].control("<|fim_prefix|>") and not made["qwen2"].control("<tool_call>")
    assert made["qwen2"].words["<tool_call>"] in made["qwen2"].encode("<tool_call>")
    assert made["gemma"].pad_id == 0 and made["llama2"].pad_id is None
    assert made["bert"].unk_id in made["bert"].encode("a \u0b83") and made["bert"].unk_id == 1


def test_what_is_not_exact_is_said(made):
    said = {kind: "; ".join(tokenizer.caveats()) for kind, tokenizer in made.items()}
    assert (
        "lacks 3 bytes (0x00, 0x01, 0x0e)" in said["smollm2"] and "are dropped" in said["smollm2"]
    )
    assert "become [UNK]" in said["bert"] and "BertNormalizer" in said["bert"]
    assert "NFC" in said["neox"] and "blank before" in said["llama2"]
    assert [kind for kind in said if not said[kind]] == ["llama3", "olmo2", "deepseek", "gemma"]


def test_the_file_stays_as_it_is(one, tmp_path):
    """Saved and read again: the same bytes, sum and ids; and so through pickle, into a worker."""
    one.save(tmp_path / "tokenizer.json")
    for again in (T.load(str(tmp_path)), pickle.loads(pickle.dumps(one))):
        assert again.to_json() == one.to_json() and again.sha256 == one.sha256
        assert (again.n_vocab, again.eot_id, again.controls) == (
            one.n_vocab,
            one.eot_id,
            one.controls,
        )
        assert again.same_ids(one) and one.same_ids(again)
        text = "def f(x):\n    return '<|endoftext|></s>'"
        assert again.encode(text).tolist() == one.encode(text).tolist()


def test_the_file_of_a_foreign_kind_is_kept_byte_for_byte(made, folders, tmp_path):
    made["gemma"].save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        folders["gemma"] / "tokenizer.json"
    ).read_bytes()


def test_same_ids(made, tmp_path):
    """Files spelled otherwise are the same tokenizer; another merge, normalizer or kind is not."""
    for kind in ("llama2", "unigram", "bert"):
        whole = json.loads(made[kind].to_json())
        whole["post_processor"] = whole["truncation"] = None
        whole["model"]["name"] = "another"
        if kind == "llama2":
            whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        assert made[kind].same_ids(T.load(str(tmp_path)))
        whole["normalizer"] = None
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        assert not made[kind].same_ids(T.load(str(tmp_path)))
    assert not any(made["llama3"].same_ids(t) for kind, t in made.items() if kind != "llama3")
    assert not any(made["gemma"].same_ids(t) for kind, t in made.items() if kind != "gemma")


def test_what_a_file_does_around_a_text_is_not_done(folders, tmp_path):
    """Truncation, padding, a token in front, dropout: not in data."""
    made = hf.Tokenizer.from_file(str(folders["llama2"] / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    whole["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    text = "def f(x): return x " * 9
    want = T.load(str(folders["llama2"])).encode(text).tolist()
    assert T.load(str(tmp_path)).encode(text).tolist() == want and len(want) > 20


# --- the end of a document


def named(folders, tmp_path, name="<|over|>", kind="llama2"):
    """A tokenizer whose end of document has a name that nobody knows."""
    text = (folders[kind] / "tokenizer.json").read_text(encoding="utf-8")
    old = {"llama2": "</s>", "qwen2": "<|endoftext|>"}[kind]
    (tmp_path / "tokenizer.json").write_text(
        text.replace(f'"{old}"', f'"{name}"'), encoding="utf-8"
    )


@pytest.mark.parametrize("kind", ["llama2", "qwen2"])
@pytest.mark.parametrize("spelled", ["<|over|>", {"content": "<|over|>", "lstrip": False}])
def test_the_end_of_a_document_may_be_named_beside_the_file(folders, tmp_path, spelled, kind):
    named(folders, tmp_path, kind=kind)
    with pytest.raises(
        UserError, match="E116.*no end of document.*tokenizer_config.json"
    ) as caught:
        T.load(str(tmp_path))
    assert "</s>" in caught.value.text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": spelled}))
    tokenizer = T.load(str(tmp_path))
    assert tokenizer.decode([tokenizer.eot_id]) == "<|over|>"
    (tmp_path / "data").mkdir()  # a folder of data has the one file only
    tokenizer.save(tmp_path / "data" / "tokenizer.json")
    again = T.load(str(tmp_path / "data"))
    assert again.eot_id == tokenizer.eot_id and again.sha256 == tokenizer.sha256
    assert again.same_ids(tokenizer)
    assert again.encode("a<|over|>b").tolist() == tokenizer.encode("a<|over|>b").tolist()
    hf.Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))  # it reads what we write


def test_the_end_of_a_turn_is_no_end_of_a_document(folders, tmp_path):
    named(folders, tmp_path, "<|eot_id|>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    with pytest.raises(UserError, match="E116.*<|eot_id|> ends a turn"):
        T.load(str(tmp_path))
    for rubbish in ("[", "3", '{"eos_token": 3}', '{"eos_token": "no such token"}'):
        (tmp_path / "special_tokens_map.json").write_text(rubbish)
        with pytest.raises(UserError, match="E116.*no end of document"):
            T.load(str(tmp_path))


def test_unknown_characters_never_end_a_document(folders, tmp_path):
    """A file whose unk_token is its end of document (CodeGen): BPE does without, others are
    refused."""
    whole = json.loads((folders["smollm2"] / "tokenizer.json").read_text(encoding="utf-8"))
    whole["model"]["unk_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = T.load(str(tmp_path))
    assert tokenizer.eot_id not in tokenizer.encode("a\x00b")
    whole = json.loads((folders["bert"] / "tokenizer.json").read_text(encoding="utf-8"))
    whole["model"]["unk_token"] = "no such token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="E116.*cannot run it: .*UNK"):
        T.load(str(tmp_path))
    whole["model"]["unk_token"] = "[SEP]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="E116.*cannot spell becomes .SEP., the end"):
        T.load(str(tmp_path))


# --- files and packages that are not there


def test_without_the_library(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="E003.*pip install tokenizers"):
        T.load(str(folders["gemma"]))
    assert T.load(str(folders["llama3"])).n_vocab  # tiktoken's kinds do without


BREAKS = {
    "decoder CTC": lambda w: w.update(decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True}),
    "library cannot run it": lambda w: w.update(normalizer={"type": "NoSuchThing"}),
    "KeyError": lambda w: w["model"].pop("vocab"),
    "one id": lambda w: w["model"]["vocab"].update({"▁": 5}),
}  # fmt: skip


@pytest.mark.parametrize("part", BREAKS)
def test_refused(folders, tmp_path, part):
    whole = json.loads((folders["gemma"] / "tokenizer.json").read_text(encoding="utf-8"))
    BREAKS[part](whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=f"(?s)E116.*{part}"):
        T.load(str(tmp_path))


def in_the_cache(folder, monkeypatch, source):
    """huggingface_hub's layout, with one repository in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = folder / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(source, target_is_directory=True)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("kind", ["gemma", "qwen2"])
def test_from_the_cache_of_hugging_face(folders, made, monkeypatch, tmp_path, kind):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    folder = in_the_cache(tmp_path, monkeypatch, folders[kind])
    asked = []
    ask = huggingface_hub.snapshot_download

    def recorded(**options):
        asked.append(options["local_files_only"])
        return ask(**options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", recorded)
    tokenizer = T.load("hf:org/name")
    assert asked == [True]  # what is in the cache asks no network
    assert tokenizer.name == "org/name" and tokenizer.same_ids(made[kind])
    assert T.locate("hf:org/name") == str(folder / "tokenizer.json")
    for spec in ("hf:org/other", "hf:org/name@nobranch", "hf:nothing", "hf:a/b/c", "hf:../x"):
        with pytest.raises(UserError, match="E115.*hf"):
            T.load(spec)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="E003.*pip install huggingface_hub"):
        T.load("hf:org/name")


# --- SentencePiece


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(kind, folder with its tokenizer.model): byte fallback or not, extra blanks kept or not."""
    train = pytest.importorskip("sentencepiece").SentencePieceTrainer.train
    found = {}
    kinds = {
        "llama2": {"byte_fallback": True, "remove_extra_whitespaces": False},
        "plain": {"eos_piece": "<|over|>"},
        "gemma": {
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
        "unigram": {"model_type": "unigram"},
        "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    }
    for kind, options in kinds.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        with open(found[kind] / "tokenizer.model", "wb") as file:
            options = {"model_type": "bpe", "normalization_rule_name": "identity", **options}
            lines = K.lines()[:2000] + K.lines()[-20:]
            options |= {"sentence_iterator": iter(lines), "model_writer": file, "minloglevel": 2}
            train(vocab_size=800, **options)
    return found


@pytest.mark.parametrize("kind", ["llama2", "plain", "gemma"])
def test_ids_equal_sentencepiece(models, tmp_path, kind):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(models[kind] / "tokenizer.model"))
    tokenizer = T.load(str(models[kind]))
    tokenizer.save(tmp_path / "tokenizer.json")
    again = T.load(str(tmp_path))
    assert tokenizer.eot_id == again.eot_id == theirs.eos_id() and again.sha256 == tokenizer.sha256
    texts = [*HOSTILE, *K.texts(200)]
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert ids == theirs.encode(text) == again.encode(text).tolist(), text
        if kind != "plain":  # which loses blanks, and characters that it does not know
            assert tokenizer.decode(ids) == theirs.decode(ids)
    name = theirs.id_to_piece(theirs.eos_id())
    assert theirs.eos_id() not in tokenizer.encode(f"a{name}b{name}")


@pytest.mark.parametrize("kind", ["unigram", "nfkc"])
def test_a_sentencepiece_model_that_would_not_be_exact(models, kind):
    with pytest.raises(UserError, match="E116.*only BPE with identity.*save_pretrained"):
        T.load(str(models[kind]))


def test_a_sentencepiece_model_is_held_against_the_library(models, monkeypatch, tmp_path):
    """A conversion that merges in another order is found out, and so is a file that is none."""
    path = str(models["llama2"] / "tokenizer.model")
    made = T.spm.bpe

    def wrong(model):
        return made(model) | {"merges": made(model)["merges"][::-1]}

    monkeypatch.setattr(T.spm, "bpe", wrong)
    with pytest.raises(UserError, match="E116.*other ids than sentencepiece"):
        T.load(path)
    for rubbish in (b"", b"\xff\xff\xff rubbish"):
        (tmp_path / "x.model").write_bytes(rubbish)
        with pytest.raises(UserError, match="E116.*is no SentencePiece model"):
            T.load(str(tmp_path / "x.model"))
    with pytest.raises(UserError, match="E115"):
        T.load(str(tmp_path / "none.model"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="E003.*pip install sentencepiece"):
        T.load(path)
