"""lumen/option_names.py: what users of other evaluators type does what it does there, or is
refused, or is told to have no effect; nothing is passed over in silence."""

import pytest

from evaluate import TASKS, parser
from lumen.aliases import table
from lumen.errors import UserError
from lumen.option_names import translate

OWN = parser().names()


def read(line: str):
    """(what evaluate.py makes of it, the notes)"""
    words, notes = translate("evaluate.py", line.split(), OWN, TASKS)
    return parser().parse_args(words), notes


def refused(line: str) -> str:
    with pytest.raises(UserError) as e:
        read(line)
    assert e.value.code == "E002"
    return e.value.text


SAME = [  # as typed for another evaluator, and as ours
    # Lumi
    (
        "--checkpoint out/a --max_boolq_samples 100 --custom_prompts p.json --output_dir x",
        "out/a --limit 100 --prompts p.json --out x",
    ),
    ("--model_path=out/a --tokenizer-path t.json", "out/a --tokenizer t.json"),
    ("out/a --fast_mode --detailed_output", "out/a --limit 50 --detailed"),
    ("out/a --fast_mode true --limit 7", "out/a --limit 7"),  # it gives way, in any order
    ("out/a --fast_mode false", "out/a"),
    ("out/a --skip_perplexity", "out/a --tasks docstrings,smoke"),
    ("out/a --skip_boolq --tasks boolq:d,piqa:e", "out/a --tasks piqa:e"),
    ("out/a --skip_boolq", "out/a"),
    ("out/a --tasks a.txt --data_dirs b c", "out/a --tasks a.txt,val:b,val:c"),
    # lm-eval
    (
        "--model hf --model_args pretrained=out/a,dtype=float16 --tasks a,b --num_fewshot 5"
        " --limit 10 --batch_size auto --log_samples --output_path x --device cpu",
        "out/a --precision fp16 --tasks a,b --shots 5 --limit 10 --out x --device cpu",
    ),
    # nanochat
    (
        "--hf-path out/a --eval core,bpb,sample --max-per-task 16 --device-batch-size 4",
        "out/a --tasks core,val,samples --limit 16",
    ),
    ("out/a --precision bfloat16", "out/a --precision bf16"),
    ("--compare a b --checkpoint out/a", "out/a --compare a b"),
    # said twice, and the same
    ("out/a --num_fewshot 3 --n_shot 3", "out/a --shots 3"),
    # what is ours stays, a value that looks like one of their names too
    ("out/a --out core --tasks val", "out/a --out core --tasks val"),
]


@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_a_command_line_means_the_same_under_our_names(theirs, ours):
    (found, notes), (expected, none) = read(theirs), read(ours)
    assert found == expected and not none
    assert notes or theirs == ours


def test_notes_say_what_became_of_each_name():
    _, notes = read("--checkpoint out/a --max_boolq_samples 100 --fast_mode --batch_size 8")
    assert notes[:2] == ["checkpoint -> MODEL out/a", "max_boolq_samples -> limit 100"]
    assert notes[2].startswith("batch_size has no effect: each question is a forward pass")
    assert notes[3] == "fast_mode: limit is as typed"
    assert read("out/a --skip_perplexity")[1] == ["skip_perplexity -> tasks docstrings,smoke"]


@pytest.mark.parametrize(("line", "part"), [
    ("out/a --max_boolq_sample 5", "did you mean --max_boolq_samples?"),
    ("out/a --limt 5", "did you mean --limit?"),
    ("out/a --limit 3 --max_samples 4", "--max_samples is --limit here"),
    ("out/a --num_fewshot 3 --n_shot 4", "are both shots here"),
    ("out/a --tasks val --eval core", "are both tasks here"),
    ("out/a --tasks val --skip_perplexity", "leaves nothing to ask"),
    ("--model vllm", "--model vllm: Lumen's own model is asked"),
    ("out/a --model_args pretrained=b,max_length=5", "'max_length=5' has no meaning here"),
    ("out/a --gen_kwargs temperature=1", "a score would depend on a draw"),
    ("out/a --num_fewshot", "--num_fewshot needs a value"),
    ("out/a --checkpoint out/b", "unrecognized arguments"),  # two models
])  # fmt: skip
def test_what_contradicts_or_means_something_else_is_refused(line, part):
    assert part in refused(line)


@pytest.mark.parametrize("name", table("evaluate.py"))
def test_every_row_of_the_table_ends_in_an_option_or_in_a_reason(name):
    row = table("evaluate.py")[name]
    words = f"--{name} 5"
    if "flag" in row:
        words = f"--{name}"
    elif "pairs" in row:
        words = f"--{name} pretrained=5"
    try:
        found, notes = read(words)
    except UserError as error:
        assert error.text.endswith(row["refuse"])
        return
    changed = found != parser().parse_args([])
    assert changed or any("no effect" in note for note in notes), notes
