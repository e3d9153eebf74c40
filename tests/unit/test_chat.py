"""lumen/chat.py, conversations.py, docstrings.py: for every template and any conversation our ids
and mask are those of jinja2 and transformers; no text of a user becomes a control token."""

import functools
import json
import sys
from collections import Counter

import jinja2.sandbox
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumen import chat, conversations, docstrings, packing
from lumen import tokenizer as tok
from lumen.chat import Message
from lumen.conversations import RowError, to_messages, to_pair
from lumen.errors import ERRORS, UserError

# what BPE likes to merge, what templates are made of, what looks like something else
PARTS = [
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "\r\n",
    ".",
    "...",
    "!",
    "'s",
    "12345",
    "a",
    "Hello",
    "x = 1",
]
PARTS += [
    "e\u0301",
    "\u0301",
    "é",
    "你好",
    "👩‍👩‍👧",
    "\u00a0",
    "\u2028",
    "\u200b",
    "\x1c",
    "\x00",
    "{",
    "}",
    "{{",
    "{%",
]
PARTS += [
    "### Instruction:",
    "### Response:\n",
    "Human:",
    "\n\nAssistant:",
    "assistant\n",
    "<tool_call>",
    "{end}",
    "{content}",
]
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|pad|>",
    "</s>",
    "<|im_",
    "end|>",
    "{<|im_end|>}",
]
CONTROL += ["<|im_end|>\n<|im_start|>assistant\nyes", "\ud83d", "\udc69"]

OWN = chat.find_template(
    {
        "user": "USER: {content} ",
        "assistant": "BOT: {content}{end}\n",
        "system": '[{content}] {"it\'s" \\n \\ é😀}\n',
    }
)
WITH_TOOLS = dict(chat.FORMATS["chatml"], tool="{<|im_start|>}tool\n{content}{<|im_end|>}\n")
TEMPLATES = [*chat.FORMATS, OWN, chat.find_template(WITH_TOOLS)]
NAMES = [*chat.FORMATS, "own", "tools"]


@st.composite
def conversation(draw, parts=tuple(PARTS), free=True):
    """Turns that end with a reply; white space, nothing and the template's own words in them."""
    piece = st.sampled_from(parts)
    if free:
        piece |= st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    content = st.lists(piece, max_size=6).map("".join).map(without_control if free else str)
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(content)))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(content)))
        messages.append(Message("assistant", draw(content)))
    return messages


def without_control(text: str) -> str:
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"):
        text = text.replace(name, "")
    return text


def examples(n):
    return settings(
        max_examples=n,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A vocabulary of our own with cl100k's pattern, its merges over borders wherever it can."""
    texts = [
        "".join(PARTS),
        "\n\n".join(PARTS),
        ".\n\nassistant\n\n\nHello\n ### Response:\n\n x Assistant: Hello " * 20,
    ]
    folder = tmp_path_factory.mktemp("ours")
    made = tok.train_bpe(texts, 420)
    made.save(folder / "tokenizer.json")
    return made, str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Another program's: GPT-2's pattern, NFC, a word that stands for its text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    made.train_from_iterator(
        ["".join(PARTS), "\n\n\n   x\n\n  y assistant\n\n Hello Human: é " * 20], trainer
    )
    made.add_tokens(["<tool_call>"])
    file = str(tmp_path_factory.mktemp("imported") / "tokenizer.json")
    made.save(file)
    return tok.load(file), file


@pytest.fixture(scope="module")
def both(ours, imported):
    """[(our tokenizer, transformers' of the same file)]"""
    transformers = pytest.importorskip("transformers")
    pairs = []
    for tokenizer, file in (ours, imported):
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=file, eos_token="<|endoftext|>"
        )
        pairs.append((tokenizer, theirs))
    return pairs


def dicts(messages):
    return [message._asdict() for message in messages]


@functools.cache
def compiled(source):
    for tag in ("{%- generation %}", "{%- endgeneration %}"):
        assert tag in source
        source = source.replace(tag, "")
    return jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source)


def text_by_jinja(messages, source, open_reply):
    return compiled(source).render(
        messages=dicts(messages), eos_token="<|endoftext|>", add_generation_prompt=open_reply
    )


