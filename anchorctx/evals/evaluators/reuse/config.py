"""What an evaluation of KV reuse can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from anchorctx.kvcomm.arms.names import CONTROLS, Feature, Reduce
from anchorctx.settings import Count, NonNegativeFloat, Positive, PositiveFloat, Share


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
class GateConfig:
    """Bounds on one arm, for every model and task that runs."""

    arm: str | None = None
    """The arm that must stay within the bounds; null asks for no gate."""
    max_kl: NonNegativeFloat = 0.05
    """Mean KL(dense | arm) over the compared tokens, at most, in nats. What is recommended is within it with the whole
    of its interval."""
    min_agreement: Share = 0.95
    """Share of compared tokens with the same most probable token, at least, 0..1."""
    min_reuse: Share = 0.1
    """Share of the contents' tokens that are not computed with their prompt, at least, 0..1: an arm that shares nothing
    is as near to dense as can be, and of no use. Agents' own fixed texts, which any cache of prefixes has, do not
    count."""
    max_ttft: NonNegativeFloat = 1.0
    """Seconds to first token of a request (median) over dense's, at most."""


@dataclass(kw_only=True, slots=True)
class VariationConfig:
    """How the KV of held-out documents is compared behind one prefix and another, and at one place and another."""

    documents: Positive = 8
    """Documents."""
    tokens: Positive = 256
    """Tokens of a document."""
    prefix: Positive = 256
    """Tokens of the two texts that it is read behind, which also is how far it is moved."""


@dataclass(kw_only=True, slots=True)
class CopyTaskConfig:
    """Lengths in tokens."""

    problems: Positive = 8
    """Requests."""
    question: Positive = 384
    """Tokens of the question, which every agent reads."""
    prefix: Positive = 128
    """Tokens of each agent's fixed prefix, different for each."""
    output: Positive = 64
    """Tokens of each agent's given answer, which those who hear it read."""


@dataclass(kw_only=True, slots=True)
class QuestionTaskConfig:
    """Questions from a file or the hub."""

    path: str | None = None
    """JSON-lines file; null loads `dataset` from the hub."""
    dataset: str = ""
    """Name on the hub, `name:configuration` where it has several."""
    split: str = "test"
    """Split of the hub's dataset."""
    problems: Annotated[int, Ge(0), "0 takes all"] = 50
    """Questions, from the first on; 0 takes all."""
    max_new_tokens: Positive = 256
    """Longest answer of an agent, in tokens."""


KINDS: tuple[str, ...] = ("single", "two_hop", "override", "absent")


@dataclass(kw_only=True, slots=True)
class RetrievalTaskConfig:
    """Retrieval among agents."""

    problems: Positive = 24
    """Problems of each kind."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Kinds of problem: single, two_hop, override, absent; a kind's problems do not depend on the others."""
    prefix: Count = 0
    """Tokens of text that each agent has before its prompt, other text for each; 0 is none."""
    document_tokens: Positive = 448
    """Length of each document in tokens."""
    facts: Count = 4
    """Facts planted in each document beside those of the problem."""
    confidence: Share = 0.8
    """Probability of its first token below which an agent says nothing, 0..1."""


@dataclass(kw_only=True, slots=True)
class Limits:
    """What a program may use."""

    cpu_seconds: Positive = 5
    """CPU time."""
    wall_seconds: PositiveFloat = 10.0
    """Time on the clock."""
    memory_bytes: Positive = 2**30
    """Address space."""


@dataclass(kw_only=True, slots=True)
class PredictedConfig:
    """Settings of the arm `predicted`."""

    bound: NonNegativeFloat = 0.05
    """A turn is shared where its KL(dense | arm), the mean over its answer's tokens in nats, is predicted within it."""
    warmup: Positive = 12
    """Dense requests whose divergence is measured before the first prediction; 1 / miss - 1 at least."""
    ladder: list[Count] = field(default_factory=lambda: [8, 32])
    """Tokens recomputed at the start of each content: what is tried, in this order, before dense."""
    miss: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Part of the turns that may exceed the limit they are shared by, above 0 and below 1."""


@dataclass(kw_only=True, slots=True)
class ArmsConfig:
    """Settings of the arms, where a name in `arms` has none behind a colon."""

    first: Count = 8
    """rotate_first_k, rotate_glue: tokens recomputed at the start of each segment, k."""
    share: Share = 0.15
    """blend: tokens recomputed in all layers, of those behind an agent's fixed prefix, 0..1."""
    warmup: Positive = 3
    """mean_offset: contents that are computed before the mean is used."""
    min_exemplars: Positive = 4
    """kvcomm: compute and store contents until this many exemplars are as long; the paper's rule alone is 1."""
    gamma: NonNegativeFloat = 0.3
    """kvcomm: share where the entropy of the weights is below this part of its greatest value, 0..1."""
    temperature: PositiveFloat = 1.0
    """kvcomm: divides the distances between contents."""
    max_exemplars: Positive = 20
    """kvcomm: exemplars a placeholder, at most."""
    window: Positive = 5
    """kvcomm: on overflow the least used of this many oldest exemplars goes."""
    max_bytes: Annotated[int, Ge(1), "null is no limit"] | None = None
    """kvcomm: bytes of all exemplars of a session, at most; null is no limit."""
    h: Feature = Feature.embeddings
    """kvcomm: what contents are compared by, to decide whether they are shared: embeddings, values, keys_values."""
    weights_h: Feature | None = None
    """kvcomm: what they are compared by to weigh exemplars; null is h."""
    reduce: Reduce = Reduce.frobenius
    """kvcomm: weights from one distance a content (frobenius) or one a token (per_token)."""
    partial: bool = True
    """kvcomm: a content that cannot be shared computes its own segment; false, as in the paper, the whole prompt."""
    predicted: PredictedConfig = field(default_factory=PredictedConfig)
    """predicted: when turns are shared."""


