"""What an evaluation is: it takes a model, yields results unit by unit, and reports its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.parts import Parts
from anchorctx.records.results import Result

Progress = Callable[[int, int], None]
"""Called with (done since the last call, total of this unit), in what the evaluator `counts`."""
Unit = dict[str, Any]
"""The part of a result's `context` that names one unit of an evaluation, such as `{"length": 4096}`; `{}` is all of
it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under evaluation, loaded."""

    model: PreTrainedModel
    """In evaluation mode, on its device(s)."""
    tokenizer: PreTrainedTokenizerBase
    root: torch.nn.Module | None = None
    """While a model trains: the engine's module. It must be called through this one, so that ZeRO-3's hooks gather."""
    folder: Path | None = None
    """Where an evaluation may leave more than its rows, beside results.jsonl; None where nothing may be written."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be evaluated, before any weight is read."""

    label: str
    path: str
    """Hugging Face folder or hub name."""
    config: PretrainedConfig
    """With all changes that were asked for."""
    tokenizer: PreTrainedTokenizerBase
    changes: dict[str, Any]
    """Fields of the saved configuration that were changed."""


class Evaluator(Protocol):
    """One evaluation with its settings; it runs on any causal language model of transformers."""

    name: str
    """As in `evals=[...]`."""
    counts: str
    """What its progress counts: `tok`, `req` or `problem`."""

    def longest(self) -> int:
        """Longest input, in tokens, that the evaluation gives to a model; 0 when it keeps to the model's own limit."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON of everything that its numbers depend on, except the model, the documents, the seed and its units."""
        ...

    def units(self) -> list[Unit]:
        """The units, which are run and written one by one; the numbers of one do not depend on the others."""
        ...

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError when it cannot be done with this tokenizer; called before anything starts."""
        ...

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """Evaluate one unit; yields rows with `unit` in their context and without manifest, which the runner fills in.

        With several processes, each of them calls it, and all yield the same rows.
        """
        ...


@runtime_checkable
class Concluding(Protocol):
    """An evaluation with closing rows that follow from all its other rows."""

    def conclude(self, rows: Sequence[Result]) -> list[Result]:
        """Rows without manifest, from those of all units."""
        ...


@runtime_checkable
class Counting(Protocol):
    """An evaluation that knows beforehand how much there is to do in each unit."""

    def size(self, unit: Unit) -> int:
        """The total of what its progress counts."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """An evaluation whose units are long enough to be gone on with in their middle."""

    def resume(self, subject: Subject, unit: Unit, progress: Progress, parts: Parts) -> Iterator[Result]:
        """As `run`, which it is with no parts: what `parts` holds is not measured again, and what is new goes there."""
        ...


def settings_of(config: Any, owner: type, *without: str) -> dict[str, Any]:
    """The fields of the dataclass `owner` in `config`, which may be of a class derived from it, as plain JSON."""
    values = dataclasses.asdict(config)
    return {field.name: values[field.name] for field in dataclasses.fields(owner) if field.name not in without}


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of held-out texts, without special tokens: `</s>` written in one is text, as it is to `prepare`."""
    encoded = (
        tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True) if texts else {"input_ids": []}
    )
    return encoded["input_ids"]  # type: ignore[return-value]


def anchor_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands in front of every document: BOS, else EOS; UserError when there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} has neither a BOS nor an EOS token to stand in front of documents: "
        "set bos_token in its tokenizer_config.json"
    )
