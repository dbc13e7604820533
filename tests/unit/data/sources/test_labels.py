"""Labels of one's own: from the row that holds them to the targets that a model is trained on, token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from anchorctx.data.config import PrepareConfig
from anchorctx.data.inspection import inspect
from anchorctx.data.loader import make_batch, row_layouts
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.mixture import MixtureConfig
from anchorctx.data.pieces import Cutting, deal_pieces
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.documents import OnBadRow, Reading
from anchorctx.data.sources.fields import Fields
from anchorctx.data.sources.source import SourceConfig, open_source
from anchorctx.errors import UserError
from anchorctx.layout import Pattern

from .test_fields import read, write

BOS, EOS, MASKED = 0, 1, -100
WORDS = 600
"""Ids 2 to 599 are words; then come the domains' names."""
TAGS = {"books": 600, "web": 601}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<s>", "</s>", *(f"w{i}" for i in range(2, WORDS)), *TAGS]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def row(ids: list[int], trained: list[bool], **more: Any) -> dict[str, Any]:
    labels = [token if keep else MASKED for token, keep in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels, "mask": [int(keep) for keep in trained], **more}


def source(file: Path, **options: Any) -> SourceConfig:
    return SourceConfig(path=str(file), **{"tokens_field": "input_ids", "labels_field": "labels", **options})


def config(folder: Path, tokenizer: Path, *sources: SourceConfig, **options: Any) -> PrepareConfig:
    out, name = str(folder / "out"), str(tokenizer)
    return PrepareConfig(**{"out_dir": out, "sources": list(sources), "tokenizer": name, "row_length": 12, **options})


TWO = [
    row([5, 6, 7, 8], [False, False, True, True]),
    row([9, 10, 11], [False, True, False]),
]


# -- what a row says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"labels_field": None, "mask_field": "mask"}], ids=["labels", "mask"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_every_format_says_the_same(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    found = read(source(write(tmp_path, kind, TWO), **options))
    assert [document.ids.tolist() for document in found] == [[5, 6, 7, 8], [9, 10, 11]]
    trained = [None if document.trained is None else document.trained.tolist() for document in found]
    assert trained == [[False, False, True, True], [False, True, False]]


