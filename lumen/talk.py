"""A conversation in the terminal, or with the lines of a pipe: replies as they come, commands,
Ctrl-C, a context that is full.

Everything that changes it changes it at once, when nothing can fail any more: what was refused or
interrupted leaves the conversation as it was.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lumen import sampling
from lumen.chat import Message, visible
from lumen.conversations import Reader, RowError, row_kind
from lumen.errors import UserError, expand, nearest, no_path
from lumen.files import replacing
from lumen.inputs import LONGEST
from lumen.prompts import ReplyPrinter, system_turn
from lumen.vocabulary import mend_surrogates

COMMANDS = {  # name: (what stands behind it, what it does)
    "/reset": ("", "forget all turns but the system turn"),
    "/system": ("TEXT", "begin the conversation with TEXT; without TEXT: with nothing"),
    "/save": ("FILE", "write the conversation, .json or .jsonl; prepare_data.py reads it"),
    "/load": ("FILE", "go on with the conversation in FILE"),
    "/temp": ("X", "the temperature from now on; without X: say it"),
    "/help": ("", "these lines"),
}
LEAVE = "Ctrl-C ends a reply, Ctrl-D or /quit leaves"
LEAVES = ("/quit", "/exit", "/bye")
CUT = {
    "length": "the reply was cut at {} tokens (--max_new_tokens)",
    "context": "the reply was cut: the model's context of {} tokens is full",
}
CHANGED = {  # by conversations.Reader
    "merged": "turns joined to the one before, of the same role",
    "tail_dropped": "turns left out after the last reply",
    "system_dropped": "empty system turns left out",
}


class Talk:
    """answer(messages, temperature, on_text) -> why the reply ended; count(messages) -> tokens
    before the reply; context, max_new_tokens: the model's and the reply's most tokens."""

    def __init__(
        self,
        answer: Callable,
        count: Callable,
        context: int,
        max_new_tokens: int,
        say: Callable,
        temperature: float,
    ):
        self.answer = answer
        self.count = count
        self.say = say
        self.limits = {"length": max_new_tokens, "context": context}
        # a reply of fewer tokens is none; in a tiny context a quarter of it has to do
        self.least_reply = min(max_new_tokens, 64, max(1, context // 4))
        self.temperature = temperature
        self.system: list[Message] = []  # one turn or none
        self.messages: list[Message] = []
        self.written: set[Path] = set()  # by /save, which may write them again
        self.interrupted = False  # a Ctrl-C came while a line was answered

    def run(self, read: Callable) -> None:
        """Until the end of input, or a second Ctrl-C at an empty prompt. read: input, or like
        it."""
        with contextlib.suppress(ImportError):  # input() then edits lines, and takes long ones
            importlib.import_module("readline")
        self.say(f"/help lists the commands; {LEAVE}")
        interrupted = False
        while True:
            try:
                line = read("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                empty = not typed()
                if interrupted and empty:
                    return
                interrupted = empty
                if empty:
                    self.say("Ctrl-C again, or Ctrl-D, leaves")
                continue
            if line.strip() in LEAVES:
                return
            interrupted = False
            with one_interrupt():
                self.heard(line)

    def hear(self, lines: Iterator[str]) -> None:
        """Each line is a turn, to the end of the input. KeyboardInterrupt: Ctrl-C ends all of it,
        for nobody sits there who could go on."""
        for line in lines:
            if line.strip() in LEAVES:
                return
            with one_interrupt():
                self.heard(line)
            if self.interrupted:
                raise KeyboardInterrupt

    def heard(self, line: str) -> None:
        """A command or a question; neither a UserError nor Ctrl-C ends the conversation."""
        line = mend_surrogates(line)
        try:
            if line.startswith("/"):
                self.command(line)
            elif line.strip():
                self.ask(line)
        except UserError as error:
            self.say(f"{error.code}: {error.text}")
        except KeyboardInterrupt:
            self.interrupted = True
            self.say("interrupted; the conversation is as it was")

    # ------------------------------------------------------------ a question

    def ask(self, question: str) -> None:
        """Show the reply and keep both; nothing is kept without one. E500: no room for a reply."""
        asked = [Message("user", question)]
        most = self.limits["context"] - self.least_reply
        alone = self.count(self.system + asked)
        if alone > most:
            what = "the system turn and the question have" if self.system else "the question has"
            raise UserError("E500", f"{what} {alone} tokens, and {most} at most leave a reply room")
        turns = self.messages
        forgotten = 0
        while self.count(self.system + turns + asked) > most:
            turns = without_oldest(turns)
            forgotten += 1
        if forgotten:
            turns_are = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            self.say(f"note: the context is full; the oldest {turns_are} forgotten")
        heard = Heard()
        try:
            reason = self.answer(self.system + turns + asked, self.temperature, heard)
        except KeyboardInterrupt:
            reason = "interrupt"
            self.interrupted = True
            print()  # the line that stands there ends
        reply = heard.text.strip()
        if not reply:
            self.say("note: there was no reply; the conversation is as it was")
            return
        self.messages = [*turns, *asked, Message("assistant", reply)]
        if reason in CUT:
            self.say(f"note: {CUT[reason].format(self.limits[reason])}")

    # ------------------------------------------------------------ commands

    def command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name not in COMMANDS:
            near = nearest(name, COMMANDS)
            hint = f"did you mean {near}? " if near else ""
            text = f"{visible(name)[:40]} is no command: {hint}/help lists them; a question that"
            self.say(f"{text} begins with / has a blank before it")
            return
        run = getattr(self, name.replace("/", "do_"))
        run(argument.strip())

    def do_help(self, _: str) -> None:
        for name, (argument, meaning) in COMMANDS.items():
            self.say(f"{f'{name} {argument}':14}{meaning}")
        self.say(LEAVE)

    def do_reset(self, _: str) -> None:
        self.messages = []
        self.say("a new conversation; the system turn stays" if self.system else "a new one")

    def do_system(self, text: str) -> None:
        self.set_system(text)
        self.say("the system turn is set" if text else "there is no system turn")

    def set_system(self, text: str) -> None:
        """E105: the template has no such role."""
        system = system_turn(mend_surrogates(text))
        self.count(system)
        self.system = system

    def do_temp(self, text: str) -> None:
        if text:
            try:
                value = float(text)
            except ValueError:
                raise UserError("E500", f"/temp {text}: it is no number") from None
            sampling.check(temperature=value)
            self.temperature = value
        self.say(f"temperature {self.temperature:g}")

    def do_save(self, name: str) -> None:
        path = file_named("/save", name)
        if not self.messages:
            raise UserError("E500", f"/save {name}: nothing was said yet")
        if os.path.exists(path) and path not in self.written:
            raise UserError("E500", f"/save {name}: the file exists; take another name")
        whole = self.system + self.messages
        write_conversation(path, whole)
        self.written.add(path)
        self.say(f"{path}: {len(whole)} messages written")

    def do_load(self, name: str) -> None:
        path = file_named("/load", name)
        messages, notes = read_conversation(path)
        self.count(messages)  # E105: the template lacks a role
        begin = 1 if messages[0].role == "system" else 0
        self.system = messages[:begin]
        self.messages = messages[begin:]
        for note in notes:
            self.say(f"note: {note}")
        self.say(f"{path}: {len(messages)} messages read")


class Heard(ReplyPrinter):
    """Shows a reply, with nothing in it that moves the cursor, and keeps it."""

    def __init__(self):
        super().__init__([""])
        self.text = ""

    def __call__(self, i: int, piece: str, reason: str | None) -> None:
        self.text += piece
        super().__call__(i, visible(piece), reason)


def without_oldest(turns: list[Message]) -> list[Message]:
    """Without the first question and what belongs to it."""
    for i, message in enumerate(turns[1:], 1):
        if message.role == "user":
            return turns[i:]
    return []


def typed() -> str:
    """What stands behind the prompt, where readline can tell: Ctrl-C clears it."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Only the first Ctrl-C within it is heard: who presses it twice means the reply, too."""

    def first(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- files


def file_named(command: str, name: str) -> Path:
    """E002, E500: no name that prepare_data.py would read as conversations."""
    if not name:
        raise UserError("E500", f"{command} wants a name: {command} FILE.jsonl")
    path = expand(name, command)
    if not path.endswith((".json", ".jsonl")):
        raise UserError("E500", f"{command} {name}: the file's name must end with .json or .jsonl")
    if reason := no_path(path):
        raise UserError("E500", f"{command} {visible(name)[:40]}: {reason}")
    return Path(os.path.realpath(path))


def write_conversation(path: Path, messages: list[Message]) -> None:
    """One line, {"messages": [...]}; the file is whole or as it was. E119."""
    row = {"messages": [message._asdict() for message in messages]}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with replacing(path) as file:
            file.write(line.encode())
    except OSError as error:
        raise UserError("E119", f"{path} cannot be written: {error.strerror}") from error


def read_conversation(path: Path) -> tuple[list[Message], list[str]]:
    """The messages of a file with one conversation, in any shape that prepare_data.py takes, and
    what was changed. E101 to E105, E108."""
    try:
        if not path.is_file() or path.stat().st_size > LONGEST:
            why = "it is too large" if path.is_file() else "there is no such file"
            raise UserError("E108", f"{path} cannot be read: {why}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("E103", f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise UserError("E108", f"{path} cannot be read: {error.strerror}") from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        more = "; /load takes one conversation" if "Extra data" in str(error) else ""
        raise UserError("E101", f"{path} is not one JSON object: {error}{more}") from None
    if not isinstance(row, dict) or row_kind(row) != "chat":
        raise UserError("E102", f'{path} is not one conversation, {{"messages": [...]}}')
    reader = Reader(tools=True)
    try:
        messages = reader.messages(row)
    except RowError as error:
        raise UserError(error.code, f"{path}: {error.reason}") from None
    notes = [f"{CHANGED[name]}: {n}" for name, n in reader.counts.items() if n]
    return [Message(role, mend_surrogates(content)) for role, content in messages], notes
