"""Checkpoints on disk: complete or not there, kept and found as asked, and no byte of them taken on trust."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from anchorctx.errors import UserError
from anchorctx.parallel import dist
from anchorctx.parallel.dist import Ranks
from anchorctx.train.checkpoints import compare, folders, read, states, tensors, write
from anchorctx.train.checkpoints.folders import State
from anchorctx.train.checkpoints.read import Found
from anchorctx.train.checkpoints.write import Writer
from anchorctx.train.config import CheckpointConfig, TrainConfig

from .engine import FakeEngine

ALONE = Ranks(0, 1, torch.device("cpu"))
RUN = "ab12"
FILES = ["COMPLETE", "random_00000.json", "state.json", "states_00000.safetensors"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "total", lambda values, _: values)


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.train_step()
    return engine


def state_of(engine: FakeEngine, step: int) -> State:
    model = engine.module.model
    return State(
        step=step,
        tokens=10 * step,
        rows=step,
        processes=1,
        identity={"seed": 0},
        schedule={"steps": 10},
        model={"hidden_size": 8},
        shapes=states.shapes_of(model),
        tied=states.tied_names(model),
    )


def save(root: Path, step: int, engine: FakeEngine | None = None, run: str = RUN, **config: Any) -> Path:
    if engine is None:
        engine = FakeEngine()
        engine.train_step()
    damaged = config.pop("damaged", ())
    writer = Writer(root, run, ALONE, CheckpointConfig(**config), damaged)
    return writer.save(engine, state_of(engine, step), wait=True)


def find(root: Path, resume: str = "auto", run: str = RUN, trust: bool = False) -> Found | None:
    return read.find(root, resume, run=run, trust=trust, ranks=ALONE)


def steps(root: Path) -> list[int | None]:
    return [folders.step_of(path) for path in folders.complete(root)]


# -- there and back ---------------------------------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(tmp_path: Path, engine: FakeEngine) -> None:
    for _ in range(3):
        engine.train_step()
    folder = save(tmp_path, 4, engine)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    drawn = random.random(), torch.rand(3), np.random.rand(3)
    other = FakeEngine()
    found = find(tmp_path)
    assert found is not None and (found.folder, found.state) == (folder, state_of(engine, 4))
    found.shards.check(found.state.shapes)
    read.load(other, found, ALONE)
    assert all(a.equal(b) for a, b in zip(engine.everything(), other.everything(), strict=True))
    assert other.optimizer.optimizer.state[other.flat]["step"] == 4 and other.global_steps == 4
    again = random.random(), torch.rand(3), np.random.rand(3)
    assert again[0] == drawn[0] and again[1].equal(drawn[1]) and np.array_equal(again[2], drawn[2])
    torch.manual_seed(0)
    engine.train_step()
    torch.manual_seed(0)
    other.train_step()
    assert all(a.equal(b) for a, b in zip(engine.everything(), other.everything(), strict=True))


def test_an_update_after_a_resume_uses_the_settings_of_now(tmp_path: Path, engine: FakeEngine) -> None:
    """What was saved has no learning rate, betas, eps or decay: the engine's own, of the new configuration, hold."""
    save(tmp_path, 1, engine)
    other = FakeEngine()
    settings = {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "lr": 0.2}
    other.optimizer.optimizer.param_groups[0].update(settings)
    found = find(tmp_path)
    assert found is not None
    read.load(other, found, ALONE)
    assert {name: other.optimizer.optimizer.param_groups[0][name] for name in settings} == settings
    weight, first, second = (tensor.clone() for tensor in other.everything()[:3])
    torch.manual_seed(0)
    other.train_step()
    torch.manual_seed(0)
    gradient = torch.randn_like(weight)
    first, second = first.lerp(gradient, 0.5), 0.6 * second + 0.4 * gradient**2
    size = 0.2 / (1 - 0.5**2)
    expected = weight * (1 - 0.2 * 0.7) - size * first / ((second / (1 - 0.6**2)).sqrt() + 1e-3)
    torch.testing.assert_close(other.everything()[0], expected, rtol=1e-6, atol=1e-6)  # 6e-8 measured


