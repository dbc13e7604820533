"""Readers of single files: .jsonl, .parquet and text, compressed or not, as a stream of documents."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from anchorctx.data.sources.documents import MAX_DOCUMENT_BYTES, BadRow, Document, Reading, Tokens, check_text, too_long
from anchorctx.data.sources.fields import Fields, arrow_rows
from anchorctx.data.sources.nature import head, not_text
from anchorctx.data.sources.pages import largest_pages
from anchorctx.errors import UserError

COMPRESSIONS = (".gz", ".zst")
LINES = "JSON lines have one object each;"
CHUNK_BYTES = 2**18
PARQUET_ROWS = 128
"""Rows decoded at once; few, since a row may be a whole book."""
MAX_PAGE_BYTES = 2 * MAX_DOCUMENT_BYTES
"""A larger page of a parquet file is not read: it is held as a whole, with a copy or two. Most writers' have 1 MiB."""
BATCH_BYTES = 2**28
"""Of texts in rows that are decoded at once, where a dictionary has long ones."""
ZST_BYTES = 2**9
"""Compressed bytes that are decompressed at once: a block of 4 may stand for 128 KiB, so that these may be 16 MiB. With
so few zstd reads 590 MB/s of source code, and 700 with 256 KiB."""
MAX_WINDOW, LEAST_WINDOW, WINDOW_SHARE = 2**31, 2**27, 64
"""What a zstd frame may ask to have kept in memory: 128 MiB, and more (`zstd --long=31`) in files of 1/64 of that."""
PARQUET_READING = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 2**18}
"""Read as a stream: by default pyarrow keeps all that it has read of a file until the last row is through."""


def _read_jsonl(file: Path, fields: Fields, reading: Reading) -> Iterator[Document | Tokens]:
    before = reading.bytes_read
    if _is_other(file, reading):
        return
    with file.open("rb") as raw:
        for number, line in enumerate(_lines(file, raw), start=1):
            reading.bytes_read = before + raw.tell()
            where = f"{file}:{number}"
            try:
                if number == 1 and line is not None and line.lstrip().startswith(b"["):
                    raise BadRow("not an object", f"{where} begins a list: {LINES} jq -c '.[]' makes lines of a list")
                if line is None:
                    raise BadRow("too long", too_long(where, "a line"))
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark
                if line.strip():
                    yield from fields.documents(_parse(line, where), where)
            except BadRow as row:
                reading.bad(row)


def _is_other(file: Path, reading: Reading) -> bool:
    """Is it neither text nor JSON lines? Then that is counted, or an error, as a bad row is."""
    what = None if file.suffix.lower() in COMPRESSIONS else not_text(head(file))
    if what is not None:
        reading.bad(BadRow("not a text", f"{file} {what}"))
    return what is not None


def _parse(line: bytes, where: str) -> Any:
    try:
        # without the line's end, behind which json would report what is missing: in line 2, column 1
        return json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        sentence = f"{where} is not valid UTF-8 (byte {error.start}): convert the file"
        raise BadRow("invalid UTF-8", sentence) from error
    except json.JSONDecodeError as error:
        sentence = f"{where} is not valid JSON ({error.msg}, column {error.colno}): mend the line"
        raise BadRow("malformed JSON", sentence) from error
    except RecursionError as error:
        raise BadRow("malformed JSON", f"{where} is JSON nested too deeply to read: mend the line") from error
    except ValueError as error:  # an integer of more than 4,300 digits
        raise BadRow("malformed JSON", f"{where} has a number too long to read: mend the line") from error


def _read_text(file: Path, fields: Fields, reading: Reading) -> Iterator[Document]:
    if _is_other(file, reading):
        return
    with file.open("rb") as raw:
        content = _whole(file, raw)
    try:
        if content is None:
            raise BadRow("too long", too_long(str(file), "a text"))
        text = content.decode("utf-8").removeprefix("\ufeff")
        check_text(text, str(file), "its content")
        yield Document(text, str(file), fields.constant_domain)
    except UnicodeDecodeError as error:
        sentence = f"{file} is not valid UTF-8 (byte {error.start}): convert the file"
        reading.bad(BadRow("invalid UTF-8", sentence))
    except BadRow as row:
        reading.bad(row)


