"""What is said of a folder that was named in the place of a run, by every command that takes one."""

import os

import pytest

import evaluate
import export
import finetune
import sample
import serve
from lumen import checkpoint, nearby, report
from lumen.errors import UserError

COMMANDS = {
    "sample": lambda path: sample.main([path, "--prompt", "x"]),
    "evaluate": lambda path: evaluate.main([path]),
    "serve": lambda path: serve.main([path, "--port", "0"]),
    "to_hf": lambda path: export.main(["to_hf", path, "there"]),
    "to_gguf": lambda path: export.main(["to_gguf", path, "there.gguf"]),
    "quantize": lambda path: export.main(["quantize", path, "there"]),
    "finetune": lambda path: finetune.main([path, "--data", "chats.jsonl"]),
    "merge": lambda path: finetune.main(["merge", path, "there"]),
    "checkpoint": lambda path: checkpoint.main([path]),
    "report": lambda path: report.main([path]),
    "picture": lambda path: report.main([path, "--picture"]),
    "page": lambda path: report.main([path, "--html", "there.html"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with runs, a journey, data, results and a Hugging Face folder, newest last."""
    monkeypatch.chdir(tmp_path)
    files = ("out/first/config.yaml", "out/quickstart/config.yaml", "out/my/journal.json")
    files += ("out/quickstart-sft/config.yaml",)
    files += ("out/my/train/config.yaml", "out/my/tune/config.yaml", "data/text/manifest.json")
    files += ("out/eval/first-9/results.json", "hub/llama/config.json", "chats.jsonl")
    for age, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        os.utime((tmp_path / file).parent, (age, age))
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_takes_a_run_names_the_one_that_was_meant(name, here, capsys):
    for path in ("out/quickstar", "quickstart", "out/my"):
        with pytest.raises(UserError) as error:
            COMMANDS[name](path)
        meant = "runs in it: out/my/tune, out/my/train"
        if path != "out/my":
            meant = "did you mean out/quickstart?"
        assert meant in error.value.text and path in error.value.text
    assert capsys.readouterr().out == ""  # no heading above an error


SAID = {
    "out/missing": "; runs there: out/quickstart-sft, out/quickstart, out/first",
    "out/my": "; it is a journey's folder; runs in it: out/my/tune, out/my/train",
    "out/my/tun": "; did you mean out/my/tune?",
    "out/eval/first-9": "; it holds results of evaluate.py",
    "data/text": "; it holds data, made by prepare_data.py",
    "out": "; runs in it: out/quickstart-sft, out/quickstart, out/first",
    "out/first": "; it is a run that has saved nothing yet",
    "out/first/config.yaml": "; did you mean out/first?",
    "hub/lama": "; did you mean hub/llama?",
    "hub/other": "",
    "nowhere/at/all": "",
    "x" * 300: "",
    "chats.jsonl/x": "",
}


@pytest.mark.parametrize("path", SAID)
def test_what_is_said(path, here):
    assert nearby.hint(path) == SAID[path]


def test_of_many_runs_the_newest_are_named(here):
    for i in range(9):
        (here / f"many/run{i}/step_00000001").mkdir(parents=True)
        os.utime(here / f"many/run{i}", (i, i))
    newest = ", ".join(f"many/run{i}" for i in range(8, 3, -1))
    assert nearby.hint("many") == f"; runs in it: {newest} and 4 more"
