"""Make docs/reliability.md of docs/reliability.json, which `scripts/chaos.py --write` makes of a record."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, ROWS = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.json"
KINDS = {
    "kills": "SIGKILL, then the same command again: the same bits, and nothing left over",
    "ranks": "Training on two processes, of which one fails, or torchrun: the others end, the same command goes on",
    "damage": "Files changed on disk: the same numbers, or a refusal in a sentence",
    "disks": "A disk that is full or read-only: a sentence; with room again the same command finishes",
    "signals": "SIGTERM, SIGINT, SIGUSR1: 143, 130, 138; the same command goes on",
    "resumes": "A resume with something changed: applied and said, or refused; what does not matter changes nothing",
    "numbers": "Odd numbers for a key, weights that are no numbers: refused, and no NaN in a result",
    "hostile": "Files made to harm: no code runs, memory is bounded, nothing waits for ever",
    "fuzz": "Nonsense on the command line and in files: a sentence",
    "escapes": "Programs that want out of HumanEval's sandbox, or a pass that they did not earn",
}


def page() -> str:
    """The page's text."""
    rows = json.loads(ROWS.read_text())
    tried, bad = sum(row["tried"] for row in rows), sum(row["lost"] + row["tracebacks"] + row["hangs"] for row in rows)
    parts = [
        f"## {KINDS[kind]}\n\n| what | tried | lost | tracebacks | hangs | again |\n|---|---|---|---|---|---|\n"
        + "\n".join(map(_line, group))
        for kind, group in groupby(rows, key=lambda row: row["kind"])
    ]
    outcome = "nothing was lost" if bad == 0 else f"{bad:,} of them showed a fault"
    return TEXT.format(tried=tried, outcome=outcome, parts="\n\n".join(parts))


def _line(row: dict) -> str:
    numbers = " | ".join(f"{row[name]:,}" for name in ("tried", "lost", "tracebacks", "hangs"))
    how = row["how"].replace("|", "\\|")
    return f"| {how} | {numbers} | `{row['command'].removeprefix('python scripts/chaos.py ')}` |"


TEXT = """# What was done to it

Long runs meet machines that fail. `scripts/chaos.py` makes them fail: {tried:,} tries, each on a tiny model on a CPU,
and {outcome}. A try is *lost* where a command ended without a sentence that says why, or where what it left differs
from what an undisturbed command leaves: other weights, other numbers, a row twice or not at all, a half-written file.

```bash
python scripts/chaos.py --short                     # about a minute
python scripts/chaos.py --long --out runs/chaos     # everything below; says how long, and goes on where it was stopped
python scripts/chaos.py --list                      # the attacks
```

The last column is what repeats a row, behind `python scripts/chaos.py`; `--only N` repeats one try of it. A try depends
only on its seed and number (and a kill or a signal on the machine's speed: its moment is a share of the undisturbed
command's time). Commands run in forks of a process that has imported everything, which makes 5,000 of them affordable;
disks are small tmpfs where the user is root, else limits on the length of a file.

{parts}

`docs/write_reliability.py` makes this page of `docs/reliability.json`, which `scripts/chaos.py --write` makes of its
record.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
