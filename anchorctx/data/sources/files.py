"""Local files as a source: which files a path names, what identifies them, and the parts they are read in."""

from __future__ import annotations

import glob
import gzip
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.data.sources.documents import Document, Reading, Tokens
from anchorctx.data.sources.fields import Fields
from anchorctx.data.sources.nature import check_regular, not_readable
from anchorctx.data.sources.readers import COMPRESSIONS, READERS
from anchorctx.errors import UserError
from anchorctx.records.files import file_sha256

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
PART_BYTES = 2**26
"""Small files are read together until they have so many bytes; a larger file is a part of its own."""


@dataclass(frozen=True, slots=True)
class FilesPart:
    """Some files of a source."""

    files: tuple[Path, ...]
    kind: str | None
    fields: Fields
    identity: dict[str, Any]
    size: int | None

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """The files' documents."""
        return read_files(self.files, self.kind, self.fields, reading)


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
    for root in roots:
        check_regular(root, f"path={root}")
    found = [file for root in roots for file in (_in_folder(root) if root.is_dir() else [root])]
    # A file that is named by itself is read whatever its ending. Of a folder or glob: without a kind, files of known
    # endings; with one, those of its endings and of unknown ones; with text, all
    is_single = len(roots) == 1 and roots[0].is_file()
    files = [file for file in found if is_single or kind in (None, "text") or kind_of(file) in (kind, None)]
    if kind is None and not is_single:
        files = [file for file in found if kind_of(file) is not None]
        if 0 < len(files) < len(found):
            logger.warning("%s: left out %d files of unknown endings", path, len(found) - len(files))
    if not files and (reasons := [(file, what) for file in found if (what := not_readable(file))]):
        raise UserError(f"{reasons[0][0]} {reasons[0][1]}")
    if not files:
        raise UserError(
            f"path={path} holds no {kind or 'readable'} file: name one that has files ending in "
            f"{', '.join(KINDS)} (.jsonl also .gz or .zst), or set format"
        )
    return list(dict.fromkeys(files))  # a glob may name a folder and a file in it


def kind_of(file: Path) -> str | None:
    """`jsonl`, `parquet` or `text` by the file's ending; None for others."""
    suffixes = [s.lower() for s in file.suffixes]  # of web.jsonl.gz: [.jsonl, .gz]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def content_identity(files: list[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file; names are relative to the folder that all share, so that a corpus that was
    moved is the same corpus."""
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


def file_parts(
    files: list[Path], contents: list[dict[str, Any]], kind: str | None, fields: Fields, facts: dict[str, Any]
) -> list[FilesPart]:
    """The files in parts of about PART_BYTES, in order; `contents` identifies each, `facts` is in every identity."""
    # files of 40, 40, 10 MiB and PART_BYTES of 64 MiB: the first two are a part, the third is the last one
    parts, begin, size = [], 0, 0
    for index, content in enumerate(contents):
        size += content["bytes"]
        if size >= PART_BYTES or index == len(contents) - 1:
            identity = {"format": kind, "files": contents[begin : index + 1], **facts}
            parts.append(FilesPart(tuple(files[begin : index + 1]), kind, fields, identity, size))
            begin, size = index + 1, 0
    return parts


def read_files(
    files: Sequence[Path], kind: str | None, fields: Fields, reading: Reading
) -> Iterator[Document | Tokens]:
    """Yield the documents of all `files` in order; `kind` None goes by each file's ending."""
    for file in files:
        before = reading.bytes_read
        this = kind or kind_of(file)
        if this is None:
            what = not_readable(file) or f"ends in none of {', '.join(KINDS)}: set format=jsonl, parquet or text"
            raise UserError(f"{file} {what}")
        try:
            yield from READERS[this](file, fields, reading)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file} is corrupt or cut short ({error}): fetch it again, or leave it out") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error}): mend it, or leave it out") from error
        reading.bytes_read = before + file.stat().st_size


def _in_folder(folder: Path) -> list[Path]:
    inside = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): mend it, or leave it out") from error
