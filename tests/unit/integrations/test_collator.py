from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.integrations import AnchorCollator, row_starts
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.testing.tiny import word_tokenizer

from .collators import collator

A, X = 1, -100
"""The anchor, and the label of what is not trained."""


def documents(*lengths: int) -> list[dict[str, list[int]]]:
    """Documents 10, 11, ... and 20, 21, ... and so on."""
    return [{"input_ids": list(range(10 * i, 10 * i + n))} for i, n in enumerate(lengths, 1)]


def listed(batch: dict[str, Any]) -> list[list[int]]:
    """Ids, labels, positions and boundaries; the shapes, dtypes and longest lengths are checked."""
    tokens = batch["input_ids"].shape[1]
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (1, tokens) and batch[name].dtype is torch.int64
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype is torch.int32 and batch[name].is_contiguous()
        assert torch.equal(batch[name], batch["cu_seq_lens_q"])
    for name in ("max_length_q", "max_length_k"):
        assert type(batch[name]) is int and batch[name] == int(batch["cu_seq_lens_q"].diff().max())
    assert set(batch) == {"input_ids", "labels", "position_ids"} | {
        f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"
    }
    rows = [batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids")]
    return [*rows, batch["cu_seq_lens_q"].tolist()]


# -- what a batch is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            "anchor",
            [
                [A, 10, 11, 12, A, 20, 21, A, 30, 31, 32, 33],
                [X, X, 11, 12, X, X, 21, X, X, 31, 32, 33],
                [0, 1, 2, 3, 0, 4, 5, 0, 1, 2, 3, 4],  # the third begins the next row
                [0, 4, 7, 12],
            ],
        ),
        (
            "anchor_reset",
            [
                [A, 10, 11, 12, A, 20, 21, A, 30, 31, 32, 33],
                [X, X, 11, 12, X, X, 21, X, X, 31, 32, 33],
                [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4],
                [0, 4, 7, 12],
            ],
        ),
        (
            "intra_doc",
            [
                [10, 11, 12, 20, 21, 30, 31, 32, 33],
                [X, 11, 12, X, 21, X, 31, 32, 33],
                [1, 2, 3, 4, 5, 1, 2, 3, 4],
                [0, 3, 5, 9],
            ],
        ),
        (
            "intra_doc_reset",
            [
                [10, 11, 12, 20, 21, 30, 31, 32, 33],
                [X, 11, 12, X, 21, X, 31, 32, 33],
                [0, 1, 2, 0, 1, 0, 1, 2, 3],
                [0, 3, 5, 9],
            ],
        ),
        (
            "full",
            [
                [A, 10, 11, 12, 20, 21, A, 30, 31, 32, 33],
                [X, X, 11, 12, X, 21, X, X, 31, 32, 33],
                [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4],
                [0, 6, 11],
            ],
        ),
    ],
)
def test_what_each_pattern_makes_of_three_documents(pattern: str, expected: list[list[int]]) -> None:
    assert listed(collator(8, pattern)(documents(3, 2, 4))) == expected


@pytest.mark.parametrize("pattern", list(Pattern))
def test_a_batch_that_fills_one_row_is_the_packers_row_with_copies(pattern: Pattern) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        lengths = rng.integers(1, 9, rng.integers(1, 7)).tolist()
        row = PackedLayout((0, *np.cumsum([1, *lengths]).tolist()), 1)
        layout, index = pattern.apply(row).with_copies()
        ids, _, positions, boundaries = listed(collator(row.length, pattern)(documents(*lengths)))
        # without an anchor the packer's BOS is a document of one token, which trains nothing: the collator has none
        alone = 1 if pattern in (Pattern.intra_doc, Pattern.intra_doc_reset) else 0
        flat = [A, *(token for example in documents(*lengths) for token in example["input_ids"])]
        assert ids == [flat[i] for i in index[alone:]] and positions == layout.position_array()[alone:].tolist()
        assert boundaries == [offset - alone for offset in layout.doc_offsets[alone:]]


@pytest.mark.parametrize("pattern", list(Pattern))
def test_every_pattern_trains_the_same_tokens(pattern: Pattern) -> None:
    ids, labels, *_ = listed(collator(20, pattern)(documents(3, 1, 4, 9, 2)))
    assert [x for x in labels if x != X] == [11, 12, 31, 32, 33, *range(41, 49), 51]
    assert all(label in (X, token) for token, label in zip(ids, labels, strict=True)) and labels[0] == X


