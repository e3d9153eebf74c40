"""What a request asks for, in OpenAI's names, becomes rows of the engine.

Fields that nobody here knows are ignored and named in the log, as vLLM does, for clients send many.
Fields that are known and would change the answer, but are not built, are refused: silence would be
a lie. Without options a request is `python sample.py` without options.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

from lumen import chat
from lumen.chat import Message, Template
from lumen.conversations import ROLES
from lumen.engine import Row
from lumen.errors import UserError
from lumen.models import Opened
from lumen.prompts import system_turn
from lumen.refused import Refused
from lumen.sampling import RANGES, Choice
from lumen.stream import Stream

CHOICE = {  # sample.py's; Lumi's differ
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
LUMI = CHOICE | {"top_p": 0.9, "repetition_penalty": 1.1}
MAX_NEW = {"chat": None, "text": 200, "generate": 96}  # None: as many as the context has room for
WHOLE = {"top_k", "seed", "max_new_tokens"}
MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_BIASES = 1024
SIGNIFICANT = 2**31  # a seed that we draw is below: every client's numbers hold it

# A field that would change the answer, and is not built: the values that ask for nothing.
NOTHING = (None, False, "", [], {})
NOT_BUILT = {
    "tools": (NOTHING, "Lumen's templates have no tools"),
    "tool_choice": ((*NOTHING, "none", "auto"), "Lumen's templates have no tools"),
    "functions": (NOTHING, "Lumen's templates have no tools"),
    "function_call": ((*NOTHING, "none", "auto"), "Lumen's templates have no tools"),
    "response_format": ((*NOTHING, {"type": "text"}), "no grammar is enforced; ask in words"),
    "structured_outputs": (NOTHING, "no grammar is enforced; ask in words"),
    "guided_json": (NOTHING, "no grammar is enforced; ask in words"),
    "guided_regex": (NOTHING, "no grammar is enforced; ask in words"),
    "guided_choice": (NOTHING, "no grammar is enforced; ask in words"),
    "guided_grammar": (NOTHING, "no grammar is enforced; ask in words"),
    "grammar": (NOTHING, "no grammar is enforced; ask in words"),
    "json_schema": (NOTHING, "no grammar is enforced; ask in words"),
    "best_of": ((*NOTHING, 1), "take n and choose among them"),
    "suffix": (NOTHING, "the model only continues; it does not fill in"),
    "modalities": ((*NOTHING, ["text"]), "the model writes text only"),
    "audio": (NOTHING, "the model writes text only"),
    "prediction": (NOTHING, "there is no speculative decoding"),
    "web_search_options": (NOTHING, "the server reaches nothing"),
    "use_beam_search": (NOTHING, "sequences are drawn, not searched"),
    "min_tokens": ((*NOTHING, 0), "take ignore_eos, or logit_bias"),
    "stop_token_ids": (NOTHING, "take stop, with texts"),
    "bad_words": (NOTHING, "take logit_bias"),
    "prompt_logprobs": (NOTHING, "python evaluate.py scores texts"),
    "continue_final_message": (NOTHING, "every reply is a new message"),
    "add_generation_prompt": ((*NOTHING, True), "every reply is a new message"),
    "chat_template": (NOTHING, "the run's template is used; --template of the server changes it"),
    "documents": (NOTHING, "put them into a message"),
}
# These say nothing about the answer; nobody need be warned.
SILENT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
SILENT |= {"parallel_tool_calls", "model"}


@dataclass
class Served:
    """What the server has to say: the model, and how it is spoken to."""

    opened: Opened
    name: str
    context: int  # tokens of a prompt and its reply
    template: Template | None  # None: it has no tokenizer that a template could be written with
    system: str = ""  # what a conversation without a system turn begins with

    def __post_init__(self):
        model, tokenizer = self.opened.model, self.opened.tokenizer
        self.tokenizer = tokenizer
        self.n_vocab = tokenizer.n_vocab if tokenizer else model.cfg.vocab_size
        if self.n_vocab > model.cfg.vocab_size:
            text = f"the tokenizer has {self.n_vocab} ids, the model's vocab_size is"
            raise UserError("E113", f"{text} {model.cfg.vocab_size}")
        # no text of more bytes fits into the context, whatever its tokens are
        self.most_bytes = self.context * longest_token(tokenizer)


def longest_token(tokenizer) -> int:
    """Bytes of text that one token stands for at most. A vocabulary that cleans its text (white
    space, case) may write more of it than it reads: then there is no bound worth having."""
    if tokenizer is None or tokenizer.caveats():
        return 2**31
    return int(tokenizer.token_bytes().max())


@dataclass
class Asked:
    """One request, read."""

    kind: str  # chat | text | generate
    prompts: list  # conversations, texts or lists of ids
    template: Template | None = None
    n: int = 1  # sequences of each prompt
    choice: Choice = field(default_factory=Choice)
    seed: int = 0  # of the first sequence; i-th: seed + i
    max_new: int | None = None
    stop: tuple[str, ...] = ()
    n_logprobs: int = -1
    ignore_eot: bool = False
    echo: bool = False
    stream: bool = False
    usage_in_stream: bool = False
    unknown: tuple[str, ...] = ()  # fields that were ignored

    @property
    def n_rows(self) -> int:
        return len(self.prompts) * self.n


# ---------------------------------------------------------------- fields


def wrong(name: str, text: str, **more) -> Refused:
    return Refused("E505", f"{name}: {text}", param=name, **more)


KINDS = {  # what a field must be: (Python's types, in words)
    "text": (str, "a text"),
    "whole": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "flag": (bool, "true or false"),
    "list": (list, "a list"),
    "object": (dict, "an object"),
}


class Fields:
    """The JSON object of a request, field by field; null is as if it were not there."""

    def __init__(self, body: dict):
        self.body = body
        self.known = set(SILENT)

    def get(self, name: str, kind: str, default=None):
        value = self.raw(name)
        return default if value is None else as_kind(value, kind, name)

    def raw(self, name: str):
        self.known.add(name)
        return self.body.get(name)

    def ranged(self, name: str, default, limits: str | None = None):
        """A number of sampling.RANGES, there under the name of `limits`. E500: out of range."""
        low, high, words = RANGES[limits or name]
        kind = "whole" if (limits or name) in WHOLE else "number"
        value = self.get(name, kind, default)
        if value is not None and not low <= value <= high:
            text = f"{name}: {shown(value)} is out of range; it must be {words}"
            raise Refused("E500", text, param=name)
        return value

    def refuse_not_built(self) -> None:
        for name, (nothing, why) in NOT_BUILT.items():
            value = self.raw(name)
            if not any(value == other and type(value) is type(other) for other in nothing):
                raise wrong(name, f"this server does not have it: {why}")

    def unknown(self) -> tuple[str, ...]:
        return tuple(name for name in self.body if name not in self.known)


def as_kind(value, kind: str, name: str):
    types, words = KINDS[kind]
    is_flag = isinstance(value, bool)
    if not isinstance(value, types) or (is_flag and kind != "flag"):
        raise wrong(name, f"it must be {words}, not {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(name, f"it must be a finite number, not {value}")
    return value


def shown(value) -> str:
    """A client's value in a message to it: short."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---------------------------------------------------------------- requests