def test_an_export_has_all_weights_under_all_names(tmp_path: Path, engine: FakeEngine) -> None:
    from anchorctx.train.export import gather

    save(tmp_path, 1, engine)
    found = find(tmp_path)
    assert found is not None
    weights = gather(found)
    assert sorted(weights) == ["counts", "head", "matrix", "vector"]
    assert all(weights[name].equal(getattr(engine.module.model, name)) for name in weights)


def stretch(name: str, start: int, numbers: torch.Tensor) -> tensors.Fragment:
    return tensors.Fragment(name, start, {"weight": numbers})


def test_stretches_of_other_ranks_are_put_together(tmp_path: Path) -> None:
    """Ten numbers of one weight and three of another, on three ranks, read as two others would."""
    ten, three = torch.arange(10.0), torch.arange(3.0).bfloat16()
    parts = [
        [stretch("a", 0, ten[:4])],
        [stretch("a", 4, ten[4:5]), stretch("b", 0, three)],
        [stretch("a", 5, ten[5:])],
    ]
    for rank, fragments in enumerate(parts):
        tensors.write(tmp_path / tensors.file_name(rank), fragments, 7)
    shards = tensors.Shards(tmp_path, [path.name for path in tmp_path.iterdir()])
    shards.check({"a": [2, 5], "b": [3]})
    assert shards.updates == 7
    for low, high in ((0, 10), (0, 5), (5, 10), (3, 6), (4, 5), (9, 10)):
        shards.copy("weight", "a", low, into := torch.empty(high - low))
        assert into.equal(ten[low:high])
    assert shards.whole("a", [2, 5]).equal(ten.view(2, 5)) and shards.whole("b", [3]).equal(three)
    with pytest.raises(UserError, match=r"has 10 of 12 numbers of a: it is damaged"):
        shards.check({"a": [2, 6]})
    with pytest.raises(UserError, match=r"has 0 of 1 numbers of c"):
        shards.check({"c": []})
    (tmp_path / tensors.file_name(1)).unlink()
    with pytest.raises(UserError, match=r"has 4 of 10 numbers of a"):
        tensors.Shards(tmp_path, [path.name for path in tmp_path.iterdir()]).check({"a": [2, 5]})


# -- kept and pruned --------------------------------------------------------------------------------------------------


def test_the_newest_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_the_one_just_written_stays_though_an_abandoned_run_went_further(tmp_path: Path) -> None:
    for step in (100, 200, 300, 150):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [150, 200, 300]


def test_damaged_ones_do_not_count_and_stay(tmp_path: Path) -> None:
    """Two newer ones are damaged: the one that was resumed from is kept beside the new one."""
    for step in (1, 2, 8, 9):
        save(tmp_path, step, keep_last=9)
    damaged = [folders.step_folder(tmp_path, step) for step in (8, 9)]
    save(tmp_path, 3, keep_last=2, damaged=damaged)
    assert steps(tmp_path) == [2, 3, 8, 9]


LEFT = r"cannot be written \(No space left on device\): make room on the disk and type the same command again; the ch"


def fail(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_older_ones_stay_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=LEFT):
        patch.setattr(write.tensors, "write", fail)
        save(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert (found := find(tmp_path)) and found.state.step == 1
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2] and not list(tmp_path.glob(".*"))


def test_a_kill_while_an_older_one_is_removed_leaves_none_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep_last=1)

    def killed(folder: Path, **_: Any) -> None:
        if folder.name == "step_00000001":
            raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2]


def test_what_a_kill_left_half_done_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "COMPLETE").unlink()  # a kill in the middle of pruning
    (tmp_path / ".step_00000002.partial").mkdir()  # and one in the middle of writing
    (tmp_path / "notes").mkdir()  # the user's own
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000003"]


def test_copies_are_ignored_in_one_line_and_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = save(tmp_path, 3)
    copies = ["step_00000003 (copy)", "step_00000003.bak", "step_00000099.tar", "step_new"]
    for name in copies:
        shutil.copytree(first, tmp_path / name)
    assert (found := find(tmp_path)) and found.folder == first
    (line,) = caplog.messages
    assert line.endswith("as no complete checkpoints: " + ", ".join(copies))
    for step in (4, 5, 6):
        save(tmp_path, step, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*copies[:2], "step_00000006", *copies[2:]]


