"""One stage of a recipe's chain of commands, and Hydra's words."""

from __future__ import annotations

import json
import shlex
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorctx.config import quoted
from anchorctx.records.manifest import fingerprint

RECIPES = Path(__file__).parents[1]
ANCHORCTX = [sys.executable, "-m", "anchorctx"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the chain; done when its marker names these very commands, and those of all that it needs."""

    name: str
    commands: list[list[str]]
    budget: int
    """Seconds that it may take: what the progress line and the remaining time go by."""
    needs: list[str] = field(default_factory=list)
    """Stages that come before."""
    clears: list[str] = field(default_factory=list)
    """Folders that it fills: what another stage of this name left there goes, what it began itself it goes on with."""

    @property
    def words(self) -> list[list[str]]:
        """What is run where nothing was begun."""
        return [*([["rm", "-rf", *self.clears]] if self.clears else []), *self.commands]

    def script(self) -> str:
        """The commands, as one would type them."""
        return "\n".join(shlex.join(command) for command in self.words)


def fingerprints(todo: list[Stage], out: Path) -> dict[str, str]:
    """By stage: what changes with its commands and those of all that it needs, but not with where these are run."""
    found: dict[str, str] = {}
    packages = sysconfig.get_paths()["purelib"]
    places = {sys.executable: "python", packages: "PACKAGES", f"{RECIPES}/": "RECIPES/", f"{out}/": "OUT/"}
    for stage in todo:
        words = [word for command in stage.words for word in command]
        for place, name in places.items():
            words = [word.replace(place, name) for word in words]
        found[stage.name] = fingerprint([words, [found[need] for need in stage.needs]])
    return found


def flow(value: Any) -> str:
    """A value as Hydra reads it: keys without quotes, strings in single ones."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
