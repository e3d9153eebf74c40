"""export.py: our models are Hugging Face models, bit for bit, in both directions; what is not is
refused by name."""

import dataclasses
import json
import os
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import export
import model
from lumen import chat, checkpoint, gguf_model
from lumen.errors import UserError
from lumen.files import write_json
from lumen.models import read_model
from lumen.tokenizer import load
from model import ModelConfig, Transformer
from tools import import_lunaris

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
SHAPES = {
    "llama_tied": {"qk_norm": False},
    "llama_untied_gqa": {
        "qk_norm": False,
        "tie_embeddings": False,
        "n_kv_heads": 2,
        "rope_theta": 5e5,
    },
    "llama_head_dim": {"qk_norm": False, "head_dim": 16, "n_kv_heads": 1, "norm_eps": 1e-2},
    "llama_linear": {"qk_norm": False, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_llama3": {"qk_norm": False, "rope_scaling": LLAMA3},
    "qwen3_tied": {"n_kv_heads": 2, "dropout": 0.1},
    "qwen3_untied_head_dim": {
        "tie_embeddings": False,
        "head_dim": 24,
        "n_heads": 3,
        "n_kv_heads": 3,
    },
    "qwen3_yarn": {"rope_scaling": YARN},
    "qwen3_yarn_all": {
        "rope_scaling": YARN | {"attention_factor": 1.7, "beta_fast": 8, "beta_slow": 2}
    },
    "qwen3_yarn_no_original": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
}
SMALL = {"vocab_size": 96, "n_layers": 3, "n_experts": 5, "d_expert": 16, "d_ff": 48}
LLAMA = SMALL | {"qk_norm": False}
DOTS1 = SMALL | {"router": "sigmoid", "n_shared_experts": 1}
IDLE = {"capacity_factor": 0.5, "router_jitter": 0.3, "expert_dropout": 0.3}  # act in training only
SPARSE = {
    "mixtral_tied": LLAMA | IDLE,
    "mixtral_untied_gqa": LLAMA
    | {"tie_embeddings": False, "n_kv_heads": 2, "n_experts_per_token": 3},
    "mixtral_head_dim_hot": LLAMA
    | {"head_dim": 16, "n_kv_heads": 1, "n_heads": 3, "routing_temperature": 1.7},
    "mixtral_slots": LLAMA | {"n_experts_max": 6},
    "qwen3moe_tied": SMALL | {"n_experts_per_token": 3, "n_kv_heads": 2, "rope_scaling": YARN},
    "qwen3moe_raw": SMALL
    | IDLE
    | {"norm_topk": False, "n_dense_layers": 1, "tie_embeddings": False},
    "qwen3moe_top1_cold": SMALL
    | {"n_experts_per_token": 1, "moe_layers": [2, 0], "routing_temperature": 0.6},
    "qwen3moe_scale": SMALL | {"route_scale": 2.7},
    "qwen3moe_every": SMALL | {"moe_every": 2, "n_layers": 4},
    "qwen3moe_slots": SMALL | {"n_experts_max": 6, "norm_topk": True},
    "dots1_tied": DOTS1 | IDLE,
    "dots1_scale": DOTS1
    | {"n_shared_experts": 2, "n_dense_layers": 1, "route_scale": 2.5, "tie_embeddings": False},
    "dots1_top1_bare": DOTS1
    | {"n_shared_experts": 0, "n_experts_per_token": 1, "routing_temperature": 1.7},
    "dots1_raw": DOTS1
    | {"norm_topk": False, "moe_every": 2, "n_layers": 2, "n_experts_per_token": 3},
    "dots1_slots": DOTS1 | {"n_experts_max": 6},
    "dots1_slots_differ": DOTS1 | {"n_experts_max": 6, "n_dense_layers": 1},
    "dots1_slots_one": DOTS1 | {"n_experts_max": 6, "n_experts_per_token": 1},
}
# Empty slots by layer; every other model with slots has 1 and 4 empty in one layer, 0 and 2 in the
# next.
DEAD = {
    "dots1_slots_differ": [[], [1], [0, 3, 5]],
    "dots1_slots_one": [[1, 2, 3, 4, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4]],
}
MODELS = SHAPES | SPARSE


def config(**keys):
    sizes = {
        "vocab_size": 300,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
        "init_std": 0.02,
    }
    return ModelConfig(**sizes | keys)


def random_state(cfg, seed=0, dead=None):
    """Weights with logits of size 1 and norms that are not 1, so that a wrong name or convention
    shows. Routers decide clearly, so that rounding turns no choice; a sigmoid's have a bias that
    matters, on empty slots too."""
    model = Transformer(cfg)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, t in model.named_parameters():
        one, size = (
            1 + 0.3 * torch.randn(t.shape, generator=generator),
            30 if "router" in name else 10,
        )
        state[name] = one if t.dim() == 1 else t.detach() * size
    for i in filter(cfg.is_moe, range(cfg.n_layers)):
        r = f"blocks.{i}.ffn.router."
        if cfg.router == "sigmoid":
            state[r + "bias"] = 0.5 * torch.randn(len(state[r + "bias"]), generator=generator)
        if cfg.n_experts_max:
            state[r + "alive"] = torch.ones(cfg.n_experts_max, dtype=torch.bool)
            state[r + "alive"][dead[i] if dead else [[1, 4], [0, 2]][i % 2]] = False
    return state


def save_run(out_dir, cfg, step=7, seed=0, tokenizer=None, dead=None, change=(), **state):
    """What train.py leaves of a run, as far as export.py looks at it; returns the weights."""
    weights = random_state(cfg, seed, dead) | dict(change)
    pieces = {f"model.{n}": [(list(t.shape), [0] * t.dim(), t)] for n, t in weights.items()}
    for name in [
        n for n in pieces if ".experts." in n
    ]:  # as expert parallelism leaves them, and cut once more
        (shape, _, t), cut = pieces[name][0], pieces[name][0][0][1] // 3
        offsets = [(0, 0, t[:2]), (2, 0, t[2:, :cut]), (2, cut, t[2:, cut:])]
        pieces[name] = [(shape, [e, row, 0], part) for e, row, part in offsets]
    pieces["optim.norm.weight.exp_avg"] = [([1], [0], torch.zeros(1))]
    tmp = Path(f"{checkpoint.step_dir(out_dir, step)}.tmp")
    assert checkpoint.write(tmp, 0, pieces) is None
    state = {"step": step, "config": {"model": dataclasses.asdict(cfg)}, "clean": True} | state
    checkpoint.commit(tmp, checkpoint.step_dir(out_dir, step), 1, state)
    if tokenizer:
        tokenizer.save(out_dir / "tokenizer.json")
    return weights


@torch.no_grad()
def logits(cfg, state, ids):
    model = Transformer(cfg).eval()
    model.load_state_dict(state)
    return model(ids)


def refused(code, *words):
    """A UserError with this code whose text has every word."""
    return pytest.raises(
        UserError, match="(?s)" + code + ".*" + "".join(f"(?=.*{w})" for w in words)
    )


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture
def hf(tmp_path):
    """A small untied Llama folder to be spoilt."""
    save_run(tmp_path / "made", config(qk_norm=False, tie_embeddings=False, n_layers=1))
    export.to_hf(tmp_path / "made", tmp_path / "hf", say=str)
    return tmp_path / "hf"


def good_run(tmp_path):
    save_run(tmp_path / "good", config())
    return tmp_path / "good"


def edit(file, **keys):
    data = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in data.items() if v != "REMOVE"}))


