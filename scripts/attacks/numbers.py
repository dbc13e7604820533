"""Odd numbers for every numeric key, and models whose weights are no numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from typing import get_type_hints

from attacks.attack import Attack, Scene
from attacks.world import results, trained

ODD = ("nan", "inf", "-inf", "1e30", "-1", "0", "9223372036854775808", "1e-30", "-0.0", "0.5")
OWNERS = {
    "prepare": "anchorctx.data.config:PrepareConfig", "train": "anchorctx.train.config:TrainConfig",
    "eval": "anchorctx.evals.config:EvalConfig", 
    "precision": "anchorctx.evals.evaluators.precision.config:PrecisionConfig",
    "kvcomm": "anchorctx.evals.config:KvcommConfig",
}  # fmt: skip
SKIPPED = ("seed", "timeout_s", "problems", "budget_minutes", "logging.", "steps", "workers")
"""Keys that may be any number, or whose large values only take long."""


def keys(owner: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration that hold one number."""
    hints = get_type_hints(owner)
    for each in dataclasses.fields(owner):
        kind = hints[each.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{each.name}.")  # type: ignore[arg-type]
        elif kind in (int, float) or str(kind) in ("int | None", "float | None"):
            yield prefix + each.name


def odd(command: str, scene: Scene) -> str | None:
    """A random key of the command with a random odd value: refused in a sentence, or all numbers are finite."""
    module, _, name = OWNERS[command].partition(":")
    owner = getattr(importlib.import_module(module), name)
    known = [key for key in keys(owner) if not any(part in key for part in SKIPPED)]
    override = f"{scene.rng.choice(known)}={scene.rng.choice(ODD)}"
    done = scene.run([*scene.world.words(command, scene.out), override], limit=90)
    if done.code == 0:
        wrong = not_numbers(command, scene)
        return f"{override}: exit 0 with {wrong}" if wrong else None
    return None if done.sentence else f"{override}: ended with {done.code}: {done.last}"


def not_numbers(command: str, scene: Scene) -> str | None:
    """The first value in the command's rows that is NaN or infinite."""
    if command == "prepare":
        return None
    rows = trained(scene.out) if command == "train" else results(scene.out)
    values = [float(value) for row in rows for value in row[1 if command == "train" else 2 :] if value is not None]
    return next((repr(value) for value in values if not math.isfinite(value)), None)


def weights(command: str, value: float, scene: Scene) -> str | None:
    """One weight of the model is NaN or infinite: refused, and no row says NaN."""
    from safetensors.torch import load_file, save_file

    copy = scene.folder / "model"
    shutil.copytree(scene.world.folder / "model", copy)
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(file)
    name = scene.rng.choice(sorted(name for name in tensors if "layers" in name))
    tensors[name].view(-1)[scene.rng.randrange(tensors[name].numel())] = value
    save_file(tensors, file, {"format": "pt"})
    original = str(scene.world.folder / "model")
    done = scene.run([word.replace(original, str(copy)) for word in scene.world.words(command, scene.out)])
    written = json.dumps([p.read_text() for p in scene.out.rglob("*.jsonl")])
    if "NaN" in written or "Infinity" in written:
        return f"{value} in {name}: wrote NaN"
    return None if done.sentence else f"{value} in {name}: ended with {done.code}: {done.last}"


def _attacks() -> Iterator[Attack]:
    for command in OWNERS:
        short = int(command in ("train", "eval"))
        yield Attack("numbers", f"{command}: an odd value", partial(odd, command), short, 40, 2.0)
    for command in ("train", "eval", "precision", "kvcomm"):
        for value in (math.nan, math.inf):
            short = int((command, value) == ("eval", math.inf))
            yield Attack("numbers", f"{command}: a model with {value}", partial(weights, command, value), short, 3, 3.0)


ATTACKS = list(_attacks())
