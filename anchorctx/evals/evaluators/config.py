"""Settings of the evaluations; apart from their code, so that reading them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Le

from anchorctx.settings import LONGEST, Count, Length, Positive, Share


@dataclass(kw_only=True, slots=True)
class PerplexityConfig:
    """Which documents are scored, and how."""

    documents: Count = 200
    """Held-out documents scored, in the corpus' order, every so many of them; 0 scores all."""
    min_length: Annotated[int, Ge(0), Le(LONGEST)] = 0
    """Leave documents of fewer tokens out, the anchor included: perplexity at far positions needs long ones; 0 takes
    all."""
    max_length: Annotated[int, Ge(3), Le(LONGEST)] = 4096
    """Longest input in tokens, the anchor included; longer documents are cut there (or see stride)."""
    stride: Count = 0
    """Slide windows of max_length over longer documents, in steps of this many tokens: every token is then scored, with
    at least max_length - stride tokens before it; 0 cuts them and leaves the rest out."""
    buckets: list[Positive] = field(default_factory=list)
    """Also report perplexity by a token's position in its input, in buckets that end at these positions; [] takes 128
    and its doublings."""
    batch_tokens: Positive = 8192
    """Tokens a forward pass, padding included; a document longer than this is a batch of its own."""
    exclude_facts: bool = True
    """Leave planted keys and values out of the average, so that the number is about text."""


@dataclass(kw_only=True, slots=True)
class ContextConfig:
    """Which tokens are predicted, from how much."""

    lengths: list[Length] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    """Lengths of the input in tokens, the anchor and the predicted tokens included."""
    targets: Positive = 256
    """Tokens predicted in each document."""
    documents: Count = 64
    """Documents of at least max(lengths) tokens to use, spread evenly over those there are; 0 uses all."""
    batch_tokens: Positive = 8192
    """Tokens a forward pass."""


@dataclass(kw_only=True, slots=True)
class RetrievalConfig:
    """How rows with facts are made."""

    lengths: list[Length] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    """Context lengths, in tokens."""
    rows: Positive = 32
    """Rows of each length."""
    facts: Annotated[int, Ge(1), Le(64)] = 8  # data.sources.facts.NUM_KEYS, whose module imports numpy
    """Different facts in a row, whatever its length (at most 64)."""
    mentions: Annotated[int, Ge(2), "a fact is stated once, then asked for"] = 2
    """Times a fact appears in a row: stated once, then asked for."""
    bos: bool = True
    """Whether rows begin with the token that stands in front of documents; without it they are one token shorter."""
    batch_tokens: Positive = 16384
    """Tokens a forward pass."""


class NeedleStyle(StrEnum):
    """What a needle is made of."""

    auto = "auto"
    """facts where the tokenizer has their tokens, else sentences."""
    facts = "facts"
    """Planted key and value tokens, for very small models."""
    sentences = "sentences"
    """Plain English, for real models."""


@dataclass(kw_only=True, slots=True)
class NeedleConfig:
    """The cells of the map, and what is in a row."""

    lengths: list[Length] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    """Lengths of a row in tokens, question and answer included."""
    depths: list[Share] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the needle lies, as a share of the text before the question."""
    rows: Positive = 16
    """Rows of each cell."""
    distractors: Count = 7
    """Other needles in a row, at random depths."""
    style: NeedleStyle = NeedleStyle.auto
    """auto, facts or sentences."""
    batch_tokens: Positive = 16384
    """Tokens a forward pass."""


@dataclass(kw_only=True, slots=True)
class HarnessConfig:
    """What lm-eval can be told about any task."""

    limit: Positive | None = None
    """Documents of each task to use, from its start; null uses all."""
    batch_size: Positive = 1
    """Requests a forward pass, padded on the left to the longest."""
    max_length: Length | None = None
    """Longest prompt with its answer in tokens, beyond which lm-eval cuts the prompt's start; null is the model's."""
    add_bos_token: bool | None = None
    """Put BOS, the anchor, in front of every prompt; null leaves it to the tokenizer, as lm-eval does."""
    apply_chat_template: bool = False
    """Wrap prompts in the tokenizer's chat template."""


@dataclass(kw_only=True, slots=True)
class LmEvalConfig(HarnessConfig):
    """Which tasks of lm-eval, and how."""

    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags: hellaswag, mmlu, longbench, longbench2, infinitebench ... (all: lm_eval ls tasks)."""
    num_fewshot: Count | None = None
    """Examples in each prompt; null is the task's own."""
    include_path: str | None = None
    """Folder of task files (.yaml) of your own."""


OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Tasks whose documents are made of nothing but words and numbers."""


@dataclass(kw_only=True, slots=True)
class RulerConfig(HarnessConfig):
    """Which tasks, and how long."""

    tasks: list[str] = field(default_factory=lambda: list(OFFLINE))
    """RULER's tasks; [ruler] is all thirteen, seven of which need the hub for essays and questions."""
    lengths: list[Length] = field(default_factory=lambda: [4096])
    """Lengths in tokens, the answer included."""