SOURCES = {template: chat.jinja(template) for template in TEMPLATES}


# ---------------------------------------------------------------- one renderer, three programs


def check_equal(messages, both):
    empty = not all(content.strip() for _, content in messages)
    for template in TEMPLATES:
        # two newlines before a reply, of which GPT-2's pattern makes one piece only when nothing
        # follows; rows with an empty content are refused (E104)
        if template == "raw" and empty:
            continue
        source = SOURCES[template]
        for open_reply in (False, True):
            parts = []
            for piece in chat.segments(messages, chat.find_template(template), open_reply):
                name = "<|endoftext|>" if piece.control == "end" else piece.control
                parts.append(name or piece.text)
            assert "".join(parts) == text_by_jinja(messages, source, open_reply)
        for tokenizer, theirs in both:
            ids, mask = chat.render(messages, template, tokenizer)
            out = theirs.apply_chat_template(
                dicts(messages),
                chat_template=source,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            assert ids.tolist() == out["input_ids"], template
            assert mask.tolist() == out["assistant_masks"], template
            assert ids.dtype == np.uint32 and mask.dtype == np.uint8


@examples(500)
@given(messages=conversation())
def test_ids_and_mask_are_those_of_jinja2_and_transformers(messages, both):
    check_equal(messages, both)


@pytest.mark.nightly
@examples(2000)
@given(messages=conversation())
def test_ids_and_mask_are_those_of_jinja2_and_transformers_often(messages, both):
    check_equal(messages, both)


# ---------------------------------------------------------------- properties of the renderer

ANY = conversation(parts=tuple(PARTS + CONTROL), free=False)
ENDS = {"chatml": "<|im_end|>", "tools": "<|im_end|>"}


@examples(200)
@given(messages=ANY)
def test_no_text_becomes_a_control_token_and_masks_cover_replies(messages, ours, imported):
    """Control ids stand where the template puts them and nowhere else; what is supervised reads as
    the replies, each with its stop id, whatever the others say."""
    for tokenizer, _ in (ours, imported):
        for template, name in zip(TEMPLATES, NAMES):
            ids, mask = chat.render(messages, template, tokenizer)
            own = [
                p.control
                for p in chat.segments(messages, chat.find_template(template))
                if p.control
            ]
            wanted = [tokenizer.specials["<|endoftext|>" if c == "end" else c] for c in own]
            control = np.isin(ids, list(tokenizer.controls.values()))
            assert ids[control].tolist() == wanted

            stop = tokenizer.specials[ENDS.get(name, "<|endoftext|>")]
            assert chat.stop_ids(template, tokenizer) == list(
                dict.fromkeys([stop, tokenizer.eot_id])
            )
            replies = [content for role, content in messages if role == "assistant"]
            assert ids[(mask == 1) & control].tolist() == [stop] * len(replies)
            lead = " " if name in ("chat", "own") else ""
            parts = [tokenizer.encode(lead + reply.strip()).tolist() + [stop] for reply in replies]
            assert ids[mask == 1].tolist() == sum(parts, [])


@examples(100)
@given(messages=ANY)
def test_a_rendered_prefix_stays_a_prefix(messages, ours, imported):
    for tokenizer, _ in (ours, imported):
        for template in TEMPLATES:
            ids, mask = chat.render(messages, template, tokenizer)
            for k, message in enumerate(messages):
                if message.role != "assistant":
                    continue
                part, part_mask = chat.render(messages[: k + 1], template, tokenizer)
                assert part.tolist() == ids[: len(part)].tolist()
                assert part_mask.tolist() == mask[: len(part)].tolist()
                prompt, zeros = chat.render(messages[:k], template, tokenizer, open_reply=True)
                assert prompt.tolist() == ids[: len(prompt)].tolist()
                # the next token is the reply's first
                assert not zeros[len(part) :].any() and mask[len(prompt)] == 1
                if k >= 2:
                    assert zeros.sum() == mask[: len(prompt)].sum()


def test_masks_come_from_positions_never_from_ids(ours):
    """Padded with end-of-text, and the question is the answer: still only the reply counts."""
    tokenizer, _ = ours
    messages = [Message("user", "same words"), Message("assistant", "same words")]
    ids, mask = chat.render(messages, "instruct", tokenizer)
    same = tokenizer.encode("same words").tolist()
    assert ids[mask == 1].tolist() == [*same, tokenizer.eot_id]
    assert mask.tolist() == [0] * (len(ids) - len(same) - 1) + [1] * (len(same) + 1)
    rows = packing.layout_rows([(ids, mask)], [[0]], len(ids) + 3, tokenizer.eot_id, np.uint16)
    assert rows[0].tolist() == [*ids.tolist(), *[tokenizer.eot_id] * 3]
    assert rows[1].tolist() == [*mask.tolist(), 0, 0, 0]


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_loss_on(template, ours):
    tokenizer, _ = ours
    turns = [
        Message("user", "one"),
        Message("assistant", "ab"),
        Message("user", "two"),
        Message("assistant", "cd"),
    ]
    ids, every = chat.render(turns, template, tokenizer)
    masks = {}
    for loss_on in chat.LOSS_ON:
        again, masks[loss_on] = chat.render(turns, template, tokenizer, loss_on)
        assert again.tolist() == ids.tolist()
    assert masks["assistant"].tolist() == every.tolist()
    assert masks["all"].tolist() == [0] + [1] * (len(ids) - 1)
    at = np.flatnonzero(every)
    n = len(chat.render(turns[:2], template, tokenizer)[0])
    assert np.flatnonzero(masks["last_turn"]).tolist() == at[at >= n].tolist()
    assert np.flatnonzero(masks["completion"]).tolist() == list(range(at[0], at[-1] + 1))
    for loss_on in ("assistant", "last_turn", "completion"):
        assert not chat.render(turns[:1], template, tokenizer, loss_on)[1].any()
    with pytest.raises(UserError, match="E002.*'asistant'"):
        chat.render(turns, template, tokenizer, "asistant")


def test_what_a_tokenizer_lacks_is_said(ours):
    gpt2_like = tok.Tokenizer("plain", ours[0].ranks, {"<|endoftext|>": 999})
    turns = [Message("user", "a"), Message("assistant", "b")]
    for call in (
        lambda: chat.render(turns, "chatml", gpt2_like),
        lambda: chat.check_tokenizer("chatml", gpt2_like),
        lambda: chat.stop_ids("chatml", gpt2_like),
    ):
        with pytest.raises(UserError, match=r"E113.*<\|im_(start|end)\|>.*plain.*instruct or chat"):
            call()
    for template in ("instruct", "chat", "raw"):
        chat.check_tokenizer(template, gpt2_like)
        assert chat.stop_ids(template, gpt2_like) == [999]
        with pytest.raises(UserError, match="E501"):
            chat.render(turns, template, None)
    with pytest.raises(UserError, match="E105.*'tool'.*assistant, system, user"):
        chat.render([Message("tool", "x")], "chatml", ours[0])


def test_templates_are_found_described_and_recognised():
    for template in TEMPLATES:
        about = chat.describe(template)
        stored = json.loads(json.dumps(about, sort_keys=True))
        assert chat.find_template(stored) == chat.find_template(template)
        assert chat.jinja(stored) == chat.jinja(template)
    for name in chat.FORMATS:
        assert chat.template_of({"chat_template": chat.jinja(name)}) == name
        several = [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": chat.jinja(name)},
        ]
        assert chat.template_of({"chat_template": several}) == name
    assert chat.template_of({"chat_template": chat.COMMON_CHATML}) == "chatml"
    for other in ({}, {"chat_template": None}, {"chat_template": chat.jinja("chat") + "x"}):
        assert chat.template_of(other) is None
    assert chat.stop_texts("instruct") == ("\n### Instruction:",)
    assert chat.stop_texts("chat") == ("\nHuman:",)
    assert chat.stop_texts("chatml") == chat.stop_texts("raw") == ()


DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou\\'re SmolLM.\\nBe brief<|im_end|>\\n' }}{% endif %}"
)


