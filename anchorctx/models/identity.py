"""What identifies a model on disk or on the hub: its contents, not its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from anchorctx.models.gguf import is_gguf, local_file
from anchorctx.records.files import sampled_digest


def identity(path: str, config: PretrainedConfig) -> dict[str, Any]:
    """JSON that changes whenever the model's results could: its files' contents (a hub model's commit) and `config`."""
    place = local_file(path) if is_gguf(path) else Path(path).expanduser()
    commit = getattr(config, "_commit_hash", None)
    inside = [place] if place.is_file() else [file for file in place.glob("[!.]*") if file.is_file()]
    files = {"files": sampled_digest(inside)} if inside else {"hub": path, "commit": commit}
    fields = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {**files, "config": fields}
