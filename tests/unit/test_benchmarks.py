"""Public evaluation files: every form becomes what lm-eval asks of the same rows, word for word."""

import csv
import functools
import json
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lumen import texts
from lumen.benchmarks import READERS
from lumen.core_bundle import core_result, read_core
from lumen.errors import UserError
from lumen.questions import Asked, Options
from lumen.scorer import Scored, Scorer
from lumen.scores import Score

# ---------------------------------------------------------------- three rows of each, in Hugging Face's form

BOOLQ = [
    {
        "question": f"is {thing} old",
        "passage": f"{thing} [1]  was built\nin {year}.",
        "label": label,
    }
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
    {
        "sentence": "Ann thanked Eve since _ had helped.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
    {"sentence": "_ was late, so Bob ran.", "option1": "Bob", "option2": "Tom", "answer": "1"},
    {
        "sentence": "The cup broke the plate as the _  was hard.",
        "option1": "cup",
        "option2": "plate",
        "answer": "1",
    },
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
    " = A Title = \n \n The cats ' food ( red @-@ brown ) cost 1 @,@ 000 , \" or so \" ; it was 5 ° warm . \n = = Part = = \n N 's . ",
    " = Other = \n \n It ' s [ not ] the { end } : really ? yes ! 1 @.@ 5 = = = x = = = \n = no title = = = \n",
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
    splits = {"validation": rows, "test": rows, "train": rows, "dev": DEV}
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


@pytest.mark.parametrize("name", ["hellaswag", "arc_challenge", "piqa"])
def test_a_choices_length_is_lm_evals(name, tmp_path):
    """In bytes, without the space before it: with it another choice may win."""
    task = read(name, jsonl(tmp_path / "x.jsonl", ROWS[name]), control=False)
    lm_eval = lm_eval_task(name)
    for number, doc in enumerate(lm_eval.eval_docs):
        choices = [choice.encode() for choice in lm_eval.doc_to_choice(doc)]
        asked = Asked(None, None, scorer=SimpleNamespace(question=lambda question: {}))
        assert task.line(number, asked)["bytes"] == [len(choice) for choice in choices]


def test_wikitext_is_lm_evals(tmp_path, monkeypatch):
    """Salesforce's file, Hugging Face's lines and rows that are articles give the same texts; words
    and bytes are those before the detokenizer, or the perplexity were another one."""
    task = lm_eval_task("wikitext")
    expected = [task.doc_to_target(doc) for doc in task.eval_docs]
    counts = []
    for doc in task.eval_docs:
        found = task.process_results(doc, [0.0])
        counts.append((found["word_perplexity"][1], found["byte_perplexity"][1]))

    whole = " \n" + "\n".join(PAGES)
    raw = tmp_path / "wikitext-2-raw" / "wiki.test.raw"
    raw.parent.mkdir()
    raw.write_text(whole, encoding="utf-8")
    lines = [{"text": line if line.strip() else ""} for line in whole.splitlines(keepends=True)]
    pages = [{"page": page} for page in PAGES]
    jsonl(tmp_path / "wikitext-103-raw-v1" / "test-00000-of-00001.jsonl", lines)
    monkeypatch.setattr(texts.TextTask, "line", lambda task, i, asked: {"i": i, "words": 0})
    for name, path in [
        ("wikitext2", raw),
        ("wikitext2", tmp_path),
        ("wikitext103", tmp_path),
        ("wikitext2", jsonl(tmp_path / "pages.jsonl", pages)),
    ]:
        task = read(name, path)
        assert task.documents == expected and task.metric == "word_ppl"
        lines = [task.line(i, None) for i in range(2)]
        assert [(line["words"], line["bytes"]) for line in lines] == counts


# ---------------------------------------------------------------- what a line is made of


@pytest.mark.parametrize(
    "name, metric, labels",
    [
        ("boolq", "acc", ["yes", "no", "yes"]),
        ("hellaswag", "acc_bytes", ["", "", ""]),
        ("arc_easy", "acc", ["B", "C", "A"]),
        ("arc_challenge", "acc_bytes", ["B", "C", "A"]),
        ("piqa", "acc_bytes", ["", "", ""]),
        ("winogrande", "acc", ["", "", ""]),
        ("lambada", "acc", ["cat", "four", "book"]),
        ("mmlu", "acc", ["A", "B", "C"]),
    ],
)
def test_labels_and_controls(name, metric, labels, tmp_path):
    """The control's choices are the question's own, what they are asked about is another's."""
    task = read(name, jsonl(tmp_path / "test.jsonl", ROWS[name]), shots=0)
    assert task.metric == metric
    assert [task.ask(record).label for record in task.records] == labels
    plain, swapped = prompts(task), prompts(task, control=True)
    for number, (answer, pairs) in enumerate(plain):
        other = plain[(number + 1) % 3][1]
        assert swapped[number][0] == answer
        if name == "winogrande":
            assert [context for context, _ in swapped[number][1]] == [
                context for context, _ in pairs
            ]
            assert swapped[number][1][0][1] == other[0][1]
        else:
            assert [text for _, text in swapped[number][1]] == [text for _, text in pairs]
            assert swapped[number][1] != pairs
    if name == "boolq":  # the question stays, the passage goes
        assert swapped[0][1][0][0] == plain[0][1][0][0].replace(
            BOOLQ[0]["passage"], BOOLQ[1]["passage"]
        )
    if name in ("hellaswag", "arc_easy", "piqa", "lambada"):
        assert swapped[0][1][0][0] == plain[1][1][0][0]


# ---------------------------------------------------------------- the forms in which people have them


def test_the_publishers_own_forms_are_the_same_questions(tmp_path):
    """Google's, AI2's, the authors' files against Hugging Face's columns."""
    boolq = [{"title": "x"} | row | {"answer": bool(row["label"])} for row in BOOLQ]
    for row in boolq:
        del row["label"]
    arc = []
    for row in ARC:
        choices = zip(row["choices"]["text"], row["choices"]["label"])
        choices = [{"text": text, "label": label} for text, label in choices]
        question = {"stem": row["question"], "choices": choices}
        arc.append({"id": row["id"], "question": question, "answerKey": row["answerKey"]})
    hellaswag = [row | {"label": int(row["label"])} for row in HELLASWAG]
    piqa = [{k: row[k] for k in ("goal", "sol1", "sol2")} for row in PIQA]
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n")
    mmlu = tmp_path / "elementary_mathematics_test.csv"
    with open(mmlu, "w", newline="") as file:
        for row in MMLU:
            csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])
    named = tmp_path / "named" / mmlu.name
    named.parent.mkdir()
    named.write_text("question,A,B,C,D,answer\n" + mmlu.read_text())
    assert prompts(read("mmlu", named, shots=0)) == prompts(read("mmlu", mmlu, shots=0))
    others = {
        "boolq": jsonl(tmp_path / "dev.jsonl", boolq),
        "arc_easy": jsonl(tmp_path / "ARC-Easy-Test.jsonl", arc),
        "hellaswag": jsonl(tmp_path / "hellaswag_val.jsonl", hellaswag),
        "piqa": jsonl(tmp_path / "valid.jsonl", piqa),
        "mmlu": mmlu,
    }
    for name, path in others.items():
        hf = jsonl(tmp_path / "hf" / f"{name}.jsonl", ROWS[name])
        assert prompts(read(name, path, shots=0)) == prompts(read(name, hf, shots=0))
        assert read(name, path, shots=0).about["path"] == str(path)


