"""Does a decoder keep the documents of a packed row apart? One judgement, asked wherever a model enters.

`known_decoders.json` says which of transformers' decoders do, and why the others do not: each was run in float64, a
packed row against every document alone (`scripts/sweep_decoders.py`). Settings of a known decoder can still mix
documents (kinds of layers, chunks), so these are looked at first. A decoder that is not in the file is tried out, once
a process, on a tiny copy of its configuration (`attention.trial`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

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
    "bias": "adds a bias of its own to attention scores, which the layout's attention does not compute",
    "part": "is a text model inside another, which transformers would not load again from a folder of its own",
    "assistant": "drafts for another model and cannot be trained alone",
}
"""Why a decoder is refused, by the name that `known_decoders.json` uses, as the end of `model type x ...`."""
REMEDY = "use a RoPE decoder such as llama or qwen3"


@functools.cache
def known() -> tuple[frozenset[str], dict[str, str], str]:
    """(model types that are exact, the others with a name in `REASONS`, the version of transformers) as measured."""
    data = json.loads(DATA.read_text())
    others = {name: reason for reason, names in data["refused"].items() for name in names}
    return frozenset(data["exact"]), others, data["transformers"]


def check_architecture(config: PretrainedConfig) -> None:
    """UserError for a configuration whose model would mix the documents of a packed row, with the reason.

    `config` is the model's, or that of the text model in it. Some microseconds for a known decoder; one that is not
    known is tried, about a second once a process.
    """
    reason = refusal(config)
    if reason is None and not is_known(config):
        reason = _tried(config, torch.compiler.is_compiling())
    if reason is not None:
        raise refused(config, reason)


def check_documents(config: PretrainedConfig, layouts: Sequence[PackedLayout]) -> None:
    """UserError for documents that are longer than the chunks of a model's layers, which no layout's attention makes.

    Up to there a document alone lies in one chunk, and is seen whole by every layer.
    """
    limit = longest_document(config)
    if limit is None:
        return
    longest = max(int(np.diff(layout.cu_seqlens_array()).max()) + layout.anchor_len for layout in layouts)
    if longest > limit:
        raise UserError(
            f"model type {config.model_type} attends in chunks, so that documents may have {limit} tokens with their "
            f"anchor, but one has {longest}: cut documents, or use a model without chunks"
        )


def refused(config: PretrainedConfig, reason: str) -> UserError:
    """The error of a decoder that is refused for a reason, which is the end of `model type x ...`."""
    return UserError(f"model type {config.model_type} {reason}: {REMEDY}")


def refusal(config: PretrainedConfig) -> str | None:
    """Why this decoder is refused, by what its configuration says and by what was measured; None where nothing does."""
    text = text_config(config)
    if text is None or config.is_encoder_decoder or not (_is_causal(config) and _is_causal(text)):
        return REASONS["encoder"]
    other = sorted(set(_layer_types(text)) - set(SEPARATED))
    if other and not (other == ["chunked_attention"] and longest_document(config) is not None):
        return f"has {other[0]} layers, which would mix packed documents"
    found = listed(config) or listed(text)
    if found is not None:
        return REASONS[found]
    if getattr(text, "alibi", False):  # Falcon-RW
        return REASONS["bias"]
    return None if has_rope(text) else REASONS["no_rope"]


def _is_causal(config: PretrainedConfig) -> bool:
    """Gemma's kind can be bidirectional (EmbeddingGemma); `vision`, among tokens of one image, leaves text causal."""
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    return getattr(config, "is_causal", True) is not False and bidirectional in (None, False, "vision")


def listed(config: PretrainedConfig) -> str | None:
    """The name in `REASONS` for which this model type was measured not to be exact; None for others."""
    return known()[1].get(config.model_type)


def is_known(config: PretrainedConfig) -> bool:
    """Was this decoder measured, and exact?"""
    return config.model_type in known()[0]


def has_rope(config: PretrainedConfig) -> bool:
    """Does the text model rotate queries and keys? GPT-J's kind says so by `rotary_dim`, with fixed angles."""
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None))


def longest_document(config: PretrainedConfig) -> int | None:
    """Tokens up to which a model with chunks attends to the whole document; None for one without."""
    text = text_config(config)
    chunk = getattr(text, "attention_chunk_size", None)
    # Llama 4 scales queries without RoPE by their index in the row, by 1 up to the index floor_scale - 2
    scaled = chunk is not None and getattr(text, "attn_temperature_tuning", False)
    return min(chunk, text.floor_scale - 1) if scaled else chunk  # type: ignore[union-attr]


def text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of the text model, `config` itself for most; None where there are several."""
    try:
        return config.get_text_config()
    except ValueError:  # an encoder and a decoder
        return None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []


_outcomes: dict[str, str | None] = {}
"""What came out of trials in this process, by the configuration."""
_trying: ContextVar[bool] = ContextVar("_trying", default=False)
NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Entries of a configuration that a trial does not depend on."""


@torch.compiler.assume_constant_result
def _tried(config: PretrainedConfig, compiling: bool) -> str | None:
    """Why an unknown decoder is refused after a trial, or None; the trial's own calls of a mask pass.

    While torch.compile traces a model, what is known of it is looked up, and nothing is tried.
    """
    if _trying.get():
        return None
    settings = repr({name: value for name, value in config.to_dict().items() if name not in NO_SETTINGS})
    key = f"{type(config).__module__}.{type(config).__qualname__}{settings}"
    if key not in _outcomes and not compiling:
        from anchorctx.attention.trial import try_out

        token = _trying.set(True)
        try:
            _outcomes[key] = try_out(config)
        finally:
            _trying.reset(token)
    return _outcomes.get(key)
