"""Whether transformers computes what we do from an exported folder: logits, greedy tokens, token
ids and conversations."""

from __future__ import annotations

from pathlib import Path

import torch

from lumen import chat, checkpoint
from lumen.errors import UserError
from lumen.hf import folded
from model import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # largest difference of fp32 logits that the check accepts

TEXTS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "",
    " ",
    "  two  spaces ",
    "\n\n\tindented\r\n",
    "def f(x):\n    return x ** 2  # square\n",
    "don't I'll we've THEY'RE",
    "3.14159 1,000,000 0x1F 2024-11-21",
    "https://example.org/a?b=c&d=%20",
    "naïve café Straße",
    "Привет, мир",
    "你好，世界",
    "こんにちは",
    "안녕하세요",
    "مرحبا بالعالم",
    "नमस्ते",
    "👩‍👩‍👧‍👦 🇧🇷 ☺️",
    "a\u0301 \u200b\ufeff",
    "ends with spaces   ",
]


def import_transformers():
    try:
        import transformers
    except ImportError as error:
        text = f"the check needs transformers: pip install transformers ({error})"
        raise UserError("E003", text) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def compare(
    transformers, source: checkpoint.Checkpoint, cfg, dtype: str, tokenizer, folder: Path
) -> dict:
    """Logits, 32 greedy tokens and token ids under transformers against ours, in fp32 on the CPU.

    Ours are the checkpoint's weights rounded to `dtype`, so what rounding costs is not part of the
    difference.
    """
    ours = Transformer(cfg).eval()
    state = source.model_state()
    for name in {name for name, _ in ours.named_parameters()}:
        scale = 1.0  # what was folded in before the rounding
        if name.endswith("router.weight"):
            scale = cfg.routing_temperature
        elif name.endswith("experts.w2"):
            scale = 1 / folded(cfg)
        state[name] = (state[name] / scale).to(DTYPES[dtype]).float() * scale
    ours.load_state_dict(state)
    auto = transformers.AutoModelForCausalLM
    try:
        theirs = auto.from_pretrained(folder, torch_dtype=torch.float32).eval()
        other = transformers.AutoTokenizer.from_pretrained(folder) if tokenizer else None
    except Exception as error:  # whatever it raises, the folder does not do what it promises
        text = f"transformers {transformers.__version__} cannot load {folder}: {error}"
        raise UserError("E402", text) from error
    n = tokenizer.n_vocab if tokenizer else cfg.vocab_size
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(n, (2, min(64, cfg.max_seq_len)), generator=generator)  # (B, T)
    diff = (ours(idx) - theirs(idx).logits).abs().max().item()
    # Their cached decoding against our full forward: each token they choose has our largest logit,
    # or ties with it.
    theirs.generation_config.eos_token_id = None  # go on for 32 tokens
    out = theirs.generate(idx[:1, :8], max_new_tokens=32, do_sample=False)
    logits, new = ours(out)[0, -33:-1], out[0, -32:]  # (32, V), (32,)
    gap = (logits.max(-1).values - logits[torch.arange(32), new]).max().item()
    equal = None
    if tokenizer:
        equal = all(
            tokenizer.encode(text).tolist() == other(text, add_special_tokens=False).input_ids
            for text in TEXTS
        )
    return {"max_diff": diff, "greedy_equal": gap <= 2 * TOLERANCE, "ids_equal": equal}


def same_conversations(transformers, tokenizer, template: chat.Template, folder: Path) -> bool:
    """Whether transformers makes our ids and our mask of a conversation."""
    other = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS if text.strip()]
    for question, reply in zip(texts, texts[1:]):
        messages = [chat.Message("user", question), chat.Message("assistant", reply)]
        ids, mask = chat.render(messages, template, tokenizer)
        theirs = other.apply_chat_template(
            [message._asdict() for message in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        same = theirs["input_ids"] == ids.tolist() and theirs["assistant_masks"] == mask.tolist()
        if not same:
            return False
    return True
