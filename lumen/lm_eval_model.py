"""A Lumen model as lm-eval knows models: `lumen` in its registry. Imports lm-eval, which is
optional, so whoever wants this goes by lumen/harness.py.

The requests that share a document and a context are asked together, as the choices of one question;
a request's numbers depend on those alone: not on a batch size, the order, the limit, other tasks.
Text never becomes a control token: those of a chat template go through lm-eval's strings behind a
character that is taken out of everything else.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
from tqdm import tqdm

from lumen import chat, models
from lumen.chat import Message
from lumen.errors import UserError
from lumen.files import read_json
from lumen.questions import Asked
from lumen.sampling import Sampling, check
from lumen.scorer import Scorer
from lumen.stream import Stream, decode
from lumen.texts import predict

MARK = "\U000f57a1"  # of a private plane: stands before the name of a control token
MOST_NEW = 256  # tokens, where a task says nothing: lm-eval's number
AT_ONCE = 8  # prompts in fp32, where a text does not depend on its neighbours
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # said by tasks, and what we do anyway
CHOSEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

say = logging.getLogger(__name__).warning


class Generation(NamedTuple):
    """What a task's gen_kwargs ask."""

    limit: int  # new tokens
    stop: tuple[str, ...]
    seed: int
    choice: dict  # of lumen.sampling.Sampling


class Reply(Stream):
    """A stream that leaves control tokens out, as lm-eval has them left out."""

    def text_of(self, token: int) -> str:
        if token in self.tokenizer.controls.values():
            return ""
        return super().text_of(token)


