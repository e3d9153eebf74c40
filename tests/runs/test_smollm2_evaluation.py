"""A real model, SmolLM2-135M-Instruct, asked by us and by lm-eval's hf model: the same numbers, and
scores that are far from chance. By hand, like tests/runs/test_smollm2.py, which finds the model."""

import inspect
import textwrap

import pytest
from test_smollm2 import folder  # noqa: F401

from lumen import harness, models, tasks
from lumen.questions import Options
from lumen.scores import scores_of
from tools import bench_evaluate

pytestmark = pytest.mark.nightly
pytest.importorskip("lm_eval")
LIMIT = 40  # questions of each kind


@pytest.fixture(scope="module")
def opened(folder):  # noqa: F811
    return models.open_model(folder, device="cpu", precision="fp32", say=str)


@pytest.fixture(scope="module")
def theirs(folder):  # noqa: F811
    return bench_evaluate.theirs(folder, "fp32")


@pytest.fixture(scope="module")
def ours(opened):
    from lumen.lm_eval_model import asked_of

    return harness.language_model(asked_of(opened), opened)


def both(kind, ours, theirs) -> tuple[list, list, float]:
    """(our lines, lm-eval's, the largest difference of a log-probability)."""
    questions = bench_evaluate.KINDS[kind](LIMIT)
    mine = [ours.asked.scorer.question(question)["logprobs"] for question in questions]
    flat = bench_evaluate.ask_theirs(theirs, 4, bench_evaluate.requests_of(questions))
    others = []
    for line in mine:
        others.append(flat[: len(line)])
        flat = flat[len(line) :]
    worst = max(abs(a - b) for x, y in zip(mine, others) for a, b in zip(x, y))
    return mine, others, worst


@pytest.mark.parametrize("kind", bench_evaluate.KINDS)
def test_log_probabilities_are_those_of_lm_evals_hf_model(kind, ours, theirs):
    mine, others, worst = both(kind, ours, theirs)
    print(f"{kind}: {len(mine)} questions, differ by at most {worst:.1e}")
    assert worst < 1e-3
    assert [x.index(max(x)) for x in mine] == [y.index(max(y)) for y in others]


def test_it_tells_docstrings_apart_and_knows_nothing_without_the_question(ours):
    task = tasks.docstrings(Options(limit=3 * LIMIT))
    lines = [task.line(i, ours.asked) for i in range(len(task))]
    found = {s.metric: s for s in scores_of("choice", task.name, task.metric, lines, 0, 0.0)}
    best = found[task.metric]
    print({name: (round(s.value, 3), s.low, s.high, s.control) for name, s in found.items()})
    assert best.low > max(best.chance, best.majority) and abs(best.control - best.chance) < 0.1


def test_bits_of_a_text_are_those_of_lm_evals_hf_model(ours, theirs):
    from lm_eval.api.instance import Instance

    text = inspect.getsource(textwrap)[:12000]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("text", 0, 1))]
    (mine,) = ours.loglikelihood_rolling(requests)
    (other,) = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    print(f"{-mine / len(text.encode()) / 0.6931:.4f} bits a byte")
    assert mine == pytest.approx(other, rel=1e-5)  # theirs adds up in fp32


def test_a_conversation_begins_and_is_answered_as_lm_evals_hf_model_has_it(ours, theirs):
    from lm_eval.api.instance import Instance

    talk = [{"role": "system", "content": "Be brief."}]
    talk.append({"role": "user", "content": "What is the capital of France?"})
    texts = [lm.apply_chat_template(talk) for lm in (ours, theirs)]
    assert ours.tok_encode(texts[0]) == theirs.tok_encode(texts[1])
    replies = []
    for lm, text in zip((ours, theirs), texts):
        how = {"until": [], "max_gen_toks": 16}
        request = Instance("generate_until", {}, (text, how), 0, ("chat", 0, 1))
        replies += lm.generate_until([request])
    assert replies[0] == replies[1] and "Paris" in replies[0]
