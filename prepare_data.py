"""Text and conversations to token shards:

    python prepare_data.py SOURCE... --out data/NAME --tokenizer bpe:8192
    python prepare_data.py data.yaml          several sources with names and weights
    python prepare_data.py --verify data/NAME

SOURCE is a file, a folder or a glob of what lumen/readers.py can read; `hf:NAME` of the Hugging
Face hub; `stdlib` (the running Python's own library, 11 MB, no download), `packages`, `docstrings`
(conversations), or `synthetic:N` (N generated documents, the same on every machine).

    data/NAME/train_00000.npy ... val_00000.npy ...  1-D ids; a text ends with the id of
                                                     end-of-text, and has no other
              train_00000.docs.npy ...               uint64: where documents begin; the length
              train_00000.mask.npy ...               of conversations: 1 where a token is a target
              tokenizer.json  token_bytes.npy
              report.json  DATA_CARD.md  lengths.png  rejected.jsonl
              manifest.json                          last: where it is, the folder is complete

The bytes of all this depend on the text and the settings only, not on the number of processes, the
size of batches, or how often the preparation was killed and started again. Only the manifest's
block `provenance` (when, where, how fast, which files) is outside that promise and its
fingerprint. `--verify FOLDER` holds finished shards against the sums in its manifest.

*.docs.npy of a shard holds, in order, every place where a document begins, and at last the shard's
length. A document over the border of two shards begins in the first: then 0 is not in that of the
second shard (its first entry is where the next document begins), and the length of the first is
there although no document ends. All lengths less one, added up, are the number of documents.

How: the parent cuts the inputs into batches of items; a pool of processes (lumen/pool.py), or this
one, parses, cleans, judges, hashes and encodes a batch (lumen/encode.py); the parent takes the
results in order, drops duplicates, decides the split, fills shards (lumen/output.py). The split is
one draw a document. Whenever a shard is closed at the start of a row, or of a piece of a long text
file, progress.json (replaced atomically) records where that was.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
import unicodedata
from collections import Counter
from functools import partial
from typing import NamedTuple

import lumen.early  # noqa: F401 - before what takes time
import numpy as np
import tiktoken
import yaml
from tqdm import tqdm

from lumen import chat, near, prepare_names
from lumen.datacard import draw_lengths, make_report, meaning_of, write_card
from lumen.decontaminate import Contaminated
from lumen.encode import Cleaner, Encoder
from lumen.errors import ERRORS, UserError, expand, raise_if
from lumen.files import sha256
from lumen.folder import DATASET_FILES, JOURNAL_FILES, holding, look_into, remove
from lumen.launch import Words, command, in_bytes, speak
from lumen.manifest import make_manifest, read_dataset_json, token_dtype, verify
from lumen.output import Output, is_bad
from lumen.passes import Pass, dry_run, find_near_duplicates, read_batches, read_keys, text_of
from lumen.pool import in_order
from lumen.recipe import (
    CONVERSATIONS,
    FLOATS,
    OPTIONS,
    SWITCHES,
    Job,
    Mixture,
    evaluation_files,
    plan_job,
    read_mixture,
    rows_of,
)
from lumen.rules import Rules
from lumen.shards import Growing, new_file, to_utf8, write_dataset_json, write_keys
from lumen.sources import (
    Input,
    Reading,
    document_key,
    file_sha256,
    find_inputs,
    item_rows,
    label,
    read_items,
    settle_shapes,
    stored_input,
)
from lumen.tokenizer import NAMED, Tokenizer, load, locate, train_bpe

# In provenance. 2: a document has one end of text; before, each of its parts had one.
RULES = 2
SHOWN_TOKENS = 2000  # of a row, at most, by --show
# A BPE vocabulary is trained on this much, taken from all files alike, and then on the first so
# many characters of a document; where there is less text, on all of it.
TRAIN_BYTES = 200_000_000
TRAIN_CHARS = 10_000

# ---------------------------------------------------------------- the dataset


def prepare(
    sources: list[str],
    out: str,
    tokenizer="bpe:8192",
    val_sources: list[str] | None = None,
    **options,
) -> dict:
    """Makes the dataset `out`, goes on with one that was interrupted, or finds it finished; returns
    its manifest. Options: recipe.OPTIONS, with its defaults.

    E002 options; E003 a worker died, or a package is missing; E101 to E106 and E108 with strict;
    E109 too many bad rows; E111 a finished shard is damaged; E115, E116 tokenizer; E117 out holds
    something else; E119 disk full (the same command goes on later); E120 sources of several
    kinds."""
    return prepare_job(plan_job(sources, out, tokenizer, val_sources, options))


def prepare_job(job: Job) -> dict:
    with holding(job.out, job.say):
        unread = {}
        inputs = find_all_inputs(job, unread)
        manifest, progress = look_into(job.out, job.settings, inputs, partial(conversations, job))
        if job.options["export_clean"]:
            check_export(job, inputs or [], manifest, progress.get("state"))
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


def prepare_mixture(file: str, typed: dict) -> dict[str, dict]:
    """A data.yaml: each source becomes a dataset under `out`, all with one tokenizer, and no text
    twice among them. Returns their manifests by name; out/mixture.yaml is a run's `data:` block.

    The order of the sources decides which of them keeps a text that two have. E002 and as
    prepare."""
    mixture = read_mixture(file, typed)
    first = next(iter(mixture.jobs.values()))
    manifests, taken = {}, ()
    with holding(mixture.out, first.say):
        shared = share(mixture, first)
        for name, job in mixture.jobs.items():
            after = [manifest["fingerprint"] for manifest in manifests.values()]
            settings = job.settings | {"after": after} | shared.settings
            job = job._replace(settings=settings, taken=taken, near=shared.near)
            job = job._replace(tokenizer=shared.tokenizer)
            first.say(f"source {name}:")
            manifests[name] = prepare_job(job)
            taken += (job.out,)
        block = {name: {"dir": name, "weight": w} for name, w in mixture.weights.items()}
        write_block(os.path.join(mixture.out, "mixture.yaml"), {"data": {"sources": block}})
    first.say(f"{mixture.out} is ready: data_dir: {mixture.out}")
    return manifests


def write_block(path: str, block: dict) -> None:
    """Where it is there already, the folder may be read-only."""
    data = to_utf8(yaml.safe_dump(block, sort_keys=False))
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() == data:
                return
    with new_file(path) as file:
        file.write(data)


class Shared(NamedTuple):
    """What the datasets of a mixture have in common."""

    tokenizer: str  # a name, or the file
    near: str  # keys of near-duplicates among all of them, or ""
    settings: dict


def is_finished(mixture: Mixture) -> bool:
    """Whether a run can have it: then its texts may be gone."""
    try:
        with open(os.path.join(mixture.out, "mixture.yaml"), encoding="utf-8") as opened:
            names = list(yaml.safe_load(opened)["data"]["sources"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    folders = [job.out for job in mixture.jobs.values()]
    whole = all(os.path.exists(os.path.join(folder, "manifest.json")) for folder in folders)
    return whole and names == list(mixture.jobs)


def share(mixture: Mixture, first: Job) -> Shared:
    """One tokenizer, trained on the text of all sources; one search for near-duplicates."""
    path = os.path.join(mixture.out, "tokenizer.json")
    tokenizer = path if first.trains_tokenizer else first.tokenizer
    settings = {"tokenizer": first.settings["tokenizer"]}
    if is_finished(mixture):
        if any("minhash" in job.settings for job in mixture.jobs.values()):
            made = read_dataset_json(os.path.join(first.out, "manifest.json"))
            settings["near"] = made["settings"].get("near")
        return Shared(tokenizer, "", settings)
    passes = []
    for job in mixture.jobs.values():
        inputs = find_all_inputs(job, {}) or []
        passes.append(plan_pass(job, *survey(job, inputs)))
    if first.trains_tokenizer:
        # another one stays where a command was killed, and then given another vocabulary
        if not os.path.exists(path) or load(path).name != first.tokenizer:
            train_tokenizer(first, passes, path)
    alike = [over for over in passes if "minhash" in over.settings]
    near = ""
    if alike:
        near = find_near_duplicates(alike, mixture.out, load(tokenizer))
        settings["near"] = sha256(near)
    return Shared(tokenizer, near, settings)


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
        for path in evaluation_files(job.options):
            if not os.path.isfile(path):
                raise UserError("E108", f"--decontaminate {path}: there is no such file")
        tokenizer = None if job.trains_tokenizer else locate(job.tokenizer)
    except UserError:
        if not os.path.exists(os.path.join(job.out, "manifest.json")):
            raise
        return None
    if tokenizer:
        file = Input(-1, "val", "tokenizer", job.settings["tokenizer"], tokenizer)
        inputs.append(file.measured())
    for path in evaluation_files(job.options):
        inputs.append(Input(-1, "val", "evaluation", label(path), path).measured())
    return inputs


def check_export(job: Job, inputs: list[Input], manifest: dict, state: dict | None) -> None:
    """E002: what --export_clean names is an input, or can not be what was kept: the data were made,
    or begun, without it."""
    path = expand(job.options["export_clean"])
    where = os.path.realpath(path)
    for given in inputs:
        if os.path.realpath(given.path) == where:
            raise UserError("E002", f"--export_clean {path} is a source; give it another name")
    if manifest and not os.path.exists(path):
        text = f"{job.out} is finished, and rows are written while it is made"
        remedy = "--validate_only --export_clean FILE writes them alone"
        raise UserError("E002", f"--export_clean {path}: {text}; {remedy}")
    if state is None:
        return
    size = state.get("exported_bytes")
    if size is None or size > (os.path.getsize(path) if os.path.exists(path) else 0):
        text = f"it lacks what was kept before {job.out} was interrupted"
        remedy = "without it the same command goes on; remove the folder to begin anew"
        raise UserError("E002", f"--export_clean {path}: {text}; {remedy}")


def say_finished(job: Job, manifest: dict) -> None:
    tokens, cut = manifest["splits"]["train"]["tokens"], manifest["counts"]["cut"]
    verify = f"python prepare_data.py --verify {job.out}"
    job.say(f"{job.out} is already there: {tokens:,} train tokens")
    job.say(f"its files have the right sizes; {verify} looks at every byte")
    dropped = manifest["counts"]["dropped"]
    bad = sum(n for code, n in dropped.items() if is_bad(code))
    if bad and job.options["strict"]:
        job.say(f"note: --strict is for the making; {bad:,} rows were bad then: rejected.jsonl")
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


def conversations(job: Job, shape: str) -> dict:
    """The settings that rows of this shape have beside the others."""
    return rows_of(shape, job.options, chat.describe(job.options["template"]))


def survey(job: Job, inputs: list[Input]) -> tuple[dict, list[Input]]:
    """The settings in full, and the texts with their field and the shape of their rows."""
    read = []
    for given in inputs:
        if given.source >= 0:
            read.append(given._replace(field=given.field or job.options["field"]))
    read, shape, lines = settle_shapes(read)
    # a long file without its key is read as one without text
    read = [given._replace(key=document_key(given) if given.long else "") for given in read]
    for line in lines:
        job.say(line)
    settings = job.settings | conversations(job, shape)
    if settings["val_fraction"] is None:
        size = sum(given.size for given in read)
        settings["val_fraction"] = 0.05 if size < 100_000_000 else 0.005
    return settings, read


def begin(job: Job, inputs: list[Input], unread: dict) -> dict:
    """The first progress.json: settings, and the inputs as they are now."""
    settings, read = survey(job, inputs)
    say_idle(job, settings)
    hashed = []
    for given in [*read, *(given for given in inputs if given.source < 0)]:
        hashed.append(given._replace(sha256=file_sha256(given.path)))
    provenance = {"inputs": hashed, "rules": RULES, "not_read": unread}
    progress = {"settings": settings, "provenance": provenance}
    write_dataset_json(os.path.join(job.out, "progress.json"), progress)
    return progress


def say_idle(job: Job, settings: dict) -> None:
    """Which options do nothing here."""
    shape, idle = "conversations", ("max_doc_chars",)
    if "rows" not in settings:
        shape, idle = "texts", [name for name in CONVERSATIONS if name != "seq_len"]  # a run's own
    asked = [f"--{name}" for name in idle if job.options[name] != OPTIONS[name][0]]
    if asked:
        job.say(f"note: these are {shape}: {', '.join(asked)} does nothing")


def fill(job: Job, progress: dict, tokenizer: Tokenizer | None) -> dict:
    """The work itself, from where progress says to the manifest."""
    settings = progress["settings"]
    stored = [stored_input(values) for values in progress["provenance"]["inputs"]]
    inputs = [given for given in stored if given.source >= 0]
    total = sum(given.size for given in inputs)
    going_on = ", going on where it was" if "state" in progress else ""
    job.say(f"{len(inputs):,} inputs, {in_bytes(total)}{going_on}")
    over = plan_pass(job, settings, inputs)
    say_rules(over)

    tokenizer = settle_tokenizer(over, tokenizer)
    if "rows" in settings:
        chat.check_tokenizer(settings["rows"]["template"], tokenizer)
    output = Output(job.out, progress, inputs, job.options["strict"], tokenizer)
    if "minhash" in settings:
        near_keys = job.near or find_near_duplicates([over], job.out, tokenizer)
        output.near = read_keys(near_keys)
    for folder in job.taken:
        output.elsewhere.append(read_keys(os.path.join(folder, "keys.npy")))
    if job.options["export_clean"]:
        output.exported = Growing(expand(job.options["export_clean"]))
    if "state" in progress:
        output.resume(progress["state"])
    pace = encode(over, output)

    refused = bad_rows(job, output)
    say_rejected(job, output, refused.text if refused else "")
    raise_if(refused)
    say_made(job, output)
    job.say(pace.line(output))
    return finish(job, output, pace)


def plan_pass(job: Job, settings: dict, inputs: list[Input]) -> Pass:
    workers = job.options["workers"]
    if workers is None:
        total = sum(given.size for given in inputs)
        workers = 1 if total < 32 << 20 else min(os.cpu_count() or 1, 8)
    files = evaluation_files(job.options)
    return Pass(job, settings, inputs, workers, Contaminated(files) if files else None)


def say_rules(over: Pass) -> None:
    """What is kept and why, before anything is dropped. E003 here, not in a worker, where a package
    is missing."""
    lines = []
    if "rules" in over.settings:
        lines += Rules(over.settings["rules"]).explain()
    if "minhash" in over.settings:
        lines += near.explain(over.settings["minhash"])
    if over.evaluation:
        lines += over.evaluation.explain()
    unjudged = [given.path for given in over.inputs if given.long]
    if lines and unjudged:
        long = "in pieces: no rule, and no likeness to others, drops it"
        lines.append(f"note: a text file above 16 MiB is read {long} ({', '.join(unjudged[:3])})")
    for line in lines:
        over.job.say(line)


def settle_tokenizer(over: Pass, tokenizer: Tokenizer | None) -> Tokenizer:
    """That of the folder, or the one given, or one that is trained now."""
    path = os.path.join(over.job.out, "tokenizer.json")
    if os.path.exists(path):
        return load(path)
    if tokenizer is None:
        return train_tokenizer(over.job, [over], path)
    for line in filter(None, [getattr(tokenizer, "reason", ""), *tokenizer.caveats()]):
        over.job.say(f"tokenizer: {line}")
    with new_file(path) as file:
        file.write(tokenizer.to_json().encode())
    return tokenizer


def train_tokenizer(job: Job, passes: list[Pass], path: str) -> Tokenizer:
    """bpe:N on the text of all passes, alike; written to `path`."""
    began = time.monotonic()
    spec = job.settings["tokenizer"]
    n_vocab = int(spec.partition(":")[2])
    total = sum(given.size for over in passes for given in over.inputs if given.split != "val")
    max_chars = TRAIN_CHARS if total > TRAIN_BYTES else None
    job.say(f"tokenizer {spec}: reading {in_bytes(min(total, TRAIN_BYTES))} to train it")
    texts = (text for over in passes for text in training_texts(over.settings, over.inputs, total))
    tokenizer = train_bpe(texts, n_vocab, spec, max_chars)
    text = f"tokenizer {tokenizer.name}: trained in {time.monotonic() - began:.1f} s"
    if tokenizer.n_vocab != n_vocab:
        text += f"; the text has pairs for {tokenizer.n_vocab:,} ids only"
    job.say(text)
    with new_file(path) as file:
        file.write(tokenizer.to_json().encode())
    return tokenizer


def training_texts(settings: dict, inputs: list[Input], total: int):
    """What a vocabulary is trained on: all train text, or TRAIN_BYTES of it taken from all files
    alike. total: bytes of all that it is trained on."""
    inputs = [given for given in inputs if given.split != "val"]
    credit = 0.0  # bytes that may still be read; what a file does not use the next one may
    cleaner = Cleaner(settings)
    for given in inputs:
        credit += given.size * TRAIN_BYTES / total if total > TRAIN_BYTES else math.inf
        if credit <= 0:
            continue
        for item in read_items(Reading(0, given, seed=settings["seed"])):
            for row in item_rows(item):
                if row.code is None:
                    row = cleaner.look(item, row)
                if row.code is None:
                    text = text_of(row.value.value)
                    credit -= len(text[:TRAIN_CHARS])
                    yield text
            if credit <= 0:
                break


class Pace(NamedTuple):
    done: int  # bytes
    seconds: float
    cpu_seconds: float  # of all processes
    workers: int
    stages: dict  # CPU seconds of reading, cleaning, encoding

    def line(self, output: Output) -> str:
        splits = output.splits.values()
        ratio = sum(s.bytes_text for s in splits) / sum(s.tokens for s in splits)
        megabytes = self.done / 1e6
        by = f"by {self.workers} processes" if self.workers > 1 else "by 1 process"
        return (
            f"{ratio:.2f} bytes per token; {in_bytes(self.done)} in {self.seconds:.1f} s {by}: "
            f"{megabytes / self.cpu_seconds:.1f} MB/s of CPU time, "
            f"{megabytes / self.seconds:.1f} of wall time"
        )


def encode(over: Pass, output: Output) -> Pace:
    """All batches from the output's position on, into shards."""
    settings, options = output.settings, over.job.options
    batches = read_batches(output.inputs, output.position, options["batch_bytes"], settings["seed"])
    more = {"evaluation": over.evaluation, "keep": bool(options["export_clean"])}
    given = (settings, output.tokenizer, token_dtype(output.tokenizer), more)
    began, cpu_began = time.monotonic(), time.process_time()
    done = 0
    stages = Counter()
    hidden = True if options["quiet"] else None  # None: on a terminal only
    with tqdm(total=over.total, unit="B", unit_scale=True, disable=hidden) as bar:
        for batch, (rows, seconds) in in_order(batches, over.workers, Encoder, given):
            for index, row in rows:
                output.take(index, row)
            size = sum(len(item.data) for item in batch)
            bar.update(size)
            done += size
            stages += seconds
    output.settle()
    seconds = max(time.monotonic() - began, 1e-6)
    cpu_seconds = max(time.process_time() - cpu_began, 1e-6)
    if over.workers > 1:  # with one worker it is this process
        cpu_seconds += sum(stages.values())
    return Pace(done, seconds, cpu_seconds, over.workers, dict(stages))


