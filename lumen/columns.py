"""Tables to items: .parquet, .arrow (file and stream), and `hf:` through `datasets`.

An item is some rows of the wanted columns as Arrow's IPC stream: the parent copies buffers and
makes no Python object of any value. Its offset is the number of its first row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from lumen.errors import UserError
from lumen.inputs import LONGEST, RATIO, Input, Item, Reading, Unreadable
from lumen.rows import TEXT_FIELDS
from lumen.streams import needs

# Rows that are decoded at once, at most: a page's dictionary may hold a value of 1 MiB that all
# rows of a batch share.
ROWS = 256
SPLITS = ("train", "validation", "valid", "val", "dev", "test")

# ---------------------------------------------------------------- record batches to items


def table_items(reading: Reading, batches) -> Iterator[Item]:
    """Items of about reading.block bytes from (number of its first row, record batch) pairs,
    without the rows before reading.offset. Unreadable E121: damaged; the rows before it are
    kept."""
    pyarrow = needs("pyarrow", reading.given.path)
    at = reading.offset  # the next row
    held = []
    size = 0
    try:
        for first, batch in batches:
            if first + batch.num_rows <= reading.offset:
                continue
            for part in parts_of(batch.slice(max(0, reading.offset - first)), reading.block):
                held.append(part)
                size += part.nbytes
                at += part.num_rows
                if size >= reading.block:
                    yield table_item(reading, at, held)
                    held = []
                    size = 0
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, Unreadable) as error:
        failed = why_damaged(error, at)
    else:
        failed = None
    if held:
        yield table_item(reading, at, held)
    if failed:
        raise failed


def why_damaged(error: Exception, at: int) -> Unreadable:
    if isinstance(error, Unreadable):
        return error
    first_line = str(error).strip().partition("\n")[0][:200]
    if isinstance(error, KeyError):
        return Unreadable("E102", f"another schema from here on: {first_line}", at, at + 1)
    if isinstance(error, OSError) and error.errno:
        return Unreadable("E108", error.strerror or first_line, at, at + 1)
    return Unreadable("E121", f"truncated or damaged: {first_line}", at, at + 1)


def parts_of(batch, block: int) -> Iterator:
    """Slices of a record batch of about `block` bytes each."""
    rows = max(1, batch.num_rows * block // max(batch.nbytes, 1))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def table_item(reading: Reading, end: int, parts: list) -> Item:
    """`end` is the number of the row after the last."""
    pyarrow = needs("pyarrow", reading.given.path)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, parts[0].schema) as writer:
        for part in parts:
            writer.write_batch(part)
    first = end - sum(part.num_rows for part in parts)
    return Item(reading.index, "table", first, first + 1, sink.getvalue().to_pybytes())


# ---------------------------------------------------------------- which columns


def wanted_columns(given: Input, schema) -> list[str]:
    """The column of the text or of the messages; without a given one and where the rows are no
    texts, all that JSON can hold. Unreadable E102: there is none."""
    fitting = [field.name for field in schema if is_json(field.type)]
    if given.field:
        wanted = [given.field]
    elif given.shape == "text":
        texts = {field.name for field in schema if is_text(field.type)}
        wanted = [name for name in TEXT_FIELDS if name in texts][:1]
    else:
        wanted = fitting
    if wanted and set(wanted) <= set(fitting):
        return wanted
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    name = given.field or "of text"
    raise Unreadable("E102", f"no column {name}; the columns are {columns[:300]}", 0, 1)


def is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    strings = types.is_string(kind) or types.is_large_string(kind) or is_view(kind)
    return strings or types.is_binary(kind) or types.is_large_binary(kind)


def is_view(kind) -> bool:
    from pyarrow import types

    return types.is_string_view(kind) or types.is_binary_view(kind)


def is_json(kind) -> bool:
    """Whether the values are text, numbers, or lists and objects of such."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(is_json(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_json(kind.value_type)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return numbers or is_text(kind) or types.is_null(kind)


