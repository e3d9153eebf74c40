"""lumen/texts.py: every token of a text is predicted once, in lm-eval's windows or with a longer
past; a line is its document's alone; baselines and control are what they are called."""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparse_models import make

from lumen import inputs, texts
from lumen import tokenizer as tokenizers
from lumen.errors import UserError
from lumen.questions import Asked, Options, chosen
from lumen.scorer import Scorer
from lumen.scores import scores_of
from lumen.texts import STRETCH, TextTask, read_texts, windows, with_control

BYTES = tokenizers.load("bytes")
T, V = 16, 260
WORDS = "a text\n  of äöü words,\u3000and\t some more of them; "
DOCUMENTS = [WORDS, "x", "the second one is\nshort", WORDS[5:] + "another end"]


def asked(model=None, tokenizer=BYTES) -> Asked:
    model = model or make(vocab_size=V, max_seq_len=T)
    return Asked(model, tokenizer, None, tokenizer.n_vocab, Scorer(model, tokenizer))


def task(documents=DOCUMENTS, name="t", by_stretch=None, **options) -> TextTask:
    return TextTask(name, Options(**options), {}, documents, by_stretch=by_stretch)


def lines_of(made, who=None) -> list[dict]:
    who = who or asked()
    return [made.line(i, who) for i in range(len(made))]


# ---------------------------------------------------------------- windows


def test_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils")
    for n in range(40):
        for length in (1, 2, 7, 16):
            ids, found = list(range(n)), []
            for pair in utils.get_rolling_token_windows(ids, -1, length, 1):
                context, continuation = utils.make_disjoint_window(pair)
                found.append((context + continuation[:-1], continuation))
            stream = [-1, *ids]
            mine = [(stream[w.begin : w.end], ids[w.first : w.end]) for w in windows(n, length)]
            assert mine == found, (n, length)


def test_with_a_stride_each_token_comes_once_and_sees_what_it_can():
    for n in (1, 5, 8, 9, 40):
        for stride in (1, 3, 8):
            found = windows(n, 8, stride)
            targets = [j for window in found for j in range(window.first, window.end)]
            assert targets == list(range(n))
            for begin, first, end in found:
                assert end - begin <= 8 and begin >= 0
                for j in range(first, end):  # the token behind place j of the stream
                    assert j - begin + 1 > min(j, 8 - stride), (n, stride, begin, j)


def by_hand(model, text: str, stride=None) -> tuple[float, int]:
    """(nats, tokens that are the most likely): each token by a pass of its own over what it sees."""
    ids = BYTES.encode(text).astype(np.int64)
    stream = torch.tensor([BYTES.eot_id, *ids])
    nats, right = 0.0, 0
    for begin, first, end in windows(len(ids), T, stride):
        for j in range(first, end):
            with torch.no_grad():
                logits = model.eval()(stream[None, begin : j + 1])[0, -1].double()
            nats -= F.log_softmax(logits, -1)[ids[j]].item()
            right += int(logits.argmax() == ids[j])
    return nats, right


@pytest.mark.parametrize("stride", [None, 5])
def test_a_line_is_the_formula(stride):
    who = asked()
    for line, text in zip(lines_of(task(stride=stride), who), DOCUMENTS):
        nats, right = by_hand(who.model, text, stride)
        assert line["nats"] == pytest.approx(nats, rel=1e-5) and line["right"] == right
        assert line["tokens"] == line["bytes"] == len(text.encode())
        assert line["words"] == len(re.split(r"\s+", text))


def test_a_stride_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="E127.*17 tokens.*max_seq_len is 16"):
        lines_of(task(stride=17))


def test_a_uniform_model_has_v_and_log2_v():
    model = make(vocab_size=V, max_seq_len=T)
    model.embed.weight.data.zero_()
    who = asked(model)
    found = scores_of("text", "t", "bits_per_byte", lines_of(task(), who), V, 1.0)
    found = {score.metric: score.value for score in found}
    assert found["token_ppl"] == pytest.approx(V, rel=1e-6)  # an id is a byte
    assert found["bits_per_byte"] == pytest.approx(math.log2(V), rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(V), rel=1e-6)


# ---------------------------------------------------------------- a line and its neighbours


def test_what_a_document_leaves_is_its_own():
    who, names = asked(), ("nats", "tokens", "right", "bytes", "words")
    whole = lines_of(task(), who)
    fewer = lines_of(task([DOCUMENTS[3], DOCUMENTS[0]]), who)
    for name in names:
        assert [whole[3][name], whole[0][name]] == [line[name] for line in fewer]
    some = task(limit=2)
    lines = lines_of(some, who)
    assert [line["i"] for line in lines] == [some.number(i) for i in range(len(some))]
    assert lines == [whole[line["i"]] for line in lines], "whatever is asked beside it"
    assert lines_of(task(), who)[::-1] == [task().line(i, who) for i in (3, 2, 1, 0)]


@pytest.mark.parametrize("stride", [None, 5])
def test_stretches_of_a_document_add_up_to_it(stride):
    who = asked()
    whole = lines_of(task(control=False, stride=stride), who)
    parts = lines_of(task(by_stretch=20, control=False, stride=stride), who)
    assert len(parts) > 2 * len(whole)
    for name in ("nats", "tokens", "right", "bytes", "words", "majority"):
        both = [sum(line[name] for line in lines) for lines in (whole, parts)]
        assert both[0] == pytest.approx(both[1]), name
    made = task(by_stretch=20)
    assert len("".join(text for _, text in made.texts())) > len("".join(DOCUMENTS)) - len(parts)


