from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from anchorctx.data.sources.documents import OnBadRow, Reading
from anchorctx.data.sources.source import SourceConfig, SourceFormat, open_source
from anchorctx.data.sources.stdlib import Split, StdlibConfig
from anchorctx.errors import UserError


def sentence(**options: Any) -> str:
    with pytest.raises(UserError) as error:
        source = open_source(SourceConfig(**options))
        list(source.documents(Reading(source.on_bad_row)))
    assert "\n" not in str(error.value)
    return str(error.value)


def identity(path: Path, **options: Any) -> dict[str, Any]:
    return open_source(SourceConfig(path=str(path), **options)).identity


def test_a_missing_file(tmp_path: Path) -> None:
    expected = (
        f"path={tmp_path / 'no.jsonl'} names no file or folder and matches none as a glob: correct it, "
        "or set format=datasets if it is the name of a Hugging Face dataset"
    )
    assert sentence(path=str(tmp_path / "no.jsonl")) == expected
    assert sentence(path=str(tmp_path / "*.jsonl")).startswith(f"path={tmp_path / '*.jsonl'} names no file or folder")


def test_no_path() -> None:
    expected = "a source with format=auto has no path: set path to a file, folder or glob"
    assert sentence() == expected


def test_two_domains(tmp_path: Path) -> None:
    expected = "x has both domain_field=kind and domain=books: set one"
    assert sentence(path="x", domain_field="kind", domain="books") == expected


def test_a_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    message = sentence(path=str(tmp_path))
    assert message.startswith(f"path={tmp_path} holds no readable file: name one that has files ending in .jsonl")
    (tmp_path / "picture.png").rename(tmp_path / "notes.txt")
    message = sentence(path=str(tmp_path), format=SourceFormat.parquet)
    assert message.startswith(f"path={tmp_path} holds no parquet file: ")


def test_an_ending_that_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "corpus.data"
    file.write_text('{"text": "x"}\n')
    assert sentence(path=str(file)).startswith(f"{file} ends in none of .jsonl, ")
    source = open_source(SourceConfig(path=str(file), format=SourceFormat.jsonl))
    assert [document.text for document in source.documents(Reading())] == ["x"]


def test_an_empty_corpus(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n")
    expected = f"path={file} holds no documents: name a source that has some"
    assert sentence(path=str(file)) == expected
    file.write_text('{"text": ""}\n{"text": 1}\n')
    expected = f"path={file} holds no documents (2 rows were skipped): name a source that has some"
    assert sentence(path=str(file), on_bad_row=OnBadRow.skip) == expected


def test_identity_is_the_content_and_not_its_place_or_time(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.txt").write_text("first")
        (tmp_path / place / "2.txt").write_text("second")
    same = identity(tmp_path / "a")
    assert identity(tmp_path / "b") == same
    file = tmp_path / "a" / "2.txt"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert identity(tmp_path / "a") == same
    file.write_text("secomd")  # as long as before, and with its time put back
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(tmp_path / "a") != same


@pytest.mark.parametrize(
    "options",
    [{"text_field": "body"}, {"domain": "books"}, {"on_bad_row": OnBadRow.skip}, {"format": SourceFormat.jsonl}],
)
def test_settings_that_change_the_documents_change_the_identity(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "body": "y"}\n')
    assert identity(tmp_path / "a.jsonl", **options) != identity(tmp_path / "a.jsonl")


def test_names_and_order_of_files_are_identity(tmp_path: Path) -> None:
    for place, names in (("a", ("1", "2")), ("b", ("2", "1"))):
        (tmp_path / place).mkdir()
        for name, text in zip(names, ("first", "second"), strict=True):
            (tmp_path / place / f"{name}.txt").write_text(text)
    assert identity(tmp_path / "a") != identity(tmp_path / "b")


def test_a_saved_dataset_is_identified_by_its_content(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "y")):
        datasets.Dataset.from_list([{"text": text}]).save_to_disk(str(tmp_path / name))
    assert identity(tmp_path / "a") == identity(tmp_path / "a") != identity(tmp_path / "b")


def test_the_embedded_corpus_and_its_splits() -> None:
    sources = [
        open_source(SourceConfig(format=SourceFormat.stdlib, stdlib=StdlibConfig(split=split)))
        for split in (Split.validation, Split.validation, Split.train)
    ]
    assert sources[0].identity == sources[1].identity != sources[2].identity
    reading = Reading()
    assert list(sources[0].documents(reading)) and reading.bytes_read == sources[0].total_bytes
