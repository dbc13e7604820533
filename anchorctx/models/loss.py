"""Causal language model loss, summed over trained tokens, that never holds a (T, V) logits tensor.

Only positions that predict a labelled token get logits, one tile of them at a time; each tile's gradients are taken
at once, so that its logits can be dropped. The head's gradient is summed over tiles in float32, and handed over once.

The computation runs *inside the head's own call* (`lm_head.forward` is replaced for its duration), so that everything
that hangs on module hooks holds: ZeRO-3 gathers the weight once forward and once backward, and its gradient hook fires
once. Per-tile checkpoints would gather it at every tile and sum tiles in bfloat16; DeepSpeed's TiledFusedLogitsLoss
runs the head's backward in the forward, where a later scaling of the loss no longer reaches it.

Losses beside the next token's, such as a router's (`output_router_logits`), are not computed: they are refused.

Shapes: B rows, T tokens, N trained tokens, D hidden size, V vocabulary, L tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from anchorctx.attention.rope import row_in_sight
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models.config import LossKind

IGNORE = -100
"""Target of a token whose prediction is not trained."""
TILE_BYTES = 64 * 2**20
"""A tile's float32 logits, unless a quarter of the head's float32 gradient, which exists anyway, is larger."""
KNOWN_LOGIT_FIELDS = {"final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping"}


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to the head's output: `softcap * tanh(scale * x / softcap)`, or `scale * x` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitTransform:
        """Read it from a transformers configuration; UserError for a field about logits that is not known here."""
        # Whatever has "logit" in its name may change the logits: set and not known here, it would make the loss wrong.
        about = {name for name in vars(config) if "logit" in name or "head_multiplier" in name}
        unknown = {name for name in about - KNOWN_LOGIT_FIELDS if getattr(config, name) not in (None, False, 1.0)}
        for name in sorted(unknown):
            raise UserError(
                f"{config.model_type} sets {name}={getattr(config, name)}, which the loss does not compute: "
                "unset it, or use another model"
            )
        scale, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The transformed logits; may change `logits` in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the head's output, given that for the `transformed` logits; in place on both."""
        if self.softcap is not None:
            # d/dx (c tanh(x / c)) = 1 - tanh(x / c)^2, and transformed / c is that tanh
            grad = grad.mul_(transformed.div_(self.softcap).square_().neg_().add_(1.0))
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


class CausalLMLoss(nn.Module):
    """A Hugging Face causal language model whose forward returns the summed loss of a packed batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tile_tokens: int | None = None,
        kind: LossKind = LossKind.tiled,
        row_length: int | None = None,
        saving: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`tile_tokens` is how many tokens' logits exist at once; None chooses it (see `TILE_BYTES`).

        `row_length` is the tokens of the rows that batches may be pieces of: some RoPE scalings depend on it
        (`attention.rope.row_in_sight`). The model (without the head) runs inside `saving()`, which may move what it
        keeps for the backward pass.
        """
        super().__init__()
        self.model, self.saving, self.row_length = model, saving, row_length
        self.transform = LogitTransform.of(model.config)
        self.tile_tokens = tile_tokens or default_tile(model.config.vocab_size, model.config.hidden_size)
        self.kind = kind
        if kind is LossKind.liger:
            _check_liger(self.transform)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layouts: tuple[PackedLayout, ...],
        targets: torch.Tensor,
        loss_weights: torch.Tensor | None = None,
        trained: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over trained tokens of weight times cross-entropy: a scalar, float32 (float64 for a float64 model).

        Args:
            input_ids, position_ids: (B, T) int64; with sequence parallelism a slice of the rows.
            layouts: one a row, of the whole rows.
            targets: (B, T) int64: the token that each token must predict, that is the next one; -100 is not trained.
            loss_weights: (B, T) float weight of each prediction; None is 1.
            trained: `trained_tokens(targets)`, where it is known: on a device it waits for the device.
        """
        if trained is None:
            trained = trained_tokens(targets)
        with self.saving(), row_in_sight(self.model, self.row_length):
            hidden = self.model.base_model(
                input_ids=input_ids, position_ids=position_ids, layouts=layouts, use_cache=False
            ).last_hidden_state  # (B, T, D)
        hidden, targets = (
            hidden.flatten(0, 1).index_select(0, trained),
            targets.flatten().index_select(0, trained),
        )  # (N, D), (N,)
        ones = torch.ones_like(targets, dtype=torch.float32)
        weights = ones if loss_weights is None else loss_weights.flatten().index_select(0, trained)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return call_as(head, self.head_loss, hidden, targets, weights)

    def head_loss(
        self, head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Summed loss of (N, D) hidden states against (N,) targets with (N,) weights."""
        if self.kind is LossKind.liger:
            return _liger_loss(head, hidden, targets, weights, self.transform)
        if self.kind is LossKind.whole:
            return _whole_loss(head, hidden, targets, weights, self.transform)
        loss = _TiledCrossEntropy.apply(
            hidden, head.weight, head.bias, targets, weights, self.transform, self.tile_tokens, torch.is_grad_enabled()
        )
        assert isinstance(loss, torch.Tensor)
        return loss


def trained_tokens(targets: torch.Tensor) -> torch.Tensor:
    """(N,) int64: which of the targets (B, T), flattened, are trained."""
    return (targets.flatten() != IGNORE).nonzero()[:, 0]


def default_tile(vocabulary: int, hidden_size: int) -> int:
    """Tokens of a tile: its float32 logits take at most `TILE_BYTES` or a quarter of the head's float32 gradient."""
    return max(TILE_BYTES // (4 * vocabulary), hidden_size // 4, 1)


def call_as(module: nn.Module, function: Callable[..., Any], *args: torch.Tensor) -> Any:
    """Call `module` with `function(module, *args)` in place of its forward: its hooks run around it."""
    # An instance attribute hides the class's forward; one that was there already (a wrapper) comes back afterwards.
    before = module.__dict__.get("forward")
    module.forward = lambda *inputs: function(module, *inputs)
    try:
        return module(*args)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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


def _whole_loss(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """Plain torch, (N, V) logits and their gradient in full."""
    logits = F.linear(hidden, head.weight, head.bias)
    logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return (F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()


def _check_liger(transform: LogitTransform) -> None:
    try:
        import liger_kernel.transformers  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("loss=liger needs liger-kernel: pip install 'anchorctx[liger]', or use loss=tiled") from error
    if transform.scale != 1.0:
        raise UserError(f"loss=liger cannot scale logits, but the model does by {transform.scale:g}: use loss=tiled")


def _liger_loss(
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
