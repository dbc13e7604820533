"""Models under evaluation: what identifies them, and loading them as any user of transformers would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.evals.attention import attention_name
from anchorctx.evals.base import Evaluator, Subject
from anchorctx.evals.config import EvalConfig, EvalDtype, EvaluatedModel
from anchorctx.models import load as reader
from anchorctx.models import reach
from anchorctx.models.identity import identity as identify
from anchorctx.models.rope import apply_rope


def models_of(config: EvalConfig) -> list[EvaluatedModel]:
    """The models that `model` or `models` names, each with a label of its own; UserError when they name none."""
    paths = config.model if isinstance(config.model, list) else [config.model] if config.model else []
    if bool(paths) == bool(config.models):
        raise UserError("name what to evaluate, once: model=FOLDER, model=[A,B], or models=[{path: A, label: a}, ...]")
    if not all(isinstance(path, str) for path in paths):
        raise UserError(f"model={config.model} must be a folder or a list of folders: for settings of each use models")
    if len(paths) > 1 and config.label is not None:
        raise UserError(
            f"label={config.label} cannot name {len(paths)} models: give models=[{{path: A, label: a}}, ...]"
        )
    shared = {name: getattr(config, name) for name in ("label", "average", "config", "rope", "max_length")}
    models = config.models or [EvaluatedModel(path=path, **shared) for path in paths]
    for model, label in zip(models, _labels([model.path for model in models]), strict=True):
        model.label = model.label or label
    used = Counter(str(model.label) for model in models) + Counter({str(m.average) for m in models if m.average})
    twice = [label for label, count in used.items() if count > 1]
    if twice:
        raise UserError(f"two models are labelled {twice[0]}, which would mix their results: give each a label")
    return models


def _labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p[-1:]) for p in parts]


def read_config(model: EvaluatedModel) -> PretrainedConfig:
    """The model's configuration with its changes; UserError when the folder is no model or a change is impossible."""
    config = reader.read_config(model.path, model.config)
    rope = model.rope
    if model.max_length is not None or any(getattr(rope, n) is not None for n in ("type", "theta", "factor")):
        apply_rope(config, rope, model.max_length, trained=True)
    return config


def read_tokenizer(model: EvaluatedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return reader.read_tokenizer(model.path)


def load(
    model: EvaluatedModel, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, config: EvalConfig
) -> Subject:
    """Load the weights onto the device, or spread over several."""
    device = device_of(config)
    dtype = config.dtype.value
    if config.dtype is EvalDtype.auto and device.type == "cpu" and config.device_map is None:
        dtype = "float32"
    options: dict[str, Any] = {"attn_implementation": attention_name(config.attention, config.rope_dtype)}
    if config.device_map is not None:
        options["device_map"] = config.device_map
    loaded = reader.load_weights(model.path, hf_config, dtype=dtype, **options)
    if config.device_map is None:
        loaded.to(device)  # type: ignore[arg-type]
    if config.rope_dtype is not RopeDtype.bfloat16:
        set_rope_dtype(loaded, config.rope_dtype)
    return Subject(loaded.eval(), tokenizer)


def check_reach(model: EvaluatedModel, hf_config: PretrainedConfig, evaluator: Evaluator) -> None:
    """Raise UserError when an evaluation gives the model more tokens than its positions reach."""
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and getattr(text, "rope_parameters", None):
        limit = reach(text)
    if limit is not None and evaluator.longest() > limit:
        raise UserError(
            f"{evaluator.name} asks for {evaluator.longest()} tokens, but {model.label} has max_position_embeddings="
            f"{limit}: lower its lengths, extend the model with max_length=... rope.theta=... (or rope.type and "
            "rope.factor), or read past the limit as it is with config='{max_position_embeddings: ...}'"
        )


def identity(model: EvaluatedModel, hf_config: PretrainedConfig) -> dict[str, Any]:
    """JSON that changes whenever the model's results could, with its label."""
    return {"label": model.label, **identify(model.path, hf_config)}


def device_of(config: EvalConfig) -> torch.device:
    """Where a model goes that is not spread; `auto` is this process's GPU where there is one."""
    if config.device == "auto":
        cuda = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    try:
        return torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"device={config.device} is unknown: use cpu, cuda, cuda:1 or auto") from error
