"""From `checkpoint.resume` to states in the engine: nothing is used before the digests of all files were compared.

The files are dealt out to the ranks, largest first, and the verdicts exchanged: each file is read once, by all machines
at the same time, and every rank knows the same. Rank 0 alone would take as many times as long as there are machines;
each rank only what it loads would leave those without a part in ignorance, so that ranks took different checkpoints.
Only tensors and JSON are read, so that no file of a checkpoint can run code, whoever wrote it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.parallel import dist
from anchorctx.train.checkpoints import rng, states
from anchorctx.train.checkpoints.digest import fault
from anchorctx.train.checkpoints.folders import (
    REMEDY,
    Marker,
    State,
    complete,
    is_named,
    read_marker,
    read_state,
    report_others,
    step_folder,
)
from anchorctx.train.checkpoints.tensors import Shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint whose files are as they were written."""

    folder: Path
    state: State
    shards: Shards
    damaged: frozenset[Path] = field(default=frozenset())
    """Newer ones that were passed over."""


def find(root: Path, resume: str, *, run: str | None, trust: bool, ranks: dist.Ranks) -> Found | None:
    """The checkpoint that `checkpoint.resume` names, verified, or None to start anew. Called by every rank.

    Args:
        root: the run's folder of checkpoints.
        resume: `auto`, `never`, or a checkpoint's folder.
        run: what the run that continues it is called (`folders.run_id`).
        trust: take one that another run wrote.
        ranks: deal out the files to these.

    Raises:
        UserError: the named one is damaged or another run's, or all of the run's own are.
    """
    if resume not in ("auto", "never"):
        return verified(Path(resume), run=run, trust=trust, ranks=ranks)
    found = complete(root)
    if resume == "never":
        if found:
            raise UserError(
                f"{root.parent} already holds a run ({found[-1].name}): use another out_dir, or checkpoint.resume=auto"
            )
        return None
    if ranks.is_main:
        report_others(root)
    return newest(found, run=run, trust=trust, ranks=ranks)


def verified(folder: Path, *, run: str | None, trust: bool, ranks: dist.Ranks) -> Found:
    """A checkpoint, whole; UserError when it is damaged, or another run's without `trust`. Arguments as of `find`."""
    marker = read_marker(folder)
    if marker.run != run and not trust:
        raise UserError(
            f"{folder} was written by another run than this one: if you know where it is from, say "
            "checkpoint.trust=true (an export: trust=true)"
        )
    if (wrong := _first_fault(folder, marker, ranks)) is not None:
        raise UserError(f"{folder} is damaged: {wrong}: name another one, or remove it to resume from the one before")
    state = read_state(folder)
    if not is_named(folder, state):
        raise UserError(
            f"{folder} holds the checkpoint of step {state.step}, under another step's name: name another one, or give "
            f"it back the name {step_folder(folder.parent, state.step).name}"
        )
    shards = Shards(folder, marker.files)
    shards.check(state.shapes)
    if lost := [name for name, stored in state.tied.items() if stored not in state.shapes]:
        raise UserError(f"{folder} has no weight for {lost[0]}, which is tied to another: {REMEDY}")
    return Found(folder, state, shards)


def load(engine: Any, found: Found, ranks: dist.Ranks) -> None:
    """Give the engine the checkpoint's states, and this process its rank's random states.

    Ranks that were not there when it was written keep the random states that they start with.
    """
    if found.state.processes != ranks.world and ranks.is_main:
        logger.info(
            "%s was written by %d processes: dividing its states for %d",
            found.folder,
            found.state.processes,
            ranks.world,
        )
    states.fill(engine, found.shards)
    engine.global_steps = found.state.step
    path = found.folder / rng.file_name(ranks.rank)
    if ranks.rank < found.state.processes and path.is_file():
        rng.restore(path)


def newest(folders: list[Path], *, run: str | None, trust: bool, ranks: dist.Ranks) -> Found | None:
    """The newest of `folders` (oldest first) that is intact, verified; None where there are none. As `find` else."""
    passed: dict[Path, UserError] = {}
    for folder in reversed(folders):
        try:
            found = verified(folder, run=run, trust=trust, ranks=ranks)
        except UserError as error:
            if ranks.is_main:
                logger.warning("passing over %s: %s", folder.name, error)
            passed[folder] = error
            continue
        return replace(found, damaged=frozenset(passed))
    for folder, error in passed.items():
        raise UserError(
            f"none of the {len(passed)} checkpoints in {folder.parent} can be used ({error}): restore one, or "
            "move them away or choose another out_dir to start anew"
        )
    return None


def _first_fault(folder: Path, marker: Marker, ranks: dist.Ranks) -> str | None:
    """What is wrong with the first damaged file, on every rank the same; None for nothing."""
    order = sorted(marker.files, key=lambda name: (-marker.files[name].bytes, name))
    mine = order[ranks.rank :: ranks.world]
    faults = [f"{name} {wrong}" for name in mine if (wrong := fault(folder / name, marker.files[name])) is not None]
    every = dist.gathered(faults, ranks)
    return min((wrong for of_rank in every for wrong in of_rank), default=None)