@dataclass(kw_only=True, slots=True)
class AgentsConfig:
    """Who the agents are."""

    count: Positive = 3
    """Agents, the decision agent included, of the roles that come with the package; a file has its own number."""
    file: str | None = None
    """YAML file with the agents of gsm8k, mmlu, humaneval and retrieval in words: names, messages, who hears whom, who
    decides; null takes those of the package (docs/kvcomm.md says where they are, to copy and change)."""


DEFAULT_ARMS = (
    *("dense", "dense_prefix_cache", "naive", "rotate", "rotate_glue:8", "rotate_glue:32"),
    *("blend:0.05", "blend:0.15", "blend:0.4", "kvcomm", "kvcomm_ungated", "mean_offset", "anchored", "predicted"),
    *CONTROLS,
)
"""Two arms with points enough for a curve, every other one once; `rotate_first_k` is nearly `rotate_glue`."""


@dataclass(kw_only=True, slots=True)
class ReuseConfig:
    """What is evaluated, of any model."""

    tasks: list[TaskName] = field(default_factory=lambda: [TaskName.retrieval, TaskName.copy])
    """Tasks: retrieval, copy, gsm8k, mmlu, humaneval."""
    arms: list[str] = field(default_factory=lambda: list(DEFAULT_ARMS))
    """Arms and controls; dense always runs beside them. rotate_first_k:16 (or rotate_glue:16, blend:0.15,
    kvcomm:0.3, predicted:0.05) sets k (or the share, gamma, the bound) for that arm: an arm may be there several
    times. kvcomm and kvcomm_ungated take more of `settings`, as in kvcomm:0.3,h=values,max_exemplars=5."""
    agents: AgentsConfig = field(default_factory=AgentsConfig)
    """How many agents there are, or the file that describes them."""
    chat: bool | None = None
    """Put the agents' roles and questions into the model's chat template; null does so where there is one. false gives
    prompts of plain text, which are short unless agents.file has others. copy has no words, nor has retrieval where the
    tokenizer knows the tokens of planted facts: there both this and agents.file are passed over."""
    topology: str = "full"
    """Who hears whom: chain, star, mesh, layered, full, debate or random; retrieval has its own, and agents.file may
    have another."""
    transcripts: Count = 200
    """Problems of each kind of each task whose prompts and answers are kept in transcripts.jsonl, the first ones;
    0 keeps none."""
    accuracy: bool = True
    """Let agents speak for themselves through every arm as well, which gives its accuracy; false saves that time, and
    leaves dense's accuracy alone."""
    decision_dense: bool = True
    """Accuracy: the decision agent computes its prompt behind its fixed beginning, whatever the arm."""
    budget_minutes: Annotated[float, Gt(0), "null is no limit"] | None = None
    """Time for a model's problems, shared out equally among the tasks; a task ends before the problem that would not
    fit. null is no limit."""
    until_interval: Annotated[float, Gt(0), "null runs all problems"] | None = None
    """End a task once half of the interval of every arm's divergence is at most this part of gate.max_kl, or all of it
    is on one side: 0.2 of 0.05 nats is 0.01. One looks after 16, 32, 64, ... problems. null
    runs all."""
    compare_tokens: Positive = 64
    """Tokens of each answer over which an arm's distributions are compared with dense's."""
    decode_together: Positive = 8
    """Talks that go on at once where agents speak for themselves: a forward reads the weights for all of them. As many
    problems are run together as arms leave room for: of 32, with four arms, eight. Each takes memory for its prompt's
    keys and values, twice; 1 lets one speak after the other."""
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
    """humaneval: run generated code, in processes that can only compute and read, with the limits of `sandbox`."""
    unsafe_code_execution: bool = False
    """humaneval: run it also where it cannot be confined, such as on macOS; it may then do whatever you may."""
    sandbox: Limits = field(default_factory=Limits)
    """humaneval: what a program may use."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Bounds on one arm; beyond them the command exits with 1."""
