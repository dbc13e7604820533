"""A whole export of a run that was never trained: its card, and pushing it to a hub that is not there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig, RopeConfig, load_model
from anchorctx.records.manifest import build_manifest, write_json, write_manifest
from anchorctx.testing.tiny import save, text_model, word_tokenizer
from anchorctx.train import hub
from anchorctx.train.checkpoints.compare import configuration
from anchorctx.train.checkpoints.digest import write_digested_json
from anchorctx.train.checkpoints.folders import Marker, State
from anchorctx.train.checkpoints.states import shapes_of, tied_names
from anchorctx.train.checkpoints.tensors import Fragment, file_name, write
from anchorctx.train.config import DataConfig, ExportConfig, ExportDtype, TrainConfig
from anchorctx.train.export import export
from anchorctx.train.model_folder import MODEL, write_model_folder

METRICS = (
    {"step": 0, "tokens": 0, "val/loss": 3.5, "val/perplexity": 33.1155},
    {"step": 1, "tokens": 30, "train/loss": 3.25},
    {"step": 2, "tokens": 60, "train/loss": 3.125, "val/loss": 3.0, "val/perplexity": 20.0855},
    {"step": 3, "tokens": 90, "train/loss": 9.0},  # after the checkpoint
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    folder = tmp_path_factory.mktemp("packed")
    (folder / "corpus.txt").write_text("w5 w6 w7 w8 w9 w10 w11 w12\n" * 20)
    word_tokenizer(40).save_pretrained(folder / "words")
    source = SourceConfig(path=str(folder / "corpus.txt"))
    out = str(folder / "sets")
    return prepare(PrepareConfig(out_dir=out, sources=[source], tokenizer=str(folder / "words"), row_length=32))


@pytest.fixture
def run(tmp_path: Path, packed: PackedSet) -> Path:
    """What a run of one process to step 2 leaves, but for the optimizer's states."""
    tokenizer, run = word_tokenizer(40), tmp_path / "run"
    tokenizer.model_max_length = 64
    base = save(text_model(tokenizer, 64), tokenizer, tmp_path / "base")
    rope = RopeConfig(theta=1e6)
    config = TrainConfig(
        out_dir=str(run),
        data=DataConfig(train=str(packed.folder)),
        model=ModelConfig(path=str(base), rope=rope, max_length=128),
        steps=4,
    )
    write_manifest(run, build_manifest("train", dataclasses.asdict(config), data=packed.manifest, run="ab12"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    step = run / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    model = load_model(config.model)
    write_model_folder(run, model, tokenizer)
    facts = {"identity": {}, "schedule": {}, "model": configuration(model.config)}
    facts |= {"shapes": shapes_of(model), "tied": tied_names(model)}
    state = State(step=2, tokens=60, rows=2, processes=1, **facts)
    weights = [Fragment(name, 0, {"weight": weight.detach().view(-1)}) for name, weight in model.named_parameters()]
    files = {
        "state.json": write_digested_json(step / "state.json", dataclasses.asdict(state)),
        file_name(0): write(step / file_name(0), weights, 2),
    }
    write_json(step / "COMPLETE", dataclasses.asdict(Marker("ab12", files)))
    return run


@pytest.mark.parametrize("dtype", ExportDtype)
def test_an_export_is_whole(dtype: ExportDtype, run: Path, tmp_path: Path) -> None:
    out = export(ExportConfig(run=str(run), out_dir=str(tmp_path / "out"), dtype=dtype))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype is getattr(torch, dtype.value) and model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 128
    assert tokenizer("w5 w6").input_ids == [5, 6]
    assert not list(tmp_path.glob(".*"))


def test_a_foreign_or_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    config = ExportConfig(run=str(run), out_dir=str(tmp_path / "out"))
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", manifest | {"run": "cd34"})
    config.step = 2
    with pytest.raises(UserError, match=r"step_00000002 was written by another run .* .an export: trust=true"):
        export(config)
    config.trust = True
    assert export(config).is_dir()
    shard = run / "checkpoints" / "step_00000002" / file_name(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    config.out_dir = str(tmp_path / "other")
    with pytest.raises(UserError, match="states_00000.safetensors was changed after it was written"):
        export(config)
    config.step = None
    with pytest.raises(UserError, match="none of the 1 checkpoints in .* can be used"):
        export(config)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 0.5),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e4}),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 1),
    ],
)
def test_a_changed_configuration_is_not_exported(key: str, value: Any, run: Path, tmp_path: Path) -> None:
    file = run / MODEL / "config.json"
    config = json.loads(file.read_text())
    assert config[key] != value
    file.write_text(json.dumps(config | {key: value}))
    (run / MODEL / "digests.json").unlink()  # a run of before there was one
    with pytest.raises(
        UserError, match=rf"config.json has {key}=.*, but step_00000002 was trained with {key}=.*: rest"
    ):
        export(ExportConfig(run=str(run), out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_beside_the_weights_that_were_changed_are_not_exported(name: str, run: Path, tmp_path: Path) -> None:
    file = run / MODEL / name
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"eos_token_id": 9}))
    config = ExportConfig(run=str(run), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=rf"{name} has [0-9]+ of [0-9]+ bytes: restore it, or type the training's comm"):
        export(config)
    file.write_text(before.replace("e", "a"))
    with pytest.raises(UserError, match=rf"{name} was changed after it was written: restore it"):
        export(config)
    assert not (tmp_path / "out").exists()
    file.write_text(before)
    assert export(config).is_dir()