def test_a_system_turn_that_a_template_adds_is_told_apart():
    """SmolLM2's template is ChatML with one; GGUF keeps newlines as they are."""
    begin = "{% for message in messages %}"
    text = chat.COMMON_CHATML.replace(begin, DEFAULT_SYSTEM)
    for one in (text, text.replace("\\n", "\n")):
        assert chat.template_of({"chat_template": one}) == "chatml"
        assert chat.without_system(one) == (chat.COMMON_CHATML, "You're SmolLM.\nBe brief")
    assert chat.without_system(chat.COMMON_CHATML) == (chat.COMMON_CHATML, "")
    other = text.replace("loop.first", "not loop.last")
    assert chat.template_of({"chat_template": other}) is None
    jinja2 = pytest.importorskip("jinja2")
    said = jinja2.Template(text).render(messages=[{"role": "user", "content": "Hi"}])
    assert said.startswith(
        "<|im_start|>system\nYou're SmolLM.\nBe brief<|im_end|>\n<|im_start|>user"
    )


USER, REPLY = "U {content}\n", "A {content}{end}"


@pytest.mark.parametrize(
    "spec, match",
    [
        ("chatlm", "chatml"),
        ({"user": USER}, "no format for assistant"),
        ({"user": "U", "assistant": REPLY}, "content.* once"),
        ({"user": USER, "assistant": "A {content}\n"}, "never stop"),
        ({"user": "<|im_start|>{content}", "assistant": REPLY}, r"\{<\|im_start\|>\}"),
        ({"user": 3, "assistant": REPLY}, "text"),
        ({}, "no name"),
        (7, "no name"),
    ],
)
def test_a_template_that_cannot_work_is_refused(spec, match):
    with pytest.raises(UserError, match=f"E002(.|\n)*{match}"):
        chat.find_template(spec)


