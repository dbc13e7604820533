"""What `anchorctx report` and `anchorctx plot` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from anchorctx.layout import Pattern
from anchorctx.records.wandb_run import WandbMode
from anchorctx.settings import Count, Positive


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What `anchorctx report` does."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs, evaluations and packed sets, or folders that contain some; plain words are taken as these."""
    out: str = "report.html"
    """The file to write."""
    title: str | None = None
    """The page's title; null makes one of the folders' names."""
    pretraining_length: Positive | None = None
    """Tokens that the first model was trained at; marked in the retrieval chart."""
    row: Count = 0
    """Which row of a packed set to draw."""
    pattern: str | None = None
    """Draw it under this pattern: anchor, anchor_reset, full, intra_doc, intra_doc_reset; null is the runs' own."""
    wandb: WandbMode = WandbMode.disabled
    """Also send figures and tables to Weights & Biases: disabled, offline (a folder beside `out`) or online."""
    project: str = "anchorctx"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the account's own."""
    group: str | None = None
    """W&B group."""


@dataclass(kw_only=True, slots=True)
class PlotConfig:
    """Draws what its inputs allow. `???` marks what must be given."""

    out_dir: str = "???"
    """Folder for the pictures."""
    run: str | None = None
    """`out_dir` of a training run: draws loss.png from its metrics.jsonl."""
    results: list[str] = field(default_factory=list)
    """results.jsonl files of evaluations: draws retrieval.png, one line a model."""
    packed: str | None = None
    """Folder of a packed set: draws pattern.png, what one of its rows may see."""
    row: Count | None = None
    """Which row of the packed set, from 0; null takes one with a typical number of documents."""
    pattern: Pattern = Pattern.anchor
    """Under which pattern: anchor, anchor_reset, full, intra_doc or intra_doc_reset."""
    pretraining_length: Positive | None = None
    """Marks the length, in tokens, that the first model was trained at."""
