"""Run the miniature: `PYTHONPATH=recipes python recipes/miniature/run.py RECIPE.yaml OUT`; see `chain.runner`."""

from __future__ import annotations

import sys
from pathlib import Path

from chain.runner import command_line
from chain.stage import Stage
from plan import stages
from recipe import read_recipe


def main(arguments: list[str] | None = None) -> int:
    """Command line, two stages at a time, each on one core; returns the exit status."""
    return command_line(stages_of, arguments)


def stages_of(recipe: Path, out: Path) -> list[Stage]:
    """The stages of a recipe's file; UserError when it is none."""
    return stages(read_recipe(recipe), out)


if __name__ == "__main__":
    sys.exit(main())