@register_model("lumen")
class LumenLM(TemplateLM):
    """What lm-eval asks of a model: log-probabilities, those of whole texts, and replies.

    prefix: the id before a text without context; None: end-of-text. (Of an imported folder lm-eval
    takes its bos_token.)
    """

    def __init__(self, asked: Asked, prefix: int | None = None):
        super().__init__()
        self.asked = asked
        self.model, self.words, self.scorer = asked.model, asked.tokenizer, asked.scorer
        self.prefix = self.words.eot_id if prefix is None else prefix
        self.chatting = False  # whether strings may hold control tokens

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None):
        """lm-eval's --model_args: path=RUN, and open_model's best, step, tokenizer, precision;
        template=NAME for a base model. Its --device counts, its --batch_size does not."""
        words = dict(arg_dict)
        device = (additional_config or {}).get("device")
        if device in (None, "cuda:0"):  # which lm-eval says where nobody has said anything
            device = "auto"
        words.setdefault("device", device)
        template = words.pop("template", None)
        if "path" not in words:
            raise UserError("E002", "--model_args: path=RUN: which model is to be asked?")
        try:
            opened = models.open_model(**words)
        except TypeError as error:
            raise UserError("E002", f"--model_args: {error}") from error
        return cls(asked_of(opened, template), prefix_of(opened))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self.words.eot_id

    @property
    def prefix_token_id(self) -> int:
        return self.prefix

    @property
    def max_length(self) -> int:
        return self.model.cfg.max_seq_len

    @cached_property
    def marked(self) -> re.Pattern:
        names = sorted(self.words.controls, key=len, reverse=True)
        return re.compile(f"{MARK}({'|'.join(map(re.escape, names))})")

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Ids; control tokens only where apply_chat_template has put them."""
        if not self.chatting or add_special_tokens is False:
            return self.words.encode(string).tolist()
        ids = []
        for i, part in enumerate(self.marked.split(string)):
            if i % 2:
                ids.append(self.words.control(part))
            else:
                ids += self.words.encode(part).tolist()
        return ids

    def tok_decode(self, tokens, skip_special_tokens=True) -> str:
        controls = self.words.controls.values() if skip_special_tokens else ()
        return self.words.decode([i for i in tokens if i not in controls])

    # ---- likelihoods

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        """(nats, whether each token is the most likely) of each (context, continuation)."""
        found = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        for _, group in groupby(requests, lambda r: (r.task_name, r.doc_id, r.args[0])):
            group = list(group)
            answers = super().loglikelihood(group, disable_tqdm=True)
            for request, answer in zip(group, answers):
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
            found += answers
            progress.update(len(group))
        progress.close()
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """By lm-eval's rule; of a context of nothing but blanks it leaves no id."""
        ids, after = super()._encode_pair(context, plain(continuation))
        return ids or [self.prefix], after

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """Of one question's (texts, ids of the context, ids of the continuation)."""
        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                text = (
                    f"lm-eval: a continuation of {len(continuation)} tokens, {str(texts)[-80:]!r}"
                )
                raise UserError("E127", f"{text}: from 1 to max_seq_len, {self.max_length}, can be")
        pairs = [(context + continuation, len(context)) for _, context, continuation in requests]
        return [(one.logprob, one.greedy) for one in self.scorer.ids(pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Nats of whole texts, in windows of the model's context that predict each token once."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix, self.max_length, context_len=1)
            total = -predict(self.asked, map(row_of, windows)).nats
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    # ---- replies

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Texts up to a stop string, the end of a reply or of a text, or the limit. What is drawn
        depends on the seed and on how often this context was asked before; in bf16 one prompt is
        asked at a time."""
        at_once = AT_ONCE if self.model.compute_dtype == torch.float32 else 1
        found, times = [], Counter()
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for given, group in groupby(requests, lambda r: r.args[1]):
            group = list(group)
            how = self.generation(given, group[0].task_name)
            for first in range(0, len(group), at_once):
                some = group[first : first + at_once]
                seeds = []
                for request in some:
                    key = (request.task_name, request.doc_id, request.args[0])
                    seeds.append(how.seed + times[key])
                    times[key] += 1
                texts = self.replies([request.args[0] for request in some], seeds, how)
                for request, text in zip(some, texts):
                    self.cache_hook.add_partial("generate_until", request.args, text)
                found += texts
                progress.update(len(some))
        progress.close()
        return found

    def generation(self, given: dict, task) -> Generation:
        """gen_kwargs, read. E127: one that we have not; E500: one out of range."""
        asked = dict(normalize_gen_kwargs(given, min(MOST_NEW, self.max_length // 2)))
        limit, stop = asked.pop("max_gen_toks"), asked.pop("until")
        drawn, seed = asked.pop("do_sample"), asked.pop("seed", 0)
        choice = {}
        for name in CHOSEN:
            if (value := asked.pop(name, None)) is not None:
                choice[name] = value
        if not drawn:
            choice["temperature"] = 0.0
        left = {key: value for key, value in asked.items() if NEUTRAL.get(key) != value}
        if left:
            raise UserError("E127", f"lm-eval, task {task}: gen_kwargs {left}: Lumen has no such")
        if limit >= self.max_length:
            text = f"lm-eval, task {task}: {limit} new tokens do not fit into max_seq_len"
            raise UserError("E127", f"{text} {self.max_length}: give gen_kwargs max_gen_toks=N")
        check(max_new_tokens=limit, seed=seed, **choice)
        return Generation(limit, tuple(text for text in stop if text), seed, choice)

    def replies(self, contexts: list[str], seeds: list[int], how: Generation) -> list[str]:
        room = self.max_length - how.limit
        prompts = [self.tok_encode(text)[-room:] or [self.prefix] for text in contexts]
        ends = (self.words.eot_id,)
        if self.asked.template:
            ends = tuple(chat.stop_ids(self.asked.template, self.words))
        streams = []
        for ids in prompts:
            streams.append(Reply(self.words, ids, how.stop, ends, how.limit, how.limit))
        choose = Sampling(prompts, self.model.cfg.vocab_size, **how.choice)
        n_vocab = self.asked.n_vocab or self.words.n_vocab
        steps = self.model.generate(prompts, how.limit, seeds, ends, n_vocab, choose=choose)
        try:
            with torch.no_grad():
                decode(steps, streams)
        except FloatingPointError as error:
            raise UserError("E500", f"{error}: the run has diverged") from error
        return [stream.text for stream in streams]

    # ---- conversations

    def template(self):
        """E127: the model knows no conversations."""
        if self.asked.template is None:
            text = "lm-eval: apply_chat_template: this model was not taught conversations"
            raise UserError("E127", f"{text}: leave it out, or name a template (template=chatml)")
        return chat.find_template(self.asked.template)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
        """The conversation as text, which tok_encode makes the ids of lumen.chat.render of. Without
        add_generation_prompt the last message is a reply that was begun."""
        template = self.template()
        messages = [Message(m["role"], plain(m["content"])) for m in chat_history]
        pieces = list(chat.segments(messages, template, open_reply=add_generation_prompt))
        if not add_generation_prompt:
            after = len(chat.compiled(template)[messages[-1].role].after)
            pieces = pieces[: len(pieces) - after]
        self.chatting = True
        return "".join(self.written(piece) for piece in pieces)

    def written(self, piece: chat.Segment) -> str:
        if not piece.control:
            return piece.text
        if piece.control != "end":
            return f"{MARK}{piece.control}"
        return MARK + self.words.decode([self.words.eot_id])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """As Jinja, for lm-eval's records."""
        return chat.jinja(self.template()) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        template = self.asked.template and chat.find_template(self.asked.template).name
        return f"lumen-{self.words.name}-{template}".replace("/", "__")


def row_of(window: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """lm-eval's (inputs, what the last of them predict) as inputs and targets (n,); -1: none."""
    inputs, predicted = (np.array(ids, np.int64) for ids in window)
    targets = np.full(len(inputs), -1)
    targets[len(inputs) - len(predicted) :] = predicted
    return inputs, targets


def plain(text: str) -> str:
    """Without the character that would make a control token of what follows."""
    return text.replace(MARK, "\ufffd")


def prefix_of(opened) -> int | None:
    """The bos_token of a Hugging Face folder, or of that which a run was imported from: lm-eval's
    hf model begins texts with it. None: there is none."""
    if opened.kind == "huggingface":
        name = read_json(opened.folder / "tokenizer_config.json").get("bos_token")
        name = name.get("content") if isinstance(name, dict) else name
        return opened.tokenizer.control(name)
    return (opened.state.get("imported") or {}).get("bos_token_id")


def asked_of(opened, template=None) -> Asked:
    """E501: a model without a tokenizer."""
    model, words = opened.model, opened.tokenizer
    if words is None:
        raise UserError("E501", f"{opened.name}: lm-eval's tasks are texts")
    template = chat.find_template(template) if template else opened.template
    if template:
        chat.check_tokenizer(template, words)
    return Asked(model, words, template, words.n_vocab, Scorer(model, words, words.n_vocab))