@pytest.mark.parametrize("name", ROWS)
def test_parquet_and_json_are_the_same_questions(name, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    expected = prompts(read(name, jsonl(tmp_path / "a.jsonl", ROWS[name]), shots=0))
    parquet.write_table(Table.from_pylist(ROWS[name]), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS[name], indent=1))
    for path in (tmp_path / "a.parquet", tmp_path / "a.json"):
        assert prompts(read(name, path, shots=0)) == expected


@pytest.mark.parametrize(
    "name, tree, found",
    [
        ("boolq", ["boolq/train.jsonl", "boolq/val.jsonl", "boolq/test.jsonl"], "boolq/val.jsonl"),
        ("hellaswag", ["data/test-0.json", "data/validation-00000-of-00001.json"], "data/validation-00000-of-00001.json"),
        ("arc_easy", ["ARC-Easy/ARC-Easy-Dev.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl", "ARC-Challenge/ARC-Challenge-Test.jsonl"], "ARC-Easy/ARC-Easy-Test.jsonl"),
        ("arc_challenge", ["ARC-Easy/test-0.json", "ARC-Challenge/test/0000.json"], "ARC-Challenge/test/0000.json"),
        ("arc_easy", ["ARC-Easy-Dev.jsonl"], "ARC-Easy-Dev.jsonl"),
        ("winogrande", ["winogrande_xl/validation-0.json", "winogrande_xs/validation-0.json"], "winogrande_xl/validation-0.json"),
        ("piqa", ["validation.json", "validation.jsonl", ".cache/validation.jsonl"], "validation.jsonl"),
        ("lambada", ["de/test-0.json", "default/test-0.json", "README.md"], "default/test-0.json"),
    ],
)  # fmt: skip
def test_which_file_of_a_folder_is_asked(name, tree, found, tmp_path):
    for file in tree:
        path = tmp_path / file
        jsonl(path, ROWS[name])
        if path.suffix == ".json":
            path.write_text(json.dumps(ROWS[name]))
    assert read(name, tmp_path).about["path"] == str(tmp_path / found)


