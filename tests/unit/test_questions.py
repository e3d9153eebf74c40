"""evaluate.ask, lumen/answers.py and lumen/tasks.py: every question is asked once, an evaluation
that was stopped goes on, and a task's file is read or refused with its line."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from lumen.answers import Answers, ask
from lumen.errors import UserError
from lumen.questions import Options, Task, chosen, partner
from lumen.tasks import find_tasks, in_folder


class Ranks:
    """One of several ranks that never meet: the others have asked and said what this one did."""

    collective_free = True

    def __init__(self, rank=0, world=1, free=True):
        self.rank, self.world, self.collective_free = rank, world, free

    def rows(self):
        return self.rank, self.world

    def all_reduce_max(self, flags):
        return flags

    def gather(self, x):
        return [x]

    def run_or_raise_on_all(self, do, *args):
        return do(*args)


@dataclass
class Squares(Task):
    """Question i is i + 10; the answer its square."""

    n: int = 20
    asked: list = field(default_factory=list)
    fails_at: int = -1

    def __len__(self):
        return self.n

    def number(self, i):
        return i + 10

    def line(self, i, asked):
        if i == self.fails_at:
            raise UserError("E127", "no answer")
        self.asked.append(i)
        return {"i": i + 10, "square": (i + 10) ** 2}


def squares(**more) -> Squares:
    return Squares("squares", Options(), **more)


def test_lines_come_in_order_and_each_rank_asks_its_part():
    task = squares()
    assert [line["i"] for line in ask(task, None, Ranks())] == list(range(10, 30))
    parts = [squares(), squares()]
    for rank, part in enumerate(parts):
        with pytest.raises(KeyError):  # the other's lines, which no other brings here
            ask(part, None, Ranks(rank, 2))
    assert sorted(parts[0].asked + parts[1].asked) == list(range(20))
    assert len(parts[0].asked) == 10
    together = squares()
    ask(together, None, Ranks(1, 2, free=False))  # FSDP: a forward pass takes all ranks
    assert together.asked == list(range(20))


def test_what_was_stopped_goes_on(tmp_path):
    bars = []
    task = squares(fails_at=11)
    kept = Answers(tmp_path, "a/b", "key")
    with pytest.raises(UserError):
        ask(task, None, Ranks(), kept, bar=bars.append)
    kept.close()
    assert bars == [8]
    (part,) = tmp_path.glob("a_b*.part")
    with part.open("a") as file:
        file.write('{"i": 21, "squ')  # the process was killed in a write
    task = squares()
    kept = Answers(tmp_path, "a/b", "key")
    lines = ask(task, None, Ranks(), kept)
    assert task.asked == list(range(11, 20))
    assert lines == [{"i": i, "square": i * i} for i in range(10, 30)]
    kept.close()
    kept.finish(lines)
    assert not part.exists()
    task = squares()
    assert ask(task, None, Ranks(), Answers(tmp_path, "a/b", "key")) == lines
    assert not task.asked
    few = Answers(tmp_path, "a/b", "key")
    few.finish(ask(squares(n=3), None, Ranks(), few))  # a smaller --limit takes no answer away
    assert list(Answers(tmp_path, "a/b", "key").read().values()) == lines
    assert Answers(tmp_path, "a/b", "another model").read() == {}


@pytest.mark.parametrize("reply", ["a\u2028b", "\x85", "\ud800", "é\n"])
def test_every_reply_is_read_again(tmp_path, reply):
    kept = Answers(tmp_path, "t", "key")
    lines = [{"i": 0, "reply": reply}, {"i": 1, "reply": "c"}]
    for line in lines:
        kept.append(line)
    kept.close()
    assert list(Answers(tmp_path, "t", "key").read().values()) == lines
    kept.finish(lines)
    assert list(Answers(tmp_path, "t", "key").read().values()) == lines


def test_a_full_disk_takes_no_answer_away(tmp_path, monkeypatch):
    kept = Answers(tmp_path, "t", "key")
    kept.append({"i": 0})
    kept.close()
    again = Answers(tmp_path, "t", "key")
    monkeypatch.setattr("lumen.files.sync", full)
    with pytest.raises(UserError) as caught:
        again.append({"i": 1})
    assert caught.value.code == "E119"
    assert again.read() == {0: {"i": 0}}


def full(path):
    raise OSError(28, "No space left on device")


def test_lines_that_are_no_answers_are_asked_again(tmp_path):
    for number, text in enumerate(["[]", '{"key": "key"}\n5', '{"key": "key"}\n{}', "\0\0", ""]):
        (tmp_path / f"t.rank{number}.part").write_text(text + "\n")
    assert Answers(tmp_path, "t", "key").read() == {}


def test_any_reply_is_one_line_and_any_name_one_file(tmp_path):
    lines = [{"i": 0, "reply": "a\u2028b\x85c\nd"}, {"i": 1, "reply": "e"}]
    kept = Answers(tmp_path, "a/b", "key")
    for line in lines:
        kept.append(line)
    kept.close()
    assert list(Answers(tmp_path, "a/b", "key").read().values()) == lines
    assert Answers(tmp_path, "a_b", "key").read() == Answers(tmp_path, "a:b", "key").read() == {}


def test_a_signal_leaves_and_a_fault_is_no_silence():
    assert ask(squares(), None, Ranks(), stop=lambda: 1) is None

    class Broken(Squares):
        def line(self, i, asked):
            raise ZeroDivisionError("ours")

    with pytest.raises(RuntimeError, match="ZeroDivisionError: ours"):
        ask(Broken("b", Options()), None, Ranks())

    class Large(Squares):
        def line(self, i, asked):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="b: a question does not fit.*--precision") as caught:
        ask(Large("b", Options()), None, Ranks())
    assert caught.value.code == "E200"


def test_which_questions_are_asked_depends_on_the_seed_only():
    some = chosen(100, Options(limit=10))
    assert some == chosen(100, Options(limit=10)) == sorted(set(some))
    few = [set(chosen(642, Options(limit=limit))) for limit in (5, 60, 100, 500)]
    assert few[0] < few[1] < few[2] < few[3], "a larger limit asks only what is new"
    assert some != list(range(10)) and chosen(5, Options(limit=10)) == [0, 1, 2, 3, 4]
    assert sorted(partner(i, 7) for i in range(7)) == list(range(7))
    assert all(partner(i, n) != i for n in (2, 3, 7) for i in range(n))


# ---------------------------------------------------------------- files

ROWS = [
    {"question": "1 + 1?", "choices": ["2", "3"], "answer": 0},
    {"question": "1 + 2?", "choices": ["2", "3"], "answer": "B"},
    {"question": "1 + 3?", "choices": ["2", "4"], "answer": "4"},
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only(spec, options=None):
    (task,) = find_tasks([spec], None, options or Options())
    return task


def test_choices_of_ones_own(tmp_path):
    task = only(write(tmp_path / "sums.jsonl", ROWS))
    questions = [task.ask(row) for row in task.records]
    assert [question.answer for question in questions] == [0, 1, 1]
    assert questions[1].pairs[0] == ("Question: 1 + 2?\nAnswer:", " 2")
    assert (task.name, task.metric, task.swap) == ("sums", "acc_bytes", ("question",))
    assert list(task.texts())[2] == (2, "1 + 3? 4")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    row = {"question": "\ud800?", "choices": ["\udc00b", "é"], "answer": 0, "examples": []}
    row["examples"].append({**row, "examples": None})
    task = only(write(tmp_path / "q.jsonl", [row, row]))
    question = task.ask(task.records[0])
    assert question.pairs[0] == ("Question: \ufffd?\nAnswer:", " \ufffdb")
    assert question.header == "Question: \ufffd?\nAnswer: \ufffdb\n\n"


def test_by_letter(tmp_path):
    task = only(write(tmp_path / "sums.jsonl", ROWS), Options(by_letter=True))
    question = task.ask(task.records[2])
    context = "Question: 1 + 3?\nA. 2\nB. 4\nAnswer:"
    assert question.pairs == ((context, " A"), (context, " B")) and question.label == "B"
    # its control: another's question above the same choices
    context = f"Question: {ROWS[partner(2, 3)]['question']}\nA. 2\nB. 4\nAnswer:"
    assert task.control(2).pairs[0][0] == context


def test_shots_stand_before_all_questions_alike(tmp_path):
    rows = [*ROWS, ROWS[0] | {"examples": ROWS[1:2]}, ROWS[1] | {"examples": None}]
    task = only(write(tmp_path / "sums.jsonl", rows), Options(shots=1))
    asked = [task.records[task.number(i)] for i in range(len(task))]
    headers = [task.ask(row).header for row in asked if not row.get("examples")]
    assert len(set(headers)) == 1 and len(task) == 4
    shown = headers[0].removesuffix("\n\n")
    assert shown in ["Question: 1 + 1?\nAnswer: 2", "Question: 1 + 2?\nAnswer: 3"] + [
        "Question: 1 + 3?\nAnswer: 4"
    ]
    own = [task.ask(row).header for row in asked if row.get("examples")]
    assert all("Question: 1 + 2?\nAnswer: 3\n\n" in header for header in own)


@pytest.mark.parametrize("kind", ["choice", "reply"])
def test_a_question_has_its_number_whatever_is_shown_before_it(tmp_path, kind):
    """So that models can be compared with and without examples."""
    rows = [{"question": str(i), "choices": ["a", "b"], "answer": i % 2} for i in range(9)]
    if kind == "reply":
        rows = [{"prompt": str(i), "answer": "a"} for i in range(9)]
    path = write(tmp_path / "q.jsonl", rows)
    task = only(path, Options(shots=3))
    numbers = [task.number(i) for i in range(len(task))]
    texts = [record.get("question", record.get("prompt")) for record in task.records]
    assert len(numbers) == 6 == len(set(numbers)) and texts == [str(i) for i in range(9)]
    few = only(path, Options(shots=3, limit=4))
    assert {few.number(i) for i in range(4)} < set(numbers)
    shown = few.shown
    assert shown.isdisjoint(numbers) and len(shown) == 3


def test_a_cloze(tmp_path):
    row = {"context": "To be or not to", "continuation": " be"}
    task = only(write(tmp_path / "end.jsonl", [row, row]))
    assert task.ask(row).pairs == (("To be or not to", " be"),)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "question: 3"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "choices"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer: 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer"),
        ({"question": "q", "choices": ["a", "b"]}, "answer"),
        ({"question": "q", "choices": ["a", "b"], "answer": ""}, "answer: ''"),
        ({"question": "q", "choices": ["a", "b"], "answer": "AB"}, "answer: 'AB'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0, "examples": 5}, "examples"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0, "examples": [{}]}, "question"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, words):
    path = write(tmp_path / "q.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=f"q.jsonl, line 2: {words}") as caught:
        find_tasks([path], None, Options())
    assert caught.value.code == "E127"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("docstring", "did you mean docstrings"),
        ("boolq", "boolq:PATH, or --data"),
        ("boolq:/nowhere", "does not exist"),
        ("no.jsonl", "no task is called no.jsonl"),
    ],
)
def test_unknown_tasks(spec, words):
    with pytest.raises(UserError, match=words) as caught:
        find_tasks([spec], None, Options())
    assert caught.value.code == "E127"


@pytest.mark.parametrize(
    "spec, names, found",
    [
        ("hellaswag", ["hellaswag_val.jsonl", "hellaswag_train.jsonl"], "hellaswag_val.jsonl"),
        ("winogrande", ["winogrande_1.1"], "winogrande_1.1"),
        ("wikitext2", ["wikitext-2-raw", "wikitext-103-raw"], "wikitext-2-raw"),
        ("boolq", ["BoolQ.jsonl", "boolq_val.jsonl"], "BoolQ.jsonl"),
        ("boolq", ["boolq_dev.jsonl", "boolq_test.jsonl"], "boolq_dev.jsonl or boolq:"),
        ("mmlu", ["mmlu_pro"], "has no mmlu"),
    ],
)
def test_data_finds_files_as_they_are_published(tmp_path, spec, names, found):
    for name in names:
        (tmp_path / name).mkdir()
    if " " not in found:
        assert in_folder(spec, tmp_path).name == found
        return
    with pytest.raises(UserError, match=found):
        in_folder(spec, tmp_path)


def test_broken_files_and_doubles(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question"\n')
    with pytest.raises(UserError, match="q.jsonl, line 1"):
        find_tasks([str(path)], None, Options())
    path.write_text("")
    with pytest.raises(UserError, match="no rows"):
        find_tasks([str(path)], None, Options())
    path = write(tmp_path / "q.jsonl", ROWS)
    with pytest.raises(UserError, match="two tasks are called q"):
        find_tasks([path, path], None, Options())
