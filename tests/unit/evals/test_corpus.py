"""Held-out documents: a path that is given is read, the embedded corpus where none is."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import pytest

from anchorctx.config import resolve
from anchorctx.data.sources.source import SourceConfig, SourceFormat
from anchorctx.data.sources.stdlib import Split
from anchorctx.errors import UserError
from anchorctx.evals.corpus import Corpus, embedded, open_corpus

COMMANDS = {
    "eval": ["model=m", "out_dir=o"],
    "precision": ["model=m", "out_dir=o"],
    "kvcomm": ["model=m", "out_dir=o"],
    "train": ["out_dir=o", "data.train=d", "model.path=m"],
}


def test_without_a_path_it_is_the_embedded_corpus() -> None:
    source = open_corpus(embedded())
    assert source.described == "format=stdlib" and source.name == f"stdlib {Split.validation.value}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_on_the_command_line_is_read(tmp_path: Path, command: str) -> None:
    key = "live.corpus" if command == "train" else "corpus"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "held out"}) + "\n")
    config = attrgetter(key)(resolve(command, [*COMMANDS[command], f"{key}.path={texts}"]))
    assert list(Corpus(config)) == ["held out"]
    assert open_corpus(attrgetter(key)(resolve(command, COMMANDS[command]))).described == "format=stdlib"


def test_a_format_without_its_path_and_a_path_that_would_not_be_read() -> None:
    with pytest.raises(UserError, match="a source with format=parquet has no path: set path"):
        open_corpus(SourceConfig(format=SourceFormat.parquet))
    with pytest.raises(UserError, match="path=x.jsonl is not read with format=stdlib, the embedded corpus"):
        open_corpus(SourceConfig(format=SourceFormat.stdlib, path="x.jsonl"))
