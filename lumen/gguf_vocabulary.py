"""A tokenizer of ours in GGUF's words, which llama.cpp gives the same ids.

llama.cpp knows a byte-level BPE by its tokens, their types, its merges, and the NAME of the regex
that cuts a text into pieces (tokenizer.ggml.pre). Its own converter finds the name by a hash of
what a tokenizer makes of one text, and so refuses every vocabulary that it has not seen; here the
regex is known, and the name follows from it. The regexes were read in llama.cpp's
src/llama-vocab.cpp and src/unicode.cpp (2026-08), and are held against it by
tests/unit/test_llama_cpp.py.
"""

from __future__ import annotations

import json

from lumen import chat
from lumen.base import jinja_of
from lumen.bpe import parts
from lumen.errors import UserError
from lumen.files import read_json
from lumen.hf import TOKEN_IDS
from lumen.patterns import (
    CL100K_PATTERN,
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
)
from lumen.tokenizer import Tokenizer
from lumen.tokenizer_json import chars

# cl100k's \s*[\r\n] and Llama 3's \s*[\r\n]+ end at the same newline, the last of the blanks.
NAMES = {
    GPT2_PATTERN: "gpt-2",
    CL100K_PATTERN: "llama-bpe",
    LLAMA3_PATTERN: "llama-bpe",
    QWEN2_PATTERN: "qwen2",
    DIGITS_PATTERN: "smollm",
}
# The nearest where none is the same: llama.cpp's gpt-4o takes every letter beyond ASCII for a
# capital and a small one, and knows no marks.
NEAREST = {O200K_PATTERN: "gpt-4o"}
WHOLE_PIECES = ("llama-bpe",)  # looks a piece up before it merges, as tiktoken does
NORMAL, CONTROL, WORD, UNUSED = 1, 3, 4, 5  # gguf.TokenType; WORD: USER_DEFINED
GENERATION = ("{%- generation %}", "{%- endgeneration %}", "{% generation %}")
GENERATION += ("{% endgeneration %}",)


def check(tokenizer, pre: str | None, n_rows: int, where) -> str:
    """The name of its regex; `pre`: one that somebody chose. E113, E404, E501."""
    if tokenizer is None:
        text = f"{where} has no tokenizer, and llama.cpp reads text with the one in the file"
        raise UserError("E501", f"{text}; --tokenizer FILE names one")
    if tokenizer.n_vocab > n_rows:
        text = f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model {n_rows} rows"
        raise UserError("E113", text)
    if not isinstance(tokenizer, Tokenizer):
        fix = "python export.py to_hf, and llama.cpp's convert_hf_to_gguf.py, take such a one"
        text = f"GGUF is written with byte-level BPE; {tokenizer.reason}"
        raise UserError("E404", f"tokenizer {tokenizer.name}: {text}; {fix}")
    name = pre or NAMES.get(tokenizer.pattern)
    if name is None:
        near = NEAREST.get(tokenizer.pattern)
        fix = f"--pre {near} is near it" if near else "--pre NAME takes one of llama.cpp's"
        fix += ", and gives some texts other ids"
        text = f"llama.cpp has no name for its regex {tokenizer.pattern}"
        raise UserError("E404", f"tokenizer {tokenizer.name}: {text}; {fix}")
    if lonely := n_unmade(tokenizer) if name not in WHOLE_PIECES else 0:
        text = f"no merges lead to {lonely} of its tokens, which llama.cpp's {name} needs"
        fix = "--pre llama-bpe looks whole pieces up, and cuts texts as cl100k does"
        raise UserError("E404", f"tokenizer {tokenizer.name}: {text}; {fix}")
    return name


def caveats(source, pre: str | None) -> list[str]:
    """Which texts llama.cpp gives other ids, for people; none: []."""
    tokenizer, found = source.tokenizer, []
    if tokenizer.nfc:
        found.append("llama.cpp does not bring text into Unicode's NFC first, as this tokenizer")
    if pre and pre != NAMES.get(tokenizer.pattern):
        found.append(f"--pre {pre} is not known to cut texts as this tokenizer does")
    return found


def pairs_of(tokenizer: Tokenizer) -> list[list[bytes]]:
    """What each token of more than a byte is merged of, in the order of the merges."""
    multi = sorted((rank, token) for token, rank in tokenizer.ranks.items() if len(token) > 1)
    return [parts(token, tokenizer.ranks) for _, token in multi]


