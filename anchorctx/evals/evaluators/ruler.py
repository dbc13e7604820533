"""RULER (arXiv 2404.06654) by lm-eval, at a list of lengths; six of its thirteen tasks need no download.

Each (task, length) is a call of lm-eval of its own, so that it has the data and the numbers of
`lm_eval --tasks TASK --metadata '{"max_seq_lengths": [LENGTH]}'`, whatever ran before it.

Some of lm-eval's generators of documents never end, or make empty ones, when the length is too short for the tokenizer:
they draw again until a document fits. `shortest` draws the smallest documents beforehand, so that such a length can be
refused.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit
from anchorctx.evals.evaluators.config import OFFLINE, RulerConfig
from anchorctx.evals.evaluators.lm_eval import (
    check_known,
    check_template,
    fetch,
    leaves,
    ruler_module,
    run_tasks,
    task_index,
    task_manager,
)
from anchorctx.records.results import Result, mean_interval, wilson_interval
from anchorctx.settings import check_ranges

FOLDER = "ruler"
SEEDS = 0, 1234
"""What lm-eval sets random and numpy to."""
DRAWS = 20
"""Smallest documents drawn to see how long they get; lm-eval draws until one fits, so that the longest is enough."""


class Ruler:
    """See the module; a unit is a task at a length."""

    name = "ruler"
    counts = "req"

    def __init__(self, config: RulerConfig) -> None:
        self.config = config
        self._index: dict[str, Any] | None = None
        check_ranges(config, "ruler")
        if not config.tasks or not config.lengths:
            raise UserError(
                f"ruler.tasks={config.tasks} and ruler.lengths={config.lengths} must name at least one each: "
                "lengths are in tokens"
            )

        longest, limit = max(config.lengths), config.max_length
        if limit is not None and limit < longest:
            raise UserError(
                f"ruler.max_length={limit} would cut the start, needle and all, of documents of {longest} tokens "
                f"(ruler.lengths): raise it to {longest}, or leave it null"
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
        check_template("ruler", self.config, tokenizer)
        for unit in self.units():
            task, length = unit["task"], unit["length"]
            least = shortest(task, length, tokenizer)
            if least > length:
                raise UserError(
                    f"ruler.lengths={self.config.lengths}: {length} is too short for {task}, whose smallest document "
                    f"takes {least} tokens of this tokenizer there: change it, or leave the task out of ruler.tasks"
                )
        for task in dict.fromkeys(unit["task"] for unit in self.units()):
            if task not in OFFLINE:
                fetch(task, *_hub_data(task))

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """One row `lm_eval`, with a 95 % interval over documents."""
        task, length = unit["task"], unit["length"]
        metadata = {"pretrained": subject.tokenizer.name_or_path, "max_seq_lengths": [length]}
        tasks = as_in_a_fresh_process(task_manager(None, FOLDER, metadata=metadata))
        # One task a call, from the seeds on: documents do not depend on which tasks ran before.
        found = run_tasks(subject, [task], tasks, self.config, progress, offline=task in OFFLINE)
        # A sample is scored at every length lm-eval knows; only the one that was asked for is not -1.
        scores = [sample[str(length)] for sample in found["samples"][task]]
        low, high = _interval(scores)
        value = found["results"][task][f"{length},none"]
        context = unit | {"measure": "score"}
        yield Result(metric="lm_eval", value=value, unit="1", n=len(scores), low=low, high=high, context=context)

    def _tasks(self) -> dict[str, Any]:
        if self._index is None:
            self._index = task_index(None, FOLDER)
        return self._index


def _hub_data(task: str) -> tuple[str, Callable[[], Any]]:
    """What a task reads from the network, and how: questions, or essays with a splitter of sentences."""
    if task == "ruler_qa_squad":
        return "SQuAD 2.0 from its web page", lambda: ruler_module("qa_utils").read_squad()
    if task == "ruler_qa_hotpot":
        return "HotpotQA from its web page", lambda: ruler_module("qa_utils").read_hotpotqa()

    def essays() -> None:
        ruler_module("prepare_niah").get_haystack("essay")
        nltk = importlib.import_module("nltk")
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            if not nltk.download("punkt_tab", quiet=True):
                raise

    return "baber/paul_graham_essays from the hub (and nltk's punkt_tab)", essays


def as_in_a_fresh_process(tasks: Any) -> Any:
    """Give a task manager's RULER the random states that lm-eval's command line has when it makes documents.

    There, modules are imported after the seeds are set: rich, which nltk imports, draws 24 bits on the way, and
    cwe_utils shuffles with a generator of its own that starts at its import.
    """
    ruler_module("prepare_niah")
    ruler_module("cwe_utils", anew=True)
    load = tasks.load

    def load_afresh(names: list[str]) -> Any:
        random.getrandbits(24)  # what importing rich draws on lm-eval's command line
        return load(names)

    tasks.load = load_afresh
    return tasks


def shortest(task: str, length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the smallest documents that lm-eval makes for `task` at `length`; 0 where it gives up by itself."""
    measure = {"ruler_vt": _shortest_vt, "ruler_cwe": _shortest_cwe, "ruler_fwe": _shortest_fwe}.get(task)
    if measure is None:
        return 0
    ruler_module("prepare_niah")  # imported now, so that what it draws is drawn before the seeds are set
    # The global generators are lent to lm-eval's code with its seeds, and given back as they were.
    states = random.getstate(), np.random.get_state()
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    random.getrandbits(24)  # see `as_in_a_fresh_process`
    try:
        return measure(length, lambda text: len(tokenizer(text).input_ids))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _shortest_vt(length: int, size: Callable[[str], int]) -> int:
    """A worked example of up to 500 tokens, then the smallest document (10 lines of noise) and 30 tokens of answer."""
    module = ruler_module("vt_utils")

    def draw(noises: int, example: bool) -> int:
        text, answer = module.generate_input_output(noises, 1, 4, is_icl=example)
        return size(f"{text} {answer}") + 30

    example = draw(5, True)  # lm-eval's own, which is the first thing it draws from the same seeds
    if example > 500:
        raise UserError(
            f"ruler_vt begins with an example of at most 500 tokens, but the smallest has {example} in this tokenizer: "
            "leave ruler_vt out of ruler.tasks"
        )
    return max(draw(10, False) for _ in range(DRAWS)) + 500


def _shortest_cwe(length: int, size: Callable[[str], int]) -> int:
    """A worked example, ten words six times each (thirty times from 4,096 tokens on), and 120 tokens of answer."""
    module = ruler_module("cwe_utils")

    def draw() -> int:
        example, text, words = module.generate_input_output(10, length)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        return size(f"{example}\n{text} {answer}") + 120

    return max(draw() for _ in range(DRAWS))


def _shortest_fwe(length: int, size: Callable[[str], int]) -> int:
    """The question without any words; and four different words at the least, of which there are length / 50."""
    return max(size(ruler_module("fwe_utils").TEMPLATE) + 1, 200)


def _interval(scores: list[float]) -> tuple[float, float] | tuple[None, None]:
    # Right or wrong: Wilson. Shares of several answers: Student's interval of the mean, cut to 0..1.
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(int(sum(scores)), len(scores))
    low, high = mean_interval(scores) or (None, None)
    return (None, None) if low is None or high is None else (max(low, 0.0), min(high, 1.0))