def test_another_benchmark_is_not_taken_for_the_one_that_is_asked(tmp_path):
    jsonl(tmp_path / "a" / "ARC-Challenge" / "ARC-Challenge-Test.jsonl", ARC)
    jsonl(tmp_path / "b" / "wikitext-103" / "test.jsonl", [{"page": page} for page in PAGES])
    for name, root in [("arc_easy", tmp_path / "a"), ("wikitext2", tmp_path / "b")]:
        with pytest.raises(UserError, match="E127.*no file named test, validation"):
            read(name, root)


def test_a_split_may_lie_in_several_files(tmp_path):
    for n in range(3):
        jsonl(tmp_path / f"validation-0000{n}-of-00003-{'abc'[n]}.jsonl", BOOLQ[n : n + 1])
    whole = read("boolq", jsonl(tmp_path / "one" / "x.jsonl", BOOLQ))
    assert prompts(read("boolq", tmp_path)) == prompts(whole)


def test_mmlus_folder_is_one_task(tmp_path):
    """Its accuracy is then weighted by the subjects' sizes, as lm-eval's group is."""
    for split, first in [("test", 0), ("dev", 50), ("val", 90)]:
        for subject in ("anatomy", "us_history"):
            path = tmp_path / "data" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [f"{subject} {first + n}?,a,b,c,d,{'ABCD'[n % 4]}\n" for n in range(6)]
            path.write_text("".join(rows))
    task = read("mmlu", tmp_path)
    assert (task.name, len(task), task.about["shots"]) == ("mmlu", 12, 5)
    assert task.about["subjects"] == {"anatomy": 6, "us_history": 6}
    header = task.ask(task.records[7]).header
    assert header.startswith(
        "The following are multiple choice questions (with answers) about us history.\n\nus_history 50?\nA. a"
    )
    assert "anatomy" not in header and "us_history 54?" in header and "us_history 55?" not in header
    assert read("mmlu", tmp_path / "data/test/anatomy_test.csv").name == "mmlu_anatomy"
    (tmp_path / "data/dev/us_history_dev.csv").unlink()
    with pytest.raises(UserError, match="about us_history"):
        read("mmlu", tmp_path)


# ---------------------------------------------------------------- examples


def test_examples_depend_on_the_question_and_the_seed_only(tmp_path):
    """Not on the limit, nor on what was asked before; never the question itself."""
    rows = [{"text": f"word {n} the end{n}"} for n in range(30)]
    path = jsonl(tmp_path / "lambada_test.jsonl", rows)
    task, few = read("lambada", path, shots=4), read("lambada", path, shots=4, limit=3)
    expected = prompts(task)
    assert prompts(few) == expected and len(few) == 3
    for (_, pairs), row in zip(expected, rows):
        *examples, asked = "".join(pairs[0]).split("\n\n")
        assert asked == row["text"] and asked not in examples and len(set(examples)) == 4
    drawn = Counter(example for _, pairs in expected for example in pairs[0][0].split("\n\n")[:-1])
    assert len(drawn) > 20  # out of all
    assert prompts(read("lambada", path, shots=4, seed=5)) != expected
    with pytest.raises(UserError, match="E127.*30 examples are wanted.*there are 29"):
        read("lambada", path, shots=30)


