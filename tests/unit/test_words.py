"""Words on the command line and in the YAML: wrong values, wrong keys, wrong files, none of them
with a traceback."""

import dataclasses
import importlib
import json
import math
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_python, write_yaml

import export
import prepare_data
import train
import train_fsdp
from lumen import checkpoint, launch, shown
from lumen import tokenizer as tokenizers
from lumen.cli import read_config
from lumen.config import Config, OrchestratorConfig, build_config, help_text
from lumen.errors import UserError
from lumen.model_keys import model_from_keys
from model import ModelConfig
from tools import selftest

WRONG_VALUES = [
    None,
    [],
    {},
    "",
    " ",
    "x",
    "a\0b",
    -1,
    0,
    0.5,
    3,
    1e30,
    10**30,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
]


WRONG_VALUES += [
    True,
    False,
    [1],
    [0, 0],
    [{}],
    ["x"],
    [None],
    {"a": {"b": [1]}},
    [[[]]],
    "x" * 300,
    "x/" * 3000,
]


WRONG_VALUES += [
    "010",
    "1:30",
    "0x10",
    "1_0",
    "-0",
    "1e400",
    "\u0663",
    {"sources": "x"},
    {"sources": {"a": 5}},
]


WRONG_VALUES += [{"sources": {"a": {"dir": "d", "weight": "x"}}}, {"sources": {"a": {"dir": []}}}]


WRONG_VALUES += [
    {"sources": ["x"], "tokenizer": [5]},
    {"sources": ["x"], "out": []},
    {"sources": [[]]},
]


WRONG_VALUES += [{"type": "yarn", "factor": "x"}, {"type": []}, {"type": "linear", "factor": 0}]


PHASES = [("x", {"a": 1}), (1, {"b": 1}), (math.nan, {"a": 1}), (1, {"a": -1}), (1, 5)]


WRONG_VALUES += [
    {"sources": {"a": {"dir": "d"}}, "phases": [{"until": u, "weights": w}]} for u, w in PHASES
]


def answer(words, main=read_config) -> str:
    """What a command says to words that it refuses."""
    with pytest.raises(UserError) as e:
        main([str(w) for w in words])
    assert e.value.exit_code == 2
    return str(e.value)


def test_every_key_with_every_wrong_value():
    """Any key is given anything. It is a configuration then, or the user is told with a code:
    nothing else happens."""
    seen = Counter()
    for block, cls in (("", Config), ("model", ModelConfig), ("orchestrator", OrchestratorConfig)):
        for f in dataclasses.fields(cls):
            for value in WRONG_VALUES:
                tree = {"data_dir": "d"} if f.name not in ("data", "prepare") else {}
                tree |= {block: {f.name: value}} if block else {f.name: value}
                try:
                    build_config(tree, lambda key: "there", [])
                    seen["right"] += 1
                except UserError as error:
                    assert error.code == "E002" and re.match(
                        "there: |model\\.|no data|. unknown keys", error.text
                    ), error.text
                    seen["refused"] += 1
    assert min(seen["right"], seen["refused"] / 3) > 300, seen


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 10**400, True, "x", [], {}, None, -5])
def test_a_model_of_anything(value):
    """A model of anything: it is a model's shape, or ValueError says which key."""
    for f in dataclasses.fields(ModelConfig):
        for base in ({}, {"n_experts": 4}, {"mod_capacity": 0.5}):
            try:
                model_from_keys(base | {f.name: value})
            except ValueError as error:
                assert str(error).startswith("model."), error


