"""Configuration: recipes and groups compose, mistakes are one sentence that names the valid keys."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from anchorctx.config import MOVED, SCHEMAS, conf_dir, resolve, schema
from anchorctx.errors import UserError
from anchorctx.layout import Pattern
from anchorctx.train.config import Schedule
from anchorctx.train.engine import deepspeed_config

ROOT = Path(__file__).parents[2]
GPU_RECIPES = sorted(ROOT.glob("recipes/gpu/*.yaml"))
THETA = {65_536: 5e6, 131_072: 1e7, 524_288: 1e8, 1_048_576: 1e9}
"""The paper's, which ends at 128K; ours beyond."""


def test_the_gpu_recipes_are_there() -> None:
    models = {"llama2_7b_64k", "llama3_8b_64k", "llama3_8b_128k", "llama3_8b_512k", "mistral_7b_64k"}
    assert {path.stem for path in GPU_RECIPES} == models | {"qwen2.5_1.5b_64k", "llama3_8b_1m"}


def test_the_quickstarts_recipes_agree_with_each_other() -> None:
    train = resolve("train", [], str(ROOT / "recipes" / "quickstart" / "recipe_train.yaml"))
    prepare = resolve("prepare", [], str(ROOT / "recipes" / "quickstart" / "recipe_prepare.yaml"))
    train.validate()
    prepare.validate()
    assert prepare.tokenizer == train.model.path
    assert prepare.out_dir == train.data.train
    assert prepare.row_length == train.model.max_length


RUN = ROOT / "recipes" / "quickstart" / "recipe_train.yaml"


@pytest.mark.parametrize(("recipe", "processes"), [(RUN, 2), *((path, 8) for path in GPU_RECIPES)])
def test_recipes_compose(recipe: Path, processes: int) -> None:
    train = resolve("train", [], str(recipe))
    train.validate()
    length = train.model.max_length
    assert train.rows_per_step(length) >= processes and train.piece_tokens(length) > 2
    config = deepspeed_config(train.parallel, train.optim, dtype=torch.bfloat16, world=processes, cuda=True)
    assert "auto" not in str(config)


