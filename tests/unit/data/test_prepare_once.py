"""The packed set's name, and that it is made once and whole: reuse, interruption, two preparations at a time."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from anchorctx.data import prepare as module
from anchorctx.data.pack import LongDocuments, Policy
from anchorctx.data.prepare import PrepareConfig, prepare
from anchorctx.data.shards import PackedSet
from anchorctx.errors import UserError

from .byte_corpus import TEXTS, byte_tokenizer, small_config, texts_in


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def config(tmp_path: Path, byte_dir: Path) -> PrepareConfig:
    return small_config(tmp_path, byte_dir)


# -- the fingerprint ------------------------------------------------------------------------------------------------


def change_content(config: PrepareConfig, tmp_path: Path) -> None:
    file = Path(config.sources[0].path)
    file.write_text(file.read_text().replace("document 3", "document 8"))


def change_tokenizer(config: PrepareConfig, tmp_path: Path) -> None:
    config.tokenizer = str(byte_tokenizer(tmp_path / "other", bos_token="<S>", eos_token="</s>"))


CHANGES: dict[str, Any] = {
    "content": change_content,
    "tokenizer": change_tokenizer,
    "policy": lambda c, _: setattr(c.pack, "policy", Policy.concat_split),
    "long_documents": lambda c, _: setattr(c.pack, "long_documents", LongDocuments.drop),
    "min_length": lambda c, _: setattr(c.pack, "min_length", 2),
    "interleave": lambda c, _: setattr(c.pack, "interleave", 2),
    "row_length": lambda c, _: setattr(c, "row_length", 65),
    "anchor_len": lambda c, _: setattr(c, "anchor_len", 2),
    "append_eos": lambda c, _: setattr(c, "append_eos", False),
    "domain": lambda c, _: setattr(c.sources[0], "domain", "books"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_rows_changes_the_fingerprint(config: PrepareConfig, tmp_path: Path, name: str) -> None:
    first = prepare(config).fingerprint
    CHANGES[name](config, tmp_path)
    assert prepare(config).fingerprint != first


def test_places_and_workers_do_not_change_the_fingerprint(
    config: PrepareConfig, tmp_path: Path, byte_dir: Path
) -> None:
    first = prepare(config)
    moved = tmp_path / "elsewhere" / "corpus.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(Path(config.sources[0].path).read_bytes())
    copy = tmp_path / "copy"
    PreTrainedTokenizerFast.from_pretrained(byte_dir).save_pretrained(copy)
    other = prepare(
        replace(
            config,
            out_dir=str(tmp_path / "other"),
            sources=[replace(config.sources[0], path=str(moved))],
            tokenizer=str(copy),
            workers=1,
        )
    )
    assert other.fingerprint == first.fingerprint and other.folder != first.folder
    for i in range(len(first)):
        np.testing.assert_array_equal(other.row(i).input_ids, first.row(i).input_ids)


def test_worker_processes_give_the_same_set(config: PrepareConfig, tmp_path: Path) -> None:
    one = prepare(config)
    two = prepare(replace(config, out_dir=str(tmp_path / "two"), workers=2))
    files = [name for name in one.manifest["files"] if name.endswith(("npy", "npz"))]
    assert [one.manifest["files"][name] for name in files] == [two.manifest["files"][name] for name in files]


def test_a_set_that_exists_is_used(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(config)
    monkeypatch.setattr(module, "tokenize", lambda *_: pytest.fail("tokenised again"))
    assert prepare(config).manifest == first.manifest
    assert f"{first.folder} exists already" in capsys.readouterr().out
    (first.folder / "tokens_00000.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is missing or cut short: remove"):
        prepare(config)


# -- interruption, and two at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_preparation_leaves_nothing_and_the_next_succeeds(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real, calls = module.tokenize, []

    def interrupted(*args: Any) -> Any:
        for number, document in enumerate(real(*args)):
            calls.append(number)
            if number == 7:
                raise error("stopped")
            yield document

    monkeypatch.setattr(module, "tokenize", interrupted)
    config.pack.policy = Policy.one_per_row
    with pytest.raises(error, match="stopped"):
        prepare(config)
    assert len(calls) == 8 and not Path(config.out_dir).exists()
    monkeypatch.setattr(module, "tokenize", real)
    assert texts_in(prepare(config)) == sorted(TEXTS)


def test_two_preparations_at_once_give_one_whole_set(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand in for two processes; both are in the middle of writing before either goes on."""
    real, middle = module.tokenize, threading.Barrier(2, timeout=60)

    def together(*args: Any) -> Any:
        for number, document in enumerate(real(*args)):
            if number == 5:
                middle.wait()
            yield document

    monkeypatch.setattr(module, "tokenize", together)
    results: list[PackedSet] = []
    threads = [threading.Thread(target=lambda: results.append(prepare(replace(config)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and len({result.folder for result in results}) == 1
    assert [path.name for path in Path(config.out_dir).iterdir()] == [results[0].folder.name]
    assert texts_in(PackedSet.open(results[0].folder)) == sorted(TEXTS)
