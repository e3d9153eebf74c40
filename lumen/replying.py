"""Kind reply: what is judged by what the model writes. GSM8K, HumanEval, files of one's own.

A row of one's own is {prompt, answer, pattern?, stop?, max_new_tokens?}: `answer` a text or a list
of texts that count, `pattern` a regular expression whose group is what is compared; or {prompt,
test, entry_point} as HumanEval has it. What is asked and how it is judged is that of lm-eval
0.4.13, but for a chat model, which is asked without examples where --shots names none.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lumen import chat
from lumen import evaluation_files as files
from lumen.engine import Engine, Row, run
from lumen.errors import UserError
from lumen.questions import Asked, Options, Task, chosen, partners
from lumen.replies import uncompiled
from lumen.sampling import Choice
from lumen.sandbox import run_python, walls
from lumen.stream import Stream


@dataclass(frozen=True)
class Prompt:
    """What stands before a reply, and where that ends at the latest."""

    text: str | tuple  # or (role, content) pairs, for a chat model
    header: str = ""  # examples with their answers, before a text
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    begin: str = ""  # of the reply, already written for a chat model

    def asked(self) -> str:
        """Without its examples."""
        return self.text if isinstance(self.text, str) else self.text[-1][1]


class Reply(NamedTuple):
    text: str
    ended: bool = False  # by an end-of-text, not by a limit or a stop text
    tokens: int = 0
    cut: int = 0  # tokens of the prompt's beginning for which the context had no room
    finite: bool = True  # False: the logits were not


@dataclass
class Replies(Task):
    """A text is drawn for each record, the likeliest unless there is a temperature.

    ask(record, whether the model knows conversations) -> Prompt; judge(record, Reply) -> {metric:
    0 to 1}; swap: the fields of a record that its control takes from another one: the reply to
    another's question, judged by this one's answer.
    """

    records: list[dict] = field(default_factory=list)
    ask: Callable[[dict, bool], Prompt] | None = None
    judge: Callable[[dict, Reply], dict] | None = None
    swap: tuple[str, ...] = ("prompt",)
    metric: str = "exact_match"
    controlled: tuple[str, ...] = ()  # metrics that should fall in the control; (): all
    told: tuple[str, ...] = ()  # fields of a record that its line repeats
    held: tuple[str, ...] = ("prompt", "answer")  # what training data should not hold
    temperature: float = 0.0
    shown: frozenset = frozenset()  # numbers of the records that are examples, and not asked
    kind = "reply"

    def __post_init__(self):
        self.numbers = chosen(len(self.records), self.options, self.shown)
        self.partners = partners(len(self.records), self.shown)

    def line(self, i: int, asked: Asked) -> dict:
        number = self.numbers[i]
        record = self.records[number]
        prompt = self.ask(record, asked.template is not None)
        reply = self.reply(prompt, asked, number)
        line = {"i": number, "label": str(record.get("label", ""))}
        line |= {name: record[name] for name in self.told}
        line |= {"prompt": prompt.asked(), "reply": reply.text}
        line |= {"ended": reply.ended, "tokens": reply.tokens}
        if reply.cut:
            line["cut"] = reply.cut
        line["found"] = self.found(record, reply)
        mixed = self.control(number)
        wanted = self.controlled or tuple(line["found"])
        if mixed and set(wanted) & set(line["found"]):
            prompt = self.ask(mixed, asked.template is not None)
            found = self.found(mixed, self.reply(prompt, asked, number))
            line["control"] = {"found": {k: v for k, v in found.items() if k in wanted}}
        return line

    def control(self, number: int) -> dict | None:
        """Record `number` with its `swap` fields from another one; None: there is no other."""
        if not (self.options.control and len(self.partners) > 1):
            return None
        other = self.records[self.partners[number]]
        return self.records[number] | {name: other[name] for name in self.swap}

    def found(self, record: dict, reply: Reply) -> dict[str, float]:
        """NaN where the model's logits were: a diverged model is not merely wrong."""
        if reply.finite:
            return self.judge(record, reply)
        return dict.fromkeys(self.judge(record, Reply("")), math.nan)

    def reply(self, prompt: Prompt, asked: Asked, number: int) -> Reply:
        """What is asked again, since a control asks what another question does, is remembered."""
        key = self.key(prompt, number)
        if key not in asked.written:
            asked.written[key] = write([key], asked)[0]
        return asked.written[key]

    def key(self, prompt: Prompt, number: int) -> tuple:
        """All that a reply depends on: prompt, tokens at most, seed, temperature."""
        most = self.options.max_new_tokens or prompt.max_new_tokens
        seed = self.options.seed + number if self.temperature else 0
        return prompt, most, seed, self.temperature

    def write_ahead(self, some: list[int], asked: Asked) -> None:
        """The replies to these questions, side by side; `line` finds them."""
        talks = asked.template is not None
        keys = []
        for i in some:
            number = self.numbers[i]
            keys.append(self.key(self.ask(self.records[number], talks), number))
            if mixed := self.control(number):
                keys.append(self.key(self.ask(mixed, talks), number))
        keys = [key for key in dict.fromkeys(keys) if key not in asked.written]
        asked.written |= zip(keys, write(keys, asked))

    def texts(self) -> Iterator[tuple[int, str]]:
        for number in self.numbers:
            record = self.records[number]
            yield number, "\n".join(str(record[name]) for name in self.held)


