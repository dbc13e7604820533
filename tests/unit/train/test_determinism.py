"""The switch that makes training compute the same bits each time on CUDA; what it switches is torch's."""

from __future__ import annotations

import os

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.train import determinism
from anchorctx.train.determinism import deterministic


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.VARIABLE, "")  # so that whatever the test sets is undone
    monkeypatch.delenv(determinism.VARIABLE)


def switches() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


def test_inside_and_only_inside_if_wanted() -> None:
    before = switches()
    assert before == (False, True)
    with deterministic(False):
        assert switches() == before and determinism.VARIABLE not in os.environ
    with pytest.raises(KeyError), deterministic(True):
        assert switches() == (True, False) and not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[determinism.VARIABLE] == ":4096:8"
        raise KeyError
    assert switches() == before


def test_a_workspace_that_the_user_chose_is_kept_or_refused() -> None:
    os.environ[determinism.VARIABLE] = ":16:8"
    with deterministic(True):
        assert os.environ[determinism.VARIABLE] == ":16:8"
    os.environ[determinism.VARIABLE] = ":0:0"
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0: unset it, or use :4096:8 or :16:8"):
        with deterministic(True):
            pass
    assert switches() == (False, True)
