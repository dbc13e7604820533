"""Files that are made to do harm, or are something else than their name says: one sentence, and little memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from anchorctx.data.sources import documents, readers
from anchorctx.data.sources.documents import Document, OnBadRow, Reading
from anchorctx.data.sources.pages import largest_pages
from anchorctx.data.sources.source import SourceConfig, SourceFormat, open_source
from anchorctx.errors import UserError

GOOD = b'{"text": "good"}\n'


def read(path: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    reading = Reading(OnBadRow.skip)
    found = open_source(SourceConfig(path=str(path), **options)).documents(reading)
    return [document.text for document in found if isinstance(document, Document)], dict(reading.skipped)


def sentence(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        list(open_source(SourceConfig(path=str(path), **options)).documents(Reading()))
    return str(error.value)


def bomb(kind: str, content: bytes, times: int) -> bytes:
    """`content`, `times` over, in between good lines."""
    if kind == "gz":
        return b"".join(gzip.compress(part, mtime=0) for part in (GOOD, content * times, b"\n" + GOOD))
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(part) for part in (GOOD, *[content] * times, b"\n" + GOOD)]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_is_passed_over_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """48 MiB of a single line, in some kilobytes; a document may have 1 MiB here. Measured: 3 and 34 MiB at once."""
    for module in (readers, documents):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2**20)
    file = tmp_path / f"rows.jsonl.{kind}"
    file.write_bytes(bomb(kind, b"x" * 2**20, 48))
    assert file.stat().st_size < 2**18
    tracemalloc.start()
    texts, skipped = read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["good", "good"] and skipped == {"too long": 1}
    assert peak < {"gz": 4, "zst": 40}[kind] * 2**20


def test_a_window_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    """A frame of ten bytes may ask for 2 GiB to be kept; `zstd --long=31` does, of files that are large themselves."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # the size is not written
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(compressor.compress(GOOD) + compressor.flush())
    assert sentence(file).startswith(f"{file} takes more than 134,217,728 bytes to decompress: compress it again")


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_PAGE_BYTES", 2**16)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2**16)


def table(texts: list[str], folder: Path, **options: Any) -> Path:
    file = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), file, **options)
    return file


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_sizes_of_pages(tmp_path: Path, compression: str, version: str) -> None:
    """One plain text of 100,000 letters is a page of that and its length's 4 bytes, whatever it is compressed to."""
    texts = ["a", "b" * 100_000]
    options = {"compression": compression, "data_page_version": version}
    file = table(texts, tmp_path, use_dictionary=False, write_batch_size=1, data_page_size=1, **options)
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
    with file.open("rb") as raw:
        page, dictionary = largest_pages(raw, group, ["text"])
        # levels: whether the value is there, a few bytes
        assert 100_004 <= page <= 100_016 and dictionary == 0
        assert largest_pages(raw, group, ["n"])[0] < 100
    file = table(texts * 10, tmp_path, **options)
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
    with file.open("rb") as raw:
        assert largest_pages(raw, group, ["text"]) == (100_009, 100_009)  # both texts, once


def test_a_group_of_rows_with_a_page_that_is_too_large(tmp_path: Path, small_pages: None) -> None:
    file = table(["good", "fine", "x" * 2**17, "lost", "well"], tmp_path, row_group_size=2, compression="zstd")
    assert read(file) == (["good", "fine", "well"], {"too long": 2})
    assert sentence(file).startswith(f"{file}: rows 3 to 4 have a page of ")
    assert "split long texts, or write smaller pages, or set on_bad_row=skip" in sentence(file)


def test_a_dictionary_with_a_long_text_does_not_multiply(tmp_path: Path, small_pages: None) -> None:
    """A text of 48 kB, 1,000 times: some kilobytes, and 48 MB in batches of 128 rows."""
    file = table(["x" * 48_000] * 1000, tmp_path, compression="zstd")
    source, most, before = open_source(SourceConfig(path=str(file))), 0, pyarrow.total_allocated_bytes()
    reading = Reading()
    for document in source.documents(reading):
        assert isinstance(document, Document) and len(document.text) == 48_000
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert reading.documents == 1000 and most < 2**20


def test_pipes_sockets_and_devices_are_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    assert sentence(pipe).startswith(f"path={pipe} is a pipe, not a file: write what it has into a file")
    assert sentence(Path("/dev/zero"), format=SourceFormat.text).startswith("path=/dev/zero is a device, not a file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "is a socket, not a file" in sentence(tmp_path / "s", format=SourceFormat.text)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    assert read(tmp_path) == (["good"], {})  # in a folder they are no files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.json",
            b'[{"text": "x"}]',
            "is read as JSON lines only if it has one object a line: set format=jsonl",
        ),
        ("a.jsonl", b'[\n{"text": "x"}\n]', ":1 begins a list: JSON lines have one object each; jq -c '.[]' makes"),
        ("a.jsonl", b'[{"text": "x"}]', ":1 begins a list: JSON lines have one object each; jq -c '.[]' makes"),
        (
            "a.jsonl.xz",
            lzma.compress(GOOD),
            "is compressed in a way that is not read: unpack it with xz -d, or",
        ),
        ("a.txt.bz2", bz2.compress(GOOD), "is compressed in a way that is not read: unpack it with bunzip2"),
        ("a.jsonl", lzma.compress(GOOD), "is compressed by xz: unpack it"),
        ("a.txt", gzip.compress(GOOD, mtime=0), "is compressed by gzip: give its name the ending .gz"),
        ("a.txt", "Läufe und mehr".encode("utf-16-le"), "is UTF-16, not UTF-8: convert it with iconv"),
        ("a.jsonl", GOOD.decode().encode("utf-16-be"), "is UTF-16, not UTF-8: convert it with iconv"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16, not UTF-8: convert it with iconv"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs: fetch it"),
    ],
)
def test_what_is_something_else_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert sentence(file).startswith(f"{file}{said if said[0] == ':' else f' {said}'}")
    if name.endswith((".json", ".xz", ".bz2")):  # a folder of nothing else
        assert sentence(tmp_path).startswith(f"{file} {said}")


def test_texts_that_only_look_so(tmp_path: Path) -> None:
    """Zeros in a text, and a text that begins as a magic number's letters do."""
    for name, text in {"a.txt": "PK and PAR1, \0\0\0", "b.txt": "BZh", "c.txt": "\0" * 40}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "[1]"}) + "\n[2]\n")
    texts, skipped = read(tmp_path)
    assert len(texts) == 4 and skipped == {"not an object": 1}
