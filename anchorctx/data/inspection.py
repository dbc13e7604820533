"""`prepare --dry-run`: what there is, what each policy would make of it and what it would lose; nothing is packed.

The rows are really planned, from the documents' lengths, so that the numbers are those of the packed set and not an
estimate. The tokens are kept: the preparation that follows starts from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.data.config import PrepareConfig
from anchorctx.data.engine import open_engine
from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.pieces import Tags
from anchorctx.data.packing.planning import Corpus, DocumentPlan, plan_rows
from anchorctx.data.prepare import Preparation
from anchorctx.records.locks import in_use
from anchorctx.records.table import text_table

BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Expected:
    """What a policy would make of the corpus."""

    policy: Policy
    long_documents: LongDocuments
    rows: int
    padding: int
    """Tokens that fill rows up."""
    dropped: dict[str, int]
    """Tokens that would be in no row, by reason."""
    cut_documents: int
    """Documents in several pieces."""
    cost: float
    """Sum over all rows of the squared lengths of their documents, in tokens squared: what attention costs."""


def inspect(config: PrepareConfig) -> list[Expected]:
    """Print documents, tokens, the histogram of lengths and a table of policies; returns the table."""
    preparation = Preparation(config)
    with in_use(preparation.tokens_folder), open_engine(config.engine, config.workers) as engine:
        corpus = preparation.corpus(engine)
    plan = DocumentPlan(corpus, config.mixture)
    tags, domain_tags = preparation.tags(corpus)
    expected = [
        expect(
            plan, dataclasses.replace(config.pack, policy=policy, long_documents=long), preparation, tags, domain_tags
        )
        for policy in Policy
        for long in LongDocuments
    ]
    print(report(corpus, plan.accounting(), expected, config))
    return expected


def expect(
    plan: DocumentPlan, pack: PackConfig, preparation: Preparation, tags: Tags, domain_tags: list[np.ndarray]
) -> Expected:
    """Plan all rows under `pack`, and count; the arguments after it are as for `plan_rows`."""
    capacity, accounting = preparation.shape.capacity, plan.accounting()
    rows = used = 0
    squares, seen = 0.0, [np.empty(0, np.int64)]
    for some in plan_rows(plan, pack, capacity, tags, domain_tags, accounting):
        sizes = some.pieces["size"].astype(np.float64)
        # sizes = [3, 5, 4], rows of the first two pieces and of the third: filled = [8, 4]
        filled = np.add.reduceat(sizes, some.ends - some.counts)
        rows, used = rows + len(some), used + int(filled.sum())
        squares += float(sizes @ sizes)
        seen.append(some.pieces["document"])
    # document numbers [0, 1, 1, 2] of all pieces: pieces = [1, 2, 1], so one document was cut
    pieces = np.bincount(np.concatenate(seen)) if rows else np.zeros(1, np.int64)
    dropped = {reason: count for reason, count in accounting.total_dropped.items() if count}
    cut = int((pieces > 1).sum())
    return Expected(pack.policy, pack.long_documents, rows, rows * capacity - used, dropped, cut, squares)


def report(corpus: Corpus, accounting: Accounting, expected: list[Expected], config: PrepareConfig) -> str:
    """The text that is printed."""
    lines = [*_sources(corpus), "", *_histogram(corpus, config.row_length - config.anchor_len), ""]
    lines += [f"in rows of {config.row_length:,} tokens, as pack.policy and pack.long_documents would have it:"]
    lines += policy_table(expected, config)
    return "\n".join([*lines, "", "nothing was packed; without --dry-run the rows marked > are written"])


def policy_table(expected: list[Expected], config: PrepareConfig) -> list[str]:
    """A line for each policy; the configured one is marked."""
    rows: list[Sequence[object]] = [("  policy", "rows", "padding", "cut documents", "dropped tokens")]
    for one in expected:
        chosen = (one.policy, one.long_documents) == (config.pack.policy, config.pack.long_documents)
        name = f"{'>' if chosen else ' '} {one.policy.value}, {one.long_documents.value}"
        share = one.padding / max(one.rows * config.row_length, 1)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(one.dropped.items())) or "none"
        rows.append((name, one.rows, f"{share:.2%}", one.cut_documents, dropped))
    return text_table(rows, "<>>><")


def _sources(corpus: Corpus) -> list[str]:
    rows: list[Sequence[object]] = [("source", "documents", "tokens", "masked", "longest")]
    totals = np.zeros(3, np.int64)
    for index, name in enumerate(corpus.names):
        parts = corpus.parts_of(index)
        lengths = [part.documents["length"] for part in parts]
        documents, tokens = sum(map(len, lengths)), sum(int(each.sum()) for each in lengths)
        masked = sum(part.masked() for part in parts)
        longest = max((int(each.max()) for each in lengths if len(each)), default=0)
        rows.append((f"  {name}", documents, tokens, masked, longest))
        totals += [documents, tokens, masked]
    if len(corpus.names) > 1:
        rows.append(("  all", *totals, ""))
    if not totals[2]:  # no labels, nothing to say about them
        rows = [(*row[:3], row[4]) for row in rows]
    rows += [f"  skipped rows: {count:,} ({reason})" for reason, count in sorted(corpus.skipped().items())]
    return text_table(rows, "<>")


def _histogram(corpus: Corpus, capacity: int) -> list[str]:
    counts = corpus.length_histogram()
    used = np.flatnonzero(counts)
    rows: list[Sequence[object]] = [("tokens in a document", "documents")]
    for power in range(used[0], used[-1] + 1) if len(used) else ():
        # rounded up, so that a single document among millions still shows
        bar = "#" * -(-BAR_WIDTH * int(counts[power]) // int(counts.max()))
        note = "  longer than a row" if 2**power > capacity else ""
        rows.append((f"  {2**power:,} to {2 ** (power + 1) - 1:,}", counts[power], bar + note))
    return text_table(rows, "<><")
