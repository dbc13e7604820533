"""No byte of a checkpoint is taken on trust."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.train.checkpoints import read
from anchorctx.train.export import gather

from .engine import FakeEngine
from .saving import ALONE, FILES, find, save


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


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("shapes", {"vector": [2**70]}, "has vector of the impossible shape 2..63 or more"),
        ("shapes", {"vector": [0, 2**63]}, "has vector of the impossible shape 0, 2..63 or more"),
        ("shapes", {"vector": [-5, -1]}, "has vector of the impossible shape below 0, below 0"),
        ("shapes", {"vector": [6]}, "has 5 of 6 numbers of vector"),
        ("shapes", {"other": [2]}, "has 0 of 2 numbers of other"),
        ("tied", {"head": "nothing"}, "has no weight for head, which is tied to another"),
    ],
)
def test_a_state_that_its_tensors_do_not_fit_is_passed_over(
    field: str, value: Any, sentence: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a digest that fits."""
    save(tmp_path, 5, keep_last=9)
    newest = save(tmp_path, 6, keep_last=9)
    state = json.loads((newest / "state.json").read_text())
    state[field] |= value
    (newest / "state.json").write_text(json.dumps(state))
    marker = json.loads((newest / "COMPLETE").read_text())
    size = (newest / "state.json").stat().st_size
    marker["files"]["state.json"] = {"bytes": size, "xxh3_128": write_digest(newest / "state.json")}
    (newest / "COMPLETE").write_text(json.dumps(marker))
    assert (found := find(tmp_path)) and found.state.step == 5
    with pytest.raises(UserError, match=sentence):
        find(tmp_path, str(newest))


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


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    assert find(tmp_path / "checkpoints", "never") is None
    save(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="already holds a run .step_00000003.: use another out_dir"):
        find(tmp_path / "checkpoints", "never")


# -- strangers -------------------------------------------------------------------------------------------------------


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
