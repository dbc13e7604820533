"""A `data_collator` for Hugging Face `Trainer` and whatever calls one: documents in, AnchorAttention's layout out.

Each document gets a copy of the anchor in front, at position 0, and keeps its positions in the row. Attention inside
documents is then AnchorAttention (the third identity, `anchorctx.layout`), so that transformers' own flash attention
will do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from anchorctx.errors import UserError
from anchorctx.integrations.check import check_model, warn_of_data_parallel
from anchorctx.integrations.reader import IGNORED, Reader, Text
from anchorctx.integrations.rows import copies_under, lay_out_batch
from anchorctx.layout import PackedLayout, Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Excess(StrEnum):
    """What becomes of tokens beyond `row_length` or `max_tokens`."""

    refuse = "refuse"
    """An error that says how to make room."""
    cut = "cut"
    """Left out: the end of a long document, and of the batch. The log says so once in each process."""


@dataclass
class AnchorCollator:
    """Packs the documents that it is handed into one flattened batch, (1, T'), for the model's forward.

    A pure function of the examples: it keeps nothing from one batch to the next, and any number of data loader workers
    gives the same batches.

    An example has `input_ids`, taken as they are, with `labels` if not all of them are trained (unshifted, -100 where
    not); or a `text`, which is tokenized without special tokens and ended with EOS, if there is one. It may have
    `position_ids` (see `row_starts`).
    """

    tokenizer: PreTrainedTokenizerBase
    """Its BOS, else its EOS, is the anchor."""
    row_length: int
    """Tokens of a row, the anchor's among them: positions run from 0, the anchor's, to row_length - 1.

    Documents take their places in it one behind the other, from position 1 on. One that no longer fits begins the next
    row, at position 1 again. So positions reach as far as the documents of one batch do.
    """
    pattern: Pattern | str = Pattern.anchor
    """What documents see; `full` makes one document of each row, behind one anchor."""
    max_tokens: int | None = None
    """Tokens that a batch holds at most, copies of the anchor counted: what bounds memory. None is no bound."""
    excess: Excess | str = Excess.refuse
    """What becomes of a document that is longer than a row, and of a batch that is longer than `max_tokens`."""
    model: InitVar[PreTrainedModel | None] = None
    """The model that is trained, to be checked now (`check_model`); it is not kept. Then ids are held to its vocabulary
    instead of the tokenizer's."""
    _anchor: int = field(init=False, repr=False)
    _copies: int = field(init=False, repr=False)
    _reader: Reader = field(init=False, repr=False)
    _warned: set[str] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self, model: PreTrainedModel | None) -> None:
        self.pattern, self.excess = choice(Pattern, "pattern", self.pattern), choice(Excess, "excess", self.excess)
        for name, value in (("row_length", self.row_length), ("max_tokens", self.max_tokens)):
            if value is not None and (not isinstance(value, Integral) or value < 3):
                raise UserError(
                    f"{name}={value!r} must be an integer of 3 or more: the anchor, and a token that predicts another"
                )
        if not callable(getattr(self.tokenizer, "get_vocab", None)):
            raise UserError(f"tokenizer={self.tokenizer!r:.60} is none: pass AutoTokenizer.from_pretrained(...)")
        bos, eos = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos"))
        anchor = eos if bos is None else bos
        if anchor is None:
            name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
            raise UserError(
                f"the tokenizer {name} has neither a BOS nor an EOS token to be the anchor: set its bos_token"
            )
        if model is None:
            vocabulary = max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))  # it may have gaps
            logger.warning(
                "AnchorCollator does not know if the model keeps documents apart: pass model=, or call check_model()"
            )
        else:
            check_model(model)
            config = getattr(model, "module", model).config.get_text_config()
            vocabulary, reach = config.vocab_size, getattr(config, "max_position_embeddings", None)
            if reach is not None and self.row_length > reach:
                logger.warning(
                    "row_length=%d is more than the model's max_position_embeddings=%d: raise that, with its RoPE "
                    "theta or scaling, before the model is built",
                    self.row_length,
                    reach,
                )
        if anchor >= vocabulary:
            raise UserError(
                f"the anchor, token {anchor}, is beyond the model's vocabulary of {vocabulary}: "
                "resize its embeddings, or use its own tokenizer"
            )
        self._anchor, self._reader = anchor, Reader(self.tokenizer, eos, vocabulary)
        self._copies = copies_under(self.pattern)
        warn_of_data_parallel()

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor | int]:
        """One batch of the examples' documents, in their order.

        Returns:
            input_ids, labels, position_ids: (1, T') int64. cu_seq_lens_q, cu_seq_lens_k: (N + 1,) int32 boundaries of
            the documents, with their copies. max_length_q, max_length_k: tokens of the longest, an int.

        Raises:
            UserError: an example that is no document, or a batch that is too long.
        """
        if not isinstance(examples, Sequence) or isinstance(examples, str) or not examples:
            raise UserError(
                f"AnchorCollator got a {type(examples).__name__} with no example in it: hand it over as data_collator "
                "(collate_fn), which gets a list of documents before they are batched"
            )
        texts = [self._reader.read(example, f"example {i} of the batch") for i, example in enumerate(examples)]
        self._warn_of_second_anchors(texts)
        texts = self._within_batch([self._within_row(text, i) for i, text in enumerate(texts)])
        layout, index = self._lay_out(texts)
        # The model's loss shifts labels by itself: the token in front of a label predicts it. At the seam of two
        # documents that is the last token of the first, so that what stands there must not be trained:
        #   input_ids   A  a0   a1  a2  A    b0   b1
        #   labels   -100 -100  a1  a2 -100 -100  b1
        # Nobody predicts b0: its copy of the anchor does not, so that every pattern trains the same tokens. Trainer
        # counts num_items_in_batch over labels[..., 1:], which leaves out one more -100 and no label.
        ids = np.concatenate([np.array([self._anchor]), *(text.ids for text in texts)])[index]
        labels = np.concatenate([np.array([IGNORED]), *(text.labels for text in texts)])[index]
        boundaries = torch.from_numpy(layout.cu_seqlens_array())
        longest = int(np.diff(layout.doc_offsets).max())
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(layout.position_array())[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries.clone(),
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _lay_out(self, texts: Sequence[Text]) -> tuple[PackedLayout, np.ndarray]:
        """The batch's layout, and which tokens of [anchor, *documents] to gather for it."""
        lengths, given = [len(text) for text in texts], [text.start for text in texts]
        return lay_out_batch(lengths, given, Pattern(self.pattern), self.row_length)

    def _within_row(self, text: Text, number: int) -> Text:
        """The document, refused or cut where a row or a batch cannot hold it even alone."""
        name, room = f"example {number} of the batch", self.row_length - 1
        self._check_place(text, name)
        limit = f"row_length={self.row_length} holds {room} behind the anchor"
        if self.max_tokens is not None and self.max_tokens - self._copies < room:
            room = self.max_tokens - self._copies
            limit = f"max_tokens={self.max_tokens} holds {room}"
        if len(text) <= room:
            return text
        if self.excess is Excess.refuse:
            key = limit.partition("=")[0]
            raise UserError(
                f"{name} has {len(text)} tokens, but {limit}: raise {key}, cut the document in the dataset, or leave "
                "out its end with excess='cut'"
            )
        self._warn_once("documents", f"{name} has {len(text)} tokens, but {limit}")
        return text.cut(room)

    def _check_place(self, text: Text, name: str) -> None:
        """Refuse a place in the row that cannot be."""
        if text.start is None or self.pattern in (Pattern.anchor_reset, Pattern.intra_doc_reset):
            return
        if self.pattern is Pattern.full:
            raise UserError(
                f"{name} has position_ids, but pattern=full makes rows of the documents of a batch, for a row that is "
                "one document cannot be cut: leave the column out, and let a batch hold whole rows"
            )
        if not 0 < text.start <= self.row_length - len(text):
            raise UserError(
                f"{name} has position_ids from {text.start} to {text.start + len(text) - 1}, but a document's lie in 1 "
                f"to {self.row_length - 1} (row_length={self.row_length}, the anchor is at 0): make the column with "
                "row_starts()"
            )

    def _within_batch(self, texts: list[Text]) -> list[Text]:
        """The documents, refused or cut at the end where they are too many."""
        length = self._lay_out(texts)[0].length
        if self.max_tokens is None or length <= self.max_tokens:
            return texts
        copies = "copies of the anchor counted" if self._copies else "which has no copies of the anchor"
        what = f"{len(texts)} documents make a batch of {length} tokens, {copies}, but max_tokens={self.max_tokens}"
        if self.excess is Excess.refuse:
            raise UserError(
                f"{what}: lower per_device_train_batch_size (per_device_eval_batch_size), raise max_tokens, or leave "
                "out what does not fit with excess='cut'"
            )
        self._warn_once("batches", what)
        kept = list(texts)
        # documents of 5, 4 and 3 with copies are 15 tokens, of which 10 fit: 5 over, [5, 4]; 1 over, [5, 3]
        while (over := self._lay_out(kept)[0].length - self.max_tokens) > 0:
            last = kept.pop()
            if len(last) - over > 1:  # one token alone trains nothing
                kept.append(last.cut(len(last) - over))
        return kept

    def _warn_of_second_anchors(self, texts: Sequence[Text]) -> None:
        """Tokenizers that write BOS by themselves give documents which begin with what the collator puts there."""
        if "anchors" not in self._warned and any(text.ids[0] == self._anchor for text in texts):
            logger.warning(
                "documents begin with token %d, which AnchorCollator puts in front of each by itself: tokenize with "
                "add_special_tokens=False, or they begin with it twice",
                self._anchor,
            )
            self._warned.add("anchors")

    def _warn_once(self, what: str, why: str) -> None:
        if what not in self._warned:
            logger.warning("excess=cut leaves out the end of %s, without a word from now on: %s", what, why)
            self._warned.add(what)


_Choice = TypeVar("_Choice", bound=StrEnum)


def choice(kind: type[_Choice], name: str, value: str) -> _Choice:
    """The member `value` of an enum; UserError with its members, for the argument called `name`."""
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name}={value} is unknown: choose {', '.join(kind)}") from None
