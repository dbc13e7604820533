"""Files that appear whole, and locks: who waits, who is refused, and what happens where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from anchorctx.errors import UserError
from anchorctx.records.files import StagedFolder, write_bytes
from anchorctx.records.locks import in_use, lock_folder, remove_unused, sole_command, sole_writer


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(UserError, match=f"out_dir={tmp_path} is being written by process {os.getpid()} on "):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


def test_a_command_holds_its_folder_and_leaves_none_that_it_wrote_nothing_to(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "out"
    with sole_command(folder, "run"):
        with pytest.raises(UserError, match=f"run={folder} is .*choose another run$"), sole_command(folder, "run"):
            pytest.fail("two at once")
    assert list(tmp_path.iterdir()) == []
    with sole_command(folder):
        (folder / "row").touch()
    assert (folder / "row").exists()
    (tmp_path / "mine").mkdir()
    with sole_command(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []  # which the user made


def test_who_comes_second_waits_or_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, order = tmp_path / "set", []

    def wait() -> None:
        with sole_writer(folder):
            order.append("second")

    with caplog.at_level("INFO"), sole_writer(folder):
        with pytest.raises(UserError, match=f"out_dir={folder} is being written by process"):
            with sole_writer(folder, "out_dir"):
                pytest.fail("two at once")
        other = threading.Thread(target=wait)
        other.start()
        while not caplog.messages:
            time.sleep(0.01)
        assert f"waiting for process {os.getpid()} on " in caplog.text
        order.append("first")
    other.join()
    assert order == ["first", "second"] and list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_by_its_holder_is_no_lock(tmp_path: Path) -> None:
    """Who waited for the first has its file, which is not the one that a third would find."""
    with sole_writer(tmp_path / "set"):
        (tmp_path / ".set.lock").unlink()
        with sole_writer(tmp_path / "set", "out_dir"):
            assert (tmp_path / ".set.lock").exists()


def test_what_another_uses_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with in_use(folder), in_use(folder):
        (folder / "part").mkdir()
        remove_unused(folder, ["part"])
        assert (folder / "part").exists()
    remove_unused(folder, ["part"])
    assert not folder.exists()


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = tmp_path / "made" / "set"
    with lock_folder(tmp_path), sole_writer(folder), sole_writer(folder):
        pass
    assert not folder.parent.exists()
    with in_use(folder):
        remove_unused(folder, [])
        assert folder.exists()
    staged = [StagedFolder(tmp_path / "ab", "whole") for _ in range(2)]
    for each in staged:
        (each.folder / "whole").touch()
        assert each.publish() == tmp_path / "ab"
