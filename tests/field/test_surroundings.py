"""What a process finds around it: closed outputs, narrow encodings, folders that are gone, variables left empty.

The comments name public reports of the kind. No text of theirs is copied.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorctx.cli.main import main
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.tokens import encode
from anchorctx.evals import distribute
from anchorctx.models import ModelConfig, load_model
from anchorctx.testing import readers
from anchorctx.testing.tiny import save, text_model, word_tokenizer

TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 " * 40


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    word_tokenizer(64).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path


def prepare(out: str = "packed", source: str = "corpus.txt") -> int:
    words = [f"out_dir={out}", "tokenizer=tokenizer", "row_length=64", f"sources=[{{path: '{source}'}}]", "workers=1"]
    return main(["prepare", *words])


def packed(out: str = "packed") -> PackedSet:
    (manifest,) = Path(out).glob("*/manifest.json")
    return PackedSet.open(manifest.parent)


# verigak/progress #53, AnswerDotAI/fastprogress #21, cube-js/cube #10378: a container's terminal knows ASCII alone
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_signs_that_the_terminal_lacks_do_not_end_a_run(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    Path("文.txt").write_text(TEXT)
    assert prepare("文", "文.txt") == 0 and len(packed("文")) == 6
    sys.stdout.flush()
    assert rb"packed set: \u6587/" in raw.getvalue()


# pixelb/crudini #82, treeverse/dvc #10041, python/cpython #75985: services close what nobody reads
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_output_does_not_end_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)
    assert prepare() == 0 and len(packed()) == 6
    with contextlib.suppress(AttributeError):
        getattr(sys, name).close()


# typesafehub/conductr-cli #502: hydra asks for it, whatever the paths are
def test_a_folder_that_is_gone_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    assert prepare() == 2
    monkeypatch.chdir(here)
    error = capsys.readouterr().err
    assert "the folder in which you started it is gone: change into one that exists" in error and error.count("\n") == 1


# NVIDIA/Megatron-LM #4991: places among processes that a job's template left empty, or filled with something else
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_places_that_are_no_numbers_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv(name, "not-an-int")
    assert prepare() == 2 and not Path("packed").exists()
    assert (
        f"{name}=not-an-int in the environment must be a number, as torchrun sets it: unset" in capsys.readouterr().err
    )


def test_places_that_are_empty_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert prepare() == 0 and distribute.is_first()


# kz26/dottorrent #9, run-llama/llama_index #10369, openSUSE/obs-service-tar_scm #312: names in an older encoding
@pytest.mark.parametrize("source", ["folder", "folder/*.txt", "folder/k\udce4.txt"])
def test_a_corpus_whose_name_is_not_utf_8(source: str) -> None:
    Path("folder").mkdir()
    Path("folder/k\udce4.txt").write_text(TEXT)
    assert prepare(source=source) == 0
    assert prepare(source=source) == 0  # and again: its manifest is read
    assert len(packed()) == 6 and r"k\\udce4.txt" in (packed().folder / "manifest.json").read_text()


def test_an_output_whose_name_is_not_utf_8_is_refused(capsys: Any) -> None:
    assert prepare(out="l\udce4ufe") == 2
    error = capsys.readouterr().err
    assert r"out_dir='l\udce4ufe' must be UTF-8" in error and error.count("\n") == 1
    assert not list(Path().glob("l*"))


# letta-ai/letta-code #3506, fli-iam/shanoir-ng #2576: what a Mac leaves beside each file, under its ending
def test_the_companions_of_a_macs_files_are_no_documents() -> None:
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    Path("folder/._a.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    Path("folder/.DS_Store").touch()
    assert prepare(source="folder") == 0 and len(packed()) == 6


# huggingface/datasets #8241, microsoft/promptflow #4172, pydantic/pydantic-ai #8316: a mark of Windows' editors
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_a_byte_order_mark_is_no_text(ending: str) -> None:
    content = json.dumps({"text": TEXT}) if ending == "jsonl" else TEXT
    Path(f"marked.{ending}").write_text(content, encoding="utf-8-sig")
    Path(f"plain.{ending}").write_text(content)
    assert prepare("a", f"marked.{ending}") == prepare("b", f"plain.{ending}") == 0
    assert list(packed("a").row(0).input_ids) == list(packed("b").row(0).input_ids)


# galilai-group/stable-pretraining #24, SpikeInterface/spikeinterface #4723, speechbrain/speechbrain #2972
def test_workers_are_as_many_as_the_processors_that_a_job_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert encode.default_workers(None) == 4


# huggingface/transformers #47852, strands-labs/robots #3793: a checkpoint that is mounted to be read alone
@pytest.mark.parametrize("command", [readers.train, readers.plan, readers.evaluation, readers.precision])
def test_nothing_is_written_beside_a_checkpoint(command: Any, here: Path) -> None:
    tokenizer = word_tokenizer(40)
    folder = save(text_model(tokenizer, 64), tokenizer, here / "model")
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    command(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


# jundot/omlx #3224, Layr-Labs/d-inference #260: the hub's cache, whose files are links to blobs without an ending
def test_a_checkpoint_of_links_is_read(here: Path) -> None:
    tokenizer = word_tokenizer(40)
    model = text_model(tokenizer, 64)
    save(model, tokenizer, here / "blobs")
    (here / "snapshot").mkdir()
    for number, file in enumerate(sorted((here / "blobs").iterdir())):
        (here / "snapshot" / file.name).symlink_to(file.rename(here / "blobs" / f"{number:040x}"))
    readers.evaluation(here / "snapshot")
    found = load_model(ModelConfig(path=str(here / "snapshot"))).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())
