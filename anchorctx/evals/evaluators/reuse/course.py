"""The course of one task: problem by problem through all arms, until all are done or enough is known.

Problems are taken in turn from the task's teams, so that a task that ends early has as many of each kind. What each one
gave is a part, which a run that was cut off goes on behind: arms that learn are taken through the problems again, on
the words that dense said, and all others only count them. The numbers are those of an undisturbed run, to the bit.

With several processes each has its own arms; all have all parts, and so end at the same problem.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorctx.evals.base import Progress
from anchorctx.evals.distribute import gather, is_first
from anchorctx.evals.evaluators.reuse.config import ReuseConfig
from anchorctx.evals.evaluators.reuse.measures import Closeness, KvError
from anchorctx.evals.evaluators.reuse.stopping import affordable, reason_to_stop
from anchorctx.evals.evaluators.reuse.tasks.base import fingerprint
from anchorctx.evals.evaluators.reuse.trial import Record, Trial, Words
from anchorctx.evals.parts import Parts
from anchorctx.records.transcripts import Transcript

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a task gave."""

    records: list[Record]
    """Of each team and arm, dense first."""
    problems: str
    """The fingerprint of all that were asked for; behind a colon how many were run, where these are fewer."""
    about: dict[str, Any]
    """Why fewer were run than were asked for; empty where all were."""


def run_task(
    name: str,
    trials: Sequence[Trial],
    arms: Sequence[str],
    config: ReuseConfig,
    parts: Parts,
    progress: Progress,
    keep: Callable[[Transcript], None],
) -> Finished:
    """Run what `parts` does not hold yet, and add it there.

    Args:
        name: the task's.
        trials: its teams, prepared, with this process's arms.
        arms: all processes' arms, in order.
        config: when to stop.
        parts: what was done before.
        progress: told of every problem.
        keep: given what was said on each.
    """
    problems = fingerprint([problem for trial in trials for problem in trial.team.problems])
    work = in_turn([len(trial.team.problems) for trial in trials])
    for part in parts.done:
        team, number = part["at"]
        trials[team].replay(trials[team].team.problems[number], _words(part))
    before, stop = len(parts.done), None
    for done, (team, number) in enumerate(work):
        # Only between rounds, so that every team has run as many problems.
        if team == 0 and (stop := reason_to_stop(config, parts.done, len(work))) is not None:
            break
        if done >= before:
            part, said = _run(trials[team], team, number, arms)
            if said is not None:
                keep(dataclasses.replace(said, problems=problems))
            parts.add(part)
            progress(1, min(affordable(config, parts.done, len(work)), len(work)) - before)
    if stop is not None and is_first():
        logger.info("%s ends after %d of %d problems: %s", name, len(parts.done), len(work), stop.words)
    about = {}
    if stop is not None:
        problems, about = f"{problems}:{len(parts.done)}", {"asked": len(work), "stopped": stop.value}
    return Finished(_records(parts.done, len(trials), arms), problems, about)


def in_turn(problems: Sequence[int]) -> list[tuple[int, int]]:
    """(team, problem) in the order of work, for teams with so many problems: [2, 1] gives (0, 0), (1, 0), (0, 1)."""
    return [(team, i) for i in range(max(problems, default=0)) for team, n in enumerate(problems) if i < n]


def _run(trial: Trial, team: int, number: int, arms: Sequence[str]) -> tuple[dict[str, Any], Transcript | None]:
    """One problem through this process's arms: the part as JSON, and what was said, all processes' arms in both."""
    began = time.perf_counter()
    ran = trial.run(trial.team.problems[number])
    seconds = time.perf_counter() - began
    # A problem is also where the processes meet, so that no wait is long enough to time out. Dense is in every
    # process's records; reversed, so that the first one's wins.
    found = gather(({arm: to_json(record) for arm, record in ran.records.items()}, ran.transcript, seconds))
    records = {arm: record for mine, *_ in reversed(found) for arm, record in mine.items()}
    part = {
        "at": [team, number],
        "seconds": found[0][2],
        "words": {agent: [list(ids), list(message)] for agent, (ids, message) in ran.words.items()},
        "records": {arm: records[arm] for arm in arms},
    }
    if ran.transcript is None:
        return part, None
    said = {arm: words for _, transcript, _ in reversed(found) for arm, words in transcript.arms.items()}
    return part, dataclasses.replace(ran.transcript, arms={arm: said[arm] for arm in arms})


def _words(part: dict[str, Any]) -> Words:
    return {agent: (tuple(ids), tuple(message)) for agent, (ids, message) in part["words"].items()}


def _records(parts: Sequence[dict[str, Any]], teams: int, arms: Sequence[str]) -> list[Record]:
    """The records of each team and arm over all its problems."""
    by_team = [[part["records"] for part in parts if part["at"][0] == team] for team in range(teams)]
    return [joined([from_json(one[arm]) for one in mine]) for mine in by_team if mine for arm in arms]


# -- records as JSON --------------------------------------------------------------------------------------------------


def to_json(record: Record) -> dict[str, Any]:
    """A record as plain JSON; `from_json` gives back the same to the bit."""
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    found["closeness"] = [[[c.kl.tolist(), c.agree.tolist()] for c in turns] for turns in record.closeness]
    found["errors"] = [[error.relative.tolist(), error.cosine.tolist()] for error in record.errors]
    found["judged"] = [record.judged[shuffled] for shuffled in (False, True)]  # JSON's keys are words
    return found


def from_json(found: dict[str, Any]) -> Record:
    """The record that `to_json` was given."""
    closeness = [[Closeness(np.array(kl), np.array(agree, dtype=bool)) for kl, agree in p] for p in found["closeness"]]
    errors = [KvError(np.array(relative), np.array(cosine)) for relative, cosine in found["errors"]]
    judged = dict(zip((False, True), found["judged"], strict=True))
    return Record(**found | {"closeness": closeness, "errors": errors, "judged": judged})


def joined(records: Sequence[Record]) -> Record:
    """One record of all problems, from those of some each; new lists."""
    first, *rest = records
    whole = dataclasses.replace(first, judged={k: list(v) for k, v in first.judged.items()})
    for field in dataclasses.fields(Record):
        if isinstance(getattr(first, field.name), list):
            setattr(whole, field.name, [x for record in records for x in getattr(record, field.name)])
    for record in rest:
        for shuffled, said in record.judged.items():
            whole.judged[shuffled] += said
        whole.kept_bytes = max(whole.kept_bytes, record.kept_bytes)
    return whole
