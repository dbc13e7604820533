"""A batch's slice for one process of a sequence-parallel group: no communication, no state.

Every process of a group reads the same rows. Labels are shifted first and sliced afterwards, so that a slice's last
token still predicts the next slice's first. Rows are padded to a multiple of the group with untrained tokens, which
form a document of their own: nothing that is trained sees them.

Shapes: B rows, T tokens, S = padded T / processes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional as F

from anchorctx.layout import PackedLayout
from anchorctx.models.loss import IGNORE, shift
from anchorctx.parallel.mesh import Mesh


class RowBatch(Protocol):
    """Whole rows, as `data.loader.Batch` has them."""

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, T) int64."""
        ...

    @property
    def labels(self) -> torch.Tensor:
        """(B, T) int64, unshifted."""
        ...

    @property
    def loss_weights(self) -> torch.Tensor:
        """(B, T) float32."""
        ...

    @property
    def layouts(self) -> tuple[PackedLayout, ...]:
        """One a row."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """What one process computes of a batch; the fields are the arguments of `CausalLMLoss`."""

    input_ids: torch.Tensor
    """(B, S) int64."""
    position_ids: torch.Tensor
    """(B, S) int64, positions in the whole row."""
    layouts: tuple[PackedLayout, ...]
    """The whole (padded) rows': attention sees all tokens, for some of the heads."""
    labels: torch.Tensor
    """(B, S) int64: the token that each token must predict, -100 where not trained."""
    loss_weights: torch.Tensor
    """(B, S) float32: the weight of that prediction."""
    shifted: bool = True

    def arguments(self, device: torch.device) -> dict[str, object]:
        """Keyword arguments for the model, tensors on `device`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def share(batch: RowBatch, mesh: Mesh) -> Share:
    """This process's slice of whole rows; the whole of them where there is no sequence parallelism."""
    layouts = tuple(padded(layout, mesh.sequence) for layout in batch.layouts)
    targets, weights = shift(batch.labels, batch.loss_weights)
    missing = layouts[0].length - targets.shape[1]
    positions = torch.stack([layout.position_ids() for layout in layouts])
    slices = [
        _slice(x, mesh)
        for x in (
            F.pad(batch.input_ids, (0, missing)),
            positions,
            F.pad(targets, (0, missing), value=IGNORE),
            F.pad(weights, (0, missing)),
        )
    ]
    return Share(slices[0], slices[1], layouts, slices[2], slices[3])


def padded(layout: PackedLayout, multiple: int) -> PackedLayout:
    """The row lengthened to a multiple of so many tokens; the new tokens are one more document."""
    length = -(-layout.length // multiple) * multiple
    if length == layout.length:
        return layout
    ids = None if layout.doc_ids is None else (*layout.doc_ids, max(layout.doc_ids) + 1)
    return replace(layout, doc_offsets=(*layout.doc_offsets, length), doc_ids=ids)


def _slice(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """(B, T) -> (B, S)."""
    size = x.shape[1] // mesh.sequence
    return x[:, mesh.sequence_rank * size : (mesh.sequence_rank + 1) * size].contiguous()
