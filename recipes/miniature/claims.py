"""The claims of the pages HYPOTHESES*.md: an effect of one seed's rows each; the margins are those pages'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from effects import (
    consistent,
    divergence,
    exemplars_add,
    first_token,
    gain,
    gain_of_gains,
    growth,
    kept,
    log_ratio,
    lost,
    mended,
    short_loss,
    sink,
    varies,
)
from verdicts import Estimate, Rows, estimate


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of HYPOTHESES.md."""

    name: str
    says: str
    measure: Callable[[Rows, int], float]
    """The effect in the direction claimed, for one seed; KeyError where it was not measured."""
    margin: float

    def estimate(self, rows: Rows) -> Estimate:
        """Over all seeds that have it."""
        return estimate(rows.seeds, lambda seed: self.measure(rows, seed))


BEHIND, LARGE, BARE, AGAIN = "{} behind 1,024", "large_{}", "{} without BOS", "{}_again"
"""Labels of models in the studies with prefixes and without BOS, of the larger ones, and of new seeds."""
KL_ROTATE = (divergence, "rotate")
BF16 = "_bf16"
INTRA, RESET, ANCHOR, INTRA_LONG, RESET_LONG = (
    (name, name + BF16) for name in ("intra_doc", "intra_doc_reset", "anchor", "intra_doc_16k", "intra_doc_reset_16k")
)
CLAIMS = (
    Claim("T1", "anchor beats full on retrieval at 4,096", gain("anchor", "full"), 0.03),
    Claim("T2", "anchor beats intra_doc", gain("anchor", "intra_doc"), 0.02),
    Claim("T3", "bfloat16 rotation costs intra_doc accuracy", gain(*INTRA), 0.02),
    Claim("T4", "it costs continuous positions more than reset ones", gain_of_gains(INTRA, RESET), 0.02),
    Claim("T5", "the anchor protects against it", gain_of_gains(INTRA, ANCHOR), 0.02),
    Claim("T6", "under bfloat16 rotation anchor beats intra_doc", gain("anchor" + BF16, "intra_doc" + BF16), 0.02),
    Claim("T7", "interleaving hurts", gain("anchor", "anchor_interleaved"), 0.02),
    Claim("T8", "domain tags help", gain("anchor_tags", "anchor"), 0.02),
    Claim("T9", "anchor keeps short contexts better than full (nats)", short_loss("anchor", "full"), 0.02),
    Claim("T10", "full loses short contexts against the base (nats)", short_loss("base", "full"), 0.02),
    Claim("T11", "anchor beats full, keys unique in a row", gain("anchor_unique", "full_unique"), 0.03),
    Claim(
        "T12",
        "contradicting documents are part of what full suffers from",
        gain_of_gains(("anchor", "full"), ("anchor_unique", "full_unique")),
        0.03,
    ),
    Claim("L1", "rows of 16,384: anchor beats full", gain("anchor_16k", "full_16k"), 0.03),
    Claim("L2", "rows of 16,384: anchor beats intra_doc", gain("anchor_16k", "intra_doc_16k"), 0.02),
    Claim("L3", "rows of 16,384: bfloat16 rotation costs intra_doc accuracy", gain(*INTRA_LONG), 0.02),
    Claim("L4", "rows of 16,384: continuous positions more than reset", gain_of_gains(INTRA_LONG, RESET_LONG), 0.02),
    Claim("D1", "larger model: anchor beats full", gain("large_anchor", "large_full"), 0.03),
    Claim("D2", "larger model: anchor beats intra_doc", gain("large_anchor", "large_intra_doc"), 0.02),
    Claim("P1", "the first token carries most of the bfloat16 change (share - 0.5)", first_token, 0.0),
    Claim("P2", "the change grows from 512 to 4,096 (log ratio)", growth, math.log(1.2)),
    Claim("P3", "rotation in float32 removes most of it (share - 0.5)", mended, 0.0),
    Claim("P4", "a sink has formed (attention on the first token - 0.1)", sink, 0.0),
    Claim("K1", "a document's keys vary less across prefixes (log ratio)", log_ratio(varies), math.log(1.1)),
    Claim("K2", "plain rotation loses less (log ratio of KL)", log_ratio(*KL_ROTATE), math.log(1.1)),
    Claim("K3", "rotation costs fewer answers where two documents matter", kept(), 0.03),
    Claim(
        "K4",
        "exemplars add less to rotation (share of KL removed)",
        lambda r, s: exemplars_add(r, s, "full") - exemplars_add(r, s, "anchor"),
        0.1,
    ),
    Claim("K5", "judge consistency does not fall, shuffled (- 0.95)", consistent, 0.0),
    Claim(
        "K6",
        "anchored documents are read without further training (difference + 0.05)",
        lambda r, s: lost(r, s, "anchor", "anchored", "all") + 0.05,
        0.0,
    ),
    Claim("C1", "100 steps: anchor beats full", gain("anchor_100_steps", "full_100_steps"), 0.03),
    Claim("C2", "lr 2e-4: anchor beats full", gain("anchor_low_lr", "full_low_lr"), 0.03),
    Claim("C3", "theta 1e6: anchor beats full", gain("anchor_theta_1e6", "full_theta_1e6"), 0.03),
    Claim("C4", "behind 1,024 tokens: keys vary less (log ratio)", log_ratio(varies, of=BEHIND), math.log(1.1)),
    Claim("C5", "behind 1,024 tokens: rotation loses less (log)", log_ratio(*KL_ROTATE, of=BEHIND), math.log(1.1)),
    Claim("C6", "behind 1,024 tokens: rotation costs fewer answers", kept(BEHIND), 0.03),
    Claim("C7", "larger model: keys vary less (log ratio)", log_ratio(varies, of=LARGE), math.log(1.1)),
    Claim("C8", "larger model: rotation loses less (log ratio)", log_ratio(*KL_ROTATE, of=LARGE), math.log(1.1)),
    Claim("C9", "larger model: rotation costs fewer answers", kept(LARGE), 0.03),
    Claim("C10", "larger model: a sink has formed (attention - 0.1)", lambda r, s: sink(r, s, "large_intra_doc"), 0.0),
    Claim(
        "C11",
        "larger model: the first token carries the change (share - 0.5)",
        lambda r, s: first_token(r, s, "large_intra_doc"),
        0.0,
    ),
    Claim("B1", "rows without BOS: anchor beats full", gain(BARE.format("anchor"), BARE.format("full")), 0.03),
    Claim(
        "B2",
        "leaving BOS out costs anchor more than intra_doc",
        gain_of_gains(("anchor", BARE.format("anchor")), ("intra_doc", BARE.format("intra_doc"))),
        0.02,
    ),
    Claim("W1", "text at full weight: anchor beats full", gain("text_anchor", "text_full"), 0.03),
    Claim("W2", "a sink has formed (attention - 0.1)", lambda r, s: sink(r, s, "text_intra_doc"), 0.0),
    Claim(
        "W3", "the first token carries the change (share - 0.5)", lambda r, s: first_token(r, s, "text_intra_doc"), 0.0
    ),
    Claim("W4", "larger: a sink has formed", lambda r, s: sink(r, s, "large_text_intra_doc"), 0.0),
    Claim(
        "W5", "larger: the first token carries the change", lambda r, s: first_token(r, s, "large_text_intra_doc"), 0.0
    ),
    Claim("R1", "new seeds: anchor beats full", gain(AGAIN.format("anchor"), AGAIN.format("full")), 0.03),
    Claim("R2", "new seeds: keys vary less (log ratio)", log_ratio(varies, of=AGAIN), math.log(1.1)),
    Claim("R3", "new seeds: rotation loses less (log ratio)", log_ratio(*KL_ROTATE, of=AGAIN), math.log(1.1)),
    Claim("R4", "new seeds: rotation costs fewer answers", kept(AGAIN), 0.03),
)
