"""When a task has run problems enough: its time is up, or each arm's divergence is known as well as was asked.

Looking again and again until an interval is small makes it too small. So one looks only after 16, 32, 64, ... problems,
and at each look the intervals are wider: they miss with 0.05 divided by the number of looks there can be, so that all
looks together miss with 0.05 at most. That is exact for normal divergences. For log-normal ones with a sigma of 0.7,
9 % of the arms whose mean is the bound itself are called within it in 64 problems, and 33 % would be if one looked at
plain intervals after every problem. The intervals in the results are those of a fixed number of problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from anchorctx.evals.evaluators.reuse.config import ReuseConfig
from anchorctx.kvcomm.arms.names import CONTROLS
from anchorctx.records.results import mean_interval

FIRST_LOOK = 16
"""Problems, in all, before intervals are looked at for the first time; then whenever they have doubled."""
MISS = 0.05


class Stop(Enum):
    """Why a task ends before its last problem; the value is what results say."""

    budget = "budget_minutes"
    interval = "until_interval"

    @property
    def words(self) -> str:
        """For the log."""
        if self is Stop.budget:
            return "the next ones would not fit into budget_minutes"
        return "every arm's divergence is known as well as until_interval asks, or on which side of gate.max_kl it is"


Group = list[dict[str, Any]]
"""What some problems of a team gave that were run together: a part each."""


def flat(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The problems' parts, in order."""
    return [part for group in groups for part in group]


def reason_to_stop(config: ReuseConfig, groups: Sequence[Group], asked: int) -> Stop | None:
    """Why no more problems are to be run after `groups`, of those `asked` for; None goes on."""
    done = len(flat(groups))
    if not done or done >= asked:
        return None
    if affordable(config, groups, asked) <= done:
        return Stop.budget
    return Stop.interval if _known(config, groups, asked) else None


def affordable(config: ReuseConfig, groups: Sequence[Group], asked: int) -> int:
    """Problems that fit into this task's share of the budget, by the time of those that were run; `asked` at most."""
    done = flat(groups)
    if config.budget_minutes is None or not done:
        return asked
    left = 60 * config.budget_minutes / len(dict.fromkeys(config.tasks)) - sum(part["seconds"] for part in done)
    # The first ones warm up, many times their own length in a small model.
    later = flat(groups[1:]) or done
    mean = sum(part["seconds"] for part in later) / len(later)
    return len(done) + max(min(int(left / mean), asked - len(done)), 0)


def looks(asked: int) -> list[int]:
    """Numbers of problems after which one looks: [16, 32] of 40."""
    found = [FIRST_LOOK]
    while 2 * found[-1] < asked:
        found.append(2 * found[-1])
    return [look for look in found if look < asked]


def _known(config: ReuseConfig, groups: Sequence[Group], asked: int) -> bool:
    """Whether this is a moment to look, and every arm's divergence is known as well as was asked."""
    moments, parts, before = looks(asked), flat(groups), len(flat(_earlier(groups)))
    # Rounds of three problems, looks at 16 and 32: after 18, the first round's end that is not before 16, and after 33.
    wanted = config.until_interval
    if wanted is None or not any(before < moment <= len(parts) for moment in moments):
        return False
    arms = [arm for arm in parts[0]["records"] if arm != "dense" and arm not in CONTROLS]
    bound = config.gate.max_kl

    def known(arm: str) -> bool:
        ends = mean_interval([_kl(part, arm) for part in parts], MISS / len(moments))
        assert ends is not None  # there are sixteen at least
        low, high = ends
        return high <= bound or low > bound or (high - low) / 2 <= wanted * bound

    return all(map(known, arms))


def _kl(part: dict[str, Any], arm: str) -> float:
    """The problem's divergence as the results have it: the mean over its turns of the mean over their tokens."""
    return float(np.mean([np.mean(kl) for kl, _ in part["records"][arm]["closeness"][0]]))


def _earlier(groups: Sequence[Group]) -> Sequence[Group]:
    """Those before the last round, in which each team has one group at most."""
    teams, end = set[int](), len(groups)
    while end and (team := groups[end - 1][0]["at"][0]) not in teams:
        teams.add(team)
        end -= 1
    return groups[:end]
