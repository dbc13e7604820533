"""Files changed on disk: a command either computes what it would have computed, or refuses in a sentence."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attacks.attack import Attack, Scene


def flip(path: Path, rng: random.Random) -> None:
    """One to eight bits, anywhere; the size stays."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def garble(path: Path, rng: random.Random) -> None:
    """A run of bytes replaced by random ones."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    data[start : start + 512] = rng.randbytes(len(data[start : start + 512]))
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """The end is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def empty(path: Path, rng: random.Random) -> None:
    """No bytes left."""
    path.write_bytes(b"")


def zeros(path: Path, rng: random.Random) -> None:
    """As a file system leaves what was not yet written when the power went."""
    path.write_bytes(bytes(path.stat().st_size))


def gone(path: Path, rng: random.Random) -> None:
    """Removed."""
    path.unlink()


def longer(path: Path, rng: random.Random) -> None:
    """Something behind the end."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 4096)))


def another(path: Path, rng: random.Random) -> None:
    """The content of a file beside it."""
    others = [other for other in path.parent.rglob("*") if other.is_file() and other != path]
    path.write_bytes(rng.choice(others).read_bytes() if others else b"another")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip,
    flip,
    garble,
    cut,
    empty,
    zeros,
    gone,
    longer,
    another,
)


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file below `folder`; returns what was done."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"))
    how = rng.choice(DAMAGES)
    how(path, rng)
    return f"{how.__name__} {path.relative_to(folder)}"


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return sorted(path.parent for path in run.rglob("COMPLETE"))[-1]


def resume(scene: Scene) -> str | None:
    """Training goes on from four steps with a damaged last checkpoint: as if nothing had been, or a sentence."""
    scene.world.half_trained(scene.out)
    what = damage(last_checkpoint(scene.out), scene.rng)
    done = scene.command("train")
    if done.code == 0:
        lost = scene.whole("train")
        return None if lost is None else f"{what}: exit 0, and {lost}"
    return None if done.sentence else f"{what}: ended with {done.code}: {done.last}"


def copied(what: str, command: str, scene: Scene) -> str | None:
    """One file of a copy of the world's `what` is damaged, then `command` reads it."""
    source = scene.world.packed if what == "packed set" else scene.world.folder / {"run": "train"}.get(what, what)
    copy = scene.folder / "copy"
    shutil.copytree(source, copy)
    done = damage(last_checkpoint(copy) if what == "run" else copy, scene.rng)
    words = [word.replace(str(source), str(copy)) for word in scene.world.words(command, scene.out)]
    ended = scene.run(words)
    if ended.code == 0:
        # Metadata that nobody computes with may differ; the numbers may not.
        return None if scene.whole(command) is None else f"{done}: exit 0, and {scene.whole(command)}"
    return None if ended.sentence else f"{done}: ended with {ended.code}: {ended.last}"


ATTACKS = [
    Attack("damage", "last checkpoint, then the same command", resume, 1, 90, 7.0),
    Attack("damage", "checkpoint, then export", partial(copied, "run", "export"), 1, 70, 1.0),
    Attack("damage", "packed set, then train", partial(copied, "packed set", "train"), 1, 70, 3.0),
    Attack("damage", "model folder, then eval", partial(copied, "model", "eval"), 1, 70, 2.0),
    Attack("damage", "model folder, then train", partial(copied, "model", "train"), 0, 20, 3.0),
]
