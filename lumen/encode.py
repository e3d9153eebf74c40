"""Rows to documents: what a worker does with the items of a batch.

    item  ->  rows (lumen/readers.py)  ->  Cleaner: one text or conversation, cleaned and judged
          ->  Encoder: its ids, and for conversations its mask

`Signer` ends at the bands of MinHash instead of ids, `Judge` at what each rule would say. All are
pure functions of the text and the settings, so nothing depends on which worker has which batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from typing import NamedTuple

import numpy as np

from lumen import chat
from lumen.chat import Message, render
from lumen.clean import clean, cut_text
from lumen.conversations import RowError, to_messages, to_pair
from lumen.decontaminate import Contaminated
from lumen.errors import UserError
from lumen.packing import fit
from lumen.rules import Rules
from lumen.sources import Item, Reject, Row, item_rows
from lumen.tokenizer import Tokenizer

FREE_OF_EVALUATION = "free_of_evaluation_text"  # the rule of --decontaminate

# ---------------------------------------------------------------- documents


class Document(NamedTuple):
    """A document, or a piece of a long file; a conversation; or a pair, which is two documents."""

    # blake2b-16 of the cleaned, stripped text: equal documents have equal keys; empty: a piece
    key: bytes
    share: float  # in [0, 1), from key and seed: below val_fraction means val
    ids: np.ndarray  # (n,), of all parts; with the last of a text the end-of-text id
    ends: list  # of the parts, in ids
    size: int  # bytes of text
    cleaned: bool  # cleaning changed it
    last: bool = True  # the document ends here
    mask: np.ndarray | None = None  # (n,) uint8, 1: a target; None: plain text
    facts: dict = {}  # noqa: RUF012  what is counted of it beside its size: languages, roles, ...
    value: str | dict | None = None  # what was cleaned, for --export_clean


def share_of(key: bytes, seed: int) -> float:
    salt = seed.to_bytes(8, "little", signed=True)
    draw = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
    return int.from_bytes(draw, "little") / 2**64


def key_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def encode_parts(
    text: str, tokenizer: Tokenizer, limit: int, dtype, last=True
) -> tuple[np.ndarray, list]:
    """The ids of all parts of a text, (n,), and where each part ends."""
    arrays = [tokenizer.encode(part) for part in cut_text(text, limit)]
    if last:
        arrays[-1] = np.append(arrays[-1], np.uint32(tokenizer.eot_id))
    ends = list(itertools.accumulate(len(array) for array in arrays))
    return np.concatenate(arrays).astype(dtype), ends


# ---------------------------------------------------------------- cleaning


class Cleaned(NamedTuple):
    """What is left of a row that is kept."""

    key: bytes
    value: str | list | tuple  # a text, a conversation's messages, or a pair of two of these
    size: int  # bytes of text
    changed: bool
    facts: dict  # what is counted of it


class Cleaner:
    """Row -> Row whose value is Cleaned, or a code why it is not kept (`rule:NAME` of a rule)."""

    def __init__(self, settings: dict, evaluation: Contaminated | None = None):
        self.settings = settings
        self.rules = Rules(settings["rules"]) if "rules" in settings else None
        self.evaluation = evaluation

    def look(self, item: Item, row: Row) -> Row:
        """One row of an item, cleaned and judged."""
        if isinstance(row.value, dict):
            return self.look_at_messages(row)
        text = clean(row.value)
        if item.kind in ("piece", "last"):
            return row._replace(value=self.piece(text, row.value))
        facts = {}
        if self.rules and text.strip():
            verdict = self.rules.look(text)
            if verdict.dropped:
                return dropped(row, verdict.dropped, verdict.why, text)
            text, facts = verdict.text, facts_of(verdict)
        stripped = text.strip()
        if not stripped:
            reason = "the file is empty" if item.kind == "text" else "its text is empty"
            return row._replace(code="E104", value=Reject(reason))
        if self.evaluation and (hit := self.evaluation.hits(text)):
            return dropped(row, FREE_OF_EVALUATION, f"it has {hit!r}", text)
        cleaned = Cleaned(key_of(stripped), text, byte_size(text), text != row.value, facts)
        return row._replace(value=cleaned)

    def piece(self, text: str, given: str) -> Cleaned:
        """Of a long file: rules look at whole documents, so it is not judged. Its key is that of
        the file, see document_key."""
        masked = 0
        if self.rules:
            text, masked = self.rules.rewrite(text)
        facts = {"masked": masked} if masked else {}
        return Cleaned(b"", text, byte_size(text), text != given, facts)

    def parse(self, value: dict, counts: Counter) -> tuple[list[Message], ...]:
        """A row's conversation, or the two of a pair. RowError."""
        rows = self.settings["rows"]
        tools = "tool" in rows["template"]["formats"]
        if rows["kind"] == "pairs":
            return to_pair(value, tools=tools, counts=counts)
        return (to_messages(value, tools=tools, counts=counts),)

    def look_at_messages(self, row: Row) -> Row:
        """A row of a conversation, or of a pair: judged by all its text, cleaned content by
        content."""
        counts = Counter()
        try:
            parts = self.parse(row.value, counts)
        except RowError as error:
            excerpt = json.dumps(row.value, ensure_ascii=False)[:200]
            return row._replace(code=error.code, value=Reject(error.reason, excerpt))
        said = all_text(parts)
        facts = Counter(f"row {name}" for name in counts.elements())
        if self.rules:
            verdict = self.rules.look(clean(said))
            if verdict.dropped:
                return dropped(row, verdict.dropped, verdict.why, said)
            facts.update(facts_of(verdict))
        parts = tuple([self.cleaned(message) for message in part] for part in parts)
        for message in (message for part in parts for message in part):
            if not message.content.strip():
                return row._replace(code="E104", value=Reject(f"{message.role} says nothing"))
            facts[f"role {message.role}"] += 1
        text = all_text(parts)
        if self.evaluation and (hit := self.evaluation.hits(text)):
            return dropped(row, FREE_OF_EVALUATION, f"it has {hit!r}", text)
        value = parts if len(parts) > 1 else parts[0]
        changed = text != said
        made = Cleaned(key_of(json.dumps(parts)), value, byte_size(text), changed, dict(facts))
        return row._replace(value=made)

    def cleaned(self, message: Message) -> Message:
        content = clean(message.content)
        if self.rules:
            content, _ = self.rules.rewrite(content)
        return message._replace(content=content)

    def would_drop(self, row: Row) -> tuple[str, dict[str, str]]:
        """Of a row that has a value: its text, and what each rule says of it, looked at alone."""
        text = row.value
        if isinstance(text, dict):
            try:
                text = all_text(self.parse(text, Counter()))
            except RowError as error:
                return "", {error.code: error.reason}
        text = clean(text)
        failed = self.rules.look_all(text) if self.rules else {}
        if self.evaluation and (hit := self.evaluation.hits(text)):
            failed = failed | {FREE_OF_EVALUATION: f"it has {hit!r}"}
        return text, failed


