"""What rows have become, in OpenAI's shapes: a whole answer, or the chunks of a stream.

Both are made of the same pieces by the same code, so their texts are the same. A reply to a
conversation loses the white space around it, as in sample.py; a stream holds white space back until
more text follows.
"""

from __future__ import annotations

import codecs
import time
import uuid
from typing import NamedTuple

from lumen.engine import News, Row
from lumen.openai_api import Asked, Served
from lumen.worker import Part

FINISH = {"eot": "stop", "stop": "stop", "length": "length", "context": "length"}
LOWEST = -9999.0  # OpenAI's word for a log-probability of -inf, which JSON does not have


class Token(NamedTuple):
    """A token with log-probabilities; start: characters of the row's text before it."""

    news: News
    start: int
    data: bytes  # what it stands for


class Writing:
    """One row on its way to a client."""

    def __init__(self, row: Row, talk: bool):
        self.row = row
        self.bare = talk or row.stream.tokenizer is None  # without white space around it
        self.begun = False
        self.blanks = ""  # may be the end of the reply
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.read = 0  # characters of all tokens so far
        self.out = 0  # characters of all pieces so far
        self.tokens: list[Token] = []  # whose text is not certain yet

    def text(self, part: Part) -> str:
        """What of it may be shown now."""
        if not self.bare:
            return part.text
        text = self.blanks + part.text
        if not self.begun:
            text = text.lstrip()
        self.begun = self.begun or bool(text)
        certain = text.rstrip()
        self.blanks = text[len(certain) :]
        return certain

    def certain_tokens(self, part: Part) -> list[Token]:
        """Those whose text is out, with the end-of-text and a stop text left away; none where they
        were not asked for."""
        if self.row.n_logprobs < 0:
            return []
        self.out += len(part.text)
        for news in part.tokens:
            data = self.bytes_of(news.token)
            self.tokens.append(Token(news, self.read, data))
            self.read += len(self.utf8.decode(data))
        if part.reason == "eot":
            self.tokens.pop()
        if part.reason in ("eot", "length", "context"):
            n = len(self.tokens)
        else:
            n = sum(token.start < self.out for token in self.tokens)
        found = self.tokens[:n]
        self.tokens = self.tokens[n:]
        return found

    def bytes_of(self, token: int) -> bytes:
        tokenizer = self.row.stream.tokenizer
        return f" {token}".encode() if tokenizer is None else tokenizer.decode_bytes([token])


