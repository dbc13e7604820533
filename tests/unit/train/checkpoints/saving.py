"""Checkpoints of a `FakeEngine`, as one process writes and finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anchorctx.parallel.dist import Ranks
from anchorctx.train.checkpoints import folders, read, states
from anchorctx.train.checkpoints.folders import State
from anchorctx.train.checkpoints.read import Found
from anchorctx.train.checkpoints.write import Writer
from anchorctx.train.config import CheckpointConfig

from .engine import FakeEngine

ALONE = Ranks(0, 1, torch.device("cpu"))
RUN = "ab12"
FILES = ["COMPLETE", "random_00000.json", "state.json", "states_00000.safetensors"]


def state_of(engine: FakeEngine, step: int) -> State:
    model = engine.module.model
    return State(
        step=step,
        tokens=10 * step,
        rows=step,
        processes=1,
        identity={"seed": 0},
        schedule={"steps": 10},
        model={"hidden_size": 8},
        shapes=states.shapes_of(model),
        tied=states.tied_names(model),
    )


def save(root: Path, step: int, engine: FakeEngine | None = None, run: str = RUN, **config: Any) -> Path:
    if engine is None:
        engine = FakeEngine()
        engine.train_step()
    damaged = config.pop("damaged", ())
    writer = Writer(root, run, ALONE, CheckpointConfig(**config), damaged)
    return writer.save(engine, state_of(engine, step), wait=True)


def find(root: Path, resume: str = "auto", run: str = RUN, trust: bool = False) -> Found | None:
    return read.find(root, resume, run=run, trust=trust, ranks=ALONE)


def steps(root: Path) -> list[int | None]:
    return [folders.step_of(path) for path in folders.complete(root)]
