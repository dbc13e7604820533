"""The lock file of torch's extensions, which a kill leaves behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from anchorctx.parallel import extension


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extension.folder() == tmp_path / "cpu_adam"
    return tmp_path / "cpu_adam"


class WaitsError(Exception):
    pass


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(_: float) -> None:
        raise WaitsError

    monkeypatch.setattr(extension.time, "sleep", waits)


def age(file: Path, seconds: float) -> None:
    made = time.time() - seconds
    os.utime(file, (made, made))


def left(place: Path, seconds: float) -> Path:
    """The file of a process that is gone, made so long ago."""
    baton = FileBaton(str(place / "lock"))
    assert baton.try_acquire() and baton.fd is not None
    os.close(baton.fd)
    age(place / "lock", seconds)
    return place / "lock"


def test_what_one_of_ours_left_is_removed_at_once(place: Path, impatient: None, caplog) -> None:
    """sgl-project/sglang#35989: it is ours to remove for as long as we have the turn."""
    with pytest.raises(WaitsError), extension.turn(place):
        left(place, 0)
        raise WaitsError  # killed: nothing behind this runs
    with extension.turn(place):
        assert not (place / "lock").exists()
    assert f"removed {place / 'lock'}, which a killed process left" in caplog.text
    assert (place / extension.TURN).read_text() == ""


def test_what_another_program_left_is_removed_once_no_build_takes_so_long(place: Path, impatient: None, caplog) -> None:
    """pytorch/pytorch#189245, microsoft/onnxruntime#7740."""
    left(place, extension.BUILD_S - 60)
    with pytest.raises(WaitsError), extension.turn(place):
        raise AssertionError("took over a build that may be running on another machine")
    assert "nobody here has it, so until it is 30 min old, unless you remove it" in caplog.text
    (place / extension.TURN).write_text("")
    age(place / "lock", extension.BUILD_S + 60)
    with extension.turn(place):
        assert not (place / "lock").exists()


def test_what_a_living_process_holds_is_waited_for(place: Path, impatient: None, caplog) -> None:
    baton = FileBaton(str(place / "lock"))
    assert baton.try_acquire()
    age(place / "lock", 10 * extension.BUILD_S)
    with pytest.raises(WaitsError), extension.turn(place):
        raise AssertionError("took over a build that is running")
    assert "another program builds" in caplog.text
    baton.release()
