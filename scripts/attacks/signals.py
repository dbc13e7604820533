"""A signal at a random moment: an exit code that says so, no traceback, and the same command again goes on."""

from __future__ import annotations

import signal
from functools import partial

from attacks.attack import Attack, Scene
from attacks.world import COMMANDS

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": -1}
"""128 and the signal's number, which schedulers and shells know. Of SIGHUP, a closed terminal, commands may die."""


def one(name: str, command: str, scene: Scene) -> str | None:
    """The signal once, anywhere in the command's time."""
    moment = max(0.3, scene.rng.uniform(0.1, 0.95) * scene.world.seconds[command])
    done = scene.command(command, after=(moment, getattr(signal, name)))
    if done.code == 0:
        return scene.whole(command)
    if done.code != CODES[name]:
        return f"{name} after {moment:.2f} s ended with {done.code}, not {CODES[name]}: {done.last}"
    return scene.finishes(command)


BRIEF = (("train", "SIGTERM"), ("eval", "SIGINT"))
"""What the short pass tries."""
ATTACKS = [
    Attack("signals", f"{command}: {name}", partial(one, name, command), int((command, name) in BRIEF), 3, 4.0)
    for command in COMMANDS
    for name in CODES
]
