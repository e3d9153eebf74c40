"""What a model is asked in an evaluation: tasks, their questions, and the line that each leaves.

A task makes one line, a JSON object, of each of its questions; the line depends on the model and on
that question only: not on the batch, the order, the number of processes. Scores are made of lines
(lumen/scores.py), by whoever reads them, and as often as one likes.

kind choice: {i, answer, label, logprobs, tokens, bytes, greedy, control: {logprobs, greedy}};
    lists with an entry a choice; a cloze is a choice of one, which counts where it is greedy;
    cut: tokens of its beginning that the model's context had no room for, where there are any
kind text:   {i, nats, tokens, right, bytes, words, majority, control: {nats, tokens}};
    majority: nats under the text's own unigram frequencies, the best that sees no context
kind reply:  {i, reply, ended, tokens, found: {metric: 0 to 1}, label, control: {found}}
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lumen.errors import UserError


@dataclass
class Asked:
    """The model that is asked, and what its answers depend on beside it. What they hold is
    remembered: a model that has changed since gets another Asked."""

    model: object  # model.Transformer, ready to evaluate
    tokenizer: object
    template: object = None  # lumen.chat.Template; None: it knows no conversations
    n_vocab: int = 0  # ids from here on are padding
    scorer: object = None  # lumen.scorer.Scorer of this model
    slots: int = 1  # replies that are written at once
    written: dict = field(default_factory=dict)  # replies that it gave: lumen.replying
    engine: object = None  # that writes them: lumen.engine.Engine


@dataclass
class Options:
    """How tasks are asked."""

    shots: int | None = None  # examples before each question; None: the task's own
    limit: int | None = None  # questions of each task, drawn by seed; None: all
    seed: int = 1234
    control: bool = True  # each question once more, with its context swapped for another's
    by_letter: bool = False  # choices are listed with letters, and the letters compared
    allow_code: bool = False  # run what the model writes
    max_new_tokens: int | None = None  # of replies; None: the task's own
    stride: int | None = None  # of texts: tokens that a window moves on by; None: lm-eval's blocks
    prompts: str | None = None  # a file of smoke prompts; None: ours


@dataclass
class Task:
    """A set of questions. Subclasses say what a line is."""

    name: str
    options: Options
    about: dict = field(default_factory=dict)  # {path, sha256, shots, said}: for results.json
    kind = ""  # choice | text | reply
    numbers = ()  # which of the file's questions are asked, as `chosen` has them
    metric = ""  # which of its scores is the headline

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, i: int) -> int:
        """The `i` of the line of the i-th question: its place in the file, whatever the limit."""
        return self.numbers[i]

    def line(self, i: int, asked: Asked) -> dict:
        """What the i-th question leaves. No file is read here, and nothing printed."""
        raise NotImplementedError

    def texts(self) -> Iterator[tuple[int, str]]:
        """(i, what of question i the training data should not hold), for contamination."""
        raise NotImplementedError


def chosen(n: int, options: Options, shown=frozenset()) -> list[int]:
    """Which of n questions are asked, in order: all but those that are `shown` as examples, or
    `limit` of them drawn by the seed, since many files are sorted by answer. Those of a small limit
    are among those of a larger one, which `sample` does not promise."""
    numbers = [i for i in range(n) if i not in shown]
    if options.limit is None or options.limit >= len(numbers):
        return numbers
    random.Random(options.seed).shuffle(numbers)
    return sorted(numbers[: options.limit])


def partner(i: int, n: int) -> int:
    """The question whose context is put before the choices of question i of n in its control. Half
    the file away, since neighbours are often about the same passage; whatever the limit."""
    return (i + max(1, n // 2)) % n


def partners(n: int, shown: frozenset) -> dict[int, int]:
    """Of each of n questions that is not `shown` as an example its partner, which is not either."""
    left = [i for i in range(n) if i not in shown]
    return {i: left[partner(place, len(left))] for place, i in enumerate(left)}


# ---------------------------------------------------------------- choices

# what prompts put around a question: where it stands in a text it has other words around it
FRAME = re.compile(r"^Question: |\nAnswer:", re.M)


@dataclass(frozen=True)
class Question:
    """Which continuation is the likeliest."""

    pairs: tuple[tuple[str, str], ...]  # (context, continuation) of each choice
    answer: int  # which is right
    label: str = ""  # what the right answer is called, "yes"; "": its number
    header: str = ""  # examples with their answers, before every context; shared by questions


@dataclass
class Choices(Task):
    """Multiple choice, cloze, schemas: everything that is decided by the likelihood of texts.

    records: as read and checked; ask(record) -> Question; swap: the fields of a record that its
    control takes from another one, so that nothing tells the answer any more but the choices.
    """

    records: list[dict] = field(default_factory=list)
    ask: object = None
    swap: tuple[str, ...] = ()
    metric: str = "acc"  # by sum: acc; acc_bytes, acc_tokens: a mean; cloze: greedy
    shown: frozenset = frozenset()  # numbers of the records that are examples, and not asked
    kind = "choice"

    def __post_init__(self):
        self.numbers = chosen(len(self.records), self.options, self.shown)
        self.partners = partners(len(self.records), self.shown)

    def line(self, i: int, asked: Asked) -> dict:
        number = self.numbers[i]
        question = self.ask(self.records[number])
        line = {"i": number, "answer": question.answer}
        line["label"] = question.label or str(question.answer)
        choices = [text.removeprefix(" ") for _, text in question.pairs]  # as lm-eval measures
        line["bytes"] = [len(choice.encode()) for choice in choices]
        try:
            line |= asked.scorer.question(question)
        except UserError as error:
            raise UserError(error.code, f"{self.name}, question {number}: {error.text}") from error
        control = self.control(number)
        if control:
            found = asked.scorer.question(control)
            line["control"] = {name: found[name] for name in ("logprobs", "greedy")}
        return line

    def control(self, number: int) -> Question | None:
        """Question `number` with its `swap` fields from another record; None: there is no other."""
        if not (self.options.control and self.swap and len(self.partners) > 1):
            return None
        other = self.records[self.partners[number]]
        mixed = self.records[number] | {name: other[name] for name in self.swap}
        return self.ask(mixed)

    def texts(self) -> Iterator[tuple[int, str]]:
        for number in self.numbers:
            question = self.ask(self.records[number])
            context, continuation = question.pairs[question.answer]
            yield number, FRAME.sub("", context + continuation)
