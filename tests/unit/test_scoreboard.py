"""lumen/scoreboard.py and lumen/comparing.py: what is written can be read again, as it was; paired
differences are found where there are some, and only there."""

import json
import math
import shutil
import sys

import numpy as np
import pytest

from lumen import checkpoint, comparing, scoreboard
from lumen.errors import UserError
from lumen.questions import Question
from lumen.scores import Score, from_row, scores_of

V = 8192


def choices(right, seed=0):
    """Lines of questions of two choices; which are answered rightly."""
    labels = np.random.default_rng(seed).integers(2, size=len(right)).tolist()
    lines = []
    for i, (hit, answer) in enumerate(zip(right, labels)):
        logprobs = [-2.0, -2.0]
        logprobs[answer if hit else 1 - answer] = -1.0
        line = {"i": i, "answer": answer, "label": "ab"[answer], "logprobs": logprobs}
        line |= {"tokens": [1, 1], "bytes": [2, 2], "greedy": [False, False]}
        lines.append(line | {"control": {"logprobs": [-1.0, -1.0], "greedy": [False, False]}})
    return lines


def texts(nats, n_bytes=400):
    line = {"tokens": 100, "right": 40, "bytes": n_bytes, "words": 75, "majority": 600.0}
    return [line | {"i": i, "nats": float(x)} for i, x in enumerate(nats)]


