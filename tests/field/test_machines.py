"""Machines as they are: no home folder or one that cannot be written, caches of others, terminals that close.

The comments name public reports of the kind. No text of theirs is copied.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from anchorctx.config import SCHEMAS, resolve, schema
from anchorctx.errors import UserError
from anchorctx.parallel import extension
from anchorctx.testing.tiny import word_tokenizer

ROOT = Path(__file__).parents[2]


def text_keys(owner: type, prefix: str = "") -> list[str]:
    """Keys of a configuration that take a text: paths and names."""
    found, hints = [], get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        if field.name == "gguf_file":
            continue  # a name inside the folder of `path`
        if hint is str or set(get_args(hint)) == {str, NoneType}:
            found.append(prefix + field.name)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += text_keys(hint, f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_that_may_be_a_path_takes_a_home_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boostorg/build#346, fabtools/fabtools#165: the shell leaves ~ alone behind a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = text_keys(schema(command))
    runs = ["runs=['~/x']"]
    lists = {"prepare": ["sources=[{path: '~/x'}]", "row_length=64"], "report": runs}
    config = resolve(command, [*(f"{key}=~/x" for key in keys), *lists.get(command, [])])
    assert keys
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == f"{tmp_path}/x", key
    for elements in (getattr(config, name, None) for name in ("sources", "runs")):
        for element in elements or []:
            assert getattr(element, "path", element) == f"{tmp_path}/x"


@pytest.mark.parametrize(
    "home",
    [
        # huggingface/text-generation-inference#3082, cbcoutinho/nextcloud-mcp-server#1219: not to be written
        "/dev/null",
        # pytorch/pytorch#140765, vectorize-io/hindsight#3934: a user without an entry in /etc/passwd
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_a_corpus_is_prepared_without_a_home(home: str | None, tmp_path: Path) -> None:
    """/dev/null can be written into by nobody, root included, who runs these tests in containers."""
    word_tokenizer(64).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "documents.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40)
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    words = ["prepare", "out_dir=packed", "tokenizer=tokenizer", "row_length=64", "sources=[{path: documents.txt}]"]
    nobody = "" if home else "import os; real = os.path.expanduser; os.path.expanduser = lambda path: path; "
    code = f"{nobody}from anchorctx.cli.main import entry; entry()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": str(ROOT)} | ({"HOME": home} if home else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "packed").glob("*/manifest.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "documents.txt", "packed"}


def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_an_extension_is_not_compiled_into_a_folder_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default is ~/.cache, taken as it stands where nobody knows a home; pytorch/pytorch#140765 is a sister."""
    no_cache(monkeypatch)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no home folder to put it in: set TORCH_EXTENSIONS_DIR"):
        extension.folder()
    assert not list(tmp_path.iterdir())


def test_a_cache_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENV TORCH_EXTENSIONS_DIR=~/cache in a Dockerfile: no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "~/cache")
    monkeypatch.chdir(tmp_path)
    assert extension.folder() == tmp_path / "home" / "cache" / "cpu_adam"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/text-generation-inference#3082 and many others: a read-only HOME, or another user's."""
    no_cache(monkeypatch)
    monkeypatch.setenv("HOME", "/dev/null")
    place = "/dev/null/.cache/torch_extensions"
    with pytest.raises(UserError, match=rf"nothing can be written in {place} \(Not a directory\)"):
        extension.folder()
