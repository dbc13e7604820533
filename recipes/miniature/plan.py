"""From the recipe to its stages: commands with what they need, how long they may take, and what names their result."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from settings import CORPORA, arm_of, seeds_of

from anchorctx.manifest import fingerprint

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
ANCHORCTX = [sys.executable, "-m", "anchorctx.cli.main"]
SHORT = 512
"""Tokens: what the bases were pretrained with, and every model is asked at beside its row's length."""


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


def stages(recipe: dict[str, Any], out: Path) -> list[Stage]:
    """All stages, each after those that it needs: arm by arm, and measured as soon as it can be."""
    seeds, found = recipe["seeds"], dict[str, Stage]()
    studies = [stage for seed in seeds_of(recipe) for part in (_studies, _ruler) for stage in part(recipe, out, seed)]
    for name in recipe["arms"]:
        arm = arm_of(recipe, name)
        new = [_base(recipe, out, seed, arm["base"]) for seed in dict.fromkeys([*seeds, *arm["seeds"]])]
        new += [_corpus(recipe, out, corpus, arm["row_length"]) for corpus in ("ordinary", arm["corpus"])]
        new += [_evaluate(recipe, out, seed, arm["base"], recipe["defaults"]) for seed in seeds]
        for seed in arm["seeds"]:
            new += [_train(out, seed, name, arm), _evaluate(recipe, out, seed, name, arm)]
        found |= {stage.name: stage for stage in new if stage.name not in found}
        found |= {s.name: s for s in studies if s.name not in found and found.keys() >= set(s.needs)}
    return [*found.values(), *_speed(recipe, out)]


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


def _base(recipe: dict[str, Any], out: Path, seed: int, name: str) -> Stage:
    command = [sys.executable, str(QUICKSTART / "pretrain.py"), str(out / f"seed_{seed}" / name), "--seed", str(seed)]
    options = [text for key, value in recipe["bases"][name].items() for text in (f"--{key}", str(value))]
    return Stage(f"base/{seed}/{name}", [[*command, "--max-seconds", "1800", *options]], 360 if options else 80)


def _corpus(recipe: dict[str, Any], out: Path, name: str, row_length: int) -> Stage:
    target, ordinary = (out / "corpus" / f"{kind}_{row_length}" for kind in (name, "ordinary"))
    if name == "unique":
        command, needs = [sys.executable, str(HERE / "unique_keys.py"), str(ordinary), str(target)], str(ordinary.name)
        return Stage(f"corpus/{target.name}", [["rm", "-rf", str(target)], command], 10, [f"corpus/{needs}"])
    seed, base = recipe["seeds"][0], next(iter(recipe["bases"]))  # the tokenizer is the same in all bases
    command = [*ANCHORCTX, "prepare", "--recipe", str(QUICKSTART / "recipe_prepare.yaml"), f"out_dir={target}"]
    command += [f"tokenizer={out / f'seed_{seed}' / base}", f"row_length={row_length}", *CORPORA[name]]
    return Stage(f"corpus/{target.name}", [["rm", "-rf", str(target)], command], 30, [f"base/{seed}/{base}"])


def _train(out: Path, seed: int, name: str, arm: dict[str, Any]) -> Stage:
    folder, corpus = out / f"seed_{seed}", f"{arm['corpus']}_{arm['row_length']}"
    run, exported, base = folder / "runs" / name, folder / name, arm["base"]
    train = [*ANCHORCTX, "train", "--recipe", str(QUICKSTART / "recipe_train.yaml"), f"out_dir={run}"]
    train += [f"data.train={out / 'corpus' / corpus}", "data.validation=null", f"model.path={folder / base}"]
    train += [f"pattern={arm['pattern']}", f"model.rope_dtype={arm['rope_dtype']}", f"seed={seed}"]
    train += [f"{key}={arm[key]}" for key in ("steps", "tokens_per_step")]
    train += [f"optim.lr={arm['lr']}", f"model.rope.theta={arm['theta']}", "parallel.zero_stage=1"]
    train += [f"model.max_length={arm['row_length']}", f"checkpoint.every={arm['steps']}"]
    export = [*ANCHORCTX, "export", f"run={run}", f"out_dir={exported}"]
    budget = 110 if arm["pattern"] == "full" else 75
    needs = [f"base/{seed}/{base}", f"corpus/{corpus}"]
    clear = ["rm", "-rf", str(run), str(exported)]  # a run of other settings would be gone on with
    return Stage(f"train/{seed}/{name}", [clear, train, export], budget, needs)


