"""What `anchorctx eval`, and `anchorctx train` under `live`, can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from anchorctx.attention.config import RopeDtype
from anchorctx.data.sources.source import SourceConfig
from anchorctx.evals.corpus import embedded
from anchorctx.evals.evaluators.config import (
    ContextConfig,
    LmEvalConfig,
    NeedleConfig,
    PerplexityConfig,
    RetrievalConfig,
    RulerConfig,
)
from anchorctx.evals.evaluators.precision.config import StudyConfig
from anchorctx.evals.evaluators.reuse.config import ReuseConfig
from anchorctx.models import RopeConfig
from anchorctx.settings import Count, Length, Seed


class EvalName(StrEnum):
    """The evaluations."""

    perplexity = "perplexity"
    """Perplexity of held-out documents, each alone behind the anchor, also by position."""
    perplexity_by_context = "perplexity_by_context"
    """Perplexity of the same tokens against how much of their document is seen."""
    retrieval = "retrieval"
    """Retrieval accuracy of planted facts against context length."""
    needle = "needle"
    """Accuracy and log-likelihood of a needle, by context length and depth."""
    ruler = "ruler"
    """RULER by lm-eval, at a list of lengths."""
    lm_eval = "lm_eval"
    """Any tasks of lm-eval: LongBench, InfiniteBench, MMLU, HellaSwag ..."""
    precision = "precision"
    """What bfloat16 does to RoPE on this checkpoint; `anchorctx precision` for short."""
    kvcomm = "kvcomm"
    """How well agents reuse each other's KV caches; `anchorctx kvcomm` for short."""


class EvalDtype(StrEnum):
    """Precision of the weights and activations."""

    auto = "auto"
    """As saved on a GPU; float32 on a CPU."""
    float32 = "float32"
    """Full precision."""
    bfloat16 = "bfloat16"
    """Half the memory."""


@dataclass(kw_only=True, slots=True)
class EvaluatedModel:
    """One model, and how it is to be read."""

    path: str = "???"
    """Hugging Face folder (or hub name) with weights and tokenizer."""
    label: str | None = None
    """Name of the model in the results; null takes the folder's name, with as much of its path as tells it apart."""
    average: str | None = None
    """Results of all models with the same word here are also averaged, under this word as label: give the checkpoints
    of one run, since RULER swings from one to the next."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as {max_position_embeddings: 4096} to read past its limit."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Changes to the rotary position embeddings."""
    max_length: Length | None = None
    """New maximum length in tokens, together with rope.theta or rope.type and rope.factor."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What `anchorctx eval` does."""

    out_dir: str
    """Folder for results.jsonl (appended to) and the manifests; what it holds already is not measured again."""
    model: Any = None
    """Hugging Face folder (or hub name) with weights and tokenizer, or several: model=[runs/a,runs/b]."""
    models: list[EvaluatedModel] = field(default_factory=list)
    """Instead of model, where each needs settings of its own: [{path: runs/a, label: before}, {path: runs/b}]; keys as
    in label, average, config, rope and max_length below."""
    evals: list[EvalName] = field(default_factory=lambda: [EvalName.perplexity])
    """Evaluations to run: perplexity, perplexity_by_context, retrieval, needle, ruler, lm_eval, precision, kvcomm."""
    label: str | None = None
    """Name of the model in the results; null takes the folder's name."""
    average: str | None = None
    """Also average the results of all models (checkpoints of one run), under this word as label."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as {max_position_embeddings: 4096} to read past its limit."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Changes to the rotary position embeddings of `model`."""
    max_length: Length | None = None
    """New maximum length of `model` in tokens, together with rope.theta or rope.type and rope.factor."""
    rope_dtype: RopeDtype = RopeDtype.bfloat16
    """Rotate queries and keys in float32, as training does by default, or in the activations' dtype (bfloat16), as the
    folder will run in plain transformers."""
    attention: str = "auto"
    """auto (transformers' choice), a name of transformers' own such as sdpa, or ours for prompts: anchor, anchor_cpu,
    anchor_torch_varlen, anchor_flash_attn, anchor_flex, anchor_reference."""
    corpus: SourceConfig = field(default_factory=embedded)
    """Held-out documents: any source that `prepare` takes; the embedded corpus' validation files by default."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    """Settings of the perplexity evaluation."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """Settings of perplexity_by_context."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Settings of the retrieval evaluation."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    """Settings of the needle map."""
    ruler: RulerConfig = field(default_factory=RulerConfig)
    """Settings of RULER."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    """Settings of lm-eval."""
    precision: StudyConfig = field(default_factory=StudyConfig)
    """Settings of the precision study."""
    kvcomm: ReuseConfig = field(default_factory=ReuseConfig)
    """Settings of the evaluation of KV reuse."""
    seed: Seed = 0
    """Seed of whatever an evaluation draws; lm-eval keeps its own."""
    dtype: EvalDtype = EvalDtype.auto
    """Precision: auto, float32 or bfloat16."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""
    device_map: str | None = None
    """auto, balanced or sequential: spread a model that is larger than a card over all of them (by accelerate)."""


