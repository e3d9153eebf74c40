"""Text to token shards: python prepare_data.py SOURCE... --out data/NAME --tokenizer bpe:8192

SOURCE is a file or folder of .txt .md .py (a file is a document), .jsonl (rows {"text": ...}) and
.json (a list of such rows, or rows one after the other), or `stdlib` (the running Python's own
library, 11 MB, no download), or `synthetic:N` (N generated documents, the same on every machine).
What lies in a folder and is not read is said, a line for each kind.

    data/NAME/train_00000.npy ... val_00000.npy ...  1-D ids; every document ends with the id of
                                                     end-of-text, and has no other
              train_00000.docs.npy ...               uint64: where documents begin; the length
              tokenizer.json  token_bytes.npy
              report.json  rejected.jsonl
              manifest.json                          last: where it is, the folder is complete

The bytes of all this depend on the text and the settings only, not on the number of processes, the
size of batches, or how often the preparation was killed and started again. Only the manifest's
block `provenance` (when, where, how fast, which files) is outside that promise and its
fingerprint. `--verify FOLDER` holds finished shards against the sums in its manifest.

*.docs.npy of a shard holds, in order, every place where a document begins, and at last the shard's
length. So it is what a scan for the end-of-text id finds, {0} | {places after one} | {length}, but
for a document over the border of two shards: then 0 is not in that of the second shard (its first
entry is where the next document begins), and the length of the first is there although no document
ends. All lengths less one, added up, are the number of documents.

How: the parent cuts the inputs into batches of items (lumen/sources.py); `encode_batch` parses,
cleans, hashes and encodes a batch, in a pool of processes or in this one; the parent takes the
results in order, drops duplicates, decides the split, fills shards (`Output`). The split is one
draw a document. Whenever a shard is closed at the start of a row, or of a piece of a long text
file, progress.json (replaced atomically) records where that was.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
import unicodedata
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from lumen.clean import clean
from lumen.errors import ERRORS, UserError, expand
from lumen.launch import Words, command, speak
from lumen.manifest import (
    check_sizes,
    make_manifest,
    make_report,
    read_dataset_json,
    token_dtype,
    verify,
)
from lumen.shards import (
    Document,
    Output,
    encode_parts,
    new_file,
    share_of,
    to_utf8,
    write_dataset_json,
)
from lumen.sources import (
    Input,
    Item,
    Reading,
    Reject,
    Row,
    document_key,
    file_sha256,
    find_inputs,
    item_rows,
    label,
    read_items,
    stored_input,
)
from lumen.tokenizer import NAMED, Tokenizer, load, train_bpe

# Of prepare() and of the command line: (default, meaning). A default of None depends on the text.
OPTIONS = {
    "val_fraction": (
        None,
        "share of documents held out, by hash; default 0.05 below 100 MB of text, else 0.005",
    ),
    "seed": (1337, "of the split and of synthetic text"),
    "shard_tokens": (100_000_000, "a shard is closed before it would be longer"),
    "max_doc_chars": (200_000, "longer documents are given to the tokenizer in parts"),
    "workers": (None, "processes; default min(cores, 8), but 1 below 32 MB of text"),
    "batch_bytes": (1 << 20, "what a worker gets at a time"),
    "max_bad": (0.01, "fail at the end when a larger share of the rows is bad"),
    "strict": (False, "stop at the first bad row"),
    "quiet": (False, "no lines and no progress bar"),
}
# In provenance. 2: a document has one end of text; before, each of its parts had one.
RULES = 2
# A BPE vocabulary is trained on this much, taken from all files alike, and then on the first so
# many characters of a document; where there is less text, on all of it.
TRAIN_BYTES = 200_000_000
TRAIN_CHARS = 10_000
JOURNAL_FILES = re.compile(r"progress\.json|seen\.bin|pending_\d+\.npz|.*\.tmp")
DATASET_FILES = re.compile(
    rf"{JOURNAL_FILES.pattern}|(train|val)_\d{{5}}(\.docs)?\.npy|token_bytes\.npy"
    r"|(report|tokenizer)\.json"
)

# ---------------------------------------------------------------- options and settings


class Job(NamedTuple):
    """What was asked for. The settings are in the manifest and its fingerprint, the rest is not."""

    sources: list[str]
    val_sources: list[str]
    out: str
    tokenizer: str
    options: dict  # OPTIONS
    settings: dict

    def say(self, text: str) -> None:
        if not self.options["quiet"]:
            speak(to_utf8(text).decode())

    @property
    def trains_tokenizer(self) -> bool:
        return self.tokenizer.startswith("bpe:")

    @property
    def tokenizer_is_file(self) -> bool:
        return is_tokenizer_file(self.tokenizer)


def is_tokenizer_file(spec: str) -> bool:
    return not spec.startswith("bpe:") and spec != "bytes" and spec not in NAMED


def plan_job(sources, out: str, tokenizer: str, val_sources, options: dict) -> Job:
    """The checked options, and the settings that follow from them. E002."""
    if unknown := set(options) - set(OPTIONS):
        names = ", ".join(sorted(unknown))
        raise UserError("E002", f"prepare has no option {names}; it has {', '.join(OPTIONS)}")
    options = {name: options.get(name, default) for name, (default, _) in OPTIONS.items()}
    sources = expand_all(sources)
    val_sources = expand_all(val_sources)
    out = expand(out)
    tokenizer = expand(tokenizer)
    check_options(options, bool(val_sources))
    if not out or not tokenizer:
        raise UserError("E002", f"{'tokenizer' if out else 'out'} is empty")
    if tokenizer.startswith("bpe:") and not re.fullmatch(r"bpe:\d{3,7}", tokenizer):
        meaning = "bpe:8192 means a vocabulary of 8,192 ids, specials included"
        raise UserError("E002", f"tokenizer {tokenizer}: {meaning}")
    settings = {
        "version": 1,
        "sources": [label(spec) for spec in sources],
        "val_sources": [label(spec) for spec in val_sources],
        "val_fraction": 0.0 if val_sources else options["val_fraction"],
        "seed": options["seed"],
        "shard_tokens": options["shard_tokens"],
        "max_doc_chars": options["max_doc_chars"],
        "tokenizer": label(tokenizer) if is_tokenizer_file(tokenizer) else tokenizer,
    }
    return Job(sources, val_sources, out, tokenizer, options, settings)


def expand_all(specs) -> list[str]:
    if isinstance(specs, str):
        specs = [specs]
    return [expand(spec) for spec in specs or []]


def check_options(options: dict, has_val_sources: bool) -> None:
    val_fraction = options["val_fraction"]
    if has_val_sources and val_fraction is not None:
        text = "val and val_fraction exclude each other: with val all sources are for training"
        raise UserError("E002", text)
    good = 0 <= (val_fraction or 0) <= 0.5 and 0 <= options["max_bad"] <= 1
    for name in ("shard_tokens", "max_doc_chars", "batch_bytes"):
        good = good and options[name] >= 1
    if options["workers"] is not None:
        good = good and 1 <= options["workers"] <= 1024
    if not good:
        text = "val_fraction is 0 to 0.5, max_bad 0 to 1; shard_tokens, max_doc_chars, batch_bytes "
        raise UserError("E002", text + "at least 1, workers 1 to 1024")


# ---------------------------------------------------------------- files of the dataset


def remove(out: str, pattern: re.Pattern) -> None:
    for name in os.listdir(out):
        if pattern.fullmatch(name):
            os.remove(os.path.join(out, name))


@contextmanager
def holding(out: str, say=print):
    """Makes the folder; where there are locks, waits until no other process writes to it; removes
    it if it stays empty."""
    handle = lock_folder(out, say)
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(out)
        if handle is not None:
            os.close(handle)


def lock_folder(out: str, say) -> int | None:
    """An open descriptor that holds the lock; None where there are no locks (Windows, some file
    systems)."""
    said_at = None
    while True:
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise UserError("E119", f"{out}: {error.strerror}") from None
        handle = None
        try:
            import fcntl

            handle = os.open(out, os.O_RDONLY)
            # a finished folder is only read, by any number
            finished = os.path.exists(os.path.join(out, "manifest.json"))
            mode = fcntl.LOCK_SH if finished else fcntl.LOCK_EX
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == os.stat(out).st_ino:
                return handle
        except BlockingIOError:
            if said_at is None or time.monotonic() - said_at > 60:
                said_at = time.monotonic()
                say(f"another process is writing to {out}: waiting for it")
            time.sleep(0.3)
        except FileNotFoundError:  # the other one had nothing to leave there
            pass
        except (ImportError, OSError):
            return handle
        if handle is not None:
            os.close(handle)


# ---------------------------------------------------------------- encoding: what a worker does


def encode_batch(batch: list[Item]):
    """[(input's index, Row)] of the batch, with a Document for every text, and CPU seconds."""
    began = time.process_time()
    results = []
    for item in batch:
        for row in item_rows(item):
            if row.code is None:
                row = encode_row(item, row)
            results.append((item.index, row))
    return results, time.process_time() - began


def encode_row(item: Item, row: Row) -> Row:
    tokenizer, settings, dtype = _worker
    text = clean(row.value)
    key = b""
    share = 0.0
    if item.kind not in ("piece", "last"):  # the key of those is the whole file's, see document_key
        stripped = text.strip()
        if not stripped:
            reason = "the file is empty" if item.kind == "text" else '"text" is empty'
            return row._replace(code="E104", value=Reject(reason))
        key = hashlib.blake2b(stripped.encode(), digest_size=16).digest()
        share = share_of(key, settings["seed"])
    last = item.kind != "piece"
    ids, ends = encode_parts(text, tokenizer, settings["max_doc_chars"], dtype, last)
    size = len(text) if text.isascii() else len(text.encode())
    document = Document(key, share, ids, ends, size, text != row.value, last)
    return row._replace(value=document)


def start_worker(*given) -> None:
    """given: (tokenizer, settings, dtype), once a process. A process of a pool ends with its
    parent, even if that is killed with -9."""
    global _worker
    _worker = given
    if parent := multiprocessing.parent_process():
        # Ctrl-C goes to all of a terminal: the parent answers
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent) -> None:
    parent.join()
    os._exit(1)


def in_order(batches, workers: int, given: tuple):
    """(batch, encode_batch(batch)) in the order of the batches; at most 4 a worker are under way.
    E003: a process died."""
    if workers == 1:
        start_worker(*given)
        for batch in batches:
            yield batch, encode_batch(batch)
        return
    waiting = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, given) as pool:
        try:
            for batch in batches:
                # a process that begins here inherits it, and is not interrupted while it imports
                with interrupts_blocked():
                    waiting.append((batch, pool.submit(encode_batch, batch)))
                if len(waiting) >= 4 * workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()
        except BrokenProcessPool:
            text = "a worker process died, out of memory perhaps"
            again = "the same command with fewer --workers goes on"
            raise UserError("E003", f"{text}: {again}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is under way ends, the rest does not begin
            raise


@contextmanager
def interrupts_blocked():
    """Ctrl-C waits until this is over, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_batches(inputs: list[Input], position, size: int, seed: int):
    """Lists of items of about `size` bytes in all, from the position on."""
    batch = []
    weight = 0
    first, offset, line = position
    for index in range(first, len(inputs)):
        if index > first:
            offset, line = 0, 1
        for item in read_items(Reading(index, inputs[index], offset, line, size, seed)):
            batch.append(item)
            weight += len(item.data) + 200
            if weight >= size:
                yield batch
                batch = []
                weight = 0
    if batch:
        yield batch


# ---------------------------------------------------------------- the dataset


def prepare(
    sources: list[str],
    out: str,
    tokenizer="bpe:8192",
    val_sources: list[str] | None = None,
    **options,
) -> dict:
    """Makes the dataset `out`, goes on with one that was interrupted, or finds it finished; returns
    its manifest. Options: OPTIONS, with its defaults.

    E002 options; E003 a worker died; E101 to E104 and E108 with strict; E109 too many bad rows;
    E111 a finished shard is damaged; E115, E116 tokenizer; E117 out holds something else; E119
    disk full (the same command goes on later)."""
    job = plan_job(sources, out, tokenizer, val_sources, options)
    with holding(job.out, job.say):
        unread = {}
        inputs = find_all_inputs(job, unread)
        manifest, progress = look_into(job.out, job.settings, inputs)
        if manifest:
            say_finished(job, manifest)
            return manifest
        say_unread(job, unread)
        if progress and progress["provenance"].get("rules", 1) < RULES:
            old = "with an end-of-text at every cut in a document"
            job.say(f"note: an older Lumen began {job.out}, {old}: it is begun anew")
            remove(job.out, DATASET_FILES)
            progress = {}
        made = None if job.trains_tokenizer else load(job.tokenizer)
        try:
            return fill(job, progress or begin(job, inputs, unread), made)
        except UserError as error:
            # after these the same command goes on; after others it starts anew
            if error.code not in ("E119", "E003"):
                remove(job.out, DATASET_FILES)
            raise


def find_all_inputs(job: Job, unread: dict) -> list[Input] | None:
    """Val first: of a text that is in both, the one in train is dropped. None where the text is
    gone since the data were finished: the tokens do without. E108."""
    inputs = []
    try:
        for i, spec in enumerate(job.val_sources, len(job.sources)):
            inputs += find_inputs(spec, i, "val", job.out, unread)
        split = "train" if job.settings["val_fraction"] == 0 else "hash"
        for i, spec in enumerate(job.sources):
            inputs += find_inputs(spec, i, split, job.out, unread)
    except UserError:
        if not os.path.exists(os.path.join(job.out, "manifest.json")):
            raise
        return None
    if job.tokenizer_is_file:
        file = Input(-1, "val", "tokenizer", label(job.tokenizer), job.tokenizer)
        inputs.append(file.measured())
    return inputs


def look_into(out: str, settings: dict, inputs: list[Input] | None) -> tuple[dict, dict]:
    """(manifest, {}) of a finished folder, ({}, progress) of an unfinished one, ({}, {}) of an
    empty one. E117: it was made, or begun, by another command or from other text, or holds other
    things; E111: a shard is damaged."""
    manifest = read_dataset_json(os.path.join(out, "manifest.json"))
    progress = read_dataset_json(os.path.join(out, "progress.json"))
    if old := manifest or progress:
        for key, value in settings.items():
            before = old["settings"].get(key)
            if value is not None and value != before:
                raise UserError("E117", f"{out} was made with {key} {before}, not {value}")
        if inputs is not None and (change := changed_input(old["provenance"], inputs)):
            raise UserError("E117", f"{out} was made from other text: {change}")
    else:
        others = []
        for name in sorted(os.listdir(out)):
            if name != "rejected.jsonl" and not name.endswith(".tmp"):
                others.append(name)
        if others:
            names = ", ".join(others[:3])
            raise UserError("E117", f"{out} holds files that are no dataset of ours: {names}")
    if not manifest:
        return {}, progress
    check_sizes(out, manifest)
    remove(out, JOURNAL_FILES)  # killed after the manifest
    return manifest, {}


def changed_input(provenance: dict, inputs: list[Input]) -> str:
    """The first input that is not what it was, or ""; size and time are looked at first, contents
    where those differ."""
    before = [stored_input(values) for values in provenance["inputs"]]
    if provenance.get("rules", 1) < 2:
        # then names that are no UTF-8 were kept with a ?, and AppleDouble files were tried
        before = [given for given in before if not os.path.basename(given.path).startswith("._")]
        names = [given.name.encode("utf-8", "replace").decode() for given in inputs]
        inputs = [given._replace(name=name) for given, name in zip(inputs, names)]
    old = {(given.source, given.name): given for given in before}
    new = {(given.source, given.name): given for given in inputs}
    for key in [*old, *new]:
        if key not in new:
            return f"{old[key].path} is gone"
        if key not in old:
            return f"{new[key].path} is new"
        was, now = old[key], new[key]
        if (was.size, was.mtime, was.documents) == (now.size, now.mtime, now.documents):
            continue
        if was.kind == "synthetic" or was.sha256 != file_sha256(now.path):
            return f"{now.path} has changed"
    return ""


def say_finished(job: Job, manifest: dict) -> None:
    tokens, cut = manifest["splits"]["train"]["tokens"], manifest["counts"]["cut"]
    verify = f"python prepare_data.py --verify {job.out}"
    job.say(f"{job.out} is already there: {tokens:,} train tokens")
    job.say(f"its files have the right sizes; {verify} looks at every byte")
    if cut and manifest["provenance"].get("rules", 1) < RULES:
        documents = f"its {cut:,} longest documents hold an end-of-text at every cut"
        job.say(f"note: an older Lumen made it: {documents}")


def say_unread(job: Job, unread: dict) -> None:
    """What lies in the sources and is not read, a line for each reason."""
    endings = {}
    for why, (n, name) in unread.items():
        if why.startswith("ending "):
            endings[why.removeprefix("ending ")] = n
        else:
            job.say(f"not read: {n:,} {why}, as {name}")
    if endings:
        most = sorted(endings, key=lambda ending: (-endings[ending], ending))
        shown = [f"{ending} {endings[ending]:,}" for ending in most[:6]]
        if len(most) > 6:
            shown.append("...")
        total = sum(endings.values())
        job.say(f"not read: {total:,} files of other endings: {', '.join(shown)}")


def begin(job: Job, inputs: list[Input], unread: dict) -> dict:
    """The first progress.json: settings, and the inputs as they are now."""
    hashed = []
    for given in inputs:
        given = given._replace(sha256=file_sha256(given.path))
        hashed.append(given._replace(key=document_key(given) if given.long else ""))
    settings = dict(job.settings)
    if settings["val_fraction"] is None:
        size = sum(given.size for given in inputs)
        settings["val_fraction"] = 0.05 if size < 100_000_000 else 0.005
    provenance = {"inputs": hashed, "rules": RULES, "not_read": unread}
    progress = {"settings": settings, "provenance": provenance}
    write_dataset_json(os.path.join(job.out, "progress.json"), progress)
    return progress


def fill(job: Job, progress: dict, tokenizer: Tokenizer | None) -> dict:
    """The work itself, from where progress says to the manifest."""
    settings = progress["settings"]
    inputs = []
    for values in progress["provenance"]["inputs"]:
        given = stored_input(values)
        if given.kind != "tokenizer":
            inputs.append(given)
    total = sum(given.size for given in inputs)
    going_on = ", going on where it was" if "state" in progress else ""
    job.say(f"{len(inputs):,} inputs, {total / 1e6:,.1f} MB{going_on}")

    tokenizer = settle_tokenizer(job, settings, inputs, tokenizer)
    output = Output(job.out, progress, inputs, job.options["strict"], tokenizer)
    if "state" in progress:
        output.resume(progress["state"])
    workers = job.options["workers"]
    if workers is None:
        workers = 1 if total < 32 << 20 else min(os.cpu_count() or 1, 8)
    pace = encode(job, output, total, workers)

    say_rejected(job, output)
    refuse_bad_rows(job, output)
    say_made(job, output)
    job.say(pace.line(output))
    return finish(job, output, pace)


def settle_tokenizer(
    job: Job, settings: dict, inputs: list[Input], tokenizer: Tokenizer | None
) -> Tokenizer:
    """That of the folder, or the one given, or one that is trained now."""
    path = os.path.join(job.out, "tokenizer.json")
    if os.path.exists(path):
        return load(path)
    if tokenizer is None:
        began = time.monotonic()
        n_vocab = int(settings["tokenizer"].partition(":")[2])
        size = sum(given.size for given in inputs if given.split != "val")
        max_chars = TRAIN_CHARS if size > TRAIN_BYTES else None
        texts = training_texts(inputs, settings["seed"])
        tokenizer = train_bpe(texts, n_vocab, settings["tokenizer"], max_chars)
        text = f"tokenizer {tokenizer.name}: trained in {time.monotonic() - began:.1f} s"
        if tokenizer.n_vocab != n_vocab:
            text += f"; the text has pairs for {tokenizer.n_vocab:,} ids only"
        job.say(text)
    with new_file(path) as file:
        file.write(tokenizer.to_json().encode())
    return tokenizer


def training_texts(inputs: list[Input], seed: int):
    """What a vocabulary is trained on: all train text, or TRAIN_BYTES of it taken from all files
    alike."""
    inputs = [given for given in inputs if given.split != "val"]
    total = sum(given.size for given in inputs)
    credit = 0.0  # bytes that may still be read; what a file does not use the next one may
    for given in inputs:
        credit += given.size * TRAIN_BYTES / total if total > TRAIN_BYTES else math.inf
        if credit <= 0:
            continue
        for item in read_items(Reading(0, given, seed=seed)):
            for row in item_rows(item):
                if row.code is None:
                    credit -= len(row.value[:TRAIN_CHARS])
                    yield clean(row.value)
            if credit <= 0:
                break


class Pace(NamedTuple):
    done: int  # bytes
    seconds: float
    cpu_seconds: float  # of all processes
    workers: int

    def line(self, output: Output) -> str:
        splits = output.splits.values()
        ratio = sum(s.bytes_text for s in splits) / sum(s.tokens for s in splits)
        megabytes = self.done / 1e6
        return (
            f"{ratio:.2f} bytes per token; {megabytes:.1f} MB in {self.seconds:.1f} s with "
            f"{self.workers} process(es): {megabytes / self.cpu_seconds:.1f} MB/s of CPU time, "
            f"{megabytes / self.seconds:.1f} MB/s of wall time"
        )


def encode(job: Job, output: Output, total: int, workers: int) -> Pace:
    """All batches from the output's position on, into shards."""
    settings, size = output.settings, job.options["batch_bytes"]
    batches = read_batches(output.inputs, output.position, size, settings["seed"])
    given = (output.tokenizer, settings, token_dtype(output.tokenizer))
    began, cpu_began = time.monotonic(), time.process_time()
    done = 0
    worker_seconds = 0.0
    hidden = True if job.options["quiet"] else None  # None: on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, disable=hidden) as bar:
        for batch, (rows, seconds) in in_order(batches, workers, given):
            for index, row in rows:
                output.take(index, row)
            size = sum(len(item.data) for item in batch)
            bar.update(size)
            done += size
            if workers > 1:
                worker_seconds += seconds
    output.settle()
    seconds = max(time.monotonic() - began, 1e-6)
    cpu_seconds = max(time.process_time() - cpu_began + worker_seconds, 1e-6)
    return Pace(done, seconds, cpu_seconds, workers)


# ---------------------------------------------------------------- the end of it


def say_rejected(job: Job, output: Output) -> None:
    for code, lines in sorted(output.examples.items()):
        text = f"{code} {ERRORS[code][0]}: {output.counts[code]:,}"
        job.say("\n  ".join([text, *lines]))


def refuse_bad_rows(job: Job, output: Output) -> None:
    """E109: more bad rows than allowed, a whole file lost, or no text at all."""
    bad, rows = output.counts["bad"], output.counts["rows"]
    max_bad, tokens = job.options["max_bad"], output.splits["train"].tokens
    if bad <= max_bad * rows and tokens and not (output.lost and max_bad < 1):
        return
    first = "no text at all"
    for code, lines in sorted(output.examples.items(), reverse=True):
        if code != "E107":
            first = lines[0]
    lost = f"; whole files lost: {', '.join(output.lost[:3])}" if output.lost else ""
    text = f"{bad:,} of {rows:,} rows are bad{lost}; {tokens:,} train tokens; first: {first}"
    if tokens:
        share = 1 if lost else math.ceil(100 * bad / rows) / 100
        text += f"\n  --max_bad {share:g} does without them"
        text += f" (now {max_bad:g} of the rows may be bad)"
    raise UserError("E109", text)


def say_made(job: Job, output: Output) -> None:
    counts, settings = output.counts, output.settings
    train, val = output.splits["train"].tokens, output.splits["val"].tokens
    parts = f" in {counts['parts']:,} parts" if counts["parts"] > counts["kept"] else ""
    share = val / (train + val)
    tokens = f"tokens: train {train:,}, val {val:,} ({share:.2%})"
    job.say(f"{counts['kept']:,} documents{parts}; {tokens}")
    if not any(given.split == "hash" for given in output.inputs):
        return
    asked = settings["val_fraction"]
    if asked and not asked / 2 <= share <= asked * 2:
        job.say(
            f"note: {share:.1%} are validation, {asked:.1%} were asked for; documents are drawn "
            "whole, and they are few or of very unequal length; another --seed draws anew, "
            "--val FILE names what to hold out"
        )


def finish(job: Job, output: Output, pace: Pace) -> dict:
    """The last files, and at the very last the manifest, which is returned."""
    out = job.out
    with new_file(os.path.join(out, "token_bytes.npy")) as file:
        np.save(file, output.tokenizer.token_bytes())
    write_dataset_json(os.path.join(out, "report.json"), make_report(output))
    manifest = make_manifest(output)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions["tiktoken"] = tiktoken.__version__
    manifest["provenance"] = output.header["provenance"] | {
        "versions": versions,
        "unicode": unicodedata.unidata_version,
        "folder": os.path.abspath(out),
        "host": platform.node(),
        "seconds": round(pace.seconds, 2),
        "cpu_seconds": round(pace.cpu_seconds, 2),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_dataset_json(os.path.join(out, "manifest.json"), manifest)
    remove(out, JOURNAL_FILES)
    tokens = output.splits["train"].tokens
    if tokens > 1024:
        job.say(f"{out} is ready")
    else:
        small = f"its {tokens:,} train tokens make no row of max_seq_len {tokens:,} or more"
        job.say(f"{out} is written, but it is small: {small}")
    return read_dataset_json(os.path.join(out, "manifest.json"))


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    """The command line; an option's name may be written with - or _."""
    if argv[:1] == ["--verify"] and len(argv) == 2:
        return verify(expand(argv[1]))
    more = "python prepare_data.py --verify FOLDER holds finished data against the sums in its"
    about = {"description": __doc__.partition("\n")[0], "epilog": f"{more} manifest.json"}
    parser = Words(prog="prepare_data.py", **about)
    sources = "file, folder, stdlib, synthetic:N (documents)"
    tokenizers = "bpe:N (trained, N ids in all), bytes, a tokenizer.json, " + ", ".join(NAMED)
    val = "validation text, instead of a share"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--tokenizer", default="bpe:8192", help=tokenizers)
    parser.add_argument("--val", nargs="+", dest="val_sources", metavar="FILE", help=val)
    for name, (default, meaning) in OPTIONS.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
        else:
            kind = float if name in ("val_fraction", "max_bad") else int
            parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    command(main, lasting=True)