def as_strings(batch):
    """The batch with its columns of text as plain strings: a file may have them as bytes, as views,
    or by a dictionary, which every item would carry. Bad UTF-8 is left for the rows to find."""
    import pyarrow

    columns = []
    for column in batch.columns:
        plain = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        if is_text(column.type) and not plain:
            column = column.cast(pyarrow.large_binary()).cast(pyarrow.large_string(), safe=False)
        columns.append(column)
    return pyarrow.record_batch(columns, names=batch.schema.names)


# ---------------------------------------------------------------- .parquet


def read_parquet(reading: Reading) -> Iterator[Item]:
    if not os.path.isfile(reading.given.path):
        raise OSError("not a regular file")
    return table_items(reading, parquet_batches(reading))


def parquet_batches(reading: Reading):
    """(number of its first row, record batch) from the row group of reading.offset on."""
    parquet = needs("pyarrow.parquet", reading.given.path)
    options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
    with parquet.ParquetFile(reading.given.path, **options) as file:
        columns = wanted_columns(reading.given, file.schema_arrow)
        at = 0
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            if at + group.num_rows <= reading.offset:
                at += group.num_rows
                continue
            rows = rows_at_once(group, columns, at)
            more = {"row_groups": [index], "columns": columns, "use_threads": False}
            for batch in file.iter_batches(rows, **more):
                yield at, as_strings(batch)
                at += batch.num_rows


