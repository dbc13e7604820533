"""A tokenizer of one token a byte, and a small corpus, so that packed rows read back as the texts they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.sources.source import SourceConfig

TEXTS = [f"document {i}: " + "größer " * (i % 5) for i in range(12)]


def byte_tokenizer(folder: Path, **special: str) -> Path:
    """Save a tokenizer with the given special tokens into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special).save_pretrained(
        folder
    )
    return folder


def small_config(folder: Path, tokenizer: Path) -> PrepareConfig:
    """`TEXTS` in a file, to be packed into rows of 64."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrepareConfig(
        out_dir=str(folder / "out"), sources=[SourceConfig(path=str(corpus))], tokenizer=str(tokenizer), row_length=64
    )


def texts_in(packed: PackedSet) -> list[str]:
    """The texts of the set's documents, sorted; only of sets without split documents."""
    tokenizer, pad = packed.tokenizer(), packed.manifest["pad_id"]
    found = []
    for row in map(packed.row, range(len(packed))):
        docs = row.layout.token_docs()
        for doc in np.unique(docs[1:]):
            ids = row.input_ids[docs == doc]
            if ids[0] != pad:
                found.append(tokenizer.decode(ids[ids != tokenizer.eos_token_id]))
    return sorted(found)
