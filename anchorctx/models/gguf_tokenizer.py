"""The tokenizer of a GGUF file as a plain one that loads in the same way everywhere, and whether it can be trusted.

transformers rebuilds it from the file's vocabulary and merges. What the file does not have is how text is split before
it is merged: it only names a rule, of which transformers knows some. A wrong rule gives ids that decode to the same
text and that the model has not been trained on.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

TEXTS = (
    "The quick brown fox jumps over the lazy dog; it's 12,345.67 metres away (isn't it?).",
    "def f(x):\n    return [x + 1 for _ in range(10)]  # twice\n\n\n\tend",
    "Zürich, naïve, señor, Ελληνικά, русский, 日本語, 한국어, العربية 😀",
)
"""What must come back as it went in."""
GPT2 = ("gpt-2", "gpt2", "default")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""llama.cpp's names for: each digit apart, the rest as GPT-2 splits it (`llama_vocab::impl::load`, MIT licence)."""
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""A token's role here, and in the file's metadata."""
CONTROL = 3
"""llama.cpp's type of tokens that text does not contain."""


def convert_tokenizer(file: Path, reader: Any, read: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The checked tokenizer.

    Args:
        file: the GGUF file, for messages.
        reader: gguf's `GGUFReader` on it.
        read: what transformers makes of it.

    Raises:
        UserError: it does not give back text, or its tokens are not those of the file.
    """
    tokens = _value(reader, "tokens") or []
    rules = json.loads(read.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    # transformers adds GPT-2's <|endoftext|> to vocabularies without it: an id beyond the model's embedding.
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] < len(tokens)]
    backend: Any = Tokenizer.from_str(json.dumps(rules))
    rule = _value(reader, "pre")
    if _value(reader, "model") == "gpt2":
        if rule in SINGLE_DIGITS:
            digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
        elif rule not in _known_rules():
            logger.warning(
                "the tokenizer of %s splits text by a rule that is not known here (%s) and is read with GPT-2's: its "
                "ids may differ from the model's own; where you can, name the original tokenizer", file, rule
            )  # fmt: skip
    ids = {role: _value(reader, f"{theirs}_token_id") for role, theirs in ROLES.items()}
    roles = {f"{role}_token": tokens[number] for role, number in ids.items() if number is not None}
    # Of the general class, whose folder is read back as it is: LlamaTokenizer would build another from the vocabulary.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = read.chat_template
    _check(file, reader, tokenizer)
    return tokenizer


def _check(file: Path, reader: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    for role, theirs in ROLES.items():
        given, found = _value(reader, f"{theirs}_token_id"), getattr(tokenizer, f"{role}_token_id")
        if given is not None and given != found:
            raise _untrue(file, f"its {role} token is {found} instead of {given}")
    tokens, kinds = _value(reader, "tokens") or [], _value(reader, "token_type") or []
    if len(tokenizer) != len(tokens):
        raise _untrue(file, f"it has {len(tokenizer)} tokens instead of {len(tokens)}")
    known = tokenizer.get_vocab()
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == CONTROL and token in known and tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise _untrue(file, f"{token} is not read as the one token {number}")
    for text in TEXTS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        if back != text:
            raise _untrue(file, f"{text!r} comes back as {back!r}")


def _untrue(file: Path, reason: str) -> UserError:
    return UserError(
        f"the tokenizer of {file} is not what the file says ({reason}): take the model as a Hugging Face folder"
    )


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()


def _known_rules() -> set[str | None]:
    """Rules that transformers applies by itself; the empty set in versions that have no list of them."""
    known: set[str | None] = {None, *GPT2}
    with contextlib.suppress(ImportError):
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        known |= set(GGUF_PRE_TOKENIZER_SPLITS)
    return known
