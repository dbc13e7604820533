"""One tokenizer in several forms, and several that look like one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.models import ModelConfig
from anchorctx.models.build import check_vocabulary, load_model
from anchorctx.testing.tiny import save, text_model, word_tokenizer
from anchorctx.train.config import DataConfig, TrainConfig
from anchorctx.train.tokenizer import difference, trained_tokenizer

Change = Callable[[Tokenizer], None]


def words(change: Change | None = None) -> PreTrainedTokenizerFast:
    rules = Tokenizer.from_str(word_tokenizer(40).backend_tokenizer.to_str())
    if change is not None:
        change(rules)
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def rows(
    folder: Path, tokenizer: PreTrainedTokenizerFast, place: str = "tokenizer", keep_tokens: bool = False
) -> PackedSet:
    tokenizer.save_pretrained(folder / place)
    (folder / "corpus.txt").write_text("w5 w6 w7 w8 w9 w10 w11 w12\n" * 20)
    source = SourceConfig(path=str(folder / "corpus.txt"))
    out, name = str(folder / "packed"), str(folder / place)
    return prepare(
        PrepareConfig(out_dir=out, sources=[source], tokenizer=name, row_length=32, workers=1, keep_tokens=keep_tokens)
    )


def lowercase(rules: Tokenizer) -> None:
    rules.normalizer = normalizers.Lowercase()  # type: ignore[assignment]


def added(rules: Tokenizer) -> None:
    rules.add_tokens([AddedToken("<speaker>", normalized=False)])


def truncation(rules: Tokenizer) -> None:
    rules.enable_truncation(4)
    rules.enable_padding(length=16, pad_id=2, pad_token="</s>")


def begin(rules: Tokenizer) -> None:
    rules.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]


def other_ids(rules: Tokenizer) -> None:
    vocabulary = rules.get_vocab()
    turned = {word: 42 - i if i > 2 else i for word, i in vocabulary.items()}
    rules.model = models.WordLevel(turned, unk_token="<unk>")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # huggingface/tokenizers #695: one is cased and the other is not
        (lowercase, "both have the same tokens, but they cut texts differently: by their normalizer"),
        # sillsdev/silnlp #1035, huggingface/transformers #12763: a token that was added before the corpus was prepared
        (added, "id 40 is '<speaker>' in the rows and nothing to the model"),
        # MinishLab/model2vec #374, huggingface/transformers #5444: lengths that somebody's use left in tokenizer.json
        (truncation, None),
        # huggingface/transformers #26287: a BOS that only a template adds
        (begin, None),
    ],
)
def test_what_decides_the_ids_of_a_text(change: Change, said: str | None) -> None:
    assert difference(words(change), words()) == said


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<s>", "a", "b", "c", "ab", "bc", "abc"])}
    rules = Tokenizer(models.BPE(vocabulary, merges))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>")


MERGES = [("a", "b"), ("b", "c"), ("ab", "c")]


# huggingface/swift-transformers #131, robertknight/rten #392, JustVugg/colibri #1319: two spellings of one list
def test_merges_in_their_older_spelling_are_the_same(tmp_path: Path) -> None:
    bpe(MERGES).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    rules = json.loads(file.read_text())
    assert rules["model"]["merges"] == [list(pair) for pair in MERGES]
    rules["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    file.write_text(json.dumps(rules))
    older = AutoTokenizer.from_pretrained(tmp_path)
    assert difference(older, bpe(MERGES)) is None and older("abc").input_ids == [6]


def test_merges_in_another_order_are_others() -> None:
    """Beside them: the tokens are the same, and `abc` is cut into others."""
    assert difference(bpe([MERGES[1], MERGES[0], MERGES[2]]), bpe(MERGES)) == (
        "both have the same tokens, but they cut texts differently: by their model"
    )


# MinishLab/model2vec #374 and the like: a corpus is not cut at anybody's length
def test_a_length_in_tokenizer_json_does_not_cut_a_corpus(tmp_path: Path) -> None:
    cut, whole = rows(tmp_path / "a", words(truncation)), rows(tmp_path / "b", words())
    assert cut.manifest["trained_tokens"] == whole.manifest["trained_tokens"] > 150
    assert list(cut.row(0).input_ids) == list(whole.row(0).input_ids)


# axolotl-ai-cloud/axolotl #1265, #885, mosaicml/composer #1061, dhruvdcoder/xlm-core #50: what is kept of a corpus
# under one tokenizer is not taken for another's of its class and size, of another name or of the same
@pytest.mark.parametrize("keep_tokens", [False, True])
@pytest.mark.parametrize("place", ["another", "tokenizer"])
def test_what_another_tokenizer_made_is_not_used_again(place: str, keep_tokens: bool, tmp_path: Path) -> None:
    first = rows(tmp_path, words(), keep_tokens=keep_tokens)
    second = rows(tmp_path, words(other_ids), place, keep_tokens=keep_tokens)
    assert first.fingerprint != second.fingerprint
    assert (first.row(0).input_ids[1], second.row(0).input_ids[1]) == (5, 37)


# QwenLM/Qwen #553, mosaicml/llm-foundry #590, zai-org/ChatGLM2-6B #378: a vocabulary that is larger than its tokenizer
def test_a_model_may_have_more_ids_than_its_tokenizer(tmp_path: Path) -> None:
    packed = rows(tmp_path, words())
    path = str(save(text_model(word_tokenizer(64), 64), words(), tmp_path / "model"))
    config = TrainConfig(out_dir="x", data=DataConfig(train="x"), model=ModelConfig(path=path))
    assert len(trained_tokenizer(config, packed)) == 40
    model = load_model(config.model)
    check_vocabulary(model, 40)
    assert model.config.vocab_size == 64  # and is never resized
