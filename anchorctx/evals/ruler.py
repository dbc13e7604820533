"""RULER (arXiv 2404.06654) by lm-eval, at a list of lengths; six of its thirteen tasks need no download.

Each (task, length) is a call of lm-eval of its own, so that it has the data and the numbers of
`lm_eval --tasks TASK --metadata '{"max_seq_lengths": [LENGTH]}'`, whatever ran before it.

Two of lm-eval's generators of documents never end when the length is too short for the tokenizer: they draw again
until a document fits. `shortest` draws the smallest documents beforehand, and the length is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit
from anchorctx.evals.harness import (
    HarnessConfig,
    check_known,
    fetch_data,
    leaves,
    ruler_module,
    run_tasks,
    task_index,
    task_manager,
)
from anchorctx.results import Result, mean_interval, wilson_interval

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Tasks whose documents are made of nothing but words and numbers."""
FOLDER = "ruler"
DRAWS = 20
"""Smallest documents drawn to see how long they get; lm-eval draws until one fits, so that the longest is enough."""


@dataclass(kw_only=True, slots=True)
class RulerConfig(HarnessConfig):
    """Which tasks, and how long."""

    tasks: list[str] = field(default_factory=lambda: list(OFFLINE))
    """RULER's tasks; [ruler] is all thirteen, seven of which need the hub for essays and questions."""
    lengths: list[int] = field(default_factory=lambda: [4096])
    """Lengths in tokens, the answer included."""


class Ruler:
    """See the module; a unit is a task at a length."""

    name = "ruler"
    counts = "req"

    def __init__(self, config: RulerConfig) -> None:
        self.config = config
        self._index: dict[str, Any] | None = None
        if not config.tasks or min(config.lengths, default=0) < 1:
            raise UserError(
                f"ruler.tasks={config.tasks} and ruler.lengths={config.lengths} must name at least one each, and "
                "lengths are in tokens"
            )

    def longest(self) -> int:
        """See Evaluator."""
        return max(self.config.lengths)

    def settings(self) -> dict[str, Any]:
        """See Evaluator."""
        names = ("limit", "max_length", "add_bos_token", "apply_chat_template")
        return {name: getattr(self.config, name) for name in names}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        index = self._tasks()
        for name in self.config.tasks:
            check_known("ruler.tasks", name, index)
        tasks = dict.fromkeys(leaf for name in self.config.tasks for leaf in leaves(name, index))
        return [{"task": task, "length": length} for length in self.config.lengths for task in tasks]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator: lengths that lm-eval could not fill, and data that the hub does not give."""
        for task in dict.fromkeys(unit["task"] for unit in self.units()):
            least = shortest(task, tokenizer)
            if least > min(self.config.lengths):
                raise UserError(
                    f"ruler.lengths={self.config.lengths} are too short for {task}, whose smallest document takes "
                    f"{least} tokens of this tokenizer: raise them, or leave the task out of ruler.tasks"
                )
            if task not in OFFLINE:
                metadata = {"pretrained": tokenizer.name_or_path, "max_seq_lengths": [max(self.config.lengths)]}
                fetch_data(task, self._tasks(), None, **metadata)

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """One row `lm_eval`, with a 95 % interval over documents."""
        task, length = unit["task"], unit["length"]
        ruler_module("cwe_utils")  # which shuffles with a generator of its own, from its import on
        metadata = {"pretrained": subject.tokenizer.name_or_path, "max_seq_lengths": [length]}
        tasks = task_manager(None, FOLDER, metadata=metadata)
        found = run_tasks(subject, [task], tasks, self.config, progress, offline=task in OFFLINE)
        scores = [sample[str(length)] for sample in found["samples"][task]]
        low, high = _interval(scores)
        value = found["results"][task][f"{length},none"]
        context = unit | {"measure": "score"}
        yield Result(metric="lm_eval", value=value, unit="1", n=len(scores), low=low, high=high, context=context)

    def _tasks(self) -> dict[str, Any]:
        if self._index is None:
            self._index = task_index(None, FOLDER)
        return self._index


def shortest(task: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Least length in tokens at which lm-eval is sure to find documents for `task`; 0 where it gives up by itself."""
    measure = {"ruler_vt": _shortest_vt, "ruler_cwe": _shortest_cwe, "ruler_fwe": _shortest_fwe}.get(task)
    if measure is None:
        return 0
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        return measure(lambda text: len(tokenizer(text).input_ids))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _shortest_vt(size: Callable[[str], int]) -> int:
    """A worked example of up to 500 tokens, then the smallest document (10 lines of noise) and 30 tokens of answer."""
    module = ruler_module("vt_utils")
    examples = [module.generate_input_output(5, 1, 4, is_icl=True) for _ in range(DRAWS)]
    if max(size(text) for text, _ in examples) + 30 > 500:
        raise UserError(
            "ruler_vt begins with an example of at most 500 tokens, but this tokenizer needs more for the smallest "
            "one: leave ruler_vt out of ruler.tasks"
        )
    documents = [module.generate_input_output(10, 1, 4)[0] for _ in range(DRAWS)]
    return max(map(size, documents)) + 30 + 500 + size("\n\n")


def _shortest_cwe(size: Callable[[str], int]) -> int:
    """Ten words, six times each (thirty times from 4,096 tokens on), and 120 tokens of answer."""
    module = ruler_module("cwe_utils")
    short, long = (
        max(size(module.generate_input_output(10, length)[1]) for _ in range(DRAWS)) + 120 for length in (4095, 4096)
    )
    return short if short <= 4095 else long


def _shortest_fwe(size: Callable[[str], int]) -> int:
    """The question without any words; and four different words at the least, of which there are length / 50."""
    return max(size(ruler_module("fwe_utils").TEMPLATE) + 1, 200)


def _interval(scores: list[float]) -> tuple[float, float] | tuple[None, None]:
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(int(sum(scores)), len(scores))
    low, high = mean_interval(scores) or (None, None)
    return (None, None) if low is None or high is None else (max(low, 0.0), min(high, 1.0))