def read_chat(body: dict, served: Served) -> Asked:
    """POST /v1/chat/completions."""
    fields = Fields(body)
    asked = begun("chat", fields, served, CHOICE)
    if served.template is None:
        raise Refused("E501", NO_TEMPLATE)
    asked.prompts = [conversation(fields.raw("messages"), served)]
    asked.template = served.template
    limit = "max_completion_tokens"
    if fields.raw(limit) is None:
        limit = "max_tokens"
    fields.known |= {"max_completion_tokens", "max_tokens"}
    asked.max_new = fields.ranged(limit, MAX_NEW["chat"], "max_new_tokens")
    top = fields.get("top_logprobs", "whole")
    if fields.get("logprobs", "flag", False):
        asked.n_logprobs = n_logprobs("top_logprobs", top or 0)
    elif top is not None:
        raise wrong("top_logprobs", 'it needs "logprobs": true')
    return ended(asked, fields)


def read_text(body: dict, served: Served) -> Asked:
    """POST /v1/completions."""
    fields = Fields(body)
    asked = begun("text", fields, served, CHOICE)
    asked.prompts = prompts(fields.raw("prompt"), served)
    limit = "max_tokens"
    if fields.raw(limit) is None:
        limit = "max_completion_tokens"
    asked.max_new = fields.ranged(limit, MAX_NEW["text"], "max_new_tokens")
    top = fields.get("logprobs", "whole")
    if top is not None:
        asked.n_logprobs = n_logprobs("logprobs", top)
    asked.echo = fields.get("echo", "flag", False)
    if asked.echo and asked.n_logprobs >= 0:
        text = "log-probabilities of the prompt are not built; python evaluate.py scores texts"
        raise wrong("echo", f"with logprobs: {text}")
    return ended(asked, fields)


