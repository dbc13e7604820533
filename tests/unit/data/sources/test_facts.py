from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchorctx.data.sources import facts
from anchorctx.errors import UserError


def byte_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    tokenizer.add_tokens(special)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(facts.SPECIAL_TOKENS)


def test_planting_keeps_the_text_and_states_each_key_once_then_asks():
    text = "".join(f"line {i}\n" for i in range(50)) + "no newline at the end"
    planted = facts.plant(text, np.random.default_rng(0), facts=20, mentions=3)
    assert re.sub(r"<\w+>", "", planted) == text
    pairs = re.findall(r"(<key_\d\d>)(<val_\d\d>)", planted)
    assert len(pairs) == 60 and len(set(pairs)) == len({key for key, _ in pairs}) == 20
    for match in re.finditer(r"(?:<\w+>)+", planted):
        before = planted[: match.start()]
        assert before == "" or before.endswith("\n") or match.end() == len(planted)


def test_only_newlines_are_line_boundaries():
    assert facts.lines_of("a\x0cb\u2028c\r\nd") == ["a\x0cb\u2028c\r\n", "d"]


@pytest.mark.parametrize("number", [0, 65])
def test_a_document_takes_at_most_one_fact_a_key(number: int):
    with pytest.raises(ValueError, match="1 to 64"):
        facts.plant("text\n", np.random.default_rng(0), number)


def naive_weights(tokens: list[str]) -> list[float]:
    """The definition, token by token."""
    weights, stated = [], set()
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else ""
        if token.startswith("<val") and before.startswith("<key"):
            weights.append(1.0 if before in stated else 0.0)
            stated.add(before)
        else:
            weights.append(0.0 if token.startswith(("<key", "<val")) else facts.TEXT_WEIGHT)
    return weights


@pytest.mark.parametrize("seed", range(5))
def test_loss_weights_are_the_definition(tokenizer: PreTrainedTokenizerFast, seed: int):
    rng = np.random.default_rng(seed)
    text = facts.plant("x = 1\ny = 2\n" * 20, rng, facts=30, mentions=3)
    ids = np.array(tokenizer(text)["input_ids"])[rng.integers(0, 80) :]  # cut, as a packer cuts
    weights = facts.loss_weights(ids, tokenizer)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.float32(naive_weights(tokenizer.convert_ids_to_tokens(ids.tolist()))))
    assert (weights == 1).any()


def test_stray_facts_weigh_nothing(tokenizer: PreTrainedTokenizerFast):
    ids = np.array(tokenizer("<val_01>a<key_01>b<key_02><val_01><key_02>")["input_ids"])
    assert facts.loss_weights(ids, tokenizer) == pytest.approx([0, 0.1, 0, 0.1, 0, 0, 0])
    assert facts.loss_weights(ids[:0], tokenizer).shape == (0,)


def test_a_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(UserError, match="has no token <key_00>.*SPECIAL_TOKENS"):
        facts.loss_weights(np.array([1]), byte_tokenizer([]))


@pytest.mark.parametrize(("text_tokens", "number", "mentions"), [(0, 8, 2), (0, 1, 4), (40, 8, 2), (300, 64, 3)])
def test_rows_are_documents_with_facts(
    tokenizer: PreTrainedTokenizerFast, text_tokens: int, number: int, mentions: int
):
    rng = np.random.default_rng(1)
    text = rng.integers(0, 256, size=(6, text_tokens))
    line_start = rng.random(text.shape) < 0.2
    tokens, bos = facts.FactTokens.of(tokenizer), int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    rows = facts.fact_rows(rng, tokens, bos, text, line_start, facts=number, mentions=mentions)
    assert rows.ids.shape == (6, 1 + text_tokens + 2 * number * mentions)
    for i, ids in enumerate(rows.ids):
        assert ids[0] == bos
        np.testing.assert_array_equal(ids[rows.text[i]], text[i])
        np.testing.assert_array_equal(rows.answers[i], facts.loss_weights(ids, tokenizer) == 1)
        assert rows.answers[i].sum() == number * (mentions - 1)
        keys = np.flatnonzero(np.isin(ids, tokens.keys))
        assert len({(ids[k], ids[k + 1]) for k in keys}) == len({ids[k] for k in keys}) == number
        starts = np.flatnonzero(rows.text[i])[line_start[i]]
        after = [k + 2 for k in keys if k + 2 == rows.ids.shape[1] or k + 2 not in keys]
        assert set(after) <= {*starts.tolist(), rows.ids.shape[1]}


def test_rows_are_a_function_of_the_seed(tokenizer: PreTrainedTokenizerFast):
    tokens, text = facts.FactTokens.of(tokenizer), np.zeros((3, 20), dtype=int)

    def draw(seed: int) -> np.ndarray:
        return facts.fact_rows(np.random.default_rng(seed), tokens, 0, text, text == 0, facts=4).ids

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