def test_a_damaged_newest_checkpoint_is_not_replaced_by_an_older_one_unasked(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints" / "step_00000003"
    shutil.copytree(run / "checkpoints" / "step_00000002", newest)
    shard = newest / file_name(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    config = ExportConfig(run=str(run), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="step_00000003 is damaged: set step=2 to export step_00000002, the "):
        export(config)
    assert not (tmp_path / "out").exists()
    config.step = 2
    assert export(config).is_dir()


def test_the_card_says_what_the_run_knows(run: Path, tmp_path: Path, packed: PackedSet) -> None:
    card = (export(ExportConfig(run=str(run), out_dir=str(tmp_path / "mine"))) / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "anchorctx"],
    }
    version = json.loads((run / "manifest.json").read_text())["versions"]["anchorctx"]
    trainer = f"anchorctx {version}" if version else "anchorctx"
    account = packed.manifest["accounting"]
    for line in (
        "# mine",
        f"The checkpoint `base`, trained by {trainer} on rows of 32 tokens. It reads up to 128 tokens.",
        "Let a prompt begin with the tokenizer's BOS token",
        "| RoPE | theta 1e+06 |",
        "| steps | 2 of 4, of 524,288 tokens |",
        f"| trained in one pass | {account['trained']:,} |",
        f"| trained of `corpus.txt` | {account['trained']:,} |",
        "| train/loss, step 1 and 2 | 3.2500, 3.1250 |",
        "| val/perplexity, step 0 and 2 | 33.1155, 20.0855 |",
        "arXiv:2411.13476",
    ):
        assert line in card, line
    assert str(tmp_path) not in card  # a card is for others


@pytest.mark.parametrize(
    ("path", "base"),
    [("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"), ("../models/mine", None), ("/models/mine", None)],
)
def test_the_base_model_is_named_where_it_is_on_the_hub(path: str, base: str | None, run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["model"]["path"], manifest["config"]["pattern"] = path, Pattern.full
    write_json(run / "manifest.json", manifest)
    card = (export(ExportConfig(run=str(run), out_dir=str(tmp_path / "out"))) / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == base
    assert "BOS" not in card  # no anchor, nothing to begin with


# -- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for `HfApi`: notes what it is asked for, and fails where it is told to."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.calls = fails, []

    def __call__(self) -> Hub:
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            if name == self.fails:
                raise ConnectionError("no route to host.\nand more")
            self.calls.append((name, arguments, options))

        return call


def test_the_folder_is_pushed_when_it_is_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", api := Hub())
    out = export(ExportConfig(run=str(run), out_dir=str(tmp_path / "out"), push_to="me/mine"))
    names = [name for name, _, _ in api.calls]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1:] == (("me/mine",), {"private": True, "exist_ok": True})
    assert api.calls[2][2]["repo_id"] == "me/mine" and api.calls[2][2]["folder_path"] == out


def test_nothing_is_written_for_a_hub_that_cannot_be_reached(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(run=str(run), out_dir=str(tmp_path / "out"), push_to="me/mine")
    monkeypatch.setattr(hub, "HfApi", Hub(fails="whoami"))
    with pytest.raises(UserError, match=r"push_to=me/mine cannot be reached \(no route to host\): log in"):
        export(config)
    config.push_to = "no name/at/all"
    with pytest.raises(UserError, match="push_to=no name/at/all is no name of a repository on the hub: use USER/NAME"):
        export(config)
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub(fails="upload_folder"))
    with pytest.raises(
        UserError, match=r"out was written but not pushed to me/mine \(no route to host\): upload it with `hf upload"
    ):
        export(ExportConfig(run=str(run), out_dir=str(tmp_path / "out"), push_to="me/mine"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