def n_unmade(tokenizer: Tokenizer) -> int:
    return sum(len(pair) != 2 for pair in pairs_of(tokenizer))


def tokens(tokenizer: Tokenizer, n_rows: int) -> tuple[list[str], list[int]]:
    """(text, type) of each id, and of the rows of the embedding behind the last. E404: two have one
    text, at which llama.cpp ends."""
    texts = [""] * n_rows
    types = [UNUSED] * n_rows
    for token, i in tokenizer.ranks.items():
        texts[i], types[i] = chars(token), NORMAL
    for name, i in {**tokenizer.words, **tokenizer.specials}.items():
        texts[i] = name
        types[i] = CONTROL if name in tokenizer.controls else WORD
    taken = set(texts)
    for i, text in enumerate(texts):
        if types[i] == UNUSED:
            text = f"[PAD{i}]"
            while text in taken:
                text = f"[{text}]"
            texts[i] = text
    if len(set(texts)) != n_rows:
        twice = sorted({text for text in texts if texts.count(text) > 1})
        text = f"two of its ids are {', '.join(map(repr, twice[:3]))}, and llama.cpp takes one"
        raise UserError("E404", f"tokenizer {tokenizer.name}: {text}")
    return texts, types


def special_ids(source, template) -> dict[str, list[int]]:
    """{bos, eos, pad: ids}: of a folder or an imported run what it says, as export.py's to_hf
    does; what ends a reply stands first under eos."""
    tokenizer, state = source.tokenizer, source.state
    said = state.get("imported") or {}
    if source.kind == "huggingface":
        said = read_json(source.folder / "config.json")
    if "eos_token_id" in said:
        ids = {key: said.get(key) for key in TOKEN_IDS}
    else:
        ids = dict(zip(TOKEN_IDS, (tokenizer.eot_id, tokenizer.eot_id, tokenizer.pad_id)))
    found = {}
    for key, value in ids.items():
        listed = value if isinstance(value, list) else [value]
        found[key.removesuffix("_token_id")] = [i for i in listed if type(i) is int and i >= 0]
    if template:
        ends = [*chat.stop_ids(template, tokenizer), *found["eos"]]
        found["eos"] = list(dict.fromkeys(ends))
    return found


def chat_template(source) -> str | None:
    """The Jinja text: a folder's own, or that of the template the run was trained with. Without
    transformers' {% generation %}, which no other reader of Jinja knows."""
    text = None
    if source.kind == "huggingface":
        text = jinja_of(source.folder)
    elif source.template:
        system = (source.state.get("imported") or {}).get("system")
        text = first_turn(system) + chat.jinja(source.template)
    if isinstance(text, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        return None
    for tag in GENERATION:
        text = text.replace(tag, "")
    return text


def first_turn(system: str | None) -> str:
    """What the imported template, ChatML, says where a conversation has no system turn."""
    if not system:
        return ""
    turn = json.dumps(f"<|im_start|>system\n{system}<|im_end|>\n", ensure_ascii=False)
    test = "messages and messages[0]['role'] != 'system'"
    return f"{{%- if {test} %}}{{{{- {turn} }}}}{{%- endif %}}"


def add(writer, source, pre: str, n_rows: int) -> None:
    """Write all of it into a gguf.GGUFWriter."""
    tokenizer = source.tokenizer
    texts, types = tokens(tokenizer, n_rows)
    merges = [" ".join(map(chars, pair)) for pair in pairs_of(tokenizer) if len(pair) == 2]
    if not merges:  # of bytes alone; llama.cpp wants one, and this one never comes to pass
        merges = [f"{texts[tokenizer.eot_id]} {texts[tokenizer.eot_id]}"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids = special_ids(source, source.template)
    if ids["bos"]:
        writer.add_bos_token_id(ids["bos"][0])
    if ids["pad"]:
        writer.add_pad_token_id(ids["pad"][0])
    if ids["eos"]:
        writer.add_eos_token_id(ids["eos"][0])
        # llama.cpp and Ollama end at both
        writer.add_eot_token_id(ids["eos"][1 if len(ids["eos"]) > 1 else 0])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if template := chat_template(source):
        writer.add_chat_template(template)
