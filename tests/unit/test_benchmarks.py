"""Public evaluation files: every form becomes what lm-eval asks of the same rows, word for word."""

import functools
import json
from pathlib import Path

import pytest

from lumen.benchmarks import READERS
from lumen.errors import UserError
from lumen.questions import Options

# ---------------------------------------------------------------- three rows of each, in Hugging Face's form

BOOLQ = [
    {"question": f"is {thing} old", "passage": f"{thing} [1]  was built\nin {year}.", "label": label}
    for thing, year, label in [("the tower", 1100, 1), ("a mill", 1999, 0), ("Köln", 50, 1)]
]
HELLASWAG = [
    {
        "ind": n,
        "activity_label": f"Cutting {what}",
        "ctx_a": f"A man cuts {what}. [header] How to [title] cut  it",
        "ctx_b": "he THEN",
        "ctx": "unused",
        "endings": [f"stops. [step] Rests {n}.", " sleeps", "é eats it", "runs away [x] now"],
        "label": str(n),
    }
    for n, what in enumerate(["wood", "paper", "cake"])
]
ARC = [
    {
        "id": str(n),
        "question": f"Which of {n} is hot?",
        "choices": {"text": ["ice", "fire", "wind"], "label": labels},
        "answerKey": key,
    }
    for n, (labels, key) in enumerate([(list("ABC"), "B"), (list("123"), "3"), (list("ABC"), "A")])
]
PIQA = [
    {"goal": f"To dry {n} cups", "sol1": "use a towel ", "sol2": "use water", "label": n % 2}
    for n in range(3)
]
WINOGRANDE = [
    {"sentence": "Ann thanked Eve since _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    {"sentence": "_ was late, so Bob ran.", "option1": "Bob", "option2": "Tom", "answer": "1"},
    {"sentence": "The cup broke the plate as the _  was hard.", "option1": "cup", "option2": "plate", "answer": "1"},
]
LAMBADA = [
    {"text": 'the cat sat.\n"come here,"  said the cat'},
    {"text": "one two three four"},
    {"text": "he gave her the book and she read the book"},
]
MMLU = [
    {
        "question": f" What is {n} + {n}? ",
        "subject": "elementary_mathematics",
        "choices": [str(n), str(n + n), "none, at all", '"0"'],
        "answer": n % 4,
    }
    for n in range(3)
]
DEV = [row | {"question": f"Is {row['question']}"} for row in MMLU]
PAGES = [
    " = A Title = \n \n The cats ' food ( red @-@ brown ) cost 1 @,@ 000 , \" or so \" ; it was 5 ° warm . \n = = Part = = \n N 's . \n",
    " = Other = \n \n It ' s [ not ] the { end } : really ? yes ! 1 @.@ 5 = = = x = = = \n",
]
ROWS = {
    "boolq": BOOLQ,
    "hellaswag": HELLASWAG,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "piqa": PIQA,
    "winogrande": WINOGRANDE,
    "lambada": LAMBADA,
    "mmlu": MMLU,
}
TASK_FILES = {  # of lm-eval
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "mmlu": "mmlu/default/mmlu_elementary_mathematics.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(name, path, **options):
    (task,) = READERS[name](Path(path), Options(**options))
    return task


def prompts(task, control=False):
    """Of each question the answer and what a model sees: [(header + context, continuation), ...]."""
    found = []
    for number in range(len(task.records)):
        question = task.control(number) if control else task.ask(task.records[number])
        pairs = [(question.header + context, text) for context, text in question.pairs]
        found.append((question.answer, pairs))
    return found


# ---------------------------------------------------------------- against lm-eval


@functools.cache
def lm_eval_task(name, shots=0):
    """lm-eval's own task over our rows."""
    api = pytest.importorskip("lm_eval.api.task")
    from datasets import Dataset
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(tasks.__file__).parent / TASK_FILES[name])
    rows = [{"page": page} for page in PAGES] if name == "wikitext" else ROWS[name]
    splits = {"validation": rows, "test": rows, "dev": DEV}
    if shots == 1:
        splits = {"validation": rows[1:], "test": rows[1:], "train": rows[:1] * 2}
    data = {split: Dataset.from_list(list(found)) for split, found in splits.items()}
    config |= {"custom_dataset": lambda **_: data, "num_fewshot": shots}
    return api.ConfigurableTask(config=config)


def lm_eval_prompts(name, shots=0):
    task = lm_eval_task(name, shots)
    found = []
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, shots)
        asked = task.construct_requests(doc, context)
        if not isinstance(asked, list):
            asked = [asked]
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        found.append((answer if isinstance(answer, int) else 0, [one.args for one in asked]))
    return found


@pytest.mark.parametrize("name", ROWS)
def test_what_is_asked_is_lm_evals(name, tmp_path):
    path = jsonl(tmp_path / "test.jsonl", ROWS[name])
    assert prompts(read(name, path, shots=0)) == lm_eval_prompts(name)


@pytest.mark.parametrize("name", ["boolq", "hellaswag", "arc_easy", "piqa", "winogrande"])
def test_an_example_is_lm_evals(name, tmp_path):
    """There is one to draw, twice: the draws themselves are ours."""
    path = jsonl(tmp_path / "validation.jsonl", ROWS[name][1:])
    jsonl(tmp_path / "train.jsonl", ROWS[name][:1] * 2)
    assert prompts(read(name, path, shots=1)) == lm_eval_prompts(name, 1)


def test_mmlus_examples_are_lm_evals(tmp_path):
    path = jsonl(tmp_path / "elementary_mathematics" / "test.jsonl", MMLU)
    jsonl(path.with_name("dev.jsonl"), DEV)
    assert prompts(read("mmlu", path, shots=2)) == lm_eval_prompts("mmlu", 2)
