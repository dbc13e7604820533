"""Documents from local files: .jsonl, .parquet and text, compressed or not, read as a stream."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anchorctx.data.sources.arrow import arrow_rows
from anchorctx.data.sources.documents import BadRow, Document, Reading, Tokens, check_text, too_long
from anchorctx.data.sources.fields import Fields
from anchorctx.data.sources.streams import COMPRESSIONS, lines, whole
from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

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
PARQUET_READING = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 2**18}
"""Read as a stream: by default pyarrow holds all of a file that it has read, until the last row is through."""


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


def read_files(
    files: Sequence[Path], kind: str | None, fields: Fields, reading: Reading
) -> Iterator[Document | Tokens]:
    """Yield the documents of all `files` in order; `kind` None goes by each file's ending."""
    before = reading.bytes_read
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


def _read_jsonl(file: Path, fields: Fields, reading: Reading, before: int) -> Iterator[Document | Tokens]:
    with file.open("rb") as raw:
        for number, line in enumerate(lines(file, raw), start=1):
            reading.bytes_read = before + raw.tell()
            where = f"{file}:{number}"
            try:
                if line is None:
                    raise BadRow("too long", too_long(where, "a line"))
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield from fields.documents(_parse(line, where), where)
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
        content = whole(file, raw)
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


def _read_parquet(file: Path, fields: Fields, reading: Reading, before: int) -> Iterator[Document | Tokens]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, **PARQUET_READING) as parquet:
            try:
                columns = fields.columns(parquet.schema_arrow.names, str(file))
            except BadRow as row:  # every row is without: no skipping will help
                raise UserError(row.sentence) from row
            size, rows, number = file.stat().st_size, max(parquet.metadata.num_rows, 1), 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns):
                for row in arrow_rows(batch, fields.tokens):
                    number += 1
                    reading.bytes_read = before + size * number // rows
                    try:
                        yield from fields.documents(row, f"{file}:{number}")
                    except BadRow as bad:
                        reading.bad(bad)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no whole parquet file ({reason}): fetch it again, or leave it out") from error


READERS: dict[str, Callable[[Path, Fields, Reading, int], Iterator[Document | Tokens]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}


def _in_folder(folder: Path) -> list[Path]:
    inside = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): mend it, or leave it out") from error
