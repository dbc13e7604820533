"""A recipe's YAML file, read before anything is run: a mistake in it shows after an hour otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from anchorctx.errors import UserError


def read_yaml(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The recipe in a file; UserError when it is none, or lacks one of `keys`."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give recipe.yaml, recipe_ci.yaml or one like them")
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML ({str(error).splitlines()[0]}): give recipe.yaml or one like it") from None
    if missing := [key for key in keys if not isinstance(recipe, dict) or key not in recipe]:
        raise UserError(f"{path} has no {missing[0]}: a recipe has {', '.join(keys)}, as recipe.yaml does")
    return recipe
