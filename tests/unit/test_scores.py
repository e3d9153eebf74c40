"""lumen/scores.py: who knows nothing has chance, who says one thing the majority's share, who knows
all has 1 and a control at chance; intervals hold what they should; NaN stays seen."""

import json
import math

import numpy as np
import pytest

from lumen import scores
from lumen.scores import Score, from_row, has_nan, scores_of

V = 8192
UNIFORM = math.log(V)


def choice(i, answer, logprobs, tokens=None, label="", blind=None, greedy=None):
    n = len(logprobs)
    line = {"i": i, "answer": answer, "label": label or str(answer), "logprobs": list(logprobs)}
    line |= {"tokens": tokens or [2] * n, "greedy": greedy or [False] * n}
    line["bytes"] = [4 * t for t in line["tokens"]]
    if blind is not None:
        line["control"] = {"logprobs": list(blind), "greedy": [False] * n}
    return line


def text(i, nats, tokens=100, **more):
    line = {"i": i, "nats": nats, "tokens": tokens, "right": 40, "bytes": 4 * tokens}
    return line | {"words": 75, "majority": 6.0 * tokens} | more


def by_name(*args, n_vocab=V):
    return {score.metric: score for score in scores_of(*args, n_vocab, 1.0)}


def answers(n, k, seed=0):
    return np.random.default_rng(seed).integers(k, size=n).tolist()


# ---------------------------------------------------------------- who knows nothing, or all


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_uniform_model_has_chance_exactly(k):
    """Three thirds are not 1 in floats, and yet it is neither better nor worse than chance."""
    rng = np.random.default_rng(k)
    lines = []
    for i, answer in enumerate(answers(50, k)):
        tokens = rng.integers(1, 9, k).tolist()
        # as a scorer adds in fp32: equal means come out unequal in the last bits
        nats = [float(np.float32(UNIFORM) * np.float32(t)) for t in tokens]
        lines.append(choice(i, answer, [-x for x in nats], tokens, blind=[-x for x in nats]))
    found = by_name("choice", "t", "acc_tokens", lines)
    acc = found["acc_tokens"]
    assert acc.value == pytest.approx(1 / k, rel=1e-12) and acc.chance == pytest.approx(1 / k)
    assert acc.control == pytest.approx(1 / k, rel=1e-12) and acc.n_control == 50
    assert acc.verdict == "no better than chance" and acc.headline
    bits = found["answer_bpb"]
    assert bits.value == pytest.approx(math.log2(V) / 4) == bits.chance
    assert bits.verdict == "no better than chance"


def test_a_uniform_model_has_v_and_log2_v():
    lines = [text(i, UNIFORM * t, t) for i, t in enumerate([100, 7, 250, 31])]
    found = by_name("text", "t", "bits_per_byte", lines)
    assert found["token_ppl"].value == pytest.approx(V) == found["token_ppl"].chance
    assert found["bits_per_byte"].value == pytest.approx(math.log2(V) / 4)
    assert found["loss"].value == pytest.approx(UNIFORM)
    assert found["word_ppl"].value == pytest.approx(V ** (388 / 300))
    assert found["byte_ppl"].value == pytest.approx(V**0.25)
    assert found["token_acc"].chance == pytest.approx(1 / V)
    assert found["bits_per_byte"].verdict == "no better than chance"


def test_a_constant_answerer_has_its_class_share():
    """ "yes" to everything, of which 62 % is right, as in BoolQ: far above chance, and worth
    nothing; "no" to everything is worse than that."""
    labels = ["yes"] * 620 + ["no"] * 380
    for constant, share in (("yes", 0.62), ("no", 0.38)):
        logprobs = [-1.0, -2.0] if constant == "yes" else [-2.0, -1.0]
        lines = [
            choice(i, int(label == "no"), logprobs, label=label, blind=logprobs)
            for i, label in enumerate(labels)
        ]
        acc = by_name("choice", "boolq", "acc", lines)["acc"]
        assert acc.value == share and acc.majority == 0.62 and acc.chance == 0.5
        assert acc.control == share and "LEAK" not in acc.verdict
        worse = {"yes": "no better than the majority answer", "no": "worse than chance"}
        assert acc.verdict == worse[constant]


