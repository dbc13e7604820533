"""A user's mistakes, through the command line: one sentence with value, constraint and remedy, nothing half-written.

Further ones are beside the parts that find them: tests/unit/test_config.py, test_models.py, data/, and
tests/distributed/test_resume.py for what needs several processes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.cli.main import main
from anchorctx.parallel import dist

from ..distributed.runs import MODEL, make_packed

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that must fail; returns its one line of error, after a check that it left the folder alone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # set by a lone training process, and put back afterwards
    monkeypatch.chdir(tmp_path)

    def failing(*arguments: str) -> str:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("anchorctx ")]
        assert len(lines) == 1 and "Traceback" not in error, error
        assert set(tmp_path.rglob("*")) == before
        return lines[0]

    return failing


def write_tokenizer(folder: Path, **special: str) -> Path:
    words = {f"w{i}": i for i in range(40)} | {"<s>": 40, "</s>": 41}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special
    ).save_pretrained(folder)
    return folder


def prepare(run: Run, folder: Path, *overrides: str, corpus: str = "corpus.jsonl", special: bool = True) -> str:
    tokenizer = write_tokenizer(folder / "tokenizer", **({"bos_token": "<s>", "eos_token": "</s>"} if special else {}))
    given = ["out_dir=out", f"tokenizer={tokenizer}", "row_length=64", f"sources=[{{path: {corpus}}}]", *overrides]
    return run("prepare", *given)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "corpus.jsonl",
            b'{"text": "a"}\n{"text": \n',
            r"corpus.jsonl:2 is not valid JSON .*mend the line, or set",
        ),
        ("corpus.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"corpus.jsonl:2 has no field text .it has: body.: set te"),
        ("corpus.jsonl", b'{"text": "a"}\n{"text": ""}\n', r"corpus.jsonl:2 has an empty text .*remove the row"),
        ("corpus.jsonl", b'{"text": 3}\n', r"corpus.jsonl:1 has 3 as field text, not a string: mend the row"),
        ("corpus.jsonl", b'{"text": "\xff"}\n', r"corpus.jsonl:1 is not valid UTF-8 .*convert the file"),
        ("corpus.jsonl", b"", r"path=.*corpus.jsonl holds no documents: name a source that has some"),
        (
            "corpus.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            r"corpus.jsonl.gz is corrupt or cut short",
        ),
        ("corpus.parquet", b"PAR1 and no more", r"corpus.parquet is no whole parquet file .*fetch it again"),
        ("other.jsonl", b"", r"path=corpus.jsonl names no file or folder .*correct it"),
    ],
)
def test_a_corpus(run: Run, tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    write_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    corpus = name if name.startswith("corpus") else "corpus.jsonl"
    assert re.search(sentence, prepare(run, tmp_path, corpus=corpus))


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"text": "w1 w2 w3 " * 20}).encode()
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join([good, b'{"text": ', b'{"body": 1}', good, b'{"text": ""}']))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    source = f"sources=[{{path: {tmp_path / 'corpus.jsonl'}, on_bad_row: skip}}]"
    assert main(["prepare", f"out_dir={tmp_path / 'out'}", f"tokenizer={tokenizer}", "row_length=64", source]) == 0
    shown = capsys.readouterr().out
    for reason in ("malformed JSON", "no text field", "empty text"):
        assert f"skipped rows: 1 ({reason})" in shown


def test_a_tokenizer_that_has_neither_bos_nor_eos(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "w1 w2"}\n')
    write_tokenizer(tmp_path / "tokenizer")
    assert "neither a BOS nor an EOS token to be the anchor: set its bos_token" in prepare(run, tmp_path, special=False)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["row_length=2"], "row_length=2 must be at least 3"),
        (["pack.min_length=64"], "pack.min_length=64 must be 1 to 63"),
        (["anchor_len=0"], "anchor_len=0 must be at least 1"),
        (["pack.domain_tags=true"], "has no domain, but pack.domain_tags=true: set domain"),
    ],
)
def test_settings_of_prepare(run: Run, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    write_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    assert sentence in prepare(run, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([MODEL.replace("embeddings: 64", "embeddings: 32")], "row length 64 exceeds the 32 positions that the RoPE"),
        ([MODEL.replace("heads: 2", "heads: 3")], "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        (
            [MODEL.replace("hidden_size: 32", "hidden_size: 30")],
            "hidden_size=30 must be a multiple of num_at",
        ),
        ([MODEL.replace("vocab_size: 4096", "vocab_size: 50")], "60 token ids, but the model's vocabulary ends at 49"),
        ([MODEL.replace("llama", "lama")], "model.config.model_type=lama is unknown to transformers"),
        (
            [MODEL, "model.attention=flash_attn"],
            "backend 'flash_attn' runs on cuda, but the tensors are on cpu: use",
        ),
        ([MODEL, "model.attention=fast"], "model.attention=fast is unknown: choose auto, flash_attn"),
        ([MODEL, "tokens_per_step=100"], "tokens_per_step=100 must be a multiple of the row length, 64: use 128"),
        ([MODEL, "micro_tokens=2"], "micro_tokens=2 leaves no room for a document of two tokens behind an anchor of 1"),
        ([MODEL, "pattern=full", "micro_tokens=32"], "pattern=full makes each row one document, which cannot be cut"),
        ([MODEL, "micro_rows=2"], "micro_rows moved: write micro_tokens=TOKENS, what a forward pass holds"),
        ([MODEL, "data.validation=nowhere"], "nowhere holds no packed set: make one with `anchorctx prepare"),
        ([MODEL, "checkpoint.resume=nowhere"], "nowhere is no folder (no COMPLETE in it): name a complete one"),
        ([MODEL, "parallel.zero_stage=4"], "parallel.zero_stage=4 must be between 1 and 3"),
        (["model.path=./nowhere"], "model ./nowhere does not exist: name the folder of a Hugging Face model"),
    ],
)
def test_settings_of_train(run: Run, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    packed = make_packed(tmp_path / "packed", rows=4, seed=1)
    given = ["out_dir=out", f"data.train={packed}", "tokens_per_step=64", "steps=1", *overrides]
    assert sentence in run("train", *given)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.train=nowhere", "nowhere holds no packed set: make one with `anchorctx prepare out_dir=nowhere"),
        ("model.path=./nowhere", "model ./nowhere does not exist: name the folder of a Hugging Face model"),
    ],
)
def test_data_and_model_are_looked_for_before_processes_meet(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, sentence: str
) -> None:
    """And before DeepSpeed is imported, which takes seconds, and may build an extension."""
    monkeypatch.setattr(dist, "start", lambda *_: pytest.fail("processes have met"))
    packed = make_packed(tmp_path / "packed", rows=4, seed=1)
    given = ["out_dir=out", f"data.train={packed}", "model.path=x/y", "tokens_per_step=64", override]
    assert sentence in run("train", *given)


def test_a_packed_set_that_was_changed(run: Run, tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "packed", rows=4, seed=1)
    shard = packed / "tokens_00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    error = run("train", MODEL, "out_dir=out", f"data.train={packed}", "tokens_per_step=64", "steps=1")
    assert "tokens_00000.npy was changed after it was written: remove" in error


def test_evaluating_what_is_no_model_or_too_short(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "model empty has no config.json" in run("eval", "model=empty", "out_dir=out")
    config = LlamaConfig(vocab_size=42, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.max_position_embeddings = 128
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", bos_token="<s>", eos_token="</s>")
    error = run("eval", "model=model", "out_dir=out", "perplexity.max_length=129")
    assert "perplexity asks for 129 tokens, but model has max_position_embeddings=128: lower" in error
