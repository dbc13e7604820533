"""The tokenizer: loading it, what identifies it, and which of its tokens serve as anchor, end and padding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from anchorctx.errors import UserError
from anchorctx.records.manifest import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecialTokens(StrEnum):
    """What becomes of a special token's name in a document, such as `</s>` in a page about tokenizers."""

    text = "text"
    """It is text, like any other."""
    control = "control"
    """It is that token: ends a document, begins a turn."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids with a role in a packed row."""

    anchor: int
    """The anchor: BOS, else EOS."""
    eos: int | None
    """Appended to documents; None when the tokenizer has no EOS."""
    pad: int
    """Fills the end of a row: EOS, else BOS. Never trained, so that any id would do."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
        """UserError when the tokenizer has neither BOS nor EOS."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        anchor = bos if bos is not None else eos
        if anchor is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise UserError(
                f"the tokenizer {name} has neither a BOS nor an EOS token to be "
                "the anchor: set its bos_token and save it again"
            )
        return cls(int(anchor), None if eos is None else int(eos), int(anchor if eos is None else eos))  # type: ignore[arg-type]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load from a folder or the hub; UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # anything from a malformed JSON file to a missing package
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"tokenizer={name} cannot be loaded ({reason}): name a folder with a tokenizer, or a model on the hub"
        ) from error


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; `len(tokenizer)` unless the vocabulary has gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Twelve hex digits over everything that decides which ids a text gets, and over the special tokens."""
    content = {
        "rules": serialized(tokenizer) or [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return fingerprint(content)


def serialized(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The fast tokenizer as JSON, without truncation and padding; None when it is a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        return None
    rules = json.loads(backend.to_str())
    rules["truncation"] = rules["padding"] = None
    return json.dumps(rules, ensure_ascii=False)
