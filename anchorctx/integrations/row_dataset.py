"""A packed set, as `anchorctx prepare` makes it, for other trainers: a map-style dataset, its collator, its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anchorctx.data.packed_set import PackedSet
from anchorctx.errors import UserError
from anchorctx.integrations.check import check_model
from anchorctx.integrations.collator import choice
from anchorctx.integrations.reader import IGNORED
from anchorctx.layout import PackedLayout, Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A row in which each document has its copy of the anchor. No mapping: Trainer would remove what it cannot name."""

    ids: np.ndarray
    """(T',) int64."""
    weights: np.ndarray
    """(T',) float32 of the loss of each token, which the one before it predicts; 0 is not trained."""
    layout: PackedLayout


class RowDataset(torch.utils.data.Dataset):
    """The rows of a packed set, whose batches `collate_rows` makes. Padding is left out."""

    def __init__(
        self, folder: str | Path, pattern: Pattern | str = Pattern.anchor, model: PreTrainedModel | None = None
    ) -> None:
        """Open the set.

        Args:
            folder: a packed set, or a folder that holds exactly one.
            pattern: what documents see.
            model: the model that is trained, to be checked now; it is not kept.

        Raises:
            UserError: no packed set; or a model that would mix documents, has a smaller vocabulary, or a loss that
                does not read the set's loss weights.
        """
        self.pattern = choice(Pattern, "pattern", pattern)
        self.packed = PackedSet.open(folder)
        if model is None:
            return
        check_model(model)
        inner = getattr(model, "module", model)
        size, needed = inner.config.get_text_config().vocab_size, int(self.packed.manifest["vocab_size"])
        if needed > size:
            raise UserError(
                f"{folder} has token ids up to {needed - 1}, but the model's vocabulary ends at {size - 1}: prepare it "
                "with the model's own tokenizer"
            )
        if self.weighted and getattr(inner, "loss_function", None) is not weighted_loss:
            raise UserError(
                f"{folder} has loss weights other than 0 and 1, which the model's loss does not read: set "
                "model.loss_function = anchorctx.integrations.weighted_loss"
            )

    @property
    def weighted(self) -> bool:
        """Has it loss weights other than 0 and 1?"""
        return not np.array_equal(self.packed.row_weight, self.packed.row_trained)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> PackedRow:
        row = self.packed.row(index)
        layout, where = self.pattern.apply(row.layout).with_copies()
        return PackedRow(row.input_ids[where], row.loss_weights[where], layout)

    def __getstate__(self) -> dict[str, Any]:
        """Sent to a data loader's worker, it is opened anew there."""
        return {"pattern": self.pattern, "folder": self.packed.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pattern, self.packed = state["pattern"], PackedSet.open(state["folder"], verify=False)


def collate_rows(rows: Sequence[PackedRow]) -> dict[str, torch.Tensor | int]:
    """One flattened batch of rows of a `RowDataset`: what `AnchorCollator` returns, and loss weights where they matter.

    Returns:
        input_ids, labels, position_ids: (1, T') int64. cu_seq_lens_q, cu_seq_lens_k: (N + 1,) int32. max_length_q,
        max_length_k: an int. loss_weights: (1, T') float32, if any is neither 0 nor 1.
    """
    ids, weights = (np.concatenate(parts) for parts in zip(*((row.ids, row.weights) for row in rows), strict=True))
    lengths = np.concatenate([np.diff(row.layout.cu_seqlens_array()) for row in rows])
    boundaries = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    positions = np.concatenate([row.layout.position_array() for row in rows])
    batch: dict[str, torch.Tensor | int] = {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(np.where(weights > 0, ids, IGNORED))[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries.clone(),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    if ((weights != 0) & (weights != 1)).any():
        batch["loss_weights"] = torch.from_numpy(weights)[None]
    return batch


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    loss_weights: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' causal loss with a weight for each token: `model.loss_function = weighted_loss`.

    The sum of weight times cross-entropy over the number of trained tokens, as Trainer counts them. `anchorctx train`
    divides by the sum of their weights: the same where all are 0 or 1.

    Args:
        logits: (B, T, V).
        labels: (B, T), unshifted, -100 where not trained.
        vocab_size: V.
        num_items_in_batch: trained tokens of the step; None counts the batch's.
        loss_weights: (B, T), of each label; None is 1.
        kwargs: what else a model hands to its loss.
    """
    targets = labels[:, 1:].reshape(-1).to(logits.device)
    shape = (-1, vocab_size)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(shape), targets, ignore_index=IGNORED, reduction="none"
    )
    if loss_weights is not None:
        losses = losses * loss_weights[:, 1:].reshape(-1).to(losses)
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / torch.as_tensor(items, device=losses.device)
