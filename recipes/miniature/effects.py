"""Effects of one seed's rows, in the direction claimed; KeyError where something was not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from verdicts import Rows

from anchorctx.records.results import Result

SHORT = 512
"""Tokens: the bases' contexts. What is measured at several lengths is read at the longest, the row's."""
TWO = ("two_hop", "override")
"""Kinds of problems that take two documents."""


def retrieval(rows: Rows, seed: int, model: str) -> float:
    """Accuracy at the row's length."""
    return rows.longest(seed, "retrieval_accuracy", model=model)


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


def changed(rows: Rows, seed: int, model: str, arithmetic: str = "bfloat16", **where: Any) -> float:
    """The share of attention that a shift by 16 moves, in rows of the greatest length unless `where` has another."""
    where = {"arithmetic": arithmetic, "layer": "all", "shift": 16, "first": "kept"} | where
    measure = rows.value if "length" in where else rows.longest
    return measure(seed, "precision_attention_change", model=model, weights="trained", rows="shift", **where)


def first_token(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P1: share of the change that is gone with the first token hidden, above a half."""
    return 1 - changed(rows, seed, model, first="hidden") / changed(rows, seed, model) - 0.5


def growth(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P2: log of the change at the row's length over that at 512."""
    return math.log(changed(rows, seed, model) / changed(rows, seed, model, length=SHORT))


def mended(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P3: share of the change that rotating in float32 removes, above a half."""
    return 1 - changed(rows, seed, model, "float32_rotation") / changed(rows, seed, model) - 0.5


def sink(rows: Rows, seed: int, model: str = "intra_doc") -> float:
    """P4: mean attention on the first token, above a tenth."""
    where = {"layer": "all", "shift": 16, "weights": "trained", "rows": "shift", "first": None}
    return rows.longest(seed, "precision_first_attention", model=model, arithmetic="float32", **where) - 0.1


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


def log_ratio(measure: Callable[..., float], *more: str, of: str = "{}") -> Callable[[Rows, int], float]:
    """log of full's over anchor's; `of` makes the models' labels."""
    full, anchor = of.format("full"), of.format("anchor")
    return lambda rows, seed: math.log(measure(rows, seed, full, *more) / measure(rows, seed, anchor, *more))


def kept(of: str = "{}") -> Callable[[Rows, int], float]:
    """How many more answers rotation leaves anchor than full, where two documents matter; `of` makes the labels."""
    full, anchor = of.format("full"), of.format("anchor")
    return lambda rows, seed: lost(rows, seed, anchor, "rotate", *TWO) - lost(rows, seed, full, "rotate", *TWO)
