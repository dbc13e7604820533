"""Do a packed set, a tokenizer and a checkpoint belong together? Ids of equal number may mean other tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError
from anchorctx.models import ModelConfig
from anchorctx.testing.tiny import save, text_model, word_tokenizer
from anchorctx.train.config import DataConfig, TokenizerOf, TrainConfig
from anchorctx.train.tokenizer import trained_tokenizer


def reversed_words(size: int) -> PreTrainedTokenizerFast:
    """The words of `word_tokenizer`, under other ids."""
    rules = word_tokenizer(size).backend_tokenizer.to_str()
    for i in range(3, size):
        rules = rules.replace(f'"w{i}":{i}', f'"w{size + 2 - i}":{i}')
    return of(Tokenizer.from_str(rules))


def of(tokenizer: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | roles
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


@pytest.fixture
def packed(tmp_path: Path) -> PackedSet:
    """Rows of `word_tokenizer(40)`."""
    (tmp_path / "corpus.txt").write_text("w5 w6 w7 w8 w9 w10 w11 w12\n" * 20)
    word_tokenizer(40).save_pretrained(tmp_path / "words")
    source = SourceConfig(path=str(tmp_path / "corpus.txt"))
    config = PrepareConfig(
        out_dir=str(tmp_path / "packed"), sources=[source], tokenizer=str(tmp_path / "words"), row_length=32
    )
    return prepare(config)


def training(path: Path | None, **data: Any) -> TrainConfig:
    model = ModelConfig(path=None if path is None else str(path), config={} if path else {"model_type": "llama"})
    return TrainConfig(out_dir="x", data=DataConfig(train="x", **data), model=model)


def checkpoint(tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    return save(text_model(tokenizer, 64), tokenizer, path)


# decoderesearch/SAELens #146, Lightning-AI/litgpt #471, marin-community/marin #301
def test_rows_of_another_tokenizer_of_equal_size_are_refused(packed: PackedSet, tmp_path: Path) -> None:
    other = checkpoint(reversed_words(40), tmp_path / "other")
    with pytest.raises(UserError, match=r"\(id 3 is 'w3' in the rows and 'w39' to the model\): prepare it with"):
        trained_tokenizer(training(other), packed)
    # meant: the model learns these ids, so that the export gets the rows' tokenizer
    found = trained_tokenizer(training(other, tokenizer=TokenizerOf.other), packed)
    assert found("w5").input_ids == [5]


# as above: equal tokens, but a text is cut into others
def test_rows_that_were_cut_otherwise_are_refused(packed: PackedSet, tmp_path: Path) -> None:
    rules = Tokenizer.from_str(word_tokenizer(40).backend_tokenizer.to_str())
    rules.pre_tokenizer = pre_tokenizers.Split("-", "removed")  # type: ignore[assignment]
    other = checkpoint(of(rules), tmp_path / "other")
    with pytest.raises(UserError, match="both have the same tokens, but they cut texts differently: by their pre-tok"):
        trained_tokenizer(training(other), packed)


# ids that the model's tokenizer does not have
def test_rows_with_more_tokens_than_the_model_has_are_refused(packed: PackedSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"id 30 is 'w30' in the rows and nothing to the model"):
        trained_tokenizer(training(checkpoint(word_tokenizer(30), tmp_path / "less")), packed)


def base(path: Path) -> PreTrainedTokenizerFast:
    return word_tokenizer(40)


def chat(path: Path) -> PreTrainedTokenizerFast:
    """An instruct model's: roles, a template and tokens of its own, and the same ids for every text."""
    tokenizer = of(Tokenizer.from_str(word_tokenizer(40).backend_tokenizer.to_str()), eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def saved_again(path: Path) -> PreTrainedTokenizerFast:
    word_tokenizer(40).save_pretrained(path / "again")
    return AutoTokenizer.from_pretrained(path / "again")


# decoderesearch/SAELens #146: one tokenizer under several names must not be taken for several
@pytest.mark.parametrize("tokenizer", [base, chat, saved_again])
def test_tokenizers_that_give_the_same_ids_belong_together(
    tokenizer: Any, packed: PackedSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tokenizer(tmp_path)
    found = trained_tokenizer(training(checkpoint(own, tmp_path / "model")), packed)
    # and the export holds the model's own, with its roles and template
    assert (found.eos_token, found.chat_template) == (own.eos_token, own.chat_template)
    assert not caplog.messages


def test_a_new_model_takes_the_tokenizer_of_the_rows(packed: PackedSet) -> None:
    assert trained_tokenizer(training(None), packed).get_vocab() == word_tokenizer(40).get_vocab()


def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_rows_and_this_is_said(
    packed: PackedSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text_model(word_tokenizer(40), 64).save_pretrained(tmp_path / "bare")
    with caplog.at_level(logging.WARNING):
        found = trained_tokenizer(training(tmp_path / "bare"), packed)
    assert found.get_vocab() == word_tokenizer(40).get_vocab()
    assert "its rows' tokenizer is taken for it" in caplog.text
