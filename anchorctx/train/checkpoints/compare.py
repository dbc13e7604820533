"""May this run continue that checkpoint? Compared before anything is written: continued exactly, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from anchorctx.errors import UserError
from anchorctx.train.checkpoints.folders import State

logger = logging.getLogger(__name__)

MAY_DIFFER = {
    "_name_or_path",
    "architectures",
    "dtype",  # compared as the run's `model.dtype`
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a model's configuration that say nothing about what it computes."""


def check_same_run(state: State, identity: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError when the checkpoint was written by a run that this one cannot continue."""
    _same(state.identity, _plain(identity), folder)


def check_same_model(state: State, config: PretrainedConfig, shapes: Mapping[str, list[int]], folder: Path) -> None:
    """Raise UserError when the checkpoint is of a model that computes something else, or has other weights."""
    before, here = ({f"model.{key}": v for key, v in fields.items()} for fields in _common(state, config))
    _same(before, here, folder)
    for name in sorted(state.shapes.keys() | shapes.keys()):
        before, here = state.shapes.get(name), shapes.get(name)
        if before != here:
            raise UserError(
                f"{folder} has {name} {_shape(before)}, but this run's model {_shape(here)}: give the same model to "
                "resume, or choose another out_dir to start a new run"
            )


def check_exported(state: State, config: PretrainedConfig, file: Path, folder: Path) -> None:
    """Raise UserError unless a run's config.json, `file`, read as `config`, is of the model of checkpoint `folder`."""
    before, here = _common(state, config)
    for key, value in here.items():
        if value != before[key]:
            raise UserError(
                f"{file} has {key}={value}, but {folder.name} was trained with {key}={before[key]}: restore it, or "
                "type the training's command again, which writes it anew"
            )


def configuration(config: PretrainedConfig) -> dict[str, Any]:
    """The model's whole configuration, as JSON has it, but for what may differ between two runs of it."""
    return _without(_plain(config.to_dict()))


def say_changes(state: State, schedule: Mapping[str, Any], folder: Path) -> None:
    """Warn of settings that this run has otherwise than the one that wrote the checkpoint; they hold from now on."""
    before, now = state.schedule, _plain(schedule)
    changed = [f"{key}={now.get(key)} (was {value})" for key, value in before.items() if now.get(key) != value]
    if changed:
        logger.warning("continuing %s with %s", folder.name, ", ".join(changed))


def _common(state: State, config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint's configuration and this one, of the fields that both have.

    One that only one of them has is another version of transformers', with its default.
    """
    now = configuration(config)
    common = [key for key in now if key in state.model]
    return {key: state.model[key] for key in common}, {key: now[key] for key in common}


def _same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for key, here in now.items():
        if before.get(key) != here:
            raise UserError(
                f"{folder} was written with {key}={before.get(key)}, but this run has {key}={here}: "
                "give the same one to resume, or choose another out_dir to start a new run"
            )


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in MAY_DIFFER}
    return value


def _shape(shape: list[int] | None) -> str:
    return "without it" if shape is None else f"with {shape}"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
