"""Weighted cross-entropy of hidden states, summed, without all logits at once: by tiles, by Liger, or by a model's own
forward; and plainly, with all of them, to compare with.

Shapes: N trained tokens, D hidden size, V vocabulary, L tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anchorctx.errors import UserError
from anchorctx.models.head import LogitTransform

TILE_BYTES = 64 * 2**20
"""A tile's float32 logits, unless a quarter of the head's float32 gradient, which exists anyway, is larger."""


def default_tile(vocabulary: int, hidden_size: int) -> int:
    """Tokens of a tile: its float32 logits take at most `TILE_BYTES` or a quarter of the head's float32 gradient."""
    return max(TILE_BYTES // (4 * vocabulary), hidden_size // 4, 1)


def tiled_loss(
    head: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    transform: LogitTransform,
    tile: int,
) -> torch.Tensor:
    """Of (N, D) hidden states, (N,) targets and weights: a scalar, float32 (float64 for a float64 model)."""
    loss = _TiledCrossEntropy.apply(
        hidden, head.weight, head.bias, targets, weights, transform, tile, torch.is_grad_enabled()
    )
    assert isinstance(loss, torch.Tensor)
    return loss


def own_loss(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    tile: int,
) -> torch.Tensor:
    """The same from a model's own code, `logits` of hidden states (L, D); each tile is computed again backward."""

    def part(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        found = logits(x)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return (F.cross_entropy(found, y, reduction="none") * w.to(found.dtype)).sum()

    # not slices, whose gradients would each be as long as all hidden states
    tiles = zip(hidden.split(tile), targets.split(tile), weights.split(tile), strict=True)
    parts = [checkpoint(part, *each, use_reentrant=False) for each in tiles]
    return torch.stack(parts).sum()


def whole_loss(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """Plain torch, (N, V) logits and their gradient in full."""
    logits = F.linear(hidden, head.weight, head.bias)
    logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return (F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()


def check_liger(name: str, transform: LogitTransform | None) -> None:
    """UserError when Liger's kernel is missing, or cannot compute the loss of the model called `name`."""
    try:
        import liger_kernel.transformers  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("loss=liger needs liger-kernel: pip install 'anchorctx[liger]', or use loss=tiled") from error
    if transform is None:
        raise UserError(f"loss=liger needs a linear head, but {name} computes its logits otherwise: use loss=tiled")
    if transform.scale != 1.0:
        raise UserError(f"loss=liger cannot scale logits, but the model does by {transform.scale:g}: use loss=tiled")


def liger_loss(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """Liger's fused linear cross-entropy, which knows no weights by token: all must be equal."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    if not len(targets):
        return hidden.float().sum()
    if weights.min() != weights.max():
        raise UserError("loss=liger needs one loss weight for all trained tokens, but they differ: use loss=tiled")
    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=transform.softcap)
    return fused(head.weight, hidden, targets, head.bias).float() * weights[0].float()


class _TiledCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head, summed; gradients are computed in the forward, tile by tile."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        transform: LogitTransform,
        tile_tokens: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        # needs_input_grad is true under no_grad as well, where the gradients would be computed for nothing.
        needed = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        grads = (
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=exact) if needed[1] else None,
            torch.zeros_like(bias, dtype=exact) if needed[2] and bias is not None else None,
        )
        for start in range(0, hidden.shape[0], tile_tokens):
            tile = slice(start, start + tile_tokens)
            x, y, w = hidden[tile], targets[tile], token_weights[tile].to(exact)
            logits = transform(F.linear(x, weight, bias).to(exact))  # (L, V)
            lse = logits.logsumexp(-1)
            # cross-entropy of one token: logsumexp(logits) - logits[target]
            loss += (w * (lse - logits.gather(1, y[:, None])[:, 0])).sum()
            if any(needed):
                _accumulate(grads, tile, x, weight, _logit_grad(logits, lse, y, w, transform).to(hidden.dtype))
        ctx.grads, ctx.dtypes = grads, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the tiled loss was differentiated twice: its gradients are kept for one backward")
        grads, ctx.grads = ctx.grads, None
        # The loss is a sum, so all gradients scale by the one that arrives from above (1 / the step's trained weight).
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None, None


def _logit_grad(
    logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """(L, V) gradient of the weighted cross-entropy with respect to the head's output."""
    # softmax(logits) - one_hot(target)
    grad = (logits - lse[:, None]).exp_()
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    return transform.backward(grad.mul_(weights[:, None]), logits)


def _accumulate(
    grads: tuple[torch.Tensor | None, ...], tile: slice, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> None:
    """Add a tile's share, given its (L, V) logit gradient, to the gradients of hidden, weight and bias."""
    if grads[0] is not None:
        grads[0][tile] = grad @ weight
    # addmm_ needs no (V, D) temporary, but takes one dtype only: for bfloat16 states the sum is float32.
    if grads[1] is not None and grads[1].dtype == x.dtype:
        grads[1].addmm_(grad.mT, x)
    elif grads[1] is not None:
        grads[1].add_(grad.mT @ x)
    if grads[2] is not None:
        grads[2].add_(grad.sum(0, dtype=grads[2].dtype))
