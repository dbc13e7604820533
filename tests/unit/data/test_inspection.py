"""`prepare --dry-run` says what the preparation then does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anchorctx.cli.main import main
from anchorctx.data.inspection import inspect
from anchorctx.data.packing.config import PackConfig
from anchorctx.data.prepare import TOKENS, prepare
from anchorctx.data.tokens.store import TokenWriter

from .byte_corpus import byte_tokenizer, small_config


def test_a_dry_run_tells_the_rows_the_padding_and_the_loss_of_every_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, byte_tokenizer(tmp_path / "t", bos_token="<s>", eos_token="</s>"))
    config.row_length, config.keep_tokens, config.pack.min_length = 32, True, 14
    expected = inspect(config)
    printed = capsys.readouterr().out
    assert [path.name for path in Path(config.out_dir).iterdir()] == [TOKENS]  # nothing was packed
    assert len(expected) == 9 and len({(one.rows, *sorted(one.dropped.items())) for one in expected}) > 5
    monkeypatch.setattr(TokenWriter, "close", lambda *_: pytest.fail("tokenised again"))
    for one in expected:
        pack = PackConfig(policy=one.policy, long_documents=one.long_documents, min_length=14)
        packed = prepare(replace(config, pack=pack))
        account = packed.manifest["accounting"]
        assert (one.rows, one.padding, one.dropped) == (len(packed), account["padding"], account["dropped"])
        anchors = len(packed) * config.anchor_len**2
        assert one.cost + anchors == packed.row_cost.sum()
        share = one.padding / (one.rows * 32)
        name = f"{one.policy.value}, {one.long_documents.value}"
        line = next(line for line in printed.splitlines() if line[2:].startswith(name))
        assert f"{one.rows:,}" in line and f"{share:.2%}" in line
        assert line.endswith(", ".join(f"{n:,} {reason}" for reason, n in sorted(one.dropped.items())) or "none")
        assert line.startswith(">") == (name == "best_fit, split")


def test_a_dry_run_counts_documents_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, byte_tokenizer(tmp_path / "t", bos_token="<s>", eos_token="</s>"))
    inspect(replace(config, row_length=16))
    printed = capsys.readouterr().out.splitlines()
    texts = [len(f"document {i}: " + "größer " * (i % 5)) + 2 * (i % 5) for i in range(12)]
    line = next(line for line in printed if "corpus.jsonl" in line)
    assert line.split()[1:] == ["12", f"{sum(texts) + 12}", f"{max(texts) + 1}"]
    assert [line.split()[3] for line in printed if " to " in line and "#" in line] == ["3", "5", "4"]
    assert sum("longer than a row" in line and "#" in line for line in printed) == 2


def test_dry_run_is_no_option_of_export(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--dry-run"]) == 2
    assert (
        "--dry-run is an option of anchorctx prepare, eval, precision, kvcomm, not of export" in capsys.readouterr().err
    )
