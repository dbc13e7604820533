"""lm-eval (EleutherAI's harness) on a model that is already loaded, with our attention and RoPE settings in place.

Tasks, prompts, seeds and scores are lm-eval's own, through `simple_evaluate`, one task a call: the numbers are those of
its command line on the same folder. Around it this module finds tasks, fetches what they need from the hub before
anything starts, keeps the library quiet, and shares requests over the processes of torchrun.

Only this module imports lm_eval, and only when a task is asked for: it is in the extra `eval`.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit
from anchorctx.evals.distribute import rank_and_size, same_everywhere
from anchorctx.evals.evaluators.config import HarnessConfig, LmEvalConfig
from anchorctx.records.results import Result
from anchorctx.settings import check_ranges

logger = logging.getLogger(__name__)

LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""What `dataset_path` says when a task's data are in its own files."""


class LmEval:
    """Any task of lm-eval; a unit is one name of `tasks`."""

    name = "lm_eval"
    counts = "req"

    def __init__(self, config: LmEvalConfig) -> None:
        self.config = config
        self._checked = False
        check_ranges(config, "lm_eval")
        if not config.tasks:
            raise UserError("lm_eval.tasks=[] names no task: give some, like lm_eval.tasks=[hellaswag,mmlu]")
        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise UserError(f"lm_eval.include_path={config.include_path} is not a folder: name one with task files")

    def longest(self) -> int:
        """See Evaluator: lm-eval itself keeps prompts to the model's limit."""
        return self.config.max_length or 0

    def settings(self) -> dict[str, Any]:
        """See Evaluator."""
        names = ("limit", "max_length", "add_bos_token", "apply_chat_template", "num_fewshot")
        return {name: getattr(self.config, name) for name in names} | {"files": _digest(self.config.include_path)}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{"asked": task} for task in dict.fromkeys(self.config.tasks)]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator: refuses unknown names, and tasks whose data the hub does not give, before anything starts."""
        check_template("lm_eval", self.config, tokenizer)
        if self._checked:
            return
        found = task_index(self.config.include_path)
        for task in self.config.tasks:
            check_known("lm_eval.tasks", task, found)
        for task in self.config.tasks:
            needed = dict.fromkeys(s for leaf in leaves(task, found) if (s := _hub_source(found[leaf].cfg or {})))
            if needed:
                tasks = task_manager(self.config.include_path)
                fetch(task, f"{', '.join(needed)} from the hub", functools.partial(tasks.load, [task]))
        self._checked = True

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """A row `lm_eval` for each measure of the task, and of a group's every task."""
        tasks = task_manager(self.config.include_path, metadata={"pretrained": subject.tokenizer.name_or_path})
        options = {"num_fewshot": self.config.num_fewshot, "log_samples": False}
        found = run_tasks(subject, [unit["asked"]], tasks, self.config, progress, **options)
        for task, measures in found["results"].items():
            for measure, value, error in _numbers(measures):
                # lm-eval gives a standard error; 1.96 of them are a 95 % interval.
                low, high = (None, None) if error is None else (value - 1.959964 * error, value + 1.959964 * error)
                context = unit | {"task": task, "measure": measure}
                n = int(measures.get("sample_len") or 0)
                yield Result(metric="lm_eval", value=value, unit="1", n=n, low=low, high=high, context=context)


def check_template(name: str, config: HarnessConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where prompts are to be wrapped in a chat template that the tokenizer has not."""
    if config.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"{name}.apply_chat_template=true needs a chat template, which the tokenizer {tokenizer.name_or_path} has "
            "not: leave it false, or take a chat model's checkpoint"
        )


def run_tasks(
    subject: Subject,
    tasks: Sequence[str],
    manager: Any,
    config: HarnessConfig,
    progress: Progress,
    *,
    offline: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's `simple_evaluate` on a loaded model; its results, the same on every process."""
    lm = _language_model(subject, config, progress)
    with quiet(offline=offline):
        found = _lm_eval("evaluator").simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            **options,
        )
    # Only the first process gets results from lm-eval; the others get None.
    kept = {} if found is None else {name: found.get(name) for name in ("results", "samples")}
    return same_everywhere(kept)


