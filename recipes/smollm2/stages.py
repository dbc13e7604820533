"""From the recipe to its stages: a corpus, continuations of one checkpoint, and what is measured of each."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chain.recipe import read_yaml
from chain.stage import ANCHORCTX, Stage, flow

from anchorctx.config import quoted
from anchorctx.errors import UserError

KEYS = ("base_length", "positions", "seeds", "corpus", "train", "arms", "measures")
"""What a recipe has."""
COMMANDS = ("eval", "kvcomm", "precision")
BASES = ("base", "raised")
"""The checkpoint as it is, and with the continuations' theta and length, untrained."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file; UserError when it is none, or measures what nothing makes."""
    recipe = read_yaml(path, KEYS)
    for name, measure in recipe["measures"].items():
        if measure.get("command") not in COMMANDS:
            raise UserError(
                f"{path}: measure {name} has command={measure.get('command')}: choose {', '.join(COMMANDS)}"
            )
        unknown = [model for model in measure["models"] if model not in (*BASES, *recipe["arms"])]
        if unknown:
            raise UserError(
                f"{path}: measure {name} has {unknown[0]}, which nothing makes: name an arm, base or raised"
            )
    return recipe


def stages(recipe: dict[str, Any], model: str, out: Path) -> list[Stage]:
    """All stages, each after those that it needs; `model` is the checkpoint: a folder, a GGUF file or a hub's name."""
    found = list(_measures(recipe, model, out, None))
    if recipe["arms"]:
        found.append(_corpus(recipe, model, out))
    for seed in recipe["seeds"]:
        found += [_train(recipe, model, out, seed, name) for name in recipe["arms"]]
        found += _measures(recipe, model, out, seed)
    return found


def _corpus(recipe: dict[str, Any], model: str, out: Path) -> Stage:
    corpus, target = recipe["corpus"], out / "corpus"
    command = [*ANCHORCTX, "prepare", f"out_dir={target}", f"tokenizer={model}", f"row_length={corpus['row_length']}"]
    return Stage("corpus", [[*command, *_filled(corpus["options"])]], corpus["seconds"], clears=[str(target)])


def _train(recipe: dict[str, Any], model: str, out: Path, seed: int, name: str) -> Stage:
    settings, arm = recipe["train"], recipe["arms"][name]
    run, exported = out / f"seed_{seed}" / "runs" / name, _folder(out, seed, name)
    length = recipe["corpus"]["row_length"]
    train = [*ANCHORCTX, "train", f"out_dir={run}", f"data.train={out / 'corpus'}", f"model.path={model}"]
    train += [f"seed={seed}", f"steps={settings['steps']}", f"tokens_per_step={settings['tokens_per_step']}"]
    train += [f"optim.lr={settings['lr']}", f"model.rope.theta={settings['theta']}", f"model.max_length={length}"]
    train += [f"{key}={value}" for key, value in arm.items() if key != "seconds"]
    train += [f"checkpoint.every={settings['steps']}", *_filled(settings["options"])]
    export = [*ANCHORCTX, "export", f"run={run}", f"out_dir={exported}"]
    room = ["rm", "-rf", str(run / "checkpoints")]  # 1.9 GB
    clears = [str(run), str(exported)]
    return Stage(f"train/{seed}/{name}", [train, export, room], arm["seconds"], ["corpus"], clears)


def _measures(recipe: dict[str, Any], model: str, out: Path, seed: int | None) -> Iterator[Stage]:
    """What is measured of the checkpoint (`seed` None), or of a seed's continuations."""
    for kind, measure in recipe["measures"].items():
        for name in measure["models"]:
            if (name in BASES) != (seed is None):
                continue
            target = out / (f"seed_{seed}" if seed is not None else "base") / kind / name
            command = [*ANCHORCTX, measure["command"], f"out_dir={target}"]
            command += [*_model(recipe, measure, model, out, seed, name), *_filled(measure["options"])]
            needs = [] if seed is None else [f"train/{seed}/{name}"]
            stage = f"{kind}/{'' if seed is None else f'{seed}/'}{name}"
            yield Stage(stage, [command], measure["seconds"], needs, [str(target)])


def _model(
    recipe: dict[str, Any], measure: dict[str, Any], model: str, out: Path, seed: int | None, name: str
) -> list[str]:
    """The keys that name a model, and have it read to `measure.length` tokens, past its limit if need be."""
    label = measure.get("label", "{}").format(name)  # two measures of one metric need labels of their own
    words = [f"model={model if seed is None else _folder(out, seed, name)}", f"label={flow(label)}"]
    if name == "raised":
        if measure["command"] != "eval":
            raise UserError(f"raised can be measured by eval, not by {measure['command']}: leave it out of the models")
        longest = max(measure.get("length", 0), recipe["corpus"]["row_length"])
        return [*words, f"rope.theta={recipe['train']['theta']}", f"max_length={longest}"]
    limit = recipe["base_length"] if name == "base" else recipe["corpus"]["row_length"]
    if measure.get("length", 0) > limit:
        words.append(f"config={flow({'max_position_embeddings': measure['length']})}")
    return words


def _folder(out: Path, seed: int, name: str) -> Path:
    return out / f"seed_{seed}" / name


def _filled(options: list[str]) -> list[str]:
    """Hydra's overrides, with the folder of installed packages for `{site}`, and the file of questions in the
    environment for `{gsm8k}`; without one the option is left out, and the hub is asked."""
    questions = os.environ.get("GSM8K", "")
    kept = [option for option in options if questions or "{gsm8k}" not in option]
    site = sysconfig.get_paths()["purelib"]
    return [option.replace("{site}", site).replace("{gsm8k}", quoted(questions)) for option in kept]
