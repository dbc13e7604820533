"""From the command line to plain dataclasses: Hydra composes `conf/` and the overrides, the schemas check them.

Hydra stays at this edge: what a command receives is its own dataclass. Every mistake becomes one UserError sentence.
Hydra is imported when something is composed, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorctx.config.overrides import check_words, expand_home, for_hydra, misread, misread_sentence, quoted
from anchorctx.config.sentences import nearest, sentence
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
    hint = nearest(path.stem, names, quote="")
    raise UserError(f"--recipe {recipe} is neither a file nor a recipe: {hint}name a .yaml, or {', '.join(names)}")


def _shipped(installed: str, checkout: str) -> Path:
    """A folder beside the code: inside the package where it is installed, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
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
    return plain(compose_config(command, overrides, recipe))


def plain(config: DictConfig) -> Any:
    """A composed configuration as the command's dataclass; UserError as for `resolve`."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        given = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"{' and '.join(missing)} must be given: add {given}")
    resolved = OmegaConf.to_object(config)
    expand_home(resolved)
    check_ranges(resolved)
    return resolved


def compose_config(command: str, overrides: list[str], recipe: str | None = None) -> DictConfig:
    """The composed configuration, checked against the schema; may still have missing values."""
    owner = schema(command)
    check_words(overrides, command, owner)
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder, name, search = conf_dir(), command, []
    if recipe is not None:
        path = recipe_file(recipe)
        _check_texts(path, owner)
        # the right side still has conf/ as `folder`: Hydra looks beside the recipe first, then in conf/
        folder, name, search = path.parent, path.stem, [f"hydra.searchpath=[{quoted(f'file://{folder}')}]"]
    # conf/train.yaml begins with `defaults: [train_schema, ...]`, so that its values are checked by the dataclass
    ConfigStore.instance().store(f"{command}_schema", node=_open_dicts(OmegaConf.structured(owner)))
    GlobalHydra.instance().clear()  # Hydra refuses a second composition in one process
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return compose(name, [*search, *(for_hydra(word, command, owner) for word in overrides)])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error, command, owner)) from error
    except Exception as error:  # yaml's errors, by name: the import would slow every command
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _check_texts(recipe: Path, owner: type) -> None:
    """UserError for a text that YAML takes for something else, such as a commit 5e12345, which is a number there."""
    import yaml
    from omegaconf import OmegaConf

    try:
        read = OmegaConf.to_container(OmegaConf.load(recipe))
        typed: Any = yaml.load(recipe.read_text(), yaml.BaseLoader)  # every value as it is written
    except (yaml.YAMLError, ValueError, OSError):
        return  # told when it is composed
    for path, value in misread(read, owner):
        written = typed
        for part in path:
            written = written[part]
        if written != str(value):
            raise UserError(f"--recipe {recipe.name}, {misread_sentence('.'.join(map(str, path)), value, written)}")


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
