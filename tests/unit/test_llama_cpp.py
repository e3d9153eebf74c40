"""llama.cpp itself on our GGUF files: logits, greedy text, ids of 1,000 texts, conversations. By
hand: LLAMA_PYTHON names a Python with llama-cpp-python (`pip install llama-cpp-python` builds it
for a quarter of an hour); SMOLLM2 a folder of tools/smollm2.py."""

import functools
import json
import os
import random
import unicodedata

import pytest
import torch
from test_gguf import CHATML, SHAPES, quiet, written
from test_models import save_adapters
from test_sample import T, make, save
from tokenizer_kinds import KINDS as TOKENIZERS
from tokenizer_kinds import texts

from lumen import chat, gguf_check, models
from lumen import tokenizer as tok
from lumen.gguf_file import to_gguf
from lumen.gguf_vocabulary import NAMES
from lumen.patterns import (
    CL100K_PATTERN,
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
)
from lumen.tokenizer import Tokenizer

pytestmark = pytest.mark.nightly
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WIDE = {"qk_norm": False, "head_dim": 16}  # frequencies enough for a ramp
ROPES = {
    "linear": WIDE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3": WIDE | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "yarn": WIDE | {"rope_scaling": YARN},
    "yarn of its own": WIDE | {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_slow": 2}},
    "yarn qwen3": {"head_dim": 16, "rope_scaling": YARN},
}


@pytest.fixture(scope="module", autouse=True)
def python():
    found = os.environ.get("LLAMA_PYTHON")
    if not found:
        pytest.skip("LLAMA_PYTHON names no Python with llama-cpp-python")
    return found


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", SHAPES)
def test_logits_greedy_text_ends_and_ids_are_ours(tmp_path, name):
    report, *_ = written(tmp_path, SHAPES[name][1], state=CHATML, check=True)
    assert report["llama.cpp"] < 1e-3  # of logits whose spread is 3 and less


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_is_ours(tmp_path, name):
    report, file, model = written(tmp_path, ROPES[name], check=True)
    assert report["llama.cpp"] < 1e-3
    plain = make(3, **ROPES[name] | {"rope_scaling": None})  # which says otherwise
    rows = gguf_check.rows_of(model.cfg, T.n_vocab)
    with torch.no_grad():
        assert (plain(rows) - model(rows)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "sigmoid"])
def test_types_that_round(tmp_path, name, dtype):
    written(tmp_path, SHAPES[name][1], dtype, check=True)


def test_adapters(tmp_path):
    save(tmp_path / "run", 3, model=make(3, qk_norm=False))
    save_adapters(tmp_path / "lora", tmp_path / "run" / "step_00000003")
    file = tmp_path / "made.gguf"
    assert to_gguf(tmp_path / "lora", file, "f32", check=True, say=quiet)["llama.cpp"] < 1e-3


def test_another_model_is_found_out(tmp_path, monkeypatch):
    """The check itself: with another model in our place, its logits and its text differ."""
    monkeypatch.setattr(gguf_check, "rounded", lambda *a: make(4))
    monkeypatch.setattr(gguf_check, "by_transformers", lambda *a: {})
    with pytest.raises(Exception, match="logits differ by .*; it chooses tokens"):
        written(tmp_path, {}, check=True)


# ---------------------------------------------------------------- tokenizers


@functools.cache
def corpus() -> list[str]:
    """1,000 texts: code, generated Unicode of many alphabets, blanks, control tokens as text, and
    bytes that happen to be UTF-8."""
    draw = random.Random(0)
    made = [*gguf_check.TEXTS, *texts(600)]
    blanks = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "a", "7", ".", "\x0b", "\u2028"]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|end_of_text|>", "[PAD9]"]
    words = ["it's", "THEY'RE", "don't", "123456", "٣٤٥", "½", "naïve", "e\u0301", "<tool_call>"]
    while len(made) < 1000:
        kind = len(made) % 4
        if kind == 0:
            made.append("".join(draw.choices(blanks, k=draw.randrange(1, 30))))
        elif kind == 1:
            made.append("".join(draw.choices([*names, *words, " ", "\n", "x"], k=12)))
        elif kind == 2:
            made.append(bytes(draw.choices(range(128), k=40)).decode())
        else:
            made.append(bytes(draw.choices(range(256), k=200)).decode(errors="ignore"))
    return made


