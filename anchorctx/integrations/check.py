"""Would this model's attention keep the documents of a flattened batch apart?"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from anchorctx.attention import BACKENDS
from anchorctx.attention.architecture import check_architecture
from anchorctx.attention.interface import check_interface, implementation
from anchorctx.attention.keywords import check_keywords
from anchorctx.attention.rope import LENGTH_BOUND
from anchorctx.errors import UserError
from anchorctx.integrations.decoder import ATTACHED

logger = logging.getLogger(__name__)

TRAINS_SINKS = "flash_attention_4"
"""transformers' flash attention that computes the gradient of attention sinks. FlashAttention-2 and -3 take no sinks,
and transformers then leaves them out without a word."""


def check_model(model: Any) -> None:
    """Raise UserError for a model that would mix the documents of an `AnchorCollator`'s batch.

    transformers' flash attention takes `cu_seq_lens_q` and `cu_seq_lens_k`, and so does `attn_implementation="anchor"`.
    Its sdpa, eager and flex_attention do not: they begin a new document wherever positions do not go up by 1 (which is
    behind each copy of the anchor, not in front of it), and none at all when the model also fills a KV cache.

    Args:
        model: a transformers model, also wrapped by PEFT or DistributedDataParallel.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UserError(f"model={model!r:.60} has no configuration to check: pass the transformers model itself")
    check_architecture(config)
    text = config.get_text_config()
    name = text._attn_implementation or "eager"
    anchors = {ATTACHED, *(implementation(backend) for backend in ("auto", *BACKENDS))}
    if "flash" not in name and name not in anchors:
        raise UserError(
            f"attn_implementation='{name}' would mix documents, since it does not read where they begin: load the "
            "model with 'flash_attention_2' on CUDA, or anywhere with 'anchor' after anchorctx.attention.register()"
        )
    inner = getattr(model, "module", model)
    check_interface(inner)
    if isinstance(inner, torch.nn.Module):
        check_keywords(inner)
    if "flash" in name and name != TRAINS_SINKS and _has_sinks(inner):
        raise UserError(
            f"attn_implementation='{name}' is not known to train attention sinks, which this model has: load the model "
            f"with 'anchor' after anchorctx.attention.register(), or with '{TRAINS_SINKS}'"
        )
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    # of each kind of layer, where they differ
    kinds = {kind.get("rope_type") for kind in (rope, *rope.values()) if isinstance(kind, dict)}
    if bound := kinds & set(LENGTH_BOUND):
        raise UserError(
            f"rope_type={bound.pop()} takes its angles from the longest position of a batch, so that a document's "
            "would depend on the others: use linear, yarn or llama3, or anchorctx train, which takes the row's"
        )


def warn_of_data_parallel() -> None:
    """Say so where Trainer would take several GPUs in one process."""
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        logger.warning(
            "%d GPUs and one process: Trainer would split batches by DataParallel, which cuts cu_seq_lens apart: "
            "start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU",
            torch.cuda.device_count(),
        )


def _has_sinks(model: Any) -> bool:
    parameters = getattr(model, "named_parameters", None)
    return parameters is not None and any(name.endswith("sinks") for name, _ in parameters())
