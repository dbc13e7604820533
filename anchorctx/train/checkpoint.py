"""Checkpoints that are whole or not there: written beside, marked complete, renamed; older ones go only afterwards.

`checkpoints/step_00000100/` holds DeepSpeed's sharded states (`engine/`), every rank's random states, `state.json`
(what the run is and how far it got) and `COMPLETE`, which lists all files with their sizes. The loader and the
learning rate are pure functions of the step, so there is nothing else to save.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorctx.errors import UserError
from anchorctx.parallel.dist import Ranks, barrier
from anchorctx.records.manifest import write_json
from anchorctx.train.config import CheckpointConfig

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
ENGINE = "engine"


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Hold the run's folder, made if needed; UserError when another process holds it.

    A run that failed before it wrote anything leaves no folder behind.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / ".lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"out_dir={out_dir} is in use by a run that is still alive: "
                "wait for it, end it, or choose another out_dir"
            ) from None
        try:
            yield
        finally:
            if list(out_dir.iterdir()) == [path]:
                path.unlink()
                out_dir.rmdir()


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return root / f"step_{step:08d}"


def save(engine: Any, root: Path, state: dict[str, Any], ranks: Ranks, config: CheckpointConfig) -> Path:
    """Write a checkpoint from every rank; `state["step"]` names it. Returns its folder."""
    final = step_folder(root, state["step"])
    partial = root / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
    torch.save(_random_states(), partial / f"random_{ranks.rank}.pt")
    barrier()
    if ranks.is_main:
        write_json(partial / "state.json", state)
        write_json(partial / MARKER, _sizes(partial))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _prune(root, config, final)
    barrier()
    return final


def load(engine: Any, folder: Path, ranks: Ranks, processes: int) -> None:
    """Restore the engine's states from a complete checkpoint, and this rank's random states.

    `processes` wrote it. Where there are others now, the states are divided anew, and ranks that were not there before
    keep the random states that they start with.
    """
    if processes == ranks.world:
        path, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
    else:
        logger.info("%s was written by %d processes: dividing its states for %d", folder, processes, ranks.world)
        path = _load_divided(engine, folder, ranks)
    assert path is not None, f"DeepSpeed found no states in {folder}"
    states = folder / f"random_{ranks.rank}.pt"
    if states.is_file():
        _restore_random(torch.load(states, weights_only=False))


def _load_divided(engine: Any, folder: Path, ranks: Ranks) -> str | None:
    """Through DeepSpeed's universal checkpoint, which knows parameters and no partitions; it is removed afterwards."""
    universal = folder.parent / f".{folder.name}.universal"
    if ranks.is_main:
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder / ENGINE, universal / ENGINE)
    barrier()
    engine._config.load_universal_checkpoint = True
    with _apart(engine.optimizer.optimizer):
        path, _ = engine.load_checkpoint(str(universal), tag=ENGINE)
    engine._config.load_universal_checkpoint = False
    barrier()
    if ranks.is_main:
        shutil.rmtree(universal)
    return path


@contextmanager
def _apart(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what ZeRO 3's loading of a universal checkpoint does to the optimizer (tried with DeepSpeed 0.19.8).

    It gives all groups the settings of the first, so that weight decay reaches what has none, and all states one and
    the same `step`, which each of them then counts up, on the device from which it was read: a fused AdamW reads its
    own on the parameter's, any other on the CPU.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    fused = optimizer.defaults.get("fused")
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)


def _convert(source: Path, target: Path) -> None:
    """Make the universal checkpoint `target`; DeepSpeed's converter talks a lot."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def read_state(folder: Path) -> dict[str, Any]:
    """A complete checkpoint's `state.json`; UserError when the folder is no checkpoint or is incomplete."""
    if not (folder / MARKER).is_file():
        kind = "an incomplete checkpoint" if folder.is_dir() else "no folder"
        raise UserError(f"{folder} is {kind} (no {MARKER} in it): name a complete one, or use checkpoint.resume=auto")
    for name, size in json.loads((folder / MARKER).read_text()).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise UserError(
                f"{folder} is an incomplete checkpoint: {name} has {found or 0} of {size} bytes: "
                "remove the folder to resume from the one before"
            )
    return json.loads((folder / "state.json").read_text())


def complete(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return sorted(folder for folder in root.glob("step_*") if (folder / MARKER).is_file())


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint that `checkpoint.resume` names, or None to start anew."""
    if resume not in ("auto", "never"):
        return Path(resume)
    found = complete(root)
    if resume == "never":
        if found:
            raise UserError(
                f"{root.parent} already holds a run ({found[-1].name}): use another out_dir, or checkpoint.resume=auto"
            )
        return None
    for folder in root.glob("*"):
        if folder not in found:
            logger.warning("ignoring %s: it is not a complete checkpoint", folder.name)
    return found[-1] if found else None


def check_same_run(state: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    """Raise UserError when the checkpoint was written by a run that this one cannot continue."""
    for key, now in identity.items():
        before = state["identity"].get(key)
        if before != now:
            raise UserError(
                f"{folder} was written with {key}={before}, but this run has {key}={now}: "
                "give the same one to resume, or choose another out_dir to start a new run"
            )


def say_changes(state: dict[str, Any], schedule: dict[str, Any], folder: Path) -> None:
    """Warn of settings that this run has otherwise than the one that wrote the checkpoint."""
    before = json.loads(json.dumps(state.get("schedule", {})))
    now = json.loads(json.dumps(schedule))
    changed = [f"{key}={now.get(key)} (was {value})" for key, value in before.items() if now.get(key) != value]
    if changed:
        logger.warning("continuing %s with %s", folder.name, ", ".join(changed))


def _prune(root: Path, config: CheckpointConfig, newest: Path) -> None:
    """Remove older and half-written checkpoints; never `newest`, which may precede an abandoned run's."""
    for folder in complete(root)[: -config.keep_last]:
        if folder == newest:
            continue
        step = int(folder.name.removeprefix("step_"))
        if not (config.keep_every and step % config.keep_every == 0):
            (folder / MARKER).unlink()  # first, so that a kill in between leaves nothing that looks complete
            shutil.rmtree(folder)
    for left in {*root.glob("step_*"), *root.glob(".step_*.partial")} - set(complete(root)):
        shutil.rmtree(left)  # of a kill in the middle of writing or pruning; the run's lock says that nobody uses it


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