# -- in the background ------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds what the states were when `save` was called, though the next updates come first."""
    begin, original = threading.Event(), tensors.write
    monkeypatch.setattr(write.tensors, "write", lambda *arguments: begin.wait(10) and original(*arguments))
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    expected = engine.everything()
    writer.save(engine, state_of(engine, 1), wait=False)
    engine.train_step()
    assert steps(tmp_path) == []
    begin.set()
    writer.finish()
    found, other = find(tmp_path), FakeEngine()
    assert found is not None
    read.load(other, found, ALONE)
    assert all(a.equal(b) for a, b in zip(expected, other.everything(), strict=True))


def test_without_memory_for_a_copy_the_states_are_written_at_once(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "fits_twice", lambda _: False)
    monkeypatch.setattr(write, "_copied", fail)
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    expected = engine.everything()
    writer.save(engine, state_of(engine, 1), wait=False)
    engine.train_step()
    writer.finish()
    found, other = find(tmp_path), FakeEngine()
    assert found is not None
    read.load(other, found, ALONE)
    assert all(a.equal(b) for a, b in zip(expected, other.everything(), strict=True))


def test_the_next_save_says_what_went_wrong_with_the_one_before(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path, RUN, ALONE, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(write.tensors, "write", fail)
        writer.save(engine, state_of(engine, 1), wait=False)
        with pytest.raises(UserError, match=LEFT):
            writer.save(engine, state_of(engine, 2), wait=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=LEFT):
        patch.setattr(write, "sync_folder", fail)  # at the very end, when this rank's files are there
        writer.save(engine, state_of(engine, 3), wait=True)
    writer.save(engine, state_of(engine, 4), wait=True)
    assert steps(tmp_path) == [4]


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
    "fifo": fifo,
    "other json": lambda path: path.write_text('{"step": "3"}'),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: str, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5, keep_last=9)
    newest = save(tmp_path, 6, keep_last=9)
    DAMAGE[damage](newest / file)
    found = find(tmp_path)
    assert found is not None and found.state.step == 5
    (line,) = caplog.messages
    assert "step_00000006" in line and (file in line or file == "COMPLETE")
    with pytest.raises(UserError, match=r"step_00000006"):
        find(tmp_path, str(newest))


def test_the_sentence_names_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    flip(folder / "states_00000.safetensors")
    with pytest.raises(UserError, match="is damaged: states_00000.safetensors was changed after it was written: name"):
        find(tmp_path, str(folder))
    (folder / "states_00000.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="is damaged: states_00000.safetensors has 2 of [0-9]+ bytes: name another"):
        find(tmp_path, str(folder))


def test_nothing_but_damaged_ones_is_no_new_start(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* can be used .*: restore one, or"):
        find(tmp_path)


def test_a_file_elsewhere_is_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 3)
    marker = json.loads((folder / "COMPLETE").read_text())
    (tmp_path / "states_00009.safetensors").write_bytes((folder / "states_00000.safetensors").read_bytes())
    marker["files"]["../../states_00009.safetensors"] = marker["files"]["states_00000.safetensors"]
    (folder / "COMPLETE").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="names a file outside its folder"):
        find(tmp_path, str(folder))


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "COMPLETE").unlink()
    with pytest.raises(UserError, match="is an incomplete checkpoint .no COMPLETE in it.: name a complete one"):
        find(tmp_path, str(folder))
    (folder / "COMPLETE").write_text(json.dumps({"engine/mp_rank_00_model_states.pt": 10}))
    with pytest.raises(UserError, match=r"run: Field required.*written by anchorctx 0.1"):
        find(tmp_path, str(folder))


# -- strangers --------------------------------------------------------------------------------------------------------


def test_a_foreign_checkpoint_is_refused_unless_it_is_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    foreign = save(tmp_path, 2, run="cd34")
    assert (found := find(tmp_path)) and found.state.step == 1
    assert "passing over step_00000002" in caplog.text and "written by another run" in caplog.text
    with pytest.raises(UserError, match=r"written by another run .*checkpoint.trust=true"):
        find(tmp_path, str(foreign))
    assert (found := find(tmp_path, trust=True)) and found.state.step == 2
    flip(foreign / "random_00000.json")
    with pytest.raises(UserError, match="is damaged: random_00000.json was changed"):
        find(tmp_path, str(foreign), trust=True)


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def bombs(target: Path) -> Iterator[bytes]:
    """A pickle, and one in the file that `torch.save` makes."""
    yield pickle.dumps(Bomb(target))
    torch.save(Bomb(target), buffer := io.BytesIO())
    yield buffer.getvalue()


