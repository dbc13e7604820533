from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anchorctx.attention.kernels import flash_attn, torch_varlen

from .flash_attn_contract import Recorder, aten_stand_in, install


@pytest.fixture
def cuda_guard() -> Iterator[None]:
    """A torch built for the CPU has no device guard for CUDA, which slicing and copying ask for: lend it the CPU's.

    That guard does nothing, as the one that `FakeTensorMode` installs in a torch built for CUDA.
    """
    if torch.version.cuda is not None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # CPU 0, CUDA 1
    guards[1] = guards[0]
    yield
    guards[1] = None


@pytest.fixture
def rounded_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.9) cuts float32 off to bfloat16, where a card rounds to the nearest: so does this."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    own = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return own(data, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """The stand-in of the package that the test is parametrised with, importable under the package's name."""
    recorder = Recorder()
    install(monkeypatch, request.param, recorder)
    for cached in (flash_attn._module, flash_attn._select):
        cached.cache_clear()
    yield recorder
    for cached in (flash_attn._module, flash_attn._select):
        cached.cache_clear()


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Plain-torch stand-ins for torch's CUDA operators, on this machine's CPU."""
    recorder = Recorder()
    monkeypatch.setattr(torch_varlen, "aten", aten_stand_in(recorder))
    return recorder
