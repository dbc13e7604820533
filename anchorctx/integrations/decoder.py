"""The forward of an attached decoder: `integrations.attachment` puts it in the place of the model's own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorctx.attention.interface import implementation, register, together
from anchorctx.attention.keywords import kept
from anchorctx.errors import UserError
from anchorctx.integrations.documents import Boundaries, Laid, lay_out_spans
from anchorctx.layout import Pattern

logger = logging.getLogger(__name__)

MARK = "_anchorctx_attachment"
"""The attribute of a decoder that holds its `Attachment`."""
ATTACHED = "anchor_attached"
"""`attn_implementation` of an attached model: `anchor`, and in a forward pass with a KV cache transformers' sdpa."""
OF_THE_BATCH = (
    *("input_ids", "position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("seq_idx", "cache_position"),
    *("shift_labels", "loss_weights", "labels"),  # which the loss alone reads
)
"""Arguments that say how the trainer's batch lies, and so not how ours does."""
_caching: ContextVar[bool] = ContextVar("caching", default=False)
"""Does this thread run a forward pass with a KV cache? Another may train the same model meanwhile."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a decoder is attached."""

    anchor: int
    """Token id of the anchor."""
    ends: tuple[int, ...]
    """Of EOS."""
    pattern: Pattern | None
    """What documents see; None where batches are laid out already."""
    row_length: int
    """Positions of a row, the anchor's among them."""
    attention: str
    """`attn_implementation` before."""
    forward: Callable[..., Any] | None
    """The decoder's own forward, where it had one that was not its class's."""
    hook: RemovableHandle
    """Of the check on labels."""
    config: PretrainedConfig
    """Of the text model, whose `attn_implementation` is `ATTACHED`."""
    warned: set[str] = field(default_factory=set)
    """What the log has said already."""


def register_attached() -> None:
    """Make `ATTACHED` known to transformers; idempotent."""
    register()
    AttentionInterface.register(ATTACHED, _attached_attention)
    AttentionMaskInterface.register(ATTACHED, _attached_mask)


def attached_forward(decoder: Any, *args: Any, **kwargs: Any) -> Any:
    """The attached decoder's forward: the class's own, over a row in which each document has its copy of the anchor."""
    attachment: Attachment = getattr(decoder, MARK)
    forward = attachment.forward or partial(type(decoder).forward, decoder)
    inputs = dict(zip(_names(type(decoder)), args, strict=False)) | kwargs
    if any(inputs.get(name) is not None for name in ("cache", "past_key_values")):
        return _with_cache(decoder, forward, inputs)
    if attachment.config._attn_implementation != ATTACHED:
        raise UserError(
            f"{type(decoder).__name__} is attached, but its attention was set to "
            f"{attachment.config._attn_implementation!r} since, which would mix documents: call detach(model) before "
            "set_attn_implementation"
        )
    if inputs.get("layouts") is not None or attachment.pattern is None:
        return forward(**inputs)
    name = type(decoder).__name__
    given = {key: value for key, value in inputs.items() if key not in OF_THE_BATCH}
    ids = _checked(name, inputs.get("input_ids"), given)
    laid: Laid = _lay_out(name, inputs, attachment)  # type: ignore[call-arg]
    arrays = (laid.gather, laid.place, laid.layout.position_array())
    gather, place, positions = (torch.from_numpy(array).to(ids.device) for array in arrays)
    row = torch.cat([ids.new_full((1,), attachment.anchor), ids.reshape(-1)])[gather][None]
    given |= {"input_ids": row, "position_ids": positions[None], "layouts": (laid.layout,), "use_cache": False}
    output = forward(**kept(decoder, given))
    if len(ids) == 1 and np.array_equal(laid.place, np.arange(ids.numel())):
        return output  # each document has its anchor already: nothing moved
    return _handed_back(output, row.shape[1], place, ids.shape)


def _with_cache(decoder: Any, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """A step of `generate`, as a model does it that is not attached."""
    if torch.is_grad_enabled():
        raise UserError(
            f"{type(decoder).__name__} got a KV cache with gradients, which prefix tuning does: it cannot be attached "
            "(to generate, run it under torch.no_grad())"
        )
    if any(inputs.get(name) is not None for name in ("layouts", "cu_seq_lens_q")):
        raise UserError(
            f"{type(decoder).__name__} got a KV cache beside layouts= or cu_seq_lens_q=, but with a cache a row is one "
            "document: pass use_cache=False, or rows of one document each"
        )
    token = _caching.set(True)
    try:
        return forward(**inputs)
    finally:
        _caching.reset(token)


def _checked(name: str, ids: torch.Tensor | None, given: dict[str, Any]) -> torch.Tensor:
    """The ids; UserError for what cannot be laid out: embeddings, images, numbers beside the ids that nobody knows."""
    if ids is None:
        raise UserError(
            f"{name} got inputs_embeds without input_ids, in which no anchor can be put in front of documents: pass "
            "input_ids (prompt tuning and multimodal inputs cannot be attached)"
        )
    if ids.ndim != 2 or not ids.numel():
        raise UserError(
            f"{name} got input_ids of shape {tuple(ids.shape)}, but a batch is (B, T) with a token or more: drop empty "
            "batches, and give one sequence as (1, T)"
        )
    for key, value in given.items():
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, torch.Tensor) and part.ndim > 1 for part in parts):  # num_items_in_batch is a scalar
            what = "one a token" if getattr(value, "shape", ())[:2] == ids.shape else "beside input_ids"
            raise UserError(f"{name} got {key}, {what}, which attach cannot lay out: leave it out")
    return ids


