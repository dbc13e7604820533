"""From records to result rows, all named `kvcomm_*`, with the arm, task and kind in their context.

Figures over tokens are means over turns, so that a long answer does not outvote a short one. Turns of one problem are
not independent observations, so intervals are over problems. `kind` is `all` for the rows over all kinds. `values` in
the context has one number for each problem, in order, so that two models or arms can be compared in pairs where
`problems` (a fingerprint) is equal.

The gate at the end compares an arm's rows with given bounds, for deployments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import GateConfig
from anchorctx.evals.evaluators.reuse.frontier import cost_rows
from anchorctx.evals.evaluators.reuse.measures import KvError, paired_difference
from anchorctx.evals.evaluators.reuse.predictions import prediction_rows
from anchorctx.evals.evaluators.reuse.trial import Record
from anchorctx.records.results import Result, Rows, mean_interval, wilson_interval

PARTS = ("key", "value")


def record_rows(
    task: str, records: Sequence[Record], problems: str = "", about: Mapping[str, Any] | None = None
) -> list[Result]:
    """All rows of one task: for each arm over all kinds, and for each kind where there are several.

    `about` is more for the context of each row, such as why there are fewer problems than were asked for.
    """
    kinds = list(dict.fromkeys(record.kind for record in records))
    rows: list[Result] = []
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        chosen = [record for record in records if kind in ("all", record.kind)]
        for arm in dict.fromkeys(record.arm for record in chosen):
            # One record a kind: several together are the row over `all`.
            own = [record for record in chosen if record.arm == arm]
            dense = [record for record in chosen if record.arm == "dense"]
            context = {"task": task, "kind": kind, "arm": arm, "problems": problems, **(about or {})}
            rows += _words(own, context)
            rows += _answers(own, dense, context)
            rows += _reuse(own, context)
            # Errors of the cache and times are not told apart by kind.
            if kind == "all":
                rows += [*_cache(own, context), *_times(own, context), *cost_rows(own, dense, context)]
                rows += prediction_rows(own, context)
    return rows


def variation_rows(found: Sequence[tuple[KvError, KvError]], length: int, prefix: int) -> list[Result]:
    """`kvcomm_variation`: relative error of each layer's keys and values, by cause; lengths in tokens."""
    rows = []
    for number, cause in enumerate(("content", "shift")):
        errors = np.stack([pair[number].relative for pair in found])  # (documents, 2, L)
        for part, name in enumerate(PARTS):
            for layer in range(errors.shape[2]):
                context = {"cause": cause, "part": name, "layer": layer, "tokens": length, "prefix": prefix}
                rows.append(_mean("kvcomm_variation", errors[:, part, layer], context))
    return rows


def _words(own: Sequence[Record], context: dict) -> Iterator[Result]:
    turns = [problem for record in own for problem in record.closeness]
    # turns[problem][turn].kl is (tokens,): mean over a turn's tokens, then over a problem's turns.
    for tokens, span in (("first", slice(1)), ("all", slice(None))):
        where = context | {"tokens": tokens}
        kl, agree = (
            [float(np.mean([getattr(c, name)[span].mean() for c in problem])) for problem in turns]
            for name in ("kl", "agree")
        )
        yield _mean("kvcomm_kl", kl, where | {"values": kl}, "nat")
        yield _mean("kvcomm_agreement", agree, where | {"values": agree})


def _answers(own: Sequence[Record], dense: Sequence[Record], context: dict) -> Iterator[Result]:
    mine, theirs = ([x for record in records for x in record.correct] for records in (own, dense))
    if mine:
        yield _share("kvcomm_accuracy", mine, context | {"values": [int(x) for x in mine]})
        value, low, high = paired_difference(mine, theirs)
        yield Result(
            metric="kvcomm_accuracy_difference",
            value=value,
            unit="1",
            n=len(mine),
            low=low,
            high=high,
            context=context,
        )
    for shuffled in (False, True):
        judged = [x for record in own for x in record.judged[shuffled]]
        if judged:
            values = {"values": [int(x) for x in judged]}
            yield _share("kvcomm_judge_consistency", judged, context | {"shuffled": shuffled} | values)


def _reuse(own: Sequence[Record], context: dict) -> Iterator[Result]:
    context = context | {"by_construction": own[0].by_construction}
    tokens = np.array([t for record in own for t in record.tokens], dtype=np.float64)
    flops = np.array([f for record in own for f in record.flops])
    yield _share("kvcomm_reuse", [x for record in own for x in record.reused], context | {"by": "calls"})
    contents = np.array([c for record in own for c in record.contents], dtype=np.float64)
    # (turns, 3): the prompt's tokens, those computed with it and beside it; (turns, 2): dense FLOPs and those spent;
    # (turns, 3): tokens of the fixed beginning, of the contents behind it, and of these the computed.
    shares: dict[str, Callable[[], float]] = {
        "tokens": lambda: 1 - tokens[:, 1].sum() / tokens[:, 0].sum(),
        "contents": lambda: 1 - contents[:, 2].sum() / max(contents[:, 1].sum(), 1) if contents[:, 1].any() else 0.0,
        "flops": lambda: 1 - flops[:, 1].sum() / flops[:, 0].sum(),
    }
    for by, share in shares.items():
        yield Result(metric="kvcomm_reuse", value=float(share()), unit="1", n=len(tokens), context=context | {"by": by})


