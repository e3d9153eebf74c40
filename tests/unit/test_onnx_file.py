"""lumen/onnx_file.py: the graph computes what the model does, for any batch and length; the file
says what it is of; what has no graph, and what goes wrong, says so and leaves nothing behind."""

import json
import sys

import pytest
import torch
from sparse_models import KINDS
from sparse_models import make as make_sparse
from test_sample import T, code, make, save

import export
from lumen import chat, models, onnx_file
from model_moe import plain_experts

onnxruntime = pytest.importorskip("onnxruntime")
LLAMA3 = {
    "type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA = dict(qk_norm=False, tie_embeddings=False, rope_scaling=LLAMA3, n_layers=1)


def quiet(text):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_file(file, ids):
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(["logits"], {"ids": ids.numpy()})[0])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Llama's run with a step 1, which is the best, and a step 2; what was made of step 1."""
    home = tmp_path_factory.mktemp("home")
    for step in (1, 2):
        save(home / "run", step, model=make(step, **LLAMA), template=chat.describe("chat"))
    (home / "run" / "best.json").write_text(json.dumps({"step": 1}))
    made = []
    graph = onnx_file.graph

    def keep(model):
        made.append(graph(model))
        return made[-1]

    onnx_file.graph = keep
    said = []
    argv = home / "run", home / "new" / "model.onnx"
    report = onnx_file.to_onnx(*argv, check=True, best=True, say=said.append)
    onnx_file.graph = graph
    return home, report, said, made[0]


@pytest.fixture
def no_graph(monkeypatch, home):
    """Exporting takes seconds: the one that there is."""
    monkeypatch.setattr(onnx_file, "graph", lambda model: home[3])


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (3, 7), (2, 48), (1, 60)])
def test_logits_equal_for_every_batch_and_length(home, shape):
    """Lengths beyond the model's context too: RoPE knows them."""
    ids = torch.randint(T.n_vocab, shape, generator=torch.Generator().manual_seed(1))
    ours = make(1, **LLAMA)(ids)
    theirs = run_file(home[0] / "new" / "model.onnx", ids)
    assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
    assert ours.std() > 1 and (theirs - ours).abs().max() < 1e-4


def test_the_file_says_what_it_is_of(home):
    folder, report, said, _ = home
    session = onnxruntime.InferenceSession(folder / "new" / "model.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    source = models.read_model(folder / "run", best=True, say=quiet)
    assert meta["name"] == "run" and meta["step"] == "1" and meta["sha256"] == source.sha256
    assert meta["max_seq_len"] == "48" and meta["n_vocab"] == str(T.n_vocab)
    assert meta["tokenizer.json"] == T.to_json() and meta["eot_id"] == str(T.eot_id)
    assert json.loads(meta["template"]) == chat.describe("chat")
    assert [i.shape for i in session.get_inputs()] == [["batch", "length"]]
    assert session.get_outputs()[0].shape[:2] == ["batch", "length"]
    assert names(folder / "new") == ["model.onnx"], "nothing else is left"
    assert report["max_diff"] < 1e-4 and "1x48" in said[-1] and "step 1" in said[-1]


def test_large_weights_lie_beside(home, no_graph, tmp_path):
    said = []
    file = tmp_path / "model.onnx"
    onnx_file.to_onnx(home[0] / "run", file, best=True, check=True, large=0, say=said.append)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert "model.onnx.data, which belongs to it" in said[-1]
    ids = torch.arange(10)[None]
    small = run_file(home[0] / "new" / "model.onnx", ids)
    assert torch.equal(run_file(file, ids), small)
    file.unlink()
    assert "model.onnx.data exists" in code(onnx_file.to_onnx, home[0] / "run", file, say=quiet)


@pytest.mark.parametrize("kind", ["mixtral", "null", "fine"])
def test_all_experts_is_the_plain_formula(kind):
    model = make_sparse(**KINDS[kind])
    moe = model.sparse_layers("moe")[0]
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    p, ids, _, _ = moe.router(x)
    weights = moe.experts.w13, moe.experts.w2
    want = plain_experts(x, p, ids, *weights)
    got = onnx_file.all_experts(x, p, ids, *weights, "slices", moe.router.n)
    assert want.std() > 0.01 and (got - want).abs().max() < 1e-6


def test_a_model_is_left_as_it_was():
    model = make_sparse(**KINDS["fine"])
    moe = model.sparse_layers("moe")[0]
    before = moe.experts.run, moe.backend
    with onnx_file.for_export(model):
        assert moe.experts.run is not before[0]
    assert (moe.experts.run, moe.backend) == before


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "changes",
    [
        *({} | KINDS[k] for k in ("dense", "switch", "mixtral", "fine", "slots", "null")),
        dict(rope_scaling=YARN, tie_embeddings=False),
        dict(rope_scaling={"type": "linear", "factor": 2.0}, qk_norm=False),
        dict(norm_order="lunaris"),
        dict(rope_first=True, n_kv_heads=4),
        dict(n_kv_heads=1, head_dim=16),
    ],
    ids=str,
)
def test_every_kind_exports(changes, tmp_path):
    model = make_sparse(**changes).eval().requires_grad_(False)
    onnx_file.graph(model).save(tmp_path / "x.onnx")
    assert onnx_file.compare(model, tmp_path / "x.onnx")["max_diff"] < 1e-5


