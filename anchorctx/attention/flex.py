"""FlexAttention under packed layouts: torch compiles one kernel from a mask function and a cached block mask.

A second implementation that shares nothing with the merge of `attention.merge`: the anchor is part of the mask. It
takes float32 on CUDA, soft-capping and any head dimension. The block mask, which tells the kernel which blocks of keys
a block of queries must read, is computed from the layout's boundaries in numpy; no T x T mask exists at any time.
Attention sinks scale the output within the compiled function, and autograd takes their gradient by the log-sum-exp.

Where torch would give up compiling, after `COMPILATIONS` kinds of call or because its compiler is switched off, it
would go on with dense scores, without a word: that is an error here.

On a CPU FlexAttention has no backward pass: tensors there that require gradients are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from anchorctx.attention.kernels.base import Score
from anchorctx.attention.kernels.varlen import uncached_under_fake
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout

BLOCK = 128
"""Tokens of a block of queries or keys, at least."""
MAX_BLOCKS = 2048
"""Blocks in a row, at most: torch holds four integers per pair of blocks, so longer rows get larger blocks."""
COMPILATIONS = 64
"""Kinds of call that are compiled, at most; torch's own limit is 8. Lengths, batch sizes and masks need one kernel
between them once two of each were seen; dtype, heads, head dimension, soft-capping, an anchor and gradients tell kinds
apart."""
MASKS = 4
"""Block masks that are kept: all layers of a pass need one, or two where some have windows. One of a long row is 67 MB
(four tables of `MAX_BLOCKS` x `MAX_BLOCKS` integers)."""
NO_CPU_BACKWARD = "FlexAttention computes no gradients on a CPU: use attention=cpu, or detached tensors"


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), documents together -> (B, Hq, T, Dv).

    Differentiable on CUDA. `sinks`: (Hq,), or None.

    Raises:
        BackendUnavailableError: a tensor on a CPU requires gradients (torch refuses it even under `no_grad`), or
            torch compiles no more.
    """
    if query.device.type == "cpu" and any(x.requires_grad for x in (query, key, value)):
        raise BackendUnavailableError(NO_CPU_BACKWARD)
    return _call(
        query,
        key,
        value,
        sinks,
        score_mod=None if score.softcap is None else _softcap(score.softcap),
        block_mask=block_mask(layouts, query.device, score.window),
        scale=score.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def block_mask(layouts: Sequence[PackedLayout], device: torch.device, window: int | None = None) -> BlockMask:
    """The batch's block mask, (B, 1, T, T); cached per layouts, device and window.

    Layouts must have their documents together (`PackedLayout.by_document`) and share one anchor length.
    """
    return uncached_under_fake(_block_mask)(tuple(layouts), device, window)


@functools.lru_cache(maxsize=MASKS)
def _block_mask(layouts: tuple[PackedLayout, ...], device: torch.device, window: int | None) -> BlockMask:
    anchor, length = layouts[0].anchor_len, layouts[0].length
    block = block_size(length)
    first = np.stack([first_keys(layout, window) for layout in layouts])
    parts = [part for kind in _visible_blocks(first, anchor, block) for part in _as_lists(kind)]
    with torch.inference_mode(False):  # cached, and a later backward could not save an inference tensor
        counts, indices, full_counts, full_indices = (torch.tensor(x).to(device).unsqueeze(1) for x in parts)
        mask = _mask(torch.tensor(first).to(device), anchor)
        return BlockMask.from_kv_blocks(
            counts, indices, full_counts, full_indices, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(length, length)
        )


def block_size(length: int) -> int:
    """Tokens of a block in a row of `length` tokens: 128, doubled until at most `MAX_BLOCKS` blocks cover the row."""
    block = BLOCK
    while -(-length // block) > MAX_BLOCKS:
        block *= 2
    return block


def first_keys(layout: PackedLayout, window: int | None) -> np.ndarray:
    """(T,) int32: the first token of its own document that each token sees; it grows along the row."""
    # documents of 2, 4, 3: offsets = [0, 2, 6, 9], starts = [0, 0, 2, 2, 2, 2, 6, 6, 6]; in a window of 3
    # token 5 no longer sees token 2: [0, 0, 2, 2, 2, 3, 6, 6, 6]
    offsets = layout.doc_offsets
    starts = np.repeat(offsets[:-1], np.diff(offsets))
    if window is not None:
        windowed = np.maximum(starts, np.arange(layout.length) - window + 1)
        documents = slice(layout.anchor_len, None)  # no window hides the anchor, not from itself either
        starts[documents] = windowed[documents]
    return starts.astype(np.int32)


def _mask(first: torch.Tensor, anchor: int) -> Callable[..., torch.Tensor]:
    """The mask function: `first` (B, T) is `first_keys` of each row."""

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & ((k >= first[b, q]) | (k < anchor))

    return mask


def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return capped


def _visible_blocks(first: np.ndarray, anchor: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(partial, full), each (B, n, n) bool over blocks of queries and of keys, from `first_keys` (B, T).

    A block is full when each of its queries sees each of its keys, so that no mask is computed there. A block that
    holds the anchor's last token and others counts as partial even if it could be full: slower, never wrong.
    """
    # the row above, its first document the anchor (2 tokens), in blocks of 3: begins = [0, 3, 6], ends = [3, 6, 9],
    # earliest = [0, 2, 6], latest = [2, 2, 6]; the last block sees itself and the anchor's block, not the second
    length = first.shape[1]
    begins = np.arange(0, length, block)
    ends = np.minimum(begins + block, length)
    earliest, latest = first[:, begins, None], first[:, ends - 1, None]  # (B, n, 1): of a block's first and last query
    earlier = begins[None, :] < begins[:, None]  # (n, n): keys before all of the block's queries
    visible = (earlier | np.eye(len(begins), dtype=bool)) & ((ends > earliest) | (begins < anchor))
    full = earlier & ((begins >= latest) | (ends <= anchor))
    return visible & ~full, full


def _as_lists(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, n, n) bool -> the number (B, n) and the indices (B, n, n) of each query block's key blocks, int32.

    In C order: the compiled kernels read them as contiguous, and another order gives wrong numbers, silently.
    """
    # a query block that sees key blocks [True, False, True]: counts 2, indices [0, 2, 1], of which the first 2 are read
    counts = blocks.sum(-1, dtype=np.int32)
    indices = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    return np.ascontiguousarray(counts), np.ascontiguousarray(indices)


def _call(*tensors: Any, **arguments: Any) -> torch.Tensor:
    """The compiled kernel, or an error: never torch's dense scores."""
    from torch._dynamo import config, exc  # seconds, for those who compile

    try:
        with config.patch(recompile_limit=COMPILATIONS):
            return _compiled()(*tensors, **arguments)
    except exc.FailOnRecompileLimitHit as error:
        raise BackendUnavailableError(
            f"FlexAttention was compiled for {COMPILATIONS} kinds of call, and the next would run dense and slow: use "
            "attention=auto, or a process for each model"
        ) from error


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    """One compiled function for all calls; compiling takes seconds, once per kind of call."""
    return torch.compile(_attend, fullgraph=True)


def _attend(*tensors: Any, **arguments: Any) -> torch.Tensor:
    """torch's FlexAttention, in a function of its own: torch counts compilations by function, for all who call it."""
    if not torch.compiler.is_dynamo_compiling():
        raise BackendUnavailableError(
            "FlexAttention runs dense and slow where torch.compile does not compile it (TORCHDYNAMO_DISABLE, or "
            "torch.compiler.set_stance): switch the compiler on, or use attention=auto"
        )
    return _with_sinks(*tensors, **arguments)


def _with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, **arguments: Any
) -> torch.Tensor:
    if sinks is None:
        return torch_flex_attention(query, key, value, **arguments)  # type: ignore[return-value]
    out, (lse, _) = torch_flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **arguments)
    assert lse is not None
    # what a sink leaves to the keys: exp(lse) / (exp(lse) + exp(sink))
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)