def test_where_tokens_and_words_begin():
    found = texts.Places.of("ä b\n\u3000c", np.array([2, 2, 1, 3, 1]))
    assert found.tokens.tolist() == [0, 2, 4, 5, 8, 9] and found.spaces.tolist() == [2, 4]


class Lossy:
    """A tokenizer that knows ASCII only: other characters have no bytes."""

    n_vocab, eot_id = 130, 128

    def encode(self, text):
        return np.array([min(ord(char), 129) for char in text], np.uint32)

    def token_bytes(self):
        return np.array([1] * 128 + [0, 0], np.uint16)


def test_a_tokenizer_that_drops_bytes_leaves_the_text_its_own():
    text = "abcdefgh hijklmnéé"
    who = asked(make(vocab_size=130, max_seq_len=T), Lossy())
    lines = lines_of(task([text], by_stretch=3), who)
    assert sum(line["tokens"] for line in lines) == len(text)
    assert sum(line["bytes"] for line in lines) == len(text.encode()) == len(text) + 2
    assert sum(line["words"] for line in lines) == 2


def test_majority_is_the_unigram_of_all_texts():
    text = "".join(DOCUMENTS).encode()
    for line, document in zip(lines_of(task()), DOCUMENTS):
        data = document.encode()
        nats = -sum(math.log(text.count(bytes([byte])) / len(text)) for byte in data)
        assert line["majority"] == pytest.approx(nats)


@dataclass
class Successor:
    """A model that is sure that the next id is the last one plus 1."""

    cfg = SimpleNamespace(max_seq_len=T)
    embed = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, x, targets):
        counts = targets >= 0
        right = ((x + 1 == targets) & counts).sum()
        return None, {"ce": 20 * (counts.sum() - right), "count": counts.sum(), "correct": right}

    @contextlib.contextmanager
    def at_rest(self):
        yield


def test_a_leak_shows_in_the_control():
    model = Successor()
    who = Asked(model, BYTES, None, V, model)
    rows = ["".join(map(chr, range(a, a + 30))) for a in (33, 40, 55, 61)]

    def sums(documents):
        lines = lines_of(task(documents), who)
        found = {name: sum(line[name] for line in lines) for name in ("nats", "tokens", "majority")}
        control = [sum(line["control"][name] for line in lines) for name in ("nats", "tokens")]
        return found["nats"] / found["tokens"], found["majority"] / found["tokens"], control

    nats, unigram, (control, tokens) = sums(rows)
    assert nats < unigram < 19 * 29 / 30 < control / tokens, "another's inputs tell nothing"
    nats, unigram, (control, tokens) = sums([*rows, *rows])
    assert control / tokens == nats < unigram, "the texts are there twice"
    assert "control" not in lines_of(task(rows, control=False), who)[0]
    assert "control" not in lines_of(task(rows[:1]), who)[0], "there is no other"


def test_some_of_many_have_a_control_whichever_are_asked():
    many = [f"document {i}" for i in range(1500)]
    assert len(task(many).controls) == 150 and len(task(many[:200]).controls) == 100
    assert task(many, limit=5).controls == task(many).controls


def test_another_tokenizer_is_met_anew():
    made = task(["aaaa"])
    merged = tokenizers.train_bpe(["aaaa"] * 9, 261)
    model = make(vocab_size=261, max_seq_len=T)
    tokens = [made.line(0, asked(model, tokenizer))["tokens"] for tokenizer in (BYTES, merged)]
    assert tokens == [4, 2]


# ---------------------------------------------------------------- files


def test_files_of_texts(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"content": "two"}\n{"text": " "}\n')
    (found,) = read_texts(tmp_path / "a.txt", Options())
    assert found.documents == DOCUMENTS[:1] and found.name == "a" and found.by_stretch == STRETCH
    assert found.about["sha256"] and "lm-eval" in found.about["said"]
    (found,) = read_texts(tmp_path / "b.jsonl", Options(stride=3))
    assert found.documents == ["one", "two"] and "moves on by 3" in found.about["said"]
    monkeypatch.setattr(texts, "FEW", 2)
    assert read_texts(tmp_path / "b.jsonl", Options())[0].by_stretch is None
    monkeypatch.setattr(inputs, "PIECE", 16)  # read in pieces
    assert read_texts(tmp_path / "a.txt", Options())[0].documents == DOCUMENTS[:1]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("c.jsonl", b'{"text": "one"}\n{"words": 3}\n', 'c.jsonl:2: no "text" field.*words'),
        ("c.txt", b"one\n\xff\n", "c.txt:2: byte 0xff"),
        ("c.txt", b" \n", "holds no text"),
        ("c.bin", b"one", "no file of text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"E127: .*{said}"):
        read_texts(tmp_path / name, Options())


def test_lines_are_json():
    for line in lines_of(task(by_stretch=20)):
        assert json.loads(json.dumps(line)) == line


def test_the_questions_of_a_small_limit_have_controls():
    few = Options(limit=20)
    assert set(chosen(5000, few)) <= with_control(5000, few) == with_control(5000, Options())
    assert len(with_control(5000, few)) == 500 and with_control(50, few) == set(range(50))