def all_text(parts: tuple[list[Message], ...]) -> str:
    return "\n".join(message.content for part in parts for message in part)


def byte_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def dropped(row: Row, rule: str, why: str, text: str) -> Row:
    excerpt = " ".join(text[:1000].split())[:200]  # of one line
    return row._replace(code=f"rule:{rule}", value=Reject(why, excerpt))


def facts_of(verdict) -> dict:
    facts = {}
    if verdict.language:
        facts[f"language {verdict.language}"] = 1
    if verdict.masked:
        facts["masked"] = verdict.masked
    return facts


# ---------------------------------------------------------------- what is made of a batch


class Encoder:
    """A batch of items -> ([(input's index, Row)], seconds by stage), a Document for every row that
    is kept."""

    def __init__(self, settings: dict, tokenizer: Tokenizer, dtype: str, more: dict):
        """`more`: evaluation, a Contaminated; keep, whether documents carry what they are of."""
        self.settings, self.tokenizer, self.dtype = settings, tokenizer, dtype
        self.cleaner = Cleaner(settings, more.get("evaluation"))
        self.keep = more.get("keep", False)
        self.template = None
        if "rows" in settings:
            self.template = chat.find_template(settings["rows"]["template"])

    def __call__(self, batch: list[Item]):
        results, seconds = [], Counter()
        for item in batch:
            rows = item_rows(item)
            began = time.process_time()
            for row in rows:
                read = time.process_time()
                cleaned = read
                if row.code is None:
                    row = self.cleaner.look(item, row)
                    cleaned = time.process_time()
                if row.code is None:
                    row = self.encode(item, row)
                results.append((item.index, row))
                now = time.process_time()
                seconds["read"] += read - began
                seconds["clean"] += cleaned - read
                seconds["encode"] += now - cleaned
                began = now
        return results, seconds

    def encode(self, item: Item, row: Row) -> Row:
        cleaned: Cleaned = row.value
        share = share_of(cleaned.key, self.settings["seed"]) if cleaned.key else 0.0
        if "rows" in self.settings:
            return self.encode_messages(row, cleaned, share)
        last = item.kind != "piece"
        limit = self.settings["max_doc_chars"]
        ids, ends = encode_parts(cleaned.value, self.tokenizer, limit, self.dtype, last)
        made = Document(cleaned.key, share, ids, ends, cleaned.size, cleaned.changed, last)
        made = made._replace(facts=cleaned.facts)
        return row._replace(value=self.kept(made, {"text": cleaned.value}))

    def kept(self, made: Document, value: dict) -> Document:
        return made._replace(value=value) if self.keep else made

    def encode_messages(self, row: Row, cleaned: Cleaned, share: float) -> Row:
        """A conversation, or a pair's two, rendered and cut to the length of a row."""
        rows = self.settings["rows"]
        pair = rows["kind"] == "pairs"
        # of a pair the last reply is what matters: going back to an earlier one would lose it
        long = "drop" if pair and rows["long"] == "turns" else rows["long"]
        ids, masks, ends, cut = [], [], [], False
        facts = Counter(cleaned.facts)
        for messages in cleaned.value if pair else [cleaned.value]:
            try:
                rendered = render(messages, self.template, self.tokenizer, rows["loss_on"])
            except UserError as error:  # a role that the template lacks
                return row._replace(code=error.code, value=Reject(error.text))
            fitted, what = fit(*rendered, rows["length"], long)
            if fitted is None:
                reason = f"{len(rendered[0]):,} tokens, a row has {rows['length']:,}: {what}"
                return row._replace(code="E106", value=Reject(reason))
            if what:
                facts[f"row {what}"] += 1
                cut = True
            ids.append(fitted[0].astype(self.dtype))
            masks.append(fitted[1])
            ends.append(len(fitted[0]) + (ends[-1] if ends else 0))
        if pair and np.array_equal(*ids):
            reason = "chosen and rejected are the same"
            if cut:
                reason += f" in the {rows['length']:,} tokens of a row"
            return row._replace(code="E106" if cut else "E126", value=Reject(reason))
        made = Document(
            cleaned.key, share, np.concatenate(ids), ends, cleaned.size, cleaned.changed
        )
        made = made._replace(mask=np.concatenate(masks), facts=dict(facts))
        return row._replace(value=self.kept(made, as_row(cleaned.value)))


def as_row(value: list | tuple) -> dict:
    """A conversation or a pair as the JSON of a row."""
    if isinstance(value, tuple):
        chosen, rejected = (as_row(part)["messages"] for part in value)
        return {"chosen": chosen, "rejected": rejected}
    return {"messages": [message._asdict() for message in value]}