def _evaluate(recipe: dict[str, Any], out: Path, seed: int, name: str, arm: dict[str, Any]) -> Stage:
    """Retrieval by length and depth, and short contexts; a base is read past its limit as it is."""
    folder, length = out / f"seed_{seed}", arm["row_length"]
    target = folder / "eval" / name
    command = [*ANCHORCTX, "eval", f"out_dir={target}", f"models=[{_flow(model_of(recipe, folder, name))}]"]
    command += [f"rope_dtype={arm['rope_dtype']}", "evals=[retrieval,perplexity,needle]"]
    command += [f"retrieval.lengths=[{SHORT},{length}]", f"retrieval.rows={arm['rows']}"]
    command += [f"perplexity.max_length={SHORT}", "perplexity.documents=64"]
    command += [f"needle.lengths=[{length}]", f"needle.rows={recipe['needles']}"]
    return Stage(f"eval/{seed}/{name}", [["rm", "-rf", str(target)], command], 40, [made_by(recipe, seed, name)])


def model_of(recipe: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """An entry of `models`."""
    model: dict[str, Any] = {"path": str(folder / name), "label": name}
    length = recipe["defaults"]["row_length"]
    return model | ({"config": {"max_position_embeddings": length}} if name in recipe["bases"] else {})


def _studies(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """Precision and reuse of KV caches."""
    folder = out / f"seed_{seed}"
    for kind, study in recipe["studies"].items():
        some = "arms" in study and seed not in study.get("every_arm", [])
        options = [*study["options"], *([f"arms={_flow(study['arms'])}"] if some else [])]
        for name in (name for name, seeds in study["models"].items() if seed in seeds):
            target = folder / kind / name
            model = model_of(recipe, folder, name)
            model["label"] = study.get("label", "{}").format(name)
            command = [*ANCHORCTX, study["command"], f"out_dir={target}", f"model={model.pop('path')}", *options]
            command += [f"{key}={_flow(value)}" for key, value in model.items()]
            needs = [made_by(recipe, seed, name)]
            yield Stage(f"{kind}/{seed}/{name}", [["rm", "-rf", str(target)], command], 90, needs)


def _ruler(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """The offline tasks of RULER, for what they are worth at this size, with the quickstart's settings."""
    names = [name for name, seeds in recipe.get("ruler", {}).get("models", {}).items() if seed in seeds]
    if not names:
        return
    folder = out / f"seed_{seed}"
    target, models = folder / "ruler", [model_of(recipe, folder, name) for name in names]
    command = [*ANCHORCTX, "eval", "--recipe", str(QUICKSTART / "recipe_eval.yaml"), "evals=[ruler]"]
    command += [f"out_dir={target}", f"models={_flow(models)}", f"ruler.limit={recipe['ruler']['limit']}"]
    needs = [made_by(recipe, seed, name) for name in names]
    yield Stage(f"ruler/{seed}", [["rm", "-rf", str(target)], command], 120, needs)


def _speed(recipe: dict[str, Any], out: Path) -> Iterator[Stage]:
    """Seconds of a step by pattern and row length."""
    if settings := recipe.get("speed"):
        seed, base = recipe["seeds"][0], next(iter(recipe["bases"]))
        command = [sys.executable, str(HERE / "speed.py"), str(out / f"seed_{seed}" / base), str(out / "speed")]
        command += ["--lengths", *map(str, settings["lengths"]), "--turns", str(settings["turns"]), "--threads", "1"]
        yield Stage("speed", [command], 120, [f"base/{seed}/{base}"])


def _flow(value: Any) -> str:
    """A value as Hydra reads it: keys without quotes, strings in single ones."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)
