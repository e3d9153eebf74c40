"""Small tokenizers of the kinds that other people publish: their normalizers, pre-tokenizers,
decoders and added tokens, trained here because nothing can be downloaded."""

import glob
import json
import os
import random
import sysconfig
from functools import cache

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(5)]
LACKING = "ĀāĎÀõ"  # the bytes 00, 01, 0e, c0, f5 in the byte-level alphabet
TURNS = ["<|im_start|>", "<|im_end|>"]


@cache
def corpus() -> list[str]:
    """Documents of the standard library's own sources, and one of other alphabets."""
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    texts = [open(file, encoding="utf-8").read()[:4000] for file in files[:60]]
    return texts + [
        "naïve café Straße Привет мир 你好世界 こんにちは 한국어 العربية 👩‍👩‍👧 ½ Ⅷ\n" * 20
    ]


def texts(n: int) -> list[str]:
    """n texts: pieces of the standard library and generated Unicode, the same every time."""
    draw = random.Random(7)
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "**/*.py")))
    found = []
    while len(found) < n:
        if len(found) % 4 == 3:
            chars = [
                chr(draw.choice(RANGES)[draw.randrange(2)] + draw.randrange(90)) for _ in "1234"
            ]
            found.append("".join(draw.choice([*chars, " ", "\n", "a", "7"]) for _ in range(60)))
            continue
        with open(draw.choice(files), encoding="utf-8", errors="replace") as file:
            text = file.read()
        at = draw.randrange(max(1, len(text)))
        found.append(text[at : at + draw.randrange(1, 800)])
    return found


RANGES = [(0x20, 0xA0), (0x300, 0x370), (0x400, 0x5D0), (0x600, 0x900), (0x1E00, 0x2000)]
RANGES += [
    (0x2010, 0x2190),
    (0x3040, 0x4E00),
    (0xAC00, 0xFF00),
    (0x1F600, 0x1D400),
    (0, 0xE000 - 90),
]
RANGES = [(a, b if b < 0xD7A6 or b > 0xDFFF else 0xE000) for a, b in RANGES]


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Split(hf.Regex(pattern), "isolated")


def bpe(specials, alphabet=(), size=900, **model):
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    return hf.Tokenizer(models.BPE(**model)), trainer


def lines():
    return [line for text in corpus() for line in text.splitlines(keepends=True)]


def smollm2():
    """Digits apart, GPT-2's regex, and bytes that its training text had not."""
    bytes_ = set(pre_tokenizers.ByteLevel.alphabet()) - set(LACKING)
    made, trainer = bpe(["<|endoftext|>", *TURNS, "<repo_name>"], sorted(bytes_))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level()])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    return json.loads(made.to_str())


def llama3():
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    made, trainer = bpe([], bytes_)
    made.pre_tokenizer = pre_tokenizers.Sequence([split(LLAMA3), byte_level(False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *RESERVED, "<|eot_id|>"])
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    frame = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    whole = json.loads(made.to_str())
    whole["model"]["ignore_merges"] = True
    return whole


def olmo2():
    """The matches are kept and the rest is removed, of which there is nothing."""
    made, trainer = bpe([], pre_tokenizers.ByteLevel.alphabet())
    cut = pre_tokenizers.Split(hf.Regex(LLAMA3), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level(False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    made.add_tokens([hf.AddedToken("|||IP_ADDRESS|||", normalized=False)])
    return json.loads(made.to_str())


def qwen2():
    made, trainer = bpe([], pre_tokenizers.ByteLevel.alphabet())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([split(QWEN2), byte_level(False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(["<|endoftext|>", *TURNS])
    words = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
    made.add_tokens([hf.AddedToken(word, normalized=False) for word in words])
    return json.loads(made.to_str())


def neox():
    """NFC, GPT-2's regex, runs of blanks as added tokens."""
    made, trainer = bpe(["<|endoftext|>", "<|padding|>"], pre_tokenizers.ByteLevel.alphabet())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = byte_level()
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    made.add_tokens([" " * n for n in range(24, 1, -1)])
    return json.loads(made.to_str())


def deepseek():
    """A row of splits; markers of roles that its file calls ordinary words."""
    made, trainer = bpe([], pre_tokenizers.ByteLevel.alphabet())
    cuts = [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+")]
    cuts.append(split(LLAMA3.replace(r"|\p{N}{1,3}", "")))
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level(False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"])
    words = ("<｜User｜>", "<｜Assistant｜>", "<｜place▁holder▁no▁0｜>", "<think>")
    made.add_tokens([hf.AddedToken(word, normalized=False) for word in words])
    return json.loads(made.to_str())


def sentencepiece_bpe(specials, words=()):
    """BPE over characters with ▁ for blanks and tokens for bytes, as converted from a .model."""
    made, trainer = bpe([*specials, *BYTE_TOKENS], size=1200, unk_token="<unk>", fuse_unk=True)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.train_from_iterator(lines(), trainer)
    whole = json.loads(made.to_str())
    whole["added_tokens"] = whole["added_tokens"][: len(specials)]
    whole["model"]["byte_fallback"] = True
    made = hf.Tokenizer.from_str(json.dumps(whole))
    made.add_tokens([hf.AddedToken(word, normalized=False) for word in words])
    return made


def fallback_decoder(*more):
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    )


def gemma():
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    made = sentencepiece_bpe(
        specials, ("<unused0>", "<unused1>", "\n\n", "\n\n\n", "▁▁", "<table>")
    )
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = fallback_decoder()
    frame = ("<bos>", made.token_to_id("<bos>"))
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[frame])
    return json.loads(made.to_str())


def llama2():
    """And Mistral."""
    made = sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = fallback_decoder(decoders.Strip(" ", 1, 0))
    frame = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[frame])
    return json.loads(made.to_str())


def metaspace():
    """Mistral as newer programs write it."""
    made = sentencepiece_bpe(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    made.decoder = fallback_decoder(decoders.Strip(" ", 1, 0))
    return json.loads(made.to_str())


def unigram():
    """T5, XLM-R: the model itself has the control tokens among its pieces."""
    made = hf.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    made.decoder = decoders.Metaspace("▁", "always")
    specials = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(corpus()[:20] + corpus()[-1:], trainer)
    return json.loads(made.to_str())


def bert():
    made = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=specials, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    return json.loads(made.to_str())


KINDS = {
    made.__name__: made
    for made in (
        smollm2, llama3, olmo2, qwen2, neox, deepseek, gemma, llama2, metaspace, unigram, bert,
    )
}  # fmt: skip
FAST = ("smollm2", "llama3", "olmo2", "qwen2")  # run by tiktoken
