"""A checkpoint that does not fit its configuration is refused, or reported, in the same words by every command."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchorctx.cli.main import main
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, build_config, load_model
from anchorctx.models.load import check_weights, read_config
from anchorctx.plan.config import PlanConfig
from anchorctx.plan.planner import Planner
from anchorctx.testing.readers import evaluation, plan, precision, train, train_sharded
from anchorctx.testing.tiny import ARCHITECTURES, text_model
from anchorctx.train import export

NAME, OTHER = "model.layers.1.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    text_model(tokenizer, 1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def missing(weights: Weights) -> None:
    del weights[NAME]


def wrong_shape(weights: Weights) -> None:
    weights[NAME] = weights[NAME][:-1].contiguous()


def unknown(weights: Weights) -> None:
    weights[OTHER] = torch.zeros(2)


def kvcomm(path: Path) -> None:
    corpus = path.parent / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "def f(x):\n    return x + 1\n\n\n" * 400}) + "\n")
    words = ["tasks=[copy]", "copy={problems: 2, question: 40, prefix: 20, output: 4}", "settings={warmup: 2}"]
    words += [f"model={path}", f"out_dir={path.parent / 'out'}", f"corpus={{path: {corpus}, format: auto}}"]
    assert main(["kvcomm", *words, "compare_tokens=2", "arms=[rotate]"]) == 0


COMMANDS = [train, train_sharded, plan, evaluation, precision, kvcomm]


def damaged(folder: Path, target: Path, damage: Callable[[Weights], None]) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    damage(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refusal(read: Callable[[Path], None], path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which `read` refuses `path`."""
    if read is kvcomm:
        with pytest.raises(AssertionError):
            read(path)
        return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("anchorctx kvcomm: ")
    with pytest.raises(UserError) as error:
        read(path)
    return str(error.value)


LACKS = f"lacks 1 weight of LlamaForCausalLM (first: {NAME}): download or export it again"
SHAPE = re.compile(
    rf"has 1 weight of another shape .*first: {re.escape(NAME)} is \((\d+), 32\), LlamaForCausalLM needs "
    r"\((\d+), 32\)\): undo changes"
)


@pytest.mark.parametrize("read", COMMANDS)
def test_damaged_checkpoints(
    read: Callable[[Path], None],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lacking = damaged(folder, tmp_path / "lacking", missing)
    assert f"model {lacking} {LACKS}" in refusal(read, lacking, capsys)
    found = SHAPE.search(refusal(read, damaged(folder, tmp_path / "other", wrong_shape), capsys))
    assert found and int(found[1]) == int(found[2]) - 1
    assert not (tmp_path / "out").exists()
    more = damaged(folder, tmp_path / "more", unknown)
    with caplog.at_level(logging.WARNING):
        read(more)
    text = f"model {more} has 1 weight that LlamaForCausalLM does not know (first: {OTHER}), left out"
    assert caplog.messages.count(text) == 1 and "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("read", [train, evaluation, precision, kvcomm])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite(
    read: Callable[[Path], None], value: float, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured of them, and nothing is trained from them."""

    def not_finite(weights: Weights) -> None:
        weights[NAME][1, 2] = value

    path = damaged(folder, tmp_path / "bad", not_finite)
    assert f"model {path} has weights that are NaN or infinite (1 of " in refusal(read, path, capsys)


@pytest.mark.parametrize("damage", [missing, wrong_shape, unknown])
def test_a_damaged_run(
    damage: Callable[[Weights], None],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Export reads a checkpoint's weights beside the run's configuration."""
    weights = load_file(folder / "model.safetensors")
    state = {NAME: weights.pop(NAME)}
    damage(state)
    weights |= state
    if damage is unknown:
        export._restore(folder, weights, "step_1", torch.float32)
        assert "model step_1 has 1 weight that LlamaForCausalLM does not know" in caplog.text
        return
    with pytest.raises(UserError) as error:
        export._restore(folder, weights, "step_1", torch.float32)
    assert LACKS in str(error.value) if damage is missing else SHAPE.search(str(error.value))


@pytest.mark.parametrize("read", [train, train_sharded, plan, evaluation, precision])
def test_files_that_are_cut_off_or_missing(read: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    cut, index = tmp_path / "cut", tmp_path / "index"
    for path in (cut, index):
        shutil.copytree(folder, path)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50_000])
    (index / "model.safetensors").unlink()
    (index / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {NAME: "a.safetensors"}})
    )
    with pytest.raises(UserError, match=rf"model {cut} has a model.safetensors that is cut short or damaged \(.+\)"):
        read(cut)
    with pytest.raises(UserError, match=rf"model {index} lacks 1 of its 1 files of weights \(first: a\.safetensors\)"):
        read(index)


def test_a_plan_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    bare, whole = (Planner(PlanConfig(model=ModelConfig(path=str(p)), row_length=512)) for p in (tmp_path, folder))
    assert bare.weights == whole.weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_checkpoints_of_every_architecture_pass(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where transformers renames or joins weights, ties them, or saves them in shards."""
    ARCHITECTURES[name].build().save_pretrained(tmp_path, max_shard_size="20KB")
    check_weights(str(tmp_path), build_config(ModelConfig(path=str(tmp_path))))
    load_model(ModelConfig(path=str(tmp_path)))
    assert not [r for r in caplog.records if r.name.startswith("anchorctx")]


def test_a_changed_field_must_exist(folder: Path) -> None:
    assert read_config(str(folder), {"max_position_embeddings": 77}).max_position_embeddings == 77
    with pytest.raises(
        UserError,
        match=r"config\.max_position=77 is not a field of LlamaConfig: did you mean max_position_embeddings\?",
    ):
        read_config(str(folder), {"max_position": 77})


def hostile_pickle(folder: Path, target: Path) -> Path:
    """A model whose .bin would make a file `ran` when it is unpickled."""

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (folder.parent / "ran",)

    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    torch.save({NAME: Runs()}, target / "pytorch_model.bin")
    return target


@pytest.mark.parametrize("read", [train, train_sharded, plan, evaluation, precision])
def test_no_code_of_a_checkpoint_is_run(read: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    bad = hostile_pickle(folder, tmp_path / "pickle")
    with pytest.raises(UserError, match=f"^model {bad} has a file of weights that holds more than weights, which cou"):
        read(bad)
    assert not (folder.parent / "ran").exists()
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    with pytest.raises(
        UserError, match=f"^model {own} needs code of its own from its repository, which is not run here"
    ):
        read(own)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("read", [train, train_sharded, plan, evaluation, precision])
def test_files_that_are_none(read: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    """A pipe would be waited for; a pointer of git-lfs is a text; an index may name any file of the machine."""
    pipe, pointer, outside = (tmp_path / name for name in ("pipe", "pointer", "outside"))
    for path in (pipe, pointer, outside):
        shutil.copytree(folder, path)
        (path / "model.safetensors").unlink()
    os.mkfifo(pipe / "model.safetensors")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    index = {"metadata": {}, "weight_map": {NAME: "../tiny/model.safetensors"}}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model.safetensors, which is no file but a pipe, socket or device: remove it"):
        read(pipe)
    with pytest.raises(UserError, match="has a pointer of git-lfs as model.safetensors: fetch it with git lfs pull"):
        read(pointer)
    with pytest.raises(UserError, match=r"index.json names ../tiny/model.safetensors, outside its folder"):
        read(outside)
