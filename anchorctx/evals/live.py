"""Cheap evaluations of a model while it trains: the same evaluators, on the current weights.

`LiveEvals` fits `train.callbacks.Probe`, but neither side imports the other; the command line puts them together. The
model attends by layouts and may be spread over processes (ZeRO-3): `scoring.score` gives it a layout of one document
a row and calls it through the engine's module, whose hooks gather one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Evaluator, Subject
from anchorctx.evals.config import LiveConfig, LiveName
from anchorctx.evals.corpus import Corpus
from anchorctx.evals.evaluators.needle import NeedleMap
from anchorctx.evals.evaluators.perplexity import ContextPerplexity, Perplexity
from anchorctx.evals.evaluators.retrieval import Retrieval
from anchorctx.models import reach
from anchorctx.records.results import Result
from anchorctx.settings import check_ranges


class LiveEvals:
    """A probe of the training loop; see the module."""

    def __init__(self, config: LiveConfig) -> None:
        self.every = config.every
        check_ranges(config, "live")
        if not config.evals:
            raise UserError(f"live.evals=[] asks for nothing: choose from {', '.join(LiveName)}, or live.every=0")
        texts = Corpus(config.corpus)
        made = {
            LiveName.perplexity: lambda: Perplexity(config.perplexity, texts),
            LiveName.perplexity_by_context: lambda: ContextPerplexity(config.context, texts),
            LiveName.retrieval: lambda: Retrieval(config.retrieval, texts, config.seed),
            LiveName.needle: lambda: NeedleMap(config.needle, texts, config.seed),
        }
        self._evaluators: list[Evaluator] = [made[name]() for name in dict.fromkeys(config.evals)]

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError for lengths that the model does not reach, and whatever else an evaluation refuses."""
        limit = reach(model.config)
        for evaluator in self._evaluators:
            if evaluator.longest() > limit:
                raise UserError(
                    f"live.evals={evaluator.name} asks for {evaluator.longest()} tokens, but the model reaches "
                    f"{limit}: lower the lengths under live, or raise model.max_length"
                )
            evaluator.check(tokenizer)

    def measure(self, root: torch.nn.Module, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
        """Metrics named eval/..., the same on every process."""
        # Evaluators see an ordinary Subject; `root` alone tells the scoring that the parameters may be sharded.
        subject = Subject(model, tokenizer, root)
        return {
            name: row.value
            for evaluator in self._evaluators
            for unit in evaluator.units()
            for row in evaluator.run(subject, unit, _ignore)
            for name in _names(row)
        }


def _names(row: Result) -> Iterator[str]:
    """`eval/retrieval_accuracy_4096`; none for perplexity by position, which would be a dozen curves."""
    # Rows by position are those with a `start`.
    if "start" not in row.context:
        where = [str(row.context[key]) for key in ("length", "context_length", "depth") if key in row.context]
        yield "_".join([f"eval/{row.metric}", *where])


def _ignore(done: int, total: int) -> None:
    """The training's own bar is on the screen."""
