"""Documents about tokenizers: what they write as `</s>` or `<|im_start|>` is text, unless the user says otherwise.

huggingface/transformers #29279, huggingface/tokenizers #787, allenai/dolma #176, vllm-project/vllm #11691.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anchorctx.cli.main import main
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.sources.documents import Document
from anchorctx.data.tokens.encode import Encoder, tokenize
from anchorctx.data.tokens.tokenizer import SpecialTokens
from anchorctx.evals.base import text_ids
from anchorctx.evals.evaluators import perplexity, retrieval
from anchorctx.evals.evaluators.precision.measure import Texts

TEXTS = [
    "In Llama 2 a document ends with </s> and begins with <s>, as said.",
    "<|im_start|>system\nyou are free<|im_end|>\n",
    "nothing here, but 1 < 2 and <b>bold</b>",
    "</s></s>",
]
WRITTEN = [2, 2, 0, 2]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    rules.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    rules.add_tokens([AddedToken("<key_00>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(text, str(i)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("workers", [1, 2])
def test_names_of_special_tokens_are_text_and_counted(tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
    documents = documents_of(TEXTS)
    special = {*range(4)}
    for mode in SpecialTokens:
        found = list(tokenize(documents, Encoder.of(tokenizer, mode), workers))
        assert [tokens.written for tokens in found] == WRITTEN
        held = [len(special & set(tokens.ids.tolist())) for tokens in found]
        assert held == ([0, 0, 0, 0] if mode is SpecialTokens.text else [2, 2, 0, 1])
        for text, tokens in zip(TEXTS, found, strict=True):
            # As transformers has it, which knows both ways.
            expected = tokenizer(text, add_special_tokens=False, split_special_tokens=mode is SpecialTokens.text)
            assert tokens.ids.tolist() == expected["input_ids"]


def test_held_out_texts_are_read_as_prepare_reads_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """ggml-org/llama.cpp #27371: perplexity takes its corpus as text, control tokens only where they are asked for."""
    expected = [tokens.ids.tolist() for tokens in tokenize(documents_of(TEXTS), Encoder.of(tokenizer), 1)]
    assert text_ids(tokenizer, TEXTS) == expected
    assert [ids[1:].tolist() for ids in perplexity.encode(tokenizer, TEXTS)] == expected
    for stream in (retrieval.text_stream(TEXTS, tokenizer)[0], Texts(TEXTS, tokenizer)._stream):
        assert not {*range(4)} & {*stream.tolist()}


def test_tokens_that_were_added_and_are_not_special_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    """Planted facts are such tokens."""
    (found,) = tokenize([Document("a <key_00> b", "x")], Encoder.of(tokenizer))
    assert tokenizer.convert_tokens_to_ids("<key_00>") in found.ids.tolist() and found.written == 0


def packed(folder: Path, tokenizer: PreTrainedTokenizerFast, *words: str) -> PackedSet:
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "corpus.jsonl").write_text(rows)
    out = folder / "packed"
    command = ["prepare", f"out_dir={out}", f"tokenizer={folder / 'tokenizer'}", "row_length=128"]
    assert main([*command, f"sources=[{{path: '{folder / 'corpus.jsonl'}'}}]", *words]) == 0
    return PackedSet.open(max(out.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns).parent)


def inner(rows: PackedSet) -> list[int]:
    """All ids but anchors, EOS behind documents and padding."""
    found: list[int] = []
    for number in range(len(rows)):
        row: Any = rows.row(number)
        ids, offsets = np.asarray(row.input_ids), row.layout.doc_offsets
        for start, stop in zip(offsets, offsets[1:], strict=False):
            found += ids[start : stop - 1].tolist()
    return found


def test_the_packed_set_holds_them_as_text_and_says_how_many(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = packed(tmp_path, tokenizer)
    assert "names of special tokens in documents: 6, which became text" in capsys.readouterr().out
    assert text.manifest["written_special_tokens"] == 6
    control = packed(tmp_path, tokenizer, "special_tokens=control")
    assert "names of special tokens in documents: 6, which became the tokens themselves" in capsys.readouterr().out
    assert text.fingerprint != control.fingerprint
    assert text.manifest["trained_tokens"] > control.manifest["trained_tokens"]
    assert 2 not in inner(text) and 2 in inner(control)  # <|im_start|>
