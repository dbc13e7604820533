"""A batch's slice for one process of a sequence-parallel group: no communication, no state.

Every process of a group reads the same long document. Each token comes with its target, so that a slice's last token
still predicts the next slice's first. It is padded to a multiple of the group with untrained tokens, which form one
more document: nothing that is trained sees them.

Shapes: B rows, T tokens, S = padded T / processes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from anchorctx.layout import PackedLayout
from anchorctx.models.loss import IGNORE, trained_tokens
from anchorctx.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process computes of a batch; the fields are the arguments of `CausalLMLoss`."""

    input_ids: torch.Tensor
    """(B, S) int64."""
    position_ids: torch.Tensor
    """(B, S) int64."""
    layouts: tuple[PackedLayout, ...]
    """The whole (padded) rows': attention sees all tokens, for some of the heads."""
    targets: torch.Tensor
    """(B, S) int64: the token that each token must predict, -100 where not trained."""
    loss_weights: torch.Tensor
    """(B, S) float32: the weight of that prediction."""
    trained: torch.Tensor
    """(N,) int64: which of the B * S tokens are trained; found here, since a device would be waited for."""
    counted: torch.Tensor
    """(B, S) bool: which tokens are documents' own, so that a router's loss counts them."""

    def arguments(self, device: torch.device) -> dict[str, object]:
        """Keyword arguments for the model, tensors on `device`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def shard_batch(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    layouts: tuple[PackedLayout, ...],
    mesh: Mesh,
) -> Shard:
    """This process's slice of rows (B, T) that its group shares; the whole of them where it has no group."""
    # an empty piece is a single token, and no document's
    text = torch.stack([torch.from_numpy(layout.text_array()) & (layout.length > 1) for layout in layouts])
    layouts = tuple(padded(layout, mesh.sequence) for layout in layouts)
    positions = torch.stack([layout.position_ids() for layout in layouts])
    missing = (0, layouts[0].length - input_ids.shape[1])
    mine = _slice(F.pad(targets, missing, value=IGNORE), mesh)
    return Shard(
        _slice(F.pad(input_ids, missing), mesh),
        _slice(positions, mesh),
        layouts,
        mine,
        _slice(F.pad(loss_weights, missing), mesh),
        trained_tokens(mine),
        _slice(F.pad(text, missing), mesh),
    )


def padded(layout: PackedLayout, multiple: int) -> PackedLayout:
    """The row lengthened to a multiple of so many tokens; the new tokens are one more document."""
    # a row of 10 tokens over 4 processes is lengthened to 12
    length = -(-layout.length // multiple) * multiple
    if length == layout.length:
        return layout
    ids = None if layout.doc_ids is None else (*layout.doc_ids, max(layout.doc_ids) + 1)
    starts = None if layout.starts is None else (*layout.starts, 0)
    return replace(layout, doc_offsets=(*layout.doc_offsets, length), doc_ids=ids, starts=starts)


def _slice(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """(B, T) -> (B, S)."""
    # a row of 12 tokens over 4 processes: process 1 holds tokens 3, 4 and 5
    size = x.shape[1] // mesh.sequence
    return x[:, mesh.sequence_rank * size : (mesh.sequence_rank + 1) * size].contiguous()
