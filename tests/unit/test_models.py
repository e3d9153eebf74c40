"""lumen/models.py and lumen/quantised.py: whatever kind of folder a model lies in, it is the same
model; a folder that is damaged, foreign or none says so."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_models import KINDS as SHAPES
from sparse_models import make as make_sparse
from test_sample import T, code, command, make, save

import export
import sample
from lumen import chat, checkpoint, lora, models, quantised
from lumen.base import base_sha256
from lumen.config import LoraConfig
from lumen.experts import anneal_depth
from lumen.machine import detect
from lumen.models import open_model
from lumen.quantize import QuantExperts, QuantLinear, quantize
from model import Linear, role
from model_moe import Experts

CPU = {"device": "cpu", "precision": "fp32"}
X = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
KINDS = ("run", "adapters", "huggingface", "quantised")


def quiet(text):
    pass


def save_adapters(folder, base):
    """A run of adapters for a step, at step 5; the model with them."""
    made = make(3, qk_norm=False)
    cfg = LoraConfig(r=4)
    lora.add(made, cfg, 1, [])
    generator = torch.Generator().manual_seed(4)
    for name in lora.adapter_names(made):
        made.get_parameter(name).data.normal_(std=0.1, generator=generator)
    about = dataclasses.asdict(cfg) | {"fresh_ids": [], "quantize_base": None, "base": str(base)}
    about |= {"targets": list(lora.wrappers(made)), "base_sha256": base_sha256(base)}
    names = set(lora.adapter_names(made))
    pieces = {}
    for name, tensor in made.state_dict().items():
        if name in names:
            pieces[f"model.{name}"] = [(tuple(tensor.shape), (0,) * tensor.dim(), tensor)]
    final = checkpoint.step_dir(folder, 5)
    assert checkpoint.write(final.with_suffix(".tmp"), 0, pieces) is None
    config = {"model": dataclasses.asdict(made.cfg)}
    state = {"step": 5, "config": config, "adapter": about, "template": chat.describe("chat")}
    checkpoint.commit(final.with_suffix(".tmp"), final, 1, state)
    T.save(folder / "tokenizer.json")
    return made.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Llama in every kind of folder; run has steps 1, 2 and 3, of which 1 is the best, and the
    others were made of 3."""
    home = tmp_path_factory.mktemp("home")
    for step in (1, 2, 3):
        save(home / "run", step, model=make(step, qk_norm=False), template=chat.describe("chat"))
    (home / "run" / "best.json").write_text(json.dumps({"step": 1}))
    save_adapters(home / "adapters", home / "run" / "step_00000003")
    export.to_hf(home / "run", home / "huggingface", say=quiet)
    export.quantize(home / "run", home / "quantised", say=quiet)
    return home


def logits(model):
    with torch.no_grad():
        return model(X)


def equal(model, other) -> bool:
    """But for the order of sums, which is another in the layout that lumen/onednn.py gives."""
    a, b = logits(model), logits(other)
    return (a - b).abs().max().item() <= 2e-6 * b.abs().max().item()


def rounded(model):
    """The model with what its int8 matrices stand for."""
    quantize(model, "int8")
    return model.eval()


# ---------------------------------------------------------------- every kind


def test_whatever_folder_it_lies_in_it_is_the_same_model(home):
    source = make(3, qk_norm=False)
    want = {"run": source, "huggingface": source, "quantised": rounded(make(3, qk_norm=False))}
    size = sum(p.numel() for p in source.parameters())
    steps = {"run": 3, "adapters": 5, "huggingface": None, "quantised": 3}
    for kind in KINDS:
        opened = open_model(home / kind, **CPU, say=quiet)
        assert (opened.kind, opened.name, opened.step) == (kind, kind, steps[kind])
        assert opened.template == chat.find_template("chat")
        assert opened.tokenizer.same_ids(T)
        assert not opened.model.training
        assert not any(p.requires_grad for p in opened.model.parameters())
        assert f"{size:,} parameters" in str(opened)
        if kind in want:
            assert equal(opened.model, want[kind])
        loaded = sample.load(home / kind, **CPU)
        assert equal(loaded[0], opened.model) and loaded[2] == opened.step


def test_adapters_come_with_their_base(home, tmp_path):
    model = save_adapters(tmp_path / "lora", home / "run" / "step_00000003")
    opened = open_model(tmp_path / "lora", **CPU)
    want = logits(model)
    torch.testing.assert_close(logits(opened.model), want, rtol=1e-4, atol=1e-4)
    assert (logits(make(3, qk_norm=False)) - want).abs().max() > 1  # the base says otherwise
    assert opened.folder.name == "step_00000005" and "adapters merged" in str(opened)


