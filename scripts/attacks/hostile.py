"""Files made to harm: code in pickles, bombs, files that never end, names that lead out, HTML in the report."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from attacks.attack import Attack, Scene
from attacks.damage import last_checkpoint
from attacks.forks import Ended

BOUND = 2 * 2**30
"""Bytes that a command may take for a file of a few kilobytes; 0.7 GiB are what it imported."""
SCRIPT = "<script>alert(1)</script>"


class Planted:
    """Unpickling it runs code: the marker is then there."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.marker!r}, 'w').close()",)


def _verdict(scene: Scene, done: Ended, *, sentence: bool = True) -> str | None:
    """No code ran, memory was bounded, and the command refused in a sentence (or may also have ended well)."""
    if (scene.folder / "marker").exists():
        return "the code in the file ran"
    if done.peak > BOUND:
        return f"took {done.peak / 2**30:.1f} GiB"
    if done.sentence or (done.code == 0 and not sentence):
        return None
    return f"ended with {done.code}: {done.last}"


def checkpoint(way: str, scene: Scene) -> str | None:
    """A pickle instead of one of a checkpoint's files, read by a resume, by name, or by export."""
    import torch

    scene.world.half_trained(scene.out)
    folder = last_checkpoint(scene.out)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "COMPLETE")
    file = files[scene.number % len(files)]
    torch.save({"module": Planted(scene.folder / "marker")}, file)
    sizes = json.loads((folder / "COMPLETE").read_text())
    if isinstance(sizes, dict) and isinstance(sizes.get(str(file.relative_to(folder))), int):
        sizes[str(file.relative_to(folder))] = file.stat().st_size  # as who plants it would
        (folder / "COMPLETE").write_text(json.dumps(sizes))
    if way == "export":
        return _verdict(scene, scene.run(["export", f"run={scene.out}", f"out_dir={scene.folder / 'exported'}"]))
    more = [f"checkpoint.resume={folder}"] if way == "by name" else []
    return _verdict(scene, scene.run([*scene.world.words("train", scene.out), *more]), sentence=way == "by name")


def model_file(kind: str, scene: Scene) -> str | None:
    """A model folder that wants to run code: a pickle for weights, or a class of its own."""
    import torch

    copy = scene.folder / "model"
    shutil.copytree(scene.world.folder / "model", copy)
    if kind == "a pickle":
        next(copy.glob("*.safetensors")).unlink()
        torch.save({"a": Planted(scene.folder / "marker")}, copy / "pytorch_model.bin")
    else:
        config = json.loads((copy / "config.json").read_text()) | {"model_type": "planted"}
        config["auto_map"] = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "planted.py").write_text(f"open({str(scene.folder / 'marker')!r}, 'w').close()\n")
    command = ("eval", "train", "kvcomm")[scene.number % 3]
    original = str(scene.world.folder / "model")
    return _verdict(scene, scene.run([w.replace(original, str(copy)) for w in scene.world.words(command, scene.out)]))


def bomb(kind: str, scene: Scene) -> str | None:
    """Two GiB of one text in a small file, as a corpus."""
    name = {"gz": "bomb.jsonl.gz", "zst": "bomb.jsonl.zst", "parquet": "bomb.parquet"}[kind]
    cached = scene.world.folder / name
    if not cached.is_file():
        _write_bomb(kind, cached)
    source = f"sources=[{{path: {cached}}}]"
    words = [w for w in scene.world.words("prepare", scene.out) if not w.startswith("sources=")]
    bad = ("fail", "skip")[scene.number % 2]
    return _verdict(scene, scene.run([*words, source.replace("}]", f", on_bad_row: {bad}}}]")]), sentence=False)


def _write_bomb(kind: str, path: Path) -> None:
    block, blocks = b"a" * 2**24, 128
    if kind == "gz":
        with gzip.open(path, "wb") as file:
            for _ in range(blocks):
                file.write(block)
    elif kind == "zst":
        import zstandard

        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for _ in range(blocks):
                file.write(block)
    else:
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.array([block.decode()] * blocks).dictionary_encode()
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd")


def never_ends(kind: str, scene: Scene) -> str | None:
    """A corpus that is a FIFO without a writer, a device, or a link to one."""
    path = scene.folder / "corpus.jsonl"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to /dev/zero":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)
    words = [w for w in scene.world.words("prepare", scene.out) if not w.startswith("sources=")]
    return _verdict(scene, scene.run([*words, f"sources=[{{path: {path}}}]"], limit=30))


def leads_out(scene: Scene) -> str | None:
    """A packed set whose manifest names a file outside of its folder."""
    packed = scene.folder / "packed"
    shutil.copytree(scene.world.packed, packed)
    secret = scene.folder / "secret.npy"
    shutil.copyfile(next(packed.glob("tokens_*.npy")), secret)
    text = (packed / "manifest.json").read_text()
    outside = ("../secret.npy", str(secret))[scene.number % 2]
    (packed / "manifest.json").write_text(text.replace("tokens_00000.npy", outside))
    words = [w.replace(str(scene.world.packed), str(packed)) for w in scene.world.words("train", scene.out)]
    return _verdict(scene, scene.run(words))


def markup(scene: Scene) -> str | None:
    """Labels and texts of HTML in what the report reads: shown as text."""
    for name in ("train", "eval"):
        shutil.copytree(scene.world.folder / name, scene.folder / name)
    for path in (*scene.folder.glob("*/results.jsonl"), *scene.folder.glob("*/manifest.json")):
        path.write_text(
            path.read_text().replace('"model"', json.dumps(SCRIPT)).replace("retrieval", "retrieval" + SCRIPT)
        )
    page = scene.folder / "out" / "report.html"
    done = scene.run(["report", "train", "eval", f"out={page}", f"title={SCRIPT}" if scene.number % 2 else "title=a"])
    if page.is_file() and SCRIPT in page.read_text():
        return "the page runs what a label says"
    return _verdict(scene, done, sentence=False)


def _attacks() -> list[Attack]:
    def made(how: str, attempt: Any, short: int, long: int, seconds: float) -> Attack:
        return Attack("hostile", how, attempt, short, long, seconds)

    return [
        *(made(f"pickle in a checkpoint, {way}", partial(checkpoint, way), 0, 6, 3.0) for way in ("resume", "by name")),
        made("pickle in a checkpoint, export", partial(checkpoint, "export"), 1, 6, 1.0),
        *(made(f"model folder with {kind}", partial(model_file, kind), 1, 6, 1.5) for kind in ("a pickle", "a class")),
        *(made(f"2 GiB in a small .{kind}", partial(bomb, kind), 0, 2, 20.0) for kind in ("gz", "zst", "parquet")),
        *(made(f"corpus: {kind}", partial(never_ends, kind), 1, 2, 1.0) for kind in ("a FIFO", "a link to itself")),
        made("corpus: a link to /dev/zero", partial(never_ends, "a link to /dev/zero"), 0, 2, 30.0),
        made("packed set that names a file outside", leads_out, 1, 4, 2.0),
        made("HTML in names, then report", markup, 1, 4, 3.0),
    ]


ATTACKS = _attacks()
