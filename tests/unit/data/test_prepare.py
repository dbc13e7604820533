"""`prepare` as a user runs it: files in, a packed set out, every token accounted for."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from anchorctx.data.config import LossWeights, PrepareConfig
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.prepare import TOKENS, prepare
from anchorctx.data.sources.documents import OnBadRow
from anchorctx.data.sources.source import SourceConfig, SourceFormat
from anchorctx.data.sources.stdlib import Split, StdlibConfig, train_tokenizer
from anchorctx.errors import UserError

from .byte_corpus import TEXTS, byte_tokenizer, small_config, texts_in


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def config(tmp_path: Path, byte_dir: Path) -> PrepareConfig:
    return small_config(tmp_path, byte_dir)


def sentence(config: PrepareConfig) -> str:
    """The error's one sentence; nothing may be left behind but parts that were tokenised."""
    with pytest.raises(UserError) as error:
        prepare(config)
    out = Path(config.out_dir)
    assert not out.exists() or {path.name for path in out.iterdir()} <= {TOKENS}
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert "\n" not in str(error.value)
    return str(error.value)


# -- formats, end to end --------------------------------------------------------------------------------------------


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder / "a.jsonl"


def write_gz(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder).read_bytes()))
    return folder / "a.jsonl.gz"


def write_zst(folder: Path) -> Path:
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(write_jsonl(folder).read_bytes()))
    return folder / "a.jsonl.zst"


def write_parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet")
    return folder / "a.parquet"


def write_folder(folder: Path) -> Path:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


def write_glob(folder: Path) -> Path:
    return write_folder(folder) / "[01]*.txt"


