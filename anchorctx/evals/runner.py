"""`evaluate`: run evaluations on models and write `results.jsonl`; what it holds already is not measured again.

A *job* is one model under one evaluation, and its *units* are measured and written one by one, long ones in parts.
Everything that can be refused is refused before the first weight is loaded. Under torchrun (or accelerate launch) each
process loads every model and takes its share of the batches; the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from anchorctx.errors import UserError
from anchorctx.evals.base import Candidate, Concluding, Counting, Evaluator, Resumable, Subject, Unit
from anchorctx.evals.config import EvalConfig, EvalDtype, EvalName, EvaluatedModel
from anchorctx.evals.corpus import Corpus
from anchorctx.evals.distribute import is_first, same_everywhere
from anchorctx.evals.evaluators.lm_eval import LmEval, lm_eval_version
from anchorctx.evals.evaluators.needle import NeedleMap
from anchorctx.evals.evaluators.perplexity import ContextPerplexity, Perplexity
from anchorctx.evals.evaluators.precision.study import Precision
from anchorctx.evals.evaluators.retrieval import Retrieval
from anchorctx.evals.evaluators.reuse.evaluator import Reuse
from anchorctx.evals.evaluators.ruler import Ruler
from anchorctx.evals.finite import checked
from anchorctx.evals.forecast import Bar, Forecast, MeasuredError
from anchorctx.evals.journal import Journal, average, begun, code_fingerprint, run_facts
from anchorctx.evals.parts import Parts
from anchorctx.evals.subject import (
    attention_name,
    check_reach,
    device_of,
    identity,
    limit_of,
    load,
    models_of,
    read_config,
    read_tokenizer,
)
from anchorctx.models.load import check_weights
from anchorctx.parallel import dist
from anchorctx.records.manifest import write_manifest
from anchorctx.records.results import Result, Rows
from anchorctx.settings import check_ranges

__all__ = ["EVALUATORS", "EvalConfig", "EvalDtype", "EvalName", "EvaluatedModel", "evaluate"]
logger = logging.getLogger(__name__)


EVALUATORS: dict[EvalName, Callable[[EvalConfig, Corpus, Candidate], Evaluator]] = {
    EvalName.perplexity: lambda config, texts, _: Perplexity(config.perplexity, texts),
    EvalName.perplexity_by_context: lambda config, texts, _: ContextPerplexity(config.context, texts),
    EvalName.retrieval: lambda config, texts, _: Retrieval(config.retrieval, texts, config.seed),
    EvalName.needle: lambda config, texts, _: NeedleMap(config.needle, texts, config.seed),
    EvalName.ruler: lambda config, texts, _: Ruler(config.ruler),
    EvalName.lm_eval: lambda config, texts, _: LmEval(config.lm_eval),
    EvalName.precision: lambda config, texts, of: Precision(
        config.precision, of, texts, config.seed, config.device, begun(config.out_dir, "precision", of.label)
    ),
    EvalName.kvcomm: lambda config, texts, of: Reuse(
        config.kvcomm, of, texts, config.seed, attention_name(config.attention, config.rope_dtype)
    ),
}
"""How each evaluation of a model is made from the configuration and the held-out texts."""
STUDIES = {EvalName.precision: "precision_", EvalName.kvcomm: "kvcomm_"}
"""Evaluations whose rows of a model make one table in a report, with the prefix of these rows' metrics."""
LOADS_ITSELF = (EvalName.precision,)
"""Evaluations that load the weights themselves, in several dtypes."""
BY_LM_EVAL = (EvalName.ruler, EvalName.lm_eval)
"""Evaluations that take documents and seeds from lm-eval, so that corpus and seed do not identify their numbers."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model under one evaluation."""

    model: EvaluatedModel
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    evaluator: Evaluator
    identity: dict[str, Any]
    """JSON of everything that the numbers depend on."""
    limit: int | None = None
    """Longest rows that this model reaches, in tokens, where longer ones are left out."""

    def units(self) -> list[Unit]:
        """The evaluator's, without those of lengths that the model does not reach."""
        found, longest = self.evaluator.units(), self.evaluator.longest()
        return [unit for unit in found if self.limit is None or unit.get("length", longest) <= self.limit]


def evaluate(config: EvalConfig, command: str = "eval", asked: Any = None) -> list[Result]:
    """Run the evaluations on every model, in order; returns their rows, including those measured earlier.

    Args:
        config: what to evaluate, and how.
        command: the command that was typed, for the manifest.
        asked: its settings, where they are not `config`.
    """
    with _processes():
        return _evaluate(config, run_facts(command, dataclasses.asdict(asked or config)))


def forecast(config: EvalConfig) -> list[Forecast]:
    """What `evaluate` would still have to do, and how long it would take: measured on a first piece of each evaluation.

    Nothing is written. The list is empty where everything has been measured already.
    """
    with _processes():
        disable_progress_bar()
        jobs = plan(config, models_of(config))
        with _journal(config, jobs, read_only=True) as journal:
            wanted = [(job, unit) for job in jobs for unit in job.units()]
            known = _known(wanted, journal)
        found, subject, loaded = [], None, None
        for job in jobs:
            units = [unit for (of, unit), rows in zip(wanted, known, strict=True) if of is job and not rows]
            if units and job.evaluator.name not in LOADS_ITSELF and loaded is not job.model:
                subject = None  # free the last model before the next is loaded
                subject, loaded = load(job.model, job.config, job.tokenizer, config), job.model
            found += [_first_piece(job, units, subject)] if units else []
        return found


