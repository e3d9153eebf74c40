"""lumen/scorer.py: log-probabilities are those of a plain forward pass over each text, for every
kind of layer; they do not depend on what else is asked."""

import math

import pytest
import torch

from lumen import tokenizer as tokenizers
from lumen.answers import lines_of
from lumen.questions import Asked, Choices, Options, Question, partner
from lumen.scorer import Packed, Scorer
from model import ModelConfig, Transformer

TOKENIZER = tokenizers.load("bytes")
EXPERTS = {"n_experts": 4, "d_expert": 32}
KINDS = {
    "dense": {},
    "experts": EXPERTS,
    "depths": {"mod_capacity": 0.5, "mod_every": 2},
    "depths of the FFN": {"mod_capacity": 0.5, "mod_ffn_only": True},
    "depths by position": {"mod_capacity": 0.5, "mod_routing": "static"},
    "both": EXPERTS | {"mod_capacity": 0.5, "mod_every": 2},
    "lunaris": {"norm_order": "lunaris"},
}
PAIRS = (
    ("What is the word? ", "one"),
    ("What is the word?", " one and two"),
    ("What is the word?", " a"),
    ("What is the", " word"),
)
HEADER = "Q: 1? A: 2\n\n"


def make_model(**more) -> Transformer:
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16}
    cfg = ModelConfig(vocab_size=TOKENIZER.n_vocab, max_seq_len=64, **sizes, **more)
    model = Transformer(cfg)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def by_hand(model, whole: list[int], n: int) -> tuple[float, bool]:
    """One text, one plain forward pass."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]]))[0, n - 1 :]
    targets = torch.tensor(whole[n:])
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
    return logprobs.sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("header", ["", HEADER])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_on_one_trunk_are_scored_as_texts_of_their_own(kind, header):
    model = make_model(**KINDS[kind])
    scorer = Scorer(model, TOKENIZER)
    found = scorer.pairs(PAIRS, header)
    for scored, (context, text) in zip(found, PAIRS):
        whole, n = scorer.encode_pair(header + context, text)
        logprob, greedy = by_hand(model, whole, n)
        assert scored.logprob == pytest.approx(logprob, abs=2e-5)
        assert (scored.tokens, scored.greedy) == (len(whole) - n, greedy)
    assert (scorer.header is None) == (header == "")


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_bits_depend_on_the_question_only(kind):
    questions = [Question(PAIRS[:k], 0, header=h) for k in (1, 2, 4) for h in ("", HEADER, "x y")]
    model = make_model(**KINDS[kind])
    together = Scorer(model, TOKENIZER)
    forth = [together.question(question) for question in questions]
    back = [together.question(question) for question in reversed(questions)]
    alone = [Scorer(model, TOKENIZER).question(question) for question in questions]
    assert forth == back[::-1] == alone


@pytest.mark.parametrize("kind", ["dense", "both", "depths by position"])
def test_packs_agree_with_passes_of_their_own(kind):
    rows = [{"q": "word " * k, "c": [" a", " bc" * k, "e" * 70][: 2 + k % 2]} for k in range(1, 13)]

    def ask(row):
        header = HEADER if len(row["q"]) % 3 else ""
        return Question(tuple((row["q"], choice) for choice in row["c"]), 0, header=header)

    model = make_model(**KINDS[kind])
    task = Choices("t", Options(), records=rows, ask=ask, swap=("q",))
    plain = Asked(model, TOKENIZER, scorer=Scorer(model, TOKENIZER))
    packed = Asked(model, TOKENIZER, scorer=Packed(model, TOKENIZER, 300))
    passes = []
    run = packed.scorer.run
    packed.scorer.run = lambda trees: passes.append(len(trees)) or run(trees)
    found = [list(lines_of(task, range(12), asked)) for asked in (plain, packed)]
    assert 1 < max(passes) < 24 and len(passes) > 2
    for one, other in zip(*found):
        for a, b in ((one, other), (one["control"], other["control"])):
            assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=1e-4)
        assert one == other


def test_a_model_is_left_as_it_was():
    model = make_model(dropout=0.5)
    model.train()
    scorer = Scorer(model, TOKENIZER)
    assert scorer.pairs(PAIRS) == scorer.pairs(PAIRS)  # no dropout
    assert model.training and all(p.grad is None for p in model.parameters())


def test_long_texts_are_cut_from_the_left():
    model = make_model()
    scorer = Scorer(model, TOKENIZER)
    found = scorer.pairs([("word " * 30, "end"), ("word " * 30, "e" * 63)], HEADER)
    ids = TOKENIZER.encode("word " * 30 + "end").tolist()[-65:]
    assert found[0].logprob == pytest.approx(by_hand(model, ids, 61)[0], abs=2e-5)
    ids = TOKENIZER.encode("d " + "e" * 63).tolist()
    assert found[1].logprob == pytest.approx(by_hand(model, ids, 1)[0], abs=1e-3)
    assert found[1].tokens == 64  # with the space
    whole = len(HEADER + "word " * 30 + "end")
    assert [one.cut for one in found] == [whole - 65, whole + 60 - 65]
    assert (
        scorer.question(Question((("word " * 30, "end"),), 0, header=HEADER))["cut"] == whole - 65
    )
    assert "cut" not in scorer.question(Question((("word", "end"),), 0))


def test_all_of_a_choice_counts_that_is_longer_than_the_context():
    model = make_model()
    scorer = Scorer(model, TOKENIZER)
    short, long = scorer.pairs([("word", " end"), ("word", "e" * 100)])
    assert short.logprob == pytest.approx(scorer.pairs([("word", " end")])[0].logprob, abs=1e-4)
    ids = TOKENIZER.encode("word" + "e" * 100).tolist()
    pieces = [(4, 36), (36, 68), (68, 100), (100, 104)]
    total = 0.0
    for first, end in pieces:
        begin = max(0, end - 65)  # as much as the model holds
        total += by_hand(model, ids[begin:end], first - begin)[0]
    assert long.logprob == pytest.approx(total, abs=1e-3)
    assert (long.tokens, long.greedy) == (100, False)


def test_the_border_is_that_of_lm_eval():
    scorer = Scorer(make_model(), TOKENIZER)
    whole, n = scorer.encode_pair("so is \n", "it")
    assert (TOKENIZER.decode(whole[:n]), TOKENIZER.decode(whole[n:])) == ("so is", " \nit")
    whole, n = scorer.encode_pair("", "it")
    assert whole[:n] == [TOKENIZER.eot_id] and TOKENIZER.decode(whole[n:]) == "it"


class Pairs:
    """A tokenizer of which an id is two letters."""

    n_vocab, eot_id = TOKENIZER.n_vocab, TOKENIZER.eot_id

    def encode(self, text):
        return torch.tensor([ord(text[i]) for i in range(0, len(text), 2)], dtype=torch.long)


def test_a_choice_within_the_last_id_of_its_context_is_not_certain():
    scorer = Scorer(make_model(), Pairs())
    within, other = scorer.pairs([("abc", "d"), ("abc", "de")])
    assert scorer.encode_pair("abc", "d") == ([ord("a"), ord("c")], 1)
    assert within.tokens == 1 and within.logprob < -1 and not within.greedy
    assert other.tokens == 1


def test_a_uniform_model_and_padding_of_the_vocabulary():
    model = make_model()
    torch.nn.init.zeros_(model.embed.weight)
    found = Scorer(model, TOKENIZER, n_vocab=200).pairs([("a", "bcd")])
    assert found[0].logprob == pytest.approx(-3 * math.log(200))


class Likes:
    """A scorer that finds one text likely."""

    def __init__(self, text: str):
        self.text = text

    def question(self, question: Question) -> dict:
        logprobs = [float(text == self.text) for _, text in question.pairs]
        return {"logprobs": logprobs, "tokens": [1] * len(logprobs), "greedy": [False] * 2}


def test_a_line_has_its_control():
    rows = [{"question": str(i), "choices": ["no", "é"], "answer": i % 2} for i in range(4)]

    def ask(row):
        pairs = tuple((row["question"], choice) for choice in row["choices"])
        return Question(pairs, row["answer"])

    class Asked:
        scorer = Likes("é")

    task = Choices("t", Options(limit=3), records=rows, ask=ask, swap=("question",))
    lines = [task.line(i, Asked) for i in range(len(task))]
    assert [line["i"] for line in lines] == task.numbers and len(task) == 3
    assert lines[0]["bytes"] == [2, 2] and lines[0]["logprobs"] == [0.0, 1.0]
    assert set(lines[0]["control"]) == {"logprobs", "greedy"}
    swapped = task.control(1)
    assert swapped.pairs[0][0] == str(partner(1, 4)) and swapped.answer == 1
    assert (
        Choices("t", Options(control=False), records=rows, ask=ask, swap=("q",)).control(1) is None
    )
