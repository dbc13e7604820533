"""`anchorctx kvcomm`: how well agents that run a checkpoint reuse each other's KV caches, by arm, against dense."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from anchorctx.data.sources.documents import Reading
from anchorctx.data.sources.facts import KEY_TOKENS, SPECIAL_TOKENS, VALUE_TOKENS, FactTokens, lines_of
from anchorctx.errors import UserError
from anchorctx.evals.config import EvalConfig, EvaluatedModel
from anchorctx.evals.corpus import open_corpus
from anchorctx.evals.evaluators.reuse.config import (
    KvcommConfig,
    TaskName,
    VariationConfig,
)
from anchorctx.evals.evaluators.reuse.gate import Verdict, check_gate, judge
from anchorctx.evals.evaluators.reuse.measures import context_error
from anchorctx.evals.evaluators.reuse.rows import record_rows, variation_rows
from anchorctx.evals.evaluators.reuse.tasks.base import Task, fingerprint
from anchorctx.evals.evaluators.reuse.tasks.copy import CopyTask
from anchorctx.evals.evaluators.reuse.tasks.humaneval import HumanEval
from anchorctx.evals.evaluators.reuse.tasks.questions import Gsm8k, Mmlu
from anchorctx.evals.evaluators.reuse.tasks.retrieval import FactVocabulary, RetrievalTask
from anchorctx.evals.evaluators.reuse.trial import Lab, Trial
from anchorctx.evals.subject import load, models_of, read_config, read_tokenizer
from anchorctx.kvcomm.arms.basic import Arm, RotateGlue
from anchorctx.kvcomm.arms.controls import RandomMoments
from anchorctx.kvcomm.arms.exemplars import PoolConfig
from anchorctx.kvcomm.arms.offsets import Kvcomm, KvcommUngated, MeanOffset
from anchorctx.kvcomm.arms.registry import ARMS, CONTROLS
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.records.manifest import build_manifest, write_manifest
from anchorctx.records.results import FILE, Result, append_results

logger = logging.getLogger(__name__)

CORPUS_TEXTS = 40
"""Held-out documents that the retrieval task and the split of errors draw their text from."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the command found."""

    rows: list[Result]
    verdict: Verdict | None
    """Of the gate, where one was asked for."""


def evaluate_reuse(config: KvcommConfig) -> Outcome:
    """Run the tasks through the arms; rows are appended to `out_dir`/results.jsonl once a task is done.

    Several models run one after another, on the same problems where their tokenizers are the same.
    """
    check_run(config)
    arms = arm_makers(config)
    disable_progress_bar()  # ours are enough
    settings = _model_settings(config)
    models = models_of(settings)
    texts = [document.text for document in _few(config)]
    if len(models) > 1:  # a model that cannot be used is found before hours are spent on the others
        for model in models:
            Bench(config, settings, model, arms, texts)
    bench, stamp = None, ""
    found: list[Result] = []
    for model in models:
        bench = None  # its memory is needed
        bench = Bench(config, settings, model, arms, texts)
        if not stamp:  # everything is read and checked before anything is written
            stamp = write_manifest(Path(config.out_dir), build_manifest("kvcomm", dataclasses.asdict(config)))
        for rows in bench.run():
            context = {"model": model.label}
            stamped = [dataclasses.replace(r, manifest=stamp, context=context | r.context) for r in rows]
            append_results(Path(config.out_dir) / FILE, stamped)
            found.extend(stamped)
    return Outcome(found, judge(found, config.gate))


def check_run(config: KvcommConfig) -> None:
    """UserError for settings with which nothing could be run."""
    if not config.tasks:
        raise UserError(f"tasks=[] leaves nothing to run: name some of {', '.join(TaskName)}")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} must be at least 0")


class Bench:
    """One loaded model with its tasks, read and checked."""

    def __init__(
        self,
        config: KvcommConfig,
        settings: EvalConfig,
        model: EvaluatedModel,
        arms: dict[str, Callable[[], Arm]],
        texts: Sequence[str],
    ) -> None:
        subject = load(model, read_config(model), read_tokenizer(model), settings)
        model_, tokenizer = subject.model, subject.tokenizer
        self._lab = Lab(
            model_, tokenizer, Decoder(model_), arms, config.decision_dense, config.compare_tokens, config.seed
        )
        self._label, self._lines = model.label, _lines(texts, tokenizer)
        self._variation = config.variation
        tasks = [_task(name, config, model_, tokenizer, self._lines) for name in dict.fromkeys(config.tasks)]
        self._trials = {task.name: [Trial(self._lab, task, team) for team in task.teams()] for task in tasks}

    def run(self) -> Iterator[list[Result]]:
        """The rows of each task once it is done, and those of the split of errors."""
        for name, trials in self._trials.items():
            work = [(trial, problem) for trial in trials for problem in trial.team.problems]
            for trial, problem in tqdm(work, desc=f"{self._label}: {name}, {len(self._lab.arms)} arms", unit="problem"):
                trial.run(problem)
            records = [record for trial in trials for record in trial.records.values()]
            yield record_rows(name, records, fingerprint([problem for _, problem in work]))
        yield _variation(self._lab, self._lines, self._variation)


