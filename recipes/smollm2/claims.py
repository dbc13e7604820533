"""The claims of HYPOTHESES.md: an effect, with its interval over texts, documents or problems, or over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chain.verdict import answer

from anchorctx.records.results import Result, Rows, mean_interval
from anchorctx.records.statistics import difference, student_quantile


@dataclass(frozen=True, slots=True)
class Effect:
    """An effect in the direction claimed, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """What the interval is over: texts, documents, problems; or seeds."""


Measure = Callable[[Rows], Effect | None]
"""The effect in the rows of one seed, the checkpoint's own among them; None where it was not measured."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of HYPOTHESES.md."""

    name: str
    says: str
    measure: Measure
    margin: float

    def effect(self, by_seed: Sequence[Rows]) -> Effect | None:
        """Over the seeds where there are several; else within the one seed. None where it was not measured."""
        found = [effect for rows in by_seed if (effect := self.measure(rows)) is not None]
        values = [effect.value for effect in found]
        if len(set(values)) < 2:  # the checkpoint's own are of no seed
            return found[0] if found else None
        ends = mean_interval(values)
        assert ends is not None
        return Effect(math.fsum(values) / len(values), *ends, len(values))

    def answer(self, effect: Effect) -> str:
        """supported, not supported or undecided."""
        return answer(effect.value, (effect.low, effect.high), self.margin)


def log_ratio(a: Sequence[float], b: Sequence[float]) -> Effect:
    """log(mean of `a` / mean of `b`) over paired items, with Student's interval of its linearisation."""
    n, over, under = len(a), math.fsum(a) / len(a), math.fsum(b) / len(b)
    # d log(x / y) = dx / x - dy / y
    moved = [x / over - y / under for x, y in zip(a, b, strict=True)]
    error = math.sqrt(math.fsum(m * m for m in moved) / (n - 1) / n)
    value, half = math.log(over / under), student_quantile(n - 1) * error
    return Effect(value, value - half, value + half, n)


def ratio_of(first: dict[str, Any], second: dict[str, Any]) -> Measure:
    """log ratio of two rows' values, each named by its metric and context."""

    def measure(rows: Rows) -> Effect | None:
        one, other = (rows.find(where["metric"], **_context(where)) for where in (first, second))
        if one is None or other is None or one.n < 2:  # of one problem nothing is known but its value
            return None
        return log_ratio(one.context["values"], other.context["values"])

    return measure


def _context(where: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in where.items() if key != "metric"}


def losses(metric: str, worse: str, better: str, **where: Any) -> Measure:
    """By how many nats a token `better` reads the same documents better than `worse`."""

    def measure(rows: Rows) -> Effect | None:
        one, other = (rows.find(metric, model=model, **where) for model in (better, worse))
        found = None if one is None or other is None else difference(one, other)
        if found is None or other is None:
            return None
        return Effect(math.log(found.value), math.log(found.low), math.log(found.high), other.n)

    return measure


def shorter(worse: str, better: str) -> Measure:
    """The same of documents that are cut at 512 tokens, as the recipes call their models there."""
    return losses("perplexity", f"{worse} cut at 512", f"{better} cut at 512", measure="short")


def far(worse: str, better: str, positions: str) -> Measure:
    """The same of the documents' tokens that the recipe's `positions` name, such as `beyond`: past the checkpoint's
    length."""
    return losses("perplexity_by_position", worse, better, measure="long", positions=positions)


def change(model: str, length: int, arithmetic: str = "bfloat16", first: str = "kept") -> dict[str, Any]:
    """The row of how much attention a shift by 16 moves."""
    where = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16, "length": length}
    return where | {"metric": "precision_attention_change", "model": model, "arithmetic": arithmetic, "first": first}


def part(name: str, length: int) -> dict[str, Any]:
    """The row of a token's part of the change, on the checkpoint."""
    return change("base", length) | {"metric": f"precision_{name}", "first": None}


def divergence(model: str, arm: str, task: str) -> dict[str, Any]:
    """The row of an arm's divergence from dense, over all kinds of problem."""
    return {"metric": "kvcomm_kl", "model": model, "arm": arm, "task": task, "kind": "all", "tokens": "all"}


CLAIMS = (
    Claim("P1", "the first token has more of the change than any other", ratio_of(part("first_share", 8192),
          part("other_share", 8192)), math.log(2)),
    Claim("P2", "the change grows from 512 to 8,192", ratio_of(change("base", 8192), change("base", 512)),
          math.log(1.5)),
    Claim("P3", "with the first token hidden less moves", ratio_of(change("base", 8192),
          change("base", 8192, first="hidden")), math.log(1.1)),
    Claim("P4", "rotation in float32 removes half of it", ratio_of(change("base", 8192),
          change("base", 8192, "float32_rotation")), math.log(2)),
    Claim("P5", "it grows less in anchor than in full", ratio_of(change("full", 8192), change("anchor", 8192)),
          math.log(1.1)),
    Claim("T1", "training helps past the checkpoint's length", far("raised", "anchor", "beyond"), 0.05),
    Claim("T2", "there anchor beats full", far("full", "anchor", "beyond"), 0.01),
    Claim("T3", "there anchor beats intra_doc", far("intra_doc", "anchor", "beyond"), 0.005),
    Claim("T4", "beyond the trained length anchor beats full", far("full", "anchor", "twice"), 0.01),
    Claim("T5", "anchor keeps 512 tokens better than full", shorter("full", "anchor"), 0.005),
    Claim("T6", "full loses 512 tokens against the checkpoint", shorter("full", "base"), 0.005),
    Claim("G1", "rotation in bfloat16: anchor beats intra_doc", far("intra_doc_bf16", "anchor_bf16", "beyond"), 0.005),
    Claim("G2", "float32 rotation helps intra_doc", far("intra_doc_bf16", "intra_doc", "beyond"), 0.005),
    Claim("G3", "positions that begin anew help intra_doc", far("intra_doc", "intra_doc_reset", "beyond"), 0.005),
    Claim("G4", "anchor beats full in the last half of a row", far("full", "anchor", "last"), 0.01),
    Claim("K1", "rotate loses less in anchor than in full", ratio_of(divergence("full", "rotate", "retrieval"),
          divergence("anchor", "rotate", "retrieval")), math.log(1.1)),
    Claim("K2", "and than in the checkpoint", ratio_of(divergence("base", "rotate", "retrieval"),
          divergence("anchor", "rotate", "retrieval")), math.log(1.1)),
    Claim("K3", "recomputing 15 % (blend) halves rotate's loss", ratio_of(divergence("base", "rotate", "retrieval"),
          divergence("base", "blend:0.15", "retrieval")), math.log(2)),
    Claim("K4", "kvcomm loses less than rotate", ratio_of(divergence("base on GSM8K", "rotate", "gsm8k"),
          divergence("base on GSM8K", "kvcomm_ungated", "gsm8k")), math.log(1.1)),
)  # fmt: skip


def results(claims: Sequence[Claim], by_seed: Sequence[Rows]) -> list[Result]:
    """A row for each claim that was measured."""
    found = []
    for claim in claims:
        if (effect := claim.effect(by_seed)) is not None:
            seeds = [own.value for rows in by_seed if (own := claim.measure(rows)) is not None]
            context = {"claim": claim.name, "answer": claim.answer(effect), "margin": claim.margin, "by_seed": seeds}
            low, high = effect.low, effect.high
            row = Result(metric="claim", value=effect.value, unit="1", n=effect.n, low=low, high=high, context=context)
            found.append(row)
    return found