# ---------------------------------------------------------------- replies


def write(keys: list[tuple], asked: Asked) -> list[Reply]:
    """The replies to `Replies.key`s, asked.slots at a time. With one, a reply's bits are its own:
    its prompt is read whole, and nothing of another is taken over."""
    if asked.engine is None:
        how = {"n_vocab": asked.n_vocab or asked.tokenizer.n_vocab, "inference": False}
        chunk = asked.model.cfg.max_seq_len
        asked.engine = Engine(asked.model, asked.slots, 0, chunk=chunk, reuse=False, **how)
    made = [row_of(*key, asked) for key in keys]
    failed = set()
    try:
        with uncompiled(asked.model):
            for news in run(asked.engine, [row for row, _ in made]):
                if news.reason == "error":
                    failed.add(news.row)
    except BaseException:
        asked.engine = None  # a training run goes on, and the next task asks anew
        raise
    replies = []
    for row, cut in made:
        stream = row.stream
        ended = stream.reason == "eot"
        replies.append(Reply(stream.text, ended, stream.n_new, cut, row not in failed))
    return replies


def row_of(prompt: Prompt, most: int, seed: int, temperature: float, asked: Asked):
    """(its row of the engine, tokens cut). A prompt that leaves no room for so many tokens, or for
    half the context, loses its beginning, as in lm-eval."""
    tokenizer, template = asked.tokenizer, asked.template
    ids = prompt_ids(prompt, tokenizer, template)
    stop_ids, stop = (tokenizer.eot_id,), prompt.stop
    if template is not None:
        stop_ids = tuple(chat.stop_ids(template, tokenizer))
        stop = (*stop, *chat.stop_texts(template))
    context = asked.model.cfg.max_seq_len
    cut = max(0, len(ids) + min(most, context // 2) - context)
    ids = ids[cut:]
    stream = Stream(tokenizer, ids, stop, stop_ids, most, context - len(ids))
    return Row(stream, Choice(temperature), seed), cut


def prompt_ids(prompt: Prompt, tokenizer, template) -> list[int]:
    """An empty text is an end-of-text. E105, E113, E501 of chat.render."""
    if template is None:
        return tokenizer.encode(prompt.header + prompt.text).tolist() or [tokenizer.eot_id]
    turns = [("user", prompt.text)] if isinstance(prompt.text, str) else prompt.text
    ids = chat.render(turns, template, tokenizer, open_reply=True)[0].tolist()
    if prompt.begin:
        lead = chat.compiled(chat.find_template(template))["assistant"].lead
        ids += tokenizer.encode(lead + prompt.begin).tolist()
    return ids


# ---------------------------------------------------------------- examples


class Examples(NamedTuple):
    """Rows that are shown with their answers, before each question."""

    rows: list[dict]
    question: Callable[[dict], str]
    answer: Callable[[dict], str]
    everywhere: bool = True  # False: a chat model does without

    def before(self, text: str, talks: bool) -> tuple[str | tuple, str]:
        """(what is asked, its header): of a chat model the turns."""
        if not talks:
            shown = [f"{self.question(row)} {self.answer(row)}\n\n" for row in self.rows]
            return text, "".join(shown)
        turns = []
        if not self.everywhere:
            return text, ""
        for row in self.rows:
            turns += [("user", self.question(row)), ("assistant", self.answer(row))]
        return (*turns, ("user", text)), ""


def drawn(rows: list[dict], n: int, options: Options, path: Path) -> frozenset:
    """The numbers of n of the rows, by seed, to show. E127: none is left to ask."""
    if n >= len(rows):
        text = f"{path}: {n} examples are wanted, and it has {len(rows)} rows in all"
        raise UserError("E127", f"{text}; take fewer with --shots")
    return frozenset(random.Random(options.seed).sample(range(len(rows)), n))


def rows_of(paths: list[Path], read: Callable[[files.Record], dict]) -> list[dict]:
    return [read(row) for row in files.records(paths)]


def about_of(paths: list[Path], shots: int, said: str) -> dict:
    path = ", ".join(map(str, paths))
    return {"path": path, "sha256": files.sum_of(paths), "shots": shots, "said": said}


# ---------------------------------------------------------------- GSM8K (Cobbe et al. 2021)

GSM8K_STOP = ("Question:", "</s>", "<|im_end|>")
NO_PART_OF_A_NUMBER = (",", r"\$", r"(?s:.*)#### ", r"\.$")  # one after the other
BEHIND_HASHES = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k(path: Path, options: Options) -> list[Task]:
    """{question, answer: "... #### 42"}; the examples are of the training split where it lies
    beside, or rows that are then not asked."""
    place = files.Place(path, wanted=("gsm8k",))
    paths = files.only(files.asked_files(place, [files.TEST]))
    records = rows_of(paths, read_gsm8k)
    shots = 8 if options.shots is None else options.shots
    beside = files.beside(paths[0], place, [files.TRAIN]) if shots else []
    pool = rows_of(beside, read_gsm8k) if beside else records
    numbers = drawn(pool, shots, options, (beside or paths)[0])
    shown = [pool[i] for i in sorted(numbers)]
    examples = Examples(shown, ask_gsm8k, lambda row: row["answer"], options.shots is not None)

    def ask(record: dict, talks: bool) -> Prompt:
        text, header = examples.before(ask_gsm8k(record), talks)
        return Prompt(text, header, GSM8K_STOP)

    said = "prompt, stop texts and filters of lm-eval 0.4.13; a chat model by itself without shots"
    about = about_of(paths, shots, said)
    if beside:
        about |= {"examples": str(beside[0]), "examples_sha256": files.sum_of(beside)}
    left = frozenset() if beside else numbers
    made = Replies("gsm8k", options, about, records, ask, judge_gsm8k, ("question",), shown=left)
    made.metric = "flexible_extract"
    made.held = ("question", "answer")
    return [made]


def read_gsm8k(row: files.Record) -> dict:
    answer = row.text("answer")
    if "####" not in answer:
        raise row.bad("answer", "it should end with #### and the number")
    gold = number_of(answer.rpartition("####")[2].strip())
    return {"question": row.text("question"), "answer": answer, "label": gold}


def ask_gsm8k(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer:"


def judge_gsm8k(record: dict, reply: Reply) -> dict:
    """The number behind the first ####; the last of the numbers."""
    strict = BEHIND_HASHES.search(reply.text)
    numbers = ANY_NUMBER.findall(reply.text)
    found = {"strict_match": strict and strict[1]}
    found["flexible_extract"] = numbers[-1] if numbers else None
    gold = record["label"]
    return {k: float(v is not None and number_of(v) == gold) for k, v in found.items()}


def number_of(text: str) -> str:
    for pattern in NO_PART_OF_A_NUMBER:
        text = re.sub(pattern, "", text)
    return text


# ---------------------------------------------------------------- an answer of one's own


def exact(path: Path, options: Options) -> list[Task]:
    """{prompt, answer, pattern?, stop?, max_new_tokens?}. A base model's reply ends with its first
    line where there is neither a pattern nor a stop. Rows with tests are `functions`."""
    read = files.records([path])
    if "entry_point" in read[0].row:
        return functions(path, options)
    rows = [read_exact(row) for row in read]
    shots = options.shots or 0
    numbers = drawn(rows, shots, options, path)
    shown = [rows[i] for i in sorted(numbers)]
    examples = Examples(shown, lambda row: row["prompt"], lambda row: row["answers"][0])

    def ask(record: dict, talks: bool) -> Prompt:
        text, header = examples.before(record["prompt"], talks)
        stop = record["stop"]
        if not (talks or stop or record["pattern"]):
            stop = ("\n",)
        return Prompt(text, header, stop, record["max_new_tokens"])

    about = about_of([path], shots, "")
    return [Replies(path.stem, options, about, rows, ask, judge_exact, shown=numbers)]


def read_exact(row: files.Record) -> dict:
    fields = row.row
    answers = fields.get("answer")
    answers = [files.written(one) for one in (answers if isinstance(answers, list) else [answers])]
    if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise row.bad("answer", "it should be a text, or a list of those that count")
    pattern = fields.get("pattern")
    if pattern is not None:
        check_pattern(row, "pattern", 1)
    stop = fields.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise row.bad("stop", "it should be a text, or a list of texts")
    most = fields.get("max_new_tokens", 128)
    if type(most) is not int or most < 1:
        raise row.bad("max_new_tokens", "it should be a number from 1")
    record = {"prompt": row.text("prompt"), "answers": answers, "answer": " ".join(answers)}
    record |= {"label": answers[0], "pattern": pattern, "stop": tuple(stop)}
    return record | {"max_new_tokens": most}


def check_pattern(row: files.Record, field: str, groups: int | None = None) -> None:
    """E127: no regular expression, or one that has not so many groups."""
    value = row.row[field]
    try:
        found = re.compile(value).groups
    except (re.error, TypeError) as error:
        raise row.bad(field, f"it is no regular expression: {error}") from error
    if groups is not None and found != groups:
        raise row.bad(field, f"it has {found} groups ( ), and one says what is compared")


def judge_exact(record: dict, reply: Reply) -> dict:
    text = reply.text
    if record["pattern"]:
        match = re.search(record["pattern"], text)
        text = (match[1] if match else None) or ""
    return {"exact_match": float(text.strip() in {one.strip() for one in record["answers"]})}


# ---------------------------------------------------------------- functions (Chen et al. 2021)

FUNCTION_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
PLEASE = "Write a solution to the following problem and make sure that it passes the tests:\n"


def functions(path: Path, options: Options, name: str = "") -> list[Task]:
    """{prompt, test, entry_point}: pass@1 of the likeliest reply. E002: nobody allowed to run it;
    E003: it cannot be run."""
    name = name or path.stem
    if not options.allow_code:
        text = f"{name} would run what a model wrote, on this machine and as this user"
        raise UserError("E002", f"{text}: --allow_code permits it (docs/evaluation.md: its limits)")
    paths = files.only(files.asked_files(files.Place(path), [files.TEST]))
    records = rows_of(paths, read_function)
    about = about_of(paths, 0, f"prompt and stop texts of lm-eval 0.4.13; {walls().said()}")
    made = Replies(name, options, about, records, ask_function, judge_function)
    made.metric = "pass@1"
    return [made]


def humaneval(path: Path, options: Options) -> list[Task]:
    return functions(path, options, "humaneval")


def read_function(row: files.Record) -> dict:
    record = {name: row.text(name) for name in ("prompt", "test", "entry_point")}
    entry = record["entry_point"]
    if not entry.isidentifier():
        raise row.bad("entry_point", "it should be the function's name")
    try:
        compile(record["test"], "test", "exec")
    except (SyntaxError, ValueError) as error:
        raise row.bad("test", f"it is no Python, so that no reply would pass: {error}") from error
    answer = row.row.get("canonical_solution", "")
    return record | {"answer": answer, "label": entry}


def ask_function(record: dict, talks: bool) -> Prompt:
    prompt = record["prompt"]
    if not talks:
        return Prompt(prompt, "", FUNCTION_STOP, 1024)
    begin = f"Here is the completed function:\n```python\n{prompt}\n"
    return Prompt(f"{PLEASE}```python\n{prompt}\n```\n", "", FUNCTION_STOP, 1024, begin)


def judge_function(record: dict, reply: Reply) -> dict:
    code = record["prompt"] + reply.text.partition("```")[0]
    entry = record["entry_point"]
    tests = f"{record['test']}\ncheck({entry})\n"
    return {"pass@1": float(run_python(code, tests, entry).passed)}


# name -> (file or folder, options) -> its tasks. UserError E127, E002, E003
READERS: dict[str, Callable[[Path, Options], list[Task]]] = {
    "gsm8k": gsm8k,
    "exact": exact,
    "humaneval": humaneval,
    "functions": functions,
}