@torch.compiler.disable  # integers on the CPU: torch.compile would trace numpy
def _lay_out(name: str, inputs: dict[str, Any], attachment: Attachment) -> Laid:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    spans = boundaries_of(inputs).spans(name, *ids.shape)
    if inputs.get("output_router_logits") and mask is not None and bool((mask > 1).any()):
        raise UserError(
            f"{name} would weigh tokens in its router loss by attention_mask, which numbers documents here: say where "
            "they begin by position_ids, or set output_router_logits=False"
        )
    first = ids.reshape(-1)[torch.from_numpy(spans[:, 0]).to(ids.device)].tolist()
    begins = [token == attachment.anchor for token in first]
    assert attachment.pattern is not None
    if not attachment.warned and inputs.get("cu_seq_lens_q") is None and len(spans) <= len(ids):
        _warn_of_joined(ids, mask, attachment)
    return lay_out_spans(spans, begins, tuple(ids.shape), attachment.pattern, attachment.row_length)


def _warn_of_joined(ids: torch.Tensor, mask: torch.Tensor | None, attachment: Attachment) -> None:
    """Say once that rows of one document each have, in their midst, tokens by which documents begin or end.

    A document [A, x, E] has none that another token follows; [A, x, E, A, y, E], two that were joined, has E and A.
    """
    marks = ids.new_tensor([attachment.anchor, *attachment.ends])
    among = torch.isin(ids, marks)
    joined = among[:, 1:-1] & ~among[:, 2:]
    if mask is not None:
        joined &= mask[:, 2:] != 0
    if rows := int(joined.any(1).sum()):
        attachment.warned.add("joined")
        logger.warning(
            "%d of %d rows hold BOS or EOS in their midst, and nothing but one document a row was said: unless these "
            "are turns of one conversation, have the trainer say where documents begin (in TRL packing_strategy='bfd' "
            "or 'bfd_split', not 'wrapped', which joins documents and keeps no boundaries)",
            rows,
            len(ids),
        )


def boundaries_of(inputs: Mapping[str, Any]) -> Boundaries:
    """Those among the arguments of a forward."""
    return Boundaries(*(inputs.get(name) for name in ("cu_seq_lens_q", "position_ids", "attention_mask")))


def _names(decoder: type) -> list[str]:
    """Of the arguments of its forward, in order."""
    return list(inspect.signature(decoder.forward).parameters)[1:]  # type: ignore[attr-defined]


def _handed_back(value: Any, tokens: int, place: torch.Tensor, shape: torch.Size) -> Any:
    """An output of the row, or whatever holds such outputs, for the trainer's tokens: (1, T', ...) -> (B, T, ...).

    Router logits, (T', E), become (B * T, E).
    """
    if isinstance(value, dict):  # a ModelOutput, whose attributes follow its items
        for name, item in list(value.items()):
            value[name] = _handed_back(item, tokens, place, shape)
        return value
    if isinstance(value, tuple):
        return tuple(_handed_back(item, tokens, place, shape) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape[:2] == (1, tokens):
        return value[0].index_select(0, place).unflatten(0, shape)
    return value.index_select(0, place) if value.shape[:1] == (tokens,) else value


def _attached_mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if _caching.get() else implementation()](*args, **kwargs)


def _attached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """With a KV cache sdpa, of queries and keys that were rotated in float32; it knows neither sinks nor soft caps."""
    if not _caching.get():
        return ALL_ATTENTION_FUNCTIONS[implementation()](module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} cannot generate while it is attached: call detach(model) first")
    query, key, value = together(module, query, key, value)
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, **kwargs)
