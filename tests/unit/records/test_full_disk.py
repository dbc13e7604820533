"""Every command on a disk that fails at one write after another: what is left, what is said, and that it goes on.

A few writes of each command here, all of them with --slow, and there on real file systems of a few pages too.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anchorctx.cli.main import main
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.records.disk import DiskError
from anchorctx.records.locks import sole_writer
from anchorctx.records.manifest import write_manifest
from anchorctx.records.results import read_results
from anchorctx.testing.full_disk import FailingDisk, small_disk
from anchorctx.testing.tiny import save, text_model
from anchorctx.train import export
from anchorctx.train.callbacks import METRICS, JsonlMetrics
from anchorctx.train.checkpoints.compare import configuration

LINES = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))
HIDDEN = {".lock", ".tokens"}
"""Hidden names that a command leaves on purpose: nothing half-written has another."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command on tiny inputs."""

    words: Callable[[Path], list[str]]
    """Its words for an output in a folder."""
    result: Callable[[Path], Any]
    """What it made there, to be compared; it fails on half a result."""
    once: bool = False
    """Refuses to write what exists."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, a run with a checkpoint's weights, and results."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    save(text_model(tokenizer, 512), tokenizer, folder / "tiny")
    save(text_model(tokenizer, 512), tokenizer, folder / "run" / "model")
    write_manifest(folder / "run", {"command": "train", "config": {}, "row_length": 64})
    rows = [{"step": step, "tokens": 64 * step, "train/loss": 4.0 / step} for step in (1, 2, 3)]
    (folder / "run" / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [LINES, *LINES.split("\n\n\n")[:40]]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def commands(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    model, corpus, run = inputs / "tiny", f"corpus={{path: {inputs / 'corpus.jsonl'}, format: auto}}", inputs / "run"
    weights = text_model(train_tokenizer(vocabulary=300, sample_chars=20_000), 512)
    found = SimpleNamespace(folder=inputs, state=SimpleNamespace(model=configuration(weights.config)))
    monkeypatch.setattr(export, "_checkpoint", lambda *_: found)  # reading checkpoints is tested elsewhere
    monkeypatch.setattr(export, "gather", lambda _: {})
    monkeypatch.setattr(export, "_restore", lambda *_: (weights, dict(weights.state_dict())))
    monkeypatch.setattr(export, "model_card", lambda *_: "a card\n")
    small = ["perplexity={max_length: 128, documents: 4}", "retrieval={lengths: [64, 128], rows: 1}"]
    tasks = ["tasks=[copy]", "arms=[naive]", "copy={problems: 1, question: 20, prefix: 10, output: 3}"]
    return {
        "prepare": Command(
            lambda out: [
                *("prepare", f"out_dir={out}", f"sources=[{{path: {inputs / 'corpus.jsonl'}}}]", "workers=1"),
                *(f"tokenizer={model}", "row_length=64"),
            ],
            lambda out: [PackedSet.open(one).manifest["files"] for one in out.glob("[!.]*")],
        ),
        "export": Command(lambda out: ["export", f"run={run}", f"out_dir={out}", "dtype=float32"], files, once=True),
        "eval": Command(
            lambda out: ["eval", f"model={model}", f"out_dir={out}", corpus, *small, "evals=[perplexity,retrieval]"],
            lambda out: list(read_results(out / "results.jsonl")) if (out / "results.jsonl").exists() else [],
        ),
        "report": Command(lambda out: ["report", str(run), f"out={out / 'page.html'}"], files),
        "plot": Command(lambda out: ["plot", f"run={run}", f"out_dir={out}"], files),
        "kvcomm": Command(
            lambda out: ["kvcomm", f"model={model}", f"out_dir={out}", corpus, "compare_tokens=2", *tasks],
            lambda out: [(row.metric, row.key) for row in read_results(out / "results.jsonl")],
        ),
    }


def files(folder: Path) -> dict[str, bytes]:
    """Names and contents."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def half_written(folder: Path) -> list[Path]:
    """What a command that failed should have removed."""
    hidden = (path for path in folder.rglob(".*") if path.name not in HIDDEN)
    return [path for path in hidden if not (path.parent.name == ".tokens" and (path / "part.json").is_file())]


