"""export.py to_gguf: files that transformers' own reader computes alike, names and shapes as
llama.cpp's loader asks for them, tokenizers under the name of their regex; what there is no room
for says why. tests/unit/test_llama_cpp.py asks llama.cpp itself."""

import json
import resource

import pytest
import torch
from sparse_models import make as make_sparse
from test_models import save_adapters
from test_sample import T, code, make, save
from tokenizer_kinds import KINDS as TOKENIZERS

import export
from lumen import chat, gguf_check, gguf_file, gguf_vocabulary
from lumen import tokenizer as tok
from lumen.gguf_file import TYPES, to_gguf
from lumen.patterns import O200K_PATTERN
from lumen.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
SPARSE = {"vocab_size": T.n_vocab + 12, "n_experts": 4, "d_expert": 32}
GQA = {"n_heads": 4, "n_kv_heads": 2}
# our model: (llama.cpp's name, changes); head_dim 16 is not d_model / n_heads
DENSE = {
    "llama": ("llama", {"qk_norm": False}),
    "llama wide untied": ("llama", {"qk_norm": False, "head_dim": 16, "tie_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 wide untied": ("qwen3", {"head_dim": 16, "tie_embeddings": False, "n_heads": 6}),
}
WITH_EXPERTS = {
    "mixtral": ("llama", {"qk_norm": False, "route_scale": 2.0, "routing_temperature": 0.5}),
    "qwen3moe": ("qwen3moe", {"route_scale": 2.0, "routing_temperature": 0.5}),
    "qwen3moe slots": ("qwen3moe", {"n_experts_max": 6}),
    "switch": ("dots1", {"n_experts_per_token": 1}),
    "dense first": ("dots1", {"n_dense_layers": 1}),
    "softmax shared": ("dots1", {"n_shared_experts": 2}),
    "sigmoid": ("dots1", {"router": "sigmoid", "n_shared_experts": 1, "route_scale": 2.5}),
    "sigmoid slots": ("dots1", {"router": "sigmoid", "n_experts_max": 6, "n_kv_heads": 4}),
}
SHAPES = DENSE | {name: (arch, SPARSE | more) for name, (arch, more) in WITH_EXPERTS.items()}


def quiet(text):
    pass


def built(changes):
    """A model whose layers all matter; experts whose routers' biases say something."""
    if "n_experts" not in changes:
        return make(3, **changes)
    return make_sparse(3, **{"max_seq_len": 48} | changes).eval()


def written(folder, changes, dtype="f32", tokenizer=T, state=None, **how):
    """(report, the file, the model): a run and its GGUF."""
    model = built(changes)
    save(folder / "run", 1, model=model, **state or {})
    tokenizer.save(folder / "run" / "tokenizer.json")
    file = folder / "made.gguf"
    return to_gguf(folder / "run", file, dtype, **{"say": quiet} | how), file, model


def keys(file) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


# ---------------------------------------------------------------- the same model


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    monkeypatch.delenv("LLAMA_PYTHON", raising=False)


@pytest.mark.parametrize("name", [*DENSE, "qwen3moe", "qwen3moe slots"])
def test_transformers_computes_the_same_logits_of_the_file(tmp_path, name):
    arch, changes = SHAPES[name]
    report, file, model = written(tmp_path, changes, check=True)
    assert report["architecture"] == arch and report["transformers"] < 1e-4
    assert not (tmp_path / "made.gguf.tmp").exists()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["llama", "sigmoid"])
def test_every_value_reads_back_as_its_type_rounds_it(tmp_path, name, dtype):
    arch, changes = SHAPES[name]
    report, file, _ = written(tmp_path, changes, dtype, check=True)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert report["tensors"] == len(found)
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in found.items()}
    assert kinds["blk.1.attn_q.weight"] == kinds["token_embd.weight"] == dtype
    small = [name for name in kinds if "norm" in name or "gate_inp" in name or "bias" in name]
    assert small and {kinds[name] for name in small} == {"f32"}
    assert keys(file)["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]


def test_a_value_that_differs_is_found_and_the_file_kept(tmp_path, monkeypatch):
    encoded = gguf_file.encoded

    def spoilt(gguf, name, tensor, kind):
        return encoded(gguf, name, tensor + 1e-3 * (name == "blk.1.ffn_up.weight"), kind)

    monkeypatch.setattr(gguf_file, "encoded", spoilt)
    text = code(written, tmp_path, {}, check=True)
    assert text.startswith("E402") and "blk.1.ffn_up.weight is off by up to 0.001" in text
    assert (tmp_path / "made.gguf.tmp").exists() and not (tmp_path / "made.gguf").exists()
    monkeypatch.undo()
    rows = gguf_check.rows_of
    monkeypatch.setattr(gguf_check, "rows_of", lambda cfg, n: rows(cfg, n) * 0)
    monkeypatch.setattr(gguf_check, "rounded", lambda *a: make(4))  # another model
    assert "transformers' logits differ by" in code(
        to_gguf, tmp_path / "run", tmp_path / "new.gguf", "f32", check=True, say=quiet
    )


def test_adapters_and_folders_are_the_models_that_they_hold(tmp_path):
    save(tmp_path / "run", 3, model=make(3, qk_norm=False))
    save_adapters(tmp_path / "lora", tmp_path / "run" / "step_00000003")
    export.to_hf(tmp_path / "run", tmp_path / "hf", say=quiet)
    for kind in ("lora", "hf"):
        to_gguf(tmp_path / kind, tmp_path / f"{kind}.gguf", "f32", check=True, say=quiet)
    base, adapted = (gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors for kind in ("hf", "lora"))
    assert any((a.data != b.data).any() for a, b in zip(base, adapted))


def test_best_and_step(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run", step, model=make(step))
    (tmp_path / "run" / "best.json").write_text(json.dumps({"step": 1}))
    for name, how in (("best", {"best": True}), ("one", {"step": 1}), ("new", {})):
        to_gguf(tmp_path / "run", tmp_path / name, say=quiet, **how)
    best, one, new = ((tmp_path / name).read_bytes() for name in ("best", "one", "new"))
    assert best == one != new


# ---------------------------------------------------------------- as llama.cpp's loader asks


def wanted(arch, cfg, n_experts) -> dict[str, tuple]:
    """Name and shape (ours: rows first) of what src/models/ARCH.cpp loads; without llama.cpp, the
    second opinion on our names."""
    C, D, H = cfg.d_model, cfg.head_dim, cfg.n_heads
    G = H if arch == "dots1" else cfg.n_kv_heads
    found = {"token_embd.weight": (cfg.vocab_size, C), "output_norm.weight": (C,)}
    if arch == "dots1" or not cfg.tie_embeddings:
        found["output.weight"] = (cfg.vocab_size, C)
    for i in range(cfg.n_layers):
        layer = {"attn_norm": (C,), "ffn_norm": (C,), "attn_output": (C, H * D)}
        layer |= {"attn_q": (H * D, C), "attn_k": (G * D, C), "attn_v": (G * D, C)}
        if cfg.qk_norm:
            layer |= {"attn_q_norm": (D,), "attn_k_norm": (D,)}
        if cfg.is_moe(i):
            E, I = n_experts, cfg.d_expert  # noqa: E741
            layer |= {"ffn_gate_inp": (E, C), "ffn_down_exps": (E, C, I)}
            layer |= {"ffn_gate_exps": (E, I, C), "ffn_up_exps": (E, I, C)}
            if arch == "dots1":
                S = max(cfg.n_shared_experts, 1) * I
                layer |= {"ffn_gate_shexp": (S, C), "ffn_up_shexp": (S, C)}
                layer |= {"ffn_down_shexp": (C, S)}
                found[f"blk.{i}.exp_probs_b.bias"] = (E,)
        else:
            layer |= {"ffn_gate": (cfg.d_ff, C), "ffn_up": (cfg.d_ff, C), "ffn_down": (C, cfg.d_ff)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_that_llama_cpp_loads(tmp_path, name):
    arch, changes = SHAPES[name]
    report, file, model = written(tmp_path, changes)
    assert report["architecture"] == arch
    n_experts = model.cfg.n_experts  # empty slots are left out
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        found[tensor.name] = tuple(int(n) for n in reversed(tensor.shape))
    assert found == wanted(arch, model.cfg, n_experts)
    width = model.cfg.d_expert if name == "mixtral" else model.cfg.d_ff
    assert keys(file)[f"{arch}.feed_forward_length"] == width  # Mixtral's is that of its experts
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], model.cfg.n_layers)
    known = {place for _, place in places.mapping.values()}
    assert {name.rpartition(".")[0] for name in found} <= known


def test_keys_say_what_the_configuration_says(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16}
    changes = SHAPES["sigmoid"][1] | {"rope_scaling": scaling, "n_dense_layers": 1, "n_layers": 3}
    _, file, model = written(tmp_path, changes)
    found, cfg = keys(file), model.cfg
    said = {key.partition(".")[2]: v for key, v in found.items() if key.startswith("dots1.")}
    assert said.pop("attention.layer_norm_rms_epsilon") == pytest.approx(cfg.norm_eps)
    assert said.pop("rope.scaling.attn_factor") == pytest.approx(1.5 / 1.1386294)
    assert said == {
        "vocab_size": cfg.vocab_size,
        "context_length": 48,
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": cfg.d_ff,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 48,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "leading_dense_block_count": 1,
    }
    assert found["general.name"] == "run"


def test_llama_3_slows_frequencies_by_a_tensor(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    _, file, _ = written(tmp_path, {"qk_norm": False, "head_dim": 16, "rope_scaling": scaling})
    made = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    # by llama.cpp's conversion/llama.py: by the wavelength
    expected = []
    for pair in range(8):
        wave = 2 * torch.pi * 10000 ** (2 * pair / 16)
        smooth = (64 / wave - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if wave < 16 else 8.0 if wave > 64 else between)
    torch.testing.assert_close(torch.tensor(made["rope_freqs.weight"]), torch.tensor(expected))


def test_dots1_gets_repeated_heads_and_an_expert_of_zeros(tmp_path):
    said = []
    changes = SPARSE | {"router": "sigmoid"}
    _, file, model = written(tmp_path, changes, say=said.append)
    made = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    k = model.state_dict()["blocks.1.attn.wqkv.weight"][32:48].view(2, 8, 32)
    assert torch.equal(made["blk.1.attn_k.weight"], k[[0, 0, 1, 1]].flatten(0, 1))
    assert not made["blk.0.ffn_up_shexp.weight"].any()
    assert torch.equal(made["output.weight"], made["token_embd.weight"])
    text = "\n".join(said)
    assert "key and value head 2 times" in text and "expert of zeros" in text
    assert "the embedding once more" in text


# ---------------------------------------------------------------- tokenizers

CHATML = {"template": chat.describe("chatml")}


def with_tokenizer(folder, tokenizer, state=None, extra=0, **how):
    changes = {"vocab_size": tokenizer.n_vocab + extra}
    report, file, _ = written(folder, changes, tokenizer=tokenizer, state=state, **how)
    return report, keys(file)


@pytest.mark.parametrize("kind", ["bpe", "smollm2", "llama3", "olmo2", "qwen2"])
def test_vocabulary_merges_and_the_name_of_the_regex(tmp_path, kind):
    text = json.dumps(TOKENIZERS[kind]()) if kind != "bpe" else None
    own = tok.train_bpe(["low lower lowest 12 newer wider"] * 9, 290)
    tokenizer = tok.from_json(text, str(tmp_path / "tokenizer.json"), kind) if text else own
    report, found = with_tokenizer(tmp_path, tokenizer, extra=5)
    names = {"bpe": "llama-bpe", "olmo2": "llama-bpe", "llama3": "llama-bpe"}
    assert (
        report["pre"]
        == found["tokenizer.ggml.pre"]
        == {**names, "smollm2": "smollm", "qwen2": "qwen2"}[kind]
    )
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == tokenizer.n_vocab + 5
    assert tokens[-1] == f"[PAD{tokenizer.n_vocab + 4}]" and types[-5:] == [5] * 5
    vocab = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert {tokens[i]: i for i in vocab.values()} == vocab
    controls = [i for i, kind in enumerate(types) if kind == 3]
    assert controls == sorted(tokenizer.controls.values())
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == merges
    assert found["tokenizer.ggml.add_bos_token"] is False
    words = [i for i, kind in enumerate(types) if kind == 4]
    assert words == sorted(set(tokenizer.words.values()) - set(tokenizer.controls.values()))


def test_transformers_reads_the_tokenizer_and_the_template_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tok.train_bpe([line for line in gguf_check.TEXTS] * 4, 400)
    with_tokenizer(tmp_path, tokenizer, CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="made.gguf")
    for text in gguf_check.TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text).tolist(), text
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    turns = [chat.Message(**message) for message in messages]
    assert ids == chat.render(turns, "chatml", tokenizer)[0].tolist()
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|pad|>"


def test_what_ends_a_reply_ends_it_there_too(tmp_path):
    ids = T.eot_id, T.im_end_id
    for name, state, ends in (
        ("plain", {}, (ids[0], ids[0])),
        ("chatml", CHATML, (ids[1], ids[0])),
        ("instruct", {"template": chat.describe("instruct")}, (ids[0], ids[0])),
        ("imported", {"imported": {"eos_token_id": [7, 9], "bos_token_id": 3}}, (7, 9)),
    ):
        (tmp_path / name).mkdir()
        _, found = with_tokenizer(tmp_path / name, T, state)
        said = [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot")]
        assert tuple(said) == ends, name
        bos = found["tokenizer.ggml.bos_token_id"]
        assert bos == (3 if name == "imported" else ids[0])
        assert ("tokenizer.chat_template" in found) == (name in ("chatml", "instruct"))
    assert "generation %}" not in found.get("tokenizer.chat_template", "")


def test_the_template_is_plain_jinja_with_the_imported_system_turn(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    state = {"imported": {"template": "chatml", "system": 'Say "hi".\nNow.'}}
    _, found = with_tokenizer(tmp_path, T, state)
    template = jinja2.Environment().from_string(found["tokenizer.chat_template"])
    asked = [{"role": "user", "content": " <|im_end|> x "}]
    text = template.render(messages=asked, add_generation_prompt=True)
    system = '<|im_start|>system\nSay "hi".\nNow.<|im_end|>\n'
    reply = "<|im_start|>user\n<|im_end|> x<|im_end|>\n<|im_start|>assistant\n"
    assert text == system + reply
    turn = [{"role": "system", "content": "S"}]
    text = template.render(messages=turn + asked, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n" + reply


def test_an_imported_folders_own_template_goes_along(tmp_path):
    save(tmp_path / "run", 1, model=make(3))
    export.to_hf(tmp_path / "run", tmp_path / "hf", say=quiet)
    own = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    (tmp_path / "hf" / "chat_template.jinja").write_text(own)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["eos_token_id"] = 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    to_gguf(tmp_path / "hf", tmp_path / "made.gguf", say=quiet)
    found = keys(tmp_path / "made.gguf")
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}!"
    assert found["tokenizer.ggml.eos_token_id"] == 5


def refused(folder, tokenizer, **how) -> str:
    changes = {"vocab_size": tokenizer.n_vocab}
    return code(written, folder, changes, tokenizer=tokenizer, **how)


def test_tokenizers_that_gguf_cannot_name_say_what_to_do(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    for kind in ("deepseek", "llama2", "unigram"):
        (tmp_path / kind).mkdir()
        text = refused(tmp_path / kind, tok.from_json(json.dumps(TOKENIZERS[kind]()), path, kind))
        assert text.startswith("E404") and "convert_hf_to_gguf.py" in text, kind
    ranks = {bytes([byte]): byte for byte in range(256)}
    specials = {"<|endoftext|>": 258}
    o200k = Tokenizer("o200k", ranks, specials, O200K_PATTERN)
    assert "E404" in (text := refused(tmp_path, o200k)) and "--pre gpt-4o" in text
    said = []
    report, found = with_tokenizer(tmp_path, o200k, pre="gpt-4o", say=said.append)
    assert found["tokenizer.ggml.pre"] == "gpt-4o" and "--pre gpt-4o is not known" in "".join(said)
    assert found["tokenizer.ggml.tokens"][256:] == ["[PAD256]", "[PAD257]", "<|endoftext|>"]
    strange = Tokenizer("mine", ranks, specials, r"\p{L}+|.")
    (tmp_path / "b").mkdir()
    text = refused(tmp_path / "b", strange)
    assert "E404" in text and r"no name for its regex \p{L}+|." in text and "--pre NAME" in text
    lonely = Tokenizer("lonely", ranks | {b"abc": 256}, specials, gguf_vocabulary.QWEN2_PATTERN)
    (tmp_path / "c").mkdir()
    assert "no merges lead to 1 of its tokens" in refused(tmp_path / "c", lonely)
    twice = Tokenizer("twice", ranks, specials | {"a": 257})
    assert "two of its ids are 'a'" in code(gguf_vocabulary.tokens, twice, 259)


def test_without_a_tokenizer_or_with_too_large_a_one(tmp_path):
    save(tmp_path / "run", 1, model=make(3), tokenizer=False)
    file = tmp_path / "made.gguf"
    text = code(to_gguf, tmp_path / "run", file, say=quiet)
    assert text.startswith("E501") and "--tokenizer FILE" in text
    report = to_gguf(tmp_path / "run", file, tokenizer="bytes", say=quiet)
    assert report["pre"] == "llama-bpe"
    large = tok.train_bpe(["abcdefgh"] * 9, 265)
    save(tmp_path / "small", 1, model=make(3, vocab_size=262))
    large.save(tmp_path / "small" / "tokenizer.json")
    text = code(to_gguf, tmp_path / "small", tmp_path / "new.gguf", say=quiet)
    assert text.startswith("E113") and f"{large.n_vocab} ids, the model 262 rows" in text


# ---------------------------------------------------------------- what there is no room for

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NO_ROOM = {
    "norm_order: lunaris": {"norm_order": "lunaris"},
    "rope_first": {"rope_first": True},
    "mod_capacity: 0.5": {"mod_capacity": 0.5},
    "n_null_experts: 2": SPARSE | {"n_null_experts": 2},
    "router: sigmoid without qk_norm": SPARSE | {"router": "sigmoid", "qk_norm": False},
    "n_shared_experts: 1 without qk_norm": SPARSE | {"qk_norm": False, "n_shared_experts": 1},
    "norm_topk: false without qk_norm": SPARSE | {"qk_norm": False, "norm_topk": False},
    "layers [0] are dense, without qk_norm": SPARSE | {"qk_norm": False, "n_dense_layers": 1},
    "layers [1] are dense, which can only": SPARSE | {"moe_layers": [0]},
    "rope_scaling: llama3 with qk_norm": {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}
    },
}


@pytest.mark.parametrize("reason", NO_ROOM)
def test_models_that_llama_cpp_has_not(tmp_path, reason):
    text = code(written, tmp_path, NO_ROOM[reason])
    assert text.startswith("E404") and reason in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_all_reasons_are_given_at_once(tmp_path):
    changes = SPARSE | {"mod_capacity": 0.5, "router": "sigmoid", "qk_norm": False}
    text = code(written, tmp_path, changes | {"rope_first": True})
    assert all(word in text for word in ("mod_capacity", "router: sigmoid", "rope_first"))


def test_slots_of_different_numbers_and_biases(tmp_path):
    model = make_sparse(3, **SPARSE | {"n_experts_max": 6, "max_seq_len": 48})
    model.blocks[1].ffn.router.alive[4] = True
    save(tmp_path / "run", 1, model=model)
    text = code(to_gguf, tmp_path / "run", tmp_path / "made.gguf", say=quiet)
    assert text.startswith("E404") and "experts alive by layer: {0: 4, 1: 5}" in text


def test_quantised_and_diverged_models_and_values_beyond_f16(tmp_path):
    save(tmp_path / "run", 1, model=make(3, qk_norm=False))
    export.quantize(tmp_path / "run", tmp_path / "few", say=quiet)
    file = tmp_path / "made.gguf"
    assert "E404" in (text := code(to_gguf, tmp_path / "few", file, say=quiet))
    assert "take what it was made from" in text
    for value, want in ((1e5, "E404"), (float("nan"), "E303")):
        model = make(3)
        model.blocks[0].ffn.w2.weight.data[0, 0] = value
        save(tmp_path / want, 1, model=model)
        text = code(to_gguf, tmp_path / want, file, say=quiet)
        assert text.startswith(want) and "blk.0.ffn_down.weight" in text
    assert "--type bf16" in code(to_gguf, tmp_path / "E404", file, say=quiet)
    to_gguf(tmp_path / "E404", file, "bf16", say=quiet)
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_that_blocks_do_not_fill_are_f16(tmp_path):
    said = []
    _, file, _ = written(tmp_path, {"d_ff": 40}, "q8_0", check=True, say=said.append)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("2 matrices are f16" in text for text in said)


# ---------------------------------------------------------------- the file and the command


def test_a_used_name_a_full_disk_and_a_place_that_cannot_be(tmp_path):
    save(tmp_path / "run", 1, model=make(3))
    used = tmp_path / "used.gguf"
    used.write_text("mine")
    text = code(to_gguf, tmp_path / "run", used, say=quiet)
    assert text.startswith("E117") and used.read_text() == "mine"
    assert code(to_gguf, tmp_path / "run", tmp_path, say=quiet).startswith("E117")
    assert code(to_gguf, tmp_path / "run", used / "x.gguf", say=quiet).startswith("E403")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        text = code(to_gguf, tmp_path / "run", tmp_path / "made.gguf", say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert text.startswith("E403") and "made.gguf" in text
    assert not list(tmp_path.glob("made*"))
    to_gguf(tmp_path / "run", tmp_path / "new" / "made.gguf", say=quiet)  # its folder is made


def test_the_command_and_its_words(tmp_path, capsys):
    save(tmp_path / "run", 1, model=make(3), **CHATML)
    words = ["to_gguf", str(tmp_path / "run"), str(tmp_path / "made.gguf")]
    text = code(export.main, [*words, "--type", "q4_k"])
    assert text.startswith("E002") and all(name in text for name in TYPES)
    assert code(to_gguf, *words[1:], "q4_k").startswith("E404")
    assert code(export.main, [*words, "--best", "--step", "1"]).startswith("E002")
    assert code(export.main, [*words, "--step", "7"]).startswith("E304")
    export.main([*words, "--type", "bf16", "--check"])
    text = capsys.readouterr().out
    assert "qwen3, step 1" in text and "tensors read back" in text and "LLAMA_PYTHON" in text


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    save(tmp_path / "run", 1, model=make(3))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    text = code(to_gguf, tmp_path / "run", tmp_path / "made.gguf", say=quiet)
    assert text.startswith("E003") and "requirements-export.txt" in text


def test_a_llama_python_that_cannot_answer_is_named_before_anything_is_written(
    tmp_path, monkeypatch
):
    save(tmp_path / "run", 1, model=make(3))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named llama_cpp' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(gguf_file.models, "read_model", None)  # never reached
    for path, why in ((tmp_path / "none", "No such file"), (broken, "No module named llama_cpp")):
        monkeypatch.setenv("LLAMA_PYTHON", str(path))
        text = code(to_gguf, tmp_path / "run", tmp_path / "x.gguf", check=True, say=quiet)
        assert text.startswith("E003") and str(path) in text and why in text


def test_logits_are_held_to_what_their_type_allows():
    ours = torch.randn(40, 97, generator=torch.Generator().manual_seed(0))
    off = ours + 0.02 * torch.randn(40, 97, generator=torch.Generator().manual_seed(1))
    found = {dtype: gguf_check.held_to(off, ours, dtype) for dtype in TYPES}
    assert "differ by" in found["f32"][1][0] and "more than 0.01" in found["f16"][1][0]
    assert not found["bf16"][1] and not found["q8_0"][1]
    assert not gguf_check.held_to(ours + 9e-5, ours, "f32")[1]
    flipped = ours.clone()
    flipped[:10] = 0  # where a router chose otherwise
    assert not gguf_check.held_to(flipped, ours, "f16")[1]
    for dtype in TYPES:
        assert gguf_check.held_to(ours * float("nan"), ours, dtype)[1]
        assert gguf_check.held_to(ours.roll(1, 1), ours, dtype)[1]
