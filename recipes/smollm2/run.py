"""Run the recipe: `PYTHONPATH=recipes python -m smollm2.run RECIPE.yaml OUT`, with the checkpoint in MODEL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from chain.runner import command_line
from chain.stage import Stage
from smollm2.stages import read_recipe, stages

from anchorctx.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Command line, a stage at a time on all cores; returns the exit status."""
    return command_line(stages_of, arguments, jobs=1)


def stages_of(recipe: Path, out: Path) -> list[Stage]:
    """The stages of a recipe's file; UserError when it is none, or no checkpoint is named."""
    model = os.environ.get("MODEL")
    if not model:
        raise UserError("MODEL is not set: name a checkpoint's folder, GGUF file or hub name, or use run.sh")
    return stages(read_recipe(recipe), model, out)


if __name__ == "__main__":
    sys.exit(main())
