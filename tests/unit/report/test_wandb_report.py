"""A report at W&B: every figure and every table of the page, in a run of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchorctx.cli.main import main

from .fixtures import make_project


@dataclass
class Image:
    path: str
    caption: str

    def __post_init__(self) -> None:
        self.header = Path(self.path).read_bytes()[:4]  # W&B copies it at once: afterwards it is gone


@dataclass
class WandbTable:
    columns: list[str]
    data: list[list[Any]]


class FakeWandb:
    """What W&B's module is asked to do."""

    Error, Image, Table = OSError, Image, WandbTable

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.sent: dict[str, Any] = {}
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.started.append(options)
        return self

    def log(self, values: dict[str, Any]) -> None:
        self.sent |= values

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    found = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", found)  # type: ignore[arg-type]
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "mine")


def test_every_figure_and_table_is_sent(project: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    run = next(project.rglob("metrics.jsonl")).parent
    (run / "wandb_run_id").write_text("abc123\n")
    out = tmp_path / "report.html"
    assert main(["report", str(project), f"out={out}", "wandb=offline", "group=seeds"]) == 0
    assert out.is_file() and wandb.finished == 1
    started = wandb.started[0]
    assert (started["mode"], started["job_type"], started["group"]) == ("offline", "report", "seeds")
    assert list(started["config"]["runs"].values()) == ["abc123"] and started["dir"] == str(tmp_path)

    page = out.read_text()
    images = [value for value in wandb.sent.values() if isinstance(value, Image)]
    assert len(images) == page.count("<figure") > 10
    assert all(image.header == b"\x89PNG" for image in images)
    tables = [value for value in wandb.sent.values() if isinstance(value, WandbTable)]
    assert len(tables) == page.count("<table") > 5
    for table in tables:
        for column in zip(*table.data, strict=True):  # W&B refuses a column of two types
            assert len({type(value) for value in column} - {type(None)}) <= 1
    lengths = wandb.sent["Retrieval/2 By length"]
    assert lengths.columns[0] == "model" and 0 <= lengths.data[0][1] <= 1
    json.dumps([table.data for table in tables], allow_nan=False)


def test_a_report_without_wandb_starts_nothing(project: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    assert main(["report", str(project), f"out={tmp_path / 'report.html'}"]) == 0
    assert not wandb.started


def test_a_missing_package_is_said_before_the_page_is_written(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["report", str(project), f"out={tmp_path / 'report.html'}", "wandb=online"]) == 2
    assert "wandb=online needs wandb: pip install 'anchorctx[wandb]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))
