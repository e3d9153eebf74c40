"""Questions a second: our scorer against lm-eval's hf model of the exported folder. `evaluate` of
tools/bench.py.

The same texts, dtype and threads, in turns, in one process; times are CPU time of this process.
lm-eval's counts at the best of its batch sizes. Both encode the texts they are asked, and the
log-probabilities are compared. Texts are made of docstrings in the forms of public tasks.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path

import torch

import export
from lumen import tokenizer as tokenizers
from lumen.docstrings import docstring_rows, entries
from lumen.errors import UserError, expand
from lumen.harness import need
from lumen.models import open_model
from lumen.questions import Options, Question
from lumen.scorer import Packed, Scorer
from lumen.tasks import docstrings
from model import ModelConfig, Transformer
from tools import timing

MODEL = {"d_model": 512, "n_layers": 8, "n_heads": 8, "d_ff": 1408, "max_seq_len": 2048}
VOCAB = 8192
BATCHES = (1, 4, 16)  # lm-eval's
PACK = 2048  # tokens, of evaluate.py --pack
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

# ---------------------------------------------------------------- what is asked


def words_of_docs() -> list[str]:
    return " ".join(entry.doc for entry in entries()).split()


def passages(n: int) -> list[Question]:
    """As BoolQ: a passage of about 110 words, two short choices."""
    words, found = words_of_docs(), []
    for i in range(n):
        passage = " ".join(words[110 * i : 110 * i + 110])
        text = f"{passage}\nQuestion: is this about {words[110 * i + 7]}?\nAnswer:"
        found.append(Question(((text, " no"), (text, " yes")), 0))
    return found


def endings(n: int, shots: int = 0) -> list[Question]:
    """As HellaSwag: a beginning of about 40 words, four endings of about 20."""
    words, found = words_of_docs(), []
    for i in range(n):
        # each with examples of its own, as lm-eval draws them: nothing is shared by questions
        first = 120 * (shots + 1) * i
        shown = [" ".join(words[k : k + 60]) for k in range(first, first + 60 * shots, 60)]
        header = "".join(f"{text}\n\n" for text in shown)
        own = words[first + 60 * shots :][:120]
        text = header + " ".join(own[:40])
        pairs = [(text, " " + " ".join(own[k : k + 20])) for k in (40, 60, 80, 100)]
        found.append(Question(tuple(pairs), 0))
    return found


def endings_10_shots(n: int) -> list[Question]:
    """The same behind ten examples, as leaderboards ask it."""
    return endings(n, 10)


def letters(n: int) -> list[Question]:
    """As MMLU: five examples, four choices listed, their letters compared."""
    rows = list(docstring_rows("choice", "val"))
    header = "".join(f"{listed(row)} {'ABCD'[row['answer']]}\n\n" for row in rows[:5])
    found = []
    for row in rows[5 : 5 + n]:
        pairs = [(listed(row), f" {letter}") for letter in "ABCD"]
        found.append(Question(tuple(pairs), row["answer"], "", header))
    return found


def listed(row: dict) -> str:
    choices = "".join(f"{a}. {text}\n" for a, text in zip("ABCD", row["choices"]))
    return f"{row['question']}\n{choices}Answer:"


def choices(n: int) -> list[Question]:
    """The built-in task `docstrings`."""
    task = docstrings(Options(limit=n))
    return [task.ask(task.records[i]) for i in task.numbers]


KINDS = {
    "passages": passages,
    "endings": endings,
    "endings_10_shots": endings_10_shots,
    "letters": letters,
    "docstrings": choices,
}

# ---------------------------------------------------------------- who is asked


def make_run(folder: Path) -> Path:
    """A Llama with random weights and a vocabulary of the docstrings."""
    own = tokenizers.train_bpe((entry.doc for entry in entries()), VOCAB)
    own.save(folder / "tokenizer.json")
    model = Transformer(ModelConfig(**MODEL, vocab_size=own.n_vocab, qk_norm=False))
    model.init_weights(0)
    about = {"from": "random weights", "dtype": "float32"}
    file = folder / "tokenizer.json"
    export.write_run(folder / "run", model.cfg, model.state_dict(), about, file, say=str)
    return folder / "run"


def requests_of(questions: list[Question]) -> list:
    """For lm-eval."""
    from lm_eval.api.instance import Instance

    found = []
    for i, question in enumerate(questions):
        for k, (context, continuation) in enumerate(question.pairs):
            pair = (question.header + context, continuation)
            found.append(Instance("loglikelihood", {}, pair, k, ("bench", i, 1)))
    return found


def theirs(folder: Path, precision: str):
    with contextlib.redirect_stderr(io.StringIO()):
        from lm_eval.models.huggingface import HFLM

        return HFLM(str(folder), device="cpu", dtype=DTYPES[precision])


def seconds_of(run) -> tuple[float, list[float]]:
    """CPU seconds, and the log-probabilities."""
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


def ask_ours(scorer: Scorer, questions: list[Question]) -> list[float]:
    scorer.header, scorer.encoded = None, {}  # each time as if for the first
    return [value for question in questions for value in scorer.question(question)["logprobs"]]


def ask_packed(scorer: Packed, questions: list[Question]) -> list[float]:
    scorer.header, scorer.encoded = None, {}
    scorer.waiting, scorer.found = [], None
    for question in questions:
        scorer.question(question)
    return [one.logprob for found in scorer.run_packs() for one in found]


def tokens_of(scorer: Packed, questions: list[Question]) -> tuple[int, int]:
    """How many tokens a model computes, at least: (for ours, for lm-eval, which computes choices of
    one token once, and pads)."""
    ask_packed(scorer, questions)
    ours, headers, theirs = 0, set(), {}
    for tree in scorer.waiting:
        ours += len(tree.ids())
        headers.add(tree.before)
        for whole, n in tree.sequences:
            key = tuple(whole[:-1]) if len(whole) - n == 1 else tuple(whole)
            theirs[key] = len(whole) - 1
    return ours + sum(map(len, headers)), sum(theirs.values())


def ask_theirs(model, batch: int, requests: list) -> list[float]:
    model.batch_size_per_gpu = batch
    with contextlib.redirect_stderr(io.StringIO()):
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


# ---------------------------------------------------------------- the command


def evaluating(words: list[str]) -> int:
    """evaluate [RUN or Hugging Face folder]: a line per kind of question."""
    o = timing.options(words, model=None, rounds=5, n=32, only="", precision="fp32")
    only = o.only.split(",") if o.only else list(KINDS)
    if unknown := [name for name in only if name not in KINDS]:
        raise UserError("E002", f"--only: no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if o.precision not in DTYPES:
        raise UserError("E002", f"--precision: {o.precision} is none of {', '.join(DTYPES)}")
    need()
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        path = Path(expand(o.model[0])) if o.model else make_run(top)
        opened = open_model(path, device="cpu", precision=o.precision, say=str)
        exported = path
        if opened.kind != "huggingface":
            exported = top / "hf"
            export.to_hf(path, exported, say=str)
        scorer = Scorer(opened.model, opened.tokenizer)
        packed = Packed(opened.model, opened.tokenizer, PACK)
        other = theirs(exported, o.precision)
        print(timing.machine_line())
        print(f"{opened}, {o.precision}, CPU time of {torch.get_num_threads()} threads")
        for name in only:
            compare(name, KINDS[name](o.n), (scorer, packed), other, o.rounds)
    return 0


def compare(name: str, questions: list[Question], scorers: tuple, other, rounds: int) -> None:
    """One kind of question: seconds of all in turns, printed."""
    requests = requests_of(questions)
    scorer, packed = scorers
    runs = {"ours": lambda: ask_ours(scorer, questions)}
    runs["packed"] = lambda: ask_packed(packed, questions)
    for batch in BATCHES:
        runs[batch] = lambda batch=batch: ask_theirs(other, batch, requests)
    times = {way: [] for way in runs}
    found = {}
    for i in range(1 + rounds):
        for way, run in runs.items():
            seconds, found[way] = seconds_of(run)
            if i:
                times[way].append(seconds)
    best = min(BATCHES, key=lambda batch: sorted(times[batch])[rounds // 2])
    off = max(abs(a - b) for a, b in zip(found["ours"], found[best], strict=True))
    speeds = [len(questions) / seconds for seconds in times["ours"]]
    print(f"{name}: {len(questions)} questions, log-probabilities differ by at most {off:.1e}")
    print(f"  ours, questions/s   {timing.spread(speeds)}")
    speeds = [len(questions) / seconds for seconds in times[best]]
    print(f"  lm-eval, batch {best:<4} {timing.spread(speeds)}")
    print(f"  times as fast       {timing.ratio(times[best], times['ours'])}")
    print(f"  packed, {PACK} tokens {timing.ratio(times[best], times['packed'])}")
    ours, theirs_ = tokens_of(packed, questions)
    print(f"  tokens computed     {theirs_:,} against {ours:,}: {theirs_ / ours:.2f}", flush=True)
