"""One stage of the chain, and what the plan makes stages of: models, budgets, Hydra's words."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorctx.config import quoted
from anchorctx.records.manifest import fingerprint

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
ANCHORCTX = [sys.executable, "-m", "anchorctx"]
SHORT = 512
"""Tokens: what the bases were pretrained with, and every model is asked at beside its row's length."""
BUDGETS = {
    "base": 80,
    "longer base": 360,
    "corpus": 30,
    "train": 75,
    "eval": 40,
    "study": 110,
    "ruler": 120,
    "speed": 120,
}
"""Seconds on one core, two stages at a time; twice that for deeper models and longer rows."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the chain; done when its marker names these very commands, and those of all that it needs."""

    name: str
    commands: list[list[str]]
    budget: int
    """Seconds that it may take on one core: what the progress line and the remaining time go by."""
    needs: list[str] = field(default_factory=list)
    """Stages that come before."""

    def script(self) -> str:
        """The commands, as one would type them."""
        return "\n".join(shlex.join(command) for command in self.commands)


def fingerprints(todo: list[Stage], out: Path) -> dict[str, str]:
    """By stage: what changes with its commands and those of all that it needs, but not with where these are run."""
    found: dict[str, str] = {}
    places = {sys.executable: "python", f"{HERE.parent}/": "RECIPES/", f"{out}/": "OUT/"}
    for stage in todo:
        words = [word for command in stage.commands for word in command]
        for place, name in places.items():
            words = [word.replace(place, name) for word in words]
        found[stage.name] = fingerprint([words, [found[need] for need in stage.needs]])
    return found


def made_by(recipe: dict[str, Any], seed: int, name: str) -> str:
    """The stage that makes a model."""
    return f"base/{seed}/{name}" if name in recipe["bases"] else f"train/{seed}/{name}"


def budget_of(recipe: dict[str, Any], kind: str, arm: dict[str, Any]) -> int:
    """Seconds for what is done with an arm."""
    slow = "layers" in recipe["bases"][arm["base"]] or arm["row_length"] > recipe["defaults"]["row_length"]
    return BUDGETS[kind] * (2 if slow else 1)


def model_of(recipe: dict[str, Any], folder: Path, name: str, length: int | None = None) -> dict[str, Any]:
    """An entry of `models`; bases are read up to `length` tokens (the default row's), past their limit."""
    model: dict[str, Any] = {"path": str(folder / name), "label": name}
    length = length or recipe["defaults"]["row_length"]
    return model | ({"config": {"max_position_embeddings": length}} if name in recipe["bases"] else {})


def flow(value: Any) -> str:
    """A value as Hydra reads it: keys without quotes, strings in single ones."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
