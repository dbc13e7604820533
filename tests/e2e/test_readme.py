"""What the README tells a user to type is what the software takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from anchorctx.cli.main import COMMANDS, parse
from anchorctx.config import SCHEMAS, compose_config
from anchorctx.testing.tiny import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(command, arguments) of every `anchorctx` line and every `-m anchorctx.cli.X` in the pages' shell blocks."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["anchorctx"] and len(words) > 1:
                    found.append((words[1], words[2:]))
                modules = [i for i, word in enumerate(words) if word.startswith("anchorctx.cli.")]
                found += [(words[i].removeprefix("anchorctx.cli."), words[i + 1 :]) for i in modules]
    return found


def test_there_is_something_to_check() -> None:
    assert len(commands()) >= 5 and blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize(("command", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_commands_of_the_pages_compose(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert command in COMMANDS
    parsed = parse(arguments)
    if command in SCHEMAS and not parsed.help:
        compose_config(command, parsed.overrides, parsed.recipe)


def test_scripts_and_pictures_of_the_pages_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"(?:bash|python) ((?:recipes|scripts)/[\w./]+)", text):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_example_runs(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    model.resize_token_embeddings(1000, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    scope: dict[str, object] = {}
    (example,) = blocks(ROOT / "README.md", "python")
    exec(example.replace("runs/quickstart/base", str(tmp_path / "model")), scope)
    assert tuple(scope["logits"].shape) == (1, 512, 1000)  # type: ignore[attr-defined]
