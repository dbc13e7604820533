"""From the recipe to its stages: commands with what they need, how long they may take, and what names their result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chain.stage import ANCHORCTX, Stage, flow
from recipe import CORPORA, arm_of, seeds_of
from stage import BUDGETS, HERE, QUICKSTART, SHORT, budget_of, made_by, model_of


def stages(recipe: dict[str, Any], out: Path) -> list[Stage]:
    """All stages, each after those that it needs: arm by arm, and measured as soon as it can be."""
    seeds, found = recipe["seeds"], dict[str, Stage]()
    studies = [stage for seed in seeds_of(recipe) for part in (_studies, _ruler) for stage in part(recipe, out, seed)]
    for name in recipe["arms"]:
        arm = arm_of(recipe, name)
        new = [_base(recipe, out, seed, arm["base"]) for seed in dict.fromkeys([*seeds, *arm["seeds"]])]
        new += [_corpus(recipe, out, corpus, arm["row_length"]) for corpus in ("ordinary", arm["corpus"])]
        new += [_evaluate(recipe, out, seed, arm["base"]) for seed in seeds]
        for seed in arm["seeds"]:
            new += [_train(recipe, out, seed, name), _evaluate(recipe, out, seed, name)]
        found |= {stage.name: stage for stage in new if stage.name not in found}
        found |= {s.name: s for s in studies if s.name not in found and found.keys() >= set(s.needs)}
    return [*found.values(), *_speed(recipe, out)]


def _base(recipe: dict[str, Any], out: Path, seed: int, name: str) -> Stage:
    command = [sys.executable, str(QUICKSTART / "pretrain.py"), str(out / f"seed_{seed}" / name), "--seed", str(seed)]
    options = [text for key, value in recipe["bases"][name].items() for text in (f"--{key}", str(value))]
    budget = BUDGETS["longer base" if options else "base"]
    return Stage(f"base/{seed}/{name}", [[*command, "--max-seconds", "1800", *options]], budget)


def _corpus(recipe: dict[str, Any], out: Path, name: str, row_length: int) -> Stage:
    target, ordinary = (out / "corpus" / f"{kind}_{row_length}" for kind in (name, "ordinary"))
    seed, base = recipe["seeds"][0], next(iter(recipe["bases"]))  # the tokenizer is the same in all bases
    if name == "unique":
        command = [sys.executable, str(HERE / "unique_keys.py"), str(ordinary), str(target)]
        need = f"corpus/{ordinary.name}"
    else:
        command = [*ANCHORCTX, "prepare", "--recipe", str(QUICKSTART / "recipe_prepare.yaml"), f"out_dir={target}"]
        command += [f"tokenizer={out / f'seed_{seed}' / base}", f"row_length={row_length}", *CORPORA[name]]
        need = f"base/{seed}/{base}"
    return Stage(f"corpus/{target.name}", [command], BUDGETS["corpus"], [need], [str(target)])


def _train(recipe: dict[str, Any], out: Path, seed: int, name: str) -> Stage:
    arm, folder = arm_of(recipe, name), out / f"seed_{seed}"
    corpus = f"{arm['corpus']}_{arm['row_length']}"
    run, exported, base = folder / "runs" / name, folder / name, arm["base"]
    train = [*ANCHORCTX, "train", "--recipe", str(QUICKSTART / "recipe_train.yaml"), f"out_dir={run}"]
    train += [f"data.train={out / 'corpus' / corpus}", "data.validation=null", f"model.path={folder / base}"]
    train += [f"pattern={arm['pattern']}", f"model.rope_dtype={arm['rope_dtype']}", f"seed={seed}"]
    train += [f"{key}={arm[key]}" for key in ("steps", "tokens_per_step")]
    train += [f"optim.lr={arm['lr']}", f"model.rope.theta={arm['theta']}", "parallel.zero_stage=1"]
    train += [f"model.max_length={arm['row_length']}", f"checkpoint.every={arm['steps']}"]
    export = [*ANCHORCTX, "export", f"run={run}", f"out_dir={exported}"]
    budget = budget_of(recipe, "train", arm)
    needs = [f"base/{seed}/{base}", f"corpus/{corpus}"]
    return Stage(f"train/{seed}/{name}", [train, export], budget, needs, [str(run), str(exported)])


def _evaluate(recipe: dict[str, Any], out: Path, seed: int, name: str) -> Stage:
    """Retrieval by length and depth, and short contexts; a base is read past its limit as it is."""
    arm, folder = arm_of(recipe, name), out / f"seed_{seed}"
    length = arm["row_length"]
    target = folder / "eval" / name
    command = [*ANCHORCTX, "eval", f"out_dir={target}", f"models=[{flow(model_of(recipe, folder, name))}]"]
    command += [f"rope_dtype={arm['rope_dtype']}", "evals=[retrieval,perplexity,needle]"]
    command += [f"retrieval.lengths=[{SHORT},{length}]", f"retrieval.rows={arm['rows']}"]
    command += [f"perplexity.max_length={SHORT}", "perplexity.documents=64"]
    command += [f"needle.lengths=[{length}]", f"needle.rows={recipe['needles']}"]
    budget = budget_of(recipe, "eval", arm)
    return Stage(f"eval/{seed}/{name}", [command], budget, [made_by(recipe, seed, name)], [str(target)])


def _studies(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """Precision and reuse of KV caches."""
    folder = out / f"seed_{seed}"
    for kind, study in recipe["studies"].items():
        some = "arms" in study and seed not in study.get("every_arm", [])
        options = [*study["options"], *([f"arms={flow(study['arms'])}"] if some else [])]
        for name in (name for name, seeds in study["models"].items() if seed in seeds):
            target = folder / kind / name
            model = model_of(recipe, folder, name, study.get("length"))
            model["label"] = study.get("label", "{}").format(name)
            command = [*ANCHORCTX, study["command"], f"out_dir={target}", f"model={model.pop('path')}", *options]
            command += [f"{key}={flow(value)}" for key, value in model.items()]
            needs, budget = [made_by(recipe, seed, name)], budget_of(recipe, "study", arm_of(recipe, name))
            yield Stage(f"{kind}/{seed}/{name}", [command], budget, needs, [str(target)])


def _ruler(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """The offline tasks of RULER, for what they are worth at this size, with the quickstart's settings."""
    names = [name for name, seeds in recipe.get("ruler", {}).get("models", {}).items() if seed in seeds]
    if not names:
        return
    folder = out / f"seed_{seed}"
    target, models = folder / "ruler", [model_of(recipe, folder, name) for name in names]
    command = [*ANCHORCTX, "eval", "--recipe", str(QUICKSTART / "recipe_eval.yaml"), "evals=[ruler]"]
    command += [f"out_dir={target}", f"models={flow(models)}", f"ruler.limit={recipe['ruler']['limit']}"]
    needs = [made_by(recipe, seed, name) for name in names]
    yield Stage(f"ruler/{seed}", [command], BUDGETS["ruler"], needs, [str(target)])


def _speed(recipe: dict[str, Any], out: Path) -> Iterator[Stage]:
    """Seconds of a step by pattern and row length."""
    if settings := recipe.get("speed"):
        seed, base = recipe["seeds"][0], next(iter(recipe["bases"]))
        command = [sys.executable, str(HERE / "speed.py"), str(out / f"seed_{seed}" / base), str(out / "speed")]
        command += ["--lengths", *map(str, settings["lengths"]), "--turns", str(settings["turns"]), "--threads", "1"]
        yield Stage("speed", [command], BUDGETS["speed"], [f"base/{seed}/{base}"])
