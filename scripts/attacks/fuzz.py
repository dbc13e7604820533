"""Nonsense: mutated command lines, and mutated files that a command reads. A sentence, or exit 0."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from attacks.attack import Attack, Scene
from attacks.damage import DAMAGES, gone
from attacks.forks import Ended
from attacks.world import COMMANDS

SIGNS = "=[]{}(),:;'\"$%&!?*#@~^|<>`\\ \t\n+-_0123456789aeEnN.éß漢🙂\u202e\ud800"
"""No slash, so that a mutated path stays in the folder."""
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 2**64, 0.5, "", "x", "é" * 50, [], {}, [[]], {"a": {"b": []}}, "1", "null", [None], "\0",
)  # fmt: skip
WORDS = (
    "nan", "inf", "null", "true", "[]", "{}", "[1,2", "{a: 1", "${oc.env:HOME}", "${a}", "???", "-1", "1e400", "'",
    "x" * 5000, "[" * 300, "~", "+a=1", "a.b.c=1", "=", "==", "--show", "--recipe", "--recipe=none", "--nonsense", "-",
)  # fmt: skip


def line(command: str, scene: Scene) -> str | None:
    """One to four changes to a command line; four of five are only shown, the others run."""
    rng = scene.rng
    words = _copied(command, scene)
    if rng.random() < 0.8 or command in ("train", "precision", "kvcomm"):
        words.append("--show")
    for _ in range(rng.randint(1, 4)):
        words = mutated_line(words, rng)
    return _verdict(scene.run([words[0] if words else "", *words[1:]], limit=60), str(words))


def mutated_line(words: list[str], rng: random.Random) -> list[str]:
    """One change: a word removed, doubled, inserted, cut, or with other characters, or another value."""
    words = list(words)
    place = rng.randrange(len(words)) if words else 0
    kind = rng.randrange(6)
    if not words or kind == 0:
        words.insert(place, rng.choice(WORDS))
    elif kind == 1 and len(words) > 1:
        del words[place]
    elif kind == 2:
        words.insert(place, rng.choice(words))
    elif kind == 3:
        words[place] = words[place].partition("=")[0] + "=" + rng.choice(WORDS)
    else:
        at = rng.randrange(len(words[place]) + 1)
        keep = rng.randint(0, 2)
        words[place] = words[place][:at] + "".join(rng.choices(SIGNS, k=rng.randint(0, 3))) + words[place][at + keep :]
    return words


def _copied(command: str, scene: Scene) -> list[str]:
    """The command with its inputs copied into the folder, and every path relative to it."""
    world = scene.world.folder
    for name in ("model", "prepare", "eval"):
        shutil.copytree(world / name, scene.folder / name)
    shutil.copytree(world / "train", scene.folder / "train")
    shutil.copyfile(world / "corpus.jsonl", scene.folder / "corpus.jsonl")
    words = scene.world.words(command, scene.out)
    return [word.replace(f"{scene.folder}/", "").replace(f"{world}/", "") for word in words]


TARGETS: dict[str, tuple[str, list[str]]] = {
    "corpus.jsonl, then prepare": ("corpus.jsonl", ["prepare"]),
    "tokenizer.json, then prepare": ("model/tokenizer.json", ["prepare"]),
    "tokenizer_config.json, then prepare": ("model/tokenizer_config.json", ["prepare"]),
    "config.json, then plan": ("model/config.json", ["plan", "model.path=model", "row_length=128", "gpus=1"]),
    "config.json, then eval": ("model/config.json", ["eval"]),
    "packed manifest, then report": ("prepare/*/manifest.json", ["report", "prepare", "out=out/report.html"]),
    "results.jsonl, then report": ("eval/results.jsonl", ["report", "eval", "out=out/report.html"]),
    "metrics.jsonl, then report": ("train/metrics.jsonl", ["report", "train", "out=out/report.html"]),
    "run's manifest, then report": ("train/manifest.json", ["report", "train", "out=out/report.html"]),
    "state.json, then export": ("train/checkpoints/*6/state.json", ["export", "run=train", "out_dir=out/exported"]),
    "COMPLETE, then export": ("train/checkpoints/*6/COMPLETE", ["export", "run=train", "out_dir=out/exported"]),
    "run's config.json, then export": ("train/model/config.json", ["export", "run=train", "out_dir=out/exported"]),
    "a recipe, then --show": ("recipe.yaml", ["train", "--recipe", "recipe.yaml", "--show"]),
}
"""A file by pattern, and the command that reads it."""
RECIPE = "defaults: [train, _self_]\nout_dir: out\ndata: {train: packed}\nmodel: {path: model}\noptim: {lr: 1.0e-3}\n"


def file(name: str, scene: Scene) -> str | None:
    """A file changed in its bytes, or in one value of its JSON, then read."""
    pattern, words = TARGETS[name]
    typed = _copied(words[0], scene) if len(words) == 1 else words
    if len(words) > 1:
        _copied("report", scene)
    (scene.folder / "recipe.yaml").write_text(RECIPE)
    path = next(scene.folder.glob(pattern))
    what = mutated_file(path, scene.rng)
    done = scene.run(typed, limit=60)
    if typed[0] == "export" and done.code == 0:  # whatever was changed, what is exported is the same
        return None if _exported(scene.out) == _exported(scene.world.folder / "export") else f"{what}: another export"
    return _verdict(done, f"{what} in {pattern}")


def _exported(out: Path) -> dict[str, Any]:
    """What a reader of an exported folder computes with."""
    files = {path.name: path for path in (out / "exported").iterdir() if path.name != "README.md"}
    config = json.loads(files.pop("config.json").read_bytes())
    said = ("transformers_version", "architectures", "use_cache", "_name_or_path")
    return {name: path.read_bytes() for name, path in files.items()} | {
        "config.json": {key: value for key, value in config.items() if key not in said}
    }


def mutated_file(path: Path, rng: random.Random) -> str:
    """Change the file; returns how."""
    if path.suffix in (".json", ".jsonl", "") and rng.random() < 0.7:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(mutated_value(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")
        return "another value"
    how = rng.choice([way for way in DAMAGES if way is not gone])
    how(path, rng)
    return how.__name__


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Another value somewhere inside, or a key less, or one more."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutated_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _verdict(done: Ended, what: str) -> str | None:
    """Exit 0, or a sentence."""
    if done.code == 0 or done.sentence:
        return None
    return f"{what[:300]}: ended with {done.code}: {done.last}"


ATTACKS = [
    *(Attack("fuzz", f"command line of {c}", partial(line, c), 2, 360, 0.3) for c in COMMANDS),
    *(Attack("fuzz", f"mutated {name}", partial(file, name), 1, 195, 0.8) for name in TARGETS),
]
