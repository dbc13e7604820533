"""A copy is made only where the memory for it is there, for all processes of the machine."""

from __future__ import annotations

import pytest

from anchorctx.train.checkpoints import headroom


@pytest.mark.parametrize(
    ("available", "group", "processes", "fits"),
    [
        (2000, None, 1, True),
        (1999, None, 1, False),
        (2000, None, 2, False),
        (4000, 4000, 2, True),
        (4000, 3999, 2, False),  # the batch system's limit is narrower than the machine
        (None, None, 8, True),  # nothing is known
    ],
)
def test_half_of_what_is_left(
    available: int | None, group: int | None, processes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "_available", lambda: available)
    monkeypatch.setattr(headroom, "_group_left", lambda: group)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert headroom.fits_twice(1000) == fits


def test_the_kernel_is_asked() -> None:
    assert headroom.fits_twice(1) and not headroom.fits_twice(2**60)
