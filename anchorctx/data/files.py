"""Documents from local files: .jsonl, .parquet and text, compressed or not, read as a stream."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from anchorctx.data.documents import BadRow, Document, Fields, Reading, check_text
from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

COMPRESSIONS = (".gz", ".zst")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".tex": "text",
}
"""Format by file name ending, when the configuration does not say."""
PARQUET_ROWS = 128
"""Rows decoded at once: bounds the memory when rows are whole books."""


def find_files(path: str, kind: str | None) -> list[Path]:
    """The files that `path` (a file, folder or glob) names, sorted; with `kind` None only those of known endings.

    Folders are searched recursively, hidden files left out. Raises UserError when there is none.
    """
    roots = [Path(path)] if os.path.exists(path) else [Path(p) for p in sorted(glob.glob(path, recursive=True))]
    if not roots:
        raise UserError(
            f"path={path} names no file or folder and matches none as a glob: correct it, "
            "or set format=datasets if it is the name of a Hugging Face dataset"
        )
    found = [file for root in roots for file in (_in_folder(root) if root.is_dir() else [root])]
    is_single = len(roots) == 1 and roots[0].is_file()
    files = [file for file in found if is_single or kind in (None, "text") or kind_of(file) in (kind, None)]
    if kind is None and not is_single:
        files = [file for file in found if kind_of(file) is not None]
        if 0 < len(files) < len(found):
            logger.warning("%s: left out %d files of unknown endings", path, len(found) - len(files))
    if not files:
        raise UserError(
            f"path={path} holds no {kind or 'readable'} file: name one that has files ending in "
            f"{', '.join(KINDS)} (.jsonl also .gz or .zst), or set format"
        )
    return list(dict.fromkeys(files))


def kind_of(file: Path) -> str | None:
    """`jsonl`, `parquet` or `text` by the file's ending; None for others."""
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def content_identity(files: list[Path]) -> list[dict[str, Any]]:
    """Name (relative to what the files share), size and sha256 of each file: what was read, wherever it lies."""
    base = os.path.commonpath([file.parent.resolve() for file in files])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sha256, files))
    return [
        {
            "name": Path(os.path.relpath(file.resolve(), base)).as_posix(),
            "bytes": file.stat().st_size,
            "sha256": digest,
        }
        for file, digest in zip(files, digests, strict=True)
    ]


def read_files(files: list[Path], kind: str | None, fields: Fields, reading: Reading) -> Iterator[Document]:
    """Yield the documents of all `files` in order; `kind` None goes by each file's ending."""
    before = 0
    for file in files:
        this = kind or kind_of(file)
        if this is None:
            raise UserError(f"{file} ends in none of {', '.join(KINDS)}: set format=jsonl, parquet or text")
        try:
            yield from READERS[this](file, fields, reading, before)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file} is corrupt or cut short ({error}): fetch it again, or leave it out") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error}): mend it, or leave it out") from error
        before += file.stat().st_size
        reading.bytes_read = before


def _read_jsonl(file: Path, fields: Fields, reading: Reading, before: int) -> Iterator[Document]:
    with file.open("rb") as raw:
        for number, line in enumerate(_lines(file, raw), start=1):
            reading.bytes_read = before + raw.tell()
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                yield fields.document(_parse(line, where), where)
            except BadRow as row:
                reading.bad(row)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))  # else errors are in the next line, column 1
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


def _read_text(file: Path, fields: Fields, reading: Reading, before: int) -> Iterator[Document]:
    with file.open("rb") as raw:
        content = b"".join(_lines(file, raw))
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
        check_text(text, str(file), "its content")
        yield Document(text, str(file), fields.constant_domain)
    except UnicodeDecodeError as error:
        sentence = f"{file} is not valid UTF-8 (byte {error.start}): convert the file"
        reading.bad(BadRow("invalid UTF-8", sentence))
    except BadRow as row:
        reading.bad(row)


def _read_parquet(file: Path, fields: Fields, reading: Reading, before: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            try:
                fields.check(parquet.schema_arrow.names, str(file))
            except BadRow as row:  # every row is without: no skipping will help
                raise UserError(row.sentence) from row
            size, rows, number = file.stat().st_size, max(parquet.metadata.num_rows, 1), 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=fields.names()):
                for row in batch.to_pylist():
                    number += 1
                    reading.bytes_read = before + size * number // rows
                    try:
                        yield fields.document(row, f"{file}:{number}")
                    except BadRow as bad:
                        reading.bad(bad)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no whole parquet file ({reason}): fetch it again, or leave it out") from error


READERS: dict[str, Callable[[Path, Fields, Reading, int], Iterator[Document]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}


def _lines(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The lines of `raw`, decompressed by the ending of the file's name."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        yield from gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        yield from _split(_zst_chunks(file, raw))
    else:
        yield from raw


def _zst_chunks(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Decompressed chunks of all frames; unlike zstandard's own reader it notices when the last one is cut short."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the zstandard package: pip install 'anchorctx[zstd]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # frames made with `zstd --long` too
    frame = None
    try:
        while chunk := raw.read(2**18):
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _split(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks to lines, ends kept."""
    pending: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*pending, line, b"\n"])
            pending.clear()
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join(pending)


def _in_folder(folder: Path) -> list[Path]:
    inside = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): mend it, or leave it out") from error
