"""Where a run's numbers go, also across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorctx.train.callbacks import JsonlMetrics, ProgressBar


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_disk_at_once(tmp_path: Path) -> None:
    metrics = JsonlMetrics(tmp_path, 0)
    metrics.log({"step": 1, "tokens": 10, "train/loss": 2.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 10, "train/loss": 2.5}]
    metrics.close()


def test_a_resume_drops_what_it_will_compute_again_and_a_torn_line(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "tokens": step}) + "\n" for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "to')
    metrics = JsonlMetrics(tmp_path, 2)
    metrics.log({"step": 3, "tokens": 33})
    metrics.close()
    assert [row["tokens"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 33]
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_starts_again_from_nothing_keeps_no_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tokens": 0}\n')
    JsonlMetrics(tmp_path, 0).close()
    assert rows(tmp_path / "metrics.jsonl") == []


def test_the_bar_shows_rate_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(steps=10, start=4)
    bar.log({"step": 8, "tokens": 80, "train/loss": 1.25, "perf/tokens_per_second": 1234.0})
    bar.close()
    shown = capsys.readouterr().err
    assert "8/10" in shown and "loss=1.25" in shown and "tok/s=1234" in shown and "step/s" in shown or "s/step" in shown