@dataclass(kw_only=True)  # without slots: it is one of two bases
class KvcommModels:
    """Whom `anchorctx kvcomm` evaluates, and where its results go."""

    model: Any = None
    """Hugging Face folder (or hub name) with weights and tokenizer, which all agents run; several, as
    model=[runs/a,runs/b], are evaluated one after another on the same problems."""
    models: list[EvaluatedModel] = field(default_factory=list)
    """Instead of model, where each needs settings of its own: [{path: runs/a, label: base}, {path: runs/b}]; keys are
    label, config, rope and max_length."""
    out_dir: str
    """Folder for results.jsonl (appended to), manifest.json and pictures."""
    label: str | None = None
    """Name of the model in the results; null takes the folder's name."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as {max_position_embeddings: 4096} to read past its limit."""


@dataclass(kw_only=True, slots=True)
class KvcommConfig(ReuseConfig, KvcommModels):
    """What `anchorctx kvcomm` does."""

    corpus: SourceConfig = field(default_factory=embedded)
    """Held-out text for the retrieval task's documents: any source that `prepare` takes."""
    seed: Seed = 0
    """Seed of problems, orders and noise."""
    dtype: EvalDtype = EvalDtype.auto
    """Precision: auto, float32 or bfloat16."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""


class LiveName(StrEnum):
    """Evaluations that only read, which a model can do while it trains."""

    perplexity = "perplexity"
    """Of held-out documents, each alone behind the anchor."""
    perplexity_by_context = "perplexity_by_context"
    """Of the same tokens against how much is seen."""
    retrieval = "retrieval"
    """Of planted facts."""
    needle = "needle"
    """By length and depth."""


@dataclass(kw_only=True, slots=True)
class LiveConfig:
    """What is measured of the live model, and how often; the defaults are small."""

    every: Count = 0
    """Steps between measurements, which are also made before the first step and after the last; 0 is never."""
    evals: list[LiveName] = field(default_factory=lambda: [LiveName.perplexity])
    """perplexity, perplexity_by_context, retrieval, needle: into metrics and W&B as eval/..."""
    corpus: SourceConfig = field(default_factory=embedded)
    """Held-out documents; the embedded corpus' validation files by default."""
    perplexity: PerplexityConfig = field(default_factory=lambda: PerplexityConfig(documents=16, max_length=2048))
    """Settings of the perplexity evaluation."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(lengths=[512, 2048], documents=8))
    """Settings of perplexity_by_context."""
    retrieval: RetrievalConfig = field(default_factory=lambda: RetrievalConfig(lengths=[512, 2048], rows=8))
    """Settings of the retrieval evaluation."""
    needle: NeedleConfig = field(default_factory=lambda: NeedleConfig(lengths=[512, 2048], rows=4))
    """Settings of the needle map."""
    seed: Seed = 0
    """Seed of whatever an evaluation draws: the same at every step."""
