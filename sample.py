"""Generate from a trained run: `python sample.py out/run --prompt "def " --max_new_tokens 200
--temperature 0.8`.

Several prompts (--prompt is repeatable) times --num_samples are sequences that share each forward
pass (lumen/engine.py). Each draws from a generator of its own (sample i of any prompt: seed + i),
so in fp32 its text does not depend on what else is in the batch. `--chat` without a prompt is a
conversation in the terminal, or with a pipe (lumen/talk.py). A notebook needs two lines:
`model, tokenizer, step = load("out/run")`, then `sample(...)`.
"""

from __future__ import annotations

import argparse
import functools
import sys

import lumen.waiting  # noqa: F401 - before torch

from lumen import chat, kv_int8, option_names
from lumen.engine import Engine, Row, run
from lumen.errors import UserError, a_path
from lumen.launch import Words, command
from lumen.models import open_model
from lumen.prompts import (
    ReplyPrinter,
    choose_template,
    heads_of,
    is_conversation,
    piped_lines,
    read_prompts,
)
from lumen.sampling import RANGES, Choice, check
from lumen.stream import Printer, Stream
from lumen.talk import Talk
from model import Transformer

# ---------------------------------------------------------------- generation

SLOTS = 64  # sequences at once, each with room for the longest


def sample(
    model: Transformer,
    tokenizer,  # tokenizer.Tokenizer, or None when all prompts are ids
    # each a text; or a list of ids: then its continuation is ids too: "17 4 99"; or a conversation,
    prompts: list,  # (role, content) each: then it is the reply, without white space around it
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 1,
    num_samples: int = 1,
    stop: tuple[str, ...] = (),  # a sequence ends before the first of these
    ignore_eot: bool = False,  # False: it ends at the tokenizer's <|endoftext|>
    template=None,  # of conversations; its ends of a reply, ids and texts, end a sequence too
    on_text=None,  # called as on_text(sequence, piece of text, None or why it ended)
    stats: dict | None = None,  # gets {prefill,decode}_{tokens,seconds} and reasons
    engine: Engine | None = None,  # of this model, to go on with; it remembers what it has read
) -> list[str]:
    """The continuations without their prompts: num_samples for the first prompt, then for the next.

    An empty prompt starts from <|endoftext|>. A sequence ends at model.cfg.max_seq_len tokens at
    the latest (reason "context"). UserError E113: tokenizer and model do not fit, E500: an option
    or a prompt that cannot work, or logits that are not finite; E501: text without a tokenizer.
    """
    choice = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    check(stop=stop, max_new_tokens=max_new_tokens, seed=seed, num_samples=num_samples, **choice)
    vocab_size = model.cfg.vocab_size
    n_vocab = tokenizer.n_vocab if tokenizer else vocab_size
    if n_vocab > vocab_size:
        text = f"the tokenizer has {n_vocab} ids, the model's vocab_size is {vocab_size}"
        raise UserError("E113", text)
    ends = () if ignore_eot or tokenizer is None else (tokenizer.eot_id,)
    if template and ends:
        ends = tuple(chat.stop_ids(template, tokenizer))
        stop = (*stop, *chat.stop_texts(template))

    rows = []
    for number, prompt in enumerate(prompts, 1):
        reader = tokenizer if isinstance(prompt, str) or is_conversation(prompt) else None
        ids = _encode(prompt, number, tokenizer, n_vocab, template)
        room = _room(ids, number, model.cfg.max_seq_len)
        for i in range(num_samples):
            stream = Stream(reader, ids, tuple(stop), ends, max_new_tokens, room)
            rows.append(Row(stream, Choice(**choice), seed + i))
    if not rows:
        return []
    if engine is None:
        longest = max(len(row.stream.ids) + row.stream.limit for row in rows)
        engine = Engine(model, min(len(rows), SLOTS), longest, n_vocab)
    _write(engine, rows, on_text)
    if stats is not None:
        for kind in ("prefill", "decode"):
            stats[f"{kind}_tokens"] = engine.tokens[kind]
            stats[f"{kind}_seconds"] = engine.seconds[kind]
        stats["reasons"] = [row.stream.reason for row in rows]
    texts = [row.stream.text for row in rows]
    # white space around a reply, or before the first id, is no part of it
    bare = [is_conversation(prompt) or not isinstance(prompt, str) for prompt in prompts]
    return [text.strip() if bare[i // num_samples] else text for i, text in enumerate(texts)]


def _write(engine: Engine, rows: list[Row], on_text) -> None:
    """Let all of them end. UserError E500: logits that are not finite."""
    numbers = {row: i for i, row in enumerate(rows)}
    engine.reset_counts()
    try:
        for news in run(engine, rows):
            if news.reason == "error":
                text = "the model's logits are NaN or infinite: the run has diverged"
                raise UserError("E500", f"{text}, or --precision fp32 helps")
            if on_text and (news.piece or news.reason):
                on_text(numbers[news.row], news.piece, news.reason)
    except BaseException:
        engine.clear()  # Ctrl-C can come in the middle of a pass
        raise


def _encode(prompt, number: int, tokenizer, n_vocab: int, template) -> list[int]:
    """The ids of a prompt. UserError as in `sample`."""
    if tokenizer is None and (isinstance(prompt, str) or not len(prompt)):
        text = f"prompt {number} is text or empty, and this model has no tokenizer.json"
        raise UserError("E501", text)
    if is_conversation(prompt):
        ids, _ = chat.render(prompt, template or chat.DEFAULT, tokenizer, open_reply=True)
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = prompt
    ids = [int(i) for i in ids] or [tokenizer.eot_id]
    if not 0 <= min(ids) <= max(ids) < n_vocab:
        text = f"prompt {number} has ids {min(ids)} to {max(ids)}; they must be 0 to {n_vocab - 1}"
        raise UserError("E500", text)
    return ids


def _room(ids: list[int], number: int, context: int) -> int:
    """How many more tokens fit into the model's context; at least one. UserError E500."""
    if len(ids) >= context:
        text = f"prompt {number} has {len(ids)} tokens, the model's max_seq_len is {context}: "
        raise UserError("E500", f"{text}no room for a new one; shorten it to {context - 1} at most")
    return context - len(ids)


# ---------------------------------------------------------------- a model from disk


def load(
    path, best=False, step=None, tokenizer=None, device="auto", precision="auto", say=print
) -> tuple:
    """(model ready to generate, tokenizer or None, step), of what lumen.models.open_model opens."""
    opened = open_model(path, best, step, tokenizer, device, precision, say)
    return opened.model, opened.tokenizer, opened.step


# ---------------------------------------------------------------- the command


class Parser(Words):
    def option(self, name: str, help: str, kind=str, default=None, **more) -> None:
        if name in RANGES:
            help = f"{help} ({RANGES[name][2]}; default {default})".strip()
        self.add_argument(f"--{name}", type=kind, default=default, help=help, **more)

    def texts(self, name: str, metavar: str, help: str) -> None:
        self.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=help)

    def flag(self, name: str, help: str) -> None:
        self.add_argument(f"--{name}", action="store_true", help=help)


def arguments() -> Parser:
    p = Parser(prog="sample.py", description="Generate text from a trained model.")
    places = "a run, a step of it, a Hugging Face or quantised folder"
    p.add_argument("run", type=a_path, help=places)
    p.texts("prompt", "TEXT", "repeatable; - reads it from stdin")
    p.texts("prompt_file", "F", "a prompt per file; one final newline is dropped")
    p.texts("ids", "'1 2 3'", "a prompt as token ids: ids in, ids out")
    most = f"({RANGES['max_new_tokens'][2]}; default 200)"
    p.add_argument("--max_new_tokens", "--max_tokens", type=int, default=200, help=most)
    p.option("temperature", "", float, 0.8)
    p.option("top_k", "keep the k most likely tokens", int, 50)
    p.option("top_p", "keep the smallest set with this much probability", float, 1.0)
    p.option("min_p", "keep what has this share of the largest probability", float, 0.0)
    p.option("repetition_penalty", "", float, 1.0)
    p.option("presence_penalty", "", float, 0.0)
    p.option("frequency_penalty", "as often as an id was written", float, 0.0)
    p.option("seed", "sample i draws with seed + i", int, 1)
    p.option("num_samples", "of each prompt", int, 1)
    p.texts("stop", "TEXT", "ends a sequence; repeatable; --stop=TEXT if it has a -")
    p.flag("ignore_eot", "go on after <|endoftext|>")
    p.flag("chat", "prompts are questions; without any, a conversation: a line a turn, /help")
    p.option("template", f"of --chat: {', '.join(chat.FORMATS)}; default: the run's")
    p.option("system", "what --chat begins with", metavar="TEXT")
    p.option("tokenizer", "default: the run's tokenizer.json", metavar="FILE")
    p.flag("best", "the checkpoint with the lowest validation loss, not the newest")
    p.option("step", "the checkpoint of step N", int, metavar="N")
    p.option("device", "auto, cpu, cuda, mps", default="auto")
    p.option("precision", "auto, fp32, bf16, fp16", default="auto")
    halves = "keys and values as the model computes them, or in int8: half the memory of bf16"
    p.option("kv", halves, choices=kv_int8.CACHES, default="full")
    return p


def parse(argv: list[str], say=print) -> argparse.Namespace:
    return option_names.parse(arguments(), argv, say)


def main(argv: list[str]) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    args = parse(argv, say)
    check(args.stop, **{name: getattr(args, name) for name in RANGES})
    asked = args.prompt or args.prompt_file or args.ids
    talking = args.chat and not asked
    prompts = [] if talking else read_prompts(args)
    opened = open_model(
        args.run, args.best, args.step, args.tokenizer, args.device, args.precision, say
    )
    model, tokenizer = opened.model, opened.tokenizer
    kv_int8.use(model, args.kv)
    dtype = str(model.compute_dtype).removeprefix("torch.")
    say(f"{args.run}: {opened}, {model.embed.weight.device}, {dtype}")
    sys.stdout.reconfigure(errors="replace")
    options = {name: getattr(args, name) for name in (*RANGES, "stop", "ignore_eot")}
    printer = Printer
    if prompts == [""]:
        say("no --prompt: a new text is begun")
    if args.chat:
        printer = ReplyPrinter
        options["template"] = choose_template(opened, args.template, say)
    if talking:
        talk(model, tokenizer, options, args.system, say, piped_lines())
        return 0
    heads = heads_of(prompts, args.num_samples)
    stats = {}
    sample(model, tokenizer, prompts, **options, on_text=printer(heads), stats=stats)

    cut = stats["reasons"].count("context")
    if cut:
        most = f"the model's max_seq_len, {model.cfg.max_seq_len} tokens"
        say(f"note: {cut} of {len(heads)} sequences stopped at {most}")
    say_speed(say, "prefill", stats["prefill_tokens"], stats["prefill_seconds"])
    say_speed(say, "decode", stats["decode_tokens"], stats["decode_seconds"])
    return 0


def talk(model: Transformer, tokenizer, options: dict, system: str | None, say, lines=None) -> None:
    """A conversation in the terminal, or with `lines`; one reply at a time."""
    # one engine for all of it: what it has read of the conversation it need not read again
    options = options | {"num_samples": 1, "engine": Engine(model, 1, n_vocab=tokenizer.n_vocab)}

    def answer(messages: list, temperature: float, on_text) -> str:
        stats = {}
        now = options | {"temperature": temperature, "on_text": on_text, "stats": stats}
        sample(model, tokenizer, [messages], **now)
        return stats["reasons"][0]

    def count(messages: list) -> int:
        return len(chat.render(messages, options["template"], tokenizer, open_reply=True)[0])

    most_new = options["max_new_tokens"]
    made = Talk(answer, count, model.cfg.max_seq_len, most_new, say, options["temperature"])
    made.set_system(system or "")
    if lines is None:
        made.run(input)
    else:
        made.hear(lines)


def say_speed(say, what: str, tokens: int, seconds: float) -> None:
    speed = tokens / max(seconds, 1e-9)
    say(f"{what} {tokens} tokens in {seconds:.2f} s: {speed:,.1f} tokens/s")


if __name__ == "__main__":
    command(main)