def test_newest_best_and_step_of_a_run(home):
    run = home / "run"
    for options, step in (({}, 3), ({"best": True}, 1), ({"step": 2}, 2)):
        opened = open_model(run, **options, **CPU)
        assert opened.step == step and opened.folder == checkpoint.step_dir(run, step)
        assert equal(opened.model, make(step, qk_norm=False)) and opened.name == "run"
        alone = open_model(opened.folder, **CPU)
        assert (alone.sha256, alone.name, alone.step) == (opened.sha256, "run", step)
        assert opened.sha256 == base_sha256(opened.folder) and opened.state["step"] == step
    export.quantize(run, home / "best", best=True, say=quiet)
    export.quantize(run, home / "two", step=2, say=quiet)
    assert [open_model(home / name, **CPU).step for name in ("best", "two")] == [1, 2]
    assert open_model(home / "two", **CPU).state == open_model(run, step=2, **CPU).state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_cast_once_but_routers_and_scales_stay(home, tmp_path, precision):
    save(tmp_path / "run", 1, model=make_sparse(**SHAPES["fine"]), tokenizer=False)
    export.quantize(tmp_path / "run", tmp_path / "q", say=quiet)
    folders = [home / kind for kind in KINDS] + [tmp_path / "run", tmp_path / "q"]
    for folder in folders:
        model = open_model(folder, device="cpu", precision=precision).model
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert model.compute_dtype == dtype
        for name, p in model.named_parameters():
            assert p.dtype == (torch.float32 if role(name) == "router" else dtype), name
        for name, buffer in model.named_buffers():
            assert buffer.dtype != torch.bfloat16, name


def change_a_weight(kind, folder):
    """One number of one matrix; what lies beside it stays."""
    if kind in ("huggingface", "quantised"):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        next(t for t in tensors.values() if t.dim() == 2).view(-1)[7] += 1
        save_file(tensors, file)
        return
    step = next(folder.glob("step_*"))
    found = checkpoint.Checkpoint(step)
    pieces = {}
    for name in found.tensors:
        tensor = found.read(name)
        if not pieces:
            tensor.view(-1)[7] += 1
        pieces[name] = [(tuple(tensor.shape), (0,) * tensor.dim(), tensor)]
    assert checkpoint.write(step.with_suffix(".tmp"), 0, pieces) is None
    checkpoint.commit(step.with_suffix(".tmp"), step, 1, found.state)


def test_another_weight_is_another_sum(home, tmp_path):
    sums = {kind: open_model(home / kind, **CPU).sha256 for kind in KINDS}
    assert len(set(sums.values())) == 4
    for kind in KINDS:
        again = tmp_path / kind
        shutil.copytree(home / kind, again)
        for step in (1, 2):
            shutil.rmtree(checkpoint.step_dir(again, step), ignore_errors=True)
        assert open_model(again, **CPU).sha256 == sums[kind]
        change_a_weight(kind, again)
        if kind == "quantised":  # its sum is that of its files, which are checked
            assert code(open_model, again, **CPU).startswith("E303")
        else:
            assert open_model(again, **CPU).sha256 != sums[kind]
    save(tmp_path / "other", 3, seed=9)
    export.quantize(tmp_path / "other", tmp_path / "q", say=quiet)
    assert open_model(tmp_path / "q", **CPU).sha256 != sums["quantised"]


# ---------------------------------------------------------------- few bits


@pytest.mark.parametrize("name", ["dense", "fine", "slots", "hybrid"])
def test_a_quantised_folder_has_the_bits_of_quantising_in_memory(tmp_path, name):
    """In bf16 too, where embedding and norms are rounded once, and with MoD halfway annealed."""
    model = make_sparse(**SHAPES[name] | {"mod_anneal_steps": 16, "tie_embeddings": False})
    save(tmp_path / "run", 8, model=model, tokenizer=False)
    about = export.quantize(tmp_path / "run", tmp_path / "q", say=quiet)
    for precision in ("fp32", "bf16"):
        want = models.read_model(tmp_path / "run").model
        quantize(want, "int8")
        models.make_ready(want, detect("cpu", precision, False))
        found = open_model(tmp_path / "q", device="cpu", precision=precision).model
        both = zip(want.named_buffers(), found.named_buffers(), strict=True)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in both)
        assert equal(found, want)
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    before = model.state_dict()
    after = open_model(tmp_path / "q", **CPU).model
    anneal_depth(model, 8)
    for path, layer in model.named_modules():
        made = after.get_submodule(path)
        inside = path.startswith("blocks.") and isinstance(layer, Linear | Experts)
        assert (
            isinstance(made, QuantLinear | QuantExperts) == inside == (path in about["converted"])
        )
        if isinstance(made, QuantLinear):
            off = (made.weight - layer.weight).abs()
            assert (off <= made.scale.unsqueeze(1) / 2 * (1 + 1e-5)).all()
    for key, tensor in after.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert equal(open_model(tmp_path / "run", **CPU).model, model.eval())
    if "mod_capacity" in SHAPES[name]:
        for made in (model, after, open_model(tmp_path / "run", **CPU).model):
            assert {block.mod.capacity for block in made.blocks} == {0.75}


