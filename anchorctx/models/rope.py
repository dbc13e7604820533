"""RoPE theta, scaling and maximum length through transformers' own configuration, and the lengths these reach."""

from __future__ import annotations

import logging
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from anchorctx.errors import UserError
from anchorctx.models.config import KEEPS, RopeConfig, RopeType
from anchorctx.settings import check_ranges

logger = logging.getLogger(__name__)

STRETCHED = ("linear", "dynamic", "yarn")
"""Scalings that reach `factor` times the original length and no further (Llama 3.1 itself exceeds that for llama3)."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's own
FULL = "full_attention"


def check_length(config: PretrainedConfig, tokens: int) -> None:
    """UserError when rows of `tokens` tokens have positions that the RoPE settings do not reach."""
    limit = reach(config)
    if tokens > limit:
        raise UserError(
            f"row length {tokens} exceeds the {limit} positions that the RoPE settings of {config.model_type} reach: "
            "raise model.max_length together with model.rope.theta or model.rope.factor, or pack shorter rows"
        )


def reach(config: PretrainedConfig) -> int:
    """Tokens that the RoPE settings reach: `max_position_embeddings`, or what a stretched original length allows."""
    # Llama of 4,096 tokens with yarn and factor 4: min(max_position_embeddings, 4096 * 4) = 16,384
    limit: int = config.get_text_config().max_position_embeddings
    rope = full_parameters(config)
    if rope.get("rope_type") == "dynamic":  # transformers keeps the original length in max_position_embeddings here
        return int(limit * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return min(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


def full_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """transformers' `rope_parameters` of the layers that see the whole row; the dictionary itself, not a copy.

    Empty where these have fixed angles (GPT-J, CodeGen) or do not rotate (BEAM).
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return (parameters[FULL] or {}) if FULL in parameters else parameters


