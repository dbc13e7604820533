"""A run's folder of checkpoints: what is in it, which are complete, which are kept.

    checkpoints/step_00000100/
      states_00000.safetensors   rank 0's part of the float32 weights and of Adam's moments (`states`), plain tensors
      random_00000.json          rank 0's random states
      state.json                 what the run is and how far it got (`State`)
      COMPLETE                   size and digest of every file, and which run wrote them (`Marker`); written last

It is written beside, marked complete and renamed; older ones go only afterwards. The loader and the learning rate are
pure functions of the step, so there is nothing else to save.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.files import remove
from anchorctx.records.manifest import FILE
from anchorctx.records.typed import read_typed
from anchorctx.train.config import CheckpointConfig

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""
MARKER, STATE = "COMPLETE", "state.json"
NAME = re.compile(r"step_(\d{8,})")
REMEDY = (
    "it is damaged, or written by anchorctx 0.1: name another one, remove it to resume from the one before, or go on "
    "with the version that wrote it"
)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a checkpoint as it was written."""

    bytes: int
    xxh3_128: str
    """32 hex digits."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What `COMPLETE` says."""

    run: str
    """Names the run that wrote the checkpoint: `run` of its manifest."""
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class State:
    """What `state.json` says: what the run is, and how far it got."""

    step: int
    """Updates made."""
    tokens: int
    """Trained tokens."""
    rows: int
    """Rows of the packed set read."""
    processes: int
    identity: dict[str, Any]
    """What must not change (`compare.check_same_run`)."""
    schedule: dict[str, Any]
    """What may change, and is then said."""
    model: dict[str, Any]
    """The model's configuration (`compare.configuration`)."""
    shapes: dict[str, list[int]]
    """Of all weights, by their names in the model."""
    tied: dict[str, str]
    """Names of weights that are stored under another name."""
    router_fractions: list[float] | None = None
    health: dict[str, Any] | None = None
    """What `train.health` had seen."""


@dataclass(frozen=True, slots=True)
class _Named:
    """What `run_id` needs of a run's manifest."""

    run: str | None = None


def run_id(out_dir: Path) -> str | None:
    """The name under which the run of this folder writes its checkpoints; None before it has one."""
    remedy = "restore it, or choose another out_dir"
    try:
        return read_typed(out_dir / FILE, _Named, remedy).run
    except FileNotFoundError:
        return None


def new_run_id() -> str:
    """A name for a run that no other has."""
    return uuid.uuid4().hex


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return root / f"step_{step:08d}"


def partial_folder(final: Path) -> Path:
    """Where the checkpoint `final` is written."""
    return final.with_name(f".{final.name}.partial")


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None for any other name, such as `step_00000003.bak`."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def complete(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return sorted(folder for folder in root.glob("step_*") if step_of(folder) is not None and _is_marked(folder))


def report_others(root: Path) -> None:
    """Say in one line what else is in the folder of checkpoints, and is left alone."""
    others = sorted(folder.name for folder in root.glob("*") if step_of(folder) is None or not _is_marked(folder))
    if others:
        logger.warning("ignoring in %s, as no complete checkpoints: %s", root, ", ".join(others))


def read_marker(folder: Path) -> Marker:
    """What a complete checkpoint's `COMPLETE` says; UserError when the folder is no checkpoint or is incomplete."""
    if not _is_marked(folder):
        kind = "an incomplete checkpoint" if folder.is_dir() else "no folder"
        raise UserError(f"{folder} is {kind} (no {MARKER} in it): name a complete one, or use checkpoint.resume=auto")
    marker = read_typed(folder / MARKER, Marker, REMEDY)
    for name in marker.files:
        if name != Path(name).name:  # all lie in the folder itself
            raise UserError(f"{folder / MARKER} names a file outside its folder ({name}): {REMEDY}")
    if STATE not in marker.files:
        raise UserError(f"{folder / MARKER} does not name {STATE}: {REMEDY}")
    return marker


def read_state(folder: Path) -> State:
    """A complete checkpoint's `state.json`; UserError when it is not of the form."""
    try:
        return read_typed(folder / STATE, State, REMEDY)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {STATE}: {REMEDY}") from None


def is_named(folder: Path, state: State) -> bool:
    """Whether a checkpoint lies under its own step's name, or one that says no step; a copy may lie under another's."""
    return step_of(folder) in (None, state.step)


def prune(root: Path, config: CheckpointConfig, newest: Path, damaged: Collection[Path]) -> None:
    """Remove older checkpoints, and what a kill left of such.

    Never `newest`, which may precede those of an abandoned run. `damaged` ones, and those under another step's name,
    neither count among the newest that are kept nor are removed: who knows what else can be had from them. Nor is
    anything of another name, or what a link names.
    """
    sound = [folder for folder in complete(root) if folder not in damaged and _is_sound(folder)]
    for folder in sound[: -config.keep_last]:
        step = step_of(folder)
        if folder != newest and not (config.keep_every and step is not None and step % config.keep_every == 0):
            if not folder.is_symlink():
                (folder / MARKER).unlink()  # first, so that a kill in between leaves nothing that looks complete
            remove(folder)
    for left in root.glob("step_*"):
        if step_of(left) is not None and not left.is_symlink() and left.is_dir() and not _is_marked(left):
            remove(left)  # by a kill in the middle of pruning; the run's lock says that nobody uses it


def _is_sound(folder: Path) -> bool:
    try:
        return is_named(folder, read_state(folder))
    except UserError:
        return False


def _is_marked(folder: Path) -> bool:
    return (folder / MARKER).is_file()
