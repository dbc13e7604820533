"""Sizes of models that recipes name, from their published config.json: a plan needs neither the hub nor an account."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, build_config
from anchorctx.models.load import check_weights, read_config, reason


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    } | more


KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, max_position_embeddings=8192),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "meta-llama/Llama-3.2-1B": _llama(
        2048, 8192, 16, 32, 8, 128256, max_position_embeddings=131072, head_dim=64, tie_word_embeddings=True
    ),
    "mistralai/Mistral-7B-v0.3": _llama(
        4096, 14336, 32, 32, 8, 32768, model_type="mistral", sliding_window=None, max_position_embeddings=32768
    ),
    "Qwen/Qwen2.5-1.5B": _llama(
        1536, 8960, 28, 12, 2, 151936, model_type="qwen2", max_position_embeddings=131072, tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-7B": _llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", max_position_embeddings=131072),
    "Qwen/Qwen3-8B": _llama(
        4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, max_position_embeddings=40960
    ),
}
"""By the name on the hub. RoPE settings are left out: they cost nothing."""


def planned_config(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration: from its folder, its fields, this list, or the hub.

    Raises:
        UserError: a model that none of them has; names the nearest in the list.
    """
    if model.path in KNOWN and not Path(model.path).exists():
        return build_config(replace(model, path=None, config=KNOWN[model.path]))
    if model.path is None:
        return build_config(model)
    try:
        read_config(model.path)
    except UserError as error:
        if Path(model.path).exists():
            raise
        near = difflib.get_close_matches(model.path, KNOWN, 1, cutoff=0.0)
        raise UserError(
            f"model.path={model.path} is not known to the planner, and no folder or hub gives its configuration "
            f"({reason(error.__cause__ or error, first=True)}): did you mean {near[0]}? Else give its sizes in "
            f"model.config; known are {', '.join(KNOWN)}"
        ) from error
    config = build_config(model)
    check_weights(model.path, config)
    return config
