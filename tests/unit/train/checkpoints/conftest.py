"""One process, without a process group."""

from __future__ import annotations

import pytest

from anchorctx.parallel import dist

from .engine import FakeEngine


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "total", lambda values, _: values)


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.train_step()
    return engine