def _numbers(measures: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(measure, value, standard error where known) of one task; a filter's name follows the measure, if it has one."""
    for key, value in measures.items():
        # Keys are "acc,none", "acc_stderr,none", "exact_match,strict-match", and "alias" without a comma.
        metric, comma, chain = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = measures.get(f"{metric}_stderr,{chain}")
        yield metric if chain == "none" else key, float(value), error if isinstance(error, float) else None


# -- tasks and their data ---------------------------------------------------------------------------------------------


def task_index(include_path: str | None, folder: str | None = None) -> dict[str, Any]:
    """lm-eval's entries by name: all 14,683 (10 s), or those of one folder of its tasks."""
    return task_manager(include_path, folder).task_index


def check_known(key: str, task: str, index: dict[str, Any]) -> None:
    """UserError with the nearest names when lm-eval has no such task."""
    if task not in index:
        near = difflib.get_close_matches(task, index, 3) or difflib.get_close_matches(task.split("_")[0], index, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
        raise UserError(f"{key} names {task}, which lm-eval {lm_eval_version()} does not know: {hint}")


def leaves(task: str, index: dict[str, Any]) -> list[str]:
    """The single tasks of a task, group or tag."""
    entry = index.get(task)
    if entry is None:
        return []
    # A group lists its members, names or settings; a tag knows the tasks that carry it.
    members = entry.cfg.get("task", []) if entry.cfg and "group" in entry.cfg else sorted(entry.tags)
    if entry.kind.name in ("TASK", "PY_TASK"):
        return [task]
    names = [m if isinstance(m, str) else str(m.get("task") or m.get("group")) for m in members]
    return list(dict.fromkeys(leaf for name in names for leaf in leaves(name, index)))


def fetch(task: str, named: str, read: Callable[[], Any]) -> None:
    """Say what a task needs from the network, and `read` it; UserError when that fails."""
    logger.info("%s reads %s, or its cache", task, named)
    try:
        with quiet(offline=True):
            read()
    except Exception as error:  # every loader of data fails in its own way
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{task} needs {named}, which is neither in the cache nor to be had ({reason}): evaluate once where the "
            "network can be reached and copy HF_HOME over, or leave the task out; of RULER, niah_single_1, "
            "niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe need no data"
        ) from error


def _hub_source(config: dict[str, Any]) -> str | None:
    """The data set of the hub that a task reads, if it does."""
    path = config.get("dataset_path")
    return None if not path or path in LOCAL_FORMATS or Path(path).exists() else str(path)


def task_manager(include_path: str | None, folder: str | None = None, metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's task manager; reading all its task files takes 10 s, so that is done once."""
    manager = copy.copy(_read_tasks(include_path, folder))
    # As the constructor does with metadata, which a manager from the cache was made without.
    manager._factory = type(manager._factory)(meta=metadata or {})
    return manager


@functools.cache
def _read_tasks(include_path: str | None, folder: str | None) -> Any:
    tasks = _lm_eval("tasks")
    with quiet():
        if folder is None:
            return tasks.TaskManager(include_path=include_path)
        return tasks.TaskManager(include_path=str(Path(tasks.__file__).parent / folder), include_defaults=False)


def _digest(folder: str | None) -> str | None:
    """Of a user's own task files, whose contents decide the numbers."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# -- the library ------------------------------------------------------------------------------------------------------


def lm_eval_version() -> str | None:
    """Its version, None when it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def ruler_module(name: str, *, anew: bool = False) -> Any:
    """A module of lm-eval's RULER; `anew` imports it again, with what it draws from at its start."""
    if anew:
        sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)
    with quiet(offline=True):
        return _lm_eval(f"tasks.ruler.{name}")


def _lm_eval(name: str) -> Any:
    try:
        import lm_eval  # noqa: F401

        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise UserError(
            f"ruler and lm_eval need lm-eval with its RULER extra ({error}): pip install 'anchorctx[eval]'"
        ) from error


@contextlib.contextmanager
def quiet(*, offline: bool = False) -> Iterator[None]:
    """Keep lm-eval's chatter and bars off the screen, where ours is.

    `offline` also keeps its RULER from fetching a sentence splitter (nltk's punkt_tab) as it is imported, which only
    the tasks over essays use: without a network that takes 10 s and prints an error.
    """
    names = ("lm_eval", "datasets")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if offline and importlib.util.find_spec("nltk") is not None:
            stack.enter_context(mock.patch("nltk.download", lambda *args, **kwargs: False))
        try:
            yield
        finally:
            for name, level in zip(names, before, strict=True):
                logging.getLogger(name).setLevel(level)


def _language_model(subject: Subject, config: HarnessConfig, progress: Progress) -> Any:
    """lm-eval's own wrapper of Hugging Face models around a loaded one, one of several processes where there are."""
    huggingface = _lm_eval("models.huggingface")

    tokenizer = copy.deepcopy(subject.tokenizer)  # lm-eval may set a padding token on it
    if config.add_bos_token is not None:
        # As lm-eval does where it loads a tokenizer itself: its own argument adds none that the tokenizer would not.
        tokenizer.add_bos_token = config.add_bos_token  # type: ignore[attr-defined]

    class Shared(huggingface.HFLM):
        """Reports every batch, and gathers over the process group that there is."""

        def __init__(self) -> None:
            with quiet():  # it warns that a loaded model cannot be shared, which the rest of this class does
                super().__init__(
                    pretrained=subject.model,
                    tokenizer=tokenizer,
                    batch_size=config.batch_size,
                    max_length=config.max_length,
                    add_bos_token=config.add_bos_token,
                )
            self._rank, self._world_size = rank_and_size()
            self._requests = 0

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
            torch_dist.all_gather(parts, tensor)
            return torch.stack(parts)

        def barrier(self) -> None:
            torch_dist.barrier()

        # The three kinds of requests: remember how many there are, and leave the screen to one bar, which is ours.

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._requests = len(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._requests = len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._requests = len(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            progress(len(context), self._requests)
            return found

        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            progress(len(inps), self._requests)
            return found

    return Shared()