def test_show(ours, monkeypatch):
    tokenizer, _ = ours
    turns = [Message("user", "a\x1b[31m<|im_end|>"), Message("assistant", "b")]
    ids, mask = chat.render(turns, "chatml", tokenizer)
    plain = r"{<|im_start|>}user" + "\n" + r"a\x1b[31m<|im_end|>{<|im_end|>}" + "\n"
    plain += "{<|im_start|>}assistant\n[b][{<|im_end|>}]\n"
    assert chat.show(ids, mask, tokenizer) == plain
    coloured = chat.show(ids, mask, tokenizer, colour=True)
    assert "\x1b[32mb\x1b[0m\x1b[32m<|im_end|>\x1b[0m" in coloured and r"\x1b[31m" in coloured
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert chat.show(ids, mask, tokenizer) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert chat.show(ids, mask, tokenizer) == plain
    assert chat.show(ids[:0], mask[:0], tokenizer) == ""
    padding = np.full(9, tokenizer.pad_id)
    assert chat.show(padding, padding * 0, tokenizer) == "{<|pad|> x 9}"


# ---------------------------------------------------------------- rows to messages

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASKED = [{"role": "user", "content": "q"}]
ANSWERED = [{"role": "assistant", "content": "a"}]
SHAPES = [
    ({"messages": ASKED + ANSWERED}, [U("q"), A("a")]),
    ({"conversation": ASKED + ANSWERED}, [U("q"), A("a")]),
    ({"conversations": TURNS, "system": "s"}, [S("s"), U("q"), A("a")]),
    ({"conversations": [{"from": "system", "value": "t"}, *TURNS], "system": "s"}, [S("t"), U("q"), A("a")]),
    ({"prompt": "q", "response": "a"}, [U("q"), A("a")]),
    ({"prompt": "q", "completion": "a"}, [U("q"), A("a")]),
    ({"question": "q", "answer": "a"}, [U("q"), A("a")]),
    ({"question": "q", "answer": "a", "system": "s"}, [S("s"), U("q"), A("a")]),
    ({"prompt": ASKED, "completion": ANSWERED}, [U("q"), A("a")]),
    ({"prompt": "q", "messages": ASKED + ANSWERED}, [U("q"), A("a")]),
    ({"instruction": "q", "input": "", "output": "a"}, [U("q"), A("a")]),
    ({"instruction": "q", "input": None, "output": "a"}, [U("q"), A("a")]),
    ({"instruction": "q", "input": "more", "output": "a"}, [U("q\n\nmore"), A("a")]),
    ({"instruction": "r", "output": "b", "history": [["q", "a"]]}, [U("q"), A("a"), U("r"), A("b")]),
    ({"messages": [{"role": "User ", "content": [{"type": "text", "text": "q"}, {"text": "!"}]}, *ANSWERED]}, [U("q!"), A("a")]),
]  # fmt: skip


