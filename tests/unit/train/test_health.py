"""Bad numbers without an engine: sums of bits, whose weights differ, spikes. Runs are in tests/distributed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.parallel.dist import Ranks
from anchorctx.train import health
from anchorctx.train.config import HealthConfig, OnNonfinite, OnSpike
from anchorctx.train.health import FILE, Health, bit_sum, checksums, disagreement


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "count"), [(0, 8), (1, 17), (3, 2), (2, 0), (5, 1)])
def test_any_bit_of_any_weight_changes_the_sum(dtype: torch.dtype, first: int, count: int) -> None:
    """Whatever the alignment: ZeRO's weights lie anywhere in a flat buffer."""
    weights = torch.randn(40, dtype=torch.float64).to(dtype)[first : first + count]
    before = bit_sum(weights).item()
    integers = weights.view(health.BITS[weights.element_size()])
    for index in range(count):
        for bit in (0, 5, 8 * weights.element_size() - 2):
            integers[index] ^= 1 << bit
            assert bit_sum(weights).item() != before
            integers[index] ^= 1 << bit
    assert bit_sum(weights).item() == before


def test_what_is_not_finite_is_found_in_a_whole_weight_and_in_a_share() -> None:
    good, bad = torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(7))
    bad.data[4] = -math.inf
    named = [("good", good), ("bad", bad), ("none", torch.nn.Parameter(torch.empty(0)))]
    names, found = checksums(named, torch.device("cpu"), shares=False)
    assert names == ["good", "bad", "none"] and found[:, 1].tolist() == [1, 0, 1]
    for parameter, value in ((good, math.nan), (bad, 2.0)):
        parameter.ds_tensor = torch.full((4,), value)  # type: ignore[attr-defined]
    _, shares = checksums(named[:2], torch.device("cpu"), shares=True)
    assert shares.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("sums", "finite", "sentence"),
    [
        ([[7, 8]] * 3, [[1, 1]] * 3, None),
        ([[7, 8], [7, 9], [7, 8]], [[1, 1]] * 3, "the weight b of process 1 of 3 differs from the others'"),
        ([[7, 8], [6, 8]], [[1, 1]] * 2, "the weight a of process 0 and 1 of 2 differs from the others'"),
        ([[7, 8], [7, 5]], [[1, 1], [1, 0]], "the weight b is not finite on process 1 of 2: go on without"),
        ([[7, 8]] * 2, [[0, 1]] * 2, "the weight a is not finite: go on with a lower optim.lr"),
    ],
)
def test_whose_weights_differ(sums: list[list[int]], finite: list[list[int]], sentence: str | None) -> None:
    said = disagreement(["a", "b"], torch.stack([torch.tensor(sums), torch.tensor(finite)], -1))
    assert said is None if sentence is None else said is not None and said.startswith(sentence)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each update was made."""
    made: list[bool] = []
    monkeypatch.setattr(health, "update", lambda engine: made.append(True) or 0.5)
    monkeypatch.setattr(health, "discard", lambda engine: made.append(False))
    monkeypatch.setattr(health, "_documents", lambda *_: [])
    return made


def healthy(folder: Path, losses: list[float] = [], **config: Any) -> Health:  # noqa: B006
    packed: Any = SimpleNamespace(fingerprint="0", tokenizer=lambda: None)
    state = {"losses": losses, "skipped": 0}
    return Health(HealthConfig(**config), None, packed, Ranks(0, 1, torch.device("cpu")), folder, state=state)


@pytest.mark.parametrize(("policy", "written", "kept"), [("ignore", 0, True), ("log", 1, True), ("skip", 1, False)])
def test_a_spike(tmp_path: Path, made: list[bool], policy: str, written: int, kept: bool) -> None:
    """Ten losses of 2 and 3: mean 2.5, standard deviation 0.527; 6 of these above the mean is 5.66."""
    subject = healthy(tmp_path, [2.0, 3.0] * 5, on_spike=OnSpike(policy))
    assert "train/grad_norm" in subject.update(5.6, 1, [0]) and made == [True]
    subject = healthy(tmp_path, [2.0, 3.0] * 5, on_spike=OnSpike(policy))
    subject.update(5.7, 2, [0])
    lines = (tmp_path / FILE).read_text().splitlines() if (tmp_path / FILE).exists() else []
    assert made == [True, kept] and len(lines) == written
    assert not lines or json.loads(lines[0])["deviations"] == pytest.approx((5.7 - 2.5) / 0.52705, abs=1e-4)
    assert (5.7 in subject.state["losses"]) == kept and subject.skipped == 1 - kept


def test_no_spike_at_the_beginning_nor_of_losses_that_hardly_differ(tmp_path: Path, made: list[bool]) -> None:
    subject = healthy(tmp_path, on_spike=OnSpike.skip)
    for step, loss in enumerate([1.0] * 7 + [100.0], start=1):  # seven are too few to compare with
        subject.update(loss, step, [0])
    subject = healthy(tmp_path, [1.0] * 20, on_spike=OnSpike.skip)
    subject.update(1.005, 30, [0])  # a thousandth of the mean is the least deviation
    assert made == [True] * 9
    subject.update(1.1, 31, [0])
    assert made[-1] is False


def test_a_resumed_run_knows_its_losses_and_forgets_later_steps(tmp_path: Path, made: list[bool]) -> None:
    subject = healthy(tmp_path, [2.0, 3.0] * 5, on_nonfinite=OnNonfinite.skip, spike_window=8)
    for step in (3, 4):
        subject.update(math.nan, step, [0])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 3, "half')
    state = json.loads(json.dumps(subject.state))
    assert state == {"losses": [2.0, 3.0] * 4, "skipped": 2}
    again = Health(
        subject._config, None, subject._packed, Ranks(0, 1, torch.device("cpu")), tmp_path, step=3, state=state
    )
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [3]
    assert again.state == state


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    assert healthy(tmp_path).allows(2.0, 3)
    assert not healthy(tmp_path, on_nonfinite=OnNonfinite.skip).allows(math.inf, 3)
    with pytest.raises(UserError, match="the validation loss after step 3 is nan: look at data.validation, lower opt"):
        healthy(tmp_path).allows(math.nan, 3)
