"""Command lines from public bug reports of Hydra and of projects that use it; the comments name the reports.

Each of them ended in the words of a parser, or was taken for something else. No text of the reports is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anchorctx.cli.main import main
from anchorctx.config import resolve
from anchorctx.errors import UserError

TRAIN = ["data.train=y", "out_dir=x"]


def path_of(typed: str) -> str | None:
    return resolve("train", [*TRAIN, f"model.path={typed}"]).model.path


@pytest.mark.parametrize(
    "typed",
    [
        "log/checkpoints/epoch=999-step=87999.ckpt",  # hydra-ecosystem/hydra#1577
        "/media/my/新加卷2/Qwen2.5-7B-Instruct",  # thu-pacman/chitu#38
        "李明",  # hydra-ecosystem/hydra#2891
        "#",  # hydra-ecosystem/hydra#2705
        "/path/to/pattern_%r.bin",  # hydra-ecosystem/hydra#962
        "example@example.com",  # hydra-ecosystem/hydra#1074
        "A|B",  # hydra-ecosystem/hydra#1844
        "job{a=1,b=2,c=3}",  # hydra-ecosystem/hydra#1844
        "mlx5_0:1,mlx5_3:1",  # NVIDIA/cloudai#557
        "#\\",  # hydra-ecosystem/hydra#1600
    ],
)
def test_a_path_is_what_was_typed(typed: str) -> None:
    assert path_of(typed) == typed


@pytest.mark.parametrize("commit", ["9509425349e4", "83e2010", "6063e25"])
def test_a_commit_is_no_number(commit: str) -> None:
    """elastic/kibana#161934, harness/harness#2498, konstructio/gitops-template#662."""
    assert path_of(commit) == commit
    words = ["out_dir=x", "tokenizer=t", "row_length=9"]
    with pytest.raises(UserError, match=f"revision: {commit} is read as .* put it in quotes, revision: '{commit}'"):
        resolve("prepare", [*words, f"sources=[{{path: x, revision: {commit}}}]"])
    found = resolve("prepare", [*words, f"sources=[{{path: x, revision: '{commit}'}}]"])
    assert found.sources[0].revision == commit


def test_a_script_with_windows_line_ends() -> None:
    """IDEA-Research/detrex#309, facebookresearch/PointContrast#16: the last word of each line ends in \\r."""
    with pytest.raises(UserError, match=r"^out_dir=x ends in a carriage return: give your script Unix line ends"):
        resolve("train", ["data.train=y", "out_dir=x\r"])


def test_lists_with_spaces() -> None:
    """hydra-ecosystem/hydra#836."""
    assert [e.value for e in resolve("eval", ["out_dir=x", "model=m", "evals=[perplexity, needle]"]).evals] == [
        "perplexity",
        "needle",
    ]
    nested = resolve("precision", ["model=m", "out_dir=x", "lengths=[1024, 4096]"])
    assert nested.lengths == [1024, 4096]


def test_a_list_given_as_a_word() -> None:
    """hydra-ecosystem/hydra#2799."""
    with pytest.raises(UserError, match=r"^evals is a list: write evals=\[...\]"):
        resolve("eval", ["out_dir=x", "model=m", "evals=perplexity"])


def test_a_backslash_before_the_key() -> None:
    """SysCV/sam-pt#12: continuation signs of another shell."""
    with pytest.raises(UserError, match="cannot be read from"):
        resolve("train", [*TRAIN, "\\seed=1"])


def test_no_folder_called_tilde_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """boostorg/build#346, fabtools/fabtools#165: the shell leaves ~ alone behind a key."""
    home = tmp_path / "home"
    (home / "runs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs=['~/runs']", "out=~/report.html"]) == 2
    assert f"{home}/runs" in capsys.readouterr().err and not (tmp_path / "~").exists()


def test_a_list_that_the_shell_cut_is_told_before_anything_else(capsys: Any) -> None:
    """Beside hydra-ecosystem/hydra#836: without quotes a list with spaces is several words."""
    for words in (["eval", "model=m", "out_dir=x", "evals=[perplexity,", "needle]"], ["report", "runs=[a,", "b]"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "was cut off at a space: put quotes around the whole, '" in error and error.count("\n") == 1
