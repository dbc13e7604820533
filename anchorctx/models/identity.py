"""What identifies a model on disk or on the hub: its contents, not its place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

BLOCK, BLOCKS = 2**16, 64
"""Bytes of a block, and how many of them, spread evenly over a file, stand for it."""


def identity(path: str, config: PretrainedConfig) -> dict[str, Any]:
    """JSON that changes whenever the model's results could: its files' contents (a hub model's commit) and `config`."""
    folder = Path(path).expanduser()
    commit = getattr(config, "_commit_hash", None)
    files = {"files": _files_digest(folder)} if folder.exists() else {"hub": path, "commit": commit}
    fields = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {**files, "config": fields}


def _files_digest(folder: Path) -> str:
    """Over names, sizes and 64 blocks of 64 KiB spread over each file: whole small files, and enough of the weights.

    Any step of training changes nearly every weight, so that two checkpoints cannot agree in all blocks.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in range(min(BLOCKS, -(-size // BLOCK))):
                # first, last and 62 blocks between them; small files from end to end
                file.seek(block * BLOCK if size <= BLOCK * BLOCKS else block * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