def _model_settings(config: KvcommConfig) -> EvalConfig:
    """What `evals.subject` needs to load the models."""
    averaged = next((model for model in config.models if model.average is not None), None)
    if averaged is not None:
        raise UserError(f"average={averaged.average} is not known to kvcomm, which compares models one by one: drop it")
    shared = {name: getattr(config, name) for name in ("model", "models", "out_dir", "label", "config")}
    return EvalConfig(**shared, dtype=config.dtype, device=config.device)


def arm_makers(config: KvcommConfig) -> dict[str, Callable[[], Arm]]:
    """The arms to run, dense first, with their settings; UserError for an unknown name or a bad setting."""
    known: dict[str, Callable[[], Arm]] = ARMS | CONTROLS
    unknown = [name for name in config.arms if name not in known]
    if unknown:
        raise UserError(f"arms has {unknown[0]!r}, which is none: choose {', '.join(known)}")
    s = config.settings
    pool = PoolConfig(s.gamma, s.temperature, s.min_exemplars, s.max_exemplars, s.window, s.max_bytes)
    known |= {
        "rotate_glue": lambda: RotateGlue(s.first),
        "kvcomm": lambda: Kvcomm(pool, partial=s.partial),
        "kvcomm_ungated": lambda: KvcommUngated(pool, partial=s.partial),
        "mean_offset": lambda: MeanOffset(s.warmup),
        "random": lambda: RandomMoments(config.seed),
    }
    for name, least in (("first", 0), ("warmup", 1)):
        if getattr(s, name) < least:
            raise UserError(f"settings.{name}={getattr(s, name)} must be at least {least}")
    check_gate(config.gate)
    if config.compare_tokens < 1:
        raise UserError(f"compare_tokens={config.compare_tokens} must be at least 1")
    if config.gate.arm is not None and config.gate.arm not in config.arms:
        raise UserError(f"gate.arm={config.gate.arm} is not among the arms that run: add it to arms, or choose another")
    return {"dense": known["dense"]} | {name: known[name] for name in config.arms}


def _task(
    name: TaskName,
    config: KvcommConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[tuple[int, ...]],
) -> Task:
    if name is TaskName.retrieval:
        FactTokens.of(tokenizer)  # UserError where the tokenizer does not know the facts
        ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}  # type: ignore[arg-type]
        words = FactVocabulary(KEY_TOKENS, VALUE_TOKENS)
        return RetrievalTask(config.retrieval, config.agents, lines, words, ids, config.seed)
    if name is TaskName.copy:
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        return CopyTask(config.copy, config.agents, config.topology, int(vocabulary), config.seed)  # type: ignore
    if name is TaskName.gsm8k:
        return Gsm8k(config.gsm8k, config.agents, config.topology)
    if name is TaskName.mmlu:
        return Mmlu(config.mmlu, config.agents, config.topology)
    return HumanEval(config.humaneval, config.agents, config.topology, config.allow_code_execution, config.sandbox)


def _few(config: KvcommConfig) -> Iterator[Any]:
    documents = open_corpus(config.corpus).texts(Reading(on_bad_row=config.corpus.on_bad_row))
    return (document for document, _ in zip(documents, range(CORPUS_TEXTS), strict=False))


def _lines(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    lines = [line for text in texts for line in lines_of(text)]
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
    return [tuple(ids) for ids in encoded if ids]  # type: ignore[arg-type]


def _variation(lab: Lab, lines: list[tuple[int, ...]], config: VariationConfig) -> list[Result]:
    """How a held-out document's KV varies with what stands before it, and with its distance from that."""
    stream, longest = np.array([token for line in lines for token in line]), max(config.tokens, config.prefix)
    needed = config.tokens + 2 * config.prefix + 1
    if len(stream) < 4 * longest or lab.decoder.reach < needed:
        logger.warning(
            f"kvcomm_variation is left out: variation.tokens={config.tokens} behind variation.prefix={config.prefix} "
            f"needs {needed:,} tokens of the model, which reaches {lab.decoder.reach:,}, and {4 * longest:,} of text, "
            f"of which there are {len(stream):,}: lower them"
        )
        return []
    starts = np.random.default_rng([lab.seed, 1]).integers(0, len(stream) - longest, size=(config.documents, 3))
    bos = lab.tokenizer.bos_token_id if lab.tokenizer.bos_token_id is not None else lab.tokenizer.eos_token_id
    pieces = stream[starts[..., None] + np.arange(longest)].tolist()
    errors = [
        context_error(lab.decoder, document[: config.tokens], a[: config.prefix], b[: config.prefix], bos)  # type: ignore
        for document, a, b in pieces
    ]
    return variation_rows(errors, config.tokens, config.prefix)