def test_a_cheating_model_has_1_and_its_control_chance():
    rng = np.random.default_rng(3)
    lines = []
    for i, answer in enumerate(answers(400, 4)):
        logprobs = [-9.0] * 4
        logprobs[answer] = -1.0
        lines.append(choice(i, answer, logprobs, blind=-rng.random(4)))
    acc = by_name("choice", "t", "acc", lines)["acc"]
    assert acc.value == 1 and acc.verdict == ""
    assert abs(acc.control - 0.25) < 3 * acc.control_stderr
    assert acc.control_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.2)
    for line in lines[::2]:  # now every other right choice is known without its question
        line["control"]["logprobs"][line["answer"]] = 0.0
    acc = by_name("choice", "t", "acc", lines)["acc"]
    assert acc.verdict == "LEAK? the control is above chance"


def test_a_control_of_text_that_beats_its_frequencies_is_a_leak():
    def verdict(blind):
        lines = [text(i, 300.0 + i, control={"nats": blind, "tokens": 50}) for i in range(20)]
        return by_name("text", "t", "bits_per_byte", lines)["bits_per_byte"].verdict

    assert verdict(7.0 * 50) == ""
    assert verdict(5.0 * 50) == "LEAK? the control is below chance"


def test_by_sum_by_byte_and_by_token_can_differ():
    line = choice(0, 0, [-10.0, -6.0, -5.0], tokens=[5, 2, 1])
    line["bytes"] = [16, 10, 4]
    found = by_name("choice", "t", "acc", [line, line | {"i": 1, "answer": 2}])
    assert [found[name].value for name in ("acc", "acc_bytes", "acc_tokens")] == [0.5, 0, 0.5]
    line["bytes"] = [20, 10, 4]
    found = by_name("choice", "t", "acc", [line, line | {"i": 1, "answer": 2}])
    assert [found[name].value for name in ("acc", "acc_bytes", "acc_tokens")] == [0.5, 0.5, 0.5]


def test_a_cloze_counts_where_it_is_greedy():
    lines = [choice(i, 0, [-2.0], greedy=[i < 3], label=f"w{i // 2}") for i in range(10)]
    found = by_name("choice", "lambada", "acc", lines)
    assert set(found) == {"acc", "ppl", "answer_bpb"}
    assert found["acc"].value == 0.3 and found["acc"].chance == 0 and found["acc"].majority == 0.2
    assert found["ppl"].value == pytest.approx(math.exp(2)), "e to the mean over answers"
    unnamed = [choice(i, 0, [-2.0], greedy=[True]) for i in range(10)]
    assert by_name("choice", "lambada", "acc", unnamed)["acc"].majority is None


def test_replies():
    lines = [
        {"i": i, "found": {"exact_match": float(i < 30)}, "label": str(i % 2)} for i in range(50)
    ]
    for line in lines[:10]:
        line["found"]["pattern"] = 0.5
        line["control"] = {"found": {"exact_match": 1.0}}
    found = by_name("reply", "gsm8k", "exact_match", lines)
    match, pattern = found["exact_match"], found["pattern"]
    assert (match.value, match.n, match.chance, match.majority) == (0.6, 50, None, 0.5)
    assert (match.control, match.n_control) == (1.0, 10)
    assert match.verdict.endswith("; LEAK? the control is above the majority answer")
    assert (pattern.value, pattern.n, pattern.majority) == (0.5, 10, None), "only where it is"
    assert (pattern.control, pattern.n_control) == (None, 0), "its metric's control, not another's"
    lines[3]["label"] = ""  # of a prompt without an answer
    assert by_name("reply", "smoke", "exact_match", lines)["exact_match"].majority is None
    assert pattern.verdict == "no baseline known"


