"""From the recipe to its stages: commands with what they need, how long they may take, and what names their result."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorctx.manifest import fingerprint

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
ANCHORCTX = [sys.executable, "-m", "anchorctx.cli.main"]
CORPORA: dict[str, list[str]] = {
    "ordinary": [],
    "tags": ["pack.domain_tags=true"],
    "interleaved": ["pack.interleave=2"],
}
"""Overrides of `anchorctx prepare`; `unique` is made from `ordinary`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the chain; done when its marker names these very commands."""

    name: str
    commands: list[list[str]]
    budget: int
    """Seconds that it may take on one core: what the progress line and the remaining time go by."""
    needs: list[str] = field(default_factory=list)
    """Stages that come before."""

    @property
    def fingerprint(self) -> str:
        """Changes with the commands."""
        return fingerprint(self.commands)

    def script(self) -> str:
        """The commands, as one would type them."""
        return "\n".join(shlex.join(command) for command in self.commands)


def stages(recipe: dict[str, Any], out: Path) -> list[Stage]:
    """All stages in an order in which each comes after those that it needs; arm by arm."""
    corpora = dict.fromkeys(arm.get("corpus", "ordinary") for arm in recipe["arms"].values())
    found = [_base(recipe, out, seed) for seed in recipe["seeds"]]
    found += [_corpus(recipe, out, name) for name in dict.fromkeys(["ordinary", *corpora])]
    for name in recipe["arms"]:
        found += [_train(recipe, out, seed, name) for seed in seeds_of(recipe, name)]
    for part in (_evaluate, _study):
        found += [stage for seed in recipe["seeds"] for stage in part(recipe, out, seed)]
    return found


def seeds_of(recipe: dict[str, Any], name: str) -> list[int]:
    """Seeds that an arm is trained with: all, or the fewer that it names."""
    return recipe["arms"][name].get("seeds", recipe["seeds"])


def _base(recipe: dict[str, Any], out: Path, seed: int) -> Stage:
    target = str(out / f"seed_{seed}" / "base")
    return Stage(f"base/{seed}", [[sys.executable, str(QUICKSTART / "pretrain.py"), target, "--seed", str(seed),
                                   "--max-seconds", "900"]], 80)  # fmt: skip


def _corpus(recipe: dict[str, Any], out: Path, name: str) -> Stage:
    target, base = out / "corpus" / name, out / f"seed_{recipe['seeds'][0]}" / "base"
    if name == "unique":
        command = [sys.executable, str(HERE / "unique_keys.py"), str(out / "corpus" / "ordinary"), str(target)]
        return Stage("corpus/unique", [["rm", "-rf", str(target)], command], 10, ["corpus/ordinary"])
    command = [*ANCHORCTX, "prepare", "--recipe", str(QUICKSTART / "recipe_prepare.yaml"), f"out_dir={target}"]
    command += [f"tokenizer={base}", f"row_length={recipe['row_length']}", *CORPORA[name]]
    first = f"base/{recipe['seeds'][0]}"  # the tokenizer is the same in all bases
    return Stage(f"corpus/{name}", [["rm", "-rf", str(target)], command], 30, [first])


def _train(recipe: dict[str, Any], out: Path, seed: int, name: str) -> Stage:
    arm, folder = recipe["arms"][name], out / f"seed_{seed}"
    run, exported, corpus = folder / "runs" / name, folder / name, arm.get("corpus", "ordinary")
    train = [*ANCHORCTX, "train", "--recipe", str(QUICKSTART / "recipe_train.yaml"), f"out_dir={run}"]
    train += [f"data.train={out / 'corpus' / corpus}", "data.validation=null", f"model.path={folder / 'base'}"]
    train += [f"pattern={arm['pattern']}", f"model.rope_dtype={arm.get('rope_dtype', 'float32')}", f"seed={seed}"]
    train += [f"{key}={recipe[key]}" for key in ("steps", "tokens_per_step")]
    train += [f"optim.lr={recipe['lr']}", f"model.rope.theta={recipe['theta']}", "parallel.zero_stage=1"]
    train += [f"model.max_length={recipe['row_length']}", f"checkpoint.every={recipe['steps']}"]
    export = [*ANCHORCTX, "export", f"run={run}", f"out_dir={exported}"]
    clear = ["rm", "-rf", str(exported)]
    needs = [f"base/{seed}", f"corpus/{corpus}"]
    budget = 110 if arm["pattern"] == "full" else 75
    return Stage(f"train/{seed}/{name}", [train, clear, export], budget, needs)


def _evaluate(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """One call a dtype of the rotation; the base is read past its limit as it is."""
    evaluation, folder = recipe["evaluation"], out / f"seed_{seed}"
    for dtype in dict.fromkeys(arm.get("rope_dtype", "float32") for arm in recipe["arms"].values()):
        arms = [(name, arm) for name, arm in recipe["arms"].items() if seed in seeds_of(recipe, name)]
        names = [name for name, arm in arms if arm.get("rope_dtype", "float32") == dtype]
        models: list[dict[str, Any]] = [{"path": str(folder / name), "label": name} for name in names]
        longest = max(recipe["row_length"], *evaluation["lengths"])
        if dtype == "float32":
            models.append(
                {"path": str(folder / "base"), "label": "base", "config": {"max_position_embeddings": longest}}
            )
        command = [*ANCHORCTX, "eval", f"out_dir={folder / 'eval' / dtype}", f"models={_flow(models)}"]
        command += [f"rope_dtype={dtype}", "evals=[retrieval,perplexity,needle]"]
        command += [f"retrieval.lengths={evaluation['lengths']}", f"retrieval.rows={evaluation['rows']}"]
        command += ["perplexity.max_length=512", "perplexity.documents=64"]
        command += [f"needle.lengths=[{recipe['row_length']}]", f"needle.rows={evaluation.get('needles', 16)}"]
        budget = 25 * len(models)
        yield Stage(f"eval/{seed}/{dtype}", [command], budget, [f"train/{seed}/{name}" for name in names])


def _study(recipe: dict[str, Any], out: Path, seed: int) -> Iterator[Stage]:
    """Precision and reuse of KV caches."""
    folder = out / f"seed_{seed}"
    for kind in ("kvcomm", "precision"):
        for name in (name for name, seeds in recipe[kind]["models"].items() if seed in seeds):
            target, length = folder / kind / name, recipe["row_length"]
            command = [*ANCHORCTX, kind, f"model={folder / name}", f"label={name}", f"out_dir={target}"]
            command += [f"config={{max_position_embeddings: {length}}}"] if name == "base" else []
            if kind == "kvcomm":
                command += ["tasks=[retrieval]", f"retrieval.problems={recipe[kind]['problems']}"]
                command += recipe[kind].get("options", [])
            else:
                command += [f"lengths=[512,{length}]", "shifts=[16]", "cost=false", "control=false"]
            needs = [f"base/{seed}" if name == "base" else f"train/{seed}/{name}"]
            yield Stage(f"{kind}/{seed}/{name}", [["rm", "-rf", str(target)], command], 60, needs)


def _flow(value: Any) -> str:
    """A value as Hydra reads it: keys without quotes, strings in single ones."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)
