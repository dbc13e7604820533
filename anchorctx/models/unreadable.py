"""What is wrong with a checkpoint that a library cannot read, and what to do about it, in a sentence.

Libraries fail in many ways, such as a KeyError of the scaling that they do not know. The files say more than the error
does.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open

from anchorctx.errors import UserError

NAMED = ("OSError", "ValueError", "ImportError", "RuntimeError", "SafetensorError", "JSONDecodeError")
"""Errors whose message says what is wrong without their name."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack")
"""Endings of files that hold weights, those that transformers does not read too."""
HERE = "correct its files if you changed them, else download or export it again"
GENERAL = (
    "name a folder with a model and its tokenizer, or a model that the hub gives you (check its name, or download it "
    "first)"
)


def unreadable(path: str, error: Exception) -> UserError:
    """The error for model `path`, a folder or a name on the hub, that was met while it was read."""
    folder = Path(path).expanduser()
    problems = _problems(folder, error) if folder.is_dir() else iter(())
    found = next(problems, None) or _from_error(error)
    remedy = HERE if (folder / "config.json").is_file() else GENERAL
    return UserError(f"model {path} {found}" if found else f"model {path} cannot be loaded ({said(error)}): {remedy}")


def said(error: BaseException) -> str:
    """One line of a library's error, with its kind where the message alone says little (`KeyError: 'su'`)."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    # transformers' strict dataclasses: "Validation error for field 'x':", then "TypeError: Field 'x' expected int, ..."
    validated = lines[0].endswith(":") and lines[1:] and lines[1].split(": ")[0].endswith("Error")
    line = lines[1].partition(": ")[2] if validated else lines[0]
    named = len(lines) > 1 or type(error).__name__ in NAMED or line == type(error).__name__
    return (line if named else f"{type(error).__name__}: {line}").rstrip(".:")


def _from_error(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        return (
            "has a file of weights that holds more than weights, which could run code, or is damaged: get it as "
            "safetensors, from someone whom you trust"
        )
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "needs code of its own from its repository, which is not run here: use a version of it whose architecture "
            f"is in transformers ({transformers.__version__} is installed)"
        )
    if "does not recognize this architecture" in text:
        return (
            f"is of an architecture that transformers {transformers.__version__} does not know: install a newer one, "
            "or correct model_type in its config.json"
        )
    return None


def _problems(folder: Path, error: Exception) -> Iterator[str]:
    """What the files of a folder show, the most certain first."""
    yield from _absent(folder, error)
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_file() and (reason := _broken(file)) is not None:
            yield f"has a {file.name} that is cut short or damaged ({reason}): download or export it again"
    for file in sorted(folder.glob("*.json")):
        if file.is_file() and (reason := _no_json(file)) is not None:
            yield f"has a {file.name} that is no JSON ({reason}): {HERE}"
    config = _config(folder)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        yield (
            f"is quantised ({method}) and cannot be read here ({said(error)}): name the checkpoint in 16 or 32 bits "
            "that it was made of"
        )
    if "automatic conversion of the weights" in str(error):
        yield (
            "has experts that do not fit each other, of which a weight is missing or of another shape: download or "
            "export it again"
        )
    kind = error.args[0] if isinstance(error, KeyError) and error.args else None
    if kind is not None and kind in _rope_types(config):
        hint = "its name is longrope now" if kind == "su" else "correct it in its config.json, or install a newer one"
        yield f"has the RoPE type {kind!r}, which transformers {transformers.__version__} does not know: {hint}"


def _absent(folder: Path, error: Exception) -> Iterator[str]:
    """What a folder has in place of files that are not there."""
    files = sorted(folder.iterdir())
    for file in files:
        if file.is_symlink() and not file.exists() and file.suffix in (*WEIGHTS, ".json"):
            yield f"has {file.name} as a link to a file that is not there: download it again, or restore that file"
    if "no file named" in str(error):
        others = [file.name for file in files if file.suffix in WEIGHTS]
        yield (
            f"has no weights in model.safetensors or pytorch_model.bin{f', but {others[0]}' if others else ''}: "
            "download or export it again, or convert it to the format of transformers"
        )


def _no_json(file: Path) -> str | None:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return said(error)
    return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _rope_types(config: dict[str, Any]) -> set[Any]:
    found = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    found += [part for settings in found if isinstance(settings, dict) for part in settings.values()]
    kinds = [s.get(name) for s in found if isinstance(s, dict) for name in ("rope_type", "type")]
    return {kind for kind in kinds if isinstance(kind, str)}


def _broken(file: Path) -> str | None:
    """Why safetensors cannot read the file's header; None where it can."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return said(error).removeprefix("Error while deserializing header: ")
