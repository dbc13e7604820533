"""Programs that try to get out of the sandbox of HumanEval; they are the tests' own list."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from attacks.attack import Attack, Scene

LIST = Path(__file__).parents[2] / "tests" / "unit" / "evals" / "evaluators" / "reuse" / "escapes.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("escapes_list", LIST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LISTED: Any = _load()


def refused(attacks: dict[str, str], scene: Scene) -> str | None:
    """One call that must meet a PermissionError."""
    name = list(attacks)[scene.number % len(attacks)]
    victim = scene.folder / "victim"
    victim.write_text("whole")
    got_out = LISTED.refusals({name: attacks[name]}, victim) or victim.read_text() != "whole"
    return f"{name} got its way" if got_out else None


def failed(programs: dict[str, str], limits: Any, scene: Scene) -> str | None:
    """One program that must not pass."""
    name = list(programs)[scene.number % len(programs)]
    return f"{name} passed" if LISTED.successes({name: programs[name]}, limits) else None


def _attacks() -> list[Attack]:
    held = {name: LISTED.SOLVED + hold for name, hold in LISTED.HOLDS.items()}
    faked = LISTED.FAKES | LISTED.exits()
    limits = LISTED.Limits()
    return [
        Attack("escapes", "harm: files, processes, network, the machine", partial(refused, LISTED.REFUSED), 8,
               len(LISTED.REFUSED), 0.1),
        Attack("escapes", "reading what is hidden", partial(refused, LISTED.HIDDEN), 4, len(LISTED.HIDDEN), 0.1),
        Attack("escapes", "a pass that was not earned", partial(failed, faked, limits), 8, len(faked), 0.1),
        Attack("escapes", "holding up the evaluation", partial(failed, held, LISTED.BRIEF), 1, len(held), 1.5),
    ]  # fmt: skip


ATTACKS = _attacks()
