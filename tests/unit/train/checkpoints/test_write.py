"""Writing while the training goes on, and what a failure leaves."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.train.checkpoints import read, tensors, write
from anchorctx.train.checkpoints.write import Writer
from anchorctx.train.config import CheckpointConfig

from .engine import FakeEngine
from .saving import ALONE, RUN, find, save, state_of, steps

LEFT = r"the checkpoint cannot be written to .*: the disk is full \(.* free\); the checkpoints before are intact: free "


def fail(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_holds(folder: Path, expected: list[torch.Tensor]) -> None:
    """The newest checkpoint of a folder has these states, to the bit."""
    found, other = find(folder), FakeEngine()
    assert found is not None
    read.load(other, found, ALONE)
    assert all(a.equal(b) for a, b in zip(expected, other.everything(), strict=True))


def test_older_ones_stay_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=LEFT):
        patch.setattr(write.tensors, "write", fail)
        save(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert (found := find(tmp_path)) and found.state.step == 1
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2] and not list(tmp_path.glob(".*"))


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds what the states were when `save` was called, though the next updates come first."""
    begin, original = threading.Event(), tensors.write
    monkeypatch.setattr(write.tensors, "write", lambda *arguments: begin.wait(10) and original(*arguments))
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    expected = engine.everything()
    writer.save(engine, state_of(engine, 1), wait=False)
    engine.train_step()
    assert steps(tmp_path) == []
    begin.set()
    writer.finish()
    assert_holds(tmp_path, expected)


def test_without_memory_for_a_copy_the_states_are_written_at_once(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "fits_twice", lambda _: False)
    monkeypatch.setattr(write, "_copied", fail)
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    expected = engine.everything()
    writer.save(engine, state_of(engine, 1), wait=False)
    engine.train_step()
    writer.finish()
    assert_holds(tmp_path, expected)


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="too little space is left .* needed, .* free"):
        patch.setattr(write, "free_space", lambda _: 10)
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


def test_the_next_save_says_what_went_wrong_with_the_one_before(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(write.tensors, "write", fail)
        writer.save(engine, state_of(engine, 1), wait=False)
        with pytest.raises(UserError, match=LEFT):
            writer.save(engine, state_of(engine, 2), wait=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=LEFT):
        patch.setattr(write, "sync_folder", fail)  # at the very end, when this rank's files are there
        writer.save(engine, state_of(engine, 3), wait=True)
    writer.save(engine, state_of(engine, 4), wait=True)
    assert steps(tmp_path) == [4]
