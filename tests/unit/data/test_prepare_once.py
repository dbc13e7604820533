"""The packed set's name, and that it is made once and whole: reuse, interruption, two preparations at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from anchorctx.data import packed_set as shards
from anchorctx.data import prepare as module
from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.packing.config import LongDocuments, Policy
from anchorctx.data.prepare import TOKENS, prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.tokens.ingest import Ingest
from anchorctx.data.tokens.store import TokenWriter
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
    monkeypatch.setattr(Ingest, "run", lambda *_: pytest.fail("tokenised again"))
    assert prepare(config).manifest == first.manifest
    assert f"{first.folder} exists already" in capsys.readouterr().out
    (first.folder / "tokens_00000.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is missing or cut short: remove"):
        prepare(config)


# -- the tokens in between --------------------------------------------------------------------------------------------


def in_three_parts(config: PrepareConfig, folder: Path) -> PrepareConfig:
    """The same documents in three sources, so that they are tokenised in three parts."""
    files = [folder / f"{i}.jsonl" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[i::3]))
    return replace(config, sources=[SourceConfig(path=str(file)) for file in files])


def tokens_in(config: PrepareConfig) -> list[str]:
    folder = Path(config.out_dir) / TOKENS
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_tokens_are_removed_when_the_set_is_whole_unless_they_are_to_be_kept(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_three_parts(config, tmp_path)
    prepare(config)
    assert tokens_in(config) == []
    config = replace(config, row_length=65, keep_tokens=True)
    prepare(config)
    assert len(tokens_in(config)) == 3
    monkeypatch.setattr(TokenWriter, "close", lambda *_: pytest.fail("tokenised again"))
    other = prepare(replace(config, row_length=66))
    assert texts_in(other) == sorted(TEXTS)


def test_what_was_tokenised_before_an_error_is_not_tokenised_again(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_three_parts(config, tmp_path)
    good = (tmp_path / "2.jsonl").read_text()
    (tmp_path / "2.jsonl").write_text(good + "{oops}\n")
    with pytest.raises(UserError, match="2.jsonl:5 is not valid JSON"):
        prepare(config)
    assert len(tokens_in(config)) == 2
    (tmp_path / "2.jsonl").write_text(good)
    real, closed = TokenWriter.close, []
    monkeypatch.setattr(TokenWriter, "close", lambda *given: closed.append(1) or real(*given))
    assert texts_in(prepare(config)) == sorted(TEXTS)
    assert len(closed) == 1 and tokens_in(config) == []


def test_a_damaged_token_store_is_noticed(config: PrepareConfig, tmp_path: Path) -> None:
    config.keep_tokens = True
    prepare(config)
    (name,) = tokens_in(config)
    file = Path(config.out_dir) / TOKENS / name / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="tokens.bin is missing or cut short: remove .* and prepare again"):
        prepare(replace(config, row_length=65))


# -- interruption, and two at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["tokenising", "packing"])
def test_an_interrupted_preparation_leaves_nothing_half_written_and_the_next_succeeds(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], stage: str
) -> None:
    owner, name = {"tokenising": (TokenWriter, "add"), "packing": (module, "write_shard")}[stage]
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (8 if stage == "tokenising" else 2):
            raise error("stopped")
        return real(*args)

    monkeypatch.setattr(owner, name, interrupted)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 128)
    config.pack.policy = Policy.one_per_row
    with pytest.raises(error, match="stopped"):
        prepare(config)
    out = Path(config.out_dir)
    assert not out.exists() if stage == "tokenising" else [path.name for path in out.iterdir()] == [TOKENS]
    monkeypatch.setattr(owner, name, real)
    assert texts_in(prepare(config)) == sorted(TEXTS)
    assert len(list(Path(config.out_dir).iterdir())) == 1


SCRIPT = """
import os, sys, time
from pathlib import Path
from anchorctx.data.prepare import Preparation, prepare
from anchorctx.data.config import PrepareConfig
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.tokens.store import TokenWriter
import logging
logging.basicConfig(level=logging.INFO)
real = TokenWriter.add
def slow(self, *args):
    Path(sys.argv[4]).touch()
    if os.environ.get("DIE"):
        os._exit(9)
    time.sleep(0.3)
    real(self, *args)
TokenWriter.add = slow
sources = [SourceConfig(path=sys.argv[2])]
prepare(PrepareConfig(out_dir=sys.argv[1], sources=sources, tokenizer=sys.argv[3], row_length=64))
"""


def start(config: PrepareConfig, mark: Path, **environment: str) -> subprocess.Popen[str]:
    arguments = [config.out_dir, config.sources[0].path, config.tokenizer, str(mark)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_one_process_writes_while_the_other_waits(config: PrepareConfig, tmp_path: Path) -> None:
    both = [start(config, tmp_path / name) for name in ("first", "second")]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    waited = ["waiting for process " in errors for _, errors in outputs]
    assert sorted(waited) == [False, True]
    assert ["exists already" in printed for printed, _ in outputs] == waited
    assert [not (tmp_path / name).exists() for name in ("first", "second")] == waited
    (only,) = Path(config.out_dir).iterdir()
    assert texts_in(PackedSet.open(only)) == sorted(TEXTS)


def test_whoever_waits_for_a_process_that_is_killed_does_the_work(config: PrepareConfig, tmp_path: Path) -> None:
    first = start(config, tmp_path / "first", DIE="1")
    assert first.wait(timeout=120) == 9
    first.communicate()
    assert all(path.name.startswith(".") for path in Path(config.out_dir).iterdir())  # what no reader sees
    assert texts_in(prepare(config)) == sorted(TEXTS)
    assert len(list(Path(config.out_dir).iterdir())) == 1