# ---------------------------------------------------------------- to Hugging Face


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path, transformers):
    cfg = config(**MODELS[name])
    state = save_run(tmp_path / "run", cfg, dead=DEAD.get(name))
    report = export.to_hf(tmp_path / "run", tmp_path / "hf", check=True, say=str)
    assert report["max_diff"] <= 1e-4 and report["greedy_equal"] and report["source_step"] == 7
    assert json.loads((tmp_path / "hf" / "EXPORT.json").read_text()) == report
    # The same by hand, so that the check itself is held to account.
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, loading = load(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())  # no missing, unexpected or mismatched key
    assert type(theirs).__name__.lower() == name.split("_")[0] + "forcausallm"
    ids = torch.randint(cfg.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    ours = logits(cfg, state, ids)
    with torch.no_grad():
        assert (theirs(ids).logits - ours).abs().max() <= 1e-4
    theirs.generation_config.eos_token_id = None
    n = 32 if name in SHAPES else 8
    new = theirs.generate(ids[:1, :8], max_new_tokens=n, do_sample=False)[0, 8:].tolist()
    model = Transformer(cfg).eval()
    model.load_state_dict(state)
    assert [i for [i] in model.generate([ids[0, :8].tolist()], n, [0], temperature=0)] == new
    for key, other in (("rope_scaling", None), ("routing_temperature", 1.0), ("route_scale", 1.0)):
        if getattr(cfg, key) != other:  # it is not idle here
            assert (
                logits(dataclasses.replace(cfg, **{key: other}), state, ids) - ours
            ).abs().max() > 1e-2
    for what in (
        ("alive",) if name == "dots1_slots_one" else ("bias", "alive")
    ):  # one expert needs no bias
        idle = {
            n: t * 0 + (what == "alive") if n.endswith("router." + what) else t
            for n, t in state.items()
        }
        if any(not torch.equal(idle[n], state[n]) for n in state):
            assert (logits(cfg, idle, ids) - ours).abs().max() > 1e-2


DENSE = ["llama_untied_gqa", "llama_llama3", "qwen3_tied", "qwen3_yarn_all"]
BF16 = [*DENSE, "mixtral_head_dim_hot", "qwen3moe_raw", "dots1_tied", "dots1_slots_differ"]


@pytest.mark.parametrize(
    "name, dtype", [(n, "float32") for n in (*DENSE, *SPARSE)] + [(n, "bfloat16") for n in BF16]
)
def test_export_import_export_keeps_every_bit(name, dtype, tmp_path):
    cfg = config(**MODELS[name])
    state = save_run(tmp_path / "run", cfg, dead=DEAD.get(name))
    export.to_hf(tmp_path / "run", tmp_path / "a", dtype, say=str)
    export.from_hf(tmp_path / "a", tmp_path / "again", say=str)
    export.to_hf(tmp_path / "again", tmp_path / "b", say=str)  # default: the dtype it came in
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert {t.dtype for n, t in a.items() if not n.endswith("_bias")} == {getattr(torch, dtype)}
    assert a.keys() == b.keys() and all(
        t.dtype == torch.float32 for n, t in a.items() if n.endswith("_bias")
    )
    assert all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) and a[n].dtype == b[n].dtype
        for n in a
    )
    assert (tmp_path / "a" / "config.json").read_text() == (
        tmp_path / "b" / "config.json"
    ).read_text()
    found = checkpoint.find(tmp_path / "again")
    again, new = ModelConfig(**found.state["config"]["model"]), found.model_state()
    assert new.keys() == Transformer(again).state_dict().keys()
    dropped = cfg.n_experts_max and not again.n_experts_max
    assert bool(dropped) == (name in ("mixtral_slots", "qwen3moe_slots", "dots1_slots"))
    if dtype == "float32" and not dropped and cfg.routing_temperature == 1:
        alive = {
            n: new.get(n.removesuffix("bias") + "alive", True)
            for n in new
            if n.endswith("router.bias")
        }
        buffers = [n for n in new if n.endswith(("load", "retired"))]
        for n in (
            n for n in new if n.endswith("experts.w2")
        ):  # the scale of the gates, for a class without one
            state[n] *= cfg.route_scale / again.route_scale
        assert all(
            torch.equal(new[n] * alive.get(n, 1), state[n] * alive.get(n, 1))
            for n in new
            if n not in buffers
        )
        for name in (n for n in new if n.endswith("load")):  # the same share for all that are there
            shares = torch.ones_like(new[name]) * new.get(name.removesuffix("load") + "alive", 1)
            assert torch.allclose(new[name], shares / shares.sum())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_layout_covers_exactly_the_model(fused, name):
    cfg = config(**MODELS[name])
    with torch.device("meta"):
        model = Transformer(cfg)
    seen = {n: torch.zeros(t.shape) for n, t in model.named_parameters()}
    seen |= {
        n: torch.zeros(t.shape)
        for n, t in model.named_buffers()
        if n.endswith("bias") and cfg.router == "sigmoid"
    }
    table = export.layout(cfg, fused=fused)
    for ours, _, first, shape in table:
        region = [1] * (len(first) - len(shape)) + shape
        if 0 not in shape:
            seen[ours][tuple(slice(a, a + n) for a, n in zip(first, region))] += 1
    assert all((t == 1).all() for t in seen.values())
    assert len({theirs for _, theirs, *_ in table}) == len(table)


def test_config_has_the_spellings_of_transformers_4_and_5(tmp_path):
    save_run(tmp_path / "run", config(rope_scaling=YARN, rope_theta=5e5))
    export.to_hf(tmp_path / "run", tmp_path / "hf", "bfloat16", say=str)
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 5e5
    assert found["rope_scaling"] == YARN and YARN.items() <= found["rope_parameters"].items()
    assert (
        found["head_dim"] == 8
        and found["torch_dtype"] == "bfloat16"
        and found["max_position_embeddings"] == 64
    )
    assert found["sliding_window"] is None and found["attention_bias"] is found["mlp_bias"] is False
    assert found["eos_token_id"] is None  # a missing key would be 2 for a Llama
    assert not (tmp_path / "hf.tmp").exists()