def test_what_stays_is_held_in_bf16_where_that_loses_nothing(tmp_path):
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        model.blocks[0].attn_norm.weight[3] = 1 + 2**-20
    save(tmp_path / "run", 1, model=model)
    about = export.quantize(tmp_path / "run", tmp_path / "q", say=quiet)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    wide = {name for name, t in tensors.items() if t.dtype == torch.float32}
    assert wide == {"blocks.0.attn_norm.weight"}
    assert tensors["blocks.1.ffn.w2.q"].dtype == torch.int8
    assert about["bytes_after"] == sum(t.numel() * t.itemsize for t in tensors.values())
    n = sum(p.numel() for p in model.parameters())
    assert about["bytes_before"] == 2 * n + 2 * model.cfg.d_model
    assert about["parameters"] == n and about["converted"] == sorted(
        name for name, m in model.named_modules() if isinstance(m, Linear) and name != "head"
    )
    reread = json.loads((tmp_path / "q" / "EXPORT.json").read_text())
    assert reread == about and about["source_sha256"] == open_model(tmp_path / "run").sha256


def test_a_hugging_face_folder_is_quantised_as_its_run(home, tmp_path):
    export.quantize(home / "huggingface", tmp_path / "q", say=quiet)
    opened = open_model(tmp_path / "q", **CPU)
    assert equal(opened.model, open_model(home / "quantised", **CPU).model)
    assert opened.step is None and opened.state == {} and opened.tokenizer.same_ids(T)
    assert opened.template == chat.find_template("chat")


