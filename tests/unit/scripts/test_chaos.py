"""The harness itself: that it sees what goes wrong, and does the same again from a seed."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PLACES = ("attack", "world", "damage", "fuzz", "kills", "escapes")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of `scripts/attacks` by name, and `chaos`; forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    found = {name: importlib.import_module(f"attacks.{name}") for name in PLACES}
    found["chaos"] = importlib.import_module("chaos")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("attacks", "chaos", "escapes_list"):
            monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return found


@pytest.fixture
def scene(modules: dict[str, ModuleType], tmp_path: Path) -> Any:
    """A try in a world whose `eval` leaves two rows."""
    world = modules["world"].World(tmp_path / "world")
    (tmp_path / "out").mkdir()
    scene = modules["attack"].Scene(world, tmp_path, random.Random(0), 0)
    world.whole["eval"] = modules["world"].digest("eval", write(scene.out, [1.0, 2.0]))
    return scene


def write(out: Path, values: list[float]) -> Path:
    rows = [{"metric": "perplexity", "value": value, "context": {"model": "m"}} for value in values]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 2.0], [1.0, 2.5], []])
def test_rows_that_are_lost_doubled_or_different_are_seen(scene: Any, values: list[float]) -> None:
    write(scene.out, [2.0, 1.0])
    assert scene.whole("eval") is None  # their order does not matter
    write(scene.out, values)
    assert scene.whole("eval") == "the output differs from that of an undisturbed command"


def test_half_written_files_are_seen(scene: Any) -> None:
    (scene.out / ".model.x.partial").mkdir()
    assert scene.whole("eval") == "left over: .model.x.partial"
    (scene.out / "results.jsonl").write_text('{"metric": ')
    assert scene.whole("eval").startswith("the output cannot be read")


def test_a_refusal_is_a_sentence_with_exit_code_two(modules: dict[str, ModuleType]) -> None:
    ended = modules["attack"].forks.Ended
    said = "loading\nanchorctx eval: out_dir is full: make room\n"
    assert ended(2, said, 1.0, False).sentence
    assert not ended(1, said, 1.0, False).sentence and not ended(2, "usage", 1.0, False).sentence
    shown = ended(2, said + "Traceback (most recent call last):\n  File\nOSError: full\nbye\n", 1.0, False)
    assert shown.traceback and not shown.sentence and shown.last == "OSError: full"


def test_a_try_is_the_same_again(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """Also a damaged file, which depends on the other files' names and sizes only."""
    made = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(name.encode() * 999)
        done = [modules["damage"].damage(folder, random.Random(f"0/{number}")) for number in range(20)]
        line = modules["fuzz"].mutated_line(["eval", "model=m", "out_dir=o"], random.Random(3))
        made.append((done, line, {p.name: p.read_bytes() for p in folder.iterdir()}))
    assert made[0] == made[1] and len(set(made[0][0])) > 5


def test_every_damage_changes_the_file(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    for how in modules["damage"].DAMAGES:
        (tmp_path / "other").write_bytes(b"other")
        file = tmp_path / "file"
        file.write_bytes(bytes(range(1, 251)) * 4)
        how(file, random.Random(1))
        assert not file.exists() or file.read_bytes() != bytes(range(1, 251)) * 4, how.__name__


def test_kills_come_at_the_change_that_was_named(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); from attacks.kills import killed_at\n"
    code += "killed_at(2, sys.argv[2] == 'behind')()\nfor n in '123': os.mkdir(n)"
    left = {}
    for when in ("before", "behind"):
        (folder := tmp_path / when).mkdir()
        done = subprocess.run([sys.executable, "-c", code, str(ROOT / "scripts"), when], cwd=folder)
        left[when] = done.returncode, sorted(path.name for path in folder.iterdir())
    assert left == {"before": (-9, ["1"]), "behind": (-9, ["1", "2"])}


def test_the_record_becomes_the_table(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    attack = modules["attack"]
    one = attack.Attack("kills", "train: at any moment", lambda scene: None, 1, 2, 1.0)
    bad = {"kind": "kills", "how": one.how, "seed": 3, "number": 0, "lost": "rows", "tracebacks": 2, "hangs": 0}
    good = bad | {"number": 1, "lost": None, "tracebacks": 0}
    (tmp_path / "tries.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n" + '{"kind": "ki')
    (row,) = attack.table_rows([one], attack.read_tries(tmp_path / "tries.jsonl"))
    assert row == {
        "kind": "kills", "how": one.how, "tried": 2, "lost": 1, "tracebacks": 1, "hangs": 0,
        "command": "python scripts/chaos.py kills --how 'train: at any moment' --times 2 --seed 3",
    }  # fmt: skip


def test_the_long_pass_makes_what_was_promised(modules: dict[str, ModuleType]) -> None:
    chaos, long, short = modules["chaos"], {}, 0.0
    for attack in chaos.attacks_of(chaos.KINDS):
        long[attack.kind] = long.get(attack.kind, 0) + attack.long
        short += attack.short * attack.seconds
    least = {"kills": 100, "damage": 300, "disks": 100, "signals": 60, "resumes": 40, "escapes": 150, "fuzz": 5000}
    assert {kind: n for kind, n in least.items() if long[kind] < n} == {}
    assert short < 90


@pytest.mark.slow
def test_a_short_pass_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--short", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
