"""The course of one task: some problems at a time through all arms, until all are done or enough is known.

Problems are taken in turn from the task's teams, so that a task that ends early has as many of each kind. What a few of
them gave together is a part, which a run that was cut off goes on behind: arms that learn are taken through the
problems again, on the words that dense said, and all others only count them. The numbers are those of an undisturbed
run, to the bit.

With several processes each has its own arms; all have all parts, and so end at the same problem.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.evals.base import Progress
from anchorctx.evals.distribute import gather, is_first
from anchorctx.evals.evaluators.reuse.config import ReuseConfig
from anchorctx.evals.evaluators.reuse.record import Record, from_json, joined, to_json
from anchorctx.evals.evaluators.reuse.stopping import Group, affordable, flat, reason_to_stop
from anchorctx.evals.evaluators.reuse.tasks.base import fingerprint
from anchorctx.evals.evaluators.reuse.trial import Trial, Words
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
    counts = [len(trial.team.problems) for trial in trials]
    asked, size, ran, stop = sum(counts), at_once(config, arms), [0] * len(trials), None
    for group in parts.done:
        team, numbers = group[0]["at"][0], [part["at"][1] for part in group]
        trials[team].replay([trials[team].team.problems[i] for i in numbers], [_words(part) for part in group])
        ran[team] += len(group)
    before = sum(ran)
    while sum(ran) < asked:
        following = lagging(ran, counts)
        if following is None:  # between rounds: every team has run as many problems
            if (stop := reason_to_stop(config, parts.done, asked)) is not None:
                break
            room = affordable(config, parts.done, asked) - sum(ran)
            following = next_round(ran, counts, size, room)
        team, numbers = following
        group, said = _run(trials[team], team, numbers, arms)
        for one in said:
            keep(dataclasses.replace(one, problems=problems))
        parts.add(group)
        ran[team] += len(group)
        progress(len(group), affordable(config, parts.done, asked) - before)
    if stop is not None and is_first():
        logger.info("%s ends after %d of %d problems: %s", name, sum(ran), asked, stop.words)
    about = {}
    if stop is not None:
        problems, about = f"{problems}:{sum(ran)}", {"asked": asked, "stopped": stop.value}
    return Finished(_records(flat(parts.done), len(trials), arms), problems, about)


def at_once(config: ReuseConfig, arms: Sequence[str]) -> int:
    """Problems that are run together, so that as many talks go on at once as decode_together says."""
    speaking = len(arms) - 1 if config.accuracy else 1  # dense speaks alone, before all others
    return max(config.decode_together // max(speaking, 1), 1)


def lagging(ran: Sequence[int], counts: Sequence[int]) -> tuple[int, range] | None:
    """The team, of those with so many problems, that has run fewer than others, and what it lacks: of [4, 2] run by
    teams of [9, 9], the second's problems 2 and 3. None where there is none.
    """
    most = max(ran)
    found = ((team, range(done, min(most, n))) for team, (done, n) in enumerate(zip(ran, counts, strict=True)))
    return next(((team, numbers) for team, numbers in found if numbers), None)


def next_round(ran: Sequence[int], counts: Sequence[int], size: int, room: int) -> tuple[int, range]:
    """The first team's problems of a new round: `size` of them, or as few as leave the other teams as many in `room`.

    The first round has one, so that one knows soon how long they take.
    """
    teams = [team for team, (done, n) in enumerate(zip(ran, counts, strict=True)) if done < n]
    team, size = teams[0], max(min(size, room // len(teams)), 1) if any(ran) else 1
    return team, range(ran[team], min(ran[team] + size, counts[team]))


def _run(trial: Trial, team: int, numbers: Sequence[int], arms: Sequence[str]) -> tuple[Group, list[Transcript]]:
    """Some problems through this process's arms: a part as JSON and what was said, all processes' arms in both."""
    began = time.perf_counter()
    ran = trial.run([trial.team.problems[number] for number in numbers])
    seconds = (time.perf_counter() - began) / len(numbers)
    # Here the processes meet, often enough that no wait is long enough to time out. Dense is in every process's
    # records; reversed, so that the first one's wins.
    records = [{arm: to_json(record) for arm, record in one.records.items()} for one in ran]
    found = gather((records, [one.transcript for one in ran], seconds))
    group, said = [], []
    for i, (number, one) in enumerate(zip(numbers, ran, strict=True)):
        merged = {arm: record for records, *_ in reversed(found) for arm, record in records[i].items()}
        group.append(
            {
                "at": [team, number],
                "seconds": found[0][2],
                "words": {agent: [list(ids), list(message)] for agent, (ids, message) in one.words.items()},
                "records": {arm: merged[arm] for arm in arms},
            }
        )
        if one.transcript is not None:
            texts = {a: w for _, transcripts, _ in reversed(found) for a, w in transcripts[i].arms.items()}
            said.append(dataclasses.replace(one.transcript, arms={arm: texts[arm] for arm in arms if arm in texts}))
    return group, said


def _words(part: dict[str, Any]) -> Words:
    return {agent: (tuple(ids), tuple(message)) for agent, (ids, message) in part["words"].items()}


def _records(parts: Sequence[dict[str, Any]], teams: int, arms: Sequence[str]) -> list[Record]:
    """The records of each team and arm over all its problems."""
    by_team = [[part["records"] for part in parts if part["at"][0] == team] for team in range(teams)]
    return [joined([from_json(one[arm]) for one in mine]) for mine in by_team if mine for arm in arms]
