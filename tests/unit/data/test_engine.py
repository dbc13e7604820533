"""The stages on a local Ray cluster of two workers: the same shards as one process makes, also when workers die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from anchorctx.data import packed_set as shards
from anchorctx.data.config import PrepareConfig
from anchorctx.data.engine import EngineName, open_engine
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError

from .byte_corpus import TEXTS, byte_tokenizer, small_config

SCRIPT = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path

import ray

from anchorctx.data import prepare as module, packed_set as shards
from anchorctx.data.engine import EngineName
from anchorctx.data.config import PrepareConfig
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError

folder = Path(sys.argv[1])
sources = [SourceConfig(path=str(file)) for file in sorted((folder / "in").iterdir())]
config = PrepareConfig(
    out_dir=str(folder / "ray"), sources=sources, tokenizer=str(folder / "tokenizer"), row_length=64,
    engine=EngineName.ray,
)
shards.SHARD_TOKENS = 128
tokenise, write = module.run_part, module.write_rows


def dying_tokenise(ingest, item, progress=None):
    from anchorctx.data.tokens.store import TokenWriter

    if item.source == 2 and not (folder / "died_tokenising").exists():
        (folder / "died_tokenising").touch()
        TokenWriter.close = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return tokenise(ingest, item)


def dying_write(making, item):
    done = write(making, item)
    if item[0] == 1 and not (folder / "died_writing").exists():
        (folder / "died_writing").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return done


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
module.run_part, module.write_rows = dying_tokenise, dying_write
packed = module.prepare(config)
(folder / "manifest.json").write_text(json.dumps(packed.manifest))
module.run_part, module.write_rows = tokenise, write
(folder / "in" / "4.jsonl").write_text("{oops")
try:
    module.prepare(replace(config, out_dir=str(folder / "bad")))
except UserError as error:
    (folder / "error").write_text(str(error))
"""


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    """The small corpus in five files, which are five parts."""
    byte_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    (tmp_path / "in").mkdir()
    for i in range(5):
        rows = (json.dumps({"text": f"{text} of file {i}"}) for text in TEXTS)
        (tmp_path / "in" / f"{i}.jsonl").write_text("\n".join(rows))
    sources = [SourceConfig(path=str(file)) for file in sorted((tmp_path / "in").iterdir())]
    return replace(small_config(tmp_path, tmp_path / "tokenizer"), sources=sources)


def test_shards_are_those_of_one_process_also_when_workers_are_killed(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 128)
    here = prepare(config)
    environment = os.environ | {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died_tokenising").exists() and (tmp_path / "died_writing").exists()
    there = json.loads((tmp_path / "manifest.json").read_text())
    assert there["fingerprint"] == here.fingerprint and there["rows"] == len(here) > 20
    assert there["accounting"] == here.manifest["accounting"]
    data = [name for name in here.manifest["files"] if name.endswith((".npy", ".npz"))]
    assert len(data) > 50
    assert {name: there["files"][name] for name in data} == {name: here.manifest["files"][name] for name in data}
    # a mistake in the input is the same sentence, and nothing but whole parts is left
    assert (tmp_path / "error").read_text() == (
        f"{tmp_path}/in/4.jsonl:1 is not valid JSON (Expecting property name enclosed in double quotes, column 2): "
        "mend the line, or set on_bad_row=skip to leave such rows out"
    )
    assert [path.name for path in (tmp_path / "bad").iterdir()] == [".tokens"]


def test_ray_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"engine=ray needs Ray: pip install 'anchorctx\[ray\]'"),
        open_engine(EngineName.ray, None),
    ):
        pass
