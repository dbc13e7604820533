"""bfloat16 on CPUs whose bfloat16 matrix products are slow: computed in float32 and rounded, everything else is real.

A product of two bfloat16 numbers has 16 significant bits, so float32 holds it exactly; kernels then sum in float32 and
round once. So does this. Only the order of the sum can differ, which shows where a sum lies within float32's error of
the middle between two bfloat16 numbers: 2 results in 10,000 of products over 1,024, 2 in a million over 64.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from anchorctx.evals.evaluators.precision.config import Emulate

aten = torch.ops.aten
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
"""What a linear layer and a batched product come to, below autograd."""
NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features with which bfloat16 products are quick."""


class EmulatedBfloat16(TorchDispatchMode):
    """Inside this context, bfloat16 matrix products are computed in float32 and rounded to bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype is not torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return func(*args, **kwargs).to(torch.bfloat16)


def emulates(emulate: Emulate, device: torch.device) -> bool:
    """Whether bfloat16 products are to be emulated on `device`."""
    if emulate is not Emulate.auto:
        return emulate is Emulate.always
    return device.type == "cpu" and not any(torch.cpu.get_capabilities().get(name) for name in NATIVE)


def arithmetic_context(emulated: bool) -> contextlib.AbstractContextManager[Any]:
    """The context to run a bfloat16 model in."""
    return EmulatedBfloat16() if emulated else contextlib.nullcontext()
