"""What an attack is, and the record of its tries."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks import forks
from attacks.world import World, digest, leftovers


@dataclass(slots=True)
class Scene:
    """One try: an empty folder, and what became of the commands that ran in it."""

    world: World
    folder: Path
    rng: random.Random
    number: int
    """Of the try, from 0 on."""
    ended: list[forks.Ended] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the command under attack writes."""
        return self.folder / "out"

    def run(self, words: list[str], **how: Any) -> forks.Ended:
        """Run a command in the folder; see `forks.run`."""
        done = forks.run(words, self.folder, **how)
        self.ended.append(done)
        return done

    def command(self, name: str, **how: Any) -> forks.Ended:
        """Run one of the world's commands."""
        return self.run(self.world.words(name, self.out), **how)

    def finishes(self, name: str) -> str | None:
        """Type the command again: None when all is there that an undisturbed one leaves, else what is not."""
        done = self.command(name)
        if done.code != 0:
            return f"the same command again ended with {done.code}: {done.last}"
        return self.whole(name)

    def whole(self, name: str) -> str | None:
        """None when the command's output is what an undisturbed one leaves, else what is not."""
        try:
            if digest(name, self.out) != self.world.whole[name]:
                return "the output differs from that of an undisturbed command"
        except (OSError, ValueError, KeyError) as error:
            return f"the output cannot be read: {error}"
        left = leftovers(self.out)
        return f"left over: {left[0]}" if left else None


@dataclass(frozen=True, slots=True)
class Attack:
    """One way to disturb, a row of the table."""

    kind: str
    """Word on the command line: kills, damage, ..."""
    how: str
    """What is done, and to what."""
    attempt: Callable[[Scene], str | None]
    """Does it once; returns what was lost, or None."""
    short: int
    """Tries of the short pass."""
    long: int
    """Tries of the long pass."""
    seconds: float
    """A try's time on a quiet core, roughly."""


def attempt(attack: Attack, world: World, scratch: Path, seed: int, number: int) -> dict[str, Any]:
    """One try, as a row of the record; the same seed and number do the same."""
    name = f"{seed}/{attack.kind}/{attack.how}/{number}"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "out").mkdir(parents=True)
    scene = Scene(world, scratch, random.Random(name), number)
    began = time.monotonic()
    try:
        lost = attack.attempt(scene)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shown = [done.last for done in scene.ended if done.traceback]
    return {
        "kind": attack.kind,
        "how": attack.how,
        "seed": seed,
        "number": number,
        "lost": lost,
        "tracebacks": len(shown),
        "shown": shown[:1],
        "hangs": sum(done.hung for done in scene.ended),
        "seconds": round(time.monotonic() - began, 2),
    }


def table_rows(attacks: Iterable[Attack], tries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an attack that was tried: kind, how, tried, lost, tracebacks, hangs, and the command that repeats it."""
    found = []
    tries = list(tries)
    for attack in attacks:
        mine = [t for t in tries if (t["kind"], t["how"]) == (attack.kind, attack.how)]
        if mine:
            command = f"python scripts/chaos.py {attack.kind} --how '{attack.how}' --times {len(mine)}"
            row = {"kind": attack.kind, "how": attack.how, "tried": len(mine)}
            row["lost"] = sum(t["lost"] is not None for t in mine)
            row |= {name: sum(t[name] > 0 for t in mine) for name in ("tracebacks", "hangs")}
            found.append(row | {"command": f"{command} --seed {mine[0]['seed']}"})
    return found


def read_tries(path: Path) -> list[dict[str, Any]]:
    """The record; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