# ---------------------------------------------------------------- the end of it


def say_rejected(job: Job, output: Output, told: str) -> None:
    """A line for each reason, and the first rows; what the error `told` shows is not repeated."""
    for code, lines in sorted(output.examples.items()):
        if code == "E107":  # as in any collection of texts: no mistake of anybody's
            job.say(f"left out: {output.counts[code]:,} exact duplicates; rejected.jsonl has them")
            continue
        text = f"{code} {meaning_of(code)}: {output.counts[code]:,}"
        shown = lines[:1] if code.startswith("rule:") else lines  # those are many, and no mistakes
        if shown := [line for line in shown if line not in told]:
            job.say("\n  ".join([text, *shown]))


def bad_rows(job: Job, output: Output) -> UserError | None:
    """E109: more bad rows than allowed, a whole file lost, or no text at all."""
    bad, rows = output.counts["bad"], output.counts["rows"]
    max_bad, tokens = job.options["max_bad"], output.splits["train"].tokens
    if bad <= max_bad * rows and tokens and not (output.lost and max_bad < 1):
        return None
    # a text is a file, where no format has rows
    what = "files" if all(given.kind == "text" for given in output.inputs) else "rows"
    if not bad and not tokens and output.examples:
        most = max(output.examples, key=lambda code: output.counts[code])
        why = f"{most} {meaning_of(most)}: {output.counts[most]:,}, as {output.examples[most][0]}"
        return UserError("E109", f"nothing is left to train on of {rows:,} {what}; {why}")
    first, shapes = "no text at all", ""
    for code, lines in sorted(output.examples.items(), reverse=True):
        if is_bad(code):
            first = lines[0]
            shapes = f"\n  {ERRORS[code][1]}" if code == "E102" else ""
    lost = f"; whole files lost: {', '.join(output.lost[:3])}" if output.lost else ""
    verb = "is" if bad == 1 else "are"
    text = f"{bad:,} of {rows:,} {what} {verb} bad{lost}; {tokens:,} train tokens; first: {first}"
    text += shapes
    if tokens:
        share = 1 if lost else math.ceil(100 * bad / rows) / 100
        text += f"\n  --max_bad {share:g} does without them"
        text += f" (now {max_bad:g} of the {what} may be bad)"
    if bad:
        text += f"\n  all of them: {os.path.join(job.out, 'rejected.jsonl')}"
    return UserError("E109", text)


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
    if "after" in output.settings:  # other sources of the mixture will ask
        write_keys(os.path.join(out, "keys.npy"), output.seen)
    manifest = make_manifest(output)
    report = make_report(output)
    write_dataset_json(os.path.join(out, "report.json"), report)
    write_card(out, report, manifest)
    if not job.options["quiet"] and not draw_lengths(out, output.splits):
        job.say("no lengths.png: pip install matplotlib")
    manifest["provenance"] = output.header["provenance"] | {
        "versions": versions(),
        "unicode": unicodedata.unidata_version,
        "folder": os.path.abspath(out),
        "host": platform.node(),
        "seconds": round(pace.seconds, 2),
        "cpu_seconds": round(pace.cpu_seconds, 2),
        "stages": {name: round(spent, 2) for name, spent in pace.stages.items()},
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_dataset_json(os.path.join(out, "manifest.json"), manifest)
    remove(out, JOURNAL_FILES)
    tokens = output.splits["train"].tokens
    if tokens > 1024 or output.rows_made:
        job.say(f"{out} is ready")
    else:
        small = f"its {tokens:,} train tokens make no row of max_seq_len {tokens:,} or more"
        job.say(f"{out} is written, but it is small: {small}")
    return read_dataset_json(os.path.join(out, "manifest.json"))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__}
    return found | {"tiktoken": tiktoken.__version__}


