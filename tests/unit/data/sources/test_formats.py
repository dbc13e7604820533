"""Every format that documents come in, and every way in which a file can be bad."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from anchorctx.data.sources import documents as documents_module
from anchorctx.data.sources import readers
from anchorctx.data.sources.documents import MAX_DOCUMENT_BYTES, Document, OnBadRow, Reading
from anchorctx.data.sources.source import SourceConfig, SourceFormat, open_source
from anchorctx.errors import UserError

ROWS = [
    {"text": "one small document", "kind": "a"},
    {"text": "zwei: ein größeres Dokument\nmit zwei Zeilen", "kind": "b"},
    {"text": "  three, \u2028 with blanks  ", "kind": "a"},
]
EXPECTED = [(row["text"], row["kind"]) for row in ROWS]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path | str, **options: Any) -> tuple[list[Document], Reading]:
    source = open_source(SourceConfig(path=str(path), **options))
    reading = Reading(source.on_bad_row)
    return list(source.documents(reading)), reading


def pairs(documents: list[Document]) -> list[tuple[str, str]]:
    return [(document.text, document.domain) for document in documents]


def sentence(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def frames(content: bytes) -> bytes:
    """Two zstd frames, as parallel compressors and `cat` make them."""
    half = len(content) // 2
    return zstandard.ZstdCompressor().compress(content[:half]) + zstandard.ZstdCompressor().compress(content[half:])


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "rows.jsonl": bytes,
    "rows.ndjson": bytes,
    "rows.jsonl.gz": gzip.compress,
    "members.jsonl.gz": lambda content: gzip.compress(content[:20]) + gzip.compress(content[20:]),
    "rows.jsonl.zst": zstandard.ZstdCompressor().compress,
    "frames.jsonl.zst": frames,
    "long.jsonl.zst": lambda content: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    ).compress(content),
    "bom.jsonl": lambda content: b"\xef\xbb\xbf" + content,
    "blank_lines.jsonl": lambda content: b"\n" + content.replace(b"\n", b"\n  \n"),
    "crlf.jsonl": lambda content: content.replace(b"\n", b"\r\n"),
    "no_last_newline.jsonl": lambda content: content.rstrip(b"\n"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(WRITERS[name](jsonl(ROWS)))
    documents, reading = read(file, domain_field="kind")
    assert pairs(documents) == EXPECTED
    assert reading.bytes_read == file.stat().st_size and reading.documents == 3


def test_compressed_lines_that_span_chunks(tmp_path: Path) -> None:
    """A line of several megabytes, and lines that end where a chunk does."""
    rows = [{"text": "long " * 1_000_000}, *({"text": "x" * n} for n in range(1, 200))]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(rows)))
    documents, _ = read(tmp_path / "a.jsonl.zst")
    assert [document.text for document in documents] == [row["text"] for row in rows]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PARQUET_ROWS", 2)
    table = pyarrow.table({"other": [1, 2, 3], **{key: [row[key] for row in ROWS] for key in ROWS[0]}})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    documents, reading = read(tmp_path / "rows.parquet", domain_field="kind")
    assert pairs(documents) == EXPECTED and documents[2].source.endswith("rows.parquet:3")
    assert reading.bytes_read == (tmp_path / "rows.parquet").stat().st_size


def test_a_folder_of_texts(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.md", "c.txt", ".hidden/3.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text of {name}")
    documents, _ = read(tmp_path, domain="notes")
    assert pairs(documents) == [(f"text of {name}", "notes") for name in ("a/1.md", "b/2.txt", "c.txt")]


def test_compressed_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed\ntext"))
    (tmp_path / "b.txt.zst").write_bytes(frames("zweiter Text, größer".encode()))
    assert [document.text for document in read(tmp_path)[0]] == ["packed\ntext", "zweiter Text, größer"]


def test_a_glob_and_a_folder_with_a_glob_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "set[1]"
    folder.mkdir()
    for i, row in enumerate(ROWS):
        (folder / f"part{i}.jsonl").write_bytes(jsonl([row]))
    (folder / "part9.parquet").write_bytes(b"not read")
    assert pairs(read(folder, domain_field="kind", format=SourceFormat.jsonl)[0]) == EXPECTED
    assert pairs(read(tmp_path / "set*" / "part[01].jsonl", domain_field="kind")[0]) == EXPECTED[:2]


def test_unknown_endings_in_a_folder_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path)[0]) == 1
    assert "left out 1 files of unknown endings" in caplog.text


@pytest.mark.parametrize("given", [SourceFormat.auto, SourceFormat.datasets])
def test_a_saved_dataset(tmp_path: Path, given: SourceFormat) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "split"))
    for name in ("one", "split"):
        assert pairs(read(tmp_path / name, format=given, domain_field="kind")[0]) == EXPECTED
    assert sentence(tmp_path / "split", format=given, split="test") == (
        f"{tmp_path / 'split'} has no split test: set split to one of train"
    )
    expected = f"the dataset {tmp_path / 'one'} has no field body (it has: text, kind): set text_field to one of them"
    assert sentence(tmp_path / "one", format=given, text_field="body") == expected


def test_a_hub_dataset_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    message = sentence("nobody/nothing", format=SourceFormat.datasets)
    assert message.startswith("the dataset nobody/nothing (subset=None, split=train) cannot be loaded (")
    assert message.endswith("): correct path, subset and split")


# -- rows that are no documents -------------------------------------------------------------------------------------

GOOD = b'{"text": "good", "kind": "a"}'
BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    "cut": (
        b'{"text": "no end',
        "is not valid JSON (Unterminated string starting at, column 10): mend the line",
        "malformed JSON",
    ),
    "deep": (b"[" * 200_000, "is JSON nested too deeply to read: mend the line", "malformed JSON"),
    "huge_integer": (
        b'{"text": ' + b"1" * 5000 + b"}",
        "has a number too long to read: mend the line",
        "malformed JSON",
    ),
    "latin1": (
        '{"text": "größer"}'.encode("latin1"),
        "is not valid UTF-8 (byte 12): convert the file",
        "invalid UTF-8",
    ),
    "list": (b'["text"]', 'is ["text"], not a JSON object: mend the row', "not an object"),
    "no_field": (
        b'{"body": "x", "id": 1}',
        "has no field text (it has: body, id): set text_field to one of them",
        "no text field",
    ),
    "number": (b'{"text": 3}', "has 3 as field text, not a string: mend the row", "text not a string"),
    "null": (b'{"text": null}', "has null as field text, not a string: mend the row", "text not a string"),
    "empty": (b'{"text": ""}', "has an empty text as field text: remove the row", "empty text"),
    "surrogate": (
        b'{"text": "half \\ud83d"}',
        "has a lone surrogate in field text, which is no valid Unicode: mend the row",
        "invalid UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, name: str) -> None:
    line, what, reason = BAD_LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, line, b"", GOOD]))
    message = sentence(file)
    assert message.startswith(f"{file}:2 {what}")
    assert message.endswith(", or set on_bad_row=skip to leave such rows out")
    documents, reading = read(file, on_bad_row=OnBadRow.skip)
    assert [document.source for document in documents] == [f"{file}:1", f"{file}:4"]
    assert dict(reading.skipped) == {reason: 1}


def test_a_row_without_its_domain(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b'\n{"text": "x"}\n{"text": "x", "kind": null}\n')
    assert sentence(file, domain_field="kind").startswith(
        f"{file}:2 has no field kind (it has: text): set domain_field to one of them"
    )
    _, reading = read(file, domain_field="kind", on_bad_row=OnBadRow.skip)
    assert dict(reading.skipped) == {"no domain field": 1, "domain not a string": 1}


def test_bad_parquet_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", None, "", "good"]}), file)
    assert sentence(file).startswith(f"{file}:2 has null as field text, not a string: mend the row")
    documents, reading = read(file, on_bad_row=OnBadRow.skip)
    assert len(documents) == 2 and dict(reading.skipped) == {"text not a string": 1, "empty text": 1}


def test_parquet_is_read_as_a_stream(tmp_path: Path) -> None:
    """A file of 32 MiB, in 16 groups of rows and in one, never takes 8 MiB."""
    texts = [f"{i:04d} " + "x" * 2**14 for i in range(2048)]
    for rows in (128, 2048):
        file = tmp_path / f"{rows}.parquet"
        table = pyarrow.table({"text": texts})
        pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}
        pyarrow.parquet.write_table(table, file, row_group_size=rows, **pages)  # a page is held as a whole
        del table
        before, most = pyarrow.total_allocated_bytes(), 0
        source = open_source(SourceConfig(path=str(file)))
        for document, text in zip(source.documents(Reading()), texts, strict=True):
            assert isinstance(document, Document) and document.text == text
            most = max(most, pyarrow.total_allocated_bytes() - before)
        assert 0 < most < 2**23


def test_bad_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer".encode("latin1"))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"good")
    assert sentence(tmp_path).startswith(f"{tmp_path / 'a.txt'} is not valid UTF-8 (byte 2): convert the file")
    assert sentence(tmp_path / "b.txt").startswith(f"{tmp_path / 'b.txt'} has an empty text as its content: remove")
    documents, reading = read(tmp_path, on_bad_row=OnBadRow.skip)
    assert len(documents) == 1 and dict(reading.skipped) == {"invalid UTF-8": 1, "empty text": 1}


def test_a_line_of_200_megabytes(tmp_path: Path) -> None:
    """A whole corpus as one JSON array, say: it is passed over without being held in memory."""
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as handle:
        handle.write(GOOD + b"\n[")
        for _ in range(200):
            handle.write(b"x" * 1_000_000)
        handle.write(b"]\n" + GOOD)
    expected = (
        f"{file}:2 has a line of more than 67,108,864 bytes, the most that a document may have: split it, "
        "or set on_bad_row=skip to leave such rows out"
    )
    assert sentence(file) == expected
    tracemalloc.start()
    documents, reading = read(file, on_bad_row=OnBadRow.skip)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.source[-2:] for document in documents] == [":1", ":3"] and dict(reading.skipped) == {"too long": 1}
    assert peak < 1.1 * MAX_DOCUMENT_BYTES


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet"])
def test_documents_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    for module in (readers, documents_module):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    file, text = tmp_path / f"rows.{ending}", "x" * 90 + "ß" * 10
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["good", text]}), file)
    else:
        content = text.encode() if ending.startswith("txt") else GOOD + b"\n" + jsonl([{"text": text}])
        compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(ending[-3:].strip("."), bytes)
        file.write_bytes(compress(content))
    where = str(file) if ending.startswith("txt") else f"{file}:2"
    assert sentence(file).startswith(f"{where} has a ")
    assert "of more than 100 bytes, the most that a document may have: split it" in sentence(file)
    if not ending.startswith("txt"):
        documents, reading = read(file, on_bad_row=OnBadRow.skip)
        assert len(documents) == 1 and dict(reading.skipped) == {"too long": 1}


# -- files that are no good -----------------------------------------------------------------------------------------

MANY = jsonl([{"text": f"row {i} {i * 7919 % 1000}"} for i in range(5000)])


@pytest.mark.parametrize("policy", OnBadRow)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_corrupt_compressed_file_stops_whatever_the_policy(
    tmp_path: Path, name: str, damage: str, policy: OnBadRow
) -> None:
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress
    whole = compress(MANY)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    (tmp_path / name).write_bytes({"cut": whole[:-20], "flipped": flipped, "other": MANY[:1000]}[damage])
    message = sentence(tmp_path / name, on_bad_row=policy)
    # a flipped byte in a compressed stream may decompress to a bad line before its checksum is reached
    is_bad_line = damage == "flipped" and policy is OnBadRow.fail and "is not valid" in message
    expected = message.startswith(f"{tmp_path / name} is corrupt or cut short (")
    assert is_bad_line or (expected and message.endswith("): fetch it again, or leave it out"))


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_corrupt_parquet_file(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good"] * 100}), file)
    file.write_bytes({"cut": file.read_bytes()[:-30], "other": MANY[:500], "empty": b""}[damage])
    message = sentence(file, on_bad_row=OnBadRow.skip)
    assert message.startswith(f"{file} is no whole parquet file (")
    assert message.endswith("): fetch it again, or leave it out")


def test_a_damaged_parquet_page(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)]})
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[content.index(b"row 1234")] ^= 1
    file.write_bytes(content)
    assert "CRC checksum verification failed" in (message := sentence(file))
    assert message.startswith(f"{file} cannot be read (") and message.endswith("): mend it, or leave it out")


def test_a_parquet_file_without_the_field(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), file)
    expected = f"{file} has no field text (it has: body, id): set text_field to one of them"
    assert sentence(file, on_bad_row=OnBadRow.skip) == expected


def test_zstandard_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    assert sentence(tmp_path / "a.jsonl.zst").endswith("needs the zstandard package: pip install 'anchorctx[zstd]'")