def test_an_end_of_document_that_is_named_beside_the_tokenizer_is_kept(home, tmp_path):
    """tokenizer_config.json names it, and does not come along."""
    shutil.copytree(home / "huggingface", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "hf" / name
        file.write_text(file.read_text().replace("<|endoftext|>", "<finis>"))
    export.quantize(tmp_path / "hf", tmp_path / "q", say=quiet)
    export.from_hf(tmp_path / "hf", tmp_path / "run", say=quiet)
    for name in ("hf", "q", "run"):
        tokenizer = open_model(tmp_path / name, **CPU).tokenizer
        assert tokenizer.eot_id == tokenizer.controls["<finis>"] == T.eot_id


def test_a_run_read_with_another_tokenizer_says_so(home, tmp_path):
    said = []
    other = tmp_path / "bytes.json"
    other.write_text((home / "run" / "tokenizer.json").read_text().replace("<|im_s", "<|m_s"))
    open_model(home / "run", tokenizer=str(other), **CPU | {"say": said.append})
    assert any("is not the tokenizer that the run was trained with" in line for line in said), said
    said.clear()
    mine = next(home.glob("run/tokenizer.json"))
    open_model(home / "run", tokenizer=str(mine), **CPU | {"say": said.append})
    assert not any("not the tokenizer" in line for line in said)


# ---------------------------------------------------------------- the commands


def test_sample_takes_every_kind(home, capsys):
    greedy = ("--max_new_tokens", "6", "--temperature", "0", "--ignore_eot")
    texts = {}
    for kind in KINDS:
        out, err = command(capsys, str(home / kind), "--prompt", "def ", *greedy)
        model = open_model(home / kind, **CPU).model
        assert out == f"def {sample.sample(model, T, ['def '], 6, 0, ignore_eot=True)[0]}\n"
        assert ("step" in err) == (kind != "huggingface") and "parameters, cpu, float32" in err
        words = ("--chat", "--prompt", "hi", *greedy)
        texts[kind], err = command(capsys, str(home / kind), *words)
        assert "note" not in err
    assert texts["run"] == texts["huggingface"] != texts["adapters"]


def test_of_a_base_model_it_is_said_where_a_template_was_looked_for(home, tmp_path, capsys):
    shutil.copytree(home / "huggingface", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    words = ("--chat", "--prompt", "hi", "--max_new_tokens", "2")
    _, err = command(capsys, str(tmp_path / "hf"), *words)
    assert "no chat template that Lumen knows in its folder" in err
    assert f"python finetune.py {tmp_path}/hf --data" in err
    export.quantize(tmp_path / "hf", tmp_path / "q", say=quiet)
    _, err = command(capsys, str(tmp_path / "q"), *words)
    assert "a base model" in err and "finetune.py" not in err  # which takes no quantised one


def test_the_words_of_quantize(home, tmp_path, capsys):
    words = ["quantize", str(home / "run"), str(tmp_path / "q"), "--step", "2", "--bits", "8"]
    export.main(words)
    out = capsys.readouterr().out
    assert "quantised" in out and "step 2" in out and str(tmp_path / "q") in out
    assert code(export.main, words).startswith("E117")
    assert code(export.main, [*words[:-1], "3"]).startswith("E002")


# ---------------------------------------------------------------- what is no model


def test_what_was_looked_for_is_said(home, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    shutil.copytree(home / "huggingface", tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    for name in ("empty", "file", "gone"):
        text = code(open_model, tmp_path / name, **CPU)
        assert text.startswith("E304") and name in text
        assert all(word in text for word in ("step_*", "config.json", "EXPORT.json"))
    assert "from_peft" in code(open_model, tmp_path / "peft", **CPU)
    assert code(open_model, tmp_path / "half", **CPU).startswith("E401")
    assert "step_*" not in code(open_model, home / "run", step=9, **CPU)
    for kind in ("huggingface", "quantised"):
        for options in ({"best": True}, {"step": 3}):
            assert "is no run" in code(open_model, home / kind, **options, **CPU)
    assert code(open_model, home / "run", best=True, step=3).startswith("E002")


def test_a_foreign_folder_is_read_exactly_or_refused(home, tmp_path):
    shutil.copytree(home / "huggingface", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "E401" in code(open_model, tmp_path / "hf", **CPU)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "no model.safetensors" in code(open_model, tmp_path / "hf", **CPU)


def spoil(folder, what):
    file = folder / what
    about = json.loads((folder / "EXPORT.json").read_text())
    if what == "truncated":
        with open(folder / "model.safetensors", "rb+") as out:
            out.truncate(1000)
    elif what == "tampered":
        about["bits"] = 4
    elif what == "newer":
        about["format"] = 3
        about["sha256"] = checkpoint.manifest_sha256(about)
    elif what == "half":
        (folder / "EXPORT.json").write_text('{"format": 1,')
        return
    elif what == "config.yaml":
        file.write_text(file.read_text().replace("n_layers: 2", "n_layers: 1"))
    else:
        file.unlink()
    (folder / "EXPORT.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "what, refusal",
    [
        ("truncated", "E303"),
        ("tampered", "E303"),
        ("half", "E303"),
        ("newer", "E306"),
        ("config.yaml", "E303"),
        ("tokenizer.json", "E303"),
        ("model.safetensors", "E303"),
    ],
)
def test_a_damaged_quantised_folder_is_refused(home, tmp_path, what, refusal):
    shutil.copytree(home / "quantised", tmp_path / "q")
    spoil(tmp_path / "q", what)
    assert code(open_model, tmp_path / "q", **CPU).startswith(refusal)


def test_tensors_that_are_not_the_models_are_refused(home, tmp_path):
    """By a file that is whole and says otherwise."""
    tensors = load_file(home / "quantised" / "model.safetensors")
    about = quantised.read_about(home / "quantised")
    cfg = models.read_model(home / "quantised").model.cfg
    name = next(name for name in tensors if name.endswith(".q"))
    for change in ({name: None}, {name: tensors[name].float()}, {name: tensors[name][1:]}):
        shutil.copytree(home / "quantised", tmp_path / "q", dirs_exist_ok=True)
        file = tmp_path / "q" / "model.safetensors"
        spoilt = {key: t for key, t in (tensors | change).items() if t is not None}
        checkpoint.save_tensors(spoilt, file)
        sums = {"sha256": checkpoint.sha256(file), "size": file.stat().st_size}
        lie = about | {"files": about["files"] | {file.name: sums}}
        lie["sha256"] = checkpoint.manifest_sha256(lie)
        (tmp_path / "q" / "EXPORT.json").write_text(json.dumps(lie))
        assert code(open_model, tmp_path / "q", **CPU).startswith("E305")
    assert cfg.n_layers == 2


def test_nothing_is_left_of_a_quantisation_that_is_refused(home, tmp_path):
    model = make()
    model.blocks[1].ffn.w2.weight.data[3, 4] = float("nan")
    save(tmp_path / "run", 1, model=model)
    assert "NaN" in code(export.quantize, tmp_path / "run", tmp_path / "q", say=quiet)
    text = code(export.quantize, home / "quantised", tmp_path / "q", say=quiet)
    assert text.startswith("E401") and "already" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
