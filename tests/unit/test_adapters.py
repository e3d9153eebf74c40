"""lumen/adapters.py and peft_files.py: runs of adapters are read with their base and no other, merged
to the same function, and are PEFT's adapters, in both directions."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_models import KINDS, ids, make

import export
import sample
from lumen import adapters, checkpoint, lora
from lumen.base import base_sha256
from lumen.config import LoraConfig
from lumen.errors import UserError
from lumen.quantize import quantize

KINDS = KINDS | {
    "llama": dict(qk_norm=False),
    "untied": dict(tie_embeddings=False, n_layers=3),
    "mixtral": dict(qk_norm=False, n_experts=4, d_expert=16),
}
X = ids(2, 16)
ATTENTION = LoraConfig(r=4, alpha=12.0, targets=["attn"])


def quiet(text):
    pass


def write_base(folder, seed=0, **model):
    made = make(seed, **model)
    export.write_step(folder, made.cfg, made.state_dict(), {"imported": {"from": "x"}}, None, quiet)
    return made


def write_adapters(folder, model, base, cfg=LoraConfig(r=4), fresh=(), kind=None):
    """A run of adapters as finetune.py writes it; returns the model with them."""
    if kind:
        quantize(model, kind)
    lora.add(model, cfg, 1, fresh)
    generator = torch.Generator().manual_seed(2)
    names = set(lora.adapter_names(model))
    for name in sorted(names):  # the same draws in every process: a set's order is not
        if ".lora_a" not in name:
            p = model.get_parameter(name)
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    buffers = {name for name, _ in model.named_buffers()}
    state = {n: t for n, t in model.state_dict().items() if n in names | buffers}
    wrapped = lora.wrappers(model).items()
    about = dataclasses.asdict(cfg) | {"fresh_ids": list(fresh), "quantize_base": kind}
    about["targets"] = [n for n, m in wrapped if not isinstance(m, lora.FreshRows)]
    about |= {"base": str(base), "base_sha256": base_sha256(base)}
    about = {"adapter": about, "imported": {"from": "y"}}
    export.write_step(folder, model.cfg, state, about, None, quiet)
    return model.eval()


def make_runs(folder, kind="dense", cfg=LoraConfig(r=4), fresh=(3, 5), quantized=None):
    """folder/base and folder/lora; the model with its adapters."""
    model = write_base(folder / "base", **KINDS[kind])
    base = folder / "base" / "step_00000000"
    return write_adapters(folder / "lora", model, base, cfg, fresh, quantized)


def logits_of(run):
    return sample.load(run, precision="fp32", device="cpu", say=quiet)[0](X)


def same(found, want, most=1e-5):
    torch.testing.assert_close(found, want, rtol=0, atol=most)


# ---------------------------------------------------------------- with their base


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "hybrid",
        pytest.param("untied", marks=pytest.mark.nightly),
        pytest.param("fine", marks=pytest.mark.nightly),
    ],
)
def test_a_run_of_adapters_is_read_merged_and_exported_as_one_model(tmp_path, kind):
    want = make_runs(tmp_path, kind)(X)
    same(logits_of(tmp_path / "lora"), want)
    report = adapters.merge(tmp_path / "lora", tmp_path / "whole", check=True, say=quiet)
    same(logits_of(tmp_path / "whole"), want)
    assert report["max_diff"] <= 1e-5
    assert json.loads((tmp_path / "whole" / "MERGE.json").read_text()) == report
    assert "adapter" not in checkpoint.find(tmp_path / "whole").state
    if kind == "hybrid":
        assert "mod_capacity" in report["exported"]
        return
    assert report["exported"]["greedy_equal"] and report["exported"]["max_diff"] <= 1e-5
    export.to_hf(tmp_path / "lora", tmp_path / "hf", say=quiet)
    export.to_hf(tmp_path / "whole", tmp_path / "hf2", say=quiet)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf2"))
    assert all(torch.equal(one[name], two[name]) for name in {*one, *two})


@pytest.mark.parametrize("kind", ["dense", "fine"])
def test_a_quantized_base_is_merged_as_it_was_trained_with(tmp_path, kind):
    half = LoraConfig(r=4, targets=["blocks.0"])  # the others are quantized too
    want = make_runs(tmp_path, kind, half, quantized="int8")(X)
    same(logits_of(tmp_path / "lora"), want)
    adapters.merge(tmp_path / "lora", tmp_path / "whole", say=quiet)
    same(logits_of(tmp_path / "whole"), want)


def test_a_base_in_a_hugging_face_folder(tmp_path):
    model = write_base(tmp_path / "base", **KINDS["llama"])
    export.to_hf(tmp_path / "base", tmp_path / "hf", say=quiet)
    want = write_adapters(tmp_path / "lora", model, tmp_path / "hf")(X)
    same(logits_of(tmp_path / "lora"), want)


def test_a_base_is_found_as_written_and_from_the_runs_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    model = write_base("out/base")
    want = write_adapters("out/lora", model, "out/base/step_00000000")(X)
    same(logits_of("out/lora"), want)
    monkeypatch.chdir(tmp_path)
    shutil.move("a", "b")
    same(logits_of("b/out/lora"), want)


def test_another_base_is_refused_and_a_missing_one(tmp_path):
    make_runs(tmp_path)
    shutil.rmtree(tmp_path / "base")
    base = str(tmp_path / "base" / "step_00000000")
    with pytest.raises(UserError, match="that is gone") as gone:
        sample.load(tmp_path / "lora", say=quiet)
    write_base(tmp_path / "base", seed=1)
    sums = [base_sha256(base), checkpoint.find(tmp_path / "lora").state["adapter"]["base_sha256"]]
    with pytest.raises(UserError, match="is another model") as other:
        adapters.merge(tmp_path / "lora", tmp_path / "whole", say=quiet)
    for error in (gone.value, other.value):
        assert error.code == "E311" and base in error.text and sums[1] in error.text
    assert sums[0] in other.value.text and not (tmp_path / "whole").exists()


def test_tensors_that_are_lacking_are_refused(tmp_path, monkeypatch):
    make_runs(tmp_path)
    read = checkpoint.Checkpoint.model_state

    def halved(found):
        state = read(found)
        if "adapter" in found.state:
            del state["blocks.0.attn.wo.lora_b"]
        return state

    monkeypatch.setattr(checkpoint.Checkpoint, "model_state", halved)
    with pytest.raises(UserError, match=r"E305.*lacking: \['blocks.0.attn.wo.lora_b'\]"):
        sample.load(tmp_path / "lora", say=quiet)


def test_a_merge_that_changes_something_is_not_written(tmp_path, monkeypatch):
    make_runs(tmp_path)
    monkeypatch.setattr(lora.LoRA, "merged", lambda self: lora.plain_linear(self.base.weight))
    with pytest.raises(UserError, match="E402"):
        adapters.merge(tmp_path / "lora", tmp_path / "wrong", check=True, say=quiet)
    assert not (tmp_path / "wrong").exists()


def test_a_whole_model_is_not_merged(tmp_path):
    write_base(tmp_path / "base")
    with pytest.raises(UserError, match="E002"):
        adapters.merge(tmp_path / "base", tmp_path / "again", say=quiet)


# ---------------------------------------------------------------- PEFT


def in_peft(tmp_path, base, folder):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    export.to_hf(base, tmp_path / "hf", say=quiet)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    return peft, theirs if folder is None else peft.PeftModel.from_pretrained(theirs, folder).eval()


@pytest.mark.parametrize(
    "kind, cfg",
    [
        ("dense", LoraConfig(r=4)),
        ("untied", LoraConfig(r=4, rslora=True, targets=["blocks.1", "q_proj"])),
        ("mixtral", ATTENTION),
    ],
)
def test_peft_computes_what_we_do_and_gives_it_back(tmp_path, kind, cfg):
    pytest.importorskip("peft")
    want = make_runs(tmp_path, kind, cfg)(X).detach()
    adapters.to_peft(tmp_path / "lora", tmp_path / "peft", base=tmp_path / "hf", say=quiet)
    _, theirs = in_peft(tmp_path, tmp_path / "base", tmp_path / "peft")
    with torch.no_grad():
        same(theirs(X).logits, want)
    theirs.save_pretrained(tmp_path / "again")
    for folder, base in (("peft", "base"), ("again", "hf")):
        run = tmp_path / f"from_{folder}"
        adapters.from_peft(tmp_path / folder, run, str(tmp_path / base), say=quiet)
        same(logits_of(run), want)
        one, two = (checkpoint.find(tmp_path / r) for r in (run.name, "lora"))
        for name in one.model_state():
            assert torch.equal(one.read(f"model.{name}"), two.read(f"model.{name}")), name


OPTIONS = {
    "an A each": dict(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], r=3),
    "some of a fused one": dict(target_modules=["q_proj", "v_proj", "down_proj"], r=4),
    "patterns": dict(
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"k_proj": 2, "layers.0.mlp.down_proj": 7},
        alpha_pattern={"q_proj": 5, "o_proj": 3.5},
    ),
    "rows of one table": dict(target_modules=["o_proj"], trainable_token_indices=[9, 4]),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_adapters_that_peft_made_are_read_exactly(tmp_path, option):
    write_base(tmp_path / "base", **KINDS["untied"])
    peft, model = in_peft(tmp_path, tmp_path / "base", None)
    cfg = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | OPTIONS[option])
    model = peft.get_peft_model(model, cfg).eval()
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            p.data = 0.1 * torch.randn(p.shape)
    model.save_pretrained(tmp_path / "peft")
    adapters.from_peft(tmp_path / "peft", tmp_path / "lora", str(tmp_path / "hf"), say=quiet)
    with torch.no_grad():
        same(logits_of(tmp_path / "lora"), model(X).logits)


def peft_folder(tmp_path, kind="dense", cfg=ATTENTION):
    make_runs(tmp_path, kind, cfg)
    adapters.to_peft(tmp_path / "lora", tmp_path / "peft", say=quiet)
    return tmp_path / "peft"


@pytest.mark.parametrize(
    "key, value",
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("something_new", 3),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_key(tmp_path, key, value):
    folder = peft_folder(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"E401.*{key}") as error:
        adapters.from_peft(folder, tmp_path / "new", str(tmp_path / "base"), say=quiet)
    assert "adapter_config.json" in error.value.text and not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["shape", "module", "key", "half", "cut", "rows"])
def test_tensors_that_do_not_fit_are_refused_by_their_name(tmp_path, what):
    folder = peft_folder(tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensor = tensors.pop(key)
    name = "layers.1.self_attn.q_proj"
    if what == "shape":
        tensors[key] = tensor[:-1].clone()
    elif what == "module":
        name = "layers.9.self_attn.q_proj"
        for half in "AB":
            other = key.replace("lora_B", f"lora_{half}")
            tensors[other.replace("layers.1", "layers.9")] = torch.ones(4, 4)
        tensors[key] = tensor
    elif what == "key":
        tensors[key.replace("lora_B", "lora_magnitude_vector")] = tensor.clone()
        tensors[key] = tensor
    elif what == "rows":
        name = "embed_tokens"
        tensors[key] = tensor
        config = json.loads((folder / "adapter_config.json").read_text())
        config["trainable_token_indices"] = {name: [3, 5, 9]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    if what == "cut":
        name = "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"E401.*{name}"):
        adapters.from_peft(folder, tmp_path / "new", str(tmp_path / "base"), say=quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "kind, targets, why",
    [
        ("mixtral", None, "ffn.experts.*41384.*merge"),
        ("fine", ["attn", "w2"], "ffn.shared.w2.*41384.*merge"),
        ("mod", None, "mod_capacity"),
    ],
)
def test_what_peft_cannot_express_is_refused(tmp_path, kind, targets, why):
    make_runs(tmp_path, kind, LoraConfig(r=4, targets=targets))
    with pytest.raises(UserError, match=f"E400.*{why}"):
        adapters.to_peft(tmp_path / "lora", tmp_path / "peft", say=quiet)
    assert not (tmp_path / "peft").exists()


def test_the_commands_words(tmp_path, capsys):
    make_runs(tmp_path)
    run, whole = str(tmp_path / "lora"), str(tmp_path / "whole")
    adapters.main(["merge", run, whole])
    assert "adapters of step 0 merged" in capsys.readouterr().out
    adapters.main(["to_peft", run, str(tmp_path / "p"), "--base", "hub/name"])
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "hub/name"
    adapters.main(
        ["from_peft", str(tmp_path / "p"), str(tmp_path / "r"), "--base", whole + "/../base"]
    )
    same(logits_of(tmp_path / "r"), logits_of(run))
    with pytest.raises(UserError, match="E117"):
        adapters.main(["to_peft", run, str(tmp_path / "p")])
    with pytest.raises(UserError, match="E300"):
        adapters.main(["merge", run, whole])


BROKEN = [  # of adapter_config.json, what E401 says of it
    ({"alpha_pattern": {"(": 3}}, "unterminated"),
    ({"alpha_pattern": {"(a+)+b": 3}}, "no simple one"),
    ({"alpha_pattern": [3]}, "AttributeError"),
    ({"trainable_token_indices": {"embed_tokens": [3, 999]}}, "trained rows of"),
    ({"trainable_token_indices": {"embed_tokens": [3, -1]}}, "trained rows of"),
    ({"trainable_token_indices": {"embed_tokens": [3, 3]}}, "trained rows of"),
    ({"trainable_token_indices": {"embed_tokens": ["a", "b"]}}, "trained rows of"),
]


def test_a_strangers_peft_folder_is_refused_not_half_read(tmp_path):
    """Tracebacks, and ids that no embedding has, in a run that was then written."""
    make_runs(tmp_path)
    adapters.to_peft(tmp_path / "lora", tmp_path / "peft", say=quiet)
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    args = (tmp_path / "peft", tmp_path / "again", tmp_path / "base", quiet)
    for change, said in BROKEN:
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"E401.*{said}"):
            adapters.from_peft(*args)
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"E401.*holds NaN"):
        adapters.from_peft(*args)
    assert not (tmp_path / "again").exists()
