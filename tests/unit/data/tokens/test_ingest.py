"""The first stage in stretches: what was tokenised is kept, through interruptions and bad rows, and not done twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.data.config import PrepareConfig
from anchorctx.data.prepare import Preparation, prepare
from anchorctx.data.sources.documents import OnBadRow
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.tokens import ingest
from anchorctx.data.tokens.store import TokenPart
from anchorctx.errors import UserError

from ..byte_corpus import byte_tokenizer, texts_in

TEXTS = [f"document {i:02d}" for i in range(40)]  # 11 tokens each, and EOS


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Stretches of five documents; batches of one, so that nothing is read far ahead."""
    monkeypatch.setattr(ingest, "STRETCH_TOKENS", 50)
    monkeypatch.setattr("anchorctx.data.tokens.encode.BATCH_DOCUMENTS", 1)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    corpus = tmp_path / "corpus.jsonl"
    write(corpus, [json.dumps({"text": text}) for text in TEXTS])
    sources = [SourceConfig(path=str(corpus))]
    return PrepareConfig(out_dir=str(tmp_path / "out"), sources=sources, tokenizer=str(tokenizer), row_length=64)


def write(file: Path, lines: list[str]) -> None:
    file.write_text("".join(line + "\n" for line in lines))


def stretches(config: PrepareConfig) -> list[TokenPart]:
    preparation = Preparation(config)
    part, on_bad_row = preparation.sources[0].parts[0], config.sources[0].on_bad_row
    return [TokenPart.open(folder) for folder in preparation.ingest.run(part, on_bad_row)]


def count_tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised from now on."""
    seen: list[str] = []
    tokenize = ingest.tokenize

    def counting(documents: Any, *rest: Any) -> Iterator[Any]:
        def noting() -> Iterator[Any]:
            for document in documents:
                seen.append(document.text)
                yield document

        return tokenize(noting(), *rest)

    monkeypatch.setattr(ingest, "tokenize", counting)
    return seen


def test_the_stretches_are_the_part(config: PrepareConfig) -> None:
    found = stretches(config)
    assert [len(part.documents) for part in found] == [5] * 8 + [0]  # the last: nothing comes after it
    assert [part.facts["is_last"] for part in found] == [False] * 8 + [True]
    ids = np.concatenate([np.fromfile(part.folder / "tokens.bin", np.uint16) for part in found])
    tokenizer = Preparation(config).tokenizer
    assert str(tokenizer.decode(ids)).split(str(tokenizer.eos_token))[:-1] == TEXTS


def test_an_interrupted_part_goes_on_after_its_last_stretch(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, added = ingest.TokenWriter.add, []

    def interrupted(self: Any, *arguments: Any) -> None:
        added.append(arguments)
        if len(added) == 23:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest.TokenWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    seen = count_tokenised(monkeypatch)
    packed = prepare(config)
    assert seen == TEXTS[20:] and texts_in(packed) == TEXTS
    whole = prepare(dataclasses.replace(config, out_dir=str(tmp_path / "at_once")))
    assert packed.manifest["files"] == whole.manifest["files"]
    assert packed.manifest["accounting"] == whole.manifest["accounting"]


def test_what_was_tokenised_before_a_bad_row_is_used_when_such_rows_are_skipped(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Path(config.sources[0].path)
    lines = corpus.read_text().splitlines()
    write(corpus, [*lines[:30], "{oops", *lines[30:]])
    with pytest.raises(UserError, match=r"corpus.jsonl:31 is not valid JSON"):
        prepare(config)
    config.sources[0].on_bad_row = OnBadRow.skip
    seen = count_tokenised(monkeypatch)
    packed = prepare(config)
    assert texts_in(packed) == TEXTS and packed.manifest["skipped_rows"] == {"malformed JSON": 1}
    assert seen[0] in TEXTS[20:31] and seen == TEXTS[-len(seen) :]


def test_skipped_rows_are_not_hidden_from_one_who_wants_none(config: PrepareConfig) -> None:
    corpus = Path(config.sources[0].path)
    lines = corpus.read_text().splitlines()
    write(corpus, [*lines[:7], "{oops", *lines[7:], '{"text": ""}'])
    config.sources[0].on_bad_row, config.keep_tokens = OnBadRow.skip, True
    skipped = sum((part.skipped for part in stretches(config)), start=type(stretches(config)[0].skipped)())
    assert skipped == {"malformed JSON": 1, "empty text": 1}
    config.sources[0].on_bad_row = OnBadRow.fail
    for _ in range(2):
        with pytest.raises(UserError, match=r"corpus.jsonl:8 is not valid JSON"):
            prepare(config)
