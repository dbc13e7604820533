"""From the command line to plain dataclasses: Hydra composes `conf/` and the overrides, the schemas check them.

Hydra stays at this edge: what a command receives is its own dataclass. Every mistake becomes one UserError sentence.
Hydra is imported when something is composed, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from anchorctx.errors import UserError
from anchorctx.settings import check_ranges

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMAS = {
    "prepare": "anchorctx.data.config:PrepareConfig",
    "plan": "anchorctx.plan.config:PlanConfig",
    "train": "anchorctx.cli.train:TrainCommand",
    "export": "anchorctx.train.config:ExportConfig",
    "eval": "anchorctx.evals.config:EvalConfig",
    "precision": "anchorctx.evals.evaluators.precision.config:PrecisionConfig",
    "kvcomm": "anchorctx.evals.config:KvcommConfig",
    "plot": "anchorctx.report.config:PlotConfig",
    "report": "anchorctx.report.config:ReportConfig",
}
"""Each command's configuration, imported when the command runs."""


MOVED = {
    "parallel.activation_checkpointing": "memory.checkpoint_every=1",
    "micro_rows": "micro_tokens=TOKENS, what a forward pass holds (before: micro_rows x the row length)",
}
"""Keys of earlier versions, and what to write now."""


def conf_dir() -> Path:
    """The folder of configuration groups: inside the installed package, or beside it in a checkout."""
    return _shipped("conf", "conf")


def recipe_file(recipe: str) -> Path:
    """The .yaml that `--recipe` names: a file, or one of the recipes that are installed with the package.

    Raises UserError, naming the nearest recipe, when it is neither.
    """
    path, folder = Path(recipe).expanduser().resolve(), _shipped("recipes", "recipes/gpu")
    if path.is_file():
        return path
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if recipe in names:
        return folder / f"{recipe}.yaml"
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--recipe {recipe} is neither a file nor a recipe: {hint}name a .yaml, or {', '.join(names)}")


def _shipped(installed: str, checkout: str) -> Path:
    """A folder beside the code: inside the package where it is installed, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    return package / installed if (package / installed).is_dir() else package.parent / checkout


def schema(command: str) -> type:
    """The dataclass that a command takes."""
    module, name = SCHEMAS[command].split(":")
    return getattr(importlib.import_module(module), name)


def resolve(command: str, overrides: list[str], recipe: str | None = None) -> Any:
    """Compose `conf/<command>.yaml` (or a `recipe` file) with the overrides into the command's dataclass.

    Raises UserError for an unknown key, a wrong type, a number out of range, a missing value, or a file that does
    not parse.
    """
    config = compose_config(command, overrides, recipe)
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        given = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"{' and '.join(missing)} must be given: add {given}")
    resolved = OmegaConf.to_object(config)
    check_ranges(resolved)
    return resolved


def compose_config(command: str, overrides: list[str], recipe: str | None = None) -> DictConfig:
    """The composed configuration, checked against the schema; may still have missing values."""
    _check_keys(command, overrides)
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder, name, search = conf_dir(), command, []
    if recipe is not None:
        path = recipe_file(recipe)
        # the right side still has conf/ as `folder`: Hydra looks beside the recipe first, then in conf/
        folder, name, search = path.parent, path.stem, [f"hydra.searchpath=[file://{folder}]"]
    # conf/train.yaml begins with `defaults: [train_schema, ...]`, so that its values are checked by the dataclass
    ConfigStore.instance().store(f"{command}_schema", node=_open_dicts(OmegaConf.structured(schema(command))))
    GlobalHydra.instance().clear()  # Hydra refuses a second composition in one process
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return compose(name, [*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error, command)) from error
    except Exception as error:  # yaml's errors, by name: the import would slow every command
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _check_keys(command: str, overrides: list[str]) -> None:
    """Refuse unknown keys of typed parts without Hydra, whose import takes longer than all else; it sees the rest."""
    for word in overrides:
        # +model.rope.extra.x=2: model and rope are dataclasses, extra is a free dictionary, where any key is right
        key, owner = word.lstrip("+~").partition("=")[0], schema(command)
        parts = [] if re.search("[^\\w.]", key) or key.startswith("hydra.") else key.split(".")
        for i, part in enumerate(parts):
            hints = get_type_hints(owner) if dataclasses.is_dataclass(owner) else {part: None}
            if part not in hints:
                raise UserError(_unknown_key(".".join(parts[: i + 1]), command, owner))
            owner = hints[part]


def _open_dicts(config: DictConfig) -> DictConfig:
    """Let overrides add keys to free dictionaries (a model's own fields), while everything typed stays closed."""
    from omegaconf import DictConfig, OmegaConf

    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            if node._metadata.object_type is dict:
                OmegaConf.set_struct(node, False)
            _open_dicts(node)
    return config


def _sentence(error: BaseException, command: str) -> str:
    """One sentence for what Hydra and OmegaConf say in many lines."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    # Hydra wraps OmegaConf's errors, sometimes twice, and only the innermost knows the key
    chain = [error]
    while before := chain[-1].__cause__ or (isinstance(chain[-1], HydraException) and chain[-1].__context__):
        chain.append(before)
    cause = next((e for e in reversed(chain) if isinstance(e, OmegaConfBaseException)), chain[-1])
    full_key = getattr(cause, "full_key", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and full_key:
        return _unknown_key(str(full_key), command, getattr(cause, "object_type", None))
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_choice(str(error.missing_cfg_file), list(error.options))
    if isinstance(cause, MissingMandatoryValue):
        return f"anchorctx {command}: {_first_line(cause)}"
    if isinstance(cause, OmegaConfBaseException) and full_key:
        if "is not a ListConfig" in str(cause):
            return f"{full_key} is a list: write {full_key}=[...] (anchorctx {command} --help has an example)"
        return f"{full_key}: {_first_line(cause)}"
    return _first_line(error)


def _unknown_choice(path: str, choices: list[str]) -> str:
    """Names the ready-made choices of a group, the nearest first; `path` is "parallel/zero4"."""
    group, _, choice = path.rpartition("/")
    near = difflib.get_close_matches(choice, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={choice} is no ready-made choice: {hint}choose {', '.join(choices)}"


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
