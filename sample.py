"""Generate from a trained run: `python sample.py out/run --prompt "def " --max_new_tokens 200 --temperature 0.8`.

Several prompts (--prompt is repeatable) times --num_samples form one ragged batch that shares every forward pass. Each
sequence draws from a generator of its own (sample i of any prompt: seed + i), so in fp32 its text does not depend on
what else is in the batch. A notebook needs two lines: `model, tokenizer, step = load("out/run")`, then `sample(...)`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import sys
import time
from pathlib import Path

import torch

from lumen import checkpoint
from lumen import tokenizer as tok
from lumen.errors import UserError, a_path, expand
from lumen.launch import Words, command
from lumen.machine import detect
from model import ModelConfig, Transformer

RANGES = {  # option: (lowest, highest, in words)
    "max_new_tokens": (1, 2**31, "at least 1"),
    "temperature": (0, 100, "between 0 (the most likely token) and 100"),
    "top_k": (0, 2**31, "0 (off) or more"),
    "top_p": (1e-6, 1, "above 0, at most 1 (off)"),
    "min_p": (0, 1, "between 0 (off) and 1"),
    "repetition_penalty": (0.01, 100, "between 0.01 and 100; 1 is off, above 1 discourages"),
    "seed": (0, 2**62, "0 or more, below 2^62"),
    "num_samples": (1, 65536, "between 1 and 65536"),
}

# ---------------------------------------------------------------- ids to text, piece by piece


class Stream:
    """One sequence on its way to text. `reason` says why it ended: eot, stop, length (max_new_tokens) or context."""

    def __init__(
        self,
        tokenizer,
        ids: list[int],
        stop: tuple[str, ...],
        eot: int | None,
        limit: int,
        room: int,
    ):
        self.tokenizer, self.stop, self.eot, self.limit, self.room = (
            tokenizer,
            stop,
            eot,
            limit,
            room,
        )
        self.utf8 = codecs.getincrementaldecoder("utf-8")(
            "replace"
        )  # keeps the bytes of an unfinished character
        self.ids, self.n_new, self.held, self.text, self.reason = ids, 0, "", "", None

    def add(self, token: int) -> str:
        """Take one more id; returns the text that is certain by now and sets `reason` if this was the last one."""
        self.n_new += 1
        if token == self.eot:
            self.reason = "eot"
        else:
            self.held += (
                self.utf8.decode(self.tokenizer.decode_bytes([token]))
                if self.tokenizer
                else f" {token}"
            )
            ends = [(at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0]
            if ends:  # the one completed first, however the text was cut into tokens
                self.held, self.reason = self.held[: min(ends)[1]], "stop"
            elif self.n_new == min(self.limit, self.room):
                self.reason = "length" if self.limit <= self.room else "context"
        keep = 0 if self.reason else max((_overlap(self.held, s) for s in self.stop), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if self.reason in ("eot", "length", "context"):
            piece += self.utf8.decode(b"", final=True)
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that could begin stop."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


# ---------------------------------------------------------------- generation


def check(stop=(), **numbers) -> None:
    """UserError E500 for an option out of range."""
    for name, value in numbers.items():
        low, high, words = RANGES[name]
        if not low <= value <= high:
            raise UserError("E500", f"{name}: {value} is out of range; it must be {words}")
    if not all(stop):
        raise UserError("E500", "stop: an empty string would stop everything; leave it out")


def sample(
    model: Transformer,
    tokenizer,  # tokenizer.Tokenizer, or None when all prompts are ids
    prompts: list,  # each a text, or a list of ids: then its continuation is ids too, written "17 4 99"
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    num_samples: int = 1,
    stop: tuple[str, ...] = (),  # a sequence ends before the first of these
    ignore_eot: bool = False,  # False: it ends at the tokenizer's <|endoftext|>
    on_text=None,  # called as on_text(sequence, piece of text, None or why it ended)
    stats: dict
    | None = None,  # filled in: prompt_tokens, prefill_seconds, new_tokens, decode_seconds, reasons
) -> list[str]:
    """The continuations without their prompts: num_samples for the first prompt, then for the next ...

    An empty prompt starts from <|endoftext|>. A sequence ends at model.cfg.max_seq_len tokens at the latest (reason
    "context"). UserError E500: an option or a prompt that cannot work, E501: text without a tokenizer.
    """
    choice = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    check(stop=stop, max_new_tokens=max_new_tokens, seed=seed, num_samples=num_samples, **choice)
    n_vocab = tokenizer.n_vocab if tokenizer else model.cfg.vocab_size
    if n_vocab > model.cfg.vocab_size:
        raise UserError(
            "E113",
            f"the tokenizer has {n_vocab} ids, the model's vocab_size is {model.cfg.vocab_size}",
        )
    eot = None if ignore_eot or tokenizer is None else tokenizer.eot_id

    streams = []
    for number, prompt in enumerate(prompts, 1):
        ids, room = _encode(prompt, number, tokenizer, n_vocab, model.cfg.max_seq_len)
        reader = tokenizer if isinstance(prompt, str) else None
        streams += [
            Stream(reader, ids, tuple(stop), eot, max_new_tokens, room) for _ in range(num_samples)
        ]
    if not streams:
        return []
    seeds = [seed + i for _ in prompts for i in range(num_samples)]
    longest = max(min(s.limit, s.room) for s in streams)
    steps = model.generate(
        [s.ids for s in streams], longest, seeds, () if eot is None else (eot,), n_vocab, **choice
    )
    start, first = time.perf_counter(), None
    try:
        with (
            contextlib.closing(steps),
            torch.inference_mode(),
        ):  # a tenth faster than no_grad on a CPU
            for tokens in steps:
                first = first or time.perf_counter()
                for i, (stream, token) in enumerate(zip(streams, tokens)):
                    if stream.reason is None:
                        piece = stream.add(token)
                        if on_text and (piece or stream.reason):
                            on_text(i, piece, stream.reason)
                if all(s.reason for s in streams):
                    break
    except FloatingPointError as error:
        raise UserError(
            "E500", f"{error}: the run has diverged, or --precision fp32 helps"
        ) from error
    if stats is not None:
        stats.update(
            prompt_tokens=sum(len(s.ids) for s in streams), new_tokens=sum(s.n_new for s in streams)
        )
        stats.update(prefill_seconds=first - start, decode_seconds=time.perf_counter() - first)
        stats.update(reasons=[s.reason for s in streams])
    return [s.text if s.tokenizer else s.text.strip() for s in streams]


def _encode(prompt, number: int, tokenizer, n_vocab: int, context: int) -> tuple[list[int], int]:
    """The ids of a prompt and how many more fit. UserError as in `sample`."""
    if tokenizer is None and (isinstance(prompt, str) or not prompt):
        raise UserError(
            "E501", f"prompt {number} is text or empty, and this run has no tokenizer.json"
        )
    ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else [int(i) for i in prompt]
    ids = ids or [tokenizer.eot_id]
    if not 0 <= min(ids) <= max(ids) < n_vocab:
        raise UserError(
            "E500",
            f"prompt {number} has ids {min(ids)} to {max(ids)}; they must be 0 to {n_vocab - 1}",
        )
    if len(ids) >= context:
        text = f"prompt {number} has {len(ids)} tokens, the model's max_seq_len is {context}: no room for a new one"
        raise UserError("E500", f"{text}; shorten it to {context - 1} at most")
    return ids, context - len(ids)


# ---------------------------------------------------------------- a run from disk


def load(
    path,
    best=False,
    step: int | None = None,
    tokenizer=None,
    device="auto",
    precision="auto",
    say=print,
):
    """A run's (model ready to generate, tokenizer or None, step). UserError E305, and checkpoint.find's and others'."""
    if best and step is not None:
        raise UserError("E500", "--best and --step name two checkpoints; give one of them")
    path = expand(str(path))
    found = checkpoint.find(path if step is None else checkpoint.step_dir(path, step), best, say)
    spec = (
        expand(tokenizer)
        if tokenizer
        else tok.of_run(found.path.parent, found.state.get("tokenizer"))
    )
    here = detect(device, precision, False)
    try:
        with torch.device("meta"):  # no memory, no initialisation
            model = Transformer(ModelConfig(**found.state["config"]["model"]))
        model.load_state_dict(found.model_state(), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("E305", f"{found.path}: {error}") from error
    model.set_step(found.step)  # where MoD's capacity was
    # a layer would cast its weight in every forward pass; here nobody needs the fp32 ones, so it is done once; but
    # routers choose in fp32
    for name, p in model.named_parameters():
        routes = ".router." in name or ".predictor." in name
        p.data = p.data.to(here.device, torch.float32 if routes else here.compute_dtype)
    model = model.to(here.device).eval().requires_grad_(False)
    model.compute_dtype = here.compute_dtype
    return model, tok.load(str(spec)) if spec else None, found.step


# ---------------------------------------------------------------- the command


class Printer:
    """on_text for a terminal: sequences appear in order; the first unfinished one is live, later ones wait."""

    def __init__(self, heads: list[str]):
        self.waiting, self.ended, self.now = heads, set(), 0

    def __call__(self, i: int, piece: str, reason: str | None) -> None:
        self.waiting[i] += piece + ("\n" if reason else "")
        self.ended |= {i} if reason else set()
        while self.now < len(self.waiting):
            sys.stdout.write(self.waiting[self.now])
            self.waiting[self.now] = ""
            if self.now not in self.ended:
                break
            self.now += 1
        sys.stdout.flush()


class Parser(Words):
    def add(self, name: str, *others: str, **kwargs) -> None:
        if name in RANGES:
            kwargs["help"] = (
                f"{kwargs.get('help', '')} ({RANGES[name][2]}; default {kwargs['default']})".strip()
            )
        self.add_argument(f"--{name}", *others, **kwargs)


def parse(argv: list[str]) -> argparse.Namespace:
    p = Parser(prog="sample.py", description="Generate text from a trained run.")
    p.add_argument("run", type=a_path, help="a run's out_dir, or one of its step_* folders")
    p.add(
        "prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="repeatable; - reads it from stdin",
    )
    p.add(
        "prompt_file",
        action="append",
        default=[],
        metavar="F",
        help="a prompt per file; one final newline is dropped",
    )
    p.add(
        "ids",
        action="append",
        default=[],
        metavar="'1 2 3'",
        help="a prompt as token ids: ids in, ids out",
    )
    p.add("max_new_tokens", "--max_tokens", type=int, default=200)
    p.add("temperature", type=float, default=0.8)
    p.add("top_k", type=int, default=50, help="keep the k most likely tokens")
    p.add("top_p", type=float, default=1.0, help="keep the smallest set with this much probability")
    p.add(
        "min_p", type=float, default=0.0, help="keep what has this share of the largest probability"
    )
    p.add("repetition_penalty", type=float, default=1.0)
    p.add("seed", type=int, default=1, help="sample i draws with seed + i")
    p.add("num_samples", type=int, default=1, help="of each prompt")
    p.add(
        "stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a sequence; repeatable; --stop=TEXT if it has a -",
    )
    p.add("ignore_eot", action="store_true", help="go on after <|endoftext|>")
    p.add("tokenizer", metavar="FILE", help="default: the run's tokenizer.json")
    p.add(
        "best",
        action="store_true",
        help="the checkpoint with the lowest validation loss, not the newest",
    )
    p.add("step", type=int, metavar="N", help="the checkpoint of step N")
    p.add("device", default="auto", help="auto, cpu, cuda, mps")
    p.add("precision", default="auto", help="auto, fp32, bf16, fp16")
    return p.parse_args(argv)


def read_prompts(args) -> list:
    """Texts and lists of ids from the options; from stdin where asked, or where something is piped and nothing said."""
    if not (args.prompt or args.prompt_file or args.ids):
        args.prompt = ["-"] if sys.stdin and not sys.stdin.isatty() else [""]
    prompts = []
    for prompt in args.prompt:
        prompts.append(_text(sys.stdin.buffer.read(), "stdin") if prompt == "-" else prompt)
    for file in args.prompt_file:
        try:
            prompts.append(_text(Path(expand(file)).read_bytes(), file))
        except OSError as error:
            raise UserError("E500", f"--prompt_file {file}: {error.strerror}") from error
    for ids in args.ids:
        try:
            prompts.append([int(i) for i in ids.replace(",", " ").split()])
        except ValueError as error:
            raise UserError(
                "E500", f"--ids {ids!r}: token ids are whole numbers, as in --ids '1 2 3'"
            ) from error
    return prompts


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError("E500", f"the prompt from {source} is not UTF-8: {error}") from error


def main(argv: list[str]) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    args = parse(argv)
    check(args.stop, **{name: getattr(args, name) for name in RANGES})
    prompts = read_prompts(args)
    model, tokenizer, step = load(
        args.run, args.best, args.step, args.tokenizer, args.device, args.precision, say
    )
    dtype = str(model.compute_dtype).removeprefix("torch.")
    say(
        f"{args.run}: step {step}, {model.n_params()['total']:,} parameters, {model.embed.weight.device}, {dtype}"
    )
    texts = [
        prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in prompts
    ]
    heads = [
        f"--- prompt {n}, sample {i + 1} ---\n{t}"
        for n, t in enumerate(texts, 1)
        for i in range(args.num_samples)
    ]
    heads = texts if len(heads) == 1 else heads
    sys.stdout.reconfigure(errors="replace")
    options = {name: getattr(args, name) for name in (*RANGES, "stop", "ignore_eot")}
    sample(model, tokenizer, prompts, **options, on_text=Printer(heads), stats=(stats := {}))

    cut = sum(reason == "context" for reason in stats["reasons"])
    if cut:
        say(
            f"note: {cut} of {len(heads)} sequences stopped at the model's max_seq_len, {model.cfg.max_seq_len} tokens"
        )
    for name, n in (
        ("prefill", stats["prompt_tokens"]),
        ("decode", stats["new_tokens"] - len(heads)),
    ):
        seconds = stats[f"{name}_seconds"]
        say(f"{name} {n} tokens in {seconds:.2f} s: {n / max(seconds, 1e-9):,.1f} tokens/s")
    return 0


if __name__ == "__main__":
    command(main)
