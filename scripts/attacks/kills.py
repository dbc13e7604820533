"""SIGKILL at a random moment, or at a random change of the file system; then the same command again."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from attacks.attack import Attack, Scene
from attacks.world import COMMANDS

CHANGES = ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "fsync"), (shutil, "rmtree"))
"""What is counted on the way to a kill."""
BRIEF = ("train", "eval", "kvcomm")
"""What the short pass kills."""


def killed_at(count: int, behind: bool) -> Callable[[], None]:
    """For `forks.run(inside=...)`: dies at the `count`th change of the file system, before it or behind it."""

    def inside() -> None:
        left = [count]

        def wrap(function: Any) -> Any:
            def wrapped(*arguments: Any, **keywords: Any) -> Any:
                left[0] -= 1
                if left[0] == 0 and not behind:
                    os.kill(os.getpid(), signal.SIGKILL)
                done = function(*arguments, **keywords)
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return wrapped

        for owner, name in CHANGES:
            setattr(owner, name, wrap(getattr(owner, name)))

    return inside


def at_a_moment(command: str, scene: Scene) -> str | None:
    """Up to three kills, each at any moment of an undisturbed command's time."""
    for _ in range(scene.rng.randint(1, 3)):
        moment = scene.rng.uniform(0.05, 1.0) * scene.world.seconds[command]
        done = scene.command(command, after=(moment, signal.SIGKILL))
        if done.code == 0:
            return scene.whole(command)
    return scene.finishes(command)


def at_a_change(command: str, scene: Scene) -> str | None:
    """A kill at one of the first 30 changes of the file system."""
    kill = killed_at(scene.rng.randint(1, 30), scene.rng.random() < 0.5)
    return scene.whole(command) if scene.command(command, inside=kill).code == 0 else scene.finishes(command)


ATTACKS = [
    *(Attack("kills", f"{c}: at any moment", partial(at_a_moment, c), 0, 9, 4.0) for c in COMMANDS),
    *(Attack("kills", f"{c}: at a change on disk", partial(at_a_change, c), int(c in BRIEF), 9, 4.0) for c in COMMANDS),
]