NESTED = [
    ("data: {sources: {x: {dir: d,\n weight: abc}}}", 2, "data.sources.x.weight: 'abc' is not float"),
    ("data: {sources: {x: {dir: d}},\n\n phases: 5}", 3, "data.phases"),
    ("data:\n  sources: {x: {dir: d}}\n  phases:\n  - {until: 1,\n     weights: {x: no1}}", 5, "phases[0].weights.x"),
    ("data: {sources: {x: {dir: d}}, phases: [{weights: {y: 1}}]}", 1, "names of x"),
    ("data: {sources: {x: {dir: d,\n wieght: 1}}}", 2, "did you mean weight?"),
    ("prepare:\n  sources: [stdlib]\n  tokenizer: [5]", 3, "prepare.tokenizer"),
    ("prepare:\n  sources: [stdlib]\n  out: %s" % ("x" * 300), 3, "too long"),
    ("data_dir: d\nmodel:\n  rope_scaling:\n    type: yarn\n    factor: big", 5, "model.rope_scaling.factor"),
    ("data_dir: d\nmodel:\n  n_layers: 2\n  mod_capacity: [0.5,\n    half]", 5, "model.mod_capacity[1]"),
    ("data_dir: d\norchestrator:\n  mode: act\n  check_interval: often", 4, "orchestrator.check_interval"),
    ("data_dir: d\nmodel:\n  n_heads: 010", 3, "'010' is not int"),  # 8 in YAML 1.1
    ("data_dir: d\nmax_steps: 1:30", 2, "'1:30' is not int"),  # 90 in YAML 1.1
    ("data_dir: d\nmodel:\n  rope_ntk_scale_base: x", 3, "'x' is not float"),
    ("data_dir: d\nbatch_tokens: 1e30", 2, "is not int"),
    ("data_dir: d\neps: 0", 2, "must be > 0"),
    ("data_dir: d\nprecision: fp8_e5m2", 2, "two bits"),
    ("data_dir: d\ndevice: gpu", 2, "must be one of auto, cuda"),
    ("data_dir: d\nattention: fast", 2, "flash"),
    ("data_dir: d\nmodel: &m\n  n_layers: *m", 3, "model.n_layers"),  # in itself
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "part"), NESTED, ids=lambda v: "" if isinstance(v, str) else str(v)
)
def test_a_mistake_deep_in_the_yaml(text, line, part, tmp_path):
    """A value within a value is wrong. The message names the line of that value."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    said = answer([path])
    assert said.startswith("E002: ") and part in said, said
    assert f"{path}:{line}: " in said, said


def test_words_that_are_no_numbers_keep_their_letters(tmp_path):
    """A folder is called 0.10, 007 or 2026-01-02; a source is one word. YAML reads them as
    something else."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "out_dir: 0.10\nwandb_run_name: 2026-01-02\nprepare: {sources: stdlib, out: 007}\nseed: '12'\n"
    )
    cfg, tree, *_ = read_config([str(path)])
    assert (cfg.out_dir, cfg.wandb_run_name, cfg.seed, tree["seed"]) == (
        "0.10",
        "2026-01-02",
        12,
        12,
    )
    assert cfg.prepare == {"sources": ["stdlib"], "out": "007"}


def test_encodings_of_the_yaml(tmp_path):
    """The YAML comes from Windows (UTF-16, a BOM) or from an old editor (latin-1)."""
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "w.yaml").write_text("data_dir: caf\u00e9\n", encoding=encoding)
        assert read_config([str(tmp_path / "w.yaml")])[0].data_dir == "caf\u00e9"
    (tmp_path / "l.yaml").write_bytes(b"data_dir: d\n# caf\xe9\n")
    assert f"{tmp_path}/l.yaml:2: byte 0xe9 is not UTF-8" in answer([tmp_path / "l.yaml"])


