"""What an evaluation is: it takes a model and yields results, and says how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.results import Result

Progress = Callable[[int, int], None]
"""Called with (tokens done since the last call, tokens in all)."""


class Evaluator(Protocol):
    """One evaluation with its settings; it runs on any causal language model of transformers."""

    name: str
    """As in `evals=[...]`."""

    def longest(self) -> int:
        """Longest input, in tokens, that the evaluation gives to a model."""
        ...

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Iterator[Result]:
        """Evaluate; yields rows without manifest, which the runner fills in."""
        ...


def anchor_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands in front of every document: BOS, else EOS; UserError when there is neither."""
    from anchorctx.errors import UserError

    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} has neither a BOS nor an EOS token to stand in front of documents: "
        "set bos_token in its tokenizer_config.json"
    )
