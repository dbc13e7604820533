from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


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
