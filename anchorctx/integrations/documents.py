"""Where the documents of another trainer's batch lie, and the batch in which each has its copy of the anchor.

Trainers say it in several ways, all of which are read here:

    cu_seq_lens_q   [0, 3, 5]             boundaries of one flattened row, as TRL and transformers give them
    position_ids    [[0, 1, 2, 0, 1]]     restart at 0 with each document
    attention_mask  [[1, 1, 1, 2, 2, 0]]  an integer for each document, 0 for padding
    attention_mask  [[1, 1, 1, 1, 1, 0]]  one document a row, 0 for padding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from anchorctx.attention.boundaries import layouts_of
from anchorctx.errors import UserError
from anchorctx.integrations.rows import copies_under, row_starts
from anchorctx.layout import Document, PackedLayout, Pattern, lay_out


@dataclass(frozen=True, slots=True)
class Boundaries:
    """What a trainer's batch (B, T) says of its documents; at least one is not None."""

    cu_seq_lens: torch.Tensor | None = None
    """(N + 1,) integers."""
    position_ids: torch.Tensor | None = None
    """(B, T), or (1, T) for all rows."""
    attention_mask: torch.Tensor | None = None
    """(B, T) integers or bools, 0 is padding."""

    def spans(self, name: str, batch: int, tokens: int) -> np.ndarray:
        """(N, 2) int64: where each document begins and ends in the flattened batch (B * T,); padding is in none.

        Args:
            name: the model, in errors.
            batch: rows, B.
            tokens: tokens of a row, T.

        Raises:
            UserError: nothing says where documents lie, or it cannot be so.
        """
        if self.cu_seq_lens is None and self.position_ids is None and self.attention_mask is None:
            raise UserError(
                f"{name} got a batch that does not say where its documents lie: let the collator give cu_seq_lens_q, "
                "position_ids that restart with each document, or an attention_mask (of ones, if each row is one)"
            )
        begins = np.zeros((batch, tokens), bool)
        begins[:, 0] = True
        real = np.ones((batch, tokens), bool)
        if self.cu_seq_lens is not None:
            begins[0, list(layouts_of(name, batch, tokens, self.cu_seq_lens)[0].doc_offsets[:-1])] = True
        if self.attention_mask is not None:
            mask = _integers(self.attention_mask, "attention_mask", name, (batch, tokens))
            real = mask != 0
            begins[:, 1:] |= mask[:, 1:] != mask[:, :-1]
            if (~real[:, 0] & real.any(1)).any():
                raise UserError(f"{name} got rows that are padded on the left: pad them with padding_side='right'")
        if self.position_ids is not None:
            positions = _integers(self.position_ids, "position_ids", name, (batch, tokens))
            begins |= _restarts(positions, real, name)
        # a row of documents of 3 and 2 tokens and one of padding: starts [0, 3, 5], of which the last is left out
        starts = np.flatnonzero(begins)
        stops = np.append(starts[1:], batch * tokens)
        return np.stack([starts, stops], 1)[real.reshape(-1)[starts]]


class Laid(NamedTuple):
    """A trainer's batch (B, T) as one row (1, T') in which each document has its copy of the anchor."""

    layout: PackedLayout
    """Of the T' tokens."""
    gather: np.ndarray
    """(T',) int64: which of [anchor, *the batch, flattened] each token is."""
    place: np.ndarray
    """(B * T,) int64: where each of the batch's tokens went; 0 for padding."""


def lay_out_spans(
    spans: np.ndarray, begins_with_anchor: Sequence[bool], shape: tuple[int, int], pattern: Pattern, row_length: int
) -> Laid:
    """Each document behind its copy of the anchor. Its own first token is that copy where it is the anchor already.

    Under `anchor` and `intra_doc` documents take their places in a row of `row_length` positions as `AnchorCollator`
    has it (`row_starts`), from 1 on again in each row of the batch.

    Args:
        spans: (N, 2) of `Boundaries.spans`.
        begins_with_anchor: of each document.
        shape: B and T.
        pattern: what documents see; not `full`.
        row_length: positions of a row, the anchor's among them.

    Raises:
        UserError: a batch without documents, or a document that is longer than a row.
    """
    if not len(spans):
        raise UserError("the batch is padding alone, without a document: drop such batches")
    copies = copies_under(pattern)
    own = [bool(copies) and begins for begins in begins_with_anchor]
    lengths = [stop - start - has for (start, stop), has in zip(spans.tolist(), own, strict=True)]
    if max(lengths) >= row_length:
        raise UserError(
            f"a document of {max(lengths)} tokens does not fit row_length={row_length}, which holds {row_length - 1} "
            "behind the anchor: cut documents in the trainer (max_length), or raise row_length="
        )
    starts = [copies] * len(lengths)
    if pattern in (Pattern.anchor, Pattern.intra_doc):
        rows = spans[:, 0] // shape[1]
        # lengths 3, 2 and 4, the last in the batch's second row: starts 1 and 4, then 1
        parts = np.split(np.array(lengths), np.flatnonzero(np.diff(rows)) + 1)
        starts = [start for part in parts for start in row_starts(part.tolist(), row_length)]
    # the anchor is token 0 of [anchor, *batch]: a document at (3, 5) is (4, 6) there, or (5, 6) with an anchor its own
    documents = [
        Document(((start + 1 + has, stop + 1),), (place,))
        for (start, stop), has, place in zip(spans.tolist(), own, starts, strict=True)
    ]
    layout, index = lay_out(documents, copies), np.concatenate([document.where(copies) for document in documents])
    place = np.zeros(shape[0] * shape[1] + 1, np.int64)
    place[index] = np.arange(len(index))
    place[spans[own, 0] + 1] = np.array(layout.doc_offsets[:-1])[own]
    return Laid(layout, index, place[1:])


def _integers(values: Any, what: str, name: str, shape: tuple[int, int]) -> np.ndarray:
    """(B, T) int64 on the CPU."""
    if not isinstance(values, torch.Tensor):
        raise UserError(f"{name} got {what} as a {type(values).__name__}: give a tensor, one number a token")
    if values.ndim != 2 or values.shape[1] != shape[1] or values.shape[0] not in (1, shape[0]):
        raise UserError(
            f"{name} got {what} of shape {tuple(values.shape)} for a batch of {shape}: give one number a token"
        )
    return np.broadcast_to(values.detach().to("cpu", torch.int64).numpy(), shape)


def _restarts(positions: np.ndarray, real: np.ndarray, name: str) -> np.ndarray:
    """(B, T) bool: where positions begin anew, at 0."""
    begins = np.zeros(positions.shape, bool)
    begins[:, 0] = real[:, 0]
    begins[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1) & real[:, 1:]
    elsewhere = positions[begins & (positions != 0)]
    if len(elsewhere):
        raise UserError(
            f"{name} got position_ids that begin anew at {elsewhere[0]}, but documents restart at 0: batches of "
            "AnchorCollator and RowDataset are laid out already, attach(model, pattern=None) takes them as they are; "
            "parts of a row, as of sequence parallelism, cannot be"
        )
    return begins