def folder(path, tokenizer="t", **tasks):
    """A folder of results as evaluate.py leaves it; tasks: (kind, metric, lines, changes)."""
    done = {}
    (path / "answers").mkdir(parents=True)
    for name, (kind, metric, lines, *more) in tasks.items():
        task = {"kind": kind, "metric": metric, "about": {"sha256": "f"}, "options": {"shots": 0}}
        task["scores"] = scores_of(kind, name, metric, lines, V, 1.0)
        done[name] = task | (more[0] if more else {})
        rows = [{"key": "k"}, *lines]
        (path / f"answers/{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    results = {"name": path.name, "tokenizer": {"name": "b", "sha256": tokenizer}, "tasks": done}
    row = scoreboard.plain(results)
    (path / "results.json").write_text(json.dumps(row, allow_nan=False))
    return results


def scores_like(**changes):
    """A score of every sort."""
    known = {"task": "boolq", "metric": "acc", "value": 0.5591, "n": 3270, "stderr": 0.0085}
    known |= {"low": 0.5425, "high": 0.5758, "chance": 0.5, "majority": 0.6159, "control": 0.4939}
    known |= {"control_stderr": 0.0086, "n_control": 3270, "seconds": 1.0, "headline": True}
    known |= {"better": "higher", "verdict": "worse than the majority answer"}
    return Score(**known | changes)


SOME = [
    scores_like(),
    scores_like(task="a|b", value=math.nan, stderr=math.nan, low=math.nan, high=math.nan),
    scores_like(metric="ppl", headline=False, value=3.1e17, majority=None, control=None),
    scores_like(task="gsm$k$", stderr=None, low=None, high=None, chance=None, verdict=""),
    scores_like(task="wiki", metric="bits_per_byte", value=1.1178, better="lower", chance=3.25),
]
RESULTS = {
    "name": "quickstart",
    "command": ["evaluate.py", "out/a model"],
    "tasks": {
        "all": {"scores": SOME, "about": {"path": "x.jsonl", "shots": 5}},
        "smoke": {
            "scores": [],
            "samples": [{"prompt": "What is `x`?", "reply": "```py\n1\n```\n| a |"}],
            "about": {"said": "", "shots": None},
            "contamination": {"n": 200, "n_hit": 3, "share": 0.015, "said": "half was looked at"}
            | {"short": 7},
        },
    },
}


# ---------------------------------------------------------------- files


def test_results_are_strict_json_and_come_back(tmp_path):
    said = []
    scoreboard.write(tmp_path / "new", RESULTS, said.append)
    data = (tmp_path / "new/results.json").read_text()
    assert "NaN" not in data.replace('"NaN"', "") and "Infinity" not in data
    results = json.loads(data)
    back = [from_row(row) for row in results["tasks"]["all"]["scores"]]
    assert repr(back) == repr(SOME) and results["nan"] == ["a|b/acc"]
    assert results["boolq_accuracy"] == 0.5591 and results["boolq_total"] == 3270
    for name in ("commit", "dirty", "torch", "cpu_flags", "date", "command"):
        assert name in results
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files - {"picture.png"} == {"results.json", "report.md"}, "no temporary files"
    assert "picture.png" in files or "matplotlib" in said[0]


def cells_of(line):
    return [cell.strip().replace("\\|", "|") for cell in line.replace("\\|", "\0").split("|")[1:-1]]


def test_the_reports_table_says_the_scores(tmp_path):
    """Read back, each number is the score's, to the digits that are printed."""
    lines = scoreboard.report(RESULTS)
    rows = [cells_of(line) for line in lines if line.startswith("| ")]
    rows = [dict(zip(rows[0], row)) for row in rows if row[0] not in ("task", "---")]
    assert len(rows) == len(SOME) and all(len(row) == 9 for row in rows)
    found = {(row["task"].replace("\0", "|"), row["metric"]): row for row in rows}
    for score in SOME:
        row = found[score.task, score.metric]
        value, _, stderr = row["score"].partition(" ± ")
        assert float(value) == pytest.approx(score.value, rel=1e-2, abs=5e-5, nan_ok=True)
        if score.stderr is not None:
            assert float(stderr) == pytest.approx(score.stderr, abs=5e-5, nan_ok=True)
        for name in ("chance", "majority"):
            known = getattr(score, name)
            assert row[name] == "-" if known is None else float(row[name]) == pytest.approx(known)
        assert int(row["n"]) == score.n and row["verdict"] == score.verdict
    text = "\n".join(lines)
    assert "- command: evaluate.py 'out/a model'" in text
    found = "contamination: 3 of 200 questions (1.5%) stand in the training data"
    assert f"{found}; 7 more are too short to look for; half was looked at" in text
    assert "- **smoke**: built in\n" in text, "what is said of a task is there, or its name is not"
    meant = text.partition("## What the metrics mean")[2]
    assert "- **acc**" in meant and "- **ppl**" in meant and "**acc_tokens**" not in meant
    assert "````\n```py\n1\n```\n| a |\n````" in text, "a sample cannot leave its fence"


def test_the_console_has_100_columns():
    long = scores_like(task="a/very/long/path/" * 5, value=123456.789, stderr=98765.4321)
    lines = scoreboard.table([*SOME, long])
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[:2] == ["boolq", "acc"] and "±" in lines[1]
    assert "score ± std. error" in lines[0]
    assert [line.split(":")[0] for line in lines[-2:]] == ["majority", "control"]
    bare = scores_like(stderr=None, majority=None, control=None, verdict="")
    head, line = scoreboard.table([bare])
    assert "±" not in head and line.startswith("boolq"), "no legend of what is not there"
    assert lines[2] == "  ^ worse than the majority answer"
    assert not any("ppl" in line for line in lines), "headlines only"
    assert scoreboard.table([]) == []


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    scoreboard.picture(tmp_path / "x.png", SOME)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    scoreboard.picture(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "picture.png").write_bytes(b"of other scores")
    said = []
    scoreboard.write(tmp_path, RESULTS, said.append)
    assert (tmp_path / "report.md").exists() and "pip install matplotlib" in said[0]
    assert not (tmp_path / "picture.png").exists()
    assert "picture.png" not in (tmp_path / "report.md").read_text()


def test_every_reply(tmp_path):
    line = {"reply": "4", "ended": True, "tokens": 2, "found": {"exact_match": 1.0}, "label": "4"}
    line |= {"prompt": "2 + 2?"}
    lines = [line | {"i": 3}, line | {"i": 1, "ended": False, "reply": "```"}]
    said = scoreboard.detailed("gsm8k", lines)
    assert said.index("## 1, label 4") < said.index("## 3, label 4")
    assert "exact_match 1.0000; 2 tokens, ended by itself" in said and "cut off" in said
    assert "````\n```\n````" in said and "2 + 2?" in said


def test_every_choice():
    line = {"i": 7, "answer": 1, "logprobs": [-2.0, -3.0], "bytes": [1, 3], "tokens": [1, 2]}
    question = Question((("Which?", " a"), ("Which?", " bcd")), 1)
    said = scoreboard.chosen("t", [line], [question], "acc_bytes").splitlines()
    assert "- -2.000 -: ' a'" in said and "- -1.000 right and chosen: ' bcd'" in said
    said = scoreboard.chosen("t", [line], [question], "acc").splitlines()
    assert "- -2.000 chosen: ' a'" in said and "- -3.000 right: ' bcd'" in said


# ---------------------------------------------------------------- two models


def compare(*paths, **more):
    said = []
    n = comparing.compare(list(paths), said.append, **more)
    return n, said


def test_five_points_are_seen_and_none_where_there_are_none(tmp_path):
    """Of 1000 questions two models agree on most: 700 and 650 right. Apart, their errors of 0.015
    each would leave it open (the interval of the difference of two such samples is 0.041 either
    way), and together it is plain. The third differs on as many, half of them for the worse."""
    hard = np.arange(1000) % 10 < 7
    b, c = hard.copy(), hard.copy()
    b[np.flatnonzero(hard)[:50]] = False
    c[np.flatnonzero(hard)[:25]] = False
    c[np.flatnonzero(~hard)[:25]] = True
    for name, right in (("A", hard), ("B", b), ("C", c)):
        folder(tmp_path / name, boolq=("choice", "acc", choices(right)))
    n, said = compare(tmp_path / "A", tmp_path / "B", tmp_path / "C/results.json", out=tmp_path)
    assert n == 1 and said[-1] == "regressions 1" and max(map(len, said[3:])) <= 100
    assert said[:3] == [f"{name} = {tmp_path / name}" for name in "ABC"]
    head = ["task", "metric", "A", "B", "B", "-", "A"]
    assert said[3].split()[:7] == head and said[5].split()[3:7] == ["C", "C", "-", "A"]
    row, same = said[4].split(), said[6].split()
    assert row[:5] == ["boolq", "acc", "0.7000", "0.6500", "-0.0500"]
    assert said[4].endswith("B is worse: regression")
    assert -0.067 < float(row[5]) < float(row[7]) < -0.034
    assert same[-3:] == ["no", "difference", "seen"]
    text = (tmp_path / "compare.md").read_text()
    assert "0 / 50 / 950" in text and "25 / 25 / 950" in text
    assert "| A | B | B - A |" in text and "| A | C | C - A |" in text
    n, said = compare(tmp_path / "B", tmp_path / "A")
    assert n == 0 and said[3].endswith("B is better")


def test_lower_is_better_the_other_way_round(tmp_path):
    nats = np.random.default_rng(0).normal(300, 30, 100)
    for name, lines in (("A", texts(nats)), ("B", texts(nats * 1.02))):
        folder(tmp_path / name, wiki=("text", "bits_per_byte", lines))
    assert compare(tmp_path / "A", tmp_path / "B")[0] == 1
    assert compare(tmp_path / "B", tmp_path / "A")[0] == 0
    # another tokenizer cuts the text at other places: nothing to pair, and 2 % is not seen
    folder(tmp_path / "C", "u", wiki=("text", "bits_per_byte", texts(nats * 1.02, 401)))
    n, said = compare(tmp_path / "A", tmp_path / "C")
    assert n == 0 and "not paired" in said[2] and "wider" in said[2] and "no difference" in said[-2]


def test_losses_of_two_tokenizers_are_compared_per_byte(tmp_path):
    for name, n_bytes in (("A", 400), ("B", 400), ("C", None)):
        lines = texts([300.0 + i for i in range(20)], n_bytes)
        folder(tmp_path / name, name, val=("text", "loss", lines))
    assert "val bits_per_byte" in compare(tmp_path / "A", tmp_path / "B")[1][3]
    with pytest.raises(UserError, match="E128.*bits_per_byte"):
        compare(tmp_path / "A", tmp_path / "C")


def test_few_questions_that_differ_tell_nothing(tmp_path):
    """Five wins and no loss: the interval lies above 0, a sign test says 6 %."""
    right = np.arange(100) % 2 == 0
    for name, more in (("A", 0), ("B", 5), ("C", 6)):
        now = right.copy()
        now[np.flatnonzero(~right)[:more]] = True
        folder(tmp_path / name, t=("choice", "acc", choices(now)))
    assert compare(tmp_path / "A", tmp_path / "B")[1][-2].endswith("too few to tell")
    assert compare(tmp_path / "A", tmp_path / "C")[1][-2].endswith("better")


def test_a_nan_is_no_difference(tmp_path):
    folder(tmp_path / "A", val=("text", "loss", texts([300.0] * 9)))
    folder(tmp_path / "B", val=("text", "loss", texts([*[300.0] * 8, math.nan])))
    n, said = compare(tmp_path / "A", tmp_path / "B")
    assert n == 0 and said[-2].split()[-1] == "NaN"


def test_questions_of_only_one_are_left_and_said(tmp_path):
    lines = choices([True] * 40 + [False] * 20)
    folder(tmp_path / "A", t=("choice", "acc", lines))
    folder(tmp_path / "B", t=("choice", "acc", lines[10:50], {"options": {"shots": 5}}))
    said = compare(tmp_path / "A", tmp_path / "B")[1]
    assert "shots 0 in A, 5 in B" in said[2]
    assert "60 questions in A, 40 in B; compared are the 40 of both" in said[3]
    assert said[5].split()[2:4] == ["0.7500", "0.7500"], "both of the same questions"


CHANGED = choices([True] * 20)
CHANGED[7] = CHANGED[7] | {"label": "other"}
REFUSED = {
    "different files of that name": {
        "t": ("choice", "acc", choices([True] * 20), {"about": {"sha256": "g"}})
    },
    "metric": {"t": ("choice", "acc_bytes", choices([True] * 20))},
    "question 7: its label": {"t": ("choice", "acc", CHANGED)},
    "no task in common": {"other": ("choice", "acc", choices([True] * 20))},
    "no question in common": {"t": ("choice", "acc", [r | {"i": 99} for r in CHANGED[:1]])},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compared_says_why(tmp_path, what):
    folder(tmp_path / "A", t=("choice", "acc", choices([True] * 20)))
    folder(tmp_path / "B", **REFUSED[what])
    said = []
    with pytest.raises(UserError, match=f"E128.*{what}"):
        comparing.compare([tmp_path / "A", tmp_path / "B"], said.append)
    assert "not compared" not in " ".join(said), "the refusal says it"


def test_a_path_that_is_not_there_names_the_run_that_is_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated(tmp_path, "mine", 20, t=("choice", "acc", choices([True] * 20)))
    with pytest.raises(UserError, match="E128: mine is not there; did you mean out/mine\\?$"):
        compare("mine", "mine")


def test_results_that_are_none(tmp_path):
    folder(tmp_path / "A", t=("choice", "acc", choices([True] * 20)))
    (tmp_path / "x.json").write_text("{}")
    for other in ("x.json", "none"):
        with pytest.raises(UserError, match=f"E128.*{other}"):
            compare(tmp_path / "A", tmp_path / other)
    with pytest.raises(UserError, match="E128.*two or three"):
        compare(tmp_path / "A")
    answers = tmp_path / "A/answers/t.jsonl"
    for text, why in (("5\n", "no answers"), ("{]\n", "no answers"), ("", "nothing in it")):
        answers.write_text(text)
        with pytest.raises(UserError, match=f"E128.*(t.jsonl.*{why})"):
            compare(tmp_path / "A", tmp_path / "A")
    folder(tmp_path / "L", t=("choice", "acc", choices([True]), {"kind": "lm-eval"}))
    n, said = compare(tmp_path / "L", tmp_path / "L")
    assert n == 0 and "t: its answers are not kept" in said[2]


def evaluated(top, name: str, step: int, **tasks) -> None:
    """A run with that step, and out/eval/NAME-STEP of it."""
    place = top / f"out/{name}/step_{step:08}"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps({"of": name, "step": step}))
    sha256 = checkpoint.manifest_sha256({"of": name, "step": step})
    out = top / f"out/eval/{name}-{step}"
    about = {"path": f"out/{name}/{place.name}", "step": step, "sha256": sha256}
    results = folder(out, **tasks) | {"checkpoint": about}
    (out / "results.json").write_text(json.dumps(scoreboard.plain(results)))


def test_a_run_stands_for_its_newest_results(tmp_path, monkeypatch):
    """What a user types first is the run; the message names what it takes."""
    monkeypatch.chdir(tmp_path)
    some = {"t": ("choice", "acc", choices([True] * 20))}
    for name, step in (("one", 100), ("one", 1000), ("one", 900), ("other", 50), ("one-b", 5000)):
        evaluated(tmp_path, name, step, **some)
    n, said = compare("out/one", "out/other")
    assert n == 0 and said[0] == "A = out/eval/one-1000, the newest results of out/one"
    assert said[1] == "B = out/eval/other-50, the newest results of out/other"
    # a step, a folder of results and a run go together
    _, said = compare("out/one/step_00000900", "out/eval/other-50", "out/one-b")
    assert [line.split(",")[0][4:] for line in said[:3]] == [
        "out/eval/one-900",
        "out/eval/other-50",
        "out/eval/one-b-5000",
    ]
    # it went on since
    shutil.copytree("out/other/step_00000050", "out/other/step_00000090")
    said = compare("out/one", "out/other")[1]
    assert "step 90 of out/other was not evaluated, step 50 was; python evaluate.py" in said[0]
    # not evaluated, or other weights lie there now: what to type stands in the message
    shutil.copytree("out/one", "out/a new one")
    (tmp_path / "out/other/step_00000050/manifest.json").write_text('{"of": "another run"}')
    for name, command in (("out/a new one", "'out/a new one'"), ("out/other", "out/other")):
        with pytest.raises(UserError, match="E128.*was not evaluated") as caught:
            compare("out/one", name)
        assert caught.value.text.endswith(f"python evaluate.py {command}")


@pytest.mark.parametrize(
    ("other", "command"),
    [
        ({}, "--tasks val:data/one"),
        ({"tokenizer": {"sha256": "u"}}, "--tasks FILE.txt"),
        ({"model": {"max_seq_len": 64}}, "--tasks FILE.txt"),
    ],
)
def test_other_held_out_texts_are_said_in_words(tmp_path, other, command):
    """And how both are scored on one: val:DIR where that can be, which one tokenizer reads."""
    some = {"t": ("choice", "acc", choices([True] * 20))}
    for name in ("A", "B"):
        about = {"about": {"sha256": name * 64, "path": "data/one" if name == "A" else "data/b"}}
        val = ("text", "bits_per_byte", texts([300.0] * 9), about)
        results = folder(tmp_path / name, val=val, **some) | {"model": {"max_seq_len": 32}}
        results |= other if name == "B" else {}
        (tmp_path / name / "results.json").write_text(json.dumps(scoreboard.plain(results)))
    _, said = compare(tmp_path / "A", tmp_path / "B")
    note = said[2].splitlines()
    assert "not compared: val: A and B were scored on different held-out texts." in note[0]
    assert note[1].endswith(f"python evaluate.py MODEL {command}") and "AAAA" not in said[2]
    assert len(note) == (2 if not other else 3) and max(map(len, note)) <= 100


def test_a_lower_heuristic_is_no_regression(tmp_path):
    for name, value in (("A", 1.0), ("B", 0.0)):
        line = {
            "reply": "x",
            "ended": True,
            "tokens": 1,
            "label": "",
            "found": {"heuristic": value},
        }
        lines = [line | {"i": i} for i in range(20)]
        folder(tmp_path / name, smoke=("reply", "heuristic", lines))
    n, said = compare(tmp_path / "A", tmp_path / "B")
    assert n == 0 and said[3].endswith("lower, of a heuristic")
    assert compare(tmp_path / "B", tmp_path / "A")[1][3].endswith("higher, of a heuristic")
