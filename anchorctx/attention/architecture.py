"""Does a decoder keep the documents of a packed row apart? One judgement, asked wherever a model enters.

`known_decoders.json` says which of transformers' decoders do, and why the others do not: each was run in float64, a
packed row against every document alone (`scripts/sweep_decoders.py`). Settings of a known decoder can still mix
documents (kinds of layers, chunks), so these are looked at first. A decoder that is not in the file is tried out, once
a process, on a tiny copy of its configuration (`attention.trial`).
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

DATA = Path(__file__).with_name("known_decoders.json")
SEPARATED = ("full_attention", "sliding_attention")
"""Kinds of layers that a layout separates."""
REASONS = {
    "state": "carries a state over the row (a recurrence or a convolution), which would mix packed documents",
    "own_attention": "computes attention by itself, not through transformers' interface, so that packed documents "
    "would see each other",
    "index": "chooses by an index over the row which tokens are seen, which would mix packed documents",
    "no_rope": "has no rotary position embeddings",
    "encoder": "has an encoder, or lets tokens see those behind them",
    "positions": "counts positions over the row and not from position_ids, so that documents would depend on their "
    "place in it",
    "bias": "adds a bias of its own to attention scores, which the layout's attention does not compute",
    "sinks": "has attention sinks, which no backend computes",
    "values": "has values of another head dimension than its keys, which no backend takes",
    "images": "takes no text without images or sound",
    "assistant": "drafts for another model and cannot be trained alone",
}
"""Why a decoder is refused, by the name that `known_decoders.json` uses, as the end of `model type x ...`."""
REMEDY = "use a RoPE decoder such as llama or qwen3"


@functools.cache
def known() -> tuple[frozenset[str], dict[str, str], str]:
    """(model types that are exact, the others with a name in `REASONS`, the version of transformers) as measured."""
    data = json.loads(DATA.read_text())
    refused = {name: reason for reason, names in data["refused"].items() for name in names}
    return frozenset(data["exact"]), refused, data["transformers"]


def check_architecture(config: PretrainedConfig, *, tokens: int | None = None) -> None:
    """UserError for a configuration whose model would mix the documents of a packed row, with the reason.

    Some microseconds for a known decoder; one that is not known is tried, about a second once a process.

    Args:
        config: of the model, or of the text model in it.
        tokens: of a forward pass, a row; None where it is not known yet.
    """
    reason = refusal(config)
    if reason is None and not is_known(config):
        reason = _tried(config)
    if reason is not None:
        raise UserError(f"model type {config.model_type} {reason}: {REMEDY}")
    limit = longest_pass(config)
    if tokens is not None and limit is not None and tokens > limit:
        raise UserError(
            f"model type {config.model_type} attends within chunks of the row, not of the document: hand over at most "
            f"{limit} tokens a forward pass, got {tokens}"
        )


def refusal(config: PretrainedConfig) -> str | None:
    """Why this decoder is refused, by what its configuration says and by what was measured; None where nothing does."""
    text = text_config(config)
    if text is None or config.is_encoder_decoder or getattr(config, "is_causal", True) is False:
        return REASONS["encoder"]
    other = sorted(set(_layer_types(text)) - set(SEPARATED))
    if other and not (other == ["chunked_attention"] and longest_pass(config) is not None):
        return f"has {other[0]} layers, which would mix packed documents"
    _, refused, _ = known()
    for name in (config.model_type, text.model_type):
        if name in refused:
            return REASONS[refused[name]]
    return None if has_rope(text) else REASONS["no_rope"]


def is_known(config: PretrainedConfig) -> bool:
    """Was this decoder measured, and exact?"""
    return config.model_type in known()[0]


def has_rope(config: PretrainedConfig) -> bool:
    """Does the text model rotate queries and keys? GPT-J's kind says so by `rotary_dim`, with fixed angles."""
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None))


def longest_pass(config: PretrainedConfig) -> int | None:
    """Tokens that a forward pass may hold where layers count tokens of the row (Llama 4's chunks and its scale)."""
    text = text_config(config)
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk is None:
        return None
    # its scale of layers without RoPE is 1 up to the token with index floor_scale - 2
    scaled = getattr(text, "attn_temperature_tuning", False)
    return min(chunk, text.floor_scale - 1) if scaled else chunk


def text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of the text model, `config` itself for most; None where there are several."""
    try:
        return config.get_text_config()
    except ValueError:  # an encoder and a decoder
        return None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []


_outcomes: dict[tuple[Any, ...], str | None] = {}
"""What came out of trials in this process."""


def _tried(config: PretrainedConfig) -> str | None:
    """Why an unknown decoder is refused after a trial, or None; the trial's own calls of a mask pass."""
    kind = (type(config), config.model_type, tuple(sorted(set(_layer_types(config)))))
    if kind not in _outcomes and not torch.compiler.is_compiling():
        from anchorctx.attention.trial import try_out

        _outcomes[kind] = None
        _outcomes[kind] = try_out(config)
    return _outcomes.get(kind)
