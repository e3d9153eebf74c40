"""GPTQ, its calibration, what a quantised model loses, and the words of `export.py quantize`."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from sparse_models import KINDS as SHAPES
from sparse_models import make as make_sparse
from test_sample import T, code, make, save

import export
import prepare_data
from lumen import gptq, models, quantise_names, quantize
from lumen.calibration import Judge
from lumen.launch import Words
from lumen.quantize import pack

CPU = {"device": "cpu", "precision": "fp32"}
FEW = {"eval_tokens": 960, "calibrate_tokens": 1920}


def quiet(text):
    pass


def correlated(rows: int, k: int, seed=0) -> torch.Tensor:
    """Inputs as layers see them: few directions, some columns large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    return (x + 0.3 * torch.randn(rows, k, generator=g)) * torch.rand(k, generator=g).exp2()


# ---------------------------------------------------------------- a matrix


def by_the_book(weight, H, kind):
    """Column by column, with the whole inverse at every step: Optimal Brain Quantisation in a fixed
    order, of which GPTQ's Cholesky factor is the short form."""
    n, k = weight.shape
    scale = pack(weight, kind).scale.view(n, -1)
    scale = scale.repeat_interleave(k // scale.shape[1], 1)  # of each number
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    H = H.double() + gptq.DAMPING * H.diagonal().mean() * torch.eye(k)
    work, made = weight.double().clone(), torch.zeros(n, k)
    for i in range(k):
        inverse = torch.linalg.inv(H[i:, i:])
        q = (work[:, i] / scale[:, i]).round().clamp(low, high)
        made[:, i] = q * scale[:, i]
        error = (work[:, i] - made[:, i]) / inverse[0, 0]
        work[:, i:] -= error[:, None] * inverse[0]
    return made


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_matrix_is_quantised_as_the_book_says(kind):
    """Over two strips of columns and several groups."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 192), correlated(400, 192)
    H = x.t() @ x
    found = gptq.gptq(weight, H.clone(), kind).to(torch.float32)
    want = by_the_book(weight, H, kind)
    # a number half-way between two levels may fall on either side, and moves those after it
    assert (found - want).abs().gt(1e-5).float().mean() < 0.02


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_what_it_computes_is_nearer_than_by_rounding(kind, act_order):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 192), correlated(400, 192)
    other = correlated(400, 192, seed=0)[:100]

    def off(made):
        return (other @ (made.to(torch.float32) - weight).t()).square().mean()

    found = gptq.gptq(weight, x.t() @ x, kind, act_order)
    assert off(found) < 0.7 * off(pack(weight, kind))
    assert torch.equal(found.scale, pack(weight, kind).scale)


def test_inputs_that_are_never_seen_and_few_rows_do_no_harm():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 100), torch.randn(40, 100)
    x[:, 7] = 0
    for kind in ("int8", "int4"):
        made = gptq.gptq(weight, x.t() @ x, kind).to(torch.float32)
        assert made.isfinite().all() and (made - weight).abs().max() < 3
    with pytest.raises(FloatingPointError):
        gptq.gptq(weight, torch.full((100, 100), float("nan")), "int4")


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("name", ["dense", "fine", "slots", "mod", "hybrid ffn"])
def test_a_model_is_quantised_block_after_block(name):
    """All of its matrices, each by what the quantised ones before it let through."""
    model = make_sparse(**SHAPES[name])
    rows = torch.randint(97, (40, 32), generator=torch.Generator().manual_seed(1))
    paths = quantize.convertible(model)
    report = gptq.quantize(model, "int4", rows, quiet)
    assert list(quantize.quantised_layers(model)) == paths
    assert report.tokens == rows.numel()
    with torch.no_grad():
        assert model(rows[:2]).isfinite().all()


def test_a_layer_sees_what_the_quantised_blocks_before_let_through(monkeypatch):
    seen = {}
    run = gptq.matrix

    def spy(path, weight, inputs, *more):
        seen[path] = inputs.H.clone()
        return run(path, weight, inputs, *more)

    monkeypatch.setattr(gptq, "matrix", spy)
    model = make_sparse(std=0.3)
    rows = torch.randint(97, (40, 32), generator=torch.Generator().manual_seed(1))
    gptq.quantize(model, "int4", rows, quiet)
    inputs = []
    layer = model.blocks[1].attn.wqkv
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(rows)
    x = torch.cat(inputs)
    torch.testing.assert_close(seen["blocks.1.attn.wqkv"], x.t() @ x, rtol=1e-3, atol=1e-2)


def test_experts_that_few_tokens_reach_are_rounded_to_nearest():
    model = make_sparse(**SHAPES["fine"])
    for moe in model.sparse_layers("moe").values():
        moe.router.bias[:] = torch.tensor([9.0] * 2 + [0.0] * 6)  # two of eight get all
    plain = make_sparse(**SHAPES["fine"])
    quantize.quantize(plain, "int4")
    rows = torch.randint(97, (20, 32), generator=torch.Generator().manual_seed(1))
    report = gptq.quantize(model, "int4", rows, quiet)
    assert (report.experts, report.starved) == (16, 12) and "12 of 16 experts" in str(report)
    for i in (0, 1):
        found, want = model.blocks[i].ffn.experts, plain.blocks[i].ffn.experts
        same = [torch.equal(a, b) for a, b in zip(found.w13_q, want.w13_q)]
        assert same == [False, False] + [True] * 6


# ---------------------------------------------------------------- of a run's own data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with data, of which some is held out."""
    home = tmp_path_factory.mktemp("gptq")
    prepare_data.prepare(["synthetic:60"], str(home / "data"), "bytes", quiet=True)
    model = make(3)
    state = {"config": {"data_dir": str(home / "data"), "val_fraction": 0.1}}
    state["run"] = {"segments": [[0, {"data": 1.0}]]}
    save(home / "run", 3, model=model, **state)
    return home / "run"


def test_bits_per_byte_before_and_after_stand_in_export_json(run, tmp_path):
    said = []
    about = export.quantize(run, tmp_path / "q", bits=4, max_loss=1e9, say=said.append, **FEW)
    found = about["measured"]
    assert found["metric"] == "bits_per_byte" and found["tokens"] == 960
    assert json.loads((tmp_path / "q" / "EXPORT.json").read_text())["measured"] == found
    assert found["loss_percent"] == pytest.approx(100 * (found["after"] / found["before"] - 1))
    # as evaluate's loop has it, by hand
    source = models.read_model(run)
    judge = Judge(source, 960, None, quiet)
    assert judge.measure(source.model) == found["before"]
    nats = n_bytes = 0
    for name, number in judge.rows:
        x, y = judge.task.sources[name].row(number)[:2]
        with torch.no_grad():
            logits = source.model(torch.tensor(x.astype("int64"))[None])[0]
        nats += F.cross_entropy(logits, torch.tensor(y.astype("int64")), reduction="sum").item()
        n_bytes += int(T.token_bytes()[y].sum())
    assert found["before"] == pytest.approx(nats / n_bytes / 0.693147, rel=1e-3)
    opened = models.read_model(tmp_path / "q")
    assert Judge(opened, 960, None, quiet).measure(opened.model) == found["after"]
    assert any("measured" in line and "%" in line for line in said)


def test_what_loses_too_much_is_not_written(run, tmp_path):
    lost = export.quantize(run, tmp_path / "q", bits=4, max_loss=1e9, say=quiet, **FEW)
    lost = lost["measured"]["loss_percent"]
    for most in (lost - 1e-3, -1):
        text = code(export.quantize, run, tmp_path / "x", bits=4, max_loss=most, say=quiet, **FEW)
        assert text.startswith("E002" if most < 0 else "E405")
        assert not list(tmp_path.glob("x*"))
    export.quantize(run, tmp_path / "x", bits=4, max_loss=lost + 1e-3, say=quiet, **FEW)


def test_gptq_takes_the_runs_own_rows(run, tmp_path):
    said = []
    how = FEW | {"bits": 4, "max_loss": 1e9}
    about = export.quantize(run, tmp_path / "q", method="gptq", say=said.append, **how)
    assert about["calibration"]["tokens"] == 1920 and about["method"] == "gptq"
    assert about["calibration"]["data"] == str(run.parent / "data")
    assert any("GPTQ on 1,920 tokens" in line for line in said)
    plain = export.quantize(run, tmp_path / "rtn", say=quiet, **how)
    assert about["files"]["model.safetensors"] != plain["files"]["model.safetensors"]
    assert models.open_model(tmp_path / "q", **CPU).kind == "quantised"


def test_a_file_and_a_folder_are_calibrated_by(run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words to calibrate by. " * 40)
    for named in (file, run.parent / "data"):
        how = {"method": "gptq", "bits": 4, "calibrate": str(named), "max_loss": 1e9} | FEW
        about = export.quantize(run, tmp_path / f"q-{named.name}", say=quiet, **how)
        assert about["calibration"]["data"] == str(named)


def test_without_data_it_is_said_and_null(tmp_path):
    save(tmp_path / "run", 3, model=make(3))
    said = []
    about = export.quantize(tmp_path / "run", tmp_path / "q", bits=4, say=said.append)
    assert about["measured"] is None and any("left out" in line for line in said)
    for how in ({"method": "gptq"}, {"method": "gptq", "calibrate": str(tmp_path / "none")}):
        text = code(export.quantize, tmp_path / "run", tmp_path / "x", say=quiet, **how)
        assert text.startswith("E002") and "--calibrate" in text
    text = code(export.quantize, tmp_path / "run", tmp_path / "x", max_loss=1.0, say=quiet)
    assert text.startswith("E405") and "--val_data" in text
    short = tmp_path / "short.txt"
    short.write_text("short")
    how = {"method": "gptq", "calibrate": str(short), "say": quiet}
    assert code(export.quantize, tmp_path / "run", tmp_path / "x", **how).startswith("E114")
    (tmp_path / "empty").mkdir()
    how["calibrate"] = str(tmp_path / "empty")
    text = code(export.quantize, tmp_path / "run", tmp_path / "x", **how)
    assert text.startswith("E110") and "--calibrate" in text
    assert not list(tmp_path.glob("x*"))


def test_data_that_have_gone_and_a_model_without_tokenizer(tmp_path):
    config = {"data_dir": str(tmp_path / "gone"), "val_fraction": 0.1}
    save(tmp_path / "run", 3, model=make(3), tokenizer=False, config=config)
    text = code(export.quantize, tmp_path / "run", tmp_path / "x", method="gptq", say=quiet)
    assert text.startswith("E002") and "gone" in text and "--calibrate" in text
    file = tmp_path / "text.txt"
    file.write_text("words " * 100)
    how = {"method": "gptq", "calibrate": str(file), "say": quiet}
    assert code(export.quantize, tmp_path / "run", tmp_path / "x", **how).startswith("E501")


# ---------------------------------------------------------------- the command's words


def test_other_methods_answer_with_the_command_that_has_them(run, tmp_path):
    for method in ("awq", "fp8"):
        words = ["quantize", str(run), str(tmp_path / "q"), "--method", method]
        text = code(export.main, words)
        assert text.startswith("E002") and "pip install llmcompressor" in text
        assert f"python export.py to_hf {run} HF" in text and "oneshot(" in text
        script = re.search(r"<<'END'\n(.*?)\n +END", text, re.S)[1]
        compile("\n".join(line[4:] for line in script.splitlines()), "script", "exec")
    assert code(export.main, [*words[:-1], "magic"]).startswith("E002")


def test_numbers_out_of_range_are_refused(run, tmp_path):
    begin = ["quantize", str(run), str(tmp_path / "q")]
    for more in (
        ["--bits", "3"],
        ["--max_loss", "-1"],
        ["--max_loss", "nan"],
        ["--eval_tokens", "-1"],
        ["--max_loss", "1", "--eval_tokens", "0"],
        ["--method", "gptq", "--calibrate_tokens", "0"],
        ["--calibrate", "x.txt"],
        ["--act_order"],
    ):
        assert code(export.main, begin + more).startswith("E002"), more
    assert not list(tmp_path.iterdir())


PARSER = Words()
quantise_names.options(PARSER)
OWN = PARSER.names()
TRANSLATED = {
    "--quantization_bits 4": "--bits 4",
    "--quantization-method gptq": "--method gptq",
    "--quantization_method=own": "--method rtn",
    "--inference_precision int8": "--bits 8",
    "--desc_act true": "--act_order",
    "--group_size 128": "",
    "--inference_precision int4 --quantization_bits 4": "--bits 4",
    "--method int8": "--method rtn",
}


@pytest.mark.parametrize("theirs", TRANSLATED)
def test_names_of_others_are_taken(theirs):
    said = []
    words = quantise_names.translate(["quantize", "RUN", "DIR", *theirs.split()], OWN, said.append)
    assert " ".join(words[3:]) == TRANSLATED[theirs] and said


@pytest.mark.parametrize(
    "theirs",
    [
        "--quantization_method bnb",
        "--quantization_method none",
        "--inference_precision bf16",
        "--group_size 64",
        "--quantization_bits 4 --inference_precision int8",
        "--quantization_bits 4 --bits 8",
        "--quantization_bits",
        "--method qat",
    ],
)
def test_names_that_cannot_be_taken_say_why(theirs):
    words = ["quantize", "RUN", "DIR", *theirs.split()]
    assert code(quantise_names.translate, words, OWN, quiet).startswith("E002")