# ---------------------------------------------------------------- looking, without making data


def validate(sources: list[str], options: dict) -> None:
    """Prepares into a folder that is removed, and prints its card. E109 and as prepare."""
    with tempfile.TemporaryDirectory(prefix="validate_") as folder:
        out = os.path.join(folder, "data")
        try:
            prepare(sources, **options | {"out": out})
        except UserError as error:  # its last line may name a file there
            lines = [line for line in error.text.split("\n") if folder not in line]
            raise UserError(error.code, "\n".join(lines)) from None
        with open(os.path.join(out, "DATA_CARD.md"), encoding="utf-8") as file:
            speak(file.read())


def say_what_rules_drop(sources: list[str], options: dict) -> None:
    """What each rule would drop if it stood alone, with examples."""
    only = {name: value for name, value in options.items() if name in OPTIONS}
    job = plan_job(sources, "unused", "bytes", None, only)
    over = plan_pass(job, *survey(job, find_all_inputs(job, {})))
    say_rules(over)
    examples, counts = dry_run(over)
    for line in examples.lines():
        job.say(line)
    bad = ", ".join(f"{code} {n:,}" for code, n in sorted(counts.items()) if code != "rows")
    job.say(f"{counts['rows']:,} rows looked at, nothing written; not readable: {bad or 'none'}")


