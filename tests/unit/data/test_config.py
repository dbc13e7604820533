"""The configuration of `prepare` as the command line fills it."""

from __future__ import annotations

import pytest

from anchorctx.config import resolve
from anchorctx.data.config import LossWeights, PrepareConfig
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.sources.documents import OnBadRow
from anchorctx.data.sources.source import SourceConfig, SourceFormat
from anchorctx.data.sources.stdlib import Split, StdlibConfig
from anchorctx.errors import UserError

NEEDED = ["out_dir=x", "tokenizer=t", "row_length=128"]


def test_nested_and_listed_values_arrive_as_dataclasses() -> None:
    sources = "sources=[{path: c.jsonl, on_bad_row: skip}, {format: stdlib, stdlib: {facts: true, split: validation}}]"
    pack = ["pack.policy=concat_split", "pack.long_documents=split"]
    config = resolve("prepare", [*NEEDED, sources, *pack, "weights=facts"])
    assert config == PrepareConfig(
        out_dir="x",
        tokenizer="t",
        row_length=128,
        sources=[
            SourceConfig(path="c.jsonl", on_bad_row=OnBadRow.skip),
            SourceConfig(format=SourceFormat.stdlib, stdlib=StdlibConfig(facts=True, split=Split.validation)),
        ],
        pack=PackConfig(policy=Policy.concat_split, long_documents=LongDocuments.split),
        weights=LossWeights.facts,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources=[{path: c, shuffle: 1}]", "shuffle"),
        ("pack.policy=worst_fit", "worst_fit"),
        ("pack.polcy=best_fit", "policy"),
    ],
)
def test_unknown_keys_and_values_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("prepare", [*NEEDED, "sources=[{path: c}]", override])