def test_a_pipe_is_a_configuration(tmp_path):
    """`python train.py <(...)`: what can be read only once is asked for twice, by main() and by the
    Trainer."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"data_dir: d\nseed: 5\n")
    os.close(write_end)
    for _ in range(2):
        cfg, *_ = read_config([f"/dev/fd/{read_end}"])
        assert (cfg.seed, cfg.out_dir) == (5, "out/run")
    os.close(read_end)


def test_a_configuration_that_is_not_where_it_was_looked_for(tmp_path, monkeypatch):
    """The path is right from another folder, misspelt, a folder, or none was given: no hint is what
    was typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("data_dir: d\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data_dir: d\n")
    assert str(ROOT / "configs/quickstart.yaml") in answer(["configs/quickstart.yaml"])
    assert "did you mean mine.yaml?" in answer(["mien.yaml"])
    (tmp_path / "run" / "step_00000001").mkdir()
    for folder in ("run", "run/step_00000001"):
        assert "did you mean run/config.yaml? It goes on with that run" in answer([folder])
    assert "runs in it: run" in answer(["."])
    assert "did you mean" not in answer(["63"])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text("data_dir: d\n")
    assert "did you mean" not in answer(["configs/my.yaml"])  # the folder's name says nothing
    for words in ([], ["--dry_run"], ["--seed", "3"]):
        assert "which configuration?" in answer(words) and "quickstart" in answer(words)


def test_all_unknown_keys_at_once(tmp_path):
    """A YAML of another trainer: what Lumen has no name for is named in one message, with its line
    and what may be meant; so is what has another meaning here."""
    path = tmp_path / "c.yaml"
    keys = {
        "n_layer": None,  # understood: not a word about it
        "dry_run": "unknown key dry_run; it belongs on the command line: --dry_run",
        "learnin_rate": "unknown key learnin_rate; did you mean learning_rate?",
        "hiden_size": "unknown key hiden_size; did you mean hidden_size, model.d_model here?",
        "ema_decay": "unknown key ema_decay; python train.py --help lists all",
        "cpu_offload": "cpu_offload: 1: not there, as its cost was never measured",
        "warmup_ratio": "warmup_ratio: 1: must be in [0, 1)",
    }
    path.write_text("".join(f"{key}: 1\n" for key in keys) + "model:\n  snapshot_interval: 5\n")
    said = answer([path, "--mod_capcity", "0.5"])
    for i, text in enumerate(keys.values(), 1):
        assert f"{path}:{i}: {text}" in said if text else f"{path}:{i}: " not in said
    assert f"{path}:9: unknown key model.snapshot_interval; it belongs under orchestrator:" in said
    assert "command line: unknown key mod_capcity; did you mean model.mod_capacity?" in said


@pytest.mark.parametrize(("text", "words", "gone", "kept"), [
    ("max_steps: 9", ["--num_epochs", "3"], "max_steps", {"num_epochs": 3.0}),
    ("max_steps: 9", ["--epochs", "2"], "max_steps", {"num_epochs": 2.0}),
    ("num_epochs: 2", ["--tokens_per_parameter", "9"], "num_epochs", {"tokens_per_parameter": 9.0}),
    ("num_epochs: 2", ["--auto_epoch_scaling"], "num_epochs", {"tokens_per_parameter": 20.0}),
    ("grad_accum: 2", ["--batch_tokens", "64"], "gradient_accumulation_steps", {"batch_tokens": 64}),
    ("batch_tokens: 4096", ["--gradient_accumulation_steps", "2"], "batch_tokens", {"gradient_accumulation_steps": 2}),
    ("gradient_accumulation_steps: 2", ["--batch_tokens", "64"], "gradient_accumulation_steps", {"batch_tokens": 64}),
    ("prepare: {sources: [x], out: o}", ["--data_dir", "e"], "prepare", {"data_dir": "e"}),
    ("prepare: {sources: [x], out: o}", ["--data_dir", "o"], None, {"data_dir": "o"}),
    ("data: {sources: {x: {dir: d}}}", ["--data_dir", "e"], "data", {"data_dir": "e"}),
    ("batch_tokens: 4096", ["--batch_size", "2"], None, {"batch_size": 2, "batch_tokens": 4096}),  # they go together
])  # fmt: skip
def test_what_is_typed_beats_what_the_file_says(text, words, gone, kept, tmp_path):
    """One key is typed, the file says the same in another way: the typed one holds, and a note
    names the other."""
    path = tmp_path / "c.yaml"
    path.write_text(
        text
        + ("\n" if "d" in text.partition(":")[0][:1] or "prepare" in text else "\ndata_dir: d\n")
    )
    cfg, tree, notes, _ = read_config([str(path), *words])
    assert {key: getattr(cfg, key) for key in kept} == kept
    assert (gone is None and not notes) or (gone not in tree and f"{gone}: " in notes[-1])
    path.write_text(
        "data_dir: d\nmax_steps: 5\nnum_epochs: 2\n"
    )  # in one place they still contradict each other
    assert "--max_steps null" in answer([path])