@pytest.mark.parametrize("recipe", GPU_RECIPES, ids=lambda path: path.stem)
def test_a_gpu_recipes_runner_packs_what_the_recipe_trains_on(recipe: Path, tmp_path: Path) -> None:
    """With stand-ins for the commands: what `run.sh NAME` hands to `prepare` composes and agrees with the recipe."""
    for name, body in {"anchorctx": 'printf "%s\\n" "$@"', "python": 'printf "%s\\n" "$@"; exit 7'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"CORPUS": "it's a corpus, Ü=1.jsonl", "HELD_OUT": "held [out].jsonl", "OUT": "Läufe/it's lr=2e-5"}
    given |= {"PREPARE": "pack.min_length=8 seed=3", "MODEL": "~/Läufe #1/lr=2e-5"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | given
    command = ["bash", str(recipe.with_name("run.sh")), recipe.stem, "pattern=full"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 7  # the training's
    words = done.stdout.splitlines()
    second, training = words.index("prepare", 1), words.index("-m")
    train_words = words[words.index("train") + 3 :]
    assert words[words.index("train") : words.index("train") + 3] == ["train", "--recipe", f"recipes/gpu/{recipe.name}"]
    train = resolve("train", train_words, str(recipe))
    assert train.pattern is Pattern.full and train.data.validation == "Läufe/it's lr=2e-5/packed_validation"
    assert train.model.path == str(Path.home() / "Läufe #1/lr=2e-5")
    for prepare in (resolve("prepare", words[1:second]), resolve("prepare", words[second + 1 : training])):
        prepare.validate()
        assert prepare.tokenizer == train.model.path and prepare.row_length == train.model.max_length
        assert prepare.pack.min_length == 8 and prepare.seed == 3
    assert resolve("prepare", words[1:second]).sources[0].path == given["CORPUS"]
    assert resolve("prepare", words[second + 1 : training]).sources[0].path == given["HELD_OUT"]


def test_a_gpu_recipe_that_is_none_is_named_with_those_that_are() -> None:
    command = ["bash", str(ROOT / "recipes" / "gpu" / "run.sh"), "llama3_8b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "'llama3_8b' is no recipe: name one of llama2_7b_64k llama3_8b_128k" in done.stderr


@pytest.mark.parametrize("recipe", GPU_RECIPES, ids=lambda path: path.stem)
def test_gpu_recipes_have_the_papers_settings(recipe: Path) -> None:
    """arXiv 2411.13476, section 5.1: AdamW, decay 0.1, betas 0.9/0.95, lr 2e-5, 2000 steps of 8 rows."""
    config = resolve("train", [], str(recipe))
    optim, length = config.optim, config.model.max_length
    assert (optim.lr, optim.weight_decay, optim.betas, config.steps) == (2e-5, 0.1, [0.9, 0.95], 2000)
    assert config.tokens_per_step == 8 * length
    assert config.model.rope.theta == THETA[length]
    assert config.pattern is Pattern.anchor
    assert optim.schedule is Schedule.constant


@pytest.mark.parametrize("preset", ["ulysses8", "zero3_offload"])
def test_the_presets_for_long_rows_recompute_layers_unless_told_otherwise(preset: str) -> None:
    given = ["out_dir=x", "data.train=y", f"parallel={preset}"]
    assert resolve("train", given).memory.checkpoint_every == 1
    assert resolve("train", [*given, "memory.checkpoint_every=0"]).memory.checkpoint_every == 0


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_command_has_its_file_and_every_choice_composes(command: str) -> None:
    assert (conf_dir() / f"{command}.yaml").is_file()


@pytest.mark.parametrize(
    "path", sorted(conf_dir().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_choice_of_a_group_composes(path: Path) -> None:
    needed = {
        "train": ["out_dir=x", "data.train=y", "model.path=z"],
        "prepare": ["out_dir=x", "tokenizer=y", "row_length=64", "sources=[{path: z}]"],
    }
    group = path.parent.name
    command = next(name for name in needed if group in {field.name for field in dataclasses.fields(schema(name))})
    config = resolve(command, [*needed[command], f"{group}={path.stem}"])
    config.validate()
    chosen = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(chosen, dict)
    chosen.pop("defaults", None)
    everything = dataclasses.asdict(config)
    holds(everything if "@package _global_" in path.read_text() else everything[group], chosen)


def holds(config: dict[str, Any], chosen: dict[Any, Any]) -> None:
    """Every chosen value is in the configuration; free dictionaries, such as a mixture's weights, are equal."""
    for key, value in chosen.items():
        if isinstance(value, dict) and key in ("parallel", "memory", "model", "optim", "logging"):
            holds(config[key], value)
        else:
            assert config[key] == value, key


@pytest.mark.parametrize(
    ("command", "overrides", "sentence"),
    [
        ("train", ["optim.learning_rate=1"], "unknown key 'optim.learning_rate'.*valid keys in optim are lr"),
        ("train", ["step=10"], "unknown key 'step': did you mean 'steps'.*valid keys of anchorctx train are"),
        ("train", ["steps=many"], "steps.*many"),
        ("train", ["pattern=anker"], "pattern.*anker.*anchor, anchor_reset"),
        ("train", ["parallel=zero4"], "zero4"),
        (
            "train",
            ["parallel.activation_checkpointing=true"],
            "^parallel.activation_checkpointing moved: write memory.checkpoint_every=1$",
        ),
        ("train", ["model.dtype=float8"], "model.dtype.*float8.*float32, bfloat16"),
        ("train", [], "data.train and out_dir must be given: add data.train=... out_dir=..."),
        ("train", ["out_dir"], "out_dir"),
        ("prepare", ["rowlength=4"], "did you mean 'row_length'"),
        ("prepare", ["sources=[{pth: x}]"], "'pth': did you mean 'path'. valid keys beside it are path, format, name"),
        ("prepare", ["sources=x.jsonl"], r"sources is a list: write sources=\[...\] .anchorctx prepare --help"),
        ("export", ["run=x"], "out_dir must be given: add out_dir="),
        (
            "train",
            ["parallel=zero4"],
            "parallel=zero4 is no .*did you mean zero3.* choose ulysses8, zero1, zero2, zero3",
        ),
    ],
)
def test_mistakes_are_one_sentence(command: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        resolve(command, overrides)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.yaml is neither a file nor a recipe: name a .yaml, or llama2_7b"):
        resolve("train", [], str(tmp_path / "recipe_train.yaml"))
    with pytest.raises(UserError, match="did you mean llama3_8b_128k?"):
        resolve("train", [], "llama3_8b_128")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        resolve("train", [], str(tmp_path / "broken.yaml"))


def test_a_recipe_by_its_name() -> None:
    by_file = resolve("train", [], str(ROOT / "recipes" / "gpu" / "llama3_8b_128k.yaml"))
    assert by_file.model.rope.theta == 1e7
    assert resolve("train", [], "llama3_8b_128k") == by_file


def test_overrides_win_over_the_recipe() -> None:
    recipe = str(ROOT / "recipes" / "gpu" / "llama2_7b_64k.yaml")
    config = resolve("train", ["pattern=full", "optim.lr=1e-4", "parallel=zero2", "model.config.x=1"], recipe)
    assert (config.pattern, config.optim.lr, config.parallel.zero_stage) == (Pattern.full, 1e-4, 2)
    assert config.model.config == {"x": 1}


def test_a_key_that_moved_is_named_with_the_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MOVED, "optim.learning_rate", "optim.lr")
    with pytest.raises(UserError, match="optim.learning_rate moved: write optim.lr"):
        resolve("train", ["optim.learning_rate=1"])
    (tmp_path / "recipe_train.yaml").write_text("defaults: [train, _self_]\noptim: {learning_rate: 1}\n")
    with pytest.raises(UserError, match="optim.learning_rate moved: write optim.lr"):
        resolve("train", [], str(tmp_path / "recipe_train.yaml"))


@pytest.mark.parametrize("word", ["model.config.any.thing=1", "+model.rope.extra.x=2", "++model.rope.theta=3"])
def test_free_keys_and_hydras_syntax_are_left_to_hydra(word: str) -> None:
    key, value = word.lstrip("+").split("=")
    found = dataclasses.asdict(resolve("train", ["out_dir=x", "data.train=y", word]))
    for part in key.split("."):
        found = found[part]
    assert found == float(value)
