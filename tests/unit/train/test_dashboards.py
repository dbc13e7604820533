"""W&B and TensorBoard: what they are told of a run, also across a resume."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.train.callbacks import JsonlMetrics
from anchorctx.train.config import LoggingConfig, WandbMode
from anchorctx.train.dashboards import TensorBoard, Wandb, check_dashboards, dashboards

FACTS = {"parameters": 12, "packed": {"accounting": {"trained": 5}}}


class Recorder:
    """What W&B's module, or TensorBoard's writer, is asked to do."""

    Error = OSError

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.metrics: dict[str, tuple[str | None, str | None]] = {}
        self.logged: list[dict[str, float]] = []
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: dict[str, str] = {}
        self.resumed = False

    def init(self, **options: Any) -> Recorder:
        self.started.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None, summary: str | None = None) -> None:
        self.metrics[name] = step_metric, summary

    def log(self, row: dict[str, float]) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.logged.append({"finished": 1})

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str) -> None:
        self.texts[name] = text

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", found)  # type: ignore[arg-type]
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = lambda folder: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    return found


def row(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "tokens": 10 * step, "train/loss": 5.0 - step, **values}


def run(folder: Path, config: LoggingConfig, resumed: int, steps: list[int]) -> None:
    """A start of a run: what `metrics.jsonl` and the dashboards get."""
    callbacks = [JsonlMetrics(folder, resumed), *dashboards(folder, config, {"lr": 1}, FACTS)]
    for step in steps:
        for callback in callbacks:
            callback.log(row(step))
    for callback in callbacks:
        callback.close()


def test_wandb_is_told_what_the_run_is(tmp_path: Path, recorder: Recorder) -> None:
    config = LoggingConfig(wandb=WandbMode.offline, project="p", entity="e", group="g", tags=["a", "b"], notes="why")
    run(tmp_path, config, 0, [1])
    started = recorder.started[0]
    expected = {"entity": "e", "project": "p", "group": "g", "tags": ["a", "b"], "notes": "why", "mode": "offline"}
    assert {key: started[key] for key in expected} == expected
    assert started["name"] == tmp_path.name and started["config"] == {"lr": 1, "run": FACTS}
    assert recorder.metrics["train/*"] == ("tokens", None) and recorder.metrics["memory/*"] == ("tokens", None)
    assert recorder.metrics["val/loss"] == ("tokens", "min,last")
    assert recorder.logged == [row(1), {"finished": 1}]


def test_the_newest_offline_folder_holds_the_whole_run(tmp_path: Path, recorder: Recorder) -> None:
    config = LoggingConfig(wandb=WandbMode.offline)
    run(tmp_path, config, 0, [1, 2, 3])  # killed after step 3, with a checkpoint of step 2
    recorder.logged.clear()
    run(tmp_path, config, 2, [3, 4])
    assert [int(logged.get("step", -1)) for logged in recorder.logged] == [1, 2, 3, 4, -1]
    first, second = recorder.started
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_a_run_that_the_server_has_is_not_told_again(tmp_path: Path, recorder: Recorder) -> None:
    config = LoggingConfig(wandb=WandbMode.online)
    run(tmp_path, config, 0, [1, 2])
    recorder.resumed = True
    recorder.logged.clear()
    run(tmp_path, config, 2, [3])
    assert [int(logged.get("step", -1)) for logged in recorder.logged] == [3, -1]


def test_tensorboard_has_each_step_once(tmp_path: Path, recorder: Recorder) -> None:
    config = LoggingConfig(tensorboard=True)
    run(tmp_path, config, 0, [1, 2, 3])
    recorder.scalars.clear()
    run(tmp_path, config, 2, [3, 4])
    assert [(value, at) for name, value, at in recorder.scalars if name == "train/loss"] == [
        (4.0, 10),
        (3.0, 20),
        (2.0, 30),
        (1.0, 40),
    ]
    assert '"parameters": 12' in recorder.texts["run"] and '"lr": 1' in recorder.texts["settings"]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install 'anchorctx[tensorboard]'",
)
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found]

    config = LoggingConfig(tensorboard=True)
    run(tmp_path, config, 0, [1, 2, 3])
    run(tmp_path, config, 2, [3, 4])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (10, 4.0),
        (20, 3.0),
        (30, 2.0),
        (40, 1.0),
    ]


@pytest.mark.parametrize(
    ("module", "config", "sentence"),
    [
        (
            "wandb",
            LoggingConfig(wandb=WandbMode.online),
            "=online needs wandb: pip install 'anchorctx.wandb.'",
        ),
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True), "pip install 'anchorctx.tensorboard.'"),
    ],
)
def test_a_missing_package_is_named(
    module: str, config: LoggingConfig, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=sentence):
        check_dashboards(config)
    check_dashboards(LoggingConfig())


def test_wandb_that_does_not_start(tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise OSError("api_key not configured (no-tty)")

    monkeypatch.setattr(recorder, "init", fail)
    with pytest.raises(UserError, match="cannot start .api_key not configured .no-tty..: run `wandb login`"):
        Wandb(tmp_path, LoggingConfig(wandb=WandbMode.online), {}, {})


def test_one_interface(tmp_path: Path, recorder: Recorder) -> None:
    config = LoggingConfig(wandb=WandbMode.offline, tensorboard=True)
    assert [type(each) for each in dashboards(tmp_path, config, {}, {})] == [Wandb, TensorBoard]
    assert not dashboards(tmp_path, LoggingConfig(), {}, {})