def own(pattern=None):
    """A vocabulary trained here, on the regex of somebody else's where one is named."""
    made = tok.train_bpe(corpus()[:200], 900)
    if pattern is None:
        return made
    return Tokenizer("own", made.ranks, made.specials, pattern)


def foreign(kind):
    return tok.from_json(json.dumps(TOKENIZERS[kind]()), f"/{kind}/tokenizer.json", kind)


def seams(pattern):
    """Any two bytes are a token, so that every cut of a text can be seen in its ids."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for a in range(256):
        ranks |= {bytes([a, b]): 256 + 256 * a + b for b in range(256)}
    return Tokenizer("seams", ranks, {"<|endoftext|>": 256 * 257}, pattern)


def characters() -> list[str]:
    """Every 5th character of Unicode 3.2, between letters, digits and blanks. (Of all that Python
    3.11 knows none differed in 2026-11; some 4,400 that are newer did.)"""
    known = []
    for code in range(0, 0x20000, 5):
        if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs"):
            known.append(f"a{chr(code)}1 {chr(code)}b")
    return known


VOCABULARIES = {
    "bytes": lambda: T,
    "own": own,
    "own gpt2": lambda: own(GPT2_PATTERN),
    "own llama3": lambda: own(LLAMA3_PATTERN),
    "own qwen2": lambda: own(QWEN2_PATTERN),
    "smollm2": lambda: foreign("smollm2"),
    "llama3": lambda: foreign("llama3"),
    "olmo2": lambda: foreign("olmo2"),
    "qwen2": lambda: foreign("qwen2"),
    "seams cl100k": lambda: seams(CL100K_PATTERN),
    "seams gpt2": lambda: seams(GPT2_PATTERN),
    "seams llama3": lambda: seams(LLAMA3_PATTERN),
    "seams qwen2": lambda: seams(QWEN2_PATTERN),
    "seams smollm": lambda: seams(DIGITS_PATTERN),
}


def marked(tokenizer, draw) -> tuple[str, list[int]]:
    """A text with control tokens in it, and the ids it has where they are taken for such."""
    names = sorted(tokenizer.controls)
    text, ids = "", []
    for _ in range(4):
        name, plain = draw.choice(names), draw.choice(["user\nHi there", " x ", "\n", "7 + 5"])
        text += name + plain
        ids += [tokenizer.controls[name], *tokenizer.encode(plain).tolist()]
    return text, ids


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_1000_texts(tmp_path, python, name):
    tokenizer = VOCABULARIES[name]()
    _, file, _ = written(tmp_path, {"vocab_size": tokenizer.n_vocab + 3}, tokenizer=tokenizer)
    asked = corpus() + (characters() if "seams" in name else [])
    if tokenizer.nfc:  # which llama.cpp leaves to who asks
        asked = [unicodedata.normalize("NFC", text) for text in asked]
    draw = random.Random(1)
    pairs = [marked(tokenizer, draw) for _ in range(100)]
    answer = gguf_check.ask(
        python, file, {"texts": asked, "marked": [text for text, _ in pairs]}, 64
    )
    wrong = []
    for text, ids in zip(asked, answer["ids"], strict=True):
        if ids != tokenizer.encode(text).tolist():
            wrong.append(text)
    assert not wrong
    assert answer["marked"] == [ids for _, ids in pairs]
    assert tokenizer.pattern in NAMES and len(asked) >= 1000


# ---------------------------------------------------------------- a real model


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder of the model")
def test_smollm2_goes_to_gguf_and_answers_as_here(tmp_path, python):
    smollm2 = os.environ["SMOLLM2"]
    file = tmp_path / "made.gguf"
    report = to_gguf(smollm2, file, "f32", check=True, say=quiet)
    assert report["llama.cpp"] < 1e-3 and report["transformers"] < 1e-4
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opened = models.read_model(smollm2)
    ids = theirs(prompt, add_special_tokens=False).input_ids
    asked = {"messages": messages, "marked": [prompt], "prompt": ids, "n_new": 9}
    answer = gguf_check.ask(python, file, asked, 512)
    assert answer["conversation"] == prompt and answer["marked"] == [ids]
    text = opened.tokenizer.decode(answer["greedy"])
    assert text == "The capital of France is Paris.<|im_end|>\n"
    end = chat.stop_ids("chatml", opened.tokenizer)[0]
    assert end in answer["ends"] and end in answer["greedy"]