def read_generate(body: dict, served: Served) -> Asked:
    """POST /generate, as Lumi has it: one question, one answer."""
    fields = Fields(body)
    asked = begun("generate", fields, served, LUMI)
    prompt = fields.get("prompt", "text")
    if prompt is None:
        raise wrong("prompt", "it is missing; it is the question, as text")
    if asked.stream:
        raise wrong("stream", "/generate answers at once; /v1/chat/completions streams")
    if asked.n != 1:
        raise wrong("n", "/generate gives one answer; /v1/chat/completions gives several")
    asked.template = template_of(fields.get("template", "text"), served)
    asked.prompts = [[*system_turn(served.system), Message("user", prompt)]]
    asked.max_new = fields.ranged("max_new_tokens", MAX_NEW["generate"])
    if not fields.get("do_sample", "flag", True):
        asked.choice = replace(asked.choice, temperature=0.0)
    return ended(asked, fields)


def begun(kind: str, fields: Fields, served: Served, defaults: dict) -> Asked:
    """What all routes share."""
    model = fields.get("model", "text")
    if model is not None and model != served.name:
        text = f"model: {shown(model)} is not served here; {served.name!r} is"
        raise Refused("E505", text, status=404, param="model", word="model_not_found")
    n = fields.get("n", "whole", 1)
    if n < 1:
        raise wrong("n", f"{shown(n)} sequences; at least 1")
    seed = fields.ranged("seed", None)
    return Asked(
        kind=kind,
        prompts=[],
        n=n,
        choice=choice(fields, served, defaults),
        seed=secrets.randbelow(SIGNIFICANT) if seed is None else seed,
        stop=stops(fields.raw("stop")),
        ignore_eot=fields.get("ignore_eos", "flag", False),
        stream=fields.get("stream", "flag", False),
    )


def ended(asked: Asked, fields: Fields) -> Asked:
    options = fields.get("stream_options", "object")
    if options is not None:
        if not asked.stream:
            raise wrong("stream_options", 'it needs "stream": true')
        asked.usage_in_stream = Fields(options).get("include_usage", "flag", False)
    if asked.kind != "chat" and fields.raw("best_of") == asked.n:
        fields.body = fields.body | {"best_of": None}  # the best n of n
    fields.refuse_not_built()
    asked.unknown = fields.unknown()
    return asked


def choice(fields: Fields, served: Served, defaults: dict) -> Choice:
    found = {}
    for name, default in defaults.items():
        if name == "top_k" and fields.raw(name) == -1:  # vLLM's word for "off"
            found[name] = 0
        else:
            found[name] = fields.ranged(name, default)
    return Choice(**found, bias=bias(fields.get("logit_bias", "object", {}), served.n_vocab))


def bias(given: dict, n_vocab: int) -> tuple[tuple[int, float], ...]:
    name = "logit_bias"
    if len(given) > MOST_BIASES:
        raise wrong(name, f"{len(given)} ids; {MOST_BIASES} at most")
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < n_vocab):
            raise wrong(name, f"{shown(key)} is no token id; they are 0 to {n_vocab - 1}")
        value = as_kind(value, "number", name)
        if not -100 <= value <= 100:
            raise wrong(name, f"{shown(value)} for id {int(key)}; it must be -100 to 100")
        found[int(key)] = float(value)
    return tuple(found.items())


def stops(given) -> tuple[str, ...]:
    if given is None:
        return ()
    given = [given] if isinstance(given, str) else as_kind(given, "list", "stop")
    if len(given) > MOST_STOPS:
        raise wrong("stop", f"{len(given)} texts; {MOST_STOPS} at most")
    for text in given:
        if not as_kind(text, "text", "stop"):
            raise Refused("E500", "stop: an empty text would stop everything", param="stop")
        if len(text) > LONGEST_STOP:
            raise wrong("stop", f"a text of {len(text)} characters; {LONGEST_STOP} at most")
    return tuple(given)


def n_logprobs(name: str, n: int) -> int:
    if not 0 <= n <= MOST_LOGPROBS:
        raise wrong(name, f"{shown(n)} alternatives; 0 to {MOST_LOGPROBS}")
    return n


# ---------------------------------------------------------------- prompts

NO_TEMPLATE = "this model has no tokenizer that conversations could be written with: POST token ids"
NO_TEMPLATE += " to /v1/completions, or start the server with --tokenizer FILE"


