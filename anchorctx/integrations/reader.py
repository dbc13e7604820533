"""One example of a dataset as a document: its ids, its labels, and everything that speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained, as torch's cross-entropy has it."""
MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns for what is trained, out of which it makes labels."""
PACKED = ("seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k")
"""Columns of examples that hold several documents."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document of a dataset."""

    ids: np.ndarray
    """(N,) int64, N > 0."""
    labels: np.ndarray
    """(N,) int64, unshifted; `IGNORED` on the first token, whose predecessor is no part of the document."""
    start: int | None = None
    """The row position of its first token, where the dataset says so."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, tokens: int) -> Text:
        """Its first tokens."""
        return replace(self, ids=self.ids[:tokens], labels=self.labels[:tokens])


@dataclass(frozen=True, slots=True)
class Reader:
    """Makes documents of examples."""

    tokenizer: PreTrainedTokenizerBase
    eos: int | None
    """Ends each document that comes as a text; None where the tokenizer has none."""
    vocabulary: int
    """Ids are below this."""

    def read(self, example: Any, name: str) -> Text:
        """The document of one example, called `name` in errors; UserError where it is none."""
        if not isinstance(example, Mapping):
            raise UserError(
                f"{name} is a {type(example).__name__}, but must be a mapping with input_ids or text: hand the "
                "collator over as data_collator (collate_fn) and leave batching to the data loader"
            )
        if "input_ids" not in example:
            return _trained(self._encode(example, name))
        ids = _ints(example["input_ids"], "input_ids", name)
        _refuse_padded_and_packed(example, len(ids), name)
        self._check(ids, "input_ids", name)
        labels = ids
        if example.get("labels") is not None:
            labels = _ints(example["labels"], "labels", name)
            if len(labels) != len(ids):
                raise UserError(
                    f"{name} has {len(labels)} labels for {len(ids)} input_ids: give one label a token, unshifted"
                )
            self._check(labels[labels != IGNORED], "labels", name)
        elif mask := [column for column in MASKS if example.get(column) is not None]:
            raise UserError(
                f"{name} has a {mask[0]} and no labels: give labels, with {IGNORED} on each token that is not trained"
            )
        return _trained(ids, labels, _start(example, len(ids), name))

    def _encode(self, example: Mapping[str, Any], name: str) -> np.ndarray:
        text = example.get("text")
        if not isinstance(text, str):
            columns = ", ".join(map(str, example)) or "no columns at all"
            raise UserError(
                f"{name} has neither input_ids nor a text, but {columns}: name one column so (with a column of texts, "
                "Trainer needs remove_unused_columns=False)"
            )
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"{name} is empty: leave documents without tokens out of the dataset")
        return np.array([*ids, *([] if self.eos is None else [self.eos])], np.int64)

    def _check(self, ids: np.ndarray, column: str, name: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.vocabulary)]
        if len(wrong):
            raise UserError(
                f"{name} has {wrong[0]} in its {column}, but ids go from 0 to {self.vocabulary - 1}: tokenize the data "
                "with this model's tokenizer"
            )


def _trained(ids: np.ndarray, labels: np.ndarray | None = None, start: int | None = None) -> Text:
    labels = np.array(ids if labels is None else labels)
    labels[0] = IGNORED
    return Text(ids, labels, start)


def _ints(values: Any, column: str, name: str) -> np.ndarray:
    """(N,) int64 with N > 0, of a list, an array or a tensor."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.empty((0, 0), np.int64)
    if array.ndim == 0:
        raise UserError(f"{name} has a {type(values).__name__} as its {column}: give a list of token ids")
    if array.ndim != 1:
        raise UserError(
            f"{name} has several sequences in its {column}: hand over single documents, neither batched nor packed"
        )
    if not len(array):
        raise UserError(f"{name} is empty: leave documents without tokens out of the dataset")
    if array.dtype.kind not in "iu":
        raise UserError(f"{name} has {column} of type {array.dtype}: give token ids, which are integers")
    return array.astype(np.int64)


def _refuse_padded_and_packed(example: Mapping[str, Any], tokens: int, name: str) -> None:
    if example.get("attention_mask") is not None:
        mask = _ints(example["attention_mask"], "attention_mask", name)
        if len(mask) != tokens:
            raise UserError(f"{name} has an attention_mask of {len(mask)} for {tokens} input_ids: leave the column out")
        if not mask.all():
            zeros = int((mask == 0).sum())
            raise UserError(f"{name} is padded, its attention_mask has {zeros} zeros: tokenize with padding=False")
    for column in PACKED:
        if example.get(column) is not None:
            raise UserError(f"{name} is packed already, it has {column}: set packing=False, the collator packs")


def _start(example: Mapping[str, Any], tokens: int, name: str) -> int | None:
    if example.get("position_ids") is None:
        return None
    positions = _ints(example["position_ids"], "position_ids", name)
    start = int(positions[0])
    if len(positions) != tokens or (positions != np.arange(start, start + tokens)).any():
        raise UserError(
            f"{name} has position_ids that do not go from {start} to {start + tokens - 1}, as of a packed row: hand "
            "over single documents, or leave the column out"
        )
    return start
