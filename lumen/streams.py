"""The bytes of a file, unpacked, from the front to the back: plain, .gz or .zst, at flat memory.

What is damaged gives all that could be unpacked before the damage, then raises `Unreadable` E121;
a file that unpacks to more than it should gives E122. Neither is taken for an end of the file.
"""

from __future__ import annotations

import gzip
import zlib

from lumen.errors import UserError
from lumen.inputs import LONGEST, RATIO, Unreadable, codec_of

PART = 1 << 18  # bytes that are unpacked at a time
# Bytes that are given to zstd at a time: four can become 128 KiB, so these at most 32 MiB.
ZSTD_PART = 1 << 10
MAGIC = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd"}
MAGIC |= {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def needs(package: str, why: str):
    """The module of an optional package. E003: it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError("E003", f"{why} needs {name}: pip install {name}") from None


class Zstd:
    """Unpacks frames one after the other, as `zstd` writes them and `cat` joins them."""

    def __init__(self, file):
        self.file = file
        self.zstandard = needs("zstandard", f"{getattr(file, 'name', 'a .zst')}")
        self.frame = None  # None: between two frames
        self.rest = b""  # of what was read, after the end of a frame

    def read1(self, size: int) -> bytes:
        """The next bytes, however many; b"" at the end."""
        while True:
            data = self.rest or self.file.read(ZSTD_PART)
            self.rest = b""
            if not data and self.frame is not None:
                raise EOFError("it ends inside a frame")
            if not data:
                return b""
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                made = self.frame.decompress(data)
            except self.zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            if self.frame.eof:
                self.rest = self.frame.unused_data
                self.frame = None
            if made:
                return made


class Stream:
    """read, peek and skip over the unpacked bytes of a file; goes forwards only."""

    def __init__(self, path: str):
        self.codec = codec_of(path)
        self.file = open(path, "rb")
        self.unpacker = self.file
        if self.codec == "gzip":
            self.unpacker = gzip.GzipFile(fileobj=self.file)
        elif self.codec == "zstd":
            self.unpacker = Zstd(self.file)
        self.held = b""  # unpacked, and not yet read
        self.unpacked = 0  # bytes
        self.failed: Unreadable | OSError | None = None  # why it ended; see check

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def part(self, size: int) -> bytes:
        """Some bytes; b"" at the end and where it fails."""
        if self.failed:
            return b""
        try:
            if not self.codec:
                return self.file.read(size)
            data = self.unpacker.read1(PART)
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            self.failed = Unreadable("E121", f"damaged or truncated {self.codec}: {error}")
            return b""
        except OSError as error:
            self.failed = error
            return b""
        self.unpacked += len(data)
        if not self.file.tell():
            self.failed = Unreadable("E121", f"truncated {self.codec}: the file is empty")
        if self.unpacked > max(LONGEST, RATIO * self.file.tell()):
            packed = f"{self.file.tell():,} bytes unpack to {self.unpacked:,} and more"
            self.failed = Unreadable("E122", f"{packed}; the limit is {RATIO} times as many")
            return b""
        return data

    def read(self, size: int) -> bytes:
        """`size` bytes, or all up to the end or to where it fails; see `failed`."""
        parts = [self.held]
        got = len(self.held)
        while got < size:
            data = self.part(size - got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        whole = b"".join(parts)
        self.held = whole[size:]
        return whole[:size]

    def peek(self, size: int) -> bytes:
        data = self.read(size)
        self.held = data + self.held
        return data

    def skip(self, size: int) -> None:
        """Passes over so many bytes."""
        dropped = min(size, len(self.held))
        self.held = self.held[dropped:]
        size -= dropped
        if not self.codec:
            self.file.seek(size, 1)
            return
        while size > 0:
            data = self.read(min(size, PART))
            if not data:
                return
            size -= len(data)

    def all(self) -> bytes:
        """What is left. Unreadable: damaged, or more than a packed file may hold."""
        if not self.codec:
            data = self.held + self.file.read()
            self.held = b""
            return data
        data = self.read(LONGEST + 1)
        self.check(0, 1)
        if len(data) > LONGEST:
            raise Unreadable("E122", f"it unpacks to more than {LONGEST >> 20} MiB", 0, 1)
        return data

    def check(self, offset: int, line: int) -> None:
        """Raises what ended the stream, if it was not its end, as found at that place."""
        error = self.failed
        if isinstance(error, Unreadable):
            raise Unreadable(error.code, error.reason, offset, line)
        if error:
            raise Unreadable("E108", str(error.strerror or error), offset, line)


def magic_of(head: bytes) -> str:
    """What kind of compressed file begins so, or ""."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    return ""
