"""A recipe's YAML file, read and checked before anything is run: a mistake in it shows after an hour otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chain.recipe import read_yaml

from anchorctx.errors import UserError
from anchorctx.layout import Pattern

CORPORA: dict[str, list[str]] = {
    "ordinary": [],
    "tags": ["pack.domain_tags=true"],
    "interleaved": ["pack.interleave=2"],
    "uniform": ["weights=uniform"],
    "unique": [],
}
"""Overrides of `anchorctx prepare`; `unique` is made from `ordinary`."""
COMMANDS = ("kvcomm", "precision", "eval")
"""What a study may be."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file; UserError when it is none, or asks for what nothing makes."""
    recipe = read_yaml(path, ("seeds", "bases", "defaults", "arms", "needles", "studies"))
    for problem in _problems(recipe):
        raise UserError(f"{path}: {problem}")
    return recipe


def arm_of(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """Everything that an arm is made with: what it says, and the defaults for the rest; of a base, what it is."""
    own = recipe["arms"][name] if name in recipe["arms"] else {"base": name}
    return {"seeds": recipe["seeds"], **recipe["defaults"], **own}


def seeds_of(recipe: dict[str, Any]) -> list[int]:
    """The seeds of every arm."""
    return sorted({seed for name in recipe["arms"] for seed in arm_of(recipe, name)["seeds"]})


def labels_of(recipe: dict[str, Any], command: str) -> list[str]:
    """What the results of a command's studies call their models."""
    studies = [study for study in recipe["studies"].values() if study["command"] == command]
    return [study.get("label", "{}").format(name) for study in studies for name in study["models"]]


def _problems(recipe: dict[str, Any]) -> Iterator[str]:
    """A sentence for each mistake."""
    if not _are_seeds(recipe["seeds"]):
        yield f"seeds={recipe['seeds']} must be a list of numbers of at least 0: give [0, 1, 2]"
    for name in recipe["arms"]:
        yield from _problems_of_arm(recipe, name)
    for kind, study in {**recipe["studies"], "ruler": {**recipe.get("ruler", {}), "command": "eval"}}.items():
        if study.get("command") not in COMMANDS:
            yield f"study {kind} has command={study.get('command')}: choose {', '.join(COMMANDS)}"
        for name, seeds in study.get("models", {}).items():
            for seed in set(seeds).difference(_made(recipe, name)):
                yield f"study {kind} has {name} of seed {seed}, which nothing makes: name what an arm or base makes"


def _problems_of_arm(recipe: dict[str, Any], name: str) -> Iterator[str]:
    known, arm = {"pattern", "seeds", *recipe["defaults"]}, arm_of(recipe, name)
    for key in recipe["arms"][name].keys() - known:
        yield f"arm {name} has {key}, which no arm has: choose {', '.join(sorted(known))}"
    choices = {"pattern": [p.value for p in Pattern], "base": list(recipe["bases"]), "corpus": list(CORPORA)}
    for key, values in choices.items():
        if arm.get(key) not in values:
            yield f"arm {name} has {key}={arm.get(key)}: choose {', '.join(values)}"
    if not _are_seeds(arm["seeds"]):
        yield f"arm {name} has seeds={arm['seeds']}: give a list of numbers of at least 0"


def _made(recipe: dict[str, Any], name: str) -> list[int]:
    """The seeds that a model is made of."""
    if name in recipe["bases"]:
        bases = [arm_of(recipe, arm) for arm in recipe["arms"]]
        return [seed for arm in bases if arm["base"] == name for seed in (*recipe["seeds"], *arm["seeds"])]
    return arm_of(recipe, name)["seeds"] if name in recipe["arms"] else []


def _are_seeds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(seed) is int and seed >= 0 for seed in value)
