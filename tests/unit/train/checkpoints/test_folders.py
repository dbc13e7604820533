"""Which checkpoints are kept, and what else in their folder is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.records import files
from anchorctx.train.checkpoints import folders
from anchorctx.train.config import CheckpointConfig, TrainConfig

from .saving import find, save, steps


def test_the_newest_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_the_one_just_written_stays_though_an_abandoned_run_went_further(tmp_path: Path) -> None:
    for step in (100, 200, 300, 150):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [150, 200, 300]


def test_damaged_ones_do_not_count_and_stay(tmp_path: Path) -> None:
    """Two newer ones are damaged: the one that was resumed from is kept beside the new one."""
    for step in (1, 2, 8, 9):
        save(tmp_path, step, keep_last=9)
    damaged = [folders.step_folder(tmp_path, step) for step in (8, 9)]
    save(tmp_path, 3, keep_last=2, damaged=damaged)
    assert steps(tmp_path) == [2, 3, 8, 9]


def test_one_under_another_steps_name_is_passed_over_and_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep_last=9)
    copy = shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000009")
    assert (found := find(tmp_path)) and (found.folder.name, found.state.step) == ("step_00000002", 2)
    says = "holds the checkpoint of step 2, under another step's name: name another one, or give it back the name step"
    (line,) = caplog.messages
    assert line.startswith("passing over step_00000009") and says in line
    with pytest.raises(UserError, match=says):
        find(tmp_path, str(copy))
    shutil.copytree(copy, tmp_path / "step_00000003")  # between those that count
    save(tmp_path, 4, keep_last=2)
    assert steps(tmp_path) == [2, 3, 4, 9]
    assert (found := find(tmp_path, str(copy.rename(tmp_path / "mine")))) and found.state.step == 2


def test_of_links_the_link_is_pruned_and_what_it_names_stays(tmp_path: Path) -> None:
    root, disk = tmp_path / "run", tmp_path / "disk"
    for step in (1, 2):
        save(root, step, keep_last=9).rename(disk.mkdir(exist_ok=True) or disk / str(step))
    for name, target in (("step_00000001", "1"), ("step_00000002", "2"), (".step_00000003.partial", "2")):
        (root / name).symlink_to(disk / target)
    (root / "step_00000007").symlink_to(tmp_path / "gone")
    before = sorted((path, path.read_bytes()) for path in disk.rglob("*") if path.is_file())
    save(root, 3, keep_last=2)
    assert steps(root) == [2, 3] and not (root / "step_00000001").is_symlink()
    save(root, 2, keep_last=2)  # in the place of the link
    assert not (root / "step_00000002").is_symlink() and (root / "step_00000007").is_symlink()
    assert before == sorted((path, path.read_bytes()) for path in disk.rglob("*") if path.is_file())


def test_a_kill_while_an_older_one_is_removed_leaves_none_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep_last=1)

    def killed(folder: Path, **_: Any) -> None:
        if folder.name == "step_00000001":
            raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2]


def test_what_a_kill_left_half_done_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "COMPLETE").unlink()  # a kill in the middle of pruning
    (tmp_path / ".step_00000002.partial").mkdir()  # and one in the middle of writing
    (tmp_path / "notes").mkdir()  # the user's own
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000003"]


def test_copies_are_ignored_in_one_line_and_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = save(tmp_path, 3)
    copies = ["step_00000003 (copy)", "step_00000003.bak", "step_00000099.tar", "step_new"]
    for name in copies:
        shutil.copytree(first, tmp_path / name)
    assert (found := find(tmp_path)) and found.folder == first
    (line,) = caplog.messages
    assert line.endswith("as no complete checkpoints: " + ", ".join(copies))
    for step in (4, 5, 6):
        save(tmp_path, step, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*copies[:2], "step_00000006", *copies[2:]]


@pytest.mark.parametrize("options", [{"every": -1}, {"keep_last": 0}, {"keep_every": -2}])
def test_settings_that_would_lose_a_checkpoint(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"checkpoint.{name}={value} must be at least"):
        TrainConfig(checkpoint=CheckpointConfig(**options)).validate()