LONG = "x" * 300


COMMANDS = {
    "train": [[], ["nope"], [LONG], ["FOLDER"], ["quickstart", "--nope"], ["quickstart", "--seed"], ["quickstart", "x"],
              ["quickstart", "--seed", "x"], ["--="], ["quickstart", "--model", "5"],
              ["quickstart", "--world_size", "2"],
              ["quickstart", "--dry_run", "--world_size", "x"], ["quickstart", "--data_dir", "FOLDER"],
              ["quickstart", "--data_dir", "FILE"], ["quickstart", "--out_dir", LONG], ["FILE"]],
    "train_fsdp": [[], ["nope"], ["quickstart", "--nope"]],
    "prepare_data": [[], ["FILE"], ["FILE", "--out"], ["FILE", "--out", "o", "--nope"], ["nope", "--out", "o"],
                     ["FOLDER", "--out", "o"], ["FILE", "--out", "o", "--seed", "x"], ["FILE", "--out", ""],
                     ["FILE", "--out", "o", "--max_bad", "nan"], ["FILE", "--out", "o", "--workers", "0"],
                     [LONG, "--out", "o"], ["FILE", "--out", LONG], ["FILE", "--out", "o", "--tokenizer", "FOLDER"],
                     ["synthetic:99999999999999", "--out", "o"]],
    "sample": [[], ["nope", "--ids", "1"], ["FOLDER", "--ids", "1"], ["FILE", "--ids", "1"], [LONG],
               ["FOLDER", "--nope"], ["FOLDER", "--top_k"], ["FOLDER", "--top_k", "x"],
               ["FOLDER", "--prompt_file", "FOLDER"], ["FOLDER", "--ids", "x"],
               ["FOLDER", "--chat", "--ids", "1"]],
    "export": [[], ["nope"], ["to_hf"], ["to_hf", "nope", "o"], ["to_hf", "FILE", "o"], ["to_hf", LONG, "o"],
               ["to_hf", "FOLDER", "o", "--dtype", "x"], ["from_hf", "FOLDER", "o"], ["from_hf", "FILE", "o"],
               ["from_lunaris", "FOLDER", "o"], ["from_lunaris", "FILE", "o", "--n_heads", "x"]],
    "lumen.checkpoint": [[], ["--nope"], ["nope"], ["FOLDER"], ["FILE"], ["a", "b"], [LONG]],
    "lumen.machine": [["--nope"], ["envv"]],
    "lumen.docstrings": [[], ["nope"], ["--choice", "x"], ["--choices"], ["--choices", LONG], ["--choices", "FOLDER"],
                         ["--pairs", "o", "--split", "x"], ["--chat", "nope/o"]],
    "tools.bench": [[], ["--nope"], ["nope"], ["decisions"], ["decisions", "nope"], ["picture", "FILE"], ["speed"], [LONG],
              ["speed", "nope"], ["step", "--rounds", "x"], ["step", "--no"], ["kernels", "--size", "huge"],
              ["gpu"], ["decode", "nope"], ["learn", "--out", "FILE"], ["decisions", LONG]],
    "tools.gpu": [[], ["nope"], ["A", "--nope"], ["--toy"], ["report"], ["report", "nope"], ["report", "FOLDER"],
                  ["report", "FILE"], ["report", LONG], ["A", "--out", "FILE"]],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_words_to_every_command(name, tmp_path, monkeypatch):
    """No words, unknown ones, half of them, files that are not there or are folders: exit code 2
    with a code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE.txt").write_text("words")
    main = importlib.import_module(name).main
    for words in COMMANDS[name]:
        assert re.match(
            r"E\d{3}: .", answer([w.replace("FILE", "FILE.txt") for w in words], main)
        ), words


def test_one_style_of_options():
    """- or _ in an option, a misspelt one, a shortened one: all commands answer alike, and name the
    nearest."""
    import export
    import sample

    assert sample.parse(["run", "--max-tokens", "5"]).max_new_tokens == 5
    assert "did you mean --temperature?" in answer(["run", "--temp", "1"], sample.main)
    assert "did you mean --val_fraction?" in answer(
        ["x", "--out", "o", "--val-frac", "1"], prepare_data.main
    )
    assert "did you mean --best?" in answer(["to_hf", "run", "o", "--besst"], export.main)
    assert "command line: tools.selftest: " in answer(["--times"], selftest.main)


@pytest.mark.parametrize("env", [
    {"RANK": ""}, {"RANK": "x"}, {"LOCAL_RANK": "x"}, {"SLURM_RESTART_COUNT": "x"}, {"WORLD_SIZE": "-1"},
    {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "2"}, {"WORLD_SIZE": "2"}, {"MASTER_PORT": "x"},
    {"WORLD_SIZE": "9" * 5000},
])  # fmt: skip
def test_half_of_a_launch_in_the_environment(env, tiny, tmp_path, monkeypatch):
    """A shell still has RANK or WORLD_SIZE of something else: E600 names the variable, nothing is
    started."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    said = answer([write_yaml(tmp_path / "c.yaml", tiny())], train.main)
    assert said.startswith("E600: ") and next(iter(env)) in said


def test_a_process_whose_rank_is_no_number():
    """The rank is needed to say who speaks: it is said nevertheless, by a process, with exit code
    2."""
    result = run_python("train.py", "quickstart", RANK="x")
    assert result.returncode == 2 and result.stderr.startswith("error E600: RANK='x'"), (
        result.stderr
    )


def test_wandb_mode_is_no_mode(tmp_path, monkeypatch):
    """WANDB_MODE is empty or misspelt; wandb would raise when the run has begun."""
    path = write_yaml(tmp_path / "c.yaml", {"data_dir": "d", "wandb_project": "p"})
    for mode in ("", "offlin"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert f"WANDB_MODE={mode!r}" in answer([path])


def test_print_config_says_what_it_does_not_know(capsys, tmp_path):
    """What auto and null become is decided by the start: the printed YAML says so, and runs as it
    is."""
    for module, sharded in ((train, False), (train_fsdp, True)):
        assert module.main(["quickstart", "--print_config"]) == 0
        text = capsys.readouterr().out
        assert (
            "precision: auto" in text.splitlines()[0]
            and "model.vocab_size: 0" in text.splitlines()[0]
        )
        assert ("without effect under train.py" in text) != sharded
        (tmp_path / "p.yaml").write_text(text)
        assert read_config([str(tmp_path / "p.yaml")])[0] == read_config(["quickstart"])[0]
    assert train.main(["--help"]) == 0
    assert "field(" not in capsys.readouterr().out


def test_help_names_no_file_that_is_not_here():
    """Help and comments send nobody to a page that is not in the repository."""
    for path in (*ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")):
        assert not re.search(r"research/|DESIGN", path.read_text(encoding="utf-8")), path


def test_a_table_of_keys_fits_the_terminal_and_loses_no_word(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    made = launch.fitted(help_text())
    assert max(map(len, made.splitlines())) <= 60
    assert made.split() == help_text().split()
    monkeypatch.delenv("COLUMNS")
    assert launch.fitted(help_text()) == help_text(), "a file gets whole lines"


def test_a_fine_tuning_of_few_steps_is_told_what_makes_more():
    told = shown.few_steps(1, rows_per_step=16, windows=6, readers=1)
    assert told == "1 steps teach little; --batch_size 1 --num_epochs 20 makes 120"
    assert "--batch_size" not in shown.few_steps(6, rows_per_step=1, windows=6, readers=1)
    assert not shown.few_steps(30, rows_per_step=16, windows=480, readers=1)


@pytest.mark.parametrize("length, cut", [(shown.SHOWN, False), (shown.SHOWN + 1, True)])
def test_a_row_of_which_only_the_beginning_is_shown_ends_with_dots(length, cut):
    ids = np.full(length, ord("a"))
    source = SimpleNamespace(row=lambda i: (ids, np.full(length, -1)), sides=1)
    text = shown.first_row(source, tokenizers.load("bytes"))
    assert text == "a" * shown.SHOWN + (" ..." if cut else "")


@pytest.mark.parametrize("sides", [1, 2])
def test_of_a_row_of_many_lines_eight_are_shown(sides):
    ids = np.frombuffer(b"a\n" * 60, np.uint8)[:100]
    rows = (np.stack([ids] * sides), np.full((sides, len(ids)), -1)) if sides > 1 else None
    rows = rows or (ids, np.full(len(ids), -1))
    text = shown.first_row(
        SimpleNamespace(row=lambda i: rows, sides=sides), tokenizers.load("bytes")
    )
    lines = [line for line in text.split("\n") if "rejected" not in line]
    assert lines == (["a"] * (8 // sides - 1) + ["a ..."]) * sides


def test_what_is_learned_is_said_in_a_line(tmp_path):
    done = {"truncated": 260, "merged": 0}
    (tmp_path / "report.json").write_text(json.dumps({"done_to_rows": done}))
    targets = np.array([-1, -1, 5, -1])
    known = {"windows": 3, "row": lambda i: (targets, targets), "path": str(tmp_path)}
    counts = {"rows": 4399, "dropped": {"E101": 1, "E107": 3}}
    manifest = {"counts": counts, "loss_on": "assistant"}
    chat = SimpleNamespace(**known, kind="chat", manifest=manifest)
    text = "25.0 % of the tokens"
    rest = "; of 4,399 conversations 260 truncated, 4 left out"
    assert shown.shares(chat) == f"{text} (replies){rest}"
    done |= dict.fromkeys(("merged", "tail_dropped", "system_dropped"), 1000)
    (tmp_path / "report.json").write_text(json.dumps({"done_to_rows": done}))
    assert len(shown.shares(chat)) == 89 and shown.shares(chat).endswith(" ...")
    chat.manifest, chat.windows = None, 257
    assert shown.shares(chat) == f"about {text} (replies)"
    chat.kind = "text"
    assert shown.shares(chat) == f"about {text}"


def test_a_reply_has_a_line_of_100_columns():
    line = shown.answered("Who wrote\n it?", "I did.")
    assert line == f"{' ' * 11}Who wrote it? -> 'I did.'"
    line = shown.answered("x" * 90 + " the end", "word " * 90)
    assert len(line) == 100 and line.endswith(" ...")
    assert line.strip().startswith("... xxx") and "x the end -> 'word word" in line


def test_a_command_without_its_word_lists_those_that_there_are():
    with pytest.raises(UserError) as error:
        export.main([])
    first, *lines = str(error.value).split("\n")
    assert first == "E002: which command? python export.py COMMAND --help, of"
    names = [line.split()[0] for line in lines]
    assert names == ["to_hf", "from_hf", "quantize", "to_gguf", "to_onnx", "from_lunaris"]
    assert "  to_hf         a run to a Hugging Face folder" in lines
    with pytest.raises(UserError, match="arguments are required: run"):
        export.main(["to_hf"])


def test_a_step_that_is_not_there_says_which_are(tmp_path):
    for step in (100, 200):
        checkpoint.step_dir(tmp_path, step).mkdir()
    with pytest.raises(UserError, match="E304: .*does not exist; there are 100, 200"):
        checkpoint.find(checkpoint.step_dir(tmp_path, 50))