def test_what_lines_do_not_say_is_left_out():
    """Bare shards have no bytes; nobody has counted words."""
    lines = [text(i, 300.0, bytes=None, words=None, majority=None) for i in range(3)]
    found = by_name("text", "val", "loss", lines)
    assert list(found) == ["loss", "token_ppl", "token_acc"] and found["loss"].majority is None
    assert scores_of("choice", "t", "acc", [], V, 0.0) == []


# ---------------------------------------------------------------- spread


def test_the_error_of_a_share_is_the_formulas():
    lines = [choice(i, int(i % 10 < 3), [-1.0, -2.0]) for i in range(1000)]
    acc = by_name("choice", "t", "acc", lines)["acc"]
    assert acc.value == 0.7
    assert acc.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 1000), rel=0.1)
    assert (acc.low, acc.high) == pytest.approx(
        (0.7 - 1.96 * acc.stderr, 0.7 + 1.96 * acc.stderr), abs=4e-3
    )


def test_sums_of_a_ratio_are_drawn_together():
    """A text of unequal parts, each with 3 nats a token: nothing is uncertain."""
    lines = [text(i, 3.0 * t, t) for i, t in enumerate([1, 10, 100, 1000])]
    found = by_name("text", "t", "bits_per_byte", lines)
    assert found["bits_per_byte"].stderr < 1e-12
    lines[0]["nats"] = 9.0
    assert by_name("text", "t", "bits_per_byte", lines)["bits_per_byte"].stderr > 1e-3


def test_intervals_cover_what_they_should():
    """200 data sets of 150 questions: of a true share of 0.7, and of a true ratio of sums."""
    rng = np.random.default_rng(5)
    covered = {"share": 0, "bits": 0}
    for _ in range(200):
        hit = (rng.random(150) < 0.7).astype(float)
        size = rng.integers(20, 200, 150).astype(float)
        sums = size * 2 + np.sqrt(size) * 3 * rng.standard_normal(150)
        share = scores.Metric("acc", "share", hit, np.ones(150))
        ratio = scores.Metric("bits_per_byte", "bits", sums, size)
        draws = scores.resampled([share, ratio])
        for m, draw, true in ((share, draws[0], 0.7), (ratio, draws[1], 2.0)):
            found = scores.spread(m, draw)
            covered[m.unit] += found.low <= true <= found.high
    assert all(180 <= n <= 199 for n in covered.values()), covered  # 190 of 200; 180: 3 sigma


def test_few_questions_that_all_succeed_prove_little():
    """Of 3 out of 3 no drawing differs; the exact interval reaches down to 0.29."""
    lines = [choice(i, 0, [-1.0, -2.0, -3.0, -4.0], label=str(i)) for i in range(3)]
    acc = by_name("choice", "t", "acc", lines)["acc"]
    assert (acc.value, acc.high) == (1, 1) and acc.low == pytest.approx(0.025 ** (1 / 3))
    wrong = [line | {"answer": 1} for line in lines]
    acc = by_name("choice", "t", "acc", wrong)["acc"]
    assert acc.value == 0 and acc.verdict == "no better than chance", "and none of 3 is not worse"
    acc = by_name("choice", "t", "acc", [*wrong[:1]])["acc"]
    assert acc.verdict == "no better than chance"
    one = by_name("text", "t", "loss", [text(0, 300.0)])["loss"]
    assert (one.stderr, one.low, one.verdict) == (None, None, "one question: no interval")


