"""What `anchorctx prepare` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Le

from anchorctx.data.engine import EngineName
from anchorctx.data.packing.config import PackConfig
from anchorctx.data.packing.mixture import MixtureConfig
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.tokens.tokenizer import SpecialTokens
from anchorctx.errors import UserError
from anchorctx.settings import LONGEST, Length, Seed, check_ranges


class LossWeights(StrEnum):
    """How much each token counts in the loss."""

    uniform = "uniform"
    """All trained tokens the same."""
    facts = "facts"
    """Planted facts: 1 on answers, 0.1 on text, 0 on what cannot be predicted."""


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """What `anchorctx prepare` does."""

    out_dir: str
    """Folder for packed sets; each gets a folder of its own in it, named by its fingerprint."""
    sources: list[SourceConfig]
    """Where the documents come from, read one after the other."""
    tokenizer: str
    """Folder or hub name of the model whose tokenizer to use."""
    row_length: Length
    """Tokens in a row, anchor included."""
    anchor_len: Annotated[int, Ge(1), Le(LONGEST), "patterns without an anchor ignore it"] = 1
    """Anchor tokens at the start of each row."""
    pack: PackConfig = field(default_factory=PackConfig)
    """How documents become rows."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How much of which source."""
    weights: LossWeights = LossWeights.uniform
    """Loss weights: uniform or facts."""
    special_tokens: SpecialTokens = SpecialTokens.text
    """What becomes of a special token's name in a document, such as </s>: text, or control (it is that token)."""
    append_eos: bool = True
    """End each document with EOS, unless it ends so already, where the tokenizer has one; it is trained like any
    token."""
    engine: EngineName = EngineName.local
    """local, or ray for a cluster (RAY_ADDRESS) whose machines all see out_dir and the sources; the result is the
    same."""
    workers: Annotated[int, Ge(1), Le(4096), "use null to choose by the processors"] | None = None
    """Tokenising processes; 1 uses threads; null chooses by the size of the corpus and the number of processors. With
    engine=ray the workers of the cluster. The result is the same."""
    keep_tokens: bool = False
    """Keep the token ids beside the packed sets, in out_dir/.tokens, to pack them again another way in seconds; false
    removes them when the set is whole."""
    seed: Seed = 0
    """Seed of the interleaving."""

    def validate(self) -> None:
        """UserError for values out of range."""
        check_ranges(self)
        out = str(self.out_dir)
        if out != out.encode("utf-8", "ignore").decode():
            raise UserError(f"out_dir={ascii(out)} must be UTF-8, for the tokenizer is written to no other: rename it")
        if self.row_length < self.anchor_len + 2:
            raise UserError(
                f"row_length={self.row_length} must be at least {self.anchor_len + 2}, "
                "the anchor and two tokens: raise it"
            )
        if not self.sources:
            raise UserError("sources is empty: name at least one, such as sources=[{path: corpus.jsonl}]")
        self.pack.validate(self.row_length - self.anchor_len)
        self.mixture.validate()