def show_rows(folder: str, n: int) -> None:
    """The first n rows of a dataset, or documents of plain text, with what is supervised in
    green."""
    manifest = read_dataset_json(os.path.join(folder, "manifest.json"))
    tokenizer = load(folder)
    shard = manifest["splits"]["train"]["shards"][0]
    ids = np.load(os.path.join(folder, shard["file"]), mmap_mode="r", allow_pickle=False)
    places = np.load(os.path.join(folder, shard["docs_file"]), allow_pickle=False).astype(int)
    if manifest.get("kind") == "chat":
        places = np.arange(0, len(ids) + 1, manifest["rows"]["length"])
    if "mask_file" in shard:
        mask = np.load(os.path.join(folder, shard["mask_file"]), mmap_mode="r", allow_pickle=False)
    else:
        mask = np.zeros(len(ids), np.uint8)
    for begin, end in list(zip(places, places[1:]))[:n]:
        end = min(end, begin + SHOWN_TOKENS)
        speak(chat.show(np.array(ids[begin:end]), np.array(mask[begin:end]), tokenizer))
        speak("-" * 60)


# ---------------------------------------------------------------- the command


def arguments() -> Words:
    """What is not typed is not there: data.yaml or OPTIONS has it then."""
    more = "python prepare_data.py --verify FOLDER holds finished data against the sums in its"
    about = {"description": __doc__.partition("\n")[0], "epilog": f"{more} manifest.json"}
    parser = Words(prog="prepare_data.py", argument_default=argparse.SUPPRESS, **about)
    sources = "file, folder, 'glob', hf:NAME, stdlib, packages, docstrings, synthetic:N; or a .yaml"
    tokenizers = "bpe:N (trained, N ids in all), bytes, a tokenizer.json, hf:NAME, "
    val = "validation text, instead of a share"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=sources)
    parser.add_argument("--out", help="folder of the dataset")
    parser.add_argument("--tokenizer", help=tokenizers + ", ".join(NAMED))
    parser.add_argument("--val", nargs="+", dest="val_sources", metavar="FILE", help=val)
    parser.add_argument("--show", type=int, help="print so many rows, what is supervised in green")
    look = "print what the data would be like, leave nothing on the disk"
    parser.add_argument("--validate_only", action="store_true", help=look)
    drop = "print what each rule would drop, with examples, and make nothing"
    parser.add_argument("--dry_run", action="store_true", help=drop)
    for name, (default, meaning) in OPTIONS.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
        else:
            parser.add_argument(f"--{name}", type=kind_of(name), help=meaning)
    return parser