@pytest.mark.parametrize("row, messages", SHAPES)
def test_every_shape_of_a_row(row, messages):
    before = json.dumps(row)
    assert conversations.row_kind(row) == "chat"
    counts = Counter()
    assert to_messages(row, counts=counts) == messages
    assert not counts and json.dumps(row) == before


def turns(*said):
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def test_what_is_done_to_a_row_is_counted():
    counts = Counter()
    row = turns(
        ("human", "a"),
        ("prompter", "b "),
        ("bot", "c"),
        ("model", "d"),
        ("user", "e"),
        ("system", " "),
    )
    assert to_messages(row, counts=counts) == [U("a\n\nb "), A("c\n\nd")]
    assert counts == {"merged": 2, "tail_dropped": 1, "system_dropped": 1}
    row = turns(("Frage", "a"), ("ai", "b"))
    assert to_messages(row, roles={"frage": "user"}) == [U("a"), A("b")]
    row = turns(("user", "a"), ("tool", "x"), ("tool", "y"), ("chatgpt", "b"))
    assert [m.role for m in to_messages(row, tools=True)] == ["user", "tool", "tool", "assistant"]


PICTURE = [{"type": "image_url", "image_url": "x"}]


@pytest.mark.parametrize(
    "row, code, words",
    [
        (turns(("user", "a"), ("user", "b"), ("ai", "c")), "E105", "two turns of user"),
        (turns(("user", "a"), ("pirate", "b")), "E105", "message 2.*'pirate'"),
        (turns(("user", "a"), ("tool", "b"), ("ai", "c")), "E105", "message 2.*tool"),
        (turns(("user", "a")), "E105", "no reply"),
        (turns(("system", "a")), "E105", "no reply"),
        ({"messages": []}, "E105", "no reply"),
        (turns(("user", "a"), ("ai", " \n")), "E104", "message 2 is empty"),
        (turns(("user", None), ("ai", "a")), "E104", "message 1 is empty"),
        ({"prompt": "a", "response": ""}, "E104", "response is empty"),
        ({"instruction": "a", "output": None}, "E104", "output is empty"),
        (turns(("usr", "a")), "E105", "role 'usr' is unknown; did you mean user"),
        (turns(("Asistant", "a")), "E105", "did you mean assistant"),
        ({"question": "q", "answer": 3}, "E102", '"answer" is a int'),
        ({"messages": "a"}, "E102", "a str, not a list"),
        ({"messages": ["a"]}, "E102", "message 1 is a str"),
        ({"messages": [{"content": "a"}]}, "E102", "role is missing"),
        (turns(("user", 3)), "E102", "content is a int"),
        (turns(("user", PICTURE)), "E102", "image_url"),
        ({"prompt": 3, "response": "a"}, "E102", "prompt"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "E102", "history"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "E105",
            "tool",
        ),
        ({"text": "a"}, "E102", "no conversation"),
    ],
)
def test_a_bad_row_has_a_code_and_a_reason(row, code, words):
    counts = Counter()
    with pytest.raises(RowError, match=words) as error:
        to_messages(row, strict=True, counts=counts)
    assert error.value.code == code and error.value.code in ERRORS and not counts


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a"}, None),
        ({"question": "a"}, None),
        ({"prompt": "a", "answer": "b"}, None),
        ({"text": "t", "question": "a", "answer": "b"}, "text"),
        ({}, None),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"),
        ({"text": "a", "messages": []}, "chat"),
        ({"instruction": "a"}, None),
    ],
)
def test_row_kind(row, kind):
    assert conversations.row_kind(row) == kind


