"""What a checkpoint holds comes back bit for bit, in whatever stretches it was written."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.train.checkpoints import read, tensors
from anchorctx.train.export import gather

from .engine import FakeEngine
from .saving import ALONE, FILES, find, save, state_of


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
