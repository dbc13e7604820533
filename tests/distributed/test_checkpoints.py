"""Real checkpoints: what a run may be resumed with, what it refuses before it writes, and what a stranger can do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from .runs import Launcher, metrics

pytestmark = pytest.mark.distributed
SHORT = ("checkpoint.every=2", "checkpoint.keep_last=9", "validate_every=0")
STAGES = {stage: (f"parallel=zero{stage}",) for stage in (1, 2, 3)}
OFFLOAD = "parallel.offload_optimizer=true"


@pytest.fixture(scope="module")
def whole(launcher: Launcher) -> dict[int, Path]:
    """A run of six steps at each ZeRO stage, by one process."""
    done = launcher.several(1, [(f"zero{stage}", *SHORT, *overrides) for stage, overrides in STAGES.items()])
    assert [result["code"] for result in done] == [0, 0, 0], done
    return {stage: launcher.root / f"zero{stage}" for stage in STAGES}


def stopped(launcher: Launcher, run: Path, name: str, step: int = 4) -> Path:
    """A copy of a finished run that looks as if it had been ended after `step`."""
    copy = shutil.copytree(run, launcher.root / name)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


def states(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "states_00000.safetensors")


def files(run: Path) -> dict[str, bytes]:
    found = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")  # says who holds it
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def test_another_stage_goes_on(launcher: Launcher, whole: dict[int, Path]) -> None:
    """The same stage bit for bit, and 1 and 2, which compute alike; 3 takes the gradient's norm in another order."""
    pairs = [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (2, 1)]
    runs = [(stopped(launcher, whole[old], f"from{old}to{new}").name, new) for old, new in pairs]
    done = launcher.several(1, [(name, *SHORT, *STAGES[new]) for name, new in runs])
    for (name, new), (old, _), result in zip(runs, pairs, done, strict=True):
        assert result["code"] == 0, result["stderr"][-2000:]
        found, expected = states(launcher.root / name), states(whole[old])
        assert found.keys() == expected.keys()
        if (old == 3) == (new == 3):
            assert all(found[key].equal(expected[key]) for key in expected), name
        worst = max(float((found[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in expected)
        assert worst < 2e-6, name  # of the largest number of each tensor; 6e-7 measured


REFUSED = [
    (("model.config.hidden_size=64",), "written with model.hidden_size=32, but this run has model.hidden_size=64"),
    (("model.config.num_key_value_heads=4",), "model.num_key_value_heads=2, but this run has"),
    (("+model.config.rms_norm_eps=1e-3",), "model.rms_norm_eps=1e-06, but this run has model.rms_norm_eps=0.001"),
    (("+model.config.hidden_act=gelu",), "model.hidden_act=silu, but this run has model.hidden_act=gelu"),
    (("model.rope.theta=1e6",), "written with rope="),
    (("model.dtype=bfloat16",), "written with dtype=float32, but this run has dtype=bfloat16"),
]


def test_another_model_is_refused_before_anything_is_written(launcher: Launcher, whole: dict[int, Path]) -> None:
    before = files(whole[2])
    done = launcher.several(1, [("zero2", *SHORT, "steps=8", *overrides) for overrides, _ in REFUSED])
    for result, (_, sentence) in zip(done, REFUSED, strict=True):
        assert result["code"] == 2 and sentence in result["stderr"], result["stderr"][-2000:]
        assert "Traceback" not in result["stderr"]
    assert files(whole[2]) == before


def test_an_update_uses_new_settings_of_the_optimizer(launcher: Launcher, whole: dict[int, Path]) -> None:
    """The same update, made by hand: gradients clipped to nearly nothing leave the decay and the first moment's."""
    settings = {"betas": "[0.5,0.6]", "eps": "0.1", "weight_decay": "0.5", "clip": "1e-9"}
    run = stopped(launcher, whole[2], "settings")
    overrides = [f"optim.{name}={value}" for name, value in settings.items()]
    (result,) = launcher.several(1, [(run.name, *SHORT, "steps=5", "optim.schedule=constant", *overrides)])
    assert result["code"] == 0, result["stderr"][-2000:]
    old, new = states(run, 4), states(run, 5)
    first = {key: 0.5 * old[key] for key in old if key.startswith("exp_avg:")}
    for key, moment in first.items():
        name = key.partition(":")[2]
        torch.testing.assert_close(new[key], moment, rtol=1e-6, atol=1e-9)
        second = 0.6 * old[f"exp_avg_sq:{name}"]
        torch.testing.assert_close(new[f"exp_avg_sq:{name}"], second, rtol=1e-6, atol=1e-12)
        decay = 0.01 * 0.5 if "norm" not in name else 0.0
        step = 0.01 / (1 - 0.5**5) * moment / ((second / (1 - 0.6**5)).sqrt() + 0.1)
        expected = old[f"weight:{name}"] * (1 - decay) - step
        torch.testing.assert_close(new[f"weight:{name}"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_offloading_is_switched_on_and_off(launcher: Launcher, whole: dict[int, Path]) -> None:
    """Slow: DeepSpeed compiles its CPU Adam, once on a machine. Its rounding is another."""
    for stage, more in ((2, ()), (3, ("parallel.offload_parameters=true",))):
        on, off = (OFFLOAD, *more), ()
        run = stopped(launcher, whole[stage], f"on{stage}")
        (result,) = launcher.several(1, [(run.name, *SHORT, *STAGES[stage], *on)])
        assert result["code"] == 0, result["stderr"][-2000:]
        back = stopped(launcher, run, f"off{stage}", 6)
        steps = "steps=8"
        done = launcher.several(1, [(back.name, *SHORT, *STAGES[stage], steps, *off), (f"zero{stage}", *SHORT, steps)])
        assert [each["code"] for each in done] == [0, 0], done
        curves = [[row["train/loss"] for row in metrics(path)[1:]] for path in (back, whole[stage])]
        np.testing.assert_allclose(*curves, rtol=1e-5)


class Bomb:
    """Unpickled, it leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_planted_pickles_run_neither_in_a_resume_nor_in_an_export(launcher: Launcher, whole: dict[int, Path]) -> None:
    """In each file of the newest checkpoint: `auto` takes the one before, its name is refused, nothing runs."""
    target, runs = launcher.root / "it ran", []
    names = sorted(path.name for path in (whole[2] / "checkpoints" / "step_00000006").iterdir())
    for number, name in enumerate(names):
        run = shutil.copytree(whole[2], launcher.root / f"planted{number}")
        folder = run / "checkpoints" / "step_00000006"
        if number % 2:
            torch.save(Bomb(target), folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Bomb(target)))
        # what a checkpoint of DeepSpeed's own would be: not listed, so not opened
        (folder / "engine").mkdir()
        torch.save(Bomb(target), folder / "engine" / "mp_rank_00_model_states.pt")
        runs += [(run.name, *SHORT, f"checkpoint.resume={folder}", "checkpoint.trust=true"), (run.name, *SHORT)]
    done = launcher.several(1, runs)
    for by_name, auto in zip(done[::2], done[1::2], strict=True):
        assert by_name["code"] == 2 and "Traceback" not in by_name["stderr"]
        assert auto["code"] == 0, auto["stderr"][-2000:]
    assert not target.exists()
    resumed = [(launcher.root / name / "resumed_00000004").is_dir() for name, *_ in runs]
    assert resumed == [True] * len(runs)


def test_a_run_that_begins_with_anothers_checkpoint_names_its_own(launcher: Launcher, whole: dict[int, Path]) -> None:
    folder = whole[2] / "checkpoints" / "step_00000004"
    overrides = ("branch", *SHORT, f"checkpoint.resume={folder}")
    done = launcher.several(1, [overrides, (*overrides, "checkpoint.trust=true"), ("branch", *SHORT, "steps=7")])
    assert [each["code"] for each in done] == [2, 0, 0], done
    assert "was written by another run than this one" in done[0]["stderr"]
    ids = [json.loads((launcher.root / run / "manifest.json").read_text())["run"] for run in ("branch", "zero2")]
    assert ids[0] != ids[1]
