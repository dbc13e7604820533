"""What a run says of itself in its checkpoints, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from anchorctx.data.packed_set import PackedSet
from anchorctx.parallel.dist import Ranks
from anchorctx.train.checkpoints import compare, folders, read, states
from anchorctx.train.checkpoints.folders import State
from anchorctx.train.checkpoints.write import Writer
from anchorctx.train.config import TrainConfig


def resume(config: TrainConfig, packed: PackedSet, run: str | None, ranks: Ranks) -> read.Found | None:
    """The checkpoint to go on from, verified; None to start anew, UserError where this run cannot go on from it."""
    root, wanted = _root(config), config.checkpoint
    found = read.find(root, wanted.resume, run=run, trust=wanted.trust, ranks=ranks)
    if found is not None:
        compare.check_same_run(found.state, identity(config, packed), found.folder)
        compare.say_changes(found.state, schedule(config), found.folder)
    return found


def check_model(found: read.Found, model: PreTrainedModel) -> None:
    """UserError unless the checkpoint is of this very model."""
    compare.check_same_model(found.state, model.config, states.shapes_of(model), found.folder)


def writer(config: TrainConfig, run: str | None, ranks: Ranks, resumed: read.Found | None) -> Writer:
    """Writes the run's checkpoints; rank 0's `run` names them."""
    damaged = resumed.damaged if resumed else frozenset()
    return Writer(_root(config), run or "", ranks, config.checkpoint, damaged)


def state_of(config: TrainConfig, packed: PackedSet, model: PreTrainedModel, **progress: Any) -> State:
    """What a checkpoint says; `progress` has step, tokens, rows, processes, router_fractions and health."""
    return State(
        identity=identity(config, packed),
        schedule=schedule(config),
        model=compare.configuration(model.config),
        shapes=states.shapes_of(model),
        tied=states.tied_names(model),
        **progress,
    )


def identity(config: TrainConfig, packed: PackedSet) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that continues it, beside the model."""
    return {
        "corpus": packed.fingerprint,
        "tokenizer": packed.manifest["tokenizer_fingerprint"],
        "pattern": config.pattern.value,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
        "balance": config.data.balance,
        "rope": dataclasses.asdict(config.model.rope),
        "rope_dtype": config.model.rope_dtype.value,
        "dtype": config.model.dtype.value,
    }


def schedule(config: TrainConfig) -> dict[str, Any]:
    """What may change between a checkpoint and the run that continues it, and is then said."""
    settings = {f"optim.{name}": value for name, value in dataclasses.asdict(config.optim).items()}
    settings |= {"steps": config.steps, "tokens_per_step": config.tokens_per_step}
    for name in ("zero_stage", "offload_optimizer", "offload_parameters"):
        settings[f"parallel.{name}"] = getattr(config.parallel, name)
    return settings | {"deterministic": config.deterministic, "anchor_visible": config.anchor_visible.value}


def _root(config: TrainConfig) -> Path:
    return Path(config.out_dir) / folders.CHECKPOINTS
