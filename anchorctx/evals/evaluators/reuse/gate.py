"""A gate for deployments: does an arm stay within given bounds of dense?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import GateConfig
from anchorctx.records.results import Result, Rows


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
    lines, passed = [], True
    found = [row.context for row in rows if row.metric == "kvcomm_kl"]
    for model, task in dict.fromkeys((context.get("model"), context["task"]) for context in found):
        where = {"arm": gate.arm, "task": task, "kind": "all", "tokens": "all"} | ({"model": model} if model else {})
        kl, agreement = (_value(rows, metric, where) for metric in ("kvcomm_kl", "kvcomm_agreement"))
        good = kl <= gate.max_kl and agreement >= gate.min_agreement
        passed &= good
        lines.append(
            f"gate {'passed' if good else 'FAILED'}: {gate.arm} on {task}{f' with {model}' if model else ''}: "
            f"KL {kl:.4g} (at most {gate.max_kl:g}), agreement {agreement:.4f} (at least {gate.min_agreement:g})"
        )
    return Verdict(passed, "\n".join(lines))


def _value(rows: Sequence[Result], metric: str, where: dict[str, str]) -> float:
    row = Rows(rows).find(metric, **where)
    assert row is not None
    return row.value