def test_tokenizer_travels_both_ways(tmp_path, transformers):
    tokenizer, lines = load("bytes"), []
    save_run(tmp_path / "run", config(vocab_size=tokenizer.n_vocab + 4), tokenizer=tokenizer)
    report = export.to_hf(tmp_path / "run", tmp_path / "hf", check=True, say=lines.append)
    assert report["ids_equal"] is True and len(lines) == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == tokenizer.eot_id and theirs.model_max_length == 64
    assert theirs.pad_token_id == tokenizer.pad_id != tokenizer.eot_id
    found = [
        json.loads((tmp_path / "hf" / f).read_text())
        for f in ("config.json", "generation_config.json")
    ]
    assert {f["eos_token_id"] for f in found} == {tokenizer.eot_id}
    export.from_hf(tmp_path / "hf", tmp_path / "again", say=lines.append)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (
        tmp_path / "run/tokenizer.json"
    ).read_bytes()
    assert np.array_equal(np.load(tmp_path / "again/token_bytes.npy"), tokenizer.token_bytes())
    assert report["versions"]["transformers"] == transformers.__version__
    ends = [tokenizer.im_end_id, tokenizer.eot_id]  # ids of an imported run are kept as they came
    edit(tmp_path / "hf" / "config.json", eos_token_id=ends)
    export.from_hf(tmp_path / "hf", tmp_path / "two", say=str)
    export.to_hf(tmp_path / "two", tmp_path / "two_hf", say=str)
    assert (
        json.loads((tmp_path / "two_hf" / "generation_config.json").read_text())["eos_token_id"]
        == ends
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "two_hf").eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", chat.FORMATS)
def test_a_chat_template_travels_both_ways(name, tmp_path, transformers, monkeypatch):
    """The data's manifest names it; transformers makes our ids and mask, and stops where we do."""
    tokenizer, lines = load("bytes"), []
    write_json(tmp_path / "manifest.json", {"template": chat.describe(name)})
    cfg = config(vocab_size=tokenizer.n_vocab)
    written = {"model": dataclasses.asdict(cfg), "data_dir": str(tmp_path)}
    save_run(tmp_path / "run", cfg, tokenizer=tokenizer, config=written)
    report = export.to_hf(tmp_path / "run", tmp_path / "hf", check=True, say=lines.append)
    assert report["ids_equal"] is True
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == chat.stop_ids(name, tokenizer)[0]
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert np.atleast_1d(ends).tolist() == chat.stop_ids(name, tokenizer)
    messages = [("system", "s"), ("user", " <b> "), ("assistant", "c"), ("user", "d")]
    told = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        return_dict=True,
    )
    ours, _ = chat.render(messages, name, tokenizer, open_reply=True)
    assert told["input_ids"] == ours.tolist()

    export.from_hf(tmp_path / "hf", tmp_path / "again", say=lines.append)
    state = checkpoint.find(tmp_path / "again").state
    assert chat.template_of_run(state) == chat.find_template(name)
    theirs.save_pretrained(tmp_path / "hf")  # as transformers 5 writes it: in a file of its own
    assert export.read_template(tmp_path / "hf", say=lines.append) == {"template": name}
    assert not [line for line in lines if "chat template" in line]
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    assert export.read_template(tmp_path / "hf", say=lines.append) == {}
    assert "none of chatml, instruct" in lines[-1]

    # the check is held to account
    monkeypatch.setattr(chat, "jinja", lambda template: JINJA(template).replace("trim", "upper"))
    with refused("E402", "ids_equal False"):
        export.to_hf(tmp_path / "run", tmp_path / "wrong", check=True, say=str)


JINJA = chat.jinja


def test_tokenizers_that_do_not_go_along_are_said(tmp_path):
    lines = []
    save_run(tmp_path / "bare", config())
    export.to_hf(tmp_path / "bare", tmp_path / "hf", say=lines.append)
    assert "without a tokenizer: there is no tokenizer.json" in lines[0]
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    export.from_hf(tmp_path / "hf", tmp_path / "again", say=lines.append)
    assert (
        "without a tokenizer: E116" in lines[2]
        and not (tmp_path / "again" / "tokenizer.json").exists()
    )
    save_run(tmp_path / "small", config(vocab_size=100), tokenizer=load("bytes"))
    export.to_hf(tmp_path / "small", tmp_path / "small_hf", say=lines.append)
    assert "E113" in lines[4] and not (tmp_path / "small_hf" / "tokenizer.json").exists()


def test_shards_with_index(tmp_path, transformers):
    cfg = config(qk_norm=False, n_kv_heads=2)
    state = save_run(tmp_path / "run", cfg)
    export.to_hf(tmp_path / "run", tmp_path / "hf", check=True, say=str, shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in state.values())
    _, again, _, _ = export.read_hf(tmp_path / "hf")
    assert all(torch.equal(again[n], state[n]) for n in state)
    (tmp_path / "hf" / files[1]).unlink()
    with refused("E401", files[1]):
        export.read_hf(tmp_path / "hf")


@pytest.mark.parametrize("name", ["mixtral_slots", "dots1_slots_differ"])
def test_experts_stream(name, tmp_path, monkeypatch):
    """No more than one of their tensors is read at a time, of a file as expert parallelism leaves
    it."""
    cfg, read, sizes = config(**MODELS[name]), checkpoint.Checkpoint.read, []

    def spy(self, *args):
        sizes.append((tensor := read(self, *args)).numel())
        return tensor

    save_run(tmp_path / "run", cfg, dead=DEAD.get(name))
    monkeypatch.setattr(checkpoint.Checkpoint, "read", spy)
    export.to_hf(tmp_path / "run", tmp_path / "one", say=str)
    assert (
        max(sizes) == 96 * 32
    )  # the embedding; an expert's matrix has 16 * 32, all of them 6 * 2 * 16 * 32
    export.to_hf(tmp_path / "run", tmp_path / "many", say=str, shard_bytes=9000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {
        n: t
        for f in {*index["weight_map"].values()}
        for n, t in load_file(tmp_path / "many" / f).items()
    }
    assert one.keys() == many.keys() == index["weight_map"].keys() and all(
        torch.equal(one[n], many[n]) for n in one
    )
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in one.values())


def test_best_step_and_float16(tmp_path):
    save_run(tmp_path / "run", config(), step=5, seed=5)
    best = save_run(tmp_path / "run", config(), step=4, seed=4)
    checkpoint.write_json(tmp_path / "run" / "best.json", {"step": 4})
    export.main(
        ["to_hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--best", "--dtype", "float16"]
    )
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], best["embed.weight"].half())
    assert export.to_hf(tmp_path / "run", tmp_path / "newest", say=str)["source_step"] == 5


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"norm_order": "lunaris"}, ["model.norm_order: lunaris"]),
        ({"rope_first": True}, ["model.rope_first"]),
        ({"norm_order": "lunaris", "rope_first": True}, ["model.norm_order", "model.rope_first"]),
        ({"qk_norm": False, "n_heads": 3, "head_dim": 16}, ["model.n_heads"]),
        ({"mod_capacity": 0.5, "mod_layers": [1]}, ["model.mod_capacity: 0.5: no class routes tokens around blocks"]),
        (SMALL | {"mod_capacity": [1.0, 0.5, 1.0]}, ["model.mod_capacity"]),
        (SMALL | {"n_null_experts": 1}, ["model.n_null_experts: 1"]),
        (SMALL | {"n_shared_experts": 1}, ["model.n_shared_experts: 1"]),
        (SMALL | {"norm_order": "lunaris"}, ["model.norm_order"]),
        (LLAMA | {"n_dense_layers": 1}, [r"model.moe_layers: layers \[0\] are dense"]),
        (LLAMA | {"norm_topk": False}, ["model.norm_topk: false"]),
        (DOTS1 | {"qk_norm": False}, ["model.router: sigmoid with qk_norm: false"]),
        (DOTS1 | {"moe_layers": [0, 1]}, [r"model.moe_layers: layers \[2\] are dense"]),
        (DOTS1 | {"n_experts": 1, "n_experts_per_token": 1}, ["model.n_experts: 1"]),
        (LLAMA | {"n_experts_per_token": 1, "n_null_experts": 2, "moe_every": 3}
         | {"mod_capacity": 0.5, "n_shared_experts": 1},
         ["norm_topk", "n_null", "moe_layers", "mod_capacity", "n_shared"]),
    ],
)  # fmt: skip
def test_models_without_a_class_are_refused(keys, words, tmp_path):
    save_run(tmp_path / "run", config(**keys))
    with refused("E400", *words):
        export.to_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.tmp").exists()


