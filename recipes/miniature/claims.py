"""The claims of HYPOTHESES.md as functions of one seed's rows; the margins are that page's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from verdicts import Estimate, Rows, estimate

from anchorctx.results import Result

ROW, LONG = 4096, 16_384
"""Tokens of a row, and of the longer ones (models named `..._16k`)."""


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


def retrieval(rows: Rows, seed: int, model: str) -> float:
    """Accuracy at the row's length."""
    return rows.value(seed, "retrieval_accuracy", model=model, length=LONG if "_16k" in model else ROW)


def gain(better: str, worse: str) -> Callable[[Rows, int], float]:
    """How much more one model retrieves than another of the same seed."""
    return lambda rows, seed: retrieval(rows, seed, better) - retrieval(rows, seed, worse)


def gain_of_gains(one: tuple[str, str], other: tuple[str, str]) -> Callable[[Rows, int], float]:
    """The difference of two gains."""
    return lambda rows, seed: gain(*one)(rows, seed) - gain(*other)(rows, seed)


def short_loss(better: str, worse: str) -> Callable[[Rows, int], float]:
    """How much lower the loss (nats a token) on documents cut at 512 tokens is."""

    def nats(rows: Rows, seed: int, model: str) -> float:
        return float(rows.row(seed, "perplexity", model=model).context["loss_nats"])

    return lambda rows, seed: nats(rows, seed, worse) - nats(rows, seed, better)


def changed(rows: Rows, seed: int, model: str, length: int, arithmetic: str = "bfloat16", first: str = "kept") -> float:
    """The share of attention that a shift by 16 moves."""
    where = {"arithmetic": arithmetic, "first": first, "length": length, "layer": "all", "shift": 16}
    return rows.value(seed, "precision_attention_change", model=model, weights="trained", rows="shift", **where)


def first_token(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P1: share of the change that is gone with the first token hidden, above a half."""
    return 1 - changed(rows, seed, model, ROW, first="hidden") / changed(rows, seed, model, ROW) - 0.5


def growth(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P2: log of the change at the row's length over that at 512."""
    return math.log(changed(rows, seed, model, ROW) / changed(rows, seed, model, 512))


def mended(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P3: share of the change that rotating in float32 removes, above a half."""
    return 1 - changed(rows, seed, model, ROW, "float32_rotation") / changed(rows, seed, model, ROW) - 0.5


def sink(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P4: mean attention on the first token, above a tenth."""
    where = {"length": ROW, "layer": "all", "shift": 16, "weights": "trained", "rows": "shift", "first": None}
    return rows.value(seed, "precision_first_attention", model=model, arithmetic="float32", **where) - 0.1


def varies(rows: Rows, seed: int, model: str) -> float:
    """Relative error of keys behind another prefix, mean over the layers from 1 (layer 0 sees no context)."""
    found: list[Result] = []
    layer = 1
    while True:
        try:
            where = {"cause": "content", "part": "key", "layer": layer}
            found.append(rows.row(seed, "kvcomm_variation", model=model, **where))
        except KeyError:
            if not found:
                raise
            return statistics.fmean(row.value for row in found)
        layer += 1


def divergence(rows: Rows, seed: int, model: str, arm: str) -> float:
    """KL(dense, arm) of the first token, nats, mean over turns."""
    return rows.value(seed, "kvcomm_kl", model=model, arm=arm, task="retrieval", kind="all", tokens="first")


def lost(rows: Rows, seed: int, model: str, arm: str, *kinds: str) -> float:
    """An arm's accuracy minus dense's, mean over kinds of problems."""
    where = {"model": model, "arm": arm, "task": "retrieval"}
    return statistics.fmean(rows.value(seed, "kvcomm_accuracy_difference", kind=kind, **where) for kind in kinds)


def exemplars_add(rows: Rows, seed: int, model: str) -> float:
    """Share of rotation's divergence that KVCOMM removes."""
    return 1 - divergence(rows, seed, model, "kvcomm") / divergence(rows, seed, model, "rotate")


def consistent(rows: Rows, seed: int) -> float:
    """K5: the judge says what dense says, candidates shuffled, above 0.95."""
    where = {"model": "anchor", "arm": "rotate", "task": "retrieval", "kind": "all", "shuffled": True}
    return rows.value(seed, "kvcomm_judge_consistency", **where) - 0.95


def _logarithm(measure: Callable[..., float], *more: str, of: str = "{}") -> Callable[[Rows, int], float]:
    """log of full's over anchor's; `of` makes the models' labels."""
    full, anchor = of.format("full"), of.format("anchor")
    return lambda rows, seed: math.log(measure(rows, seed, full, *more) / measure(rows, seed, anchor, *more))


def _kept(of: str = "{}") -> Callable[[Rows, int], float]:
    """How many more answers rotation leaves anchor than full, where two documents matter; `of` makes the labels."""
    full, anchor = of.format("full"), of.format("anchor")
    return lambda rows, seed: lost(rows, seed, anchor, "rotate", *TWO) - lost(rows, seed, full, "rotate", *TWO)


TWO = ("two_hop", "override")
"""Kinds of problems that take two documents."""
BEHIND, LARGE = "{} behind 1,024", "large_{}"
"""Labels of models in the studies with prefixes, and of the larger ones."""
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
    Claim("K1", "a document's keys vary less across prefixes (log ratio)", _logarithm(varies), math.log(1.1)),
    Claim("K2", "plain rotation loses less (log ratio of KL)", _logarithm(*KL_ROTATE), math.log(1.1)),
    Claim("K3", "rotation costs fewer answers where two documents matter", _kept(), 0.03),
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
    Claim("C4", "behind 1,024 tokens: keys vary less (log ratio)", _logarithm(varies, of=BEHIND), math.log(1.1)),
    Claim("C5", "behind 1,024 tokens: rotation loses less (log)", _logarithm(*KL_ROTATE, of=BEHIND), math.log(1.1)),
    Claim("C6", "behind 1,024 tokens: rotation costs fewer answers", _kept(BEHIND), 0.03),
    Claim("C7", "larger model: keys vary less (log ratio)", _logarithm(varies, of=LARGE), math.log(1.1)),
    Claim("C8", "larger model: rotation loses less (log ratio)", _logarithm(*KL_ROTATE, of=LARGE), math.log(1.1)),
    Claim("C9", "larger model: rotation costs fewer answers", _kept(LARGE), 0.03),
    Claim("C10", "larger model: a sink has formed (attention - 0.1)", lambda r, s: sink(r, s, "large_intra_doc"), 0.0),
    Claim(
        "C11",
        "larger model: the first token carries the change (share - 0.5)",
        lambda r, s: first_token(r, s, "large_intra_doc"),
        0.0,
    ),
)