def rows_at_once(group, columns: list[str], at: int) -> int:
    """How many rows of a row group are decoded at once. Unreadable E122: it unpacks to more than it
    may."""
    packed = unpacked = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.partition(".")[0] in columns:
            packed += column.total_compressed_size
            unpacked += column.total_uncompressed_size
    if unpacked > max(LONGEST, RATIO * packed):
        reason = f"{packed:,} bytes of a row group unpack to {unpacked:,}"
        raise Unreadable("E122", f"{reason}; the limit is {RATIO} times as many", at, at + 1)
    return max(1, min(ROWS, LONGEST * group.num_rows // max(unpacked, 1)))


# ---------------------------------------------------------------- .arrow


def read_arrow(reading: Reading) -> Iterator[Item]:
    if not os.path.isfile(reading.given.path):
        raise OSError("not a regular file")
    return table_items(reading, arrow_batches(reading))


def arrow_batches(reading: Reading):
    """Of an IPC file, or of the stream that `datasets` keeps. Read, not mapped: who reads a mapping
    past the end of a file that was just truncated is killed (SIGBUS). A batch is held whole."""
    pyarrow = needs("pyarrow", reading.given.path)
    with pyarrow.OSFile(reading.given.path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        ipc = pyarrow.ipc
        make = ipc.open_file if is_file else ipc.open_stream
        schema = make(file).schema
        file.seek(0)
        columns = wanted_columns(reading.given, schema)
        fields = [i for i, field in enumerate(schema) if field.name in columns]
        options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        reader = make(file, options=options)
        batches = reader
        if is_file:
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        at = 0
        for batch in batches:
            check_offsets(batch)
            yield at, as_strings(batch)
            at += batch.num_rows


def check_offsets(batch) -> None:
    """Arrow believes a file's offsets: a wrong one would end the process. ArrowInvalid (a
    ValueError): they are damaged; bad UTF-8 alone is left for the rows to find."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid:
            kind = column.type
            if pyarrow.types.is_string(kind):
                column.view(pyarrow.binary()).validate(full=True)
            elif pyarrow.types.is_large_string(kind):
                column.view(pyarrow.large_binary()).validate(full=True)
            else:
                raise


# ---------------------------------------------------------------- hf:NAME[:config][:split]


def split_name(spec: str) -> tuple[str, str, str]:
    """(name or folder, configuration or "", split) of hf:NAME[:config][:split]. A single word
    behind the name is a split where it is the usual name of one. E002."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise UserError("E002", f"source {spec}: it is written hf:NAME[:config][:split]")
    if len(rest) == 1 and rest[0].partition("[")[0] in SPLITS:
        rest = ["", *rest]
    config, split = (*rest, "", "")[:2]
    return name, config, split or "train"


def is_saved(folder: str) -> bool:
    """Whether save_to_disk of `datasets` made it."""
    names = set(os.listdir(folder or os.curdir))
    return "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names


def hf_input(spec: str, label: str, source: int, split: str) -> Input:
    """E108: not there, or no network; E002: no such configuration or split; E003."""
    name = split_name(spec)[0]
    given = Input(source, split, "hf", label, spec)
    opened = open_hf(given)
    if os.path.isdir(name):
        size, revision = folder_state(name)
    else:
        info = opened.info
        size = info.dataset_size or info.download_size or 0
        revision = hub_revision(name)
    return given._replace(size=size, revision=revision)


def folder_state(folder: str) -> tuple[int, str]:
    """(bytes, a hash) of all files in it, by name, size, first and last bytes."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for at, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(at, name)
            with suppress(OSError), open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(1 << 16)
                file.seek(max(0, size - (1 << 16)))
                ends += file.read(1 << 16)
                facts = f"{os.path.relpath(path, folder)}\n{size}\n".replace(os.sep, "/")
                digest.update(facts.encode("utf-8", "surrogateescape") + ends)
                total += size
    return total, digest.hexdigest()


def hub_revision(name: str) -> str:
    """The commit that is read, so that a preparation that goes on reads the same."""
    hub = needs("huggingface_hub", "hf:")
    with suppress(Exception):  # a mirror may not tell; then a change goes unnoticed
        return hub.HfApi().dataset_info(name, timeout=10).sha or ""
    return ""


def open_hf(given: Input):
    """The dataset of an hf: input; it gives Arrow tables. UserError."""
    datasets = needs("datasets", given.path)
    name, config, split = split_name(given.path)
    local = os.path.isdir(name)
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError("E108", f"source {given.path}: there is no such folder")
    if not local:
        check_network(given.path)
    try:
        if local and is_saved(name):
            found = datasets.load_from_disk(name)
            if isinstance(found, dict):
                if split not in found:
                    known = ", ".join(map(str, found))
                    raise ValueError(f'Unknown split "{split}". Should be one of [{known}]')
                found = found[split]
        else:
            revision = {}
            if given.revision and not local:
                revision["revision"] = given.revision
            more = {"split": split, "streaming": True, **revision}
            found = datasets.load_dataset(name, config or None, **more)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        # a split or a configuration that is not there is a ValueError; the text names those that
        # are
        missing = "split" in reason.lower() or "config" in reason.lower()
        code = "E002" if missing and isinstance(error, ValueError) else "E108"
        raise UserError(code, f"source {given.path}: {reason}") from None
    return found.with_format("arrow")


def check_network(spec: str) -> None:
    """E108 at once where the Hub cannot be reached: `datasets` would try for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():
        return
    place = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = place.hostname or "huggingface.co", place.port or 443
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = f"{host} cannot be reached ({error.strerror or error})"
        local = "a folder of its .parquet files is read without a network: hf:/path/to/folder"
        raise UserError("E108", f"source {spec}: {reason}; {local}") from None


def read_hf(reading: Reading) -> Iterator[Item]:
    return table_items(reading, hf_batches(reading))


def hf_batches(reading: Reading):
    """(number of its first row, record batch). UserError E003 where the Hub is lost on the way: the
    same command goes on there; what is wrong with a folder is a ValueError."""
    columns = None
    at = 0
    try:
        for table in open_hf(reading.given).iter(batch_size=ROWS):
            if columns is None:
                columns = wanted_columns(reading.given, table.schema)
            for batch in table.select(columns).combine_chunks().to_batches():
                yield at, as_strings(batch)
                at += batch.num_rows
    except (UserError, Unreadable, KeyError):
        raise
    except Exception as error:  # of any library that `datasets` reads with
        path = reading.given.path
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if os.path.isdir(split_name(path)[0]):
            raise ValueError(reason) from None
        again = "the same command goes on there"
        raise UserError("E003", f"source {path}: row {at:,}: {reason}; {again}") from None
