"""Where the documents of a flattened batch lie, of the boundaries that other trainers hand over."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

_from_cu_seq_lens: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Boundaries as a tensor, by identity, to (its version, as integers): all layers of a forward pass hand in the same."""


def layouts_of(name: str, batch: int, tokens: int, cu_seq_lens: torch.Tensor | None) -> tuple[PackedLayout]:
    """The layout of a flattened batch of `tokens` tokens, whose documents have the boundaries (0, ..., T).

    Args:
        name: who asks, in errors.
        batch: rows of the batch, of which there must be one.
        tokens: tokens of a row.
        cu_seq_lens: (N + 1,) integers, as transformers' flash attention takes them.

    Raises:
        UserError: no boundaries, or those of another batch.
    """
    if cu_seq_lens is None:
        raise UserError(
            f"{name} with attn_implementation='anchor' needs the forward argument layouts=, one a row, or "
            "cu_seq_lens_q= of a flattened batch: anchorctx.integrations.AnchorCollator makes such batches, and "
            "anchorctx.integrations.attach() reads those of other collators"
        )
    version = None if cu_seq_lens.is_inference() else cu_seq_lens._version  # a buffer may be filled anew
    known = _from_cu_seq_lens.get(cu_seq_lens)
    if known is None or known[0] != version:
        # documents of 3, 0 and 2 tokens, [0, 3, 3, 5]: flash kernels allow an empty one, a layout has none
        offsets = tuple(dict.fromkeys(cu_seq_lens.tolist()))
        known = _from_cu_seq_lens[cu_seq_lens] = (version, offsets)
    offsets = known[1]
    if batch != 1 or offsets[0] != 0 or offsets[-1] != tokens:
        raise UserError(
            f"{name} got cu_seq_lens_q from {offsets[0]} to {offsets[-1]} for {batch} rows of {tokens} tokens: "
            "hand over one flattened row, (1, T), with boundaries from 0 to T, and without DataParallel"
        )
    return (PackedLayout(offsets),)
