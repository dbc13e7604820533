"""What an evaluation of KV reuse can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from anchorctx.evals.evaluators.reuse.gate import GateConfig
from anchorctx.evals.evaluators.reuse.measures import VariationConfig
from anchorctx.evals.evaluators.reuse.tasks.copy import CopyTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.questions import QuestionTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.retrieval import RetrievalTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.sandbox import Limits
from anchorctx.kvcomm.arms.registry import ARMS, CONTROLS


class TaskName(StrEnum):
    """The tasks."""

    retrieval = "retrieval"
    """Planted facts in documents that only some agents hold."""
    copy = "copy"
    """Synthetic requests of given lengths, for timing."""
    gsm8k = "gsm8k"
    """School mathematics."""
    mmlu = "mmlu"
    """Multiple choice."""
    humaneval = "humaneval"
    """Programs that must pass tests; needs allow_code_execution."""


@dataclass(kw_only=True, slots=True)
class ArmsConfig:
    """Settings of the arms."""

    first: int = 8
    """rotate_glue: tokens recomputed at the start of each content."""
    warmup: int = 3
    """mean_offset: contents that are computed before the mean is used."""
    min_exemplars: int = 4
    """kvcomm: compute and store contents until this many exemplars are as long; the paper's rule alone is 1."""
    gamma: float = 0.3
    """kvcomm: share where the entropy of the weights is below this part of its greatest value, 0..1."""
    temperature: float = 1.0
    """kvcomm: divides the distances between contents."""
    max_exemplars: int = 20
    """kvcomm: exemplars a placeholder, at most."""
    window: int = 5
    """kvcomm: on overflow the least used of this many oldest exemplars goes."""
    max_bytes: int | None = None
    """kvcomm: bytes of all exemplars of a session, at most; null is no limit."""
    partial: bool = True
    """kvcomm: a content that cannot be shared computes its own segment; false, as in the paper, the whole prompt."""


@dataclass(kw_only=True, slots=True)
class ReuseConfig:
    """What is evaluated, of any model."""

    tasks: list[TaskName] = field(default_factory=lambda: [TaskName.retrieval, TaskName.copy])
    """Tasks: retrieval, copy, gsm8k, mmlu, humaneval."""
    arms: list[str] = field(default_factory=lambda: [*ARMS, *CONTROLS])
    """Arms and controls; dense always runs beside them."""
    agents: int = 3
    """Agents, the decision agent included."""
    topology: str = "full"
    """Who hears whom: chain, star, mesh, layered, full, debate or random; retrieval has its own."""
    decision_dense: bool = True
    """Accuracy: the decision agent computes its whole prompt, whatever the arm."""
    compare_tokens: int = 64
    """Tokens of each answer over which an arm's distributions are compared with dense's."""
    settings: ArmsConfig = field(default_factory=ArmsConfig)
    """Settings of the arms."""
    retrieval: RetrievalTaskConfig = field(default_factory=RetrievalTaskConfig)
    """Settings of the retrieval task."""
    copy: CopyTaskConfig = field(default_factory=CopyTaskConfig)
    """Settings of the copy task."""
    gsm8k: QuestionTaskConfig = field(default_factory=lambda: QuestionTaskConfig(dataset="openai/gsm8k:main"))
    """Where GSM8K's problems come from."""
    mmlu: QuestionTaskConfig = field(default_factory=lambda: QuestionTaskConfig(dataset="cais/mmlu:all"))
    """Where MMLU's problems come from."""
    humaneval: QuestionTaskConfig = field(
        default_factory=lambda: QuestionTaskConfig(dataset="openai/openai_humaneval", max_new_tokens=384)
    )
    """Where HumanEval's problems come from."""
    variation: VariationConfig = field(default_factory=VariationConfig)
    """How a document's KV varies with what stands before it and with its place; left out where the model's length or
    the corpus is too short for it."""
    allow_code_execution: bool = False
    """humaneval: run generated code, in a subprocess without network and with the limits of `sandbox`."""
    sandbox: Limits = field(default_factory=Limits)
    """humaneval: what a program may use."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Bounds on one arm; beyond them the command exits with 1."""
