"""Attacks on every command: kills, damage, full disks, signals, changed resumes, odd numbers, hostile files, nonsense.

    python scripts/chaos.py --short                       a pass of about a minute
    python scripts/chaos.py --long --out runs/chaos       the whole; says how long, goes on where it was stopped
    python scripts/chaos.py kills --times 50 --seed 3     one kind
    python scripts/chaos.py --list
    python scripts/chaos.py --write docs/reliability.json --out runs/chaos

Each try is a line of OUT/tries.jsonl, with what was lost; the same seed does the same again. After a change of the code
name another OUT. What is wanted: nothing lost, no traceback, no hang. Exits 1 when a try showed anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attacks import forks
from attacks.attack import Attack, attempt, read_tries, table_rows
from attacks.world import World

KINDS = ("kills", "ranks", "damage", "disks", "signals", "resumes", "numbers", "hostile", "fuzz", "escapes")


def attacks_of(kinds: Sequence[str]) -> list[Attack]:
    """The attacks of these kinds, in the kinds' order; a kind's module is imported when it is asked for."""
    import importlib

    return [a for kind in kinds for a in importlib.import_module(f"attacks.{kind}").ATTACKS]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"all, or some of {', '.join(KINDS)}")
    parser.add_argument("--short", action="store_true", help="a few tries of each attack")
    parser.add_argument("--long", action="store_true", help="the numbers of docs/reliability.md")
    parser.add_argument("--times", type=int, help="tries of each attack")
    parser.add_argument("--how", help="only the attack of this name")
    parser.add_argument("--only", type=int, help="only the try of this number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the record")
    parser.add_argument("--list", action="store_true", help="print the attacks, with their tries and times")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the record's table as JSON, and stop")
    given = parser.parse_args(argv)
    unknown = set(given.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kind {', '.join(sorted(unknown))}: choose {', '.join(KINDS)}")
    return given


def times_of(attack: Attack, given: argparse.Namespace) -> int:
    """How often an attack is tried."""
    return given.times or (attack.long if given.long else attack.short if given.short else min(attack.long, 10))


def main(argv: Sequence[str] | None = None) -> int:
    """Attack; 0 when nothing was lost."""
    given = arguments(argv)
    attacks = [a for a in attacks_of(given.kinds or KINDS) if given.how in (None, a.how)]
    record = given.out.resolve() / "tries.jsonl"
    if given.list:
        for a in attacks:
            print(f"{a.kind:8} {a.how:60} short {a.short:4}, long {a.long:4}, {a.seconds:.1f} s each")
        return 0
    if given.write is not None:
        rows = table_rows(attacks, read_tries(record))
        given.write.write_text(json.dumps(rows, indent=1) + "\n")
        return 0
    tries = go(attacks, given, record)
    return 1 if any(t["lost"] is not None or t["tracebacks"] or t["hangs"] for t in tries) else 0


def go(attacks: list[Attack], given: argparse.Namespace, record: Path) -> list[dict]:
    """Make all tries that the record does not have yet; returns those that were asked for."""
    done = {(t["kind"], t["how"], t["seed"], t["number"]): t for t in read_tries(record)}
    numbers = (lambda a: range(times_of(a, given))) if given.only is None else (lambda _: [given.only])
    wanted = [(a, n) for a in attacks for n in numbers(a)]
    todo = [(a, n) for a, n in wanted if (a.kind, a.how, given.seed, n) not in done]
    seconds = sum(a.seconds for a, _ in todo)
    print(f"{len(todo)} tries of {len(wanted)} to make, about {seconds / 60:.0f} minutes on a quiet core", flush=True)
    if not todo:
        return [done[a.kind, a.how, given.seed, n] for a, n in wanted]
    forks.load_everything()
    world = World(record.parent / "world")
    world.make()
    with record.open("a") as file:
        began = time.monotonic()
        for number, (attack, n) in enumerate(todo, 1):
            row = attempt(attack, world, record.parent / "scratch", given.seed, n)
            done[attack.kind, attack.how, given.seed, n] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            passed = time.monotonic() - began
            say(row, f"{number}/{len(todo)}, {passed * (len(todo) - number) / number / 60:.0f} min left")
    shutil.rmtree(record.parent / "scratch", ignore_errors=True)
    tries = [done[a.kind, a.how, given.seed, n] for a, n in wanted]
    for row in table_rows(attacks, tries):
        print(f"{row['kind']:8} {row['how']:60} {row['tried']:5} tried, {row['lost']} lost, "
              f"{row['tracebacks']} tracebacks, {row['hangs']} hangs")  # fmt: skip
    return tries


def say(row: dict, progress: str) -> None:
    """A line for what went wrong, and on a terminal one that is written over."""
    wrong = [row["lost"]] if row["lost"] else []
    wrong += [f"traceback: {row['shown'][0]}"] if row["tracebacks"] else []
    wrong += ["a hang"] if row["hangs"] else []
    end = "\n" if wrong or not sys.stdout.isatty() else "\r"
    print(f"[{progress}] {row['kind']} {row['how']} {row['number']}: {'; '.join(wrong) or 'well'}", end=end, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # torch's and triton's libraries have complaints about the interpreter's end
