"""The evaluation `kvcomm`: how well agents that run a model reuse each other's KV caches, by arm, against dense.

A unit is a whole task, since arms learn from one problem to the next, or the split of errors; the parts of a task are
its problems. What can be refused is refused before any weight is read, on a model that has only shapes. With several
processes, each takes some of the arms beside dense, which all compute: an arm's numbers do not depend on the others.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.data.sources.facts import KEY_TOKENS, SPECIAL_TOKENS, VALUE_TOKENS, FactTokens, lines_of
from anchorctx.errors import UserError
from anchorctx.evals.base import Candidate, Progress, Subject, Unit, settings_of, text_ids
from anchorctx.evals.corpus import Corpus
from anchorctx.evals.distribute import is_first, rank_and_size, spread
from anchorctx.evals.evaluators.reuse.config import ReuseConfig, TaskName
from anchorctx.evals.evaluators.reuse.course import run_task
from anchorctx.evals.evaluators.reuse.frontier import recommendation
from anchorctx.evals.evaluators.reuse.measures import context_error
from anchorctx.evals.evaluators.reuse.rows import check_arm, record_rows, variation_rows
from anchorctx.evals.evaluators.reuse.tasks.base import Task, Team
from anchorctx.evals.evaluators.reuse.tasks.copy import CopyTask
from anchorctx.evals.evaluators.reuse.tasks.crew import Crew, agents_file
from anchorctx.evals.evaluators.reuse.tasks.questions import Gsm8k, HumanEval, Mmlu
from anchorctx.evals.evaluators.reuse.tasks.reading import Reading
from anchorctx.evals.evaluators.reuse.tasks.retrieval import FactVocabulary, RetrievalTask
from anchorctx.evals.evaluators.reuse.trial import Lab, Trial
from anchorctx.evals.parts import Parts
from anchorctx.kvcomm.arms.basic import Arm, RandomMoments, RotateFirst, RotateGlue
from anchorctx.kvcomm.arms.blend import Blend
from anchorctx.kvcomm.arms.names import ArmSpec, makers
from anchorctx.kvcomm.arms.offsets import Kvcomm, KvcommUngated, MeanOffset
from anchorctx.kvcomm.arms.pool import PoolConfig
from anchorctx.kvcomm.arms.predicted import Predicted
from anchorctx.kvcomm.chat import has_template
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.records.results import Result, Rows
from anchorctx.records.transcripts import FILE as TRANSCRIPTS
from anchorctx.records.transcripts import Transcript, append_transcript
from anchorctx.settings import check_ranges

logger = logging.getLogger(__name__)

CORPUS_TEXTS = 40
"""Held-out documents that the retrieval task and the split of errors draw their text from."""


class Reuse:
    """See the module. Making one reads the problems, and raises UserError for whatever cannot be run."""

    name = "kvcomm"
    counts = "problem"

    def __init__(
        self, config: ReuseConfig, candidate: Candidate, texts: Corpus, seed: int, attention: str | None
    ) -> None:
        if not config.tasks:
            raise UserError(f"tasks=[] leaves nothing to run: name some of {', '.join(TaskName)}")
        self.config, self._seed, self._label = config, seed, candidate.label
        self._arms = arm_makers(config, seed)
        # One line of text is one piece of documents: facts are planted between lines.
        self._lines = _lines(texts.first(CORPUS_TEXTS), candidate.tokenizer)
        self._tasks: dict[str, tuple[Task, Sequence[Team]]] = {}
        lab = self._lab(_shapes(candidate.config, attention), candidate.tokenizer, self._arms)
        for name in dict.fromkeys(config.tasks):
            task = _task(name, config, lab.decoder, candidate.tokenizer, self._lines, seed)
            self._tasks[task.name] = task, task.teams()
            for team in self._tasks[task.name][1]:
                Trial(lab, task, team)  # for its checks alone
        self._varies = self._has_room(lab.decoder.reach)

    def longest(self) -> int:
        """0: prompts are checked against the model's own limit when the evaluation is made."""
        return 0

    def settings(self) -> dict[str, Any]:
        """All but which tasks run and what is made of the numbers, with digests of the files of problems."""
        questions = (self.config.gsm8k, self.config.mmlu, self.config.humaneval)
        paths = [Path(task.path) for task in questions if task.path is not None]
        files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths if path.is_file()}
        # The agents by their content: the package's too, since only its Python is in the fingerprint of the code.
        agents = hashlib.sha256(agents_file(self.config.agents.file)).hexdigest()[:12]
        # The bound decides nothing but when to stop.
        bound = {} if self.config.until_interval is None else {"bound": self.config.gate.max_kl}
        without = ("tasks", "gate", "allow_code_execution", "unsafe_code_execution", "transcripts")
        return settings_of(self.config, ReuseConfig, *without) | bound | {"files": files, "agents_file": agents}

    def units(self) -> list[Unit]:
        """One a task, and the split of errors, whose rows are named by their lengths."""
        variation = {"tokens": self.config.variation.tokens, "prefix": self.config.variation.prefix}
        return [*({"task": name} for name in self._tasks), *([variation] if self._varies else [])]

    def size(self, unit: Unit) -> int:
        """Problems of a task; documents of the split of errors."""
        if "task" not in unit:
            return self.config.variation.documents
        return sum(len(team.problems) for team in self._tasks[unit["task"]][1])

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Everything was checked when the evaluation was made."""

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """The rows of one task through all arms, or of the split of errors."""
        return self.resume(subject, unit, progress, Parts())

    def resume(self, subject: Subject, unit: Unit, progress: Progress, parts: Parts) -> Iterator[Result]:
        """The same, where `parts` holds a task's first problems."""
        if "task" not in unit:
            yield from self._variation(subject, progress)
            return
        task, teams = self._tasks[unit["task"]]
        rank, world = rank_and_size()
        # Arms a b c d e on 2 processes: the first takes a c e, the second b d, and both run dense.
        mine = {"dense", *[name for name in self._arms if name != "dense"][rank::world]}
        arms = {name: make for name, make in self._arms.items() if name in mine}
        lab = self._lab(subject.model, subject.tokenizer, arms)
        trials = [Trial(lab, task, team) for team in teams]
        for trial in trials:
            trial.prepare()
        keep = functools.partial(self._keep, folder=subject.folder)
        found = run_task(task.name, trials, list(self._arms), self.config, parts, progress, keep)
        yield from record_rows(task.name, found.records, found.problems, found.about)

    def _keep(self, said: Transcript, folder: Path | None) -> None:
        """Write what was said on one problem, but for the last ones; the first process does."""
        if folder is not None and is_first() and said.problem < self.config.transcripts:
            append_transcript(folder / TRANSCRIPTS, dataclasses.replace(said, model=self._label))

    def conclude(self, rows: Sequence[Result]) -> list[Result]:
        """What to use in each task."""
        found = (recommendation(Rows(rows), task, self.config.gate) for task in self._tasks)
        return [row for row in found if row is not None]

    def _lab(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arms: dict[str, Callable[[], Arm]]
    ) -> Lab:
        config = self.config
        spoken = (config.accuracy, config.decision_dense, config.compare_tokens, config.decode_together, self._seed)
        return Lab(model, tokenizer, Decoder(model), arms, *spoken)

    @property
    def _stream(self) -> np.ndarray:
        return np.array([token for line in self._lines for token in line])

    def _has_room(self, reach: int) -> bool:
        """Whether the split of errors can be measured; warns and leaves it out where model or text are too short."""
        config, found = self.config.variation, len(self._stream)
        needed, text = config.tokens + 2 * config.prefix + 1, 4 * max(config.tokens, config.prefix)
        if found >= text and reach >= needed:
            return True
        if is_first():
            logger.warning(
                f"kvcomm_variation is left out: variation.tokens={config.tokens} behind variation.prefix="
                f"{config.prefix} needs {needed:,} tokens of the model, which reaches {reach:,}, and {text:,} of text, "
                f"of which there are {found:,}: lower them"
            )
        return False

    def _variation(self, subject: Subject, progress: Progress) -> list[Result]:
        """How a held-out document's KV varies with what stands before it, and with its distance from that."""
        config, stream, decoder = self.config.variation, self._stream, Decoder(subject.model)
        longest, tokenizer = max(config.tokens, config.prefix), subject.tokenizer
        rng = np.random.default_rng([self._seed, 1])
        starts = rng.integers(0, len(stream) - longest, size=(config.documents, 3))
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        # (documents, 3, longest): each a document and the two texts that it is read behind.
        pieces = stream[starts[..., None] + np.arange(longest)].tolist()

        def error(piece: list[list[int]]) -> Any:
            document, *before = piece
            a, b = (text[: config.prefix] for text in before)
            return context_error(decoder, document[: config.tokens], a, b, bos)  # type: ignore[arg-type]

        return variation_rows(spread(pieces, error, [1] * len(pieces), progress), config.tokens, config.prefix)