def _read_parquet(file: Path, fields: Fields, reading: Reading) -> Iterator[Document | Tokens]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, **PARQUET_READING) as parquet:
            yield from _row_groups(parquet, file, fields, reading)
    except MemoryError as error:  # pyarrow's too
        raise UserError(
            f"{file} takes more memory than there is: write it with fewer values a row, or leave it out"
        ) from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no whole parquet file ({reason}): fetch it again, or leave it out") from error


def _row_groups(parquet: Any, file: Path, fields: Fields, reading: Reading) -> Iterator[Document | Tokens]:
    """The documents of one group of rows after the other; one with pages that memory should not hold is a bad row."""
    columns, before = fields.columns(parquet.schema_arrow.names, str(file)), 0
    size, total = file.stat().st_size, max(parquet.metadata.num_rows, 1)
    with file.open("rb") as raw:
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            count, share = group.num_rows, size * group.num_rows // total
            page, dictionary = largest_pages(raw, group, columns)
            if page <= MAX_PAGE_BYTES:
                # each of the rows may have the dictionary's longest text
                at_once = max(min(PARQUET_ROWS, BATCH_BYTES // max(dictionary, 1)), 1)
                batches = parquet.iter_batches(at_once, row_groups=[number], columns=columns)
                rows = (row for batch in batches for row in arrow_rows(batch, fields.arrays))
                yield from fields.read(rows, str(file), reading, size=share, count=count, before=before)
            else:
                where = f"{file}: rows {before + 1:,} to {before + count:,} have a page of {page:,} bytes"
                remedy = f"more than {MAX_PAGE_BYTES:,}: split long texts, or write smaller pages"
                reading.bad(BadRow("too long", f"{where}, {remedy}"))
                reading.skipped["too long"] += count - 1
                reading.bytes_read += share
            before += count


READERS: dict[str, Callable[[Path, Fields, Reading], Iterator[Document | Tokens]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}


def _chunks(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The content of `raw`, decompressed by the ending of the file's name; errors as `gzip` raises them."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        return _zst_chunks(file, raw)
    stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw  # type: ignore[assignment]
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def _lines(file: Path, raw: IO[bytes]) -> Iterator[bytes | None]:
    """The lines with their ends; None for one longer than a document may be, which is skipped without being held."""
    # bytes, not text: str.splitlines and universal newlines would also cut at \r, \x0b or \u2028 inside a string
    pending: list[bytes] = []
    size = 0
    for chunk in _chunks(file, raw):
        for line in _split(chunk):
            size += len(line)
            if size <= MAX_DOCUMENT_BYTES:
                pending.append(line)
            if line.endswith(b"\n"):
                yield b"".join(pending) if size <= MAX_DOCUMENT_BYTES else None
                pending, size = [], 0
    if size:
        yield b"".join(pending) if size <= MAX_DOCUMENT_BYTES else None


def _whole(file: Path, raw: IO[bytes]) -> bytes | None:
    """All content; None when it is longer than a document may be."""
    return _at_most(_chunks(file, raw), MAX_DOCUMENT_BYTES)


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
    window = min(max(LEAST_WINDOW, WINDOW_SHARE * file.stat().st_size), MAX_WINDOW)
    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    frame = None
    try:
        while chunk := raw.read(ZST_BYTES):
            while chunk:
                # a file may be several frames end to end, as parallel compressors write it
                frame = frame or decompressor.decompressobj()
                content = memoryview(frame.decompress(chunk))
                yield from (bytes(content[at : at + CHUNK_BYTES]) for at in range(0, len(content), CHUNK_BYTES))
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            again = "compress it again without --long, or with --long=27 at most"
            raise UserError(f"{file} takes more than {window:,} bytes to decompress: {again}") from error
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the last zstd frame has no end")
