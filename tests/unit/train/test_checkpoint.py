"""Checkpoints on disk: complete or not there, kept and found as asked; without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.parallel.dist import Ranks
from anchorctx.train import checkpoint
from anchorctx.train.config import CheckpointConfig, TrainConfig

ALONE = Ranks(0, 1, torch.device("cpu"))


class FakeEngine:
    """Saves one file, as DeepSpeed saves its shards; fails where told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "states.pt").write_bytes(b"0123456789")
        if self.fails:
            raise OSError("no space left on device")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return f"{folder}/{tag}", {}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "barrier", lambda: None)


def save(root: Path, step: int, engine: FakeEngine | None = None, **config: int) -> Path:
    state = {"step": step, "tokens": 10 * step, "identity": {"seed": 0}}
    return checkpoint.save(engine or FakeEngine(), root, state, ALONE, CheckpointConfig(**config))


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.complete(root)]


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder.name == "step_00000007"
    assert checkpoint.read_state(folder) == {"step": 7, "tokens": 70, "identity": {"seed": 0}}
    assert json.loads((folder / "COMPLETE").read_text())["engine/states.pt"] == 10
    assert not list(tmp_path.glob(".*"))


def test_the_newest_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_the_one_just_written_stays_though_an_abandoned_run_went_further(tmp_path: Path) -> None:
    for step in (100, 200, 300, 150):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [150, 200, 300]


def test_older_ones_stay_until_the_new_one_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, keep_last=1)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2, FakeEngine(fails=True), keep_last=1)
    assert steps(tmp_path) == [1]
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step_00000001"
    save(tmp_path, 2, keep_last=1)  # what the failed one left does not disturb
    assert steps(tmp_path) == [2] and not list(tmp_path.glob(".*"))


def test_a_kill_while_an_older_one_is_removed_leaves_none_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep_last=1)

    def killed(folder: Path, **_: Any) -> None:
        if folder.name == "step_00000001":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2]


def test_resuming_takes_the_newest_complete_one_and_says_what_it_ignores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.find(tmp_path, "auto") is None
    save(tmp_path, 5, keep_last=9)
    save(tmp_path, 6, keep_last=9)
    (tmp_path / "step_00000006" / "COMPLETE").unlink()
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step_00000005"
    assert "ignoring step_00000006" in caplog.text


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "COMPLETE").unlink(), "is an incomplete checkpoint .no COMPLETE in it.: name a"),
        (lambda folder: (folder / "engine" / "states.pt").write_bytes(b"01"), "states.pt has 2 of 10 bytes: remove"),
        (lambda folder: (folder / "random_0.pt").unlink(), "random_0.pt has 0 of"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, damage: Any, sentence: str) -> None:
    folder = save(tmp_path, 3)
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        checkpoint.read_state(folder)


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path / "checkpoints", "never") is None
    save(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="already holds a run .step_00000003.: use another out_dir"):
        checkpoint.find(tmp_path / "checkpoints", "never")


def test_a_run_that_differs_is_named(tmp_path: Path) -> None:
    state = {"identity": {"corpus": "a", "seed": 0}}
    checkpoint.check_same_run(state, {"corpus": "a", "seed": 0}, tmp_path)
    with pytest.raises(UserError, match="written with corpus=a, but this run has corpus=b: give the same"):
        checkpoint.check_same_run(state, {"corpus": "b", "seed": 0}, tmp_path)


def test_random_states_come_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    expected = torch.rand(3), np.random.rand(3)
    torch.rand(17), np.random.rand(5)
    checkpoint.load(FakeEngine(), folder, ALONE, 1)
    assert torch.rand(3).equal(expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("options", [{"every": -1}, {"keep_last": 0}, {"keep_every": -2}])
def test_settings_that_would_lose_a_checkpoint(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"checkpoint.{name}={value} must be at least"):
        TrainConfig(checkpoint=CheckpointConfig(**options)).validate()


def test_what_a_kill_left_half_done_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "COMPLETE").unlink()  # a kill in the middle of pruning
    (tmp_path / ".step_00000002.partial").mkdir()  # and one in the middle of writing
    (tmp_path / "notes").mkdir()  # the user's own
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000003"]


def test_a_changed_schedule_is_said_and_an_unchanged_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"schedule": {"steps": 10, "optim.lr": 1e-4, "optim.betas": [0.9, 0.95]}}
    checkpoint.say_changes(state, {"steps": 10, "optim.lr": 1e-4, "optim.betas": (0.9, 0.95)}, tmp_path)
    assert not caplog.records
    checkpoint.say_changes(state, {"steps": 20, "optim.lr": 1e-4, "optim.betas": (0.9, 0.95)}, tmp_path / "step_5")
    assert caplog.messages == ["continuing step_5 with steps=20 (was 10)"]