def _shapes(config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """The model without its weights, to check on what does not depend on them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def arm_makers(config: ReuseConfig, seed: int = 0) -> dict[str, Callable[[], Arm]]:
    """What makes each arm to run, dense first, with its settings; UserError for a wrong name or a bad setting.

    Names are as they stand in `arms`: what is behind a colon there takes the place of the arm's own setting.
    """
    specs = {name: ArmSpec.parse(name) for name in ("dense", *config.arms)}
    check_ranges(config)
    s = config.settings
    bounds = s.gamma, s.temperature, s.min_exemplars, s.max_exemplars, s.window, s.max_bytes
    pool = PoolConfig(*bounds, s.h, s.weights_h, s.reduce)

    def kvcomm(gamma: float = s.gamma, **options: Any) -> Arm:
        return Kvcomm(replace(pool, gamma=gamma, **options), partial=s.partial)

    p = s.predicted
    learnt = {"warmup": p.warmup, "ladder": p.ladder, "miss": p.miss, "tokens": config.compare_tokens}
    if any(spec.name == "predicted" for spec in specs.values()):
        Predicted(**learnt)  # for its checks alone
    # Arms that take settings; the others are made as they are.
    known = makers() | {
        "rotate_first_k": lambda k=s.first: RotateFirst(k),
        "rotate_glue": lambda k=s.first: RotateGlue(k),
        "blend": lambda share=s.share: Blend(share),
        "kvcomm": kvcomm,
        "kvcomm_ungated": lambda **options: KvcommUngated(replace(pool, **options), partial=s.partial),
        "mean_offset": lambda: MeanOffset(s.warmup),
        "predicted": lambda bound=p.bound: Predicted(bound, **learnt),
        "random": lambda: RandomMoments(seed),
    }
    check_arm(config.gate, config.arms)
    return {name: spec.maker(known) for name, spec in specs.items()}


def _task(
    name: TaskName,
    config: ReuseConfig,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[tuple[int, ...]],
    seed: int,
) -> Task:
    if name is TaskName.retrieval and _reads(config, tokenizer):

        def encode(text: str) -> tuple[int, ...]:
            return tuple(text_ids(tokenizer, [text])[0])

        return Reading(config.retrieval, _crew(config, name), lines, encode, seed)
    if name is TaskName.retrieval:
        FactTokens.of(tokenizer)  # UserError where the tokenizer does not know the facts
        ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}  # type: ignore[arg-type]
        words = FactVocabulary(KEY_TOKENS, VALUE_TOKENS)
        return RetrievalTask(config.retrieval, config.agents.count, lines, words, ids, seed)
    if name is TaskName.copy:
        sizes = decoder.vocabulary, seed, decoder.reach
        return CopyTask(config.copy, config.agents.count, config.topology, *sizes)
    chat = _chats(config, tokenizer)
    crew = _crew(config, name) if chat or config.agents.file else None
    if name is TaskName.gsm8k:
        return Gsm8k(config.gsm8k, config.agents.count, config.topology, crew, chat)
    if name is TaskName.mmlu:
        return Mmlu(config.mmlu, config.agents.count, config.topology, crew, chat)
    return HumanEval(config, crew, chat)


def _reads(config: ReuseConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether retrieval is in words: for chat models that were not trained on tokens for facts."""
    known = set(tokenizer.get_vocab())
    return not known.issuperset(SPECIAL_TOKENS) and _chats(config, tokenizer)


def _chats(config: ReuseConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether agents have messages; UserError where they are asked for and there is no template to put them in."""
    there = has_template(tokenizer)
    asked = "chat=true" if config.chat else f"agents.file={config.agents.file}" if config.agents.file else None
    if asked and config.chat is not False and not there:
        raise UserError(
            f"{asked} asks for roles, but the tokenizer {tokenizer.name_or_path} has no chat template to put them in: "
            "set chat=false for prompts of plain text, or name a chat model"
        )
    return there if config.chat is None else config.chat


def _crew(config: ReuseConfig, name: TaskName) -> Crew:
    crew = Crew.of(config.agents.file, name)
    return crew if config.agents.file else crew.of_size(config.agents.count)


def _lines(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    lines = [line for text in texts for line in lines_of(text)]
    return [tuple(ids) for ids in text_ids(tokenizer, lines) if ids]
