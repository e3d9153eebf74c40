"""Public evaluation files that a user has, as tasks. What is asked is word for word what lm-eval
0.4.13 asks (its task files), so that scores compare with published ones.

A benchmark is how a row of any of its public files becomes a record, and a record a question; and
its line in FORMS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lumen.errors import UserError
from lumen.evaluation_files import DEV, TEST, VALIDATION, Record, asked_files, subject_of
from lumen.forms import Form, by_subject, read_form, task_of
from lumen.questions import Options, Question, Task
from lumen.wikitext import read_wikitext


def continuations(context: str, choices: list[str], answer: int, label: str = "") -> Question:
    """Each choice behind the same context and a space, lm-eval's target_delimiter."""
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Question(pairs, answer, label)


# ---------------------------------------------------------------- BoolQ (Clark et al. 2019)


def read_boolq(row: Record) -> dict:
    """Google's has `answer`, SuperGLUE's and Hugging Face's have `label`."""
    field = "answer" if "answer" in row.row else "label"
    answers = {"False": 0, "false": 0, "0": 0, "True": 1, "true": 1, "1": 1}
    texts = {name: row.text(name) for name in ("question", "passage")}
    return texts | {"answer": row.index(field, answers)}


def ask_boolq(record: dict) -> Question:
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    choices = ["no", "yes"]
    return continuations(context, choices, record["answer"], choices[record["answer"]])


# ---------------------------------------------------------------- HellaSwag (Zellers et al. 2019)


def read_hellaswag(row: Record) -> dict:
    endings = row.texts("endings")
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    label = row.index("label", [str(i) for i in range(len(endings))])
    context = without_marks(f"{row.text('activity_label')}: {context}")
    return {"ctx": context, "endings": [without_marks(one) for one in endings], "answer": label}


