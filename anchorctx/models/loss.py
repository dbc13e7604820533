"""Causal language model loss, summed over trained tokens, that never holds a (T, V) logits tensor.

Only positions that predict a labelled token get logits, one tile of them at a time; each tile's gradients are taken
at once, so that its logits can be dropped. The head's gradient is summed over tiles in float32, and handed over once.

The computation runs *inside the head's own call* (`lm_head.forward` is replaced for its duration), so that everything
that hangs on module hooks holds: ZeRO-3 gathers the weight once forward and once backward, and its gradient hook fires
once. Per-tile checkpoints would gather it at every tile and sum tiles in bfloat16; DeepSpeed's TiledFusedLogitsLoss
runs the head's backward in the forward, where a later scaling of the loss no longer reaches it.

Where a model's logits are more than a linear head's, scaled or capped (`models.head`), its own forward makes them, tile
by tile. Of losses beside the next token's, a router's is computed (`models.router`), and any other refused.

Shapes: B rows, T tokens, N trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from anchorctx.attention.rope import row_in_sight
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models.config import LossKind
from anchorctx.models.cross_entropy import check_liger, default_tile, liger_loss, own_loss, tiled_loss, whole_loss
from anchorctx.models.head import Parts, Tail, linear_transform
from anchorctx.models.router import Routed, added_loss

IGNORE = -100
"""Target of a token whose prediction is not trained."""


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
        """`tile_tokens` is how many tokens' logits exist at once; None chooses it (`cross_entropy.default_tile`).

        `row_length` is the tokens of the rows that batches may be pieces of: some RoPE scalings depend on it
        (`attention.rope.row_in_sight`). The model (without the head) runs inside `saving()`, which may move what it
        keeps for the backward pass.

        Raises:
            UserError: a model whose loss is not known here, or that `kind` cannot compute.
        """
        super().__init__()
        self.model, self.saving, self.row_length = model, saving, row_length
        self.transform, self.router = linear_transform(model), added_loss(model)
        self.routed: Routed | None = None
        """What the routers did in the last forward pass in training mode, where the model has a router's loss."""
        text = model.config.get_text_config()
        self.tile_tokens = tile_tokens or default_tile(text.vocab_size, text.hidden_size)
        self.kind = kind
        if kind is LossKind.liger:
            check_liger(type(model).__name__, self.transform)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layouts: tuple[PackedLayout, ...],
        targets: torch.Tensor,
        loss_weights: torch.Tensor | None = None,
        trained: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over trained tokens of weight times cross-entropy: a scalar, float32 (float64 for a float64 model).

        A router's loss is not in it: it needs the whole step's `routed`.

        Args:
            input_ids, position_ids: (B, T) int64; with sequence parallelism a slice of the rows.
            layouts: one a row, of the whole rows.
            targets: (B, T) int64: the token that each token must predict, that is the next one; -100 is not trained.
            loss_weights: (B, T) float weight of each prediction; None is 1.
            trained: `trained_tokens(targets)`, where it is known: on a device it waits for the device.
            counted: (B, T) bool: the tokens that `routed` sums over; None is all of them.
        """
        if trained is None:
            trained = trained_tokens(targets)
        routing = {"output_router_logits": True} if self.router and self.training else {}
        with self.saving(), row_in_sight(self.model, self.row_length):
            body = Parts.of(self.model).base(
                input_ids=input_ids, position_ids=position_ids, layouts=layouts, use_cache=False, **routing
            )
        if routing and self.router:
            if not body.router_logits:
                raise UserError(
                    f"{type(self.model).__name__} has no router whose loss could be computed: set "
                    "output_router_logits=false in its configuration"
                )
            counted = torch.ones_like(input_ids, dtype=torch.bool) if counted is None else counted
            self.routed = self.router.sums(body.router_logits, counted.flatten())
        hidden = body.last_hidden_state.flatten(0, 1).index_select(0, trained)  # (N, D)
        del body  # as large as what was picked from it
        targets = targets.flatten().index_select(0, trained)  # (N,)
        ones = torch.ones_like(targets, dtype=torch.float32)
        weights = ones if loss_weights is None else loss_weights.flatten().index_select(0, trained)
        return self.token_loss(hidden, targets, weights)

    def token_loss(self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Summed loss of (N, D) hidden states against (N,) targets with (N,) weights."""
        if self.transform is None:
            tile = self.tile_tokens if self.kind is LossKind.tiled else max(len(targets), 1)
            return own_loss(Tail(self.model), hidden, targets, weights, tile)
        return call_as(Parts.of(self.model).head, self._head_loss, hidden, targets, weights)

    def _head_loss(
        self, head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert self.transform is not None
        if self.kind is LossKind.liger:
            return liger_loss(head, hidden, targets, weights, self.transform)
        if self.kind is LossKind.whole:
            return whole_loss(head, hidden, targets, weights, self.transform)
        return tiled_loss(head, hidden, targets, weights, self.transform, self.tile_tokens)


def check_loss(model: PreTrainedModel, *, sharded: bool) -> None:
    """UserError for a model whose loss cannot be computed; `sharded`: does each process hold a part of every weight?"""
    if sharded and linear_transform(model) is None:
        raise UserError(
            f"{type(model).__name__} computes its logits by more than a linear head, in tiles that would each gather "
            "weights from all processes, which have unequal numbers of them: use parallel.zero_stage=2"
        )
    added_loss(model)


def trained_tokens(targets: torch.Tensor) -> torch.Tensor:
    """(N,) int64: which of the targets (B, T), flattened, are trained."""
    return (targets.flatten() != IGNORE).nonzero()[:, 0]


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
