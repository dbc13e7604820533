"""What the plan makes stages of: models and budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
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