@pytest.mark.parametrize("file", FILES)
def test_a_planted_pickle_does_not_run(file: str, tmp_path: Path) -> None:
    """Not even with digests that fit, under a run's own name, and trusted: the most that a stranger can do."""
    from anchorctx.train.export import gather

    target = tmp_path / "it ran"
    for number, content in enumerate(bombs(target)):
        folder = save(tmp_path / str(number), 3)
        (folder / file).write_bytes(content)
        if file != "COMPLETE":
            marker = json.loads((folder / "COMPLETE").read_text())
            marker["files"][file] = {"bytes": len(content), "xxh3_128": write_digest(folder / file)}
            (folder / "COMPLETE").write_text(json.dumps(marker))
        with pytest.raises(UserError, match=file):
            found = find(tmp_path / str(number), str(folder), trust=True)
            assert found is not None
            gather(found)
            read.load(FakeEngine(), found, ALONE)
        assert not target.exists()
        pickle.loads(content) if number == 0 else torch.load(io.BytesIO(content), weights_only=False)
        assert target.exists()  # the bombs are live
        target.rmdir()


def write_digest(path: Path) -> str:
    import xxhash

    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


# -- the same run -----------------------------------------------------------------------------------------------------


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    assert find(tmp_path / "checkpoints", "never") is None
    save(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="already holds a run .step_00000003.: use another out_dir"):
        find(tmp_path / "checkpoints", "never")


def test_a_run_that_differs_is_named(tmp_path: Path, engine: FakeEngine) -> None:
    state = state_of(engine, 1)
    compare.check_same_run(state, {"seed": 0}, tmp_path)
    with pytest.raises(UserError, match="written with seed=0, but this run has seed=1: give the same"):
        compare.check_same_run(state, {"seed": 1}, tmp_path)


def test_a_model_that_differs_is_named(tmp_path: Path, engine: FakeEngine) -> None:
    import dataclasses

    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    state = dataclasses.replace(state_of(engine, 1), model=compare.configuration(config))
    compare.check_same_model(state, LlamaConfig.from_dict(config.to_dict()), state.shapes, tmp_path)
    changes = {"rms_norm_eps": 1e-4, "num_attention_heads": 8, "hidden_act": "gelu", "hidden_size": 32}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}, "attention_bias": True}
    for key, value in changes.items():
        other = LlamaConfig.from_dict(config.to_dict() | {key: value})
        with pytest.raises(UserError, match=rf"written with model.{key}=.*, but this run has model.{key}="):
            compare.check_same_model(state, other, state.shapes, tmp_path)
    shapes = state.shapes | {"vector": [6]}
    with pytest.raises(UserError, match=r"has vector with \[5\], but this run's model with \[6\]"):
        compare.check_same_model(state, config, shapes, tmp_path)
    del shapes["vector"]
    with pytest.raises(UserError, match=r"has vector with \[5\], but this run's model without it"):
        compare.check_same_model(state, config, shapes, tmp_path)


def test_a_changed_schedule_is_said_and_an_unchanged_one_is_not(
    tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    schedule = {"steps": 10, "optim.betas": (0.9, 0.95)}
    state = dataclasses.replace(state_of(engine, 1), schedule={"steps": 10, "optim.betas": [0.9, 0.95]})
    compare.say_changes(state, schedule, tmp_path)
    assert not caplog.records
    compare.say_changes(state, schedule | {"steps": 20}, tmp_path / "step_5")
    assert caplog.messages == ["continuing step_5 with steps=20 (was 10)"]


@pytest.mark.parametrize("options", [{"every": -1}, {"keep_last": 0}, {"keep_every": -2}])
def test_settings_that_would_lose_a_checkpoint(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"checkpoint.{name}={value} must be at least"):
        TrainConfig(checkpoint=CheckpointConfig(**options)).validate()
