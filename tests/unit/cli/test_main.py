"""The command line: help worth reading, exit codes, and one sentence for a user's mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from anchorctx import __version__
from anchorctx.attention import BACKENDS
from anchorctx.cli.help import field_docs, help_text
from anchorctx.cli.main import COMMANDS, main, parse
from anchorctx.config import SCHEMAS, schema
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name}" in text for name in COMMANDS)
        assert "recipes/quickstart/run.sh" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def keys_of(owner: Any) -> list[str]:
    fields = dataclasses.fields(owner)
    return [field.name for field in fields]


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_is_in_the_help_with_its_meaning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"anchorctx {command}" in text and "example:" in text
    for name in keys_of(schema(command)):
        assert f"  {name}" in text, name


def test_the_help_has_the_keys_of_what_is_in_lists() -> None:
    text = help_text("prepare")
    assert all(f"  sources[].{name}=" in text for name in (*keys_of(SourceConfig)[:-1], "stdlib.split"))


def test_the_help_has_the_defaults_that_a_run_takes() -> None:
    text = help_text("train")
    for line in ("live.perplexity.documents=16", "live.corpus.stdlib.split=validation", "live.evals=[perplexity]"):
        assert f"  {line}\n" in text
    assert "  humaneval.max_new_tokens=384\n" in help_text("kvcomm")


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m anchorctx prepare --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] in ("0", "141") and not done.stderr


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_has_a_docstring(command: str) -> None:
    def check(owner: Any) -> None:
        docs = field_docs(owner)
        for field in dataclasses.fields(owner):
            assert docs.get(field.name), f"{owner.__name__}.{field.name} has no docstring"
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)

    check(schema(command))


def test_ready_made_choices_are_listed() -> None:
    text = help_text("train")
    assert "parallel=ulysses8|zero1|zero2|zero3|zero3_offload" in text
    assert "logging=local|tensorboard|wandb" in text


def test_show_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--show", "optim.lr=0.5", "parallel=zero3"]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.5" in text and "zero_stage: 3" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "unknown command 'trian': choose prepare, plan, train"),
        (["train", "--steps", "3"], "unknown option '--steps'"),
        (["train", "--recipe"], "--recipe needs a name or a file"),
        (["train", "steps=0", "out_dir=x", "data.train=y"], "steps=0 must be at least 1"),
        (["doctor", "x=1"], "takes no arguments"),
        (
            ["plan", "--dry-run", "--recipe", "x.yaml"],
            "--dry-run is an option of anchorctx prepare, eval, precision, kvcomm, not of",
        ),
        (["train", "--dry-run", "--help"], "--dry-run is an option of anchorctx prepare, eval, precision, kvcomm, not"),
        (["report", "a", "runs=[b]"], "folders are given twice, as a and as runs=[...]: use one of the two"),
        (["plot", "out_dir=x"], "nothing to draw"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"anchorctx {arguments[0]}: ") and sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_parse_tells_options_from_overrides() -> None:
    parsed = parse(["a=1", "--recipe", "r.yaml", "--show", "b.c=[1, 2]"])
    assert (parsed.overrides, parsed.recipe, parsed.show, parsed.help) == (["a=1", "b.c=[1, 2]"], "r.yaml", True, False)
    assert parse(["--recipe=r.yaml", "-h"]).recipe == "r.yaml"
    with pytest.raises(UserError, match="unknown option '-x'"):
        parse(["-x"])


def test_doctor_calls_every_backend_that_it_says_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "cpu           works" in text and "reference     works" in text
    assert "flash_attn    no: it runs on cuda" in text or "flash_attn    works" in text
    assert "pip install 'anchorctx[flash]'" in text or "flash-attn  " in text
    assert "matplotlib    3" in text and "anchorctx[plots]" not in text


def test_doctor_goes_on_after_a_backend_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ImportError("undefined symbol: _ZN2at\n  a traceback's worth of lines")

    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], attend=broken))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "cpu           FAILS: ImportError: undefined symbol: _ZN2at\n" in text and "a traceback" not in text
    assert "reference     works" in text  # which comes after it


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_former_entry_works_and_names_the_new_one(command: str) -> None:
    def started(*module: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *module, "--show"], capture_output=True, text=True, check=True)

    new, former = started("anchorctx", command), started(f"anchorctx.cli.{command}")
    assert new.stdout == former.stdout and not new.stderr
    remedy = f"-m anchorctx.cli.{command} stops working in 0.2: type -m anchorctx {command} instead\n"
    assert former.stderr == remedy


def test_a_process_that_leaves_gives_its_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "anchorctx", "train", "step=1"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'steps'" in done.stderr
