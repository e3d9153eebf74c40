"""All that the parent process of a preparation decides, in the order of the rows.

    rows, in their order  ->  Output.take: bad? dropped by a rule? a duplicate? which split?
                              ->  Shards.add  ->  train_00000.npy
                              ->  rejected.jsonl, counts
    a shard closes between two documents  ->  Output.journal
                              ->  seen.bin, pending_N.npz, and at last progress.json

What a killed run wrote after its last journal is written over, with the same bytes.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import numpy as np

from lumen.clean import cut_place
from lumen.encode import Document, encode_parts, share_of
from lumen.errors import UserError
from lumen.near import Keys
from lumen.shards import Growing, Shards, append_at, new_file, write_dataset_json
from lumen.sources import Input, Reject, Row
from lumen.tokenizer import Tokenizer

DOCUMENTS_LISTED = 5  # of each code, in report.json and on the console
EXCERPT = 100  # letters of a bad row in a message
DROPPED_LISTED = 1000  # of duplicates and of each rule, in rejected.jsonl; all are counted
SMALL_RESERVE_TOKENS = 4000  # below, the document in reserve is not cut for validation
NEAR = "rule:near_duplicate"
DUPLICATE = Reject("the same text as an earlier document")


def is_bad(code: str) -> bool:
    """Whether a row of this code is a mistake; the others were dropped as was asked for."""
    return code not in ("E106", "E107") and not code.startswith("rule:")


class Output:
    """Takes rows in their order; holds the shards that they fill, and the journal from which a
    killed run goes on."""

    def __init__(
        self, out: str, header: dict, inputs: list[Input], strict: bool, tokenizer: Tokenizer
    ):
        self.out = out
        self.header = header  # of progress.json: settings, provenance
        self.settings = header["settings"]
        self.inputs = inputs
        self.strict = strict
        self.tokenizer = tokenizer
        self.rows_made = self.settings.get("rows")  # of conversations and pairs
        target = self.settings["shard_tokens"]
        pad_id = tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id
        self.splits = {}
        for split in ("train", "val"):
            self.splits[split] = Shards(out, split, target, self.rows_made, pad_id)
        # input, offset and line of the row at hand; None: after the last
        self.position = (0, 0, 1)
        # of the long file that is being written: its split, or "dropped"; whether it was cleaned
        self.open = []
        # the document with the smallest share so far: it waits until the end (see settle)
        self.reserve: Document | None = None
        self.tail = self.find_tail()
        self.seen: set[bytes] = set()  # keys of all documents
        self.new_keys: list[bytes] = []  # of those, what is not in seen.bin
        self.elsewhere: list[Keys] = []  # of the documents that other folders have
        self.near = Keys(b"")  # of documents that are too much like another
        self.rejected = Growing(os.path.join(out, "rejected.jsonl"))
        self.exported: Growing | None = None  # of --export_clean: the rows that were kept
        self.journals = 0
        self.counts = Counter()  # by kind, code or rule
        self.facts = Counter()  # of the documents that were kept: languages, roles, ...
        self.rows = Counter()  # by source
        self.kept = Counter()  # documents by source
        self.examples: dict[str, list[str]] = {}  # by code
        self.lost: list[str] = []  # paths of whole files

    def find_tail(self) -> int | None:
        """Long files do not wait in reserve. Where there is nothing else, and all are drawn for one
        side, this one gives its tail to val: that with the draw nearest to the other side."""
        fraction, seed = self.settings["val_fraction"], self.settings["seed"]
        drawn = []
        for given in self.inputs:
            if given.split == "hash" and (given.key or not given.long):
                drawn.append(given)
        if not fraction or not drawn or not all(given.long for given in drawn):
            return None
        shares = [share_of(bytes.fromhex(given.key), seed) for given in drawn]
        if min(shares) >= fraction:
            nearest = min(shares)
        elif max(shares) < fraction:
            nearest = max(shares)
        else:
            return None
        return self.inputs.index(drawn[shares.index(nearest)])

    # ---- rows

    def take(self, index: int, row: Row) -> None:
        """One row. Nothing is counted before it is written, so that a journal made meanwhile lacks
        the whole row."""
        given = self.inputs[index]
        self.position = (index, row.offset, row.line)
        if row.code == "blank":
            self.counts["blank_lines"] += row.value
            return
        if row.code is None and not row.value.key:
            self.take_piece(index, row.line, row.value)
            return
        if row.code is None:
            row = self.look_for_its_like(row)
        if row.code:
            self.reject(given, row)
        else:
            self.take_document(given, row.value)
        self.counts["rows"] += 1
        self.rows[str(given.source)] += 1

    def is_known(self, key: bytes) -> bool:
        return key in self.seen or any(key in keys for keys in self.elsewhere)

    def look_for_its_like(self, row: Row) -> Row:
        key = row.value.key
        if self.is_known(key):
            return row._replace(code="E107", value=DUPLICATE)
        if key in self.near:
            return row._replace(code=NEAR, value=Reject("too much like another document"))
        return row

    def take_document(self, given: Input, document: Document) -> None:
        if given.split != "hash":
            self.write(document, given.split)
        elif self.reserve is None or document.share < self.reserve.share:
            if self.reserve:
                self.write(self.reserve, self.drawn(self.reserve.share))
            self.reserve = document
        else:
            self.write(document, self.drawn(document.share))
        self.remember(document.key)
        parts = 1 if self.rows_made else len(document.ends)
        cleaned = int(document.cleaned)
        self.counts.update(kept=1, cleaned=cleaned, cut=int(parts > 1), parts=parts)
        self.facts.update(document.facts)
        if self.exported:
            self.exported.add(document.value)
        self.kept[str(given.source)] += 1

    def take_piece(self, index: int, line: int, piece: Document) -> None:
        """A piece of a long file. The file is one row: one draw, one look for its like, one end."""
        given = self.inputs[index]
        key = bytes.fromhex(given.key)
        source = str(given.source)
        first = not self.open
        if first:
            split = self.split_of_long_file(index, key)
            cleaned = False
        else:
            split, cleaned = self.open
        if split != "dropped":
            self.write_piece(index, piece, split, first)
            if first:
                self.remember(key)
                self.kept[source] += 1
            newly_cleaned = int(piece.cleaned and not cleaned)
            parts = len(piece.ends)
            self.facts.update(piece.facts)
            self.counts.update(kept=int(first), cleaned=newly_cleaned, cut=int(first), parts=parts)
        elif first:
            self.reject(given, Row(0, line, "E107", DUPLICATE))
        self.counts["rows"] += int(first)
        self.rows[source] += int(first)
        self.open = [] if piece.last else [split, cleaned or piece.cleaned]

    def split_of_long_file(self, index: int, key: bytes) -> str:
        if self.is_known(key):
            return "dropped"
        if self.inputs[index].split != "hash":
            return self.inputs[index].split
        if index == self.tail:
            return "train"
        return self.drawn(share_of(key, self.settings["seed"]))

    def write_piece(self, index: int, piece: Document, split: str, first: bool) -> None:
        if piece.last and index == self.tail:
            total = sum(given.size for given in self.inputs if given.split == "hash")
            # a packed file is larger than it looks
            written = sum(shards.bytes_text for shards in self.splits.values())
            total = max(total, written + piece.size)
            share = self.settings["val_fraction"] * total / max(piece.size, 1)
            self.hold_out(piece, share, begins=False)
        else:
            self.write(piece, split, first)

    def drawn(self, share: float) -> str:
        return "val" if share < self.settings["val_fraction"] else "train"

    def remember(self, key: bytes) -> None:
        self.seen.add(key)
        self.new_keys.append(key)

    def reject(self, given: Input, row: Row) -> None:
        code, reject = row.code, row.value
        said = f"{given.path}:{row.line}: {reject.reason}"
        if reject.excerpt:
            more = "..." if len(reject.excerpt) > EXCERPT else ""
            said += f": {reject.excerpt[:EXCERPT]}{more}"
        dropped = not is_bad(code)
        harmless = dropped or (code == "E104" and given.kind == "text")  # an empty __init__.py
        if self.strict and not harmless:
            raise UserError(code, said)
        self.counts.update({code: 1, "bad": int(not harmless)})
        examples = self.examples.setdefault(code, [])
        if len(examples) < DOCUMENTS_LISTED:
            examples.append(said)
        if not dropped or self.counts[code] <= DROPPED_LISTED:
            entry = {
                "file": given.path,
                "line": row.line,
                "byte_offset": row.offset,
                "code": code,
                "reason": reject.reason,
                "excerpt": reject.excerpt,
            }
            self.rejected.add(entry)
        if reject.whole_file and (given.kind != "text" or given.long):
            self.lost.append(given.path)

    # ---- shards

    def write(self, document: Document, split: str, begins=True, journal=True) -> None:
        if document.mask is not None:
            self.write_conversation(document, split, journal)
            return
        shards = self.splits[split]
        start = 0
        for end in document.ends:
            if shards.full(end - start):
                shards.close()
                if start == 0 and self.position and journal:
                    self.journal()
            shards.add(document.ids[start:end], begins and start == 0)
            start = end
        shards.bytes_text += document.size

    def write_conversation(self, document: Document, split: str, journal: bool) -> None:
        """A conversation, or a pair's two: whole, in one shard, each part a document."""
        shards = self.splits[split]
        if shards.full(len(document.ids)):
            shards.close()
            if self.position and journal:
                self.journal()
        start = 0
        for end in document.ends:
            shards.add(document.ids[start:end], True, document.mask[start:end])
            start = end
        shards.bytes_text += document.size

    def hold_out(self, document: Document, share: float, begins=True) -> None:
        """Gives about `share` of a document to val, its end, and the rest to train: two documents
        from now on."""
        # part by part: some tokenizers put a blank before each text, and take it away again
        parts = zip([0, *document.ends], document.ends)
        whole = [self.tokenizer.decode(document.ids[a:b]) for a, b in parts]
        text = "".join(whole).removesuffix(self.tokenizer.decode(document.ids[-1:]))
        tail = min(len(text), max(1, round(share * len(text))))
        cut = cut_place(text, max(0, len(text) - 2 * tail), len(text) - tail)
        if begins and not cut:  # a letter or two: nothing would be left to train on
            self.write(document, "train")
            return
        self.write(self.part_of(document, text[:cut]), "train", begins)
        self.write(self.part_of(document, text[cut:]), "val", True, journal=False)
        self.counts["tail_held_out"] = 1

    def part_of(self, document: Document, text: str) -> Document:
        limit = self.settings["max_doc_chars"]
        ids, ends = encode_parts(text, self.tokenizer, limit, document.ids.dtype)
        return document._replace(ids=ids, ends=ends, size=len(text.encode()))

    def settle(self) -> None:
        """Writes the reserve and the last shards. When no document but the reserve can be val, it
        is; a large one (in a corpus of few documents, or of one) gives only its tail, about as much
        as val_fraction asks for."""
        self.position = None
        train, val = self.splits["train"], self.splits["val"]
        if self.reserve:
            length = len(self.reserve.ids)
            share = self.settings["val_fraction"] * (train.tokens + length) / length
            small = share > 1 / 3 or length < SMALL_RESERVE_TOKENS
            if val.tokens or (train.tokens and small):
                self.write(self.reserve, "val")
            elif self.rows_made:  # a conversation is not cut
                self.write(self.reserve, "val" if train.tokens else "train")
            else:
                self.hold_out(self.reserve, share)
        train.close()
        val.close()
        self.flush()

    # ---- the journal

    def flush(self) -> None:
        self.rejected.flush()
        if self.exported:
            self.exported.flush()

    def pending_file(self, n: int) -> str:
        return os.path.join(self.out, f"pending_{n}.npz")

    def journal(self) -> None:
        """Rejects, keys, what is in no shard yet, and then, atomically, the progress.json that
        refers to them."""
        self.flush()
        known = 16 * (len(self.seen) - len(self.new_keys))
        append_at(os.path.join(self.out, "seen.bin"), known, b"".join(self.new_keys))
        self.new_keys = []
        self.journals += 1
        state = {
            "position": self.position,
            "open": self.open,
            "seen": len(self.seen),
            "rejected_bytes": self.rejected.size,
            "exported_bytes": self.exported.size if self.exported else None,
            "journals": self.journals,
            "counts": self.counts,
            "rows": self.rows,
            "facts": self.facts,
            "kept": self.kept,
            "examples": self.examples,
            "lost": self.lost,
            "splits": {},
            "reserve": None,
        }
        arrays = {}
        for split, shards in self.splits.items():
            arrays |= shards.pending()
            state["splits"][split] = [shards.closed, shards.bytes_text, shards.starts]
        if self.reserve:
            key, share, ids, ends, size, *_ = self.reserve
            arrays["reserve"] = ids
            if self.reserve.mask is not None:
                arrays["reserve_mask"] = self.reserve.mask
            state["reserve"] = [key.hex(), share, ends, size]
        with new_file(self.pending_file(self.journals)) as file:
            np.savez(file, **arrays)
        progress = self.header | {"state": state}
        write_dataset_json(os.path.join(self.out, "progress.json"), progress)
        with suppress(OSError):
            os.remove(self.pending_file(self.journals - 1))

    def resume(self, state: dict) -> None:
        self.position = tuple(state["position"])
        self.open = state["open"]
        self.rejected.size = state["rejected_bytes"]
        if self.exported:
            self.exported.size = state["exported_bytes"]
        self.journals = state["journals"]
        self.counts = Counter(state["counts"])
        self.rows = Counter(state["rows"])
        self.facts = Counter(state.get("facts", {}))
        self.kept = Counter(state["kept"])
        self.examples = state["examples"]
        self.lost = state["lost"]
        with open(os.path.join(self.out, "seen.bin"), "rb") as file:
            self.seen = {file.read(16) for _ in range(state["seen"])}
        with np.load(self.pending_file(self.journals), allow_pickle=False) as pending:
            for split, shards in self.splits.items():
                shards.restore(state["splits"][split], pending)
            if state["reserve"]:
                key, share, ends, size = state["reserve"]
                key = bytes.fromhex(key)
                ids = pending["reserve"]
                mask = pending["reserve_mask"] if "reserve_mask" in pending else None
                self.reserve = Document(key, share, ids, ends, size, False, mask=mask)