def without_marks(text: str) -> str:
    """Without the brackets that WikiHow's texts have kept."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def ask_hellaswag(record: dict) -> Question:
    return continuations(record["ctx"], record["endings"], record["answer"])


# ---------------------------------------------------------------- ARC (Clark et al. 2018)


def read_arc(row: Record) -> dict:
    """AI2's has {question: {stem, choices: [{text, label}]}}, Hugging Face's {question, choices:
    {text, label}}."""
    fields = row.row
    question = fields.get("question")
    if isinstance(question, dict):
        choices = question.get("choices")
        fields = fields | {"question": question.get("stem")}
        if isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
            choices = {name: [one.get(name) for one in choices] for name in ("text", "label")}
        fields["choices"] = choices
    row = row._replace(row=fields)
    choices = fields.get("choices")
    if not isinstance(choices, dict):
        raise row.bad("choices", "it should be {text: [...], label: [...]}")
    inner = row._replace(row=choices | {"answerKey": fields.get("answerKey")})
    texts, labels = inner.texts("text"), inner.texts("label")
    if len(texts) != len(labels):
        raise inner.bad("label", f"there are {len(texts)} texts")
    answer = inner.index("answerKey", labels)
    return {"question": row.text("question"), "choices": texts, "answer": answer}


def ask_arc(record: dict) -> Question:
    context = f"Question: {record['question']}\nAnswer:"
    letter = chr(ord("A") + record["answer"])
    return continuations(context, record["choices"], record["answer"], letter)


# ---------------------------------------------------------------- PIQA (Bisk et al. 2020)


def read_piqa(row: Record) -> dict:
    texts = {name: row.text(name) for name in ("goal", "sol1", "sol2")}
    return texts | {"answer": row.index("label", ["0", "1"])}


def ask_piqa(record: dict) -> Question:
    context = f"Question: {record['goal']}\nAnswer:"
    return continuations(context, [record["sol1"], record["sol2"]], record["answer"])


def with_labels(rows: list[Record]) -> list[Record]:
    """The labels of valid.jsonl lie in valid-labels.lst."""
    if not rows or "label" in rows[0].row:
        return rows
    path = rows[0].path
    labels = path.with_name(f"{path.name.partition('.')[0]}-labels.lst")
    if not labels.is_file():
        raise rows[0].bad("label", f"nor is there a {labels.name} beside it")
    found = labels.read_text().split()
    if len(found) != len(rows):
        raise UserError("E127", f"{labels}: {len(found)} labels for {len(rows)} rows of {path}")
    return [row._replace(row=row.row | {"label": one}) for row, one in zip(rows, found)]


# ---------------------------------------------------------------- WinoGrande (Sakaguchi 2019)


def read_winogrande(row: Record) -> dict:
    """The question is which option makes what follows the blank likelier (Trinh and Le 2018)."""
    before, blank, after = row.text("sentence").partition("_")
    if not blank:
        raise row.bad("sentence", "there is no _ in it, the blank")
    options = [row.text("option1"), row.text("option2")]
    answer = row.index("answer", ["1", "2"])
    return {"before": before, "options": options, "after": after.strip(), "answer": answer}


def ask_winogrande(record: dict) -> Question:
    after = f" {record['after']}"
    pairs = tuple((record["before"] + option, after) for option in record["options"])
    return Question(pairs, record["answer"])


# ---------------------------------------------------------------- LAMBADA (Paperno et al. 2016)


def read_lambada(row: Record) -> dict:
    context, space, word = row.text("text").rpartition(" ")
    if not space:
        raise row.bad("text", "it should be a passage of several words")
    return {"context": context, "word": word}


def ask_lambada(record: dict) -> Question:
    """The last word of a passage, which counts where it is greedy. Its label is the word itself:
    the majority is the most frequent one."""
    return Question(((record["context"], f" {record['word']}"),), 0, record["word"])


# ---------------------------------------------------------------- MMLU (Hendrycks et al. 2021)

MMLU_COLUMNS = ("question", *"ABCD", "answer")


def read_mmlu(row: Record) -> dict:
    """The authors' .csv has a column a choice and the letter, Hugging Face's a list and a
    number."""
    if "choices" in row.row:
        choices = row.texts("choices")
        if len(choices) != 4:
            raise row.bad("choices", "it should be four texts")
    else:
        choices = [row.text(letter) for letter in "ABCD"]
    answers = {name: i for i, letter in enumerate("ABCD") for name in (letter, str(i))}
    subject = row.row.get("subject") or subject_of(row.path)
    record = {"question": row.text("question"), "choices": choices, "subject": subject}
    return record | {"answer": row.index("answer", answers)}


def ask_mmlu(record: dict) -> Question:
    lines = [record["question"].strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip("ABCD", record["choices"])]
    context = "\n".join([*lines, "Answer:"])
    return continuations(context, list("ABCD"), record["answer"], "ABCD"[record["answer"]])


def describe_mmlu(record: dict) -> str:
    subject = record["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


# ---------------------------------------------------------------- all of them

ARC = Form(
    read_arc,
    ask_arc,
    ("question",),
    (TEST, VALIDATION),  # where the answers of a test split are public, lm-eval asks it
    wanted=("easy",),
    unwanted=("challenge",),
)
MMLU = Form(
    read_mmlu,
    ask_mmlu,
    ("question",),
    (TEST, ("val", "validation")),
    examples=(DEV,),
    wanted=("mmlu",),
    columns=MMLU_COLUMNS,
    describe=describe_mmlu,
    first=True,
)
FORMS = {
    "boolq": Form(read_boolq, ask_boolq, ("passage",), (VALIDATION,), wanted=("boolq",)),
    "hellaswag": Form(read_hellaswag, ask_hellaswag, ("ctx",), (VALIDATION,), metric="acc_bytes"),
    "arc_easy": ARC,
    "arc_challenge": replace(ARC, metric="acc_bytes", wanted=("challenge",), unwanted=("easy",)),
    "piqa": Form(
        read_piqa, ask_piqa, ("goal",), (VALIDATION,), metric="acc_bytes", complete=with_labels
    ),
    "winogrande": Form(read_winogrande, ask_winogrande, ("after",), (VALIDATION,), wanted=("xl",)),
    "lambada": Form(
        read_lambada,
        ask_lambada,
        ("context",),
        (TEST, VALIDATION),
        examples=(),
        wanted=("default",),
    ),
}


def read_mmlu_files(path: Path, options: Options) -> list[Task]:
    """One task of all subjects that are there, so that its accuracy is weighted by their size, as
    that of lm-eval's group is; of one subject alone mmlu_SUBJECT. By itself five examples."""
    tables = asked_files(MMLU.place(path), MMLU.splits)
    whole = [paths for paths in tables if paths[0].parent.name == "all"]  # Hugging Face's has both
    n = 5 if options.shots is None else options.shots
    task = task_of("mmlu", MMLU, whole or tables, n, options)
    subjects = by_subject(task.records)
    task.about["subjects"] = {subject: len(found) for subject, found in subjects.items()}
    if len(subjects) == 1:
        task.name = f"mmlu_{task.records[0]['subject']}"
    return [task]


# name -> (file or folder, options) -> its tasks. UserError E127, E003
READERS: dict[str, Callable[[Path, Options], list[Task]]] = {
    **{name: partial(read_form, name, form) for name, form in FORMS.items()},
    "mmlu": read_mmlu_files,
    "wikitext2": partial(read_wikitext, "wikitext2", ("wikitext-2", "wikitext-103")),
    "wikitext103": partial(read_wikitext, "wikitext103", ("wikitext-103", "wikitext-2")),
}
