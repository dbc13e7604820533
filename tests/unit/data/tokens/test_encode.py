from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from anchorctx.data.sources.documents import Document
from anchorctx.data.tokens import encode as tokenize_module
from anchorctx.data.tokens.encode import Encoder, tokenize
from anchorctx.data.tokens.tokenizer import SpecialIds, load_tokenizer, serialized, tokenizer_fingerprint, vocab_size
from anchorctx.errors import UserError


def texts(count: int = 200) -> list[str]:
    rng = np.random.default_rng(0)
    words = np.array(["def ", "return ", "über\n", "<key_01><val_02>", "self.", " ", "</s>", "日本"])
    return ["".join(rng.choice(words, rng.integers(1, 60))) for _ in range(count)]


def documents() -> list[Document]:
    return [Document(text, f"f:{i}", "d") for i, text in enumerate(texts())]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_tokenizers_own_ids(
    tokenizer: PreTrainedTokenizerFast, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_module, "BATCH_CHARS", 1000)  # many batches, so that the order could be mixed up
    found = list(tokenize(documents(), Encoder.of(tokenizer), workers))
    assert [tokens.source for tokens in found] == [document.source for document in documents()]
    assert {tokens.domain for tokens in found} == {"d"}
    for tokens, text in zip(found, texts(), strict=True):
        assert tokens.ids.dtype == np.uint32
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens.ids.tolist() == expected and tokens.written == text.count("</s>")


def test_a_tokenizer_without_a_fast_backend(tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        is_fast = False
        all_special_tokens = ("b",)

        def encode(self, text: str, **options: object) -> list[int]:
            assert options == {"add_special_tokens": False, "verbose": False, "split_special_tokens": True}
            return [ord(c) for c in text]

    texts = [Document("ab", "x"), Document("c", "y")]
    found = list(tokenize(texts, Encoder.of(Slow()), workers=4))  # type: ignore[arg-type]
    assert [tokens.ids.tolist() for tokens in found] == [[97, 98], [99]]
    assert [tokens.written for tokens in found] == [1, 0]


def test_documents_are_read_as_they_are_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_module, "BATCH_DOCUMENTS", 2)
    read = []

    def endless() -> Iterator[Document]:
        number = 0
        while True:
            read.append(number)
            yield Document("text", str(number))
            number += 1

    stream = tokenize(endless(), Encoder.of(tokenizer), 1)
    assert [next(stream).source for _ in range(5)] == ["0", "1", "2", "3", "4"]
    stream.close()  # type: ignore[attr-defined]
    assert len(read) < 20


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_source_arrives(tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
    def broken() -> Iterator[Document]:
        yield Document("fine", "1")
        raise UserError("line 2 is broken")

    with pytest.raises(UserError, match="line 2 is broken"):
        list(tokenize(broken(), Encoder.of(tokenizer), workers))


def test_workers_stay_light() -> None:
    code = "import sys, anchorctx.data.tokens.encode; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the tokenizer itself ---------------------------------------------------------------------------------------------


def bare(**special: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "[UNK]": 9}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, SpecialIds(2, 3, 3)),
        ({"bos_token": "<s>"}, SpecialIds(2, None, 2)),
        ({"eos_token": "</s>"}, SpecialIds(3, 3, 3)),
    ],
)
def test_anchor_is_bos_else_eos(special: dict[str, str], expected: SpecialIds) -> None:
    assert SpecialIds.of(bare(**special)) == expected


def test_neither_bos_nor_eos() -> None:
    with pytest.raises(UserError, match="neither a BOS nor an EOS token to be the anchor: set its bos_token"):
        SpecialIds.of(bare())


def test_gaps_in_the_vocabulary_count() -> None:
    assert vocab_size(bare()) == 10


def test_no_such_tokenizer(tmp_path: object) -> None:
    with pytest.raises(UserError, match="cannot be loaded.*name a folder with a tokenizer"):
        load_tokenizer(f"{tmp_path}/nothing")


def test_fingerprint_is_of_what_decides_the_ids(tokenizer: PreTrainedTokenizerFast, tokenizer_dir: str) -> None:
    loaded = load_tokenizer(tokenizer_dir)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    loaded("text", truncation=True, max_length=1)  # leaves its truncation set
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert serialized(loaded) == serialized(tokenizer)
    loaded.add_tokens(["another"])
    assert tokenizer_fingerprint(loaded) != tokenizer_fingerprint(tokenizer)
    other = load_tokenizer(tokenizer_dir)
    other.eos_token = "<s>"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