@pytest.mark.parametrize(
    "keys, dead, buffer, value, words",
    [
        (
            LLAMA,
            [],
            "bias",
            [0, 0.1, 0, 0, 0],
            ["layer 1: its router has a selection bias, and Mixtral's"],
        ),
        (
            SMALL,
            [],
            "bias",
            [0, 0, 0, 0, -0.1],
            ["layer 1: its router has a selection bias, and Qwen3Moe's"],
        ),
        (
            SMALL | {"n_experts_max": 5},
            [[1], [1, 2], [1]],
            "",
            [],
            ["experts alive by layer: {0: 4, 1: 3, 2: 4}"],
        ),
        (
            LLAMA | {"n_experts_max": 5},
            [[], [], [2]],
            "",
            [],
            ["experts alive by layer: {0: 5, 1: 5, 2: 4}"],
        ),
        (
            DOTS1 | {"n_experts_max": 5},
            [[0], [0], [2]],
            "sibling",
            [0, 3, 2, 1, 4],
            [r"siblings \[1, 3\]", "drift apart"],
        ),
        (
            SMALL | {"n_experts_max": 5},
            [[0], [0], [0]],
            "sibling",
            [0, 3, 2, 1, 4],
            [r"layer 1: of .* \[1, 3\]"],
        ),
        (
            LLAMA | {"n_experts_max": 5},
            [[0], [4], []],
            "bias",
            [9, 0, 0, 0, 1e-9],
            ["experts alive", "bias"],
        ),
    ],
)
def test_routers_without_a_class_are_refused(keys, dead, buffer, value, words, tmp_path):
    name = f"blocks.1.ffn.router.{buffer}"
    change = (
        {name: torch.tensor(value, dtype=torch.float32 if buffer == "bias" else torch.int64)}
        if buffer
        else {}
    )
    save_run(tmp_path / "run", config(**keys), dead=dead, change=change)
    with refused("E400", *(word.replace("{", r"\{") for word in words)):
        export.to_hf(tmp_path / "run", tmp_path / "hf")
    # What empty slots hold does not matter: siblings of which none is alive, a bias.
    slots = {"n_experts_max": 5, "router": "softmax", "norm_topk": True}
    change = (
        {name: torch.tensor(value).to(torch.float32 if buffer == "bias" else torch.int64)}
        if buffer
        else {}
    )
    save_run(
        tmp_path / "dead",
        config(**keys | slots | {"n_shared_experts": 0}),
        dead=[[1, 3, 4]] * 3,
        change=change,
    )
    if buffer == "sibling" or value == [0, 0.1, 0, 0, 0] or value == [0, 0, 0, 0, -0.1]:
        export.to_hf(tmp_path / "dead", tmp_path / "hf", say=str)


def test_checkpoints_of_another_shape_are_refused(tmp_path):
    cfg = config()
    model = dataclasses.asdict(cfg)
    save_run(tmp_path / "newer", cfg, config={"model": model | {"mod_future": 0.5}})
    with refused("E306", "model.mod_future"):
        export.to_hf(tmp_path / "newer", tmp_path / "hf")
    save_run(tmp_path / "dense", cfg, config={"model": model | {"n_experts": 4}})
    with refused("E305", "model.blocks.0.ffn.experts.w13"):
        export.to_hf(tmp_path / "dense", tmp_path / "hf")
    save_run(tmp_path / "other", cfg, config={"model": model | {"tie_embeddings": False}})
    with refused("E305", "model.head.weight"):
        export.to_hf(tmp_path / "other", tmp_path / "hf")
    save_run(tmp_path / "bigger", cfg, config={"model": model | {"vocab_size": 301}})
    with refused("E305", "model.embed.weight"):
        export.to_hf(tmp_path / "bigger", tmp_path / "hf")
    cfg = config(**MODELS["dots1_slots"])
    save_run(
        tmp_path / "slots", cfg, config={"model": dataclasses.asdict(cfg) | {"n_experts_max": 7}}
    )
    with refused("E305", "experts.w13", "router.alive"):
        export.to_hf(tmp_path / "slots", tmp_path / "hf")
    with refused("E304"):
        export.to_hf(tmp_path / "nothing", tmp_path / "hf")
    with refused("E400", "float64"):
        export.to_hf(good_run(tmp_path), tmp_path / "hf", "float64")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.tmp").exists()


def test_used_places_and_full_disks(tmp_path, monkeypatch):
    run, target = good_run(tmp_path), tmp_path / "hf"
    target.mkdir()
    export.to_hf(run, target, say=str)  # an empty folder is no obstacle
    with refused("E117", "not empty"):
        export.to_hf(run, target, say=str)
    with refused("E300", "not empty"):
        export.from_hf(target, run, say=str)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with refused("E403", "No space"):
        export.to_hf(run, tmp_path / "b", say=str)
    with refused("E403", "No space"):
        export.from_hf(target, tmp_path / "again", say=str)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "hf"]


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("mixtral_head_dim_hot", "bfloat16"),
        ("qwen3moe_top1_cold", "float16"),
        ("dots1_slots_differ", "float16"),
    ],
)
def test_check_knows_what_rounding_costs(name, dtype, tmp_path, transformers):
    """Of a half-precision folder the check expects the rounded weights' logits; a bias is not
    rounded."""
    save_run(tmp_path / "run", config(**MODELS[name]), dead=DEAD.get(name))
    assert (
        export.to_hf(tmp_path / "run", tmp_path / "hf", dtype, check=True, say=str)["max_diff"]
        <= 1e-4
    )


@pytest.mark.parametrize(
    "name", ["mixtral_slots", "qwen3moe_raw", "dots1_scale", "dots1_slots_differ"]
)
def test_check_sees_what_is_wrong_with_experts(name, tmp_path, monkeypatch, transformers):
    """The check of a command line that goes wrong in one small thing."""
    right, cfg = export.routers, config(**MODELS[name])

    def swapped(*args):
        kept, ready, why = right(*args)
        return {i: slots[::-1] for i, slots in kept.items()}, ready, why

    save_run(tmp_path / "run", cfg, dead=DEAD.get(name))
    monkeypatch.setattr(export, "routers", swapped)
    with refused("E402", "max_diff"):
        export.to_hf(tmp_path / "run", tmp_path / "hf", check=True)


def test_check_fails_loudly(tmp_path, monkeypatch, transformers):
    run, right = good_run(tmp_path), export.hf_config
    monkeypatch.setattr(
        export, "hf_config", lambda cfg, *a: right(dataclasses.replace(cfg, rope_theta=500.0), *a)
    )
    with refused("E402", "max_diff"):
        export.to_hf(run, tmp_path / "hf", check=True)
    report = json.loads((tmp_path / "hf.tmp" / "EXPORT.json").read_text())
    assert report["max_diff"] > 1e-2 and not (tmp_path / "hf").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("E003", "pip install transformers"):
        export.to_hf(run, tmp_path / "other", check=True)


