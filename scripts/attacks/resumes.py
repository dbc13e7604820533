"""A resume with something changed: what matters is applied and said, or refused; what does not changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from attacks.attack import Attack, Scene
from attacks.forks import Ended
from attacks.world import trained

NEAR = 1e-5
"""Relative difference of the last validation loss where another order of the same sums is allowed."""
SAME = (
    "micro_tokens=64", "memory.checkpoint_every=1", "memory.mlp_tile=16", "memory.loss=whole", "parallel.zero_stage=1",
    "parallel.zero_stage=3", "model.attention=reference", "logging.every=2", "checkpoint.every=3", "deterministic=true",
    "checkpoint.keep_last=1", "data.verify=false", "memory.loss_tile=16", "validate_every=2",
)  # fmt: skip
APPLIED = (
    "optim.lr=0.02", "optim.weight_decay=0.9", "optim.betas=[0.5,0.6]", "optim.eps=0.1", "optim.clip=0.01",
    "optim.warmup_steps=8", "optim.schedule=cosine", "pattern=full", "seed=1", "tokens_per_step=512",
    "model.rope.theta=100.0", "model.rope_dtype=bfloat16", "model.dtype=bfloat16", "anchor_visible=always",
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "norm eps": {"rms_norm_eps": 0.5},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "activation": {"hidden_act": "gelu"},
    "heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
    "hidden size": {"hidden_size": 64},
    "layers": {"num_hidden_layers": 3},
    "intermediate size": {"intermediate_size": 64},
    "vocabulary": {"vocab_size": 400},
    "length": {"max_position_embeddings": 64},
    "biases": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "family": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
}


def same(override: str, scene: Scene) -> str | None:
    """Goes on to the same weights, or refuses and leaves the run as it was."""
    before = _begin(scene)
    done = scene.run([*scene.world.words("train", scene.out), override])
    if done.code != 0:
        return _refused(scene, done, before)
    ours, whole = _last(trained(scene.out)), _last(trained(scene.world.folder / "train"))
    return None if abs(ours - whole) <= NEAR * abs(whole) else f"{override} changed the result: {ours} from {whole}"


def applied(override: str, scene: Scene) -> str | None:
    """Says so and does so, or refuses and leaves the run as it was."""
    before = _begin(scene)
    done = scene.run([*scene.world.words("train", scene.out), override])
    if done.code != 0:
        return _refused(scene, done, before)
    if override.split("=")[0].rpartition(".")[2] not in done.text:
        return f"{override} is not mentioned"
    # The validation loss of the last row is of the weights alone, the training loss of the pattern and rows too.
    same_rows = trained(scene.out)[-2:] == trained(scene.world.folder / "train")[-2:]
    return f"{override} was not applied" if same_rows else None


def model(fields: dict[str, Any], scene: Scene) -> str | None:
    """The checkpoint that the run began with is another one: refused before anything is written."""
    before = _begin(scene)
    copy = scene.folder / "model"
    shutil.copytree(scene.world.folder / "model", copy)
    config = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps(config))
    original = f"model.path={scene.world.folder / 'model'}"
    done = scene.run([w if w != original else f"model.path={copy}" for w in scene.world.words("train", scene.out)])
    return f"went on with another {list(fields)[0]}" if done.code == 0 else _refused(scene, done, before)


SHAPE = ("model_type", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("max_position_embeddings",)


def new_model(width: int, scene: Scene) -> str | None:
    """A new model of another width instead of the checkpoint: refused before the run's own configuration is written."""
    before = _begin(scene)
    config = json.loads((scene.world.folder / "model" / "config.json").read_text())
    fields = [f"{name}: {config[name]}" for name in SHAPE]
    words = [w for w in scene.world.words("train", scene.out) if not w.startswith("model.path=")]
    done = scene.run([*words, f"model.config={{{', '.join([*fields, f'hidden_size: {width}'])}}}"])
    return "went on with another width" if done.code == 0 else _refused(scene, done, before)


def _begin(scene: Scene) -> dict[str, bytes]:
    """A run that was cut off; returns its files' contents by name."""
    scene.world.half_trained(scene.out)
    return _files(scene)


def _files(scene: Scene) -> dict[str, bytes]:
    found = (path for path in scene.out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(scene.out)): path.read_bytes() for path in found}


def _refused(scene: Scene, done: Ended, before: dict[str, bytes]) -> str | None:
    """A refusal in a sentence that wrote nothing, behind which the run still goes on as before."""
    if not done.sentence:
        return f"ended with {done.code}: {done.last}"
    after = _files(scene)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return f"refused, but wrote {min(changed)}" if changed else scene.finishes("train")


def _last(rows: list[tuple[Any, ...]]) -> float:
    return float(rows[-1][-1])


def _attacks() -> Iterator[Attack]:
    for what in SAME:
        yield Attack("resumes", f"{what}, which changes nothing", partial(same, what), 0, 1, 4.0)
    for what in APPLIED:
        short = int(what == "optim.eps=0.1")
        yield Attack("resumes", f"{what}, which matters", partial(applied, what), short, 1, 4.0)
    for what, fields in MODELS.items():
        yield Attack("resumes", f"model with another {what}", partial(model, fields), 0, 1, 4.0)
    for width in (16, 64):
        yield Attack("resumes", f"a new model {width} wide", partial(new_model, width), 0, 1, 4.0)


ATTACKS = list(_attacks())
