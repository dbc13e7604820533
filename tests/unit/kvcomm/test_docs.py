"""The worked example of docs/kvcomm.md runs, on a random model in the quickstart's place, and stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.testing.tiny import save, text_model

DOCS = Path(__file__).parents[3] / "docs" / "kvcomm.md"


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) < 25
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    save(text_model(tokenizer, 2048), tokenizer, tmp_path)
    exec(code.replace("runs/quickstart/exported", str(tmp_path)), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(re.search(r"\d\.\d ms \(dense .* agrees: (True|False)$", line) for line in lines)