def test_examples_are_those_beside_the_file(tmp_path):
    """From the train split of the same table, not of another that lies there too."""
    path = jsonl(tmp_path / "piqa_valid.jsonl", PIQA)
    jsonl(tmp_path / "boolq_train.jsonl", BOOLQ)
    alone = read("piqa", path, shots=1)  # nothing is beside it: out of itself
    assert all(row["goal"] not in alone.ask(row).header for row in alone.records)
    other = [row | {"goal": "train"} for row in PIQA]
    train = jsonl(tmp_path / "piqa_train.jsonl", other)
    task = read("piqa", path, shots=2)
    assert task.about["examples"] == str(train)
    assert task.ask(task.records[0]).header.count("Question: train\nAnswer: use") == 2
    # the questions are the same whatever stands before them: --compare looks at that
    assert task.about["sha256"] == read("piqa", path).about["sha256"]
    jsonl(train, other[:2])
    now = read("piqa", path, shots=2).about
    assert now["examples_sha256"] != task.about["examples_sha256"]


# ---------------------------------------------------------------- broken rows

BROKEN = [
    ("boolq", {"passage": None}, "passage is missing"),
    ("boolq", {"label": -1}, "label is -1.*test split"),
    ("hellaswag", {"endings": "one"}, "endings is 'one'.*list"),
    ("hellaswag", {"label": "7"}, "label is '7'.*0, 1, 2, 3"),
    ("hellaswag", {"endings": ["a", ""]}, "empty"),
    ("arc_easy", {"answerKey": "Z"}, "answerKey is 'Z'.*1, 2, 3"),
    ("arc_easy", {"choices": ["x", "y"]}, "choices is"),
    ("arc_easy", {"choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}}, "2 texts"),
    ("piqa", {"sol2": ["a"]}, "sol2 is"),
    ("winogrande", {"sentence": "no blank"}, "sentence is 'no blank'"),
    ("winogrande", {"answer": ""}, "answer is ''.*1, 2.*test split"),
    ("lambada", {"text": "word"}, "text is 'word'"),
    ("mmlu", {"choices": ["a", "b"]}, "four"),
    ("mmlu", {"answer": 4}, "answer is 4"),
]


@pytest.mark.parametrize("name, wrong, text", BROKEN)
def test_a_bad_row_says_where(name, wrong, text, tmp_path):
    rows = [ROWS[name][0], ROWS[name][1] | wrong]
    rows[1] = {key: value for key, value in rows[1].items() if value is not None}
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=f"E127.*x.jsonl, line 2: .*{text}"):
        read(name, path, shots=0)


def test_a_bad_file_says_why(tmp_path):
    path = tmp_path / "a.jsonl"
    for name, content, text in [
        ("boolq", "{", "line 1"),
        ("boolq", "\n", "no rows"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c"}\n', "a-labels.lst"),
        ("wikitext2", '{"text": 1.5}\n{"text": []}\n', "line 2: text is"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=f"E127.*a.jsonl.*{text}"):
            read(name, path)
    for missing, text in [("nowhere", "no such file"), ("", "no file named validation")]:
        with pytest.raises(UserError, match=f"E127.*{text}"):
            read("boolq", tmp_path / missing)
    (tmp_path / "a-labels.lst").write_text("0\n1\n")
    path.write_text('{"goal": "a", "sol1": "b", "sol2": "c"}\n')
    with pytest.raises(UserError, match="E127.*2 labels for 1 rows"):
        read("piqa", path)
    jsonl(tmp_path / "v" / "a_val.jsonl", BOOLQ)
    jsonl(tmp_path / "v" / "b_val.jsonl", BOOLQ)
    with pytest.raises(UserError, match="E127.*which of these"):
        read("boolq", tmp_path / "v")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match="E127.*rows with fields"):
        read("boolq", tmp_path / "b.txt")
    (tmp_path / "x_test.csv").write_text("why,a,b,c,d,A\nwhy,a,b,c,d,E\n")
    with pytest.raises(UserError, match="E127.*line 2: answer is 'E'"):
        read("mmlu", tmp_path / "x_test.csv")
    (tmp_path / "x_test.csv").write_bytes(b"why \xff,a,b,c,d,A\n")
    with pytest.raises(UserError, match="E127.*0xff"):
        read("mmlu", tmp_path / "x_test.csv")
    (tmp_path / "x_test.csv").write_text("question,A,B,C,D,answer\nwhy,a,b,c,d,A\nwhy,a\n")
    with pytest.raises(UserError, match="E127.*line 3: 2 cells instead of 6"):
        read("mmlu", tmp_path / "x_test.csv")


# ---------------------------------------------------------------- CORE

CORE_ROWS = {
    "multiple_choice": [
        {
            "query": f"Q{n}\nPassage: p{n}\nQuestion: is it {n}?\n",
            "choices": ["no", "nope"],
            "gold": n % 2,
        }
        for n in range(5)
    ],
    "schema": [
        {"context_options": [f"Ann {n}", f"Eve {n}"], "continuation": f"left {n}.", "gold": n % 2}
        for n in range(5)
    ],
    "language_modeling": [
        {"context": f" one {n} \n", "continuation": f"two {n}"} for n in range(5)
    ],
}


@pytest.fixture
def bundle(tmp_path):
    tasks = []
    for kind, rows in CORE_ROWS.items():
        task = {
            "label": kind[:3],
            "dataset_uri": f"x/{kind}.jsonl",
            "num_fewshot": [2],
            "icl_task_type": kind,
        }
        tasks.append(task)
        jsonl(tmp_path / "eval_data" / "x" / f"{kind}.jsonl", rows)
    tasks[0]["continuation_delimiter"] = "\nAnswer: "
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    lines = ["Eval Task,Task Category,Random baseline", "mul,a,62", "sch,b,50", "lan,c,0.0"]
    (tmp_path / "eval_meta_data.csv").write_text("\n".join(lines))
    return tmp_path


def drawn(rows, i, n=2):
    """nanochat's examples of row i: the file is shuffled, then each place draws out of the rest."""
    data = list(range(len(rows)))
    random.Random(1337).shuffle(data)
    place = data.index(i)
    others = [j for j in range(len(data)) if j != place]
    return [rows[data[j]] for j in random.Random(1234 + place).sample(others, n)]


def test_core_asks_as_nanochat_does(bundle):
    choice, schema, cloze = read_core(bundle, Options())
    for i in range(5):
        row = CORE_ROWS["multiple_choice"][i]
        header = "".join(
            f"{r['query']}\nAnswer: {r['choices'][r['gold']]}\n\n"
            for r in drawn(CORE_ROWS["multiple_choice"], i)
        )
        pairs = [(header + row["query"], f"\nAnswer: {text}") for text in row["choices"]]
        assert prompts(choice)[i] == (row["gold"], pairs)

        row = CORE_ROWS["schema"][i]
        header = "".join(
            f"{r['context_options'][r['gold']]} {r['continuation']}\n\n"
            for r in drawn(CORE_ROWS["schema"], i)
        )
        pairs = [(header + text, f" {row['continuation']}") for text in row["context_options"]]
        assert prompts(schema)[i] == (row["gold"], pairs)

        row = CORE_ROWS["language_modeling"][i]
        header = "".join(
            f"{r['context'].strip()} {r['continuation']}\n\n"
            for r in drawn(CORE_ROWS["language_modeling"], i)
        )
        assert prompts(cloze)[i] == (0, [(header + f"one {i}", f" two {i}")])
    assert [task.about["baseline"] for task in (choice, schema, cloze)] == [0.62, 0.5, 0]
    assert [task.metric for task in (choice, schema, cloze)] == ["acc_tokens", "acc_tokens", "acc"]
    assert [choice.ask(record).label for record in choice.records] == [
        "no",
        "nope",
        "no",
        "nope",
        "no",
    ]
    assert cloze.ask(cloze.records[3]).label == "two 3"
    assert choice.name == "core_mul"


class Letters:
    """A tokenizer of letters."""

    eot_id, n_vocab = 0, 256

    def encode(self, text):
        return SimpleNamespace(tolist=lambda: [ord(letter) for letter in text])

    def decode_bytes(self, ids):
        return bytes(ids)


class Noted(Scorer):
    """Notes what it is asked for."""

    def __init__(self):
        self.tokenizer, self.asked = Letters(), []

    def ids(self, sequences, shared=0):
        self.asked.append([("".join(map(chr, ids[n:])), ids[0]) for ids, n in sequences])
        return [Scored(-1.0, len(ids) - n, True) for ids, n in sequences]


def test_core_scores_what_nanochat_scores(bundle):
    """Choices behind what they begin with alike, schemas what they end with alike, a cloze behind
    its context; <|endoftext|> in front."""
    (bundle / "eval_data/x/schema.jsonl").write_text(
        json.dumps({"context_options": ["the cat", "a bat"], "continuation": "sat", "gold": 1})
        + "\n"
    )
    scored = []
    for task in read_core(bundle, Options(shots=0, control=False)):
        scorer = Noted()
        line = task.line(0, Asked(None, None, scorer=scorer))
        scored.append(scorer.asked)
        assert line["tokens"] == line["bytes"] == [len(text) for text, _ in scorer.asked[0]]
    assert scored[0] == [[("o", 0), ("ope", 0)]]
    assert scored[1] == [[("at sat", 0), ("at sat", 0)]]
    assert scored[2] == [[(" two 0", 0)]]


def test_core_controls(bundle):
    """The passage, the question before listed choices, a schema's end, a cloze's context."""
    choice, schema, cloze = read_core(bundle, Options(shots=0))
    assert prompts(choice, control=True)[0][1][0][0] == "Q2\nPassage: p2\nQuestion: is it 0?\n"
    assert prompts(schema, control=True)[0][1] == [("Ann 0", " left 2."), ("Eve 0", " left 2.")]
    assert prompts(cloze, control=True)[0][1] == [("one 2", " two 0")]
    rows = [
        {"query": f"Why {n}?\nA. x{n}\nB. y", "choices": ["A", "B"], "gold": 0} for n in range(2)
    ]
    jsonl(bundle / "eval_data/x/multiple_choice.jsonl", rows)
    choice = read_core(bundle, Options(shots=0))[0]
    assert prompts(choice, control=True)[0][1][0][0] == "Why 1?\nA. x0\nB. y"


def score(task, value, control=None, stderr=0.1):
    return Score(
        task, "acc", value, 100, stderr, 0, 1, 0.5, 0.62, control, stderr, 10, 2.0, True, "higher"
    )


def test_core_by_hand():
    done = {
        "core_a": {"about": {"baseline": 0.5}, "scores": [score("core_a", 0.7, 0.5), None]},
        "core_b": {"about": {"baseline": 0.0}, "scores": [score("core_b", 0.2, 0.0)]},
        "other": {"about": {}, "scores": [score("other", 1.0)]},
        "lm-eval": {"scores": [score("x", 1.0)]},
    }
    (found,) = core_result(done)["core"]["scores"]
    assert found.value == pytest.approx((0.2 / 0.5 + 0.2) / 2) and found.control == 0
    assert found.majority == pytest.approx((0.12 / 0.5 + 0.62) / 2) and found.chance == 0
    assert found.stderr == found.control_stderr == pytest.approx((0.2**2 + 0.1**2) ** 0.5 / 2)
    assert found.high - found.value == pytest.approx(1.96 * found.stderr)
    assert (found.n, found.n_control, found.seconds) == (200, 20, 4.0)
    assert "2 tasks" in found.verdict and found.row()["nan"] == []
    done["core_b"]["scores"] = [score("core_b", 0.2, None, None)]
    (found,) = core_result(done)["core"]["scores"]
    assert found.stderr is found.control is found.low is None
    for value, words in ((0.7, ""), (0.41, "no better than chance"), (math.nan, "NaN")):
        whole = {"about": {"baseline": 0.4}, "scores": [score("x", value)]}
        whole = {str(n): whole for n in range(22)}
        assert core_result(whole)["core"]["scores"][0].verdict == words
    assert core_result({}) == core_result({"other": done["other"]}) == {}


def test_core_names_what_is_missing(bundle):
    (bundle / "eval_data/x/schema.jsonl").unlink()
    (bundle / "eval_data/x/language_modeling.jsonl").unlink()
    with pytest.raises(UserError, match="E127.*schema.jsonl.*language_modeling.jsonl"):
        read_core(bundle, Options())
    (bundle / "eval_data/x/schema.jsonl").write_text('{"context_options": ["a", "b"], "gold": 0}')
    (bundle / "eval_data/x/language_modeling.jsonl").write_text("{}")
    with pytest.raises(UserError, match="E127.*schema.jsonl, line 1: continuation is missing"):
        read_core(bundle, Options())
    with pytest.raises(UserError, match="E127.*9 examples are wanted of 4 others"):
        read_core(bundle, Options(shots=9))
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmul,62\nsch,x\n")
    with pytest.raises(UserError, match="E127.*missing of sch, lan"):
        read_core(bundle, Options())
    (bundle / "core.yaml").write_text("icl_tasks: [{label: x}]")
    with pytest.raises(UserError, match="E127.*core.yaml.*num_fewshot"):
        read_core(bundle, Options())
    (bundle / "core.yaml").unlink()
    with pytest.raises(UserError, match="E127.*lacks core.yaml of"):
        read_core(bundle, Options())