def apply_rope(config: PretrainedConfig, rope: RopeConfig, max_length: int | None, *, trained: bool) -> None:
    """Write `rope` and `max_length` into `config`, in place, so that model and export use them.

    `trained` says that weights come with the configuration: raising their length then needs a change of RoPE. Where
    text is one part of a model, the settings are the text model's.
    """
    _check(rope, max_length)
    config = config.get_text_config()
    length: int = config.max_position_embeddings
    changed = rope.type is not None or rope.theta is not None or rope.factor is not None or bool(rope.extra)
    fixed = not full_parameters(config)
    if fixed and (changed or (trained and max_length is not None and max_length > length)):
        raise UserError(
            f"model type {config.model_type} has no RoPE settings that could be changed: leave model.rope as it is and "
            f"model.max_length at {length}, or use another model"
        )
    if trained and max_length is not None and max_length > reach(config) and not changed:
        raise UserError(
            f"model.max_length={max_length} exceeds the {reach(config)} positions that the checkpoint's RoPE settings "
            "reach: set model.rope.theta (the paper's: 1e6 at 16K, 5e6 at 64K) or model.rope.type and model.rope.factor"
        )
    if changed:
        _write(config, rope, length)
    _write_length(config, rope, max_length)
    if fixed:
        return
    # fills in what transformers derives itself, so that model and export read one complete dictionary
    config.standardize_rope_params()
    try:
        config.validate_rope()
    except (ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise UserError(f"{config.model_type} does not take these model.rope settings: {reason}") from error


def _check(rope: RopeConfig, max_length: int | None) -> None:
    check_ranges(rope, "model.rope")
    if max_length is not None and max_length < 1:
        raise UserError(f"model.max_length={max_length} must be at least 1: {KEEPS}")
    if rope.type is not None and rope.type is not RopeType.default and rope.factor is None:
        raise UserError(f"model.rope.type={rope.type.value} needs model.rope.factor: give new length / original length")
    if rope.type is RopeType.default and rope.factor is not None:
        raise UserError(f"model.rope.factor={rope.factor} has no effect with model.rope.type=default: remove one")


def _write(config: PretrainedConfig, rope: RopeConfig, length: int) -> None:
    parameters = full_parameters(config)
    if rope.type is not None:
        kept = {k: parameters[k] for k in ("rope_theta", "partial_rotary_factor") if parameters.get(k) is not None}
        original = rope.original_max_position_embeddings or parameters.get("original_max_position_embeddings") or length
        # Another type keeps nothing of the old one's settings but theta and the rotated share of each head.
        parameters.clear()
        parameters |= kept | {"rope_type": rope.type.value} | _scaling(rope, original)
        if hasattr(config, "original_max_position_embeddings"):  # Phi 3 keeps it outside, and that one wins
            config.original_max_position_embeddings = original
    elif rope.factor is not None:
        if parameters.get("rope_type", "default") == "default":
            raise UserError(f"model.rope.factor={rope.factor} needs model.rope.type: linear, dynamic, yarn or llama3")
        parameters["factor"] = rope.factor
    if rope.theta is not None:
        _write_layer_thetas(config, parameters.get("rope_theta"), rope.theta)
        parameters["rope_theta"] = rope.theta
    _write_extra(config, parameters, rope.extra)


def _write_layer_thetas(config: PretrainedConfig, old: float | None, new: float) -> None:
    """Granite's SWA models name each layer's theta beside the model's (0 is no rotation), and that one wins."""
    # [1e4, 0, 1e6] with a model's theta of 1e6 becomes [1e4, 0, new]
    if thetas := getattr(config, "layer_rope_theta", None):
        config.layer_rope_theta = [new if theta == old else theta for theta in thetas]


def _scaling(rope: RopeConfig, original: int) -> dict[str, Any]:
    if rope.type is RopeType.default:
        return {}
    scaling: dict[str, Any] = {"factor": rope.factor}
    if rope.type in (RopeType.yarn, RopeType.llama3):
        scaling["original_max_position_embeddings"] = original
    return scaling | (LLAMA3 if rope.type is RopeType.llama3 else {})


def _write_extra(config: PretrainedConfig, parameters: dict[str, Any], extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if not isinstance(value, dict):
            parameters[name] = value
        elif isinstance(config.rope_parameters.get(name), dict):
            config.rope_parameters[name] |= value
        else:
            raise UserError(
                f"model.rope.extra.{name} is a dictionary, but {config.model_type} has no RoPE settings for layers of "
                "that name: give plain values, or the name of one of its layer types"
            )


def _write_length(config: PretrainedConfig, rope: RopeConfig, max_length: int | None) -> None:
    """`max_position_embeddings`, except under dynamic scaling, whose original length transformers keeps there."""
    parameters = full_parameters(config)
    kind = parameters.get("rope_type", "default")
    original = rope.original_max_position_embeddings or parameters.get("original_max_position_embeddings")
    original = original or config.max_position_embeddings
    if rope.type is not None and kind in STRETCHED:
        longest = int(original * parameters["factor"])
        if max_length is not None and max_length > longest:
            raise UserError(
                f"model.max_length={max_length} exceeds the {longest} positions that {kind} scaling of {original} by "
                f"{parameters['factor']:g} reaches: raise model.rope.factor to {math.ceil(max_length / original)}"
            )
        max_length = max_length or longest
    elif kind in STRETCHED and max_length is not None and max_length > int(original * parameters.get("factor", 1)):
        logger.warning(
            "model.max_length=%d is beyond the %d positions that the checkpoint's %s scaling of %d by %g reaches: the "
            "ones behind are learnt with the new theta alone, or set model.rope.type=%s and model.rope.factor=%d",
            *(max_length, original * parameters["factor"], kind, original, parameters["factor"]),
            *(kind, math.ceil(max_length / original)),
        )
    if kind == "dynamic":
        config.max_position_embeddings = original
    elif max_length is not None:
        config.max_position_embeddings = max_length
