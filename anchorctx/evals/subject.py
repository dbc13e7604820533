"""Models under evaluation: what identifies them, loading them as any user of transformers would, and their attention.

They attend by transformers' own functions or by ours. Ours need a layout, which `generate` and lm-eval do not give. A
prompt that is read at once and unpadded is one document, so its layout is known; every other call (a generated token, a
padded batch) goes to torch's `sdpa`, which computes the same. Rotation in float32 leaves queries and keys in float32,
which plain `sdpa` would refuse beside bfloat16 values: they are cast once, before either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorctx.attention import BACKENDS
from anchorctx.attention.config import RopeDtype
from anchorctx.attention.interface import implementation, register, together
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.evals.base import Evaluator, Subject
from anchorctx.evals.config import EvalConfig, EvalDtype, EvaluatedModel
from anchorctx.layout import PackedLayout
from anchorctx.models import load as reader
from anchorctx.models import reach
from anchorctx.models.identity import identity as identify
from anchorctx.models.rope import apply_rope

OURS = [implementation(), *map(implementation, BACKENDS)]
"""Names of our attention: `anchor`, `anchor_cpu` and so on."""


def models_of(config: EvalConfig) -> list[EvaluatedModel]:
    """The models that `model` or `models` names, each with a different label; UserError when they name none."""
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
    # A word for averages is a label too: its rows stand beside the models'.
    used = Counter(str(model.label) for model in models) + Counter({str(m.average) for m in models if m.average})
    twice = [label for label, count in used.items() if count > 1]
    if twice:
        raise UserError(f"two models are labelled {twice[0]}, which would mix their results: give each a label")
    return models


def _labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(path).parts for path in paths]
    # runs/a/exported, runs/b/exported: "exported" is the same for both, so a/exported and b/exported.
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
    # On a CPU bfloat16 is slow and less exact: `auto` widens it to float32, unless accelerate places the layers.
    dtype = config.dtype.value
    if config.dtype is EvalDtype.auto and device.type == "cpu" and config.device_map is None:
        dtype = "float32"
    options: dict[str, Any] = {"attn_implementation": attention_name(config.attention, config.rope_dtype)}
    if config.device_map is not None:
        options["device_map"] = config.device_map
    loaded = reader.load_weights(model.path, hf_config, dtype=dtype, **options)
    if config.device_map is None:
        loaded.to(device)  # type: ignore[arg-type]
    if config.rope_dtype is not RopeDtype.bfloat16:  # which is what transformers does by itself
        set_rope_dtype(loaded, config.rope_dtype)
    return Subject(loaded.eval(), tokenizer)


def limit_of(hf_config: PretrainedConfig) -> int | None:
    """Tokens that a model's positions reach; None where there is no limit (no rotary embeddings, or none is named)."""
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return reach(text) if limit is not None and getattr(text, "rope_parameters", None) else limit


def check_reach(model: EvaluatedModel, limit: int | None, evaluator: Evaluator) -> None:
    """Raise UserError when an evaluation gives the model more tokens than its positions reach, which are `limit`."""
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
    """Where a model goes that is not spread over devices; `auto` is this process's GPU where there is one."""
    if config.device == "auto":
        cuda = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    try:
        return torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"device={config.device} is unknown: use cpu, cuda, cuda:1 or auto") from error


# -- attention --------------------------------------------------------------------------------------------------------


def attention_name(attention: str, rope_dtype: RopeDtype) -> str | None:
    """transformers' `attn_implementation` for an evaluation, registered; None leaves the choice to transformers.

    Args:
        attention: `auto`, one of `OURS`, or a name of transformers' own.
        rope_dtype: in which dtype the model rotates.
    """
    if attention in OURS:
        return _registered(attention)
    if rope_dtype is RopeDtype.bfloat16:
        return None if attention == "auto" else attention
    if attention not in ("auto", "sdpa"):
        raise UserError(
            f"attention={attention} with rope_dtype=float32 would meet queries in float32 beside other values: "
            f"use attention=sdpa or one of {', '.join(OURS)}"
        )
    return _registered("sdpa")


def _registered(attention: str) -> str:
    register()
    name = f"evaluated_{attention}"
    AttentionInterface.register(name, partial(_attend, attention))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def _attend(
    attention: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention contract: (B, H, T, D) in, ((B, T, Hq, D), no weights) out."""
    functions: dict[str, Callable[..., Any]] = ALL_ATTENTION_FUNCTIONS  # type: ignore[assignment]
    query, key, value = together(module, query, key, value)
    rows, _, length, _ = query.shape
    # As many queries as keys and no mask: a prompt from its first token on. One token is one that is generated.
    prompt = attention_mask is None and length == key.shape[2] and length > 1
    if attention not in OURS or not prompt:
        return functions["sdpa"](module, query, key, value, attention_mask, **kwargs)
    layouts = (PackedLayout((0, length)),) * rows
    return functions[attention](module, query, key, value, None, layouts=layouts, **kwargs)
