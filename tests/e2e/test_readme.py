"""What the README tells a user to type is what the software takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from anchorctx.cli.commands import configured
from anchorctx.cli.main import COMMANDS, parse
from anchorctx.config import SCHEMAS, compose_config
from anchorctx.data.sources.stdlib import train_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(command, arguments) of every `anchorctx` line and every `-m anchorctx COMMAND` in the pages' shell blocks."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "anchorctx" in words[:-1] and (words[0] == "anchorctx" or "-m" in words):
                    at = words.index("anchorctx") + 1
                    found.append((words[at], words[at + 1 :]))
    return found


def test_there_is_something_to_check() -> None:
    assert len(commands()) >= 5 and blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize(("command", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_commands_of_the_pages_compose(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert command in COMMANDS
    parsed = parse(arguments)
    if command == "plan":  # a recipe of its is a training run's
        assert configured("plan", parsed) is not None
    elif command in SCHEMAS and not parsed.help:
        folders = [word for word in parsed.overrides if command == "report" and "=" not in word]
        compose_config(command, [word for word in parsed.overrides if word not in folders], parsed.recipe)


def test_scripts_and_pictures_of_the_pages_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"(?:bash|python) ((?:recipes|scripts|benchmarks)/[\w./]+)", text):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_the_python_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny random model in the quickstart's place; each under 25 lines."""
    monkeypatch.chdir(ROOT)
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    model = LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=16_384,
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    example = blocks(ROOT / "README.md", "python")[number]
    assert len(example.splitlines()) < 25
    exec(re.sub(r"runs/quickstart/\w+", str(tmp_path), example), {})
