"""What sample.py is asked, and how an answer is shown: prompts from options, files and stdin; one
question each with --chat; lumen/talk.py is a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lumen import chat
from lumen.chat import Message, Template
from lumen.errors import UserError, expand
from lumen.stream import Printer


def read_prompts(args) -> list:
    """Texts and lists of ids from the options; from stdin where asked, or where something is piped
    and nothing said. With args.chat conversations, a question each."""
    if not (args.prompt or args.prompt_file or args.ids):
        args.prompt = ["-"] if sys.stdin and not sys.stdin.isatty() else [""]
    prompts = []
    for prompt in args.prompt:
        if prompt == "-":
            prompt = _text(sys.stdin.buffer.read(), "stdin")
        prompts.append(prompt)
    for file in args.prompt_file:
        try:
            prompts.append(_text(Path(expand(file)).read_bytes(), file))
        except OSError as error:
            raise UserError("E500", f"--prompt_file {file}: {error.strerror}") from error
    if args.chat:
        if args.ids:
            raise UserError("E500", "--ids and --chat: a conversation is text; give --prompt")
        return [[*system_turn(args.system), Message("user", text)] for text in prompts]
    for ids in args.ids:
        try:
            prompts.append([int(i) for i in ids.replace(",", " ").split()])
        except ValueError as error:
            text = f"--ids {ids!r}: token ids are whole numbers, as in --ids '1 2 3'"
            raise UserError("E500", text) from error
    return prompts


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError("E500", f"the prompt from {source} is not UTF-8: {error}") from error


def piped_lines() -> Iterator[str] | None:
    """The lines of stdin, each as soon as it is there, what is not UTF-8 as U+FFFD. None: stdin is
    a terminal."""
    if sys.stdin is None:
        return iter(())
    if sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")
        return None
    return (line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer)


def is_conversation(prompt) -> bool:
    """Whether a prompt is messages, (role, content) each, and not a text or ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], tuple)


def heads_of(prompts: list, num_samples: int) -> list[str]:
    """What stands before each continuation: its prompt, below a headline where there are several;
    before the only answer of a conversation nothing."""
    texts = []
    for prompt in prompts:
        if is_conversation(prompt):
            texts.append(f"{prompt[-1].content}\n\n" if len(prompts) * num_samples > 1 else "")
        else:
            texts.append(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)))
    if len(texts) * num_samples == 1:
        return texts
    heads = []
    for n, text in enumerate(texts, 1):
        for i in range(num_samples):
            heads.append(f"--- prompt {n}, sample {i + 1} ---\n{text}")
    return heads


# ---------------------------------------------------------------- conversations


def system_turn(text: str | None) -> list[Message]:
    return [Message("system", text)] if text else []


def choose_template(opened, asked: str | None, say) -> Template:
    """The template asked for, or else the one that the model (models.Opened) was trained with.
    Where there is none it is a base model: that is said, and one taken that its tokenizer can
    write. E002, E113, E501."""
    found, tokenizer = opened.template, opened.tokenizer
    template = chat.find_template(asked) if asked else found or chat.default_template(tokenizer)
    if found is None:
        say(f"note: {why_base(opened)}")
        if opened.kind != "quantised":
            say(f"note: to teach it: python finetune.py {opened.folder} --data chats.jsonl")
        if not asked:
            say(f"note: taken: template {template.name} (--template NAME takes another)")
    elif template != found:
        say(f"note: it was trained with chat template {found.name}, not {template.name}")
    chat.check_tokenizer(template, tokenizer)
    return template


def why_base(opened) -> str:
    """Where a chat template was looked for, and what was not there to look into."""
    text = "a base model, which was not taught to answer: no chat template that Lumen knows in its"
    if opened.kind == "huggingface":
        return f"perhaps {text} folder"
    gone = [folder for folder in chat.data_folders(opened.state) if not Path(folder).exists()]
    if gone:
        return f"perhaps {text} checkpoint or import, and its data are not here: {', '.join(gone)}"
    return f"{text} checkpoint, data or import"


class ReplyPrinter(Printer):
    """Printer of replies: without the white space before their first word."""

    def __init__(self, heads: list[str]):
        super().__init__(heads)
        self.begun: set[int] = set()

    def __call__(self, i: int, piece: str, reason: str | None) -> None:
        if i not in self.begun:
            piece = piece.lstrip()
        if piece:
            self.begun.add(i)
        super().__call__(i, piece, reason)