def _bar(job: Job, units: Sequence[Unit], *, dry_run: bool = False) -> Bar:
    evaluator = job.evaluator
    sizes = [evaluator.size(unit) for unit in units] if isinstance(evaluator, Counting) else None
    return Bar(_what(job), evaluator.counts, units, sizes=sizes, dry_run=dry_run)


def _first_piece(job: Job, units: Sequence[Unit], subject: Subject | None) -> Forecast:
    """Run units up to the second report of progress."""
    # Units of a length first: the precision study's others report no progress, and one of them takes minutes.
    units = sorted(units, key=lambda unit: "length" not in unit)
    bar = _bar(job, units, dry_run=True)
    with contextlib.suppress(MeasuredError):
        for unit in units:
            bar.start(unit)
            list(job.evaluator.run(subject, unit, bar.advance))  # type: ignore[arg-type]
    if (found := bar.settle()) is None:
        raise UserError(f"{_what(job)} has nothing whose time could be measured: run it, it is short")
    return found


def _what(job: Job) -> str:
    return f"{job.evaluator.name} of {job.model.label}"


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Under torchrun, and not within a training run that has a process group already, the processes know each other."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and not torch_dist.is_initialized()
    if several:
        dist.start()
    try:
        yield
    finally:
        if several:
            dist.stop()


@contextlib.contextmanager
def _journal(config: EvalConfig, jobs: Sequence[Job], *, read_only: bool = False) -> Iterator[Journal | None]:
    """What the folder of results holds, on the first process; None on the others, and where nothing may be written."""
    out = Path(config.out_dir)
    if not is_first() or (read_only and not out.is_dir()):
        yield None
        return
    with contextlib.closing(Journal(out)) as journal:
        _refuse_mixtures(jobs, journal)
        yield journal


def _evaluate(config: EvalConfig, facts: dict[str, Any]) -> list[Result]:
    disable_progress_bar()  # transformers', while weights load: there is one of ours already
    models = models_of(config)
    jobs = plan(config, models)
    with _journal(config, jobs) as journal:
        # wanted, rows and pending belong together: rows[i] are those of wanted[i], and i is in pending while there are
        # none. Only the first process has a journal; all processes have the same rows.
        wanted = [(job, unit) for job in jobs for unit in job.units()]
        rows = _known(wanted, journal)
        pending = [i for i, known in enumerate(rows) if not known]
        if len(pending) < len(wanted):
            logger.info("%d of %d pieces are in %s already", len(wanted) - len(pending), len(wanted), config.out_dir)
        if journal is not None and pending:  # a run that measures nothing leaves the folder as it is
            write_manifest(Path(config.out_dir), facts)
        _measure(config, wanted, pending, rows, journal, facts)
        found = [row for job in jobs for row in _all_rows(job, wanted, rows, journal)]
        plain = [row for row in found if not row.metric.startswith(tuple(STUDIES.values()))]
        return found if journal is None else found + average(plain, models, journal)


def _refuse_mixtures(jobs: Sequence[Job], journal: Journal) -> None:
    """UserError where a study would stand beside another one of the same label: no report could tell them apart."""
    for job in jobs:
        # A run with the same hash goes on; another one of the same label would be read as the same table.
        prefix, key = STUDIES.get(EvalName(job.evaluator.name)), journal.key(job.identity)
        if prefix and any(
            row.metric.startswith(prefix) and row.context.get("model") == job.model.label and row.manifest != key
            for row in journal.rows
        ):
            raise UserError(
                f"{journal.path} holds another {job.evaluator.name} study of {job.model.label} (of another model, "
                "with other settings, or by another version): name another out_dir or label, or remove that file"
            )


def _all_rows(
    job: Job, wanted: Sequence[tuple[Job, Unit]], rows: Sequence[list[Result]], journal: Journal | None
) -> list[Result]:
    """The rows of all units, and those that follow from them, which are written if they are new."""
    found = [row for (of, _), part in zip(wanted, rows, strict=True) if of is job for row in part]
    if not isinstance(job.evaluator, Concluding):
        return found
    last = checked(job.evaluator.conclude(found), str(job.model.label))
    last = [_stamp(row, job, found[0].manifest) for row in last]
    if journal is not None:
        # The latest of a number is what reports show: one that was concluded before with another bound is said again.
        known = Rows(journal.rows).latest()
        if new := [row for row in last if row not in known]:
            journal.add(new)
    return found + last


