from __future__ import annotations

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from anchorctx.data.sources import stdlib
from anchorctx.data.sources.facts import SPECIAL_TOKENS
from anchorctx.data.sources.stdlib import Split, StdlibConfig
from anchorctx.errors import UserError


def test_the_corpus_is_the_library_and_its_splits_divide_it():
    split = {s: {d.source: d.text for d in stdlib.documents(StdlibConfig(split=s))} for s in Split}
    train, validation, everything = (split[s] for s in (Split.train, Split.validation, Split.all))
    assert train.keys().isdisjoint(validation) and train | validation == everything
    assert list(everything) == sorted(everything)
    assert len(everything) > 400 and sum(map(len, everything.values())) > 7_000_000
    assert 0.04 < len(validation) / len(everything) < 0.12
    assert everything["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text("utf-8")
    folders = {part for name in everything for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"})


def test_domains_are_top_level_packages():
    domains = {d.source: d.domain for d in stdlib.documents(StdlibConfig(split=Split.all))}
    assert domains["json/decoder.py"] == "json" and domains["argparse.py"] == "argparse"


def test_cut_documents_ask_only_for_what_they_state():
    config = StdlibConfig(split=Split.validation, facts=True)
    documents = list(stdlib.documents(config))
    lengths = []
    for document in documents:
        counts = Counter(re.findall(r"<key_\d\d><val_\d\d>", document.text))
        assert set(counts.values()) == {config.mentions}
        assert len({pair[:8] for pair in counts}) == len(counts) <= 64
        lengths.append(len(document.text) - 16 * counts.total())
    assert max(lengths) <= config.max_chars
    assert 0.7 < np.median(lengths) / config.median_chars < 1.3
    assert np.percentile(lengths, 90) > 2 * np.median(lengths)


def test_planting_changes_no_text():
    plain = {d.source: d.text for d in stdlib.documents(StdlibConfig(split=Split.validation))}
    joined: dict[str, str] = {}
    for document in stdlib.documents(StdlibConfig(split=Split.validation, facts=True)):
        name = document.source.split("#")[0]
        joined[name] = joined.get(name, "") + re.sub(r"<key_\d\d><val_\d\d>", "", document.text)
    assert joined == plain


def test_documents_are_a_function_of_the_seed():
    def texts(seed: int) -> list[str]:
        config = StdlibConfig(split=Split.validation, facts=True, seed=seed)
        return [document.text for document in stdlib.documents(config)]

    assert texts(0) == texts(0) != texts(1)


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="has no library sources"):
        list(stdlib.documents(StdlibConfig()))


def test_undecodable_and_empty_files_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.source for d in stdlib.documents(StdlibConfig(split=Split.all))] == ["good.py"]


def test_the_tokenizer_knows_facts_keeps_lines_apart_and_loads(tmp_path: Path):
    stdlib.train_tokenizer(vocabulary=320, sample_chars=50_000).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 320 + 128 + 2
    assert all(isinstance(i, int) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    assert tokenizer.convert_ids_to_tokens(tokenizer("<key_07><val_63>")["input_ids"]) == ["<key_07>", "<val_63>"]
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(322, 450))
    lines = ["def f():\n", "\n", "        return 'é'  \n", "\treturn\n"]
    assert tokenizer("".join(lines))["input_ids"] == [i for line in lines for i in tokenizer(line)["input_ids"]]
    assert tokenizer.decode(tokenizer("".join(lines))["input_ids"]) == "".join(lines)