def main(argv: list[str]) -> None:
    """The command line; an option's name may be written with - or _."""
    if argv[:1] == ["--verify"] and len(argv) == 2:
        return verify(expand(argv[1]))
    options, notes = prepare_names.read(argv, arguments())
    if not options.get("quiet"):
        for note in notes:
            speak(note)
    sources, shown = options.pop("sources", []), options.pop("show", 0)
    validate_only, dry = options.pop("validate_only", False), options.pop("dry_run", False)
    if not sources:
        text = "which text? python prepare_data.py SOURCE --out data/NAME, or a data.yaml"
        raise UserError("E002", text)
    if len(sources) == 1 and prepare_names.is_mixture(sources[0]):
        if validate_only or dry or shown or "val_sources" in options:
            text = "--validate_only, --dry_run, --show and --val are for sources, not for a YAML"
            raise UserError("E002", text)
        prepare_mixture(sources[0], options)
    elif dry:
        say_what_rules_drop(sources, options)
    elif validate_only:
        validate(sources, options)
    elif "out" not in options:
        raise UserError("E002", "--out is missing: the folder of the dataset")
    else:
        try:
            prepare(sources, **options)
        except KeyboardInterrupt:
            speak("stopped; the same command goes on where it was")
            raise
        if shown:
            show_rows(expand(options["out"]), shown)


def kind_of(name: str):
    """What an option of OPTIONS is read as."""
    default = OPTIONS[name][0]
    if isinstance(default, str):
        return str
    if name in SWITCHES:
        return switch
    return float if name in FLOATS else int


def switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


if __name__ == "__main__":
    command(main, lasting=True)
