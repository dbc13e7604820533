"""Files that appear whole, and locks: who waits, who is refused, and what happens where there are no locks."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from anchorctx.records.files import StagedFolder, in_use, lock_folder, remove_unused, sole_writer, write_bytes


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
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


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
