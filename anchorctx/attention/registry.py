"""The attention backends, what each can do, and `attend`, the one function that calls them.

An explicit request never falls back: a backend that cannot serve a call raises and names what is missing. `auto`
says in the log what it chose and why.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from anchorctx.attention import flex
from anchorctx.attention.documents import document_attention
from anchorctx.attention.kernels import flash_attn, torch_varlen
from anchorctx.attention.kernels.base import Kernel, Score
from anchorctx.attention.kernels.cpu import CpuKernel
from anchorctx.attention.merge import anchor_attention
from anchorctx.attention.reference import reference_attention
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout

logger = logging.getLogger(__name__)

ANY_FLOAT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


class Attend(Protocol):
    """What a backend does."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layouts: Sequence[PackedLayout],
        score: Score,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend`, of documents that lie together."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of `attend` and the calls that it can serve."""

    name: str
    attend: Attend
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    softcap: bool = False
    max_head_dim: int | None = None
    missing: Callable[[], str | None] = lambda: None
    """What is not installed here, as the end of a sentence; None when the backend can be called."""
    limits: Callable[[torch.Tensor, Score], str | None] = lambda query, score: None
    """What an installed backend cannot do of this call, as the end of a sentence; None when it can serve it."""

    def refusal(self, query: torch.Tensor, score: Score) -> str | None:
        """Why this backend cannot serve the call, or None."""
        if query.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, but the tensors are on {query.device.type}"
        if query.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {names}, but the tensors are {str(query.dtype).removeprefix('torch.')}"
        if score.softcap is not None and not self.softcap:
            return f"cannot soft-cap scores, but the model asks for softcap={score.softcap}"
        if self.max_head_dim is not None and query.shape[-1] > self.max_head_dim:
            return f"takes head dimensions up to {self.max_head_dim}, but the model's is {query.shape[-1]}"
        return self.missing() or self.limits(query, score)


def kernel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    kernel: Kernel,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), documents together -> (B, Hq, T, Dv).

    Differentiable once. By the kernel alone, or merged with the anchor where the layouts share one; then the sinks
    (Hq,), if there are any.
    """
    path = anchor_attention if layouts[0].anchor_len else document_attention
    return path(query, key, value, layouts, score, kernel, sinks=sinks)


def _by(kernel: Kernel) -> Attend:
    return functools.partial(kernel_attention, kernel=kernel)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "flash_attn",
            _by(flash_attn.FlashAttnKernel()),
            "flash-attn's varlen kernels: FA2, FA3 or FA4, whichever is installed",
            ("cuda",),
            HALF,
            softcap=True,
            max_head_dim=256,
            missing=flash_attn.missing,
            limits=flash_attn.limits,
        ),
        Backend(
            "torch_varlen",
            _by(torch_varlen.TorchVarlenKernel()),
            "torch's built-in CUDA flash attention; nothing to install",
            ("cuda",),
            HALF,
            max_head_dim=256,
            missing=torch_varlen.missing,
        ),
        Backend(
            "cpu",
            _by(CpuKernel()),
            "torch's CPU flash attention, a call for each run of equally long documents",
            ("cpu",),
            ANY_FLOAT,
        ),
        Backend(
            "flex",
            flex.flex_attention,
            "FlexAttention with a cached block mask",
            ("cuda",),
            (torch.float32, *HALF),
            softcap=True,
        ),
        Backend(
            "reference",
            reference_attention,
            "dense masked softmax, quadratic in memory",
            ("cpu", "cuda"),
            ANY_FLOAT,
            True,
        ),
    )
}
"""In the order in which `auto` tries them."""


def choose(name: str, query: torch.Tensor, score: Score) -> Backend:
    """The backend called `name`, or for `auto` the first that can serve the call.

    Raises BackendUnavailableError, with the reason and the backends that would do.
    """
    refusals = {backend.name: backend.refusal(query, score) for backend in BACKENDS.values()}
    if name == "auto":
        for backend in BACKENDS.values():
            if refusals[backend.name] is None:
                _log_choice(backend.name, tuple((n, r) for n, r in refusals.items() if r))
                return backend
        raise BackendUnavailableError(f"no attention backend serves this call: {_join(refusals)}")
    if name not in BACKENDS:
        raise BackendUnavailableError(f"unknown attention backend '{name}': choose auto, {', '.join(BACKENDS)}")
    if refusals[name] is not None:
        usable = [n for n, refusal in refusals.items() if refusal is None]
        hint = f"use attention={usable[0]}" if usable else "no other backend serves this call either"
        raise BackendUnavailableError(f"attention backend '{name}' {refusals[name]}: {hint}")
    return BACKENDS[name]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention under packed layouts: each token sees the anchor and the earlier tokens of its own document.

    The anchor is shared by the row (`anchor_len`), or each document has its own copy (`PackedLayout.with_copies`): the
    same numbers. With copies a kernel attends within documents and nothing else happens; a shared anchor is merged in
    (`attention.merge` says when that is the better way).

    Args:
        query: (B, Hq, T, D), rotated already.
        key: (B, Hkv, T, D) with Hq a multiple of Hkv; the dtype of `query`.
        value: (B, Hkv, T, Dv), where Dv may differ from D, as in multi-head latent attention; the dtype of `query`.
            `reference` and `flex` take such values as they are, the others fill up with zeros to the larger dimension.
        layouts: one a row; all must share one `anchor_len`. Interleaved documents (`doc_ids`) are allowed.
        scale: factor on the scores; None is `D ** -0.5`.
        window: sliding window in tokens of the document; None is no window. A shared anchor stays always visible; a
            copy is the document's first token, which later tokens no longer see.
        softcap: `softcap * tanh(score / softcap)` in place of the score (Gemma 2). None is off.
        sinks: (Hq,), of any float dtype: a logit a head that takes its share of each softmax and has no value, as in
            gpt-oss; its gradient comes in its dtype. None is none.
        backend: `auto` or a name in `BACKENDS`.

    Returns:
        (B, Hq, T, Dv), laid out in memory as (B, T, Hq, Dv) if `query` is, as behind a projection. Differentiable once.

    Raises:
        ValueError: shapes or layouts that do not agree.
        BackendUnavailableError: the backend cannot serve this call here.
    """
    layouts = tuple(layouts)
    _check(query, key, value, layouts)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks.shape)} must hold one logit for each of {query.shape[1]} query heads")
    anchor = max(max(layout.anchor_len, layout.copies) for layout in layouts)
    if window is not None and window < max(anchor, 1):
        raise ValueError(f"a window of {window} tokens must hold the anchor, which is {anchor} tokens long")
    score = Score(query.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    chosen = choose(backend, max(query, value, key=lambda x: x.shape[-1]), score)
    grouped = tuple(layout.by_document() for layout in layouts)
    if all(layout.together for layout in layouts):
        return chosen.attend(query, key, value, grouped, score, sinks=sinks)
    orders = _orders if type(query) is torch.Tensor else _orders.__wrapped__  # no FakeTensor is kept for later calls
    order, back = orders(layouts, query.device)
    # Kernels take documents that lie together: gather them, attend, and put every token back.
    query, key, value = (_reorder(x, order) for x in (query, key, value))
    out = chosen.attend(query, key, value, grouped, score, sinks=sinks)
    return _reorder(out, back)


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same
def _orders(layouts: tuple[PackedLayout, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) int64: the order that has documents together, and the one that undoes it."""
    with torch.inference_mode(False):  # a kept inference tensor could not be saved for a later backward
        # segments of documents A, B, A with 2, 2 and 1 tokens: order = [0, 1, 4, 2, 3], undone by [0, 1, 3, 4, 2]
        order = torch.stack([torch.from_numpy(layout.order_array()) for layout in layouts]).to(device)
        return order, torch.argsort(order, dim=1)


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(2, order[:, None, :, None].expand(x.shape))


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layouts: tuple[PackedLayout, ...]) -> None:
    batch, heads, tokens, dim = query.shape
    if key.shape[:3] != value.shape[:3] or (key.shape[0], *key.shape[2:]) != (batch, tokens, dim):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be (B, H, T, D) "
            "and agree in B and T, and query and key in D"
        )
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads must be a multiple of {key.shape[1]} key heads")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query {query.dtype}, key {key.dtype} and value {value.dtype} must have one dtype")
    if [layout.length for layout in layouts] != [tokens] * batch:
        lengths = [layout.length for layout in layouts]
        raise ValueError(f"{batch} rows of {tokens} tokens need as many layouts of that length, got {lengths}")
    if len({layout.anchor_len for layout in layouts}) > 1:
        raise ValueError(f"rows of a batch must share one anchor_len, got {[x.anchor_len for x in layouts]}")


@functools.lru_cache(maxsize=32)
def _log_choice(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{other} {reason}" for other, reason in refused)
    logger.info("attention backend: %s (%s)", name, f"others: {reasons}" if reasons else "first choice")


def _join(refusals: dict[str, str | None]) -> str:
    return "; ".join(f"{name} {refusal}" for name, refusal in refusals.items())