class Shape:
    """One answer. Of `rows`, in their order: n of each prompt."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    talk = True

    def __init__(self, asked: Asked, served: Served, rows: list[Row]):
        self.asked = asked
        self.rows = rows
        self.writings = [Writing(row, self.talk) for row in rows]
        self.base = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"lumen-{served.opened.sha256[:12]}",
            "seed": asked.seed,  # not OpenAI's: what makes this answer again
        }

    # ------------------------------------------------------------ a stream

    def opening(self) -> list[dict]:
        """Chunks before the first token."""
        deltas = [{"role": "assistant", "content": ""}] * len(self.rows)
        return [self.chunk({"index": i, "delta": d}) for i, d in enumerate(deltas)]

    def chunks(self, part: Part) -> list[dict]:
        """Of what is new of a row: nothing, where all of it is still held back."""
        writing = self.writings[part.number]
        text = writing.text(part)
        tokens = writing.certain_tokens(part)
        if not (text or tokens or part.reason):
            return []
        choice = {"index": part.number} | self.piece(text) | {"logprobs": self.logprobs(tokens)}
        if not part.reason:
            return [self.chunk(choice)]
        last = {"index": part.number} | self.piece("") | {"finish_reason": FINISH[part.reason]}
        if not (text or tokens):
            return [self.chunk(last)]
        return [self.chunk(choice), self.chunk(last)]

    def chunk(self, choice: dict) -> dict:
        """OpenAI sends usage: null with each where it will come at the end."""
        made = self.base | {"choices": [{"finish_reason": None, "logprobs": None} | choice]}
        return made | {"usage": None} if self.asked.usage_in_stream else made

    def closing(self, new_tokens: int) -> list[dict]:
        if not self.asked.usage_in_stream:
            return []
        return [self.base | {"choices": [], "usage": self.usage(new_tokens)}]

    def piece(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}

    # ------------------------------------------------------------ a whole answer

    def whole(self, parts: list[Part], new_tokens: int) -> dict:
        choices = []
        for part in parts:
            writing = self.writings[part.number]
            choice = {"index": part.number} | self.said(writing.text(part))
            choice["logprobs"] = self.logprobs(writing.certain_tokens(part))
            choice["finish_reason"] = FINISH[part.reason]
            choices.append(choice)
        made = self.base | {"object": self.whole_object, "choices": choices}
        return made | {"usage": self.usage(new_tokens)}

    def said(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def usage(self, new_tokens: int) -> dict:
        """A prompt counts once, however many sequences go on from it."""
        firsts = self.rows[:: self.asked.n]
        n = sum(len(row.stream.ids) for row in firsts)
        return {
            "prompt_tokens": n,
            "completion_tokens": new_tokens,
            "total_tokens": n + new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(row.reused for row in firsts)},
        }

    # ------------------------------------------------------------ log-probabilities

    def logprobs(self, tokens: list[Token]) -> dict | None:
        if self.asked.n_logprobs < 0:
            return None
        content = []
        for token in tokens:
            one = self.one(token.data, token.news.logprob)
            top = [self.one(self.bytes_of(i), lp) for i, lp in token.news.top]
            content.append(one | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def one(self, data: bytes, logprob: float) -> dict:
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}

    def bytes_of(self, token: int) -> bytes:
        return self.writings[0].bytes_of(token)


class TextShape(Shape):
    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    talk = False

    def opening(self) -> list[dict]:
        if not self.asked.echo:
            return []
        return [self.chunk({"index": i} | self.piece(self.head(i))) for i in range(len(self.rows))]

    def head(self, number: int) -> str:
        """The prompt, where it is asked back."""
        if not self.asked.echo:
            return ""
        prompt = self.asked.prompts[number // self.asked.n]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.rows[number].stream.tokenizer
        return tokenizer.decode(prompt) if tokenizer else " ".join([*map(str, prompt), ""])

    def piece(self, text: str) -> dict:
        return {"text": text}

    def whole(self, parts: list[Part], new_tokens: int) -> dict:
        made = super().whole(parts, new_tokens)
        for choice in made["choices"]:
            choice["text"] = self.head(choice["index"]) + choice["text"]
        return made

    def said(self, text: str) -> dict:
        return self.piece(text)

    def logprobs(self, tokens: list[Token]) -> dict | None:
        """Two tokens of one spelling (half characters) share a place in top_logprobs; the likelier
        one has it."""
        if self.asked.n_logprobs < 0:
            return None
        tops = []
        for token in tokens:
            top = {}
            for i, logprob in token.news.top:
                top.setdefault(self.spelled(self.bytes_of(i)), max(logprob, LOWEST))
            tops.append(top)
        return {
            "tokens": [self.spelled(token.data) for token in tokens],
            "token_logprobs": [max(token.news.logprob, LOWEST) for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.start for token in tokens],
        }

    def spelled(self, data: bytes) -> str:
        """OpenAI writes what is no text as bytes:\\x.."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class GenerateShape(Shape):
    """Lumi's answer of POST /generate, and what else is worth knowing."""

    def whole(self, parts: list[Part], new_tokens: int) -> dict:
        part = parts[0]
        choice = self.asked.choice
        config = {
            "max_new_tokens": self.asked.max_new,
            "temperature": choice.temperature,
            "top_p": choice.top_p,
            "top_k": choice.top_k,
            "repetition_penalty": choice.repetition_penalty,
            "do_sample": choice.temperature > 0,
            "template": self.asked.template.name,
            "seed": self.asked.seed,
        }
        return {
            "response": self.writings[0].text(part),
            "prompt": self.asked.prompts[0][-1].content,
            "generation_config": config,
            "finish_reason": FINISH[part.reason],
            "usage": self.usage(new_tokens),
            "model": self.base["model"],
        }


SHAPES = {"chat": Shape, "text": TextShape, "generate": GenerateShape}
