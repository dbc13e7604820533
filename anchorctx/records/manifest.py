"""The manifest: describes a run, is written before it starts, and every result row carries its hash.

Also JSON files in general: reading, atomic writing, and naming a value by a hash.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from anchorctx.records.disk import Writing
from anchorctx.records.files import write_bytes
from anchorctx.records.typed import read_typed

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "tokenizers",
    "hydra-core",
    "wandb",
    "flash-attn",
    "numpy",
)
FILE = "manifest.json"


def build_manifest(command: str, config: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Describe a run: the resolved `config`, code revision, versions, machine, and any `facts` that the caller adds."""
    return {
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config,
        "code": _revision(),
        "versions": {"anchorctx": _version("anchorctx"), "python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name))},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "devices": _devices()},
        **facts,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> str:
    """Write `manifest.json` into `folder` (made if needed), atomically; returns the manifest's hash."""
    with Writing("the manifest", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, manifest)
    return manifest_hash(manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's `manifest.json`; FileNotFoundError where there is none, UserError where it is no JSON object."""
    return read_typed(folder / FILE, dict[str, Any], "restore it, or name another folder")


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Twelve hex digits over the whole manifest."""
    return fingerprint(manifest)


def fingerprint(value: Any) -> str:
    """Twelve hex digits over any JSON value; independent of the order of keys."""
    # 48 bits: among a million different values two are equal with a probability of one in 500
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read_json(path: Path) -> Any:
    """The file's value; FileNotFoundError where there is none."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically (`to_json`)."""
    write_bytes(path, to_json(value))


def to_json(value: Any) -> bytes:
    """A JSON file's content; what JSON does not know, such as a path, is written as `str` shows it."""
    return (json.dumps(_utf8(value), indent=2, default=lambda other: _utf8(str(other))) + "\n").encode()


def _utf8(value: Any) -> Any:
    """The value with bytes of file names that are no UTF-8 escaped, which strict readers refuse in JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_utf8(key): _utf8(one) for key, one in value.items()}
    return [_utf8(one) for one in value] if isinstance(value, list | tuple) else value


def _revision() -> dict[str, Any]:
    """The git commit of this package and whether files differ from it; None for both without git or a repository."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"revision": revision, "dirty": bool(status) if status is not None else None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