# ---------------------------------------------------------------- from Hugging Face


MOE_KEYS = {
    "Llama": {},
    "Qwen3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 3},
    "Qwen3Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    }
    | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "Dots1": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
    }
    | {
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": False,
    },
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", MOE_KEYS)
def test_folders_written_by_transformers(kind, fused, tmp_path, transformers):
    """Their own spelling (rope_parameters only), sharded, in bf16; experts one by one or, as
    version 5 can, fused."""
    torch.manual_seed(0)
    keys = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "head_dim": 16,
    }
    keys |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    keys |= {"tie_word_embeddings": kind == "Llama", "initializer_range": 0.2} | MOE_KEYS[kind]
    rope = LLAMA3 if kind == "Llama" else YARN
    config = getattr(transformers, f"{kind}Config")(
        rope_parameters=rope | {"rope_theta": 7e4}, **keys
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    for name, bias in theirs.named_buffers():
        bias.normal_(std=0.3) if name.endswith("e_score_correction_bias") else None
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB", save_original_format=not fused)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert any("experts.gate_up_proj" in n for n in index["weight_map"]) == (
        fused and kind not in ("Llama", "Qwen3")
    )
    cfg, state, dtype, tokenizer = export.read_hf(tmp_path / "hf")
    assert dtype == "bfloat16" and tokenizer is None and cfg.rope_theta == 7e4
    assert [*filter(cfg.is_moe, range(cfg.n_layers))] == {
        "Mixtral": [0, 1],
        "Qwen3Moe": [1],
        "Dots1": [1, 2],
    }.get(kind, [])
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", torch_dtype=torch.float32
        )
        assert (theirs(ids).logits - logits(cfg, state, ids)).abs().max() <= 1e-4


