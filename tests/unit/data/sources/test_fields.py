"""Rows of token ids, in the layouts that people have, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from anchorctx.data.config import PrepareConfig
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.documents import OnBadRow, Reading, Tokens
from anchorctx.data.sources.source import SourceConfig, SourceFormat, open_source
from anchorctx.errors import UserError

from ..byte_corpus import byte_tokenizer

IDS = [list(range(1, 11)), list(range(11, 16))]
DOCUMENTS = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
LAYOUTS: dict[str, list[Any]] = {
    "ends": [[4, 10], [2, 5]],
    "cumulative": [[0, 4, 10], [0, 2, 5]],
    "starts": [[0, 4], [0, 2]],  # the last document reaches to the end
    "ranges": [[[0, 4], [4, 10]], [[0, 2], [2, 5]]],
    "source": [[{"end": 4}, {"end": 10}], [{"end": 2}, {"end": 5}]],
}


def rows(name: str) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "bounds": bounds} for ids, bounds in zip(IDS, LAYOUTS[name], strict=True)]


def config(path: Path, **options: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **{"tokens_field": "input_ids", "boundaries_field": "bounds", **options})


def read(source: SourceConfig) -> list[Tokens]:
    opened = open_source(source)
    found = list(opened.documents(Reading(opened.on_bad_row)))
    assert all(isinstance(document, Tokens) for document in found)
    return found  # type: ignore[return-value]


def write(folder: Path, kind: str, content: list[dict[str, Any]]) -> Path:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    else:
        datasets.Dataset.from_list(content).save_to_disk(str(file))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_documents(tmp_path: Path, kind: str, name: str) -> None:
    found = read(config(write(tmp_path, kind, rows(name))))
    assert [document.ids.tolist() for document in found] == DOCUMENTS
    assert [document.source[-1] for document in found] == ["1", "1", "2", "2"]


def test_without_boundaries_a_row_is_a_document(tmp_path: Path) -> None:
    found = read(config(write(tmp_path, "jsonl", rows("ends")), boundaries_field=None))
    assert [document.ids.tolist() for document in found] == IDS


def test_tokens_after_the_last_boundary_are_not_lost(tmp_path: Path) -> None:
    file = write(tmp_path, "jsonl", [{"input_ids": [1, 2, 3, 4], "bounds": [1]}])
    assert [document.ids.tolist() for document in read(config(file))] == [[1], [2, 3, 4]]


def test_domains_come_from_the_boundaries_where_they_name_one(tmp_path: Path) -> None:
    bounds = [{"end": 2, "source": "books"}, {"end": 3}]
    file = write(tmp_path, "jsonl", [{"input_ids": [1, 2, 3], "bounds": bounds}])
    assert [document.domain for document in read(config(file, domain="web"))] == ["books", "web"]


def test_nested_fields(tmp_path: Path) -> None:
    row = {"meta": {"set": "books", "ids": [1, 2]}, "a.b": [3, 4]}
    file = write(tmp_path, "jsonl", [row])
    (nested,) = read(config(file, tokens_field="meta.ids", boundaries_field=None, domain_field="meta.set"))
    assert nested.ids.tolist() == [1, 2] and nested.domain == "books"
    assert read(config(file, tokens_field="a.b", boundaries_field=None))[0].ids.tolist() == [3, 4]
    table = write(tmp_path, "parquet", [{"meta": {"set": "books"}, "text": "x"}])
    (document,) = open_source(SourceConfig(path=str(table), domain_field="meta.set")).documents(Reading())
    assert document.domain == "books"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "not increasing": (
        {"input_ids": [1, 2, 3], "bounds": [2, 2, 3]},
        "has 2 after 2 in bounds, which must increase: mend the row",
        "bad boundaries",
    ),
    "negative": (
        {"input_ids": [1, 2, 3], "bounds": [-1, 3]},
        "has -1 after 0 in bounds, which must increase: mend the row",
        "bad boundaries",
    ),
    "past the end": (
        {"input_ids": [1, 2, 3], "bounds": [{"end": 2}, {"end": 5}]},
        "has 5 in bounds, past the end of its 3 tokens: mend the row",
        "bad boundaries",
    ),
    "gap": (
        {"input_ids": [1, 2, 3], "bounds": [[0, 1], [2, 3]]},
        "has ranges in bounds that do not follow each other from 0, which would lose tokens: mend the row",
        "bad boundaries",
    ),
    "mixed": (
        {"input_ids": [1, 2, 3], "bounds": [1, "3"]},
        'has [1, "3"] as field bounds, neither ends, [start, end] nor {"end": ...}: set boundaries_field to the '
        "field that is, or mend the row",
        "bad boundaries",
    ),
    "number": (
        {"input_ids": [1, 2, 3], "bounds": 3},
        "has 3 as field bounds, not a list: mend the row",
        "bad boundaries",
    ),
    "text": (
        {"input_ids": "abc", "bounds": [1]},
        'has "abc" as field input_ids, not a list of integers: mend the row',
        "ids not integers",
    ),
    "mixed ids": (
        {"input_ids": [1, "2"], "bounds": [1]},
        'has [1, "2"] as field input_ids, not a list of integers: mend the row',
        "ids not integers",
    ),
    "floats": (
        {"input_ids": [1.5], "bounds": [1]},
        "has [1.5] as field input_ids, not a list of integers: mend the row",
        "ids not integers",
    ),
    "nested": (
        {"input_ids": [[1], [2, 3]], "bounds": [1]},
        "has [[1], [2, 3]] as field input_ids, not a list of integers: mend the row",
        "ids not integers",
    ),
    "huge": (
        {"input_ids": [10**30], "bounds": [1]},
        "has [1000000000000000000000000000000] as field input_ids, not a list of integers: mend the row",
        "ids not integers",
    ),
    "empty": ({"input_ids": [], "bounds": []}, "has no token in field input_ids: remove the row", "no tokens"),
    "missing": (
        {"ids": [1], "bounds": []},
        "has no field input_ids (it has: ids, bounds): set tokens_field to one of them",
        "no tokens field",
    ),
    "no boundaries": (
        {"input_ids": [1]},
        "has no field bounds (it has: input_ids): set boundaries_field to one of them",
        "no boundaries field",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, name: str) -> None:
    row, what, reason = BAD[name]
    good = {"input_ids": [7, 8], "bounds": [2]}
    file = write(tmp_path, "jsonl", [good, row, good])
    with pytest.raises(UserError) as error:
        read(config(file))
    assert str(error.value) == f"{file}:2 {what}, or set on_bad_row=skip to leave such rows out"
    source = open_source(config(file, on_bad_row=OnBadRow.skip))
    reading = Reading(source.on_bad_row)
    assert len(list(source.documents(reading))) == 2 and dict(reading.skipped) == {reason: 1}


def test_bad_rows_of_arrow_tables(tmp_path: Path) -> None:
    for number, ids in enumerate(([[1, 2], None], [[1, 2], [3, None]], [[1.5], [2.0]])):
        file = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": ids}), file)
        with pytest.raises(UserError, match="as field input_ids, not a list of integers"):
            read(config(file, boundaries_field=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_field": None}, "x has boundaries_field=bounds but no tokens_field: set tokens_field=input_ids"),
        (
            {"format": SourceFormat.text},
            "x has tokens_field=input_ids, but format=text has no fields: set format",
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(config(Path("x"), **options))


# -- as a user runs it ------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> PrepareConfig:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")  # 258 ids
    source = config(write(tmp_path, "jsonl", rows("cumulative")))
    return PrepareConfig(out_dir=str(tmp_path / "out"), sources=[source], tokenizer=str(tokenizer), row_length=16)


def test_ids_are_packed_as_they_are_and_get_one_eos(prepared: PrepareConfig, tmp_path: Path) -> None:
    eos = 257
    content = [{"input_ids": [*IDS[0], eos, *IDS[1]], "bounds": [0, 4, 11, 16]}]
    prepared.sources = [config(write(tmp_path, "jsonl", content))]
    packed = prepare(prepared)
    account = packed.manifest["accounting"]
    assert (account["document_tokens"], account["eos_tokens"]) == (16, 2)  # the second has its own
    found = []
    for row in map(packed.row, range(len(packed))):
        docs = row.layout.token_docs()
        found += [row.input_ids[docs == doc].tolist() for doc in np.unique(docs[1:])]
    assert [1, 2, 3, 4, eos] in found and [5, 6, 7, 8, 9, 10, eos] in found and [11, 12, 13, 14, 15, eos] in found


def test_ids_outside_the_vocabulary_are_named_with_their_row(prepared: PrepareConfig, tmp_path: Path) -> None:
    for wrong in (258, -1):
        file = write(
            tmp_path, "jsonl", [{"input_ids": [1, 2], "bounds": [2]}, {"input_ids": [1, wrong], "bounds": [2]}]
        )
        prepared.sources = [config(file)]
        with pytest.raises(UserError) as error:
            prepare(prepared)
        assert str(error.value) == (
            f"{file}:2 has token id {wrong}, outside the tokenizer's 0 to 257: set tokenizer to the one that made the "
            "ids, or set on_bad_row=skip to leave such rows out"
        )
    prepared.sources[0].on_bad_row = OnBadRow.skip
    assert prepare(prepared).manifest["skipped_rows"] == {"id outside the vocabulary": 1}


def test_texts_are_needed_where_texts_are_needed(tmp_path: Path) -> None:
    source = open_source(config(write(tmp_path, "jsonl", rows("ends"))))
    with pytest.raises(UserError, match="holds token ids, not texts: name a source of texts"):
        list(source.texts(Reading()))