def write_saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize(
    "write", [write_jsonl, write_gz, write_zst, write_parquet, write_folder, write_glob, write_saved]
)
def test_every_format_gives_the_same_documents(config: PrepareConfig, tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    config.sources = [SourceConfig(path=str(write(folder)))]
    packed = prepare(config)
    assert texts_in(packed) == sorted(TEXTS)
    assert packed.manifest["documents"] == len(TEXTS)
    assert packed.manifest["accounting"]["document_tokens"] == sum(len(text.encode()) for text in TEXTS)


def test_the_embedded_corpus_with_facts(tmp_path: Path) -> None:
    train_tokenizer(300, 20_000).save_pretrained(tmp_path / "tokenizer")
    source = SourceConfig(
        format=SourceFormat.stdlib, stdlib=StdlibConfig(split=Split.validation, facts=True, held_out=0.02)
    )
    packed = prepare(
        PrepareConfig(
            out_dir=str(tmp_path / "out"),
            sources=[source],
            tokenizer=str(tmp_path / "tokenizer"),
            row_length=2048,
            weights=LossWeights.facts,
        )
    )
    weights = np.concatenate([packed.row(i).loss_weights for i in range(len(packed))])
    assert set(np.unique(weights).tolist()) == {0.0, float(np.float32(np.float16(0.1))), 1.0}
    assert packed.row_weight.sum() == weights.sum(dtype=np.float64)
    assert packed.row_trained.sum() == packed.manifest["trained_tokens"] == np.count_nonzero(weights)


def test_several_sources_in_their_order(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("more")
    config.sources.append(SourceConfig(path=str(tmp_path / "more.txt")))
    assert texts_in(prepare(config)) == sorted([*TEXTS, "more"])


# -- what a set holds -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_text_comes_back_in_order_minus_what_was_dropped(
    data: st.DataObject, byte_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One letter a document, so that rows tell which document they are of."""
    folder = tmp_path_factory.mktemp("case")
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    texts = [chr(ord("A") + i) * n for i, n in enumerate(lengths)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "kind": "xy"}) + "\n" for text in texts))
    pack = PackConfig(
        policy=data.draw(st.sampled_from(Policy)),
        long_documents=data.draw(st.sampled_from(LongDocuments)),
        min_length=data.draw(st.integers(1, 3)),
        interleave=data.draw(st.integers(1, 3)),
        domain_tags=data.draw(st.booleans()),
    )
    config = PrepareConfig(
        out_dir=str(folder / "out"),
        sources=[SourceConfig(path=str(folder / "a.jsonl"), domain_field="kind")],
        tokenizer=str(byte_dir),
        row_length=data.draw(st.integers(12, 40)),
        anchor_len=data.draw(st.integers(1, 2)),
        pack=pack,
        append_eos=data.draw(st.booleans()),
    )
    try:
        packed = prepare(config)
    except UserError as error:
        room = config.row_length - config.anchor_len - 2 * pack.domain_tags
        own = [n + config.append_eos for n in lengths]
        dropped = [n < pack.min_length or (n > room and pack.long_documents is LongDocuments.drop) for n in own]
        assert "no token of the corpus would be trained" in str(error)
        assert all(gone or n == 1 or room == 1 for gone, n in zip(dropped, own, strict=True))
        return
    tokenizer_ = packed.tokenizer()
    letters = {tokenizer_.convert_tokens_to_ids(text[0]): i for i, text in enumerate(texts)}
    held = np.zeros(len(texts), int)
    for row in map(packed.row, range(len(packed))):
        assert len(row.input_ids) == config.row_length
        assert (row.input_ids[: config.anchor_len] == tokenizer_.bos_token_id).all()
        for token, number in letters.items():
            held[number] += (row.input_ids == token).sum()
        trained = np.flatnonzero(row.loss_weights)
        docs = row.layout.token_docs()
        assert (docs[trained] == docs[trained - 1]).all()
    accounts = packed.manifest["accounting"]
    missing = sum(lengths) - held.sum()
    assert missing <= sum(accounts["dropped"].values()) <= missing + config.append_eos * len(lengths)
    if not accounts["dropped"]:
        assert held.tolist() == lengths
    content = accounts["document_tokens"] + accounts["eos_tokens"] - sum(accounts["dropped"].values())
    assert accounts["trained"] + accounts["first_tokens"] + accounts["zero_weight"] == content
    assert content + accounts["anchor"] + accounts["tags"] + accounts["padding"] == len(packed) * config.row_length


def test_the_account_is_printed_and_written(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    packed = prepare(config)
    printed, accounts = capsys.readouterr().out, packed.manifest["accounting"]
    for key in ("document_tokens", "trained", "padding", "anchor"):
        assert f"{accounts[key]:,}" in printed
    assert f"packed set: {packed.folder}, {len(packed)} rows" in printed
    assert packed.row_trained.sum() == accounts["trained"] and packed.row_documents.sum() == accounts["pieces"]


def test_skipped_rows_are_counted_printed_and_written(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"text": "good"}', "{", "{", '{"text": ""}', '{"body": 1}', '{"text": 5}']
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    config.sources[0].on_bad_row = OnBadRow.skip
    packed = prepare(config)
    counts = {"malformed JSON": 2, "empty text": 1, "no text field": 1, "text not a string": 1}
    assert packed.manifest["skipped_rows"] == counts and packed.manifest["documents"] == 1
    printed = capsys.readouterr().out
    for reason, count in counts.items():
        assert f"skipped rows: {count} ({reason})" in printed


def test_without_bos_the_anchor_is_eos(config: PrepareConfig, tmp_path: Path) -> None:
    config.tokenizer = str(byte_tokenizer(tmp_path / "eos", eos_token="<end>"))
    packed = prepare(config)
    assert packed.row(0).input_ids[0] == packed.tokenizer().eos_token_id


def test_without_eos_documents_end_as_they_are(config: PrepareConfig, tmp_path: Path) -> None:
    config.tokenizer = str(byte_tokenizer(tmp_path / "bos", bos_token="<s>"))
    assert prepare(config).manifest["accounting"]["eos_tokens"] == 0


# -- bad input ------------------------------------------------------------------------------------------------------


def test_a_bad_line_leaves_nothing_behind(config: PrepareConfig, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "good"}\n{"text": oops}\n')
    expected = (
        f"{file}:2 is not valid JSON (Expecting value, column 10): mend the line, "
        "or set on_bad_row=skip to leave such rows out"
    )
    assert sentence(config) == expected


def test_an_empty_corpus(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("")
    assert sentence(config) == f"path={tmp_path / 'corpus.jsonl'} holds no documents: name a source that has some"


def test_everything_dropped(config: PrepareConfig) -> None:
    config.pack.min_length = 60
    assert sentence(config).startswith("no token of the corpus would be trained (dropped: {'shorter than min_length': ")


def test_a_tokenizer_without_bos_and_eos(config: PrepareConfig, tmp_path: Path) -> None:
    config.tokenizer = str(byte_tokenizer(tmp_path / "neither"))
    expected = (
        f"the tokenizer {config.tokenizer} has neither a BOS nor an EOS token to be the anchor: "
        "set its bos_token and save it again"
    )
    assert sentence(config) == expected


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_a_tokenizer_that_is_none(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / what
    if what == "damaged":
        byte_tokenizer(folder, bos_token="<s>")
        (folder / "tokenizer.json").write_text("{")
    elif what == "empty":
        folder.mkdir()
    config.tokenizer = str(folder)
    message = sentence(config)
    assert message.startswith(f"tokenizer={folder} cannot be loaded (")
    assert message.endswith("): name a folder with a tokenizer, or a model on the hub")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 2}, "row_length=2 must be at least 3, the anchor and two tokens: raise it"),
        ({"anchor_len": 0}, "anchor_len=0 must be at least 1: patterns without an anchor ignore it"),
        ({"sources": []}, "sources is empty: name at least one, such as sources=[{path: corpus.jsonl}]"),
        ({"workers": 0}, "workers=0 must be at least 1: use null to choose by the processors"),
        ({"seed": -1}, "seed=-1 must be at least 0; the default is 0"),
        (
            {"pack": PackConfig(min_length=64)},
            "pack.min_length=64 must be 1 to 63, what a row holds: change it",
        ),
    ],
)
def test_bad_settings(config: PrepareConfig, options: dict[str, Any], message: str) -> None:
    assert sentence(replace(config, **options)) == message


def test_tags_without_domains(config: PrepareConfig) -> None:
    config.pack.domain_tags = True
    expected = "corpus.jsonl:1 has no domain, but pack.domain_tags=true: set domain or domain_field of its source"
    assert sentence(config).endswith(expected)
    config.pack.domain_tags, config.keep_tokens = False, True
    prepare(config)  # and now its tokens are there already
    config.pack.domain_tags = True
    with pytest.raises(UserError, match="a document has no domain, but pack.domain_tags=true"):
        prepare(config)


def test_a_text_of_no_tokens_is_a_bad_row(config: PrepareConfig, tmp_path: Path) -> None:
    """A normalizer may strip a text to nothing."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(tmp_path / "strip")
    config.tokenizer = str(tmp_path / "strip")
    (tmp_path / "corpus.jsonl").write_text('{"text": "good"}\n{"text": "  "}\n')
    assert sentence(config).startswith(
        f"{tmp_path / 'corpus.jsonl'}:2 has a text that the tokenizer turns into no token: remove it"
    )
    config.sources[0].on_bad_row = OnBadRow.skip
    assert prepare(config).manifest["skipped_rows"] == {"no tokens": 1}