def test_nothing_is_predicted_across_documents() -> None:
    """The loss takes the label at i + 1 for the logits at i: both are in one document, behind its anchor."""
    batch = collator(40)(documents(3, 1, 4))
    document = torch.bucketize(torch.arange(batch["input_ids"].shape[1]), batch["cu_seq_lens_q"], right=True)
    trained = (batch["labels"][0, 1:] != X).nonzero().squeeze()
    assert len(trained) == 5 and torch.equal(document[trained], document[trained + 1])
    assert (batch["position_ids"][0, trained] > 0).all()


def test_labels_of_the_dataset_are_kept() -> None:
    example = {"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]}
    assert listed(collator()([example]))[1] == [X, X, X, 7, 8]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda ids: np.array(ids, np.uint16)])
def test_ids_may_be_lists_arrays_or_tensors(make: Any) -> None:
    example = {"input_ids": make([5, 6, 7]), "labels": make([5, 6, 7]), "attention_mask": make([1, 1, 1])}
    assert listed(collator()([example]))[:2] == [[A, 5, 6, 7], [X, X, 6, 7]]
    assert list(example["input_ids"]) == [5, 6, 7]  # the dataset's own memory stays as it is


def test_texts_end_with_eos_and_begin_with_nothing() -> None:
    assert listed(collator()([{"text": "w5 w6"}]))[0] == [A, 5, 6, 2]


def test_eos_is_the_anchor_where_there_is_no_bos() -> None:
    tokenizer = word_tokenizer(96)
    tokenizer.bos_token = None
    assert AnchorCollator(tokenizer, 8)(documents(2))["input_ids"].tolist() == [[2, 10, 11]]


def test_positions_of_the_dataset_hold_in_every_batch() -> None:
    """A row in pieces: the same documents at the same places, however they are batched."""
    lengths = (3, 2, 4)
    placed = [
        {**document, "position_ids": list(range(start, start + len(document["input_ids"])))}
        for document, start in zip(documents(*lengths), row_starts(lengths, 12), strict=True)
    ]
    whole, pieces = collator(12)(placed), [collator(12)(placed[:1]), collator(12)(placed[1:])]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(whole[name], torch.cat([piece[name] for piece in pieces], 1))
    assert whole["position_ids"].tolist() == [[0, 1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9]]
    assert collator(12, "anchor_reset")(placed[1:])["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]


def test_a_row_that_is_one_document_is_not_placed_in_pieces() -> None:
    with pytest.raises(UserError, match="pattern=full makes rows .* cannot be cut: leave the column out"):
        collator(8, "full")([{"input_ids": [5, 6], "position_ids": [1, 2]}])


def test_documents_fill_rows_one_behind_the_other() -> None:
    assert row_starts([3, 4, 1, 7, 2], 8) == [1, 4, 1, 1, 1]
    assert row_starts([3, 4, 1], 9) == [1, 4, 8]
    assert row_starts([], 8) == []


def test_it_can_be_sent_to_a_worker() -> None:
    one = collator(8, max_tokens=12)
    assert listed(pickle.loads(pickle.dumps(one))(documents(3, 2, 4))) == listed(one(documents(3, 2, 4)))


# -- what is too long -------------------------------------------------------------------------------------------------


def test_max_tokens_counts_copies() -> None:
    three = documents(3, 2, 4)
    assert collator(8, max_tokens=12)(three)["input_ids"].shape == (1, 12)
    with pytest.raises(UserError, match="3 documents make a batch of 12 tokens, copies of the anchor counted, but "
                       "max_tokens=11: lower per_device_train_batch_size"):  # fmt: skip
        collator(8, max_tokens=11)(three)
    assert collator(8, "full", max_tokens=11)(three)["input_ids"].shape == (1, 11)
    with pytest.raises(UserError, match="which has no copies of the anchor, but max_tokens=8"):
        collator(8, "intra_doc", max_tokens=8)(three)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "example 1 of the batch has 8 tokens, but row_length=8 holds 7 behind the anchor: raise row_length"),
        ({"max_tokens": 7}, "example 1 of the batch has 8 tokens, but max_tokens=7 holds 6: raise max_tokens"),
    ],
)
def test_a_document_that_is_too_long_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collator(8, **options)(documents(3, 8))