def _cache(own: Sequence[Record], context: dict) -> Iterator[Result]:
    errors = [error for record in own for error in record.errors]
    if not errors:
        return
    for measure in ("relative", "cosine"):
        values = np.stack([getattr(error, measure) for error in errors])  # (turns, 2, L)
        for part, name in enumerate(PARTS):
            for layer in range(values.shape[2]):
                where = {"part": name, "layer": layer, "measure": measure}
                yield _mean("kvcomm_kv_error", values[:, part, layer], context | where)


def _times(own: Sequence[Record], context: dict) -> Iterator[Result]:
    """p50 and p95 of the seconds to first token of each agent and of whole requests, and the bytes kept."""
    agents = list(dict.fromkeys(agent for record in own for request in record.ttft for agent in request))
    samples: dict[str, list[float]] = {
        agent: [request[agent] for record in own for request in record.ttft if agent in request] for agent in agents
    }
    # Agents speak one after the other, so a request takes the sum.
    samples["request"] = [sum(request.values()) for record in own for request in record.ttft]
    for who, seconds in samples.items():
        for name, quantile in (("p50", 0.5), ("p95", 0.95)):
            value = float(np.quantile(seconds, quantile))
            where = context | {"agent": who, "quantile": name}
            yield Result(metric="kvcomm_ttft", value=value, unit="s", n=len(seconds), context=where)
    kept = max(record.kept_bytes for record in own)
    yield Result(metric="kvcomm_kept_bytes", value=float(kept), unit="B", n=len(own), context=context)


def _mean(metric: str, values: Iterable[float], context: dict, unit: str = "1") -> Result:
    found = [float(v) for v in values]
    low, high = mean_interval(found) or (None, None)
    value = math.fsum(found) / len(found)
    return Result(metric=metric, value=value, unit=unit, n=len(found), low=low, high=high, context=context)


def _share(metric: str, hits: Sequence[bool], context: dict) -> Result:
    low, high = wilson_interval(sum(hits), len(hits))
    return Result(
        metric=metric, value=sum(hits) / len(hits), unit="1", n=len(hits), low=low, high=high, context=context
    )


# -- the gate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says."""

    passed: bool
    text: str
    """One line a model and task."""


def check_arm(gate: GateConfig, arms: Sequence[str]) -> None:
    """Raise UserError for a gate on an arm that does not run."""
    if gate.arm is not None and gate.arm not in arms:
        raise UserError(f"gate.arm={gate.arm} is not among the arms that run: add it to arms, or choose another")


def judge(rows: Sequence[Result], gate: GateConfig) -> Verdict | None:
    """Compare the arm's rows over all tokens of every model and task with the bounds; None without a gate."""
    if gate.arm is None:
        return None
    found = [row.context for row in rows if row.metric == "kvcomm_kl"]
    pairs = dict.fromkeys((context.get("model"), context["task"]) for context in found)
    verdicts = [_judge_one(rows, gate, gate.arm, model, task) for model, task in pairs]
    return Verdict(all(v.passed for v in verdicts), "\n".join(v.text for v in verdicts))


def _judge_one(rows: Sequence[Result], gate: GateConfig, arm: str, model: str | None, task: str) -> Verdict:
    where = {"task": task, "kind": "all"} | ({"model": model} if model else {})
    kl, agreement = (
        _value(rows, name, where | {"arm": arm, "tokens": "all"}) for name in ("kvcomm_kl", "kvcomm_agreement")
    )
    reuse = _value(rows, "kvcomm_reuse", where | {"arm": arm, "by": "contents"})
    request = where | {"agent": "request", "quantile": "p50"}
    mine, dense = (_value(rows, "kvcomm_ttft", request | {"arm": name}) for name in (arm, "dense"))
    ttft = mine / dense
    bounds = (
        (kl <= gate.max_kl, f"KL {kl:.4g} (at most {gate.max_kl:g})"),
        (agreement >= gate.min_agreement, f"agreement {agreement:.4f} (at least {gate.min_agreement:g})"),
        (reuse >= gate.min_reuse, f"reuse {reuse:.3f} of the contents' tokens (at least {gate.min_reuse:g})"),
        (ttft <= gate.max_ttft, f"time to first token {ttft:.2f} of dense's (at most {gate.max_ttft:g})"),
    )
    passed = all(good for good, _ in bounds)
    said = ", ".join(text if good else f"{text}: NOT MET" for good, text in bounds)
    named = f"{arm} on {task}{f' with {model}' if model else ''}"
    return Verdict(passed, f"gate {'passed' if passed else 'FAILED'}: {named}: {said}")


def _value(rows: Sequence[Result], metric: str, where: dict[str, str]) -> float:
    row = Rows(rows).find(metric, **where)
    assert row is not None
    return row.value
