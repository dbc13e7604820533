"""Bytes of compressed files to lines of bounded length."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from anchorctx.data.sources.documents import MAX_DOCUMENT_BYTES
from anchorctx.errors import UserError

COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 2**18


def chunks(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The content of `raw`, decompressed by the ending of the file's name; errors as `gzip` raises them."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        return _zst_chunks(file, raw)
    stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw  # type: ignore[assignment]
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def lines(file: Path, raw: IO[bytes]) -> Iterator[bytes | None]:
    """The lines, ends kept; None for one longer than a document may be, whose bytes are passed over."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks(file, raw):
        for line in _split(chunk):
            size += len(line)
            if size <= MAX_DOCUMENT_BYTES:
                pending.append(line)
            if line.endswith(b"\n"):
                yield b"".join(pending) if size <= MAX_DOCUMENT_BYTES else None
                pending, size = [], 0
    if size:
        yield b"".join(pending) if size <= MAX_DOCUMENT_BYTES else None


def whole(file: Path, raw: IO[bytes]) -> bytes | None:
    """All content; None when it is longer than a document may be."""
    return _at_most(chunks(file, raw), MAX_DOCUMENT_BYTES)


def _at_most(parts: Iterable[bytes], limit: int) -> bytes | None:
    taken, size = [], 0
    for part in parts:
        size += len(part)
        if size > limit:
            return None
        taken.append(part)
    return b"".join(taken)


def _split(chunk: bytes) -> Iterator[bytes]:
    """Lines that end in \\n and in nothing else; the last one may have no end."""
    *complete, rest = chunk.split(b"\n")
    yield from (line + b"\n" for line in complete)
    if rest:
        yield rest


def _zst_chunks(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Decompressed chunks of all frames; unlike zstandard's own reader it notices when the last one is cut short."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the zstandard package: pip install 'anchorctx[zstd]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # frames made with `zstd --long` too
    frame = None
    try:
        while chunk := raw.read(CHUNK_BYTES):
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the last zstd frame has no end")