# ---------------------------------------------------------------- what cannot be


def test_a_wrong_graph_is_seen_and_not_kept(home, no_graph, tmp_path):
    """The graph is of step 1, the model of step 2."""
    text = code(onnx_file.to_onnx, home[0] / "run", tmp_path / "a.onnx", check=True, say=quiet)
    assert text.startswith("E402") and "1x48" in text
    assert names(tmp_path) == []


def test_what_has_no_graph(home, tmp_path):
    file = tmp_path / "a.onnx"
    save(tmp_path / "mod", 1, model=make(mod_capacity=0.5))
    text = code(onnx_file.to_onnx, tmp_path / "mod", file, say=quiet)
    assert text.startswith("E404") and "Mixture of Depths in layers [0, 1]" in text
    export.quantize(home[0] / "run", tmp_path / "q", say=quiet)
    text = code(onnx_file.to_onnx, tmp_path / "q", file, say=quiet)
    assert text.startswith("E404") and "few bits" in text
    assert not file.exists()


def test_what_torch_cannot_export_says_why(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    text = code(onnx_file.graph, make())
    assert text.startswith("E404") and text.endswith("RuntimeError: no such operator")


def test_weights_that_are_not_finite(tmp_path):
    model = make()
    model.norm.weight.data[3] = torch.nan
    save(tmp_path / "run", 1, model=model)
    text = code(onnx_file.to_onnx, tmp_path / "run", tmp_path / "a.onnx", say=quiet)
    assert text.startswith("E303") and "norm.weight" in text


def test_places_that_cannot_be_written(home, no_graph, tmp_path, monkeypatch):
    run = home[0] / "run"
    (tmp_path / "file").write_text("mine")
    text = code(onnx_file.to_onnx, run, tmp_path / "file", say=quiet)
    assert text.startswith("E117") and (tmp_path / "file").read_text() == "mine"
    assert code(onnx_file.to_onnx, run, tmp_path, say=quiet).startswith("E117")
    text = code(onnx_file.to_onnx, run, tmp_path / "file" / "a.onnx", say=quiet)
    assert text.startswith("E403")
    text = code(onnx_file.to_onnx, run, tmp_path / ("x" * 300), say=quiet)
    assert text.startswith("E403")

    def full(path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home[3], "save", full)
    text = code(onnx_file.to_onnx, run, tmp_path / "a.onnx", say=quiet)
    assert text.startswith("E403") and "No space left" in text
    assert names(tmp_path) == ["file"], "nothing is left of it"


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_is_read(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    text = code(onnx_file.to_onnx, tmp_path / "none", tmp_path / "a.onnx", check=True, say=quiet)
    assert text.startswith("E003") and name in text and "requirements-export.txt" in text


def test_the_command(home, tmp_path):
    run, file = str(home[0] / "run"), str(tmp_path / "a.onnx")
    text = code(export.main, ["to_onnx", run, file, "--best", "--step", "1"])
    assert text.startswith("E002")
    assert code(export.main, ["to_onnx", run, file, "--step", "9"]).startswith("E304")
    assert code(export.main, ["to_onnx", str(tmp_path / "none"), file]).startswith("E304")
    assert code(export.main, ["to_onnx", run]).startswith("E002")
    assert code(export.main, ["to_onnx", run, "$NOT_SET/a.onnx"]).startswith("E002")