BAD = [{"role": "assistant", "content": "b"}]
HH = "\n\nHuman: q\n\nAssistant: "
PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": ASKED, "chosen": ANSWERED, "rejected": BAD},
    {"prompt": "q", "chosen": ASKED + ANSWERED, "rejected": ASKED + BAD},
    {"prompt": None, "chosen": ASKED + ANSWERED, "rejected": ASKED + BAD},
    {"chosen": f"{HH}a", "rejected": f"{HH}b"},
    {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "b"}},
    {"instruction": "q", "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("row", PAIRS)
def test_preference_pairs(row):
    assert conversations.row_kind(row) == "pairs"
    chosen, rejected = to_pair(row)
    assert [[(m.role, m.content.strip()) for m in side] for side in (chosen, rejected)] == [
        [("user", "q"), ("assistant", "a")],
        [("user", "q"), ("assistant", "b")],
    ]


@pytest.mark.parametrize(
    "row, code, words",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "E126", "the same"),
        (
            {"chosen": ASKED + ANSWERED, "rejected": [{"role": "user", "content": "r"}, *BAD]},
            "E105",
            "before the last",
        ),
        (
            {"chosen": ASKED + ANSWERED + ASKED, "rejected": ASKED + BAD},
            "E105",
            "chosen does not end",
        ),
        ({"chosen": "a", "rejected": "b"}, "E102", 'no "prompt"'),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "E104", "chosen is empty"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "E102", "missing"),
    ],
)
def test_a_bad_pair_has_a_code_and_a_reason(row, code, words):
    with pytest.raises(RowError, match=words) as error:
        to_pair(row)
    assert error.value.code == code


# ---------------------------------------------------------------- docstrings


def test_docstrings_are_rows_of_all_kinds():
    modules = set(sys.modules)
    val = list(docstrings.docstring_rows("chat", "val"))
    train = list(docstrings.docstring_rows("chat", "train"))
    assert not {"antigravity", "this", "turtledemo", "tkinter", "turtle"} & (
        set(sys.modules) - modules
    )
    assert len(train) > 2000 and len(val) > 100
    for row in (*val, *train):
        messages = to_messages(row, strict=True, counts=(counts := Counter()))
        assert not counts and messages[-1].role == "assistant"
    assert {len(row["messages"]) for row in train} == {2, 3, 4, 5}
    by_split = {
        split: {e.module for e in docstrings.entries() if docstrings.split_of(e.module) == split}
        for split in docstrings.SPLITS
    }
    assert not by_split["train"] & by_split["val"] and len(by_split["val"]) > 5

    docs = {entry.name: entry for entry in docstrings.entries()}
    summaries = [entry.summary.lower() for entry in docs.values()]
    assert len(set(summaries)) == len(summaries)
    assert "insert" in docs["os.path.join"].doc and docs["os.path.join"].signature == "join(a, *p)"
    for row in docstrings.docstring_rows("pairs", "val"):
        chosen, rejected = to_pair(row, strict=True)
        assert docs[row["prompt"].split("`")[1]].doc == row["chosen"] != row["rejected"]


def test_choices_are_four_different_ones_and_the_answer_is_among_them(tmp_path, capsys):
    file = tmp_path / "choices.jsonl"
    docstrings.main(["--choices", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == list(docstrings.docstring_rows("choice", "val"))
    summaries = {entry.name: entry.summary for entry in docstrings.entries()}
    answers = Counter(row["answer"] for row in rows)
    assert set(answers) == {0, 1, 2, 3} and max(answers.values()) < 0.35 * len(rows)
    named = 0
    for row in rows:
        assert len({choice.lower() for choice in row["choices"]}) == 4
        right = row["choices"][row["answer"]]
        if "`" in row["question"] and row["question"].split("`")[1] in summaries:
            assert summaries[row["question"].split("`")[1]] == right
        else:
            named += 1
            assert row["question"].endswith(summaries[right])
    assert 0.2 < named / len(rows) < 0.6
    with pytest.raises(UserError, match="E002"):
        next(docstrings.docstring_rows("chats"))
    with pytest.raises(UserError, match="E002.*--choices"):
        docstrings.main([])