def test_order_and_repetition_of_lines_change_nothing():
    rng = np.random.default_rng(6)
    lines = [
        choice(i, a, -rng.random(4), blind=-rng.random(4)) for i, a in enumerate(answers(300, 4))
    ]
    straight = scores_of("choice", "t", "acc", lines, V, 1.0)
    mixed = [*lines[:40], *(lines[i] for i in rng.permutation(300))]
    assert scores_of("choice", "t", "acc", mixed, V, 1.0) == straight
    lines[7]["answer"] = (lines[7]["answer"] + 1) % 4
    assert scores_of("choice", "t", "acc", lines, V, 1.0) != straight


def test_blocks_of_drawings_change_nothing(monkeypatch):
    m = scores.Metric("acc", "share", np.random.default_rng(0).random(50), np.ones(50))
    (whole,) = scores.resampled([m])
    monkeypatch.setattr(scores, "BLOCK", 50 * 7)
    (parts,) = scores.resampled([m])
    assert np.allclose(whole, parts, rtol=1e-12) and len(parts) == scores.RESAMPLES


# ---------------------------------------------------------------- NaN, JSON


@pytest.mark.parametrize("bad", [math.nan, None])
def test_one_nan_is_the_score(bad):
    """null is how a NaN comes out of a file."""
    lines = [choice(i, 0, [-1.0, -2.0], blind=[-2.0, -1.0]) for i in range(20)]
    fine = scores_of("choice", "t", "acc", lines, V, 1.0)
    assert not has_nan(fine)
    lines[3]["logprobs"][1] = bad
    found = by_name("choice", "t", "acc", lines)
    assert math.isnan(found["acc"].value) and math.isnan(found["acc"].low)
    assert found["acc"].verdict == "NaN" and has_nan(list(found.values()))
    assert found["acc"].control == 0, "what is known stays"
    lines[3]["logprobs"] = [bad, -2.0]
    assert math.isnan(by_name("choice", "t", "acc", lines)["answer_bpb"].value), "the right one"
    cloze = [choice(i, 0, [bad if i == 3 else -1.0], greedy=[True]) for i in range(9)]
    assert math.isnan(by_name("choice", "t", "acc", cloze)["acc"].value)
    lines[3]["logprobs"] = [-1.0, -2.0]
    lines[3]["control"]["logprobs"][0] = bad
    assert has_nan(scores_of("choice", "t", "acc", lines, V, 1.0))
    texts = [text(i, bad if i == 4 else 300.0) for i in range(9)]
    assert has_nan(scores_of("text", "t", "loss", texts, V, 1.0))
    replies = [{"i": i, "found": {"x": bad}, "label": ""} for i in range(9)]
    assert has_nan(scores_of("reply", "t", "x", replies, V, 1.0))


def test_scores_go_through_json():
    lines = [choice(i, 0, [-1.0, math.nan if i else -2.0]) for i in range(5)]
    lines += [choice(i, 0, [-1.0, -2.0]) for i in range(9, 12)]
    for score in scores_of("choice", "t", "acc", lines, V, 1.0):
        row = json.loads(json.dumps(score.row(), allow_nan=False))
        back = from_row(row)
        assert isinstance(back, Score) and repr(back) == repr(score), "NaN is not equal to itself"
    assert row["nan"] == [], "the right answer's bits are known"


def test_a_perplexity_is_no_infinity():
    """A text without blanks is one word of a thousand tokens."""
    found = by_name("text", "t", "loss", [text(i, 5000.0, words=1) for i in range(3)])
    assert math.isfinite(found["word_ppl"].value) and not has_nan(list(found.values()))


@pytest.mark.filterwarnings("error")
def test_a_perplexity_that_has_no_square_has_an_error():
    texts = {"nats": 3000.0, "tokens": 400, "right": 3, "bytes": 900, "words": 5, "majority": 2e3}
    lines = [texts | {"i": i, "nats": 3000.0 + i} for i in range(10)]
    found = {score.metric: score for score in scores_of("text", "t", "loss", lines, 260, 1.0)}
    assert found["word_ppl"].value > 1e200
    assert 0 < found["word_ppl"].stderr < math.inf