def sweep(
    command: Command,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    points: Callable[[int], Iterator[int]],
    number: int = errno.ENOSPC,
) -> None:
    """Let a command fail at chosen writes, each in a new folder: in one sentence, and nothing is left half-written.

    Then it runs to its end. Exit code 0 says that all is there: so it may end where only what no longer matters failed.
    """
    with FailingDisk(folder) as disk:
        assert main(command.words(folder / "whole" / "out")) == 0, capsys.readouterr().err
    expected = command.result(folder / "whole" / "out")
    assert expected and disk.writes > 1
    for write in points(disk.writes):
        out, where = folder / str(write) / "out", f"write {write} of {disk.writes}"
        with FailingDisk(out.parent, write, number):
            code = main(command.words(out))
        said = capsys.readouterr().err.strip().splitlines()[-1:]
        assert not half_written(out.parent), where
        if code == 0:
            assert command.result(out) == expected, where
        else:
            assert code == 2 and re.search(r"cannot be written to .*: .* free\).*: \w+", said[0]), f"{where}: {said}"
        assert (command.once and code == 0) or main(command.words(out)) == 0, f"{where}: {capsys.readouterr().err}"
        assert command.result(out) == expected, where
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("name", ["prepare", "export", "eval", "report", "plot"])
def test_a_command_whose_disk_is_full_says_so_and_goes_on(
    name: str, commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(commands[name], tmp_path, capsys, lambda total: iter(sorted({total * i // 4 for i in (1, 2, 3)})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "export", "eval", "report", "plot", "kvcomm"])
def test_every_write_of_every_command(
    name: str, commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # kvcomm writes as eval does, and takes ten times as long
    sweep(commands[name], tmp_path, capsys, lambda total: iter(range(1, total + 1, 7 if name == "kvcomm" else 1)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("name", ["prepare", "export", "eval"])
def test_other_refusals_at_some_writes(
    name: str, number: int, commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(commands[name], tmp_path, capsys, lambda total: iter(range(1, total + 1, 9)), number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "export", "eval", "report", "plot"])
def test_real_disks_of_more_and_more_pages(
    name: str, commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by whatever writes, in C and Rust too; each disk has a few pages more, until the command has room."""
    command = commands[name]
    assert main(command.words(tmp_path / "whole")) == 0
    expected = command.result(tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    for share in range(21):
        try:
            with small_disk(tmp_path / "disk", 8192 + size * share // 20 // 4096 * 4096) as disk:
                code, said = main(command.words(disk / "out")), capsys.readouterr().err.strip().splitlines()
                assert code == 0 or (code == 2 and "cannot be written to" in said[-1]), said
                assert not half_written(disk)
                if code == 0:
                    assert command.result(disk / "out") == expected
        except PermissionError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "content"), [("export", "model.safetensors"), ("prepare", "[tw]*_00000.npy")], ids=["export", "prepare"]
)
def test_space_is_asked_for_before_it_is_written(
    name: str,
    content: str,
    commands: dict[str, Command],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=20_000))
        assert main(commands[name].words(tmp_path / "out")) == 2
    said = re.search(
        r"too little space is left \((.*) kB needed, 20.0 kB free\); .*: free some", capsys.readouterr().err
    )
    assert said is not None
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ([] if name == "export" else [".lock", "documents.npy", "part.json", "tokens.bin"])
    assert main(commands[name].words(tmp_path / "out")) == 0
    # at most what is written in the end, and nearly all of it: headers, the anchor and padding are not counted
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob(content))
    assert 0.95 * written < 1000 * float(said[1]) <= written


def test_output_to_a_full_disk_is_no_traceback(
    commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(commands["report"].words(tmp_path)) == 2
        full.flush()  # as at the exit, where a complaint would be a traceback
    assert "the standard output or a file cannot be written: the disk is full" in capsys.readouterr().err
    assert (tmp_path / "page.html").exists()


def test_two_exports_cannot_write_one_folder(
    commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = commands["export"].words(tmp_path / "out")
    with sole_writer(tmp_path / "out", "out_dir"):
        assert main(words) == 2
    assert f"out_dir={tmp_path}/out is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert main(words) == 0 and (tmp_path / "out" / "model.safetensors").exists()


def test_metrics_on_a_full_disk_lose_no_row_and_keep_no_half(tmp_path: Path) -> None:
    def run(start: int) -> None:
        metrics = JsonlMetrics(tmp_path, start)
        for step in range(start + 1, 5):
            metrics.log({"step": step, "tokens": 64 * step})

    with FailingDisk(tmp_path) as disk:
        run(0)
    whole = files(tmp_path)
    for write in range(1, disk.writes + 1):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        with pytest.raises(DiskError, match="metrics cannot be written to .*; the complete checkpoints are intact: "):
            with FailingDisk(tmp_path, write):
                run(0)
        rows = (tmp_path / METRICS).read_text() if (tmp_path / METRICS).exists() else ""
        assert not rows or rows.endswith("\n")
        run(len(rows.splitlines()))
        assert files(tmp_path) == whole


def test_damaged_metrics_do_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(
        b'{"step": 1}\n\xff\xfe\n[1]\n{"tokens": 3}\n{"step": "x"}\n{"step": 2}\n{"step": 3'
    )
    JsonlMetrics(tmp_path, 2)
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_failing_disk_fails_as_a_full_one_does(tmp_path: Path) -> None:
    with FailingDisk(tmp_path, 2) as disk, pytest.raises(OSError, match="No space left"):
        (tmp_path / "half").write_bytes(b"12345678")
    assert (tmp_path / "half").read_bytes() == b"1234" and disk.writes == 3  # opened, half written, refused
    with FailingDisk(tmp_path / "other", 1):
        (tmp_path / "half").write_bytes(b"1234")  # elsewhere
        torch.save([1], tmp_path / "half")
    (tmp_path / "other").mkdir()
    with FailingDisk(tmp_path / "other", 1) as disk:
        assert (tmp_path / "half").read_bytes() and not list((tmp_path / "other").iterdir())  # reads are none
        for write in (lambda path: path.mkdir(), lambda path: path.touch(), lambda path: path.open("a")):
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path / "other" / "new")
    assert disk.writes == 3 and not list((tmp_path / "other").iterdir())