def plan(config: EvalConfig, models: Sequence[EvaluatedModel]) -> list[Job]:
    """Every model under every evaluation; UserError for whatever can be refused without loading weights."""
    if not config.evals:
        raise UserError(f"evals=[] asks for nothing: choose from {', '.join(EvalName)}")
    check_ranges(config)
    corpus = Corpus(config.corpus)
    jobs, configs = [], [read_config(model) for model in models]
    limits = [limit_of(hf_config) for hf_config in configs]
    for model, hf_config in zip(models, configs, strict=True):
        tokenizer = read_tokenizer(model)
        # From the files' headers: names and shapes, before any evaluation is made.
        check_weights(model.path, hf_config)
        who = identity(model, hf_config)
        candidate = Candidate(str(model.label), model.path, hf_config, tokenizer, model.config)
        for name in dict.fromkeys(config.evals):
            evaluator = EVALUATORS[name](config, corpus, candidate)
            limit = _shorter(model, limit_of(hf_config), limits, evaluator)
            evaluator.check(tokenizer)
            what = {"evaluation": name.value, "model": who, "settings": evaluator.settings(), **_conditions(config)}
            # Changes of corpus or seed do not concern lm-eval's tasks, and its version does not concern the others.
            if name in BY_LM_EVAL:
                what["versions"] |= {"lm_eval": lm_eval_version()}
            else:
                what |= {"seed": config.seed, "corpus": corpus.identity}
            jobs.append(Job(model, hf_config, tokenizer, evaluator, what, limit))
    return jobs


def _shorter(
    model: EvaluatedModel, limit: int | None, limits: Sequence[int | None], evaluator: Evaluator
) -> int | None:
    """Where rows of this model end, if another model of the call reaches those that it does not; None where all run.

    Raises:
        UserError: no model reaches them.
    """
    longest = evaluator.longest()
    if limit is None or longest <= limit:
        return None
    if all(other is not None and other < longest for other in limits):
        check_reach(model, limit, evaluator)
    if is_first():
        lengths = sorted({unit.get("length", longest) for unit in evaluator.units()})
        logger.warning(
            "%s of %s: rows of %s tokens are left out, since the model reaches %d; extend it with max_length and rope "
            "in models=[{path: ...}] to have them",
            *(evaluator.name, model.label, ", ".join(str(n) for n in lengths if n > limit), limit),
        )
    return limit


def _conditions(config: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside model and evaluation; they do not depend on batch sizes and processes."""
    device = device_of(config)
    attention_name(config.attention, config.rope_dtype)  # refuses what does not go together
    return {
        "dtype": config.dtype.value,
        "rope_dtype": config.rope_dtype.value,
        "attention": config.attention,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "code": code_fingerprint(),
    }


def _known(wanted: Sequence[tuple[Job, Unit]], journal: Journal | None) -> list[list[Result]]:
    """For each unit the rows that are there already, the same on every process."""
    rows: list[list[Result]] = [[] for _ in wanted]
    if journal is not None:
        rows = [journal.find(journal.key(job.identity), str(job.model.label), unit) for job, unit in wanted]
    return same_everywhere(rows)


def _measure(
    config: EvalConfig,
    wanted: Sequence[tuple[Job, Unit]],
    pending: Sequence[int],
    rows: list[list[Result]],
    journal: Journal | None,
    facts: dict[str, Any],
) -> None:
    """Fill in the rows of the pending units, each written as soon as it is measured; a model is loaded once."""
    subject, loaded, bar, current = None, None, None, None
    for i in pending:
        job, unit = wanted[i]
        # Units are in the order of models and evaluations, so that a model is loaded when the first of its units comes.
        if job.evaluator.name in LOADS_ITSELF:
            subject = loaded = None
        elif subject is None or loaded is not job.model:
            subject = None  # free the last model before the next is loaded
            subject, loaded = load(job.model, job.config, job.tokenizer, config), job.model
            subject = dataclasses.replace(subject, folder=Path(config.out_dir))
        if bar is None or current is not job:
            if bar is not None:
                bar.close()
            bar = _bar(job, [wanted[j][1] for j in pending if wanted[j][0] is job])
            current = job
        bar.start(unit)
        manifest = "" if journal is None else journal.open(job.identity, facts)
        parts = Parts() if journal is None else journal.parts(manifest, str(job.model.label), unit)
        parts.done = same_everywhere(parts.done)  # the first process has the file
        rows[i] = _stamped(job, subject, unit, bar, parts, manifest)
        if journal is not None:
            journal.add(rows[i])
            parts.remove()
    if bar is not None:
        bar.close()


def _stamped(job: Job, subject: Subject | None, unit: Unit, bar: Bar, parts: Parts, manifest: str) -> list[Result]:
    """The rows of one unit, with the manifest and the model's label."""
    evaluator: Any = job.evaluator  # its subject is None where it loads itself
    if isinstance(evaluator, Resumable):
        found = evaluator.resume(subject, unit, bar.advance, parts)  # type: ignore[arg-type]
    else:
        found = evaluator.run(subject, unit, bar.advance)
    return [_stamp(row, job, manifest) for row in checked(found, str(job.model.label))]


def _stamp(row: Result, job: Job, manifest: str) -> Result:
    return dataclasses.replace(row, manifest=manifest, context={"model": job.model.label} | row.context)
