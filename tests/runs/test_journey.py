"""journey.py: stages that are done stay done, what has changed runs anew, and a kill at any moment
loses nothing. The stages are scripts of three lines here; real ones in test_a_real_journey."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, fingerprint

import journey
from lumen import cli, understood
from lumen.errors import UserError
from lumen.stages import read

WRITE = """import sys, time, pathlib
out, word, *rest = sys.argv[1:]
pathlib.Path(out).mkdir(parents=True, exist_ok=True)
with open("ran.txt", "a") as f:
    f.write(word + "\\n")
time.sleep(float(rest[0]) if rest else 0)
pathlib.Path(out, "made.txt").write_text(word + "".join(open(p).read() for p in rest[1:]))
print("wrote", word)
"""


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder with write.py OUT WORD [SECONDS [FILES]], and go(stages, words) -> exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "write.py").write_text(WRITE)

    def go(stages: dict, *words: str, **more) -> int:
        tree = {"out": "out", "stages": stages} | more
        (tmp_path / "j.yaml").write_text(json.dumps(tree))
        return journey.main(["j.yaml", *words])

    go.ran = lambda: (tmp_path / "ran.txt").read_text().split()
    go.folder = tmp_path
    return go


def three(b="b") -> dict:
    return {
        "one": {"run": "write.py $one a"},
        "two": {"run": f"write.py $two {b} 0 $one/made.txt"},
        "three": {"run": "write.py $three c 0 $two/made.txt"},
        "other": {"run": "write.py $other d"},
    }


def test_stages_run_in_order_once_and_get_what_those_before_them_made(at, capsys):
    assert at(three()) == 0 and at.ran() == ["a", "b", "c", "d"]
    assert (at.folder / "out/three/made.txt").read_text() == "cba"
    assert at(three()) == 0 and at.ran() == ["a", "b", "c", "d"], "nothing twice"
    report = (at.folder / "out/report.md").read_text()
    assert all(f"| {name} |" in report for name in three())
    assert "[4/4] other" in capsys.readouterr().out


def test_a_changed_stage_runs_anew_and_what_depends_on_it_and_nothing_else(at, capsys):
    at(three())
    assert at(three(b="B")) == 0
    assert at.ran() == ["a", "b", "c", "d", "B", "c"]
    assert (at.folder / "out/three/made.txt").read_text() == "cBa"
    assert (at.folder / "out/two.replaced/made.txt").read_text() == "ba", "what was there stays"
    said = capsys.readouterr().out
    assert "two   changed: its command" in said and "three changed: stage two" in said


def test_a_file_that_a_stage_names_counts_wherever_it_is_named(at):
    (at.folder / "text.txt").write_text("x")
    stages = {"one": {"run": "write.py $one a 0 text.txt"}, "two": {"run": "write.py $two b"}}
    assert at(stages) == at(stages) == 0
    (at.folder / "text.txt").write_text("y")
    assert at(stages) == 0 and at.ran() == ["a", "b", "a"]
    stages = {"one": {"run": "train.py", "prepare": {"sources": ["text.txt"]}}}
    (at.folder / "k.yaml").write_text(json.dumps({"stages": stages}))
    found = read(at.folder / "k.yaml")[1][0]
    journey.fill_sums([found], at.folder / "out")
    assert "text.txt" in found.sums


def test_a_folder_that_holds_the_journey_is_no_input_of_it(at):
    """It would change with every stage; and a prompt of "/" is not the whole disk."""
    stages = {"one": {"run": "write.py $one / 0"}, "two": {"run": "write.py $two . 0"}}
    assert at(stages) == at(stages) == 0 and at.ran() == ["/", "."]


@pytest.mark.parametrize("more", [{"chat": ["x"]}, {"next": "x"}, {"plan": "x"}])
def test_other_keys_have_their_kinds(at, more):
    with pytest.raises(UserError, match=f"E002: .*{next(iter(more))}: .* is no"):
        at(three(), **more)


def test_the_time_of_a_stage_that_is_killed_is_noted_now_and_then(at, monkeypatch):
    at(three())
    j = journey.Journey(at.folder / "j.yaml")
    j.noted = j.told = 0.0
    j.show(j.stages[1], "", at.folder / "log", 7.0, {"seconds": 10.0})
    assert json.loads((at.folder / "out/journal.json").read_text())["two"]["seconds"] == 17.0


def test_from_a_stage_on(at):
    at(three())
    assert at(three(), "--from", "two") == 0
    assert at.ran() == ["a", "b", "c", "d", "b", "c"]
    with pytest.raises(UserError, match="E002: --from thre: no such stage; did you mean three"):
        at(three(), "--from", "thre")


def test_a_failure_is_told_and_the_rest_waits(at, capsys):
    stages = three()
    stages["two"]["run"] = "write.py $two b nonsense"
    assert at(stages) == 1
    said = capsys.readouterr().out
    assert "could not convert string to float: 'nonsense'" in said and "exit code 1" in said
    assert at.ran() == ["a", "b"] and not (at.folder / "out/report.md").exists()
    assert at(three()) == 0 and at.ran() == ["a", "b", "b", "c", "d"]


def test_a_dry_run_runs_nothing_and_says_what_it_knows(at, capsys):
    stages = three()
    stages["one"] |= {"minutes": 2, "mb": 30}
    assert at(stages, "--dry_run") == 0
    said = capsys.readouterr().out
    assert not (at.folder / "out").exists() and not (at.folder / "ran.txt").exists()
    one = next(line for line in said.splitlines() if line.startswith("one"))
    assert one.split()[:4] == ["one", "2m00s", "30", "new"]
    at(stages)
    capsys.readouterr()
    at(stages, "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert all("done" in line for line in lines[1:5])


def test_a_dry_run_of_what_was_never_measured_says_so(at, capsys):
    """And a stage whose base a stage is yet to make is no failure; of training, what one plans."""
    real(at, "out")
    tree = json.loads((at.folder / "j.yaml").read_text())
    tune = {"run": "finetune.py", "init_from": "$train", "data_dir": "$text"}
    tree["stages"]["train"]["model"]["vocab_size"] = 320
    assert at(tree["stages"] | {"tune": tune}, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "?          not measured yet" in said and "0m00s" not in said
    assert "tune: known once text and train are done\n" in said and "E304" not in said
    begins = ("parameters", "length", "time", "memory", "checkpoint")
    lines = said.partition("train: all of it by python train.py ")[2].splitlines()[1:6]
    assert [line.split()[0] for line in lines] == [*begins]


def test_without_a_terminal_a_stage_says_each_half_minute_where_it_is(at, capsys):
    at(three())
    j = journey.Journey(at.folder / "j.yaml")
    j.noted = j.told = 0.0
    del j.rows["two"]
    (at.folder / "log").write_text("step 50\nstep 60\n")
    for seconds in (29.0, 31.0, 32.0, 62.0):
        j.show(j.stages[1], "[2/4] two", at.folder / "log", seconds, {"seconds": 0.0})
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["[2/4] two 0m31s | step 60", "[2/4] two 1m02s | step 60"]


def test_the_report_says_which_rows_a_preparation_left_out(at):
    rows = [{"prompt": f"{i}?", "response": f"{i}."} for i in range(80)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (at.folder / "c.jsonl").write_text(text + '{"prompt": "x"}\n')
    chats = {"run": "prepare_data.py c.jsonl", "tokenizer": "bytes", "max_bad": 0.1}
    assert at({"chats": chats}) == 0
    report = (at.folder / "out/report.md").read_text()
    assert "- chats: 1 of 81 rows left out: out/chats/rejected.jsonl (1 E102, a row lacks" in report


def test_times_of_the_yaml_are_scaled_by_what_was_seen_here(at):
    stages = three()
    for name, minutes in {"one": 1, "two": 2, "three": 4}.items():
        stages[name]["minutes"] = minutes
    at(stages)
    j = journey.Journey(at.folder / "j.yaml")
    j.rows["one"]["seconds"], j.rows["two"]["seconds"] = 20.0, 40.0
    del j.rows["three"], j.rows["other"]
    one, two, three_, other = j.stages
    assert (j.seconds(two), j.seconds(three_), j.seconds(other)) == (40.0, 80.0, 0.0)
    assert j.left(one) == 80.0, "what is done takes no time"


def test_a_stage_whose_package_is_not_there_is_left_out_and_can_come_later(at, capsys):
    stages = three()
    stages["other"]["package"] = "no_such_package"
    assert at(stages) == 0 and at.ran() == ["a", "b", "c"]
    assert "pip install no_such_package" in capsys.readouterr().out
    report = (at.folder / "out/report.md").read_text()
    assert "| other | - | - | left out: it needs pip install no_such_package; " in report
    assert at(stages, "--dry_run") == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("other"))
    assert line.split()[1:][:5] == ["-", "-", "left", "out:", "it"]
    stages["other"]["package"] = "numpy"
    assert at(stages) == 0 and at.ran() == ["a", "b", "c", "d"]


WRONG = [
    ({"one": {}}, "stage one: there is no run"),
    ({"One": {"run": "write.py"}}, "stage One: a name"),
    ({"one": {"run": "nothing.py"}}, "names no script that is here"),
    ({"one": {"run": "rm -rf /"}}, "names no script that is here"),
    ({"one": {"run": "write.py $two x"}, "two": {"run": "write.py $two x"}}, "two is no stage be"),
    ({"one": {"run": "write.py $one 5$"}}, "a dollar is written"),
    ({"one": {"run": "write.py $one", "word": ["a"]}}, "takes no list"),
    ({"one": {"run": "write.py $one", "minutes": "long"}}, "minutes and mb are numbers"),
    ({"one": {"run": "write.py 'a"}}, "No closing quotation"),
    ({}, "names of stages and what they run"),
]


def test_a_journey_that_is_not_there_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journeys = ", ".join(cli.JOURNEYS)
    for name, said in (
        ("my", f"E001: my does not exist; journeys: {journeys}\n"),
        ("journey_cp", "did you mean configs/journey_cpu.yaml?"),
        ("quickstart", "is no journey; python train.py .*quickstart.yaml may be meant"),
    ):
        with pytest.raises(UserError, match=said):
            journey.main([name])


@pytest.mark.parametrize("stages, text", WRONG)
def test_a_mistake_is_named_with_its_stage(at, stages, text):
    with pytest.raises(UserError, match=f"E002: .*j.yaml.*{text}"):
        at(stages)
    assert not (at.folder / "out").exists()


def test_every_command_is_asked_for_its_words_before_the_first_stage_runs(at):
    """At a start and in a dry run; bases and data that stages are yet to make are no mistakes."""
    stages = {
        "own": {"run": "write.py $own a", "nonsense": 1},
        "text": {"run": "prepare_data.py synthetic:9", "tokenizer": "bytes"},
        "train": {"run": "train.py quickstart", "prepare": None, "data_dir": "$text"},
        "tune": {"run": "finetune.py", "init_from": "$train", "data_dir": "$text"},
        "merge": {"run": "finetune.py merge $tune $merge/run"},
        "scores": {"run": "evaluate.py $tune", "limit": 2},
        "says": {"run": "sample.py $tune --prompt x"},
        "few": {"run": "export.py quantize $tune $few/model", "bits": 8},
    }
    (at.folder / "k.yaml").write_text(json.dumps({"stages": stages}))
    understood.check("k.yaml", read(at.folder / "k.yaml")[1])
    stages["tune"]["max_steps"] = "four"
    (at.folder / "k.yaml").write_text(json.dumps({"stages": stages}))
    with pytest.raises(UserError, match="E002: k.yaml: stage tune: max_steps: 'four' is not int"):
        understood.check("k.yaml", read(at.folder / "k.yaml")[1])
    for name in list(stages)[1:]:
        stages[name]["tokenizr"] = "x"
    for words in ([], ["--dry_run"]):
        with pytest.raises(UserError) as caught:
            at(stages, *words)
        told = caught.value.text.splitlines()
        assert all(f"stage {name}: " in line for name, line in zip(list(stages)[1:], told))
        assert len(told) == len(stages) - 1 and all("tokenizr" in line for line in told)
    assert not (at.folder / "ran.txt").exists() and not (at.folder / "out").exists()


def test_values_of_a_stage_become_words_of_its_command(at):
    tree = {"stages": {"t": {"run": "train.py c.yaml", "model": {"d_model": 8}, "prepare": None}}}
    tree["stages"]["e"] = {"run": "evaluate.py $t", "limit": 5, "detailed": True, "seed": None}
    (at.folder / "w.yaml").write_text(json.dumps(tree))
    t, e = read(at.folder / "w.yaml")[1]
    assert t.words[2:] == ["--model.d_model", "8", "--prepare", "null", "--out_dir", "out/w/t"]
    assert e.words == "evaluate.py out/w/t --limit 5 --detailed --out out/w/e".split()
    assert t.in_place and e.needs == ["t"]


# ---------------------------------------------------------------- kills


def start(folder, **options) -> subprocess.Popen:
    words = [sys.executable, str(ROOT / "journey.py"), "j.yaml"]
    options = {"stdout": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(words, cwd=folder, **options)


def wait_for(check, seconds=60):
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_stage_too_and_the_same_command_goes_on(at, number):
    slow = three()
    slow["two"]["run"] = "write.py $two b 60 $one/made.txt"
    (at.folder / "j.yaml").write_text(json.dumps({"out": "out", "stages": slow}))
    child = start(at.folder)
    wait_for(lambda: (at.folder / "ran.txt").exists() and at.ran() == ["a", "b"])
    child.send_signal(number)
    said = child.communicate(timeout=30)[0]
    assert child.returncode == (-9 if number == signal.SIGKILL else 130)
    assert ("the same command goes on" in said) == (number != signal.SIGKILL)
    wait_for(lambda: not of_stage("60"))
    row = json.loads((at.folder / "out/journal.json").read_text())["two"]
    assert row["seconds"] > 0 or number == signal.SIGKILL  # which leaves what was noted last
    assert row["done"] is False and not (at.folder / "out/two/made.txt").exists()
    assert at(three()) == 0 and at.ran() == ["a", "b", "b", "c", "d"]


def of_stage(word: str) -> bool:
    """Whether a process of write.py with this word is alive."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline").read().split("\0")
        except OSError:
            continue
        if "write.py" in words and word in words:
            return True
    return False