def template_of(name: str | None, served: Served) -> Template:
    if served.template is None:
        raise Refused("E501", NO_TEMPLATE)
    if name is None or name == served.template.name:
        return served.template
    try:
        template = chat.find_template(name)
        chat.check_tokenizer(template, served.tokenizer)
    except UserError as error:
        raise Refused(error.code, error.text, param="template") from None
    return template


def conversation(given, served: Served) -> list[Message]:
    if given is None:
        raise wrong("messages", 'they are missing: [{"role": "user", "content": "..."}]')
    if not as_kind(given, "list", "messages"):
        raise wrong("messages", "an empty list; it needs a message at least")
    found = [message(item, f"messages[{i}]", served) for i, item in enumerate(given)]
    if served.system and all(m.role != "system" for m in found):
        found = [*system_turn(served.system), *found]
    return found


def message(given, where: str, served: Served) -> Message:
    as_kind(given, "object", where)
    role = given.get("role")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in served.template.roles:
        has = ", ".join(served.template.roles)
        text = f"{where}: role {shown(role)}: template {served.template.name} has {has}"
        raise Refused("E105", text, param="messages")
    if any(given.get(name) for name in ("tool_calls", "function_call", "audio")):
        raise Refused("E505", f"{where}: Lumen's templates have no tools", param="messages")
    return Message(role, content(given.get("content"), where))


def content(given, where: str) -> str:
    """A text, or parts of text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        text = f"{where}: its content must be a text, or a list of parts of text"
        raise Refused("E505", text, param="messages")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            text = f'{where}: a part of its content is no {{"type": "text", "text": "..."}}'
            raise Refused("E505", f"{text}: the model reads text only", param="messages")
        texts.append(part["text"])
    return "\n".join(texts)


def prompts(given, served: Served) -> list:
    """A text, token ids, or several of either."""
    if given is None or given == []:
        raise wrong("prompt", "it is missing: a text, a list of texts, token ids or lists of them")
    if isinstance(given, str):
        return [given]
    as_kind(given, "list", "prompt")
    if all(isinstance(item, str) for item in given):
        return given
    if not isinstance(given[0], list):
        given = [given]
    return [token_ids(item, served.n_vocab) for item in given]


def token_ids(given, n_vocab: int) -> list[int]:
    if not isinstance(given, list) or not given:
        raise wrong("prompt", "it must be a text, token ids, or a list of either, not mixed")
    for i in given:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n_vocab:
            raise wrong("prompt", f"{shown(i)} is no token id; they are 0 to {n_vocab - 1}")
    return given


# ---------------------------------------------------------------- rows


def rows_of(asked: Asked, served: Served) -> list[Row]:
    """Takes its time for a long prompt: not in the event loop. E502: it does not fit, E501: there
    is no tokenizer for text."""
    tokenizer = served.tokenizer
    ends = () if asked.ignore_eot or tokenizer is None else (tokenizer.eot_id,)
    stop = asked.stop
    if asked.template and ends:
        ends = tuple(chat.stop_ids(asked.template, tokenizer))
        stop = (*stop, *chat.stop_texts(asked.template))
    rows = []
    for prompt in asked.prompts:
        ids, reader = encoded(prompt, asked, served)
        room = served.context - len(ids)
        if room < 1:
            raise too_long(f"{len(ids)} tokens", asked, served)
        limit = asked.max_new or room
        for i in range(asked.n):
            stream = Stream(reader, ids, stop, ends, limit, room)
            rows.append(Row(stream, asked.choice, asked.seed + i, asked.n_logprobs))
    return rows


def encoded(prompt, asked: Asked, served: Served) -> tuple[list[int], object]:
    """(ids, the tokenizer that the reply becomes text with). A text is text: control tokens that
    are spelled in it do not become any."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return prompt, served.tokenizer
    if served.tokenizer is None:
        raise Refused("E501", "this model has no tokenizer.json: send token ids", param="prompt")
    talk = isinstance(prompt, list)
    length = sum(len(m.content) for m in prompt) if talk else len(prompt)
    if length > served.most_bytes:
        raise too_long(f"{length} characters", asked, served)
    if talk:
        ids, _ = chat.render(prompt, asked.template, served.tokenizer, open_reply=True)
    else:
        ids = served.tokenizer.encode(prompt)
    return ids.tolist() or [served.tokenizer.eot_id], served.tokenizer


def too_long(what: str, asked: Asked, served: Served) -> Refused:
    text = f"the prompt has {what}; the context is {served.context} tokens, and a reply needs one"
    param = "messages" if asked.kind == "chat" else "prompt"
    text = f"{text} at least: shorten it"
    return Refused("E502", text, param=param, word="context_length_exceeded")
