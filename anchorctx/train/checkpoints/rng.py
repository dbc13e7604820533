"""Random states as JSON: of Python, numpy, torch and the CUDA devices."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorctx.errors import UserError
from anchorctx.records.typed import read_typed
from anchorctx.train.checkpoints.folders import REMEDY


@dataclass(frozen=True, slots=True)
class RandomStates:
    """A process's random states."""

    python: tuple[int, list[int], float | None]
    """As of `random.getstate`."""
    numpy: tuple[str, list[int], int, int, float]
    """As of `numpy.random.get_state`."""
    torch: str
    """The bytes of `torch.get_rng_state`, in hex digits."""
    cuda: list[str]
    """The same of each CUDA device."""


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"random_{rank:05d}.json"


def random_states() -> dict[str, Any]:
    """This process's, as `RandomStates` has them."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return asdict(
        RandomStates(
            (version, list(words), gauss),
            (str(name), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)),
            _hex(torch.get_rng_state()),
            [_hex(state) for state in cuda],
        )
    )


def restore(path: Path) -> None:
    """Give this process the random states of the file; UserError when they are none."""
    states = read_typed(path, RandomStates, REMEDY)
    try:
        random.setstate((states.python[0], tuple(states.python[1]), states.python[2]))
        name, key, position, has_gauss, cached = states.numpy
        np.random.set_state((name, np.array(key, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_bytes(states.torch))
        if states.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([_bytes(state) for state in states.cuda])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} holds no random states ({error}): {REMEDY}") from None


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
