"""evaluate.py as a command: the same bytes on any number of processes and after a stop, what it
leaves, and what it refuses."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read_lines, run_python
from rig import bytes_data, finish

import evaluate
import export
from lumen import models
from lumen import owner as owners
from lumen import tokenizer as tokenizers
from lumen.errors import UserError

WORDS = ("red", "blue", "old", "new", "sea", "green")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A prepared text of words, questions about what comes next in it, a text file."""
    top = tmp_path_factory.mktemp("evaluate")
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(900)]
    (top / "text.txt").write_text("\n".join(lines))
    bytes_data(top / "data", top / "text.txt")
    rows = []
    for number, line in enumerate(lines[:40]):
        choices = ["qqqq", "zz", "xkx"]
        choices.insert(number % 4, rng.choice(WORDS))
        rows.append({"question": f"{number} {line}", "choices": choices, "answer": number % 4})
    (top / "next.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (top / "book.txt").write_text("\n".join(lines[300:330]))
    return top


@pytest.fixture(scope="module")
def run(place):
    """A run that knows the words a little."""
    shape = {"vocab_size": 260, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    shape |= {"d_ff": 48, "max_seq_len": 64, "n_experts": 4, "d_expert": 32}
    keys = {"data_dir": str(place / "data"), "out_dir": str(place / "run"), "device": "cpu"}
    keys |= {"max_steps": 40, "save_interval": 0, "batch_size": 8, "learning_rate": 1e-2}
    keys |= {"warmup_steps": 2, "eval_tokens": 1024, "precision": "fp32", "compile_model": False}
    return finish(keys | {"model": shape}).out


def quantise(run, folder):
    export.main(["quantize", str(run), str(folder)])
    return folder


def scores(out) -> dict[str, dict]:
    """{task: its headline}"""
    results = json.loads((out / "results.json").read_text())
    return {name: task["scores"][0] for name, task in results["tasks"].items()}


def answers(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "answers").iterdir()}


def test_one_command_two_processes_and_a_stop(place, run, tmp_path, capsys):
    names = f"val,{place / 'next.jsonl'},{place / 'book.txt'}"
    words = [run, "--tasks", names, "--device", "cpu", "--precision", "fp32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert evaluate.main([str(word) for word in (*words, "--out", one)]) == 0
    assert "next" in capsys.readouterr().out
    found = scores(one)
    assert set(found) == {"val", "next", "book"}
    # a model that has seen the words finds them, but the question tells it nothing
    assert found["next"]["low"] > found["next"]["chance"] == 0.25
    assert found["next"]["n"] == 40 and "LEAK?" in found["next"]["verdict"]
    assert found["val"]["value"] < found["val"]["chance"]
    last = [row for row in read_lines(run / "metrics.jsonl") if row.get("val_loss")][-1]
    assert found["val"]["metric"] == "bits_per_byte"
    assert found["val"]["value"] == pytest.approx(last["val_bpb"], abs=1e-4)
    for name in ("report.md", "results.json"):
        assert (one / name).exists()
    # two processes go on behind what one of them had answered before it was killed
    shutil.copytree(one / "answers", two / "answers")
    head = (two / "answers/next.jsonl").read_text().splitlines()[:7]
    (two / "answers/next.rank1.part").write_text("\n".join(head) + '\n{"i": 7, "lo')
    for whole in (two / "answers").glob("*.jsonl"):
        whole.unlink()
    done = run_python("evaluate.py", *words, "--out", two, ranks=2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers(one) == answers(two)
    assert scores(one)["book"]["value"] == scores(two)["book"]["value"]
    assert evaluate.main(["--compare", str(one), str(two)]) == 0
    assert "no difference seen" in capsys.readouterr().out
    # the tasks of one model gather in a folder; another model's do not
    words[2] = str(place / "book.txt")
    assert evaluate.main([str(word) for word in (*words, "--out", one, "--stride", 32)]) == 0
    assert scores(one)["next"] == found["next"] and scores(one)["book"] != found["book"]
    with pytest.raises(UserError, match="another model"):
        quantised = quantise(run, tmp_path / "int8")
        evaluate.main([str(quantised), "--tasks", words[2], "--out", str(one)])
    # the rest is compared where one task is of another file
    (tmp_path / "other").mkdir()
    (tmp_path / "other/book.txt").write_text("plugh xyzzy quux " * 40)
    words[2] = f"{place / 'next.jsonl'},{tmp_path / 'other/book.txt'}"
    capsys.readouterr()
    assert evaluate.main([str(word) for word in (*words, "--out", tmp_path / "three")]) == 0
    said = capsys.readouterr()
    assert "book: contamination" not in said.err and "next: contamination" in said.err
    assert evaluate.main(["--compare", str(two), str(tmp_path / "three")]) == 0
    said = capsys.readouterr().out
    assert (
        "not compared: book: A and B were asked on different files" in said
        and "next acc_bytes" in said
    )
    words[2] = names
    # other options are other answers
    assert evaluate.main([str(word) for word in (*words, "--out", two, "--shots", 2)]) == 0
    assert answers(one)["next.jsonl"] != answers(two)["next.jsonl"]


def test_not_a_number_is_no_score(place, run, tmp_path):
    from safetensors.torch import load_file, save_file

    export.to_hf(run, tmp_path / "hf")
    (weights,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, weights, {"format": "pt"})
    out = tmp_path / "out"
    words = [tmp_path / "hf", "--tasks", place / "next.jsonl", "--out", out, "--limit", 5]
    assert evaluate.main([str(word) for word in words]) == 2
    assert scores(out)["next"]["value"] is None
    assert "NaN" in (out / "report.md").read_text()


def test_two_runs_on_one_held_out_text(place, run, tmp_path, monkeypatch, capsys):
    """A run is compared by its name, once it was evaluated; val:DIR is for both the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(run.parent)
    short = [f"out/{run.name}", "--tasks", f"val:{place / 'data'}", "--limit", "3"]
    with pytest.raises(UserError, match=f"was not evaluated.*first: python evaluate.py {short[0]}"):
        evaluate.main(["--compare", short[0], short[0]])
    assert evaluate.main(short) == 0
    capsys.readouterr()
    assert evaluate.main(["--compare", short[0], str(run)]) == 0
    said = capsys.readouterr().out
    assert f"A = out/eval/{run.name}-40, the newest results of {short[0]}" in said
    assert "val-data bits_per_byte" in said and "not compared" not in said
    with pytest.raises(UserError, match=f"E127.*its held-out text is val:{place / 'data'}"):
        evaluate.main([short[0], "--tasks", str(place / "data")])


@pytest.mark.parametrize(
    "words, code, text",
    [
        ([], "E304", "which model"),
        (["/nowhere"], "E304", "nowhere"),
        (["RUN", "--tasks", "boolqq"], "E127", "did you mean boolq"),
        (["RUN", "--tasks", "held"], "E127", "val:DIR"),
        (["RUN", "--data", "DATA"], "E127", "a prepared folder.* --tasks val:.*data$"),
        (["RUN", "--data", "FILE", "--tasks", "val"], "E127", "a file.* --tasks .*next.jsonl$"),
        (["RUN", "--limits", "3"], "E002", "--limit"),
        (["RUN", "--limit", "0"], "E002", "limit"),
        (["RUN", "--shots", "-1"], "E002", "shots"),
        (["RUN", "--lm_eval_path", "."], "E002", "--lm_eval NAME"),
        (["RUN", "--seed", str(2**64)], "E002", "seed"),
        (["RUN", "--tasks", "humaneval:DIR"], "E002", "allow_code"),
        (["--compare", "/nowhere", "/nowhere"], "E128", "^E128: /nowhere is not there"),
    ],
)
def test_what_is_refused(place, run, words, code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # out/eval is there
    named = {"RUN": str(run), "humaneval:DIR": f"humaneval:{place / 'next.jsonl'}"}
    named |= {"DATA": str(place / "data"), "FILE": str(place / "next.jsonl")}
    with pytest.raises(UserError, match=text) as caught:
        evaluate.main([named.get(word, word) for word in words])
    assert caught.value.code == code


def asked(place, run, out, *more) -> list[str]:
    words = (run, "--tasks", place / "next.jsonl", "--limit", 4, "--out", out, *more)
    return [str(word) for word in words]


def test_progress_begins_behind_what_is_answered(place, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.Progress, "SECONDS", -1)
    evaluate.main(asked(place, run, tmp_path))
    told = capsys.readouterr().err
    assert "next: 4 of 4 questions" in told and "a second, 0 s left" in told
    evaluate.main(asked(place, run, tmp_path, "--limit", 9))
    assert "next: 9 of 9 questions" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(place, run, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(asked(place, run, tmp_path))
    assert f"{tmp_path / 'answers'} has the answers" in capsys.readouterr().err


def test_a_folder_of_results_has_one_owner(place, run, tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "GRACE", 0)
    other = owners.Owner(tmp_path)
    other.take()
    other.working = True
    with pytest.raises(UserError, match="in use by") as caught:
        evaluate.main(asked(place, run, tmp_path))
    assert caught.value.code == "E300" and not (tmp_path / "answers").exists()
    other.working = False
    assert evaluate.main(asked(place, run, tmp_path)) == 0
    assert owners.read_json(tmp_path / "owner.json")["pid"] is None


def test_what_one_process_does_alone_keeps_no_other_waiting(place, run, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(evaluate.Parallel, "close", lambda self: order.append("closed"))
    monkeypatch.setattr(evaluate.Run, "add_overlap", lambda *_: order.append("alone"))
    assert evaluate.main(asked(place, run, tmp_path)) == 0
    assert order == ["closed", "alone"]


def test_a_report_that_cannot_be_written(place, run, tmp_path):
    (tmp_path / "report.md").mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory") as caught:
        evaluate.main(asked(place, run, tmp_path))
    assert caught.value.code == "E119"
    (tmp_path / "compare.md").mkdir()
    with pytest.raises(UserError, match="Is a directory") as caught:
        evaluate.main(["--compare", str(tmp_path), str(tmp_path), "--out", str(tmp_path)])
    assert caught.value.code == "E119"


class OfGpu3:
    """A rank of several."""

    rank, device = 1, torch.device("cuda", 3)

    def run_or_raise_on_all(self, do, *args):
        return do(*args)


def test_each_rank_has_a_device_and_all_a_tokenizer_that_fits(run, monkeypatch):
    devices = []
    opened = SimpleNamespace(tokenizer=tokenizers.load("bytes"), model=SimpleNamespace())
    opened.model.cfg = SimpleNamespace(vocab_size=200)

    def open_model(path, best, step, tokenizer, device, *more):
        devices.append(device)
        return opened

    monkeypatch.setattr(models, "open_model", open_model)
    with pytest.raises(UserError, match="bytes has 260 ids, .* knows 200") as caught:
        evaluate.Run(evaluate.parser().parse_args([str(run)]), OfGpu3())
    assert caught.value.code == "E113" and devices == ["cuda:3"]


def test_two_tasks_of_slurm_are_no_two_evaluations(run, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="srun started 2") as caught:
        evaluate.main([str(run)])
    assert caught.value.code == "E600"


def test_prompts_that_were_cut_are_counted(place, run, tmp_path):
    assert evaluate.main(asked(place, run, tmp_path, "--shots", 3)) == 0
    assert "cut 4 of 4 prompts, whose beginning" in (tmp_path / "report.md").read_text()
    assert evaluate.main(["--compare", str(tmp_path), str(tmp_path)]) == 0


def test_answers_are_of_the_same_labels_and_the_same_code(
    place, run, tmp_path, monkeypatch, capsys
):
    """Their sha256 may be that of the questions alone: PIQA's labels lie in a file of their own."""
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "b"} for n in range(4)]
    (tmp_path / "valid.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def evaluated(labels: str) -> dict:
        (tmp_path / "valid-labels.lst").write_text(labels)
        words = [run, "--tasks", f"piqa:{tmp_path / 'valid.jsonl'}", "--out", tmp_path / "out"]
        assert evaluate.main([str(word) for word in words]) == 0
        return scores(tmp_path / "out")["piqa"]

    zeros = evaluated("0\n" * 4)
    assert evaluated("1\n" * 4)["value"] == 1 - zeros["value"]
    capsys.readouterr()
    evaluated("1\n" * 4)
    assert "all answered before" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "code_sum", lambda: "another commit")
    evaluated("1\n" * 4)
    assert "all answered before" not in capsys.readouterr().err


def test_a_task_of_lm_eval_is_looked_for_before_anything_is_asked(
    place, run, tmp_path, monkeypatch
):
    def find(names, folder):
        raise UserError("E127", f"no {names}")

    monkeypatch.setattr(evaluate.harness, "need", lambda: None)
    monkeypatch.setattr(evaluate.harness, "find", find)
    with pytest.raises(UserError, match="no .'x'.") as caught:
        evaluate.main(asked(place, run, tmp_path / "out", "--lm_eval", "x"))
    assert caught.value.code == "E127" and not (tmp_path / "out/answers").exists()


def test_ranks_that_opened_other_models_make_no_score_together(place, run, tmp_path, monkeypatch):
    def gather(self, told):
        return [told, "another"] if isinstance(told, str) else [told]

    monkeypatch.setattr(evaluate.Parallel, "gather", gather)
    with pytest.raises(UserError, match="other models") as caught:
        evaluate.main(asked(place, run, tmp_path))
    assert caught.value.code == "E600"
