"""From the command line to plain dataclasses: Hydra composes `conf/` and the overrides, the schemas check them.

Hydra stays at this edge: what a command receives is its own dataclass. Every mistake becomes one UserError sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from anchorctx.errors import UserError

SCHEMAS = {
    "prepare": "anchorctx.data.config:PrepareConfig",
    "plan": "anchorctx.plan.config:PlanConfig",
    "train": "anchorctx.cli.train:TrainCommand",
    "export": "anchorctx.train.export:ExportConfig",
    "eval": "anchorctx.evals.runner:EvalConfig",
    "precision": "anchorctx.evals.evaluators.precision.config:PrecisionConfig",
    "kvcomm": "anchorctx.evals.evaluators.reuse.evaluator:KvcommConfig",
    "plot": "anchorctx.report.render:PlotConfig",
    "report": "anchorctx.report.page:ReportConfig",
}
"""Each command's configuration, imported when the command runs."""


MOVED = {"parallel.activation_checkpointing": "memory.checkpoint_every=1"}
"""Keys of earlier versions, and what to write now."""


def conf_dir() -> Path:
    """The folder of configuration groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def schema(command: str) -> type:
    """The dataclass that a command takes."""
    module, name = SCHEMAS[command].split(":")
    return getattr(importlib.import_module(module), name)


def resolve(command: str, overrides: list[str], recipe: str | None = None) -> Any:
    """Compose `conf/<command>.yaml` (or a `recipe` file) with the overrides into the command's dataclass.

    Raises UserError for an unknown key, a wrong type, a missing value, or a file that does not parse.
    """
    config = compose_config(command, overrides, recipe)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        given = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"anchorctx {command} needs {' and '.join(missing)}: add {given}")
    return OmegaConf.to_object(config)


def compose_config(command: str, overrides: list[str], recipe: str | None = None) -> DictConfig:
    """The composed configuration, checked against the schema; may still have missing values."""
    folder, name, search = conf_dir(), command, []
    if recipe is not None:
        path = Path(recipe).resolve()
        if not path.is_file():
            raise UserError(f"--recipe {recipe} is no file: name a recipe's .yaml, such as those under recipes/")
        folder, name, search = path.parent, path.stem, [f"hydra.searchpath=[file://{folder}]"]
    ConfigStore.instance().store(f"{command}_schema", node=_open_dicts(OmegaConf.structured(schema(command))))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return compose(name, [*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error, command)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _open_dicts(config: DictConfig) -> DictConfig:
    """Let overrides add keys to free dictionaries (a model's own fields), while everything typed stays closed."""
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            if node._metadata.object_type is dict:
                OmegaConf.set_struct(node, False)
            _open_dicts(node)
    return config


def _sentence(error: BaseException, command: str) -> str:
    """One sentence for what Hydra and OmegaConf say in many lines."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    cause = next((e for e in reversed(chain) if isinstance(e, OmegaConfBaseException)), chain[-1])
    full_key = getattr(cause, "full_key", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and full_key:
        return _unknown_key(str(full_key), command, getattr(cause, "object_type", None))
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_choice(error)
    if isinstance(cause, MissingMandatoryValue):
        return f"anchorctx {command}: {_first_line(cause)}"
    if isinstance(cause, OmegaConfBaseException) and full_key:
        if "is not a ListConfig" in str(cause):
            return f"{full_key} is a list: write {full_key}=[...] (anchorctx {command} --help has an example)"
        return f"{full_key}: {_first_line(cause)}"
    return _first_line(error)


def _unknown_choice(error: MissingConfigException) -> str:
    """Names the ready-made choices of a group, the nearest first: `parallel=zero4`."""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    near = difflib.get_close_matches(choice, error.options or (), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={choice} is no ready-made choice: {hint}choose {', '.join(error.options or ())}"


def _unknown_key(full_key: str, command: str, owner: Any) -> str:
    """Names the valid keys of its `owner`, a dataclass, the nearest first."""
    if full_key in MOVED:
        return f"{full_key} moved: write {MOVED[full_key]}"
    parent, _, key = full_key.rpartition(".")
    valid = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    whole = f"of anchorctx {command}" if owner is schema(command) else "beside it"  # in an element of a list
    place = f"in {parent}" if parent else whole
    return f"unknown key '{full_key}': {hint}valid keys {place} are {', '.join(valid)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
