"""What lies in the way is named before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anchorctx.errors import UserError
from anchorctx.evals.journal import Journal
from anchorctx.records.locks import in_use, lock_folder, sole_command
from anchorctx.records.places import check_place
from anchorctx.train.inputs import check_places


def make(path: Path, kind: str) -> None:
    """A file, folder, pipe or link of that name, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a file":
        path.touch()
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.parent / "gone")


KINDS = ("a file", "a folder", "a pipe", "a link that leads nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_belongs_there_may_be_there(kind: str, tmp_path: Path) -> None:
    check_place(tmp_path / "x")
    make(tmp_path / "x", kind)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for name in ("x", "link"):
        for wanted in ("a file", "a folder"):
            if kind == wanted:
                check_place(tmp_path / name, folder=kind == "a folder")
                continue
            with pytest.raises(UserError, match=rf"{name} is {kind}, where {wanted} is to be written: move it away"):
                check_place(tmp_path / name, folder=wanted == "a folder")


@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_lock_is_a_file(kind: str, tmp_path: Path) -> None:
    make(tmp_path / ".lock", kind)
    for hold in (
        lock_folder,
        lambda folder: sole_command(folder).__enter__(),
        lambda folder: in_use(folder).__enter__(),
    ):
        with pytest.raises(UserError, match=rf".lock is {kind}, where a file is to be written"):
            hold(tmp_path)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "suspicious.jsonl", "model", "checkpoints", "checkpoints/step_00000004"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_names_what_is_in_its_way_before_it_begins(name: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path / name, kind)
    (tmp_path / "checkpoints" / "step_00000005.bak").mkdir(parents=True) if "checkpoints" not in name else None
    if kind == ("a file" if name.endswith(".jsonl") else "a folder"):
        return check_places(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is {kind}, where a f"):
        check_places(tmp_path)


@pytest.mark.parametrize("name", ["results.jsonl", "transcripts.jsonl", "manifests", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_names_what_is_in_its_way_before_it_measures(name: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path / name, kind)
    if kind == ("a file" if name.endswith(".jsonl") else "a folder"):
        return Journal(tmp_path).close()
    with pytest.raises(UserError, match=rf"{name} is {kind}, where a f"):
        Journal(tmp_path)
    lock_folder(tmp_path).close()  # nobody holds it any more