def test_two_at_a_time_are_refused(at):
    (at.folder / "j.yaml").write_text(
        json.dumps({"out": "out", "stages": {"one": {"run": "write.py $one a 60"}}})
    )
    child = start(at.folder)
    try:
        wait_for(lambda: (at.folder / "ran.txt").exists())
        with pytest.raises(UserError, match="E300.*in use by"):
            journey.main(["j.yaml"])
        assert at.ran() == ["a"]
    finally:
        child.terminate()
        child.communicate()


def real(at, name: str) -> None:
    """A journey of real commands: text, a run of 30 steps, its Hugging Face folder."""
    model = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "max_seq_len": 32}
    train = {"run": "train.py", "data_dir": "$text", "model": model, "max_steps": 30}
    train |= {"batch_size": 2, "save_interval": 5, "eval_tokens": 512, "compile_model": False}
    train |= {"device": "cpu", "precision": "fp32", "log_interval": 1, "sample_prompt": None}
    stages = {
        "text": {"run": "prepare_data.py synthetic:200", "tokenizer": "bytes"},
        "train": train,
        "hf": {"run": "export.py to_hf $train $hf/model"},
        "says": {"run": "sample.py $train --prompt ab --max_new_tokens 8"},
    }
    (at.folder / "j.yaml").write_text(json.dumps({"out": name, "stages": stages}))


def test_a_real_journey_killed_in_three_stages_ends_like_one_that_was_not(at):
    real(at, "whole")
    assert start(at.folder, stdout=None).wait(120) == 0
    real(at, "killed")
    for stage in ("text", "train", "hf"):
        child = start(at.folder, start_new_session=True)
        log = at.folder / "killed" / f"{stage}.log"
        sign = "step" if stage == "train" else ""
        wait_for(lambda: log.exists() and sign in log.read_text())  # noqa: B023
        time.sleep(0.3)
        child.kill()
        said = child.communicate()[0]
        assert ("train goes on: train.py" in said) == (stage == "hf")
        time.sleep(1)  # the stage has been told, and ends
    assert start(at.folder, stdout=None).wait(120) == 0
    whole, killed = (at.folder / name for name in ("whole", "killed"))
    assert fingerprint(killed / "train", 30) == fingerprint(whole / "train", 30)
    names = ("hf/model/model.safetensors", "text/train_00000.npy")
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)
    report = (killed / "report.md").read_text()
    assert "| train | 30 |" in report and "### says" in report