def test_cutting_is_asked_for_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    cutting = collator(8, max_tokens=12, excess="cut")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        first = listed(cutting(documents(9, 3)))
        assert first == listed(cutting(documents(9, 3)))
    assert first[0] == [A, *range(10, 17), A, 20, 21, 22] and first[1][-2:] == [21, 22]
    assert len(caplog.messages) == 1 and "excess=cut leaves out the end of documents" in caplog.text
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert listed(cutting(documents(5, 4, 3)))[0] == [A, *range(10, 15), A, 20, 21, 22, 23]
        assert listed(cutting(documents(5, 5, 4)))[0] == [A, *range(10, 15), A, *range(20, 25)]
    assert len(caplog.messages) == 1 and "3 documents make a batch of 15 tokens" in caplog.text


@pytest.mark.parametrize("pattern", list(Pattern))
def test_a_cut_batch_is_as_long_as_it_may_be(pattern: Pattern) -> None:
    """But for a document of one token, which would train nothing; never longer."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 8, 6).tolist()
        limit = int(rng.integers(3, 40))
        whole = collator(8, pattern)(documents(*lengths))["input_ids"].shape[1]
        cut = collator(8, pattern, max_tokens=limit, excess="cut")(documents(*lengths))["input_ids"].shape[1]
        assert min(whole, limit) - 2 <= cut <= limit


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]},
            "padded, its attention_mask has 1 zeros: .*padding=Fal",
        ),
        ({"input_ids": [[5, 6], [7, 8]]}, "several sequences in its input_ids: hand over single documents"),
        ({"input_ids": [[5, 6], [7]]}, "several sequences in its input_ids: hand over single documents"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "several sequences in its input_ids"),
        ({"input_ids": [5, 6, 7], "position_ids": [1, 2, 1]}, "do not go from 1 to 3, as of a packed row: hand over"),
        ({"input_ids": [5, 6], "position_ids": [0, 1]}, "position_ids from 0 to 1, but a document's lie in 1 to 7"),
        (
            {"input_ids": [5, 6], "position_ids": [7, 8]},
            r"position_ids from 7 to 8, .*: make the column with row_starts",
        ),
        ({"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}, "packed already, it has seq_lengths: set packing=False"),
        (
            {"input_ids": [5, 6], "completion_mask": [0, 1]},
            "has a completion_mask and no labels: give labels, with -100",
        ),
        (
            {"input_ids": [5, 96]},
            "has 96 in its input_ids, but ids go from 0 to 95: tokenize the data with this model's",
        ),
        ({"input_ids": [5, -1]}, "has -1 in its input_ids"),
        ({"input_ids": [5, 6], "labels": [5, 400]}, "has 400 in its labels, but ids go from 0 to 95"),
        ({"input_ids": [5, 6], "labels": [6]}, "has 1 labels for 2 input_ids: give one label a token, unshifted"),
        ({"input_ids": []}, "is empty: leave documents without tokens out of the dataset"),
        ({"text": ""}, "is empty: leave documents without tokens out of the dataset"),
        ({"input_ids": [0.5, 1.0]}, "has input_ids of type float64: give token ids, which are integers"),
        ({"body": "w5"}, "neither input_ids nor a text, but body: .*remove_unused_columns=False"),
        ({}, "neither input_ids nor a text, but no columns at all: .*remove_unused_columns=False"),
        ([5, 6], "is a list, but must be a mapping with input_ids or text: hand the collator over as data_collator"),
    ],
)
def test_what_is_no_document_is_refused_in_one_sentence(example: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"example 1 of the batch .*{message}") as caught:
        collator()([*documents(2), example])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("examples", [{"input_ids": [[5, 6]]}, torch.ones(2, 3), [], "w5"])
def test_a_batch_in_place_of_examples_is_refused(examples: Any) -> None:
    with pytest.raises(UserError, match="AnchorCollator got a .* as data_collator"):
        collator()(examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 2}, "row_length=2 must be an integer of 3 or more"),
        ({"max_tokens": 2}, "max_tokens=2 must be an integer of 3 or more"),
        ({"pattern": "anker"}, "pattern=anker is unknown: choose full, intra_doc"),
        ({"excess": "drop"}, "excess=drop is unknown: choose refuse, cut"),
    ],
)
def test_settings_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collator(**options)


def test_a_tokenizer_without_bos_and_eos_is_refused() -> None:
    tokenizer = word_tokenizer(96)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token to be the anchor: set its bos_token"):
        AnchorCollator(tokenizer, 8)


# -- the model --------------------------------------------------------------------------------------------------------