def test_a_mask_may_be_of_booleans(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        file = write(tmp_path, kind, [{"input_ids": [5, 6], "kept": [False, True]}])
        (document,) = read(source(file, labels_field=None, mask_field="kept"))
        assert document.trained is not None and document.trained.tolist() == [False, True]


def test_boundaries_cut_labels_with_their_tokens(tmp_path: Path) -> None:
    content = row([5, 6, 7, 8, 9], [False, True, False, False, True], bounds=[2])
    found = read(source(write(tmp_path, "jsonl", [content]), boundaries_field="bounds"))
    trained = [document.trained.tolist() for document in found if document.trained is not None]
    assert trained == [[False, True], [False, False, True]]


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "shorter": (
        {"labels": [5]},
        "has 1 entries in labels for 2 tokens, not as many: mend the row",
        "labels of another length",
    ),
    "shifted": (
        {"labels": [6, MASKED]},
        "has label 6 at token 0 of labels, which is 5: write -100 or the token itself, not the one after it",
        "bad labels",
    ),
    "minus one": (
        {"labels": [5, -1]},
        "has label -1 at token 1 of labels, which is 6: write -100 or the token itself, not the one after it",
        "bad labels",
    ),
    "floats": (
        {"labels": [5.0, 6.0]},
        "has [5.0, 6.0] as field labels, not a list of integers: mend the row",
        "labels not integers",
    ),
    "text": (
        {"labels": "user"},
        'has "user" as field labels, not a list of integers: mend the row',
        "labels not integers",
    ),
    "none": (
        {"targets": [5, 6]},
        "has no field labels (it has: input_ids, targets): set labels_field to one of them",
        "no labels field",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_are_named_or_counted(tmp_path: Path, name: str) -> None:
    columns, what, reason = BAD[name]
    good = row([5, 6], [False, True])
    file = write(tmp_path, "jsonl", [good, {"input_ids": [5, 6], **columns}, good])
    with pytest.raises(UserError) as error:
        read(source(file))
    assert str(error.value) == f"{file}:2 {what}, or set on_bad_row=skip to leave such rows out"
    opened = open_source(source(file, on_bad_row=OnBadRow.skip))
    reading = Reading(opened.on_bad_row)
    assert len(list(opened.documents(reading))) == 2 and dict(reading.skipped) == {reason: 1}


@pytest.mark.parametrize("mask", [[0, 2], [1.0, 0.0], "01"])
def test_a_mask_is_of_0_and_1(tmp_path: Path, mask: Any) -> None:
    file = write(tmp_path, "jsonl", [{"input_ids": [5, 6], "mask": mask}])
    with pytest.raises(UserError, match=r"rows.jsonl:1 has .* as field mask, not a list of 0 and 1: mend the row"):
        read(source(file, labels_field=None, mask_field="mask"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_field": None}, "x has labels_field=labels but no tokens_field: set tokens_field=input_ids"),
        ({"mask_field": "mask"}, "x has both labels_field=labels and mask_field=mask: set one"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(source(Path("x"), **options))


def test_sources_without_labels_are_called_what_they_were_called_before() -> None:
    """So that token stores and packed sets made before there were labels are found."""
    assert list(Fields("text").identity) == ["text", "domain", "constant_domain", "tokens", "boundaries"]
    labelled = Fields("text", tokens="ids", labels="labels").identity
    assert labelled["labels"] == "labels" and "mask" not in labelled


# -- what a packed set makes of it ------------------------------------------------------------------------------------


def test_two_documents_by_hand(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EOS after a trained token is trained, after a masked one it is masked."""
    given_ = config(tmp_path, tokenizer, source(write(tmp_path, "jsonl", TWO)))
    inspect(given_)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["source", "documents", "tokens", "masked", "longest"] in shown
    assert ["rows.jsonl", "2", "9", "5", "5"] in shown
    packed = prepare(given_)
    # <s> | 5 6 7 8 </s> | 9 10 11 </s> | two of padding
    assert packed.row(0).input_ids.tolist() == [BOS, 5, 6, 7, 8, EOS, 9, 10, 11, EOS, EOS, EOS]
    assert packed.row(0).loss_weights.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    account = packed.manifest["accounting"]
    assert [account[name] for name in ("trained", "first_tokens", "zero_weight")] == [4, 2, 3]
    assert "masked (loss weight 0)" in capsys.readouterr().out
    # each document behind its own copy of the anchor; a target is the token after its own
    rows, cutting = np.array([0]), Cutting(max_tokens=16)
    layouts = row_layouts(packed, rows, Pattern.anchor)
    (piece,) = deal_pieces(layouts, cutting).pieces
    batch = make_batch(packed, rows, piece, anchor_len=1, cutting=cutting)
    documents = {tuple(ids): targets for ids, targets in documents_of(batch)}
    assert documents == {
        (BOS, 5, 6, 7, 8, EOS): [MASKED, MASKED, 7, 8, EOS, MASKED],
        (BOS, 9, 10, 11, EOS): [MASKED, 10, MASKED, MASKED, MASKED],
    }


def documents_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    starts = [i for i, token in enumerate(ids) if token == BOS]
    return [(ids[a:b], targets[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@st.composite
def corpora(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows whose every token is another, so that a token says where it is from."""
    rows, token = [], 2
    for length in draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)):
        trained = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        domain = draw(st.sampled_from(["books", "web"]))
        rows.append(row(list(range(token, token + length)), trained, kind=domain))
        token += length
    return rows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=corpora(), unlabelled=st.integers(0, 60), data=st.data())
def test_what_is_trained_is_what_the_source_trains(
    rows: list[dict[str, Any]],
    unlabelled: int,
    data: st.DataObject,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Under every policy, beside a source without labels, with documents repeated, tagged, cut and scattered."""
    folder = tmp_path_factory.mktemp("case")
    sources = [source(write(folder, "jsonl", rows), domain_field="kind", name="labelled")]
    if unlabelled:  # one document, all of whose tokens are trained
        rows = [*rows, row(list(range(WORDS - unlabelled, WORDS)), [True] * unlabelled, kind="web")]
        (folder / "plain.jsonl").write_text(json.dumps({"input_ids": rows[-1]["input_ids"]}))
        plain = folder / "plain.jsonl"
        sources.append(SourceConfig(path=str(plain), tokens_field="input_ids", domain="web", name="plain"))
    pack = PackConfig(
        policy=data.draw(st.sampled_from(Policy)),
        long_documents=data.draw(st.sampled_from(LongDocuments)),
        min_length=data.draw(st.integers(2, 3)),  # so that no EOS, which many have, is alone behind a tag
        interleave=data.draw(st.integers(1, 3)),
        domain_tags=data.draw(st.booleans()),
        prepend_bos=data.draw(st.booleans()),
    )
    append_eos = data.draw(st.booleans())
    made = config(
        folder, tokenizer, *sources, pack=pack, append_eos=append_eos, row_length=data.draw(st.integers(8, 50))
    )
    if unlabelled and data.draw(st.booleans()):
        made.mixture = MixtureConfig(weights={"labelled": 1, "plain": 2}, max_repeats=50.0)
    try:
        packed = prepare(made)
    except UserError as error:
        assert "no token of the corpus would be trained" in str(error) or "mixture" in str(error)
        return
    wanted = {pair for one in rows for pair in trained_pairs(one, append_eos)}
    for one in rows:  # behind a tag of its own, which each piece has, a token can be predicted too
        tag = TAGS[one["kind"]] if pack.domain_tags else BOS
        wanted |= {
            (tag, label) for label in one["labels"] if label != MASKED and (pack.domain_tags or pack.prepend_bos)
        }
    found, possible = pairs_of(packed)
    assert set(found) <= wanted  # nothing else is trained
    assert len(found) == sum(pair in wanted for pair in possible)  # and all of it that lies together in a row
    account = packed.manifest["accounting"]
    assert account["trained"] == len(found)
    came = account["document_tokens"] + account["eos_tokens"] + account["repeated"] - sum(account["dropped"].values())
    assert account["trained"] + account["first_tokens"] + account["zero_weight"] == came


def trained_pairs(one: dict[str, Any], append_eos: bool) -> list[tuple[int, int]]:
    """(predecessor, target) of what a row's labels train; its first token has no predecessor."""
    ids, labels = one["input_ids"], one["labels"]
    if append_eos:
        ids, labels = [*ids, EOS], [*labels, EOS if labels[-1] != MASKED else MASKED]
    return [(before, token) for before, token, label in zip(ids, ids[1:], labels[1:], strict=False) if label != MASKED]


def pairs_of(packed: PackedSet) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(predecessor, target) of the trained tokens of all rows, and of all tokens that follow their own document's."""
    trained, possible = [], []
    for each in map(packed.row, range(len(packed))):
        ids, weights, docs = each.input_ids.tolist(), each.loss_weights.tolist(), each.layout.token_docs().tolist()
        for at in range(1, len(ids)):
            if docs[at] == docs[at - 1]:
                possible.append((ids[at - 1], ids[at]))
            if weights[at]:
                trained.append((ids[at - 1], ids[at]))
    return trained, possible


def test_a_conversation_with_another_answer_trained_is_no_duplicate(tmp_path: Path, tokenizer: Path) -> None:
    ids, all_ = [5, 6, 7], [True, True, True]
    content = [row(ids, [False, False, True]), row(ids, [False, True, False]), row(ids, [False, False, True])]
    labelled = source(write(tmp_path, "jsonl", [*content, row(ids, all_)]))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"input_ids": ids}))
    plain = SourceConfig(path=str(tmp_path / "plain.jsonl"), tokens_field="input_ids")
    made = config(tmp_path, tokenizer, labelled, plain, mixture=MixtureConfig(deduplicate=True), append_eos=False)
    # the third is the first again, and a document without labels is one whose labels train all
    assert prepare(made).manifest["accounting"]["dropped"] == {"duplicate": 6}


def test_nothing_to_train(tmp_path: Path, tokenizer: Path) -> None:
    made = config(tmp_path, tokenizer, source(write(tmp_path, "jsonl", [row([5, 6], [True, False])])))
    with pytest.raises(UserError, match="no token of the corpus would be trained .* or unmask labels"):
        prepare(made)
    with pytest.raises(UserError, match="rows.jsonl:1 has no field kept"):
        prepare(replace(made, sources=[source(tmp_path / "rows.jsonl", labels_field="kept")]))
