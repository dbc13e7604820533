"""Sequence parallelism: long documents over several processes give the run of one, gradient norm included."""

from __future__ import annotations

import numpy as np
import pytest

from .runs import curve, metrics

pytestmark = pytest.mark.distributed
NAMES = ("train/loss", "train/grad_norm", "val/loss")
COMBINATIONS = {
    "zero1": ("parallel=zero1",),
    "zero2_always": ("parallel=zero2", "anchor_visible=always"),
    "zero3_memory": ("parallel=zero3", "memory=long"),
}


@pytest.fixture(scope="module")
def spread(launcher):
    """Two processes share each document of more than 32 tokens, at every ZeRO stage."""
    shared = ("parallel.sequence_parallel=2", "micro_tokens=32")
    runs = [(f"sp2_{name}", *shared, *given) for name, given in COMBINATIONS.items()]
    for result in launcher.several(2, runs):
        assert result["code"] == 0, result["stderr"][-2000:]
    return {name: launcher.root / f"sp2_{name}" for name in COMBINATIONS}


@pytest.fixture(scope="module")
def one(launcher):
    return launcher.run("one", 1, "micro_tokens=136")


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_row_over_two_processes_gives_the_run_of_one(spread, one, name):
    np.testing.assert_allclose(curve(spread[name], *NAMES), curve(one, *NAMES), rtol=1e-5)
    assert curve(one, "train/grad_norm")[1:].max() > 0.3  # clipping was at work


def test_only_long_documents_are_exchanged_and_the_log_says_so(spread, one):
    for run, others in ((one, False), *((run, True) for run in spread.values())):
        for row in metrics(run):
            if row["step"]:
                assert (row["perf/exchanged_bytes"] > 0) == others and (row["data/long_documents"] > 0) == others


def test_heads_that_do_not_divide_are_refused(launcher):
    (result,) = launcher.several(2, [("sp3", "parallel.sequence_parallel=3")])
    assert result["code"] == 2 and "Traceback" not in result["stderr"]
    assert "sequence_parallel" in result["stderr"]