PUBLISHED = {  # config.json of the published models, and their parameters
    "Mixtral-8x7B-v0.1": (46_702_792_704, {
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "dots.llm1": (142_774_381_696 - 61 * 128, {  # there the bias counts; no head_dim or sliding_window
        "attention_bias": False, "eos_token_id": 151645, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 32768, "model_type": "dots1",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 128, "n_shared_experts": 2,
        "n_group": None, "topk_group": None, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts_per_tok": 6, "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "rope_theta": 1e7, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "tie_word_embeddings": False,
        "topk_method": "noaux_tc", "vocab_size": 152064,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_published_models(name):
    n_params, keys = PUBLISHED[name]
    cfg = export.model_config(keys, name)
    with torch.device("meta"):
        assert Transformer(cfg).n_params()["total"] == n_params
    back = export.hf_config(cfg, "bfloat16", {}, cfg.n_experts)
    same = {
        k: v
        for k, v in keys.items()
        if v is not None and not k.startswith(("transformers", "max_window", "router"))
    }
    same = {
        k: v
        for k, v in same.items()
        if k not in (*export.TOKEN_IDS, "output_router_logits", "scoring_func")
    }
    assert same.items() <= back.items()
    assert back["rope_parameters"]["rope_theta"] == cfg.rope_theta == keys["rope_theta"]


def test_an_imported_run(hf, tmp_path):
    edit(hf / "config.json", eos_token_id=[5, 6], bos_token_id=4)
    export.main(["from_hf", str(hf), str(tmp_path / "run")])
    found = checkpoint.find(tmp_path / "run")
    assert (
        found.step == found.state["cursor"] == found.state["tokens"] == 0
        and found.state["clean"] is True
    )
    assert found.state["imported"]["dtype"] == "float32" and found.state["imported"]["from"] == str(
        hf
    )
    cfg = ModelConfig(**found.state["config"]["model"])
    assert (
        ModelConfig(**yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"])
        == cfg
    )
    original = checkpoint.find(tmp_path / "made").model_state()
    state = found.model_state()
    assert state.keys() == original.keys() and all(
        torch.equal(state[n], original[n]) for n in state
    )
    assert {t.dtype for t in state.values()} == {torch.float32}
    export.to_hf(tmp_path / "run", tmp_path / "back", say=str)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [5, 6]


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor: 'two'"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_theta": 5e5}, "rope_theta"),  # against rope_parameters'
        ({"model_type": "mistral"}, "'mistral'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"num_hidden_layers": "REMOVE"}, "num_hidden_layers: missing"),
        ({"hidden_size": "32"}, "config.json"),
        ({"num_attention_heads": 5, "head_dim": None}, "n_heads"),
        ({"hidden_size": 64, "head_dim": 8}, "expected"),
        ({"num_key_value_heads": 2}, "k_proj"),
        ({"num_hidden_layers": 2}, "layers.1"),
    ],
)
def test_configurations_we_cannot_follow_are_refused(keys, word, hf):
    edit(hf / "config.json", **keys)
    with refused("E401", word):
        export.read_hf(hf)


@pytest.mark.parametrize(
    "name, keys, word",
    [
        ("mixtral_tied", {"sliding_window": 4096}, "sliding_window"),
        ("mixtral_tied", {"num_experts_per_tok": 1}, "norm_topk"),
        ("mixtral_tied", {"num_local_experts": 6}, "experts.5.w1.weight: missing"),
        (
            "mixtral_tied",
            {"num_local_experts": 4},
            "experts.4.w1.weight: has no place in this mixtral",
        ),
        ("mixtral_tied", {"num_local_experts": "REMOVE"}, "num_local_experts: missing"),
        ("mixtral_tied", {"n_group": 2}, "n_group"),
        ("mixtral_tied", {"model_type": "qwen3_moe"}, "moe_intermediate_size: missing"),
        ("qwen3moe_every", {"num_local_experts": 4}, "num_local_experts: 4"),
        ("qwen3moe_every", {"mlp_only_layers": []}, "layers.0.mlp"),
        ("qwen3moe_every", {"use_sliding_window": True}, "use_sliding_window"),
        (
            "qwen3moe_every",
            {"shared_expert_intermediate_size": 16},
            "shared_expert_intermediate_size",
        ),
        ("qwen3moe_every", {"attention_bias": True}, "attention_bias"),
        ("qwen3moe_every", {"num_experts": "four"}, "config.json"),
        ("dots1_scale", {"n_group": 4}, "n_group: 4"),
        ("dots1_scale", {"topk_group": 2}, "topk_group"),
        ("dots1_scale", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("dots1_scale", {"topk_method": "greedy"}, "topk_method: 'greedy'"),
        ("dots1_scale", {"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
        ("dots1_scale", {"sliding_window": 8, "max_window_layers": 2}, "sliding_window: 8"),
        (
            "dots1_scale",
            {"sliding_window": "REMOVE", "max_window_layers": 2},
            "sliding_window: 4096",
        ),
        (
            "dots1_scale",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "layer_types",
        ),
        (
            "dots1_scale",
            {"n_shared_experts": None},
            r"shared_experts.gate_proj.weight: .* expected \[0, 32\]",
        ),
        (
            "dots1_scale",
            {"n_shared_experts": 1},
            r"shared_experts.gate_proj.weight: .* expected \[16, 32\]",
        ),
        ("dots1_scale", {"n_routed_experts": 4}, "experts.4.down_proj.weight: has no place"),
        (
            "dots1_scale",
            {"first_k_dense_replace": 2},
            "layers.1.mlp.experts.0.down_proj.weight: has no place",
        ),
    ],
)
def test_moe_configurations_we_cannot_follow_are_refused(name, keys, word, tmp_path):
    save_run(tmp_path / "run", config(**MODELS[name]))
    export.to_hf(tmp_path / "run", tmp_path / "hf", say=str)
    export.read_hf(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **keys)
    with refused("E401", word):
        export.read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    "name, keys",
    [
        (
            "qwen3moe_every",
            {"num_experts": "REMOVE", "num_local_experts": 5},
        ),  # transformers 5's spelling
        ("qwen3moe_every", {"decoder_sparse_step": 2, "mlp_only_layers": None}),
        ("qwen3moe_every", {"decoder_sparse_step": 2, "mlp_only_layers": [0]}),
        (
            "qwen3moe_every",
            {"sliding_window": 8, "output_router_logits": True, "router_aux_loss_coef": 0.1},
        ),
        ("dots1_scale", {"n_group": None, "scoring_func": "noaux_tc", "topk_method": "REMOVE"}),
        ("dots1_scale", {"sliding_window": 8}),  # from layer 62 on
        (
            "dots1_scale",
            {"sliding_window": 8, "max_window_layers": 0, "layer_types": ["full_attention"] * 3},
        ),
    ],
)
def test_other_words_for_the_same(name, keys, tmp_path):
    save_run(tmp_path / "run", config(**MODELS[name]))
    export.to_hf(tmp_path / "run", tmp_path / "hf", say=str)
    before = export.read_hf(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **keys)
    after = export.read_hf(tmp_path / "hf")
    assert before[0] == after[0] and all(torch.equal(t, after[1][n]) for n, t in before[1].items())


def test_every_tensor_is_used_and_none_missing(hf):
    file = hf / "model.safetensors"
    right = load_file(file)

    def spoilt(**change):
        tensors = {n: t for n, t in (right | change).items() if t is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        return export.read_hf(hf)

    q = "model.layers.0.self_attn.q_proj."
    for change, word in [
        ({q + "bias": torch.zeros(32)}, "q_proj.bias: has no place"),
        (
            {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
            "q_norm.weight: has no place in this llama",
        ),
        ({"model.norm.weight": None}, "model.norm.weight: missing"),
        ({"lm_head.weight": None}, "lm_head.weight: missing"),
        ({q + "weight": right[q + "weight"][:16].clone()}, "q_proj.weight"),
        ({q + "weight": right[q + "weight"].to(torch.int8)}, "int8"),
    ]:
        with refused("E401", word):
            spoilt(**change)
    # Old files carry the rotary table along; some hold a tied head twice; norms may have another
    # dtype.
    spoilt(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert spoilt(**{"model.norm.weight": right["model.norm.weight"].half()})[2] == "float32"
    edit(hf / "config.json", tie_word_embeddings=True)
    with refused("E401", "lm_head.weight: has no place"):
        spoilt()
    cfg, state, _, _ = spoilt(**{"lm_head.weight": right["model.embed_tokens.weight"].clone()})
    assert cfg.tie_embeddings and "head.weight" not in state


def test_damaged_folders(hf, tmp_path):
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with refused("E401", "hf"):
            export.from_hf(hf, tmp_path / "run", say=str)
    file.unlink()
    with refused("E401", "no model.safetensors"):
        export.read_hf(hf)
    for index in (
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "nowhere.safetensors"}}',
        '{"weight',
    ):
        (hf / "model.safetensors.index.json").write_text(index)
        with refused("E401"):
            export.read_hf(hf)
    for text in ("", "{", "[]", "\x00"):
        (hf / "config.json").write_text(text)
        with refused("E401", "config.json"):
            export.read_hf(hf)
    with refused("E401"):
        export.read_hf(tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "export.py", "from_hf", str(hf), str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=Path(export.__file__).parent, capture_output=True, text=True, env=env
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error E401")
        and "Traceback" not in done.stderr
    )


# ---------------------------------------------------------------- from Lunaris Codex

# Logits of their own code (github.com/MeryylleA/lunariscodex) for the weights of `lunaris_weights`
# and the ids
# (7 t^2 + 3) mod 64, t < 16: ids 0 to 7 at positions 0, 5 and 15. Made by building their
# LunarisCodex
# from the keys below, in fp32 on a CPU, never cast (so that the complex RoPE table stays whole),
# loading the weights,
# calling model(ids, ids)[0] in eval mode. Commits: "main" 7afa5ef model.py; "older" c2c7bd0
# model.py, from before
# QK-norm and NTK; "moe_dense" c88abf1 model_moe.py with n_experts None; "moe_scaled" the same with
# experts; "moe_first"
# d506dc9 model_moe.py, the first with experts; "moe_unscaled" 07a289d model_moe.py without the cast
# of its RoPE table
# in line 351 (which changes these numbers by up to 1.02) and with the capacity to drop no token.
LUNARIS = {
    "main": (
        {"n_kv_heads": 4, "rope_ntk_scale_base": 16, "use_qk_norm": True},  # theta 10000 * 64 / 16
        [1.636527, 0.599047, 0.108393, -0.508045, -0.225256, 1.877856, 0.944744, 0.554781],
        [1.557467, -0.87685, -0.261104, 0.161765, -0.249616, 3.646751, 0.412923, 0.318592],
        [3.046053, -0.170262, 0.232854, -0.768368, 0.931656, 4.259725, 0.855834, -0.393423],
    ),
    "main_no_qk_norm": (
        {"n_kv_heads": 1, "rope_ntk_scale_base": 2048, "use_qk_norm": False},
        [1.688677, -0.787844, 1.692189, -0.311764, 0.480532, -0.118463, 0.813657, 1.934692],
        [1.510494, 1.159691, 0.793871, -0.989065, 0.673771, -1.003749, -0.010907, 0.429955],
        [0.539707, 0.435853, 0.857509, 0.503987, -1.404336, -2.232087, -1.044261, 1.089644],
    ),
    "older": (
        {"n_kv_heads": 2, "rope_theta": 5000.0},
        [0.238221, 2.250513, 0.320762, 1.424273, -2.821165, -1.939487, 1.439402, 2.174914],
        [-0.204373, 1.286722, -0.479867, 1.188819, -0.674193, 0.365164, 1.071972, 1.158977],
        [1.553176, -0.728856, 1.418705, 1.006863, 0.988106, -0.658727, 1.035736, 1.639359],
    ),
    "moe_dense": (
        {"n_kv_heads": 2, "n_experts": None},
        [-0.827424, -1.045119, -1.146747, 3.40354, -1.005219, -1.67643, 0.763214, 0.477475],
        [0.13943, 0.159366, -1.556716, 1.181992, -0.736857, -2.873062, 0.275055, 0.936437],
        [0.89301, 0.521884, -0.344048, 1.981662, 1.333515, -0.81205, 0.010194, 0.131615],
    ),
    "moe_scaled": (
        {"n_kv_heads": 2, "n_experts": 3, "n_experts_per_token": 1, "aux_loss_weight": 0.02},
        [1.013728, -2.246988, -0.755559, 0.205851, 0.900659, -0.524947, 0.010758, 0.441634],
        [-0.776326, -1.416232, 0.828821, 0.534993, -0.771687, 0.454919, -1.408726, -1.795562],
        [-0.06989, -2.68377, -0.188614, 0.909127, -0.500466, 1.518953, -0.954904, -0.44038],
    ),
    "moe_first": (
        {"n_kv_heads": 2, "n_experts": 3, "n_experts_per_token": 1, "aux_loss_weight": 1e-2},
        [-0.5139, 0.348217, 1.430194, -0.307064, -2.118495, -1.846362, -0.916952, 0.563718],
        [0.10411, -3.297614, 1.553358, -0.740411, -0.537481, -1.38922, -1.900599, -0.288947],
        [1.497396, 0.901888, 0.814358, 0.735063, -0.291845, 1.129679, 0.166261, -0.254427],
    ),
    "moe_unscaled": (
        {"n_kv_heads": 2, "n_experts": 3, "capacity_factor": 3.0, "router_z_loss_weight": 1e-3},
        [1.357598, -1.607665, -1.341982, -0.483096, 1.300646, -0.273974, -0.125408, 0.481759],
        [-0.940683, -0.564769, 0.963944, 0.406478, -1.271671, 0.948279, -1.260104, -1.803829],
        [-0.044029, -2.478799, -0.497995, 0.929471, -0.102529, 1.414763, -1.060148, -0.297934],
    ),
}
LUNARIS_BASE = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": 64,
    "multiple_of": 16,
    "max_seq_len": 64,
}


def lunaris_weights(layout):
    kv = 8 * LUNARIS[layout][0]["n_kv_heads"]
    shapes = {
        "transformer.wte.weight": (64, 32),
        "transformer.ln_f.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    for i in range(2):
        a, ffn = f"transformer.h.{i}.attention.", f"transformer.h.{i}.feed_forward."
        fused, n_experts = (
            layout.startswith("moe") and layout != "moe_first",
            LUNARIS[layout][0].get("n_experts"),
        )
        shapes |= {a + "o_proj.weight": (32, 32), f"transformer.h.{i}.ffn_norm.weight": (32,)}
        shapes |= {ffn + "gate.weight": (n_experts, 32)} if n_experts else {}
        for f in [f"{ffn}experts.{e}." for e in range(n_experts)] if n_experts else [ffn]:
            shapes |= (
                {f + "w13.weight": (192, 32)}
                if fused
                else {f + f"w{n}.weight": (96, 32) for n in (1, 3)}
            )
            shapes |= {f + "w2.weight": (32, 96)}
        if fused:
            shapes |= {a + "wqkv.weight": (32 + 2 * kv, 32)}
            shapes |= {a + "q_norm.weight": (32,), a + "k_norm.weight": (kv,)}
        else:
            shapes |= {
                a + "q_proj.weight": (32, 32),
                a + "k_proj.weight": (kv, 32),
                a + "v_proj.weight": (kv, 32),
            }
            shapes |= {f"transformer.h.{i}.attention_norm.weight": (32,)}
        if layout == "main":
            shapes |= {a + "q_norm.weight": (8,), a + "k_norm.weight": (8,)}
    weights = {}
    for name, shape in shapes.items():  # numpy's RandomState draws the same numbers for ever
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        weights[name] = torch.from_numpy(
            (1 + 0.2 * draw if len(shape) == 1 else 0.2 * draw).astype(np.float32)
        )
    weights["transformer.wte.weight"] = weights["lm_head.weight"]
    return weights


def save_lunaris(file, layout, prefix="", **change):
    weights = {prefix + n: t for n, t in lunaris_weights(layout).items()}
    config = {"learning_rate": 3e-4, "model": LUNARIS_BASE | LUNARIS[layout][0]}
    data = {
        "model": weights,
        "optimizer": {"state": {}},
        "config": config,
        "step": 3,
        "epoch": 0,
    } | change
    torch.save(data, file)
    return file


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("layout", LUNARIS)
def test_lunaris_logits(layout, prefix, tmp_path):
    moe = "unscaled" if layout == "moe_unscaled" else None
    import_lunaris.from_lunaris(
        save_lunaris(tmp_path / "ckpt.pt", layout, prefix), tmp_path / "run", say=str, moe=moe
    )
    found = checkpoint.find(tmp_path / "run")
    cfg = ModelConfig(**found.state["config"]["model"])
    fused = layout.startswith("moe") and layout != "moe_first"
    assert cfg.norm_order == ("lunaris" if fused else "pre") and cfg.tie_embeddings
    assert cfg.rope_first == (layout == "main") and cfg.max_seq_len == 64
    ids = torch.tensor([[(7 * t * t + 3) % 64 for t in range(16)]])
    ours = logits(cfg, found.model_state(), ids)[0, [0, 5, 15], :8]
    assert (ours - torch.tensor(LUNARIS[layout][1:])).abs().max() <= 1e-5
    if layout in ("main_no_qk_norm", "older"):  # a plain Llama
        export.to_hf(tmp_path / "run", tmp_path / "hf", say=str)
    else:
        why = {"main": "model.rope_first", "moe_first": "model.norm_topk: false"}.get(
            layout, "model.norm_order"
        )
        with refused("E400", why):
            export.to_hf(tmp_path / "run", tmp_path / "hf", say=str)


def test_lunaris_code_that_made_a_moe_file(tmp_path):
    """The two codes write the same tensors and compute different functions: the newer one is taken
    on request only."""
    old, new = (save_lunaris(tmp_path / f"{x}.pt", f"moe_{x}") for x in ("scaled", "unscaled"))
    bare = save_lunaris(tmp_path / "bare.pt", "moe_scaled", config=None)
    keys, lines = {"n_heads": 4, "max_seq_len": 64}, []
    for file, moe, more in (
        (old, "unscaled", {}),
        (new, None, {}),
        (new, "scaled", {}),
        (bare, None, keys),
    ):
        with refused("E401", "--moe scaled is its older code", "drops tokens", "destroyed RoPE"):
            import_lunaris.read_lunaris(file, lines.append, moe, **more)
    with refused("E401", "older or the newer code"):
        import_lunaris.read_lunaris(bare, lines.append, **keys)
    cfg, state, _ = import_lunaris.read_lunaris(old, lines.append, "scaled")
    assert (
        cfg.n_experts == 3 and cfg.n_experts_per_token == 1 and cfg.norm_topk is False and not lines
    )
    assert cfg.d_expert == 96 and cfg.capacity_factor is None and cfg.routing_temperature == 1
    assert cfg.aux_loss_weight == 0.02 and cfg.router_z_loss_weight == 0
    same, again, _ = import_lunaris.read_lunaris(bare, lines.append, "scaled", **keys)
    assert (
        same == dataclasses.replace(cfg, aux_loss_weight=0.01)
        and all(torch.equal(again[n], state[n]) for n in state)
        and not lines
    )
    cfg, _, _ = import_lunaris.read_lunaris(new, lines.append, "unscaled")
    assert (
        "destroyed RoPE" in lines[0]
        and cfg.capacity_factor == 3.0
        and cfg.router_z_loss_weight == 0
    )
    export.main(["from_lunaris", str(new), str(tmp_path / "run"), "--moe", "unscaled"])


def test_lunaris_pickled_dataclass(tmp_path, monkeypatch):
    """Their older train.py pickles the dataclass itself: a stand-in reads it, other classes stay
    refused."""
    module = types.ModuleType("model_moe")
    module.LunarisCodexConfig = type("LunarisCodexConfig", (), {"__module__": "model_moe"})
    module.Other = type("Other", (), {"__module__": "model_moe"})
    monkeypatch.setitem(sys.modules, "model_moe", module)
    config = module.LunarisCodexConfig()
    config.__dict__ |= LUNARIS_BASE | LUNARIS["moe_dense"][0]
    save_lunaris(tmp_path / "a.pt", "moe_dense", config={"model": config})
    save_lunaris(tmp_path / "b.pt", "moe_dense", config={"model": module.Other()})
    monkeypatch.delitem(sys.modules, "model_moe")
    cfg, _, _ = import_lunaris.read_lunaris(tmp_path / "a.pt", say=str)
    assert cfg.n_kv_heads == 2 and cfg.n_heads == 4
    with refused("E401", "b.pt"):
        import_lunaris.read_lunaris(tmp_path / "b.pt", say=str)


def test_lunaris_says_what_it_cannot_know(tmp_path):
    lines = []
    bare = save_lunaris(tmp_path / "bare.pt", "moe_dense", config=None)
    with refused("E401", "n_heads, max_seq_len", "--n_heads N"):
        import_lunaris.read_lunaris(bare)
    command = [
        "from_lunaris",
        str(bare),
        str(tmp_path / "run"),
        "--n_heads",
        "4",
        "--max_seq_len",
        "64",
    ]
    export.main(command)
    known, state, dtype = import_lunaris.read_lunaris(
        save_lunaris(tmp_path / "known.pt", "moe_dense"), say=lines.append
    )
    assert dtype == "float32" and not lines
    found = checkpoint.find(tmp_path / "run")
    assert ModelConfig(**found.state["config"]["model"]) == known
    assert all(torch.equal(t, state[n]) for n, t in found.model_state().items())
    import_lunaris.read_lunaris(bare, say=lines.append, n_heads=4, max_seq_len=64)
    assert "destroyed RoPE" in lines[0]  # both codes of that branch write this layout
    main = save_lunaris(
        tmp_path / "main.pt", "main", config=None
    )  # its norms say the number of heads
    assert import_lunaris.read_lunaris(main, max_seq_len=4096)[0].rope_theta == 20000.0
    keys = LUNARIS_BASE | {"dropout": 0.1, "resid_dropout": 0.0, "attn_dropout": 0.3}
    cfg, _, _ = import_lunaris.read_lunaris(
        save_lunaris(tmp_path / "drop.pt", "main", config={"model": keys}), lines.append
    )
    assert cfg.dropout == 0.0 and "attn_dropout 0.3" in lines[1]
    assert found.state["imported"] == {"from": str(bare), "dtype": "float32"}
    with refused("E401", "--n_heads 8: the file says 4"):
        import_lunaris.read_lunaris(tmp_path / "known.pt", n_heads=8)
    save_lunaris(
        tmp_path / "bf16.pt",
        "main",
        model={n: t.bfloat16() for n, t in lunaris_weights("main").items()},
    )
    assert import_lunaris.read_lunaris(tmp_path / "bf16.pt")[2] == "bfloat16"
    untied = lunaris_weights("older")
    untied["lm_head.weight"] = untied["lm_head.weight"] + 1
    cfg, state, _ = import_lunaris.read_lunaris(
        save_lunaris(tmp_path / "untied.pt", "older", model=untied)
    )
    assert not cfg.tie_embeddings and torch.equal(state["head.weight"], untied["lm_head.weight"])


def test_lunaris_files_that_are_refused(tmp_path):
    right = lunaris_weights("main")
    h = "transformer.h.1."
    for change, words in [
        ({"model": right | {h + "feed_forward.experts.0.w2.weight": torch.ones(1)}}, ["no place", "experts.0.w2"]),
        ({"model": lunaris_weights("moe_scaled") | {h + "feed_forward.experts.3.w2.weight": torch.ones(1)}}
         | {"config": {"model": LUNARIS_BASE | LUNARIS["moe_scaled"][0]}}, ["no place", "experts.3.w2"]),
        ({"model": {n: t for n, t in lunaris_weights("moe_scaled").items() if "1.feed_forward.experts.2.w13" not in n}}
         | {"config": {"model": LUNARIS_BASE | LUNARIS["moe_scaled"][0]}}, ["experts.2.w13.weight: missing"]),
        ({"model": right | {h + "attention.q_proj.bias": torch.ones(32)}}, ["no place", "q_proj.bias"]),
        ({"model": {n: t for n, t in right.items() if n != h + "attention.v_proj.weight"}}, ["v_proj.weight: missing"]),
        ({"model": right | {h + "feed_forward.w1.weight": torch.ones(64, 32)}}, ["blocks.1.ffn.w13.weight"]),
        ({"model": {}}, ["wte"]),
        ({"model": {"a": 1}}, ["wte"]),
        ({"model": right | {h + "attention.q_norm.weight": torch.ones(7)}}, ["no Lunaris"]),
        ({"model": None}, ["no Lunaris"]),
        ({"config": {"model": LUNARIS_BASE | {"max_seq_len": "long"}}}, ["no Lunaris"]),
        ({"config": {"model": LUNARIS_BASE | {"n_heads": 5}}}, ["n_heads: 5"]),
    ]:  # fmt: skip
        with refused("E401", *words):
            import_lunaris.from_lunaris(
                save_lunaris(tmp_path / "x.pt", "main", **change), tmp_path / "run", say=str
            )
    whole = save_lunaris(tmp_path / "x.pt", "main").read_bytes()
    for data in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "x.pt").write_bytes(data)
        with refused("E401", "x.pt"):
            import_lunaris.from_lunaris(tmp_path / "x.pt", tmp_path / "run", say=str)
    with refused("E401", "none.pt"):
        import_lunaris.from_lunaris(tmp_path / "none.pt", tmp_path / "run", say=str)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_parameter_without_a_place_is_refused_not_lost(tmp_path, monkeypatch):
    """As a fork's own change of model.py brings it, whose author forgot `refusals`."""
    real = model.Attention.__init__

    def with_scale(self, cfg, *args, **options):
        real(self, cfg, *args, **options)
        self.head_scale_norm = model.RMSNorm(cfg.n_heads, 1e-6)

    monkeypatch.setattr(model.Attention, "__init__", with_scale)
    save_run(tmp_path / "run", config(**SMALL | {"n_experts": 0}))
    with pytest.raises(UserError, match="(?s)E400.*parameters.*head_scale_norm"):
        export.main(["to_hf", str(tmp_path / "run"), str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
    plan = gguf_model.plan(read_model(tmp_path / "run", say=print))
    with pytest.raises(UserError, match="(?s)E404.*no place.*head_scale_norm"):
        gguf_model.tensors(plan)
