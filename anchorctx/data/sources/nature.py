"""What a file is by its first bytes and its ending, where it is something that no reader takes: said in a sentence."""

from __future__ import annotations

import stat
from pathlib import Path

from anchorctx.errors import UserError
from anchorctx.records.places import KINDS

MAGIC = {
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"BZh91AY&SY": "compressed by bzip2",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1\x15": "parquet",
    b"version https://git-lfs": "a pointer of git-lfs",
}
"""The first bytes of files that are neither text nor JSON lines."""
REMEDIES = {
    "compressed by gzip": "give its name the ending .gz",
    "compressed by zstd": "give its name the ending .zst",
    "parquet": "give its name the ending .parquet, or set format=parquet",
    "a pointer of git-lfs": "fetch it with git lfs pull",
}
ENDINGS = {".xz": "xz -d", ".bz2": "bunzip2", ".zip": "unzip", ".7z": "7z x", ".lz4": "lz4 -d", ".tar": "tar -xf"}
"""Endings of compressed files that are not read, and what unpacks them."""
HEAD = 256


def head(file: Path) -> bytes:
    """The first bytes of a file."""
    with file.open("rb") as raw:
        return raw.read(HEAD)


def not_text(start: bytes) -> str | None:
    """What the first bytes of a file are that holds neither text nor JSON lines, and what to do; None if it may."""
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return f"is {what}: {REMEDIES.get(what, 'unpack it')}"
    # "ab" in UTF-16 is 61 00 62 00 or 00 61 00 62: valid UTF-8, but half of it are zeros
    even, odd = start[::2].count(0), start[1::2].count(0)
    few, many = sorted((even, odd))
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (many > len(start) // 4 and few < many // 4):
        return "is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8"
    return None


def not_readable(file: Path) -> str | None:
    """By the ending of its name: why a file is not read, and what to do; None if nothing is known of the ending."""
    ending = file.suffix.lower()
    if ending == ".json":
        return (
            "is read as JSON lines only if it has one object a line: set format=jsonl if it has, or make it so with "
            f"jq -c '.[]' {file.name} > {file.stem}.jsonl"
        )
    if ending in ENDINGS:
        return f"is compressed in a way that is not read: unpack it with {ENDINGS[ending]}, or use .gz or .zst"
    return None


def check_regular(path: Path, what: str) -> None:
    """UserError for a pipe, socket or device, which would be waited for or never end; `what` names it."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:  # said by whoever reads it
        return
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"{what} is {KINDS.get(kind, 'no file')}, not a file: write what it has into a file, and name that"
        )
